//! The world of one schedule: sessions on one disk, the gate, a migration's copier, and the clock.

use super::client::Script;
use super::coverage::{Coverage, Reached};
use super::disk::ScriptedDisk;
use super::model::{Model, Stamp, cell_size, set_cell_size};
use super::policy::ScriptedPolicy;
use super::request::Mix;
use super::session::{ScriptedServer, ScriptedSession, advance_clock, began, reset_clock};
use super::theme::Theme;
use crate::disk::dirty::DirtyBitmap;
use crate::disk::{Disk, Notifier};
use crate::nbd::reply::Dialect;
use crate::nbd::request::Terms;
use crate::nbd::wire::TransmissionFlags;
use crate::schedules::ByteQueue;
use crate::server::payload_memory::PayloadMemory;
use crate::server::session::engine::Engine;
use crate::server::stop_request::StopRequest;
use std::sync::Arc;
use std::time::Duration;

/// Rounds within which a schedule settles.
const ROUNDS_MAX: u32 = 100_000;

/// How fast a schedule's requests are executed and answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pace {
    Usual,
    /// The disk completes few operations, so that many are in flight.
    SlowDisk,
    /// The client receives little, so that many replies wait.
    SlowClient,
}

/// The state of the gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum GateState {
    Open,
    /// Visits are inside.
    Closing,
    Closed,
    Retired,
}

#[derive(Debug)]
pub(super) struct World<'a> {
    rng: fastrand::Rng,
    server: ScriptedServer<'a>,
    model: Model,
    sessions: Vec<ScriptedSession<'a>>,
    /// Engines of sessions that have ended, with operations in flight.
    outliving: Vec<Engine<'a>>,
    next_session: u64,
    stamp: Stamp,
    requests_left: u32,
    depth_max: usize,
    mix: Mix,
    pace: Pace,
    gate: GateState,
    /// The gate may be retired.
    may_retire: bool,
    theme: Theme,
    is_oldstyle: bool,
    dirty: Arc<DirtyBitmap>,
    /// What the migration has copied.
    copy: Vec<Stamp>,
    may_fail: bool,
    coverage: Coverage,
}

/// Runs one schedule.
pub(super) fn run(seed: u64) -> Result<Coverage, String> {
    let (theme, mut rng) = (Theme::of(seed), fastrand::Rng::with_seed(seed));
    let count = match theme {
        Theme::Zeroing => 1024,
        Theme::Large => [1200, 1200, 5000][rng.usize(..3)],
        _ => 128,
    };
    let mix = match theme {
        Theme::Zeroing => Mix::Zeroing,
        Theme::Flushes | Theme::Losses => Mix::Durable,
        _ if rng.u8(..8) == 0 => Mix::Durable,
        _ => Mix::Usual,
    };
    set_cell_size(if mix == Mix::Zeroing { 16 << 10 } else { 512 });
    reset_clock();
    let initial: Vec<Stamp> =
        (0..count).map(|cell| if rng.u8(..3) == 0 { 0 } else { 1 + cell }).collect();
    let image = ScriptedDisk::new(&initial, theme, &mut rng);
    let policy = ScriptedPolicy::new(image.clone(), &mut rng);
    let disk = Disk::new(Box::new(image.clone()), rng.u8(..10) == 0);
    disk.forbid_threads();
    let pace = match rng.u8(..4) {
        0 if theme == Theme::Large => Pace::SlowDisk,
        1 if theme == Theme::Large => Pace::SlowClient,
        _ => Pace::Usual,
    };
    let is_deep = pace != Pace::Usual;
    if pace == Pace::SlowDisk {
        image.state().is_cached = false;
    }
    let may_fail = image.state().may_fail();
    // Sometimes no session has more than its own memory.
    let payloads = PayloadMemory::new(if seed % 8 == 3 { 0 } else { u64::MAX });
    let mut world = World {
        may_fail,
        server: ScriptedServer { disk: &disk, image: &image, policy: &policy, payloads: &payloads },
        model: Model::new(initial.clone()),
        sessions: Vec::new(),
        outliving: Vec::new(),
        next_session: 1,
        stamp: count + 1,
        requests_left: if is_deep { 300 } else { rng.u32(1..40) },
        depth_max: if is_deep { 200 } else { rng.usize(1..16) },
        mix,
        pace,
        gate: GateState::Open,
        may_retire: theme == Theme::Retired || rng.u8(..32) == 0,
        theme,
        is_oldstyle: rng.u8(..6) == 0,
        dirty: disk.track().unwrap(),
        copy: initial,
        coverage: Coverage::default(),
        rng,
    };
    world.run()?;
    Ok(world.coverage)
}

