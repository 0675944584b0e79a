//! Which bytes a client may read, and which must be durable.
//!
//! The disk consists of cells, each filled with one stamp. A change supersedes another one if that ended
//! before it was sent, or was sent earlier by the same session: then the bytes of the other one must be
//! gone once it is acknowledged. Changes of two sessions at the same time may take effect in either order.

use std::cell::Cell;
use std::ops::Range;

thread_local! {
    static CELL_SIZE: Cell<u64> = const { Cell::new(512) };
}

/// Size of a cell in bytes: changes and reads consist of whole cells. It is constant in a schedule.
pub(super) fn cell_size() -> u64 {
    CELL_SIZE.get()
}

pub(super) fn set_cell_size(bytes: u64) {
    CELL_SIZE.set(bytes);
}

/// What fills a cell; 0 for zeros.
pub(super) type Stamp = u32;

/// The stamp of a cell's bytes.
pub(super) fn stamp_of(bytes: &[u8]) -> Stamp {
    let stamp = bytes.first_chunk().map_or(0, |first| u32::from_ne_bytes(*first));
    assert!(bytes[4..] == bytes[..bytes.len() - 4], "a torn cell");
    stamp
}

/// Fills one or more cells.
pub(super) fn fill(bytes: &mut [u8], stamp: Stamp) {
    let Some(first) = bytes.first_chunk_mut() else { return };
    *first = stamp.to_ne_bytes();
    let mut filled = 4;
    while filled < bytes.len() {
        let more = filled.min(bytes.len() - filled);
        bytes.copy_within(..more, filled);
        filled += more;
    }
}

/// A change that a client has sent.
#[derive(Debug)]
struct SentChange {
    session: u64,
    stamp: Stamp,
    sent: u64,
    ended: Option<u64>,
    /// It succeeded, and replaces the bytes before it; a trim may leave them.
    overwrites: bool,
    /// It was acknowledged as durable.
    durable: bool,
    /// The reply says that it has changed nothing.
    refused: bool,
}

/// The expected bytes.
#[derive(Debug)]
pub(super) struct Model {
    time: u64,
    initial: Vec<Stamp>,
    changes: Vec<SentChange>,
    /// The changes of each cell.
    cells: Vec<Vec<usize>>,
    /// When the last FLUSH was sent that succeeded.
    flushed: u64,
    /// When a FLUSH has failed.
    flush_failed: Option<u64>,
}

impl Model {
    pub(super) fn new(initial: Vec<Stamp>) -> Self {
        let cells = vec![Vec::new(); initial.len()];
        Self { time: 0, initial, changes: Vec::new(), cells, flushed: 0, flush_failed: None }
    }

    pub(super) fn cell_count(&self) -> usize {
        self.initial.len()
    }

    /// A time later than all others so far.
    pub(super) fn tick(&mut self) -> u64 {
        self.time += 1;
        self.time
    }

    /// A client sends a change; returns its number.
    pub(super) fn on_sent(&mut self, session: u64, cells: Range<usize>, stamp: Stamp) -> usize {
        let (sent, ended, number) = (self.tick(), None, self.changes.len());
        let (overwrites, durable, refused) = (false, false, false);
        let change = SentChange { session, stamp, sent, ended, overwrites, durable, refused };
        self.changes.push(change);
        self.cells[cells].iter_mut().for_each(|cell| cell.push(number));
        number
    }

    /// A change has succeeded, failed, or its session has ended.
    pub(super) fn on_ended(&mut self, number: usize, overwrites: bool, durable: bool) {
        let time = self.tick();
        let change = &mut self.changes[number];
        (change.ended, change.overwrites, change.durable) = (Some(time), overwrites, durable);
    }

    /// A change was refused before any byte has changed.
    pub(super) fn on_refused(&mut self, number: usize) {
        self.on_ended(number, false, false);
        self.changes[number].refused = true;
    }

    /// A FLUSH sent at this time has succeeded.
    pub(super) fn on_flushed(&mut self, sent: u64) {
        self.flushed = self.flushed.max(sent);
    }

    /// A FLUSH has failed.
    pub(super) fn on_flush_failed(&mut self) {
        let time = self.tick();
        self.flush_failed.get_or_insert(time);
    }

    /// Whether a durable request sent at this time may succeed: none does after a failed FLUSH.
    pub(super) fn allows_flush(&self, sent: u64) -> bool {
        self.flush_failed.is_none_or(|failed| sent < failed)
    }

    /// Whether a read sent at this time, which ends now, may return this stamp.
    pub(super) fn allows_read(&self, cell: usize, stamp: Stamp, sent: u64) -> bool {
        self.allows(cell, stamp, |change| change.ended.is_some_and(|ended| ended < sent))
    }

    /// The first cell that does not hold what a read would have to return now.
    pub(super) fn find_wrong(&self, stamps: &[Stamp]) -> Option<usize> {
        (0..stamps.len()).find(|cell| !self.allows_read(*cell, stamps[*cell], self.time + 1))
    }

    /// The first cell whose durable bytes should have been replaced durably.
    pub(super) fn find_lost(&self, durable: &[Stamp]) -> Option<usize> {
        let counts = |change: &SentChange| {
            change.durable || change.ended.is_some_and(|ended| ended < self.flushed)
        };
        (0..durable.len()).find(|cell| !self.allows(*cell, durable[*cell], counts))
    }

    /// Whether a cell may hold this stamp after all changes of it that count.
    fn allows(&self, cell: usize, stamp: Stamp, counts: impl Fn(&SentChange) -> bool) -> bool {
        let changes = || self.cells[cell].iter().map(|number| &self.changes[*number]);
        let later = |change: &&SentChange| change.overwrites && counts(change);
        if stamp == self.initial[cell] && !changes().any(|change| later(&change)) {
            return true;
        }
        let may_be = |change: &&SentChange| change.stamp == stamp && !change.refused;
        changes().filter(may_be).any(|change| {
            !changes().filter(later).any(|later| {
                change.ended.is_some_and(|ended| ended < later.sent)
                    || (later.session == change.session && change.sent < later.sent)
            })
        })
    }
}
