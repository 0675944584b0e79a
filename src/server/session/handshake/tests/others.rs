//! Decisions that need other sessions to end first, and the old style, whose greeting is one.

use super::*;

fn displaced(scripted: &mut Scripted, expected: &[SessionId]) -> Instant {
    match scripted.run() {
        Ok(HandshakeBlocked::Displaced { sessions, until }) if sessions == expected => until,
        other => panic!("{other:?}"),
    }
}

fn holder(scripted: &mut Scripted, expected: SessionId) -> Instant {
    match scripted.run() {
        Ok(HandshakeBlocked::Holder { session, until }) if session == expected => until,
        other => panic!("{other:?}"),
    }
}

fn refused_by(holder: SessionId) -> ProbeReply {
    let reply = OptionReply::error(OptionReplyKind::ErrPolicy, "held");
    ProbeReply::Refuse { reply, holder: Some(holder) }
}

/// Asserts that no stop request ends the wait.
fn assert_goes_on_waiting(scripted: &mut Scripted) {
    for stop in [StopRequest::Suspend].into_iter().chain(STRONG) {
        scripted.stop = stop;
        let blocked = scripted.run();
        let waits = matches!(
            blocked,
            Ok(HandshakeBlocked::Displaced { .. } | HandshakeBlocked::Holder { .. })
        );
        assert!(waits, "{stop:?}: {blocked:?}");
    }
    scripted.stop = StopRequest::Serve;
    assert!(!scripted.handshake.on_others(false), "before the timeout");
}

#[test]
fn a_probe_is_answered_once_the_displaced_sessions_have_ended() {
    let mut scripted = Scripted::newstyle(&after_flags(&[private()]));
    scripted.probes.push_back(displacing(&[3, 4]));
    let until = displaced(&mut scripted, &[3, 4]);
    assert_eq!(until, now() + DISPLACED_END_TIMEOUT);
    assert_goes_on_waiting(&mut scripted);
    assert!(!scripted.progress.is_source, "not before its predecessors have ended");
    advance_clock(DISPLACED_END_TIMEOUT - NANOSECOND);
    assert!(!scripted.handshake.on_others(false) && scripted.handshake.on_others(true));
    assert_input(scripted.run());
    assert_eq!(scripted.replies(), [(PRIVATE_OPTION, PRIVATE_OPTION), (PRIVATE_OPTION, 1)]);
    assert!(scripted.progress.is_source);
}

#[test]
fn a_probe_fails_when_a_displaced_session_stays() {
    let mut scripted = Scripted::newstyle(&after_flags(&[private()]));
    scripted.probes.push_back(displacing(&[3]));
    displaced(&mut scripted, &[3]);
    advance_clock(DISPLACED_END_TIMEOUT);
    assert!(scripted.handshake.on_others(false));
    assert_input(scripted.run());
    let refused = OptionReplyKind::ErrPolicy as u32;
    assert_eq!(scripted.replies(), [(PRIVATE_OPTION, refused)]);
    assert!(scripted.sent.ends_with(STILL_AT_WORK.as_bytes()) && !scripted.progress.is_source);
    assert_eq!(scripted.calls, ["probe"]);
}

#[test]
fn an_end_at_the_deadline_still_counts() {
    let mut scripted = Scripted::newstyle(&after_flags(&[private()]));
    scripted.probes.push_back(displacing(&[3]));
    displaced(&mut scripted, &[3]);
    advance_clock(DISPLACED_END_TIMEOUT);
    assert!(scripted.handshake.on_others(true));
    assert_input(scripted.run());
    assert_eq!(scripted.last_reply(), (PRIVATE_OPTION, 1));
}

#[test]
fn a_client_is_admitted_once_the_displaced_sessions_have_ended() {
    let mut scripted = Scripted::newstyle(&after_flags(&[go(), REQUEST.to_vec()]));
    scripted.gos.push_back(GoReply::Allow(vec![5]));
    displaced(&mut scripted, &[5]);
    assert_goes_on_waiting(&mut scripted);
    assert!(scripted.handshake.on_others(true));
    assert!(matches!(scripted.run(), Ok(HandshakeBlocked::Complete(_))));
    assert_eq!((&scripted.calls[..], scripted.handshake.rx.bytes()), (&["go"][..], &REQUEST[..]));
}

