//! A disk: a backend behind a gate, with the state that all its sessions share.
//! Never waits for a peer, and never accesses bytes beyond the disk's end.

use super::backend::{Backend, Identity};
use super::backends::Backends;
use super::dirty::DirtyBitmap;
use super::features::Features;
use super::flush_errors::{FlushErrors, FlushObserver};
use super::gate::{Gate, NoEntry, Pass};
use super::op::Extent;
use super::overlap::OverlapTracker;
use super::thread_pool::ThreadPool;
use super::{detect_zeros, extents};
use crate::range::Range;
use crate::sync;
use nix::errno::Errno;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, RwLock};
use std::time::Duration;

/// A disk: an image behind a gate.
#[derive(Debug)]
pub struct Disk {
    /// Declared before `backends`, so dropped first: its drop waits until no thread uses the image.
    pub(super) threads: ThreadPool,
    backends: Backends,
    pub(super) gate: Gate,
    pub(super) read_only: bool,
    pub(super) flush_errors: FlushErrors,
    /// Long-running changes of all sessions.
    pub(super) overlaps: OverlapTracker,
    /// Changes since a migration's copier last looked, while there is one.
    dirty: RwLock<Option<Arc<DirtyBitmap>>>,
    /// Delay of every write, in microseconds.
    write_delay_us: AtomicU64,
}

/// Why a backend cannot replace another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ExchangeError {
    /// The gate is open, or a visit is inside.
    #[error("the disk is in use")]
    GateOpen,
    /// The sizes differ; in bytes.
    #[error("the disk has {ours} bytes, and the other image {theirs}")]
    Size {
        /// Of the disk.
        ours: u64,
        /// Of the new backend.
        theirs: u64,
    },
    /// The unit of the new backend is larger ([`Backend::unit`]), but changes that wait are registered with
    /// that of the old one; in bytes.
    #[error("the disk is changed in units of {ours} bytes, and the other image of {theirs}")]
    Unit {
        /// Of the disk.
        ours: u64,
        /// Of the new backend.
        theirs: u64,
    },
    /// The new backend lacks what clients were offered.
    #[error("the disk was offered with {ours}; the other image only has {theirs}")]
    Features {
        /// Of the disk.
        ours: Features,
        /// Of the new backend.
        theirs: Features,
    },
}

/// A migration's view of the disk. It reads without passing the gate, because the migration itself
/// closes the gate.
#[derive(Debug)]
pub struct Copier<'a> {
    image: &'a dyn Backend,
}

/// Guard of one passage through the gate, and the way to access the disk; dropping it leaves.
///
/// Every method checks its offset and range against the disk: beyond the end is `EINVAL`. A length
/// of 0 always succeeds.
#[derive(Debug)]
pub struct Visit<'a> {
    disk: &'a Disk,
    /// Keeps the gate from being drained.
    _pass: Pass<'a>,
}

impl Disk {
    /// A disk whose bytes are in `image`; with `read_only` nothing can change them.
    #[must_use]
    pub fn new(image: Box<dyn Backend>, read_only: bool) -> Self {
        Self {
            threads: ThreadPool::default(),
            backends: Backends::new(Arc::from(image)),
            gate: Gate::default(),
            read_only,
            flush_errors: FlushErrors::default(),
            overlaps: OverlapTracker::default(),
            dirty: RwLock::new(None),
            write_delay_us: AtomicU64::new(0),
        }
    }

