//! Silent connections exclude no client, no source and no operator, and refused connections do not
//! fill the log.

use harness::raw::{
    DISC, EINVAL, OPT_GO, OPT_PRIVATE, READ, Wire, encode_go, encode_request, typical_handshake,
};
use harness::session::{Mode, Request, Session};
use harness::{
    Builder, Endpoint, KIB, Program, Server, TempDir, sparse_image, temp_dir, wait_until,
};
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;

/// Types of option replies: NBD_REP_ACK, NBD_REP_ERR_POLICY.
const ACK: u32 = 1;
const POLICY: u32 = 0x8000_0002;
/// The number of silent connections. This many blocked the previous server for a minute.
const MANY: usize = 1000;

fn server(flags: &str) -> (Server, TempDir) {
    let dir = temp_dir();
    let image = sparse_image(dir.path(), "image", 64 * KIB);
    (Builder::serve(&image).args(flags.split_whitespace()).start(), dir)
}

fn address(target: &Endpoint) -> SocketAddr {
    match target {
        Endpoint::Tcp(address) => *address,
        Endpoint::Unix(path) => panic!("{}", path.display()),
    }
}

/// Connections that send `bytes` and then nothing.
fn silent(target: &Endpoint, count: usize, bytes: &[u8]) -> Vec<TcpStream> {
    let connect = |_| {
        let mut stream = TcpStream::connect(address(target)).unwrap();
        // The server may have closed it in favour of a later one.
        let _ = stream.write_all(bytes);
        stream
    };
    (0..count).map(connect).collect()
}

#[track_caller]
fn assert_served(target: &Endpoint) {
    Session::open(target, Mode::Structured).unwrap().ok(Request::write(0, &[1; 512]));
}

#[test]
fn silent_connections_do_not_block_clients() {
    let (server, _dir) = server("");
    for bytes in [&b""[..], &[0, 0, 0, 3]] {
        let _silent = silent(server.endpoint(), MANY, bytes);
        assert_served(server.endpoint());
    }
}

#[test]
fn silent_connections_do_not_count_as_clients() {
    let (server, _dir) = server("--max-clients 1");
    let _silent = silent(server.endpoint(), 100, b"");
    let session = Session::open(server.endpoint(), Mode::Structured).unwrap();
    Wire::connect(server.endpoint()).expect_closed("the limit of one client is reached");
    drop(session);
    wait_until("the place of the closed session to be free", || {
        let mut wire = Wire::connect(server.endpoint());
        let greeted = wire.try_recv(&mut [0; 18]);
        !matches!(greeted, Ok(0) | Err(_))
    });
}

#[test]
fn ownership_queries_are_answered_beyond_the_client_limit() {
    let (server, _dir) = server("--max-clients 1");
    let _session = Session::open(server.endpoint(), Mode::Simple).unwrap();
    // From an address without a client: those with one are closed without a greeting.
    let mut stream = connect_from(Ipv4Addr::new(127, 0, 0, 2), server.endpoint());
    stream.read_exact(&mut [0; 18]).unwrap();
    stream.write_all(&3u32.to_be_bytes()).unwrap();
    let mut ask = |option: u32, data: &[u8]| {
        let length = u32::try_from(data.len()).unwrap();
        let option = [&b"IHAVEOPT"[..], &option.to_be_bytes(), &length.to_be_bytes(), data];
        stream.write_all(&option.concat()).unwrap();
        loop {
            // Magic, option, type, length.
            let mut head = [0; 20];
            stream.read_exact(&mut head).unwrap();
            let [kind, length] = [12, 16].map(|at| head[at..].first_chunk::<4>().unwrap());
            let [kind, length] = [kind, length].map(|bytes| u32::from_be_bytes(*bytes));
            stream.read_exact(&mut vec![0; length as usize]).unwrap();
            if kind == ACK || kind == POLICY {
                return kind;
            }
        }
    };
    let query = [&1u32.to_be_bytes()[..], &(64 * KIB).to_be_bytes(), &[7; 16]].concat();
    assert_eq!(ask(OPT_PRIVATE, &query), ACK, "the query whether the disk has arrived");
    assert_eq!(ask(OPT_GO, &encode_go(b"", &[])), POLICY);
}

