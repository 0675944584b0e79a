//! The serving side of the control socket: receives commands, passes them to the [`Operator`],
//! sends the replies.
//! Never decides what a command means, and never lets a slow client delay others.
//!
//! One thread accepts connections and keeps the silent ones, since any local user could open many;
//! every other connection has a thread. All threads wait for their sockets and for the request to
//! stop. A file descriptor is kept in reserve, and if no thread can be started, commands are
//! executed one after another: operators get replies even when clients have used up all resources.

use super::command::{Command, CommandError, Incoming};
use super::reply::Reply;
use super::socket::ControlSocket;
use crate::memory_reserve::check_thread_headroom;
use crate::message_id;
use crate::net::{Wake, visible_user, wait_readable};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use std::collections::VecDeque;
use std::fmt;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{self, JoinHandle, Scope};
use std::time::{Duration, Instant};
use tracing::{debug, error, info, warn};

/// Most connections that have a thread; further ones wait until one of these ends.
pub const CONNECTIONS_MAX: usize = 16;
/// Most silent connections; the oldest is closed for a new one.
pub const SILENT_MAX: usize = 64;
/// A connection without progress for this time is closed.
pub const TIMEOUT: Duration = Duration::from_secs(10);
/// The same for a connection without a thread of its own, while others wait.
const TIMEOUT_WITHOUT_THREAD: Duration = Duration::from_secs(1);
/// The reply to a command that would wait for a migration on the only thread.
const NO_THREAD_TO_WAIT: &str =
    "the system has no thread left to wait in; mirror without waiting, and look at the status";
/// Pause after accept(2) has failed.
const ACCEPT_RETRY: Duration = Duration::from_secs(1);
/// Most bytes after the command that are read before closing. Unread bytes would reset the
/// connection, which looks like a failure to the client.
const LEFTOVER_BYTES_MAX: usize = 1 << 20;
/// How long a stopping server waits for a rejected client to close the connection. A client that is
/// about to send its command can then send it, and read the reply.
const REJECTED_LINGER: Duration = Duration::from_millis(250);

/// Executes the commands of operators.
pub trait Operator: Send + Sync {
    /// Executes `command` and returns the result. Called from many threads at once. May take long,
    /// but must return promptly once the server is stopping, since [`Handle::stop`] waits for it.
    fn execute(&self, command: Command, from: Credentials) -> Reply;
}

/// The client's process and user, from the kernel (`SO_PEERCRED` of unix(7)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Credentials {
    /// The process id when it connected.
    pub pid: i32,
    /// The user id; `None` if the user is not in our user namespace.
    pub uid: Option<u32>,
}

impl Credentials {
    fn of(stream: &UnixStream) -> io::Result<Self> {
        let peer = getsockopt(stream, PeerCredentials)?;
        Ok(Self { pid: peer.pid(), uid: visible_user(peer.uid()) })
    }
}

impl fmt::Display for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.uid {
            Some(uid) => write!(f, "uid {uid}, pid {}", self.pid),
            // The service has a user namespace of its own (`PrivateUsers=` of systemd.exec(5)).
            None => write!(f, "a user hidden by PrivateUsers=, pid {}", self.pid),
        }
    }
}

impl ControlSocket {
    /// Starts the threads that serve the socket until the handle is stopped or dropped.
    ///
    /// # Errors
    ///
    /// If no thread or file descriptor is left.
    pub fn start(self, operator: Arc<dyn Operator>) -> io::Result<Handle> {
        self.start_with_timeout(operator, TIMEOUT)
    }

    fn start_with_timeout(
        self,
        operator: Arc<dyn Operator>,
        timeout: Duration,
    ) -> io::Result<Handle> {
        self.listener().set_nonblocking(true)?;
        let state = Arc::new(ListenerState::new(operator, timeout)?);
        let state_of_thread = Arc::clone(&state);
        let thread = thread::Builder::new()
            .name("control".to_owned())
            .spawn(move || accept_until_stopped(&self, &state_of_thread))?;
        Ok(Handle { state, thread: Some(thread) })
    }
}

/// The handle of a control socket that is being served. Dropping it is the same as
/// [`Handle::stop`].
#[derive(Debug)]
pub struct Handle {
    state: Arc<ListenerState>,
    thread: Option<JoinHandle<()>>,
}

impl Handle {
    /// Stops serving: waits for commands that are being executed, ends all other connections, and
    /// removes the socket file if [`ControlSocket::bind`] created it.
    pub fn stop(self) {
        drop(self);
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.state.stopping.wake();
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            error!("control socket: a thread panicked; its client got no answer");
        }
    }
}

