//! Rollback: the one place that undoes the effects of an attempt, after a failure, a break, or a
//! closed gate that reached its time limit.
//!
//! The order is fixed: link, gate, record, throttle. The gate comes before the record, which may
//! take long to write: no handover was sent, or the destination has answered that it did not
//! arrive, so the disk is ours even while the record says *departing*.

use super::context::{Context, RECORD_TRIES, RETRY_EVERY, UnrestoredRecord};
use super::phase::{AfterUndo, Next, Phase, WriteAccess};
use crate::migration::job::{Action, Event, News, RecordKind};
use crate::migration::pace::Convergence;
use std::time::Duration;

/// Begins to undo. Unless the copy continues on its connection, discards the measurements.
pub(super) fn begin(cx: &mut Context, now: Duration, then: AfterUndo) -> Next {
    if !matches!(then, AfterUndo::Resume(_)) {
        cx.meter.link_lost();
        cx.convergence = Convergence::new(cx.job.pause);
        cx.unrestored = cx.unrestored.map(|_| UnrestoredRecord { at: now, tries: 0 });
    }
    next(cx, now, then)
}

pub(super) fn undoing(cx: &mut Context, now: Duration, then: AfterUndo, event: Event) -> Next {
    note_restored(cx, now, event);
    next(cx, now, then)
}

/// Undoes the next effect.
fn next(cx: &mut Context, now: Duration, then: AfterUndo) -> Next {
    let resumes = matches!(then, AfterUndo::Resume(_));
    let gives_up = matches!(then, AfterUndo::End(_)) && has_tried_enough(cx);
    let action = if !resumes && std::mem::take(&mut cx.undo.link) {
        Action::HangUp
    } else if !cx.unlinked && std::mem::take(&mut cx.undo.gate) {
        cx.back_off(now);
        Action::OpenGate
    } else if std::mem::take(&mut cx.undo.record) || cx.must_restore(now) && !gives_up {
        cx.undo.restoring = true;
        Action::Record(RecordKind::Before)
    } else if !resumes && std::mem::take(&mut cx.undo.throttle) {
        cx.write_delay = Duration::ZERO;
        Action::Throttle(cx.write_delay)
    } else {
        return undone(cx, now, then);
    };
    Next::Do(Phase::Undoing(then), action)
}

/// Takes `event` as the result of restoring the record, if that was the last action.
pub(super) fn note_restored(cx: &mut Context, now: Duration, event: Event) {
    if !std::mem::take(&mut cx.undo.restoring) {
        return;
    }
    let before = cx.unrestored.take();
    if let Event::Failed(why) = event {
        if before.is_none() {
            cx.news.push_back(News::RecordFailed(why));
        }
        let tries = before.map_or(0, |record| record.tries) + 1;
        cx.unrestored = Some(UnrestoredRecord { at: now + RETRY_EVERY, tries });
    }
}

fn has_tried_enough(cx: &Context) -> bool {
    cx.unrestored.is_some_and(|record| record.tries >= RECORD_TRIES)
}

fn undone(cx: &mut Context, now: Duration, then: AfterUndo) -> Next {
    match (then, cx.unrestored) {
        (AfterUndo::End(outcome), Some(record)) if !has_tried_enough(cx) => {
            let wait = Action::Wait { until: record.at };
            Next::Do(Phase::Undoing(AfterUndo::End(outcome)), wait)
        }
        (AfterUndo::End(outcome), _) => {
            Next::Do(Phase::Ended(outcome.clone()), Action::End(outcome))
        }
        (AfterUndo::Resume(link), _) => {
            cx.plan.recheck_bitmap();
            Next::Copy(link, WriteAccess::Open)
        }
        (AfterUndo::Retry, _) => {
            let until = now + RETRY_EVERY;
            Next::Do(Phase::BackingOff { until }, Action::Wait { until })
        }
    }
}
