//! The requests to the server: those to be sent, those without a reply, and those to be sent again when
//! another connection replaces a lost one.
//! Pure: no socket, no clock. The link sends what [`UpstreamMachine::next_message`] returns, and passes what
//! it receives to `rx`, which calls the methods in `machine/answers`.
//!
//! ```text
//!                 connected                no change left              none left
//! Disconnected ──────────────▶ Replaying ─────────────────▶ Resending ───────────▶ Serving
//!      ▲                           │                            │                     │
//!      └───────────────────────────┴─────────── lost ───────────┴─────────────────────┘
//! ```
//!
//! * Replaying: acknowledged changes that are not flushed are written again, since the server may have lost
//!   them (a process that was killed has not, but a host without power has, and nothing tells them apart).
//!   No other request is sent. These writes do not overlap, so any number of them is in flight.
//! * Resending: the changes that were sent before and have no reply are sent again. They come after the
//!   replay, which could undo them; and before reads, because an earlier read may have returned their
//!   data already, and no later one may return older data.
//! * Serving: everything else, in order of arrival.
//!
//! Overlapping changes never meet here: `disk/overlap` starts the second one when the first is complete
//! (the backend says that it does not order writes).
//!
//! Every acknowledged change without FUA is kept ([`Unflushed`]) until a FLUSH that was sent after the
//! acknowledgement succeeds on the same connections. The memory for that is bounded: at half of the
//! bound the machine flushes by itself, and at the bound it holds changes back, in order of arrival. A
//! server without FLUSH cannot make anything durable, so nothing is kept for it. The buffers of flushed
//! changes are kept for the writes to come, within the same bound.
//!
//! A server reports a failed write-back to one of the flushes that it executes at the same time. So if
//! the machine's own flush is in flight, a client's flush completes after it, and fails if it has failed.
//!
//! A request that goes out as a single message has the cookie of the client's own request, unless another
//! message has it: then, and for everything else, the machine chooses one. Sent again, it has the same cookie
//! as before. (Original flexnbd-proxy: its requests are the client's.)
//!
//! A session may end while there is no connection. Its changes that were sent before are sent again
//! nevertheless: another session may have read their data.

mod answers;
mod request;
mod sending;

#[cfg(test)]
use super::mutation::{self, UpstreamMutation};
use super::terms::ServerTerms;
use super::unflushed::Unflushed;
use crate::disk::{Buffer, Completion, Op, OpId};
use crate::ids::DiskId;
use crate::nbd::wire::TransmissionFlags;
use crate::range::Range;
use nix::errno::Errno;
use request::{UpstreamRequest, UpstreamTask};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

pub(super) use answers::{Expected, LossReason};
pub(super) use sending::{OutgoingMessage, PayloadPart};

/// The first cookie that no client has chosen. Clients count from low numbers up, most of them.
pub(super) const OWN_COOKIES: u64 = 1 << 63;

/// The requests of all sessions to one server. See the module.
#[derive(Debug)]
pub(super) struct UpstreamMachine {
    stage: LinkStage,
    /// Of the current server, or of the last one; without commands and flags that the first one lacks.
    terms: ServerTerms,
    /// Number of the current connections.
    connections: usize,
    /// All that have not completed, in order of arrival.
    requests: BTreeMap<u64, UpstreamRequest>,
    next_request: u64,
    /// Messages without a reply, by cookie.
    messages: BTreeMap<u64, SentMessage>,
    /// The next cookie that no client has chosen.
    next_cookie: u64,
    /// Cookies that no message has, and with which a request may be sent again.
    kept_cookies: BTreeSet<u64>,
    /// Requests with messages to send, by connection.
    ready: Vec<VecDeque<u64>>,
    /// Requests that wait until the machine serves.
    later: VecDeque<u64>,
    /// Changes that wait for memory.
    held: VecDeque<u64>,
    /// Memory that the changes without a reply may take once they are acknowledged, in bytes.
    reserved: u64,
    unflushed: Unflushed,
    unflushed_max: u64,
    /// Number of acknowledged changes.
    stamp: u64,
    own_flush: OwnFlush,
    /// The error of a flush that no client has asked for. Every later one fails with it.
    flush_error: Option<i32>,
    /// Executed flushes and durable writes that wait for the reply to the machine's own flush.
    verifying: Vec<u64>,
    completed: VecDeque<(u64, Completion)>,
    replies: u64,
    /// `replies` when the current connections began.
    replies_before: u64,
    /// The connection to probe.
    probe_wanted: Option<usize>,
}

