//! Which connection gets or loses the slot, and which handovers are accepted.

use super::*;
use crate::disk::ownership::{ForListen, for_listen};

const ID: Id = Id([1; 16]);
const OTHER: Id = Id([2; 16]);
const TOKEN: Token = Token([9; 16]);
const HANDOVER: Handover = Handover { id: ID, token: TOKEN };
const ALIVE: Duration = Duration::ZERO;
const JUST_ALIVE: Duration = SOURCE_SILENCE.checked_sub(Duration::from_millis(1)).unwrap();

fn ask(id: Id) -> Question {
    Question { size: 1 << 20, id }
}

fn listening(has: Has, retire: &[Connection]) -> ProbeDecision {
    let answer = Answer { listening: Some(TOKEN), has };
    ProbeDecision::Answer { answer, retire: retire.to_vec() }
}

fn taken(by: Connection) -> ProbeDecision {
    ProbeDecision::Refuse(AccessDenied::SlotTaken(by))
}

fn refused(denied: AccessDenied) -> WritePermission {
    WritePermission::Refuse(denied)
}

fn policy(sender: Sender) -> Admits {
    match sender {
        Sender::Source(_) => Admits::Sources,
        Sender::Plain => Admits::PlainWriter,
        Sender::OldStyle => Admits::OldStyle,
    }
}

fn fresh() -> Arrival {
    Arrival::new(TOKEN, None, Admits::Sources)
}

/// A source enters on `connection`; returns the connections to retire first.
fn enters(arrival: &mut Arrival, connection: Connection, id: Id, silent: Duration) -> Vec<u64> {
    let answered = arrival.on_introduction(connection, &ask(id), silent);
    assert!(matches!(answered, ProbeDecision::Answer { .. }), "{answered:?}");
    arrival.enter(connection, silent).unwrap()
}

/// Executes a write on `connection`.
fn writes(arrival: &mut Arrival, connection: Connection) {
    if let WritePermission::RecordFirst(Record::Incoming { id }) =
        arrival.on_write_request(connection)
    {
        arrival.on_recorded(id, true);
    }
    assert_eq!(arrival.on_write_request(connection), WritePermission::Go);
}

/// A destination to which `sender` has written on `connection`.
fn receiving(connection: Connection, sender: Sender) -> Arrival {
    let mut arrival = Arrival::new(TOKEN, None, policy(sender));
    if let Sender::Source(id) = sender {
        arrival.on_introduction(connection, &ask(id), ALIVE);
    }
    arrival.enter(connection, ALIVE).unwrap();
    writes(&mut arrival, connection);
    arrival
}

#[test]
fn first_byte_waits_for_the_record() {
    let mut arrival = fresh();
    assert_eq!(arrival.on_introduction(1, &ask(ID), ALIVE), listening(Has::Nothing, &[]));
    arrival.enter(1, ALIVE).unwrap();
    let first = WritePermission::RecordFirst(Record::Incoming { id: Some(ID) });
    assert_eq!(arrival.on_write_request(1), first);
    assert_eq!(arrival.on_write_request(1), first, "it is not durable yet");
    arrival.on_recorded(Some(ID), true);
    assert_eq!(arrival.on_write_request(1), WritePermission::Go);
}

#[test]
fn failed_record_refuses_every_write() {
    let mut arrival = fresh();
    enters(&mut arrival, 1, ID, ALIVE);
    arrival.on_write_request(1);
    arrival.on_recorded(Some(ID), false);
    assert_eq!(arrival.on_write_request(1), refused(AccessDenied::Failed));
}

#[test]
fn client_without_introduction_is_never_admitted() {
    let mut arrival = fresh();
    assert_eq!(
        arrival.may_enter(1, ALIVE),
        Err(AccessDenied::NotIntroduced),
        "before the first source"
    );
    assert_eq!(arrival.enter(1, ALIVE), Err(AccessDenied::NotIntroduced));
    enters(&mut arrival, 2, ID, ALIVE);
    assert_eq!(
        arrival.enter(1, WRITER_SILENCE),
        Err(AccessDenied::NotIntroduced),
        "while it is connected"
    );
    writes(&mut arrival, 2);
    arrival.on_close(2);
    assert_eq!(
        arrival.enter(1, ALIVE),
        Err(AccessDenied::NotIntroduced),
        "between two connections"
    );
    assert_eq!(arrival.on_write_request(1), refused(AccessDenied::NotSender));
    assert_eq!(arrival.may_use(1), Err(AccessDenied::NotSender));
}

