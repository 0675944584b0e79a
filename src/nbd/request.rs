//! What a client asks during transmission: request headers ⇄ bytes, and headers → [`Request`]s.
//! A [`Request`] that exists is one that this export can carry out: known, allowed and in range.

use super::bytes::Reader;
use super::reply::Dialect;
use super::wire::{
    CommandFlags, CommandKind, EXTENDED_REQUEST_MAGIC, ErrorCode, PRIVATE_COMMAND,
    PRIVATE_PAYLOAD_MAX, REQUEST_MAGIC,
};
use super::{Decoded, Malformed};
use crate::range::Range;

/// Length of a request header in bytes, without its payload.
#[must_use]
pub const fn header_length(dialect: Dialect) -> usize {
    match dialect {
        Dialect::Simple | Dialect::Structured => 28,
        Dialect::Extended => 32,
    }
}

/// A request as it stands on the wire, not yet checked ("Request message").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Flags, also unknown ones.
    pub flags: u16,
    /// Number of the command, also an unknown one.
    pub kind: u16,
    /// The client's name for this request; comes back in the reply.
    pub cookie: u64,
    /// First byte asked for.
    pub offset: u64,
    /// How many bytes; at most 2^32 - 1 without extended headers.
    pub length: u64,
}

impl Header {
    /// Appends the header. A length that a compact header cannot hold is cut to what it can.
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
    /// When the bytes begin with another magic number.
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

    /// How many bytes of payload follow the header, whether or not the request is a valid one.
    ///
    /// A write always has one, and so has the private command where it is understood. With extended
    /// headers, any command has one under the flag `PAYLOAD_LEN`, also one that is refused for it.
    /// A write should bear the flag there, too, but QEMU (seen in 10.0) sends it without, and with
    /// its payload.
    #[must_use]
    pub fn payload_length(&self, terms: &Terms) -> u64 {
        let announced = terms.dialect == Dialect::Extended
            && self.flags & CommandFlags::PAYLOAD_LEN.bits() != 0;
        let private = terms.private && self.kind == PRIVATE_COMMAND;
        let has_payload = announced || private || self.kind == CommandKind::Write.number();
        if has_payload { self.length } else { 0 }
    }

    /// What the client wants, or why it cannot have it.
    ///
    /// # Errors
    /// The code to answer with, and the reason for the log ("Error values", "Request types").
    pub fn check(&self, terms: &Terms) -> Result<Request, RequestError> {
        if self.kind == PRIVATE_COMMAND {
            return self.checked_private(terms);
        }
        let kind = CommandKind::try_from(self.kind)
            .map_err(|_| RequestError::new(ErrorCode::Invalid, "unknown command"))?;
        if kind == CommandKind::Disconnect {
            return Ok(Request::Disconnect);
        }
        let flags = self.checked_flags(kind, terms)?;
        if writes(kind) && terms.read_only {
            return Err(RequestError::new(ErrorCode::NotPermitted, "the export is read-only"));
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
            RequestError::new(beyond_the_end(kind, terms), "beyond the end of the disk")
        })?;
        if kind == CommandKind::BlockStatus && !terms.allocation_selected {
            return Err(RequestError::new(ErrorCode::Invalid, "no metadata context was selected"));
        }
        Ok(request(kind, flags, range))
    }

    /// The length is that of the payload, the offset zero, and there are no flags but the one
    /// that says so.
    fn checked_private(&self, terms: &Terms) -> Result<Request, RequestError> {
        let payload = self.payload_length(terms);
        let flags = self.flags & !CommandFlags::PAYLOAD_LEN.bits();
        let fits = payload == self.length && payload <= PRIVATE_PAYLOAD_MAX;
        if terms.private && fits && self.offset == 0 && flags == 0 {
            Ok(Request::Private { length: payload })
        } else {
            Err(RequestError::new(ErrorCode::Invalid, "unknown command"))
        }
    }

    fn checked_flags(
        &self,
        kind: CommandKind,
        terms: &Terms,
    ) -> Result<CommandFlags, RequestError> {
        CommandFlags::from_bits(self.flags)
            .filter(|flags| allowed_flags(kind, terms.dialect).contains(*flags))
            .ok_or_else(|| {
                RequestError::new(ErrorCode::Invalid, "a flag that does not belong to the command")
            })
    }
}

