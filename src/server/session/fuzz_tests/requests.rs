//! Arbitrary requests to the engine, in fragments, with a model beside it.
//! Every request has exactly one reply, with the right bytes or an error that can be, and the session ends as
//! the last bytes demand. No turn is without progress, so that nothing waits for ever.

use super::disk::{DiskTraits, FuzzDisk, IdleNotifier, clocks};
use super::model::{Contract, DISCONNECT, OFFERS, RequestModel, SentHeader, payload};
use crate::disk::Disk;
use crate::nbd::reply::Dialect;
use crate::nbd::request::Terms;
use crate::nbd::wire::{
    EXTENDED_REQUEST_MAGIC, ErrorCode, PRIVATE_COMMAND, REQUEST_MAGIC, TransmissionFlags,
};
use crate::server::end::SessionEnd;
use crate::server::export_policy::{
    ExportPolicy, HandoverReply, ProbeReply, SessionId, SessionsView,
};
use crate::server::payload_memory::{PayloadMemory, SessionMemory};
use crate::server::session::engine::{Blocked, Engine, EngineContext, PendingRequests};
use crate::server::session::reads::WHOLE_READ_MAX;
use crate::server::session::rx::Rx;
use crate::server::session::tx::Tx;
use crate::server::stop_request::StopRequest;
use std::sync::Arc;
use std::time::Duration;

/// Bytes before the headers: dialect and disk, offers, faults, sizes of fragments and of the send buffer.
const SWITCHES: usize = 6;
/// Sizes of the disk in bytes: of a few blocks, and of several pieces of long reads.
const SIZES: [usize; 2] = [20_000, 1_300_000];
/// Most bytes of payload that a client sends.
const PAYLOAD_MAX: u64 = 600_000;
/// Largest payload of the terms, in bytes: small, so that both sides of the limit are reached.
const PAYLOAD_LIMIT: u32 = 1_200_000;
/// So many fragments may be small; the later ones have at least this many bytes, so that a long stream takes no
/// more than a few hundred turns.
const SMALL_FRAGMENTS_MAX: usize = 300;
const LARGE_FRAGMENT: usize = 16 << 10;
/// Memory for payloads beyond those of each session, in bytes.
const PAYLOAD_MEMORY: u64 = 1 << 20;
/// Turns in a row that may have no effect.
const IDLE_TURNS_MAX: usize = 4;

/// A policy that permits requests, and refuses handovers.
#[derive(Debug)]
struct RefuseHandovers;

impl ExportPolicy for RefuseHandovers {
    fn probe(&self, _: SessionId, _: &[u8], _: &dyn SessionsView) -> ProbeReply {
        ProbeReply::Answer { data: Vec::new(), displaced: Vec::new(), is_source: false }
    }

    fn handover(&self, _: SessionId, _: &[u8]) -> HandoverReply {
        HandoverReply::Refuse(ErrorCode::Invalid)
    }
}

/// How the client's stream ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum StreamEnd {
    Closed,
    Disconnected,
    Truncated,
    Malformed,
    LongPayload,
}

/// The client: the headers that it still has to send, and its stream.
struct FuzzClient<'a> {
    contract: Contract,
    headers: &'a [u8],
    /// Bytes to send, from `at` on.
    stream: Vec<u8>,
    at: usize,
    payload_left: u64,
    end: Option<StreamEnd>,
}

/// The sizes of fragments in turn.
struct Fragments {
    shifts: [u8; 2],
    turn: usize,
}

impl Fragments {
    fn next(&mut self) -> usize {
        self.turn += 1;
        let size = 1 << (self.shifts[self.turn % 2] % 18);
        if self.turn < SMALL_FRAGMENTS_MAX { size } else { size.max(LARGE_FRAGMENT) }
    }
}

/// Requests: switches, then headers without magic number and cookie, each with a byte that the payload is made
/// of.
pub(crate) fn requests(bytes: &[u8]) {
    let Some((&switches, headers)) = bytes.split_first_chunk::<SWITCHES>() else { return };
    let Ok(notifier) = IdleNotifier::new() else { return };
    let (contract, terms, traits) = settings(switches);
    let image = FuzzDisk::new(traits);
    let disk = Disk::new(Box::new(image.clone()), contract.read_only);
    disk.forbid_threads();
    // Without a share, a session has to go on with the memory of its own.
    let payloads = PayloadMemory::new(if switches[5] & 64 == 0 { PAYLOAD_MEMORY } else { 0 });
    let context = EngineContext {
        disk: &disk,
        policy: &RefuseHandovers,
        notifier: Arc::new(notifier),
        memory: SessionMemory::new(&payloads),
        terms,
        answers_malformed: contract.oldstyle,
        client: (String::new(), 1),
        clocks: clocks(Duration::from_millis(if switches[5] & 128 == 0 { 0 } else { 10 })),
    };
    let engine = Engine::new(context, Rx::default(), Tx::default(), PendingRequests::default());
    let client = FuzzClient {
        contract,
        headers,
        stream: Vec::new(),
        at: 0,
        payload_left: PAYLOAD_MAX,
        end: None,
    };
    FuzzSession {
        engine,
        client,
        image,
        model: RequestModel::new(contract, traits),
        replies: Vec::new(),
        fragments: Fragments { shifts: [switches[3], switches[4]], turn: 0 },
        room: Fragments { shifts: [switches[5], 17], turn: 0 },
        has_eof: false,
    }
    .run();
    assert_eq!(payloads.used(), 0, "memory is not returned");
}