#[test]
fn another_source_is_refused_while_the_sender_is_active() {
    let mut arrival = receiving(1, Sender::Source(ID));
    assert_eq!(arrival.on_introduction(2, &ask(OTHER), JUST_ALIVE), taken(1));
    assert_eq!(arrival.on_write_request(2), refused(AccessDenied::SlotTaken(1)));
    arrival.on_close(2);
    assert_eq!(
        arrival.on_introduction(3, &ask(OTHER), ALIVE),
        taken(1),
        "connection 2 held nothing"
    );
    arrival.on_close(1);
    assert_eq!(enters(&mut arrival, 4, OTHER, ALIVE), [0; 0]);
}

#[test]
fn another_source_gets_the_slot_of_a_silent_sender() {
    let mut arrival = receiving(1, Sender::Source(ID));
    assert_eq!(enters(&mut arrival, 2, OTHER, SOURCE_SILENCE), [1], "it is closed first");
    for late in [arrival.on_write_request(1), arrival.on_write_request(1)] {
        assert_eq!(late, refused(AccessDenied::SlotTaken(2)));
    }
    assert_eq!(arrival.on_handover(1, &HANDOVER), ArrivalEnd::Refuse);
    arrival.on_close(1);
    let first = WritePermission::RecordFirst(Record::Incoming { id: Some(OTHER) });
    assert_eq!(arrival.on_write_request(2), first, "from the beginning");
    // The first source gets the answer that its disk has not arrived, and enters once the slot is
    // free.
    assert_eq!(arrival.on_introduction(3, &ask(ID), ALIVE), listening(Has::Incomplete, &[]));
    assert_eq!(arrival.enter(3, ALIVE), Err(AccessDenied::SlotTaken(2)));
    arrival.on_recorded(Some(OTHER), true);
    assert_eq!(arrival.on_introduction(3, &ask(ID), ALIVE), listening(Has::Nothing, &[]));
    arrival.on_close(2);
    assert!(arrival.enter(3, ALIVE).is_ok());
}

#[test]
fn later_sources_wait_for_a_revoked_sender() {
    let mut arrival = receiving(1, Sender::Source(ID));
    assert_eq!(arrival.on_introduction(2, &ask(ID), ALIVE), listening(Has::Incomplete, &[1]));
    // Its requests did not end in time: the answer was not sent, and the source connects again.
    arrival.on_close(2);
    assert_eq!(arrival.on_introduction(3, &ask(ID), ALIVE), listening(Has::Incomplete, &[1]));
    assert_eq!(arrival.enter(3, ALIVE), Ok(vec![1]));
    arrival.on_close(1);
    assert_eq!(arrival.enter(3, ALIVE), Ok(vec![]));
}

#[test]
fn question_alone_holds_no_slot() {
    let mut arrival = receiving(1, Sender::Source(ID));
    arrival.on_close(1);
    assert_eq!(arrival.on_introduction(2, &ask(OTHER), ALIVE), listening(Has::Nothing, &[]));
    assert_eq!(arrival.on_introduction(3, &ask(ID), ALIVE), listening(Has::Incomplete, &[]));
    assert!(arrival.enter(3, ALIVE).is_ok(), "the question on 2 took the slot");
    assert_eq!(arrival.enter(2, ALIVE), Err(AccessDenied::SlotTaken(3)));
}

