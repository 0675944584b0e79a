//! What is told of the process from time to time: its status to the service manager, and how far a
//! migration is to the journal. The one place that does something periodically.
//! Never looks at a clock, and never has the process woken up while nothing changes.

use super::migration_log::MigrationLog;
use super::tell;
use super::wording::{self, IdleStatus};
use crate::migration::job::{Outcome, Progress};
use crate::migration::source::MigrationHandle;
use crate::systemd::ServiceManager;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The status is told no more often than this, and as often while a migration runs.
const STATUS_EVERY: Duration = Duration::from_secs(1);
/// The journal hears of a migration after so many percent of the disk,
const LINE_PERCENT: u64 = 10;
/// or after so long, whichever comes first.
const LINE_EVERY: Duration = Duration::from_secs(30);

/// The status as it was told, and what it is made of.
#[derive(Debug)]
pub(super) struct StatusReporter {
    notifier: ServiceManager,
    rhythm: ReportSchedule,
    standing: IdleStatus,
    moving: Option<MigrationStatus>,
    /// How the last migration went, if the disk has stayed.
    afterword: Option<String>,
    told: String,
}

/// A migration under way.
#[derive(Debug)]
struct MigrationStatus {
    passage: MigrationLog,
    desk: Arc<MigrationHandle>,
    milestones: Milestones,
}

impl StatusReporter {
    pub(super) fn new(notifier: ServiceManager, standing: IdleStatus) -> Self {
        let rhythm = ReportSchedule::default();
        let told = String::new();
        Self { notifier, rhythm, standing, moving: None, afterword: None, told }
    }

    /// Something has changed that the status tells.
    pub(super) fn stir(&mut self) {
        self.rhythm.is_wanted = true;
    }

    /// A migration has begun.
    pub(super) fn begin(
        &mut self,
        passage: MigrationLog,
        desk: Arc<MigrationHandle>,
        now: Instant,
    ) {
        let milestones = Milestones { percent: 0, last: now };
        self.moving = Some(MigrationStatus { passage, desk, milestones });
        self.stir();
    }

    /// The migration is over.
    pub(super) fn over(&mut self, outcome: &Outcome) {
        let Some(MigrationStatus { passage, .. }) = self.moving.take() else { return };
        self.afterword = match outcome {
            Outcome::Arrived { .. } => {
                tell(self.notifier.status(&format!("the disk has moved to {}", passage.to)));
                None
            }
            Outcome::Broken => Some(format!("the migration to {} was broken off", passage.to)),
            Outcome::Failed(why) => Some(format!("the migration to {} failed: {why}", passage.to)),
        };
        self.stir();
    }

    /// When there is something to tell again.
    pub(super) fn due(&self, now: Instant) -> Option<Instant> {
        self.rhythm.due(self.moving.is_some(), now)
    }

    /// Tells how things are, if that is due.
    pub(super) fn tell(&mut self, now: Instant, clients: usize) {
        if self.due(now).is_none_or(|due| now < due) {
            return;
        }
        self.rhythm.beat(now);
        let status = match &mut self.moving {
            Some(moving) => moving.told(now),
            None => {
                let afterword = self.afterword.as_ref().map(|word| format!("; {word}"));
                self.standing.told(clients) + &afterword.unwrap_or_default()
            }
        };
        if status != self.told {
            tell(self.notifier.status(&status));
            self.told = status;
        }
    }
}

impl MigrationStatus {
    /// The status, and a line in the journal if one is due.
    fn told(&mut self, now: Instant) -> String {
        let Self { passage, desk, milestones } = self;
        let progress = desk.progress();
        let told = wording::progress(passage.size, progress.as_ref());
        if let Some(progress) = progress.filter(Progress::is_copying)
            && milestones.passes(now, wording::percent(passage.size, progress.bytes_left))
        {
            passage.log_progress(&progress, &told);
        }
        format!("moving {} to {}: {told}", passage.image, passage.to)
    }
}

/// When the status is told.
#[derive(Clone, Copy, Debug, Default)]
struct ReportSchedule {
    last: Option<Instant>,
    /// Something has changed since.
    is_wanted: bool,
}

impl ReportSchedule {
    fn due(&self, is_moving: bool, now: Instant) -> Option<Instant> {
        let next = self.last.map_or(now, |last| last + STATUS_EVERY);
        (self.is_wanted || is_moving).then_some(next)
    }

    fn beat(&mut self, now: Instant) {
        (self.last, self.is_wanted) = (Some(now), false);
    }
}

/// Which points on a migration's way are worth a line.
#[derive(Clone, Copy, Debug)]
struct Milestones {
    /// That of the last line, rounded down to a whole step.
    percent: u64,
    last: Instant,
}

impl Milestones {
    fn passes(&mut self, now: Instant, percent: u64) -> bool {
        let percent = percent / LINE_PERCENT * LINE_PERCENT;
        if percent <= self.percent && now < self.last + LINE_EVERY {
            return false;
        }
        // What clients write again takes percents back, which are not worth a second line.
        (self.percent, self.last) = (self.percent.max(percent), now);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_status_is_told_when_it_changes_and_not_more_than_once_a_second() {
        let start = Instant::now();
        let mut rhythm = ReportSchedule::default();
        assert_eq!(rhythm.due(false, start), None);
        rhythm.is_wanted = true;
        assert_eq!(rhythm.due(false, start), Some(start));
        rhythm.beat(start);
        assert_eq!(rhythm.due(false, start), None, "nothing to wake up for");
        rhythm.is_wanted = true;
        assert_eq!(rhythm.due(false, start), Some(start + STATUS_EVERY));
    }

    #[test]
    fn while_a_migration_runs_the_status_is_told_every_second() {
        let start = Instant::now();
        let mut rhythm = ReportSchedule::default();
        assert_eq!(rhythm.due(true, start), Some(start));
        rhythm.beat(start);
        assert_eq!(rhythm.due(true, start), Some(start + STATUS_EVERY));
    }

    #[test]
    fn each_tenth_of_the_disk_is_worth_a_line_and_every_half_a_minute() {
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        let mut milestones = Milestones { percent: 0, last: start };
        assert!(!milestones.passes(after(1), 9));
        assert!(milestones.passes(after(2), 10));
        assert!(!milestones.passes(after(3), 19));
        assert!(milestones.passes(after(4), 45), "several at once are one line");
        assert!(!milestones.passes(after(5), 38), "clients have written again");
        assert!(!milestones.passes(after(33), 41));
        assert!(milestones.passes(after(34), 41), "half a minute");
        assert!(!milestones.passes(after(35), 49));
        assert!(milestones.passes(after(36), 50));
    }
}
