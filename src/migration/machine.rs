//! The source's whole life: what happened → what to do next.
//! Never connects, reads a clock, touches the disk or logs; [`Machine::step`] decides, others do.
//!
//! ```text
//!  Start ─▶ Greeting ─▶ Copying ─▶ Closing ─▶ Last ─▶ Flushing ─▶ Recording ─▶ ┃Parting ─▶ Leaving ─▶ Ended
//!              │  ▲        │          │         │         │          │         ┃  │  ▲        ▲
//!              │  │        └──────────┴────┬────┴─────────┴──────────┘         ┃  ▼  │"no"    │"arrived"
//!     not once │  │                        ▼ any trouble, or break             ┃ Doubt ───────┘
//!      greeted │  └── Resting ◀──────── Undoing ◀───────────────────────────────── │
//!              ▼       1 s                 │  link, record, gate, hold         ┃  └─ unreachable: asks
//!         Ended(Failed)                    └─▶ Ended(Broken)                   ┃     every second
//!                                                                              ┃
//!                              clients never notice                point of no return
//! ```
//!
//! * Left of the double line every failure ends in `Machine::undo`, the one place that takes back
//!   what was done: the connection is dropped (without a DISC), the record put back, the
//!   gate opened, writers let go; in this order, and then again from the start in a second, or over.
//! * `Parting` means that HANDOVER may have reached the destination. The only ways out are its
//!   acknowledgement, and an answer in `Doubt`: *arrived* (leave), *not arrived and that
//!   connection is closed for good* (hand over again, or undo when the destination has lost the
//!   copy). Whatever else happens, the gate stays closed.
//! * The record *departing* is durable before HANDOVER is sent, and where it cannot be written the
//!   migration ends; *departed* (or the deletion of the
//!   image) comes after the acknowledgement.
//! * A destination without the private option cannot acknowledge. To it: last write, FLUSH,
//!   *departing*, deletion if ordered, DISC, *departed*. Its arm is `Farewell`.

mod copying;

use super::job::{
    Action, Event, Fate, Job, News, Note, Order, Outcome, Peer, Progress, Request, SIZE_MIN, Stage,
    TooLate, Trouble, Work, fate,
};
use super::pace::{Chase, Meter, Speed};
use super::plan::{Caps, Plan};
use super::wire::{Handover, Has, Token};
use std::collections::VecDeque;
use std::time::Duration;

/// Time between one attempt and the next.
pub const RETRY_EVERY: Duration = Duration::from_secs(1);

/// One migration, seen from its source.
#[derive(Debug)]
pub struct Machine {
    job: Job,
    phase: Phase,
    plan: Plan,
    speed: Speed,
    meter: Meter,
    chase: Chase,
    undo: Undo,
    /// Which process has what the plan believes acknowledged.
    copied_to: Option<(Token, Caps)>,
    /// The hold that was ordered last.
    held: Duration,
    started: bool,
    /// The image is deleted: the gate must not open again, and the copy has to arrive.
    unlinked: bool,
    breaking: bool,
    /// The trouble of this attempt was told already.
    told: bool,
    cookie: u64,
    news: VecDeque<News>,
}

/// What a failure now would have to take back. Set when the action is ordered, not when it has
/// succeeded: a half-done action is taken back, too.
#[derive(Debug, Default)]
struct Undo {
    link: bool,
    record: bool,
    gate: bool,
    hold: bool,
}

#[derive(Debug)]
enum Phase {
    Start,
    Greeting,
    Copying(Link),
    Closing(Link),
    Last(Link),
    Flushing(Link, u64),
    Recording(Link),
    Farewell(Link, Farewell),
    Parting(Parting),
    Doubt { token: Token, ask_at: Duration },
    Leaving(Leaving, Outcome),
    Undoing(Then),
    Resting { until: Duration },
    Ended(Outcome),
}

/// The connection to the destination.
#[derive(Clone, Copy, Debug)]
struct Link {
    peer: Peer,
    /// When it last got something done.
    heard: Duration,
    flush: Flush,
    /// The gate is not to be closed earlier, since visits did not end the last time.
    close_from: Duration,
}

/// The FLUSH that is sent while the gate is still open.
#[derive(Clone, Copy, Debug)]
enum Flush {
    Never,
    Asked(u64),
    Done(Duration),
}

