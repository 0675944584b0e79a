//! Answers on the control socket: hears an order, has it obeyed, sends the reply.
//! Never decides what an order means, and never lets a slow or talkative client hold up others.
//!
//! One thread accepts, and keeps connections that have said nothing, since anybody can open those;
//! one thread serves each of the others. All of them wait in `poll` for their sockets or for the order
//! to stop, whichever comes first. A descriptor is kept in reserve, and without a thread left orders
//! are obeyed one after another: operators are answered when clients have used everything up.

use super::command::{Command, CommandError, Incoming};
use super::reply::Reply;
use super::socket::ControlSocket;
use crate::memory_reserve::check_thread_headroom;
use crate::message_id;
use crate::net::visible_user;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
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

/// Most connections served at once; more wait until one of these ends.
pub const CONNECTIONS_MAX: usize = 16;
/// Most connections that have said nothing; the oldest gives way to another one.
pub const SILENT_MAX: usize = 64;
/// How long a connection may make no progress while it has to be served without a thread.
const PATIENCE_ALONE: Duration = Duration::from_secs(1);
/// What an order that would wait there for a migration is answered.
const NO_THREAD_TO_WAIT: &str =
    "the system has no thread left to wait in; mirror without waiting, and look at the status";
/// How long a connection may make no progress.
pub const PATIENCE: Duration = Duration::from_secs(10);
/// How long to let connections wait after one could not be accepted.
const REST: Duration = Duration::from_secs(1);
/// How many bytes that came after the command to take before closing, so that closing does not
/// look like a failure to the client.
const LEFTOVER_BYTES_MAX: usize = 1 << 20;

/// How long the end of the server waits for a client that was told of it to hang up, so that one
/// that is just about to give its order can give it, and then hears the answer.
const LEAVE: Duration = Duration::from_millis(250);

/// Who carries out what operators order.
pub trait Operator: Send + Sync {
    /// Carries out `command` and says how that went. Called from many threads at once; may take
    /// its time, but must return promptly once the server is stopping, since
    /// [`Handle::stop`] waits for it.
    fn obey(&self, command: Command, from: Credentials) -> Reply;
}

/// Who is at the other end, as the kernel knows it (`SO_PEERCRED` of unix(7)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Credentials {
    /// Process id, at the time of connecting.
    pub pid: i32,
    /// User id; none when the user is not in our user namespace.
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
    /// Begins to answer, until the handle is stopped or dropped.
    ///
    /// # Errors
    ///
    /// The system has no thread or descriptor left.
    pub fn start(self, operator: Arc<dyn Operator>) -> io::Result<Handle> {
        self.start_with_patience(operator, PATIENCE)
    }

    fn start_with_patience(
        self,
        operator: Arc<dyn Operator>,
        patience: Duration,
    ) -> io::Result<Handle> {
        self.listener().set_nonblocking(true)?;
        let shared = Arc::new(ListenerState {
            operator,
            patience,
            stopping: event()?,
            freed: event()?,
            connections: AtomicUsize::new(0),
        });
        let for_thread = Arc::clone(&shared);
        let thread = thread::Builder::new()
            .name("control".to_owned())
            .spawn(move || accept_until_stopped(&self, &for_thread))?;
        Ok(Handle { shared, thread: Some(thread) })
    }
}

/// A control socket that answers. Dropping it is the same as [`Handle::stop`].
#[derive(Debug)]
pub struct Handle {
    shared: Arc<ListenerState>,
    thread: Option<JoinHandle<()>>,
}

impl Handle {
    /// Stops answering: waits for orders that are being obeyed, ends all other connections, and
    /// removes the socket if it is ours.
    pub fn stop(self) {
        drop(self);
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        signal(&self.shared.stopping);
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("control socket: a thread panicked; its client got no answer");
        }
    }
}

