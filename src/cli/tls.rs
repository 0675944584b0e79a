//! The TLS options of all modes, and what they mean together.
//! Pure: never reads the files that they name.

use super::uri::Target;
use crate::control::command::MirrorTls;
use crate::daemon::ServerTlsConfig;
use crate::net::tls::{AllowedName, TlsError, TlsFile, TlsFiles, TlsMode, TlsTarget};

/// The prefix of the options of `proxy` about its upstream.
pub const UPSTREAM_PREFIX: &str = "to-";

/// The TLS settings of a server, by options or by keys of the configuration file.
#[derive(clap::Args, Clone, Debug, Default, PartialEq, Eq)]
pub struct ServerTlsSettings {
    /// Encrypt connections: off, on (of clients that ask for it), or require (others get nothing)
    /// [default: on with --tls-cert, otherwise off]
    #[arg(long, value_name = "MODE")]
    pub tls: Option<TlsMode>,

    /// Certificate of this server and its chain, a PEM file, or credential:NAME for one that the
    /// service manager has passed
    #[arg(long, value_name = "FILE")]
    pub tls_cert: Option<TlsFile>,

    /// Its private key [default: in the file of the certificate]
    #[arg(long, value_name = "FILE")]
    pub tls_key: Option<TlsFile>,

    /// Demand certificates of clients, signed by an authority of this file
    #[arg(long, value_name = "FILE")]
    pub tls_ca: Option<TlsFile>,

    /// Accept only certificates with this subject alternative name: a host name, an IP address, an
    /// email address or a URI; may be repeated
    #[arg(long, value_name = "NAME")]
    pub tls_allow: Vec<AllowedName>,
}

/// The TLS settings of a client: what the options of `mirror`, `read` and `write` say, and those of
/// `proxy` about its upstream.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClientTlsSettings {
    /// Whether to use TLS, if the operator says so.
    pub mode: Option<TlsMode>,
    /// The certificates.
    pub files: TlsFiles,
    /// The name that the server's certificate must have, if not that of its address.
    pub hostname: Option<String>,
}

/// The TLS flags of `mirror`, `read` and `write`.
#[derive(clap::Args, Clone, Debug)]
pub struct ClientTlsFlags {
    /// Encrypt the connection: off, on (if the server offers it), or require [default: require with
    /// an option below or a URI nbds://, otherwise off]
    #[arg(long, value_name = "MODE")]
    tls: Option<TlsMode>,

    /// Trust servers whose certificate is signed by an authority of this PEM file [default: the
    /// authorities of this host]
    #[arg(long, value_name = "FILE")]
    tls_ca: Option<TlsFile>,

    /// Certificate to present to the server, with its chain
    #[arg(long, value_name = "FILE")]
    tls_cert: Option<TlsFile>,

    /// Its private key [default: in the file of the certificate]
    #[arg(long, value_name = "FILE")]
    tls_key: Option<TlsFile>,

    /// Name that the server's certificate must have [default: the host of its address]
    #[arg(long, value_name = "NAME")]
    tls_hostname: Option<String>,
}

/// The TLS flags of `proxy` about its upstream.
#[derive(clap::Args, Clone, Debug)]
pub struct UpstreamTlsFlags {
    /// Encrypt the connection to the server: off, on (if it offers that), or require [default:
    /// require with an option below or a URI nbds://, otherwise off]
    #[arg(long, value_name = "MODE")]
    to_tls: Option<TlsMode>,

    /// Trust it if its certificate is signed by an authority of this PEM file [default: the
    /// authorities of this host]
    #[arg(long, value_name = "FILE")]
    to_tls_ca: Option<TlsFile>,

    /// Certificate to present to it, with its chain
    #[arg(long, value_name = "FILE")]
    to_tls_cert: Option<TlsFile>,

    /// Its private key [default: in the file of the certificate]
    #[arg(long, value_name = "FILE")]
    to_tls_key: Option<TlsFile>,

    /// Name that the server's certificate must have [default: the host of its address]
    #[arg(long, value_name = "NAME")]
    to_tls_hostname: Option<String>,
}

impl From<ClientTlsFlags> for ClientTlsSettings {
    fn from(flags: ClientTlsFlags) -> Self {
        let ClientTlsFlags { tls, tls_ca, tls_cert, tls_key, tls_hostname } = flags;
        let files = TlsFiles { cert: tls_cert, key: tls_key, ca: tls_ca };
        Self { mode: tls, files, hostname: tls_hostname }
    }
}

impl From<UpstreamTlsFlags> for ClientTlsSettings {
    fn from(flags: UpstreamTlsFlags) -> Self {
        let UpstreamTlsFlags { to_tls, to_tls_ca, to_tls_cert, to_tls_key, to_tls_hostname } =
            flags;
        let files = TlsFiles { cert: to_tls_cert, key: to_tls_key, ca: to_tls_ca };
        Self { mode: to_tls, files, hostname: to_tls_hostname }
    }
}

impl ServerTlsSettings {
    /// Merges these settings with `fallback`, which provides missing values. Names replace those of
    /// `fallback`.
    #[must_use]
    pub fn or(self, fallback: Self) -> Self {
        let files = self.files().or(fallback.files());
        Self {
            tls: self.tls.or(fallback.tls),
            tls_cert: files.cert,
            tls_key: files.key,
            tls_ca: files.ca,
            tls_allow: if self.tls_allow.is_empty() { fallback.tls_allow } else { self.tls_allow },
        }
    }

