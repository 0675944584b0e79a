//! Which address to connect to next, and when.
//! Pure.

use std::time::Duration;

/// Delay after the first failure of an address.
const DELAY_FIRST: Duration = Duration::from_millis(50);
/// Longest delay between two attempts to connect to an address.
pub(super) const DELAY_MAX: Duration = Duration::from_secs(5);
/// How long an address may be silent before the next one is tried beside it. Longer than the handshake over
/// a slow network, so that the first address that has the disk is taken; and short enough for clients that wait.
pub(super) const SILENCE_MAX: Duration = Duration::from_millis(500);

/// The addresses of a disk, in turn. A disk is at one of them, and moves from one to another.
///
/// All are tried without a delay, one after the other, but none waits for long for one that does not answer. After
/// a failure an address has a delay, which doubles up to [`DELAY_MAX`]. Times count from any fixed moment.
#[derive(Clone, Debug)]
pub(super) struct Rotation {
    addresses: Vec<AddressAttempts>,
    /// The address to try first.
    current: usize,
    /// The last attempt that was started, unless it has ended: the address, and when its silence is too long.
    last_started: Option<(usize, Duration)>,
}

#[derive(Clone, Copy, Debug, Default)]
struct AddressAttempts {
    /// Since the last connection that was of use.
    failures: u32,
    /// When to try it.
    next_at: Duration,
    is_running: bool,
}

/// What to do about a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NextAttempt {
    /// Start an attempt at this address ([`Rotation::on_start`]).
    Start(usize),
    /// Nothing until this time, unless an attempt ends before.
    WaitUntil(Duration),
    /// Nothing until an attempt ends.
    Wait,
}

impl Rotation {
    /// Begins with the address `current` of `count`.
    #[must_use]
    pub(super) fn starting_at(count: usize, current: usize) -> Self {
        let addresses = vec![AddressAttempts::default(); count.max(1)];
        Self { addresses, current, last_started: None }
    }

    /// What to do now.
    #[must_use]
    pub(super) fn next(&self, now: Duration) -> NextAttempt {
        if let Some((_, silent_at)) = self.last_started.filter(|(_, silent_at)| now < *silent_at) {
            let has_others = self.addresses.iter().any(|address| !address.is_running);
            return if has_others { NextAttempt::WaitUntil(silent_at) } else { NextAttempt::Wait };
        }
        let count = self.addresses.len();
        let in_order = (0..count).map(|nth| (self.current + nth) % count);
        let idle = in_order.filter(|number| !self.addresses[*number].is_running);
        // The first of those with the earliest time.
        match idle.min_by_key(|number| self.addresses[*number].next_at.max(now)) {
            None => NextAttempt::Wait,
            Some(number) if self.addresses[number].next_at <= now => NextAttempt::Start(number),
            Some(number) => NextAttempt::WaitUntil(self.addresses[number].next_at),
        }
    }

    /// An attempt is started.
    pub(super) fn on_start(&mut self, number: usize, now: Duration) {
        self.addresses[number].is_running = true;
        self.last_started = Some((number, now + SILENCE_MAX));
    }

    /// The server at this address did not give us the disk, or was lost before it answered a request.
    pub(super) fn on_failure(&mut self, number: usize, now: Duration) {
        let address = &mut self.addresses[number];
        address.next_at = now + delay(address.failures);
        address.failures = address.failures.saturating_add(1);
        address.is_running = false;
        self.last_started = self.last_started.filter(|(last, _)| *last != number);
        if self.current == number {
            self.current = (number + 1) % self.addresses.len();
        }
    }

    /// An attempt has connected: the others are abandoned, and this address is the first from now on.
    pub(super) fn on_connected(&mut self, number: usize) {
        self.addresses.iter_mut().for_each(|address| address.is_running = false);
        (self.current, self.last_started) = (number, None);
    }

    /// The server at the current address has answered a request, and is lost: all addresses are tried at once.
    pub(super) fn on_success(&mut self) {
        self.addresses.fill(AddressAttempts::default());
    }
}

/// The delay after a failure, which so many others came before.
fn delay(failures: u32) -> Duration {
    DELAY_FIRST.saturating_mul(1 << failures.min(16)).min(DELAY_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn millis(count: u64) -> Duration {
        Duration::from_millis(count)
    }

    /// The next attempts, each of which fails at once: address, and time since the last one in milliseconds.
    fn attempts(rotation: &mut Rotation, count: usize) -> Vec<(usize, u128)> {
        let (mut now, mut last) = (Duration::ZERO, Duration::ZERO);
        let mut all = Vec::new();
        while all.len() < count {
            match rotation.next(now) {
                NextAttempt::Start(number) => {
                    all.push((number, (now - last).as_millis()));
                    rotation.on_start(number, now);
                    rotation.on_failure(number, now);
                    last = now;
                }
                NextAttempt::WaitUntil(at) => now = at,
                NextAttempt::Wait => panic!("for what?"),
            }
        }
        all
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
        for number in [0, 1] {
            rotation.on_failure(number, Duration::ZERO);
        }
        rotation.on_start(2, Duration::ZERO);
        rotation.on_connected(2);
        rotation.on_success();
        assert_eq!(attempts(&mut rotation, 4), [(2, 0), (0, 0), (1, 0), (2, 50)]);
    }

    #[test]
    fn a_server_that_accepts_and_never_answers_is_not_tried_in_a_loop() {
        let mut rotation = Rotation::starting_at(1, 0);
        for _ in 0..100_000 {
            rotation.on_start(0, Duration::ZERO);
            rotation.on_connected(0);
            rotation.on_failure(0, Duration::ZERO);
        }
        assert_eq!(rotation.next(Duration::ZERO), NextAttempt::WaitUntil(DELAY_MAX));
        rotation.addresses[0].failures = u32::MAX;
        rotation.on_failure(0, Duration::ZERO);
        assert_eq!(rotation.next(Duration::ZERO), NextAttempt::WaitUntil(DELAY_MAX));
    }

    #[test]
    fn a_silent_address_does_not_keep_the_next_one_waiting() {
        let mut rotation = Rotation::starting_at(3, 1);
        let zero = Duration::ZERO;
        assert_eq!(rotation.next(zero), NextAttempt::Start(1));
        rotation.on_start(1, zero);
        let almost = SILENCE_MAX - millis(1);
        assert_eq!(rotation.next(almost), NextAttempt::WaitUntil(SILENCE_MAX));
        assert_eq!(rotation.next(SILENCE_MAX), NextAttempt::Start(2));
        rotation.on_start(2, SILENCE_MAX);
        // The next one follows a failure at once, though another attempt is silent.
        rotation.on_failure(2, SILENCE_MAX);
        assert_eq!(rotation.next(SILENCE_MAX), NextAttempt::Start(0));
        rotation.on_start(0, SILENCE_MAX);
        let next_at = SILENCE_MAX + DELAY_FIRST;
        assert_eq!(
            rotation.next(next_at),
            NextAttempt::WaitUntil(2 * SILENCE_MAX),
            "address 0 is new"
        );
        assert_eq!(rotation.next(2 * SILENCE_MAX), NextAttempt::Start(2), "beside both");
        rotation.on_start(2, 2 * SILENCE_MAX);
        for now in [2 * SILENCE_MAX, 100 * SILENCE_MAX] {
            assert_eq!(rotation.next(now), NextAttempt::Wait, "all are tried");
        }
        rotation.on_connected(0);
        rotation.on_success();
        assert_eq!(rotation.next(zero), NextAttempt::Start(0));
    }
}
