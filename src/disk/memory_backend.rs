//! Backends for the tests of the whole crate: in memory, partly overridden, and with injected faults.
//! Never in a released program.

use super::backend::{Backend, PageCache, SocketTransfer};
use super::features::Features;
use super::op::{Extent, Op, Zeroing};
use crate::range::Range;
use std::collections::BTreeMap;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex};

/// Unit of allocation, in bytes.
const BLOCK: u64 = 4096;

type Block = Box<[u8; BLOCK as usize]>;

/// A sparse disk in memory. A clone is the same disk, so a test can inspect a disk it has given away.
#[derive(Clone, Debug)]
pub(crate) struct MemoryBackend {
    size: u64,
    blocks: Arc<Mutex<BTreeMap<u64, Block>>>,
}

impl MemoryBackend {
    /// A disk of `size` bytes, all of it a hole.
    pub(crate) fn new(size: u64) -> Self {
        Self { size, blocks: Arc::default() }
    }

    /// Allocated blocks of 4 KiB.
    pub(crate) fn allocated_blocks(&self) -> usize {
        self.blocks.lock().unwrap().len()
    }

    /// All bytes of the disk.
    pub(crate) fn contents(&self) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(self.size).unwrap()];
        self.read(0, &mut bytes).unwrap();
        bytes
    }

    /// Splits a range at block boundaries, into block numbers and the bytes within each.
    fn parts(range: Range) -> impl Iterator<Item = (u64, std::ops::Range<usize>)> {
        let mut rest = range;
        std::iter::from_fn(move || {
            let (part, after) = rest.split(BLOCK - rest.offset() % BLOCK);
            rest = after;
            let start = (part.offset() % BLOCK) as usize;
            let place = start..start + part.length() as usize;
            (!part.is_empty()).then_some((part.offset() / BLOCK, place))
        })
    }

    fn zero(&self, range: Range, how: Zeroing) -> io::Result<()> {
        if how.keep_allocated {
            return self.write(range.offset(), &vec![0; range.length() as usize], false);
        }
        let mut blocks = self.blocks.lock().unwrap();
        for (block, place) in Self::parts(range) {
            if place.len() as u64 == BLOCK {
                blocks.remove(&block);
            } else if let Some(bytes) = blocks.get_mut(&block) {
                bytes[place].fill(0);
            }
        }
        Ok(())
    }

    fn range(&self, offset: u64, length: usize) -> Range {
        Range::within(self.size, offset, length as u64).expect("tests stay within the disk")
    }
}

impl Backend for MemoryBackend {
    fn size(&self) -> u64 {
        self.size
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let blocks = self.blocks.lock().unwrap();
        let mut rest = &mut into[..];
        for (block, place) in Self::parts(self.range(offset, rest.len())) {
            let (part, after) = rest.split_at_mut(place.len());
            match blocks.get(&block) {
                Some(bytes) => part.copy_from_slice(&bytes[place]),
                None => part.fill(0),
            }
            rest = after;
        }
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8], _durable: bool) -> io::Result<()> {
        let mut blocks = self.blocks.lock().unwrap();
        let mut rest = data;
        for (block, place) in Self::parts(self.range(offset, rest.len())) {
            let (part, after) = rest.split_at(place.len());
            let bytes = blocks.entry(block).or_insert_with(|| Box::new([0; BLOCK as usize]));
            bytes[place].copy_from_slice(part);
            rest = after;
        }
        Ok(())
    }

    fn execute(&self, op: &Op) -> io::Result<()> {
        match op {
            Op::Zero { range, how, .. } => self.zero(*range, *how),
            Op::Trim { range, .. } => self.zero(*range, Zeroing::default()),
            _ => Ok(()),
        }
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn page_cache(&self) -> Option<&dyn PageCache> {
        Some(self)
    }

    fn extent(&self, offset: u64) -> io::Result<Extent> {
        let allocated = self.blocks.lock().unwrap().contains_key(&(offset / BLOCK));
        let end = (offset / BLOCK + 1) * BLOCK;
        Ok(Extent { range: Range::whole(self.size).from(offset).until(end), allocated })
    }
}

impl PageCache for MemoryBackend {
    fn read_now(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.read(offset, into)
    }
}

/// A test backend that forwards every call it does not override to a disk in memory.
pub(crate) trait InMemory: std::fmt::Debug + Send + Sync {
    fn memory(&self) -> &MemoryBackend;

    fn orders_writes(&self) -> bool {
        true
    }

    fn unit(&self) -> u64 {
        1
    }

    fn features(&self) -> Features {
        Features::default()
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.memory().write(offset, data, false)
    }

    fn extent(&self, offset: u64) -> io::Result<Extent> {
        self.memory().extent(offset)
    }
}

impl<T: InMemory> Backend for T {
    fn size(&self) -> u64 {
        self.memory().size()
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.memory().read(offset, into)
    }

    fn write(&self, offset: u64, data: &[u8], _durable: bool) -> io::Result<()> {
        InMemory::write(self, offset, data)
    }

    fn execute(&self, op: &Op) -> io::Result<()> {
        self.memory().execute(op)
    }

    fn flush(&self) -> io::Result<()> {
        self.memory().flush()
    }

    fn orders_writes(&self) -> bool {
        InMemory::orders_writes(self)
    }

    fn unit(&self) -> u64 {
        InMemory::unit(self)
    }

    fn features(&self) -> Features {
        InMemory::features(self)
    }

    fn page_cache(&self) -> Option<&dyn PageCache> {
        self.memory().page_cache()
    }

    fn extent(&self, offset: u64) -> io::Result<Extent> {
        InMemory::extent(self, offset)
    }
}

