//! What to send next.
//! Pure.

use super::request::{UpstreamRequest, UpstreamTask};
use super::{Cause, LinkStage, OwnFlush, SentMessage, UpstreamMachine};
use crate::disk::{Buffer, Extent};
use crate::nbd::reply::Dialect;
use crate::nbd::request::RequestHeader;
use crate::nbd::wire::{CommandFlags, CommandKind, TransmissionFlags};
use crate::range::Range;
#[cfg(test)]
use crate::upstream::mutation::{self, UpstreamMutation};
use crate::upstream::terms::ServerTerms;
use crate::upstream::unflushed::UnflushedContent;
use std::sync::Arc;

/// Longest range of a request without payload to a server without extended headers, in bytes: a request
/// has a length of 32 bits, and the kernel's own limit of one discard is below it.
pub(super) const COMPACT_LENGTH_MAX: u64 = 1 << 31;

/// A message to be sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::upstream) struct OutgoingMessage {
    /// Its header.
    pub(in crate::upstream) header: RequestHeader,
    /// The data of a write.
    pub(in crate::upstream) payload: Option<PayloadPart>,
    /// Only the session that has caused it waits for its reply.
    pub(in crate::upstream) is_of_session: bool,
}

/// A part of a buffer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::upstream) struct PayloadPart {
    /// The buffer.
    pub(in crate::upstream) data: Arc<Buffer>,
    /// The first byte in it.
    pub(in crate::upstream) start: usize,
    /// The number of bytes.
    pub(in crate::upstream) length: usize,
}

impl PayloadPart {
    /// The bytes.
    #[must_use]
    pub(in crate::upstream) fn bytes(&self) -> &[u8] {
        &self.data[self.start..self.start + self.length]
    }
}

/// What to do with the request at the head of a queue.
enum NextStep {
    Send(OutgoingMessage),
    /// Nothing has to be sent.
    Complete,
    /// It waits for memory.
    Hold,
}

impl UpstreamMachine {
    /// The next message for a connection, if there is one. It counts as sent.
    pub(in crate::upstream) fn next_message(
        &mut self,
        connection: usize,
    ) -> Option<OutgoingMessage> {
        if self.probe_wanted == Some(connection) {
            self.probe_wanted = None;
            let block = Range::whole(self.terms.size).split(u64::from(self.terms.block_min)).0;
            if !block.is_empty() {
                let cookie = self.own_cookie();
                let command = (CommandKind::Read, CommandFlags::empty());
                return Some(self.message(connection, cookie, command, block, Cause::Probe));
            }
        }
        match self.stage {
            LinkStage::Disconnected | LinkStage::Closed => return None,
            LinkStage::Replaying { offset, unanswered } => {
                return self.next_replay(connection, offset, unanswered);
            }
            LinkStage::Resending { .. } | LinkStage::Serving => {}
        }
        loop {
            if self.stage == LinkStage::Serving && self.own_flush == OwnFlush::Wanted {
                self.own_flush = OwnFlush::InFlight;
                let cause = Cause::OwnFlush(self.stamp);
                let cookie = self.own_cookie();
                let command = (CommandKind::Flush, CommandFlags::empty());
                return Some(self.message(connection, cookie, command, Range::whole(0), cause));
            }
            let id = *self.ready.get(connection)?.front()?;
            match self.next_of(connection, id) {
                Some(NextStep::Send(message)) => return Some(message),
                Some(NextStep::Hold) => self.hold(id),
                Some(NextStep::Complete) => self.complete(id, None),
                None => {}
            }
            self.ready[connection].pop_front();
        }
    }

    /// Holds a change back until a flush has freed memory.
    fn hold(&mut self, id: u64) {
        self.held.push_back(id);
        if self.own_flush == OwnFlush::Idle && !self.unflushed.is_empty() {
            self.own_flush = OwnFlush::Wanted;
        }
    }

