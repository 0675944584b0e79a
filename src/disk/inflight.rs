//! The in-flight operations of one session: asynchronous disk I/O, so that a slow request does not
//! delay the requests behind it. Starts nothing by itself, and holds a bounded number of bytes.
//!
//! An operation is one [`Work`] and the backend calls that it takes. It holds its visit until it
//! completes, so closing the gate waits for it. The bytes it changes are marked dirty after they are
//! written and before the completion is reported.
//!
//! A change that overlaps an earlier one in flight, of any session, waits for it in a queue, without
//! holding a visit. Zeroing and trimming run in parts ([`super::part_sizes`]); between two parts they
//! give up the visit if the gate is closed. Waiting operations are dropped with their session.
//!
//! Group commit: durable operations are batched until [`InFlight::submit`]. A single write uses
//! `RWF_DSYNC`, which does not flush unrelated data; two or more share one fsync.
//!
//! Where the backend provides no I/O queue, threads execute the same calls
//! (`disk/thread_pool`).

use super::backend::{errno_of, execute};
use super::detect_zeros;
use super::disk::{Disk, Visit};
use super::flush_errors::ConcurrentFlushes;
use super::io_queue::{Call, Completion, Notifier, Zeroing};
use super::overlap::Change;
use super::part_sizes::PartSizes;
use super::thread_pool::Completions;
use super::write_behind::WriteBehind;
use crate::range::Range;
use nix::errno::Errno;
use std::cell::Cell;
use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::sync::Arc;
use std::time::Instant;
pub use work::{BYTES_MAX, IN_FLIGHT_MAX, Work};
use work::{Batched, Executor, NextStep, Operation, Queued};

mod closing;
mod work;

/// The operations of one session. `T` is the caller's tag, returned with each outcome.
///
/// Dropping it drops the operations that wait, and blocks until those in flight complete; a zeroing
/// or trim ends after its current part. Their outcomes are lost.
#[derive(Debug)]
pub struct InFlight<'a, T> {
    disk: &'a Disk,
    notifier: Arc<dyn Notifier>,
    executor: Executor<'a>,
    /// Results of calls that threads execute.
    completions: Arc<Completions>,
    /// Calls given to threads whose completion has not been taken.
    in_threads: usize,
    next_key: u64,
    /// Not started, or between two parts; in order of arrival.
    waiting: VecDeque<Queued<'a, T>>,
    /// By the key of the call in flight.
    executing: BTreeMap<u64, Operation<'a, T>>,
    /// Parts of zeroings and trims in flight.
    parts: usize,
    part_sizes: PartSizes,
    write_behind: WriteBehind,
    /// Durable operations for the next commit.
    commit_batch: Vec<Batched<'a, T>>,
    /// Flushed successfully; a concurrent flush may still report a failure that concerns them.
    awaiting_verdict: Vec<(ConcurrentFlushes, Operation<'a, T>)>,
    completed: VecDeque<(T, io::Result<()>)>,
    /// Operations that have not completed.
    count: usize,
    /// Bytes of data that they hold.
    bytes: usize,
    /// When the closing of the gate expires, and the gate has to be tried again.
    gate_expiry: Cell<Option<Instant>>,
    /// The session is gone, so nothing more is started.
    closing: bool,
}

impl<'a, T> InFlight<'a, T> {
    /// No operations yet. `notifier` is notified when one may have completed.
    pub fn new(disk: &'a Disk, notifier: Arc<dyn Notifier>) -> Self {
        Self {
            disk,
            completions: Completions::new(&notifier),
            in_threads: 0,
            notifier,
            executor: Executor::Unknown,
            next_key: 0,
            waiting: VecDeque::new(),
            parts: 0,
            part_sizes: PartSizes::default(),
            write_behind: WriteBehind::default(),
            executing: BTreeMap::new(),
            commit_batch: Vec::new(),
            awaiting_verdict: Vec::new(),
            completed: VecDeque::new(),
            count: 0,
            bytes: 0,
            gate_expiry: Cell::new(None),
            closing: false,
        }
    }

