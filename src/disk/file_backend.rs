//! The backing file or block device: the calls that read, write, zero, trim and flush it.
//! Never changes its size, never touches a byte outside the ranges it is given, and never logs.

use super::backend::{Backend, Identity, PageCache, SocketTransfer, errno_of};
use super::extents::SeekResult;
use super::file_system::{self, FileSystem, HolePolicy};
use super::io_queue::IoQueue;
use super::op::{Extent, Op, Zeroing};
use super::open::{self, Access, FileKind, OpenError, SECTOR};
use super::uring::{FallocateCall, RingFile, Uring};
use super::{extents, syscalls};
use crate::range::Range;
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, PosixFadviseAdvice, fallocate, posix_fadvise};
use nix::fcntl::{SpliceFFlags, splice};
use nix::sys::sendfile::sendfile;
use nix::unistd::{Whence, lseek};
use std::fs::File;
use std::io::{self, Seek as _, SeekFrom};
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

mod zeros;

/// How much to read into the page cache at once without `io_uring(7)`, in bytes.
const LOAD_STEP: usize = 32 << 10;

/// An image in a regular file or on a block device.
#[derive(Debug)]
pub struct FileBackend {
    file: File,
    path: PathBuf,
    kind: FileKind,
    file_system: FileSystem,
    /// Whole sectors, in bytes.
    size: u64,
    unserved_tail: u64,
    is_new: bool,
    unsupported: Unsupported,
}

/// Operations that the file system or device turned out not to support; they are not tried again.
#[derive(Debug, Default)]
struct Unsupported {
    punch_hole: AtomicBool,
    zero_range: AtomicBool,
    durable_write: AtomicBool,
    seek_data: AtomicBool,
    read_without_waiting: AtomicBool,
    /// Set in tests only: a kernel without `io_uring(7)`.
    io_uring: AtomicBool,
}

/// A mode of `fallocate(2)` that zeroes a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ZeroMethod {
    /// Deallocates the range. On a block device: unmaps it, or has the device write zeros.
    PunchHole,
    /// Keeps the range allocated. On a block device the kernel may write the zeros itself.
    ZeroRange,
}

impl ZeroMethod {
    fn mode(self) -> FallocateFlags {
        match self {
            Self::PunchHole => FallocateFlags::FALLOC_FL_PUNCH_HOLE,
            Self::ZeroRange => FallocateFlags::FALLOC_FL_ZERO_RANGE,
        }
    }
}

impl FileBackend {
    /// Opens and locks the image at `path`: exclusively, or shared with other readers when
    /// `access` is read-only. The lock ends with the last descriptor of this opening.
    ///
    /// # Errors
    /// One variant of [`OpenError`] for each reason why it cannot be served.
    pub fn open(path: &Path, access: Access) -> Result<Self, OpenError> {
        let opened = open::open(path, access)?;
        let unserved_tail = opened.full_size % SECTOR;
        let file_system = file_system::probe(&opened.file, opened.kind);
        Ok(Self {
            file: opened.file,
            path: path.to_owned(),
            kind: opened.kind,
            file_system,
            size: opened.full_size - unserved_tail,
            unserved_tail,
            is_new: false,
            unsupported: Unsupported::default(),
        })
    }

    /// Opens the image at `path`, creating a sparse file of `size` bytes with mode 0600 if the path
    /// does not exist. An existing image is opened as it is, whatever its size.
    ///
    /// # Errors
    /// [`OpenError::CannotCreate`], [`OpenError::TooSmall`], or those of [`FileBackend::open`].
    pub fn create(path: &Path, size: u64, access: Access) -> Result<Self, OpenError> {
        let is_new = open::create_if_missing(path, size)?;
        Ok(Self { is_new, ..Self::open(path, access)? })
    }

    /// Sets whether to trust the holes that the file system reports.
    #[must_use]
    pub fn with_holes(mut self, policy: HolePolicy) -> Self {
        self.file_system.reports_holes = policy.trusts(self.file_system.reports_holes);
        self
    }

    /// Whether [`FileBackend::create`] created the file.
    #[must_use]
    pub fn is_new(&self) -> bool {
        self.is_new
    }

    /// Bytes after the last whole sector, which are not served; the caller may warn about them.
    #[must_use]
    pub fn unserved_tail(&self) -> u64 {
        self.unserved_tail
    }

