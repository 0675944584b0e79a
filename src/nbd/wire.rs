//! Every number of the protocol, once: magics, flags, options, commands, errors.
//! Knows no message layout; the sibling modules do.

use bitflags::bitflags;

/// First eight bytes of every server's greeting, `NBDMAGIC`.
pub const GREETING_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// Second eight bytes of an old-style greeting.
pub const OLDSTYLE_MAGIC: u64 = 0x0000_4202_8186_1253;
/// Second eight bytes of a newstyle greeting, and first eight of every option: `IHAVEOPT`.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// First eight bytes of every reply to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// First four bytes of a compact request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// First four bytes of a request under extended headers.
pub const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
/// First four bytes of a simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// First four bytes of a structured reply chunk.
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
/// First four bytes of an extended reply chunk.
pub const EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

/// Longest string in either direction ("Values", string length limit).
pub const STRING_LENGTH_MAX: usize = 4096;
/// Zero bytes behind an old-style greeting, and behind `NBD_OPT_EXPORT_NAME` without
/// `NO_ZEROES`.
pub const RESERVED_ZEROES: usize = 124;
/// The largest payload a client may send to, or ask of, a server that advertised no block sizes
/// ("Block size constraints").
pub const PAYLOAD_LENGTH_DEFAULT: u32 = 32 << 20;
/// Number of the private option with which a migration's source introduces itself, and of the
/// reply to it; the specification assigns no such number.
pub const PRIVATE_OPTION: u32 = 0x464C_4558;
/// Type of the private request with which a source hands its disk over.
pub const PRIVATE_COMMAND: u16 = 0x464C;
/// Longest payload of a private request, in bytes.
pub const PRIVATE_PAYLOAD_MAX: u64 = 256;
/// The port registered for NBD.
pub const PORT: u16 = 10809;
/// The metadata context for holes and zeros.
pub const CONTEXT_ALLOCATION: &str = "base:allocation";
/// Where [`CONTEXT_ALLOCATION`] lives; asking for it in a listing means all of it.
pub const CONTEXT_NAMESPACE: &str = "base:";

bitflags! {
    /// What the server can do during the handshake ("Handshake flags").
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct HandshakeFlags: u16 {
        /// Options may be answered; without it only `NBD_OPT_EXPORT_NAME` exists.
        const FIXED_NEWSTYLE = 1;
        /// The 124 zero bytes can be left out.
        const NO_ZEROES = 1 << 1;
    }

    /// What the client wants of those ("Client flags").
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct ClientFlags: u32 {
        /// It speaks fixed newstyle.
        const FIXED_NEWSTYLE = 1;
        /// It does not want the 124 zero bytes.
        const NO_ZEROES = 1 << 1;
    }

    /// What an export can do ("Transmission flags").
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct TransmissionFlags: u16 {
        /// The others mean something.
        const HAS_FLAGS = 1;
        /// Writing is refused.
        const READ_ONLY = 1 << 1;
        /// `NBD_CMD_FLUSH` is understood.
        const SEND_FLUSH = 1 << 2;
        /// [`CommandFlags::FUA`] is understood.
        const SEND_FUA = 1 << 3;
        /// Seeking costs.
        const ROTATIONAL = 1 << 4;
        /// `NBD_CMD_TRIM` is understood.
        const SEND_TRIM = 1 << 5;
        /// `NBD_CMD_WRITE_ZEROES` is understood.
        const SEND_WRITE_ZEROES = 1 << 6;
        /// [`CommandFlags::DF`] is understood; only with structured replies.
        const SEND_DF = 1 << 7;
        /// A flush on one session covers writes answered on all.
        const CAN_MULTI_CONN = 1 << 8;
        /// `NBD_CMD_CACHE` is understood.
        const SEND_CACHE = 1 << 10;
        /// [`CommandFlags::FAST_ZERO`] is understood.
        const SEND_FAST_ZERO = 1 << 11;
    }

    /// How a request is to be carried out ("Command flags").
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct CommandFlags: u16 {
        /// Answer only when the data is durable; accepted on every command.
        const FUA = 1;
        /// Zero without giving space back.
        const NO_HOLE = 1 << 1;
        /// Answer a read in one chunk.
        const DF = 1 << 2;
        /// Report one extent only.
        const REQ_ONE = 1 << 3;
        /// Zero only if that is faster than writing zeros.
        const FAST_ZERO = 1 << 4;
        /// The length is that of a payload; only with extended headers.
        const PAYLOAD_LEN = 1 << 5;
    }

    /// What a reply chunk means for its reply ("Structured reply flags").
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct ChunkFlags: u16 {
        /// It is the last one.
        const DONE = 1;
    }

    /// Status of an extent in [`CONTEXT_ALLOCATION`] ("Metadata contexts").
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Allocation: u32 {
        /// Nothing is allocated there.
        const HOLE = 1;
        /// It reads as zeros.
        const ZERO = 1 << 1;
    }
}

