//! The inputs and outputs of the source's machine: job, events, actions, news, progress.
//! Never decides, except on whether a destination is compatible and what its answer means.

pub use super::trouble::{Obstacle, Trouble};

use super::plan::{BLOCK_MIN_MAX, Caps, Content, Limits};
use super::wire::{Answer, Handover, Has, Question, Token};
use crate::disk::ownership::{Id, Provenance, Record, RemoteAddress};
use crate::nbd::wire::TransmissionFlags;
use crate::range::Range;
use std::net::IpAddr;
use std::num::NonZeroU64;
use std::time::Duration;

/// Disks smaller than this cannot be migrated (flexnbd(1), MIRROR MODE).
pub const SIZE_MIN: u64 = 4096;

/// The parameters of one migration.
#[derive(Clone, Debug)]
pub struct Job {
    /// Random and never used before. The machine increments it for each copy that starts over.
    pub id: Id,
    /// Size of the disk in bytes.
    pub size: u64,
    /// The destination's address.
    pub to: RemoteAddress,
    /// The local address to connect from, if the operator chose one.
    pub from: Option<IpAddr>,
    /// Delete the image once the destination has it.
    pub unlink: bool,
    /// What clients were offered, if they stay and are passed on to the destination. `None` ends their
    /// sessions.
    pub relay: Option<OfferedTerms>,
    /// Provenance of the disk before the migration, restored if it fails.
    pub before: Provenance,
    /// Speed limit in bytes per second on the wire while the gate is open.
    pub speed: Option<NonZeroU64>,
    /// Limits of requests and of the data in flight.
    pub limits: Limits,
    /// Close the gate when the rest can be sent in this time.
    pub pause: Duration,
    /// A destination without progress for this time counts as lost.
    pub timeout: Duration,
}

impl Job {
    /// A job with default limits: a pause of 100 ms, a timeout of 60 s.
    #[must_use]
    pub fn new(id: Id, size: u64, to: RemoteAddress, before: Provenance) -> Self {
        Self {
            id,
            size,
            to,
            from: None,
            unlink: false,
            relay: None,
            before,
            speed: None,
            limits: Limits::default(),
            pause: Duration::from_millis(100),
            timeout: Duration::from_secs(60),
        }
    }

    /// The question with which the source introduces itself.
    #[must_use]
    pub fn question(&self) -> Question {
        Question { size: self.size, id: self.id }
    }

    /// The record of this kind; `when` is in seconds since 1970. `None`: the disk had no record.
    #[must_use]
    pub fn record(&self, kind: RecordKind, when: u64) -> Option<Record> {
        let (id, before, to) = (self.id, self.before, self.to.clone());
        match kind {
            RecordKind::Before => before.record(),
            RecordKind::Departing => Some(Record::Departing { id, before, to, from: self.from }),
            RecordKind::Departed => Some(Record::Departed { id, when, to }),
        }
    }
}

/// What clients were offered, and the server that they are passed on to has to offer as well. The default is
/// offered by every server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OfferedTerms {
    /// The commands.
    pub flags: TransmissionFlags,
    /// The smallest block, in bytes.
    pub block_min: u64,
}

impl Default for OfferedTerms {
    fn default() -> Self {
        Self { flags: TransmissionFlags::empty(), block_min: BLOCK_MIN_MAX }
    }
}

impl OfferedTerms {
    /// The flags that promise clients something; the others tell them how to use it.
    const PROMISES: TransmissionFlags = TransmissionFlags::SEND_FLUSH
        .union(TransmissionFlags::SEND_FUA)
        .union(TransmissionFlags::SEND_TRIM)
        .union(TransmissionFlags::SEND_WRITE_ZEROES)
        .union(TransmissionFlags::SEND_FAST_ZERO)
        .union(TransmissionFlags::SEND_CACHE);

    /// What the destination lacks of them, if anything.
    fn missing_at(&self, peer: &DestinationInfo) -> Option<Trouble> {
        let missing = (self.flags & Self::PROMISES) - peer.flags;
        if !missing.is_empty() {
            let names: Vec<_> = missing.iter_names().map(|(name, _)| name).collect();
            return Some(Trouble::Offers(names.join(", ")));
        }
        (peer.caps.block_min > self.block_min)
            .then(|| Trouble::Offers(format!("blocks of {} bytes", self.block_min)))
    }
}

/// The ownership records of a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RecordKind {
    /// The record from before the migration.
    Before,
    /// The handover is about to be sent.
    Departing,
    /// The destination has the disk.
    Departed,
}

