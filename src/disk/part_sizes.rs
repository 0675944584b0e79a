//! The length of the parts of a zeroing or trim, and how many of them are in flight.
//! Pure: the duration of a part is an argument.
//!
//! Closing the gate waits for the parts in flight, and not for those that follow. So a part has to be
//! short on a slow device, and long enough not to slow down a fast one: length and number adapt to
//! the time that parts take.

use crate::range::Range;
use std::time::Duration;

/// Shortest part, in bytes. Parts end at multiples of it, so that they split no block of the image.
pub const PART_MIN: u64 = 1 << 20;
/// First part of a session, in bytes: one second at 4 MB/s.
const PART_FIRST: u64 = 4 << 20;
/// Longest part, in bytes, where the number of extents determines the time rather than that of bytes:
/// the longest request without extended headers. (A hole of 1 TiB takes 256 parts.)
pub const PART_MAX_BY_EXTENT: u64 = 4 << 30;
/// Longest part elsewhere, in bytes: two thirds of a second on a disk of 100 MB/s that has to write
/// zeros after all.
pub const PART_MAX: u64 = 64 << 20;
/// After a part that took no longer than this, length and number grow.
const QUICK: Duration = Duration::from_millis(25);
/// After a part that took longer than this, length and number shrink.
const SLOW: Duration = Duration::from_millis(100);
/// Most bytes of one session's parts in flight where the number of bytes determines the time.
const BYTES_IN_FLIGHT_MAX: u64 = 2 * PART_MAX;
/// Parts of one session in flight at first.
const IN_FLIGHT_FIRST: usize = 2;
/// Most parts of one session in flight.
const IN_FLIGHT_MAX: usize = 128;

/// Adapts the length and number of one session's parts to the speed of its disk.
#[derive(Clone, Copy, Debug)]
pub(super) struct PartSizes {
    length: u64,
    in_flight_max: usize,
}

impl Default for PartSizes {
    fn default() -> Self {
        Self { length: PART_FIRST, in_flight_max: IN_FLIGHT_FIRST }
    }
}

impl PartSizes {
    /// How many parts may be in flight. Where the number of bytes determines the time, together at
    /// most [`BYTES_IN_FLIGHT_MAX`]: parts written at the speed of memory at first may have to wait for
    /// the device later.
    pub(super) fn in_flight_max(self, by_extent: bool) -> usize {
        if by_extent {
            return self.in_flight_max;
        }
        let fit = BYTES_IN_FLIGHT_MAX / self.length.min(PART_MAX);
        self.in_flight_max.min(usize::try_from(fit).unwrap_or(1))
    }

    /// Splits `range` into the next part and the rest. No part is shorter than [`PART_MIN`], unless
    /// the whole range is.
    pub(super) fn split_next(self, range: Range, by_extent: bool) -> (Range, Range) {
        let length = if by_extent { self.length } else { self.length.min(PART_MAX) };
        let end = range.offset().saturating_add(length);
        let end = end.checked_next_multiple_of(PART_MIN).unwrap_or(u64::MAX);
        let (part, rest) = (range.until(end), range.from(end));
        if rest.length() < PART_MIN { (range, range.split(range.length()).1) } else { (part, rest) }
    }

    /// Records that a part of this length took this time, including the parts queued before it.
    pub(super) fn record(&mut self, bytes: u64, time: Duration) {
        if time > SLOW {
            // Several parts may be slow only because of their number, so reduce that first.
            if self.in_flight_max == 1 {
                self.length = (self.length / 2).max(PART_MIN);
            }
            self.in_flight_max = (self.in_flight_max / 2).max(1);
        } else if time <= QUICK {
            if bytes >= self.length.min(PART_MAX) {
                self.length = (self.length * 2).min(PART_MAX_BY_EXTENT);
            }
            self.in_flight_max = (self.in_flight_max + 1).min(IN_FLIGHT_MAX);
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
        assert_eq!((sizes.length, sizes.in_flight_max(true)), (PART_FIRST, IN_FLIGHT_FIRST));
        sizes.record(PART_FIRST - 1, QUICK);
        assert_eq!(sizes.length, PART_FIRST, "a short part does not justify a longer one");
        (0..200).for_each(|_| sizes.record(PART_MAX, QUICK));
        assert_eq!((sizes.length, sizes.in_flight_max(true)), (PART_MAX_BY_EXTENT, IN_FLIGHT_MAX));
        sizes.record(PART_MAX, SLOW);
        assert_eq!(sizes.in_flight_max(true), IN_FLIGHT_MAX, "neither quick nor slow");
        sizes.record(1, LATE);
        assert_eq!(
            (sizes.length, sizes.in_flight_max(true)),
            (PART_MAX_BY_EXTENT, IN_FLIGHT_MAX / 2)
        );
        (0..7).for_each(|_| sizes.record(1, LATE));
        assert_eq!((sizes.length, sizes.in_flight_max(true)), (PART_MAX_BY_EXTENT / 2, 1));
        (0..20).for_each(|_| sizes.record(1, LATE));
        assert_eq!((sizes.length, sizes.in_flight_max(true)), (PART_MIN, 1));
    }

    #[test]
    fn written_parts_are_bounded_in_bytes() {
        let mut sizes = PartSizes::default();
        (0..200).for_each(|_| sizes.record(PART_MAX, QUICK));
        assert_eq!((sizes.in_flight_max(false), sizes.in_flight_max(true)), (2, IN_FLIGHT_MAX));
        let short = PartSizes { length: PART_MIN, in_flight_max: IN_FLIGHT_MAX };
        assert_eq!(short.in_flight_max(false), IN_FLIGHT_MAX);
        let one = PartSizes { length: 2 * PART_MIN, in_flight_max: IN_FLIGHT_MAX };
        assert_eq!(one.in_flight_max(false), IN_FLIGHT_MAX / 2);
    }

    proptest! {
        #[test]
        fn parts_cover_the_range_and_split_no_block(
            offset in 0..1u64 << 40, length in 1..1u64 << 33, quick in any::<bool>(),
            by_extent in any::<bool>(),
        ) {
            let range = Range::within(u64::MAX, offset, length).unwrap();
            let mut sizes = PartSizes::default();
            let (mut rest, mut at) = (range, offset);
            while !rest.is_empty() {
                let (part, after) = sizes.split_next(rest, by_extent);
                prop_assert_eq!(part.offset(), at);
                prop_assert!(part.length() >= PART_MIN.min(length));
                let most = if by_extent { PART_MAX_BY_EXTENT } else { PART_MAX };
                prop_assert!(part.length() < most + 2 * PART_MIN);
                prop_assert!(after.is_empty() || part.end() % PART_MIN == 0);
                sizes.record(part.length(), if quick { QUICK } else { LATE });
                (rest, at) = (after, part.end());
            }
            prop_assert_eq!(at, range.end());
        }
    }
}
