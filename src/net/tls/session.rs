//! One TLS session, between the bytes of the network and those of its user. Drives rustls' connection without
//! buffers of its own: records are decrypted where they were received. Never receives, sends or waits.
//!
//! Data to send is encrypted into a bounded buffer. Its bytes count as sent only once all records are: the
//! user repeats a call that could not send everything, as it does on a socket that is full, so that it
//! never forgets bytes that the peer may not get.
//!
//! During the handshake the session asks for one record at a time, and therefore holds no byte behind the last
//! record of the handshake: the kernel can take over from there (`kernel`).

use super::record_reader::RecordReader;
use rustls::client::UnbufferedClientConnection;
use rustls::pki_types::ServerName;
use rustls::server::UnbufferedServerConnection;
use rustls::unbuffered::{
    ConnectionState, EncodeError, EncryptError, UnbufferedStatus, WriteTraffic,
};
use rustls::{CipherSuite, ClientConfig, ExtractedSecrets, ProtocolVersion, ServerConfig};
use std::sync::Arc;

/// Size of the buffer for received records in bytes: as much as a session's receive buffer, so that one system
/// call fills both. A record has at most 16 KiB and some bytes; a handshake message at most 64 KiB.
const INCOMING_MAX: usize = 320 << 10;
/// Most data to encrypt at once, in bytes: eight records, for one system call.
const ENCRYPT_MAX: usize = 128 << 10;

/// What a handshake needs before it can go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::net) enum HandshakeNeed {
    /// A part of the next record ([`TlsSession::record_space`]).
    Input,
    /// Nothing: it is complete.
    Nothing,
}

/// The connection of rustls, of either role.
enum Endpoint {
    Client(Box<UnbufferedClientConnection>),
    Server(Box<UnbufferedServerConnection>),
}

/// One session. See the module documentation.
pub(in crate::net) struct TlsSession {
    endpoint: Endpoint,
    incoming: Bytes,
    /// Decrypted and not returned yet.
    decrypted: Vec<u8>,
    outgoing: Bytes,
    /// How many bytes of the user are in `outgoing`.
    accepted: usize,
    record: RecordReader,
    /// Records have been received, and perhaps not all of them processed. Not the same as a whole record in
    /// `incoming`: a part of a message stays there until the rest arrives.
    unprocessed: bool,
    peer_closed: bool,
    /// The session failed; records that say why may still be in `outgoing`.
    failure: Option<rustls::Error>,
}

/// Bytes in the middle of a buffer that grows on demand.
#[derive(Default)]
struct Bytes {
    buffer: Vec<u8>,
    start: usize,
    end: usize,
}

/// Where decrypted bytes go: to the user, and the rest into a buffer.
struct Plaintext<'a> {
    into: &'a mut [u8],
    filled: usize,
    rest: &'a mut Vec<u8>,
}

/// What to do where data can be sent.
#[derive(Clone, Copy)]
enum ToSend<'a> {
    Nothing,
    Data(&'a [u8]),
    CloseNotify,
}

/// The result of one call of rustls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum TlsStep {
    /// It may go on at once.
    Continue,
    /// It needs more records.
    NeedsInput,
    /// The handshake is complete, all received records are processed, and the data to send is encrypted.
    Ready,
    /// The peer sends nothing more.
    PeerClosed,
}

impl TlsSession {
    /// The server's side.
    ///
    /// # Errors
    /// The configuration cannot be used.
    pub(in crate::net) fn server(config: Arc<ServerConfig>) -> Result<Self, rustls::Error> {
        let connection = UnbufferedServerConnection::new(config)?;
        Ok(Self::new(Endpoint::Server(Box::new(connection))))
    }

    /// The client's side; the server must be `name`.
    ///
    /// # Errors
    /// The configuration cannot be used.
    pub(in crate::net) fn client(
        config: Arc<ClientConfig>,
        name: ServerName<'static>,
    ) -> Result<Self, rustls::Error> {
        let connection = UnbufferedClientConnection::new(config, name)?;
        Ok(Self::new(Endpoint::Client(Box::new(connection))))
    }

    fn new(endpoint: Endpoint) -> Self {
        Self {
            endpoint,
            incoming: Bytes::default(),
            decrypted: Vec::new(),
            outgoing: Bytes::default(),
            accepted: 0,
            record: RecordReader::default(),
            unprocessed: false,
            peer_closed: false,
            failure: None,
        }
    }

