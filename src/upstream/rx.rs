//! Receives the replies of one connection: bytes in, calls of the machine out.
//! Pure: the link receives into [`UpstreamRx::room`].
//!
//! Long data goes from the socket to the buffer of its read, and short data through the receive buffer,
//! so that one system call receives many replies.

use super::machine::{Expected, LossReason, UpstreamMachine};
#[cfg(test)]
use super::mutation::{self, UpstreamMutation};
use crate::disk::Buffer;
use crate::nbd::reply::{Chunk, Dialect, ReplyHeader};
use crate::nbd::wire::ErrorCode;
use nix::errno::Errno;

/// Size of the receive buffer in bytes.
const BUFFER_SIZE: usize = 256 << 10;
/// Longest payload of a chunk without data, in bytes: block status. Ours has at most 2^20 extents.
const CHUNK_PAYLOAD_MAX: u64 = 16 << 20;
/// How much to receive at once behind long data, in bytes: the header of the next reply, and little of data
/// that would have to be copied.
const ROOM_AFTER_DATA: usize = 4 << 10;
/// Data of which at least this much is missing is received into the buffer of its read, in bytes.
const DIRECT_MIN: u64 = 32 << 10;

/// The receiving side of a connection.
#[derive(Debug)]
pub(super) struct UpstreamRx {
    connection: usize,
    dialect: Dialect,
    buffer: Vec<u8>,
    /// The received bytes that are not yet consumed.
    start: usize,
    end: usize,
    /// Bytes to receive at once.
    room: usize,
    data: Option<ArrivingData>,
}

/// Data that has arrived in part.
#[derive(Debug)]
struct ArrivingData {
    cookie: u64,
    /// Where the next byte goes on the disk.
    offset: u64,
    left: u64,
    /// Whether the reply ends with it.
    is_last: bool,
    /// The buffer of the read, if the rest is received into it, and the offset of its first byte.
    direct: Option<(u64, Buffer)>,
}

/// What a step has found.
enum Parsed {
    Progress,
    NeedsInput,
}

impl UpstreamRx {
    /// The receiving side of connection number `connection`.
    #[must_use]
    pub(super) fn new(connection: usize, dialect: Dialect) -> Self {
        let buffer = vec![0; BUFFER_SIZE];
        Self { connection, dialect, buffer, start: 0, end: 0, room: BUFFER_SIZE, data: None }
    }

