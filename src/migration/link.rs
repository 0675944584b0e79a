//! The connection to a destination: requests out, many in flight, replies in as they come.
//! Never decides what to send or what a reply means.

use super::job::{DestinationInfo, DestinationRequest, RequestKind, Trouble};
use super::plan::Caps;
use super::wire::{Answer, COMMAND, Handover, Question};
use crate::client::{ClientError, shake_hands};
use crate::disk::Copier;
use crate::nbd::handshake::Agreement;
use crate::nbd::handshake::client::ClientOffer;
use crate::nbd::reply::{Dialect, Head};
use crate::nbd::request::Header;
use crate::nbd::wire::{CommandKind, PAYLOAD_LENGTH_DEFAULT, TransmissionFlags};
use crate::net::{Address, Interest, Stream, Wake, connect};
use crate::range::Range;
use std::io;
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

/// How long connecting may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long every message of the handshake may take; with connecting, `mirror` answers within
/// some 15 s.
const HANDSHAKE_PATIENCE: Duration = Duration::from_secs(5);
/// How long the goodbye may take.
const GOODBYE_PATIENCE: Duration = Duration::from_secs(1);
/// How much is sent at once where the kernel cannot send straight from the image.
const PORTION: usize = 256 << 10;
/// Length of a simple reply in bytes.
const REPLY_LENGTH: usize = 16;

/// How to get to a destination.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// Where it listens.
    pub to: Address,
    /// The local address to connect from.
    pub bind: Option<IpAddr>,
}

impl Route {
    /// What `attempt` brings over this route or, if that does not connect, from any local address:
    /// an address that an operator chose may be gone when only an answer is wanted.
    ///
    /// # Errors
    /// That of the attempt that connected, or both.
    pub(crate) fn with_bind_fallback<T>(
        &self,
        attempt: impl Fn(&Self) -> Result<T, Trouble>,
    ) -> Result<T, Trouble> {
        let first = attempt(self);
        let (Err(Trouble::Connect(why)), Some(_)) = (&first, self.bind) else { return first };
        match attempt(&Self { to: self.to.clone(), bind: None }) {
            Err(Trouble::Connect(also)) => {
                Err(Trouble::Connect(format!("{why}; from any local address: {also}")))
            }
            second => second,
        }
    }
}

/// Why a request did not go out as a whole.
#[derive(Debug)]
pub(super) enum SendError {
    /// The connection is no more.
    Link(String),
    /// The connection is no more, and was before the first byte of the request went out.
    Unsent(String),
    /// The disk could not be read; the connection cannot be used any more.
    Disk {
        /// At this byte or soon after it.
        offset: u64,
        /// What the kernel said.
        error: io::Error,
    },
}

/// A connection in its transmission phase.
#[derive(Debug)]
pub(super) struct Link {
    stream: Stream,
    received: Vec<u8>,
    /// Changes were sent, and no goodbye after them.
    unfinished: bool,
}

impl Link {
    /// Connects and shakes hands, with the private question if there is one. There is no link if
    /// the server answered the question and then did not let us in.
    pub(super) fn open(
        route: &Route,
        question: Option<&Question>,
    ) -> Result<(Option<Self>, DestinationInfo), Trouble> {
        let stream = connect(&route.to, route.bind, CONNECT_TIMEOUT)
            .map_err(|error| Trouble::Connect(error.to_string()))?;
        // A connection that takes no options is on its way out, which the handshake will see.
        let _ = stream.tune().and_then(|()| stream.limit_unsent());
        // `sendfile(2)` has no flag for it; without, a destination that hangs would hang us.
        stream.set_nonblocking().map_err(|error| Trouble::Local(error.to_string()))?;
        let private = question.map(|question| question.encode().to_vec());
        let wish = ClientOffer { private, ..ClientOffer::default() };
        let (answer, agreed) = shake_hands(&stream, wish, HANDSHAKE_PATIENCE);
        match (agreed, decoded(answer)?) {
            (Ok(agreement), answer) => {
                let peer = peer(&agreement, answer);
                Ok((Some(Self { stream, received: Vec::new(), unfinished: false }), peer))
            }
            (Err(_), Some(answer)) if answer.is_final() => Ok((None, told_only(answer))),
            (Err(error), _) => Err(trouble(error)),
        }
    }