/// The destination's export and its answer to the private option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DestinationInfo {
    /// Size of its export in bytes.
    pub size: u64,
    /// Its export is read-only.
    pub read_only: bool,
    /// It supports FLUSH.
    pub flush: bool,
    /// Its transmission flags.
    pub flags: TransmissionFlags,
    /// Its capabilities.
    pub caps: Caps,
    /// Its answer to the private option; `None` if it does not support the option.
    pub answer: Option<Answer>,
}

impl DestinationInfo {
    /// The token of the process, if it is a flexnbd that listens.
    #[must_use]
    pub fn token(&self) -> Option<Token> {
        self.answer.and_then(|answer| answer.listening)
    }

    /// Why the disk cannot be copied to this destination, if it cannot.
    pub(super) fn incompatibility(&self, job: &Job) -> Option<Trouble> {
        match self.answer {
            Some(Answer { listening: None, .. }) => return Some(Trouble::Serving),
            Some(Answer { has: Has::Arrived, .. }) => {
                return Some(Trouble::Unexpected(
                    "the destination claims to have the disk already",
                ));
            }
            _ => {}
        }
        let block = self.caps.block_min;
        let block_fits =
            block.is_power_of_two() && block <= BLOCK_MIN_MAX && job.size.is_multiple_of(block);
        if self.size != job.size {
            Some(Trouble::Size { local: job.size, remote: self.size })
        } else if self.read_only {
            Some(Trouble::ReadOnly)
        } else {
            let offers = || job.relay.and_then(|terms| terms.missing_at(self));
            (!block_fits).then_some(Trouble::BlockSize(block)).or_else(offers)
        }
    }
}

/// Whether a handover arrived, according to an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HandoverVerdict {
    /// The destination owns the disk.
    Arrived,
    /// The handover did not arrive, and no request sent so far can make it arrive.
    NotArrived,
    /// The server that answered does not know.
    Unknown,
}

/// Interprets the answer about a handover that was sent to the process `token`; `None` after a
/// restart of the source, which does not store the token.
///
/// *Nothing* from any other listening process proves nothing, because that process may receive into
/// another image. From the process that the handover was sent to, it proves that it did not arrive.
#[must_use]
pub fn handover_verdict(answer: Option<&Answer>, token: Option<Token>) -> HandoverVerdict {
    match answer {
        Some(Answer { has: Has::Arrived, .. }) => HandoverVerdict::Arrived,
        Some(Answer { has: Has::Incomplete, listening: Some(_) }) => HandoverVerdict::NotArrived,
        Some(Answer { listening: Some(same), .. }) if Some(*same) == token => {
            HandoverVerdict::NotArrived
        }
        _ => HandoverVerdict::Unknown,
    }
}

/// The result of an action.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The first event.
    Begin,
    /// `Connect` or `Ask` succeeded.
    Greeted(DestinationInfo),
    /// `Connect` or `Ask` failed; the new connection is closed.
    Unreachable(Trouble),
    /// `Look`: the content of the beginning of the range.
    Looked {
        /// Starts where the range of the action starts; not empty.
        range: Range,
        /// Its content.
        content: Content,
    },
    /// `TakeDirty`: the run taken, and the bytes still marked.
    Taken {
        /// `None` if there are no marks from that byte on.
        run: Option<Range>,
        /// See [`crate::disk::dirty::DirtyBitmap::bytes`].
        left: u64,
    },
    /// `Probe`: whether the requests have ended that were in flight at the last successful `Probe`.
    Visits {
        /// See [`crate::disk::Gate::turn_generation`].
        turned: bool,
    },
    /// `Wait`: a reply was received.
    Reply {
        /// The cookie of its request.
        cookie: u64,
        /// The NBD error, if any.
        error: Option<u32>,
    },
    /// `Send` or `Wait`: the connection failed, or the destination broke the protocol.
    Lost(String),
    /// `Send`: the connection failed before the first byte of the request was sent.
    Unsent(String),
    /// `Look` or `Send`: a part of the disk cannot be read. The connection is closed.
    Unreadable(String),
    /// `Wait`: the time has come, or an operator's request was made.
    Tick,
    /// The action succeeded.
    Done,
    /// The action failed on this host, for this reason.
    Failed(String),
}

