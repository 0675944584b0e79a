//! Read-ahead: what a session will read next, if it reads sequentially, is requested before it asks for it.
//! Pure. For clients that send one request at a time over a connection with a long round trip; a client with
//! a queue of requests needs none.
//!
//! A read that continues the last one of its session extends the range ahead, which doubles up to the
//! configured length. A later read inside that range is answered from memory, or waits for the request
//! that is under way.
//!
//! Coherence: nothing is requested ahead that a change under way overlaps, and a change discards what it
//! overlaps when it begins. So no read returns older bytes than an earlier one has returned.

use crate::disk::{Buffer, Completion, Op};
use crate::range::Range;
use std::collections::{HashMap, VecDeque};
use std::io;

/// The owner of the requests that read ahead. Queues have other ids.
pub(super) const READ_AHEAD_OWNER: u64 = u64::MAX;

/// The ranges ahead of all sessions.
#[derive(Debug)]
pub(super) struct ReadAhead {
    size: u64,
    bytes_max: u64,
    streams: HashMap<u64, ReadStream>,
    /// Changes under way: queue, key and range.
    changes: Vec<(u64, u64, Range)>,
    next_token: u64,
}

/// The reads of one session.
#[derive(Debug, Default)]
struct ReadStream {
    /// Where the last read has ended.
    next: u64,
    /// Length of the range ahead; 0 unless the last reads were sequential.
    window: u64,
    /// In order of their ranges.
    fetches: VecDeque<Fetch>,
}

#[derive(Debug)]
struct Fetch {
    token: u64,
    range: Range,
    /// The bytes, once they have arrived.
    data: Option<Buffer>,
    /// Reads that wait for the bytes.
    waiting: Vec<(u64, Op)>,
    /// No later read may be answered from it.
    is_stale: bool,
}

/// What to do with an operation.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum ReadAheadStep {
    /// It is answered.
    Complete(Op),
    /// It waits for a request that is under way.
    Wait,
    /// It has to be sent.
    Submit(Op),
}

impl ReadAhead {
    /// Nothing is read ahead yet. At most `bytes_max` bytes of a disk of `size` bytes are, for each session.
    pub(super) fn new(size: u64, bytes_max: u64) -> Self {
        Self { size, bytes_max, streams: HashMap::new(), changes: Vec::new(), next_token: 0 }
    }

    /// An operation begins. Returns also what to read ahead, with its token.
    pub(super) fn begin(
        &mut self,
        queue: u64,
        key: u64,
        op: Op,
    ) -> (ReadAheadStep, Option<(u64, Op)>) {
        let range = op.range(self.size).ok().flatten();
        match (op, range) {
            (op, Some(range)) if op.changes() => {
                self.changes.push((queue, key, range));
                self.discard(range);
                (ReadAheadStep::Submit(op), None)
            }
            (Op::Read { offset, data }, Some(range)) => {
                self.read(queue, key, (offset, data), range)
            }
            (op, _) => (ReadAheadStep::Submit(op), None),
        }
    }

    /// An operation of a queue has completed.
    pub(super) fn completed(&mut self, queue: u64, key: u64) {
        self.changes.retain(|(of, change, _)| (*of, *change) != (queue, key));
    }

    /// A request that reads ahead has completed. Returns the reads that have waited for it, by queue and key;
    /// reads without an outcome have to be sent.
    pub(super) fn arrived(&mut self, token: u64, op: Op, is_read: bool) -> Vec<(u64, Completion)> {
        let Op::Read { data, .. } = op else { return Vec::new() };
        let find = |(queue, stream): (&u64, &mut ReadStream)| {
            let at = stream.fetches.iter().position(|fetch| fetch.token == token)?;
            Some((*queue, at))
        };
        let Some((queue, at)) = self.streams.iter_mut().find_map(find) else { return Vec::new() };
        let Some(stream) = self.streams.get_mut(&queue) else { return Vec::new() };
        let fetch = &mut stream.fetches[at];
        let mut done = Vec::new();
        for (key, op) in fetch.waiting.drain(..) {
            let (op, outcome) = match op {
                Op::Read { offset, data: mut into } if is_read => {
                    copy(fetch.range, &data, offset, &mut into);
                    (Op::Read { offset, data: into }, Some(Ok(())))
                }
                op => (op, None),
            };
            done.push((queue, Completion { key, op, outcome }));
        }
        if fetch.is_stale || !is_read {
            stream.fetches.remove(at);
        } else {
            fetch.data = Some(data);
        }
        done
    }

