//! Tests of `sessions.rs`.

use super::super::events::IgnoreEvents;
use super::super::handshake_slots::FIRST_OPTION_TIMEOUT;
use super::*;
use crate::net::wait_readable;
use std::os::fd::AsFd;

fn capacity(sessions: usize, handshakes: usize) -> Capacity {
    let handshake_timeout = Duration::from_secs(1);
    Capacity {
        clients: ClientLimits::of(sessions),
        waits_when_full: false,
        handshakes,
        handshake_timeout,
    }
}

fn sessions(sessions: usize, handshakes: usize, entries: &[&str]) -> Arc<Sessions> {
    let acl = Acl::parse(entries, false).unwrap();
    Sessions::new(capacity(sessions, handshakes), acl, Arc::new(IgnoreEvents)).unwrap()
}

fn peer(address: &str) -> Peer {
    Peer::Tcp((address.parse::<std::net::IpAddr>().unwrap(), 4711).into())
}

#[test]
fn clients_are_admitted_up_to_the_limit() {
    let sessions = sessions(2, 16, &[]);
    let now = Instant::now();
    let first = sessions.admit(peer("192.0.2.1"), now).unwrap();
    let second = sessions.admit(peer("192.0.2.1"), now).unwrap();
    assert!(first.establish().is_ok() && second.establish().is_ok());
    assert_eq!(sessions.admit(peer("192.0.2.1"), now).unwrap_err(), AdmissionError::Full(2));
    let beyond = sessions.admit(peer("192.0.2.2"), now).unwrap();
    assert!(
        beyond.establish().is_err() && beyond.establish_refusal().is_some(),
        "it may only probe"
    );
    beyond.mark_source();
    assert!(
        beyond.establish_refusal().is_none() && beyond.establish().is_ok(),
        "a source is admitted at the limit"
    );
    drop(beyond);
    drop(first);
    let third = sessions.admit(peer("192.0.2.1"), now).unwrap();
    assert_eq!((sessions.count(), third.id), (2, 4));
    assert!(third.establish().is_ok());
    sessions.set_admission(Acl::default(), ClientLimits::of(3));
    assert!(sessions.admit(peer("192.0.2.1"), now).is_ok());
    sessions.set_admission(Acl::default(), ClientLimits::of(1));
    assert_eq!(sessions.admit(peer("192.0.2.1"), now).unwrap_err(), AdmissionError::Full(1));
}

#[test]
fn clients_of_one_address_are_admitted_up_to_their_limit() {
    let sessions = sessions(9, 16, &[]);
    sessions.set_admission(Acl::default(), ClientLimits { clients: 9, per_address: 2 });
    let admit = |address| sessions.admit(peer(address), Instant::now()).unwrap();
    let first = admit("2001:db8::1");
    let second = admit("2001:db8::2");
    assert!(first.establish().is_ok() && second.establish().is_ok());
    let third = admit("2001:db8::3");
    assert_eq!(third.kept_out(), None);
    let limit = LimitReached::PerAddress;
    assert_eq!(third.establish_refusal().as_deref(), Some(limit.to_string().as_str()));
    assert_eq!((third.establish(), third.kept_out()), (Err(limit), Some(limit)));
    let elsewhere = admit("2001:db8:0:1::1");
    assert!(elsewhere.establish().is_ok() && elsewhere.kept_out().is_none());
    let source = admit("2001:db8::4");
    source.mark_source();
    assert!(source.establish_refusal().is_none() && source.establish().is_ok());
    drop((first, source));
    assert_eq!((third.establish(), third.kept_out()), (Ok(()), None));
    let local = |_| sessions.admit(Peer::Unix { pid: None, uid: Some(0) }, Instant::now()).unwrap();
    let local = [(); 3].map(local);
    assert!(local.iter().all(|client| client.establish().is_ok()), "a socket has no address");
}

