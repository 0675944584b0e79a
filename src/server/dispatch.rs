//! Request dispatch: parses requests and payloads from the inbox, and begins to execute them.
//! Never consumes a request that cannot be begun: it stays in the inbox until I/O in flight completes.

use super::end::SessionEnd;
use super::executor::{Tag, piece_length};
use super::export_policy::HandoverReply;
use super::session_state::{Payload, PayloadPurpose};
use super::stop_request::StopRequest;
use super::transmission::Transmission;
use crate::disk::inflight::Work;
use crate::nbd::Malformed;
use crate::nbd::reply::{Dialect, ReplyTo};
use crate::nbd::request::{self, Request, RequestError, RequestHeader};
use crate::nbd::wire::{CommandKind, ErrorCode};
use crate::range::Range;
use nix::errno::Errno;
use std::io;

/// Longest payload of a refused request that is skipped, in bytes.
const SKIPPED_PAYLOAD_MAX: u64 = 1 << 32;

impl Transmission<'_> {
    /// Begins the next request, or handles the next piece of a payload; false if it has not completely
    /// arrived, or has to wait for I/O in flight.
    pub(super) fn dispatch(&mut self) -> Result<bool, SessionEnd> {
        match self.progress.payload.take() {
            None => self.dispatch_request(),
            Some(payload) => self.dispatch_payload(payload),
        }
    }

    fn dispatch_request(&mut self) -> Result<bool, SessionEnd> {
        let dialect = self.terms.dialect;
        let (header, used) = match RequestHeader::decode(dialect, self.inbox.bytes()) {
            Ok(Some(decoded)) => decoded,
            Ok(None) => return Ok(false),
            Err(malformed) => return self.reject_malformed(malformed),
        };
        let chunked = [CommandKind::Read.number(), CommandKind::BlockStatus.number()];
        let to = ReplyTo {
            cookie: header.cookie,
            offset: header.offset,
            chunked: chunked.contains(&header.kind),
        };
        let length = header.payload_length(&self.terms);
        match self.checked(&header) {
            Ok(request) => {
                self.stuck = !self.begin(to, request)?;
                if self.stuck {
                    return Ok(false);
                }
            }
            Err(error) => {
                if length > SKIPPED_PAYLOAD_MAX {
                    return Err(SessionEnd::PayloadTooLong(length));
                }
                self.worker.reject(to, error.code, error.reason, &mut self.outbox);
                if length > 0 {
                    let purpose = PayloadPurpose::Skip { failed: None };
                    self.progress.payload = Some(Payload { to, remaining: length, purpose });
                }
            }
        }
        self.inbox.consume(used);
        self.begun = self.begun.saturating_add(1);
        Ok(true)
    }

    /// Checks a request against the protocol and the policy.
    fn checked(&self, header: &RequestHeader) -> Result<Request, RequestError> {
        let request = header.check(&self.terms)?;
        // The policy decides on these two when they are executed.
        if !matches!(request, Request::Private { .. } | Request::Disconnect) {
            let (policy, session) = (self.worker.policy, self.worker.session);
            let permitted = policy.permit(session, request.writes());
            permitted.map_err(|(code, reason)| RequestError { code, reason })?;
        }
        Ok(request)
    }

    /// Begins a request; false, with no effect, if it has to wait for I/O in flight.
    fn begin(&mut self, to: ReplyTo, request: Request) -> Result<bool, SessionEnd> {
        if !self.may_begin(request) {
            return Ok(false);
        }
        if request.writes() && !self.worker.throttle(self.stream)? {
            return Ok(false);
        }
        // After the delay, during which the client may have disconnected.
        if request.writes() {
            self.check_client_is_connected()?;
        }
        match request {
            Request::Read { range, dont_fragment } => {
                let read = self.worker.read(to, range, dont_fragment, &mut self.outbox);
                self.progress.reads.extend(read);
            }
            Request::Write { range, durable: _ } if range.is_empty() => {
                self.worker.complete(to, Ok(()), request, &mut self.outbox);
            }
            Request::Write { range, durable } => self.expect_payload(to, range, range, durable),
            Request::Private { length } => {
                let purpose = PayloadPurpose::Private { data: Vec::new() };
                self.progress.payload = Some(Payload { to, remaining: length, purpose });
            }
            Request::Disconnect => {
                self.worker.policy.on_disconnect(self.worker.session);
                self.progress.end = Some(SessionEnd::Disconnected);
            }
            _ => return self.worker.answer(to, request, &mut self.outbox),
        }
        Ok(true)
    }

    /// Ends the session if a change has waited long and its client has closed the connection since: the
    /// client may have reconnected, and the change would overwrite its newer ones. Changes that did
    /// not wait are made even if the connection is closed behind them.
    fn check_client_is_connected(&mut self) -> Result<(), SessionEnd> {
        if self.delay.needs_check() && self.stream.has_peer_ended().is_ok_and(|ended| ended) {
            return Err(SessionEnd::Truncated);
        }
        Ok(())
    }

    /// Whether a request can begin beside the I/O in flight.
    fn may_begin(&self, request: Request) -> bool {
        let in_flight = &self.worker.in_flight;
        match request {
            Request::Read { .. } => true,
            Request::Write { .. }
            | Request::Trim { .. }
            | Request::WriteZeroes { .. }
            | Request::Flush
            | Request::Cache { .. }
            | Request::BlockStatus { .. } => in_flight.has_room(0),
            // All earlier requests have to be completed.
            Request::Private { .. } | Request::Disconnect => in_flight.is_empty(),
        }
    }

    fn dispatch_payload(&mut self, payload: Payload) -> Result<bool, SessionEnd> {
        let Payload { to, remaining, purpose } = payload;
        match purpose {
            PayloadPurpose::Skip { failed } => Ok(self.skip(to, remaining, failed)),
            PayloadPurpose::Write { range, rest, durable } => self.write(to, range, rest, durable),
            PayloadPurpose::Private { data } => self.private(to, remaining, data),
        }
    }

    /// Writes the next piece of a payload if it has completely arrived: the session must not hold a
    /// visit while it waits for the client.
    fn write(
        &mut self,
        to: ReplyTo,
        range: Range,
        rest: Range,
        durable: bool,
    ) -> Result<bool, SessionEnd> {
        let (piece, then) = rest.split(piece_length(rest));
        // It fits: a piece is at most 256 KiB.
        let length = piece.length() as usize;
        if self.inbox.bytes().len() < length {
            self.expect_payload(to, range, rest, durable);
            return Ok(false);
        }
        let visit = match self.worker.visit()? {
            Some(visit) if self.worker.in_flight.has_room(length) => visit,
            _ => {
                self.expect_payload(to, range, rest, durable);
                self.stuck = true;
                return Ok(false);
            }
        };
        self.check_client_is_connected()?;
        let request = Request::Write { range, durable };
        let is_clear = self.worker.in_flight.is_clear(piece);
        // A single piece is written durably by itself; several are flushed after the last one.
        if piece == range && (durable || !is_clear || visit.cold_edges(range).is_some()) {
            let mut data = Vec::new();
            if data.try_reserve_exact(length).is_err() {
                return Err(SessionEnd::Connection(Errno::ENOMEM.into()));
            }
            data.extend_from_slice(&self.inbox.bytes()[..length]);
            let work = Work::Write { offset: range.offset(), data, durable };
            self.inbox.consume(length);
            self.worker.in_flight.begin(visit, work, Tag::Answer { to, request });
            return Ok(true);
        }
        let needs_order = !is_clear || !self.worker.in_flight.writes_are_ordered();
        if needs_order && !self.is_next_change(piece) {
            self.expect_payload(to, range, rest, durable);
            self.stuck = true;
            return Ok(false);
        }
        let outcome = visit.write(piece.offset(), &self.inbox.bytes()[..length]);
        self.waiting_change = None;
        self.written += piece.length();
        self.worker.in_flight.record_write(piece);
        self.inbox.consume(length);
        match outcome {
            Ok(()) if !then.is_empty() => self.expect_payload(to, range, then, durable),
            Ok(()) if durable => {
                let tag = Tag::Answer { to, request };
                self.worker.in_flight.begin(visit, Work::Flush, tag);
            }
            Err(error) if !then.is_empty() => {
                let purpose = PayloadPurpose::Skip { failed: Some((request, error)) };
                self.progress.payload = Some(Payload { to, remaining: then.length(), purpose });
            }
            outcome => self.worker.complete(to, outcome, request, &mut self.outbox),
        }
        Ok(true)
    }

    /// Registers a piece of a longer write among the changes in flight, unless it is; false if it has
    /// to wait for earlier changes.
    fn is_next_change(&mut self, piece: Range) -> bool {
        let in_flight = &self.worker.in_flight;
        self.waiting_change.get_or_insert_with(|| in_flight.register_change(piece)).is_first()
    }

    fn expect_payload(&mut self, to: ReplyTo, range: Range, rest: Range, durable: bool) {
        let purpose = PayloadPurpose::Write { range, rest, durable };
        self.progress.payload = Some(Payload { to, remaining: rest.length(), purpose });
    }

    fn skip(&mut self, to: ReplyTo, remaining: u64, failed: Option<(Request, io::Error)>) -> bool {
        let step = remaining.min(self.inbox.bytes().len() as u64);
        // It fits: at most the length of the inbox.
        self.inbox.consume(step as usize);
        let remaining = remaining - step;
        if remaining > 0 {
            self.progress.payload =
                Some(Payload { to, remaining, purpose: PayloadPurpose::Skip { failed } });
        } else if let Some((request, error)) = failed {
            self.worker.complete(to, Err(error), request, &mut self.outbox);
        }
        step > 0
    }

    /// The private command. All earlier requests are completed, so that it is executed at once.
    fn private(
        &mut self,
        to: ReplyTo,
        remaining: u64,
        mut data: Vec<u8>,
    ) -> Result<bool, SessionEnd> {
        // It fits: at most the length of the inbox.
        let step = remaining.min(self.inbox.bytes().len() as u64) as usize;
        data.extend_from_slice(&self.inbox.bytes()[..step]);
        self.inbox.consume(step);
        let remaining = remaining - step as u64;
        // Reads may have started I/O since the request was begun.
        self.stuck = remaining == 0 && !self.worker.in_flight.is_empty();
        if remaining > 0 || self.stuck {
            self.progress.payload =
                Some(Payload { to, remaining, purpose: PayloadPurpose::Private { data } });
            return Ok(step > 0 && !self.stuck);
        }
        match self.worker.policy.handover(self.worker.session, &data) {
            HandoverReply::Acknowledge => {
                self.outbox.reply(|out| self.worker.dialect.success(to, out));
            }
            HandoverReply::Refuse(code) => {
                let why = "not a handover of the migration that is under way";
                self.worker.reject(to, code, why, &mut self.outbox);
            }
            HandoverReply::Close => return Err(SessionEnd::Requested(StopRequest::Disconnect)),
        }
        Ok(true)
    }

    /// Ends the session because framing is lost. In old style it first replies with an error, once as
    /// many bytes as a request header have arrived.
    fn reject_malformed(&mut self, malformed: Malformed) -> Result<bool, SessionEnd> {
        let magic = match malformed {
            Malformed::Magic(magic) => magic as u32,
            _ => 0,
        };
        let end = SessionEnd::BadMagic(magic);
        if !self.answers_malformed {
            return Err(end);
        }
        let bytes = self.inbox.bytes();
        if bytes.len() < request::header_length(Dialect::Simple) {
            return Ok(false);
        }
        let cookie = bytes[8..].first_chunk::<8>().map_or(0, |bytes| u64::from_be_bytes(*bytes));
        let to = ReplyTo { cookie, offset: 0, chunked: false };
        self.worker.reject(to, ErrorCode::Invalid, "no request at all", &mut self.outbox);
        self.progress.end = Some(end);
        Ok(true)
    }
}
