//! Parting: from the sealed gate on. Either a destination that cannot acknowledge is said goodbye
//! to, or the handover is sent and its acknowledgement waited for, or asked for.

use super::{
    Doubt, Leaving, LegacyHandover, LinkState, Machine, Parting, Phase, RETRY_EVERY, link_trouble,
};
use crate::migration::freeze::FREEZE_MAX;
use crate::migration::job::{
    Action, DestinationInfo, DestinationRequest, Event, HandoverVerdict, News, Obstacle, Outcome,
    RecordKind, RequestKind, Trouble, handover_verdict,
};
use crate::migration::wire::{Handover, Has, Token};
use std::time::Duration;

/// An acknowledgement that has not come after so long is asked for on a second connection.
pub const ASK_AFTER: Duration = Duration::from_secs(2);

impl Machine {
    /// What is sent to a destination that has hung up would reach nobody: to one that cannot
    /// acknowledge nobody would say so, and with any other we would be in doubt for nothing.
    pub(super) fn listen_once_more(&mut self, now: Duration, link: LinkState) -> Action {
        self.enter(Phase::Farewell(link, LegacyHandover::Listening), Action::Wait { until: now })
    }

    fn say_farewell(&mut self, link: LinkState) -> Action {
        let cookie = self.next_cookie();
        let goodbye = DestinationRequest { cookie, work: RequestKind::Disconnect };
        self.enter(Phase::Farewell(link, LegacyHandover::Disconnecting), Action::Send(goodbye))
    }

    pub(super) fn farewell(
        &mut self,
        now: Duration,
        link: LinkState,
        step: LegacyHandover,
        event: Event,
    ) -> Action {
        match (step, event, link.peer.token()) {
            (LegacyHandover::Listening, Event::Tick, Some(token)) => self.hand_over(now, token),
            (LegacyHandover::Listening, Event::Tick, None) if self.job.unlink && !self.unlinked => {
                self.enter(Phase::Farewell(link, LegacyHandover::Unlinking), Action::Unlink)
            }
            (LegacyHandover::Listening, Event::Tick, None) => self.say_farewell(link),
            (LegacyHandover::Listening, event, _) => self.fail(now, link_trouble(event)),
            (LegacyHandover::Unlinking, Event::Done, _) => {
                (self.unlinked, self.undo.record) = (true, false);
                self.say_farewell(link)
            }
            (LegacyHandover::Unlinking, event, _) => {
                self.note_failure(event);
                self.say_farewell(link)
            }
            (LegacyHandover::Disconnecting, Event::Done, _) => {
                self.leave(Outcome::Arrived { acknowledged: false })
            }
            (LegacyHandover::Disconnecting, event, _) => self.fail(now, link_trouble(event)),
        }
    }

    fn hand_over(&mut self, now: Duration, token: Token) -> Action {
        let cookie = self.next_cookie();
        let work = RequestKind::Handover(Handover { id: self.job.id, token });
        let ask_at = now + ASK_AFTER.min(self.job.timeout);
        let parting = Phase::Parting(Parting { token, cookie, ask_at });
        self.enter(parting, Action::Send(DestinationRequest { cookie, work }))
    }

    pub(super) fn parting(&mut self, now: Duration, parting: Parting, event: Event) -> Action {
        let Parting { token, cookie, ask_at } = parting;
        match event {
            Event::Reply { cookie: answered, error: None } if answered == cookie => {
                self.leave(Outcome::Arrived { acknowledged: true })
            }
            // Nothing of the handover left this host: there is no doubt.
            Event::Unsent(why) => self.fail(now, Trouble::Lost(why)),
            Event::Done | Event::Tick if now < ask_at => {
                self.enter(Phase::Parting(parting), Action::Wait { until: ask_at })
            }
            Event::Done | Event::Tick => {
                let trouble = Trouble::Stuck(ASK_AFTER.min(self.job.timeout));
                self.obstructed(now, Obstacle::Acknowledgement(trouble));
                self.ask(Doubt { token, awaited: Some(cookie), ask_at: now })
            }
            event => {
                self.obstructed(now, Obstacle::Acknowledgement(link_trouble(event)));
                let doubt = Doubt { token, awaited: None, ask_at: now };
                self.enter(Phase::Doubt(doubt), Action::HangUp)
            }
        }
    }

