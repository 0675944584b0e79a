//! The numbers of the protocol, each defined once: magic numbers, flags, options, commands, errors.
//! The sibling modules define the layout of the messages.

use bitflags::bitflags;
use thiserror::Error;

/// First eight bytes of every greeting: `NBDMAGIC`.
pub const GREETING_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// Second eight bytes of an oldstyle greeting.
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

/// Longest string in bytes ("Conventions").
pub const STRING_LENGTH_MAX: usize = 4096;
/// Number of zero bytes after an oldstyle greeting, and after the reply to `NBD_OPT_EXPORT_NAME`
/// without `NO_ZEROES`.
pub const RESERVED_ZEROES: usize = 124;
/// Maximum payload of a READ or WRITE to a server that advertises no block sizes, in bytes ("Block
/// size constraints").
pub const PAYLOAD_LENGTH_DEFAULT: u32 = 32 << 20;
/// Number of the private option by which the source of a migration identifies itself, and type of
/// the reply to it. The specification does not assign this number.
pub const PRIVATE_OPTION: u32 = 0x464C_4558;
/// Type of the private request HANDOVER of a migration.
pub const PRIVATE_COMMAND: u16 = 0x464C;
/// Longest payload of a private request, in bytes.
pub const PRIVATE_PAYLOAD_MAX: u64 = 256;
/// The port that IANA assigned to NBD.
pub const PORT: u16 = 10809;
/// The metadata context that reports holes and zeros.
pub const CONTEXT_ALLOCATION: &str = "base:allocation";
/// The namespace of [`CONTEXT_ALLOCATION`]: a wildcard in `NBD_OPT_LIST_META_CONTEXT`.
pub const CONTEXT_NAMESPACE: &str = "base:";

bitflags! {
    /// Capabilities of the server during the handshake ("Handshake flags").
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct HandshakeFlags: u16 {
        /// The server replies to options; otherwise `NBD_OPT_EXPORT_NAME` is the only option.
        const FIXED_NEWSTYLE = 1;
        /// The server can omit the 124 zero bytes.
        const NO_ZEROES = 1 << 1;
    }

    /// The handshake flags that the client accepts ("Client flags").
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct ClientFlags: u32 {
        /// The client supports fixed newstyle.
        const FIXED_NEWSTYLE = 1;
        /// The server must omit the 124 zero bytes.
        const NO_ZEROES = 1 << 1;
    }

    /// Capabilities of an export ("Transmission flags").
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct TransmissionFlags: u16 {
        /// The other flags are valid; always set.
        const HAS_FLAGS = 1;
        /// Write commands fail.
        const READ_ONLY = 1 << 1;
        /// Supports `NBD_CMD_FLUSH`.
        const SEND_FLUSH = 1 << 2;
        /// Supports [`CommandFlags::FUA`].
        const SEND_FUA = 1 << 3;
        /// Seeks are slow.
        const ROTATIONAL = 1 << 4;
        /// Supports `NBD_CMD_TRIM`.
        const SEND_TRIM = 1 << 5;
        /// Supports `NBD_CMD_WRITE_ZEROES`.
        const SEND_WRITE_ZEROES = 1 << 6;
        /// Supports [`CommandFlags::DF`]; only with structured replies or extended headers.
        const SEND_DF = 1 << 7;
        /// A flush on one connection covers the completed writes of all.
        const CAN_MULTI_CONN = 1 << 8;
        /// Supports `NBD_CMD_CACHE`.
        const SEND_CACHE = 1 << 10;
        /// Supports [`CommandFlags::FAST_ZERO`].
        const SEND_FAST_ZERO = 1 << 11;
        /// Commands and flags that this server offers on writable exports only.
        const WRITABLE_ONLY =
            Self::SEND_TRIM.bits() | Self::SEND_WRITE_ZEROES.bits() | Self::SEND_FAST_ZERO.bits();
    }

    /// Modifiers of a request ("Command flags").
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct CommandFlags: u16 {
        /// Reply only when the data is durable; accepted on every command.
        const FUA = 1;
        /// Write zeroes without deallocating.
        const NO_HOLE = 1 << 1;
        /// Don't fragment: reply to a read with one content chunk.
        const DF = 1 << 2;
        /// Report one extent only.
        const REQ_ONE = 1 << 3;
        /// Write zeroes only if that is faster than `NBD_CMD_WRITE`.
        const FAST_ZERO = 1 << 4;
        /// The length is that of a payload; only with extended headers.
        const PAYLOAD_LEN = 1 << 5;
    }

    /// Flags of a reply chunk ("Structured reply flags").
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct ChunkFlags: u16 {
        /// The last chunk of its reply.
        const DONE = 1;
    }

    /// Status flags of an extent in [`CONTEXT_ALLOCATION`] ("`base:allocation` metadata context").
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Allocation: u32 {
        /// The extent is not allocated.
        const HOLE = 1;
        /// The extent reads as zeroes.
        const ZERO = 1 << 1;
    }
}

