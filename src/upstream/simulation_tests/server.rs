//! A scripted server: receives the bytes of several connections, executes requests in any order, and
//! sends its replies late, in any dialect and division.

use super::cells::{CELL, CellValue, value_of};
use super::coverage::UpstreamReached;
use super::replying::{ScriptedReply, ServerAnswer};
use super::scene::Scene;
use crate::nbd::request::{RequestHeader, Terms};
use crate::nbd::wire::{CommandFlags, CommandKind, ErrorCode, TransmissionFlags};
use crate::schedules::ByteQueue;
use crate::upstream::machine::{Cause, UpstreamMachine};
use crate::upstream::terms::ServerTerms;
use std::ops::Range;

/// A request that is not executed.
#[derive(Debug)]
pub(super) struct ReceivedRequest {
    /// `None` if it is lost.
    connection: Option<usize>,
    header: RequestHeader,
    kind: CommandKind,
    cells: Range<usize>,
    values: Vec<CellValue>,
    cause: Cause,
    time: u64,
}

impl ReceivedRequest {
    /// The cells that it changes.
    fn changes(&self) -> Range<usize> {
        use CommandKind::{Trim, Write, WriteZeroes};
        let changes = matches!(self.kind, Write | WriteZeroes | Trim);
        if changes { self.cells.clone() } else { 0..0 }
    }
}

fn do_overlap(one: &Range<usize>, other: &Range<usize>) -> bool {
    one.start < other.end && other.start < one.end
}

/// A request that was received, and has no reply.
#[derive(Debug)]
struct InFlightRequest {
    cookie: u64,
    /// Empty unless it is a change.
    changes: Range<usize>,
    is_replay: bool,
}

/// What the server does wrong.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct ServerFaults {
    /// It fails some reads and changes.
    pub(super) fails: bool,
    /// It fails some flushes and durable writes.
    pub(super) fails_flushes: bool,
    /// It is shutting down.
    pub(super) is_leaving: bool,
    /// It breaks the protocol.
    pub(super) misbehaves: bool,
}

/// One process of a server, and its connections.
#[derive(Debug)]
pub(super) struct ScriptedUpstream {
    terms: ServerTerms,
    /// Of the first server.
    promised: TransmissionFlags,
    inboxes: Vec<ByteQueue>,
    pub(super) outboxes: Vec<ByteQueue>,
    received: Vec<ReceivedRequest>,
    in_flight: Vec<InFlightRequest>,
    replies: Vec<ScriptedReply>,
    has_served: bool,
    pub(super) faults: ServerFaults,
}

impl ScriptedUpstream {
    pub(super) fn new(
        terms: ServerTerms,
        promised: TransmissionFlags,
        connections: usize,
        faults: ServerFaults,
    ) -> Self {
        let boxes = || (0..connections).map(|_| ByteQueue::default()).collect();
        Self {
            terms,
            promised,
            inboxes: boxes(),
            outboxes: boxes(),
            received: Vec::new(),
            in_flight: Vec::new(),
            replies: Vec::new(),
            has_served: false,
            faults,
        }
    }

    /// Bytes arrive.
    pub(super) fn receive(
        &mut self,
        connection: usize,
        bytes: &[u8],
        machine: &UpstreamMachine,
        scene: &mut Scene<'_>,
    ) -> Result<(), String> {
        self.inboxes[connection].extend(bytes);
        let terms = Terms {
            size: self.terms.size,
            // Nothing else may be used.
            flags: self.promised & self.terms.flags,
            dialect: self.terms.dialect,
            allocation_selected: self.terms.allocation_context.is_some(),
            payload_length_max: self.terms.payload_max,
            private: false,
            reads_beyond_end_are_no_space: false,
        };
        loop {
            let inbox = &mut self.inboxes[connection];
            let decoded = RequestHeader::decode(self.terms.dialect, inbox.bytes())
                .map_err(|why| format!("the server receives no request: {why:?}"))?;
            let Some((header, used)) = decoded else { return Ok(()) };
            let payload = header.payload_length(&terms) as usize;
            let Some(bytes) = inbox.bytes().get(used..used + payload) else { return Ok(()) };
            let values: Option<Vec<_>> = bytes.chunks(CELL).map(value_of).collect();
            let values = values.ok_or_else(|| format!("a torn payload: {header:?}"))?;
            inbox.consume(used + payload);
            header.check(&terms).map_err(|why| format!("{}: {header:?}", why.reason))?;
            let kind = CommandKind::try_from(header.kind).map_err(|_| "a kind".to_owned())?;
            let cause = machine.cause_of(header.cookie).ok_or("a request without a cause")?;
            let (start, length) = (header.offset as usize, header.length as usize);
            let cells = start / CELL..(start + length).div_ceil(CELL);
            let time = scene.image.tick();
            let connection = Some(connection);
            let received = ReceivedRequest { connection, header, kind, cells, values, cause, time };
            self.check_blocks(&received)?;
            self.register(&received, scene)?;
            self.received.push(received);
        }
    }

