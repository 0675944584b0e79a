//! A disk in memory whose queue executes an operation only when the target says so, and a notifier.

use crate::disk::{Backend, Completion, Extent, IoQueue, Notifier, Op, OpId, PageCache, Zeroing};
use crate::range::Range;
use crate::server::session::engine::Clocks;
use crate::sync;
use nix::errno::Errno;
use std::cell::Cell;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// Unit of residency and of extents, in bytes.
const BLOCK: usize = 4096;
static ZEROS: [u8; BLOCK] = [0; BLOCK];

/// When the clocks begin.
static BEGAN: LazyLock<Instant> = LazyLock::new(Instant::now);

thread_local! {
    /// Time since [`BEGAN`].
    static ELAPSED: Cell<Duration> = const { Cell::new(Duration::ZERO) };
    /// How much each look at the clock takes.
    static TICK: Cell<Duration> = const { Cell::new(Duration::ZERO) };
}

/// Clocks that do not depend on the computer: each look takes so long, which decides whether the disk counts as
/// fast.
pub(super) fn clocks(tick: Duration) -> Clocks {
    ELAPSED.set(Duration::ZERO);
    TICK.set(tick);
    let now = || {
        ELAPSED.set(ELAPSED.get() + TICK.get());
        *BEGAN + ELAPSED.get()
    };
    Clocks { now, coarse: || Duration::ZERO }
}

/// Nothing waits for it: the target looks for completions in every turn.
#[derive(Debug)]
pub(super) struct IdleNotifier(UnixStream);

impl IdleNotifier {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self(UnixStream::pair()?.0))
    }
}

impl Notifier for IdleNotifier {
    fn notify(&self) {}

    fn as_eventfd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// How the disk behaves.
#[derive(Clone, Copy, Debug)]
pub(super) struct DiskTraits {
    pub(super) size: usize,
    /// There is a page cache.
    pub(super) is_cached: bool,
    /// The page cache is empty at first.
    pub(super) is_cold: bool,
    /// Operations complete in reverse order.
    pub(super) reverses: bool,
    /// Zeroing is no faster than writing.
    pub(super) is_zeroing_slow: bool,
    /// Trimming changes nothing.
    pub(super) keeps_trimmed: bool,
    /// Extents are found by operations in flight.
    pub(super) extents_wait: bool,
    /// Each operation with this ordinal number fails; 0 for none.
    pub(super) fault_interval: usize,
}

#[derive(Debug)]
struct FuzzDiskState {
    bytes: Vec<u8>,
    is_resident: Vec<bool>,
    pending: Vec<(u64, Op)>,
    done: Vec<Completion>,
    executed: usize,
    failed: usize,
}

/// The disk. A clone is the same disk.
#[derive(Clone, Debug)]
pub(super) struct FuzzDisk {
    traits: DiskTraits,
    state: Arc<Mutex<FuzzDiskState>>,
}

#[derive(Debug)]
struct FuzzQueue<'a>(&'a FuzzDisk);

impl FuzzDisk {
    pub(super) fn new(traits: DiskTraits) -> Self {
        let state = FuzzDiskState {
            bytes: vec![0; traits.size],
            is_resident: vec![!traits.is_cold; traits.size.div_ceil(BLOCK)],
            pending: Vec::new(),
            done: Vec::new(),
            executed: 0,
            failed: 0,
        };
        Self { traits, state: Arc::new(Mutex::new(state)) }
    }

