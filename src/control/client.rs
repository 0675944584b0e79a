//! The client of the control sockets of flexnbd and of the original flexnbd: one command, one
//! reply. Every wait has a deadline, except the wait for the end of a migration.
//! Never interprets the reply.

use super::command::{Command, CommandEncodeError};
use super::reply::{NotAReply, Reply};
use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, UnixAddr};
use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Time limit for a reply. The server replies to `mirror` when the destination has accepted or
/// failed, which takes up to about 15 seconds.
pub const REPLY_TIMEOUT: Duration = Duration::from_secs(60);
/// Longest accepted reply in bytes.
pub const REPLY_BYTES_MAX: usize = 64 * 1024;

/// Sends `command` to the control socket at `path`, and returns the reply, if it is received within
/// [`REPLY_TIMEOUT`].
///
/// # Errors
///
/// One [`AskFailure`] for each reason why there is no reply. A refusal is a reply.
pub fn ask(path: &Path, command: &Command) -> Result<Reply, AskError> {
    ask_within(path, command, REPLY_TIMEOUT)
}

/// As [`ask`], with `limit` in place of [`REPLY_TIMEOUT`].
///
/// # Errors
///
/// As [`ask`].
pub fn ask_within(path: &Path, command: &Command, limit: Duration) -> Result<Reply, AskError> {
    let deadline = Instant::now() + limit;
    exchange(path, command, deadline, Some(deadline)).map_err(|failure| at(path, failure))
}

/// As [`ask`], without a time limit once the command has been sent: for [`Command::MirrorWait`], to
/// which the server replies when the migration has ended.
///
/// # Errors
///
/// As [`ask`]; [`AskFailure::NoReply`] if the server dies meanwhile.
pub fn ask_and_wait(path: &Path, command: &Command) -> Result<Reply, AskError> {
    let deadline = Instant::now() + REPLY_TIMEOUT;
    exchange(path, command, deadline, None).map_err(|failure| at(path, failure))
}

fn at(path: &Path, failure: AskFailure) -> AskError {
    AskError { path: path.to_owned(), failure }
}

/// Sends the command until `deadline` and receives the reply until `reply_deadline` (`None`:
/// without limit).
fn exchange(
    path: &Path,
    command: &Command,
    deadline: Instant,
    reply_deadline: Option<Instant>,
) -> Result<Reply, AskFailure> {
    let wire = command.to_wire().map_err(AskFailure::NotSendable)?;
    let mut stream = connect(path, deadline)?;
    match stream.write_all(&wire) {
        // The server closed before it had received everything; the reason may be in its reply.
        Err(error) if is_hang_up(&error) => {}
        sent => sent.map_err(AskFailure::from)?,
    }
    let line = read_line(&mut stream, reply_deadline)?;
    if line.is_empty() {
        return Err(AskFailure::NoReply);
    }
    Reply::from_wire(&line).map_err(AskFailure::NotAReply)
}

fn connect(path: &Path, deadline: Instant) -> Result<UnixStream, AskFailure> {
    let connect = || -> io::Result<UnixStream> {
        let flags = SockFlag::SOCK_CLOEXEC;
        let socket = socket::socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
        let stream = UnixStream::from(socket);
        // The timeout also limits the wait for a place in the server's backlog.
        stream.set_write_timeout(Some(time_until(deadline)?))?;
        socket::connect(stream.as_raw_fd(), &UnixAddr::new(path)?)?;
        Ok(stream)
    };
    connect().map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => AskFailure::NoSuchSocket,
        io::ErrorKind::PermissionDenied => AskFailure::NotPermitted,
        io::ErrorKind::ConnectionRefused if is_socket(path) => AskFailure::NotListening,
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

/// Reads up to the first line break or the end of the stream.
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

/// The time until `deadline`, never zero: a socket timeout of zero means none.
fn time_until(deadline: Instant) -> io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(left) }
}

/// Why there is no reply; the text is for the operator.
#[derive(Debug, thiserror::Error)]
#[error("control socket {}: {failure}", path.display())]
pub struct AskError {
    /// The control socket.
    pub path: PathBuf,
    /// The reason.
    pub failure: AskFailure,
}

/// The reasons why there is no reply.
#[derive(Debug, thiserror::Error)]
pub enum AskFailure {
    /// The command cannot be encoded; nothing was sent.
    #[error("nothing was sent: {0}")]
    NotSendable(CommandEncodeError),
    /// The path does not exist.
    #[error("no such socket; is the server running?")]
    NoSuchSocket,
    /// The path is not a socket.
    #[error("this is not a socket")]
    NotASocket,
    /// The socket exists, but no process listens.
    #[error("no process listens there; the server seems to have died")]
    NotListening,
    /// We have no permission to connect.
    #[error("permission denied; only the server's user and root may control it")]
    NotPermitted,
    /// The time limit has passed.
    #[error("the server did not answer in time")]
    Timeout,
    /// The server closed the connection without a reply.
    #[error("the server closed the connection without an answer")]
    NoReply,
    /// The reply is longer than [`REPLY_BYTES_MAX`].
    #[error("the server's answer is longer than {REPLY_BYTES_MAX} bytes")]
    ReplyTooLong,
    /// The line is no reply.
    #[error("not an answer of a flexnbd server: {0}")]
    NotAReply(NotAReply),
    /// A system call failed.
    #[error("{0}")]
    Io(io::Error),
}

impl From<io::Error> for AskFailure {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Self::Timeout,
            _ => Self::Io(error),
        }
    }
}

#[cfg(test)]
mod tests;
