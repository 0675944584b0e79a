//! Requests of the transmission phase: encodes and decodes headers, and checks them.
//! A [`Request`] that exists is valid for its export: known, offered, permitted and in range.

use super::bytes::Reader;
use super::reply::Dialect;
use super::wire::{
    CommandFlags, CommandKind, EXTENDED_REQUEST_MAGIC, ErrorCode, PRIVATE_COMMAND,
    PRIVATE_PAYLOAD_MAX, REQUEST_MAGIC, TransmissionFlags,
};
use super::{Decoded, Malformed};
use crate::range::Range;

/// Length of a request header in bytes, without the payload.
#[must_use]
pub const fn header_length(dialect: Dialect) -> usize {
    match dialect {
        Dialect::Simple | Dialect::Structured => 28,
        Dialect::Extended => 32,
    }
}

/// The header of a request as received, not yet checked ("Request message").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestHeader {
    /// Command flags, known or unknown.
    pub flags: u16,
    /// Number of the command, known or unknown.
    pub kind: u16,
    /// Identifies the request in its replies.
    pub cookie: u64,
    /// Start of the range, in bytes.
    pub offset: u64,
    /// Length of the range or payload in bytes; at most 2^32 - 1 without extended headers.
    pub length: u64,
}

impl RequestHeader {
    /// Appends the header. A length over the limit of a compact header is clamped to it.
    pub fn encode(&self, dialect: Dialect, out: &mut Vec<u8>) {
        let magic = match dialect {
            Dialect::Extended => EXTENDED_REQUEST_MAGIC,
            Dialect::Simple | Dialect::Structured => REQUEST_MAGIC,
        };
        out.extend_from_slice(&magic.to_be_bytes());
        out.extend_from_slice(&self.flags.to_be_bytes());
        out.extend_from_slice(&self.kind.to_be_bytes());
        out.extend_from_slice(&self.cookie.to_be_bytes());
        out.extend_from_slice(&self.offset.to_be_bytes());
        match dialect {
            Dialect::Extended => out.extend_from_slice(&self.length.to_be_bytes()),
            Dialect::Simple | Dialect::Structured => {
                let length = u32::try_from(self.length).unwrap_or(u32::MAX);
                out.extend_from_slice(&length.to_be_bytes());
            }
        }
    }

    /// The header at the front of `bytes`.
    ///
    /// # Errors
    /// If the bytes begin with another magic number.
    pub fn decode(dialect: Dialect, bytes: &[u8]) -> Decoded<Self> {
        let mut reader = Reader::new(bytes);
        let Some(magic) = reader.u32() else { return Ok(None) };
        let extended = match (magic, dialect) {
            (REQUEST_MAGIC, Dialect::Simple | Dialect::Structured) => false,
            (EXTENDED_REQUEST_MAGIC, Dialect::Extended) => true,
            _ => return Err(Malformed::Magic(u64::from(magic))),
        };
        let header = (|| {
            Some(Self {
                flags: reader.u16()?,
                kind: reader.u16()?,
                cookie: reader.u64()?,
                offset: reader.u64()?,
                length: if extended { reader.u64()? } else { u64::from(reader.u32()?) },
            })
        })();
        Ok(header.map(|header| (header, reader.used())))
    }

    /// Length of the payload after the header in bytes, whether or not the request is valid.
    ///
    /// A write always has a payload, and so has the private command if it was negotiated. With
    /// extended headers, every command with the flag `PAYLOAD_LEN` has one, even a command that the
    /// server refuses for the flag. A write must have the flag there as well, but QEMU 10.0 sends
    /// its payload without it.
    #[must_use]
    pub fn payload_length(&self, terms: &Terms) -> u64 {
        let announced = terms.dialect == Dialect::Extended
            && self.flags & CommandFlags::PAYLOAD_LEN.bits() != 0;
        let private = terms.private && self.kind == PRIVATE_COMMAND;
        let has_payload = announced || private || self.kind == CommandKind::Write.number();
        if has_payload { self.length } else { 0 }
    }

