//! What users of the original flexnbd-proxy rely on, called by its name, with an upstream in old style
//! that does only what the original's server does.

use crate::fake_upstream::{FakeConnection, FakeUpstream};
use harness::raw::{READ, WRITE, Wire};
use harness::session::{Request, Session};
use harness::{
    Builder, KIB, MIB, Server, TempDir, flexnbd, read_at, sparse_image, temp_dir, write_at,
};
use std::collections::HashMap;
use std::os::unix::fs::symlink;
use std::path::PathBuf;

/// The options with which each test runs: without and with the cache.
const CACHES: [&str; 2] = ["", "--cache"];
const BLOCK: u64 = 4 * KIB;

/// A directory with the link `flexnbd-proxy`.
struct Link {
    dir: TempDir,
    path: PathBuf,
}

impl Link {
    fn new() -> Link {
        let dir = temp_dir();
        let path = dir.path().join("flexnbd-proxy");
        symlink(flexnbd(), &path).unwrap();
        Link { dir, path }
    }

    /// `flexnbd-proxy --oldstyle -C 127.0.0.1 -P PORT OPTIONS`, not started yet.
    fn proxy(&self, port: u16, options: &str) -> Builder {
        let builder = Builder::proxy_by_name(&self.path);
        let upstream = ["--oldstyle", "-C", "127.0.0.1", "-P", &port.to_string()];
        builder.args(upstream).args(options.split_whitespace())
    }

    /// A server of 1 MiB with 16 KiB of data, and a proxy of it.
    fn serve(&self, options: &str) -> (PathBuf, Server, Server) {
        let image = sparse_image(self.dir.path(), "disk", MIB);
        write_at(&image, 0, &harness::noise(16_384, 1));
        let server = Builder::serve(&image).args(["--oldstyle"]).start();
        let proxy = self.proxy(server.port(), options).start();
        (image, server, proxy)
    }

    /// A played server of one block without any transmission flags, its connection, and a proxy of it.
    fn play(&self, options: &str) -> (FakeUpstream, FakeConnection, Server) {
        self.play_disk(BLOCK, options)
    }

    /// The same with a disk of `size` bytes.
    fn play_disk(&self, size: u64, options: &str) -> (FakeUpstream, FakeConnection, Server) {
        let upstream = FakeUpstream::new(size, 0);
        let harness::Endpoint::Tcp(address) = upstream.endpoint() else { panic!("TCP") };
        let builder = self.proxy(address.port(), options);
        let starting = std::thread::spawn(move || builder.start());
        let connection = upstream.accept();
        (upstream, connection, starting.join().unwrap())
    }
}

#[test]
fn reads_and_writes_are_passed_on() {
    let link = Link::new();
    for cache in CACHES {
        let (image, _server, proxy) = link.serve(cache);
        let mut client = Session::open_oldstyle(proxy.endpoint());
        assert_eq!(client.size, MIB);
        for offset in (0..16 * KIB).step_by(BLOCK as usize) {
            assert!(client.read(offset, BLOCK) == read_at(&image, offset, BLOCK as usize));
        }
        for offset in (0..16 * KIB).step_by(BLOCK as usize) {
            client.ok(Request::write(offset, &[0xff; BLOCK as usize]));
            assert_eq!(read_at(&image, offset, BLOCK as usize), [0xff; BLOCK as usize]);
            assert_eq!(client.read(offset, BLOCK), [0xff; BLOCK as usize], "{cache}");
        }
    }
}

#[test]
fn a_read_is_sent_again_when_the_upstream_dies() {
    let link = Link::new();
    for cache in CACHES {
        let (upstream, mut connection, proxy) = link.play(cache);
        let mut client = Session::open_oldstyle(proxy.endpoint());
        assert_eq!(client.size, BLOCK);
        let request = Request::new(READ, 0, BLOCK);
        let cookie = client.send(&request);
        let first = connection.request();
        assert_eq!((first.command, first.offset, first.cookie), (READ, 0, cookie));
        drop(connection);
        let mut connection = upstream.accept();
        let again = connection.request();
        assert_eq!(again, first);
        connection.answer(&again, &vec![0xff; again.length as usize]);
        let (answered, reply) = client.recv_reply(&HashMap::from([(cookie, request)]));
        assert_eq!((answered, reply.error), (cookie, 0));
        assert_eq!(reply.data, [0xff; BLOCK as usize]);
    }
}

#[test]
fn a_write_is_sent_again_when_the_upstream_dies() {
    let link = Link::new();
    for cache in CACHES {
        let (upstream, mut connection, proxy) = link.play(cache);
        let mut client = Session::open_oldstyle(proxy.endpoint());
        let request = Request::write(0, &[0xff; BLOCK as usize]);
        let cookie = client.send(&request);
        let first = connection.request();
        assert_eq!((first.command, first.offset, first.length), (WRITE, 0, BLOCK as u32));
        assert_eq!(first.cookie, cookie);
        drop(connection);
        let mut connection = upstream.accept();
        let again = connection.request();
        assert!(again == first, "{cookie:#x} becomes {:#x}", again.cookie);
        connection.answer(&again, b"");
        let (answered, reply) = client.recv_reply(&HashMap::from([(cookie, request)]));
        assert_eq!((answered, reply.error), (cookie, 0));
    }
}

