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
//!   ends that connection and waits for its last request *before* it sends the answer.
//! * HANDOVER is acknowledged after the data and after the record *ours* are durable. When
//!   either fails nobody can tell what is on the medium: the process ends without an answer, and
//!   what the record then says is the truth.

use super::wire::{Answer, Handover, Has, Question, Token};
use crate::disk::ownership::{Id, Record, Title};

/// The caller's number for a connection; never used twice.
pub type Connection = u64;

/// How whoever writes came in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Guest {
    /// A source of ours, which introduced itself with this migration.
    Ours(Id),
    /// Somebody who speaks old style; its DISC after writing means that the disk is complete.
    OldStyle,
    /// Anybody else who speaks new style; nothing is inferred from what it does.
    Plain,
}

impl Guest {
    fn id(self) -> Option<Id> {
        match self {
            Self::Ours(id) => Some(id),
            Self::OldStyle | Self::Plain => None,
        }
    }
}

/// Why somebody may not come in, or not write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Denied {
    /// Another connection is writing the disk (`NBD_REP_ERR_POLICY`; for a request `EPERM`).
    Taken,
    /// The disk is just being made ours, or is ours.
    Complete,
    /// The process is about to exit with an error.
    Failed,
}

/// What to do about a source that introduces itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Introduction {
    /// Close `retire` for good and wait until none of its requests is under way; then answer.
    Answer {
        /// What to say.
        answer: Answer,
        /// The same migration's earlier connection.
        retire: Option<Connection>,
    },
    /// Refuse the option.
    Refuse(Denied),
}

/// What to do about a request that changes the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Permission {
    /// Carry it out.
    Go,
    /// Make this record durable, report with [`Arrival::recorded`], and ask again.
    RecordFirst(Record),
    /// Refuse the request.
    Refuse(Denied),
}

/// What to do about the end of the copy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    /// Make the data durable, then this record; report with [`Arrival::settled`].
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
    state: State,
    /// Whose incomplete copy the durable record says is here.
    holds: Holds,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Receiving(Option<(Connection, Guest)>),
    Settling(Option<Id>),
    Arrived(Option<Id>),
    Failed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Holds {
    Nothing,
    CopyOf(Option<Id>),
}

impl Arrival {
    /// A process of this name, whose image holds an incomplete copy from the migration `holds`, if
    /// any (see [`crate::disk::ownership::ForListen::Accept`]).
    #[must_use]
    pub fn new(token: Token, holds: Option<Id>) -> Self {
        let holds = holds.map_or(Holds::Nothing, |id| Holds::CopyOf(Some(id)));
        Self { token, state: State::Receiving(None), holds }
    }

    /// Whether a client that did not introduce itself may come in.
    ///
    /// # Errors
    /// While a migration is connected, and once the disk is complete.
    pub fn admit(&self) -> Result<(), Denied> {
        match self.state {
            State::Receiving(None) => Ok(()),
            state => Err(denied(state)),
        }
    }

    /// A source introduces itself on `connection`.
    pub fn introduced(&mut self, connection: Connection, question: &Question) -> Introduction {
        let id = question.id;
        let retire = match self.state {
            State::Arrived(_) => None,
            State::Receiving(None) => self.seat(connection, id),
            State::Receiving(Some((old, Guest::Ours(same)))) if same == id => {
                self.seat(connection, id);
                // One that introduces itself twice has no earlier connection to wait for.
                (old != connection).then_some(old)
            }
            state => return Introduction::Refuse(denied(state)),
        };
        let answer = Answer { listening: Some(self.token), has: self.has(id) };
        Introduction::Answer { answer, retire }
    }

    fn seat(&mut self, connection: Connection, id: Id) -> Option<Connection> {
        self.state = State::Receiving(Some((connection, Guest::Ours(id))));
        None
    }

    fn has(&self, id: Id) -> Has {
        match (self.state, self.holds) {
            (State::Arrived(Some(arrived)), _) if arrived == id => Has::Arrived,
            (State::Receiving(_), Holds::CopyOf(Some(copy))) if copy == id => Has::Incomplete,
            _ => Has::Nothing,
        }
    }

