//! Replies to READ: piece by piece, holes as holes, and no header before its data is certain.
//! Never waits for the client: the read continues when the client has received more. Reads bytes in
//! the page cache without blocking; an operation in flight loads the others, and returns them or leaves
//! them in the page cache.
//!
//! A piece is certain once it is read into the send buffer, or, if it is long, once it is loaded into a
//! buffer of its own, from which it is sent, or, if the image allows it, once the kernel has put
//! references to its pages into a pipe (`splice(2)`). Only then is its header
//! written: an error of the disk is an error reply, and the session continues. With structured replies
//! a read is a sequence of such pieces, one chunk each. A simple reply has a single header and cannot
//! carry an error behind it: up to [`BUFFERED_MAX`] bytes are buffered as a whole; a longer read is
//! tried once from beginning to end ("Simple reply message"), then announced and read again. If the
//! disk fails after that, the session ends, because the client would take any bytes for data.

mod read;

use super::disk_io::{Busy, DiskIo, LOAD_MAX, Tag, piece_length};
use super::inline_reads::InlineReads;
use super::pinned;
use super::replies::Replies;
use super::tx::Tx;
#[cfg(test)]
use crate::disk::mutation::{Mutation, is_active};
use crate::disk::{Buffer, Extent, Op, Visit};
use crate::message_id;
use crate::nbd::reply::{Dialect, ReplyTo};
use crate::nbd::wire::ErrorCode;
use crate::range::Range;
use crate::server::end::SessionEnd;
use crate::server::snapshot::ReadSnapshot;
use nix::errno::Errno;
use read::Load;
pub(super) use read::Read;
use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::sync::Arc;
use std::time::Instant;

/// Longest read with `NBD_CMD_FLAG_DF` (one chunk), in bytes.
pub(in crate::server) const WHOLE_READ_MAX: u64 = 1 << 20;
/// Shortest read whose range is checked for holes, in bytes.
const HOLE_CHECK_MIN: u64 = 64 << 10;
/// Longest simple reply that is buffered as a whole, in bytes.
const BUFFERED_MAX: u64 = 1 << 20;

/// Result of one step of a read.
#[derive(Debug)]
enum ReadStep<'a> {
    /// It is answered, with success or an error.
    Answered,
    /// A part is answered; continue unless the send buffer is full.
    Continue,
    /// This range has to be loaded first, by an operation in flight that takes the visit.
    Cold(Visit<'a>, Range),
    /// It has to wait.
    Blocked(Busy),
}

/// A running load of a range for a read.
#[derive(Debug)]
struct Loading {
    read: Read,
    range: Range,
    /// Only into the page cache.
    pins: bool,
    /// Bytes that the session was loading when this began, its own included.
    in_flight: u64,
    since: Instant,
}

/// The reads of one session that are not answered.
#[derive(Debug)]
pub(super) struct Reads {
    queue: VecDeque<Read>,
    /// Bytes that the first read in the queue has to load once there is room for them in flight; otherwise 0.
    awaited_room: usize,
    inline: InlineReads,
    /// A range found to be allocated. It may have become a hole since; then zeros are sent as data, which
    /// is slower but correct.
    allocated: Range,
    /// Reads that are loading, by the number of the load.
    loads: BTreeMap<u64, Loading>,
    next_load: u64,
    /// Bytes that are being loaded.
    loading: u64,
    /// Data of an announced read is being loaded: no other read may be answered before it.
    loads_announced: bool,
    /// Measures how long the disk takes.
    clock: fn() -> Instant,
}

/// The content of one chunk.
struct ChunkContent {
    range: Range,
    hole: bool,
}

impl Reads {
    /// No reads. `clock` measures how long the disk takes.
    pub(super) fn new(queue: VecDeque<Read>, clock: fn() -> Instant) -> Self {
        let (inline, allocated) = (InlineReads::default(), Range::whole(0));
        let (loads, next_load, loading) = (BTreeMap::new(), 0, 0);
        let (awaited_room, loads_announced) = (0, false);
        Self {
            queue,
            awaited_room,
            inline,
            allocated,
            loads,
            next_load,
            loading,
            loads_announced,
            clock,
        }
    }