/// The state that all threads of a control socket share.
struct ListenerState {
    operator: Arc<dyn Operator>,
    timeout: Duration,
    /// Set once, to stop the threads; never cleared.
    stopping: Wake,
    /// Set whenever a slot is freed.
    freed: Wake,
    /// Slots in use.
    connections: AtomicUsize,
}

impl fmt::Debug for ListenerState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ListenerState")
            .field("connections", &self.connections)
            .finish_non_exhaustive()
    }
}

impl ListenerState {
    fn new(operator: Arc<dyn Operator>, timeout: Duration) -> io::Result<Self> {
        let (stopping, freed) = (Wake::new()?, Wake::new()?);
        Ok(Self { operator, timeout, stopping, freed, connections: AtomicUsize::new(0) })
    }

    fn free_slots(&self) -> usize {
        CONNECTIONS_MAX.saturating_sub(self.connections.load(Ordering::SeqCst))
    }
}

/// One of the [`CONNECTIONS_MAX`] slots for connections with a thread; dropping it frees the slot.
struct ClientSlot<'a>(&'a ListenerState);

impl<'a> ClientSlot<'a> {
    fn take(state: &'a ListenerState) -> Self {
        state.connections.fetch_add(1, Ordering::SeqCst);
        Self(state)
    }
}

impl Drop for ClientSlot<'_> {
    fn drop(&mut self) {
        self.0.connections.fetch_sub(1, Ordering::SeqCst);
        self.0.freed.wake();
    }
}

fn accept_until_stopped(socket: &ControlSocket, state: &ListenerState) {
    thread::scope(|scope| {
        let mut clients = SilentClients::default();
        loop {
            match clients.wait(socket, state) {
                Ok(WaitResult::Stop) => return reject_the_rest(scope, socket, state, clients),
                Ok(WaitResult::Continue) => {}
                Ok(WaitResult::Arrival) => clients.accept(socket),
                Err(error) => {
                    error!("control socket: cannot wait: {error}; no longer answering");
                    return;
                }
            }
            for stream in clients.take_ready(state) {
                serve_on_thread(scope, stream, state);
            }
        }
    });
}

/// Replies to all connected clients that the server is stopping: if a connection is closed before
/// it is accepted, its client reports a failure. The backlog limits their number. Clients of an
/// inherited socket stay in its backlog for the next process.
fn reject_the_rest<'scope>(
    scope: &'scope Scope<'scope, '_>,
    socket: &'scope ControlSocket,
    state: &'scope ListenerState,
    mut clients: SilentClients,
) {
    let is_ours = socket.hide();
    loop {
        for silent in std::mem::take(&mut clients.silent) {
            serve_on_thread(scope, silent.stream, state);
        }
        if !is_ours || !is_readable(socket.listener()) {
            return;
        }
        clients.accept(socket);
        if clients.silent.is_empty() {
            return;
        }
    }
}

/// The event that ended a wait of the accepting thread.
enum WaitResult {
    Stop,
    /// A connection can be accepted.
    Arrival,
    /// Another event; check all connections.
    Continue,
}

/// Accepted connections that have received no byte. They have no thread.
#[derive(Default)]
struct SilentClients {
    /// The oldest first.
    silent: VecDeque<Silent>,
    /// A reserve descriptor, closed to accept an operator when the process has no other left.
    spare: Option<Wake>,
    /// Set after accept(2) has failed: no further attempt before this time.
    retry_at: Option<Instant>,
}

struct Silent {
    stream: UnixStream,
    since: Instant,
}

impl SilentClients {
    /// Waits for a connection, for the first bytes of one, for a free slot, or for the timeout of
    /// the oldest one.
    fn wait(&mut self, socket: &ControlSocket, state: &ListenerState) -> io::Result<WaitResult> {
        let now = Instant::now();
        self.retry_at = self.retry_at.filter(|retry_at| now < *retry_at);
        self.spare = self.spare.take().or_else(|| Wake::new().ok());
        let is_full = state.free_slots() == 0;
        let accepts = self.retry_at.is_none() && (!is_full || self.silent.len() < SILENT_MAX);
        let mut sources = vec![state.stopping.as_fd(), state.freed.as_fd()];
        // While all slots are taken, readable connections must not end the wait.
        if !is_full {
            sources.extend(self.silent.iter().map(|silent| silent.stream.as_fd()));
        }
        if accepts {
            sources.push(socket.listener().as_fd());
        }
        let timeout = self.silent.front().map(|oldest| oldest.since + state.timeout);
        let deadline = timeout.filter(|_| !is_full).into_iter().chain(self.retry_at).min();
        let ready = wait_readable(&sources, deadline)?;
        if ready[1] {
            state.freed.clear();
        }
        Ok(if ready[0] {
            WaitResult::Stop
        } else if accepts && ready.last() == Some(&true) {
            WaitResult::Arrival
        } else {
            WaitResult::Continue
        })
    }

