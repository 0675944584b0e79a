//! Answering reads: piece by piece, holes as holes, and long data straight from the page cache.
//! Never waits for the client: what it does not take now is continued later. Waits for the disk only
//! after an errand has loaded what is read, which may be gone again: then, to get on at all.
//!
//! Short data is read into the outbox behind its head. Of long data only the head goes there, and
//! the kernel is told to send the rest (`sendfile(2)`) when the head has been sent. That can still
//! fail: then a simple reply cannot be completed and the session ends; a chunk is filled up with
//! zeros, and an error chunk says from where on ("Structured reply types").

use super::carry;
use super::end::SessionEnd;
use super::outbox::Outbox;
use super::work::{Worker, piece_length};
use crate::disk::{Extent, Visit};
use crate::nbd::reply::{Dialect, Origin};
use crate::nbd::wire::ErrorCode;
use crate::net::Stream;
use crate::range::Range;
use crate::systemd::message_id;
use std::io;
use std::os::fd::AsFd;
use std::time::Instant;

/// Longest read that is answered in one chunk because the client wants it so (`DF`).
pub(super) const WHOLE_READ_MAX: u64 = 1 << 20;
/// From this length on it is worth asking whether a read is of a hole.
const HOLE_WORTH_ASKING: u64 = 64 << 10;
/// From this length on the kernel sends data straight from the page cache: below, one copy costs
/// less than the system calls that it would save.
const ATTACH_MIN: u64 = 64 << 10;

/// How much of a long read is loaded before the kernel sends it, in bytes; what follows is read
/// ahead by the kernel meanwhile.
const LOAD_MAX: u64 = 1 << 20;

/// A read that is not completely answered.
#[derive(Debug)]
pub(super) struct Read {
    to: Origin,
    /// What is still to be answered.
    rest: Range,
    whole: bool,
    begun: bool,
    /// The kernel is sending a part of it; it goes on when that has been sent.
    attached: bool,
    /// What is next has been loaded.
    loaded: bool,
}

/// How far a read has come.
#[derive(Debug)]
pub(super) enum Step<'a> {
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
    pub(super) fn pack(self) -> carry::Read {
        let Self { to, rest, whole, begun, attached, loaded: _ } = self;
        carry::Read { to: to.into(), rest: rest.into(), whole, begun, attached }
    }

    /// The same on a disk of `size` bytes; none if it does not fit there.
    pub(super) fn unpack(packed: carry::Read, size: u64) -> Option<Self> {
        let carry::Read { to, rest, whole, begun, attached } = packed;
        let rest = rest.within(size)?;
        Some(Self { to: to.into(), rest, whole, begun, attached, loaded: false })
    }

    /// Notes that what was cold has been loaded, or could not be.
    pub(super) fn warm(&mut self) {
        self.loaded = true;
    }

    /// Lets the kernel send `piece`, the beginning of what is left, behind its head.
    fn attach(&mut self, piece: Range, out: &mut Outbox) {
        out.attach(piece);
        self.answered(piece.length());
        self.attached = true;
    }

    /// The next `length` bytes have been answered.
    fn answered(&mut self, length: u64) {
        self.rest = self.rest.split(length).1;
        (self.begun, self.loaded) = (true, false);
    }
}

/// What one chunk tells.
struct Part {
    range: Range,
    hole: bool,
}

impl<'a> Worker<'a> {
    /// A read to be answered, unless it is answered already, by its refusal perhaps.
    pub(super) fn read(
        &mut self,
        to: Origin,
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
        Some(Read { to, rest: range, whole, begun: false, attached: false, loaded: false })
    }

