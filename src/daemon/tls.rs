//! The TLS of the process: reads the certificates at the start and at each reload, and warns before they
//! expire.
//! Never encrypts anything: the server, migrations and the upstream do.

use super::config::{Config, ReloadedConfig, ServerTlsConfig};
use crate::control::command::{Mirror, RelayRequest};
use crate::message_id;
use crate::net::Address;
use crate::net::tls::{
    ClientTls, ServerTls, TlsClient, TlsClientSlot, TlsError, TlsFiles, TlsMode, TlsTarget,
    TlsWarning, kernel_is_usable,
};
use crate::sync::lock;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};
use tracing::{debug, warn};

/// How often to look at the certificates. The clock may be set, so the time left is no timeout.
const CHECK_INTERVAL: Duration = Duration::from_secs(3600);
/// How often to repeat a warning about a certificate that expires.
const WARNING_INTERVAL: Duration = Duration::from_secs(12 * 3600);

/// The certificates of the process.
#[derive(Debug)]
pub(super) struct ProcessTls {
    server: Mutex<Option<LoadedServer>>,
    upstream: Option<TlsClientSlot>,
}

/// The TLS with clients, and the configuration from which it was loaded.
#[derive(Clone, Debug)]
struct LoadedServer {
    config: ServerTlsConfig,
    tls: Arc<ServerTls>,
}

/// The TLS of a migration.
#[derive(Clone, Debug)]
pub(super) struct MigrationTls {
    /// With the destination.
    pub(super) destination: Option<ClientTls>,
    /// With the server that clients are relayed to.
    pub(super) relay: RelayTls,
}

/// The TLS with a server that clients are relayed to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct RelayTls {
    /// Whether to use it, and the name of the server.
    pub(super) target: TlsTarget,
    /// The certificates, which the next process reads again.
    pub(super) files: TlsFiles,
    /// They are read, unless the last process has begun the relay.
    pub(super) client: Option<TlsClientSlot>,
}

impl ProcessTls {
    /// Reads the certificates of the configuration.
    pub(super) fn load(config: &Config) -> Result<Self, TlsError> {
        let server = config.admission.tls.clone().map(LoadedServer::load).transpose()?;
        if server.is_some() && !kernel_is_usable() {
            debug!("the kernel has no TLS; encrypted sessions end at a restart");
        }
        let upstream = config.upstream_tls().map(load_client).transpose()?;
        Ok(Self { server: Mutex::new(server), upstream: upstream.map(TlsClientSlot::new) })
    }

    /// Reads the certificates again, for new connections. Nothing has changed if that fails.
    pub(super) fn reload(&self, config: &ReloadedConfig) -> Result<(), TlsError> {
        let server = config.admission.tls.clone().map(LoadedServer::load).transpose()?;
        // Without a slot the process has an upstream that it connects to without TLS.
        let upstream = self.upstream.as_ref().zip(config.upstream_tls.as_ref());
        if let Some((slot, files)) = upstream {
            slot.set(load_client(files)?);
        }
        *lock(&self.server) = server;
        Ok(())
    }

    /// The TLS with clients; `None` for none.
    pub(super) fn server(&self) -> Option<Arc<ServerTls>> {
        self.loaded().map(|loaded| loaded.tls)
    }

    /// The TLS with the upstream; `None` for none.
    pub(super) fn upstream(&self) -> Option<TlsClientSlot> {
        self.upstream.clone()
    }

    fn loaded(&self) -> Option<LoadedServer> {
        lock(&self.server).clone()
    }

    /// The TLS of a migration: what the operator says, and else what the server has itself. A server that
    /// demands TLS of its clients does not send their disk without.
    pub(super) fn for_migration(&self, command: &Mirror) -> Result<MigrationTls, TlsError> {
        let own = self.loaded().map(|loaded| loaded.config);
        let requires = own.as_ref().is_some_and(|own| own.mode == TlsMode::Require);
        let default = if requires { TlsMode::Require } else { TlsMode::Off };
        let target = TlsTarget {
            mode: command.tls.mode.unwrap_or(default),
            hostname: command.tls.hostname.clone(),
        };
        let relay = match &command.relay {
            RelayRequest::Yes(options) if options.to.is_some() => match options.tls.mode {
                // The disk is served elsewhere, which the name of the destination is not for.
                TlsMode::Off => TlsTarget { mode: target.mode, hostname: None },
                _ => options.tls.clone(),
            },
            _ => target.clone(),
        };
        let files = command.tls.files.clone().or(own.map(|own| own.files).unwrap_or_default());
        let needs_client = [&target, &relay].iter().any(|target| target.mode != TlsMode::Off);
        let client = needs_client.then(|| load_client(&files)).transpose()?;
        let destination = match &client {
            Some(client) => client.for_address(&target, &Address::Tcp(command.to))?,
            None => None,
        };
        let client = client.map(TlsClientSlot::new);
        Ok(MigrationTls { destination, relay: RelayTls { target: relay, files, client } })
    }

