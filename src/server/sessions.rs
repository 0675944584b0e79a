//! Who is connected, who may be, and how to reach them all.
//! Decides under one lock, so that a client cannot slip in between a new list and its enforcement.

use super::acl::{Acl, BadEntry};
use super::control::{SessionControl, StopRequest};
use super::events::ServerEvents;
use super::heartbeat::Heartbeat;
use super::policy::{SessionId, SessionsView};
use super::slots::{self, SilentConnection, SlotAvailability, SourceNetwork};
use super::snapshot::SessionSnapshot;
use crate::net::{Peer, Stream, Wake};
use crate::sync;
use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};
use tracing::info;

/// How many connections that were told to give way may still be about to.
const LEAVING_MAX: usize = 16;

/// How many clients there may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Capacity {
    /// Beyond the handshake.
    pub(super) sessions: usize,
    /// Besides, in the handshake.
    pub(super) handshakes: usize,
    /// The longest that a handshake keeps its place from others.
    pub(super) patience: Duration,
}

/// Everybody who is connected.
#[derive(Debug)]
pub(super) struct Sessions {
    capacity: Capacity,
    inner: Mutex<SessionTable>,
    /// Whenever somebody has left.
    left: Condvar,
    /// Rung whenever somebody leaves, finishes the handshake, or the server is to stop.
    pub(super) bell: Wake,
    /// Hears of everybody who comes and goes.
    pub(super) events: Arc<dyn ServerEvents>,
    pub(super) heartbeat: Heartbeat,
}

#[derive(Debug)]
struct SessionTable {
    acl: Acl,
    sessions_max: usize,
    /// Nobody is accepted any more; who has been may still come in.
    closed: bool,
    stopping: bool,
    /// Somebody is being accepted who has no place yet.
    arriving: bool,
    next_id: u64,
    entries: Entries,
    /// What those who were told to pack up have handed in.
    parcels: Vec<SuspendedSession>,
}

/// Somebody is being accepted; over when this is dropped.
#[derive(Debug)]
pub(super) struct PendingAccept<'a>(&'a Sessions);

impl Drop for PendingAccept<'_> {
    fn drop(&mut self) {
        self.0.lock().arriving = false;
    }
}

/// A session packed up, and its connection.
#[derive(Debug)]
pub(super) struct SuspendedSession {
    pub(super) carried: SessionSnapshot,
    pub(super) stream: Stream,
}

/// By id, so that the oldest comes first.
type Entries = BTreeMap<u64, SessionEntry>;

#[derive(Debug)]
struct SessionEntry {
    peer: Peer,
    orders: Arc<SessionControl>,
    place: SlotKind,
}

/// Which kind of place a connection has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SlotKind {
    /// In the handshake.
    Greeting(SilentConnection),
    /// It was told to give way to another connection, and is about to.
    Leaving,
    /// Beyond the handshake: it is one of the clients that `--max-clients` limits.
    Seated,
}

/// Whether the next connection can be accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AcceptReadiness {
    Open,
    /// Not before then, unless the bell rings earlier.
    OpensAt(Instant),
    /// Not before the bell rings.
    Shut,
}

/// Why a client was sent away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AdmissionError {
    /// The access control list does not admit it.
    Acl,
    /// There are as many as there may be, of its own address among them.
    Full(usize),
    /// No more clients are taken.
    Stopping,
    /// No descriptors are left.
    NoDescriptors,
}

impl std::fmt::Display for AdmissionError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Acl => f.write_str("the access control list does not admit it"),
            Self::Full(1) => f.write_str("1 client is connected, which is the limit"),
            Self::Full(limit) => write!(f, "{limit} clients are connected, which is the limit"),
            Self::Stopping => f.write_str("the server is stopping"),
            Self::NoDescriptors => f.write_str("no file descriptors are left"),
        }
    }
}

/// A client's place. It is free again when this is dropped.
#[derive(Debug)]
pub(super) struct Registration {
    sessions: Arc<Sessions>,
    /// Number of the session; never used twice.
    pub(super) id: u64,
    /// When its handshake began, in this process.
    pub(super) since: Instant,
    /// What the session is told.
    pub(super) orders: Arc<SessionControl>,
}

impl Registration {
    /// How many sessions there are, this one included.
    pub(super) fn company(&self) -> usize {
        self.sessions.count()
    }
}

