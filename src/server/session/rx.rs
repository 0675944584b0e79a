//! Receive buffer: bytes that a client has sent and the session has not consumed.
//! Never holds more than [`CAPACITY`] bytes, so that a client cannot make it grow.
//!
//! The rest of a long piece of a write can be received into a buffer of its own, in which an operation then
//! writes it: without a copy, and aligned for the disk.

use crate::disk::Buffer;
#[cfg(test)]
use crate::disk::mutation::{self, Mutation};
use crate::net::Stream;
use memmap2::MmapMut;
use std::io;

/// Size of the buffer in bytes. Large enough for a whole piece of a write behind the end of another.
pub(super) const CAPACITY: usize = 320 << 10;
/// Shortest rest of a piece to receive into a buffer of its own, in bytes: copying a shorter one costs less
/// than the system call. Small in unit tests, whose writes are.
const DIRECT_MIN: usize = if cfg!(test) { 1 << 10 } else { 32 << 10 };
/// How much to receive at once behind such a piece, in bytes: the header of the next request, and little of
/// its payload that would have to be copied.
const ROOM_AFTER_PIECE: usize = 4 << 10;

/// A buffer between the socket and the parser, from which payloads are written to the disk without a
/// copy. Payloads are not aligned to pages: to write 256 KiB took 18.7 µs from the beginning of a page
/// and 19.5 µs from 28 bytes behind it, where the first payload is.
#[derive(Debug, Default)]
pub(super) struct Rx {
    /// `None` while it is empty and the session idle. Mapped, because a failed `mmap` is an error
    /// that we can handle, whereas a failed allocation ends the process.
    buffer: Option<MmapMut>,
    start: usize,
    end: usize,
    /// Most bytes to receive into the buffer at once; 0 for no limit.
    room: usize,
    /// The piece to receive into; the buffer is empty meanwhile.
    piece: Option<ArrivingPiece>,
}

/// A piece of a write in a buffer of its own.
#[derive(Debug)]
struct ArrivingPiece {
    data: Buffer,
    /// Bytes that have arrived.
    arrived: usize,
}

impl Rx {
    /// An rx that contains these bytes. `None` if they are too many, or no memory is left.
    pub(super) fn restore(bytes: &[u8]) -> Option<Self> {
        let mut rx = Self::default();
        if bytes.len() > CAPACITY {
            return None;
        }
        if !bytes.is_empty() {
            let mut buffer = MmapMut::map_anon(CAPACITY).ok()?;
            buffer[..bytes.len()].copy_from_slice(bytes);
            (rx.buffer, rx.end) = (Some(buffer), bytes.len());
        }
        Some(rx)
    }

    /// All bytes, for the next process.
    pub(super) fn save(&self) -> Vec<u8> {
        match &self.piece {
            Some(piece) => piece.data[..piece.arrived].to_vec(),
            None => self.bytes().to_vec(),
        }
    }

    /// The bytes in the buffer.
    pub(super) fn bytes(&self) -> &[u8] {
        self.buffer.as_deref().map_or(&[], |buffer| &buffer[self.start..self.end])
    }

    /// Bytes of memory for a piece in a buffer of its own.
    pub(super) fn piece_memory(&self) -> usize {
        self.piece.as_ref().map_or(0, |piece| piece.data.len())
    }

    /// Whether nothing has arrived that is not consumed.
    pub(super) fn is_empty(&self) -> bool {
        self.start == self.end && self.piece.is_none()
    }

    /// The next `length` bytes, once they have arrived; `length` is that of the piece, if there is one.
    pub(super) fn arrived(&self, length: usize) -> Option<&[u8]> {
        match &self.piece {
            Some(piece) => (piece.arrived == piece.data.len()).then_some(&*piece.data),
            None => self.bytes().get(..length),
        }
    }

    /// Receives the next `length` bytes into a buffer of their own, aligned to `align`, if enough of them are
    /// still to arrive, and there is memory.
    pub(super) fn expect_piece(&mut self, length: usize, align: usize) {
        let arrived = self.end - self.start;
        if self.piece.is_some() || length < arrived + DIRECT_MIN {
            return;
        }
        let Ok(mut data) = Buffer::to_fill(length, align) else { return };
        #[cfg(test)]
        let arrived = if mutation::is_active(Mutation::ForgetArrived) { 0 } else { arrived };
        data[..arrived].copy_from_slice(&self.bytes()[..arrived]);
        self.consume(arrived);
        self.piece = Some(ArrivingPiece { data, arrived });
    }

