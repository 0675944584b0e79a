//! A request to the server: an operation of a session, and how far it is executed.
//! Pure.

use crate::disk::{Buffer, Completion, Extent, Op, OpId, Zeroing};
use crate::range::Range;
#[cfg(test)]
use crate::upstream::mutation::{self, UpstreamMutation};
use crate::upstream::unflushed::SEGMENT_OVERHEAD;
use nix::errno::Errno;
use std::io;
use std::sync::Arc;

/// An operation that has not completed.
#[derive(Debug)]
pub(super) struct UpstreamRequest {
    /// The queue that pushed it.
    pub(super) owner: u64,
    /// The key it was pushed with.
    pub(super) key: u64,
    /// The cookie for its message, if it has a single one: the client's, and afterwards that with which it was
    /// sent. `None` once it was sent in several.
    pub(super) cookie: Option<u64>,
    pub(super) task: UpstreamTask,
    /// A message of it was sent, over any connection.
    pub(super) has_begun: bool,
    /// The bytes in front of this offset were sent over the current connection.
    pub(super) next: u64,
    /// Messages without a reply.
    pub(super) unanswered: usize,
    /// The first error of a message.
    pub(super) error: Option<i32>,
    /// For a flush: the number of acknowledged changes when it was sent.
    pub(super) stamp: u64,
    /// Its memory ([`UpstreamTask::memory_kept`]) is reserved.
    pub(super) has_memory: bool,
    /// Its session has ended, and has its completion. It is executed nevertheless.
    pub(super) is_cancelled: bool,
}

/// The work of a request.
#[derive(Debug)]
pub(super) enum UpstreamTask {
    Read {
        range: Range,
        /// `None` while the receiver fills it.
        data: Option<Buffer>,
    },
    Write {
        range: Range,
        data: Arc<Buffer>,
        durable: bool,
    },
    Zero {
        range: Range,
        how: Zeroing,
    },
    Trim {
        range: Range,
    },
    Flush,
    Cache {
        range: Range,
    },
    Extents {
        range: Range,
        limit: usize,
        found: Vec<Extent>,
    },
}

impl UpstreamTask {
    /// The task of an operation. Returns an operation that no message can execute: a durable zeroing or
    /// trim, or a load.
    ///
    /// # Errors
    /// The operation.
    pub(super) fn of(op: Op, size: u64) -> Result<Self, Op> {
        let Ok(range) = op.range(size) else { return Err(op) };
        let range = range.unwrap_or(Range::whole(0));
        Ok(match op {
            Op::Read { data, .. } => Self::Read { range, data: Some(data) },
            Op::Write { data, durable, .. } => Self::Write { range, data: Arc::new(data), durable },
            Op::Zero { how, durable: false, .. } => Self::Zero { range, how },
            Op::Trim { durable: false, .. } => Self::Trim { range },
            Op::Flush => Self::Flush,
            Op::Cache(_) => Self::Cache { range },
            Op::Extents { limit, found, .. } => Self::Extents { range, limit, found },
            Op::Zero { .. } | Op::Trim { .. } | Op::Load(_) => return Err(op),
        })
    }

    pub(super) fn range(&self) -> Range {
        match self {
            Self::Read { range, .. }
            | Self::Write { range, .. }
            | Self::Zero { range, .. }
            | Self::Trim { range }
            | Self::Cache { range }
            | Self::Extents { range, .. } => *range,
            Self::Flush => Range::whole(0),
        }
    }

    pub(super) fn changes(&self) -> bool {
        matches!(self, Self::Write { .. } | Self::Zero { .. } | Self::Trim { .. })
    }

    pub(super) fn is_durable(&self) -> bool {
        matches!(self, Self::Flush | Self::Write { durable: true, .. })
    }

    /// Most bytes of memory that it adds to the unflushed changes once it is acknowledged: its data, its
    /// segment, and the second half of a segment that it divides.
    pub(super) fn memory_kept(&self) -> u64 {
        match self {
            Self::Write { data, .. } => data.capacity() as u64 + 2 * SEGMENT_OVERHEAD,
            Self::Zero { .. } | Self::Trim { .. } => 2 * SEGMENT_OVERHEAD,
            _ => 0,
        }
    }

    /// The operation of a change, without its data.
    fn dataless_op(&self) -> Op {
        match *self {
            Self::Write { range, durable, .. } => {
                Op::Write { offset: range.offset(), data: Buffer::default(), durable }
            }
            Self::Zero { range, how } => Op::Zero { range, how, durable: false },
            _ => Op::Trim { range: self.range(), durable: false },
        }
    }

    fn into_op(self, is_failed: bool) -> Op {
        match self {
            Self::Read { range, data } => {
                Op::Read { offset: range.offset(), data: data.unwrap_or_default() }
            }
            Self::Write { range, data, durable } => {
                // Kept until it is flushed, unless this is the only reference. After a failure the caller
                // may write it again, although the server has failed it before all of it was sent.
                let copy = |data: Arc<Buffer>| Buffer::copy_of(&data, 1).unwrap_or_default();
                let shared = |data| if is_failed { copy(data) } else { Buffer::default() };
                let data = Arc::try_unwrap(data).unwrap_or_else(shared);
                Op::Write { offset: range.offset(), data, durable }
            }
            Self::Zero { range, how } => Op::Zero { range, how, durable: false },
            Self::Trim { range } => Op::Trim { range, durable: false },
            Self::Flush => Op::Flush,
            Self::Cache { range } => Op::Cache(range),
            Self::Extents { range, limit, found } => Op::Extents { range, limit, found },
        }
    }
}

impl UpstreamRequest {
    /// Nothing of it is sent yet.
    pub(super) fn new(owner: u64, id: OpId, task: UpstreamTask) -> Self {
        Self {
            owner,
            key: id.key,
            cookie: id.cookie,
            next: task.range().offset(),
            task,
            has_begun: false,
            unanswered: 0,
            error: None,
            stamp: 0,
            has_memory: false,
            is_cancelled: false,
        }
    }

    /// Whether it is a change that a server may have executed.
    pub(super) fn may_be_executed(&self) -> bool {
        self.has_begun && self.task.changes()
    }

    /// The connections are lost: nothing is sent.
    pub(super) fn restart(&mut self) {
        #[cfg(test)]
        if mutation::is_active(UpstreamMutation::KeepProgress) {
            (self.unanswered, self.error, self.has_memory) = (0, None, false);
            return;
        }
        self.next = self.task.range().offset();
        (self.unanswered, self.error, self.has_memory) = (0, None, false);
        if let UpstreamTask::Extents { found, .. } = &mut self.task {
            found.clear();
        }
    }

    /// The completion of a change whose session has ended, before its execution.
    pub(super) fn cancel(&mut self) -> (u64, Completion) {
        self.is_cancelled = true;
        let op = self.task.dataless_op();
        (self.owner, Completion { key: self.key, op, outcome: Some(Ok(())) })
    }

    /// The completion with this error, or success.
    pub(super) fn complete(self, error: Option<i32>) -> (u64, Completion) {
        let outcome = match (error, &self.task) {
            (Some(error), _) => Err(io::Error::from_raw_os_error(error)),
            // The memory for its data is missing.
            (None, UpstreamTask::Read { data: None, .. }) => Err(Errno::ENOMEM.into()),
            (None, _) => Ok(()),
        };
        let op = self.task.into_op(error.is_some());
        (self.owner, Completion { key: self.key, op, outcome: Some(outcome) })
    }
}
