//! The log of connections that never became clients. Any host on the network can cause these lines,
//! so a [`LogLimit`] bounds them by reason and source network, and counts the rest.

use super::client_limits::LimitReached;
use super::end::SessionEnd;
use super::handshake_slots::SourceNetwork;
use super::sessions::AdmissionError;
use super::stop_request::StopRequest;
use crate::message_id;
use crate::net::Peer;
use crate::sync;
use crate::systemd::log_limit::{LogDecision, LogLimit, PERIOD};
use std::fmt;
use std::sync::{Mutex, MutexGuard};
use std::time::Instant;
use tracing::{info, warn};

/// The rejected connections of a server.
#[derive(Debug, Default)]
pub(super) struct Rejections(Mutex<RejectionLimit>);

type RejectionLimit = LogLimit<(RejectReason, SourceNetwork)>;

/// Why a connection did not become a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum RejectReason {
    Acl,
    Full,
    AddressFull,
    /// The disk has left, and its clients stay.
    TurnedAway,
    /// The server was stopping, or had no descriptors or threads left.
    Scarce,
    Handshake,
}

impl RejectReason {
    fn message_id(self) -> Option<&'static str> {
        match self {
            Self::Acl => Some(message_id::CLIENT_NOT_ADMITTED),
            Self::Full | Self::AddressFull => Some(message_id::CLIENT_LIMIT),
            Self::TurnedAway => Some(message_id::CLIENTS_REFUSED),
            Self::Scarce | Self::Handshake => None,
        }
    }
}

impl From<&LimitReached> for RejectReason {
    fn from(limit: &LimitReached) -> Self {
        match limit {
            LimitReached::Clients => Self::Full,
            LimitReached::PerAddress => Self::AddressFull,
        }
    }
}

impl fmt::Display for RejectReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Acl => "the access control list does not admit them",
            Self::Full => "as many clients are connected as may be",
            Self::AddressFull => "as many clients of their address are connected as may be",
            Self::TurnedAway => "no client is admitted any more",
            Self::Scarce => "the system gives no descriptors or threads, or the server is stopping",
            Self::Handshake => "they ended before the handshake did",
        })
    }
}

impl Rejections {
    /// Logs that a connection was closed before it was greeted.
    pub(super) fn log_refusal(&self, peer: &Peer, why: &AdmissionError) {
        let reason = match why {
            AdmissionError::Acl => RejectReason::Acl,
            AdmissionError::Full(_) => RejectReason::Full,
            AdmissionError::TurnedAway(_) => RejectReason::TurnedAway,
            AdmissionError::Stopping | AdmissionError::NoDescriptors => RejectReason::Scarce,
        };
        if self.allows_line(reason, peer) {
            let message_id = reason.message_id();
            warn!(message_id, "flexnbd.client" = %peer, "refused {peer}: {why}");
        }
    }

    /// Logs why a session ended during its handshake. Called inside the session's span.
    pub(super) fn log_handshake_end(&self, peer: &Peer, end: &SessionEnd) {
        let reason = match end {
            SessionEnd::Full(limit) => limit.into(),
            SessionEnd::Requested(StopRequest::NotAdmitted) => RejectReason::Acl,
            _ => RejectReason::Handshake,
        };
        if !self.allows_line(reason, peer) {
            return;
        }
        let message_id = reason.message_id();
        if end.is_trouble() {
            warn!(message_id, "closed the session of {peer}: {end}");
        } else {
            info!(message_id, "closed the session of {peer}: {end}");
        }
    }

    /// Whether the limit allows a line about this connection; counts it otherwise.
    pub(super) fn allows_line(&self, reason: RejectReason, peer: &Peer) -> bool {
        self.limit().record((reason, peer.into()), Instant::now()) == LogDecision::Log
    }

    /// Logs the counts that are due, and returns when the next ones are.
    pub(super) fn log_counts(&self, now: Instant) -> Option<Instant> {
        let (counts, due) = {
            let mut limit = self.limit();
            (limit.take_counts(now), limit.deadline())
        };
        for (kind, count) in counts {
            match kind {
                Some((reason, network)) => warn!(
                    message_id = reason.message_id(), "flexnbd.client" = %network,
                    "flexnbd.clients" = count,
                    "{count} more connections from {network} closed: {reason}"
                ),
                None => warn!(
                    "flexnbd.clients" = count,
                    "{count} more connections from elsewhere closed before they became clients"
                ),
            }
        }
        due
    }

    pub(super) fn log_remaining_counts(&self) {
        self.log_counts(Instant::now() + PERIOD);
    }

    fn limit(&self) -> MutexGuard<'_, RejectionLimit> {
        sync::lock(&self.0)
    }
}