impl Sessions {
    pub(super) fn new(
        capacity: Capacity,
        acl: Acl,
        events: Arc<dyn ServerEvents>,
    ) -> io::Result<Arc<Self>> {
        let inner = SessionTable {
            acl,
            sessions_max: capacity.sessions,
            closed: false,
            stopping: false,
            arriving: false,
            next_id: 1,
            entries: BTreeMap::new(),
            parcels: Vec::new(),
        };
        let (inner, left, heartbeat) = (Mutex::new(inner), Condvar::new(), Heartbeat::default());
        Ok(Arc::new(Self { capacity, inner, left, bell: Wake::new()?, events, heartbeat }))
    }

    /// To be held while a client is accepted, until it has a place or has been refused one. None
    /// when nobody is accepted any more.
    pub(super) fn expect(&self) -> Option<PendingAccept<'_>> {
        let mut inner = self.lock();
        if inner.closed || inner.stopping {
            return None;
        }
        inner.arriving = true;
        Some(PendingAccept(self))
    }

    /// Accepts nobody any more, if nobody is here or arriving. Returns whether that is so.
    pub(super) fn close_if_empty(&self) -> bool {
        let mut inner = self.lock();
        inner.closed |= inner.entries.is_empty() && !inner.arriving;
        let closed = inner.closed;
        drop(inner);
        self.bell.wake();
        closed
    }

    /// A place for this client, or why there is none.
    pub(super) fn admit(
        self: &Arc<Self>,
        peer: Peer,
        now: Instant,
    ) -> Result<Registration, AdmissionError> {
        let mut inner = self.lock();
        if inner.stopping {
            return Err(AdmissionError::Stopping);
        }
        if !peer.ip().is_none_or(|ip| inner.acl.admits(ip)) {
            return Err(AdmissionError::Acl);
        }
        if inner.is_full() && inner.has_client_of(&peer) {
            return Err(AdmissionError::Full(inner.sessions_max));
        }
        if let SlotAvailability::Instead(id) = inner.room(self.capacity, now) {
            inner.evict(id);
        }
        let id = inner.next_id;
        self.registration(
            &mut inner,
            id,
            peer,
            SlotKind::Greeting(SilentConnection::new(&peer, now)),
        )
    }

    /// Ends the connection in the handshake that is the first to give way to another one, even if it
    /// came just now; false if there is none that has been quiet for a moment. For when the system
    /// has nothing left for another connection.
    pub(super) fn free_something(&self, now: Instant) -> bool {
        let mut inner = self.lock();
        let everybody = Capacity { handshakes: 0, ..self.capacity };
        let room = inner.room(everybody, now + slots::FIRST_OPTION);
        if let SlotAvailability::Instead(id) = room {
            inner.evict(id);
        }
        matches!(room, SlotAvailability::Instead(_))
    }

    /// Whether the next connection can be accepted.
    pub(super) fn entrance(&self, now: Instant) -> AcceptReadiness {
        let inner = self.lock();
        let leaving =
            inner.entries.values().filter(|entry| entry.place == SlotKind::Leaving).count();
        if leaving >= LEAVING_MAX {
            return AcceptReadiness::Shut;
        }
        match inner.room(self.capacity, now) {
            SlotAvailability::Free | SlotAvailability::Instead(_) => AcceptReadiness::Open,
            SlotAvailability::From(at) => AcceptReadiness::OpensAt(at),
            SlotAvailability::None => AcceptReadiness::Shut,
        }
    }

    /// A place for a client that another process has let in, under the number that it had there;
    /// as with a new list, it has to be admitted by that, and the number of clients does not count.
    pub(super) fn take_over(
        self: &Arc<Self>,
        id: u64,
        peer: Peer,
        greeting_since: Option<Instant>,
    ) -> Result<Registration, AdmissionError> {
        let mut inner = self.lock();
        if !peer.ip().is_none_or(|ip| inner.acl.admits(ip)) {
            return Err(AdmissionError::Acl);
        }
        let greeting = greeting_since.map(|since| SilentConnection::new(&peer, since));
        self.registration(
            &mut inner,
            id,
            peer,
            greeting.map_or(SlotKind::Seated, SlotKind::Greeting),
        )
    }

    fn registration(
        self: &Arc<Self>,
        inner: &mut SessionTable,
        id: u64,
        peer: Peer,
        place: SlotKind,
    ) -> Result<Registration, AdmissionError> {
        let orders = Arc::new(SessionControl::new().map_err(|_| AdmissionError::NoDescriptors)?);
        inner.next_id = inner.next_id.max(id.saturating_add(1));
        let entry = SessionEntry { peer, orders: Arc::clone(&orders), place };
        inner.entries.insert(id, entry);
        self.events.clients_changed();
        let since = match place {
            SlotKind::Greeting(greeting) => greeting.since,
            SlotKind::Leaving | SlotKind::Seated => Instant::now(),
        };
        Ok(Registration { sessions: Arc::clone(self), id, since, orders })
    }

    /// Accepts nobody any more. Whoever has been accepted still gets a place.
    pub(super) fn close(&self) {
        self.lock().closed = true;
        self.bell.wake();
    }

    /// Whether nobody is accepted any more.
    pub(super) fn is_closed(&self) -> bool {
        let inner = self.lock();
        inner.closed || inner.stopping
    }

    /// Takes no more clients, tells the first `room` of those who are here to pack up and the others
    /// to finish.
    pub(super) fn pack_up(&self, room: usize) {
        let mut inner = self.lock();
        inner.stopping = true;
        for (place, entry) in inner.entries.values().enumerate() {
            entry.orders.give(if place < room { StopRequest::PackUp } else { StopRequest::Finish });
        }
    }

    /// Replaces the list; sessions that it does not admit are told to end.
    pub(super) fn set_acl<S: AsRef<str>>(&self, entries: &[S]) -> Result<(), BadEntry> {
        let mut inner = self.lock();
        inner.acl = inner.acl.replaced(entries)?;
        inner.expel();
        drop(inner);
        self.bell.wake();
        Ok(())
    }

    /// Replaces the list, how an empty one is treated, and how many there may be. Of those who are
    /// here, only the ones that the list does not admit are told to end.
    pub(super) fn readmit(&self, acl: Acl, sessions_max: usize) {
        let mut inner = self.lock();
        (inner.acl, inner.sessions_max) = (acl, sessions_max);
        inner.expel();
        drop(inner);
        self.bell.wake();
    }

    /// Takes no more clients, and tells those who are here to finish.
    pub(super) fn stop(&self) {
        let mut inner = self.lock();
        inner.stopping = true;
        inner.entries.values().for_each(|entry| entry.orders.give(StopRequest::Finish));
        drop(inner);
        self.bell.wake();
    }

    /// What has been handed in by now.
    pub(super) fn parcels(&self) -> Vec<SuspendedSession> {
        std::mem::take(&mut self.lock().parcels)
    }

    /// Tells these sessions to leave at once and waits until they have; false if they have not by
    /// `deadline`.
    fn dismiss(&self, ids: &[u64], deadline: Instant) -> bool {
        let inner = self.lock();
        let leaving = ids.iter().filter_map(|id| inner.entries.get(id));
        leaving.for_each(|entry| entry.orders.give(StopRequest::Displaced));
        drop(inner);
        let gone = |entries: &Entries| !ids.iter().any(|id| entries.contains_key(id));
        self.wait_until(gone, deadline)
    }

    /// Tells those to leave at once that do not wait for the disk.
    pub(super) fn clear_but_for_disk(&self) {
        let inner = self.lock();
        let entries = inner.entries.values().filter(|entry| !entry.orders.waits_for_disk());
        entries.for_each(|entry| entry.orders.give(StopRequest::Leave));
    }

    /// Tells everybody to leave at once.
    pub(super) fn clear(&self) {
        self.lock().entries.values().for_each(|entry| entry.orders.give(StopRequest::Leave));
    }

    /// Waits until everybody has left; false if somebody has not by `deadline`.
    pub(super) fn wait_until_empty(&self, deadline: Instant) -> bool {
        self.wait_until(BTreeMap::is_empty, deadline)
    }

    fn wait_until(&self, done: impl Fn(&Entries) -> bool, deadline: Instant) -> bool {
        let mut inner = self.lock();
        while !done(&inner.entries) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            inner = sync::wait_timeout(&self.left, inner, left).0;
        }
        true
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.lock().stopping
    }

    pub(super) fn count(&self) -> usize {
        self.lock().entries.len()
    }

    fn lock(&self) -> MutexGuard<'_, SessionTable> {
        sync::lock(&self.inner)
    }
}

