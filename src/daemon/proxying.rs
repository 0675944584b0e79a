//! The upstream of a proxy: connecting to it at the start, its part of `status`, and the last flush at
//! the end.
//! Never sends a request of its own but that flush.

use super::config::UpstreamConfig;
use super::events::{ProcessEvent, UpstreamEventSender};
use super::inherited::Inherited;
use super::random;
use super::start_error::StartError;
use crate::control::Status;
use crate::control::status::{
    UNFLUSHED_BYTES, UPSTREAM, UPSTREAM_CONNECTED, UPSTREAM_ERROR, UPSTREAM_RECONNECTS,
    UPSTREAM_SECONDS,
};
use crate::disk::Disk;
use crate::human::counted;
use crate::memory_reserve::check_thread_headroom;
use crate::net::tls::{TlsClient, TlsClientSlot};
use crate::net::{Wake, wait_readable};
use crate::server::StoredSessions;
use crate::sync::lock;
use crate::systemd::log_unsent;
use crate::upstream::{
    self, UpstreamBackend, UpstreamError, UpstreamHandle, UpstreamOptions, UpstreamState,
    UpstreamTarget,
};
use std::io;
use std::os::fd::AsFd;
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};
use tracing::warn;

/// Pause between two attempts to connect at the start.
const PAUSE: Duration = Duration::from_secs(1);
/// Added to the time of an attempt when it is announced to the service manager.
const MARGIN: Duration = Duration::from_secs(10);
/// Shortest time for the last flush, however long the sessions took to end.
const FLUSH_GRACE_MIN: Duration = Duration::from_secs(10);

/// How often to try each address at the start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Persistence {
    /// Once: the service manager repeats the start, and new clients wait in its sockets.
    Once,
    /// Until one of them answers, or this time: sessions of the last process would end with a failed start.
    Until(Option<Instant>),
}

/// A connection to the disk of another server.
type Connected = (UpstreamBackend, UpstreamHandle);

/// Connects to the upstream. A signal ends the wait.
pub(super) fn connect(
    config: &UpstreamConfig,
    inherited: &Inherited,
    persistence: Persistence,
    events: &Sender<ProcessEvent>,
) -> Result<Connected, StartError> {
    let system = |error| StartError::System("wait for the upstream", error);
    let Inherited { signals, notifier, .. } = inherited;
    let signal = signals.descriptor().map_err(system)?;
    let id = random::bytes()
        .map_err(|error| StartError::System("draw random numbers", io::Error::other(error)))?;
    let mut options = UpstreamOptions { client: Some(id), ..config.options.clone() };
    if options.tls.is_none() && config.has_tls() {
        let client = TlsClient::load(&config.tls).map_err(StartError::Tls)?;
        options.tls = Some(TlsClientSlot::new(client));
    }
    let mut logged = String::new();
    loop {
        let targets = u32::try_from(config.targets.len()).unwrap_or(u32::MAX);
        log_unsent(notifier.extend_timeout(options.timeout.saturating_mul(targets) + MARGIN));
        let attempt =
            Attempt::start(config.targets.clone(), options.clone(), events).map_err(system)?;
        let error = loop {
            wait_readable(&[signal.as_fd(), attempt.0.wake.as_fd()], None).map_err(system)?;
            if let Some(signal) = signals.read_stop(&signal).map_err(system)? {
                return Err(StartError::Interrupted(signal));
            }
            match attempt.result() {
                None => {}
                Some(Ok(connected)) => return Ok(connected),
                Some(Err(error)) => break error,
            }
        };
        let gives_up = match persistence {
            Persistence::Once => true,
            Persistence::Until(end) => end.is_some_and(|end| end <= Instant::now()),
        };
        if gives_up {
            return Err(StartError::Upstream(error));
        }
        let why = error.to_string();
        if logged != why {
            warn!("clients of the last process wait for the upstream: {why}");
            log_unsent(notifier.status(&format!("waiting for the upstream: {why}")));
            logged = why;
        }
        wait_readable(&[signal.as_fd()], Some(Instant::now() + PAUSE)).map_err(system)?;
        if let Some(signal) = signals.read_stop(&signal).map_err(system)? {
            return Err(StartError::Interrupted(signal));
        }
    }
}

