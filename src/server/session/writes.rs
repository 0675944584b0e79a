//! Payloads that are arriving: the data of writes, data to skip, and that of the private command.
//!
//! A write of one piece is executed when its data has arrived: in the page cache if that cannot wait for
//! the device, otherwise in flight. A longer one is executed piece by piece, so that a session holds no
//! more than one piece of a client that sends slowly; it is answered when all pieces are written. Where the
//! disk has no page cache, a long piece arrives in the buffer of its operation.

use super::disk_io::{Busy, DiskIo, Tag, piece_length};
use super::replies::Replies;
use super::rx::Rx;
use super::tx::Tx;
#[cfg(test)]
use crate::disk::mutation::{self, Mutation};
use crate::disk::{Op, Visit, errno_of};
use crate::nbd::reply::ReplyTo;
use crate::nbd::request::Request;
use crate::range::Range;
use crate::server::end::SessionEnd;
use crate::server::snapshot::{PayloadSnapshot, PurposeSnapshot};
use std::collections::BTreeMap;
use std::io;

/// A payload that has not completely arrived.
#[derive(Debug)]
pub(super) struct Payload {
    pub(super) to: ReplyTo,
    /// Bytes still to arrive.
    pub(super) remaining: u64,
    pub(super) purpose: Purpose,
}

/// What to do with a payload.
#[derive(Debug)]
pub(super) enum Purpose {
    /// Write it to `rest`, the end of `range`.
    Write { range: Range, rest: Range, durable: bool, number: Option<u64> },
    /// Skip it. The reply is in the send buffer already, or is this failure of the write.
    Skip { failed: Option<(Request, io::Error)> },
    /// Pass it to the policy once it is complete.
    Private { data: Vec<u8> },
}

/// A write of several pieces.
#[derive(Debug)]
struct LongWrite {
    to: ReplyTo,
    range: Range,
    durable: bool,
    /// Pieces in flight.
    in_flight: u32,
    /// All of its data has arrived.
    is_complete: bool,
    /// The first error.
    failed: Option<io::Error>,
}

/// Result of one step of a payload.
#[derive(Debug)]
pub(super) enum PayloadStep {
    /// Bytes were consumed, or a request was answered.
    Progress,
    /// More bytes have to arrive.
    NeedsInput,
    /// It has to wait.
    Blocked(Busy),
    /// The private command has arrived.
    Private { to: ReplyTo, data: Vec<u8> },
}

/// The payload that is arriving, and the writes whose pieces are in flight.
#[derive(Debug, Default)]
pub(super) struct Writes {
    arriving: Option<Payload>,
    long: BTreeMap<u64, LongWrite>,
    next_number: u64,
    /// Bytes written by the session itself; the engine resets it.
    pub(super) written: u64,
}

impl Writes {
    /// Saves the payload. No piece may be in flight.
    pub(super) fn save(mut self) -> Option<PayloadSnapshot> {
        #[cfg(test)]
        if mutation::is_active(Mutation::DropPayload) {
            return None;
        }
        let Payload { to, remaining, purpose } = self.arriving.take()?;
        let purpose = match purpose {
            Purpose::Write { range, rest, durable, number } => {
                let long = number.and_then(|number| self.long.remove(&number));
                match long.and_then(|long| long.failed) {
                    Some(error) => skip_failed(range, durable, &error),
                    None => {
                        let (range, rest) = (range.into(), rest.into());
                        PurposeSnapshot::Write { range, rest, durable }
                    }
                }
            }
            Purpose::Skip { failed: Some((Request::Write { range, durable }, error)) } => {
                skip_failed(range, durable, &error)
            }
            Purpose::Skip { failed: _ } => PurposeSnapshot::Skip,
            Purpose::Private { data } => PurposeSnapshot::Private { data },
        };
        Some(PayloadSnapshot { to: to.into(), remaining, purpose })
    }