impl Event {
    /// The name in traces of tests and in `machine/transitions.txt`.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Begin => "Begin",
            Self::Greeted(_) => "Greeted",
            Self::Unreachable(_) => "Unreachable",
            Self::Looked { .. } => "Looked",
            Self::Taken { .. } => "Taken",
            Self::Visits { .. } => "Visits",
            Self::Reply { error: None, .. } => "Reply",
            Self::Reply { error: Some(_), .. } => "Reply(error)",
            Self::Lost(_) => "Lost",
            Self::Unsent(_) => "Unsent",
            Self::Unreadable(_) => "Unreadable",
            Self::Tick => "Tick",
            Self::Done => "Done",
            Self::Failed(_) => "Failed",
        }
    }
}

/// The next operation of the source. Its result, after the arrow, is the next [`Event`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Connect, negotiate, and ask the private question. If the answer is that the disk has
    /// arrived, the transmission phase is not needed. → `Greeted`, `Unreachable`
    Connect(Question),
    /// The same on a second connection, which replaces the first once it is established: until then
    /// the first may still deliver a reply. → `Greeted`, `Unreachable`
    Ask(Question),
    /// Find the content of the beginning of this range: a hole, zeros or data. The result covers a
    /// part of any length. Clear the marks of that part before reading it: all of it will be sent.
    /// → `Looked`, `Unreadable`, `Failed` for want of memory
    Look(Range),
    /// Take marks: [`crate::disk::dirty::DirtyBitmap::take_next`]. → `Taken`
    TakeDirty {
        /// Byte offset.
        from: u64,
        /// Most bytes to take.
        longest: u64,
    },
    /// Send a request, and read the disk now. → `Done` (the kernel has it), `Lost`, `Unsent`,
    /// `Unreadable`, `Failed` as for `Look`
    Send(DestinationRequest),
    /// Wait for a reply, an operator's request, or this time. A reply already received comes first.
    /// → `Reply`, `Tick`, `Lost`
    Wait {
        /// On the clock of `now`.
        until: Duration,
    },
    /// Test whether in-flight requests of clients have ended. → `Visits`
    Probe,
    /// Close the gate and wait for all visits. From then on the gate opens by itself at
    /// [`super::machine::Machine::freeze_end`]. → `Done`; `Failed` if a visit lasts for longer than
    /// this, and the gate is then open again.
    CloseGate {
        /// How long to wait.
        within: Duration,
    },
    /// Stop the gate from opening by itself. → `Done`; `Failed` if it has opened
    Seal,
    /// Open the gate; it may be open already. → `Done`
    OpenGate,
    /// Delay each write of clients by this from now on; zero stops throttling. → `Done`
    Throttle(Duration),
    /// Make the ownership record durable. → `Done`, `Failed`
    Record(RecordKind),
    /// Delete the image durably. → `Done`, `Failed`
    Unlink,
    /// The destination owns the disk: end all sessions, without replies to their in-flight
    /// requests. → `Done`
    Retire,
    /// The clients at the closed gate stay. Connect to the server that has the disk; it must answer `proof`
    /// with *arrived*. Have its disk take the place of the image, turn new clients away, and open the gate.
    /// Without clients, do what `Retire` does. → `Done`; `Unreachable` if another attempt may succeed, and
    /// `Failed` if none can. Then nothing has changed
    Relay {
        /// `None` for a server that cannot answer.
        proof: Option<Question>,
    },
    /// Close the connection, if there is one, without a DISC: some destinations take a DISC to mean
    /// that the disk is complete. → `Done`
    HangUp,
    /// Send DISC if the connection is in transmission phase, and close it; ignore errors. → `Done`
    Disconnect,
    /// The migration has ended; there is no further step.
    End(Outcome),
}

impl Action {
    /// The name in traces of tests and in `machine/transitions.txt`.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Connect(_) => "Connect",
            Self::Ask(_) => "Ask",
            Self::Look(_) => "Look",
            Self::TakeDirty { .. } => "TakeDirty",
            Self::Send(DestinationRequest { kind, .. }) => match kind {
                RequestKind::Write(_) => "Send(Write)",
                RequestKind::Zero(_) => "Send(Zero)",
                RequestKind::Flush => "Send(Flush)",
                RequestKind::Handover(_) => "Send(Handover)",
                RequestKind::Disconnect => "Send(Disconnect)",
            },
            Self::Wait { .. } => "Wait",
            Self::Probe => "Probe",
            Self::CloseGate { .. } => "CloseGate",
            Self::Seal => "Seal",
            Self::OpenGate => "OpenGate",
            Self::Throttle(_) => "Throttle",
            Self::Record(RecordKind::Before) => "Record(Before)",
            Self::Record(RecordKind::Departing) => "Record(Departing)",
            Self::Record(RecordKind::Departed) => "Record(Departed)",
            Self::Unlink => "Unlink",
            Self::Retire => "Retire",
            Self::Relay { .. } => "Relay",
            Self::HangUp => "HangUp",
            Self::Disconnect => "Disconnect",
            Self::End(Outcome::Arrived { .. }) => "End(Arrived)",
            Self::End(Outcome::Broken) => "End(Broken)",
            Self::End(Outcome::Failed(_)) => "End(Failed)",
        }
    }
}

