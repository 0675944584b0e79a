//! The table of transitions, `transitions.txt`. Seeded random schedules drive the machine with
//! every result that an action can have; the other tests and tests/simulation pass through
//! transitions of that table only.

use super::listed::is_result;
use super::rig::*;
use crate::transition_table::assert_accepted;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

/// All phases, in the order of the table.
const PHASES: [&str; 23] = [
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
    "Undoing(Retry)",
    "Undoing(Resume)",
    "Undoing(End)",
    "BackingOff",
    "Ended",
];

/// Schedules that fill the table.
const SCHEDULES: u64 = 12_000;
const STEPS_MAX: usize = 200;

const HEADER: &str = "\
# Phase and event -> next phase and its actions: the transitions that seeded schedules find.
# (break): an operator's request, whatever the event. (copy): whatever the plan copies next, or Wait.
# Written by tests/transitions.rs.
";

/// A random schedule of one migration.
struct Schedule {
    rig: Rig,
    dice: fastrand::Rng,
    /// One failure in this many steps of the copy, and in fewer of what follows.
    calm: u64,
    /// Nothing fails before the gate is sealed for the first time.
    is_late: bool,
    /// One dirty run in this many looks at the bitmap.
    idle: u64,
    /// What the destination usually is.
    destination: DestinationInfo,
}

impl Schedule {
    fn new(seed: u64) -> Self {
        let mut dice = fastrand::Rng::with_seed(seed);
        let job = Job {
            unlink: dice.u8(..3) == 0,
            speed: NonZeroU64::new(dice.u64(..3) * SIZE / 2),
            pause: dice.u32(..3) * 50 * MS,
            timeout: Duration::from_secs(3 + dice.u64(..2) * 57),
            ..job()
        };
        let destination = match dice.u8(..4) {
            0 => plain(),
            1 => DestinationInfo { flush: false, ..plain() },
            _ => ours(TOKEN, Has::Nothing),
        };
        let calm = [4, 10, 30, 100][dice.usize(..4)];
        let is_late = dice.bool();
        let idle = if is_late { 40 } else { [3, 8][dice.usize(..2)] };
        let rig = Rig { is_checked: false, ..Rig::new(job, destination) };
        Self { rig, dice, calm, is_late, idle, destination }
    }

    fn once_in(&mut self, many: u64) -> bool {
        self.dice.u64(..many) == 0
    }

    fn step(&mut self) {
        let phase = self.rig.machine.phase_name();
        self.is_late &= phase != "SealingGate";
        if self.is_late {
            self.rig.peer = self.destination;
            let event = self.rig.success();
            self.rig.give(event);
            return;
        }
        let is_copying = phase == "Copying";
        let calm = if is_copying { self.calm } else { self.calm.min(10) };
        if self.once_in(if is_copying { 10 * calm } else { 20 }) {
            let speed = OperatorRequest::Speed(NonZeroU64::new(self.dice.u64(..2) * SIZE));
            let request = if self.once_in(3) { speed } else { OperatorRequest::Break };
            let _ = self.rig.machine.request(request);
        }
        if self.once_in(40) {
            self.rig.now += Duration::from_millis(self.dice.u64(..5000));
        }
        self.prepare();
        let is_restoring = self.rig.action == Action::Record(RecordKind::Before);
        let fails =
            if is_restoring || phase == "InDoubt" { !self.once_in(3) } else { self.once_in(calm) };
        let event = if let Action::Wait { until } = self.rig.action
            && self.once_in(8)
        {
            // The destination is silent.
            self.rig.now = self.rig.now.max(until);
            Event::Tick
        } else if fails {
            self.any_result()
        } else {
            self.rig.success()
        };
        self.rig.give(event);
    }

    /// What the destination says and clients have written by now.
    fn prepare(&mut self) {
        match self.rig.action {
            Action::Connect(_) | Action::Ask(_) => self.rig.peer = self.peer(),
            Action::TakeDirty { from, .. } if self.dice.u64(..self.idle) == 0 => {
                let at = self.dice.u64(from / 4096..=SIZE / 4096) * 4096;
                let run = Range::whole(SIZE).from(at).split(65_536).0;
                self.rig.marks = Some(run).filter(|run| !run.is_empty()).into_iter().collect();
            }
            _ => {}
        }
    }

    fn peer(&mut self) -> DestinationInfo {
        let has = [Has::Nothing, Has::Incomplete, Has::Arrived][self.dice.usize(..3)];
        match (self.destination.answer, self.dice.u8(..12)) {
            (_, 0) => DestinationInfo { read_only: true, ..self.destination },
            (Some(_), 1) => ours(OTHER, has),
            (Some(_), 2) => ours(TOKEN, has),
            (Some(_), 3) => {
                DestinationInfo { answer: Some(Answer { listening: None, has }), ..plain() }
            }
            (Some(_), 4 | 5) => plain(),
            (Some(_), _) if self.rig.written() > 0 => ours(TOKEN, Has::Incomplete),
            _ => self.destination,
        }
    }

    /// Any result that the action can have.
    fn any_result(&mut self) -> Event {
        let text = || "why".to_owned();
        let cookie = self.rig.pending.pop_front().filter(|_| self.dice.bool()).unwrap_or(0);
        let results = [
            Event::Lost(text()),
            Event::Unsent(text()),
            Event::Unreadable(text()),
            Event::Failed(text()),
            Event::Unreachable(Trouble::Connect(text())),
            Event::Reply { cookie, error: None },
            Event::Reply { cookie, error: Some(28) },
            Event::Tick,
            Event::Visits { turned: false },
        ];
        let possible: Vec<&Event> = results
            .iter()
            .filter(|event| is_result(&self.rig.action, event, self.rig.is_connected))
            .collect();
        match (&self.rig.action, possible.len()) {
            (Action::Look(range), _) if self.dice.bool() => {
                Event::Looked { range: range.split(4096).0, content: Content::Zeros }
            }
            (_, 0) => self.rig.success(),
            (_, count) => possible[self.dice.usize(..count)].clone(),
        }
    }
}

fn table() -> String {
    let mut rows: BTreeMap<[&str; 3], BTreeSet<&str>> = BTreeMap::new();
    for seed in 0..SCHEDULES {
        let mut schedule = Schedule::new(seed);
        while schedule.rig.transitions.len() < STEPS_MAX
            && !matches!(schedule.rig.action, Action::End(_))
        {
            schedule.step();
        }
        for [phase, event, next, action] in schedule.rig.transitions {
            rows.entry([phase, event, next]).or_default().insert(action);
        }
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
