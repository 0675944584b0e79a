//! Lets clients in: greets each, and starts a thread for it once it has said something.
//! Waits for all listening sockets and all silent connections at once, and knows nothing of what
//! clients say.

use super::control::StopRequest;
use super::end::SessionEnd;
use super::rejections::RejectReason;
use super::session::Session;
use super::sessions::{AcceptReadiness, AdmissionError, Registration, SuspendedSession};
use super::snapshot::SessionSnapshot;
use super::{ServerShared, Style};
use crate::memory_reserve::check_thread_headroom;
use crate::message_id;
use crate::nbd::handshake::server::ServerHandshake;
use crate::net::{Listener, Peer, Stream, wait_readable};
use nix::sys::resource::{Resource, getrlimit};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};
use tracing::{info, warn};

/// Stack of a session's thread in bytes; its buffers are elsewhere.
const STACK: usize = 256 << 10;
/// How long to wait for a descriptor to become free when there is none.
const SCARCITY: Duration = Duration::from_secs(1);
/// How many connections of one socket to accept before looking at the others.
const BATCH: usize = 64;
/// Length of the client flags in bytes, and of those with the head of an option.
const CLIENT_FLAGS: usize = 4;
const OPTION_HEAD_SENT: i32 = 20;
/// How many descriptors no connection takes, or a quarter where there are few.
const DESCRIPTORS_RESERVED: u64 = 32;

/// Lets clients in until the roster is closed. Those who were accepted by then go on: what becomes of
/// them is for their sessions.
pub(super) fn accept_clients(shared: &Arc<ServerShared>, listeners: &[Listener]) {
    let mut lobby = Lobby::default();
    if let Err(error) = accept_until_closed(shared, listeners, &mut lobby) {
        shared.sessions.events.accepting_failed(&error);
    }
    lobby.enter_all(shared);
    shared.log_last_strangers();
}

fn accept_until_closed(
    shared: &Arc<ServerShared>,
    listeners: &[Listener],
    lobby: &mut Lobby,
) -> io::Result<()> {
    let mut scarce_until: Option<Instant> = None;
    while !shared.sessions.is_closed() {
        shared.sessions.heartbeat.answer();
        let now = Instant::now();
        let counts_due = shared.log_strangers(now);
        lobby.dismiss(shared, now);
        let scarce = scarce_until.filter(|until| now < *until);
        let (accepts, opens_at) = match shared.sessions.entrance(now) {
            _ if scarce.is_some() => (false, scarce),
            AcceptReadiness::Open => (true, None),
            AcceptReadiness::OpensAt(at) => (false, Some(at)),
            AcceptReadiness::Shut => (false, None),
        };
        let accepted_from = if accepts { listeners } else { &[] };
        let mut descriptors: Vec<BorrowedFd<'_>> = vec![shared.sessions.bell.as_fd()];
        descriptors.extend(accepted_from.iter().map(AsFd::as_fd));
        descriptors.extend(lobby.descriptors());
        let deadline = [opens_at, counts_due, lobby.deadline(shared)].into_iter().flatten().min();
        let ready = wait_readable(&descriptors, deadline)?;
        if ready[0] {
            shared.sessions.bell.clear();
            // Whoever has left may have left a descriptor.
            scarce_until = None;
        }
        let (at_doors, in_lobby) = ready[1..].split_at(accepted_from.len());
        lobby.enter(shared, in_lobby);
        for (listener, _) in accepted_from.iter().zip(at_doors).filter(|(_, ready)| **ready) {
            scarce_until = scarce_until.max(accept_waiting(shared, listener, lobby));
        }
    }
    Ok(())
}

/// Accepts those who wait, while there is a place for the next, but not for ever: others wait at
/// other sockets. Returns until when to wait, if the process has no descriptor left.
fn accept_waiting(
    shared: &Arc<ServerShared>,
    listener: &Listener,
    lobby: &mut Lobby,
) -> Option<Instant> {
    for _ in 0..BATCH {
        if shared.sessions.entrance(Instant::now()) != AcceptReadiness::Open {
            return None;
        }
        match accept(shared, listener, lobby) {
            Accepted::One(newcomer) => lobby.0.extend(newcomer),
            Accepted::None => return None,
            Accepted::Scarce(until) => return Some(until),
        }
        lobby.dismiss(shared, Instant::now());
    }
    None
}

/// Connections that have been greeted and have not said anything. They cost a descriptor or two, and
/// no thread, so that they can give way at once.
#[derive(Default)]
struct Lobby(Vec<Newcomer>);

struct Newcomer {
    stream: Stream,
    peer: Peer,
    registration: Registration,
    /// It has sent its flags, and nothing behind them by then.
    has_sent_flags: bool,
}

