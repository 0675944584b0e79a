//! How long a session has kept received bytes waiting: if too long, the client may have given up and
//! reconnected in the meantime.
//! Pure: the time is an argument. A coarse clock suffices ([`coarse_now`]).

use nix::time::{ClockId, clock_gettime};
use std::time::Duration;

/// One step that takes a session longer than this makes the bytes received behind it late.
const LATE_AFTER: Duration = Duration::from_millis(20);
/// While bytes are late, the connection is checked at most once in this time.
const CHECK_INTERVAL: Duration = Duration::from_millis(4);

/// The delay of one session's received bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct ReceiveDelay {
    /// When the session last received bytes or began a change.
    last_step: Duration,
    /// Bytes have been kept waiting since there last was no backlog.
    late: bool,
    /// The session has waited for new requests since the last step.
    idle: bool,
    last_check: Duration,
}

impl Default for ReceiveDelay {
    fn default() -> Self {
        Self { last_step: Duration::ZERO, late: false, idle: true, last_check: Duration::ZERO }
    }
}

impl ReceiveDelay {
    /// The session has received bytes.
    pub(super) fn received(&mut self, now: Duration) {
        self.step(now);
    }

    /// The session waits: with a backlog that it cannot begin now, or for new requests.
    pub(super) fn waits(&mut self, has_backlog: bool) {
        (self.late, self.idle) = (has_backlog, !has_backlog);
    }

    /// Whether the session must check, before it begins a change, that the client is still there.
    pub(super) fn needs_check(&mut self, now: Duration) -> bool {
        self.step(now);
        let needed = self.late && now.saturating_sub(self.last_check) >= CHECK_INTERVAL;
        if needed {
            self.last_check = now;
        }
        needed
    }

    fn step(&mut self, now: Duration) {
        let delayed = now.saturating_sub(self.last_step) > LATE_AFTER;
        self.late |= delayed && !std::mem::take(&mut self.idle);
        self.last_step = now;
    }
}

/// The time on a clock that is read without a system call.
pub(super) fn coarse_now() -> Duration {
    // This fails only without such a clock; then all bytes are late.
    clock_gettime(ClockId::CLOCK_MONOTONIC_COARSE).map_or(Duration::MAX, Duration::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: Duration = Duration::from_secs(9);

    #[test]
    fn bytes_are_late_after_one_long_step_only() {
        let mut delay = ReceiveDelay::default();
        delay.waits(false);
        delay.step(START);
        for step in 1..100 {
            assert!(!delay.needs_check(START + step * LATE_AFTER));
        }
        delay.step(START + 99 * LATE_AFTER + LATE_AFTER + Duration::from_nanos(1));
        assert!(delay.needs_check(START + 101 * LATE_AFTER));
    }

    #[test]
    fn a_backlog_is_late_until_the_session_is_idle() {
        let mut delay = ReceiveDelay::default();
        delay.waits(false);
        delay.step(START);
        delay.waits(true);
        assert!(delay.needs_check(START));
        delay.step(START + LATE_AFTER);
        assert!(delay.needs_check(START + LATE_AFTER), "received behind the backlog");
        assert!(!delay.needs_check(START + LATE_AFTER), "checked just now");
        assert!(delay.needs_check(START + LATE_AFTER + CHECK_INTERVAL));
        delay.waits(false);
        delay.step(START + 9 * LATE_AFTER);
        assert!(!delay.needs_check(START + 10 * LATE_AFTER));
    }
}
