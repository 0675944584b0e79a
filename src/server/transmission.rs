//! The transmission phase of one session: requests in, replies out, in batches.
//!
//! Receiving and sending never wait for each other. While the client does not receive replies, reads
//! wait in a queue and all other requests are executed; the session stops receiving only when the
//! queue or the deferred replies reach their limits. That is back-pressure in bounded memory, and lets
//! a client pipeline many requests before it receives the first reply.
//!
//! Requests do not wait for each other either: slow disk I/O is in flight while later requests are
//! answered. Of two overlapping changes, whichever sessions they belong to, the later one waits within
//! the in-flight I/O. These requests wait with everything behind them: a piece of a long write that
//! overlaps a change in flight; a request that must come after all others; and every request while the
//! in-flight I/O is at its limits or the gate is closed.

use super::end::SessionEnd;
use super::executor::{Tag, Worker};
use super::inbox::Inbox;
use super::outbox::Outbox;
use super::polling::{AdaptivePolling, POLL_TIME};
use super::reads::ReadStep;
use super::receive_delay::ReceiveDelay;
use super::session_state::SessionProgress;
use super::sessions::Registration;
use super::snapshot::{PhaseSnapshot, SessionSnapshot, TransmissionSnapshot};
use super::stop_request::StopRequest;
use crate::disk::{Change, Visit};
use crate::nbd::request::Terms;
use crate::net::{Interest, Stream};
use crate::range::Range;
use std::io;
use std::time::{Duration, Instant};

/// After so many written bytes, the session sends replies before it writes more, so that the client can
/// process them meanwhile. (Writes of 4 KiB at depth 32 are answered 1.7 times as fast as without.)
const WRITE_BATCH: u64 = 32 << 10;
/// How many reads may wait for the client to receive replies.
pub(super) const READS_MAX: usize = 1024;
/// When fewer bytes than this arrived at once, the session does not try to receive more before it
/// waits: a client with one or two requests in flight waits for their replies first.
const DRAINED_BELOW: usize = 64;
/// Waits for requests only.
const READABLE: Interest = Interest { readable: true, writable: false };
/// After this time without activity, a session frees its buffers.
const IDLE_TIMEOUT: Duration = Duration::from_secs(1);

/// One session's transmission phase.
#[derive(Debug)]
pub(super) struct Transmission<'a> {
    pub(super) stream: &'a Stream,
    pub(super) registration: &'a Registration,
    /// How many threads can run at once.
    pub(super) cpus: usize,
    pub(super) worker: Worker<'a>,
    pub(super) terms: Terms,
    /// Reply to a malformed request with an error before closing, as the original did.
    pub(super) answers_malformed: bool,
    pub(super) stall_limit: Option<Duration>,
    pub(super) inbox: Inbox,
    pub(super) outbox: Outbox,
    pub(super) progress: SessionProgress,
    /// No request can be begun before I/O in flight completes.
    pub(super) stuck: bool,
    /// The next piece of a long write, registered among the changes in flight because it has to wait.
    pub(super) waiting_change: Option<Change<'a>>,
    /// How long received bytes have been waiting.
    pub(super) delay: ReceiveDelay,
    /// Bytes written since replies were last sent.
    pub(super) written: u64,
    /// There is more to do, but replies are sent first.
    pub(super) unfinished: bool,
    /// Requests begun since the session last waited for one.
    pub(super) begun: u32,
    pub(super) polling: AdaptivePolling,
}

impl<'a> Transmission<'a> {
    /// Serves until the session ends. Returns a snapshot if the end is [`SessionEnd::Suspended`].
    pub(super) fn run(mut self) -> (SessionEnd, Option<SessionSnapshot>) {
        loop {
            match self.turn() {
                Ok(()) => {}
                Err(SessionEnd::Suspended) => {
                    return match self.save() {
                        Ok(snapshot) => (SessionEnd::Suspended, Some(snapshot)),
                        Err(error) => (SessionEnd::ReplyIncomplete(error), None),
                    };
                }
                Err(end) => return (end, None),
            }
        }
    }

    /// Saves the session, which has no I/O in flight.
    fn save(self) -> io::Result<SessionSnapshot> {
        let Terms { dialect, allocation_selected, private, .. } = self.terms;
        Ok(SessionSnapshot {
            session: self.worker.session,
            inbox: self.inbox.bytes().to_vec(),
            outbox: self.outbox.save()?,
            phase: PhaseSnapshot::Transmission(TransmissionSnapshot {
                form: dialect.into(),
                allocation_selected,
                introduced: private,
                pending: self.progress.save(),
            }),
        })
    }