impl Lobby {
    fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.0.iter().map(|newcomer| newcomer.stream.as_fd())
    }

    /// When the next handshake has taken too long. Old style has none.
    fn deadline(&self, shared: &ServerShared) -> Option<Instant> {
        let limit = (shared.settings.style == Style::Newstyle)
            .then_some(shared.settings.handshake_timeout)?;
        self.0.iter().map(|newcomer| newcomer.registration.since + limit).min()
    }

    /// Closes the connections that were told to leave, or have said nothing for too long.
    fn dismiss(&mut self, shared: &ServerShared, now: Instant) {
        let newstyle = shared.settings.style == Style::Newstyle;
        self.0.retain(|Newcomer { peer, registration, .. }| {
            let end = match registration.orders.current() {
                StopRequest::Serve
                    if newstyle
                        && registration.since + shared.settings.handshake_timeout <= now =>
                {
                    SessionEnd::HandshakeTimeout
                }
                // These are obeyed by a session.
                StopRequest::Serve | StopRequest::PackUp | StopRequest::Finish => return true,
                order => SessionEnd::Ordered(order),
            };
            shared.log_end_in_handshake(peer, registration.id, &end);
            false
        });
    }

    /// Starts sessions for those who have said something, or have gone.
    fn enter(&mut self, shared: &Arc<ServerShared>, ready: &[bool]) {
        let mut ready = ready.iter();
        let said = self.0.extract_if(.., |newcomer| {
            ready.next().is_some_and(|ready| *ready) && !newcomer.has_only_sent_flags()
        });
        said.for_each(|newcomer| newcomer.enter(shared));
    }

    fn enter_all(self, shared: &Arc<ServerShared>) {
        self.0.into_iter().for_each(|newcomer| newcomer.enter(shared));
    }
}

impl Newcomer {
    /// Whether the client has sent good flags and no byte more: then it is heard of again when it
    /// has sent the head of an option.
    fn has_only_sent_flags(&mut self) -> bool {
        if self.has_sent_flags {
            return false; // More has come, or the end.
        }
        let mut words = [0; CLIENT_FLAGS + 1];
        let count = self.stream.peek(&mut words);
        let good =
            words[..CLIENT_FLAGS - 1] == [0; CLIENT_FLAGS - 1] && words[CLIENT_FLAGS - 1] <= 3;
        self.has_sent_flags = matches!(count, Ok(CLIENT_FLAGS))
            && good
            && self.stream.be_readable_from(OPTION_HEAD_SENT);
        self.has_sent_flags
    }

    fn enter(self, shared: &Arc<ServerShared>) {
        let Self { stream, peer, registration, has_sent_flags: _ } = self;
        stream.be_readable_from(1);
        run(shared, stream, peer, registration, None);
    }
}

/// What came of accepting.
enum Accepted {
    /// A connection; none if it was refused.
    One(Option<Newcomer>),
    /// Nobody waits, or nobody is let in any more.
    None,
    /// The system has nothing left for another connection; worth trying again at this time.
    Scarce(Instant),
}

/// Lets one client in.
fn accept(shared: &Arc<ServerShared>, listener: &Listener, lobby: &mut Lobby) -> Accepted {
    let Some(_arriving) = shared.sessions.expect() else { return Accepted::None };
    match listener.accept() {
        Ok((stream, peer)) => {
            let admitted = admit(shared, stream, peer, lobby);
            let admitted = admitted.inspect_err(|why| shared.log_refusal(&peer, *why)).ok();
            Accepted::One(
                admitted
                    .and_then(|(stream, registration)| greet(shared, stream, peer, registration)),
            )
        }
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Accepted::None,
        Err(error) => {
            // A connection that says nothing makes room, if there is one.
            shared.sessions.free_something(Instant::now());
            let nobody = Peer::Unix { pid: None, uid: None };
            if shared.is_worth_a_line(RejectReason::Scarce, &nobody) {
                warn!("cannot accept a client: {error}; trying again when a session has ended");
            }
            Accepted::Scarce(Instant::now() + SCARCITY)
        }
    }
}

/// A place for this client, or why there is none. The last descriptors are for operators and for
/// the disk: another connection takes one of them only if a silent one gives way.
fn admit(
    shared: &ServerShared,
    stream: Stream,
    peer: Peer,
    lobby: &mut Lobby,
) -> Result<(Stream, Registration), AdmissionError> {
    let now = Instant::now();
    if !is_reserved(&stream) {
        return shared.sessions.admit(peer, now).map(|registration| (stream, registration));
    }
    if !shared.sessions.free_something(now) {
        return Err(AdmissionError::NoDescriptors);
    }
    lobby.dismiss(shared, now);
    // The number that has become free: those in use stay the lowest, by which they are counted.
    let stream = stream.at_lowest_number().map_err(|_| AdmissionError::NoDescriptors)?;
    shared.sessions.admit(peer, now).map(|registration| (stream, registration))
}

