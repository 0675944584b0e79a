//! The state machine of the destination: which connection may write the incoming disk, and when
//! the disk is ours.
//! Never writes, connects or waits: the caller asks before it acts, and reports results.
//!
//! ```text
//!                    first byte                     HANDOVER
//!   waiting ─────▶ receiving (incoming, durable) ─────────▶ settling ─────▶ arrived
//!      ▲ ◀──────────────┘  its connection is closed             │   data durable, then
//!                                                               │   record ours durable
//!                                                               └▶ failed: exit without a reply
//! ```
//!
//! Three invariants, on which the source's half of the handover relies:
//!
//! * The record *incoming* is durable before the first byte is written, so that an incomplete copy
//!   is never served as a disk.
//! * A source that introduces itself again closes its earlier connection for good: the caller ends
//!   that connection and waits for its last request *before* it sends the answer. The same holds
//!   for a source that takes the slot of a sender that was silent for too long. No acknowledged
//!   data is lost, whether that sender is dead or slow: without the slot its handover is refused,
//!   and its source keeps and serves its disk until a handover is acknowledged.
//! * HANDOVER is acknowledged after first the data and then the record *ours* are durable. If
//!   either fails, the state of the medium is unknown: the process exits without a reply, and the
//!   next one reads the record.
//!
//! `arrival/transitions.txt` lists every transition; a test keeps it true.

use super::wire::{Answer, Handover, Has, Question, Token};
use crate::disk::ownership::{Id, Provenance, Record};
use crate::ids::DiskId;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

/// A source that is silent for this time loses its slot to a source with another id.
pub const SOURCE_SILENCE: Duration = Duration::from_secs(5);
/// A writer without introduction that is silent for this time loses its slot to the next client.
pub const WRITER_SILENCE: Duration = Duration::from_secs(60);
/// Most migrations remembered as former holders of the slot.
const FORMER_SENDERS_MAX: usize = 64;

/// The caller's number for a connection; never used twice.
pub type Connection = u64;

/// Which clients a listening process admits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admits {
    /// Sources that introduced themselves.
    Sources,
    /// The same, or one writer without introduction (`--plain`).
    PlainWriter,
    /// Oldstyle clients, which cannot introduce themselves (`--oldstyle`).
    OldStyle,
}

/// The kind of a client of a listening process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sender {
    /// A flexnbd source that introduced itself with this migration.
    Source(Id),
    /// An oldstyle client. Its DISC after writing means that the disk is complete.
    OldStyle,
    /// Any other newstyle client. Its DISC has no such meaning.
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

/// Why a client or one of its requests is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AccessDenied {
    /// The client did not introduce itself (`NBD_REP_ERR_POLICY`).
    NotIntroduced,
    /// Another connection, this one, holds the slot (`NBD_REP_ERR_POLICY`; for a request `EPERM`).
    SlotTaken(Connection),
    /// The connection does not hold the slot, or has lost it.
    NotSender,
    /// The image holds an incomplete copy that another connection began (a request: `EPERM`).
    Incomplete,
    /// The handover is being made durable, or the disk is ours.
    Complete,
    /// The process is about to exit with an error.
    Failed,
}

/// The reaction to the introduction of a source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ProbeDecision {
    /// Close `retire` for good and wait until their requests have ended; then answer.
    Answer {
        /// The answer to send.
        answer: Answer,
        /// Connections that have lost the slot.
        retire: Vec<Connection>,
    },
    /// Refuse the option.
    Refuse(AccessDenied),
}

/// The reaction to a request that changes the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WritePermission {
    /// Execute the request.
    Go,
    /// Make this record durable, report with [`Arrival::on_recorded`], and ask again.
    RecordFirst(Record),
    /// Refuse the request.
    Refuse(AccessDenied),
}

/// The reaction to a HANDOVER or DISC.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ArrivalEnd {
    /// Make the data durable, then this record; report with [`Arrival::on_settled`].
    Settle(Record),
    /// Reply `EINVAL` to a HANDOVER for another migration, process or connection.
    Refuse,
    /// The DISC does not complete the disk.
    Nothing,
}

