//! The connection to a destination: sends requests and receives replies, with many in flight.
//! Never decides what to send or what a reply means.

use super::job::{DestinationInfo, DestinationRequest, RequestKind, Trouble};
use super::plan::Caps;
use super::wire::{Answer, COMMAND, DiskIdMessage, Handover, Question};
use crate::client::{ClientError, ClientOutcome, shake_hands};
use crate::disk::Copier;
use crate::ids::DiskId;
use crate::nbd::handshake::Agreement;
use crate::nbd::handshake::client::ClientOffer;
use crate::nbd::reply::{Dialect, ReplyHeader};
use crate::nbd::request::RequestHeader;
use crate::nbd::wire::{CommandKind, PAYLOAD_LENGTH_DEFAULT, TransmissionFlags};
use crate::net::tls::ClientTls;
use crate::net::{Address, Interest, Stream, Wake, connect};
use crate::range::Range;
use std::io;
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// For each message of the handshake: `mirror` answers within about 15 s.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
const DISCONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// Buffer size in bytes where `sendfile(2)` cannot send from the image.
const COPY_BUFFER: usize = 256 << 10;
/// Length of a simple reply in bytes.
const REPLY_LENGTH: usize = 16;

/// The addresses of a connection to a destination.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// The destination's address.
    pub to: Address,
    /// The local address to connect from.
    pub bind: Option<IpAddr>,
    /// TLS, and what the destination must prove with it; `None` for a plain connection.
    pub tls: Option<ClientTls>,
}

impl Route {
    /// Calls `attempt` with this route and, if that does not connect, without the local address:
    /// the operator's address may be gone, and a question can be asked from any other.
    ///
    /// # Errors
    /// That of the attempt that connected, or those of both.
    pub(crate) fn with_bind_fallback<T>(
        &self,
        attempt: impl Fn(&Self) -> Result<T, Trouble>,
    ) -> Result<T, Trouble> {
        let first = attempt(self);
        let (Err(Trouble::Connect(why)), Some(_)) = (&first, self.bind) else { return first };
        match attempt(&Self { bind: None, ..self.clone() }) {
            Err(Trouble::Connect(also)) => {
                Err(Trouble::Connect(format!("{why}; from any local address: {also}")))
            }
            second => second,
        }
    }
}

/// Why a request was not sent completely. The connection cannot be used afterwards.
#[derive(Debug)]
pub(super) enum SendError {
    /// The connection failed; some bytes of the request may have been sent.
    Link(String),
    /// The connection failed before the first byte of the request was sent.
    Unsent(String),
    /// The disk could not be read.
    Disk {
        /// The read that failed begins at this byte.
        offset: u64,
        error: io::Error,
    },
}

/// A connection in its transmission phase.
#[derive(Debug)]
pub(super) struct Link {
    stream: Stream,
    received: Vec<u8>,
    /// Requests were sent, and no DISC after them.
    unfinished: bool,
}

impl Link {
    /// Connects and negotiates, with the private option if there is a question. Returns no link if
    /// the server answered the question finally and then refused the transmission phase. The disk has
    /// this id, if it has one.
    pub(super) fn open(
        route: &Route,
        question: Option<&Question>,
        disk_id: Option<DiskId>,
    ) -> Result<(Option<Self>, DestinationInfo), Trouble> {
        let stream = connect(&route.to, route.bind, CONNECT_TIMEOUT)
            .map_err(|error| Trouble::Connect(error.to_string()))?;
        // Setting an option fails only on a broken connection, which the handshake detects.
        let _ = stream.tune().and_then(|()| stream.limit_unsent());
        // `sendfile(2)` must not block on a destination that hangs, and has no flag like
        // MSG_DONTWAIT.
        stream.set_nonblocking().map_err(|error| Trouble::Local(error.to_string()))?;
        let private = question.map(|question| question.encode().to_vec());
        let private_more = disk_id.map(|id| DiskIdMessage(id).encode().to_vec());
        let offer = ClientOffer { private, private_more, ..ClientOffer::default() };
        let ClientOutcome { private_reply, agreed } =
            shake_hands(stream, offer, route.tls.as_ref(), HANDSHAKE_TIMEOUT);
        match (agreed, decode_answer(private_reply)?) {
            (Ok((stream, agreement)), answer) => {
                let info = destination_info(&agreement, answer);
                Ok((Some(Self { stream, received: Vec::new(), unfinished: false }), info))
            }
            (Err(_), Some(answer)) if answer.is_final() => Ok((None, info_without_export(answer))),
            (Err(error), _) => Err(handshake_trouble(error)),
        }
    }