/// See the module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum LinkStage {
    Disconnected,
    /// The kept changes behind this offset have to be written again; this many messages have no reply.
    Replaying {
        offset: u64,
        unanswered: usize,
    },
    /// This many requests have no reply.
    Resending {
        left: usize,
    },
    Serving,
    /// For good.
    Closed,
}

/// A flush that no client has asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum OwnFlush {
    Idle,
    Wanted,
    InFlight,
}

/// A message that was sent.
#[derive(Debug)]
struct SentMessage {
    connection: usize,
    /// The bytes that it concerns.
    range: Range,
    cause: Cause,
    /// For a read: the parts that have arrived, disjoint.
    received: Vec<Range>,
    /// The error of a chunk before the last one.
    error: Option<i32>,
}

/// Why a message was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cause {
    Request(u64),
    Replay,
    Probe,
    /// With the stamp of what it makes durable.
    OwnFlush(u64),
}

impl UpstreamMachine {
    /// No request, and no connection. `terms` are those of the first server, which all later ones have to
    /// keep. Acknowledged changes take at most `unflushed_max` bytes of memory, but for a single write.
    #[must_use]
    pub(super) fn new(terms: ServerTerms, unflushed_max: u64) -> Self {
        Self {
            stage: LinkStage::Disconnected,
            terms,
            connections: 0,
            requests: BTreeMap::new(),
            next_request: 0,
            messages: BTreeMap::new(),
            next_cookie: OWN_COOKIES,
            kept_cookies: BTreeSet::new(),
            ready: Vec::new(),
            later: VecDeque::new(),
            held: VecDeque::new(),
            reserved: 0,
            unflushed: Unflushed::default(),
            unflushed_max,
            stamp: 0,
            own_flush: OwnFlush::Idle,
            flush_error: None,
            verifying: Vec::new(),
            completed: VecDeque::new(),
            replies: 0,
            replies_before: 0,
            probe_wanted: None,
        }
    }

    /// Bytes of memory for acknowledged changes that are not flushed.
    #[must_use]
    pub(super) fn unflushed_memory(&self) -> u64 {
        self.unflushed.memory()
    }

    /// Bytes of memory for the spare buffers of changes that are flushed.
    #[cfg(test)]
    pub(super) fn spare_memory(&self) -> u64 {
        self.unflushed.spare_memory()
    }

    /// A spare buffer, for a write to come.
    pub(super) fn take_spare(&mut self) -> Option<Buffer> {
        self.unflushed.spares().take()
    }

    /// Frees the spare buffers.
    pub(super) fn free_spares(&mut self) {
        self.unflushed.spares().shrink_to(0);
    }

    /// Whether there is a connection.
    #[must_use]
    pub(super) fn is_connected(&self) -> bool {
        !matches!(self.stage, LinkStage::Disconnected | LinkStage::Closed)
    }

    /// Whether a message of a connection has no reply, so that the server has to send something.
    #[must_use]
    pub(super) fn awaits_reply(&self, connection: usize) -> bool {
        self.messages.values().any(|message| message.connection == connection)
    }

    /// Whether something has to arrive over a connection for which no session waits, or for which others wait
    /// as well.
    #[must_use]
    pub(super) fn awaits_own_reply(&self, connection: usize) -> bool {
        let is_own = |cause| !self.is_of_session(cause);
        let mut messages = self.messages.values();
        messages.any(|message| message.connection == connection && is_own(message.cause))
    }

