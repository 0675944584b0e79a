//! The threads and sockets of an upstream: connects, sends, receives, and connects again, for ever.
//! Decides nothing about requests: the machine does.
//!
//! The thread `upstream` connects, and then receives from the first connection; each further connection has
//! a thread of its own. Sessions send on their own threads, under the lock of [`LinkCore`], as long as
//! the socket takes it; the thread of the connection sends the rest.

mod core;

use self::core::{LinkConnection, LinkCore, QueueState};
use super::attempts::{Attempts, AttemptsEvent};
use super::connecting::{Connected, connect_to};
use super::connection::UpstreamConnection;
use super::machine::UpstreamMachine;
use super::options::{UpstreamEvents, UpstreamOptions, UpstreamState, UpstreamTarget};
use super::read_ahead::ReadAhead;
use super::rotation::{DELAY_MAX, NextAttempt, Rotation};
use super::terms::ServerTerms;
use super::tx::UpstreamTx;
use crate::disk::{Buffer, Completion, Op, OpId};
use crate::ids::DiskId;
use crate::message_id;
use crate::net::Interest;
use crate::sync::{lock, wait};
use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::Instant;
use tracing::{info, warn};

/// A silent server is looked at this often within its timeout.
const TICKS: u32 = 8;
/// After this many silent ticks, a probe is sent.
const PROBE_TICKS: u32 = 4;

/// An upstream: what its backend, its queues, its threads and its owner share.
#[derive(Debug)]
pub(super) struct UpstreamLink {
    state: Mutex<LinkCore>,
    /// Notified when a completion of a queue with a waiter has arrived, and when the connection is lost
    /// or closed.
    changed: Condvar,
    /// Of the first server.
    terms: ServerTerms,
    targets: Vec<UpstreamTarget>,
    options: UpstreamOptions,
    events: Arc<dyn UpstreamEvents>,
    /// The start of the time of [`Rotation`].
    clock: Instant,
}

/// The owner's view of an upstream.
#[derive(Clone, Debug)]
pub struct UpstreamHandle(pub(super) Arc<UpstreamLink>);

impl UpstreamHandle {
    /// Whether the disk refuses changes.
    #[must_use]
    pub fn read_only(&self) -> bool {
        self.0.terms.is_read_only()
    }

    /// The state of the connection.
    #[must_use]
    pub fn state(&self) -> UpstreamState {
        let state = lock(&self.0.state);
        UpstreamState {
            target: self.0.targets[state.target].to_string(),
            disk_id: state.machine.disk_id(),
            connected: state.machine.is_connected(),
            since: state.since.elapsed(),
            last_error: state.last_error.clone(),
            unflushed_bytes: state.machine.unflushed_memory(),
            reconnects: state.reconnects,
        }
    }

    /// The id of the disk, if a server has told it.
    #[must_use]
    pub fn disk_id(&self) -> Option<DiskId> {
        self.0.disk_id()
    }

    /// Disconnects. Operations that have not completed fail with `ESHUTDOWN`, and so do later ones.
    pub fn close(&self) {
        let mut state = lock(&self.0.state);
        state.is_closed = true;
        if let Some(attempts) = &state.attempts {
            attempts.cancel();
        }
        state.machine.close();
        state.lose("it is closed".to_owned());
        self.0.finish(state);
    }
}

impl UpstreamLink {
    /// Starts the threads for a connection that is established.
    pub(super) fn start(
        targets: Vec<UpstreamTarget>,
        options: UpstreamOptions,
        events: Arc<dyn UpstreamEvents>,
        (target, first): (usize, Connected),
    ) -> io::Result<Arc<Self>> {
        let machine = UpstreamMachine::new(first.terms, options.unflushed_bytes_max);
        let state = LinkCore {
            machine,
            read_ahead: options.read_ahead.map(|bytes| ReadAhead::new(first.terms.size, bytes)),
            connections: Vec::new(),
            queues: HashMap::new(),
            next_queue: 0,
            waiters: 0,
            loss: None,
            is_closed: false,
            attempts: None,
            target,
            since: Instant::now(),
            last_error: None,
            reconnects: 0,
        };
        let link = Arc::new(Self {
            state: Mutex::new(state),
            changed: Condvar::new(),
            terms: first.terms,
            targets,
            options,
            events,
            clock: Instant::now(),
        });
        // Before the first operation: without a connection, those of an ended session are cancelled.
        let replies = link.begin(target, &first).unwrap_or_default();
        let for_thread = Arc::clone(&link);
        thread::Builder::new()
            .name("upstream".into())
            .spawn(move || for_thread.run(target, first, replies))?;
        Ok(link)
    }

