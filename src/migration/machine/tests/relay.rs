//! Clients that stay, and are passed on to the destination.

use super::exploration::explore;
use super::rig::*;

fn relayed() -> Job {
    Job { relay: Some(OfferedTerms::default()), ..job() }
}

fn is_relay(action: &Action) -> bool {
    matches!(action, Action::Relay { .. })
}

fn not_yet() -> Event {
    Event::Unreachable(Trouble::Connect("not yet".to_owned()))
}

/// The actions after the handover.
fn after_handover(rig: &Rig) -> Vec<&Action> {
    let handover = rig.log.iter().position(is_handover).unwrap();
    rig.log[handover + 1..].iter().filter(|action| !is_wait(action)).collect()
}

#[test]
fn clients_are_passed_on_after_the_record() {
    let mut rig = Rig::new(relayed(), ours(TOKEN, Has::Nothing));
    assert_eq!(rig.until_end(), Outcome::Arrived { acknowledged: true });
    let proof = Some(rig.machine.job().question());
    let expected = [
        &Action::Record(RecordKind::Departed),
        &Action::Disconnect,
        &Action::Relay { proof },
        &Action::End(Outcome::Arrived { acknowledged: true }),
    ];
    assert_eq!(after_handover(&rig), expected);
}

#[test]
fn deleted_image_needs_no_record_before_relaying() {
    let mut rig = Rig::new(Job { unlink: true, ..relayed() }, ours(TOKEN, Has::Nothing));
    rig.until(is_relay);
    assert_eq!(after_handover(&rig)[..2], [&Action::Unlink, &Action::Disconnect]);
}

#[test]
fn destination_that_cannot_acknowledge_proves_nothing() {
    for unlink in [false, true] {
        let mut rig = Rig::new(Job { unlink, ..relayed() }, plain());
        rig.until(is_relay);
        assert_eq!(rig.action, Action::Relay { proof: None });
        assert_eq!(rig.until_end(), Outcome::Arrived { acknowledged: false });
    }
}

#[test]
fn relay_waits_for_the_destination_up_to_its_limit() {
    let mut rig = Rig::new(relayed(), ours(TOKEN, Has::Nothing));
    rig.until(is_relay);
    let began = rig.now;
    while rig.now < began + RELAY_WAIT_MAX {
        assert!(is_relay(&rig.action), "{:?}", rig.action);
        let waits_until = match rig.give(not_yet()) {
            Action::Wait { until } => *until,
            Action::Retire => break,
            other => panic!("{other:?}"),
        };
        assert!(waits_until <= rig.now + RELAY_RETRY_EVERY);
        let progress = rig.machine.progress(rig.now);
        assert_eq!((progress.stage, progress.obstacle.unwrap().word()), (Stage::Leaving, "relay"));
        rig.now = waits_until;
        rig.give(Event::Tick);
    }
    if is_relay(&rig.action) {
        rig.give(not_yet());
    }
    assert_eq!(rig.action, Action::Retire);
    assert!(rig.now <= began + RELAY_WAIT_MAX + 2 * MS);
    assert!(rig.news().contains(&News::RelayFailed("not yet".to_owned())));
    assert_eq!(rig.until_end(), Outcome::Arrived { acknowledged: true });
}

#[test]
fn unsuitable_destination_ends_the_sessions_at_once() {
    let mut rig = Rig::new(relayed(), ours(TOKEN, Has::Nothing));
    rig.until(is_relay);
    assert_eq!(rig.give(Event::Failed("too small".to_owned())), &Action::Retire);
    assert!(rig.news().contains(&News::RelayFailed("too small".to_owned())));
    assert_eq!(rig.until_end(), Outcome::Arrived { acknowledged: true });
}

#[test]
fn nothing_is_passed_on_without_a_record() {
    let mut rig = Rig::new(relayed(), ours(TOKEN, Has::Nothing));
    rig.until(|action| *action == Action::Record(RecordKind::Departed));
    rig.give(Event::Failed("no space".to_owned()));
    assert_eq!(rig.until_end(), Outcome::Arrived { acknowledged: true });
    assert!(!rig.log.iter().any(is_relay));
    assert!(rig.log.contains(&Action::Retire));
}

#[test]
fn destination_that_offers_less_is_refused_at_the_start() {
    let offered = |flags| OfferedTerms { flags, block_min: 512 };
    let refusal = |terms: OfferedTerms, peer: DestinationInfo| {
        let mut rig = Rig::new(Job { relay: Some(terms), ..job() }, peer);
        match rig.until_end() {
            Outcome::Failed(trouble) => Some(trouble),
            _ => None,
        }
    };
    let all = TransmissionFlags::all() - TransmissionFlags::READ_ONLY;
    let lacks = DestinationInfo { flags: all - TransmissionFlags::SEND_TRIM, ..plain() };
    assert_eq!(refusal(offered(all), plain()), None);
    assert_eq!(refusal(offered(all), lacks), Some(Trouble::Offers("SEND_TRIM".to_owned())));
    assert_eq!(refusal(offered(lacks.flags), lacks), None);
    let hints = TransmissionFlags::ROTATIONAL | TransmissionFlags::CAN_MULTI_CONN;
    let without_hints = DestinationInfo { flags: all - hints, ..plain() };
    assert_eq!(refusal(offered(all), without_hints), None);
    let finer = OfferedTerms { block_min: 1, ..offered(all) };
    assert_eq!(refusal(finer, plain()), Some(Trouble::Offers("blocks of 1 bytes".to_owned())));
}

#[test]
fn image_is_never_served_again_after_the_handover() {
    let mut relays = 0;
    for [phase, event, next, action] in explore() {
        let has_left = phase.starts_with("Leaving");
        assert!(!has_left || next == "Ended" || next.starts_with("Leaving"), "{phase} {event}");
        assert!(!has_left || !["OpenGate", "Record(Before)"].contains(&action), "{phase} {event}");
        if action == "Relay" {
            assert!(["Leaving(Disconnecting)", "Leaving(Relaying)"].contains(&phase), "{phase}");
            relays += 1;
        }
    }
    assert!(relays > 1);
}
