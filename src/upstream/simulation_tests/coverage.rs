//! What schedules reached, so that a test can assert that they reach everything.

macro_rules! situations {
    ($($name:ident: $doc:literal,)*) => {
        /// A situation that schedules have to reach.
        #[derive(Clone, Copy, Debug)]
        pub(super) enum UpstreamReached {
            $(#[doc = $doc] $name,)*
        }

        const REACHED: &[UpstreamReached] = &[$(UpstreamReached::$name,)*];
    };
}

situations! {
    Completed: "An operation succeeds.",
    Failed: "An operation fails with an error of the server.",
    SlowZero: "A zeroing is refused because it would be slow.",
    Described: "Extents with a hole are returned.",
    Declined: "The machine declines a durable write that takes two messages.",
    Connected: "Connections replace lost ones.",
    Several: "There are several connections.",
    OtherDialect: "The replacement speaks another dialect.",
    Replayed: "The server receives a replay.",
    Resent: "The server receives a change that was sent before.",
    ClientCookie: "A request has the cookie that its client has chosen.",
    OwnCookie: "A request of one message has a cookie that the machine has chosen.",
    Held: "A change waits for memory.",
    Spared: "A buffer of a flushed change is kept.",
    OwnFlush: "The machine flushes by itself.",
    OwnFlushFailed: "The machine's own flush fails.",
    FlushFailed: "A client's flush fails.",
    Probed: "A probe is answered.",
    Blocked: "A socket takes only a part of the bytes.",
    Direct: "Data is received into the buffer of its read.",
    Abandoned: "A connection is lost while data arrives in the buffer of its read.",
    Hole: "A read is answered with a hole.",
    Shuffled: "The chunks of a read arrive in another order.",
    ErrorChunk: "An error arrives between the chunks of a read.",
    Cut: "The connections are cut.",
    Killed: "The server process is killed.",
    PowerCut: "The host of the server loses power.",
    Undone: "A power cut undoes changes.",
    Late: "Requests are executed after the connection is lost.",
    Lingering: "A request of a lost connection is executed beside those of a new one.",
    Migrated: "The disk moves to another server.",
    ShutDown: "The server answers that it is shutting down.",
    Unreachable: "An address refuses the connection.",
    OtherDisk: "An address has another disk.",
    OtherDiskId: "The other disk may differ in nothing but its id.",
    ReplayFailed: "The server fails a replay.",
    Misbehaved: "The server breaks the protocol.",
    Ended: "A session ends.",
    Cancelled: "The operations of an ended session are cancelled.",
}

/// What one or more schedules reached.
#[derive(Clone, Copy)]
pub(super) struct UpstreamCoverage {
    counts: [u64; REACHED.len()],
}

impl Default for UpstreamCoverage {
    fn default() -> Self {
        Self { counts: [0; REACHED.len()] }
    }
}

impl UpstreamCoverage {
    pub(super) fn count(&mut self, event: UpstreamReached) {
        self.counts[event as usize] += 1;
    }

    pub(super) fn count_if(&mut self, condition: bool, event: UpstreamReached) {
        self.counts[event as usize] += u64::from(condition);
    }

    pub(super) fn add(&mut self, other: &Self) {
        self.counts.iter_mut().zip(other.counts).for_each(|(count, more)| *count += more);
    }

    /// A situation that was not reached.
    pub(super) fn missing(&self) -> Option<UpstreamReached> {
        REACHED.iter().find(|event| self.counts[**event as usize] == 0).copied()
    }
}

impl std::fmt::Debug for UpstreamCoverage {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_map().entries(REACHED.iter().zip(self.counts)).finish()
    }
}
