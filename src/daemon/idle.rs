//! When an idle process ends (`--idle-exit`). Never reads a clock: the caller passes the time.

use std::time::{Duration, Instant};

/// The time since the last client or migration.
#[derive(Clone, Copy, Debug)]
pub(super) struct Idle {
    /// After how long the process ends; `None`: never.
    limit: Option<Duration>,
    since: Instant,
}

impl Idle {
    pub(super) fn new(limit: Option<Duration>, now: Instant) -> Self {
        Self { limit, since: now }
    }

    /// Restarts the time, because a client or a migration has come or gone.
    pub(super) fn restart(&mut self, now: Instant) {
        self.since = now;
    }

    /// When to end unless something happens; `None` while the process is `busy`. A command that is
    /// being carried out keeps the process busy, too, but does not restart the time.
    pub(super) fn deadline(&self, busy: bool) -> Option<Instant> {
        // A deadline that `Instant` cannot represent never comes.
        self.since.checked_add(self.limit?).filter(|_| !busy)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_deadline_counts_from_the_last_activity() {
        let (start, second) = (Instant::now(), Duration::from_secs(1));
        let mut idle = Idle::new(Some(5 * second), start);
        assert_eq!(idle.deadline(false), Some(start + 5 * second));
        assert_eq!(idle.deadline(true), None);
        idle.restart(start + 3 * second);
        assert_eq!(idle.deadline(false), Some(start + 8 * second));
    }

    #[test]
    fn without_a_limit_there_is_no_deadline() {
        let now = Instant::now();
        assert_eq!(Idle::new(None, now).deadline(false), None);
        assert_eq!(Idle::new(Some(Duration::MAX), now).deadline(false), None);
    }
}
