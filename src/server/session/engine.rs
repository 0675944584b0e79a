//! The transmission phase of one session, without a socket: requests out of the receive buffer, replies
//! into the send buffer. Does everything possible now, and returns its reason to wait ([`Blocked`]); never
//! waits, receives or sends. Time comes in as clocks.
//!
//! Receiving and sending never wait for each other. While the client does not receive replies, reads
//! wait in a queue and all other requests are executed; the session stops receiving only when the
//! queue or the deferred replies reach their limits. That is back-pressure in bounded memory, and lets
//! a client pipeline many requests before it receives the first reply.
//!
//! Requests do not wait for each other either: slow disk I/O is in flight while later requests are
//! answered. Of two overlapping changes, whichever sessions they belong to, the later one waits within
//! the in-flight I/O. These requests wait with everything behind them: a request that must come after
//! all others; and every request while the in-flight I/O is at its limits or the gate is closed.

use super::disk_io::{Busy, DiskIo, Tag};
use super::reads::{Read, Reads};
use super::receive_delay::ReceiveDelay;
use super::replies::Replies;
use super::rx::Rx;
use super::tx::Tx;
use super::writes::{PayloadStep, Purpose, Writes};
use crate::disk::{Disk, Notifier, Op, Returned, Zeroing};
#[cfg(test)]
use crate::disk::{
    inflight::InFlight,
    mutation::{self, Mutation},
};
use crate::nbd::reply::ReplyTo;
use crate::nbd::request::{Request, RequestError, RequestHeader, Terms};
use crate::nbd::wire::CommandKind;
use crate::server::end::SessionEnd;
use crate::server::export_policy::{ExportPolicy, HandoverReply, Permit, SessionId};
use crate::server::payload_memory::SessionMemory;
use crate::server::snapshot::{
    PendingSnapshot, PhaseSnapshot, SessionSnapshot, TransmissionSnapshot,
};
use crate::server::stop_request::StopRequest;
use crate::server::write_throttle::Throttle;
use std::collections::VecDeque;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// After so many written bytes, the session sends replies before it writes more, so that the client can
/// process them meanwhile. (Writes of 4 KiB at depth 32 are answered 1.7 times as fast as without.)
const WRITE_BATCH: u64 = 32 << 10;
/// How many reads may wait for the client to receive replies.
const READS_MAX: usize = 1024;
/// Longest payload of a refused request that is skipped, in bytes.
const SKIPPED_PAYLOAD_MAX: u64 = 1 << 32;

/// What a session waits for when it can do no more.
#[derive(Debug)]
pub(super) enum Blocked {
    /// Every request that has arrived is begun.
    Input,
    /// As [`Blocked::Input`]; in addition, reads wait until replies are sent.
    InputWithReads,
    /// Replies have to be sent before anything else is done.
    Output,
    /// There is more to do, after replies have been sent once.
    Batch,
    /// An operation in flight has to complete.
    Completion,
    /// The gate is closed. The session is notified when it opens.
    Gate,
    /// A migration delays this session's writes until then.
    Throttle(Instant),
    /// A change has waited long: its client must still be there ([`Engine::advance`] goes on).
    PeerCheck,
    /// The policy has to record that the session changes the disk.
    Record,
    /// The policy has to decide about a handover ([`Engine::on_handover_reply`]).
    Handover(ReplyTo, Vec<u8>),
    /// The session ends once all is completed and sent.
    End,
    /// The session is suspended once nothing is in flight.
    Suspend,
}

/// The clocks of a session.
#[derive(Clone, Copy, Debug)]
pub(super) struct Clocks {
    pub(super) now: fn() -> Instant,
    /// Needs no system call, and is up to a tick late.
    pub(super) coarse: fn() -> Duration,
}

/// What an engine needs besides its state.
#[derive(Debug)]
pub(super) struct EngineContext<'a> {
    pub(super) disk: &'a Disk,
    pub(super) policy: &'a dyn ExportPolicy,
    pub(super) notifier: Arc<dyn Notifier>,
    pub(super) memory: SessionMemory,
    pub(super) terms: Terms,
    /// Reply to a malformed request with an error before closing, as the original did.
    pub(super) answers_malformed: bool,
    /// For the log, and the session's id.
    pub(super) client: (String, SessionId),
    pub(super) clocks: Clocks,
}

/// The state of a session in the transmission phase that outlives the process.
#[derive(Debug, Default)]
pub(super) struct PendingRequests {
    writes: Writes,
    reads: VecDeque<Read>,
    end: Option<SessionEnd>,
}

