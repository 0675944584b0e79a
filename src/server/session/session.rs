//! One client's session, in a thread of its own.
//! Ends for one reason, which it returns; the acceptor's code logs it.

use super::driver::{Driver, DriverEnd};
use super::engine::Clocks;
use super::phase::{SessionContext, SessionPhase};
use super::receive_delay::coarse_now;
use crate::disk::{Disk, Notifier};
use crate::nbd::handshake::TlsOffer;
use crate::nbd::handshake::server::Export;
use crate::net::tls::{ServerTls, TlsMode, TlsRole};
use crate::net::{Peer, Stream};
use crate::server::end::SessionEnd;
use crate::server::export_policy::ExportPolicy;
use crate::server::payload_memory::PayloadMemory;
use crate::server::sessions::Registration;
use crate::server::settings::SessionSettings;
use crate::server::snapshot::SessionSnapshot;
use crate::server::stop_request::StopRequest;
use std::io;
use std::sync::Arc;
use std::time::Instant;

/// All that a session needs besides its connection.
#[derive(Debug)]
pub(in crate::server) struct Session<'a> {
    pub(in crate::server) peer: Peer,
    pub(in crate::server) registration: Registration,
    pub(in crate::server) disk: &'a Disk,
    pub(in crate::server) policy: &'a dyn ExportPolicy,
    pub(in crate::server) payloads: &'a Arc<PayloadMemory>,
    pub(in crate::server) export: Export,
    pub(in crate::server) settings: SessionSettings,
    pub(in crate::server) tls: Option<Arc<ServerTls>>,
    pub(in crate::server) cpus: usize,
}

/// The end of a session, and the parts that outlive it.
#[derive(Debug)]
pub(in crate::server) struct EndedSession {
    pub(in crate::server) end: SessionEnd,
    /// The connection, unless it is closed.
    pub(in crate::server) stream: Option<Stream>,
    /// Only if the end is [`SessionEnd::Suspended`].
    pub(in crate::server) snapshot: Option<Box<SessionSnapshot>>,
}

impl Session<'_> {
    /// Serves the client until the session ends, starting with the handshake or from a snapshot.
    pub(in crate::server) fn run(
        &self,
        mut stream: Stream,
        snapshot: Option<SessionSnapshot>,
    ) -> EndedSession {
        let context = self.context(stream.is_tls());
        let mut phase = match snapshot {
            None => SessionPhase::new(&context),
            Some(snapshot) => match SessionPhase::restore(&context, snapshot) {
                Some(phase) => phase,
                None => {
                    let (end, stream) = (SessionEnd::NotRestorable, Some(stream));
                    return EndedSession { end, stream, snapshot: None };
                }
            },
        };
        let (cpus, stall_limit) = (self.cpus, self.settings.stall_limit);
        loop {
            let driver = Driver::new(&stream, &self.registration, &context, cpus, stall_limit);
            phase = match driver.run(phase) {
                DriverEnd::Session(end, snapshot) => {
                    return EndedSession { end, stream: Some(stream), snapshot };
                }
                DriverEnd::StartTls(plain) => match self.start_tls(stream) {
                    Ok(secure) => {
                        stream = secure;
                        let references = stream.sends_references();
                        let restarted = plain.restart_in_tls(&self.export, references);
                        SessionPhase::Handshake(Box::new(restarted))
                    }
                    Err(end) => return EndedSession { end, stream: None, snapshot: None },
                },
            };
        }
    }

    /// Begins TLS. The deadline is that of the whole handshake; no stop request waits for the client.
    fn start_tls(&self, stream: Stream) -> Result<Stream, SessionEnd> {
        // It was offered, and a session keeps its configuration.
        let Some(tls) = &self.tls else { return Err(SessionEnd::NotRestorable) };
        let role = TlsRole::Server { config: Arc::clone(tls.config()), kernel: true };
        let control = &self.registration.control;
        let deadline = self.registration.since + self.settings.handshake_timeout;
        let mut end = None;
        let secured = stream.start_tls(&role, &mut |stream, interest| {
            let ready = stream.wait(interest, Some(&control.wake), Some(deadline))?;
            if ready.woken {
                control.wake.clear();
            }
            end = match control.current() {
                StopRequest::Serve if ready.timed_out => Some(SessionEnd::HandshakeTimeout),
                StopRequest::Serve => return Ok(()),
                request => Some(SessionEnd::Requested(request)),
            };
            Err(io::ErrorKind::Interrupted.into())
        });
        secured.map_err(|failure| end.unwrap_or(SessionEnd::Tls(failure)))
    }

    /// `in_tls`: the connection is encrypted already.
    fn context(&self, in_tls: bool) -> SessionContext<'_> {
        let Self { peer, registration, settings, .. } = self;
        let offered = match self.tls.as_ref().map(|tls| tls.mode()) {
            None | Some(TlsMode::Off) => TlsOffer::Unsupported,
            Some(TlsMode::On) => TlsOffer::Optional,
            Some(TlsMode::Require) => TlsOffer::Required,
        };
        SessionContext {
            disk: self.disk,
            policy: self.policy,
            export: &self.export,
            style: settings.style,
            tls: if in_tls { TlsOffer::InUse } else { offered },
            notifier: Arc::clone(&registration.control) as Arc<dyn Notifier>,
            payloads: self.payloads,
            client: (peer.to_string(), registration.id),
            handshake_deadline: registration.since + settings.handshake_timeout,
            clocks: Clocks { now: Instant::now, coarse: coarse_now },
        }
    }
}
