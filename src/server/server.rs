//! The server as its owner sees it: start, reconfigure, suspend for a restart, stop.
//! Never accepts and never serves by itself; the acceptor and the sessions have threads.

use super::accept;
use super::acl::{Acl, BadEntry};
use super::client_limits::ClientLimits;
use super::events::ServerEvents;
use super::export_policy::ExportPolicy;
use super::payload_memory::PayloadMemory;
use super::rejections::Rejections;
use super::server_handles::{AcceptorHandle, ShutdownHandle};
use super::sessions::{Capacity, Sessions, SuspendedSession};
use super::settings::{
    CONTENDED_HANDSHAKE_TIMEOUT, Grace, HANDSHAKES_MAX, SessionSettings, WhenFull,
};
use super::shared::{ServerShared, export};
use super::snapshot;
use crate::disk::Disk;
use crate::human::counted;
use crate::message_id;
use crate::nbd::wire::TransmissionFlags;
use crate::net::tls::ServerTls;
use crate::net::{Listener, Stream};
use crate::sync::write;
use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, RwLock};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use tracing::{error, info, warn};

/// While some sessions wait for the disk, how often to check whether others now wait for
/// their clients.
const RECHECK_INTERVAL: Duration = Duration::from_millis(500);

/// A running server. The owner must [`stop`](Self::stop) or [`suspend`](Self::suspend) it.
#[derive(Debug)]
pub struct Server {
    shared: Arc<ServerShared>,
    acceptor: Option<JoinHandle<()>>,
}

/// How to start a server.
#[derive(Debug)]
pub struct ServerConfig<'a> {
    /// Where clients connect.
    pub listeners: Vec<Listener>,
    /// The disk to serve.
    pub disk: Arc<Disk>,
    /// Decides what clients may do with the disk.
    pub policy: Arc<dyn ExportPolicy>,
    /// Name of the export.
    pub export_name: &'a str,
    /// The addresses that may connect.
    pub acl: Acl,
    /// The largest numbers of clients.
    pub limits: ClientLimits,
    /// Most bytes for payloads of requests beyond those of each session.
    pub payload_memory: u64,
    /// What becomes of clients beyond that number.
    pub when_full: WhenFull,
    /// Settings of every session.
    pub settings: SessionSettings,
    /// Certificate and demands for TLS.
    pub tls: Option<Arc<ServerTls>>,
    /// Sessions of the previous process, to be restored.
    pub stored: StoredSessions,
    /// Why no other clients are admitted, if none are.
    pub turned_away: Option<String>,
    /// The owner's callbacks.
    pub events: Arc<dyn ServerEvents>,
}

#[cfg(test)]
impl ServerConfig<'static> {
    /// Serves up to four clients that may do everything.
    pub(crate) fn allow_all(listeners: Vec<Listener>, disk: &Arc<Disk>) -> Self {
        Self {
            listeners,
            disk: Arc::clone(disk),
            policy: Arc::new(super::export_policy::AllowAll),
            export_name: "disk",
            acl: Acl::default(),
            limits: ClientLimits::of(4),
            payload_memory: 1 << 30,
            when_full: WhenFull::Refuse,
            settings: SessionSettings::default(),
            tls: None,
            stored: StoredSessions::default(),
            turned_away: None,
            events: Arc::new(super::events::IgnoreEvents),
        }
    }
}

/// The suspended sessions of a server: a snapshot of their state, and their connections.
#[derive(Debug, Default)]
pub struct StoredSessions {
    /// The snapshot, which a process of another version may read; empty without sessions.
    pub snapshot: Vec<u8>,
    /// The connections by session id. Nothing may be sent or received on them until the sessions
    /// are restored.
    pub streams: BTreeMap<u64, Stream>,
}

impl Server {
    /// Restores stored sessions, then accepts clients.
    ///
    /// # Errors
    /// When no descriptor or thread is left.
    pub fn start(config: ServerConfig<'_>) -> io::Result<Self> {
        let ServerConfig { listeners, disk, policy, export_name, .. } = config;
        let ServerConfig {
            acl,
            limits,
            payload_memory,
            when_full,
            settings,
            tls,
            stored,
            turned_away,
            events,
            ..
        } = config;
        let capacity = Capacity {
            clients: limits,
            waits_when_full: when_full == WhenFull::Wait,
            handshakes: HANDSHAKES_MAX,
            handshake_timeout: CONTENDED_HANDSHAKE_TIMEOUT,
        };
        let export = export(&disk, export_name, policy.is_exclusive());
        let sessions = Sessions::new(capacity, acl, events)?;
        if let Some(why) = &turned_away {
            sessions.turn_away(why);
        }
        let cpus = thread::available_parallelism().map_or(1, usize::from);
        let (payloads, rejections) = (PayloadMemory::new(payload_memory), Rejections::default());
        let tls = RwLock::new(tls);
        let shared = Arc::new(ServerShared {
            disk,
            export,
            settings,
            policy,
            sessions,
            payloads,
            rejections,
            tls,
            cpus,
        });
        // Before the acceptor starts: the ids of new sessions must be greater than the restored ones.
        restore(&shared, stored);
        let for_acceptor = Arc::clone(&shared);
        let acceptor = thread::Builder::new()
            .name("serve".into())
            .spawn(move || accept::accept_clients(&for_acceptor, &listeners))?;
        Ok(Self { shared, acceptor: Some(acceptor) })
    }

    /// The number of connected clients, including those in the handshake.
    #[must_use]
    pub fn client_count(&self) -> usize {
        self.shared.sessions.count()
    }

