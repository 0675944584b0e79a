//! Limits the lines that strangers can cause in the log: the first of a kind at once, the others as
//! a count once a minute.
//! Pure: time is an argument. Never holds more than [`KINDS_MAX`] kinds.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// After a line of some kind, further events of that kind are counted for so long.
pub const PERIOD: Duration = Duration::from_secs(60);
/// Most kinds that are told apart at once; events of further kinds are counted together.
pub const KINDS_MAX: usize = 64;

/// What becomes of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogDecision {
    /// It gets its line.
    Log,
    /// It is counted.
    Count,
}

/// Events by kind, such as a reason and an address.
#[derive(Clone, Debug)]
pub struct LogLimit<K> {
    kinds: BTreeMap<K, SuppressedCount>,
    /// Events of kinds for which there was no room.
    others: Option<SuppressedCount>,
}

#[derive(Clone, Copy, Debug)]
struct SuppressedCount {
    logged_at: Instant,
    counted: u64,
}

impl<K> Default for LogLimit<K> {
    fn default() -> Self {
        Self { kinds: BTreeMap::new(), others: None }
    }
}

impl<K: Ord> LogLimit<K> {
    /// Takes note of an event. The counts of a period that is over must have been taken before
    /// ([`LogLimit::take_counts`]), or the period goes on.
    pub fn note(&mut self, kind: K, now: Instant) -> LogDecision {
        if let Some(tally) = self.kinds.get_mut(&kind) {
            tally.counted = tally.counted.saturating_add(1);
            return LogDecision::Count;
        }
        let fresh = SuppressedCount { logged_at: now, counted: 0 };
        if self.kinds.len() < KINDS_MAX {
            self.kinds.insert(kind, fresh);
            return LogDecision::Log;
        }
        match &mut self.others {
            Some(tally) => {
                tally.counted = tally.counted.saturating_add(1);
                LogDecision::Count
            }
            none => {
                *none = Some(fresh);
                LogDecision::Log
            }
        }
    }

    /// When there will be counts to log or kinds to forget, if there are any.
    #[must_use]
    pub fn due(&self) -> Option<Instant> {
        let tallies = self.kinds.values().chain(&self.others);
        tallies.map(|tally| tally.logged_at + PERIOD).min()
    }

    /// The counts of periods that are over, by kind; none for the kinds that were not told apart. A
    /// kind that was not counted is forgotten, and the next event of it gets a line.
    pub fn take_counts(&mut self, now: Instant) -> Vec<(Option<K>, u64)>
    where
        K: Clone,
    {
        let is_over = |tally: &SuppressedCount| tally.logged_at + PERIOD <= now;
        let mut counts = Vec::new();
        self.kinds.retain(|kind, tally| {
            if is_over(tally) && tally.counted > 0 {
                counts.push((Some(kind.clone()), tally.counted));
                *tally = SuppressedCount { logged_at: now, counted: 0 };
            } else if is_over(tally) {
                return false;
            }
            true
        });
        if let Some(tally) = self.others.filter(is_over) {
            let again = SuppressedCount { logged_at: now, counted: 0 };
            self.others = (tally.counted > 0).then_some(again);
            counts.extend((tally.counted > 0).then_some((None, tally.counted)));
        }
        counts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_is_logged_at_once_and_others_are_counted() {
        let start = Instant::now();
        let mut limit = LogLimit::default();
        assert_eq!(
            (limit.note("a", start), limit.note("b", start)),
            (LogDecision::Log, LogDecision::Log)
        );
        for _ in 0..3 {
            assert_eq!(limit.note("a", start), LogDecision::Count);
        }
        assert_eq!(limit.due(), Some(start + PERIOD));
        assert_eq!(limit.take_counts(start), []);
        assert_eq!(limit.take_counts(start + PERIOD), [(Some("a"), 3)]);
        assert_eq!(limit.note("b", start + PERIOD), LogDecision::Log, "forgotten");
        assert_eq!(limit.note("a", start + PERIOD), LogDecision::Count, "it goes on");
        assert_eq!(limit.take_counts(start + 2 * PERIOD), [(Some("a"), 1)]);
        assert_eq!(limit.take_counts(start + 3 * PERIOD), []);
        assert_eq!(limit.due(), None);
    }

    #[test]
    fn kinds_beyond_the_limit_are_counted_together() {
        let start = Instant::now();
        let mut limit = LogLimit::default();
        for kind in 0..KINDS_MAX {
            assert_eq!(limit.note(kind, start), LogDecision::Log);
        }
        assert_eq!(limit.note(KINDS_MAX, start), LogDecision::Log);
        for kind in KINDS_MAX..10 * KINDS_MAX {
            assert_eq!(limit.note(kind, start), LogDecision::Count);
        }
        let counts = limit.take_counts(start + PERIOD);
        assert_eq!(counts, [(None, 9 * KINDS_MAX as u64)]);
    }
}
