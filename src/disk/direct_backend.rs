//! The same file or block device as a [`FileBackend`], read and written with `O_DIRECT` (open(2)), so
//! that the page cache of this host does not hold what the clients cache already.
//! Never changes the size of the image, and never leaves a dirty page of it, unless the file system
//! falls back to the page cache by itself.
//!
//! There are two descriptors of the same file. Bytes go through a second one, opened with `O_DIRECT`;
//! extents, zeroing, trimming, locks and the checks of the file go through the first one, which needs no
//! alignment. The kernel keeps the two coherent: a direct read writes dirty pages of its range back
//! first, a direct write drops the pages of its range, and `fallocate(2)` on a file waits for direct I/O.
//!
//! # Alignment
//!
//! The kernel transfers whole units ([`alignment`]) to and from aligned memory. Requests that consist
//! of whole units go to `io_uring(7)` as they are. The others are declined there, and a thread executes
//! them through an aligned buffer: a read reads the units around its range, and a write reads the units
//! that it changes in part, and writes them back. No other change is lost by that, because two changes
//! of one unit never execute at the same time ([`Backend::unit`]).
//!
//! # What still waits
//!
//! On ext4, `lseek(2)` and direct reads wait while a direct write allocates blocks of the same file, as long
//! as the device takes for such a write (137 ms in the median beside a writer that a cgroup slowed to
//! 1 MiB/s). So a thread finds the extents that a client asks for ([`Backend::extents_wait`]). Two lookups
//! of holes still wait in the session's thread: those of long reads with structured replies, and those of
//! writes that contain blocks of zeros.
//!
//! # The end of the file
//!
//! The size of a file need not be a multiple of the unit. A direct read of its last unit ends early,
//! but a direct write of that unit would extend the file. To cut the file afterwards would change its
//! size twice, which a crash in between makes permanent. So the [tail](DirectBackend::tail) is written
//! through the page cache: durably, after which its pages are dropped, so that none is dirty when a
//! direct I/O meets it. The tail begins at a block of the file system, so that it shares no page with
//! bytes that are written directly: a page that is written back would restore the old bytes there.

use super::backend::{Backend, Identity};
use super::buffer::Buffer;
use super::file_backend::FileBackend;
use super::io_queue::IoQueue;
use super::op::{Extent, Op, Zeroing};
use super::open::{Access, OpenError};
use super::syscalls;
use super::uring::{FallocateCall, RingFile, Uring};
use crate::range::Range;
use nix::errno::Errno;
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::libc;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};

mod alignment;

/// Most bytes that are copied through a buffer at once.
const BOUNCE_MAX: u64 = 256 << 10;

/// An image in a regular file or on a block device, without the page cache.
#[derive(Debug)]
pub struct DirectBackend {
    buffered: FileBackend,
    /// Another opening of the same file, with `O_DIRECT`.
    direct: File,
    /// Alignment of offsets, lengths and memory in bytes: a power of two.
    unit: u64,
}

impl DirectBackend {
    /// Opens the file of `buffered`, which was opened with `access`, a second time.
    ///
    /// # Errors
    /// [`OpenError::NoDirect`] where the file system does not support it; [`OpenError::Other`].
    pub fn new(buffered: FileBackend, access: Access) -> Result<Self, OpenError> {
        let path = buffered.path().to_owned();
        let opened = reopen(buffered.file(), access).and_then(|direct| {
            let unit = alignment::unit(&direct, buffered.sector())?;
            Ok((direct, unit))
        });
        match opened {
            Ok((direct, unit)) => Ok(Self { buffered, direct, unit }),
            Err(error) => match error.raw_os_error().map(Errno::from_raw) {
                Some(Errno::EINVAL | Errno::EOPNOTSUPP) => Err(OpenError::NoDirect { path }),
                _ => Err(OpenError::Other { path, source: error }),
            },
        }
    }

    /// Where the bytes begin that are written through the page cache; the size if there are none.
    fn tail(&self) -> u64 {
        let size = self.size();
        if size.is_multiple_of(self.unit) {
            return size;
        }
        size - size % self.unit.max(self.buffered.block())
    }

    /// Whether a range consists of whole units.
    fn is_aligned(&self, offset: u64, length: usize) -> bool {
        offset.is_multiple_of(self.unit) && (length as u64).is_multiple_of(self.unit)
    }

    /// Whether the kernel can transfer `bytes` from or to `offset` without a copy.
    fn is_direct(&self, offset: u64, bytes: &[u8]) -> bool {
        let address = bytes.as_ptr().addr() as u64;
        self.is_aligned(offset, bytes.len()) && address.is_multiple_of(self.unit)
    }