/// The state of one `listen` process.
#[derive(Clone, Debug)]
pub struct Arrival {
    token: Token,
    admits: Admits,
    state: ArrivalState,
    /// The incomplete copy in the image, according to the durable record.
    copy: RecordedCopy,
    /// The migration with which each connection introduced itself; of several connections with the
    /// same one, only the latest.
    introduced: BTreeMap<Connection, Id>,
    /// The id of the disk, as the source on each of these connections has told it.
    disk_ids: BTreeMap<Connection, DiskId>,
    /// Connections that have lost the slot, and may still have requests in flight.
    retiring: BTreeSet<Connection>,
    /// The migrations that hold or have held the slot, the latest first.
    former_senders: VecDeque<Id>,
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
    sender: Sender,
    wrote: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum RecordedCopy {
    Nothing,
    Of(Option<Id>),
}

impl SenderSlot {
    /// Whether `contender` gets the slot after the holder's silence of `silent`.
    fn yields(self, contender: Sender, silent: Duration) -> bool {
        silent >= self.slot_timeout(contender)
    }

    /// The silence of the holder after which `contender` gets the slot.
    fn slot_timeout(self, contender: Sender) -> Duration {
        match (self.sender, contender) {
            (Sender::Source(_), Sender::Source(_)) => SOURCE_SILENCE,
            (Sender::Plain, Sender::Source(_)) if !self.wrote => Duration::ZERO,
            (Sender::Plain, Sender::Plain) if !self.wrote => SOURCE_SILENCE,
            _ => WRITER_SILENCE,
        }
    }
}

impl Arrival {
    /// A process with this token. `copy` is the incomplete copy in its image, if any (see
    /// [`crate::disk::ownership::ForListen::Accept`]).
    #[must_use]
    pub fn new(token: Token, copy: Option<Option<Id>>, admits: Admits) -> Self {
        Self {
            token,
            admits,
            state: ArrivalState::Receiving(None),
            copy: copy.map_or(RecordedCopy::Nothing, RecordedCopy::Of),
            introduced: BTreeMap::new(),
            disk_ids: BTreeMap::new(),
            retiring: BTreeSet::new(),
            former_senders: VecDeque::new(),
        }
    }

    /// The name of the state, for tests and their traces.
    #[must_use]
    pub fn state_name(&self) -> &'static str {
        match self.state {
            ArrivalState::Receiving(None) => "Waiting",
            ArrivalState::Receiving(Some(slot)) => match (slot.sender, slot.wrote) {
                (Sender::Source(_), false) => "Receiving(source)",
                (Sender::Source(_), true) => "Receiving(source, wrote)",
                (Sender::Plain, false) => "Receiving(plain)",
                (Sender::Plain, true) => "Receiving(plain, wrote)",
                (Sender::OldStyle, _) => "Receiving(old style, wrote)",
            },
            ArrivalState::Settling(_) => "Settling",
            ArrivalState::Arrived(_) => "Arrived",
            ArrivalState::Failed => "Failed",
        }
    }

    /// The connection that holds the slot, and its kind.
    #[must_use]
    pub fn holder(&self) -> Option<(Connection, Sender)> {
        match self.state {
            ArrivalState::Receiving(Some(slot)) => Some((slot.connection, slot.sender)),
            _ => None,
        }
    }

    /// The silence of its holder after which `contender` gets the slot; `id` is the migration with
    /// which it introduces itself just now, if it does. `None` if the slot is free.
    #[must_use]
    pub fn slot_timeout(&self, contender: Connection, id: Option<Id>) -> Option<Duration> {
        let sender = id.map_or_else(|| self.sender(contender), Sender::Source);
        let ArrivalState::Receiving(Some(slot)) = self.state else { return None };
        Some(slot.slot_timeout(sender))
    }

    /// A source introduces itself on `connection`, or asks whether its disk has arrived, after the
    /// holder's silence of `silent`. It gets the slot only when it [enters](Arrival::enter).
    ///
    /// A migration that has held the slot gets an answer even while another connection holds the
    /// slot, because its source may be in doubt.
    pub fn on_introduction(
        &mut self,
        connection: Connection,
        question: &Question,
        silent: Duration,
    ) -> ProbeDecision {
        let id = question.id;
        match self.state {
            ArrivalState::Arrived(_) | ArrivalState::Receiving(None) => {}
            ArrivalState::Receiving(Some(slot)) if slot.sender == Sender::Source(id) => {
                if slot.connection != connection {
                    self.revoke_slot(slot.connection);
                }
            }
            ArrivalState::Receiving(Some(slot)) => {
                let known = self.former_senders.contains(&id);
                if !known && !slot.yields(Sender::Source(id), silent) {
                    return ProbeDecision::Refuse(AccessDenied::SlotTaken(slot.connection));
                }
            }
            state => return ProbeDecision::Refuse(denied(state)),
        }
        self.introduced.retain(|_, other| *other != id);
        self.introduced.insert(connection, id);
        let answer = Answer { listening: Some(self.token), has: self.has(id) };
        ProbeDecision::Answer { answer, retire: self.retiring() }
    }

