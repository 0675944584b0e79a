//! What the destination decides: who may write the incoming disk, and when it is ours.
//! Never writes, connects or waits: the `listen` process asks before it acts, and reports.
//!
//! ```text
//!                    first byte                     HANDOVER
//!   waiting ─────▶ receiving (incoming, durable) ─────────▶ settling ─────▶ arrived
//!      ▲ ◀──────────────┘  its connection is gone               │   data durable, then
//!                                                               │   record ours durable
//!                                                               └▶ failed: exit, say nothing
//! ```
//!
//! Three promises hold the source's half of the handover up:
//!
//! * The record *incoming* is durable before the first byte is written, so that a half-written
//!   copy is never taken for a disk.
//! * A source that introduces itself again closes its earlier connection for good: the caller
//!   ends that connection and waits for its last request *before* it sends the answer. So does one
//!   that gets the seat of a holder that has been silent for too long. Nothing acknowledged can be
//!   lost by that, be the holder dead or only slow: what it sent for its own handover is refused
//!   without the seat, and its source keeps its disk and serves it until a handover is acknowledged.
//! * HANDOVER is acknowledged after the data and after the record *ours* are durable. When
//!   either fails nobody can tell what is on the medium: the process ends without an answer, and
//!   what the record then says is the truth.

use super::wire::{Answer, Handover, Has, Question, Token};
use crate::disk::ownership::{Id, Provenance, Record};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

/// A source's seat is given to another source, one with another id, after so long without a byte
/// from it.
pub const SOURCE_SILENCE: Duration = Duration::from_secs(5);
/// The seat of a writer that cannot introduce itself is given to the next one after so long without
/// a byte from it.
pub const WRITER_SILENCE: Duration = Duration::from_secs(60);
/// So many migrations that have held the seat are remembered.
const HOLDERS_MAX: usize = 64;

/// The caller's number for a connection; never used twice.
pub type Connection = u64;

/// Which clients a listening process admits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admits {
    /// Sources that introduced themselves.
    Sources,
    /// The same, or one writer that did not (`--plain`).
    PlainWriter,
    /// Clients of old style, which cannot introduce themselves (`--oldstyle`).
    OldStyle,
}

/// What a client of a listening process is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sender {
    /// A source of ours, which introduced itself with this migration.
    Source(Id),
    /// A client of old style; its DISC after writing means that the disk is complete.
    OldStyle,
    /// Any other client of new style; nothing is inferred from what it does.
    Plain,
}

impl Sender {
    fn id(self) -> Option<Id> {
        match self {
            Self::Source(id) => Some(id),
            Self::OldStyle | Self::Plain => None,
        }
    }
}

/// Why a client is not admitted, or a request of it refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AccessDenied {
    /// It did not introduce itself (`NBD_REP_ERR_POLICY`).
    NotIntroduced,
    /// This other connection holds the seat (`NBD_REP_ERR_POLICY`; for a request `EPERM`).
    SlotTaken(Connection),
    /// The connection does not hold the seat, or has lost it.
    NotSender,
    /// The image holds an incomplete copy that another connection began (a request: `EPERM`).
    Incomplete,
    /// The disk is just being made ours, or is ours.
    Complete,
    /// The process is about to exit with an error.
    Failed,
}

/// What to do about a source that introduces itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ProbeDecision {
    /// Close `retire` for good and wait until no request of them is under way; then answer.
    Answer {
        /// What to say.
        answer: Answer,
        /// Connections that have lost the seat.
        retire: Vec<Connection>,
    },
    /// Refuse the option.
    Refuse(AccessDenied),
}

/// What to do about a request that changes the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WritePermission {
    /// Carry it out.
    Go,
    /// Make this record durable, report with [`Arrival::on_recorded`], and ask again.
    RecordFirst(Record),
    /// Refuse the request.
    Refuse(AccessDenied),
}

/// What to do about the end of the copy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ArrivalEnd {
    /// Make the data durable, then this record; report with [`Arrival::on_settled`].
    Settle(Record),
    /// A HANDOVER that is not meant for us: answer it with `EINVAL`.
    Refuse,
    /// Nothing follows from it.
    Nothing,
}

