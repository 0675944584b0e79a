//! A process that cannot serve its disk, and what it does about clients that were promised one.
//! Never touches the disk, and never sends a client a byte.
//!
//! A service manager that holds the sockets starts the service for whoever waits at them. When it
//! ends at once they still wait, and it is started again, and after some such rounds the sockets
//! themselves fail. So, with somebody waiting, it stays: closes every connection, tells operators
//! why, and ends when it is told to.

use super::config::{ProcessEnd, ProcessRole, StartError};
use super::peer_query::{QueryResult, RepeatedQuery, StartupQuery, readable, received};
use super::signals::Signals;
use super::{snapshot, tell};
use crate::control::{Command, ControlSocket, Credentials, Handle, Operator, Reply};
use crate::disk::ownership::RemoteAddress;
use crate::message_id;
use crate::net::{Listener, Peer, wait_readable};
use crate::server::StoredSessions;
use crate::systemd::sockets;
use crate::systemd::{InheritedSockets, ServiceManager};
use nix::sys::signal::Signal;
use nix::sys::stat::{SFlag, fstat};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tracing::{error, info, warn};

/// Of refused clients there is one line in the log in this time.
const LINE_EVERY: Duration = Duration::from_secs(60);
/// How long to wait when a connection could not be accepted.
const REST: Duration = Duration::from_secs(1);

/// Where a process stands before it is known whether it can serve: the sockets that it was handed,
/// as copies, and the ways to hear and to tell.
#[derive(Debug)]
pub(super) struct EarlyStart {
    purpose: ServerPurpose,
    handed: InheritedSockets,
    pub(super) notifier: ServiceManager,
    pub(super) signals: Signals,
}

/// What the process is for, as far as that is known.
#[derive(Clone, Debug)]
pub(super) struct ServerPurpose {
    pub(super) role: ProcessRole,
    pub(super) image: Option<PathBuf>,
    /// Where a control socket is to be opened, if none was handed over.
    pub(super) control: Option<PathBuf>,
}

/// What came of staying to refuse.
pub(super) enum DegradedResult {
    /// The process ends so.
    Ended(ProcessEnd),
    /// Another host has answered: begin again.
    Answered(QueryResult),
}

impl EarlyStart {
    /// Takes the sockets that were handed to this process, and the sessions that another one has
    /// left. Call it once, before any thread starts: the environment is read and changed, and
    /// threads inherit the signal mask.
    pub(super) fn enter(purpose: ServerPurpose) -> Result<(Self, StoredSessions), StartError> {
        let notifier = ServiceManager::from_env();
        let mut handed = InheritedSockets::from_env();
        // Also when it is of no use: what stays in the store keeps its client waiting for ever.
        let luggage = snapshot::take_out(std::mem::take(&mut handed.stored), &notifier);
        let signals = Signals::block()?;
        Ok((Self { purpose, handed, notifier, signals }, luggage))
    }

    /// The sockets that were handed over, for a process that begins to serve.
    pub(super) fn sockets(&self) -> Result<InheritedSockets, StartError> {
        match self.handed.bad.first() {
            Some(bad) => Err(StartError::Inherited(bad.to_string())),
            None => self.copies(),
        }
    }

    fn copies(&self) -> Result<InheritedSockets, StartError> {
        let copies = self.handed.try_clone();
        copies.map_err(|error| StartError::System("copy the inherited sockets", error))
    }

