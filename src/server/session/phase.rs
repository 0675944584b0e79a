//! The phase of one session: the handshake, then the engine of the transmission phase. Pure, as both are.
//! Received bytes behind the last option and replies that are not sent pass from one to the other.

use super::engine::{Clocks, Engine, EngineContext, PendingRequests};
use super::handshake::{Handshake, Negotiated};
use super::rx::Rx;
use super::tx::Tx;
use crate::disk::{Disk, Notifier};
use crate::nbd::handshake::TlsOffer;
use crate::nbd::handshake::server::Export;
use crate::nbd::request::Terms;
use crate::server::end::SessionEnd;
use crate::server::export_policy::{ExportPolicy, SessionId};
use crate::server::payload_memory::{PayloadMemory, SessionMemory};
use crate::server::settings::Style;
use crate::server::snapshot::{PhaseSnapshot, SessionSnapshot};
use std::sync::Arc;
use std::time::Instant;

/// Largest payload in newstyle, in bytes. Twice the advertised maximum: some clients do not request
/// block sizes and assume more than the specification allows them.
pub const PAYLOAD_MAX: u32 = 64 << 20;
/// Largest payload in old style, which cannot advertise a maximum, in bytes: the largest `--size` of
/// `flexnbd read` and `write`.
pub const PAYLOAD_MAX_OLDSTYLE: u32 = 1 << 30;

/// What both phases need besides their state.
#[derive(Debug)]
pub(super) struct SessionContext<'a> {
    pub(super) disk: &'a Disk,
    pub(super) policy: &'a dyn ExportPolicy,
    pub(super) export: &'a Export,
    pub(super) style: Style,
    pub(super) tls: TlsOffer,
    pub(super) notifier: Arc<dyn Notifier>,
    pub(super) payloads: &'a Arc<PayloadMemory>,
    /// For the log, and the session's id.
    pub(super) client: (String, SessionId),
    /// When a new or restored handshake times out.
    pub(super) handshake_deadline: Instant,
    pub(super) clocks: Clocks,
}

/// The state of a session.
#[derive(Debug)]
pub(super) enum SessionPhase<'a> {
    Handshake(Box<Handshake>),
    Transmission(Box<Engine<'a>>),
}

/// What follows a turn of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Turn {
    Continue,
    /// The handshake is complete ([`SessionPhase::into_transmission`]).
    Complete(Negotiated),
    /// TLS begins, in the handshake ([`Handshake::restart_in_tls`]).
    StartTls,
    /// The session is suspended ([`SessionPhase::save`]).
    Suspended,
}

impl<'a> SessionPhase<'a> {
    /// The start of a new session.
    pub(super) fn new(context: &SessionContext<'a>) -> Self {
        let SessionContext { export, style, tls, handshake_deadline, clocks, .. } = context;
        let handshake = Handshake::new(export, *style, *tls, *handshake_deadline, *clocks);
        Self::Handshake(Box::new(handshake))
    }

    /// The start of a session from a snapshot; `None` if that does not fit this server.
    pub(super) fn restore(context: &SessionContext<'a>, snapshot: SessionSnapshot) -> Option<Self> {
        let SessionContext { export, tls, handshake_deadline, clocks, .. } = context;
        let rx = Rx::restore(&snapshot.inbox)?;
        let tx = Tx::restore(snapshot.outbox, export.size)?;
        Some(match snapshot.phase {
            PhaseSnapshot::Handshake(saved) => {
                let position = saved.position()?;
                let deadline = *handshake_deadline;
                let buffers = (rx, tx);
                let handshake =
                    Handshake::restore(export, position, buffers, *tls, deadline, *clocks);
                Self::Handshake(Box::new(handshake))
            }
            PhaseSnapshot::Transmission(saved) => {
                let negotiated = Negotiated {
                    dialect: saved.form.into(),
                    allocation_selected: saved.allocation_selected,
                    private: saved.introduced,
                };
                let pending = PendingRequests::restore(saved.pending, export.size)?;
                let context = context.for_engine(negotiated);
                Self::Transmission(Box::new(Engine::new(context, rx, tx, pending)))
            }
        })
    }

    /// Ends the handshake: bytes behind the last option are requests.
    pub(super) fn into_transmission(
        self,
        context: &SessionContext<'a>,
        negotiated: Negotiated,
    ) -> Self {
        let Self::Handshake(handshake) = self else { return self };
        let Handshake { rx, tx, .. } = *handshake;
        let pending = PendingRequests::default();
        let engine = Engine::new(context.for_engine(negotiated), rx, tx, pending);
        Self::Transmission(Box::new(engine))
    }

    /// Saves the session, which has no I/O in flight. Fails if replies cannot be saved.
    pub(super) fn save(self, session: SessionId) -> Result<SessionSnapshot, SessionEnd> {
        match self {
            Self::Handshake(handshake) => handshake.save(session).map_err(SessionEnd::Connection),
            Self::Transmission(engine) => engine.save().map_err(SessionEnd::ReplyIncomplete),
        }
    }
}

impl<'a> SessionContext<'a> {
    fn for_engine(&self, negotiated: Negotiated) -> EngineContext<'a> {
        let Negotiated { dialect, allocation_selected, private } = negotiated;
        let oldstyle = self.style == Style::Oldstyle;
        EngineContext {
            disk: self.disk,
            policy: self.policy,
            notifier: Arc::clone(&self.notifier),
            memory: SessionMemory::new(self.payloads),
            terms: Terms {
                size: self.export.size,
                flags: self.export.flags,
                dialect,
                allocation_selected,
                private,
                payload_length_max: if oldstyle { PAYLOAD_MAX_OLDSTYLE } else { PAYLOAD_MAX },
                reads_beyond_end_are_no_space: oldstyle,
            },
            answers_malformed: oldstyle,
            client: self.client.clone(),
            clocks: self.clocks,
        }
    }
}

#[cfg(test)]
mod tests;
