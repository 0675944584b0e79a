//! The entry of one session in the table, as the session sees it.

use super::{
    HandshakeSlot, LimitReached, SessionControl, SessionEntry, SessionTable, Sessions,
    SessionsView, SlotKind, StopRequest, SuspendedSession,
};
use crate::systemd::log_limit::LogDecision;
use std::sync::Arc;
use std::time::Instant;
use tracing::{Span, info};

/// A client's entry in the table, which dropping this removes.
#[derive(Debug)]
pub(in crate::server) struct Registration {
    pub(in crate::server) sessions: Arc<Sessions>,
    /// Id of the session, never used twice.
    pub(in crate::server) id: u64,
    /// When its handshake began, in this process.
    pub(in crate::server) since: Instant,
    /// Carries stop requests to the session.
    pub(in crate::server) control: Arc<SessionControl>,
    /// Gives the session's log lines their journal fields. The session's thread runs inside it.
    pub(in crate::server) span: Span,
}

impl Registration {
    /// The number of sessions, this one included.
    pub(in crate::server) fn session_count(&self) -> usize {
        self.sessions.count()
    }

    /// Disconnects other sessions, and returns whether all of them have ended. If not, this session is woken
    /// when the next one ends, and has to ask again.
    pub(in crate::server) fn disconnect_others(&self, others: &[u64]) -> bool {
        let mut inner = self.sessions.lock();
        // Once: each request wakes the session, and it may be waiting for this one.
        let to_displace = |entry: &&SessionEntry| entry.control.current() < StopRequest::Displaced;
        let displaced = others.iter().filter_map(|id| inner.entries.get(id)).filter(to_displace);
        displaced.for_each(|entry| entry.control.request(StopRequest::Displaced));
        inner.have_ended(self.id, others)
    }

    /// Whether another session has ended. If not, this session is woken when the next one ends, and
    /// has to ask again.
    pub(in crate::server) fn has_ended(&self, other: u64) -> bool {
        self.sessions.lock().have_ended(self.id, &[other])
    }

    /// All sessions, for the policy.
    pub(in crate::server) fn sessions(&self) -> &dyn SessionsView {
        &*self.sessions
    }

    /// Removes the session, and keeps its snapshot for the next process.
    pub(in crate::server) fn suspend(self, suspended: SuspendedSession) {
        self.sessions.lock().suspended.push(suspended);
    }

    /// The client has sent a whole option.
    pub(in crate::server) fn option_received(&self, now: Instant) {
        self.update_handshake(|handshake| handshake.last_option = Some(now));
    }

    /// The client is the source of a migration, and accepted as such.
    pub(in crate::server) fn mark_source(&self) {
        self.update_handshake(|handshake| handshake.is_source = true);
    }

    fn update_handshake(&self, change: impl FnOnce(&mut HandshakeSlot)) {
        let mut inner = self.sessions.lock();
        if let Some(SessionEntry { slot: SlotKind::Handshake(handshake), .. }) =
            inner.entries.get_mut(&self.id)
        {
            change(handshake);
        }
    }

    /// Why the client cannot leave the handshake now, if so.
    pub(in crate::server) fn establish_refusal(&self) -> Option<Arc<str>> {
        let mut inner = self.sessions.lock();
        let full = inner.keep_out(self.id).map(|limit| limit.to_string().into());
        inner.turned_away.clone().or(full)
    }

    /// Whether the handshake is over.
    pub(in crate::server) fn is_established(&self) -> bool {
        let inner = self.sessions.lock();
        inner.entries.get(&self.id).is_some_and(|entry| entry.slot == SlotKind::Established)
    }

    /// Ends the handshake and frees its slot, unless a limit is reached; then the session has to end.
    pub(in crate::server) fn establish(&self) -> Result<(), LimitReached> {
        let mut inner = self.sessions.lock();
        if let Some(limit) = inner.keep_out(self.id) {
            return Err(limit);
        }
        let SessionTable { entries, logged, .. } = &mut *inner;
        let Some(entry) = entries.get_mut(&self.id) else { return Ok(()) };
        let peer = entry.peer;
        let begins = matches!(entry.slot, SlotKind::Handshake(_));
        if begins {
            entry.slot = SlotKind::Established;
            entry.is_quiet = logged.record((&peer).into(), Instant::now()) == LogDecision::Count;
        }
        let is_logged = begins && !entry.is_quiet;
        drop(inner);
        if is_logged {
            info!("{peer} connected");
        }
        self.sessions.acceptor_wake.wake();
        Ok(())
    }

    /// Whether the client may cause no lines in the log.
    pub(in crate::server) fn is_quiet(&self) -> bool {
        self.sessions.lock().entries.get(&self.id).is_some_and(|entry| entry.is_quiet)
    }

    /// The limit that has kept the client out, if one has.
    pub(in crate::server) fn kept_out(&self) -> Option<LimitReached> {
        self.sessions.lock().entries.get(&self.id)?.kept_out
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        let mut inner = self.sessions.lock();
        inner.entries.remove(&self.id);
        for entry in inner.entries.values_mut() {
            if std::mem::take(&mut entry.awaits_others) {
                entry.control.wake.wake();
            }
        }
        drop(inner);
        self.sessions.events.clients_changed();
        self.sessions.removed.notify_all();
        self.sessions.acceptor_wake.wake();
    }
}