    /// Does all of the handshake that is possible now. Records to send are in [`TlsSession::unsent`], also
    /// after an error.
    ///
    /// # Errors
    /// The handshake failed.
    pub(in crate::net) fn shake_hands(&mut self) -> Result<HandshakeNeed, rustls::Error> {
        loop {
            match self.step(&mut [], ToSend::Nothing)?.0 {
                TlsStep::Continue => {}
                TlsStep::NeedsInput => return Ok(HandshakeNeed::Input),
                TlsStep::Ready => return Ok(HandshakeNeed::Nothing),
                TlsStep::PeerClosed => {
                    return Err(rustls::Error::General("closed during the handshake".to_owned()));
                }
            }
        }
    }

    /// Space for the rest of the record that is being received, or of its header. `None` if a message is in so many
    /// small records that they do not fit.
    pub(in crate::net) fn record_space(&mut self) -> Option<&mut [u8]> {
        let wanted = self.record.wanted();
        self.incoming.space(INCOMING_MAX).get_mut(..wanted)
    }

    /// This many bytes were received into [`TlsSession::record_space`]. True at the end of a record.
    pub(in crate::net) fn record_received(&mut self, count: usize) -> bool {
        let end = self.incoming.end;
        self.record.advance(&self.incoming.buffer[end..end + count]);
        self.received(count);
        self.record.is_complete()
    }

    /// Space for received records.
    pub(in crate::net) fn space(&mut self) -> &mut [u8] {
        self.incoming.space(INCOMING_MAX)
    }

    /// This many bytes were received into [`TlsSession::space`].
    pub(in crate::net) fn received(&mut self, count: usize) {
        self.incoming.end += count;
        self.unprocessed = true;
    }

    /// Decrypts as many bytes as have been received whole and fit. `None` if a record is incomplete, 0 at the end
    /// of the stream.
    ///
    /// # Errors
    /// A record is not genuine, or broke the protocol.
    pub(in crate::net) fn decrypt(
        &mut self,
        into: &mut [u8],
    ) -> Result<Option<usize>, rustls::Error> {
        let kept = self.decrypted.len().min(into.len());
        into[..kept].copy_from_slice(&self.decrypted[..kept]);
        self.decrypted.drain(..kept);
        let mut filled = kept;
        while filled < into.len() && !self.peer_closed {
            // Bytes that were decrypted before a failure come first.
            let step = match self.step(&mut into[filled..], ToSend::Nothing) {
                Ok((step, count)) => {
                    filled += count;
                    step
                }
                Err(_) if filled > 0 => break,
                Err(error) => return Err(error),
            };
            if matches!(step, TlsStep::NeedsInput | TlsStep::Ready) {
                self.unprocessed = false;
                break;
            }
        }
        let has_ended = self.peer_closed || into.is_empty();
        Ok((filled > 0 || has_ended).then_some(filled))
    }

    /// Whether [`TlsSession::decrypt`] may return bytes although nothing else is received.
    pub(in crate::net) fn has_decrypted(&self) -> bool {
        !self.decrypted.is_empty() || self.peer_closed || self.unprocessed
    }

    /// Encrypts data from its front, when no records are left to send. [`TlsSession::take_accepted`] returns how
    /// much, once they are sent.
    ///
    /// # Errors
    /// The session has failed.
    pub(in crate::net) fn encrypt(&mut self, data: &[u8]) -> Result<(), rustls::Error> {
        let data = &data[..data.len().min(ENCRYPT_MAX)];
        self.finish(ToSend::Data(data))?;
        self.accepted += data.len();
        Ok(())
    }

    /// Encrypts the message by which TLS ends a stream.
    ///
    /// # Errors
    /// The session has failed.
    pub(in crate::net) fn encrypt_close(&mut self) -> Result<(), rustls::Error> {
        self.finish(ToSend::CloseNotify)
    }

    fn finish(&mut self, to_send: ToSend<'_>) -> Result<(), rustls::Error> {
        loop {
            match self.step(&mut [], to_send)?.0 {
                TlsStep::Ready => return Ok(()),
                TlsStep::Continue | TlsStep::PeerClosed => {}
                // The handshake is not complete, or the session is closed.
                TlsStep::NeedsInput => return Err(rustls::Error::HandshakeNotComplete),
            }
        }
    }

