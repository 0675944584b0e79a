//! Tests of `listener.rs` over real sockets.

use super::*;
use crate::control::command::{LINE_BYTES_MAX, LINES_MAX};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::{Condvar, Mutex};

/// A timeout that never expires in a test.
const LONG: Duration = Duration::from_secs(60);

/// An operator that records its commands and replies with the command's word once it is open.
struct Recorder {
    state: Mutex<Recorded>,
    changed: Condvar,
}

#[derive(Default)]
struct Recorded {
    commands: Vec<(Command, Credentials)>,
    /// Commands being executed.
    running: usize,
    is_open: bool,
}

impl Recorder {
    fn new(is_open: bool) -> Arc<Self> {
        let state = Mutex::new(Recorded { is_open, ..Recorded::default() });
        Arc::new(Self { state, changed: Condvar::new() })
    }

    fn open(&self) {
        self.change(|state| state.is_open = true);
    }

    fn change(&self, change: impl FnOnce(&mut Recorded)) {
        change(&mut self.state.lock().unwrap());
        self.changed.notify_all();
    }

    /// Whether the condition becomes true within `limit`.
    fn reaches(&self, limit: Duration, condition: impl Fn(&Recorded) -> bool) -> bool {
        let state = self.state.lock().unwrap();
        let (state, _) =
            self.changed.wait_timeout_while(state, limit, |state| !condition(state)).unwrap();
        condition(&state)
    }
}

impl Operator for Recorder {
    fn execute(&self, command: Command, from: Credentials) -> Reply {
        assert_ne!(command, Command::Break, "this command makes the operator panic");
        let reply = Reply::success(command.word());
        self.change(|state| {
            state.commands.push((command, from));
            state.running += 1;
        });
        assert!(self.reaches(LONG, |state| state.is_open));
        self.change(|state| state.running -= 1);
        reply
    }
}

struct Server {
    operator: Arc<Recorder>,
    handle: Handle,
    path: PathBuf,
    _directory: tempfile::TempDir,
}

fn server_with(operator: Arc<Recorder>, timeout: Duration) -> Server {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("control.sock");
    let socket = ControlSocket::bind(&path).unwrap();
    let handle = socket.start_with_timeout(Arc::clone(&operator) as _, timeout).unwrap();
    Server { operator, handle, path, _directory: directory }
}

fn server() -> Server {
    server_with(Recorder::new(true), LONG)
}

impl Server {
    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.path).unwrap();
        stream.set_read_timeout(Some(LONG)).unwrap();
        stream
    }

    /// The reply to exactly these bytes; our side of the connection stays open.
    fn reply_to(&self, bytes: &[u8]) -> String {
        let mut stream = self.connect();
        stream.write_all(bytes).unwrap();
        read_to_end(&mut stream)
    }
}

fn read_to_end(stream: &mut UnixStream) -> String {
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}

#[test]
fn a_command_gets_a_reply_of_one_line() {
    let server = server();
    assert_eq!(server.reply_to(b"status\n\n"), "0: status\n");
    assert_eq!(server.reply_to(b"acl\n127.0.0.1\n\n"), "0: acl\n");
    assert_eq!(server.reply_to(b"mirror\n127.0.0.1\n4777\nexit\n\n\n"), "0: mirror\n");
}

#[test]
fn the_operator_gets_the_credentials_of_the_client() {
    let server = server();
    server.reply_to(b"status\n\n");
    let from = server.operator.state.lock().unwrap().commands[0].1;
    assert_eq!(from.pid, i32::try_from(std::process::id()).unwrap());
    assert_eq!(from.uid, Some(nix::unistd::getuid().as_raw()));
}

#[test]
fn the_log_has_command_credentials_and_reply() {
    let from = Credentials { pid: 12, uid: Some(1000) };
    assert_eq!(
        log_text("acl ::1", from, &Reply::success("updated")),
        r#"control socket: "acl ::1" from uid 1000, pid 12: answered "0: updated""#
    );
    let hidden = Credentials { pid: 12, uid: None };
    assert_eq!(
        log_text("acl ::1", hidden, &Reply::success("updated")),
        r#"control socket: "acl ::1" from a user hidden by PrivateUsers=, pid 12: answered "0: updated""#
    );
}

#[test]
fn an_invalid_command_is_refused_with_a_reason() {
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
    for (bytes, reply) in cases {
        assert_eq!(server.reply_to(bytes), reply);
    }
    assert_eq!(server.reply_to(b"status\n\n"), "0: status\n");
}

#[test]
fn end_of_file_ends_a_command() {
    let server = server();
    for (bytes, reply) in [
        (&b"status\n"[..], "0: status\n"),
        (b"", "9: missing command\n"),
        (b"stat", "1: command ends in the middle of a line\n"),
    ] {
        let mut stream = server.connect();
        stream.write_all(bytes).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        assert_eq!(read_to_end(&mut stream), reply);
    }
}

#[test]
fn a_silent_client_is_refused_after_the_timeout() {
    let server = server_with(Recorder::new(true), Duration::from_millis(20));
    for bytes in [&b""[..], b"stat", b"status\n"] {
        assert_eq!(server.reply_to(bytes), "1: no progress for 20ms\n");
    }
}

