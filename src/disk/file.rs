//! The backing file or block device: the calls that read, write, zero, trim and flush it.
//! Never changes its size, never touches a byte outside the ranges it is given, and never logs.

use super::backend::{Backend, Extent, Identity, errno_of};
use super::extents::SeekResult;
use super::file_system::{self, FileSystem, HolePolicy};
use super::io_queue::{IoQueue, Zeroing};
use super::open::{self, Access, FileKind, OpenError, SECTOR};
use super::uring::{FallocateCall, RingFile, Uring};
use super::{extents, syscalls, zeros};
use crate::range::Range;
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, PosixFadviseAdvice, fallocate, posix_fadvise};
use nix::fcntl::{SpliceFFlags, splice};
use nix::sys::sendfile::sendfile;
use nix::unistd::{Whence, lseek};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

/// How many zeros are written at a time where the kernel does not do it for us, in bytes.
const ZEROS_LENGTH: usize = 256 * 1024;
static ZEROS: [u8; ZEROS_LENGTH] = [0; ZEROS_LENGTH];

/// An image in a regular file or on a block device.
#[derive(Debug)]
pub struct FileBackend {
    file: File,
    path: PathBuf,
    kind: FileKind,
    under: FileSystem,
    /// Whole sectors, in bytes.
    size: u64,
    unserved_tail: u64,
    is_new: bool,
    lacks: Unsupported,
}

/// What file system or device were seen not to support, so that it is not tried each time.
#[derive(Debug, Default)]
struct Unsupported {
    punch_hole: AtomicBool,
    zero_range: AtomicBool,
    durable_write: AtomicBool,
    seek_data: AtomicBool,
    read_without_waiting: AtomicBool,
    /// Only in tests: a kernel without `io_uring(7)`.
    ring: AtomicBool,
}

