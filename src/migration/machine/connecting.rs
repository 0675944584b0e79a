//! Connecting: whether the destination is compatible, and whether it still has the copy.

use super::context::Context;
use super::phase::{AfterUndo, Flush, Handled, LinkState, Next, Phase, WriteAccess, impossible};
use crate::migration::job::{Action, DestinationInfo, Event, News};
use crate::migration::wire::Has;
use std::time::Duration;

pub(super) fn connect(cx: &mut Context) -> Next {
    cx.undo.link = true;
    Next::Do(Phase::Connecting, Action::Connect(cx.job.question()))
}

pub(super) fn connecting(cx: &mut Context, now: Duration, event: Event) -> Handled {
    match event {
        Event::Greeted(peer) => match peer.incompatibility(&cx.job) {
            None => Ok(greeted(cx, now, peer)),
            Some(trouble) => Err(trouble),
        },
        Event::Unreachable(trouble) => Err(trouble),
        event => Err(impossible(&event)),
    }
}

/// Resumes the copy if this is the process that has it, else starts a new copy.
fn greeted(cx: &mut Context, now: Duration, peer: DestinationInfo) -> Next {
    let process = peer.token().map(|token| (token, peer.caps));
    let has_copy = peer.answer.is_some_and(|answer| answer.has == Has::Incomplete);
    let resumes = has_copy && process.is_some() && process == cx.copied_to;
    if resumes {
        cx.plan.resume();
    } else if cx.copied_to.take().is_some() {
        // Another process may have another image. Each copy has an id of its own, so that an answer
        // about one copy is never taken for an answer about another.
        cx.job.id = cx.job.id.next();
        return Next::Undo(AfterUndo::Retry);
    } else {
        cx.plan.restart(peer.caps);
    }
    cx.copied_to = process;
    match (cx.started, resumes) {
        (false, _) => cx.news.push_back(News::Started),
        (true, _) if !cx.interrupted => {}
        (true, true) => cx.news.push_back(News::Resumed),
        (true, false) => cx.news.push_back(News::Restarted),
    }
    (cx.started, cx.interrupted, cx.obstacle) = (true, false, None);
    cx.convergence.began(now);
    let access = if cx.unlinked { WriteAccess::Closed } else { WriteAccess::Open };
    let link = LinkState { peer, last_progress: now, flush: Flush::Never, slow_flushes: 0 };
    Next::Copy(link, access)
}
