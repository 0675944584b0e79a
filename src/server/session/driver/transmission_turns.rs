//! One turn of the transmission phase on its socket. Decides nothing about requests.

use super::socket::{SessionSocket, WaitFor};
use crate::net::Interest;
use crate::server::end::SessionEnd;
use crate::server::export_policy::ExportPolicy;
use crate::server::session::engine::{Blocked, Engine};
use crate::server::session::phase::Turn;
use crate::server::session::polling::{AdaptivePolling, POLL_TIME};
use crate::server::session::stall::Stall;
use crate::server::sessions::Registration;
use crate::server::stop_request::StopRequest;
use std::time::{Duration, Instant};

/// Waits for requests only.
const READABLE: Interest = Interest { readable: true, writable: false };
/// After this time without activity, a session frees its buffers.
const IDLE_TIMEOUT: Duration = Duration::from_secs(1);

/// The transmission phase of one session on its socket.
#[derive(Debug)]
pub(super) struct TransmissionTurns<'a> {
    registration: &'a Registration,
    policy: &'a dyn ExportPolicy,
    /// How many threads can run at once.
    cpus: usize,
    stall_limit: Option<Duration>,
    polling: AdaptivePolling,
    request_stall: Stall,
    reply_stall: Stall,
}

impl<'a> TransmissionTurns<'a> {
    pub(super) fn new(
        registration: &'a Registration,
        policy: &'a dyn ExportPolicy,
        cpus: usize,
        stall_limit: Option<Duration>,
    ) -> Self {
        Self {
            registration,
            policy,
            cpus,
            stall_limit,
            polling: AdaptivePolling::default(),
            request_stall: Stall::default(),
            reply_stall: Stall::default(),
        }
    }

    pub(super) fn turn(
        &mut self,
        socket: &mut SessionSocket<'_>,
        engine: &mut Engine<'_>,
    ) -> Result<Turn, SessionEnd> {
        let blocked = engine.advance(socket.stop_request())?;
        if engine.take_has_completed() {
            self.registration.control.record_activity();
        }
        let sent_all = socket.send(&mut engine.tx)?;
        match blocked {
            Blocked::Batch => return Ok(Turn::Continue),
            Blocked::Output | Blocked::InputWithReads if sent_all => return Ok(Turn::Continue),
            Blocked::Suspend if engine.is_quiet() => return Ok(Turn::Suspended),
            Blocked::End => {
                if let Some(end) = engine.take_end() {
                    return Err(end);
                }
                if sent_all && engine.has_reads() {
                    return Ok(Turn::Continue);
                }
            }
            Blocked::PeerCheck => {
                if socket.has_peer_ended() {
                    return Err(SessionEnd::Truncated);
                }
                return Ok(Turn::Continue);
            }
            Blocked::Record => {
                self.policy.record_change(self.registration.id);
                return Ok(Turn::Continue);
            }
            Blocked::Handover(to, data) => {
                let reply = self.policy.handover(self.registration.id, &data);
                engine.on_handover_reply(to, reply)?;
                return Ok(Turn::Continue);
            }
            Blocked::Input | Blocked::InputWithReads
                if !socket.drained && !engine.rx.is_full() && self.receive(socket, engine)? =>
            {
                return Ok(Turn::Continue);
            }
            _ => {}
        }
        self.wait(socket, engine, &blocked)?;
        Ok(Turn::Continue)
    }

    /// Receives; false if nothing has arrived.
    fn receive(
        &self,
        socket: &mut SessionSocket<'_>,
        engine: &mut Engine<'_>,
    ) -> Result<bool, SessionEnd> {
        let is_first = socket.received == 0;
        match socket.receive(&mut engine.rx)? {
            None => return Ok(false),
            Some(0) => engine.on_end_of_stream(),
            Some(_) => {
                if is_first {
                    // In old style the first request ends the handshake.
                    self.registration.establish().map_err(SessionEnd::Full)?;
                    self.be_quiet_if_required(engine);
                }
                engine.on_received();
            }
        }
        Ok(true)
    }