/// An attempt to connect, on a thread of its own, so that signals are handled meanwhile. Dropping this
/// does not stop the thread, which the timeout of the upstream ends.
struct Attempt(Arc<AttemptResult>);

struct AttemptResult {
    wake: Wake,
    result: Mutex<Option<Result<Connected, UpstreamError>>>,
}

impl Attempt {
    fn start(
        targets: Vec<UpstreamTarget>,
        options: UpstreamOptions,
        events: &Sender<ProcessEvent>,
    ) -> io::Result<Self> {
        let shared = Arc::new(AttemptResult { wake: Wake::new()?, result: Mutex::default() });
        let for_thread = Arc::clone(&shared);
        let events = Arc::new(UpstreamEventSender(events.clone()));
        let attempt = move || {
            let result = upstream::connect(targets, options, events);
            *lock(&for_thread.result) = Some(result);
            for_thread.wake.wake();
        };
        check_thread_headroom()?;
        thread::Builder::new().name("connecting".into()).spawn(attempt)?;
        Ok(Self(shared))
    }

    fn result(&self) -> Option<Result<Connected, UpstreamError>> {
        lock(&self.0.result).take()
    }
}

/// Adds the upstream to the reply to `status`.
pub(super) fn describe(upstream: &UpstreamState, status: &mut Status) {
    let mut add = |key: &str, value: String| status.extra.push((key.to_owned(), value));
    add(UPSTREAM, upstream.target.clone());
    add(UPSTREAM_CONNECTED, upstream.connected.to_string());
    add(UPSTREAM_SECONDS, upstream.since.as_secs().to_string());
    add(UPSTREAM_RECONNECTS, upstream.reconnects.to_string());
    add(UNFLUSHED_BYTES, upstream.unflushed_bytes.to_string());
    if let Some(why) = upstream.last_error.as_ref().filter(|_| !upstream.connected) {
        add(UPSTREAM_ERROR, why.clone());
    }
}

/// Has the upstream make durable what clients have written, by `deadline` or [`FLUSH_GRACE_MIN`] from now,
/// and closes the connection. Returns the sessions for the next process: none if the flush fails, since the next
/// process does not know what to write again, and would acknowledge a FLUSH without it.
pub(super) fn settle(
    upstream: &UpstreamHandle,
    disk: &Arc<Disk>,
    sessions: StoredSessions,
    deadline: Instant,
) -> StoredSessions {
    let unflushed = upstream.state().unflushed_bytes;
    let flushed = if unflushed == 0 { Ok(()) } else { flush(disk, deadline) };
    upstream.close();
    match flushed {
        Ok(()) => sessions,
        Err(error) => {
            let bytes = counted(unflushed, "written byte");
            let at = upstream.state().target;
            let clients = sessions.streams.len();
            let closing = match clients {
                0 => String::new(),
                count => format!("; closing {}", counted(count, "session")),
            };
            warn!(
                "flexnbd.clients" = clients,
                "{bytes} may not be durable at {at}: {error}{closing}"
            );
            StoredSessions::default()
        }
    }
}

fn flush(disk: &Arc<Disk>, deadline: Instant) -> io::Result<()> {
    let (result, flushed) = mpsc::channel();
    let disk = Arc::clone(disk);
    let flush = move || {
        // Nothing waits for it after the deadline.
        let _ = result.send(disk.write_back());
    };
    check_thread_headroom()?;
    thread::Builder::new().name("flushing".into()).spawn(flush)?;
    let left = deadline.saturating_duration_since(Instant::now()).max(FLUSH_GRACE_MIN);
    flushed.recv_timeout(left).unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}
