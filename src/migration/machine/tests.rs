//! The machine, phase by phase, with a destination that does what the test says.

mod closing;
mod doubt;
mod exploration;
mod legacy;
mod listed;
mod relay;
mod requests;
mod rig;
mod transitions;
mod trouble;

use rig::*;

#[test]
fn milestones_come_in_order() {
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
fn image_is_deleted_after_the_acknowledgement() {
    let mut rig = Rig::new(Job { unlink: true, ..job() }, ours(TOKEN, Has::Nothing));
    rig.until_end();
    let tail = ["Handover", "Retire", "Unlink", "Disconnect", "End"];
    assert!(rig.milestones().ends_with(&tail.map(str::to_owned)), "{:?}", rig.milestones());
}

#[test]
fn undeletable_image_is_recorded_as_departed() {
    let mut rig = Rig::new(Job { unlink: true, ..job() }, ours(TOKEN, Has::Nothing));
    rig.until(|action| *action == Action::Unlink);
    assert_eq!(rig.give(Event::Failed("busy".to_owned())), &Action::Record(RecordKind::Departed));
    assert_eq!(rig.until_end(), Outcome::Arrived { acknowledged: true });
    assert!(rig.news().contains(&News::RecordFailed("busy".to_owned())));
}

#[test]
fn disk_below_the_size_limit_is_refused() {
    let small = |size| Machine::new(Job { size, ..job() }, Duration::ZERO).err();
    assert_eq!(small(SIZE_MIN - 1), Some(TooSmall));
    assert_eq!(small(SIZE_MIN), None);
}

#[test]
fn only_a_process_that_knows_can_deny_arrival() {
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
fn fast_writers_are_throttled_and_released() {
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
    rig.until(is_wait).give(lost());
    rig.until(is_wait);
    assert!(rig.log.contains(&Action::Throttle(Duration::ZERO)));
}

#[test]
fn dirty_blocks_are_copied_during_a_long_flush() {
    let mut rig = Rig::new(job(), ours(TOKEN, Has::Nothing));
    rig.until(|action| {
        matches!(action, Action::Send(DestinationRequest { kind: RequestKind::Flush, .. }))
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
