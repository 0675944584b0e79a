//! Tests of sessions with requests in flight that end, are suspended or wait at the closed gate.

use super::*;

#[test]
fn a_stopping_server_answers_requests_in_flight() {
    let mut fixture = fixture();
    let mut client = fixture.client();
    client.write(FUA, 0, &[1; 4096], 1);
    fixture.slow.wait_for(1);
    thread::scope(|scope| {
        let (slow, image) = (&fixture.slow, &fixture.image);
        let server = &mut fixture.server;
        let shutdown = server.shutdown_handle();
        let stopping = scope.spawn(move || server.stop(TIMEOUT));
        while !shutdown.0.is_closed() {
            thread::yield_now();
        }
        slow.complete(0, image);
        stopping.join().unwrap();
    });
    assert_eq!(client.reply(), (1, 0));
    assert!(client.is_closed());
}

#[test]
fn a_slow_disk_gets_a_longer_grace_than_clients() {
    for suspends in [false, true] {
        let mut fixture = fixture();
        let (mut client, mut silent) = (fixture.client(), fixture.client());
        client.flush(1);
        fixture.slow.wait_for(1);
        // This client receives no replies, so that its session is disconnected.
        silent.read(0, 12 * MIB, 2);
        fixture.wait_for_clients(2);
        let grace = Grace { clients: Duration::from_millis(10), disk: TIMEOUT };
        let stored = thread::scope(|scope| {
            let (slow, image) = (&fixture.slow, &fixture.image);
            let shutdown = fixture.server.shutdown_handle();
            let server = &mut fixture.server;
            let stopping = scope.spawn(move || {
                if suspends {
                    server.suspend(9, grace)
                } else {
                    (server.stop(grace), StoredSessions::default()).1
                }
            });
            wait_until("the silent client stays", || shutdown.0.count() <= 1);
            slow.complete(0, image);
            stopping.join().unwrap()
        });
        let _next = open(&fixture.disk, &fixture.recorder, SessionSettings::default(), stored);
        assert_eq!(client.reply(), (1, 0), "suspends: {suspends}");
    }
}

#[test]
fn the_grace_for_the_disk_is_bounded() {
    let mut fixture = fixture();
    let mut client = fixture.client();
    client.flush(1);
    fixture.slow.wait_for(1);
    let soon = Duration::from_millis(10);
    fixture.server.stop(Grace { clients: soon, disk: 2 * soon });
    assert_eq!(fixture.server.client_count(), 1, "the session is abandoned");
    fixture.complete_all();
    assert!(client.is_closed());
}

#[test]
fn a_session_ends_only_without_io_in_flight() {
    let fixture = fixture();
    let dirty = fixture.disk.track().unwrap();
    let mut client = fixture.client();
    client.write(FUA, 0, &[1; 4096], 1);
    client.ask(CommandKind::WriteZeroes, FUA, MIB, 4096, 2);
    fixture.slow.wait_for(2);
    fixture.server.set_acl(&["192.0.2.1"]).unwrap();
    // The session must not end yet.
    let_others_run();
    assert_eq!((fixture.server.client_count(), fixture.recorder.calls().len()), (1, 0));
    fixture.complete(1);
    fixture.complete(0);
    fixture.wait_for_clients(0);
    assert_eq!(fixture.recorder.calls(), ["on_session_end"]);
    assert_eq!(dirty.count(), 2);
    assert_eq!(fixture.slow.count(), 0);
}

#[test]
fn a_session_is_suspended_without_io_in_flight_and_restored() {
    let mut fixture = fixture();
    let mut client = fixture.client();
    fixture.slow.evict_all();
    client.write(FUA, 0, &[1; 4096], 1);
    client.read(MIB, 4096, 2);
    fixture.slow.wait_for(2);
    let stored = thread::scope(|scope| {
        let (slow, image) = (&fixture.slow, &fixture.image);
        let server = &mut fixture.server;
        let shutdown = server.shutdown_handle();
        let suspending = scope.spawn(move || server.suspend(9, TIMEOUT));
        while !shutdown.0.is_closed() {
            thread::yield_now();
        }
        client.read(0, 4096, 3);
        let_others_run();
        assert!(!suspending.is_finished());
        slow.complete_all(image);
        suspending.join().unwrap()
    });
    assert_eq!(stored.streams.len(), 1);
    let next = open(&fixture.disk, &fixture.recorder, SessionSettings::default(), stored);
    let mut answered = std::collections::BTreeSet::new();
    for _ in 0..3 {
        let (cookie, error) = client.reply();
        assert!(error == 0 && answered.insert(cookie));
        if cookie != 1 {
            client.data(4096);
        }
    }
    drop(next);
}

#[test]
fn a_session_at_a_closed_gate_is_suspended() {
    let mut fixture = fixture();
    let mut client = fixture.client();
    client.assert_read_is_answered_first();
    fixture.disk.gate().close_and_drain(Instant::now() + TIMEOUT).unwrap();
    client.write(PLAIN, 0, &[1; 4096], 1);
    client.read(0, 512, 2);
    let stored = fixture.server.suspend(9, TIMEOUT);
    assert_eq!(stored.streams.len(), 1);
    fixture.disk.gate().reopen();
    let _next = open(&fixture.disk, &fixture.recorder, SessionSettings::default(), stored);
    let first = client.reply();
    if first.0 == 2 {
        client.data(512);
        assert_eq!(client.reply(), (1, 0));
    } else {
        assert_eq!((first, client.reply()), ((1, 0), (2, 0)));
    }
}

#[test]
fn a_session_at_a_closed_gate_continues_when_it_opens() {
    let fixture = fixture();
    let mut client = fixture.client();
    client.assert_read_is_answered_first();
    fixture.disk.gate().close_and_drain(Instant::now() + TIMEOUT).unwrap();
    client.write(PLAIN, 0, &[1; 4096], 1);
    client.0.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    assert!(client.0.peek(&mut [0]).is_err());
    client.0.set_read_timeout(Some(TIMEOUT)).unwrap();
    fixture.disk.gate().reopen();
    assert_eq!(client.reply(), (1, 0));
    fixture.disk.gate().close_and_drain(Instant::now() + TIMEOUT).unwrap();
    client.write(PLAIN, 0, &[1; 4096], 2);
    fixture.disk.gate().retire();
    assert!(client.is_closed());
}
