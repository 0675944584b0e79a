//! Handles to a running server for other threads: to probe the acceptor, to close it, to shut the
//! server down. None of them waits for a session.

use super::heartbeat::Heartbeat;
use super::sessions::Sessions;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// The door that clients come in by, from whichever thread wants to know of it.
#[derive(Clone, Debug)]
pub struct AcceptorHandle(pub(super) Arc<Sessions>);

impl AcceptorHandle {
    /// Asks whoever lets clients in to answer with this number, which grows from one question to
    /// the next.
    pub fn knock(&self, number: u64) {
        self.0.heartbeat.asked.store(number, Ordering::Release);
        self.0.bell.wake();
    }

    /// The number of the last question that was answered; nobody has to answer at a closed door.
    #[must_use]
    pub fn answered(&self) -> u64 {
        let Heartbeat { asked, answered } = &self.0.heartbeat;
        let whose = if self.0.is_closed() { asked } else { answered };
        whose.load(Ordering::Acquire)
    }

    /// Lets nobody in any more if nobody is there or just coming in. Whoever comes then stays
    /// outside, and finds the next server if the sockets have one. Returns whether it is closed.
    #[must_use]
    pub fn close_if_empty(&self) -> bool {
        self.0.close_if_empty()
    }
}

/// Ends all sessions of a server, from whichever thread knows that its disk is gone.
#[derive(Clone, Debug)]
pub struct ShutdownHandle(pub(super) Arc<Sessions>);

impl ShutdownHandle {
    /// Lets nobody in any more and ends all sessions, without answering what they have in flight: a
    /// client that connects again is to find the disk elsewhere. Those that wait at the disk's gate
    /// end when it is retired.
    pub fn leave(&self) {
        self.0.stop();
        self.0.clear();
    }
}
