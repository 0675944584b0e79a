//! Certificate authorities, certificates and keys for tests of TLS, in a temporary directory.
//! The keys in `tests/harness/pki` are for tests only: everyone has them.

use crate::files::temp_dir;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, KeyUsagePurpose, SanType,
};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, RootCertStore, SupportedProtocolVersion};
use std::fmt;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, SystemTime};
use tempfile::TempDir;

/// An RSA key, which ring cannot make, in the form PKCS#8.
const RSA_KEY: &str = include_str!("../pki/rsa.pkcs8.pem");
/// The names of the server that tests connect to.
const SERVER_NAMES: [&str; 3] = ["localhost", "127.0.0.1", "::1"];
/// Longest age and time left of a certificate.
pub const DAY: Duration = Duration::from_secs(24 * 3600);

/// An authority, with the files of the certificates that it signs.
pub struct Pki {
    directory: TempDir,
    name: String,
    authority: CertifiedIssuer<'static, KeyPair>,
}

/// The files of a certificate and its key.
#[derive(Clone, Debug)]
pub struct Identity {
    /// The certificate.
    pub cert: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

/// A certificate to be signed.
#[derive(Clone, Debug)]
pub struct Request {
    names: Vec<String>,
    purpose: ExtendedKeyUsagePurpose,
    not_before: SystemTime,
    not_after: SystemTime,
    key_pem: Option<String>,
}

impl Request {
    /// A certificate for a server at the loopback addresses, valid for a month.
    pub fn server() -> Self {
        Self::new(&SERVER_NAMES, ExtendedKeyUsagePurpose::ServerAuth)
    }

    /// A certificate for a client with these subject alternative names, valid for a month.
    pub fn client(names: &[&str]) -> Self {
        Self::new(names, ExtendedKeyUsagePurpose::ClientAuth)
    }

    fn new(names: &[&str], purpose: ExtendedKeyUsagePurpose) -> Self {
        let now = SystemTime::now();
        Self {
            names: names.iter().map(|name| (*name).to_owned()).collect(),
            purpose,
            not_before: now - DAY,
            not_after: now + 30 * DAY,
            key_pem: None,
        }
    }

    /// The same with these names.
    pub fn named(self, names: &[&str]) -> Self {
        Self { names: names.iter().map(|name| (*name).to_owned()).collect(), ..self }
    }

    /// The same, valid until this time only.
    pub fn until(self, not_after: SystemTime) -> Self {
        Self { not_before: not_after - 30 * DAY, not_after, ..self }
    }

    /// The same with an RSA key.
    pub fn rsa(self) -> Self {
        self.with_key(RSA_KEY)
    }

    /// The same with this private key, in the form PKCS#8.
    pub fn with_key(self, pem: &str) -> Self {
        Self { key_pem: Some(pem.to_owned()), ..self }
    }
}

impl fmt::Debug for Pki {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pki({})", self.path().display())
    }
}

impl Default for Pki {
    fn default() -> Self {
        Self::new()
    }
}

