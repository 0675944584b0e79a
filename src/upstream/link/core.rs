//! What the threads of an upstream share under one lock: the machine, the connections, and the queues.
//! Never waits.

use crate::disk::{Completion, Op, OpId};
use crate::upstream::attempts::Attempts;
use crate::upstream::connection::UpstreamConnection;
use crate::upstream::machine::UpstreamMachine;
use crate::upstream::read_ahead::{READ_AHEAD_OWNER, ReadAhead, ReadAheadStep};
use crate::upstream::tx::UpstreamTx;
use nix::unistd::write;
use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

#[derive(Debug)]
pub(super) struct LinkCore {
    pub(super) machine: UpstreamMachine,
    pub(super) read_ahead: Option<ReadAhead>,
    pub(super) connections: Vec<LinkConnection>,
    pub(super) queues: HashMap<u64, QueueState>,
    pub(super) next_queue: u64,
    /// Threads that wait for `UpstreamLink::changed`.
    pub(super) waiters: usize,
    /// Why the current connections are lost.
    pub(super) loss: Option<String>,
    pub(super) is_closed: bool,
    /// Those to connect again, the last ones.
    pub(super) attempts: Option<Attempts>,
    pub(super) target: usize,
    pub(super) since: Instant,
    pub(super) last_error: Option<String>,
    pub(super) reconnects: u64,
}

#[derive(Debug)]
pub(super) struct LinkConnection {
    pub(super) connection: Arc<UpstreamConnection>,
    pub(super) tx: UpstreamTx,
    /// The socket takes no more for now; its thread waits for room.
    pub(super) is_blocked: bool,
}

#[derive(Debug, Default)]
pub(super) struct QueueState {
    pub(super) completions: VecDeque<Completion>,
    /// Whether there are completions, for a look without the lock.
    pub(super) has_completions: Arc<AtomicBool>,
    /// The eventfd of the session; `None` for a caller that waits.
    pub(super) notifier: Option<OwnedFd>,
    pub(super) notified: bool,
}

impl LinkCore {
    /// The connection for the requests of a queue, if there is one.
    pub(super) fn connection_number(&self, queue: u64) -> Option<usize> {
        (!self.connections.is_empty()).then(|| self.machine.connection_of(queue))
    }

    /// Has the thread of a queue's connection receive again.
    pub(super) fn end_session_receipt(&self, queue: u64) {
        if let Some(number) = self.connection_number(queue) {
            self.connections[number].connection.end_session_receipt();
        }
    }

    /// The connections are lost, for this reason unless another one came first.
    pub(super) fn lose(&mut self, why: String) {
        if self.loss.is_none() {
            self.loss = Some(why);
            for LinkConnection { connection, .. } in &self.connections {
                // It stays readable until its thread has ended it, so no session may wait for it.
                connection.session_receives.store(false, Ordering::Release);
                connection.wake.wake();
            }
        }
    }

    /// Sends messages until the sockets take no more.
    pub(super) fn send(&mut self) {
        for number in 0..self.connections.len() {
            if let Err(error) = self.send_over(number) {
                return self.lose(error.to_string());
            }
        }
    }

    pub(super) fn send_over(&mut self, number: usize) -> io::Result<()> {
        let connection = &mut self.connections[number];
        while !connection.is_blocked && self.loss.is_none() {
            while !connection.tx.is_full()
                && let Some(message) = self.machine.next_message(number)
            {
                if !message.is_of_session {
                    // No session waits for its reply.
                    connection.connection.end_session_receipt();
                }
                connection.tx.push(message);
            }
            if connection.tx.is_empty() {
                return Ok(());
            }
            match connection.connection.stream.try_send_vectored(&connection.tx.slices()) {
                Ok(count) => connection.tx.sent(count),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    connection.is_blocked = true;
                    connection.connection.wake.wake();
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Begins an operation of a queue.
    pub(super) fn begin(&mut self, queue: u64, id: OpId, op: Op) {
        let Some(read_ahead) = &mut self.read_ahead else { return self.submit(queue, id, op) };
        let (step, ahead) = read_ahead.begin(queue, id.key, op);
        match step {
            ReadAheadStep::Complete(op) => {
                self.complete(queue, Completion { key: id.key, op, outcome: Some(Ok(())) });
            }
            ReadAheadStep::Wait => {}
            ReadAheadStep::Submit(op) => self.submit(queue, id, op),
        }
        // Behind what the session waits for.
        if let Some((token, op)) = ahead {
            self.submit(READ_AHEAD_OWNER, token.into(), op);
        }
    }

    pub(super) fn submit(&mut self, queue: u64, id: OpId, op: Op) {
        if let Err(op) = self.machine.submit(queue, id, op) {
            self.complete(queue, Completion { key: id.key, op, outcome: None });
        }
    }

    /// Completes all operations of a queue if there is no connection. Returns whether it did.
    pub(super) fn cancel(&mut self, queue: u64) -> bool {
        let is_cancelled = self.machine.cancel(queue);
        if is_cancelled && let Some(read_ahead) = &mut self.read_ahead {
            for completion in read_ahead.cancel(queue) {
                self.complete(queue, completion);
            }
        }
        is_cancelled
    }

    pub(super) fn distribute(&mut self) {
        while let Some((queue, completion)) = self.machine.next_completion() {
            if queue == READ_AHEAD_OWNER {
                self.read_ahead_arrived(completion);
            } else {
                self.complete(queue, completion);
            }
        }
    }

    pub(super) fn read_ahead_arrived(&mut self, Completion { key, op, outcome }: Completion) {
        let Some(read_ahead) = &mut self.read_ahead else { return };
        let waited = read_ahead.arrived(key, op, matches!(outcome, Some(Ok(()))));
        for (queue, completion) in waited {
            match completion.outcome {
                Some(_) => self.complete(queue, completion),
                None => self.submit(queue, completion.key.into(), completion.op),
            }
        }
    }

    pub(super) fn complete(&mut self, queue: u64, completion: Completion) {
        if let Some(read_ahead) = &mut self.read_ahead {
            read_ahead.completed(queue, completion.key);
        }
        let Some(queue) = self.queues.get_mut(&queue) else { return };
        queue.completions.push_back(completion);
        queue.has_completions.store(true, Ordering::Relaxed);
        if let Some(notifier) = &queue.notifier
            && !queue.notified
        {
            queue.notified = true;
            // Fails only with a full counter, and then the session is notified already.
            let _ = write(notifier, &1_u64.to_ne_bytes());
        }
    }
}
