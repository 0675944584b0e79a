//! A certificate chain with its private key, and what an operator should be told about it.

use super::certificate::{CertificateExpiry, Validity};
use super::error::TlsError;
use super::file::{TlsFile, TlsFiles};
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::CertificateDer;
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{Error, InconsistentKeys, RootCertStore};
use std::sync::Arc;
use std::time::SystemTime;

/// Something that an operator should change. Each text names the file.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TlsWarning {
    /// A certificate of the file is not valid, or not for long.
    #[error("the certificate in {0} {1}; renew it, and reload")]
    Expiry(TlsFile, CertificateExpiry),
    /// All users of the host may read the private key.
    #[error("every user of this host may read the private key in {0}; restrict its permissions")]
    KeyReadableByAll(TlsFile),
}

/// A certificate chain with its private key.
#[derive(Clone, Debug)]
pub(super) struct Identity {
    pub(super) resolver: Arc<SingleCertAndKey>,
    cert: TlsFile,
    validity: Validity,
    /// The file of the private key, if all users may read it.
    readable_key: Option<TlsFile>,
}

impl Identity {
    /// Reads certificate and key; `None` if no certificate is named.
    pub(super) fn load(files: &TlsFiles) -> Result<Option<Self>, TlsError> {
        let Some(cert) = &files.cert else { return Ok(None) };
        let key = files.key.as_ref().unwrap_or(cert);
        let chain = cert.certificates()?;
        let invalid = |why| TlsError::BadCertificate { file: cert.clone(), why };
        let validity = Validity::of_chain(&chain).map_err(|error| invalid(error.to_string()))?;
        let private = key.private_key()?;
        let certified =
            CertifiedKey::from_der(chain, private, &provider()).map_err(|error| match error {
                Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => {
                    TlsError::Mismatch { cert: cert.clone(), key: key.clone() }
                }
                Error::InvalidCertificate(error) => invalid(error.to_string()),
                Error::General(why) => TlsError::BadKey { file: key.clone(), why },
                error => TlsError::BadKey { file: key.clone(), why: error.to_string() },
            })?;
        Ok(Some(Self {
            resolver: Arc::new(SingleCertAndKey::from(certified)),
            cert: cert.clone(),
            validity,
            readable_key: key.is_readable_by_all().then(|| key.clone()),
        }))
    }

    /// The warning about the end of the certificate, if there is one at this time.
    pub(super) fn expiry(&self, now: SystemTime) -> Option<TlsWarning> {
        self.validity.expiry(now).map(|expiry| TlsWarning::Expiry(self.cert.clone(), expiry))
    }

    /// All warnings.
    pub(super) fn warnings(&self, now: SystemTime) -> Vec<TlsWarning> {
        let readable = self.readable_key.clone().map(TlsWarning::KeyReadableByAll);
        readable.into_iter().chain(self.expiry(now)).collect()
    }
}

/// The certificate authorities of a file; every certificate in it must be usable.
pub(super) fn authorities(file: &TlsFile) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in file.certificates()? {
        add(&mut roots, certificate, file)?;
    }
    Ok(roots)
}

fn add(
    roots: &mut RootCertStore,
    certificate: CertificateDer<'static>,
    file: &TlsFile,
) -> Result<(), TlsError> {
    let added = roots.add(certificate);
    added.map_err(|error| TlsError::BadCertificate { file: file.clone(), why: error.to_string() })
}

/// The cryptography: ring, because it builds in seconds with a C compiler only, and its AES-GCM uses the
/// instructions of current processors.
///
/// AES-128-GCM comes first: it is as safe for this purpose as AES-256-GCM, about a quarter faster, and every
/// kernel with TLS has it. The others stay for peers that lack it.
pub(super) fn provider() -> CryptoProvider {
    use rustls::CipherSuite as Suite;
    let mut provider = ring::default_provider();
    let is_fastest = |suite: Suite| {
        matches!(
            suite,
            Suite::TLS13_AES_128_GCM_SHA256
                | Suite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256
                | Suite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256
        )
    };
    // The sort is stable, so that the order is the provider's otherwise.
    provider.cipher_suites.sort_by_key(|suite| !is_fastest(suite.suite()));
    provider
}
