//! A scripted client: sends requests of every kind, and checks that each is answered once and correctly.

use super::model::{Model, Stamp, cell_size, fill, stamp_of};
use super::policy::{REFUSED, ScriptedPolicy, handover_reply};
use super::request::{Draft, Mix, changes};
use crate::nbd::reply::{Chunk, Dialect, ReplyHeader};
use crate::nbd::request::Terms;
use crate::nbd::wire::{CommandFlags, CommandKind, ErrorCode, PRIVATE_COMMAND};
use crate::schedules::ByteQueue;
use crate::server::export_policy::HandoverReply;
use std::collections::BTreeMap;
use std::ops::Range;

/// A request without a complete reply.
#[derive(Debug)]
struct Unanswered {
    kind: u16,
    flags: CommandFlags,
    offset: u64,
    cells: Range<usize>,
    durable: bool,
    sent: u64,
    /// Bytes that the client had sent with its end.
    end: u64,
    /// Its number in the model, if it changes bytes.
    change: Option<usize>,
    /// Cells of a read that a reply has contained.
    received: Vec<bool>,
    /// The extents of its range have been received.
    is_described: bool,
    /// The error of its reply, if the request is invalid.
    refusal: Option<ErrorCode>,
    /// The error of its reply.
    failed: Option<u32>,
    /// The client has not sent all of it.
    is_partial: bool,
}

/// How a client ends its connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    /// Closes its side after the last request.
    Close,
    /// Closes its side in the middle of a request.
    Truncate,
    /// Sends `NBD_CMD_DISC`, and possibly requests behind it.
    Disconnect,
    /// Sends bytes that are no request.
    Malformed,
    /// Announces a payload that is too long to be skipped.
    LongPayload,
    /// Sends a handover that closes the session.
    Handover,
}

/// What clients need to know of their schedule.
pub(super) struct Script<'a> {
    pub(super) rng: &'a mut fastrand::Rng,
    pub(super) model: &'a mut Model,
    pub(super) policy: &'a ScriptedPolicy,
    pub(super) mix: Mix,
    /// The next stamp that no cell has had.
    pub(super) stamp: &'a mut Stamp,
}

/// One client's connection.
#[derive(Debug)]
pub(super) struct ScriptedClient {
    session: u64,
    pub(super) terms: Terms,
    /// Sent, and not received by the server.
    pub(super) outgoing: ByteQueue,
    pub(super) incoming: ByteQueue,
    unanswered: BTreeMap<u64, Unanswered>,
    next_cookie: u64,
    /// Bytes of requests so far.
    sent: u64,
    /// It has sent the last request.
    pub(super) ending: Option<Ending>,
    /// The disk may fail.
    pub(super) may_fail: bool,
    pub(super) answered: u64,
    pub(super) refused: u64,
    pub(super) invalid: u64,
}

impl ScriptedClient {
    pub(super) fn new(session: u64, terms: Terms, may_fail: bool) -> Self {
        Self {
            session,
            terms,
            outgoing: ByteQueue::default(),
            incoming: ByteQueue::default(),
            unanswered: BTreeMap::new(),
            next_cookie: 1,
            sent: 0,
            ending: None,
            may_fail,
            answered: 0,
            refused: 0,
            invalid: 0,
        }
    }

    /// How many requests have to be answered.
    pub(super) fn depth(&self) -> usize {
        self.unanswered.values().filter(|request| !request.is_partial).count()
    }

    /// The requests that are not answered, for a message.
    pub(super) fn describe(&self) -> String {
        let first: Vec<_> = self.unanswered.iter().take(3).collect();
        format!("session {}: {} requests: {first:?}", self.session, self.unanswered.len())
    }

    /// Forgets the requests of which the server has received only a part, of so many bytes.
    pub(super) fn forget_unreceived(&mut self, received: u64) {
        self.unanswered
            .values_mut()
            .for_each(|request| request.is_partial |= request.end > received);
    }

    /// Sends a request.
    pub(super) fn request(&mut self, script: &mut Script<'_>) {
        let draft = if script.rng.u8(..10) == 0 {
            Draft::invalid(script.rng, &self.terms, script.model)
        } else {
            Draft::valid(script.rng, &self.terms, script.model, script.mix)
        };
        self.send(draft, script);
    }

