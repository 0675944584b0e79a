//! A scripted disk: its I/O queues complete operations in any order, late, with errors, or not at all;
//! it has a volatile and a durable image, and checks the operations in flight.

use super::model::{Stamp, cell_size, fill, stamp_of};
use super::theme::Theme;
use crate::disk::mutation::{Mutation, is_active};
use crate::disk::{Backend, Completion, Extent, IoQueue, Notifier, Op, OpId, PageCache};
use crate::range::Range;
use crate::sync;
use nix::errno::Errno;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard};

/// Unit of residency, in cells.
const BLOCK: usize = 8;

/// Of a file that the scripted disk never uses.
static DESCRIPTOR: LazyLock<UnixStream> = LazyLock::new(|| UnixStream::pair().unwrap().0);

/// Counts the notifications of one session.
#[derive(Debug, Default)]
pub(super) struct ScriptedNotifier {
    pub(super) session: u64,
    count: AtomicU64,
}

impl ScriptedNotifier {
    pub(super) fn new(session: u64) -> Self {
        Self { session, count: AtomicU64::new(0) }
    }

    /// Forgets its notifications.
    pub(super) fn take(&self) {
        self.count.store(0, Ordering::Relaxed);
    }

    pub(super) fn is_notified(&self) -> bool {
        self.count.load(Ordering::Relaxed) > 0
    }
}

impl Notifier for ScriptedNotifier {
    fn notify(&self) {
        self.count.fetch_add(1, Ordering::Relaxed);
    }

    fn as_eventfd(&self) -> BorrowedFd<'_> {
        DESCRIPTOR.as_fd()
    }
}

/// An operation in a queue.
#[derive(Debug)]
struct ScriptedOperation {
    queue: u64,
    key: u64,
    op: Op,
    outcome: Option<io::Result<()>>,
    is_submitted: bool,
    notifier: Arc<ScriptedNotifier>,
}

/// The state of the disk, which the test controls.
#[derive(Debug, Default)]
pub(super) struct ScriptedState {
    pub(super) rng: fastrand::Rng,
    pub(super) volatile: Vec<Stamp>,
    pub(super) durable: Vec<Stamp>,
    /// Cells that the next flush makes durable.
    unflushed: Vec<bool>,
    allocated: Vec<bool>,
    /// Blocks in the page cache.
    resident: Vec<bool>,
    queues: u64,
    /// The session that creates the next queue.
    pub(super) current: Arc<ScriptedNotifier>,
    started: Vec<ScriptedOperation>,
    /// The session, the queue and the completion.
    completed: Vec<(u64, u64, Completion)>,
    /// One of so many operations fails; 0 for none.
    fault_interval: u32,
    /// One of so many operations is declined; 0 for none.
    decline_interval: u32,
    pub(super) is_cached: bool,
    orders_writes: bool,
    unit: u64,
    /// Zeroing is no faster than writing.
    is_zeroing_slow: bool,
    works_by_extent: bool,
    /// Extents are found by operations in flight.
    extents_wait: bool,
    /// Queues may lose completions when their session has ended.
    pub(super) loses: bool,
    /// Operations that their session has abandoned, and whether a flush is among them.
    pub(super) abandoned: u64,
    pub(super) is_flush_lost: bool,
    /// The gate is closing: no part of a zeroing or trim may start.
    pub(super) is_closing: bool,
    /// The gate is closed: nothing may change.
    pub(super) is_frozen: bool,
    /// Nothing may change before the policy has a record.
    pub(super) awaits_record: bool,
    /// Operations and writes that sessions have begun.
    pub(super) begun: u64,
    /// The first promise that was broken.
    pub(super) broken: Option<String>,
    /// Most operations and bytes in one queue.
    pub(super) peak: (usize, usize),
}

/// The disk.
#[derive(Clone, Debug)]
pub(super) struct ScriptedDisk(Arc<Mutex<ScriptedState>>);

#[derive(Debug)]
struct ScriptedQueue<'a> {
    number: u64,
    notifier: Arc<ScriptedNotifier>,
    disk: &'a ScriptedDisk,
}

fn cells(offset: u64, length: u64) -> std::ops::Range<usize> {
    let size = cell_size();
    assert!(offset.is_multiple_of(size) && length.is_multiple_of(size), "{length} at {offset}");
    (offset / size) as usize..((offset + length) / size) as usize
}

impl ScriptedState {
    pub(super) fn break_promise(&mut self, what: String) {
        self.broken.get_or_insert(what);
    }

    fn strikes(&mut self, interval: u32) -> bool {
        interval > 0 && self.rng.u32(..interval) == 0
    }