/// What was agreed on in the handshake, against which requests are checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Terms {
    /// Size of the export in bytes.
    pub size: u64,
    /// Whether writing is refused.
    pub read_only: bool,
    /// How replies look.
    pub dialect: Dialect,
    /// Whether `base:allocation` was selected.
    pub allocation_selected: bool,
    /// Largest payload of a read or write, in bytes.
    pub payload_length_max: u32,
    /// Whether the private command is understood: the client has introduced itself.
    pub private: bool,
    /// Answer a read beyond the end with `ENOSPC`, as the original server did in old style.
    pub reads_beyond_end_are_no_space: bool,
}

/// A request that can be carried out. FUA is kept only where it means something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// `NBD_CMD_READ`; in one chunk if `whole`.
    Read {
        /// Where.
        range: Range,
        /// `NBD_CMD_FLAG_DF` was set.
        whole: bool,
    },
    /// `NBD_CMD_WRITE`; the payload follows.
    Write {
        /// Where.
        range: Range,
        /// Answer when it is on stable storage.
        durable: bool,
    },
    /// `NBD_CMD_FLUSH`.
    Flush,
    /// `NBD_CMD_TRIM`.
    Trim {
        /// Where.
        range: Range,
        /// Answer when it is on stable storage.
        durable: bool,
    },
    /// `NBD_CMD_CACHE`.
    Cache {
        /// Where.
        range: Range,
    },
    /// `NBD_CMD_WRITE_ZEROES`.
    WriteZeroes {
        /// Where.
        range: Range,
        /// `NBD_CMD_FLAG_NO_HOLE` was set.
        no_hole: bool,
        /// `NBD_CMD_FLAG_FAST_ZERO` was set.
        fast: bool,
        /// Answer when it is on stable storage.
        durable: bool,
    },
    /// `NBD_CMD_BLOCK_STATUS`.
    BlockStatus {
        /// Where.
        range: Range,
        /// `NBD_CMD_FLAG_REQ_ONE` was set.
        one: bool,
    },
    /// The private command of a migration; the payload follows.
    Private {
        /// Of the payload in bytes.
        length: u64,
    },
    /// `NBD_CMD_DISC`.
    Disconnect,
}

impl Request {
    /// Whether it changes the disk.
    #[must_use]
    pub const fn writes(&self) -> bool {
        matches!(self, Self::Write { .. } | Self::Trim { .. } | Self::WriteZeroes { .. })
    }
}

/// Why a request is answered with an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestError {
    /// What goes on the wire.
    pub code: ErrorCode,
    /// What goes into the log.
    pub why: &'static str,
}

impl RequestError {
    const fn new(code: ErrorCode, why: &'static str) -> Self {
        Self { code, why }
    }
}

const fn writes(kind: CommandKind) -> bool {
    matches!(kind, CommandKind::Write | CommandKind::Trim | CommandKind::WriteZeroes)
}

fn allowed_flags(kind: CommandKind, dialect: Dialect) -> CommandFlags {
    let own = match kind {
        CommandKind::Read if dialect != Dialect::Simple => CommandFlags::DF,
        CommandKind::Write if dialect == Dialect::Extended => CommandFlags::PAYLOAD_LEN,
        CommandKind::WriteZeroes => CommandFlags::NO_HOLE | CommandFlags::FAST_ZERO,
        CommandKind::BlockStatus => CommandFlags::REQ_ONE,
        _ => CommandFlags::empty(),
    };
    own | CommandFlags::FUA
}

