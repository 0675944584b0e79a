//! A bitmap of the blocks that changed since the migration's copier last read them.
//! Records neither contents nor times, and never waits: marking is one atomic instruction per word.
//!
//! The order of steps ensures that no change is missed. A writer marks *after* its bytes are written and
//! *before* it replies; a copier takes the mark *first* and reads *second*. A change may then be
//! copied twice, but is never lost.

use super::atomic_words::AtomicWords;
use crate::range::Range;
use crate::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::io;

/// Fewest bytes of the disk that one bit stands for: coarser marks multiply the traffic of small
/// random writes.
pub const BLOCK: u64 = 4 * 1024;

/// Largest bitmap, in bytes. On a disk of more than [`FINE_MAX`] bytes one bit stands for 8 KiB rather
/// than 4 KiB, on one of more than twice that for 16 KiB, and so on.
pub const BITMAP_MAX: u64 = 64 << 20;

/// Largest disk, in bytes, of which every [`BLOCK`] has a bit of its own.
pub const FINE_MAX: u64 = BITMAP_MAX * 8 * BLOCK;

/// Blocks that one word of the bitmap stands for.
const BITS: u64 = u64::BITS as u64;

/// Words of the bitmap that one bit of the summary stands for.
const GROUP: u64 = 64;

/// The bitmap of one migration; allocated when it starts, dropped when it ends.
#[derive(Debug)]
pub struct DirtyBitmap {
    words: AtomicWords,
    /// A bit for each group of words that may hold marks, so that a search of a large bitmap need not
    /// read all of it. Set after the word's bits; cleared before the group is read for the last time.
    /// All of these accesses are sequentially consistent, so that one of the two sides sees the
    /// other.
    summary: AtomicWords,
    disk_size: u64,
    /// Bytes of the disk that one bit stands for: a power of two.
    block: u64,
    /// Bits set, updated just after bits are set or cleared: while writers mark it may lag behind,
    /// even below zero; with the gate closed it is exact.
    set: AtomicI64,
}

impl DirtyBitmap {
    /// A bitmap for a disk of `disk_size` bytes, with nothing marked.
    ///
    /// # Errors
    /// When the address space for it (at most [`BITMAP_MAX`]) is not available.
    pub fn new(disk_size: u64) -> io::Result<Self> {
        let coarser = disk_size.div_ceil(FINE_MAX).max(1).next_power_of_two();
        let block = BLOCK * coarser;
        let words = AtomicWords::new(disk_size.div_ceil(block).div_ceil(BITS))?;
        let summary = AtomicWords::new(words.len().div_ceil(GROUP * BITS))?;
        Ok(Self { words, summary, disk_size, block, set: AtomicI64::new(0) })
    }

    /// Bytes of the disk that one bit stands for.
    #[must_use]
    pub fn block(&self) -> u64 {
        self.block
    }

    /// Marks the bytes in `range` as changed. Call it after writing them and before replying.
    pub fn mark(&self, range: Range) {
        let last_block = self.disk_size.div_ceil(self.block);
        let first = (range.offset() / self.block).min(last_block);
        let end = range.end().div_ceil(self.block).min(last_block);
        if range.is_empty() {
            return;
        }
        let mut block = first;
        while block < end {
            let word_end = (block / BITS + 1) * BITS;
            let stop = end.min(word_end);
            // Always a read-modify-write, even when the bits look set already: only then does
            // the copier that takes them see the bytes written before it.
            let mask = ones(block % BITS, stop - block);
            self.set_bits(block / BITS, mask);
            block = stop;
        }
    }

    /// Clears the marks of all blocks that lie entirely in `range`. For a copier that is going to read
    /// all of it in any case: it clears first and reads second.
    pub fn forget(&self, range: Range) {
        let mut block = range.offset().div_ceil(self.block);
        let is_last = range.end() >= self.disk_size;
        let end = range.end() / self.block;
        let end = if is_last { self.disk_size.div_ceil(self.block) } else { end };
        while block < end {
            let stop = end.min((block / BITS + 1) * BITS);
            let mask = ones(block % BITS, stop - block);
            let word = self.word(block / BITS);
            // A mark that this load misses is set later, and therefore stays, whether its bytes are
            // written already or not.
            if word.load(Ordering::Acquire) & mask != 0 {
                let had = word.fetch_and(!mask, Ordering::AcqRel) & mask;
                self.add_to_count(had, -1);
            }
            block = stop;
        }
    }

