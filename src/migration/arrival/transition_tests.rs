//! The table of transitions, `transitions.txt`. An exhaustive exploration calls every function of the
//! arrival in every state; tests/simulation passes through rows of the table only. To accept a
//! change: `FLEXNBD_ACCEPT=1 cargo test --lib arrival::transition_tests`.

use super::*;
use crate::transition_table::assert_accepted;
use std::collections::HashSet;
use std::fmt::Write;

const TOKEN: Token = Token([9; 16]);
const OTHER_TOKEN: Token = Token([8; 16]);
const IDS: [Id; 2] = [Id([1; 16]), Id([2; 16])];
/// One that holds the slot and one that competes for it; a third reaches no further row.
const CONNECTIONS: [Connection; 2] = [1, 2];
const SILENCES: [Duration; 3] = [Duration::ZERO, SOURCE_SILENCE, WRITER_SILENCE];

const HEADER: &str = "\
# State and event -> next state and the answers: every transition that an exploration finds.
# (sender): the connection that the disk is received from; (other): any other connection.
# Written by transition_tests.rs: FLEXNBD_ACCEPT=1 cargo test --lib arrival::transition_tests
";

/// A call of the server.
#[derive(Clone, Copy)]
enum Event {
    Introduction(Connection, Id, Duration),
    Enter(Connection, Duration),
    Use(Connection),
    /// A request to write; if a record has to be durable first, whether it becomes so.
    Write(Connection, bool),
    Handover(Connection, Handover),
    Disconnect(Connection),
    Close(Connection),
    WriteFailure,
    Settled(bool),
}

/// The parts of a row's answer: `Refuse` and `SlotTaken`, for example.
type ReplyName = (&'static str, &'static str);

/// State, event, the kind of the connection, next state and answer.
type Row = (&'static str, &'static str, &'static str, &'static str, ReplyName);

/// Every event that can come in this state.
fn events(arrival: &Arrival) -> Vec<Event> {
    let mut events = vec![Event::WriteFailure];
    if matches!(arrival.state, ArrivalState::Settling(_)) {
        // Requests that fail now are found by the flush that settles.
        events = vec![Event::Settled(false), Event::Settled(true)];
    }
    for connection in CONNECTIONS {
        events.extend([
            Event::Use(connection),
            Event::Write(connection, false),
            Event::Write(connection, true),
            Event::Disconnect(connection),
            Event::Close(connection),
        ]);
        for silent in SILENCES {
            events.push(Event::Enter(connection, silent));
            events.extend(IDS.map(|id| Event::Introduction(connection, id, silent)));
        }
        for token in [TOKEN, OTHER_TOKEN] {
            events.extend(IDS.map(|id| Event::Handover(connection, Handover { id, token })));
        }
    }
    events
}

/// Calls the function of the arrival for an event; returns the event's name, its connection, and the answer's name.
fn call(arrival: &mut Arrival, event: Event) -> (&'static str, Option<Connection>, ReplyName) {
    let nothing = ("-", "");
    match event {
        Event::Introduction(connection, id, silent) => {
            let question = Question { size: 1 << 20, id };
            let answer = match arrival.on_introduction(connection, &question, silent) {
                ProbeDecision::Answer { answer, .. } => ("Answer", has_name(answer.has)),
                ProbeDecision::Refuse(denied) => ("Refuse", denied_name(denied)),
            };
            ("introduction", Some(connection), answer)
        }
        Event::Enter(connection, silent) => {
            let answer = match arrival.enter(connection, silent) {
                Ok(retire) if retire.is_empty() => ("Ok", ""),
                Ok(_) => ("Retire", ""),
                Err(denied) => ("Refuse", denied_name(denied)),
            };
            ("enter", Some(connection), answer)
        }
        Event::Use(connection) => {
            let denied = arrival.may_use(connection).err();
            let answer = denied.map_or(("Ok", ""), |denied| ("Refuse", denied_name(denied)));
            ("use", Some(connection), answer)
        }
        Event::Write(connection, durable) => {
            let answer = match arrival.on_write_request(connection) {
                WritePermission::Go => ("Go", ""),
                WritePermission::Refuse(denied) => ("Refuse", denied_name(denied)),
                WritePermission::RecordFirst(Record::Incoming { id }) => {
                    arrival.on_recorded(id, durable);
                    ("Record", if durable { "durable: true" } else { "durable: false" })
                }
                WritePermission::RecordFirst(record) => panic!("{record:?}"),
            };
            ("write", Some(connection), answer)
        }
        Event::Handover(connection, handover) => {
            ("handover", Some(connection), end_name(&arrival.on_handover(connection, &handover)))
        }
        Event::Disconnect(connection) => {
            ("disconnect", Some(connection), end_name(&arrival.on_disconnect(connection)))
        }
        Event::Close(connection) => {
            arrival.on_close(connection);
            ("close", Some(connection), nothing)
        }
        Event::WriteFailure => {
            let exits = arrival.on_write_failure();
            ("write failed", None, if exits { ("Exit", "") } else { nothing })
        }
        Event::Settled(durable) => {
            arrival.on_settled(durable);
            (if durable { "settled(true)" } else { "settled(false)" }, None, nothing)
        }
    }
}