    /// Whether only the session that has caused a message waits for its reply. Before the machine serves,
    /// all of them do; and no session waits for a change that an ended session has left behind.
    fn is_of_session(&self, cause: Cause) -> bool {
        let Cause::Request(id) = cause else { return false };
        let is_left = self.requests.get(&id).is_none_or(|request| request.is_cancelled);
        self.stage == LinkStage::Serving && !is_left
    }

    /// Number of requests that were replied to, without replays and probes: a server that replies to nothing
    /// else is of no use.
    #[must_use]
    pub(super) fn replies(&self) -> u64 {
        self.replies
    }

    /// The server cannot be used, so its replies do not count. Otherwise it would be connected to again and
    /// again without a delay.
    pub(super) fn discredit(&mut self) {
        self.replies = self.replies_before;
    }

    /// Sends a short read over a connection whose server has not replied for long. A server that works on
    /// several requests at once replies to it, so that a long flush can be told from a server that hangs.
    pub(super) fn probe(&mut self, connection: usize) {
        self.probe_wanted = Some(connection).filter(|_| self.is_connected());
    }

    /// Begins an operation of the queue `owner`.
    ///
    /// # Errors
    /// The operation, if no message can execute it.
    pub(super) fn submit(&mut self, owner: u64, id: OpId, op: Op) -> Result<(), Op> {
        let has_fua = self.terms.has(TransmissionFlags::SEND_FUA);
        if !has_fua && self.keeps_changes() && matches!(op, Op::Write { durable: true, .. }) {
            // Takes a write and a flush.
            return Err(op);
        }
        let task = UpstreamTask::of(op, self.terms.size)?;
        let request = UpstreamRequest::new(owner, id, task);
        let error = match self.stage {
            LinkStage::Closed => Some(Errno::ESHUTDOWN as i32),
            _ if request.task.is_durable() => self.flush_error,
            _ => None,
        };
        if error.is_some() {
            self.completed.push_back(request.complete(error));
            return Ok(());
        }
        let id = self.next_request;
        self.next_request += 1;
        self.requests.insert(id, request);
        if self.stage == LinkStage::Serving {
            self.make_ready(id);
        } else {
            self.later.push_back(id);
        }
        Ok(())
    }

    /// The next completed operation, and the queue that pushed it.
    pub(super) fn next_completion(&mut self) -> Option<(u64, Completion)> {
        self.completed.pop_front()
    }

    /// The id of the disk, if a server has told it.
    #[must_use]
    pub(super) fn disk_id(&self) -> Option<DiskId> {
        self.terms.disk_id
    }

    /// Connections to a server with these terms replace the lost ones. The caller has compared the terms
    /// with those of the first server ([`ServerTerms::check_replacement`]).
    pub(super) fn connected(&mut self, terms: ServerTerms, connections: usize) {
        if self.stage != LinkStage::Disconnected {
            return;
        }
        #[cfg(test)]
        let terms = if mutation::is_active(UpstreamMutation::UseUnpromised) {
            self.terms = terms;
            terms
        } else {
            terms
        };
        self.terms = terms.limited_to(&self.terms);
        #[cfg(test)]
        if mutation::is_active(UpstreamMutation::ForgetDiskId) {
            self.terms.disk_id = terms.disk_id;
        }
        self.connections = connections.max(1);
        self.replies_before = self.replies;
        self.ready = vec![VecDeque::new(); self.connections];
        self.stage = LinkStage::Replaying { offset: 0, unanswered: 0 };
        self.advance_stage();
    }

