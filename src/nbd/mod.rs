//! The NBD protocol: bytes in, values out, for both roles.
//! Knows no socket, file, clock, thread or log; a message that decodes is well formed.
//!
//! The specification is `doc/proto.md` of NetworkBlockDevice/nbd; section names in this module's
//! documentation refer to it. [`wire`] holds every number of it, once. A conversation begins with
//! a [`handshake`] and goes on with [`request`]s and [`reply`]s.
//!
//! Every decoder takes the bytes received so far. It answers `Ok(None)` while the message is
//! incomplete, `Ok(Some((value, used)))` when it is whole, and `Err(Malformed)` as soon as it can
//! no longer become a valid one. None of them panics or allocates by a length that a peer sent.

mod bytes;
pub mod handshake;
pub mod reply;
pub mod request;
pub mod wire;

/// How many bytes a decoder used, and what they meant; `None` while more are needed.
pub type Decoded<T> = Result<Option<(T, usize)>, Malformed>;

/// Bytes that cannot become a valid message, whatever follows them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Malformed {
    /// A message began with another number than its magic one: framing is lost.
    Magic(u64),
    /// A length that contradicts the message's type, or the lengths around it.
    Length(u64),
    /// A string that is too long, not UTF-8, or has a NUL in it.
    Text,
    /// A field that must not be zero is.
    Zero,
}

impl std::fmt::Display for Malformed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Magic(found) => write!(f, "unexpected magic number {found:#x}"),
            Self::Length(found) => write!(f, "impossible length {found}"),
            Self::Text => f.write_str("a string is too long or not valid UTF-8"),
            Self::Zero => f.write_str("a field that must not be zero is zero"),
        }
    }
}

impl std::error::Error for Malformed {}
