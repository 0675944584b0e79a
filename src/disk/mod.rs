//! The bytes being served, and who may touch them now.
//! Knows no network, no protocol and no log; errors go to the caller as `io::Error`.
//!
//! [`Disk`] is the door: [`Disk::enter`] passes the gate and yields a [`Visit`], and all work on
//! the bytes is done through a visit. Hold one while you work on the disk, never while you wait
//! for a peer: whoever closes the gate waits for it.

pub mod dirty;
mod extents;
mod gate;
pub mod hold;
mod image;
pub mod ledger;
#[cfg(test)]
pub(crate) mod memory;
#[cfg(test)]
mod model_tests;
mod open;
pub mod ownership;
mod syscalls;
mod zeros;

pub use gate::{Gate, NoEntry, Pass, StillBusy};
pub use image::FileImage;
pub use open::{Access, OpenError, SECTOR, size_of};
pub use zeros::is_zero;

use crate::range::Range;
use dirty::Dirty;
use nix::errno::Errno;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;
use zeros::{Failure, Written};

/// Device and inode of a file; of a block device, 0 and its own number, wherever its node is.
pub type Identity = (u64, u64);

/// What a disk's bytes are kept in: a file, a block device, or memory in tests.
///
/// Implementations are called from many threads at once, and only with ranges inside
/// [`Image::size`].
pub trait Image: Send + Sync + std::fmt::Debug {
    /// Size in bytes; it does not change while the image is open.
    fn size(&self) -> u64;
    /// What tells it from every other image of this host, if there is such a thing.
    fn identity(&self) -> Option<Identity> {
        None
    }
    /// Fills `into` from `offset` on. A file that became shorter is an error, not a short read.
    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()>;
    /// Writes all of `data`; with `durable` returns only once it is on stable storage.
    fn write(&self, offset: u64, data: &[u8], durable: bool) -> io::Result<()>;
    /// Makes the range read as zeros.
    fn zero(&self, range: Range, how: Zeroing) -> io::Result<()>;
    /// Gives back what it can of the range; the bytes may read as anything afterwards.
    fn trim(&self, range: Range) -> io::Result<()>;
    /// Returns once everything written before the call is on stable storage.
    fn flush(&self) -> io::Result<()>;
    /// Hints that the range will be read soon.
    fn prefetch(&self, range: Range) -> io::Result<()>;
    /// The extent that `offset` lies in, from `offset` on.
    fn extent(&self, offset: u64) -> io::Result<Extent>;
    /// Whether [`Image::send`] can be used.
    fn sends(&self) -> bool {
        false
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
    image: Box<dyn Image>,
    gate: Gate,
    read_only: bool,
    /// The errno of the first flush that failed; 0 as long as none has.
    flush_failure: AtomicI32,
    /// Held for reading by whoever may hear of such a failure, until it is remembered.
    hearing: RwLock<()>,
    /// What changed since a migration's copier last looked, while there is one.
    dirty: RwLock<Option<Arc<Dirty>>>,
    /// How long every write is to be held back, in microseconds.
    hold: AtomicU64,
}

/// The view of whoever moves the disk: reads without passing the gate, since it is the one that
/// closes it.
#[derive(Debug)]
pub struct Copier<'a> {
    image: &'a dyn Image,
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
    pub fn new(image: Box<dyn Image>, read_only: bool) -> Self {
        Self {
            image,
            gate: Gate::default(),
            read_only,
            flush_failure: AtomicI32::new(0),
            hearing: RwLock::new(()),
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
    pub fn sends(&self) -> bool {
        self.image.sends()
    }

    /// Whether every flush has succeeded so far.
    #[must_use]
    pub fn is_flawless(&self) -> bool {
        self.flush_failure.load(Ordering::Acquire) == 0
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

    /// Begins to mark what changes, for one migration. Whatever is read after this call and not
    /// marked is what it was read as.
    ///
    /// # Errors
    /// When there is no memory for the marks.
    pub fn track(&self) -> io::Result<Arc<Dirty>> {
        let dirty = Arc::new(Dirty::new(self.size())?);
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
    /// As [`Visit::flush`]: the kernel tells a failure once, and later flushes have to hear of it.
    pub fn write_back(&self) -> io::Result<()> {
        let _hearing = self.hearing.read().unwrap_or_else(PoisonError::into_inner);
        self.image.flush().map_err(|error| self.flush_failed(&error))
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

    /// Fails as the first failed flush did, if there was one: the kernel reports lost data once,
    /// forgets it, and would call the next flush a success.
    fn check_flushes(&self) -> io::Result<()> {
        match self.flush_failure.load(Ordering::Acquire) {
            0 => Ok(()),
            errno => Err(io::Error::from_raw_os_error(errno)),
        }
    }

    /// The kernel tells a failure to one of those who wait for it: another thread may be told what
    /// was meant for us, too. Waits until all of them have remembered what they heard.
    fn check_what_others_heard(&self) -> io::Result<()> {
        drop(self.hearing.write().unwrap_or_else(PoisonError::into_inner));
        self.check_flushes()
    }

    /// Remembers that data may be lost, and returns what every later flush will say.
    fn flush_failed(&self, error: &io::Error) -> io::Error {
        let (new, all) = (errno_of(error), Ordering::AcqRel);
        let first = match self.flush_failure.compare_exchange(0, new, all, Ordering::Acquire) {
            Ok(_) => new,
            Err(first) => first,
        };
        io::Error::from_raw_os_error(first)
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

    /// See [`Image::send`].
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

    /// Writes `data` to `offset`; zeros that would go into a hole leave it one. With `durable`,
    /// returns only once all of it is on stable storage (`NBD_CMD_FLAG_FUA`).
    ///
    /// # Errors
    /// `EPERM` on a read-only disk; `EINVAL` beyond the end; with `durable` as [`Visit::flush`];
    /// what the image says, and then any part of `data` may have been written.
    pub fn write(&self, offset: u64, data: &[u8], durable: bool) -> io::Result<()> {
        self.change(self.disk.range(offset, data.len() as u64)?, durable, |image| {
            zeros::write_around_holes(image, offset, data, durable)
        })
    }

    /// Makes `range` read as zeros, to the byte; for `durable` see [`Visit::write`].
    ///
    /// # Errors
    /// As [`Visit::write`]; `EOPNOTSUPP`, with nothing changed, for what cannot be fast and must.
    pub fn zero(&self, range: Range, how: Zeroing, durable: bool) -> io::Result<()> {
        self.change(range, durable, |image| {
            image.zero(range, how)?;
            Ok(Written::to_be_flushed_if(durable))
        })
    }

    /// Gives back what can be given back of `range`, of which the bytes may then read as anything;
    /// for `durable` see [`Visit::write`].
    ///
    /// # Errors
    /// As [`Visit::write`]. That the image cannot trim is no error.
    pub fn trim(&self, range: Range, durable: bool) -> io::Result<()> {
        self.change(range, durable, |image| {
            image.trim(range)?;
            Ok(Written::to_be_flushed_if(durable))
        })
    }

    /// Returns once everything that any visit wrote before this call is on stable storage.
    ///
    /// # Errors
    /// What the image says. From then on every flush and every durable change fails with the same
    /// error until the disk is opened anew, since some data may have been lost for good.
    pub fn flush(&self) -> io::Result<()> {
        self.disk.check_flushes()?;
        self.disk.write_back()?;
        self.disk.check_what_others_heard()
    }

    /// Hands at most `length` bytes from `offset` on to a socket, as far as there is room there;
    /// only if [`Disk::sends`].
    ///
    /// # Errors
    /// `EINVAL` beyond the end; `WouldBlock` when the socket is full; what image or socket say.
    pub fn send(&self, offset: u64, length: usize, to: BorrowedFd<'_>) -> io::Result<usize> {
        self.disk.range(offset, length as u64)?;
        self.disk.image.send(offset, length, to)
    }

    /// Hints that `range` will be read soon (`NBD_CMD_CACHE`).
    ///
    /// # Errors
    /// `EINVAL` beyond the end; what the image says.
    pub fn prefetch(&self, range: Range) -> io::Result<()> {
        let range = self.disk.range(range.offset(), range.length())?;
        // To the kernel a length of 0 would mean "to the end".
        if range.is_empty() { Ok(()) } else { self.disk.image.prefetch(range) }
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

    /// The one way in which bytes change: checked, done, and durable if they have to be.
    ///
    /// After `work`, whether it succeeded or failed half-way, is the moment when the bytes are
    /// there and nobody has been told.
    fn change(
        &self,
        range: Range,
        durable: bool,
        work: impl FnOnce(&dyn Image) -> Result<Written, Failure>,
    ) -> io::Result<()> {
        let range = self.disk.range(range.offset(), range.length())?;
        if self.disk.read_only {
            return Err(Errno::EPERM.into());
        }
        if durable {
            self.disk.check_flushes()?;
        }
        if range.is_empty() {
            return Ok(());
        }
        match self.attempt(range, durable, work)? {
            Written::ToBeFlushed => self.flush(),
            Written::AsAsked if durable => self.disk.check_what_others_heard(),
            Written::AsAsked => Ok(()),
        }
    }

    fn attempt(
        &self,
        range: Range,
        durable: bool,
        work: impl FnOnce(&dyn Image) -> Result<Written, Failure>,
    ) -> io::Result<Written> {
        let disk = self.disk;
        let _hearing = durable.then(|| disk.hearing.read().unwrap_or_else(PoisonError::into_inner));
        let worked = work(disk.image.as_ref());
        // Mark after writing, also after half of it: the copier takes the mark first and reads
        // second, so that a change may be sent twice but never missed.
        disk.mark(range);
        worked.map_err(|failure| match failure {
            Failure::NotMade(error) => error,
            Failure::NotDurable(error) => disk.flush_failed(&error),
        })
    }
}

/// The number of an error, for those who hand it on as a number: the kernel's own, or `EIO`.
#[must_use]
pub fn errno_of(error: &io::Error) -> i32 {
    error.raw_os_error().unwrap_or(Errno::EIO as i32)
}

#[cfg(test)]
mod tests;
