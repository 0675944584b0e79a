//! Exhaustive exploration of the machine: every result that an action can have, from every state and
//! after several delays. States with the same [`Key`] are explored once, so it takes well under a
//! second and finds the same transitions every time.

use super::listed::{Transition, is_result, step};
use super::rig::*;
use crate::migration::freeze::{FREEZE_MAX, FreezeDecision};
use crate::migration::machine::context::Context;
use crate::migration::machine::phase::{AfterUndo, Flush, Leaving, LinkState, Phase};
use crate::migration::plan::NextCopy;
use std::collections::{BTreeSet, HashSet};

const BLOCK: u64 = 4096;
/// Enough blocks that a first pass can leave nearly all of them dirty, which throttles clients.
const DISK_SIZE: u64 = 8 * BLOCK;

/// Shorter than [`FREEZE_MAX`], so that either limit can be the first to pass.
const TIMEOUT: Duration = Duration::from_secs(3);

/// Times from an action to its result: no limit passes; a FLUSH counts as slow; all limits pass,
/// except that of a second failed closing.
const DELAYS: [Duration; 3] = [MS, Duration::from_millis(600), Duration::from_secs(5)];

/// A FLUSH that took longer is followed by another, and so is one that is older than this.
const FLUSH_QUICK: Duration = Duration::from_millis(500);
const FLUSH_FRESH: Duration = Duration::from_secs(2);

/// A machine and what its caller knows.
#[derive(Clone)]
struct State {
    machine: Machine,
    now: Duration,
    action: Action,
    is_connected: bool,
    /// Cookies of the requests without a reply.
    pending: Vec<u64>,
}

/// What decides the transitions that are possible from a state, in classes as coarse as they can be
/// without losing a row. Times count as passed or not.
#[derive(PartialEq, Eq, Hash)]
struct Key {
    phase: &'static str,
    action: &'static str,
    /// What the phase holds, without numbers.
    held: (&'static str, &'static str),
    record_tries: Option<u32>,
    /// What [`Context`] holds: to be undone, and known of the migration.
    flags: [bool; 19],
    copy: Option<CopyKey>,
}

/// The part of the key that matters while the copy goes on.
#[derive(PartialEq, Eq, Hash)]
struct CopyKey {
    next: &'static str,
    flags: [bool; 7],
}

/// The transitions from every state that the machine can reach.
pub(super) fn explore() -> BTreeSet<Transition> {
    let mut transitions = BTreeSet::new();
    let mut visited = HashSet::new();
    let mut queue = VecDeque::new();
    for (unlink, relays) in [(false, false), (true, false), (false, true), (true, true)] {
        let (transition, state) = State::begin(unlink, relays);
        transitions.insert(transition);
        queue.push_back(state);
    }
    while let Some(state) = queue.pop_front() {
        let mut reached = Vec::new();
        for (event, delay) in state.events() {
            let (transition, next) = state.after(event, delay);
            transitions.insert(transition);
            reached.push(next);
        }
        for next in reached.into_iter().chain(state.breaking()) {
            if visited.insert(next.key()) {
                queue.push_back(next);
            }
        }
    }
    transitions
}

/// Every kind of destination that a connection can reach.
fn destinations() -> Vec<DestinationInfo> {
    let plain = DestinationInfo { size: DISK_SIZE, ..plain() };
    let read_only = DestinationInfo { read_only: true, ..plain };
    let mut all = vec![plain, DestinationInfo { flush: false, ..plain }, read_only];
    for has in [Has::Nothing, Has::Incomplete, Has::Arrived] {
        for listening in [None, Some(TOKEN), Some(OTHER)] {
            let answer = Some(Answer { listening, has });
            all.extend([
                DestinationInfo { answer, ..plain },
                DestinationInfo { answer, ..read_only },
            ]);
        }
    }
    all
}

impl State {
    fn begin(unlink: bool, relays: bool) -> (Transition, Self) {
        let relay = relays.then(OfferedTerms::default);
        let job = Job { size: DISK_SIZE, unlink, relay, timeout: TIMEOUT, ..job() };
        let now = Duration::from_secs(1);
        let mut machine = Machine::new(job, now).unwrap();
        let (transition, action) = step(&mut machine, now, Event::Begin);
        (transition, Self { machine, now, action, is_connected: false, pending: Vec::new() })
    }

