//! The world of one schedule: sessions on one disk, the gate, a migration's copier, and the clock.

use super::client::ScriptedClient;
use super::disk::ScriptedDisk;
use super::model::{CELL, Model, Stamp};
use crate::disk::dirty::DirtyBitmap;
use crate::disk::mutation::{Mutation, is_active};
use crate::disk::slow_backend::TestNotifier;
use crate::disk::{Disk, Notifier};
use crate::nbd::reply::Dialect;
use crate::nbd::request::Terms;
use crate::server::end::SessionEnd;
use crate::server::export_policy::AllowAll;
use crate::server::session::engine::{Blocked, Clocks, Engine, EngineContext, PendingRequests};
use crate::server::session::rx::Rx;
use crate::server::session::tx::Tx;
use crate::server::snapshot::{PhaseSnapshot, SessionSnapshot};
use crate::server::stop_request::StopRequest;
use std::cell::Cell;
use std::sync::Arc;
use std::time::{Duration, Instant};

thread_local! {
    static BEGAN: Instant = Instant::now();
    /// Time of the schedule since then.
    static ELAPSED: Cell<Duration> = const { Cell::new(Duration::ZERO) };
}

fn began() -> Instant {
    BEGAN.with(|began| *began)
}

fn now() -> Instant {
    began() + ELAPSED.get()
}

/// One of so many schedules has a large disk, or many requests in flight.
pub(super) const LARGE_EVERY: u64 = 16;

/// What a session waits for, as the driver does.
#[derive(Debug)]
struct Wait {
    readable: bool,
    writable: bool,
    deadline: Option<Instant>,
}

/// One session: its engine, and the connection to its client.
#[derive(Debug)]
struct ScriptedSession<'a> {
    /// `None` once it has ended.
    engine: Option<Engine<'a>>,
    notifier: Arc<TestNotifier>,
    client: ScriptedClient,
    stop: StopRequest,
    wait: Option<Wait>,
    /// In the client's socket and in the server's.
    to_client: Vec<u8>,
    to_server: Vec<u8>,
    /// Size of these sockets in bytes.
    socket: usize,
    /// The engine has received the end of the stream.
    has_eof: bool,
}

/// What the schedules reached.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Coverage {
    pub(super) answered: u64,
    pub(super) suspended: u64,
    pub(super) closed: u64,
    pub(super) lost: u64,
    pub(super) ended: u64,
    pub(super) throttled: u64,
    pub(super) deepest: usize,
    pub(super) most_bytes: usize,
}

#[derive(Debug)]
pub(super) struct World<'a> {
    rng: fastrand::Rng,
    disk: &'a Disk,
    image: ScriptedDisk,
    model: Model,
    sessions: Vec<ScriptedSession<'a>>,
    next_session: u64,
    next_stamp: Stamp,
    requests_left: u32,
    depth_max: usize,
    /// The disk completes few operations.
    is_slow: bool,
    dirty: Arc<DirtyBitmap>,
    /// What the migration has copied.
    copy: Vec<Stamp>,
    may_fail: bool,
    pub(super) coverage: Coverage,
}

/// Runs one schedule.
pub(super) fn run(seed: u64) -> Result<Coverage, String> {
    let mut rng = fastrand::Rng::with_seed(seed);
    let is_large = seed.is_multiple_of(LARGE_EVERY);
    let count = match rng.u8(..4) {
        _ if !is_large => 128,
        0 => 5000,
        _ => 1200,
    };
    let initial: Vec<Stamp> =
        (0..count).map(|cell| if rng.u8(..3) == 0 { 0 } else { 1 + cell }).collect();
    let image = ScriptedDisk::new(&initial, &mut rng);
    let disk = Disk::new(Box::new(image.clone()), false);
    disk.forbid_threads();
    ELAPSED.set(Duration::from_secs(1));
    let is_deep = is_large && rng.bool();
    let may_fail = image.state().fault_interval > 0;
    let mut world = World {
        may_fail,
        disk: &disk,
        image,
        model: Model::new(initial.clone()),
        sessions: Vec::new(),
        next_session: 1,
        next_stamp: count + 1,
        requests_left: if is_deep { 300 } else { rng.u32(1..40) },
        depth_max: if is_deep { 200 } else { rng.usize(1..16) },
        is_slow: is_deep,
        dirty: disk.track().unwrap(),
        copy: initial,
        coverage: Coverage::default(),
        rng,
    };
    world.run()?;
    Ok(world.coverage)
}