/// What all threads of one control socket know.
struct ListenerState {
    operator: Arc<dyn Operator>,
    patience: Duration,
    /// Signalled once and never reset: stop.
    stopping: EventFd,
    /// Signalled whenever a connection ends.
    freed: EventFd,
    connections: AtomicUsize,
}

impl fmt::Debug for ListenerState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("connections", &self.connections).finish_non_exhaustive()
    }
}

fn event() -> nix::Result<EventFd> {
    EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
}

fn signal(event: &EventFd) {
    // Fails only when the counter is full, and then it is signalled already.
    let _ = event.write(1);
}

impl ListenerState {
    /// Whether there are as many threads for connections as there may be.
    fn is_full(&self) -> bool {
        self.connections.load(Ordering::SeqCst) >= CONNECTIONS_MAX
    }
}

/// One of the connections that may be served at once; dropping it makes room for another.
struct ClientSlot<'a>(&'a ListenerState);

impl<'a> ClientSlot<'a> {
    fn take(shared: &'a ListenerState) -> Self {
        shared.connections.fetch_add(1, Ordering::SeqCst);
        Self(shared)
    }
}

impl Drop for ClientSlot<'_> {
    fn drop(&mut self) {
        self.0.connections.fetch_sub(1, Ordering::SeqCst);
        signal(&self.0.freed);
    }
}

fn accept_until_stopped(socket: &ControlSocket, shared: &ListenerState) {
    thread::scope(|scope| {
        let mut porch = SilentClients::default();
        loop {
            match porch.wait(socket, shared) {
                Ok(StopSignal::Stop) => return turn_away(scope, socket, shared, porch),
                Ok(StopSignal::LookAgain) => {}
                Ok(StopSignal::Arrival) => porch.accept(socket),
                Err(errno) => {
                    tracing::error!("control socket: cannot wait: {errno}; no longer answering");
                    return;
                }
            }
            for stream in porch.speakers(shared) {
                welcome(scope, stream, shared);
            }
        }
    });
}

/// Nobody else is to come, and whoever has connected is told so: a connection that is closed
/// unaccepted looks like a failure to its client. There are no more than the backlog holds. On a
/// socket that goes on without us they wait for whoever answers there next.
fn turn_away<'scope>(
    scope: &'scope Scope<'scope, '_>,
    socket: &'scope ControlSocket,
    shared: &'scope ListenerState,
    mut porch: SilentClients,
) {
    let is_ours = socket.hide();
    loop {
        for silent in std::mem::take(&mut porch.silent) {
            welcome(scope, silent.stream, shared);
        }
        if !is_ours || !is_readable(socket.listener()) {
            return;
        }
        porch.accept(socket);
        if porch.silent.is_empty() {
            return;
        }
    }
}

enum StopSignal {
    Stop,
    Arrival,
    LookAgain,
}

/// Connections that have been accepted and have said nothing. They have no thread, and the oldest
/// gives way when there are too many.
#[derive(Default)]
struct SilentClients {
    silent: VecDeque<Silent>,
    /// Kept open to be closed when the process has no other descriptor for an operator.
    spare: Option<EventFd>,
    /// Until then nobody is accepted, since the system could not do it.
    resting_until: Option<Instant>,
}

struct Silent {
    stream: UnixStream,
    since: Instant,
}

