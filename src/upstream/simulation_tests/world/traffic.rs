//! The bytes between the machine and the servers of a schedule, as the link passes them.

use super::{Loss, SimLink, UpstreamWorld};
use crate::nbd::request::RequestHeader;
use crate::nbd::wire::CommandKind;
use crate::upstream::machine::{Cause, LossReason, OWN_COOKIES, OutgoingMessage};
use crate::upstream::simulation_tests::cells::{CELL, CellValue, value_of};
use crate::upstream::simulation_tests::coverage::UpstreamReached;
use crate::upstream::simulation_tests::scene::Scene;
use crate::upstream::simulation_tests::theme::UpstreamTheme;
use crate::upstream::unflushed::SEGMENT_OVERHEAD;

impl UpstreamWorld {
    /// Sends what can be sent over the connections in order, and handles completions: as the link after
    /// every call of the machine.
    pub(super) fn pump(&mut self) -> Result<(), String> {
        if let Some(mut link) = self.link.take() {
            let outcome =
                (0..link.connections.len()).try_for_each(|n| self.send_over(n, &mut link));
            self.link = Some(link);
            outcome?;
        }
        self.distribute()
    }

    fn send_over(&mut self, number: usize, link: &mut SimLink) -> Result<(), String> {
        let connection = &mut link.connections[number];
        while !connection.is_blocked {
            while !connection.tx.is_full()
                && let Some(message) = self.machine.next_message(number)
            {
                self.on_message(&message)?;
                connection.tx.push(message);
            }
            if connection.tx.is_empty() {
                break;
            }
            let room = self.socket.saturating_sub(connection.to_server.len());
            if room == 0 {
                self.coverage.count(UpstreamReached::Blocked);
                connection.is_blocked = true;
                break;
            }
            let mut sent = 0;
            let limit = if self.rng.bool() { room } else { self.rng.usize(1..=room) };
            for slice in connection.tx.slices() {
                let count = slice.len().min(limit - sent);
                connection.to_server.extend(&slice[..count]);
                sent += count;
            }
            connection.tx.sent(sent);
        }
        Ok(())
    }

    /// A message leaves the machine.
    fn on_message(&mut self, message: &OutgoingMessage) -> Result<(), String> {
        let cause = self.machine.cause_of(message.header.cookie);
        self.coverage
            .count_if(matches!(cause, Some(Cause::OwnFlush(_))), UpstreamReached::OwnFlush);
        if let Some(Cause::Request(id)) = cause {
            self.check_cookie(id, &message.header)?;
        }
        let Some(payload) = &message.payload else { return Ok(()) };
        if message.header.kind != CommandKind::Write.number() {
            return Err("a payload of no write".into());
        }
        let value = payload.bytes().chunks(CELL).next().and_then(value_of);
        let value = value.ok_or("an empty or torn payload")?;
        let buffer = self.clients.buffers.range(..=value).next_back();
        let has_value =
            |(first, size): &(&CellValue, &u64)| u64::from(value - **first) < **size / CELL as u64;
        let buffer = buffer.filter(has_value);
        let (value, size) = buffer.map_or((value, 0), |(first, size)| (*first, *size));
        if matches!(cause, Some(Cause::Request(_))) {
            let is_new = !self.sent_writes.contains_key(&value);
            let is_again = is_new && !self.begun.insert(value);
            self.coverage.count_if(is_again, UpstreamReached::Resent);
            self.sent_writes.insert(value, size);
        }
        Ok(())
    }

    /// A request that is one message has the same cookie whenever it is sent.
    fn check_cookie(&mut self, id: u64, header: &RequestHeader) -> Result<(), String> {
        let range = self.machine.range_of(id).ok_or("a message of no request")?;
        if (range.offset(), range.length()) != (header.offset, header.length) {
            self.cookies.remove(&id);
            return Ok(());
        }
        let is_own = header.cookie >= OWN_COOKIES;
        self.coverage.count_if(!is_own, UpstreamReached::ClientCookie);
        self.coverage.count_if(is_own, UpstreamReached::OwnCookie);
        match self.cookies.insert(id, header.cookie) {
            Some(before) if before != header.cookie => {
                Err(format!("sent again with another cookie than {before}: {header:?}"))
            }
            _ => Ok(()),
        }
    }

    /// Passes completions to their sessions, and cancels those of ended sessions.
    pub(super) fn distribute(&mut self) -> Result<(), String> {
        self.coverage.count_if(self.machine.holds_changes(), UpstreamReached::Held);
        self.drain_completions()?;
        for nth in 0..self.clients.queues.len() {
            let queue = &mut self.clients.queues[nth];
            if queue.has_ended && queue.depth() > 0 && self.machine.cancel(queue.owner) {
                queue.is_cancelled = true;
                self.drain_completions()?;
                if self.clients.queues[nth].depth() > 0 {
                    return Err("an operation of an ended session stays".into());
                }
            }
        }
        self.clients.queues.retain(|queue| !queue.has_ended || queue.depth() > 0);
        self.check_memory()?;
        self.use_spares()
    }

    /// Sessions use a part of the spare buffers.
    fn use_spares(&mut self) -> Result<(), String> {
        let is_kept = self.machine.spare_memory() > 0;
        self.coverage.count_if(is_kept, UpstreamReached::Spared);
        if is_kept && self.operations_left.is_multiple_of(4) {
            let spare = self.machine.take_spare().ok_or("memory of no spare buffer")?;
            drop(spare);
        }
        Ok(())
    }

