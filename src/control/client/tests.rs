//! What `client.rs` promises, over real sockets.

use super::*;
use crate::control::command::{ArrivalAction, LINE_BYTES_MAX, LINES_MAX, Mirror};
use crate::control::{ControlSocket, Credentials, Operator};
use nix::sys::socket::Backlog;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::thread;

/// Long enough never to matter.
const LONG: Duration = Duration::from_secs(60);
/// Short, for waits that are meant to end in vain.
const SHORT: Duration = Duration::from_millis(20);

fn directory() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

/// What we make of a server that does `talk` with its first client.
fn asking(
    command: &Command,
    limit: Duration,
    talk: impl FnOnce(UnixStream) + Send,
) -> Result<Reply, AskFailure> {
    let directory = directory();
    let path = directory.path().join("control.sock");
    let listener = UnixListener::bind(&path).unwrap();
    thread::scope(|scope| {
        scope.spawn(move || talk(listener.accept().unwrap().0));
        ask_within(&path, command, limit).map_err(|error| error.trouble)
    })
}

fn asking_one_that_says(answer: &[u8]) -> Result<Reply, AskFailure> {
    asking(&Command::Status, LONG, |mut stream| stream.write_all(answer).unwrap())
}

struct Echo;

impl Operator for Echo {
    fn obey(&self, command: Command, _from: Credentials) -> Reply {
        Reply::success(command.to_string())
    }
}

#[test]
fn our_own_server_understands_us() {
    let directory = directory();
    let path = directory.path().join("control.sock");
    let _handle = ControlSocket::bind(&path).unwrap().start(Arc::new(Echo)).unwrap();
    let entries = vec!["1".repeat(LINE_BYTES_MAX); LINES_MAX - 1];
    for command in [Command::Status, Command::MirrorMaxBps(5), Command::Acl { entries }] {
        assert_eq!(ask(&path, &command).unwrap(), Reply::success(command.to_string()));
    }
}

#[test]
fn exactly_the_wire_form_is_sent() {
    let mut heard = [0; 20];
    let reply = asking(&Command::MirrorMaxBps(1), LONG, |mut stream| {
        stream.read_exact(&mut heard[..18]).unwrap();
        stream.set_nonblocking(true).unwrap();
        assert!(stream.read(&mut heard[18..]).is_err(), "there was more to read");
        stream.write_all(b"1: Not currently mirroring\n").unwrap();
    });
    assert_eq!(reply.unwrap(), Reply::refused("Not currently mirroring"));
    assert_eq!(&heard[..18], b"mirror_max_bps\n1\n\n");
}

#[test]
fn a_reply_may_arrive_in_pieces_or_without_its_line_break() {
    let in_pieces = asking(&Command::Status, LONG, |mut stream| {
        for piece in ["0", ": pi", "d=1\nmore"] {
            stream.write_all(piece.as_bytes()).unwrap();
        }
    });
    assert_eq!(in_pieces.unwrap(), Reply::success("pid=1"));
    assert_eq!(asking_one_that_says(b"0: pid=1").unwrap(), Reply::success("pid=1"));
}

#[test]
fn a_server_that_refuses_before_it_has_heard_everything_is_still_heard() {
    // More than fits the socket's buffers.
    let entries = vec!["1".repeat(LINE_BYTES_MAX); LINES_MAX - 1];
    let reply = asking(&Command::Acl { entries }, LONG, |mut stream| {
        stream.write_all(b"1: enough\n").unwrap();
    });
    assert_eq!(reply.unwrap(), Reply::refused("enough"));
}

#[test]
fn each_kind_of_absence_has_its_own_name() {
    let directory = directory();
    let trouble = |name: &str| {
        ask_within(&directory.path().join(name), &Command::Status, LONG).unwrap_err().trouble
    };
    assert!(matches!(trouble("missing"), AskFailure::NoSuchSocket));
    std::fs::write(directory.path().join("file"), "").unwrap();
    assert!(matches!(trouble("file"), AskFailure::NotASocket));
    drop(UnixListener::bind(directory.path().join("stale")).unwrap());
    assert!(matches!(trouble("stale"), AskFailure::NobodyListens));
    assert!(matches!(trouble(&"x".repeat(200)), AskFailure::Io(_)));
}

