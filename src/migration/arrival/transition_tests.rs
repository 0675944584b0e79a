//! The table of transitions, `transitions.txt`: seeded random schedules call every function of an
//! arrival in random order.

use super::*;
use crate::transition_table::assert_accepted;
use std::collections::BTreeMap;
use std::fmt::Write;

const TOKEN: Token = Token([9; 16]);
const IDS: [Id; 2] = [Id([1; 16]), Id([2; 16])];
const SCHEDULES: u64 = 1500;
const STEPS: usize = 60;

const HEADER: &str = "\
# State and event -> next state and the answers: the transitions that seeded schedules find.
# (sender): the connection that the disk is received from; (other): any other connection.
# Written by transition_tests.rs.
";

fn state(arrival: &Arrival) -> &'static str {
    match arrival.state {
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

/// The name of a value: its first words, without numbers.
fn name(value: &impl std::fmt::Debug) -> String {
    let text = format!("{value:?}");
    let end = text.find([' ', '{']).unwrap_or(text.len());
    text[..end].chars().filter(|c| !c.is_ascii_digit()).collect::<String>().replace("()", "")
}

/// Calls a random function of the arrival; returns the event and the answer.
fn random_event(arrival: &mut Arrival, dice: &mut fastrand::Rng) -> (String, String) {
    let connection = dice.u64(1..4);
    let id = IDS[dice.usize(..2)];
    let silent = [Duration::ZERO, SOURCE_SILENCE, WRITER_SILENCE][dice.usize(..3)];
    let is_sender = arrival.holder().is_some_and(|(sender, _)| sender == connection);
    let by = if is_sender { "sender" } else { "other" };
    let (event, answer) = match dice.u8(..12) {
        0 | 1 => {
            let question = Question { size: 1 << 20, id };
            let answer = match arrival.on_introduction(connection, &question, silent) {
                ProbeDecision::Answer { answer, .. } => format!("Answer({:?})", answer.has),
                ProbeDecision::Refuse(denied) => format!("Refuse({})", name(&denied)),
            };
            ("introduction", answer)
        }
        2 | 3 => {
            let answer = match arrival.enter(connection, silent) {
                Ok(retire) if retire.is_empty() => "Ok".to_owned(),
                Ok(_) => "Retire".to_owned(),
                Err(denied) => format!("Refuse({})", name(&denied)),
            };
            ("enter", answer)
        }
        4 => {
            let denied = arrival.may_use(connection).err();
            ("use", denied.map_or("Ok".to_owned(), |denied| format!("Refuse({})", name(&denied))))
        }
        5..=7 => return write(arrival, dice, connection, by),
        8 => {
            let token = if dice.u8(..4) == 0 { Token([8; 16]) } else { TOKEN };
            let end = arrival.on_handover(connection, &Handover { id, token });
            ("handover", name(&end))
        }
        9 => ("disconnect", name(&arrival.on_disconnect(connection))),
        10 if matches!(arrival.state, ArrivalState::Settling(_)) => {
            let durable = dice.bool();
            arrival.on_settled(durable);
            return (format!("settled({durable})"), "-".to_owned());
        }
        10 if dice.u8(..8) == 0 => {
            let ends = if arrival.on_write_failure() { "Exit" } else { "-" };
            return ("write failed".to_owned(), ends.to_owned());
        }
        _ => {
            arrival.on_close(connection);
            ("close", "-".to_owned())
        }
    };
    (format!("{event}({by})"), answer)
}

/// A write and, if the record must be written first, the result of that.
fn write(
    arrival: &mut Arrival,
    dice: &mut fastrand::Rng,
    connection: Connection,
    by: &str,
) -> (String, String) {
    let event = format!("write({by})");
    match arrival.on_write_request(connection) {
        WritePermission::Go => (event, "Go".to_owned()),
        WritePermission::Refuse(denied) => (event, format!("Refuse({})", name(&denied))),
        WritePermission::RecordFirst(Record::Incoming { id }) => {
            let durable = dice.u8(..6) > 0;
            arrival.on_recorded(id, durable);
            (event, format!("Record(durable: {durable})"))
        }
        WritePermission::RecordFirst(record) => panic!("{record:?}"),
    }
}

fn table() -> String {
    let mut text = HEADER.to_owned();
    for admits in [Admits::Sources, Admits::PlainWriter, Admits::OldStyle] {
        let mut rows: BTreeMap<[String; 3], BTreeSet<String>> = BTreeMap::new();
        for seed in 0..SCHEDULES {
            let mut dice = fastrand::Rng::with_seed(seed);
            let copy = [None, Some(None), Some(Some(IDS[0]))][dice.usize(..3)];
            let mut arrival = Arrival::new(TOKEN, copy, admits);
            for _ in 0..STEPS {
                let before = state(&arrival).to_owned();
                let (event, answer) = random_event(&mut arrival, &mut dice);
                let after = state(&arrival).to_owned();
                rows.entry([before, event, after]).or_default().insert(answer);
            }
        }
        writeln!(text, "\nAdmits::{admits:?}").unwrap();
        for ([before, event, after], answers) in rows {
            let answers = answers.into_iter().collect::<Vec<_>>().join(", ");
            writeln!(text, "  {before:<27} {event:<20} -> {after:<27} {answers}").unwrap();
        }
    }
    text
}

#[test]
fn transitions_are_those_of_the_table() {
    assert_accepted("migration/arrival/transitions.txt", &table());
}