    /// Starts no thread from now on; sessions execute what the I/O queue declines.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn forbid_threads(&self) {
        self.threads.forbid();
    }

    /// The backend that keeps the bytes.
    pub(super) fn image(&self) -> &Arc<dyn Backend> {
        self.backends.current()
    }

    /// Has another backend keep the bytes, from the next visit on. The caller holds the gate closed, and
    /// both backends have the same content. The old one is kept until the disk is dropped.
    ///
    /// # Errors
    /// [`ExchangeError`]; then nothing has changed.
    pub fn exchange(&self, backend: Box<dyn Backend>) -> Result<(), ExchangeError> {
        let (ours, theirs) = (self.size(), backend.size());
        if ours != theirs {
            return Err(ExchangeError::Size { ours, theirs });
        }
        let (ours, theirs) = (self.unit(), backend.unit());
        if theirs > ours {
            return Err(ExchangeError::Unit { ours, theirs });
        }
        let (ours, theirs) = (self.features(), backend.features());
        if !theirs.cover(&ours) {
            return Err(ExchangeError::Features { ours, theirs });
        }
        let exchange = || self.backends.push(Arc::from(backend));
        self.gate.run_closed(exchange).ok_or(ExchangeError::GateOpen)
    }

    /// Size in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.image().size()
    }

    /// See [`Backend::identity`].
    #[must_use]
    pub fn identity(&self) -> Option<Identity> {
        self.image().identity()
    }

    /// Whether changes are refused (`EPERM`).
    #[must_use]
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// Whether the image has a page cache ([`Backend::page_cache`]). Without one, every read and write is
    /// an operation in flight.
    #[must_use]
    pub fn has_page_cache(&self) -> bool {
        self.image().page_cache().is_some()
    }

    /// See [`Backend::features`].
    #[must_use]
    pub fn features(&self) -> Features {
        self.image().features()
    }

    /// See [`Backend::unit`].
    #[must_use]
    pub fn unit(&self) -> u64 {
        self.image().unit()
    }

    /// Whether every flush has succeeded so far.
    #[must_use]
    pub fn all_flushes_succeeded(&self) -> bool {
        self.flush_errors.all_flushes_succeeded()
    }

    /// Has an observer told of the first flush that fails.
    pub fn observe_flushes(&self, observer: Arc<dyn FlushObserver>) {
        self.flush_errors.observe(observer);
    }

    /// The gate, for closing it.
    #[must_use]
    pub fn gate(&self) -> &Gate {
        &self.gate
    }

    /// Enters the gate, blocking while it is closed. For `give_up` see [`Gate::enter`].
    ///
    /// # Errors
    /// [`NoEntry`]: the disk is gone for good, or `give_up` ended the wait.
    pub fn enter(&self, give_up: &dyn Fn() -> bool) -> Result<Visit<'_>, NoEntry> {
        Ok(Visit { disk: self, _pass: self.gate.enter(give_up)? })
    }

    /// Enters the gate if it is open. For a caller that already holds a visit: the closer waits for
    /// that visit, so the caller must not wait for the gate.
    ///
    /// # Errors
    /// [`NoEntry::Gone`].
    pub fn enter_if_open(&self) -> Result<Option<Visit<'_>>, NoEntry> {
        let pass = self.gate.enter_if_open()?;
        Ok(pass.map(|pass| Visit { disk: self, _pass: pass }))
    }

    /// Begins to track changes for one migration. A block read after this call that is not marked
    /// later still holds the bytes that were read.
    ///
    /// # Errors
    /// When there is no memory for the bitmap.
    pub fn track(&self) -> io::Result<Arc<DirtyBitmap>> {
        let dirty = Arc::new(DirtyBitmap::new(self.size())?);
        *sync::write(&self.dirty) = Some(Arc::clone(&dirty));
        Ok(dirty)
    }

    /// Stops tracking changes.
    pub fn untrack(&self) {
        *sync::write(&self.dirty) = None;
    }

    /// How long a session has to delay each write, so that a migration can catch up.
    #[must_use]
    pub fn write_delay(&self) -> Duration {
        Duration::from_micros(self.write_delay_us.load(Ordering::Relaxed))
    }

    /// Sets the delay of every write; zero for none.
    pub fn set_write_delay(&self, delay: Duration) {
        let micros = u64::try_from(delay.as_micros()).unwrap_or(u64::MAX);
        self.write_delay_us.store(micros, Ordering::Relaxed);
    }

    /// Flushes the image without passing the gate.
    ///
    /// # Errors
    /// The backend's. The kernel reports a failure once, so later flushes return it too.
    pub fn write_back(&self) -> io::Result<()> {
        let _guard = self.flush_errors.begin_flush();
        self.image().flush().map_err(|error| self.flush_errors.record(&error))
    }

    /// The view of a migration.
    #[must_use]
    pub fn copier(&self) -> Copier<'_> {
        Copier { image: &**self.image() }
    }

    /// The blocks that a write of `range` changes in part and that are not resident.
    pub(super) fn cold_edges(&self, range: Range) -> impl Iterator<Item = Range> {
        let cache = self.image().page_cache();
        let cold_block = |at: u64| {
            // First, because asking for a resident block starts the kernel's readahead.
            if at.is_multiple_of(detect_zeros::BLOCK) {
                return None;
            }
            let start = Range::whole(self.size()).from(at - at % detect_zeros::BLOCK);
            let block = start.split(detect_zeros::BLOCK).0;
            cache.is_some_and(|cache| !cache.is_resident(block)).then_some(block)
        };
        let first = cold_block(range.offset());
        let last = cold_block(range.end()).filter(|last| first != Some(*last));
        first.into_iter().chain(last)
    }

    pub(super) fn mark(&self, range: Range) {
        if let Some(dirty) = &*sync::read(&self.dirty) {
            dirty.mark(range);
        }
    }

    pub(super) fn range(&self, offset: u64, length: u64) -> io::Result<Range> {
        Range::within(self.size(), offset, length).ok_or_else(|| Errno::EINVAL.into())
    }
}

impl Copier<'_> {
    /// See [`Backend::is_remote`].
    #[must_use]
    pub fn is_remote(&self) -> bool {
        self.image.is_remote()
    }

    /// Fills `into` from `offset` on.
    ///
    /// # Errors
    /// The backend's.
    pub fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.image.read(offset, into)
    }

    /// The image's extent that contains `offset`, from there on.
    ///
    /// # Errors
    /// The backend's.
    pub fn extent(&self, offset: u64) -> io::Result<Extent> {
        extents::extent_at(self.image, offset)
    }

    /// See [`super::SocketTransfer::send`].
    ///
    /// # Errors
    /// The backend's or the socket's; `WouldBlock` when the socket is full; `Unsupported`.
    pub fn send(&self, offset: u64, length: usize, to: BorrowedFd<'_>) -> io::Result<usize> {
        let transfer = self.image.socket_transfer().ok_or(io::ErrorKind::Unsupported)?;
        transfer.send(offset, length, to)
    }
}

