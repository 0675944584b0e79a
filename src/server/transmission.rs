//! The transmission phase of one session: requests in, replies out, in batches.
//!
//! Reading requests and sending replies never wait for each other. While the client takes no
//! replies, reads wait in a queue, everything else is still done, and only when the queue or the
//! held replies reach their limits does the session stop receiving: back-pressure in bounded
//! memory, so that a client may send a long row of requests before it reads the first reply.
//!
//! Nor do requests wait for each other: what the disk takes long for is an errand, and what was
//! asked behind it may be answered before. A change of what an earlier change in flight is changing,
//! of whichever session, waits among the errands. Only these wait with all that is behind them: a
//! piece of a long write to such a place; what must come last; and anything while there is no room
//! for more errands, or while the gate is closed.

use super::control::StopRequest;
use super::delay::ReceiveDelay;
use super::end::SessionEnd;
use super::inbox::Inbox;
use super::outbox::Outbox;
use super::polling::{AdaptivePolling, LOOKOUT};
use super::progress::SessionProgress;
use super::reads::ReadStep;
use super::sessions::Registration;
use super::snapshot::{PhaseSnapshot, SessionSnapshot, TransmissionSnapshot};
use super::work::{Tag, Worker};
use crate::disk::{Change, Visit};
use crate::nbd::request::Terms;
use crate::net::{Interest, Stream};
use crate::range::Range;
use std::io;
use std::time::{Duration, Instant};

/// After so many bytes have been written, replies are sent before more is: the client deals with
/// them meanwhile. (Writes of 4 KiB at depth 32 are answered 1.7 times as fast as without.)
const BATCH: u64 = 32 << 10;
/// How many reads may wait for the client to take replies.
pub(super) const READS_MAX: usize = 1024;
/// When less than this was received at once, it is not worth asking for more before waiting: a
/// client with one or two requests under way waits for their replies first.
const DRAINED_BELOW: usize = 64;
/// Nothing but a request is waited for.
const READABLE: Interest = Interest { readable: true, writable: false };
/// After this time without anything to do, a session gives its buffers back.
const IDLE: Duration = Duration::from_secs(1);

/// One session's transmission phase.
#[derive(Debug)]
pub(super) struct Transmission<'a> {
    pub(super) stream: &'a Stream,
    pub(super) registration: &'a Registration,
    /// How many threads can run at once.
    pub(super) cpus: usize,
    pub(super) worker: Worker<'a>,
    pub(super) terms: Terms,
    /// Answer bytes that are no request with an error before closing, as the original did.
    pub(super) answers_nonsense: bool,
    pub(super) stall_limit: Option<Duration>,
    pub(super) inbox: Inbox,
    pub(super) outbox: Outbox,
    pub(super) progress: SessionProgress,
    /// Nothing more can be begun before an errand is over.
    pub(super) stuck: bool,
    /// The place of the next piece of a long write among the changes in flight, if it has to wait.
    pub(super) place: Option<Change<'a>>,
    /// How long what was received has been kept waiting.
    pub(super) delay: ReceiveDelay,
    /// Bytes written since replies were last sent.
    pub(super) written: u64,
    /// Replies are sent before more is done that could be.
    pub(super) unfinished: bool,
    /// Requests taken since the last time that there were none.
    pub(super) taken: u32,
    pub(super) polling: AdaptivePolling,
}

impl<'a> Transmission<'a> {
    /// Serves until the session ends; what it was in the middle of when it was packed up.
    pub(super) fn run(mut self) -> (SessionEnd, Option<SessionSnapshot>) {
        loop {
            match self.turn() {
                Ok(()) => {}
                Err(SessionEnd::Suspended) => {
                    return match self.pack() {
                        Ok(packed) => (SessionEnd::Suspended, Some(packed)),
                        Err(error) => (SessionEnd::ReplyIncomplete(error), None),
                    };
                }
                Err(end) => return (end, None),
            }
        }
    }

