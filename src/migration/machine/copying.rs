//! Pre-copy: sends requests until the rest can be sent within the pause.

use super::context::Context;
use super::phase::{AfterUndo, Flush, Handled, LinkState, Next, Phase, WriteAccess, link_trouble};
use crate::migration::job::{
    Action, DestinationRequest, Event, News, Obstacle, RequestKind, Trouble,
};
use crate::migration::plan::{CopyRequest, NextCopy};
use crate::range::Range;
use std::time::Duration;

/// The gate may close for this time after an early FLUSH; later, the destination would have too
/// much to flush again.
const FLUSH_FRESH: Duration = Duration::from_secs(2);
/// An early FLUSH that took longer than this is repeated, since the next one has less to flush;
const FLUSH_QUICK: Duration = Duration::from_millis(500);
/// after this many slow ones in a row, the gate may close anyway.
const SLOW_FLUSHES_MAX: u32 = 3;
/// A FLUSH that takes longer than this is reported as an obstacle.
const FLUSH_REPORTED: Duration = Duration::from_secs(5);

/// The gate stays open if requests are in flight and no reply has come for this time.
const SILENT: Duration = Duration::from_millis(500);

/// Bytes of an extended request header on the wire; a compact one is shorter.
const HEADER: u64 = 32;

pub(super) fn copying(
    cx: &mut Context,
    now: Duration,
    mut link: LinkState,
    event: Event,
    access: WriteAccess,
) -> Handled {
    match event {
        Event::Looked { range, content } => cx.plan.looked(range, content),
        Event::Taken { run, left } => taken(cx, now, run, left),
        Event::Reply { cookie, error } => {
            replied(cx, now, &mut link, cookie, error)?;
            link.last_progress = now;
            cx.extend_freeze(now);
        }
        Event::Tick => {
            cx.plan.recheck_bitmap();
            check_progress(cx, now, &link)?;
        }
        Event::Done => {}
        event => return Err(link_trouble(event)),
    }
    Ok(Next::Copy(link, access))
}

fn taken(cx: &mut Context, now: Duration, run: Option<Range>, left: u64) {
    let is_first = cx.plan.passes() == 0;
    let ended = cx.plan.taken(run, left);
    if is_first {
        cx.convergence.first_pass_ended(now, left, cx.job.size);
    }
    if is_first && left > 0 {
        // From now on requests are small and many, not large and few.
        cx.meter.restart(now);
        cx.measured_after = cx.cookie;
    }
    if ended {
        cx.convergence.pass_ended(now, cx.plan.left(), cx.meter.link_rate());
    }
}

/// Fails if the destination has made no progress for the timeout of the job.
fn check_progress(cx: &mut Context, now: Duration, link: &LinkState) -> Result<(), Trouble> {
    let awaiting = cx.plan.has_in_flight() || matches!(link.flush, Flush::Asked { .. });
    if matches!(link.flush, Flush::Asked { at, .. } if now >= at + FLUSH_REPORTED) {
        cx.report_obstacle(now, Obstacle::Flush);
    }
    let stuck = awaiting && now >= link.last_progress + cx.job.timeout;
    if stuck { Err(Trouble::NoProgress(cx.job.timeout)) } else { Ok(()) }
}

fn replied(
    cx: &mut Context,
    now: Duration,
    link: &mut LinkState,
    cookie: u64,
    error: Option<u32>,
) -> Result<(), Trouble> {
    if let Some(error) = error {
        return Err(Trouble::ErrorReply(error));
    }
    if let Flush::Asked { cookie: asked, at } = link.flush
        && asked == cookie
    {
        flush_replied(cx, link, now, now.saturating_sub(at));
        return Ok(());
    }
    let request = cx.plan.acknowledged(cookie).ok_or(Trouble::Cookie(cookie))?;
    let more = cx.plan.has_in_flight();
    if cookie > cx.measured_after {
        cx.meter.acknowledged(now, request.payload, request.range.length(), more);
    } else {
        cx.meter.acknowledged_uncounted(now, more);
    }
    Ok(())
}

fn flush_replied(cx: &mut Context, link: &mut LinkState, now: Duration, took: Duration) {
    link.flush = Flush::Done { at: now, took };
    link.slow_flushes = if took > FLUSH_QUICK { link.slow_flushes + 1 } else { 0 };
    if cx.obstacle == Some(Obstacle::Flush) {
        cx.obstacle = None;
    }
    cx.plan.recheck_bitmap();
}

/// The next action while the gate is open.
pub(super) fn copy(cx: &mut Context, now: Duration, link: LinkState) -> Handled {
    if cx.write_delay != cx.convergence.delay() {
        Ok(throttle(cx, link))
    } else if cx.must_restore(now) {
        Ok(Next::Undo(AfterUndo::Resume(link)))
    } else if has_caught_up(cx, now) {
        caught_up(cx, now, link)
    } else {
        proceed(cx, now, link, WriteAccess::Open)
    }
}

