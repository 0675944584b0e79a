//! The client's side of the handshake: takes received bytes, returns bytes to send.
//! Requests the features of its offer, and uses the supported ones. Never asks its caller again.

use super::super::Malformed;
use super::super::bytes::Reader;
use super::super::reply::Dialect;
use super::super::wire::{
    CONTEXT_ALLOCATION, ClientFlags, HandshakeFlags, InfoKind, OptionKind, OptionReplyKind,
    PRIVATE_OPTION, RESERVED_ZEROES, TransmissionFlags,
};
use super::option::{InfoRequest, MetaContextRequest, OptionReply, encode_option};
use super::{Agreement, BlockSizes, Greeting, encode_client_flags};
use thiserror::Error;

/// Whether a client begins TLS.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TlsWish {
    /// It does not.
    #[default]
    No,
    /// If the server supports it. An attacker between the two can prevent it.
    IfSupported,
    /// It does, or the handshake fails.
    Required,
}

/// The features that a client requests. Only the export is mandatory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClientOffer {
    /// Name of the export; empty for the default export.
    pub export: String,
    /// Structured replies.
    pub structured: bool,
    /// Extended headers; falls back to structured replies.
    pub extended: bool,
    /// The metadata context `base:allocation`; implies structured replies.
    pub allocation: bool,
    /// The private option, with this data.
    pub private: Option<Vec<u8>>,
    /// The private option once more, with this data, after a server has accepted it. Its reply does not
    /// matter: not every server that knows the first message knows this one.
    pub private_more: Option<Vec<u8>>,
    /// Nothing else: after the reply the handshake ends with [`HandshakeFailure::Aborted`].
    pub private_only: bool,
    /// TLS, before everything else.
    pub tls: TlsWish,
}

/// The reason why a handshake does not reach the transmission phase.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum HandshakeFailure {
    /// The first bytes are not an NBD greeting.
    #[error("what answers there is not an NBD server")]
    NotNbd,
    /// The server sent a malformed message.
    #[error("the server broke the NBD protocol: {0}")]
    Malformed(Malformed),
    /// The server sent a valid message at the wrong time.
    #[error("the server broke the NBD protocol: {0}")]
    Unexpected(&'static str),
    /// The caller named an export, but an oldstyle server has only one, without a name.
    #[error("the server speaks the old style of NBD, which has no export names")]
    NoExportNames,
    /// The server replied to the private option, and the offer requests nothing else.
    #[error("the handshake was aborted")]
    Aborted,
    /// The client requires TLS, and the server has none; with the server's message, if any.
    #[error("the server does not support TLS, which is required{}", in_parentheses(.0))]
    NoTls(String),
    /// The server refused the export.
    #[error("{}{}", reason(*.number), in_parentheses(.message))]
    Refused {
        /// Number of the error.
        number: u32,
        /// The message of the server; may be empty.
        message: String,
    },
}

/// Most characters of a server's message that are shown to an operator.
pub(super) const MESSAGE_SHOWN_MAX: usize = 256;

/// The reply to this option, and its length; `None` if it is incomplete.
fn decode_reply(
    asked: u32,
    input: &[u8],
) -> Result<Option<(OptionReply, usize)>, HandshakeFailure> {
    match OptionReply::decode(input).map_err(HandshakeFailure::Malformed)? {
        Some(((option, reply), used)) if option == asked => Ok(Some((reply, used))),
        Some(_) => {
            let other = "it answered another option than the one asked";
            Err(HandshakeFailure::Unexpected(other))
        }
        None => Ok(None),
    }
}

fn reason(number: u32) -> &'static str {
    match OptionReplyKind::try_from(number) {
        Ok(OptionReplyKind::ErrUnknown) => "the server has no export of that name",
        Ok(OptionReplyKind::ErrPolicy) => "the server does not permit it",
        Ok(OptionReplyKind::ErrTlsRequired) => "the server requires TLS (see --tls)",
        Ok(OptionReplyKind::ErrShutdown) => "the server is shutting down",
        _ => "the server refused the export",
    }
}