    /// Removes the next `length` bytes, which have arrived, and returns them aligned to `align`.
    ///
    /// # Errors
    /// `ENOMEM`; then they stay.
    pub(super) fn take(&mut self, length: usize, align: usize) -> io::Result<Buffer> {
        if let Some(piece) = self.piece.take_if(|piece| piece.data.is_aligned_to(align)) {
            self.room = ROOM_AFTER_PIECE;
            return Ok(piece.data);
        }
        let data = Buffer::copy_of(self.arrived(length).unwrap_or_default(), align)?;
        self.skip(length);
        Ok(data)
    }

    /// Removes the next `length` bytes, which have arrived.
    pub(super) fn skip(&mut self, length: usize) {
        if self.piece.take().is_none() {
            self.consume(length);
        }
    }

    /// Removes the first `count` bytes.
    pub(super) fn consume(&mut self, count: usize) {
        self.start += count.min(self.end - self.start);
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
    }

    /// Receives as many bytes as have arrived and fit; returns how many, 0 at the end of the stream.
    /// Errors: `WouldBlock` when nothing has arrived; `OutOfMemory` when the buffer is full or no memory
    /// is left; otherwise the connection is broken.
    pub(super) fn receive(&mut self, from: &Stream) -> io::Result<usize> {
        let count = from.try_recv(self.space()?)?;
        self.received(count);
        Ok(count)
    }

    fn received(&mut self, count: usize) {
        if let Some(piece) = &mut self.piece {
            piece.arrived += count;
            return;
        }
        self.end += count;
        if count == self.room {
            self.room = 0;
        }
    }

    /// Whether a piece is received into a buffer of its own.
    #[cfg(test)]
    pub(super) fn has_piece(&self) -> bool {
        self.piece.is_some()
    }

    /// Puts as many of these bytes into the buffer as fit; returns how many.
    #[cfg(any(test, fuzzing))]
    pub(super) fn fill(&mut self, bytes: &[u8]) -> usize {
        let space = self.space().unwrap_or_default();
        let count = bytes.len().min(space.len());
        space[..count].copy_from_slice(&bytes[..count]);
        self.received(count);
        count
    }