impl SilentClients {
    /// Waits for a connection, for one of those here to speak, or for the end of a longer silence
    /// than `shared` has patience for.
    fn wait(&mut self, socket: &ControlSocket, shared: &ListenerState) -> nix::Result<StopSignal> {
        let now = Instant::now();
        self.resting_until = self.resting_until.filter(|until| now < *until);
        self.spare = self.spare.take().or_else(|| event().ok());
        let is_full = shared.is_full();
        let mut sources = vec![
            PollFd::new(shared.stopping.as_fd(), PollFlags::POLLIN),
            PollFd::new(shared.freed.as_fd(), PollFlags::POLLIN),
        ];
        let accepts = self.resting_until.is_none() && (!is_full || self.silent.len() < SILENT_MAX);
        let arrivals = if accepts { PollFlags::POLLIN } else { PollFlags::empty() };
        sources.push(PollFd::new(socket.listener().as_fd(), arrivals));
        if !is_full {
            let streams = self.silent.iter().map(|silent| silent.stream.as_fd());
            sources.extend(streams.map(|stream| PollFd::new(stream, PollFlags::POLLIN)));
        }
        let longest = self.silent.front().map(|silent| silent.since + shared.patience);
        let deadline = longest.filter(|_| !is_full).into_iter().chain(self.resting_until).min();
        let timeout = deadline.map_or(PollTimeout::NONE, |deadline| {
            in_poll_time(deadline.saturating_duration_since(now))
        });
        match poll(&mut sources, timeout) {
            Ok(_) => {}
            Err(Errno::EINTR) => return Ok(StopSignal::LookAgain),
            Err(errno) => return Err(errno),
        }
        let happened = |index: usize| sources[index].any().unwrap_or(false);
        let (stopping, freed, arrived) = (happened(0), happened(1), happened(2));
        if freed {
            let _ = shared.freed.read();
        }
        Ok(match (stopping, arrived) {
            (true, _) => StopSignal::Stop,
            (false, true) => StopSignal::Arrival,
            (false, false) => StopSignal::LookAgain,
        })
    }

    /// Accepts one connection. Who has said nothing for longest gives way if there are too many.
    fn accept(&mut self, socket: &ControlSocket) {
        if self.silent.len() >= SILENT_MAX && !self.close_oldest() {
            return;
        }
        let accepted = socket.listener().accept().or_else(|error| match error {
            error if went_away(&error) => Err(error),
            // The last descriptor is for this.
            _ if self.spare.take().is_some() || self.close_oldest() => socket.listener().accept(),
            error => Err(error),
        });
        match accepted {
            Ok((stream, _)) => self.silent.push_back(Silent { stream, since: Instant::now() }),
            Err(error) if went_away(&error) => {}
            Err(error) => {
                tracing::warn!("control socket: cannot accept: {error}; trying again in {REST:?}");
                self.resting_until = Some(Instant::now() + REST);
            }
        }
    }

    /// Closes the connection that has said nothing for longest; false if all have spoken.
    fn close_oldest(&mut self) -> bool {
        let oldest = self.silent.iter().position(|silent| !is_readable(&silent.stream));
        let Some(silent) = oldest.and_then(|oldest| self.silent.remove(oldest)) else {
            return false;
        };
        silent.refuse("no command came while others were waiting");
        true
    }

    /// Takes those out who have spoken, as many as there are seats for, and closes those who have
    /// said nothing for too long.
    fn speakers(&mut self, shared: &ListenerState) -> Vec<UnixStream> {
        let mut speakers = Vec::new();
        for _ in 0..self.silent.len() {
            let Some(silent) = self.silent.pop_front() else { break };
            let seats = CONNECTIONS_MAX.saturating_sub(shared.connections.load(Ordering::SeqCst));
            if is_readable(&silent.stream) && speakers.len() < seats {
                speakers.push(silent.stream);
            } else if silent.since.elapsed() >= shared.patience && !is_readable(&silent.stream) {
                silent.refuse(&format!("no progress for {:?}", shared.patience));
            } else {
                self.silent.push_back(silent);
            }
        }
        speakers
    }
}

impl Silent {
    /// Closes the connection with a reason, which fits into the socket's buffer or is lost.
    fn refuse(self, reason: &str) {
        tracing::debug!("control socket: {reason}, closing a connection");
        let mut stream = self.stream;
        if stream.set_nonblocking(true).is_ok() {
            let _ = stream.write(&Reply::refused(reason).to_wire());
        }
    }
}

