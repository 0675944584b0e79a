//! One connection to another server's export, one request at a time.
//! Never reconnects and never guesses: errors go to the caller.
//!
//! [`Connection`] is the handshake of [`crate::nbd`] done over a [`Stream`], and requests in the
//! simple dialect after it, in which the bytes of a read come in order and can be streamed.

#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz_tests;

use crate::nbd::Malformed;
use crate::nbd::handshake::Agreement;
use crate::nbd::handshake::client::{
    ClientHandshake, ClientOffer, ClientStep, HandshakeFailure, TlsWish,
};
use crate::nbd::reply::{Dialect, ReplyHeader};
use crate::nbd::request::RequestHeader;
use crate::nbd::wire::{
    CommandFlags, CommandKind, ErrorCode, PAYLOAD_LENGTH_DEFAULT, TransmissionFlags,
};
use crate::net::Stream;
use crate::net::tls::{ClientTls, TlsFailure, TlsMode, TlsRole};
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How much of a read is handed on at once, in bytes.
const PORTION: usize = 256 << 10;
/// Length of a simple reply without data, in bytes.
const REPLY_LENGTH: usize = 16;

/// A connection that is ready for requests.
#[derive(Debug)]
pub struct Connection {
    stream: Stream,
    agreement: Agreement,
    timeout: Duration,
    cookie: u64,
}

/// What went wrong between us and the server.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The handshake failed.
    #[error(transparent)]
    Handshake(HandshakeFailure),
    /// The connection broke, or made no progress for too long.
    #[error("the connection broke: {0}")]
    Connection(io::Error),
    /// The server answered a request with an error.
    #[error("the server answered: {0}")]
    Refused(ErrorCode),
    /// TLS could not begin.
    #[error(transparent)]
    Tls(TlsFailure),
    /// The server broke the protocol.
    #[error("the server broke the NBD protocol: {0}")]
    Protocol(&'static str),
    /// The request does not fit the server's minimum block size, in bytes.
    #[error("the server takes only offsets and lengths that are multiples of {0}")]
    Unaligned(u32),
    /// The caller could not consume the data that was read.
    #[error("cannot hand on what was read: {0}")]
    Sink(io::Error),
}

impl From<Malformed> for ClientError {
    fn from(_: Malformed) -> Self {
        Self::Protocol("a reply does not begin as one")
    }
}

impl Connection {
    /// Does the handshake over a connected stream, for the export of this name. All of it may take
    /// up to `timeout`, and so may every message later.
    ///
    /// # Errors
    /// When the server does not give us the export.
    pub fn open(
        stream: Stream,
        export: &str,
        tls: Option<&ClientTls>,
        timeout: Duration,
    ) -> Result<Self, ClientError> {
        let offer = ClientOffer { export: export.to_owned(), ..ClientOffer::default() };
        let (stream, agreement) = shake_hands(stream, offer, tls, timeout).agreed?;
        Ok(Self { stream, agreement, timeout, cookie: 0 })
    }

    /// What the server said of itself and the export.
    #[must_use]
    pub fn agreement(&self) -> &Agreement {
        &self.agreement
    }

    /// The longest read or write that the server takes, in bytes.
    #[must_use]
    pub fn payload_length_max(&self) -> u32 {
        let advertised = self.agreement.block_sizes.map(|sizes| sizes.maximum);
        // Whatever the server takes, this is enough to be fast.
        advertised.unwrap_or(PAYLOAD_LENGTH_DEFAULT).clamp(1, PAYLOAD_LENGTH_DEFAULT)
    }

    /// Whether offset and length fit the server's smallest block.
    ///
    /// # Errors
    /// [`ClientError::Unaligned`] if not.
    pub fn check_alignment(&self, offset: u64, length: u64) -> Result<(), ClientError> {
        let block = self.agreement.block_sizes.map_or(1, |sizes| sizes.minimum.max(1));
        let fits =
            offset.is_multiple_of(u64::from(block)) && length.is_multiple_of(u64::from(block));
        if fits { Ok(()) } else { Err(ClientError::Unaligned(block)) }
    }