    /// Nothing is under way on the disk: what is held here is all there is.
    fn pack(self) -> io::Result<SessionSnapshot> {
        let Terms { dialect, allocation_selected, private, .. } = self.terms;
        Ok(SessionSnapshot {
            session: self.worker.session,
            inbox: self.inbox.bytes().to_vec(),
            outbox: self.outbox.save()?,
            phase: PhaseSnapshot::Transmission(TransmissionSnapshot {
                form: dialect.into(),
                allocation_selected,
                introduced: private,
                outstanding: self.progress.save(),
            }),
        })
    }

    fn turn(&mut self) -> Result<(), SessionEnd> {
        // Before anything that arrived after the order is answered.
        self.obey()?;
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
            && let Some(end) = self.progress.leaving.take()
        {
            return Err(end);
        }
        // While requests that are here already wait, more of them, or their end, can wait, too.
        if !blocked && !self.progress.drained && self.receives() && self.receive()? {
            return Ok(());
        }
        self.wait()
    }

    /// Sends what waits; false if the client does not take all of it now.
    fn send(&mut self) -> Result<bool, SessionEnd> {
        let before = self.outbox.unsent();
        let sent_all = self.outbox.send(self.stream).map_err(SessionEnd::Connection)?;
        self.progress.sent += before.saturating_sub(self.outbox.unsent());
        Ok(sent_all)
    }

    /// Does everything that can be done without waiting for the client or for an errand.
    fn work(&mut self) -> Result<(), SessionEnd> {
        (self.stuck, self.unfinished, self.written) = (false, false, 0);
        loop {
            self.conclude_errands();
            if self.is_suspending() {
                return Ok(());
            }
            self.answer_reads()?;
            if self.is_blocked() {
                // A client that takes no replies must not make other sessions wait for its change.
                self.place = None;
            }
            let held_up = self.stuck || self.is_blocked() || self.has_said_goodbye();
            if held_up || !self.take()? {
                return Ok(());
            }
            if self.written >= BATCH {
                self.unfinished = true;
                return Ok(());
            }
        }
    }

    /// Answers what errands are over for.
    fn conclude_errands(&mut self) {
        while let Some((aside, outcome)) = self.worker.in_flight.next_completed() {
            self.worker.control.record_activity();
            match aside {
                Tag::Answer { to, request } => {
                    self.worker.conclude(to, outcome, request, &mut self.outbox);
                }
                Tag::Read(mut read, load) => {
                    self.worker.loaded(&load);
                    read.warm();
                    self.progress.reads.push_back(read);
                }
            }
        }
    }

