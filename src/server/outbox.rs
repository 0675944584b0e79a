//! Replies that a client has not taken yet.
//! Keeps the replies in one piece each: what comes up while a simple read is being sent waits
//! behind it. Data of a long read may wait behind the bytes by reference ([`Pinned`]). Of a read that
//! is too long to be in hand as a whole, the rest has its place here as a promise: a part of the disk
//! that is to be read, and put behind the bytes, piece by piece.

use super::pinned::Pinned;
use super::snapshot::UnsentSnapshot;
use crate::net::Stream;
use crate::range::Range;
use nix::errno::Errno;
use std::io;
use std::os::fd::BorrowedFd;

/// With this many bytes waiting, a session sends before it answers more reads. Not more, although
/// fewer calls would do: while the session answers the next, the client deals with these. (Reads of
/// 4 KiB at depth 32 are answered 1.7 times as fast as with 256 KiB.)
pub(super) const FULL: usize = 32 << 10;
/// With this many bytes waiting, a session answers nothing more at all: more than the longest simple
/// reply that is in hand as a whole, beside which other requests are still answered.
pub(super) const OVERFULL: usize = (512 << 10) + (1 << 20);
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
    /// Data behind the bytes that wait.
    pinned: Pinned,
    /// What the head of a reply has promised, and is still to be read.
    promised: Range,
    /// The allocator had nothing for a reply, which is lost: the session has to end.
    is_exhausted: bool,
    scratch: Vec<u8>,
}

impl Default for Outbox {
    fn default() -> Self {
        Self {
            buffer: Vec::new(),
            start: 0,
            end: 0,
            held: None,
            pinned: Pinned::default(),
            promised: Range::whole(0),
            is_exhausted: false,
            scratch: Vec::new(),
        }
    }
}

impl Outbox {
    /// Everything that was not sent.
    ///
    /// # Errors
    /// When what is held by reference cannot be had: the reply cannot be completed.
    pub(super) fn pack(mut self) -> io::Result<UnsentSnapshot> {
        if self.pinned.length() > 0 {
            let pinned = self.pinned.take()?;
            self.append(&pinned);
            self.release();
        }
        if self.is_exhausted {
            return Err(Errno::ENOMEM.into());
        }
        let bytes = self.buffer[self.start..self.end].to_vec();
        Ok(UnsentSnapshot { bytes, from_disk: self.promised.into(), held: self.held })
    }

    /// The same on a disk of `size` bytes; none if it does not fit there.
    pub(super) fn unpack(waiting: UnsentSnapshot, size: u64) -> Option<Self> {
        let UnsentSnapshot { bytes, from_disk, held } = waiting;
        let (end, promised) = (bytes.len(), from_disk.within(size)?);
        Some(Self { buffer: bytes, end, held, promised, ..Self::default() })
    }

    /// Whether everything was sent.
    pub(super) fn is_empty(&self) -> bool {
        !self.has_bytes() && self.held.is_none()
    }

    /// Whether something can be sent now.
    pub(super) fn has_bytes(&self) -> bool {
        self.start < self.end || self.pinned.length() > 0
    }

    /// Whether to send before answering more reads.
    pub(super) fn is_full(&self) -> bool {
        self.end - self.start >= FULL || self.pinned.length() > 0
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
        self.append(&scratch);
        self.scratch = scratch;
    }

    /// Appends bytes; without memory for them the session ends, at the next [`Outbox::send`].
    fn append(&mut self, bytes: &[u8]) {
        match self.room(bytes.len()) {
            Ok(room) => {
                room.copy_from_slice(bytes);
                self.end += bytes.len();
            }
            Err(_) => self.is_exhausted = true,
        }
    }

