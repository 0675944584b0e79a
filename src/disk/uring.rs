//! An I/O queue on a file or block device by `io_uring(7)`.
//! Makes no decisions, and never looks at bytes. The kernel zeroes whole blocks; the edges of a
//! zeroing are written synchronously afterwards.

use super::io_queue::{Completion, IoQueue, OpId};
use super::op::{Op, Zeroing};
use super::syscalls;
use crate::range::Range;
use io_uring::{IoUring, Probe, opcode, squeue, types};
use nix::errno::Errno;
use nix::fcntl::FallocateFlags;
use nix::libc;
use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::mem::{self, MaybeUninit};
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::thread;
use std::time::Duration;

/// Most entries submitted at once; twice as many can be in flight.
const ENTRIES: u32 = 128;
/// Most entries in flight: the size of the completion queue.
const IN_KERNEL_MAX: usize = 2 * ENTRIES as usize;
/// Longest read, in bytes, without an advice before it. (Without `POSIX_FADV_WILLNEED` the kernel reads
/// a longer one in steps of 128 KiB, one after another, and a mix of 256 KiB and 1 MiB reads took a
/// seventh longer.)
const READ_WITHOUT_ADVICE_MAX: u64 = 64 << 10;
/// Longest block of a file system, in bytes, whose edges are read before a zeroing.
const EDGE_MAX: usize = 64 << 10;
/// Most threads that the kernel may create for operations that block.
const KERNEL_THREADS_MAX: u32 = 8;
/// How long to wait before submitting again when the kernel is short of memory.
const RETRY: Duration = Duration::from_millis(1);
/// User data of entries whose completion is ignored.
const IGNORED: u64 = u64::MAX;

/// The file or block device that a ring does its I/O on.
pub(super) trait RingFile {
    /// The descriptor, open as long as `self`.
    fn fd(&self) -> RawFd;
    /// Whether to try writes with `RWF_DSYNC`.
    fn writes_durably(&self) -> bool;
    /// Whether to read into the kernel's page cache.
    fn has_page_cache(&self) -> bool;
    /// Whether the kernel can read or write these bytes with a buffer that is aligned to
    /// [`super::Backend::unit`].
    fn can_transfer(&self, offset: u64, length: usize) -> bool;
    /// The call that makes the whole blocks of `range` read as zeros; the caller writes the rest
    /// afterwards ([`RingFile::zero_edges`]). `None` if there are no whole blocks, if it takes more
    /// than one call, or if the call turned out to be unsupported.
    fn zero_call(&self, range: Range, how: Zeroing) -> Option<FallocateCall>;
    /// The call that deallocates the whole blocks of `range`; `None` as for [`RingFile::zero_call`].
    fn trim_call(&self, range: Range) -> Option<FallocateCall>;
    /// The blocks that `range` covers in part: a write to them reads them first.
    fn edges(&self, range: Range) -> Vec<Range>;
    /// Writes zeros over the bytes outside the whole blocks of `range`. A hole stays one, because it
    /// reads as zeros already, unless the range has to be `allocated`.
    fn zero_edges(&self, range: Range, allocated: bool) -> io::Result<()>;
}

/// One call of `fallocate(2)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FallocateCall {
    /// Without `FALLOC_FL_KEEP_SIZE`, which is always added.
    pub(super) mode: FallocateFlags,
    /// The range, whole blocks.
    pub(super) blocks: Range,
}

/// The ring of one session. It owns all memory that the kernel may access until the kernel is done.
pub(super) struct Uring<'a> {
    file: &'a dyn RingFile,
    ring: IoUring,
    /// The kernel accepted no submission while none was in flight, so nothing is submitted any more.
    broken: bool,
    in_flight: BTreeMap<u64, Submitted>,
    /// Entries that wait for room in the ring.
    queue: VecDeque<squeue::Entry>,
    /// Entries in the ring that the kernel has not accepted.
    in_ring: usize,
    /// Entries that the kernel has accepted and not completed.
    in_kernel: usize,
    completed: VecDeque<Completion>,
    /// Where the edges of zeroings are read to; its bytes are never looked at.
    scratch: Box<[MaybeUninit<u8>]>,
}