    /// Saves the reads. None of them may be loading.
    pub(super) fn save(self) -> Vec<ReadSnapshot> {
        #[cfg(test)]
        if is_active(Mutation::DropLoadedRead) {
            let kept = self.queue.into_iter().filter(|read| read.loaded.is_none());
            return kept.map(Read::save).collect();
        }
        self.queue.into_iter().map(Read::save).collect()
    }

    /// Restores reads on a disk of `size` bytes; `None` if a range exceeds it.
    pub(super) fn restore(saved: Vec<ReadSnapshot>, size: u64) -> Option<VecDeque<Read>> {
        saved.into_iter().map(|read| Read::restore(read, size)).collect()
    }

    /// The number of reads in the queue, without loading ones.
    pub(super) fn len(&self) -> usize {
        self.queue.len()
    }

    /// Bytes that are loaded for reads in the queue. Reads with loaded data are in front of the others, but for the
    /// first one.
    pub(super) fn loaded_memory(&self) -> usize {
        let loads = self.queue.iter().enumerate().map_while(|(index, read)| {
            let is_behind = index > 0 && read.loaded.is_none();
            (!is_behind).then_some(read.loaded.as_deref())
        });
        loads.flatten().map(Load::memory).sum()
    }

    /// Whether reads wait in the queue for room in the send buffer, not in flight.
    pub(super) fn wait_for_output(&self) -> bool {
        !self.queue.is_empty() && self.awaited_room == 0 && !self.loads_announced
    }

    /// Begins a read: answers it at once if its data is in memory and no other read waits, and otherwise adds
    /// it to the queue. `is_last`: no request has arrived behind it.
    pub(super) fn begin(
        &mut self,
        (to, range, dont_fragment): (ReplyTo, Range, bool),
        io: &mut DiskIo<'_>,
        replies: &mut Replies<'_>,
        out: &mut Tx,
        is_last: bool,
    ) -> Result<(), SessionEnd> {
        if dont_fragment && range.length() > WHOLE_READ_MAX {
            replies.reject(to, ErrorCode::Overflow, "too long for one chunk", out);
            return Ok(());
        }
        if range.is_empty() {
            replies.succeed(to, out);
            return Ok(());
        }
        let read = Read::new(to, range, dont_fragment);
        if self.loads_announced || !self.queue.is_empty() || out.is_full() {
            self.queue.push_back(read);
            return Ok(());
        }
        // A read that has to wait is in the queue now, and says why when it is tried again.
        self.step(read, io, replies, out, is_last).map(drop)
    }

    /// Answers reads until the send buffer is full, or one has to wait; false if it waits for the gate.
    /// One that waits for room in flight continues after a completion, and requests behind it can begin
    /// meanwhile. `rx_is_empty`: no request has arrived behind them.
    pub(super) fn answer(
        &mut self,
        io: &mut DiskIo<'_>,
        replies: &mut Replies<'_>,
        out: &mut Tx,
        rx_is_empty: bool,
    ) -> Result<bool, SessionEnd> {
        if self.awaited_room > 0 && !io.has_room_to_read(self.awaited_room) {
            return Ok(true);
        }
        self.awaited_room = 0;
        while !self.loads_announced
            && !out.is_full()
            && let Some(read) = self.queue.pop_front()
        {
            if let Some(busy) = self.step(read, io, replies, out, rx_is_empty)? {
                return Ok(busy != Busy::Gate);
            }
        }
        Ok(true)
    }