/// One `listen` process.
#[derive(Debug)]
pub struct Arrival {
    token: Token,
    admits: Admits,
    state: ArrivalState,
    /// Whose incomplete copy the durable record says is here.
    holds: Holds,
    /// The migration with which each connection introduced itself; of several connections with the
    /// same one, only the latest.
    introduced: BTreeMap<Connection, Id>,
    /// Connections that have lost the seat, and may still have requests under way.
    retiring: BTreeSet<Connection>,
    /// The migrations that have held the seat, the latest first.
    holders: VecDeque<Id>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ArrivalState {
    Receiving(Option<SenderSlot>),
    Settling(Option<Id>),
    Arrived(Option<Id>),
    Failed,
}

/// The one connection that may change the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct SenderSlot {
    connection: Connection,
    guest: Sender,
    wrote: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Holds {
    Nothing,
    CopyOf(Option<Id>),
}

impl SenderSlot {
    /// Whether the seat is given to `contender` when its holder has been silent for so long.
    fn yields(self, contender: Sender, silent: Duration) -> bool {
        silent >= self.slot_timeout(contender)
    }

    /// For how long the holder must have been silent for `contender` to get the seat.
    fn slot_timeout(self, contender: Sender) -> Duration {
        match (self.guest, contender) {
            (Sender::Source(_), Sender::Source(_)) => SOURCE_SILENCE,
            (Sender::Plain, Sender::Source(_)) if !self.wrote => Duration::ZERO,
            (Sender::Plain, Sender::Plain) if !self.wrote => SOURCE_SILENCE,
            _ => WRITER_SILENCE,
        }
    }
}

impl Arrival {
    /// A process of this name, whose image holds an incomplete copy from the migration `holds`, if
    /// it holds one (see [`crate::disk::ownership::ForListen::Accept`]).
    #[must_use]
    pub fn new(token: Token, holds: Option<Option<Id>>, admits: Admits) -> Self {
        Self {
            token,
            admits,
            state: ArrivalState::Receiving(None),
            holds: holds.map_or(Holds::Nothing, Holds::CopyOf),
            introduced: BTreeMap::new(),
            retiring: BTreeSet::new(),
            holders: VecDeque::new(),
        }
    }

    /// The connection that holds the seat, and what it is.
    #[must_use]
    pub fn holder(&self) -> Option<(Connection, Sender)> {
        match self.state {
            ArrivalState::Receiving(Some(seat)) => Some((seat.connection, seat.guest)),
            _ => None,
        }
    }

    /// After how long a silence of its holder the seat is given to `contender`: a source if it
    /// introduces itself just now, else what it is already. None if the seat is free.
    #[must_use]
    pub fn slot_timeout(&self, contender: Connection, introduces: Option<Id>) -> Option<Duration> {
        let guest = introduces.map_or_else(|| self.guest(contender), Sender::Source);
        let ArrivalState::Receiving(Some(seat)) = self.state else { return None };
        Some(seat.slot_timeout(guest))
    }

    /// A source introduces itself on `connection`, or asks what has become of its disk: it gets the
    /// seat only when it [enters](Arrival::enter). The holder has been silent for so long.
    ///
    /// The answer is about the migration asked about, so that it is given to one that has held the
    /// seat whoever holds it now.
    pub fn on_introduction(
        &mut self,
        connection: Connection,
        question: &Question,
        silent: Duration,
    ) -> ProbeDecision {
        let id = question.id;
        match self.state {
            ArrivalState::Arrived(_) | ArrivalState::Receiving(None) => {}
            ArrivalState::Receiving(Some(seat)) if seat.guest == Sender::Source(id) => {
                if seat.connection != connection {
                    self.unseat(seat.connection);
                }
            }
            ArrivalState::Receiving(Some(seat)) => {
                let known = self.holders.contains(&id);
                if !known && !seat.yields(Sender::Source(id), silent) {
                    return ProbeDecision::Refuse(AccessDenied::SlotTaken(seat.connection));
                }
            }
            state => return ProbeDecision::Refuse(denied(state)),
        }
        self.introduced.retain(|_, other| *other != id);
        self.introduced.insert(connection, id);
        let answer = Answer { listening: Some(self.token), has: self.has(id) };
        ProbeDecision::Answer { answer, retire: self.retiring() }
    }

