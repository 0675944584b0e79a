//! The state of a session between two turns of its loop, and its snapshot.
//! Only state: `transmission` decides what follows from it.

use super::end::SessionEnd;
use super::reads::Read;
use super::snapshot;
use super::stall::Stall;
use crate::disk::errno_of;
use crate::nbd::reply::ReplyTo;
use crate::nbd::request::Request;
use crate::range::Range;
use std::collections::VecDeque;
use std::io;

/// The state of a session in the transmission phase.
#[derive(Debug, Default)]
pub(super) struct SessionProgress {
    pub(super) payload: Option<Payload>,
    pub(super) reads: VecDeque<Read>,
    /// Why the session ends once all replies are sent.
    pub(super) end: Option<SessionEnd>,
    /// Bytes received.
    pub(super) received: u64,
    /// So few bytes arrived the last time that the socket is empty.
    pub(super) drained: bool,
    /// Bytes sent.
    pub(super) sent: u64,
    pub(super) request_stall: Stall,
    pub(super) reply_stall: Stall,
}

/// A payload that has not completely arrived.
#[derive(Debug)]
pub(super) struct Payload {
    pub(super) to: ReplyTo,
    /// Bytes still to arrive.
    pub(super) remaining: u64,
    pub(super) purpose: PayloadPurpose,
}

/// What to do with a payload.
#[derive(Debug)]
pub(super) enum PayloadPurpose {
    /// Write it to `rest`, the end of `range`.
    Write { range: Range, rest: Range, durable: bool },
    /// Skip it. The reply is in the outbox already, or is this failure of the write.
    Skip { failed: Option<(Request, io::Error)> },
    /// Pass it to the policy once it is complete.
    Private { data: Vec<u8> },
}

impl SessionProgress {
    /// Whether the next process can restore the session. It will observe the end of the stream again,
    /// but not a framing error.
    pub(super) fn can_be_suspended(&self) -> bool {
        use SessionEnd::{Closed, Disconnected, Truncated};
        matches!(self.end, None | Some(Disconnected | Closed | Truncated))
    }

    /// Saves the pending requests. The timeouts of `--killswitch` restart in the next process.
    pub(super) fn save(self) -> snapshot::PendingSnapshot {
        snapshot::PendingSnapshot {
            payload: self.payload.map(Payload::save),
            reads: self.reads.into_iter().map(Read::save).collect(),
            disconnect_received: matches!(self.end, Some(SessionEnd::Disconnected)),
        }
    }

    /// Restores the state on a disk of `size` bytes; `None` if a range exceeds it.
    pub(super) fn restore(saved: snapshot::PendingSnapshot, size: u64) -> Option<Self> {
        let snapshot::PendingSnapshot { payload, reads, disconnect_received } = saved;
        let payload = match payload {
            Some(payload) => Some(Payload::restore(payload, size)?),
            None => None,
        };
        let reads = reads.into_iter().map(|read| Read::restore(read, size));
        let end = disconnect_received.then_some(SessionEnd::Disconnected);
        Some(Self { payload, reads: reads.collect::<Option<_>>()?, end, ..Self::default() })
    }
}

impl Payload {
    fn save(self) -> snapshot::PayloadSnapshot {
        let purpose = match self.purpose {
            PayloadPurpose::Write { range, rest, durable } => {
                snapshot::PurposeSnapshot::Write { range: range.into(), rest: rest.into(), durable }
            }
            PayloadPurpose::Skip { failed: Some((Request::Write { range, durable }, error)) } => {
                let errno = errno_of(&error);
                snapshot::PurposeSnapshot::SkipFailed { range: range.into(), durable, errno }
            }
            PayloadPurpose::Skip { failed: _ } => snapshot::PurposeSnapshot::Skip,
            PayloadPurpose::Private { data } => snapshot::PurposeSnapshot::Private { data },
        };
        snapshot::PayloadSnapshot { to: self.to.into(), remaining: self.remaining, purpose }
    }

    fn restore(saved: snapshot::PayloadSnapshot, size: u64) -> Option<Self> {
        let snapshot::PayloadSnapshot { to, remaining, purpose } = saved;
        let purpose = match purpose {
            snapshot::PurposeSnapshot::Write { range, rest, durable } => {
                let (range, rest) = (range.within(size)?, rest.within(size)?);
                PayloadPurpose::Write { range, rest, durable }
            }
            snapshot::PurposeSnapshot::SkipFailed { range, durable, errno } => {
                let request = Request::Write { range: range.within(size)?, durable };
                PayloadPurpose::Skip {
                    failed: Some((request, io::Error::from_raw_os_error(errno))),
                }
            }
            snapshot::PurposeSnapshot::Skip => PayloadPurpose::Skip { failed: None },
            snapshot::PurposeSnapshot::Private { data } => PayloadPurpose::Private { data },
        };
        Some(Self { to: to.into(), remaining, purpose })
    }
}
