//! A process that cannot serve its disk, while clients wait at its sockets: it closes every
//! connection and tells operators why, until a signal stops it or another host says that it may
//! serve.
//! Never touches the disk, and never sends a client a byte.
//!
//! If the process ended, the service manager, which holds the sockets, would start it again for the
//! same clients, and after some restarts the socket units would fail.

use super::confinement::Confinement;
use super::event_loop::ProcessEnd;
use super::handover_query::{QueryResult, RepeatedQuery};
use super::inherited::Inherited;
use super::start_error::StartError;
use crate::control::{Command, ControlSocket, Credentials, Handle, Operator, Reply};
use crate::disk::ownership::RemoteAddress;
use crate::message_id;
use crate::net::{Listener, Peer, wait_readable};
use crate::systemd::{InheritedSockets, log_unsent};
use nix::sys::signal::Signal;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tracing::{error, info, warn};

/// Refused clients get at most one line in the log in this time.
const LOG_INTERVAL: Duration = Duration::from_secs(60);
/// Pause after accept(2) has failed for lack of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);

/// The purpose and the paths of the process, as far as known without a valid configuration.
#[derive(Clone, Debug)]
pub(super) struct ServerPurpose {
    /// It receives a disk, and has no clients.
    pub(super) receives: bool,
    pub(super) image: Option<PathBuf>,
    /// The path of a control socket to open if none is inherited.
    pub(super) control: Option<PathBuf>,
}

/// The reason for which refusing clients ended.
pub(super) enum RefusalResult {
    /// The process ends.
    Ended(ProcessEnd),
    /// Another host has answered: start again.
    Answered(QueryResult),
}

/// Refuses clients for as long as that is useful, after a start that failed with `error`.
///
/// # Errors
/// `error`, if the process should end at once.
pub(super) fn run(
    inherited: &Inherited,
    purpose: &ServerPurpose,
    confinement: &Confinement,
    error: StartError,
) -> Result<RefusalResult, StartError> {
    let notifier = &inherited.notifier;
    if let StartError::Interrupted(signal) = error {
        log_unsent(notifier.stopping());
        return Ok(stopped(signal));
    }
    if should_refuse_clients(inherited, purpose, &error) {
        confinement.switch_user()?;
        confinement.enter_without_image();
        return refuse_clients(inherited, purpose, &error);
    }
    log_unsent(notifier.status(&error.to_string()));
    if let Some(errno) = error.errno() {
        log_unsent(notifier.errno(errno));
    }
    Err(error)
}

fn stopped(signal: Signal) -> RefusalResult {
    info!(message_id = message_id::STOPPING, "stopping: received {signal}");
    RefusalResult::Ended(ProcessEnd::Well)
}

/// A disk that has moved away stays away, and its clients keep connecting. An operator who starts
/// the service sees any other error at once, so the process stays only if a client or an operator
/// has connected. After a transient error the service manager starts the process again, and clients
/// wait in the sockets meanwhile.
fn should_refuse_clients(
    inherited: &Inherited,
    purpose: &ServerPurpose,
    error: &StartError,
) -> bool {
    let refuses = !purpose.receives && !error.is_transient() && inherited.has_sockets();
    refuses && (matches!(error, StartError::Ownership(_)) || inherited.has_connection_waiting())
}

fn refuse_clients(
    inherited: &Inherited,
    purpose: &ServerPurpose,
    error: &StartError,
) -> Result<RefusalResult, StartError> {
    let notifier = &inherited.notifier;
    let reason = error.to_string();
    let InheritedSockets { nbd, control, .. } = inherited.usable_sockets()?;
    let listeners = nbd.into_iter().map(OwnedFd::from);
    let listeners = listeners.filter_map(|descriptor| Listener::inherited(descriptor).ok());
    let listeners = listeners.chain(inherited.bad_listeners()).collect();
    let (departure, query) = match error {
        StartError::Ownership(denial) => (denial.departure.clone(), denial.query.clone()),
        _ => (None, None),
    };
    let (migration, to) = departure.unzip();
    error!(
        message_id = error.message_id(),
        "flexnbd.migration" = migration.map(|id| id.to_string()),
        "flexnbd.destination" = to.as_ref().map(RemoteAddress::as_str),
        "flexnbd.image" = purpose.image.as_ref().map(|image| image.display().to_string()),
        errno = error.errno(),
        "refusing clients: {reason}"
    );
    let control = answer_operators(control, purpose.control.clone(), &reason);
    log_unsent(notifier.ready());
    log_unsent(notifier.status(&format!("refusing clients: {reason}")));
    let query = query.map(|query| RepeatedQuery::new(query, Instant::now()));
    let outcome = RefusalLoop { listeners, inherited, reason: &reason, query }.run();
    if !matches!(outcome, Ok(RefusalEnd::Answered(_))) {
        log_unsent(notifier.stopping());
    }
    drop(control);
    Ok(match outcome {
        Ok(RefusalEnd::Signal(signal)) => stopped(signal),
        Ok(RefusalEnd::Answered(answer)) => RefusalResult::Answered(answer),
        Err(error) => {
            let why = format!("cannot wait for clients to refuse: {error}");
            RefusalResult::Ended(ProcessEnd::Badly(why))
        }
    })
}

/// Answers every command with the reason.
struct RefusingOperator(String);

impl Operator for RefusingOperator {
    fn execute(&self, _command: Command, _from: Credentials) -> Reply {
        Reply::refused(self.0.as_str())
    }
}

