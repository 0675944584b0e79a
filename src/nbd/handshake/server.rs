//! The server's side of the handshake: takes received bytes, returns bytes to send.
//! Has no effect outside itself: a client may disconnect after any byte.

use super::super::reply::Dialect;
use super::super::wire::{
    CONTEXT_ALLOCATION, CONTEXT_NAMESPACE, ClientFlags, HandshakeFlags, InfoKind, OptionKind,
    OptionReplyKind, PRIVATE_OPTION, RESERVED_ZEROES, STRING_LENGTH_MAX, TransmissionFlags,
};
use super::option::{
    InfoRequest, MetaContextRequest, OPTION_HEADER_LENGTH, OPTION_LENGTH_MAX,
    OPTION_SKIP_LENGTH_MAX, OPTIONS_LENGTH_MAX, OPTIONS_MAX, OptionError, OptionHeader,
    OptionReply, decode_string,
};
use super::tls_offer::TlsOffer;
pub use super::violation::ProtocolViolation;
use super::{ALLOCATION_CONTEXT_ID, Agreement, BlockSizes, Greeting};

/// The export of a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Export {
    /// Name of the export. It is also the default export, with the empty name.
    pub name: String,
    /// Description for display; may be empty.
    pub description: String,
    /// Size in bytes.
    pub size: u64,
    /// Transmission flags, without [`TransmissionFlags::SEND_DF`], which depends on the
    /// negotiation.
    pub flags: TransmissionFlags,
    /// Advertised block sizes.
    pub block_sizes: BlockSizes,
}

/// The next step of the handshake.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ServerStep {
    /// Call again with more input.
    NeedInput,
    /// The handshake is complete: requests follow.
    Transmission(Agreement),
    /// The client sent the private option with this data. Continue with
    /// [`ServerHandshake::reply_to_private_option`].
    PrivateOption(Vec<u8>),
    /// The client requests the export. Call [`ServerHandshake::set_admission`], then continue with
    /// the same input.
    AdmissionRequired {
        /// Whether the option enters the transmission phase, unlike `NBD_OPT_INFO`.
        enters_transmission: bool,
    },
    /// The client sent `NBD_OPT_ABORT`. Send the pending replies, then close the connection.
    Aborted,
    /// The client sent `NBD_OPT_STARTTLS`. Send the pending replies, begin TLS, and go on in it from
    /// [`HandshakePosition::begun`]. Unconsumed input must not be used.
    StartTls,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ServerState {
    /// Waits for the client flags.
    ClientFlags,
    /// Waits for an option.
    Options,
    /// Skips this many bytes: data of an option that was replied to already.
    Skipping(u32),
}

/// A newstyle handshake with one client.
#[derive(Debug)]
pub struct ServerHandshake {
    export: Export,
    state: ServerState,
    client: ClientFlags,
    dialect: Dialect,
    /// Name of the export for which the allocation context was selected.
    allocation_for: Option<String>,
    /// Whether the server supports the private option.
    private_enabled: bool,
    /// Whether the private option was negotiated.
    private_negotiated: bool,
    /// Whether each request for the export needs admission.
    admission_required: bool,
    /// The decision on the current option, once made; the error is the reason for a refusal.
    admission: Option<Result<(), String>>,
    tls: TlsOffer,
    received: ReceivedOptions,
}

/// The options that a client has sent to this process.
#[derive(Clone, Copy, Debug, Default)]
struct ReceivedOptions {
    count: u32,
    /// Bytes of data in them.
    length: u64,
}

impl ReceivedOptions {
    /// These and one more; an error if they exceed a limit.
    fn and(self, header: OptionHeader) -> Result<Self, ProtocolViolation> {
        let (count, length) = (self.count + 1, self.length + u64::from(header.length));
        if count > OPTIONS_MAX || length > OPTIONS_LENGTH_MAX {
            return Err(ProtocolViolation::TooManyOptions);
        }
        Ok(Self { count, length })
    }
}

