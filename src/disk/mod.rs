//! The bytes being served, and who may touch them now.
//! Knows no network, no protocol and no log; errors go to the caller as `io::Error`.
//!
//! [`Disk`] is the door: [`Disk::enter`] passes the gate and yields a [`Visit`], and all work on
//! the bytes is done through a visit. Hold one while you work on the disk, never while you wait
//! for a peer: whoever closes the gate waits for it.
//!
//! What is in memory is read and written by the visit itself. What may take long, and everything
//! that is to be durable, is an errand ([`inflight`]), which takes the visit with it and is done
//! aside.

mod deletion;
pub mod dirty;
mod extents;
mod file;
mod file_id;
mod file_system;
mod flush_errors;
mod gate;
pub mod inflight;
mod io_queue;
mod lock;
#[cfg(test)]
pub(crate) mod memory;
#[cfg(test)]
mod model_tests;
mod open;
mod overlap;
pub mod ownership;
pub mod parts;
pub mod record_store;
#[cfg(test)]
pub(crate) mod slow;
pub mod state;
mod state_file;
mod syscalls;
mod thread_pool;
mod uring;
pub mod write_behind;
mod zeros;

pub use deletion::{KeptBecause, Named};
pub use file::FileBackend;
pub use file_system::HolePolicy;
pub use gate::{Expired, Gate, NoEntry, Pass, StillBusy};
pub use io_queue::{Call, Completion, IoQueue, Notifier};
pub use lock::{Holders, LockKind};
pub use open::{Access, OpenError, SECTOR, size_of};
pub use overlap::Change;
pub use zeros::is_zero;

use crate::range::Range;
use dirty::DirtyBitmap;
use flush_errors::FlushErrors;
use nix::errno::Errno;
use overlap::OverlapTracker;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;
use thread_pool::ThreadPool;

/// Device and inode of a file; of a block device, 0 and its own number, wherever its node is.
pub type Identity = (u64, u64);

