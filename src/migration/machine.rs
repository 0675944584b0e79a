//! The source's whole life: what happened → what to do next.
//! Never connects, reads a clock, touches the disk or logs; [`Machine::step`] decides, others do.
//!
//! ```text
//!  Start ─▶ Greeting ─▶ Copying ⇄ Probing ─▶ Closing ─▶ Last ─▶ Flushing ─▶ Recording ─▶ Sealing ─▶ ┃Parting ─▶ Leaving ─▶ Ended
//!              │  ▲        │  ▲                 └─────────┴────────┴────────────┴──────────┤         ┃  │  ▲        ▲
//!              │  │        │  └──────── clients have waited long enough: gate, record ◀────┘         ┃  ▼  │"no"    │"arrived"
//!     not once │  │        ▼ any trouble, or break                                                   ┃ Doubt ───────┘
//!      greeted │  └── Resting ◀──────── Undoing ◀──────────────────────────────────────────────────────┤
//!              ▼       1 s                 │  link, gate, record, hold                               ┃  └─ unreachable: asks
//!         Ended(Failed)                    └─▶ Ended(Broken)                                         ┃     every second
//!                                                                                                    ┃
//!                              clients never notice                                     point of no return
//! ```
//!
//! * Left of the double line every failure ends in `Machine::undo`, the one place that takes back
//!   what was done: the connection is dropped (without a DISC), the gate opened, the record put
//!   back, writers let go; in this order, and then again from the start in a second, or over. The
//!   gate comes before the record, which may take long: no handover was sent, or the destination
//!   has said that it did not arrive, so that the disk is ours whatever the record says.
//! * Behind the closed gate everything has an end ([`Machine::freeze_end`]), at which the gate opens
//!   by itself, even if the machine is not asked by then. Only once it is sealed it stays closed.
//! * `Parting` means that HANDOVER may have reached the destination. The only ways out are its
//!   acknowledgement, and an answer in `Doubt`: *arrived* (leave), *not arrived and that
//!   connection is closed for good* (hand over again, or undo when the destination has lost the
//!   copy, or clients have waited for long). Whatever else happens, the gate stays closed.
//! * The record *departing* is durable before HANDOVER is sent, and where it cannot be written the
//!   migration ends; *departed* (or the deletion of the
//!   image) comes after the acknowledgement.
//! * A destination without the private option cannot acknowledge. To it: last write, FLUSH,
//!   *departing*, deletion if ordered, DISC, *departed*. Its arm is `LegacyHandover`.

mod closing;
mod copying;
mod parting;

pub use parting::ASK_AFTER;

use super::freeze::{Backoff, Freeze, Probe};
use super::job::{
    Action, DestinationInfo, Event, Job, News, Obstacle, OperatorRequest, Outcome, Progress,
    RecordKind, SIZE_MIN, Stage, TooLate, Trouble,
};
use super::pace::{Convergence, Meter, Speed};
use super::plan::{Caps, CopyPlan};
use super::wire::{Has, Token};
use std::collections::VecDeque;
use std::time::Duration;

/// Time between one attempt and the next.
pub const RETRY_EVERY: Duration = Duration::from_secs(1);

/// A record that cannot be put back is tried so often, once a second, before the migration ends; one
/// that goes on tries for ever.
pub const RECORD_TRIES: u32 = 4;

/// The same reason is told again after so long.
const TELL_AGAIN: Duration = Duration::from_secs(60);

/// One migration, seen from its source.
#[derive(Debug)]
pub struct Machine {
    job: Job,
    phase: Phase,
    plan: CopyPlan,
    speed: Speed,
    meter: Meter,
    /// Replies to requests up to this cookie say nothing about the rate of what is left: they were
    /// large, as those of the first pass are.
    measured_from: u64,
    chase: Convergence,
    undo: Undo,
    owed: Option<UnrestoredRecord>,
    probe: Probe,
    backoff: Backoff,
    /// The gate is closed, or being closed.
    freeze: Option<Freeze>,
    /// Which process has what the plan believes acknowledged.
    copied_to: Option<(Token, Caps)>,
    /// The hold that was ordered last.
    held: Duration,
    started: bool,
    /// The image is deleted: the gate must not open again, and the copy has to arrive.
    unlinked: bool,
    breaking: bool,
    /// Why it does not go on just now.
    obstacle: Option<Obstacle>,
    /// The last such reason that was told, and when.
    told: Option<(Obstacle, Duration)>,
    /// The copy was told to have failed, and not yet that it goes on.
    interrupted: bool,
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
    /// The record is being put back: the next event tells whether it was.
    restoring: bool,
}