    /// Restores the payload on a disk of `size` bytes; `None` if a range exceeds it.
    pub(super) fn restore(saved: Option<PayloadSnapshot>, size: u64) -> Option<Self> {
        let Some(PayloadSnapshot { to, remaining, purpose }) = saved else {
            return Some(Self::default());
        };
        let purpose = match purpose {
            PurposeSnapshot::Write { range, rest, durable } => {
                let (range, rest) = (range.within(size)?, rest.within(size)?);
                Purpose::Write { range, rest, durable, number: None }
            }
            PurposeSnapshot::SkipFailed { range, durable, errno } => {
                let request = Request::Write { range: range.within(size)?, durable };
                let error = io::Error::from_raw_os_error(errno);
                Purpose::Skip { failed: Some((request, error)) }
            }
            PurposeSnapshot::Skip => Purpose::Skip { failed: None },
            PurposeSnapshot::Private { data } => Purpose::Private { data },
        };
        let arriving = Some(Payload { to: to.into(), remaining, purpose });
        Some(Self { arriving, ..Self::default() })
    }

    /// Whether a payload is arriving.
    pub(super) fn is_arriving(&self) -> bool {
        self.arriving.is_some()
    }

    /// Expects the payload of a request.
    pub(super) fn expect(&mut self, to: ReplyTo, remaining: u64, purpose: Purpose) {
        #[cfg(test)]
        if matches!(purpose, Purpose::Skip { .. }) && mutation::is_active(Mutation::KeepPayload) {
            return;
        }
        self.arriving = Some(Payload { to, remaining, purpose });
    }

    /// Expects the data of a write.
    pub(super) fn expect_write(&mut self, to: ReplyTo, range: Range, durable: bool) {
        self.expect_rest(to, (range, range), durable, None);
    }

    fn expect_rest(
        &mut self,
        to: ReplyTo,
        (range, rest): (Range, Range),
        durable: bool,
        number: Option<u64>,
    ) {
        let purpose = Purpose::Write { range, rest, durable, number };
        self.expect(to, rest.length(), purpose);
    }

    /// Handles the next piece of the payload. `may_change` is asked before a change is executed.
    pub(super) fn advance(
        &mut self,
        rx: &mut Rx,
        io: &mut DiskIo<'_>,
        replies: &mut Replies<'_>,
        tx: &mut Tx,
    ) -> Result<PayloadStep, SessionEnd> {
        let Some(Payload { to, remaining, purpose }) = self.arriving.take() else {
            return Ok(PayloadStep::NeedsInput);
        };
        match purpose {
            Purpose::Skip { failed } => Ok(self.skip(to, remaining, failed, rx, replies, tx)),
            Purpose::Private { data } => Ok(self.private(to, remaining, data, rx, io)),
            Purpose::Write { range, rest, durable, number } => {
                let payload = (to, (range, rest), durable, number);
                self.write(payload, rx, io, replies, tx)
            }
        }
    }

    /// Whether the next step of the payload executes a change: its bytes have arrived.
    pub(super) fn is_next_change(&self, rx: &Rx) -> bool {
        let Some(Payload { purpose: Purpose::Write { rest, .. }, .. }) = &self.arriving else {
            return false;
        };
        rx.arrived(piece_length(*rest) as usize).is_some()
    }