/// The transmission flags of an export: all features, or some.
fn offers(read_only: bool, rng: &mut fastrand::Rng) -> TransmissionFlags {
    let mut flags = TransmissionFlags::all();
    if rng.u8(..6) == 0 {
        flags &= TransmissionFlags::from_bits_retain(rng.u16(..));
    }
    flags.set(TransmissionFlags::READ_ONLY, read_only);
    flags
}

impl<'a> World<'a> {
    fn run(&mut self) -> Result<(), String> {
        let count = if self.pace == Pace::Usual { self.rng.usize(1..4) } else { 1 };
        for _ in 0..count {
            let session = self.connect();
            self.sessions.push(session);
        }
        while self.requests_left > 0 {
            self.step()?;
            self.check()?;
        }
        self.drain()?;
        self.settle()?;
        self.check_end()
    }

    /// A random event.
    fn step(&mut self) -> Result<(), String> {
        let at = self.rng.usize(..self.sessions.len());
        let is_slow = self.pace != Pace::Usual && self.rng.u8(..16) > 0;
        match self.rng.u8(..70) {
            0..10 => self.request(at),
            10..18 => {
                self.client_sends(at);
            }
            18..24 if is_slow && self.pace == Pace::SlowClient => {}
            18..24 => {
                self.client_receives(at)?;
            }
            24..44 => {
                self.turn(at)?;
            }
            44..54 if is_slow && self.pace == Pace::SlowDisk => {}
            44..54 => {
                self.server.image.state().step();
            }
            56.. if is_slow => {}
            54 => self.server.image.state().reclaim(),
            55 => self.copy_dirty(),
            56 | 57 => self.move_gate()?,
            58 => {
                let millis = [0, 0, 1, 5, 30][self.rng.usize(..5)];
                self.server.disk.set_write_delay(Duration::from_millis(millis));
            }
            59 | 60 => {
                let millis = [0, 1, 5, 30, 150][self.rng.usize(..5)];
                advance_clock(Duration::from_millis(millis));
            }
            61..64 => {
                self.sessions[at].end_call(self.server, &mut self.coverage)?;
                self.bury(at);
                self.end_outliving();
            }
            64 | 65 => self.sessions[at].request_stop(StopRequest::Suspend),
            66 if self.rng.u8(..3) == 0 => self.stop(at),
            67 if self.theme == Theme::Losses || self.rng.u8(..4) == 0 => self.lose(at),
            68 if self.rng.u8(..4) == 0 => self.end(at),
            _ => {}
        }
        if self.theme == Theme::Restarts && self.rng.u8(..3) == 0 {
            self.sessions[at].request_stop(StopRequest::Suspend);
        }
        self.observe_retired_gate();
        Ok(())
    }

    /// Everything goes on; false if there is nothing left to do.
    fn advance_all(&mut self, with_clients: bool) -> Result<bool, String> {
        let mut has_moved = false;
        for at in 0..self.sessions.len() {
            has_moved |= with_clients && self.client_sends(at);
            has_moved |= self.turn(at)?;
            has_moved |= self.sessions[at].end_call(self.server, &mut self.coverage)?;
            self.bury(at);
            has_moved |= with_clients && self.client_receives(at)?;
            self.check()?;
        }
        has_moved |= self.server.image.state().step();
        has_moved |= self.end_outliving();
        // Delays and checks end.
        advance_clock(Duration::from_millis(if has_moved { 1 } else { 100 }));
        Ok(has_moved)
    }