#[test]
fn the_policy_releases_a_client_whose_predecessor_stays() {
    let mut scripted = Scripted::newstyle(&after_flags(&[go()]));
    scripted.gos.push_back(GoReply::Allow(vec![5]));
    displaced(&mut scripted, &[5]);
    advance_clock(DISPLACED_END_TIMEOUT);
    assert!(scripted.handshake.on_others(false));
    assert_input(scripted.run());
    assert_eq!(scripted.calls, ["go", "release"]);
    assert_eq!(scripted.replies(), [(OptionKind::Go.number(), OptionReplyKind::ErrPolicy as u32)]);
    assert!(scripted.sent.ends_with(STILL_AT_WORK.as_bytes()));
}

#[test]
fn decisions_after_the_deadline_wait_for_no_session() {
    let options: Vec<_> = (0..3).map(|_| private()).chain([go(), go()]).collect();
    let mut scripted = Scripted::newstyle(&after_flags(&options));
    scripted.probes.push_back(refused_by(3));
    holder(&mut scripted, 3);
    advance_clock(HANDSHAKE_TIMEOUT);
    assert!(scripted.handshake.on_others(false));
    scripted.probes.extend([refused_by(3), displacing(&[3])]);
    displaced(&mut scripted, &[3]);
    assert!(scripted.handshake.on_others(false), "asked once");
    scripted.gos.extend([held(3), GoReply::Allow(vec![3])]);
    displaced(&mut scripted, &[3]);
    assert!(scripted.handshake.on_others(false));
    let end = scripted.run();
    assert!(matches!(end, Err(SessionEnd::HandshakeTimeout)), "{end:?}");
}

#[test]
fn a_strong_stop_request_counts_before_the_next_option() {
    for stop in STRONG.into_iter().filter(|stop| *stop >= StopRequest::NotAdmitted) {
        let mut scripted = Scripted::newstyle(&after_flags(&[private(), private()]));
        scripted.probes.extend([refused_by(3), refused_by(3)]);
        holder(&mut scripted, 3);
        advance_clock(HOLDER_END_TIMEOUT);
        assert!(scripted.handshake.on_others(false));
        scripted.stop = stop;
        let end = scripted.run();
        assert!(matches!(end, Err(SessionEnd::Requested(found)) if found == stop), "{end:?}");
        assert_eq!(scripted.calls, ["probe"]);
    }
}

#[test]
fn a_decision_outlasts_the_deadline_of_the_handshake() {
    let mut scripted = Scripted::newstyle(&after_flags(&[private(), go()]));
    advance_clock(HANDSHAKE_TIMEOUT - NANOSECOND);
    scripted.probes.push_back(displacing(&[3]));
    displaced(&mut scripted, &[3]);
    advance_clock(2 * NANOSECOND);
    assert!(scripted.handshake.on_others(true));
    // The options had arrived in time.
    assert!(matches!(scripted.run(), Ok(HandshakeBlocked::Complete(_))));
}

#[test]
fn a_client_is_admitted_once_the_holder_has_ended() {
    let mut scripted = Scripted::newstyle(&after_flags(&[go()]));
    scripted.gos.push_back(held(8));
    assert_eq!(holder(&mut scripted, 8), now() + HOLDER_END_TIMEOUT);
    assert_goes_on_waiting(&mut scripted);
    advance_clock(HOLDER_END_TIMEOUT - NANOSECOND);
    assert!(!scripted.handshake.on_others(false) && scripted.handshake.on_others(true));
    assert!(matches!(scripted.run(), Ok(HandshakeBlocked::Complete(_))));
    assert_eq!(scripted.calls, ["go", "go"], "asked again");
}

#[test]
fn a_client_is_refused_when_the_holder_stays() {
    let mut scripted = Scripted::newstyle(&after_flags(&[go()]));
    scripted.gos.push_back(held(8));
    holder(&mut scripted, 8);
    advance_clock(HOLDER_END_TIMEOUT);
    assert!(scripted.handshake.on_others(false));
    assert_input(scripted.run());
    assert_eq!(scripted.calls, ["go"]);
    assert!(scripted.sent.ends_with(b"held by 8"));
}

#[test]
fn a_decision_waits_for_one_holder_only() {
    let mut scripted = Scripted::newstyle(&after_flags(&[info(), go()]));
    scripted.gos.extend([held(8), held(9), held(10)]);
    holder(&mut scripted, 8);
    assert!(scripted.handshake.on_others(true));
    // The second refusal stands; the next option may wait again.
    holder(&mut scripted, 10);
    assert_eq!(scripted.calls, ["info", "info", "go"]);
    assert!(scripted.handshake.on_others(true));
    assert!(matches!(scripted.run(), Ok(HandshakeBlocked::Complete(_))));
    assert_eq!(
        scripted.replies()[0],
        (OptionKind::Info.number(), OptionReplyKind::ErrPolicy as u32)
    );
}

