//! Serving clients: who may come in, and a session for each.
//! Never decides whose the disk is, and never ends the process.
//!
//! [`Server`] is the handle that the daemon holds. Behind it one thread accepts clients
//! (`accept`), the roster knows them all, and each has a thread with a [`session`] of its own:
//! handshake, then transmission, which fills an inbox, lets the worker answer on the disk, and
//! empties an outbox.

mod accept;
pub mod acl;
mod control;
mod delay;
mod dispatch;
mod end;
pub mod events;
mod handles;
mod heartbeat;
#[cfg(test)]
mod in_flight_tests;
mod inbox;
mod inline_reads;
mod outbox;
mod pinned;
pub mod policy;
mod polling;
mod progress;
mod reads;
mod rejections;
#[cfg(test)]
mod restart_tests;
pub mod session;
mod sessions;
mod slots;
mod snapshot;
mod stall;
#[cfg(test)]
mod tests;
pub mod throttle;
mod transmission;
mod work;

use crate::disk::Disk;
use crate::message_id;
use crate::nbd::handshake::BlockSizes;
use crate::nbd::handshake::server::Export;
use crate::nbd::wire::{PAYLOAD_LENGTH_DEFAULT, TransmissionFlags};
use crate::net::{Listener, Stream};
use crate::words::counted;
use acl::{Acl, BadEntry};
use events::ServerEvents;
pub use handles::{AcceptorHandle, ShutdownHandle};
use policy::ExportPolicy;
use rejections::Strangers;
use sessions::{Capacity, Sessions, SuspendedSession};
pub use snapshot::VERSION as SNAPSHOT_VERSION;
use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use tracing::{error, info, warn};

/// Clients at once, unless the operator says otherwise (`--max-clients`).
pub const CLIENTS_MAX: usize = 128;
/// Besides, in the handshake at once.
pub const HANDSHAKES_MAX: usize = 32;
/// How long a handshake may take.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// The longest that a handshake keeps its place while there are [`HANDSHAKES_MAX`] and more clients
/// wait; silent ones give way earlier (`places`).
pub const HANDSHAKE_PATIENCE: Duration = Duration::from_secs(1);
/// How long a request or reply may stand still with `--killswitch`.
pub const STALL_LIMIT: Duration = Duration::from_secs(120);

/// How long sessions may take to end when the server stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grace {
    /// Those that wait for their clients to take replies.
    pub clients: Duration,
    /// Those that wait for the disk, from the same moment on: a FLUSH may take long, and its client
    /// waits for the reply.
    pub disk: Duration,
}

impl From<Duration> for Grace {
    /// The same for all of them.
    fn from(both: Duration) -> Self {
        Self { clients: both, disk: both }
    }
}

/// How often to look, while some sessions wait for the disk, whether others have come to wait for
/// their clients.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// How the server speaks first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Style {
    /// With options.
    #[default]
    Newstyle,
    /// Without (`--oldstyle`).
    Oldstyle,
}

/// What applies to every session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SessionSettings {
    /// How to greet.
    pub style: Style,
    /// How long the greeting may take.
    pub handshake_timeout: Duration,
    /// How long a request or reply may stand still; without, for ever.
    pub stall_limit: Option<Duration>,
}

impl Default for SessionSettings {
    fn default() -> Self {
        let style = Style::default();
        Self { style, handshake_timeout: HANDSHAKE_TIMEOUT, stall_limit: None }
    }
}

#[derive(Debug)]
struct ServerShared {
    disk: Arc<Disk>,
    export: Export,
    settings: SessionSettings,
    policy: Arc<dyn ExportPolicy>,
    sessions: Arc<Sessions>,
    /// What strangers can have logged.
    rejections: Mutex<Strangers>,
    /// How many threads can run at once.
    cpus: usize,
}

impl ServerShared {
    /// What clients that are carried over have to find in the next process.
    fn promise(&self) -> snapshot::ExportFingerprint {
        snapshot::ExportFingerprint::of(&self.export, self.settings.style, self.disk.identity())
    }
}

/// A server that runs until it is told to stop.
#[derive(Debug)]
pub struct Server {
    shared: Arc<ServerShared>,
    acceptor: Option<JoinHandle<()>>,
}

