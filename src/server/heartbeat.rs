//! Liveness probe of the thread that accepts clients: the watchdog sends a number, the acceptor
//! repeats it. Never waits.

use crate::sync::atomic::{AtomicU64, Ordering};

/// The numbers of the last request and of the last reply.
#[derive(Debug, Default)]
pub(super) struct Heartbeat {
    pub(super) requested: AtomicU64,
    pub(super) answered: AtomicU64,
}

impl Heartbeat {
    /// Answers the last request.
    pub(super) fn answer(&self) {
        self.answered.store(self.requested.load(Ordering::Acquire), Ordering::Release);
    }
}
