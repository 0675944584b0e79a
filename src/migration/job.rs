//! What goes into and comes out of the source's machine: the job, events, actions, news.
//! Never decides anything but what a peer's answer means; see [`super::machine`] for the life.

pub use super::trouble::{Obstacle, Trouble};

use super::plan::{BLOCK_MIN_MAX, Caps, Content, Limits};
use super::wire::{Answer, Handover, Has, Question, Token};
use crate::disk::ownership::{Id, Provenance, Record, RemoteAddress};
use crate::range::Range;
use std::net::IpAddr;
use std::num::NonZeroU64;
use std::time::Duration;

/// Disks smaller than this cannot be migrated (flexnbd(1), MIRROR MODE).
pub const SIZE_MIN: u64 = 4096;

/// One migration, as ordered.
#[derive(Clone, Debug)]
pub struct Job {
    /// Its name: random, and never used before. The machine counts it up for every copy that it
    /// has to begin anew.
    pub id: Id,
    /// Bytes of the disk.
    pub size: u64,
    /// Where to.
    pub to: RemoteAddress,
    /// The local address to connect from, if the operator chose one.
    pub from: Option<IpAddr>,
    /// Delete the image once the destination has it.
    pub unlink: bool,
    /// What the disk is if the handover does not happen.
    pub before: Provenance,
    /// Most bytes per second on the wire, until the gate is closed.
    pub speed: Option<NonZeroU64>,
    /// How much is asked of the destination at once.
    pub limits: Limits,
    /// Close the gate when the rest can be sent in this time.
    pub pause: Duration,
    /// A destination that makes no progress for so long counts as lost.
    pub timeout: Duration,
}

impl Job {
    /// A job with the usual limits: a pause of 100 ms, patience of 60 s.
    #[must_use]
    pub fn new(id: Id, size: u64, to: RemoteAddress, before: Provenance) -> Self {
        Self {
            id,
            size,
            to,
            from: None,
            unlink: false,
            before,
            speed: None,
            limits: Limits::default(),
            pause: Duration::from_millis(100),
            timeout: Duration::from_secs(60),
        }
    }

    /// The question this job's source asks.
    #[must_use]
    pub fn question(&self) -> Question {
        Question { size: self.size, id: self.id }
    }

    /// The record that a note stands for, `when` being seconds since 1970; none: no record at all.
    #[must_use]
    pub fn record(&self, note: RecordKind, when: u64) -> Option<Record> {
        let (id, before, to) = (self.id, self.before, self.to.clone());
        match note {
            RecordKind::Before => before.record(),
            RecordKind::Departing => Some(Record::Departing { id, before, to, from: self.from }),
            RecordKind::Departed => Some(Record::Departed { id, when, to }),
        }
    }
}

/// Which ownership record to make durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RecordKind {
    /// What there was before this migration.
    Before,
    /// The handover is about to be sent.
    Departing,
    /// The destination has the disk.
    Departed,
}

/// The destination's properties that matter to a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DestinationInfo {
    /// Bytes of its export.
    pub size: u64,
    /// It takes no writes.
    pub read_only: bool,
    /// It knows FLUSH.
    pub flush: bool,
    /// What it takes.
    pub caps: Caps,
    /// Its answer to the private option; none when it does not know the option.
    pub answer: Option<Answer>,
}

impl DestinationInfo {
    /// The name of the process, when it is one of ours and listens.
    #[must_use]
    pub fn token(&self) -> Option<Token> {
        self.answer.and_then(|answer| answer.listening)
    }

    /// Why this peer cannot take that disk.
    pub(super) fn incompatibility(&self, job: &Job) -> Option<Trouble> {
        match self.answer {
            Some(Answer { listening: None, .. }) => return Some(Trouble::Serving),
            Some(Answer { has: Has::Arrived, .. }) => {
                return Some(Trouble::Confused("the destination claims to have the disk already"));
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
            (!block_fits).then_some(Trouble::BlockSize(block))
        }
    }
}

/// Whether a handover arrived, according to the answer to a question.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HandoverVerdict {
    /// The destination has it.
    Arrived,
    /// It has not arrived, and nothing that was sent so far can make it arrive.
    NotArrived,
    /// The server that answered does not know.
    Unknown,
}

