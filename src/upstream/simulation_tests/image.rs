//! The disk behind the scripted servers: what its host has in memory, and what is on stable storage.

use super::cells::{ANY, CellValue};
use std::ops::Range;

/// No change of a cell is acknowledged.
const NEVER: u64 = u64::MAX;

#[derive(Clone, Copy, Debug)]
struct ImageCell {
    volatile: CellValue,
    durable: CellValue,
    is_dirty: bool,
    /// When the server has replied to the first change that is not durable.
    acknowledged: u64,
}

/// An image with a page cache.
#[derive(Debug)]
pub(super) struct ScriptedImage {
    cells: Vec<ImageCell>,
    time: u64,
    /// A flush has failed, and with it changes that no later flush makes durable.
    pub(super) has_failed_flush: bool,
}

impl ScriptedImage {
    pub(super) fn new(initial: &[CellValue]) -> Self {
        let cell = |value: &CellValue| ImageCell {
            volatile: *value,
            durable: *value,
            is_dirty: false,
            acknowledged: NEVER,
        };
        Self { cells: initial.iter().map(cell).collect(), time: 0, has_failed_flush: false }
    }

    pub(super) fn tick(&mut self) -> u64 {
        self.time += 1;
        self.time
    }

    pub(super) fn len(&self) -> usize {
        self.cells.len()
    }

    pub(super) fn volatile(&self, cell: usize) -> CellValue {
        self.cells[cell].volatile
    }

    pub(super) fn durable(&self, cell: usize) -> CellValue {
        self.cells[cell].durable
    }

    /// Changes a cell.
    pub(super) fn set(&mut self, cell: usize, value: CellValue) {
        debug_assert_ne!(value, ANY);
        self.cells[cell].volatile = value;
        self.cells[cell].is_dirty = true;
    }

    /// Makes a cell durable.
    pub(super) fn write_back(&mut self, cell: usize) {
        let cell = &mut self.cells[cell];
        if cell.is_dirty {
            cell.durable = cell.volatile;
        }
        (cell.is_dirty, cell.acknowledged) = (false, NEVER);
    }

    /// The server replies to a change.
    pub(super) fn acknowledge(&mut self, cells: Range<usize>) {
        let time = self.tick();
        for cell in self.cells[cells].iter_mut().filter(|cell| cell.is_dirty) {
            cell.acknowledged = cell.acknowledged.min(time);
        }
    }

    /// Executes a flush that was received at this time. No change has to be durable that had no reply
    /// then.
    pub(super) fn flush(&mut self, received: u64, rng: &mut fastrand::Rng) {
        let is_lazy = rng.bool();
        for cell in 0..self.cells.len() {
            if !is_lazy || self.cells[cell].acknowledged < received || rng.bool() {
                self.write_back(cell);
            }
        }
    }

    /// A flush fails: the changes stay in memory, and no later flush makes them durable.
    pub(super) fn fail_flush(&mut self, cells: Range<usize>) {
        self.has_failed_flush = true;
        for cell in &mut self.cells[cells] {
            (cell.is_dirty, cell.acknowledged) = (false, NEVER);
        }
    }

    /// The memory is lost; it may have been written back in part. Returns the cells that have lost changes.
    pub(super) fn lose_power(&mut self, rng: &mut fastrand::Rng) -> Vec<usize> {
        let loses_all = rng.bool();
        let mut lost = Vec::new();
        for (number, cell) in self.cells.iter_mut().enumerate() {
            if cell.is_dirty && !loses_all && rng.bool() {
                cell.durable = cell.volatile;
            }
            if cell.volatile != cell.durable {
                lost.push(number);
            }
            *cell = ImageCell { volatile: cell.durable, ..*cell };
            (cell.is_dirty, cell.acknowledged) = (false, NEVER);
        }
        lost
    }

    /// The disk moves to another host, which has it in memory, and possibly on stable storage.
    pub(super) fn migrate(&mut self, rng: &mut fastrand::Rng) {
        let is_durable = rng.bool();
        (0..self.cells.len()).filter(|_| is_durable).for_each(|cell| {
            self.cells[cell].is_dirty = true;
            self.write_back(cell);
        });
    }
}
