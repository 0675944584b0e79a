//! Taking requests and their payloads out of the inbox, and beginning what they ask for.
//! Never takes what cannot be begun: it stays where it is until errands have made way.

use super::control::StopRequest;
use super::end::SessionEnd;
use super::policy::HandoverReply;
use super::progress::{Payload, PayloadPurpose};
use super::transmission::Transmission;
use super::work::{Tag, piece_length};
use crate::disk::inflight::Work;
use crate::nbd::Malformed;
use crate::nbd::reply::{Dialect, ReplyTo};
use crate::nbd::request::{self, Header, Request, RequestError};
use crate::nbd::wire::{CommandKind, ErrorCode};
use crate::range::Range;
use nix::errno::Errno;
use std::io;

/// Longest payload of a refused request that is read past.
const PAYLOAD_ABSURD: u64 = 1 << 32;

impl Transmission<'_> {
    /// Takes the next request, or piece of a payload, out of the inbox; false if it is not all
    /// there, or has to wait for errands.
    pub(super) fn take(&mut self) -> Result<bool, SessionEnd> {
        match self.progress.payload.take() {
            None => self.take_request(),
            Some(payload) => self.take_payload(payload),
        }
    }

    fn take_request(&mut self) -> Result<bool, SessionEnd> {
        let dialect = self.terms.dialect;
        let (header, used) = match Header::decode(dialect, self.inbox.bytes()) {
            Ok(Some(decoded)) => decoded,
            Ok(None) => return Ok(false),
            Err(malformed) => return self.take_nonsense(malformed),
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
            Err(refusal) => {
                if length > PAYLOAD_ABSURD {
                    return Err(SessionEnd::PayloadTooLong(length));
                }
                self.worker.refuse(to, refusal.code, refusal.why, &mut self.outbox);
                if length > 0 {
                    let purpose = PayloadPurpose::Skip { failed: None };
                    self.progress.payload = Some(Payload { to, left: length, purpose });
                }
            }
        }
        self.inbox.consume(used);
        self.taken = self.taken.saturating_add(1);
        Ok(true)
    }

    /// What the client wants, or why it cannot have it, by the protocol or by whose disk it is.
    fn checked(&self, header: &Header) -> Result<Request, RequestError> {
        let request = header.check(&self.terms)?;
        // These two say on their own what they do for whom.
        if !matches!(request, Request::Private { .. } | Request::Disconnect) {
            let (policy, session) = (self.worker.policy, self.worker.session);
            let permitted = policy.permit(session, request.writes());
            permitted.map_err(|(code, why)| RequestError { code, why })?;
        }
        Ok(request)
    }

    /// Begins with a request; false if it has to wait for errands, and nothing has been done.
    fn begin(&mut self, to: ReplyTo, request: Request) -> Result<bool, SessionEnd> {
        if !self.may_begin(request) {
            return Ok(false);
        }
        if request.writes() && !self.worker.hold_back(self.stream)? {
            return Ok(false);
        }
        // After the delay, in which the client may have gone.
        if request.writes() {
            self.check_that_it_counts()?;
        }
        match request {
            Request::Read { range, whole } => {
                let read = self.worker.read(to, range, whole, &mut self.outbox);
                self.progress.reads.extend(read);
            }
            Request::Write { range, durable: _ } if range.is_empty() => {
                self.worker.conclude(to, Ok(()), request, &mut self.outbox);
            }
            Request::Write { range, durable } => self.go_on_with(to, range, range, durable),
            Request::Private { length } => {
                let purpose = PayloadPurpose::Private { data: Vec::new() };
                self.progress.payload = Some(Payload { to, left: length, purpose });
            }
            Request::Disconnect => {
                self.worker.policy.on_disconnect(self.worker.session);
                self.progress.leaving = Some(SessionEnd::Goodbye);
            }
            _ => return self.worker.answer(to, request, &mut self.outbox),
        }
        Ok(true)
    }

    /// Ends the session rather than make a change that came long ago from a client that has ended
    /// its side since: it may be connected anew, and the change would be made over newer ones. What
    /// can be made as it comes is made.
    fn check_that_it_counts(&mut self) -> Result<(), SessionEnd> {
        if self.delay.needs_check() && self.stream.has_peer_ended().is_ok_and(|ended| ended) {
            return Err(SessionEnd::Truncated);
        }
        Ok(())
    }

    /// Whether no errand stands in the way of a request.
    fn may_begin(&self, request: Request) -> bool {
        let errands = &self.worker.in_flight;
        match request {
            Request::Read { .. } => true,
            Request::Write { .. }
            | Request::Trim { .. }
            | Request::WriteZeroes { .. }
            | Request::Flush
            | Request::Cache { .. }
            | Request::BlockStatus { .. } => errands.has_room(0),
            // Everything before them has to be done.
            Request::Private { .. } | Request::Disconnect => errands.is_empty(),
        }
    }

    fn take_payload(&mut self, payload: Payload) -> Result<bool, SessionEnd> {
        let Payload { to, left, purpose } = payload;
        match purpose {
            PayloadPurpose::Skip { failed } => Ok(self.skip(to, left, failed)),
            PayloadPurpose::Write { range, rest, durable } => self.write(to, range, rest, durable),
            PayloadPurpose::Private { data } => self.private(to, left, data),
        }
    }

    /// Writes the next piece of a payload, if all of the piece has arrived: the disk is not
    /// visited while the client takes its time.
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
            self.go_on_with(to, range, rest, durable);
            return Ok(false);
        }
        let visit = match self.worker.visit()? {
            Some(visit) if self.worker.in_flight.has_room(length) => visit,
            _ => {
                self.go_on_with(to, range, rest, durable);
                self.stuck = true;
                return Ok(false);
            }
        };
        self.check_that_it_counts()?;
        let what = Request::Write { range, durable };
        let is_clear = self.worker.in_flight.is_clear(piece);
        // One piece is written durably; of several, all are made durable after the last.
        if piece == range && (durable || !is_clear || visit.cold_edges(range).is_some()) {
            let mut data = Vec::new();
            if data.try_reserve_exact(length).is_err() {
                return Err(SessionEnd::Connection(Errno::ENOMEM.into()));
            }
            data.extend_from_slice(&self.inbox.bytes()[..length]);
            let work = Work::Write { offset: range.offset(), data, durable };
            self.inbox.consume(length);
            self.worker.in_flight.begin(visit, work, Tag::Answer { to, request: what });
            return Ok(true);
        }
        let needs_place = !is_clear || !self.worker.in_flight.writes_are_ordered();
        if needs_place && !self.takes_place(piece) {
            self.go_on_with(to, range, rest, durable);
            self.stuck = true;
            return Ok(false);
        }
        let outcome = visit.write(piece.offset(), &self.inbox.bytes()[..length]);
        self.place = None;
        self.written += piece.length();
        self.worker.in_flight.record_write(piece);
        self.inbox.consume(length);
        match outcome {
            Ok(()) if !then.is_empty() => self.go_on_with(to, range, then, durable),
            Ok(()) if durable => {
                let aside = Tag::Answer { to, request: what };
                self.worker.in_flight.begin(visit, Work::Flush, aside);
            }
            Err(error) if !then.is_empty() => {
                let purpose = PayloadPurpose::Skip { failed: Some((what, error)) };
                self.progress.payload = Some(Payload { to, left: then.length(), purpose });
            }
            outcome => self.worker.conclude(to, outcome, what, &mut self.outbox),
        }
        Ok(true)
    }

    /// Takes a place among the changes in flight for a piece of a longer write, unless it has one;
    /// false if the piece has to wait for earlier ones.
    fn takes_place(&mut self, piece: Range) -> bool {
        let errands = &self.worker.in_flight;
        self.place.get_or_insert_with(|| errands.register_change(piece)).is_first()
    }

    /// The rest of a write is to come.
    fn go_on_with(&mut self, to: ReplyTo, range: Range, rest: Range, durable: bool) {
        let purpose = PayloadPurpose::Write { range, rest, durable };
        self.progress.payload = Some(Payload { to, left: rest.length(), purpose });
    }

    fn skip(&mut self, to: ReplyTo, left: u64, failed: Option<(Request, io::Error)>) -> bool {
        let step = left.min(self.inbox.bytes().len() as u64);
        // It fits: no more than what is in the inbox.
        self.inbox.consume(step as usize);
        let left = left - step;
        if left > 0 {
            self.progress.payload =
                Some(Payload { to, left, purpose: PayloadPurpose::Skip { failed } });
        } else if let Some((what, error)) = failed {
            self.worker.conclude(to, Err(error), what, &mut self.outbox);
        }
        step > 0
    }

    /// The private command: everything before it is done, so that it can be obeyed at once.
    fn private(&mut self, to: ReplyTo, left: u64, mut data: Vec<u8>) -> Result<bool, SessionEnd> {
        // It fits: no more than what is in the inbox.
        let step = left.min(self.inbox.bytes().len() as u64) as usize;
        data.extend_from_slice(&self.inbox.bytes()[..step]);
        self.inbox.consume(step);
        let left = left - step as u64;
        // Reads may have begun errands since it was announced.
        self.stuck = left == 0 && !self.worker.in_flight.is_empty();
        if left > 0 || self.stuck {
            self.progress.payload =
                Some(Payload { to, left, purpose: PayloadPurpose::Private { data } });
            return Ok(step > 0 && !self.stuck);
        }
        match self.worker.policy.handover(self.worker.session, &data) {
            HandoverReply::Acknowledge => {
                self.outbox.reply(|out| self.worker.dialect.success(to, out));
            }
            HandoverReply::Refuse(code) => {
                let why = "not a handover of the migration that is under way";
                self.worker.refuse(to, code, why, &mut self.outbox);
            }
            HandoverReply::Close => return Err(SessionEnd::Requested(StopRequest::Disconnect)),
        }
        Ok(true)
    }

    /// Bytes that are no request: framing is lost, and the session with it. In old style they are
    /// answered first, once there are as many as a request has.
    fn take_nonsense(&mut self, malformed: Malformed) -> Result<bool, SessionEnd> {
        let magic = match malformed {
            Malformed::Magic(magic) => magic as u32,
            _ => 0,
        };
        let end = SessionEnd::BadMagic(magic);
        if !self.answers_nonsense {
            return Err(end);
        }
        let bytes = self.inbox.bytes();
        if bytes.len() < request::header_length(Dialect::Simple) {
            return Ok(false);
        }
        let cookie = bytes[8..].first_chunk::<8>().map_or(0, |bytes| u64::from_be_bytes(*bytes));
        let to = ReplyTo { cookie, offset: 0, chunked: false };
        self.worker.refuse(to, ErrorCode::Invalid, "no request at all", &mut self.outbox);
        self.progress.leaving = Some(end);
        Ok(true)
    }
}
