//! Which points of a copy's progress get a line of text: one for each step of the percentage, and one
//! after a time without a line. Pure: the caller passes the time since the copy began.

use std::time::Duration;

/// The step in percent of the disk.
const STEP_PERCENT: u64 = 10;
/// The longest time without a line.
const INTERVAL: Duration = Duration::from_secs(30);

/// The milestone that the last line was about.
#[derive(Clone, Copy, Debug, Default)]
pub struct Milestones {
    /// Rounded down to a whole step.
    percent: u64,
    at: Duration,
}

impl Milestones {
    /// Whether a line is due now, at this percentage; [`Milestones::record`]s the line if so.
    #[must_use]
    pub fn pass(&mut self, at: Duration, percent: u64) -> bool {
        let is_due = step(percent) > self.percent || at >= self.at + INTERVAL;
        if is_due {
            self.record(at, percent);
        }
        is_due
    }

    /// Records a line that is printed now, also one for another reason.
    pub fn record(&mut self, at: Duration, percent: u64) {
        // Clients that write reduce the percentage. Steps passed again get no second line.
        self.percent = self.percent.max(step(percent));
        self.at = at;
    }
}

fn step(percent: u64) -> u64 {
    percent / STEP_PERCENT * STEP_PERCENT
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn each_step_gets_one_line() {
        let mut milestones = Milestones::default();
        let mut pass = |percent| milestones.pass(seconds(1), percent);
        let due: Vec<u64> = (0..=35).filter(|percent| pass(*percent)).collect();
        assert_eq!(due, [10, 20, 30]);
        assert!(pass(70), "several steps share one line");
        assert!(!pass(60) && !pass(70), "clients have written again");
        assert!(pass(80));
    }

    #[test]
    fn a_line_is_due_after_half_a_minute() {
        let mut milestones = Milestones::default();
        let mut pass = |at| milestones.pass(at, 5);
        assert!(!pass(INTERVAL - Duration::from_millis(1)));
        assert!(pass(INTERVAL));
        assert!(!pass(INTERVAL + seconds(29)));
        assert!(pass(INTERVAL + INTERVAL));
    }

    #[test]
    fn a_line_for_another_reason_counts() {
        let mut milestones = Milestones::default();
        milestones.record(seconds(20), 12);
        assert!(!milestones.pass(seconds(40), 19));
        assert!(milestones.pass(seconds(50), 19));
    }
}
