//! What `listener.rs` promises, over real sockets.

use super::*;
use crate::control::command::{LINE_BYTES_MAX, LINES_MAX};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::{Condvar, Mutex};

/// Long enough never to matter.
const LONG: Duration = Duration::from_secs(60);

/// Remembers its orders; answers each with its name, when `open`.
struct Clerk {
    desk: Mutex<Desk>,
    changed: Condvar,
}

#[derive(Default)]
struct Desk {
    orders: Vec<(Command, Credentials)>,
    at_once: usize,
    open: bool,
}

impl Clerk {
    fn new(open: bool) -> Arc<Self> {
        let desk = Mutex::new(Desk { open, ..Desk::default() });
        Arc::new(Self { desk, changed: Condvar::new() })
    }

    fn change(&self, change: impl FnOnce(&mut Desk)) {
        change(&mut self.desk.lock().unwrap());
        self.changed.notify_all();
    }

    /// Whether it comes to that within `limit`.
    fn comes_to(&self, limit: Duration, condition: impl Fn(&Desk) -> bool) -> bool {
        let desk = self.desk.lock().unwrap();
        let (desk, _) =
            self.changed.wait_timeout_while(desk, limit, |desk| !condition(desk)).unwrap();
        condition(&desk)
    }
}

impl Operator for Clerk {
    fn obey(&self, command: Command, from: Credentials) -> Reply {
        assert_ne!(command, Command::Break, "an order that makes this operator panic");
        let reply = Reply::success(command.word());
        self.change(|desk| {
            desk.orders.push((command, from));
            desk.at_once += 1;
        });
        assert!(self.comes_to(LONG, |desk| desk.open));
        self.change(|desk| desk.at_once -= 1);
        reply
    }
}

struct Server {
    clerk: Arc<Clerk>,
    handle: Handle,
    path: PathBuf,
    _directory: tempfile::TempDir,
}

fn server_with(clerk: Arc<Clerk>, patience: Duration) -> Server {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("control.sock");
    let socket = ControlSocket::bind(&path).unwrap();
    let operator: Arc<dyn Operator> = Arc::clone(&clerk) as _;
    let handle = socket.start_with_patience(operator, patience).unwrap();
    Server { clerk, handle, path, _directory: directory }
}

fn server() -> Server {
    server_with(Clerk::new(true), LONG)
}

impl Server {
    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.path).unwrap();
        stream.set_read_timeout(Some(LONG)).unwrap();
        stream
    }

    /// What it answers to exactly these bytes, the connection staying open on our side.
    fn answer_to(&self, bytes: &[u8]) -> String {
        let mut stream = self.connect();
        stream.write_all(bytes).unwrap();
        all_of(&mut stream)
    }
}

