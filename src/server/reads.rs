//! Answering reads: piece by piece, holes as holes, and nothing before it is in hand.
//! Never waits for the client: what it does not take now is continued later. Waits for the disk only
//! after an errand has loaded what is read, which may be gone again: then, to get on at all.
//!
//! A piece is in hand when it has been read into the outbox, or, if it is long and the image allows
//! it, when the kernel has put references to its pages into a pipe (`splice(2)`). Only then does its
//! head go out: an error of the disk is told in place of it, and the session goes on. With structured
//! replies a read is a row of such pieces, each a chunk. A simple reply has one head, and no word for
//! an error behind it: up to [`IN_HAND_MAX`] bytes are in hand as a whole; a longer read is read once
//! from its beginning to its end to see that it can be ("Simple reply message"), and then promised.
//! Should the disk fail after that, the session ends: the client would take anything else for data.

use super::end::SessionEnd;
use super::outbox::Outbox;
use super::pinned;
use super::snapshot;
use super::work::{Worker, piece_length};
use crate::disk::{Extent, Visit};
use crate::message_id;
use crate::nbd::reply::{Dialect, ReplyTo};
use crate::nbd::wire::ErrorCode;
use crate::range::Range;
use std::io;
use std::time::Instant;

/// Longest read that is answered in one chunk because the client wants it so (`DF`).
pub(super) const WHOLE_READ_MAX: u64 = 1 << 20;
/// From this length on it is worth asking whether a read is of a hole.
const HOLE_WORTH_ASKING: u64 = 64 << 10;
/// Longest simple reply that is in hand as a whole, in bytes.
const IN_HAND_MAX: u64 = 1 << 20;
/// How much of a long read is loaded at once, in bytes.
const LOAD_MAX: u64 = 1 << 20;

/// A read that is not completely answered.
#[derive(Debug)]
pub(super) struct Read {
    to: ReplyTo,
    /// What is still to be answered.
    rest: Range,
    whole: bool,
    begun: bool,
    /// The head of a part of it has gone out, and what that promised is with the outbox.
    attached: bool,
    /// Up to here everything could be read.
    checked: u64,
    /// Up to here everything is being loaded, or has been.
    loading: u64,
    loaded: u64,
}

/// How far a read has come.
#[derive(Debug)]
pub(super) enum ReadStep<'a> {
    /// It is answered, by success or failure.
    Answered,
    /// A part of it is; the next may follow at once, as far as the outbox takes it.
    GoesOn,
    /// This is to be loaded first, by an errand that takes the visit along.
    Cold(Visit<'a>, Range),
    /// It has to wait for errands.
    Waits,
}

impl Read {
    pub(super) fn save(self) -> snapshot::ReadSnapshot {
        let Self { to, rest, whole, begun, attached, .. } = self;
        snapshot::ReadSnapshot { to: to.into(), rest: rest.into(), whole, begun, attached }
    }

    /// The same on a disk of `size` bytes; none if it does not fit there.
    pub(super) fn restore(packed: snapshot::ReadSnapshot, size: u64) -> Option<Self> {
        let snapshot::ReadSnapshot { to, rest, whole, begun, attached } = packed;
        Some(Self { begun, attached, ..Self::new(to.into(), rest.within(size)?, whole) })
    }

    fn new(to: ReplyTo, rest: Range, whole: bool) -> Self {
        let (begun, attached) = (false, false);
        Self { to, rest, whole, begun, attached, checked: 0, loading: 0, loaded: 0 }
    }

    /// Notes that what was cold has been loaded, or could not be.
    pub(super) fn warm(&mut self) {
        self.loaded = self.loading;
    }

    /// Whether to wait for `piece`, since it has been loaded once.
    fn is_loaded(&self, piece: Range) -> bool {
        piece.end() <= self.loaded
    }

    /// Promises all that is left.
    fn promise(&mut self, out: &mut Outbox) {
        out.announce(self.rest);
        self.answered(self.rest.length());
        self.attached = true;
    }

    /// The next `length` bytes have been answered.
    fn answered(&mut self, length: u64) {
        self.rest = self.rest.split(length).1;
        self.begun = true;
    }
}

/// What one chunk tells.
struct ChunkContent {
    range: Range,
    hole: bool,
}

impl<'a> Worker<'a> {
    /// A read to be answered, unless it is answered already, by its refusal perhaps.
    pub(super) fn read(
        &mut self,
        to: ReplyTo,
        range: Range,
        whole: bool,
        out: &mut Outbox,
    ) -> Option<Read> {
        if whole && range.length() > WHOLE_READ_MAX {
            self.refuse(to, ErrorCode::Overflow, "too long for one chunk", out);
            return None;
        }
        if range.is_empty() {
            out.reply(|out| self.dialect.success(to, out));
            return None;
        }
        Some(Read::new(to, range, whole))
    }