    /// Writes the next piece if it has completely arrived: the session must not hold a visit while it
    /// waits for the client.
    fn write(
        &mut self,
        payload: (ReplyTo, (Range, Range), bool, Option<u64>),
        rx: &mut Rx,
        io: &mut DiskIo<'_>,
        replies: &mut Replies<'_>,
        tx: &mut Tx,
    ) -> Result<PayloadStep, SessionEnd> {
        let (to, (range, rest), durable, number) = payload;
        let (piece, then) = rest.split(piece_length(rest));
        // It fits: a piece is at most 256 KiB.
        let length = piece.length() as usize;
        let Some(data) = rx.arrived(length) else {
            if !io.disk.has_page_cache() && io.has_room_to_write(length) {
                rx.expect_piece(length, alignment(io));
            }
            self.expect_rest(to, (range, rest), durable, number);
            return Ok(PayloadStep::NeedsInput);
        };
        let visit = match io.visit()? {
            Ok(visit) => visit,
            Err(busy) => return Ok(self.wait_to_write(payload, busy)),
        };
        let (is_single, skips) = (piece == range, self.has_failed(number));
        let may_inline = !(skips || (is_single && durable));
        let inline = if may_inline { write_inline(&visit, io, piece, data) } else { None };
        if inline.is_some() {
            self.written += piece.length();
        } else if !(skips || io.has_room_to_write(length)) {
            return Ok(self.wait_to_write(payload, Busy::InFlight));
        }
        if is_single {
            let request = Request::Write { range, durable };
            if let Some(outcome) = inline {
                rx.skip(length);
                replies.complete(to, outcome, request, tx);
            } else {
                let op = write_op(io, piece, rx, durable)?;
                io.in_flight.begin(visit, op, Tag::Answer { to, request });
            }
            return Ok(PayloadStep::Progress);
        }
        let number = number.unwrap_or_else(|| self.begin_long(to, range, durable));
        let Some(long) = self.long.get_mut(&number) else { return Ok(PayloadStep::Progress) };
        if inline.is_none() && !skips {
            long.in_flight += 1;
            let op = write_op(io, piece, rx, false)?;
            io.in_flight.begin(visit, op, Tag::Piece(number));
        } else {
            rx.skip(length);
            if let Some(outcome) = inline {
                long.failed = outcome.err();
            }
        }
        if then.is_empty() {
            long.is_complete = true;
            self.answer_long(number, io, replies, tx);
        } else {
            self.expect_rest(to, (range, then), durable, Some(number));
        }
        Ok(PayloadStep::Progress)
    }

    fn wait_to_write(
        &mut self,
        (to, ranges, durable, number): (ReplyTo, (Range, Range), bool, Option<u64>),
        busy: Busy,
    ) -> PayloadStep {
        self.expect_rest(to, ranges, durable, number);
        PayloadStep::Blocked(busy)
    }

    /// Whether a piece of this long write has failed, so that the rest is skipped.
    fn has_failed(&self, number: Option<u64>) -> bool {
        let long = number.and_then(|number| self.long.get(&number));
        long.is_some_and(|long| long.failed.is_some())
    }

    fn begin_long(&mut self, to: ReplyTo, range: Range, durable: bool) -> u64 {
        let number = self.next_number;
        self.next_number += 1;
        let (in_flight, is_complete, failed) = (0, false, None);
        self.long.insert(number, LongWrite { to, range, durable, in_flight, is_complete, failed });
        number
    }

    /// A piece in flight is written.
    pub(super) fn on_piece(
        &mut self,
        number: u64,
        outcome: io::Result<()>,
        io: &mut DiskIo<'_>,
        replies: &mut Replies<'_>,
        tx: &mut Tx,
    ) {
        let Some(long) = self.long.get_mut(&number) else { return };
        long.in_flight -= 1;
        if let Err(error) = outcome {
            long.failed.get_or_insert(error);
        }
        self.answer_long(number, io, replies, tx);
    }

    /// Answers a long write, or flushes it first, if it is complete and all its pieces are written.
    fn answer_long(
        &mut self,
        number: u64,
        io: &mut DiskIo<'_>,
        replies: &mut Replies<'_>,
        tx: &mut Tx,
    ) {
        let is_done = |long: &LongWrite| long.is_complete && long.in_flight == 0;
        #[cfg(test)]
        let is_done = |long: &LongWrite| {
            is_done(long) || (long.is_complete && mutation::is_active(Mutation::AnswerLongEarly))
        };
        if !self.long.get(&number).is_some_and(is_done) {
            return;
        }
        let Some(LongWrite { to, range, durable, failed, .. }) = self.long.remove(&number) else {
            return;
        };
        let request = Request::Write { range, durable };
        match failed {
            Some(error) => replies.complete(to, Err(error), request, tx),
            None if durable => {
                io.in_flight.begin_when_open(Op::Flush, Tag::Answer { to, request });
            }
            None => replies.complete(to, Ok(()), request, tx),
        }
    }

