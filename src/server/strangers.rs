//! What the log says of connections that never became clients: anybody can cause it, so it is limited
//! by reason and address ([`LogLimit`]).

use super::Shared;
use super::end::SessionEnd;
use super::orders::Order;
use super::places::Quarter;
use super::roster::Refused;
use crate::net::Peer;
use crate::systemd::log_limit::{LogLimit, PERIOD, Verdict};
use crate::systemd::message_id;
use std::fmt;
use std::sync::{MutexGuard, PoisonError};
use std::time::Instant;
use tracing::{info, warn};

/// Events by reason and by where the connections came from.
pub(super) type Strangers = LogLimit<(Reason, Quarter)>;

/// Why a connection did not become a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Reason {
    /// The access control list does not admit it.
    Acl,
    /// As many clients were connected as may be.
    Full,
    /// The server was stopping, or had no descriptors or threads left.
    Scarce,
    /// It ended before its handshake did.
    Handshake,
}

impl Reason {
    fn message_id(self) -> Option<&'static str> {
        match self {
            Self::Acl => Some(message_id::CLIENT_NOT_ADMITTED),
            Self::Full => Some(message_id::CLIENT_LIMIT),
            Self::Scarce | Self::Handshake => None,
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Acl => "the access control list does not admit them",
            Self::Full => "as many clients are connected as may be",
            Self::Scarce => "the system gives no descriptors or threads, or the server is stopping",
            Self::Handshake => "they ended before the handshake did",
        })
    }
}

impl Shared {
    /// Logs that a connection was closed without a greeting.
    pub(super) fn log_refusal(&self, peer: &Peer, why: Refused) {
        let reason = match why {
            Refused::Acl => Reason::Acl,
            Refused::Full(_) => Reason::Full,
            Refused::Stopping | Refused::NoDescriptors => Reason::Scarce,
        };
        if self.is_worth_a_line(reason, peer) {
            let message_id = reason.message_id();
            warn!(message_id, "flexnbd.client" = %peer, "refused {peer}: {why}");
        }
    }

    /// Logs how a connection ended that was in the handshake until then.
    pub(super) fn log_end_in_handshake(&self, peer: &Peer, session: u64, end: &SessionEnd) {
        let reason = match end {
            SessionEnd::Full => Reason::Full,
            SessionEnd::Ordered(Order::NotAdmitted) => Reason::Acl,
            _ => Reason::Handshake,
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

    pub(super) fn is_worth_a_line(&self, reason: Reason, peer: &Peer) -> bool {
        self.strangers().note((reason, peer.into()), Instant::now()) == Verdict::Log
    }

    /// Logs the counts that are due, and returns when the next ones are.
    pub(super) fn log_strangers(&self, now: Instant) -> Option<Instant> {
        let (counts, due) = {
            let mut strangers = self.strangers();
            (strangers.take_counts(now), strangers.due())
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

    /// Nothing is left half done under this lock.
    fn strangers(&self) -> MutexGuard<'_, Strangers> {
        self.strangers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