    /// Whether a request consists of whole blocks.
    fn check_blocks(&self, request: &ReceivedRequest) -> Result<(), String> {
        let RequestHeader { offset, length, .. } = request.header;
        let block = u64::from(self.terms.block_min);
        let is_empty = length == 0 && request.kind != CommandKind::Flush;
        if !offset.is_multiple_of(block) || !length.is_multiple_of(block) || is_empty {
            return Err(format!("not a number of blocks: {request:?}"));
        }
        Ok(())
    }

    /// Checks a request against those in flight.
    fn register(&mut self, request: &ReceivedRequest, scene: &mut Scene<'_>) -> Result<(), String> {
        let is_replay = request.cause == Cause::Replay;
        if is_replay {
            if self.has_served {
                return Err(format!("a replay after a request: {request:?}"));
            }
            scene.coverage.count(UpstreamReached::Replayed);
            for (nth, cell) in request.cells.clone().enumerate() {
                let value = request.values.get(nth).copied().unwrap_or(0);
                scene.model.check_replay(cell, value)?;
            }
        } else if request.cause != Cause::Probe {
            self.has_served = true;
            if self.in_flight.iter().any(|other| other.is_replay) {
                return Err(format!("sent during the replay: {request:?}"));
            }
        }
        let changes = request.changes();
        let overlaps = |other: &InFlightRequest| do_overlap(&other.changes, &changes);
        if self.in_flight.iter().any(overlaps) {
            return Err(format!("overlapping changes are in flight: {request:?}"));
        }
        let cookie = request.header.cookie;
        if self.in_flight.iter().any(|other| other.cookie == cookie) {
            return Err(format!("a request has a cookie in flight: {request:?}"));
        }
        self.in_flight.push(InFlightRequest { cookie, changes, is_replay });
        Ok(())
    }

    /// Executes one of the requests; false if there is none.
    pub(super) fn execute(&mut self, scene: &mut Scene<'_>) -> bool {
        let Some(request) = self.take_request(scene) else { return false };
        let Some(connection) = request.connection else {
            scene.coverage.count(UpstreamReached::Lingering);
            self.answer(&request, scene);
            return true;
        };
        let may_misbehave = self.faults.misbehaves && scene.rng.u8(..6) == 0;
        if may_misbehave && self.outboxes.len() > 1 && scene.rng.bool() {
            // Replies to a request over another connection, and does not execute it.
            scene.coverage.count(UpstreamReached::Misbehaved);
            let other = (connection + 1) % self.outboxes.len();
            let mut reply = ScriptedReply::new(self.terms, other, request.header);
            reply.answer(ServerAnswer::Success, scene);
            self.replies.push(reply);
            return true;
        }
        let mut reply = ScriptedReply::new(self.terms, connection, request.header);
        reply.is_incomplete = may_misbehave;
        let answer = self.answer(&request, scene);
        let is_change = matches!(answer, ServerAnswer::Success) && !request.cells.is_empty();
        reply.acknowledges = if is_change { request.cells } else { 0..0 };
        reply.answer(answer, scene);
        self.replies.push(reply);
        true
    }

    /// A request to execute. Of overlapping changes, which come from several generations of connections, it
    /// is the one that has arrived first.
    fn take_request(&mut self, scene: &mut Scene<'_>) -> Option<ReceivedRequest> {
        if self.received.is_empty() {
            return None;
        }
        let mut nth = scene.rng.usize(..self.received.len());
        if self.received[nth].kind == CommandKind::Flush && scene.rng.u8(..4) > 0 {
            // A flush takes longer than others.
            nth = scene.rng.usize(..self.received.len());
        }
        let changes = self.received[nth].changes();
        let overlaps = |other: &&ReceivedRequest| do_overlap(&other.changes(), &changes);
        let first = self.received.iter().filter(overlaps).min_by_key(|other| other.time);
        let time = first.map_or(self.received[nth].time, |first| first.time);
        let nth = self.received.iter().position(|request| request.time == time)?;
        Some(self.received.swap_remove(nth))
    }

    /// Whether to fail a request.
    fn fails(&self, request: &ReceivedRequest, is_durable: bool, rng: &mut fastrand::Rng) -> bool {
        // A server must remember the failure of a flush that it can report to no connection, as ours does:
        // no client could find out.
        let fails_flushes = self.faults.fails_flushes && request.connection.is_some();
        match request.cause {
            Cause::OwnFlush(_) => fails_flushes && rng.u8(..3) == 0,
            _ if is_durable || request.kind == CommandKind::Flush => {
                fails_flushes && rng.u8(..12) == 0
            }
            Cause::Replay => self.faults.fails && rng.u8(..3) == 0,
            _ => self.faults.fails && rng.u8(..8) == 0,
        }
    }