#[derive(Debug)]
struct Submitted {
    op: Op,
    /// Bytes read or written so far.
    done: usize,
    /// Where an [`Op::Load`] reads to.
    parts: ScratchParts,
}

/// The scratch memory of a ring, as many times as it takes for a range.
#[derive(Default)]
struct ScratchParts(Vec<libc::iovec>);

impl ScratchParts {
    fn cover(&mut self, length: u64, scratch: &mut [MaybeUninit<u8>]) {
        let step = scratch.len() as u64;
        let iov_base = scratch.as_mut_ptr().cast();
        // They fit: at most the length of the scratch memory.
        let part = |at: u64| libc::iovec { iov_base, iov_len: step.min(length - at) as usize };
        self.0 = (0..length).step_by(scratch.len()).map(part).collect();
    }
}

impl std::fmt::Debug for ScratchParts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} parts", self.0.len())
    }
}

impl<'a> Uring<'a> {
    /// A ring for I/O on `file`. Each completion adds to the eventfd `notifier`.
    ///
    /// # Errors
    /// When the kernel lacks io_uring or an operation of it, forbids it, or has no memory for it.
    pub(super) fn new(file: &'a dyn RingFile, notifier: BorrowedFd<'_>) -> io::Result<Self> {
        // Completions may wait until we enter the kernel: Linux 6.0 and later.
        let mut builder = IoUring::builder();
        builder.setup_coop_taskrun().setup_single_issuer();
        let ring = builder.build(ENTRIES).or_else(|_| IoUring::new(ENTRIES))?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        if !supports_all(&probe) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        // Linux 5.15 and later; earlier kernels use four for each processor.
        let _ = ring.submitter().register_iowq_max_workers(&mut [KERNEL_THREADS_MAX; 2]);
        Self::with(ring, file, notifier)
    }

    fn with(ring: IoUring, file: &'a dyn RingFile, notifier: BorrowedFd<'_>) -> io::Result<Self> {
        ring.submitter().register_eventfd(notifier.as_raw_fd())?;
        let mut scratch = Vec::new();
        scratch.try_reserve_exact(EDGE_MAX).map_err(|_| io::Error::from(Errno::ENOMEM))?;
        scratch.resize(EDGE_MAX, MaybeUninit::uninit());
        Ok(Self {
            file,
            ring,
            broken: false,
            in_flight: BTreeMap::new(),
            queue: VecDeque::new(),
            in_ring: 0,
            in_kernel: 0,
            completed: VecDeque::new(),
            scratch: scratch.into_boxed_slice(),
        })
    }

    /// The entries that execute an operation; `None` if the kernel cannot.
    fn entries(
        &mut self,
        key: u64,
        op: &mut Op,
        parts: &mut ScratchParts,
    ) -> Option<Vec<squeue::Entry>> {
        match op {
            Op::Read { offset, data } => {
                let can = self.file.can_transfer(*offset, data.len());
                can.then(|| self.read(key, *offset, data))
            }
            Op::Cache(range) => {
                let can = self.file.has_page_cache();
                can.then(|| vec![self.advice(*range).user_data(key)])
            }
            Op::Load(range) => Some(self.load(key, *range, parts)),
            Op::Write { durable: true, .. } if !self.file.writes_durably() => None,
            Op::Write { offset, data, durable } => {
                let can = self.file.can_transfer(*offset, data.len());
                can.then(|| vec![self.write(key, *offset, data, *durable)])
            }
            Op::Flush => {
                let flush = opcode::Fsync::new(self.fd()).flags(types::FsyncFlags::DATASYNC);
                Some(vec![flush.build().user_data(key)])
            }
            Op::Zero { range, how, .. } => {
                let step = self.file.zero_call(*range, *how)?;
                // The edges are written synchronously afterwards; read them, so that this does not
                // wait for the device.
                let edges = self.file.edges(*range);
                let link = squeue::Flags::IO_HARDLINK;
                let reads = edges.into_iter().map(|edge| self.read_edge(edge).flags(link));
                let mut entries: Vec<_> = reads.collect();
                entries.push(self.fallocate(key, step));
                Some(entries)
            }
            Op::Trim { range, .. } => {
                let step = self.file.trim_call(*range)?;
                Some(vec![self.fallocate(key, step)])
            }
            Op::Extents { .. } => None,
        }
    }

