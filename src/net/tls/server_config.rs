//! The TLS of a server: what it presents, and what it demands of its clients.

use super::allow::AllowVerifier;
use super::error::TlsError;
use super::file::TlsFiles;
use super::identity::{Identity, TlsWarning, authorities, provider};
use super::mode::TlsMode;
use super::name::AllowedName;
use rustls::ServerConfig;
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use std::sync::Arc;
use std::time::SystemTime;

/// The TLS of a server. Sessions keep the one with which they began; a reload makes another.
#[derive(Clone, Debug)]
pub struct ServerTls {
    mode: TlsMode,
    config: Arc<ServerConfig>,
    identity: Identity,
}

impl ServerTls {
    /// Reads the files. With `files.ca`, clients must present a certificate of one of its authorities, and with
    /// `allow`, one with at least one of these names.
    ///
    /// # Errors
    /// [`TlsError`]; a server without certificate is [`TlsError::CertificateMissing`].
    pub fn load(mode: TlsMode, files: &TlsFiles, allow: &[AllowedName]) -> Result<Self, TlsError> {
        let identity = Identity::load(files)?.ok_or(TlsError::CertificateMissing)?;
        let verifier = verifier(files, allow)?;
        let setup = |error: rustls::Error| TlsError::Setup(error.to_string());
        let resolver = Arc::clone(&identity.resolver);
        let mut config = ServerConfig::builder_with_provider(Arc::new(provider()))
            .with_safe_default_protocol_versions()
            .map_err(setup)?
            .with_client_cert_verifier(verifier)
            .with_cert_resolver(resolver);
        config.ignore_client_order = true;
        // Kernel TLS takes over after the handshake, and needs the numbers of the records: no record may follow
        // the handshake. Besides, a session that is resumed would skip the names allowed since a reload.
        config.send_tls13_tickets = 0;
        config.session_storage = Arc::new(NoServerSessionStorage {});
        // For kernel TLS.
        config.enable_secret_extraction = true;
        Ok(Self { mode, config: Arc::new(config), identity })
    }

    /// Whether clients must use TLS. Never [`TlsMode::Off`] in a running server.
    #[must_use]
    pub fn mode(&self) -> TlsMode {
        self.mode
    }

    /// The configuration of new sessions.
    #[must_use]
    pub fn config(&self) -> &Arc<ServerConfig> {
        &self.config
    }

    /// The warning about the end of the certificate, if there is one at this time.
    #[must_use]
    pub fn expiry(&self, now: SystemTime) -> Option<TlsWarning> {
        self.identity.expiry(now)
    }

    /// All warnings about certificate and key.
    #[must_use]
    pub fn warnings(&self, now: SystemTime) -> Vec<TlsWarning> {
        self.identity.warnings(now)
    }
}

fn verifier(
    files: &TlsFiles,
    allow: &[AllowedName],
) -> Result<Arc<dyn ClientCertVerifier>, TlsError> {
    let Some(ca) = &files.ca else { return Ok(WebPkiClientVerifier::no_client_auth()) };
    let roots = Arc::new(authorities(ca)?);
    let verifier = WebPkiClientVerifier::builder_with_provider(roots, Arc::new(provider())).build();
    let verifier = verifier.map_err(|error| TlsError::Setup(error.to_string()))?;
    Ok(if allow.is_empty() {
        verifier
    } else {
        Arc::new(AllowVerifier::new(verifier, allow.to_vec()))
    })
}
