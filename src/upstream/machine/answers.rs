//! What replies mean for the requests.
//! Pure.

use super::request::UpstreamTask;
use super::{Cause, LinkStage, OwnFlush, SentMessage, UpstreamMachine};
use crate::disk::{Buffer, Extent};
use crate::nbd::reply::StatusExtent;
use crate::nbd::wire::{Allocation, TransmissionFlags};
use crate::range::Range;
#[cfg(test)]
use crate::upstream::mutation::{self, UpstreamMutation};
use nix::errno::Errno;
use std::sync::Arc;
use thiserror::Error;

/// Why a connection cannot be used any more.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub(in crate::upstream) enum LossReason {
    /// The server broke the protocol.
    #[error("it broke the NBD protocol: {0}")]
    Protocol(&'static str),
    /// The server answered with `NBD_ESHUTDOWN`.
    #[error("it is shutting down")]
    ShuttingDown,
    /// The server could not write again what it had acknowledged.
    #[error("it failed to write again what was acknowledged and not flushed: {}", Errno::from_raw(*.0).desc())]
    Replay(i32),
}

/// The content of a successful reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::upstream) enum Expected {
    /// None.
    Nothing,
    /// These bytes.
    Data(Range),
    /// The extents of this range.
    Extents(Range),
}

/// Most separate parts of the data of one reply while it arrives.
const FRAGMENTS_MAX: usize = 256;
const NO_REQUEST: LossReason = LossReason::Protocol("a reply to no request");

impl UpstreamMachine {
    /// The content that a successful reply to the message has.
    ///
    /// # Errors
    /// [`LossReason::Protocol`] if no such message was sent over the connection.
    pub(in crate::upstream) fn expected(
        &self,
        connection: usize,
        cookie: u64,
    ) -> Result<Expected, LossReason> {
        let is_sent_here = |sent: &&SentMessage| sent.connection == connection;
        #[cfg(test)]
        let is_sent_here = |sent: &&SentMessage| {
            is_sent_here(sent) || mutation::is_active(UpstreamMutation::AcceptAnyCookie)
        };
        let message = self.messages.get(&cookie).filter(is_sent_here);
        let message = message.ok_or(NO_REQUEST)?;
        let id = match message.cause {
            Cause::Request(id) => id,
            Cause::Probe => return Ok(Expected::Data(message.range)),
            Cause::Replay | Cause::OwnFlush(_) => return Ok(Expected::Nothing),
        };
        Ok(match self.requests.get(&id).map(|request| &request.task) {
            Some(UpstreamTask::Read { .. }) => Expected::Data(message.range),
            Some(UpstreamTask::Extents { .. }) => Expected::Extents(message.range),
            _ => Expected::Nothing,
        })
    }

    /// `length` bytes of data, or zeros, from `offset` on are about to arrive.
    ///
    /// # Errors
    /// [`LossReason::Protocol`] if they were not requested, or have arrived already.
    pub(in crate::upstream) fn expect_data(
        &mut self,
        connection: usize,
        cookie: u64,
        (offset, length): (u64, u64),
    ) -> Result<Range, LossReason> {
        let Expected::Data(range) = self.expected(connection, cookie)? else {
            return Err(LossReason::Protocol("data of a request that reads nothing"));
        };
        let end = offset.checked_add(length).filter(|end| *end <= range.end());
        if offset < range.offset() || end.is_none() || length == 0 {
            return Err(LossReason::Protocol("data beside the requested range"));
        }
        let part = range.from(offset).split(length).0;
        let message = self.messages.get_mut(&cookie).ok_or(NO_REQUEST)?;
        let overlaps = |other: &Range| part.offset() < other.end() && other.offset() < part.end();
        if message.received.iter().any(overlaps) {
            return Err(LossReason::Protocol("the same data twice"));
        }
        // Most servers send the chunks in order, so that one part grows.
        let mut joined = part;
        message.received.retain(|other| {
            let touches = other.end() == joined.offset() || other.offset() == joined.end();
            if touches {
                let start = joined.offset().min(other.offset());
                joined = range.from(start).until(joined.end().max(other.end()));
            }
            !touches
        });
        message.received.push(joined);
        if message.received.len() > FRAGMENTS_MAX {
            return Err(LossReason::Protocol("a reply in too many pieces out of order"));
        }
        Ok(part)
    }

    /// Stores bytes of a read.
    pub(in crate::upstream) fn store(&mut self, cookie: u64, offset: u64, bytes: &[u8]) {
        self.with_data(cookie, |range, data| {
            // Fits: `expect_data` has checked it.
            let start = (offset - range.offset()) as usize;
            data[start..start + bytes.len()].copy_from_slice(bytes);
        });
    }

    /// Stores zeros of a read.
    pub(in crate::upstream) fn store_zeros(&mut self, cookie: u64, zeros: Range) {
        self.with_data(cookie, |range, data| {
            let start = (zeros.offset() - range.offset()) as usize;
            data[start..start + zeros.length() as usize].fill(0);
        });
    }

