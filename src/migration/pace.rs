//! How fast: the speed limit, the measured rate, and when the copy has caught up with the writers.
//! Never waits and never looks at a clock; every question brings the time with it, as the
//! time since some fixed moment.

use std::collections::VecDeque;
use std::num::NonZeroU64;
use std::time::Duration;

const SECOND: Duration = Duration::from_secs(1);

/// Smallest request in bytes that a speed limit asks for.
pub const CHUNK_MIN: u64 = 4096;

/// Requests that a speed limit is spread over in a second, at least: with few large ones, the one
/// that does not fit into a second any more is a large part of the limit.
const CHUNKS_PER_SECOND: u64 = 64;

/// `--max-speed`: at most so many bytes on the wire over any second.
///
/// A limit below one request of [`CHUNK_MIN`] bytes a second cannot be kept over every second; it
/// is then kept on average.
#[derive(Debug, Default)]
pub struct Speed {
    limit: Option<NonZeroU64>,
    /// When how much was sent, over the last second.
    recent: VecDeque<(Duration, u64)>,
    recent_bytes: u64,
    /// When the last burst began, and its bytes: small requests go together, so that neither the
    /// link nor we wait for each of them.
    burst: Option<(Duration, u64)>,
}

impl Speed {
    /// A limit in bytes per second; none is no limit.
    #[must_use]
    pub fn new(limit: Option<NonZeroU64>) -> Self {
        Self { limit, ..Self::default() }
    }

    /// Replaces the limit; bytes sent in the last second count against the new one.
    pub fn set_limit(&mut self, limit: Option<NonZeroU64>) {
        self.limit = limit;
    }

    /// The limit in bytes per second.
    #[must_use]
    pub fn limit(&self) -> Option<NonZeroU64> {
        self.limit
    }

    /// Longest request, or burst of requests, in bytes that keeps the flow even.
    #[must_use]
    pub fn chunk(&self) -> u64 {
        let Some(limit) = self.limit else { return u64::MAX };
        let share = limit.get() / CHUNKS_PER_SECOND;
        (share / CHUNK_MIN).max(1) * CHUNK_MIN
    }

    /// How long such a burst takes.
    #[must_use]
    pub fn chunk_duration(&self) -> Duration {
        self.limit.map_or(Duration::ZERO, |limit| time_for(self.chunk(), limit))
    }

    /// When `bytes` may be sent; not after `now` means at once.
    #[must_use]
    pub fn ready_at(&self, now: Duration, bytes: u64) -> Duration {
        let Some(limit) = self.limit else { return now };
        let evenly = match self.burst {
            None => now,
            Some((began, sent)) if sent + bytes <= self.chunk() => began,
            Some((began, sent)) => began + time_for(sent, limit),
        };
        let mut sum = self.recent_bytes;
        let mut after = now;
        for &(at, sent) in &self.recent {
            let counts = at + SECOND > now;
            if counts && sum + bytes <= limit.get() {
                break;
            }
            sum -= sent;
            after = after.max(at + SECOND);
        }
        evenly.max(after)
    }

    /// So many bytes are sent now.
    pub fn sent(&mut self, now: Duration, bytes: u64) {
        while let Some(&(at, old)) = self.recent.front() {
            if at + SECOND > now {
                break;
            }
            self.recent.pop_front();
            self.recent_bytes -= old;
        }
        let Some(limit) = self.limit else { return };
        self.recent.push_back((now, bytes));
        self.recent_bytes += bytes;
        let goes_with = |(began, sent): &(Duration, u64)| {
            sent + bytes <= self.chunk() && now < *began + time_for(*sent, limit)
        };
        // A wake-up that comes a little late does not put off all that follow.
        let due = self.burst.map_or(now, |(began, sent)| began + time_for(sent, limit));
        let next = if due + self.chunk_duration() > now { due.min(now) } else { now };
        let (began, before) = self.burst.filter(goes_with).unwrap_or((next, 0));
        self.burst = Some((began, before + bytes));
    }
}

fn time_for(bytes: u64, rate: NonZeroU64) -> Duration {
    let nanos = u128::from(bytes) * SECOND.as_nanos() / u128::from(rate.get());
    Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
}

fn rate(bytes: u64, time: Duration) -> Option<NonZeroU64> {
    let per_second = u128::from(bytes) * SECOND.as_nanos() / time.as_nanos().max(1);
    NonZeroU64::new(u64::try_from(per_second).unwrap_or(u64::MAX))
}