impl Visit<'_> {
    /// Fills `into` from `offset` on.
    ///
    /// # Errors
    /// `EINVAL` beyond the end; the backend's (`UnexpectedEof` for a file cut short).
    pub fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let range = self.disk.range(offset, into.len() as u64)?;
        if range.is_empty() { Ok(()) } else { self.disk.image().read(offset, into) }
    }

    /// Reads like [`Visit::read`], but fails with `WouldBlock` instead of waiting for the device;
    /// `into` may then hold anything.
    ///
    /// # Errors
    /// Also those of [`Visit::read`].
    pub fn read_now(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let range = self.disk.range(offset, into.len() as u64)?;
        match self.disk.image().page_cache() {
            _ if range.is_empty() => Ok(()),
            Some(cache) => cache.read_now(offset, into),
            None => Err(io::ErrorKind::WouldBlock.into()),
        }
    }

    /// Whether [`Visit::pin`] can be used.
    #[must_use]
    pub fn pins(&self) -> bool {
        self.disk.image().socket_transfer().is_some()
    }

    /// Whether `range` seems to be in the page cache: a guess from a few samples.
    #[must_use]
    pub fn is_resident(&self, range: Range) -> bool {
        self.disk.image().page_cache().is_some_and(|cache| cache.is_resident(range))
    }

    /// Whether a write of `range` has to be an operation in flight, because [`Visit::write`] would wait
    /// for the device: without a page cache, or if a block that it changes in part is not resident.
    #[must_use]
    pub fn write_would_wait(&self, range: Range) -> bool {
        !self.disk.has_page_cache() || self.disk.cold_edges(range).next().is_some()
    }

    /// Writes `data` to `offset`, leaving out zeros that would go into a hole. Waits for the device
    /// only if a block at an edge is not resident ([`Visit::write_would_wait`]).
    ///
    /// # Errors
    /// `EPERM` on a read-only disk; `EINVAL` beyond the end; the backend's, after which any part of
    /// `data` may have been written.
    pub fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let range = self.disk.range(offset, data.len() as u64)?;
        if self.disk.read_only {
            return Err(Errno::EPERM.into());
        }
        let written = detect_zeros::write_around_holes(&**self.disk.image(), offset, data);
        // Mark after writing, even after a partial write: the copier takes the mark first and reads
        // second, so it may send a change twice but never misses one.
        self.disk.mark(range);
        written
    }

    /// Returns once everything that any visit wrote before this call is on stable storage. The caller
    /// must have no I/O in flight and hold no lock that a session may wait for, because this waits
    /// for the flushes of all sessions.
    ///
    /// # Errors
    /// The backend's. From then on every flush and every durable change fails with the same error
    /// until the disk is reopened, because data may have been lost for good.
    pub fn flush(&self) -> io::Result<()> {
        let flush_errors = &self.disk.flush_errors;
        flush_errors.check()?;
        self.disk.write_back()?;
        flush_errors.wait_for_concurrent();
        flush_errors.check()
    }

    /// Moves `length` bytes from `offset` on into a pipe. See [`super::SocketTransfer::pin`].
    ///
    /// # Errors
    /// `EINVAL` beyond the end; the backend's; `Unsupported` unless [`Visit::pins`].
    pub fn pin(&self, offset: u64, length: usize, pipe: BorrowedFd<'_>) -> io::Result<()> {
        self.disk.range(offset, length as u64)?;
        let transfer = self.disk.image().socket_transfer().ok_or(io::ErrorKind::Unsupported)?;
        transfer.pin(offset, length, pipe)
    }

    /// Whether the extents of a range have to be found by an operation in flight ([`super::Op::Extents`]),
    /// because [`Visit::extents`] may take long.
    #[must_use]
    pub fn extents_wait(&self) -> bool {
        self.disk.image().extents_wait()
    }

    /// The extents of `range` in order, equal neighbours merged, clipped to it: at most `limit`,
    /// but at least one unless the range is empty.
    ///
    /// # Errors
    /// `EINVAL` beyond the end; the backend's.
    pub fn extents(&self, range: Range, limit: usize) -> io::Result<Vec<Extent>> {
        let range = self.disk.range(range.offset(), range.length())?;
        extents::extents(self.disk.image().as_ref(), range, limit)
    }

    /// The image's extent that contains `offset`, from there on. The next one may be of the same
    /// kind.
    ///
    /// # Errors
    /// `EINVAL` at or beyond the end; the backend's.
    pub fn extent(&self, offset: u64) -> io::Result<Extent> {
        self.disk.range(offset, 1)?;
        extents::extent_at(self.disk.image().as_ref(), offset)
    }
}