    fn skip(
        &mut self,
        to: ReplyTo,
        remaining: u64,
        failed: Option<(Request, io::Error)>,
        rx: &mut Rx,
        replies: &mut Replies<'_>,
        tx: &mut Tx,
    ) -> PayloadStep {
        let step = remaining.min(rx.bytes().len() as u64);
        // It fits: at most the length of the receive buffer.
        rx.consume(step as usize);
        let remaining = remaining - step;
        if remaining > 0 {
            self.expect(to, remaining, Purpose::Skip { failed });
        } else if let Some((request, error)) = failed {
            replies.complete(to, Err(error), request, tx);
        }
        if step > 0 { PayloadStep::Progress } else { PayloadStep::NeedsInput }
    }

    /// The private command, which is passed on once all earlier requests are completed.
    fn private(
        &mut self,
        to: ReplyTo,
        remaining: u64,
        mut data: Vec<u8>,
        rx: &mut Rx,
        io: &DiskIo<'_>,
    ) -> PayloadStep {
        // It fits: at most the length of the receive buffer.
        let step = remaining.min(rx.bytes().len() as u64) as usize;
        data.extend_from_slice(&rx.bytes()[..step]);
        rx.consume(step);
        let remaining = remaining - step as u64;
        let may_ask = io.in_flight.is_empty();
        #[cfg(test)]
        let may_ask = may_ask || mutation::is_active(Mutation::HandOverEarly);
        if remaining == 0 && may_ask {
            return PayloadStep::Private { to, data };
        }
        self.expect(to, remaining, Purpose::Private { data });
        match (remaining, step) {
            // Reads may have started I/O since the request was begun.
            (0, _) => PayloadStep::Blocked(Busy::InFlight),
            (_, 0) => PayloadStep::NeedsInput,
            _ => PayloadStep::Progress,
        }
    }
}

/// Writes a piece into the page cache. `None` if it has to be an operation in flight: it overlaps a change
/// in flight, or would wait for the device.
fn write_inline(
    visit: &Visit<'_>,
    io: &mut DiskIo<'_>,
    piece: Range,
    data: &[u8],
) -> Option<io::Result<()>> {
    let is_clear = io.in_flight.is_clear(piece);
    #[cfg(test)]
    let is_clear = is_clear || mutation::is_active(Mutation::WriteBeside);
    if !is_clear || visit.write_would_wait(piece) {
        return None;
    }
    let is_ordered = io.in_flight.writes_are_ordered();
    let change = (!is_ordered).then(|| io.in_flight.register_change(piece));
    if change.as_ref().is_some_and(|change| !change.is_first()) {
        return None;
    }
    let outcome = visit.write(piece.offset(), data);
    io.in_flight.record_write(piece);
    Some(outcome)
}

fn write_op(io: &DiskIo<'_>, piece: Range, rx: &mut Rx, durable: bool) -> Result<Op, SessionEnd> {
    // It fits: a piece is at most 256 KiB.
    let data = rx.take(piece.length() as usize, alignment(io)).map_err(SessionEnd::Connection)?;
    Ok(Op::Write { offset: piece.offset(), data, durable })
}

fn alignment(io: &DiskIo<'_>) -> usize {
    // It fits: a unit is at most a block of the device.
    io.disk.unit() as usize
}

fn skip_failed(range: Range, durable: bool, error: &io::Error) -> PurposeSnapshot {
    PurposeSnapshot::SkipFailed { range: range.into(), durable, errno: errno_of(error) }
}
