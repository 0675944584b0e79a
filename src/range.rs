//! A byte range that can neither overflow nor exceed its disk.
//! Pure arithmetic; never accesses the bytes.

/// A byte range that was checked against the size of its disk at construction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    offset: u64,
    length: u64,
}

impl Range {
    /// The `length` bytes from `offset` on, if a disk of `disk_size` bytes has all of them.
    ///
    /// An empty range may start at the end of the disk.
    #[must_use]
    pub fn within(disk_size: u64, offset: u64, length: u64) -> Option<Self> {
        let end = offset.checked_add(length)?;
        (end <= disk_size).then_some(Self { offset, length })
    }

    /// All bytes of a disk of `disk_size` bytes.
    #[must_use]
    pub fn whole(disk_size: u64) -> Self {
        Self { offset: 0, length: disk_size }
    }

    /// Offset of the first byte.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Length in bytes.
    #[must_use]
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Offset after the last byte; the check at construction rules out an overflow.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.offset + self.length
    }

    /// Whether the length is 0.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// The first `length` bytes (at most all), and the rest.
    #[must_use]
    pub fn split(&self, length: u64) -> (Self, Self) {
        let first = length.min(self.length);
        (
            Self { offset: self.offset, length: first },
            Self { offset: self.offset + first, length: self.length - first },
        )
    }

    /// The part of this range before `end`, an absolute offset.
    #[must_use]
    pub fn until(&self, end: u64) -> Self {
        self.split(end.saturating_sub(self.offset)).0
    }

    /// The part of this range from `start`, an absolute offset, on.
    #[must_use]
    pub fn from(&self, start: u64) -> Self {
        self.split(start.saturating_sub(self.offset)).1
    }

    /// The largest part of this range whose edges are multiples of `block`, a power of two.
    /// Empty, at the range's start, if it contains no whole block.
    #[must_use]
    pub fn aligned_within(&self, block: u64) -> Self {
        debug_assert!(block.is_power_of_two());
        let start = self.offset.checked_next_multiple_of(block).unwrap_or(u64::MAX);
        let end = self.end() & !(block - 1);
        if start < end { Self { offset: start, length: end - start } } else { self.split(0).0 }
    }

    /// The smallest range around this one whose edges are multiples of `block`, a power of two, or the
    /// end of a disk of `disk_size` bytes.
    #[must_use]
    pub fn aligned_around(&self, block: u64, disk_size: u64) -> Self {
        debug_assert!(block.is_power_of_two());
        let start = self.offset & !(block - 1);
        let end = self.end().checked_next_multiple_of(block).unwrap_or(u64::MAX);
        let end = end.min(disk_size).max(self.end());
        Self { offset: start, length: end - start }
    }
}

#[cfg(test)]
mod tests {
    use super::Range;
    use proptest::prelude::*;

    #[test]
    fn range_may_end_at_the_disk_end_not_beyond() {
        assert!(Range::within(4096, 4095, 1).is_some());
        assert!(Range::within(4096, 4095, 2).is_none());
        assert!(Range::within(4096, 4096, 0).is_some());
        assert!(Range::within(4096, 4097, 0).is_none());
    }

    #[test]
    fn overflowing_range_is_rejected() {
        assert!(Range::within(u64::MAX, u64::MAX, 1).is_none());
        assert!(Range::within(u64::MAX, 1, u64::MAX).is_none());
    }

    proptest! {
        #[test]
        fn splitting_loses_no_byte(size in 0u64.., offset: u64, length: u64, at: u64) {
            if let Some(range) = Range::within(size, offset, length) {
                let (first, rest) = range.split(at);
                prop_assert_eq!(first.offset(), range.offset());
                prop_assert_eq!(first.end(), rest.offset());
                prop_assert_eq!(rest.end(), range.end());
                prop_assert_eq!(range.until(at).length() + range.from(at).length(), range.length());
            }
        }

        #[test]
        fn aligned_range_around_is_minimal(
            size in 0u64.., offset: u64, length: u64, shift in 0u32..20,
        ) {
            if let Some(range) = Range::within(size, offset, length) {
                let block = 1u64 << shift;
                let around = range.aligned_around(block, size);
                prop_assert!(around.offset() <= range.offset() && around.end() >= range.end());
                prop_assert_eq!(around.offset() % block, 0);
                prop_assert!(around.end() % block == 0 || around.end() == size);
                prop_assert!(range.offset() - around.offset() < block);
                prop_assert!(around.end() - range.end() < block && around.end() <= size);
            }
        }

        #[test]
        fn aligned_part_leaves_less_than_a_block_each_side(
            size in 0u64.., offset: u64, length: u64, shift in 0u32..20,
        ) {
            if let Some(range) = Range::within(size, offset, length) {
                let block = 1u64 << shift;
                let part = range.aligned_within(block);
                prop_assert!(part.offset() >= range.offset() && part.end() <= range.end());
                if part.is_empty() {
                    prop_assert!(range.length() < 2 * block);
                } else {
                    prop_assert_eq!(part.offset() % block, 0);
                    prop_assert_eq!(part.end() % block, 0);
                    prop_assert!(part.offset() - range.offset() < block);
                    prop_assert!(range.end() - part.end() < block);
                }
            }
        }
    }
}
