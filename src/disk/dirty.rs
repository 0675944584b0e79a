//! Which blocks changed since the copier last looked: a bitmap, never a queue.
//! Never says what changed, or when, and never waits: marking is one atomic instruction per word.
//!
//! Two orders keep a change from being missed. A writer marks *after* its bytes are there and
//! *before* it answers; a copier takes the mark *first* and reads *second*. A change may then be
//! copied twice, but never not at all.

use crate::range::Range;
use memmap2::{MmapMut, MmapOptions};
use std::io;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};

/// Bytes of the disk that one bit stands for.
pub const BLOCK: u64 = 16 * 1024;

/// Blocks that one word of the bitmap stands for.
const BITS: u64 = u64::BITS as u64;

/// The bitmap of one migration; allocated when it starts, dropped when it ends.
#[derive(Debug)]
pub struct Dirty {
    words: Words,
    disk_size: u64,
    /// Bits set, counted just after they are set and cleared: while marks are being made it may
    /// lag behind (even below zero); with the gate closed it is exact.
    set: AtomicI64,
}

impl Dirty {
    /// A bitmap for a disk of `disk_size` bytes, with nothing marked.
    ///
    /// # Errors
    /// When the address space for it (one bit per [`BLOCK`]) cannot be had.
    pub fn new(disk_size: u64) -> io::Result<Self> {
        let blocks = disk_size.div_ceil(BLOCK);
        let words = Words::new(blocks.div_ceil(BITS))?;
        Ok(Self { words, disk_size, set: AtomicI64::new(0) })
    }