#[test]
fn clients_beyond_the_limit_wait_if_told_to() {
    let capacity = Capacity { waits_when_full: true, ..capacity(2, 16) };
    let sessions = Sessions::new(capacity, Acl::default(), Arc::new(IgnoreEvents)).unwrap();
    let now = Instant::now();
    let first = sessions.admit(peer("192.0.2.1"), now).unwrap();
    assert!(first.establish().is_ok());
    assert_eq!(sessions.accept_readiness(now), AcceptReadiness::Ready);
    let _in_handshake = sessions.admit(peer("192.0.2.2"), now).unwrap();
    assert_eq!(sessions.accept_readiness(now), AcceptReadiness::NotReady);
    sessions.set_admission(Acl::default(), ClientLimits::of(3));
    assert_eq!(sessions.accept_readiness(now), AcceptReadiness::Ready);
    sessions.set_admission(Acl::default(), ClientLimits::of(2));
    drop(first);
    assert_eq!(sessions.accept_readiness(now), AcceptReadiness::Ready);
}

#[test]
fn accepting_pauses_until_a_handshake_can_be_evicted() {
    let sessions = sessions(9, 2, &[]);
    let now = Instant::now();
    let first = sessions.admit(peer("192.0.2.1"), now).unwrap();
    assert_eq!(sessions.accept_readiness(now), AcceptReadiness::Ready);
    let second = sessions.admit(peer("192.0.2.1"), now + Duration::from_millis(5)).unwrap();
    let until = now + FIRST_OPTION_TIMEOUT;
    assert_eq!(sessions.accept_readiness(now), AcceptReadiness::ReadyAt(until));
    assert_eq!(sessions.accept_readiness(until), AcceptReadiness::Ready);
    assert_eq!(first.control.current(), StopRequest::Serve);
    second.option_received(now);
    let _third = sessions.admit(peer("192.0.2.1"), until).unwrap();
    assert_eq!(
        (first.control.current(), second.control.current()),
        (StopRequest::Evict, StopRequest::Serve)
    );
    assert_eq!(
        sessions.accept_readiness(until),
        AcceptReadiness::ReadyAt(until + FIRST_OPTION_TIMEOUT)
    );
    assert!(second.establish().is_ok());
    assert_eq!(sessions.accept_readiness(until), AcceptReadiness::Ready);
}

#[test]
fn accepting_pauses_behind_many_evicted_connections() {
    let sessions = sessions(9, 1, &[]);
    let mut now = Instant::now();
    let mut registrations = Vec::new();
    for _ in 0..=EVICTED_MAX {
        assert_eq!(sessions.accept_readiness(now), AcceptReadiness::Ready);
        registrations.push(sessions.admit(peer("192.0.2.1"), now).unwrap());
        now += FIRST_OPTION_TIMEOUT;
    }
    assert_eq!(sessions.accept_readiness(now), AcceptReadiness::NotReady);
    registrations.remove(0);
    assert_eq!(sessions.accept_readiness(now), AcceptReadiness::Ready);
}

#[test]
fn only_sources_leave_the_handshake_beyond_the_limit() {
    let sessions = sessions(1, 9, &[]);
    let [first, second, source] =
        [(); 3].map(|()| sessions.admit(peer("192.0.2.1"), Instant::now()).unwrap());
    assert_eq!(second.establish_refusal(), None);
    assert!(first.establish().is_ok() && first.is_established());
    assert!(
        second.establish_refusal().is_some()
            && second.establish().is_err()
            && !second.is_established()
    );
    source.mark_source();
    assert!(source.establish_refusal().is_none() && source.establish().is_ok());
    drop((first, source));
    assert!(second.establish().is_ok());
}

#[test]
fn evict_one_picks_a_silent_connection() {
    let sessions = sessions(9, 9, &[]);
    let now = Instant::now();
    let silent = sessions.admit(peer("192.0.2.1"), now).unwrap();
    let active = sessions.admit(peer("192.0.2.1"), now).unwrap();
    active.option_received(now);
    assert!(sessions.evict_one(now));
    assert_eq!(silent.control.current(), StopRequest::Evict);
    assert!(!sessions.evict_one(now), "the other one is active");
}