    /// Answers the next piece of a read, or loads it. Puts the rest of the read at the front of the queue,
    /// and returns why it has to wait.
    fn step(
        &mut self,
        mut read: Read,
        io: &mut DiskIo<'_>,
        replies: &mut Replies<'_>,
        out: &mut Tx,
        rx_is_empty: bool,
    ) -> Result<Option<Busy>, SessionEnd> {
        match self.advance(&mut read, io, replies, out)? {
            ReadStep::Answered => {}
            ReadStep::Continue => self.queue.push_front(read),
            ReadStep::Blocked(busy) => {
                self.queue.push_front(read);
                return Ok(Some(busy));
            }
            ReadStep::Cold(visit, range) if self.may_block(io, out, rx_is_empty) => {
                drop(visit);
                self.read_inline(read, range, io, replies, out)?;
            }
            ReadStep::Cold(_, range) if !io.has_room_to_read(range.length() as usize) => {
                self.queue.push_front(read);
                self.awaited_room = range.length() as usize;
                return Ok(Some(Busy::InFlight));
            }
            ReadStep::Cold(visit, range) => self.load(visit, range, read, io),
        }
        Ok(None)
    }

    /// Whether to read cold data inline, blocking: the disk is fast, and the session has nothing else to
    /// do.
    fn may_block(&self, io: &DiskIo<'_>, out: &Tx, rx_is_empty: bool) -> bool {
        let answered = io.in_flight.is_empty() && out.is_empty() && self.queue.is_empty();
        self.inline.may_block() && answered && rx_is_empty
    }

    fn read_inline(
        &mut self,
        mut read: Read,
        range: Range,
        io: &DiskIo<'_>,
        replies: &mut Replies<'_>,
        out: &mut Tx,
    ) -> Result<(), SessionEnd> {
        read.allow_blocking(range);
        let began = (self.clock)();
        let step = self.advance(&mut read, io, replies, out)?;
        let took = (self.clock)().saturating_duration_since(began);
        self.inline.record_blocking_read(range.length(), took);
        if !matches!(step, ReadStep::Answered) {
            self.queue.push_front(read);
        }
        Ok(())
    }

