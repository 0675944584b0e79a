//! The destination owns the disk: this host ends its sessions and cleans up; or it cleans up and then relays,
//! while its clients wait at the gate.
//!
//! With relay the gate opens only after the record says *departed* (or the image is deleted), and only on
//! the destination's disk. If that fails, the sessions end as without relay.

use super::context::Context;
use super::phase::{Leaving, Next, Phase};
use crate::migration::job::{Action, Event, News, Obstacle, Outcome, RecordKind};
use std::time::Duration;

/// How long clients wait until the destination serves the disk, before they are disconnected after all.
pub const RELAY_WAIT_MAX: Duration = Duration::from_secs(30);

/// Time from one attempt to connect to the destination to the next.
pub const RELAY_RETRY_EVERY: Duration = Duration::from_millis(50);

/// The destination owns the disk.
pub(super) fn leave(cx: &mut Context, outcome: Outcome) -> Next {
    cx.obstacle = None;
    if cx.job.relay.is_some() {
        return clean_up(cx, outcome);
    }
    Next::Do(Phase::Leaving(Leaving::Retiring, outcome), Action::Retire)
}

fn clean_up(cx: &mut Context, outcome: Outcome) -> Next {
    if cx.unlinked {
        cx.departed = true;
        return disconnect(outcome);
    }
    let (step, action) = if cx.job.unlink {
        (Leaving::Unlinking, Action::Unlink)
    } else {
        (Leaving::Recording, Action::Record(RecordKind::Departed))
    };
    Next::Do(Phase::Leaving(step, outcome), action)
}

fn disconnect(outcome: Outcome) -> Next {
    let hang_up = match outcome {
        Outcome::Arrived { acknowledged: true } => Action::Disconnect,
        _ => Action::HangUp,
    };
    Next::Do(Phase::Leaving(Leaving::Disconnecting, outcome), hang_up)
}

pub(super) fn leaving(
    cx: &mut Context,
    now: Duration,
    step: Leaving,
    outcome: Outcome,
    event: Event,
) -> Next {
    if let Leaving::Relaying { until } = step {
        return relaying(cx, now, until, outcome, event);
    }
    let failure = if let Event::Failed(why) = event { Some(why) } else { None };
    let failed = cx.report_failure(failure);
    match step {
        Leaving::Retiring => clean_up(cx, outcome),
        Leaving::Unlinking if failed => {
            let recording = Phase::Leaving(Leaving::Recording, outcome);
            Next::Do(recording, Action::Record(RecordKind::Departed))
        }
        Leaving::Unlinking | Leaving::Recording => {
            cx.departed = !failed;
            disconnect(outcome)
        }
        Leaving::Disconnecting if cx.job.relay.is_none() => end(outcome),
        Leaving::Disconnecting if cx.departed => relay(cx, now + RELAY_WAIT_MAX, outcome),
        Leaving::Disconnecting => {
            let why = "the record does not say that the disk has left".to_owned();
            cut_off(cx, outcome, why)
        }
        Leaving::Relaying { .. } | Leaving::CuttingOff => end(outcome),
    }
}

fn relay(cx: &Context, until: Duration, outcome: Outcome) -> Next {
    // A destination that acknowledged can tell that it has the disk.
    let acknowledged = outcome == Outcome::Arrived { acknowledged: true };
    let proof = acknowledged.then(|| cx.job.question());
    Next::Do(Phase::Leaving(Leaving::Relaying { until }, outcome), Action::Relay { proof })
}

/// The destination was asked for its disk, or the next attempt is due.
fn relaying(
    cx: &mut Context,
    now: Duration,
    until: Duration,
    outcome: Outcome,
    event: Event,
) -> Next {
    match event {
        Event::Done => {
            cx.obstacle = None;
            end(outcome)
        }
        Event::Failed(why) => cut_off(cx, outcome, why),
        Event::Unreachable(trouble) if now < until => {
            cx.obstacle = Some(Obstacle::Relay(trouble));
            let next = (now + RELAY_RETRY_EVERY).min(until);
            let relaying = Phase::Leaving(Leaving::Relaying { until }, outcome);
            Next::Do(relaying, Action::Wait { until: next })
        }
        Event::Unreachable(trouble) => cut_off(cx, outcome, trouble.to_string()),
        _ => relay(cx, until, outcome),
    }
}

/// Ends the sessions, since they cannot be passed on.
fn cut_off(cx: &mut Context, outcome: Outcome, why: String) -> Next {
    cx.obstacle = None;
    cx.news.push_back(News::RelayFailed(why));
    Next::Do(Phase::Leaving(Leaving::CuttingOff, outcome), Action::Retire)
}

fn end(outcome: Outcome) -> Next {
    Next::Do(Phase::Ended(outcome.clone()), Action::End(outcome))
}