    fn with_data(&mut self, cookie: u64, store: impl FnOnce(Range, &mut Buffer)) {
        if let Some(UpstreamTask::Read { range, data: Some(data) }) = self.task(cookie) {
            store(*range, data);
        }
    }

    /// Takes the buffer of a read, to receive into it without a copy; and the offset of its first byte.
    /// The caller returns it ([`UpstreamMachine::return_buffer`]) before the reply or the loss.
    pub(in crate::upstream) fn take_buffer(&mut self, cookie: u64) -> Option<(u64, Buffer)> {
        match self.task(cookie)? {
            UpstreamTask::Read { range, data } => Some((range.offset(), data.take()?)),
            _ => None,
        }
    }

    /// Returns the buffer of a read.
    pub(in crate::upstream) fn return_buffer(&mut self, cookie: u64, buffer: Buffer) {
        if let Some(UpstreamTask::Read { data, .. }) = self.task(cookie) {
            *data = Some(buffer);
        }
    }

    fn task(&mut self, cookie: u64) -> Option<&mut UpstreamTask> {
        let Cause::Request(id) = self.messages.get(&cookie)?.cause else { return None };
        Some(&mut self.requests.get_mut(&id)?.task)
    }

    /// The extents of the message's range, from its start on.
    ///
    /// # Errors
    /// [`LossReason::Protocol`] if they were not requested.
    pub(in crate::upstream) fn store_extents(
        &mut self,
        connection: usize,
        cookie: u64,
        (context, extents): (u32, &[StatusExtent]),
    ) -> Result<(), LossReason> {
        let Expected::Extents(range) = self.expected(connection, cookie)? else {
            return Err(LossReason::Protocol("block status that was not requested"));
        };
        if self.terms.allocation_context != Some(context) {
            return Err(LossReason::Protocol("block status of another context"));
        }
        let Some(UpstreamTask::Extents { limit, found, .. }) = self.task(cookie) else {
            return Ok(());
        };
        let mut rest = range;
        for (length, flags) in extents {
            // An extent may reach beyond the range.
            let (extent, after) = rest.split(*length);
            if extent.is_empty() || found.len() >= (*limit).max(1) {
                break;
            }
            let hole = (Allocation::HOLE | Allocation::ZERO).bits();
            found.push(Extent { range: extent, allocated: flags & hole != hole });
            rest = after;
        }
        Ok(())
    }

    /// A chunk with an error, which may not be the last one of its reply.
    ///
    /// # Errors
    /// [`LossReason::Protocol`] if no such message was sent over the connection.
    pub(in crate::upstream) fn store_error(
        &mut self,
        connection: usize,
        cookie: u64,
        error: i32,
    ) -> Result<(), LossReason> {
        self.expected(connection, cookie)?;
        if let Some(message) = self.messages.get_mut(&cookie) {
            message.error.get_or_insert(error);
        }
        Ok(())
    }

    /// The reply to a message is complete.
    ///
    /// # Errors
    /// If the server cannot be used any more. The caller drops the connections.
    pub(in crate::upstream) fn replied(
        &mut self,
        connection: usize,
        cookie: u64,
    ) -> Result<(), LossReason> {
        let expected = self.expected(connection, cookie)?;
        let message = self.messages.remove(&cookie).ok_or(NO_REQUEST)?;
        let is_leaving = message.error == Some(Errno::ESHUTDOWN as i32);
        #[cfg(test)]
        let is_leaving = is_leaving && !mutation::is_active(UpstreamMutation::PassShutdown);
        if is_leaving {
            return Err(LossReason::ShuttingDown);
        }
        if message.error.is_none() {
            self.check_content(&message, expected)?;
        }
        match message.cause {
            Cause::Probe => {}
            Cause::Replay => self.replayed(message.error)?,
            Cause::OwnFlush(stamp) => self.own_flush_completed(stamp, message.error),
            Cause::Request(id) => {
                self.replies += 1;
                self.request_replied(id, message.error);
            }
        }
        self.advance_stage();
        Ok(())
    }

    /// A successful reply has to have the whole content.
    fn check_content(&self, message: &SentMessage, expected: Expected) -> Result<(), LossReason> {
        #[cfg(test)]
        if mutation::is_active(UpstreamMutation::AcceptIncomplete) {
            return Ok(());
        }
        match expected {
            Expected::Nothing => Ok(()),
            Expected::Data(range) => {
                let arrived: u64 = message.received.iter().map(Range::length).sum();
                // The parts are disjoint and inside the range.
                if arrived == range.length() { Ok(()) } else { Err(INCOMPLETE) }
            }
            Expected::Extents(_) => {
                let Cause::Request(id) = message.cause else { return Ok(()) };
                match self.requests.get(&id).map(|request| &request.task) {
                    Some(UpstreamTask::Extents { found, .. }) if found.is_empty() => {
                        Err(INCOMPLETE)
                    }
                    _ => Ok(()),
                }
            }
        }
    }