    /// Begins to load data for a read, which continues when that completes.
    fn load<'a>(&mut self, visit: Visit<'a>, range: Range, read: Read, io: &mut DiskIo<'a>) {
        self.loading += range.length();
        self.loads_announced |= read.announced;
        let (number, since) = (self.next_load, (self.clock)());
        self.next_load += 1;
        // Long pieces are sent by reference (`append_piece`), and others read from the page cache.
        let pins = visit.pins() && range.length() >= pinned::PIN_MIN;
        let to = read.to;
        self.loads.insert(number, Loading { read, range, pins, in_flight: self.loading, since });
        let op = if pins { Op::Load(range) } else { read_op(range, io.disk.unit()) };
        io.in_flight.begin(visit, op, Tag::Load { number, to });
    }

    /// Continues a read whose load has completed.
    pub(super) fn on_loaded(&mut self, number: u64, outcome: io::Result<Buffer>) {
        let Some(loading) = self.loads.remove(&number) else { return };
        let Loading { mut read, range, pins, in_flight, since } = loading;
        self.loading -= range.length();
        self.loads_announced &= !read.announced;
        self.inline.record_load(in_flight, (self.clock)().saturating_duration_since(since));
        let outcome = match outcome {
            Ok(_) if pins => None,
            Ok(data) if data.len() as u64 != range.length() => Some(Err(Errno::ENOMEM.into())),
            outcome => Some(outcome.map(Arc::new)),
        };
        // Its data is sent before room is awaited again.
        self.awaited_room = 0;
        match outcome {
            Some(outcome) => read.loaded = Some(Box::new(Load { range, outcome })),
            // It is in the page cache, unless the kernel needs the memory.
            None => read.allow_blocking(range),
        }
        // Before reads that hold no data yet, so that loaded data does not accumulate; but no reply may
        // come between the pieces of another.
        let is_inside = |first: &Read| first.announced && !read.announced;
        let at = self.queue.front().is_some_and(is_inside).into();
        self.queue.insert(at, read);
    }

    /// Answers the next piece of a read if its data is in memory.
    fn advance<'a>(
        &mut self,
        read: &mut Read,
        io: &DiskIo<'a>,
        replies: &mut Replies<'_>,
        out: &mut Tx,
    ) -> Result<ReadStep<'a>, SessionEnd> {
        if read.announced && out.announced().is_empty() {
            read.announced = false;
            out.release_deferred();
            if read.rest.is_empty() {
                if replies.dialect != Dialect::Simple {
                    replies.succeed(read.to, out);
                }
                return Ok(ReadStep::Answered);
            }
        }
        let visit = match io.visit()? {
            Ok(visit) => visit,
            Err(busy) => return Ok(ReadStep::Blocked(busy)),
        };
        if read.announced {
            append_announced(visit, read, out)
        } else if replies.dialect == Dialect::Simple {
            Ok(self.advance_simple(visit, read, replies, out))
        } else {
            Ok(self.advance_in_chunks(visit, read, replies, out))
        }
    }

    fn advance_simple<'a>(
        &mut self,
        visit: Visit<'a>,
        read: &mut Read,
        replies: &mut Replies<'_>,
        out: &mut Tx,
    ) -> ReadStep<'a> {
        let rest = read.rest;
        if read.begun {
            // By the previous process, which has sent the header.
            read.announce(out);
            return ReadStep::Continue;
        }
        if rest.length() <= BUFFERED_MAX {
            if let Err(error) = self.append_piece(&visit, read, (rest, true), replies, out) {
                return cold_or_failed(visit, read, (rest, &error), replies, out);
            }
            return ReadStep::Answered;
        }
        let untried = rest.from(read.tried_to);
        if untried.is_empty() {
            out.reply(|out| replies.dialect.data_header(read.to, 0, 0, false, out));
            read.announce(out);
            return ReadStep::Continue;
        }
        let piece = untried.split(piece_length(untried)).0;
        let try_fill = |data: &mut [u8]| read.fill(&visit, piece.offset(), data);
        if let Err(error) = out.try_fill(piece.length() as usize, try_fill) {
            return cold_or_failed(visit, read, (piece, &error), replies, out);
        }
        read.tried_to = piece.end();
        ReadStep::Continue
    }

    fn advance_in_chunks<'a>(
        &mut self,
        visit: Visit<'a>,
        read: &mut Read,
        replies: &mut Replies<'_>,
        out: &mut Tx,
    ) -> ReadStep<'a> {
        let ChunkContent { range, hole } = match self.next_chunk(&visit, read) {
            Ok(chunk) => chunk,
            Err(error) => {
                fail_read(read, read.rest, &error, replies, out);
                return ReadStep::Answered;
            }
        };
        let done = range.length() == read.rest.length();
        if hole {
            // It fits: a read has no more than 32 bits.
            let (at, length) = (range.offset(), range.length() as u32);
            out.reply(|out| replies.dialect.hole(read.to, at, length, done, out));
        } else if let Err(error) = self.append_piece(&visit, read, (range, done), replies, out) {
            return cold_or_failed(visit, read, (range, &error), replies, out);
        }
        read.answered(range.length());
        if done { ReadStep::Answered } else { ReadStep::Continue }
    }

    /// Appends `piece` and its header to the send buffer. `WouldBlock` if it has to be loaded first.
    fn append_piece(
        &mut self,
        visit: &Visit<'_>,
        read: &mut Read,
        (piece, done): (Range, bool),
        replies: &Replies<'_>,
        out: &mut Tx,
    ) -> io::Result<()> {
        // It fits: a piece has at most 1 MiB.
        let (at, length) = (piece.offset(), piece.length() as usize);
        let (dialect, to) = (replies.dialect, read.to);
        let head = |out: &mut Vec<u8>| dialect.data_header(to, at, length as u32, done, out);
        if let Some((bytes, part)) = read.loaded_part(piece) {
            out.reply_with_loaded(head, bytes, part);
            return Ok(());
        }
        if pinned::fits(piece) && visit.pins() && read.loaded.is_none() {
            let may_block = self.inline.may_block();
            if !read.is_certain(piece) && !may_block && !visit.is_resident(piece) {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            let began = may_block.then(self.clock);
            let outcome = out.reply_with_pinned(head, length, |pipe| visit.pin(at, length, pipe));
            if let Some(began) = began {
                let took = (self.clock)().saturating_duration_since(began);
                self.inline.record_blocking_read(piece.length(), took);
            }
            match outcome {
                Err(error) if error.kind() == io::ErrorKind::Unsupported => {}
                outcome => return outcome,
            }
        }
        out.reply_with_data(head, length, |data| read.fill(visit, at, data))
    }

    /// The content of the next chunk of a read.
    fn next_chunk(&mut self, visit: &Visit<'_>, read: &Read) -> io::Result<ChunkContent> {
        let rest = read.rest;
        if read.whole {
            return Ok(ChunkContent { range: rest, hole: false });
        }
        let allocated = self.allocated;
        if allocated.offset() <= rest.offset() && rest.offset() < allocated.end() {
            return Ok(data_chunk(rest.until(allocated.end())));
        }
        if rest.length() < HOLE_CHECK_MIN && !read.begun {
            return Ok(data_chunk(rest));
        }
        let Extent { range, allocated } = visit.extent(rest.offset())?;
        let within = rest.until(range.end());
        if !allocated {
            return Ok(ChunkContent { range: within, hole: true });
        }
        self.allocated = range;
        Ok(data_chunk(within))
    }
}

