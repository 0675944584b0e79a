//! A scripted disk: its I/O queues complete operations in any order, late, with errors, or not at all;
//! it has a volatile and a durable image, and checks what is in flight.

use super::model::{CELL, Stamp};
use crate::disk::inflight::{BYTES_MAX, IN_FLIGHT_MAX, READ_BYTES_MAX};
use crate::disk::mutation::{Mutation, is_active};
use crate::disk::{Backend, Completion, Extent, IoQueue, Op, PageCache};
use crate::range::Range;
use nix::errno::Errno;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard};

/// Unit of residency, in cells.
const BLOCK: usize = 8;

/// An operation in a queue.
#[derive(Debug)]
struct ScriptedOperation {
    queue: u64,
    key: u64,
    op: Op,
    outcome: Option<io::Result<()>>,
    is_submitted: bool,
    notifier: Arc<OwnedFd>,
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
    started: Vec<ScriptedOperation>,
    completed: Vec<(u64, Completion)>,
    /// One of so many operations fails; 0 for none.
    pub(super) fault_interval: u32,
    /// One of so many operations is declined; 0 for none.
    decline_interval: u32,
    is_cached: bool,
    orders_writes: bool,
    unit: u64,
    /// The gate is closed: nothing may change.
    pub(super) is_frozen: bool,
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
    notifier: Arc<OwnedFd>,
    disk: &'a ScriptedDisk,
}

fn cells(offset: u64, length: u64) -> std::ops::Range<usize> {
    assert!(offset.is_multiple_of(CELL) && length.is_multiple_of(CELL), "{length} at {offset}");
    (offset / CELL) as usize..((offset + length) / CELL) as usize
}

impl ScriptedState {
    fn break_promise(&mut self, what: String) {
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
        for (cell, stamp) in cells.zip(stamps) {
            self.volatile[cell] = stamp;
            self.unflushed[cell] = true;
            self.allocated[cell] = true;
        }
    }

    fn read(&self, offset: u64, into: &mut [u8]) {
        let cells = cells(offset, into.len() as u64);
        for (bytes, stamp) in into.chunks_exact_mut(CELL as usize).zip(&self.volatile[cells]) {
            fill(bytes, *stamp);
        }
    }

    fn read_device(&mut self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        if self.strikes(self.fault_interval) {
            return Err(Errno::EIO.into());
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
        self.change(cells.clone(), data.chunks_exact(CELL as usize).map(stamp_of));
        if fails {
            return Err(Errno::EIO.into());
        }
        self.make_resident(cells.clone());
        if durable && !is_active(Mutation::DropDurability) {
            self.write_back(cells);
        }
        Ok(())
    }

    fn punch(&mut self, range: Range) -> io::Result<()> {
        let cells = cells(range.offset(), range.length());
        if self.strikes(self.fault_interval) {
            return Err(Errno::EIO.into());
        }
        self.change(cells.clone(), std::iter::repeat(0));
        self.allocated[cells].fill(false);
        Ok(())
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
            return Err(Errno::EIO.into());
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
            Op::Zero { range, .. } | Op::Trim { range, .. } => self.punch(*range),
            Op::Flush => self.flush(),
            Op::Cache(_) | Op::Load(_) => Ok(()),
        };
        started.outcome = Some(outcome);
        self.started.push(started);
    }

    fn complete(&mut self, at: usize) {
        let ScriptedOperation { queue, key, op, outcome, notifier, .. } =
            self.started.swap_remove(at);
        self.completed.push((queue, Completion { key, op, outcome }));
        nix::unistd::write(&*notifier, &1u64.to_ne_bytes()).unwrap();
    }