    /// Answers the next piece of a read, if that can be done without waiting for a disk.
    pub(super) fn advance(
        &mut self,
        read: &mut Read,
        out: &mut Outbox,
    ) -> Result<ReadStep<'a>, SessionEnd> {
        if read.attached && out.announced().is_empty() {
            read.attached = false;
            out.release_deferred();
            if read.rest.is_empty() {
                self.conclude_read(read, out);
                return Ok(ReadStep::Answered);
            }
        }
        let Some(visit) = self.visit()? else { return Ok(ReadStep::Waits) };
        if read.attached {
            keep_promise(&visit, out).map_err(SessionEnd::ReplyIncomplete)?;
            Ok(ReadStep::GoesOn)
        } else if self.dialect == Dialect::Simple {
            Ok(self.advance_simple(visit, read, out))
        } else {
            Ok(self.advance_in_chunks(visit, read, out))
        }
    }

    /// Ends a reply of which the last chunk did not say that it is.
    fn conclude_read(&self, read: &Read, out: &mut Outbox) {
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
            // By another process, which had sent the head.
            read.promise(out);
            return ReadStep::GoesOn;
        }
        if rest.length() <= IN_HAND_MAX {
            if let Err(error) = self.put(&visit, read, rest, true, out) {
                return self.cold_or_failed(visit, read, rest, &error, out);
            }
            return ReadStep::Answered;
        }
        let unchecked = rest.from(read.checked);
        if unchecked.is_empty() {
            out.reply(|out| self.dialect.data_head(read.to, 0, 0, false, out));
            read.promise(out);
            return ReadStep::GoesOn;
        }
        let piece = unchecked.split(piece_length(unchecked)).0;
        let is_loaded = read.is_loaded(piece);
        let try_out = |data: &mut [u8]| fill(&visit, is_loaded, piece.offset(), data);
        if let Err(error) = out.try_fill(piece.length() as usize, try_out) {
            return self.cold_or_failed(visit, read, piece, &error, out);
        }
        read.checked = piece.end();
        ReadStep::GoesOn
    }

    fn advance_in_chunks(
        &mut self,
        visit: Visit<'a>,
        read: &mut Read,
        out: &mut Outbox,
    ) -> ReadStep<'a> {
        let ChunkContent { range, hole } = match self.next_part(&visit, read) {
            Ok(part) => part,
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
        } else if let Err(error) = self.put(&visit, read, range, done, out) {
            return self.cold_or_failed(visit, read, range, &error, out);
        }
        read.answered(range.length());
        if done { ReadStep::Answered } else { ReadStep::GoesOn }
    }

    /// Takes `piece` in hand, and puts it and its head into the outbox. `WouldBlock` if it has to be
    /// loaded first.
    fn put(
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
        let head = |out: &mut Vec<u8>| dialect.data_head(to, at, length as u32, done, out);
        let is_loaded = read.is_loaded(piece);
        if pinned::fits(piece) && self.disk.pins() {
            let waits = self.inline_reads.waits();
            if !is_loaded && !waits && !visit.is_resident(piece) {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            let began = waits.then(Instant::now);
            let outcome = out.reply_with_pinned(head, length, |pipe| visit.pin(at, length, pipe));
            if let Some(began) = began {
                self.inline_reads.waited(piece.length(), began.elapsed());
            }
            match outcome {
                Err(error) if error.kind() == io::ErrorKind::Unsupported => {}
                outcome => return outcome,
            }
        }
        out.reply_with_data(head, length, |data| fill(visit, is_loaded, at, data))
    }

    /// What to do with a read of which `piece` could not be had.
    fn cold_or_failed(
        &mut self,
        visit: Visit<'a>,
        read: &mut Read,
        piece: Range,
        error: &io::Error,
        out: &mut Outbox,
    ) -> ReadStep<'a> {
        if error.kind() == io::ErrorKind::WouldBlock && !read.is_loaded(piece) {
            let next = read.rest.from(piece.offset()).split(piece.length().max(LOAD_MAX)).0;
            read.loading = next.end();
            return ReadStep::Cold(visit, next);
        }
        drop(visit);
        self.fail_read(read, piece, error, out);
        ReadStep::Answered
    }

    /// The next part of a read that is told in one chunk.
    fn next_part(&mut self, visit: &Visit<'_>, read: &Read) -> io::Result<ChunkContent> {
        let rest = read.rest;
        if read.whole {
            return Ok(ChunkContent { range: rest, hole: false });
        }
        let allocated = self.allocated;
        if allocated.offset() <= rest.offset() && rest.offset() < allocated.end() {
            return Ok(data_part(rest.until(allocated.end())));
        }
        if rest.length() < HOLE_WORTH_ASKING && !read.begun {
            return Ok(data_part(rest));
        }
        let Extent { range, allocated } = visit.extent(rest.offset())?;
        let within = rest.until(range.end());
        if !allocated {
            return Ok(ChunkContent { range: within, hole: true });
        }
        self.allocated = range;
        Ok(data_part(within))
    }

    fn fail_read(&mut self, read: &Read, piece: Range, error: &io::Error, out: &mut Outbox) {
        let kind = message_id::REQUEST_FAILED;
        let code = self.complain(kind, &format_args!("read of {piece:?}"), error);
        // Where, only if a part was answered before: that part then is true.
        let at = read.begun.then_some(piece.offset());
        out.reply(|out| self.dialect.failure(read.to, code, at, "", out));
    }
}

/// The first piece of data that is told in one chunk.
fn data_part(data: Range) -> ChunkContent {
    ChunkContent { range: data.split(piece_length(data)).0, hole: false }
}

/// Reads the next piece of what has been promised.
fn keep_promise(visit: &Visit<'_>, out: &mut Outbox) -> io::Result<()> {
    let promised = out.announced();
    let piece = promised.split(piece_length(promised)).0;
    // It fits: a piece is at most 256 KiB.
    out.append_announced(piece.length() as usize, |data| visit.read(piece.offset(), data))
}

/// Fills `data` from the disk, waiting for it only if it has been loaded.
fn fill(visit: &Visit<'_>, loaded: bool, offset: u64, data: &mut [u8]) -> io::Result<()> {
    if loaded { visit.read(offset, data) } else { visit.read_now(offset, data) }
}
