//! The source's life, phase by phase, with a destination that does what the test says.

mod closing;
mod doubt;

use super::*;
use crate::disk::ownership::{Id, Provenance, RemoteAddress};
use crate::migration::job::{
    DestinationRequest, Event, HandoverVerdict, RecordKind, RequestKind, handover_verdict,
};
use crate::migration::plan::Content;
use crate::migration::wire::{Answer, Handover};
use crate::range::Range;
use std::collections::VecDeque;
use std::num::NonZeroU64;

const SIZE: u64 = 4 << 20;
const ID: Id = Id([7; 16]);
const TOKEN: Token = Token([1; 16]);
const OTHER: Token = Token([2; 16]);
const MS: Duration = Duration::from_millis(1);

fn ours(token: Token, has: Has) -> DestinationInfo {
    DestinationInfo { answer: Some(Answer { listening: Some(token), has }), ..plain() }
}

fn plain() -> DestinationInfo {
    let caps = Caps { zeroes: true, block_min: 512, data_max: 32 << 20 };
    DestinationInfo { size: SIZE, read_only: false, flush: true, caps, answer: None }
}

fn job() -> Job {
    Job::new(ID, SIZE, RemoteAddress::new("host 4779").unwrap(), Provenance::Adopted)
}

/// Answers every action with success, until a test takes over.
struct Rig {
    machine: Machine,
    now: Duration,
    action: Action,
    log: Vec<Action>,
    /// Requests without a reply.
    pending: VecDeque<u64>,
    peer: DestinationInfo,
    /// Marks to be found, run by run.
    marks: VecDeque<Range>,
}

impl Rig {
    fn new(job: Job, peer: DestinationInfo) -> Self {
        let now = Duration::from_secs(1);
        let mut machine = Machine::new(job, now).unwrap();
        let action = machine.step(now, Event::Begin);
        let log = vec![action.clone()];
        Self { machine, now, action, log, pending: VecDeque::new(), peer, marks: VecDeque::new() }
    }

    fn give(&mut self, event: Event) -> &Action {
        self.now += MS;
        self.action = self.machine.step(self.now, event);
        self.log.push(self.action.clone());
        &self.action
    }