fn settings(switches: [u8; SWITCHES]) -> (Contract, Terms, DiskTraits) {
    let [mode, withheld, faults, ..] = switches;
    let dialect = match mode % 4 {
        0 | 3 => Dialect::Simple,
        1 => Dialect::Structured,
        _ => Dialect::Extended,
    };
    let (oldstyle, is_set) = (mode % 4 == 3, |bit: u8| mode & (1 << bit) != 0);
    let traits = DiskTraits {
        size: SIZES[usize::from(is_set(2))],
        is_cached: !is_set(3),
        is_cold: is_set(4),
        reverses: is_set(5),
        is_zeroing_slow: is_set(6),
        keeps_trimmed: is_set(7),
        extents_wait: faults & 128 != 0,
        fault_interval: usize::from(faults & 63),
    };
    let contract = Contract {
        oldstyle,
        structured: dialect != Dialect::Simple,
        extended: dialect == Dialect::Extended,
        read_only: withheld & 64 != 0,
        allocation: dialect != Dialect::Simple && withheld & 128 == 0,
        private: faults & 64 != 0,
        withheld: withheld & 63,
        payload_max: u64::from(PAYLOAD_LIMIT),
        whole_read_max: WHOLE_READ_MAX,
        private_kind: PRIVATE_COMMAND,
    };
    let terms = Terms {
        size: traits.size as u64,
        flags: offered(&contract),
        dialect,
        allocation_selected: contract.allocation,
        payload_length_max: PAYLOAD_LIMIT,
        private: contract.private,
        reads_beyond_end_are_no_space: oldstyle,
    };
    (contract, terms, traits)
}

fn offered(contract: &Contract) -> TransmissionFlags {
    let mut flags = TransmissionFlags::all();
    flags.set(TransmissionFlags::READ_ONLY, contract.read_only);
    let offers = [
        TransmissionFlags::SEND_FLUSH,
        TransmissionFlags::SEND_TRIM,
        TransmissionFlags::SEND_CACHE,
        TransmissionFlags::SEND_WRITE_ZEROES,
        TransmissionFlags::SEND_FUA,
        TransmissionFlags::SEND_FAST_ZERO,
    ];
    debug_assert!(OFFERS.len() < offers.len());
    for (bit, offer) in offers.into_iter().enumerate() {
        flags.set(offer, contract.withheld & (1 << bit) == 0);
    }
    flags
}

impl FuzzClient<'_> {
    /// Extends the stream by the next request, if there is one.
    fn send(&mut self, model: &mut RequestModel) {
        let length_size = if self.contract.extended { 8 } else { 4 };
        let Some((header, rest)) = self.headers.split_at_checked(12 + length_size) else {
            self.end = Some(StreamEnd::Closed);
            return;
        };
        self.headers = rest;
        let number = |from: usize, to: usize| {
            header[from..to].iter().fold(0, |number: u64, byte| number << 8 | u64::from(*byte))
        };
        let (control, seed) = (header[0], header[11 + length_size]);
        let sent = SentHeader {
            // Mostly a known command, which the fuzzer need not find in two bytes.
            kind: if control & 64 == 0 { u16::from(control & 15) } else { PRIVATE_COMMAND },
            flags: number(1, 3) as u16,
            offset: number(3, 11),
            length: number(11, 11 + length_size),
        };
        self.stream.drain(..self.at);
        self.at = 0;
        let start = self.stream.len();
        let is_malformed = control & 128 != 0;
        let is_last = is_malformed || sent.kind == DISCONNECT;
        let is_counted = !is_last || (is_malformed && self.contract.oldstyle);
        let cookie = if is_counted { model.send(sent, seed, is_malformed) } else { u64::MAX };
        self.encode(&sent, cookie, is_malformed);
        if is_malformed {
            self.end = Some(StreamEnd::Malformed);
        } else if sent.kind == DISCONNECT {
            self.end = Some(StreamEnd::Disconnected);
        } else {
            self.add_payload(&sent, seed);
        }
        debug_assert!(self.stream.len() > start);
    }

    fn encode(&mut self, sent: &SentHeader, cookie: u64, is_malformed: bool) {
        let magic = if self.contract.extended { EXTENDED_REQUEST_MAGIC } else { REQUEST_MAGIC };
        let magic = if is_malformed { !magic } else { magic };
        self.stream.extend_from_slice(&magic.to_be_bytes());
        self.stream.extend_from_slice(&sent.flags.to_be_bytes());
        self.stream.extend_from_slice(&sent.kind.to_be_bytes());
        self.stream.extend_from_slice(&cookie.to_be_bytes());
        self.stream.extend_from_slice(&sent.offset.to_be_bytes());
        let length = sent.length.to_be_bytes();
        self.stream.extend_from_slice(if self.contract.extended { &length } else { &length[4..] });
    }

    fn add_payload(&mut self, sent: &SentHeader, seed: u8) {
        let length = self.contract.payload(sent);
        if length > 1 << 32 {
            self.end = Some(StreamEnd::LongPayload);
        }
        let count = length.min(self.payload_left);
        self.payload_left -= count;
        let (mut at, mut left) = (sent.offset, count as usize);
        while left > 0 {
            let run = payload(seed, at);
            let run = &run[..run.len().min(left)];
            self.stream.extend_from_slice(run);
            at = at.wrapping_add(run.len() as u64);
            left -= run.len();
        }
        if count < length && self.end.is_none() {
            self.end = Some(StreamEnd::Truncated);
        }
    }
}

