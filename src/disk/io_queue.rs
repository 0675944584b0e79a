//! The interface to asynchronous I/O: operations, completions, queues and notifiers.
//! Decides nothing: `inflight` knows which step follows a completion.

use super::buffer::Buffer;
use crate::range::Range;
use nix::errno::Errno;
use std::io;
use std::os::fd::BorrowedFd;

/// One operation on a disk, from the request of a client to the backend and back.
///
/// `durable` means that it completes only once its change is on stable storage
/// (`NBD_CMD_FLAG_FUA`).
#[derive(Debug, PartialEq, Eq)]
pub enum Op {
    /// Fills `data`.
    Read {
        /// The first byte.
        offset: u64,
        /// Receives the bytes.
        data: Buffer,
    },
    /// Writes all of `data`. A write that is not durable leaves out zeros that would go into a hole.
    Write {
        /// The first byte.
        offset: u64,
        /// The bytes.
        data: Buffer,
        /// See [`Op`].
        durable: bool,
    },
    /// Makes the range read as zeros.
    Zero {
        /// Where.
        range: Range,
        /// Hole or allocated, fast or not.
        how: Zeroing,
        /// See [`Op`].
        durable: bool,
    },
    /// Deallocates as much of the range as possible; the bytes may then read as anything.
    Trim {
        /// Where.
        range: Range,
        /// See [`Op`].
        durable: bool,
    },
    /// Makes everything durable that was written before.
    Flush,
    /// Starts readahead of the range, without waiting for it.
    Cache(Range),
}

impl Op {
    /// The bytes that it reads or changes, on a disk of `size` bytes. `None` for a flush.
    ///
    /// # Errors
    /// `EINVAL` if they are beyond the end.
    pub fn range(&self, size: u64) -> io::Result<Option<Range>> {
        let (offset, length) = match self {
            Self::Read { offset, data } | Self::Write { offset, data, .. } => {
                (*offset, data.len() as u64)
            }
            Self::Zero { range, .. } | Self::Trim { range, .. } | Self::Cache(range) => {
                (range.offset(), range.length())
            }
            Self::Flush => return Ok(None),
        };
        Range::within(size, offset, length).map(Some).ok_or_else(|| Errno::EINVAL.into())
    }

    /// Whether it changes bytes.
    #[must_use]
    pub fn changes(&self) -> bool {
        matches!(self, Self::Write { .. } | Self::Zero { .. } | Self::Trim { .. })
    }

    /// Whether it has to be on stable storage before it completes.
    #[must_use]
    pub fn is_durable(&self) -> bool {
        match self {
            Self::Write { durable, .. }
            | Self::Zero { durable, .. }
            | Self::Trim { durable, .. } => *durable,
            Self::Flush => true,
            Self::Read { .. } | Self::Cache(_) => false,
        }
    }

    /// Bytes of memory that it holds.
    #[must_use]
    pub fn memory(&self) -> usize {
        match self {
            Self::Read { data, .. } | Self::Write { data, .. } => data.len(),
            _ => 0,
        }
    }
}

/// How to make a range read as zeros (NBD specification, `NBD_CMD_WRITE_ZEROES`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Zeroing {
    /// Keep the space allocated (`NBD_CMD_FLAG_NO_HOLE`); otherwise punch a hole.
    pub keep_allocated: bool,
    /// Fail with `EOPNOTSUPP`, before any byte changes, rather than write zeros
    /// (`NBD_CMD_FLAG_FAST_ZERO`).
    pub only_if_fast: bool,
}

/// A completed operation.
#[derive(Debug)]
pub struct Completion {
    /// The key it was pushed with.
    pub key: u64,
    /// The operation itself; a read has its bytes.
    pub op: Op,
    /// Its result; `None` if the queue cannot execute the operation and has changed nothing.
    pub outcome: Option<io::Result<()>>,
}

/// The I/O queue of one session: executes many operations at once and completes them in any order.
///
/// Dropping it blocks until all of them have completed.
pub trait IoQueue: std::fmt::Debug {
    /// Queues an operation. It may start at once, and at the latest with the next
    /// [`IoQueue::submit`].
    ///
    /// # Errors
    /// Returns the operation if this queue cannot execute it.
    fn push(&mut self, key: u64, op: Op) -> Result<(), Op>;
    /// Submits everything queued. Returns false if some operations completed synchronously, in which
    /// case no notification follows and the caller must poll.
    fn submit(&mut self) -> bool;
    /// Returns one completion, if there is one. Each later completion adds to the eventfd that the
    /// queue was created with.
    fn poll(&mut self) -> Option<Completion>;
    /// Blocks until [`IoQueue::poll`] has a completion. Returns early if none will ever come.
    fn wait(&mut self);
}

/// Wakes a session when something it waits for has happened.
pub trait Notifier: Send + Sync + std::fmt::Debug {
    /// Wakes the session, now or when it next waits.
    fn notify(&self);
    /// The eventfd that does the same when it is written to.
    fn as_eventfd(&self) -> BorrowedFd<'_>;
}
