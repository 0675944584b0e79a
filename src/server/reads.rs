//! Replies to READ: piece by piece, holes as holes, and no header before its data is certain.
//! Never waits for the client: the read continues when the client has received more. Reads from the
//! disk without blocking, except after its pages were populated, since they may be evicted again.
//!
//! A piece is certain once it is read into the outbox, or, if it is long and the image allows it, once
//! the kernel has put references to its pages into a pipe (`splice(2)`). Only then is its header
//! written: an error of the disk is an error reply, and the session continues. With structured replies
//! a read is a sequence of such pieces, one chunk each. A simple reply has a single header and cannot
//! carry an error behind it: up to [`BUFFERED_MAX`] bytes are buffered as a whole; a longer read is
//! tried once from beginning to end ("Simple reply message"), then announced and read again. If the
//! disk fails after that, the session ends, because the client would take any bytes for data.

use super::end::SessionEnd;
use super::executor::{Worker, piece_length};
use super::outbox::Outbox;
use super::pinned;
use super::snapshot;
use crate::disk::{Extent, Visit};
use crate::message_id;
use crate::nbd::reply::{Dialect, ReplyTo};
use crate::nbd::wire::ErrorCode;
use crate::range::Range;
use std::io;
use std::time::Instant;

/// Longest read with `NBD_CMD_FLAG_DF` (one chunk), in bytes.
pub(super) const WHOLE_READ_MAX: u64 = 1 << 20;
/// Shortest read whose range is checked for holes, in bytes.
const HOLE_CHECK_MIN: u64 = 64 << 10;
/// Longest simple reply that is buffered as a whole, in bytes.
const BUFFERED_MAX: u64 = 1 << 20;
/// How much of a long read is populated at once, in bytes.
const POPULATE_MAX: u64 = 1 << 20;

/// A read with a part still to be answered.
#[derive(Debug)]
pub(super) struct Read {
    to: ReplyTo,
    rest: Range,
    /// The reply has to be one chunk (`NBD_CMD_FLAG_DF`).
    whole: bool,
    /// A part is answered.
    begun: bool,
    /// The rest of the data is announced in the outbox.
    announced: bool,
    /// The read was tried up to this offset.
    tried_to: u64,
    /// Population of the page cache has been requested up to this offset,
    populating_to: u64,
    /// and has completed up to this one.
    populated_to: u64,
}

/// Result of one step of a read.
#[derive(Debug)]
pub(super) enum ReadStep<'a> {
    /// It is answered, with success or an error.
    Answered,
    /// A part is answered; continue unless the outbox is full.
    Continue,
    /// This range has to be populated first, by I/O in flight that keeps the visit.
    Cold(Visit<'a>, Range),
    /// It has to wait: the gate is closed.
    Blocked,
}

impl Read {
    pub(super) fn save(self) -> snapshot::ReadSnapshot {
        let Self { to, rest, whole, begun, announced, .. } = self;
        snapshot::ReadSnapshot { to: to.into(), rest: rest.into(), whole, begun, announced }
    }

    /// Restores a read on a disk of `size` bytes; `None` if its range exceeds it.
    pub(super) fn restore(saved: snapshot::ReadSnapshot, size: u64) -> Option<Self> {
        let snapshot::ReadSnapshot { to, rest, whole, begun, announced } = saved;
        Some(Self { begun, announced, ..Self::new(to.into(), rest.within(size)?, whole) })
    }

    fn new(to: ReplyTo, rest: Range, whole: bool) -> Self {
        let (begun, announced) = (false, false);
        Self { to, rest, whole, begun, announced, tried_to: 0, populating_to: 0, populated_to: 0 }
    }

    /// The requested population has completed, or failed: read the range blocking.
    pub(super) fn mark_populated(&mut self) {
        self.populated_to = self.populating_to;
    }

    /// Whether `piece` was populated once, so that reading it may block.
    fn is_populated(&self, piece: Range) -> bool {
        piece.end() <= self.populated_to
    }

    fn announce(&mut self, out: &mut Outbox) {
        out.announce(self.rest);
        self.answered(self.rest.length());
        self.announced = true;
    }

    fn answered(&mut self, length: u64) {
        self.rest = self.rest.split(length).1;
        self.begun = true;
    }
}

/// The content of one chunk.
struct ChunkContent {
    range: Range,
    hole: bool,
}

impl<'a> Worker<'a> {
    /// Begins a read; `None` if it is answered already, such as with an error.
    pub(super) fn read(
        &mut self,
        to: ReplyTo,
        range: Range,
        whole: bool,
        out: &mut Outbox,
    ) -> Option<Read> {
        if whole && range.length() > WHOLE_READ_MAX {
            self.reject(to, ErrorCode::Overflow, "too long for one chunk", out);
            return None;
        }
        if range.is_empty() {
            out.reply(|out| self.dialect.success(to, out));
            return None;
        }
        Some(Read::new(to, range, whole))
    }

