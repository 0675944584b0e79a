//! The phases of the machine with their data, and the result type of their handlers.
//! Never decides: the handlers in the files beside this one do.

use crate::migration::job::{Action, DestinationInfo, Event, Outcome, Trouble};
use crate::migration::wire::Token;
use std::time::Duration;

/// A phase of the machine, with its data.
#[derive(Clone, Debug)]
pub(super) enum Phase {
    Start,
    Connecting,
    Copying(LinkState),
    /// The in-flight requests of clients are probed before the gate closes.
    Probing(LinkState),
    ClosingGate(LinkState),
    /// The rest is copied behind the closed gate.
    FinalCopy(LinkState),
    Flushing(LinkState),
    /// The record *departing* is being made durable.
    Recording(LinkState),
    SealingGate(LinkState),
    /// The connection is checked for the last time before the handover.
    CheckingLink(LinkState),
    /// The handover to a destination that cannot acknowledge.
    LegacyHandover(LinkState, LegacyStep),
    HandingOver(SentHandover),
    InDoubt(Doubt),
    /// The destination owns the disk.
    Leaving(Leaving, Outcome),
    Undoing(AfterUndo),
    BackingOff {
        until: Duration,
    },
    Ended(Outcome),
}

impl Phase {
    /// The name in traces of tests and in `transitions.txt`.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Start => "Start",
            Self::Connecting => "Connecting",
            Self::Copying(_) => "Copying",
            Self::Probing(_) => "Probing",
            Self::ClosingGate(_) => "ClosingGate",
            Self::FinalCopy(_) => "FinalCopy",
            Self::Flushing(_) => "Flushing",
            Self::Recording(_) => "Recording",
            Self::SealingGate(_) => "SealingGate",
            Self::CheckingLink(_) => "CheckingLink",
            Self::LegacyHandover(_, LegacyStep::Unlinking) => "LegacyHandover(Unlinking)",
            Self::LegacyHandover(_, LegacyStep::Disconnecting) => "LegacyHandover(Disconnecting)",
            Self::HandingOver(_) => "HandingOver",
            Self::InDoubt(_) => "InDoubt",
            Self::Leaving(Leaving::Retiring, _) => "Leaving(Retiring)",
            Self::Leaving(Leaving::Unlinking, _) => "Leaving(Unlinking)",
            Self::Leaving(Leaving::Recording, _) => "Leaving(Recording)",
            Self::Leaving(Leaving::Disconnecting, _) => "Leaving(Disconnecting)",
            Self::Leaving(Leaving::Relaying { .. }, _) => "Leaving(Relaying)",
            Self::Leaving(Leaving::CuttingOff, _) => "Leaving(CuttingOff)",
            Self::Undoing(AfterUndo::Retry) => "Undoing(Retry)",
            Self::Undoing(AfterUndo::End(_)) => "Undoing(End)",
            Self::Undoing(AfterUndo::Resume(_)) => "Undoing(Resume)",
            Self::BackingOff { .. } => "BackingOff",
            Self::Ended(_) => "Ended",
        }
    }
}

/// The connection to the destination.
#[derive(Clone, Copy, Debug)]
pub(super) struct LinkState {
    pub(super) peer: DestinationInfo,
    /// Time of the last reply, or of the first request after a pause.
    pub(super) last_progress: Duration,
    pub(super) flush: Flush,
    /// Consecutive slow FLUSHes.
    pub(super) slow_flushes: u32,
}

/// The last FLUSH that was sent. Most are sent while the gate is still open.
#[derive(Clone, Copy, Debug)]
pub(super) enum Flush {
    Never,
    Asked { cookie: u64, at: Duration },
    Done { at: Duration, took: Duration },
}

/// HANDOVER was sent and may have arrived.
#[derive(Clone, Copy, Debug)]
pub(super) struct SentHandover {
    pub(super) token: Token,
    pub(super) cookie: u64,
    /// When to ask for the acknowledgement on a second connection.
    pub(super) ask_at: Duration,
}

/// The outcome of the handover is unknown.
#[derive(Clone, Copy, Debug)]
pub(super) struct Doubt {
    pub(super) token: Token,
    /// The handover's cookie, while its connection may still bring the acknowledgement.
    pub(super) awaited: Option<u64>,
    pub(super) ask_at: Duration,
}

/// The handover to a destination without the private option.
#[derive(Clone, Copy, Debug)]
pub(super) enum LegacyStep {
    Unlinking,
    Disconnecting,
}

/// The steps of this host after the destination owns the disk.
#[derive(Clone, Copy, Debug)]
pub(super) enum Leaving {
    Retiring,
    Unlinking,
    Recording,
    Disconnecting,
    /// Connecting to the destination's disk for the clients that wait, up to this time.
    Relaying {
        until: Duration,
    },
    /// Clients cannot be passed on: their sessions end.
    CuttingOff,
}

/// The continuation after undoing.
#[derive(Clone, Debug)]
pub(super) enum AfterUndo {
    /// Another attempt after [`super::RETRY_EVERY`].
    Retry,
    End(Outcome),
    /// Only gate and record are restored: the copy continues on this connection.
    Resume(LinkState),
}

/// Whether clients may write during the copy.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum WriteAccess {
    Open,
    Closed,
}

/// The reaction to an event. Handlers return it instead of calling each other, so that each reads
/// as rows of a table and the phases do not depend on one another.
pub(super) enum Next {
    /// Enter this phase and await the result of this action.
    Do(Phase, Action),
    /// Continue to copy over this link.
    Copy(LinkState, WriteAccess),
    /// Undo the effects of the attempt.
    Undo(AfterUndo),
}

/// The result of a handler. All failures lead to `Context::on_trouble`, and are undone.
pub(super) type Handled = Result<Next, Trouble>;

/// The trouble that an unsuccessful event stands for.
pub(super) fn link_trouble(event: Event) -> Trouble {
    match event {
        Event::Lost(why) | Event::Unsent(why) => Trouble::Lost(why),
        Event::Unreadable(why) => Trouble::Unreadable(why),
        Event::Reply { error: Some(error), .. } => Trouble::ErrorReply(error),
        Event::Reply { cookie, error: None } => Trouble::Cookie(cookie),
        Event::Unreachable(trouble) => trouble,
        Event::Failed(why) => Trouble::Local(why),
        event => impossible(&event),
    }
}

/// The only place for events that cannot be the result of the phase's action: a defect of the
/// caller. Debug builds panic; in others the attempt fails like any other, and is undone.
pub(super) fn impossible(event: &Event) -> Trouble {
    debug_assert!(false, "{} is no result of the action", event.name());
    Trouble::Unexpected("an action ended in a way that it cannot end")
}