    /// Appends a head that `head` writes once `fill` has filled the `length` bytes behind it;
    /// appends nothing when it fails.
    ///
    /// # Errors
    /// What `fill` failed with, or `ENOMEM`.
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
        let outcome = self.room(scratch.len() + length).and_then(|room| {
            let (front, data) = room.split_at_mut(scratch.len());
            front.copy_from_slice(&scratch);
            fill(data)
        });
        if outcome.is_ok() {
            self.end += scratch.len() + length;
        }
        self.scratch = scratch;
        outcome
    }

    /// Appends a head that `head` writes once `fill` has put the `length` bytes behind it into a pipe;
    /// appends nothing when it fails. What comes up before they are sent waits behind them.
    ///
    /// # Errors
    /// `Unsupported` when there is no pipe; what `fill` failed with.
    pub(super) fn reply_with_pinned(
        &mut self,
        head: impl FnOnce(&mut Vec<u8>),
        length: usize,
        fill: impl FnOnce(BorrowedFd<'_>) -> io::Result<()>,
    ) -> io::Result<()> {
        self.pinned.pin(length, fill)?;
        self.reply(head);
        self.hold();
        Ok(())
    }

    /// Whether `fill` fills `length` bytes; they are then forgotten.
    ///
    /// # Errors
    /// What `fill` failed with, or `ENOMEM`.
    pub(super) fn try_out(
        &mut self,
        length: usize,
        fill: impl FnOnce(&mut [u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        fill(self.room(length)?)
    }

    /// After the head of a reply: this part of the disk is to be its data. What comes up before all of
    /// it is here waits behind it.
    pub(super) fn promise(&mut self, range: Range) {
        debug_assert!(self.promised.is_empty(), "one part of the disk at a time");
        self.promised = range;
        self.hold();
    }

    /// What is still promised.
    pub(super) fn promised(&self) -> Range {
        self.promised
    }

    /// Appends the next `length` bytes of what was promised, that `fill` fills.
    ///
    /// # Errors
    /// What `fill` failed with, or `ENOMEM`; then the reply cannot be completed.
    pub(super) fn keep_promise(
        &mut self,
        length: usize,
        fill: impl FnOnce(&mut [u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        fill(self.room(length)?)?;
        self.end += length;
        self.promised = self.promised.split(length as u64).1;
        Ok(())
    }

    /// From now on more data of the reply before will come: hold other replies back.
    pub(super) fn hold(&mut self) {
        self.held.get_or_insert_default();
    }

    /// The reply before is complete: what was held back may follow.
    pub(super) fn release(&mut self) {
        if let Some(held) = self.held.take() {
            self.append(&held);
        }
    }

    /// Sends as many bytes as the client takes now; false if some are left.
    ///
    /// # Errors
    /// When the connection is broken, or a reply is lost for want of memory.
    pub(super) fn send(&mut self, to: &Stream) -> io::Result<bool> {
        if self.is_exhausted {
            return Err(Errno::ENOMEM.into());
        }
        if !self.send_bytes(to)? {
            return Ok(false);
        }
        if self.pinned.length() == 0 {
            return Ok(true);
        }
        if !self.pinned.send(to)? {
            return Ok(false);
        }
        self.release();
        self.send_bytes(to)
    }

    fn send_bytes(&mut self, to: &Stream) -> io::Result<bool> {
        let more = self.pinned.length() > 0;
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
            self.pinned.relax();
        }
    }

    /// Whether there is memory to give back.
    pub(super) fn is_relaxed(&self) -> bool {
        self.buffer.is_empty() && self.pinned.is_relaxed()
    }

    /// How many bytes wait, those held by reference included.
    pub(super) fn waiting(&self) -> u64 {
        (self.end - self.start + self.pinned.length()) as u64
    }

    /// Room for `length` bytes behind those that wait.
    fn room(&mut self, length: usize) -> io::Result<&mut [u8]> {
        if self.start > 0 && self.end + length > self.buffer.len() {
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        let needed = self.end + length;
        if needed > self.buffer.len() {
            let wanted = needed.max(ROOM);
            let more = wanted - self.buffer.len();
            self.buffer.try_reserve(more).map_err(|_| Errno::ENOMEM)?;
            self.buffer.resize(wanted, 0);
        }
        Ok(&mut self.buffer[self.end..needed])
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
        outbox.try_out(2, fill(b'x')).unwrap();
        outbox.keep_promise(2, fill(b'2')).unwrap();
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
        outbox.keep_promise(FULL - 1, fill(0)).unwrap();
        assert!(!outbox.is_full());
        outbox.keep_promise(1, fill(0)).unwrap();
        assert!(outbox.is_full() && !outbox.is_overfull());
        outbox.hold();
        outbox.reply(|out| out.resize(HELD_MAX - 1, 0));
        assert!(!outbox.is_overfull());
        outbox.reply(|out| out.push(0));
        assert!(outbox.is_overfull());
        outbox.release();
        outbox.keep_promise(OVERFULL - FULL - HELD_MAX - 1, fill(0)).unwrap();
        assert!(!outbox.is_overfull());
        outbox.keep_promise(1, fill(0)).unwrap();
        assert!(outbox.is_overfull());
    }

    fn pin(bytes: &[u8]) -> impl FnOnce(BorrowedFd<'_>) -> io::Result<()> + '_ {
        move |pipe| {
            assert_eq!(nix::unistd::write(pipe, bytes), Ok(bytes.len()));
            Ok(())
        }
    }

    #[test]
    fn pinned_data_has_its_place_among_the_replies() {
        let mut outbox = Outbox::default();
        outbox.reply(|out| out.extend_from_slice(b"first"));
        outbox.reply_with_pinned(|out| out.extend_from_slice(b"head"), 4, pin(b"data")).unwrap();
        outbox.reply(|out| out.extend_from_slice(b"late"));
        assert!(outbox.is_full() && outbox.has_bytes() && !outbox.is_empty());
        assert_eq!(outbox.waiting(), 13);
        assert_eq!(sent(&mut outbox), b"firstheaddatalate");
        assert!(outbox.is_empty() && !outbox.is_full());
    }

    #[test]
    fn pinned_data_is_packed_as_bytes() {
        let mut outbox = Outbox::default();
        outbox.reply_with_pinned(|out| out.extend_from_slice(b"head"), 4, pin(b"data")).unwrap();
        outbox.reply(|out| out.extend_from_slice(b"late"));
        let packed = outbox.pack().unwrap();
        assert_eq!((&packed.bytes[..], &packed.held), (&b"headdatalate"[..], &None));
        let mut outbox = Outbox::unpack(packed, 512).unwrap();
        assert_eq!(sent(&mut outbox), b"headdatalate");
    }

    #[test]
    fn what_is_tried_out_is_not_sent() {
        let mut outbox = Outbox::default();
        outbox.reply(|out| out.push(b'a'));
        outbox.try_out(100_000, fill(b'x')).unwrap();
        assert!(outbox.try_out(5, |_| Err(io::Error::other("broken"))).is_err());
        outbox.reply(|out| out.push(b'b'));
        assert_eq!(sent(&mut outbox), b"ab");
    }

    #[test]
    fn a_promise_is_kept_before_later_replies() {
        let mut outbox = Outbox::default();
        let part = Range::within(1 << 30, 4096, 5).unwrap();
        outbox.reply(|out| out.extend_from_slice(b"head"));
        outbox.promise(part);
        outbox.reply(|out| out.extend_from_slice(b"late"));
        outbox.keep_promise(2, fill(b'1')).unwrap();
        assert!(outbox.keep_promise(3, |_| Err(io::Error::other("broken"))).is_err());
        assert_eq!(outbox.promised(), part.from(4098));
        outbox.keep_promise(3, fill(b'2')).unwrap();
        assert!(outbox.promised().is_empty());
        outbox.release();
        assert_eq!(sent(&mut outbox), b"head11222late");
    }

    #[test]
    fn an_outbox_goes_on_where_another_one_was() {
        let mut outbox = Outbox::default();
        let part = Range::within(1 << 30, 4096, 1 << 20).unwrap();
        outbox.reply(|out| out.extend_from_slice(b"head"));
        outbox.promise(part);
        outbox.reply(|out| out.extend_from_slice(b"late"));
        let packed = outbox.pack().unwrap();
        assert!(Outbox::unpack(packed.clone(), part.end() - 1).is_none());
        let mut outbox = Outbox::unpack(packed, part.end()).unwrap();
        assert_eq!(sent(&mut outbox), b"head");
        assert_eq!(outbox.promised(), part);
        outbox.keep_promise(1 << 20, fill(0)).unwrap();
        outbox.release();
        outbox.reply(|out| out.extend_from_slice(b"new"));
        let size = outbox.waiting() as usize;
        let (mut client, stream) = UnixStream::pair().unwrap();
        let reader = std::thread::spawn(move || {
            let mut all = vec![0; size];
            client.read_exact(&mut all).map(|()| all)
        });
        let stream = Stream::Unix(stream);
        while !outbox.send(&stream).unwrap() {
            std::thread::yield_now();
        }
        assert_eq!(reader.join().unwrap().unwrap()[1 << 20..], *b"latenew");
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