/// A disk in memory with other features.
#[derive(Debug)]
pub(crate) struct Featured(pub(crate) MemoryBackend, pub(crate) Features);

impl InMemory for Featured {
    fn memory(&self) -> &MemoryBackend {
        &self.0
    }

    fn features(&self) -> Features {
        self.1
    }
}

/// An operation of a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum BackendCall {
    Read,
    /// A non-durable write.
    Write,
    DurableWrite,
    Zero,
    Trim,
    Flush,
    Prefetch,
    WriteBack,
    Extent,
    Send,
}

/// The faults to inject into a [`FailingBackend`], and the count of its operations so far.
#[derive(Debug, Default)]
pub(crate) struct Faults {
    plan: Mutex<FaultPlan>,
}

#[derive(Debug, Default)]
struct FaultPlan {
    counts: BTreeMap<BackendCall, u64>,
    /// Operations until one fails, including that one, and its errno.
    nth: Option<(u64, i32)>,
    every: BTreeMap<BackendCall, i32>,
}

impl Faults {
    /// Makes the `n`-th operation from now, of any kind and counted from 1, fail once with `errno`.
    pub(crate) fn fail_nth(&self, n: u64, errno: i32) {
        self.plan.lock().unwrap().nth = Some((n, errno));
    }

    /// Makes every operation of this kind fail with `errno`, until [`Faults::heal`].
    pub(crate) fn fail_every(&self, op: BackendCall, errno: i32) {
        self.plan.lock().unwrap().every.insert(op, errno);
    }

    /// Removes all faults; the counts go on.
    pub(crate) fn heal(&self) {
        let mut plan = self.plan.lock().unwrap();
        plan.nth = None;
        plan.every.clear();
    }

    /// Operations of this kind so far, including failed ones.
    pub(crate) fn count(&self, op: BackendCall) -> u64 {
        self.plan.lock().unwrap().counts.get(&op).copied().unwrap_or(0)
    }

    /// Operations so far, including failed ones.
    pub(crate) fn total(&self) -> u64 {
        self.plan.lock().unwrap().counts.values().sum()
    }

    /// Counts an operation, and fails it if a fault is due.
    fn pass(&self, op: BackendCall) -> io::Result<()> {
        let mut plan = self.plan.lock().unwrap();
        *plan.counts.entry(op).or_insert(0) += 1;
        let nth = plan.nth.take();
        plan.nth = nth.filter(|(left, _)| *left > 1).map(|(left, errno)| (left - 1, errno));
        let now = nth.filter(|(left, _)| *left == 1).map(|(_, errno)| errno);
        match now.or_else(|| plan.every.get(&op).copied()) {
            Some(errno) => Err(io::Error::from_raw_os_error(errno)),
            None => Ok(()),
        }
    }
}

/// A backend whose operations fail as its [`Faults`] plan, without executing them.
#[derive(Debug)]
pub(crate) struct FailingBackend {
    image: Box<dyn Backend>,
    faults: Arc<Faults>,
}

impl FailingBackend {
    /// Wraps `image`; `faults` stays with the test.
    pub(crate) fn new(image: impl Backend + 'static, faults: Arc<Faults>) -> Self {
        Self { image: Box::new(image), faults }
    }
}

impl Backend for FailingBackend {
    fn size(&self) -> u64 {
        self.image.size()
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.faults.pass(BackendCall::Read)?;
        self.image.read(offset, into)
    }

    fn write(&self, offset: u64, data: &[u8], durable: bool) -> io::Result<()> {
        self.faults.pass(if durable { BackendCall::DurableWrite } else { BackendCall::Write })?;
        self.image.write(offset, data, durable)
    }

    fn execute(&self, op: &Op) -> io::Result<()> {
        self.faults.pass(match op {
            Op::Zero { .. } => BackendCall::Zero,
            Op::Trim { .. } => BackendCall::Trim,
            _ => BackendCall::Prefetch,
        })?;
        self.image.execute(op)
    }

    fn works_by_extent(&self, op: &Op) -> bool {
        self.image.works_by_extent(op)
    }

    fn flush(&self) -> io::Result<()> {
        self.faults.pass(BackendCall::Flush)?;
        self.image.flush()
    }

    fn page_cache(&self) -> Option<&dyn PageCache> {
        self.image.page_cache().map(|_| self as &dyn PageCache)
    }

    fn socket_transfer(&self) -> Option<&dyn SocketTransfer> {
        Some(self)
    }

    fn extent(&self, offset: u64) -> io::Result<Extent> {
        self.faults.pass(BackendCall::Extent)?;
        self.image.extent(offset)
    }
}

impl PageCache for FailingBackend {
    fn read_now(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.faults.pass(BackendCall::Read)?;
        match self.image.page_cache() {
            Some(cache) => cache.read_now(offset, into),
            None => Err(io::ErrorKind::WouldBlock.into()),
        }
    }

    fn start_write_back(&self, range: Range) -> io::Result<()> {
        self.faults.pass(BackendCall::WriteBack)?;
        self.image.page_cache().map_or(Ok(()), |cache| cache.start_write_back(range))
    }
}

impl SocketTransfer for FailingBackend {
    fn pin(&self, _offset: u64, _length: usize, _pipe: BorrowedFd<'_>) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn send(&self, offset: u64, length: usize, to: BorrowedFd<'_>) -> io::Result<usize> {
        self.faults.pass(BackendCall::Send)?;
        match self.image.socket_transfer() {
            Some(transfer) => transfer.send(offset, length, to),
            None => Err(io::ErrorKind::Unsupported.into()),
        }
    }
}