    fn drain_completions(&mut self) -> Result<(), String> {
        let may_fail = self.theme.has_errors();
        while let Some((owner, completion)) = self.machine.next_completion() {
            let (model, coverage) = (&mut self.model, &mut self.coverage);
            let durable = self.clients.complete(owner, completion, model, coverage, may_fail)?;
            self.sent_writes.retain(|value, _| self.clients.buffers.contains_key(value));
            if durable {
                self.check_durable()?;
            }
        }
        Ok(())
    }

    /// The memory of sent and unflushed changes is bounded, but for a single write.
    fn check_memory(&self) -> Result<(), String> {
        let sent: u64 = self.sent_writes.values().sum();
        let used = self.machine.unflushed_memory() + self.machine.spare_memory() + sent;
        let bound = self.unflushed_max.max(self.clients.buffer_max + 2 * SEGMENT_OVERHEAD);
        if used > bound && self.machine.keeps_changes() {
            return Err(format!("{used} bytes are used of {bound}"));
        }
        Ok(())
    }

    pub(super) fn server_receives(&mut self) -> Result<(), String> {
        let Some(link) = &mut self.link else { return Ok(()) };
        let number = self.rng.usize(..link.connections.len());
        let available = link.connections[number].to_server.len();
        let count = fragment(&mut self.rng, available);
        self.pass_to_server(number, count)
    }

    pub(super) fn pass_to_server(&mut self, number: usize, count: usize) -> Result<(), String> {
        let Some(link) = &mut self.link else { return Ok(()) };
        let connection = &mut link.connections[number];
        let mut scene = scene!(self);
        let bytes = &connection.to_server.bytes()[..count];
        link.server.receive(number, bytes, &self.machine, &mut scene)?;
        connection.to_server.consume(count);
        Ok(())
    }

    /// A socket takes more.
    pub(super) fn unblock(&mut self) -> Result<(), String> {
        let Some(link) = &mut self.link else { return Ok(()) };
        let number = self.rng.usize(..link.connections.len());
        link.connections[number].is_blocked = false;
        self.pump()
    }

    pub(super) fn receive(&mut self) -> Result<(), String> {
        let Some(link) = &self.link else { return Ok(()) };
        let number = self.rng.usize(..link.connections.len());
        let count = fragment(&mut self.rng, link.server.outboxes[number].len());
        self.receive_from(number, count)
    }

    /// Receives so many bytes.
    pub(super) fn receive_from(&mut self, number: usize, count: usize) -> Result<(), String> {
        let mut left = count;
        while left > 0
            && let Some(link) = &mut self.link
        {
            let rx = &mut link.connections[number].rx;
            let outbox = &mut link.server.outboxes[number];
            let room = rx.room();
            if room.is_empty() {
                return Err("there is no room to receive".into());
            }
            let count = left.min(room.len());
            room[..count].copy_from_slice(&outbox.bytes()[..count]);
            outbox.consume(count);
            left -= count;
            rx.received(count);
            if !rx.needs_machine() {
                self.coverage.count(UpstreamReached::Direct);
                continue;
            }
            let outcome = rx.process(&mut self.machine);
            self.pump()?;
            if let Err(reason) = outcome {
                return self.on_loss_reason(&reason);
            }
        }
        Ok(())
    }

    fn on_loss_reason(&mut self, reason: &LossReason) -> Result<(), String> {
        let is_leaving = self.link.as_ref().is_some_and(|link| link.server.faults.is_leaving);
        let is_expected = match reason {
            LossReason::Protocol(_) => self.theme == UpstreamTheme::Misbehaving,
            LossReason::ShuttingDown => is_leaving,
            LossReason::Replay(_) => self.theme.has_errors(),
        };
        self.coverage
            .count_if(matches!(reason, LossReason::Replay(_)), UpstreamReached::ReplayFailed);
        if !is_expected {
            return Err(format!("the connection is given up: {reason}"));
        }
        self.lose(Loss::Connection)
    }

    /// Bytes that are still on their way arrive in part.
    pub(super) fn receive_last(&mut self) -> Result<(), String> {
        let count = self.link.as_ref().map_or(0, |link| link.connections.len());
        for number in 0..count {
            let Some(link) = &self.link else { return Ok(()) };
            let available = link.connections[number].to_server.len();
            let arriving = link.server.outboxes[number].len();
            let count = fragment(&mut self.rng, available);
            self.pass_to_server(number, count)?;
            if self.rng.bool() {
                let count = fragment(&mut self.rng, arriving);
                self.receive_silently(number, count);
            }
        }
        Ok(())
    }

    /// Another connection is lost already: nothing is sent, and reasons do not matter.
    fn receive_silently(&mut self, number: usize, count: usize) {
        let Some(link) = &mut self.link else { return };
        let rx = &mut link.connections[number].rx;
        let outbox = &mut link.server.outboxes[number];
        let room = rx.room();
        let count = count.min(room.len());
        room[..count].copy_from_slice(&outbox.bytes()[..count]);
        outbox.consume(count);
        rx.received(count);
        if rx.needs_machine() {
            let _ = rx.process(&mut self.machine);
        }
    }
}

/// All bytes, or some.
fn fragment(rng: &mut fastrand::Rng, available: usize) -> usize {
    match rng.u8(..4) {
        0 => rng.usize(..=available.min(700)),
        1 => rng.usize(..=available),
        _ => available,
    }
}
