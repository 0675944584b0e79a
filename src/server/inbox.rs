//! Bytes that a client sent and that were not used yet.
//! Never asks for more than its buffer holds, so that a client cannot make it grow.

use crate::net::Stream;
use memmap2::MmapMut;
use std::io;

/// How much is received at once, in bytes. Large enough for a whole piece of a write behind the
/// end of another one.
pub(super) const CAPACITY: usize = 320 << 10;

/// A buffer between the socket and the parser. A payload is written to the disk from where it lies.
/// Where that is, is left to chance: to write 256 KiB took 18.7 µs from the beginning of a page and
/// 19.5 µs from 28 bytes behind it, where the first payload lies.
#[derive(Debug, Default)]
pub(super) struct Inbox {
    /// None while nothing is held, so that an idle session costs no memory. Mapped, since the kernel
    /// can refuse that: memory that the allocator does not get ends the process.
    buffer: Option<MmapMut>,
    start: usize,
    end: usize,
}

impl Inbox {
    /// One that holds these bytes already; none if they are more than it can hold, or there is no
    /// memory.
    pub(super) fn holding(bytes: &[u8]) -> Option<Self> {
        let mut inbox = Self::default();
        if bytes.len() > CAPACITY {
            return None;
        }
        if !bytes.is_empty() {
            let mut buffer = MmapMut::map_anon(CAPACITY).ok()?;
            buffer[..bytes.len()].copy_from_slice(bytes);
            (inbox.buffer, inbox.end) = (Some(buffer), bytes.len());
        }
        Some(inbox)
    }

    /// What arrived and was not used.
    pub(super) fn bytes(&self) -> &[u8] {
        self.buffer.as_deref().map_or(&[], |buffer| &buffer[self.start..self.end])
    }

    /// Marks the first `count` bytes as used.
    pub(super) fn consume(&mut self, count: usize) {
        self.start += count.min(self.end - self.start);
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
    }

    /// Takes what the client has sent, as far as there is room; 0 is the end of the stream.
    ///
    /// # Errors
    /// `WouldBlock` when nothing has arrived; `OutOfMemory` when there is no room at all, or no memory;
    /// otherwise the connection is broken.
    pub(super) fn receive(&mut self, from: &Stream) -> io::Result<usize> {
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
        let count = from.try_recv(&mut buffer[self.end..])?;
        self.end += count;
        Ok(count)
    }

    /// Whether nothing more can be received before something is used.
    pub(super) fn is_full(&self) -> bool {
        self.end - self.start == CAPACITY
    }

    /// Gives the memory back if nothing is held.
    pub(super) fn relax(&mut self) {
        if self.start == self.end {
            self.buffer = None;
        }
    }

    /// Whether there is memory to give back.
    pub(super) fn is_relaxed(&self) -> bool {
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
    fn bytes_come_out_in_the_order_they_came_in_however_they_are_used() {
        let (mut client, stream) = pair();
        let mut inbox = Inbox::default();
        let mut expected = 0u32;
        let mut sent = 0u32;
        for round in 1..2000usize {
            for _ in 0..round % 50 {
                client.write_all(&sent.to_be_bytes()).unwrap();
                sent += 1;
            }
            if sent > expected {
                let _ = inbox.receive(&stream);
            }
            for _ in 0..round % 41 {
                let Some(field) = inbox.bytes().first_chunk::<4>() else { break };
                assert_eq!(u32::from_be_bytes(*field), expected);
                expected += 1;
                inbox.consume(4);
            }
        }
        assert!(expected > 20_000);
    }

    #[test]
    fn an_inbox_goes_on_where_another_one_was() {
        let (mut client, stream) = pair();
        let mut inbox = Inbox::holding(b"abc").unwrap();
        client.write_all(b"def").unwrap();
        inbox.consume(1);
        inbox.receive(&stream).unwrap();
        assert_eq!(inbox.bytes(), b"bcdef");
        assert!(Inbox::holding(&[]).unwrap().is_relaxed());
        assert!(Inbox::holding(&[0; CAPACITY]).unwrap().is_full());
        assert!(Inbox::holding(&[0; CAPACITY + 1]).is_none());
    }

    #[test]
    fn a_full_inbox_asks_for_no_more_and_an_empty_one_costs_nothing() {
        let (mut client, stream) = pair();
        let mut inbox = Inbox::default();
        while !inbox.is_full() {
            client.write_all(&[7; 4096]).unwrap();
            inbox.receive(&stream).unwrap();
        }
        assert_eq!(inbox.bytes().len(), CAPACITY);
        let more = inbox.receive(&stream).unwrap_err();
        assert_eq!(more.kind(), io::ErrorKind::OutOfMemory);
        inbox.relax();
        assert!(!inbox.is_relaxed());
        inbox.consume(CAPACITY);
        inbox.relax();
        assert!(inbox.is_relaxed());
    }
}