#[test]
fn one_address_has_clients_up_to_its_limit() {
    let (mut server, _dir) = server("--max-clients-per-address 2 --verbose");
    let open = || Session::open(server.endpoint(), Mode::Simple).unwrap();
    let mut clients = [open(), open()];
    let mut third = Wire::haggle(server.endpoint(), 3);
    assert_eq!(third.ask_final(OPT_GO, &encode_go(b"", &[])), POLICY);
    drop(third);
    let mut elsewhere = connect_from(Ipv4Addr::new(127, 0, 0, 2), server.endpoint());
    elsewhere.read_exact(&mut [0; 18]).unwrap();
    elsewhere.write_all(&typical_handshake()).unwrap();
    elsewhere.write_all(&encode_request(DISC, 0, 1, 0, 0)).unwrap();
    elsewhere.read_to_end(&mut Vec::new()).unwrap();
    clients.iter_mut().for_each(Session::assert_in_sync);
    drop(clients);
    wait_until("the places of the closed sessions to be free", || {
        Wire::haggle(server.endpoint(), 3).ask_final(OPT_GO, &encode_go(b"", &[])) == ACK
    });
    assert!(server.stop().success());
    let log = server.stderr();
    let refused = "as many clients of its address are connected as may be";
    assert!(log.contains(refused), "{log}");
    assert!(log.contains("127.0.0.2:"), "a client of another address: {log}");
}

#[test]
fn silent_connections_do_not_block_oldstyle_clients() {
    let (server, _dir) = server("--max-clients 2 --oldstyle");
    let _silent = silent(server.endpoint(), 100, b"");
    let mut session = Session::open_oldstyle(server.endpoint());
    session.ok(Request::write(0, &[1; 512]));
}

#[test]
fn the_client_limit_holds_for_concurrent_handshakes() {
    let (server, _dir) = server("--max-clients 1");
    let mut late = Wire::haggle(server.endpoint(), 3);
    let _session = Session::open(server.endpoint(), Mode::Simple).unwrap();
    assert_eq!(late.ask_final(OPT_GO, &encode_go(b"", &[])), POLICY);
}

#[test]
fn silent_connections_do_not_block_a_migration() {
    let dir = temp_dir();
    let (here, there) =
        (sparse_image(dir.path(), "here", 64 * KIB), sparse_image(dir.path(), "there", 64 * KIB));
    let control = dir.path().join("control.sock");
    let mut source = Builder::serve(&here).args(["--sock".as_ref(), control.as_os_str()]).start();
    source.wait_for_control(&control);
    let mut destination = Builder::mode("listen", &there).start();
    let _silent = silent(destination.endpoint(), MANY, b"");
    let place = format!("--addr 127.0.0.1 --port {}", destination.port());
    Program::flexnbd("mirror --wait").words(&place).args(["--sock"]).args([&control]).ok();
    assert_eq!(destination.wait_for_end().code(), Some(0));
    assert_eq!(source.wait_for_end().code(), Some(0));
}

#[test]
fn status_is_answered_without_free_descriptors() {
    let dir = temp_dir();
    let image = sparse_image(dir.path(), "image", 64 * KIB);
    let control = dir.path().join("control.sock");
    let limited = ["sh", "-c", "ulimit -n 64 && exec \"$@\"", "sh"];
    let server =
        Builder::serve(&image).through(limited).args(["--sock".as_ref(), control.as_os_str()]);
    let server = server.start();
    server.wait_for_control(&control);
    let _silent = silent(server.endpoint(), 200, b"");
    let mut sessions = Vec::new();
    // Until the server accepts no more.
    loop {
        let mut wire = Wire::connect(server.endpoint());
        match wire.try_recv(&mut [0; 18]) {
            Ok(18) => wire.send(&[0, 0, 0, 3]),
            _ => break,
        }
        sessions.push(Session::go(wire, Mode::Simple, None, b""));
    }
    assert!(sessions.len() > 5, "only {} sessions", sessions.len());
    for session in &mut sessions {
        session.ok(Request::write(0, &[1; 512]));
    }
    let status = Program::flexnbd("status").args(["--sock"]).args([&control]).ok();
    assert!(status.contains("pid="), "{status}");
}

