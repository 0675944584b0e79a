//! A session of the simulation: its engine, the connection to its client, and what a driver does.

use super::client::{Ending, ScriptedClient};
use super::coverage::{Coverage, Reached};
use super::disk::{ScriptedDisk, ScriptedNotifier};
use super::policy::ScriptedPolicy;
use crate::disk::inflight::simulation::HeldBudget;
use crate::disk::inflight::{BYTES_MAX, IN_FLIGHT_MAX, READ_BYTES_MAX};
use crate::disk::mutation::{Mutation, is_active};
use crate::disk::{Disk, Notifier};
use crate::nbd::reply::ReplyTo;
use crate::nbd::request::Terms;
use crate::schedules::ByteQueue;
use crate::server::end::SessionEnd;
use crate::server::export_policy::ExportPolicy;
use crate::server::payload_memory::{PayloadMemory, SessionMemory};
use crate::server::session::engine::{Blocked, Clocks, Engine, EngineContext, PendingRequests};
use crate::server::session::rx::Rx;
use crate::server::session::tx::Tx;
use crate::server::snapshot::{PhaseSnapshot, SessionSnapshot, TransmissionSnapshot};
use crate::server::stop_request::StopRequest;
use std::cell::Cell;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Most bytes of replies that a session may hold: those with which it answers nothing more, and the
/// longest reply beside them.
const UNSENT_MAX: u64 = 2 << 20;

thread_local! {
    static BEGAN: Instant = Instant::now();
    /// Time of the schedule since then.
    static ELAPSED: Cell<Duration> = const { Cell::new(Duration::ZERO) };
}

/// When the clock of the schedules began.
pub(super) fn began() -> Instant {
    BEGAN.with(|began| *began)
}

fn now() -> Instant {
    began() + ELAPSED.get()
}

pub(super) fn reset_clock() {
    ELAPSED.set(Duration::from_secs(1));
}

pub(super) fn advance_clock(by: Duration) {
    ELAPSED.set(ELAPSED.get() + by);
}

/// What all sessions share.
#[derive(Clone, Copy, Debug)]
pub(super) struct ScriptedServer<'a> {
    pub(super) disk: &'a Disk,
    pub(super) image: &'a ScriptedDisk,
    pub(super) policy: &'a ScriptedPolicy,
    pub(super) payloads: &'a Arc<PayloadMemory>,
}

/// What a session waits for, as the driver does.
#[derive(Debug)]
struct Wait {
    readable: bool,
    writable: bool,
    deadline: Option<Instant>,
}

/// A call of the policy that has not returned.
#[derive(Debug)]
enum PolicyCall {
    Record,
    Handover(ReplyTo, Vec<u8>),
}

/// One session.
#[derive(Debug)]
pub(super) struct ScriptedSession<'a> {
    id: u64,
    /// `None` once it has ended.
    pub(super) engine: Option<Engine<'a>>,
    /// The engine, once the session has ended; it is to be dropped.
    pub(super) leaving: Option<Engine<'a>>,
    pub(super) notifier: Arc<ScriptedNotifier>,
    pub(super) client: ScriptedClient,
    pub(super) stop: StopRequest,
    wait: Option<Wait>,
    call: Option<PolicyCall>,
    /// In the client's socket and in the server's.
    pub(super) to_client: ByteQueue,
    pub(super) to_server: ByteQueue,
    /// Size of these sockets in bytes.
    pub(super) socket: usize,
    /// The engine has received the end of the stream.
    has_eof: bool,
    /// Bytes that the engine has received.
    pub(super) received: u64,
    /// It ended in a way that leaves requests without replies.
    pub(super) may_lack_replies: bool,
}

impl<'a> ScriptedSession<'a> {
    pub(super) fn new(
        server: ScriptedServer<'a>,
        id: u64,
        terms: Terms,
        (socket, may_fail): (usize, bool),
    ) -> Self {
        let notifier = Arc::new(ScriptedNotifier::new(id));
        let start = (Rx::default(), Tx::default(), PendingRequests::default());
        Self {
            id,
            engine: Some(engine_of(server, id, terms, &notifier, start)),
            leaving: None,
            notifier,
            client: ScriptedClient::new(id, terms, may_fail),
            stop: StopRequest::Serve,
            wait: None,
            call: None,
            to_client: ByteQueue::default(),
            to_server: ByteQueue::default(),
            socket,
            has_eof: false,
            received: 0,
            may_lack_replies: false,
        }
    }

    /// What the session waits for, and the requests that are not answered.
    pub(super) fn describe(&self) -> String {
        format!("{:?}, {:?}, {}", self.wait, self.call, self.client.describe())
    }

    pub(super) fn request_stop(&mut self, request: StopRequest) {
        self.stop = self.stop.max(request);
        self.notifier.notify();
    }