impl<'a> World<'a> {
    fn run(&mut self) -> Result<(), String> {
        let count = if self.is_slow { 1 } else { self.rng.usize(1..4) };
        for _ in 0..count {
            let session = self.connect();
            self.sessions.push(session);
        }
        while self.requests_left > 0 {
            self.step()?;
            self.check()?;
        }
        self.settle()?;
        self.check_end()
    }

    /// A random event.
    fn step(&mut self) -> Result<(), String> {
        let at = self.rng.usize(..self.sessions.len());
        match self.rng.u8(..64) {
            0..10 => {
                self.request(at);
            }
            10..18 => {
                self.client_sends(at);
            }
            18..24 => {
                self.client_receives(at)?;
            }
            24..44 => {
                self.turn_if_ready(at)?;
            }
            44..54 if self.is_slow && self.rng.u8(..16) > 0 => {}
            44..54 => {
                self.image.state().step();
            }
            54 => self.image.state().reclaim(),
            55 => self.copy_dirty(),
            56 => self.move_gate(),
            57 => {
                let millis = [0, 0, 1, 5, 30][self.rng.usize(..5)];
                self.disk.set_write_delay(Duration::from_millis(millis));
            }
            58 | 59 => {
                let millis = [0, 1, 5, 30][self.rng.usize(..4)];
                ELAPSED.set(ELAPSED.get() + Duration::from_millis(millis));
            }
            60.. if self.is_slow && self.rng.u8(..16) > 0 => {}
            60 | 61 => {
                let session = &mut self.sessions[at];
                if session.stop == StopRequest::Serve && session.engine.is_some() {
                    session.stop = StopRequest::Suspend;
                    session.notifier.notify();
                }
            }
            62 if self.rng.u8(..4) == 0 => self.lose(at),
            62 => {}
            _ if self.rng.u8(..4) == 0 => self.close(at),
            _ => {}
        }
        Ok(())
    }

    /// Everything goes on until nothing is left to do; then every request must be answered.
    fn settle(&mut self) -> Result<(), String> {
        if std::mem::take(&mut self.image.state().is_frozen) {
            self.disk.gate().reopen();
        }
        self.disk.set_write_delay(Duration::ZERO);
        let mut idle = 0;
        while idle < 2 {
            let mut moved = false;
            for at in 0..self.sessions.len() {
                moved |= self.client_sends(at);
                moved |= self.turn_if_ready(at)?;
                moved |= self.client_receives(at)?;
                self.check()?;
            }
            moved |= self.image.state().step();
            idle = if moved { 0 } else { idle + 1 };
            // Delays and checks end.
            ELAPSED.set(ELAPSED.get() + Duration::from_millis(if moved { 1 } else { 100 }));
        }
        match self.sessions.iter().find(|session| session.client.depth() > 0) {
            Some(ScriptedSession { client, wait, .. }) => {
                Err(format!("not answered: {wait:?}, {}", client.describe()))
            }
            None => Ok(()),
        }
    }

    fn check(&mut self) -> Result<(), String> {
        self.image.state().broken.take().map_or(Ok(()), Err)
    }

    /// The copy and the durable bytes, once all sessions have ended.
    fn check_end(&mut self) -> Result<(), String> {
        for at in 0..self.sessions.len() {
            self.sessions[at].engine = None;
            self.sessions[at].client.abandon(&mut self.model);
        }
        self.check()?;
        while self.dirty.count() > 0 {
            self.copy_dirty();
        }
        let state = self.image.state();
        let differs = (0..self.copy.len()).find(|cell| self.copy[*cell] != state.volatile[*cell]);
        self.coverage.deepest = state.peak.0;
        self.coverage.most_bytes = state.peak.1;
        match (differs, self.model.find_lost(&state.durable)) {
            (Some(cell), _) => Err(format!("the change of cell {cell} was not marked dirty")),
            (_, Some(cell)) => Err(format!("cell {cell} is not durable")),
            (None, None) => Ok(()),
        }
    }

