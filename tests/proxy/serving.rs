//! A proxy while its upstream is there: bytes, styles, exports, limits, and commands of operators.

use crate::fake_upstream::FakeUpstream;
use crate::{proxy_of, status, wait_for_status};
use harness::raw::{
    BLOCK_STATUS, EPERM, FLUSH, FUA, HAS_FLAGS, READ_ONLY, SEND_FLUSH, TRIM, WRITE, WRITE_ZEROES,
};
use harness::session::{MODES, Mode, Request, Session};
use harness::{
    Builder, Endpoint, KIB, MIB, Program, Server, TempDir, noise, read_at, sparse_image, temp_dir,
    write_at,
};
use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

/// A disk of 8 MiB with some data, its server, and a directory for more files.
pub(crate) struct Upstream {
    pub(crate) dir: TempDir,
    pub(crate) image: PathBuf,
    pub(crate) server: Server,
}

impl Upstream {
    #[track_caller]
    pub(crate) fn start(options: &str) -> Upstream {
        let dir = temp_dir();
        let image = sparse_image(dir.path(), "disk", 8 * MIB);
        write_at(&image, 0, &noise(100_000, 1));
        let server = Builder::serve(&image).args(options.split_whitespace()).start();
        Upstream { dir, image, server }
    }

    /// A copy of its image, which no server has opened.
    pub(crate) fn image_copy(&self) -> PathBuf {
        let copy = self.dir.path().join("copy");
        fs::copy(&self.image, &copy).unwrap();
        copy
    }

    pub(crate) fn endpoint(&self) -> &Endpoint {
        self.server.endpoint()
    }
}

#[test]
fn every_command_is_passed_on_in_each_mode() {
    let upstream = Upstream::start("");
    let proxy = proxy_of(&[upstream.endpoint()], "");
    for (mode, seed) in MODES.into_iter().zip(7..) {
        let mut session = Session::open(proxy.endpoint(), mode).unwrap();
        assert_eq!(session.size, 8 * MIB);
        for command in [FLUSH, TRIM, WRITE_ZEROES] {
            assert!(session.offers(command), "{mode:?}: {command}");
        }
        let data = noise(300_000, seed);
        session.ok(Request::write(MIB + 5, &data));
        session.ok(Request::write(4 * MIB, &data).flags(FUA));
        assert!(session.read(MIB + 5, 300_000) == data, "{mode:?}");
        session.ok(Request::new(WRITE_ZEROES, MIB, MIB));
        session.ok(Request::new(TRIM, 4 * MIB, MIB));
        session.ok(Request::new(FLUSH, 0, 0));
        assert!(read_at(&upstream.image, MIB, 400_000).iter().all(|byte| *byte == 0), "{mode:?}");
        assert!(session.read(0, 100_000) == noise(100_000, 1), "{mode:?}");
        if session.context.is_some() {
            let extents = session.ok(Request::new(BLOCK_STATUS, 0, 8 * MIB)).extents;
            let length: u64 = extents.iter().map(|(length, _)| *length).sum();
            assert!(length > 0 && extents.len() > 1, "{mode:?}: {extents:?}");
        }
    }
}

#[test]
fn unix_sockets_work_on_both_sides() {
    let dir = temp_dir();
    let image = sparse_image(dir.path(), "disk", MIB);
    let socket = dir.path().join("up.sock");
    let upstream = Builder::serve(&image).unix(&socket).start();
    let uri = upstream.uri();
    let below = dir.path().join("down.sock");
    let proxy = Builder::proxy().args(["--to", &uri]).unix(&below).start();
    let mut session = Session::open(proxy.endpoint(), Mode::Extended).unwrap();
    session.ok(Request::write(4096, b"hello"));
    assert_eq!(read_at(&image, 4096, 5), b"hello");
    let conn = ["--conn-addr".as_ref(), socket.as_os_str()];
    let proxy = Builder::proxy().args(conn).start();
    let mut session = Session::open(proxy.endpoint(), Mode::Simple).unwrap();
    assert_eq!(session.read(4096, 5), b"hello");
}

#[test]
fn old_style_works_on_both_sides() {
    let upstream = Upstream::start("--oldstyle");
    let proxy = proxy_of(&[upstream.endpoint()], "--oldstyle");
    let mut session = Session::open_oldstyle(proxy.endpoint());
    assert_eq!(session.size, 8 * MIB);
    session.ok(Request::write(4096, b"hello"));
    session.ok(Request::new(FLUSH, 0, 0));
    assert_eq!(read_at(&upstream.image, 4096, 5), b"hello");
    let newstyle = proxy_of(&[upstream.endpoint()], "");
    let mut session = Session::open(newstyle.endpoint(), Mode::Structured).unwrap();
    assert_eq!(session.read(4096, 5), b"hello");
}

