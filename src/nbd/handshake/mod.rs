//! The handshake of both roles: greeting, option haggling, negotiated parameters.
//! Pure: both roles take the received bytes, and return the bytes to send.
//!
//! ```text
//! server                                      client
//!   │ ── Greeting::Oldstyle {size, flags} ────▶ │   (oldstyle: ends here)
//!   │ ── Greeting::Newstyle {flags} ──────────▶ │
//!   │ ◀────────────────────── client flags ──── │
//!   │ ◀──────────────────────────── option ──── │   repeatedly,
//!   │ ── option replies ──────────────────────▶ │   until GO or EXPORT_NAME succeeds
//! ```
//!
//! After `NBD_OPT_STARTTLS` the options begin again, over TLS: nothing that was negotiated before is left.

pub mod client;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz_tests;
pub mod option;
pub mod server;
#[cfg(test)]
mod tests;
mod tls_offer;
mod violation;

pub use tls_offer::TlsOffer;

use super::bytes::Reader;
use super::reply::Dialect;
use super::wire::{
    ClientFlags, GREETING_MAGIC, HandshakeFlags, OLDSTYLE_MAGIC, OPTION_MAGIC, RESERVED_ZEROES,
    TransmissionFlags,
};
use super::{Decoded, Malformed};

/// The greeting of the server ("Handshake").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Greeting {
    /// Oldstyle: one export, no options.
    Oldstyle {
        /// Size of the export in bytes.
        size: u64,
        /// Transmission flags of the export.
        flags: TransmissionFlags,
    },
    /// Newstyle: option haggling follows.
    Newstyle {
        /// Handshake flags of the server.
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

    /// The greeting at the front of `bytes`. Ignores unknown flags.
    ///
    /// # Errors
    /// If the bytes are not an NBD greeting.
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
        // The upper 16 of these 32 bits are handshake flags, which must all be clear in oldstyle.
        let flags = TransmissionFlags::from_bits_truncate((reader.u32()? & 0xffff) as u16);
        reader.take(RESERVED_ZEROES)?;
        Some(Self::Oldstyle { size, flags })
    }
}

/// Appends the client flags: the reply to a newstyle greeting.
pub fn encode_client_flags(flags: ClientFlags, out: &mut Vec<u8>) {
    out.extend_from_slice(&flags.bits().to_be_bytes());
}

/// Block sizes of an export in bytes ("Block size constraints").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockSizes {
    /// Offsets and lengths are multiples of it.
    pub minimum: u32,
    /// Aligned requests of at least this length are efficient.
    pub preferred: u32,
    /// Maximum payload.
    pub maximum: u32,
}

/// The id that our server assigns to [`super::wire::CONTEXT_ALLOCATION`].
pub const ALLOCATION_CONTEXT_ID: u32 = 1;

/// The negotiated parameters of the transmission phase.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Agreement {
    /// Size of the export in bytes.
    pub size: u64,
    /// Transmission flags of the export.
    pub flags: TransmissionFlags,
    /// The form of request headers and replies.
    pub dialect: Dialect,
    /// Id of the metadata context `base:allocation`, if it was selected.
    pub allocation_context: Option<u32>,
    /// The advertised block sizes, if any.
    pub block_sizes: Option<BlockSizes>,
    /// Whether the greeting was oldstyle.
    pub oldstyle: bool,
}
