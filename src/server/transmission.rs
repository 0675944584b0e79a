//! The transmission phase of one session: requests in, replies out, in batches.
//!
//! Reading requests and sending replies never wait for each other. While the client takes no
//! replies, reads wait in a queue, everything else is still done, and only when the queue or the
//! held replies reach their limits does the session stop receiving: back-pressure in bounded
//! memory, so that a client may send a long row of requests before it reads the first reply.
//!
//! Nor do requests wait for each other: what the disk takes long for is an errand, and what was
//! asked behind it may be answered before. Only these wait, with all that is behind them: a change
//! to what an errand is changing; what must come last; and anything while there is no room for
//! more errands, or while the gate is closed and somebody waits for those under way.

use super::carry::{Carried, Phase, Serving};
use super::end::SessionEnd;
use super::inbox::Inbox;
use super::orders::Order;
use super::outbox::Outbox;
use super::progress::{Payload, Progress, Purpose};
use super::reading::Step;
use super::reception::Conclusion;
use super::work::{Aside, Worker, piece_length};
use crate::disk::Visit;
use crate::disk::errands::Work;
use crate::nbd::Malformed;
use crate::nbd::reply::{Dialect, Origin};
use crate::nbd::request::{self, Header, Refusal, Request, Terms};
use crate::nbd::wire::{CommandKind, ErrorCode};
use crate::net::{Interest, Stream};
use crate::range::Range;
use std::io;
use std::time::{Duration, Instant};

/// How many reads may wait for the client to take replies.
pub(super) const READS_MAX: usize = 1024;
/// When less than this was received at once, it is not worth asking for more before waiting: a
/// client with one or two requests under way waits for their replies first.
const DRAINED_BELOW: usize = 64;
/// After this time without anything to do, a session gives its buffers back.
const IDLE: Duration = Duration::from_secs(1);
/// Longest payload of a refused request that is read past.
const PAYLOAD_ABSURD: u64 = 1 << 32;

/// One session's transmission phase.
#[derive(Debug)]
pub(super) struct Transmission<'a> {
    pub(super) stream: &'a Stream,
    pub(super) worker: Worker<'a>,
    pub(super) terms: Terms,
    /// Answer bytes that are no request with an error before closing, as the original did.
    pub(super) answers_nonsense: bool,
    pub(super) stall_limit: Option<Duration>,
    pub(super) inbox: Inbox,
    pub(super) outbox: Outbox,
    pub(super) progress: Progress,
    /// Nothing more can be begun before an errand is over.
    pub(super) stuck: bool,
}

impl<'a> Transmission<'a> {
    /// Serves until the session ends; what it was in the middle of when it was packed up.
    pub(super) fn run(mut self) -> (SessionEnd, Option<Carried>) {
        loop {
            match self.turn() {
                Ok(()) => {}
                Err(SessionEnd::PackedUp) => return (SessionEnd::PackedUp, Some(self.pack())),
                Err(end) => return (end, None),
            }
        }
    }

    /// Nothing is under way on the disk: what is held here is all there is.
    fn pack(self) -> Carried {
        let Terms { dialect, allocation_selected, .. } = self.terms;
        Carried {
            session: self.worker.session,
            inbox: self.inbox.bytes().to_vec(),
            outbox: self.outbox.pack(),
            phase: Phase::Transmission(Serving {
                form: dialect.into(),
                allocation_selected,
                outstanding: self.progress.pack(),
            }),
        }
    }

