//! Drives the engine of one session: the only place that receives, sends, polls and waits.
//! Decides nothing about requests.

use super::engine::{Blocked, Engine};
use super::polling::{AdaptivePolling, POLL_TIME};
use super::stall::Stall;
use crate::net::{Interest, Stream};
use crate::server::end::SessionEnd;
use crate::server::export_policy::ExportPolicy;
use crate::server::sessions::Registration;
use crate::server::snapshot::SessionSnapshot;
use crate::server::stop_request::StopRequest;
use std::io;
use std::time::{Duration, Instant};

/// When fewer bytes than this arrived at once, the session does not try to receive more before it
/// waits: a client with one or two requests in flight waits for their replies first.
const DRAINED_BELOW: usize = 64;
/// Waits for requests only.
const READABLE: Interest = Interest { readable: true, writable: false };
/// After this time without activity, a session frees its buffers.
const IDLE_TIMEOUT: Duration = Duration::from_secs(1);

/// The transmission phase of one session on its socket.
#[derive(Debug)]
pub(super) struct Driver<'a> {
    stream: &'a Stream,
    registration: &'a Registration,
    policy: &'a dyn ExportPolicy,
    /// How many threads can run at once.
    cpus: usize,
    stall_limit: Option<Duration>,
    engine: Engine<'a>,
    polling: AdaptivePolling,
    /// Bytes received.
    received: u64,
    /// So few bytes arrived the last time that the socket is empty.
    drained: bool,
    /// Bytes sent.
    sent: u64,
    request_stall: Stall,
    reply_stall: Stall,
}

/// What follows a turn.
enum Turn {
    Continue,
    Suspended,
}

impl<'a> Driver<'a> {
    pub(super) fn new(
        (stream, registration): (&'a Stream, &'a Registration),
        policy: &'a dyn ExportPolicy,
        cpus: usize,
        stall_limit: Option<Duration>,
        engine: Engine<'a>,
    ) -> Self {
        Self {
            stream,
            registration,
            policy,
            cpus,
            stall_limit,
            engine,
            polling: AdaptivePolling::default(),
            received: 0,
            drained: false,
            sent: 0,
            request_stall: Stall::default(),
            reply_stall: Stall::default(),
        }
    }

    /// Serves until the session ends. Returns a snapshot if the end is [`SessionEnd::Suspended`].
    pub(super) fn run(mut self) -> (SessionEnd, Option<SessionSnapshot>) {
        loop {
            match self.turn() {
                Ok(Turn::Continue) => {}
                Ok(Turn::Suspended) => {
                    return match self.engine.save() {
                        Ok(snapshot) => (SessionEnd::Suspended, Some(snapshot)),
                        Err(error) => (SessionEnd::ReplyIncomplete(error), None),
                    };
                }
                Err(end) => return (end, None),
            }
        }
    }

