//! For tests: mistakes built into the code on purpose, which the simulation of the session engine must
//! find. Never in a released program.

use std::cell::Cell;

/// A mistake that an engineer could make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mutation {
    /// A change that was an operation in flight is not marked dirty.
    ForgetMark,
    /// A flush is answered before the concurrent flushes have reported.
    SkipVerification,
    /// A change starts although it overlaps an earlier one.
    StartOverlapping,
    /// Nothing asks for a notification when the gate opens.
    MissGate,
    /// A long write is answered when its data has arrived.
    AnswerLongEarly,
    /// A read whose data is loaded is not saved.
    DropLoadedRead,
    /// The driver suspends a session with operations in flight.
    SuspendBusy,
    /// The driver waits although an outcome has to be taken, and ignores notifications.
    MissNotification,
    /// The disk executes FLUSH without making anything durable.
    EmptyFlush,
    /// The disk executes a durable write as a plain one.
    DropDurability,
}

thread_local! {
    static ACTIVE: Cell<Option<Mutation>> = const { Cell::new(None) };
}

/// Sets the mistake that this thread makes.
pub(crate) fn set(mutation: Option<Mutation>) {
    ACTIVE.set(mutation);
}

/// Whether this thread makes this mistake.
pub(crate) fn is_active(mutation: Mutation) -> bool {
    ACTIVE.get() == Some(mutation)
}
