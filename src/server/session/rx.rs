//! Receive buffer: bytes that a client has sent and the session has not consumed.
//! Never larger than [`CAPACITY`], so that a client cannot make it grow.

use crate::net::Stream;
use memmap2::MmapMut;
use std::io;

/// Size of the buffer in bytes. Large enough for a whole piece of a write behind the end of another.
pub(super) const CAPACITY: usize = 320 << 10;

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

    pub(super) fn bytes(&self) -> &[u8] {
        self.buffer.as_deref().map_or(&[], |buffer| &buffer[self.start..self.end])
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
        self.end += count;
        Ok(count)
    }

    /// Puts as many of these bytes into the buffer as fit; returns how many.
    #[cfg(test)]
    pub(super) fn fill(&mut self, bytes: &[u8]) -> usize {
        let space = self.space().unwrap();
        let count = bytes.len().min(space.len());
        space[..count].copy_from_slice(&bytes[..count]);
        self.end += count;
        count
    }

    /// The free space behind the bytes. Fails with `OutOfMemory` when there is none.
    fn space(&mut self) -> io::Result<&mut [u8]> {
        if self.is_full() {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        let buffer = match &mut self.buffer {
            Some(buffer) => buffer,
            none => none.insert(MmapMut::map_anon(CAPACITY)?),
        };
        if self.start > 0 && self.end == CAPACITY {
            buffer.copy_within(self.start.., 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        Ok(&mut buffer[self.end..])
    }

    /// Whether bytes must be consumed before more can be received.
    pub(super) fn is_full(&self) -> bool {
        self.end - self.start == CAPACITY
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