    fn send(&mut self, draft: Draft, script: &mut Script<'_>) -> u64 {
        let cookie = self.next_cookie;
        self.next_cookie += 1;
        let cells = draft.cells();
        let stamp = stamp_for(&draft, script);
        let is_change = draft.refusal.is_none() && changes(draft.kind) && !cells.is_empty();
        let change = is_change.then(|| script.model.on_sent(self.session, cells.clone(), stamp));
        let mut bytes = Vec::new();
        let refusal = self.encode(&draft, cookie, stamp, script, &mut bytes).or(draft.refusal);
        self.outgoing.extend(&bytes);
        self.sent += bytes.len() as u64;
        let is_read = draft.kind == CommandKind::Read.number();
        let request = Unanswered {
            kind: draft.kind,
            flags: draft.flags,
            offset: draft.offset,
            durable: is_change && draft.flags.contains(CommandFlags::FUA),
            sent: script.model.tick(),
            end: self.sent,
            change,
            received: if is_read { vec![false; cells.len()] } else { Vec::new() },
            cells,
            is_described: false,
            refusal,
            failed: None,
            is_partial: false,
        };
        self.unanswered.insert(cookie, request);
        if self.ending == Some(Ending::Handover) {
            // It has no reply.
            self.unanswered.values_mut().next_back().unwrap().is_partial = true;
        }
        cookie
    }

    /// Encodes a request with its payload. Returns the error of the reply to a handover.
    fn encode(
        &mut self,
        draft: &Draft,
        cookie: u64,
        stamp: Stamp,
        script: &mut Script<'_>,
        bytes: &mut Vec<u8>,
    ) -> Option<ErrorCode> {
        draft.encode(cookie, self.terms.dialect, bytes);
        if !draft.has_payload {
            return None;
        }
        let start = bytes.len();
        bytes.resize(start + draft.length as usize, 0);
        if draft.kind != PRIVATE_COMMAND || draft.refusal.is_some() {
            fill(&mut bytes[start..], stamp);
            return None;
        }
        let payload = &mut bytes[start..];
        payload
            .iter_mut()
            .enumerate()
            .for_each(|(nth, byte)| *byte = (cookie as usize ^ nth) as u8);
        if let Some(first) = payload.first_mut() {
            *first = [0, 0, 0, 1, 2][script.rng.usize(..5)];
        }
        script.policy.on_handover_sent(self.session, payload.to_vec());
        match handover_reply(payload) {
            HandoverReply::Acknowledge => None,
            HandoverReply::Refuse(code) => Some(code),
            HandoverReply::Close => {
                self.ending = Some(Ending::Handover);
                None
            }
        }
    }

    /// Sends its last bytes.
    pub(super) fn end(&mut self, script: &mut Script<'_>) {
        if self.ending.is_some() {
            return;
        }
        let ending = match script.rng.u8(..12) {
            0..4 => Ending::Close,
            4..8 => Ending::Disconnect,
            8..10 => Ending::Truncate,
            10 if self.terms.dialect == Dialect::Extended => Ending::LongPayload,
            _ => Ending::Malformed,
        };
        self.ending = Some(ending);
        match ending {
            Ending::Close | Ending::Handover => return,
            Ending::Truncate => return self.send_partially(script),
            Ending::Disconnect => {
                let kind = CommandKind::Disconnect.number();
                self.send_header(Draft { kind, ..no_request() });
            }
            Ending::Malformed => self.send_malformed(script),
            Ending::LongPayload => {
                let (kind, length) = (CommandKind::Write.number(), (1 << 32) + 1);
                self.send_header(Draft { kind, length, ..no_request() });
            }
        }
        // Nothing of this may be executed or answered.
        for _ in 0..script.rng.u8(..3) {
            let draft = Draft::valid(script.rng, &self.terms, script.model, Mix::Usual);
            if draft.kind != PRIVATE_COMMAND {
                let (stamp, mut bytes) = (stamp_for(&draft, script), Vec::new());
                self.encode(&draft, u64::MAX, stamp, script, &mut bytes);
                self.outgoing.extend(&bytes);
            }
        }
    }

    fn send_header(&mut self, draft: Draft) {
        let mut bytes = Vec::new();
        draft.encode(0, self.terms.dialect, &mut bytes);
        self.outgoing.extend(&bytes);
    }

    fn send_malformed(&mut self, script: &mut Script<'_>) {
        let replies = self.terms.reads_beyond_end_are_no_space;
        let start = self.outgoing.bytes.len();
        let refusal = Some(ErrorCode::Invalid);
        let cookie = self.send(Draft { refusal, ..no_request() }, script);
        self.outgoing.bytes[start] ^= 0xff;
        // Only in old style it has a reply.
        if !replies {
            self.unanswered.remove(&cookie);
        }
    }

