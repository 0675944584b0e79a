//! TLS: which certificates and keys a server or client uses, and what it accepts from its peer.
//! Never logs, and never decides what happens to a connection; errors and warnings go to the caller.
//!
//! * `mode`: whether a connection is encrypted. `file`, `pem_files`: PEM files and systemd
//!   credentials.
//! * `identity`: a certificate chain with its private key. `certificate`, `name`: what a
//!   certificate says. Pure.
//! * `server_config`: [`ServerTls`], with which a server answers `STARTTLS`. `allow`: which client certificates
//!   it accepts. `client_config`: [`TlsClient`] and [`ClientTls`], with which a client sends it.
//! * `explain`: errors of the handshake as sentences for operators.
//! * `session`: a session without a socket (RFC 8446, RFC 5246), by rustls. `channel`: the same on a socket;
//!   [`Stream`](super::Stream) hides both from its users. `kernel`: the kernel does the records.

mod allow;
mod certificate;
mod channel;
mod client_config;
mod error;
mod explain;
mod failure;
mod file;
mod identity;
mod kernel;
mod mode;
mod name;
mod pem_files;
mod record_reader;
mod server_config;
mod session;
#[cfg(test)]
mod tests;

pub use certificate::{CertificateExpiry, EXPIRY_NOTICE, Validity};
pub use channel::TlsRole;
pub(super) use channel::{HandshakeWait, TlsChannel};
pub use client_config::{CLIENT_TRUST_STORE, ClientTls, TlsClient, TlsClientSlot, TlsTarget};
pub use error::TlsError;
pub use explain::explain;
pub use failure::TlsFailure;
pub use file::{TlsFile, TlsFiles};
pub use identity::TlsWarning;
pub use kernel::is_usable as kernel_is_usable;
pub use mode::TlsMode;
pub use name::{AllowedName, AllowedNameError};
pub use pem_files::credentials_directory;
pub use server_config::ServerTls;
