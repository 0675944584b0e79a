//! For tests: mistakes built into the code on purpose, which the simulation of the upstream machine must
//! find. Never in a released program.

/// A mistake that an engineer could make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum UpstreamMutation {
    /// A new connection gets the outstanding requests and no replay.
    SkipReplay,
    /// Changes are sent again before the replies to the replay.
    ResendBesideReplay,
    /// Of each segment the replay writes only as much as fits into one message.
    ReplayFirstPart,
    /// A replay that the server fails counts as done.
    IgnoreReplayError,
    /// Requests are sent again in order of arrival, reads before later changes.
    ResendInOrder,
    /// A request continues on a new connection where it was on the lost one.
    KeepProgress,
    /// Acknowledged changes are not kept.
    ForgetAcknowledged,
    /// A flush counts for everything acknowledged before its reply.
    StampFlushLate,
    /// The machine's own flush counts for everything acknowledged before its reply.
    StampOwnFlushLate,
    /// A durable write leaves older changes of its range to be replayed.
    KeepUnderDurable,
    /// A trim leaves older changes of its range to be replayed.
    KeepTrimmed,
    /// The rest of a segment of which the first part was replaced begins with the data of that part.
    MisplaceRest,
    /// A failure of the machine's own flush is ignored.
    IgnoreFlushError,
    /// A client's flush completes while the machine's own one is in flight.
    CompleteBesideFlush,
    /// The machine waits for a flush that was lost with its connection.
    ForgetOwnFlush,
    /// Changes that wait for memory are not released.
    KeepHeld,
    /// Changes are sent without regard to memory.
    IgnoreBound,
    /// Spare buffers are kept without regard to the changes that need their memory.
    KeepSpares,
    /// Operations of an ended session complete while the server may execute them.
    CancelConnected,
    /// Changes of an ended session that a server may have executed are not sent again.
    ForgetCancelled,
    /// A command or flag is used that the first server did not offer.
    UseUnpromised,
    /// A zeroing that is sent again may still fail because it is slow.
    StayFast,
    /// A request gets its client's cookie although another message has it.
    ReuseCookie,
    /// A request that is sent again gets another cookie.
    RenameResent,
    /// A cookie is forgotten while its request waits to be sent again.
    ForgetCookie,
    /// The id of the disk is forgotten when a server does not tell it.
    ForgetDiskId,
    /// A reply is accepted over any connection.
    AcceptAnyCookie,
    /// A reply is accepted without its content.
    AcceptIncomplete,
    /// `ESHUTDOWN` is passed to the client.
    PassShutdown,
    /// A later message that succeeds hides the failure of an earlier one of the same request.
    ForgetError,
    /// The buffer of a read is not returned when the connection is lost.
    KeepBuffer,
}

crate::schedules::active_mutation!(pub(super) UpstreamMutation);