#[test]
fn a_server_that_says_nothing_or_nonsense_is_not_taken_for_an_answer() {
    assert!(matches!(asking_one_that_says(b""), Err(AskFailure::NoReply)));
    assert!(matches!(asking_one_that_says(b"\n"), Err(AskFailure::NoReply)));
    let Err(AskFailure::NotAReply(line)) = asking_one_that_says(b"NBDMAGIC") else {
        panic!("this is no answer");
    };
    assert_eq!(line.0, "NBDMAGIC");
}

#[test]
fn a_reply_may_be_65536_bytes_and_not_one_more() {
    let longest = [b"0: ".as_slice(), &b"x".repeat(REPLY_BYTES_MAX - 3), b"\n"].concat();
    assert_eq!(asking_one_that_says(&longest).unwrap().text().len(), REPLY_BYTES_MAX - 3);
    let longer = [b"0: ".as_slice(), &b"x".repeat(REPLY_BYTES_MAX - 2), b"\n"].concat();
    assert!(matches!(asking_one_that_says(&longer), Err(AskFailure::ReplyTooLong)));
}

#[test]
fn a_server_that_does_not_answer_in_time_is_given_up() {
    let silent = asking(&Command::Status, SHORT, |mut stream| {
        // Held open until the asking is over.
        io::copy(&mut stream, &mut io::sink()).unwrap();
    });
    assert!(matches!(silent, Err(AskFailure::TooSlow)), "{silent:?}");
}

#[test]
fn the_end_of_a_migration_is_heard_and_so_is_the_end_of_the_server_before_it() {
    let to = "10.0.0.1:1".parse().unwrap();
    let order =
        Mirror { to, action: ArrivalAction::Exit, bind: None, max_bps: None, no_record: false };
    let asking = |talk: fn(UnixStream)| {
        let directory = directory();
        let path = directory.path().join("control.sock");
        let listener = UnixListener::bind(&path).unwrap();
        thread::scope(|scope| {
            scope.spawn(move || talk(listener.accept().unwrap().0));
            ask_and_wait(&path, &Command::MirrorWait(order.clone())).map_err(|error| error.trouble)
        })
    };
    let done = asking(|mut stream| stream.write_all(b"0: done\n").unwrap());
    assert_eq!(done.unwrap(), Reply::success("done"));
    assert!(matches!(asking(drop), Err(AskFailure::NoReply)));
}

#[test]
fn a_server_that_answers_ever_so_slowly_is_given_up() {
    let slow = asking(&Command::Status, SHORT, |mut stream| {
        while stream.write_all(b"0").is_ok() {
            thread::sleep(Duration::from_millis(1));
        }
    });
    assert!(matches!(slow, Err(AskFailure::TooSlow)), "{slow:?}");
}

#[test]
fn a_server_that_does_not_even_accept_is_given_up() {
    let directory = directory();
    let path = directory.path().join("control.sock");
    let listener = UnixListener::bind(&path).unwrap();
    socket::listen(&listener, Backlog::new(0).unwrap()).unwrap();
    let _fills_the_backlog = UnixStream::connect(&path).unwrap();
    let error = ask_within(&path, &Command::Status, SHORT).unwrap_err();
    assert!(matches!(error.trouble, AskFailure::TooSlow), "{error}");
}

#[test]
fn a_command_without_a_wire_form_is_not_sent() {
    let bad = Command::Acl { entries: vec!["a\nb".to_owned()] };
    let error = ask(Path::new("/nowhere"), &bad).unwrap_err();
    assert!(matches!(error.trouble, AskFailure::CannotSay(_)), "{error}");
}