    /// Accepts one connection. If there are too many, the oldest silent one is closed for it.
    fn accept(&mut self, socket: &ControlSocket) {
        if self.silent.len() >= SILENT_MAX && !self.close_oldest() {
            return;
        }
        let accepted = socket.listener().accept().or_else(|error| match error {
            error if is_transient(&error) => Err(error),
            // No descriptor is left: free one, and try once more.
            _ if self.spare.take().is_some() || self.close_oldest() => socket.listener().accept(),
            error => Err(error),
        });
        match accepted {
            Ok((stream, _)) => self.silent.push_back(Silent { stream, since: Instant::now() }),
            Err(error) if is_transient(&error) => {}
            Err(error) => {
                warn!("control socket: cannot accept: {error}; trying again in {ACCEPT_RETRY:?}");
                self.retry_at = Some(Instant::now() + ACCEPT_RETRY);
            }
        }
    }

    /// Closes the oldest connection that has received nothing; false if there is none.
    fn close_oldest(&mut self) -> bool {
        let oldest = self.silent.iter().position(|silent| !is_readable(&silent.stream));
        let Some(silent) = oldest.and_then(|oldest| self.silent.remove(oldest)) else {
            return false;
        };
        silent.refuse("no command came while others were waiting");
        true
    }

    /// Takes connections that have received bytes, as many as there are free slots, and closes
    /// those whose timeout has passed.
    fn take_ready(&mut self, state: &ListenerState) -> Vec<UnixStream> {
        let mut ready = Vec::new();
        for _ in 0..self.silent.len() {
            let Some(silent) = self.silent.pop_front() else { break };
            if is_readable(&silent.stream) && ready.len() < state.free_slots() {
                ready.push(silent.stream);
            } else if silent.since.elapsed() >= state.timeout && !is_readable(&silent.stream) {
                silent.refuse(&format!("no progress for {:?}", state.timeout));
            } else {
                self.silent.push_back(silent);
            }
        }
        ready
    }
}

impl Silent {
    /// Closes the connection with a reason. If the reason does not fit into the socket's buffer, it
    /// is lost.
    fn refuse(self, reason: &str) {
        debug!("control socket: {reason}, closing a connection");
        let mut stream = self.stream;
        if stream.set_nonblocking(true).is_ok() {
            let _ = stream.write(&Reply::refused(reason).to_wire());
        }
    }
}

/// Whether a socket is readable: it has bytes, a connection to accept, or the end of file.
fn is_readable(socket: &impl AsFd) -> bool {
    wait_readable(&[socket.as_fd()], Some(Instant::now())).is_ok_and(|ready| ready[0])
}

/// Serves a connection on a thread of its own; or on this thread if none can be started, so that an
/// operator can still ask for the status.
fn serve_on_thread<'scope>(
    scope: &'scope Scope<'scope, '_>,
    stream: UnixStream,
    state: &'scope ListenerState,
) {
    let slot = ClientSlot::take(state);
    let stream = Arc::new(stream);
    let stream_of_thread = Arc::clone(&stream);
    let serve_alone = move || {
        serve(&stream_of_thread, state, state.timeout, Thread::Own);
        drop(slot);
    };
    let thread = thread::Builder::new().name("control-client".to_owned());
    let spawned = check_thread_headroom().and_then(|()| thread.spawn_scoped(scope, serve_alone));
    if let Err(error) = spawned {
        warn!("control socket: no thread for a client: {error}; others wait meanwhile");
        let _slot = ClientSlot::take(state);
        serve(&stream, state, TIMEOUT_WITHOUT_THREAD.min(state.timeout), Thread::Shared);
    }
}

/// Whether an error of accept(2) or read(2) is transient: neither the system nor the connection has
/// failed.
fn is_transient(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, Interrupted, WouldBlock};
    matches!(error.kind(), ConnectionAborted | Interrupted | WouldBlock)
}

/// The thread that serves a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Thread {
    Own,
    /// The accepting thread, for which other connections wait.
    Shared,
}

