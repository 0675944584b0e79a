//! A handover that is not acknowledged.

use super::rig::*;
use crate::migration::freeze::FREEZE_MAX;

#[test]
fn lost_acknowledgement_is_asked_for() {
    let mut rig = Rig::new(job(), ours(TOKEN, Has::Nothing));
    rig.until(is_handover);
    assert_eq!(rig.give(lost()), &Action::HangUp);
    assert!(matches!(rig.give(Event::Done), Action::Connect(_)), "at once");
    let serving = Answer { listening: None, has: Has::Arrived };
    let arrived = DestinationInfo { answer: Some(serving), size: 0, ..plain() };
    assert_eq!(rig.give(Event::Greeted(arrived)), &Action::Retire);
    assert_eq!(rig.until_end(), Outcome::Arrived { acknowledged: true });
    assert!(rig.log.contains(&Action::Record(RecordKind::Departed)));
}

#[test]
fn handover_without_acknowledgement_leads_to_doubt() {
    let ends = [
        lost(),
        Event::Reply { cookie: 0, error: None },
        Event::Reply { cookie: 0, error: Some(5) },
        Event::Failed("no".to_owned()),
        Event::Unreachable(Trouble::Connect("no".to_owned())),
    ];
    for end in ends {
        let mut rig = Rig::new(job(), ours(TOKEN, Has::Nothing));
        rig.until(is_handover).give(Event::Done);
        assert_eq!(rig.give(end), &Action::HangUp);
        assert_eq!(rig.machine.progress(rig.now).stage, Stage::InDoubt);
    }
    let mut rig = Rig::new(job(), ours(TOKEN, Has::Nothing));
    rig.until(is_handover).give(Event::Done);
    rig.now += ASK_AFTER;
    assert!(matches!(rig.give(Event::Tick), Action::Ask(_)), "no answer for two seconds");
    assert_eq!(rig.machine.progress(rig.now).stage, Stage::InDoubt);
}

#[test]
fn acknowledgement_counts_while_being_asked_for() {
    let mut rig = Rig::new(job(), ours(TOKEN, Has::Nothing));
    rig.until(is_handover);
    let cookie = rig.machine.context.cookie;
    rig.give(Event::Done);
    for _ in 0..3 {
        rig.until(is_wait);
        rig.pending.clear();
        rig.now += ASK_AFTER;
        assert!(matches!(rig.give(Event::Tick), Action::Ask(_)));
        rig.give(Event::Unreachable(Trouble::NoGreeting("it settles".to_owned())));
    }
    assert_eq!(rig.give(Event::Reply { cookie, error: None }), &Action::Retire);
    assert_eq!(rig.until_end(), Outcome::Arrived { acknowledged: true });
    let doubts = rig.news().into_iter().filter(|news| matches!(news, News::Obstructed(_)));
    assert_eq!(doubts.count(), 1);
}

#[test]
fn handover_not_arrived_in_time_opens_the_gate() {
    let mut rig = Rig::new(job(), ours(TOKEN, Has::Nothing));
    rig.until(is_handover).give(Event::Done);
    rig.pending.clear();
    rig.now += ASK_AFTER;
    assert!(matches!(rig.give(Event::Tick), Action::Ask(_)));
    rig.now += FREEZE_MAX;
    assert_eq!(rig.give(Event::Greeted(ours(TOKEN, Has::Incomplete))), &Action::HangUp);
    assert_eq!(rig.give(Event::Done), &Action::OpenGate);
    assert_eq!(rig.give(Event::Done), &Action::Record(RecordKind::Before));
    rig.peer = ours(TOKEN, Has::Incomplete);
    let before = rig.written();
    assert_eq!(rig.until_end(), Outcome::Arrived { acknowledged: true });
    assert_eq!(rig.written() - before, Handover::LENGTH as u64, "the copy was complete");
}

#[test]
fn destination_with_the_copy_gets_another_handover() {
    let mut rig = Rig::new(job(), ours(TOKEN, Has::Nothing));
    rig.until(is_handover).give(lost());
    rig.give(Event::Done);
    rig.give(Event::Greeted(ours(TOKEN, Has::Incomplete)));
    assert!(is_handover(&rig.action));
    assert_eq!(rig.until_end(), Outcome::Arrived { acknowledged: true });
    assert!(rig.news().contains(&News::HandingOverAgain));
}

#[test]
fn destination_without_the_copy_returns_the_disk() {
    let mut rig = Rig::new(job(), ours(TOKEN, Has::Nothing));
    rig.until(is_handover).give(lost());
    rig.give(Event::Done);
    assert_eq!(rig.give(Event::Greeted(ours(OTHER, Has::Incomplete))), &Action::HangUp);
    assert_eq!(rig.give(Event::Done), &Action::OpenGate);
    assert_eq!(rig.give(Event::Done), &Action::Record(RecordKind::Before));
}

#[test]
fn gate_stays_closed_while_in_doubt() {
    let mut rig = Rig::new(job(), ours(TOKEN, Has::Nothing));
    rig.until(is_handover).give(lost());
    let since = rig.log.len();
    let unknowing = [
        Event::Unreachable(Trouble::Connect("refused".to_owned())),
        Event::Greeted(ours(OTHER, Has::Nothing)),
        Event::Greeted(plain()),
        Event::Greeted(DestinationInfo {
            answer: Some(Answer { listening: None, has: Has::Nothing }),
            ..plain()
        }),
    ];
    for attempt in 0..3600 {
        rig.until(|action| matches!(action, Action::Connect(_)));
        rig.give(unknowing[attempt % unknowing.len()].clone());
    }
    let harmless = |action: &Action| {
        matches!(action, Action::Connect(_) | Action::Wait { .. } | Action::HangUp)
    };
    assert!(rig.log[since..].iter().all(harmless));
    assert_eq!(rig.machine.request(OperatorRequest::Break), Err(TooLate));
    let news = rig.news();
    let doubt = |news: &&News| matches!(news, News::Obstructed(Obstacle::Acknowledgement(_)));
    let doubts = news.iter().filter(doubt).count();
    assert_eq!((doubts, news.len()), (1, 3), "reported more than once: {news:?}");
}
