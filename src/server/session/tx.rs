//! Send buffer: replies that the client has not received yet.
//! Keeps each reply contiguous: replies that complete while a simple read is being sent are deferred
//! until it is complete. The data of a long read may follow the buffer without a copy ([`Attached`]). A
//! simple read that is too long for the buffer is announced by its header first; its range of the
//! disk is then read and appended piece by piece.

use super::attached::Attached;
use crate::disk::Buffer;
#[cfg(test)]
use crate::disk::mutation::{self, Mutation};
use crate::net::Stream;
use crate::range::Range;
use crate::server::snapshot::UnsentSnapshot;
use memmap2::MmapMut;
use nix::errno::Errno;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

/// With this many unsent bytes, a session sends before it answers more reads. Larger batches need
/// fewer calls, but the client could not process one batch while the session answers the next. (Reads
/// of 4 KiB at depth 32 are answered 1.7 times as fast as with 256 KiB.)
pub(super) const FULL: usize = 32 << 10;
/// With this many unsent bytes, a session answers nothing more. Greater than the longest simple reply
/// that is buffered as a whole, so that other requests are still answered beside it.
pub(super) const OVERFULL: usize = (512 << 10) + (1 << 20);
/// Unit of the buffer's size, in bytes.
pub(super) const BUFFER_UNIT: usize = 320 << 10;
/// With this many bytes deferred behind a simple read, a session answers nothing more.
pub(super) const DEFERRED_MAX: usize = 64 << 10;

/// A buffer between the execution of requests and the socket.
#[derive(Debug)]
pub(super) struct Tx {
    /// Those before `start` and from `end` on are free space. Mapped, so that only used pages take memory,
    /// an idle session returns it, and a failure is an error that we can handle.
    buffer: Option<MmapMut>,
    start: usize,
    end: usize,
    /// While the data of a simple read is incomplete: the replies to follow it.
    deferred: Option<Vec<u8>>,
    /// Data that follows the buffer.
    attached: Attached,
    /// The rest of the range that the header of a simple reply has announced, still to be read.
    announced: Range,
    /// A reply was lost because no memory was left: the session has to end.
    out_of_memory: bool,
    scratch: Vec<u8>,
}

impl Default for Tx {
    fn default() -> Self {
        Self {
            buffer: None,
            start: 0,
            end: 0,
            deferred: None,
            attached: Attached::default(),
            announced: Range::whole(0),
            out_of_memory: false,
            scratch: Vec::new(),
        }
    }
}

impl Tx {
    /// Saves everything that was not sent. Fails if pinned data cannot be read or a reply is lost: the
    /// next process could not continue the stream.
    pub(super) fn save(mut self) -> io::Result<UnsentSnapshot> {
        if self.attached.length() > 0 {
            let attached = self.attached.drain()?;
            self.append(&attached);
            self.release_deferred();
        }
        if self.out_of_memory {
            return Err(Errno::ENOMEM.into());
        }
        let bytes = self.unsent_bytes().to_vec();
        Ok(UnsentSnapshot { bytes, announced: self.announced.into(), deferred: self.deferred })
    }

    /// Restores an tx on a disk of `size` bytes; `None` if the announced range exceeds it, or no
    /// memory is left.
    pub(super) fn restore(unsent: UnsentSnapshot, size: u64) -> Option<Self> {
        let UnsentSnapshot { bytes, announced, deferred } = unsent;
        let mut tx = Self { announced: announced.within(size)?, ..Self::default() };
        tx.append(&bytes);
        tx.deferred = deferred;
        (!tx.out_of_memory).then_some(tx)
    }

    /// For a connection that cannot send references (`Stream::sends_references`).
    pub(super) fn without_references() -> Self {
        Self { attached: Attached::without_references(), ..Self::default() }
    }

    pub(super) fn is_empty(&self) -> bool {
        !self.has_bytes() && self.deferred.is_none()
    }

    pub(super) fn has_bytes(&self) -> bool {
        // The driver has to send, to find out that a reply is lost.
        self.start < self.end || self.attached.length() > 0 || self.out_of_memory
    }

    /// Whether to send before answering more reads.
    pub(super) fn is_full(&self) -> bool {
        #[cfg(test)]
        if mutation::is_active(Mutation::OverfillTx) {
            return self.attached.length() > 0;
        }
        self.end - self.start >= FULL || self.attached.length() > 0
    }

    /// Whether to send before answering anything at all.
    pub(super) fn is_overfull(&self) -> bool {
        self.end - self.start >= OVERFULL
            || self.deferred.as_ref().is_some_and(|deferred| deferred.len() >= DEFERRED_MAX)
    }