    /// Takes the first run of marks at or after the byte `from`: their bits are cleared, and the
    /// bytes they stand for returned, at most `longest` (but at least one block).
    pub fn take_next(&self, from: u64, longest: u64) -> Option<Range> {
        let mut block = from / self.block;
        let most = (longest / self.block).max(1);
        loop {
            let first = self.find(block)?;
            let run = self.clear_run(first, most);
            if run != 0 {
                let disk = Range::whole(self.disk_size);
                return Some(disk.from(first * self.block).until((first + run) * self.block));
            }
            block = first; // Another thread took it between the search and the clearing.
        }
    }

    /// Bytes that the marks stand for, the last block counted whole.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.count() * self.block
    }

    /// Blocks marked. Exact while no writer marks; otherwise an estimate.
    #[must_use]
    pub fn count(&self) -> u64 {
        u64::try_from(self.set.load(Ordering::Acquire)).unwrap_or(0)
    }

    /// The first marked block at or after `block`.
    fn find(&self, block: u64) -> Option<u64> {
        let mut index = block / BITS;
        let mut keep = u64::MAX << (block % BITS);
        while index < self.words.len() {
            let group = index / GROUP;
            let end = self.words.len().min((group + 1) * GROUP);
            let (summary, bit) = (self.summary.get(group / BITS), 1 << (group % BITS));
            let groups = summary.load(Ordering::SeqCst);
            if groups & bit == 0 {
                // Skip to the next group set in this summary word, or to the next summary word.
                let later = groups & (u64::MAX << (group % BITS));
                let next = group / BITS * BITS + u64::from(later.trailing_zeros());
                (index, keep) = (next * GROUP, u64::MAX);
                continue;
            }
            if let Some(found) = self.find_within(index, end, keep) {
                return Some(found);
            }
            if index.is_multiple_of(GROUP) && keep == u64::MAX {
                summary.fetch_and(!bit, Ordering::SeqCst);
                if let Some(found) = self.find_within(index, end, keep) {
                    summary.fetch_or(bit, Ordering::SeqCst);
                    return Some(found);
                }
            }
            (index, keep) = (end, u64::MAX);
        }
        None
    }

    fn find_within(&self, first: u64, end: u64, mut keep: u64) -> Option<u64> {
        for index in first..end {
            let word = self.word(index).load(Ordering::SeqCst) & keep;
            if word != 0 {
                return Some(index * BITS + u64::from(word.trailing_zeros()));
            }
            keep = u64::MAX;
        }
        None
    }

    /// Clears consecutive marks from `first` on, at most `most`, and returns how many.
    fn clear_run(&self, first: u64, most: u64) -> u64 {
        let mut run = 0;
        while run < most && (first + run) / BITS < self.words.len() {
            let block = first + run;
            let word = self.word(block / BITS);
            let seen = word.load(Ordering::Acquire) >> (block % BITS);
            let wanted = u64::from(seen.trailing_ones()).min(most - run);
            if wanted == 0 {
                break;
            }
            let mask = ones(block % BITS, wanted);
            let had = word.fetch_and(!mask, Ordering::AcqRel) & mask;
            self.add_to_count(had, -1);
            let got = u64::from((had >> (block % BITS)).trailing_ones());
            run += got;
            if got != u64::from(had.count_ones()) {
                // Another thread took some of them: restore those beyond the gap.
                self.set_again(block / BITS, had & !ones(block % BITS, got));
                break;
            }
            if !(block + wanted).is_multiple_of(BITS) || got < wanted {
                break;
            }
        }
        run
    }

    /// Sets bits again that were cleared by mistake.
    fn set_again(&self, index: u64, bits: u64) {
        self.set_bits(index, bits);
    }

    fn set_bits(&self, index: u64, bits: u64) {
        let before = self.word(index).fetch_or(bits, Ordering::SeqCst);
        let group = index / GROUP;
        let (summary, bit) = (self.summary.get(group / BITS), 1 << (group % BITS));
        if summary.load(Ordering::SeqCst) & bit == 0 {
            summary.fetch_or(bit, Ordering::SeqCst);
        }
        self.add_to_count(bits & !before, 1);
    }

    fn add_to_count(&self, bits: u64, sign: i64) {
        if bits != 0 {
            self.set.fetch_add(sign * i64::from(bits.count_ones()), Ordering::AcqRel);
        }
    }

    fn word(&self, index: u64) -> &AtomicU64 {
        self.words.get(index)
    }
}

