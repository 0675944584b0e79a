//! What the replies to requests have to be, decoded and checked without the code under test.
//!
//! Of two overlapping changes the earlier one is executed first. So a read may return the bytes of a change
//! that was sent before the read was answered, unless a later one was acknowledged before the read was sent.

use super::disk::DiskTraits;
use std::collections::BTreeSet;
use std::sync::LazyLock;

pub(super) const READ: u16 = 0;
pub(super) const WRITE: u16 = 1;
pub(super) const DISCONNECT: u16 = 2;
const FLUSH: u16 = 3;
const TRIM: u16 = 4;
const CACHE: u16 = 5;
const WRITE_ZEROES: u16 = 6;
const BLOCK_STATUS: u16 = 7;

const FUA: u16 = 1;
const NO_HOLE: u16 = 1 << 1;
const DF: u16 = 1 << 2;
const REQ_ONE: u16 = 1 << 3;
const FAST_ZERO: u16 = 1 << 4;
const PAYLOAD_LEN: u16 = 1 << 5;

const EPERM: u32 = 1;
const EIO: u32 = 5;
const EINVAL: u32 = 22;
const ENOSPC: u32 = 28;
const EOVERFLOW: u32 = 75;
const ENOTSUP: u32 = 95;

/// The result of the negotiation.
#[derive(Clone, Copy, Debug)]
pub(super) struct Contract {
    /// Old style: simple replies, and other errors.
    pub(super) oldstyle: bool,
    /// Replies of READ and BLOCK_STATUS are chunks.
    pub(super) structured: bool,
    pub(super) extended: bool,
    pub(super) read_only: bool,
    pub(super) allocation: bool,
    /// The private command is known.
    pub(super) private: bool,
    /// Commands and flags that are not offered, as a mask over [`OFFERS`].
    pub(super) withheld: u8,
    pub(super) payload_max: u64,
    /// Longest read in one chunk.
    pub(super) whole_read_max: u64,
    pub(super) private_kind: u16,
}

/// Commands that need an offer: the mask of each, in the order of the bits.
pub(super) const OFFERS: [u16; 4] = [FLUSH, TRIM, CACHE, WRITE_ZEROES];
/// Bit of FUA and of FAST_ZERO in [`Contract::withheld`].
const NO_FUA: u8 = 1 << 4;
const NO_FAST_ZERO: u8 = 1 << 5;

/// A request header as the client sends it.
#[derive(Clone, Copy, Debug)]
pub(super) struct SentHeader {
    pub(super) kind: u16,
    pub(super) flags: u16,
    pub(super) offset: u64,
    pub(super) length: u64,
}

/// A request, and what its replies have said.
#[derive(Debug)]
struct SentRequest {
    header: SentHeader,
    /// The first byte of its payload.
    seed: u8,
    /// The errors one of which it has to be answered with; empty if it has to succeed.
    errors: Vec<u32>,
    /// Numbers of events.
    sent: usize,
    answered: Option<usize>,
    failed: Option<u32>,
    /// Parts of a read that have arrived, in order of their offsets.
    received: BTreeSet<(u64, u64)>,
    is_described: bool,
    chunks: usize,
}

/// The requests of one session.
#[derive(Debug)]
pub(super) struct RequestModel {
    contract: Contract,
    disk: DiskTraits,
    requests: Vec<SentRequest>,
    events: usize,
}

/// Length of the runs of equal bytes in a payload.
pub(super) const RUN: usize = 512;
/// A run of each byte.
static RUNS: LazyLock<Vec<[u8; RUN]>> = LazyLock::new(|| (0..=255).map(|b| [b; RUN]).collect());

/// The bytes of a write with this seed from `offset` on, up to the end of a run. The number of the run is part
/// of each byte, so that misplaced bytes differ.
pub(super) fn payload(seed: u8, offset: u64) -> &'static [u8] {
    let run = offset / RUN as u64;
    let byte = if seed == 0 { 0 } else { seed.wrapping_add(run as u8) };
    &RUNS[usize::from(byte)][(offset % RUN as u64) as usize..]
}

impl SentHeader {
    fn end(&self) -> u64 {
        self.offset.saturating_add(self.length)
    }

    fn changes(&self) -> bool {
        [WRITE, TRIM, WRITE_ZEROES].contains(&self.kind)
    }
}

impl Contract {
    /// Length of the payload behind a header ("Request message"; extended headers announce it by a flag).
    pub(super) fn payload(&self, header: &SentHeader) -> u64 {
        let announced = self.extended && header.flags & PAYLOAD_LEN != 0;
        let private = self.private && header.kind == self.private_kind;
        if announced || private || header.kind == WRITE { header.length } else { 0 }
    }

