//! A proxy as a service: restarts that keep clients, what makes them lose their sessions, status, and the
//! watchdog.

use crate::fake_upstream::{FakeConnection, FakeUpstream};
use crate::serving::Upstream;
use harness::manager::{Inherited, Service, ServiceManager};
use harness::raw::{
    EIO, FIXED_NEWSTYLE, FLUSH, HAS_FLAGS, NO_ZEROES, OPT_PRIVATE, READ, REP_ACK, SEND_FLUSH,
    WRITE, Wire,
};
use harness::session::{MODES, Mode, Request, Session};
use harness::{Builder, Endpoint, KIB, MIB, noise, read_at, wait_until};
use nix::sys::signal::Signal;
use std::collections::HashMap;

fn manager() -> ServiceManager {
    ServiceManager::new().env("FDSTORE", "9")
}

#[track_caller]
fn start(manager: &ServiceManager, upstream: &Endpoint) -> Service {
    let service = manager.start(Inherited::Nbd, &format!("proxy --to {}", upstream.uri()), &[]);
    manager.wait_for("READY=1");
    service
}

fn client(manager: &ServiceManager, mode: Mode) -> Session {
    Session::open(&Endpoint::Tcp(manager.address()), mode).unwrap()
}

/// The number of sessions in the fd store.
fn stored(manager: &ServiceManager) -> usize {
    manager.stored().iter().filter(|name| name.split('-').count() > 2).count()
}

#[test]
fn restarts_preserve_sessions_with_requests_in_flight() {
    let (manager, upstream) = (manager(), Upstream::start(""));
    let mut service = start(&manager, upstream.endpoint());
    let mut clients = MODES.map(|mode| client(&manager, mode));
    for round in 0..6 {
        let mut unsent = Vec::new();
        for (client, part) in clients.iter_mut().zip(1..) {
            let mut pending = HashMap::new();
            for step in 0..16 {
                let request = Request::new(READ, step * 4 * KIB, 4 * KIB);
                pending.insert(client.send(&request), request);
            }
            let request = Request::write(part * MIB, &noise(200_000, round * 3 + part));
            let (cookie, bytes) = client.encode(&request);
            let (before, after) = bytes.split_at(bytes.len() * (round as usize + 1) / 7);
            client.wire.send(before);
            pending.insert(cookie, request);
            unsent.push((pending, after.to_vec()));
        }
        assert!(service.stop().success());
        assert_eq!(stored(&manager), 3, "{}", service.stderr());
        service = start(&manager, upstream.endpoint());
        for (client, (mut pending, rest)) in clients.iter_mut().zip(unsent) {
            client.wire.send(&rest);
            while !pending.is_empty() {
                let (cookie, reply) = client.recv_reply(&pending);
                let request = pending.remove(&cookie).unwrap();
                assert_eq!(reply.error, 0);
                let offset = usize::try_from(request.offset).unwrap();
                let expected = || noise(100_000, 1)[offset..][..4 * KIB as usize].to_vec();
                assert!(request.command == WRITE || reply.data == expected());
            }
        }
    }
    for part in 1..4 {
        let expected = noise(200_000, 5 * 3 + part);
        assert!(read_at(&upstream.image, part * MIB, 200_000) == expected, "part {part}");
    }
    assert_eq!(service.stderr(), "");
}

/// A service whose upstream the test plays, and a client that has written and not flushed.
fn unflushed(manager: &ServiceManager) -> (FakeUpstream, FakeConnection, Service, Session) {
    let upstream = FakeUpstream::new(MIB, HAS_FLAGS | SEND_FLUSH);
    let to = format!("proxy --to {}", upstream.endpoint().uri());
    let service = manager.start(Inherited::Nbd, &to, &[]);
    let mut connection = upstream.accept();
    manager.wait_for("READY=1");
    let mut session = client(manager, Mode::Structured);
    let request = Request::write(0, b"hello");
    let cookie = session.send(&request);
    let write = connection.request();
    connection.answer(&write, b"");
    assert_eq!(session.recv_reply(&HashMap::from([(cookie, request)])).1.error, 0);
    (upstream, connection, service, session)
}

#[test]
fn sessions_are_stored_only_after_a_flush() {
    let manager = manager();
    let (upstream, mut connection, mut service, mut session) = unflushed(&manager);
    service.signal(Signal::SIGTERM);
    let flush = connection.request();
    assert_eq!((flush.command, stored(&manager)), (FLUSH, 0));
    connection.answer(&flush, b"");
    assert!(service.wait_for_exit().success());
    assert_eq!(stored(&manager), 1);
    let to = format!("proxy --to {}", upstream.endpoint().uri());
    let _service = manager.start(Inherited::Nbd, &to, &[]);
    let mut connection = upstream.accept();
    manager.wait_for("READY=1");
    let request = Request::new(READ, 0, 512);
    let cookie = session.send(&request);
    let read = connection.request();
    connection.answer(&read, &[7; 512]);
    assert_eq!(session.recv_reply(&HashMap::from([(cookie, request)])).1.data, [7; 512]);
}

