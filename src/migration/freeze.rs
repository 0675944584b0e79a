//! The freeze: when the gate may be closed for the last copy, and how long it may stay closed.
//! Never waits and never reads a clock: callers pass the time.
//!
//! Three rules bound the time that clients wait:
//!
//! * The gate closes only while the in-flight requests of clients are short ([`Probe`]), or after
//!   several probes that found long ones.
//! * Until the record *departing* is durable, a closed gate opens again after [`STALL_MAX`] without
//!   progress, and after [`FREEZE_MAX`] in any case ([`Freeze`]).
//! * After a failed attempt the gate stays open for at least [`OPEN_SHARE`] times as long as it was
//!   closed, and for longer after each further failure ([`Backoff`]).

use std::time::Duration;

/// Longest time from the closing of the gate until the handover is sent.
pub const FREEZE_MAX: Duration = Duration::from_secs(4);

/// Longest time without an acknowledgement while the gate is closed.
pub const STALL_MAX: Duration = Duration::from_millis(1500);

/// After a failed attempt the gate is open for at least this many times as long as it was closed.
pub const OPEN_SHARE: u32 = 4;

/// After the first failed attempt the gate is open for at least this time. The time doubles with
/// each further one, up to [`BACKOFF_MAX`].
pub const BACKOFF_FIRST: Duration = Duration::from_secs(1);
/// Upper limit of the doubled times.
pub const BACKOFF_MAX: Duration = Duration::from_secs(16);

/// The gate closes at once if no request in flight is older than this.
pub const SHORT_REQUEST: Duration = Duration::from_millis(100);

/// Interval of probes of the requests in flight.
pub const PROBE_EVERY: Duration = Duration::from_millis(10);

/// Probes that may find older requests; after them the gate closes anyway.
pub const PROBES_MAX: u32 = 3;

/// The closing gate waits for in-flight requests for twice their age at the last probe, within
/// `DRAIN_MIN..=DRAIN_MAX`.
pub const DRAIN_MIN: Duration = Duration::from_millis(250);
/// See [`DRAIN_MIN`].
pub const DRAIN_MAX: Duration = Duration::from_secs(2);

/// The time limit of a gate that is closed or closing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Freeze {
    since: Duration,
    /// When the gate opens without further progress; `None` once it is sealed.
    until: Option<Duration>,
}

impl Freeze {
    /// The gate begins to close now.
    #[must_use]
    pub fn new(now: Duration) -> Self {
        Self { since: now, until: Some(now + STALL_MAX) }
    }

    /// The destination acknowledged a request, which extends the freeze unless it is over: the gate
    /// may have opened already.
    pub fn progressed(&mut self, now: Duration) {
        if self.is_over(now) {
            return;
        }
        let end = self.since + FREEZE_MAX;
        self.until = self.until.map(|until| until.max(now + STALL_MAX).min(end));
    }

    /// The gate is closed and all in-flight requests have ended: [`STALL_MAX`] counts from now.
    pub fn drained(&mut self, now: Duration) {
        let end = self.since + FREEZE_MAX;
        self.until = self.until.map(|_| (now + STALL_MAX).min(end));
    }

    /// Only steps without visible progress remain: they may take the rest of [`FREEZE_MAX`].
    pub fn last_step(&mut self) {
        self.until = self.until.map(|_| self.since + FREEZE_MAX);
    }

    /// The gate no longer opens by itself.
    pub fn seal(&mut self) {
        self.until = None;
    }

    /// When the gate opens by itself.
    #[must_use]
    pub fn until(&self) -> Option<Duration> {
        self.until
    }

    /// Whether the time limit has passed.
    #[must_use]
    pub fn is_over(&self, now: Duration) -> bool {
        self.until.is_some_and(|until| now >= until)
    }

    /// How long clients have waited.
    #[must_use]
    pub fn elapsed(&self, now: Duration) -> Duration {
        now.saturating_sub(self.since)
    }
}