#[test]
fn a_probe_waits_for_a_holder_too() {
    for ends in [true, false] {
        let mut scripted = Scripted::newstyle(&after_flags(&[private()]));
        let reply = OptionReply::error(OptionReplyKind::ErrPolicy, "held");
        scripted.probes.push_back(ProbeReply::Refuse { reply, holder: Some(8) });
        holder(&mut scripted, 8);
        advance_clock(HOLDER_END_TIMEOUT);
        assert!(scripted.handshake.on_others(ends));
        assert_input(scripted.run());
        let kind = if ends { 1 } else { OptionReplyKind::ErrPolicy as u32 };
        assert_eq!(scripted.last_reply(), (PRIVATE_OPTION, kind));
        assert_eq!(scripted.calls.len(), if ends { 2 } else { 1 });
    }
}

#[test]
fn a_holder_may_be_followed_by_displaced_sessions() {
    let mut scripted = Scripted::newstyle(&after_flags(&[go()]));
    scripted.gos.extend([held(8), GoReply::Allow(vec![9])]);
    holder(&mut scripted, 8);
    assert!(scripted.handshake.on_others(true));
    displaced(&mut scripted, &[9]);
    assert!(scripted.handshake.on_others(true));
    assert!(matches!(scripted.run(), Ok(HandshakeBlocked::Complete(_))));
}

#[test]
fn suspension_follows_the_decision_that_it_met() {
    for ends in [true, false] {
        let mut scripted = Scripted::newstyle(&after_flags(&[private()]));
        scripted.probes.push_back(displacing(&[3]));
        displaced(&mut scripted, &[3]);
        scripted.stop = StopRequest::Suspend;
        displaced(&mut scripted, &[3]);
        advance_clock(DISPLACED_END_TIMEOUT);
        assert!(scripted.handshake.on_others(ends));
        let blocked = scripted.run();
        assert!(matches!(blocked, Ok(HandshakeBlocked::Suspend)), "{blocked:?}");
        let mut restored = scripted.restart();
        restored.receive(&go());
        let Ok(HandshakeBlocked::Complete(negotiated)) = restored.run() else { panic!() };
        assert_eq!(negotiated.private, ends);
        assert_eq!(restored.calls, ["probe", "go"]);
    }
}

#[test]
fn an_admitted_client_is_greeted_in_old_style() {
    for displaced_first in [false, true] {
        let mut scripted = Scripted::new(Style::Oldstyle);
        // The first request may arrive with the connection; the timeout is for options.
        scripted.receive(&REQUEST);
        advance_clock(HANDSHAKE_TIMEOUT);
        if displaced_first {
            scripted.gos.push_back(GoReply::Allow(vec![5]));
            displaced(&mut scripted, &[5]);
            assert_goes_on_waiting(&mut scripted);
            assert!(!scripted.handshake.tx.has_bytes(), "greeted before the decision");
            assert!(scripted.handshake.on_others(true));
        }
        scripted.stop = StopRequest::Suspend;
        assert_complete_before_request(&mut scripted);
        let greeting = scripted.sent;
        assert_eq!((greeting.len(), &greeting[..8]), (OLDSTYLE_GREETING, &b"NBDMAGIC"[..]));
    }
}

#[test]
fn a_refused_client_is_not_greeted_in_old_style() {
    let mut refused = Scripted::new(Style::Oldstyle);
    refused.gos.push_back(GoReply::Refuse { why: "no".to_owned(), holder: None });
    let end = refused.run();
    assert!(matches!(end, Err(SessionEnd::Refused(ref why)) if why == "no"), "{end:?}");
    let mut late = Scripted::new(Style::Oldstyle);
    late.gos.push_back(GoReply::Allow(vec![5]));
    displaced(&mut late, &[5]);
    advance_clock(DISPLACED_END_TIMEOUT);
    assert!(late.handshake.on_others(false));
    let end = late.run();
    assert!(matches!(end, Err(SessionEnd::Refused(ref why)) if why == STILL_AT_WORK), "{end:?}");
    assert_eq!(late.calls, ["go", "release"]);
    assert!(refused.sent.is_empty() && late.sent.is_empty());
}
