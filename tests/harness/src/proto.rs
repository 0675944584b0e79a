//! The numbers of the NBD protocol, from `doc/proto.md` of the NBD project and its extended-headers
//! extension. A second copy, so that the tests detect a wrong number in the program.

#![allow(missing_docs, reason = "each has the name that the specification gives it")]

pub const GREETING: u64 = 0x4e42_444d_4147_4943;
pub const OLD_STYLE: u64 = 0x0000_4202_8186_1253;
pub const I_HAVE_OPT: u64 = 0x4948_4156_454f_5054;
pub const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
pub const REQUEST: u32 = 0x2560_9513;
pub const EXTENDED_REQUEST: u32 = 0x21e4_1c71;
pub const SIMPLE_REPLY: u32 = 0x6744_6698;
pub const STRUCTURED_REPLY: u32 = 0x668e_33ef;
pub const EXTENDED_REPLY: u32 = 0x6e8a_278c;

/// Two magics and the handshake flags, in bytes.
pub const GREETING_LENGTH: usize = 18;
/// Handshake flags of the server and client flags alike.
pub const FIXED_NEWSTYLE: u32 = 1;
pub const NO_ZEROES: u32 = 2;
/// Count of reserved zero bytes at the end of the oldstyle greeting and of the reply to
/// EXPORT_NAME.
pub const ZEROES: usize = 124;

pub const OPT_EXPORT_NAME: u32 = 1;
pub const OPT_ABORT: u32 = 2;
pub const OPT_LIST: u32 = 3;
pub const OPT_PEEK_EXPORT: u32 = 4;
pub const OPT_STARTTLS: u32 = 5;
pub const OPT_INFO: u32 = 6;
pub const OPT_GO: u32 = 7;
pub const OPT_STRUCTURED_REPLY: u32 = 8;
pub const OPT_LIST_META_CONTEXT: u32 = 9;
pub const OPT_SET_META_CONTEXT: u32 = 10;
pub const OPT_EXTENDED_HEADERS: u32 = 11;

pub const REP_ACK: u32 = 1;
pub const REP_SERVER: u32 = 2;
pub const REP_INFO: u32 = 3;
pub const REP_META_CONTEXT: u32 = 4;
/// flexnbd's private option (flexnbd-migration(7)), and the type of its reply.
pub const OPT_PRIVATE: u32 = 0x464c_4558;
pub const REP_PRIVATE: u32 = OPT_PRIVATE;
pub const REP_IS_ERROR: u32 = 1 << 31;
pub const REP_ERR_UNSUP: u32 = REP_IS_ERROR + 1;
pub const REP_ERR_POLICY: u32 = REP_IS_ERROR + 2;
pub const REP_ERR_INVALID: u32 = REP_IS_ERROR + 3;
pub const REP_ERR_TLS_REQD: u32 = REP_IS_ERROR + 5;
pub const REP_ERR_UNKNOWN: u32 = REP_IS_ERROR + 6;
pub const REP_ERR_TOO_BIG: u32 = REP_IS_ERROR + 9;
pub const REP_ERR_EXT_HEADER_REQD: u32 = REP_IS_ERROR + 10;

pub const INFO_EXPORT: u16 = 0;
pub const INFO_NAME: u16 = 1;
pub const INFO_DESCRIPTION: u16 = 2;
pub const INFO_BLOCK_SIZE: u16 = 3;

pub const HAS_FLAGS: u16 = 1;
pub const READ_ONLY: u16 = 1 << 1;
pub const SEND_FLUSH: u16 = 1 << 2;
pub const SEND_FUA: u16 = 1 << 3;
pub const SEND_TRIM: u16 = 1 << 5;
pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
pub const SEND_DF: u16 = 1 << 7;
pub const CAN_MULTI_CONN: u16 = 1 << 8;
pub const SEND_CACHE: u16 = 1 << 10;
pub const SEND_FAST_ZERO: u16 = 1 << 11;

pub const READ: u16 = 0;
pub const WRITE: u16 = 1;
pub const DISC: u16 = 2;
pub const FLUSH: u16 = 3;
pub const TRIM: u16 = 4;
pub const CACHE: u16 = 5;
pub const WRITE_ZEROES: u16 = 6;
pub const BLOCK_STATUS: u16 = 7;

pub const FUA: u16 = 1;
pub const NO_HOLE: u16 = 1 << 1;
pub const DF: u16 = 1 << 2;
pub const REQ_ONE: u16 = 1 << 3;
pub const FAST_ZERO: u16 = 1 << 4;
pub const PAYLOAD_LEN: u16 = 1 << 5;

pub const CHUNK_DONE: u16 = 1;
pub const CHUNK_NONE: u16 = 0;
pub const CHUNK_DATA: u16 = 1;
pub const CHUNK_HOLE: u16 = 2;
pub const CHUNK_BLOCK_STATUS: u16 = 5;
pub const CHUNK_BLOCK_STATUS_EXT: u16 = 6;
pub const CHUNK_ERROR: u16 = (1 << 15) + 1;
pub const CHUNK_ERROR_OFFSET: u16 = (1 << 15) + 2;

pub const EPERM: u32 = 1;
pub const EIO: u32 = 5;
pub const ENOMEM: u32 = 12;
pub const EINVAL: u32 = 22;
pub const ENOSPC: u32 = 28;
pub const EOVERFLOW: u32 = 75;
pub const ENOTSUP: u32 = 95;
pub const ESHUTDOWN: u32 = 108;
/// The error values that the specification defines. A server sends no others.
pub const LISTED_ERRORS: [u32; 8] =
    [EPERM, EIO, ENOMEM, EINVAL, ENOSPC, EOVERFLOW, ENOTSUP, ESHUTDOWN];

/// `base:allocation`: not allocated; reads as zero.
pub const STATE_HOLE: u64 = 1;
pub const STATE_ZERO: u64 = 2;
pub const ALLOCATION: &str = "base:allocation";

/// The longest string of the protocol, in bytes.
pub const STRING_MAX: usize = 4096;