/// One session's transmission phase.
#[derive(Debug)]
pub(super) struct Engine<'a> {
    pub(super) rx: Rx,
    pub(super) tx: Tx,
    io: DiskIo<'a>,
    replies: Replies<'a>,
    reads: Reads,
    writes: Writes,
    policy: &'a dyn ExportPolicy,
    session: SessionId,
    terms: Terms,
    answers_malformed: bool,
    /// Why the session ends once all replies are sent.
    end: Option<SessionEnd>,
    stop: StopRequest,
    delay: ReceiveDelay,
    throttle: Throttle,
    /// When the delay of the next request, a write, ends or has ended.
    throttled_until: Option<Instant>,
    started: Instant,
    clocks: Clocks,
    /// Requests begun since the session last waited for one.
    begun: u32,
    /// I/O has completed since the driver last asked.
    has_completed: bool,
}

/// Result of one step.
enum Step {
    Progress,
    NeedsInput,
    Blocked(Blocked),
}

impl From<Busy> for Step {
    fn from(busy: Busy) -> Self {
        Self::Blocked(match busy {
            Busy::Gate => Blocked::Gate,
            Busy::InFlight => Blocked::Completion,
        })
    }
}

impl PendingRequests {
    /// Restores the state on a disk of `size` bytes; `None` if a range exceeds it.
    pub(super) fn restore(saved: PendingSnapshot, size: u64) -> Option<Self> {
        let PendingSnapshot { payload, reads, disconnect_received } = saved;
        let writes = Writes::restore(payload, size)?;
        let end = disconnect_received.then_some(SessionEnd::Disconnected);
        Some(Self { writes, reads: Reads::restore(reads, size)?, end })
    }
}

impl<'a> Engine<'a> {
    pub(super) fn new(
        context: EngineContext<'a>,
        rx: Rx,
        tx: Tx,
        pending: PendingRequests,
    ) -> Self {
        let EngineContext {
            disk,
            policy,
            notifier,
            memory,
            terms,
            answers_malformed,
            client,
            clocks,
        } = context;
        let PendingRequests { writes, reads, end } = pending;
        let session = client.1;
        Self {
            rx,
            tx,
            io: DiskIo::new(disk, notifier, memory, clocks.now),
            replies: Replies::new(disk, policy, terms.dialect, client),
            reads: Reads::new(reads, clocks.now),
            writes,
            policy,
            session,
            terms,
            answers_malformed,
            end,
            stop: StopRequest::Serve,
            delay: ReceiveDelay::default(),
            throttle: Throttle::default(),
            throttled_until: None,
            started: (clocks.now)(),
            clocks,
            begun: 0,
            has_completed: false,
        }
    }

    /// Saves the session, which has no I/O in flight. Fails if replies cannot be saved. The timeouts of
    /// `--killswitch` restart in the next process.
    pub(super) fn save(self) -> io::Result<SessionSnapshot> {
        let Terms { dialect, allocation_selected, private, .. } = self.terms;
        Ok(SessionSnapshot {
            session: self.session,
            inbox: self.rx.save(),
            outbox: self.tx.save()?,
            phase: PhaseSnapshot::Transmission(TransmissionSnapshot {
                form: dialect.into(),
                allocation_selected,
                introduced: private,
                pending: PendingSnapshot {
                    payload: self.writes.save(),
                    reads: self.reads.save(),
                    disconnect_received: matches!(self.end, Some(SessionEnd::Disconnected)),
                },
            }),
            introduction: None,
        })
    }

    /// Does everything that is possible now. Returns what it waits for, or the end of the session.
    pub(super) fn advance(&mut self, stop: StopRequest) -> Result<Blocked, SessionEnd> {
        self.stop = stop;
        // First, so that no request that arrived after a stop request is answered.
        match stop {
            StopRequest::Serve | StopRequest::Suspend => {}
            StopRequest::Finish => {
                self.end.get_or_insert(SessionEnd::Requested(StopRequest::Finish));
            }
            #[cfg(test)]
            _ if mutation::is_active(Mutation::LeaveLate) => {}
            request => return Err(SessionEnd::Requested(request)),
        }
        self.io.check_disk()?;
        let blocked = self.work()?;
        self.io.in_flight.submit();
        self.settle_memory();
        let is_finishing = !matches!(stop, StopRequest::Serve | StopRequest::Suspend);
        if is_finishing && matches!(blocked, Blocked::Gate) && self.io.in_flight.is_empty() {
            // Not before the client has the replies to completed requests.
            let end = SessionEnd::Requested(stop);
            return if self.tx.has_bytes() { Ok(Blocked::Output) } else { Err(end) };
        }
        Ok(blocked)
    }