/// What an answer says about a disk whose handover was sent to the process `token`; none when the
/// source has been restarted and does not remember the token.
///
/// A listening process that knows nothing of the migration proves nothing, since it may be
/// receiving into another image; only the process that the handover was sent to does.
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

/// What happened. Each is the result of the action before it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The first event of all.
    Begin,
    /// `Connect` succeeded.
    Greeted(DestinationInfo),
    /// `Connect` failed; nothing is left of the connection.
    Unreachable(Trouble),
    /// `Look`: the beginning of the range holds this.
    Looked {
        /// Starts where the range asked about starts; not empty.
        range: Range,
        /// What it holds.
        content: Content,
    },
    /// `TakeDirty`: the run taken, and the bytes still marked.
    Taken {
        /// None when nothing is marked from there on.
        run: Option<Range>,
        /// See [`crate::disk::dirty::DirtyBitmap::bytes`].
        left: u64,
    },
    /// `Probe`: whether the requests have ended that were in flight at the last `Probe` that said so.
    Visits {
        /// See [`crate::disk::Gate::turn_generation`].
        turned: bool,
    },
    /// `Wait`: a reply came.
    Reply {
        /// The request it belongs to.
        cookie: u64,
        /// The NBD error, when it is one.
        error: Option<u32>,
    },
    /// `Send` or `Wait`: the connection is no more, or never can be trusted again.
    Lost(String),
    /// `Send`: the connection is no more, and not a byte of the request went out.
    Unsent(String),
    /// `Look` or `Send`: a part of the disk cannot be read. The connection is closed then.
    Unreadable(String),
    /// `Wait` is over: the time has come, or there is an order.
    Tick,
    /// The action succeeded.
    Done,
    /// The action failed here, not at the peer: why.
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

/// What the source is to do now; what comes of it is the next [`Event`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Connect, haggle, ask the private question. When the answer is that the disk has arrived
    /// there is no need to go on to the transmission phase. → `Greeted`, `Unreachable`
    Connect(Question),
    /// The same on a second connection, which takes the place of the first once it is there: until
    /// then a reply may yet come over the first. → `Greeted`, `Unreachable`
    Ask(Question),
    /// Find out what the beginning of this range holds: a hole, zeros or data. The answer may be
    /// about any part of it, from its start on. All of the range is going to be sent, so that marks
    /// in it are forgotten before it is read. → `Looked`, `Unreadable`,
    /// `Failed` for want of memory
    Look(Range),
    /// Take marks: [`crate::disk::dirty::DirtyBitmap::take_next`]. → `Taken`
    TakeDirty {
        /// From this byte on.
        from: u64,
        /// At most so many bytes.
        longest: u64,
    },
    /// Send a request, reading the disk now. → `Done` (it is with the kernel), `Lost`, `Unsent`,
    /// `Unreadable`, `Failed` as for `Look`
    Send(DestinationRequest),
    /// Wait for a reply, an order or this time; a reply that is there comes first. → `Reply`, `Tick`, `Lost`
    Wait {
        /// On the clock of `now`.
        until: Duration,
    },
    /// Find out whether in-flight requests of clients are short. → `Visits`
    Probe,
    /// Close the gate and wait until every visit is over. From then on the gate opens by itself at
    /// [`super::machine::Machine::freeze_end`]. → `Done`; `Failed` when a visit does not end in this
    /// time; the gate is open then.
    CloseGate {
        /// How long to wait.
        within: Duration,
    },
    /// Let the gate not open by itself any more. → `Done`; `Failed` when it has.
    Seal,
    /// Open the gate; it may be open already. → `Done`
    OpenGate,
    /// Delay every client's write by this from now on; zero stops throttling. → `Done`
    Throttle(Duration),
    /// Make the ownership record durable. → `Done`, `Failed`
    Record(RecordKind),
    /// Delete the image, durably. → `Done`, `Failed`
    Unlink,
    /// The destination owns the disk: end all sessions, without answering their in-flight requests.
    /// → `Done`
    Retire,
    /// Close the connection, if there is one, without a DISC: for some destinations it would mean
    /// that the disk is complete. → `Done`
    HangUp,
    /// Send DISC, if the transmission phase was reached, and close the connection; errors do not matter any more. → `Done`
    Disconnect,
    /// Over: do not ask again.
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
    /// Never used twice in a migration.
    pub cookie: u64,
    /// What to do there.
    pub kind: RequestKind,
}

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestKind {
    /// WRITE these bytes of the disk.
    Write(Range),
    /// WRITE_ZEROES, holes allowed.
    Zero(Range),
    /// FLUSH.
    Flush,
    /// The private HANDOVER.
    Handover(Handover),
    /// DISC to a peer that knows no HANDOVER; it has no reply, and the connection stays open.
    /// `Lost` must mean that it did not go out as a whole.
    Disconnect,
}