    fn next_replay(
        &mut self,
        connection: usize,
        offset: u64,
        unanswered: usize,
    ) -> Option<OutgoingMessage> {
        let (start, end, content) = self.unflushed.next(offset)?;
        let rest = Range::whole(self.terms.size).from(start).until(end);
        let (kind, flags, limit) = match &content {
            UnflushedContent::Data { .. } => {
                (CommandKind::Write, CommandFlags::empty(), u64::from(self.terms.payload_max))
            }
            UnflushedContent::Zeros { keep_allocated } => {
                let mut flags = CommandFlags::empty();
                flags.set(CommandFlags::NO_HOLE, *keep_allocated);
                (CommandKind::WriteZeroes, flags, length_max(&self.terms))
            }
        };
        let part = rest.split(limit).0;
        let offset = part.end();
        #[cfg(test)]
        let offset = match mutation::is_active(UpstreamMutation::ReplayFirstPart) {
            true => end,
            false => offset,
        };
        self.stage = LinkStage::Replaying { offset, unanswered: unanswered + 1 };
        let cookie = self.own_cookie();
        let mut message = self.message(connection, cookie, (kind, flags), part, Cause::Replay);
        if let UnflushedContent::Data { data, at } = content {
            // Fits: at most the longest payload.
            message.payload = Some(PayloadPart { data, start: at, length: part.length() as usize });
        }
        Some(message)
    }

    /// The next message of a request. `None` if there is no such request.
    fn next_of(&mut self, connection: usize, id: u64) -> Option<NextStep> {
        let terms = self.terms;
        if answer_without_message(&mut self.requests.get_mut(&id)?.task, &terms) {
            return Some(NextStep::Complete);
        }
        if !self.reserve(id) {
            return Some(NextStep::Hold);
        }
        let request = self.requests.get_mut(&id)?;
        let range = request.task.range();
        let (kind, flags, limit) = command(request, &terms);
        let part = range.from(request.next).split(limit).0;
        request.next = match request.task {
            // The reply need not describe the whole range, and the client asks again for the rest.
            UpstreamTask::Extents { .. } => range.end(),
            _ => part.end(),
        };
        request.unanswered += 1;
        let is_single = part.offset() == range.offset() && request.next >= range.end();
        request.stamp = self.stamp;
        let payload = payload(request, part);
        if request.next >= range.end() {
            self.ready[connection].pop_front();
        }
        let cookie = self.cookie_of_request(id, is_single);
        let cause = Cause::Request(id);
        let mut message = self.message(connection, cookie, (kind, flags), part, cause);
        message.payload = payload;
        Some(NextStep::Send(message))
    }

    /// The cookie for the next message of a request, which is sent as a single one or in several.
    fn cookie_of_request(&mut self, id: u64, is_single: bool) -> u64 {
        let request = self.requests.get_mut(&id);
        let (wanted, has_begun) = request.map_or((None, false), |request| {
            (request.cookie.take(), std::mem::replace(&mut request.has_begun, true))
        });
        if has_begun && let Some(kept) = &wanted {
            self.kept_cookies.remove(kept);
        }
        let wanted = wanted.filter(|_| is_single);
        #[cfg(test)]
        let wanted =
            wanted.filter(|_| !(has_begun && mutation::is_active(UpstreamMutation::RenameResent)));
        let cookie = match wanted.filter(|cookie| !self.is_cookie_used(*cookie)) {
            Some(cookie) => cookie,
            None => self.own_cookie(),
        };
        if is_single && let Some(request) = self.requests.get_mut(&id) {
            request.cookie = Some(cookie);
        }
        cookie
    }

    /// A cookie of the machine's own.
    fn own_cookie(&mut self) -> u64 {
        loop {
            let cookie = self.next_cookie;
            self.next_cookie = cookie.wrapping_add(1);
            if !self.is_cookie_used(cookie) {
                return cookie;
            }
        }
    }

    fn is_cookie_used(&self, cookie: u64) -> bool {
        #[cfg(test)]
        if mutation::is_active(UpstreamMutation::ReuseCookie) {
            return false;
        }
        self.messages.contains_key(&cookie) || self.kept_cookies.contains(&cookie)
    }