fn all_of(stream: &mut UnixStream) -> String {
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

#[test]
fn the_originals_client_is_answered_with_one_line() {
    let server = server();
    assert_eq!(server.answer_to(b"status\n\n"), "0: status\n");
    assert_eq!(server.answer_to(b"acl\n127.0.0.1\n\n"), "0: acl\n");
    assert_eq!(server.answer_to(b"mirror\n127.0.0.1\n4777\nexit\n\n\n"), "0: mirror\n");
}

#[test]
fn the_operator_is_told_who_asks() {
    let server = server();
    server.answer_to(b"status\n\n");
    let from = server.clerk.desk.lock().unwrap().orders[0].1;
    assert_eq!(from.pid, i32::try_from(std::process::id()).unwrap());
    assert_eq!(from.uid, Some(nix::unistd::getuid().as_raw()));
}

#[test]
fn the_log_tells_the_order_who_gave_it_and_what_was_answered() {
    let from = Credentials { pid: 12, uid: Some(1000) };
    assert_eq!(
        account("acl ::1", from, &Reply::success("updated")),
        r#"control socket: "acl ::1" from uid 1000, pid 12: answered "0: updated""#
    );
    let hidden = Credentials { pid: 12, uid: None };
    assert_eq!(
        account("acl ::1", hidden, &Reply::success("updated")),
        r#"control socket: "acl ::1" from a user hidden by PrivateUsers=, pid 12: answered "0: updated""#
    );
}

#[test]
fn nonsense_is_refused_with_a_reason_and_the_next_client_is_served() {
    let server = server();
    let too_long = [b"acl\n".as_slice(), &b"1".repeat(LINE_BYTES_MAX + 1)].concat();
    let too_many = b"x\n".repeat(LINES_MAX + 1);
    let cases: [(&[u8], &str); 5] = [
        (b"\n", "9: missing command\n"),
        (b"\x00\x01\x02\n\n", "10: unknown command\n"),
        (b"\xff\xfe\n\n", "1: line is not UTF-8 text\n"),
        (&too_long, "1: line longer than 256 bytes\n"),
        (&too_many, "1: more than 4096 lines\n"),
    ];
    for (bytes, answer) in cases {
        assert_eq!(server.answer_to(bytes), answer);
    }
    assert_eq!(server.answer_to(b"status\n\n"), "0: status\n");
}

#[test]
fn a_client_that_closes_instead_of_sending_the_empty_line_is_answered() {
    let server = server();
    for (bytes, answer) in [
        (&b"status\n"[..], "0: status\n"),
        (b"", "9: missing command\n"),
        (b"stat", "1: command ends in the middle of a line\n"),
    ] {
        let mut stream = server.connect();
        stream.write_all(bytes).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        assert_eq!(all_of(&mut stream), answer);
    }
}

#[test]
fn a_client_that_goes_silent_is_told_and_closed() {
    let server = server_with(Clerk::new(true), Duration::from_millis(20));
    for bytes in [&b""[..], b"stat", b"status\n"] {
        assert_eq!(server.answer_to(bytes), "1: no progress for 20ms\n");
    }
}

#[test]
fn what_follows_a_command_does_not_spoil_its_answer() {
    let server = server();
    let bytes = [b"status\n\n".as_slice(), &b"more".repeat(10_000)].concat();
    assert_eq!(server.answer_to(&bytes), "0: status\n");
}

#[test]
fn sixteen_clients_are_served_at_once_and_the_others_wait_their_turn() {
    let server = server_with(Clerk::new(false), LONG);
    let mut clients: Vec<_> = (0..20).map(|_| server.connect()).collect();
    for client in &mut clients {
        client.write_all(b"status\n\n").unwrap();
    }
    assert!(server.clerk.comes_to(LONG, |desk| desk.at_once == CONNECTIONS_MAX));
    assert!(
        !server
            .clerk
            .comes_to(Duration::from_millis(100), |desk| { desk.at_once > CONNECTIONS_MAX })
    );
    server.clerk.change(|desk| desk.open = true);
    for client in &mut clients {
        assert_eq!(all_of(client), "0: status\n");
    }
}

#[test]
fn stopping_ends_idle_connections_at_once_and_removes_the_socket() {
    let server = server();
    let mut half_a_command = server.connect();
    half_a_command.write_all(b"stat").unwrap();
    let mut idle = server.connect();
    // Both are being served once a later client has been answered.
    server.answer_to(b"status\n\n");
    server.handle.stop();
    assert_eq!(all_of(&mut idle), "1: the server is stopping\n");
    assert_eq!(all_of(&mut half_a_command), "1: the server is stopping\n");
    assert!(!server.path.exists());
}

#[test]
fn stopping_answers_those_who_were_still_waiting_to_be_accepted() {
    let server = server();
    let mut clients: Vec<_> = (0..CONNECTIONS_MAX + 3).map(|_| server.connect()).collect();
    server.handle.stop();
    for client in &mut clients {
        assert_eq!(all_of(client), "1: the server is stopping\n");
    }
    assert!(!server.path.exists());
}

#[test]
fn a_client_that_gives_its_order_after_it_was_told_to_leave_is_not_cut_off() {
    let (ours, mut client) = UnixStream::pair().unwrap();
    let leaving = thread::spawn(move || {
        answer(&mut &ours, &Reply::refused("stopping"), LONG)?;
        see_off(&mut &ours, LONG)
    });
    assert_eq!(all_of(&mut client), "1: stopping\n");
    client.write_all(b"status\n\n").unwrap();
    drop(client);
    leaving.join().unwrap().unwrap();
}

#[test]
fn a_client_that_does_not_leave_is_not_waited_for() {
    let (ours, _client) = UnixStream::pair().unwrap();
    see_off(&mut &ours, Duration::from_millis(1)).unwrap();
}

#[test]
fn stopping_leaves_those_who_wait_at_a_socket_that_is_not_ours_to_the_next_process() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("control.sock");
    let kept = UnixListener::bind(&path).unwrap();
    let socket = ControlSocket::from_listener(kept.try_clone().unwrap());
    let handle = socket.start(Clerk::new(true)).unwrap();
    handle.stop();
    let client = UnixStream::connect(&path).unwrap();
    kept.accept().unwrap();
    drop(client);
}