#[test]
fn equal_handles_of_two_clients_differ_at_the_upstream() {
    let link = Link::new();
    let (_upstream, mut connection, proxy) = link.play_disk(MIB, "--max-clients=2");
    let mut clients = [(); 2].map(|()| Session::open_oldstyle(proxy.endpoint()));
    let requests = [0, BLOCK].map(|offset| Request::new(READ, offset, BLOCK));
    let handles = [0, 1].map(|nth| clients[nth].send(&requests[nth]));
    assert_eq!(handles[0], handles[1]);
    let received = [connection.request(), connection.request()];
    assert_ne!(received[0].cookie, received[1].cookie);
    assert_eq!(received[0].cookie, handles[0], "the first one keeps its handle");
    for request in received.iter().rev() {
        connection.answer(request, &content(request.offset));
    }
    for (client, request) in clients.iter_mut().zip(requests) {
        let expected = content(request.offset);
        let (handle, reply) = client.recv_reply(&HashMap::from([(handles[0], request)]));
        assert!(handle == handles[0] && reply.data == expected);
    }
}

#[test]
fn a_second_client_waits_for_the_first() {
    let link = Link::new();
    for cache in CACHES {
        let (_image, _server, proxy) = link.serve(cache);
        let mut first = Session::open_oldstyle(proxy.endpoint());
        let mut second = Wire::connect(proxy.endpoint());
        // The first client is served many times; the second is neither greeted nor disconnected.
        for _ in 0..100 {
            first.assert_in_sync();
        }
        second.set_read_timeout(std::time::Duration::from_millis(100));
        let error = second.try_recv(&mut [0; 8]).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock, "{cache}");
        drop(first);
        second.set_read_timeout(harness::TIMEOUT);
        assert_eq!(second.recv(8), b"NBDMAGIC");
    }
}

/// The content of a block in tests of the cache.
fn content(offset: u64) -> Vec<u8> {
    vec![(offset / BLOCK) as u8; BLOCK as usize]
}

#[test]
fn sequential_reads_are_answered_from_the_cache() {
    let link = Link::new();
    let (_upstream, mut connection, proxy) = link.play_disk(MIB, "-c4096");
    let mut client = Session::open_oldstyle(proxy.endpoint());
    let mut pending = HashMap::new();
    let read = |client: &mut Session, offset| {
        let request = Request::new(READ, offset, BLOCK);
        (client.send(&request), request)
    };
    pending.extend([0, BLOCK].map(|offset| read(&mut client, offset)));
    // Two sequential reads, and the block behind them.
    for _ in 0..3 {
        let request = connection.request();
        assert_eq!((request.command, u64::from(request.length)), (READ, BLOCK));
        connection.answer(&request, &content(request.offset));
    }
    pending.extend([read(&mut client, 2 * BLOCK)]);
    // The third read is not sent; only the block behind it is requested, and not answered yet.
    let ahead = connection.request();
    assert_eq!((ahead.command, ahead.offset), (READ, 3 * BLOCK));
    while !pending.is_empty() {
        let (cookie, reply) = client.recv_reply(&pending);
        let request = pending.remove(&cookie).unwrap();
        assert!(reply.data == content(request.offset), "at {}", request.offset);
    }
    // A write discards the block ahead.
    let write = Request::write(3 * BLOCK, &[0xff; BLOCK as usize]);
    let pending = HashMap::from([(client.send(&write), write)]);
    connection.answer(&ahead, &content(3 * BLOCK));
    let sent = connection.request();
    assert_eq!((sent.command, sent.offset), (WRITE, 3 * BLOCK));
    connection.answer(&sent, b"");
    assert_eq!(client.recv_reply(&pending).1.error, 0);
    let pending = HashMap::from([read(&mut client, 3 * BLOCK)]);
    let again = connection.request();
    assert_eq!((again.command, again.offset), (READ, 3 * BLOCK));
    connection.answer(&again, &[0xff; BLOCK as usize]);
    assert_eq!(client.recv_reply(&pending).1.data, [0xff; BLOCK as usize]);
}

#[test]
fn the_upstream_stays_connected_between_clients() {
    let link = Link::new();
    let (upstream, mut connection, proxy) = link.play("");
    for _ in 0..3 {
        let mut client = Session::open_oldstyle(proxy.endpoint());
        let request = Request::new(READ, 0, 512);
        let cookie = client.send(&request);
        let received = connection.request();
        connection.answer(&received, &[1; 512]);
        assert_eq!(client.recv_reply(&HashMap::from([(cookie, request)])).1.error, 0);
    }
    assert!(upstream.try_accept().is_none(), "it has connected once");
}