/// HANDOVER was sent.
#[derive(Clone, Copy, Debug)]
struct Parting {
    token: Token,
    cookie: u64,
    deadline: Duration,
}

#[derive(Clone, Copy, Debug)]
enum Farewell {
    /// Is it still there?
    Listening,
    Unlinking,
    Disconnecting,
}

#[derive(Clone, Copy, Debug)]
enum Leaving {
    Retiring,
    Unlinking,
    Recording,
    Disconnecting,
}

#[derive(Clone, Debug)]
enum Then {
    Retry,
    End(Outcome),
}

/// Whether clients may write while the copy goes on.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Gate {
    Open,
    Closed,
}

/// The disk is smaller than [`SIZE_MIN`] bytes and cannot be migrated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooSmall;

impl Machine {
    /// A migration that has not begun, at the time `now`.
    ///
    /// # Errors
    /// For a disk smaller than [`SIZE_MIN`].
    pub fn new(job: Job, now: Duration) -> Result<Self, TooSmall> {
        if job.size < SIZE_MIN {
            return Err(TooSmall);
        }
        Ok(Self {
            phase: Phase::Start,
            plan: Plan::new(job.size, job.limits),
            speed: Speed::new(job.speed),
            meter: Meter::new(now),
            chase: Chase::new(job.pause),
            undo: Undo::default(),
            copied_to: None,
            held: Duration::ZERO,
            started: false,
            unlinked: false,
            breaking: false,
            told: false,
            cookie: 0,
            news: VecDeque::new(),
            job,
        })
    }

    /// What is to be done now that `event` has happened.
    pub fn step(&mut self, now: Duration, event: Event) -> Action {
        if self.breaking && self.may_break() {
            self.breaking = false;
            return self.undo(now, Then::End(Outcome::Broken));
        }
        match std::mem::replace(&mut self.phase, Phase::Start) {
            Phase::Start => self.connect(),
            Phase::Greeting => self.greeting(now, event),
            Phase::Copying(link) => self.copying(now, link, event, Gate::Open),
            Phase::Closing(link) => self.closing(now, link, event),
            Phase::Last(link) => self.copying(now, link, event, Gate::Closed),
            Phase::Flushing(link, cookie) => self.flushing(now, link, cookie, event),
            Phase::Recording(link) => self.recording(now, link, event),
            Phase::Farewell(link, step) => self.farewell(now, link, step, event),
            Phase::Parting(parting) => self.parting(now, parting, event),
            Phase::Doubt { token, ask_at } => self.doubt(now, token, ask_at, event),
            Phase::Leaving(step, outcome) => self.leaving(step, outcome, event),
            Phase::Undoing(then) => self.undoing(now, then, event),
            Phase::Resting { until } if now >= until => self.connect(),
            Phase::Resting { until } => {
                self.enter(Phase::Resting { until }, Action::Wait { until })
            }
            Phase::Ended(outcome) => self.end(outcome),
        }
    }

    /// An operator's order, at any time between two steps; the next step follows it.
    ///
    /// # Errors
    /// [`TooLate`] for a `break` after the handover was sent.
    pub fn order(&mut self, order: Order) -> Result<(), TooLate> {
        match order {
            Order::Speed(limit) => self.speed.set_limit(limit),
            Order::Break if self.may_break() => self.breaking = true,
            Order::Break => return Err(TooLate),
        }
        Ok(())
    }

    /// Whether a `break` was ordered that has not been carried out yet.
    #[must_use]
    pub fn is_breaking(&self) -> bool {
        self.breaking
    }

    /// The next thing worth telling, oldest first.
    pub fn news(&mut self) -> Option<News> {
        self.news.pop_front()
    }

    /// The job that was given.
    #[must_use]
    pub fn job(&self) -> &Job {
        &self.job
    }

    /// How far it is.
    #[must_use]
    pub fn progress(&self, now: Duration) -> Progress {
        let bytes_left = self.plan.left();
        Progress {
            stage: self.stage(),
            bytes_per_second: self.meter.speed(now),
            seconds_left: self.meter.seconds_left(now, bytes_left),
            bytes_left,
            speed_limit: self.speed.limit(),
            passes: self.plan.passes(),
            hold: self.held,
        }
    }