/// The state of a handshake, from which another process can resume it. Unconsumed input is not part
/// of it, and the limits of options count anew.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HandshakePosition {
    /// The client flags; `None` until they arrive.
    pub client: Option<ClientFlags>,
    /// How many bytes of the data of an option remain to be skipped.
    pub skipping: u32,
    /// The negotiated form of request headers and replies.
    pub dialect: Dialect,
    /// Name of the export for which the allocation context was selected.
    pub allocation_for: Option<String>,
    /// Whether the private option was negotiated.
    pub private_negotiated: bool,
}

impl HandshakePosition {
    /// The position before the first option. Nothing else is left of a handshake that begins TLS, and the client
    /// does not send its flags again (NBD specification, `NBD_OPT_STARTTLS`).
    #[must_use]
    pub fn begun(client: Option<ClientFlags>) -> Self {
        let (allocation_for, private_negotiated) = (None, false);
        Self { client, skipping: 0, dialect: Dialect::Simple, allocation_for, private_negotiated }
    }
}

impl ServerHandshake {
    /// A handshake before the client flags.
    #[must_use]
    pub fn new(export: Export) -> Self {
        Self::resume(export, HandshakePosition::begun(None))
    }

    /// Resumes a handshake at `position`. Does not send the greeting.
    #[must_use]
    pub fn resume(export: Export, position: HandshakePosition) -> Self {
        let state = match (position.client, position.skipping) {
            (None, _) => ServerState::ClientFlags,
            (Some(_), 0) => ServerState::Options,
            (Some(_), left) => ServerState::Skipping(left),
        };
        Self {
            export,
            state,
            client: position.client.unwrap_or(ClientFlags::empty()),
            dialect: position.dialect,
            allocation_for: position.allocation_for,
            private_enabled: false,
            private_negotiated: position.private_negotiated,
            admission_required: false,
            admission: None,
            tls: TlsOffer::Unsupported,
            received: ReceivedOptions::default(),
        }
    }

    /// The state from which [`ServerHandshake::resume`] continues.
    #[must_use]
    pub fn position(&self) -> HandshakePosition {
        HandshakePosition {
            client: (self.state != ServerState::ClientFlags).then_some(self.client),
            skipping: if let ServerState::Skipping(left) = self.state { left } else { 0 },
            dialect: self.dialect,
            allocation_for: self.allocation_for.clone(),
            private_negotiated: self.private_negotiated,
        }
    }

    /// Whether the private option was negotiated, so that the private command is valid.
    #[must_use]
    pub fn private_negotiated(&self) -> bool {
        self.private_negotiated
    }

    /// Enables the private option; otherwise it is an unknown option.
    pub fn enable_private_option(&mut self) {
        self.private_enabled = true;
    }

    /// Sets what to do about TLS.
    pub fn set_tls(&mut self, tls: TlsOffer) {
        self.tls = tls;
    }

    /// Requires [admission](ServerHandshake::set_admission) for each request for the export.
    pub fn require_admission(&mut self) {
        self.admission_required = true;
    }

    /// Decides [`ServerStep::AdmissionRequired`]. The error is the reason for `NBD_REP_ERR_POLICY`.
    pub fn set_admission(&mut self, admission: Result<(), String>) {
        self.admission = Some(admission);
    }

    /// Replies to the private option, after [`ServerStep::PrivateOption`].
    pub fn reply_to_private_option(
        &mut self,
        reply: Result<Vec<u8>, OptionReply>,
        out: &mut Vec<u8>,
    ) {
        match reply {
            Ok(data) => {
                self.private_negotiated = true;
                OptionReply::Other { number: PRIVATE_OPTION, data }.encode(PRIVATE_OPTION, out);
                OptionReply::Ack.encode(PRIVATE_OPTION, out);
            }
            Err(error) => error.encode(PRIVATE_OPTION, out),
        }
    }

    /// Appends the newstyle greeting.
    pub fn greet(&self, out: &mut Vec<u8>) {
        let flags = HandshakeFlags::FIXED_NEWSTYLE | HandshakeFlags::NO_ZEROES;
        Greeting::Newstyle { flags }.encode(out);
    }

