//! How far a session has come between two turns, and how that is packed up for the next process.
//! Only what is remembered: what follows from it is decided in `transmission`.

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

/// How far a session has come.
#[derive(Debug, Default)]
pub(super) struct SessionProgress {
    pub(super) payload: Option<Payload>,
    pub(super) reads: VecDeque<Read>,
    /// Why the session ends once everything has been answered and sent.
    pub(super) leaving: Option<SessionEnd>,
    pub(super) received: u64,
    /// So little came the last time that it was all there was.
    pub(super) drained: bool,
    pub(super) sent: u64,
    pub(super) request_stall: Stall,
    pub(super) reply_stall: Stall,
}

/// A payload of which not everything has arrived.
#[derive(Debug)]
pub(super) struct Payload {
    pub(super) to: ReplyTo,
    pub(super) left: u64,
    pub(super) purpose: PayloadPurpose,
}

/// What a payload is for.
#[derive(Debug)]
pub(super) enum PayloadPurpose {
    /// To be written to the rest of this range.
    Write { range: Range, rest: Range, durable: bool },
    /// To be read past; the reply is in the outbox or will be made at the end.
    Skip { failed: Option<(Request, io::Error)> },
    /// To be understood by the reception, once all of it is here.
    Private { data: Vec<u8> },
}

impl SessionProgress {
    /// Whether the next process can go on from here. That the client has ended its side is seen
    /// there once more; that its last bytes were no request is not.
    pub(super) fn can_be_suspended(&self) -> bool {
        use SessionEnd::{Closed, Goodbye, Truncated};
        matches!(self.leaving, None | Some(Goodbye | Closed | Truncated))
    }

    /// What is outstanding. The clocks of `--killswitch` start anew in the next process.
    pub(super) fn save(self) -> snapshot::PendingSnapshot {
        snapshot::PendingSnapshot {
            payload: self.payload.map(Payload::save),
            reads: self.reads.into_iter().map(Read::save).collect(),
            said_goodbye: matches!(self.leaving, Some(SessionEnd::Goodbye)),
        }
    }

    /// The same on a disk of `size` bytes; none if it does not fit there.
    pub(super) fn restore(packed: snapshot::PendingSnapshot, size: u64) -> Option<Self> {
        let snapshot::PendingSnapshot { payload, reads, said_goodbye } = packed;
        let payload = match payload {
            Some(payload) => Some(Payload::restore(payload, size)?),
            None => None,
        };
        let reads = reads.into_iter().map(|read| Read::restore(read, size));
        let leaving = said_goodbye.then_some(SessionEnd::Goodbye);
        Some(Self { payload, reads: reads.collect::<Option<_>>()?, leaving, ..Self::default() })
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
        snapshot::PayloadSnapshot { to: self.to.into(), left: self.left, purpose }
    }

    fn restore(packed: snapshot::PayloadSnapshot, size: u64) -> Option<Self> {
        let snapshot::PayloadSnapshot { to, left, purpose } = packed;
        let purpose = match purpose {
            snapshot::PurposeSnapshot::Write { range, rest, durable } => {
                let (range, rest) = (range.within(size)?, rest.within(size)?);
                PayloadPurpose::Write { range, rest, durable }
            }
            snapshot::PurposeSnapshot::SkipFailed { range, durable, errno } => {
                let what = Request::Write { range: range.within(size)?, durable };
                PayloadPurpose::Skip { failed: Some((what, io::Error::from_raw_os_error(errno))) }
            }
            snapshot::PurposeSnapshot::Skip => PayloadPurpose::Skip { failed: None },
            snapshot::PurposeSnapshot::Private { data } => PayloadPurpose::Private { data },
        };
        Some(Self { to: to.into(), left, purpose })
    }
}
