//! What one session has done aside on the disk, so that the requests behind it need not wait.
//!
//! An errand is one piece of [`Work`] and the calls that it takes. Until it is over it holds the
//! visit that it was begun with: whoever closes the gate waits for it. What it changes is marked
//! when the bytes are there, before anybody is told.
//!
//! A change that overlaps an earlier one in flight, of whichever session, waits for it in a queue,
//! and holds no visit meanwhile. A zeroing or trim is made in parts ([`super::parts`]), and gives
//! its visit up between two of them when the gate is closed. What waits is dropped with its session.
//!
//! What is to be durable is gathered until [`InFlight::submit`]: one write is then made durable by
//! itself, which leaves alone what others wrote; several things are written, and made durable by one
//! flush.
//!
//! Where the image has no lane, or none can be had, threads make the same calls (`helpers`). Never
//! begins anything by itself, and holds a bounded number of bytes.

use super::backend::{errno_of, execute};
use super::device::{Disk, Visit};
use super::flush_errors::ConcurrentFlushes;
use super::io_queue::{Call, Completion, Notifier, Zeroing};
use super::overlap::Change;
use super::parts::PartSizes;
use super::thread_pool::Completions;
use super::write_behind::WriteBehind;
use super::zeros;
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

/// The errands of one session. `T` is what it wants back with the outcome of each.
///
/// Dropping them drops those that wait, and waits for those that have begun, which end after the
/// part that they are at; what became of them is then not told.
#[derive(Debug)]
pub struct InFlight<'a, T> {
    disk: &'a Disk,
    notifier: Arc<dyn Notifier>,
    lane: Executor<'a>,
    /// Where the results of threads come in, and how many are to come.
    completions: Arc<Completions>,
    helped: usize,
    next_key: u64,
    /// In the order of their arrival: not begun, or between two parts.
    waiting: VecDeque<Queued<'a, T>>,
    under_way: BTreeMap<u64, Operation<'a, T>>,
    /// How many parts of zeroings and trims are in flight, and how they are cut.
    parts: usize,
    part_sizes: PartSizes,
    write_behind: WriteBehind,
    /// What is to be made durable next.
    gathered: Vec<Batched<'a, T>>,
    /// Flushed, while others may still be hearing that it was in vain.
    unsettled: Vec<(ConcurrentFlushes, Operation<'a, T>)>,
    over: VecDeque<(T, io::Result<()>)>,
    /// Those that are not over, and the bytes that they hold.
    count: usize,
    bytes: usize,
    /// When to ask at the closed gate again.
    gate_expiry: Cell<Option<Instant>>,
    /// Nothing more is begun: whoever wanted it has gone.
    closing: bool,
}

impl<'a, T> InFlight<'a, T> {
    /// None yet. `bell` rings when something may be over.
    pub fn new(disk: &'a Disk, notifier: Arc<dyn Notifier>) -> Self {
        Self {
            disk,
            completions: Completions::new(&notifier),
            helped: 0,
            notifier,
            lane: Executor::Unknown,
            next_key: 0,
            waiting: VecDeque::new(),
            parts: 0,
            part_sizes: PartSizes::default(),
            write_behind: WriteBehind::default(),
            under_way: BTreeMap::new(),
            gathered: Vec::new(),
            unsettled: Vec::new(),
            over: VecDeque::new(),
            count: 0,
            bytes: 0,
            gate_expiry: Cell::new(None),
            closing: false,
        }
    }