    /// A session has ended, or its requests are cancelled. Returns the reads that wait, as completed.
    pub(super) fn cancel(&mut self, queue: u64) -> Vec<Completion> {
        let Some(stream) = self.streams.remove(&queue) else { return Vec::new() };
        let waiting = stream.fetches.into_iter().flat_map(|fetch| fetch.waiting);
        let cancelled = || io::Error::from(io::ErrorKind::Interrupted);
        let complete =
            |(key, op): (u64, Op)| Completion { key, op, outcome: Some(Err(cancelled())) };
        waiting.map(complete).collect()
    }

    /// Nothing that overlaps `range` may answer a later read.
    fn discard(&mut self, range: Range) {
        for stream in self.streams.values_mut() {
            for fetch in stream.fetches.iter_mut().filter(|fetch| overlap(fetch.range, range)) {
                fetch.is_stale = true;
            }
            stream.fetches.retain(|fetch| !fetch.is_stale || fetch.data.is_none());
        }
    }

    fn read(
        &mut self,
        queue: u64,
        key: u64,
        (offset, mut data): (u64, Buffer),
        range: Range,
    ) -> (ReadAheadStep, Option<(u64, Op)>) {
        let stream = self.streams.entry(queue).or_default();
        stream.on_read(range, self.bytes_max);
        let inside = |fetch: &&mut Fetch| {
            let (start, end) = (fetch.range.offset(), fetch.range.end());
            !fetch.is_stale && start <= range.offset() && range.end() <= end
        };
        let step = match stream.fetches.iter_mut().find(inside) {
            Some(Fetch { range: of, data: Some(bytes), .. }) => {
                copy(*of, bytes, offset, &mut data);
                ReadAheadStep::Complete(Op::Read { offset, data })
            }
            Some(fetch) => {
                fetch.waiting.push((key, Op::Read { offset, data }));
                ReadAheadStep::Wait
            }
            None => ReadAheadStep::Submit(Op::Read { offset, data }),
        };
        // What the session has read is not needed any more.
        stream.fetches.retain(|fetch| fetch.range.end() > range.end() || fetch.data.is_none());
        let ahead = self.extend(queue, range);
        (step, ahead)
    }

    /// Extends the range ahead of a session whose last read was `range`.
    fn extend(&mut self, queue: u64, range: Range) -> Option<(u64, Op)> {
        let stream = self.streams.get_mut(&queue)?;
        let fetched = stream.fetches.iter().filter(|fetch| !fetch.is_stale);
        let end = fetched.map(|fetch| fetch.range.end()).fold(range.end(), u64::max);
        let missing = stream.window.saturating_sub(end - range.end());
        // Half of the window at once, so that requests do not become small; whole reads, since only they
        // can be answered.
        let length = missing / range.length().max(1) * range.length();
        if length == 0 || missing < stream.window / 2 {
            return None;
        }
        let ahead = Range::whole(self.size).from(end).split(length).0;
        if ahead.is_empty() || self.changes.iter().any(|(_, _, change)| overlap(*change, ahead)) {
            return None;
        }
        // Fits: at most `bytes_max`. Without memory nothing is read ahead.
        let data = Buffer::to_fill(ahead.length() as usize, 1).ok()?;
        let token = self.next_token;
        self.next_token += 1;
        let waiting = Vec::new();
        let fetch = Fetch { token, range: ahead, data: None, waiting, is_stale: false };
        stream.fetches.push_back(fetch);
        Some((token, Op::Read { offset: ahead.offset(), data }))
    }
}

