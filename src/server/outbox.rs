//! Replies that a client has not taken yet.
//! Keeps the replies in one piece each: what comes up while a simple read is being sent waits
//! behind it. Data of a long read does not pass through here, but its place does: the part of the
//! disk that the kernel is to send behind the bytes that are waiting.

use super::carry::Waiting;
use crate::net::Stream;
use crate::range::Range;
use std::io;

/// With this many bytes waiting, a session sends before it answers more reads. Not more, although
/// fewer calls would do: while the session answers the next, the client deals with these. (Reads of
/// 4 KiB at depth 32 are answered 1.7 times as fast as with 256 KiB.)
pub(super) const FULL: usize = 32 << 10;
/// With this many bytes waiting, a session answers nothing more at all.
pub(super) const OVERFULL: usize = 512 << 10;
/// How large the buffer is at least, in bytes: so much that the allocator gives it back to the
/// kernel when it is freed. (With 64 KiB an idle session kept 76 KiB, with this 18 KiB.)
const ROOM: usize = 320 << 10;
/// With this many bytes waiting behind a read that is being sent, a session answers nothing more.
pub(super) const HELD_MAX: usize = 64 << 10;

/// A buffer between the session's work and the socket.
#[derive(Debug)]
pub(super) struct Outbox {
    /// Every byte of it has been written once: what lies beyond `end` is room, not garbage.
    buffer: Vec<u8>,
    start: usize,
    end: usize,
    /// While the data of a simple read is incomplete: what must come behind it.
    held: Option<Vec<u8>>,
    /// What is to be sent from the disk behind the bytes that wait.
    from_disk: Range,
    scratch: Vec<u8>,
}

impl Default for Outbox {
    fn default() -> Self {
        let (buffer, scratch, from_disk) = (Vec::new(), Vec::new(), Range::whole(0));
        Self { buffer, start: 0, end: 0, held: None, from_disk, scratch }
    }
}

impl Outbox {
    /// Everything that was not sent.
    pub(super) fn pack(self) -> Waiting {
        let bytes = self.buffer[self.start..self.end].to_vec();
        Waiting { bytes, from_disk: self.from_disk.into(), held: self.held }
    }

    /// The same on a disk of `size` bytes; none if it does not fit there.
    pub(super) fn unpack(waiting: Waiting, size: u64) -> Option<Self> {
        let Waiting { bytes, from_disk, held } = waiting;
        let (end, from_disk) = (bytes.len(), from_disk.within(size)?);
        Some(Self { buffer: bytes, start: 0, end, held, from_disk, scratch: Vec::new() })
    }

    /// Whether everything was sent.
    pub(super) fn is_empty(&self) -> bool {
        !self.has_bytes() && self.held.is_none()
    }

    /// Whether something can be sent now.
    pub(super) fn has_bytes(&self) -> bool {
        self.start < self.end || !self.from_disk.is_empty()
    }

    /// Whether to send before answering more reads.
    pub(super) fn is_full(&self) -> bool {
        self.end - self.start >= FULL || !self.from_disk.is_empty()
    }

    /// Whether to send before answering anything at all.
    pub(super) fn is_overfull(&self) -> bool {
        self.end - self.start >= OVERFULL || self.held.as_ref().is_some_and(|h| h.len() >= HELD_MAX)
    }

    /// Appends what `write` writes, a whole reply.
    pub(super) fn reply(&mut self, write: impl FnOnce(&mut Vec<u8>)) {
        if let Some(held) = &mut self.held {
            return write(held);
        }
        let mut scratch = std::mem::take(&mut self.scratch);
        scratch.clear();
        write(&mut scratch);
        self.room(scratch.len()).copy_from_slice(&scratch);
        self.end += scratch.len();
        self.scratch = scratch;
    }

