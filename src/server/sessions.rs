//! The table of sessions: registers clients within the limits, and reaches all of them.
//! One lock covers the access control list and the table, so that no client can be registered between
//! a change of the list and its enforcement.

use super::acl::{Acl, BadEntry};
use super::client_limits::{ClientLimits, LimitReached, SESSIONS_LOGGED_MAX};
use super::events::ServerEvents;
use super::export_policy::{SessionId, SessionsView};
use super::handshake_slots::{self, HandshakeSlot, SlotAvailability, SourceNetwork};
use super::heartbeat::Heartbeat;
use super::snapshot::SessionSnapshot;
use super::stop_request::{SessionControl, StopRequest};
use crate::net::{Peer, Stream, Wake};
use crate::sync::{self, Condvar, Mutex, MutexGuard};
use crate::systemd::log_limit::LogLimit;
use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};
use thiserror::Error;
use tracing::info_span;

// A path that tests/models can follow, too.
#[path = "sessions/registration.rs"]
mod registration;

pub(super) use registration::Registration;

/// How many evicted connections may not have been closed yet before accepting pauses.
const EVICTED_MAX: usize = 16;

/// The limits of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Capacity {
    /// Clients that have finished the handshake.
    pub(super) clients: ClientLimits,
    /// Further clients wait without a greeting, and connections in the handshake count as clients.
    pub(super) waits_when_full: bool,
    /// Connections in the handshake, in addition.
    pub(super) handshakes: usize,
    /// The longest that a connection in the handshake keeps its slot while others wait.
    pub(super) handshake_timeout: Duration,
}

/// All sessions of a server.
#[derive(Debug)]
pub(super) struct Sessions {
    capacity: Capacity,
    inner: Mutex<SessionTable>,
    /// Notified whenever a session is removed, for the thread that stops the server.
    removed: Condvar,
    /// Wakes the acceptor: a slot or descriptor may be free, or the server is to stop.
    pub(super) acceptor_wake: Wake,
    pub(super) events: Arc<dyn ServerEvents>,
    pub(super) heartbeat: Heartbeat,
}

#[derive(Debug)]
struct SessionTable {
    acl: Acl,
    limits: ClientLimits,
    /// The acceptor has to stop. A connection that it has accepted may still be registered.
    closed: bool,
    /// No connection is registered any more.
    stopping: bool,
    /// Why no client is admitted any more, although the sessions go on.
    turned_away: Option<Arc<str>>,
    /// The acceptor is accepting a connection that is not registered yet.
    accepting: bool,
    next_id: u64,
    entries: Entries,
    /// The sessions suspended so far.
    suspended: Vec<SuspendedSession>,
    /// Which sessions have lines in the log.
    logged: LogLimit<SourceNetwork>,
}

/// Guard: the acceptor is accepting a connection.
#[derive(Debug)]
pub(super) struct PendingAccept<'a>(&'a Sessions);

impl Drop for PendingAccept<'_> {
    fn drop(&mut self) {
        self.0.lock().accepting = false;
    }
}

/// The state of a session that has ended for a restart, and its connection.
#[derive(Debug)]
pub(super) struct SuspendedSession {
    pub(super) snapshot: SessionSnapshot,
    pub(super) stream: Stream,
}

/// By id, so that the oldest session comes first.
type Entries = BTreeMap<u64, SessionEntry>;

#[derive(Debug)]
struct SessionEntry {
    peer: Peer,
    control: Arc<SessionControl>,
    slot: SlotKind,
    /// It waits for the end of other sessions, and is woken when the next one ends.
    awaits_others: bool,
    /// The limit that has kept it out.
    kept_out: Option<LimitReached>,
    /// Its client may cause no lines in the log: those of the same network have caused enough.
    is_quiet: bool,
}

/// The limit that a connection counts against.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SlotKind {
    /// In the handshake.
    Handshake(HandshakeSlot),
    /// Evicted from the handshake, but not closed yet.
    Evicted,
    /// Beyond the handshake: a client that `--max-clients` counts.
    Established,
}

/// Whether the next connection can be accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AcceptReadiness {
    Ready,
    /// At this time, or after `acceptor_wake` if that is earlier.
    ReadyAt(Instant),
    /// After `acceptor_wake`.
    NotReady,
}