    /// One turn of a session, as `Driver::turn` does it. False if it waits, or has ended.
    pub(super) fn turn(
        &mut self,
        server: ScriptedServer<'a>,
        fragment: usize,
        coverage: &mut Coverage,
    ) -> Result<bool, String> {
        if self.call.is_some() || self.engine.is_none() || !self.is_ready() {
            return Ok(false);
        }
        self.wait = None;
        self.notifier.take();
        server.image.state().current = Arc::clone(&self.notifier);
        if let Err(end) = self.advance(server, fragment, coverage)? {
            coverage.count(Reached::Ended);
            if matches!(end, SessionEnd::BadMagic(_)) {
                coverage.count(Reached::Malformed);
            }
            self.on_end(&end, server)?;
        }
        Ok(true)
    }

    fn advance(
        &mut self,
        server: ScriptedServer<'a>,
        fragment: usize,
        coverage: &mut Coverage,
    ) -> Result<Result<(), SessionEnd>, String> {
        let Some(engine) = &mut self.engine else { return Ok(Ok(())) };
        let before = (engine.tx.unsent(), server.image.state().begun);
        let outcome = engine.advance(self.stop);
        let has_worked = before != (engine.tx.unsent(), server.image.state().begun);
        if self.stop > StopRequest::Finish && (outcome.is_ok() || has_worked) {
            return Err(format!("it works after {:?}: {outcome:?}", self.stop));
        }
        if engine.rx.has_piece() {
            coverage.count(Reached::Direct);
        }
        let blocked = match outcome {
            Ok(blocked) => blocked,
            Err(end) => return Ok(Err(end)),
        };
        check_budget(engine)?;
        engine.take_has_completed();
        let room = self.socket.saturating_sub(self.to_client.len());
        self.to_client.extend(&engine.tx.take(room));
        let sent_all = !engine.tx.has_bytes();
        match blocked {
            Blocked::Batch | Blocked::PeerCheck => return Ok(Ok(())),
            Blocked::Output | Blocked::InputWithReads if sent_all => return Ok(Ok(())),
            Blocked::Suspend if engine.is_quiet() || is_active(Mutation::SuspendBusy) => {
                coverage.count(Reached::Suspended);
                self.suspend(server)?;
                return Ok(Ok(()));
            }
            Blocked::End => {
                if let Some(end) = engine.take_end() {
                    return Ok(Err(end));
                }
                if sent_all && engine.has_reads() {
                    return Ok(Ok(()));
                }
            }
            Blocked::Record => {
                self.call = Some(PolicyCall::Record);
                return Ok(Ok(()));
            }
            Blocked::Handover(to, data) => {
                self.call = Some(PolicyCall::Handover(to, data));
                return Ok(Ok(()));
            }
            Blocked::Input | Blocked::InputWithReads if self.receives(fragment) => {
                return Ok(Ok(()));
            }
            Blocked::Throttle(_) => coverage.count(Reached::Throttled),
            _ => {}
        }
        self.begin_wait(&blocked);
        Ok(Ok(()))
    }

    /// The policy's call returns; false if there is none.
    pub(super) fn end_call(
        &mut self,
        server: ScriptedServer<'a>,
        coverage: &mut Coverage,
    ) -> Result<bool, String> {
        let Some(call) = self.call.take() else { return Ok(false) };
        match (call, &mut self.engine) {
            (PolicyCall::Record, _) => {
                coverage.count(Reached::Recorded);
                server.policy.record_change(self.id);
            }
            (PolicyCall::Handover(to, data), Some(engine)) => {
                coverage.count(Reached::HandedOver);
                let reply = server.policy.handover(self.id, &data);
                if let Err(end) = engine.on_handover_reply(to, reply) {
                    self.on_end(&end, server)?;
                }
            }
            _ => {}
        }
        Ok(true)
    }

    /// The session has ended; fails if it had no reason to.
    fn on_end(&mut self, end: &SessionEnd, server: ScriptedServer<'a>) -> Result<(), String> {
        let (client, gate) = (&mut self.client, server.disk.gate());
        let is_retired = gate.enter_if_open().is_err();
        let is_oldstyle = client.terms.reads_beyond_end_are_no_space;
        self.may_lack_replies = match (end, client.ending) {
            (SessionEnd::Disconnected, Some(Ending::Disconnect))
            | (SessionEnd::Closed, Some(Ending::Close))
            | (SessionEnd::Truncated, Some(Ending::Truncate)) => false,
            (SessionEnd::BadMagic(_), Some(Ending::Malformed)) => !is_oldstyle,
            (SessionEnd::PayloadTooLong(_), Some(Ending::LongPayload))
            | (SessionEnd::Requested(StopRequest::Disconnect), Some(Ending::Handover)) => true,
            (SessionEnd::Requested(StopRequest::Finish), _) if self.stop == StopRequest::Finish => {
                client.forget_unreceived(self.received);
                !gate.is_open()
            }
            (SessionEnd::Requested(stop), _) if *stop == self.stop => true,
            (SessionEnd::DiskGone, _) if is_retired => true,
            (SessionEnd::ReplyIncomplete(_), _) if client.may_fail => true,
            _ => return Err(format!("session {} ends: {end:?}", self.id)),
        };
        self.leaving = self.engine.take();
        Ok(())
    }