/// What a disk's bytes are kept in: a file, a block device, or memory in tests.
///
/// Implementations are called from many threads at once, and only with ranges inside
/// [`Backend::size`].
pub trait Backend: Send + Sync + std::fmt::Debug {
    /// Size in bytes; it does not change while the image is open.
    fn size(&self) -> u64;
    /// What tells it from every other image of this host, if there is such a thing.
    fn identity(&self) -> Option<Identity> {
        None
    }
    /// Fills `into` from `offset` on. A file that became shorter is an error, not a short read.
    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()>;
    /// The same, but `WouldBlock` rather than waiting for a disk; `into` may then hold anything.
    fn read_now(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.read(offset, into)
    }
    /// Whether the range seems to be in memory: a guess, made at a few places of it.
    fn is_at_hand(&self, range: Range) -> bool {
        let _ = range;
        true
    }
    /// A lane for the calls of one session, made on its thread; none where nothing can be done
    /// aside. Its results add to the eventfd `bell`.
    fn lane(&self, bell: BorrowedFd<'_>) -> Option<Box<dyn IoQueue + '_>> {
        let _ = bell;
        None
    }
    /// Writes all of `data`; with `durable` returns only once it is on stable storage.
    fn write(&self, offset: u64, data: &[u8], durable: bool) -> io::Result<()>;
    /// Makes the range read as zeros.
    fn zero(&self, range: Range, how: Zeroing) -> io::Result<()>;
    /// Whether zeroing or trimming takes a time that depends on the number of extents rather than of
    /// bytes, as in a file with `fallocate(2)`.
    fn zeroes_by_extent(&self, how: Zeroing) -> bool {
        let _ = how;
        false
    }
    /// Gives back what it can of the range; the bytes may read as anything afterwards.
    fn trim(&self, range: Range) -> io::Result<()>;
    /// Returns once everything written before the call is on stable storage.
    fn flush(&self) -> io::Result<()>;
    /// Whether a write that begins after another one of the same bytes ends after it by itself. So
    /// it is with files, which the kernel locks; on block devices writes may overtake each other.
    fn orders_writes(&self) -> bool {
        true
    }
    /// Hints that the range will be read soon.
    fn prefetch(&self, range: Range) -> io::Result<()>;
    /// Starts writing back what is dirty in the range, so that a flush will have less to do; does not
    /// wait for it. An error says nothing of the data: the next flush will.
    fn start_write_back(&self, range: Range) -> io::Result<()> {
        let _ = range;
        Ok(())
    }
    /// The extent that `offset` lies in, from `offset` on.
    fn extent(&self, offset: u64) -> io::Result<Extent>;
    /// Whether [`Backend::pin`] can be used: a page changes only in bytes that a client changes.
    fn pins(&self) -> bool {
        false
    }
    /// Puts exactly `length` bytes from `offset` on into a pipe that has room for them, by reference.
    /// May wait for a disk. After an error, any part of them may be in the pipe; `Unsupported` says
    /// that they have to be read instead.
    fn pin(&self, offset: u64, length: usize, pipe: BorrowedFd<'_>) -> io::Result<()> {
        let _ = (offset, length, pipe);
        Err(io::ErrorKind::Unsupported.into())
    }
    /// Hands at most `length` bytes from `offset` on to a socket without copying them through
    /// this process; returns how many, and never waits for the socket if that does not block.
    /// `Unsupported` where that cannot be done.
    fn send(&self, offset: u64, length: usize, to: BorrowedFd<'_>) -> io::Result<usize> {
        let _ = (offset, length, to);
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// How to make a range read as zeros (NBD specification, `NBD_CMD_WRITE_ZEROES`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Zeroing {
    /// Keep the space allocated (`NBD_CMD_FLAG_NO_HOLE`); otherwise a hole is punched.
    pub keep_allocated: bool,
    /// Fail with `EOPNOTSUPP`, before anything is changed, rather than write zeros by hand
    /// (`NBD_CMD_FLAG_FAST_ZERO`).
    pub only_if_fast: bool,
}

/// A span of the disk that is alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Where.
    pub range: Range,
    /// False for a hole, which reads as zeros.
    pub allocated: bool,
}

/// A disk: an image behind a gate.
#[derive(Debug)]
pub struct Disk {
    /// Before the image: dropping it waits until no thread uses that.
    helpers: ThreadPool,
    image: Arc<dyn Backend>,
    gate: Gate,
    read_only: bool,
    hearing: FlushErrors,
    /// Changes that take long, of all sessions.
    in_flight: OverlapTracker,
    /// What changed since a migration's copier last looked, while there is one.
    dirty: RwLock<Option<Arc<DirtyBitmap>>>,
    /// How long every write is to be held back, in microseconds.
    hold: AtomicU64,
}

/// The view of whoever moves the disk: reads without passing the gate, since it is the one that
/// closes it.
#[derive(Debug)]
pub struct Copier<'a> {
    image: &'a dyn Backend,
}

/// Permission to touch the disk now, and the way to do it; dropping it ends the visit.
///
/// Every offset and range is checked against the disk once more: beyond its end is `EINVAL`.
/// Nothing to do (a length of 0) always succeeds.
#[derive(Debug)]
pub struct Visit<'a> {
    disk: &'a Disk,
    /// Only held, so that the gate knows of us.
    _pass: gate::Pass<'a>,
}

impl Disk {
    /// A disk made of `image`; with `read_only` nothing can change it.
    #[must_use]
    pub fn new(image: Box<dyn Backend>, read_only: bool) -> Self {
        Self {
            helpers: ThreadPool::default(),
            image: Arc::from(image),
            gate: Gate::default(),
            read_only,
            hearing: FlushErrors::default(),
            in_flight: OverlapTracker::default(),
            dirty: RwLock::new(None),
            hold: AtomicU64::new(0),
        }
    }

