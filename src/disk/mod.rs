//! The bytes being served, and who may touch them now.
//! Knows no network, no protocol and no log; errors go to the caller as `io::Error`.

use crate::range::Range;
use std::io;

/// What a disk's bytes are kept in: a file, a block device, or memory in tests.
///
/// Implementations are called from many threads at once, and only with ranges inside
/// [`Image::size`].
pub trait Image: Send + Sync + std::fmt::Debug {
    /// Size in bytes; it does not change while the image is open.
    fn size(&self) -> u64;
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
