//! The state machine of the source, from connecting to the end: event in, action out.
//! Never connects, reads a clock, touches the disk or logs; [`Machine::step`] decides, the caller
//! acts. `machine/transitions.txt` lists every transition; tests keep it true.
//!
//! ```text
//!  Start ─▶ Connecting ◀──────────────────── 1 s ─────────────────── BackingOff
//!               ▼                                                        ▲
//!           Copying ⇄ Probing ─────────────── any trouble, or break ─▶ Undoing ─▶ Ended
//!               ▲        ▼                                             ▲ │  ▲
//!               │   ClosingGate ──▶ FinalCopy ──▶ Flushing ────────────┤ │  │
//!               │                                    ▼                 │ │  │
//!               │   CheckingLink ◀─ SealingGate ◀─ Recording ──────────┘ │  │
//!               │        │                                               │  │
//!               └────────│──────────── gate closed for too long ─────────┘  │
//!                        │                                                  │
//!  ━━━━━━━━━━━━━━━━━━━━━━│━━━━━━━━━━━ point of no return ━━━━━━━━━━━━━━━━━━━│━━━━━━━━━━━━━━━━━━━
//!                        ▼                                                  │
//!                   HandingOver ─────── no acknowledgement ────▶ InDoubt ───┘ not arrived
//!                        │ acknowledged                           │  └─ unknown: asks every second
//!                        ▼                                        │
//!           Ended ◀── Leaving ◀─────────────── arrived ───────────┘
//! ```
//!
//! * Above the double line failures cost clients no more than a pause. Every failure leads to
//!   `Undoing`: it closes the connection (without a DISC), opens the gate, restores the record, and
//!   stops throttling, in this order. Then the machine retries after a second, or ends.
//! * Every step behind the closed gate has a time limit ([`Machine::freeze_end`]), at which the
//!   gate opens by itself, even during an action. Only a sealed gate stays closed.
//! * In `HandingOver`, HANDOVER may have reached the destination. The machine leaves this state
//!   only by its acknowledgement, or by an answer in `InDoubt`: *arrived* (leave), or *not arrived,
//!   and that connection is closed for good* (send another handover; or undo, if the destination
//!   has lost the copy or clients have waited for long). In all other cases the gate stays closed.
//! * The record *departing* is durable before HANDOVER is sent; if it cannot be written, the
//!   migration ends. *Departed* (or the deletion of the image) follows the acknowledgement.
//! * A destination without the private option cannot acknowledge. The phase is then
//!   `LegacyHandover`, the order: last write, FLUSH, *departing*, deletion if requested, DISC,
//!   *departed*.
//! * With relay, `Leaving` opens the gate again, but only on the destination's disk, and only after
//!   *departed* is durable ([`Action::Relay`]).
//!
//! Each group of phases has a file with its handlers. They share `context::Context`, return a
//! `phase::Next` and never call handlers of another phase; [`Machine::step`] executes the result.

mod closing;
mod connecting;
mod context;
mod copying;
mod handover;
mod leaving;
mod phase;
mod undoing;

pub use context::{RECORD_TRIES, RETRY_EVERY};
pub use handover::ASK_AFTER;
pub use leaving::{RELAY_RETRY_EVERY, RELAY_WAIT_MAX};

use super::job::{
    Action, Event, Job, News, Obstacle, OperatorRequest, Outcome, Progress, SIZE_MIN, Stage,
    TooLate,
};
use context::Context;
use phase::{AfterUndo, Handled, Next, Phase, WriteAccess};
use std::time::Duration;

