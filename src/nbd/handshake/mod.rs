//! How a conversation begins: greeting, option haggling, agreement; as server and as client.
//! Pure: both roles are fed the bytes that arrived and say which bytes to send.
//!
//! ```text
//! server                                      client
//!   │ ── Greeting::Oldstyle {size, flags} ────▶ │   (old style: that was all)
//!   │ ── Greeting::Newstyle {flags} ──────────▶ │
//!   │ ◀────────────────────── client flags ──── │
//!   │ ◀──────────────────────────── option ──── │   again and again,
//!   │ ── option replies ──────────────────────▶ │   until GO or EXPORT_NAME succeeds
//! ```

pub mod client;
pub mod option;
pub mod server;
#[cfg(test)]
mod tests;

use super::bytes::Reader;
use super::reply::Dialect;
use super::wire::{
    ClientFlags, GREETING_MAGIC, HandshakeFlags, OLDSTYLE_MAGIC, OPTION_MAGIC, RESERVED_ZEROES,
    TransmissionFlags,
};
use super::{Decoded, Malformed};

/// The server's first words ("Handshake").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Greeting {
    /// One export, no options.
    Oldstyle {
        /// Of the export, in bytes.
        size: u64,
        /// What the export can do.
        flags: TransmissionFlags,
    },
    /// Options follow.
    Newstyle {
        /// What the server can do.
        flags: HandshakeFlags,
    },
}

impl Greeting {
    /// Appends the greeting.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&GREETING_MAGIC.to_be_bytes());
        match self {
            Self::Oldstyle { size, flags } => {
                out.extend_from_slice(&OLDSTYLE_MAGIC.to_be_bytes());
                out.extend_from_slice(&size.to_be_bytes());
                out.extend_from_slice(&u32::from(flags.bits()).to_be_bytes());
                out.extend_from_slice(&[0; RESERVED_ZEROES]);
            }
            Self::Newstyle { flags } => {
                out.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
                out.extend_from_slice(&flags.bits().to_be_bytes());
            }
        }
    }

    /// The greeting at the front of `bytes`. Flags without a name are dropped.
    ///
    /// # Errors
    /// When the bytes are no NBD greeting.
    pub fn decode(bytes: &[u8]) -> Decoded<Self> {
        let mut reader = Reader::new(bytes);
        let Some(magic) = reader.u64() else { return Ok(None) };
        if magic != GREETING_MAGIC {
            return Err(Malformed::Magic(magic));
        }
        let Some(style) = reader.u64() else { return Ok(None) };
        let greeting = match style {
            OLDSTYLE_MAGIC => Self::oldstyle(&mut reader),
            OPTION_MAGIC => reader
                .u16()
                .map(|flags| Self::Newstyle { flags: HandshakeFlags::from_bits_truncate(flags) }),
            _ => return Err(Malformed::Magic(style)),
        };
        Ok(greeting.map(|greeting| (greeting, reader.used())))
    }

    fn oldstyle(reader: &mut Reader<'_>) -> Option<Self> {
        let size = reader.u64()?;
        // The upper half of these 32 bits were handshake flags; none was ever defined.
        let flags = TransmissionFlags::from_bits_truncate((reader.u32()? & 0xffff) as u16);
        reader.take(RESERVED_ZEROES)?;
        Some(Self::Oldstyle { size, flags })
    }
}

/// Appends the client's answer to a newstyle greeting.
pub fn encode_client_flags(flags: ClientFlags, out: &mut Vec<u8>) {
    out.extend_from_slice(&flags.bits().to_be_bytes());
}

/// Block sizes of an export in bytes ("Block size constraints").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockSizes {
    /// Offsets and lengths are multiples of this.
    pub minimum: u32,
    /// Fastest.
    pub preferred: u32,
    /// Largest payload.
    pub maximum: u32,
}

/// The id under which [`super::wire::CONTEXT_ALLOCATION`] is reported by our server.
pub const ALLOCATION_CONTEXT_ID: u32 = 1;

/// What both sides agreed on for the transmission phase.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Agreement {
    /// Of the export in bytes.
    pub size: u64,
    /// What the export can do.
    pub flags: TransmissionFlags,
    /// The form of requests and replies.
    pub dialect: Dialect,
    /// Id of the allocation context, if it was selected.
    pub allocation_context: Option<u32>,
    /// What the server said about block sizes, if it did.
    pub block_sizes: Option<BlockSizes>,
    /// Whether the server greeted in old style.
    pub oldstyle: bool,
}
