//! The speed limit, the measured rates, and whether the copy converges.
//! Never waits and never reads a clock: callers pass the time, counted from any fixed moment.

use std::collections::VecDeque;
use std::num::NonZeroU64;
use std::time::Duration;

const SECOND: Duration = Duration::from_secs(1);

/// Smallest request in bytes under a speed limit.
pub const CHUNK_MIN: u64 = 4096;

/// A speed limit is spread over at least this many requests a second. A request that no longer fits
/// into the second leaves its bytes of the limit unused, which is little only for small requests.
const CHUNKS_PER_SECOND: u64 = 64;

/// The rate limiter of `--max-speed`: bounds the bytes on the wire in any interval of one second.
///
/// A limit below [`CHUNK_MIN`] bytes per second is kept on average only.
#[derive(Clone, Debug, Default)]
pub struct Speed {
    limit: Option<NonZeroU64>,
    /// Times and bytes of the requests sent in the last second.
    recent: VecDeque<(Duration, u64)>,
    recent_bytes: u64,
    /// Start and bytes of the last burst. Small requests are sent in bursts, which saves a wake-up
    /// for each of them.
    burst: Option<(Duration, u64)>,
}

impl Speed {
    /// Limits to this many bytes per second; `None` means no limit.
    #[must_use]
    pub fn new(limit: Option<NonZeroU64>) -> Self {
        Self { limit, ..Self::default() }
    }

    /// Replaces the limit. Bytes sent in the last second count against the new one.
    pub fn set_limit(&mut self, limit: Option<NonZeroU64>) {
        self.limit = limit;
    }

    /// The limit in bytes per second.
    #[must_use]
    pub fn limit(&self) -> Option<NonZeroU64> {
        self.limit
    }

    /// Longest request, or burst of requests, in bytes.
    #[must_use]
    pub fn chunk(&self) -> u64 {
        let Some(limit) = self.limit else { return u64::MAX };
        let share = limit.get() / CHUNKS_PER_SECOND;
        (share / CHUNK_MIN).max(1) * CHUNK_MIN
    }

    /// How long a burst of [`Speed::chunk`] bytes takes at the limit.
    #[must_use]
    pub fn chunk_duration(&self) -> Duration {
        self.limit.map_or(Duration::ZERO, |limit| time_for(self.chunk(), limit))
    }

    /// The earliest time at which `bytes` may be sent; at once if it is not after `now`.
    #[must_use]
    pub fn ready_at(&self, now: Duration, bytes: u64) -> Duration {
        let Some(limit) = self.limit else { return now };
        let after_burst = match self.burst {
            None => now,
            Some((began, sent)) if sent + bytes <= self.chunk() => began,
            Some((began, sent)) => began + time_for(sent, limit),
        };
        let mut sum = self.recent_bytes;
        let mut within_limit = now;
        for &(at, sent) in &self.recent {
            let counts = at + SECOND > now;
            if counts && sum + bytes <= limit.get() {
                break;
            }
            sum -= sent;
            within_limit = within_limit.max(at + SECOND);
        }
        after_burst.max(within_limit)
    }

    /// Accounts for `bytes` sent now.
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
        let fits_burst = |(began, sent): &(Duration, u64)| {
            sent + bytes <= self.chunk() && now < *began + time_for(*sent, limit)
        };
        // The next burst counts from the time at which it was due, so that a late wake-up does not
        // delay all later bursts.
        let due = self.burst.map_or(now, |(began, sent)| began + time_for(sent, limit));
        let next = if due + self.chunk_duration() > now { due.min(now) } else { now };
        let (began, before) = self.burst.filter(fits_burst).unwrap_or((next, 0));
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

/// [`Meter`] covers the last `SLOTS` intervals of this length.
const SLOT: Duration = Duration::from_millis(250);
const SLOTS: usize = 8;

/// The rate at which the destination acknowledges requests, over the last two seconds.
#[derive(Clone, Debug)]
pub struct Meter {
    slots: [MeterSlot; SLOTS],
    /// Number of the newest slot, counted from time zero.
    newest: u64,
    started: Duration,
    /// Start of the time with requests in flight that no slot counts yet.
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

