//! How the machine copies: one request after the other, until what is left fits the pause.
//! Never fails by itself: every trouble goes up to [`Machine::fail`].

use super::{Flush, Gate, Link, Machine, Phase};
use crate::migration::job::{Action, Event, News, Request, Trouble, Work};
use crate::migration::plan::{Flight, Next};
use std::time::Duration;

/// An early FLUSH makes the last one short; this old, it counts no more.
const FLUSH_FRESH: Duration = Duration::from_secs(2);

/// Bytes of a request header on the wire, with extended headers; without, it is shorter.
const HEADER: u64 = 32;

impl Machine {
    pub(super) fn copying(
        &mut self,
        now: Duration,
        mut link: Link,
        event: Event,
        gate: Gate,
    ) -> Action {
        match self.copied(now, &mut link, event) {
            Ok(()) => self.copy(now, link, gate),
            Err(trouble) => self.fail(now, trouble),
        }
    }

    /// Takes notice of what happened while copying.
    fn copied(&mut self, now: Duration, link: &mut Link, event: Event) -> Result<(), Trouble> {
        match event {
            Event::Looked { range, content } => self.plan.looked(range, content),
            Event::Taken { run, left } => {
                if self.plan.taken(run, left) {
                    self.chase.pass_ended(now, self.plan.left(), self.meter.link_rate());
                }
            }
            Event::Reply { cookie, error } => {
                self.replied(now, link, cookie, error)?;
                link.heard = now;
            }
            Event::Tick => {
                self.plan.look_again();
                self.check_progress(now, link)?;
            }
            Event::Done => {}
            Event::Lost(why) => return Err(Trouble::Lost(why)),
            Event::Failed(why) => return Err(Trouble::Local(why)),
            _ => return Err(Trouble::Confused("something unexpected happened while copying")),
        }
        Ok(())
    }

    /// Nothing came until now: is that too long?
    fn check_progress(&self, now: Duration, link: &Link) -> Result<(), Trouble> {
        let awaiting = self.plan.in_flight() || matches!(link.flush, Flush::Asked(_));
        let stuck = awaiting && now >= link.heard + self.job.patience;
        if stuck { Err(Trouble::Stuck(self.job.patience)) } else { Ok(()) }
    }

    fn replied(
        &mut self,
        now: Duration,
        link: &mut Link,
        cookie: u64,
        error: Option<u32>,
    ) -> Result<(), Trouble> {
        if let Some(error) = error {
            return Err(Trouble::ErrorReply(error));
        }
        if matches!(link.flush, Flush::Asked(asked) if asked == cookie) {
            link.flush = Flush::Done(now);
            self.plan.look_again();
            return Ok(());
        }
        let flight = self.plan.acknowledged(cookie).ok_or(Trouble::Cookie(cookie))?;
        let more = self.plan.in_flight();
        self.meter.acknowledged(now, flight.payload, flight.range.length(), more);
        Ok(())
    }

    /// The next thing to do while copying.
    pub(super) fn copy(&mut self, now: Duration, link: Link, gate: Gate) -> Action {
        match gate {
            Gate::Open if self.held != self.chase.delay() => self.hold_writers(link),
            Gate::Open if now >= link.close_from && self.has_caught_up(now) => {
                self.caught_up(now, link)
            }
            Gate::Closed if self.plan.is_done() => self.copied_all(now, link),
            _ => self.proceed(now, link, gate),
        }
    }

    fn proceed(&mut self, now: Duration, link: Link, gate: Gate) -> Action {
        let chunk = if gate == Gate::Open { self.speed.chunk() } else { u64::MAX };
        match self.plan.next(chunk) {
            Next::Look(range) => self.stay(link, gate, Action::Look(range)),
            Next::Take { from, longest } => {
                self.stay(link, gate, Action::TakeDirty { from, longest })
            }
            Next::Write(range) => self.send(now, link, gate, Work::Write(range)),
            Next::Zero(range) => self.send(now, link, gate, Work::Zero(range)),
            Next::Idle => {
                let until = self.idle_until(now, &link);
                self.stay(link, gate, Action::Wait { until })
            }
        }
    }

    /// How long there can be nothing to do.
    fn idle_until(&self, now: Duration, link: &Link) -> Duration {
        let flushing = matches!(link.flush, Flush::Asked(_));
        let awaiting = flushing || self.plan.in_flight();
        let since = if awaiting { link.heard } else { now };
        let mut until = since + self.job.patience;
        if now < link.close_from {
            until = until.min(link.close_from);
        }
        // A long FLUSH is no reason to let the marks pile up.
        if flushing { until.min(now + self.job.pause) } else { until }
    }

    fn stay(&mut self, link: Link, gate: Gate, action: Action) -> Action {
        match gate {
            Gate::Open => self.enter(Phase::Copying(link), action),
            Gate::Closed => self.enter(Phase::Last(link), action),
        }
    }

    /// Sends a part of the copy, once the speed limit allows it.
    fn send(&mut self, now: Duration, mut link: Link, gate: Gate, work: Work) -> Action {
        let (Work::Write(range) | Work::Zero(range)) = work else {
            return self.fail(now, Trouble::Confused("only parts of the disk are copied"));
        };
        let bytes = HEADER + work.payload();
        let ready = if gate == Gate::Open { self.speed.ready_at(now, bytes) } else { now };
        if ready > now {
            let until = ready.min(link.heard.max(now) + self.job.patience);
            return self.stay(link, gate, Action::Wait { until });
        }
        if !self.plan.in_flight() {
            link.heard = now;
        }
        let cookie = self.next_cookie();
        self.speed.sent(now, bytes);
        self.meter.sent(now);
        self.plan.sent(cookie, Flight { range, payload: work.payload() });
        self.stay(link, gate, Action::Send(Request { cookie, work }))
    }

    pub(super) fn next_cookie(&mut self) -> u64 {
        self.cookie += 1;
        self.cookie
    }

    fn hold_writers(&mut self, link: Link) -> Action {
        self.held = self.chase.delay();
        self.undo.hold = true;
        self.news.push_back(News::HeldBack(self.held));
        self.enter(Phase::Copying(link), Action::Hold(self.held))
    }

    fn has_caught_up(&mut self, now: Duration) -> bool {
        let (left, limit) = (self.plan.left(), self.speed.limit());
        self.plan.knows_what_is_left()
            && self.chase.may_end(now, left, self.meter.link_rate(), limit)
    }

    /// What is left fits the pause: once the destination has flushed the bulk, close the gate.
    fn caught_up(&mut self, now: Duration, mut link: Link) -> Action {
        let fresh = matches!(link.flush, Flush::Done(at) if now < at + FLUSH_FRESH);
        match link.flush {
            Flush::Asked(_) => self.proceed(now, link, Gate::Open),
            _ if fresh || !link.peer.flush => {
                self.undo.gate = true;
                self.enter(Phase::Closing(link), Action::CloseGate)
            }
            Flush::Never | Flush::Done(_) => {
                let cookie = self.next_cookie();
                (link.flush, link.heard) = (Flush::Asked(cookie), now);
                let flush = Request { cookie, work: Work::Flush };
                self.enter(Phase::Copying(link), Action::Send(flush))
            }
        }
    }
}