    /// The open file.
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// The path it was opened by.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The logical sector size of a block device, in bytes; none for a file.
    pub(super) fn sector(&self) -> Option<u64> {
        match self.kind {
            FileKind::File => None,
            FileKind::BlockDevice { sector } => Some(sector),
        }
    }

    /// Block size of the file system in bytes, at least a page.
    pub(super) fn block(&self) -> u64 {
        self.file_system.block
    }

    /// Whether to use `io_uring(7)` where the kernel has it.
    pub(super) fn allows_io_uring(&self) -> bool {
        !self.unsupported.io_uring.load(Ordering::Relaxed)
    }

    fn unsupported_flag(&self, method: ZeroMethod) -> &AtomicBool {
        match method {
            ZeroMethod::PunchHole => &self.unsupported.punch_hole,
            ZeroMethod::ZeroRange => &self.unsupported.zero_range,
        }
    }

    /// The whole blocks of `range`, which the kernel may zero or trim ([`file_system`]).
    fn whole_blocks(&self, range: Range) -> Range {
        range.aligned_within(self.file_system.block)
    }

    /// The methods to try, best first.
    fn zero_methods(&self, how: Zeroing) -> &'static [ZeroMethod] {
        match (self.kind, how.keep_allocated, how.only_if_fast) {
            (FileKind::File, false, _) => &[ZeroMethod::PunchHole],
            (FileKind::File, true, _) => &[ZeroMethod::ZeroRange],
            (FileKind::BlockDevice { .. }, false, false) => {
                &[ZeroMethod::PunchHole, ZeroMethod::ZeroRange]
            }
            (FileKind::BlockDevice { .. }, true, false) => &[ZeroMethod::ZeroRange],
            // A failing attempt is not free: the kernel drops its cached pages of the range, even
            // dirty ones, before it finds that the device cannot, or writes the zeros itself.
            (FileKind::BlockDevice { .. }, _, true) => &[],
        }
    }

    /// Zeroes `range` by one method; false if that is unsupported. Then a file is unchanged, but on
    /// a block device the caller must write the whole range.
    fn try_zero_method(&self, method: ZeroMethod, range: Range) -> io::Result<bool> {
        let (unsupported, mode) = (self.unsupported_flag(method), method.mode());
        if unsupported.load(Ordering::Relaxed) {
            return Ok(false);
        }
        let mode = mode | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let (offset, length) =
            (syscalls::to_off_t(range.offset())?, syscalls::to_off_t(range.length())?);
        loop {
            match fallocate(&self.file, mode, offset, length) {
                Ok(()) => return Ok(true),
                Err(Errno::EINTR) => {}
                Err(error) if syscalls::is_unable(error) => {
                    // Other errors may concern this range or this moment only: try again later.
                    if syscalls::is_unsupported(error) {
                        unsupported.store(true, Ordering::Relaxed);
                    }
                    return Ok(false);
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Whether all methods turned out to be unsupported.
    fn supports_none(&self, how: Zeroing) -> bool {
        self.zero_methods(how)
            .iter()
            .all(|method| self.unsupported_flag(*method).load(Ordering::Relaxed))
    }

    /// Zeroes `range` by the first method that works; false if none does.
    fn zero_by_kernel(&self, range: Range, how: Zeroing) -> io::Result<bool> {
        for method in self.zero_methods(how) {
            if self.try_zero_method(*method, range)? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Makes the range read as zeros. Where the kernel does not zero bytes, reads and writes them by
    /// `through`, a backend of the same file.
    pub(super) fn zero_through(
        &self,
        through: &dyn Backend,
        range: Range,
        how: Zeroing,
    ) -> io::Result<()> {
        let blocks = self.whole_blocks(range);
        let cannot_be_fast =
            how.only_if_fast && self.kind == FileKind::File && self.supports_none(how);
        // Whole blocks first: if they cannot be zeroed fast, no byte has changed.
        if !cannot_be_fast && (blocks.is_empty() || self.zero_by_kernel(blocks, how)?) {
            return self.zero_edges_through(through, range, how.keep_allocated);
        }
        if how.only_if_fast {
            return Err(Errno::EOPNOTSUPP.into());
        }
        zeros::write_outside_holes(through, range, how.keep_allocated)
    }

    fn zero_edges_through(
        &self,
        through: &dyn Backend,
        range: Range,
        allocated: bool,
    ) -> io::Result<()> {
        let blocks = self.whole_blocks(range);
        if blocks.is_empty() {
            return zeros::write_outside_holes(through, range, allocated);
        }
        zeros::write_outside_holes(through, range.until(blocks.offset()), allocated)?;
        zeros::write_outside_holes(through, range.from(blocks.end()), allocated)
    }

    /// Makes the range read as zeros.
    pub(super) fn zero(&self, range: Range, how: Zeroing) -> io::Result<()> {
        self.zero_through(self, range, how)
    }

    /// Deallocates as much of the range as it can; the bytes may read as anything afterwards.
    pub(super) fn trim(&self, range: Range) -> io::Result<()> {
        let blocks = self.whole_blocks(range);
        if blocks.is_empty() {
            return Ok(());
        }
        match self.kind {
            FileKind::File => self.try_zero_method(ZeroMethod::PunchHole, blocks).map(drop),
            FileKind::BlockDevice { .. } => match syscalls::discard(&self.file, blocks) {
                Err(error) if syscalls::is_unable(errno(&error)) => Ok(()),
                result => result,
            },
        }
    }

    /// Has the kernel read the range ahead.
    pub(super) fn prefetch(&self, range: Range) -> io::Result<()> {
        let (offset, length) =
            (syscalls::to_off_t(range.offset())?, syscalls::to_off_t(range.length())?);
        let advice = PosixFadviseAdvice::POSIX_FADV_WILLNEED;
        posix_fadvise(&self.file, offset, length, advice).map_err(io::Error::from)
    }

    fn zeroes_by_extent(&self, how: Zeroing) -> bool {
        let is_able = |method: &ZeroMethod| !self.unsupported_flag(*method).load(Ordering::Relaxed);
        self.kind == FileKind::File && self.zero_methods(how).first().is_some_and(is_able)
    }

    /// Reads the range into the page cache.
    fn load(&self, range: Range) -> io::Result<()> {
        let (mut scratch, mut rest) = ([0; LOAD_STEP], range);
        while !rest.is_empty() {
            let (step, after) = rest.split(LOAD_STEP as u64);
            self.read(step.offset(), &mut scratch[..step.length() as usize])?;
            rest = after;
        }
        Ok(())
    }

    /// Writes with `RWF_DSYNC` while that is supported, and returns the data that is left.
    fn write_durably<'a>(&self, offset: u64, data: &'a [u8]) -> io::Result<&'a [u8]> {
        let mut rest = data;
        while !rest.is_empty() && !self.unsupported.durable_write.load(Ordering::Relaxed) {
            let at = offset + (data.len() - rest.len()) as u64;
            match syscalls::write_durably(&self.file, at, rest) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => rest = &rest[written..],
                Err(error) => self.after_durable_error(error)?,
            }
        }
        Ok(rest)
    }

    /// Returns `Ok` to try again, or to go on without durable writes.
    pub(super) fn after_durable_error(&self, error: io::Error) -> io::Result<()> {
        match error.raw_os_error().map(Errno::from_raw) {
            Some(Errno::EINTR) => Ok(()),
            Some(Errno::EOPNOTSUPP | Errno::ENOSYS) => {
                self.unsupported.durable_write.store(true, Ordering::Relaxed);
                Ok(())
            }
            _ => Err(self.write_error(error)),
        }
    }

    /// Checks that a missing extent up to the end is a hole, and not a file cut short.
    fn check_not_shortened(&self) -> io::Result<()> {
        if self.file.metadata()?.len() < self.size { Err(self.shortened()) } else { Ok(()) }
    }

    /// Whether the file system is asked for extents.
    pub(super) fn looks_for_holes(&self) -> bool {
        let is_trusted = self.kind == FileKind::File && self.file_system.reports_holes;
        is_trusted && !self.unsupported.seek_data.load(Ordering::Relaxed)
    }

    /// The error of a write. The kernel answers one beyond the end of a device that has vanished or shrunk
    /// with `ENOSPC`, as if the device were full.
    pub(super) fn write_error(&self, error: io::Error) -> io::Error {
        let is_device = self.kind != FileKind::File && errno(&error) == Errno::ENOSPC;
        let is_short = || (&self.file).seek(SeekFrom::End(0)).is_ok_and(|end| end < self.size);
        if is_device && is_short() { self.shortened() } else { error }
    }

    /// The error of a file that was cut short.
    pub(super) fn shortened(&self) -> io::Error {
        let (path, size) = (self.path.display(), self.size);
        let message = format!("{path} has become shorter than the {size} bytes that are served");
        io::Error::new(io::ErrorKind::UnexpectedEof, message)
    }
}

impl Backend for FileBackend {
    fn size(&self) -> u64 {
        self.size
    }

    fn identity(&self) -> Option<Identity> {
        let found = self.file.metadata().ok()?;
        let is_device = found.file_type().is_block_device();
        Some(if is_device { (0, found.rdev()) } else { (found.dev(), found.ino()) })
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(into, offset).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => self.shortened(),
            _ => error,
        })
    }

    fn queue(&self, notifier: BorrowedFd<'_>) -> Option<Box<dyn IoQueue + '_>> {
        if !self.allows_io_uring() {
            return None;
        }
        Some(Box::new(Uring::new(self, notifier).ok()?))
    }

    fn write(&self, offset: u64, data: &[u8], durable: bool) -> io::Result<()> {
        let rest = if durable { self.write_durably(offset, data)? } else { data };
        if rest.is_empty() {
            return Ok(());
        }
        let written = self.file.write_all_at(rest, offset + (data.len() - rest.len()) as u64);
        written.map_err(|error| self.write_error(error))?;
        if durable { self.flush() } else { Ok(()) }
    }

    fn execute(&self, op: &Op) -> io::Result<()> {
        match op {
            Op::Zero { range, how, .. } => self.zero(*range, *how),
            Op::Trim { range, .. } => self.trim(*range),
            Op::Cache(range) => self.prefetch(*range),
            Op::Load(range) => self.load(*range),
            _ => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    fn works_by_extent(&self, op: &Op) -> bool {
        match op {
            Op::Zero { how, .. } => self.zeroes_by_extent(*how),
            Op::Trim { .. } => self.zeroes_by_extent(Zeroing::default()),
            _ => false,
        }
    }

    fn orders_writes(&self) -> bool {
        self.kind == FileKind::File
    }

    fn flush(&self) -> io::Result<()> {
        // fdatasync suffices, because the size never changes.
        self.file.sync_data()
    }

    fn page_cache(&self) -> Option<&dyn PageCache> {
        Some(self)
    }

    fn socket_transfer(&self) -> Option<&dyn SocketTransfer> {
        self.file_system.has_stable_pages.then_some(self)
    }

    fn extent(&self, offset: u64) -> io::Result<Extent> {
        let rest = Range::whole(self.size).from(offset);
        let allocated = |range| Ok(Extent { range, allocated: true });
        let hole = |range| Ok(Extent { range, allocated: false });
        if !self.looks_for_holes() {
            return allocated(rest);
        }
        match extents::probe(rest, |offset, whence| seek(&self.file, offset, whence)) {
            SeekResult::Data(range) => allocated(range),
            SeekResult::Hole(range) => hole(range),
            SeekResult::NoMoreData => self.check_not_shortened().and_then(|()| hole(rest)),
            // A real defect shows when the range is read.
            SeekResult::Failed(errno) => {
                let ever = syscalls::is_unsupported(errno) || errno == Errno::EINVAL;
                self.unsupported.seek_data.fetch_or(ever, Ordering::Relaxed);
                allocated(rest)
            }
        }
    }
}

impl PageCache for FileBackend {
    fn read_now(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let unsupported = &self.unsupported.read_without_waiting;
        if unsupported.load(Ordering::Relaxed) {
            return self.read(offset, into);
        }
        match syscalls::read_without_waiting(&self.file, offset, into) {
            Ok(count) if count == into.len() => Ok(()),
            // Short: either the rest is not resident, or the file ended. A blocking read tells.
            Ok(_) => Err(io::ErrorKind::WouldBlock.into()),
            Err(error) => match error.raw_os_error().map(Errno::from_raw) {
                Some(Errno::EINTR) => Err(io::ErrorKind::WouldBlock.into()),
                Some(Errno::EOPNOTSUPP | Errno::ENOSYS) => {
                    unsupported.store(true, Ordering::Relaxed);
                    self.read(offset, into)
                }
                _ => Err(error),
            },
        }
    }

    /// Probes the first byte, which also starts the kernel's readahead as for a reader, and the last.
    fn is_resident(&self, range: Range) -> bool {
        if self.unsupported.read_without_waiting.load(Ordering::Relaxed) {
            return true;
        }
        [range.offset(), range.end().saturating_sub(1)].into_iter().all(|at| {
            let found = self.read_now(at, &mut [0]);
            !found.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
        })
    }

    fn start_write_back(&self, range: Range) -> io::Result<()> {
        syscalls::start_write_back(&self.file, range)
    }
}

impl SocketTransfer for FileBackend {
    fn pin(&self, offset: u64, length: usize, pipe: BorrowedFd<'_>) -> io::Result<()> {
        let mut from = syscalls::to_off_t(offset)?;
        let mut left = length;
        while left > 0 {
            let flags = SpliceFFlags::SPLICE_F_NONBLOCK;
            match splice(&self.file, Some(&mut from), pipe, None, left, flags) {
                Ok(0) => return Err(self.shortened()),
                Ok(count) => left -= count.min(left),
                Err(Errno::EINTR) => {}
                // The pipe is full, or this file does not support splice(2).
                Err(Errno::EAGAIN | Errno::EINVAL | Errno::ENOSYS) => {
                    return Err(io::ErrorKind::Unsupported.into());
                }
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    fn send(&self, offset: u64, length: usize, to: BorrowedFd<'_>) -> io::Result<usize> {
        let mut from = syscalls::to_off_t(offset)?;
        match sendfile(to, &self.file, Some(&mut from), length) {
            Ok(0) => Err(self.shortened()),
            Ok(count) => Ok(count),
            Err(Errno::EINVAL | Errno::ENOSYS) => Err(io::ErrorKind::Unsupported.into()),
            Err(errno) => Err(errno.into()),
        }
    }
}

impl RingFile for FileBackend {
    fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    fn writes_durably(&self) -> bool {
        !self.unsupported.durable_write.load(Ordering::Relaxed)
    }

    fn has_page_cache(&self) -> bool {
        true
    }

    fn can_transfer(&self, _offset: u64, _length: usize) -> bool {
        true
    }

    fn zero_call(&self, range: Range, how: Zeroing) -> Option<FallocateCall> {
        let method = *self.zero_methods(how).first()?;
        let blocks = self.whole_blocks(range);
        let able = !blocks.is_empty() && !self.unsupported_flag(method).load(Ordering::Relaxed);
        able.then(|| FallocateCall { mode: method.mode(), blocks })
    }

    fn trim_call(&self, range: Range) -> Option<FallocateCall> {
        match self.kind {
            FileKind::File => self.zero_call(range, Zeroing::default()),
            // Discarding is an ioctl, which io_uring does not have.
            FileKind::BlockDevice { .. } => None,
        }
    }

    fn edges(&self, range: Range) -> Vec<Range> {
        let size = self.file_system.block;
        let block = |at: u64| Range::whole(self.size).from(at - at % size).split(size).0;
        let ends = [range.offset(), range.end()];
        ends.into_iter().filter(|at| !at.is_multiple_of(size)).map(block).collect()
    }

    fn zero_edges(&self, range: Range, allocated: bool) -> io::Result<()> {
        self.zero_edges_through(self, range, allocated)
    }
}

/// The kernel's number for an error.
fn errno(error: &io::Error) -> Errno {
    Errno::from_raw(errno_of(error))
}

/// `lseek(2)` to data or a hole. It moves the file's position, which nothing else uses.
fn seek(file: &File, offset: u64, whence: Whence) -> nix::Result<u64> {
    let offset = i64::try_from(offset).map_err(|_| Errno::EOVERFLOW)?;
    lseek(file, offset, whence).map(i64::unsigned_abs)
}

#[cfg(test)]
impl FileBackend {
    /// Behaves as on a file system without any optional operation.
    pub(super) fn without_support(self) -> Self {
        let Unsupported {
            punch_hole,
            zero_range,
            durable_write,
            read_without_waiting,
            io_uring,
            ..
        } = &self.unsupported;
        for flag in [punch_hole, zero_range, durable_write, read_without_waiting, io_uring] {
            flag.store(true, Ordering::Relaxed);
        }
        self
    }
}

#[cfg(test)]
mod tests;