/// One part of the time that [`Meter`] looks back on.
const SLOT: Duration = Duration::from_millis(250);
const SLOTS: usize = 8;

/// How fast the destination acknowledges, over the last two seconds.
#[derive(Debug)]
pub struct Meter {
    slots: [MeterSlot; SLOTS],
    /// Number of the newest slot since the beginning of time.
    newest: u64,
    started: Duration,
    /// Since when requests have been in flight without a pause in the accounting.
    busy_since: Option<Duration>,
    link_rate: Option<NonZeroU64>,
}

#[derive(Clone, Copy, Debug, Default)]
struct MeterSlot {
    payload: u64,
    covered: u64,
    busy: Duration,
}

impl Meter {
    /// A meter that starts now.
    #[must_use]
    pub fn new(now: Duration) -> Self {
        Self {
            slots: [MeterSlot::default(); SLOTS],
            newest: slot_of(now),
            started: now,
            busy_since: None,
            link_rate: None,
        }
    }

    /// A request goes out.
    pub fn sent(&mut self, now: Duration) {
        self.busy_since.get_or_insert(now);
    }

    /// A request was acknowledged that carried `payload` bytes of data for `covered` bytes of the
    /// disk; `more` says whether others are still in flight.
    pub fn acknowledged(&mut self, now: Duration, payload: u64, covered: u64, more: bool) {
        self.turn_to(now);
        let busy = self.busy_since.map_or(Duration::ZERO, |since| now.saturating_sub(since));
        let slot = &mut self.slots[(self.newest % SLOTS as u64) as usize];
        slot.payload += payload;
        slot.covered += covered;
        slot.busy += busy;
        self.busy_since = more.then_some(now);
        let all = self.sum(now);
        if all.payload > 0 {
            self.link_rate = rate(all.payload, all.busy);
        }
    }

    /// From now on the requests are of another kind: the measured rates are void.
    pub fn restart(&mut self, now: Duration) {
        *self = Self { busy_since: self.busy_since.map(|_| now), ..Self::new(now) };
    }

    /// A request from before the restart was acknowledged.
    pub fn skipped(&mut self, now: Duration, more: bool) {
        self.busy_since = more.then_some(now);
    }

    /// The link is gone; nothing is in flight any more.
    pub fn lost(&mut self) {
        self.busy_since = None;
    }

    /// Bytes of data per second that the link carries while it is used, however little a speed
    /// limit lets through; none until data has been acknowledged.
    #[must_use]
    pub fn link_rate(&self) -> Option<NonZeroU64> {
        self.link_rate
    }

    /// Bytes of data acknowledged per second.
    #[must_use]
    pub fn speed(&self, now: Duration) -> u64 {
        rate(self.sum(now).payload, self.window(now)).map_or(0, NonZeroU64::get)
    }

    /// Seconds that `left` bytes of the disk will take, holes included; none when nothing moves.
    #[must_use]
    pub fn seconds_left(&self, now: Duration, left: u64) -> Option<u64> {
        let covered = rate(self.sum(now).covered, self.window(now))?;
        Some(left.div_ceil(covered.get()))
    }

    /// The part of the past that `sum` looks at.
    fn window(&self, now: Duration) -> Duration {
        let oldest = (slot_of(now) + 1).saturating_sub(SLOTS as u64);
        let nanos = u64::try_from(SLOT.as_nanos()).unwrap_or(u64::MAX);
        now.saturating_sub(Duration::from_nanos(oldest.saturating_mul(nanos)).max(self.started))
    }

    fn sum(&self, now: Duration) -> MeterSlot {
        let oldest = (slot_of(now) + 1).saturating_sub(SLOTS as u64);
        let held = (self.newest + 1).saturating_sub(SLOTS as u64)..=self.newest;
        held.filter(|slot| *slot >= oldest).fold(MeterSlot::default(), |sum, number| {
            let slot = self.slots[(number % SLOTS as u64) as usize];
            MeterSlot {
                payload: sum.payload + slot.payload,
                covered: sum.covered + slot.covered,
                busy: sum.busy + slot.busy,
            }
        })
    }

    /// Forgets the slots that `now` leaves behind.
    fn turn_to(&mut self, now: Duration) {
        let now = slot_of(now).max(self.newest);
        let stale = (now - self.newest).min(SLOTS as u64);
        for number in now + 1 - stale..=now {
            self.slots[(number % SLOTS as u64) as usize] = MeterSlot::default();
        }
        self.newest = now;
    }
}

fn slot_of(now: Duration) -> u64 {
    u64::try_from(now.as_nanos() / SLOT.as_nanos()).unwrap_or(u64::MAX - 1)
}