    /// A read into `data`, which must not move or be freed until the entry completes.
    fn read(&self, key: u64, offset: u64, data: &mut [u8]) -> Vec<squeue::Entry> {
        let length = u32::try_from(data.len()).unwrap_or(u32::MAX);
        let read = opcode::Read::new(self.fd(), data.as_mut_ptr(), length).offset(offset);
        let range = Range::whole(u64::MAX).from(offset).split(data.len() as u64).0;
        self.advised(range, read.build().user_data(key))
    }

    /// A read of `range` that leaves its bytes in the page cache only: all of it goes into the same scratch
    /// memory. (A read into a buffer of this process took 1.3 times the processor time for 64 KiB
    /// and 1.5 times for 256 KiB: `cargo bench --bench peers -- --only cold`.)
    fn load(&mut self, key: u64, range: Range, parts: &mut ScratchParts) -> Vec<squeue::Entry> {
        parts.cover(range.length(), &mut self.scratch);
        let (first, count) = (parts.0.as_ptr(), parts.0.len() as u32);
        let read = opcode::Readv::new(self.fd(), first, count).offset(range.offset());
        self.advised(range, read.build().user_data(key))
    }

    /// A read of `range`, behind an advice to the kernel if the range is long.
    fn advised(&self, range: Range, read: squeue::Entry) -> Vec<squeue::Entry> {
        if range.length() <= READ_WITHOUT_ADVICE_MAX || !self.file.has_page_cache() {
            return vec![read];
        }
        // A hard link, so that the read is executed even if the advice fails.
        let link = squeue::Flags::IO_HARDLINK;
        vec![self.advice(range).user_data(IGNORED).flags(link), read]
    }

    fn read_edge(&mut self, edge: Range) -> squeue::Entry {
        // Fits: at most the length of the scratch buffer.
        let length = edge.length().min(self.scratch.len() as u64) as u32;
        let scratch = self.scratch.as_mut_ptr().cast();
        let read = opcode::Read::new(self.fd(), scratch, length).offset(edge.offset());
        read.build().user_data(IGNORED)
    }

    fn advice(&self, range: Range) -> squeue::Entry {
        // The entry has 32 bits for it, and the kernel reads less than that ahead for one advice.
        let length = range.length().min(u32::MAX.into()) as libc::off_t;
        let advice = opcode::Fadvise::new(self.fd(), length, libc::POSIX_FADV_WILLNEED);
        advice.offset(range.offset()).build()
    }

    /// A write of `data`, which must not move or be freed until the entry completes.
    fn write(&self, key: u64, offset: u64, data: &[u8], durable: bool) -> squeue::Entry {
        let length = u32::try_from(data.len()).unwrap_or(u32::MAX);
        let write = opcode::Write::new(self.fd(), data.as_ptr(), length).offset(offset);
        let flags = if durable { libc::RWF_DSYNC } else { 0 };
        write.rw_flags(flags).build().user_data(key)
    }

    fn fallocate(&self, key: u64, step: FallocateCall) -> squeue::Entry {
        let mode = (step.mode | FallocateFlags::FALLOC_FL_KEEP_SIZE).bits();
        let entry = opcode::Fallocate::new(self.fd(), step.blocks.length());
        entry.offset(step.blocks.offset()).mode(mode).build().user_data(key)
    }