    /// Size in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.image.size()
    }

    /// What tells it from every other disk of this host, if there is such a thing.
    #[must_use]
    pub fn identity(&self) -> Option<Identity> {
        self.image.identity()
    }

    /// Whether changes are refused (`EPERM`).
    #[must_use]
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// Whether bytes can go from here to a socket without a copy in between.
    #[must_use]
    pub fn pins(&self) -> bool {
        self.image.pins()
    }

    /// Whether every flush has succeeded so far.
    #[must_use]
    pub fn is_flawless(&self) -> bool {
        self.hearing.is_flawless()
    }

    /// The gate, for those who close it.
    #[must_use]
    pub fn gate(&self) -> &Gate {
        &self.gate
    }

    /// Waits until the gate is open and goes in. For `give_up` see [`Gate::enter`].
    ///
    /// # Errors
    /// [`NoEntry`]: the disk is gone for good, or `give_up` ended the waiting.
    pub fn enter(&self, give_up: &dyn Fn() -> bool) -> Result<Visit<'_>, NoEntry> {
        Ok(Visit { disk: self, _pass: self.gate.enter(give_up)? })
    }

    /// Goes in if the gate is open. For whoever holds a visit already: to wait for the gate would
    /// be to wait for oneself.
    ///
    /// # Errors
    /// [`NoEntry::Gone`].
    pub fn enter_if_open(&self) -> Result<Option<Visit<'_>>, NoEntry> {
        let pass = self.gate.enter_if_open()?;
        Ok(pass.map(|pass| Visit { disk: self, _pass: pass }))
    }

    /// Begins to mark what changes, for one migration. Whatever is read after this call and not
    /// marked is what it was read as.
    ///
    /// # Errors
    /// When there is no memory for the marks.
    pub fn track(&self) -> io::Result<Arc<DirtyBitmap>> {
        let dirty = Arc::new(DirtyBitmap::new(self.size())?);
        *self.dirty.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(&dirty));
        Ok(dirty)
    }

    /// Marks no more.
    pub fn untrack(&self) {
        *self.dirty.write().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// How long a session is to wait before each write, so that a migration can catch up.
    #[must_use]
    pub fn hold(&self) -> Duration {
        Duration::from_micros(self.hold.load(Ordering::Relaxed))
    }

    /// Holds every write back for so long; zero lets them go.
    pub fn set_hold(&self, hold: Duration) {
        let micros = u64::try_from(hold.as_micros()).unwrap_or(u64::MAX);
        self.hold.store(micros, Ordering::Relaxed);
    }

    /// Writes back what is unwritten, without passing the gate.
    ///
    /// # Errors
    /// What the image says. The kernel tells a failure once, and later flushes will hear of it.
    pub fn write_back(&self) -> io::Result<()> {
        let _listening = self.hearing.listen();
        self.image.flush().map_err(|error| self.hearing.failed(&error))
    }

    /// The view of whoever moves the disk.
    #[must_use]
    pub fn copier(&self) -> Copier<'_> {
        Copier { image: &*self.image }
    }

    fn mark(&self, range: Range) {
        if let Some(dirty) = &*self.dirty.read().unwrap_or_else(PoisonError::into_inner) {
            dirty.mark(range);
        }
    }

    fn range(&self, offset: u64, length: u64) -> io::Result<Range> {
        Range::within(self.size(), offset, length).ok_or_else(|| Errno::EINVAL.into())
    }
}

impl Copier<'_> {
    /// Fills `into` from `offset` on.
    ///
    /// # Errors
    /// What the image says.
    pub fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.image.read(offset, into)
    }

    /// The image's extent that the byte at `offset` lies in, from there on.
    ///
    /// # Errors
    /// What the image says.
    pub fn extent(&self, offset: u64) -> io::Result<Extent> {
        extents::extent_at(self.image, offset)
    }

    /// See [`Backend::send`].
    ///
    /// # Errors
    /// What the image or the socket says; `WouldBlock` when the socket is full.
    pub fn send(&self, offset: u64, length: usize, to: BorrowedFd<'_>) -> io::Result<usize> {
        self.image.send(offset, length, to)
    }
}