    fn turn(&mut self) -> Result<(), SessionEnd> {
        // First, so that no request that arrived after a stop request is answered.
        self.handle_stop_request()?;
        self.worker.check_disk()?;
        self.work()?;
        self.worker.in_flight.submit();
        let blocked = self.is_blocked();
        let sent_all = self.send()?;
        let quiet = self.worker.in_flight.is_empty();
        if self.is_suspending() {
            return if quiet { Err(SessionEnd::Suspended) } else { self.wait() };
        }
        if self.unfinished {
            return Ok(());
        }
        if sent_all && !self.stuck && (blocked || !self.progress.reads.is_empty()) {
            return Ok(());
        }
        if sent_all
            && quiet
            && let Some(end) = self.progress.end.take()
        {
            return Err(end);
        }
        // Do not receive more while received requests are blocked.
        if !blocked && !self.progress.drained && self.receives() && self.receive()? {
            return Ok(());
        }
        self.wait()
    }

    /// Sends replies; false if the socket does not accept all of them now.
    fn send(&mut self) -> Result<bool, SessionEnd> {
        let before = self.outbox.unsent();
        let sent_all = self.outbox.send(self.stream).map_err(SessionEnd::Connection)?;
        self.progress.sent += before.saturating_sub(self.outbox.unsent());
        Ok(sent_all)
    }

    /// Does everything that is possible without waiting for the client or for I/O in flight.
    fn work(&mut self) -> Result<(), SessionEnd> {
        (self.stuck, self.unfinished, self.written) = (false, false, 0);
        loop {
            self.complete_requests();
            if self.is_suspending() {
                return Ok(());
            }
            self.answer_reads()?;
            if self.is_blocked() {
                // A client that does not receive replies must not make other sessions wait for its change.
                self.waiting_change = None;
            }
            let blocked = self.stuck || self.is_blocked() || self.ignores_input();
            if blocked || !self.dispatch()? {
                return Ok(());
            }
            if self.written >= WRITE_BATCH {
                self.unfinished = true;
                return Ok(());
            }
        }
    }

    /// Answers the requests whose I/O has completed.
    fn complete_requests(&mut self) {
        while let Some((tag, outcome)) = self.worker.in_flight.next_completed() {
            self.worker.control.record_activity();
            match tag {
                Tag::Answer { to, request } => {
                    self.worker.complete(to, outcome, request, &mut self.outbox);
                }
                Tag::Read(mut read, load) => {
                    self.worker.record_load(&load);
                    read.mark_populated();
                    self.progress.reads.push_back(read);
                }
            }
        }
    }