    fn answer(&self, request: &ReceivedRequest, scene: &mut Scene<'_>) -> ServerAnswer {
        if self.faults.is_leaving {
            scene.coverage.count(UpstreamReached::ShutDown);
            return ServerAnswer::Error(ErrorCode::Shutdown);
        }
        let flags = CommandFlags::from_bits_truncate(request.header.flags);
        let is_durable = flags.contains(CommandFlags::FUA);
        let fails = self.fails(request, is_durable, scene.rng);
        let cells = request.cells.clone();
        let error = if scene.rng.bool() { ErrorCode::Io } else { ErrorCode::NoSpace };
        if fails && is_durable {
            scene.model.distrusts_flushes = true;
        }
        match request.kind {
            CommandKind::Read if fails && scene.rng.u8(..4) == 0 => {
                ServerAnswer::Error(ErrorCode::Io)
            }
            CommandKind::Read => {
                let fails = fails.then_some(ErrorCode::Io);
                ServerAnswer::Data(cells.map(|cell| scene.image.volatile(cell)).collect(), fails)
            }
            CommandKind::WriteZeroes
                if flags.contains(CommandFlags::FAST_ZERO) && scene.rng.u8(..3) == 0 =>
            {
                ServerAnswer::Error(ErrorCode::NotSupported)
            }
            CommandKind::Write | CommandKind::WriteZeroes | CommandKind::Trim => {
                let is_partial = fails && scene.rng.bool();
                for (nth, cell) in cells.clone().enumerate() {
                    let value = match request.kind {
                        CommandKind::Trim if scene.rng.bool() => continue,
                        _ => request.values.get(nth).copied().unwrap_or(0),
                    };
                    if !fails || (is_partial && scene.rng.bool()) {
                        scene.image.set(cell, value);
                    }
                }
                if is_durable && fails {
                    scene.image.fail_flush(cells);
                } else if is_durable {
                    cells.for_each(|cell| scene.image.write_back(cell));
                }
                if fails { ServerAnswer::Error(error) } else { ServerAnswer::Success }
            }
            CommandKind::Flush => self.flush(request, fails, scene),
            CommandKind::BlockStatus => {
                ServerAnswer::Extents(cells.map(|cell| scene.image.volatile(cell) == 0).collect())
            }
            CommandKind::Cache | CommandKind::Disconnect => ServerAnswer::Success,
        }
    }

    fn flush(&self, request: &ReceivedRequest, fails: bool, scene: &mut Scene<'_>) -> ServerAnswer {
        if !fails {
            scene.image.flush(request.time, scene.rng);
            return ServerAnswer::Success;
        }
        let is_own = matches!(request.cause, Cause::OwnFlush(_));
        scene.coverage.count_if(is_own, UpstreamReached::OwnFlushFailed);
        scene.coverage.count_if(!is_own, UpstreamReached::FlushFailed);
        scene.model.distrusts_flushes |= !is_own;
        scene.image.fail_flush(0..scene.image.len());
        ServerAnswer::Error(ErrorCode::Io)
    }

    /// Sends a piece of one of the replies; false if there is none.
    pub(super) fn reply(&mut self, scene: &mut Scene<'_>) -> bool {
        if self.replies.is_empty() {
            return false;
        }
        let nth = scene.rng.usize(..self.replies.len());
        let reply = &mut self.replies[nth];
        if let Some(piece) = reply.pieces.pop_front() {
            self.outboxes[reply.connection].extend(&piece);
        }
        if reply.pieces.is_empty() {
            let reply = self.replies.swap_remove(nth);
            scene.image.acknowledge(reply.acknowledges);
            self.in_flight.retain(|request| request.cookie != reply.cookie);
        }
        true
    }

    /// The connections or the process are lost: some of the requests that were received are executed.
    /// Returns those that a process which goes on will execute beside the requests of new connections.
    pub(super) fn end(mut self, goes_on: bool, scene: &mut Scene<'_>) -> Vec<ReceivedRequest> {
        let executes_all = scene.rng.bool();
        let mut late = Vec::new();
        while let Some(mut request) = self.take_request(scene) {
            let changes = request.changes();
            let waits = |other: &ReceivedRequest| do_overlap(&other.changes(), &changes);
            let is_late = late.iter().any(waits) || scene.rng.bool();
            if goes_on && !self.faults.is_leaving && is_late {
                request.connection = None;
                late.push(request);
            } else if executes_all || scene.rng.bool() {
                scene.coverage.count(UpstreamReached::Late);
                self.answer(&request, scene);
            }
        }
        late
    }

    /// The process has not executed these requests of lost connections.
    pub(super) fn go_on(&mut self, late: Vec<ReceivedRequest>) {
        self.received = late;
    }

    /// What it is doing, for a message.
    pub(super) fn describe(&self) -> String {
        format!("{} received, {} replies", self.received.len(), self.replies.len())
    }
}