    fn work(&mut self) -> Result<Blocked, SessionEnd> {
        self.writes.written = 0;
        loop {
            self.complete_requests();
            if self.is_suspending() {
                return Ok(Blocked::Suspend);
            }
            let rx_is_empty = self.rx.is_empty();
            let (io, replies) = (&mut self.io, &mut self.replies);
            if !self.reads.answer(io, replies, &mut self.tx, rx_is_empty)? {
                return Ok(Blocked::Gate);
            }
            if self.tx.is_overfull() {
                // Without bytes to send, an operation loads the data that deferred replies wait for.
                let has_bytes = self.tx.has_bytes();
                return Ok(if has_bytes { Blocked::Output } else { Blocked::Completion });
            }
            if self.reads.len() >= READS_MAX {
                return Ok(if self.has_reads() { Blocked::Output } else { Blocked::Completion });
            }
            if self.ignores_input() {
                return Ok(Blocked::End);
            }
            match self.dispatch()? {
                Step::Progress if self.writes.written >= WRITE_BATCH => return Ok(Blocked::Batch),
                Step::Progress => {}
                Step::Blocked(blocked) => return Ok(blocked),
                Step::NeedsInput if self.end.is_some() => return Ok(Blocked::End),
                Step::NeedsInput if self.has_reads() => return Ok(Blocked::InputWithReads),
                Step::NeedsInput => return Ok(Blocked::Input),
            }
        }
    }

    /// Answers the requests whose I/O has completed.
    fn complete_requests(&mut self) {
        while let Some((tag, outcome)) = self.io.in_flight.next_completed() {
            self.has_completed = true;
            match tag {
                Tag::Answer { to, request } => self.answer(to, request, outcome),
                Tag::Load { number, .. } => {
                    self.reads.on_loaded(number, outcome.map(Returned::into_bytes));
                }
                Tag::Piece(number) => {
                    let (io, replies, tx) = (&mut self.io, &mut self.replies, &mut self.tx);
                    self.writes.on_piece(number, outcome.map(drop), io, replies, tx);
                }
            }
        }
    }

    /// Replies to a request with its outcome.
    fn answer(&mut self, to: ReplyTo, request: Request, outcome: io::Result<Returned>) {
        match outcome {
            #[cfg(test)]
            Ok(Returned::Extents(_)) if mutation::is_active(Mutation::DropExtents) => {
                self.replies.succeed(to, &mut self.tx);
            }
            Ok(Returned::Extents(extents)) => self.replies.status(to, &extents, &mut self.tx),
            outcome => self.replies.complete(to, outcome.map(drop), request, &mut self.tx),
        }
    }

    /// Whether to begin no request, and to suspend as soon as no I/O is in flight. The next process
    /// observes the end of the stream again, but not a framing error.
    fn is_suspending(&self) -> bool {
        use SessionEnd::{Closed, Disconnected, Truncated};
        let can_be_suspended = matches!(self.end, None | Some(Disconnected | Closed | Truncated));
        self.stop == StopRequest::Suspend && can_be_suspended
    }

    /// Whether to ignore received bytes. After the request to finish, the received ones still count.
    fn ignores_input(&self) -> bool {
        #[cfg(test)]
        if mutation::is_active(Mutation::AnswerDisconnected) {
            return false;
        } else if mutation::is_active(Mutation::FinishEarly) {
            return self.end.is_some();
        }
        !matches!(self.end, None | Some(SessionEnd::Requested(_)))
    }

    /// Whether reads wait for room in the send buffer.
    pub(super) fn has_reads(&self) -> bool {
        self.reads.wait_for_output()
    }

    /// Whether no operation is in flight.
    pub(super) fn is_quiet(&self) -> bool {
        self.io.in_flight.is_empty()
    }