    /// Reads `length` bytes from `offset` on, handing them to `sink` in order.
    ///
    /// # Errors
    /// What the server answered, or how the connection or the sink failed. Only after
    /// [`ClientError::Refused`] can the connection be used again.
    pub fn read(
        &mut self,
        offset: u64,
        length: u32,
        sink: &mut dyn FnMut(&[u8]) -> io::Result<()>,
    ) -> Result<(), ClientError> {
        self.request(CommandKind::Read, offset, length, &[])?;
        let mut left = length as usize;
        let mut portion = vec![0; left.min(PORTION)];
        while left > 0 {
            let step = left.min(PORTION);
            self.receive(&mut portion[..step])?;
            sink(&portion[..step]).map_err(ClientError::Sink)?;
            left -= step;
        }
        Ok(())
    }

    /// Writes `data` to `offset`.
    ///
    /// # Errors
    /// What the server answered, or how the connection failed.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Result<(), ClientError> {
        let too_long = ClientError::Refused(ErrorCode::Invalid);
        let length = u32::try_from(data.len()).map_err(|_| too_long)?;
        self.request(CommandKind::Write, offset, length, data)
    }

    /// Sends FLUSH, if the server supports it.
    ///
    /// # Errors
    /// What the server answered, or how the connection failed.
    pub fn flush(&mut self) -> Result<(), ClientError> {
        if self.agreement.flags.contains(TransmissionFlags::SEND_FLUSH) {
            self.request(CommandKind::Flush, 0, 0, &[])?;
        }
        Ok(())
    }

    /// Says goodbye to a newstyle server. One of old style is just left: it may be the original's
    /// `listen`, which takes a goodbye for the end of a migration.
    pub fn close(self) {
        if self.agreement.oldstyle {
            return;
        }
        let mut goodbye = Vec::new();
        header(CommandKind::Disconnect, 0, 0, 0).encode(Dialect::Simple, &mut goodbye);
        // Everything has been answered; a server that has gone already needs no goodbye.
        let _ = self.stream.send_all(&goodbye, self.timeout);
        self.stream.announce_end();
    }

    fn request(
        &mut self,
        kind: CommandKind,
        offset: u64,
        length: u32,
        payload: &[u8],
    ) -> Result<(), ClientError> {
        self.cookie += 1;
        let mut bytes = Vec::new();
        header(kind, self.cookie, offset, length).encode(Dialect::Simple, &mut bytes);
        self.send(&bytes)?;
        self.send(payload)?;
        let mut reply = [0; REPLY_LENGTH];
        self.receive(&mut reply)?;
        match ReplyHeader::decode(&reply)? {
            Some((ReplyHeader::Simple { cookie, .. }, _)) if cookie != self.cookie => {
                Err(ClientError::Protocol("a reply has another request's cookie"))
            }
            Some((ReplyHeader::Simple { error: 0, .. }, _)) => Ok(()),
            Some((ReplyHeader::Simple { error, .. }, _)) => {
                Err(ClientError::Refused(ErrorCode::from_wire(error)))
            }
            _ => Err(ClientError::Protocol("a structured reply, which was not agreed on")),
        }
    }

    fn send(&self, bytes: &[u8]) -> Result<(), ClientError> {
        self.stream.send_all(bytes, self.timeout).map_err(ClientError::Connection)
    }

    fn receive(&self, into: &mut [u8]) -> Result<(), ClientError> {
        self.stream.recv_exact(into, self.timeout).map_err(ClientError::Connection)
    }
}

fn header(kind: CommandKind, cookie: u64, offset: u64, length: u32) -> RequestHeader {
    let flags = CommandFlags::empty().bits();
    RequestHeader { flags, kind: kind.number(), cookie, offset, length: u64::from(length) }
}

/// The result of a handshake. Both parts are useful without the other.
#[derive(Debug)]
pub struct ClientOutcome {
    /// The answer to the private option, if any.
    pub private_reply: Option<Vec<u8>>,
    /// The connection, which may be encrypted now, and the negotiated parameters.
    pub agreed: Result<(Stream, Agreement), ClientError>,
}

