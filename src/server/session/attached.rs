//! The data of one long reply that follows the send buffer without a copy: pages of the image in a pipe
//! ([`Pinned`]), or the buffer that an operation has read it into.
//! Never more than one piece at a time.

use super::pinned::Pinned;
use crate::disk::Buffer;
use crate::net::Stream;
use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

/// Shortest piece to send from the buffer that it was read into, in bytes: shorter ones are copied behind
/// other replies, so that one call sends many. Small in unit tests, whose disks are.
pub(super) const LOADED_MIN: u64 = if cfg!(test) { 8 << 10 } else { 64 << 10 };

/// Data to send after the send buffer.
#[derive(Debug, Default)]
pub(super) struct Attached {
    pinned: Pinned,
    loaded: Option<LoadedPart>,
}

/// Bytes to send from a buffer, which other pieces of the same read refer to as well.
#[derive(Debug)]
struct LoadedPart {
    buffer: Arc<Buffer>,
    unsent: Range<usize>,
}

impl Attached {
    /// For a connection that cannot send references.
    pub(super) fn without_references() -> Self {
        Self { pinned: Pinned::forbidden(), loaded: None }
    }

    /// Bytes that are not sent.
    pub(super) fn length(&self) -> usize {
        self.pinned.length() + self.loaded.as_ref().map_or(0, |loaded| loaded.unsent.len())
    }

    /// Bytes of memory that only they keep in use.
    pub(super) fn memory(&self) -> usize {
        let last = self.loaded.as_ref().filter(|loaded| Arc::strong_count(&loaded.buffer) == 1);
        self.pinned.length() + last.map_or(0, |loaded| loaded.buffer.len())
    }

    /// See [`Pinned::pin`].
    pub(super) fn pin(
        &mut self,
        length: usize,
        fill: impl FnOnce(BorrowedFd<'_>) -> io::Result<()>,
    ) -> io::Result<()> {
        debug_assert!(self.loaded.is_none(), "one piece at a time");
        self.pinned.pin(length, fill)
    }

    /// Puts these bytes of a buffer, in place of data that is sent.
    pub(super) fn put(&mut self, buffer: Arc<Buffer>, part: Range<usize>) {
        debug_assert!(self.length() == 0, "one piece at a time");
        self.loaded = Some(LoadedPart { buffer, unsent: part });
    }

    /// Sends as much as the socket accepts now; false if some is left.
    pub(super) fn send(&mut self, to: &Stream) -> io::Result<bool> {
        while let Some(LoadedPart { buffer, unsent }) = &mut self.loaded {
            match to.try_send(&buffer[unsent.clone()], false) {
                Ok(count) => {
                    unsent.start += count;
                    if unsent.start == unsent.end {
                        self.loaded = None;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        self.pinned.send(to)
    }

    /// Takes all bytes. Fails if the pipe contains less than was put in.
    pub(super) fn drain(&mut self) -> io::Result<Vec<u8>> {
        match self.loaded.take() {
            Some(LoadedPart { buffer, unsent }) => Ok(buffer[unsent].to_vec()),
            None => self.pinned.drain(),
        }
    }

    /// Takes at most so many bytes to send; none are pinned.
    #[cfg(any(test, fuzzing))]
    pub(super) fn take(&mut self, most: usize) -> Vec<u8> {
        assert_eq!(self.pinned.length(), 0);
        let Some(LoadedPart { buffer, unsent }) = &mut self.loaded else { return Vec::new() };
        let part = unsent.start..unsent.end.min(unsent.start.saturating_add(most));
        let taken = buffer[part.clone()].to_vec();
        unsent.start = part.end;
        if unsent.start == unsent.end {
            self.loaded = None;
        }
        taken
    }

    /// Frees the pipe if it is empty.
    pub(super) fn shrink(&mut self) {
        self.pinned.shrink();
    }

    pub(super) fn is_shrunk(&self) -> bool {
        self.pinned.is_shrunk() && self.loaded.is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    fn attached(part: Range<usize>) -> Attached {
        let mut attached = Attached::default();
        attached.put(Arc::new(Buffer::from(b"0123456789".to_vec())), part);
        attached
    }

    #[test]
    fn a_part_of_a_buffer_is_sent_and_then_gone() {
        let mut attached = attached(2..5);
        assert_eq!((attached.length(), attached.is_shrunk()), (3, false));
        let (mut client, stream) = UnixStream::pair().unwrap();
        assert!(attached.send(&Stream::Unix(stream)).unwrap());
        let mut received = Vec::new();
        client.read_to_end(&mut received).unwrap();
        assert_eq!(received, b"234");
        assert_eq!((attached.length(), attached.is_shrunk()), (0, true));
    }

    #[test]
    fn unsent_bytes_of_a_buffer_can_be_taken() {
        let mut attached = attached(2..9);
        assert_eq!(attached.take(3), b"234");
        assert_eq!(attached.drain().unwrap(), b"5678");
        assert_eq!(attached.drain().unwrap(), b"");
    }
}