/// Whether a new connection has one of the last descriptors that the process can have: the kernel
/// always gives the lowest free number.
fn is_reserved(stream: &Stream) -> bool {
    let descriptor = stream.as_fd().as_raw_fd();
    let Ok((limit, _)) = getrlimit(Resource::RLIMIT_NOFILE) else { return false };
    let reserved = DESCRIPTORS_RESERVED.min(limit / 4);
    u64::try_from(descriptor).is_ok_and(|descriptor| descriptor >= limit - reserved)
}

/// Speaks first, as a server does. None if the connection is gone already.
fn greet(
    shared: &Arc<ServerShared>,
    stream: Stream,
    peer: Peer,
    registration: Registration,
) -> Option<Newcomer> {
    // A connection that takes no options is on its way out, which the session will see.
    let _ = stream.tune().and_then(|()| stream.never_block());
    let _ = stream.leave_little_unsent();
    if shared.settings.style == Style::Oldstyle {
        // Who gets at the disk is decided before the greeting, which is all there is.
        run(shared, stream, peer, registration, None);
        return None;
    }
    stream.be_readable_from(CLIENT_FLAGS as i32);
    let mut greeting = Vec::new();
    ServerHandshake::new(shared.export.clone()).greet(&mut greeting);
    // It fits: nothing was sent before it.
    match stream.try_send(&greeting, false) {
        Ok(count) if count == greeting.len() => {
            Some(Newcomer { stream, peer, registration, has_sent_flags: false })
        }
        Ok(_) => None,
        Err(error) => {
            shared.log_end_in_handshake(&peer, registration.id, &SessionEnd::Connection(error));
            None
        }
    }
}

/// Goes on with a session that another process has packed up, or says why not and closes it.
pub(super) fn resume(
    shared: &Arc<ServerShared>,
    SuspendedSession { carried, stream }: SuspendedSession,
) {
    let session = carried.session;
    let greeting_since = carried.is_greeting().then(Instant::now);
    let taken = stream.peer().map_err(|error| error.to_string()).and_then(|peer| {
        let registration = shared.sessions.take_over(session, peer, greeting_since);
        registration
            .map(|registration| (peer, registration))
            .map_err(|why| format!("{peer}: {why}"))
    });
    match taken {
        Ok((peer, registration)) => {
            info!("flexnbd.client" = %peer, "flexnbd.session" = session, "{peer} goes on");
            run(shared, stream, peer, registration, Some(carried));
        }
        Err(why) => warn!("flexnbd.session" = session, "closed a session taken over: {why}"),
    }
}

/// Starts the thread of a session.
fn run(
    shared: &Arc<ServerShared>,
    stream: Stream,
    peer: Peer,
    registration: Registration,
    carried: Option<SessionSnapshot>,
) {
    let (name, for_session) = (format!("client-{}", registration.id), Arc::clone(shared));
    let thread = thread::Builder::new().name(name).stack_size(STACK);
    let started = check_thread_headroom().and_then(|()| {
        thread.spawn(move || serve(&for_session, stream, peer, registration, carried))
    });
    let Err(error) = started else { return };
    // A connection that says nothing makes room for the next, if there is one.
    shared.sessions.free_something(Instant::now());
    if shared.is_worth_a_line(RejectReason::Scarce, &peer) {
        let who = peer.to_string();
        warn!(
            "flexnbd.client" = who,
            "cannot start a thread for {who}: {error}; connection closed"
        );
    }
}

fn serve(
    shared: &ServerShared,
    stream: Stream,
    peer: Peer,
    registration: Registration,
    carried: Option<SessionSnapshot>,
) {
    let id = registration.id;
    let session = Session {
        stream,
        peer,
        registration,
        disk: &shared.disk,
        policy: &*shared.policy,
        export: shared.export.clone(),
        settings: shared.settings,
        cpus: shared.cpus,
    };
    let (end, carried) = session.run(carried);
    shared.policy.closed(id);
    if session.registration.is_seated() || matches!(end, SessionEnd::PackedUp) {
        log_end(&session.peer, id, &end);
    } else {
        shared.log_end_in_handshake(&session.peer, id, &end);
    }
    if let Some(carried) = carried {
        let Session { stream, registration, .. } = session;
        registration.hand_in(SuspendedSession { carried, stream });
    }
}

fn log_end(peer: &Peer, id: u64, end: &SessionEnd) {
    if matches!(end, SessionEnd::PackedUp) {
        info!("flexnbd.client" = %peer, "flexnbd.session" = id, "packed up the session of {peer}");
        return;
    }
    let kind = match end {
        SessionEnd::Stalled => Some(message_id::CLIENT_STALLED),
        SessionEnd::Ordered(StopRequest::NotAdmitted) => Some(message_id::CLIENT_NOT_ADMITTED),
        _ => None,
    };
    if end.is_trouble() {
        warn!(
            message_id = kind, "flexnbd.client" = %peer, "flexnbd.session" = id,
            "closed the session of {peer}: {end}"
        );
    } else {
        info!(
            message_id = kind, "flexnbd.client" = %peer, "flexnbd.session" = id,
            "closed the session of {peer}: {end}"
        );
    }
}
