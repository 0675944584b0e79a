//! Compares the machine's transitions with the table beside it, `machine/transitions.txt`.

use flexnbd::migration::job::{Action, Event};
use flexnbd::migration::machine::Machine;
use std::collections::BTreeSet;
use std::sync::OnceLock;
use std::time::Duration;

/// Phase and event, the next phase and its action.
pub(crate) type Transition = [&'static str; 4];

/// The table.
pub(crate) const PATH: &str = "src/migration/machine/transitions.txt";

const TABLE: &str = include_str!("../../src/migration/machine/transitions.txt");

/// Steps the machine; also returns the transition if the table lacks it.
pub(crate) fn step(
    machine: &mut Machine,
    now: Duration,
    event: Event,
) -> (Action, Option<Transition>) {
    let phase = machine.phase_name();
    let event_name = if machine.is_breaking() { "(break)" } else { event.name() };
    let action = machine.step(now, event);
    let next = machine.phase_name();
    let copies = ["Copying", "FinalCopy"].contains(&next)
        && ["Look", "TakeDirty", "Send(Write)", "Send(Zero)", "Wait"].contains(&action.name());
    let action_name = if copies { "(copy)" } else { action.name() };
    let row = [phase, event_name, next, action_name];
    (action, (!listed().contains(&row)).then_some(row))
}

/// The rows of the table, one for each action.
fn listed() -> &'static BTreeSet<Transition> {
    static LISTED: OnceLock<BTreeSet<Transition>> = OnceLock::new();
    LISTED.get_or_init(|| {
        let mut rows = BTreeSet::new();
        for line in TABLE.lines().filter(|line| !line.starts_with('#')) {
            let fields: Vec<&str> =
                line.split([' ', ',']).filter(|field| !field.is_empty()).collect();
            if let [phase, event, "->", next, actions @ ..] = fields.as_slice() {
                rows.extend(actions.iter().map(|action| [*phase, *event, *next, *action]));
            }
        }
        assert!(rows.len() > 100, "only {} transitions are listed", rows.len());
        rows
    })
}