    /// `guest`, on `connection`, wants to change the disk.
    pub fn wants_to_write(&mut self, connection: Connection, guest: Guest) -> Permission {
        match (self.state, guest) {
            (State::Receiving(Some(seat)), _) if seat == (connection, guest) => {}
            (State::Receiving(None), Guest::OldStyle | Guest::Plain) => {
                self.state = State::Receiving(Some((connection, guest)));
            }
            // A source without a seat has lost it to its own next connection, which has closed.
            (State::Receiving(None), Guest::Ours(_)) => return Permission::Refuse(Denied::Taken),
            (state, _) => return Permission::Refuse(denied(state)),
        }
        if self.holds == Holds::CopyOf(guest.id()) {
            return Permission::Go;
        }
        Permission::RecordFirst(Record::Incoming { id: guest.id() })
    }

    /// The record *incoming* for `guest` is durable, or could not be made so; then the process ends.
    pub fn recorded(&mut self, guest: Guest, durable: bool) {
        if durable {
            self.holds = Holds::CopyOf(guest.id());
        } else {
            self.state = State::Failed;
        }
    }

    /// HANDOVER arrived on `connection`.
    pub fn handed_over(&mut self, connection: Connection, handover: &Handover) -> Ending {
        let id = handover.id;
        let seated = self.state == State::Receiving(Some((connection, Guest::Ours(id))));
        let ours = handover.token == self.token && self.holds == Holds::CopyOf(Some(id));
        if !(seated && ours) {
            return Ending::Refuse;
        }
        self.state = State::Settling(Some(id));
        Ending::Settle(Record::Ours(Title::Arrived(id)))
    }

    /// DISC arrived on `connection`, and everything before it has been carried out.
    pub fn said_goodbye(&mut self, connection: Connection) -> Ending {
        let seated = self.state == State::Receiving(Some((connection, Guest::OldStyle)));
        if !(seated && self.holds == Holds::CopyOf(None)) {
            return Ending::Nothing;
        }
        self.state = State::Settling(None);
        Ending::Settle(Record::Ours(Title::Received))
    }

    /// Data and record are durable, or could not be made so. True: the disk is ours, acknowledge
    /// and exit with success. False: exit with an error and without another word to the source.
    pub fn settled(&mut self, durable: bool) -> bool {
        self.state = match self.state {
            State::Settling(id) if durable => State::Arrived(id),
            _ => State::Failed,
        };
        durable
    }

    /// A change that was permitted could not be made: the copy has a gap, whatever its sender says
    /// next. True: the process exits with an error. False: the copy was complete before.
    pub fn write_failed(&mut self) -> bool {
        if matches!(self.state, State::Receiving(_)) {
            self.state = State::Failed;
        }
        self.state == State::Failed
    }

    /// `connection` is gone, and none of its requests is under way.
    pub fn closed(&mut self, connection: Connection) {
        if matches!(self.state, State::Receiving(Some((seat, _))) if seat == connection) {
            self.state = State::Receiving(None);
        }
    }
}

fn denied(state: State) -> Denied {
    match state {
        State::Receiving(_) => Denied::Taken,
        State::Settling(_) | State::Arrived(_) => Denied::Complete,
        State::Failed => Denied::Failed,
    }
}