    /// Appends the oldstyle greeting, which is the whole handshake, and returns its parameters.
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

    /// Consumes messages from the front of `input`, and appends the replies to `out`. Returns the
    /// number of consumed bytes and the next step. The next call's input must begin with the first
    /// unconsumed byte.
    ///
    /// # Errors
    /// If the session must end; `out` need not be sent.
    pub fn advance(
        &mut self,
        input: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<(usize, ServerStep), ProtocolViolation> {
        let mut used = 0;
        loop {
            let rest = &input[used..];
            let before = used;
            match self.state {
                ServerState::ClientFlags => used += self.client_flags(rest)?,
                ServerState::Skipping(left) => used += self.skip(left, rest),
                ServerState::Options => {
                    let (step, next) = self.option(rest, out)?;
                    used += step;
                    if next != ServerStep::NeedInput {
                        return Ok((used, next));
                    }
                }
            }
            if used == before {
                return Ok((used, ServerStep::NeedInput));
            }
        }
    }

    fn client_flags(&mut self, input: &[u8]) -> Result<usize, ProtocolViolation> {
        let Some(field) = input.first_chunk::<4>() else { return Ok(0) };
        let number = u32::from_be_bytes(*field);
        self.client =
            ClientFlags::from_bits(number).ok_or(ProtocolViolation::UnknownClientFlags(number))?;
        self.state = ServerState::Options;
        Ok(field.len())
    }

    fn skip(&mut self, left: u32, input: &[u8]) -> usize {
        let step = input.len().min(left as usize);
        let left = left - step as u32;
        self.state = if left == 0 { ServerState::Options } else { ServerState::Skipping(left) };
        step
    }

    fn option(
        &mut self,
        input: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<(usize, ServerStep), ProtocolViolation> {
        let header = match OptionHeader::decode(input) {
            Ok(Some((header, _))) => header,
            Ok(None) => return Ok((0, ServerStep::NeedInput)),
            Err(_) => {
                let magic = input.first_chunk::<8>().map_or(0, |bytes| u64::from_be_bytes(*bytes));
                return Err(ProtocolViolation::BadOptionMagic(magic));
            }
        };
        let received = self.received.and(header)?;
        let (used, next) = self.option_of(header, input, out)?;
        if used > 0 {
            self.received = received;
        }
        Ok((used, next))
    }

    fn option_of(
        &mut self,
        header: OptionHeader,
        input: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<(usize, ServerStep), ProtocolViolation> {
        let kind = OptionKind::try_from(header.number);
        if !self.client.contains(ClientFlags::FIXED_NEWSTYLE) && kind != Ok(OptionKind::ExportName)
        {
            return Err(ProtocolViolation::OptionBeforeFixedNewstyle(header.number));
        }
        let data_start = OPTION_HEADER_LENGTH;
        if let Some(refused) = self.refuse_without_tls(kind, header, out)? {
            return Ok((data_start, refused));
        }
        if self.private_enabled
            && header.number == PRIVATE_OPTION
            && header.length <= OPTION_LENGTH_MAX
        {
            let end = data_start + header.length as usize;
            let data =
                input.get(data_start..end).map(|data| ServerStep::PrivateOption(data.to_vec()));
            return Ok(data.map_or((0, ServerStep::NeedInput), |next| (end, next)));
        }
        if kind == Ok(OptionKind::Abort) {
            // The session ends here, so that its data need not be skipped.
            OptionReply::Ack.encode(header.number, out);
            return Ok((data_start, ServerStep::Aborted));
        }
        if let Some(reply) = self.reply_without_data(kind, header)? {
            reply.encode(header.number, out);
            if kind == Ok(OptionKind::StartTls) && reply == OptionReply::Ack {
                return Ok((data_start, ServerStep::StartTls));
            }
            self.clear_contexts_on_set(kind);
            if header.length > 0 {
                self.state = ServerState::Skipping(header.length);
            }
            return Ok((data_start, ServerStep::NeedInput));
        }
        let end = data_start + header.length as usize;
        let Some(data) = input.get(data_start..end) else { return Ok((0, ServerStep::NeedInput)) };
        // Unknown options do not get here: they were replied to without their data.
        let next =
            kind.map_or(Ok(ServerStep::NeedInput), |kind| self.handle_option(kind, data, out))?;
        let used = if matches!(next, ServerStep::AdmissionRequired { .. }) { 0 } else { end };
        Ok((used, next))
    }

    /// Refuses options that must not precede TLS.
    fn refuse_without_tls(
        &mut self,
        kind: Result<OptionKind, u32>,
        header: OptionHeader,
        out: &mut Vec<u8>,
    ) -> Result<Option<ServerStep>, ProtocolViolation> {
        let Some(reply) = self.tls.refusal(kind) else { return Ok(None) };
        if kind == Ok(OptionKind::ExportName) {
            return Err(ProtocolViolation::TlsRequired);
        }
        if header.length > OPTION_SKIP_LENGTH_MAX {
            return Err(ProtocolViolation::OptionTooLong(header.length));
        }
        reply.encode(header.number, out);
        if header.length > 0 {
            self.state = ServerState::Skipping(header.length);
        }
        Ok(Some(ServerStep::NeedInput))
    }

    /// The reply to an option whose data the server does not decode.
    fn reply_without_data(
        &self,
        kind: Result<OptionKind, u32>,
        header: OptionHeader,
    ) -> Result<Option<OptionReply>, ProtocolViolation> {
        if header.length > OPTION_SKIP_LENGTH_MAX {
            return Err(ProtocolViolation::OptionTooLong(header.length));
        }
        match kind {
            Ok(OptionKind::ExportName) if header.length as usize > STRING_LENGTH_MAX => {
                Err(ProtocolViolation::UnknownExport)
            }
            Ok(OptionKind::StartTls) => Ok(Some(self.tls.reply(header.length))),
            Err(_) => Ok(Some(error_reply(OptionReplyKind::ErrUnsupported, "unknown option"))),
            Ok(_) if header.length > OPTION_LENGTH_MAX => {
                Ok(Some(error_reply(OptionReplyKind::ErrTooBig, "the option is too long")))
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
            // Replied to without their data.
            OptionKind::Abort | OptionKind::StartTls => {}
        }
        Ok(ServerStep::NeedInput)
    }

    fn export_name(
        &mut self,
        data: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<ServerStep, ProtocolViolation> {
        if self.dialect == Dialect::Extended {
            return Err(ProtocolViolation::ExportNameAfterExtendedHeaders);
        }
        let name = decode_string(data).map_err(|_| ProtocolViolation::UnknownExport)?;
        if !self.is_export(&name) {
            return Err(ProtocolViolation::UnknownExport);
        }
        match self.admission.take() {
            None if self.admission_required => {
                return Ok(ServerStep::AdmissionRequired { enters_transmission: true });
            }
            Some(Err(reason)) => return Err(ProtocolViolation::NotAdmitted(reason)),
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
            return data_not_allowed().encode(number, out);
        }
        let name = self.export.name.clone();
        let description = self.export.description.clone();
        OptionReply::Server { name, description }.encode(number, out);
        OptionReply::Ack.encode(number, out);
    }

    fn structured_reply(&mut self, data: &[u8]) -> OptionReply {
        if !data.is_empty() {
            return data_not_allowed();
        }
        if self.dialect == Dialect::Extended {
            let kind = OptionReplyKind::ErrExtendedHeadersRequired;
            return error_reply(kind, "extended headers were agreed on already");
        }
        self.dialect = Dialect::Structured;
        OptionReply::Ack
    }

    fn extended_headers(&mut self, data: &[u8]) -> OptionReply {
        if !data.is_empty() {
            return data_not_allowed();
        }
        self.dialect = Dialect::Extended;
        OptionReply::Ack
    }

    fn info(&mut self, kind: OptionKind, data: &[u8], out: &mut Vec<u8>) -> ServerStep {
        let number = kind.number();
        let request = match InfoRequest::decode(data) {
            Ok(request) => request,
            Err(error) => {
                option_error_reply(error).encode(number, out);
                return ServerStep::NeedInput;
            }
        };
        if !self.is_export(&request.export) {
            unknown_export().encode(number, out);
            return ServerStep::NeedInput;
        }
        match self.admission.take() {
            None if self.admission_required => {
                return ServerStep::AdmissionRequired {
                    enters_transmission: kind == OptionKind::Go,
                };
            }
            Some(Err(reason)) => {
                error_reply(OptionReplyKind::ErrPolicy, &reason).encode(number, out);
                return ServerStep::NeedInput;
            }
            None | Some(Ok(())) => {}
        }
        let agreement = self.agreement(&request.export);
        let is_requested = |info: InfoKind| request.requests.contains(&info.number());
        OptionReply::Export { size: agreement.size, flags: agreement.flags }.encode(number, out);
        if is_requested(InfoKind::Name) {
            OptionReply::Name(self.export.name.clone()).encode(number, out);
        }
        if is_requested(InfoKind::Description) {
            OptionReply::Description(self.export.description.clone()).encode(number, out);
        }
        if is_requested(InfoKind::BlockSize) {
            OptionReply::BlockSize(self.export.block_sizes).encode(number, out);
        }
        OptionReply::Ack.encode(number, out);
        if kind == OptionKind::Go {
            ServerStep::Transmission(agreement)
        } else {
            ServerStep::NeedInput
        }
    }

    fn meta_context(&mut self, kind: OptionKind, data: &[u8], out: &mut Vec<u8>) {
        let number = kind.number();
        self.clear_contexts_on_set(Ok(kind));
        if self.dialect == Dialect::Simple {
            let message = "structured replies must be agreed on first";
            return error_reply(OptionReplyKind::ErrInvalid, message).encode(number, out);
        }
        let request = match MetaContextRequest::decode(data) {
            Ok(request) => request,
            Err(error) => return option_error_reply(error).encode(number, out),
        };
        if !self.is_export(&request.export) {
            return unknown_export().encode(number, out);
        }
        let listing = kind == OptionKind::ListMetaContext;
        if selects_allocation(&request.queries, listing) {
            // The id is reserved in a listing, and should be zero.
            let id = if listing { 0 } else { ALLOCATION_CONTEXT_ID };
            let name = CONTEXT_ALLOCATION.to_owned();
            OptionReply::MetaContext { id, name }.encode(number, out);
            if !listing {
                self.allocation_for = Some(request.export);
            }
        }
        OptionReply::Ack.encode(number, out);
    }

    /// Clears the selected contexts: SET_META_CONTEXT replaces them even if it fails.
    fn clear_contexts_on_set(&mut self, kind: Result<OptionKind, u32>) {
        if kind == Ok(OptionKind::SetMetaContext) {
            self.allocation_for = None;
        }
    }

    fn is_export(&self, name: &str) -> bool {
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
    let is_wildcard = |query: &String| listing && query == CONTEXT_NAMESPACE;
    (listing && queries.is_empty())
        || queries.iter().any(|query| query == CONTEXT_ALLOCATION || is_wildcard(query))
}

fn error_reply(kind: OptionReplyKind, message: &str) -> OptionReply {
    OptionReply::error(kind, message)
}

fn data_not_allowed() -> OptionReply {
    error_reply(OptionReplyKind::ErrInvalid, "this option has no data")
}

fn unknown_export() -> OptionReply {
    error_reply(OptionReplyKind::ErrUnknown, "there is no export of that name")
}

fn option_error_reply(error: OptionError) -> OptionReply {
    match error {
        OptionError::Invalid(reason) => error_reply(OptionReplyKind::ErrInvalid, reason),
        OptionError::TooBig => error_reply(OptionReplyKind::ErrTooBig, "a string is too long"),
    }
}