    /// Asks what has become of the handover. The first connection may still tell, until another
    /// takes its place.
    fn ask(&mut self, doubt: Doubt) -> Action {
        self.undo.link = true;
        let question = self.job.question();
        let action = match doubt.awaited {
            Some(_) => Action::Ask(question),
            None => Action::Connect(question),
        };
        self.enter(Phase::Doubt(doubt), action)
    }

    /// The acknowledgement did not come: ask until somebody knows.
    pub(super) fn doubt(&mut self, now: Duration, doubt: Doubt, event: Event) -> Action {
        let Doubt { token, awaited, ask_at } = doubt;
        let later = Doubt { ask_at: now + RETRY_EVERY, ..doubt };
        let alone = Doubt { awaited: None, ..later };
        match event {
            Event::Reply { cookie, error: None } if Some(cookie) == awaited => {
                self.leave(Outcome::Arrived { acknowledged: true })
            }
            Event::Greeted(peer) => match handover_verdict(peer.answer.as_ref(), Some(token)) {
                HandoverVerdict::Arrived => self.leave(Outcome::Arrived { acknowledged: true }),
                HandoverVerdict::NotArrived => self.not_arrived(now, token, peer),
                HandoverVerdict::Unknown => self.enter(Phase::Doubt(alone), Action::HangUp),
            },
            Event::Reply { .. } | Event::Lost(_) => {
                let doubt = Doubt { awaited: None, ..doubt };
                self.enter(Phase::Doubt(doubt), Action::HangUp)
            }
            Event::Unreachable(_) => {
                self.enter(Phase::Doubt(later), Action::Wait { until: later.ask_at })
            }
            _ if now < ask_at => self.enter(Phase::Doubt(doubt), Action::Wait { until: ask_at }),
            _ => self.ask(doubt),
        }
    }

    /// What was sent so far cannot make the disk arrive. Does that process have the whole copy? If
    /// so it is handed over again, unless clients have waited for too long.
    fn not_arrived(&mut self, now: Duration, token: Token, peer: DestinationInfo) -> Action {
        let complete = peer.answer.is_some_and(|answer| answer.has == Has::Incomplete);
        let in_time = self.freeze.is_none_or(|freeze| freeze.lasts(now) < FREEZE_MAX);
        let fits = complete && peer.token() == Some(token) && peer.unfit(&self.job).is_none();
        match (fits, in_time) {
            (true, true) => {
                self.obstacle = None;
                self.news.push_back(News::HandingOverAgain);
                self.hand_over(now, token)
            }
            (true, false) => {
                let why = "the destination was asked, and had not got the handover";
                self.fail(now, Trouble::Lost(why.to_owned()))
            }
            (false, _) => {
                self.fail(now, Trouble::Lost("the destination has lost its copy".to_owned()))
            }
        }
    }

    // Leaving: the destination has the disk.

    pub(super) fn leave(&mut self, outcome: Outcome) -> Action {
        self.obstacle = None;
        self.enter(Phase::Leaving(Leaving::Retiring, outcome), Action::Retire)
    }

    pub(super) fn leaving(&mut self, step: Leaving, outcome: Outcome, event: Event) -> Action {
        let failed = self.note_failure(event);
        let goodbye = match outcome {
            Outcome::Arrived { acknowledged: true } => Action::Disconnect,
            _ => Action::HangUp,
        };
        let (next, action) = match step {
            Leaving::Retiring if self.unlinked => (Leaving::Disconnecting, goodbye),
            Leaving::Retiring if self.job.unlink => (Leaving::Unlinking, Action::Unlink),
            Leaving::Unlinking if !failed => (Leaving::Disconnecting, goodbye),
            Leaving::Retiring | Leaving::Unlinking => {
                (Leaving::Recording, Action::Record(RecordKind::Departed))
            }
            Leaving::Recording => (Leaving::Disconnecting, goodbye),
            Leaving::Disconnecting => return self.end(outcome),
        };
        self.enter(Phase::Leaving(next, outcome), action)
    }

    pub(super) fn note_failure(&mut self, event: Event) -> bool {
        let Event::Failed(why) = event else { return false };
        self.news.push_back(News::RecordFailed(why));
        true
    }
}
