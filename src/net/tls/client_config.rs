//! The TLS of a client: which servers it trusts, and what it presents to them.

use super::error::TlsError;
use super::file::{TlsFile, TlsFiles};
use super::identity::{Identity, TlsWarning, authorities, provider};
use super::mode::TlsMode;
use crate::net::{Address, Remote};
use crate::sync::lock;
use rustls::client::Resumption;
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, RootCertStore};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

/// The certificate authorities of the host, which clients trust unless others are named.
pub const CLIENT_TRUST_STORE: &str = "/etc/ssl/certs/ca-certificates.crt";

/// The authorities that clients of this process trust, and the certificate that they present. For any
/// server; [`ClientTls`] is for one.
#[derive(Clone, Debug)]
pub struct TlsClient {
    config: Arc<ClientConfig>,
    identity: Option<Identity>,
}

/// How to connect to a server: with TLS or without, and its name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TlsTarget {
    /// Whether to use TLS.
    pub mode: TlsMode,
    /// The name that its certificate must have, if not that of its address.
    pub hostname: Option<String>,
}

impl TlsTarget {
    /// The name that the certificate of the server at `remote` must have.
    ///
    /// # Errors
    /// [`TlsError::BadServerName`], [`TlsError::ServerNameMissing`].
    pub fn server_name(&self, remote: &Remote) -> Result<ServerName<'static>, TlsError> {
        let host = match (&self.hostname, remote) {
            (Some(name), _) => name,
            (None, Remote::Host { host, .. }) => host,
            (None, Remote::Unix(_)) => return Err(TlsError::ServerNameMissing),
        };
        ServerName::try_from(host.clone()).map_err(|_| TlsError::BadServerName(host.clone()))
    }
}

/// The [`TlsClient`] of connections that outlive a reload, which replaces it.
#[derive(Clone, Debug)]
pub struct TlsClientSlot(Arc<Mutex<TlsClient>>);

impl TlsClientSlot {
    /// A slot with this client.
    #[must_use]
    pub fn new(client: TlsClient) -> Self {
        Self(Arc::new(Mutex::new(client)))
    }

    /// The client of new connections.
    #[must_use]
    pub fn get(&self) -> TlsClient {
        lock(&self.0).clone()
    }

    /// Replaces the client; open connections keep theirs.
    pub fn set(&self, client: TlsClient) {
        *lock(&self.0) = client;
    }
}

/// Two are equal if a replacement of one replaces the other.
impl PartialEq for TlsClientSlot {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for TlsClientSlot {}

/// The TLS of connections to one server.
#[derive(Clone, Debug)]
pub struct ClientTls {
    mode: TlsMode,
    config: Arc<ClientConfig>,
    server_name: ServerName<'static>,
}

impl TlsClient {
    /// Reads the files. Without `files.ca` the authorities of [`CLIENT_TRUST_STORE`] are trusted.
    ///
    /// # Errors
    /// [`TlsError`].
    pub fn load(files: &TlsFiles) -> Result<Self, TlsError> {
        let identity = Identity::load(files)?;
        let roots = match &files.ca {
            Some(ca) => authorities(ca)?,
            None => trust_store(Path::new(CLIENT_TRUST_STORE))?,
        };
        let setup = |error: rustls::Error| TlsError::Setup(error.to_string());
        let builder = ClientConfig::builder_with_provider(Arc::new(provider()))
            .with_safe_default_protocol_versions()
            .map_err(setup)?
            .with_root_certificates(roots);
        let mut config = match &identity {
            Some(identity) => {
                builder.with_client_cert_resolver(Arc::clone(&identity.resolver) as _)
            }
            None => builder.with_no_client_auth(),
        };
        // A connection lasts for days, so that resumption would save nothing.
        config.resumption = Resumption::disabled();
        Ok(Self { config: Arc::new(config), identity })
    }

    /// The TLS of connections to this server; `None` for none.
    ///
    /// # Errors
    /// As [`TlsTarget::server_name`].
    pub fn for_remote(
        &self,
        target: &TlsTarget,
        remote: &Remote,
    ) -> Result<Option<ClientTls>, TlsError> {
        if target.mode == TlsMode::Off {
            return Ok(None);
        }
        let server_name = target.server_name(remote)?;
        Ok(Some(ClientTls { mode: target.mode, config: Arc::clone(&self.config), server_name }))
    }

    /// The same for an address.
    ///
    /// # Errors
    /// As [`TlsTarget::server_name`].
    pub fn for_address(
        &self,
        target: &TlsTarget,
        address: &Address,
    ) -> Result<Option<ClientTls>, TlsError> {
        let remote = match address {
            Address::Tcp(tcp) => Remote::Host { host: tcp.ip().to_string(), port: tcp.port() },
            Address::Unix(path) => Remote::Unix(path.clone()),
        };
        self.for_remote(target, &remote)
    }

    /// The warning about the end of the certificate, if there is one at this time.
    #[must_use]
    pub fn expiry(&self, now: SystemTime) -> Option<TlsWarning> {
        self.identity.as_ref().and_then(|identity| identity.expiry(now))
    }

    /// All warnings about certificate and key.
    #[must_use]
    pub fn warnings(&self, now: SystemTime) -> Vec<TlsWarning> {
        self.identity.as_ref().map_or_else(Vec::new, |identity| identity.warnings(now))
    }
}

/// Two are equal if they come from the same files, read at the same time, and are for the same server.
impl PartialEq for ClientTls {
    fn eq(&self, other: &Self) -> bool {
        self.mode == other.mode
            && self.server_name == other.server_name
            && Arc::ptr_eq(&self.config, &other.config)
    }
}

impl Eq for ClientTls {}

impl ClientTls {
    /// Whether the server must offer TLS. Never [`TlsMode::Off`].
    #[must_use]
    pub fn mode(&self) -> TlsMode {
        self.mode
    }

    /// The configuration of the connection.
    #[must_use]
    pub fn config(&self) -> &Arc<ClientConfig> {
        &self.config
    }

    /// The name that the server's certificate must have.
    #[must_use]
    pub fn server_name(&self) -> &ServerName<'static> {
        &self.server_name
    }
}

/// The authorities of the host. Those that rustls cannot use are left out, because the operator has not
/// chosen them.
fn trust_store(path: &Path) -> Result<RootCertStore, TlsError> {
    let unusable = |why: String| TlsError::NoTrustStore { path: path.to_owned(), why };
    let certificates = TlsFile::Path(path.to_owned()).certificates().map_err(|error| {
        unusable(match error {
            TlsError::Unreadable { why, .. } => format!("cannot be read ({why})"),
            _ => "has no certificate".to_owned(),
        })
    })?;
    let mut roots = RootCertStore::empty();
    match roots.add_parsable_certificates(certificates) {
        (0, _) => Err(unusable("has no usable certificate".to_owned())),
        _ => Ok(roots),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn missing_trust_store_is_named_with_advice() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("ca-certificates.crt");
        let error = trust_store(&path).unwrap_err().to_string();
        let start =
            format!("cannot verify servers: {}, the certificate authorities", path.display());
        assert!(error.starts_with(&start), "{error}");
        assert!(error.contains("cannot be read (it does not exist); name one to trust"), "{error}");
        fs::write(&path, "").unwrap();
        assert!(trust_store(&path).unwrap_err().to_string().contains("has no certificate;"));
    }
}