/// The message of a server for an operator: without control characters, and no more of it than a line and a
/// `status` have room for.
fn in_parentheses(message: &str) -> String {
    let mut shown: String = message.chars().take(MESSAGE_SHOWN_MAX).collect();
    let rest = if shown.len() < message.len() { " ..." } else { "" };
    if shown.is_empty() {
        return shown;
    }
    shown = shown.escape_debug().to_string();
    format!(" ({shown}{rest})")
}

/// The next step of the handshake.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ClientStep {
    /// Call again with more input.
    NeedInput,
    /// The handshake is complete: the client may send requests.
    Transmission(Agreement),
    /// The server agrees to TLS. Send the pending bytes, begin TLS, and continue with
    /// [`ClientHandshake::on_tls_started`]. No input of the plain connection must be used.
    StartTls,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ClientState {
    /// Waits for the greeting.
    Greeting,
    /// Waits for the reply to `NBD_OPT_STARTTLS`.
    StartTls,
    /// Waits for replies to the private option.
    Private,
    /// Waits for replies to the second private option.
    PrivateMore,
    /// Waits for replies to this option.
    Option(OptionKind),
    /// Waits for the reply to `NBD_OPT_EXPORT_NAME`, which ends with this many zero bytes.
    ExportName { zeroes: usize },
}

/// A handshake with one server.
#[derive(Debug)]
pub struct ClientHandshake {
    offer: ClientOffer,
    state: ClientState,
    no_zeroes: bool,
    dialect: Dialect,
    allocation_context: Option<u32>,
    export: Option<(u64, TransmissionFlags)>,
    block_sizes: Option<BlockSizes>,
    private_reply: Option<Vec<u8>>,
}

impl ClientHandshake {
    /// A handshake that waits for the server's greeting.
    #[must_use]
    pub fn new(offer: ClientOffer) -> Self {
        Self {
            offer,
            state: ClientState::Greeting,
            no_zeroes: false,
            dialect: Dialect::Simple,
            allocation_context: None,
            export: None,
            block_sizes: None,
            private_reply: None,
        }
    }

    /// Data of the reply to the private option, if the server supports it. Valid even if the
    /// handshake fails later.
    #[must_use]
    pub fn private_reply(&self) -> Option<&[u8]> {
        self.private_reply.as_deref()
    }