    /// A gate that is closing must drain although no client does anything.
    fn drain(&mut self) -> Result<(), String> {
        let (mut idle, mut rounds) = (0, 0);
        let gate = self.server.disk.gate();
        let is_draining = self.gate != GateState::Open;
        while is_draining && gate.is_occupied() && idle < 3 && rounds < ROUNDS_MAX {
            idle = if self.advance_all(false)? { 0 } else { idle + 1 };
            rounds += 1;
        }
        self.observe_retired_gate();
        // An abandoned operation stays inside.
        if is_draining && gate.is_occupied() && self.server.image.state().abandoned == 0 {
            return Err("closing the gate does not end".into());
        }
        Ok(())
    }

    /// Everything goes on until nothing is left to do; then every request must be answered.
    fn settle(&mut self) -> Result<(), String> {
        if matches!(self.gate, GateState::Closing | GateState::Closed) {
            self.open_gate();
        }
        self.server.disk.set_write_delay(Duration::ZERO);
        let (mut idle, mut rounds) = (0, 0);
        while idle < 2 && rounds < ROUNDS_MAX {
            idle = if self.advance_all(true)? { 0 } else { idle + 1 };
            rounds += 1;
        }
        if rounds == ROUNDS_MAX {
            return Err("sessions are busy for ever".into());
        }
        // Changes that overlap an abandoned one wait for ever.
        let is_abandoned = self.server.image.state().abandoned > 0;
        let waits = |session: &&ScriptedSession<'_>| {
            session.engine.is_some() && session.client.depth() > 0 && !is_abandoned
        };
        match self.sessions.iter().find(waits) {
            Some(session) => Err(format!("not answered: {}", session.describe())),
            None => Ok(()),
        }
    }

    fn check(&mut self) -> Result<(), String> {
        self.server.image.state().broken.take().map_or(Ok(()), Err)
    }

    /// The copy and the durable bytes, once all sessions have ended.
    fn check_end(&mut self) -> Result<(), String> {
        for at in 0..self.sessions.len() {
            self.sessions[at].leaving = self.sessions[at].engine.take();
            self.bury(at);
            self.sessions[at].client.abandon(&mut self.model);
        }
        self.outliving.clear();
        self.observe_abandoned();
        self.check()?;
        while self.dirty.count() > 0 {
            self.copy_dirty();
        }
        let state = self.server.image.state();
        self.coverage.peak = state.peak;
        self.coverage.add_count(Reached::Abandoned, state.abandoned);
        // With abandoned operations the gate never closes, so that no migration ends.
        let cells = if state.abandoned > 0 { 0 } else { self.copy.len() };
        let differs = (0..cells).find(|cell| self.copy[*cell] != state.volatile[*cell]);
        if let Some(cell) = differs {
            return Err(format!("the change of cell {cell} was not marked dirty"));
        }
        if let Some(cell) = self.model.find_wrong(&state.volatile) {
            return Err(format!("cell {cell} holds {}", state.volatile[cell]));
        }
        let lost = self.model.find_lost(&state.durable);
        lost.map_or(Ok(()), |cell| Err(format!("cell {cell} is not durable")))
    }

    fn connect(&mut self) -> ScriptedSession<'a> {
        let rng = &mut self.rng;
        let dialect = match rng.u8(..3) {
            _ if self.is_oldstyle => Dialect::Simple,
            0 => Dialect::Simple,
            1 => Dialect::Structured,
            _ => Dialect::Extended,
        };
        // A short limit, so that schedules exceed it.
        let short = 32 * cell_size() as u32;
        let terms = Terms {
            size: self.server.disk.size(),
            flags: offers(self.server.disk.read_only(), rng),
            dialect,
            allocation_selected: dialect != Dialect::Simple && rng.u8(..8) > 0,
            private: !self.is_oldstyle && rng.u8(..3) == 0,
            payload_length_max: if rng.u8(..8) == 0 { short } else { 32 << 20 },
            reads_beyond_end_are_no_space: self.is_oldstyle,
        };
        let socket = match self.pace {
            Pace::Usual => [700, 8 << 10, 1 << 20][rng.usize(..3)],
            Pace::SlowDisk => 4 << 20,
            Pace::SlowClient => 64 << 10,
        };
        self.next_session += 1;
        ScriptedSession::new(self.server, self.next_session, terms, (socket, self.may_fail))
    }

    fn request(&mut self, at: usize) {
        self.requests_left = self.requests_left.saturating_sub(1);
        let session = &mut self.sessions[at];
        let is_over = session.engine.is_none() || session.client.ending.is_some();
        if is_over || session.client.depth() >= self.depth_max {
            return;
        }
        session.client.request(&mut Script {
            rng: &mut self.rng,
            model: &mut self.model,
            policy: self.server.policy,
            mix: self.mix,
            stamp: &mut self.stamp,
        });
    }

    /// A client sends its last bytes.
    fn end(&mut self, at: usize) {
        let session = &mut self.sessions[at];
        if session.engine.is_none() {
            return;
        }
        session.client.end(&mut Script {
            rng: &mut self.rng,
            model: &mut self.model,
            policy: self.server.policy,
            mix: self.mix,
            stamp: &mut self.stamp,
        });
    }

    fn fragment(&mut self, available: usize) -> usize {
        if self.rng.bool() { available } else { available.min(self.rng.usize(1..600)) }
    }

    fn client_sends(&mut self, at: usize) -> bool {
        let session = &self.sessions[at];
        let room = session.socket.saturating_sub(session.to_server.len());
        let count = self.fragment(room.min(session.client.outgoing.len()));
        let session = &mut self.sessions[at];
        session.client.outgoing.pass(count, &mut session.to_server);
        count > 0
    }

    fn client_receives(&mut self, at: usize) -> Result<bool, String> {
        let count = self.fragment(self.sessions[at].to_client.len());
        let session = &mut self.sessions[at];
        session.to_client.pass(count, &mut session.client.incoming);
        session.client.receive(&mut self.model, self.server.policy)?;
        let client = &mut session.client;
        self.coverage.add_count(Reached::Answered, std::mem::take(&mut client.answered));
        self.coverage.add_count(Reached::Refused, std::mem::take(&mut client.refused));
        self.coverage.add_count(Reached::Invalid, std::mem::take(&mut client.invalid));
        if session.engine.is_none() && session.to_client.len() == 0 {
            if session.client.depth() > 0 && !session.may_lack_replies {
                return Err(format!("ended without replies: {}", session.client.describe()));
            }
            self.replace(at);
        }
        Ok(count > 0)
    }

    /// Another client connects, unless the disk is gone.
    fn replace(&mut self, at: usize) {
        let session = &mut self.sessions[at];
        session.client.abandon(&mut self.model);
        session.leaving = session.engine.take().or(session.leaving.take());
        self.bury(at);
        if self.gate == GateState::Retired {
            self.sessions[at].to_client = ByteQueue::default();
        } else {
            self.sessions[at] = self.connect();
        }
    }

    /// The connection of a client is lost.
    fn lose(&mut self, at: usize) {
        self.coverage.count(Reached::Lost);
        self.replace(at);
    }

    /// The server requests the end of a session.
    fn stop(&mut self, at: usize) {
        use StopRequest::{Disconnect, Displaced, Evict, Finish, NotAdmitted};
        let request = [Finish, Finish, NotAdmitted, Evict, Disconnect, Displaced];
        let request = request[self.rng.usize(..request.len())];
        self.sessions[at].request_stop(request);
        self.coverage.count(Reached::Requested);
    }

    fn turn(&mut self, at: usize) -> Result<bool, String> {
        let fragment = self.fragment(usize::MAX);
        let has_moved = self.sessions[at].turn(self.server, fragment, &mut self.coverage)?;
        self.bury(at);
        Ok(has_moved)
    }

    /// Drops the engine of a session that has ended, now or later.
    fn bury(&mut self, at: usize) {
        let Some(mut engine) = self.sessions[at].leaving.take() else { return };
        let may_outlive = self.theme != Theme::Losses && self.rng.u8(..4) > 0;
        if may_outlive && !engine.in_flight().close_without_waiting() {
            self.coverage.count(Reached::Outlived);
            self.outliving.push(engine);
            return;
        }
        drop(engine);
        self.observe_abandoned();
    }

    /// Handles completions of sessions that have ended; false if there is none.
    fn end_outliving(&mut self) -> bool {
        let before = self.outliving.len();
        self.outliving.retain_mut(|engine| !engine.in_flight().close_without_waiting());
        self.outliving.len() < before
    }

    /// A lost flush counts as failed.
    fn observe_abandoned(&mut self) {
        if std::mem::take(&mut self.server.image.state().is_flush_lost) {
            self.model.on_flush_failed();
        }
    }

    /// Closes the gate in steps, opens it, or retires it.
    fn move_gate(&mut self) -> Result<(), String> {
        let gate = self.server.disk.gate();
        match self.gate {
            GateState::Retired => {}
            _ if self.may_retire && self.rng.u8(..4) == 0 => {
                self.coverage.count(Reached::Retired);
                self.gate = GateState::Retired;
                if self.rng.bool() {
                    self.fall_silent();
                }
                gate.retire();
                self.server.image.state().is_closing = true;
            }
            GateState::Open => {
                self.gate = GateState::Closing;
                gate.begin_to_close();
                self.server.image.state().is_closing = true;
            }
            GateState::Closing if gate.is_occupied() && self.rng.u8(..4) > 0 => {}
            GateState::Closing if gate.is_occupied() => self.open_gate(),
            GateState::Closing => {
                self.gate = GateState::Closed;
                self.coverage.count(Reached::Closed);
                let mut state = self.server.image.state();
                state.is_frozen = true;
                if state.abandoned > 0 {
                    return Err("the gate is drained with operations in flight".into());
                }
            }
            GateState::Closed => {
                if self.rng.bool() {
                    // A session opens it; then the closer finds out.
                    self.server.image.state().is_frozen = false;
                    let _ = gate.expire_at(Some(began()));
                    let opens = self.rng.usize(..self.sessions.len());
                    let notifier = Arc::clone(&self.sessions[opens].notifier);
                    let _ = gate.notify_when_open(&(notifier as Arc<dyn Notifier>));
                }
                self.open_gate();
            }
        }
        Ok(())
    }

    /// The clients send nothing more, so that nothing but the end of the disk can end the sessions.
    fn fall_silent(&mut self) {
        self.requests_left = 0;
        let is_serving = |session: &&mut ScriptedSession<'_>| session.client.ending.is_none();
        for session in self.sessions.iter_mut().filter(is_serving) {
            session.client.outgoing = ByteQueue::default();
            let received = session.received + session.to_server.len() as u64;
            session.client.forget_unreceived(received);
        }
    }

    fn open_gate(&mut self) {
        self.gate = GateState::Open;
        let mut state = self.server.image.state();
        (state.is_frozen, state.is_closing) = (false, false);
        drop(state);
        self.server.disk.gate().reopen();
    }

    /// Once all visits have left a retired gate, another host may have the disk.
    fn observe_retired_gate(&mut self) {
        let is_retired = self.gate == GateState::Retired;
        if is_retired && !self.server.disk.gate().is_occupied() {
            self.server.image.state().is_frozen = true;
        }
    }

    /// The copier takes a dirty mark, and copies the bytes.
    fn copy_dirty(&mut self) {
        if let Some(run) = self.dirty.take_next(0, u64::MAX) {
            let state = self.server.image.state();
            let cells =
                (run.offset() / cell_size()) as usize..(run.end().div_ceil(cell_size())) as usize;
            self.copy[cells.clone()].copy_from_slice(&state.volatile[cells]);
        }
    }
}
