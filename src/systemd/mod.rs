//! What the service manager gives us and wants to hear: sockets, notifications, the journal.
//!
//! Knows no other room and nothing of NBD. Without a service manager everything here still works:
//! there are no sockets, nobody is notified, and the log goes to stderr.

#[cfg(test)]
mod child;
pub mod fd_store;
pub mod journal;
pub mod line;
pub mod log_limit;
mod log_queue;
pub mod notify;
pub mod sockets;
pub mod unit;

pub use fd_store::{FdStore, StoredDescriptors};
pub use journal::Verbosity;
pub use notify::ServiceManager;
pub use sockets::{InheritedListener, InheritedSockets};
