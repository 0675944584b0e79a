//! Calls to a file or block device that the kernel makes meanwhile (`io_uring(7)`).
//! Only carries them: never decides what is called, and never looks at what is loaded. Of a zeroing it
//! lets the kernel do the whole blocks, and then has the image write the edges.

use super::io_queue::{Call, Completion, IoQueue, Zeroing};
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

/// How many entries are submitted at once; twice as many can be under way.
const ENTRIES: u32 = 128;
/// How many entries can be under way: as many results as the kernel has room for.
const IN_KERNEL_MAX: usize = 2 * ENTRIES as usize;
/// Up to this length a range is loaded by reading it. A longer one by advice, and by reading its
/// last byte to know when it is there: bytes that nobody looks at are not worth copying. (To read
/// it in steps of 128 KiB made mixed loads of 256 KiB and 1 MiB from a disk a seventh slower.)
const LOAD_BY_READING_MAX: u64 = 64 << 10;
/// How many threads the kernel may make for what it cannot do without waiting.
const KERNEL_THREADS_MAX: u32 = 8;
/// How long to leave the kernel alone when it is short of memory.
const RETRY: Duration = Duration::from_millis(1);
/// Marks entries of which the end is of no interest.
const NOBODY: u64 = u64::MAX;

/// The file or block device that a ring does its I/O on.
pub(super) trait RingFile {
    /// The descriptor, open as long as `self`.
    fn fd(&self) -> RawFd;
    /// Whether to try writes with `RWF_DSYNC`.
    fn writes_durably(&self) -> bool;
    /// The call that makes the whole blocks of `range` read as zeros; the caller writes the rest
    /// afterwards ([`RingFile::zero_edges`]). `None` if there are no whole blocks, if it takes more
    /// than one call, or if the call turned out to be unsupported.
    fn zero_call(&self, range: Range, how: Zeroing) -> Option<FallocateCall>;
    /// The call that deallocates the whole blocks of `range`; `None` as for [`RingFile::zero_call`].
    fn trim_call(&self, range: Range) -> Option<FallocateCall>;
    /// The blocks that `range` covers in part: a write to them reads them first.
    fn edges(&self, range: Range) -> Vec<Range>;
    /// Writes zeros over what lies outside the whole blocks of `range`. A hole stays one, because it
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

/// A ring of one session. Whatever the kernel may still touch belongs to it until the kernel is
/// done.
pub(super) struct Uring<'a> {
    file: &'a dyn RingFile,
    ring: IoUring,
    /// Whether the kernel would take nothing when nothing was under way; then it is not asked again.
    broken: bool,
    begun: BTreeMap<u64, Submitted>,
    /// Entries that the ring has had no room for yet.
    queue: VecDeque<squeue::Entry>,
    /// Entries in the ring that the kernel has not taken.
    in_ring: usize,
    /// Entries that the kernel has taken and not ended.
    in_kernel: usize,
    over: VecDeque<Completion>,
    /// Where all loads land. Nobody ever reads it.
    landing: Box<[MaybeUninit<u8>]>,
}

#[derive(Debug)]
struct Submitted {
    call: Call,
    /// Bytes of a write that have been written.
    done: usize,
}

impl<'a> Uring<'a> {
    /// A ring for work on `image`, of which each result adds to the eventfd `bell`.
    ///
    /// # Errors
    /// When the kernel has no such thing, forbids it, or has no memory for it.
    pub(super) fn new(file: &'a dyn RingFile, notifier: BorrowedFd<'_>) -> io::Result<Self> {
        // Results are wanted when we come by, not at once: known since Linux 6.0.
        let mut builder = IoUring::builder();
        builder.setup_coop_taskrun().setup_single_issuer();
        let ring = builder.build(ENTRIES).or_else(|_| IoUring::new(ENTRIES))?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        if !knows_all(&probe) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        // Known since Linux 5.15; before, four for each processor.
        let _ = ring.submitter().register_iowq_max_workers(&mut [KERNEL_THREADS_MAX; 2]);
        Self::with(ring, file, notifier)
    }