/// Does the client's side of a handshake over a connected stream, with TLS if wanted. All of it may take up to
/// `timeout`, however busily the server talks.
#[must_use]
pub fn shake_hands(
    stream: Stream,
    offer: ClientOffer,
    tls: Option<&ClientTls>,
    timeout: Duration,
) -> ClientOutcome {
    let wish = match tls.map(ClientTls::mode) {
        None | Some(TlsMode::Off) => TlsWish::No,
        Some(TlsMode::On) => TlsWish::IfSupported,
        Some(TlsMode::Require) => TlsWish::Required,
    };
    let mut handshake = ClientHandshake::new(ClientOffer { tls: wish, ..offer });
    let deadline = Deadline { at: Instant::now() + timeout, timeout };
    let agreed = converse(stream, &mut handshake, tls, &deadline);
    ClientOutcome { private_reply: handshake.private_reply().map(<[u8]>::to_vec), agreed }
}

/// When a handshake must be complete.
struct Deadline {
    at: Instant,
    timeout: Duration,
}

impl Deadline {
    fn left(&self) -> Result<Duration, ClientError> {
        let left = self.at.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(ClientError::Connection(self.late())) } else { Ok(left) }
    }

    fn late(&self) -> io::Error {
        let seconds = self.timeout.as_secs_f32();
        let text = format!("the handshake took longer than {seconds} s");
        io::Error::new(io::ErrorKind::TimedOut, text)
    }
}

/// Takes the server's bytes one at a time, so that nothing of what follows the handshake, or the plain part of
/// it, is taken with it. A handshake is short.
fn converse(
    mut stream: Stream,
    handshake: &mut ClientHandshake,
    tls: Option<&ClientTls>,
    deadline: &Deadline,
) -> Result<(Stream, Agreement), ClientError> {
    let mut input = Vec::new();
    loop {
        let mut byte = [0];
        stream.recv_exact(&mut byte, deadline.left()?).map_err(ClientError::Connection)?;
        input.push(byte[0]);
        let mut out = Vec::new();
        let (used, next) = handshake.advance(&input, &mut out).map_err(ClientError::Handshake)?;
        input.drain(..used);
        stream.send_all(&out, deadline.timeout).map_err(ClientError::Connection)?;
        match next {
            ClientStep::NeedInput => {}
            ClientStep::Transmission(agreement) => return Ok((stream, agreement)),
            ClientStep::StartTls => {
                // The handshake begins TLS only if it is wanted.
                let Some(tls) = tls else { return Err(ClientError::Protocol("unwanted TLS")) };
                stream = start_tls(stream, tls, deadline)?;
                let mut out = Vec::new();
                handshake.on_tls_started(&mut out);
                stream.send_all(&out, deadline.timeout).map_err(ClientError::Connection)?;
            }
        }
    }
}

