//! Tests of `client.rs` over real sockets.

use super::*;
use crate::control::command::{LINE_BYTES_MAX, LINES_MAX, Mirror};
use crate::control::{ControlSocket, Credentials, Operator};
use nix::sys::socket::Backlog;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::thread;

/// A timeout that never expires in a test.
const LONG: Duration = Duration::from_secs(60);
/// A timeout that a test waits for.
const SHORT: Duration = Duration::from_millis(20);

fn directory() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

/// The result of `command` to a server that runs `talk` for its first client.
fn ask_server(
    command: &Command,
    limit: Duration,
    talk: impl FnOnce(UnixStream) + Send,
) -> Result<Reply, AskFailure> {
    let directory = directory();
    let path = directory.path().join("control.sock");
    let listener = UnixListener::bind(&path).unwrap();
    thread::scope(|scope| {
        scope.spawn(move || talk(listener.accept().unwrap().0));
        ask_within(&path, command, limit).map_err(|error| error.failure)
    })
}

fn ask_server_that_sends(reply: &[u8]) -> Result<Reply, AskFailure> {
    ask_server(&Command::Status, LONG, |mut stream| stream.write_all(reply).unwrap())
}

struct Echo;

impl Operator for Echo {
    fn execute(&self, command: Command, _from: Credentials) -> Reply {
        Reply::success(command.to_string())
    }
}

#[test]
fn our_server_executes_our_commands() {
    let directory = directory();
    let path = directory.path().join("control.sock");
    let _handle = ControlSocket::bind(&path).unwrap().start(Arc::new(Echo)).unwrap();
    let entries = vec!["1".repeat(LINE_BYTES_MAX); LINES_MAX - 1];
    for command in [Command::Status, Command::MirrorMaxBps(5), Command::Acl { entries }] {
        assert_eq!(ask(&path, &command).unwrap(), Reply::success(command.to_string()));
    }
}

#[test]
fn the_encoded_command_is_sent() {
    let mut received = [0; 20];
    let reply = ask_server(&Command::MirrorMaxBps(1), LONG, |mut stream| {
        stream.read_exact(&mut received[..18]).unwrap();
        stream.set_nonblocking(true).unwrap();
        assert!(stream.read(&mut received[18..]).is_err(), "more bytes");
        stream.write_all(b"1: Not currently mirroring\n").unwrap();
    });
    assert_eq!(reply.unwrap(), Reply::refused("Not currently mirroring"));
    assert_eq!(&received[..18], b"mirror_max_bps\n1\n\n");
}

#[test]
fn a_reply_may_be_split_or_lack_its_line_break() {
    let in_pieces = ask_server(&Command::Status, LONG, |mut stream| {
        for piece in ["0", ": pi", "d=1\nmore"] {
            stream.write_all(piece.as_bytes()).unwrap();
        }
    });
    assert_eq!(in_pieces.unwrap(), Reply::success("pid=1"));
    assert_eq!(ask_server_that_sends(b"0: pid=1").unwrap(), Reply::success("pid=1"));
}

#[test]
fn a_refusal_of_an_incomplete_command_is_read() {
    // Longer than the socket's buffers.
    let entries = vec!["1".repeat(LINE_BYTES_MAX); LINES_MAX - 1];
    let reply = ask_server(&Command::Acl { entries }, LONG, |mut stream| {
        stream.write_all(b"1: enough\n").unwrap();
    });
    assert_eq!(reply.unwrap(), Reply::refused("enough"));
}

#[test]
fn each_cause_of_a_failed_connection_has_its_error() {
    let directory = directory();
    let failure = |name: &str| {
        ask_within(&directory.path().join(name), &Command::Status, LONG).unwrap_err().failure
    };
    assert!(matches!(failure("missing"), AskFailure::NoSuchSocket));
    std::fs::write(directory.path().join("file"), "").unwrap();
    assert!(matches!(failure("file"), AskFailure::NotASocket));
    drop(UnixListener::bind(directory.path().join("stale")).unwrap());
    assert!(matches!(failure("stale"), AskFailure::NotListening));
    assert!(matches!(failure(&"x".repeat(200)), AskFailure::Io(_)));
}

#[test]
fn an_empty_or_invalid_reply_is_an_error() {
    assert!(matches!(ask_server_that_sends(b""), Err(AskFailure::NoReply)));
    assert!(matches!(ask_server_that_sends(b"\n"), Err(AskFailure::NoReply)));
    let Err(AskFailure::NotAReply(line)) = ask_server_that_sends(b"NBDMAGIC") else {
        panic!("this is no reply");
    };
    assert_eq!(line.0, "NBDMAGIC");
}

#[test]
fn a_reply_has_at_most_65536_bytes() {
    let longest = [b"0: ".as_slice(), &b"x".repeat(REPLY_BYTES_MAX - 3), b"\n"].concat();
    assert_eq!(ask_server_that_sends(&longest).unwrap().text().len(), REPLY_BYTES_MAX - 3);
    let longer = [b"0: ".as_slice(), &b"x".repeat(REPLY_BYTES_MAX - 2), b"\n"].concat();
    assert!(matches!(ask_server_that_sends(&longer), Err(AskFailure::ReplyTooLong)));
}

#[test]
fn a_missing_reply_is_a_timeout() {
    let silent = ask_server(&Command::Status, SHORT, |mut stream| {
        // Keeps the connection open until the client closes it.
        io::copy(&mut stream, &mut io::sink()).unwrap();
    });
    assert!(matches!(silent, Err(AskFailure::Timeout)), "{silent:?}");
}

#[test]
fn mirror_wait_ends_with_the_migration_or_the_server() {
    let mirror = Mirror::plain("10.0.0.1:1");
    let ask_server = |talk: fn(UnixStream)| {
        let directory = directory();
        let path = directory.path().join("control.sock");
        let listener = UnixListener::bind(&path).unwrap();
        thread::scope(|scope| {
            scope.spawn(move || talk(listener.accept().unwrap().0));
            ask_and_wait(&path, &Command::MirrorWait(mirror.clone())).map_err(|error| error.failure)
        })
    };
    let done = ask_server(|mut stream| stream.write_all(b"0: done\n").unwrap());
    assert_eq!(done.unwrap(), Reply::success("done"));
    assert!(matches!(ask_server(drop), Err(AskFailure::NoReply)));
}

#[test]
fn a_slow_reply_is_a_timeout() {
    let slow = ask_server(&Command::Status, SHORT, |mut stream| {
        while stream.write_all(b"0").is_ok() {
            thread::sleep(Duration::from_millis(1));
        }
    });
    assert!(matches!(slow, Err(AskFailure::Timeout)), "{slow:?}");
}

#[test]
fn a_full_backlog_is_a_timeout() {
    let directory = directory();
    let path = directory.path().join("control.sock");
    let listener = UnixListener::bind(&path).unwrap();
    socket::listen(&listener, Backlog::new(0).unwrap()).unwrap();
    let _fills_the_backlog = UnixStream::connect(&path).unwrap();
    let error = ask_within(&path, &Command::Status, SHORT).unwrap_err();
    assert!(matches!(error.failure, AskFailure::Timeout), "{error}");
}

#[test]
fn a_command_that_cannot_be_encoded_is_not_sent() {
    let bad = Command::Acl { entries: vec!["a\nb".to_owned()] };
    let error = ask(Path::new("/nowhere"), &bad).unwrap_err();
    assert!(matches!(error.failure, AskFailure::NotSendable(_)), "{error}");
}