/// A record that could not be put back, although the disk stays.
#[derive(Clone, Copy, Debug)]
struct UnrestoredRecord {
    /// When to try again.
    at: Duration,
    /// How often it was tried.
    tries: u32,
}

#[derive(Debug)]
enum Phase {
    Start,
    Greeting,
    Copying(LinkState),
    Probing(LinkState),
    Closing(LinkState),
    Last(LinkState),
    Flushing(LinkState),
    Recording(LinkState),
    Sealing(LinkState),
    Farewell(LinkState, LegacyHandover),
    Parting(Parting),
    Doubt(Doubt),
    Leaving(Leaving, Outcome),
    Undoing(AfterRecord),
    Resting { until: Duration },
    Ended(Outcome),
}

/// The connection to the destination.
#[derive(Clone, Copy, Debug)]
struct LinkState {
    peer: DestinationInfo,
    /// When it last got something done.
    heard: Duration,
    flush: Flush,
    /// FLUSHes in a row that took long.
    slow_flushes: u32,
}

/// The last FLUSH that was sent. Most are sent while the gate is still open.
#[derive(Clone, Copy, Debug)]
enum Flush {
    Never,
    Asked { cookie: u64, at: Duration },
    Done { at: Duration, took: Duration },
}

/// HANDOVER was sent.
#[derive(Clone, Copy, Debug)]
struct Parting {
    token: Token,
    cookie: u64,
    /// When to ask for it.
    ask_at: Duration,
}

/// Nobody knows what has become of the handover.
#[derive(Clone, Copy, Debug)]
struct Doubt {
    token: Token,
    /// The handover's cookie, while its connection may still bring the acknowledgement.
    awaited: Option<u64>,
    ask_at: Duration,
}