/// Serves one connection, from its first byte to its end.
fn serve(mut stream: &UnixStream, state: &ListenerState, timeout: Duration, thread: Thread) {
    let ended = Credentials::of(stream).and_then(|from| {
        let reply = match receive(&mut stream, state, timeout)? {
            Received::Command(Command::MirrorWait(_)) if thread == Thread::Shared => {
                Reply::refused(NO_THREAD_TO_WAIT)
            }
            Received::Command(command) => execute(command, from, state),
            Received::Nothing => CommandError::MissingCommand.into(),
            Received::Invalid(error) => {
                warn!("control socket: {error} ({from}), closing the connection");
                error.into()
            }
            Received::Timeout => {
                let reason = format!("no progress for {timeout:?}");
                warn!("control socket: {reason} ({from}), closing the connection");
                Reply::refused(reason)
            }
            Received::Stop => {
                send_reply(
                    &mut stream,
                    &Reply::refused("the server is stopping"),
                    REJECTED_LINGER,
                )?;
                return drain_until_closed(&mut stream, REJECTED_LINGER);
            }
        };
        send_reply(&mut stream, &reply, timeout)
    });
    if let Err(error) = ended {
        debug!("control socket: a client went away: {error}");
    }
}

/// The input of a client.
enum Received {
    Command(Command),
    /// The client closed without sending a byte, as a probe for the server does.
    Nothing,
    Invalid(CommandError),
    Timeout,
    /// The server stops before the command was complete.
    Stop,
}

fn receive(
    stream: &mut &UnixStream,
    state: &ListenerState,
    timeout: Duration,
) -> io::Result<Received> {
    stream.set_nonblocking(true)?;
    let mut incoming = Incoming::default();
    let mut buffer = [0; 4096];
    loop {
        let sources = [state.stopping.as_fd(), stream.as_fd()];
        match wait_readable(&sources, Some(Instant::now() + timeout))?[..] {
            [false, false] => return Ok(Received::Timeout),
            [false, true] => {}
            _ => return Ok(Received::Stop),
        }
        match stream.read(&mut buffer) {
            Ok(0) if incoming.is_empty() => return Ok(Received::Nothing),
            Ok(0) => return Ok(incoming.end().map_or_else(Received::Invalid, Received::Command)),
            Ok(count) => match incoming.feed(&buffer[..count]) {
                Ok(None) => {}
                Ok(Some(command)) => return Ok(Received::Command(command)),
                Err(error) => return Ok(Received::Invalid(error)),
            },
            Err(error) if is_transient(&error) => {}
            Err(error) => return Err(error),
        }
    }
}

/// Executes a command, and logs it if it changes something.
fn execute(command: Command, from: Credentials, state: &ListenerState) -> Reply {
    let text = command.changes_something().then(|| command.to_string());
    let word = command.word();
    let reply = state.operator.execute(command, from);
    if let Some(text) = text {
        let message_id = message_id_of(word, reply.is_success());
        info!(message_id, "{}", log_text(&text, from, &reply));
    }
    reply
}

/// The message id of a command's result, if it has one.
fn message_id_of(word: &str, is_success: bool) -> Option<&'static str> {
    match (word, is_success) {
        ("reload", true) => Some(message_id::RELOADED),
        ("reload", false) => Some(message_id::RELOAD_FAILED),
        ("acl", true) => Some(message_id::ACL_REPLACED),
        _ => None,
    }
}

fn log_text(command: &str, from: Credentials, reply: &Reply) -> String {
    format!("control socket: {command:?} from {from}: answered {:?}", reply.to_string())
}

/// Sends the reply, shuts down the sending side, and discards the bytes that follow the command.
fn send_reply(stream: &mut &UnixStream, reply: &Reply, timeout: Duration) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_write_timeout(Some(timeout))?;
    stream.write_all(&reply.to_wire())?;
    stream.shutdown(Shutdown::Write)?;
    stream.set_nonblocking(true)?;
    let leftovers = (*stream).take(LEFTOVER_BYTES_MAX as u64);
    match io::copy(&mut { leftovers }, &mut io::sink()) {
        Err(error) if error.kind() != io::ErrorKind::WouldBlock => Err(error),
        _ => Ok(()),
    }
}

/// Discards the client's bytes until it closes the connection or `limit` has passed.
fn drain_until_closed(stream: &mut &UnixStream, limit: Duration) -> io::Result<()> {
    let deadline = Instant::now() + limit;
    let mut buffer = [0; 4096];
    while wait_readable(&[stream.as_fd()], Some(deadline))?[0] {
        match stream.read(&mut buffer) {
            Ok(0) => break,
            Err(error) if !is_transient(&error) => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
