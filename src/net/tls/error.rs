//! Why certificates and keys cannot be used. Pure.

use super::file::TlsFile;
use std::path::PathBuf;

/// Why TLS cannot be set up. Each text names the file, and what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error("cannot read {file}: {why}")]
    Unreadable {
        /// The file.
        file: TlsFile,
        /// The reason.
        why: String,
    },
    /// The user of this process may not read a file.
    #[error(
        "cannot read {file}: user {user} may not, or the sandbox does not admit its directory (flexnbd(1), \
         SANDBOX); change that, or pass it as a credential (flexnbd.service(7))"
    )]
    Forbidden {
        /// The file.
        file: TlsFile,
        /// The user id.
        user: u32,
    },
    /// The service manager has passed no credentials.
    #[error(
        "cannot read {0}: the service manager has passed no credentials; add LoadCredential= to the unit"
    )]
    NoCredentials(TlsFile),
    /// A file has no certificate.
    #[error("{0} has no certificate in PEM form (-----BEGIN CERTIFICATE-----)")]
    NoCertificate(TlsFile),
    /// A certificate cannot be parsed.
    #[error("a certificate in {file} is invalid: {why}")]
    BadCertificate {
        /// The file.
        file: TlsFile,
        /// The reason.
        why: String,
    },
    /// A file has no private key.
    #[error("{0} has no private key in PEM form (-----BEGIN PRIVATE KEY-----)")]
    NoKey(TlsFile),
    /// A private key needs a passphrase.
    #[error(
        "the private key in {0} is encrypted, and a service cannot ask for its passphrase; store it without one \
         (openssl pkey -in OLD -out NEW)"
    )]
    EncryptedKey(TlsFile),
    /// A private key cannot be used.
    #[error(
        "the private key in {file} cannot be used: {why}; RSA keys of 2048 to 8192 bits, P-256, P-384 and \
         Ed25519 keys can"
    )]
    BadKey {
        /// The file.
        file: TlsFile,
        /// The reason.
        why: String,
    },
    /// The private key is that of another certificate.
    #[error("the private key in {key} is not that of the first certificate in {cert}")]
    Mismatch {
        /// The file of the certificate.
        cert: TlsFile,
        /// The file of the key.
        key: TlsFile,
    },
    /// A server without certificate.
    #[error("a server that uses TLS needs a certificate")]
    CertificateMissing,
    /// The host has no list of certificate authorities.
    #[error(
        "cannot verify servers: {path}, the certificate authorities of this host, {why}; name one to trust, or \
         install the package ca-certificates", path = .path.display()
    )]
    NoTrustStore {
        /// The list.
        path: PathBuf,
        /// The reason.
        why: String,
    },
    /// The name of a server cannot be in a certificate.
    #[error("`{0}` is neither a host name nor an IP address that a certificate could have")]
    BadServerName(String),
    /// A server at a unix socket has no name of its own.
    #[error("the server at a unix socket needs a name to verify its certificate with")]
    ServerNameMissing,
    /// rustls refuses the configuration.
    #[error("cannot set up TLS: {0}")]
    Setup(String),
}