#[test]
fn a_new_acl_disconnects_and_a_malformed_one_changes_nothing() {
    let sessions = sessions(9, 9, &[]);
    let now = Instant::now();
    let stays = sessions.admit(peer("192.0.2.1"), now).unwrap();
    let goes = sessions.admit(peer("192.0.2.2"), now).unwrap();
    let unix = sessions.admit(Peer::Unix { pid: None, uid: None }, now).unwrap();
    assert!(sessions.set_acl(&["192.0.2.1", "nonsense"]).is_err());
    assert_eq!(goes.control.current(), StopRequest::Serve);
    sessions.set_acl(&["192.0.2.1"]).unwrap();
    assert_eq!(goes.control.current(), StopRequest::NotAdmitted);
    assert_eq!(
        (stays.control.current(), unix.control.current()),
        (StopRequest::Serve, StopRequest::Serve)
    );
    assert_eq!(sessions.admit(peer("192.0.2.2"), now).unwrap_err(), AdmissionError::Acl);
}

#[test]
fn accepting_stops_only_without_clients_and_pending_accepts() {
    let sessions = sessions(9, 9, &[]);
    let registration = sessions.admit(peer("192.0.2.1"), Instant::now()).unwrap();
    assert!(!sessions.close_if_empty(), "a client is registered");
    drop(registration);
    let accepting = sessions.begin_accept().unwrap();
    assert!(!sessions.close_if_empty(), "a connection is being accepted");
    let registration = sessions.admit(peer("192.0.2.1"), Instant::now()).unwrap();
    drop(accepting);
    assert!(!sessions.close_if_empty() && !sessions.is_closed());
    drop(registration);
    assert!(sessions.close_if_empty() && sessions.is_closed());
    assert!(sessions.begin_accept().is_none());
}

#[test]
fn clients_are_turned_away_while_the_sessions_go_on() {
    let (sessions, now) = (sessions(2, 2, &[]), Instant::now());
    let first = sessions.admit(peer("192.0.2.1"), now).unwrap();
    let second = sessions.admit(peer("192.0.2.2"), now).unwrap();
    assert!(first.establish().is_ok() && sessions.is_accepting());
    sessions.turn_away("the disk has moved");
    assert!(!sessions.is_accepting());
    let refused = sessions.admit(peer("192.0.2.3"), now).unwrap_err();
    assert_eq!(refused.to_string(), "the disk has moved");
    assert_eq!(second.establish_refusal().as_deref(), Some("the disk has moved"));
    assert_eq!(first.control.current(), StopRequest::Serve);
    assert!(sessions.restore(9, peer("192.0.2.4"), None).is_ok(), "of the last process");
}

#[test]
fn a_stopping_table_admits_no_client_and_waits_for_the_last() {
    let sessions = sessions(9, 9, &[]);
    let registration = sessions.admit(peer("192.0.2.1"), Instant::now()).unwrap();
    sessions.stop();
    assert_eq!(registration.control.current(), StopRequest::Finish);
    assert_eq!(
        sessions.admit(peer("192.0.2.1"), Instant::now()).unwrap_err(),
        AdmissionError::Stopping
    );
    assert!(!sessions.wait_until_empty(Instant::now()));
    sessions.disconnect_all();
    assert_eq!(registration.control.current(), StopRequest::Disconnect);
    let leaving = std::thread::spawn(move || drop(registration));
    assert!(sessions.wait_until_empty(Instant::now() + Duration::from_secs(10)));
    leaving.join().unwrap();
}

fn is_woken(registration: &Registration) -> bool {
    let wake = &registration.control.wake;
    let woken = wait_readable(&[wake.as_fd()], Some(Instant::now())).unwrap()[0];
    wake.clear();
    woken
}

#[test]
fn a_session_is_woken_when_the_session_that_it_waits_for_ends() {
    let sessions = sessions(9, 9, &[]);
    let [displaced, holder, waiting, other] =
        [(); 4].map(|()| sessions.admit(peer("192.0.2.1"), Instant::now()).unwrap());
    let displaced_id = displaced.id;
    assert!(!waiting.disconnect_others(&[displaced_id]));
    assert_eq!(displaced.control.current(), StopRequest::Displaced);
    assert!(!is_woken(&waiting));
    drop(displaced);
    assert!(is_woken(&waiting) && waiting.disconnect_others(&[displaced_id]));
    let holder_id = holder.id;
    assert!(!waiting.has_ended(holder_id));
    assert_eq!(holder.control.current(), StopRequest::Serve, "it may go on");
    drop(holder);
    assert!(is_woken(&waiting) && waiting.has_ended(holder_id));
    drop(other);
    assert!(!is_woken(&waiting), "it waits no longer");
}