    /// Executes an operation, or delivers its completion. False if there is none.
    pub(super) fn step(&mut self) -> bool {
        let submitted = self.started.iter().filter(|started| started.is_submitted).count();
        if submitted == 0 {
            return false;
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

    fn check_started(&mut self, queue: u64, op: &Op) {
        let size = self.volatile.len() as u64 * CELL;
        let span = |op: &Op| {
            let range = op.range(size).ok().flatten().filter(|_| op.changes())?;
            Some(range.aligned_around(self.unit, size))
        };
        let overlaps = |one: Range, other: Range| {
            one.offset() < other.end() && other.offset() < one.end() && !one.is_empty()
        };
        let found = span(op).and_then(|range| {
            let mut others = self.started.iter().map(|started| &started.op);
            others.find(|other| span(other).is_some_and(|other| overlaps(range, other)))
        });
        let overlapping = found.map(|other| format!("{op:?} starts beside {other:?}"));
        let own = || self.started.iter().filter(|started| started.queue == queue);
        let bytes = |changes: bool| -> usize {
            let ops = own().map(|started| &started.op).chain([op]);
            ops.filter(|op| op.changes() == changes).map(Op::memory).sum()
        };
        // The limit of reads does not count the blocks at the edges of writes.
        let (written, read) = (bytes(true), bytes(false));
        let is_over = written > BYTES_MAX || read > READ_BYTES_MAX + IN_FLIGHT_MAX * 4096;
        let count = own().count() + 1;
        self.peak = (self.peak.0.max(count), self.peak.1.max(written + read));
        if let Some(what) = overlapping {
            self.break_promise(what);
        }
        if count > IN_FLIGHT_MAX || is_over {
            let bytes = written + read;
            self.break_promise(format!("{count} operations of {bytes} bytes are in flight"));
        }
    }
}

/// The stamp of a cell's bytes.
pub(super) fn stamp_of(bytes: &[u8]) -> Stamp {
    let stamp = bytes.first_chunk().map_or(0, |first| u32::from_ne_bytes(*first));
    assert!(bytes[4..] == bytes[..bytes.len() - 4], "a torn cell");
    stamp
}

/// Fills one or more cells.
pub(super) fn fill(bytes: &mut [u8], stamp: Stamp) {
    bytes[..4].copy_from_slice(&stamp.to_ne_bytes());
    let mut filled = 4;
    while filled < bytes.len() {
        let more = filled.min(bytes.len() - filled);
        bytes.copy_within(..more, filled);
        filled += more;
    }
}

impl ScriptedDisk {
    /// A disk with this content.
    pub(super) fn new(initial: &[Stamp], rng: &mut fastrand::Rng) -> Self {
        let count = initial.len();
        let is_cold = rng.bool();
        Self(Arc::new(Mutex::new(ScriptedState {
            rng: rng.fork(),
            volatile: initial.to_vec(),
            durable: initial.to_vec(),
            unflushed: vec![false; count],
            allocated: initial.iter().map(|stamp| *stamp != 0).collect(),
            resident: vec![!is_cold; count.div_ceil(BLOCK)],
            fault_interval: if rng.u8(..3) == 0 { 12 } else { 0 },
            decline_interval: if rng.bool() { 10 } else { 0 },
            is_cached: rng.u8(..3) > 0,
            orders_writes: rng.bool(),
            unit: if rng.bool() { 1 } else { 4096 },
            ..ScriptedState::default()
        })))
    }

    pub(super) fn state(&self) -> MutexGuard<'_, ScriptedState> {
        self.0.lock().unwrap()
    }
}

impl Backend for ScriptedDisk {
    fn size(&self) -> u64 {
        self.state().volatile.len() as u64 * CELL
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.state().read_device(offset, into)
    }

    fn write(&self, offset: u64, data: &[u8], durable: bool) -> io::Result<()> {
        self.state().write(offset, data, durable)
    }

    fn execute(&self, op: &Op) -> io::Result<()> {
        match op {
            Op::Zero { range, .. } | Op::Trim { range, .. } => self.state().punch(*range),
            _ => Ok(()),
        }
    }

    fn flush(&self) -> io::Result<()> {
        self.state().flush()
    }

    fn extent(&self, offset: u64) -> io::Result<Extent> {
        let state = self.state();
        let from = (offset / CELL) as usize;
        let allocated = state.allocated[from];
        let length = state.allocated[from..].iter().take_while(|is| **is == allocated).count();
        let end = (from + length) as u64 * CELL;
        let range = Range::whole(state.volatile.len() as u64 * CELL).from(offset).until(end);
        Ok(Extent { range, allocated })
    }

    fn queue(&self, notifier: BorrowedFd<'_>) -> Option<Box<dyn IoQueue + '_>> {
        let mut state = self.state();
        state.queues += 1;
        let number = state.queues;
        let notifier = Arc::new(notifier.try_clone_to_owned().unwrap());
        Some(Box::new(ScriptedQueue { number, notifier, disk: self }))
    }

    fn unit(&self) -> u64 {
        self.state().unit
    }

    fn orders_writes(&self) -> bool {
        self.state().orders_writes
    }

    fn works_by_extent(&self, _: &Op) -> bool {
        true
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
    fn push(&mut self, key: u64, op: Op) -> Result<(), Op> {
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
        let at = state.completed.iter().position(|(queue, _)| *queue == self.number)?;
        Some(state.completed.remove(at).1)
    }

    fn wait(&mut self) {
        let mut state = self.disk.state();
        if state.completed.iter().any(|(queue, _)| *queue == self.number) {
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