#[test]
fn exports_have_names_of_their_own_on_each_side() {
    let upstream = Upstream::start("--export theirs");
    let uri = upstream.endpoint().uri_of("theirs");
    let proxy = Builder::proxy().args(["--to", &uri, "--export", "ours"]).start();
    let read = |export: &str| {
        let uri = proxy.endpoint().uri_of(export);
        Program::flexnbd("read -F 0 -S 4 --uri").args([uri]).run()
    };
    assert_eq!(read("ours").succeeded().stdout, noise(4, 1));
    assert_eq!(read("").succeeded().stdout, noise(4, 1));
    read("theirs").refused(1, &["no export of that name"]);
}

#[test]
fn read_only_upstreams_and_proxies_refuse_changes() {
    for (above, below) in [("--read-only", ""), ("", "--read-only")] {
        let upstream = Upstream::start(above);
        let proxy = proxy_of(&[upstream.endpoint()], below);
        let mut session = Session::open(proxy.endpoint(), Mode::Structured).unwrap();
        assert_eq!(session.flags & READ_ONLY, READ_ONLY, "{above}{below}");
        session.refused(Request::write(0, b"x"), &[EPERM]);
        assert!(session.read(0, 4) == noise(4, 1));
    }
}

#[test]
fn third_party_clients_copy_through_a_proxy() {
    if !harness::require_tools(&["nbdcopy", "nbdinfo"]) {
        return;
    }
    let upstream = Upstream::start("");
    let proxy = proxy_of(&[upstream.endpoint()], "");
    let copy = upstream.dir.path().join("copy");
    Program::new("nbdcopy").words("--connections=4").args([proxy.uri()]).args([&copy]).ok();
    assert!(fs::read(&copy).unwrap() == fs::read(&upstream.image).unwrap());
    let map = Program::new("nbdinfo").args(["--map", &proxy.uri()]).ok();
    let direct = Program::new("nbdinfo").args(["--map", &upstream.server.uri()]).ok();
    assert_eq!(map, direct, "the holes are the upstream's");
}

fn command(sock: &Path, words: &str) -> Program {
    let (mode, rest) = words.split_once(' ').unwrap_or((words, ""));
    Program::flexnbd(mode).args(["--sock"]).args([sock]).words(rest)
}

#[test]
fn status_describes_the_upstream() {
    let mut upstream = Upstream::start("");
    let sock = upstream.dir.path().join("sock");
    let proxy = proxy_of(&[upstream.endpoint()], &format!("--sock {}", sock.display()));
    proxy.wait_for_control(&sock);
    let address = format!("127.0.0.1:{}", upstream.server.port());
    let text = command(&sock, "status").ok();
    let keys = text.split_whitespace().map(|pair| pair.split('=').next().unwrap());
    // The server may not have given the disk its id yet.
    let keys: Vec<&str> = keys.filter(|key| *key != "disk_id").collect();
    let expected = [
        "pid",
        "size",
        "is_mirroring",
        "clients_allowed",
        "num_clients",
        "has_control",
        "upstream",
        "upstream_connected",
        "upstream_seconds",
        "upstream_reconnects",
        "unflushed_bytes",
        "payload_bytes",
        "payload_bytes_max",
        "sandbox",
    ];
    assert_eq!(keys, expected);
    let mut session = Session::open(proxy.endpoint(), Mode::Structured).unwrap();
    session.ok(Request::write(0, &[7; 4096]));
    let now = status(&sock);
    assert_eq!((&now["upstream"], &*now["upstream_connected"]), (&address, "true"));
    assert_eq!((&*now["has_control"], &*now["num_clients"]), ("false", "1"));
    assert!(now["unflushed_bytes"].parse::<u64>().unwrap() >= 4096, "{now:?}");
    session.ok(Request::new(FLUSH, 0, 0));
    wait_for_status(&sock, "unflushed_bytes", "0");
    assert!(upstream.server.stop().success());
    wait_for_status(&sock, "upstream_connected", "false");
    assert!(status(&sock)["upstream_error"].contains(&address), "{:?}", status(&sock));
    let json = command(&sock, "status --json").ok();
    assert!(json.contains("\"upstream_connected\":false"), "{json}");
}