    /// Asks the private question, and leaves again without having wanted anything else.
    pub(super) fn ask(route: &Route, question: &Question) -> Result<Option<Answer>, Trouble> {
        let stream = connect(&route.to, route.bind, CONNECT_TIMEOUT)
            .map_err(|error| Trouble::Connect(error.to_string()))?;
        let private = Some(question.encode().to_vec());
        let wish = ClientOffer { private, private_only: true, ..ClientOffer::default() };
        let (answer, agreed) = shake_hands(&stream, wish, HANDSHAKE_PATIENCE);
        match (agreed, decoded(answer)?) {
            (Err(error), None) => Err(trouble(error)),
            (_, answer) => Ok(answer),
        }
    }

    /// Sends a request, reading the disk for it. While the destination does not take it, orders
    /// are heard: `give_up` is asked whenever `wake` is set.
    pub(super) fn send(
        &mut self,
        request: &DestinationRequest,
        copier: &Copier<'_>,
        patience: Duration,
        wake: &Wake,
        give_up: &mut dyn FnMut() -> bool,
    ) -> Result<(), SendError> {
        self.unfinished = request.kind != RequestKind::Disconnect;
        let mut sending = Sending { stream: &self.stream, patience, wake, give_up, begun: false };
        let mut head = Vec::new();
        header(request).encode(Dialect::Simple, &mut head);
        match request.kind {
            RequestKind::Write(range) => {
                sending.bytes(&head, true)?;
                sending.data(copier, range)
            }
            RequestKind::Handover(handover) => {
                head.extend_from_slice(&handover.encode());
                sending.bytes(&head, false)
            }
            RequestKind::Zero(_) | RequestKind::Flush | RequestKind::Disconnect => {
                sending.bytes(&head, false)
            }
        }
    }

    /// The next reply, with its error if it is one; none when the deadline or `wake` came first.
    pub(super) fn next_reply(
        &mut self,
        deadline: Instant,
        wake: &Wake,
    ) -> Result<Option<(u64, Option<u32>)>, String> {
        loop {
            match Head::decode(&self.received) {
                Ok(Some((Head::Simple { cookie, error }, used))) => {
                    self.received.drain(..used);
                    return Ok(Some((cookie, (error != 0).then_some(error))));
                }
                Ok(None) => {}
                _ => return Err("it sent something that is no reply".to_owned()),
            }
            let mut some = [0; 64 * REPLY_LENGTH];
            match self.stream.try_recv(&mut some) {
                Ok(0) => return Err("the destination closed it".to_owned()),
                Ok(count) => self.received.extend_from_slice(&some[..count]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let interest = Interest { readable: true, writable: false };
                    let ready = self.stream.wait(interest, Some(wake), Some(deadline));
                    let ready = ready.map_err(|error| error.to_string())?;
                    if ready.woken {
                        wake.clear();
                    }
                    if !ready.readable {
                        return Ok(None);
                    }
                }
                Err(error) => return Err(error.to_string()),
            }
        }
    }

    /// DISC, and closed.
    pub(super) fn disconnect(mut self) {
        self.unfinished = false;
        let mut goodbye = Vec::new();
        header(&DestinationRequest { cookie: 0, kind: RequestKind::Disconnect })
            .encode(Dialect::Simple, &mut goodbye);
        // Everything that matters has been answered.
        let _ = self.stream.send_all(&goodbye, GOODBYE_PATIENCE);
    }
}

impl Drop for Link {
    /// Bytes of an abandoned connection must not arrive after those of the next one: the kernel would
    /// go on delivering them once the network is back.
    fn drop(&mut self) {
        if self.unfinished {
            // It cannot fail on a socket that is connected, and does not matter on another.
            let _ = self.stream.reset_on_close();
        }
    }
}

/// One request on its way out.
struct Sending<'a> {
    stream: &'a Stream,
    patience: Duration,
    wake: &'a Wake,
    give_up: &'a mut dyn FnMut() -> bool,
    /// Some bytes of the request went out.
    begun: bool,
}

