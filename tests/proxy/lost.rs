//! Upstreams that are killed, fall silent, move their disk, or have another one: no client notices.

use crate::fake_upstream::FakeUpstream;
use crate::serving::Upstream;
use crate::{builder_of, proxy_of, status, wait_for_status};
use harness::host::{Host, MIRROR_STARTED};
use harness::image::stamped_image;
use harness::proxy::{CutAt, Proxy};
use harness::raw::{FLUSH, FUA, HAS_FLAGS, READ, SEND_FLUSH, WRITE};
use harness::session::{Mode, Request, Session};
use harness::writers::Writers;
use harness::{
    Builder, Endpoint, MIB, env_number, noise, read_at, sparse_image, temp_dir,
    unused_loopback_address,
};
use nix::sys::signal::Signal;
use nix::sys::socket::{Backlog, listen};
use std::collections::HashMap;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

/// Pause between two batches of a writer.
const PAUSE: Duration = Duration::from_millis(5);
/// The default number of times that an upstream is killed.
const KILLS: u64 = 5;
const SIZE: u64 = 64 * MIB;

#[test]
fn clients_live_through_killed_upstreams() {
    let dir = temp_dir();
    let host = Host::new(dir.path(), "upstream");
    stamped_image(&host.image, SIZE);
    let mut serving = host.serve();
    let proxy = proxy_of(&[serving.endpoint()], "--quiet");
    let writers = Writers::start(proxy.endpoint().clone(), SIZE, (4, 1, PAUSE));
    for _ in 0..env_number("FLEXNBD_PROXY_KILLS").unwrap_or(KILLS) {
        writers.wait_for_writes(100);
        drop(serving);
        serving = host.serve();
    }
    writers.wait_for_writes(100);
    let written = writers.stop();
    assert_eq!(written.connections, 4, "no writer has connected again");
    assert!(serving.stop().success());
    written.assert_all_present(&host.image, "after the kills");
}

#[test]
fn clients_live_through_migrations_to_and_fro() {
    let dir = temp_dir();
    let (a, b) = (Host::new(dir.path(), "a"), Host::new(dir.path(), "b"));
    stamped_image(&a.image, SIZE);
    stamped_image(&b.image, SIZE);
    let ends = [&a, &b].map(|host| Endpoint::Tcp(host.address));
    let mut serving = a.serve();
    let sock = dir.path().join("proxy.sock");
    let options = format!("--quiet --sock {}", sock.display());
    let proxy = proxy_of(&[&ends[0], &ends[1]], &options);
    let writers = Writers::start(proxy.endpoint().clone(), SIZE, (4, 1, PAUSE));
    for (from, to) in [(&a, &b), (&b, &a)] {
        let mut listening = to.listen();
        writers.wait_for_writes(50);
        assert_eq!(from.mirror_to(to.address, &[]), MIRROR_STARTED);
        assert!(serving.wait_for_end().success(), "{}", serving.stderr());
        assert!(listening.wait_for_end().success(), "{}", listening.stderr());
        serving = to.serve();
        writers.wait_for_writes(50);
        assert_eq!(status(&sock)["upstream"], to.address.to_string());
    }
    let written = writers.stop();
    assert_eq!(written.connections, 4, "no writer has connected again");
    written.assert_all_present(&a.image, "after two migrations");
}

#[test]
fn a_silent_upstream_counts_as_lost() {
    let upstream = Upstream::start("");
    let Endpoint::Tcp(address) = *upstream.endpoint() else { panic!("TCP") };
    let mut link = Proxy::to(address, CutAt::Never);
    let sock = upstream.dir.path().join("sock");
    let options = format!("--timeout 1 --sock {}", sock.display());
    let proxy = proxy_of(&[&Endpoint::Tcp(link.address)], &options);
    let mut session = Session::open(proxy.endpoint(), Mode::Structured).unwrap();
    session.assert_in_sync();
    link.cut();
    let request = Request::write(MIB, b"hello");
    let cookie = session.send(&request);
    wait_for_status(&sock, "upstream_connected", "false");
    link.repair();
    let (answered, reply) = session.recv_reply(&HashMap::from([(cookie, request)]));
    assert_eq!((answered, reply.error), (cookie, 0));
    assert_eq!(read_at(&upstream.image, MIB, 5), b"hello");
    wait_for_status(&sock, "upstream_reconnects", "1");
}

/// The attribute with the id of a disk.
const DISK_ID_ATTRIBUTE: &str = "user.flexnbd.disk";

/// An address that does not answer, as that of a host that is down; and what keeps it so.
fn black_hole() -> (SocketAddr, (TcpListener, Vec<TcpStream>)) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listen(&listener, Backlog::new(0).unwrap()).unwrap();
    let address = listener.local_addr().unwrap();
    let fill = || TcpStream::connect_timeout(&address, Duration::from_millis(100)).ok();
    let waiting = std::iter::from_fn(fill).collect();
    (address, (listener, waiting))
}

#[test]
fn an_address_that_is_silent_does_not_keep_others_waiting() {
    let dir = temp_dir();
    let (a, b) = (Host::new(dir.path(), "a"), Host::new(dir.path(), "b"));
    stamped_image(&a.image, MIB);
    drop(a.serve());
    // The same disk for the proxy, already there when it is needed.
    std::fs::copy(&a.image, &b.image).unwrap();
    if let Ok(Some(id)) = xattr::get(&a.image, DISK_ID_ATTRIBUTE) {
        xattr::set(&b.image, DISK_ID_ATTRIBUTE, &id).unwrap();
    }
    let (silent, _kept) = black_hole();
    let ends = [&a, &b].map(|host| Endpoint::Tcp(host.address));
    let (serving, _later) = (a.serve(), b.serve());
    let hole = Endpoint::Tcp(silent);
    let proxy = proxy_of(&[&hole, &ends[0], &hole, &ends[1]], "");
    let mut session = Session::open(proxy.endpoint(), Mode::Structured).unwrap();
    session.assert_in_sync();
    drop(serving);
    session.assert_in_sync();
    let log = proxy.stderr();
    let failed = format!("{silent} does not give us the disk");
    assert!(!log.contains(&failed), "waited for it: {log}");
}