    /// The connections are lost, and no reply will arrive from now on. The caller has returned the buffers
    /// that it was filling.
    pub(super) fn lost(&mut self) {
        if !self.is_connected() {
            return;
        }
        self.stage = LinkStage::Disconnected;
        self.messages.clear();
        self.ready.clear();
        self.held.clear();
        self.verifying.clear();
        self.reserved = 0;
        self.probe_wanted = None;
        if self.own_flush == OwnFlush::InFlight {
            self.own_flush = OwnFlush::Wanted;
            #[cfg(test)]
            if mutation::is_active(UpstreamMutation::ForgetOwnFlush) {
                self.own_flush = OwnFlush::InFlight;
            }
        }
        self.requests.values_mut().for_each(UpstreamRequest::restart);
        let sent_before = self.requests.values().filter(|request| request.has_begun);
        self.kept_cookies = sent_before.filter_map(|request| request.cookie).collect();
        #[cfg(test)]
        if mutation::is_active(UpstreamMutation::ForgetCookie) {
            self.kept_cookies.clear();
        }
        self.later = self.requests.keys().copied().collect();
    }

    /// Completes the operations of a queue whose session has ended, if there is no connection: their
    /// outcomes do not matter any more, and none of them is being executed. Returns whether it did.
    /// A change that a server may have executed is sent again nevertheless.
    pub(super) fn cancel(&mut self, owner: u64) -> bool {
        let may_cancel = !self.is_connected();
        #[cfg(test)]
        let may_cancel = may_cancel || mutation::is_active(UpstreamMutation::CancelConnected);
        if !may_cancel {
            return false;
        }
        let of_owner = |request: &UpstreamRequest| request.owner == owner && !request.is_cancelled;
        let ids = self.requests.iter().filter(|(_, request)| of_owner(request));
        for id in ids.map(|(id, _)| *id).collect::<Vec<_>>() {
            let Some(request) = self.requests.get_mut(&id) else { continue };
            let stays = request.may_be_executed();
            #[cfg(test)]
            let stays = stays && !mutation::is_active(UpstreamMutation::ForgetCancelled);
            if stays {
                self.completed.push_back(request.cancel());
            } else {
                self.complete(id, None);
            }
        }
        self.later.retain(|id| self.requests.contains_key(id));
        true
    }

    /// Completes every operation with `ESHUTDOWN`, now and from now on.
    pub(super) fn close(&mut self) {
        self.lost();
        self.stage = LinkStage::Closed;
        self.later.clear();
        while let Some((&id, _)) = self.requests.first_key_value() {
            self.complete(id, Some(Errno::ESHUTDOWN as i32));
        }
    }

    /// Continues with the next stage once this one is done.
    fn advance_stage(&mut self) {
        if self.is_replayed() {
            let requests = &self.requests;
            let is_sent_again =
                |id: &u64| requests.get(id).is_some_and(UpstreamRequest::may_be_executed);
            #[cfg(test)]
            let is_sent_again = |id: &u64| {
                is_sent_again(id) && !mutation::is_active(UpstreamMutation::ResendInOrder)
            };
            let (again, later): (VecDeque<u64>, _) =
                std::mem::take(&mut self.later).into_iter().partition(is_sent_again);
            self.later = later;
            self.stage = LinkStage::Resending { left: again.len() };
            again.into_iter().for_each(|id| self.make_ready(id));
        }
        if self.stage == (LinkStage::Resending { left: 0 }) {
            self.stage = LinkStage::Serving;
            std::mem::take(&mut self.later).into_iter().for_each(|id| self.make_ready(id));
            self.check_memory();
        }
    }

    fn is_replayed(&self) -> bool {
        let LinkStage::Replaying { offset, unanswered } = self.stage else { return false };
        #[cfg(test)]
        if mutation::is_active(UpstreamMutation::SkipReplay) {
            return true;
        }
        #[cfg(test)]
        let unanswered = match mutation::is_active(UpstreamMutation::ResendBesideReplay) {
            true => 0,
            false => unanswered,
        };
        unanswered == 0 && self.unflushed.next(offset).is_none()
    }

    /// The connection for all messages of a queue's requests, so that a session has a stream of its own where
    /// there are several.
    pub(super) fn connection_of(&self, owner: u64) -> usize {
        // Fits: smaller than the number of connections.
        (owner % self.connections.max(1) as u64) as usize
    }

