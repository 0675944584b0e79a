//! One client's session, in a thread of its own.
//! Ends for one reason, which it returns; the acceptor's code logs it.

use super::driver::Driver;
use super::engine::Clocks;
use super::phase::{SessionContext, SessionPhase};
use super::receive_delay::coarse_now;
use crate::disk::{Disk, Notifier};
use crate::nbd::handshake::server::Export;
use crate::net::{Peer, Stream};
use crate::server::end::SessionEnd;
use crate::server::export_policy::ExportPolicy;
use crate::server::payload_memory::PayloadMemory;
use crate::server::sessions::Registration;
use crate::server::settings::SessionSettings;
use crate::server::snapshot::SessionSnapshot;
use std::sync::Arc;
use std::time::Instant;

/// A connection, and all that its session needs.
#[derive(Debug)]
pub(in crate::server) struct Session<'a> {
    pub(in crate::server) stream: Stream,
    pub(in crate::server) peer: Peer,
    pub(in crate::server) registration: Registration,
    pub(in crate::server) disk: &'a Disk,
    pub(in crate::server) policy: &'a dyn ExportPolicy,
    pub(in crate::server) payloads: &'a Arc<PayloadMemory>,
    pub(in crate::server) export: Export,
    pub(in crate::server) settings: SessionSettings,
    pub(in crate::server) cpus: usize,
}

impl Session<'_> {
    /// Serves the client until the session ends, starting with the handshake or from a snapshot.
    /// Returns a snapshot if the end is [`SessionEnd::Suspended`].
    pub(in crate::server) fn run(
        &self,
        snapshot: Option<SessionSnapshot>,
    ) -> (SessionEnd, Option<SessionSnapshot>) {
        let context = self.context();
        let phase = match snapshot {
            None => SessionPhase::new(&context),
            Some(snapshot) => match SessionPhase::restore(&context, snapshot) {
                Some(phase) => phase,
                None => return (SessionEnd::NotRestorable, None),
            },
        };
        let (cpus, stall_limit) = (self.cpus, self.settings.stall_limit);
        Driver::new(&self.stream, &self.registration, &context, cpus, stall_limit).run(phase)
    }

    fn context(&self) -> SessionContext<'_> {
        let Self { peer, registration, settings, .. } = self;
        SessionContext {
            disk: self.disk,
            policy: self.policy,
            export: &self.export,
            style: settings.style,
            notifier: Arc::clone(&registration.control) as Arc<dyn Notifier>,
            payloads: self.payloads,
            client: (peer.to_string(), registration.id),
            handshake_deadline: registration.since + settings.handshake_timeout,
            clocks: Clocks { now: Instant::now, coarse: coarse_now },
        }
    }
}