    fn connect(&mut self) -> ScriptedSession<'a> {
        let dialect = [Dialect::Simple, Dialect::Structured, Dialect::Extended];
        let dialect = dialect[self.rng.usize(..3)];
        let id = self.next_session;
        self.next_session += 1;
        let notifier = Arc::new(TestNotifier::default());
        let start = (Rx::default(), Tx::default(), PendingRequests::default());
        ScriptedSession {
            engine: Some(engine_of(self.disk, id, dialect, &notifier, start)),
            notifier,
            client: ScriptedClient::new(id, dialect, self.may_fail),
            stop: StopRequest::Serve,
            wait: None,
            to_client: Vec::new(),
            to_server: Vec::new(),
            socket: if self.is_slow {
                4 << 20
            } else {
                [700, 8 << 10, 1 << 20][self.rng.usize(..3)]
            },
            has_eof: false,
        }
    }

    fn request(&mut self, at: usize) {
        let client = &mut self.sessions[at].client;
        if !client.is_closing && client.depth() < self.depth_max {
            client.request(&mut self.rng, &mut self.model, self.next_stamp);
            self.next_stamp += 1;
        }
        self.requests_left = self.requests_left.saturating_sub(1);
    }

    fn fragment(&mut self, available: usize) -> usize {
        if self.rng.bool() { available } else { available.min(self.rng.usize(1..600)) }
    }

    fn client_sends(&mut self, at: usize) -> bool {
        let session = &self.sessions[at];
        let room = session.socket.saturating_sub(session.to_server.len());
        let count = self.fragment(room.min(session.client.outgoing.len()));
        let session = &mut self.sessions[at];
        session.to_server.extend(session.client.outgoing.drain(..count));
        count > 0
    }

    fn client_receives(&mut self, at: usize) -> Result<bool, String> {
        let count = self.fragment(self.sessions[at].to_client.len());
        let session = &mut self.sessions[at];
        let bytes: Vec<u8> = session.to_client.drain(..count).collect();
        session.client.receive(&bytes, &mut self.model)?;
        self.coverage.answered += std::mem::take(&mut session.client.answered);
        if session.engine.is_none() && session.to_client.is_empty() {
            if session.client.depth() > 0 && !self.may_fail {
                return Err(format!("ended without replies: {}", session.client.describe()));
            }
            self.replace(at);
        }
        Ok(count > 0)
    }

    /// Another client connects.
    fn replace(&mut self, at: usize) {
        self.sessions[at].engine = None;
        self.sessions[at].client.abandon(&mut self.model);
        self.sessions[at] = self.connect();
    }

    /// The connection of a client is lost.
    fn lose(&mut self, at: usize) {
        self.coverage.lost += 1;
        self.replace(at);
    }

    /// A client disconnects, or closes its side after the last request.
    fn close(&mut self, at: usize) {
        let client = &mut self.sessions[at].client;
        if self.rng.bool() && !client.is_closing {
            client.disconnect();
        }
        client.is_closing = true;
    }

    /// Closes the gate, if no visit is inside, or opens it.
    fn move_gate(&mut self) {
        let (past, gate) = (began(), self.disk.gate());
        let was_frozen = std::mem::take(&mut self.image.state().is_frozen);
        if !was_frozen {
            let is_closed = gate.close_and_drain(past).is_ok();
            self.image.state().is_frozen = is_closed;
            self.coverage.closed += u64::from(is_closed);
            return;
        }
        if self.rng.bool() {
            // A session opens it; then the closer finds out.
            let _ = gate.expire_at(Some(past));
            let opens = self.rng.usize(..self.sessions.len());
            let notifier: Arc<dyn Notifier> = Arc::clone(&self.sessions[opens].notifier) as _;
            let _ = gate.notify_when_open(&notifier);
        }
        gate.reopen();
    }

    /// The copier takes a dirty mark, and copies the bytes.
    fn copy_dirty(&mut self) {
        if let Some(run) = self.dirty.take_next(0, u64::MAX) {
            let state = self.image.state();
            let cells = (run.offset() / CELL) as usize..(run.end() / CELL) as usize;
            self.copy[cells.clone()].copy_from_slice(&state.volatile[cells]);
        }
    }

    fn turn_if_ready(&mut self, at: usize) -> Result<bool, String> {
        let session = &self.sessions[at];
        if session.engine.is_none() || !session.is_ready() {
            return Ok(false);
        }
        if let Err(end) = self.turn(at)? {
            self.on_end(at, end)?;
        }
        Ok(true)
    }

    fn on_end(&mut self, at: usize, end: SessionEnd) -> Result<(), String> {
        self.coverage.ended += 1;
        let session = &mut self.sessions[at];
        session.engine = None;
        match end {
            SessionEnd::Disconnected | SessionEnd::Closed if session.client.is_closing => Ok(()),
            SessionEnd::ReplyIncomplete(_) if self.may_fail => Ok(()),
            end => Err(format!("the session ends: {end:?}")),
        }
    }

    /// One turn of a session, as `driver/transmission_turns` does it.
    fn turn(&mut self, at: usize) -> Result<Result<(), SessionEnd>, String> {
        let fragment = self.fragment(usize::MAX);
        let session = &mut self.sessions[at];
        session.wait = None;
        session.notifier.take();
        let Some(engine) = &mut session.engine else { return Ok(Ok(())) };
        let blocked = match engine.advance(session.stop) {
            Ok(blocked) => blocked,
            Err(end) => return Ok(Err(end)),
        };
        engine.take_has_completed();
        let room = session.socket.saturating_sub(session.to_client.len());
        session.to_client.extend(engine.tx.take(room));
        let sent_all = !engine.tx.has_bytes();
        match blocked {
            Blocked::Batch | Blocked::PeerCheck => return Ok(Ok(())),
            Blocked::Output | Blocked::InputWithReads if sent_all => return Ok(Ok(())),
            Blocked::Suspend if engine.is_quiet() || is_active(Mutation::SuspendBusy) => {
                self.coverage.suspended += 1;
                session.suspend(self.disk)?;
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
            Blocked::Record | Blocked::Handover(..) => {
                return Err(format!("blocked by {blocked:?}"));
            }
            Blocked::Input | Blocked::InputWithReads if session.receives(fragment) => {
                return Ok(Ok(()));
            }
            Blocked::Throttle(_) => self.coverage.throttled += 1,
            _ => {}
        }
        session.begin_wait(&blocked);
        Ok(Ok(()))
    }
}