    fn fd(&self) -> types::Fd {
        types::Fd(self.file.fd())
    }

    /// Moves as many queued entries into the ring as there is room for.
    fn fill(&mut self) {
        while self.in_ring + self.in_kernel < IN_KERNEL_MAX
            && let Some(entry) = self.queue.front()
        {
            // SAFETY: the entry points to `scratch`, or to the data or parts of an operation in `in_flight`, whose
            // memory is not moved, dropped or accessed before the entry completes: `on_result` removes
            // the operation only then, and `drop` waits for it or leaks both.
            if unsafe { self.ring.submission().push(entry) }.is_err() {
                break;
            }
            self.queue.pop_front();
            self.in_ring += 1;
        }
    }

    /// Submits the entries in the ring; false if the kernel accepts none now.
    fn submit_ring(&mut self) -> bool {
        loop {
            match self.ring.submit() {
                Ok(count) => {
                    self.in_ring -= count;
                    self.in_kernel += count;
                    return count > 0;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return false,
            }
        }
    }

    /// Returns all queued operations to the caller: the kernel accepts no submissions and none are in
    /// flight.
    fn fail_all(&mut self) {
        self.broken = true;
        self.queue.clear();
        for (key, Submitted { op, .. }) in mem::take(&mut self.in_flight) {
            self.completed.push_back(Completion { key, op, outcome: None });
        }
    }

    /// Takes all entries of the completion queue.
    fn collect(&mut self) {
        loop {
            let Some(entry) = self.ring.completion().next() else { return };
            self.in_kernel -= 1;
            let (key, result) = (entry.user_data(), entry.result());
            if let Some(submitted) = self.in_flight.remove(&key) {
                self.on_result(key, submitted, result);
            }
        }
    }

    /// Completes an operation with the result of its last entry, or resubmits the rest of it.
    fn on_result(&mut self, key: u64, submitted: Submitted, result: i32) {
        let Submitted { op, done, parts } = submitted;
        let errno = Errno::from_raw(result.saturating_neg().max(0));
        if result < 0 && matches!(errno, Errno::EINTR | Errno::EAGAIN) {
            return self.resubmit(key, Submitted { op, done, parts });
        }
        let outcome = match (&op, result) {
            (Op::Read { .. } | Op::Write { .. } | Op::Load(_), 1..) => {
                let done = done + result.unsigned_abs() as usize;
                if done < op.memory() {
                    return self.resubmit(key, Submitted { op, done, parts });
                }
                Some(Ok(()))
            }
            // The file became shorter; a blocking read tells.
            (Op::Read { .. } | Op::Load(_), 0) => None,
            (Op::Write { .. }, 0) => Some(Err(io::ErrorKind::WriteZero.into())),
            (Op::Zero { range, how, .. }, 0..) => {
                Some(self.file.zero_edges(*range, how.keep_allocated))
            }
            (_, 0..) => Some(Ok(())),
            (Op::Zero { .. } | Op::Trim { .. }, _) if syscalls::is_unable(errno) => None,
            _ if matches!(errno, Errno::EOPNOTSUPP | Errno::ENOSYS) => None,
            // The disk is full, or the device has become shorter; a blocking write tells.
            (Op::Write { .. }, _) if errno == Errno::ENOSPC => None,
            // The kernel refuses the alignment. A thread tries again, with aligned memory.
            (Op::Read { .. } | Op::Write { .. }, _) if errno == Errno::EINVAL => None,
            // The kernel could not create a thread (`TasksMax=`) and has not executed the operation.
            _ if errno == Errno::ECANCELED => None,
            _ => Some(Err(errno.into())),
        };
        self.completed.push_back(Completion { key, op, outcome });
    }

    /// Queues the rest of an operation again, or returns it if the kernel has turned out to be unable
    /// to execute it.
    fn resubmit(&mut self, key: u64, submitted: Submitted) {
        let Submitted { mut op, done, mut parts } = submitted;
        let entries = match &mut op {
            // An I/O that ended within a unit cannot continue there.
            Op::Write { offset, data, .. } | Op::Read { offset, data }
                if !self.file.can_transfer(*offset + done as u64, data.len() - done) =>
            {
                None
            }
            Op::Write { offset, data, durable } => {
                Some(vec![self.write(key, *offset + done as u64, &data[done..], *durable)])
            }
            Op::Read { offset, data } => {
                Some(self.read(key, *offset + done as u64, &mut data[done..]))
            }
            Op::Load(range) => {
                let rest = range.from(range.offset() + done as u64);
                Some(self.load(key, rest, &mut parts))
            }
            op => self.entries(key, op, &mut parts),
        };
        match entries {
            Some(entries) => {
                self.queue.extend(entries);
                self.in_flight.insert(key, Submitted { op, done, parts });
            }
            None => self.completed.push_back(Completion { key, op, outcome: None }),
        }
    }
}

/// Whether the kernel supports all operations used here. One that does not fails with `EINVAL`, which
/// would be taken for the result of the call. Some are newer than io_uring itself (Linux 5.6).
fn supports_all(probe: &Probe) -> bool {
    let codes = [
        opcode::Read::CODE,
        opcode::Readv::CODE,
        opcode::Write::CODE,
        opcode::Fsync::CODE,
        opcode::Fallocate::CODE,
        opcode::Fadvise::CODE,
    ];
    codes.into_iter().all(|code| probe.is_supported(code))
}

impl IoQueue for Uring<'_> {
    fn push(&mut self, OpId { key, .. }: OpId, mut op: Op) -> Result<(), Op> {
        if self.broken {
            return Err(op);
        }
        let mut parts = ScratchParts::default();
        let Some(entries) = self.entries(key, &mut op, &mut parts) else { return Err(op) };
        self.queue.extend(entries);
        self.in_flight.insert(key, Submitted { op, done: 0, parts });
        Ok(())
    }

