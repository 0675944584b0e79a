//! Asks on a control socket, ours or the original's: one command, one reply.
//! Never waits without a deadline but for the end of a migration, and never interprets the reply.

use super::command::{Command, NoWireForm};
use super::reply::{NotAReply, Reply};
use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, UnixAddr};
use std::fmt;
use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long an answer may take. A `mirror` is answered when the destination has spoken or failed
/// to, which takes some 15 seconds.
pub const ANSWER_TIME_MAX: Duration = Duration::from_secs(60);
/// Longest answer that is read, in bytes.
pub const REPLY_BYTES_MAX: usize = 64 * 1024;

/// Gives `command` to the server whose control socket is at `path`, and returns what it answers
/// within [`ANSWER_TIME_MAX`].
///
/// # Errors
///
/// One [`AskFailure`] for each reason why there is no reply. A refusal is a reply.
pub fn ask(path: &Path, command: &Command) -> Result<Reply, AskError> {
    ask_within(path, command, ANSWER_TIME_MAX)
}

/// As [`ask`], with `limit` in place of [`ANSWER_TIME_MAX`].
///
/// # Errors
///
/// As [`ask`].
pub fn ask_within(path: &Path, command: &Command, limit: Duration) -> Result<Reply, AskError> {
    let deadline = Instant::now() + limit;
    converse(path, command, deadline, Some(deadline)).map_err(|trouble| at(path, trouble))
}

/// As [`ask`], for an order that is answered when it has been carried out, however long that takes
/// ([`Command::MirrorWait`]): only until it has been given there is a limit.
///
/// # Errors
///
/// As [`ask`]; when the server dies meanwhile, [`AskFailure::NoReply`].
pub fn ask_and_wait(path: &Path, command: &Command) -> Result<Reply, AskError> {
    let deadline = Instant::now() + ANSWER_TIME_MAX;
    converse(path, command, deadline, None).map_err(|trouble| at(path, trouble))
}

fn at(path: &Path, trouble: AskFailure) -> AskError {
    AskError { path: path.to_owned(), trouble }
}

/// Gives the order until `deadline` and waits for the answer until `answer_by`, if there is such.
fn converse(
    path: &Path,
    command: &Command,
    deadline: Instant,
    answer_by: Option<Instant>,
) -> Result<Reply, AskFailure> {
    let wire = command.to_wire().map_err(AskFailure::CannotSay)?;
    let mut stream = connect(path, deadline)?;
    match stream.write_all(&wire) {
        // It closed before it had heard everything; it may still have said why.
        Err(error) if is_hang_up(&error) => {}
        sent => sent.map_err(AskFailure::from)?,
    }
    let line = read_line(&mut stream, answer_by)?;
    if line.is_empty() {
        return Err(AskFailure::NoReply);
    }
    Reply::from_wire(&line).map_err(AskFailure::NotAReply)
}

fn connect(path: &Path, deadline: Instant) -> Result<UnixStream, AskFailure> {
    let dial = || -> io::Result<UnixStream> {
        let flags = SockFlag::SOCK_CLOEXEC;
        let socket = socket::socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
        let stream = UnixStream::from(socket);
        // Also bounds the wait for a place in the server's backlog.
        stream.set_write_timeout(Some(time_until(deadline)?))?;
        socket::connect(stream.as_raw_fd(), &UnixAddr::new(path)?)?;
        Ok(stream)
    };
    dial().map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => AskFailure::NoSuchSocket,
        io::ErrorKind::PermissionDenied => AskFailure::NotPermitted,
        io::ErrorKind::ConnectionRefused if is_socket(path) => AskFailure::NobodyListens,
        io::ErrorKind::ConnectionRefused => AskFailure::NotASocket,
        _ => error.into(),
    })
}

fn is_socket(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|found| found.file_type().is_socket())
}

fn is_hang_up(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset)
}

/// What comes before the first line break or the end, whichever is first.
fn read_line(stream: &mut UnixStream, deadline: Option<Instant>) -> Result<Vec<u8>, AskFailure> {
    let mut line = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        stream.set_read_timeout(deadline.map(time_until).transpose()?)?;
        let count = match stream.read(&mut buffer) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) if is_hang_up(&error) => 0,
            Err(error) => return Err(error.into()),
        };
        let arrived = &buffer[..count];
        let end = arrived.iter().position(|&byte| byte == b'\n');
        line.extend_from_slice(&arrived[..end.unwrap_or(count)]);
        if line.len() > REPLY_BYTES_MAX {
            return Err(AskFailure::ReplyTooLong);
        }
        if end.is_some() || count == 0 {
            return Ok(line);
        }
    }
}

/// Never zero, which sockets take to mean for ever.
fn time_until(deadline: Instant) -> io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(left) }
}

/// Why a server gave no reply. Its `Display` is for the operator.
#[derive(Debug)]
pub struct AskError {
    /// The control socket.
    pub path: PathBuf,
    /// What happened there.
    pub trouble: AskFailure,
}

/// What can happen instead of a reply.
#[derive(Debug)]
pub enum AskFailure {
    /// The command has no wire form; nothing was sent.
    CannotSay(NoWireForm),
    /// Nothing is at the path.
    NoSuchSocket,
    /// Something other than a socket is at the path.
    NotASocket,
    /// A socket is there, but its server is gone.
    NobodyListens,
    /// We may not talk to it.
    NotPermitted,
    /// The server took longer than allowed.
    TooSlow,
    /// The server closed the connection without a word.
    NoReply,
    /// The reply is longer than [`REPLY_BYTES_MAX`].
    ReplyTooLong,
    /// The server said something else.
    NotAReply(NotAReply),
    /// The system said no.
    Io(io::Error),
}

impl From<io::Error> for AskFailure {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Self::TooSlow,
            _ => Self::Io(error),
        }
    }
}

impl fmt::Display for AskError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "control socket {}: {}", self.path.display(), self.trouble)
    }
}

impl fmt::Display for AskFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::CannotSay(reason) => write!(f, "nothing was sent: {reason}"),
            Self::NoSuchSocket => f.write_str("no such socket; is the server running?"),
            Self::NotASocket => f.write_str("this is not a socket"),
            Self::NobodyListens => {
                f.write_str("nobody listens there; the server seems to have died")
            }
            Self::NotPermitted => {
                f.write_str("permission denied; only the server's user and root may control it")
            }
            Self::TooSlow => f.write_str("the server did not answer in time"),
            Self::NoReply => f.write_str("the server closed the connection without an answer"),
            Self::ReplyTooLong => {
                write!(f, "the server's answer is longer than {REPLY_BYTES_MAX} bytes")
            }
            Self::NotAReply(line) => write!(f, "not an answer of a flexnbd server: {line}"),
            Self::Io(error) => write!(f, "{error}"),
        }
    }
}

impl std::error::Error for AskError {}

#[cfg(test)]
mod tests;
