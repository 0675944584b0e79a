//! The copy plan: selects the next range to copy. First the whole disk, then the dirty blocks, in
//! passes over the dirty bitmap until no mark is left.
//! Never reads the disk or the bitmap: it asks the caller to examine a range, and gets the result.
//!
//! Two rules keep the copy right:
//!
//! * A server may execute requests in any order, so no two requests in flight overlap: a block that
//!   becomes dirty while it is in flight waits for the reply to that request.
//! * Every range is examined each time before it is sent, and no marks are taken from the bitmap
//!   between the two. If a client writes to zeros after they were examined, the new mark stays in
//!   the bitmap, and the bytes are sent later.

use super::range_set::RangeSet;
use crate::range::Range;
use std::collections::BTreeMap;

/// Limits of requests and of the data in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Longest WRITE in bytes.
    pub data_max: u64,
    /// Longest WRITE_ZEROES in bytes.
    pub zero_max: u64,
    /// Most bytes of data in flight.
    pub window: u64,
    /// Most requests in flight.
    pub requests: usize,
    /// Most WRITE_ZEROES in flight; each may take long.
    pub zeroes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { data_max: 1 << 20, zero_max: 1 << 31, window: 32 << 20, requests: 1024, zeroes: 128 }
    }
}

/// Largest supported minimum block size of a destination, in bytes.
pub const BLOCK_MIN_MAX: u64 = 16 << 10;

/// No more marks are taken while this many ranges wait for a request in flight.
const WAITING_MAX: usize = 64;

/// The destination's capabilities.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caps {
    /// It supports WRITE_ZEROES; otherwise zeros are sent as data.
    pub zeroes: bool,
    /// Minimum block size in bytes: a power of two, at most [`BLOCK_MIN_MAX`]. Requests start and
    /// end at its multiples.
    pub block_min: u64,
    /// Longest payload in bytes.
    pub data_max: u64,
}

/// The content of a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Bytes to send as data.
    Data,
    /// A hole, or bytes that are all zero.
    Zeros,
}

/// The next step of the copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NextCopy {
    /// Examine the beginning of this range; report with [`CopyPlan::looked`].
    Look(Range),
    /// Take the next marks at or after `from`; report with [`CopyPlan::taken`].
    Take {
        /// Byte offset.
        from: u64,
        /// Most bytes to take.
        longest: u64,
    },
    /// Send this range as data; report with [`CopyPlan::sent`].
    Write(Range),
    /// Send this range as zeros; report with [`CopyPlan::sent`].
    Zero(Range),
    /// Wait until a request in flight is acknowledged.
    Idle,
}

/// A request that copies a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CopyRequest {
    /// The range of the disk.
    pub range: Range,
    /// Bytes of data in the request; 0 for WRITE_ZEROES.
    pub payload: u64,
}

/// The ranges of the disk that are in flight or not copied yet.
#[derive(Clone, Debug)]
pub struct CopyPlan {
    disk: Range,
    limits: Limits,
    caps: Caps,
    /// To be examined and sent.
    todo: RangeSet,
    /// Examined, and to be sent next.
    ready: Option<(Range, Content)>,
    /// Requests in flight by cookie.
    in_flight: BTreeMap<u64, CopyRequest>,
    /// The ranges of `in_flight`.
    busy: RangeSet,
    payload_in_flight: u64,
    zeroes_in_flight: usize,
    /// Position of the current pass in the bitmap.
    cursor: u64,
    /// Bytes marked in the bitmap when it was last read.
    dirty: u64,
    /// The bitmap was empty when it was last read, and no reply or time has passed since.
    bitmap_is_empty: bool,
    /// No request, reply or time has passed since the bitmap was last read.
    dirty_is_current: bool,
    passes: u64,
}

