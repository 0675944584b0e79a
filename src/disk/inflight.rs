//! The in-flight operations of one session: asynchronous disk I/O, so that a slow request does not
//! delay the requests behind it. Starts nothing by itself, and holds a bounded number of bytes.
//!
//! An operation goes through stages (`inflight/stage`), and holds its visit from its start until it completes,
//! so closing the gate waits for it. The bytes it changes are marked dirty after they are written and
//! before the completion is reported. Three things are decided here:
//!
//! * Overlap: a change that overlaps an earlier one in flight, of any session, waits for it, without
//!   holding a visit (`disk/overlap`). Zeroing and trimming run in parts ([`super::part_sizes`]);
//!   between two parts they give up the visit if the gate is closed. Waiting operations are dropped
//!   with their session.
//! * Budget: a session holds at most [`IN_FLIGHT_MAX`] operations, [`BYTES_MAX`] bytes of writes and
//!   [`READ_BYTES_MAX`] bytes of reads.
//! * Group commit: durable operations are batched until [`InFlight::submit`]. A single write uses
//!   `RWF_DSYNC`, which does not flush unrelated data; two or more share one fsync.
//!
//! Where the backend provides no I/O queue, or that declines an operation, threads execute it
//! (`disk/thread_pool`).

use super::backend::Backend;
use super::blocking::execute;
use super::buffer::Buffer;
use super::detect_zeros;
use super::disk::{Disk, Visit};
use super::io_queue::{Completion, Notifier, OpId};
#[cfg(test)]
use super::mutation::{self, Mutation};
use super::op::{Op, Returned};
use super::overlap::Change;
use super::part_sizes::PartSizes;
use super::thread_pool::Completions;
use super::write_behind::WriteBehind;
use crate::range::Range;
use nix::errno::Errno;
use stage::{OpQueue, OpStage, Operation};
use std::cell::Cell;
use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Instant;

mod budget;
mod closing;
mod commit;
mod parts;
#[cfg(test)]
pub(crate) mod simulation;
mod stage;
mod tag;

pub use tag::OpTag;

/// Most operations of one session in flight.
pub const IN_FLIGHT_MAX: usize = 128;
/// Most bytes of data that they hold to write; a single operation may hold more.
pub const BYTES_MAX: usize = 2 << 20;
/// Most bytes of data and of extents that they read; a single operation may read more. Enough to keep a device with a
/// latency of 10 ms busy at 800 MB/s.
pub const READ_BYTES_MAX: usize = 8 << 20;

/// The operations of one session. `T` is the caller's tag, returned with each outcome.
///
/// Dropping it drops the operations that wait, and blocks until those that execute complete; a zeroing
/// or trim ends after its current part. Their outcomes are lost.
#[derive(Debug)]
pub struct InFlight<'a, T> {
    disk: &'a Disk,
    notifier: Arc<dyn Notifier>,
    queue: OpQueue<'a>,
    /// The image of that queue.
    queue_image: Option<&'a Arc<dyn Backend>>,
    /// Results of operations that threads execute.
    completions: Arc<Completions>,
    /// Every operation that has not completed, in order of arrival.
    operations: BTreeMap<u64, Operation<'a, T>>,
    next_key: u64,
    /// Operations in [`OpStage::Waiting`].
    waiting: usize,
    /// Operations in the queue or with a thread.
    executing: usize,
    /// Those of them with a thread.
    in_threads: usize,
    /// Operations in [`OpStage::Batched`], in the order in which they got there.
    commit_batch: Vec<u64>,
    /// Operations in [`OpStage::Verifying`].
    verifying: Vec<u64>,
    /// Operations in [`OpStage::Part`].
    parts: usize,
    part_sizes: PartSizes,
    write_behind: WriteBehind,
    completed: VecDeque<(T, io::Result<Returned>)>,
    /// Bytes of data that the operations hold to write.
    bytes: usize,
    /// Bytes of data that they read.
    read_bytes: usize,
    /// When the closing of the gate expires, and the gate has to be tried again.
    gate_expiry: Cell<Option<Instant>>,
    /// The session is gone, so nothing more is started.
    closing: bool,
    /// Measures how long parts take.
    clock: fn() -> Instant,
}