/// `count` ones from bit `from` on; `from + count` is at most 64.
fn ones(from: u64, count: u64) -> u64 {
    if count == 0 { 0 } else { (u64::MAX >> (BITS - count)) << from }
}

#[cfg(test)]
mod tests {
    use super::{BITMAP_MAX, BLOCK, DirtyBitmap, FINE_MAX};
    use crate::range::Range;
    use proptest::prelude::*;
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

    const SIZE: u64 = 200 * BLOCK + 512;

    fn range(offset: u64, length: u64) -> Range {
        Range::within(SIZE, offset, length).unwrap()
    }

    #[test]
    fn a_mark_covers_exactly_the_touched_blocks() {
        let dirty = DirtyBitmap::new(SIZE).unwrap();
        dirty.mark(range(BLOCK - 1, 2));
        assert_eq!(dirty.take_next(0, u64::MAX), Some(range(0, 2 * BLOCK)));
        dirty.mark(range(BLOCK, BLOCK));
        assert_eq!(dirty.take_next(0, u64::MAX), Some(range(BLOCK, BLOCK)));
        assert_eq!(dirty.take_next(0, u64::MAX), None);
    }

    #[test]
    fn the_last_block_ends_where_the_disk_ends() {
        let dirty = DirtyBitmap::new(SIZE).unwrap();
        dirty.mark(range(SIZE - 1, 1));
        assert_eq!(dirty.take_next(0, u64::MAX), Some(range(200 * BLOCK, 512)));
    }

    #[test]
    fn an_empty_range_marks_nothing() {
        let dirty = DirtyBitmap::new(SIZE).unwrap();
        dirty.mark(range(5, 0));
        assert_eq!((dirty.count(), dirty.bytes()), (0, 0));
    }

    #[test]
    fn a_run_has_one_block_up_to_the_limit() {
        let dirty = DirtyBitmap::new(SIZE).unwrap();
        dirty.mark(range(60 * BLOCK, 80 * BLOCK));
        assert_eq!(dirty.take_next(0, 70 * BLOCK), Some(range(60 * BLOCK, 70 * BLOCK)));
        assert_eq!(dirty.take_next(0, 1), Some(range(130 * BLOCK, BLOCK)));
        assert_eq!(dirty.count(), 9);
    }

    #[test]
    fn marks_become_coarser_beyond_the_largest_fine_disk() {
        let disks = [(0, 1), (1, 1), (FINE_MAX, 1), (FINE_MAX + 1, 2), (1 << 50, 512)];
        for (size, coarser) in disks {
            let dirty = DirtyBitmap::new(size).unwrap();
            assert_eq!(dirty.block(), coarser * BLOCK, "{size}");
            assert!(dirty.words.len() * 8 <= BITMAP_MAX, "{size}");
        }
        assert_eq!(FINE_MAX, 2 << 40);
    }

    #[test]
    fn the_last_byte_of_a_pebibyte_can_be_marked() {
        let dirty = DirtyBitmap::new(1 << 50).unwrap();
        let last = Range::within(1 << 50, (1 << 50) - 1, 1).unwrap();
        dirty.mark(last);
        assert_eq!(dirty.bytes(), dirty.block());
        let from = (1 << 50) - dirty.block();
        assert_eq!(dirty.take_next(from, 1).map(|run| run.end()), Some(1 << 50));
    }

    #[test]
    fn only_whole_blocks_are_forgotten() {
        let dirty = DirtyBitmap::new(SIZE).unwrap();
        dirty.mark(range(0, SIZE));
        dirty.forget(range(BLOCK - 1, 2 * BLOCK + 1));
        assert_eq!(dirty.count(), 199, "blocks 1 and 2");
        dirty.forget(range(2 * BLOCK + 1, BLOCK));
        dirty.forget(range(3 * BLOCK, BLOCK - 1));
        assert_eq!(dirty.count(), 199, "none is covered");
        dirty.forget(range(60 * BLOCK, SIZE - 60 * BLOCK));
        assert_eq!(dirty.take_next(3 * BLOCK, u64::MAX), Some(range(3 * BLOCK, 57 * BLOCK)));
        assert_eq!(dirty.take_next(0, u64::MAX), Some(range(0, BLOCK)));
        assert_eq!((dirty.take_next(0, u64::MAX), dirty.count()), (None, 0));
    }