    fn state(&self) -> MutexGuard<'_, FuzzDiskState> {
        sync::lock(&self.state)
    }

    /// How many operations have failed.
    pub(super) fn failures(&self) -> usize {
        self.state().failed
    }

    /// Executes one operation; false if none is in the queue.
    pub(super) fn step(&self) -> bool {
        let mut state = self.state();
        if state.pending.is_empty() {
            return false;
        }
        let at = if self.traits.reverses { state.pending.len() - 1 } else { 0 };
        let (key, mut op) = state.pending.remove(at);
        let outcome = self.run(&mut state, &mut op);
        state.done.push(Completion { key, op, outcome: Some(outcome) });
        true
    }

    fn run(&self, state: &mut FuzzDiskState, op: &mut Op) -> io::Result<()> {
        self.fault(state)?;
        match op {
            Op::Read { offset, data } => {
                let range = place(*offset, data.len());
                data.copy_from_slice(&state.bytes[range.clone()]);
                load(state, range);
            }
            Op::Write { offset, data, .. } => {
                let range = place(*offset, data.len());
                state.bytes[range.clone()].copy_from_slice(data);
                load(state, range);
            }
            Op::Extents { range, limit, found } => {
                let mut rest = *range;
                while !rest.is_empty() && found.len() < *limit {
                    let extent = extent(&state.bytes, rest.offset());
                    let (part, after) = rest.split(extent.range.length());
                    found.push(Extent { range: part, allocated: extent.allocated });
                    rest = after;
                }
            }
            Op::Load(range) => load(state, place(range.offset(), range.length() as usize)),
            other => return self.change(state, other),
        }
        Ok(())
    }

    fn change(&self, state: &mut FuzzDiskState, op: &Op) -> io::Result<()> {
        let zeroed = match op {
            Op::Zero { how: Zeroing { only_if_fast: true, .. }, .. }
                if self.traits.is_zeroing_slow =>
            {
                return Err(Errno::EOPNOTSUPP.into());
            }
            Op::Zero { range, .. } => *range,
            Op::Trim { range, .. } if !self.traits.keeps_trimmed => *range,
            _ => return Ok(()),
        };
        state.bytes[place(zeroed.offset(), zeroed.length() as usize)].fill(0);
        Ok(())
    }

    fn fault(&self, state: &mut FuzzDiskState) -> io::Result<()> {
        state.executed += 1;
        let interval = self.traits.fault_interval;
        if interval == 0 || !state.executed.is_multiple_of(interval) {
            return Ok(());
        }
        state.failed += 1;
        Err(Errno::EIO.into())
    }
}

fn place(offset: u64, length: usize) -> std::ops::Range<usize> {
    offset as usize..offset as usize + length
}

fn load(state: &mut FuzzDiskState, range: std::ops::Range<usize>) {
    state.is_resident[range.start / BLOCK..range.end.div_ceil(BLOCK)].fill(true);
}

/// The extent from `offset` to the end of its block. A block of zeros is a hole.
fn extent(bytes: &[u8], offset: u64) -> Extent {
    let start = offset as usize / BLOCK * BLOCK;
    let block = &bytes[start..bytes.len().min(start + BLOCK)];
    let end = (start + block.len()) as u64;
    let range = Range::whole(bytes.len() as u64).from(offset).until(end);
    Extent { range, allocated: *block != ZEROS[..block.len()] }
}

impl Backend for FuzzDisk {
    fn size(&self) -> u64 {
        self.traits.size as u64
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let mut state = self.state();
        self.fault(&mut state)?;
        into.copy_from_slice(&state.bytes[place(offset, into.len())]);
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8], _durable: bool) -> io::Result<()> {
        let mut state = self.state();
        self.fault(&mut state)?;
        let range = place(offset, data.len());
        state.bytes[range.clone()].copy_from_slice(data);
        load(&mut state, range);
        Ok(())
    }

    fn execute(&self, op: &Op) -> io::Result<()> {
        let mut state = self.state();
        self.fault(&mut state)?;
        self.change(&mut state, op)
    }

    fn flush(&self) -> io::Result<()> {
        let mut state = self.state();
        self.fault(&mut state)
    }

    fn extent(&self, offset: u64) -> io::Result<Extent> {
        Ok(extent(&self.state().bytes, offset))
    }

    fn extents_wait(&self) -> bool {
        self.traits.extents_wait
    }

    fn queue(&self, _notifier: BorrowedFd<'_>) -> Option<Box<dyn IoQueue + '_>> {
        Some(Box::new(FuzzQueue(self)))
    }

    fn page_cache(&self) -> Option<&dyn PageCache> {
        self.traits.is_cached.then_some(self)
    }
}

impl PageCache for FuzzDisk {
    fn read_now(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let state = self.state();
        let range = place(offset, into.len());
        let blocks = range.start / BLOCK..range.end.div_ceil(BLOCK);
        if !state.is_resident[blocks].iter().all(|is| *is) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        into.copy_from_slice(&state.bytes[range]);
        Ok(())
    }
}

impl IoQueue for FuzzQueue<'_> {
    fn push(&mut self, id: OpId, op: Op) -> Result<(), Op> {
        self.0.state().pending.push((id.key, op));
        Ok(())
    }

    fn submit(&mut self) -> bool {
        true
    }

    fn poll(&mut self) -> Option<Completion> {
        self.0.state().done.pop()
    }

    fn wait(&mut self) {
        self.0.step();
    }
}