    /// Called once the client is established.
    pub(super) fn be_quiet_if_required(&self, engine: &mut Engine<'_>) {
        if self.registration.is_quiet() {
            engine.be_quiet();
        }
    }

    /// Waits for the client, a stop request, a completion or a timeout.
    fn wait(
        &mut self,
        socket: &mut SessionSocket<'_>,
        engine: &mut Engine<'_>,
        blocked: &Blocked,
    ) -> Result<(), SessionEnd> {
        if engine.has_completed() {
            return Ok(());
        }
        let control = &self.registration.control;
        if control.current() != StopRequest::Serve {
            control.set_waits_for_disk(!engine.is_quiet());
        }
        let takes_input = matches!(blocked, Blocked::Input | Blocked::InputWithReads);
        let interest = Interest {
            readable: takes_input && !engine.rx.is_full(),
            writable: engine.tx.has_bytes(),
        };
        if interest == READABLE && engine.is_quiet() && self.poll(socket, engine)? {
            return Ok(());
        }
        let is_stuck = matches!(
            blocked,
            Blocked::Completion | Blocked::Gate | Blocked::Throttle(_) | Blocked::PeerCheck
        );
        engine.on_wait(is_stuck || matches!(blocked, Blocked::Output));
        let now = Instant::now();
        let stalled = self.stall_deadline(socket, engine, is_stuck, now);
        let idle = || engine.may_shrink().then(|| now + IDLE_TIMEOUT);
        let throttled = if let Blocked::Throttle(until) = blocked { Some(*until) } else { None };
        let deadline = stalled.or_else(idle);
        let deadline = [deadline, engine.gate_expiry(), throttled].into_iter().flatten().min();
        let waits_for_client = interest != Interest::default();
        let event = if waits_for_client { WaitFor::Client(interest) } else { WaitFor::HangUp };
        let ready = socket.wait_also(event, engine.descriptor(), deadline)?;
        if ready.readable && !waits_for_client {
            // The connection is closed in both directions: no reply can arrive.
            return Err(engine.take_end_now().unwrap_or(SessionEnd::Truncated));
        }
        if ready.woken || ready.also {
            return Ok(());
        }
        if ready.timed_out && stalled.is_some_and(|at| at <= Instant::now()) {
            return Err(SessionEnd::Stalled);
        }
        if ready.timed_out && throttled.is_none() {
            engine.shrink();
            socket.shrink();
        }
        Ok(())
    }

    /// Busy-polls for the next request if it is likely to arrive at once and there are enough
    /// processors; true if bytes arrived.
    fn poll(
        &mut self,
        socket: &mut SessionSocket<'_>,
        engine: &mut Engine<'_>,
    ) -> Result<bool, SessionEnd> {
        let polls = self.polling.should_poll(engine.take_begun());
        if !polls || self.registration.session_count() > self.cpus {
            return Ok(false);
        }
        let until = Instant::now() + POLL_TIME;
        let mut arrived = false;
        while !arrived
            && self.registration.control.current() == StopRequest::Serve
            && Instant::now() < until
        {
            arrived = self.receive(socket, engine)?;
        }
        self.polling.record(arrived);
        Ok(arrived)
    }

    /// When `--killswitch` ends the session unless bytes move before. Time that a request waits for the
    /// disk does not count.
    fn stall_deadline(
        &mut self,
        socket: &SessionSocket<'_>,
        engine: &Engine<'_>,
        is_stuck: bool,
        now: Instant,
    ) -> Option<Instant> {
        let limit = self.stall_limit?;
        let waits_for_rest = engine.has_partial_request() && !is_stuck;
        let sends = engine.tx.has_bytes();
        let request = self.request_stall.deadline(waits_for_rest, socket.received, now, limit);
        let reply = self.reply_stall.deadline(sends, socket.sent, now, limit);
        request.into_iter().chain(reply).min()
    }
}
