//! Progress timeout of a request or reply (`--killswitch`).
//! Pure: time is an argument.

use std::time::{Duration, Instant};

/// Observes one byte count that must grow while a transfer is pending.
#[derive(Debug, Default)]
pub(super) struct Stall {
    /// The last count, and when it changed; `None` while nothing is pending.
    last: Option<(u64, Instant)>,
}

impl Stall {
    /// When the transfer times out unless `count` changes before; `None` if none is `pending`.
    pub(super) fn deadline(
        &mut self,
        pending: bool,
        count: u64,
        now: Instant,
        limit: Duration,
    ) -> Option<Instant> {
        self.last = match self.last {
            _ if !pending => None,
            Some((before, since)) if before == count => Some((before, since)),
            _ => Some((count, now)),
        };
        self.last.map(|(_, since)| since + limit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(120);

    #[test]
    fn progress_restarts_the_timeout() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut stall = Stall::default();
        assert_eq!(stall.deadline(true, 5, at(0), LIMIT), Some(at(120)));
        assert_eq!(stall.deadline(true, 5, at(100), LIMIT), Some(at(120)));
        assert_eq!(stall.deadline(true, 6, at(110), LIMIT), Some(at(230)));
    }

    #[test]
    fn idle_time_does_not_count() {
        let start = Instant::now();
        let later = start + Duration::from_secs(1000);
        let mut stall = Stall::default();
        assert!(stall.deadline(true, 5, start, LIMIT).is_some());
        assert_eq!(stall.deadline(false, 5, start, LIMIT), None);
        assert_eq!(stall.deadline(true, 5, later, LIMIT), Some(later + LIMIT));
    }
}
