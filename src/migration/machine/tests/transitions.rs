//! The table of transitions, `transitions.txt`. The exploration finds them; the other tests and
//! tests/simulation pass through rows of the table only. To accept a change:
//! `FLEXNBD_ACCEPT=1 cargo test --lib machine::tests::transitions`.

use super::exploration::explore;
use crate::transition_table::assert_accepted;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

/// All phases, in the order of the table.
const PHASES: [&str; 25] = [
    "Start",
    "Connecting",
    "Copying",
    "Probing",
    "ClosingGate",
    "FinalCopy",
    "Flushing",
    "Recording",
    "SealingGate",
    "CheckingLink",
    "LegacyHandover(Unlinking)",
    "LegacyHandover(Disconnecting)",
    "HandingOver",
    "InDoubt",
    "Leaving(Retiring)",
    "Leaving(Unlinking)",
    "Leaving(Recording)",
    "Leaving(Disconnecting)",
    "Leaving(Relaying)",
    "Leaving(CuttingOff)",
    "Undoing(Retry)",
    "Undoing(Resume)",
    "Undoing(End)",
    "BackingOff",
    "Ended",
];

const HEADER: &str = "\
# Phase and event -> next phase and its actions: every transition that an exploration finds.
# (break): an operator's request, whatever the event. (copy): whatever the plan copies next, or Wait.
# Written by tests/transitions.rs: FLEXNBD_ACCEPT=1 cargo test --lib machine::tests::transitions
";

fn table() -> String {
    let mut rows: BTreeMap<[&str; 3], BTreeSet<&str>> = BTreeMap::new();
    for [phase, event, next, action] in explore() {
        rows.entry([phase, event, next]).or_default().insert(action);
    }
    let mut text = HEADER.to_owned();
    for phase in PHASES {
        text.push('\n');
        for ([_, event, next], actions) in rows.iter().filter(|([from, ..], _)| *from == phase) {
            let actions = actions.iter().copied().collect::<Vec<_>>().join(", ");
            writeln!(text, "{phase:<29} {event:<12} -> {next:<29} {actions}").unwrap();
        }
    }
    let is_known = |name: &&str| PHASES.contains(name);
    assert!(rows.keys().all(|[from, _, to]| is_known(from) && is_known(to)), "a phase is missing");
    text
}

#[test]
fn transitions_are_those_of_the_table() {
    assert_accepted("migration/machine/transitions.txt", &table());
}
