//! Compares the transitions of source and destination with their tables, `machine/transitions.txt`
//! and `arrival/transitions.txt`. Unit tests write them (`FLEXNBD_ACCEPT=1`, see tests/README.md).

use flexnbd::disk::ownership::Id;
use flexnbd::migration::arrival::{
    AccessDenied, Admits, Arrival, ArrivalEnd, Connection, ProbeDecision, WritePermission,
};
use flexnbd::migration::job::{Action, Event};
use flexnbd::migration::machine::Machine;
use flexnbd::migration::wire::{Handover, Question, Token};
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::rc::Rc;
use std::sync::LazyLock;
use std::time::Duration;

const MACHINE: &str = include_str!("../../src/migration/machine/transitions.txt");
const ARRIVAL: &str = include_str!("../../src/migration/arrival/transitions.txt");

/// The rows of a table: the columns up to the last, and the last, which lists actions or answers.
type Table = BTreeMap<&'static str, Vec<&'static str>>;

/// Transitions that a table lacks.
#[derive(Clone, Debug, Default)]
pub(crate) struct Unlisted(Rc<RefCell<BTreeSet<String>>>);

impl Unlisted {
    /// Notes a transition unless the table has it.
    fn check(&self, table: &Table, columns: &str, last: &str) {
        if !table.get(columns).is_some_and(|listed| listed.contains(&last)) {
            self.0.borrow_mut().insert(format!("{columns}{last}"));
        }
    }

    pub(crate) fn take(&self) -> BTreeSet<String> {
        self.0.take()
    }
}

fn table(text: &'static str, width: usize) -> Table {
    let rows = text.lines().filter(|line| line.len() > width && !line.starts_with('#'));
    let table: Table = rows
        .map(|row| row.split_at(width))
        .map(|(columns, last)| (columns, last.split(", ").collect()))
        .collect();
    assert!(table.len() > 50, "only {} rows are listed", table.len());
    table
}

/// The width of a row without its last column.
const MACHINE_WIDTH: usize = 29 + 1 + 12 + 4 + 29 + 1;
const ARRIVAL_WIDTH: usize = 2 + 27 + 1 + 20 + 4 + 27 + 1;

/// Steps the machine.
pub(crate) fn step(
    machine: &mut Machine,
    now: Duration,
    event: Event,
    unlisted: &Unlisted,
) -> Action {
    static TABLE: LazyLock<Table> = LazyLock::new(|| table(MACHINE, MACHINE_WIDTH));
    let phase = machine.phase_name();
    let event_name = if machine.is_breaking() { "(break)" } else { event.name() };
    let action = machine.step(now, event);
    let next = machine.phase_name();
    let copies = ["Copying", "FinalCopy"].contains(&next)
        && ["Look", "TakeDirty", "Send(Write)", "Send(Zero)", "Wait"].contains(&action.name());
    let action_name = if copies { "(copy)" } else { action.name() };
    let columns = format!("{phase:<29} {event_name:<12} -> {next:<29} ");
    unlisted.check(&TABLE, &columns, action_name);
    action
}

/// An arrival that admits sources only.
#[derive(Debug)]
pub(crate) struct CheckedArrival {
    arrival: Arrival,
    unlisted: Unlisted,
    /// The state before a request to write that waits for a record, and the event's name.
    recording: Option<(&'static str, String)>,
}

impl CheckedArrival {
    pub(crate) fn new(token: Token, copy: Option<Option<Id>>, unlisted: &Unlisted) -> Self {
        let arrival = Arrival::new(token, copy, Admits::Sources);
        Self { arrival, unlisted: unlisted.clone(), recording: None }
    }

    /// The name of an event that comes on this connection.
    fn event(&self, name: &str, connection: Connection) -> String {
        let is_holder = self.arrival.holder().is_some_and(|(holder, _)| holder == connection);
        format!("{name}({})", if is_holder { "sender" } else { "other" })
    }

