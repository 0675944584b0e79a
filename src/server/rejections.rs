//! What the log says of connections that never became clients: anybody can cause it, so it is limited
//! by reason and address ([`LogLimit`]).

use super::ServerShared;
use super::control::StopRequest;
use super::end::SessionEnd;
use super::sessions::AdmissionError;
use super::slots::SourceNetwork;
use crate::message_id;
use crate::net::Peer;
use crate::sync;
use crate::systemd::log_limit::{LogDecision, LogLimit, PERIOD};
use std::fmt;
use std::sync::MutexGuard;
use std::time::Instant;
use tracing::{info, warn};

/// Events by reason and by where the connections came from.
pub(super) type Strangers = LogLimit<(RejectReason, SourceNetwork)>;

/// Why a connection did not become a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum RejectReason {
    /// The access control list does not admit it.
    Acl,
    /// As many clients were connected as may be.
    Full,
    /// The server was stopping, or had no descriptors or threads left.
    Scarce,
    /// It ended before its handshake did.
    Handshake,
}

impl RejectReason {
    fn message_id(self) -> Option<&'static str> {
        match self {
            Self::Acl => Some(message_id::CLIENT_NOT_ADMITTED),
            Self::Full => Some(message_id::CLIENT_LIMIT),
            Self::Scarce | Self::Handshake => None,
        }
    }
}

impl fmt::Display for RejectReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Acl => "the access control list does not admit them",
            Self::Full => "as many clients are connected as may be",
            Self::Scarce => "the system gives no descriptors or threads, or the server is stopping",
            Self::Handshake => "they ended before the handshake did",
        })
    }
}

impl ServerShared {
    /// Logs that a connection was closed without a greeting.
    pub(super) fn log_refusal(&self, peer: &Peer, why: AdmissionError) {
        let reason = match why {
            AdmissionError::Acl => RejectReason::Acl,
            AdmissionError::Full(_) => RejectReason::Full,
            AdmissionError::Stopping | AdmissionError::NoDescriptors => RejectReason::Scarce,
        };
        if self.is_worth_a_line(reason, peer) {
            let message_id = reason.message_id();
            warn!(message_id, "flexnbd.client" = %peer, "refused {peer}: {why}");
        }
    }

    /// Logs how a connection ended that was in the handshake until then.
    pub(super) fn log_end_in_handshake(&self, peer: &Peer, session: u64, end: &SessionEnd) {
        let reason = match end {
            SessionEnd::Full => RejectReason::Full,
            SessionEnd::Ordered(StopRequest::NotAdmitted) => RejectReason::Acl,
            _ => RejectReason::Handshake,
        };
        if !self.is_worth_a_line(reason, peer) {
            return;
        }
        let message_id = reason.message_id();
        if end.is_trouble() {
            warn!(
                message_id, "flexnbd.client" = %peer, "flexnbd.session" = session,
                "closed the session of {peer}: {end}"
            );
        } else {
            info!(
                message_id, "flexnbd.client" = %peer, "flexnbd.session" = session,
                "closed the session of {peer}: {end}"
            );
        }
    }

    pub(super) fn is_worth_a_line(&self, reason: RejectReason, peer: &Peer) -> bool {
        self.rejections().note((reason, peer.into()), Instant::now()) == LogDecision::Log
    }

    /// Logs the counts that are due, and returns when the next ones are.
    pub(super) fn log_strangers(&self, now: Instant) -> Option<Instant> {
        let (counts, due) = {
            let mut rejections = self.rejections();
            (rejections.take_counts(now), rejections.due())
        };
        for (kind, count) in counts {
            match kind {
                Some((reason, quarter)) => warn!(
                    message_id = reason.message_id(), "flexnbd.client" = %quarter,
                    "flexnbd.clients" = count,
                    "{count} more connections from {quarter} closed: {reason}"
                ),
                None => warn!(
                    "flexnbd.clients" = count,
                    "{count} more connections from elsewhere closed before they became clients"
                ),
            }
        }
        due
    }

    /// Logs what was counted, at the end of the server.
    pub(super) fn log_last_strangers(&self) {
        self.log_strangers(Instant::now() + PERIOD);
    }

    fn rejections(&self) -> MutexGuard<'_, Strangers> {
        sync::lock(&self.rejections)
    }
}