    /// The same state after the operator has requested a break, unless it is too late.
    fn breaking(&self) -> Option<Self> {
        let mut state = self.clone();
        state.machine.request(OperatorRequest::Break).ok()?;
        Some(state)
    }

    /// The results that the action can have, each after several delays.
    fn events(&self) -> Vec<(Event, Duration)> {
        let due = match self.action {
            Action::Wait { until } => Some(until.saturating_sub(self.now)),
            Action::Relay { .. } => Some(RELAY_WAIT_MAX),
            _ => None,
        };
        let delays: Vec<Duration> = DELAYS.into_iter().chain(due).collect();
        let results = self.results().into_iter();
        results.flat_map(|event| delays.iter().map(move |delay| (event.clone(), *delay))).collect()
    }

    fn results(&self) -> Vec<Event> {
        let why = || "why".to_owned();
        let reply = |cookie| Event::Reply { cookie, error: None };
        let mut results = match self.action {
            Action::Connect(_) | Action::Ask(_) => {
                let greetings = destinations().into_iter().map(Event::Greeted);
                greetings.chain([Event::Unreachable(Trouble::Connect(why()))]).collect()
            }
            Action::Look(range) => [Content::Data, Content::Zeros]
                .into_iter()
                .flat_map(|content| {
                    let first = range.split(BLOCK).0;
                    [range, first].map(|range| Event::Looked { range, content })
                })
                .collect(),
            Action::TakeDirty { from, .. } => dirty_runs(from),
            Action::Wait { .. } => {
                let unknown = [reply(0), Event::Reply { cookie: 0, error: Some(28) }, Event::Tick];
                self.pending.iter().copied().map(reply).chain(unknown).collect()
            }
            Action::Probe => [false, true].map(|turned| Event::Visits { turned }).to_vec(),
            Action::Relay { .. } => {
                vec![Event::Done, Event::Unreachable(Trouble::Connect(why()))]
            }
            _ => vec![Event::Done, Event::Unsent(why())],
        };
        results.extend([Event::Lost(why()), Event::Unreadable(why()), Event::Failed(why())]);
        results.retain(|event| is_result(&self.action, event, self.is_connected));
        results
    }

    /// The next state if `event` is the action's result after `delay`.
    fn after(&self, event: Event, delay: Duration) -> (Transition, Self) {
        let mut next = self.clone();
        next.now += delay;
        match (&self.action, &event) {
            (Action::HangUp | Action::Disconnect, _) => {
                (next.is_connected, next.pending) = (false, Vec::new());
            }
            (_, Event::Greeted(_)) => (next.is_connected, next.pending) = (true, Vec::new()),
            (Action::Send(request), Event::Done) => next.pending.push(request.cookie),
            (_, Event::Reply { cookie, .. }) => next.pending.retain(|other| other != cookie),
            _ => {}
        }
        let (transition, action) = step(&mut next.machine, next.now, event);
        next.action = action;
        next.machine.context.news.clear();
        (transition, next)
    }

    fn key(&self) -> Key {
        let Self { machine: Machine { phase, context: cx, break_requested }, now, .. } = self;
        // A break depends on nothing but what there is to undo.
        let breaks = *break_requested;
        let is_sent = matches!(phase, Phase::HandingOver(_) | Phase::InDoubt(_));
        let ends = matches!(phase, Phase::Undoing(AfterUndo::End(_)));
        let copies = matches!(
            phase,
            Phase::Copying(_) | Phase::FinalCopy(_) | Phase::Probing(_) | Phase::ClosingGate(_)
        );
        Key {
            phase: phase.name(),
            action: self.action.name(),
            held: if breaks { ("", "") } else { held(phase, *now) },
            record_tries: cx.unrestored.map(|record| if ends { record.tries } else { 0 }),
            flags: [
                breaks,
                cx.undo.link,
                cx.undo.record,
                cx.undo.gate,
                cx.undo.throttle,
                cx.started,
                cx.unlinked,
                cx.job.unlink,
                cx.job.relay.is_some(),
                cx.departed,
                cx.copied_to.is_some(),
                cx.write_delay > Duration::ZERO,
                cx.write_delay == cx.convergence.delay(),
                cx.convergence.delay() > Duration::ZERO,
                cx.must_restore(*now),
                cx.freeze.is_some(),
                cx.freeze.is_some_and(|freeze| freeze.until().is_none()),
                is_sent && cx.freeze.is_some_and(|freeze| freeze.elapsed(*now) > FREEZE_MAX),
                !breaks && cx.meter.link_rate().is_some(),
            ],
            copy: (copies && !breaks).then(|| copy_key(cx, *now)),
        }
    }
}

