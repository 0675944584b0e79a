//! Cases of the transmission phase: every command with every field spoiled, in each format of replies.

use crate::handshakes::greeted;
use crate::script::{Case, Fate, PROBE_COOKIE, Step};
use harness::MIB;
use harness::raw::*;
use harness::session::{MODES, Mode};

/// The disk of every server under attack.
pub(crate) const SIZE: u64 = 16 * MIB;
/// Where the adversary may write; honest clients use the part before.
const OURS: u64 = 12 * MIB;
/// The cookie of the adversary's requests.
const COOKIE: u64 = 0x1111_1111_1111_1111;
const LENGTH: u64 = 512;

const COMMANDS: [(&str, u16); 12] = [
    ("READ", READ),
    ("WRITE", WRITE),
    ("FLUSH", FLUSH),
    ("TRIM", TRIM),
    ("CACHE", CACHE),
    ("WRITE_ZEROES", WRITE_ZEROES),
    ("BLOCK_STATUS", BLOCK_STATUS),
    ("RESIZE", 8),
    ("command 9", 9),
    ("command 255", 255),
    ("the private command", 0x464c),
    ("command 65535", u16::MAX),
];

/// A name, and the flags, offset and length of a request.
const FIELDS: [(&str, u16, u64, u64); 14] = [
    ("at 2^64-1", 0, u64::MAX, LENGTH),
    ("across 2^64", 0, u64::MAX - 255, LENGTH),
    ("at 2^63", 0, 1 << 63, LENGTH),
    ("across the end", 0, SIZE - 256, LENGTH),
    ("at the end", 0, SIZE, 1),
    ("of nothing", 0, OURS, 0),
    ("of nothing behind the end", 0, SIZE + 1, 0),
    ("with all flags", u16::MAX, OURS, LENGTH),
    ("with flag 15", 1 << 15, OURS, LENGTH),
    ("with flag 6", 1 << 6, OURS, LENGTH),
    ("with FUA and DF", FUA | DF, OURS, LENGTH),
    ("with REQ_ONE and NO_HOLE", REQ_ONE | NO_HOLE, OURS, LENGTH),
    ("with FAST_ZERO", FAST_ZERO, OURS, LENGTH),
    ("with a payload length", PAYLOAD_LEN, OURS, LENGTH),
];

/// A request header in the format of a session.
fn header(mode: Mode, command: u16, flags: u16, cookie: u64, offset: u64, length: u64) -> Vec<u8> {
    match mode {
        Mode::Extended => encode_extended_request(command, flags, cookie, offset, length),
        Mode::Simple | Mode::Structured => {
            // The compact format has 32 bits.
            encode_request(command, flags, cookie, offset, length as u32)
        }
    }
}

/// What a client sends up to the transmission phase.
fn prelude(mode: Mode) -> Vec<u8> {
    let option = match mode {
        Mode::Simple => vec![],
        Mode::Structured => encode_option(OPT_STRUCTURED_REPLY, &[]),
        Mode::Extended => encode_option(OPT_EXTENDED_HEADERS, &[]),
    };
    let contexts = match mode {
        Mode::Simple => vec![],
        _ => encode_option(OPT_SET_META_CONTEXT, &encode_meta(b"", &[ALLOCATION.as_bytes()])),
    };
    greeted(&[option, contexts, encode_option(OPT_GO, &encode_go(b"", &[]))].concat())
}

/// The server answers requests that follow.
fn answers_requests(mode: Mode) -> Fate {
    let probe = header(mode, READ, 0, PROBE_COOKIE, 0, 1);
    Fate::Answers(probe, PROBE_COOKIE.to_be_bytes().to_vec())
}

/// Whether the server expects a payload of this request.
fn has_payload(mode: Mode, command: u16, flags: u16) -> bool {
    command == WRITE || (mode == Mode::Extended && flags & PAYLOAD_LEN != 0)
}

/// The cases of one format of a server. `start` leads to the transmission phase.
struct Table<'a> {
    cases: &'a mut Vec<Case>,
    mode: Mode,
    start: Vec<u8>,
    label: String,
}

