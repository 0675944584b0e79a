//! Operators' requests: break and speed.

use super::rig::*;

#[test]
fn break_before_the_handover_keeps_the_disk_here() {
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
fn break_while_backing_off_ends_the_migration() {
    let mut rig = Rig::new(job(), plain());
    rig.until(is_write).give(lost());
    rig.give(Event::Done);
    assert!(matches!(rig.action, Action::Wait { .. }));
    rig.machine.request(OperatorRequest::Break).unwrap();
    assert_eq!(rig.give(Event::Tick), &Action::End(Outcome::Broken));
}

#[test]
fn break_after_the_handover_is_too_late() {
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
fn speed_limit_delays_the_copy_until_lifted() {
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
