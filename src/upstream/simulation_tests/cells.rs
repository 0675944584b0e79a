//! Which bytes a client may read, and which must be durable.
//!
//! The disk consists of cells, each filled with one value. Each cell is a linearizable register: a read
//! returns the last change that had completed, or one at the same time, and never an older one than an
//! earlier read has returned. Changes of a cell never overlap in time, because the disk orders them.

use std::ops::Range;

/// Size of a cell in bytes: the granularity of a power cut.
pub(super) const CELL: usize = 512;

/// What fills a cell; 0 for zeros.
pub(super) type CellValue = u32;

/// After a trim a cell may hold anything.
pub(super) const ANY: CellValue = CellValue::MAX;

/// The value of a cell's bytes; `None` if they are torn.
pub(super) fn value_of(bytes: &[u8]) -> Option<CellValue> {
    let first = bytes.first_chunk()?;
    (bytes[4..] == bytes[..bytes.len() - 4]).then(|| CellValue::from_ne_bytes(*first))
}

/// Appends a cell.
pub(super) fn append(bytes: &mut Vec<u8>, value: CellValue) {
    let start = bytes.len();
    bytes.extend_from_slice(&value.to_ne_bytes());
    while bytes.len() < start + CELL {
        bytes.extend_from_within(start..);
    }
}

/// How a change has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ChangeEnd {
    Done,
    /// It may be executed in part.
    Failed,
    /// Its session has ended. It is executed nevertheless, and may fail.
    Abandoned,
    /// It has changed nothing.
    Refused,
}

/// A change of one cell.
#[derive(Clone, Copy, Debug)]
struct CellChange {
    number: u64,
    value: CellValue,
    /// When it had taken effect at the latest: it completed, or a read that returned it.
    effective: Option<u64>,
    /// How it has ended, and when.
    end: Option<(ChangeEnd, u64)>,
}

impl CellChange {
    fn is(&self, end: ChangeEnd) -> bool {
        self.end.is_some_and(|(how, _)| how == end)
    }

    fn may_be(&self, value: CellValue) -> bool {
        !self.is(ChangeEnd::Refused) && (self.value == value || self.value == ANY)
    }
}

#[derive(Clone, Debug, Default)]
struct CellHistory {
    /// In order.
    changes: Vec<CellChange>,
    /// The oldest change that may be durable.
    floor: usize,
    /// A failed flush may have lost changes.
    is_loose: bool,
}

impl CellHistory {
    /// The changes that a read sent at this time may return.
    fn visible(&self, sent: u64) -> &[CellChange] {
        let is_over = |change: &CellChange| change.effective.is_some_and(|time| time < sent);
        let last = self.changes.iter().rposition(is_over).unwrap_or(0);
        &self.changes[if self.is_loose { 0 } else { last }..]
    }
}

/// The expected bytes of the disk.
#[derive(Debug)]
pub(super) struct CellModel {
    time: u64,
    next_change: u64,
    cells: Vec<CellHistory>,
    /// Clients know that a flush has failed, and expect nothing of later ones.
    pub(super) distrusts_flushes: bool,
}

impl CellModel {
    pub(super) fn new(initial: &[CellValue]) -> Self {
        let change = |value: &CellValue| CellChange {
            number: 0,
            value: *value,
            effective: Some(0),
            end: Some((ChangeEnd::Done, 0)),
        };
        let cell = |value| CellHistory { changes: vec![change(value)], ..CellHistory::default() };
        let cells = initial.iter().map(cell).collect();
        Self { time: 0, next_change: 1, cells, distrusts_flushes: false }
    }

    /// A time later than all others so far.
    pub(super) fn tick(&mut self) -> u64 {
        self.time += 1;
        self.time
    }

    /// A client sends a change; returns its number. The values of a write count up from its first one.
    pub(super) fn on_sent(&mut self, cells: Range<usize>, first: CellValue) -> u64 {
        let number = self.next_change;
        self.next_change += 1;
        for (nth, cell) in self.cells[cells].iter_mut().enumerate() {
            let value = if matches!(first, 0 | ANY) { first } else { first + nth as CellValue };
            cell.changes.push(CellChange { number, value, effective: None, end: None });
        }
        number
    }

    /// A change has ended, and is durable if it says so.
    pub(super) fn on_ended(
        &mut self,
        cells: Range<usize>,
        number: u64,
        end: ChangeEnd,
        durable: bool,
    ) {
        let time = self.tick();
        let is_durable = durable && !self.distrusts_flushes && end == ChangeEnd::Done;
        for cell in &mut self.cells[cells] {
            let at = cell.changes.iter().rposition(|change| change.number == number);
            let Some(at) = at else { continue };
            let change = &mut cell.changes[at];
            change.end = Some((end, time));
            match end {
                ChangeEnd::Done => change.effective = change.effective.or(Some(time)),
                _ => change.effective = None,
            }
            if is_durable {
                cell.floor = cell.floor.max(at);
            }
        }
    }

    /// A flush sent at this time has succeeded.
    pub(super) fn on_flushed(&mut self, sent: u64) {
        if self.distrusts_flushes {
            return;
        }
        let counts = |change: &CellChange| matches!(change.end, Some((ChangeEnd::Done, time)) if time < sent);
        for cell in &mut self.cells {
            let last = cell.changes.iter().rposition(counts);
            cell.floor = cell.floor.max(last.unwrap_or(0));
        }
    }

    /// A read sent at this time returns this value.
    pub(super) fn on_read(
        &mut self,
        cell: usize,
        value: CellValue,
        sent: u64,
    ) -> Result<(), String> {
        let time = self.tick();
        let history = &mut self.cells[cell];
        let visible = history.visible(sent);
        let mut matching = visible.iter().filter(|change| change.may_be(value));
        let Some(first) = matching.next() else {
            return Err(format!("cell {cell} reads as {value}, but may be {visible:?}"));
        };
        let number = first.number;
        let is_certain = first.value != ANY && matching.next().is_none();
        let found = history.changes.iter_mut().find(|change| change.number == number);
        if let Some(change) = found
            && is_certain
            && change.end.is_none()
        {
            change.effective = change.effective.or(Some(time));
        }
        Ok(())
    }

    /// Whether a cell may hold this value while a client asks about it from this time on.
    pub(super) fn allows(&self, cell: usize, value: CellValue, sent: u64) -> bool {
        self.cells[cell].visible(sent).iter().any(|change| change.may_be(value))
    }

    /// Whether this value is the last one that was acknowledged, or that of an ended session.
    pub(super) fn check_replay(&self, cell: usize, value: CellValue) -> Result<(), String> {
        let changes = &self.cells[cell].changes;
        let last = changes.iter().rposition(|change| change.is(ChangeEnd::Done)).unwrap_or(0);
        let mut known = changes[last..].iter().filter(|change| !change.is(ChangeEnd::Failed));
        if known.any(|change| change.value == value && !change.is(ChangeEnd::Refused)) {
            return Ok(());
        }
        Err(format!("the replay of cell {cell} contains {value} after {changes:?}"))
    }

    /// A cell has lost changes that a failed flush should have made durable.
    pub(super) fn loosen(&mut self, cell: usize) {
        self.cells[cell].is_loose = true;
    }

    /// Whether the durable value of a cell is not older than a flush has promised.
    pub(super) fn allows_durable(&self, cell: usize, value: CellValue) -> bool {
        let history = &self.cells[cell];
        history.changes[history.floor..].iter().any(|change| change.may_be(value))
    }
}
