//! Scripted sessions: their queues submit operations as the disk does, and check every completion.

use super::cells::{ANY, CELL, CellModel, CellValue, ChangeEnd, append, value_of};
use super::coverage::{UpstreamCoverage, UpstreamReached};
use crate::disk::{Buffer, Completion, Extent, Op, OpId, Zeroing};
use crate::nbd::wire::TransmissionFlags;
use crate::range::Range;
use crate::upstream::machine::OWN_COOKIES;
use nix::errno::Errno;
use std::collections::BTreeMap;
use std::ops::Range as Cells;

/// What a session has submitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SimKind {
    Read,
    Write { durable: bool },
    Zero { only_if_fast: bool },
    Trim,
    Flush,
    Cache,
    Extents { limit: usize },
}

impl SimKind {
    fn changes(self) -> bool {
        matches!(self, Self::Write { .. } | Self::Zero { .. } | Self::Trim)
    }
}

/// An operation that has not completed.
#[derive(Debug)]
struct SimOp {
    kind: SimKind,
    cells: Cells<usize>,
    value: CellValue,
    /// Its number in the model, if it is a change.
    change: u64,
    sent: u64,
}

/// The queue of one session.
#[derive(Debug, Default)]
pub(super) struct SimQueue {
    pub(super) owner: u64,
    /// The cookie of its next request.
    next_cookie: u64,
    outstanding: BTreeMap<u64, SimOp>,
    /// It submits nothing more.
    pub(super) has_ended: bool,
    /// The machine has completed its operations without outcomes.
    pub(super) is_cancelled: bool,
}

impl SimQueue {
    pub(super) fn depth(&self) -> usize {
        self.outstanding.len()
    }
}

/// What sessions submit.
#[derive(Clone, Copy, Debug)]
pub(super) struct SimMix {
    pub(super) flags: TransmissionFlags,
    /// Longest range in cells.
    pub(super) length_max: usize,
    /// Many flushes and durable writes.
    pub(super) is_durable: bool,
}

/// All sessions.
#[derive(Debug)]
pub(super) struct SimClients {
    /// A trim may change bytes.
    can_trim: bool,
    pub(super) queues: Vec<SimQueue>,
    next_owner: u64,
    next_key: u64,
    next_value: CellValue,
    /// Cells that a change in flight has.
    busy: Vec<bool>,
    /// Size of the buffers of the writes that have not completed, by their first value.
    pub(super) buffers: BTreeMap<CellValue, u64>,
    /// Size of the largest one so far.
    pub(super) buffer_max: u64,
}

impl SimClients {
    pub(super) fn new(cells: usize, next_value: CellValue, can_trim: bool) -> Self {
        Self {
            can_trim,
            queues: Vec::new(),
            next_owner: 0,
            next_key: 0,
            next_value,
            busy: vec![false; cells],
            buffers: BTreeMap::new(),
            buffer_max: 0,
        }
    }

    pub(super) fn add_queue(&mut self, rng: &mut fastrand::Rng) {
        let owner = self.next_owner;
        self.next_owner += rng.u64(1..4);
        // Many clients count from 0; one chooses those of the machine.
        let next_cookie = if rng.u8(..8) == 0 { OWN_COOKIES } else { 0 };
        self.queues.push(SimQueue { owner, next_cookie, ..SimQueue::default() });
    }

    /// Operations that have not completed.
    pub(super) fn depth(&self) -> usize {
        self.queues.iter().map(SimQueue::depth).sum()
    }

    /// A random operation; `None` if it would overlap a change in flight.
    pub(super) fn draft(
        &self,
        mix: SimMix,
        rng: &mut fastrand::Rng,
    ) -> Option<(SimKind, Cells<usize>)> {
        let kind = random_kind(mix, rng);
        if kind == SimKind::Flush {
            return Some((kind, 0..0));
        }
        let count = self.busy.len();
        let is_short = rng.u8(..if mix.length_max > 16 { 2 } else { 4 }) > 0;
        let length = if is_short { rng.usize(1..=8) } else { mix.length_max };
        let length = rng.usize(1..=length.min(mix.length_max).min(count));
        let start = rng.usize(..=count - length);
        let cells = start..start + length;
        let is_free = !kind.changes() || !self.busy[cells.clone()].contains(&true);
        is_free.then_some((kind, cells))
    }