    /// Consumes messages from the front of `input`, and appends the bytes to send to `out`. Returns
    /// the number of consumed bytes and the next step. The next call's input must begin with the
    /// first unconsumed byte.
    ///
    /// # Errors
    /// If the handshake fails; the caller must close the connection.
    pub fn advance(
        &mut self,
        input: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<(usize, ClientStep), HandshakeFailure> {
        let mut used = 0;
        loop {
            let (step, next) = match self.state {
                ClientState::Greeting => self.greeting(&input[used..], out)?,
                ClientState::StartTls => self.start_tls_reply(&input[used..], out)?,
                ClientState::Private | ClientState::PrivateMore => {
                    self.private_option_reply(&input[used..], out)?
                }
                ClientState::Option(kind) => self.option_reply(kind, &input[used..], out)?,
                ClientState::ExportName { zeroes } => {
                    self.export_name_reply(zeroes, &input[used..])
                }
            };
            used += step;
            if step == 0 || next != ClientStep::NeedInput {
                return Ok((used, next));
            }
        }
    }

    fn greeting(
        &mut self,
        input: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<(usize, ClientStep), HandshakeFailure> {
        let Some((greeting, used)) =
            Greeting::decode(input).map_err(|_| HandshakeFailure::NotNbd)?
        else {
            return Ok((0, ClientStep::NeedInput));
        };
        match greeting {
            Greeting::Oldstyle { .. } if self.offer.tls == TlsWish::Required => {
                Err(HandshakeFailure::NoTls("it speaks the old style of NBD".to_owned()))
            }
            Greeting::Oldstyle { .. } if !self.offer.export.is_empty() => {
                Err(HandshakeFailure::NoExportNames)
            }
            Greeting::Oldstyle { size, flags } => {
                self.export = Some((size, flags));
                Ok((used, ClientStep::Transmission(self.agreement(size, flags, true))))
            }
            Greeting::Newstyle { flags } => {
                self.no_zeroes = flags.contains(HandshakeFlags::NO_ZEROES);
                let fixed = flags.contains(HandshakeFlags::FIXED_NEWSTYLE);
                let mut client = ClientFlags::empty();
                client.set(ClientFlags::NO_ZEROES, self.no_zeroes);
                client.set(ClientFlags::FIXED_NEWSTYLE, fixed);
                encode_client_flags(client, out);
                match self.offer.tls {
                    TlsWish::Required if !fixed => {
                        let why = "it does not support fixed newstyle";
                        return Err(HandshakeFailure::NoTls(why.to_owned()));
                    }
                    TlsWish::IfSupported | TlsWish::Required if fixed => {
                        encode_option(OptionKind::StartTls.number(), &[], out);
                        self.state = ClientState::StartTls;
                    }
                    _ if fixed => self.send_first_option(out),
                    _ => self.send_option(OptionKind::ExportName, out),
                }
                Ok((used, ClientStep::NeedInput))
            }
        }
    }

    fn start_tls_reply(
        &mut self,
        input: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<(usize, ClientStep), HandshakeFailure> {
        let Some((reply, used)) = decode_reply(OptionKind::StartTls.number(), input)? else {
            return Ok((0, ClientStep::NeedInput));
        };
        match reply {
            OptionReply::Ack => return Ok((used, ClientStep::StartTls)),
            OptionReply::Error { .. } if self.offer.tls == TlsWish::IfSupported => {
                self.send_first_option(out);
            }
            OptionReply::Error { message, .. } => return Err(HandshakeFailure::NoTls(message)),
            _ => {
                return Err(HandshakeFailure::Unexpected(
                    "its reply to STARTTLS is of another kind",
                ));
            }
        }
        Ok((used, ClientStep::NeedInput))
    }

    /// Continues in TLS, after [`ClientStep::StartTls`].
    pub fn on_tls_started(&mut self, out: &mut Vec<u8>) {
        self.send_first_option(out);
    }

    fn send_first_option(&mut self, out: &mut Vec<u8>) {
        match &self.offer.private {
            Some(data) => {
                encode_option(PRIVATE_OPTION, data, out);
                self.state = ClientState::Private;
            }
            None => self.send_option(self.first_option(), out),
        }
    }

    /// The first option after the private one.
    fn first_option(&self) -> OptionKind {
        if self.offer.extended {
            OptionKind::ExtendedHeaders
        } else {
            self.after_extended_headers()
        }
    }

    fn private_option_reply(
        &mut self,
        input: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<(usize, ClientStep), HandshakeFailure> {
        let Some((reply, used)) = decode_reply(PRIVATE_OPTION, input)? else {
            return Ok((0, ClientStep::NeedInput));
        };
        let is_first = self.state == ClientState::Private;
        match reply {
            OptionReply::Other { number: PRIVATE_OPTION, data } if is_first => {
                self.private_reply = Some(data);
            }
            OptionReply::Ack if self.offer.private_only => return Err(HandshakeFailure::Aborted),
            OptionReply::Ack if is_first && self.offer.private_more.is_some() => {
                encode_option(
                    PRIVATE_OPTION,
                    self.offer.private_more.as_deref().unwrap_or_default(),
                    out,
                );
                self.state = ClientState::PrivateMore;
            }
            OptionReply::Ack => self.send_option(self.first_option(), out),
            OptionReply::Error { .. } if !is_first => self.send_option(self.first_option(), out),
            OptionReply::Error { number, .. }
                if number == OptionReplyKind::ErrUnsupported.number() =>
            {
                self.send_option(self.first_option(), out);
            }
            OptionReply::Error { number, message } => {
                return Err(HandshakeFailure::Refused { number, message });
            }
            _ => {}
        }
        Ok((used, ClientStep::NeedInput))
    }

    fn send_option(&mut self, kind: OptionKind, out: &mut Vec<u8>) {
        let mut data = Vec::new();
        let export = self.offer.export.clone();
        match kind {
            OptionKind::Go => {
                let requests = vec![InfoKind::BlockSize.number()];
                InfoRequest { export, requests }.encode(&mut data);
            }
            OptionKind::SetMetaContext => {
                let queries = vec![CONTEXT_ALLOCATION.to_owned()];
                MetaContextRequest { export, queries }.encode(&mut data);
            }
            OptionKind::ExportName => data.extend_from_slice(export.as_bytes()),
            _ => {}
        }
        encode_option(kind.number(), &data, out);
        self.state = if kind == OptionKind::ExportName {
            ClientState::ExportName { zeroes: if self.no_zeroes { 0 } else { RESERVED_ZEROES } }
        } else {
            ClientState::Option(kind)
        };
    }

    fn option_reply(
        &mut self,
        kind: OptionKind,
        input: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<(usize, ClientStep), HandshakeFailure> {
        let Some((reply, used)) = decode_reply(kind.number(), input)? else {
            return Ok((0, ClientStep::NeedInput));
        };
        let next = match (kind, reply) {
            (_, OptionReply::Export { size, flags }) => {
                self.export = Some((size, flags));
                return Ok((used, ClientStep::NeedInput));
            }
            (_, OptionReply::BlockSize(sizes)) => {
                self.block_sizes = Some(sizes);
                return Ok((used, ClientStep::NeedInput));
            }
            (_, OptionReply::MetaContext { id, name }) => {
                if name == CONTEXT_ALLOCATION {
                    self.allocation_context = Some(id);
                }
                return Ok((used, ClientStep::NeedInput));
            }
            (OptionKind::Go, OptionReply::Ack) => {
                let missing =
                    HandshakeFailure::Unexpected("it did not say how large the export is");
                let (size, flags) = self.export.ok_or(missing)?;
                return Ok((used, ClientStep::Transmission(self.agreement(size, flags, false))));
            }
            (_, OptionReply::Ack) => self.accepted(kind),
            (_, OptionReply::Error { number, message }) => self.refused(kind, number, message)?,
            _ => return Ok((used, ClientStep::NeedInput)),
        };
        self.send_option(next, out);
        Ok((used, ClientStep::NeedInput))
    }

    /// The next option after the server accepted `kind`.
    fn accepted(&mut self, kind: OptionKind) -> OptionKind {
        match kind {
            OptionKind::ExtendedHeaders => {
                self.dialect = Dialect::Extended;
                self.after_reply_options()
            }
            OptionKind::StructuredReply => {
                self.dialect = Dialect::Structured;
                self.after_reply_options()
            }
            _ => OptionKind::Go,
        }
    }

    /// The next option after the server refused `kind`. Only a refused export ends the handshake.
    fn refused(
        &mut self,
        kind: OptionKind,
        number: u32,
        message: String,
    ) -> Result<OptionKind, HandshakeFailure> {
        match kind {
            OptionKind::ExtendedHeaders => Ok(self.after_extended_headers()),
            OptionKind::Go if number == OptionReplyKind::ErrUnsupported.number() => {
                Ok(OptionKind::ExportName)
            }
            OptionKind::Go => Err(HandshakeFailure::Refused { number, message }),
            OptionKind::SetMetaContext => {
                self.allocation_context = None;
                Ok(OptionKind::Go)
            }
            _ => Ok(OptionKind::Go),
        }
    }

    fn after_extended_headers(&self) -> OptionKind {
        let needs_chunks = self.offer.structured || self.offer.extended || self.offer.allocation;
        if needs_chunks { OptionKind::StructuredReply } else { OptionKind::Go }
    }

    fn after_reply_options(&self) -> OptionKind {
        if self.offer.allocation { OptionKind::SetMetaContext } else { OptionKind::Go }
    }

    fn export_name_reply(&mut self, zeroes: usize, input: &[u8]) -> (usize, ClientStep) {
        let mut reader = Reader::new(input);
        let reply = (|| {
            let size = reader.u64()?;
            let flags = TransmissionFlags::from_bits_truncate(reader.u16()?);
            reader.take(zeroes)?;
            Some((size, flags))
        })();
        let Some((size, flags)) = reply else { return (0, ClientStep::NeedInput) };
        (reader.used(), ClientStep::Transmission(self.agreement(size, flags, false)))
    }

    fn agreement(&self, size: u64, flags: TransmissionFlags, oldstyle: bool) -> Agreement {
        Agreement {
            size,
            flags,
            dialect: self.dialect,
            allocation_context: self.allocation_context,
            block_sizes: self.block_sizes,
            oldstyle,
        }
    }
}
