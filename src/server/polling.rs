//! Whether a session looks out for the next request for a moment before it sleeps.
//! Pure: what happened is an argument.
//!
//! A client on this host that sends one request at a time sends the next some microseconds after it
//! has the reply. To fall asleep and to be woken takes longer than that, and costs as much computing
//! as looking out does. A client that is further away, or has something else to do, is not looked
//! out for: each time in vain doubles how often the session goes to sleep at once.

use std::time::Duration;

/// How long a session looks out. QEMU does so for its own queues for up to 32 µs.
pub(super) const LOOKOUT: Duration = Duration::from_micros(30);
/// How often in a row a session goes to sleep at once, at most.
const SKIPS_MAX: u32 = 1024;
/// How many requests in a row have to come one at a time, once several have come at once.
const ROW: u32 = 64;

/// What a session expects of its client.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct AdaptivePolling {
    /// How often to go to sleep at once, before it is tried again.
    skips: u32,
    /// How often that will be when it was in vain once more.
    next_skips: u32,
    /// How many requests have to come one at a time before the client counts as one that waits for
    /// each reply.
    to_come: u32,
}

impl AdaptivePolling {
    /// Whether to look out now, after so many requests have been taken since the last time.
    pub(super) fn looks_out(&mut self, taken: u32) -> bool {
        // Whoever sends several at once does not wait for each reply, even if he is so slow that
        // they are often met one by one.
        if taken != 1 {
            self.to_come = if taken > 1 { ROW } else { self.to_come };
            return false;
        }
        if self.to_come > 0 {
            self.to_come -= 1;
            return false;
        }
        let looks = self.skips == 0;
        self.skips = self.skips.saturating_sub(1);
        looks
    }

    /// Something came while the session looked out, or nothing did.
    pub(super) fn note(&mut self, came: bool) {
        if came {
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

    /// How often it sleeps at once before it looks out again.
    fn sleeps(polling: &mut AdaptivePolling) -> u32 {
        let mut count = 0;
        while !polling.looks_out(1) {
            count += 1;
        }
        count
    }

    #[test]
    fn a_client_that_sends_one_request_at_a_time_is_looked_out_for_as_long_as_it_comes() {
        let mut polling = AdaptivePolling::default();
        for _ in 0..100 {
            assert!(polling.looks_out(1));
            polling.note(true);
        }
        assert!(!polling.looks_out(0));
        assert!(polling.looks_out(1));
    }

    #[test]
    fn a_client_that_sent_several_at_once_has_to_send_many_one_by_one_first() {
        let mut polling = AdaptivePolling::default();
        assert!(!polling.looks_out(2));
        assert_eq!(sleeps(&mut polling), ROW);
        polling.note(true);
        assert!(!polling.looks_out(0) && polling.looks_out(1));
    }

    #[test]
    fn a_client_that_does_not_come_is_looked_out_for_ever_less_often_up_to_a_limit() {
        let mut polling = AdaptivePolling::default();
        let mut last = sleeps(&mut polling);
        assert_eq!(last, 0);
        loop {
            polling.note(false);
            let next = sleeps(&mut polling);
            if last == SKIPS_MAX {
                assert_eq!(next, SKIPS_MAX);
                break;
            }
            assert_eq!(next, (2 * last).max(1));
            last = next;
        }
        polling.note(true);
        assert_eq!(sleeps(&mut polling), 0);
    }
}