/// Why a client is refused.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub(super) enum AdmissionError {
    #[error("the access control list does not admit it")]
    Acl,
    /// The number of clients is at its limit, and one of them has the same address.
    #[error("{}, which is the limit", clients_are_connected(*.0))]
    Full(usize),
    #[error("the server is stopping")]
    Stopping,
    /// The owner of the server admits none any more, for this reason.
    #[error("{0}")]
    TurnedAway(Arc<str>),
    #[error("no file descriptors are left")]
    NoDescriptors,
}

fn clients_are_connected(count: usize) -> String {
    if count == 1 {
        "1 client is connected".to_owned()
    } else {
        format!("{count} clients are connected")
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
            limits: capacity.clients,
            closed: false,
            stopping: false,
            turned_away: None,
            accepting: false,
            next_id: 1,
            entries: BTreeMap::new(),
            suspended: Vec::new(),
            logged: LogLimit::with_lines(SESSIONS_LOGGED_MAX),
        };
        let (inner, removed, heartbeat) = (Mutex::new(inner), Condvar::new(), Heartbeat::default());
        Ok(Arc::new(Self {
            capacity,
            inner,
            removed,
            acceptor_wake: Wake::new()?,
            events,
            heartbeat,
        }))
    }

    /// Begins to accept a connection. The acceptor holds the guard until the connection is registered
    /// or refused. `None` if accepting has stopped.
    pub(super) fn begin_accept(&self) -> Option<PendingAccept<'_>> {
        let mut inner = self.lock();
        if inner.closed || inner.stopping {
            return None;
        }
        inner.accepting = true;
        Some(PendingAccept(self))
    }

    /// Stops accepting if no client is registered or being accepted; returns whether accepting has
    /// stopped.
    pub(super) fn close_if_empty(&self) -> bool {
        let mut inner = self.lock();
        inner.closed |= inner.entries.is_empty() && !inner.accepting;
        let closed = inner.closed;
        drop(inner);
        self.acceptor_wake.wake();
        closed
    }

    /// Registers a new connection, for which another one may be evicted from the handshake.
    pub(super) fn admit(
        self: &Arc<Self>,
        peer: Peer,
        now: Instant,
    ) -> Result<Registration, AdmissionError> {
        let mut inner = self.lock();
        if inner.stopping {
            return Err(AdmissionError::Stopping);
        }
        if let Some(why) = &inner.turned_away {
            return Err(AdmissionError::TurnedAway(Arc::clone(why)));
        }
        if !peer.ip().is_none_or(|ip| inner.acl.admits(ip)) {
            return Err(AdmissionError::Acl);
        }
        if inner.is_full() && inner.has_client_of(&peer) {
            return Err(AdmissionError::Full(inner.limits.clients));
        }
        if let SlotAvailability::AfterEvicting(id) = inner.slot_availability(self.capacity, now) {
            inner.evict(id);
        }
        let id = inner.next_id;
        let slot = SlotKind::Handshake(HandshakeSlot::new(&peer, now));
        self.register(&mut inner, id, peer, slot)
    }

    /// Evicts the connection in the handshake that is first in order, even a new one, when the system
    /// has no descriptor or thread for another. False if every connection has just sent an option.
    pub(super) fn evict_one(&self, now: Instant) -> bool {
        let mut inner = self.lock();
        let none_free = Capacity { handshakes: 0, ..self.capacity };
        let availability =
            inner.slot_availability(none_free, now + handshake_slots::FIRST_OPTION_TIMEOUT);
        let SlotAvailability::AfterEvicting(id) = availability else { return false };
        inner.evict(id);
        true
    }

    /// Whether the next connection can be accepted.
    pub(super) fn accept_readiness(&self, now: Instant) -> AcceptReadiness {
        let inner = self.lock();
        let evicted = inner.entries.values().filter(|entry| entry.slot == SlotKind::Evicted);
        if evicted.count() >= EVICTED_MAX {
            return AcceptReadiness::NotReady;
        }
        let waits = self.capacity.waits_when_full;
        if waits && inner.entries.len() >= inner.limits.clients {
            return AcceptReadiness::NotReady;
        }
        match inner.slot_availability(self.capacity, now) {
            SlotAvailability::Free | SlotAvailability::AfterEvicting(_) => AcceptReadiness::Ready,
            SlotAvailability::At(at) => AcceptReadiness::ReadyAt(at),
            SlotAvailability::None => AcceptReadiness::NotReady,
        }
    }

    /// Registers a session of the previous process under the id that it had there. As after a change
    /// of the access control list, that has to admit it, and the number of clients does not matter.
    pub(super) fn restore(
        self: &Arc<Self>,
        id: u64,
        peer: Peer,
        handshake_since: Option<Instant>,
    ) -> Result<Registration, AdmissionError> {
        let mut inner = self.lock();
        if !peer.ip().is_none_or(|ip| inner.acl.admits(ip)) {
            return Err(AdmissionError::Acl);
        }
        let slot = handshake_since.map_or(SlotKind::Established, |since| {
            SlotKind::Handshake(HandshakeSlot::new(&peer, since))
        });
        self.register(&mut inner, id, peer, slot)
    }

    fn register(
        self: &Arc<Self>,
        inner: &mut SessionTable,
        id: u64,
        peer: Peer,
        slot: SlotKind,
    ) -> Result<Registration, AdmissionError> {
        let control = Arc::new(SessionControl::new().map_err(|_| AdmissionError::NoDescriptors)?);
        inner.next_id = inner.next_id.max(id.saturating_add(1));
        let entry = SessionEntry {
            peer,
            control: Arc::clone(&control),
            slot,
            awaits_others: false,
            kept_out: None,
            is_quiet: false,
        };
        inner.entries.insert(id, entry);
        self.events.clients_changed();
        let since = match slot {
            SlotKind::Handshake(handshake) => handshake.since,
            SlotKind::Evicted | SlotKind::Established => Instant::now(),
        };
        let span = info_span!("session", "flexnbd.client" = %peer, "flexnbd.session" = id);
        Ok(Registration { sessions: Arc::clone(self), id, since, control, span })
    }

    /// Stops accepting. A connection that is being accepted is still registered.
    pub(super) fn close(&self) {
        self.lock().closed = true;
        self.acceptor_wake.wake();
    }

    /// Whether accepting has stopped.
    pub(super) fn is_closed(&self) -> bool {
        let inner = self.lock();
        inner.closed || inner.stopping
    }

    /// Registers no more clients, and requests the oldest `capacity` sessions to suspend and the
    /// others to finish.
    pub(super) fn suspend(&self, capacity: usize) {
        let mut inner = self.lock();
        inner.stopping = true;
        for (index, entry) in inner.entries.values().enumerate() {
            let suspends = index < capacity;
            entry.control.request(if suspends {
                StopRequest::Suspend
            } else {
                StopRequest::Finish
            });
        }
    }

    /// Replaces the entries of the access control list, and enforces it.
    pub(super) fn set_acl<S: AsRef<str>>(&self, entries: &[S]) -> Result<(), BadEntry> {
        let mut inner = self.lock();
        inner.acl = inner.acl.with_entries(entries)?;
        inner.enforce_acl();
        drop(inner);
        self.acceptor_wake.wake();
        Ok(())
    }

    /// Replaces the whole access control list, and enforces it; replaces the largest numbers of
    /// clients, which apply to new ones.
    pub(super) fn set_admission(&self, acl: Acl, limits: ClientLimits) {
        let mut inner = self.lock();
        (inner.acl, inner.limits) = (acl, limits);
        inner.enforce_acl();
        drop(inner);
        self.acceptor_wake.wake();
    }

    /// Admits no more clients, for this reason; the sessions go on.
    pub(super) fn turn_away(&self, why: &str) {
        self.lock().turned_away = Some(why.into());
    }

    /// Registers no more clients, and requests all sessions to finish.
    pub(super) fn stop(&self) {
        let mut inner = self.lock();
        inner.stopping = true;
        inner.entries.values().for_each(|entry| entry.control.request(StopRequest::Finish));
        drop(inner);
        self.acceptor_wake.wake();
    }

    /// The sessions suspended since the last call.
    pub(super) fn take_suspended(&self) -> Vec<SuspendedSession> {
        std::mem::take(&mut self.lock().suspended)
    }

    /// Disconnects the sessions that do not wait for the disk.
    pub(super) fn disconnect_waiting_for_client(&self) {
        let inner = self.lock();
        let entries = inner.entries.values().filter(|entry| !entry.control.waits_for_disk());
        entries.for_each(|entry| entry.control.request(StopRequest::Disconnect));
    }

    /// Disconnects all sessions.
    pub(super) fn disconnect_all(&self) {
        let inner = self.lock();
        inner.entries.values().for_each(|entry| entry.control.request(StopRequest::Disconnect));
    }

    /// Waits until all sessions have ended; false if one has not by `deadline`.
    pub(super) fn wait_until_empty(&self, deadline: Instant) -> bool {
        let mut inner = self.lock();
        while !inner.entries.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            inner = sync::wait_timeout(&self.removed, inner, left).0;
        }
        true
    }

    /// The sessions that were not logged in the periods that have ended, by network, and when to ask again.
    pub(super) fn take_unlogged(
        &self,
        now: Instant,
    ) -> (Vec<(Option<SourceNetwork>, u64)>, Option<Instant>) {
        let mut inner = self.lock();
        (inner.logged.take_counts(now), inner.logged.deadline())
    }

    pub(super) fn is_accepting(&self) -> bool {
        let inner = self.lock();
        !inner.stopping && inner.turned_away.is_none()
    }

    pub(super) fn count(&self) -> usize {
        self.lock().entries.len()
    }

    fn lock(&self) -> MutexGuard<'_, SessionTable> {
        sync::lock(&self.inner)
    }
}

