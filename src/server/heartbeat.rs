//! Liveness probe of the thread that accepts clients: the watchdog sends a number, the acceptor
//! repeats it. Never waits.

use std::sync::atomic::{AtomicU64, Ordering};

/// Questions to the thread that lets clients in, by number, and its answers.
#[derive(Debug, Default)]
pub(super) struct Heartbeat {
    pub(super) asked: AtomicU64,
    pub(super) answered: AtomicU64,
}

impl Heartbeat {
    /// I am here.
    pub(super) fn answer(&self) {
        self.answered.store(self.asked.load(Ordering::Acquire), Ordering::Release);
    }
}
