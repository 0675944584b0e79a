//! Models of `src/disk/dirty.rs`.

use super::dirty::{BLOCK, DirtyBitmap};
use crate::explore::{explore, explore_preempted};
use crate::range::Range;
use loom::sync::atomic::{AtomicU64, Ordering};
use loom::thread;
use std::sync::Arc;

const BLOCKS: usize = 3;
const SIZE: u64 = BLOCKS as u64 * BLOCK;

/// A disk of a few blocks, and a copier's copy. Its bytes need no order of their own, as those of an
/// image; only the bitmap orders them.
#[derive(Debug)]
struct Disk {
    dirty: DirtyBitmap,
    blocks: [AtomicU64; BLOCKS],
    copy: [AtomicU64; BLOCKS],
}

impl Disk {
    fn new() -> Arc<Self> {
        let [blocks, copy] = [(); 2].map(|()| [0; BLOCKS].map(AtomicU64::new));
        Arc::new(Self { dirty: DirtyBitmap::new(SIZE).unwrap(), blocks, copy })
    }

    /// Writes, then marks.
    fn write(&self, block: u64, value: u64) {
        self.blocks[block as usize].store(value, Ordering::Relaxed);
        self.dirty.mark(block_range(block));
    }

    fn copy(&self, range: Range) {
        for block in range.offset() / BLOCK..range.end() / BLOCK {
            let value = self.blocks[block as usize].load(Ordering::Relaxed);
            self.copy[block as usize].store(value, Ordering::Relaxed);
        }
    }

    /// Takes one run of marks, then copies what it stands for; false if there is none.
    fn copy_next(&self) -> bool {
        let run = self.dirty.take_next(0, SIZE);
        run.inspect(|run| self.copy(*run)).is_some()
    }

    /// The copier's last round, without writers: afterwards the copy must equal the disk.
    fn finish(&self) {
        while self.copy_next() {}
        assert_eq!(self.dirty.count(), 0);
        for (block, copy) in self.blocks.iter().zip(&self.copy) {
            assert_eq!(block.load(Ordering::Relaxed), copy.load(Ordering::Relaxed));
        }
    }
}

fn block_range(block: u64) -> Range {
    Range::within(SIZE, block * BLOCK, BLOCK).unwrap()
}

/// Explores a writer beside the copier; afterwards the copier makes its last round.
fn explore_writer(before: fn(&Disk), write: fn(&Disk), copy: fn(&Disk)) {
    explore(move || {
        let disk = Disk::new();
        before(&disk);
        let writer = {
            let disk = Arc::clone(&disk);
            thread::spawn(move || write(&disk))
        };
        copy(&disk);
        writer.join().unwrap();
        disk.finish();
    });
}

/// Copies one run of marks.
fn copy_run(disk: &Disk) {
    disk.copy_next();
}

/// Writes a block and copies it, so that the summary has been set and cleared.
fn write_and_copy(disk: &Disk) {
    disk.write(0, 1);
    disk.copy_next();
}

/// A writer changes a block twice while the copier takes marks. The mark after the second write may be
/// set already when it is made.
///
/// Found: `Relaxed` in `set_bits` or in the clearing of `clear_run`; a mark that is left out when the bit
/// is set already (`set_bits` that loads first); marking before writing; reading before taking.
pub fn change_is_never_missed() {
    explore_writer(|disk| disk.write(0, 1), |disk| disk.write(0, 2), copy_run);
}

/// The summary says that a group has marks while it has none: the copier clears its bit while a writer
/// marks.
///
/// Found: `AcqRel` in place of `SeqCst` in any one of: the writer's setting of the word, its load of the
/// summary, the copier's clearing of the summary, its load of the word; no second search after the
/// clearing; a summary that is set before the word. Not found, since the last round of the copier
/// is ordered by other means: a weaker load of the summary in `find`, a weaker setting of its bit.
pub fn mark_stays_in_the_summary() {
    explore_writer(write_and_copy, |disk| disk.write(1, 2), copy_run);
}

/// The copier's second search of a group finds one mark of two; the summary keeps the other one.
///
/// Found: a second search that does not set the bit of the summary again.
pub fn second_mark_stays_in_the_summary() {
    let write_twice = |disk: &Disk| {
        disk.write(0, 2);
        disk.write(2, 1);
    };
    explore_writer(write_and_copy, write_twice, copy_run);
}

/// A copier that reads a range in any case forgets its marks first.
///
/// Found: reading before forgetting; `Relaxed` in the clearing of `forget`.
pub fn forgotten_mark_is_copied() {
    let write_twice = |disk: &Disk| {
        disk.write(0, 1);
        disk.write(0, 2);
    };
    let copy_range = |disk: &Disk| {
        disk.dirty.forget(block_range(0));
        disk.copy(block_range(0));
    };
    explore_writer(|_| (), write_twice, copy_range);
}

/// Two copiers and a run of blocks: each mark is taken once.
///
/// Found: a run that counts marks that another copier took; marks beyond a gap that are not restored; a
/// count that includes marks that another copier took.
pub fn mark_is_taken_once() {
    explore_preempted(3, || {
        let disk = Disk::new();
        disk.dirty.mark(Range::whole(SIZE));
        let take = |longest| {
            let disk = Arc::clone(&disk);
            thread::spawn(move || disk.dirty.take_next(0, longest).map_or(0, |run| run.length()))
        };
        let takers = [take(BLOCK), take(SIZE)];
        let mut taken: u64 = takers.into_iter().map(|taker| taker.join().unwrap()).sum();
        while let Some(run) = disk.dirty.take_next(0, SIZE) {
            taken += run.length();
        }
        assert_eq!((taken, disk.dirty.count()), (SIZE, 0));
        disk.dirty.mark(Range::whole(SIZE));
        assert_eq!(disk.dirty.count(), BLOCKS as u64, "it was not below zero");
    });
}