fn has_name(has: Has) -> &'static str {
    match has {
        Has::Nothing => "Nothing",
        Has::Incomplete => "Incomplete",
        Has::Arrived => "Arrived",
    }
}

fn denied_name(denied: AccessDenied) -> &'static str {
    match denied {
        AccessDenied::NotIntroduced => "NotIntroduced",
        AccessDenied::SlotTaken(_) => "SlotTaken",
        AccessDenied::NotSender => "NotSender",
        AccessDenied::Incomplete => "Incomplete",
        AccessDenied::Complete => "Complete",
        AccessDenied::Failed => "Failed",
    }
}

fn end_name(end: &ArrivalEnd) -> ReplyName {
    match end {
        ArrivalEnd::Settle(Record::Ours(Provenance::Arrived(_))) => ("Settle", "Ours(Arrived(Id))"),
        ArrivalEnd::Settle(Record::Ours(Provenance::Received)) => ("Settle", "Ours(Received)"),
        ArrivalEnd::Settle(record) => panic!("{record:?}"),
        ArrivalEnd::Refuse => ("Refuse", ""),
        ArrivalEnd::Nothing => ("Nothing", ""),
    }
}

/// What an arrival holds about a connection: its tenure of the slot, its migration, and whether it is
/// retiring.
type ConnectionKey = (u8, u8, bool);

/// Equal for two arrivals that differ only in the numbers of connections, or in which of the two
/// migrations is which.
type Key = ([ConnectionKey; 2], &'static str, u8, u8, [bool; 2]);

fn key(arrival: &Arrival) -> Key {
    let renamed = |[first, second]: [Id; 2]| {
        let number = |id: Option<Id>| match id {
            Some(id) if id == first => 1,
            Some(_) => 2,
            None => 0,
        };
        let slot = |connection| match arrival.state {
            ArrivalState::Receiving(Some(slot)) if slot.connection == connection => {
                1 + number(slot.sender.id())
            }
            _ => 0,
        };
        let mut connections = CONNECTIONS.map(|connection| {
            let introduced = arrival.introduced.get(&connection).copied();
            (slot(connection), number(introduced), arrival.retiring.contains(&connection))
        });
        connections.sort_unstable();
        let copy = match arrival.copy {
            RecordedCopy::Nothing => 0,
            RecordedCopy::Of(id) => 1 + number(id),
        };
        let ended = match arrival.state {
            ArrivalState::Settling(id) | ArrivalState::Arrived(id) => number(id),
            ArrivalState::Receiving(_) | ArrivalState::Failed => 0,
        };
        let former = [first, second].map(|id| arrival.former_senders.contains(&id));
        (connections, arrival.state_name(), copy, ended, former)
    };
    renamed(IDS).min(renamed([IDS[1], IDS[0]]))
}

/// The transitions from every state that a process with this policy can reach.
fn explore(admits: Admits) -> BTreeSet<Row> {
    let mut rows = BTreeSet::new();
    let mut visited = HashSet::new();
    let copies = [None, Some(None), Some(Some(IDS[0]))];
    let mut queue: VecDeque<Arrival> = copies.map(|copy| Arrival::new(TOKEN, copy, admits)).into();
    while let Some(arrival) = queue.pop_front() {
        let before = arrival.state_name();
        for event in events(&arrival) {
            let mut next = arrival.clone();
            let (name, connection, answer) = call(&mut next, event);
            let holder = arrival.holder().map(|(holder, _)| holder);
            let by = match connection {
                None => "",
                Some(connection) if Some(connection) == holder => "(sender)",
                Some(_) => "(other)",
            };
            rows.insert((before, name, by, next.state_name(), answer));
            if visited.insert(key(&next)) {
                queue.push_back(next);
            }
        }
    }
    rows
}

fn table() -> String {
    let mut text = HEADER.to_owned();
    for admits in [Admits::Sources, Admits::PlainWriter, Admits::OldStyle] {
        let mut rows: BTreeMap<[String; 3], BTreeSet<String>> = BTreeMap::new();
        for (before, event, by, after, (answer, detail)) in explore(admits) {
            let detail = if detail.is_empty() { String::new() } else { format!("({detail})") };
            rows.entry([before.to_owned(), format!("{event}{by}"), after.to_owned()])
                .or_default()
                .insert(format!("{answer}{detail}"));
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
