//! The acceptor: accepts and greets connections, and starts a session's thread once a client has sent
//! something. One `poll` waits for all listening sockets and all silent connections. Never parses
//! what clients send.

use super::end::SessionEnd;
use super::rejections::RejectReason;
use super::session::{EndedSession, Session};
use super::sessions::{AcceptReadiness, AdmissionError, Registration, SuspendedSession};
use super::settings::Style;
use super::shared::ServerShared;
use super::snapshot::SessionSnapshot;
use super::stop_request::StopRequest;
use crate::memory_reserve::check_thread_headroom;
use crate::message_id;
use crate::nbd::handshake::server::ServerHandshake;
use crate::nbd::introduction::Introduction;
use crate::net::tls::TlsMode;
use crate::net::{Listener, Peer, Stream, wait_readable};
use crate::systemd::log_limit::PERIOD;
use nix::sys::resource::{Resource, getrlimit};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};
use tracing::{info, warn};

/// Stack of a session's thread in bytes; its buffers are elsewhere.
const STACK: usize = 256 << 10;
/// How long to wait before accepting again when the process or the system had no descriptor left.
const SCARCITY_BACKOFF: Duration = Duration::from_secs(1);
/// How many connections of one socket to accept before polling the others.
const BATCH: usize = 64;
/// Length of the client flags in bytes.
const CLIENT_FLAGS: usize = 4;
/// Length of the client flags and the header of the first option in bytes.
const FLAGS_AND_OPTION_HEADER: i32 = 20;
/// Why a session of the previous process is closed whose client has introduced itself in another way.
const UNKNOWN_CLIENT: &str = "its client's introduction is in no form that this program knows";
/// How many descriptors connections never take; a quarter of the limit if that is less.
const DESCRIPTORS_RESERVED: u64 = 32;

/// Accepts clients until the server stops accepting. Connections accepted by then get sessions, which
/// end by themselves.
pub(super) fn accept_clients(shared: &Arc<ServerShared>, listeners: &[Listener]) {
    let mut silent = SilentConnections::default();
    if let Err(error) = accept_until_closed(shared, listeners, &mut silent) {
        shared.sessions.events.accepting_failed(&error);
    }
    silent.start_all(shared);
    shared.rejections.log_remaining_counts();
    log_unlogged(shared, Instant::now() + PERIOD);
}

/// Logs how many sessions were not logged, and returns when to do so again.
fn log_unlogged(shared: &ServerShared, now: Instant) -> Option<Instant> {
    let (counts, due) = shared.sessions.take_unlogged(now);
    for (network, count) in counts {
        let origin = network.map_or_else(|| "elsewhere".to_owned(), |network| network.to_string());
        info!(
            "flexnbd.client" = origin,
            "flexnbd.clients" = count,
            "{count} more sessions of {origin} began and were not logged"
        );
    }
    due
}

fn accept_until_closed(
    shared: &Arc<ServerShared>,
    listeners: &[Listener],
    silent: &mut SilentConnections,
) -> io::Result<()> {
    let mut scarce_until: Option<Instant> = None;
    while !shared.sessions.is_closed() {
        shared.sessions.heartbeat.answer();
        let now = Instant::now();
        let counts_due = shared.rejections.log_counts(now);
        let unlogged_due = log_unlogged(shared, now);
        silent.close_ended(shared, now);
        let scarce = scarce_until.filter(|until| now < *until);
        let (accepts, ready_at) = match shared.sessions.accept_readiness(now) {
            _ if scarce.is_some() => (false, scarce),
            AcceptReadiness::Ready => (true, None),
            AcceptReadiness::ReadyAt(at) => (false, Some(at)),
            AcceptReadiness::NotReady => (false, None),
        };
        let accepted_from = if accepts { listeners } else { &[] };
        let mut descriptors: Vec<BorrowedFd<'_>> = vec![shared.sessions.acceptor_wake.as_fd()];
        descriptors.extend(accepted_from.iter().map(AsFd::as_fd));
        descriptors.extend(silent.descriptors());
        let deadline = [ready_at, counts_due, unlogged_due, silent.deadline(shared)]
            .into_iter()
            .flatten()
            .min();
        let ready = wait_readable(&descriptors, deadline)?;
        if ready[0] {
            shared.sessions.acceptor_wake.clear();
            // A session that has ended may have freed a descriptor.
            scarce_until = None;
        }
        let (listeners_ready, silent_ready) = ready[1..].split_at(accepted_from.len());
        silent.start_ready(shared, silent_ready);
        for (listener, _) in accepted_from.iter().zip(listeners_ready).filter(|(_, ready)| **ready)
        {
            scarce_until = scarce_until.max(accept_batch(shared, listener, silent));
        }
    }
    Ok(())
}