/// When the gate may be closed next.
#[derive(Clone, Copy, Debug, Default)]
pub struct Backoff {
    from: Duration,
    failures: u32,
}

impl Backoff {
    /// An attempt failed, in which clients waited for `waited`.
    pub fn failed(&mut self, now: Duration, waited: Duration) {
        let doubled = BACKOFF_FIRST * 2u32.pow(self.failures.min(10));
        let share = waited.min(FREEZE_MAX) * OPEN_SHARE;
        self.failures += 1;
        self.from = now + doubled.min(BACKOFF_MAX).max(share);
    }

    /// The earliest time to close the gate.
    #[must_use]
    pub fn from(&self) -> Duration {
        self.from
    }
}

/// Measures how long clients' in-flight requests take while the gate is open.
#[derive(Clone, Copy, Debug, Default)]
pub struct Probe {
    /// Start of the current measurement, if one has begun.
    began: Option<Duration>,
    /// Start of the current generation of visits ([`crate::disk::Gate::turn_generation`]), if it
    /// began during this measurement.
    turned: Option<Duration>,
    last: Duration,
    slow: u32,
}

/// Whether to close the gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FreezeDecision {
    /// Probe again soon: the oldest request is at least this old.
    Wait(Duration),
    /// Close the gate, and wait for in-flight requests for this time.
    Close(Duration),
}

impl Probe {
    /// When the next probe is due.
    #[must_use]
    pub fn due(&self) -> Duration {
        self.began.map_or(Duration::ZERO, |_| self.last + PROBE_EVERY)
    }