/// Declares an enum for numbers on the wire, each named once, and its conversion back.
macro_rules! numbers {
    ($(#[$about:meta])* $name:ident: $int:ty { $($(#[$doc:meta])* $variant:ident = $value:expr,)* }) => {
        $(#[$about])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr($int)]
        pub enum $name { $($(#[$doc])* $variant = $value,)* }

        impl $name {
            /// All of them, in the order of their definition.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// The number on the wire.
            #[must_use]
            pub const fn number(self) -> $int {
                self as $int
            }
        }

        impl TryFrom<$int> for $name {
            /// The number that has no name.
            type Error = $int;

            fn try_from(number: $int) -> Result<Self, $int> {
                Self::ALL.iter().copied().find(|known| known.number() == number).ok_or(number)
            }
        }
    };
}

numbers! {
    /// What a client may ask for during the handshake ("Option types").
    OptionKind: u32 {
        /// Choose an export and go to transmission; no error can be told.
        ExportName = 1,
        /// Give up.
        Abort = 2,
        /// Name the exports.
        List = 3,
        /// Encrypt.
        StartTls = 5,
        /// Describe an export.
        Info = 6,
        /// Describe an export and go to transmission.
        Go = 7,
        /// Use structured replies.
        StructuredReply = 8,
        /// Name the metadata contexts of an export.
        ListMetaContext = 9,
        /// Select metadata contexts.
        SetMetaContext = 10,
        /// Use 64-bit lengths and one reply form.
        ExtendedHeaders = 11,
    }
}

/// Bit that marks a reply to an option as an error.
const ERROR_BIT: u32 = 1 << 31;

numbers! {
    /// How a server answers an option ("Option reply types").
    OptionReplyKind: u32 {
        /// Done.
        Ack = 1,
        /// One export's name.
        Server = 2,
        /// One piece of information about an export.
        Info = 3,
        /// One metadata context.
        MetaContext = 4,
        /// The option is not known.
        ErrUnsupported = ERROR_BIT + 1,
        /// The option is not allowed.
        ErrPolicy = ERROR_BIT + 2,
        /// The option makes no sense.
        ErrInvalid = ERROR_BIT + 3,
        /// The option is not possible on this machine.
        ErrPlatform = ERROR_BIT + 4,
        /// Only after `STARTTLS`.
        ErrTlsRequired = ERROR_BIT + 5,
        /// There is no such export.
        ErrUnknown = ERROR_BIT + 6,
        /// The server is stopping.
        ErrShutdown = ERROR_BIT + 7,
        /// The client must ask for block sizes, and keep to them.
        ErrBlockSizeRequired = ERROR_BIT + 8,
        /// The option or its answer is too large.
        ErrTooBig = ERROR_BIT + 9,
        /// Only after `EXTENDED_HEADERS`.
        ErrExtendedHeadersRequired = ERROR_BIT + 10,
    }
}

impl OptionReplyKind {
    /// Whether this kind, known or not, says that an option failed.
    #[must_use]
    pub const fn is_error(number: u32) -> bool {
        number & ERROR_BIT != 0
    }
}

numbers! {
    /// What can be told about an export (`NBD_REP_INFO`).
    InfoKind: u16 {
        /// Size and transmission flags.
        Export = 0,
        /// Canonical name.
        Name = 1,
        /// Words for people.
        Description = 2,
        /// Smallest, preferred and largest block.
        BlockSize = 3,
    }
}

numbers! {
    /// What a client may ask for during transmission ("Request types").
    CommandKind: u16 {
        /// Bytes from the disk.
        Read = 0,
        /// Bytes to the disk.
        Write = 1,
        /// Goodbye.
        Disconnect = 2,
        /// Make everything answered durable.
        Flush = 3,
        /// These bytes are no longer needed.
        Trim = 4,
        /// These bytes will be wanted soon.
        Cache = 5,
        /// Zeros to the disk.
        WriteZeroes = 6,
        /// Which bytes are holes or zeros?
        BlockStatus = 7,
    }
}

numbers! {
    /// What a reply chunk holds ("Structured reply types").
    ChunkKind: u16 {
        /// Nothing.
        None = 0,
        /// Data at an offset.
        OffsetData = 1,
        /// Zeros at an offset.
        OffsetHole = 2,
        /// Extents with 32-bit lengths.
        BlockStatus = 5,
        /// Extents with 64-bit lengths.
        BlockStatusExtended = 6,
        /// The request failed.
        Error = CHUNK_ERROR_BIT + 1,
        /// The request failed at an offset.
        ErrorOffset = CHUNK_ERROR_BIT + 2,
    }
}

/// Bit that marks a chunk as an error.
pub const CHUNK_ERROR_BIT: u16 = 1 << 15;

numbers! {
    /// The only errors that go over the wire ("Error values").
    ErrorCode: u32 {
        /// Not permitted, as writing to a read-only export.
        NotPermitted = 1,
        /// The disk failed.
        Io = 5,
        /// No memory.
        NoMemory = 12,
        /// The request makes no sense.
        Invalid = 22,
        /// No space, or beyond the end.
        NoSpace = 28,
        /// Too large to be answered in the form asked for.
        Overflow = 75,
        /// Not possible in the way asked for.
        NotSupported = 95,
        /// The server is stopping.
        Shutdown = 108,
    }
}

impl ErrorCode {
    /// The protocol's word for an `errno` of Linux; whatever it has no word for is an I/O error.
    ///
    /// `ESHUTDOWN` is not among them: a disk does not say it, and a client that hears it gives up
    /// instead of reconnecting.
    #[must_use]
    pub const fn from_errno(errno: i32) -> Self {
        const EPERM: i32 = 1;
        const ENOMEM: i32 = 12;
        const EACCES: i32 = 13;
        const EINVAL: i32 = 22;
        const EFBIG: i32 = 27;
        const ENOSPC: i32 = 28;
        const EROFS: i32 = 30;
        const EOVERFLOW: i32 = 75;
        const EOPNOTSUPP: i32 = 95;
        const EDQUOT: i32 = 122;
        match errno {
            EPERM | EACCES | EROFS => Self::NotPermitted,
            ENOMEM => Self::NoMemory,
            EINVAL => Self::Invalid,
            EFBIG | ENOSPC | EDQUOT => Self::NoSpace,
            EOVERFLOW => Self::Overflow,
            EOPNOTSUPP => Self::NotSupported,
            _ => Self::Io,
        }
    }

    /// What a client makes of a number a server sent: unknown ones count as `EINVAL`
    /// ("Error values").
    #[must_use]
    pub fn from_wire(number: u32) -> Self {
        Self::try_from(number).unwrap_or(Self::Invalid)
    }
}

impl std::fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::NotPermitted => "operation not permitted (EPERM)",
            Self::Io => "input/output error (EIO)",
            Self::NoMemory => "out of memory (ENOMEM)",
            Self::Invalid => "invalid request (EINVAL)",
            Self::NoSpace => "no space, or beyond the end of the disk (ENOSPC)",
            Self::Overflow => "too large (EOVERFLOW)",
            Self::NotSupported => "not supported (ENOTSUP)",
            Self::Shutdown => "the server is shutting down (ESHUTDOWN)",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_codes_of_the_specification_leave_the_errno_table() {
        for errno in 0..200 {
            let code = ErrorCode::from_errno(errno);
            assert_eq!(ErrorCode::try_from(code.number()), Ok(code));
            assert_ne!(code, ErrorCode::Shutdown);
        }
        assert_eq!(ErrorCode::from_errno(28), ErrorCode::NoSpace);
        assert_eq!(ErrorCode::from_errno(30), ErrorCode::NotPermitted);
        assert_eq!(ErrorCode::from_errno(110), ErrorCode::Io);
    }

    #[test]
    fn numbers_come_back_as_what_they_were() {
        for &kind in OptionKind::ALL {
            assert_eq!(OptionKind::try_from(kind.number()), Ok(kind));
        }
        for &kind in CommandKind::ALL {
            assert_eq!(CommandKind::try_from(kind.number()), Ok(kind));
        }
        assert_eq!(CommandKind::try_from(8), Err(8));
        assert!(OptionReplyKind::is_error(OptionReplyKind::ErrTooBig.number()));
        assert!(!OptionReplyKind::is_error(OptionReplyKind::MetaContext.number()));
    }
}
