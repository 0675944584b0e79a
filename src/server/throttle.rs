//! How long one writer may be kept waiting, so that a migration can catch up with it.
//! Never sleeps and never looks at a clock: the session asks, and waits by itself.

use std::time::Duration;

/// The longest single delay. With [`Throttle::delay`]'s rule it keeps the sum of all delays of one
/// writer below half of any second.
pub const DELAY_MAX: Duration = Duration::from_millis(50);

/// What one writer (one session) has been made to wait so far.
#[derive(Clone, Copy, Debug, Default)]
pub struct Throttle {
    /// When the last delay ended.
    free_since: Duration,
}

impl Throttle {
    /// How long to hold back a write that arrives at `now`, when `wanted` is asked of every write.
    ///
    /// A delay is never longer than seven eighths of the time that the writer ran freely before it.
    /// The caller is expected to wait exactly that long before it writes.
    pub fn delay(&mut self, now: Duration, wanted: Duration) -> Duration {
        let ran = now.saturating_sub(self.free_since);
        let delay = wanted.min(DELAY_MAX).min(ran * 7 / 8);
        if !delay.is_zero() {
            self.free_since = now + delay;
        }
        delay
    }
}

#[cfg(test)]
mod tests {
    use super::{DELAY_MAX, Throttle};
    use proptest::prelude::*;
    use std::time::Duration;

    const SECOND: Duration = Duration::from_secs(1);

    /// The part of the delay (`from`, `length`) that lies in the second from `start` on.
    fn inside(start: Duration, (from, length): (Duration, Duration)) -> Duration {
        (from + length).min(start + SECOND).saturating_sub(from.max(start))
    }

    #[test]
    fn a_writer_that_was_idle_waits_as_long_as_asked_but_not_longer_than_the_most() {
        let mut held = Throttle::default();
        let wanted = Duration::from_millis(3);
        assert_eq!(held.delay(SECOND, wanted), wanted);
        assert_eq!(Throttle::default().delay(SECOND, SECOND), DELAY_MAX);
    }

    #[test]
    fn a_writer_that_was_just_held_goes_on_at_once() {
        let mut held = Throttle::default();
        let first = held.delay(SECOND, DELAY_MAX);
        assert_eq!(held.delay(SECOND + first, DELAY_MAX), Duration::ZERO);
    }

    #[test]
    fn nobody_waits_when_nothing_is_asked() {
        assert_eq!(Throttle::default().delay(SECOND, Duration::ZERO), Duration::ZERO);
    }

    proptest! {
        #[test]
        fn a_writer_is_never_held_for_more_than_half_of_any_second(
            gaps in proptest::collection::vec(0u64..70_000, 1..300),
            wanted_us in 0u64..200_000,
        ) {
            let mut held = Throttle::default();
            let mut now = SECOND;
            let mut delays = Vec::new();
            for gap in gaps {
                now += Duration::from_micros(gap);
                let delay = held.delay(now, Duration::from_micros(wanted_us));
                delays.push((now, delay));
                now += delay;
            }
            for &(start, _) in &delays {
                let sum: Duration = delays.iter().map(|&delay| inside(start, delay)).sum();
                prop_assert!(sum <= SECOND / 2, "held for {sum:?} in the second from {start:?}");
            }
        }
    }
}