    /// Checks the request against the negotiated terms.
    ///
    /// # Errors
    /// The error value of the reply, and the reason for the log ("Error values", "Request types").
    pub fn check(&self, terms: &Terms) -> Result<Request, RequestError> {
        if self.kind == PRIVATE_COMMAND {
            return self.check_private(terms);
        }
        let kind = CommandKind::try_from(self.kind)
            .map_err(|_| RequestError::new(ErrorCode::Invalid, "unknown command"))?;
        if kind == CommandKind::Disconnect {
            return Ok(Request::Disconnect);
        }
        let flags = self.check_flags(kind, terms)?;
        if is_write(kind) && terms.flags.contains(TransmissionFlags::READ_ONLY) {
            return Err(RequestError::new(ErrorCode::NotPermitted, "the export is read-only"));
        }
        if !terms.flags.contains(needed_flags(kind, flags)) {
            let reason = "a command or flag that the export does not offer";
            return Err(RequestError::new(ErrorCode::Invalid, reason));
        }
        if kind == CommandKind::Flush {
            return Ok(Request::Flush);
        }
        if matches!(kind, CommandKind::Read | CommandKind::Write)
            && self.length > u64::from(terms.payload_length_max)
        {
            return Err(RequestError::new(ErrorCode::Invalid, "longer than the largest payload"));
        }
        let range = Range::within(terms.size, self.offset, self.length).ok_or_else(|| {
            RequestError::new(out_of_range_error(kind, terms), "beyond the end of the disk")
        })?;
        if kind == CommandKind::BlockStatus && !terms.allocation_selected {
            return Err(RequestError::new(ErrorCode::Invalid, "no metadata context was selected"));
        }
        Ok(to_request(kind, flags, range))
    }

    /// Checks a private command: its length is that of the payload, its offset zero, and it has no
    /// flag but `PAYLOAD_LEN`.
    fn check_private(&self, terms: &Terms) -> Result<Request, RequestError> {
        let payload = self.payload_length(terms);
        let flags = self.flags & !CommandFlags::PAYLOAD_LEN.bits();
        let length_is_valid = payload == self.length && payload <= PRIVATE_PAYLOAD_MAX;
        if terms.private && length_is_valid && self.offset == 0 && flags == 0 {
            Ok(Request::Private { length: payload })
        } else {
            Err(RequestError::new(ErrorCode::Invalid, "unknown command"))
        }
    }

    fn check_flags(&self, kind: CommandKind, terms: &Terms) -> Result<CommandFlags, RequestError> {
        CommandFlags::from_bits(self.flags)
            .filter(|flags| allowed_flags(kind, terms.dialect).contains(*flags))
            .ok_or_else(|| {
                RequestError::new(ErrorCode::Invalid, "a flag that does not belong to the command")
            })
    }
}

/// The negotiated parameters against which requests are checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Terms {
    /// Size of the export in bytes.
    pub size: u64,
    /// The transmission flags of the export: whether changes fail, and which commands and flags are
    /// offered.
    pub flags: TransmissionFlags,
    /// The form of headers and replies.
    pub dialect: Dialect,
    /// Whether the client selected `base:allocation`.
    pub allocation_selected: bool,
    /// Maximum payload of a read or write, in bytes.
    pub payload_length_max: u32,
    /// Whether the private command is valid: the private option was negotiated.
    pub private: bool,
    /// Whether a read beyond the end fails with `ENOSPC`, as in oldstyle sessions of the original
    /// server.
    pub reads_beyond_end_are_no_space: bool,
}

