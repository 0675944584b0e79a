//! How the machine copies: one request after the other, until what is left fits the pause.
//! Never fails by itself: every trouble goes up to [`Machine::fail`].

use super::{AfterRecord, Flush, LinkState, Machine, Phase, WriteAccess, link_trouble};
use crate::migration::job::{
    Action, DestinationRequest, Event, News, Obstacle, RequestKind, Trouble,
};
use crate::migration::plan::{AcknowledgedRequest, NextCopy};
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
        mut link: LinkState,
        event: Event,
        gate: WriteAccess,
    ) -> Action {
        match self.copied(now, &mut link, event) {
            Ok(()) => self.copy(now, link, gate),
            Err(trouble) => self.fail(now, trouble),
        }
    }

    /// Takes notice of what happened while copying.
    fn copied(&mut self, now: Duration, link: &mut LinkState, event: Event) -> Result<(), Trouble> {
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
    fn check_progress(&mut self, now: Duration, link: &LinkState) -> Result<(), Trouble> {
        let awaiting = self.plan.in_flight() || matches!(link.flush, Flush::Asked { .. });
        if matches!(link.flush, Flush::Asked { at, .. } if now >= at + FLUSH_TOLD) {
            self.obstructed(now, Obstacle::Flush);
        }
        let stuck = awaiting && now >= link.heard + self.job.timeout;
        if stuck { Err(Trouble::Stuck(self.job.timeout)) } else { Ok(()) }
    }

    fn replied(
        &mut self,
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

    fn flush_answered(&mut self, link: &mut LinkState, now: Duration, took: Duration) {
        link.flush = Flush::Done { at: now, took };
        link.slow_flushes = if took > FLUSH_QUICK { link.slow_flushes + 1 } else { 0 };
        if self.obstacle == Some(Obstacle::Flush) {
            self.obstacle = None;
        }
        self.plan.look_again();
    }

    /// The next thing to do while copying.
    pub(super) fn copy(&mut self, now: Duration, link: LinkState, gate: WriteAccess) -> Action {
        match gate {
            WriteAccess::Open if self.held != self.chase.delay() => self.hold_writers(link),
            WriteAccess::Open if self.owes_now(now) => {
                self.undoing(now, AfterRecord::GoOn(link), Event::Done)
            }
            WriteAccess::Open if self.has_caught_up(now) => self.caught_up(now, link),
            WriteAccess::Open => self.proceed(now, link, gate),
            WriteAccess::Closed => self.copy_the_rest(now, link),
        }
    }

    pub(super) fn proceed(&mut self, now: Duration, link: LinkState, gate: WriteAccess) -> Action {
        let chunk = if gate == WriteAccess::Open { self.speed.chunk() } else { u64::MAX };
        match self.plan.next(chunk) {
            NextCopy::Look(range) => self.stay(link, gate, Action::Look(range)),
            NextCopy::Take { from, longest } => {
                self.stay(link, gate, Action::TakeDirty { from, longest })
            }
            NextCopy::Write(range) => self.send(now, link, gate, RequestKind::Write(range)),
            NextCopy::Zero(range) => self.send(now, link, gate, RequestKind::Zero(range)),
            NextCopy::Idle => {
                let until = self.idle_until(now, &link);
                self.stay(link, gate, Action::Wait { until })
            }
        }
    }

    /// How long there can be nothing to do.
    fn idle_until(&self, now: Duration, link: &LinkState) -> Duration {
        let flushing = matches!(link.flush, Flush::Asked { .. });
        let awaiting = flushing || self.plan.in_flight();
        let since = if awaiting { link.heard } else { now };
        let mut until = since + self.job.timeout;
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

    fn stay(&mut self, link: LinkState, gate: WriteAccess, action: Action) -> Action {
        match gate {
            WriteAccess::Open => self.enter(Phase::Copying(link), action),
            WriteAccess::Closed => self.enter(Phase::Last(link), action),
        }
    }

    /// Sends a part of the copy, once the speed limit allows it.
    fn send(
        &mut self,
        now: Duration,
        mut link: LinkState,
        gate: WriteAccess,
        work: RequestKind,
    ) -> Action {
        let (RequestKind::Write(range) | RequestKind::Zero(range)) = work else {
            return self.fail(now, Trouble::Confused("only parts of the disk are copied"));
        };
        let bytes = HEADER + work.payload();
        let ready = if gate == WriteAccess::Open { self.speed.ready_at(now, bytes) } else { now };
        if ready > now {
            let until = ready.min(link.heard.max(now) + self.job.timeout);
            return self.stay(link, gate, Action::Wait { until });
        }
        if !self.plan.in_flight() {
            link.heard = now;
        }
        let cookie = self.next_cookie();
        self.speed.sent(now, bytes);
        self.meter.sent(now);
        self.plan.sent(cookie, AcknowledgedRequest { range, payload: work.payload() });
        self.stay(link, gate, Action::Send(DestinationRequest { cookie, work }))
    }

    pub(super) fn next_cookie(&mut self) -> u64 {
        self.cookie += 1;
        self.cookie
    }

    fn hold_writers(&mut self, link: LinkState) -> Action {
        self.held = self.chase.delay();
        self.undo.hold = true;
        self.news.push_back(News::Throttled(self.held));
        self.enter(Phase::Copying(link), Action::Hold(self.held))
    }

    fn has_caught_up(&mut self, now: Duration) -> bool {
        let (left, limit) = (self.plan.left(), self.speed.limit());
        self.plan.knows_what_is_left()
            && self.chase.may_end(now, left, self.meter.link_rate(), limit)
    }

    /// What is left fits the pause: once the destination has flushed the bulk, and in-flight
    /// requests are short, close the gate.
    fn caught_up(&mut self, now: Duration, mut link: LinkState) -> Action {
        let may_be_slow = link.slow_flushes >= SLOW_FLUSHES_MAX;
        // Under a low speed limit what is left is known only now and then.
        let fresh = FLUSH_FRESH.max(self.speed.spacing() * 4);
        let is_ready = |at, took| now < at + fresh && (took <= FLUSH_QUICK || may_be_slow);
        match link.flush {
            _ if !link.peer.flush => self.look_at_requests(now, link),
            Flush::Asked { .. } => self.proceed(now, link, WriteAccess::Open),
            Flush::Done { at, took } if is_ready(at, took) => self.look_at_requests(now, link),
            Flush::Never | Flush::Done { .. } => {
                let cookie = self.next_cookie();
                link.flush = Flush::Asked { cookie, at: now };
                if !self.plan.in_flight() {
                    link.heard = now;
                }
                let flush = DestinationRequest { cookie, work: RequestKind::Flush };
                self.enter(Phase::Copying(link), Action::Send(flush))
            }
        }
    }

    fn look_at_requests(&mut self, now: Duration, link: LinkState) -> Action {
        let is_silent = self.plan.in_flight() && now >= link.heard + SILENT;
        // Until then the destination flushes now and then, which also tells it that we are there.
        if is_silent || now < self.probe.due() || now < self.backoff.from() {
            return self.proceed(now, link, WriteAccess::Open);
        }
        self.enter(Phase::Probing(link), Action::Probe)
    }
}