    /// Where it is.
    #[must_use]
    pub fn stage(&self) -> Stage {
        match &self.phase {
            Phase::Start | Phase::Greeting | Phase::Resting { .. } | Phase::Undoing(_) => {
                Stage::Connecting
            }
            Phase::Copying(_) => Stage::Copying,
            Phase::Closing(_) | Phase::Last(_) | Phase::Flushing(..) => Stage::Closing,
            Phase::Recording(_) | Phase::Farewell(..) | Phase::Parting(_) => Stage::Parting,
            Phase::Doubt { .. } => Stage::InDoubt,
            Phase::Leaving(..) => Stage::Leaving,
            Phase::Ended(_) => Stage::Ended,
        }
    }

    /// Whether the disk is still ours to keep.
    fn may_break(&self) -> bool {
        let gone = matches!(
            self.phase,
            Phase::Parting(_) | Phase::Doubt { .. } | Phase::Leaving(..) | Phase::Ended(_)
        );
        let leaving = matches!(self.phase, Phase::Farewell(..)) || self.unlinked;
        !gone && !leaving && !matches!(self.phase, Phase::Undoing(Then::End(_)))
    }

    fn enter(&mut self, phase: Phase, action: Action) -> Action {
        self.phase = phase;
        action
    }

    fn end(&mut self, outcome: Outcome) -> Action {
        self.enter(Phase::Ended(outcome.clone()), Action::End(outcome))
    }

    // Getting in touch.

    fn connect(&mut self) -> Action {
        self.undo.link = true;
        self.enter(Phase::Greeting, Action::Connect(self.job.question()))
    }

    fn greeting(&mut self, now: Duration, event: Event) -> Action {
        match event {
            Event::Greeted(peer) => match peer.unfit(&self.job) {
                None => self.welcome(now, peer),
                Some(trouble) => self.fail(now, trouble),
            },
            Event::Unreachable(trouble) => self.fail(now, trouble),
            _ => self.fail(now, Trouble::Confused("a connection attempt ended strangely")),
        }
    }

    /// The destination can take the disk: go on where we were, if it still has what it had.
    fn welcome(&mut self, now: Duration, peer: Peer) -> Action {
        let process = peer.token().map(|token| (token, peer.caps));
        let has_copy = peer.answer.is_some_and(|answer| answer.has == Has::Incomplete);
        let resume = has_copy && process.is_some() && process == self.copied_to;
        if resume {
            self.plan.resume();
        } else if self.copied_to.take().is_some() {
            // Another process may have another image: a name of its own for every copy keeps
            // an answer about one from being taken for an answer about the other.
            self.job.id = self.job.id.next();
            return self.undo(now, Then::Retry);
        } else {
            self.plan.restart(peer.caps);
        }
        self.copied_to = process;
        self.news.push_back(match (self.started, resume) {
            (false, _) => News::Started,
            (true, true) => News::Resumed,
            (true, false) => News::Restarted,
        });
        (self.started, self.told) = (true, false);
        let gate = if self.unlinked { Gate::Closed } else { Gate::Open };
        self.copy(now, Link { peer, heard: now, flush: Flush::Never, close_from: now }, gate)
    }

    // The last copy, behind the closed gate.

    fn closing(&mut self, now: Duration, mut link: Link, event: Event) -> Action {
        match event {
            Event::Done => {
                self.news.push_back(News::GateClosed);
                self.plan.gate_closed();
                self.copy(now, link, Gate::Closed)
            }
            Event::Failed(why) => {
                self.news.push_back(News::GateBusy(why));
                self.undo.gate = false;
                link.close_from = now + RETRY_EVERY;
                self.copy(now, link, Gate::Open)
            }
            _ => self.fail(now, Trouble::Confused("the gate closed strangely")),
        }
    }

    fn copied_all(&mut self, now: Duration, mut link: Link) -> Action {
        if !link.peer.flush {
            return self.flushed(now, link);
        }
        let cookie = self.next_cookie();
        link.heard = now;
        let flush = Request { cookie, work: Work::Flush };
        self.enter(Phase::Flushing(link, cookie), Action::Send(flush))
    }

