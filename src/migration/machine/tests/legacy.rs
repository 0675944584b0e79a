//! The handover to a destination that cannot acknowledge.

use super::rig::*;

#[test]
fn disc_follows_the_departing_record() {
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
fn image_is_deleted_just_before_the_disc() {
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
fn unsent_disc_is_undone() {
    let mut rig = Rig::new(job(), plain());
    rig.until(|action| {
        matches!(action, Action::Send(DestinationRequest { kind: RequestKind::Disconnect, .. }))
    });
    assert_eq!(rig.give(lost()), &Action::HangUp);
    assert_eq!(rig.give(Event::Done), &Action::OpenGate);
    assert_eq!(rig.give(Event::Done), &Action::Record(RecordKind::Before));
    assert_eq!(rig.until_end(), Outcome::Arrived { acknowledged: false });
}

#[test]
fn hang_up_before_the_disc_keeps_the_disk_here() {
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
fn deleted_image_keeps_the_gate_closed_and_copies_again() {
    let mut rig = Rig::new(Job { unlink: true, ..job() }, plain());
    rig.until(|action| {
        matches!(action, Action::Send(DestinationRequest { kind: RequestKind::Disconnect, .. }))
    });
    let before = rig.written();
    rig.give(lost());
    assert_eq!(rig.machine.request(OperatorRequest::Break), Err(TooLate));
    assert_eq!(rig.until_end(), Outcome::Arrived { acknowledged: false });
    assert!(!rig.log.contains(&Action::OpenGate));
    assert_eq!(rig.written(), 2 * before);
    assert_eq!(rig.log.iter().filter(|action| **action == Action::Unlink).count(), 1);
}
