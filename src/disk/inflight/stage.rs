//! The stages of an operation.
//!
//! ```text
//!            ┌──────────────── gate closed between two parts ───────────────┐
//!            ▼                                                              │
//! begin ─▶ Waiting ─┬─▶ Executing ───────────────┬────────────▶ completed   │
//!                   ├─▶ ReadingEdges ─▶ (write) ─┤                  ▲       │
//!                   ├─▶ Part ─▶ Part … ──────────┤ durable          │       │
//!                   │    └──────────────────────────────────────────────────┘
//!                   │                            ▼                  │
//!                   ├──────────────────────▶ Batched                │
//!                   │                            │ commit           │
//!                   │                            ▼                  │
//!                   └────────▶ WritingDurably  Flushing, Joined     │
//!                              │      └──────────┴──▶ Verifying ────┤
//!                              └─▶ WritingAgain (failed) ───────────┘
//! ```

use super::super::buffer::Buffer;
use super::super::disk::Visit;
use super::super::flush_errors::{ConcurrentFlushes, FlushGuard};
use super::super::io_queue::{IoQueue, OpId};
use super::super::op::Op;
use super::super::overlap::Change;
use crate::range::Range;
use std::collections::VecDeque;
use std::io;
use std::time::Instant;

/// What executes operations.
#[derive(Debug)]
pub(super) enum OpQueue<'a> {
    /// Chosen at the first operation.
    Unknown,
    /// The backend's I/O queue.
    Of(Box<dyn IoQueue + 'a>),
    /// The disk's threads.
    None,
}

/// An operation that has not completed.
#[derive(Debug)]
pub(super) struct Operation<'a, T> {
    pub(super) tag: T,
    /// How the I/O queue knows it.
    pub(super) id: OpId,
    /// Until the bytes are written.
    pub(super) change: Option<Change<'a>>,
    /// Bytes that it holds ([`Op::memory`]).
    pub(super) memory: usize,
    /// Whether they are bytes to read.
    pub(super) is_read: bool,
    pub(super) stage: OpStage<'a>,
}

/// The stage of an operation. All but the first and the last hold a visit.
#[derive(Debug)]
pub(super) enum OpStage<'a> {
    /// Waits for an earlier change, for a part in flight, or for the gate.
    Waiting(Op),
    /// The blocks that a write changes in part are read into the page cache, so that the write does not
    /// wait for the device.
    ReadingEdges { visit: Visit<'a>, write: Op, edges: VecDeque<Range> },
    /// The operation executes; `durable` if it has to be flushed afterwards.
    Executing { visit: Visit<'a>, durable: bool },
    /// A single write executes that is durable by itself.
    WritingDurably { visit: Visit<'a>, guard: FlushGuard<'a> },
    /// A single durable write has failed with this error. It executes again, not durable.
    WritingAgain { visit: Visit<'a>, guard: FlushGuard<'a>, error: io::Error },
    /// A part of a zeroing or trim executes since this time; the rest may be empty.
    Part { visit: Visit<'a>, rest: Op, since: Instant },
    /// To be made durable by the next commit; first this write has to be executed.
    Batched { visit: Visit<'a>, write: Option<(u64, Buffer)> },
    /// A flush executes, for these operations as well.
    Flushing { visit: Visit<'a>, guard: FlushGuard<'a>, members: Vec<u64> },
    /// The flush of another operation makes this one durable.
    Joined { visit: Visit<'a> },
    /// Flushed successfully; a concurrent flush may still report a failure that concerns it.
    Verifying { _visit: Visit<'a>, flushes: ConcurrentFlushes },
    /// Between two stages.
    Changing,
}

impl OpStage<'_> {
    pub(super) fn take(&mut self) -> Self {
        std::mem::replace(self, Self::Changing)
    }

    /// The operation, if it waits to start.
    pub(super) fn take_waiting(&mut self) -> Option<Op> {
        match self.take() {
            Self::Waiting(op) => Some(op),
            other => {
                *self = other;
                None
            }
        }
    }
}
