//! System calls that have no safe wrapper elsewhere, each wrapped once.
//! Decides nothing: retries and fallbacks are up to the caller.

use crate::range::Range;
use nix::errno::Errno;
use nix::libc;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// Takes the advisory lock of `flock(2)`, shared or exclusive, without waiting.
///
/// The lock belongs to the open file description, not to the process: it ends when the last duplicate
/// of this descriptor is closed. `WouldBlock` means that another process or opening holds it.
pub(super) fn lock(file: &File, exclusive: bool) -> io::Result<()> {
    let kind = if exclusive { libc::LOCK_EX } else { libc::LOCK_SH };
    // SAFETY: takes a descriptor, open as long as `file`, and an integer; touches no memory.
    let result = unsafe { libc::flock(file.as_raw_fd(), kind | libc::LOCK_NB) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Writes `data` or a beginning of it and returns once that is on stable storage (`RWF_DSYNC`,
/// `pwritev2(2)`). Returns the number of bytes written.
pub(super) fn write_durably(file: &File, offset: u64, data: &[u8]) -> io::Result<usize> {
    let part = libc::iovec { iov_base: data.as_ptr().cast_mut().cast(), iov_len: data.len() };
    let offset = to_off_t(offset)?;
    // SAFETY: one iovec, which describes `data`; the kernel only reads from it, and both outlive
    // the call.
    let written =
        unsafe { libc::pwritev2(file.as_raw_fd(), &raw const part, 1, offset, libc::RWF_DSYNC) };
    usize::try_from(written).map_err(|_| io::Error::last_os_error())
}

/// Reads the bytes that are in the page cache, up to the first that is not (`RWF_NOWAIT`,
/// `preadv2(2)`). Returns how many; 0 at the end of the file; `WouldBlock` if there are none.
pub(super) fn read_without_waiting(file: &File, offset: u64, into: &mut [u8]) -> io::Result<usize> {
    let part = libc::iovec { iov_base: into.as_mut_ptr().cast(), iov_len: into.len() };
    let offset = to_off_t(offset)?;
    // SAFETY: one iovec, which describes `into`; the kernel writes no more than its length there,
    // and both outlive the call.
    let read =
        unsafe { libc::preadv2(file.as_raw_fd(), &raw const part, 1, offset, libc::RWF_NOWAIT) };
    usize::try_from(read).map_err(|_| io::Error::last_os_error())
}

/// Starts the write-back of dirty pages in `range`, without waiting for it (`sync_file_range(2)`).
/// May still wait for room in the device's queue. Leaves errors to the next `fdatasync(2)`.
pub(super) fn start_write_back(file: &File, range: Range) -> io::Result<()> {
    let (offset, length) = (to_off_t(range.offset())?, to_off_t(range.length())?);
    let flags = libc::SYNC_FILE_RANGE_WRITE;
    // SAFETY: takes a descriptor, open as long as `file`, and integers; touches no memory.
    let result = unsafe { libc::sync_file_range(file.as_raw_fd(), offset, length, flags) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The logical sector size of a block device, in bytes (`BLKSSZGET`).
pub(super) fn sector_size(device: &File) -> io::Result<u64> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: BLKSSZGET writes one int, and is given the address of one.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), libc::BLKSSZGET as _, &raw mut bytes) };
    if result == 0 {
        u64::try_from(bytes).map_err(io::Error::other)
    } else {
        Err(io::Error::last_os_error())
    }
}

/// The alignment of memory and of offsets in the file that `O_DIRECT` demands, in bytes
/// (`STATX_DIOALIGN`, statx(2)); zeros where it is impossible. `None` where the kernel does not tell:
/// before Linux 6.1, and on some file systems.
pub(super) fn direct_alignment(file: &File) -> Option<(u32, u32)> {
    let mut found = std::mem::MaybeUninit::<libc::statx>::zeroed();
    let (fd, mask) = (file.as_raw_fd(), libc::STATX_DIOALIGN);
    // SAFETY: an empty path stands for the descriptor, open as long as `file`; the kernel writes one
    // structure, and gets the address of one.
    let result =
        unsafe { libc::statx(fd, c"".as_ptr(), libc::AT_EMPTY_PATH, mask, found.as_mut_ptr()) };
    // SAFETY: zeros are a valid value, which the kernel may have overwritten with another.
    let found = unsafe { found.assume_init() };
    let is_known = result == 0 && found.stx_mask & libc::STATX_DIOALIGN != 0;
    is_known.then_some((found.stx_dio_mem_align, found.stx_dio_offset_align))
}

/// Discards `range`, whole sectors, of a block device (`BLKDISCARD`).
pub(super) fn discard(device: &File, range: Range) -> io::Result<()> {
    const REQUEST: nix::sys::ioctl::ioctl_num_type = nix::request_code_none!(0x12, 119);
    let span = [range.offset(), range.length()];
    // SAFETY: BLKDISCARD reads two u64, offset and length in bytes, and is given the address of
    // two.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), REQUEST, &raw const span) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The smallest allocation of XFS for a file, in bytes: a block, or an extent of the realtime device
/// (`FS_IOC_FSGETXATTR`, `XFS_IOC_FSGEOMETRY_V1`; ioctl_xfs_fsgetxattr(2)).
pub(super) fn xfs_unit(file: &File) -> io::Result<u64> {
    /// Lengths of the two structures in bytes, and the flag for a file on the realtime device.
    const ATTRIBUTES: usize = 28;
    const GEOMETRY: usize = 112;
    const IS_REALTIME: u32 = 1;
    const GET_ATTRIBUTES: nix::sys::ioctl::ioctl_num_type =
        nix::request_code_read!(b'X', 31, ATTRIBUTES);
    const GET_GEOMETRY: nix::sys::ioctl::ioctl_num_type =
        nix::request_code_read!(b'X', 100, GEOMETRY);
    let (mut attributes, mut geometry) = ([0u32; ATTRIBUTES / 4], [0u64; GEOMETRY / 8]);
    // SAFETY: the ioctl writes a structure of the length encoded in its number, and gets the address
    // of a buffer of that length.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), GET_ATTRIBUTES, attributes.as_mut_ptr()) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: as above; the structure needs 64-bit alignment at most.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), GET_GEOMETRY, geometry.as_mut_ptr()) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    // The structure begins with two 32-bit numbers: the block size, and that of a realtime extent in
    // blocks.
    let first = geometry[0].to_ne_bytes();
    let word = |at: usize| {
        u64::from(u32::from_ne_bytes([first[at], first[at + 1], first[at + 2], first[at + 3]]))
    };
    let is_realtime = attributes[0] & IS_REALTIME != 0;
    Ok(if is_realtime { word(0) * word(4) } else { word(0) })
}

/// Whether an error of `fallocate(2)` or of a discard means that the operation, or this form of it,
/// is unsupported: nothing has changed, and the caller may write zeros instead. False for errors of a
/// full or defective disk.
pub(super) fn is_unable(errno: Errno) -> bool {
    is_unsupported(errno)
        || matches!(
            errno,
            Errno::EINVAL
                | Errno::ENODEV
                | Errno::EPERM
                | Errno::EACCES
                | Errno::ESPIPE
                | Errno::EBUSY
                | Errno::ETXTBSY
                | Errno::EFBIG
                // ENOTSUPP (524), which some kernel code leaks and user space has no name for.
                | Errno::UnknownErrno
        )
}

/// Whether an error means that the operation is unsupported for every range of this file.
pub(super) fn is_unsupported(errno: Errno) -> bool {
    matches!(errno, Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::ENOTTY)
}

/// The generation of a file's inode (`FS_IOC_GETVERSION`). It changes each time the inode number is
/// reused for a new file.
pub(super) fn inode_generation(file: &File) -> io::Result<u32> {
    const REQUEST: nix::sys::ioctl::ioctl_num_type =
        nix::request_code_read!(b'v', 1, size_of::<libc::c_long>());
    // The ioctl is declared with a long, but the kernel writes an int.
    let mut generation = [0_u32; 2];
    // SAFETY: FS_IOC_GETVERSION writes at most one long, and is given the address of as much.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), REQUEST, &raw mut generation) };
    if result == 0 { Ok(generation[0]) } else { Err(io::Error::last_os_error()) }
}

/// Converts an offset or a length to the kernel's type.
pub(super) fn to_off_t(bytes: u64) -> io::Result<libc::off_t> {
    libc::off_t::try_from(bytes).map_err(|_| io::Error::from_raw_os_error(libc::EOVERFLOW))
}