    /// The free space behind the bytes. Fails with `OutOfMemory` when there is none.
    fn space(&mut self) -> io::Result<&mut [u8]> {
        if self.is_full() {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        if let Some(ArrivingPiece { data, arrived }) = &mut self.piece {
            return Ok(&mut data[*arrived..]);
        }
        let buffer = match &mut self.buffer {
            Some(buffer) => buffer,
            none => none.insert(MmapMut::map_anon(CAPACITY)?),
        };
        if self.start > 0 && self.end == CAPACITY {
            buffer.copy_within(self.start.., 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        let end = if self.room == 0 { CAPACITY } else { CAPACITY.min(self.end + self.room) };
        Ok(&mut buffer[self.end..end])
    }

    /// Whether bytes must be consumed before more can be received.
    pub(super) fn is_full(&self) -> bool {
        match &self.piece {
            Some(piece) => piece.arrived == piece.data.len(),
            None => self.end - self.start == CAPACITY,
        }
    }

    /// Frees the buffer if it is empty.
    pub(super) fn shrink(&mut self) {
        if self.start == self.end {
            self.buffer = None;
        }
    }

    pub(super) fn is_shrunk(&self) -> bool {
        self.buffer.is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    fn pair() -> (UnixStream, Stream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (ours, Stream::Unix(theirs))
    }

    #[test]
    fn bytes_keep_their_order_with_any_consumption() {
        let (mut client, stream) = pair();
        let mut rx = Rx::default();
        let mut expected = 0u32;
        let mut sent = 0u32;
        for round in 1..2000usize {
            for _ in 0..round % 50 {
                client.write_all(&sent.to_be_bytes()).unwrap();
                sent += 1;
            }
            if sent > expected {
                let _ = rx.receive(&stream);
            }
            for _ in 0..round % 41 {
                let Some(field) = rx.bytes().first_chunk::<4>() else { break };
                assert_eq!(u32::from_be_bytes(*field), expected);
                expected += 1;
                rx.consume(4);
            }
        }
        assert!(expected > 20_000);
    }

    #[test]
    fn a_long_piece_arrives_in_a_buffer_of_its_own() {
        let payload: Vec<u8> = (0..9000u32).map(|at| (at % 251) as u8).collect();
        for before in [0, 1, 500, 9000 - DIRECT_MIN] {
            let mut rx = Rx::default();
            rx.fill(&payload[..before]);
            rx.expect_piece(9000, 512);
            assert!(rx.has_piece() && !rx.is_empty() && rx.bytes().is_empty());
            rx.expect_piece(9000, 512);
            let mut sent = before;
            while sent < 9000 {
                assert!(rx.arrived(9000).is_none() && !rx.is_full(), "{sent}");
                assert_eq!(rx.save(), payload[..sent]);
                sent += rx.fill(&payload[sent..payload.len().min(sent + 777)]);
            }
            assert!(rx.is_full() && rx.arrived(9000).unwrap() == payload);
            let data = rx.take(9000, 512).unwrap();
            assert!(data.is_aligned_to(512) && *data == payload && rx.is_empty());
            // The next requests arrive as before.
            rx.fill(b"next");
            assert_eq!((rx.bytes(), rx.has_piece()), (&b"next"[..], false));
        }
    }

    #[test]
    fn a_short_rest_of_a_piece_arrives_in_the_buffer() {
        let mut rx = Rx::default();
        rx.fill(&[7; 100]);
        rx.expect_piece(99 + DIRECT_MIN, 512);
        assert!(!rx.has_piece());
        rx.fill(&[7; DIRECT_MIN]);
        assert_eq!(rx.arrived(99 + DIRECT_MIN).unwrap(), [7; 99 + DIRECT_MIN]);
        let data = rx.take(99 + DIRECT_MIN, 512).unwrap();
        assert!(data.is_aligned_to(512) && *data == [7; 99 + DIRECT_MIN]);
        assert_eq!(rx.bytes(), [7]);
    }

    #[test]
    fn a_piece_can_be_skipped_and_realigned() {
        let mut rx = Rx::default();
        rx.expect_piece(5000, 1);
        rx.fill(&[7; 5000]);
        rx.skip(5000);
        assert!(rx.is_empty());
        rx.expect_piece(5000, 4096);
        rx.fill(&[8; 5000]);
        let data = rx.take(5000, 1 << 16).unwrap();
        assert!(data.is_aligned_to(1 << 16) && *data == [8; 5000] && rx.is_empty());
    }

    #[test]
    fn little_is_received_behind_a_piece() {
        let (mut client, stream) = pair();
        let mut rx = Rx::default();
        rx.expect_piece(5000, 1);
        client.write_all(&[7; 5000 + 2 * ROOM_AFTER_PIECE]).unwrap();
        assert_eq!(rx.receive(&stream).unwrap(), 5000);
        rx.take(5000, 1).unwrap();
        assert_eq!(rx.receive(&stream).unwrap(), ROOM_AFTER_PIECE);
        // As much as there is once more had arrived.
        client.write_all(&[7; ROOM_AFTER_PIECE]).unwrap();
        assert_eq!(rx.receive(&stream).unwrap(), 2 * ROOM_AFTER_PIECE);
    }

    #[test]
    fn a_restored_rx_continues_the_stream() {
        let (mut client, stream) = pair();
        let mut rx = Rx::restore(b"abc").unwrap();
        client.write_all(b"def").unwrap();
        rx.consume(1);
        rx.receive(&stream).unwrap();
        assert_eq!(rx.bytes(), b"bcdef");
        assert!(Rx::restore(&[]).unwrap().is_shrunk());
        assert!(Rx::restore(&[0; CAPACITY]).unwrap().is_full());
        assert!(Rx::restore(&[0; CAPACITY + 1]).is_none());
    }

    #[test]
    fn a_full_rx_receives_nothing_and_an_empty_one_shrinks() {
        let (mut client, stream) = pair();
        let mut rx = Rx::default();
        while !rx.is_full() {
            client.write_all(&[7; 4096]).unwrap();
            rx.receive(&stream).unwrap();
        }
        assert_eq!(rx.bytes().len(), CAPACITY);
        let more = rx.receive(&stream).unwrap_err();
        assert_eq!(more.kind(), io::ErrorKind::OutOfMemory);
        rx.shrink();
        assert!(!rx.is_shrunk());
        rx.consume(CAPACITY);
        rx.shrink();
        assert!(rx.is_shrunk());
    }
}