    /// Memory for payloads of requests.
    #[must_use]
    pub fn payloads(&self) -> &PayloadMemory {
        &self.shared.payloads
    }

    /// Whether the server accepts clients.
    #[must_use]
    pub fn is_accepting(&self) -> bool {
        self.shared.sessions.is_accepting()
    }

    /// Replaces the entries of the access control list, and disconnects clients that the new list
    /// does not admit.
    ///
    /// # Errors
    /// The first malformed entry; then nothing has changed.
    pub fn set_acl<S: AsRef<str>>(&self, entries: &[S]) -> Result<(), BadEntry> {
        let set = self.shared.sessions.set_acl(entries);
        // Wakes sessions that wait at a closed gate.
        self.shared.disk.gate().nudge();
        set
    }

    /// Replaces the whole access control list, including the treatment of an empty one, and the
    /// largest numbers of clients. Disconnects clients that the new list does not admit, but none
    /// because of the numbers.
    pub fn set_admission(&self, acl: Acl, limits: ClientLimits) {
        self.shared.sessions.set_admission(acl, limits);
        self.shared.disk.gate().nudge();
    }

    /// Replaces certificate and demands for TLS, for sessions that begin from now on.
    pub fn set_tls(&self, tls: Option<Arc<ServerTls>>) {
        *write(&self.shared.tls) = tls;
    }

    /// The transmission flags and the smallest block, in bytes, that clients were offered.
    #[must_use]
    pub fn offered(&self) -> (TransmissionFlags, u32) {
        let export = &self.shared.export;
        (export.flags, export.block_sizes.minimum)
    }

    /// A handle to the thread that accepts clients.
    #[must_use]
    pub fn acceptor_handle(&self) -> AcceptorHandle {
        AcceptorHandle(Arc::clone(&self.shared.sessions))
    }

    /// A handle that other threads shut the server down with.
    #[must_use]
    pub fn shutdown_handle(&self) -> ShutdownHandle {
        ShutdownHandle(Arc::clone(&self.shared.sessions))
    }

    /// Stops accepting, lets sessions answer the requests that they have received, and disconnects
    /// the rest after `grace`. Returns when all sessions have ended, or
    /// `grace.clients` after the rest was disconnected.
    pub fn stop(&mut self, grace: impl Into<Grace>) {
        self.stop_accepting();
        self.shared.sessions.stop();
        self.wait_until_empty(grace.into());
    }

    /// Stops accepting and suspends up to `capacity` sessions for the next process, each as soon as
    /// it has no I/O in flight. Ends the other sessions, and after `grace` the busy ones, as
    /// [`Server::stop`] does. Ends all of them if a flush has failed, even one of the last: the next
    /// process would not know of the failure and report the next flush as a success.
    pub fn suspend(&mut self, capacity: usize, grace: impl Into<Grace>) -> StoredSessions {
        self.stop_accepting();
        self.shared.sessions.suspend(capacity);
        self.wait_until_empty(grace.into());
        let suspended = self.shared.sessions.take_suspended();
        if !self.shared.disk.all_flushes_succeeded() {
            warn!("closing {}: a flush has failed", counted(suspended.len(), "session"));
            return StoredSessions::default();
        }
        let (sessions, streams): (Vec<_>, BTreeMap<_, _>) = suspended
            .into_iter()
            .map(|SuspendedSession { snapshot, stream }| {
                let id = snapshot.session;
                (snapshot, (id, stream))
            })
            .unzip();
        if sessions.is_empty() {
            return StoredSessions::default();
        }
        match snapshot::encode(self.shared.fingerprint(), sessions) {
            Ok(snapshot) => StoredSessions { snapshot, streams },
            Err(why) => {
                error!("cannot pack up {}, closing: {why}", counted(streams.len(), "session"));
                StoredSessions::default()
            }
        }
    }

    /// Stops the acceptor. Every connection accepted before is registered when this returns.
    fn stop_accepting(&mut self) {
        self.shared.sessions.close();
        if let Some(acceptor) = self.acceptor.take() {
            // An error means that it panicked, which the panic hook has reported.
            let _ = acceptor.join();
        }
    }

    fn wait_until_empty(&self, grace: Grace) {
        let ServerShared { sessions, disk, .. } = &*self.shared;
        let began = Instant::now();
        disk.gate().nudge();
        let mut is_empty = sessions.wait_until_empty(began + grace.clients);
        while !is_empty && began.elapsed() < grace.disk {
            sessions.disconnect_waiting_for_client();
            is_empty = sessions.wait_until_empty(Instant::now() + RECHECK_INTERVAL);
        }
        if !is_empty {
            sessions.disconnect_all();
            disk.gate().nudge();
            sessions.wait_until_empty(Instant::now() + grace.clients);
        }
    }
}

/// Restores the sessions of the previous process, and closes those that do not fit this server.
fn restore(shared: &Arc<ServerShared>, stored: StoredSessions) {
    let StoredSessions { snapshot, mut streams } = stored;
    if snapshot.is_empty() {
        return;
    }
    match snapshot::decode(&snapshot, &shared.fingerprint()) {
        Ok(sessions) => {
            let count = sessions.len();
            for snapshot in sessions {
                // A session without a connection was closed when the previous process ended.
                if let Some(stream) = streams.remove(&snapshot.session) {
                    accept::restore(shared, SuspendedSession { snapshot, stream });
                }
            }
            info!(
                message_id = message_id::SESSIONS_RESUMED,
                "flexnbd.clients" = count,
                "going on with {} of the last process",
                counted(count, "session")
            );
        }
        Err(why) => {
            warn!("closed {} of the last process: {why}", counted(streams.len(), "session"));
        }
    }
}