    fn files(&self) -> TlsFiles {
        let Self { tls_cert, tls_key, tls_ca, .. } = self.clone();
        TlsFiles { cert: tls_cert, key: tls_key, ca: tls_ca }
    }

    /// The TLS of the server; `None` for none.
    ///
    /// # Errors
    /// A sentence that names options.
    pub fn config(&self, oldstyle: bool) -> Result<Option<ServerTlsConfig>, String> {
        let implied = if self.tls_cert.is_some() { TlsMode::On } else { TlsMode::Off };
        let mode = self.tls.unwrap_or(implied);
        if self.tls == Some(TlsMode::Off) {
            return Ok(None);
        }
        if self.tls_cert.is_none() {
            let needs = |option: &str| Err(format!("{option} needs --tls-cert as well"));
            return match self {
                Self { tls: Some(mode), .. } => needs(&format!("--tls {mode}")),
                Self { tls_key: Some(_), .. } => needs("--tls-key"),
                Self { tls_ca: Some(_), .. } => needs("--tls-ca"),
                Self { tls_allow, .. } if !tls_allow.is_empty() => needs("--tls-allow"),
                _ => Ok(None),
            };
        }
        if !self.tls_allow.is_empty() && self.tls_ca.is_none() {
            return Err(
                "--tls-allow needs --tls-ca as well, the authority of the clients".to_owned()
            );
        }
        if oldstyle {
            return Err("--oldstyle excludes --tls-cert: the old handshake has no TLS".to_owned());
        }
        Ok(Some(ServerTlsConfig { mode, files: self.files(), allow: self.tls_allow.clone() }))
    }
}

impl ClientTlsSettings {
    /// Merges these settings with `fallback`, which provides missing values.
    #[must_use]
    pub fn or(self, fallback: Self) -> Self {
        Self {
            mode: self.mode.or(fallback.mode),
            files: self.files.or(fallback.files),
            hostname: self.hostname.or(fallback.hostname),
        }
    }

    /// How to connect to the server of a URI or an address. `prefix` is that of the options.
    ///
    /// # Errors
    /// A sentence that names options.
    pub fn target(&self, server: &Target, prefix: &str) -> Result<TlsTarget, String> {
        if self.files.key.is_some() && self.files.cert.is_none() {
            return Err(format!("--{prefix}tls-key needs --{prefix}tls-cert as well"));
        }
        let of_uri = server.tls.mode;
        let mode = match (self.implied_mode(), of_uri) {
            (Some(TlsMode::Off), TlsMode::Require) => {
                return Err(format!("--{prefix}tls off contradicts nbds, which means TLS"));
            }
            (_, TlsMode::Require) => TlsMode::Require,
            (Some(mode), _) => mode,
            (None, mode) => mode,
        };
        let hostname = server.tls.hostname.clone().or_else(|| self.hostname.clone());
        let target = TlsTarget { mode, hostname };
        if mode != TlsMode::Off {
            target.server_name(&server.remote).map_err(|error| match error {
                TlsError::ServerNameMissing => format!("{error}: --{prefix}tls-hostname"),
                error => error.to_string(),
            })?;
        }
        Ok(target)
    }

    /// The TLS of a migration. The server that executes it merges its own.
    ///
    /// # Errors
    /// A sentence that names options.
    pub fn for_mirror(&self) -> Result<MirrorTls, String> {
        if self.files.key.is_some() && self.files.cert.is_none() {
            return Err("--tls-key needs --tls-cert as well".to_owned());
        }
        let Self { files, hostname, .. } = self.clone();
        Ok(MirrorTls { mode: self.implied_mode(), files, hostname })
    }

    /// The mode; an operator who names an authority wants servers verified, and one who names a
    /// certificate wants it presented.
    fn implied_mode(&self) -> Option<TlsMode> {
        let is_implied = !self.files.is_empty() || self.hostname.is_some();
        self.mode.or(is_implied.then_some(TlsMode::Require))
    }

    /// The first key of the configuration file that is set, if one is.
    #[must_use]
    pub fn first_key(&self) -> Option<&'static str> {
        let keys = [
            ("TO_TLS", self.mode.is_some()),
            ("TO_TLS_CA", self.files.ca.is_some()),
            ("TO_TLS_CERT", self.files.cert.is_some()),
            ("TO_TLS_KEY", self.files.key.is_some()),
            ("TO_TLS_HOSTNAME", self.hostname.is_some()),
        ];
        keys.into_iter().find_map(|(key, is_set)| is_set.then_some(key))
    }
}

/// A sentence about options with the keys of a configuration file in their place.
#[must_use]
pub fn with_keys(sentence: &str) -> String {
    let key = |word: &str| {
        let option = word.strip_prefix("--").filter(|name| name.starts_with(['t', 'o']));
        option.map(|name| name.to_uppercase().replace('-', "_"))
    };
    let words = sentence.split(' ').map(|word| key(word).unwrap_or_else(|| word.to_owned()));
    words.collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests;
