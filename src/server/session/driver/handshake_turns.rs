//! One turn of the handshake on its socket. Asks the policy, which may wait for a device, on behalf of
//! the [`Handshake`]; decides nothing itself.

use super::socket::{SessionSocket, WaitFor};
use crate::net::Interest;
use crate::server::end::SessionEnd;
use crate::server::export_policy::GoReply;
use crate::server::session::handshake::{Handshake, HandshakeBlocked, Negotiated};
use crate::server::session::phase::{SessionContext, Turn};
use crate::server::sessions::Registration;
use crate::server::settings::Style;
use std::time::Instant;

/// The handshake of one session on its socket.
#[derive(Debug)]
pub(super) struct HandshakeTurns<'a> {
    pub(super) context: &'a SessionContext<'a>,
    pub(super) registration: &'a Registration,
}

impl HandshakeTurns<'_> {
    pub(super) fn turn(
        &self,
        socket: &mut SessionSocket<'_>,
        handshake: &mut Handshake,
    ) -> Result<Turn, SessionEnd> {
        let Self { context: SessionContext { policy, .. }, registration } = self;
        let stop = socket.stop_request();
        let blocked = handshake.advance(stop).inspect_err(|_| {
            // The end is known already.
            let _ = socket.send(&mut handshake.tx);
        })?;
        self.report_progress(handshake);
        match blocked {
            HandshakeBlocked::Probe(data) => {
                let reply = policy.probe(registration.id, &data, registration.sessions());
                handshake.on_probe_reply(reply);
            }
            HandshakeBlocked::Admission { enters } => {
                handshake.on_go_reply(self.admission(enters));
            }
            HandshakeBlocked::Release => {
                policy.on_session_end(registration.id);
                handshake.on_released();
            }
            HandshakeBlocked::Displaced { sessions, until } => {
                if !handshake.on_others(registration.disconnect_others(&sessions)) {
                    socket.wait(WaitFor::WakeUp, Some(until))?;
                }
            }
            HandshakeBlocked::Holder { session, until } => {
                if !handshake.on_others(registration.has_ended(session)) {
                    socket.wait(WaitFor::WakeUp, Some(until))?;
                }
            }
            HandshakeBlocked::Output => {
                if !socket.send(&mut handshake.tx)? {
                    let writable = Interest { readable: false, writable: true };
                    socket.wait(WaitFor::Client(writable), Some(handshake.deadline()))?;
                }
            }
            HandshakeBlocked::Input => receive(socket, handshake)?,
            HandshakeBlocked::Suspend => {
                socket.send(&mut handshake.tx)?;
                return Ok(Turn::Suspended);
            }
            HandshakeBlocked::Complete(negotiated) => return self.complete(negotiated),
            HandshakeBlocked::StartTls => {
                // An introduction before TLS could be an attacker's.
                policy.on_session_end(registration.id);
                return Ok(Turn::StartTls);
            }
        }
        Ok(Turn::Continue)
    }

    fn report_progress(&self, handshake: &mut Handshake) {
        let progress = handshake.take_progress();
        if progress.option_received {
            self.registration.option_received(Instant::now());
        }
        if progress.is_source {
            self.registration.mark_source();
        }
    }

    /// Whether the client gets access to the export: as far as the limit of clients, the gate and the policy
    /// allow it.
    fn admission(&self, enters: bool) -> GoReply {
        let Self { context: SessionContext { policy, disk, .. }, registration } = self;
        let refusal = registration.establish_refusal().or_else(|| {
            let is_parting = disk.gate().is_parting();
            is_parting.then(|| "the disk is being handed over to another host".into())
        });
        match refusal {
            Some(why) => GoReply::Refuse { why: why.to_string(), holder: None },
            None => policy.go(registration.id, enters, registration.sessions()),
        }
    }

    fn complete(&self, negotiated: Negotiated) -> Result<Turn, SessionEnd> {
        // In old style the first request ends the handshake.
        if self.context.style == Style::Newstyle {
            self.registration.establish().map_err(SessionEnd::Full)?;
        }
        Ok(Turn::Complete(negotiated))
    }
}

/// Receives options, or waits for them.
fn receive(socket: &mut SessionSocket<'_>, handshake: &mut Handshake) -> Result<(), SessionEnd> {
    match socket.receive(&mut handshake.rx)? {
        Some(0) => Err(handshake.end_of_stream()),
        Some(_) => handshake.on_received(),
        None => {
            let readable = Interest { readable: true, writable: false };
            socket.wait(WaitFor::Client(readable), Some(handshake.deadline()))?;
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests;