impl Visit<'_> {
    /// Fills `into` from `offset` on.
    ///
    /// # Errors
    /// `EINVAL` beyond the end; what the image says (`UnexpectedEof` for a file cut short).
    pub fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let range = self.disk.range(offset, into.len() as u64)?;
        if range.is_empty() { Ok(()) } else { self.disk.image.read(offset, into) }
    }

    /// The same, but `WouldBlock` rather than waiting for a disk; `into` may then hold anything.
    ///
    /// # Errors
    /// Also as [`Visit::read`].
    pub fn read_now(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let range = self.disk.range(offset, into.len() as u64)?;
        if range.is_empty() { Ok(()) } else { self.disk.image.read_now(offset, into) }
    }

    /// Whether `range` seems to be in memory: a guess, made at a few places of it.
    #[must_use]
    pub fn is_at_hand(&self, range: Range) -> bool {
        self.disk.image.is_at_hand(range)
    }

    /// What has to be loaded before `range` is written, or the write would wait for it: blocks of
    /// which it changes only a part, and what lies between them.
    #[must_use]
    pub fn cold_edges(&self, range: Range) -> Option<Range> {
        let whole = Range::whole(self.disk.size());
        let is_cold = |at: u64| {
            let block = whole.from(at - at % zeros::BLOCK).split(zeros::BLOCK).0;
            (!at.is_multiple_of(zeros::BLOCK) && !self.disk.image.is_at_hand(block))
                .then_some(block)
        };
        let edges = (is_cold(range.offset()), is_cold(range.end()));
        match edges {
            (Some(first), Some(last)) => Some(whole.from(first.offset()).until(last.end())),
            (first, last) => first.or(last),
        }
    }

    /// Writes `data` to `offset`; zeros that would go into a hole leave it one. Waits for the disk
    /// only if a block at an edge is not in memory ([`Visit::cold_edges`]).
    ///
    /// # Errors
    /// `EPERM` on a read-only disk; `EINVAL` beyond the end; what the image says, and then any part
    /// of `data` may have been written.
    pub fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let range = self.disk.range(offset, data.len() as u64)?;
        if self.disk.read_only {
            return Err(Errno::EPERM.into());
        }
        let written = zeros::write_around_holes(&*self.disk.image, offset, data);
        // Mark after writing, also after half of it: the copier takes the mark first and reads
        // second, so that a change may be sent twice but never missed.
        self.disk.mark(range);
        written
    }

    /// Returns once everything that any visit wrote before this call is on stable storage. Only for
    /// whoever has no errands under way, and holds no lock that a session may wait for: it waits for
    /// the flushes of all sessions.
    ///
    /// # Errors
    /// What the image says. From then on every flush and every durable change fails with the same
    /// error until the disk is opened anew, since some data may have been lost for good.
    pub fn flush(&self) -> io::Result<()> {
        let hearing = &self.disk.hearing;
        hearing.check()?;
        self.disk.write_back()?;
        hearing.wait_for_others();
        hearing.check()
    }

    /// Puts `length` bytes from `offset` on into a pipe; only if [`Disk::pins`]. See [`Backend::pin`].
    ///
    /// # Errors
    /// `EINVAL` beyond the end; what the image says.
    pub fn pin(&self, offset: u64, length: usize, pipe: BorrowedFd<'_>) -> io::Result<()> {
        self.disk.range(offset, length as u64)?;
        self.disk.image.pin(offset, length, pipe)
    }

    /// The extents of `range` in order, equal neighbours merged, clipped to it: at most `limit`,
    /// but at least one unless the range is empty.
    ///
    /// # Errors
    /// `EINVAL` beyond the end; what the image says.
    pub fn extents(&self, range: Range, limit: usize) -> io::Result<Vec<Extent>> {
        let range = self.disk.range(range.offset(), range.length())?;
        extents::extents(self.disk.image.as_ref(), range, limit)
    }

    /// The image's extent that the byte at `offset` lies in, from there on. The next one may be of
    /// the same kind.
    ///
    /// # Errors
    /// `EINVAL` at or beyond the end; what the image says.
    pub fn extent(&self, offset: u64) -> io::Result<Extent> {
        self.disk.range(offset, 1)?;
        extents::extent_at(self.disk.image.as_ref(), offset)
    }
}

/// The number of an error, for those who hand it on as a number: the kernel's own, or `EIO`.
#[must_use]
pub fn errno_of(error: &io::Error) -> i32 {
    error.raw_os_error().unwrap_or(Errno::EIO as i32)
}

#[cfg(test)]
mod tests;