/// A way to let the kernel do the zeroing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ZeroMethod {
    /// Gives the space back. On a block device: unmaps it, or lets the device make the zeros.
    PunchHole,
    /// Keeps the space. On a block device the kernel may write the zeros itself.
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
    /// One variant of [`OpenError`] for each way in which it cannot be served.
    pub fn open(path: &Path, access: Access) -> Result<Self, OpenError> {
        let opened = open::open(path, access)?;
        let unserved_tail = opened.full_size % SECTOR;
        let under = file_system::probe(&opened.file, opened.kind);
        Ok(Self {
            file: opened.file,
            path: path.to_owned(),
            kind: opened.kind,
            under,
            size: opened.full_size - unserved_tail,
            unserved_tail,
            is_new: false,
            lacks: Unsupported::default(),
        })
    }

    /// Opens the image at `path`, after making it as a sparse file of `size` bytes with mode 0600
    /// if nothing has that name. What exists is opened as it is, of whatever size.
    ///
    /// # Errors
    /// [`OpenError::CannotCreate`], [`OpenError::TooSmall`], or what [`FileBackend::open`] says.
    pub fn create(path: &Path, size: u64, access: Access) -> Result<Self, OpenError> {
        let is_new = open::create_if_missing(path, size)?;
        Ok(Self { is_new, ..Self::open(path, access)? })
    }

    /// The same, which believes what it is told of holes, or does not.
    #[must_use]
    pub fn with_holes(mut self, policy: HolePolicy) -> Self {
        self.under.reports_holes = policy.trusts(self.under.reports_holes);
        self
    }

    /// Whether it was made when it was opened: there was nothing of that name.
    #[must_use]
    pub fn is_new(&self) -> bool {
        self.is_new
    }

    /// How many bytes after the last whole sector of 512 are not served; the caller may want to
    /// warn of them.
    #[must_use]
    pub fn unserved_tail(&self) -> u64 {
        self.unserved_tail
    }

    /// What is open.
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// The path that it was opened by.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    fn lack(&self, way: ZeroMethod) -> &AtomicBool {
        match way {
            ZeroMethod::PunchHole => &self.lacks.punch_hole,
            ZeroMethod::ZeroRange => &self.lacks.zero_range,
        }
    }

    /// The part of `range` that the kernel may zero or trim ([`file_system`]).
    fn whole_blocks(&self, range: Range) -> Range {
        range.aligned_within(self.under.block)
    }

    /// What to try, best first.
    fn ways(&self, how: Zeroing) -> &'static [ZeroMethod] {
        match (self.kind, how.keep_allocated, how.only_if_fast) {
            (FileKind::File, false, _) => &[ZeroMethod::PunchHole],
            (FileKind::File, true, _) => &[ZeroMethod::ZeroRange],
            (FileKind::BlockDevice { .. }, false, false) => {
                &[ZeroMethod::PunchHole, ZeroMethod::ZeroRange]
            }
            (FileKind::BlockDevice { .. }, true, false) => &[ZeroMethod::ZeroRange],
            // To be asked is not free: the kernel drops what it has cached of the range, written
            // back or not, before it finds that the device cannot, or writes the zeros itself.
            (FileKind::BlockDevice { .. }, _, true) => &[],
        }
    }

    /// Lets the kernel zero `range`; false if it does not know how. Then nothing in a file has
    /// changed, but on a block device the range is to be written anew.
    fn try_way(&self, way: ZeroMethod, range: Range) -> io::Result<bool> {
        let (lacks, mode) = (self.lack(way), way.mode());
        if lacks.load(Ordering::Relaxed) {
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
                    // Others may be about this range or this moment, and are asked again.
                    if syscalls::is_unsupported(error) {
                        lacks.store(true, Ordering::Relaxed);
                    }
                    return Ok(false);
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Whether all ways to zero so were seen to be impossible.
    fn lacks_all(&self, how: Zeroing) -> bool {
        self.ways(how).iter().all(|way| self.lack(*way).load(Ordering::Relaxed))
    }

    /// Lets the kernel zero `range` in the first way that works; false if none does.
    fn zero_by_kernel(&self, range: Range, how: Zeroing) -> io::Result<bool> {
        for way in self.ways(how) {
            if self.try_way(*way, range)? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Writes zeros over all of `range`, or, unless it is to be `allocated`, over what is not a hole
    /// already. What is called a hole is read to be sure.
    fn zero_by_hand(&self, range: Range, allocated: bool) -> io::Result<()> {
        if allocated {
            return self.write_zeros(range);
        }
        let mut rest = range;
        while !rest.is_empty() {
            let extent = extents::extent_at(self, rest.offset())?;
            let (part, after) = rest.split(extent.range.length());
            if extent.allocated || !zeros::reads_as_zeros(self, part) {
                self.write_zeros(part)?;
            }
            rest = after;
        }
        Ok(())
    }

    fn write_zeros(&self, range: Range) -> io::Result<()> {
        let mut rest = range;
        while !rest.is_empty() {
            let (part, after) = rest.split(ZEROS.len() as u64);
            self.file.write_all_at(&ZEROS[..part.length() as usize], part.offset())?;
            rest = after;
        }
        Ok(())
    }

    /// Writes as much as the kernel takes with `RWF_DSYNC`, and returns how much is left.
    fn write_durably<'a>(&self, offset: u64, data: &'a [u8]) -> io::Result<&'a [u8]> {
        let mut rest = data;
        while !rest.is_empty() && !self.lacks.durable_write.load(Ordering::Relaxed) {
            let at = offset + (data.len() - rest.len()) as u64;
            match syscalls::write_durably(&self.file, at, rest) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => rest = &rest[written..],
                Err(error) => self.after_durable_error(error)?,
            }
        }
        Ok(rest)
    }

    /// Whether to go on after `error`: to try again, or to do without durable writes.
    fn after_durable_error(&self, error: io::Error) -> io::Result<()> {
        match error.raw_os_error().map(Errno::from_raw) {
            Some(Errno::EINTR) => Ok(()),
            Some(Errno::EOPNOTSUPP | Errno::ENOSYS) => {
                self.lacks.durable_write.store(true, Ordering::Relaxed);
                Ok(())
            }
            _ => Err(error),
        }
    }

    /// No data to the end is a hole, but only if the end is still where it was.
    fn check_not_shortened(&self) -> io::Result<()> {
        if self.file.metadata()?.len() < self.size { Err(self.shortened()) } else { Ok(()) }
    }

    fn shortened(&self) -> io::Error {
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

    fn read_now(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let lacks = &self.lacks.read_without_waiting;
        if lacks.load(Ordering::Relaxed) {
            return self.read(offset, into);
        }
        match syscalls::read_without_waiting(&self.file, offset, into) {
            Ok(count) if count == into.len() => Ok(()),
            // That it ends here is to be found out by whoever may wait.
            Ok(_) => Err(io::ErrorKind::WouldBlock.into()),
            Err(error) => match error.raw_os_error().map(Errno::from_raw) {
                Some(Errno::EINTR) => Err(io::ErrorKind::WouldBlock.into()),
                Some(Errno::EOPNOTSUPP | Errno::ENOSYS) => {
                    lacks.store(true, Ordering::Relaxed);
                    self.read(offset, into)
                }
                _ => Err(error),
            },
        }
    }

    /// Asks for the first byte, upon which the kernel begins to read ahead as it would for a
    /// reader, and then for the last.
    fn is_resident(&self, range: Range) -> bool {
        if self.lacks.read_without_waiting.load(Ordering::Relaxed) {
            return true;
        }
        [range.offset(), range.end().saturating_sub(1)].into_iter().all(|at| {
            let found = self.read_now(at, &mut [0]);
            !found.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
        })
    }

    fn queue(&self, notifier: BorrowedFd<'_>) -> Option<Box<dyn IoQueue + '_>> {
        if self.lacks.ring.load(Ordering::Relaxed) {
            return None;
        }
        Some(Box::new(Uring::new(self, notifier).ok()?))
    }

    fn write(&self, offset: u64, data: &[u8], durable: bool) -> io::Result<()> {
        if !durable {
            return self.file.write_all_at(data, offset);
        }
        let rest = self.write_durably(offset, data)?;
        if rest.is_empty() {
            return Ok(());
        }
        self.file.write_all_at(rest, offset + (data.len() - rest.len()) as u64)?;
        self.flush()
    }

    fn zero(&self, range: Range, how: Zeroing) -> io::Result<()> {
        let blocks = self.whole_blocks(range);
        let is_hopeless = how.only_if_fast && self.kind == FileKind::File && self.lacks_all(how);
        // The kernel's part first: if it cannot be done fast, nothing has been touched.
        if !is_hopeless && (blocks.is_empty() || self.zero_by_kernel(blocks, how)?) {
            return self.zero_edges(range, how.keep_allocated);
        }
        if how.only_if_fast {
            return Err(Errno::EOPNOTSUPP.into());
        }
        self.zero_by_hand(range, how.keep_allocated)
    }

    fn orders_writes(&self) -> bool {
        self.kind == FileKind::File
    }

    fn zeroes_by_extent(&self, how: Zeroing) -> bool {
        let is_able = |way: &ZeroMethod| !self.lack(*way).load(Ordering::Relaxed);
        self.kind == FileKind::File && self.ways(how).first().is_some_and(is_able)
    }

    fn trim(&self, range: Range) -> io::Result<()> {
        let blocks = self.whole_blocks(range);
        if blocks.is_empty() {
            return Ok(());
        }
        match self.kind {
            FileKind::File => self.try_way(ZeroMethod::PunchHole, blocks).map(drop),
            FileKind::BlockDevice { .. } => match syscalls::discard(&self.file, blocks) {
                Err(error) if syscalls::is_unable(errno(&error)) => Ok(()),
                result => result,
            },
        }
    }

    fn flush(&self) -> io::Result<()> {
        // The size never changes: what else fsync would write is of no use to the data.
        self.file.sync_data()
    }

    fn prefetch(&self, range: Range) -> io::Result<()> {
        let (offset, length) =
            (syscalls::to_off_t(range.offset())?, syscalls::to_off_t(range.length())?);
        let advice = PosixFadviseAdvice::POSIX_FADV_WILLNEED;
        posix_fadvise(&self.file, offset, length, advice).map_err(io::Error::from)
    }

    fn start_write_back(&self, range: Range) -> io::Result<()> {
        syscalls::start_write_back(&self.file, range)
    }

    fn pins(&self) -> bool {
        self.under.has_stable_pages
    }

    fn pin(&self, offset: u64, length: usize, pipe: BorrowedFd<'_>) -> io::Result<()> {
        let mut from = syscalls::to_off_t(offset)?;
        let mut left = length;
        while left > 0 {
            let flags = SpliceFFlags::SPLICE_F_NONBLOCK;
            match splice(&self.file, Some(&mut from), pipe, None, left, flags) {
                Ok(0) => return Err(self.shortened()),
                Ok(count) => left -= count.min(left),
                Err(Errno::EINTR) => {}
                // The pipe is full, or there is no such thing for this file.
                Err(Errno::EAGAIN | Errno::EINVAL | Errno::ENOSYS) => {
                    return Err(io::ErrorKind::Unsupported.into());
                }
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    fn send(&self, offset: u64, length: usize, to: BorrowedFd<'_>) -> io::Result<usize> {
        if !self.under.has_stable_pages {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let mut from = syscalls::to_off_t(offset)?;
        match sendfile(to, &self.file, Some(&mut from), length) {
            Ok(0) => Err(self.shortened()),
            Ok(count) => Ok(count),
            Err(Errno::EINVAL | Errno::ENOSYS) => Err(io::ErrorKind::Unsupported.into()),
            Err(errno) => Err(errno.into()),
        }
    }

    fn extent(&self, offset: u64) -> io::Result<Extent> {
        let rest = Range::whole(self.size).from(offset);
        let allocated = |range| Ok(Extent { range, allocated: true });
        let hole = |range| Ok(Extent { range, allocated: false });
        let asks = self.kind == FileKind::File && self.under.reports_holes;
        if !asks || self.lacks.seek_data.load(Ordering::Relaxed) {
            return allocated(rest);
        }
        match extents::ask(rest, |offset, whence| seek(&self.file, offset, whence)) {
            SeekResult::Data(range) => allocated(range),
            SeekResult::Hole(range) => hole(range),
            SeekResult::NoMore => self.check_not_shortened().and_then(|()| hole(rest)),
            // What is wrong with it, if anything is, will be told when it is read.
            SeekResult::Unable(errno) => {
                let ever = syscalls::is_unsupported(errno) || errno == Errno::EINVAL;
                self.lacks.seek_data.fetch_or(ever, Ordering::Relaxed);
                allocated(rest)
            }
        }
    }
}

impl RingFile for FileBackend {
    fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    fn writes_durably(&self) -> bool {
        !self.lacks.durable_write.load(Ordering::Relaxed)
    }

    fn zero_call(&self, range: Range, how: Zeroing) -> Option<FallocateCall> {
        let way = *self.ways(how).first()?;
        let blocks = self.whole_blocks(range);
        let able = !blocks.is_empty() && !self.lack(way).load(Ordering::Relaxed);
        able.then(|| FallocateCall { mode: way.mode(), blocks })
    }

    fn trim_call(&self, range: Range) -> Option<FallocateCall> {
        match self.kind {
            FileKind::File => self.zero_call(range, Zeroing::default()),
            // Discarding is an ioctl, which io_uring does not have.
            FileKind::BlockDevice { .. } => None,
        }
    }

    fn edges(&self, range: Range) -> Vec<Range> {
        let size = self.under.block;
        let block = |at: u64| Range::whole(self.size).from(at - at % size).split(size).0;
        let ends = [range.offset(), range.end()];
        ends.into_iter().filter(|at| !at.is_multiple_of(size)).map(block).collect()
    }

    fn zero_edges(&self, range: Range, allocated: bool) -> io::Result<()> {
        let blocks = self.whole_blocks(range);
        if blocks.is_empty() {
            return self.zero_by_hand(range, allocated);
        }
        self.zero_by_hand(range.until(blocks.offset()), allocated)?;
        self.zero_by_hand(range.from(blocks.end()), allocated)
    }
}

/// The kernel's number for an error, for those who tell one from another.
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
    /// As on a file system that supports none of what is nice to have.
    pub(super) fn without_support(self) -> Self {
        let Unsupported {
            punch_hole, zero_range, durable_write, read_without_waiting, ring, ..
        } = &self.lacks;
        for lack in [punch_hole, zero_range, durable_write, read_without_waiting, ring] {
            lack.store(true, Ordering::Relaxed);
        }
        self
    }
}

#[cfg(test)]
mod tests;
