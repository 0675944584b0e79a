//! Which range goes next: everything once, then what became dirty meanwhile, until nothing is left.
//! Never reads the disk or the bitmap itself: it names the range to examine, and gets the result.
//!
//! Two rules keep the copy right:
//!
//! * A server may carry out requests in any order, so no two requests in flight ever overlap: a
//!   block that became dirty while it is in flight waits for that request's reply.
//! * Every range is looked at again each time before it is sent, and nothing is taken from the
//!   bitmap between the look and the sending. A range found to be zeros that is written to
//!   in between is marked later than it was looked at, so its new bytes follow.

use super::range_set::RangeSet;
use crate::range::Range;
use std::collections::BTreeMap;

/// How much is asked of the destination at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Longest WRITE in bytes.
    pub data_max: u64,
    /// Longest WRITE_ZEROES in bytes.
    pub zero_max: u64,
    /// Bytes of data in flight.
    pub window: u64,
    /// Requests in flight.
    pub requests: usize,
    /// WRITE_ZEROES in flight, of which each may take long.
    pub zeroes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { data_max: 1 << 20, zero_max: 1 << 31, window: 32 << 20, requests: 1024, zeroes: 128 }
    }
}

/// Largest minimum block size of a destination, in bytes, that a disk can be copied to.
pub const BLOCK_MIN_MAX: u64 = 16 << 10;

/// Ranges waiting for a request in flight, beyond which no more dirty blocks are taken.
const WAITING_MAX: usize = 64;

/// What the destination can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caps {
    /// It knows WRITE_ZEROES; otherwise zeros are sent as data.
    pub zeroes: bool,
    /// Its requests start and end at multiples of this: a power of two, at most [`BLOCK_MIN_MAX`].
    pub block_min: u64,
    /// Longest payload in bytes.
    pub data_max: u64,
}

/// What a range was found to hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Bytes to be sent.
    Data,
    /// A hole, or bytes that are all zero.
    Zeros,
}

/// The next step of the copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NextCopy {
    /// Say what the beginning of this range holds: answer with [`CopyPlan::looked`].
    Look(Range),
    /// Take the next marks at or after `from`: answer with [`CopyPlan::taken`].
    Take {
        /// Byte of the disk.
        from: u64,
        /// At most so many bytes.
        longest: u64,
    },
    /// Send this range as data: answer with [`CopyPlan::sent`].
    Write(Range),
    /// Send this range as zeros: answer with [`CopyPlan::sent`].
    Zero(Range),
    /// Nothing, until a request in flight is acknowledged.
    Idle,
}

/// A request that the destination has carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AcknowledgedRequest {
    /// What of the disk it was about.
    pub range: Range,
    /// Bytes of data that it carried.
    pub payload: u64,
}

/// The parts of the disk that are copied, in flight, and left.
#[derive(Debug)]
pub struct CopyPlan {
    disk: Range,
    limits: Limits,
    caps: Caps,
    /// To be looked at and sent.
    todo: RangeSet,
    /// Looked at, and to be sent next.
    ready: Option<(Range, Content)>,
    flights: BTreeMap<u64, AcknowledgedRequest>,
    /// The ranges of `flights`.
    busy: RangeSet,
    payload_in_flight: u64,
    zeroes_in_flight: usize,
    /// Where the pass over the bitmap has come to.
    cursor: u64,
    /// Bytes marked when the bitmap was last asked.
    dirty: u64,
    /// The bitmap was empty when it was last asked, and nothing has happened since.
    dry: bool,
    /// Nothing has happened since the bitmap was last asked.
    fresh: bool,
    passes: u64,
}