    fn has(&self, id: Id) -> Has {
        match (self.state, self.holds) {
            (ArrivalState::Arrived(Some(arrived)), _) if arrived == id => Has::Arrived,
            (ArrivalState::Receiving(_), Holds::CopyOf(Some(copy))) if copy == id => {
                Has::Incomplete
            }
            _ => Has::Nothing,
        }
    }

    /// Whether `connection` may enter the transmission phase now, the holder having been silent for
    /// so long. Changes nothing.
    ///
    /// # Errors
    /// Why not.
    pub fn may_enter(&self, connection: Connection, silent: Duration) -> Result<(), AccessDenied> {
        self.entrance(connection, silent).map(drop)
    }

    /// `connection` is about to enter the transmission phase, the holder having been silent for so
    /// long. One that speaks new style then holds the seat. First close these connections for good,
    /// and wait until no request of them is under way.
    ///
    /// # Errors
    /// Why it may not.
    pub fn enter(
        &mut self,
        connection: Connection,
        silent: Duration,
    ) -> Result<Vec<Connection>, AccessDenied> {
        let (guest, outgoing) = self.entrance(connection, silent)?;
        if let Some(outgoing) = outgoing {
            self.unseat(outgoing);
        }
        if guest != Sender::OldStyle {
            self.seat(connection, guest, false);
        }
        Ok(self.retiring())
    }

    /// What the connection is, and which one has to leave for it.
    fn entrance(
        &self,
        connection: Connection,
        silent: Duration,
    ) -> Result<(Sender, Option<Connection>), AccessDenied> {
        let guest = self.guest(connection);
        let ArrivalState::Receiving(seat) = self.state else { return Err(denied(self.state)) };
        if guest == Sender::Plain && self.admits != Admits::PlainWriter {
            return Err(AccessDenied::NotIntroduced);
        }
        match seat {
            Some(seat) if seat.connection == connection => Ok((guest, None)),
            Some(seat) if seat.yields(guest, silent) => Ok((guest, Some(seat.connection))),
            // Its requests are refused one by one, since old style has no other way.
            Some(seat) if guest != Sender::OldStyle => {
                Err(AccessDenied::SlotTaken(seat.connection))
            }
            _ => Ok((guest, None)),
        }
    }

    fn guest(&self, connection: Connection) -> Sender {
        match self.introduced.get(&connection) {
            Some(id) => Sender::Source(*id),
            None if self.admits == Admits::OldStyle => Sender::OldStyle,
            None => Sender::Plain,
        }
    }

    fn seat(&mut self, connection: Connection, guest: Sender, wrote: bool) {
        self.state = ArrivalState::Receiving(Some(SenderSlot { connection, guest, wrote }));
        if let Some(id) = guest.id()
            && !self.holders.contains(&id)
        {
            self.holders.truncate(HOLDERS_MAX - 1);
            self.holders.push_front(id);
        }
    }

    fn unseat(&mut self, connection: Connection) {
        self.state = ArrivalState::Receiving(None);
        self.introduced.remove(&connection);
        self.retiring.insert(connection);
    }

    fn retiring(&self) -> Vec<Connection> {
        self.retiring.iter().copied().collect()
    }

    /// Whether a request of `connection` that does not change the disk may be carried out: only
    /// the holder reads an arriving disk, and a plain one only after it has written if there is an
    /// incomplete copy. Where any client of old style may turn out to be the writer, they may read
    /// what was there before.
    ///
    /// # Errors
    /// Why not.
    pub fn may_use(&self, connection: Connection) -> Result<(), AccessDenied> {
        match self.state {
            ArrivalState::Receiving(Some(seat)) if seat.connection == connection => {
                let reads_half =
                    seat.guest == Sender::Plain && !seat.wrote && self.holds != Holds::Nothing;
                if reads_half { Err(AccessDenied::Incomplete) } else { Ok(()) }
            }
            ArrivalState::Receiving(Some(seat)) => Err(AccessDenied::SlotTaken(seat.connection)),
            ArrivalState::Receiving(None)
                if self.may_be_the_writer(connection) && self.holds == Holds::Nothing =>
            {
                Ok(())
            }
            ArrivalState::Receiving(None) => Err(AccessDenied::NotSender),
            state => Err(denied(state)),
        }
    }