    /// Where to receive next; never empty.
    pub(super) fn room(&mut self) -> &mut [u8] {
        if let Some(ArrivingData { offset, left, direct: Some((first, buffer)), .. }) =
            &mut self.data
        {
            // Fit: the machine has checked that the data belongs into the buffer.
            let at = (*offset - *first) as usize;
            return &mut buffer[at..at + *left as usize];
        }
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
            // After one long list of extents.
            self.buffer.truncate(BUFFER_SIZE);
            self.buffer.shrink_to_fit();
        }
        let end = self.buffer.len().min(self.end + self.room);
        &mut self.buffer[self.end..end]
    }

    /// `count` bytes have been received into [`UpstreamRx::room`].
    pub(super) fn received(&mut self, count: usize) {
        match &mut self.data {
            Some(data) if data.direct.is_some() => {
                data.offset += count as u64;
                data.left -= count as u64;
            }
            _ => {
                if count == self.room {
                    self.room = BUFFER_SIZE;
                }
                self.end += count;
            }
        }
    }

    /// Whether the machine is needed: false while data arrives in the buffer of its read.
    #[must_use]
    pub(super) fn needs_machine(&self) -> bool {
        self.data.as_ref().is_none_or(|data| data.direct.is_none() || data.left == 0)
    }

    /// Handles everything received. Afterwards more has to be received.
    ///
    /// # Errors
    /// If the connection cannot be used any more.
    pub(super) fn process(&mut self, machine: &mut UpstreamMachine) -> Result<(), LossReason> {
        let outcome = self.handle_all(machine);
        if outcome.is_err() {
            machine.discredit();
        }
        outcome
    }

    fn handle_all(&mut self, machine: &mut UpstreamMachine) -> Result<(), LossReason> {
        loop {
            let step = match self.data.take() {
                Some(data) => self.data_step(data, machine)?,
                None => self.header_step(machine)?,
            };
            if matches!(step, Parsed::NeedsInput) {
                self.make_room();
                return Ok(());
            }
        }
    }

    /// Returns what belongs to the machine; the connection is lost.
    pub(super) fn abandon(&mut self, machine: &mut UpstreamMachine) {
        #[cfg(test)]
        if mutation::is_active(UpstreamMutation::KeepBuffer) {
            return;
        }
        if let Some(ArrivingData { cookie, direct: Some((_, buffer)), .. }) = self.data.take() {
            machine.return_buffer(cookie, buffer);
        }
    }

    fn bytes(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }

    /// Moves a partial message to the front of the buffer if it could not be completed behind.
    fn make_room(&mut self) {
        if self.end == self.buffer.len() {
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
    }

    fn data_step(
        &mut self,
        mut data: ArrivingData,
        machine: &mut UpstreamMachine,
    ) -> Result<Parsed, LossReason> {
        let count = self.bytes().len().min(usize::try_from(data.left).unwrap_or(usize::MAX));
        if count > 0 && data.direct.is_none() {
            machine.store(data.cookie, data.offset, &self.bytes()[..count]);
            self.start += count;
            data.offset += count as u64;
            data.left -= count as u64;
        }
        if data.left == 0 {
            if let Some((_, buffer)) = data.direct.take() {
                machine.return_buffer(data.cookie, buffer);
                self.room = ROOM_AFTER_DATA;
            }
            if data.is_last {
                machine.replied(self.connection, data.cookie)?;
            }
            return Ok(Parsed::Progress);
        }
        if data.direct.is_none() && data.left >= DIRECT_MIN {
            data.direct = machine.take_buffer(data.cookie);
        }
        self.data = Some(data);
        Ok(Parsed::NeedsInput)
    }

    fn header_step(&mut self, machine: &mut UpstreamMachine) -> Result<Parsed, LossReason> {
        let decoded = ReplyHeader::decode(self.bytes())
            .map_err(|_| LossReason::Protocol("a reply does not begin as one"))?;
        let Some((header, used)) = decoded else { return Ok(Parsed::NeedsInput) };
        match header {
            ReplyHeader::Simple { .. } if self.dialect == Dialect::Extended => {
                Err(LossReason::Protocol("a simple reply in spite of extended headers"))
            }
            ReplyHeader::Simple { cookie, error } => {
                self.start += used;
                self.simple_reply(cookie, error, machine)?;
                Ok(Parsed::Progress)
            }
            ReplyHeader::Chunk { offset, .. }
                if self.dialect == Dialect::Simple
                    || offset.is_some() != (self.dialect == Dialect::Extended) =>
            {
                Err(LossReason::Protocol("a chunk of a form that was not agreed on"))
            }
            ReplyHeader::Chunk { cookie, done, kind, length, .. } => {
                let needed = Chunk::needed(kind, length);
                if needed > CHUNK_PAYLOAD_MAX {
                    return Err(LossReason::Protocol("a chunk is too long"));
                }
                // Fits: it is limited.
                let total = used + needed as usize;
                if self.bytes().len() < total {
                    self.reserve(total);
                    return Ok(Parsed::NeedsInput);
                }
                let payload = &self.bytes()[used..total];
                let chunk = Chunk::decode(kind, length, payload)
                    .map_err(|_| LossReason::Protocol("a malformed chunk"))?;
                self.start += total;
                self.chunk(cookie, done, (length, chunk), machine)?;
                Ok(Parsed::Progress)
            }
        }
    }

    /// Makes the buffer large enough for a message of `total` bytes.
    fn reserve(&mut self, total: usize) {
        if self.buffer.len() - self.start < total {
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
            self.buffer.resize(self.buffer.len().max(total), 0);
        }
    }

    fn simple_reply(
        &mut self,
        cookie: u64,
        error: u32,
        machine: &mut UpstreamMachine,
    ) -> Result<(), LossReason> {
        let expected = machine.expected(self.connection, cookie)?;
        if error != 0 {
            machine.store_error(self.connection, cookie, errno_of(ErrorCode::from_wire(error)))?;
            return machine.replied(self.connection, cookie);
        }
        match expected {
            Expected::Data(range) if self.dialect == Dialect::Simple => {
                let place = (range.offset(), range.length());
                self.expect_data(cookie, place, true, machine)
            }
            Expected::Data(_) => Err(LossReason::Protocol("a simple reply to a read")),
            Expected::Nothing | Expected::Extents(_) => machine.replied(self.connection, cookie),
        }
    }

    fn expect_data(
        &mut self,
        cookie: u64,
        place: (u64, u64),
        is_last: bool,
        machine: &mut UpstreamMachine,
    ) -> Result<(), LossReason> {
        let range = machine.expect_data(self.connection, cookie, place)?;
        let (offset, left) = (range.offset(), range.length());
        self.data = Some(ArrivingData { cookie, offset, left, is_last, direct: None });
        Ok(())
    }

    fn chunk(
        &mut self,
        cookie: u64,
        done: bool,
        (length, chunk): (u64, Chunk),
        machine: &mut UpstreamMachine,
    ) -> Result<(), LossReason> {
        let connection = self.connection;
        match chunk {
            Chunk::None => {}
            Chunk::Data { offset } => {
                // The payload begins with the offset.
                return self.expect_data(cookie, (offset, length - 8), done, machine);
            }
            Chunk::Hole { offset, length } => {
                let zeros = machine.expect_data(connection, cookie, (offset, length.into()))?;
                machine.store_zeros(cookie, zeros);
            }
            Chunk::Status { context, extents } => {
                machine.store_extents(connection, cookie, (context, &extents))?;
            }
            Chunk::Error { code, .. } => machine.store_error(connection, cookie, errno_of(code))?,
        }
        if done { machine.replied(connection, cookie) } else { Ok(()) }
    }
}

/// The kernel's number for an error of the protocol: its numbers are those of Linux ("Error values").
fn errno_of(code: ErrorCode) -> i32 {
    i32::try_from(code.number()).unwrap_or(Errno::EIO as i32)
}

#[cfg(test)]
mod tests;
