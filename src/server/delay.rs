//! Whether what a session has received was kept waiting for so long that its client may have gone,
//! and come back, in the meantime.
//! Looks at a coarse clock only, which costs no system call.

use nix::time::{ClockId, clock_gettime};
use std::time::Duration;

/// A session that was busy for longer than this with one thing has kept the rest waiting.
const LATE: Duration = Duration::from_millis(20);
/// No more often than this is the connection looked at while things are late.
const LOOK_EVERY: Duration = Duration::from_millis(4);

/// How long the received bytes of one session have been waiting.
#[derive(Clone, Copy, Debug)]
pub(super) struct ReceiveDelay {
    /// When it last received something or began a change.
    last: Duration,
    /// Something has been kept waiting since there last was no backlog.
    late: bool,
    /// It has been waiting for new requests since.
    idle: bool,
    looked: Duration,
}

impl Default for ReceiveDelay {
    fn default() -> Self {
        Self { last: Duration::ZERO, late: false, idle: true, looked: Duration::ZERO }
    }
}

impl ReceiveDelay {
    /// Bytes have been received.
    pub(super) fn received(&mut self) {
        self.went_on(now());
    }

    /// The session waits for something; with a backlog that it cannot begin now, or for new requests.
    pub(super) fn waits(&mut self, has_backlog: bool) {
        (self.late, self.idle) = (has_backlog, !has_backlog);
    }

    /// Whether to look if the client is still there, before a change is begun.
    pub(super) fn counts_as_late(&mut self) -> bool {
        self.looks(now())
    }

    fn went_on(&mut self, now: Duration) {
        let stalled = now.saturating_sub(self.last) > LATE;
        self.late |= stalled && !std::mem::take(&mut self.idle);
        self.last = now;
    }

    fn looks(&mut self, now: Duration) -> bool {
        self.went_on(now);
        let looks = self.late && now.saturating_sub(self.looked) >= LOOK_EVERY;
        if looks {
            self.looked = now;
        }
        looks
    }
}

fn now() -> Duration {
    // It cannot fail for a clock that exists; without one, everything is late.
    clock_gettime(ClockId::CLOCK_MONOTONIC_COARSE).map_or(Duration::MAX, Duration::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: Duration = Duration::from_secs(9);

    #[test]
    fn a_session_is_late_after_one_long_step_and_not_after_many_short_ones() {
        let mut delay = ReceiveDelay::default();
        delay.waits(false);
        delay.went_on(START);
        for step in 1..100 {
            assert!(!delay.looks(START + step * LATE));
        }
        delay.went_on(START + 99 * LATE + LATE + Duration::from_nanos(1));
        assert!(delay.looks(START + 101 * LATE));
    }

    #[test]
    fn a_backlog_is_late_until_the_session_waits_for_new_requests() {
        let mut delay = ReceiveDelay::default();
        delay.waits(false);
        delay.went_on(START);
        delay.waits(true);
        assert!(delay.looks(START));
        delay.went_on(START + LATE);
        assert!(delay.looks(START + LATE), "received behind the backlog");
        assert!(!delay.looks(START + LATE), "looked at just now");
        assert!(delay.looks(START + LATE + LOOK_EVERY));
        delay.waits(false);
        delay.went_on(START + 9 * LATE);
        assert!(!delay.looks(START + 10 * LATE));
    }
}