impl SessionTable {
    fn established(&self) -> impl Iterator<Item = &SessionEntry> {
        self.entries.values().filter(|entry| entry.slot == SlotKind::Established)
    }

    /// Whether the number of clients is at its limit.
    fn is_full(&self) -> bool {
        self.established().count() >= self.limits.clients
    }

    /// Whether an established client comes from the same network as this peer. A connection from
    /// another network is greeted even when the table is full: it may be a source, or probe for one,
    /// from a host that has no client here.
    fn has_client_of(&self, peer: &Peer) -> bool {
        let network = SourceNetwork::from(peer);
        self.established().any(|entry| SourceNetwork::from(&entry.peer) == network)
    }

    /// The limit that keeps this client in the handshake. A source always leaves it: clients must not be
    /// able to lock out the host that hands the disk over. Its address may have clients of its own, so
    /// that the limit of an address counts only here, not when a connection is accepted.
    fn limit_reached(&self, id: u64) -> Option<LimitReached> {
        let SlotKind::Handshake(handshake) = self.entries.get(&id)?.slot else { return None };
        let established = self.established().map(|entry| SourceNetwork::from(&entry.peer));
        if handshake.is_source { None } else { self.limits.reached(established, handshake.network) }
    }

    /// Notes and returns the limit that keeps this client in the handshake.
    fn keep_out(&mut self, id: u64) -> Option<LimitReached> {
        let limit = self.limit_reached(id);
        if let Some(entry) = self.entries.get_mut(&id) {
            entry.kept_out = limit;
        }
        limit
    }