/// A valid request. Keeps FUA only for commands that write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// `NBD_CMD_READ`.
    Read {
        /// The bytes to read.
        range: Range,
        /// `NBD_CMD_FLAG_DF`: reply with one content chunk.
        dont_fragment: bool,
    },
    /// `NBD_CMD_WRITE`; the payload follows.
    Write {
        /// The bytes to overwrite.
        range: Range,
        /// `NBD_CMD_FLAG_FUA`: reply only when the data is durable.
        durable: bool,
    },
    /// `NBD_CMD_FLUSH`.
    Flush,
    /// `NBD_CMD_TRIM`.
    Trim {
        /// The bytes to discard.
        range: Range,
        /// `NBD_CMD_FLAG_FUA`: reply only when the change is durable.
        durable: bool,
    },
    /// `NBD_CMD_CACHE`.
    Cache {
        /// The bytes to load.
        range: Range,
    },
    /// `NBD_CMD_WRITE_ZEROES`.
    WriteZeroes {
        /// The bytes to zero.
        range: Range,
        /// `NBD_CMD_FLAG_NO_HOLE`: do not deallocate.
        no_hole: bool,
        /// `NBD_CMD_FLAG_FAST_ZERO`: fail unless it is faster than a write.
        fast: bool,
        /// `NBD_CMD_FLAG_FUA`: reply only when the zeroes are durable.
        durable: bool,
    },
    /// `NBD_CMD_BLOCK_STATUS`.
    BlockStatus {
        /// The bytes to describe.
        range: Range,
        /// `NBD_CMD_FLAG_REQ_ONE`: reply with one extent.
        one: bool,
    },
    /// The private command of a migration; the payload follows.
    Private {
        /// Length of the payload in bytes.
        length: u64,
    },
    /// `NBD_CMD_DISC`.
    Disconnect,
}

impl Request {
    /// Whether the request modifies the disk.
    #[must_use]
    pub const fn writes(&self) -> bool {
        matches!(self, Self::Write { .. } | Self::Trim { .. } | Self::WriteZeroes { .. })
    }

    /// Whether `ENOTSUP` is no failure: the client tries something else then
    /// (`NBD_CMD_FLAG_FAST_ZERO`).
    #[must_use]
    pub const fn may_be_unsupported(&self) -> bool {
        matches!(self, Self::WriteZeroes { fast: true, .. })
    }
}

/// The reason why a request fails before its execution.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestError {
    /// The error value of the reply.
    pub code: ErrorCode,
    /// The reason, for the reply and the log.
    pub reason: &'static str,
}

impl RequestError {
    const fn new(code: ErrorCode, reason: &'static str) -> Self {
        Self { code, reason }
    }
}

const fn is_write(kind: CommandKind) -> bool {
    matches!(kind, CommandKind::Write | CommandKind::Trim | CommandKind::WriteZeroes)
}

fn allowed_flags(kind: CommandKind, dialect: Dialect) -> CommandFlags {
    let specific = match kind {
        CommandKind::Read if dialect != Dialect::Simple => CommandFlags::DF,
        CommandKind::Write if dialect == Dialect::Extended => CommandFlags::PAYLOAD_LEN,
        CommandKind::WriteZeroes => CommandFlags::NO_HOLE | CommandFlags::FAST_ZERO,
        CommandKind::BlockStatus => CommandFlags::REQ_ONE,
        _ => CommandFlags::empty(),
    };
    specific | CommandFlags::FUA
}

/// The transmission flags that an export has to have for this request ("Request types", "Command flags").
fn needed_flags(kind: CommandKind, flags: CommandFlags) -> TransmissionFlags {
    let mut needed = match kind {
        CommandKind::Flush => TransmissionFlags::SEND_FLUSH,
        CommandKind::Trim => TransmissionFlags::SEND_TRIM,
        CommandKind::Cache => TransmissionFlags::SEND_CACHE,
        CommandKind::WriteZeroes => TransmissionFlags::SEND_WRITE_ZEROES,
        // DF and block status are negotiated with the dialect and the metadata context.
        _ => TransmissionFlags::empty(),
    };
    needed.set(TransmissionFlags::SEND_FUA, flags.contains(CommandFlags::FUA));
    needed.set(TransmissionFlags::SEND_FAST_ZERO, flags.contains(CommandFlags::FAST_ZERO));
    needed
}