impl SessionTable {
    /// Whether there are as many clients as there may be.
    fn is_full(&self) -> bool {
        let seated = self.entries.values().filter(|entry| entry.place == SlotKind::Seated);
        seated.count() >= self.sessions_max
    }

    /// Whether a client has a place that comes from the same address, or network, as this one. A
    /// connection from elsewhere is greeted even in a full house: it may be a source, or the question
    /// of one, from a host that has no client here.
    fn has_client_of(&self, peer: &Peer) -> bool {
        let quarter = SourceNetwork::from(peer);
        let mut seated = self.entries.values().filter(|entry| entry.place == SlotKind::Seated);
        seated.any(|entry| SourceNetwork::from(&entry.peer) == quarter)
    }

    /// Whether this client may go on beyond the handshake. A source may always: who has a disk to
    /// hand over is not kept out by others.
    fn may_sit(&self, id: u64) -> bool {
        match self.entries.get(&id).map(|entry| &entry.place) {
            Some(SlotKind::Greeting(greeting)) => greeting.introduced || !self.is_full(),
            Some(SlotKind::Leaving | SlotKind::Seated) => true,
            None => false,
        }
    }

    fn room(&self, capacity: Capacity, now: Instant) -> SlotAvailability {
        let greeting = self.entries.iter().filter_map(|(id, entry)| match &entry.place {
            SlotKind::Greeting(greeting) => Some((*id, greeting)),
            SlotKind::Leaving | SlotKind::Seated => None,
        });
        slots::room(greeting, capacity.handshakes, capacity.patience, now)
    }