/// Accepts up to [`BATCH`] connections while there are slots. If the process has no descriptor left,
/// returns when to try again.
fn accept_batch(
    shared: &Arc<ServerShared>,
    listener: &Listener,
    silent: &mut SilentConnections,
) -> Option<Instant> {
    for _ in 0..BATCH {
        if shared.sessions.accept_readiness(Instant::now()) != AcceptReadiness::Ready {
            return None;
        }
        match accept(shared, listener, silent) {
            Accepted::One(connection) => silent.0.extend(connection),
            Accepted::None => return None,
            Accepted::Scarce(until) => return Some(until),
        }
        silent.close_ended(shared, Instant::now());
    }
    None
}

/// Greeted connections from which nothing has arrived. They cost a descriptor or two and no thread,
/// so that the acceptor can evict them at once.
#[derive(Default)]
struct SilentConnections(Vec<SilentConnection>);

struct SilentConnection {
    stream: Stream,
    peer: Peer,
    registration: Registration,
    /// The client has sent its flags, and had sent nothing more when we looked.
    has_sent_flags: bool,
}

impl SilentConnections {
    fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.0.iter().map(|connection| connection.stream.as_fd())
    }

    /// When the next handshake times out. The old style has no handshake to wait for.
    fn deadline(&self, shared: &ServerShared) -> Option<Instant> {
        let limit = (shared.settings.style == Style::Newstyle)
            .then_some(shared.settings.handshake_timeout)?;
        self.0.iter().map(|connection| connection.registration.since + limit).min()
    }

    /// Closes connections that have timed out or are requested to stop.
    fn close_ended(&mut self, shared: &ServerShared, now: Instant) {
        let newstyle = shared.settings.style == Style::Newstyle;
        self.0.retain(|SilentConnection { peer, registration, .. }| {
            let end = match registration.control.current() {
                StopRequest::Serve
                    if newstyle
                        && registration.since + shared.settings.handshake_timeout <= now =>
                {
                    SessionEnd::HandshakeTimeout
                }
                // A session will handle these.
                StopRequest::Serve | StopRequest::Suspend | StopRequest::Finish => return true,
                request => SessionEnd::Requested(request),
            };
            registration.span.in_scope(|| shared.rejections.log_handshake_end(peer, &end));
            false
        });
    }

    /// Starts sessions for connections from which something has arrived, or that are closed.
    fn start_ready(&mut self, shared: &Arc<ServerShared>, ready: &[bool]) {
        let mut ready = ready.iter();
        let started = self.0.extract_if(.., |connection| {
            ready.next().is_some_and(|ready| *ready) && !connection.has_only_sent_flags()
        });
        started.for_each(|connection| connection.start(shared));
    }

    fn start_all(self, shared: &Arc<ServerShared>) {
        self.0.into_iter().for_each(|connection| connection.start(shared));
    }
}

impl SilentConnection {
    /// Whether the client has sent valid flags and no byte more. If so, raises `SO_RCVLOWAT` so that
    /// the connection becomes readable with the header of the first option.
    fn has_only_sent_flags(&mut self) -> bool {
        if self.has_sent_flags {
            return false; // Now there is more, or the end of the stream.
        }
        let mut bytes = [0; CLIENT_FLAGS + 1];
        let count = self.stream.peek(&mut bytes);
        let valid =
            bytes[..CLIENT_FLAGS - 1] == [0; CLIENT_FLAGS - 1] && bytes[CLIENT_FLAGS - 1] <= 3;
        self.has_sent_flags = matches!(count, Ok(CLIENT_FLAGS))
            && valid
            && self.stream.set_receive_low_water(FLAGS_AND_OPTION_HEADER);
        self.has_sent_flags
    }

    fn start(self, shared: &Arc<ServerShared>) {
        let Self { stream, peer, registration, has_sent_flags: _ } = self;
        stream.set_receive_low_water(1);
        spawn_session(shared, stream, peer, registration, None);
    }
}