    /// Who asks another host about the disk; `answered` is what is known already.
    pub(super) fn asker(&self, answered: Option<QueryResult>) -> StartupQuery<'_> {
        StartupQuery { notifier: &self.notifier, signals: &self.signals, answered }
    }

    /// Comes to its end with a disk that cannot be served: at once, which is the error, or after
    /// having refused clients for as long as that is wanted.
    pub(super) fn refuse(&self, refusal: StartError) -> Result<DegradedResult, StartError> {
        if let StartError::Interrupted(signal) = refusal {
            tell(self.notifier.stopping());
            info!(message_id = message_id::STOPPING, "stopping: received {signal}");
            return Ok(DegradedResult::Ended(ProcessEnd::Well));
        }
        if self.has_to_stay(&refusal) {
            return self.stay(&refusal);
        }
        tell(self.notifier.status(&refusal.to_string()));
        if let Some(errno) = refusal.errno() {
            tell(self.notifier.errno(errno));
        }
        Err(refusal)
    }

    /// A disk that is not ours stays so, and clients go on coming. Anything else is more likely to
    /// have been found by whoever starts the service and looks what comes of it.
    fn has_to_stay(&self, refusal: &StartError) -> bool {
        let InheritedSockets { nbd, control, bad, .. } = &self.handed;
        let was_handed_sockets = !nbd.is_empty() || control.is_some() || !bad.is_empty();
        let serves = self.purpose.role == ProcessRole::Serve && was_handed_sockets;
        serves && (matches!(refusal, StartError::Ownership(_)) || self.is_somebody_waiting())
    }

    /// Whether a client or an operator has connected already: we were probably started for it.
    fn is_somebody_waiting(&self) -> bool {
        let control = self.handed.control.as_ref().map(AsFd::as_fd);
        // Somebody who waits at one that cannot be used starts the service again all the same.
        let bad = self.handed.bad.iter().filter_map(|bad| bad.descriptor.as_ref());
        let bad = bad.filter(|descriptor| can_wait(descriptor)).map(AsFd::as_fd);
        let nbd = self.handed.nbd.iter().map(AsFd::as_fd);
        let sockets: Vec<_> = nbd.chain(control).chain(bad).collect();
        wait_readable(&sockets, Some(Instant::now())).is_ok_and(|ready| ready.contains(&true))
    }

    fn stay(&self, refusal: &StartError) -> Result<DegradedResult, StartError> {
        let reason = refusal.to_string();
        let Self { purpose, notifier, signals, .. } = self;
        let InheritedSockets { nbd, control, .. } = self.copies()?;
        let listeners = self.to_refuse_on(nbd);
        let (departure, inquiry) = match refusal {
            StartError::Ownership(denial) => (denial.departure.clone(), denial.inquiry.clone()),
            _ => (None, None),
        };
        let (migration, to) = departure.unzip();
        error!(
            message_id = refusal.message_id(),
            "flexnbd.migration" = migration.map(|id| id.to_string()),
            "flexnbd.destination" = to.as_ref().map(RemoteAddress::as_str),
            "flexnbd.image" = purpose.image.as_ref().map(|image| image.display().to_string()),
            errno = refusal.errno(),
            "refusing clients: {reason}"
        );
        let control = answer_operators(control, purpose.control.clone(), &reason);
        tell(notifier.ready());
        tell(notifier.status(&format!("refusing clients: {reason}")));
        let pursuit = inquiry.map(|inquiry| RepeatedQuery::new(inquiry, Instant::now()));
        let refuser = DegradedLoop { listeners, signals, notifier, reason: &reason, pursuit };
        let outcome = refuser.turn_away();
        if !matches!(outcome, Ok(DegradedEnd::Answered(_))) {
            tell(notifier.stopping());
        }
        drop(control);
        Ok(match outcome {
            Ok(DegradedEnd::Signal(signal)) => {
                info!(message_id = message_id::STOPPING, "stopping: received {signal}");
                DegradedResult::Ended(ProcessEnd::Well)
            }
            Ok(DegradedEnd::Answered(answered)) => DegradedResult::Answered(answered),
            Err(error) => {
                let why = format!("cannot wait for clients to refuse: {error}");
                DegradedResult::Ended(ProcessEnd::Badly(why))
            }
        })
    }

    /// Where clients are refused: what has the wrong name, and takes connections all the same,
    /// refuses them like the others.
    fn to_refuse_on(&self, nbd: Vec<sockets::InheritedListener>) -> Vec<Listener> {
        let bad = self.handed.bad.iter().filter_map(|bad| bad.descriptor.as_ref());
        let bad = bad.filter_map(|descriptor| descriptor.try_clone().ok());
        let all = nbd.into_iter().map(OwnedFd::from).chain(bad);
        all.filter_map(|descriptor| Listener::inherited(descriptor).ok()).collect()
    }
}

/// Whether a service manager can wait for this to be readable: files always are.
fn can_wait(descriptor: &OwnedFd) -> bool {
    let kind =
        fstat(descriptor).map_or(SFlag::empty(), |found| SFlag::from_bits_truncate(found.st_mode));
    matches!(kind & SFlag::S_IFMT, SFlag::S_IFSOCK | SFlag::S_IFIFO)
}

/// Tells operators why, whatever they order.
struct RefusingOperator(String);

impl Operator for RefusingOperator {
    fn obey(&self, _command: Command, _from: Credentials) -> Reply {
        Reply::refused(self.0.as_str())
    }
}

/// An error here must not keep us from refusing clients.
fn answer_operators(
    handed: Option<UnixListener>,
    path: Option<PathBuf>,
    reason: &str,
) -> Option<Handle> {
    let socket = match (handed, path) {
        (Some(listener), _) => Ok(ControlSocket::from_listener(listener)),
        (None, Some(path)) => ControlSocket::bind(&path).map_err(|error| error.to_string()),
        (None, None) => return None,
    };
    let operator = Arc::new(RefusingOperator(reason.to_owned()));
    let started =
        socket.and_then(|socket| socket.start(operator).map_err(|error| error.to_string()));
    started.map_err(|error| warn!("orders cannot be answered: {error}")).ok()
}