    /// The errors that a request can be refused with ("Request types", "Error values").
    pub(super) fn errors(&self, header: &SentHeader, size: u64) -> Vec<u32> {
        let SentHeader { kind, flags, length, .. } = *header;
        if kind > BLOCK_STATUS || kind == self.private_kind {
            // The policy refuses valid private commands, with the same error.
            return vec![EINVAL];
        }
        let mut errors = Vec::new();
        let mut allowed = FUA;
        match kind {
            READ if self.structured => allowed |= DF,
            WRITE if self.extended => allowed |= PAYLOAD_LEN,
            WRITE_ZEROES => allowed |= NO_HOLE | FAST_ZERO,
            BLOCK_STATUS => allowed |= REQ_ONE,
            _ => {}
        }
        let offer = OFFERS.iter().position(|offered| *offered == kind);
        let is_withheld = offer.is_some_and(|bit| self.withheld & (1 << bit) != 0)
            || (flags & FUA != 0 && self.withheld & NO_FUA != 0)
            || (flags & FAST_ZERO != 0 && self.withheld & NO_FAST_ZERO != 0);
        let is_long = [READ, WRITE].contains(&kind) && length > self.payload_max;
        let lacks_context = kind == BLOCK_STATUS && !self.allocation;
        if flags & !allowed != 0 || is_withheld || is_long || lacks_context {
            errors.push(EINVAL);
        }
        if self.read_only && header.changes() {
            errors.push(EPERM);
        }
        let is_outside = header.offset.checked_add(length).is_none_or(|end| end > size);
        if is_outside && kind != FLUSH {
            let is_full = [WRITE, WRITE_ZEROES].contains(&kind) || (kind == READ && self.oldstyle);
            errors.push(if is_full { ENOSPC } else { EINVAL });
        }
        if errors.is_empty() && kind == READ && flags & DF != 0 && length > self.whole_read_max {
            errors.push(EOVERFLOW);
        }
        errors
    }
}

impl RequestModel {
    pub(super) fn new(contract: Contract, disk: DiskTraits) -> Self {
        Self { contract, disk, requests: Vec::new(), events: 0 }
    }

    /// A request is sent; returns its cookie.
    pub(super) fn send(&mut self, header: SentHeader, seed: u8, is_malformed: bool) -> u64 {
        self.events += 1;
        let errors = match is_malformed {
            true => vec![EINVAL],
            false => self.contract.errors(&header, self.disk.size as u64),
        };
        self.requests.push(SentRequest {
            header,
            seed,
            errors,
            sent: self.events,
            answered: None,
            failed: None,
            received: BTreeSet::new(),
            is_described: false,
            chunks: 0,
        });
        self.requests.len() as u64 - 1
    }

    /// Whether every request but the last `incomplete` ones has a reply.
    pub(super) fn assert_answered(&self, incomplete: usize) {
        let complete = self.requests.len() - incomplete;
        for request in &self.requests[..complete] {
            assert!(request.answered.is_some(), "no reply to {request:?}");
        }
    }

    /// Takes the replies from the front of `bytes`; returns how many bytes they have. `failures`: how often
    /// the disk has failed.
    pub(super) fn receive(&mut self, bytes: &[u8], failures: usize) -> usize {
        let mut used = 0;
        while let Some(length) = self.reply(&bytes[used..], failures) {
            used += length;
        }
        used
    }

    /// One reply or chunk; `None` if it is incomplete.
    fn reply(&mut self, bytes: &[u8], failures: usize) -> Option<usize> {
        let magic = number(bytes, 0, 4)?;
        let (cookie, kind, done, head, length) = match magic {
            0x6744_6698 => {
                let (error, cookie) = (number(bytes, 4, 4)? as u32, number(bytes, 8, 8)?);
                return self.simple(cookie, error, &bytes[16..], failures);
            }
            0x668e_33ef if self.contract.structured && !self.contract.extended => (
                number(bytes, 8, 8)?,
                number(bytes, 6, 2)?,
                number(bytes, 4, 2)?,
                20,
                number(bytes, 16, 4)?,
            ),
            0x6e8a_278c if self.contract.extended => {
                let cookie = number(bytes, 8, 8)?;
                let offset = number(bytes, 16, 8)?;
                assert_eq!(
                    Some(offset),
                    self.requests.get(cookie as usize).map(|r| r.header.offset)
                );
                (cookie, number(bytes, 6, 2)?, number(bytes, 4, 2)?, 32, number(bytes, 24, 8)?)
            }
            other => {
                assert_eq!(other, 0, "a reply does not begin as one was agreed on");
                return None;
            }
        };
        assert!(done <= 1, "unknown flags {done:#x}");
        let payload = bytes.get(head..head + usize::try_from(length).unwrap_or(usize::MAX))?;
        self.chunk(cookie as usize, kind, payload);
        if done == 1 {
            self.finish(cookie as usize, failures);
        }
        Some(head + payload.len())
    }