    /// Sends the beginning of a write.
    fn send_partially(&mut self, script: &mut Script<'_>) {
        let is_write = |draft: &Draft| draft.kind == CommandKind::Write.number();
        let draft = loop {
            let draft = Draft::valid(script.rng, &self.terms, script.model, Mix::Usual);
            if is_write(&draft) {
                break draft;
            }
        };
        let before = self.outgoing.len();
        let cookie = self.send(draft, script);
        let length = self.outgoing.len() - before;
        let kept = self.outgoing.bytes.len() - script.rng.usize(1..length);
        self.outgoing.bytes.truncate(kept);
        if let Some(request) = self.unanswered.get_mut(&cookie) {
            request.is_partial = true;
        }
    }

    /// The connection is lost.
    pub(super) fn abandon(&mut self, model: &mut Model) {
        self.incoming = ByteQueue::default();
        for (_, request) in std::mem::take(&mut self.unanswered) {
            if let Some(change) = request.change {
                model.on_ended(change, false, false);
            }
        }
    }

    /// Checks the replies in the received bytes.
    pub(super) fn receive(
        &mut self,
        model: &mut Model,
        policy: &ScriptedPolicy,
    ) -> Result<(), String> {
        let mut incoming = std::mem::take(&mut self.incoming);
        while let Some(count) = self.reply(incoming.bytes(), model, policy)? {
            incoming.consume(count);
        }
        self.incoming = incoming;
        Ok(())
    }

    /// Handles the first reply or chunk, and returns its length; `None` if it is incomplete.
    fn reply(
        &mut self,
        bytes: &[u8],
        model: &mut Model,
        policy: &ScriptedPolicy,
    ) -> Result<Option<usize>, String> {
        let header = ReplyHeader::decode(bytes).map_err(|error| format!("a reply: {error:?}"))?;
        let Some((header, used)) = header else { return Ok(None) };
        let (ReplyHeader::Simple { cookie, .. } | ReplyHeader::Chunk { cookie, .. }) = header;
        let rest = &bytes[used..];
        let request = self.unanswered.get_mut(&cookie);
        let (session, ending) = (self.session, self.ending);
        let request = request.ok_or_else(|| {
            format!("session {session}, {ending:?}: {header:?} has the cookie of no request")
        })?;
        request.check_form(self.terms.dialect, &header)?;
        let (length, done) = match header {
            ReplyHeader::Simple { error, .. } => {
                let has_data = request.kind == CommandKind::Read.number() && error == 0;
                let length = if has_data { request.cells.len() * cell_size() as usize } else { 0 };
                if rest.len() < length {
                    return Ok(None);
                }
                request.failed = (error != 0).then_some(error);
                if has_data {
                    request.on_data(request.offset, &rest[..length], model)?;
                }
                (length, true)
            }
            ReplyHeader::Chunk { kind, length, done, .. } => {
                let length = usize::try_from(length).unwrap();
                if rest.len() < length {
                    return Ok(None);
                }
                let needed = Chunk::needed(kind, length as u64) as usize;
                let chunk = Chunk::decode(kind, length as u64, &rest[..needed]);
                let chunk = chunk.map_err(|error| format!("a chunk: {error:?}"))?;
                request.on_chunk(chunk, &rest[needed..length], model)?;
                (length, done)
            }
        };
        if done && let Some(request) = self.unanswered.remove(&cookie) {
            self.answered += 1;
            match request.failed {
                Some(code) => self.on_failed(&request, code, model, policy)?,
                None => on_succeeded(&request, model)?,
            }
        }
        Ok(Some(used + length))
    }

    fn on_failed(
        &mut self,
        request: &Unanswered,
        code: u32,
        model: &mut Model,
        policy: &ScriptedPolicy,
    ) -> Result<(), String> {
        let may_be_refused = match request.refusal {
            Some(refusal) if refusal.number() == code => {
                self.invalid += 1;
                return Ok(());
            }
            // The policy is asked first.
            refusal => refusal.is_none_or(|refusal| refusal == ErrorCode::Overflow),
        };
        let is_slow = request.refusal.is_none()
            && code == ErrorCode::NotSupported.number()
            && request.flags.contains(CommandFlags::FAST_ZERO);
        let is_refused = code == REFUSED.number() && may_be_refused && policy.may_refuse();
        if is_slow || is_refused {
            self.refused += u64::from(is_refused);
            request.change.into_iter().for_each(|change| model.on_refused(change));
            return Ok(());
        }
        if code != ErrorCode::Io.number() || request.refusal.is_some() || !self.may_fail {
            return Err(format!("{request:?} fails"));
        }
        request.change.into_iter().for_each(|change| model.on_ended(change, false, false));
        let is_flush = request.kind == CommandKind::Flush.number();
        if (is_flush || changes(request.kind)) && !policy.knows_failure() {
            return Err(format!("the policy does not know that {request:?} fails"));
        }
        if is_flush {
            model.on_flush_failed();
        }
        Ok(())
    }
}