/// Whether so much can be sent in that time, as far as is known.
fn fits(bytes: u64, link_rate: Option<NonZeroU64>, time: Duration) -> bool {
    link_rate.is_some_and(|rate| time_for(bytes, rate) <= time)
}

/// How long writers are held per write at each step; the first step is not at all.
const DELAYS_US: [u64; 9] = [0, 250, 500, 1000, 2000, 4000, 8000, 16_000, 32_000];

/// Passes that may fail to shrink at the last step before the gate is closed all the same.
const PATIENCE: u32 = 3;

/// Steps that a pass of many seconds is worth, at most; one of a second is worth one.
const STEPS_MAX: u64 = 4;

/// Passes are compared at most this often, so that short ones are not taken for a trend.
const COMPARE_EVERY: Duration = SECOND;

/// The part of the allowed pause that is tried for first: a pass more or two often get there.
pub const SHORT_PAUSE_DIVISOR: u32 = 4;

/// How long that is tried for before the whole of the allowed pause will do; not at all if a
/// single pass would take longer.
pub const SHORT_PAUSE_ATTEMPT: Duration = SECOND;

/// Whether the copy catches up with the writers, and what to do when it does not.
#[derive(Debug)]
pub struct Convergence {
    pause: Duration,
    /// When the rest could first have been sent within the pause.
    fits_since: Option<Duration>,
    step: usize,
    stubborn: u32,
    /// When passes were compared last, and the bytes left then.
    before: Option<(Duration, u64)>,
}

impl Convergence {
    /// A convergence that ends when the rest can be sent within `pause`, or better, in a quarter of
    /// it.
    #[must_use]
    pub fn new(pause: Duration) -> Self {
        Self { pause, fits_since: None, step: 0, stubborn: 0, before: None }
    }

    /// The copy begins, or goes on.
    pub fn began(&mut self, now: Duration) {
        self.before.get_or_insert((now, u64::MAX));
    }

    /// The whole disk, of `size` bytes, was sent once, and `dirty` bytes are marked again: as good as
    /// all of them means that the next pass will be no shorter.
    pub fn first_pass_ended(&mut self, now: Duration, dirty: u64, size: u64) {
        let began = self.before.map_or(now, |(at, _)| at);
        self.before = Some((began, size));
        if dirty > size - size / 4 {
            self.pass_ended(now, dirty, None);
        }
        self.before = None;
    }

    /// Whether the gate may be closed with `left` bytes to go, at `link_rate` bytes per second; as
    /// long as it is open, at no more than `limit`.
    #[must_use]
    pub fn may_close_gate(
        &mut self,
        now: Duration,
        left: u64,
        link_rate: Option<NonZeroU64>,
        limit: Option<NonZeroU64>,
    ) -> bool {
        if left == 0 || self.stubborn >= PATIENCE {
            return true;
        }
        if !fits(left, link_rate, self.pause) {
            return false;
        }
        let since = *self.fits_since.get_or_insert(now);
        let is_slow = limit.is_some_and(|limit| time_for(left, limit) > SHORT_PAUSE_ATTEMPT);
        fits(left, link_rate, self.pause / SHORT_PAUSE_DIVISOR)
            || is_slow
            || now >= since + SHORT_PAUSE_ATTEMPT
    }

    /// A pass is over and left so many bytes. One that did not shrink by a quarter since the last
    /// comparison holds the writers back a step more, unless the gate may close soon as it is; one
    /// that took seconds, as under a low speed limit, holds them back several steps more.
    pub fn pass_ended(&mut self, now: Duration, left: u64, link_rate: Option<NonZeroU64>) {
        let Some((since, before)) = self.before else {
            self.before = Some((now, left));
            return;
        };
        let took = now.saturating_sub(since);
        if took < COMPARE_EVERY {
            return;
        }
        self.before = Some((now, left));
        if left <= before - before / 4 || fits(left, link_rate, self.pause) {
            return;
        }
        let last = DELAYS_US.len() - 1;
        if self.step < last {
            let steps = (took.as_secs() / COMPARE_EVERY.as_secs()).clamp(1, STEPS_MAX);
            self.step = last.min(self.step + steps as usize);
        } else {
            self.stubborn += 1;
        }
    }

    /// The delay of every client's write (at most `DELAY_MAX` of the server).
    #[must_use]
    pub fn delay(&self) -> Duration {
        Duration::from_micros(DELAYS_US[self.step])
    }
}

#[cfg(test)]
mod tests;