    fn evict(&mut self, id: u64) {
        if let Some(entry) = self.entries.get_mut(&id) {
            entry.orders.give(StopRequest::GiveWay);
            entry.place = SlotKind::Leaving;
        }
    }

    fn expel(&self) {
        for entry in self.entries.values() {
            if !entry.peer.ip().is_none_or(|ip| self.acl.admits(ip)) {
                entry.orders.give(StopRequest::NotAdmitted);
            }
        }
    }
}

impl Registration {
    /// Tells other sessions to leave and waits until they have; false if they have not by
    /// `deadline`.
    pub(super) fn dismiss(&self, others: &[u64], deadline: Instant) -> bool {
        others.is_empty() || self.sessions.dismiss(others, deadline)
    }

    /// Waits until another session has left; false if it has not by `deadline`.
    pub(super) fn sees_leave(&self, other: u64, deadline: Instant) -> bool {
        self.sessions.wait_until(|entries| !entries.contains_key(&other), deadline)
    }

    /// All sessions.
    pub(super) fn sessions(&self) -> &dyn SessionsView {
        &*self.sessions
    }

    /// Leaves the place, and the session packed up.
    pub(super) fn hand_in(self, parcel: SuspendedSession) {
        self.sessions.lock().parcels.push(parcel);
    }

    /// The client has sent an option.
    pub(super) fn spoke(&self, now: Instant) {
        self.greeting(|greeting| greeting.spoke = Some(now));
    }

    /// The client has introduced itself, and was accepted.
    pub(super) fn introduced(&self) {
        self.greeting(|greeting| greeting.introduced = true);
    }

    fn greeting(&self, change: impl FnOnce(&mut SilentConnection)) {
        let mut inner = self.sessions.lock();
        if let Some(SessionEntry { place: SlotKind::Greeting(greeting), .. }) =
            inner.entries.get_mut(&self.id)
        {
            change(greeting);
        }
    }

    /// Why the client cannot go on beyond the handshake, if it cannot.
    pub(super) fn closed(&self) -> Option<&'static str> {
        let inner = self.sessions.lock();
        (!inner.may_sit(self.id)).then_some("as many clients are connected as may be")
    }

    /// Whether the handshake is over.
    pub(super) fn is_seated(&self) -> bool {
        let inner = self.sessions.lock();
        inner.entries.get(&self.id).is_some_and(|entry| entry.place == SlotKind::Seated)
    }

    /// The handshake is over: its place is free for another client. False if there are as many
    /// clients as there may be, so that this one has to leave.
    pub(super) fn greeted(&self) -> bool {
        let mut inner = self.sessions.lock();
        if !inner.may_sit(self.id) {
            return false;
        }
        let Some(entry) = inner.entries.get_mut(&self.id) else { return false };
        let (peer, before) = (entry.peer, entry.place);
        if matches!(before, SlotKind::Greeting(_)) {
            entry.place = SlotKind::Seated;
        }
        drop(inner);
        if matches!(before, SlotKind::Greeting(_)) {
            info!("flexnbd.client" = %peer, "flexnbd.session" = self.id, "{peer} connected");
        }
        self.sessions.bell.wake();
        true
    }
}

impl SessionsView for Sessions {
    fn silence(&self, session: SessionId) -> Duration {
        let inner = self.lock();
        inner.entries.get(&session).map_or(Duration::ZERO, |entry| entry.orders.silence())
    }

    fn peer(&self, session: SessionId) -> Option<Peer> {
        self.lock().entries.get(&session).map(|entry| entry.peer)
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        let mut inner = self.sessions.lock();
        inner.entries.remove(&self.id);
        drop(inner);
        self.sessions.events.clients_changed();
        self.sessions.left.notify_all();
        self.sessions.bell.wake();
    }
}

#[cfg(test)]
mod tests;