impl<'a> ScriptedSession<'a> {
    /// Receives bytes or the end of the stream; false if neither has arrived.
    fn receives(&mut self, most: usize) -> bool {
        let Some(engine) = &mut self.engine else { return false };
        if !self.to_server.is_empty() && !engine.rx.is_full() {
            let count = engine.rx.fill(&self.to_server[..most.min(self.to_server.len())]);
            self.to_server.drain(..count);
            engine.on_received();
            return true;
        }
        let is_at_end = self.is_at_end();
        if let Some(engine) = &mut self.engine
            && is_at_end
        {
            engine.on_end_of_stream();
            self.has_eof = true;
        }
        is_at_end
    }

    fn is_at_end(&self) -> bool {
        let is_sent = self.to_server.is_empty() && self.client.outgoing.is_empty();
        self.client.is_closing && is_sent && !self.has_eof
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
        let has_room = self.to_client.len() < self.socket;
        (*readable && (!self.to_server.is_empty() || self.is_at_end()))
            || (*writable && has_room)
            || deadline.is_some_and(|at| at <= now())
            || self.notifier.count() > 0
    }

    /// Saves the session, and restores it as the next process does.
    fn suspend(&mut self, disk: &'a Disk) -> Result<(), String> {
        let Some(engine) = self.engine.take() else { return Ok(()) };
        let snapshot = engine.save().map_err(|error| format!("the session is lost: {error}"))?;
        let SessionSnapshot { session, inbox, outbox, phase } = pass_on(&snapshot);
        let PhaseSnapshot::Transmission(saved) = phase else { return Err("a handshake".into()) };
        let start = (|| {
            let pending = PendingRequests::restore(saved.pending, disk.size())?;
            Some((Rx::restore(&inbox)?, Tx::restore(outbox, disk.size())?, pending))
        })();
        let start = start.ok_or("the session is not restorable")?;
        self.engine = Some(engine_of(disk, session, self.client.dialect(), &self.notifier, start));
        (self.stop, self.has_eof) = (StopRequest::Serve, false);
        Ok(())
    }
}

/// The bytes of a snapshot, decoded.
fn pass_on(snapshot: &SessionSnapshot) -> SessionSnapshot {
    rmp_serde::from_slice(&rmp_serde::to_vec_named(snapshot).unwrap()).unwrap()
}

fn engine_of<'a>(
    disk: &'a Disk,
    id: u64,
    dialect: Dialect,
    notifier: &Arc<TestNotifier>,
    (rx, tx, pending): (Rx, Tx, PendingRequests),
) -> Engine<'a> {
    let terms = Terms {
        size: disk.size(),
        read_only: false,
        dialect,
        allocation_selected: dialect != Dialect::Simple,
        private: false,
        payload_length_max: 32 << 20,
        reads_beyond_end_are_no_space: false,
    };
    let context = EngineContext {
        disk,
        policy: &AllowAll,
        notifier: Arc::clone(notifier) as Arc<dyn Notifier>,
        terms,
        answers_malformed: false,
        client: (String::new(), id),
        clocks: Clocks { now, coarse: || ELAPSED.get() },
    };
    Engine::new(context, rx, tx, pending)
}