    /// The TLS of the question to another host whether a disk has arrived there, after a start: that of the
    /// configuration, because the migration's own is not recorded. It is used if the host has TLS.
    pub(super) fn for_question(&self, to: &Address) -> Option<ClientTls> {
        let own = self.loaded()?.config;
        let target = TlsTarget { mode: own.mode, hostname: None };
        let client = TlsClient::load(&own.files).and_then(|client| client.for_address(&target, to));
        client.unwrap_or_else(|error| {
            warn!("cannot ask {to} with TLS: {error}");
            None
        })
    }

    /// The warnings about certificates that expire.
    fn expiries(&self, now: SystemTime) -> Vec<TlsWarning> {
        let server = self.server().and_then(|tls| tls.expiry(now));
        let upstream = self.upstream.as_ref().and_then(|slot| slot.get().expiry(now));
        server.into_iter().chain(upstream).collect()
    }

    fn is_empty(&self) -> bool {
        lock(&self.server).is_none() && self.upstream.is_none()
    }
}

#[cfg(test)]
impl ProcessTls {
    /// That of a process without TLS.
    pub(super) fn none() -> Self {
        Self { server: Mutex::default(), upstream: None }
    }
}

impl LoadedServer {
    fn load(config: ServerTlsConfig) -> Result<Self, TlsError> {
        let tls = ServerTls::load(config.mode, &config.files, &config.allow)?;
        tls.warnings(SystemTime::now()).iter().for_each(log);
        Ok(Self { config, tls: Arc::new(tls) })
    }
}

fn load_client(files: &TlsFiles) -> Result<TlsClient, TlsError> {
    let client = TlsClient::load(files)?;
    client.warnings(SystemTime::now()).iter().for_each(log);
    Ok(client)
}

fn log(warning: &TlsWarning) {
    match warning {
        TlsWarning::Expiry(..) => {
            warn!(message_id = message_id::CERTIFICATE_EXPIRY, "{warning}");
        }
        TlsWarning::KeyReadableByAll(_) => warn!("{warning}"),
    }
}

/// When to look at the certificates, and when to repeat a warning. Pure: the caller passes the time.
#[derive(Debug)]
pub(super) struct ExpiryWatch {
    next_check: Instant,
    /// The last warnings, and their time.
    logged: Option<(Vec<TlsFilesExpiry>, Instant)>,
}

/// A file, and whether its certificate has expired.
type TlsFilesExpiry = (String, bool);

impl ExpiryWatch {
    /// The certificates have just been loaded, with their warnings.
    pub(super) fn new(now: Instant) -> Self {
        Self { next_check: now + CHECK_INTERVAL, logged: None }
    }

    /// When to check next; `None` if there is no certificate.
    pub(super) fn deadline(&self, tls: &ProcessTls) -> Option<Instant> {
        (!tls.is_empty()).then_some(self.next_check)
    }

    /// Logs the warnings that are due.
    pub(super) fn warn_if_due(&mut self, tls: &ProcessTls, now: Instant) {
        if tls.is_empty() || now < self.next_check {
            return;
        }
        for warning in self.due(tls.expiries(SystemTime::now()), now) {
            log(&warning);
        }
    }

    /// The warnings to log now, of those that hold.
    fn due(&mut self, warnings: Vec<TlsWarning>, now: Instant) -> Vec<TlsWarning> {
        self.next_check = now + CHECK_INTERVAL;
        let kinds: Vec<TlsFilesExpiry> = warnings.iter().filter_map(kind).collect();
        let is_repeated = self
            .logged
            .as_ref()
            .is_some_and(|(last, at)| *last == kinds && now < *at + WARNING_INTERVAL);
        if is_repeated {
            return Vec::new();
        }
        self.logged = (!kinds.is_empty()).then_some((kinds, now));
        warnings
    }
}

