//! Replies that a client has not taken yet.
//! Keeps the replies in one piece each: what comes up while a simple read is being sent waits
//! behind it.

use crate::net::Stream;
use std::io;

/// With this many bytes waiting, a session sends before it answers more.
pub(super) const FULL: usize = 256 << 10;
/// With this many bytes waiting behind a read that is being sent, a session answers nothing more.
pub(super) const HELD_MAX: usize = 64 << 10;

/// A buffer between the session's work and the socket.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    /// Every byte of it has been written once: what lies beyond `end` is room, not garbage.
    buffer: Vec<u8>,
    start: usize,
    end: usize,
    /// While the data of a simple read is incomplete: what must come behind it.
    held: Option<Vec<u8>>,
    scratch: Vec<u8>,
}

impl Outbox {
    /// Whether everything was sent.
    pub(super) fn is_empty(&self) -> bool {
        self.start == self.end && self.held.is_none()
    }

    /// Whether something can be sent now.
    pub(super) fn has_bytes(&self) -> bool {
        self.start < self.end
    }

    /// Whether to send before answering more reads.
    pub(super) fn is_full(&self) -> bool {
        self.end - self.start >= FULL
    }

    /// Whether to send before answering anything at all.
    pub(super) fn is_overfull(&self) -> bool {
        self.end - self.start >= 2 * FULL || self.held.as_ref().is_some_and(|h| h.len() >= HELD_MAX)
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

    /// Sends as much as the client takes now; false if something is left.
    ///
    /// # Errors
    /// When the connection is broken.
    pub(super) fn send(&mut self, to: &Stream) -> io::Result<bool> {
        while self.has_bytes() {
            match to.try_send(&self.buffer[self.start..self.end], false) {
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

    /// How many bytes wait at the front; changes whenever some are sent.
    pub(super) fn waiting(&self) -> usize {
        self.end - self.start
    }

    fn room(&mut self, length: usize) -> &mut [u8] {
        if self.start > 0 && self.end + length > self.buffer.len() {
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        let needed = self.end + length;
        if needed > self.buffer.len() {
            self.buffer.resize(needed.max(FULL + FULL / 4), 0);
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
        outbox.more_data(FULL - HELD_MAX, fill(0)).unwrap();
        assert!(outbox.is_overfull());
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