    /// The names of the next operation of a queue: a part of them has no cookie.
    fn next_id(&mut self, queue: usize) -> OpId {
        let key = self.next_key;
        self.next_key += 1;
        let queue = &mut self.queues[queue];
        let cookie = (!key.is_multiple_of(8)).then_some(queue.next_cookie);
        queue.next_cookie += 1;
        OpId { key, cookie }
    }

    /// Begins an operation. Returns its names, and itself.
    pub(super) fn begin(
        &mut self,
        queue: usize,
        (kind, cells): (SimKind, Cells<usize>),
        model: &mut CellModel,
        disk: Range,
    ) -> (OpId, Op) {
        let id = self.next_id(queue);
        let range = disk.from((cells.start * CELL) as u64).until((cells.end * CELL) as u64);
        let value = match kind {
            SimKind::Write { .. } => {
                let value = self.next_value;
                self.next_value += cells.len() as CellValue;
                value
            }
            SimKind::Trim => ANY,
            _ => 0,
        };
        let op = self.operation(kind, range, value);
        let mut change = 0;
        if kind.changes() {
            change = model.on_sent(cells.clone(), value);
            self.busy[cells.clone()].fill(true);
        }
        let sent = model.tick();
        let pending = SimOp { kind, cells, value, change, sent };
        self.queues[queue].outstanding.insert(id.key, pending);
        (id, op)
    }

    fn operation(&mut self, kind: SimKind, range: Range, value: CellValue) -> Op {
        let (offset, length) = (range.offset(), range.length() as usize);
        match kind {
            SimKind::Read => Op::Read { offset, data: Buffer::from(vec![0xee; length]) },
            SimKind::Write { durable } => {
                let mut bytes = Vec::with_capacity(length);
                (0..length / CELL).for_each(|nth| append(&mut bytes, value + nth as CellValue));
                let data = Buffer::from(bytes);
                let size = data.capacity() as u64;
                self.buffers.insert(value, size);
                self.buffer_max = self.buffer_max.max(size);
                Op::Write { offset, data, durable }
            }
            SimKind::Zero { only_if_fast } => {
                let how = Zeroing { keep_allocated: length > CELL, only_if_fast };
                Op::Zero { range, how, durable: false }
            }
            SimKind::Trim => Op::Trim { range, durable: false },
            SimKind::Flush => Op::Flush,
            SimKind::Cache => Op::Cache(range),
            SimKind::Extents { limit } => Op::Extents { range, limit, found: Vec::new() },
        }
    }

    /// The machine has declined an operation, which is not executed.
    pub(super) fn decline(&mut self, queue: usize, key: u64, model: &mut CellModel) {
        if let Some(op) = self.queues[queue].outstanding.remove(&key) {
            self.end_change(&op);
            model.on_ended(op.cells, op.change, ChangeEnd::Refused, false);
        }
    }

    fn end_change(&mut self, op: &SimOp) {
        self.buffers.remove(&op.value);
        if op.kind.changes() {
            self.busy[op.cells.clone()].fill(false);
        }
    }

    /// Checks a completion. Returns whether it promises durability.
    pub(super) fn complete(
        &mut self,
        owner: u64,
        completion: Completion,
        model: &mut CellModel,
        coverage: &mut UpstreamCoverage,
        may_fail: bool,
    ) -> Result<bool, String> {
        let queue = self.queues.iter_mut().find(|queue| queue.owner == owner);
        let queue = queue.ok_or_else(|| format!("a completion of no queue: {completion:?}"))?;
        let is_cancelled = queue.is_cancelled;
        let op = queue.outstanding.remove(&completion.key);
        let op = op.ok_or_else(|| format!("completed twice: {completion:?}"))?;
        self.end_change(&op);
        if is_cancelled {
            coverage.count(UpstreamReached::Cancelled);
            if op.kind.changes() && may_fail {
                model.on_ended(op.cells, op.change, ChangeEnd::Abandoned, false);
            }
            return Ok(false);
        }
        match completion.outcome.unwrap_or_else(|| Err(Errno::EPROTO.into())) {
            Ok(()) => {
                coverage.count(UpstreamReached::Completed);
                let is_void = op.kind == SimKind::Trim && !self.can_trim;
                let end = if is_void { ChangeEnd::Refused } else { ChangeEnd::Done };
                succeed(op, (completion.op, end), model, coverage)
            }
            Err(error) => {
                let error = Errno::from_raw(error.raw_os_error().unwrap_or_default());
                fail(op, error, model, coverage, may_fail).map(|()| false)
            }
        }
    }
}