impl Pki {
    /// A new authority.
    pub fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("test authority {}", COUNT.fetch_add(1, Ordering::Relaxed));
        let params = authority_params(&name);
        let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let directory = temp_dir();
        fs::write(directory.path().join("ca.pem"), authority.pem()).unwrap();
        Self { directory, name, authority }
    }

    /// The directory of the files.
    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// The certificate of the authority.
    pub fn ca(&self) -> PathBuf {
        self.path().join("ca.pem")
    }

    /// Signs another authority, which is an intermediate one then; returns its certificate.
    pub fn sign_authority(&self, other: &Pki) -> String {
        let params = authority_params(&other.name);
        params.signed_by(other.authority.key(), &self.authority).unwrap().pem()
    }

    /// Signs a certificate, in files of this name; replaces existing ones.
    pub fn issue(&self, name: &str, request: &Request) -> Identity {
        let key = match &request.key_pem {
            Some(pem) => KeyPair::from_pem(pem).unwrap(),
            None => KeyPair::generate().unwrap(),
        };
        let mut params = CertificateParams::default();
        params.subject_alt_names =
            request.names.iter().map(|name| alternative_name(name)).collect();
        params.distinguished_name.push(DnType::CommonName, name);
        params.not_before = request.not_before.into();
        params.not_after = request.not_after.into();
        params.key_usages =
            vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        params.extended_key_usages = vec![request.purpose.clone()];
        params.use_authority_key_identifier_extension = true;
        let certificate = params.signed_by(&key, &self.authority).unwrap();
        let files = Identity {
            cert: self.path().join(format!("{name}.pem")),
            key: self.path().join(format!("{name}.key")),
        };
        fs::write(&files.cert, certificate.pem()).unwrap();
        fs::write(&files.key, key.serialize_pem()).unwrap();
        fs::set_permissions(&files.key, fs::Permissions::from_mode(0o600)).unwrap();
        files
    }

    /// The TLS of a client that trusts this authority, with these versions.
    pub fn client_config(
        &self,
        identity: Option<&Identity>,
        versions: &[&'static SupportedProtocolVersion],
    ) -> Arc<ClientConfig> {
        let mut roots = RootCertStore::empty();
        roots.add(self.authority.der().clone()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider);
        let builder = builder.with_protocol_versions(versions).unwrap();
        let builder = builder.with_root_certificates(roots);
        Arc::new(match identity {
            None => builder.with_no_client_auth(),
            Some(Identity { cert, key }) => {
                let chain = CertificateDer::from_pem_file(cert).unwrap();
                let key = PrivateKeyDer::from_pem_file(key).unwrap();
                builder.with_client_auth_cert(vec![chain], key).unwrap()
            }
        })
    }

    /// A directory as nbdkit, libnbd and QEMU want it: `ca-cert.pem`, and certificate and key of a server and a
    /// client. Without `client` it has none.
    pub fn directory(&self, name: &str, server: &Identity, client: Option<&Identity>) -> PathBuf {
        let directory = self.path().join(name);
        fs::create_dir(&directory).unwrap();
        let copy = |from: &Path, to: &str| fs::copy(from, directory.join(to)).unwrap();
        copy(&self.ca(), "ca-cert.pem");
        copy(&server.cert, "server-cert.pem");
        copy(&server.key, "server-key.pem");
        if let Some(client) = client {
            copy(&client.cert, "client-cert.pem");
            copy(&client.key, "client-key.pem");
        }
        directory
    }
}

/// The certificate of an authority with this name.
fn authority_params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.distinguished_name.push(DnType::CommonName, name);
    let now = SystemTime::now();
    params.not_before = (now - 60 * DAY).into();
    params.not_after = (now + 60 * DAY).into();
    params
}

fn alternative_name(name: &str) -> SanType {
    let text = name.to_owned();
    match name.parse() {
        Ok(ip) => SanType::IpAddress(ip),
        Err(_) if name.contains(':') => SanType::URI(text.try_into().unwrap()),
        Err(_) if name.contains('@') => SanType::Rfc822Name(text.try_into().unwrap()),
        Err(_) => SanType::DnsName(text.try_into().unwrap()),
    }
}

/// Private keys in all forms, of the same two keys.
pub mod keys {
    /// RSA, PKCS#1.
    pub const RSA_PKCS1: &str = include_str!("../pki/rsa.pkcs1.pem");
    /// RSA, PKCS#8.
    pub const RSA_PKCS8: &str = super::RSA_KEY;
    /// P-256, SEC1.
    pub const EC_SEC1: &str = include_str!("../pki/ec.sec1.pem");
    /// P-256, PKCS#8.
    pub const EC_PKCS8: &str = include_str!("../pki/ec.pkcs8.pem");
    /// P-256, encrypted.
    pub const ENCRYPTED: &str = include_str!("../pki/encrypted.pem");
}
