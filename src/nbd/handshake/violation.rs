//! What a client does in the handshake that ends its session.

use super::option::{OPTIONS_LENGTH_MAX, OPTIONS_MAX};
use thiserror::Error;

/// A violation of the protocol by the client that ends the session.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ProtocolViolation {
    /// The client set undefined client flags.
    #[error("it sent unknown client flags {0:#x}")]
    UnknownClientFlags(u32),
    /// An option has a wrong magic number: framing is lost.
    #[error("it sent {0:#x} where an option should begin")]
    BadOptionMagic(u64),
    /// The data of an option has this length in bytes, over [`OPTION_SKIP_LENGTH_MAX`](super::option::OPTION_SKIP_LENGTH_MAX).
    #[error("it announced an option of {0} bytes")]
    OptionTooLong(u32),
    /// The options exceed [`OPTIONS_MAX`] or [`OPTIONS_LENGTH_MAX`].
    #[error("it sent more than {OPTIONS_MAX} options, or {OPTIONS_LENGTH_MAX} bytes in them")]
    TooManyOptions,
    /// `NBD_OPT_EXPORT_NAME` with an invalid name, or the name of an unknown export.
    #[error("it asked for an export that does not exist")]
    UnknownExport,
    /// `NBD_OPT_EXPORT_NAME` after extended headers were negotiated.
    #[error("it sent NBD_OPT_EXPORT_NAME after extended headers")]
    ExportNameAfterExtendedHeaders,
    /// An option that needs a reply, from a client without fixed newstyle.
    #[error("it sent option {0} without knowing fixed newstyle")]
    OptionBeforeFixedNewstyle(u32),
    /// `NBD_OPT_EXPORT_NAME` from a client that was refused admission.
    #[error("it is not let in: {0}")]
    NotAdmitted(String),
    /// `NBD_OPT_EXPORT_NAME`, which no reply can refuse, from a client without TLS that has to use it.
    #[error("it did not begin TLS, which is required")]
    TlsRequired,
    /// Bytes behind `NBD_OPT_STARTTLS`, before its reply: an attacker could have inserted them.
    #[error("it sent data behind NBD_OPT_STARTTLS without waiting for the reply")]
    DataBeforeTls,
}
