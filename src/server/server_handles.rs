//! Handles to a running server for other threads: to probe the acceptor, to stop it, to shut the
//! server down. None of them waits for a session.

use super::heartbeat::Heartbeat;
use super::sessions::Sessions;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// A handle to the thread that accepts clients.
#[derive(Clone, Debug)]
pub struct AcceptorHandle(pub(super) Arc<Sessions>);

impl AcceptorHandle {
    /// Sends the acceptor a heartbeat request. `number` must grow from one request to the next.
    pub fn probe(&self, number: u64) {
        self.0.heartbeat.requested.store(number, Ordering::Release);
        self.0.acceptor_wake.wake();
    }

    /// The number of the last request that the acceptor answered. A stopped acceptor counts as
    /// having answered: it is not stuck.
    #[must_use]
    pub fn answered(&self) -> u64 {
        let Heartbeat { requested, answered } = &self.0.heartbeat;
        let number = if self.0.is_closed() { requested } else { answered };
        number.load(Ordering::Acquire)
    }

    /// Stops accepting if no client is connected or being accepted; returns whether accepting has
    /// stopped. Later connections stay in the backlog for the next process that has these sockets.
    #[must_use]
    pub fn close_if_empty(&self) -> bool {
        self.0.close_if_empty()
    }
}

/// Ends all sessions of a server whose disk has left, or keeps them and admits no more.
#[derive(Clone, Debug)]
pub struct ShutdownHandle(pub(super) Arc<Sessions>);

impl ShutdownHandle {
    /// Stops accepting and disconnects all clients without answering their requests in flight: a
    /// client that reconnects must find the disk at its new host. Sessions that wait at the gate
    /// end when the gate is retired.
    pub fn shut_down(&self) {
        self.0.stop();
        self.0.disconnect_all();
    }

    /// Admits no more clients, for this reason. The connected ones stay.
    pub fn turn_away(&self, why: &str) {
        self.0.turn_away(why);
    }

    /// The number of connected clients, including those in the handshake.
    #[must_use]
    pub fn client_count(&self) -> usize {
        self.0.count()
    }
}