#[test]
fn status_is_answered_beside_silent_control_connections() {
    let dir = temp_dir();
    let image = sparse_image(dir.path(), "image", 64 * KIB);
    let control = dir.path().join("control.sock");
    let server = Builder::serve(&image).args(["--sock".as_ref(), control.as_os_str()]).start();
    server.wait_for_control(&control);
    let _silent: Vec<_> = (0..MANY).map(|_| UnixStream::connect(&control).unwrap()).collect();
    let status = Program::flexnbd("status").args(["--sock"]).args([&control]).ok();
    assert!(status.contains("pid="), "{status}");
}

#[test]
fn refused_connections_are_logged_once_and_then_counted() {
    const REFUSED: usize = 300;
    let (mut server, _dir) = server("192.0.2.1");
    let connect_refused = |last: u8| {
        let mut stream = connect_from(Ipv4Addr::new(127, 0, 0, last), server.endpoint());
        match stream.read(&mut [0; 18]) {
            Ok(0) => {}
            Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
            other => panic!("{other:?}"),
        }
    };
    (0..REFUSED).for_each(|_| connect_refused(2));
    connect_refused(3);
    assert!(server.stop().success());
    let log = server.stderr();
    let lines: Vec<&str> = log.lines().collect();
    assert_eq!(lines.len(), 3, "{log}");
    assert!(lines[0].contains("refused 127.0.0.2:"), "{log}");
    assert!(lines[1].contains("refused 127.0.0.3:"), "{log}");
    let others = format!("{} more connections from 127.0.0.2 closed: ", REFUSED - 1);
    assert!(lines[2].contains(&others), "{log}");
}

#[test]
fn broken_handshakes_are_logged_once_and_then_counted() {
    const BROKEN: usize = 100;
    let (mut server, _dir) = server("--verbose");
    for number in 0..BROKEN {
        let mut wire = Wire::connect(server.endpoint());
        wire.recv(18);
        wire.send(&[if number == 0 { 0xff } else { number as u8 | 0x40 }; 4]);
        wire.expect_closed("unknown client flags");
    }
    assert_served(server.endpoint());
    assert!(server.stop().success());
    let log = server.stderr();
    let closed = log.lines().filter(|line| line.contains("the client broke the handshake"));
    assert_eq!(closed.count(), 1, "{log}");
    assert!(
        log.contains(&format!("{} more connections from 127.0.0.1 closed: ", BROKEN - 1)),
        "{log}"
    );
    assert_eq!(log.matches(" connected").count(), 1, "clients only: {log}");
}

#[test]
fn sessions_beyond_their_limit_are_counted_in_the_log() {
    const LOGGED: usize = 300;
    const MORE: usize = 20;
    let (mut server, _dir) = server("--verbose");
    for _ in 0..LOGGED + MORE {
        let mut session = Session::open(server.endpoint(), Mode::Simple).unwrap();
        // Refused, with a line in the log.
        session.refused(Request::new(READ, 64 * KIB, 1), &[EINVAL]);
        let (_, disconnect) = session.encode_header(DISC, 0, 0, 0);
        session.wire.send(&disconnect);
        session.wire.expect_closed("DISC");
    }
    assert!(server.stop().success());
    let log = server.stderr();
    for part in [" connected", "refused a request", "the client said goodbye"] {
        assert_eq!(log.matches(part).count(), LOGGED, "{part}");
    }
    let others = format!("{MORE} more sessions of 127.0.0.1 began and were not logged");
    assert_eq!(log.matches(&others).count(), 1, "{}", log.lines().last().unwrap_or_default());
}

/// A connection from an address of the loopback network.
fn connect_from(from: Ipv4Addr, to: &Endpoint) -> TcpStream {
    use nix::sys::socket::{
        AddressFamily, SockFlag, SockType, SockaddrStorage, bind, connect, socket,
    };
    use std::os::fd::AsRawFd as _;
    let family = AddressFamily::Inet;
    let fd = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap();
    let here = SocketAddr::new(IpAddr::V4(from), 0);
    bind(fd.as_raw_fd(), &SockaddrStorage::from(here)).unwrap();
    connect(fd.as_raw_fd(), &SockaddrStorage::from(address(to))).unwrap();
    fd.into()
}