fn kind(warning: &TlsWarning) -> Option<TlsFilesExpiry> {
    match warning {
        TlsWarning::Expiry(file, expiry) => Some((file.to_string(), expiry.has_expired())),
        TlsWarning::KeyReadableByAll(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::command::{MirrorTls, RelayOptions};
    use crate::net::Remote;
    use crate::net::tls::CertificateExpiry;
    use harness::pki::{Identity, Pki, Request};
    use std::fs;
    use std::path::Path;

    fn file(path: &Path) -> Option<crate::net::tls::TlsFile> {
        path.to_str().unwrap().parse().ok()
    }

    fn files(identity: &Identity, pki: &Pki) -> TlsFiles {
        TlsFiles { cert: file(&identity.cert), key: file(&identity.key), ca: file(&pki.ca()) }
    }

    fn config(mode: TlsMode, files: TlsFiles) -> Config {
        let mut config = Config::serve("/a");
        config.admission.tls = Some(ServerTlsConfig { mode, files, allow: Vec::new() });
        config
    }

    #[test]
    fn failed_reload_changes_nothing() {
        let pki = Pki::new();
        let identity = pki.issue("server", &Request::server());
        let config = config(TlsMode::On, files(&identity, &pki));
        let tls = ProcessTls::load(&config).unwrap();
        let first = tls.server().unwrap();
        let good = fs::read(&identity.cert).unwrap();
        fs::write(&identity.cert, "").unwrap();
        let reloaded = ReloadedConfig::from(config.clone());
        assert!(matches!(tls.reload(&reloaded), Err(TlsError::NoCertificate(_))));
        assert!(Arc::ptr_eq(&tls.server().unwrap(), &first));
        fs::write(&identity.cert, good).unwrap();
        tls.reload(&reloaded).unwrap();
        assert!(!Arc::ptr_eq(&tls.server().unwrap(), &first));
        tls.reload(&ReloadedConfig::from(Config::serve("/a"))).unwrap();
        assert!(tls.server().is_none() && tls.is_empty());
    }

    #[test]
    fn migration_uses_the_certificates_of_the_server() {
        let pki = Pki::new();
        let files = files(&pki.issue("server", &Request::server()), &pki);
        let mode = |own: Option<TlsMode>, command: Option<TlsMode>| {
            let config = own.map_or_else(|| Config::serve("/a"), |own| config(own, files.clone()));
            let tls = ProcessTls::load(&config).unwrap();
            let mirror_files = if own.is_some() { TlsFiles::default() } else { files.clone() };
            let of_mirror = MirrorTls { mode: command, files: mirror_files, hostname: None };
            let command = Mirror { tls: Box::new(of_mirror), ..Mirror::plain("192.0.2.1:7") };
            let migration = tls.for_migration(&command).unwrap();
            assert_eq!(
                migration.relay.target.mode,
                migration.destination.as_ref().map_or(TlsMode::Off, ClientTls::mode)
            );
            migration.destination.map(|tls| (tls.mode(), tls.server_name().to_str().into_owned()))
        };
        let (off, on, require) = (Some(TlsMode::Off), Some(TlsMode::On), Some(TlsMode::Require));
        let at = |mode| Some((mode, "192.0.2.1".to_owned()));
        assert_eq!(mode(None, None), None);
        assert_eq!(mode(on, None), None);
        assert_eq!(mode(require, None), at(TlsMode::Require));
        assert_eq!(mode(require, off), None);
        assert_eq!(mode(on, require), at(TlsMode::Require));
        assert_eq!(mode(None, on), at(TlsMode::On));
    }

    #[test]
    fn relay_elsewhere_has_a_name_of_its_own() {
        let pki = Pki::new();
        let files = files(&pki.issue("server", &Request::server()), &pki);
        let tls = ProcessTls::load(&Config::serve("/a")).unwrap();
        let relay = |to: Option<&str>, tls_of_uri: TlsTarget| {
            let to = to.map(|host| Remote::Host { host: host.to_owned(), port: 7 });
            let options = RelayOptions { to, tls: tls_of_uri, ..RelayOptions::default() };
            let of_mirror = MirrorTls {
                mode: Some(TlsMode::Require),
                files: files.clone(),
                hostname: Some("a.example".to_owned()),
            };
            let relay = RelayRequest::Yes(options);
            let command =
                Mirror { tls: Box::new(of_mirror), relay, ..Mirror::plain("192.0.2.1:7") };
            tls.for_migration(&command).unwrap().relay.target
        };
        let named =
            |mode, name: Option<&str>| TlsTarget { mode, hostname: name.map(str::to_owned) };
        let require = TlsMode::Require;
        assert_eq!(relay(None, TlsTarget::default()), named(require, Some("a.example")));
        assert_eq!(relay(Some("b"), TlsTarget::default()), named(require, None));
        assert_eq!(relay(Some("b"), named(require, Some("c"))), named(require, Some("c")));
    }

    #[test]
    fn unusable_certificates_of_a_migration_are_reported() {
        let tls = ProcessTls::load(&Config::serve("/a")).unwrap();
        let files = TlsFiles { ca: file(Path::new("/missing")), ..TlsFiles::default() };
        let of_mirror = MirrorTls { mode: Some(TlsMode::Require), files, hostname: None };
        let command = Mirror { tls: Box::new(of_mirror), ..Mirror::plain("192.0.2.1:7") };
        let error = tls.for_migration(&command).unwrap_err().to_string();
        assert_eq!(error, "cannot read /missing: it does not exist");
    }

    #[test]
    fn warnings_are_repeated_twice_a_day() {
        let start = Instant::now();
        let hours = |count: u32| start + count * CHECK_INTERVAL;
        let mut watch = ExpiryWatch::new(start);
        let warning = |expiry| vec![TlsWarning::Expiry("/c".parse().unwrap(), expiry)];
        let soon = |seconds| warning(CertificateExpiry::Soon(Duration::from_secs(seconds)));
        assert_eq!(watch.due(Vec::new(), hours(1)), []);
        assert_eq!(watch.due(soon(9), hours(2)), soon(9));
        assert_eq!(watch.next_check, hours(3));
        assert_eq!(watch.due(soon(8), hours(13)), []);
        assert_eq!(watch.due(soon(7), hours(14)), soon(7));
        assert_eq!(
            watch.due(warning(CertificateExpiry::Expired(0)), hours(15)),
            warning(CertificateExpiry::Expired(0))
        );
        assert_eq!(watch.due(Vec::new(), hours(16)), []);
        assert_eq!(watch.due(soon(9), hours(17)), soon(9));
    }
}