impl CopyPlan {
    /// The plan for a disk of `size` bytes of which nothing has been copied.
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
            flights: BTreeMap::new(),
            busy,
            payload_in_flight: 0,
            zeroes_in_flight: 0,
            cursor: 0,
            dirty: 0,
            dry: false,
            fresh: false,
            passes: 0,
        }
    }

    /// Starts from the beginning, to a destination that has nothing.
    pub fn restart(&mut self, caps: Caps) {
        *self = Self { caps, ..Self::new(self.disk.length(), self.limits) };
    }

    /// Goes on, to the destination that has what it acknowledged and can do what it could: what
    /// was in flight is to be sent again.
    pub fn resume(&mut self) {
        for flight in std::mem::take(&mut self.flights).values() {
            self.todo.insert(flight.range);
        }
        if let Some((range, _)) = self.ready.take() {
            self.todo.insert(range);
        }
        self.busy = RangeSet::none(self.disk.length());
        (self.payload_in_flight, self.zeroes_in_flight) = (0, 0);
        self.recheck_bitmap();
    }

    /// The next step; `data_max` bounds a WRITE in bytes, as far as the destination's
    /// smallest block allows. Asking again without doing it gives the same answer.
    #[must_use]
    pub fn next(&self, data_max: u64) -> NextCopy {
        if self.flights.len() >= self.limits.requests {
            return NextCopy::Idle;
        }
        match self.ready {
            Some((range, content)) => self.cut(range, content, data_max),
            None => match self.todo.first_outside(&self.busy) {
                Some(range) if self.caps.zeroes => NextCopy::Look(range),
                Some(range) => self.cut(range, Content::Data, data_max),
                None => self.more(),
            },
        }
    }

    /// The first request of a range that is known to hold `content`.
    fn cut(&self, range: Range, content: Content, data_max: u64) -> NextCopy {
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
        if fits || self.flights.is_empty() { NextCopy::Write(part) } else { NextCopy::Idle }
    }

    /// No known part can be sent: are there dirty blocks?
    fn more(&self) -> NextCopy {
        // A new pass begins only when the last one's blocks are on their way: else a fast writer
        // would keep us busy with marks while the replies that unblock us wait to be read.
        let pass_waits = self.cursor == 0 && !self.todo.is_empty();
        if self.dry || pass_waits || self.todo.count() >= WAITING_MAX {
            return NextCopy::Idle;
        }
        NextCopy::Take { from: self.cursor, longest: self.limits.data_max }
    }

    /// The beginning of a [`NextCopy::Look`], `range`, was found to hold `content`.
    pub fn looked(&mut self, range: Range, content: Content) {
        let Some(asked) = self.todo.first_outside(&self.busy) else { return };
        let asked = asked.from(range.offset());
        let block = self.caps.block_min;
        let down =
            if range.end() >= self.disk.end() { range.end() } else { down(range.end(), block) };
        let up = range.end().checked_next_multiple_of(block).unwrap_or(u64::MAX);
        let (known, content) = match content {
            Content::Zeros if down > asked.offset() => (asked.until(down), Content::Zeros),
            Content::Zeros | Content::Data => {
                (asked.until(up.max(asked.offset() + 1)), Content::Data)
            }
        };
        self.todo.remove(known);
        self.ready = (!known.is_empty()).then_some((known, content));
    }

    /// The bitmap gave `run`, and `dirty` bytes are marked still. True when a pass is over in which
    /// something was marked.
    pub fn taken(&mut self, run: Option<Range>, dirty: u64) -> bool {
        (self.dirty, self.fresh) = (dirty, true);
        self.passes = self.passes.max(1);
        if let Some(run) = run {
            // Marks may be finer than what the destination takes.
            let block = self.caps.block_min;
            let end = run.end().checked_next_multiple_of(block).unwrap_or(u64::MAX);
            self.todo.insert(self.disk.from(down(run.offset(), block)).until(end));
            self.cursor = run.end();
            return false;
        }
        // A look at a bitmap in which nothing was marked is no pass.
        let is_pass = self.cursor > 0;
        self.passes += u64::from(is_pass);
        self.cursor = 0;
        self.dry = dirty == 0;
        is_pass
    }

    /// The request of a [`NextCopy::Write`] or [`NextCopy::Zero`] goes out under this cookie.
    pub fn sent(&mut self, cookie: u64, flight: AcknowledgedRequest) {
        match self.ready.take() {
            Some((range, content)) => {
                let rest = range.from(flight.range.end());
                self.ready = (!rest.is_empty()).then_some((rest, content));
            }
            None => self.todo.remove(flight.range),
        }
        self.fresh = false;
        self.busy.insert(flight.range);
        self.payload_in_flight += flight.payload;
        self.zeroes_in_flight += usize::from(flight.payload == 0);
        self.flights.insert(cookie, flight);
    }

    /// The destination has carried out that request; none when there is no such request.
    pub fn acknowledged(&mut self, cookie: u64) -> Option<AcknowledgedRequest> {
        let flight = self.flights.remove(&cookie)?;
        self.busy.remove(flight.range);
        self.payload_in_flight -= flight.payload;
        self.zeroes_in_flight -= usize::from(flight.payload == 0);
        self.recheck_bitmap();
        Some(flight)
    }

    /// No client can write any more: the bitmap is examined once again, even if it was empty.
    pub fn gate_closed(&mut self) {
        self.cursor = 0;
        self.recheck_bitmap();
    }

    /// Time has passed: there may be new marks.
    pub fn recheck_bitmap(&mut self) {
        (self.dry, self.fresh) = (false, false);
    }

    /// Whether the whole disk was sent once and [`CopyPlan::left`] is what it is right now.
    #[must_use]
    pub fn is_left_known(&self) -> bool {
        self.passes > 0 && self.fresh
    }

    /// Whether requests are in flight.
    #[must_use]
    pub fn in_flight(&self) -> bool {
        !self.flights.is_empty()
    }

    /// Whether every byte is acknowledged and no mark was left when the bitmap was last asked.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.dry && self.todo.is_empty() && self.ready.is_none() && self.flights.is_empty()
    }

    /// Bytes of the disk not acknowledged yet, as far as known.
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

/// The last multiple of `block` that is not beyond `value`.
fn down(value: u64, block: u64) -> u64 {
    debug_assert!(block.is_power_of_two() && block <= BLOCK_MIN_MAX);
    value & !(block - 1)
}

#[cfg(test)]
mod tests;
