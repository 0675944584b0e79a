//! The client's side of the handshake: bytes that arrived in, bytes to send out.
//! Asks for what its user wishes, takes what the server has, and never asks the user again.

use super::super::Malformed;
use super::super::bytes::Reader;
use super::super::reply::Dialect;
use super::super::wire::{
    CONTEXT_ALLOCATION, ClientFlags, HandshakeFlags, InfoKind, OptionKind, OptionReplyKind,
    PRIVATE_OPTION, RESERVED_ZEROES, TransmissionFlags,
};
use super::option::{InfoRequest, MetaContextRequest, OptionReply, encode_option};
use super::{Agreement, BlockSizes, Greeting, encode_client_flags};

/// What the user of a connection would like; only the export is insisted on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClientOffer {
    /// Name of the export; empty for the default one.
    pub export: String,
    /// Replies in chunks.
    pub structured: bool,
    /// 64-bit lengths; implies chunks.
    pub extended: bool,
    /// The allocation context; needs chunks.
    pub allocation: bool,
    /// The private option, with this data.
    pub private: Option<Vec<u8>>,
    /// Only that: once it is answered the handshake is aborted, as [`HandshakeFailure::Aborted`].
    pub private_only: bool,
}

/// Why there will be no transmission phase.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HandshakeFailure {
    /// The first bytes are no NBD greeting.
    NotNbd,
    /// The server broke the protocol.
    Malformed(Malformed),
    /// The server answered something else than what was asked.
    Unexpected(&'static str),
    /// An export was named, but the server is of the old style and has only one, without a name.
    NoExportNames,
    /// The private option was answered, and nothing else was wished for.
    Aborted,
    /// The server refused the export.
    Refused {
        /// Number of the error.
        number: u32,
        /// The server's words, perhaps none.
        message: String,
    },
}

impl std::fmt::Display for HandshakeFailure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::NotNbd => f.write_str("what answers there is not an NBD server"),
            Self::Malformed(what) => write!(f, "the server broke the NBD protocol: {what}"),
            Self::Unexpected(what) => write!(f, "the server broke the NBD protocol: {what}"),
            Self::Aborted => f.write_str("the handshake was aborted"),
            Self::NoExportNames => {
                f.write_str("the server speaks the old style of NBD, which has no export names")
            }
            Self::Refused { number, message } => {
                f.write_str(reason(*number))?;
                if message.is_empty() { Ok(()) } else { write!(f, " ({})", message.escape_debug()) }
            }
        }
    }
}

impl std::error::Error for HandshakeFailure {}

const OTHER_OPTION: &str = "it answered another option than the one asked";

fn reason(number: u32) -> &'static str {
    match OptionReplyKind::try_from(number) {
        Ok(OptionReplyKind::ErrUnknown) => "the server has no export of that name",
        Ok(OptionReplyKind::ErrPolicy) => "the server does not permit it",
        Ok(OptionReplyKind::ErrTlsRequired) => "the server requires TLS",
        Ok(OptionReplyKind::ErrShutdown) => "the server is shutting down",
        _ => "the server refused the export",
    }
}

/// Where the handshake goes after some input was used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ClientStep {
    /// More input is needed.
    More,
    /// The handshake is over; requests may be sent.
    Transmission(Agreement),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ClientState {
    Greeting,
    Private,
    Answer(OptionKind),
    /// Waiting for what follows `NBD_OPT_EXPORT_NAME`, with this many zero bytes at its end.
    Export {
        zeroes: usize,
    },
}

/// A handshake under way with one server.
#[derive(Debug)]
pub struct ClientHandshake {
    wish: ClientOffer,
    stage: ClientState,
    no_zeroes: bool,
    dialect: Dialect,
    allocation_context: Option<u32>,
    export: Option<(u64, TransmissionFlags)>,
    block_sizes: Option<BlockSizes>,
    private_answer: Option<Vec<u8>>,
}

impl ClientHandshake {
    /// A handshake that waits for the server's greeting.
    #[must_use]
    pub fn new(wish: ClientOffer) -> Self {
        Self {
            wish,
            stage: ClientState::Greeting,
            no_zeroes: false,
            dialect: Dialect::Simple,
            allocation_context: None,
            export: None,
            block_sizes: None,
            private_answer: None,
        }
    }

    /// What the server answered to the private option, if it knows it; also when the handshake
    /// failed later.
    #[must_use]
    pub fn private_answer(&self) -> Option<&[u8]> {
        self.private_answer.as_deref()
    }