    fn with(ring: IoUring, file: &'a dyn RingFile, notifier: BorrowedFd<'_>) -> io::Result<Self> {
        ring.submitter().register_eventfd(notifier.as_raw_fd())?;
        let mut landing = Vec::new();
        let length = LOAD_BY_READING_MAX as usize;
        landing.try_reserve_exact(length).map_err(|_| io::Error::from(Errno::ENOMEM))?;
        landing.resize(length, MaybeUninit::uninit());
        Ok(Self {
            file,
            ring,
            broken: false,
            begun: BTreeMap::new(),
            queue: VecDeque::new(),
            in_ring: 0,
            in_kernel: 0,
            over: VecDeque::new(),
            landing: landing.into_boxed_slice(),
        })
    }

    /// The entries that make a call.
    fn entries(&mut self, key: u64, call: &Call) -> Option<Vec<squeue::Entry>> {
        match call {
            Call::Populate(range) => Some(self.load(key, *range)),
            Call::Prefetch(range) => Some(vec![self.advice(*range).user_data(key)]),
            Call::Write { offset, data } => {
                self.file.writes_durably().then(|| vec![self.write(key, *offset, data)])
            }
            Call::Flush => {
                let flush = opcode::Fsync::new(self.fd()).flags(types::FsyncFlags::DATASYNC);
                Some(vec![flush.build().user_data(key)])
            }
            Call::Zero(range, how) => {
                let step = self.file.zero_call(*range, *how)?;
                // The edges are written when the rest is done, and should not wait for a disk then.
                let edges = self.file.edges(*range);
                let link = squeue::Flags::IO_HARDLINK;
                let loads = edges.into_iter().map(|edge| self.read(NOBODY, edge).flags(link));
                let mut entries: Vec<_> = loads.collect();
                entries.push(self.allocation(key, step));
                Some(entries)
            }
            Call::Trim(range) => {
                let step = self.file.trim_call(*range)?;
                Some(vec![self.allocation(key, step)])
            }
        }
    }

    fn load(&mut self, key: u64, range: Range) -> Vec<squeue::Entry> {
        if range.length() <= LOAD_BY_READING_MAX {
            return vec![self.read(key, range)];
        }
        let advice = self.advice(range).user_data(NOBODY).flags(squeue::Flags::IO_LINK);
        vec![advice, self.read(key, range.from(range.end() - 1))]
    }

    fn read(&mut self, key: u64, range: Range) -> squeue::Entry {
        // It fits: no more than where it lands.
        let length = range.length().min(self.landing.len() as u64) as u32;
        let landing = self.landing.as_mut_ptr().cast();
        opcode::Read::new(self.fd(), landing, length).offset(range.offset()).build().user_data(key)
    }

    fn advice(&self, range: Range) -> squeue::Entry {
        // The entry has 32 bits for it, and the kernel loads less than that for one advice.
        let length = range.length().min(u32::MAX.into()) as libc::off_t;
        let advice = opcode::Fadvise::new(self.fd(), length, libc::POSIX_FADV_WILLNEED);
        advice.offset(range.offset()).build()
    }

    /// A write of `data`, which has to stay where it is until the entry has ended.
    fn write(&self, key: u64, offset: u64, data: &[u8]) -> squeue::Entry {
        let length = u32::try_from(data.len()).unwrap_or(u32::MAX);
        let write = opcode::Write::new(self.fd(), data.as_ptr(), length).offset(offset);
        write.rw_flags(libc::RWF_DSYNC).build().user_data(key)
    }

    fn allocation(&self, key: u64, step: FallocateCall) -> squeue::Entry {
        let mode = (step.mode | FallocateFlags::FALLOC_FL_KEEP_SIZE).bits();
        let allocation = opcode::Fallocate::new(self.fd(), step.blocks.length());
        allocation.offset(step.blocks.offset()).mode(mode).build().user_data(key)
    }