impl ReadStream {
    /// Adapts the window to the next read.
    fn on_read(&mut self, range: Range, bytes_max: u64) {
        if range.offset() == self.next && range.offset() > 0 {
            self.window = (2 * self.window).clamp(range.length(), bytes_max.max(range.length()));
            if range.length() > bytes_max {
                self.window = 0;
            }
        } else if range.offset() != self.next {
            self.window = 0;
            for fetch in &mut self.fetches {
                fetch.is_stale = true;
            }
            self.fetches.retain(|fetch| fetch.data.is_none());
        }
        self.next = range.end();
    }
}

/// Copies a part of a range that was read ahead. The part is inside.
fn copy(fetched: Range, bytes: &[u8], offset: u64, into: &mut [u8]) {
    let at = (offset - fetched.offset()) as usize;
    into.copy_from_slice(&bytes[at..at + into.len()]);
}

fn overlap(one: Range, other: Range) -> bool {
    one.offset() < other.end() && other.offset() < one.end()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 1 << 20;

    fn read(offset: u64, length: usize) -> Op {
        Op::Read { offset, data: Buffer::zeroed(length, 1).unwrap() }
    }

    /// The range of a read, as offset and length.
    fn place(op: &Op) -> (u64, u64) {
        let range = op.range(SIZE).unwrap().unwrap();
        (range.offset(), range.length())
    }

    /// What the server has at a place.
    fn filled(op: Op, version: u8) -> Op {
        let Op::Read { offset, mut data } = op else { panic!("{op:?}") };
        for (at, byte) in data.iter_mut().enumerate() {
            *byte = ((offset as usize + at) / 512) as u8 ^ version;
        }
        Op::Read { offset, data }
    }

    fn ahead_of(rig: &mut ReadAhead, offset: u64, length: usize) -> Option<(u64, Op)> {
        rig.begin(1, offset, read(offset, length)).1
    }

    #[test]
    fn the_range_ahead_doubles_up_to_its_limit() {
        let mut rig = ReadAhead::new(SIZE, 16_384);
        assert_eq!(ahead_of(&mut rig, 4096, 4096), None, "the first read tells nothing");
        let mut requested = Vec::new();
        for nth in 2..12 {
            let (_, ahead) = rig.begin(1, nth, read(nth * 4096, 4096));
            if let Some((token, op)) = ahead {
                requested.push(place(&op));
                rig.arrived(token, op, true);
            }
        }
        let lengths: Vec<u64> = requested.iter().map(|(_, length)| *length).collect();
        assert_eq!(lengths[..3], [4096, 8192, 16_384 - 4096]);
        assert!(lengths.iter().all(|length| *length <= 16_384), "{requested:?}");
        assert!(requested.is_sorted_by(|one, next| one.0 + one.1 == next.0), "{requested:?}");
    }

    #[test]
    fn a_read_inside_the_range_ahead_is_answered_from_memory() {
        let mut rig = ReadAhead::new(SIZE, 65_536);
        ahead_of(&mut rig, 0, 512);
        let (token, op) = ahead_of(&mut rig, 512, 512).unwrap();
        assert_eq!(place(&op), (1024, 512));
        // Before it has arrived, the read waits.
        let (step, more) = rig.begin(1, 7, read(1024, 512));
        assert_eq!(step, ReadAheadStep::Wait);
        let done = rig.arrived(token, filled(op, 0), true);
        let [(1, Completion { key: 7, op, outcome: Some(Ok(())) })] = &done[..] else {
            panic!("{done:?}")
        };
        assert_eq!(*op, filled(read(1024, 512), 0));
        let (token, op) = more.unwrap();
        rig.arrived(token, filled(op, 0), true);
        let (step, _) = rig.begin(1, 8, read(1536, 512));
        assert_eq!(step, ReadAheadStep::Complete(filled(read(1536, 512), 0)));
    }

    #[test]
    fn a_failed_request_leaves_the_read_to_the_session() {
        let mut rig = ReadAhead::new(SIZE, 65_536);
        ahead_of(&mut rig, 0, 512);
        let (token, op) = ahead_of(&mut rig, 512, 512).unwrap();
        rig.begin(1, 7, read(1024, 512));
        let done = rig.arrived(token, op, false);
        assert!(matches!(&done[..], [(1, Completion { key: 7, outcome: None, .. })]), "{done:?}");
        assert!(matches!(rig.begin(1, 8, read(1024, 512)).0, ReadAheadStep::Submit(_)));
    }

    #[test]
    fn a_change_discards_what_it_overlaps() {
        for arrives_first in [true, false] {
            let mut rig = ReadAhead::new(SIZE, 65_536);
            ahead_of(&mut rig, 0, 512);
            let (token, op) = ahead_of(&mut rig, 512, 512).unwrap();
            let mut op = Some(op);
            if arrives_first {
                rig.arrived(token, op.take().unwrap(), true);
            }
            let write = Op::Write { offset: 1535, data: vec![1].into(), durable: false };
            assert!(matches!(rig.begin(2, 1, write).0, ReadAheadStep::Submit(_)));
            // Neither the old bytes, nor new ones while the change is under way.
            let (step, ahead) = rig.begin(1, 7, read(1024, 512));
            assert!(matches!(step, ReadAheadStep::Submit(_)), "{step:?}");
            if let Some(op) = op {
                assert!(rig.arrived(token, op, true).is_empty());
            }
            drop(ahead);
            rig.completed(2, 1);
            assert!(rig.changes.is_empty());
        }
    }

    #[test]
    fn nothing_is_read_ahead_where_a_change_is_under_way() {
        let mut rig = ReadAhead::new(SIZE, 65_536);
        let trim = Op::Trim { range: Range::whole(SIZE).from(1100).split(1).0, durable: false };
        rig.begin(2, 1, trim);
        ahead_of(&mut rig, 0, 512);
        assert_eq!(ahead_of(&mut rig, 512, 512), None);
        rig.completed(2, 1);
        assert_eq!(place(&ahead_of(&mut rig, 1024, 512).unwrap().1).0, 1536);
    }

    #[test]
    fn random_and_long_reads_are_not_extended() {
        let mut rig = ReadAhead::new(SIZE, 4096);
        for offset in [8192, 512, 70_000, 4096] {
            assert_eq!(ahead_of(&mut rig, offset, 512), None);
        }
        assert_eq!(ahead_of(&mut rig, 100_000, 8192), None);
        assert_eq!(ahead_of(&mut rig, 108_192, 8192), None, "longer than what may be kept");
        assert_eq!(ahead_of(&mut rig, SIZE - 1024, 512), None);
        assert!(ahead_of(&mut rig, SIZE - 512, 512).is_none(), "behind the end of the disk");
    }

    #[test]
    fn ended_sessions_leave_nothing() {
        let mut rig = ReadAhead::new(SIZE, 4096);
        ahead_of(&mut rig, 0, 512);
        let (token, op) = ahead_of(&mut rig, 512, 512).unwrap();
        rig.begin(1, 7, read(1024, 512));
        let cancelled = rig.cancel(1);
        assert!(matches!(&cancelled[..], [Completion { key: 7, .. }]), "{cancelled:?}");
        assert!(rig.arrived(token, op, true).is_empty());
        assert!(rig.streams.is_empty());
    }

    #[test]
    fn memory_is_bounded_by_the_range_ahead() {
        let mut rig = ReadAhead::new(SIZE, 4096);
        for nth in 0..500 {
            if let Some((token, op)) = ahead_of(&mut rig, nth * 512, 512) {
                rig.arrived(token, op, true);
            }
            let held: u64 = rig.streams[&1].fetches.iter().map(|fetch| fetch.range.length()).sum();
            assert!(held <= 2 * 4096, "{held}");
        }
    }
}
