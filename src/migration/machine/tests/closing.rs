//! The last copy: when the gate closes, and when it opens again.

use super::rig::*;
use crate::migration::arrival::SOURCE_SILENCE;
use crate::migration::freeze::{FREEZE_MAX, STALL_MAX};

/// A machine behind the closed gate, with a request of the last copy in flight.
fn in_final_copy(peer: DestinationInfo) -> Rig {
    let mut rig = Rig::new(job(), peer);
    rig.until(is_closing);
    rig.marks = VecDeque::from([Range::whole(SIZE).until(4096)]);
    rig.give(Event::Done);
    rig.until(is_write).give(Event::Done);
    rig.until(is_wait);
    rig
}

#[test]
fn silent_link_opens_the_gate_and_is_kept() {
    let mut rig = in_final_copy(ours(TOKEN, Has::Nothing));
    let Action::Wait { until } = rig.action else { panic!("{:?}", rig.action) };
    assert!(until <= rig.now + STALL_MAX);
    rig.now = until - 20 * MS;
    rig.give(Event::Tick);
    rig.until(is_wait);
    assert!(!rig.log.contains(&Action::OpenGate));
    rig.now = until;
    assert_eq!(rig.give(Event::Tick), &Action::OpenGate);
    assert_eq!(rig.machine.progress(rig.now).obstacle.unwrap().word(), "last-copy");
    let opened = rig.now;
    rig.pending.push_back(rig.machine.context.cookie);
    rig.until(is_closing);
    assert!(rig.now >= opened + 4 * STALL_MAX, "the gate closed again too soon");
    assert_eq!(rig.until_end(), Outcome::Arrived { acknowledged: true });
    assert!(!rig.log.contains(&Action::HangUp), "the link was only slow");
    let reopened = rig.news().into_iter().filter(|news| matches!(news, News::Obstructed(_)));
    assert_eq!(reopened.count(), 1);
}

#[test]
fn silent_link_keeps_the_gate_open() {
    let mut rig = in_final_copy(ours(TOKEN, Has::Nothing));
    rig.now += STALL_MAX;
    rig.give(Event::Tick);
    rig.until(|action| *action == Action::OpenGate);
    let (since, cookie) = (rig.log.len(), rig.machine.context.cookie);
    let end = rig.now + Duration::from_secs(50);
    while rig.now < end {
        rig.pending.clear();
        let event = rig.success();
        rig.give(event);
    }
    assert!(!rig.log[since..].iter().any(is_closing));
    rig.pending.extend(cookie..=rig.machine.context.cookie);
    rig.until(is_closing);
}

#[test]
fn late_reply_opens_the_gate() {
    let mut rig = in_final_copy(ours(TOKEN, Has::Nothing));
    rig.now = rig.machine.freeze_end().unwrap();
    let cookie = rig.machine.context.cookie;
    assert_eq!(rig.give(Event::Reply { cookie, error: None }), &Action::OpenGate);
}

#[test]
fn dirty_blocks_are_copied_while_the_gate_backs_off() {
    let mut rig = Rig::new(job(), ours(TOKEN, Has::Nothing));
    for _ in 0..5 {
        rig.until(is_closing).give(Event::Failed("a visit does not end".to_owned()));
    }
    let (opened, mut last) = (rig.now, rig.now);
    while !is_closing(&rig.until(|action| is_closing(action) || is_take(action)).action) {
        assert!(rig.now <= last + Duration::from_millis(200), "no marks were taken");
        last = rig.now;
        let event = rig.success();
        rig.give(event);
    }
    assert!(rig.now >= opened + Duration::from_secs(16));
}

#[test]
fn source_keeps_sending_while_the_gate_backs_off() {
    let mut rig = Rig::new(job(), ours(TOKEN, Has::Nothing));
    for _ in 0..5 {
        rig.until(is_closing).give(Event::Failed("a visit does not end".to_owned()));
    }
    let mut last = rig.now;
    while !is_closing(&rig.action) {
        if let Action::Send(_) = rig.action {
            last = rig.now;
        }
        assert!(rig.now < last + SOURCE_SILENCE, "it may lose its slot");
        let event = rig.success();
        rig.give(event);
    }
}

fn is_take(action: &Action) -> bool {
    matches!(action, Action::TakeDirty { .. })
}

#[test]
fn slow_link_has_four_seconds_behind_the_gate() {
    let mut rig = in_final_copy(ours(TOKEN, Has::Nothing));
    let closed = rig.now;
    rig.marks = (1..100).map(|at| Range::whole(SIZE).from(at * 8192).split(4096).0).collect();
    rig.give(Event::Tick);
    while rig.action != Action::OpenGate {
        if let Action::Wait { .. } = rig.action {
            rig.now += Duration::from_secs(1);
        }
        let event = rig.success();
        rig.give(event);
    }
    assert!(rig.now >= closed + FREEZE_MAX - Duration::from_secs(1));
    assert!(rig.now <= closed + FREEZE_MAX + Duration::from_secs(1));
}

