//! The state that the machine has in every phase: job, plan, pace, and the effects that a failure
//! must undo. Never enters a phase.

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

/// Attempts to restore the record, one a second, before a migration ends without. A migration that
/// continues never gives up.
pub const RECORD_TRIES: u32 = 4;

/// An unchanged obstacle is reported again after this time.
const REPORT_AGAIN: Duration = Duration::from_secs(60);

#[derive(Clone, Debug)]
pub(super) struct Context {
    pub(super) job: Job,
    pub(super) plan: CopyPlan,
    pub(super) speed: Speed,
    pub(super) meter: Meter,
    /// Replies to requests up to this cookie do not count for the rate: those requests are from the
    /// first pass and large, all later ones are small.
    pub(super) measured_after: u64,
    pub(super) convergence: Convergence,
    pub(super) undo: Undo,
    pub(super) unrestored: Option<UnrestoredRecord>,
    pub(super) probe: Probe,
    pub(super) backoff: Backoff,
    /// Set while the gate is closed or closing.
    pub(super) freeze: Option<Freeze>,
    /// The process that acknowledged the copied ranges, and its capabilities.
    pub(super) copied_to: Option<(Token, Caps)>,
    /// The write delay in force.
    pub(super) write_delay: Duration,
    pub(super) started: bool,
    /// The image is deleted: the gate stays closed, and the machine retries until the copy arrives.
    pub(super) unlinked: bool,
    /// Nothing on this host says any more that the disk is ours, durably.
    pub(super) departed: bool,
    /// Why the copy does not progress at present.
    pub(super) obstacle: Option<Obstacle>,
    /// The obstacle reported last, and when.
    reported: Option<(Obstacle, Duration)>,
    /// A failure of the copy was reported, and its continuation not yet.
    pub(super) interrupted: bool,
    pub(super) cookie: u64,
    pub(super) news: VecDeque<News>,
}

/// The effects that a failure must undo. Set before the action is executed, because a failed action
/// may have had a part of its effect.
#[derive(Clone, Debug, Default)]
pub(super) struct Undo {
    pub(super) link: bool,
    pub(super) record: bool,
    pub(super) gate: bool,
    pub(super) throttle: bool,
    /// The record is being restored: the next event is its result.
    pub(super) restoring: bool,
}

/// The disk stays, but restoring its record has failed: it still says *departing*.
#[derive(Clone, Copy, Debug)]
pub(super) struct UnrestoredRecord {
    /// Time of the next attempt.
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
            departed: false,
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

    /// Reports why the copy does not progress, unless the last report was the same. Returns whether
    /// it was reported.
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

    /// Handles all failures before the handover: ends the migration or tries again.
    pub(super) fn on_trouble(&mut self, now: Duration, trouble: Trouble) -> Next {
        let cannot_be_read = matches!(trouble, Trouble::Unreadable(_)) && !self.unlinked;
        if !self.started || cannot_be_read {
            return Next::Undo(AfterUndo::End(Outcome::Failed(trouble)));
        }
        self.interrupted |= self.report_obstacle(now, Obstacle::Trouble(trouble));
        Next::Undo(AfterUndo::Retry)
    }

    /// The destination acknowledged a request: clients may wait longer.
    pub(super) fn extend_freeze(&mut self, now: Duration) {
        if let Some(freeze) = &mut self.freeze {
            freeze.progressed(now);
        }
    }

    /// Whether the time limit of the closed gate has passed.
    pub(super) fn is_overdue(&self, now: Duration) -> bool {
        self.freeze.is_some_and(|freeze| freeze.is_over(now))
    }

    /// `until`, or the end of the freeze if that comes first.
    pub(super) fn within_freeze(&self, until: Duration) -> Duration {
        self.freeze.and_then(|freeze| freeze.until()).map_or(until, |end| until.min(end))
    }

    /// Closing the gate has failed: delays the next attempt.
    pub(super) fn back_off(&mut self, now: Duration) {
        if let Some(freeze) = self.freeze.take() {
            self.backoff.failed(now, freeze.elapsed(now));
        }
    }

    /// Whether an attempt to restore the record is due.
    pub(super) fn must_restore(&self, now: Duration) -> bool {
        self.unrestored.is_some_and(|record| now >= record.at)
    }

    /// Reports the failure, if any, of an action that the migration can end without. Returns
    /// whether it failed.
    pub(super) fn report_failure(&mut self, failure: Option<String>) -> bool {
        let failed = failure.is_some();
        self.news.extend(failure.map(News::RecordFailed));
        failed
    }
}
