//! Rate limit for log lines that clients cause: the first events of a kind get lines at once, further ones
//! a count per minute.
//! Pure: time is an argument. Never stores more than [`KINDS_MAX`] kinds.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// How long events of a kind are counted after its line.
pub const PERIOD: Duration = Duration::from_secs(60);
/// Most kinds with a count of their own; events of further kinds share one.
pub const KINDS_MAX: usize = 64;

/// What to do with an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogDecision {
    /// Log it.
    Log,
    /// It was counted; do not log it.
    Count,
}

/// Counts of events by kind, such as a reason and an address.
#[derive(Clone, Debug)]
pub struct LogLimit<K> {
    /// How many events of a kind get lines in a period without a count.
    lines: u64,
    kinds: BTreeMap<K, SuppressedCount>,
    /// Events of kinds beyond [`KINDS_MAX`].
    others: Option<SuppressedCount>,
}

#[derive(Clone, Copy, Debug)]
struct SuppressedCount {
    logged_at: Instant,
    logged: u64,
    counted: u64,
}

impl<K> Default for LogLimit<K> {
    fn default() -> Self {
        Self::with_lines(1)
    }
}

impl<K> LogLimit<K> {
    /// A limit of so many lines for the events of a kind in a period.
    #[must_use]
    pub fn with_lines(lines: u64) -> Self {
        Self { lines, kinds: BTreeMap::new(), others: None }
    }
}

impl SuppressedCount {
    fn record(&mut self, lines: u64) -> LogDecision {
        if self.logged < lines {
            self.logged += 1;
            return LogDecision::Log;
        }
        self.counted = self.counted.saturating_add(1);
        LogDecision::Count
    }
}

impl<K: Ord> LogLimit<K> {
    /// Counts an event. A period lasts until [`LogLimit::take_counts`] is called after its end.
    pub fn record(&mut self, kind: K, now: Instant) -> LogDecision {
        if let Some(entry) = self.kinds.get_mut(&kind) {
            return entry.record(self.lines);
        }
        let fresh = SuppressedCount { logged_at: now, logged: 1, counted: 0 };
        if self.kinds.len() < KINDS_MAX {
            self.kinds.insert(kind, fresh);
            return LogDecision::Log;
        }
        match &mut self.others {
            Some(entry) => entry.record(self.lines),
            none => {
                *none = Some(fresh);
                LogDecision::Log
            }
        }
    }

    /// When to call [`LogLimit::take_counts`] next, if there is any kind.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        let counts = self.kinds.values().chain(&self.others);
        counts.map(|entry| entry.logged_at + PERIOD).min()
    }

    /// The counts of periods that have ended, by kind; none for the shared count. A kind without a count
    /// is removed, and its next event gets a line.
    pub fn take_counts(&mut self, now: Instant) -> Vec<(Option<K>, u64)>
    where
        K: Clone,
    {
        let has_ended = |entry: &SuppressedCount| entry.logged_at + PERIOD <= now;
        let mut counts = Vec::new();
        self.kinds.retain(|kind, entry| {
            if has_ended(entry) && entry.counted > 0 {
                counts.push((Some(kind.clone()), entry.counted));
                *entry = SuppressedCount { logged_at: now, counted: 0, ..*entry };
            } else if has_ended(entry) {
                return false;
            }
            true
        });
        if let Some(entry) = self.others.filter(has_ended) {
            let again = SuppressedCount { logged_at: now, counted: 0, ..entry };
            self.others = (entry.counted > 0).then_some(again);
            counts.extend((entry.counted > 0).then_some((None, entry.counted)));
        }
        counts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_event_is_logged_and_others_counted() {
        let start = Instant::now();
        let mut limit = LogLimit::default();
        assert_eq!(
            (limit.record("a", start), limit.record("b", start)),
            (LogDecision::Log, LogDecision::Log)
        );
        for _ in 0..3 {
            assert_eq!(limit.record("a", start), LogDecision::Count);
        }
        assert_eq!(limit.deadline(), Some(start + PERIOD));
        assert_eq!(limit.take_counts(start), []);
        assert_eq!(limit.take_counts(start + PERIOD), [(Some("a"), 3)]);
        assert_eq!(limit.record("b", start + PERIOD), LogDecision::Log, "removed");
        assert_eq!(limit.record("a", start + PERIOD), LogDecision::Count, "a new period");
        assert_eq!(limit.take_counts(start + 2 * PERIOD), [(Some("a"), 1)]);
        assert_eq!(limit.take_counts(start + 3 * PERIOD), []);
        assert_eq!(limit.deadline(), None);
    }

    #[test]
    fn several_events_of_a_kind_can_have_lines() {
        let start = Instant::now();
        let mut limit = LogLimit::with_lines(3);
        let decisions = [(); 5].map(|()| limit.record("a", start));
        use LogDecision::{Count, Log};
        assert_eq!(decisions, [Log, Log, Log, Count, Count]);
        assert_eq!(limit.record("b", start), Log);
        assert_eq!(limit.take_counts(start + PERIOD), [(Some("a"), 2)]);
        assert_eq!(limit.record("a", start + PERIOD), Count, "a new period");
        assert_eq!(limit.take_counts(start + 2 * PERIOD), [(Some("a"), 1)]);
        assert_eq!(limit.take_counts(start + 3 * PERIOD), []);
        assert_eq!(limit.record("a", start + 3 * PERIOD), Log);
    }

    #[test]
    fn kinds_beyond_the_limit_share_a_count() {
        let start = Instant::now();
        let mut limit = LogLimit::default();
        for kind in 0..KINDS_MAX {
            assert_eq!(limit.record(kind, start), LogDecision::Log);
        }
        assert_eq!(limit.record(KINDS_MAX, start), LogDecision::Log);
        for kind in KINDS_MAX..10 * KINDS_MAX {
            assert_eq!(limit.record(kind, start), LogDecision::Count);
        }
        let counts = limit.take_counts(start + PERIOD);
        assert_eq!(counts, [(None, 9 * KINDS_MAX as u64)]);
    }
}