#[test]
fn hanging_flush_opens_the_gate() {
    let mut rig = Rig::new(job(), plain());
    rig.until(is_closing);
    rig.until(|action| {
        matches!(action, Action::Send(DestinationRequest { kind: RequestKind::Flush, .. }))
    });
    let cookie = rig.machine.context.cookie;
    let Action::Wait { until } = *rig.give(Event::Done) else { panic!("{:?}", rig.action) };
    assert!(until <= rig.now + FREEZE_MAX);
    rig.now = until;
    assert_eq!(rig.give(Event::Tick), &Action::OpenGate);
    rig.until(is_wait);
    rig.give(Event::Reply { cookie, error: None });
    assert_eq!(rig.until_end(), Outcome::Arrived { acknowledged: false });
    assert!(rig.milestones().ends_with(&["HangUp", "End"].map(str::to_owned)));
    assert_eq!(rig.log.iter().filter(|action| **action == Action::HangUp).count(), 1);
}

#[test]
fn late_record_is_restored_after_the_gate_opens() {
    for expired in [false, true] {
        let mut rig = Rig::new(job(), ours(TOKEN, Has::Nothing));
        rig.until(|action| *action == Action::Record(RecordKind::Departing));
        let end = rig.machine.freeze_end().unwrap();
        if expired {
            // The gate opened after the machine compared the time, and before the sealing.
            assert_eq!(rig.give(Event::Done), &Action::Seal);
            rig.give(Event::Failed("the gate has opened by itself".to_owned()));
        } else {
            rig.now = end;
            rig.give(Event::Done);
        }
        assert_eq!(rig.action, Action::OpenGate);
        assert_eq!(rig.give(Event::Done), &Action::Record(RecordKind::Before));
        assert_eq!(rig.until_end(), Outcome::Arrived { acknowledged: true });
        assert!(!rig.log.contains(&Action::HangUp));
    }
}

#[test]
fn sealed_gate_has_no_freeze_end() {
    let mut rig = Rig::new(job(), ours(TOKEN, Has::Nothing));
    rig.until(|action| *action == Action::Seal);
    assert!(rig.machine.freeze_end().is_some());
    rig.give(Event::Done);
    assert_eq!(rig.machine.freeze_end(), None);
}

#[test]
fn failure_undoes_link_gate_and_record_in_order() {
    let mut rig = Rig::new(job(), ours(TOKEN, Has::Nothing));
    rig.until(|action| *action == Action::Record(RecordKind::Departing));
    assert_eq!(rig.give(Event::Failed("disk full".to_owned())), &Action::HangUp);
    assert_eq!(rig.give(Event::Done), &Action::OpenGate);
    assert_eq!(rig.give(Event::Done), &Action::Record(RecordKind::Before));
    let failed = Outcome::Failed(Trouble::Record("disk full".to_owned()));
    assert_eq!(rig.give(Event::Done), &Action::End(failed), "it retried");
}

#[test]
fn hang_up_before_the_handover_leaves_no_doubt() {
    for in_handover in [false, true] {
        let mut rig = Rig::new(job(), ours(TOKEN, Has::Nothing));
        rig.until(|action| *action == Action::Seal);
        if in_handover {
            rig.until(is_handover).give(Event::Unsent("broken pipe".to_owned()));
        } else {
            assert!(matches!(rig.give(Event::Done), Action::Wait { .. }));
            rig.give(lost());
        }
        assert_eq!(rig.action, Action::HangUp);
        assert_eq!(rig.give(Event::Done), &Action::OpenGate);
        assert_eq!(rig.give(Event::Done), &Action::Record(RecordKind::Before));
        assert_eq!(rig.until_end(), Outcome::Arrived { acknowledged: true });
    }
}

#[test]
fn long_visits_postpone_the_closing_for_a_second() {
    let mut rig = Rig::new(job(), ours(TOKEN, Has::Nothing));
    rig.until(is_closing);
    let first = rig.now;
    rig.give(Event::Failed("a visit does not end".to_owned()));
    assert_eq!(rig.machine.progress(rig.now).obstacle.unwrap().word(), "requests");
    rig.until(is_closing);
    assert!(rig.now >= first + RETRY_EVERY);
    assert_eq!(rig.until_end(), Outcome::Arrived { acknowledged: true });
    assert!(!rig.milestones().contains(&"HangUp".to_owned()), "the link was fine");
}

