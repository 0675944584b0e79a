//! What the process inherits from the service manager: sockets, stored sessions, the notification
//! socket and the watchdog; and the signals, which it blocks before any thread starts.
//! Never accepts a connection.

use super::handover_query::{QueryResult, StartupQuery};
use super::signals::Signals;
use super::snapshot::{self, LeftSessions};
use super::start_error::StartError;
use super::tls::ProcessTls;
use crate::net::{Listener, wait_readable};
use crate::systemd::{InheritedSockets, ServiceManager};
use nix::sys::stat::{SFlag, fstat};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;

/// Everything that the process has inherited.
///
/// Keeps the sockets and returns copies, so that a failed start can be repeated, and clients be
/// refused meanwhile.
#[derive(Debug)]
pub(super) struct Inherited {
    sockets: InheritedSockets,
    pub(super) notifier: ServiceManager,
    pub(super) signals: Signals,
}

impl Inherited {
    /// Takes over everything inherited, and the sessions that the last process has stored. Call
    /// this once, before any thread starts: it reads and changes the environment, and threads
    /// inherit the signal mask.
    pub(super) fn take() -> Result<(Self, LeftSessions), StartError> {
        let notifier = ServiceManager::from_env();
        let mut sockets = InheritedSockets::from_env();
        // Even if this process cannot use them: the client of a session that stays in the store
        // waits forever.
        let sessions = snapshot::restore(std::mem::take(&mut sockets.stored), &notifier);
        let signals =
            Signals::block().map_err(|error| StartError::System("set up signals", error))?;
        Ok((Self { sockets, notifier, signals }, sessions))
    }

    /// Copies of the sockets, to serve on. A descriptor that does not match its name is an error.
    pub(super) fn sockets(&self) -> Result<InheritedSockets, StartError> {
        match self.sockets.bad.first() {
            Some(bad) => Err(StartError::Inherited(bad.to_string())),
            None => self.usable_sockets(),
        }
    }

    /// Copies of the sockets, without the bad ones.
    pub(super) fn usable_sockets(&self) -> Result<InheritedSockets, StartError> {
        let copies = self.sockets.try_clone();
        copies.map_err(|error| StartError::System("copy the inherited sockets", error))
    }

    /// The means to ask another host about the disk; `answer` is the result of an earlier query.
    pub(super) fn startup_query<'a>(
        &'a self,
        tls: &'a ProcessTls,
        answer: Option<QueryResult>,
    ) -> StartupQuery<'a> {
        StartupQuery { notifier: &self.notifier, signals: &self.signals, tls, answer }
    }

    pub(super) fn has_sockets(&self) -> bool {
        let InheritedSockets { nbd, control, bad, .. } = &self.sockets;
        !nbd.is_empty() || control.is_some() || !bad.is_empty()
    }

    /// Whether a client or an operator has connected already; the service manager has probably
    /// started this process for them.
    pub(super) fn has_connection_waiting(&self) -> bool {
        let InheritedSockets { nbd, control, bad, .. } = &self.sockets;
        // A connection at an unusable socket also makes the service manager start the service.
        let bad = bad.iter().filter_map(|bad| bad.descriptor.as_ref());
        let bad = bad.filter(|descriptor| can_poll(descriptor)).map(AsFd::as_fd);
        let control = control.as_ref().map(AsFd::as_fd);
        let sockets: Vec<_> = nbd.iter().map(AsFd::as_fd).chain(control).chain(bad).collect();
        wait_readable(&sockets, Some(Instant::now())).is_ok_and(|ready| ready.contains(&true))
    }

    /// Listeners of the bad descriptors that accept connections, such as a socket with a wrong
    /// name.
    pub(super) fn bad_listeners(&self) -> impl Iterator<Item = Listener> {
        let bad = self.sockets.bad.iter().filter_map(|bad| bad.descriptor.as_ref());
        let bad = bad.filter_map(|descriptor| descriptor.try_clone().ok());
        bad.filter_map(|descriptor| Listener::inherited(descriptor).ok())
    }
}

/// Whether poll(2) waits for this descriptor. A file is always readable.
fn can_poll(descriptor: &OwnedFd) -> bool {
    let kind =
        fstat(descriptor).map_or(SFlag::empty(), |found| SFlag::from_bits_truncate(found.st_mode));
    matches!(kind & SFlag::S_IFMT, SFlag::S_IFSOCK | SFlag::S_IFIFO)
}
