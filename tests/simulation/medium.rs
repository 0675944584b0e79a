//! A disk with its ownership record, of which a power cut keeps only what was made durable, and
//! any part of what was not.

use fastrand::Rng;
use flexnbd::disk::dirty::BLOCK;
use flexnbd::disk::ownership::Record;
use flexnbd::range::Range;

/// What a block holds; 0 is nothing but zeros.
pub(crate) type Stamp = u32;

/// Dice that fall the same way for the same seed.
#[derive(Debug)]
pub(crate) struct Dice(Rng);

impl Dice {
    pub(crate) fn new(seed: u64) -> Dice {
        Dice(Rng::with_seed(seed))
    }

    /// A number below `bound`.
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.0.u64(..bound)
    }

    /// True once in `many` times.
    pub(crate) fn once_in(&mut self, many: u64) -> bool {
        self.below(many) == 0
    }
}

/// A value as the running system sees it, and as it would be after a power cut.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Kept<T> {
    pub(crate) now: T,
    pub(crate) safe: T,
}

impl<T: Clone + PartialEq> Kept<T> {
    pub(crate) fn new(value: T) -> Self {
        Self { now: value.clone(), safe: value }
    }

    pub(crate) fn sync(&mut self) {
        self.safe = self.now.clone();
    }

    fn power_cut(&mut self, dice: &mut Dice) {
        if dice.once_in(2) {
            self.now = self.safe.clone();
        }
        self.sync();
    }
}

/// One block: its bytes, and whether space is allocated for them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cell {
    pub(crate) stamp: Stamp,
    pub(crate) allocated: bool,
}

/// The image of one host.
#[derive(Clone, Debug)]
pub(crate) struct Medium {
    pub(crate) cells: Vec<Kept<Cell>>,
    pub(crate) record: Kept<Option<Record>>,
    /// The image exists.
    pub(crate) exists: Kept<bool>,
}

impl Medium {
    pub(crate) fn new(stamps: impl Iterator<Item = Stamp>) -> Self {
        let cell = |stamp| Kept::new(Cell { stamp, allocated: stamp != 0 });
        Self { cells: stamps.map(cell).collect(), record: Kept::new(None), exists: Kept::new(true) }
    }

    pub(crate) fn stamp(&self, block: usize) -> Stamp {
        self.cells[block].now.stamp
    }

    /// Zeros written as zeros make a hole; written as data they take space.
    pub(crate) fn write(&mut self, block: usize, stamp: Stamp, as_data: bool) {
        self.cells[block].now = Cell { stamp, allocated: as_data };
    }

    pub(crate) fn flush(&mut self) {
        self.cells.iter_mut().for_each(Kept::sync);
    }

    pub(crate) fn is_flushed(&self) -> bool {
        self.cells.iter().all(|cell| cell.now == cell.safe)
    }

    pub(crate) fn power_cut(&mut self, dice: &mut Dice) {
        self.cells.iter_mut().for_each(|cell| cell.power_cut(dice));
        self.record.power_cut(dice);
        self.exists.power_cut(dice);
    }
}

/// The blocks that a range covers.
pub(crate) fn blocks(range: Range) -> std::ops::Range<usize> {
    (range.offset() / BLOCK) as usize..range.end().div_ceil(BLOCK) as usize
}
