//! Adaptive polling: whether to busy-poll the socket briefly before blocking.
//! Pure: results are arguments.
//!
//! A client on this host that sends one request at a time sends the next a few microseconds after it
//! has the reply. To block and be woken takes longer than that, and as much processor time as polling.
//! Each unsuccessful poll doubles the number of times that the session skips polling, so that remote
//! and idle clients cost nothing.

use std::time::Duration;

/// How long to poll. QEMU polls its own queues for up to 32 µs.
pub(super) const POLL_TIME: Duration = Duration::from_micros(30);
/// How often in a row a session skips polling at most.
const SKIPS_MAX: u32 = 1024;
/// How many requests in a row a client has to send one at a time after it has pipelined several.
const SINGLES_AFTER_PIPELINING: u32 = 64;

/// The polling state of one session.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct AdaptivePolling {
    /// How often to skip polling before the next poll.
    skips: u32,
    /// The number of skips after the next unsuccessful poll.
    next_skips: u32,
    /// How many more requests have to arrive one at a time before the session polls again.
    singles_needed: u32,
}

impl AdaptivePolling {
    /// Whether to poll now; `requests` is the number of requests begun since the last call.
    pub(super) fn should_poll(&mut self, requests: u32) -> bool {
        // A client that pipelines does not wait for each reply, even if it is so slow that its requests
        // often arrive one by one.
        if requests != 1 {
            self.singles_needed =
                if requests > 1 { SINGLES_AFTER_PIPELINING } else { self.singles_needed };
            return false;
        }
        if self.singles_needed > 0 {
            self.singles_needed -= 1;
            return false;
        }
        let polls = self.skips == 0;
        self.skips = self.skips.saturating_sub(1);
        polls
    }

    /// Adapts to the result of a poll: whether a request arrived.
    pub(super) fn record(&mut self, arrived: bool) {
        if arrived {
            self.next_skips = 0;
        } else {
            self.next_skips = (2 * self.next_skips).clamp(1, SKIPS_MAX);
            self.skips = self.next_skips;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How often the session skips polling before it polls.
    fn skips(polling: &mut AdaptivePolling) -> u32 {
        let mut count = 0;
        while !polling.should_poll(1) {
            count += 1;
        }
        count
    }

    #[test]
    fn a_client_with_one_request_at_a_time_is_polled() {
        let mut polling = AdaptivePolling::default();
        for _ in 0..100 {
            assert!(polling.should_poll(1));
            polling.record(true);
        }
        assert!(!polling.should_poll(0));
        assert!(polling.should_poll(1));
    }

    #[test]
    fn polling_resumes_long_after_pipelined_requests() {
        let mut polling = AdaptivePolling::default();
        assert!(!polling.should_poll(2));
        assert_eq!(skips(&mut polling), SINGLES_AFTER_PIPELINING);
        polling.record(true);
        assert!(!polling.should_poll(0) && polling.should_poll(1));
    }

    #[test]
    fn polling_backs_off_exponentially_up_to_a_limit() {
        let mut polling = AdaptivePolling::default();
        let mut last = skips(&mut polling);
        assert_eq!(last, 0);
        loop {
            polling.record(false);
            let next = skips(&mut polling);
            if last == SKIPS_MAX {
                assert_eq!(next, SKIPS_MAX);
                break;
            }
            assert_eq!(next, (2 * last).max(1));
            last = next;
        }
        polling.record(true);
        assert_eq!(skips(&mut polling), 0);
    }
}