#[test]
fn long_request_keeps_the_gate_open_and_is_reported() {
    let mut rig = Rig::new(job(), ours(TOKEN, Has::Nothing));
    let start = rig.now;
    while rig.now < start + Duration::from_secs(30) {
        rig.until(|action| *action == Action::Probe);
        rig.give(Event::Visits { turned: false });
        assert!(!rig.log.iter().any(is_closing));
    }
    assert_eq!(rig.machine.progress(rig.now).obstacle.unwrap().word(), "requests");
    let reports = rig.news().into_iter().filter(|news| matches!(news, News::Obstructed(_)));
    assert_eq!(reports.count(), 1);
    assert_eq!(rig.until_end(), Outcome::Arrived { acknowledged: true });
}

#[test]
fn slow_flush_is_repeated_before_the_gate_closes() {
    let mut rig = Rig::new(job(), ours(TOKEN, Has::Nothing));
    let mut flushes = 0;
    while !is_closing(&rig.action) {
        if let Action::Send(DestinationRequest { kind: RequestKind::Flush, .. }) = rig.action {
            flushes += 1;
            rig.now += Duration::from_secs(1);
        }
        let event = rig.success();
        rig.give(event);
    }
    assert_eq!(flushes, 3);
}

#[test]
fn long_flush_is_reported_as_the_obstacle() {
    let mut rig = Rig::new(job(), ours(TOKEN, Has::Nothing));
    rig.until(|action| {
        matches!(action, Action::Send(DestinationRequest { kind: RequestKind::Flush, .. }))
    });
    rig.give(Event::Done);
    for _ in 0..60 {
        rig.until(is_wait);
        rig.now += Duration::from_millis(100);
        rig.give(Event::Tick);
    }
    assert_eq!(rig.machine.progress(rig.now).obstacle, Some(Obstacle::Flush));
    rig.until(is_closing);
    assert_eq!(rig.machine.progress(rig.now).obstacle, None);
}

fn before() -> Action {
    Action::Record(RecordKind::Before)
}

/// A machine that restores the record: *departing* was durable too late, and the gate has opened.
fn restoring_the_record() -> Rig {
    let mut rig = Rig::new(job(), ours(TOKEN, Has::Nothing));
    rig.until(|action| *action == Action::Record(RecordKind::Departing));
    rig.now = rig.machine.freeze_end().unwrap();
    rig.give(Event::Done);
    rig.until(|action| *action == before());
    rig
}

fn failed() -> Event {
    Event::Failed("I/O error".to_owned())
}

fn record_failures(rig: &mut Rig) -> usize {
    rig.news().iter().filter(|news| matches!(news, News::RecordFailed(_))).count()
}

#[test]
fn unrestored_record_is_tried_again() {
    for link_is_lost in [false, true] {
        let mut rig = restoring_the_record();
        for _ in 0..5 {
            rig.give(failed());
            assert!(rig.machine.progress(rig.now).record_unrestored);
            if link_is_lost {
                rig.until(is_wait).give(lost());
            }
            let (since, at) = (rig.log.len(), rig.now);
            rig.until(|action| *action == before());
            assert!(!rig.log[since..].iter().any(is_closing));
            assert!(rig.now <= at + 3 * RETRY_EVERY, "{:?}", rig.now - at);
        }
        rig.give(Event::Done);
        assert!(!rig.machine.progress(rig.now).record_unrestored);
        assert_eq!(record_failures(&mut rig), 1, "reported more than once");
        assert_eq!(rig.until_end(), Outcome::Arrived { acknowledged: true });
    }
}

#[test]
fn break_does_not_hide_a_record_failure() {
    let mut rig = restoring_the_record();
    rig.machine.request(OperatorRequest::Break).unwrap();
    assert_eq!(rig.give(failed()), &Action::HangUp);
    assert_eq!(record_failures(&mut rig), 1);
    rig.until(|action| *action == before());
    assert_eq!(rig.give(Event::Done), &Action::End(Outcome::Broken));
}

#[test]
fn failed_migration_tries_to_restore_the_record() {
    for failures in [1, RECORD_TRIES - 1, RECORD_TRIES] {
        let mut rig = Rig::new(job(), ours(TOKEN, Has::Nothing));
        rig.until(|action| *action == Action::Record(RecordKind::Departing)).give(failed());
        for _ in 0..failures {
            rig.until(|action| *action == before()).give(failed());
        }
        assert!(matches!(rig.until_end(), Outcome::Failed(Trouble::Record(_))));
        let tries = rig.log.iter().filter(|action| **action == before()).count();
        assert_eq!(tries as u32, RECORD_TRIES.min(failures + 1));
        assert_eq!(rig.machine.progress(rig.now).record_unrestored, failures == RECORD_TRIES);
        assert_eq!(record_failures(&mut rig), 1);
    }
}