impl CopyPlan {
    /// A plan that copies a disk of `size` bytes from the beginning.
    #[must_use]
    pub fn new(size: u64, limits: Limits) -> Self {
        let caps = Caps { zeroes: false, block_min: 1, data_max: limits.data_max };
        let (todo, busy) = (RangeSet::all(size), RangeSet::none(size));
        Self {
            disk: Range::whole(size),
            limits,
            caps,
            todo,
            ready: None,
            in_flight: BTreeMap::new(),
            busy,
            payload_in_flight: 0,
            zeroes_in_flight: 0,
            cursor: 0,
            dirty: 0,
            bitmap_is_empty: false,
            dirty_is_current: false,
            passes: 0,
        }
    }

    /// Starts from the beginning, to a destination with these capabilities.
    pub fn restart(&mut self, caps: Caps) {
        *self = Self { caps, ..Self::new(self.disk.length(), self.limits) };
    }

    /// Resumes after a lost connection, to the same destination: sends the requests again that were
    /// in flight.
    pub fn resume(&mut self) {
        for request in std::mem::take(&mut self.in_flight).values() {
            self.todo.insert(request.range);
        }
        if let Some((range, _)) = self.ready.take() {
            self.todo.insert(range);
        }
        self.busy = RangeSet::none(self.disk.length());
        (self.payload_in_flight, self.zeroes_in_flight) = (0, 0);
        self.recheck_bitmap();
    }

    /// The next step. A WRITE is at most `data_max` bytes long, or one block of the destination if
    /// that is longer. Until a step is reported, the next step stays the same.
    #[must_use]
    pub fn next(&self, data_max: u64) -> NextCopy {
        if self.in_flight.len() >= self.limits.requests {
            return NextCopy::Idle;
        }
        match self.ready {
            Some((range, content)) => self.first_request(range, content, data_max),
            None => match self.todo.first_outside(&self.busy) {
                Some(range) if self.caps.zeroes => NextCopy::Look(range),
                Some(range) => self.first_request(range, Content::Data, data_max),
                None => self.take_marks(),
            },
        }
    }

    /// The first request of a range with this content.
    fn first_request(&self, range: Range, content: Content, data_max: u64) -> NextCopy {
        let longest = |most: u64| {
            let blocks = (most / self.caps.block_min).max(1) * self.caps.block_min;
            range.split(blocks - range.offset() % blocks).0
        };
        if content == Content::Zeros {
            let is_full = self.zeroes_in_flight >= self.limits.zeroes;
            return if is_full {
                NextCopy::Idle
            } else {
                NextCopy::Zero(longest(self.limits.zero_max))
            };
        }
        let part = longest(data_max.min(self.limits.data_max).min(self.caps.data_max));
        let fits = self.payload_in_flight + part.length() <= self.limits.window;
        if fits || self.in_flight.is_empty() { NextCopy::Write(part) } else { NextCopy::Idle }
    }

    /// No range can be sent: takes marks from the bitmap.
    fn take_marks(&self) -> NextCopy {
        // A new pass begins only once all blocks of the last one are in flight. Otherwise a fast
        // writer would keep us taking marks while we receive no replies.
        let pass_waits = self.cursor == 0 && !self.todo.is_empty();
        if self.bitmap_is_empty || pass_waits || self.todo.count() >= WAITING_MAX {
            return NextCopy::Idle;
        }
        NextCopy::Take { from: self.cursor, longest: self.limits.data_max }
    }

    /// `range`, the beginning of that of [`NextCopy::Look`], holds `content`.
    pub fn looked(&mut self, range: Range, content: Content) {
        let Some(asked) = self.todo.first_outside(&self.busy) else { return };
        let asked = asked.from(range.offset());
        let block = self.caps.block_min;
        let is_last = range.end() >= self.disk.end();
        let down = if is_last { range.end() } else { round_down(range.end(), block) };
        let up = range.end().checked_next_multiple_of(block).unwrap_or(u64::MAX);
        // Only whole blocks are sent as zeros; a block with zeros and data is sent as data.
        let (known, content) = match content {
            Content::Zeros if down > asked.offset() => (asked.until(down), Content::Zeros),
            Content::Zeros | Content::Data => {
                (asked.until(up.max(asked.offset() + 1)), Content::Data)
            }
        };
        self.todo.remove(known);
        self.ready = (!known.is_empty()).then_some((known, content));
    }

