//! The rows of `transitions.txt`, and those that a test passes through.

use crate::migration::job::{Action, Event, RequestKind};
use crate::migration::machine::Machine;
use std::collections::BTreeSet;
use std::sync::OnceLock;
use std::time::Duration;

/// Phase and event, the next phase and its action.
pub(super) type Transition = [&'static str; 4];

/// One step of a machine.
pub(super) fn step(machine: &mut Machine, now: Duration, event: Event) -> (Transition, Action) {
    let phase = machine.phase_name();
    let event_name = if machine.is_breaking() { "(break)" } else { event.name() };
    let action = machine.step(now, event);
    let next = machine.phase_name();
    ([phase, event_name, next, name(next, &action)], action)
}

/// The name of an action in the table. The steps of the copy share one name, since the plan selects
/// them.
fn name(phase: &str, action: &Action) -> &'static str {
    let copies = match action {
        Action::Send(request) => request.kind.range().is_some(),
        action => {
            matches!(action, Action::Look(_) | Action::TakeDirty { .. } | Action::Wait { .. })
        }
    };
    if copies && ["Copying", "FinalCopy"].contains(&phase) { "(copy)" } else { action.name() }
}

/// Fails if the table lacks a transition that a test passed through.
pub(super) fn assert_listed(transition: Transition) {
    static LISTED: OnceLock<BTreeSet<Vec<&str>>> = OnceLock::new();
    if std::env::var_os("FLEXNBD_ACCEPT").is_some() {
        return;
    }
    let listed = LISTED.get_or_init(|| {
        let rows = include_str!("../transitions.txt").lines().filter(|line| !line.starts_with('#'));
        rows.flat_map(|row| {
            let mut fields = row.split([' ', ',']).filter(|field| !field.is_empty());
            let known: Vec<_> = fields.by_ref().take(4).filter(|field| *field != "->").collect();
            fields.map(move |action| [known.clone(), vec![action]].concat()).collect::<Vec<_>>()
        })
        .collect()
    });
    assert!(listed.contains(transition.as_slice()), "{transition:?} is not in transitions.txt");
}

/// Whether an action can have this result according to [`Action`]; `is_connected`: there is a link.
pub(super) fn is_result(action: &Action, event: &Event, is_connected: bool) -> bool {
    match action {
        Action::Connect(_) | Action::Ask(_) => {
            matches!(event, Event::Greeted(_) | Event::Unreachable(_))
        }
        Action::Look(_) => {
            matches!(event, Event::Looked { .. } | Event::Unreadable(_) | Event::Failed(_))
        }
        Action::TakeDirty { .. } => matches!(event, Event::Taken { .. }),
        Action::Send(request) => match event {
            Event::Done | Event::Lost(_) | Event::Unsent(_) => true,
            Event::Unreadable(_) | Event::Failed(_) => {
                matches!(request.kind, RequestKind::Write(_))
            }
            _ => false,
        },
        Action::Wait { .. } => match event {
            Event::Reply { .. } | Event::Lost(_) => is_connected,
            event => *event == Event::Tick,
        },
        Action::Probe => matches!(event, Event::Visits { .. }),
        Action::CloseGate { .. } | Action::Seal | Action::Record(_) | Action::Unlink => {
            matches!(event, Event::Done | Event::Failed(_))
        }
        Action::Relay { .. } => {
            matches!(event, Event::Done | Event::Unreachable(_) | Event::Failed(_))
        }
        Action::OpenGate
        | Action::Throttle(_)
        | Action::Retire
        | Action::HangUp
        | Action::Disconnect => *event == Event::Done,
        Action::End(_) => false,
    }
}