impl RequestKind {
    /// The part of the disk that it copies.
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

/// What an operator wants, at any time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OperatorRequest {
    /// End the migration; clients keep their disk here.
    Break,
    /// From now on at most so many bytes per second; none is no limit.
    Speed(Option<NonZeroU64>),
}

/// `break` came after the handover was sent: the disk is no longer ours to keep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooLate;

/// How a migration ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The destination has the disk.
    Arrived {
        /// It said so; otherwise it does not know how to.
        acknowledged: bool,
    },
    /// As ordered; we keep the disk.
    Broken,
    /// The destination was never fit to take it; we keep the disk.
    Failed(Trouble),
}

/// An event for the log and for `mirror`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum News {
    /// The destination greeted us for the first time: `mirror` may answer.
    Started,
    /// It does not go on just now, for another reason than before.
    Obstructed(Obstacle),
    /// The same destination process is back: only what is missing is sent.
    Resumed,
    /// Another destination process is there: from the beginning.
    Restarted,
    /// Each write is delayed by this, since the copy cannot catch up.
    Throttled(Duration),
    /// Clients wait while the rest is sent.
    GateClosed,
    /// The destination says that the disk has not arrived: handing over again.
    HandingOverAgain,
    /// An ownership record could not be written, or the image not deleted.
    RecordFailed(String),
}

/// Where a migration is, for `status`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Getting in touch.
    Connecting,
    /// Copying while clients write.
    Copying,
    /// Copying the rest while clients wait.
    Closing,
    /// The handover is under way.
    HandingOver,
    /// The handover was sent, and its outcome is unknown.
    InDoubt,
    /// The destination has the disk; leaving.
    Leaving,
    /// Over.
    Ended,
}

/// How far a migration is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Progress {
    /// The name of the copy that is being made ([`Job::id`]).
    pub id: Id,
    /// Where it is.
    pub stage: Stage,
    /// Bytes of data per second, over the last two seconds.
    pub bytes_per_second: u64,
    /// None when nothing moves.
    pub seconds_left: Option<u64>,
    /// Bytes of the disk not acknowledged yet.
    pub bytes_left: u64,
    /// `--max-speed`, bytes per second.
    pub speed_limit: Option<NonZeroU64>,
    /// Passes completed.
    pub passes: u64,
    /// The delay of every client's write.
    pub write_delay: Duration,
    /// The record says *departing* although the disk stays: it could not be put back until now.
    pub record_unrestored: bool,
    /// Why it does not go on just now.
    pub obstacle: Option<Obstacle>,
}

impl Progress {
    /// Whether the disk is being copied while clients use it.
    #[must_use]
    pub fn is_copying(&self) -> bool {
        self.stage == Stage::Copying
    }
}