impl<'a, T: OpTag> InFlight<'a, T> {
    /// Begins an operation. It starts at the latest with the next [`InFlight::submit`], or, if an
    /// earlier change overlaps it, once that has completed. The caller checks
    /// [`InFlight::has_room`] or [`InFlight::has_room_to_read`] first.
    ///
    /// It fails with `EPERM` if it would change a read-only disk, with `EINVAL` beyond the end, with
    /// the error of the first failed flush if it is durable, or with the backend's error; then any
    /// part of the change may have been written.
    pub fn begin(&mut self, visit: Visit<'a>, op: Op, tag: T) {
        self.insert(Some(visit), op, tag);
    }

    /// Begins an operation without a visit, as [`InFlight::begin`] does: it starts once the gate is open.
    pub fn begin_when_open(&mut self, op: Op, tag: T) {
        self.insert(None, op, tag);
    }

    fn insert(&mut self, visit: Option<Visit<'a>>, op: Op, tag: T) {
        let outcome = match self.check(&op) {
            Ok(Some(range)) if range.is_empty() => Ok(Returned::Success),
            Ok(range) => {
                let changed = range.filter(|_| op.changes());
                let change = changed.map(|range| self.register_change(range));
                let memory = op.memory();
                let may_start = self.may_start(&op, change.as_ref());
                let key = self.next_key;
                self.next_key += 1;
                let is_read = !op.changes();
                *self.bytes_held(is_read) += memory;
                self.waiting += 1;
                let stage = OpStage::Waiting(op);
                let id = OpId { key, cookie: tag.cookie() };
                let operation = Operation { tag, id, change, memory, is_read, stage };
                self.operations.insert(key, operation);
                if let Some(visit) = visit.filter(|_| may_start) {
                    self.start(visit, key);
                }
                return;
            }
            Err(error) => Err(error),
        };
        self.completed.push_back((tag, outcome));
    }
}

impl<'a, T> InFlight<'a, T> {
    /// No operations yet. `notifier` is notified when one may have completed; `clock` measures how long
    /// the disk takes.
    pub fn new(disk: &'a Disk, notifier: Arc<dyn Notifier>, clock: fn() -> Instant) -> Self {
        Self {
            disk,
            completions: Completions::new(&notifier),
            notifier,
            queue: OpQueue::Unknown,
            queue_image: None,
            operations: BTreeMap::new(),
            next_key: 0,
            waiting: 0,
            executing: 0,
            in_threads: 0,
            commit_batch: Vec::new(),
            verifying: Vec::new(),
            parts: 0,
            part_sizes: PartSizes::default(),
            write_behind: WriteBehind::default(),
            completed: VecDeque::new(),
            bytes: 0,
            read_bytes: 0,
            gate_expiry: Cell::new(None),
            closing: false,
            clock,
        }
    }