/// Defines an enum of numbers on the wire, with conversions in both directions.
macro_rules! numbers {
    ($(#[$about:meta])* $name:ident: $int:ty { $($(#[$doc:meta])* $variant:ident = $value:expr,)* }) => {
        $(#[$about])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr($int)]
        pub enum $name { $($(#[$doc])* $variant = $value,)* }

        impl $name {
            /// All values, in the order of their definition.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// The number on the wire.
            #[must_use]
            pub const fn number(self) -> $int {
                self as $int
            }
        }

        impl TryFrom<$int> for $name {
            /// The unknown number.
            type Error = $int;

            fn try_from(number: $int) -> Result<Self, $int> {
                Self::ALL.iter().copied().find(|known| known.number() == number).ok_or(number)
            }
        }
    };
}

numbers! {
    /// Options of the handshake ("Option types").
    OptionKind: u32 {
        /// Select an export and enter the transmission phase; has no error reply.
        ExportName = 1,
        /// Abort the negotiation.
        Abort = 2,
        /// List the exports.
        List = 3,
        /// Initiate TLS.
        StartTls = 5,
        /// Describe an export.
        Info = 6,
        /// Describe an export and enter the transmission phase.
        Go = 7,
        /// Use structured replies.
        StructuredReply = 8,
        /// List the metadata contexts of an export.
        ListMetaContext = 9,
        /// Select metadata contexts.
        SetMetaContext = 10,
        /// Use 64-bit lengths, and extended chunks for every reply.
        ExtendedHeaders = 11,
    }
}

/// Bit that marks a reply to an option as an error.
const ERROR_BIT: u32 = 1 << 31;

numbers! {
    /// Replies to options ("Option reply types").
    OptionReplyKind: u32 {
        /// The option is accepted; the last of its replies.
        Ack = 1,
        /// An export of the list.
        Server = 2,
        /// An item of information about an export.
        Info = 3,
        /// A metadata context.
        MetaContext = 4,
        /// The option is unknown.
        ErrUnsupported = ERROR_BIT + 1,
        /// The policy of the server forbids the option.
        ErrPolicy = ERROR_BIT + 2,
        /// The option is syntactically or semantically invalid.
        ErrInvalid = ERROR_BIT + 3,
        /// The platform of the server does not support the option.
        ErrPlatform = ERROR_BIT + 4,
        /// The option requires TLS.
        ErrTlsRequired = ERROR_BIT + 5,
        /// The export does not exist.
        ErrUnknown = ERROR_BIT + 6,
        /// The server is shutting down.
        ErrShutdown = ERROR_BIT + 7,
        /// The client must request the block sizes, and comply with them.
        ErrBlockSizeRequired = ERROR_BIT + 8,
        /// The option or its reply is too large.
        ErrTooBig = ERROR_BIT + 9,
        /// The option requires extended headers, or contradicts them.
        ErrExtendedHeadersRequired = ERROR_BIT + 10,
    }
}

impl OptionReplyKind {
    /// Whether this kind, known or not, is an error.
    #[must_use]
    pub const fn is_error(number: u32) -> bool {
        number & ERROR_BIT != 0
    }
}

numbers! {
    /// Information about an export (`NBD_REP_INFO`).
    InfoKind: u16 {
        /// Size and transmission flags.
        Export = 0,
        /// Canonical name.
        Name = 1,
        /// Description for display.
        Description = 2,
        /// Minimum and preferred block size, and maximum payload.
        BlockSize = 3,
    }
}

numbers! {
    /// Commands of the transmission phase ("Request types").
    CommandKind: u16 {
        /// Read data.
        Read = 0,
        /// Write the payload.
        Write = 1,
        /// Complete all requests, then close; has no reply.
        Disconnect = 2,
        /// Make completed writes durable.
        Flush = 3,
        /// Hint that the data is no longer needed.
        Trim = 4,
        /// Hint that the range will be accessed soon.
        Cache = 5,
        /// Write zeroes.
        WriteZeroes = 6,
        /// Query the extents of a metadata context.
        BlockStatus = 7,
    }
}

numbers! {
    /// Types of reply chunks ("Structured reply types").
    ChunkKind: u16 {
        /// No content.
        None = 0,
        /// Data at an offset.
        OffsetData = 1,
        /// Zeroes at an offset.
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
    /// The error values of replies; no other `errno` goes over the wire ("Error values").
    #[derive(Error)]
    ErrorCode: u32 {
        /// The operation is not permitted, such as a write to a read-only export.
        #[error("operation not permitted (EPERM)")]
        NotPermitted = 1,
        /// The disk failed.
        #[error("input/output error (EIO)")]
        Io = 5,
        /// Memory is exhausted.
        #[error("out of memory (ENOMEM)")]
        NoMemory = 12,
        /// The request is invalid.
        #[error("invalid request (EINVAL)")]
        Invalid = 22,
        /// The disk is full, or the range exceeds it.
        #[error("no space, or beyond the end of the disk (ENOSPC)")]
        NoSpace = 28,
        /// The read is too long for one chunk.
        #[error("too large (EOVERFLOW)")]
        Overflow = 75,
        /// Writing zeroes would not be fast.
        #[error("not supported (ENOTSUP)")]
        NotSupported = 95,
        /// The server is shutting down.
        #[error("the server is shutting down (ESHUTDOWN)")]
        Shutdown = 108,
    }
}

impl ErrorCode {
    /// Maps an `errno` of Linux to an error value; `EIO` unless there is a better one.
    ///
    /// Never returns `ESHUTDOWN`: no disk fails with it, and a client that receives it gives up
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

    /// The error value of a reply; an unknown one counts as `EINVAL` ("Error values").
    #[must_use]
    pub fn from_wire(number: u32) -> Self {
        Self::try_from(number).unwrap_or(Self::Invalid)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errno_maps_to_an_error_of_the_specification() {
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
    fn numbers_round_trip() {
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
