//! A set of byte ranges of a disk. Adjacent ranges are merged.
//! Never knows the purpose of the ranges.

use crate::range::Range;
use std::collections::BTreeMap;

/// Disjoint ranges of a disk of fixed size.
#[derive(Clone, Debug)]
pub struct RangeSet {
    disk: Range,
    /// Offset → end of each range. Ranges are not empty, and neither overlap nor touch.
    ranges: BTreeMap<u64, u64>,
    bytes: u64,
}

impl RangeSet {
    /// The empty set, of a disk of `disk_size` bytes.
    #[must_use]
    pub fn none(disk_size: u64) -> Self {
        Self { disk: Range::whole(disk_size), ranges: BTreeMap::new(), bytes: 0 }
    }

    /// The whole disk.
    #[must_use]
    pub fn all(disk_size: u64) -> Self {
        let mut set = Self::none(disk_size);
        set.insert(Range::whole(disk_size));
        set
    }

    /// The number of bytes in the set.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The number of ranges.
    #[must_use]
    pub fn count(&self) -> usize {
        self.ranges.len()
    }

    /// Whether the set has no range.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// The ranges, in order.
    pub fn iter(&self) -> impl Iterator<Item = Range> + '_ {
        self.ranges.iter().map(|(&start, &end)| self.disk.from(start).until(end))
    }

    /// The ranges that share a byte with `range`, in order.
    pub fn overlapping(&self, range: Range) -> impl Iterator<Item = Range> + '_ {
        let before = self.ranges.range(..range.offset()).next_back().map(|(&start, _)| start);
        let candidates = self.ranges.range(before.unwrap_or(range.offset())..range.end());
        candidates
            .filter(move |&(_, &end)| end > range.offset() && !range.is_empty())
            .map(|(&start, &end)| self.disk.from(start).until(end))
    }

    /// Adds the bytes of `range`.
    pub fn insert(&mut self, range: Range) {
        if range.is_empty() {
            return;
        }
        let (mut start, mut end) = (range.offset(), range.end());
        while let Some((&other_start, &other_end)) = self.ranges.range(..=end).next_back() {
            if other_end < start {
                break;
            }
            self.ranges.remove(&other_start);
            self.bytes -= other_end - other_start;
            start = start.min(other_start);
            end = end.max(other_end);
        }
        self.ranges.insert(start, end);
        self.bytes += end - start;
    }

    /// Removes the bytes of `range`.
    pub fn remove(&mut self, range: Range) {
        let overlapping: Vec<Range> = self.overlapping(range).collect();
        for old in overlapping {
            self.ranges.remove(&old.offset());
            self.bytes -= old.length();
            self.insert(old.until(range.offset()));
            self.insert(old.from(range.end()));
        }
    }

    /// The first part of the set that shares no byte with `others`.
    #[must_use]
    pub fn first_outside(&self, others: &Self) -> Option<Range> {
        self.iter().find_map(|range| {
            let mut rest = range;
            for other in others.overlapping(range) {
                let free = rest.until(other.offset());
                if !free.is_empty() {
                    return Some(free);
                }
                rest = rest.from(other.end());
            }
            (!rest.is_empty()).then_some(rest)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::RangeSet;
    use crate::range::Range;
    use proptest::prelude::*;

    const SIZE: u64 = 64;

    fn range(offset: u64, end: u64) -> Range {
        Range::whole(SIZE).from(offset).until(end)
    }

    fn members(ranges: &RangeSet) -> Vec<bool> {
        let mut model = vec![false; SIZE as usize];
        for range in ranges.iter() {
            (range.offset()..range.end()).for_each(|byte| model[byte as usize] = true);
        }
        model
    }

    #[test]
    fn touching_ranges_merge() {
        let mut ranges = RangeSet::none(SIZE);
        for (start, end) in [(0, 4), (8, 12), (4, 8)] {
            ranges.insert(range(start, end));
        }
        assert_eq!(ranges.iter().collect::<Vec<_>>(), [range(0, 12)]);
    }

    #[test]
    fn first_outside_skips_covered_parts() {
        let mut covered = RangeSet::none(SIZE);
        covered.insert(range(0, 8));
        covered.insert(range(10, 64));
        assert_eq!(RangeSet::all(SIZE).first_outside(&covered), Some(range(8, 10)));
        covered.insert(range(8, 10));
        assert_eq!(RangeSet::all(SIZE).first_outside(&covered), None);
    }

    proptest! {
        #[test]
        fn range_set_equals_a_set_of_bytes(
            edits in proptest::collection::vec((any::<bool>(), 0..SIZE, 0..20u64), 0..40),
            others in proptest::collection::vec((0..SIZE, 0..10u64), 0..6),
        ) {
            let mut ranges = RangeSet::none(SIZE);
            let mut model = vec![false; SIZE as usize];
            for (add, offset, length) in edits {
                let edit = range(offset, offset + length);
                if add { ranges.insert(edit) } else { ranges.remove(edit) }
                (edit.offset()..edit.end()).for_each(|byte| model[byte as usize] = add);
            }
            prop_assert_eq!(members(&ranges), model.clone());
            prop_assert_eq!(ranges.bytes(), model.iter().filter(|set| **set).count() as u64);
            let ends: Vec<_> = ranges.iter().collect();
            prop_assert!(ends.windows(2).all(|pair| pair[0].end() < pair[1].offset()));

            let mut covered = RangeSet::none(SIZE);
            others.iter().for_each(|&(at, length)| covered.insert(range(at, at + length)));
            let cover = members(&covered);
            let first = (0..SIZE as usize).find(|&byte| model[byte] && !cover[byte]);
            let found = ranges.first_outside(&covered);
            prop_assert_eq!(found.map(|part| part.offset() as usize), first);
            if let Some(part) = found {
                let mut bytes = part.offset()..part.end();
                prop_assert!(bytes.all(|byte| model[byte as usize] && !cover[byte as usize]));
            }
        }
    }
}
