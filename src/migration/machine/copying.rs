//! How the machine copies: one request after the other, until what is left fits the pause.
//! Never fails by itself: every trouble goes up to [`Machine::fail`].

use super::{Flush, Gate, Link, Machine, Phase, Then, link_trouble};
use crate::migration::job::{Action, Event, News, Obstacle, Request, Trouble, Work};
use crate::migration::plan::{Flight, Next};
use crate::range::Range;
use std::time::Duration;

/// An early FLUSH makes the last one short; this old, it counts no more.
const FLUSH_FRESH: Duration = Duration::from_secs(2);

/// An early FLUSH that took longer is followed by another, which has less to do,
const FLUSH_QUICK: Duration = Duration::from_millis(500);
/// but not by more than so many.
const SLOW_FLUSHES_MAX: u32 = 3;
/// A FLUSH that takes so long is told to be what the last copy waits for.
const FLUSH_TOLD: Duration = Duration::from_secs(5);

/// Behind a link on which nothing was heard for so long, although requests are outstanding, the gate
/// is not closed.
const SILENT: Duration = Duration::from_millis(500);

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
            Event::Taken { run, left } => self.taken(now, run, left),
            Event::Reply { cookie, error } => {
                self.replied(now, link, cookie, error)?;
                link.heard = now;
                self.progressed(now);
            }
            Event::Tick => {
                self.plan.look_again();
                self.check_progress(now, link)?;
            }
            Event::Done => {}
            event => return Err(link_trouble(event)),
        }
        Ok(())
    }

    fn taken(&mut self, now: Duration, run: Option<Range>, left: u64) {
        let is_first = self.plan.passes() == 0;
        let ended = self.plan.taken(run, left);
        if is_first {
            self.chase.first_pass_ended(now, left, self.job.size);
        }
        if is_first && left > 0 {
            // From now on there are many small requests rather than few large ones.
            self.meter.restart(now);
            self.measured_from = self.cookie;
        }
        if ended {
            self.chase.pass_ended(now, self.plan.left(), self.meter.link_rate());
        }
    }

    /// Nothing came until now: is that too long?
    fn check_progress(&mut self, now: Duration, link: &Link) -> Result<(), Trouble> {
        let awaiting = self.plan.in_flight() || matches!(link.flush, Flush::Asked { .. });
        if matches!(link.flush, Flush::Asked { at, .. } if now >= at + FLUSH_TOLD) {
            self.obstructed(now, Obstacle::Flush);
        }
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
        if let Flush::Asked { cookie: asked, at } = link.flush
            && asked == cookie
        {
            self.flush_answered(link, now, now.saturating_sub(at));
            return Ok(());
        }
        let flight = self.plan.acknowledged(cookie).ok_or(Trouble::Cookie(cookie))?;
        let more = self.plan.in_flight();
        if cookie > self.measured_from {
            self.meter.acknowledged(now, flight.payload, flight.range.length(), more);
        } else {
            self.meter.skipped(now, more);
        }
        Ok(())
    }

    fn flush_answered(&mut self, link: &mut Link, now: Duration, took: Duration) {
        link.flush = Flush::Done { at: now, took };
        link.slow_flushes = if took > FLUSH_QUICK { link.slow_flushes + 1 } else { 0 };
        if self.obstacle == Some(Obstacle::Flush) {
            self.obstacle = None;
        }
        self.plan.look_again();
    }

    /// The next thing to do while copying.
    pub(super) fn copy(&mut self, now: Duration, link: Link, gate: Gate) -> Action {
        match gate {
            Gate::Open if self.held != self.chase.delay() => self.hold_writers(link),
            Gate::Open if self.owes_now(now) => self.undoing(now, Then::GoOn(link), Event::Done),
            Gate::Open if self.has_caught_up(now) => self.caught_up(now, link),
            Gate::Open => self.proceed(now, link, gate),
            Gate::Closed => self.copy_the_rest(now, link),
        }
    }

    pub(super) fn proceed(&mut self, now: Duration, link: Link, gate: Gate) -> Action {
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
        let flushing = matches!(link.flush, Flush::Asked { .. });
        let awaiting = flushing || self.plan.in_flight();
        let since = if awaiting { link.heard } else { now };
        let mut until = since + self.job.patience;
        let record = self.owed.map_or(now, |owed| owed.at);
        for due in [self.backoff.from(), self.probe.due(), record] {
            if now < due {
                until = until.min(due);
            }
        }
        until = self.while_frozen(until);
        // Neither a long FLUSH nor a closing in vain is a reason to let the marks pile up.
        let piles_up = flushing || now < self.backoff.from();
        if piles_up { until.min(now + self.job.pause) } else { until }
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

    /// What is left fits the pause: once the destination has flushed the bulk, and in-flight
    /// requests are short, close the gate.
    fn caught_up(&mut self, now: Duration, mut link: Link) -> Action {
        let may_be_slow = link.slow_flushes >= SLOW_FLUSHES_MAX;
        // Under a low speed limit what is left is known only now and then.
        let fresh = FLUSH_FRESH.max(self.speed.spacing() * 4);
        let is_ready = |at, took| now < at + fresh && (took <= FLUSH_QUICK || may_be_slow);
        match link.flush {
            _ if !link.peer.flush => self.look_at_requests(now, link),
            Flush::Asked { .. } => self.proceed(now, link, Gate::Open),
            Flush::Done { at, took } if is_ready(at, took) => self.look_at_requests(now, link),
            Flush::Never | Flush::Done { .. } => {
                let cookie = self.next_cookie();
                link.flush = Flush::Asked { cookie, at: now };
                if !self.plan.in_flight() {
                    link.heard = now;
                }
                let flush = Request { cookie, work: Work::Flush };
                self.enter(Phase::Copying(link), Action::Send(flush))
            }
        }
    }

    fn look_at_requests(&mut self, now: Duration, link: Link) -> Action {
        let is_silent = self.plan.in_flight() && now >= link.heard + SILENT;
        // Until then the destination flushes now and then, which also tells it that we are there.
        if is_silent || now < self.probe.due() || now < self.backoff.from() {
            return self.proceed(now, link, Gate::Open);
        }
        self.enter(Phase::Probing(link), Action::Probe)
    }
}