    /// Records to send.
    pub(in crate::net) fn unsent(&self) -> &[u8] {
        self.outgoing.bytes()
    }

    /// This many bytes of the records were sent.
    pub(in crate::net) fn sent(&mut self, count: usize) {
        self.outgoing.consume(count);
    }

    /// How many bytes of the user's data were in the records, which have all been sent.
    pub(in crate::net) fn take_accepted(&mut self) -> usize {
        std::mem::take(&mut self.accepted)
    }

    /// Bytes of the user's data in records that are not sent.
    pub(in crate::net) fn accepted(&self) -> usize {
        self.accepted
    }

    /// Frees the buffers that are empty.
    pub(in crate::net) fn shrink(&mut self) {
        self.incoming.shrink();
        self.outgoing.shrink();
        if self.decrypted.is_empty() {
            self.decrypted = Vec::new();
        }
    }

    /// Whether the kernel can go on with this session: a server's, after its handshake, with AES-GCM, and with
    /// nothing received or to be sent.
    pub(in crate::net) fn suits_kernel(&self) -> bool {
        let Endpoint::Server(connection) = &self.endpoint else { return false };
        let suite = connection.negotiated_cipher_suite().map(|suite| suite.suite());
        let is_aes_gcm = matches!(
            suite,
            Some(
                CipherSuite::TLS13_AES_128_GCM_SHA256
                    | CipherSuite::TLS13_AES_256_GCM_SHA384
                    | CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256
                    | CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384
                    | CipherSuite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256
                    | CipherSuite::TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384
            )
        );
        let is_quiet = self.incoming.bytes().is_empty()
            && self.decrypted.is_empty()
            && self.outgoing.bytes().is_empty();
        is_aes_gcm && is_quiet
    }

    /// The negotiated version.
    pub(in crate::net) fn version(&self) -> Option<ProtocolVersion> {
        match &self.endpoint {
            Endpoint::Client(connection) => connection.protocol_version(),
            Endpoint::Server(connection) => connection.protocol_version(),
        }
    }

    /// The keys of a session that [suits the kernel](TlsSession::suits_kernel).
    ///
    /// # Errors
    /// It does not, or the configuration does not permit it.
    pub(in crate::net) fn into_secrets(self) -> Result<ExtractedSecrets, rustls::Error> {
        match self.endpoint {
            Endpoint::Server(connection) => Ok(connection.dangerous_into_kernel_connection()?.0),
            Endpoint::Client(_) => Err(rustls::Error::HandshakeNotComplete),
        }
    }

    /// Calls rustls once. Returns the number of bytes that were decrypted into `into`.
    fn step(
        &mut self,
        into: &mut [u8],
        to_send: ToSend<'_>,
    ) -> Result<(TlsStep, usize), rustls::Error> {
        if let Some(failure) = &self.failure {
            return Err(failure.clone());
        }
        let mut plaintext = Plaintext { into, filled: 0, rest: &mut self.decrypted };
        let records = self.incoming.bytes_mut();
        let (discard, outcome) =
            self.endpoint.process(records, &mut self.outgoing, &mut plaintext, to_send);
        let filled = plaintext.filled;
        self.incoming.consume(discard);
        match outcome {
            Ok(step) => {
                self.peer_closed |= step == TlsStep::PeerClosed;
                Ok((step, filled))
            }
            Err(error) => {
                self.encode_alert();
                self.failure = Some(error.clone());
                Err(error)
            }
        }
    }

    /// Encodes the alert that says why the session failed: one record, or none.
    fn encode_alert(&mut self) {
        let mut nothing = Plaintext { into: &mut [], filled: 0, rest: &mut Vec::new() };
        let records = self.incoming.bytes_mut();
        let _ = self.endpoint.process(records, &mut self.outgoing, &mut nothing, ToSend::Nothing);
    }
}

impl Endpoint {
    /// Calls rustls once. Returns how many bytes of the records are consumed.
    fn process(
        &mut self,
        records: &mut [u8],
        outgoing: &mut Bytes,
        plaintext: &mut Plaintext<'_>,
        to_send: ToSend<'_>,
    ) -> (usize, Result<TlsStep, rustls::Error>) {
        match self {
            Self::Client(connection) => {
                handle(connection.process_tls_records(records), outgoing, plaintext, to_send)
            }
            Self::Server(connection) => {
                handle(connection.process_tls_records(records), outgoing, plaintext, to_send)
            }
        }
    }
}