    fn make_ready(&mut self, id: u64) {
        let Some(request) = self.requests.get(&id) else { return };
        let connection = self.connection_of(request.owner);
        self.ready[connection].push_back(id);
    }

    /// Whether acknowledged changes have to be kept until a flush.
    pub(super) fn keeps_changes(&self) -> bool {
        self.terms.has(TransmissionFlags::SEND_FLUSH)
    }

    /// Whether a change that takes this much memory may be sent.
    fn has_memory_for(&self, bytes: u64) -> bool {
        #[cfg(test)]
        if mutation::is_active(UpstreamMutation::IgnoreBound) {
            return true;
        }
        let used = self.unflushed.memory() + self.reserved;
        !self.keeps_changes() || used == 0 || used + bytes <= self.unflushed_max
    }

    /// Reserves the memory of a change before its first message. False if it has to wait: for memory, or
    /// behind other changes that wait. Changes that are sent again had their memory before the loss.
    fn reserve(&mut self, id: u64) -> bool {
        let Some(request) = self.requests.get(&id) else { return true };
        let bytes = request.task.memory_kept();
        if request.has_memory || bytes == 0 {
            return true;
        }
        let is_scarce = !self.held.is_empty() || !self.has_memory_for(bytes);
        if self.stage == LinkStage::Serving && is_scarce {
            return false;
        }
        self.grant(id, bytes);
        true
    }

    fn grant(&mut self, id: u64, bytes: u64) {
        if let Some(request) = self.requests.get_mut(&id) {
            request.has_memory = true;
            self.reserved += bytes;
        }
        self.limit_spares();
    }

    /// Frees the spare buffers for which there is no memory beside the changes.
    fn limit_spares(&mut self) {
        #[cfg(test)]
        if mutation::is_active(UpstreamMutation::KeepSpares) {
            return;
        }
        let used = self.unflushed.memory() + self.reserved;
        self.unflushed.spares().shrink_to(self.unflushed_max.saturating_sub(used));
    }

    /// Sends changes for which there is memory again. Wants a flush if half of the memory is used or a
    /// change waits for it.
    fn check_memory(&mut self) {
        while let Some(&id) = self.held.front() {
            let bytes = self.requests.get(&id).map_or(0, |request| request.task.memory_kept());
            if !self.has_memory_for(bytes) {
                break;
            }
            #[cfg(test)]
            if mutation::is_active(UpstreamMutation::KeepHeld) {
                break;
            }
            self.held.pop_front();
            self.grant(id, bytes);
            self.make_ready(id);
        }
        let used = self.unflushed.memory();
        let is_scarce = used >= self.unflushed_max / 2 || !self.held.is_empty();
        if self.own_flush == OwnFlush::Idle && used > 0 && is_scarce {
            self.own_flush = OwnFlush::Wanted;
        }
    }

    /// Why a message without a reply was sent.
    #[cfg(test)]
    pub(super) fn cause_of(&self, cookie: u64) -> Option<Cause> {
        self.messages.get(&cookie).map(|message| message.cause)
    }

    /// The range of a request.
    #[cfg(test)]
    pub(super) fn range_of(&self, id: u64) -> Option<Range> {
        self.requests.get(&id).map(|request| request.task.range())
    }

    /// Whether a change waits for memory.
    #[cfg(test)]
    pub(super) fn holds_changes(&self) -> bool {
        !self.held.is_empty()
    }

    fn complete(&mut self, id: u64, error: Option<i32>) {
        let Some(request) = self.requests.remove(&id) else { return };
        if let Some(cookie) = request.cookie.filter(|_| request.has_begun) {
            self.kept_cookies.remove(&cookie);
        }
        if !request.is_cancelled {
            self.completed.push_back(request.complete(error));
        }
    }
}

#[cfg(test)]
mod tests;