    fn replayed(&mut self, error: Option<i32>) -> Result<(), LossReason> {
        #[cfg(test)]
        let error = error.filter(|_| !mutation::is_active(UpstreamMutation::IgnoreReplayError));
        if let Some(error) = error {
            return Err(LossReason::Replay(error));
        }
        if let LinkStage::Replaying { unanswered, .. } = &mut self.stage {
            *unanswered -= 1;
        }
        Ok(())
    }

    fn own_flush_completed(&mut self, stamp: u64, error: Option<i32>) {
        self.own_flush = OwnFlush::Idle;
        #[cfg(test)]
        let stamp = match mutation::is_active(UpstreamMutation::StampOwnFlushLate) {
            true => self.stamp,
            false => stamp,
        };
        #[cfg(test)]
        let error = error.filter(|_| !mutation::is_active(UpstreamMutation::IgnoreFlushError));
        match error {
            None => self.unflushed.flushed(stamp),
            // The server reports the failure once, and no client has asked for it.
            Some(error) => {
                self.flush_error.get_or_insert(error);
                // Nothing can be made durable any more, so nothing is worth keeping.
                self.unflushed.flushed(u64::MAX);
            }
        }
        self.limit_spares();
        for id in std::mem::take(&mut self.verifying) {
            self.finish(id);
        }
        self.check_memory();
    }

    fn request_replied(&mut self, id: u64, error: Option<i32>) {
        let Some(request) = self.requests.get_mut(&id) else { return };
        request.unanswered -= 1;
        request.error = request.error.or(error);
        #[cfg(test)]
        if mutation::is_active(UpstreamMutation::ForgetError) {
            request.error = error;
        }
        let end = request.task.range().end();
        if request.error.is_some() && request.next < end {
            // Its other messages need not be sent.
            request.next = end;
            self.ready.iter_mut().for_each(|ready| ready.retain(|ready| *ready != id));
        }
        let Some(request) = self.requests.get(&id) else { return };
        if request.unanswered == 0 && request.next >= end {
            self.finish(id);
        }
    }

    /// Completes a request whose messages are all replied to.
    fn finish(&mut self, id: u64) {
        let Some(request) = self.requests.get(&id) else { return };
        let mut error = request.error;
        let waits = request.task.is_durable() && self.own_flush == OwnFlush::InFlight;
        #[cfg(test)]
        let waits = waits && !mutation::is_active(UpstreamMutation::CompleteBesideFlush);
        if waits && error.is_none() {
            self.kept_cookies.extend(request.cookie);
            return self.verifying.push(id);
        }
        if request.has_memory {
            self.reserved -= request.task.memory_kept();
        }
        if request.task.changes()
            && let LinkStage::Resending { left } = &mut self.stage
        {
            *left -= 1;
        }
        if request.task.is_durable() {
            error = error.or(self.flush_error);
        }
        if error.is_none() {
            self.acknowledged(id);
        }
        self.complete(id, error);
        if self.stage == LinkStage::Serving {
            self.check_memory();
        }
    }

    /// The server has executed a request. Keeps the change, or frees what it has made durable.
    fn acknowledged(&mut self, id: u64) {
        let keeps_changes = self.keeps_changes();
        let has_fua = self.terms.has(TransmissionFlags::SEND_FUA);
        let Some(request) = self.requests.get(&id) else { return };
        #[cfg(test)]
        if self.is_forgotten_by_mistake(&request.task) {
            return;
        }
        self.stamp += u64::from(request.task.changes());
        match &request.task {
            #[cfg(test)]
            UpstreamTask::Flush if mutation::is_active(UpstreamMutation::StampFlushLate) => {
                self.unflushed.flushed(self.stamp);
            }
            UpstreamTask::Flush => self.unflushed.flushed(request.stamp),
            _ if !keeps_changes => {}
            UpstreamTask::Write { range, durable: true, .. } if has_fua => {
                self.unflushed.forget(*range);
            }
            UpstreamTask::Write { range, data, .. } => {
                self.unflushed.write(range.offset(), Arc::clone(data), self.stamp);
            }
            UpstreamTask::Zero { range, how } => {
                self.unflushed.zero(*range, how.keep_allocated, self.stamp);
            }
            UpstreamTask::Trim { range } => self.unflushed.forget(*range),
            UpstreamTask::Read { .. }
            | UpstreamTask::Cache { .. }
            | UpstreamTask::Extents { .. } => {}
        }
    }
}

#[cfg(test)]
impl UpstreamMachine {
    fn is_forgotten_by_mistake(&self, task: &UpstreamTask) -> bool {
        use UpstreamMutation::{ForgetAcknowledged, KeepTrimmed, KeepUnderDurable};
        match task {
            UpstreamTask::Write { durable: false, .. } | UpstreamTask::Zero { .. } => {
                mutation::is_active(ForgetAcknowledged)
            }
            UpstreamTask::Write { durable: true, .. } => mutation::is_active(KeepUnderDurable),
            UpstreamTask::Trim { .. } => mutation::is_active(KeepTrimmed),
            _ => false,
        }
    }
}

const INCOMPLETE: LossReason = LossReason::Protocol("a reply without all of its content");