impl Table<'_> {
    /// Adds a case that sends these bytes as requests.
    fn add(&mut self, name: &str, requests: Vec<u8>, fate: Fate) {
        let steps = vec![Step::Send([&self.start[..], &requests].concat())];
        self.cases.push(Case::new(format!("{name} ({})", self.label), steps, fate));
    }

    fn spoiled_fields(&mut self) {
        let mode = self.mode;
        for (command, number) in COMMANDS {
            for (field, flags, offset, length) in FIELDS {
                let mut bytes = header(mode, number, flags, COOKIE, offset, length);
                if has_payload(mode, number, flags) {
                    bytes.resize(bytes.len() + length as usize, 0x5a);
                }
                self.add(&format!("{command} {field}"), bytes, answers_requests(mode));
            }
            // A payload of this length follows only if the server expects one, and it does not.
            let bytes = header(mode, number, 0, COOKIE, 0, u64::MAX);
            let fate = match number {
                WRITE if mode == Mode::Extended => Fate::Closed,
                WRITE => Fate::Resets,
                _ => answers_requests(mode),
            };
            self.add(&format!("{command} of the greatest length"), bytes, fate);
            let both = [0, 0].map(|_| header(mode, READ, 0, COOKIE, OURS, LENGTH)).concat();
            self.add(&format!("{command} behind a cookie twice"), both, answers_requests(mode));
        }
    }

    fn magics(&mut self) {
        let request = || header(self.mode, READ, 0, COOKIE, 0, 1);
        let broken: Vec<(String, Vec<u8>)> = (0..16)
            .map(|bit| {
                let mut bytes = request();
                bytes[bit / 4] ^= 1 << (bit % 8);
                (format!("bit {bit} of the magic of a request"), bytes)
            })
            .collect();
        for (name, bytes) in broken {
            self.add(&name, bytes, Fate::Closed);
        }
        let other = if self.mode == Mode::Extended { Mode::Simple } else { Mode::Extended };
        self.add("a request of the other format", header(other, READ, 0, 1, 0, 1), Fate::Closed);
        self.add("an option among requests", encode_option(OPT_LIST, &[0; 64]), Fate::Closed);
        self.add("a reply as a request", [0x67, 0x44, 0x66, 0x98].repeat(7), Fate::Closed);
        self.add("zeros as a request", vec![0; 64], Fate::Closed);
    }

    fn breaks(&mut self) {
        let mut write = header(self.mode, WRITE, 0, COOKIE, OURS, 70_000);
        let head = write.len();
        write.resize(head + 70_000, 0x77);
        for at in
            [1, 3, 4, 6, 8, 15, 16, 23, 24, head - 1, head, head + 1, head + 4096, head + 69_999]
        {
            let cut = write[..at].to_vec();
            self.add(&format!("{at} bytes of a write, and leaves"), cut.clone(), Fate::Leaves);
            self.add(&format!("{at} bytes of a write, and resets"), cut.clone(), Fate::Resets);
            let steps = vec![Step::Send([&self.start[..], &cut].concat()), Step::HalfClose];
            let name = format!("{at} bytes of a write, and closes its side ({})", self.label);
            self.cases.push(Case::new(name, steps, Fate::Closed));
        }
        let disconnect = header(self.mode, DISC, u16::MAX, COOKIE, u64::MAX, 1);
        self.add("DISC with all fields set", disconnect, Fate::Closed);
        let disconnect = header(self.mode, DISC, 0, COOKIE, 0, 0);
        self.add("requests behind DISC", [disconnect, write].concat(), Fate::Closed);
    }

    /// Requests whose replies are never received.
    fn floods(&mut self) {
        let mode = self.mode;
        for (name, command, length) in [
            ("long reads", READ, MIB),
            ("short reads", READ, 1),
            ("states of blocks", BLOCK_STATUS, SIZE - OURS),
            ("flushes", FLUSH, 0),
            ("zeros", WRITE_ZEROES, MIB),
            ("trims", TRIM, MIB),
            ("unknown commands", 99, 0),
            ("refused reads", READ, SIZE),
        ] {
            let request = header(mode, command, 0, COOKIE, OURS, length).repeat(50);
            let steps = vec![Step::Send(self.start.clone()), Step::Flood(request, 400)];
            let name = format!("{name} without end ({})", self.label);
            self.cases.push(Case::new(name, steps, Fate::Resets).heavy());
        }
        let mut write = header(mode, WRITE, 0, COOKIE, OURS, 65_536);
        write.resize(write.len() + 65_536, 0x33);
        let steps = vec![Step::Send(self.start.clone()), Step::Flood(write, 400)];
        let name = format!("writes without end ({})", self.label);
        self.cases.push(Case::new(name, steps, Fate::Resets).heavy());
    }

    fn slow_and_urgent(&mut self) {
        let request = header(self.mode, READ, 0, COOKIE, OURS, LENGTH);
        let start = || Step::Send(self.start.clone());
        let steps = vec![start(), Step::Drip(request.clone())];
        let name = format!("a request byte by byte ({})", self.label);
        let fate = || answers_requests(self.mode);
        self.cases.push(Case::new(name, steps, fate()));
        for at in [0, 4, 20] {
            let parts = [&request[..at], &request[at..]].map(|part| Step::Send(part.to_vec()));
            let [first, rest] = parts;
            let name = format!("urgent data after {at} bytes of a request ({})", self.label);
            self.cases.push(Case::new(name, vec![start(), first, Step::Urgent, rest], fate()));
        }
    }

    fn fill(&mut self) {
        self.spoiled_fields();
        self.magics();
        self.breaks();
        self.floods();
        self.slow_and_urgent();
    }
}

/// All cases of the transmission phase after a newstyle handshake.
pub(crate) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for mode in MODES {
        let (start, label) = (prelude(mode), format!("{mode:?}"));
        Table { cases: &mut cases, mode, start, label }.fill();
    }
    cases
}

/// All cases of the transmission phase in old style, where the client sends nothing before it.
pub(crate) fn oldstyle_cases() -> Vec<Case> {
    let mut cases = Vec::new();
    let (start, label) = (vec![], "old style".to_owned());
    Table { cases: &mut cases, mode: Mode::Simple, start, label }.fill();
    cases.push(Case::new(
        "a newstyle handshake (old style)",
        vec![Step::Send(typical_handshake())],
        Fate::Closed,
    ));
    cases
}
