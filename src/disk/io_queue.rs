//! The interface to asynchronous I/O: calls, completions, queues and notifiers.
//! Decides nothing: `inflight` knows the purpose of a call and the step that follows it.

use crate::range::Range;
use std::io;
use std::os::fd::BorrowedFd;

/// A backend operation that may take long.
#[derive(Debug, PartialEq, Eq)]
pub enum Call {
    /// Populates the page cache and completes when the range is resident. Best effort: the pages may
    /// be evicted before they are read, and a failure shows when they are.
    Populate(Range),
    /// Starts readahead of the range, without waiting for it.
    Prefetch(Range),
    /// Writes all of `data` to `offset`, durably.
    Write {
        /// Where, in bytes.
        offset: u64,
        /// The bytes.
        data: Vec<u8>,
    },
    /// Makes everything written before durable.
    Flush,
    /// Makes the range read as zeros.
    Zero(Range, Zeroing),
    /// Deallocates as much of the range as possible.
    Trim(Range),
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

/// A completed call.
#[derive(Debug)]
pub struct Completion {
    /// The key it was pushed with.
    pub key: u64,
    /// The call itself.
    pub call: Call,
    /// Its result; `None` if the queue cannot execute the call and has changed nothing.
    pub outcome: Option<io::Result<()>>,
}

/// The I/O queue of one session: executes many calls at once and completes them in any order.
///
/// Dropping it blocks until all of them have completed.
pub trait IoQueue: std::fmt::Debug {
    /// Queues a call. It may start at once, and at the latest with the next [`IoQueue::submit`].
    ///
    /// # Errors
    /// Returns the call if this queue cannot execute it.
    fn push(&mut self, key: u64, call: Call) -> Result<(), Call>;
    /// Submits everything queued. Returns false if some calls completed synchronously, in which case
    /// no notification follows and the caller must poll.
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