    /// Taking marks returned `run`, and left `dirty` bytes marked. Returns whether a pass with
    /// marks has ended.
    pub fn taken(&mut self, run: Option<Range>, dirty: u64) -> bool {
        (self.dirty, self.dirty_is_current) = (dirty, true);
        self.passes = self.passes.max(1);
        if let Some(run) = run {
            // The blocks of the bitmap may be smaller than those of the destination.
            let block = self.caps.block_min;
            let end = run.end().checked_next_multiple_of(block).unwrap_or(u64::MAX);
            self.todo.insert(self.disk.from(round_down(run.offset(), block)).until(end));
            self.cursor = run.end();
            return false;
        }
        let is_pass = self.cursor > 0;
        self.passes += u64::from(is_pass);
        self.cursor = 0;
        self.bitmap_is_empty = dirty == 0;
        is_pass
    }

    /// The request of a [`NextCopy::Write`] or [`NextCopy::Zero`] is sent with this cookie.
    pub fn sent(&mut self, cookie: u64, request: CopyRequest) {
        match self.ready.take() {
            Some((range, content)) => {
                let rest = range.from(request.range.end());
                self.ready = (!rest.is_empty()).then_some((rest, content));
            }
            None => self.todo.remove(request.range),
        }
        self.dirty_is_current = false;
        self.busy.insert(request.range);
        self.payload_in_flight += request.payload;
        self.zeroes_in_flight += usize::from(request.payload == 0);
        self.in_flight.insert(cookie, request);
    }

    /// The destination acknowledged the request with this cookie. Returns it, or `None` if no such
    /// request is in flight.
    pub fn acknowledged(&mut self, cookie: u64) -> Option<CopyRequest> {
        let request = self.in_flight.remove(&cookie)?;
        self.busy.remove(request.range);
        self.payload_in_flight -= request.payload;
        self.zeroes_in_flight -= usize::from(request.payload == 0);
        self.recheck_bitmap();
        Some(request)
    }

    /// Clients cannot write any more: reads the bitmap from the start, even if it was empty.
    pub fn gate_closed(&mut self) {
        self.cursor = 0;
        self.recheck_bitmap();
    }

    /// Time has passed: the bitmap may have new marks.
    pub fn recheck_bitmap(&mut self) {
        (self.bitmap_is_empty, self.dirty_is_current) = (false, false);
    }

    /// Whether the whole disk was sent once, and [`CopyPlan::left`] is current.
    #[must_use]
    pub fn is_left_known(&self) -> bool {
        self.passes > 0 && self.dirty_is_current
    }

    /// Whether requests are in flight.
    #[must_use]
    pub fn has_in_flight(&self) -> bool {
        !self.in_flight.is_empty()
    }

    /// Whether every byte is acknowledged and the bitmap was empty when it was last read.
    #[must_use]
    pub fn is_done(&self) -> bool {
        let is_all_sent = self.todo.is_empty() && self.ready.is_none();
        self.bitmap_is_empty && is_all_sent && self.in_flight.is_empty()
    }

    /// Bytes of the disk not acknowledged yet, with the marks of the last read of the bitmap.
    #[must_use]
    pub fn left(&self) -> u64 {
        let ready = self.ready.map_or(0, |(range, _)| range.length());
        self.todo.bytes() + ready + self.busy.bytes() + self.dirty
    }

    /// Passes completed; the first one covers the whole disk.
    #[must_use]
    pub fn passes(&self) -> u64 {
        self.passes
    }
}

/// The largest multiple of `block` up to `value`.
fn round_down(value: u64, block: u64) -> u64 {
    debug_assert!(block.is_power_of_two() && block <= BLOCK_MIN_MAX);
    value & !(block - 1)
}

#[cfg(test)]
mod tests;
