//! Periodic reports: the status of the process to the service manager (`STATUS=` of sd_notify(3)),
//! and the progress of a migration to the journal. Nothing else is periodic.
//! Never reads a clock, and never wakes the process while nothing changes.

mod text;

use super::migration_log::MigrationLog;
use crate::human;
use crate::migration::job::{Outcome, Progress};
use crate::migration::source::MigrationHandle;
use crate::milestones::Milestones;
use crate::systemd::{ServiceManager, log_unsent};
use crate::upstream::UpstreamHandle;
use std::sync::Arc;
use std::time::{Duration, Instant};
pub(super) use text::IdleStatus;

/// Shortest time between two reports, and the time between them while a migration runs.
const REPORT_INTERVAL: Duration = Duration::from_secs(1);

/// Keeps the service manager's status line and the journal's progress lines up to date.
#[derive(Debug)]
pub(super) struct StatusReporter {
    notifier: ServiceManager,
    schedule: ReportSchedule,
    idle: IdleStatus,
    migration: Option<MigrationStatus>,
    /// How the last migration ended, if the disk has stayed.
    last_migration: Option<String>,
    /// The last status sent.
    sent: String,
}

/// What a report shows besides a migration.
pub(super) struct Reported {
    /// The number of clients.
    pub(super) clients: usize,
    pub(super) upstream: Option<UpstreamHandle>,
    /// Whether requests are passed on to the upstream after the disk has left.
    pub(super) relays: bool,
    /// Time of the first failed flush in seconds since 1970.
    pub(super) flush_failed_at: Option<u64>,
}

/// A running migration.
#[derive(Debug)]
struct MigrationStatus {
    log: MigrationLog,
    handle: Arc<MigrationHandle>,
    started: Instant,
    milestones: Milestones,
}

impl StatusReporter {
    /// The first report is due at once.
    pub(super) fn new(notifier: ServiceManager, idle: IdleStatus) -> Self {
        let schedule = ReportSchedule { last: None, has_changed: true };
        let sent = String::new();
        Self { notifier, schedule, idle, migration: None, last_migration: None, sent }
    }

    /// Something that the status contains has changed.
    pub(super) fn mark_changed(&mut self) {
        self.schedule.has_changed = true;
    }

    pub(super) fn migration_started(
        &mut self,
        log: MigrationLog,
        handle: Arc<MigrationHandle>,
        now: Instant,
    ) {
        let milestones = Milestones::default();
        self.migration = Some(MigrationStatus { log, handle, started: now, milestones });
        self.mark_changed();
    }

    pub(super) fn migration_ended(&mut self, outcome: &Outcome) {
        let Some(MigrationStatus { log: MigrationLog { to, .. }, .. }) = self.migration.take()
        else {
            return;
        };
        self.last_migration = match outcome {
            Outcome::Arrived { .. } => {
                log_unsent(self.notifier.status(&format!("the disk has moved to {to}")));
                None
            }
            Outcome::Broken => Some(format!("the migration to {to} was broken off")),
            Outcome::Failed(why) => Some(format!("the migration to {to} failed: {why}")),
        };
        self.mark_changed();
    }

    /// When the next report is due; `None` while nothing changes.
    pub(super) fn deadline(&self, now: Instant) -> Option<Instant> {
        self.schedule.deadline(self.migration.is_some(), now)
    }

    /// Sends the status and logs the progress, as far as they are due and have changed.
    pub(super) fn report_if_due(&mut self, now: Instant, reported: &Reported) {
        if self.deadline(now).is_none_or(|deadline| now < deadline) {
            return;
        }
        self.schedule.reported(now);
        let Reported { clients, relays, flush_failed_at, .. } = *reported;
        let upstream = reported.upstream.as_ref().map(UpstreamHandle::state);
        let idle = || match &upstream {
            Some(upstream) if relays => text::relay(clients, upstream),
            upstream => self.idle.describe(clients, upstream.as_ref()),
        };
        let status = match (&mut self.migration, &self.last_migration) {
            (Some(migration), _) => migration.report(now),
            (None, None) => idle(),
            (None, Some(last)) => format!("{}; {last}", idle()),
        };
        let status = status + &flush_failed_at.map(text::flush_failed).unwrap_or_default();
        if status != self.sent {
            log_unsent(self.notifier.status(&status));
            self.sent = status;
        }
    }
}

impl MigrationStatus {
    /// The status. Also logs the progress, if a line is due.
    fn report(&mut self, now: Instant) -> String {
        let Self { log, handle, started, milestones } = self;
        let elapsed = now.saturating_duration_since(*started);
        let progress = handle.progress();
        let text = text::progress(log.size, progress.as_ref());
        if let Some(progress) = progress.filter(Progress::is_copying)
            && milestones.pass(elapsed, human::percent_done(log.size, progress.bytes_left))
        {
            log.log_progress(&progress, &text);
        }
        format!("moving {} to {}: {text}", log.image, log.to)
    }
}

/// When reports are due.
#[derive(Clone, Copy, Debug, Default)]
struct ReportSchedule {
    last: Option<Instant>,
    /// Something has changed since the last report.
    has_changed: bool,
}

impl ReportSchedule {
    fn deadline(&self, is_migrating: bool, now: Instant) -> Option<Instant> {
        let next = self.last.map_or(now, |last| last + REPORT_INTERVAL);
        (self.has_changed || is_migrating).then_some(next)
    }

    fn reported(&mut self, now: Instant) {
        (self.last, self.has_changed) = (Some(now), false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_are_reported_at_most_once_a_second() {
        let start = Instant::now();
        let mut schedule = ReportSchedule::default();
        assert_eq!(schedule.deadline(false, start), None);
        schedule.has_changed = true;
        assert_eq!(schedule.deadline(false, start), Some(start));
        schedule.reported(start);
        assert_eq!(schedule.deadline(false, start), None, "nothing to wake up for");
        schedule.has_changed = true;
        assert_eq!(schedule.deadline(false, start), Some(start + REPORT_INTERVAL));
    }

    #[test]
    fn a_migration_is_reported_every_second() {
        let start = Instant::now();
        let mut schedule = ReportSchedule::default();
        assert_eq!(schedule.deadline(true, start), Some(start));
        schedule.reported(start);
        assert_eq!(schedule.deadline(true, start), Some(start + REPORT_INTERVAL));
    }
}
