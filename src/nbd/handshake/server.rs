//! The server's side of the handshake: bytes that arrived in, bytes to send out.
//! Changes nothing outside itself, so that a client may vanish at any byte of it.

use super::super::reply::Dialect;
use super::super::wire::{
    CONTEXT_ALLOCATION, CONTEXT_NAMESPACE, ClientFlags, HandshakeFlags, InfoKind, OptionKind,
    OptionReplyKind, PRIVATE_OPTION, RESERVED_ZEROES, STRING_LENGTH_MAX, TransmissionFlags,
};
use super::option::{
    InfoRequest, MetaContextRequest, OPTION_LENGTH_MAX, OPTION_SKIP_LENGTH_MAX, OptionFault,
    OptionHead, OptionReply, decode_text,
};
use super::{ALLOCATION_CONTEXT_ID, Agreement, BlockSizes, Greeting};

/// What a server offers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Export {
    /// Its name; clients reach it under the empty name as well.
    pub name: String,
    /// Words for people; may be empty.
    pub description: String,
    /// In bytes.
    pub size: u64,
    /// Without [`TransmissionFlags::SEND_DF`], which depends on the client.
    pub flags: TransmissionFlags,
    /// What clients should keep to.
    pub block_sizes: BlockSizes,
}

/// How a client broke the handshake so that the session must end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ProtocolViolation {
    /// It sent flags that do not exist.
    UnknownClientFlags(u32),
    /// An option did not begin as one: framing is lost.
    NoOption(u64),
    /// An option announced this many bytes, over [`OPTION_SKIP_LENGTH_MAX`].
    OptionTooLong(u32),
    /// `NBD_OPT_EXPORT_NAME` for an export that does not exist, or a name that is none.
    NoSuchExport,
    /// `NBD_OPT_EXPORT_NAME` after extended headers were agreed on.
    ExportNameAfterExtendedHeaders,
    /// An option that must be answered, from a client that does not know answers.
    OptionBeforeFixedNewstyle(u32),
    /// `NBD_OPT_EXPORT_NAME` from a client that was refused admission.
    NotAdmitted(String),
}

impl std::fmt::Display for ProtocolViolation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::UnknownClientFlags(flags) => write!(f, "it sent unknown client flags {flags:#x}"),
            Self::NoOption(magic) => write!(f, "it sent {magic:#x} where an option should begin"),
            Self::OptionTooLong(length) => write!(f, "it announced an option of {length} bytes"),
            Self::NoSuchExport => f.write_str("it asked for an export that does not exist"),
            Self::ExportNameAfterExtendedHeaders => {
                f.write_str("it sent NBD_OPT_EXPORT_NAME after extended headers")
            }
            Self::OptionBeforeFixedNewstyle(number) => {
                write!(f, "it sent option {number} without knowing fixed newstyle")
            }
            Self::NotAdmitted(why) => write!(f, "it is not let in: {why}"),
        }
    }
}

/// Where the handshake goes after some input was used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ServerStep {
    /// More input is needed.
    More,
    /// The handshake is over; requests follow.
    Transmission(Agreement),
    /// The client sent the private option, with this data: go on with
    /// [`ServerHandshake::answer_private`].
    PrivateOption(Vec<u8>),
    /// The client wants to know about the export, or to enter the transmission phase. Go on after
    /// [`ServerHandshake::decide`], with the same input.
    AdmissionRequired {
        /// It would be in the transmission phase.
        to_enter: bool,
    },
    /// The client gave up: send what there is to send, then close.
    Aborted,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ServerState {
    ClientFlags,
    Options,
    /// Reading past the data of an option that was answered already.
    Skipping(u32),
}

/// A handshake under way with one client, in newstyle.
#[derive(Debug)]
pub struct ServerHandshake {
    export: Export,
    stage: ServerState,
    client: ClientFlags,
    dialect: Dialect,
    /// Name of the export for which the allocation context was selected.
    allocation_for: Option<String>,
    /// Whether the private option is known.
    private: bool,
    /// Whether it is decided for each client whether it gets at the export.
    selective: bool,
    /// Whether the client has sent it and had it answered.
    introduced: bool,
    /// Whether the client may have the export that it now asks for, or why not, once decided.
    verdict: Option<Result<(), String>>,
}