/// Answers on the control socket, if there is one. Failures are logged only: they must not keep the
/// process from refusing clients.
fn answer_operators(
    inherited: Option<UnixListener>,
    path: Option<PathBuf>,
    reason: &str,
) -> Option<Handle> {
    let socket = match (inherited, path) {
        (Some(listener), _) => Ok(ControlSocket::from_listener(listener)),
        (None, Some(path)) => ControlSocket::bind(&path).map_err(|error| error.to_string()),
        (None, None) => return None,
    };
    let operator = Arc::new(RefusingOperator(reason.to_owned()));
    let started =
        socket.and_then(|socket| socket.start(operator).map_err(|error| error.to_string()));
    started.map_err(|error| warn!("orders cannot be answered: {error}")).ok()
}

/// Why [`RefusalLoop::run`] ended.
enum RefusalEnd {
    Signal(Signal),
    Answered(QueryResult),
}

/// Waits for clients, signals, the answer of another host and the watchdog's interval.
struct RefusalLoop<'a> {
    listeners: Vec<Listener>,
    inherited: &'a Inherited,
    reason: &'a str,
    /// Asks another host meanwhile whether the disk can be served after all.
    query: Option<RepeatedQuery>,
}

impl RefusalLoop<'_> {
    /// Closes every connection until a signal or the answer of another host arrives.
    fn run(mut self) -> io::Result<RefusalEnd> {
        let Inherited { signals, notifier, .. } = self.inherited;
        let signal = signals.descriptor()?;
        let (mut refusals, mut paused_until) = (RefusalLog::default(), None);
        let mut fed_at = Instant::now();
        loop {
            let now = Instant::now();
            if let Some(answer) = self.query.as_mut().and_then(|query| query.poll(now)) {
                return Ok(RefusalEnd::Answered(answer));
            }
            if let Some(count) = refusals.take_due(now) {
                log_refusals(count, refusals.last, self.reason);
            }
            let pause = paused_until.filter(|until| now < *until);
            let feed_at = notifier.watchdog_interval().map(|interval| fed_at + interval);
            // The loop is the only part that can get stuck, so it feeds the watchdog itself.
            if feed_at.is_some_and(|feed_at| feed_at <= now) {
                fed_at = now;
                log_unsent(notifier.watchdog());
                continue;
            }
            let query_at = self.query.as_ref().and_then(RepeatedQuery::deadline);
            let deadline = [pause, feed_at, refusals.due(), query_at].into_iter().flatten().min();
            let listeners = if pause.is_none() { self.listeners.as_slice() } else { &[] };
            let mut descriptors = vec![signal.as_fd()];
            descriptors.extend(listeners.iter().map(AsFd::as_fd));
            descriptors.extend(self.query.as_ref().and_then(RepeatedQuery::descriptor));
            let ready = wait_readable(&descriptors, deadline)?;
            if let Some(signal) = signals.read_stop(&signal)? {
                return Ok(RefusalEnd::Signal(signal));
            }
            for (listener, _) in listeners.iter().zip(&ready[1..]).filter(|(_, ready)| **ready) {
                match listener.accept() {
                    Ok((_, peer)) => refusals.add(peer),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(_) => paused_until = Some(Instant::now() + ACCEPT_PAUSE),
                }
            }
        }
    }
}

fn log_refusals(count: u64, last: Option<Peer>, reason: &str) {
    let peer = last.map(|peer| peer.to_string()).unwrap_or_default();
    let others = match count {
        1 => String::new(),
        2 => " and another client".to_owned(),
        count => format!(" and {} other clients", count - 1),
    };
    warn!(
        message_id = message_id::CLIENTS_REFUSED,
        "flexnbd.client" = peer,
        "flexnbd.clients" = count,
        "refused {peer}{others}: {reason}"
    );
}

/// Limits the log of refused clients: the first gets a line at once, later ones share one line a
/// minute.
#[derive(Clone, Copy, Debug, Default)]
struct RefusalLog {
    logged_at: Option<Instant>,
    unlogged: u64,
    last: Option<Peer>,
}

impl RefusalLog {
    fn add(&mut self, peer: Peer) {
        self.unlogged = self.unlogged.saturating_add(1);
        self.last = Some(peer);
    }

    /// When the next line is due; `None` if no client waits for one, or the line is due at once.
    fn due(&self) -> Option<Instant> {
        let logged_at = self.logged_at.filter(|_| self.unlogged > 0)?;
        Some(logged_at + LOG_INTERVAL)
    }

    /// The number of clients to log now, if a line is due.
    fn take_due(&mut self, now: Instant) -> Option<u64> {
        if self.unlogged == 0 || self.due().is_some_and(|due| now < due) {
            return None;
        }
        self.logged_at = Some(now);
        Some(std::mem::take(&mut self.unlogged))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_are_logged_at_most_once_a_minute() {
        let peer: Peer = Peer::Tcp("192.0.2.1:4711".parse().unwrap());
        let mut refusals = RefusalLog::default();
        let start = Instant::now();
        assert_eq!((refusals.take_due(start), refusals.due()), (None, None));
        refusals.add(peer);
        assert_eq!(refusals.take_due(start), Some(1));
        assert_eq!(refusals.due(), None, "nothing to wake up for");
        for _ in 0..3 {
            refusals.add(peer);
        }
        let later = start + LOG_INTERVAL;
        assert_eq!((refusals.take_due(start), refusals.due()), (None, Some(later)));
        assert_eq!(refusals.take_due(later), Some(3));
        assert_eq!(refusals.take_due(later + LOG_INTERVAL), None);
        refusals.add(peer);
        assert_eq!(refusals.take_due(later + 2 * LOG_INTERVAL), Some(1));
    }
}