    fn fd(&self) -> types::Fd {
        types::Fd(self.file.fd())
    }

    /// Puts as many entries into the ring as there is room for.
    fn fill(&mut self) {
        while self.in_ring + self.in_kernel < IN_KERNEL_MAX
            && let Some(entry) = self.queue.front()
        {
            // SAFETY: what the entry points to is `landing` or the data of a call in `begun`, which
            // is not moved or dropped before the entry has ended: `take` removes it only then, and
            // `drop` waits for it or leaks it.
            if unsafe { self.ring.submission().push(entry) }.is_err() {
                break;
            }
            self.queue.pop_front();
            self.in_ring += 1;
        }
    }

    /// Gives the kernel what is in the ring; false if it takes nothing now.
    fn hand_over(&mut self) -> bool {
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

    /// Returns everything unmade: the kernel takes nothing, and has nothing that could end.
    fn give_up(&mut self) {
        self.broken = true;
        self.queue.clear();
        for (key, Submitted { call, .. }) in mem::take(&mut self.begun) {
            self.over.push_back(Completion { key, call, outcome: None });
        }
    }

    /// Takes all results that there are.
    fn collect(&mut self) {
        loop {
            let Some(entry) = self.ring.completion().next() else { return };
            self.in_kernel -= 1;
            let (key, result) = (entry.user_data(), entry.result());
            if let Some(begun) = self.begun.remove(&key) {
                self.take(key, begun, result);
            }
        }
    }

    /// Ends a call with the result of its last entry, or goes on with it.
    fn take(&mut self, key: u64, begun: Submitted, result: i32) {
        let Submitted { call, mut done } = begun;
        let errno = Errno::from_raw(result.saturating_neg().max(0));
        let again = matches!(errno, Errno::EINTR | Errno::EAGAIN);
        if result < 0 && again && !matches!(call, Call::Populate(_)) {
            return self.again(key, Submitted { call, done });
        }
        let outcome = match (&call, result) {
            // Whatever is wrong with it will be told when it is read.
            (Call::Populate(_), _) => Some(Ok(())),
            (Call::Write { data, .. }, 1..) => {
                done += result.unsigned_abs() as usize;
                if done < data.len() {
                    return self.again(key, Submitted { call, done });
                }
                Some(Ok(()))
            }
            (Call::Write { .. }, 0) => Some(Err(io::ErrorKind::WriteZero.into())),
            (Call::Zero(range, how), 0..) => Some(self.file.zero_edges(*range, how.keep_allocated)),
            (_, 0..) => Some(Ok(())),
            (Call::Zero(..) | Call::Trim(_), _) if syscalls::is_unable(errno) => None,
            _ if matches!(errno, Errno::EOPNOTSUPP | Errno::ENOSYS) => None,
            // The kernel may have no more threads (`TasksMax=`): it has not made it, but we can.
            _ if errno == Errno::ECANCELED => None,
            _ => Some(Err(errno.into())),
        };
        self.over.push_back(Completion { key, call, outcome });
    }

    /// Puts what is left of a call in line once more. It may have turned out meanwhile that it
    /// cannot be made here.
    fn again(&mut self, key: u64, begun: Submitted) {
        let entries = match &begun.call {
            Call::Write { offset, data } => {
                let rest = &data[begun.done..];
                Some(vec![self.write(key, offset + begun.done as u64, rest)])
            }
            call => self.entries(key, call),
        };
        match entries {
            Some(entries) => {
                self.queue.extend(entries);
                self.begun.insert(key, begun);
            }
            None => self.over.push_back(Completion { key, call: begun.call, outcome: None }),
        }
    }
}

/// Whether a kernel knows all that we ask of it: one that does not would say `EINVAL`, which we would
/// take for what became of the call. Not all of it came with io_uring itself (Linux 5.6).
fn knows_all(probe: &Probe) -> bool {
    let codes = [
        opcode::Read::CODE,
        opcode::Write::CODE,
        opcode::Fsync::CODE,
        opcode::Fallocate::CODE,
        opcode::Fadvise::CODE,
    ];
    codes.into_iter().all(|code| probe.is_supported(code))
}

impl IoQueue for Uring<'_> {
    fn begin(&mut self, key: u64, call: Call) -> Result<(), Call> {
        if self.broken {
            return Err(call);
        }
        let Some(entries) = self.entries(key, &call) else { return Err(call) };
        self.queue.extend(entries);
        self.begun.insert(key, Submitted { call, done: 0 });
        Ok(())
    }