/// The next step of a read after `piece` could not be read.
fn cold_or_failed<'a>(
    visit: Visit<'a>,
    read: &mut Read,
    (piece, error): (Range, &io::Error),
    replies: &mut Replies<'_>,
    out: &mut Tx,
) -> ReadStep<'a> {
    if error.kind() == io::ErrorKind::WouldBlock && !read.is_certain(piece) {
        let next = read.rest.from(piece.offset()).split(piece.length().max(LOAD_MAX as u64)).0;
        return ReadStep::Cold(visit, next);
    }
    drop(visit);
    fail_read(read, piece, error, replies, out);
    ReadStep::Answered
}

fn fail_read(
    read: &Read,
    piece: Range,
    error: &io::Error,
    replies: &mut Replies<'_>,
    out: &mut Tx,
) {
    let kind = message_id::REQUEST_FAILED;
    let code = replies.log_error(kind, &format_args!("read of {piece:?}"), error);
    // The offset makes the chunks before it valid, so it is given only if there are any.
    let at = read.begun.then_some(piece.offset());
    let dialect = replies.dialect;
    out.reply(|out| dialect.failure(read.to, code, at, "", out));
}

/// Reads `range`, which has at most 1 MiB. Without memory it has no bytes, and fails on completion.
fn read_op(range: Range, unit: u64) -> Op {
    let data = Buffer::to_fill(range.length() as usize, unit as usize).unwrap_or_default();
    Op::Read { offset: range.offset(), data }
}

/// A chunk with the first piece of `data`.
fn data_chunk(data: Range) -> ChunkContent {
    ChunkContent { range: data.split(piece_length(data)).0, hole: false }
}

/// Appends the next piece of the announced range, if it is in memory.
fn append_announced<'a>(
    visit: Visit<'a>,
    read: &mut Read,
    out: &mut Tx,
) -> Result<ReadStep<'a>, SessionEnd> {
    let announced = out.announced();
    let piece = announced.split(piece_length(announced)).0;
    let fill = |data: &mut [u8]| read.fill(&visit, piece.offset(), data);
    // It fits: a piece is at most 256 KiB.
    match out.append_announced(piece.length() as usize, fill) {
        Ok(()) => Ok(ReadStep::Continue),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock && !read.is_certain(piece) => {
            Ok(ReadStep::Cold(visit, announced.split(LOAD_MAX as u64).0))
        }
        Err(error) => Err(SessionEnd::ReplyIncomplete(error)),
    }
}