    /// Notes that the bytes in `range` have changed. Call it after they have, before saying so.
    pub fn mark(&self, range: Range) {
        let last_block = self.disk_size.div_ceil(BLOCK);
        let first = (range.offset() / BLOCK).min(last_block);
        let end = range.end().div_ceil(BLOCK).min(last_block);
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
            let before = self.word(block / BITS).fetch_or(mask, Ordering::AcqRel);
            self.counted(mask & !before, 1);
            block = stop;
        }
    }

    /// Takes the first run of marks at or after the byte `from`: their bits are cleared, and the
    /// bytes they stand for returned, at most `longest` (but at least one block).
    pub fn take_next(&self, from: u64, longest: u64) -> Option<Range> {
        let mut block = from / BLOCK;
        let most = (longest / BLOCK).max(1);
        loop {
            let first = self.find(block)?;
            let run = self.clear_run(first, most);
            if run != 0 {
                let disk = Range::whole(self.disk_size);
                return Some(disk.from(first * BLOCK).until((first + run) * BLOCK));
            }
            block = first; // Somebody else took it between the look and the taking.
        }
    }

    /// Bytes that the marks stand for, the last block counted whole.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.count() * BLOCK
    }

    /// Blocks marked. Exact while nobody is marking; otherwise an estimate.
    #[must_use]
    pub fn count(&self) -> u64 {
        u64::try_from(self.set.load(Ordering::Acquire)).unwrap_or(0)
    }

    /// The first marked block at or after `block`.
    fn find(&self, block: u64) -> Option<u64> {
        let mut index = block / BITS;
        let mut keep = u64::MAX << (block % BITS);
        while index < self.words.len() {
            let word = self.word(index).load(Ordering::Acquire) & keep;
            if word != 0 {
                return Some(index * BITS + u64::from(word.trailing_zeros()));
            }
            (index, keep) = (index + 1, u64::MAX);
        }
        None
    }

    /// Clears the marks from `first` on while they follow each other, at most `most`, and says
    /// how many there were.
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
            self.counted(had, -1);
            let got = u64::from((had >> (block % BITS)).trailing_ones());
            run += got;
            if got != u64::from(had.count_ones()) {
                // Another taker was in between: put back what lies beyond the gap.
                self.put_back(block / BITS, had & !ones(block % BITS, got));
                break;
            }
            if !(block + wanted).is_multiple_of(BITS) || got < wanted {
                break;
            }
        }
        run
    }

    /// Marks again bits that were taken by mistake.
    fn put_back(&self, index: u64, bits: u64) {
        let before = self.word(index).fetch_or(bits, Ordering::AcqRel);
        self.counted(bits & !before, 1);
    }

    fn counted(&self, bits: u64, sign: i64) {
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

/// Anonymous memory seen as atomic words; pages nobody touched cost nothing.
#[derive(Debug)]
struct Words {
    memory: MmapMut,
    len: u64,
}

impl Words {
    fn new(len: u64) -> io::Result<Self> {
        let bytes = usize::try_from(len.max(1) * 8).map_err(io::Error::other)?;
        let memory = MmapOptions::new().len(bytes).no_reserve_swap().map_anon()?;
        Ok(Self { memory, len })
    }

    fn len(&self) -> u64 {
        self.len
    }

    fn get(&self, index: u64) -> &AtomicU64 {
        assert!(index < self.len, "block beyond the end of the bitmap");
        // SAFETY: `index < len`, so the eight bytes lie inside the mapping, which lives as long
        // as `self`; a mapping starts on a page, so every word is aligned; and nothing ever
        // touches these bytes but through the atomics made here.
        unsafe { &*self.memory.as_ptr().cast::<AtomicU64>().add(index as usize) }
    }
}

#[cfg(test)]
mod tests {
    use super::{BLOCK, Dirty};
    use crate::range::Range;
    use proptest::prelude::*;
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

    const SIZE: u64 = 200 * BLOCK + 512;

    fn range(offset: u64, length: u64) -> Range {
        Range::within(SIZE, offset, length).unwrap()
    }

    #[test]
    fn a_mark_covers_every_block_it_touches_and_no_other() {
        let dirty = Dirty::new(SIZE).unwrap();
        dirty.mark(range(BLOCK - 1, 2));
        assert_eq!(dirty.take_next(0, u64::MAX), Some(range(0, 2 * BLOCK)));
        dirty.mark(range(BLOCK, BLOCK));
        assert_eq!(dirty.take_next(0, u64::MAX), Some(range(BLOCK, BLOCK)));
        assert_eq!(dirty.take_next(0, u64::MAX), None);
    }

    #[test]
    fn the_last_block_ends_where_the_disk_ends() {
        let dirty = Dirty::new(SIZE).unwrap();
        dirty.mark(range(SIZE - 1, 1));
        assert_eq!(dirty.take_next(0, u64::MAX), Some(range(200 * BLOCK, 512)));
    }

    #[test]
    fn an_empty_range_marks_nothing() {
        let dirty = Dirty::new(SIZE).unwrap();
        dirty.mark(range(5, 0));
        assert_eq!((dirty.count(), dirty.bytes()), (0, 0));
    }

    #[test]
    fn a_run_is_at_most_as_long_as_asked_and_never_less_than_a_block() {
        let dirty = Dirty::new(SIZE).unwrap();
        dirty.mark(range(60 * BLOCK, 80 * BLOCK));
        assert_eq!(dirty.take_next(0, 70 * BLOCK), Some(range(60 * BLOCK, 70 * BLOCK)));
        assert_eq!(dirty.take_next(0, 1), Some(range(130 * BLOCK, BLOCK)));
        assert_eq!(dirty.count(), 9);
    }

    #[test]
    fn a_disk_of_a_pebibyte_costs_no_memory_until_it_is_written() {
        let dirty = Dirty::new(1 << 50).unwrap();
        let last = Range::within(1 << 50, (1 << 50) - 1, 1).unwrap();
        dirty.mark(last);
        assert_eq!(dirty.take_next((1 << 50) - BLOCK, BLOCK).map(|r| r.end()), Some(1 << 50));
    }

    #[test]
    fn a_disk_without_bytes_has_nothing_to_mark() {
        let dirty = Dirty::new(0).unwrap();
        dirty.mark(Range::whole(0));
        assert_eq!(dirty.take_next(0, BLOCK), None);
    }

    /// Writers stamp cells and mark; one taker takes and reads. Once all are quiet every last
    /// stamp must have been read after a take.
    #[test]
    fn marks_from_many_threads_are_never_missed() {
        const CELLS: u64 = 130;
        let dirty = Dirty::new(CELLS * BLOCK).unwrap();
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
                            let cell = (turn * 7 + writer * 33) % CELLS;
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
        fn what_is_taken_is_what_was_marked_once_each(
            marks in proptest::collection::vec((0..SIZE, 0..20 * BLOCK), 0..20),
            longest in 0..100 * BLOCK,
        ) {
            let dirty = Dirty::new(SIZE).unwrap();
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
