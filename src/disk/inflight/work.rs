//! The operations of a session, and their state while they wait and while they execute.

use super::super::disk::Visit;
use super::super::flush_errors::FlushGuard;
use super::super::io_queue::{IoQueue, Zeroing};
use super::super::overlap::Change;
use crate::range::Range;
use std::time::Instant;

/// Most operations of one session in flight.
pub const IN_FLIGHT_MAX: usize = 128;
/// Most bytes of data that they hold; a single operation may hold more.
pub const BYTES_MAX: usize = 2 << 20;

/// What an operation does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Work {
    /// Populates the page cache, so that [`Visit::read_now`] is likely to succeed. Never fails.
    Populate(Range),
    /// Starts readahead of the range (`NBD_CMD_CACHE`).
    Prefetch(Range),
    /// Makes everything durable that any visit wrote before (`NBD_CMD_FLUSH`).
    Flush,
    /// Writes all of `data`, leaving out zeros that would go into a hole.
    Write {
        /// Where, in bytes.
        offset: u64,
        /// The bytes.
        data: Vec<u8>,
        /// Complete only once it is on stable storage (`NBD_CMD_FLAG_FUA`).
        durable: bool,
    },
    /// Makes exactly the range read as zeros.
    Zero {
        /// Where.
        range: Range,
        /// Hole or allocated, fast or not.
        how: Zeroing,
        /// As for a write.
        durable: bool,
    },
    /// Deallocates as much as possible; the bytes may then read as anything. Succeeds where the
    /// image cannot.
    Trim {
        /// Where.
        range: Range,
        /// As for a write.
        durable: bool,
    },
}

/// What executes the calls.
#[derive(Debug)]
pub(super) enum Executor<'a> {
    /// Chosen at the first call.
    Unknown,
    /// The backend's I/O queue.
    Queue(Box<dyn IoQueue + 'a>),
    /// The disk's threads.
    Threads,
}

/// An operation that waits to start, or to continue with its next part.
#[derive(Debug)]
pub(super) struct Queued<'a, T> {
    pub(super) token: T,
    pub(super) work: Work,
    pub(super) change: Option<Change<'a>>,
    pub(super) weight: usize,
}

/// An operation that executes, or is batched for a commit.
#[derive(Debug)]
pub(super) struct Operation<'a, T> {
    pub(super) token: T,
    pub(super) visit: Visit<'a>,
    /// Until the bytes are written.
    pub(super) change: Option<Change<'a>>,
    /// What follows the call in flight.
    pub(super) next_step: NextStep,
    pub(super) flush_guard: Option<FlushGuard<'a>>,
    /// Other operations that the same flush makes durable.
    pub(super) members: Vec<Operation<'a, T>>,
    /// Bytes of data that it holds.
    pub(super) weight: usize,
}

/// A durable operation, with the write that it has not executed yet.
#[derive(Debug)]
pub(super) struct Batched<'a, T> {
    pub(super) operation: Operation<'a, T>,
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
    /// The rest of a zeroing or trim, which may be empty, after the part started at `since`.
    Rest {
        rest: Work,
        since: Instant,
    },
}