    /// A request was sent.
    pub fn sent(&mut self, now: Duration) {
        self.busy_since.get_or_insert(now);
    }

    /// The destination acknowledged a request with `payload` bytes of data, for `covered` bytes of
    /// the disk; `more`: others are still in flight.
    pub fn acknowledged(&mut self, now: Duration, payload: u64, covered: u64, more: bool) {
        self.advance_to(now);
        let busy = self.busy_since.map_or(Duration::ZERO, |since| now.saturating_sub(since));
        let slot = &mut self.slots[(self.newest % SLOTS as u64) as usize];
        slot.payload += payload;
        slot.covered += covered;
        slot.busy += busy;
        self.busy_since = more.then_some(now);
        let sum = self.sum(now);
        if sum.payload > 0 {
            self.link_rate = rate(sum.payload, sum.busy);
        }
    }

    /// Discards the measured rates, because the following requests differ in size.
    pub fn restart(&mut self, now: Duration) {
        *self = Self { busy_since: self.busy_since.map(|_| now), ..Self::new(now) };
    }

    /// The destination acknowledged a request that was sent before the restart: counts no bytes.
    pub fn acknowledged_uncounted(&mut self, now: Duration, more: bool) {
        self.busy_since = more.then_some(now);
    }

    /// The connection is lost: no requests are in flight.
    pub fn link_lost(&mut self) {
        self.busy_since = None;
    }

    /// Bytes of data per second while requests are in flight, so that a speed limit does not lower
    /// the rate. `None` until data has been acknowledged.
    #[must_use]
    pub fn link_rate(&self) -> Option<NonZeroU64> {
        self.link_rate
    }

    /// Bytes of data acknowledged per second.
    #[must_use]
    pub fn speed(&self, now: Duration) -> u64 {
        rate(self.sum(now).payload, self.window(now)).map_or(0, NonZeroU64::get)
    }

    /// Seconds that `left` bytes of the disk will take, holes included; `None` without progress.
    #[must_use]
    pub fn seconds_left(&self, now: Duration, left: u64) -> Option<u64> {
        let covered = rate(self.sum(now).covered, self.window(now))?;
        Some(left.div_ceil(covered.get()))
    }

    /// The time that `sum` covers.
    fn window(&self, now: Duration) -> Duration {
        let oldest = (slot_of(now) + 1).saturating_sub(SLOTS as u64);
        let nanos = u64::try_from(SLOT.as_nanos()).unwrap_or(u64::MAX);
        now.saturating_sub(Duration::from_nanos(oldest.saturating_mul(nanos)).max(self.started))
    }

    fn sum(&self, now: Duration) -> MeterSlot {
        let oldest = (slot_of(now) + 1).saturating_sub(SLOTS as u64);
        let kept = (self.newest + 1).saturating_sub(SLOTS as u64)..=self.newest;
        kept.filter(|slot| *slot >= oldest).fold(MeterSlot::default(), |sum, number| {
            let slot = self.slots[(number % SLOTS as u64) as usize];
            MeterSlot {
                payload: sum.payload + slot.payload,
                covered: sum.covered + slot.covered,
                busy: sum.busy + slot.busy,
            }
        })
    }