fn random_kind(mix: SimMix, rng: &mut fastrand::Rng) -> SimKind {
    let has = |flags| mix.flags.contains(flags);
    let may_change = !has(TransmissionFlags::READ_ONLY);
    let durable = has(TransmissionFlags::SEND_FUA) || rng.u8(..16) == 0;
    let zeroes = may_change && has(TransmissionFlags::SEND_WRITE_ZEROES);
    match rng.u8(..32) {
        0..4 if mix.is_durable => SimKind::Flush,
        4..8 if mix.is_durable && may_change => SimKind::Write { durable },
        0..9 => SimKind::Read,
        9..21 if may_change => SimKind::Write { durable: false },
        21 | 22 if may_change => SimKind::Write { durable },
        23 | 24 => SimKind::Flush,
        25 | 26 if zeroes => {
            let is_offered = has(TransmissionFlags::SEND_FAST_ZERO);
            SimKind::Zero { only_if_fast: is_offered && rng.bool() }
        }
        27 if may_change => SimKind::Trim,
        28 => SimKind::Cache,
        29 => SimKind::Extents { limit: rng.usize(..4) },
        _ => SimKind::Read,
    }
}

fn succeed(
    op: SimOp,
    (returned, end): (Op, ChangeEnd),
    model: &mut CellModel,
    coverage: &mut UpstreamCoverage,
) -> Result<bool, String> {
    match (op.kind, returned) {
        (SimKind::Read, Op::Read { data, .. }) => {
            if data.len() != op.cells.len() * CELL {
                return Err(format!("a read returns {} bytes: {op:?}", data.len()));
            }
            for (cell, bytes) in op.cells.clone().zip(data.chunks(CELL)) {
                let value = value_of(bytes).ok_or_else(|| format!("cell {cell} is torn"))?;
                model.on_read(cell, value, op.sent)?;
            }
            Ok(false)
        }
        (SimKind::Extents { limit }, Op::Extents { range, found, .. }) => {
            check_extents(range, limit, &found)?;
            for extent in found.iter().filter(|extent| !extent.allocated) {
                coverage.count(UpstreamReached::Described);
                let (start, end) = (extent.range.offset() as usize, extent.range.end() as usize);
                let wrong =
                    (start / CELL..end / CELL).find(|cell| !model.allows(*cell, 0, op.sent));
                if let Some(cell) = wrong {
                    return Err(format!("cell {cell} is no hole"));
                }
            }
            Ok(false)
        }
        (SimKind::Flush, Op::Flush) => {
            model.on_flushed(op.sent);
            Ok(true)
        }
        (kind, returned) if kind.changes() && returned.changes() => {
            let durable = kind == SimKind::Write { durable: true };
            model.on_ended(op.cells, op.change, end, durable);
            Ok(durable)
        }
        (SimKind::Cache, Op::Cache(_)) => Ok(false),
        (kind, returned) => Err(format!("{kind:?} returns {returned:?}")),
    }
}

fn check_extents(range: Range, limit: usize, found: &[Extent]) -> Result<(), String> {
    let mut at = range.offset();
    for extent in found {
        if extent.range.offset() != at || extent.range.is_empty() {
            return Err(format!("extents with gaps: {found:?}"));
        }
        at = extent.range.end();
    }
    let is_valid = at <= range.end() && (1..=limit.max(1)).contains(&found.len());
    if is_valid { Ok(()) } else { Err(format!("extents of {range:?}, {limit}: {found:?}")) }
}

fn fail(
    op: SimOp,
    error: Errno,
    model: &mut CellModel,
    coverage: &mut UpstreamCoverage,
    may_fail: bool,
) -> Result<(), String> {
    let is_slow = op.kind == SimKind::Zero { only_if_fast: true } && error == Errno::ENOTSUP;
    let is_expected = may_fail && matches!(error, Errno::EIO | Errno::ENOSPC);
    if !is_slow && !is_expected {
        return Err(format!("{error}: {op:?}"));
    }
    coverage.count(if is_slow { UpstreamReached::SlowZero } else { UpstreamReached::Failed });
    if op.kind.changes() {
        let end = if is_slow { ChangeEnd::Refused } else { ChangeEnd::Failed };
        model.on_ended(op.cells, op.change, end, false);
    }
    Ok(())
}