/// What the bitmap can give at or after `from`.
fn dirty_runs(from: u64) -> Vec<Event> {
    let run = Some(Range::whole(DISK_SIZE).from(from).split(BLOCK).0).filter(|run| !run.is_empty());
    let mut runs = vec![Event::Taken { run: None, left: 0 }];
    if from > 0 {
        // The remaining marks are before `from`.
        runs.push(Event::Taken { run: None, left: DISK_SIZE - BLOCK });
    }
    if run.is_some() {
        runs.extend([0, DISK_SIZE - BLOCK].map(|left| Event::Taken { run, left }));
    }
    runs
}

fn held(phase: &Phase, now: Duration) -> (&'static str, &'static str) {
    let due = |at: Duration| if now >= at { "due" } else { "" };
    match phase {
        Phase::Copying(link)
        | Phase::Probing(link)
        | Phase::ClosingGate(link)
        | Phase::FinalCopy(link)
        | Phase::Flushing(link)
        | Phase::Recording(link)
        | Phase::SealingGate(link)
        | Phase::CheckingLink(link)
        | Phase::LegacyHandover(link, _)
        | Phase::Undoing(AfterUndo::Resume(link)) => held_link(link, now),
        Phase::HandingOver(sent) => ("", due(sent.ask_at)),
        Phase::InDoubt(doubt) => (doubt.awaited.map_or("", |_| "awaited"), due(doubt.ask_at)),
        Phase::BackingOff { until } => ("", due(*until)),
        Phase::Undoing(AfterUndo::End(Outcome::Broken)) => ("broken", ""),
        Phase::Leaving(Leaving::Relaying { until }, _) => ("", due(*until)),
        Phase::Start
        | Phase::Connecting
        | Phase::Leaving(..)
        | Phase::Undoing(AfterUndo::Retry | AfterUndo::End(_))
        | Phase::Ended(_) => ("", ""),
    }
}

fn held_link(link: &LinkState, now: Duration) -> (&'static str, &'static str) {
    let peer = match (link.peer.token(), link.peer.flush) {
        (Some(_), _) => "ours",
        (None, true) => "plain",
        (None, false) => "plain without FLUSH",
    };
    let flush = match link.flush {
        Flush::Never => "never",
        Flush::Asked { .. } => "asked",
        Flush::Done { at, took } if took <= FLUSH_QUICK && now < at + FLUSH_FRESH => "ready",
        Flush::Done { .. } => "slow or old",
    };
    (peer, flush)
}

fn copy_key(cx: &Context, now: Duration) -> CopyKey {
    let (mut probe, mut convergence) = (cx.probe, cx.convergence.clone());
    let closes = convergence.may_close_gate(now, cx.plan.left(), cx.meter.link_rate(), None);
    let waits = FreezeDecision::Wait(Duration::ZERO);
    CopyKey {
        next: match cx.plan.next(u64::MAX) {
            NextCopy::Look(_) => "Look",
            NextCopy::Take { .. } => "Take",
            NextCopy::Write(_) => "Write",
            NextCopy::Zero(_) => "Zero",
            NextCopy::Idle => "Idle",
        },
        flags: [
            cx.plan.has_in_flight(),
            cx.plan.is_left_known(),
            cx.plan.passes() == 0,
            cx.probe.due() > now,
            probe.on_probe(now, true) == waits,
            cx.backoff.from() > now,
            closes,
        ],
    }
}
