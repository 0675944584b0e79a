//! What `roster.rs` promises.

use super::super::places::FIRST_OPTION;
use super::super::watch::Nobody;
use super::*;

fn roster(sessions: usize, handshakes: usize, entries: &[&str]) -> Arc<Roster> {
    let capacity = Capacity { sessions, handshakes, patience: Duration::from_secs(1) };
    Roster::new(capacity, Acl::parse(entries, false).unwrap(), Arc::new(Nobody)).unwrap()
}

fn peer(address: &str) -> Peer {
    Peer::Tcp(format!("{address}:4711").parse().unwrap())
}

#[test]
fn there_is_room_for_as_many_as_the_limit_and_not_one_more() {
    let roster = roster(2, 16, &[]);
    let now = Instant::now();
    let first = roster.admit(peer("192.0.2.1"), now).unwrap();
    let second = roster.admit(peer("192.0.2.1"), now).unwrap();
    assert!(first.greeted() && second.greeted());
    assert_eq!(roster.admit(peer("192.0.2.1"), now).unwrap_err(), Refused::Full(2));
    let beyond = roster.admit(peer("192.0.2.2"), now).unwrap();
    assert!(!beyond.greeted() && beyond.closed().is_some(), "it may only introduce itself");
    beyond.introduced();
    assert!(beyond.closed().is_none() && beyond.greeted(), "a source is let into a full house");
    drop(beyond);
    drop(first);
    let third = roster.admit(peer("192.0.2.1"), now).unwrap();
    assert_eq!((roster.count(), third.id), (2, 4));
    assert!(third.greeted());
    roster.readmit(Acl::default(), 3);
    assert!(roster.admit(peer("192.0.2.1"), now).is_ok());
    roster.readmit(Acl::default(), 1);
    assert_eq!(roster.admit(peer("192.0.2.1"), now).unwrap_err(), Refused::Full(1));
}

#[test]
fn as_many_handshakes_as_the_limit_keep_others_waiting_until_one_gives_way() {
    let roster = roster(9, 2, &[]);
    let now = Instant::now();
    let first = roster.admit(peer("192.0.2.1"), now).unwrap();
    assert_eq!(roster.entrance(now), Intake::Open);
    let second = roster.admit(peer("192.0.2.1"), now + Duration::from_millis(5)).unwrap();
    let until = now + FIRST_OPTION;
    assert_eq!(roster.entrance(now), Intake::OpensAt(until));
    assert_eq!(roster.entrance(until), Intake::Open);
    assert_eq!(first.orders.current(), Order::Serve);
    second.spoke(now);
    let _third = roster.admit(peer("192.0.2.1"), until).unwrap();
    assert_eq!((first.orders.current(), second.orders.current()), (Order::GiveWay, Order::Serve));
    assert_eq!(roster.entrance(until), Intake::OpensAt(until + FIRST_OPTION));
    assert!(second.greeted());
    assert_eq!(roster.entrance(until), Intake::Open);
}

#[test]
fn no_more_than_a_few_are_about_to_leave() {
    let roster = roster(9, 1, &[]);
    let mut now = Instant::now();
    let mut seats = Vec::new();
    for _ in 0..=LEAVING_MAX {
        assert_eq!(roster.entrance(now), Intake::Open);
        seats.push(roster.admit(peer("192.0.2.1"), now).unwrap());
        now += FIRST_OPTION;
    }
    assert_eq!(roster.entrance(now), Intake::Shut);
    seats.remove(0);
    assert_eq!(roster.entrance(now), Intake::Open);
}

#[test]
fn clients_beyond_the_limit_stay_in_the_handshake_but_a_source_does_not() {
    let roster = roster(1, 9, &[]);
    let [first, second, source] =
        [(); 3].map(|()| roster.admit(peer("192.0.2.1"), Instant::now()).unwrap());
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
    let roster = roster(9, 9, &[]);
    let now = Instant::now();
    let silent = roster.admit(peer("192.0.2.1"), now).unwrap();
    let speaks = roster.admit(peer("192.0.2.1"), now).unwrap();
    speaks.spoke(now);
    assert!(roster.free_something(now));
    assert_eq!(silent.orders.current(), Order::GiveWay);
    assert!(!roster.free_something(now), "the other one speaks");
}

#[test]
fn a_new_list_ends_the_sessions_it_does_not_admit_and_a_bad_one_changes_nothing() {
    let roster = roster(9, 9, &[]);
    let now = Instant::now();
    let stays = roster.admit(peer("192.0.2.1"), now).unwrap();
    let goes = roster.admit(peer("192.0.2.2"), now).unwrap();
    let unix = roster.admit(Peer::Unix { pid: None, uid: None }, now).unwrap();
    assert!(roster.set_acl(&["192.0.2.1", "nonsense"]).is_err());
    assert_eq!(goes.orders.current(), Order::Serve);
    roster.set_acl(&["192.0.2.1"]).unwrap();
    assert_eq!(goes.orders.current(), Order::NotAdmitted);
    assert_eq!((stays.orders.current(), unix.orders.current()), (Order::Serve, Order::Serve));
    assert_eq!(roster.admit(peer("192.0.2.2"), now).unwrap_err(), Refused::Acl);
}

#[test]
fn only_an_empty_house_that_nobody_enters_is_closed() {
    let roster = roster(9, 9, &[]);
    let seat = roster.admit(peer("192.0.2.1"), Instant::now()).unwrap();
    assert!(!roster.close_if_empty(), "somebody is here");
    drop(seat);
    let arriving = roster.expect().unwrap();
    assert!(!roster.close_if_empty(), "somebody is coming in");
    let seat = roster.admit(peer("192.0.2.1"), Instant::now()).unwrap();
    drop(arriving);
    assert!(!roster.close_if_empty() && !roster.is_closed());
    drop(seat);
    assert!(roster.close_if_empty() && roster.is_closed());
    assert!(roster.expect().is_none());
}

#[test]
fn stopping_takes_nobody_in_and_waits_for_the_last() {
    let roster = roster(9, 9, &[]);
    let seat = roster.admit(peer("192.0.2.1"), Instant::now()).unwrap();
    roster.stop();
    assert_eq!(seat.orders.current(), Order::Finish);
    assert_eq!(roster.admit(peer("192.0.2.1"), Instant::now()).unwrap_err(), Refused::Stopping);
    assert!(!roster.wait_until_empty(Instant::now()));
    roster.clear();
    assert_eq!(seat.orders.current(), Order::Leave);
    let leaving = std::thread::spawn(move || drop(seat));
    assert!(roster.wait_until_empty(Instant::now() + Duration::from_secs(10)));
    leaving.join().unwrap();
}
