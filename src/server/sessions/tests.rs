//! What `roster.rs` promises.

use super::super::events::IgnoreEvents;
use super::super::slots::FIRST_OPTION;
use super::*;

fn sessions(sessions: usize, handshakes: usize, entries: &[&str]) -> Arc<Sessions> {
    let capacity = Capacity { sessions, handshakes, patience: Duration::from_secs(1) };
    Sessions::new(capacity, Acl::parse(entries, false).unwrap(), Arc::new(IgnoreEvents)).unwrap()
}

fn peer(address: &str) -> Peer {
    Peer::Tcp(format!("{address}:4711").parse().unwrap())
}

#[test]
fn there_is_room_for_as_many_as_the_limit_and_not_one_more() {
    let sessions = sessions(2, 16, &[]);
    let now = Instant::now();
    let first = sessions.admit(peer("192.0.2.1"), now).unwrap();
    let second = sessions.admit(peer("192.0.2.1"), now).unwrap();
    assert!(first.greeted() && second.greeted());
    assert_eq!(sessions.admit(peer("192.0.2.1"), now).unwrap_err(), AdmissionError::Full(2));
    let beyond = sessions.admit(peer("192.0.2.2"), now).unwrap();
    assert!(!beyond.greeted() && beyond.closed().is_some(), "it may only introduce itself");
    beyond.introduced();
    assert!(beyond.closed().is_none() && beyond.greeted(), "a source is let into a full house");
    drop(beyond);
    drop(first);
    let third = sessions.admit(peer("192.0.2.1"), now).unwrap();
    assert_eq!((sessions.count(), third.id), (2, 4));
    assert!(third.greeted());
    sessions.readmit(Acl::default(), 3);
    assert!(sessions.admit(peer("192.0.2.1"), now).is_ok());
    sessions.readmit(Acl::default(), 1);
    assert_eq!(sessions.admit(peer("192.0.2.1"), now).unwrap_err(), AdmissionError::Full(1));
}

#[test]
fn as_many_handshakes_as_the_limit_keep_others_waiting_until_one_gives_way() {
    let sessions = sessions(9, 2, &[]);
    let now = Instant::now();
    let first = sessions.admit(peer("192.0.2.1"), now).unwrap();
    assert_eq!(sessions.entrance(now), AcceptReadiness::Open);
    let second = sessions.admit(peer("192.0.2.1"), now + Duration::from_millis(5)).unwrap();
    let until = now + FIRST_OPTION;
    assert_eq!(sessions.entrance(now), AcceptReadiness::OpensAt(until));
    assert_eq!(sessions.entrance(until), AcceptReadiness::Open);
    assert_eq!(first.orders.current(), StopRequest::Serve);
    second.spoke(now);
    let _third = sessions.admit(peer("192.0.2.1"), until).unwrap();
    assert_eq!(
        (first.orders.current(), second.orders.current()),
        (StopRequest::GiveWay, StopRequest::Serve)
    );
    assert_eq!(sessions.entrance(until), AcceptReadiness::OpensAt(until + FIRST_OPTION));
    assert!(second.greeted());
    assert_eq!(sessions.entrance(until), AcceptReadiness::Open);
}

#[test]
fn no_more_than_a_few_are_about_to_leave() {
    let sessions = sessions(9, 1, &[]);
    let mut now = Instant::now();
    let mut seats = Vec::new();
    for _ in 0..=LEAVING_MAX {
        assert_eq!(sessions.entrance(now), AcceptReadiness::Open);
        seats.push(sessions.admit(peer("192.0.2.1"), now).unwrap());
        now += FIRST_OPTION;
    }
    assert_eq!(sessions.entrance(now), AcceptReadiness::Shut);
    seats.remove(0);
    assert_eq!(sessions.entrance(now), AcceptReadiness::Open);
}

#[test]
fn clients_beyond_the_limit_stay_in_the_handshake_but_a_source_does_not() {
    let sessions = sessions(1, 9, &[]);
    let [first, second, source] =
        [(); 3].map(|()| sessions.admit(peer("192.0.2.1"), Instant::now()).unwrap());
    assert_eq!(second.closed(), None);
    assert!(first.greeted() && first.is_seated());
    assert!(second.closed().is_some() && !second.greeted() && !second.is_seated());
    source.introduced();
    assert!(source.closed().is_none() && source.greeted());
    drop((first, source));
    assert!(second.greeted());
}

#[test]
fn silent_connections_give_way_when_something_else_is_scarce() {
    let sessions = sessions(9, 9, &[]);
    let now = Instant::now();
    let silent = sessions.admit(peer("192.0.2.1"), now).unwrap();
    let speaks = sessions.admit(peer("192.0.2.1"), now).unwrap();
    speaks.spoke(now);
    assert!(sessions.free_something(now));
    assert_eq!(silent.orders.current(), StopRequest::GiveWay);
    assert!(!sessions.free_something(now), "the other one speaks");
}

#[test]
fn a_new_list_ends_the_sessions_it_does_not_admit_and_a_bad_one_changes_nothing() {
    let sessions = sessions(9, 9, &[]);
    let now = Instant::now();
    let stays = sessions.admit(peer("192.0.2.1"), now).unwrap();
    let goes = sessions.admit(peer("192.0.2.2"), now).unwrap();
    let unix = sessions.admit(Peer::Unix { pid: None, uid: None }, now).unwrap();
    assert!(sessions.set_acl(&["192.0.2.1", "nonsense"]).is_err());
    assert_eq!(goes.orders.current(), StopRequest::Serve);
    sessions.set_acl(&["192.0.2.1"]).unwrap();
    assert_eq!(goes.orders.current(), StopRequest::NotAdmitted);
    assert_eq!(
        (stays.orders.current(), unix.orders.current()),
        (StopRequest::Serve, StopRequest::Serve)
    );
    assert_eq!(sessions.admit(peer("192.0.2.2"), now).unwrap_err(), AdmissionError::Acl);
}

#[test]
fn only_an_empty_house_that_nobody_enters_is_closed() {
    let sessions = sessions(9, 9, &[]);
    let registration = sessions.admit(peer("192.0.2.1"), Instant::now()).unwrap();
    assert!(!sessions.close_if_empty(), "somebody is here");
    drop(registration);
    let arriving = sessions.expect().unwrap();
    assert!(!sessions.close_if_empty(), "somebody is coming in");
    let registration = sessions.admit(peer("192.0.2.1"), Instant::now()).unwrap();
    drop(arriving);
    assert!(!sessions.close_if_empty() && !sessions.is_closed());
    drop(registration);
    assert!(sessions.close_if_empty() && sessions.is_closed());
    assert!(sessions.expect().is_none());
}

#[test]
fn stopping_takes_nobody_in_and_waits_for_the_last() {
    let sessions = sessions(9, 9, &[]);
    let registration = sessions.admit(peer("192.0.2.1"), Instant::now()).unwrap();
    sessions.stop();
    assert_eq!(registration.orders.current(), StopRequest::Finish);
    assert_eq!(
        sessions.admit(peer("192.0.2.1"), Instant::now()).unwrap_err(),
        AdmissionError::Stopping
    );
    assert!(!sessions.wait_until_empty(Instant::now()));
    sessions.clear();
    assert_eq!(registration.orders.current(), StopRequest::Leave);
    let leaving = std::thread::spawn(move || drop(registration));
    assert!(sessions.wait_until_empty(Instant::now() + Duration::from_secs(10)));
    leaving.join().unwrap();
}
