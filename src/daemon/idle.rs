//! When a process that has had nothing to do ends (`--idle-exit`).
//! Never looks at a clock; what happens, and when, is told to it.

use std::time::{Duration, Instant};

/// How long there has been neither a client nor a migration.
#[derive(Clone, Copy, Debug)]
pub(super) struct Idle {
    /// After how long the process ends; never without.
    limit: Option<Duration>,
    since: Instant,
}

impl Idle {
    pub(super) fn new(limit: Option<Duration>, now: Instant) -> Self {
        Self { limit, since: now }
    }

    /// A client or a migration has come or gone: the time begins anew.
    pub(super) fn stir(&mut self, now: Instant) {
        self.since = now;
    }

    /// When to end if nothing happens; not at all while the process is `busy`. An order that is
    /// being obeyed keeps it busy, too, but does not make the time begin anew.
    pub(super) fn due(&self, busy: bool) -> Option<Instant> {
        // A time that cannot be reckoned with does not come.
        self.since.checked_add(self.limit?).filter(|_| !busy)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_is_due_so_long_after_the_last_client_or_migration() {
        let (start, second) = (Instant::now(), Duration::from_secs(1));
        let mut idle = Idle::new(Some(5 * second), start);
        assert_eq!(idle.due(false), Some(start + 5 * second));
        assert_eq!(idle.due(true), None);
        idle.stir(start + 3 * second);
        assert_eq!(idle.due(false), Some(start + 8 * second));
    }

    #[test]
    fn without_a_limit_it_never_is() {
        let now = Instant::now();
        assert_eq!(Idle::new(None, now).due(false), None);
        assert_eq!(Idle::new(Some(Duration::MAX), now).due(false), None);
    }
}