    /// Whether all operations have completed and every outcome has been taken.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.operations.is_empty() && self.completed.is_empty()
    }

    /// Whether operations wait for an earlier change, for a part in flight, or for the gate.
    #[must_use]
    pub fn has_waiting(&self) -> bool {
        self.waiting > 0
    }

    /// Whether no change in flight on the disk overlaps `range`, so that a change of it may start.
    #[must_use]
    pub fn is_clear(&self, range: Range) -> bool {
        self.disk.overlaps.is_clear(range)
    }

    /// Whether the backend orders writes of the same bytes ([`super::Backend::orders_writes`]), so
    /// that a plain write need not be registered.
    #[must_use]
    pub fn writes_are_ordered(&self) -> bool {
        self.disk.image().orders_writes()
    }

    /// Registers a change that the caller executes itself, once [`Change::is_first`]. Changes of the same
    /// unit of the device ([`super::Backend::unit`]) overlap.
    #[must_use]
    pub fn register_change(&self, range: Range) -> Change<'a> {
        let units = range.aligned_around(self.disk.unit(), self.disk.size());
        self.disk.overlaps.register(units, &self.notifier)
    }

    /// Records a non-durable write that the session executed itself; may start write-back.
    pub fn record_write(&mut self, range: Range) {
        if let Some((start, end)) = self.write_behind.wrote(range) {
            let disk = self.disk;
            let span = Range::whole(disk.size()).from(start).until(end);
            if disk.threads.start_write_back(disk.image(), span) {
                self.write_behind.started();
            }
        }
    }

    /// Validates an operation, and returns its range.
    fn check(&self, op: &Op) -> io::Result<Option<Range>> {
        let disk = self.disk;
        let range = op.range(disk.size())?;
        if op.changes() && disk.read_only {
            return Err(Errno::EPERM.into());
        }
        if op.is_durable() {
            disk.flush_errors.check()?;
        }
        Ok(range)
    }

    fn may_start(&self, op: &Op, change: Option<&Change<'a>>) -> bool {
        #[cfg(test)]
        if mutation::is_active(Mutation::StartOverlapping) {
            return true;
        }
        let parts_max = || self.part_sizes.in_flight_max(self.disk.image().works_by_extent(op));
        let has_slot = !op.is_divisible() || self.parts < parts_max();
        has_slot && change.is_none_or(Change::is_first)
    }

    /// Requests a notification when the gate opens.
    pub fn notify_when_gate_opens(&self) {
        #[cfg(test)]
        if mutation::is_active(Mutation::MissGate) {
            return;
        }
        self.gate_expiry.set(self.disk.gate.notify_when_open(&self.notifier));
    }

    /// When to submit again even without a notification, if
    /// [`InFlight::notify_when_gate_opens`] was called since the last call of this: the closing of
    /// the gate may expire then.
    #[must_use]
    pub fn gate_expiry(&self) -> Option<Instant> {
        self.gate_expiry.take()
    }

    /// Starts and commits everything that has begun. Notifies if some of it completed synchronously.
    pub fn submit(&mut self) {
        self.start_waiting();
        self.commit();
        if let OpQueue::Of(queue) = &mut self.queue
            && !queue.submit()
        {
            self.notifier.notify();
        }
    }

    /// Starts the waiting operations that may start now.
    fn start_waiting(&mut self) {
        let mut next = 0;
        while self.waiting > 0 && !self.closing {
            let mut later = self.operations.range(next..);
            let found = later.find(|(_, operation)| match &operation.stage {
                OpStage::Waiting(op) => self.may_start(op, operation.change.as_ref()),
                _ => false,
            });
            let Some((&key, _)) = found else { return };
            match self.disk.enter_if_open() {
                Ok(Some(visit)) => self.start(visit, key),
                Ok(None) => return self.notify_when_gate_opens(),
                // The session finds out when it next enters the gate, which may be the only thing left.
                Err(_) => return self.notifier.notify(),
            }
            next = key + 1;
        }
    }

    /// The next completed operation: the tag given to [`InFlight::begin`], and the outcome.
    pub fn next_completed(&mut self) -> Option<(T, io::Result<Returned>)> {
        if self.is_empty() {
            return None;
        }
        while let Some(completion) = self.next_completion() {
            self.on_completion(completion);
        }
        self.complete_verified();
        self.completed.pop_front()
    }

    fn next_completion(&mut self) -> Option<Completion> {
        if self.in_threads > 0
            && let Some(completion) = self.completions.pop()
        {
            self.in_threads -= 1;
            self.executing -= 1;
            return Some(completion);
        }
        match &mut self.queue {
            OpQueue::Of(queue) if self.executing > self.in_threads => {
                let completion = queue.poll()?;
                self.executing -= 1;
                Some(completion)
            }
            _ => None,
        }
    }

    /// Whether an outcome waits to be taken; there may be no further notification for it.
    #[must_use]
    pub fn has_completed(&self) -> bool {
        !self.completed.is_empty()
    }

    /// A descriptor to wait for as for the notifier: when it is readable, an operation may have completed.
    pub fn descriptor(&mut self) -> Option<BorrowedFd<'_>> {
        match &mut self.queue {
            OpQueue::Of(queue) if self.executing > self.in_threads => queue.descriptor(),
            _ => None,
        }
    }

    /// Frees the I/O queue and the spare buffers if nothing is in flight; the next operation creates new
    /// ones.
    pub fn shrink(&mut self) {
        if self.is_empty() {
            self.queue = OpQueue::Unknown;
            Buffer::free_spares();
        }
    }

    /// Whether there is neither an I/O queue nor a spare buffer to free.
    #[must_use]
    pub fn is_shrunk(&self) -> bool {
        !matches!(self.queue, OpQueue::Of(_)) && !Buffer::has_spares()
    }

    /// Starts a waiting operation.
    fn start(&mut self, visit: Visit<'a>, key: u64) {
        let Some(operation) = self.operations.get_mut(&key) else { return };
        let Some(op) = operation.stage.take_waiting() else { return };
        self.waiting -= 1;
        match op {
            Op::Flush => self.batch(visit, key, None),
            op if op.is_divisible() => self.start_part(visit, key, op),
            Op::Write { offset, data, durable } => {
                self.start_write(visit, key, offset, data, durable);
            }
            op => {
                let durable = op.is_durable();
                self.execute(key, op, OpStage::Executing { visit, durable });
            }
        }
    }

    fn start_write(
        &mut self,
        visit: Visit<'a>,
        key: u64,
        offset: u64,
        data: Buffer,
        durable: bool,
    ) {
        let (image, cached) = (&**self.disk.image(), self.disk.has_page_cache());
        let gaps = (durable || !cached)
            .then(|| detect_zeros::leaves_gaps(image, offset, &data))
            .transpose();
        let gaps = match gaps {
            Ok(gaps) => gaps,
            Err(error) => return self.finish(key, Err(error)),
        };
        let range = Range::whole(self.disk.size()).from(offset).split(data.len() as u64).0;
        let edges: VecDeque<Range> = self.disk.cold_edges(range).collect();
        if !edges.is_empty() {
            let write = Op::Write { offset, data, durable };
            self.read_edges(visit, key, write, edges);
        } else if !cached {
            self.write_uncached(
                visit,
                key,
                Op::Write { offset, data, durable },
                gaps == Some(true),
            );
        } else if gaps == Some(false) {
            self.batch(visit, key, Some((offset, data)));
        } else {
            self.write(visit, key, offset, &data, durable);
        }
    }

    /// Reads the next block that a write changes in part, or writes if there is none. A failure shows
    /// when the block is written.
    fn read_edges(&mut self, visit: Visit<'a>, key: u64, write: Op, mut edges: VecDeque<Range>) {
        let Some(edge) = edges.pop_front() else {
            if let Op::Write { offset, data, durable } = write {
                self.write(visit, key, offset, &data, durable);
            }
            return;
        };
        // Fits: one block.
        match Buffer::zeroed(edge.length() as usize, 1) {
            Ok(data) => {
                let read = Op::Read { offset: edge.offset(), data };
                self.execute(key, read, OpStage::ReadingEdges { visit, write, edges });
            }
            Err(error) => self.finish(key, Err(error)),
        }
    }

    /// Writes to the page cache, without waiting for the device.
    fn write(&mut self, visit: Visit<'a>, key: u64, offset: u64, data: &[u8], durable: bool) {
        let written = detect_zeros::write_around_holes(&**self.disk.image(), offset, data);
        self.mark(key);
        match written {
            Ok(()) if durable => self.batch(visit, key, None),
            outcome => {
                let length = data.len() as u64;
                self.record_write(Range::whole(self.disk.size()).from(offset).split(length).0);
                self.finish(key, outcome);
            }
        }
    }

    /// Writes without a page cache. A thread leaves out zeros in holes, which takes several calls.
    fn write_uncached(&mut self, visit: Visit<'a>, key: u64, mut write: Op, gaps: bool) {
        if let Op::Write { durable, .. } = &mut write
            && gaps
        {
            let stage = OpStage::Executing { visit, durable: std::mem::take(durable) };
            self.set_stage(key, stage);
            self.executing += 1;
            return self.execute_in_thread(key, write);
        }
        let stage = if write.is_durable() {
            OpStage::WritingDurably { visit, guard: self.disk.flush_errors.begin_flush() }
        } else {
            OpStage::Executing { visit, durable: false }
        };
        self.execute(key, write, stage);
    }

    fn set_stage(&mut self, key: u64, stage: OpStage<'a>) {
        if let Some(operation) = self.operations.get_mut(&key) {
            operation.stage = stage;
        }
    }

    /// Gives an operation to the I/O queue, or to a thread if that declines.
    fn execute(&mut self, key: u64, op: Op, stage: OpStage<'a>) {
        let Some(operation) = self.operations.get_mut(&key) else { return };
        operation.stage = stage;
        let id = operation.id;
        self.executing += 1;
        let image = self.disk.image();
        // No operation is in the queue of an earlier image: it would have kept the gate from closing.
        if !self.queue_image.is_some_and(|of| Arc::ptr_eq(of, image)) {
            self.queue = OpQueue::Unknown;
        }
        if matches!(self.queue, OpQueue::Unknown) {
            self.queue_image = Some(image);
            self.queue = match self.disk.image().queue(self.notifier.as_eventfd()) {
                Some(queue) => OpQueue::Of(queue),
                None => OpQueue::None,
            };
        }
        let declined = match &mut self.queue {
            OpQueue::Of(queue) => queue.push(id, op).err(),
            _ => Some(op),
        };
        if let Some(op) = declined {
            self.execute_in_thread(key, op);
        }
    }

    /// Gives an operation to a thread, or executes it here if there is none.
    fn execute_in_thread(&mut self, key: u64, op: Op) {
        let image = self.disk.image();
        self.in_threads += 1;
        if let Err(mut op) = self.disk.threads.execute(image, (key, op), &self.completions) {
            let outcome = Some(execute(&**image, &mut op));
            // Completes through the queue, not recursively, so that the session can do other work
            // between two parts.
            self.completions.push(Completion { key, op, outcome });
        }
    }

    /// Continues an operation after the queue or a thread has executed it, or a part of it.
    fn on_completion(&mut self, completion: Completion) {
        let Completion { key, op, outcome } = completion;
        let Some(outcome) = outcome else {
            self.executing += 1;
            return self.execute_in_thread(key, op);
        };
        #[cfg(test)]
        if key % 8 == 7 && mutation::is_active(Mutation::LoseCompletion) {
            return;
        }
        let Some(operation) = self.operations.get_mut(&key) else { return };
        match operation.stage.take() {
            OpStage::ReadingEdges { visit, write, edges } if !self.closing => {
                self.read_edges(visit, key, write, edges);
            }
            OpStage::Executing { visit, durable } => {
                self.mark(key);
                if durable && outcome.is_ok() {
                    return self.batch(visit, key, None);
                }
                self.finish_with(key, outcome.map(|()| op.into_returned()));
            }
            OpStage::WritingDurably { visit, guard } => {
                self.on_written_durably(visit, key, op, outcome, guard);
            }
            OpStage::WritingAgain { visit, guard, error } => {
                self.on_written_again(visit, key, &error, outcome, guard);
            }
            OpStage::Part { visit, rest, since } => {
                self.on_part_completed(visit, key, (op, rest), since, outcome);
            }
            OpStage::Flushing { visit, guard, members } => {
                self.on_flushed(visit, key, members, outcome, guard);
            }
            // Nothing that waits has been executed.
            _ => self.finish(key, outcome),
        }
    }

    fn finish(&mut self, key: u64, outcome: io::Result<()>) {
        self.finish_with(key, outcome.map(|()| Returned::Success));
    }

    fn finish_with(&mut self, key: u64, outcome: io::Result<Returned>) {
        if let Some(Operation { tag, memory, is_read, .. }) = self.operations.remove(&key) {
            *self.bytes_held(is_read) -= memory;
            self.completed.push_back((tag, outcome));
            #[cfg(test)]
            if mutation::is_active(Mutation::KeepVisit) {
                std::mem::forget(self.disk.enter_if_open());
            }
        }
    }

    /// Marks the changed range dirty, even after a partial write. Call it after writing: the copier
    /// takes the mark first and reads second, so it may send a change twice but never misses one.
    fn mark(&mut self, key: u64) {
        let change = self.operations.get_mut(&key).and_then(|operation| operation.change.take());
        #[cfg(test)]
        let change = change.filter(|_| !mutation::is_active(Mutation::ForgetMark));
        if let Some(change) = change {
            self.disk.mark(change.range());
        }
    }
}

#[cfg(test)]
mod overlap_tests;
#[cfg(test)]
mod tests;
