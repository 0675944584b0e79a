//! Drives one session: the only place that waits, receives and sends (`socket`), and that calls functions
//! of the policy that may wait for a device. Decides nothing about options and requests: the
//! [handshake](super::handshake) and the [engine](super::engine) do that and return their reason to wait,
//! and a turn of the driver (`handshake_turns`, `transmission_turns`) acts on it.

mod handshake_turns;
mod socket;
mod transmission_turns;

use super::handshake::Handshake;
use super::phase::{SessionContext, SessionPhase, Turn};
use crate::net::Stream;
use crate::server::end::SessionEnd;
use crate::server::sessions::Registration;
use crate::server::snapshot::SessionSnapshot;
use handshake_turns::HandshakeTurns;
use socket::SessionSocket;
use std::time::Duration;
use transmission_turns::TransmissionTurns;

/// Why a driver ended.
#[derive(Debug)]
pub(super) enum DriverEnd {
    /// The session ended, with a snapshot if the end is [`SessionEnd::Suspended`].
    Session(SessionEnd, Option<Box<SessionSnapshot>>),
    /// Once the connection is encrypted, this handshake [begins again](Handshake::restart_in_tls).
    StartTls(Box<Handshake>),
}

/// One session on its socket.
#[derive(Debug)]
pub(super) struct Driver<'a> {
    context: &'a SessionContext<'a>,
    socket: SessionSocket<'a>,
    handshake: HandshakeTurns<'a>,
    transmission: TransmissionTurns<'a>,
}

impl<'a> Driver<'a> {
    /// A driver where `cpus` threads can run at once. `stall_limit`: how long a request or reply may
    /// make no progress.
    pub(super) fn new(
        stream: &'a Stream,
        registration: &'a Registration,
        context: &'a SessionContext<'a>,
        cpus: usize,
        stall_limit: Option<Duration>,
    ) -> Self {
        Self {
            context,
            socket: SessionSocket::new(stream, &registration.control),
            handshake: HandshakeTurns { registration, context },
            transmission: TransmissionTurns::new(registration, context.policy, cpus, stall_limit),
        }
    }

    /// Serves until the session ends, or begins TLS.
    pub(super) fn run(mut self, mut phase: SessionPhase<'a>) -> DriverEnd {
        let socket = &mut self.socket;
        let end = loop {
            let turn = match &mut phase {
                SessionPhase::Handshake(handshake) => self.handshake.turn(socket, handshake),
                SessionPhase::Transmission(engine) => self.transmission.turn(socket, engine),
            };
            match turn {
                Ok(Turn::Continue) => {}
                Ok(Turn::Complete(negotiated)) => {
                    phase = phase.into_transmission(self.context, negotiated);
                    if let SessionPhase::Transmission(engine) = &mut phase {
                        self.transmission.be_quiet_if_required(engine);
                    }
                    // So that the engine tries to receive before its first wait.
                    socket.drained = false;
                }
                Ok(Turn::StartTls) => {
                    if let SessionPhase::Handshake(handshake) = phase {
                        return DriverEnd::StartTls(handshake);
                    }
                }
                Ok(Turn::Suspended) => {
                    return match phase.save(self.context.client.1) {
                        Ok(snapshot) => {
                            let snapshot = Some(Box::new(snapshot));
                            DriverEnd::Session(SessionEnd::Suspended, snapshot)
                        }
                        Err(end) => DriverEnd::Session(end, None),
                    };
                }
                Err(end) => break end,
            }
        };
        // Before the client is waited for: frees the buffers, and waits for operations in flight.
        drop(phase);
        if end.needs_linger() {
            self.socket.linger();
        } else {
            self.socket.announce_end();
        }
        DriverEnd::Session(end, None)
    }
}
