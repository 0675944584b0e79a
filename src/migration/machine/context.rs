//! What the machine knows in every phase: the job, the plan, the pace, and what a failure would
//! have to take back. Never enters a phase.

use super::phase::{AfterUndo, Next};
use crate::migration::freeze::{Backoff, Freeze, Probe};
use crate::migration::job::{Job, News, Obstacle, Outcome, Trouble};
use crate::migration::pace::{Convergence, Meter, Speed};
use crate::migration::plan::{Caps, CopyPlan};
use crate::migration::wire::Token;
use std::collections::VecDeque;
use std::time::Duration;

/// Time between one attempt and the next.
pub const RETRY_EVERY: Duration = Duration::from_secs(1);

/// Attempts to restore the record, one a second, before a migration that is ending gives up; one
/// that continues never gives up.
pub const RECORD_TRIES: u32 = 4;

/// An unchanged obstacle is reported again after this time.
const REPORT_AGAIN: Duration = Duration::from_secs(60);

#[derive(Debug)]
pub(super) struct Context {
    pub(super) job: Job,
    pub(super) plan: CopyPlan,
    pub(super) speed: Speed,
    pub(super) meter: Meter,
    /// Replies to requests up to this cookie do not count for the rate: those requests were large,
    /// as in the first pass, and the remaining ones are small.
    pub(super) measured_after: u64,
    pub(super) convergence: Convergence,
    pub(super) undo: Undo,
    pub(super) unrestored: Option<UnrestoredRecord>,
    pub(super) probe: Probe,
    pub(super) backoff: Backoff,
    /// Set while the gate is closed or closing.
    pub(super) freeze: Option<Freeze>,
    /// The process that holds what the plan counts as acknowledged.
    pub(super) copied_to: Option<(Token, Caps)>,
    /// The write delay in force.
    pub(super) write_delay: Duration,
    pub(super) started: bool,
    /// The image is deleted: the gate must not open again, and the copy has to arrive.
    pub(super) unlinked: bool,
    /// Why the copy does not progress at present.
    pub(super) obstacle: Option<Obstacle>,
    /// The obstacle reported last, and when.
    reported: Option<(Obstacle, Duration)>,
    /// The failure of the copy was reported, its continuation not yet.
    pub(super) interrupted: bool,
    pub(super) cookie: u64,
    pub(super) news: VecDeque<News>,
}

/// What a failure now would have to take back. Set when the action is ordered, not when it has
/// succeeded: a half-done action is taken back, too.
#[derive(Debug, Default)]
pub(super) struct Undo {
    pub(super) link: bool,
    pub(super) record: bool,
    pub(super) gate: bool,
    pub(super) throttle: bool,
    /// The record is being restored: the next event is its result.
    pub(super) restoring: bool,
}

/// A record *departing* that could not be restored, although the disk stays.
#[derive(Clone, Copy, Debug)]
pub(super) struct UnrestoredRecord {
    /// When to try again.
    pub(super) at: Duration,
    pub(super) tries: u32,
}

impl Context {
    pub(super) fn new(job: Job, now: Duration) -> Self {
        Self {
            plan: CopyPlan::new(job.size, job.limits),
            speed: Speed::new(job.speed),
            meter: Meter::new(now),
            measured_after: 0,
            convergence: Convergence::new(job.pause),
            undo: Undo::default(),
            unrestored: None,
            probe: Probe::default(),
            backoff: Backoff::default(),
            freeze: None,
            copied_to: None,
            write_delay: Duration::ZERO,
            started: false,
            unlinked: false,
            obstacle: None,
            reported: None,
            interrupted: false,
            cookie: 0,
            news: VecDeque::new(),
            job,
        }
    }

    pub(super) fn next_cookie(&mut self) -> u64 {
        self.cookie += 1;
        self.cookie
    }

    /// Reports why the copy does not progress, unless that was reported last. Returns whether it
    /// reported.
    pub(super) fn report_obstacle(&mut self, now: Duration, obstacle: Obstacle) -> bool {
        self.obstacle = Some(obstacle.clone());
        let is_old =
            |(last, at): &(Obstacle, Duration)| last.is_like(&obstacle) && now < *at + REPORT_AGAIN;
        if self.reported.as_ref().is_some_and(is_old) {
            return false;
        }
        self.reported = Some((obstacle.clone(), now));
        self.news.push_back(News::Obstructed(obstacle));
        true
    }

    /// Every failure before the handover comes here: whether to try again.
    pub(super) fn on_trouble(&mut self, now: Duration, trouble: Trouble) -> Next {
        let cannot_be_read = matches!(trouble, Trouble::Unreadable(_)) && !self.unlinked;
        if !self.started || cannot_be_read {
            return Next::Undo(AfterUndo::End(Outcome::Failed(trouble)));
        }
        self.interrupted |= self.report_obstacle(now, Obstacle::Trouble(trouble));
        Next::Undo(AfterUndo::Retry)
    }

    /// The destination acknowledged something: clients may wait a little longer.
    pub(super) fn extend_freeze(&mut self, now: Duration) {
        if let Some(freeze) = &mut self.freeze {
            freeze.progressed(now);
        }
    }

    /// Whether clients have waited long enough.
    pub(super) fn is_overdue(&self, now: Duration) -> bool {
        self.freeze.is_some_and(|freeze| freeze.is_over(now))
    }

    /// `until`, or the end of the freeze if that comes first.
    pub(super) fn within_freeze(&self, until: Duration) -> Duration {
        self.freeze.and_then(|freeze| freeze.until()).map_or(until, |end| until.min(end))
    }

    /// The gate was closed in vain: it stays open for a while.
    pub(super) fn back_off(&mut self, now: Duration) {
        if let Some(freeze) = self.freeze.take() {
            self.backoff.failed(now, freeze.elapsed(now));
        }
    }

    /// Whether an attempt to restore the record is due.
    pub(super) fn must_restore(&self, now: Duration) -> bool {
        self.unrestored.is_some_and(|record| now >= record.at)
    }

    /// An action failed that the migration can end without. Returns whether it did.
    pub(super) fn report_failure(&mut self, failure: Option<String>) -> bool {
        let failed = failure.is_some();
        self.news.extend(failure.map(News::RecordFailed));
        failed
    }
}
