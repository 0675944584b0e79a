//! A set of disjoint spans of the disk, merged where they touch.
//! Never knows what the spans are for.

use crate::range::Range;
use std::collections::BTreeMap;

/// Spans of a disk of a fixed size.
#[derive(Clone, Debug)]
pub struct RangeSet {
    disk: Range,
    /// First byte → byte after the last; disjoint, never touching, never empty.
    spans: BTreeMap<u64, u64>,
    bytes: u64,
}

impl RangeSet {
    /// No spans, of a disk of `disk_size` bytes.
    #[must_use]
    pub fn none(disk_size: u64) -> Self {
        Self { disk: Range::whole(disk_size), spans: BTreeMap::new(), bytes: 0 }
    }

    /// The whole disk.
    #[must_use]
    pub fn all(disk_size: u64) -> Self {
        let mut spans = Self::none(disk_size);
        spans.insert(Range::whole(disk_size));
        spans
    }

    /// How many bytes all spans have together.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// How many spans there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.spans.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.spans.is_empty()
    }

    /// The spans, in order.
    pub fn iter(&self) -> impl Iterator<Item = Range> + '_ {
        self.spans.iter().map(|(&start, &end)| self.disk.from(start).until(end))
    }

    /// The spans that share a byte with `range`, in order.
    pub fn overlapping(&self, range: Range) -> impl Iterator<Item = Range> + '_ {
        let before = self.spans.range(..range.offset()).next_back().map(|(&start, _)| start);
        let candidates = self.spans.range(before.unwrap_or(range.offset())..range.end());
        candidates
            .filter(move |&(_, &end)| end > range.offset() && !range.is_empty())
            .map(|(&start, &end)| self.disk.from(start).until(end))
    }

    /// Adds `range`; what is there already is added once.
    pub fn insert(&mut self, range: Range) {
        if range.is_empty() {
            return;
        }
        let (mut start, mut end) = (range.offset(), range.end());
        while let Some((&other_start, &other_end)) = self.spans.range(..=end).next_back() {
            if other_end < start {
                break;
            }
            self.spans.remove(&other_start);
            self.bytes -= other_end - other_start;
            start = start.min(other_start);
            end = end.max(other_end);
        }
        self.spans.insert(start, end);
        self.bytes += end - start;
    }

    /// Takes away what of `range` is there.
    pub fn remove(&mut self, range: Range) {
        let touched: Vec<Range> = self.overlapping(range).collect();
        for span in touched {
            self.spans.remove(&span.offset());
            self.bytes -= span.length();
            self.insert(span.until(range.offset()));
            self.insert(span.from(range.end()));
        }
    }

    /// The first part of these spans that shares no byte with `others`.
    #[must_use]
    pub fn first_outside(&self, others: &Self) -> Option<Range> {
        self.iter().find_map(|span| {
            let mut rest = span;
            for other in others.overlapping(span) {
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

    fn members(spans: &RangeSet) -> Vec<bool> {
        let mut model = vec![false; SIZE as usize];
        for span in spans.iter() {
            (span.offset()..span.end()).for_each(|byte| model[byte as usize] = true);
        }
        model
    }

    #[test]
    fn spans_that_touch_become_one() {
        let mut spans = RangeSet::none(SIZE);
        for (start, end) in [(0, 4), (8, 12), (4, 8)] {
            spans.insert(range(start, end));
        }
        assert_eq!(spans.iter().collect::<Vec<_>>(), [range(0, 12)]);
    }

    #[test]
    fn the_first_part_outside_skips_what_is_covered() {
        let mut covered = RangeSet::none(SIZE);
        covered.insert(range(0, 8));
        covered.insert(range(10, 64));
        assert_eq!(RangeSet::all(SIZE).first_outside(&covered), Some(range(8, 10)));
        covered.insert(range(8, 10));
        assert_eq!(RangeSet::all(SIZE).first_outside(&covered), None);
    }

    proptest! {
        #[test]
        fn a_set_of_spans_is_a_set_of_bytes(
            edits in proptest::collection::vec((any::<bool>(), 0..SIZE, 0..20u64), 0..40),
            others in proptest::collection::vec((0..SIZE, 0..10u64), 0..6),
        ) {
            let mut spans = RangeSet::none(SIZE);
            let mut model = vec![false; SIZE as usize];
            for (add, offset, length) in edits {
                let edit = range(offset, offset + length);
                if add { spans.insert(edit) } else { spans.remove(edit) }
                (edit.offset()..edit.end()).for_each(|byte| model[byte as usize] = add);
            }
            prop_assert_eq!(members(&spans), model.clone());
            prop_assert_eq!(spans.bytes(), model.iter().filter(|set| **set).count() as u64);
            let ends: Vec<_> = spans.iter().collect();
            prop_assert!(ends.windows(2).all(|pair| pair[0].end() < pair[1].offset()));

            let mut covered = RangeSet::none(SIZE);
            others.iter().for_each(|&(at, length)| covered.insert(range(at, at + length)));
            let cover = members(&covered);
            let first = (0..SIZE as usize).find(|&byte| model[byte] && !cover[byte]);
            let found = spans.first_outside(&covered);
            prop_assert_eq!(found.map(|part| part.offset() as usize), first);
            if let Some(part) = found {
                let mut bytes = part.offset()..part.end();
                prop_assert!(bytes.all(|byte| model[byte as usize] && !cover[byte as usize]));
            }
        }
    }
}