/// Why refusing is over.
enum DegradedEnd {
    Signal(Signal),
    Answered(QueryResult),
}

/// Everything that has to be watched while clients are refused.
struct DegradedLoop<'a> {
    listeners: Vec<Listener>,
    signals: &'a Signals,
    notifier: &'a ServiceManager,
    reason: &'a str,
    /// Another host is asked meanwhile whether the disk can be served after all.
    pursuit: Option<RepeatedQuery>,
}

impl DegradedLoop<'_> {
    /// Closes every connection until a signal comes, or the answer of another host.
    fn turn_away(mut self) -> io::Result<DegradedEnd> {
        let signal = readable(self.signals)?;
        let (mut tally, mut scarce_until) = (RefusalLog::default(), None);
        let mut fed = Instant::now();
        loop {
            let now = Instant::now();
            if let Some(answered) = self.pursuit.as_mut().and_then(|pursuit| pursuit.look(now)) {
                return Ok(DegradedEnd::Answered(answered));
            }
            if let Some(count) = tally.take(now) {
                log(count, tally.last, self.reason);
            }
            let pause = scarce_until.filter(|until| now < *until);
            let beat = self.notifier.watchdog_interval().map(|interval| fed + interval);
            // What feeds it is this loop, which is all there is to get stuck.
            if beat.is_some_and(|beat| beat <= now) {
                fed = now;
                tell(self.notifier.watchdog());
                continue;
            }
            let pursued = self.pursuit.as_ref();
            let due = pursued.and_then(RepeatedQuery::due);
            let deadline = [pause, beat, tally.due(), due].into_iter().flatten().min();
            let mut descriptors = vec![signal.as_fd()];
            if pause.is_none() {
                descriptors.extend(self.listeners.iter().map(AsFd::as_fd));
            }
            let waiting = descriptors.len() - 1;
            descriptors.extend(pursued.and_then(RepeatedQuery::descriptor));
            let ready = wait_readable(&descriptors, deadline)?;
            if let Some(signal) = received(&signal, self.signals)? {
                return Ok(DegradedEnd::Signal(signal));
            }
            let ready = &ready[1..=waiting];
            for (listener, _) in self.listeners.iter().zip(ready).filter(|(_, ready)| **ready) {
                match listener.accept() {
                    Ok((_, peer)) => tally.refused(peer),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(_) => scarce_until = Some(Instant::now() + REST),
                }
            }
        }
    }
}

fn log(count: u64, last: Option<Peer>, reason: &str) {
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

/// Which refused clients are worth a line: the first at once, then all together once a minute.
#[derive(Clone, Copy, Debug, Default)]
struct RefusalLog {
    told_at: Option<Instant>,
    untold: u64,
    last: Option<Peer>,
}

impl RefusalLog {
    fn refused(&mut self, peer: Peer) {
        self.untold = self.untold.saturating_add(1);
        self.last = Some(peer);
    }

    /// When there will be something to tell, if there is something.
    fn due(&self) -> Option<Instant> {
        let told_at = self.told_at.filter(|_| self.untold > 0)?;
        Some(told_at + LINE_EVERY)
    }

    /// How many clients to tell of now.
    fn take(&mut self, now: Instant) -> Option<u64> {
        if self.untold == 0 || self.due().is_some_and(|due| now < due) {
            return None;
        }
        self.told_at = Some(now);
        Some(std::mem::take(&mut self.untold))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_refused_client_is_told_of_at_once_and_others_once_a_minute() {
        let peer: Peer = Peer::Tcp("192.0.2.1:4711".parse().unwrap());
        let mut tally = RefusalLog::default();
        let start = Instant::now();
        assert_eq!((tally.take(start), tally.due()), (None, None));
        tally.refused(peer);
        assert_eq!(tally.take(start), Some(1));
        assert_eq!(tally.due(), None, "nothing to wake up for");
        for _ in 0..3 {
            tally.refused(peer);
        }
        let later = start + LINE_EVERY;
        assert_eq!((tally.take(start), tally.due()), (None, Some(later)));
        assert_eq!(tally.take(later), Some(3));
        assert_eq!(tally.take(later + LINE_EVERY), None);
        tally.refused(peer);
        assert_eq!(tally.take(later + 2 * LINE_EVERY), Some(1));
    }
}