#[test]
fn returning_source_closes_its_earlier_connection() {
    let mut arrival = receiving(1, Sender::Source(ID));
    assert_eq!(arrival.on_introduction(2, &ask(ID), ALIVE), listening(Has::Incomplete, &[1]));
    assert_eq!(arrival.on_write_request(1), refused(AccessDenied::NotSender));
    assert_eq!(arrival.on_handover(1, &HANDOVER), ArrivalEnd::Refuse);
    assert_eq!(arrival.enter(1, ALIVE), Err(AccessDenied::NotIntroduced));
    arrival.on_close(1);
    arrival.enter(2, ALIVE).unwrap();
    assert_eq!(arrival.on_write_request(2), WritePermission::Go);
    arrival.on_close(2);
    assert_eq!(
        arrival.on_write_request(1),
        refused(AccessDenied::NotSender),
        "the slot stays lost"
    );
    assert_eq!(arrival.on_handover(1, &HANDOVER), ArrivalEnd::Refuse);
}

#[test]
fn later_of_two_introductions_with_one_id_enters() {
    let mut arrival = fresh();
    arrival.on_introduction(1, &ask(ID), ALIVE);
    arrival.on_introduction(2, &ask(ID), ALIVE);
    assert_eq!(arrival.enter(1, ALIVE), Err(AccessDenied::NotIntroduced));
    assert!(arrival.enter(2, ALIVE).is_ok());
}

#[test]
fn second_introduction_on_one_connection_does_not_wait() {
    let mut arrival = fresh();
    arrival.on_introduction(1, &ask(ID), ALIVE);
    assert_eq!(arrival.on_introduction(1, &ask(ID), ALIVE), listening(Has::Nothing, &[]));
    assert_eq!(arrival.enter(1, ALIVE), Ok(vec![]));
    writes(&mut arrival, 1);
}

#[test]
fn failed_write_prevents_handover_and_arrival_by_disc() {
    let mut arrival = receiving(1, Sender::Source(ID));
    arrival.on_write_failure();
    assert_eq!(arrival.on_handover(1, &HANDOVER), ArrivalEnd::Refuse);
    let failed = ProbeDecision::Refuse(AccessDenied::Failed);
    assert_eq!(arrival.on_introduction(2, &ask(ID), ALIVE), failed);
    let mut arrival = receiving(1, Sender::OldStyle);
    arrival.on_write_failure();
    assert_eq!(arrival.on_disconnect(1), ArrivalEnd::Nothing);
}

#[test]
fn copy_changed_by_a_plain_writer_is_not_resumed() {
    let mut arrival = Arrival::new(TOKEN, Some(Some(ID)), Admits::PlainWriter);
    assert!(arrival.enter(1, ALIVE).is_ok());
    let incoming = WritePermission::RecordFirst(Record::Incoming { id: None });
    assert_eq!(arrival.on_write_request(1), incoming);
    arrival.on_recorded(None, true);
    arrival.on_close(1);
    assert_eq!(arrival.on_introduction(2, &ask(ID), ALIVE), listening(Has::Nothing, &[]));
}

#[test]
fn plain_writer_keeps_the_slot_until_silent_or_gone() {
    let mut arrival = receiving(1, Sender::Plain);
    let almost = WRITER_SILENCE.checked_sub(Duration::from_millis(1)).unwrap();
    assert_eq!(arrival.enter(2, almost), Err(AccessDenied::SlotTaken(1)));
    assert_eq!(arrival.on_introduction(3, &ask(ID), almost), taken(1), "nor a source");
    assert_eq!(arrival.may_use(2), Err(AccessDenied::SlotTaken(1)));
    assert_eq!(arrival.on_disconnect(1), ArrivalEnd::Nothing);
    assert_eq!(arrival.enter(2, WRITER_SILENCE), Ok(vec![1]));
    arrival.on_close(1);
    writes(&mut arrival, 2);
    arrival.on_close(2);
    assert_eq!(enters(&mut arrival, 4, ID, ALIVE), [0; 0]);
    assert_eq!(
        arrival.enter(5, ALIVE),
        Err(AccessDenied::SlotTaken(4)),
        "a source is not displaced"
    );
}

