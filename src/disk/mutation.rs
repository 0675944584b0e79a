//! For tests: mistakes built into the code on purpose, which the simulation of the session engine must
//! find. Never in a released program.

/// A mistake that an engineer could make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mutation {
    /// A change that was an operation in flight is not marked dirty.
    ForgetMark,
    /// A part of a zeroing or trim is not marked dirty.
    ForgetPart,
    /// A zeroing does not leave the gate between two parts.
    StayInside,
    /// A visit stays inside after its operation has completed.
    KeepVisit,
    /// A session has more operations in flight than it may.
    ExceedOperations,
    /// The operations of a session hold more bytes to write than they may.
    ExceedBytes,
    /// Some completions are ignored.
    LoseCompletion,
    /// Durable requests are answered without a flush.
    AnswerBeforeFlush,
    /// The executing changes of a session that has ended do not keep later ones waiting.
    ReleaseChanges,
    /// Operations whose completion is lost do not keep the gate from closing.
    ReleaseAbandoned,
    /// A flush whose completion is lost counts as successful.
    ForgetLostFlush,
    /// A flush is answered before the concurrent flushes have reported.
    SkipVerification,
    /// A change starts although it overlaps an earlier one.
    StartOverlapping,
    /// Nothing asks for a notification when the gate opens.
    MissGate,
    /// A long write is answered when its data has arrived.
    AnswerLongEarly,
    /// A block status is answered without its extents.
    DropExtents,
    /// A request is answered twice.
    AnswerTwice,
    /// A read returns the beginning of the loaded bytes, whatever its offset.
    MisplaceLoad,
    /// A read whose data is loaded is not saved.
    DropLoadedRead,
    /// A payload that is arriving is not saved.
    DropPayload,
    /// A piece of a payload lacks the bytes that had arrived before it had a buffer of its own.
    ForgetArrived,
    /// The payload of a rejected request is not skipped.
    KeepPayload,
    /// A session writes beside an overlapping change in flight.
    WriteBeside,
    /// Reads are answered although the send buffer is full.
    OverfillTx,
    /// A change begins without the record that has to be written first.
    SkipRecord,
    /// A session that has to end at once works until there is nothing to do.
    LeaveLate,
    /// A session that has to finish does not answer the requests that it has received.
    FinishEarly,
    /// A disconnect does not wait for the requests before it.
    DisconnectEarly,
    /// The policy is asked about a handover before earlier requests are completed.
    HandOverEarly,
    /// The policy does not learn that a change has failed.
    HideFailure,
    /// Requests after a disconnect are executed.
    AnswerDisconnected,
    /// A session does not notice that the disk is gone while its operations wait.
    SkipDiskCheck,
    /// The driver suspends a session with operations in flight.
    SuspendBusy,
    /// The driver waits although an outcome has to be taken, and ignores notifications.
    MissNotification,
    /// The disk executes FLUSH without making anything durable.
    EmptyFlush,
    /// The disk executes a durable write as a plain one.
    DropDurability,
}

crate::schedules::active_mutation!(pub(crate) Mutation);
