//! Stop-and-copy: closes the gate, copies the rest, and seals the gate. Each step has a time limit,
//! after which the gate opens and the copy continues; other failures end the attempt.

use super::context::Context;
use super::copying;
use super::phase::{
    AfterUndo, Flush, Handled, LinkState, Next, Phase, WriteAccess, impossible, link_trouble,
};
use crate::migration::freeze::{Freeze, FreezeDecision};
use crate::migration::job::{
    Action, DestinationRequest, Event, News, Obstacle, Outcome, RecordKind, RequestKind, Trouble,
};
use std::time::Duration;

/// In-flight requests of clients this old are reported as the obstacle.
const REQUEST_REPORTED: Duration = Duration::from_secs(1);

const NOT_SENT: &str = "what is left could not be sent while clients waited";
const NOT_FLUSHED: &str = "the destination did not flush while clients waited";
const NOT_RECORDED: &str = "the record could not be made durable while clients waited";

/// The gate is open, and the in-flight requests of clients were probed.
pub(super) fn probing(cx: &mut Context, now: Duration, link: LinkState, event: Event) -> Handled {
    let Event::Visits { turned } = event else { return Err(impossible(&event)) };
    Ok(match cx.probe.on_probe(now, turned) {
        FreezeDecision::Close(within) => {
            cx.undo.gate = true;
            cx.freeze = Some(Freeze::new(now));
            Next::Do(Phase::ClosingGate(link), Action::CloseGate { within })
        }
        FreezeDecision::Wait(age) => {
            if age >= REQUEST_REPORTED {
                let why = "requests that clients have in flight take longer than a second";
                cx.report_obstacle(now, Obstacle::Requests(why.to_owned()));
            }
            Next::Copy(link, WriteAccess::Open)
        }
    })
}

pub(super) fn closing(cx: &mut Context, now: Duration, link: LinkState, event: Event) -> Handled {
    match event {
        Event::Done => {
            cx.news.push_back(News::GateClosed);
            cx.obstacle = None;
            cx.plan.gate_closed();
            if let Some(freeze) = &mut cx.freeze {
                freeze.drained(now);
            }
            Ok(Next::Copy(link, WriteAccess::Closed))
        }
        Event::Failed(why) => {
            cx.undo.gate = false;
            cx.back_off(now);
            cx.report_obstacle(now, Obstacle::Requests(why));
            Ok(Next::Copy(link, WriteAccess::Open))
        }
        event => Err(impossible(&event)),
    }
}

/// Copies the rest while clients wait, within the time limit.
pub(super) fn copy_rest(cx: &mut Context, now: Duration, link: LinkState) -> Handled {
    if cx.is_overdue(now) {
        Ok(thaw(cx, now, link, NOT_SENT))
    } else if cx.plan.is_done() {
        Ok(copied(cx, now, link))
    } else {
        copying::proceed(cx, now, link, WriteAccess::Closed)
    }
}

/// The last dirty block is acknowledged. A flexnbd makes the disk durable as part of the handover;
/// any other destination gets a FLUSH.
fn copied(cx: &mut Context, now: Duration, mut link: LinkState) -> Next {
    if let Some(freeze) = &mut cx.freeze {
        freeze.last_step();
    }
    if !link.peer.flush || link.peer.token().is_some() {
        return flushed(cx, now, link);
    }
    let cookie = cx.next_cookie();
    link.last_progress = now;
    link.flush = Flush::Asked { cookie, at: now };
    let flush = DestinationRequest { cookie, kind: RequestKind::Flush };
    Next::Do(Phase::Flushing(link), Action::Send(flush))
}

pub(super) fn flushing(
    cx: &mut Context,
    now: Duration,
    mut link: LinkState,
    event: Event,
) -> Handled {
    let Flush::Asked { cookie, at } = link.flush else { return Err(impossible(&event)) };
    let stuck = link.last_progress + cx.job.timeout;
    match event {
        Event::Reply { cookie: answered, error: None } if answered == cookie => {
            link.flush = Flush::Done { at: now, took: now.saturating_sub(at) };
            Ok(flushed(cx, now, link))
        }
        Event::Done | Event::Tick if cx.is_overdue(now) => Ok(thaw(cx, now, link, NOT_FLUSHED)),
        Event::Done | Event::Tick if now < stuck => {
            let until = cx.within_freeze(stuck);
            Ok(Next::Do(Phase::Flushing(link), Action::Wait { until }))
        }
        Event::Done | Event::Tick => Err(Trouble::NoProgress(cx.job.timeout)),
        event => Err(link_trouble(event)),
    }
}

/// The destination has every byte. The record *departing* must be durable before a message tells
/// the destination so.
fn flushed(cx: &mut Context, now: Duration, link: LinkState) -> Next {
    if cx.unlinked {
        return check_link(now, link);
    }
    (cx.undo.record, cx.unrestored) = (true, None);
    Next::Do(Phase::Recording(link), Action::Record(RecordKind::Departing))
}

pub(super) fn recording(cx: &mut Context, now: Duration, link: LinkState, event: Event) -> Handled {
    match event {
        Event::Done if cx.is_overdue(now) => Ok(thaw(cx, now, link, NOT_RECORDED)),
        Event::Done => Ok(Next::Do(Phase::SealingGate(link), Action::Seal)),
        // The fault is on this host: another attempt would fail as well.
        Event::Failed(why) => {
            let failed = Outcome::Failed(Trouble::Record(why));
            Ok(Next::Undo(AfterUndo::End(failed)))
        }
        Event::Unreadable(why) => Err(Trouble::Unreadable(why)),
        event => Err(impossible(&event)),
    }
}

/// The gate no longer opens by itself, or it has opened.
pub(super) fn sealing(cx: &mut Context, now: Duration, link: LinkState, event: Event) -> Handled {
    match event {
        Event::Done => {
            if let Some(freeze) = &mut cx.freeze {
                freeze.seal();
            }
            Ok(check_link(now, link))
        }
        Event::Failed(_) => Ok(thaw(cx, now, link, NOT_RECORDED)),
        event => Err(impossible(&event)),
    }
}

/// Checks that the destination has not closed the connection. A handover to one that cannot
/// acknowledge would lose the disk silently; to any other, it would leave us in doubt.
fn check_link(now: Duration, link: LinkState) -> Next {
    Next::Do(Phase::CheckingLink(link), Action::Wait { until: now })
}

/// Opens the gate and continues to copy on the same connection.
fn thaw(cx: &mut Context, now: Duration, link: LinkState, why: &'static str) -> Next {
    cx.report_obstacle(now, Obstacle::LastCopy(why));
    Next::Undo(AfterUndo::Resume(link))
}