#[test]
fn bytes_after_a_command_are_ignored() {
    let server = server();
    let bytes = [b"status\n\n".as_slice(), &b"more".repeat(10_000)].concat();
    assert_eq!(server.reply_to(&bytes), "0: status\n");
}

#[test]
fn sixteen_clients_are_served_at_once() {
    let server = server_with(Recorder::new(false), LONG);
    let mut clients: Vec<_> = (0..20).map(|_| server.connect()).collect();
    for client in &mut clients {
        client.write_all(b"status\n\n").unwrap();
    }
    assert!(server.operator.reaches(LONG, |state| state.running == CONNECTIONS_MAX));
    let short = Duration::from_millis(100);
    assert!(!server.operator.reaches(short, |state| state.running > CONNECTIONS_MAX));
    server.operator.open();
    for client in &mut clients {
        assert_eq!(read_to_end(client), "0: status\n");
    }
}

#[test]
fn stopping_ends_connections_and_removes_the_socket() {
    let server = server();
    let mut half_a_command = server.connect();
    half_a_command.write_all(b"stat").unwrap();
    let mut idle = server.connect();
    // Once a later client has its reply, both connections are accepted.
    server.reply_to(b"status\n\n");
    server.handle.stop();
    assert_eq!(read_to_end(&mut idle), "1: the server is stopping\n");
    assert_eq!(read_to_end(&mut half_a_command), "1: the server is stopping\n");
    assert!(!server.path.exists());
}

#[test]
fn stopping_refuses_connections_in_the_backlog() {
    let server = server();
    let mut clients: Vec<_> = (0..CONNECTIONS_MAX + 3).map(|_| server.connect()).collect();
    server.handle.stop();
    for client in &mut clients {
        assert_eq!(read_to_end(client), "1: the server is stopping\n");
    }
    assert!(!server.path.exists());
}

#[test]
fn a_command_after_the_refusal_resets_no_connection() {
    let (ours, mut client) = UnixStream::pair().unwrap();
    let server = thread::spawn(move || {
        send_reply(&mut &ours, &Reply::refused("stopping"), LONG)?;
        drain_until_closed(&mut &ours, LONG)
    });
    assert_eq!(read_to_end(&mut client), "1: stopping\n");
    client.write_all(b"status\n\n").unwrap();
    drop(client);
    server.join().unwrap().unwrap();
}

#[test]
fn draining_ends_at_its_limit() {
    let (ours, _client) = UnixStream::pair().unwrap();
    drain_until_closed(&mut &ours, Duration::from_millis(1)).unwrap();
}

#[test]
fn stopping_leaves_the_backlog_of_an_inherited_socket() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("control.sock");
    let kept = UnixListener::bind(&path).unwrap();
    let socket = ControlSocket::from_listener(kept.try_clone().unwrap());
    let handle = socket.start(Recorder::new(true)).unwrap();
    handle.stop();
    let client = UnixStream::connect(&path).unwrap();
    kept.accept().unwrap();
    drop(client);
}

#[test]
fn the_oldest_silent_connection_is_closed_for_a_new_one() {
    let server = server();
    let mut silent: Vec<_> = (0..2 * SILENT_MAX).map(|_| server.connect()).collect();
    assert_eq!(server.reply_to(b"status\n\n"), "0: status\n");
    assert_eq!(read_to_end(&mut silent[0]), "1: no command came while others were waiting\n");
    let last = silent.last_mut().unwrap();
    last.write_all(b"reload\n\n").unwrap();
    assert_eq!(read_to_end(last), "0: reload\n");
}

#[test]
fn stopping_waits_for_a_running_command() {
    let server = server_with(Recorder::new(false), LONG);
    let mut client = server.connect();
    client.write_all(b"reload\n\n").unwrap();
    assert!(server.operator.reaches(LONG, |state| state.running == 1));
    let operator = Arc::clone(&server.operator);
    let stopper = thread::spawn(move || server.handle.stop());
    operator.open();
    stopper.join().unwrap();
    assert_eq!(read_to_end(&mut client), "0: reload\n");
}

#[test]
fn a_panic_of_the_operator_ends_one_connection() {
    let server = server();
    for _ in 0..=CONNECTIONS_MAX {
        assert_eq!(server.reply_to(b"break\n\n"), "");
    }
    assert_eq!(server.reply_to(b"status\n\n"), "0: status\n");
}

#[test]
fn without_a_thread_no_command_waits_for_a_migration() {
    let operator = Recorder::new(true);
    let state = ListenerState::new(Arc::clone(&operator) as _, LONG).unwrap();
    for (command, is_executed) in
        [("mirror_wait\n::1\n1\nexit\n\n", false), ("mirror\n::1\n1\nexit\n\n", true)]
    {
        let (near, mut far) = UnixStream::pair().unwrap();
        far.write_all(command.as_bytes()).unwrap();
        serve(&near, &state, LONG, Thread::Shared);
        drop(near);
        let reply = read_to_end(&mut far);
        assert_eq!(reply.starts_with('0'), is_executed, "{reply}");
    }
    assert_eq!(operator.state.lock().unwrap().commands.len(), 1);
}