    fn unanswered(&mut self, cookie: usize) -> &mut SentRequest {
        assert!(cookie < self.requests.len(), "a reply to no request: {cookie}");
        let request = &mut self.requests[cookie];
        assert!(request.answered.is_none(), "a second reply to {request:?}");
        request
    }

    fn simple(&mut self, cookie: u64, error: u32, rest: &[u8], failures: usize) -> Option<usize> {
        let contract = self.contract;
        let request = self.unanswered(cookie as usize);
        let header = request.header;
        let is_chunked = [READ, BLOCK_STATUS].contains(&header.kind);
        let needs_chunk = contract.extended || contract.structured && is_chunked;
        assert!(!needs_chunk, "{request:?}");
        let has_data = header.kind == READ && error == 0;
        let length = if has_data { header.length as usize } else { 0 };
        let data = rest.get(..length)?;
        if error != 0 {
            request.failed = Some(error);
        } else if has_data {
            self.data(cookie as usize, header.offset, data);
        }
        self.finish(cookie as usize, failures);
        Some(16 + length)
    }

    fn chunk(&mut self, cookie: usize, kind: u64, payload: &[u8]) {
        let extended = self.contract.extended;
        let request = self.unanswered(cookie);
        request.chunks += 1;
        let field = |at, length| number(payload, at, length).unwrap_or(0);
        match kind {
            0 => assert!(payload.is_empty()),
            1 => {
                assert!(payload.len() > 8, "data without data");
                self.data(cookie, field(0, 8), &payload[8..]);
            }
            2 => {
                assert_eq!(payload.len(), 12);
                let (offset, length) = (field(0, 8), field(8, 4));
                assert!(length > 0, "a hole without bytes");
                let sent = self.part(cookie, offset, offset + length);
                self.check_zeros(sent, offset, offset + length);
            }
            5 if !extended => {
                let extents: Vec<(u64, u64)> = payload[4..]
                    .chunks_exact(8)
                    .map(|one| (number(one, 0, 4).unwrap_or(0), number(one, 4, 4).unwrap_or(0)))
                    .collect();
                self.extents(cookie, &extents);
            }
            6 if extended => {
                let extents: Vec<(u64, u64)> = payload[8..]
                    .chunks_exact(16)
                    .map(|one| (number(one, 0, 8).unwrap_or(0), number(one, 8, 8).unwrap_or(0)))
                    .collect();
                assert_eq!(field(4, 4), extents.len() as u64);
                self.extents(cookie, &extents);
            }
            _ => {
                assert!([0x8001, 0x8002].contains(&kind), "a chunk of kind {kind:#x}");
                assert_ne!(field(0, 4), 0);
                request.failed = Some(field(0, 4) as u32);
                let tail = if kind == 0x8002 { 8 } else { 0 };
                assert_eq!(payload.len() as u64, 6 + field(4, 2) + tail);
            }
        }
    }

    /// The last reply to a request: it has to be complete, and its error one that can be.
    fn finish(&mut self, cookie: usize, failures: usize) {
        self.events += 1;
        let (events, slow) = (self.events, self.disk.is_zeroing_slow);
        let request = self.unanswered(cookie);
        request.answered = Some(events);
        let header = request.header;
        if let Some(error) = request.failed {
            let is_slow = slow && header.flags & FAST_ZERO != 0 && error == ENOTSUP;
            let is_empty = header.kind == BLOCK_STATUS && header.length == 0 && error == EINVAL;
            let is_fault = request.errors.is_empty() && error == EIO && failures > 0;
            let is_expected = request.errors.contains(&error) || is_slow || is_empty || is_fault;
            assert!(is_expected, "{request:?}");
            return;
        }
        assert!(request.errors.is_empty(), "success: {request:?}");
        let mut at = header.offset;
        for (start, end) in &request.received {
            assert_eq!(*start, at, "bytes are missing: {request:?}");
            at = *end;
        }
        let is_whole = header.kind != READ || at == header.end();
        assert!(is_whole, "bytes are missing: {request:?}");
        let is_divided = header.flags & DF != 0 && request.received.len() > 1;
        assert!(!is_divided, "more than one chunk: {request:?}");
        let lacks_extents = header.kind == BLOCK_STATUS && header.length > 0;
        assert!(request.is_described || !lacks_extents, "no extents: {request:?}");
    }