    /// For the simulation.
    #[cfg(test)]
    pub(super) fn in_flight(&mut self) -> &mut InFlight<'a, Tag> {
        &mut self.io.in_flight
    }

    /// See `InFlight::descriptor`.
    pub(super) fn descriptor(&mut self) -> Option<BorrowedFd<'_>> {
        self.io.in_flight.descriptor()
    }

    /// Whether an outcome waits to be taken; there may be no further notification for it.
    pub(super) fn has_completed(&self) -> bool {
        self.io.in_flight.has_completed()
    }

    /// Whether I/O has completed since the last call.
    pub(super) fn take_has_completed(&mut self) -> bool {
        std::mem::take(&mut self.has_completed)
    }

    /// When to advance even without a notification: the closing of the gate may expire then.
    pub(super) fn gate_expiry(&self) -> Option<Instant> {
        self.io.in_flight.gate_expiry()
    }

    /// Whether a request or its payload has arrived in part.
    pub(super) fn has_partial_request(&self) -> bool {
        self.writes.is_arriving() || !self.rx.is_empty()
    }

    /// The reason to end, if everything is completed and sent.
    pub(super) fn take_end(&mut self) -> Option<SessionEnd> {
        let is_done = self.is_quiet() && !self.tx.has_bytes() && !self.has_reads();
        if is_done { self.end.take() } else { None }
    }

    /// The reason to end, whatever is left to do.
    pub(super) fn take_end_now(&mut self) -> Option<SessionEnd> {
        self.end.take()
    }

    /// The client has closed its side of the connection.
    pub(super) fn on_end_of_stream(&mut self) {
        let truncated = self.has_partial_request();
        self.end = Some(if truncated { SessionEnd::Truncated } else { SessionEnd::Closed });
    }

    /// Bytes have arrived.
    pub(super) fn on_received(&mut self) {
        self.delay.received((self.clocks.coarse)());
    }

    /// The session is about to wait; `has_backlog` if requests that have arrived cannot be begun.
    pub(super) fn on_wait(&mut self, has_backlog: bool) {
        self.delay.waits(has_backlog);
    }

    /// Its client may cause no lines in the log.
    pub(super) fn be_quiet(&mut self) {
        self.replies.be_quiet();
    }

    /// Requests begun since the last call.
    pub(super) fn take_begun(&mut self) -> u32 {
        std::mem::take(&mut self.begun)
    }

    /// Frees memory; the session is idle.
    pub(super) fn shrink(&mut self) {
        self.rx.shrink();
        self.tx.shrink();
        self.io.in_flight.shrink();
        self.settle_memory();
    }

    fn settle_memory(&mut self) {
        let loaded = self.tx.attached_memory() + self.reads.loaded_memory();
        self.io.settle_memory(loaded, self.rx.piece_memory());
    }

    /// Whether there is memory to free once the session is idle.
    pub(super) fn may_shrink(&self) -> bool {
        let shrunk = self.rx.is_shrunk() && self.tx.is_shrunk() && self.io.in_flight.is_shrunk();
        !shrunk && !self.tx.has_bytes() && self.is_quiet()
    }

    /// Begins the next request, or handles the next piece of a payload.
    fn dispatch(&mut self) -> Result<Step, SessionEnd> {
        if !self.writes.is_arriving() {
            return self.dispatch_request();
        }
        if self.writes.is_next_change(&self.rx) && self.needs_peer_check() {
            return Ok(Step::Blocked(Blocked::PeerCheck));
        }
        let (io, replies) = (&mut self.io, &mut self.replies);
        Ok(match self.writes.advance(&mut self.rx, io, replies, &mut self.tx)? {
            PayloadStep::Progress => Step::Progress,
            PayloadStep::NeedsInput => Step::NeedsInput,
            PayloadStep::Blocked(busy) => busy.into(),
            PayloadStep::Private { to, data } => Step::Blocked(Blocked::Handover(to, data)),
        })
    }

    /// Begins the next request. One that cannot be begun stays in the receive buffer.
    fn dispatch_request(&mut self) -> Result<Step, SessionEnd> {
        let dialect = self.terms.dialect;
        let (header, used) = match RequestHeader::decode(dialect, self.rx.bytes()) {
            Ok(Some(decoded)) => decoded,
            Ok(None) => return Ok(Step::NeedsInput),
            Err(malformed) => return self.reject_malformed(malformed),
        };
        let chunked = [CommandKind::Read.number(), CommandKind::BlockStatus.number()];
        let to = ReplyTo {
            cookie: header.cookie,
            offset: header.offset,
            chunked: chunked.contains(&header.kind),
        };
        let length = header.payload_length(&self.terms);
        let permitted = header.check(&self.terms).and_then(|request| self.permitted(request));
        match permitted {
            Ok(None) => return Ok(Step::Blocked(Blocked::Record)),
            Ok(Some(request)) => match self.begin(to, request, self.rx.bytes().len() == used)? {
                Step::Progress => {}
                blocked => return Ok(blocked),
            },
            Err(error) => {
                if length > SKIPPED_PAYLOAD_MAX {
                    return Err(SessionEnd::PayloadTooLong(length));
                }
                self.replies.reject(to, error.code, error.reason, &mut self.tx);
                if length > 0 {
                    self.writes.expect(to, length, Purpose::Skip { failed: None });
                }
            }
        }
        self.rx.consume(used);
        self.throttled_until = None;
        self.begun = self.begun.saturating_add(1);
        Ok(Step::Progress)
    }

    /// The request, if the policy permits it; `None` if a record has to be written first.
    fn permitted(&self, request: Request) -> Result<Option<Request>, RequestError> {
        // The policy decides on these two when they are executed.
        if matches!(request, Request::Private { .. } | Request::Disconnect) {
            return Ok(Some(request));
        }
        match self.policy.permit(self.session, request.writes()) {
            Permit::Granted => Ok(Some(request)),
            #[cfg(test)]
            Permit::RecordFirst if mutation::is_active(Mutation::SkipRecord) => Ok(Some(request)),
            Permit::RecordFirst => Ok(None),
            Permit::Refused(code, reason) => Err(RequestError { code, reason }),
        }
    }

    /// Begins a request, or returns why that has no effect now. `is_last`: no other has arrived.
    fn begin(&mut self, to: ReplyTo, request: Request, is_last: bool) -> Result<Step, SessionEnd> {
        if !self.may_begin(request) {
            return Ok(Step::Blocked(Blocked::Completion));
        }
        if request.writes() {
            if let Some(until) = self.throttle() {
                return Ok(Step::Blocked(Blocked::Throttle(until)));
            }
            // After the delay, during which the client may have disconnected.
            if self.needs_peer_check() {
                return Ok(Step::Blocked(Blocked::PeerCheck));
            }
        }
        match request {
            Request::Read { range, dont_fragment } => {
                let (io, replies) = (&mut self.io, &mut self.replies);
                let read = (to, range, dont_fragment);
                self.reads.begin(read, io, replies, &mut self.tx, is_last)?;
            }
            Request::Write { range, durable: _ } if range.is_empty() => {
                self.replies.complete(to, Ok(()), request, &mut self.tx);
            }
            Request::Write { range, durable } => self.writes.expect_write(to, range, durable),
            Request::Private { length } => {
                self.writes.expect(to, length, Purpose::Private { data: Vec::new() });
            }
            Request::Disconnect => {
                self.policy.on_disconnect(self.session);
                self.end = Some(SessionEnd::Disconnected);
            }
            Request::Flush => return self.begin_op(to, request, Op::Flush),
            Request::Trim { range, durable } => {
                return self.begin_op(to, request, Op::Trim { range, durable });
            }
            Request::Cache { range } => return self.begin_op(to, request, Op::Cache(range)),
            Request::WriteZeroes { range, no_hole, fast, durable } => {
                let how = Zeroing { keep_allocated: no_hole, only_if_fast: fast };
                return self.begin_op(to, request, Op::Zero { range, how, durable });
            }
            Request::BlockStatus { range, one } => return self.block_status(to, range, one),
        }
        Ok(Step::Progress)
    }

    /// Whether a request can begin beside the I/O in flight.
    fn may_begin(&self, request: Request) -> bool {
        let in_flight = &self.io.in_flight;
        match request {
            Request::Read { .. } => true,
            #[cfg(test)]
            Request::Disconnect if mutation::is_active(Mutation::DisconnectEarly) => true,
            #[cfg(test)]
            Request::Private { .. } if mutation::is_active(Mutation::HandOverEarly) => true,
            // All earlier requests have to be completed.
            Request::Private { .. } | Request::Disconnect => in_flight.is_empty(),
            _ => in_flight.has_room(0),
        }
    }

    fn begin_op(&mut self, to: ReplyTo, request: Request, op: Op) -> Result<Step, SessionEnd> {
        Ok(self.io.begin_answer(to, request, op)?.map_or_else(Step::from, |()| Step::Progress))
    }

    /// The policy's decision about a handover.
    pub(super) fn on_handover_reply(
        &mut self,
        to: ReplyTo,
        reply: HandoverReply,
    ) -> Result<(), SessionEnd> {
        match reply {
            HandoverReply::Acknowledge => self.replies.succeed(to, &mut self.tx),
            HandoverReply::Refuse(code) => {
                let why = "not a handover of the migration that is under way";
                self.replies.reject(to, code, why, &mut self.tx);
            }
            HandoverReply::Close => return Err(SessionEnd::Requested(StopRequest::Disconnect)),
        }
        Ok(())
    }
}

mod block_status;
mod delays;
mod malformed;
#[cfg(test)]
mod tests;