    fn turn(&mut self) -> Result<(), SessionEnd> {
        // Before anything that arrived after the order is answered.
        self.obey()?;
        self.work()?;
        self.worker.errands.submit();
        let blocked = self.is_blocked();
        let sent_all = self.send()?;
        let quiet = self.worker.errands.is_empty();
        if self.is_packing() {
            return if quiet { Err(SessionEnd::PackedUp) } else { self.wait() };
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
        let before = self.outbox.waiting();
        let (stream, reads) = (self.stream, &mut self.progress.reads);
        let sent_all = self.outbox.send(stream).map_err(SessionEnd::Connection)?
            && self.worker.send_from_disk(stream, reads, &mut self.outbox)?;
        self.progress.sent += before.saturating_sub(self.outbox.waiting());
        Ok(sent_all)
    }

    /// Does everything that can be done without waiting for the client or for an errand.
    fn work(&mut self) -> Result<(), SessionEnd> {
        self.stuck = false;
        loop {
            self.conclude_errands();
            if self.is_packing() {
                return Ok(());
            }
            self.answer_reads()?;
            if self.stuck || self.is_blocked() || self.has_said_goodbye() || !self.take()? {
                return Ok(());
            }
        }
    }

    /// Answers what errands are over for.
    fn conclude_errands(&mut self) {
        while let Some((aside, outcome)) = self.worker.errands.next_over() {
            match aside {
                Aside::Answer { to, request } => {
                    self.worker.conclude(to, outcome, request, &mut self.outbox);
                }
                Aside::Read(mut read, range, since) => {
                    self.worker.patience.note(range.length(), since.elapsed());
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
                Step::GoesOn => {}
                Step::Answered => drop(self.progress.reads.pop_front()),
                Step::Cold(visit, range) => self.load(visit, range)?,
                Step::Waits => self.stuck = true,
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
        let now = Instant::now();
        if self.has_nothing_else_to_do()
            && self.worker.patience.waits(range.length())
            && let Some(read) = self.progress.reads.front_mut()
        {
            drop(visit);
            read.warm();
            if let Step::Answered = self.worker.advance(read, &mut self.outbox)? {
                self.progress.reads.pop_front();
            }
            self.worker.patience.note(range.length(), now.elapsed());
        } else if self.worker.errands.has_room(0) {
            if let Some(read) = self.progress.reads.pop_front() {
                let aside = Aside::Read(read, range, now);
                self.worker.errands.begin(visit, Work::Load(range), aside);
            }
        } else {
            self.stuck = true;
        }
        Ok(())
    }

    /// Whether everything that the client has sent has been answered but for one read.
    fn has_nothing_else_to_do(&self) -> bool {
        let answered = self.worker.errands.is_empty() && self.outbox.is_empty();
        answered && self.progress.reads.len() == 1 && self.inbox.bytes().is_empty()
    }

    /// Whether to stop as soon as nothing is under way on the disk, and to begin nothing.
    fn is_packing(&self) -> bool {
        self.worker.orders.current() == Order::PackUp && self.progress.can_be_packed()
    }

    /// Whether nothing more may be taken on before the client takes replies.
    fn is_blocked(&self) -> bool {
        self.outbox.is_overfull() || self.progress.reads.len() >= READS_MAX
    }

    /// Whether nothing that the client sends counts any more. After the order to finish, what has
    /// been received still does.
    fn has_said_goodbye(&self) -> bool {
        !matches!(self.progress.leaving, None | Some(SessionEnd::Ordered(_)))
    }

    /// Not while stuck: that the client has ended its side is to be seen after all that it said.
    fn receives(&self) -> bool {
        let takes_on = !self.stuck && !self.is_blocked() && !self.is_packing();
        self.progress.leaving.is_none() && takes_on && !self.inbox.is_full()
    }

    /// Receives what has arrived; false if nothing has.
    fn receive(&mut self) -> Result<bool, SessionEnd> {
        match self.inbox.receive(self.stream) {
            Ok(0) => {
                let half = self.progress.payload.is_some() || !self.inbox.bytes().is_empty();
                let end = if half { SessionEnd::Vanished } else { SessionEnd::Left };
                self.progress.leaving = Some(end);
                Ok(true)
            }
            Ok(count) => {
                self.progress.received += count as u64;
                self.progress.drained = count < DRAINED_BELOW;
                Ok(true)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(error) => Err(SessionEnd::Connection(error)),
        }
    }

    /// Takes the next request, or piece of a payload, out of the inbox; false if it is not all
    /// there, or has to wait for errands.
    fn take(&mut self) -> Result<bool, SessionEnd> {
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
        let to = Origin {
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
                    return Err(SessionEnd::AbsurdPayload(length));
                }
                self.worker.refuse(to, refusal.code, refusal.why, &mut self.outbox);
                if length > 0 {
                    let purpose = Purpose::Skip { failed: None };
                    self.progress.payload = Some(Payload { to, left: length, purpose });
                }
            }
        }
        self.inbox.consume(used);
        Ok(true)
    }

    /// What the client wants, or why it cannot have it, by the protocol or by whose disk it is.
    fn checked(&self, header: &Header) -> Result<Request, Refusal> {
        let request = header.check(&self.terms)?;
        if request.writes() {
            let permitted = self.worker.reception.permit(self.worker.session);
            permitted.map_err(|(code, why)| Refusal { code, why })?;
        }
        Ok(request)
    }

    /// Begins with a request; false if it has to wait for errands, and nothing has been done.
    fn begin(&mut self, to: Origin, request: Request) -> Result<bool, SessionEnd> {
        if !self.may_begin(request) {
            return Ok(false);
        }
        if request.writes() && !self.worker.hold_back(self.stream)? {
            return Ok(false);
        }
        match request {
            Request::Read { range, whole } => {
                let read = self.worker.read(to, range, whole, &mut self.outbox);
                self.progress.reads.extend(read);
            }
            Request::Write { range, durable: _ } if range.is_empty() => {
                self.worker.conclude(to, Ok(()), request, &mut self.outbox);
            }
            Request::Write { range, durable } => {
                let purpose = Purpose::Write { range, rest: range, durable };
                self.progress.payload = Some(Payload { to, left: range.length(), purpose });
            }
            Request::Private { length } => {
                let purpose = Purpose::Private { data: Vec::new() };
                self.progress.payload = Some(Payload { to, left: length, purpose });
            }
            Request::Disconnect => {
                self.worker.reception.said_goodbye(self.worker.session);
                self.progress.leaving = Some(SessionEnd::Goodbye);
            }
            _ => return self.worker.answer(to, request, &mut self.outbox),
        }
        Ok(true)
    }

    /// Whether no errand stands in the way of a request.
    fn may_begin(&self, request: Request) -> bool {
        let errands = &self.worker.errands;
        match request {
            Request::Read { .. } => true,
            Request::Write { range, .. }
            | Request::Trim { range, .. }
            | Request::WriteZeroes { range, .. } => errands.has_room(0) && !errands.change(range),
            Request::Flush | Request::Cache { .. } | Request::BlockStatus { .. } => {
                errands.has_room(0)
            }
            // Everything before them has to be done.
            Request::Private { .. } | Request::Disconnect => errands.is_empty(),
        }
    }

    fn take_payload(&mut self, payload: Payload) -> Result<bool, SessionEnd> {
        let Payload { to, left, purpose } = payload;
        match purpose {
            Purpose::Skip { failed } => Ok(self.skip(to, left, failed)),
            Purpose::Write { range, rest, durable } => self.write(to, range, rest, durable),
            Purpose::Private { data } => self.private(to, left, data),
        }
    }

    /// Writes the next piece of a payload, if all of the piece has arrived: the disk is not
    /// visited while the client takes its time.
    fn write(
        &mut self,
        to: Origin,
        range: Range,
        rest: Range,
        durable: bool,
    ) -> Result<bool, SessionEnd> {
        let (piece, then) = rest.split(piece_length(rest));
        // It fits: a piece is at most 256 KiB.
        let length = piece.length() as usize;
        let Some(data) = self.inbox.bytes().get(..length) else {
            let purpose = Purpose::Write { range, rest, durable };
            self.progress.payload = Some(Payload { to, left: rest.length(), purpose });
            return Ok(false);
        };
        let visit = match self.worker.visit()? {
            Some(visit) if self.worker.errands.has_room(length) => visit,
            _ => {
                let purpose = Purpose::Write { range, rest, durable };
                self.progress.payload = Some(Payload { to, left: rest.length(), purpose });
                self.stuck = true;
                return Ok(false);
            }
        };
        let what = Request::Write { range, durable };
        // One piece is written durably; of several, all are made durable after the last.
        if piece == range && (durable || visit.cold_edges(range).is_some()) {
            let work = Work::Write { offset: range.offset(), data: data.to_vec(), durable };
            self.inbox.consume(length);
            self.worker.errands.begin(visit, work, Aside::Answer { to, request: what });
            return Ok(true);
        }
        let outcome = visit.write(piece.offset(), data);
        self.inbox.consume(length);
        match outcome {
            Ok(()) if !then.is_empty() => {
                let purpose = Purpose::Write { range, rest: then, durable };
                self.progress.payload = Some(Payload { to, left: then.length(), purpose });
            }
            Ok(()) if durable => {
                let aside = Aside::Answer { to, request: what };
                self.worker.errands.begin(visit, Work::Flush, aside);
            }
            Err(error) if !then.is_empty() => {
                let purpose = Purpose::Skip { failed: Some((what, error)) };
                self.progress.payload = Some(Payload { to, left: then.length(), purpose });
            }
            outcome => self.worker.conclude(to, outcome, what, &mut self.outbox),
        }
        Ok(true)
    }

    fn skip(&mut self, to: Origin, left: u64, failed: Option<(Request, io::Error)>) -> bool {
        let step = left.min(self.inbox.bytes().len() as u64);
        // It fits: no more than what is in the inbox.
        self.inbox.consume(step as usize);
        let left = left - step;
        if left > 0 {
            self.progress.payload = Some(Payload { to, left, purpose: Purpose::Skip { failed } });
        } else if let Some((what, error)) = failed {
            self.worker.conclude(to, Err(error), what, &mut self.outbox);
        }
        step > 0
    }

    /// The private command: everything before it is done, so that it can be obeyed at once.
    fn private(&mut self, to: Origin, left: u64, mut data: Vec<u8>) -> Result<bool, SessionEnd> {
        // It fits: no more than what is in the inbox.
        let step = left.min(self.inbox.bytes().len() as u64) as usize;
        data.extend_from_slice(&self.inbox.bytes()[..step]);
        self.inbox.consume(step);
        let left = left - step as u64;
        // Reads may have begun errands since it was announced.
        self.stuck = left == 0 && !self.worker.errands.is_empty();
        if left > 0 || self.stuck {
            self.progress.payload = Some(Payload { to, left, purpose: Purpose::Private { data } });
            return Ok(step > 0 && !self.stuck);
        }
        match self.worker.reception.handed_over(self.worker.session, &data) {
            Conclusion::Acknowledge => {
                self.outbox.reply(|out| self.worker.dialect.success(to, out));
            }
            Conclusion::Refuse(code) => {
                let why = "not a handover of the migration that is under way";
                self.worker.refuse(to, code, why, &mut self.outbox);
            }
            Conclusion::Silence => return Err(SessionEnd::Ordered(Order::Leave)),
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
        let end = SessionEnd::NoRequest(magic);
        if !self.answers_nonsense {
            return Err(end);
        }
        let bytes = self.inbox.bytes();
        if bytes.len() < request::header_length(Dialect::Simple) {
            return Ok(false);
        }
        let cookie = bytes[8..].first_chunk::<8>().map_or(0, |bytes| u64::from_be_bytes(*bytes));
        let to = Origin { cookie, offset: 0, chunked: false };
        self.worker.refuse(to, ErrorCode::Invalid, "no request at all", &mut self.outbox);
        self.progress.leaving = Some(end);
        Ok(true)
    }

    /// Waits until the client, the server, the disk, or the clock wants something.
    fn wait(&mut self) -> Result<(), SessionEnd> {
        if self.worker.errands.has_news() {
            return Ok(());
        }
        // What is to come from the disk cannot be sent while the gate keeps us out.
        let barred = !self.outbox.due_from_disk().is_empty() && self.worker.is_barred();
        let writable = self.outbox.has_bytes() && !barred;
        let interest = Interest { readable: self.receives(), writable };
        let now = Instant::now();
        let stalled = self.stalled_at(now, writable);
        let deadline = stalled.or_else(|| self.may_relax().then(|| now + IDLE));
        let wake = &self.worker.orders.wake;
        let ready =
            self.stream.wait(interest, Some(wake), deadline).map_err(SessionEnd::Connection)?;
        if ready.readable {
            self.progress.drained = false;
        }
        if ready.woken {
            wake.clear();
            return Ok(());
        }
        if ready.timed_out && stalled.is_some() {
            return Err(SessionEnd::Stalled);
        }
        if ready.timed_out {
            self.inbox.relax();
            self.outbox.relax();
            self.worker.errands.relax();
        }
        Ok(())
    }

    /// Whether there is memory to give back once nothing has happened for a while.
    fn may_relax(&self) -> bool {
        let errands = &self.worker.errands;
        let relaxed = self.inbox.is_relaxed() && self.outbox.is_relaxed() && errands.is_relaxed();
        !relaxed && !self.outbox.has_bytes() && errands.is_empty()
    }

    fn obey(&mut self) -> Result<(), SessionEnd> {
        match self.worker.orders.current() {
            Order::Serve | Order::PackUp => Ok(()),
            Order::Finish => {
                self.progress.leaving.get_or_insert(SessionEnd::Ordered(Order::Finish));
                Ok(())
            }
            order => Err(SessionEnd::Ordered(order)),
        }
    }

    /// When `--killswitch` strikes, unless something moves before. Nobody is to blame for what
    /// waits for the disk.
    fn stalled_at(&mut self, now: Instant, sends: bool) -> Option<Instant> {
        let limit = self.stall_limit?;
        let begun = self.progress.payload.is_some() || !self.inbox.bytes().is_empty();
        let half = begun && !self.stuck;
        let Progress { request_stall, reply_stall, received, sent, .. } = &mut self.progress;
        let request = request_stall.deadline(half, *received, now, limit);
        let reply = reply_stall.deadline(sends, *sent, now, limit);
        request.into_iter().chain(reply).min()
    }
}