    fn make_resident(&mut self, cells: std::ops::Range<usize>) {
        self.resident[cells.start / BLOCK..cells.end.div_ceil(BLOCK)].fill(true);
    }

    fn is_resident(&self, cells: std::ops::Range<usize>) -> bool {
        self.resident[cells.start / BLOCK..cells.end.div_ceil(BLOCK)].iter().all(|is| *is)
    }

    fn change(&mut self, cells: std::ops::Range<usize>, stamps: impl Iterator<Item = Stamp>) {
        if self.is_frozen {
            self.break_promise(format!("cells {cells:?} change while the gate is closed"));
        }
        if self.awaits_record {
            self.break_promise(format!("cells {cells:?} change before the record"));
        }
        for (cell, stamp) in cells.zip(stamps) {
            self.volatile[cell] = stamp;
            self.unflushed[cell] = true;
            self.allocated[cell] = true;
        }
    }

    fn read(&self, offset: u64, into: &mut [u8]) {
        let cells = cells(offset, into.len() as u64);
        for (bytes, stamp) in into.chunks_exact_mut(cell_size() as usize).zip(&self.volatile[cells])
        {
            fill(bytes, *stamp);
        }
    }

    fn read_device(&mut self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        if self.strikes(self.fault_interval) {
            return Err(self.error());
        }
        self.make_resident(cells(offset, into.len() as u64));
        self.read(offset, into);
        Ok(())
    }

    fn write(&mut self, offset: u64, data: &[u8], durable: bool) -> io::Result<()> {
        let mut cells = cells(offset, data.len() as u64);
        let fails = self.strikes(self.fault_interval);
        if fails {
            cells.end = self.rng.usize(cells.start..cells.end);
        }
        self.change(cells.clone(), data.chunks_exact(cell_size() as usize).map(stamp_of));
        if fails {
            return Err(self.error());
        }
        self.make_resident(cells.clone());
        if durable && !is_active(Mutation::DropDurability) {
            self.write_back(cells);
        }
        Ok(())
    }

    fn error(&mut self) -> io::Error {
        [Errno::EIO, Errno::ECANCELED][self.rng.usize(..2)].into()
    }

