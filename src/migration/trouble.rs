//! Failures of a migration, and the obstacles that keep it from progressing.
//! Never decides the reaction; see [`super::machine`].

use std::time::Duration;

/// Why an attempt failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Trouble {
    /// The connection could not be established.
    #[error("{0}")]
    Connect(String),
    /// The destination refused us during the handshake.
    #[error("the destination turned us away: {0}")]
    Rejected(String),
    /// The destination accepted the connection and sent no NBD greeting.
    #[error("the destination did not greet us: {0}")]
    NoGreeting(String),
    /// The destination's export and our disk differ in size.
    #[error("the destination's disk has {remote} bytes, ours has {local}; make them equal")]
    Size {
        /// Bytes of our disk.
        local: u64,
        /// Bytes of the destination's.
        remote: u64,
    },
    /// The destination's export is read-only.
    #[error("the destination's disk is read-only")]
    ReadOnly,
    /// The destination serves a disk of its own.
    #[error("the destination serves a disk of its own; start `flexnbd listen` there instead")]
    Serving,
    /// Clients were offered what the destination does not offer, so that they cannot be passed on.
    #[error(
        "the destination does not offer what clients here were offered ({0}); move the disk without \
         --relay"
    )]
    Offers(String),
    /// The destination's minimum block size does not divide our disk.
    #[error("the destination wants blocks of {0} bytes, which our disk is not made of")]
    BlockSize(u64),
    /// The connection broke.
    #[error("the connection broke: {0}")]
    Lost(String),
    /// The destination acknowledged nothing for this time.
    #[error("the destination made no progress for {} s", .0.as_secs())]
    NoProgress(Duration),
    /// The destination answered a request with this NBD error.
    #[error("the destination answered with NBD error {0}; see its log")]
    ErrorReply(u32),
    /// The destination answered a request that is not outstanding.
    #[error("the destination answered request {0}, which is not outstanding")]
    Cookie(u64),
    /// An operation on this host failed.
    #[error("{0}")]
    Local(String),
    /// The ownership record could not be written.
    #[error("the ownership record cannot be kept: {0}")]
    Record(String),
    /// A part of the disk cannot be read.
    #[error("{0}")]
    Unreadable(String),
    /// An event or a reply that cannot occur: a defect of the peer or of this program.
    #[error("{0}")]
    Unexpected(&'static str),
}

/// Why a migration does not progress at present.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Obstacle {
    /// The copy failed; it is retried every second.
    #[error("{0}; trying again every second")]
    Trouble(Trouble),
    /// Clients write faster than the copy can follow, and are throttled.
    #[error("clients write faster than the copy catches up, and each write is held back")]
    Writers,
    /// In-flight requests of clients take long: closing the gate would have to wait for them.
    #[error("{0}; the last copy waits until requests of clients are short")]
    Requests(String),
    /// The destination takes long to flush.
    #[error("the destination takes long to flush what it has")]
    Flush,
    /// The last copy could not be sent or recorded in the time that clients may wait.
    #[error("{0}; clients go on, and the last copy is tried again later")]
    LastCopy(&'static str),
    /// The disk has left, and the destination does not serve it yet.
    #[error("{0}; clients wait until the destination serves the disk")]
    Relay(Trouble),
    /// The handover was not acknowledged.
    #[error(
        "the handover was not acknowledged ({0}); clients wait until the destination says whether \
         the disk has arrived. If it is lost for good, stop this process and run \
         `flexnbd adopt --force`"
    )]
    Acknowledgement(Trouble),
}

impl Obstacle {
    /// The value of the key `migration_waiting` in `status`.
    #[must_use]
    pub fn word(&self) -> &'static str {
        match self {
            Self::Trouble(trouble) => trouble.word(),
            Self::Writers => "writers",
            Self::Requests(_) => "requests",
            Self::Flush => "flush",
            Self::LastCopy(_) => "last-copy",
            Self::Relay(_) => "relay",
            Self::Acknowledgement(_) => "acknowledgement",
        }
    }

    /// Whether the report of one makes a report of the other redundant.
    pub(super) fn is_like(&self, other: &Self) -> bool {
        match (self, other) {
            // The destination's text may hold a time or a port, which differs each time.
            (Self::Trouble(Trouble::Rejected(_)), Self::Trouble(Trouble::Rejected(_))) => true,
            (Self::Trouble(one), Self::Trouble(other)) => one == other,
            _ => std::mem::discriminant(self) == std::mem::discriminant(other),
        }
    }
}

impl Trouble {
    fn word(&self) -> &'static str {
        match self {
            Self::Connect(_)
            | Self::NoGreeting(_)
            | Self::Lost(_)
            | Self::NoProgress(_)
            | Self::Cookie(_)
            | Self::Unexpected(_) => "link",
            Self::Rejected(_)
            | Self::Size { .. }
            | Self::ReadOnly
            | Self::Serving
            | Self::Offers(_)
            | Self::BlockSize(_) => "refused",
            Self::ErrorReply(_) => "destination-error",
            Self::Local(_) | Self::Record(_) | Self::Unreadable(_) => "source-error",
        }
    }
}
