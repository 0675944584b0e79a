//! What the owner of an upstream decides, and what it can ask.
//! Only data.

use crate::client::ClientError;
use crate::ids::DiskId;
use crate::net::Remote;
use crate::net::tls::{TlsClientSlot, TlsError, TlsTarget};
use std::fmt;
use std::io;
use std::net::IpAddr;
use std::time::Duration;
use thiserror::Error;

/// Default for [`UpstreamOptions::unflushed_bytes_max`].
pub const UNFLUSHED_BYTES_DEFAULT: u64 = 64 << 20;
/// Default for [`UpstreamOptions::timeout`].
pub const UPSTREAM_TIMEOUT_DEFAULT: Duration = Duration::from_secs(30);
/// Default for [`UpstreamOptions::connections`].
pub const CONNECTIONS_DEFAULT: usize = 4;

/// One place where the disk may be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UpstreamTarget {
    /// The server.
    pub remote: Remote,
    /// Name of the export there; empty for the default export.
    pub export: String,
    /// Whether to connect with TLS, and the name of the server.
    pub tls: TlsTarget,
}

impl fmt::Display for UpstreamTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.remote)?;
        if self.export.is_empty() { Ok(()) } else { write!(f, " ({})", self.export.escape_debug()) }
    }
}

/// How to connect, and how much to keep.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UpstreamOptions {
    /// Local address of the connections.
    pub bind: Option<IpAddr>,
    /// A random number, by which a server recognizes our connections ([`crate::nbd::introduction`]);
    /// `None` to connect without an introduction.
    pub client: Option<[u8; 16]>,
    /// A server that has not answered a request for this long counts as lost.
    pub timeout: Duration,
    /// Most bytes of memory for changes that are acknowledged and not flushed, but for a single write.
    pub unflushed_bytes_max: u64,
    /// Most connections to a server that has `NBD_FLAG_CAN_MULTI_CONN`.
    pub connections: usize,
    /// Longest read-ahead of sequential reads, in bytes.
    pub read_ahead: Option<u64>,
    /// The TLS of the connections; present if a target needs it.
    pub tls: Option<TlsClientSlot>,
}

impl Default for UpstreamOptions {
    fn default() -> Self {
        Self {
            bind: None,
            client: None,
            timeout: UPSTREAM_TIMEOUT_DEFAULT,
            unflushed_bytes_max: UNFLUSHED_BYTES_DEFAULT,
            connections: CONNECTIONS_DEFAULT,
            read_ahead: None,
            tls: None,
        }
    }
}

/// The state of the connection, for operators.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UpstreamState {
    /// Where the disk is, or was last.
    pub target: String,
    /// The id of the disk, if a server has told it.
    pub disk_id: Option<DiskId>,
    /// Whether it is connected.
    pub connected: bool,
    /// For how long it has been so.
    pub since: Duration,
    /// Why the last connection or attempt failed, while it is not connected.
    pub last_error: Option<String>,
    /// Memory for changes that are acknowledged and not flushed, in bytes.
    pub unflushed_bytes: u64,
    /// How often a lost connection was replaced.
    pub reconnects: u64,
}

/// Why the first connection failed.
#[derive(Debug, Error)]
pub enum UpstreamError {
    /// No target has given us the disk: each target, and why.
    #[error("{}", reasons(.0))]
    Targets(Vec<(String, String)>),
    /// The process lacks a resource.
    #[error("cannot {0}: {1}")]
    System(&'static str, io::Error),
}

fn reasons(failures: &[(String, String)]) -> String {
    let reason = |(target, why): &(String, String)| format!("{target}: {why}");
    failures.iter().map(reason).collect::<Vec<_>>().join("; ")
}

/// The owner's callback. Called on the link's thread, which waits for it.
pub trait UpstreamEvents: Send + Sync + fmt::Debug {
    /// The connection was established or lost.
    fn changed(&self);
}

/// Why a target did not give us the disk.
#[derive(Debug, Error)]
pub(super) enum TargetError {
    /// Its name cannot be in a certificate.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// Not reachable.
    #[error("{0}")]
    Connect(io::Error),
    /// Its handshake failed.
    #[error(transparent)]
    Handshake(#[from] ClientError),
    /// It has another disk.
    #[error(transparent)]
    Disk(#[from] super::terms::OtherDisk),
}