    /// The units around the first bytes of `range`, at most [`BOUNCE_MAX`] bytes, and the rest of the
    /// range. The units may reach beyond the end of the image.
    fn next_units(&self, range: Range) -> (Units, Range) {
        let start = range.offset() - range.offset() % self.unit;
        let end = range.end().next_multiple_of(self.unit).min(start + BOUNCE_MAX.max(self.unit));
        let (part, rest) = range.split(end - range.offset());
        (Units { start, end, part }, rest)
    }

    /// A buffer for `length` bytes, whole units.
    fn bounce(&self, length: u64) -> io::Result<Buffer> {
        // They fit: a unit is at most 64 KiB, and the length at most 256 KiB.
        Buffer::to_fill(length as usize, self.unit as usize)
    }

    /// Reads whole units into aligned memory, of which the file has to have at least `needed` bytes.
    fn read_units(&self, offset: u64, into: &mut [u8], needed: usize) -> io::Result<()> {
        let mut done = 0;
        while done < needed {
            match self.direct.read_at(&mut into[done..], offset + done as u64) {
                Ok(count) if done + count >= needed => return Ok(()),
                // Within a unit only the end of the file stops a read, and a second try finds nothing.
                Ok(count) => done = self.advance(done, count).ok_or_else(|| self.shortened())?,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Writes whole units from aligned memory. With `durable` each is on stable storage afterwards, if
    /// [`RingFile::writes_durably`] still says so.
    fn write_units(&self, offset: u64, data: &[u8], durable: bool) -> io::Result<()> {
        let mut done = 0;
        while done < data.len() {
            let (at, rest) = (offset + done as u64, &data[done..]);
            let durable = durable && self.writes_durably();
            let written = match durable {
                true => syscalls::write_durably(&self.direct, at, rest),
                false => self.direct.write_at(rest, at),
            };
            match written {
                Ok(count) => {
                    let next = self.advance(done, count);
                    done = next.ok_or_else(|| io::Error::from(io::ErrorKind::WriteZero))?;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if durable => self.buffered.after_durable_error(error)?,
                Err(error) => return Err(self.buffered.write_error(error)),
            }
        }
        Ok(())
    }

    /// Where a transfer of units continues after `count` more bytes: at the unit in which it ended. `None`
    /// if it is the same as before.
    fn advance(&self, done: usize, count: usize) -> Option<usize> {
        // It fits: a unit is at most 64 KiB.
        let reached = done + count;
        let next = reached - reached % self.unit as usize;
        (next > done).then_some(next)
    }

    /// Writes the units around `data`, none of them in the tail, through a buffer.
    fn write_bounced(&self, offset: u64, data: &[u8], durable: bool) -> io::Result<()> {
        let mut rest = Range::whole(self.tail()).from(offset).split(data.len() as u64).0;
        while !rest.is_empty() {
            let (units, after) = self.next_units(rest);
            let mut bounce = self.bounce(units.length())?;
            let unit = self.unit as usize;
            let (first, last) = (units.start, units.end - self.unit);
            if units.part.offset() > first {
                self.read_units(first, &mut bounce[..unit], unit)?;
            }
            if units.part.end() < units.end && (last > first || units.part.offset() == first) {
                let length = bounce.len();
                self.read_units(last, &mut bounce[length - unit..], unit)?;
            }
            let from = (units.part.offset() - offset) as usize;
            let length = units.part.length() as usize;
            bounce[units.place()].copy_from_slice(&data[from..from + length]);
            self.write_units(first, &bounce, durable)?;
            rest = after;
        }
        Ok(())
    }

    /// Writes a part of the tail, durably, and drops its pages.
    fn write_tail(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let written = self.buffered.write(offset, data, true);
        let start = syscalls::to_off_t(self.tail())?;
        // To the end of the file, because the advice leaves out pages that the range covers in part.
        // Pages that stay are clean.
        let advice = PosixFadviseAdvice::POSIX_FADV_DONTNEED;
        let _ = posix_fadvise(self.buffered.file(), start, 0, advice);
        written
    }

    fn shortened(&self) -> io::Error {
        self.buffered.shortened()
    }
}

/// Whole units around a range.
struct Units {
    start: u64,
    end: u64,
    part: Range,
}

impl Units {
    fn length(&self) -> u64 {
        self.end - self.start
    }

    /// The place of the range in the units.
    fn place(&self) -> std::ops::Range<usize> {
        // They fit: at most 256 KiB.
        let start = (self.part.offset() - self.start) as usize;
        start..start + self.part.length() as usize
    }
}

/// Opens the file of a descriptor again, with `O_DIRECT`. The path of the image may lead to another
/// file by now.
fn reopen(file: &File, access: Access) -> io::Result<File> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let mut options = OpenOptions::new();
    options.read(true).write(!access.read_only).custom_flags(libc::O_DIRECT);
    let direct = options.open(path)?;
    let identity = |file: &File| {
        let found = file.metadata()?;
        io::Result::Ok((found.dev(), found.ino(), found.rdev()))
    };
    if identity(&direct)? == identity(file)? {
        Ok(direct)
    } else {
        Err(io::Error::other("/proc/self/fd leads to another file"))
    }
}

impl Backend for DirectBackend {
    fn size(&self) -> u64 {
        self.buffered.size()
    }

    fn identity(&self) -> Option<Identity> {
        self.buffered.identity()
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        if self.is_direct(offset, into) {
            return self.read_units(offset, into, into.len());
        }
        let mut rest = Range::whole(self.size()).from(offset).split(into.len() as u64).0;
        let mut into = into;
        while !rest.is_empty() {
            let (units, after) = self.next_units(rest);
            let (mut bounce, place) = (self.bounce(units.length())?, units.place());
            self.read_units(units.start, &mut bounce, place.end)?;
            let (part, later) = into.split_at_mut(place.len());
            part.copy_from_slice(&bounce[place]);
            (into, rest) = (later, after);
        }
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8], durable: bool) -> io::Result<()> {
        let before_tail = self.tail().saturating_sub(offset).min(data.len() as u64) as usize;
        let (units, tail) = data.split_at(before_tail);
        if self.is_direct(offset, units) {
            self.write_units(offset, units, durable)?;
        } else {
            self.write_bounced(offset, units, durable)?;
        }
        if !tail.is_empty() {
            self.write_tail(offset + units.len() as u64, tail)?;
        }
        if durable && !self.writes_durably() { self.flush() } else { Ok(()) }
    }

    /// There is no page cache to read ahead into.
    fn execute(&self, op: &Op) -> io::Result<()> {
        match op {
            Op::Zero { range, how, .. } => self.buffered.zero_through(self, *range, *how),
            Op::Trim { range, .. } => self.buffered.trim(*range),
            Op::Cache(_) => Ok(()),
            _ => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    fn flush(&self) -> io::Result<()> {
        self.buffered.flush()
    }

    fn extent(&self, offset: u64) -> io::Result<Extent> {
        self.buffered.extent(offset)
    }

    fn extents_wait(&self) -> bool {
        self.buffered.looks_for_holes()
    }

    fn queue(&self, notifier: BorrowedFd<'_>) -> Option<Box<dyn IoQueue + '_>> {
        if !self.buffered.allows_io_uring() {
            return None;
        }
        Some(Box::new(Uring::new(self, notifier).ok()?))
    }

    fn unit(&self) -> u64 {
        self.unit
    }

    fn works_by_extent(&self, op: &Op) -> bool {
        self.buffered.works_by_extent(op)
    }

    /// The kernel executes direct writes of the same bytes at the same time.
    fn orders_writes(&self) -> bool {
        false
    }
}

impl RingFile for DirectBackend {
    fn fd(&self) -> RawFd {
        self.direct.as_raw_fd()
    }

    fn writes_durably(&self) -> bool {
        self.buffered.writes_durably()
    }

    fn has_page_cache(&self) -> bool {
        false
    }

    fn can_transfer(&self, offset: u64, length: usize) -> bool {
        self.is_aligned(offset, length) && offset + length as u64 <= self.tail()
    }

    /// Without edges only: to write them waits for the device.
    fn zero_call(&self, range: Range, how: Zeroing) -> Option<FallocateCall> {
        self.buffered.zero_call(range, how).filter(|call| call.blocks == range)
    }

    fn trim_call(&self, range: Range) -> Option<FallocateCall> {
        self.buffered.trim_call(range)
    }

    fn edges(&self, _range: Range) -> Vec<Range> {
        Vec::new()
    }

    fn zero_edges(&self, _range: Range, _allocated: bool) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
impl DirectBackend {
    /// Behaves as on a device with this unit, a multiple of the real one.
    pub(super) fn with_unit(self, unit: u64) -> Self {
        assert!(unit.is_multiple_of(self.unit) && unit.is_power_of_two());
        Self { unit, ..self }
    }
}

#[cfg(test)]
mod tests;