    fn execute_without_data(&mut self, op: &Op) -> io::Result<()> {
        match op {
            Op::Zero { how, .. } if how.only_if_fast && self.is_zeroing_slow => {
                Err(Errno::EOPNOTSUPP.into())
            }
            Op::Zero { range, .. } | Op::Trim { range, .. } => self.punch(*range),
            Op::Load(range) => {
                self.make_resident(cells(range.offset(), range.length()));
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn punch(&mut self, range: Range) -> io::Result<()> {
        let cells = cells(range.offset(), range.length());
        if self.strikes(self.fault_interval) {
            return Err(self.error());
        }
        self.change(cells.clone(), std::iter::repeat(0));
        self.allocated[cells].fill(false);
        Ok(())
    }

    fn extent(&self, offset: u64) -> Extent {
        let from = (offset / cell_size()) as usize;
        let allocated = self.allocated[from];
        let length = self.allocated[from..].iter().take_while(|is| **is == allocated).count();
        let end = (from + length) as u64 * cell_size();
        Extent { range: Range::whole(self.size()).from(offset).until(end), allocated }
    }

    fn find_extents(&mut self, range: Range, limit: usize) -> io::Result<Vec<Extent>> {
        if self.strikes(self.fault_interval) {
            return Err(self.error());
        }
        let (mut found, mut rest) = (Vec::new(), range);
        while !rest.is_empty() && found.len() < limit {
            let Extent { range: whole, allocated } = self.extent(rest.offset());
            let (part, after) = rest.split(whole.length());
            found.push(Extent { range: part, allocated });
            rest = after;
        }
        Ok(found)
    }

    fn write_back(&mut self, cells: std::ops::Range<usize>) {
        for cell in cells {
            if std::mem::take(&mut self.unflushed[cell]) {
                self.durable[cell] = self.volatile[cell];
            }
        }
    }

    /// A failed flush loses what it should have written.
    fn flush(&mut self) -> io::Result<()> {
        if self.strikes(self.fault_interval) {
            self.unflushed.fill(false);
            return Err(self.error());
        }
        if !is_active(Mutation::EmptyFlush) {
            self.write_back(0..self.volatile.len());
        }
        Ok(())
    }

    fn execute(&mut self, at: usize) {
        let mut started = self.started.swap_remove(at);
        let outcome = match &mut started.op {
            Op::Read { offset, data } => self.read_device(*offset, data),
            Op::Write { offset, data, durable } => self.write(*offset, data, *durable),
            Op::Flush => self.flush(),
            Op::Extents { range, limit, found } => {
                self.find_extents(*range, *limit).map(|extents| *found = extents)
            }
            other => self.execute_without_data(other),
        };
        started.outcome = Some(outcome);
        self.started.push(started);
    }

    fn complete(&mut self, at: usize) {
        let ScriptedOperation { queue, key, op, outcome, notifier, .. } =
            self.started.swap_remove(at);
        self.completed.push((notifier.session, queue, Completion { key, op, outcome }));
        notifier.notify();
    }

    /// Executes an operation, or delivers its completion. False if there is none.
    pub(super) fn step(&mut self) -> bool {
        let submitted = self.started.iter().filter(|started| started.is_submitted).count();
        if submitted == 0 {
            return false;
        }
        // Slowly, so that sessions end with operations in flight.
        if self.loses && self.rng.u8(..4) > 0 {
            return true;
        }
        let nth = self.rng.usize(..submitted);
        let found =
            self.started.iter().enumerate().filter(|(_, started)| started.is_submitted).nth(nth);
        let Some((at, _)) = found else { return false };
        if self.started[at].outcome.is_some() || self.strikes(self.decline_interval) {
            self.complete(at);
        } else {
            self.execute(at);
        }
        true
    }

    /// The page cache loses or writes back some blocks.
    pub(super) fn reclaim(&mut self) {
        let block = self.rng.usize(..self.resident.len());
        let end = self.volatile.len().min((block + 4) * BLOCK);
        self.write_back(block * BLOCK..end);
        let length = self.rng.usize(1..=self.resident.len() - block);
        self.resident[block..block + length].fill(false);
    }

    /// Whether operations may fail.
    pub(super) fn may_fail(&self) -> bool {
        self.fault_interval > 0 || self.loses
    }

    /// Whether a session has operations that it has not seen completed.
    pub(super) fn is_busy(&self, session: u64) -> bool {
        self.started.iter().any(|started| started.notifier.session == session)
            || self.completed.iter().any(|(of, _, _)| *of == session)
    }

    /// The first operation in a queue that changes a byte of this range, or of a unit around it.
    fn find_change(&self, range: Range) -> Option<&Op> {
        let size = self.size();
        let shares = |op: &Op| {
            let other = op.range(size).ok().flatten().filter(|_| op.changes());
            let other = other.map(|other| other.aligned_around(self.unit, size));
            other.is_some_and(|other| range.offset() < other.end() && other.offset() < range.end())
        };
        self.started.iter().map(|started| &started.op).find(|op| !range.is_empty() && shares(op))
    }

    fn size(&self) -> u64 {
        self.volatile.len() as u64 * cell_size()
    }

    /// A session writes without a queue.
    fn check_write(&mut self, offset: u64, length: usize) {
        self.begun += 1;
        let range = Range::whole(self.size()).from(offset).split(length as u64).0;
        if let Some(other) = self.find_change(range) {
            let what =
                format!("a write of {length} bytes at {offset} is executed beside {other:?}");
            self.break_promise(what);
        }
    }

    fn check_started(&mut self, queue: u64, op: &Op) {
        self.begun += 1;
        let size = self.size();
        let range = op.range(size).ok().flatten().filter(|_| op.changes());
        let overlapping = range.and_then(|range| {
            let other = self.find_change(range.aligned_around(self.unit, size))?;
            Some(format!("{op:?} starts beside {other:?}"))
        });
        if let Some(what) = overlapping {
            self.break_promise(what);
        }
        if self.is_closing && matches!(op, Op::Zero { .. } | Op::Trim { .. }) {
            self.break_promise(format!("{op:?} starts while the gate is closing"));
        }
        let own = self.started.iter().filter(|started| started.queue == queue);
        let (count, bytes) = own.fold((1, op.memory()), |(count, bytes), started| {
            (count + 1, bytes + started.op.memory())
        });
        self.peak = (self.peak.0.max(count), self.peak.1.max(bytes));
    }
}

impl ScriptedDisk {
    /// A disk with this content. One that loses completions never fails otherwise.
    pub(super) fn new(initial: &[Stamp], theme: Theme, rng: &mut fastrand::Rng) -> Self {
        let loses = theme == Theme::Losses;
        let fault_interval = match theme {
            Theme::Losses => 0,
            Theme::Flushes => 6,
            _ if rng.u8(..3) == 0 => 12,
            _ => 0,
        };
        let count = initial.len();
        let is_cold = rng.bool();
        Self(Arc::new(Mutex::new(ScriptedState {
            rng: rng.fork(),
            volatile: initial.to_vec(),
            durable: initial.to_vec(),
            unflushed: vec![false; count],
            allocated: initial.iter().map(|stamp| *stamp != 0).collect(),
            resident: vec![!is_cold; count.div_ceil(BLOCK)],
            fault_interval,
            decline_interval: if rng.bool() { 10 } else { 0 },
            is_cached: !loses && rng.u8(..3) > 0,
            orders_writes: rng.bool(),
            unit: if rng.bool() { 1 } else { 4096 },
            is_zeroing_slow: rng.u8(..4) == 0,
            works_by_extent: rng.bool(),
            extents_wait: is_cold,
            loses,
            ..ScriptedState::default()
        })))
    }

    pub(super) fn state(&self) -> MutexGuard<'_, ScriptedState> {
        sync::lock(&self.0)
    }
}

impl Backend for ScriptedDisk {
    fn size(&self) -> u64 {
        self.state().size()
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.state().read_device(offset, into)
    }

    fn write(&self, offset: u64, data: &[u8], durable: bool) -> io::Result<()> {
        let mut state = self.state();
        state.check_write(offset, data.len());
        state.write(offset, data, durable)
    }

    fn execute(&self, op: &Op) -> io::Result<()> {
        self.state().execute_without_data(op)
    }

    fn flush(&self) -> io::Result<()> {
        self.state().flush()
    }

    fn extent(&self, offset: u64) -> io::Result<Extent> {
        Ok(self.state().extent(offset))
    }

    fn extents_wait(&self) -> bool {
        self.state().extents_wait
    }

    fn queue(&self, _: BorrowedFd<'_>) -> Option<Box<dyn IoQueue + '_>> {
        let mut state = self.state();
        state.queues += 1;
        let (number, notifier) = (state.queues, Arc::clone(&state.current));
        Some(Box::new(ScriptedQueue { number, notifier, disk: self }))
    }

    fn unit(&self) -> u64 {
        self.state().unit
    }

    fn orders_writes(&self) -> bool {
        self.state().orders_writes
    }

    fn works_by_extent(&self, _: &Op) -> bool {
        self.state().works_by_extent
    }

    fn page_cache(&self) -> Option<&dyn PageCache> {
        self.state().is_cached.then_some(self as &dyn PageCache)
    }
}

impl PageCache for ScriptedDisk {
    fn read_now(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let state = self.state();
        if !state.is_resident(cells(offset, into.len() as u64)) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        state.read(offset, into);
        Ok(())
    }

    fn is_resident(&self, range: Range) -> bool {
        self.state().is_resident(cells(range.offset(), range.length()))
    }
}

impl IoQueue for ScriptedQueue<'_> {
    fn push(&mut self, OpId { key, .. }: OpId, op: Op) -> Result<(), Op> {
        let mut state = self.disk.state();
        let interval = state.decline_interval;
        if state.strikes(interval) {
            return Err(op);
        }
        state.check_started(self.number, &op);
        let (queue, notifier) = (self.number, Arc::clone(&self.notifier));
        let (outcome, is_submitted) = (None, false);
        state.started.push(ScriptedOperation { queue, key, op, outcome, is_submitted, notifier });
        Ok(())
    }

    fn submit(&mut self) -> bool {
        let mut state = self.disk.state();
        let own = state.started.iter_mut().filter(|started| started.queue == self.number);
        own.for_each(|started| started.is_submitted = true);
        true
    }

    fn poll(&mut self) -> Option<Completion> {
        let mut state = self.disk.state();
        let at = state.completed.iter().position(|(_, queue, _)| *queue == self.number)?;
        Some(state.completed.remove(at).2)
    }

    fn wait(&mut self) {
        let mut state = self.disk.state();
        if state.completed.iter().any(|(_, queue, _)| *queue == self.number) {
            return;
        }
        if state.loses && state.rng.bool() {
            return;
        }
        let is_own = |started: &ScriptedOperation| started.queue == self.number;
        if let Some(at) = state.started.iter().position(is_own) {
            if state.started[at].outcome.is_none() {
                state.execute(at);
                // `execute` puts it at the end.
                let last = state.started.len() - 1;
                return state.complete(last);
            }
            state.complete(at);
        }
    }
}

impl Drop for ScriptedQueue<'_> {
    fn drop(&mut self) {
        let mut state = self.disk.state();
        let own = state.started.iter().filter(|started| started.queue == self.number);
        let (count, is_durable) = own.fold((0, false), |(count, is_durable), started| {
            (count + 1, is_durable || started.op.is_durable())
        });
        state.abandoned += count;
        state.is_flush_lost |= is_durable;
    }
}
