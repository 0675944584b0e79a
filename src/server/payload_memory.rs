//! Memory for the payloads of requests, over all sessions of a server.
//! A session never waits for another one: it has [`OWN_MEMORY`] for itself, enough to have a read and a
//! write in flight, so that it goes on when one of them completes. More than that comes out of a memory
//! that all share: a session may take the rest if its share does not exceed it. So the shares of
//! many busy sessions are equal, and a session that begins later finds some memory left.
//!
//! Sessions that use little never touch the shared counter.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Memory that each session has for itself, in bytes.
pub const OWN_MEMORY: u64 = 4 << 20;
/// The part of it for the buffers between socket and disk. They have limits of their own.
pub(super) const BUFFERS_MAX: u64 = 2688 << 10;
/// The part of it for payloads: a load of 1 MiB and a piece of a write. Small in unit tests, whose requests
/// are.
pub(super) const OWN_PAYLOADS: u64 = if cfg!(test) { 16 << 10 } else { OWN_MEMORY - BUFFERS_MAX };

/// The memory that the sessions of a server share.
#[derive(Debug)]
pub struct PayloadMemory {
    limit: u64,
    used: AtomicU64,
}

/// The memory of one session. Dropping it returns its share.
#[derive(Debug)]
pub(super) struct SessionMemory {
    all: Arc<PayloadMemory>,
    /// What the session has of the shared memory, in bytes.
    share: u64,
}

impl PayloadMemory {
    /// `limit` bytes for the shares of all sessions.
    #[must_use]
    pub fn new(limit: u64) -> Arc<Self> {
        Arc::new(Self { limit, used: AtomicU64::new(0) })
    }

    /// Bytes that the sessions share at most.
    #[must_use]
    pub fn limit(&self) -> u64 {
        self.limit
    }

    /// Bytes that they have at present.
    #[must_use]
    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// Raises a share; false if too little is left.
    fn raise(&self, from: u64, to: u64) -> bool {
        let raised = |used: u64| {
            let left = self.limit.saturating_sub(used);
            (to <= left).then_some(used + (to - from))
        };
        // The counter orders nothing else.
        self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, raised).is_ok()
    }
}

impl SessionMemory {
    pub(super) fn new(all: &Arc<PayloadMemory>) -> Self {
        Self { all: Arc::clone(all), share: 0 }
    }

    /// Whether the payloads of the session may take so many bytes. If so, they are its own until
    /// [`SessionMemory::settle`].
    pub(super) fn may_hold(&mut self, bytes: u64) -> bool {
        let share = bytes.saturating_sub(OWN_PAYLOADS);
        if share > self.share {
            if !self.all.raise(self.share, share) {
                return false;
            }
            self.share = share;
        }
        true
    }

    /// The payloads of the session take so many bytes.
    pub(super) fn settle(&mut self, bytes: u64) {
        let share = bytes.saturating_sub(OWN_PAYLOADS);
        if share > self.share {
            self.all.used.fetch_add(share - self.share, Ordering::Relaxed);
        } else if share < self.share {
            self.all.used.fetch_sub(self.share - share, Ordering::Relaxed);
        }
        self.share = share;
    }
}

impl Drop for SessionMemory {
    fn drop(&mut self) {
        self.settle(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: u64 = 1000;

    fn sessions(count: usize) -> (Arc<PayloadMemory>, Vec<SessionMemory>) {
        let all = PayloadMemory::new(LIMIT);
        let sessions = (0..count).map(|_| SessionMemory::new(&all)).collect();
        (all, sessions)
    }

    #[test]
    fn own_memory_is_not_shared() {
        let (all, mut sessions) = sessions(1);
        assert!(sessions[0].may_hold(OWN_PAYLOADS));
        sessions[0].settle(OWN_PAYLOADS);
        assert_eq!((all.limit(), all.used()), (LIMIT, 0));
        assert!(sessions[0].may_hold(OWN_PAYLOADS + 1));
        assert_eq!(all.used(), 1);
        sessions[0].settle(OWN_PAYLOADS);
        assert_eq!(all.used(), 0);
    }

    #[test]
    fn a_share_never_exceeds_the_rest() {
        let (all, mut sessions) = sessions(2);
        assert!(!sessions[0].may_hold(OWN_PAYLOADS + LIMIT + 1));
        assert!(sessions[0].may_hold(OWN_PAYLOADS + LIMIT));
        assert!(!sessions[1].may_hold(OWN_PAYLOADS + 1), "nothing is left");
        sessions[0].settle(OWN_PAYLOADS + 600);
        assert!(!sessions[1].may_hold(OWN_PAYLOADS + 401));
        assert!(sessions[1].may_hold(OWN_PAYLOADS + 400));
        assert!(sessions[1].may_hold(OWN_PAYLOADS + 400), "it has that already");
        assert_eq!(all.used(), LIMIT);
        sessions.clear();
        assert_eq!(all.used(), 0);
    }

    #[test]
    fn shares_of_greedy_sessions_leave_some_for_the_next() {
        const COUNT: usize = 9;
        let (all, mut sessions) = sessions(COUNT + 1);
        let take = |session: &mut SessionMemory| {
            let next = OWN_PAYLOADS + session.share + 10;
            session.may_hold(next)
        };
        while sessions[..COUNT].iter_mut().map(take).filter(|taken| *taken).count() > 0 {}
        let equal = LIMIT / (COUNT as u64 + 1);
        for session in &sessions[..COUNT] {
            assert!((equal - 20..=equal + 20).contains(&session.share), "{}", session.share);
        }
        assert!(all.used() <= LIMIT - equal / 2);
        assert!(take(&mut sessions[COUNT]));
    }

    #[test]
    fn memory_beyond_the_limit_is_counted() {
        let (all, mut sessions) = sessions(2);
        sessions[0].settle(OWN_PAYLOADS + LIMIT + 5);
        assert_eq!(all.used(), LIMIT + 5);
        assert!(!sessions[1].may_hold(OWN_PAYLOADS + 1));
        assert!(sessions[1].may_hold(OWN_PAYLOADS));
    }
}
