//! A session's access to the disk: the gate, and the operations in flight.
//! Never waits: an operation that cannot begin now returns the reason.

use crate::disk::inflight::{InFlight, OpTag};
#[cfg(test)]
use crate::disk::mutation::{self, Mutation};
use crate::disk::{Buffer, Disk, Notifier, Op, Visit};
use crate::nbd::reply::ReplyTo;
use crate::nbd::request::Request;
use crate::range::Range;
use crate::server::end::SessionEnd;
use crate::server::payload_memory::SessionMemory;
use std::sync::Arc;
use std::time::Instant;

/// The most bytes to read or write at once.
pub(super) const PIECE: u64 = 256 << 10;
/// The most bytes to load at once for one read.
pub(super) const LOAD_MAX: usize = 1 << 20;
/// Pieces end at multiples of this, so that the disk sees whole blocks.
const BLOCK: u64 = 4096;

/// The disk as one session sees it.
#[derive(Debug)]
pub(super) struct DiskIo<'a> {
    pub(super) disk: &'a Disk,
    pub(super) in_flight: InFlight<'a, Tag>,
    memory: SessionMemory,
    /// Bytes that were read and not sent when [`DiskIo::settle_memory`] was called.
    loaded: usize,
    /// Bytes of the piece of a write that was arriving in a buffer of its own then.
    arriving: usize,
}

/// What to do with a completion.
#[derive(Debug)]
pub(super) enum Tag {
    /// Reply with its result.
    Answer { to: ReplyTo, request: Request },
    /// Continue the read with this number, of a request that gets this reply: its data is loaded.
    Load { number: u64, to: ReplyTo },
    /// A piece of a long write, by the number of that write, is written.
    Piece(u64),
}

impl OpTag for Tag {
    fn cookie(&self) -> Option<u64> {
        match self {
            Self::Answer { to, .. } | Self::Load { to, .. } => Some(to.cookie),
            // Many of them are in flight at once.
            Self::Piece(_) => None,
        }
    }
}

/// Why an operation cannot begin now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Busy {
    /// The gate is closed. The session is notified when it opens.
    Gate,
    /// An operation in flight has to complete first.
    InFlight,
}

impl<'a> DiskIo<'a> {
    /// `clock` measures how long the disk takes.
    pub(super) fn new(
        disk: &'a Disk,
        notifier: Arc<dyn Notifier>,
        memory: SessionMemory,
        clock: fn() -> Instant,
    ) -> Self {
        let in_flight = InFlight::new(disk, notifier, clock);
        Self { disk, in_flight, memory, loaded: 0, arriving: 0 }
    }

    /// Whether a write of this many bytes may begin. One may always be in flight.
    pub(super) fn has_room_to_write(&mut self, bytes: usize) -> bool {
        let reads = self.in_flight.read_memory() + self.loaded;
        self.in_flight.has_room(bytes)
            && (self.in_flight.write_memory() == 0
                || self.may_hold(bytes + LOAD_MAX.saturating_sub(reads)))
    }

    /// Whether a read of this many bytes may begin. One may always be in flight.
    pub(super) fn has_room_to_read(&mut self, bytes: usize) -> bool {
        // It fits: a piece is at most 256 KiB.
        let piece = PIECE as usize;
        self.in_flight.has_room_to_read(bytes)
            && (self.in_flight.read_memory() == 0
                || self.may_hold(bytes + piece.saturating_sub(self.in_flight.write_memory())))
    }

    /// Whether the payloads may take this many bytes more, after spare buffers are freed if need be.
    fn may_hold(&mut self, more: usize) -> bool {
        let wanted = (self.payloads() + more) as u64;
        if self.memory.may_hold(wanted + Buffer::spare_memory() as u64) {
            return true;
        }
        Buffer::free_spares();
        self.memory.may_hold(wanted)
    }

    /// Counts the memory of the session, which holds `loaded` bytes that were read and are not sent, and
    /// `arriving` bytes for a piece of a write.
    pub(super) fn settle_memory(&mut self, loaded: usize, arriving: usize) {
        (self.loaded, self.arriving) = (loaded, arriving);
        self.may_hold(0);
        self.memory.settle((self.payloads() + Buffer::spare_memory()) as u64);
    }

    fn payloads(&self) -> usize {
        let in_flight = self.in_flight.write_memory() + self.in_flight.read_memory();
        self.loaded + self.arriving + in_flight
    }

    /// Enters the gate.
    pub(super) fn visit(&self) -> Result<Result<Visit<'a>, Busy>, SessionEnd> {
        match self.disk.enter_if_open() {
            Ok(Some(visit)) => Ok(Ok(visit)),
            Ok(None) => {
                self.in_flight.notify_when_gate_opens();
                Ok(Err(Busy::Gate))
            }
            Err(_) => Err(SessionEnd::DiskGone),
        }
    }

    /// Fails if the disk is gone: operations that wait to start never will.
    pub(super) fn check_disk(&self) -> Result<(), SessionEnd> {
        #[cfg(test)]
        if mutation::is_active(Mutation::SkipDiskCheck) {
            return Ok(());
        }
        match self.in_flight.has_waiting().then(|| self.disk.enter_if_open()) {
            Some(Err(_)) => Err(SessionEnd::DiskGone),
            _ => Ok(()),
        }
    }

    /// Begins an operation whose result is the reply to a request.
    pub(super) fn begin_answer(
        &mut self,
        to: ReplyTo,
        request: Request,
        op: Op,
    ) -> Result<Result<(), Busy>, SessionEnd> {
        let visit = match self.visit()? {
            Ok(visit) => visit,
            Err(busy) => return Ok(Err(busy)),
        };
        self.in_flight.begin(visit, op, Tag::Answer { to, request });
        Ok(Ok(()))
    }
}

/// Length of the next piece of `range`, which ends at a block boundary unless it is the last.
pub(super) fn piece_length(range: Range) -> u64 {
    if range.length() <= PIECE {
        return range.length();
    }
    PIECE - (range.offset() % BLOCK)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_end_at_block_boundaries_and_are_never_empty() {
        for offset in [0, 1, 4095, 4096, 5000] {
            let long = Range::within(1 << 40, offset, 1 << 30).unwrap();
            let length = piece_length(long);
            assert!(length > 0 && length <= PIECE);
            assert_eq!((offset + length) % BLOCK, 0);
            let short = Range::within(1 << 40, offset, 100).unwrap();
            assert_eq!(piece_length(short), 100);
        }
    }
}