impl Sending<'_> {
    fn bytes(&mut self, bytes: &[u8], more: bool) -> Result<(), SendError> {
        let mut rest = bytes;
        while !rest.is_empty() {
            match self.stream.try_send(rest, more) {
                Ok(count) => {
                    self.begun |= count > 0;
                    rest = &rest[count..];
                }
                Err(error) => self.wait_for_room(error)?,
            }
        }
        Ok(())
    }

    /// The connection is of no use any more.
    fn broken(&self, why: String) -> SendError {
        if self.begun { SendError::Link(why) } else { SendError::Unsent(why) }
    }

    /// The bytes of the disk, straight from the page cache where the kernel can do that.
    fn data(&mut self, copier: &Copier<'_>, range: Range) -> Result<(), SendError> {
        let mut rest = range;
        while !rest.is_empty() {
            // It fits: a request's payload has 32 bits.
            let length = rest.length() as usize;
            match self.send_file(copier, rest.offset(), length) {
                Ok(count) => rest = rest.split(count as u64).1,
                Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                    return self.copied(copier, rest);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock || is_sockets(&error) => {
                    self.wait_for_room(error)?;
                }
                // Of the disk or of the socket: to read and to send tells which.
                Err(error) => {
                    return self.copied(copier, rest).map_err(|then| match then {
                        SendError::Link(_) => SendError::Link(error.to_string()),
                        then => then,
                    });
                }
            }
        }
        Ok(())
    }

    fn send_file(&self, copier: &Copier<'_>, offset: u64, length: usize) -> io::Result<usize> {
        copier.send(offset, length, self.stream.as_fd())
    }

    fn copied(&mut self, copier: &Copier<'_>, range: Range) -> Result<(), SendError> {
        let mut portion = vec![0; PORTION.min(range.length() as usize)];
        let mut rest = range;
        while !rest.is_empty() {
            let (piece, then) = rest.split(portion.len() as u64);
            let data = &mut portion[..piece.length() as usize];
            let offset = piece.offset();
            copier.read(offset, data).map_err(|error| SendError::Disk { offset, error })?;
            self.bytes(data, !then.is_empty())?;
            rest = then;
        }
        Ok(())
    }

    fn wait_for_room(&mut self, error: io::Error) -> Result<(), SendError> {
        if error.kind() != io::ErrorKind::WouldBlock {
            return Err(self.broken(error.to_string()));
        }
        let deadline = Instant::now() + self.patience;
        let interest = Interest { readable: false, writable: true };
        let ready = self.stream.wait(interest, Some(self.wake), Some(deadline));
        let ready = ready.map_err(|error| self.broken(error.to_string()))?;
        if ready.woken {
            self.wake.clear();
            if (self.give_up)() {
                return Err(self.broken("broken off".to_owned()));
            }
        }
        if ready.timed_out {
            let seconds = self.patience.as_secs();
            return Err(self.broken(format!("nothing was taken for {seconds} s")));
        }
        Ok(())
    }
}

/// Whether `sendfile(2)` certainly failed on the socket's side rather than the disk's.
fn is_sockets(error: &io::Error) -> bool {
    use nix::libc::{
        ECONNABORTED, ECONNRESET, EHOSTUNREACH, ENETDOWN, ENETUNREACH, ENOBUFS, ENOTCONN, EPIPE,
    };
    let sockets =
        [ECONNABORTED, ECONNRESET, EHOSTUNREACH, ENETDOWN, ENETUNREACH, ENOBUFS, ENOTCONN, EPIPE];
    error.raw_os_error().is_some_and(|errno| sockets.contains(&errno))
}

fn header(request: &DestinationRequest) -> Header {
    let (kind, range) = match request.kind {
        RequestKind::Write(range) => (CommandKind::Write.number(), Some(range)),
        RequestKind::Zero(range) => (CommandKind::WriteZeroes.number(), Some(range)),
        RequestKind::Flush => (CommandKind::Flush.number(), None),
        RequestKind::Disconnect => (CommandKind::Disconnect.number(), None),
        RequestKind::Handover(_) => (COMMAND, None),
    };
    let offset = range.map_or(0, |range| range.offset());
    let length = match request.kind {
        RequestKind::Handover(_) => Handover::LENGTH as u64,
        _ => range.map_or(0, |range| range.length()),
    };
    Header { flags: 0, kind, cookie: request.cookie, offset, length }
}