    fn check(&self, before: &str, event: &str, answer: &str) {
        static TABLE: LazyLock<Table> = LazyLock::new(|| {
            let sources = ARRIVAL.split("\n\n").find(|part| part.starts_with("Admits::Sources"));
            table(sources.unwrap_or_default(), ARRIVAL_WIDTH)
        });
        let columns = format!("  {before:<27} {event:<20} -> {:<27} ", self.arrival.state_name());
        self.unlisted.check(&TABLE, &columns, answer);
    }

    pub(crate) fn on_introduction(
        &mut self,
        connection: Connection,
        question: &Question,
        silent: Duration,
    ) -> ProbeDecision {
        let (before, event) = (self.arrival.state_name(), self.event("introduction", connection));
        let decision = self.arrival.on_introduction(connection, question, silent);
        let answer = match &decision {
            ProbeDecision::Answer { answer, .. } => format!("Answer({:?})", answer.has),
            ProbeDecision::Refuse(denied) => refusal(denied),
        };
        self.check(before, &event, &answer);
        decision
    }

    pub(crate) fn enter(
        &mut self,
        connection: Connection,
        silent: Duration,
    ) -> Result<Vec<Connection>, AccessDenied> {
        let (before, event) = (self.arrival.state_name(), self.event("enter", connection));
        let entered = self.arrival.enter(connection, silent);
        let answer = match &entered {
            Ok(retire) if retire.is_empty() => "Ok".to_owned(),
            Ok(_) => "Retire".to_owned(),
            Err(denied) => refusal(denied),
        };
        self.check(before, &event, &answer);
        entered
    }

    pub(crate) fn on_write_request(&mut self, connection: Connection) -> WritePermission {
        let (before, event) = (self.arrival.state_name(), self.event("write", connection));
        let permission = self.arrival.on_write_request(connection);
        match &permission {
            WritePermission::Go => self.check(before, &event, "Go"),
            WritePermission::Refuse(denied) => self.check(before, &event, &refusal(denied)),
            WritePermission::RecordFirst(_) => self.recording = Some((before, event)),
        }
        permission
    }

    pub(crate) fn on_recorded(&mut self, id: Option<Id>, durable: bool) {
        self.arrival.on_recorded(id, durable);
        if let Some((before, event)) = self.recording.take() {
            self.check(before, &event, &format!("Record(durable: {durable})"));
        }
    }

    pub(crate) fn on_handover(
        &mut self,
        connection: Connection,
        handover: &Handover,
    ) -> ArrivalEnd {
        let (before, event) = (self.arrival.state_name(), self.event("handover", connection));
        let end = self.arrival.on_handover(connection, handover);
        self.check(before, &event, &name(&end));
        end
    }

    pub(crate) fn on_disconnect(&mut self, connection: Connection) -> ArrivalEnd {
        let (before, event) = (self.arrival.state_name(), self.event("disconnect", connection));
        let end = self.arrival.on_disconnect(connection);
        self.check(before, &event, &name(&end));
        end
    }

    pub(crate) fn on_settled(&mut self, durable: bool) {
        let before = self.arrival.state_name();
        self.arrival.on_settled(durable);
        self.check(before, &format!("settled({durable})"), "-");
    }

    pub(crate) fn on_close(&mut self, connection: Connection) {
        let (before, event) = (self.arrival.state_name(), self.event("close", connection));
        self.arrival.on_close(connection);
        self.check(before, &event, "-");
    }
}

fn refusal(denied: &AccessDenied) -> String {
    format!("Refuse({})", name(denied))
}

/// The name of a value in the table: its variants, without the numbers that they hold.
fn name(value: &impl Debug) -> String {
    let text = format!("{value:?}");
    let end = text.find([' ', '{']).unwrap_or(text.len());
    text[..end].replace(|c: char| c.is_ascii_digit(), "").replace("()", "")
}