#[test]
fn plain_client_without_writes_yields_to_a_source() {
    let mut arrival = Arrival::new(TOKEN, None, Admits::PlainWriter);
    arrival.enter(1, ALIVE).unwrap();
    assert_eq!(arrival.enter(2, JUST_ALIVE), Err(AccessDenied::SlotTaken(1)));
    assert_eq!(enters(&mut arrival, 3, ID, ALIVE), [1], "its session is ended");
    assert_eq!(arrival.may_use(1), Err(AccessDenied::SlotTaken(3)));
}

#[test]
fn only_the_oldstyle_writer_uses_the_arriving_disk() {
    let mut arrival = Arrival::new(TOKEN, None, Admits::OldStyle);
    for connection in [1, 2] {
        arrival.enter(connection, ALIVE).unwrap();
        assert_eq!(arrival.may_use(connection), Ok(()), "the bytes from before");
    }
    writes(&mut arrival, 1);
    assert_eq!(arrival.enter(3, ALIVE), Ok(vec![]), "old style cannot refuse in the greeting");
    for other in [2, 3] {
        assert_eq!(arrival.may_use(other), Err(AccessDenied::SlotTaken(1)));
        assert_eq!(arrival.on_write_request(other), refused(AccessDenied::SlotTaken(1)));
        assert_eq!(arrival.on_disconnect(other), ArrivalEnd::Nothing);
    }
    arrival.on_close(1);
    assert_eq!(arrival.may_use(2), Err(AccessDenied::NotSender), "an incomplete copy");
    writes(&mut arrival, 2);
    assert_eq!(arrival.enter(3, WRITER_SILENCE), Ok(vec![2]), "a silent writer is closed");
    assert_eq!(arrival.on_write_request(2), refused(AccessDenied::NotSender));
    writes(&mut arrival, 3);
}

/// A destination that was started again on an image with this record.
fn restarted(record: &Record, admits: Admits) -> Arrival {
    let ForListen::Accept { incomplete_copy } = for_listen(Some(record), false) else {
        panic!("{record:?}")
    };
    Arrival::new(TOKEN, incomplete_copy, admits)
}

#[test]
fn restarted_oldstyle_destination_hides_an_incomplete_copy() {
    for id in [None, Some(ID)] {
        let mut arrival = restarted(&Record::Incoming { id }, Admits::OldStyle);
        arrival.enter(1, ALIVE).unwrap();
        assert_eq!(arrival.may_use(1), Err(AccessDenied::NotSender), "{id:?}");
        writes(&mut arrival, 1);
        assert_eq!(arrival.may_use(1), Ok(()), "the writer");
    }
}

#[test]
fn plain_client_reads_an_incomplete_copy_after_writing() {
    for id in [None, Some(ID)] {
        let mut arrival = restarted(&Record::Incoming { id }, Admits::PlainWriter);
        arrival.enter(1, ALIVE).unwrap();
        assert_eq!(arrival.may_use(1), Err(AccessDenied::Incomplete), "{id:?}");
        writes(&mut arrival, 1);
        assert_eq!(arrival.may_use(1), Ok(()), "the writer");
        arrival.on_close(1);
        arrival.enter(2, ALIVE).unwrap();
        assert_eq!(arrival.may_use(2), Err(AccessDenied::Incomplete), "of another client");
    }
    let mut arrival = Arrival::new(TOKEN, None, Admits::PlainWriter);
    arrival.enter(1, ALIVE).unwrap();
    assert_eq!(arrival.may_use(1), Ok(()), "no copy was begun");
}

#[test]
fn restarted_destination_knows_the_id_of_its_copy() {
    let mut arrival = Arrival::new(TOKEN, Some(Some(ID)), Admits::Sources);
    assert_eq!(arrival.on_introduction(1, &ask(ID), ALIVE), listening(Has::Incomplete, &[]));
}

