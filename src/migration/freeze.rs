//! How long clients may wait behind the closed gate, and when closing it is worth trying.
//! Never waits and never looks at a clock; every question brings the time with it.
//!
//! Three rules bound what clients feel of a migration:
//!
//! * The gate is closed only when the in-flight requests that it has to wait for are short
//!   ([`Probe`]), as far as that can be had.
//! * Until the record *departing* is durable, a closed gate opens again after [`STALL_MAX`] without
//!   progress, and after [`FREEZE_MAX`] in any case ([`Freeze`]).
//! * After a closing that came to nothing the gate stays open for [`OPEN_SHARE`] times as long as it
//!   was closed, and longer after each further one ([`Backoff`]).

use std::time::Duration;

/// Longest time from the closing of the gate until the handover is sent.
pub const FREEZE_MAX: Duration = Duration::from_secs(4);

/// Longest time behind the closed gate in which the destination acknowledges nothing.
pub const STALL_MAX: Duration = Duration::from_millis(1500);

/// After a closing in vain the gate is open for at least so many times as long as it was closed.
pub const OPEN_SHARE: u32 = 4;

/// The gate is open for at least so long after the first closing in vain, twice as long after the
/// second, and so on,
pub const BACKOFF_FIRST: Duration = Duration::from_secs(1);
/// up to this.
pub const BACKOFF_MAX: Duration = Duration::from_secs(16);

/// In-flight requests that are no older end soon enough for the gate to be closed at once.
pub const QUIET: Duration = Duration::from_millis(100);

/// How often in-flight requests are looked at before the gate is closed.
pub const PROBE_EVERY: Duration = Duration::from_millis(10);

/// Probes that may find older requests before the gate is closed all the same.
pub const PROBES_MAX: u32 = 3;

/// How long in-flight requests may take to end once the gate is closed: twice as long as they were
/// seen to take, but at least
pub const DRAIN_MIN: Duration = Duration::from_millis(250);
/// and at most so long.
pub const DRAIN_MAX: Duration = Duration::from_secs(2);

/// A gate that is closed, or being closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Freeze {
    since: Duration,
    /// When it is to be opened unless there is progress; none once the handover may be sent.
    until: Option<Duration>,
}

impl Freeze {
    /// Clients begin to wait now.
    #[must_use]
    pub fn new(now: Duration) -> Self {
        Self { since: now, until: Some(now + STALL_MAX) }
    }

    /// The destination has acknowledged something. Too late, it prolongs nothing: the gate may have
    /// opened.
    pub fn progressed(&mut self, now: Duration) {
        if self.is_over(now) {
            return;
        }
        let end = self.since + FREEZE_MAX;
        self.until = self.until.map(|until| until.max(now + STALL_MAX).min(end));
    }

    /// Every request that was in flight has ended: what follows may begin only now.
    pub fn drained(&mut self, now: Duration) {
        let end = self.since + FREEZE_MAX;
        self.until = self.until.map(|_| (now + STALL_MAX).min(end));
    }

    /// One step remains, whose progress is invisible: it may take all the time that is left.
    pub fn last_step(&mut self) {
        self.until = self.until.map(|_| self.since + FREEZE_MAX);
    }

    /// The gate does not open by itself any more.
    pub fn seal(&mut self) {
        self.until = None;
    }

    /// When the gate opens by itself.
    #[must_use]
    pub fn until(&self) -> Option<Duration> {
        self.until
    }

    /// Whether clients have waited long enough.
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
    /// A closing was in vain, and clients waited for so long.
    pub fn failed(&mut self, now: Duration, waited: Duration) {
        let doubled = BACKOFF_FIRST * 2u32.pow(self.failures.min(10));
        let share = waited.min(FREEZE_MAX) * OPEN_SHARE;
        self.failures += 1;
        self.from = now + doubled.min(BACKOFF_MAX).max(share);
    }

    /// Not earlier than this.
    #[must_use]
    pub fn from(&self) -> Duration {
        self.from
    }
}

/// The age of clients' in-flight requests while the gate is open.
#[derive(Clone, Copy, Debug, Default)]
pub struct Probe {
    /// When this probe began; none between two.
    began: Option<Duration>,
    /// Since when the present generation of visits has been let in, if that is known
    /// ([`crate::disk::Gate::turn_generation`]).
    turned: Option<Duration>,
    last: Duration,
    slow: u32,
}

/// What a look at the requests in flight says about closing the gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FreezeDecision {
    /// Look again soon: the oldest is at least so old.
    Wait(Duration),
    /// Close the gate; in-flight requests should end within this.
    Close(Duration),
}

impl Probe {
    /// When the next look is due.
    #[must_use]
    pub fn due(&self) -> Duration {
        self.began.map_or(Duration::ZERO, |_| self.last + PROBE_EVERY)
    }

