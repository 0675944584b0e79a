//! The interface to asynchronous I/O: queues, completions and notifiers.
//! Decides nothing: `inflight` knows which step follows a completion.

use super::op::Op;
use std::io;
use std::os::fd::BorrowedFd;

/// How a caller names an operation of a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpId {
    /// Returned with the completion. Unique among the operations of the queue that have not completed.
    pub key: u64,
    /// The cookie of the client's request of which the operation is all or a part, for a queue that sends the
    /// request on. It need not be unique: each client chooses its own.
    pub cookie: Option<u64>,
}

impl From<u64> for OpId {
    /// An operation that no client has requested.
    fn from(key: u64) -> Self {
        Self { key, cookie: None }
    }
}

/// A completed operation.
#[derive(Debug)]
pub struct Completion {
    /// The key it was pushed with.
    pub key: u64,
    /// The operation itself; a read has its bytes.
    pub op: Op,
    /// Its result; `None` if the queue cannot execute the operation, or only a part of it: then it has to
    /// be executed as a whole.
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
    fn push(&mut self, id: OpId, op: Op) -> Result<(), Op>;
    /// Submits everything queued. Returns false if some operations completed synchronously, in which
    /// case no notification follows and the caller must poll.
    fn submit(&mut self) -> bool;
    /// Returns one completion, if there is one. Each later completion adds to the eventfd that the
    /// queue was created with.
    fn poll(&mut self) -> Option<Completion>;
    /// A descriptor to wait for beside the eventfd, if there is one: when it is readable,
    /// [`IoQueue::poll`] may have a completion. Calling this is a promise to poll after the wait.
    fn descriptor(&mut self) -> Option<BorrowedFd<'_>> {
        None
    }
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
