//! Which address to connect to next, and after which delay.
//! Pure.

use std::time::Duration;

/// Delay after the first round of failures.
const DELAY_FIRST: Duration = Duration::from_millis(50);
/// Longest delay between two rounds.
pub(super) const DELAY_MAX: Duration = Duration::from_secs(5);

/// The addresses of a disk, in turn. A disk is at one of them, and moves from one to another.
///
/// All are tried without a delay; then the delay doubles with every round, up to [`DELAY_MAX`].
#[derive(Clone, Copy, Debug)]
pub(super) struct Rotation {
    count: usize,
    current: usize,
    /// Since the last connection that was of use.
    failures: usize,
}

impl Rotation {
    /// Begins with the address `current` of `count`.
    #[must_use]
    pub(super) fn starting_at(count: usize, current: usize) -> Self {
        Self { count: count.max(1), current, failures: 0 }
    }

    /// The address to connect to.
    #[must_use]
    pub(super) fn current(&self) -> usize {
        self.current
    }

    /// The server at the current address did not give us the disk, or was lost before it answered a request.
    pub(super) fn on_failure(&mut self) {
        self.failures = self.failures.saturating_add(1);
        self.current = (self.current + 1) % self.count;
    }

    /// The server at the current address has answered a request.
    pub(super) fn on_success(&mut self) {
        self.failures = 0;
    }

    /// How long to wait before the next attempt.
    #[must_use]
    pub(super) fn delay(&self) -> Duration {
        let rounds = self.failures / self.count;
        if rounds == 0 || !self.failures.is_multiple_of(self.count) {
            return Duration::ZERO;
        }
        let doublings = u32::try_from(rounds - 1).unwrap_or(u32::MAX).min(16);
        DELAY_FIRST.saturating_mul(1 << doublings).min(DELAY_MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The next attempts: address, and delay in milliseconds.
    fn attempts(rotation: &mut Rotation, count: usize) -> Vec<(usize, u128)> {
        let attempt = |_| {
            let next = (rotation.current(), rotation.delay().as_millis());
            rotation.on_failure();
            next
        };
        (0..count).map(attempt).collect()
    }

    #[test]
    fn one_address_is_tried_at_once_and_then_less_and_less_often() {
        let delays: Vec<u128> = attempts(&mut Rotation::starting_at(1, 0), 12)
            .iter()
            .map(|(_, delay)| *delay)
            .collect();
        let expected = [0, 50, 100, 200, 400, 800, 1600, 3200, 5000, 5000, 5000, 5000];
        assert_eq!(delays, expected);
    }

    #[test]
    fn every_address_is_tried_before_a_delay() {
        let expected = [(0, 0), (1, 0), (0, 50), (1, 0), (0, 100), (1, 0), (0, 200)];
        assert_eq!(attempts(&mut Rotation::starting_at(2, 0), 7), expected);
    }

    #[test]
    fn the_address_that_answered_last_is_tried_first() {
        let mut rotation = Rotation::starting_at(3, 0);
        rotation.on_failure();
        rotation.on_failure();
        rotation.on_success();
        assert_eq!(attempts(&mut rotation, 4), [(2, 0), (0, 0), (1, 0), (2, 50)]);
    }

    #[test]
    fn a_server_that_accepts_and_never_answers_is_not_tried_in_a_loop() {
        let mut rotation = Rotation::starting_at(1, 0);
        for _ in 0..100_000 {
            rotation.on_failure();
        }
        assert_eq!(rotation.delay(), DELAY_MAX);
        assert_eq!(Rotation { failures: usize::MAX, ..rotation }.delay(), DELAY_MAX);
    }
}