    fn may_be_the_writer(&self, connection: Connection) -> bool {
        self.admits == Admits::OldStyle && !self.retiring.contains(&connection)
    }

    /// `connection` wants to change the disk.
    pub fn on_write_request(&mut self, connection: Connection) -> WritePermission {
        let guest = match self.state {
            ArrivalState::Receiving(Some(seat)) if seat.connection == connection => seat.guest,
            ArrivalState::Receiving(Some(seat)) => {
                return WritePermission::Refuse(AccessDenied::SlotTaken(seat.connection));
            }
            ArrivalState::Receiving(None) if self.may_be_the_writer(connection) => Sender::OldStyle,
            // A source that has lost its seat to its own next connection, which has closed.
            ArrivalState::Receiving(None) => {
                return WritePermission::Refuse(AccessDenied::NotSender);
            }
            state => return WritePermission::Refuse(denied(state)),
        };
        self.seat(connection, guest, true);
        if self.holds == Holds::CopyOf(guest.id()) {
            return WritePermission::Go;
        }
        WritePermission::RecordFirst(Record::Incoming { id: guest.id() })
    }

    /// The record *incoming* with `id` is durable, or could not be made so; then the process ends.
    pub fn on_recorded(&mut self, id: Option<Id>, durable: bool) {
        if durable {
            self.holds = Holds::CopyOf(id);
        } else {
            self.state = ArrivalState::Failed;
        }
    }

    /// HANDOVER arrived on `connection`.
    pub fn on_handover(&mut self, connection: Connection, handover: &Handover) -> ArrivalEnd {
        let id = handover.id;
        let seated = self.holder() == Some((connection, Sender::Source(id)));
        let ours = handover.token == self.token && self.holds == Holds::CopyOf(Some(id));
        if !(seated && ours) {
            return ArrivalEnd::Refuse;
        }
        self.state = ArrivalState::Settling(Some(id));
        ArrivalEnd::Settle(Record::Ours(Provenance::Arrived(id)))
    }

    /// DISC arrived on `connection`, and everything before it has been carried out.
    pub fn on_disconnect(&mut self, connection: Connection) -> ArrivalEnd {
        let seated = self.holder() == Some((connection, Sender::OldStyle));
        if !(seated && self.holds == Holds::CopyOf(None)) {
            return ArrivalEnd::Nothing;
        }
        self.state = ArrivalState::Settling(None);
        ArrivalEnd::Settle(Record::Ours(Provenance::Received))
    }

    /// Data and record are durable, or could not be made so. True: the disk is ours, acknowledge
    /// and exit with success. False: exit with an error and without another word to the source.
    pub fn on_settled(&mut self, durable: bool) -> bool {
        self.state = match self.state {
            ArrivalState::Settling(id) if durable => ArrivalState::Arrived(id),
            _ => ArrivalState::Failed,
        };
        durable
    }

    /// A change that was permitted could not be made: the copy has a gap, whatever its sender says
    /// next. True: the process exits with an error. False: the copy was complete before.
    pub fn on_write_failure(&mut self) -> bool {
        if matches!(self.state, ArrivalState::Receiving(_)) {
            self.state = ArrivalState::Failed;
        }
        self.state == ArrivalState::Failed
    }

    /// `connection` is gone, and none of its requests is under way.
    pub fn on_close(&mut self, connection: Connection) {
        self.introduced.remove(&connection);
        self.retiring.remove(&connection);
        if self.holder().is_some_and(|(holder, _)| holder == connection) {
            self.state = ArrivalState::Receiving(None);
        }
    }
}

fn denied(state: ArrivalState) -> AccessDenied {
    match state {
        ArrivalState::Receiving(_) => AccessDenied::NotSender,
        ArrivalState::Settling(_) | ArrivalState::Arrived(_) => AccessDenied::Complete,
        ArrivalState::Failed => AccessDenied::Failed,
    }
}

/// What a `serve` process, whose disk is ours by this title, answers a source.
#[must_use]
pub fn answer_when_serving(title: Provenance, question: &Question) -> Answer {
    let has = if title == Provenance::Arrived(question.id) { Has::Arrived } else { Has::Nothing };
    Answer { listening: None, has }
}

#[cfg(test)]
mod tests;