    fn flushing(&mut self, now: Duration, link: Link, cookie: u64, event: Event) -> Action {
        let until = link.heard + self.job.patience;
        match event {
            Event::Done | Event::Tick if now < until => {
                self.enter(Phase::Flushing(link, cookie), Action::Wait { until })
            }
            Event::Done | Event::Tick => self.fail(now, Trouble::Stuck(self.job.patience)),
            Event::Reply { cookie: answered, error: None } if answered == cookie => {
                self.flushed(now, link)
            }
            event => self.fail(now, link_trouble(event)),
        }
    }

    /// The destination has every byte, durably. Say so in the record before saying it to anybody.
    fn flushed(&mut self, now: Duration, link: Link) -> Action {
        match link.peer.token() {
            Some(token) if self.unlinked => return self.hand_over(now, token),
            None if self.unlinked => return self.listen_once_more(now, link),
            _ => self.undo.record = true,
        }
        self.enter(Phase::Recording(link), Action::Record(Note::Departing))
    }

    fn recording(&mut self, now: Duration, link: Link, event: Event) -> Action {
        match (event, link.peer.token()) {
            (Event::Done, Some(token)) => self.hand_over(now, token),
            (Event::Done, None) => self.listen_once_more(now, link),
            // That is no trouble with the link, and to copy again would not make it better.
            (Event::Failed(why), _) => {
                self.undo(now, Then::End(Outcome::Failed(Trouble::Record(why))))
            }
            _ => self.fail(now, Trouble::Confused("the record was written strangely")),
        }
    }

    // A destination that cannot acknowledge.

    /// A goodbye to a destination that has hung up would reach nobody, and nobody would say so.
    fn listen_once_more(&mut self, now: Duration, link: Link) -> Action {
        self.enter(Phase::Farewell(link, Farewell::Listening), Action::Wait { until: now })
    }

    fn say_farewell(&mut self, link: Link) -> Action {
        let cookie = self.next_cookie();
        let goodbye = Request { cookie, work: Work::Disconnect };
        self.enter(Phase::Farewell(link, Farewell::Disconnecting), Action::Send(goodbye))
    }

    fn farewell(&mut self, now: Duration, link: Link, step: Farewell, event: Event) -> Action {
        match (step, event) {
            (Farewell::Listening, Event::Tick) if self.job.unlink && !self.unlinked => {
                self.enter(Phase::Farewell(link, Farewell::Unlinking), Action::Unlink)
            }
            (Farewell::Listening, Event::Tick) => self.say_farewell(link),
            (Farewell::Listening, event) => self.fail(now, link_trouble(event)),
            (Farewell::Unlinking, Event::Done) => {
                (self.unlinked, self.undo.record) = (true, false);
                self.say_farewell(link)
            }
            (Farewell::Unlinking, event) => {
                self.note_failure(event);
                self.say_farewell(link)
            }
            (Farewell::Disconnecting, Event::Done) => {
                self.leave(Outcome::Arrived { acknowledged: false })
            }
            (Farewell::Disconnecting, event) => self.fail(now, link_trouble(event)),
        }
    }

    // Parting: the handover has been sent.

    fn hand_over(&mut self, now: Duration, token: Token) -> Action {
        let cookie = self.next_cookie();
        let work = Work::Handover(Handover { id: self.job.id, token });
        let deadline = now + self.job.patience;
        let parting = Phase::Parting(Parting { token, cookie, deadline });
        self.enter(parting, Action::Send(Request { cookie, work }))
    }

    fn parting(&mut self, now: Duration, parting: Parting, event: Event) -> Action {
        let Parting { token, cookie, deadline } = parting;
        let trouble = match event {
            Event::Reply { cookie: answered, error: None } if answered == cookie => {
                return self.leave(Outcome::Arrived { acknowledged: true });
            }
            Event::Done | Event::Tick if now < deadline => {
                return self.enter(Phase::Parting(parting), Action::Wait { until: deadline });
            }
            Event::Done | Event::Tick => Trouble::Stuck(self.job.patience),
            event => link_trouble(event),
        };
        self.news.push_back(News::InDoubt(trouble));
        self.enter(Phase::Doubt { token, ask_at: now }, Action::HangUp)
    }