fn out_of_range_error(kind: CommandKind, terms: &Terms) -> ErrorCode {
    match kind {
        CommandKind::Write | CommandKind::WriteZeroes => ErrorCode::NoSpace,
        CommandKind::Read if terms.reads_beyond_end_are_no_space => ErrorCode::NoSpace,
        _ => ErrorCode::Invalid,
    }
}

fn to_request(kind: CommandKind, flags: CommandFlags, range: Range) -> Request {
    let durable = flags.contains(CommandFlags::FUA);
    match kind {
        CommandKind::Read => {
            Request::Read { range, dont_fragment: flags.contains(CommandFlags::DF) }
        }
        CommandKind::Write => Request::Write { range, durable },
        CommandKind::Disconnect => Request::Disconnect,
        CommandKind::Flush => Request::Flush,
        CommandKind::Trim => Request::Trim { range, durable },
        CommandKind::Cache => Request::Cache { range },
        CommandKind::WriteZeroes => Request::WriteZeroes {
            range,
            no_hole: flags.contains(CommandFlags::NO_HOLE),
            fast: flags.contains(CommandFlags::FAST_ZERO),
            durable,
        },
        CommandKind::BlockStatus => {
            Request::BlockStatus { range, one: flags.contains(CommandFlags::REQ_ONE) }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SIZE: u64 = 1 << 20;

    fn terms(dialect: Dialect) -> Terms {
        Terms {
            size: SIZE,
            flags: TransmissionFlags::all().difference(TransmissionFlags::READ_ONLY),
            dialect,
            allocation_selected: true,
            payload_length_max: 1 << 16,
            private: false,
            reads_beyond_end_are_no_space: false,
        }
    }

    fn header(kind: CommandKind, flags: CommandFlags, offset: u64, length: u64) -> RequestHeader {
        RequestHeader { flags: flags.bits(), kind: kind.number(), cookie: 7, offset, length }
    }

    fn error_of(header: RequestHeader, terms: &Terms) -> Option<ErrorCode> {
        header.check(terms).err().map(|error| error.code)
    }

    #[test]
    fn writes_beyond_the_end_fail_with_enospc_others_einval() {
        let terms = terms(Dialect::Simple);
        let error_at_end =
            |kind| error_of(header(kind, CommandFlags::empty(), SIZE - 1, 2), &terms);
        assert_eq!(error_at_end(CommandKind::Read), Some(ErrorCode::Invalid));
        assert_eq!(error_at_end(CommandKind::Trim), Some(ErrorCode::Invalid));
        assert_eq!(error_at_end(CommandKind::Cache), Some(ErrorCode::Invalid));
        assert_eq!(error_at_end(CommandKind::BlockStatus), Some(ErrorCode::Invalid));
        assert_eq!(error_at_end(CommandKind::Write), Some(ErrorCode::NoSpace));
        assert_eq!(error_at_end(CommandKind::WriteZeroes), Some(ErrorCode::NoSpace));
        let oldstyle = Terms { reads_beyond_end_are_no_space: true, ..terms };
        let read = header(CommandKind::Read, CommandFlags::empty(), SIZE, 1);
        assert_eq!(error_of(read, &oldstyle), Some(ErrorCode::NoSpace));
    }

    #[test]
    fn maximum_payload_applies_to_reads_and_writes_only() {
        let terms = terms(Dialect::Structured);
        let max = u64::from(terms.payload_length_max);
        for &kind in CommandKind::ALL {
            let at_limit = error_of(header(kind, CommandFlags::empty(), 0, max), &terms);
            let over_limit = error_of(header(kind, CommandFlags::empty(), 0, max + 1), &terms);
            assert_eq!(at_limit, None, "{kind:?}");
            let limited = matches!(kind, CommandKind::Read | CommandKind::Write);
            assert_eq!(over_limit, limited.then_some(ErrorCode::Invalid), "{kind:?}");
        }
    }

    #[test]
    fn commands_accept_fua_and_only_their_own_flags() {
        for dialect in [Dialect::Simple, Dialect::Structured] {
            let terms = terms(dialect);
            for &kind in CommandKind::ALL {
                assert_eq!(
                    error_of(header(kind, CommandFlags::FUA, 0, 1), &terms),
                    None,
                    "{kind:?}"
                );
            }
            let df = error_of(header(CommandKind::Read, CommandFlags::DF, 0, 1), &terms);
            assert_eq!(df.is_none(), dialect == Dialect::Structured);
            let payload = header(CommandKind::Write, CommandFlags::PAYLOAD_LEN, 0, 1);
            assert_eq!(error_of(payload, &terms), Some(ErrorCode::Invalid));
        }
        let unknown = RequestHeader {
            flags: 1 << 9,
            ..header(CommandKind::Flush, CommandFlags::empty(), 0, 0)
        };
        assert_eq!(error_of(unknown, &terms(Dialect::Simple)), Some(ErrorCode::Invalid));
    }

    #[test]
    fn a_read_only_export_refuses_writes() {
        let terms = terms(Dialect::Simple);
        let flags = terms.flags.difference(TransmissionFlags::WRITABLE_ONLY);
        let terms = Terms { flags: flags | TransmissionFlags::READ_ONLY, ..terms };
        for &kind in CommandKind::ALL {
            let error = error_of(header(kind, CommandFlags::empty(), 0, 512), &terms);
            assert_eq!(error, is_write(kind).then_some(ErrorCode::NotPermitted), "{kind:?}");
        }
    }

    #[test]
    fn commands_and_flags_that_are_not_offered_are_invalid() {
        let without = |flag| {
            let terms = terms(Dialect::Structured);
            Terms { flags: terms.flags.difference(flag), ..terms }
        };
        let none = CommandFlags::empty();
        let offers = [
            (TransmissionFlags::SEND_FLUSH, CommandKind::Flush, none),
            (TransmissionFlags::SEND_TRIM, CommandKind::Trim, none),
            (TransmissionFlags::SEND_WRITE_ZEROES, CommandKind::WriteZeroes, none),
            (TransmissionFlags::SEND_CACHE, CommandKind::Cache, none),
            (TransmissionFlags::SEND_FUA, CommandKind::Write, CommandFlags::FUA),
            (TransmissionFlags::SEND_FUA, CommandKind::Read, CommandFlags::FUA),
            (TransmissionFlags::SEND_FAST_ZERO, CommandKind::WriteZeroes, CommandFlags::FAST_ZERO),
        ];
        for (offer, kind, flags) in offers {
            let request = header(kind, flags, 0, 512);
            assert_eq!(error_of(request, &without(offer)), Some(ErrorCode::Invalid), "{offer:?}");
            let others = without(TransmissionFlags::all().difference(offer));
            let needs_both = flags == CommandFlags::FAST_ZERO;
            assert_eq!(error_of(request, &others).is_some(), needs_both, "{offer:?}");
        }
        let nothing = without(TransmissionFlags::all());
        for &kind in CommandKind::ALL {
            let is_offered = matches!(
                kind,
                CommandKind::Read
                    | CommandKind::Write
                    | CommandKind::BlockStatus
                    | CommandKind::Disconnect
            );
            let error = error_of(header(kind, none, 0, 512), &nothing);
            assert_eq!(error, (!is_offered).then_some(ErrorCode::Invalid), "{kind:?}");
        }
    }

    #[test]
    fn an_extended_write_has_a_payload_without_payload_len() {
        for flags in [CommandFlags::PAYLOAD_LEN, CommandFlags::empty()] {
            let write = header(CommandKind::Write, flags, 0, 512);
            assert_eq!(write.payload_length(&terms(Dialect::Extended)), 512);
            assert_eq!(error_of(write, &terms(Dialect::Extended)), None);
        }
        let trim = header(CommandKind::Trim, CommandFlags::PAYLOAD_LEN, 0, 512);
        assert_eq!(trim.payload_length(&terms(Dialect::Extended)), 512);
        assert_eq!(error_of(trim, &terms(Dialect::Extended)), Some(ErrorCode::Invalid));
        let without_flag = header(CommandKind::Trim, CommandFlags::empty(), 0, 512);
        assert_eq!(without_flag.payload_length(&terms(Dialect::Extended)), 0);
    }

    #[test]
    fn block_status_needs_a_selected_context() {
        let terms = Terms { allocation_selected: false, ..terms(Dialect::Structured) };
        let status = header(CommandKind::BlockStatus, CommandFlags::empty(), 0, 512);
        assert_eq!(error_of(status, &terms), Some(ErrorCode::Invalid));
    }

    #[test]
    fn unknown_commands_are_refused_disconnects_never() {
        let unknown =
            RequestHeader { kind: 99, ..header(CommandKind::Read, CommandFlags::empty(), 0, 0) };
        assert_eq!(error_of(unknown, &terms(Dialect::Simple)), Some(ErrorCode::Invalid));
        let unusual =
            RequestHeader { kind: CommandKind::Disconnect.number(), flags: 0xffff, ..unknown };
        assert_eq!(unusual.check(&terms(Dialect::Simple)), Ok(Request::Disconnect));
    }

    #[test]
    fn the_private_command_is_valid_if_negotiated_and_short() {
        let private = |length| RequestHeader {
            flags: 0,
            kind: PRIVATE_COMMAND,
            cookie: 1,
            offset: 0,
            length,
        };
        let negotiated = Terms { private: true, ..terms(Dialect::Simple) };
        assert_eq!(error_of(private(36), &terms(Dialect::Simple)), Some(ErrorCode::Invalid));
        assert_eq!(private(36).check(&negotiated), Ok(Request::Private { length: 36 }));
        assert_eq!(error_of(private(PRIVATE_PAYLOAD_MAX), &negotiated), None);
        assert_eq!(
            error_of(private(PRIVATE_PAYLOAD_MAX + 1), &negotiated),
            Some(ErrorCode::Invalid)
        );
        assert_eq!(private(36).payload_length(&negotiated), 36);
        assert_eq!(private(36).payload_length(&terms(Dialect::Simple)), 0);
    }

    fn dialects() -> impl Strategy<Value = Dialect> {
        prop_oneof![Just(Dialect::Simple), Just(Dialect::Structured), Just(Dialect::Extended)]
    }

    proptest! {
        #[test]
        fn headers_round_trip_and_prefixes_are_incomplete(
            dialect in dialects(), flags: u16, kind: u16, cookie: u64, offset: u64, length: u64,
        ) {
            let length = if dialect == Dialect::Extended { length } else { length >> 32 };
            let header = RequestHeader { flags, kind, cookie, offset, length };
            let mut bytes = Vec::new();
            header.encode(dialect, &mut bytes);
            prop_assert_eq!(bytes.len(), header_length(dialect));
            for end in 0..bytes.len() {
                prop_assert_eq!(RequestHeader::decode(dialect, &bytes[..end]), Ok(None));
            }
            let decoded = RequestHeader::decode(dialect, &bytes);
            prop_assert_eq!(decoded, Ok(Some((header, bytes.len()))));
        }

        #[test]
        fn checked_requests_are_in_range(
            dialect in dialects(), flags: u16, kind in 0u16..9, offset: u64, length: u64,
        ) {
            let header = RequestHeader { flags, kind, cookie: 0, offset, length };
            if let Ok(
                Request::Read { range, .. }
                | Request::Write { range, .. }
                | Request::Trim { range, .. }
                | Request::Cache { range }
                | Request::WriteZeroes { range, .. }
                | Request::BlockStatus { range, .. },
            ) = header.check(&terms(dialect))
            {
                prop_assert!(range.end() <= SIZE);
                prop_assert_eq!((range.offset(), range.length()), (offset, length));
            }
        }
    }
}