/// The next step of the plan.
pub(super) fn proceed(
    cx: &mut Context,
    now: Duration,
    link: LinkState,
    access: WriteAccess,
) -> Handled {
    let chunk = if access == WriteAccess::Open { cx.speed.chunk() } else { u64::MAX };
    Ok(match cx.plan.next(chunk) {
        NextCopy::Look(range) => stay(link, access, Action::Look(range)),
        NextCopy::Take { from, longest } => stay(link, access, Action::TakeDirty { from, longest }),
        NextCopy::Write(range) => send(cx, now, link, access, range, RequestKind::Write(range)),
        NextCopy::Zero(range) => send(cx, now, link, access, range, RequestKind::Zero(range)),
        NextCopy::Idle => {
            let until = idle_until(cx, now, &link);
            stay(link, access, Action::Wait { until })
        }
    })
}

/// How long to wait if no event comes.
fn idle_until(cx: &Context, now: Duration, link: &LinkState) -> Duration {
    let flushing = matches!(link.flush, Flush::Asked { .. });
    let awaiting = flushing || cx.plan.has_in_flight();
    let since = if awaiting { link.last_progress } else { now };
    let mut until = since + cx.job.timeout;
    let record = cx.unrestored.map_or(now, |record| record.at);
    for due in [cx.backoff.from(), cx.probe.due(), record] {
        if now < due {
            until = until.min(due);
        }
    }
    until = cx.within_freeze(until);
    // During a long FLUSH, or while the gate must stay open, dirty blocks are copied at short
    // intervals so that they do not accumulate.
    let accumulates = flushing || now < cx.backoff.from();
    if accumulates { until.min(now + cx.job.pause) } else { until }
}

fn stay(link: LinkState, access: WriteAccess, action: Action) -> Next {
    match access {
        WriteAccess::Open => Next::Do(Phase::Copying(link), action),
        WriteAccess::Closed => Next::Do(Phase::FinalCopy(link), action),
    }
}

/// Sends a request of the copy as soon as the speed limit allows.
fn send(
    cx: &mut Context,
    now: Duration,
    mut link: LinkState,
    access: WriteAccess,
    range: Range,
    kind: RequestKind,
) -> Next {
    let bytes = HEADER + kind.payload();
    let ready = if access == WriteAccess::Open { cx.speed.ready_at(now, bytes) } else { now };
    if ready > now {
        let until = ready.min(link.last_progress.max(now) + cx.job.timeout);
        return stay(link, access, Action::Wait { until });
    }
    if !cx.plan.has_in_flight() {
        link.last_progress = now;
    }
    let cookie = cx.next_cookie();
    cx.speed.sent(now, bytes);
    cx.meter.sent(now);
    cx.plan.sent(cookie, CopyRequest { range, payload: kind.payload() });
    stay(link, access, Action::Send(DestinationRequest { cookie, kind }))
}

fn throttle(cx: &mut Context, link: LinkState) -> Next {
    cx.write_delay = cx.convergence.delay();
    cx.undo.throttle = true;
    cx.news.push_back(News::Throttled(cx.write_delay));
    Next::Do(Phase::Copying(link), Action::Throttle(cx.write_delay))
}

fn has_caught_up(cx: &mut Context, now: Duration) -> bool {
    let (left, limit) = (cx.plan.left(), cx.speed.limit());
    cx.plan.is_left_known() && cx.convergence.may_close_gate(now, left, cx.meter.link_rate(), limit)
}

/// The rest can be sent within the pause. The gate closes once the destination has flushed the data
/// so far, and the in-flight requests of clients are short.
fn caught_up(cx: &mut Context, now: Duration, mut link: LinkState) -> Handled {
    let may_be_slow = link.slow_flushes >= SLOW_FLUSHES_MAX;
    // Under a low speed limit the rest is known only at long intervals.
    let fresh = FLUSH_FRESH.max(cx.speed.chunk_duration() * 4);
    let is_ready = |at, took| now < at + fresh && (took <= FLUSH_QUICK || may_be_slow);
    match link.flush {
        _ if !link.peer.flush => probe(cx, now, link),
        Flush::Asked { .. } => proceed(cx, now, link, WriteAccess::Open),
        Flush::Done { at, took } if is_ready(at, took) => probe(cx, now, link),
        Flush::Never | Flush::Done { .. } => {
            let cookie = cx.next_cookie();
            link.flush = Flush::Asked { cookie, at: now };
            if !cx.plan.has_in_flight() {
                link.last_progress = now;
            }
            let flush = DestinationRequest { cookie, kind: RequestKind::Flush };
            Ok(Next::Do(Phase::Copying(link), Action::Send(flush)))
        }
    }
}

fn probe(cx: &mut Context, now: Duration, link: LinkState) -> Handled {
    let is_silent = cx.plan.has_in_flight() && now >= link.last_progress + SILENT;
    // Meanwhile the repeated FLUSH shows the destination that this source is alive.
    if is_silent || now < cx.probe.due() || now < cx.backoff.from() {
        return proceed(cx, now, link, WriteAccess::Open);
    }
    Ok(Next::Do(Phase::Probing(link), Action::Probe))
}
