//! The NBD protocol, for both roles: converts between bytes and values.
//! Never touches a socket, file, clock, thread or log. A message that decodes is well formed.
//!
//! The specification is `doc/proto.md` of NetworkBlockDevice/nbd, for extended headers on the
//! branch `extension-ext-header`; section names in this module's documentation refer to it.
//! [`wire`] defines every number of it, once. A session begins with a [`handshake`] and continues
//! with [`request`]s and [`reply`]s.
//!
//! Every decoder takes the bytes received so far. It returns `Ok(None)` while the message is
//! incomplete, `Ok(Some((value, used)))` once it is complete, and `Err(Malformed)` as soon as it
//! can no longer become valid. No decoder panics, or allocates by a length that a peer sent.

mod bytes;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz_tests;
pub mod handshake;
pub mod introduction;
pub mod reply;
pub mod request;
pub mod wire;

use thiserror::Error;

/// A decoded value and the number of bytes it occupied; `None` while more bytes are needed.
pub type Decoded<T> = Result<Option<(T, usize)>, Malformed>;

/// Bytes that cannot become a valid message, whatever follows them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum Malformed {
    /// A message does not begin with its magic number: framing is lost.
    #[error("unexpected magic number {0:#x}")]
    Magic(u64),
    /// A length contradicts the type of the message, or the lengths around it.
    #[error("impossible length {0}")]
    Length(u64),
    /// A string is too long, not UTF-8, or contains NUL.
    #[error("a string is too long or not valid UTF-8")]
    Text,
    /// A field is zero that must not be.
    #[error("a field that must not be zero is zero")]
    Zero,
}