    /// The source on `connection` tells the id of the disk. Returns whether it has introduced itself before,
    /// as it has to.
    pub fn on_disk_id(&mut self, connection: Connection, id: DiskId) -> bool {
        let is_introduced = self.introduced.contains_key(&connection);
        if is_introduced {
            self.disk_ids.insert(connection, id);
        }
        is_introduced
    }

    /// The id of the disk that arrives over `connection`, if the source has told it.
    #[must_use]
    pub fn disk_id(&self, connection: Connection) -> Option<DiskId> {
        self.disk_ids.get(&connection).copied()
    }

    fn has(&self, id: Id) -> Has {
        match (self.state, self.copy) {
            (ArrivalState::Arrived(Some(arrived)), _) if arrived == id => Has::Arrived,
            (ArrivalState::Receiving(_), RecordedCopy::Of(Some(copy))) if copy == id => {
                Has::Incomplete
            }
            _ => Has::Nothing,
        }
    }

    /// Whether `connection` may enter the transmission phase after the holder's silence of
    /// `silent`.
    ///
    /// # Errors
    /// If it may not.
    pub fn may_enter(&self, connection: Connection, silent: Duration) -> Result<(), AccessDenied> {
        self.check_entry(connection, silent).map(drop)
    }

    /// `connection` is about to enter the transmission phase after the holder's silence of
    /// `silent`. A newstyle connection then holds the slot. The caller first closes the returned
    /// connections for good, and waits until their requests have ended.
    ///
    /// # Errors
    /// If it may not.
    pub fn enter(
        &mut self,
        connection: Connection,
        silent: Duration,
    ) -> Result<Vec<Connection>, AccessDenied> {
        let (sender, displaced) = self.check_entry(connection, silent)?;
        if let Some(displaced) = displaced {
            self.revoke_slot(displaced);
        }
        if sender != Sender::OldStyle {
            self.assign_slot(connection, sender, false);
        }
        Ok(self.retiring())
    }

    /// The kind of the connection, and the connection that loses the slot to it.
    fn check_entry(
        &self,
        connection: Connection,
        silent: Duration,
    ) -> Result<(Sender, Option<Connection>), AccessDenied> {
        let sender = self.sender(connection);
        let ArrivalState::Receiving(slot) = self.state else { return Err(denied(self.state)) };
        if sender == Sender::Plain && self.admits != Admits::PlainWriter {
            return Err(AccessDenied::NotIntroduced);
        }
        match slot {
            Some(slot) if slot.connection == connection => Ok((sender, None)),
            Some(slot) if slot.yields(sender, silent) => Ok((sender, Some(slot.connection))),
            // The oldstyle handshake cannot refuse a connection, so each request is refused.
            Some(slot) if sender != Sender::OldStyle => {
                Err(AccessDenied::SlotTaken(slot.connection))
            }
            _ => Ok((sender, None)),
        }
    }

    fn sender(&self, connection: Connection) -> Sender {
        match self.introduced.get(&connection) {
            Some(id) => Sender::Source(*id),
            None if self.admits == Admits::OldStyle => Sender::OldStyle,
            None => Sender::Plain,
        }
    }

    fn assign_slot(&mut self, connection: Connection, sender: Sender, wrote: bool) {
        self.state = ArrivalState::Receiving(Some(SenderSlot { connection, sender, wrote }));
        if let Some(id) = sender.id()
            && !self.former_senders.contains(&id)
        {
            self.former_senders.truncate(FORMER_SENDERS_MAX - 1);
            self.former_senders.push_front(id);
        }
    }

    fn revoke_slot(&mut self, connection: Connection) {
        self.state = ArrivalState::Receiving(None);
        self.introduced.remove(&connection);
        self.retiring.insert(connection);
    }

    fn retiring(&self) -> Vec<Connection> {
        self.retiring.iter().copied().collect()
    }

