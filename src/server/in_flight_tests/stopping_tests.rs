//! Sessions that end, are packed up or wait at the closed gate, on a disk as slow as the test wants.

use super::*;

#[test]
fn a_stopping_server_answers_what_is_under_way() {
    let mut fixture = plain();
    let mut client = fixture.client();
    client.write(FUA, 0, &[1; 4096], 1);
    fixture.slow.wait_for(1);
    thread::scope(|scope| {
        let (slow, image) = (&fixture.slow, &fixture.image);
        let server = &mut fixture.server;
        let exit = server.shutdown_handle();
        let stopping = scope.spawn(move || server.stop(PATIENCE));
        while !exit.0.is_closed() {
            thread::yield_now();
        }
        slow.complete(0, image);
        stopping.join().unwrap();
    });
    assert_eq!(client.head(), (1, 0));
    assert!(client.is_closed());
}

#[test]
fn a_reply_that_takes_the_disk_longer_than_the_grace_is_sent() {
    for packs in [false, true] {
        let mut fixture = plain();
        let (mut client, mut silent) = (fixture.client(), fixture.client());
        client.flush(1);
        fixture.slow.wait_for(1);
        // This one takes no replies, and is not waited for any longer.
        silent.read(0, 12 * MIB, 2);
        fixture.wait_for_clients(2);
        let grace = Grace { clients: Duration::from_millis(10), disk: PATIENCE };
        let stored = thread::scope(|scope| {
            let (slow, image) = (&fixture.slow, &fixture.image);
            let sessions = fixture.server.shutdown_handle();
            let server = &mut fixture.server;
            let stopping = scope.spawn(move || {
                if packs {
                    server.suspend(9, grace)
                } else {
                    (server.stop(grace), StoredSessions::default()).1
                }
            });
            let deadline = Instant::now() + PATIENCE;
            while sessions.0.count() > 1 {
                assert!(Instant::now() < deadline, "the silent client stays");
                thread::yield_now();
            }
            slow.complete(0, image);
            stopping.join().unwrap()
        });
        let _next = open(&fixture.disk, &fixture.recorder, SessionSettings::default(), stored);
        assert_eq!(client.head(), (1, 0), "{packs}");
    }
}

#[test]
fn the_grace_for_the_disk_is_bounded() {
    let mut fixture = plain();
    let mut client = fixture.client();
    client.flush(1);
    fixture.slow.wait_for(1);
    let soon = Duration::from_millis(10);
    fixture.server.stop(Grace { clients: soon, disk: 2 * soon });
    assert_eq!(fixture.server.client_count(), 1, "it is left to itself");
    fixture.hurry();
    assert!(client.is_closed());
}

#[test]
fn a_session_that_has_to_end_is_over_when_nothing_of_it_is_under_way() {
    let fixture = plain();
    let dirty = fixture.disk.track().unwrap();
    let mut client = fixture.client();
    client.write(FUA, 0, &[1; 4096], 1);
    client.ask(CommandKind::WriteZeroes, FUA, MIB, 4096, 2);
    fixture.slow.wait_for(2);
    fixture.server.set_acl(&["192.0.2.1"]).unwrap();
    // Whatever it does now, it has not closed.
    (0..1000).for_each(|_| thread::yield_now());
    assert_eq!((fixture.server.client_count(), fixture.recorder.calls().len()), (1, 0));
    fixture.finish(1);
    fixture.finish(0);
    fixture.wait_for_clients(0);
    assert_eq!(fixture.recorder.calls(), ["on_session_end"]);
    assert_eq!(dirty.count(), 2);
    assert_eq!(fixture.slow.count(), 0);
}

#[test]
fn a_session_is_packed_up_when_nothing_is_under_way_and_goes_on_with_the_rest() {
    let mut fixture = plain();
    let mut client = fixture.client();
    fixture.slow.evict_all();
    client.write(FUA, 0, &[1; 4096], 1);
    client.read(MIB, 4096, 2);
    fixture.slow.wait_for(2);
    let stored = thread::scope(|scope| {
        let (slow, image) = (&fixture.slow, &fixture.image);
        let server = &mut fixture.server;
        let exit = server.shutdown_handle();
        let packing = scope.spawn(move || server.suspend(9, PATIENCE));
        while !exit.0.is_closed() {
            thread::yield_now();
        }
        client.read(0, 4096, 3);
        (0..1000).for_each(|_| thread::yield_now());
        assert!(!packing.is_finished());
        slow.complete_all(image);
        packing.join().unwrap()
    });
    assert_eq!(stored.streams.len(), 1);
    let next = open(&fixture.disk, &fixture.recorder, SessionSettings::default(), stored);
    let mut answered = std::collections::BTreeSet::new();
    for _ in 0..3 {
        let (cookie, error) = client.head();
        assert!(error == 0 && answered.insert(cookie));
        if cookie != 1 {
            client.data(4096);
        }
    }
    drop(next);
}

#[test]
fn a_session_that_waits_at_a_closed_gate_is_packed_up() {
    let mut fixture = plain();
    let mut client = fixture.client();
    client.is_answered_first();
    fixture.disk.gate().close_and_drain(Instant::now() + PATIENCE).unwrap();
    client.write(PLAIN, 0, &[1; 4096], 1);
    client.read(0, 512, 2);
    let stored = fixture.server.suspend(9, PATIENCE);
    assert_eq!(stored.streams.len(), 1);
    fixture.disk.gate().reopen();
    let _next = open(&fixture.disk, &fixture.recorder, SessionSettings::default(), stored);
    let first = client.head();
    if first.0 == 2 {
        client.data(512);
        assert_eq!(client.head(), (1, 0));
    } else {
        assert_eq!((first, client.head()), ((1, 0), (2, 0)));
    }
}

#[test]
fn a_session_that_waits_at_a_closed_gate_goes_on_when_it_opens() {
    let fixture = plain();
    let mut client = fixture.client();
    client.is_answered_first();
    fixture.disk.gate().close_and_drain(Instant::now() + PATIENCE).unwrap();
    client.write(PLAIN, 0, &[1; 4096], 1);
    client.0.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    assert!(client.0.peek(&mut [0]).is_err());
    client.0.set_read_timeout(Some(PATIENCE)).unwrap();
    fixture.disk.gate().reopen();
    assert_eq!(client.head(), (1, 0));
    fixture.disk.gate().close_and_drain(Instant::now() + PATIENCE).unwrap();
    client.write(PLAIN, 0, &[1; 4096], 2);
    fixture.disk.gate().retire();
    assert!(client.is_closed());
}
