//! The handover, behind the sealed gate: sends it, and resolves doubt about its outcome.

use super::context::{Context, RETRY_EVERY};
use super::leaving::leave;
use super::phase::{
    Doubt, Handled, LegacyStep, LinkState, Next, Phase, SentHandover, link_trouble,
};
use crate::migration::freeze::FREEZE_MAX;
use crate::migration::job::{
    Action, DestinationInfo, DestinationRequest, Event, HandoverVerdict, News, Obstacle, Outcome,
    RequestKind, Trouble, handover_verdict,
};
use crate::migration::wire::{Handover, Has, Token};
use std::time::Duration;

/// Without an acknowledgement after this time, the source asks on a second connection.
pub const ASK_AFTER: Duration = Duration::from_secs(2);

const ACKNOWLEDGED: Outcome = Outcome::Arrived { acknowledged: true };

/// The connection was checked for the last time.
pub(super) fn checking_link(
    cx: &mut Context,
    now: Duration,
    link: LinkState,
    event: Event,
) -> Handled {
    match (event, link.peer.token()) {
        (Event::Tick, Some(token)) => Ok(hand_over(cx, now, token)),
        (Event::Tick, None) if cx.job.unlink && !cx.unlinked => {
            Ok(Next::Do(Phase::LegacyHandover(link, LegacyStep::Unlinking), Action::Unlink))
        }
        (Event::Tick, None) => Ok(send_disconnect(cx, link)),
        (event, _) => Err(link_trouble(event)),
    }
}

// A destination without the private option cannot acknowledge.

fn send_disconnect(cx: &mut Context, link: LinkState) -> Next {
    let cookie = cx.next_cookie();
    let disconnect = DestinationRequest { cookie, kind: RequestKind::Disconnect };
    let phase = Phase::LegacyHandover(link, LegacyStep::Disconnecting);
    Next::Do(phase, Action::Send(disconnect))
}

pub(super) fn legacy(cx: &mut Context, link: LinkState, step: LegacyStep, event: Event) -> Handled {
    match (step, event) {
        (LegacyStep::Unlinking, Event::Done) => {
            (cx.unlinked, cx.undo.record) = (true, false);
            Ok(send_disconnect(cx, link))
        }
        (LegacyStep::Unlinking, event) => {
            cx.report_failure(failure(event));
            Ok(send_disconnect(cx, link))
        }
        (LegacyStep::Disconnecting, Event::Done) => {
            Ok(leave(cx, Outcome::Arrived { acknowledged: false }))
        }
        (LegacyStep::Disconnecting, event) => Err(link_trouble(event)),
    }
}

// A flexnbd acknowledges, and answers questions about the handover.

fn hand_over(cx: &mut Context, now: Duration, token: Token) -> Next {
    let cookie = cx.next_cookie();
    let kind = RequestKind::Handover(Handover { id: cx.job.id, token });
    let ask_at = now + ASK_AFTER.min(cx.job.timeout);
    let sent = Phase::HandingOver(SentHandover { token, cookie, ask_at });
    Next::Do(sent, Action::Send(DestinationRequest { cookie, kind }))
}

pub(super) fn handing_over(
    cx: &mut Context,
    now: Duration,
    sent: SentHandover,
    event: Event,
) -> Handled {
    let SentHandover { token, cookie, ask_at } = sent;
    Ok(match event {
        Event::Reply { cookie: answered, error: None } if answered == cookie => {
            leave(cx, ACKNOWLEDGED)
        }
        // No byte of the handover was sent, so there is no doubt.
        Event::Unsent(why) => return Err(Trouble::Lost(why)),
        Event::Done | Event::Tick if now < ask_at => {
            Next::Do(Phase::HandingOver(sent), Action::Wait { until: ask_at })
        }
        Event::Done | Event::Tick => {
            let trouble = Trouble::NoProgress(ASK_AFTER.min(cx.job.timeout));
            cx.report_obstacle(now, Obstacle::Acknowledgement(trouble));
            ask(cx, Doubt { token, awaited: Some(cookie), ask_at: now })
        }
        event => {
            cx.report_obstacle(now, Obstacle::Acknowledgement(link_trouble(event)));
            let doubt = Doubt { token, awaited: None, ask_at: now };
            Next::Do(Phase::InDoubt(doubt), Action::HangUp)
        }
    })
}

/// Asks the destination whether the handover arrived. The first connection may still deliver the
/// acknowledgement until the second replaces it.
fn ask(cx: &mut Context, doubt: Doubt) -> Next {
    cx.undo.link = true;
    let question = cx.job.question();
    let action = match doubt.awaited {
        Some(_) => Action::Ask(question),
        None => Action::Connect(question),
    };
    Next::Do(Phase::InDoubt(doubt), action)
}

/// There was no acknowledgement: asks until the destination knows the outcome.
pub(super) fn in_doubt(cx: &mut Context, now: Duration, doubt: Doubt, event: Event) -> Handled {
    let Doubt { token, awaited, ask_at } = doubt;
    let later = Doubt { ask_at: now + RETRY_EVERY, ..doubt };
    let without_link = Doubt { awaited: None, ..later };
    Ok(match event {
        Event::Reply { cookie, error: None } if Some(cookie) == awaited => leave(cx, ACKNOWLEDGED),
        Event::Greeted(peer) => match handover_verdict(peer.answer.as_ref(), Some(token)) {
            HandoverVerdict::Arrived => leave(cx, ACKNOWLEDGED),
            HandoverVerdict::NotArrived => return not_arrived(cx, now, token, peer),
            HandoverVerdict::Unknown => Next::Do(Phase::InDoubt(without_link), Action::HangUp),
        },
        Event::Reply { .. } | Event::Lost(_) => {
            let doubt = Doubt { awaited: None, ..doubt };
            Next::Do(Phase::InDoubt(doubt), Action::HangUp)
        }
        Event::Unreachable(_) => {
            Next::Do(Phase::InDoubt(later), Action::Wait { until: later.ask_at })
        }
        _ if now < ask_at => Next::Do(Phase::InDoubt(doubt), Action::Wait { until: ask_at }),
        _ => ask(cx, doubt),
    })
}

/// The handover can no longer arrive. A process that still has the whole copy gets another
/// handover, unless clients have waited for too long.
fn not_arrived(cx: &mut Context, now: Duration, token: Token, peer: DestinationInfo) -> Handled {
    let complete = peer.answer.is_some_and(|answer| answer.has == Has::Incomplete);
    let in_time = cx.freeze.is_none_or(|freeze| freeze.elapsed(now) < FREEZE_MAX);
    let fits = complete && peer.token() == Some(token) && peer.incompatibility(&cx.job).is_none();
    let why = match (fits, in_time) {
        (true, true) => {
            cx.obstacle = None;
            cx.news.push_back(News::HandingOverAgain);
            return Ok(hand_over(cx, now, token));
        }
        (true, false) => "the destination was asked, and had not got the handover",
        (false, _) => "the destination has lost its copy",
    };
    Err(Trouble::Lost(why.to_owned()))
}

fn failure(event: Event) -> Option<String> {
    if let Event::Failed(why) = event { Some(why) } else { None }
}