/// One migration, seen from its source.
#[derive(Clone, Debug)]
pub struct Machine {
    phase: Phase,
    context: Context,
    break_requested: bool,
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
        Ok(Self { phase: Phase::Start, context: Context::new(job, now), break_requested: false })
    }

    /// The next action, after `event` as the result of the last one.
    pub fn step(&mut self, now: Duration, event: Event) -> Action {
        let handled = if self.break_requested && self.may_break() {
            self.break_requested = false;
            undoing::note_restored(&mut self.context, now, event);
            Ok(Next::Undo(AfterUndo::End(Outcome::Broken)))
        } else {
            self.handle(now, event)
        };
        let (phase, action) = self.follow(now, handled);
        self.phase = phase;
        action
    }

    fn handle(&mut self, now: Duration, event: Event) -> Handled {
        let cx = &mut self.context;
        match self.phase.clone() {
            Phase::Start => Ok(connecting::connect(cx)),
            Phase::Connecting => connecting::connecting(cx, now, event),
            Phase::Copying(link) => copying::copying(cx, now, link, event, WriteAccess::Open),
            Phase::Probing(link) => closing::probing(cx, now, link, event),
            Phase::ClosingGate(link) => closing::closing(cx, now, link, event),
            Phase::FinalCopy(link) => copying::copying(cx, now, link, event, WriteAccess::Closed),
            Phase::Flushing(link) => closing::flushing(cx, now, link, event),
            Phase::Recording(link) => closing::recording(cx, now, link, event),
            Phase::SealingGate(link) => closing::sealing(cx, now, link, event),
            Phase::CheckingLink(link) => handover::checking_link(cx, now, link, event),
            Phase::LegacyHandover(link, step) => handover::legacy(cx, link, step, event),
            Phase::HandingOver(sent) => handover::handing_over(cx, now, sent, event),
            Phase::InDoubt(doubt) => handover::in_doubt(cx, now, doubt, event),
            Phase::Leaving(step, outcome) => Ok(leaving::leaving(cx, now, step, outcome, event)),
            Phase::Undoing(then) => Ok(undoing::undoing(cx, now, then, event)),
            Phase::BackingOff { until } if now >= until => Ok(connecting::connect(cx)),
            Phase::BackingOff { until } => {
                Ok(Next::Do(Phase::BackingOff { until }, Action::Wait { until }))
            }
            Phase::Ended(outcome) => {
                Ok(Next::Do(Phase::Ended(outcome.clone()), Action::End(outcome)))
            }
        }
    }

    /// The phase and action that a handler's result leads to.
    fn follow(&mut self, now: Duration, mut handled: Handled) -> (Phase, Action) {
        let cx = &mut self.context;
        loop {
            handled = match handled.unwrap_or_else(|trouble| cx.on_trouble(now, trouble)) {
                Next::Do(phase, action) => return (phase, action),
                Next::Copy(link, WriteAccess::Open) => copying::copy(cx, now, link),
                Next::Copy(link, WriteAccess::Closed) => closing::copy_rest(cx, now, link),
                Next::Undo(then) => Ok(undoing::begin(cx, now, then)),
            };
        }
    }

    /// Takes an operator's request between two steps; the next step executes it.
    ///
    /// # Errors
    /// [`TooLate`] for a `break` after the handover was sent.
    pub fn request(&mut self, request: OperatorRequest) -> Result<(), TooLate> {
        match request {
            OperatorRequest::Speed(limit) => self.context.speed.set_limit(limit),
            OperatorRequest::Break if self.may_break() => self.break_requested = true,
            OperatorRequest::Break => return Err(TooLate),
        }
        Ok(())
    }

    /// Whether a `break` was requested that has not been executed yet.
    #[must_use]
    pub fn is_breaking(&self) -> bool {
        self.break_requested
    }

    /// When the gate, if it is closed, opens by itself.
    #[must_use]
    pub fn freeze_end(&self) -> Option<Duration> {
        self.context.freeze.and_then(|freeze| freeze.until())
    }

    /// The next event worth reporting, oldest first.
    pub fn news(&mut self) -> Option<News> {
        self.context.news.pop_front()
    }

    /// The job; its id is that of the current copy.
    #[must_use]
    pub fn job(&self) -> &Job {
        &self.context.job
    }

    /// The name of the phase, for tests and their traces.
    #[must_use]
    pub fn phase_name(&self) -> &'static str {
        self.phase.name()
    }

    /// The progress of the migration.
    #[must_use]
    pub fn progress(&self, now: Duration) -> Progress {
        let cx = &self.context;
        let bytes_left = cx.plan.left();
        Progress {
            id: cx.job.id,
            stage: self.stage(),
            bytes_per_second: cx.meter.speed(now),
            seconds_left: cx.meter.seconds_left(now, bytes_left),
            bytes_left,
            speed_limit: cx.speed.limit(),
            passes: cx.plan.passes(),
            write_delay: cx.write_delay,
            record_unrestored: cx.unrestored.is_some(),
            obstacle: cx.obstacle.clone().or_else(|| {
                let throttles = cx.write_delay > Duration::ZERO && cx.freeze.is_none();
                throttles.then_some(Obstacle::Writers)
            }),
        }
    }

    /// The stage of the migration, for operators.
    #[must_use]
    pub fn stage(&self) -> Stage {
        match &self.phase {
            Phase::Undoing(AfterUndo::Resume(_)) => Stage::Copying,
            Phase::Start | Phase::Connecting | Phase::BackingOff { .. } | Phase::Undoing(_) => {
                Stage::Connecting
            }
            Phase::Copying(_) | Phase::Probing(_) => Stage::Copying,
            Phase::ClosingGate(_) | Phase::FinalCopy(_) | Phase::Flushing(_) => Stage::Closing,
            Phase::Recording(_)
            | Phase::SealingGate(_)
            | Phase::CheckingLink(_)
            | Phase::LegacyHandover(..)
            | Phase::HandingOver(_) => Stage::HandingOver,
            Phase::InDoubt(_) => Stage::InDoubt,
            Phase::Leaving(..) => Stage::Leaving,
            Phase::Ended(_) => Stage::Ended,
        }
    }

    /// Whether the disk is still ours, and the migration is not ending already.
    fn may_break(&self) -> bool {
        let is_too_late = matches!(
            self.phase,
            Phase::LegacyHandover(..)
                | Phase::HandingOver(_)
                | Phase::InDoubt(_)
                | Phase::Leaving(..)
                | Phase::Undoing(AfterUndo::End(_))
                | Phase::Ended(_)
        );
        !is_too_late && !self.context.unlinked
    }
}

#[cfg(test)]
mod tests;