    /// Makes the slot of `now` the newest, and clears those in between.
    fn advance_to(&mut self, now: Duration) {
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

/// Whether `bytes` can be sent in `time`; not if the rate of the link is unknown.
fn fits(bytes: u64, link_rate: Option<NonZeroU64>, time: Duration) -> bool {
    link_rate.is_some_and(|rate| time_for(bytes, rate) <= time)
}

/// The delay of each write, in microseconds, at each throttling step.
const DELAYS_US: [u64; 9] = [0, 250, 500, 1000, 2000, 4000, 8000, 16_000, 32_000];

/// Passes without progress at the last throttling step, after which the gate closes anyway.
const STALLED_PASSES_MAX: u32 = 3;

/// A pass without progress advances one step for each second that it took, up to this many steps.
const STEPS_MAX: u64 = 4;

/// Passes are compared at most this often, since short ones show no trend.
const COMPARE_EVERY: Duration = SECOND;

/// The gate first waits until the rest can be sent in the allowed pause divided by this: one or two
/// more passes often suffice.
pub const SHORT_PAUSE_DIVISOR: u32 = 4;

/// How long the gate waits for that before the rest may take the whole allowed pause. It does not
/// wait if a single pass would take longer.
pub const SHORT_PAUSE_ATTEMPT: Duration = SECOND;

/// Decides when the copy has caught up with the writers, and throttles them if it does not.
#[derive(Clone, Debug)]
pub struct Convergence {
    pause: Duration,
    /// When the rest could first have been sent within the pause.
    fits_since: Option<Duration>,
    step: usize,
    stalled_passes: u32,
    /// Time of the last comparison of passes, and the bytes left then.
    compared: Option<(Duration, u64)>,
}

impl Convergence {
    /// Converged when the rest can be sent within `pause`; see [`SHORT_PAUSE_DIVISOR`].
    #[must_use]
    pub fn new(pause: Duration) -> Self {
        Self { pause, fits_since: None, step: 0, stalled_passes: 0, compared: None }
    }

    /// The copy begins or resumes.
    pub fn began(&mut self, now: Duration) {
        self.compared.get_or_insert((now, u64::MAX));
    }

    /// The whole disk of `size` bytes was sent once, and `dirty` bytes are marked again. If they
    /// are nearly all, the next pass will be no shorter: this counts as a pass without progress.
    pub fn first_pass_ended(&mut self, now: Duration, dirty: u64, size: u64) {
        let began = self.compared.map_or(now, |(at, _)| at);
        self.compared = Some((began, size));
        if dirty > size - size / 4 {
            self.pass_ended(now, dirty, None);
        }
        self.compared = None;
    }

    /// Whether the gate may be closed with `left` bytes to send, at `link_rate` bytes per second.
    /// As long as the gate is open, `limit` applies, in bytes per second.
    #[must_use]
    pub fn may_close_gate(
        &mut self,
        now: Duration,
        left: u64,
        link_rate: Option<NonZeroU64>,
        limit: Option<NonZeroU64>,
    ) -> bool {
        if left == 0 || self.stalled_passes >= STALLED_PASSES_MAX {
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

    /// A pass ended with `left` bytes still to send. Unless they fit the pause, or are fewer by a
    /// quarter than at the last comparison, writers are throttled by a further step, or by several
    /// after a pass of several seconds, as under a low speed limit.
    pub fn pass_ended(&mut self, now: Duration, left: u64, link_rate: Option<NonZeroU64>) {
        let Some((since, before)) = self.compared else {
            self.compared = Some((now, left));
            return;
        };
        let took = now.saturating_sub(since);
        if took < COMPARE_EVERY {
            return;
        }
        self.compared = Some((now, left));
        if left <= before - before / 4 || fits(left, link_rate, self.pause) {
            return;
        }
        let last = DELAYS_US.len() - 1;
        if self.step < last {
            let steps = (took.as_secs() / COMPARE_EVERY.as_secs()).clamp(1, STEPS_MAX);
            self.step = last.min(self.step + steps as usize);
        } else {
            self.stalled_passes += 1;
        }
    }

    /// The delay of each write of a client, at most `DELAY_MAX` of the server.
    #[must_use]
    pub fn delay(&self) -> Duration {
        Duration::from_micros(DELAYS_US[self.step])
    }
}

#[cfg(test)]
mod tests;