/// Whether something has arrived there, or has ended.
fn is_readable(socket: &impl AsFd) -> bool {
    let mut source = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
    poll(&mut source, PollTimeout::ZERO).is_ok_and(|count| count > 0)
}

/// Gives a connection a thread; or serves it here if the system has none left, so that operators
/// can see what is going on.
fn welcome<'scope>(
    scope: &'scope Scope<'scope, '_>,
    stream: UnixStream,
    shared: &'scope ListenerState,
) {
    let seat = ClientSlot::take(shared);
    let stream = Arc::new(stream);
    let for_thread = Arc::clone(&stream);
    let serve_alone = move || {
        serve(&for_thread, shared, shared.patience, Thread::Own);
        drop(seat);
    };
    let thread = thread::Builder::new().name("control-client".to_owned());
    let spawned = check_thread_headroom().and_then(|()| thread.spawn_scoped(scope, serve_alone));
    if let Err(error) = spawned {
        tracing::warn!("control socket: no thread for a client: {error}; others wait meanwhile");
        let _seat = ClientSlot::take(shared);
        serve(&stream, shared, PATIENCE_ALONE.min(shared.patience), Thread::Shared);
    }
}

/// The connection that was to be accepted is not there any more.
fn went_away(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, Interrupted, WouldBlock};
    matches!(error.kind(), ConnectionAborted | Interrupted | WouldBlock)
}

/// The thread that a connection is served by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Thread {
    Own,
    /// Others wait for it.
    Shared,
}

/// One connection, from its first byte to its end.
fn serve(mut stream: &UnixStream, shared: &ListenerState, patience: Duration, thread: Thread) {
    let ended = Credentials::of(stream).and_then(|from| {
        let reply = match hear(&mut stream, shared, patience)? {
            ReadOutcome::Order(Command::MirrorWait(_)) if thread == Thread::Shared => {
                Reply::refused(NO_THREAD_TO_WAIT)
            }
            ReadOutcome::Order(command) => obey(command, from, shared),
            ReadOutcome::Nothing => CommandError::MissingCommand.into(),
            ReadOutcome::Nonsense(refusal) => {
                tracing::warn!("control socket: {refusal} ({from}), closing the connection");
                refusal.into()
            }
            ReadOutcome::Silence => {
                let reason = format!("no progress for {patience:?}");
                tracing::warn!("control socket: {reason} ({from}), closing the connection");
                Reply::refused(reason)
            }
            ReadOutcome::Stop => {
                let told = answer(&mut stream, &Reply::refused("the server is stopping"), LEAVE);
                return told.and_then(|()| see_off(&mut stream, LEAVE));
            }
        };
        answer(&mut stream, &reply, patience)
    });
    if let Err(error) = ended {
        tracing::debug!("control socket: a client went away: {error}");
    }
}

/// What came of listening to a client.
enum ReadOutcome {
    Order(Command),
    /// It closed without a byte, as one does who only wants to know whether we are here.
    Nothing,
    Nonsense(CommandError),
    Silence,
    Stop,
}

fn hear(
    stream: &mut &UnixStream,
    shared: &ListenerState,
    patience: Duration,
) -> io::Result<ReadOutcome> {
    stream.set_nonblocking(true)?;
    let mut incoming = Incoming::default();
    let mut buffer = [0; 4096];
    loop {
        match wait_for_bytes(stream, shared, patience)? {
            Some(Interruption::Stop) => return Ok(ReadOutcome::Stop),
            Some(Interruption::Silence) => return Ok(ReadOutcome::Silence),
            None => {}
        }
        match stream.read(&mut buffer) {
            Ok(0) if incoming.is_empty() => return Ok(ReadOutcome::Nothing),
            Ok(0) => {
                return Ok(incoming.end().map_or_else(ReadOutcome::Nonsense, ReadOutcome::Order));
            }
            Ok(count) => match incoming.feed(&buffer[..count]) {
                Ok(None) => {}
                Ok(Some(command)) => return Ok(ReadOutcome::Order(command)),
                Err(refusal) => return Ok(ReadOutcome::Nonsense(refusal)),
            },
            Err(error) if went_away(&error) => {}
            Err(error) => return Err(error),
        }
    }
}