    /// What comes of the action when nothing goes wrong.
    fn success(&mut self) -> Event {
        match &self.action {
            Action::Connect(_) | Action::Ask(_) => Event::Greeted(self.peer),
            Action::Probe => Event::Visits { turned: true },
            Action::Look(range) => Event::Looked { range: *range, content: Content::Data },
            Action::TakeDirty { .. } => {
                let run = self.marks.pop_front();
                Event::Taken { run, left: self.marks.iter().map(Range::length).sum() }
            }
            Action::Send(request) => {
                if request.work != RequestKind::Disconnect {
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

    /// Goes on until the action is the one looked for.
    fn until(&mut self, wanted: impl Fn(&Action) -> bool) -> &mut Self {
        for _ in 0..20_000 {
            if wanted(&self.action) {
                return self;
            }
            let event = self.success();
            self.give(event);
        }
        panic!("never came to it; last: {:?}", self.log.iter().rev().take(9).collect::<Vec<_>>());
    }

    fn until_end(&mut self) -> Outcome {
        self.until(|action| matches!(action, Action::End(_)));
        match &self.action {
            Action::End(outcome) => outcome.clone(),
            other => panic!("{other:?}"),
        }
    }

    fn news(&mut self) -> Vec<News> {
        std::iter::from_fn(|| self.machine.news()).collect()
    }

    /// The actions that matter to somebody else than the copier.
    fn milestones(&self) -> Vec<String> {
        let name = |action: &Action| match action {
            Action::Look(_) | Action::TakeDirty { .. } | Action::Wait { .. } => None,
            Action::Probe => None,
            Action::CloseGate { .. } => Some("CloseGate".to_owned()),
            Action::Send(DestinationRequest {
                work: RequestKind::Write(_) | RequestKind::Zero(_),
                ..
            }) => None,
            Action::Send(DestinationRequest { work: RequestKind::Handover(_), .. }) => {
                Some("Handover".to_owned())
            }
            Action::Send(DestinationRequest { work, .. }) => Some(format!("{work:?}")),
            Action::Connect(_) => Some("Connect".to_owned()),
            Action::End(_) => Some("End".to_owned()),
            other => Some(format!("{other:?}")),
        };
        self.log.iter().filter_map(name).collect()
    }

    fn written(&self) -> u64 {
        let bytes = |action: &Action| match action {
            Action::Send(request) => request.work.payload(),
            _ => 0,
        };
        self.log.iter().map(bytes).sum()
    }
}

fn is_handover(action: &Action) -> bool {
    matches!(action, Action::Send(DestinationRequest { work: RequestKind::Handover(_), .. }))
}

fn is_closing(action: &Action) -> bool {
    matches!(action, Action::CloseGate { .. })
}

fn is_wait(action: &Action) -> bool {
    matches!(action, Action::Wait { .. })
}

fn is_write(action: &Action) -> bool {
    matches!(action, Action::Send(DestinationRequest { work: RequestKind::Write(_), .. }))
}

fn lost() -> Event {
    Event::Lost("reset".to_owned())
}

#[test]
fn a_whole_life_goes_in_this_order() {
    let mut rig = Rig::new(job(), ours(TOKEN, Has::Nothing));
    assert_eq!(rig.until_end(), Outcome::Arrived { acknowledged: true });
    assert_eq!(
        rig.milestones(),
        [
            "Connect",
            "Flush",
            "CloseGate",
            "Record(Departing)",
            "Seal",
            "Handover",
            "Retire",
            "Record(Departed)",
            "Disconnect",
            "End"
        ]
    );
    assert_eq!(rig.news(), [News::Started, News::GateClosed]);
    assert_eq!(rig.machine.progress(rig.now).stage, Stage::Ended);
}

#[test]
fn the_image_is_deleted_after_the_acknowledgement() {
    let mut rig = Rig::new(Job { unlink: true, ..job() }, ours(TOKEN, Has::Nothing));
    rig.until_end();
    let tail = ["Handover", "Retire", "Unlink", "Disconnect", "End"];
    assert!(rig.milestones().ends_with(&tail.map(str::to_owned)), "{:?}", rig.milestones());
}

#[test]
fn an_image_that_cannot_be_deleted_is_recorded_as_departed() {
    let mut rig = Rig::new(Job { unlink: true, ..job() }, ours(TOKEN, Has::Nothing));
    rig.until(|action| *action == Action::Unlink);
    assert_eq!(rig.give(Event::Failed("busy".to_owned())), &Action::Record(RecordKind::Departed));
    assert_eq!(rig.until_end(), Outcome::Arrived { acknowledged: true });
    assert!(rig.news().contains(&News::RecordFailed("busy".to_owned())));
}

#[test]
fn a_disk_below_the_manual_s_limit_cannot_be_migrated() {
    let small = |size| Machine::new(Job { size, ..job() }, Duration::ZERO).err();
    assert_eq!(small(SIZE_MIN - 1), Some(TooSmall));
    assert_eq!(small(SIZE_MIN), None);
}

#[test]
fn before_the_first_greeting_nothing_is_retried() {
    let mut rig = Rig::new(job(), plain());
    let refused = Trouble::Connect("refused".to_owned());
    rig.give(Event::Unreachable(refused.clone()));
    assert_eq!(rig.until_end(), Outcome::Failed(refused));
    assert_eq!(rig.milestones(), ["Connect", "HangUp", "End"]);
}

#[test]
fn a_destination_that_does_not_fit_is_told_apart_and_left_alone() {
    let block = Caps { block_min: 1 << 17, ..plain().caps };
    let odd_block = Caps { block_min: 3, ..plain().caps };
    let serving = Answer { listening: None, has: Has::Nothing };
    let unfit = [
        (
            DestinationInfo { size: SIZE - 512, ..plain() },
            Trouble::Size { local: SIZE, remote: SIZE - 512 },
        ),
        (
            DestinationInfo { size: SIZE + 512, ..plain() },
            Trouble::Size { local: SIZE, remote: SIZE + 512 },
        ),
        (DestinationInfo { read_only: true, ..plain() }, Trouble::ReadOnly),
        (DestinationInfo { answer: Some(serving), ..plain() }, Trouble::Serving),
        (DestinationInfo { caps: block, ..plain() }, Trouble::BlockSize(1 << 17)),
        (DestinationInfo { caps: odd_block, ..plain() }, Trouble::BlockSize(3)),
    ];
    for (peer, trouble) in unfit {
        let mut rig = Rig::new(job(), peer);
        assert_eq!(rig.until_end(), Outcome::Failed(trouble));
        assert_eq!(rig.written(), 0);
    }
}

fn trouble(trouble: Trouble) -> News {
    News::Obstructed(Obstacle::Trouble(trouble))
}

#[test]
fn trouble_after_the_greeting_is_retried_in_a_second() {
    let troubles = [
        (lost(), Trouble::Lost("reset".to_owned())),
        (Event::Unsent("pipe".to_owned()), Trouble::Lost("pipe".to_owned())),
        (Event::Reply { cookie: 1, error: Some(28) }, Trouble::ErrorReply(28)),
        (Event::Reply { cookie: 4711, error: None }, Trouble::Cookie(4711)),
        (Event::Failed("no memory".to_owned()), Trouble::Local("no memory".to_owned())),
    ];
    for (event, what) in troubles {
        let mut rig = Rig::new(job(), plain());
        rig.until(is_wait);
        assert_eq!(rig.give(event), &Action::HangUp);
        assert_eq!(rig.machine.progress(rig.now).obstacle, Some(Obstacle::Trouble(what.clone())));
        assert_eq!(rig.until_end(), Outcome::Arrived { acknowledged: false });
        assert_eq!(rig.machine.progress(rig.now).obstacle, None);
        let told = [News::Started, trouble(what), News::Restarted, News::GateClosed];
        assert_eq!(rig.news(), told);
    }
}

#[test]
fn a_reason_is_told_when_it_changes_and_once_a_minute() {
    let refused = || Trouble::Connect("refused".to_owned());
    let busy = || Trouble::Rejected("busy".to_owned());
    let mut rig = Rig::new(job(), plain());
    rig.until(is_wait).give(lost());
    let start = rig.now;
    let mut attempts = 0;
    while rig.now < start + Duration::from_secs(100) {
        rig.until(|action| matches!(action, Action::Connect(_)));
        attempts += 1;
        let why = if attempts < 20 { refused() } else { busy() };
        rig.give(Event::Unreachable(why));
    }
    assert!(attempts > 90);
    let told = [
        News::Started,
        trouble(Trouble::Lost("reset".to_owned())),
        trouble(refused()),
        trouble(busy()),
        trouble(busy()),
    ];
    assert_eq!(rig.news(), told);
}

#[test]
fn a_taken_seat_is_told_once_a_minute() {
    let taken = |seconds| Trouble::Rejected(format!("taken, silent for {seconds} s"));
    let mut rig = Rig::new(job(), plain());
    rig.until(is_wait).give(lost());
    for attempt in 0..30 {
        rig.until(|action| matches!(action, Action::Connect(_)));
        rig.give(Event::Unreachable(taken(attempt)));
    }
    let current = Some(Obstacle::Trouble(taken(29)));
    assert_eq!(rig.machine.progress(rig.now).obstacle, current);
    let told = [News::Started, trouble(Trouble::Lost("reset".to_owned())), trouble(taken(0))];
    assert_eq!(rig.news(), told);
}

#[test]
fn a_destination_that_fails_after_each_greeting_is_not_told_every_second() {
    let mut rig = Rig::new(job(), plain());
    for _ in 0..30 {
        rig.until(is_wait).give(Event::Reply { cookie: 0, error: Some(28) });
        rig.until(|action| matches!(action, Action::Connect(_)));
    }
    let told = [News::Started, trouble(Trouble::Cookie(0)), News::Restarted];
    let told_28 = [News::Started, trouble(Trouble::ErrorReply(28)), News::Restarted];
    let news = rig.news();
    assert!(news == told || news == told_28, "{news:?}");
}

#[test]
fn a_part_of_the_disk_that_cannot_be_read_ends_the_migration() {
    let unreadable = || "cannot read disk.img at byte 4096: EIO".to_owned();
    let ends: [fn(&Action) -> bool; 2] = [is_write, |action| matches!(action, Action::Look(_))];
    for end in ends {
        let mut rig = Rig::new(job(), ours(TOKEN, Has::Nothing));
        rig.until(end).give(Event::Unreadable(unreadable()));
        assert_eq!(rig.until_end(), Outcome::Failed(Trouble::Unreadable(unreadable())));
        assert_eq!(rig.milestones(), ["Connect", "HangUp", "End"]);
    }
}

#[test]
fn a_read_error_behind_the_closed_gate_lets_clients_go_on() {
    let mut rig = Rig::new(job(), ours(TOKEN, Has::Nothing));
    rig.until(is_closing);
    rig.marks = VecDeque::from([Range::whole(SIZE).until(4096)]);
    rig.give(Event::Done);
    rig.until(|action| matches!(action, Action::Look(_)));
    rig.give(Event::Unreadable("EIO".to_owned()));
    assert!(matches!(rig.until_end(), Outcome::Failed(Trouble::Unreadable(_))));
    assert!(rig.milestones().ends_with(&["HangUp", "OpenGate", "End"].map(str::to_owned)));
}

#[test]
fn the_next_attempt_comes_a_second_later_and_not_earlier() {
    let mut rig = Rig::new(job(), plain());
    rig.until(is_write).give(lost());
    rig.give(Event::Done);
    let Action::Wait { until } = rig.action else { panic!("{:?}", rig.action) };
    assert_eq!(until, rig.now + RETRY_EVERY);
    rig.now = until - 2 * MS;
    assert_eq!(rig.give(Event::Tick), &Action::Wait { until });
    assert!(matches!(rig.give(Event::Tick), Action::Connect(_)));
}

#[test]
fn a_destination_that_hangs_after_a_write_counts_as_lost_after_sixty_seconds() {
    let mut rig = Rig::new(job(), plain());
    rig.until(is_wait);
    let Action::Wait { until } = rig.action else { panic!("{:?}", rig.action) };
    rig.now = until - 2 * MS;
    assert!(matches!(rig.give(Event::Tick), Action::TakeDirty { .. }), "it has a moment yet");
    rig.until(is_wait);
    rig.now = until;
    assert_eq!(rig.give(Event::Tick), &Action::HangUp);
    assert!(rig.news().contains(&trouble(Trouble::Stuck(Duration::from_secs(60)))));
}

#[test]
fn the_same_process_is_sent_only_what_it_did_not_acknowledge() {
    let mut rig = Rig::new(job(), ours(TOKEN, Has::Nothing));
    rig.until(is_wait);
    rig.give(Event::Reply { cookie: 1, error: None });
    rig.give(lost());
    rig.peer = ours(TOKEN, Has::Incomplete);
    assert_eq!(rig.until_end(), Outcome::Arrived { acknowledged: true });
    assert!(rig.news().contains(&News::Resumed));
    let handover = Handover::LENGTH as u64;
    assert_eq!(rig.written() - handover, 2 * SIZE - (1 << 20));
}

#[test]
fn a_process_that_was_written_into_by_others_is_sent_everything() {
    let mut rig = Rig::new(job(), ours(TOKEN, Has::Nothing));
    rig.until(is_wait).give(lost());
    assert_eq!(rig.until_end(), Outcome::Arrived { acknowledged: true });
    assert!(rig.news().contains(&News::Restarted));
}

#[test]
fn another_process_is_sent_everything_under_another_name() {
    let mut rig = Rig::new(job(), ours(TOKEN, Has::Nothing));
    rig.until(is_wait);
    rig.give(Event::Reply { cookie: 1, error: None });
    rig.give(lost());
    rig.peer = ours(OTHER, Has::Incomplete);
    rig.until(is_handover);
    let Action::Send(DestinationRequest { work, .. }) = rig.action else {
        panic!("{:?}", rig.action)
    };
    assert_eq!(work, RequestKind::Handover(Handover { id: ID.next(), token: OTHER }));
    assert_eq!(rig.machine.job().id, ID.next());
    assert_eq!(rig.machine.progress(rig.now).id, ID.next());
    assert!(rig.news().contains(&News::Restarted));
}

#[test]
fn only_who_knows_the_migration_can_say_no() {
    let answer = |listening, has| Some(Answer { listening, has });
    let restarted = |answer: Option<Answer>| handover_verdict(answer.as_ref(), None);
    assert_eq!(restarted(None), HandoverVerdict::Unknown);
    assert_eq!(restarted(answer(Some(TOKEN), Has::Nothing)), HandoverVerdict::Unknown);
    assert_eq!(restarted(answer(Some(TOKEN), Has::Incomplete)), HandoverVerdict::NotArrived);
    assert_eq!(restarted(answer(None, Has::Incomplete)), HandoverVerdict::Unknown);
    assert_eq!(restarted(answer(None, Has::Nothing)), HandoverVerdict::Unknown);
    assert_eq!(restarted(answer(None, Has::Arrived)), HandoverVerdict::Arrived);
    assert_eq!(restarted(answer(Some(TOKEN), Has::Arrived)), HandoverVerdict::Arrived);
    let same = answer(Some(TOKEN), Has::Nothing);
    assert_eq!(handover_verdict(same.as_ref(), Some(TOKEN)), HandoverVerdict::NotArrived);
    assert_eq!(handover_verdict(same.as_ref(), Some(OTHER)), HandoverVerdict::Unknown);
}

#[test]
fn a_destination_that_cannot_acknowledge_gets_a_disc_after_the_departing_record() {
    let mut rig = Rig::new(job(), plain());
    assert_eq!(rig.until_end(), Outcome::Arrived { acknowledged: false });
    let tail = [
        "CloseGate",
        "Flush",
        "Record(Departing)",
        "Seal",
        "Disconnect",
        "Retire",
        "Record(Departed)",
        "HangUp",
        "End",
    ];
    assert!(rig.milestones().ends_with(&tail.map(str::to_owned)), "{:?}", rig.milestones());
}

#[test]
fn to_a_destination_that_cannot_acknowledge_the_image_is_deleted_just_before_the_disc() {
    let mut rig =
        Rig::new(Job { unlink: true, ..job() }, DestinationInfo { flush: false, ..plain() });
    rig.until_end();
    let tail = [
        "CloseGate",
        "Record(Departing)",
        "Seal",
        "Unlink",
        "Disconnect",
        "Retire",
        "HangUp",
        "End",
    ];
    assert_eq!(rig.milestones()[1..], tail.map(str::to_owned));
}

#[test]
fn a_disc_that_did_not_go_out_is_taken_back() {
    let mut rig = Rig::new(job(), plain());
    rig.until(|action| {
        matches!(action, Action::Send(DestinationRequest { work: RequestKind::Disconnect, .. }))
    });
    assert_eq!(rig.give(lost()), &Action::HangUp);
    assert_eq!(rig.give(Event::Done), &Action::OpenGate);
    assert_eq!(rig.give(Event::Done), &Action::Record(RecordKind::Before));
    assert_eq!(rig.until_end(), Outcome::Arrived { acknowledged: false });
}

#[test]
fn a_destination_that_has_hung_up_before_the_disc_has_not_got_the_disk() {
    for unlink in [false, true] {
        let mut rig = Rig::new(Job { unlink, ..job() }, plain());
        rig.until(|action| *action == Action::Seal);
        assert!(matches!(rig.give(Event::Done), Action::Wait { .. }), "unlink: {unlink}");
        assert_eq!(rig.give(lost()), &Action::HangUp);
        assert_eq!(rig.give(Event::Done), &Action::OpenGate);
        assert_eq!(rig.give(Event::Done), &Action::Record(RecordKind::Before));
        assert_eq!(rig.until_end(), Outcome::Arrived { acknowledged: false });
    }
}

#[test]
fn once_the_image_is_deleted_the_gate_stays_closed_and_the_copy_is_made_again() {
    let mut rig = Rig::new(Job { unlink: true, ..job() }, plain());
    rig.until(|action| {
        matches!(action, Action::Send(DestinationRequest { work: RequestKind::Disconnect, .. }))
    });
    let before = rig.written();
    rig.give(lost());
    assert_eq!(rig.machine.request(OperatorRequest::Break), Err(TooLate));
    assert_eq!(rig.until_end(), Outcome::Arrived { acknowledged: false });
    assert!(!rig.log.contains(&Action::OpenGate));
    assert_eq!(rig.written(), 2 * before);
    assert_eq!(rig.log.iter().filter(|action| **action == Action::Unlink).count(), 1);
}

#[test]
fn a_break_before_the_handover_ends_it_and_clients_keep_the_disk() {
    let mut probe = Rig::new(job(), ours(TOKEN, Has::Nothing));
    probe.until(is_handover);
    let steps = probe.log.len() - 1;
    for stop in 0..steps {
        let mut rig = Rig::new(job(), ours(TOKEN, Has::Nothing));
        for _ in 0..stop {
            let event = rig.success();
            rig.give(event);
        }
        assert_eq!(rig.machine.request(OperatorRequest::Break), Ok(()), "after {stop} steps");
        assert_eq!(rig.until_end(), Outcome::Broken, "after {stop} steps");
        let last = |wanted: Action| rig.log.iter().rposition(|action| *action == wanted);
        let closed = rig.log.iter().rposition(is_closing);
        assert!(closed <= last(Action::OpenGate), "after {stop} steps");
        assert!(
            last(Action::Record(RecordKind::Departing)) <= last(Action::Record(RecordKind::Before))
        );
        assert!(!rig.log.iter().any(is_handover));
    }
}

#[test]
fn a_break_while_waiting_for_the_next_attempt_ends_it() {
    let mut rig = Rig::new(job(), plain());
    rig.until(is_write).give(lost());
    rig.give(Event::Done);
    assert!(matches!(rig.action, Action::Wait { .. }));
    rig.machine.request(OperatorRequest::Break).unwrap();
    assert_eq!(rig.give(Event::Tick), &Action::End(Outcome::Broken));
}

#[test]
fn a_break_after_the_handover_is_too_late_at_every_step() {
    let mut rig = Rig::new(job(), ours(TOKEN, Has::Nothing));
    rig.until(is_handover);
    while !matches!(rig.action, Action::End(_)) {
        assert_eq!(
            rig.machine.request(OperatorRequest::Break),
            Err(TooLate),
            "during {:?}",
            rig.action
        );
        let event = rig.success();
        rig.give(event);
    }
    assert_eq!(rig.action, Action::End(Outcome::Arrived { acknowledged: true }));
}

#[test]
fn a_speed_limit_holds_the_copy_back_until_it_is_lifted() {
    let limited = Job { speed: NonZeroU64::new(1 << 20), ..job() };
    let mut rig = Rig::new(limited, ours(TOKEN, Has::Nothing));
    rig.until(is_write).give(Event::Done);
    rig.until(is_wait);
    let Action::Wait { until } = rig.action else { panic!("{:?}", rig.action) };
    assert!(until < rig.now + Duration::from_secs(1), "it waits for its turn, not for a reply");
    rig.machine.request(OperatorRequest::Speed(None)).unwrap();
    rig.give(Event::Tick);
    assert!(is_write(&rig.action), "{:?}", rig.action);
    assert_eq!(rig.machine.progress(rig.now).speed_limit, None);
}

#[test]
fn writers_that_are_too_fast_are_held_back_and_let_go_in_the_end() {
    let mut rig = Rig::new(Job { pause: Duration::ZERO, ..job() }, ours(TOKEN, Has::Nothing));
    let disk = Range::whole(SIZE);
    while !rig.log.iter().any(is_closing) {
        if let Action::TakeDirty { from: 0, .. } = rig.action
            && rig.pending.is_empty()
        {
            // Whatever was copied is dirty again, and a pass takes longer than a second.
            rig.now += Duration::from_secs(1);
            rig.marks = (0..8).map(|part| disk.from(part << 19).split(1 << 19).0).collect();
        }
        if let Action::TakeDirty { from: 1.., .. } = rig.action
            && rig.marks.is_empty()
        {
            rig.give(Event::Taken { run: None, left: SIZE });
            continue;
        }
        let event = rig.success();
        rig.give(event);
        assert!(rig.log.len() < 20_000, "it never ends");
    }
    let held = rig.news().iter().filter(|news| matches!(news, News::Throttled(_))).count();
    assert!(held >= 5, "{held} steps");
    rig.marks.clear();
    rig.give(lost());
    rig.until(is_wait);
    assert!(rig.log.contains(&Action::Hold(Duration::ZERO)));
}

#[test]
fn a_long_flush_does_not_let_the_marks_pile_up() {
    let mut rig = Rig::new(job(), ours(TOKEN, Has::Nothing));
    rig.until(|action| {
        matches!(action, Action::Send(DestinationRequest { work: RequestKind::Flush, .. }))
    });
    rig.give(Event::Done);
    while !matches!(rig.action, Action::Wait { .. }) {
        let event = rig.success();
        rig.give(event);
    }
    let Action::Wait { until } = rig.action else { panic!("{:?}", rig.action) };
    assert!(until <= rig.now + Duration::from_millis(100));
    assert!(matches!(rig.give(Event::Tick), Action::TakeDirty { .. }));
}
