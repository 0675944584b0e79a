//! Limits and timeouts of a server, and the settings that all its sessions share.

use std::time::Duration;

/// Clients at once, unless the operator sets another number (`--max-clients`).
pub const CLIENTS_MAX: usize = 128;
/// Connections in the handshake at once, in addition to [`CLIENTS_MAX`].
pub const HANDSHAKES_MAX: usize = 32;
/// The longest duration of a handshake.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// The longest duration of a handshake while [`HANDSHAKES_MAX`] are in progress and further clients
/// wait to be accepted. Silent connections are evicted earlier (`handshake_slots`).
pub const CONTENDED_HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(1);
/// With `--killswitch`: how long a request or reply may make no progress.
pub const STALL_LIMIT: Duration = Duration::from_secs(120);

/// Grace periods of a server that stops, both counted from the same moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grace {
    /// For sessions that wait for their clients to receive replies.
    pub clients: Duration,
    /// For sessions that wait for the disk: a FLUSH may take long, and its client needs the reply.
    pub disk: Duration,
}

impl From<Duration> for Grace {
    fn from(both: Duration) -> Self {
        Self { clients: both, disk: both }
    }
}

/// What becomes of a client beyond the largest number of clients.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WhenFull {
    /// It is disconnected.
    #[default]
    Refuse,
    /// It stays in the socket's backlog, without a greeting, until another client has left.
    /// Connections in the handshake count as clients.
    Wait,
}

/// The handshake that the server offers (NBD specification, "Handshake").
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Style {
    /// Fixed newstyle, with option haggling.
    #[default]
    Newstyle,
    /// Oldstyle, without options (`--oldstyle`).
    Oldstyle,
}

/// Settings of every session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SessionSettings {
    /// The handshake to offer.
    pub style: Style,
    /// The longest duration of the handshake.
    pub handshake_timeout: Duration,
    /// How long a request or reply may make no progress; `None` for no limit.
    pub stall_limit: Option<Duration>,
}

impl Default for SessionSettings {
    fn default() -> Self {
        let style = Style::default();
        Self { style, handshake_timeout: HANDSHAKE_TIMEOUT, stall_limit: None }
    }
}