    /// Connects, asks the private question and closes the connection.
    pub(super) fn ask(route: &Route, question: &Question) -> Result<Option<Answer>, Trouble> {
        let stream = connect(&route.to, route.bind, CONNECT_TIMEOUT)
            .map_err(|error| Trouble::Connect(error.to_string()))?;
        let private = Some(question.encode().to_vec());
        let offer = ClientOffer { private, private_only: true, ..ClientOffer::default() };
        let ClientOutcome { private_reply, agreed } =
            shake_hands(stream, offer, route.tls.as_ref(), HANDSHAKE_TIMEOUT);
        match (agreed, decode_answer(private_reply)?) {
            (Err(error), None) => Err(handshake_trouble(error)),
            (_, answer) => Ok(answer),
        }
    }

    /// Sends a request, and reads the disk for it. While the socket's buffer is full, `wake`
    /// interrupts the wait, and the send fails if `give_up` then returns true.
    pub(super) fn send(
        &mut self,
        request: &DestinationRequest,
        copier: &Copier<'_>,
        timeout: Duration,
        wake: &Wake,
        give_up: &mut dyn FnMut() -> bool,
    ) -> Result<(), SendError> {
        self.unfinished = request.kind != RequestKind::Disconnect;
        let mut sender =
            RequestSender { stream: &self.stream, timeout, wake, give_up, is_begun: false };
        let mut head = Vec::new();
        header(request).encode(Dialect::Simple, &mut head);
        match request.kind {
            RequestKind::Write(range) => {
                sender.send_bytes(&head, true)?;
                sender.send_data(copier, range)
            }
            RequestKind::Handover(handover) => {
                head.extend_from_slice(&handover.encode());
                sender.send_bytes(&head, false)
            }
            RequestKind::Zero(_) | RequestKind::Flush | RequestKind::Disconnect => {
                sender.send_bytes(&head, false)
            }
        }
    }