    /// The id of the disk, if a server has told it.
    pub(super) fn disk_id(&self) -> Option<DiskId> {
        lock(&self.state).machine.disk_id()
    }

    /// The terms of the first server.
    pub(super) fn terms(&self) -> &ServerTerms {
        &self.terms
    }

    /// Registers a queue: its id, and its flag that tells of completions.
    pub(super) fn open_queue(&self, notifier: Option<OwnedFd>) -> (u64, Arc<AtomicBool>) {
        let mut state = lock(&self.state);
        let id = state.next_queue;
        state.next_queue += 1;
        let queue = QueueState { notifier, ..QueueState::default() };
        let flag = Arc::clone(&queue.has_completions);
        state.queues.insert(id, queue);
        // Its requests may share a connection with those of a session that receives.
        state.end_session_receipt(id);
        (id, flag)
    }

    /// The connection of a queue, if all requests over it are those of the queue: from now on the session
    /// receives from it ([`UpstreamLink::receive_for`]).
    pub(super) fn receive_in_session(&self, id: u64) -> Option<Arc<UpstreamConnection>> {
        let state = lock(&self.state);
        let number = state.connection_number(id)?;
        let shares = |other: &u64| *other != id && state.connection_number(*other) == Some(number);
        let has_others = state.queues.keys().any(shares) || state.read_ahead.is_some();
        if has_others || state.loss.is_some() || state.machine.awaits_own_reply(number) {
            return None;
        }
        let connection = Arc::clone(&state.connections[number].connection);
        connection.session_receives.store(true, Ordering::Release);
        Some(connection)
    }

    /// Receives the arrived replies on the connection of a queue, on the session's thread.
    pub(super) fn receive_for(&self, id: u64, connection: &UpstreamConnection) {
        // It takes the completions next.
        if let Some(queue) = lock(&self.state).queues.get_mut(&id) {
            queue.notified = true;
        }
        let received = self.receive_available(connection);
        let mut state = lock(&self.state);
        if let Some(queue) = state.queues.get_mut(&id) {
            queue.notified = !queue.completions.is_empty();
        }
        if let Err(why) = received {
            // Unless another one has replaced it.
            let is_current =
                |of: &LinkConnection| std::ptr::eq(&raw const *of.connection, connection);
            if state.connections.iter().any(is_current) {
                state.lose(why);
            }
        }
    }

    /// Forgets a queue without operations.
    pub(super) fn close_queue(&self, id: u64) {
        let mut state = lock(&self.state);
        state.end_session_receipt(id);
        state.queues.remove(&id);
        if let Some(read_ahead) = &mut state.read_ahead {
            read_ahead.cancel(id);
        }
    }

    /// Begins operations of a queue. One that no message can execute completes without an outcome.
    pub(super) fn submit(&self, id: u64, operations: impl Iterator<Item = (OpId, Op)>) {
        let mut state = lock(&self.state);
        for (op_id, op) in operations {
            state.begin(id, op_id, op);
        }
        self.finish(state);
    }

    /// Moves the completions of a queue to `into`.
    pub(super) fn take_completions(&self, id: u64, into: &mut VecDeque<Completion>) {
        let mut state = lock(&self.state);
        let mut writes = 0;
        if let Some(queue) = state.queues.get_mut(&id) {
            queue.has_completions.store(false, Ordering::Relaxed);
            queue.notified = false;
            let is_write = |completion: &&Completion| matches!(completion.op, Op::Write { .. });
            writes = queue.completions.iter().filter(is_write).count();
            into.append(&mut queue.completions);
        }
        // As many as the writes have left here. Dropped on the session's thread, they are spares of that thread.
        let spares: Vec<_> = (0..writes).map_while(|_| state.machine.take_spare()).collect();
        drop(state);
        drop(spares);
    }

    /// Blocks until a queue has completions. With `may_cancel`, returns also when the connection is lost,
    /// with all operations of the queue completed.
    pub(super) fn wait_for_completions(&self, id: u64, may_cancel: bool) {
        let mut state = lock(&self.state);
        state.end_session_receipt(id);
        while state.queues.get(&id).is_some_and(|queue| queue.completions.is_empty()) {
            if may_cancel && state.cancel(id) {
                return self.finish(state);
            }
            state.waiters += 1;
            state = wait(&self.changed, state);
            state.waiters -= 1;
        }
    }

    /// Sends messages until the sockets are full, and distributes completions.
    fn finish(&self, mut state: MutexGuard<'_, LinkCore>) {
        state.send();
        state.distribute();
        let has_waiters = state.waiters > 0;
        drop(state);
        if has_waiters {
            self.changed.notify_all();
        }
    }