/// Result of one `accept`.
enum Accepted {
    /// A connection; `None` if it was refused.
    One(Option<SilentConnection>),
    /// The backlog is empty, or the server has stopped accepting.
    None,
    /// The system has no resources for another connection; try again at this time.
    Scarce(Instant),
}

/// Accepts, registers and greets one connection.
fn accept(
    shared: &Arc<ServerShared>,
    listener: &Listener,
    silent: &mut SilentConnections,
) -> Accepted {
    let Some(_accepting) = shared.sessions.begin_accept() else { return Accepted::None };
    match listener.accept() {
        Ok((stream, peer)) => {
            let admitted = admit(shared, stream, peer, silent);
            let admitted =
                admitted.inspect_err(|why| shared.rejections.log_refusal(&peer, why)).ok();
            Accepted::One(
                admitted
                    .and_then(|(stream, registration)| greet(shared, stream, peer, registration)),
            )
        }
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Accepted::None,
        Err(error) => {
            shared.sessions.evict_one(Instant::now());
            let unknown = Peer::Unix { pid: None, uid: None };
            if shared.rejections.allows_line(RejectReason::Scarce, &unknown) {
                warn!("cannot accept a client: {error}; trying again when a session has ended");
            }
            Accepted::Scarce(Instant::now() + SCARCITY_BACKOFF)
        }
    }
}

/// Registers a connection, or returns why it is refused. The last descriptors are reserved for
/// operators and for the disk: a connection that got one of them stays only if a silent connection
/// can be evicted for it.
fn admit(
    shared: &ServerShared,
    stream: Stream,
    peer: Peer,
    silent: &mut SilentConnections,
) -> Result<(Stream, Registration), AdmissionError> {
    let now = Instant::now();
    if !is_reserved(&stream) {
        return shared.sessions.admit(peer, now).map(|registration| (stream, registration));
    }
    if !shared.sessions.evict_one(now) {
        return Err(AdmissionError::NoDescriptors);
    }
    silent.close_ended(shared, now);
    // Move to the number that has become free: `is_reserved` relies on the lowest numbers being in
    // use.
    let stream = stream.with_lowest_descriptor().map_err(|_| AdmissionError::NoDescriptors)?;
    shared.sessions.admit(peer, now).map(|registration| (stream, registration))
}

/// Whether a new connection got one of the last descriptors that the process can have: the kernel
/// always assigns the lowest free number.
fn is_reserved(stream: &Stream) -> bool {
    let descriptor = stream.as_fd().as_raw_fd();
    let Ok((limit, _)) = getrlimit(Resource::RLIMIT_NOFILE) else { return false };
    let reserved = DESCRIPTORS_RESERVED.min(limit / 4);
    u64::try_from(descriptor).is_ok_and(|descriptor| descriptor >= limit - reserved)
}

/// Sends the greeting. Returns `None` if the connection is closed, or has become a session.
fn greet(
    shared: &Arc<ServerShared>,
    stream: Stream,
    peer: Peer,
    registration: Registration,
) -> Option<SilentConnection> {
    // Setting options fails only on a connection that is being closed; the session will see that.
    let _ = stream.tune().and_then(|()| stream.set_nonblocking());
    let _ = stream.limit_unsent();
    if shared.settings.style == Style::Oldstyle {
        // The greeting is the whole handshake, so that the session asks the policy before it.
        spawn_session(shared, stream, peer, registration, None);
        return None;
    }
    stream.set_receive_low_water(CLIENT_FLAGS as i32);
    let mut greeting = Vec::new();
    ServerHandshake::new(shared.export.clone()).greet(&mut greeting);
    // It fits into the socket's buffer, which is empty.
    match stream.try_send(&greeting, false) {
        Ok(count) if count == greeting.len() => {
            Some(SilentConnection { stream, peer, registration, has_sent_flags: false })
        }
        Ok(_) => None,
        Err(error) => {
            let end = SessionEnd::Connection(error);
            registration.span.in_scope(|| shared.rejections.log_handshake_end(&peer, &end));
            None
        }
    }
}