    fn submit(&mut self) -> bool {
        // A broken ring may hold entries that point to freed memory.
        while !self.broken {
            self.fill();
            if self.in_ring == 0 {
                break;
            }
            if !self.submit_ring() {
                // With entries in flight the kernel may only be short of memory until one completes.
                if self.in_kernel == 0 {
                    self.fail_all();
                    return false;
                }
                break;
            }
        }
        true
    }

    fn poll(&mut self) -> Option<Completion> {
        if self.completed.is_empty() {
            self.collect();
        }
        self.completed.pop_front()
    }

    fn wait(&mut self) {
        loop {
            self.collect();
            // Resubmitted calls have to be submitted, or they would never complete.
            self.submit();
            if !self.completed.is_empty() || self.in_kernel == 0 {
                return;
            }
            match self.ring.submitter().submit_and_wait(1) {
                // It may have accepted entries as well.
                Ok(count) => {
                    self.in_ring -= count;
                    self.in_kernel += count;
                }
                Err(error) => match error.raw_os_error().map(Errno::from_raw) {
                    Some(Errno::EINTR) => {}
                    // It accepted nothing, and therefore did not wait; entries in flight go on.
                    Some(Errno::EAGAIN | Errno::EBUSY | Errno::ENOMEM) => thread::sleep(RETRY),
                    _ => return,
                },
            }
        }
    }
}

impl Drop for Uring<'_> {
    fn drop(&mut self) {
        while self.in_kernel > 0 {
            self.completed.clear();
            self.wait();
            if self.completed.is_empty() && self.in_kernel > 0 {
                // The wait failed. Leak the memory that the kernel may still access.
                mem::forget(mem::take(&mut self.in_flight));
                mem::forget(mem::take(&mut self.scratch));
                return;
            }
        }
    }
}

impl std::fmt::Debug for Uring<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Uring").field("in_flight", &self.in_flight).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod direct_tests;
#[cfg(test)]
mod tests;