    #[test]
    fn a_disk_without_bytes_has_nothing_to_mark() {
        let dirty = DirtyBitmap::new(0).unwrap();
        dirty.mark(Range::whole(0));
        assert_eq!(dirty.take_next(0, BLOCK), None);
    }

    #[test]
    fn marks_far_apart_are_found_repeatedly() {
        let dirty = DirtyBitmap::new(FINE_MAX).unwrap();
        let places = [0, 5, 63, 64, 64 * 64 - 1, 64 * 64, 9 << 20, (FINE_MAX / BLOCK) - 1];
        for _ in 0..3 {
            for block in places {
                dirty.mark(Range::within(FINE_MAX, block * BLOCK, 1).unwrap());
            }
            for block in places {
                let run = dirty.take_next(block.saturating_sub(1) * BLOCK, BLOCK).unwrap();
                assert_eq!(run.offset() / BLOCK, block);
            }
            assert_eq!(dirty.take_next(0, BLOCK), None);
        }
        dirty.mark(Range::within(FINE_MAX, 5 * BLOCK, 1).unwrap());
        assert_eq!(dirty.take_next(6 * BLOCK, BLOCK), None, "it lies before");
        assert!(dirty.take_next(0, BLOCK).is_some());
    }

    /// Writers change cells and mark them; one thread takes marks and copies the cells. At the end
    /// the copy must hold the last value of every cell.
    #[test]
    fn marks_from_many_threads_are_never_missed() {
        const CELLS: u64 = 64 * 64 + 130;
        let dirty = DirtyBitmap::new(CELLS * BLOCK).unwrap();
        let cells: Vec<AtomicU64> = (0..CELLS).map(|_| AtomicU64::new(0)).collect();
        let copy: Vec<AtomicU64> = (0..CELLS).map(|_| AtomicU64::new(0)).collect();
        let done = AtomicBool::new(false);
        let take_all = || {
            while let Some(run) = dirty.take_next(0, 4 * BLOCK) {
                for cell in run.offset() / BLOCK..run.end() / BLOCK {
                    let seen = cells[cell as usize].load(Ordering::Relaxed);
                    copy[cell as usize].store(seen, Ordering::Relaxed);
                }
            }
        };
        std::thread::scope(|scope| {
            let writers: Vec<_> = (0..4u64)
                .map(|writer| {
                    let (dirty, cells) = (&dirty, &cells);
                    scope.spawn(move || {
                        for turn in 1..20_000u64 {
                            let cell = (turn * 71 + writer * 33) % CELLS;
                            cells[cell as usize].fetch_add(1, Ordering::Relaxed);
                            let whole = Range::whole(CELLS * BLOCK);
                            dirty.mark(whole.from(cell * BLOCK).split(BLOCK).0);
                        }
                    })
                })
                .collect();
            let taker = scope.spawn(|| {
                while !done.load(Ordering::Acquire) {
                    take_all();
                }
                take_all();
            });
            for writer in writers {
                writer.join().unwrap();
            }
            done.store(true, Ordering::Release);
            taker.join().unwrap();
        });
        assert_eq!(dirty.count(), 0);
        for (cell, copied) in cells.iter().zip(&copy) {
            assert_eq!(cell.load(Ordering::Relaxed), copied.load(Ordering::Relaxed));
        }
    }

    proptest! {
        #[test]
        fn every_marked_block_is_taken_exactly_once(
            marks in proptest::collection::vec((0..SIZE, 0..20 * BLOCK), 0..20),
            longest in 0..100 * BLOCK,
        ) {
            let dirty = DirtyBitmap::new(SIZE).unwrap();
            let mut model = [false; 201];
            for (offset, length) in marks {
                let marked = Range::whole(SIZE).from(offset).split(length).0;
                dirty.mark(marked);
                if !marked.is_empty() {
                    let blocks = marked.offset() / BLOCK..marked.end().div_ceil(BLOCK);
                    blocks.for_each(|block| model[block as usize] = true);
                }
            }
            prop_assert_eq!(dirty.count(), model.iter().filter(|set| **set).count() as u64);
            while let Some(run) = dirty.take_next(0, longest) {
                prop_assert!(run.length() <= longest.max(BLOCK));
                for block in run.offset() / BLOCK..run.end().div_ceil(BLOCK) {
                    prop_assert!(std::mem::take(&mut model[block as usize]));
                }
            }
            prop_assert!(model.iter().all(|set| !set));
            prop_assert_eq!(dirty.count(), 0);
        }
    }
}