/// Starts a session of the previous process, or closes its connection and logs why.
pub(super) fn restore(
    shared: &Arc<ServerShared>,
    SuspendedSession { snapshot, stream }: SuspendedSession,
) {
    let session = snapshot.session;
    let introduction = snapshot.introduction.as_deref().map(Introduction::decode);
    if introduction == Some(None) {
        return warn!("flexnbd.session" = session, "closed a session taken over: {UNKNOWN_CLIENT}");
    }
    let requires_tls = shared.tls().is_some_and(|tls| tls.mode() == TlsMode::Require);
    if requires_tls && !stream.is_tls() {
        return warn!(
            "flexnbd.session" = session,
            "closed a session taken over: it is not encrypted, and TLS is required now"
        );
    }
    let handshake_since = snapshot.is_in_handshake().then(Instant::now);
    let registered = stream.peer().map_err(|error| error.to_string()).and_then(|peer| {
        let registration = shared.sessions.restore(session, peer, handshake_since);
        registration
            .map(|registration| (peer, registration))
            .map_err(|why| format!("{peer}: {why}"))
    });
    match registered {
        Ok((peer, registration)) => {
            registration.span.in_scope(|| info!("{peer} goes on"));
            // Before the acceptor starts: the client may introduce a later connection at once.
            if let Some(introduction) = introduction.flatten() {
                shared.policy.restore_introduction(session, introduction);
            }
            spawn_session(shared, stream, peer, registration, Some(snapshot));
        }
        Err(why) => warn!("flexnbd.session" = session, "closed a session taken over: {why}"),
    }
}

fn spawn_session(
    shared: &Arc<ServerShared>,
    stream: Stream,
    peer: Peer,
    registration: Registration,
    snapshot: Option<SessionSnapshot>,
) {
    let (name, for_session) = (format!("client-{}", registration.id), Arc::clone(shared));
    let thread = thread::Builder::new().name(name).stack_size(STACK);
    let started = check_thread_headroom().and_then(|()| {
        thread.spawn(move || run_session(&for_session, stream, peer, registration, snapshot))
    });
    let Err(error) = started else { return };
    shared.sessions.evict_one(Instant::now());
    if shared.rejections.allows_line(RejectReason::Scarce, &peer) {
        let who = peer.to_string();
        warn!(
            "flexnbd.client" = who,
            "cannot start a thread for {who}: {error}; connection closed"
        );
    }
}

fn run_session(
    shared: &ServerShared,
    stream: Stream,
    peer: Peer,
    registration: Registration,
    snapshot: Option<SessionSnapshot>,
) {
    let _entered = registration.span.clone().entered();
    let id = registration.id;
    let session = Session {
        peer,
        registration,
        disk: &shared.disk,
        policy: &*shared.policy,
        payloads: &shared.payloads,
        export: shared.export.clone(),
        settings: shared.settings,
        tls: shared.tls(),
        cpus: shared.cpus,
    };
    let EndedSession { end, stream, mut snapshot } = session.run(stream, snapshot);
    if let Some(snapshot) = &mut snapshot {
        snapshot.introduction = shared.policy.introduction(id).map(|saved| saved.encode());
    }
    shared.policy.on_session_end(id);
    if session.registration.is_established() || matches!(end, SessionEnd::Suspended) {
        if !session.registration.is_quiet() {
            log_end(&session.peer, &end);
        }
    } else {
        // A client that was answered with the limit leaves in its own way.
        let end = session.registration.kept_out().map_or(end, SessionEnd::Full);
        shared.rejections.log_handshake_end(&session.peer, &end);
    }
    if let (Some(snapshot), Some(stream)) = (snapshot, stream) {
        let snapshot = *snapshot;
        session.registration.suspend(SuspendedSession { snapshot, stream });
    }
}

/// Logs the end of a session inside its span.
fn log_end(peer: &Peer, end: &SessionEnd) {
    if matches!(end, SessionEnd::Suspended) {
        info!("packed up the session of {peer}");
        return;
    }
    let message_id = match end {
        SessionEnd::Stalled => Some(message_id::CLIENT_STALLED),
        SessionEnd::Requested(StopRequest::NotAdmitted) => Some(message_id::CLIENT_NOT_ADMITTED),
        _ => None,
    };
    if end.is_trouble() {
        warn!(message_id, "closed the session of {peer}: {end}");
    } else {
        info!(message_id, "closed the session of {peer}: {end}");
    }
}