enum Interruption {
    Stop,
    Silence,
}

fn wait_for_bytes(
    stream: &UnixStream,
    shared: &ListenerState,
    patience: Duration,
) -> io::Result<Option<Interruption>> {
    let deadline = Instant::now() + patience;
    loop {
        let mut sources = [
            PollFd::new(shared.stopping.as_fd(), PollFlags::POLLIN),
            PollFd::new(stream.as_fd(), PollFlags::POLLIN),
        ];
        let left = deadline.saturating_duration_since(Instant::now());
        match poll(&mut sources, in_poll_time(left)) {
            Ok(0) => return Ok(Some(Interruption::Silence)),
            Err(Errno::EINTR) => continue,
            Err(errno) => return Err(errno.into()),
            Ok(_) => {}
        }
        let [stopping, arrived] = sources.map(|source| source.any().unwrap_or(false));
        match (stopping, arrived) {
            (true, _) => return Ok(Some(Interruption::Stop)),
            (false, true) => return Ok(None),
            (false, false) => {}
        }
    }
}

/// Rounded up, so that a wait is never shorter than asked for.
fn in_poll_time(duration: Duration) -> PollTimeout {
    let milliseconds = duration.as_micros().div_ceil(1000);
    i32::try_from(milliseconds).ok().and_then(|ms| ms.try_into().ok()).unwrap_or(PollTimeout::MAX)
}

fn obey(command: Command, from: Credentials, shared: &ListenerState) -> Reply {
    let order = command.changes_something().then(|| command.to_string());
    let word = command.word();
    let reply = shared.operator.obey(command, from);
    if let Some(order) = order {
        let kind = kind(word, reply.is_success());
        tracing::info!(message_id = kind, "{}", account(&order, from, &reply));
    }
    reply
}

/// What kind of event it is that this order was carried out, or was not.
fn kind(word: &str, is_success: bool) -> Option<&'static str> {
    match (word, is_success) {
        ("reload", true) => Some(message_id::RELOADED),
        ("reload", false) => Some(message_id::RELOAD_FAILED),
        ("acl", true) => Some(message_id::ACL_REPLACED),
        _ => None,
    }
}

/// The line in the log for an order that changes something.
fn account(order: &str, from: Credentials, reply: &Reply) -> String {
    format!("control socket: {order:?} from {from}: answered {:?}", reply.to_string())
}

/// Sends the reply, takes what the client may still have sent, and is done.
fn answer(stream: &mut &UnixStream, reply: &Reply, patience: Duration) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_write_timeout(Some(patience))?;
    stream.write_all(&reply.to_wire())?;
    stream.shutdown(Shutdown::Write)?;
    stream.set_nonblocking(true)?;
    let leftovers = (*stream).take(LEFTOVER_BYTES_MAX as u64);
    // Unread bytes would make the client see a reset connection after the reply.
    match io::copy(&mut { leftovers }, &mut io::sink()) {
        Err(error) if error.kind() != io::ErrorKind::WouldBlock => Err(error),
        _ => Ok(()),
    }
}

/// Takes what the client still sends, until it hangs up or has had its time.
fn see_off(stream: &mut &UnixStream, limit: Duration) -> io::Result<()> {
    let deadline = Instant::now() + limit;
    let mut buffer = [0; 4096];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let mut source = [PollFd::new(stream.as_fd(), PollFlags::POLLIN)];
        match poll(&mut source, in_poll_time(left)) {
            Ok(0) => return Ok(()),
            Err(Errno::EINTR) => continue,
            Err(errno) => return Err(errno.into()),
            Ok(_) => {}
        }
        match stream.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Err(error) if !went_away(&error) => return Err(error),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests;