/// A request to the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DestinationRequest {
    /// Unique within the migration.
    pub cookie: u64,
    /// The request's type and data.
    pub kind: RequestKind,
}

/// The requests of a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestKind {
    /// WRITE of these bytes of the disk.
    Write(Range),
    /// WRITE_ZEROES, holes allowed.
    Zero(Range),
    /// FLUSH.
    Flush,
    /// The private HANDOVER.
    Handover(Handover),
    /// DISC to a peer without HANDOVER. It has no reply, and the connection stays open. `Lost` must
    /// mean that it was not sent completely.
    Disconnect,
}

impl RequestKind {
    /// The range of the disk that the request copies.
    #[must_use]
    pub fn range(&self) -> Option<Range> {
        match self {
            Self::Write(range) | Self::Zero(range) => Some(*range),
            Self::Flush | Self::Handover(_) | Self::Disconnect => None,
        }
    }

    /// Bytes of payload.
    #[must_use]
    pub fn payload(&self) -> u64 {
        match self {
            Self::Write(range) => range.length(),
            Self::Handover(_) => Handover::LENGTH as u64,
            Self::Zero(_) | Self::Flush | Self::Disconnect => 0,
        }
    }
}

/// An operator's request to a running migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OperatorRequest {
    /// End the migration; the disk stays here.
    Break,
    /// Set the speed limit in bytes per second; `None` means no limit.
    Speed(Option<NonZeroU64>),
}

/// The `break` came after the handover was sent: the destination may own the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooLate;

/// How a migration ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The destination owns the disk.
    Arrived {
        /// False for a destination that cannot acknowledge.
        acknowledged: bool,
    },
    /// An operator broke it off; the disk stays here.
    Broken,
    /// The migration is impossible, for this reason; the disk stays here.
    Failed(Trouble),
}

/// An event for the log and for `mirror`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum News {
    /// The destination accepted the migration for the first time: `mirror` may answer.
    Started,
    /// The copy stopped progressing, or the reason changed.
    Obstructed(Obstacle),
    /// The same destination process is connected again: only the missing ranges are sent.
    Resumed,
    /// Another destination process is connected: the copy starts over.
    Restarted,
    /// Each write of clients is delayed by this, because the copy does not converge.
    Throttled(Duration),
    /// Clients wait while the rest is sent.
    GateClosed,
    /// The handover did not arrive, and is sent again.
    HandingOverAgain,
    /// An ownership record could not be written, or the image not deleted.
    RecordFailed(String),
    /// Clients cannot be passed on to the destination, and are disconnected.
    RelayFailed(String),
}

/// The stage of a migration, for `status`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Connecting, or waiting for the next attempt.
    Connecting,
    /// Copying while clients write.
    Copying,
    /// Copying the rest while clients wait.
    Closing,
    /// The handover is being prepared, or was sent.
    HandingOver,
    /// The handover was sent, and its outcome is unknown.
    InDoubt,
    /// The destination owns the disk; this host cleans up.
    Leaving,
    /// The migration has ended.
    Ended,
}

/// The progress of a migration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Progress {
    /// The id of the current copy ([`Job::id`]).
    pub id: Id,
    /// The current stage.
    pub stage: Stage,
    /// Bytes of data per second, over the last two seconds.
    pub bytes_per_second: u64,
    /// `None` if the copy does not progress.
    pub seconds_left: Option<u64>,
    /// Bytes of the disk not acknowledged yet.
    pub bytes_left: u64,
    /// `--max-speed`, bytes per second.
    pub speed_limit: Option<NonZeroU64>,
    /// Passes completed.
    pub passes: u64,
    /// The delay of each write of clients.
    pub write_delay: Duration,
    /// The disk stays, but its record still says *departing*: restoring it has failed so far.
    pub record_unrestored: bool,
    /// Why the copy does not progress at present.
    pub obstacle: Option<Obstacle>,
}

impl Progress {
    /// Whether the disk is being copied while clients use it.
    #[must_use]
    pub fn is_copying(&self) -> bool {
        self.stage == Stage::Copying
    }
}