#[test]
fn commands_about_a_migration_are_refused() {
    let upstream = Upstream::start("");
    let sock = upstream.dir.path().join("sock");
    let proxy = proxy_of(&[upstream.endpoint()], &format!("--sock {}", sock.display()));
    proxy.wait_for_control(&sock);
    let at = format!("have the server at 127.0.0.1:{} move the disk", upstream.server.port());
    for wait in ["", " --wait"] {
        command(&sock, &format!("mirror -l 127.0.0.1 -p 7{wait}")).run().refused(1, &[&at]);
    }
    command(&sock, "break").run().refused(1, &["not mirroring"]);
    command(&sock, "mirror-speed -m 1").run().refused(1, &["Not currently mirroring"]);
    command(&sock, "reload").run().refused(1, &["started without --config"]);
}

#[test]
fn a_disk_cannot_be_moved_to_a_proxy() {
    let (upstream, other) = (Upstream::start(""), temp_dir());
    let proxy = proxy_of(&[upstream.endpoint()], "");
    let (image, sock) = (sparse_image(other.path(), "disk", 8 * MIB), other.path().join("sock"));
    let source = Builder::serve(&image).args(["--sock"]).args([&sock]).start();
    source.wait_for_control(&sock);
    let mirror = format!("mirror -l 127.0.0.1 -p {}", proxy.port());
    command(&sock, &mirror).run().refused(1, &["Mirror was rejected", "this is a proxy"]);
}

#[test]
fn access_control_and_reload_work_as_for_a_server() {
    let upstream = Upstream::start("");
    let (sock, file) = (upstream.dir.path().join("sock"), upstream.dir.path().join("conf"));
    let text = format!("TO={}\nSOCK={}\n", upstream.server.uri(), sock.display());
    fs::write(&file, format!("{text}ACL=192.0.2.0/24\n")).unwrap();
    let proxy = Builder::proxy().args(["--config"]).args([&file]).start();
    proxy.wait_for_control(&sock);
    let read = || Program::flexnbd("read -F 0 -S 1 --uri").args([proxy.uri()]).run();
    read().ended_with(1);
    assert_eq!(command(&sock, "acl 127.0.0.0/8").ok(), "updated\n");
    read().succeeded();
    assert_eq!(command(&sock, "reload").ok(), "reloaded\n");
    read().ended_with(1);
    fs::write(&file, text).unwrap();
    assert_eq!(command(&sock, "reload").ok(), "reloaded\n");
    read().succeeded();
}

#[test]
fn connections_limits_those_to_the_upstream() {
    let dir = temp_dir();
    let sock = dir.path().join("up.sock");
    let upstream = Upstream::start(&format!("--sock {}", sock.display()));
    upstream.server.wait_for_control(&sock);
    for (options, expected) in [("", "4"), ("--connections 1", "1"), ("--connections 2", "2")] {
        let proxy = proxy_of(&[upstream.endpoint()], options);
        Session::open(proxy.endpoint(), Mode::Simple).unwrap().assert_in_sync();
        assert_eq!(status(&sock)["num_clients"], expected, "{options}");
        drop(proxy);
        wait_for_status(&sock, "num_clients", "0");
    }
}

#[test]
fn the_proxy_flushes_when_the_unflushed_memory_is_full() {
    let upstream = FakeUpstream::new(8 * MIB, HAS_FLAGS | SEND_FLUSH);
    let endpoint = upstream.endpoint();
    let starting = std::thread::spawn(move || proxy_of(&[&endpoint], "--unflushed 1M"));
    let mut connection = upstream.accept();
    let proxy = starting.join().unwrap();
    let mut session = Session::open(proxy.endpoint(), Mode::Structured).unwrap();
    let mut pending = HashMap::new();
    for number in 0..8 {
        let request = Request::write(number * 256 * KIB, &noise(256 << 10, number));
        pending.insert(session.send(&request), request);
    }
    let (mut written, mut flushes) = (0, 0);
    while written < 8 {
        let request = connection.request();
        match request.command {
            FLUSH => flushes += 1,
            command => {
                assert_eq!(command, WRITE);
                written += 1;
            }
        }
        connection.answer(&request, b"");
    }
    assert!(flushes > 0, "no client has flushed");
    while !pending.is_empty() {
        let (cookie, reply) = session.recv_reply(&pending);
        assert_eq!(reply.error, 0);
        pending.remove(&cookie);
    }
}

#[test]
fn a_client_limit_disconnects_further_clients() {
    let upstream = Upstream::start("");
    let proxy = proxy_of(&[upstream.endpoint()], "--max-clients 1");
    let mut first = Session::open(proxy.endpoint(), Mode::Simple).unwrap();
    let mut second = harness::raw::Wire::connect(proxy.endpoint());
    second.expect_closed("there is a client already");
    first.assert_in_sync();
}