    /// Whether a request of `connection` that does not change the disk may be executed. Only the
    /// holder of the slot may read; a plain holder only after it has written, if the image holds an
    /// incomplete copy. Any oldstyle client may become the writer, so all may read an image without
    /// a copy until one of them writes.
    ///
    /// # Errors
    /// If it may not.
    pub fn may_use(&self, connection: Connection) -> Result<(), AccessDenied> {
        let has_copy = self.copy != RecordedCopy::Nothing;
        match self.state {
            ArrivalState::Receiving(Some(slot)) if slot.connection == connection => {
                let reads_incomplete = slot.sender == Sender::Plain && !slot.wrote && has_copy;
                if reads_incomplete { Err(AccessDenied::Incomplete) } else { Ok(()) }
            }
            ArrivalState::Receiving(Some(slot)) => Err(AccessDenied::SlotTaken(slot.connection)),
            ArrivalState::Receiving(None) if self.may_be_the_writer(connection) && !has_copy => {
                Ok(())
            }
            ArrivalState::Receiving(None) => Err(AccessDenied::NotSender),
            state => Err(denied(state)),
        }
    }

    fn may_be_the_writer(&self, connection: Connection) -> bool {
        self.admits == Admits::OldStyle && !self.retiring.contains(&connection)
    }

    /// A request that changes the disk was received on `connection`.
    pub fn on_write_request(&mut self, connection: Connection) -> WritePermission {
        let sender = match self.state {
            ArrivalState::Receiving(Some(slot)) if slot.connection == connection => slot.sender,
            ArrivalState::Receiving(Some(slot)) => {
                return WritePermission::Refuse(AccessDenied::SlotTaken(slot.connection));
            }
            ArrivalState::Receiving(None) if self.may_be_the_writer(connection) => Sender::OldStyle,
            // The source has lost the slot to its own later connection, which is closed by now.
            ArrivalState::Receiving(None) => {
                return WritePermission::Refuse(AccessDenied::NotSender);
            }
            state => return WritePermission::Refuse(denied(state)),
        };
        self.assign_slot(connection, sender, true);
        if self.copy == RecordedCopy::Of(sender.id()) {
            return WritePermission::Go;
        }
        WritePermission::RecordFirst(Record::Incoming { id: sender.id() })
    }

    /// The record *incoming* with `id` is durable, or could not be written: the process then exits.
    pub fn on_recorded(&mut self, id: Option<Id>, durable: bool) {
        if durable {
            self.copy = RecordedCopy::Of(id);
        } else {
            self.state = ArrivalState::Failed;
        }
    }

    /// HANDOVER was received on `connection`.
    pub fn on_handover(&mut self, connection: Connection, handover: &Handover) -> ArrivalEnd {
        let id = handover.id;
        let is_sender = self.holder() == Some((connection, Sender::Source(id)));
        let ours = handover.token == self.token && self.copy == RecordedCopy::Of(Some(id));
        if !(is_sender && ours) {
            return ArrivalEnd::Refuse;
        }
        self.state = ArrivalState::Settling(Some(id));
        ArrivalEnd::Settle(Record::Ours(Provenance::Arrived(id)))
    }

    /// DISC was received on `connection`, and every request before it has been executed.
    pub fn on_disconnect(&mut self, connection: Connection) -> ArrivalEnd {
        let is_sender = self.holder() == Some((connection, Sender::OldStyle));
        if !(is_sender && self.copy == RecordedCopy::Of(None)) {
            return ArrivalEnd::Nothing;
        }
        self.state = ArrivalState::Settling(None);
        ArrivalEnd::Settle(Record::Ours(Provenance::Received))
    }

    /// Data and record are durable, or one of them failed. Returns whether the disk is ours: if so,
    /// acknowledge, else exit with an error, without a reply to the source.
    pub fn on_settled(&mut self, durable: bool) -> bool {
        self.state = match self.state {
            ArrivalState::Settling(id) if durable => ArrivalState::Arrived(id),
            _ => ArrivalState::Failed,
        };
        durable
    }

    /// A permitted write failed: the copy has a gap. Returns whether the process must exit with an
    /// error; not if the copy was complete before.
    pub fn on_write_failure(&mut self) -> bool {
        if matches!(self.state, ArrivalState::Receiving(_)) {
            self.state = ArrivalState::Failed;
        }
        self.state == ArrivalState::Failed
    }

    /// `connection` is closed, and its requests have ended.
    pub fn on_close(&mut self, connection: Connection) {
        self.introduced.remove(&connection);
        self.disk_ids.remove(&connection);
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

/// The answer of a `serve` process whose disk has this provenance.
#[must_use]
pub fn answer_when_serving(provenance: Provenance, question: &Question) -> Answer {
    let has =
        if provenance == Provenance::Arrived(question.id) { Has::Arrived } else { Has::Nothing };
    Answer { listening: None, has }
}

#[cfg(test)]
mod tests;
#[cfg(test)]
mod transition_tests;
