//! Write throttling: how long to delay a session's writes so that a migration converges.
//! Never sleeps and never reads a clock: the session asks, and waits.

use std::time::Duration;

/// The longest delay of one write. With the rule of [`Throttle::delay`] it keeps the sum of all
/// delays of one writer below half of any second.
pub const DELAY_MAX: Duration = Duration::from_millis(50);

/// The throttle of one writer (one session).
#[derive(Clone, Copy, Debug, Default)]
pub struct Throttle {
    /// When the last delay ended.
    undelayed_since: Duration,
}

impl Throttle {
    /// How long to delay a write that arrives at `now`, when every write is to be delayed by `wanted`.
    ///
    /// A delay is at most seven eighths of the time that the writer ran undelayed before it. The
    /// caller must wait exactly as long before it writes.
    pub fn delay(&mut self, now: Duration, wanted: Duration) -> Duration {
        let undelayed = now.saturating_sub(self.undelayed_since);
        let delay = wanted.min(DELAY_MAX).min(undelayed * 7 / 8);
        if !delay.is_zero() {
            self.undelayed_since = now + delay;
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

    /// The part of the delay (`from`, `length`) within the second that begins at `start`.
    fn within_second(start: Duration, (from, length): (Duration, Duration)) -> Duration {
        (from + length).min(start + SECOND).saturating_sub(from.max(start))
    }

    #[test]
    fn an_idle_writer_is_delayed_up_to_the_maximum() {
        let mut throttle = Throttle::default();
        let wanted = Duration::from_millis(3);
        assert_eq!(throttle.delay(SECOND, wanted), wanted);
        assert_eq!(Throttle::default().delay(SECOND, SECOND), DELAY_MAX);
    }

    #[test]
    fn a_writer_delayed_just_before_is_not_delayed() {
        let mut throttle = Throttle::default();
        let first = throttle.delay(SECOND, DELAY_MAX);
        assert_eq!(throttle.delay(SECOND + first, DELAY_MAX), Duration::ZERO);
    }

    #[test]
    fn no_delay_is_added_when_none_is_wanted() {
        assert_eq!(Throttle::default().delay(SECOND, Duration::ZERO), Duration::ZERO);
    }

    proptest! {
        #[test]
        fn delays_take_at_most_half_of_any_second(
            gaps in proptest::collection::vec(0u64..70_000, 1..300),
            wanted_us in 0u64..200_000,
        ) {
            let mut throttle = Throttle::default();
            let mut now = SECOND;
            let mut delays = Vec::new();
            for gap in gaps {
                now += Duration::from_micros(gap);
                let delay = throttle.delay(now, Duration::from_micros(wanted_us));
                delays.push((now, delay));
                now += delay;
            }
            for &(start, _) in &delays {
                let sum: Duration = delays.iter().map(|&delay| within_second(start, delay)).sum();
                prop_assert!(sum <= SECOND / 2, "delayed by {sum:?} in the second from {start:?}");
            }
        }
    }
}