#[test]
fn another_disk_at_the_address_is_not_used() {
    let (dir, address) = (temp_dir(), Endpoint::Tcp(unused_loopback_address()));
    let image = sparse_image(dir.path(), "right", MIB);
    let upstream = Builder::serve(&image).at(address.clone()).start();
    let sock = dir.path().join("sock");
    let proxy = proxy_of(&[&address], &format!("--quiet --sock {}", sock.display()));
    let mut session = Session::open(proxy.endpoint(), Mode::Structured).unwrap();
    session.ok(Request::write(0, b"hello"));
    drop(upstream);
    let other = sparse_image(dir.path(), "wrong", 2 * MIB);
    for options in [["--quiet"; 2], ["--quiet", "--read-only"]] {
        let wrong = if options[1] == "--read-only" { &image } else { &other };
        let server = Builder::serve(wrong).args(options).at(address.clone()).start();
        let refused =
            || !status(&sock).get("upstream_error").is_none_or(|why| why.contains("refused"));
        harness::wait_until("the proxy to look at the other disk", refused);
        assert_eq!(status(&sock)["upstream_connected"], "false");
        drop(server);
        harness::wait_until("the proxy to notice", || {
            status(&sock).get("upstream_error").is_some_and(|why| why.contains("refused"))
        });
    }
    assert!(read_at(&other, 0, 5) == [0; 5], "the other disk is unchanged");
    let _right = Builder::serve(&image).at(address).start();
    assert_eq!(session.read(0, 5), b"hello");
}

#[test]
fn acknowledged_writes_survive_a_killed_proxy() {
    const ROUNDS: u64 = 10;
    let upstream = Upstream::start("");
    for round in 0..ROUNDS {
        let mut proxy = proxy_of(&[upstream.endpoint()], "--quiet");
        let mut session = Session::open(proxy.endpoint(), Mode::Structured).unwrap();
        let mut pending = HashMap::new();
        for number in 0..64 {
            let data = noise(4096, round * 64 + number);
            let request = Request::write(MIB + number * 4096, &data);
            let request = if number % 8 == 7 { request.flags(FUA) } else { request };
            pending.insert(session.send(&request), request);
        }
        let mut acknowledged = Vec::new();
        for _ in 0..round * 6 + 1 {
            let (cookie, reply) = session.recv_reply(&pending);
            assert_eq!(reply.error, 0);
            acknowledged.extend(pending.remove(&cookie));
        }
        proxy.signal(Signal::SIGKILL);
        proxy.wait_for_end();
        // Replies that were on their way count as well.
        while let Ok((cookie, reply)) = session.try_recv_reply(&pending) {
            assert_eq!(reply.error, 0);
            acknowledged.extend(pending.remove(&cookie));
        }
        for request in acknowledged {
            let found = read_at(&upstream.image, request.offset, 4096);
            assert!(found == request.payload, "round {round}: {} is lost", request.offset);
        }
    }
}

#[test]
fn the_proxy_connects_from_the_bound_address() {
    let upstream = Upstream::start("127.0.0.9");
    let outcome = harness::Program::flexnbd("proxy -l 127.0.0.1 -p 0 --to");
    outcome.args([upstream.server.uri()]).run().ended_with(1);
    let proxy = builder_of(&[upstream.endpoint()], "--bind 127.0.0.9").start();
    Session::open(proxy.endpoint(), Mode::Simple).unwrap().assert_in_sync();
}

#[test]
fn a_flush_waits_for_that_of_the_upstream() {
    let upstream = FakeUpstream::new(MIB, HAS_FLAGS | SEND_FLUSH);
    let endpoint = upstream.endpoint();
    let proxy = std::thread::spawn(move || proxy_of(&[&endpoint], "--quiet"));
    let mut connection = upstream.accept();
    let proxy = proxy.join().unwrap();
    let mut session = Session::open(proxy.endpoint(), Mode::Structured).unwrap();
    let write = Request::write(4096, &[7; 4096]);
    let cookie = session.send(&write);
    let received = connection.request();
    assert_eq!((received.command, received.offset, received.length), (WRITE, 4096, 4096));
    connection.answer(&received, b"");
    assert_eq!(session.recv_reply(&HashMap::from([(cookie, write)])).1.error, 0);
    // The upstream is lost before a flush: what it has acknowledged is written again first.
    drop(connection);
    let mut connection = upstream.accept();
    let again = connection.request();
    assert_eq!((again.command, again.offset), (WRITE, 4096));
    assert!(again.payload == received.payload);
    connection.answer(&again, b"");
    let flush = Request::new(FLUSH, 0, 0);
    let cookie = session.send(&flush);
    let received = connection.request();
    assert_eq!(received.command, FLUSH);
    // A later read is answered before the flush, which waits for the upstream.
    let read = Request::new(READ, 0, 512);
    let read_cookie = session.send(&read);
    let request = connection.request();
    assert_eq!(request.command, READ);
    connection.answer(&request, &vec![3; request.length as usize]);
    let mut pending = HashMap::from([(cookie, flush), (read_cookie, read)]);
    assert_eq!(session.recv_reply(&pending).0, read_cookie);
    pending.remove(&read_cookie);
    connection.answer(&received, b"");
    assert_eq!(session.recv_reply(&pending).1.error, 0);
}