    /// Answers reads until the outbox is full.
    fn answer_reads(&mut self) -> Result<(), SessionEnd> {
        while !self.outbox.is_full()
            && let Some(read) = self.progress.reads.front_mut()
        {
            match self.worker.advance(read, &mut self.outbox)? {
                ReadStep::Continue => {}
                ReadStep::Answered => drop(self.progress.reads.pop_front()),
                ReadStep::Cold(visit, range) => self.populate(visit, range)?,
                ReadStep::Blocked => self.stuck = true,
            }
            if self.stuck {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Populates the page cache for the first read, or reads it inline, blocking, if the disk is fast and
    /// the session has nothing else to do.
    fn populate(&mut self, visit: Visit<'a>, range: Range) -> Result<(), SessionEnd> {
        if self.worker.inline_reads.may_block()
            && self.has_nothing_else_to_do()
            && let Some(read) = self.progress.reads.front_mut()
        {
            drop(visit);
            read.mark_populated();
            let began = Instant::now();
            if let ReadStep::Answered = self.worker.advance(read, &mut self.outbox)? {
                self.progress.reads.pop_front();
            }
            self.worker.inline_reads.record_blocking_read(range.length(), began.elapsed());
        } else if !self.worker.in_flight.has_room(0) {
            self.stuck = true;
        } else if let Some(read) = self.progress.reads.pop_front() {
            self.worker.populate(visit, range, read);
        }
        Ok(())
    }

    /// Whether one read is the only request that is not answered.
    fn has_nothing_else_to_do(&self) -> bool {
        let answered = self.worker.in_flight.is_empty() && self.outbox.is_empty();
        answered && self.progress.reads.len() == 1 && self.inbox.bytes().is_empty()
    }

    /// Whether to begin no request, and to suspend as soon as no I/O is in flight.
    fn is_suspending(&self) -> bool {
        self.worker.control.current() == StopRequest::Suspend && self.progress.can_be_suspended()
    }

    /// Whether no request may be begun before the client receives replies.
    fn is_blocked(&self) -> bool {
        self.outbox.is_overfull() || self.progress.reads.len() >= READS_MAX
    }

    /// Whether to ignore received bytes. After the request to finish, the received ones still count.
    fn ignores_input(&self) -> bool {
        !matches!(self.progress.end, None | Some(SessionEnd::Requested(_)))
    }

    /// Whether to receive. Not while stuck: the end of the stream must be seen after all requests.
    fn receives(&self) -> bool {
        let can_begin = !self.stuck && !self.is_blocked() && !self.is_suspending();
        self.progress.end.is_none() && can_begin && !self.inbox.is_full()
    }

    /// Receives; false if nothing has arrived.
    fn receive(&mut self) -> Result<bool, SessionEnd> {
        match self.inbox.receive(self.stream) {
            Ok(0) => {
                let truncated = self.progress.payload.is_some() || !self.inbox.bytes().is_empty();
                let end = if truncated { SessionEnd::Truncated } else { SessionEnd::Closed };
                self.progress.end = Some(end);
                Ok(true)
            }
            Ok(count) => {
                // In old style the first request ends the handshake.
                if self.progress.received == 0 && !self.registration.establish() {
                    return Err(SessionEnd::Full);
                }
                self.delay.received();
                self.worker.control.record_activity();
                self.progress.received += count as u64;
                self.progress.drained = count < DRAINED_BELOW;
                Ok(true)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(error) => Err(SessionEnd::Connection(error)),
        }
    }

    /// Waits for the client, a stop request, a completion or a timeout.
    fn wait(&mut self) -> Result<(), SessionEnd> {
        if self.worker.in_flight.has_completed() {
            return Ok(());
        }
        if self.worker.control.current() != StopRequest::Serve {
            self.worker.control.set_waits_for_disk(!self.worker.in_flight.is_empty());
        }
        let interest = Interest { readable: self.receives(), writable: self.outbox.has_bytes() };
        if interest == READABLE && self.worker.in_flight.is_empty() && self.poll()? {
            return Ok(());
        }
        self.delay.waits(self.stuck || self.is_blocked());
        let now = Instant::now();
        let stalled = self.stall_deadline(now);
        let deadline = stalled.or_else(|| self.may_shrink().then(|| now + IDLE_TIMEOUT));
        let gate_due = self.worker.in_flight.gate_expiry();
        let deadline = deadline.into_iter().chain(gate_due).min();
        let wake = &self.worker.control.wake;
        let waits_for_client = interest != Interest::default();
        let ready = if waits_for_client {
            self.stream.wait(interest, Some(wake), deadline)
        } else {
            self.stream.wait_for_hang_up(wake, deadline)
        };
        let ready = ready.map_err(SessionEnd::Connection)?;
        if ready.readable {
            self.progress.drained = false;
        }
        if ready.readable && !waits_for_client {
            // The connection is closed in both directions: no reply can arrive.
            return Err(self.progress.end.take().unwrap_or(SessionEnd::Truncated));
        }
        if ready.woken {
            wake.clear();
            return Ok(());
        }
        if ready.timed_out && stalled.is_some_and(|at| at <= Instant::now()) {
            return Err(SessionEnd::Stalled);
        }
        if ready.timed_out {
            self.inbox.shrink();
            self.outbox.shrink();
            self.worker.in_flight.shrink();
        }
        Ok(())
    }

    /// Busy-polls for the next request if it is likely to arrive at once and there are enough
    /// processors; true if bytes arrived.
    fn poll(&mut self) -> Result<bool, SessionEnd> {
        let polls = self.polling.should_poll(std::mem::take(&mut self.begun));
        if !polls || self.registration.session_count() > self.cpus {
            return Ok(false);
        }
        let until = Instant::now() + POLL_TIME;
        let mut arrived = false;
        while !arrived
            && self.worker.control.current() == StopRequest::Serve
            && Instant::now() < until
        {
            arrived = self.receive()?;
        }
        self.polling.record(arrived);
        Ok(arrived)
    }

    /// Whether there is memory to free once the session is idle.
    fn may_shrink(&self) -> bool {
        let in_flight = &self.worker.in_flight;
        let shrunk = self.inbox.is_shrunk() && self.outbox.is_shrunk() && in_flight.is_shrunk();
        !shrunk && !self.outbox.has_bytes() && in_flight.is_empty()
    }

    fn handle_stop_request(&mut self) -> Result<(), SessionEnd> {
        match self.worker.control.current() {
            StopRequest::Serve | StopRequest::Suspend => Ok(()),
            StopRequest::Finish => {
                self.progress.end.get_or_insert(SessionEnd::Requested(StopRequest::Finish));
                Ok(())
            }
            request => Err(SessionEnd::Requested(request)),
        }
    }

    /// When `--killswitch` ends the session unless bytes move before. Time that a request waits for the
    /// disk does not count.
    fn stall_deadline(&mut self, now: Instant) -> Option<Instant> {
        let limit = self.stall_limit?;
        let has_input = self.progress.payload.is_some() || !self.inbox.bytes().is_empty();
        let waits_for_rest = has_input && !self.stuck;
        let sends = self.outbox.has_bytes();
        let SessionProgress { request_stall, reply_stall, received, sent, .. } = &mut self.progress;
        let request = request_stall.deadline(waits_for_rest, *received, now, limit);
        let reply = reply_stall.deadline(sends, *sent, now, limit);
        request.into_iter().chain(reply).min()
    }
}