#[test]
fn handover_with_wrong_id_token_or_connection_is_refused() {
    let mut arrival = receiving(1, Sender::Source(ID));
    let wrong_id = Handover { id: OTHER, ..HANDOVER };
    let wrong_token = Handover { token: Token([8; 16]), ..HANDOVER };
    assert_eq!(arrival.on_handover(1, &wrong_id), ArrivalEnd::Refuse);
    assert_eq!(arrival.on_handover(1, &wrong_token), ArrivalEnd::Refuse);
    assert_eq!(arrival.on_handover(2, &HANDOVER), ArrivalEnd::Refuse);
    let ours = Record::Ours(Provenance::Arrived(ID));
    assert_eq!(arrival.on_handover(1, &HANDOVER), ArrivalEnd::Settle(ours));
}

#[test]
fn handover_of_an_unwritten_disk_is_refused() {
    let mut arrival = fresh();
    enters(&mut arrival, 1, ID, ALIVE);
    assert_eq!(arrival.on_handover(1, &HANDOVER), ArrivalEnd::Refuse);
}

#[test]
fn no_question_is_answered_while_settling() {
    let mut arrival = receiving(1, Sender::Source(ID));
    arrival.on_handover(1, &HANDOVER);
    let complete = ProbeDecision::Refuse(AccessDenied::Complete);
    assert_eq!(arrival.on_introduction(2, &ask(ID), WRITER_SILENCE), complete);
    assert_eq!(arrival.on_handover(1, &HANDOVER), ArrivalEnd::Refuse, "the second handover");
    arrival.on_close(1);
    assert!(arrival.on_settled(true));
    assert_eq!(arrival.on_introduction(2, &ask(ID), ALIVE), listening(Has::Arrived, &[]));
    assert_eq!(arrival.on_introduction(3, &ask(OTHER), ALIVE), listening(Has::Nothing, &[]));
    assert_eq!(arrival.enter(2, ALIVE), Err(AccessDenied::Complete));
    assert_eq!(arrival.on_write_request(2), refused(AccessDenied::Complete));
}

#[test]
fn disk_that_cannot_be_made_durable_never_arrives() {
    let mut arrival = receiving(1, Sender::Source(ID));
    arrival.on_handover(1, &HANDOVER);
    assert!(!arrival.on_settled(false));
    let failed = ProbeDecision::Refuse(AccessDenied::Failed);
    assert_eq!(arrival.on_introduction(2, &ask(ID), ALIVE), failed);
}

#[test]
fn disc_counts_only_from_the_oldstyle_writer() {
    let received = ArrivalEnd::Settle(Record::Ours(Provenance::Received));
    assert_eq!(receiving(1, Sender::OldStyle).on_disconnect(1), received);
    assert_eq!(receiving(1, Sender::OldStyle).on_disconnect(2), ArrivalEnd::Nothing);
    assert_eq!(fresh().on_disconnect(1), ArrivalEnd::Nothing);
    assert_eq!(receiving(1, Sender::Plain).on_disconnect(1), ArrivalEnd::Nothing);
    assert_eq!(receiving(1, Sender::Source(ID)).on_disconnect(1), ArrivalEnd::Nothing);
}

#[test]
fn number_of_remembered_senders_is_bounded() {
    let mut arrival = fresh();
    let many = u8::try_from(FORMER_SENDERS_MAX).unwrap() + 1;
    for number in 0..many {
        let connection = Connection::from(number);
        enters(&mut arrival, connection, Id([number; 16]), ALIVE);
        arrival.on_close(connection);
    }
    enters(&mut arrival, 200, Id([200; 16]), ALIVE);
    assert_eq!(arrival.on_introduction(201, &ask(Id([1; 16])), ALIVE), taken(200));
    let last = arrival.on_introduction(201, &ask(Id([many - 1; 16])), ALIVE);
    assert_eq!(last, listening(Has::Nothing, &[]));
}

#[test]
fn serving_process_knows_only_its_own_migration() {
    let arrived = Answer { listening: None, has: Has::Arrived };
    let nothing = Answer { listening: None, has: Has::Nothing };
    assert_eq!(answer_when_serving(Provenance::Arrived(ID), &ask(ID)), arrived);
    assert_eq!(answer_when_serving(Provenance::Arrived(OTHER), &ask(ID)), nothing);
    assert_eq!(answer_when_serving(Provenance::Adopted, &ask(ID)), nothing);
}