/// A session of a client that introduces itself by these two numbers, as a proxy does.
#[track_caller]
fn introduced(server: &Endpoint, client: u8, generation: u64) -> Session {
    let mut wire = Wire::haggle(server, FIXED_NEWSTYLE | NO_ZEROES);
    let introduction = [&[0, 0, 0, 2][..], &generation.to_be_bytes(), &[client; 16]].concat();
    assert_eq!(wire.ask_final(OPT_PRIVATE, &introduction), REP_ACK);
    Session::go(wire, Mode::Simple, None, b"")
}

#[test]
fn restored_sessions_end_when_their_client_reconnects() {
    let (manager, upstream) = (manager(), Upstream::start(""));
    for command in [
        format!("serve -f {}", upstream.image_copy().display()),
        format!("proxy --to {}", upstream.server.uri()),
    ] {
        let server = || {
            let service = manager.start(Inherited::Nbd, &command, &[]);
            manager.wait_for("READY=1");
            service
        };
        let mut service = server();
        let address = Endpoint::Tcp(manager.address());
        let mut lost = introduced(&address, 7, 0);
        let mut other = introduced(&address, 8, 0);
        // The rest of the write may still arrive, after later writes of the client.
        let (_, bytes) = lost.encode(&Request::write(MIB, &noise(4096, 1)));
        lost.wire.send(&bytes[..4000]);
        assert!(service.stop().success());
        assert_eq!(stored(&manager), 2, "{}", service.stderr());
        let mut service = server();
        let mut again = introduced(&address, 7, 1);
        lost.wire.expect_closed("its client has lost this connection");
        other.assert_in_sync();
        again.assert_in_sync();
        drop((other, again));
        assert!(service.stop().success());
    }
}

#[test]
fn sessions_end_if_the_last_flush_fails() {
    let manager = manager();
    let (_upstream, mut connection, mut service, mut session) = unflushed(&manager);
    service.signal(Signal::SIGTERM);
    let flush = connection.request();
    connection.refuse(&flush, EIO);
    assert!(service.wait_for_exit().success());
    assert_eq!(stored(&manager), 0);
    session.wire.expect_closed("the written bytes may be lost");
    let log = service.stderr();
    assert!(log.contains("closing 1 session") && log.contains("may not be durable"), "{log}");
}

#[test]
fn sessions_wait_through_restarts_for_a_lost_upstream() {
    let (manager, mut upstream) = (manager(), Upstream::start(""));
    let address = upstream.endpoint().clone();
    let mut service = start(&manager, &address);
    let mut session = client(&manager, Mode::Structured);
    session.assert_in_sync();
    assert!(upstream.server.stop().success());
    manager.wait_for_status("the connection is lost");
    assert!(service.stop().success());
    assert_eq!(stored(&manager), 1);
    let to = format!("proxy --to {}", address.uri());
    let mut service = manager.start(Inherited::Nbd, &to, &[]);
    let messages = manager.wait_for_status("waiting for the upstream").concat();
    assert!(!messages.contains("READY=1"), "{messages}");
    assert!(service.stop().success());
    assert_eq!(stored(&manager), 1, "stored again");
    let mut service = manager.start(Inherited::Nbd, &to, &[]);
    manager.wait_for_status("waiting for the upstream");
    upstream.server = Builder::serve(&upstream.image).at(address).start();
    manager.wait_for("READY=1");
    session.assert_in_sync();
    assert!(service.is_running());
}

#[test]
fn status_line_follows_the_connection() {
    let (manager, mut upstream) = (manager(), Upstream::start(""));
    let address = upstream.endpoint().clone();
    let _service = start(&manager, &address);
    let text = format!("STATUS=proxying {} (8 MiB) on ", address.uri().replace("nbd://", ""));
    manager.wait_for_status("no clients");
    let _session = client(&manager, Mode::Simple);
    let messages = manager.wait_for_status("1 client");
    assert!(messages.last().unwrap().starts_with(&text), "{messages:?}");
    upstream.server.signal(Signal::SIGKILL);
    manager.wait_for_status("1 client; the connection is lost: ");
    upstream.server = Builder::serve(&upstream.image).at(address).start();
    let is_connected =
        |message: &String| message.starts_with(&text) && message.trim_end().ends_with("1 client");
    wait_until("the status", || manager.message().is_some_and(|message| is_connected(&message)));
}

#[test]
fn a_lost_upstream_does_not_starve_the_watchdog() {
    let upstream = Upstream::start("");
    let manager = manager().env("WATCHDOG_USEC", "100000");
    let mut service = start(&manager, upstream.endpoint());
    let mut session = client(&manager, Mode::Simple);
    drop(upstream);
    let request = Request::new(READ, 0, 512);
    session.send(&request);
    manager.wait_for_status("the connection is lost");
    for _ in 0..10 {
        manager.wait_for("WATCHDOG=1");
    }
    assert!(service.is_running());
    let log = service.stderr();
    assert!(!log.contains("not feeding the watchdog"), "{log}");
}

#[test]
fn an_idle_proxy_ends() {
    let (manager, upstream) = (manager(), Upstream::start(""));
    let to = format!("proxy --idle-exit 1 --to {}", upstream.server.uri());
    let mut service = manager.start(Inherited::Nbd, &to, &[]);
    assert_eq!(service.wait_for_exit().code(), Some(0));
}