/// What a server begins with.
#[derive(Debug)]
pub struct Opening<'a> {
    /// Where clients connect.
    pub listeners: Vec<Listener>,
    /// What is served.
    pub disk: Arc<Disk>,
    /// How far clients are let in.
    pub policy: Arc<dyn ExportPolicy>,
    /// Under which name the disk is served.
    pub name: &'a str,
    /// From where clients may come.
    pub acl: Acl,
    /// How many clients there may be.
    pub clients_max: usize,
    /// What applies to every session.
    pub settings: SessionSettings,
    /// The sessions that another process has packed up, to go on with.
    pub luggage: StoredSessions,
    /// Who is told what happens.
    pub events: Arc<dyn ServerEvents>,
}

#[cfg(test)]
impl Opening<'static> {
    /// Lets four clients at once do everything.
    pub(crate) fn to_anybody(listeners: Vec<Listener>, disk: &Arc<Disk>) -> Self {
        Self {
            listeners,
            disk: Arc::clone(disk),
            policy: Arc::new(policy::AllowAll),
            name: "disk",
            acl: Acl::default(),
            clients_max: 4,
            settings: SessionSettings::default(),
            luggage: StoredSessions::default(),
            events: Arc::new(events::IgnoreEvents),
        }
    }
}

/// The sessions of a server, packed up: what they were in the middle of, and the connection of each
/// under its number in there.
#[derive(Debug, Default)]
pub struct StoredSessions {
    /// For the next process, which may be of another version of this program; empty if there is
    /// nothing.
    pub note: Vec<u8>,
    /// The connections. Nothing may be sent or received on them meanwhile.
    pub streams: BTreeMap<u64, Stream>,
}

impl Server {
    /// Serves a disk to whoever connects and is admitted, and to those who did so before.
    ///
    /// # Errors
    /// When there is no descriptor or thread left.
    pub fn start(opening: Opening<'_>) -> io::Result<Self> {
        let Opening { listeners, disk, policy, name, .. } = opening;
        let Opening { acl, clients_max, settings, luggage, events, .. } = opening;
        let capacity = Capacity {
            sessions: clients_max,
            handshakes: HANDSHAKES_MAX,
            patience: HANDSHAKE_PATIENCE,
        };
        let export = export(&disk, name, policy.is_exclusive());
        let sessions = Sessions::new(capacity, acl, events)?;
        let cpus = thread::available_parallelism().map_or(1, usize::from);
        let rejections = Mutex::default();
        let shared =
            Arc::new(ServerShared { disk, export, settings, policy, sessions, rejections, cpus });
        // First those who were here before: newcomers get numbers beyond theirs.
        resume(&shared, luggage);
        let for_acceptor = Arc::clone(&shared);
        let acceptor = thread::Builder::new()
            .name("serve".into())
            .spawn(move || accept::accept_clients(&for_acceptor, &listeners))?;
        Ok(Self { shared, acceptor: Some(acceptor) })
    }

    /// How many clients are connected.
    #[must_use]
    pub fn clients(&self) -> usize {
        self.shared.sessions.count()
    }

    /// Whether clients are let in.
    #[must_use]
    pub fn accepts(&self) -> bool {
        !self.shared.sessions.is_stopping()
    }

    /// Replaces the entries of the access control list; sessions that the new ones do not admit
    /// end at once.
    ///
    /// # Errors
    /// The first entry that is none; then nothing has changed.
    pub fn set_acl<S: AsRef<str>>(&self, entries: &[S]) -> Result<(), BadEntry> {
        let set = self.shared.sessions.set_acl(entries);
        // A session that waits at a closed gate has to look up.
        self.shared.disk.gate().nudge();
        set
    }

    /// Replaces the whole access control list, also how an empty one is treated, and the number of
    /// clients there may be; those who are connected stay unless the list does not admit them.
    pub fn readmit(&self, acl: Acl, clients_max: usize) {
        self.shared.sessions.readmit(acl, clients_max);
        self.shared.disk.gate().nudge();
    }

    /// The door that clients come in by.
    #[must_use]
    pub fn door(&self) -> AcceptorHandle {
        AcceptorHandle(Arc::clone(&self.shared.sessions))
    }