    /// Serves one generation of connections after another.
    fn run(&self, mut target: usize, mut current: Connected, mut replies: u64) {
        let mut rotation = Rotation::starting_at(self.targets.len(), target);
        loop {
            let began = Instant::now();
            self.serve(&current);
            let Some(answered) = self.end(target, current, replies) else { return };
            if answered || began.elapsed() >= DELAY_MAX {
                rotation.on_success();
            } else {
                rotation.on_failure(target, self.clock.elapsed());
            }
            let Some(connected) = self.reconnect(&mut rotation) else { return };
            (target, current) = connected;
            match self.begin(target, &current) {
                Some(so_far) => replies = so_far,
                None => return,
            }
        }
    }

    /// Makes new connections the current ones. Returns the number of replies so far; `None` if closed.
    fn begin(&self, target: usize, new: &Connected) -> Option<u64> {
        let mut state = lock(&self.state);
        if state.is_closed {
            return None;
        }
        let connection = |connection: &Arc<UpstreamConnection>| LinkConnection {
            connection: Arc::clone(connection),
            tx: UpstreamTx::new(new.terms.dialect),
            is_blocked: false,
        };
        state.connections = new.connections.iter().map(connection).collect();
        state.loss = None;
        state.machine.connected(new.terms, new.connections.len());
        (state.target, state.since, state.last_error) = (target, Instant::now(), None);
        let replies = state.machine.replies();
        self.finish(state);
        let count = new.connections.len();
        let target = &self.targets[target];
        info!(
            message_id = message_id::UPSTREAM_CONNECTED,
            "flexnbd.upstream" = %target,
            "connected to the upstream {target} ({count} connection{})",
            if count == 1 { "" } else { "s" }
        );
        self.events.changed();
        Some(replies)
    }

    /// Receives and sends until the connections are lost.
    fn serve(&self, current: &Connected) {
        thread::scope(|scope| {
            for number in 1..current.connections.len() {
                let receive = move || self.receive(number, current);
                let name = format!("upstream-{number}");
                if let Err(error) = thread::Builder::new().name(name).spawn_scoped(scope, receive) {
                    lock(&self.state).lose(format!("cannot start a thread: {error}"));
                }
            }
            self.receive(0, current);
        });
    }

    /// The current connections are lost. Returns whether the server has answered; `None` if closed.
    fn end(&self, target: usize, old: Connected, replies: u64) -> Option<bool> {
        for connection in &old.connections {
            // The old server process must not execute requests that are still in our send buffer. A session may
            // wait for the socket, so dropping it would not do. Fails only on a broken connection.
            let _ = connection.stream.abort();
        }
        let receiving = old.connections.iter().filter_map(|connection| lock(&connection.rx).take());
        let receiving: Vec<_> = receiving.collect();
        let mut state = lock(&self.state);
        receiving.into_iter().for_each(|mut rx| rx.abandon(&mut state.machine));
        state.connections.clear();
        old.connections.iter().for_each(|connection| connection.end_session_receipt());
        drop(old);
        state.machine.lost();
        let why = state.loss.take().unwrap_or_default();
        state.since = Instant::now();
        state.last_error = Some(why.clone());
        state.reconnects += 1;
        let answered = state.machine.replies() > replies;
        let is_closed = state.is_closed;
        // Queues of ended sessions wait for this.
        self.finish(state);
        if is_closed {
            return None;
        }
        let target = &self.targets[target];
        warn!(
            message_id = message_id::UPSTREAM_LOST,
            "flexnbd.upstream" = %target,
            "lost the upstream {target}: {why}; clients wait, trying again"
        );
        self.events.changed();
        Some(answered)
    }

    /// Connects again. `None` if closed.
    fn reconnect(&self, rotation: &mut Rotation) -> Option<(usize, Connected)> {
        let attempts = Attempts::default();
        let generation = {
            let mut state = lock(&self.state);
            if state.is_closed {
                return None;
            }
            state.attempts = Some(attempts.clone());
            state.reconnects
        };
        let connected = self.try_targets(rotation, &attempts, generation);
        // Connections that are made from now on are closed.
        lock(&self.state).attempts = None;
        connected
    }