/// How far a handshake has come, so that another process can go on with it. Bytes that were not
/// used yet are not part of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HandshakePosition {
    /// What the client said first; none while it has not.
    pub client: Option<ClientFlags>,
    /// How much of an option's data is still to be read past.
    pub skipping: u32,
    /// What was agreed on for requests and replies.
    pub dialect: Dialect,
    /// Name of the export for which the allocation context was selected.
    pub allocation_for: Option<String>,
    /// Whether the private option was answered.
    pub introduced: bool,
}

impl ServerHandshake {
    /// A handshake in which nothing has been said.
    #[must_use]
    pub fn new(export: Export) -> Self {
        let (client, dialect) = (None, Dialect::Simple);
        let (allocation_for, introduced) = (None, false);
        Self::resume(
            export,
            HandshakePosition { client, skipping: 0, dialect, allocation_for, introduced },
        )
    }

    /// The handshake that has come to `position`; the greeting was said before, or is about to be.
    #[must_use]
    pub fn resume(export: Export, position: HandshakePosition) -> Self {
        let stage = match (position.client, position.skipping) {
            (None, _) => ServerState::ClientFlags,
            (Some(_), 0) => ServerState::Options,
            (Some(_), left) => ServerState::Skipping(left),
        };
        Self {
            export,
            stage,
            client: position.client.unwrap_or(ClientFlags::empty()),
            dialect: position.dialect,
            allocation_for: position.allocation_for,
            private: false,
            selective: false,
            introduced: position.introduced,
            verdict: None,
        }
    }

    /// How far it has come.
    #[must_use]
    pub fn position(&self) -> HandshakePosition {
        HandshakePosition {
            client: (self.stage != ServerState::ClientFlags).then_some(self.client),
            skipping: if let ServerState::Skipping(left) = self.stage { left } else { 0 },
            dialect: self.dialect,
            allocation_for: self.allocation_for.clone(),
            introduced: self.introduced,
        }
    }

    /// Whether the client has introduced itself: the private option was answered, so that the
    /// private command is understood.
    #[must_use]
    pub fn is_introduced(&self) -> bool {
        self.introduced
    }

    /// Enables the private option; without this call it is answered as unknown.
    pub fn enable_private_option(&mut self) {
        self.private = true;
    }

    /// Requires a [decision](ServerHandshake::decide) before each access to the export.
    pub fn require_admission(&mut self) {
        self.selective = true;
    }

    /// Decides [`ServerStep::AdmissionRequired`]; the error is why not (`NBD_REP_ERR_POLICY`).
    pub fn decide(&mut self, verdict: Result<(), String>) {
        self.verdict = Some(verdict);
    }

    /// Answers the private option, after [`ServerStep::PrivateOption`].
    pub fn answer_private(&mut self, answer: Result<Vec<u8>, OptionReply>, out: &mut Vec<u8>) {
        match answer {
            Ok(data) => {
                self.introduced = true;
                OptionReply::Other { number: PRIVATE_OPTION, data }.encode(PRIVATE_OPTION, out);
                OptionReply::Ack.encode(PRIVATE_OPTION, out);
            }
            Err(refusal) => refusal.encode(PRIVATE_OPTION, out),
        }
    }

    /// What to say first.
    pub fn greet(&self, out: &mut Vec<u8>) {
        let flags = HandshakeFlags::FIXED_NEWSTYLE | HandshakeFlags::NO_ZEROES;
        Greeting::Newstyle { flags }.encode(out);
    }

    /// All there is to the old style: what to say, and what it means.
    pub fn greet_oldstyle(export: &Export, out: &mut Vec<u8>) -> Agreement {
        Greeting::Oldstyle { size: export.size, flags: export.flags }.encode(out);
        Agreement {
            size: export.size,
            flags: export.flags,
            dialect: Dialect::Simple,
            allocation_context: None,
            block_sizes: None,
            oldstyle: true,
        }
    }