    /// Answers reads as far as the outbox takes them.
    fn answer_reads(&mut self) -> Result<(), SessionEnd> {
        while !self.outbox.is_full()
            && let Some(read) = self.progress.reads.front_mut()
        {
            match self.worker.advance(read, &mut self.outbox)? {
                ReadStep::GoesOn => {}
                ReadStep::Answered => drop(self.progress.reads.pop_front()),
                ReadStep::Cold(visit, range) => self.load(visit, range)?,
                ReadStep::Waits => self.stuck = true,
            }
            if self.stuck {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Has what the first read needs loaded aside, or waits for it if there is nothing else to do
    /// and that will not take long.
    fn load(&mut self, visit: Visit<'a>, range: Range) -> Result<(), SessionEnd> {
        if self.worker.inline_reads.waits()
            && self.has_nothing_else_to_do()
            && let Some(read) = self.progress.reads.front_mut()
        {
            drop(visit);
            read.warm();
            let began = Instant::now();
            if let ReadStep::Answered = self.worker.advance(read, &mut self.outbox)? {
                self.progress.reads.pop_front();
            }
            self.worker.inline_reads.waited(range.length(), began.elapsed());
        } else if !self.worker.in_flight.has_room(0) {
            self.stuck = true;
        } else if let Some(read) = self.progress.reads.pop_front() {
            self.worker.load(visit, range, read);
        }
        Ok(())
    }

    /// Whether everything that the client has sent has been answered but for one read.
    fn has_nothing_else_to_do(&self) -> bool {
        let answered = self.worker.in_flight.is_empty() && self.outbox.is_empty();
        answered && self.progress.reads.len() == 1 && self.inbox.bytes().is_empty()
    }

    /// Whether to stop as soon as nothing is under way on the disk, and to begin nothing.
    fn is_suspending(&self) -> bool {
        self.worker.control.current() == StopRequest::Suspend && self.progress.can_be_suspended()
    }

    /// Whether nothing more may be taken on before the client takes replies.
    fn is_blocked(&self) -> bool {
        self.outbox.is_overfull() || self.progress.reads.len() >= READS_MAX
    }

    /// Whether nothing that the client sends counts any more. After the order to finish, what has
    /// been received still does.
    fn has_said_goodbye(&self) -> bool {
        !matches!(self.progress.leaving, None | Some(SessionEnd::Requested(_)))
    }

    /// Not while stuck: that the client has ended its side is to be seen after all that it said.
    fn receives(&self) -> bool {
        let takes_on = !self.stuck && !self.is_blocked() && !self.is_suspending();
        self.progress.leaving.is_none() && takes_on && !self.inbox.is_full()
    }

    /// Receives what has arrived; false if nothing has.
    fn receive(&mut self) -> Result<bool, SessionEnd> {
        match self.inbox.receive(self.stream) {
            Ok(0) => {
                let half = self.progress.payload.is_some() || !self.inbox.bytes().is_empty();
                let end = if half { SessionEnd::Truncated } else { SessionEnd::Closed };
                self.progress.leaving = Some(end);
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

    /// Waits until the client, the server, the disk, or the clock wants something.
    fn wait(&mut self) -> Result<(), SessionEnd> {
        if self.worker.in_flight.has_completed() {
            return Ok(());
        }
        if self.worker.control.current() != StopRequest::Serve {
            self.worker.control.set_waits_for_disk(!self.worker.in_flight.is_empty());
        }
        let interest = Interest { readable: self.receives(), writable: self.outbox.has_bytes() };
        if interest == READABLE && self.worker.in_flight.is_empty() && self.look_out()? {
            return Ok(());
        }
        self.delay.waits(self.stuck || self.is_blocked());
        let now = Instant::now();
        let stalled = self.stalled_at(now);
        let deadline = stalled.or_else(|| self.may_relax().then(|| now + IDLE));
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
            // It is over in both directions: nothing that waits is of use to anybody.
            return Err(self.progress.leaving.take().unwrap_or(SessionEnd::Truncated));
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

    /// Looks out for the next request, if it is likely to come at once and nobody needs the
    /// processor more; true if something came.
    fn look_out(&mut self) -> Result<bool, SessionEnd> {
        let expected = self.polling.looks_out(std::mem::take(&mut self.taken));
        if !expected || self.registration.session_count() > self.cpus {
            return Ok(false);
        }
        let until = Instant::now() + LOOKOUT;
        let mut came = false;
        while !came && self.worker.control.current() == StopRequest::Serve && Instant::now() < until
        {
            came = self.receive()?;
        }
        self.polling.note(came);
        Ok(came)
    }

    /// Whether there is memory to give back once nothing has happened for a while.
    fn may_relax(&self) -> bool {
        let errands = &self.worker.in_flight;
        let relaxed = self.inbox.is_shrunk() && self.outbox.is_shrunk() && errands.is_shrunk();
        !relaxed && !self.outbox.has_bytes() && errands.is_empty()
    }

    fn obey(&mut self) -> Result<(), SessionEnd> {
        match self.worker.control.current() {
            StopRequest::Serve | StopRequest::Suspend => Ok(()),
            StopRequest::Finish => {
                self.progress.leaving.get_or_insert(SessionEnd::Requested(StopRequest::Finish));
                Ok(())
            }
            order => Err(SessionEnd::Requested(order)),
        }
    }

    /// When `--killswitch` strikes, unless something moves before. Nobody is to blame for what
    /// waits for the disk.
    fn stalled_at(&mut self, now: Instant) -> Option<Instant> {
        let limit = self.stall_limit?;
        let begun = self.progress.payload.is_some() || !self.inbox.bytes().is_empty();
        let half = begun && !self.stuck;
        let sends = self.outbox.has_bytes();
        let SessionProgress { request_stall, reply_stall, received, sent, .. } = &mut self.progress;
        let request = request_stall.deadline(half, *received, now, limit);
        let reply = reply_stall.deadline(sends, *sent, now, limit);
        request.into_iter().chain(reply).min()
    }
}