    /// Uses up the front of `input`, appends to `out` what is to be sent, and says how much was
    /// used and what comes next. What was not used must be at the front of the next call's input.
    ///
    /// # Errors
    /// When there is no way to the transmission phase; the connection is to be closed.
    pub fn advance(
        &mut self,
        input: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<(usize, ClientStep), HandshakeFailure> {
        let mut used = 0;
        loop {
            let (step, next) = match self.stage {
                ClientState::Greeting => self.greeting(&input[used..], out)?,
                ClientState::Private => self.private_reply(&input[used..], out)?,
                ClientState::Answer(asked) => self.answer(asked, &input[used..], out)?,
                ClientState::Export { zeroes } => self.export_reply(zeroes, &input[used..]),
            };
            used += step;
            if step == 0 || next != ClientStep::More {
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
            return Ok((0, ClientStep::More));
        };
        match greeting {
            Greeting::Oldstyle { .. } if !self.wish.export.is_empty() => {
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
                match &self.wish.private {
                    Some(data) if fixed => {
                        encode_option(PRIVATE_OPTION, data, out);
                        self.stage = ClientState::Private;
                    }
                    _ if fixed => self.ask(self.first(), out),
                    _ => self.ask(OptionKind::ExportName, out),
                }
                Ok((used, ClientStep::More))
            }
        }
    }

    /// The first option of the specification to ask for.
    fn first(&self) -> OptionKind {
        if self.wish.extended { OptionKind::ExtendedHeaders } else { self.after_extended_headers() }
    }

    fn private_reply(
        &mut self,
        input: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<(usize, ClientStep), HandshakeFailure> {
        let decoded = OptionReply::decode(input).map_err(HandshakeFailure::Malformed)?;
        let Some(((option, reply), used)) = decoded else { return Ok((0, ClientStep::More)) };
        if option != PRIVATE_OPTION {
            return Err(HandshakeFailure::Unexpected(OTHER_OPTION));
        }
        match reply {
            OptionReply::Other { number: PRIVATE_OPTION, data } => self.private_answer = Some(data),
            OptionReply::Ack if self.wish.private_only => return Err(HandshakeFailure::Aborted),
            OptionReply::Ack => self.ask(self.first(), out),
            OptionReply::Error { number, .. }
                if number == OptionReplyKind::ErrUnsupported.number() =>
            {
                self.ask(self.first(), out);
            }
            OptionReply::Error { number, message } => {
                return Err(HandshakeFailure::Refused { number, message });
            }
            _ => {}
        }
        Ok((used, ClientStep::More))
    }

    fn ask(&mut self, kind: OptionKind, out: &mut Vec<u8>) {
        let mut data = Vec::new();
        let export = self.wish.export.clone();
        match kind {
            OptionKind::Go => {
                let wanted = vec![InfoKind::BlockSize.number()];
                InfoRequest { export, wanted }.encode(&mut data);
            }
            OptionKind::SetMetaContext => {
                let queries = vec![CONTEXT_ALLOCATION.to_owned()];
                MetaContextRequest { export, queries }.encode(&mut data);
            }
            OptionKind::ExportName => data.extend_from_slice(export.as_bytes()),
            _ => {}
        }
        encode_option(kind.number(), &data, out);
        self.stage = if kind == OptionKind::ExportName {
            ClientState::Export { zeroes: if self.no_zeroes { 0 } else { RESERVED_ZEROES } }
        } else {
            ClientState::Answer(kind)
        };
    }

    fn answer(
        &mut self,
        asked: OptionKind,
        input: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<(usize, ClientStep), HandshakeFailure> {
        let decoded = OptionReply::decode(input).map_err(HandshakeFailure::Malformed)?;
        let Some(((option, reply), used)) = decoded else { return Ok((0, ClientStep::More)) };
        if option != asked.number() {
            return Err(HandshakeFailure::Unexpected(OTHER_OPTION));
        }
        let then = match (asked, reply) {
            (_, OptionReply::Export { size, flags }) => {
                self.export = Some((size, flags));
                return Ok((used, ClientStep::More));
            }
            (_, OptionReply::BlockSize(sizes)) => {
                self.block_sizes = Some(sizes);
                return Ok((used, ClientStep::More));
            }
            (_, OptionReply::MetaContext { id, name }) => {
                if name == CONTEXT_ALLOCATION {
                    self.allocation_context = Some(id);
                }
                return Ok((used, ClientStep::More));
            }
            (OptionKind::Go, OptionReply::Ack) => {
                let missing =
                    HandshakeFailure::Unexpected("it did not say how large the export is");
                let (size, flags) = self.export.ok_or(missing)?;
                return Ok((used, ClientStep::Transmission(self.agreement(size, flags, false))));
            }
            (_, OptionReply::Ack) => self.accepted(asked),
            (_, OptionReply::Error { number, message }) => self.declined(asked, number, message)?,
            _ => return Ok((used, ClientStep::More)),
        };
        self.ask(then, out);
        Ok((used, ClientStep::More))
    }

    /// What to ask after the server accepted an option.
    fn accepted(&mut self, asked: OptionKind) -> OptionKind {
        match asked {
            OptionKind::ExtendedHeaders => {
                self.dialect = Dialect::Extended;
                self.after_replies()
            }
            OptionKind::StructuredReply => {
                self.dialect = Dialect::Structured;
                self.after_replies()
            }
            _ => OptionKind::Go,
        }
    }

    /// What to ask after the server declined an option; only the export itself must be had.
    fn declined(
        &mut self,
        asked: OptionKind,
        number: u32,
        message: String,
    ) -> Result<OptionKind, HandshakeFailure> {
        match asked {
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
        let wanted = self.wish.structured || self.wish.extended || self.wish.allocation;
        if wanted { OptionKind::StructuredReply } else { OptionKind::Go }
    }

    fn after_replies(&self) -> OptionKind {
        if self.wish.allocation { OptionKind::SetMetaContext } else { OptionKind::Go }
    }

    fn export_reply(&mut self, zeroes: usize, input: &[u8]) -> (usize, ClientStep) {
        let mut reader = Reader::new(input);
        let reply = (|| {
            let size = reader.u64()?;
            let flags = TransmissionFlags::from_bits_truncate(reader.u16()?);
            reader.take(zeroes)?;
            Some((size, flags))
        })();
        let Some((size, flags)) = reply else { return (0, ClientStep::More) };
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