    /// The cookie and NBD error, if any, of the next reply; `None` if the deadline or `wake` came
    /// first.
    pub(super) fn next_reply(
        &mut self,
        deadline: Instant,
        wake: &Wake,
    ) -> Result<Option<(u64, Option<u32>)>, String> {
        loop {
            match ReplyHeader::decode(&self.received) {
                Ok(Some((ReplyHeader::Simple { cookie, error }, used))) => {
                    self.received.drain(..used);
                    return Ok(Some((cookie, (error != 0).then_some(error))));
                }
                Ok(None) => {}
                _ => return Err("it sent something that is no reply".to_owned()),
            }
            let mut buffer = [0; 64 * REPLY_LENGTH];
            match self.stream.try_recv(&mut buffer) {
                Ok(0) => return Err("the destination closed it".to_owned()),
                Ok(count) => self.received.extend_from_slice(&buffer[..count]),
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

    /// Sends DISC and closes the connection.
    pub(super) fn disconnect(mut self) {
        self.unfinished = false;
        let mut request = Vec::new();
        header(&DestinationRequest { cookie: 0, kind: RequestKind::Disconnect })
            .encode(Dialect::Simple, &mut request);
        // The handover is acknowledged, so a lost DISC changes nothing.
        let _ = self.stream.send_all(&request, DISCONNECT_TIMEOUT);
    }
}

impl Drop for Link {
    /// Requests of this connection must not arrive after those of the next one: without a reset,
    /// the kernel would deliver them once the network is back.
    fn drop(&mut self) {
        if self.unfinished {
            // Succeeds on a connected socket; another has no unsent bytes.
            let _ = self.stream.reset_on_close();
        }
    }
}

/// Sends one request.
struct RequestSender<'a> {
    stream: &'a Stream,
    timeout: Duration,
    wake: &'a Wake,
    give_up: &'a mut dyn FnMut() -> bool,
    /// Some bytes of the request were sent.
    is_begun: bool,
}

impl RequestSender<'_> {
    fn send_bytes(&mut self, bytes: &[u8], more: bool) -> Result<(), SendError> {
        let mut rest = bytes;
        while !rest.is_empty() {
            match self.stream.try_send(rest, more) {
                Ok(count) => {
                    self.is_begun |= count > 0;
                    rest = &rest[count..];
                }
                Err(error) => self.wait_writable(error)?,
            }
        }
        Ok(())
    }

    fn link_error(&self, why: String) -> SendError {
        if self.is_begun { SendError::Link(why) } else { SendError::Unsent(why) }
    }

    /// Sends a range of the disk, with `sendfile(2)` where the image and the connection support it.
    fn send_data(&mut self, copier: &Copier<'_>, range: Range) -> Result<(), SendError> {
        if !self.stream.sends_references() {
            return self.read_and_send(copier, range);
        }
        let mut rest = range;
        while !rest.is_empty() {
            // It fits: a request's payload has 32 bits.
            let length = rest.length() as usize;
            match copier.send(rest.offset(), length, self.stream.as_fd()) {
                Ok(count) => rest = rest.split(count as u64).1,
                Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                    return self.read_and_send(copier, rest);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if is_socket_error(&error) => self.wait_writable(error)?,
                // The error of the disk or of the socket: separate calls tell which.
                Err(error) => {
                    return self.read_and_send(copier, rest).map_err(|then| match then {
                        SendError::Link(_) => SendError::Link(error.to_string()),
                        then => then,
                    });
                }
            }
        }
        Ok(())
    }

    fn read_and_send(&mut self, copier: &Copier<'_>, range: Range) -> Result<(), SendError> {
        let mut buffer = vec![0; COPY_BUFFER.min(range.length() as usize)];
        let mut rest = range;
        while !rest.is_empty() {
            let (part, then) = rest.split(buffer.len() as u64);
            let data = &mut buffer[..part.length() as usize];
            let offset = part.offset();
            copier.read(offset, data).map_err(|error| SendError::Disk { offset, error })?;
            self.send_bytes(data, !then.is_empty())?;
            rest = then;
        }
        Ok(())
    }

    /// Waits for room in the socket's buffer if that is the error; any other is returned.
    fn wait_writable(&mut self, error: io::Error) -> Result<(), SendError> {
        if error.kind() != io::ErrorKind::WouldBlock {
            return Err(self.link_error(error.to_string()));
        }
        let deadline = Instant::now() + self.timeout;
        let interest = Interest { readable: false, writable: true };
        let ready = self.stream.wait(interest, Some(self.wake), Some(deadline));
        let ready = ready.map_err(|error| self.link_error(error.to_string()))?;
        if ready.woken {
            self.wake.clear();
            if (self.give_up)() {
                return Err(self.link_error("broken off".to_owned()));
            }
        }
        if ready.timed_out {
            let seconds = self.timeout.as_secs();
            return Err(self.link_error(format!("nothing was taken for {seconds} s")));
        }
        Ok(())
    }
}

/// Whether an error of `sendfile(2)` is certainly the socket's rather than the disk's.
fn is_socket_error(error: &io::Error) -> bool {
    use nix::libc::{
        ECONNABORTED, ECONNRESET, EHOSTUNREACH, ENETDOWN, ENETUNREACH, ENOBUFS, ENOTCONN, EPIPE,
    };
    let errors =
        [ECONNABORTED, ECONNRESET, EHOSTUNREACH, ENETDOWN, ENETUNREACH, ENOBUFS, ENOTCONN, EPIPE];
    error.kind() == io::ErrorKind::WouldBlock
        || error.raw_os_error().is_some_and(|errno| errors.contains(&errno))
}

fn header(request: &DestinationRequest) -> RequestHeader {
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
    RequestHeader { flags: 0, kind, cookie: request.cookie, offset, length }
}

fn destination_info(agreement: &Agreement, answer: Option<Answer>) -> DestinationInfo {
    let has = |flag| agreement.flags.contains(flag);
    let sizes = agreement.block_sizes;
    let data_max = sizes.map_or(PAYLOAD_LENGTH_DEFAULT, |sizes| sizes.maximum);
    DestinationInfo {
        size: agreement.size,
        read_only: has(TransmissionFlags::READ_ONLY),
        flush: has(TransmissionFlags::SEND_FLUSH),
        flags: agreement.flags,
        caps: Caps {
            zeroes: has(TransmissionFlags::SEND_WRITE_ZEROES),
            block_min: sizes.map_or(1, |sizes| u64::from(sizes.minimum.max(1))),
            data_max: u64::from(data_max.min(PAYLOAD_LENGTH_DEFAULT)),
        },
        answer,
    }
}

/// A server that answered the question and described no export.
fn info_without_export(answer: Answer) -> DestinationInfo {
    let caps = Caps { zeroes: false, block_min: 1, data_max: u64::from(PAYLOAD_LENGTH_DEFAULT) };
    let flags = TransmissionFlags::empty();
    DestinationInfo { size: 0, read_only: true, flush: false, flags, caps, answer: Some(answer) }
}

fn decode_answer(answer: Option<Vec<u8>>) -> Result<Option<Answer>, Trouble> {
    answer
        .map(|data| Answer::decode(&data))
        .transpose()
        .map_err(|_| Trouble::Unexpected("the destination's answer is of another version"))
}

fn handshake_trouble(error: ClientError) -> Trouble {
    match error {
        ClientError::Connection(error) if error.kind() == io::ErrorKind::TimedOut => {
            Trouble::NoGreeting(error.to_string())
        }
        error => Trouble::Rejected(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::Disk;
    use crate::disk::memory_backend::{BackendCall, FailingBackend, Faults, MemoryBackend};
    use nix::libc::{EBADMSG, ECONNRESET, EIO, ENODATA, ENOMEM, EPIPE, ESTALE, ETIMEDOUT};
    use std::io::Read;
    use std::os::unix::net::UnixStream;
    use std::sync::Arc;

    /// Sends a part of a disk for which `sendfile(2)` fails with `send`, and reads fail with `read`
    /// if given, to a peer that has or has not closed the connection. Returns the bytes received.
    fn sent(send: i32, read: Option<i32>, is_open: bool) -> Result<Vec<u8>, SendError> {
        let faults = Arc::new(Faults::default());
        faults.fail_every(BackendCall::Send, send);
        if let Some(errno) = read {
            faults.fail_every(BackendCall::Read, errno);
        }
        let image = FailingBackend::new(MemoryBackend::new(1 << 20), faults);
        let disk = Disk::new(Box::new(image), false);
        let (near, far) = UnixStream::pair().unwrap();
        let far = is_open.then_some(far);
        let (stream, wake) = (Stream::Unix(near), Wake::new().unwrap());
        let (timeout, give_up) = (Duration::from_secs(1), &mut || false);
        let mut sender =
            RequestSender { stream: &stream, timeout, wake: &wake, give_up, is_begun: true };
        sender.send_data(&disk.copier(), Range::whole(1 << 20).from(8192).split(1000).0)?;
        drop(stream);
        let mut received = Vec::new();
        far.unwrap().read_to_end(&mut received).unwrap();
        Ok(received)
    }

    #[test]
    fn read_error_while_sending_is_a_disk_error() {
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
    fn readable_disk_is_sent_without_sendfile() {
        for errno in [ETIMEDOUT, ENOMEM, EIO] {
            assert_eq!(sent(errno, None, true).unwrap(), [0; 1000], "{errno}");
        }
    }

    #[test]
    fn socket_error_is_not_a_disk_error() {
        for (errno, read) in [(EPIPE, Some(EIO)), (ECONNRESET, Some(EIO)), (ETIMEDOUT, None)] {
            let Err(SendError::Link(why)) = sent(errno, read, false) else { panic!("{errno}") };
            assert_eq!(why, io::Error::from_raw_os_error(errno).to_string());
        }
    }
}