    /// Appends a head that `head` writes once `fill` has filled the `length` bytes behind it;
    /// appends nothing when it fails.
    ///
    /// # Errors
    /// What `fill` failed with.
    pub(super) fn reply_with_data(
        &mut self,
        head: impl FnOnce(&mut Vec<u8>),
        length: usize,
        fill: impl FnOnce(&mut [u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        debug_assert!(self.held.is_none(), "a reply inside another one's data");
        let mut scratch = std::mem::take(&mut self.scratch);
        scratch.clear();
        head(&mut scratch);
        let room = self.room(scratch.len() + length);
        let (front, data) = room.split_at_mut(scratch.len());
        front.copy_from_slice(&scratch);
        let outcome = fill(data);
        if outcome.is_ok() {
            self.end += scratch.len() + length;
        }
        self.scratch = scratch;
        outcome
    }

    /// Appends `length` more bytes of data, that `fill` fills, to the reply before.
    ///
    /// # Errors
    /// What `fill` failed with; then the reply cannot be completed.
    pub(super) fn more_data(
        &mut self,
        length: usize,
        fill: impl FnOnce(&mut [u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        fill(self.room(length))?;
        self.end += length;
        Ok(())
    }

    /// Behind all that waits, and before all that comes up later, this part of the disk is to be
    /// sent.
    pub(super) fn attach(&mut self, range: Range) {
        debug_assert!(self.from_disk.is_empty(), "one part of the disk at a time");
        self.from_disk = range;
        self.hold();
    }

    /// The part of the disk that is to be sent now; empty while bytes wait before it.
    pub(super) fn due_from_disk(&self) -> Range {
        if self.start < self.end { Range::whole(0) } else { self.from_disk }
    }

    /// So many bytes of the part were sent.
    pub(super) fn sent_from_disk(&mut self, count: u64) {
        self.from_disk = self.from_disk.split(count).1;
    }

    /// Replaces what is left of the part by zeros, since the disk failed; the reply must say so.
    pub(super) fn pad_from_disk(&mut self) {
        let mut left = std::mem::replace(&mut self.from_disk, Range::whole(0)).length();
        while left > 0 {
            let step = left.min(FULL as u64);
            // It fits: no more than the limit of the outbox.
            self.room(step as usize).fill(0);
            self.end += step as usize;
            left -= step;
        }
    }

    /// From now on more data of the reply before will come: hold other replies back.
    pub(super) fn hold(&mut self) {
        self.held.get_or_insert_default();
    }

    /// The reply before is complete: what was held back may follow.
    pub(super) fn release(&mut self) {
        if let Some(held) = self.held.take() {
            self.room(held.len()).copy_from_slice(&held);
            self.end += held.len();
        }
    }

    /// Sends as many bytes as the client takes now, not counting those from the disk; false if
    /// some are left.
    ///
    /// # Errors
    /// When the connection is broken.
    pub(super) fn send(&mut self, to: &Stream) -> io::Result<bool> {
        let more = !self.from_disk.is_empty();
        while self.start < self.end {
            match to.try_send(&self.buffer[self.start..self.end], more) {
                Ok(count) => self.start += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        (self.start, self.end) = (0, 0);
        Ok(true)
    }

    /// Gives the memory back if nothing is waiting.
    pub(super) fn relax(&mut self) {
        if self.is_empty() {
            self.buffer = Vec::new();
            self.scratch = Vec::new();
        }
    }

    /// Whether there is memory to give back.
    pub(super) fn is_relaxed(&self) -> bool {
        self.buffer.is_empty()
    }

    /// How many bytes wait, those from the disk included.
    pub(super) fn waiting(&self) -> u64 {
        (self.end - self.start) as u64 + self.from_disk.length()
    }

    fn room(&mut self, length: usize) -> &mut [u8] {
        if self.start > 0 && self.end + length > self.buffer.len() {
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        let needed = self.end + length;
        if needed > self.buffer.len() {
            self.buffer.resize(needed.max(ROOM), 0);
        }
        &mut self.buffer[self.end..needed]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    fn sent(outbox: &mut Outbox) -> Vec<u8> {
        let (mut client, stream) = UnixStream::pair().unwrap();
        let stream = Stream::Unix(stream);
        assert!(outbox.send(&stream).unwrap());
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
    fn what_comes_up_during_a_reply_waits_behind_it() {
        let mut outbox = Outbox::default();
        outbox.reply(|out| out.extend_from_slice(b"a"));
        outbox.reply_with_data(|out| out.extend_from_slice(b"h"), 2, fill(b'1')).unwrap();
        outbox.hold();
        outbox.reply(|out| out.extend_from_slice(b"late"));
        outbox.more_data(2, fill(b'2')).unwrap();
        assert!(!outbox.is_empty());
        outbox.release();
        assert_eq!(sent(&mut outbox), b"ah1122late");
        assert!(outbox.is_empty());
    }

    #[test]
    fn data_that_could_not_be_had_leaves_no_trace() {
        let mut outbox = Outbox::default();
        let failing = |_: &mut [u8]| Err(io::Error::other("broken"));
        assert!(outbox.reply_with_data(|out| out.extend_from_slice(b"h"), 9, failing).is_err());
        outbox.reply(|out| out.extend_from_slice(b"error"));
        assert_eq!(sent(&mut outbox), b"error");
    }

    #[test]
    fn it_is_full_at_its_limits_and_not_before() {
        let mut outbox = Outbox::default();
        outbox.more_data(FULL - 1, fill(0)).unwrap();
        assert!(!outbox.is_full());
        outbox.more_data(1, fill(0)).unwrap();
        assert!(outbox.is_full() && !outbox.is_overfull());
        outbox.hold();
        outbox.reply(|out| out.resize(HELD_MAX - 1, 0));
        assert!(!outbox.is_overfull());
        outbox.reply(|out| out.push(0));
        assert!(outbox.is_overfull());
        outbox.release();
        outbox.more_data(OVERFULL - FULL - HELD_MAX - 1, fill(0)).unwrap();
        assert!(!outbox.is_overfull());
        outbox.more_data(1, fill(0)).unwrap();
        assert!(outbox.is_overfull());
    }

    #[test]
    fn a_part_of_the_disk_has_its_place_among_the_replies() {
        let mut outbox = Outbox::default();
        let part = Range::within(1 << 30, 4096, 1 << 20).unwrap();
        outbox.reply(|out| out.extend_from_slice(b"head"));
        outbox.attach(part);
        outbox.reply(|out| out.extend_from_slice(b"late"));
        assert!(outbox.is_full() && outbox.due_from_disk().is_empty());
        assert_eq!(sent(&mut outbox), b"head");
        assert_eq!(outbox.due_from_disk(), part);
        outbox.sent_from_disk((1 << 20) - 3);
        assert!(outbox.has_bytes() && !outbox.is_empty());
        outbox.pad_from_disk();
        outbox.release();
        assert_eq!(sent(&mut outbox), b"\0\0\0late");
        assert!(outbox.is_empty());
    }

    #[test]
    fn an_outbox_goes_on_where_another_one_was() {
        let mut outbox = Outbox::default();
        let part = Range::within(1 << 30, 4096, 1 << 20).unwrap();
        outbox.reply(|out| out.extend_from_slice(b"head"));
        outbox.attach(part);
        outbox.reply(|out| out.extend_from_slice(b"late"));
        let packed = outbox.pack();
        assert!(Outbox::unpack(packed.clone(), part.end() - 1).is_none());
        let mut outbox = Outbox::unpack(packed, part.end()).unwrap();
        assert_eq!(sent(&mut outbox), b"head");
        assert_eq!(outbox.due_from_disk(), part);
        outbox.sent_from_disk(part.length());
        outbox.release();
        outbox.reply(|out| out.extend_from_slice(b"new"));
        assert_eq!(sent(&mut outbox), b"latenew");
    }

    #[test]
    fn an_idle_outbox_costs_nothing() {
        let mut outbox = Outbox::default();
        outbox.reply(|out| out.push(1));
        outbox.relax();
        assert!(!outbox.is_relaxed());
        sent(&mut outbox);
        outbox.relax();
        assert!(outbox.is_relaxed());
    }
}