    /// Answers the next piece of a read, if that can be done without waiting for a disk.
    pub(super) fn advance(
        &mut self,
        read: &mut Read,
        out: &mut Outbox,
    ) -> Result<Step<'a>, SessionEnd> {
        if std::mem::take(&mut read.attached) {
            out.release();
            if read.rest.is_empty() {
                self.conclude_read(read, out);
                return Ok(Step::Answered);
            }
        }
        let Some(visit) = self.visit()? else { return Ok(Step::Waits) };
        if self.dialect == Dialect::Simple {
            self.advance_simple(visit, read, out)
        } else {
            Ok(self.advance_in_chunks(visit, read, out))
        }
    }

    /// Ends a reply whose last data could still fail when its head was sent.
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
    ) -> Result<Step<'a>, SessionEnd> {
        if self.is_worth_attaching(read.rest) && !read.begun {
            if let Some(cold) = self.cold_part(&visit, read, read.rest) {
                return Ok(Step::Cold(visit, cold));
            }
            out.reply(|out| self.dialect.data_head(read.to, 0, 0, false, out));
            read.attach(read.rest, out);
            return Ok(Step::GoesOn);
        }
        let piece = read.rest.split(piece_length(read.rest)).0;
        // It fits: a piece is at most 256 KiB.
        let length = piece.length() as usize;
        if read.begun {
            // Nothing may come between the pieces of a simple reply: it waits for the disk.
            let fill = |data: &mut [u8]| visit.read(piece.offset(), data);
            out.more_data(length, fill).map_err(SessionEnd::ReadBrokeOff)?;
        } else {
            let fill = |data: &mut [u8]| fill(&visit, read.loaded, piece.offset(), data);
            let head = |out: &mut Vec<u8>| self.dialect.data_head(read.to, 0, 0, false, out);
            if let Err(error) = out.reply_with_data(head, length, fill) {
                return Ok(self.cold_or_failed(visit, read, piece, &error, out));
            }
        }
        read.answered(piece.length());
        if read.rest.is_empty() {
            out.release();
            return Ok(Step::Answered);
        }
        out.hold();
        Ok(Step::GoesOn)
    }

    fn advance_in_chunks(
        &mut self,
        visit: Visit<'a>,
        read: &mut Read,
        out: &mut Outbox,
    ) -> Step<'a> {
        let Part { range, hole } = match self.next_part(&visit, read) {
            Ok(part) => part,
            Err(error) => {
                self.fail_read(read, read.rest, &error, out);
                return Step::Answered;
            }
        };
        let done = range.length() == read.rest.length();
        // It fits: a read has no more than 32 bits, and less than 2^32 - 8 by its largest payload.
        let (at, length) = (range.offset(), range.length() as u32);
        if hole {
            out.reply(|out| self.dialect.hole(read.to, at, length, done, out));
        } else if !read.whole && self.is_worth_attaching(range) {
            if let Some(cold) = self.cold_part(&visit, read, range) {
                return Step::Cold(visit, cold);
            }
            out.reply(|out| self.dialect.data_head(read.to, at, length, false, out));
            read.attach(range, out);
            return Step::GoesOn;
        } else {
            let fill = |data: &mut [u8]| fill(&visit, read.loaded, at, data);
            let head = |out: &mut Vec<u8>| self.dialect.data_head(read.to, at, length, done, out);
            if let Err(error) = out.reply_with_data(head, length as usize, fill) {
                return self.cold_or_failed(visit, read, range, &error, out);
            }
        }
        read.answered(range.length());
        if done { Step::Answered } else { Step::GoesOn }
    }

    /// What to do with a read of which `piece` could not be had.
    fn cold_or_failed(
        &mut self,
        visit: Visit<'a>,
        read: &Read,
        piece: Range,
        error: &io::Error,
        out: &mut Outbox,
    ) -> Step<'a> {
        if error.kind() == io::ErrorKind::WouldBlock && !read.loaded {
            return Step::Cold(visit, piece);
        }
        drop(visit);
        self.fail_read(read, piece, error, out);
        Step::Answered
    }

    /// The next part of a read that is told in one chunk.
    fn next_part(&mut self, visit: &Visit<'_>, read: &Read) -> io::Result<Part> {
        let rest = read.rest;
        if read.whole {
            return Ok(Part { range: rest, hole: false });
        }
        let allocated = self.allocated;
        if allocated.offset() <= rest.offset() && rest.offset() < allocated.end() {
            return Ok(self.data_part(rest.until(allocated.end())));
        }
        if rest.length() < HOLE_WORTH_ASKING && !read.begun {
            return Ok(self.data_part(rest));
        }
        let Extent { range, allocated } = visit.extent(rest.offset())?;
        let within = rest.until(range.end());
        if !allocated {
            return Ok(Part { range: within, hole: true });
        }
        self.allocated = range;
        Ok(self.data_part(within))
    }

    fn data_part(&self, data: Range) -> Part {
        let worth = self.is_worth_attaching(data);
        let length = if worth { data.length() } else { piece_length(data) };
        Part { range: data.split(length).0, hole: false }
    }

    /// Whether data is so long that it is better not copied through this process.
    fn is_worth_attaching(&self, data: Range) -> bool {
        data.length() >= ATTACH_MIN && self.disk.sends()
    }

    /// What of `range` is to be loaded before the kernel sends it, if anything is.
    fn cold_part(&self, visit: &Visit<'_>, read: &Read, range: Range) -> Option<Range> {
        let first = range.split(LOAD_MAX).0;
        let goes = read.loaded || self.patience.waits() || visit.is_at_hand(first);
        (!goes).then_some(first)
    }

    /// Sends what is due from the disk, for the first of `reads`; false when the client takes no more now.
    pub(super) fn send_from_disk(
        &mut self,
        stream: &Stream,
        reads: &mut std::collections::VecDeque<Read>,
        out: &mut Outbox,
    ) -> Result<bool, SessionEnd> {
        while !out.due_from_disk().is_empty() {
            let due = out.due_from_disk();
            let Some(visit) = self.visit()? else { return Ok(false) };
            let began = self.patience.waits().then(Instant::now);
            // It fits: a read has no more than 32 bits.
            match visit.send(due.offset(), due.length() as usize, stream.as_fd()) {
                Ok(count) => {
                    out.sent_from_disk(count as u64);
                    if let Some(began) = began {
                        self.patience.waited(count as u64, began.elapsed());
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) if is_sockets(&error) => return Err(SessionEnd::Connection(error)),
                Err(error) if self.dialect == Dialect::Simple => {
                    return Err(SessionEnd::ReadBrokeOff(error));
                }
                Err(error) => {
                    out.pad_from_disk();
                    if let Some(read) = reads.pop_front() {
                        self.fail_read(&read, due, &error, out);
                    }
                    out.release();
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    fn fail_read(&mut self, read: &Read, piece: Range, error: &io::Error, out: &mut Outbox) {
        let kind = message_id::REQUEST_FAILED;
        let code = self.complain(kind, &format_args!("read of {piece:?}"), error);
        // Where, only if a part was answered before: that part then is true.
        let at = read.begun.then_some(piece.offset());
        out.reply(|out| self.dialect.failure(read.to, code, at, "", out));
    }
}

/// Fills `data` from the disk, waiting for it only if it has been loaded.
fn fill(visit: &Visit<'_>, loaded: bool, offset: u64, data: &mut [u8]) -> io::Result<()> {
    if loaded { visit.read(offset, data) } else { visit.read_now(offset, data) }
}

/// Whether sending from the disk failed because of the socket.
fn is_sockets(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, NotConnected, TimedOut};
    matches!(
        error.kind(),
        BrokenPipe | ConnectionAborted | ConnectionReset | NotConnected | TimedOut
    )
}
