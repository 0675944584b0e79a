//! The last copy, behind the closed gate: every step of it has an end, after which clients go on.
//! Never fails by itself: what cannot go on is thawed ([`Machine::thaw`]) or goes up to
//! [`Machine::fail`].

use super::{AfterRecord, Flush, LinkState, Machine, Phase, WriteAccess, link_trouble};
use crate::migration::freeze::{Freeze, FreezeDecision};
use crate::migration::job::{
    Action, DestinationRequest, Event, News, Obstacle, Outcome, RecordKind, RequestKind, Trouble,
};
use std::time::Duration;

/// In-flight requests of clients this old are told to be what keeps the gate open.
const REQUEST_TOLD: Duration = Duration::from_secs(1);

const NOT_SENT: &str = "what is left could not be sent while clients waited";
const NOT_FLUSHED: &str = "the destination did not flush while clients waited";
const NOT_RECORDED: &str = "the record could not be made durable while clients waited";

impl Machine {
    /// A look at the requests in flight, with the gate open.
    pub(super) fn probing(&mut self, now: Duration, link: LinkState, event: Event) -> Action {
        let Event::Visits { turned } = event else {
            return self.fail(now, Trouble::Confused("requests in flight were not looked at"));
        };
        match self.probe.looked(now, turned) {
            FreezeDecision::Close(within) => {
                self.undo.gate = true;
                self.freeze = Some(Freeze::new(now));
                self.enter(Phase::Closing(link), Action::CloseGate { within })
            }
            FreezeDecision::Wait(age) => {
                if age >= REQUEST_TOLD {
                    let why = "requests that clients have in flight take longer than a second";
                    self.obstructed(now, Obstacle::Requests(why.to_owned()));
                }
                self.copy(now, link, WriteAccess::Open)
            }
        }
    }

    pub(super) fn closing(&mut self, now: Duration, link: LinkState, event: Event) -> Action {
        match event {
            Event::Done => {
                self.news.push_back(News::GateClosed);
                self.obstacle = None;
                self.plan.gate_closed();
                if let Some(freeze) = &mut self.freeze {
                    freeze.drained(now);
                }
                self.copy(now, link, WriteAccess::Closed)
            }
            Event::Failed(why) => {
                self.undo.gate = false;
                self.closed_in_vain(now);
                self.obstructed(now, Obstacle::Requests(why));
                self.copy(now, link, WriteAccess::Open)
            }
            _ => self.fail(now, Trouble::Confused("the gate closed strangely")),
        }
    }

    /// The copy has got on: clients may be made to wait a little longer.
    pub(super) fn progressed(&mut self, now: Duration) {
        if let Some(freeze) = &mut self.freeze {
            freeze.progressed(now);
        }
    }

    fn last_step(&mut self) {
        if let Some(freeze) = &mut self.freeze {
            freeze.last_step();
        }
    }

    /// Whether clients have waited long enough.
    pub(super) fn is_overdue(&self, now: Duration) -> bool {
        self.freeze.is_some_and(|freeze| freeze.is_over(now))
    }

    /// The same time, or the end of the clients' waiting if that comes first.
    pub(super) fn while_frozen(&self, until: Duration) -> Duration {
        self.freeze.and_then(|freeze| freeze.until()).map_or(until, |end| until.min(end))
    }

    /// The last dirty block is acknowledged. A destination of ours makes everything durable as part
    /// of the handover; any other is asked to.
    pub(super) fn copied_all(&mut self, now: Duration, mut link: LinkState) -> Action {
        self.last_step();
        if !link.peer.flush || link.peer.token().is_some() {
            return self.flushed(now, link);
        }
        let cookie = self.next_cookie();
        link.heard = now;
        link.flush = Flush::Asked { cookie, at: now };
        let flush = DestinationRequest { cookie, work: RequestKind::Flush };
        self.enter(Phase::Flushing(link), Action::Send(flush))
    }

    pub(super) fn flushing(&mut self, now: Duration, mut link: LinkState, event: Event) -> Action {
        let Flush::Asked { cookie, at } = link.flush else {
            return self.fail(now, Trouble::Confused("no flush is outstanding"));
        };
        let stuck = link.heard + self.job.timeout;
        match event {
            Event::Reply { cookie: answered, error: None } if answered == cookie => {
                link.flush = Flush::Done { at: now, took: now.saturating_sub(at) };
                self.flushed(now, link)
            }
            Event::Done | Event::Tick if self.is_overdue(now) => self.thaw(now, link, NOT_FLUSHED),
            Event::Done | Event::Tick if now < stuck => {
                let until = self.while_frozen(stuck);
                self.enter(Phase::Flushing(link), Action::Wait { until })
            }
            Event::Done | Event::Tick => self.fail(now, Trouble::Stuck(self.job.timeout)),
            event => self.fail(now, link_trouble(event)),
        }
    }

    /// The destination has every byte. Say so in the record before saying it to anybody.
    fn flushed(&mut self, now: Duration, link: LinkState) -> Action {
        if self.unlinked {
            return self.listen_once_more(now, link);
        }
        (self.undo.record, self.owed) = (true, None);
        self.enter(Phase::Recording(link), Action::Record(RecordKind::Departing))
    }

    pub(super) fn recording(&mut self, now: Duration, link: LinkState, event: Event) -> Action {
        match event {
            Event::Done if self.is_overdue(now) => self.thaw(now, link, NOT_RECORDED),
            Event::Done => self.enter(Phase::Sealing(link), Action::Seal),
            // That is no trouble with the link, and to copy again would not make it better.
            Event::Failed(why) => {
                self.undo(now, AfterRecord::End(Outcome::Failed(Trouble::Record(why))))
            }
            _ => self.fail(now, Trouble::Confused("the record was written strangely")),
        }
    }

    /// If no client has been let in since the gate was closed, none is from now on.
    pub(super) fn sealing(&mut self, now: Duration, link: LinkState, event: Event) -> Action {
        match event {
            Event::Done => {
                if let Some(freeze) = &mut self.freeze {
                    freeze.seal();
                }
                self.listen_once_more(now, link)
            }
            Event::Failed(_) => self.thaw(now, link, NOT_RECORDED),
            _ => self.fail(now, Trouble::Confused("the gate was sealed strangely")),
        }
    }

    /// Lets clients go on, and the copy with them; the connection is as good as it was.
    fn thaw(&mut self, now: Duration, link: LinkState, why: &'static str) -> Action {
        self.obstructed(now, Obstacle::LastCopy(why));
        self.undoing(now, AfterRecord::GoOn(link), Event::Done)
    }

    /// What is left, while clients wait: not for longer than they may.
    pub(super) fn copy_the_rest(&mut self, now: Duration, link: LinkState) -> Action {
        if self.is_overdue(now) {
            self.thaw(now, link, NOT_SENT)
        } else if self.plan.is_done() {
            self.copied_all(now, link)
        } else {
            self.proceed(now, link, WriteAccess::Closed)
        }
    }

    /// A closing has come to nothing.
    pub(super) fn closed_in_vain(&mut self, now: Duration) {
        if let Some(freeze) = self.freeze.take() {
            self.backoff.failed(now, freeze.lasts(now));
        }
    }
}
