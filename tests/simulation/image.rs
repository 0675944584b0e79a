//! A modelled image with its ownership record. A power cut keeps everything that was made durable,
//! and an arbitrary part of the rest.

use flexnbd::disk::dirty::BLOCK;
use flexnbd::disk::ownership::Record;
use flexnbd::range::Range;

/// The content of a block: the number of the write that it holds; 0 means zeros.
pub(crate) type Stamp = u32;

/// A random number generator that depends on its seed alone.
#[derive(Debug)]
pub(crate) struct Rng(fastrand::Rng);

impl Rng {
    pub(crate) fn new(seed: u64) -> Rng {
        Rng(fastrand::Rng::with_seed(seed))
    }

    /// A number below `bound`.
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.0.u64(..bound)
    }

    /// True with probability 1 / `n`.
    pub(crate) fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

/// A value in the page cache and on the medium.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Cached<T> {
    /// As processes see it.
    pub(crate) current: T,
    /// As it is certain to survive a power cut.
    pub(crate) durable: T,
}

impl<T: Clone + PartialEq> Cached<T> {
    pub(crate) fn new(value: T) -> Self {
        Self { current: value.clone(), durable: value }
    }

    pub(crate) fn sync(&mut self) {
        self.durable = self.current.clone();
    }

    /// Loses the current value or, as if it had just been written back, makes it durable.
    fn power_cut(&mut self, rng: &mut Rng) {
        if rng.one_in(2) {
            self.current = self.durable.clone();
        }
        self.sync();
    }
}

/// One block: its content, and whether space is allocated for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Block {
    pub(crate) stamp: Stamp,
    pub(crate) allocated: bool,
}

/// The image of one host.
#[derive(Clone, Debug)]
pub(crate) struct Image {
    pub(crate) blocks: Vec<Cached<Block>>,
    pub(crate) record: Cached<Option<Record>>,
    /// False once it is deleted.
    pub(crate) exists: Cached<bool>,
}

impl Image {
    pub(crate) fn new(stamps: impl Iterator<Item = Stamp>) -> Self {
        let block = |stamp| Cached::new(Block { stamp, allocated: stamp != 0 });
        Self {
            blocks: stamps.map(block).collect(),
            record: Cached::new(None),
            exists: Cached::new(true),
        }
    }

    pub(crate) fn stamp(&self, block: usize) -> Stamp {
        self.blocks[block].current.stamp
    }

    /// Writes a block; `allocated` is false for WRITE_ZEROES, which makes a hole.
    pub(crate) fn write(&mut self, block: usize, stamp: Stamp, allocated: bool) {
        self.blocks[block].current = Block { stamp, allocated };
    }

    pub(crate) fn flush(&mut self) {
        self.blocks.iter_mut().for_each(Cached::sync);
    }

    pub(crate) fn is_flushed(&self) -> bool {
        self.blocks.iter().all(|block| block.current == block.durable)
    }

    pub(crate) fn power_cut(&mut self, rng: &mut Rng) {
        self.blocks.iter_mut().for_each(|block| block.power_cut(rng));
        self.record.power_cut(rng);
        self.exists.power_cut(rng);
    }
}

/// The blocks that a range covers.
pub(crate) fn block_indices(range: Range) -> std::ops::Range<usize> {
    (range.offset() / BLOCK) as usize..range.end().div_ceil(BLOCK) as usize
}
