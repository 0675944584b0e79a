//! Why a TLS session could not begin.

use super::explain::explain;
use std::io;
use thiserror::Error;

/// Why a TLS session could not begin. The texts are part of log lines.
#[derive(Debug, Error)]
pub enum TlsFailure {
    /// The handshake failed, such as for a certificate that is not valid.
    #[error("the TLS handshake failed: {}", explain(.0))]
    Session(#[from] rustls::Error),
    /// The connection failed, or the caller's wait.
    #[error(transparent)]
    Connection(#[from] io::Error),
    /// The kernel refused the keys. Later sessions do not use its records.
    #[error("the kernel cannot encrypt this session ({0}); new ones do without it")]
    Kernel(io::Error),
}