#[derive(Clone, Copy, Debug)]
enum LegacyHandover {
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
enum AfterRecord {
    Retry,
    End(Outcome),
    /// Only clients are let go: the copy goes on over this connection.
    GoOn(LinkState),
}

/// Whether clients may write while the copy goes on.
#[derive(Clone, Copy, PartialEq, Eq)]
enum WriteAccess {
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
            plan: CopyPlan::new(job.size, job.limits),
            speed: Speed::new(job.speed),
            meter: Meter::new(now),
            chase: Convergence::new(job.pause),
            measured_from: 0,
            undo: Undo::default(),
            owed: None,
            probe: Probe::default(),
            backoff: Backoff::default(),
            freeze: None,
            copied_to: None,
            held: Duration::ZERO,
            started: false,
            unlinked: false,
            breaking: false,
            obstacle: None,
            told: None,
            interrupted: false,
            cookie: 0,
            news: VecDeque::new(),
            job,
        })
    }

    /// What is to be done now that `event` has happened.
    pub fn step(&mut self, now: Duration, event: Event) -> Action {
        if self.breaking && self.may_break() {
            self.breaking = false;
            self.note_restored(now, event);
            return self.undo(now, AfterRecord::End(Outcome::Broken));
        }
        match std::mem::replace(&mut self.phase, Phase::Start) {
            Phase::Start => self.connect(),
            Phase::Greeting => self.greeting(now, event),
            Phase::Copying(link) => self.copying(now, link, event, WriteAccess::Open),
            Phase::Probing(link) => self.probing(now, link, event),
            Phase::Closing(link) => self.closing(now, link, event),
            Phase::Last(link) => self.copying(now, link, event, WriteAccess::Closed),
            Phase::Flushing(link) => self.flushing(now, link, event),
            Phase::Recording(link) => self.recording(now, link, event),
            Phase::Sealing(link) => self.sealing(now, link, event),
            Phase::Farewell(link, step) => self.farewell(now, link, step, event),
            Phase::Parting(parting) => self.parting(now, parting, event),
            Phase::Doubt(doubt) => self.doubt(now, doubt, event),
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
    pub fn request(&mut self, request: OperatorRequest) -> Result<(), TooLate> {
        match request {
            OperatorRequest::Speed(limit) => self.speed.set_limit(limit),
            OperatorRequest::Break if self.may_break() => self.breaking = true,
            OperatorRequest::Break => return Err(TooLate),
        }
        Ok(())
    }

    /// Whether a `break` was ordered that has not been carried out yet.
    #[must_use]
    pub fn is_breaking(&self) -> bool {
        self.breaking
    }

    /// When the gate, if it is closed, opens by itself.
    #[must_use]
    pub fn freeze_end(&self) -> Option<Duration> {
        self.freeze.and_then(|freeze| freeze.until())
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
            id: self.job.id,
            stage: self.stage(),
            bytes_per_second: self.meter.speed(now),
            seconds_left: self.meter.seconds_left(now, bytes_left),
            bytes_left,
            speed_limit: self.speed.limit(),
            passes: self.plan.passes(),
            hold: self.held,
            owes_record: self.owed.is_some(),
            obstacle: self.obstacle.clone().or_else(|| {
                let holds = self.held > Duration::ZERO && self.freeze.is_none();
                holds.then_some(Obstacle::Writers)
            }),
        }
    }

    /// Where it is.
    #[must_use]
    pub fn stage(&self) -> Stage {
        match &self.phase {
            Phase::Undoing(AfterRecord::GoOn(_)) => Stage::Copying,
            Phase::Start | Phase::Greeting | Phase::Resting { .. } | Phase::Undoing(_) => {
                Stage::Connecting
            }
            Phase::Copying(_) | Phase::Probing(_) => Stage::Copying,
            Phase::Closing(_) | Phase::Last(_) | Phase::Flushing(_) => Stage::Closing,
            Phase::Recording(_) | Phase::Sealing(_) | Phase::Farewell(..) | Phase::Parting(_) => {
                Stage::HandingOver
            }
            Phase::Doubt(_) => Stage::InDoubt,
            Phase::Leaving(..) => Stage::Leaving,
            Phase::Ended(_) => Stage::Ended,
        }
    }

    /// Whether the disk is still ours to keep.
    fn may_break(&self) -> bool {
        let gone = matches!(
            self.phase,
            Phase::Parting(_) | Phase::Doubt(_) | Phase::Leaving(..) | Phase::Ended(_)
        );
        let listening = matches!(self.phase, Phase::Farewell(_, LegacyHandover::Listening));
        let leaving = matches!(self.phase, Phase::Farewell(..)) && !listening || self.unlinked;
        !gone && !leaving && !matches!(self.phase, Phase::Undoing(AfterRecord::End(_)))
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
    fn welcome(&mut self, now: Duration, peer: DestinationInfo) -> Action {
        let process = peer.token().map(|token| (token, peer.caps));
        let has_copy = peer.answer.is_some_and(|answer| answer.has == Has::Incomplete);
        let resume = has_copy && process.is_some() && process == self.copied_to;
        if resume {
            self.plan.resume();
        } else if self.copied_to.take().is_some() {
            // Another process may have another image: a name of its own for every copy keeps
            // an answer about one from being taken for an answer about the other.
            self.job.id = self.job.id.next();
            return self.undo(now, AfterRecord::Retry);
        } else {
            self.plan.restart(peer.caps);
        }
        self.copied_to = process;
        match (self.started, resume) {
            (false, _) => self.news.push_back(News::Started),
            (true, _) if !self.interrupted => {}
            (true, true) => self.news.push_back(News::Resumed),
            (true, false) => self.news.push_back(News::Restarted),
        }
        (self.started, self.interrupted, self.obstacle) = (true, false, None);
        self.chase.began(now);
        let gate = if self.unlinked { WriteAccess::Closed } else { WriteAccess::Open };
        self.copy(now, LinkState { peer, heard: now, flush: Flush::Never, slow_flushes: 0 }, gate)
    }

    // Undoing: every failure before the handover, and nothing else, comes here.

    fn fail(&mut self, now: Duration, trouble: Trouble) -> Action {
        let cannot_be_read = matches!(trouble, Trouble::Unreadable(_)) && !self.unlinked;
        if !self.started || cannot_be_read {
            return self.undo(now, AfterRecord::End(Outcome::Failed(trouble)));
        }
        self.interrupted |= self.obstructed(now, Obstacle::Trouble(trouble));
        self.undo(now, AfterRecord::Retry)
    }

    /// Tells why it does not go on, unless that was told last. Returns whether it was told.
    fn obstructed(&mut self, now: Duration, obstacle: Obstacle) -> bool {
        self.obstacle = Some(obstacle.clone());
        let is_old =
            |(told, at): &(Obstacle, Duration)| told.is_like(&obstacle) && now < *at + TELL_AGAIN;
        if self.told.as_ref().is_some_and(is_old) {
            return false;
        }
        self.told = Some((obstacle.clone(), now));
        self.news.push_back(News::Obstructed(obstacle));
        true
    }

    fn undo(&mut self, now: Duration, then: AfterRecord) -> Action {
        self.meter.lost();
        self.chase = Convergence::new(self.job.pause);
        self.owed = self.owed.map(|_| UnrestoredRecord { at: now, tries: 0 });
        self.undoing(now, then, Event::Done)
    }

    fn undoing(&mut self, now: Duration, then: AfterRecord, event: Event) -> Action {
        self.note_restored(now, event);
        let goes_on = matches!(then, AfterRecord::GoOn(_));
        let gives_up = matches!(then, AfterRecord::End(_)) && self.owes_in_vain();
        let action = if !goes_on && std::mem::take(&mut self.undo.link) {
            Action::HangUp
        } else if !self.unlinked && std::mem::take(&mut self.undo.gate) {
            self.closed_in_vain(now);
            Action::OpenGate
        } else if std::mem::take(&mut self.undo.record) || self.owes_now(now) && !gives_up {
            self.undo.restoring = true;
            Action::Record(RecordKind::Before)
        } else if !goes_on && std::mem::take(&mut self.undo.hold) {
            self.held = Duration::ZERO;
            Action::Hold(self.held)
        } else {
            return self.undone(now, then);
        };
        self.enter(Phase::Undoing(then), action)
    }

    /// If the record was being put back, `event` tells whether it was.
    fn note_restored(&mut self, now: Duration, event: Event) {
        if !std::mem::take(&mut self.undo.restoring) {
            return;
        }
        let before = self.owed.take();
        if let Event::Failed(why) = event {
            if before.is_none() {
                self.news.push_back(News::RecordFailed(why));
            }
            let tries = before.map_or(0, |owed| owed.tries) + 1;
            self.owed = Some(UnrestoredRecord { at: now + RETRY_EVERY, tries });
        }
    }

    /// Whether it is time to try again to put the record back.
    fn owes_now(&self, now: Duration) -> bool {
        self.owed.is_some_and(|owed| now >= owed.at)
    }

    fn owes_in_vain(&self) -> bool {
        self.owed.is_some_and(|owed| owed.tries >= RECORD_TRIES)
    }

    fn undone(&mut self, now: Duration, then: AfterRecord) -> Action {
        match (then, self.owed) {
            (AfterRecord::End(outcome), Some(UnrestoredRecord { at, .. }))
                if !self.owes_in_vain() =>
            {
                self.enter(Phase::Undoing(AfterRecord::End(outcome)), Action::Wait { until: at })
            }
            (AfterRecord::End(outcome), _) => self.end(outcome),
            (AfterRecord::GoOn(link), _) => {
                self.plan.look_again();
                self.copy(now, link, WriteAccess::Open)
            }
            (AfterRecord::Retry, _) => {
                let until = now + RETRY_EVERY;
                self.enter(Phase::Resting { until }, Action::Wait { until })
            }
        }
    }
}

/// What an event means that was none of those hoped for.
fn link_trouble(event: Event) -> Trouble {
    match event {
        Event::Lost(why) | Event::Unsent(why) => Trouble::Lost(why),
        Event::Unreadable(why) => Trouble::Unreadable(why),
        Event::Reply { error: Some(error), .. } => Trouble::ErrorReply(error),
        Event::Reply { cookie, error: None } => Trouble::Cookie(cookie),
        Event::Unreachable(trouble) => trouble,
        Event::Failed(why) => Trouble::Local(why),
        _ => Trouble::Confused("something unexpected happened on the connection"),
    }
}

#[cfg(test)]
mod tests;