    /// The generation before the present one has ended, or has not.
    pub fn looked(&mut self, now: Duration, turned: bool) -> FreezeDecision {
        self.last = now;
        let began = *self.began.get_or_insert(now);
        let age = now.saturating_sub(self.turned.unwrap_or(began));
        if !turned {
            return FreezeDecision::Wait(age);
        }
        if self.turned.replace(now).is_none() {
            return FreezeDecision::Wait(Duration::ZERO);
        }
        if age > QUIET && self.slow < PROBES_MAX {
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
    fn a_freeze_without_progress_ends_after_the_stall_limit() {
        let freeze = Freeze::new(SECOND);
        assert!(!freeze.is_over(SECOND + STALL_MAX - MS));
        assert!(freeze.is_over(SECOND + STALL_MAX));
    }

    #[test]
    fn progress_prolongs_a_freeze_up_to_its_limit() {
        let mut freeze = Freeze::new(SECOND);
        for step in 0..100 {
            freeze.progressed(SECOND + step * 100 * MS);
        }
        assert_eq!(freeze.until(), Some(SECOND + FREEZE_MAX));
        freeze.progressed(SECOND);
        assert_eq!(freeze.until(), Some(SECOND + FREEZE_MAX), "nothing shortens it");
    }

    #[test]
    fn progress_after_its_end_prolongs_no_freeze() {
        let mut freeze = Freeze::new(SECOND);
        freeze.progressed(SECOND + STALL_MAX);
        assert_eq!(freeze.until(), Some(SECOND + STALL_MAX));
        assert!(freeze.is_over(SECOND + STALL_MAX));
    }

    #[test]
    fn a_long_drain_leaves_time_for_the_last_copy() {
        let mut freeze = Freeze::new(SECOND);
        let drained = SECOND + DRAIN_MAX;
        freeze.drained(drained);
        assert_eq!(freeze.until(), Some(drained + STALL_MAX));
        freeze.drained(2 * drained);
        assert_eq!(freeze.until(), Some(SECOND + FREEZE_MAX));
    }

    #[test]
    fn a_last_step_may_take_what_is_left() {
        let mut freeze = Freeze::new(SECOND);
        freeze.last_step();
        assert_eq!(freeze.until(), Some(SECOND + FREEZE_MAX));
    }

    #[test]
    fn a_sealed_freeze_lasts() {
        let mut freeze = Freeze::new(SECOND);
        freeze.seal();
        freeze.progressed(2 * SECOND);
        freeze.last_step();
        assert_eq!((freeze.until(), freeze.is_over(3600 * SECOND)), (None, false));
        assert_eq!(freeze.elapsed(3 * SECOND), 2 * SECOND);
    }

    #[test]
    fn the_gate_is_tried_ever_less_often_up_to_a_limit() {
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
        fn clients_wait_for_a_fifth_of_the_time_at_most(
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

    /// Probes in-flight requests of that age, all the time, until the gate is to be closed.
    fn probe(age: Duration) -> (Duration, FreezeDecision) {
        let (mut probe, mut now) = (Probe::default(), SECOND);
        let mut generation = now;
        loop {
            let turned = now >= generation + age;
            if turned {
                generation = now;
            }
            let verdict = probe.looked(now, turned);
            if matches!(verdict, FreezeDecision::Close(_)) || now > 60 * SECOND {
                return (now - SECOND, verdict);
            }
            assert!(probe.due() > now);
            now = probe.due();
        }
    }

    #[test]
    fn short_requests_let_the_gate_close_within_milliseconds() {
        assert_eq!(probe(Duration::ZERO), (PROBE_EVERY, FreezeDecision::Close(DRAIN_MIN)));
        assert_eq!(probe(QUIET), (2 * QUIET, FreezeDecision::Close(DRAIN_MIN)));
    }

    #[test]
    fn slow_requests_are_given_time_once_there_is_no_other_way() {
        let (after, verdict) = probe(500 * MS);
        assert_eq!(verdict, FreezeDecision::Close(SECOND));
        assert!(after >= PROBES_MAX * 500 * MS, "{after:?}");
        assert_eq!(probe(10 * SECOND).1, FreezeDecision::Close(DRAIN_MAX));
    }

    #[test]
    fn one_long_request_keeps_the_gate_open_however_long_it_takes() {
        let mut probe = Probe::default();
        assert_eq!(probe.looked(SECOND, true), FreezeDecision::Wait(Duration::ZERO));
        for ms in (10..30_000).step_by(10) {
            assert_eq!(probe.looked(SECOND + ms * MS, false), FreezeDecision::Wait(ms * MS));
        }
        assert_eq!(probe.looked(31 * SECOND, true), FreezeDecision::Wait(Duration::ZERO));
        assert_eq!(probe.looked(31 * SECOND + PROBE_EVERY, true), FreezeDecision::Close(DRAIN_MIN));
    }

    #[test]
    fn probes_that_are_far_apart_let_the_gate_close_in_the_end() {
        let mut probe = Probe::default();
        for second in 1..=1 + PROBES_MAX {
            assert_eq!(probe.looked(second * SECOND, true), FreezeDecision::Wait(Duration::ZERO));
        }
        assert_eq!(probe.looked(9 * SECOND, true), FreezeDecision::Close(DRAIN_MAX));
    }
}