    fn submit(&mut self) -> bool {
        // What is still in a ring that was given up points to memory that is not ours any more.
        while !self.broken {
            self.fill();
            if self.in_ring == 0 {
                break;
            }
            if !self.hand_over() {
                // It may be short of memory until something has ended.
                if self.in_kernel == 0 {
                    self.give_up();
                    return false;
                }
                break;
            }
        }
        true
    }

    fn finished(&mut self) -> Option<Completion> {
        if self.over.is_empty() {
            self.collect();
        }
        self.over.pop_front()
    }

    fn wait(&mut self) {
        loop {
            self.collect();
            // Calls that have to go on are begun, too: they are not over before.
            self.submit();
            if !self.over.is_empty() || self.in_kernel == 0 {
                return;
            }
            match self.ring.submitter().submit_and_wait(1) {
                // What it took besides is counted.
                Ok(count) => {
                    self.in_ring -= count;
                    self.in_kernel += count;
                }
                Err(error) => match error.raw_os_error().map(Errno::from_raw) {
                    Some(Errno::EINTR) => {}
                    // It took nothing, and therefore did not wait: what it has ends all the same.
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
            self.over.clear();
            self.wait();
            if self.over.is_empty() && self.in_kernel > 0 {
                // The kernel does not tell: better to lose memory than to let it write there.
                mem::forget(mem::take(&mut self.begun));
                mem::forget(mem::take(&mut self.landing));
                return;
            }
        }
    }
}

impl std::fmt::Debug for Uring<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Uring").field("begun", &self.begun).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::super::slow::TestNotifier;
    use super::super::{Access, Backend, FileBackend, Notifier};
    use super::*;
    use tempfile::TempDir;

    fn image() -> (TempDir, FileBackend) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk.img");
        let image = FileBackend::create(&path, 1 << 20, Access::default()).unwrap();
        (folder, image)
    }