    /// Tries the targets until one gives us the disk. `None` if closed.
    fn try_targets(
        &self,
        rotation: &mut Rotation,
        attempts: &Attempts,
        generation: u64,
    ) -> Option<(usize, Connected)> {
        let mut reported: Vec<Option<String>> = vec![None; self.targets.len()];
        loop {
            let deadline = match rotation.next(self.clock.elapsed()) {
                NextAttempt::Start(number) => {
                    let (target, options) = (self.targets[number].clone(), self.options.clone());
                    let promised = ServerTerms { disk_id: self.disk_id(), ..self.terms };
                    let connect =
                        move || connect_to(&target, &options, (generation, Some(&promised)));
                    rotation.on_start(number, self.clock.elapsed());
                    attempts.start(number, connect);
                    continue;
                }
                NextAttempt::WaitUntil(at) => Some(self.clock + at),
                NextAttempt::Wait => None,
            };
            match attempts.wait(deadline) {
                AttemptsEvent::Cancelled => return None,
                AttemptsEvent::Deadline => {}
                AttemptsEvent::Ended(number, Ok(connected)) => {
                    rotation.on_connected(number);
                    return Some((number, connected));
                }
                AttemptsEvent::Ended(number, Err(error)) => {
                    rotation.on_failure(number, self.clock.elapsed());
                    let (target, error) = (&self.targets[number], error.to_string());
                    // Once for each reason, not at every attempt.
                    if reported[number].as_ref() != Some(&error) {
                        warn!("{target} does not give us the disk: {error}");
                        reported[number] = Some(error.clone());
                    }
                    lock(&self.state).last_error = Some(format!("{target}: {error}"));
                }
            }
        }
    }

    /// Receives from a connection, and sends the bytes that its socket did not take at once, until it is lost.
    fn receive(&self, number: usize, current: &Connected) {
        let connection = &*current.connections[number];
        let tick = self.options.timeout / TICKS;
        let (mut silent_ticks, mut receipts) = (0, 0);
        let mut next_tick = Instant::now() + tick;
        let mut receives = true;
        let why = loop {
            if receives && let Err(why) = self.receive_available(connection) {
                break why;
            }
            let writable = {
                let state = lock(&self.state);
                if state.loss.is_some() {
                    break String::new();
                }
                state.connections.get(number).is_some_and(|connection| connection.is_blocked)
            };
            let readable = !connection.session_receives.load(Ordering::Acquire);
            let interest = Interest { readable, writable };
            let ready = connection.stream.wait(interest, Some(&connection.wake), Some(next_tick));
            let ready = match ready {
                Ok(ready) => ready,
                Err(error) => break format!("cannot wait for it: {error}"),
            };
            if ready.woken {
                connection.wake.clear();
            }
            if ready.writable {
                self.continue_sending(number);
            }
            // A session without requests under way does not receive, so look at every tick.
            receives = ready.timed_out || !connection.session_receives.load(Ordering::Acquire);
            if ready.timed_out {
                next_tick = Instant::now() + tick;
                let now = connection.receipts.load(Ordering::Relaxed);
                silent_ticks = if now == receipts { silent_ticks } else { 0 };
                receipts = now;
                silent_ticks = self.on_tick(number, silent_ticks);
                // Those of changes that were flushed.
                Buffer::free_spares();
                if silent_ticks >= TICKS {
                    let seconds = self.options.timeout.as_secs_f32();
                    break format!("it has not answered for {seconds} s");
                }
            }
        };
        lock(&self.state).lose(why);
    }

    /// Receives and handles all that has arrived.
    fn receive_available(&self, connection: &UpstreamConnection) -> Result<(), String> {
        let mut receiving = lock(&connection.rx);
        let Some(rx) = receiving.as_mut() else { return Ok(()) };
        loop {
            let room = rx.room();
            let wanted = room.len();
            let count = match connection.stream.try_recv(room) {
                Ok(0) => return Err("it has closed the connection".to_owned()),
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error.to_string()),
            };
            connection.receipts.fetch_add(1, Ordering::Relaxed);
            rx.received(count);
            if rx.needs_machine() {
                let mut state = lock(&self.state);
                let outcome = rx.process(&mut state.machine);
                self.finish(state);
                outcome.map_err(|error| error.to_string())?;
            }
            if count < wanted {
                return Ok(());
            }
        }
    }

    fn continue_sending(&self, number: usize) {
        let mut state = lock(&self.state);
        if let Some(connection) = state.connections.get_mut(number) {
            connection.is_blocked = false;
        }
        self.finish(state);
    }

    /// The number of silent ticks after another one without received bytes.
    fn on_tick(&self, number: usize, silent_ticks: u32) -> u32 {
        let mut state = lock(&self.state);
        if !state.machine.awaits_reply(number) {
            state.machine.free_spares();
            return 0;
        }
        if silent_ticks + 1 == PROBE_TICKS {
            state.machine.probe(number);
            self.finish(state);
        }
        silent_ticks + 1
    }
}