    /// Registers a message.
    fn message(
        &mut self,
        connection: usize,
        cookie: u64,
        (kind, flags): (CommandKind, CommandFlags),
        range: Range,
        cause: Cause,
    ) -> OutgoingMessage {
        let sent = SentMessage { connection, range, cause, received: Vec::new(), error: None };
        self.messages.insert(cookie, sent);
        let (offset, length) = match kind {
            CommandKind::Flush => (0, 0),
            _ => (range.offset(), range.length()),
        };
        let mut flags = flags;
        if kind == CommandKind::Write && self.terms.dialect == Dialect::Extended {
            flags |= CommandFlags::PAYLOAD_LEN;
        }
        let header =
            RequestHeader { flags: flags.bits(), kind: kind.number(), cookie, offset, length };
        let is_of_session = self.is_of_session(cause);
        OutgoingMessage { header, payload: None, is_of_session }
    }
}

/// Longest range of a request without payload, in bytes.
fn length_max(terms: &ServerTerms) -> u64 {
    if terms.dialect == Dialect::Extended { u64::MAX } else { COMPACT_LENGTH_MAX }
}

/// Does what needs no message: the server has no such command, and success is a valid answer.
fn answer_without_message(task: &mut UpstreamTask, terms: &ServerTerms) -> bool {
    match task {
        // A server without FLUSH has nothing better to offer than its replies.
        UpstreamTask::Flush => !terms.has(TransmissionFlags::SEND_FLUSH),
        _ if task.range().is_empty() => true,
        UpstreamTask::Cache { .. } => !terms.has(TransmissionFlags::SEND_CACHE),
        UpstreamTask::Trim { .. } => !terms.has(TransmissionFlags::SEND_TRIM),
        UpstreamTask::Extents { range, found, .. } if terms.allocation_context.is_none() => {
            *found = vec![Extent { range: *range, allocated: true }];
            true
        }
        _ => false,
    }
}

/// The command of a task, its flags, and the longest range of one message.
fn command(request: &UpstreamRequest, terms: &ServerTerms) -> (CommandKind, CommandFlags, u64) {
    let mut flags = CommandFlags::empty();
    let payload_max = u64::from(terms.payload_max);
    match &request.task {
        UpstreamTask::Read { .. } => (CommandKind::Read, flags, payload_max),
        UpstreamTask::Write { durable, .. } => {
            flags.set(CommandFlags::FUA, *durable && terms.has(TransmissionFlags::SEND_FUA));
            (CommandKind::Write, flags, payload_max)
        }
        UpstreamTask::Zero { how, .. } => {
            flags.set(CommandFlags::NO_HOLE, how.keep_allocated);
            // A server that failed it now would deny a change that a lost one may have executed.
            let is_first = !request.has_begun;
            #[cfg(test)]
            let is_first = is_first || mutation::is_active(UpstreamMutation::StayFast);
            flags.set(CommandFlags::FAST_ZERO, how.only_if_fast && is_first);
            (CommandKind::WriteZeroes, flags, length_max(terms))
        }
        UpstreamTask::Trim { .. } => (CommandKind::Trim, flags, length_max(terms)),
        UpstreamTask::Flush => (CommandKind::Flush, flags, u64::MAX),
        UpstreamTask::Cache { .. } => (CommandKind::Cache, flags, length_max(terms)),
        UpstreamTask::Extents { limit, .. } => {
            flags.set(CommandFlags::REQ_ONE, *limit == 1);
            (CommandKind::BlockStatus, flags, length_max(terms))
        }
    }
}

fn payload(request: &UpstreamRequest, part: Range) -> Option<PayloadPart> {
    let UpstreamTask::Write { range, data, .. } = &request.task else { return None };
    // Fit: inside the buffer.
    let start = (part.offset() - range.offset()) as usize;
    Some(PayloadPart { data: Arc::clone(data), start, length: part.length() as usize })
}