    /// Whether all operations have completed and every outcome has been taken.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.count == 0 && self.completed.is_empty()
    }

    /// Whether all operations that started have completed and every outcome has been taken; others
    /// may still wait to start.
    #[must_use]
    pub fn is_quiescent(&self) -> bool {
        self.count == self.waiting.len() && self.completed.is_empty()
    }

    /// Whether an operation that holds this many bytes may begin.
    #[must_use]
    pub fn has_room(&self, bytes: usize) -> bool {
        let is_free = self.count + self.completed.len() < IN_FLIGHT_MAX;
        is_free && (self.bytes == 0 || self.bytes + bytes <= BYTES_MAX)
    }

    /// Whether operations wait for an earlier change, for a part in flight, or for the gate.
    #[must_use]
    pub fn has_waiting(&self) -> bool {
        !self.waiting.is_empty()
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
        self.disk.image.orders_writes()
    }

    /// Registers a change that the caller executes itself, once [`Change::is_first`].
    #[must_use]
    pub fn register_change(&self, range: Range) -> Change<'a> {
        self.disk.overlaps.register(range, &self.notifier)
    }

    /// Records a non-durable write that the session executed itself; may start write-back.
    pub fn record_write(&mut self, range: Range) {
        if let Some((start, end)) = self.write_behind.wrote(range) {
            let disk = self.disk;
            let span = Range::whole(disk.size()).from(start).until(end);
            if disk.threads.start_write_back(&disk.image, span) {
                self.write_behind.started();
            }
        }
    }

    /// Begins an operation. It starts at the latest with the next [`InFlight::submit`], or, if an
    /// earlier change overlaps it, once that has completed. The caller checks
    /// [`InFlight::has_room`] first.
    ///
    /// It fails with `EPERM` if it would change a read-only disk, with `EINVAL` beyond the end, with
    /// the error of the first failed flush if it is durable, or with the backend's error; then any
    /// part of the change may have been written.
    pub fn begin(&mut self, visit: Visit<'a>, work: Work, token: T) {
        let weight = if let Work::Write { data, .. } = &work { data.len() } else { 0 };
        self.count += 1;
        self.bytes += weight;
        let queued = match self.check(&work) {
            Ok(None) => Queued { token, work, change: None, weight },
            Ok(Some(range)) if range.is_empty() => return self.complete(token, weight, Ok(())),
            Ok(Some(range)) => {
                let change = Some(self.register_change(range));
                Queued { token, work, change, weight }
            }
            Err(error) => return self.complete(token, weight, Err(error)),
        };
        if self.may_start(&queued) {
            self.start(visit, queued);
        } else {
            self.waiting.push_back(queued);
        }
    }

    fn may_start(&self, queued: &Queued<'a, T>) -> bool {
        let how = match queued.work {
            Work::Zero { how, .. } => Some(how),
            Work::Trim { .. } => Some(Zeroing::default()),
            _ => None,
        };
        let by_extent = |how| self.disk.image.zeroes_by_extent(how);
        let parts_max = |how| self.part_sizes.in_flight_max(by_extent(how));
        let has_slot = how.is_none_or(|how| self.parts < parts_max(how));
        has_slot && queued.change.as_ref().is_none_or(Change::is_first)
    }

    /// Requests a notification when the gate opens.
    pub fn notify_when_gate_opens(&self) {
        self.gate_expiry.set(self.disk.gate.notify_when_open(&self.notifier));
    }

    /// When to submit again even without a notification, if
    /// [`InFlight::notify_when_gate_opens`] was called since the last call of this: the closing of
    /// the gate may expire then.
    #[must_use]
    pub fn gate_expiry(&self) -> Option<Instant> {
        self.gate_expiry.take()
    }

    /// Starts the waiting operations that may start now.
    fn start_waiting(&mut self) {
        let mut at = 0;
        while at < self.waiting.len() && !self.closing {
            if !self.may_start(&self.waiting[at]) {
                at += 1;
                continue;
            }
            match self.disk.enter_if_open() {
                Ok(Some(visit)) => {
                    if let Some(queued) = self.waiting.remove(at) {
                        self.start(visit, queued);
                    }
                }
                Ok(None) => return self.notify_when_gate_opens(),
                // The session finds out itself when it next enters the gate.
                Err(_) => return,
            }
        }
    }

    /// Starts and commits everything that has begun. Notifies if some of it completed synchronously.
    pub fn submit(&mut self) {
        self.start_waiting();
        self.commit();
        if let Executor::Queue(queue) = &mut self.executor
            && !queue.submit()
        {
            self.notifier.notify();
        }
    }

    /// The next completed operation: the tag given to [`InFlight::begin`], and the outcome.
    pub fn next_completed(&mut self) -> Option<(T, io::Result<()>)> {
        if self.is_empty() {
            return None;
        }
        while let Some(completion) = self.next_completion() {
            self.on_completion(completion);
        }
        self.complete_verified();
        self.completed.pop_front()
    }

    /// The next completed call.
    fn next_completion(&mut self) -> Option<Completion> {
        if self.in_threads > 0
            && let Some(completion) = self.completions.pop()
        {
            self.in_threads -= 1;
            return Some(completion);
        }
        match &mut self.executor {
            Executor::Queue(queue) if self.executing.len() > self.in_threads => queue.poll(),
            _ => None,
        }
    }

    /// Whether an outcome waits to be taken; there may be no further notification for it.
    #[must_use]
    pub fn has_completed(&self) -> bool {
        !self.completed.is_empty()
    }

    /// Frees the I/O queue if nothing is in flight; the next call creates a new one.
    pub fn shrink(&mut self) {
        if self.is_empty() {
            self.executor = Executor::Unknown;
        }
    }

    /// Whether there is no I/O queue to free.
    #[must_use]
    pub fn is_shrunk(&self) -> bool {
        !matches!(self.executor, Executor::Queue(_))
    }

    /// Validates an operation. Returns the range it changes, `None` if it changes nothing, and an
    /// empty range if there is nothing to do.
    fn check(&self, work: &Work) -> io::Result<Option<Range>> {
        let disk = self.disk;
        let within = |range: &Range| disk.range(range.offset(), range.length());
        let (range, durable) = match work {
            Work::Flush => return disk.flush_errors.check().map(|()| None),
            Work::Populate(range) | Work::Prefetch(range) => {
                let range = within(range)?;
                return Ok(range.is_empty().then_some(range));
            }
            Work::Write { offset, data, durable } => {
                (disk.range(*offset, data.len() as u64)?, *durable)
            }
            Work::Zero { range, durable, .. } | Work::Trim { range, durable } => {
                (within(range)?, *durable)
            }
        };
        if disk.read_only {
            return Err(Errno::EPERM.into());
        }
        if durable {
            disk.flush_errors.check()?;
        }
        Ok(Some(range))
    }

    fn start(&mut self, visit: Visit<'a>, queued: Queued<'a, T>) {
        let Queued { token, work, change, weight } = queued;
        let (next_step, flush_guard, members) = (NextStep::Nothing, None, Vec::new());
        let operation = Operation { token, visit, change, next_step, flush_guard, members, weight };
        match work {
            Work::Populate(range) => self.call(operation, Call::Populate(range)),
            Work::Prefetch(range) => self.call(operation, Call::Prefetch(range)),
            Work::Flush => self.commit_batch.push(Batched { operation, write: None }),
            Work::Zero { range, how, durable } => {
                let (part, range) = self.split_next(range, how);
                // The first part decides whether it can be fast, before any byte has changed.
                let later = Zeroing { only_if_fast: false, ..how };
                let rest = Work::Zero { range, how: later, durable };
                self.call_part(operation, Call::Zero(part, how), rest);
            }
            Work::Trim { range, durable } => {
                let (part, range) = self.split_next(range, Zeroing::default());
                self.call_part(operation, Call::Trim(part), Work::Trim { range, durable });
            }
            Work::Write { offset, data, durable } => {
                self.start_write(operation, offset, data, durable);
            }
        }
    }

    fn split_next(&self, range: Range, how: Zeroing) -> (Range, Range) {
        self.part_sizes.split_next(range, self.disk.image.zeroes_by_extent(how))
    }

    fn call_part(&mut self, mut operation: Operation<'a, T>, call: Call, rest: Work) {
        self.parts += 1;
        operation.next_step = NextStep::Rest { rest, since: Instant::now() };
        self.call(operation, call);
    }

    fn start_write(
        &mut self,
        mut operation: Operation<'a, T>,
        offset: u64,
        data: Vec<u8>,
        durable: bool,
    ) {
        let range = Range::whole(self.disk.size()).from(offset).split(data.len() as u64).0;
        let image = &*self.disk.image;
        let gaps =
            match durable.then(|| detect_zeros::leaves_gaps(image, offset, &data)).transpose() {
                Ok(gaps) => gaps,
                Err(error) => return self.finish(operation, Err(error)),
            };
        if let Some(edges) = operation.visit.cold_edges(range) {
            operation.next_step = NextStep::Write { offset, data, durable };
            self.call(operation, Call::Populate(edges));
        } else if gaps == Some(false) {
            self.commit_batch.push(Batched { operation, write: Some((offset, data)) });
        } else {
            self.write(operation, offset, &data, durable);
        }
    }

    /// Writes to the page cache, without waiting for the device.
    fn write(&mut self, mut operation: Operation<'a, T>, offset: u64, data: &[u8], durable: bool) {
        let written = detect_zeros::write_around_holes(&*self.disk.image, offset, data);
        self.mark(&mut operation);
        match written {
            Ok(()) if durable => self.commit_batch.push(Batched { operation, write: None }),
            outcome => {
                let length = data.len() as u64;
                self.record_write(Range::whole(self.disk.size()).from(offset).split(length).0);
                self.finish(operation, outcome);
            }
        }
    }

    /// Makes the batched operations durable.
    fn commit(&mut self) {
        let mut commit_batch = std::mem::take(&mut self.commit_batch);
        if let [Batched { write: Some(_), .. }] = commit_batch[..]
            && let Some(Batched { operation, write: Some((offset, data)) }) = commit_batch.pop()
        {
            return self.call(operation, Call::Write { offset, data });
        }
        let mut written = Vec::new();
        for Batched { mut operation, write } in commit_batch {
            let outcome = write.map_or(Ok(()), |(offset, data)| {
                let outcome = self.disk.image.write(offset, &data, false);
                self.mark(&mut operation);
                outcome
            });
            match outcome {
                Ok(()) => written.push(operation),
                Err(error) => self.finish(operation, Err(error)),
            }
        }
        if let Some(mut operation) = written.pop() {
            operation.members = written;
            self.call(operation, Call::Flush);
        }
    }

    /// Starts a call, asynchronously if possible.
    fn call(&mut self, mut operation: Operation<'a, T>, call: Call) {
        if matches!(call, Call::Flush | Call::Write { .. }) {
            operation.flush_guard = Some(self.disk.flush_errors.begin_flush());
        }
        if matches!(self.executor, Executor::Unknown) {
            self.executor = match self.disk.image.queue(self.notifier.as_eventfd()) {
                Some(queue) => Executor::Queue(queue),
                None => Executor::Threads,
            };
        }
        let key = self.next_key;
        self.next_key += 1;
        self.executing.insert(key, operation);
        let declined = match &mut self.executor {
            Executor::Queue(queue) => queue.push(key, call).err(),
            _ => Some(call),
        };
        if let Some(call) = declined {
            self.call_in_thread(key, call);
        }
    }

    /// Gives a call that the I/O queue declined to a thread, or executes it here if there is no
    /// thread. Populating is skipped: a later read waits instead.
    fn call_in_thread(&mut self, key: u64, call: Call) {
        let image = &self.disk.image;
        let declined = match call {
            Call::Populate(_) => Err(call),
            call => self.disk.threads.execute(image, (key, call), &self.completions),
        };
        match declined {
            Ok(()) => self.in_threads += 1,
            Err(call) => {
                let outcome = Some(execute(&**image, &call));
                let completion = Completion { key, call, outcome };
                match completion.call {
                    Call::Populate(_) => return self.on_completion(completion),
                    // Completes through the queue, not recursively, so that the session can do other
                    // work between two parts.
                    _ => self.completions.push(completion),
                }
                self.in_threads += 1;
            }
        }
    }

    /// Continues an operation after one of its calls.
    fn on_completion(&mut self, completion: Completion) {
        let Completion { key, call, outcome } = completion;
        let Some(outcome) = outcome else { return self.call_in_thread(key, call) };
        let Some(mut operation) = self.executing.remove(&key) else { return };
        match (call, outcome) {
            (Call::Populate(_) | Call::Prefetch(_), outcome) => {
                self.on_populated(operation, outcome);
            }
            (Call::Flush, Ok(())) => {
                self.write_behind.started();
                self.on_durable(operation);
            }
            (Call::Flush, Err(error)) => self.fail_durable(operation, &error),
            (Call::Write { .. }, Ok(())) => {
                self.mark(&mut operation);
                self.on_durable(operation);
            }
            // The error may be of the write or of the flush. A plain write tells which: if it
            // succeeds, durability failed.
            (Call::Write { offset, data }, Err(error)) => {
                let written = self.disk.image.write(offset, &data, false);
                self.mark(&mut operation);
                match written {
                    Ok(()) => self.fail_durable(operation, &error),
                    Err(error) => self.finish(operation, Err(error)),
                }
            }
            (Call::Zero(part, _) | Call::Trim(part), outcome) => {
                self.on_part_completed(operation, part, outcome);
            }
        }
    }

    /// Continues after a part of a zeroing or trim.
    fn on_part_completed(
        &mut self,
        mut operation: Operation<'a, T>,
        part: Range,
        outcome: io::Result<()>,
    ) {
        self.parts -= 1;
        self.disk.mark(part);
        let next_step = std::mem::replace(&mut operation.next_step, NextStep::Nothing);
        let (Ok(()), NextStep::Rest { rest, since }) = (&outcome, next_step) else {
            return self.finish(operation, outcome);
        };
        self.part_sizes.record(part.length(), since.elapsed());
        let (Work::Zero { range, durable, .. } | Work::Trim { range, durable }) = &rest else {
            return self.finish(operation, outcome);
        };
        if range.is_empty() {
            operation.change = None;
            if *durable {
                self.commit_batch.push(Batched { operation, write: None });
            } else {
                self.finish(operation, Ok(()));
            }
        } else if self.closing {
            self.finish(operation, Ok(()));
        } else {
            let Operation { token, visit, change, weight, .. } = operation;
            let queued = Queued { token, work: rest, change, weight };
            if self.disk.gate.is_open() && self.may_start(&queued) {
                self.start(visit, queued);
            } else {
                // Leave the gate, so that closing it does not wait for the rest.
                drop(visit);
                self.waiting.push_front(queued);
            }
        }
    }

    /// Continues with the write that needed its edges populated.
    fn on_populated(&mut self, mut operation: Operation<'a, T>, outcome: io::Result<()>) {
        match std::mem::replace(&mut operation.next_step, NextStep::Nothing) {
            NextStep::Write { offset, data, durable } if !self.closing => {
                self.write(operation, offset, &data, durable);
            }
            _ => self.finish(operation, outcome),
        }
    }

    /// Completes a durable operation after its fsync succeeded, once every concurrent fsync has
    /// reported: the kernel may report a failure to one of them only.
    fn on_durable(&mut self, mut operation: Operation<'a, T>) {
        operation.flush_guard = None;
        match self.disk.flush_errors.notify_after_concurrent(&self.notifier) {
            None => self.finish(operation, self.disk.flush_errors.check()),
            Some(others) => self.awaiting_verdict.push((others, operation)),
        }
    }

    /// Completes flushed operations whose concurrent flushes have all reported.
    fn complete_verified(&mut self) {
        let flush_errors = &self.disk.flush_errors;
        let mut at = 0;
        while at < self.awaiting_verdict.len() {
            if flush_errors.have_ended(self.awaiting_verdict[at].0) {
                let (_, operation) = self.awaiting_verdict.swap_remove(at);
                self.finish(operation, flush_errors.check());
            } else {
                at += 1;
            }
        }
    }

    /// Fails an operation whose data may not be durable, and every later durable one.
    fn fail_durable(&mut self, operation: Operation<'a, T>, error: &io::Error) {
        let first = self.disk.flush_errors.record(error);
        self.finish(operation, Err(first));
    }

    fn finish(&mut self, operation: Operation<'a, T>, outcome: io::Result<()>) {
        let errno = outcome.as_ref().err().map(errno_of);
        for member in operation.members {
            let outcome = errno.map_or(Ok(()), |errno| Err(io::Error::from_raw_os_error(errno)));
            self.finish(member, outcome);
        }
        self.complete(operation.token, operation.weight, outcome);
    }

    fn complete(&mut self, token: T, weight: usize, outcome: io::Result<()>) {
        self.count -= 1;
        self.bytes -= weight;
        self.completed.push_back((token, outcome));
    }

    /// Marks the changed range dirty, even after a partial write. Call it after writing: the copier
    /// takes the mark first and reads second, so it may send a change twice but never misses one.
    fn mark(&self, operation: &mut Operation<'a, T>) {
        if let Some(change) = operation.change.take() {
            self.disk.mark(change.range());
        }
    }
}

#[cfg(test)]
mod overlap_tests;
#[cfg(test)]
mod tests;
