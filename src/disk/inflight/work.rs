//! What an errand is, and what is kept of it while it waits and while it is under way.

use super::super::device::Visit;
use super::super::flush_errors::FlushGuard;
use super::super::io_queue::{IoQueue, Zeroing};
use super::super::overlap::Change;
use crate::range::Range;
use std::time::Instant;

/// How many errands of one session may be under way.
pub const IN_FLIGHT_MAX: usize = 128;
/// How many bytes they may hold, unless it is one alone.
pub const BYTES_MAX: usize = 2 << 20;

/// What can be done aside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Work {
    /// Brings the range into memory, so that [`Visit::read_now`] is likely to find it. Never fails.
    Populate(Range),
    /// Asks the kernel to bring the range into memory (`NBD_CMD_CACHE`).
    Prefetch(Range),
    /// Makes everything durable that any visit wrote before.
    Flush,
    /// Writes all of `data`; zeros that would go into a hole leave it one.
    Write {
        /// Where, in bytes.
        offset: u64,
        /// What.
        data: Vec<u8>,
        /// Over only once it is on stable storage (`NBD_CMD_FLAG_FUA`).
        durable: bool,
    },
    /// Makes the range read as zeros, to the byte.
    Zero {
        /// Where.
        range: Range,
        /// With or without a hole.
        how: Zeroing,
        /// As for a write.
        durable: bool,
    },
    /// Gives back what can be given back of the range, of which the bytes may then read as
    /// anything. That the image cannot is no error.
    Trim {
        /// Where.
        range: Range,
        /// As for a write.
        durable: bool,
    },
}

/// How calls are made.
#[derive(Debug)]
pub(super) enum Executor<'a> {
    /// Not known until the first call.
    Unknown,
    /// By a lane.
    Lane(Box<dyn IoQueue + 'a>),
    /// By threads.
    Helpers,
}

/// An errand that has to wait before it goes on.
#[derive(Debug)]
pub(super) struct Queued<'a, T> {
    pub(super) token: T,
    pub(super) work: Work,
    pub(super) change: Option<Change<'a>>,
    pub(super) weight: usize,
}

#[derive(Debug)]
pub(super) struct Operation<'a, T> {
    pub(super) token: T,
    pub(super) visit: Visit<'a>,
    /// Until the bytes are there.
    pub(super) change: Option<Change<'a>>,
    /// What is to follow the call that is under way.
    pub(super) then: NextStep,
    pub(super) listening: Option<FlushGuard<'a>>,
    /// Those whom the flush that is under way is for, too.
    pub(super) joined: Vec<Operation<'a, T>>,
    /// Bytes that it holds.
    pub(super) weight: usize,
}

/// An errand that is to be made durable, and what it has not written yet.
#[derive(Debug)]
pub(super) struct Batched<'a, T> {
    pub(super) errand: Operation<'a, T>,
    pub(super) write: Option<(u64, Vec<u8>)>,
}

#[derive(Debug)]
pub(super) enum NextStep {
    Nothing,
    Write {
        offset: u64,
        data: Vec<u8>,
        durable: bool,
    },
    /// This, which may be empty, after the part that was begun at that time.
    Rest {
        rest: Work,
        since: Instant,
    },
}