fn on_succeeded(request: &Unanswered, model: &mut Model) -> Result<(), String> {
    if request.refusal.is_some() || request.is_partial {
        return Err(format!("{request:?} succeeds"));
    }
    if let Some(change) = request.change {
        let overwrites = request.kind != CommandKind::Trim.number();
        model.on_ended(change, overwrites, request.durable && overwrites);
    }
    let is_flush = request.kind == CommandKind::Flush.number();
    if (request.durable || is_flush) && !model.allows_flush(request.sent) {
        return Err(format!("{request:?} succeeds after a failed flush"));
    }
    if is_flush {
        model.on_flushed(request.sent);
    }
    let is_status = request.kind == CommandKind::BlockStatus.number();
    let is_described = request.is_described || !is_status || request.cells.is_empty();
    if !is_described || !request.received.iter().all(|received| *received) {
        return Err(format!("the reply to {request:?} is incomplete"));
    }
    Ok(())
}

/// The stamp of a request's data.
fn stamp_for(draft: &Draft, script: &mut Script<'_>) -> Stamp {
    if draft.kind != CommandKind::Write.number() || script.rng.u8(..6) == 0 {
        return 0;
    }
    *script.stamp += 1;
    *script.stamp
}

fn no_request() -> Draft {
    Draft {
        kind: CommandKind::Read.number(),
        flags: CommandFlags::empty(),
        offset: 0,
        length: 0,
        has_payload: false,
        refusal: None,
    }
}

impl Unanswered {
    /// Whether the reply has the negotiated form.
    fn check_form(&self, dialect: Dialect, header: &ReplyHeader) -> Result<(), String> {
        let chunked = [CommandKind::Read.number(), CommandKind::BlockStatus.number()];
        let is_right = match (dialect, header) {
            (Dialect::Simple, ReplyHeader::Simple { .. }) => true,
            (Dialect::Structured, ReplyHeader::Simple { .. }) => !chunked.contains(&self.kind),
            (Dialect::Structured, ReplyHeader::Chunk { offset, .. }) => {
                chunked.contains(&self.kind) && offset.is_none()
            }
            (Dialect::Extended, ReplyHeader::Chunk { offset, .. }) => *offset == Some(self.offset),
            _ => false,
        };
        if is_right { Ok(()) } else { Err(format!("{header:?} in reply to {self:?}")) }
    }

    fn on_chunk(&mut self, chunk: Chunk, data: &[u8], model: &Model) -> Result<(), String> {
        match chunk {
            Chunk::None => Ok(()),
            Chunk::Data { offset } => self.on_data(offset, data, model),
            Chunk::Hole { offset, length } => {
                let first = (offset / cell_size()) as usize;
                let count = (u64::from(length) / cell_size()) as usize;
                (first..first + count).try_for_each(|cell| self.on_cell(cell, 0, model))
            }
            Chunk::Status { extents, .. } => self.on_status(&extents, model),
            Chunk::Error { code, .. } => {
                self.failed = Some(code.number());
                Ok(())
            }
        }
    }

    fn on_status(&mut self, extents: &[(u64, u32)], model: &Model) -> Result<(), String> {
        let mut offset = self.offset;
        for (length, flags) in extents {
            let cells = (offset / cell_size()) as usize..((offset + length) / cell_size()) as usize;
            for cell in cells {
                if *flags != 0 && !model.allows_read(cell, 0, self.sent) {
                    return Err(format!("cell {cell} is no hole for {self:?}"));
                }
            }
            offset += length;
        }
        let is_all = offset == self.cells.end as u64 * cell_size();
        let is_one = extents.len() == 1 && self.flags.contains(CommandFlags::REQ_ONE);
        self.is_described = is_all || is_one;
        Ok(())
    }

    fn on_data(&mut self, offset: u64, data: &[u8], model: &Model) -> Result<(), String> {
        let cells = (offset / cell_size()) as usize..;
        cells
            .zip(data.chunks_exact(cell_size() as usize))
            .try_for_each(|(cell, bytes)| self.on_cell(cell, stamp_of(bytes), model))
    }

    fn on_cell(&mut self, cell: usize, stamp: Stamp, model: &Model) -> Result<(), String> {
        let at = cell.checked_sub(self.cells.start);
        match at.and_then(|at| self.received.get_mut(at)) {
            Some(received) if !*received => *received = true,
            _ => return Err(format!("cell {cell} is received twice or unasked: {self:?}")),
        }
        if !model.allows_read(cell, stamp, self.sent) {
            return Err(format!("cell {cell} reads as {stamp} for {self:?}"));
        }
        Ok(())
    }
}