    /// Whether none is under way, and the outcome of each has been taken.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.count == 0 && self.over.is_empty()
    }

    /// Whether none has begun that is not over, and the outcome of each has been taken; some may
    /// wait for other sessions' changes.
    #[must_use]
    pub fn is_quiescent(&self) -> bool {
        self.count == self.waiting.len() && self.over.is_empty()
    }

    /// Whether one may be begun that holds so many bytes.
    #[must_use]
    pub fn has_room(&self, bytes: usize) -> bool {
        let is_free = self.count + self.over.len() < IN_FLIGHT_MAX;
        is_free && (self.bytes == 0 || self.bytes + bytes <= BYTES_MAX)
    }

    /// Whether some wait for an earlier change, for a part in flight, or for the gate.
    #[must_use]
    pub fn has_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Whether nothing in flight on the disk overlaps `range`: a change of it may be made at once.
    #[must_use]
    pub fn is_clear(&self, range: Range) -> bool {
        self.disk.overlaps.is_clear(range)
    }

    /// Whether a write that begins after another one of the same bytes ends after it by itself, so
    /// that a plain write needs no place among the changes in flight.
    #[must_use]
    pub fn writes_are_ordered(&self) -> bool {
        self.disk.image.orders_writes()
    }

    /// A place among the changes in flight for one that the caller makes by itself, as soon as
    /// [`Change::is_first`].
    #[must_use]
    pub fn register_change(&self, range: Range) -> Change<'a> {
        self.disk.overlaps.register(range, &self.notifier)
    }

    /// The session has written `range` by itself, not durably.
    pub fn record_write(&mut self, range: Range) {
        if let Some((start, end)) = self.write_behind.wrote(range) {
            let disk = self.disk;
            let span = Range::whole(disk.size()).from(start).until(end);
            if disk.threads.start_write_back(&disk.image, span) {
                self.write_behind.started();
            }
        }
    }

    /// Begins an errand, as soon as [`InFlight::submit`] is called, if not before; or, if an earlier
    /// change overlaps it, when that has ended. It is the caller's business to ask
    /// [`InFlight::has_room`] first.
    ///
    /// It ends with `EPERM` if it would change a read-only disk, with `EINVAL` beyond its end, as
    /// the first flush that failed if it is to be durable and one has, and as the image says; then
    /// any part of a change may have been made.
    pub fn begin(&mut self, visit: Visit<'a>, work: Work, token: T) {
        let weight = if let Work::Write { data, .. } = &work { data.len() } else { 0 };
        self.count += 1;
        self.bytes += weight;
        let queued = match self.check(&work) {
            Ok(None) => Queued { token, work, change: None, weight },
            Ok(Some(range)) if range.is_empty() => return self.conclude(token, weight, Ok(())),
            Ok(Some(range)) => {
                let change = Some(self.register_change(range));
                Queued { token, work, change, weight }
            }
            Err(error) => return self.conclude(token, weight, Err(error)),
        };
        if self.may_begin(&queued) {
            self.start(visit, queued);
        } else {
            self.waiting.push_back(queued);
        }
    }

    fn may_begin(&self, queued: &Queued<'a, T>) -> bool {
        let how = match queued.work {
            Work::Zero { how, .. } => Some(how),
            Work::Trim { .. } => Some(Zeroing::default()),
            _ => None,
        };
        let by_extent = |how| self.disk.image.zeroes_by_extent(how);
        let at_once = |how| self.part_sizes.at_once(by_extent(how));
        let has_slot = how.is_none_or(|how| self.parts < at_once(how));
        has_slot && queued.change.as_ref().is_none_or(Change::is_first)
    }

    /// Has the bell rung when the gate opens.
    pub fn notify_when_gate_opens(&self) {
        self.gate_expiry.set(self.disk.gate.notify_when_open(&self.notifier));
    }

    /// When to go on whatever the bell said, if [`InFlight::notify_when_gate_opens`] was called since this
    /// was last asked: the gate may open by itself then.
    #[must_use]
    pub fn gate_expiry(&self) -> Option<Instant> {
        self.gate_expiry.take()
    }

    /// Goes on with those that waited and need not wait any more.
    fn go_on(&mut self) {
        let mut at = 0;
        while at < self.waiting.len() && !self.closing {
            if !self.may_begin(&self.waiting[at]) {
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
                // Whoever owns the session learns so at the gate.
                Err(_) => return,
            }
        }
    }

    /// Begins all that has been taken on.
    pub fn submit(&mut self) {
        self.go_on();
        self.make_durable();
        if let Executor::Lane(lane) = &mut self.lane
            && !lane.submit()
        {
            self.notifier.notify();
        }
    }

    /// The next that is over: what was given to [`InFlight::begin`], and its outcome.
    pub fn next_completed(&mut self) -> Option<(T, io::Result<()>)> {
        if self.is_empty() {
            return None;
        }
        while let Some(made) = self.next_made() {
            self.made(made);
        }
        self.settle();
        self.over.pop_front()
    }

    /// A call that is over.
    fn next_made(&mut self) -> Option<Completion> {
        if self.helped > 0
            && let Some(made) = self.completions.take()
        {
            self.helped -= 1;
            return Some(made);
        }
        match &mut self.lane {
            Executor::Lane(lane) if self.under_way.len() > self.helped => lane.finished(),
            _ => None,
        }
    }

    /// Whether an outcome waits to be taken, whatever the bell said.
    #[must_use]
    pub fn has_completed(&self) -> bool {
        !self.over.is_empty()
    }

    /// Gives back the lane if nothing is under way; it is made anew when needed.
    pub fn shrink(&mut self) {
        if self.is_empty() {
            self.lane = Executor::Unknown;
        }
    }

    /// Whether there is no lane to give back.
    #[must_use]
    pub fn is_shrunk(&self) -> bool {
        !matches!(self.lane, Executor::Lane(_))
    }

    /// The range that it changes; empty if there is nothing to do, none if it changes nothing.
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
        let (then, listening, joined) = (NextStep::Nothing, None, Vec::new());
        let errand = Operation { token, visit, change, then, listening, joined, weight };
        match work {
            Work::Populate(range) => self.call(errand, Call::Populate(range)),
            Work::Prefetch(range) => self.call(errand, Call::Prefetch(range)),
            Work::Flush => self.gathered.push(Batched { errand, write: None }),
            Work::Zero { range, how, durable } => {
                let (part, range) = self.cut(range, how);
                // Whether it can be fast is decided by the first part, before anything is changed.
                let later = Zeroing { only_if_fast: false, ..how };
                let rest = Work::Zero { range, how: later, durable };
                self.call_part(errand, Call::Zero(part, how), rest);
            }
            Work::Trim { range, durable } => {
                let (part, range) = self.cut(range, Zeroing::default());
                self.call_part(errand, Call::Trim(part), Work::Trim { range, durable });
            }
            Work::Write { offset, data, durable } => {
                self.start_write(errand, offset, data, durable);
            }
        }
    }

    fn cut(&self, range: Range, how: Zeroing) -> (Range, Range) {
        self.part_sizes.cut(range, self.disk.image.zeroes_by_extent(how))
    }

    fn call_part(&mut self, mut errand: Operation<'a, T>, call: Call, rest: Work) {
        self.parts += 1;
        errand.then = NextStep::Rest { rest, since: Instant::now() };
        self.call(errand, call);
    }

    fn start_write(
        &mut self,
        mut errand: Operation<'a, T>,
        offset: u64,
        data: Vec<u8>,
        durable: bool,
    ) {
        let range = Range::whole(self.disk.size()).from(offset).split(data.len() as u64).0;
        let image = &*self.disk.image;
        let gaps = match durable.then(|| zeros::leaves_gaps(image, offset, &data)).transpose() {
            Ok(gaps) => gaps,
            Err(error) => return self.end(errand, Err(error)),
        };
        if let Some(edges) = errand.visit.cold_edges(range) {
            errand.then = NextStep::Write { offset, data, durable };
            self.call(errand, Call::Populate(edges));
        } else if gaps == Some(false) {
            self.gathered.push(Batched { errand, write: Some((offset, data)) });
        } else {
            self.write(errand, offset, &data, durable);
        }
    }

    /// Writes without waiting for a disk.
    fn write(&mut self, mut errand: Operation<'a, T>, offset: u64, data: &[u8], durable: bool) {
        let written = zeros::write_around_holes(&*self.disk.image, offset, data);
        self.mark(&mut errand);
        match written {
            Ok(()) if durable => self.gathered.push(Batched { errand, write: None }),
            outcome => {
                let length = data.len() as u64;
                self.record_write(Range::whole(self.disk.size()).from(offset).split(length).0);
                self.end(errand, outcome);
            }
        }
    }

    /// Makes durable what has been gathered.
    fn make_durable(&mut self) {
        let mut gathered = std::mem::take(&mut self.gathered);
        if let [Batched { write: Some(_), .. }] = gathered[..]
            && let Some(Batched { errand, write: Some((offset, data)) }) = gathered.pop()
        {
            return self.call(errand, Call::Write { offset, data });
        }
        let mut written = Vec::new();
        for Batched { mut errand, write } in gathered {
            let outcome = write.map_or(Ok(()), |(offset, data)| {
                let outcome = self.disk.image.write(offset, &data, false);
                self.mark(&mut errand);
                outcome
            });
            match outcome {
                Ok(()) => written.push(errand),
                Err(error) => self.end(errand, Err(error)),
            }
        }
        if let Some(mut errand) = written.pop() {
            errand.joined = written;
            self.call(errand, Call::Flush);
        }
    }

    /// Makes a call, aside if that is possible.
    fn call(&mut self, mut errand: Operation<'a, T>, call: Call) {
        if matches!(call, Call::Flush | Call::Write { .. }) {
            errand.listening = Some(self.disk.flush_errors.listen());
        }
        if matches!(self.lane, Executor::Unknown) {
            self.lane = match self.disk.image.queue(self.notifier.as_eventfd()) {
                Some(lane) => Executor::Lane(lane),
                None => Executor::Helpers,
            };
        }
        let key = self.next_key;
        self.next_key += 1;
        self.under_way.insert(key, errand);
        let declined = match &mut self.lane {
            Executor::Lane(lane) => lane.begin(key, call).err(),
            _ => Some(call),
        };
        if let Some(call) = declined {
            self.call_a_thread(key, call);
        }
    }

    /// Has a call made that the lane has declined; makes it here if there is no thread either, and
    /// if it waits for nothing.
    fn call_a_thread(&mut self, key: u64, call: Call) {
        let image = &self.disk.image;
        let declined = match call {
            Call::Populate(_) => Err(call),
            call => self.disk.threads.make(image, (key, call), &self.completions),
        };
        match declined {
            Ok(()) => self.helped += 1,
            Err(call) => {
                let outcome = Some(execute(&**image, &call));
                let made = Completion { key, call, outcome };
                match made.call {
                    Call::Populate(_) => return self.made(made),
                    // Heard of like the others, so that the session sees to other things between two
                    // parts.
                    _ => self.completions.put(made),
                }
                self.helped += 1;
            }
        }
    }

    /// Goes on with an errand after one of its calls.
    fn made(&mut self, made: Completion) {
        let Completion { key, call, outcome } = made;
        let Some(outcome) = outcome else { return self.call_a_thread(key, call) };
        let Some(mut errand) = self.under_way.remove(&key) else { return };
        match (call, outcome) {
            (Call::Populate(_) | Call::Prefetch(_), outcome) => self.loaded(errand, outcome),
            (Call::Flush, Ok(())) => {
                self.write_behind.started();
                self.heard(errand);
            }
            (Call::Flush, Err(error)) => self.fail(errand, &error),
            (Call::Write { .. }, Ok(())) => {
                self.mark(&mut errand);
                self.heard(errand);
            }
            // Was it to write, or to make durable? Written once more without, it shows.
            (Call::Write { offset, data }, Err(error)) => {
                let written = self.disk.image.write(offset, &data, false);
                self.mark(&mut errand);
                match written {
                    Ok(()) => self.fail(errand, &error),
                    Err(error) => self.end(errand, Err(error)),
                }
            }
            (Call::Zero(part, _) | Call::Trim(part), outcome) => {
                self.part_made(errand, part, outcome);
            }
        }
    }

    /// Goes on after a part of a zeroing or trim.
    fn part_made(&mut self, mut errand: Operation<'a, T>, part: Range, outcome: io::Result<()>) {
        self.parts -= 1;
        self.disk.mark(part);
        let then = std::mem::replace(&mut errand.then, NextStep::Nothing);
        let (Ok(()), NextStep::Rest { rest, since }) = (&outcome, then) else {
            return self.end(errand, outcome);
        };
        self.part_sizes.took(part.length(), since.elapsed());
        let (Work::Zero { range, durable, .. } | Work::Trim { range, durable }) = &rest else {
            return self.end(errand, outcome);
        };
        if range.is_empty() {
            errand.change = None;
            if *durable {
                self.gathered.push(Batched { errand, write: None });
            } else {
                self.end(errand, Ok(()));
            }
        } else if self.closing {
            self.end(errand, Ok(()));
        } else {
            let Operation { token, visit, change, weight, .. } = errand;
            let queued = Queued { token, work: rest, change, weight };
            if self.disk.gate.is_open() && self.may_begin(&queued) {
                self.start(visit, queued);
            } else {
                // Whoever closes the gate need not wait for the rest.
                drop(visit);
                self.waiting.push_front(queued);
            }
        }
    }

    /// Goes on with what was to be loaded first.
    fn loaded(&mut self, mut errand: Operation<'a, T>, outcome: io::Result<()>) {
        match std::mem::replace(&mut errand.then, NextStep::Nothing) {
            NextStep::Write { offset, data, durable } if !self.closing => {
                self.write(errand, offset, &data, durable);
            }
            _ => self.end(errand, outcome),
        }
    }

    /// The kernel has said that something is durable: ends, unless somebody else may know better.
    fn heard(&mut self, mut errand: Operation<'a, T>) {
        errand.listening = None;
        match self.disk.flush_errors.ring_after_others(&self.notifier) {
            None => self.end(errand, self.disk.flush_errors.check()),
            Some(others) => self.unsettled.push((others, errand)),
        }
    }

    /// Ends those of whom everybody has said what was heard.
    fn settle(&mut self) {
        let hearing = &self.disk.flush_errors;
        let mut at = 0;
        while at < self.unsettled.len() {
            if hearing.have_ended(self.unsettled[at].0) {
                let (_, errand) = self.unsettled.swap_remove(at);
                self.end(errand, hearing.check());
            } else {
                at += 1;
            }
        }
    }

    /// What was to be durable is not, and never will be known to be.
    fn fail(&mut self, errand: Operation<'a, T>, error: &io::Error) {
        let told = self.disk.flush_errors.failed(error);
        self.end(errand, Err(told));
    }

    fn end(&mut self, errand: Operation<'a, T>, outcome: io::Result<()>) {
        let errno = outcome.as_ref().err().map(errno_of);
        for joined in errand.joined {
            let outcome = errno.map_or(Ok(()), |errno| Err(io::Error::from_raw_os_error(errno)));
            self.end(joined, outcome);
        }
        self.conclude(errand.token, errand.weight, outcome);
    }

    fn conclude(&mut self, token: T, weight: usize, outcome: io::Result<()>) {
        self.count -= 1;
        self.bytes -= weight;
        self.over.push_back((token, outcome));
    }

    /// Marks what an errand has changed, be it only in part: after the bytes are there. The copier
    /// takes the mark first and reads second, so that a change may be sent twice but never missed.
    fn mark(&self, errand: &mut Operation<'a, T>) {
        if let Some(change) = errand.change.take() {
            self.disk.mark(change.range());
        }
    }
}

#[cfg(test)]
mod overlap_tests;
#[cfg(test)]
mod tests;