    fn turn(&mut self) -> Result<Turn, SessionEnd> {
        let blocked = self.engine.advance(self.registration.control.current())?;
        if self.engine.take_has_completed() {
            self.registration.control.record_activity();
        }
        let sent_all = self.send()?;
        match blocked {
            Blocked::Batch => return Ok(Turn::Continue),
            Blocked::Output | Blocked::InputWithReads if sent_all => return Ok(Turn::Continue),
            Blocked::Suspend if self.engine.is_quiet() => return Ok(Turn::Suspended),
            Blocked::End => {
                if let Some(end) = self.engine.take_end() {
                    return Err(end);
                }
                if sent_all && self.engine.has_reads() {
                    return Ok(Turn::Continue);
                }
            }
            Blocked::PeerCheck => {
                if self.stream.has_peer_ended().is_ok_and(|ended| ended) {
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
                self.engine.on_handover_reply(to, reply)?;
                return Ok(Turn::Continue);
            }
            Blocked::Input | Blocked::InputWithReads
                if !self.drained && !self.engine.rx.is_full() && self.receive()? =>
            {
                return Ok(Turn::Continue);
            }
            _ => {}
        }
        self.wait(&blocked)?;
        Ok(Turn::Continue)
    }

    /// Sends replies; false if the socket does not accept all of them now.
    fn send(&mut self) -> Result<bool, SessionEnd> {
        let tx = &mut self.engine.tx;
        let before = tx.unsent();
        let sent_all = tx.send(self.stream).map_err(SessionEnd::Connection)?;
        self.sent += before.saturating_sub(tx.unsent());
        Ok(sent_all)
    }

    /// Receives; false if nothing has arrived.
    fn receive(&mut self) -> Result<bool, SessionEnd> {
        match self.engine.rx.receive(self.stream) {
            Ok(0) => {
                self.engine.on_end_of_stream();
                Ok(true)
            }
            Ok(count) => {
                // In old style the first request ends the handshake.
                if self.received == 0 && !self.registration.establish() {
                    return Err(SessionEnd::Full);
                }
                self.engine.on_received();
                self.registration.control.record_activity();
                self.received += count as u64;
                self.drained = count < DRAINED_BELOW;
                Ok(true)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(error) => Err(SessionEnd::Connection(error)),
        }
    }

    /// Waits for the client, a stop request, a completion or a timeout.
    fn wait(&mut self, blocked: &Blocked) -> Result<(), SessionEnd> {
        if self.engine.has_completed() {
            return Ok(());
        }
        let control = &self.registration.control;
        if control.current() != StopRequest::Serve {
            control.set_waits_for_disk(!self.engine.is_quiet());
        }
        let takes_input = matches!(blocked, Blocked::Input | Blocked::InputWithReads);
        let interest = Interest {
            readable: takes_input && !self.engine.rx.is_full(),
            writable: self.engine.tx.has_bytes(),
        };
        if interest == READABLE && self.engine.is_quiet() && self.poll()? {
            return Ok(());
        }
        let is_stuck = matches!(
            blocked,
            Blocked::Completion | Blocked::Gate | Blocked::Throttle(_) | Blocked::PeerCheck
        );
        self.engine.on_wait(is_stuck || matches!(blocked, Blocked::Output));
        let now = Instant::now();
        let stalled = self.stall_deadline(is_stuck, now);
        let idle = || self.engine.may_shrink().then(|| now + IDLE_TIMEOUT);
        let throttled = if let Blocked::Throttle(until) = blocked { Some(*until) } else { None };
        let deadline = stalled.or_else(idle);
        let deadline = [deadline, self.engine.gate_expiry(), throttled].into_iter().flatten().min();
        let wake = &self.registration.control.wake;
        let waits_for_client = interest != Interest::default();
        let ready = if waits_for_client {
            self.stream.wait(interest, Some(wake), deadline)
        } else {
            self.stream.wait_for_hang_up(wake, deadline)
        };
        let ready = ready.map_err(SessionEnd::Connection)?;
        if ready.readable {
            self.drained = false;
        }
        if ready.readable && !waits_for_client {
            // The connection is closed in both directions: no reply can arrive.
            return Err(self.engine.take_end_now().unwrap_or(SessionEnd::Truncated));
        }
        if ready.woken {
            wake.clear();
            return Ok(());
        }
        if ready.timed_out && stalled.is_some_and(|at| at <= Instant::now()) {
            return Err(SessionEnd::Stalled);
        }
        if ready.timed_out && throttled.is_none() {
            self.engine.shrink();
        }
        Ok(())
    }

    /// Busy-polls for the next request if it is likely to arrive at once and there are enough
    /// processors; true if bytes arrived.
    fn poll(&mut self) -> Result<bool, SessionEnd> {
        let polls = self.polling.should_poll(self.engine.take_begun());
        if !polls || self.registration.session_count() > self.cpus {
            return Ok(false);
        }
        let until = Instant::now() + POLL_TIME;
        let mut arrived = false;
        while !arrived
            && self.registration.control.current() == StopRequest::Serve
            && Instant::now() < until
        {
            arrived = self.receive()?;
        }
        self.polling.record(arrived);
        Ok(arrived)
    }

    /// When `--killswitch` ends the session unless bytes move before. Time that a request waits for the
    /// disk does not count.
    fn stall_deadline(&mut self, is_stuck: bool, now: Instant) -> Option<Instant> {
        let limit = self.stall_limit?;
        let waits_for_rest = self.engine.has_partial_request() && !is_stuck;
        let sends = self.engine.tx.has_bytes();
        let request = self.request_stall.deadline(waits_for_rest, self.received, now, limit);
        let reply = self.reply_stall.deadline(sends, self.sent, now, limit);
        request.into_iter().chain(reply).min()
    }
}
