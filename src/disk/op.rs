//! Operations: what a session has a disk do.
//! Pure. A new command of the protocol gets a variant here. A divisible operation, or one that holds data,
//! also gets a branch in the methods below.

use super::buffer::Buffer;
use crate::range::Range;
use nix::errno::Errno;
use std::io;

/// One operation on a disk, from the request of a client to the backend and back.
///
/// `durable` means that it completes only once its change is on stable storage
/// (`NBD_CMD_FLAG_FUA`).
#[derive(Debug, PartialEq, Eq)]
pub enum Op {
    /// Fills `data`.
    Read {
        /// The first byte.
        offset: u64,
        /// Receives the bytes.
        data: Buffer,
    },
    /// Writes all of `data`. A write that is not durable leaves out zeros that would go into a hole.
    Write {
        /// The first byte.
        offset: u64,
        /// The bytes.
        data: Buffer,
        /// See [`Op`].
        durable: bool,
    },
    /// Makes the range read as zeros.
    Zero {
        /// Where.
        range: Range,
        /// Hole or allocated, fast or not.
        how: Zeroing,
        /// See [`Op`].
        durable: bool,
    },
    /// Deallocates as much of the range as possible; the bytes may then read as anything.
    Trim {
        /// Where.
        range: Range,
        /// See [`Op`].
        durable: bool,
    },
    /// Makes everything durable that was written before.
    Flush,
    /// Starts readahead of the range, without waiting for it.
    Cache(Range),
    /// Reads the range into the page cache, and completes once it is there: for bytes that are then sent
    /// by reference. Only for a backend that has a page cache.
    Load(Range),
}

impl Op {
    /// The bytes that it reads or changes, on a disk of `size` bytes. `None` for a flush.
    ///
    /// # Errors
    /// `EINVAL` if they are beyond the end.
    pub fn range(&self, size: u64) -> io::Result<Option<Range>> {
        let (offset, length) = match self {
            Self::Read { offset, data } | Self::Write { offset, data, .. } => {
                (*offset, data.len() as u64)
            }
            Self::Zero { range, .. }
            | Self::Trim { range, .. }
            | Self::Cache(range)
            | Self::Load(range) => (range.offset(), range.length()),
            Self::Flush => return Ok(None),
        };
        Range::within(size, offset, length).map(Some).ok_or_else(|| Errno::EINVAL.into())
    }

    /// Whether it changes bytes.
    #[must_use]
    pub fn changes(&self) -> bool {
        matches!(self, Self::Write { .. } | Self::Zero { .. } | Self::Trim { .. })
    }

    /// Whether it has to be on stable storage before it completes.
    #[must_use]
    pub fn is_durable(&self) -> bool {
        match self {
            Self::Write { durable, .. }
            | Self::Zero { durable, .. }
            | Self::Trim { durable, .. } => *durable,
            Self::Flush => true,
            Self::Read { .. } | Self::Cache(_) | Self::Load(_) => false,
        }
    }

    /// Whether it may take long and is executed in parts. It is not durable then: the parts are
    /// flushed together after the last one.
    #[must_use]
    pub fn is_divisible(&self) -> bool {
        matches!(self, Self::Zero { .. } | Self::Trim { .. })
    }

    /// Splits a divisible operation into its next part and the rest; `divide` splits its range. The
    /// rest is empty if the part is the last one, and so is that of an operation that is not divisible.
    #[must_use]
    pub fn split(self, divide: impl FnOnce(Range) -> (Range, Range)) -> (Self, Self) {
        match self {
            Self::Zero { range, how, durable } => {
                let (part, rest) = divide(range);
                // The first part decides whether it can be fast, before any byte has changed.
                let later = Zeroing { only_if_fast: false, ..how };
                let part = Self::Zero { range: part, how, durable: false };
                (part, Self::Zero { range: rest, how: later, durable })
            }
            Self::Trim { range, durable } => {
                let (part, rest) = divide(range);
                (Self::Trim { range: part, durable: false }, Self::Trim { range: rest, durable })
            }
            whole => (whole, Self::Trim { range: Range::whole(0), durable: false }),
        }
    }

    /// Bytes of memory that it holds, or that it takes in the page cache until they are sent.
    #[must_use]
    pub fn memory(&self) -> usize {
        match self {
            Self::Read { data, .. } | Self::Write { data, .. } => data.len(),
            // It fits, as the bytes of a read do.
            Self::Load(range) => range.length() as usize,
            _ => 0,
        }
    }
}

/// How to make a range read as zeros (NBD specification, `NBD_CMD_WRITE_ZEROES`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Zeroing {
    /// Keep the space allocated (`NBD_CMD_FLAG_NO_HOLE`); otherwise punch a hole.
    pub keep_allocated: bool,
    /// Fail with `EOPNOTSUPP`, before any byte changes, rather than write zeros
    /// (`NBD_CMD_FLAG_FAST_ZERO`).
    pub only_if_fast: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn halve(range: Range) -> (Range, Range) {
        range.split(range.length() / 2)
    }

    #[test]
    fn only_the_first_part_decides_about_speed_and_only_the_rest_is_durable() {
        let (range, how) = (Range::whole(8), Zeroing { keep_allocated: true, only_if_fast: true });
        let (part, rest) = Op::Zero { range, how, durable: true }.split(halve);
        let later = Zeroing { only_if_fast: false, ..how };
        assert_eq!(part, Op::Zero { range: range.until(4), how, durable: false });
        assert_eq!(rest, Op::Zero { range: range.from(4), how: later, durable: true });
        let (part, rest) = Op::Trim { range, durable: true }.split(halve);
        assert_eq!(part, Op::Trim { range: range.until(4), durable: false });
        assert_eq!(rest, Op::Trim { range: range.from(4), durable: true });
    }

    #[test]
    fn indivisible_operations_are_their_only_part() {
        let (part, rest) = Op::Flush.split(halve);
        assert_eq!((part, rest.range(8).unwrap()), (Op::Flush, Some(Range::whole(0))));
    }
}