#[test]
fn silent_connections_give_way_to_those_that_speak() {
    let server = server();
    let mut silent: Vec<_> = (0..2 * SILENT_MAX).map(|_| server.connect()).collect();
    assert_eq!(server.answer_to(b"status\n\n"), "0: status\n");
    assert_eq!(all_of(&mut silent[0]), "1: no command came while others were waiting\n");
    let last = silent.last_mut().unwrap();
    last.write_all(b"reload\n\n").unwrap();
    assert_eq!(all_of(last), "0: reload\n");
}

#[test]
fn stopping_waits_for_an_order_that_is_being_obeyed() {
    let server = server_with(Clerk::new(false), LONG);
    let mut client = server.connect();
    client.write_all(b"reload\n\n").unwrap();
    assert!(server.clerk.comes_to(LONG, |desk| desk.at_once == 1));
    let clerk = Arc::clone(&server.clerk);
    let stopper = thread::spawn(move || server.handle.stop());
    clerk.change(|desk| desk.open = true);
    stopper.join().unwrap();
    assert_eq!(all_of(&mut client), "0: reload\n");
}

#[test]
fn an_operator_that_panics_costs_one_client_its_answer_and_no_more() {
    let server = server();
    for _ in 0..=CONNECTIONS_MAX {
        assert_eq!(server.answer_to(b"break\n\n"), "");
    }
    assert_eq!(server.answer_to(b"status\n\n"), "0: status\n");
}

#[test]
fn a_wait_is_never_shorter_than_asked_for() {
    let wait = |micros| in_poll_time(Duration::from_micros(micros)).as_millis();
    assert_eq!([wait(0), wait(1), wait(1000), wait(1001)], [0, 1, 1, 2].map(Some));
    assert_eq!(in_poll_time(Duration::MAX), PollTimeout::MAX);
}

#[test]
fn without_a_thread_no_order_waits_for_a_migration() {
    let clerk = Clerk::new(true);
    let operator: Arc<dyn Operator> = Arc::clone(&clerk) as _;
    let shared = ListenerState {
        operator,
        patience: LONG,
        stopping: event().unwrap(),
        freed: event().unwrap(),
        connections: AtomicUsize::new(0),
    };
    for (order, is_obeyed) in
        [("mirror_wait\n::1\n1\nexit\n\n", false), ("mirror\n::1\n1\nexit\n\n", true)]
    {
        let (near, mut far) = UnixStream::pair().unwrap();
        far.write_all(order.as_bytes()).unwrap();
        serve(&near, &shared, LONG, Thread::Shared);
        drop(near);
        let mut reply = String::new();
        far.read_to_string(&mut reply).unwrap();
        assert_eq!(reply.starts_with('0'), is_obeyed, "{reply}");
    }
    assert_eq!(clerk.desk.lock().unwrap().orders.len(), 1);
}
