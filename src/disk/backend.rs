//! The interface between a disk and the storage of its bytes.
//! Decides nothing, and checks no range: [`super::Disk`] has done that.
//!
//! [`Backend`] is what every backend has to do. What only some of them can do is an optional capability:
//! [`PageCache`] for bytes that are in memory, [`SocketTransfer`] for sending without a copy.

use super::features::Features;
use super::io_queue::IoQueue;
use super::op::{Extent, Op};
use crate::range::Range;
use nix::errno::Errno;
use std::io;
use std::os::fd::BorrowedFd;

/// Device and inode number of a file; of a block device, 0 and its own device number, so that all
/// nodes of one device are equal.
pub type Identity = (u64, u64);

/// The storage of a disk: a file, a block device, or memory in tests.
///
/// Many threads call it at once, and only with ranges inside [`Backend::size`]. Unless said otherwise,
/// a call blocks until the device has executed it.
pub trait Backend: Send + Sync + std::fmt::Debug {
    /// Size in bytes; it does not change while the image is open.
    fn size(&self) -> u64;
    /// Tells this image from every other image of this host, where that is possible.
    fn identity(&self) -> Option<Identity> {
        None
    }
    /// What it can do, and the sizes of requests that suit it; they do not change while it is open.
    fn features(&self) -> Features {
        Features::default()
    }
    /// Fills `into` from `offset` on. A file that became shorter is an error, not a short read.
    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()>;
    /// Writes all of `data`; with `durable` returns only once it is on stable storage.
    fn write(&self, offset: u64, data: &[u8], durable: bool) -> io::Result<()>;
    /// Executes an operation for which there is no other method: a zeroing or trim, which need not be
    /// durable, or a hint. `Unsupported` for one that the backend does not know.
    fn execute(&self, op: &Op) -> io::Result<()>;
    /// Returns once everything written before the call is on stable storage.
    fn flush(&self) -> io::Result<()>;
    /// The extent that contains `offset`, from `offset` on.
    fn extent(&self, offset: u64) -> io::Result<Extent>;
    /// Whether the bytes are on another host, which may stop answering without a fault of this one.
    fn is_remote(&self) -> bool {
        false
    }
    /// Whether to find extents may take long. A list of extents is an operation in flight then
    /// ([`Op::Extents`]); otherwise the session's thread looks them up. Reads that look for holes call
    /// [`Backend::extent`] in either case.
    fn extents_wait(&self) -> bool {
        false
    }
    /// An I/O queue for one session, created on the session's thread; `None` where I/O cannot be
    /// asynchronous. Each completion adds to the eventfd `notifier`.
    fn queue(&self, notifier: BorrowedFd<'_>) -> Option<Box<dyn IoQueue + '_>> {
        let _ = notifier;
        None
    }
    /// The unit of the device's I/O in bytes, a power of two: a change of a part of a unit reads and
    /// writes the whole unit, and buffers of operations begin at a multiple of it. Two changes of one
    /// unit never execute at the same time.
    fn unit(&self) -> u64 {
        1
    }
    /// Whether the time that a divisible operation takes depends on the number of extents rather than
    /// of bytes, as in a file with `fallocate(2)`.
    fn works_by_extent(&self, op: &Op) -> bool {
        let _ = op;
        false
    }
    /// Whether of two writes of the same bytes the one that begins later also ends later. The kernel
    /// serializes buffered writes to a file; on a block device one write may overtake another.
    fn orders_writes(&self) -> bool {
        true
    }
    /// The cache in front of the device, if there is one. Without it, every read and write is an
    /// operation in flight.
    fn page_cache(&self) -> Option<&dyn PageCache> {
        None
    }
    /// How to send bytes to a socket without copying them through this process, if that is possible.
    fn socket_transfer(&self) -> Option<&dyn SocketTransfer> {
        None
    }
}

/// Capability: the backend keeps bytes in memory. [`Backend::write`] without `durable` then returns as
/// soon as they are there, unless it has to read a block from the device first.
pub trait PageCache {
    /// Reads like [`Backend::read`], but fails with `WouldBlock` instead of waiting for the device;
    /// `into` may then hold anything.
    fn read_now(&self, offset: u64, into: &mut [u8]) -> io::Result<()>;
    /// Whether the range seems to be in memory: a guess from a few samples.
    fn is_resident(&self, range: Range) -> bool {
        let _ = range;
        true
    }
    /// Starts the write-back of dirty pages in the range, so that a later flush has less to do; does
    /// not wait for it. An error says nothing about the data: the next flush reports that.
    fn start_write_back(&self, range: Range) -> io::Result<()> {
        let _ = range;
        Ok(())
    }
}

/// Capability: bytes go from the backend to a socket by reference.
pub trait SocketTransfer {
    /// Moves exactly `length` bytes from `offset` on into a pipe that has room for them, by reference.
    /// May wait for the device. After an error the pipe may hold any part of them; `Unsupported`
    /// means that the caller has to read them instead.
    fn pin(&self, offset: u64, length: usize, pipe: BorrowedFd<'_>) -> io::Result<()>;
    /// Sends at most `length` bytes from `offset` on to a socket, and returns how many it sent; does
    /// not wait for a non-blocking socket. `Unsupported` where that is impossible.
    fn send(&self, offset: u64, length: usize, to: BorrowedFd<'_>) -> io::Result<usize>;
}

/// The kernel's number for an error, or `EIO` for an error without one.
#[must_use]
pub fn errno_of(error: &io::Error) -> i32 {
    error.raw_os_error().unwrap_or(Errno::EIO as i32)
}