    /// How to end all sessions from elsewhere.
    #[must_use]
    pub fn exit(&self) -> ShutdownHandle {
        ShutdownHandle(Arc::clone(&self.shared.sessions))
    }

    /// Lets nobody in any more, lets sessions answer what they have received, and ends those that
    /// have not done so within `grace`. Returns when all have ended, or that of clients has passed
    /// once more.
    pub fn stop(&mut self, grace: impl Into<Grace>) {
        self.close();
        self.shared.sessions.stop();
        self.wait_until_empty(grace.into());
    }

    /// Lets nobody in any more and packs sessions up for the next process, as soon as each has
    /// carried out what it has received, and as many as there is `room` for. Ends the others, and
    /// those that are not ready within `grace`, as [`Server::stop`] does; and all of them when a flush
    /// has failed, be it one of those carried out last: the next process would not know of it, and
    /// call the next flush a success.
    pub fn pack_up(&mut self, room: usize, grace: impl Into<Grace>) -> StoredSessions {
        self.close();
        self.shared.sessions.pack_up(room);
        self.wait_until_empty(grace.into());
        let parcels = self.shared.sessions.parcels();
        if !self.shared.disk.all_flushes_succeeded() {
            warn!("closing {}: a flush has failed", counted(parcels.len(), "session"));
            return StoredSessions::default();
        }
        let (sessions, streams): (Vec<_>, BTreeMap<_, _>) = parcels
            .into_iter()
            .map(|SuspendedSession { carried, stream }| {
                let number = carried.session;
                (carried, (number, stream))
            })
            .unzip();
        if sessions.is_empty() {
            return StoredSessions::default();
        }
        match snapshot::encode(self.shared.promise(), sessions) {
            Ok(note) => StoredSessions { note, streams },
            Err(why) => {
                error!("cannot pack up {}, closing: {why}", counted(streams.len(), "session"));
                StoredSessions::default()
            }
        }
    }

    /// Accepts nobody any more. Whoever was accepted before has a place after this.
    fn close(&mut self) {
        self.shared.sessions.close();
        if let Some(acceptor) = self.acceptor.take() {
            // It panicked if this fails, which has been reported where it happened.
            let _ = acceptor.join();
        }
    }

    fn wait_until_empty(&self, grace: Grace) {
        let ServerShared { sessions, disk, .. } = &*self.shared;
        let began = Instant::now();
        disk.gate().nudge();
        let mut is_empty = sessions.wait_until_empty(began + grace.clients);
        while !is_empty && began.elapsed() < grace.disk {
            sessions.clear_but_for_disk();
            is_empty = sessions.wait_until_empty(Instant::now() + LOOK_EVERY);
        }
        if !is_empty {
            sessions.clear();
            disk.gate().nudge();
            sessions.wait_until_empty(Instant::now() + grace.clients);
        }
    }
}

/// Goes on with what another process has packed up; what cannot be, is closed.
fn resume(shared: &Arc<ServerShared>, luggage: StoredSessions) {
    let StoredSessions { note, mut streams } = luggage;
    if note.is_empty() {
        return;
    }
    match snapshot::decode(&note, &shared.promise()) {
        Ok(sessions) => {
            let count = sessions.len();
            for carried in sessions {
                // One without a connection was closed when the other process ended.
                if let Some(stream) = streams.remove(&carried.session) {
                    accept::resume(shared, SuspendedSession { carried, stream });
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

fn export(disk: &Disk, name: &str, exclusive: bool) -> Export {
    let mut flags = TransmissionFlags::HAS_FLAGS
        | TransmissionFlags::SEND_FLUSH
        | TransmissionFlags::SEND_FUA
        | TransmissionFlags::SEND_CACHE;
    flags.set(TransmissionFlags::CAN_MULTI_CONN, !exclusive);
    flags |= if disk.read_only() {
        TransmissionFlags::READ_ONLY
    } else {
        TransmissionFlags::SEND_TRIM
            | TransmissionFlags::SEND_WRITE_ZEROES
            | TransmissionFlags::SEND_FAST_ZERO
    };
    Export {
        name: name.to_owned(),
        description: String::new(),
        size: disk.size(),
        flags,
        block_sizes: BlockSizes { minimum: 1, preferred: 4096, maximum: PAYLOAD_LENGTH_DEFAULT },
    }
}