fn beyond_the_end(kind: CommandKind, terms: &Terms) -> ErrorCode {
    match kind {
        CommandKind::Write | CommandKind::WriteZeroes => ErrorCode::NoSpace,
        CommandKind::Read if terms.reads_beyond_end_are_no_space => ErrorCode::NoSpace,
        _ => ErrorCode::Invalid,
    }
}

fn request(kind: CommandKind, flags: CommandFlags, range: Range) -> Request {
    let durable = flags.contains(CommandFlags::FUA);
    match kind {
        CommandKind::Read => Request::Read { range, whole: flags.contains(CommandFlags::DF) },
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
            read_only: false,
            dialect,
            allocation_selected: true,
            payload_length_max: 1 << 16,
            private: false,
            reads_beyond_end_are_no_space: false,
        }
    }

    fn header(kind: CommandKind, flags: CommandFlags, offset: u64, length: u64) -> Header {
        Header { flags: flags.bits(), kind: kind.number(), cookie: 7, offset, length }
    }

    fn code(header: Header, terms: &Terms) -> Option<ErrorCode> {
        header.check(terms).err().map(|refusal| refusal.code)
    }

    #[test]
    fn beyond_the_end_is_invalid_to_read_and_no_space_to_write() {
        let terms = terms(Dialect::Simple);
        let beyond = |kind| code(header(kind, CommandFlags::empty(), SIZE - 1, 2), &terms);
        assert_eq!(beyond(CommandKind::Read), Some(ErrorCode::Invalid));
        assert_eq!(beyond(CommandKind::Trim), Some(ErrorCode::Invalid));
        assert_eq!(beyond(CommandKind::Cache), Some(ErrorCode::Invalid));
        assert_eq!(beyond(CommandKind::BlockStatus), Some(ErrorCode::Invalid));
        assert_eq!(beyond(CommandKind::Write), Some(ErrorCode::NoSpace));
        assert_eq!(beyond(CommandKind::WriteZeroes), Some(ErrorCode::NoSpace));
        let habit = Terms { reads_beyond_end_are_no_space: true, ..terms };
        let read = header(CommandKind::Read, CommandFlags::empty(), SIZE, 1);
        assert_eq!(code(read, &habit), Some(ErrorCode::NoSpace));
    }

    #[test]
    fn only_reads_and_writes_know_a_largest_payload() {
        let terms = terms(Dialect::Structured);
        let max = u64::from(terms.payload_length_max);
        for &kind in CommandKind::ALL {
            let at_limit = code(header(kind, CommandFlags::empty(), 0, max), &terms);
            let over = code(header(kind, CommandFlags::empty(), 0, max + 1), &terms);
            assert_eq!(at_limit, None, "{kind:?}");
            let limited = matches!(kind, CommandKind::Read | CommandKind::Write);
            assert_eq!(over, limited.then_some(ErrorCode::Invalid), "{kind:?}");
        }
    }

    #[test]
    fn fua_is_accepted_on_every_command_and_other_flags_only_where_they_belong() {
        for dialect in [Dialect::Simple, Dialect::Structured] {
            let terms = terms(dialect);
            for &kind in CommandKind::ALL {
                assert_eq!(code(header(kind, CommandFlags::FUA, 0, 1), &terms), None, "{kind:?}");
            }
            let df = code(header(CommandKind::Read, CommandFlags::DF, 0, 1), &terms);
            assert_eq!(df.is_none(), dialect == Dialect::Structured);
            let payload = header(CommandKind::Write, CommandFlags::PAYLOAD_LEN, 0, 1);
            assert_eq!(code(payload, &terms), Some(ErrorCode::Invalid));
        }
        let unknown =
            Header { flags: 1 << 9, ..header(CommandKind::Flush, CommandFlags::empty(), 0, 0) };
        assert_eq!(code(unknown, &terms(Dialect::Simple)), Some(ErrorCode::Invalid));
    }

    #[test]
    fn a_read_only_export_permits_no_change() {
        let terms = Terms { read_only: true, ..terms(Dialect::Simple) };
        for &kind in CommandKind::ALL {
            let refused = code(header(kind, CommandFlags::empty(), 0, 512), &terms);
            assert_eq!(refused, writes(kind).then_some(ErrorCode::NotPermitted), "{kind:?}");
        }
    }

    #[test]
    fn an_extended_write_has_a_payload_with_and_without_the_flag_for_it() {
        for flags in [CommandFlags::PAYLOAD_LEN, CommandFlags::empty()] {
            let write = header(CommandKind::Write, flags, 0, 512);
            assert_eq!(write.payload_length(&terms(Dialect::Extended)), 512);
            assert_eq!(code(write, &terms(Dialect::Extended)), None);
        }
        let trim = header(CommandKind::Trim, CommandFlags::PAYLOAD_LEN, 0, 512);
        assert_eq!(trim.payload_length(&terms(Dialect::Extended)), 512);
        assert_eq!(code(trim, &terms(Dialect::Extended)), Some(ErrorCode::Invalid));
        let bare = header(CommandKind::Trim, CommandFlags::empty(), 0, 512);
        assert_eq!(bare.payload_length(&terms(Dialect::Extended)), 0);
    }

    #[test]
    fn block_status_needs_a_context() {
        let terms = Terms { allocation_selected: false, ..terms(Dialect::Structured) };
        let status = header(CommandKind::BlockStatus, CommandFlags::empty(), 0, 512);
        assert_eq!(code(status, &terms), Some(ErrorCode::Invalid));
    }

    #[test]
    fn an_unknown_command_is_refused_and_a_disconnect_never() {
        let unknown = Header { kind: 99, ..header(CommandKind::Read, CommandFlags::empty(), 0, 0) };
        assert_eq!(code(unknown, &terms(Dialect::Simple)), Some(ErrorCode::Invalid));
        let odd = Header { kind: CommandKind::Disconnect.number(), flags: 0xffff, ..unknown };
        assert_eq!(odd.check(&terms(Dialect::Simple)), Ok(Request::Disconnect));
    }

    #[test]
    fn the_private_command_exists_only_where_it_is_understood_and_is_short() {
        let ask = |length| Header { flags: 0, kind: PRIVATE_COMMAND, cookie: 1, offset: 0, length };
        let knows = Terms { private: true, ..terms(Dialect::Simple) };
        assert_eq!(code(ask(36), &terms(Dialect::Simple)), Some(ErrorCode::Invalid));
        assert_eq!(ask(36).check(&knows), Ok(Request::Private { length: 36 }));
        assert_eq!(code(ask(PRIVATE_PAYLOAD_MAX), &knows), None);
        assert_eq!(code(ask(PRIVATE_PAYLOAD_MAX + 1), &knows), Some(ErrorCode::Invalid));
        assert_eq!(ask(36).payload_length(&knows), 36);
        assert_eq!(ask(36).payload_length(&terms(Dialect::Simple)), 0);
    }

    fn dialects() -> impl Strategy<Value = Dialect> {
        prop_oneof![Just(Dialect::Simple), Just(Dialect::Structured), Just(Dialect::Extended)]
    }

    proptest! {
        #[test]
        fn headers_round_trip_and_every_prefix_is_incomplete(
            dialect in dialects(), flags: u16, kind: u16, cookie: u64, offset: u64, length: u64,
        ) {
            let length = if dialect == Dialect::Extended { length } else { length >> 32 };
            let header = Header { flags, kind, cookie, offset, length };
            let mut bytes = Vec::new();
            header.encode(dialect, &mut bytes);
            prop_assert_eq!(bytes.len(), header_length(dialect));
            for end in 0..bytes.len() {
                prop_assert_eq!(Header::decode(dialect, &bytes[..end]), Ok(None));
            }
            prop_assert_eq!(Header::decode(dialect, &bytes), Ok(Some((header, bytes.len()))));
        }

        #[test]
        fn a_request_that_exists_is_in_range(
            dialect in dialects(), flags: u16, kind in 0u16..9, offset: u64, length: u64,
        ) {
            let header = Header { flags, kind, cookie: 0, offset, length };
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