    /// Answers the next piece of a read if its data is in memory.
    pub(super) fn advance(
        &mut self,
        read: &mut Read,
        out: &mut Outbox,
    ) -> Result<ReadStep<'a>, SessionEnd> {
        if read.announced && out.announced().is_empty() {
            read.announced = false;
            out.release_deferred();
            if read.rest.is_empty() {
                self.end_reply(read, out);
                return Ok(ReadStep::Answered);
            }
        }
        let Some(visit) = self.visit()? else { return Ok(ReadStep::Blocked) };
        if read.announced {
            append_announced(&visit, out).map_err(SessionEnd::ReplyIncomplete)?;
            Ok(ReadStep::Continue)
        } else if self.dialect == Dialect::Simple {
            Ok(self.advance_simple(visit, read, out))
        } else {
            Ok(self.advance_in_chunks(visit, read, out))
        }
    }

    /// Ends a reply whose last chunk was not marked as such.
    fn end_reply(&self, read: &Read, out: &mut Outbox) {
        if self.dialect != Dialect::Simple {
            out.reply(|out| self.dialect.success(read.to, out));
        }
    }

    fn advance_simple(
        &mut self,
        visit: Visit<'a>,
        read: &mut Read,
        out: &mut Outbox,
    ) -> ReadStep<'a> {
        let rest = read.rest;
        if read.begun {
            // By the previous process, which has sent the header.
            read.announce(out);
            return ReadStep::Continue;
        }
        if rest.length() <= BUFFERED_MAX {
            if let Err(error) = self.append_piece(&visit, read, rest, true, out) {
                return self.cold_or_failed(visit, read, rest, &error, out);
            }
            return ReadStep::Answered;
        }
        let untried = rest.from(read.tried_to);
        if untried.is_empty() {
            out.reply(|out| self.dialect.data_header(read.to, 0, 0, false, out));
            read.announce(out);
            return ReadStep::Continue;
        }
        let piece = untried.split(piece_length(untried)).0;
        let is_populated = read.is_populated(piece);
        let try_fill = |data: &mut [u8]| fill(&visit, is_populated, piece.offset(), data);
        if let Err(error) = out.try_fill(piece.length() as usize, try_fill) {
            return self.cold_or_failed(visit, read, piece, &error, out);
        }
        read.tried_to = piece.end();
        ReadStep::Continue
    }

    fn advance_in_chunks(
        &mut self,
        visit: Visit<'a>,
        read: &mut Read,
        out: &mut Outbox,
    ) -> ReadStep<'a> {
        let ChunkContent { range, hole } = match self.next_chunk(&visit, read) {
            Ok(chunk) => chunk,
            Err(error) => {
                self.fail_read(read, read.rest, &error, out);
                return ReadStep::Answered;
            }
        };
        let done = range.length() == read.rest.length();
        if hole {
            // It fits: a read has no more than 32 bits.
            let (at, length) = (range.offset(), range.length() as u32);
            out.reply(|out| self.dialect.hole(read.to, at, length, done, out));
        } else if let Err(error) = self.append_piece(&visit, read, range, done, out) {
            return self.cold_or_failed(visit, read, range, &error, out);
        }
        read.answered(range.length());
        if done { ReadStep::Answered } else { ReadStep::Continue }
    }

    /// Appends `piece` and its header to the outbox. `WouldBlock` if it has to be populated first.
    fn append_piece(
        &mut self,
        visit: &Visit<'_>,
        read: &Read,
        piece: Range,
        done: bool,
        out: &mut Outbox,
    ) -> io::Result<()> {
        // It fits: a piece has at most 1 MiB.
        let (at, length) = (piece.offset(), piece.length() as usize);
        let (dialect, to) = (self.dialect, read.to);
        let head = |out: &mut Vec<u8>| dialect.data_header(to, at, length as u32, done, out);
        let is_populated = read.is_populated(piece);
        if pinned::fits(piece) && self.disk.pins() {
            let may_block = self.inline_reads.may_block();
            if !is_populated && !may_block && !visit.is_resident(piece) {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            let began = may_block.then(Instant::now);
            let outcome = out.reply_with_pinned(head, length, |pipe| visit.pin(at, length, pipe));
            if let Some(began) = began {
                self.inline_reads.record_blocking_read(piece.length(), began.elapsed());
            }
            match outcome {
                Err(error) if error.kind() == io::ErrorKind::Unsupported => {}
                outcome => return outcome,
            }
        }
        out.reply_with_data(head, length, |data| fill(visit, is_populated, at, data))
    }

    /// The next step of a read after `piece` could not be read.
    fn cold_or_failed(
        &mut self,
        visit: Visit<'a>,
        read: &mut Read,
        piece: Range,
        error: &io::Error,
        out: &mut Outbox,
    ) -> ReadStep<'a> {
        if error.kind() == io::ErrorKind::WouldBlock && !read.is_populated(piece) {
            let next = read.rest.from(piece.offset()).split(piece.length().max(POPULATE_MAX)).0;
            read.populating_to = next.end();
            return ReadStep::Cold(visit, next);
        }
        drop(visit);
        self.fail_read(read, piece, error, out);
        ReadStep::Answered
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

    fn fail_read(&mut self, read: &Read, piece: Range, error: &io::Error, out: &mut Outbox) {
        let kind = message_id::REQUEST_FAILED;
        let code = self.log_error(kind, &format_args!("read of {piece:?}"), error);
        // The offset makes the chunks before it valid, so it is given only if there are any.
        let at = read.begun.then_some(piece.offset());
        out.reply(|out| self.dialect.failure(read.to, code, at, "", out));
    }
}

/// A chunk with the first piece of `data`.
fn data_chunk(data: Range) -> ChunkContent {
    ChunkContent { range: data.split(piece_length(data)).0, hole: false }
}

/// Reads the next piece of the announced range.
fn append_announced(visit: &Visit<'_>, out: &mut Outbox) -> io::Result<()> {
    let announced = out.announced();
    let piece = announced.split(piece_length(announced)).0;
    // It fits: a piece is at most 256 KiB.
    out.append_announced(piece.length() as usize, |data| visit.read(piece.offset(), data))
}

/// Fills `data` from the disk; blocks only if the range was populated.
fn fill(visit: &Visit<'_>, populated: bool, offset: u64, data: &mut [u8]) -> io::Result<()> {
    if populated { visit.read(offset, data) } else { visit.read_now(offset, data) }
}