    /// A ring that the kernel does not look into before it is enabled.
    fn disabled<'a>(image: &'a FileBackend, notifier: &TestNotifier) -> Option<Uring<'a>> {
        let ring = IoUring::builder().setup_r_disabled().build(ENTRIES);
        Uring::with(ring.ok()?, image, notifier.as_eventfd()).ok()
    }

    fn write(byte: u8) -> Call {
        Call::Write { offset: 0, data: vec![byte; 4096] }
    }

    #[test]
    fn what_the_kernel_does_not_take_is_given_back_and_never_made_by_it_later() {
        let ((_folder, image), notifier) = (image(), TestNotifier::default());
        let Some(mut ring) = disabled(&image, &notifier) else { return };
        ring.begin(1, write(1)).unwrap();
        ring.begin(2, Call::Flush).unwrap();
        assert!(!ring.submit(), "nobody rings for it");
        for key in [1, 2] {
            let made = ring.finished().unwrap();
            assert!(made.key == key && made.outcome.is_none());
        }
        assert_eq!(ring.begin(3, write(3)), Err(write(3)));
        // What was taken back has been freed by now: the kernel must not come for it.
        ring.ring.submitter().register_enable_rings().unwrap();
        assert!(ring.submit());
        ring.wait();
        drop(ring);
        let mut found = [9; 4096];
        image.read(0, &mut found).unwrap();
        assert!(found == [0; 4096]);
    }

    #[test]
    fn whoever_waits_for_a_call_that_has_to_go_on_waits_until_it_is_over() {
        let ((_folder, image), notifier) = (image(), TestNotifier::default());
        let Ok(mut ring) = Uring::new(&image, notifier.as_eventfd()) else { return };
        // As after a part of it was written.
        ring.again(1, Submitted { call: write(1), done: 512 });
        ring.wait();
        let made = ring.finished().expect("it has been waited for");
        assert!(made.key == 1 && matches!(made.outcome, Some(Ok(()))), "{:?}", made.outcome);
        let mut found = [9; 4096];
        image.read(0, &mut found).unwrap();
        assert!(found[..512] == [0; 512] && found[512..] == [1; 3584]);
    }

    #[test]
    fn what_the_kernel_has_no_thread_for_is_left_to_the_session_and_is_no_failed_flush() {
        let ((_folder, image), notifier) = (image(), TestNotifier::default());
        let Some(mut ring) = disabled(&image, &notifier) else { return };
        let zero = Call::Zero(Range::whole(4096), Zeroing::default());
        for call in [Call::Flush, write(1), zero, Call::Prefetch(Range::whole(4096))] {
            ring.take(1, Submitted { call, done: 0 }, -(Errno::ECANCELED as i32));
            assert!(ring.finished().unwrap().outcome.is_none());
        }
    }

    #[test]
    fn changes_that_the_kernel_cannot_make_are_given_back() {
        let ((_folder, image), notifier) = (image(), TestNotifier::default());
        let Some(mut ring) = disabled(&image, &notifier) else { return };
        let range = Range::whole(4096);
        let calls = || [Call::Zero(range, Zeroing::default()), Call::Trim(range)];
        for errno in [Errno::EOPNOTSUPP, Errno::EINVAL, Errno::ENODEV, Errno::EPERM, Errno::ESPIPE]
        {
            for call in calls() {
                ring.take(1, Submitted { call, done: 0 }, -(errno as i32));
                assert!(ring.finished().unwrap().outcome.is_none(), "{errno}");
            }
        }
        for errno in [Errno::EIO, Errno::ENOSPC, Errno::EDQUOT] {
            for call in calls() {
                ring.take(1, Submitted { call, done: 0 }, -(errno as i32));
                assert!(matches!(ring.finished().unwrap().outcome, Some(Err(_))), "{errno}");
            }
        }
        ring.take(1, Submitted { call: Call::Flush, done: 0 }, -(Errno::EINVAL as i32));
        assert!(matches!(ring.finished().unwrap().outcome, Some(Err(_))), "no change");
    }

    #[test]
    fn zeroing_with_odd_edges_is_exact_in_a_ring() {
        let ((_folder, image), notifier) = (image(), TestNotifier::default());
        let Ok(mut ring) = Uring::new(&image, notifier.as_eventfd()) else { return };
        image.write(0, &[7; 40_000], false).unwrap();
        let range = Range::whole(30_001).from(101);
        ring.begin(1, Call::Zero(range, Zeroing::default())).unwrap();
        ring.wait();
        assert!(matches!(ring.finished().unwrap().outcome, Some(Ok(()))));
        let (mut found, mut expected) = ([9; 40_000], [7; 40_000]);
        image.read(0, &mut found).unwrap();
        expected[101..30_001].fill(0);
        assert!(found == expected);
    }

    #[test]
    fn what_cannot_go_on_in_a_ring_is_given_back() {
        let (_folder, image) = image();
        let (image, notifier) = (image.without_support(), TestNotifier::default());
        let Ok(mut ring) = Uring::new(&image, notifier.as_eventfd()) else { return };
        let zero = Call::Zero(Range::whole(4096), Zeroing::default());
        ring.take(1, Submitted { call: zero, done: 0 }, -(Errno::EINTR as i32));
        assert!(ring.finished().unwrap().outcome.is_none());
    }

    #[test]
    fn a_kernel_that_does_not_know_all_of_it_is_not_asked() {
        assert!(!knows_all(&Probe::new()));
    }
}