    /// Appends the whole reply that `write` writes.
    pub(super) fn reply(&mut self, write: impl FnOnce(&mut Vec<u8>)) {
        if let Some(deferred) = &mut self.deferred {
            return write(deferred);
        }
        let mut scratch = std::mem::take(&mut self.scratch);
        scratch.clear();
        write(&mut scratch);
        self.append(&scratch);
        self.scratch = scratch;
    }

    /// Appends bytes. If no memory is left, the next [`Tx::send`] fails.
    fn append(&mut self, bytes: &[u8]) {
        match self.reserve(bytes.len()) {
            Ok(space) => {
                space.copy_from_slice(bytes);
                self.end += bytes.len();
            }
            Err(_) => self.out_of_memory = true,
        }
    }

    /// Appends the header that `head` writes and `length` bytes that `fill` fills in; appends nothing
    /// if `fill` fails. Fails with the error of `fill`, or `ENOMEM`.
    pub(super) fn reply_with_data(
        &mut self,
        head: impl FnOnce(&mut Vec<u8>),
        length: usize,
        fill: impl FnOnce(&mut [u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        debug_assert!(self.deferred.is_none(), "a reply inside the data of another");
        let mut scratch = std::mem::take(&mut self.scratch);
        scratch.clear();
        head(&mut scratch);
        let outcome = self.reserve(scratch.len() + length).and_then(|space| {
            let (front, data) = space.split_at_mut(scratch.len());
            front.copy_from_slice(&scratch);
            fill(data)
        });
        if outcome.is_ok() {
            self.end += scratch.len() + length;
        }
        self.scratch = scratch;
        outcome
    }

    /// Appends the header that `head` writes and `length` bytes that `fill` puts into a pipe; appends
    /// nothing if `fill` fails. Defers later replies until these bytes are sent.
    /// Fails with the error of `fill`, or `Unsupported` without a pipe.
    pub(super) fn reply_with_pinned(
        &mut self,
        head: impl FnOnce(&mut Vec<u8>),
        length: usize,
        fill: impl FnOnce(BorrowedFd<'_>) -> io::Result<()>,
    ) -> io::Result<()> {
        self.attached.pin(length, fill)?;
        self.reply(head);
        self.defer_replies();
        Ok(())
    }

    /// Appends the header that `head` writes and these bytes of a buffer. Defers later replies until they are
    /// sent.
    pub(super) fn reply_with_loaded(
        &mut self,
        head: impl FnOnce(&mut Vec<u8>),
        buffer: Arc<Buffer>,
        part: std::ops::Range<usize>,
    ) {
        self.attached.put(buffer, part);
        self.reply(head);
        self.defer_replies();
    }

    /// Tries whether `fill` can fill `length` bytes, and discards them. Fails with the error of `fill`,
    /// or `ENOMEM`.
    pub(super) fn try_fill(
        &mut self,
        length: usize,
        fill: impl FnOnce(&mut [u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        fill(self.reserve(length)?)
    }

    /// Called after the header of a simple reply: its data is this range of the disk. Defers later
    /// replies until the range is appended.
    pub(super) fn announce(&mut self, range: Range) {
        debug_assert!(self.announced.is_empty(), "one range at a time");
        self.announced = range;
        self.defer_replies();
    }

    /// The rest of the announced range.
    pub(super) fn announced(&self) -> Range {
        self.announced
    }

    /// Appends the next `length` bytes of the announced range, which `fill` fills in. Fails
    /// with the error of `fill`, or `ENOMEM`; then the reply cannot be completed.
    pub(super) fn append_announced(
        &mut self,
        length: usize,
        fill: impl FnOnce(&mut [u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        fill(self.reserve(length)?)?;
        self.end += length;
        self.announced = self.announced.split(length as u64).1;
        Ok(())
    }

    /// Defers replies from now on: data of the previous one is still to be appended.
    fn defer_replies(&mut self) {
        self.deferred.get_or_insert_default();
    }

    /// Appends the deferred replies: the previous one is complete.
    pub(super) fn release_deferred(&mut self) {
        if let Some(deferred) = self.deferred.take() {
            self.append(&deferred);
        }
    }

    /// Sends as many bytes as the socket accepts now; false if some are left. Fails if the
    /// connection is broken, or a reply is lost because no memory was left.
    pub(super) fn send(&mut self, to: &Stream) -> io::Result<bool> {
        if self.out_of_memory {
            return Err(Errno::ENOMEM.into());
        }
        if !self.send_bytes(to)? {
            return Ok(false);
        }
        if self.attached.length() == 0 {
            return Ok(true);
        }
        if !self.attached.send(to)? {
            return Ok(false);
        }
        self.release_deferred();
        self.send_bytes(to)
    }

    fn send_bytes(&mut self, to: &Stream) -> io::Result<bool> {
        let more = self.attached.length() > 0;
        while self.start < self.end {
            match to.try_send(self.unsent_bytes(), more) {
                Ok(count) => self.start += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        (self.start, self.end) = (0, 0);
        Ok(true)
    }

    /// Takes at most so many bytes to send; no data is pinned.
    #[cfg(any(test, fuzzing))]
    pub(super) fn take(&mut self, most: usize) -> Vec<u8> {
        assert!(!self.out_of_memory);
        let end = self.end.min(self.start.saturating_add(most));
        let mut taken = self.unsent_bytes()[..end - self.start].to_vec();
        self.start = end;
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
            if self.attached.length() > 0 {
                taken.extend(self.attached.take(most - taken.len()));
                if self.attached.length() == 0 {
                    self.release_deferred();
                }
            }
        }
        taken
    }

    /// Frees the memory and the pipe if everything was sent.
    pub(super) fn shrink(&mut self) {
        if self.is_empty() {
            self.buffer = None;
            self.scratch = Vec::new();
            self.attached.shrink();
        }
    }

    /// Whether there is nothing to free.
    pub(super) fn is_shrunk(&self) -> bool {
        self.buffer.is_none() && self.attached.is_shrunk()
    }

    /// Bytes of memory that the data behind the buffer takes.
    pub(super) fn attached_memory(&self) -> usize {
        self.attached.memory()
    }

    /// The number of bytes that can be sent, pinned ones included.
    pub(super) fn unsent(&self) -> u64 {
        (self.end - self.start + self.attached.length()) as u64
    }

    fn unsent_bytes(&self) -> &[u8] {
        self.buffer.as_deref().map_or(&[], |buffer| &buffer[self.start..self.end])
    }

    /// Space for `length` bytes at the end.
    fn reserve(&mut self, length: usize) -> io::Result<&mut [u8]> {
        if let Some(buffer) = &mut self.buffer
            && self.start > 0
            && self.end + length > buffer.len()
        {
            buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        let needed = self.end + length;
        if needed > self.buffer.as_ref().map_or(0, |buffer| buffer.len()) {
            let wanted = needed.next_multiple_of(BUFFER_UNIT);
            let mut larger = MmapMut::map_anon(wanted).map_err(|_| Errno::ENOMEM)?;
            larger[self.start..self.end].copy_from_slice(self.unsent_bytes());
            self.buffer = Some(larger);
        }
        Ok(self.buffer.as_mut().map_or(&mut [], |buffer| &mut buffer[self.end..needed]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    fn sent(tx: &mut Tx) -> Vec<u8> {
        let (mut client, stream) = UnixStream::pair().unwrap();
        let stream = Stream::Unix(stream);
        assert!(tx.send(&stream).unwrap());
        drop(stream);
        let mut all = Vec::new();
        client.read_to_end(&mut all).unwrap();
        all
    }

    fn fill(byte: u8) -> impl FnOnce(&mut [u8]) -> io::Result<()> {
        move |data| {
            data.fill(byte);
            Ok(())
        }
    }

    #[test]
    fn a_lost_reply_counts_as_bytes_to_send() {
        let mut tx = Tx { out_of_memory: true, ..Tx::default() };
        assert!(tx.has_bytes());
        assert!(tx.send(&Stream::Unix(UnixStream::pair().unwrap().0)).is_err());
    }

    #[test]
    fn replies_during_a_simple_read_are_deferred() {
        let mut tx = Tx::default();
        tx.reply(|out| out.extend_from_slice(b"a"));
        tx.reply_with_data(|out| out.extend_from_slice(b"h"), 2, fill(b'1')).unwrap();
        tx.defer_replies();
        tx.reply(|out| out.extend_from_slice(b"late"));
        tx.try_fill(2, fill(b'x')).unwrap();
        tx.append_announced(2, fill(b'2')).unwrap();
        assert!(!tx.is_empty());
        tx.release_deferred();
        assert_eq!(sent(&mut tx), b"ah1122late");
        assert!(tx.is_empty());
    }

    #[test]
    fn a_failed_fill_appends_nothing() {
        let mut tx = Tx::default();
        let failing = |_: &mut [u8]| Err(io::Error::other("broken"));
        assert!(tx.reply_with_data(|out| out.extend_from_slice(b"h"), 9, failing).is_err());
        tx.reply(|out| out.extend_from_slice(b"error"));
        assert_eq!(sent(&mut tx), b"error");
    }

    #[test]
    fn the_tx_is_full_exactly_at_its_limits() {
        let mut tx = Tx::default();
        tx.append_announced(FULL - 1, fill(0)).unwrap();
        assert!(!tx.is_full());
        tx.append_announced(1, fill(0)).unwrap();
        assert!(tx.is_full() && !tx.is_overfull());
        tx.defer_replies();
        tx.reply(|out| out.resize(DEFERRED_MAX - 1, 0));
        assert!(!tx.is_overfull());
        tx.reply(|out| out.push(0));
        assert!(tx.is_overfull());
        tx.release_deferred();
        tx.append_announced(OVERFULL - FULL - DEFERRED_MAX - 1, fill(0)).unwrap();
        assert!(!tx.is_overfull());
        tx.append_announced(1, fill(0)).unwrap();
        assert!(tx.is_overfull());
    }

    fn pin(bytes: &[u8]) -> impl FnOnce(BorrowedFd<'_>) -> io::Result<()> + '_ {
        move |pipe| {
            assert_eq!(nix::unistd::write(pipe, bytes), Ok(bytes.len()));
            Ok(())
        }
    }

    #[test]
    fn pinned_data_keeps_its_place_among_replies() {
        let mut tx = Tx::default();
        tx.reply(|out| out.extend_from_slice(b"first"));
        tx.reply_with_pinned(|out| out.extend_from_slice(b"head"), 4, pin(b"data")).unwrap();
        tx.reply(|out| out.extend_from_slice(b"late"));
        assert!(tx.is_full() && tx.has_bytes() && !tx.is_empty());
        assert_eq!(tx.unsent(), 13);
        assert_eq!(sent(&mut tx), b"firstheaddatalate");
        assert!(tx.is_empty() && !tx.is_full());
    }

    #[test]
    fn pinned_data_is_saved_as_bytes() {
        let mut tx = Tx::default();
        tx.reply_with_pinned(|out| out.extend_from_slice(b"head"), 4, pin(b"data")).unwrap();
        tx.reply(|out| out.extend_from_slice(b"late"));
        let saved = tx.save().unwrap();
        assert_eq!((&saved.bytes[..], &saved.deferred), (&b"headdatalate"[..], &None));
        let mut tx = Tx::restore(saved, 512).unwrap();
        assert_eq!(sent(&mut tx), b"headdatalate");
    }

    #[test]
    fn try_fill_sends_nothing() {
        let mut tx = Tx::default();
        tx.reply(|out| out.push(b'a'));
        tx.try_fill(100_000, fill(b'x')).unwrap();
        assert!(tx.try_fill(5, |_| Err(io::Error::other("broken"))).is_err());
        tx.reply(|out| out.push(b'b'));
        assert_eq!(sent(&mut tx), b"ab");
    }

    #[test]
    fn announced_data_precedes_later_replies() {
        let mut tx = Tx::default();
        let range = Range::within(1 << 30, 4096, 5).unwrap();
        tx.reply(|out| out.extend_from_slice(b"head"));
        tx.announce(range);
        tx.reply(|out| out.extend_from_slice(b"late"));
        tx.append_announced(2, fill(b'1')).unwrap();
        assert!(tx.append_announced(3, |_| Err(io::Error::other("broken"))).is_err());
        assert_eq!(tx.announced(), range.from(4098));
        tx.append_announced(3, fill(b'2')).unwrap();
        assert!(tx.announced().is_empty());
        tx.release_deferred();
        assert_eq!(sent(&mut tx), b"head11222late");
    }

    #[test]
    fn a_restored_tx_continues_the_stream() {
        let mut tx = Tx::default();
        let range = Range::within(1 << 30, 4096, 1 << 20).unwrap();
        tx.reply(|out| out.extend_from_slice(b"head"));
        tx.announce(range);
        tx.reply(|out| out.extend_from_slice(b"late"));
        let saved = tx.save().unwrap();
        assert!(Tx::restore(saved.clone(), range.end() - 1).is_none());
        let mut tx = Tx::restore(saved, range.end()).unwrap();
        assert_eq!(sent(&mut tx), b"head");
        assert_eq!(tx.announced(), range);
        tx.append_announced(1 << 20, fill(0)).unwrap();
        tx.release_deferred();
        tx.reply(|out| out.extend_from_slice(b"new"));
        let size = tx.unsent() as usize;
        let (mut client, stream) = UnixStream::pair().unwrap();
        let reader = std::thread::spawn(move || {
            let mut all = vec![0; size];
            client.read_exact(&mut all).map(|()| all)
        });
        let stream = Stream::Unix(stream);
        while !tx.send(&stream).unwrap() {
            std::thread::yield_now();
        }
        assert_eq!(reader.join().unwrap().unwrap()[1 << 20..], *b"latenew");
    }

    #[test]
    fn an_empty_tx_shrinks() {
        let mut tx = Tx::default();
        tx.reply(|out| out.push(1));
        tx.shrink();
        assert!(!tx.is_shrunk());
        sent(&mut tx);
        tx.shrink();
        assert!(tx.is_shrunk());
    }
}