/// What a `serve` process, whose disk is ours by this title, answers a source.
#[must_use]
pub fn answer_when_serving(title: Title, question: &Question) -> Answer {
    let has = if title == Title::Arrived(question.id) { Has::Arrived } else { Has::Nothing };
    Answer { listening: None, has }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: Id = Id([1; 16]);
    const OTHER: Id = Id([2; 16]);
    const TOKEN: Token = Token([9; 16]);
    const HANDOVER: Handover = Handover { id: ID, token: TOKEN };

    fn ask(id: Id) -> Question {
        Question { size: 1 << 20, id }
    }

    fn listening(has: Has, retire: Option<Connection>) -> Introduction {
        Introduction::Answer { answer: Answer { listening: Some(TOKEN), has }, retire }
    }

    /// A destination that has taken a byte of `guest` on `connection`.
    fn receiving(connection: Connection, guest: Guest) -> Arrival {
        let mut arrival = Arrival::new(TOKEN, None);
        if let Guest::Ours(id) = guest {
            arrival.introduced(connection, &ask(id));
        }
        arrival.wants_to_write(connection, guest);
        arrival.recorded(guest, true);
        assert_eq!(arrival.wants_to_write(connection, guest), Permission::Go);
        arrival
    }

    #[test]
    fn the_first_byte_waits_for_the_record() {
        let mut arrival = Arrival::new(TOKEN, None);
        assert_eq!(arrival.introduced(1, &ask(ID)), listening(Has::Nothing, None));
        let first = Permission::RecordFirst(Record::Incoming { id: Some(ID) });
        assert_eq!(arrival.wants_to_write(1, Guest::Ours(ID)), first);
        assert_eq!(arrival.wants_to_write(1, Guest::Ours(ID)), first, "it is not durable yet");
        arrival.recorded(Guest::Ours(ID), true);
        assert_eq!(arrival.wants_to_write(1, Guest::Ours(ID)), Permission::Go);
    }

    #[test]
    fn a_record_that_cannot_be_written_ends_the_process_before_a_byte_is_taken() {
        let mut arrival = Arrival::new(TOKEN, None);
        arrival.wants_to_write(1, Guest::Plain);
        arrival.recorded(Guest::Plain, false);
        let refused = Permission::Refuse(Denied::Failed);
        assert_eq!(arrival.wants_to_write(1, Guest::Plain), refused);
    }

    #[test]
    fn nobody_else_comes_in_while_a_migration_is_connected() {
        let mut arrival = receiving(1, Guest::Ours(ID));
        assert_eq!(arrival.admit(), Err(Denied::Taken));
        assert_eq!(arrival.introduced(2, &ask(OTHER)), Introduction::Refuse(Denied::Taken));
        let refused = Permission::Refuse(Denied::Taken);
        assert_eq!(arrival.wants_to_write(2, Guest::Plain), refused);
        arrival.closed(2);
        assert_eq!(arrival.admit(), Err(Denied::Taken), "it was not connection 2 that migrates");
        arrival.closed(1);
        assert_eq!(arrival.admit(), Ok(()));
    }

    #[test]
    fn a_reader_does_not_keep_a_migration_out_and_cannot_write_into_it() {
        let mut arrival = Arrival::new(TOKEN, None);
        assert_eq!(arrival.admit(), Ok(()));
        assert_eq!(arrival.introduced(2, &ask(ID)), listening(Has::Nothing, None));
        let refused = Permission::Refuse(Denied::Taken);
        assert_eq!(arrival.wants_to_write(1, Guest::Plain), refused);
    }

    #[test]
    fn the_same_source_comes_again_and_its_earlier_connection_is_closed_for_good() {
        let mut arrival = receiving(1, Guest::Ours(ID));
        assert_eq!(arrival.introduced(2, &ask(ID)), listening(Has::Incomplete, Some(1)));
        let refused = Permission::Refuse(Denied::Taken);
        assert_eq!(arrival.wants_to_write(1, Guest::Ours(ID)), refused);
        assert_eq!(arrival.handed_over(1, &HANDOVER), Ending::Refuse);
        arrival.closed(1);
        assert_eq!(arrival.wants_to_write(2, Guest::Ours(ID)), Permission::Go);
        arrival.closed(2);
        assert_eq!(arrival.wants_to_write(1, Guest::Ours(ID)), refused, "the seat stays lost");
        assert_eq!(arrival.handed_over(1, &HANDOVER), Ending::Refuse);
    }

    #[test]
    fn a_source_that_introduces_itself_twice_on_one_connection_does_not_wait_for_itself() {
        let mut arrival = receiving(1, Guest::Ours(ID));
        assert_eq!(arrival.introduced(1, &ask(ID)), listening(Has::Incomplete, None));
        assert_eq!(arrival.wants_to_write(1, Guest::Ours(ID)), Permission::Go);
    }

    #[test]
    fn after_a_write_that_failed_neither_a_handover_nor_a_goodbye_makes_the_disk_ours() {
        let mut arrival = receiving(1, Guest::Ours(ID));
        arrival.write_failed();
        assert_eq!(arrival.handed_over(1, &HANDOVER), Ending::Refuse);
        assert_eq!(arrival.introduced(2, &ask(ID)), Introduction::Refuse(Denied::Failed));
        let mut arrival = receiving(1, Guest::OldStyle);
        arrival.write_failed();
        assert_eq!(arrival.said_goodbye(1), Ending::Nothing);
    }

    #[test]
    fn a_copy_that_somebody_else_has_written_into_is_not_resumed() {
        for other in [Guest::Ours(OTHER), Guest::Plain, Guest::OldStyle] {
            let mut arrival = receiving(1, Guest::Ours(ID));
            arrival.closed(1);
            if let Guest::Ours(id) = other {
                arrival.introduced(2, &ask(id));
            }
            let incoming = Permission::RecordFirst(Record::Incoming { id: other.id() });
            assert_eq!(arrival.wants_to_write(2, other), incoming);
            arrival.recorded(other, true);
            arrival.closed(2);
            assert_eq!(arrival.introduced(3, &ask(ID)), listening(Has::Nothing, None));
        }
    }

    #[test]
    fn a_question_alone_changes_nothing_of_what_is_there() {
        let mut arrival = receiving(1, Guest::Ours(ID));
        arrival.closed(1);
        arrival.introduced(2, &ask(OTHER));
        arrival.closed(2);
        assert_eq!(arrival.introduced(3, &ask(ID)), listening(Has::Incomplete, None));
    }

    #[test]
    fn a_restarted_destination_knows_whose_copy_it_has() {
        let mut arrival = Arrival::new(TOKEN, Some(ID));
        assert_eq!(arrival.introduced(1, &ask(ID)), listening(Has::Incomplete, None));
    }

    #[test]
    fn a_handover_with_the_wrong_id_or_token_or_from_elsewhere_is_refused() {
        let mut arrival = receiving(1, Guest::Ours(ID));
        let wrong_id = Handover { id: OTHER, ..HANDOVER };
        let wrong_token = Handover { token: Token([8; 16]), ..HANDOVER };
        assert_eq!(arrival.handed_over(1, &wrong_id), Ending::Refuse);
        assert_eq!(arrival.handed_over(1, &wrong_token), Ending::Refuse);
        assert_eq!(arrival.handed_over(2, &HANDOVER), Ending::Refuse);
        let ours = Record::Ours(Title::Arrived(ID));
        assert_eq!(arrival.handed_over(1, &HANDOVER), Ending::Settle(ours));
    }

    #[test]
    fn a_handover_of_a_disk_that_was_never_written_is_refused() {
        let mut arrival = Arrival::new(TOKEN, None);
        arrival.introduced(1, &ask(ID));
        assert_eq!(arrival.handed_over(1, &HANDOVER), Ending::Refuse);
    }

    #[test]
    fn while_the_disk_is_being_settled_no_question_is_answered() {
        let mut arrival = receiving(1, Guest::Ours(ID));
        arrival.handed_over(1, &HANDOVER);
        let refused = Introduction::Refuse(Denied::Complete);
        assert_eq!(arrival.introduced(2, &ask(ID)), refused);
        assert_eq!(arrival.handed_over(1, &HANDOVER), Ending::Refuse, "said twice");
        arrival.closed(1);
        assert!(arrival.settled(true));
        assert_eq!(arrival.introduced(2, &ask(ID)), listening(Has::Arrived, None));
        assert_eq!(arrival.introduced(3, &ask(OTHER)), listening(Has::Nothing, None));
        let complete = Permission::Refuse(Denied::Complete);
        assert_eq!(arrival.wants_to_write(2, Guest::Ours(ID)), complete);
    }

    #[test]
    fn a_disk_that_cannot_be_made_durable_never_arrives_and_nothing_is_said() {
        let mut arrival = receiving(1, Guest::Ours(ID));
        arrival.handed_over(1, &HANDOVER);
        assert!(!arrival.settled(false));
        assert_eq!(arrival.introduced(2, &ask(ID)), Introduction::Refuse(Denied::Failed));
    }

    #[test]
    fn goodbye_counts_from_the_old_style_peer_that_has_written_and_from_nobody_else() {
        let received = Ending::Settle(Record::Ours(Title::Received));
        assert_eq!(receiving(1, Guest::OldStyle).said_goodbye(1), received);
        assert_eq!(receiving(1, Guest::OldStyle).said_goodbye(2), Ending::Nothing);
        assert_eq!(Arrival::new(TOKEN, None).said_goodbye(1), Ending::Nothing);
        assert_eq!(receiving(1, Guest::Plain).said_goodbye(1), Ending::Nothing);
        assert_eq!(receiving(1, Guest::Ours(ID)).said_goodbye(1), Ending::Nothing);
    }

    #[test]
    fn a_serving_process_knows_the_migration_its_disk_came_with_and_no_other() {
        let arrived = Answer { listening: None, has: Has::Arrived };
        let nothing = Answer { listening: None, has: Has::Nothing };
        assert_eq!(answer_when_serving(Title::Arrived(ID), &ask(ID)), arrived);
        assert_eq!(answer_when_serving(Title::Arrived(OTHER), &ask(ID)), nothing);
        assert_eq!(answer_when_serving(Title::Adopted, &ask(ID)), nothing);
    }
}