    /// The acknowledgement did not come: ask until somebody knows.
    fn doubt(&mut self, now: Duration, token: Token, ask_at: Duration, event: Event) -> Action {
        let later = Phase::Doubt { token, ask_at: now + RETRY_EVERY };
        match event {
            Event::Greeted(peer) => match fate(peer.answer.as_ref(), Some(token)) {
                Fate::Arrived => self.leave(Outcome::Arrived { acknowledged: true }),
                Fate::NotArrived => self.not_arrived(now, token, peer),
                Fate::Unknown => self.enter(later, Action::HangUp),
            },
            Event::Unreachable(_) => self.enter(later, Action::Wait { until: now + RETRY_EVERY }),
            _ if now < ask_at => {
                self.enter(Phase::Doubt { token, ask_at }, Action::Wait { until: ask_at })
            }
            _ => {
                self.undo.link = true;
                let question = Action::Connect(self.job.question());
                self.enter(Phase::Doubt { token, ask_at }, question)
            }
        }
    }

    /// What was sent so far cannot make the disk arrive. Does that process have the whole copy?
    fn not_arrived(&mut self, now: Duration, token: Token, peer: Peer) -> Action {
        let complete = peer.answer.is_some_and(|answer| answer.has == Has::Incomplete);
        if complete && peer.token() == Some(token) && peer.unfit(&self.job).is_none() {
            self.news.push_back(News::HandingOverAgain);
            return self.hand_over(now, token);
        }
        self.fail(now, Trouble::Lost("the destination has lost its copy".to_owned()))
    }

    // Leaving: the destination has the disk.

    fn leave(&mut self, outcome: Outcome) -> Action {
        self.enter(Phase::Leaving(Leaving::Retiring, outcome), Action::Retire)
    }

    fn leaving(&mut self, step: Leaving, outcome: Outcome, event: Event) -> Action {
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
                (Leaving::Recording, Action::Record(Note::Departed))
            }
            Leaving::Recording => (Leaving::Disconnecting, goodbye),
            Leaving::Disconnecting => return self.end(outcome),
        };
        self.enter(Phase::Leaving(next, outcome), action)
    }

    fn note_failure(&mut self, event: Event) -> bool {
        let Event::Failed(why) = event else { return false };
        self.news.push_back(News::RecordFailed(why));
        true
    }

    // Undoing: every failure before the handover, and nothing else, comes here.

    fn fail(&mut self, now: Duration, trouble: Trouble) -> Action {
        if !self.started {
            return self.undo(now, Then::End(Outcome::Failed(trouble)));
        }
        if !self.told {
            self.told = true;
            self.news.push_back(News::Retrying(trouble));
        }
        self.undo(now, Then::Retry)
    }

    fn undo(&mut self, now: Duration, then: Then) -> Action {
        self.meter.lost();
        self.chase = Chase::new(self.job.pause);
        self.undoing(now, then, Event::Done)
    }

    fn undoing(&mut self, now: Duration, then: Then, event: Event) -> Action {
        self.note_failure(event);
        let action = if std::mem::take(&mut self.undo.link) {
            Action::HangUp
        } else if std::mem::take(&mut self.undo.record) {
            Action::Record(Note::Before)
        } else if !self.unlinked && std::mem::take(&mut self.undo.gate) {
            Action::OpenGate
        } else if std::mem::take(&mut self.undo.hold) {
            self.held = Duration::ZERO;
            Action::Hold(self.held)
        } else {
            return self.undone(now, then);
        };
        self.enter(Phase::Undoing(then), action)
    }

    fn undone(&mut self, now: Duration, then: Then) -> Action {
        match then {
            Then::End(outcome) => self.end(outcome),
            Then::Retry => {
                let until = now + RETRY_EVERY;
                self.enter(Phase::Resting { until }, Action::Wait { until })
            }
        }
    }
}

/// What an event means that was none of those hoped for.
fn link_trouble(event: Event) -> Trouble {
    match event {
        Event::Lost(why) => Trouble::Lost(why),
        Event::Reply { error: Some(error), .. } => Trouble::ErrorReply(error),
        Event::Reply { cookie, error: None } => Trouble::Cookie(cookie),
        Event::Unreachable(trouble) => trouble,
        Event::Failed(why) => Trouble::Local(why),
        _ => Trouble::Confused("something unexpected happened on the connection"),
    }
}

#[cfg(test)]
mod tests;