    fn slot_availability(&self, capacity: Capacity, now: Instant) -> SlotAvailability {
        let handshakes = self.entries.iter().filter_map(|(id, entry)| match &entry.slot {
            SlotKind::Handshake(handshake) => Some((*id, handshake)),
            SlotKind::Evicted | SlotKind::Established => None,
        });
        handshake_slots::availability(
            handshakes,
            capacity.handshakes,
            capacity.handshake_timeout,
            now,
        )
    }

    /// Whether `others` have ended. If not, the session `waiting` is woken when the next session ends, and
    /// asks again.
    fn have_ended(&mut self, waiting: u64, others: &[u64]) -> bool {
        let have_ended = !others.iter().any(|id| self.entries.contains_key(id));
        if let Some(entry) = self.entries.get_mut(&waiting) {
            entry.awaits_others = !have_ended;
        }
        have_ended
    }

    fn evict(&mut self, id: u64) {
        if let Some(entry) = self.entries.get_mut(&id) {
            entry.control.request(StopRequest::Evict);
            entry.slot = SlotKind::Evicted;
        }
    }

    /// Disconnects clients that the access control list does not admit.
    fn enforce_acl(&self) {
        for entry in self.entries.values() {
            if !entry.peer.ip().is_none_or(|ip| self.acl.admits(ip)) {
                entry.control.request(StopRequest::NotAdmitted);
            }
        }
    }
}

impl SessionsView for Sessions {
    fn silence(&self, session: SessionId) -> Duration {
        let inner = self.lock();
        inner.entries.get(&session).map_or(Duration::ZERO, |entry| entry.control.silence())
    }

    fn peer(&self, session: SessionId) -> Option<Peer> {
        self.lock().entries.get(&session).map(|entry| entry.peer)
    }
}

#[cfg(test)]
mod tests;