fn peer(agreement: &Agreement, answer: Option<Answer>) -> DestinationInfo {
    let has = |flag| agreement.flags.contains(flag);
    let sizes = agreement.block_sizes;
    let data_max = sizes.map_or(PAYLOAD_LENGTH_DEFAULT, |sizes| sizes.maximum);
    DestinationInfo {
        size: agreement.size,
        read_only: has(TransmissionFlags::READ_ONLY),
        flush: has(TransmissionFlags::SEND_FLUSH),
        caps: Caps {
            zeroes: has(TransmissionFlags::SEND_WRITE_ZEROES),
            block_min: sizes.map_or(1, |sizes| u64::from(sizes.minimum.max(1))),
            data_max: u64::from(data_max.min(PAYLOAD_LENGTH_DEFAULT)),
        },
        answer,
    }
}

/// A server of which nothing is known but its answer.
fn told_only(answer: Answer) -> DestinationInfo {
    let caps = Caps { zeroes: false, block_min: 1, data_max: u64::from(PAYLOAD_LENGTH_DEFAULT) };
    DestinationInfo { size: 0, read_only: true, flush: false, caps, answer: Some(answer) }
}

fn decoded(answer: Option<Vec<u8>>) -> Result<Option<Answer>, Trouble> {
    answer
        .map(|data| Answer::decode(&data))
        .transpose()
        .map_err(|_| Trouble::Confused("the destination's answer is of another version"))
}

fn trouble(error: ClientError) -> Trouble {
    match error {
        ClientError::Connection(error) if error.kind() == io::ErrorKind::TimedOut => {
            Trouble::Silent(error.to_string())
        }
        error => Trouble::Rejected(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::Disk;
    use crate::disk::memory_backend::{FailingBackend, Faults, MemoryBackend, Op};
    use nix::libc::{EBADMSG, ECONNRESET, EIO, ENODATA, ENOMEM, EPIPE, ESTALE, ETIMEDOUT};
    use std::io::Read;
    use std::os::unix::net::UnixStream;
    use std::sync::Arc;

    /// What comes of a part of the disk when the kernel cannot send it, and perhaps not read it, to a
    /// peer that is there or not.
    fn sent(errno: i32, read: Option<i32>, is_there: bool) -> Result<Vec<u8>, SendError> {
        let faults = Arc::new(Faults::default());
        faults.fail_every(Op::Send, errno);
        if let Some(errno) = read {
            faults.fail_every(Op::Read, errno);
        }
        let image = FailingBackend::new(MemoryBackend::new(1 << 20), faults);
        let disk = Disk::new(Box::new(image), false);
        let (near, far) = UnixStream::pair().unwrap();
        let far = is_there.then_some(far);
        let (stream, wake) = (Stream::Unix(near), Wake::new().unwrap());
        let (patience, give_up) = (Duration::from_secs(1), &mut || false);
        let mut sending = Sending { stream: &stream, patience, wake: &wake, give_up, begun: true };
        sending.data(&disk.copier(), Range::whole(1 << 20).from(8192).split(1000).0)?;
        drop(stream);
        let mut received = Vec::new();
        far.unwrap().read_to_end(&mut received).unwrap();
        Ok(received)
    }

    #[test]
    fn any_read_error_while_sending_is_the_disks() {
        for errno in [EIO, ESTALE, ETIMEDOUT, ENODATA, EBADMSG] {
            match sent(errno, Some(errno), true) {
                Err(SendError::Disk { offset: 8192, error }) => {
                    assert_eq!(error.raw_os_error(), Some(errno));
                }
                other => panic!("{errno}: {other:?}"),
            }
        }
    }

    #[test]
    fn a_disk_that_can_be_read_is_sent() {
        for errno in [ETIMEDOUT, ENOMEM, EIO] {
            assert_eq!(sent(errno, None, true).unwrap(), [0; 1000], "{errno}");
        }
    }

    #[test]
    fn a_broken_socket_does_not_blame_the_disk() {
        for (errno, read) in [(EPIPE, Some(EIO)), (ECONNRESET, Some(EIO)), (ETIMEDOUT, None)] {
            let Err(SendError::Link(why)) = sent(errno, read, false) else { panic!("{errno}") };
            assert_eq!(why, io::Error::from_raw_os_error(errno).to_string());
        }
    }
}