    /// Uses up the front of `input`, appends answers to `out`, and says how much was used and what
    /// comes next. What was not used must be at the front of the next call's input.
    ///
    /// # Errors
    /// When the session must end; what is in `out` need not be sent.
    pub fn advance(
        &mut self,
        input: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<(usize, ServerStep), ProtocolViolation> {
        let mut used = 0;
        loop {
            let rest = &input[used..];
            let before = used;
            match self.stage {
                ServerState::ClientFlags => used += self.client_flags(rest)?,
                ServerState::Skipping(left) => used += self.skip(left, rest),
                ServerState::Options => {
                    let (step, next) = self.option(rest, out)?;
                    used += step;
                    if next != ServerStep::More {
                        return Ok((used, next));
                    }
                }
            }
            if used == before {
                return Ok((used, ServerStep::More));
            }
        }
    }

    fn client_flags(&mut self, input: &[u8]) -> Result<usize, ProtocolViolation> {
        let Some(field) = input.first_chunk::<4>() else { return Ok(0) };
        let number = u32::from_be_bytes(*field);
        self.client =
            ClientFlags::from_bits(number).ok_or(ProtocolViolation::UnknownClientFlags(number))?;
        self.stage = ServerState::Options;
        Ok(field.len())
    }

    fn skip(&mut self, left: u32, input: &[u8]) -> usize {
        let step = input.len().min(left as usize);
        let left = left - step as u32;
        self.stage = if left == 0 { ServerState::Options } else { ServerState::Skipping(left) };
        step
    }

    fn option(
        &mut self,
        input: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<(usize, ServerStep), ProtocolViolation> {
        let head = match OptionHead::decode(input) {
            Ok(Some((head, _))) => head,
            Ok(None) => return Ok((0, ServerStep::More)),
            Err(_) => {
                let magic = input.first_chunk::<8>().map_or(0, |bytes| u64::from_be_bytes(*bytes));
                return Err(ProtocolViolation::NoOption(magic));
            }
        };
        let kind = OptionKind::try_from(head.number);
        if !self.client.contains(ClientFlags::FIXED_NEWSTYLE) && kind != Ok(OptionKind::ExportName)
        {
            return Err(ProtocolViolation::OptionBeforeFixedNewstyle(head.number));
        }
        let after_head = super::option::OPTION_HEAD_LENGTH;
        if self.private && head.number == PRIVATE_OPTION && head.length <= OPTION_LENGTH_MAX {
            let end = after_head + head.length as usize;
            let data =
                input.get(after_head..end).map(|data| ServerStep::PrivateOption(data.to_vec()));
            return Ok(data.map_or((0, ServerStep::More), |next| (end, next)));
        }
        if kind == Ok(OptionKind::Abort) {
            // Whatever data it has does not matter any more.
            OptionReply::Ack.encode(head.number, out);
            return Ok((after_head, ServerStep::Aborted));
        }
        if let Some(answer) = Self::answer_unread(kind, head)? {
            answer.encode(head.number, out);
            self.forget_contexts_on_failed_set(kind);
            if head.length > 0 {
                self.stage = ServerState::Skipping(head.length);
            }
            return Ok((after_head, ServerStep::More));
        }
        let end = after_head + head.length as usize;
        let Some(data) = input.get(after_head..end) else { return Ok((0, ServerStep::More)) };
        // Only known kinds get here: unknown ones were answered unread.
        let next = kind.map_or(Ok(ServerStep::More), |kind| self.handle_option(kind, data, out))?;
        let used = if matches!(next, ServerStep::AdmissionRequired { .. }) { 0 } else { end };
        Ok((used, next))
    }

    /// The answer to an option whose data need not, or must not, be kept.
    fn answer_unread(
        kind: Result<OptionKind, u32>,
        head: OptionHead,
    ) -> Result<Option<OptionReply>, ProtocolViolation> {
        if head.length > OPTION_SKIP_LENGTH_MAX {
            return Err(ProtocolViolation::OptionTooLong(head.length));
        }
        match kind {
            Ok(OptionKind::ExportName) if head.length as usize > STRING_LENGTH_MAX => {
                Err(ProtocolViolation::NoSuchExport)
            }
            Ok(OptionKind::StartTls) => {
                Ok(Some(refuse(OptionReplyKind::ErrUnsupported, "TLS is not supported")))
            }
            Err(_) => Ok(Some(refuse(OptionReplyKind::ErrUnsupported, "unknown option"))),
            Ok(_) if head.length > OPTION_LENGTH_MAX => {
                Ok(Some(refuse(OptionReplyKind::ErrTooBig, "the option is too long")))
            }
            Ok(_) => Ok(None),
        }
    }

    fn handle_option(
        &mut self,
        kind: OptionKind,
        data: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<ServerStep, ProtocolViolation> {
        let number = kind.number();
        match kind {
            OptionKind::ExportName => return self.export_name(data, out),
            OptionKind::Info | OptionKind::Go => return Ok(self.info(kind, data, out)),
            OptionKind::List => self.list(data, out),
            OptionKind::StructuredReply => self.structured_reply(data).encode(number, out),
            OptionKind::ExtendedHeaders => self.extended_headers(data).encode(number, out),
            OptionKind::ListMetaContext | OptionKind::SetMetaContext => {
                self.meta_context(kind, data, out);
            }
            // Answered before their data was looked at.
            OptionKind::Abort | OptionKind::StartTls => {}
        }
        Ok(ServerStep::More)
    }

    fn export_name(
        &mut self,
        data: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<ServerStep, ProtocolViolation> {
        if self.dialect == Dialect::Extended {
            return Err(ProtocolViolation::ExportNameAfterExtendedHeaders);
        }
        let name = decode_text(data).map_err(|_| ProtocolViolation::NoSuchExport)?;
        if !self.has(&name) {
            return Err(ProtocolViolation::NoSuchExport);
        }
        match self.verdict.take() {
            None if self.selective => return Ok(ServerStep::AdmissionRequired { to_enter: true }),
            Some(Err(why)) => return Err(ProtocolViolation::NotAdmitted(why)),
            None | Some(Ok(())) => {}
        }
        let agreement = self.agreement(&name);
        out.extend_from_slice(&agreement.size.to_be_bytes());
        out.extend_from_slice(&agreement.flags.bits().to_be_bytes());
        if !self.client.contains(ClientFlags::NO_ZEROES) {
            out.extend_from_slice(&[0; RESERVED_ZEROES]);
        }
        Ok(ServerStep::Transmission(agreement))
    }

    fn list(&self, data: &[u8], out: &mut Vec<u8>) {
        let number = OptionKind::List.number();
        if !data.is_empty() {
            return no_data().encode(number, out);
        }
        let name = self.export.name.clone();
        let description = self.export.description.clone();
        OptionReply::Server { name, description }.encode(number, out);
        OptionReply::Ack.encode(number, out);
    }

    fn structured_reply(&mut self, data: &[u8]) -> OptionReply {
        if !data.is_empty() {
            return no_data();
        }
        if self.dialect == Dialect::Extended {
            let kind = OptionReplyKind::ErrExtendedHeadersRequired;
            return refuse(kind, "extended headers were agreed on already");
        }
        self.dialect = Dialect::Structured;
        OptionReply::Ack
    }

    fn extended_headers(&mut self, data: &[u8]) -> OptionReply {
        if !data.is_empty() {
            return no_data();
        }
        self.dialect = Dialect::Extended;
        OptionReply::Ack
    }

    fn info(&mut self, kind: OptionKind, data: &[u8], out: &mut Vec<u8>) -> ServerStep {
        let number = kind.number();
        let request = match InfoRequest::decode(data) {
            Ok(request) => request,
            Err(fault) => {
                fault_reply(fault).encode(number, out);
                return ServerStep::More;
            }
        };
        if !self.has(&request.export) {
            no_such_export().encode(number, out);
            return ServerStep::More;
        }
        match self.verdict.take() {
            None if self.selective => {
                return ServerStep::AdmissionRequired { to_enter: kind == OptionKind::Go };
            }
            Some(Err(why)) => {
                refuse(OptionReplyKind::ErrPolicy, &why).encode(number, out);
                return ServerStep::More;
            }
            None | Some(Ok(())) => {}
        }
        let agreement = self.agreement(&request.export);
        let wants = |info: InfoKind| request.wanted.contains(&info.number());
        OptionReply::Export { size: agreement.size, flags: agreement.flags }.encode(number, out);
        if wants(InfoKind::Name) {
            OptionReply::Name(self.export.name.clone()).encode(number, out);
        }
        if wants(InfoKind::Description) {
            OptionReply::Description(self.export.description.clone()).encode(number, out);
        }
        if wants(InfoKind::BlockSize) {
            OptionReply::BlockSize(self.export.block_sizes).encode(number, out);
        }
        OptionReply::Ack.encode(number, out);
        if kind == OptionKind::Go { ServerStep::Transmission(agreement) } else { ServerStep::More }
    }

    fn meta_context(&mut self, kind: OptionKind, data: &[u8], out: &mut Vec<u8>) {
        let number = kind.number();
        self.forget_contexts_on_failed_set(Ok(kind));
        if self.dialect == Dialect::Simple {
            let message = "structured replies must be agreed on first";
            return refuse(OptionReplyKind::ErrInvalid, message).encode(number, out);
        }
        let request = match MetaContextRequest::decode(data) {
            Ok(request) => request,
            Err(fault) => return fault_reply(fault).encode(number, out),
        };
        if !self.has(&request.export) {
            return no_such_export().encode(number, out);
        }
        let listing = kind == OptionKind::ListMetaContext;
        if selects_allocation(&request.queries, listing) {
            // In a listing the id means nothing and is zero.
            let id = if listing { 0 } else { ALLOCATION_CONTEXT_ID };
            let name = CONTEXT_ALLOCATION.to_owned();
            OptionReply::MetaContext { id, name }.encode(number, out);
            if !listing {
                self.allocation_for = Some(request.export);
            }
        }
        OptionReply::Ack.encode(number, out);
    }

    /// A new selection replaces the earlier one even when it fails.
    fn forget_contexts_on_failed_set(&mut self, kind: Result<OptionKind, u32>) {
        if kind == Ok(OptionKind::SetMetaContext) {
            self.allocation_for = None;
        }
    }

    fn has(&self, name: &str) -> bool {
        name.is_empty() || name == self.export.name
    }

    fn agreement(&self, name: &str) -> Agreement {
        let mut flags = self.export.flags;
        flags.set(TransmissionFlags::SEND_DF, self.dialect != Dialect::Simple);
        let selected = self.allocation_for.as_deref() == Some(name);
        Agreement {
            size: self.export.size,
            flags,
            dialect: self.dialect,
            allocation_context: selected.then_some(ALLOCATION_CONTEXT_ID),
            block_sizes: Some(self.export.block_sizes),
            oldstyle: false,
        }
    }
}

fn selects_allocation(queries: &[String], listing: bool) -> bool {
    let whole_namespace = |query: &String| listing && query == CONTEXT_NAMESPACE;
    (listing && queries.is_empty())
        || queries.iter().any(|query| query == CONTEXT_ALLOCATION || whole_namespace(query))
}

fn refuse(kind: OptionReplyKind, message: &str) -> OptionReply {
    OptionReply::error(kind, message)
}

fn no_data() -> OptionReply {
    refuse(OptionReplyKind::ErrInvalid, "this option has no data")
}

fn no_such_export() -> OptionReply {
    refuse(OptionReplyKind::ErrUnknown, "there is no export of that name")
}

fn fault_reply(fault: OptionFault) -> OptionReply {
    match fault {
        OptionFault::Invalid(why) => refuse(OptionReplyKind::ErrInvalid, why),
        OptionFault::TooBig => refuse(OptionReplyKind::ErrTooBig, "a string is too long"),
    }
}
