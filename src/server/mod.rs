//! The NBD server: accepts clients, checks the access control list, and runs one session for each.
//! Never decides who owns the disk ([`export_policy::ExportPolicy`] does), and never ends the process.
//!
//! [`Server`] is the handle that the daemon holds. One thread accepts clients (`accept`) within the
//! limits (`sessions`, `handshake_slots`, `acl`). Each client has a thread that runs its [`session`]. The
//! server stops a session through `stop_request`, and for a restart saves it as a `snapshot`.
//!
//! ```text
//! Server ─▶ accept ─▶ session: driver ─▶ handshake, then engine ─▶ disk
//! ```

mod accept;
pub mod acl;
mod client_limits;
mod end;
pub mod events;
pub mod export_policy;
mod handshake_slots;
mod heartbeat;
#[cfg(test)]
mod in_flight_tests;
pub mod payload_memory;
mod rejections;
#[cfg(test)]
mod restart_tests;
#[expect(clippy::module_inception, reason = "the file of the type `Server`")]
mod server;
mod server_handles;
pub mod session;
mod sessions;
mod settings;
mod shared;
mod snapshot;
mod stop_request;
#[cfg(test)]
mod test_support;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod tls_tests;
pub mod write_throttle;

pub use client_limits::{ClientLimits, SESSIONS_LOGGED_MAX};
pub use server::{Server, ServerConfig, StoredSessions};
pub use server_handles::{AcceptorHandle, ShutdownHandle};
pub use settings::{
    CLIENTS_MAX, CONTENDED_HANDSHAKE_TIMEOUT, Grace, HANDSHAKE_TIMEOUT, HANDSHAKES_MAX,
    STALL_LIMIT, SessionSettings, Style, WhenFull,
};
pub use snapshot::VERSION as SNAPSHOT_VERSION;