fn start_tls(stream: Stream, tls: &ClientTls, deadline: &Deadline) -> Result<Stream, ClientError> {
    let (config, name) = (Arc::clone(tls.config()), tls.server_name().clone());
    let mut wait = |stream: &Stream, interest| {
        let ready = stream.wait(interest, None, Some(deadline.at))?;
        if ready.timed_out { Err(deadline.late()) } else { Ok(()) }
    };
    let secured = stream.start_tls(&TlsRole::Client { config, name }, &mut wait);
    secured.map_err(ClientError::Tls)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nbd::handshake::BlockSizes;
    use crate::nbd::handshake::option::OptionReply;
    use crate::nbd::handshake::server::{self, Export};
    use crate::nbd::wire::OptionKind;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    use std::sync::mpsc;
    use std::thread;

    const TIMEOUT: Duration = Duration::from_secs(10);

    fn export(minimum: u32, maximum: u32) -> Export {
        Export {
            name: String::new(),
            description: String::new(),
            size: 1 << 20,
            flags: TransmissionFlags::HAS_FLAGS | TransmissionFlags::SEND_FLUSH,
            block_sizes: BlockSizes { minimum, preferred: 4096, maximum },
        }
    }

    /// A server that shakes hands, swallows one request, and then says `answer`.
    fn against(export: Export, oldstyle: bool, answer: Vec<u8>) -> Connection {
        let (mut server, client) = UnixStream::pair().unwrap();
        thread::spawn(move || {
            let mut handshake = server::ServerHandshake::new(export.clone());
            let mut out = Vec::new();
            if oldstyle {
                server::ServerHandshake::greet_oldstyle(&export, &mut out);
            } else {
                handshake.greet(&mut out);
            }
            let (mut input, mut agreed) = (Vec::new(), oldstyle);
            loop {
                server.write_all(&out).unwrap();
                out.clear();
                if agreed {
                    break;
                }
                let mut some = [0; 100];
                let count = server.read(&mut some).unwrap();
                input.extend_from_slice(&some[..count]);
                let (used, next) = handshake.advance(&input, &mut out).unwrap();
                input.drain(..used);
                agreed = matches!(next, server::ServerStep::Transmission(_));
            }
            server.read_exact(&mut [0; 28]).unwrap();
            server.write_all(&answer).unwrap();
        });
        Connection::open(Stream::Unix(client), "", None, TIMEOUT).unwrap()
    }

    fn reply(cookie: u64, error: u32) -> Vec<u8> {
        let mut out = Vec::new();
        ReplyHeader::Simple { cookie, error }.encode(&mut out);
        out
    }

    #[test]
    fn server_error_keeps_its_code() {
        let mut connection = against(export(1, 4096), false, reply(1, 28));
        let error = connection.flush().unwrap_err();
        assert!(matches!(error, ClientError::Refused(ErrorCode::NoSpace)), "{error}");
    }

    #[test]
    fn reply_with_a_wrong_cookie_is_a_protocol_error() {
        for answer in [reply(2, 0), b"HTTP/1.1 400 Bad".to_vec()] {
            let mut connection = against(export(1, 4096), false, answer);
            assert!(matches!(connection.flush(), Err(ClientError::Protocol(_))));
        }
    }

    #[test]
    fn endless_haggling_times_out() {
        let (mut server, client) = UnixStream::pair().unwrap();
        thread::spawn(move || {
            let mut greeting = Vec::new();
            server::ServerHandshake::new(export(1, 4096)).greet(&mut greeting);
            server.write_all(&greeting).unwrap();
            let mut reply = Vec::new();
            OptionReply::OtherInfo(99).encode(OptionKind::Go.number(), &mut reply);
            // Until the client has had enough.
            while server.write_all(&reply).is_ok() {}
        });
        let (told, outcome) = mpsc::channel();
        thread::spawn(move || {
            let timeout = Duration::from_millis(100);
            told.send(Connection::open(Stream::Unix(client), "", None, timeout).map(drop))
        });
        match outcome.recv_timeout(TIMEOUT).expect("it goes on for ever") {
            Err(ClientError::Connection(error)) => {
                assert_eq!(error.kind(), io::ErrorKind::TimedOut, "{error}");
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn server_that_leaves_within_data_breaks_the_connection() {
        let answer = [reply(1, 0), vec![7; 100]].concat();
        let mut connection = against(export(1, 4096), true, answer);
        let mut read = Vec::new();
        let outcome = connection.read(0, 512, &mut |data| {
            read.extend_from_slice(data);
            Ok(())
        });
        assert!(matches!(outcome, Err(ClientError::Connection(_))));
    }

    #[test]
    fn server_block_sizes_are_respected() {
        let connection = against(export(512, 1 << 20), false, Vec::new());
        assert_eq!(connection.payload_length_max(), 1 << 20);
        assert!(connection.check_alignment(1024, 512).is_ok());
        assert!(connection.check_alignment(1, 512).is_err());
        assert!(connection.check_alignment(0, 100).is_err());
        let greedy = against(export(1, u32::MAX), false, Vec::new());
        assert_eq!(greedy.payload_length_max(), PAYLOAD_LENGTH_DEFAULT);
        let old = against(export(1, 1), true, Vec::new());
        assert_eq!(old.payload_length_max(), PAYLOAD_LENGTH_DEFAULT);
    }
}
