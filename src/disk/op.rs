//! Operations: what a session has a disk do, and what they return.
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
    /// Finds the extents of the range (`NBD_CMD_BLOCK_STATUS`). Only for a backend whose extents wait
    /// ([`super::Backend::extents_wait`]).
    Extents {
        /// Where.
        range: Range,
        /// The most extents to find; at least one is found.
        limit: usize,
        /// Receives the extents: in order, without gaps, from the beginning of the range on. They may
        /// end before the range does.
        found: Vec<Extent>,
    },
}

/// A contiguous range that is either allocated or a hole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Where.
    pub range: Range,
    /// False for a hole, which reads as zeros.
    pub allocated: bool,
}

/// What a completed operation returns.
#[derive(Debug, Default, PartialEq, Eq)]
pub enum Returned {
    /// Only that it has succeeded.
    #[default]
    Success,
    /// The bytes of a read.
    Bytes(Buffer),
    /// The extents of a range that is not empty: at least one.
    Extents(Vec<Extent>),
}

impl Returned {
    /// The bytes of a read; none for any other operation.
    #[must_use]
    pub fn into_bytes(self) -> Buffer {
        match self {
            Self::Bytes(bytes) => bytes,
            Self::Success | Self::Extents(_) => Buffer::default(),
        }
    }
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
            | Self::Load(range)
            | Self::Extents { range, .. } => (range.offset(), range.length()),
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
            Self::Read { .. } | Self::Cache(_) | Self::Load(_) | Self::Extents { .. } => false,
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

    /// Bytes of memory that it holds, that its extents may take, or that it takes in the page cache until
    /// they are sent.
    #[must_use]
    pub fn memory(&self) -> usize {
        match self {
            Self::Read { data, .. } | Self::Write { data, .. } => data.len(),
            // It fits, as the bytes of a read do.
            Self::Load(range) => range.length() as usize,
            // An extent has at least one byte.
            Self::Extents { range, limit, .. } => {
                let count_max = usize::try_from(range.length()).unwrap_or(usize::MAX).min(*limit);
                count_max.saturating_mul(size_of::<Extent>())
            }
            _ => 0,
        }
    }

    /// What it returns, once it is executed successfully.
    #[must_use]
    pub fn into_returned(self) -> Returned {
        match self {
            Self::Read { data, .. } => Returned::Bytes(data),
            Self::Extents { range, limit, found } => {
                Returned::Extents(checked(range, limit, found))
            }
            _ => Returned::Success,
        }
    }
}

/// `found`, if it describes `range` from its beginning on with at most `limit` extents, or one. Otherwise the
/// range is data.
fn checked(range: Range, limit: usize, found: Vec<Extent>) -> Vec<Extent> {
    let mut at = range.offset();
    let follows = |extent: &Extent| {
        let is_next = extent.range.offset() == at && !extent.range.is_empty();
        at = extent.range.end();
        is_next
    };
    let is_consistent = !found.is_empty() && found.iter().all(follows);
    if is_consistent && at <= range.end() && found.len() <= limit.max(1) {
        return found;
    }
    vec![Extent { range, allocated: true }]
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
    fn memory_for_extents_is_bounded_by_limit_and_length() {
        let memory = |length, limit| {
            Op::Extents { range: Range::whole(length), limit, found: Vec::new() }.memory()
        };
        let each = size_of::<Extent>();
        assert_eq!(
            (memory(9, 10), memory(10, 10), memory(11, 10)),
            (9 * each, 10 * each, 10 * each)
        );
        assert_eq!(memory(u64::MAX, usize::MAX), usize::MAX);
    }

    #[test]
    fn inconsistent_lists_of_extents_are_data() {
        let range = Range::whole(100).from(10).until(90);
        let part = |start, end, allocated| Extent {
            range: Range::whole(100).from(start).until(end),
            allocated,
        };
        let data = vec![part(10, 90, true)];
        let right = [
            vec![part(10, 20, false)],
            vec![part(10, 20, false), part(20, 90, true)],
            vec![part(10, 20, true), part(20, 89, true)],
        ];
        for found in right {
            assert_eq!(checked(range, 2, found.clone()), found);
        }
        assert_eq!(checked(range, 0, vec![part(10, 20, false)]), [part(10, 20, false)]);
        let wrong = [
            vec![],
            vec![part(9, 20, false)],
            vec![part(11, 20, false)],
            vec![part(10, 91, false)],
            vec![part(10, 10, false), part(10, 20, false)],
            vec![part(10, 20, false), part(21, 30, true)],
            vec![part(10, 20, false), part(19, 30, true)],
            vec![part(10, 20, false), part(20, 30, true), part(30, 40, false)],
        ];
        for found in wrong {
            assert_eq!(checked(range, 2, found.clone()), data, "{found:?}");
        }
    }

    #[test]
    fn indivisible_operations_are_their_only_part() {
        let (part, rest) = Op::Flush.split(halve);
        assert_eq!((part, rest.range(8).unwrap()), (Op::Flush, Some(Range::whole(0))));
    }
}
