//! Drives a machine with successful events until a test provides others.

use super::listed::{assert_listed, is_result, step};
pub(super) use crate::disk::ownership::{Id, Provenance, RemoteAddress};
pub(super) use crate::migration::job::{
    Action, DestinationInfo, DestinationRequest, Event, HandoverVerdict, Job, News, Obstacle,
    OfferedTerms, OperatorRequest, Outcome, RecordKind, RequestKind, SIZE_MIN, Stage, TooLate,
    Trouble, handover_verdict,
};
pub(super) use crate::migration::machine::{
    ASK_AFTER, Machine, RECORD_TRIES, RELAY_RETRY_EVERY, RELAY_WAIT_MAX, RETRY_EVERY, TooSmall,
};
pub(super) use crate::migration::plan::{Caps, Content};
pub(super) use crate::migration::wire::{Answer, Handover, Has, Token};
pub(super) use crate::nbd::wire::TransmissionFlags;
pub(super) use crate::range::Range;
pub(super) use std::collections::VecDeque;
pub(super) use std::num::NonZeroU64;
pub(super) use std::time::Duration;

pub(super) const SIZE: u64 = 4 << 20;
pub(super) const ID: Id = Id([7; 16]);
pub(super) const TOKEN: Token = Token([1; 16]);
pub(super) const OTHER: Token = Token([2; 16]);
pub(super) const MS: Duration = Duration::from_millis(1);

pub(super) fn ours(token: Token, has: Has) -> DestinationInfo {
    DestinationInfo { answer: Some(Answer { listening: Some(token), has }), ..plain() }
}

pub(super) fn plain() -> DestinationInfo {
    let caps = Caps { zeroes: true, block_min: 512, data_max: 32 << 20 };
    let flags = TransmissionFlags::all() - TransmissionFlags::READ_ONLY;
    DestinationInfo { size: SIZE, read_only: false, flush: true, flags, caps, answer: None }
}

pub(super) fn job() -> Job {
    Job::new(ID, SIZE, RemoteAddress::new("host 4779").unwrap(), Provenance::Adopted)
}

/// Drives a machine: every action succeeds unless the test provides its result.
pub(super) struct Rig {
    pub(super) machine: Machine,
    pub(super) now: Duration,
    pub(super) action: Action,
    pub(super) log: Vec<Action>,
    pub(super) is_connected: bool,
    /// Requests without a reply.
    pub(super) pending: VecDeque<u64>,
    pub(super) peer: DestinationInfo,
    /// Marks of the bitmap, run by run.
    pub(super) marks: VecDeque<Range>,
}

impl Rig {
    pub(super) fn new(job: Job, peer: DestinationInfo) -> Self {
        let now = Duration::from_secs(1);
        let mut machine = Machine::new(job, now).unwrap();
        let (_, action) = step(&mut machine, now, Event::Begin);
        Self {
            machine,
            now,
            log: vec![action.clone()],
            action,
            is_connected: false,
            pending: VecDeque::new(),
            peer,
            marks: VecDeque::new(),
        }
    }

    pub(super) fn give(&mut self, event: Event) -> &Action {
        self.now += MS;
        let is_result = is_result(&self.action, &event, self.is_connected);
        self.is_connected = match (&self.action, &event) {
            (Action::HangUp | Action::Disconnect, _) => false,
            (_, Event::Greeted(_)) => true,
            _ => self.is_connected,
        };
        let (transition, action) = step(&mut self.machine, self.now, event);
        if is_result {
            assert_listed(transition);
        }
        self.action = action;
        self.log.push(self.action.clone());
        &self.action
    }

    /// The successful result of the action.
    pub(super) fn success(&mut self) -> Event {
        match &self.action {
            Action::Connect(_) | Action::Ask(_) => Event::Greeted(self.peer),
            Action::Probe => Event::Visits { turned: true },
            Action::Look(range) => Event::Looked { range: *range, content: Content::Data },
            Action::TakeDirty { .. } => {
                let run = self.marks.pop_front();
                Event::Taken { run, left: self.marks.iter().map(Range::length).sum() }
            }
            Action::Send(request) => {
                if request.kind != RequestKind::Disconnect {
                    self.pending.push_back(request.cookie);
                }
                Event::Done
            }
            Action::Wait { until } => match self.pending.pop_front() {
                Some(cookie) => Event::Reply { cookie, error: None },
                None => {
                    self.now = self.now.max(*until);
                    Event::Tick
                }
            },
            Action::HangUp => {
                self.pending.clear();
                Event::Done
            }
            _ => Event::Done,
        }
    }

    /// Continues until the wanted action.
    pub(super) fn until(&mut self, wanted: impl Fn(&Action) -> bool) -> &mut Self {
        for _ in 0..20_000 {
            if wanted(&self.action) {
                return self;
            }
            let event = self.success();
            self.give(event);
        }
        panic!(
            "the action never came; last: {:?}",
            self.log.iter().rev().take(9).collect::<Vec<_>>()
        );
    }

    pub(super) fn until_end(&mut self) -> Outcome {
        self.until(|action| matches!(action, Action::End(_)));
        match &self.action {
            Action::End(outcome) => outcome.clone(),
            other => panic!("{other:?}"),
        }
    }

    pub(super) fn news(&mut self) -> Vec<News> {
        std::iter::from_fn(|| self.machine.news()).collect()
    }

    /// The actions other than those of the copy.
    pub(super) fn milestones(&self) -> Vec<String> {
        let name = |action: &Action| match action {
            Action::Look(_) | Action::TakeDirty { .. } | Action::Wait { .. } => None,
            Action::Probe => None,
            Action::CloseGate { .. } => Some("CloseGate".to_owned()),
            Action::Send(DestinationRequest {
                kind: RequestKind::Write(_) | RequestKind::Zero(_),
                ..
            }) => None,
            Action::Send(DestinationRequest { kind: RequestKind::Handover(_), .. }) => {
                Some("Handover".to_owned())
            }
            Action::Send(DestinationRequest { kind, .. }) => Some(format!("{kind:?}")),
            Action::Connect(_) => Some("Connect".to_owned()),
            Action::End(_) => Some("End".to_owned()),
            other => Some(format!("{other:?}")),
        };
        self.log.iter().filter_map(name).collect()
    }

    pub(super) fn written(&self) -> u64 {
        let bytes = |action: &Action| match action {
            Action::Send(request) => request.kind.payload(),
            _ => 0,
        };
        self.log.iter().map(bytes).sum()
    }
}

pub(super) fn is_handover(action: &Action) -> bool {
    matches!(action, Action::Send(DestinationRequest { kind: RequestKind::Handover(_), .. }))
}

pub(super) fn is_closing(action: &Action) -> bool {
    matches!(action, Action::CloseGate { .. })
}

pub(super) fn is_wait(action: &Action) -> bool {
    matches!(action, Action::Wait { .. })
}

pub(super) fn is_write(action: &Action) -> bool {
    matches!(action, Action::Send(DestinationRequest { kind: RequestKind::Write(_), .. }))
}

pub(super) fn lost() -> Event {
    Event::Lost("reset".to_owned())
}
