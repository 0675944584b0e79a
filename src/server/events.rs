//! Events that a server reports to its owner. Never decides what follows from them.

use std::fmt;
use std::io;

/// Whoever runs a server. Called from many threads at once, with locks held: must neither wait nor
/// ask the server anything.
pub trait ServerEvents: Send + Sync + fmt::Debug {
    /// A client has come or gone.
    fn clients_changed(&self);
    /// Nobody can be let in any more, for this reason.
    fn accepting_failed(&self, why: &io::Error);
}

/// Does not care.
#[cfg(test)]
#[derive(Debug)]
pub(crate) struct IgnoreEvents;

#[cfg(test)]
impl ServerEvents for IgnoreEvents {
    fn clients_changed(&self) {}

    fn accepting_failed(&self, _why: &io::Error) {}
}