/// Acts on the state that rustls has reached.
fn handle<Data>(
    status: UnbufferedStatus<'_, '_, Data>,
    outgoing: &mut Bytes,
    plaintext: &mut Plaintext<'_>,
    to_send: ToSend<'_>,
) -> (usize, Result<TlsStep, rustls::Error>) {
    let mut discard = status.discard;
    let step = match status.state {
        Err(error) => Err(error),
        Ok(ConnectionState::ReadTraffic(mut traffic)) => loop {
            match traffic.next_record() {
                Some(Ok(record)) => {
                    plaintext.put(record.payload);
                    discard += record.discard;
                }
                Some(Err(error)) => break Err(error),
                None => break Ok(TlsStep::Continue),
            }
        },
        Ok(ConnectionState::EncodeTlsData(mut message)) => {
            outgoing.append(|space| match message.encode(space) {
                Ok(count) => Ok(count),
                Err(EncodeError::InsufficientSize(size)) => Err(size.required_size),
                Err(EncodeError::AlreadyEncoded) => Ok(0),
            });
            Ok(TlsStep::Continue)
        }
        // It is in `outgoing`, which is sent in sequence.
        Ok(ConnectionState::TransmitTlsData(message)) => {
            message.done();
            Ok(TlsStep::Continue)
        }
        Ok(ConnectionState::BlockedHandshake) => Ok(TlsStep::NeedsInput),
        Ok(ConnectionState::WriteTraffic(traffic)) => write(traffic, to_send, outgoing),
        Ok(ConnectionState::PeerClosed | ConnectionState::Closed) => Ok(TlsStep::PeerClosed),
        Ok(_) => Err(rustls::Error::General("data before the end of the handshake".to_owned())),
    };
    (discard, step)
}

fn write<Data>(
    mut traffic: WriteTraffic<'_, Data>,
    to_send: ToSend<'_>,
    outgoing: &mut Bytes,
) -> Result<TlsStep, rustls::Error> {
    let mut is_exhausted = false;
    outgoing.append(|space| {
        let written = match to_send {
            ToSend::Nothing => Ok(0),
            ToSend::Data(data) => traffic.encrypt(data, space),
            ToSend::CloseNotify => traffic.queue_close_notify(space),
        };
        match written {
            Ok(count) => Ok(count),
            Err(EncryptError::InsufficientSize(size)) => Err(size.required_size),
            Err(EncryptError::EncryptExhausted) => {
                is_exhausted = true;
                Ok(0)
            }
        }
    });
    if is_exhausted { Err(rustls::Error::EncryptError) } else { Ok(TlsStep::Ready) }
}

impl Plaintext<'_> {
    fn put(&mut self, payload: &[u8]) {
        let fits = payload.len().min(self.into.len() - self.filled);
        let (direct, rest) = payload.split_at(fits);
        self.into[self.filled..self.filled + fits].copy_from_slice(direct);
        self.filled += fits;
        self.rest.extend_from_slice(rest);
    }
}

impl Bytes {
    fn bytes(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.buffer[self.start..self.end]
    }

    fn consume(&mut self, count: usize) {
        self.start += count;
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
    }

    /// The space behind the bytes, in a buffer of this size.
    fn space(&mut self, size: usize) -> &mut [u8] {
        if self.start > 0 && size - self.end < size / 2 {
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        if self.buffer.len() < size {
            self.buffer.resize(size, 0);
        }
        &mut self.buffer[self.end..]
    }

    /// Appends the bytes that `write` writes, which returns their number, or how many bytes of space it needs.
    fn append(&mut self, mut write: impl FnMut(&mut [u8]) -> Result<usize, usize>) {
        let mut size = self.buffer.len();
        loop {
            match write(&mut self.buffer[self.end..]) {
                Ok(count) => {
                    self.end += count;
                    return;
                }
                Err(needed) => {
                    size = size.max(self.end + needed);
                    self.buffer.resize(size, 0);
                }
            }
        }
    }

    fn shrink(&mut self) {
        if self.start == self.end {
            *self = Self::default();
        }
    }
}
