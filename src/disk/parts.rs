//! In how large parts a zeroing or trim is made, and how many of them at once.
//! Pure: how long a part took is an argument.
//!
//! Whoever closes the gate waits for the parts that are in flight, and for nothing behind them. So a
//! part has to be short on a slow device, and long enough that a quick one is not held up: the
//! length and the number follow the time that parts take.

use crate::range::Range;
use std::time::Duration;

/// Shortest part, in bytes. Parts end at multiples of it, so that they cut no block of the image.
pub const PART_MIN: u64 = 1 << 20;
/// The first part of a session, in bytes: a second at 4 MB/s.
const PART_FIRST: u64 = 4 << 20;
/// Longest part where the number of extents counts rather than that of bytes, in bytes: what one
/// request can ask for without extended headers. (A hole of 1 TiB takes 256 of them.)
pub const PART_MAX_BY_EXTENT: u64 = 4 << 30;
/// Longest part elsewhere, in bytes: what a disk of 100 MB/s writes in two thirds of a second, should it have
/// to write zeros after all.
pub const PART_MAX: u64 = 64 << 20;
/// Parts that took no longer than this may become longer, and more.
const QUICK: Duration = Duration::from_millis(25);
/// Parts that took longer than this become shorter, and fewer.
const SLOW: Duration = Duration::from_millis(100);
/// Most bytes of parts in flight of one session where each byte counts.
const BYTES_AT_ONCE_MAX: u64 = 2 * PART_MAX;
/// How many parts of one session are in flight at first.
const AT_ONCE_FIRST: usize = 2;
/// How many at most.
const AT_ONCE_MAX: usize = 128;

/// What a session knows of how fast its disk zeroes and trims.
#[derive(Clone, Copy, Debug)]
pub(super) struct PartSizes {
    length: u64,
    at_once: usize,
}

impl Default for PartSizes {
    fn default() -> Self {
        Self { length: PART_FIRST, at_once: AT_ONCE_FIRST }
    }
}

impl PartSizes {
    /// How many parts may be in flight. Where each byte counts they are no more than
    /// [`BYTES_AT_ONCE_MAX`] together: written at the speed of memory at first, they may have to wait
    /// for the disk later.
    pub(super) fn at_once(self, by_extent: bool) -> usize {
        if by_extent {
            return self.at_once;
        }
        let fit = BYTES_AT_ONCE_MAX / self.length.min(PART_MAX);
        self.at_once.min(usize::try_from(fit).unwrap_or(1))
    }

    /// The next part of `range`, and what remains. No part is shorter than [`PART_MIN`], but for a
    /// whole range that is.
    pub(super) fn cut(self, range: Range, by_extent: bool) -> (Range, Range) {
        let length = if by_extent { self.length } else { self.length.min(PART_MAX) };
        let end = range.offset().saturating_add(length);
        let end = end.checked_next_multiple_of(PART_MIN).unwrap_or(u64::MAX);
        let (part, rest) = (range.until(end), range.from(end));
        if rest.length() < PART_MIN { (range, range.split(range.length()).1) } else { (part, rest) }
    }

    /// A part of so many bytes took so long, what was in flight before it included.
    pub(super) fn took(&mut self, bytes: u64, time: Duration) {
        if time > SLOW {
            // They may have been slow only because there were many.
            if self.at_once == 1 {
                self.length = (self.length / 2).max(PART_MIN);
            }
            self.at_once = (self.at_once / 2).max(1);
        } else if time <= QUICK {
            if bytes >= self.length.min(PART_MAX) {
                self.length = (self.length * 2).min(PART_MAX_BY_EXTENT);
            }
            self.at_once = (self.at_once + 1).min(AT_ONCE_MAX);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LATE: Duration = Duration::from_millis(101);

    #[test]
    fn parts_grow_while_quick_and_shrink_once_slow() {
        let mut sizes = PartSizes::default();
        assert_eq!((sizes.length, sizes.at_once(true)), (PART_FIRST, AT_ONCE_FIRST));
        sizes.took(PART_FIRST - 1, QUICK);
        assert_eq!(sizes.length, PART_FIRST, "less than a part says nothing of a longer one");
        (0..200).for_each(|_| sizes.took(PART_MAX, QUICK));
        assert_eq!((sizes.length, sizes.at_once(true)), (PART_MAX_BY_EXTENT, AT_ONCE_MAX));
        sizes.took(PART_MAX, SLOW);
        assert_eq!(sizes.at_once(true), AT_ONCE_MAX, "neither quick nor slow");
        sizes.took(1, LATE);
        assert_eq!((sizes.length, sizes.at_once(true)), (PART_MAX_BY_EXTENT, AT_ONCE_MAX / 2));
        (0..7).for_each(|_| sizes.took(1, LATE));
        assert_eq!((sizes.length, sizes.at_once(true)), (PART_MAX_BY_EXTENT / 2, 1));
        (0..20).for_each(|_| sizes.took(1, LATE));
        assert_eq!((sizes.length, sizes.at_once(true)), (PART_MIN, 1));
    }

    #[test]
    fn parts_that_are_written_are_bounded_in_bytes() {
        let mut sizes = PartSizes::default();
        (0..200).for_each(|_| sizes.took(PART_MAX, QUICK));
        assert_eq!((sizes.at_once(false), sizes.at_once(true)), (2, AT_ONCE_MAX));
        let short = PartSizes { length: PART_MIN, at_once: AT_ONCE_MAX };
        assert_eq!(short.at_once(false), AT_ONCE_MAX);
        let one = PartSizes { length: 2 * PART_MIN, at_once: AT_ONCE_MAX };
        assert_eq!(one.at_once(false), AT_ONCE_MAX / 2);
    }

    proptest! {
        #[test]
        fn parts_cover_the_range_and_cut_no_block(
            offset in 0..1u64 << 40, length in 1..1u64 << 33, quick in any::<bool>(),
            by_extent in any::<bool>(),
        ) {
            let range = Range::within(u64::MAX, offset, length).unwrap();
            let mut sizes = PartSizes::default();
            let (mut rest, mut at) = (range, offset);
            while !rest.is_empty() {
                let (part, after) = sizes.cut(rest, by_extent);
                prop_assert_eq!(part.offset(), at);
                prop_assert!(part.length() >= PART_MIN.min(length));
                let most = if by_extent { PART_MAX_BY_EXTENT } else { PART_MAX };
                prop_assert!(part.length() < most + 2 * PART_MIN);
                prop_assert!(after.is_empty() || part.end() % PART_MIN == 0);
                sizes.took(part.length(), if quick { QUICK } else { LATE });
                (rest, at) = (after, part.end());
            }
            prop_assert_eq!(at, range.end());
        }
    }
}
