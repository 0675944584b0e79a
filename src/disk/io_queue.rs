//! Disk work that is done aside: what can be begun, and what is heard when it is made.
//! Decides nothing: what a call is for, and what follows it, is known to `errands`.

use crate::range::Range;
use std::io;
use std::os::fd::BorrowedFd;

/// One thing that an image may take long to do.
#[derive(Debug, PartialEq, Eq)]
pub enum Call {
    /// Brings what the range holds into memory, so that it can be had without waiting. It may be
    /// gone again by then, and a failure will show when it is read.
    Populate(Range),
    /// Asks that the range be brought into memory, and does not wait until it is there.
    Prefetch(Range),
    /// Writes all of `data` to `offset`, durably.
    Write {
        /// Where, in bytes.
        offset: u64,
        /// What.
        data: Vec<u8>,
    },
    /// Makes everything durable that was written before.
    Flush,
    /// Makes the range read as zeros.
    Zero(Range, Zeroing),
    /// Gives back what it can of the range.
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

/// A call that is over.
#[derive(Debug)]
pub struct Completion {
    /// The number that it was begun with.
    pub key: u64,
    /// What it was.
    pub call: Call,
    /// How it ended; none when it cannot be done aside, and nothing has been changed.
    pub outcome: Option<io::Result<()>>,
}

/// Makes calls, many at a time and in whatever order they end, while its owner does other things.
///
/// Dropping it waits until all of them are over.
pub trait IoQueue: std::fmt::Debug {
    /// Takes a call on. It may begin at once, and has begun after the next [`IoQueue::submit`].
    ///
    /// # Errors
    /// The call, if it cannot be made here.
    fn begin(&mut self, key: u64, call: Call) -> Result<(), Call>;
    /// Begins what has been taken on. False if calls have come to their end by that for which the
    /// bell does not ring.
    fn submit(&mut self) -> bool;
    /// One of the calls that are over, if there is one. When there will be, the bell rings that the
    /// lane was made with.
    fn finished(&mut self) -> Option<Completion>;
    /// Waits until [`IoQueue::finished`] has something to tell, if it ever will.
    fn wait(&mut self);
}

/// Tells a session that something it waits for has happened.
pub trait Notifier: Send + Sync + std::fmt::Debug {
    /// Rings, now or when somebody listens.
    fn notify(&self);
    /// An eventfd that rings it when it is written to.
    fn as_eventfd(&self) -> BorrowedFd<'_>;
}