    /// A probe found that the previous generation of visits has left, and a new one began
    /// (`turned`), or that visits of the previous one are still inside.
    pub fn on_probe(&mut self, now: Duration, turned: bool) -> FreezeDecision {
        self.last = now;
        let began = *self.began.get_or_insert(now);
        let age = now.saturating_sub(self.turned.unwrap_or(began));
        if !turned {
            return FreezeDecision::Wait(age);
        }
        if self.turned.replace(now).is_none() {
            return FreezeDecision::Wait(Duration::ZERO);
        }
        if age > SHORT_REQUEST && self.slow < PROBES_MAX {
            self.slow += 1;
            return FreezeDecision::Wait(Duration::ZERO);
        }
        *self = Self { last: now, slow: self.slow, ..Self::default() };
        FreezeDecision::Close((age * 2).clamp(DRAIN_MIN, DRAIN_MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MS: Duration = Duration::from_millis(1);
    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn freeze_without_progress_ends_at_the_stall_limit() {
        let freeze = Freeze::new(SECOND);
        assert!(!freeze.is_over(SECOND + STALL_MAX - MS));
        assert!(freeze.is_over(SECOND + STALL_MAX));
    }

    #[test]
    fn progress_extends_a_freeze_up_to_its_limit() {
        let mut freeze = Freeze::new(SECOND);
        for step in 0..100 {
            freeze.progressed(SECOND + step * 100 * MS);
        }
        assert_eq!(freeze.until(), Some(SECOND + FREEZE_MAX));
        freeze.progressed(SECOND);
        assert_eq!(freeze.until(), Some(SECOND + FREEZE_MAX), "it was shortened");
    }

    #[test]
    fn late_progress_does_not_extend_a_freeze() {
        let mut freeze = Freeze::new(SECOND);
        freeze.progressed(SECOND + STALL_MAX);
        assert_eq!(freeze.until(), Some(SECOND + STALL_MAX));
        assert!(freeze.is_over(SECOND + STALL_MAX));
    }

    #[test]
    fn long_drain_leaves_time_for_the_last_copy() {
        let mut freeze = Freeze::new(SECOND);
        let drained = SECOND + DRAIN_MAX;
        freeze.drained(drained);
        assert_eq!(freeze.until(), Some(drained + STALL_MAX));
        freeze.drained(2 * drained);
        assert_eq!(freeze.until(), Some(SECOND + FREEZE_MAX));
    }

    #[test]
    fn last_step_may_take_the_remaining_time() {
        let mut freeze = Freeze::new(SECOND);
        freeze.last_step();
        assert_eq!(freeze.until(), Some(SECOND + FREEZE_MAX));
    }

    #[test]
    fn sealed_freeze_never_ends() {
        let mut freeze = Freeze::new(SECOND);
        freeze.seal();
        freeze.progressed(2 * SECOND);
        freeze.last_step();
        assert_eq!((freeze.until(), freeze.is_over(3600 * SECOND)), (None, false));
        assert_eq!(freeze.elapsed(3 * SECOND), 2 * SECOND);
    }

    #[test]
    fn attempts_back_off_exponentially_up_to_a_limit() {
        let mut backoff = Backoff::default();
        let waits: Vec<_> = (0..7)
            .map(|_| {
                backoff.failed(SECOND, 250 * MS);
                (backoff.from() - SECOND).as_secs()
            })
            .collect();
        assert_eq!(waits, [1, 2, 4, 8, 16, 16, 16]);
    }

    proptest! {
        #[test]
        fn clients_wait_at_most_a_fifth_of_the_time(
            waits in proptest::collection::vec(0..4000u32, 1..20),
        ) {
            let (mut now, mut waited, mut backoff) = (SECOND, Duration::ZERO, Backoff::default());
            for wait in waits {
                let wait = wait * MS;
                now += wait;
                waited += wait;
                backoff.failed(now, wait);
                now = backoff.from();
                prop_assert!(waited * (OPEN_SHARE + 1) <= now - SECOND);
            }
        }
    }

    /// Probes requests that take `age` each until the gate may close; returns when, and the
    /// decision.
    fn probe(age: Duration) -> (Duration, FreezeDecision) {
        let (mut probe, mut now) = (Probe::default(), SECOND);
        let mut generation = now;
        loop {
            let turned = now >= generation + age;
            if turned {
                generation = now;
            }
            let decision = probe.on_probe(now, turned);
            if matches!(decision, FreezeDecision::Close(_)) || now > 60 * SECOND {
                return (now - SECOND, decision);
            }
            assert!(probe.due() > now);
            now = probe.due();
        }
    }

    #[test]
    fn short_requests_let_the_gate_close_within_milliseconds() {
        assert_eq!(probe(Duration::ZERO), (PROBE_EVERY, FreezeDecision::Close(DRAIN_MIN)));
        assert_eq!(probe(SHORT_REQUEST), (2 * SHORT_REQUEST, FreezeDecision::Close(DRAIN_MIN)));
    }

    #[test]
    fn gate_closes_despite_slow_requests_after_several_probes() {
        let (after, decision) = probe(500 * MS);
        assert_eq!(decision, FreezeDecision::Close(SECOND));
        assert!(after >= PROBES_MAX * 500 * MS, "{after:?}");
        assert_eq!(probe(10 * SECOND).1, FreezeDecision::Close(DRAIN_MAX));
    }

    #[test]
    fn one_long_request_keeps_the_gate_open() {
        let mut probe = Probe::default();
        assert_eq!(probe.on_probe(SECOND, true), FreezeDecision::Wait(Duration::ZERO));
        for ms in (10..30_000).step_by(10) {
            assert_eq!(probe.on_probe(SECOND + ms * MS, false), FreezeDecision::Wait(ms * MS));
        }
        assert_eq!(probe.on_probe(31 * SECOND, true), FreezeDecision::Wait(Duration::ZERO));
        assert_eq!(
            probe.on_probe(31 * SECOND + PROBE_EVERY, true),
            FreezeDecision::Close(DRAIN_MIN)
        );
    }

    #[test]
    fn rare_probes_close_the_gate_in_the_end() {
        let mut probe = Probe::default();
        for second in 1..=1 + PROBES_MAX {
            assert_eq!(probe.on_probe(second * SECOND, true), FreezeDecision::Wait(Duration::ZERO));
        }
        assert_eq!(probe.on_probe(9 * SECOND, true), FreezeDecision::Close(DRAIN_MAX));
    }
}
