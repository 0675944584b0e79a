//! Callbacks of a server to its owner. Never decides what follows from them.

use std::fmt;
use std::io;

/// The owner of a server. Several threads call it, some with locks held: it must neither block nor
/// call the server.
pub trait ServerEvents: Send + Sync + fmt::Debug {
    /// A client has connected or disconnected.
    fn clients_changed(&self);
    /// The acceptor has failed for this reason and accepts no more clients.
    fn accepting_failed(&self, why: &io::Error);
}

/// Does nothing.
#[cfg(test)]
#[derive(Debug)]
pub(crate) struct IgnoreEvents;

#[cfg(test)]
impl ServerEvents for IgnoreEvents {
    fn clients_changed(&self) {}

    fn accepting_failed(&self, _why: &io::Error) {}
}