    /// Data of a read.
    fn data(&mut self, cookie: usize, offset: u64, data: &[u8]) {
        if !data.is_empty() {
            let sent = self.part(cookie, offset, offset + data.len() as u64);
            self.check_bytes(sent, offset, data);
        }
    }

    /// A part of a read has arrived; returns when the read was sent.
    fn part(&mut self, cookie: usize, offset: u64, end: u64) -> usize {
        let request = self.unanswered(cookie);
        let is_inside = offset >= request.header.offset && end <= request.header.end();
        assert!(request.header.kind == READ && is_inside, "{offset} to {end} for {request:?}");
        assert!(request.received.insert((offset, end)), "twice: {request:?}");
        request.sent
    }

    fn extents(&mut self, cookie: usize, extents: &[(u64, u64)]) {
        let request = self.unanswered(cookie);
        let SentHeader { kind, flags, offset, length } = request.header;
        assert!(kind == BLOCK_STATUS && !request.is_described, "{request:?}");
        request.is_described = true;
        assert!(flags & REQ_ONE == 0 || extents.len() == 1, "{} extents", extents.len());
        let (sent, mut at) = (request.sent, offset);
        for (length, state) in extents {
            assert!(*length > 0 && *state <= 3);
            if state & 2 != 0 {
                self.check_zeros(sent, at, at + length);
            }
            at += length;
        }
        assert!(at <= offset + length, "extents beyond the request");
        assert!(at > offset || length == 0);
    }

    /// Checks bytes that a request sent at the event `sent` has read.
    fn check_bytes(&self, sent: usize, offset: u64, data: &[u8]) {
        for (start, end) in self.segments(offset, offset + data.len() as u64) {
            let candidates = self.candidates(sent, start, end);
            let mut rest = &data[(start - offset) as usize..(end - offset) as usize];
            let mut at = start;
            while !rest.is_empty() {
                let (run, after) = rest.split_at(rest.len().min(payload(0, at).len()));
                let is = |seed: &u8| run == &payload(*seed, at)[..run.len()];
                let is_mixed = || {
                    run.iter()
                        .all(|byte| candidates.iter().any(|seed| payload(*seed, at)[0] == *byte))
                };
                let fits = candidates.iter().any(is) || is_mixed();
                assert!(fits, "{run:?} at {at} is none of {candidates:?}");
                at += run.len() as u64;
                rest = after;
            }
        }
    }

    /// Checks that such a request may read zeros.
    fn check_zeros(&self, sent: usize, offset: u64, end: u64) {
        for (start, end) in self.segments(offset, end) {
            let candidates = self.candidates(sent, start, end);
            let may_be_zero = candidates.iter().any(|seed| payload(*seed, start)[0] == 0);
            assert!(may_be_zero, "zeros from {start} to {end}: {candidates:?}");
        }
    }

    /// Divides a range where changes begin and end.
    fn segments(&self, offset: u64, end: u64) -> Vec<(u64, u64)> {
        let changes = self.requests.iter().filter(|request| request.header.changes());
        let mut cuts: BTreeSet<u64> = BTreeSet::from([offset, end]);
        cuts.extend(changes.flat_map(|r| [r.header.offset, r.header.end()]));
        let cuts: Vec<u64> = cuts.range(offset..=end).copied().collect();
        cuts.windows(2).map(|pair| (pair[0], pair[1])).collect()
    }

    /// The seeds of the changes whose bytes such a read may return from a segment that no change divides.
    fn candidates(&self, sent: usize, start: u64, end: u64) -> Vec<u8> {
        let mut seeds = Vec::new();
        for request in self.requests.iter().rev() {
            let SentRequest { header, errors, answered, failed, .. } = request;
            let covers = header.offset <= start && end <= header.end();
            if !header.changes() || !covers || !errors.is_empty() {
                continue;
            }
            seeds.push(if header.kind == WRITE { request.seed } else { 0 });
            let is_certain = header.kind != TRIM && failed.is_none();
            if is_certain && answered.is_some_and(|answered| answered < sent) {
                return seeds;
            }
        }
        seeds.push(0);
        seeds
    }
}

/// A big-endian number.
fn number(bytes: &[u8], at: usize, length: usize) -> Option<u64> {
    let field = bytes.get(at..at + length)?;
    Some(field.iter().fold(0, |number, byte| number << 8 | u64::from(*byte)))
}