    /// Receives bytes or the end of the stream; false if neither has arrived.
    fn receives(&mut self, most: usize) -> bool {
        let is_at_end = self.is_at_end();
        let Some(engine) = &mut self.engine else { return false };
        if self.to_server.len() > 0 && !engine.rx.is_full() {
            let count = engine.rx.fill(&self.to_server.bytes()[..most.min(self.to_server.len())]);
            self.to_server.consume(count);
            self.received += count as u64;
            engine.on_received();
            return true;
        }
        if is_at_end {
            engine.on_end_of_stream();
            self.has_eof = true;
        }
        is_at_end
    }

    fn is_at_end(&self) -> bool {
        let is_sent = self.to_server.len() == 0 && self.client.outgoing.len() == 0;
        self.client.ending.is_some() && is_sent && !self.has_eof
    }

    /// Waits, as `Driver::wait` does.
    fn begin_wait(&mut self, blocked: &Blocked) {
        let Some(engine) = &mut self.engine else { return };
        let ignores = is_active(Mutation::MissNotification);
        if engine.has_completed() && !ignores {
            return;
        }
        let takes_input = matches!(blocked, Blocked::Input | Blocked::InputWithReads);
        let is_stuck =
            matches!(blocked, Blocked::Completion | Blocked::Gate | Blocked::Throttle(_));
        engine.on_wait(is_stuck || matches!(blocked, Blocked::Output));
        let _ = engine.gate_expiry();
        let throttled = if let Blocked::Throttle(until) = blocked { Some(*until) } else { None };
        self.wait = Some(Wait {
            readable: takes_input && !engine.rx.is_full(),
            writable: engine.tx.has_bytes(),
            deadline: throttled,
        });
        if ignores {
            self.notifier.take();
        }
    }

    /// Whether the driver has no reason to wait any longer.
    fn is_ready(&self) -> bool {
        let Some(Wait { readable, writable, deadline }) = &self.wait else { return true };
        (*readable && (self.to_server.len() > 0 || self.is_at_end()))
            || (*writable && self.to_client.len() < self.socket)
            || deadline.is_some_and(|at| at <= now())
            || self.notifier.is_notified()
    }

    /// Saves the session, and restores it as the next process does.
    fn suspend(&mut self, server: ScriptedServer<'a>) -> Result<(), String> {
        let Some(engine) = self.engine.take() else { return Ok(()) };
        let snapshot = engine.save().map_err(|error| format!("the session is lost: {error}"))?;
        let SessionSnapshot { session, inbox, outbox, phase, .. } = pass_on(&snapshot);
        let PhaseSnapshot::Transmission(saved) = phase else { return Err("a handshake".into()) };
        let TransmissionSnapshot { form, allocation_selected, introduced, pending } = saved;
        let size = server.disk.size();
        let start = (|| {
            let pending = PendingRequests::restore(pending, size)?;
            Some((Rx::restore(&inbox)?, Tx::restore(outbox, size)?, pending))
        })();
        let start = start.ok_or("the session is not restorable")?;
        let terms = Terms {
            dialect: form.into(),
            allocation_selected,
            private: introduced,
            ..self.client.terms
        };
        self.engine = Some(engine_of(server, session, terms, &self.notifier, start));
        (self.stop, self.has_eof) = (StopRequest::Serve, false);
        Ok(())
    }
}

/// Fails if the session holds more than it may. A single operation may hold more bytes than several.
fn check_budget(engine: &mut Engine<'_>) -> Result<(), String> {
    let unsent = engine.tx.unsent();
    if unsent > UNSENT_MAX {
        return Err(format!("{unsent} bytes of replies are not sent"));
    }
    let held = engine.in_flight().held_budget();
    let HeldBudget { count, written, longest_write, read, longest_read } = held;
    let is_within = count <= IN_FLIGHT_MAX
        && written <= BYTES_MAX.max(longest_write)
        && read <= READ_BYTES_MAX.max(longest_read);
    if is_within { Ok(()) } else { Err(format!("the session holds {held:?}")) }
}

/// The bytes of a snapshot, decoded.
fn pass_on(snapshot: &SessionSnapshot) -> SessionSnapshot {
    rmp_serde::from_slice(&rmp_serde::to_vec_named(snapshot).unwrap()).unwrap()
}

fn engine_of<'a>(
    server: ScriptedServer<'a>,
    id: u64,
    terms: Terms,
    notifier: &Arc<ScriptedNotifier>,
    (rx, tx, pending): (Rx, Tx, PendingRequests),
) -> Engine<'a> {
    let context = EngineContext {
        disk: server.disk,
        policy: server.policy,
        notifier: Arc::clone(notifier) as Arc<dyn Notifier>,
        memory: SessionMemory::new(server.payloads),
        terms,
        answers_malformed: terms.reads_beyond_end_are_no_space,
        client: (String::new(), id),
        clocks: Clocks { now, coarse: || ELAPSED.get() },
    };
    Engine::new(context, rx, tx, pending)
}