struct FuzzSession<'a, 'b> {
    engine: Engine<'a>,
    client: FuzzClient<'b>,
    image: FuzzDisk,
    model: RequestModel,
    /// Received and not checked.
    replies: Vec<u8>,
    fragments: Fragments,
    room: Fragments,
    has_eof: bool,
}

impl FuzzSession<'_, '_> {
    fn run(mut self) {
        let mut idle = 0;
        let end = loop {
            match self.turn() {
                Err(end) => break end,
                Ok(true) => idle = 0,
                Ok(false) => idle += 1,
            }
            assert!(idle <= IDLE_TURNS_MAX, "it waits for ever: {:?}", self.model);
        };
        self.check_end(&end);
    }

    /// One turn, as the driver takes it. False if it has no effect.
    fn turn(&mut self) -> Result<bool, SessionEnd> {
        let blocked = self.engine.advance(StopRequest::Serve)?;
        let taken = self.engine.tx.take(self.room.next());
        self.replies.extend_from_slice(&taken);
        let used = self.model.receive(&self.replies, self.image.failures());
        self.replies.drain(..used);
        let sent_all = !self.engine.tx.has_bytes();
        let has_worked = match blocked {
            Blocked::Handover(to, _) => {
                let refusal = HandoverReply::Refuse(ErrorCode::Invalid);
                self.engine.on_handover_reply(to, refusal)?;
                true
            }
            Blocked::Input | Blocked::InputWithReads => self.receive(),
            Blocked::End => match self.engine.take_end() {
                Some(end) => return Err(end),
                None => !sent_all,
            },
            Blocked::Completion => {
                let is_waiting = self.image.step() || self.engine.has_completed();
                assert!(is_waiting || !taken.is_empty(), "it waits for no operation");
                true
            }
            Blocked::Batch | Blocked::PeerCheck | Blocked::Output => !sent_all,
            other => {
                assert!(matches!(other, Blocked::Record), "{other:?}");
                false
            }
        };
        // Rarely, so that many operations are in flight at once.
        let is_stuck = !has_worked && taken.is_empty();
        let steps = is_stuck || self.fragments.turn.is_multiple_of(5);
        let has_stepped = steps && self.image.step();
        Ok(has_worked || has_stepped || !taken.is_empty())
    }

    /// The next fragment arrives, or the end of the stream; false if neither can.
    fn receive(&mut self) -> bool {
        while self.client.at == self.client.stream.len() && self.client.end.is_none() {
            self.client.send(&mut self.model);
        }
        let rest = &self.client.stream[self.client.at..];
        if !rest.is_empty() && !self.engine.rx.is_full() {
            let count = self.fragments.next().min(rest.len());
            self.client.at += self.engine.rx.fill(&rest[..count]);
            self.engine.on_received();
            return true;
        }
        if rest.is_empty() && !self.has_eof {
            self.has_eof = true;
            self.engine.on_end_of_stream();
            return true;
        }
        false
    }

    fn check_end(&self, end: &SessionEnd) {
        if matches!(end, SessionEnd::ReplyIncomplete(_)) {
            assert!(self.image.failures() > 0, "the disk has not failed");
            return;
        }
        let expected = self.client.end;
        let framing_is_lost = match end {
            SessionEnd::BadMagic(_) if !self.client.contract.oldstyle => StreamEnd::Malformed,
            SessionEnd::PayloadTooLong(_) => StreamEnd::LongPayload,
            _ => StreamEnd::Closed,
        };
        if framing_is_lost != StreamEnd::Closed {
            // The session ends at once, whatever it has still to do.
            assert_eq!(expected, Some(framing_is_lost));
            return;
        }
        assert!(self.replies.is_empty(), "a reply is incomplete: {:?}", self.replies);
        let (is_expected, incomplete) = match end {
            SessionEnd::Closed => (expected == Some(StreamEnd::Closed), 0),
            SessionEnd::Disconnected => (expected == Some(StreamEnd::Disconnected), 0),
            SessionEnd::Truncated => (expected == Some(StreamEnd::Truncated), 1),
            SessionEnd::BadMagic(_) => (expected == Some(StreamEnd::Malformed), 0),
            _ => (false, 0),
        };
        assert!(is_expected, "{end:?} after {expected:?}");
        self.model.assert_answered(incomplete);
    }
}
