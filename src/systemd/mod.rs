//! The interfaces of systemd: inherited sockets, notifications, the journal, the file descriptor store.
//!
//! Knows nothing of NBD. Everything works without a service manager, too: there are no sockets, no
//! notifications are sent, and the log goes to stderr.

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
pub use notify::{ServiceManager, log_unsent};
pub use sockets::{InheritedListener, InheritedSockets};
