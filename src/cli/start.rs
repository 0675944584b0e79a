//! `serve`, `listen` and `proxy`: merges flags and configuration file into the daemon's [`Config`].
//! Reads the configuration file and opens nothing else; the daemon opens image and sockets.

use super::config;
use super::instance::{self, is_service_config};
use super::settings::{ListenAddressError, Settings, UpstreamSettings, parse_timeout};
use super::tls::{self, ServerTlsSettings, UPSTREAM_PREFIX};
use super::uri::Target;
use crate::daemon::{
    Admission, Config, ConfinementConfig, DiskConfig, ImageConfig, ReceivingConfig, RecordPolicy,
    ReloadedConfig, RereadConfig, UpstreamConfig,
};
use crate::net::Remote;
use crate::server::acl::Acl;
use crate::server::{CLIENTS_MAX, ClientLimits, WhenFull};
use crate::small_file::{self, ReadError};
use crate::upstream::{UpstreamOptions, UpstreamTarget};
use std::env;
use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The environment variable with the default of `--timeout` of `proxy`, in seconds.
pub const TIMEOUT_VARIABLE: &str = "FLEXNBD_UPSTREAM_TIMEOUT";

/// The mode of a process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ProcessRole {
    /// It serves a disk (`flexnbd serve`).
    #[default]
    Serve,
    /// It receives a disk (`flexnbd listen`).
    Listen {
        /// Also overwrite a disk that has arrived or was adopted.
        overwrite: bool,
        /// Whether an ownership record is required.
        records: RecordPolicy,
    },
    /// It passes on the disk of another server (`flexnbd proxy`).
    Proxy {
        /// Unless the operator sets a number of clients, admit one at a time, and let others wait.
        single_client: bool,
    },
}

impl ProcessRole {
    /// Whether it receives a disk.
    #[must_use]
    pub fn receives(self) -> bool {
        matches!(self, Self::Listen { .. })
    }
}

/// A `serve`, `listen` or `proxy` command line, before the configuration file is read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StartRequest {
    /// The mode.
    pub role: ProcessRole,
    /// The settings given by flags; they take precedence over the file.
    pub settings: Settings,
    /// The path of the configuration file.
    pub config_file: Option<PathBuf>,
}

/// Why a process cannot start; holds a sentence for the operator.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StartRequestError {
    /// The command line is invalid.
    #[error("{0}")]
    Misuse(String),
    /// The configuration file cannot be read, or is invalid.
    #[error("{0}")]
    Config(String),
}

impl StartRequest {
    /// The mode of the command line.
    #[must_use]
    pub fn mode(&self) -> &'static str {
        match self.role {
            ProcessRole::Serve => "serve",
            ProcessRole::Listen { .. } => "listen",
            ProcessRole::Proxy { .. } => "proxy",
        }
    }

    /// Reads the configuration file, if there is one, and merges it with the flags.
    ///
    /// # Errors
    /// [`StartRequestError`].
    pub fn load(&self) -> Result<Config, StartRequestError> {
        let text =
            self.config_file.as_deref().map(read).transpose().map_err(StartRequestError::Config)?;
        let timeout = match self.role {
            ProcessRole::Proxy { .. } => env::var_os(TIMEOUT_VARIABLE),
            ProcessRole::Serve | ProcessRole::Listen { .. } => None,
        };
        self.merge(text.as_deref(), timeout.as_deref())
    }

    /// Reads the configuration file again for a reload; `None` if there is neither a file nor TLS, whose
    /// certificates a reload reads again.
    #[must_use]
    pub fn reread(&self) -> Option<RereadConfig> {
        let has_tls = || self.load().is_ok_and(|config| config.has_tls());
        if self.config_file.is_none() && !has_tls() {
            return None;
        }
        let request = self.clone();
        Some(RereadConfig(Box::new(move || {
            request.load().map(ReloadedConfig::from).map_err(|error| error.to_string())
        })))
    }

    /// Merges the flags with the text of the configuration file and the value of
    /// [`TIMEOUT_VARIABLE`].
    fn merge(
        &self,
        text: Option<&str>,
        timeout: Option<&OsStr>,
    ) -> Result<Config, StartRequestError> {
        let file = match (&self.config_file, text) {
            (Some(path), Some(text)) => config::parse(path, text)
                .map_err(|error| StartRequestError::Config(error.to_string()))?,
            _ => Settings::default(),
        };
        self.check_keys(&file)?;
        let settings = self.settings.clone().or(file);
        let settings = match self.role {
            ProcessRole::Serve | ProcessRole::Proxy { .. } => settings.for_serve(),
            ProcessRole::Listen { .. } => settings.for_listen(),
        };
        let acl = Acl::parse(&settings.acl, settings.default_deny)
            .map_err(|error| StartRequestError::Misuse(error.to_string()))?;
        let single = matches!(self.role, ProcessRole::Proxy { single_client: true })
            && settings.max_clients.is_none();
        let clients = settings.max_clients.unwrap_or(if single { 1 } else { CLIENTS_MAX });
        let per_address = settings.max_clients_per_address.unwrap_or(clients);
        let has_disk = settings.file.is_some() || !settings.upstream.to.is_empty();
        if let Some(file) = self.config_file.as_deref().filter(|file| is_service_config(file))
            && has_disk
            && settings.address().is_ok()
        {
            let invalid = |why| StartRequestError::Config(format!("{}: {why}", file.display()));
            instance::check(&settings).map_err(invalid)?;
        }
        let address = settings
            .address()
            .map_err(|error| StartRequestError::Misuse(self.describe_address_error(&error)))?;
        let tls = settings.tls.config(settings.oldstyle);
        let tls = tls.map_err(|why| StartRequestError::Misuse(self.describe_tls_error(&why)))?;
        Ok(Config {
            confinement: self.confinement(&settings),
            disk: self.disk(&settings, timeout).map_err(StartRequestError::Misuse)?,
            address,
            export: settings.export.unwrap_or_default(),
            oldstyle: settings.oldstyle,
            control: settings.sock,
            killswitch: settings.killswitch,
            idle_exit: settings.idle_exit.map(Duration::from_secs),
            admission: Admission { acl, limits: ClientLimits { clients, per_address }, tls },
            when_full: if single { WhenFull::Wait } else { WhenFull::Refuse },
            payload_memory: settings.payload_memory,
        })
    }

    /// How the process with these settings is confined.
    #[must_use]
    pub fn confinement(&self, settings: &Settings) -> ConfinementConfig {
        ConfinementConfig {
            sandbox: !settings.sandbox.no_sandbox,
            user: settings.sandbox.user.clone(),
            read_again: self.config_file.clone().into_iter().collect(),
        }
    }

    /// Refuses a configuration file of the other kind of service: one with an image for `proxy`, or
    /// with an upstream for `serve` and `listen`.
    fn check_keys(&self, file: &Settings) -> Result<(), StartRequestError> {
        let (key, modes) = match self.role {
            ProcessRole::Proxy { .. } => (file.first_image_key(), "`flexnbd serve`"),
            ProcessRole::Serve | ProcessRole::Listen { .. } => {
                (file.upstream.first_key(), "`flexnbd proxy`")
            }
        };
        let (Some(key), Some(path)) = (key, &self.config_file) else { return Ok(()) };
        let (path, mode) = (path.display(), self.mode());
        let why = format!("{path}: {key} is a key for {modes}, which has no meaning for `{mode}`");
        Err(StartRequestError::Config(why))
    }

    /// The disk of the process; the error is a sentence about the command line.
    fn disk(&self, settings: &Settings, timeout: Option<&OsStr>) -> Result<DiskConfig, String> {
        let receiving = match self.role {
            ProcessRole::Serve => None,
            ProcessRole::Listen { overwrite, records } => {
                Some(ReceivingConfig { overwrite, records, plain: settings.plain })
            }
            ProcessRole::Proxy { .. } => {
                return self.upstream(settings, timeout).map(DiskConfig::Upstream);
            }
        };
        let path =
            settings.file.clone().ok_or_else(|| self.missing("FILE", "--file FILE is missing"))?;
        Ok(DiskConfig::Image(ImageConfig {
            path,
            config_file: self.config_file.clone(),
            create: settings.create,
            read_only: settings.read_only,
            holes: settings.holes.unwrap_or_default(),
            direct: settings.direct,
            receiving,
            relay: settings.relay.unwrap_or_default(),
        }))
    }

    fn upstream(
        &self,
        settings: &Settings,
        timeout: Option<&OsStr>,
    ) -> Result<UpstreamConfig, String> {
        let UpstreamSettings { to, bind, cache, unflushed, connections, timeout: seconds, tls } =
            settings.upstream.clone();
        if to.is_empty() {
            let why = "the upstream is missing: give --to URI, or --conn-addr and --conn-port";
            return Err(self.missing("TO", why));
        }
        if bind.is_some() && to.iter().any(|target| matches!(target.remote, Remote::Unix(_))) {
            let of_file =
                self.config_file.as_ref().filter(|_| self.settings.upstream.bind.is_none());
            let name =
                of_file.map_or("--bind".to_owned(), |file| format!("{}: BIND", file.display()));
            return Err(format!("{name} has no meaning for a unix socket"));
        }
        let defaults = UpstreamOptions::default();
        let from_variable = timeout.map(parse_timeout_variable).transpose()?;
        let target = |target: Target| {
            let tls = tls.target(&target, UPSTREAM_PREFIX);
            let tls = tls.map_err(|why| self.describe_tls_error(&why))?;
            Ok(UpstreamTarget { remote: target.remote, export: target.export, tls })
        };
        let targets = to.into_iter().map(target).collect::<Result<_, String>>()?;
        Ok(UpstreamConfig {
            targets,
            options: UpstreamOptions {
                bind,
                client: None,
                timeout: seconds.or(from_variable).map_or(defaults.timeout, Duration::from_secs),
                unflushed_bytes_max: unflushed.unwrap_or(defaults.unflushed_bytes_max),
                connections: connections.unwrap_or(defaults.connections),
                read_ahead: cache.filter(|bytes| *bytes > 0),
                tls: None,
            },
            tls: tls.files,
            read_only: settings.read_only,
        })
    }

    /// A sentence about a missing key: that the file lacks it, or `why` without a file.
    fn missing(&self, key: &str, why: &str) -> String {
        match &self.config_file {
            None => why.to_owned(),
            Some(path) => format!("{} has no {key}=", path.display()),
        }
    }

    /// Names the options about TLS if one of them is given, else the keys of the file.
    fn describe_tls_error(&self, why: &str) -> String {
        let Settings { tls, upstream, .. } = &self.settings;
        let is_of_file = *tls == ServerTlsSettings::default() && upstream.tls.first_key().is_none();
        match &self.config_file {
            Some(path) if is_of_file => format!("{}: {}", path.display(), tls::with_keys(why)),
            _ => why.to_owned(),
        }
    }

    /// Names the options if one of them is involved, else the keys of the file.
    fn describe_address_error(&self, error: &ListenAddressError) -> String {
        match &self.config_file {
            Some(path) if self.settings.addr.is_none() && self.settings.port.is_none() => {
                format!("{}: {}", path.display(), error.with_keys())
            }
            _ => error.to_string(),
        }
    }
}

/// Parses the value of [`TIMEOUT_VARIABLE`].
fn parse_timeout_variable(value: &OsStr) -> Result<u64, String> {
    parse_timeout(&value.to_string_lossy()).map_err(|why| format!("{TIMEOUT_VARIABLE}: {why}"))
}

/// Reads a configuration file: a regular file of at most [`config::BYTES_MAX`].
///
/// # Errors
/// A sentence for the operator that names the file.
pub(super) fn read(path: &Path) -> Result<String, String> {
    let why = match small_file::read(path, config::BYTES_MAX) {
        Ok(bytes) => match String::from_utf8(bytes) {
            Ok(text) => return Ok(text),
            Err(_) => "it is not UTF-8 text".to_owned(),
        },
        Err(ReadError::NotRegular) if path.is_dir() => "it is a directory".to_owned(),
        Err(ReadError::NotRegular) => "it is not a regular file".to_owned(),
        Err(ReadError::TooLong(bytes)) => format!("it is longer than {bytes} bytes"),
        Err(ReadError::Io(error)) => match error.kind() {
            io::ErrorKind::NotFound => "it does not exist".to_owned(),
            io::ErrorKind::PermissionDenied => "permission denied".to_owned(),
            _ => error.to_string(),
        },
    };
    Err(format!("cannot read the configuration file {}: {why}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::daemon::RelayDefault;
    use crate::disk::HolePolicy;
    use crate::net::Address;
    use crate::net::tls::{TlsFiles, TlsTarget};
    use nix::sys::stat::Mode;
    use std::fs;

    fn serve(flags: Settings, config: Option<&str>) -> StartRequest {
        StartRequest {
            role: ProcessRole::Serve,
            settings: flags,
            config_file: config.map(PathBuf::from),
        }
    }

    fn file(path: &str) -> Settings {
        Settings { file: Some(path.into()), ..Settings::default() }
    }

    fn image(config: Config) -> ImageConfig {
        match config.disk {
            DiskConfig::Image(image) => image,
            DiskConfig::Upstream(upstream) => panic!("{upstream:?}"),
        }
    }

    #[test]
    fn missing_settings_have_defaults() {
        assert_eq!(serve(file("/a"), None).load(), Ok(Config::serve("/a")));
    }

    #[test]
    fn every_key_reaches_the_config() {
        let text = "ADDR=::\nPORT=7\nFILE=/a\nCREATE=1M\nSOCK=/b\nDEFAULT_DENY=1\nKILLSWITCH=1\n\
            READ_ONLY=1\nEXPORT=disk\nOLDSTYLE=1\nPLAIN=1\nMAX_CLIENTS=3\n\
            MAX_CLIENTS_PER_ADDRESS=2\nPAYLOAD_MEMORY=8M\nIDLE_EXIT=60\nHOLES=ignore\nDIRECT=yes\n\
            RELAY=60\nSANDBOX=no\nUSER=a\nACL=::1\n";
        let expected = Config {
            disk: DiskConfig::Image(ImageConfig {
                path: "/a".into(),
                config_file: Some("disk.conf".into()),
                create: Some(1 << 20),
                read_only: true,
                holes: HolePolicy::Ignore,
                direct: true,
                receiving: None,
                relay: RelayDefault::AtMost(Duration::from_secs(60)),
            }),
            address: Some(Address::Tcp("[::]:7".parse().unwrap())),
            export: "disk".to_owned(),
            oldstyle: true,
            control: Some("/b".into()),
            killswitch: true,
            idle_exit: Some(Duration::from_secs(60)),
            when_full: WhenFull::Refuse,
            payload_memory: Some(8 << 20),
            confinement: ConfinementConfig {
                sandbox: false,
                user: Some("a".parse().unwrap()),
                read_again: vec!["disk.conf".into()],
            },
            admission: Admission {
                acl: Acl::parse(&["::1"], true).unwrap(),
                limits: ClientLimits { clients: 3, per_address: 2 },
                tls: None,
            },
        };
        let request = serve(Settings::default(), Some("disk.conf"));
        assert_eq!(request.merge(Some(text), None), Ok(expected));
    }

    #[test]
    fn listen_ignores_keys_that_only_serve_uses() {
        let text = "FILE=/a\nEXPORT=disk\nACL=::1\nKILLSWITCH=1\nREAD_ONLY=1\nMAX_CLIENTS=3\n\
            MAX_CLIENTS_PER_ADDRESS=2\nPAYLOAD_MEMORY=8M\nIDLE_EXIT=60\nPLAIN=1\nDIRECT=yes\nRELAY=yes\n";
        let records = RecordPolicy::Required;
        let role = ProcessRole::Listen { overwrite: true, records };
        let request = StartRequest { role, ..serve(Settings::default(), Some("disk.conf")) };
        let config = request.merge(Some(text), None).unwrap();
        let acl = Acl::parse(&["::1"], false).unwrap();
        let admission = Admission { acl, limits: ClientLimits::of(128), tls: None };
        assert_eq!((config.export.as_str(), &config.admission), ("disk", &admission));
        assert_eq!((config.killswitch, config.idle_exit), (false, None));
        let image = image(config);
        let receiving = ReceivingConfig { overwrite: true, records, plain: true };
        assert_eq!(
            (image.receiving, image.read_only, image.direct, image.relay),
            (Some(receiving), false, true, RelayDefault::No)
        );
    }

    #[test]
    fn flags_take_precedence_over_the_file() {
        let request = serve(file("/flag"), Some("disk.conf"));
        let config = request.merge(Some("FILE=/file\nEXPORT=file\n"), None).unwrap();
        assert_eq!(config.export, "file");
        assert_eq!(image(config).path, Path::new("/flag"));
    }

    #[test]
    fn a_missing_image_is_misuse() {
        let misuse = |text: &str| Err(StartRequestError::Misuse(text.to_owned()));
        let request = serve(Settings::default(), None);
        assert_eq!(request.load(), misuse("--file FILE is missing"));
        let request = serve(Settings::default(), Some("disk.conf"));
        let expected = misuse("disk.conf has no FILE=");
        assert_eq!(request.merge(Some(""), None), expected);
    }

    #[test]
    fn address_and_port_from_different_sources_must_fit() {
        let request = serve(Settings { port: Some(7), ..file("/a") }, Some("disk.conf"));
        let error = request.merge(Some("ADDR=/run/x\n"), None).unwrap_err();
        assert!(
            matches!(error, StartRequestError::Misuse(text) if text.contains("/run/x is the path"))
        );
    }

    #[test]
    fn errors_in_the_file_name_its_keys() {
        let request = serve(file("/a"), Some("disk.conf"));
        let error = request.merge(Some("PORT=7\n"), None);
        assert_eq!(
            error,
            Err(StartRequestError::Misuse("disk.conf: PORT needs ADDR as well".into()))
        );
        let error = request.merge(Some("ADDR=::1\n"), None);
        assert_eq!(
            error,
            Err(StartRequestError::Misuse("disk.conf: ADDR ::1 needs PORT as well".into()))
        );
    }

    #[test]
    fn service_configs_must_be_expressible_in_units() {
        let text = "FILE=/a\nADDR=::\nPORT=0\n";
        let request = serve(Settings::default(), Some("/etc/flexnbd/disk.conf"));
        let why = "/etc/flexnbd/disk.conf: PORT: a socket unit needs a port that is not 0";
        assert_eq!(request.merge(Some(text), None), Err(StartRequestError::Config(why.to_owned())));
        assert!(request.merge(Some("FILE=a\n"), None).is_err());
        let by_hand = serve(Settings::default(), Some("/srv/disk.conf"));
        assert!(
            by_hand.merge(Some(text), None).is_ok()
                && by_hand.merge(Some("FILE=a\n"), None).is_ok()
        );
    }

    #[test]
    fn invalid_value_in_the_file_is_a_config_error() {
        let request = serve(file("/a"), Some("disk.conf"));
        let expected = "disk.conf, line 1: PORT: `x` is not a port, a number up to 65535";
        let error = request.merge(Some("PORT=x\n"), None);
        assert_eq!(error, Err(StartRequestError::Config(expected.to_owned())));
    }

    #[test]
    fn an_unreadable_file_is_named_with_the_reason() {
        let dir = tempfile::tempdir().unwrap();
        let binary = dir.path().join("binary");
        fs::write(&binary, [0xff, 0xfe]).unwrap();
        let missing = dir.path().join("missing");
        let pipe = dir.path().join("pipe");
        nix::unistd::mkfifo(&pipe, Mode::S_IRWXU).unwrap();
        let long = dir.path().join("long");
        fs::write(&long, "#".repeat(config::BYTES_MAX as usize + 1)).unwrap();
        for (path, why) in [
            (&*pipe, "it is not a regular file"),
            (Path::new("/dev/zero"), "it is not a regular file"),
            (&*long, "it is longer than 1048576 bytes"),
            (missing.as_path(), "it does not exist"),
            (dir.path(), "it is a directory"),
            (&binary, "it is not UTF-8 text"),
        ] {
            let request = serve(file("/a"), path.to_str());
            let text = format!("cannot read the configuration file {}: {why}", path.display());
            assert_eq!(request.load(), Err(StartRequestError::Config(text)));
        }
    }

    #[test]
    fn each_load_reads_the_file_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.conf");
        let request = serve(file("/a"), path.to_str());
        for limit in [1, 2] {
            fs::write(&path, format!("MAX_CLIENTS={limit}\n")).unwrap();
            assert_eq!(request.load().unwrap().admission.limits, ClientLimits::of(limit));
        }
    }

    fn proxy(single_client: bool) -> StartRequest {
        let role = ProcessRole::Proxy { single_client };
        StartRequest { role, ..serve(Settings::default(), Some("disk.conf")) }
    }

    fn upstream(request: &StartRequest, text: &str, timeout: Option<&str>) -> UpstreamConfig {
        match request.merge(Some(text), timeout.map(OsStr::new)).unwrap().disk {
            DiskConfig::Upstream(upstream) => upstream,
            DiskConfig::Image(image) => panic!("{image:?}"),
        }
    }

    #[test]
    fn every_key_of_a_proxy_reaches_the_config() {
        let text = "TO=nbd://a:7/disk\nBIND=::2\nCACHE=8K\nUNFLUSHED=1M\nCONNECTIONS=2\nTIMEOUT=9\n\
            READ_ONLY=yes\n";
        let target = |host: &str, port, export: &str| UpstreamTarget {
            remote: Remote::Host { host: host.to_owned(), port },
            export: export.to_owned(),
            tls: TlsTarget::default(),
        };
        let expected = UpstreamConfig {
            targets: vec![target("a", 7, "disk")],
            options: UpstreamOptions {
                bind: Some("::2".parse().unwrap()),
                client: None,
                timeout: Duration::from_secs(9),
                unflushed_bytes_max: 1 << 20,
                connections: 2,
                read_ahead: Some(8192),
                tls: None,
            },
            tls: TlsFiles::default(),
            read_only: true,
        };
        assert_eq!(upstream(&proxy(false), text, None), expected);
        let expected = UpstreamConfig {
            targets: vec![target("a", 10809, ""), target("b", 10809, "")],
            options: UpstreamOptions::default(),
            tls: TlsFiles::default(),
            read_only: false,
        };
        assert_eq!(upstream(&proxy(false), "TO=nbd://a nbd://b\nCACHE=0\n", None), expected);
    }

    #[test]
    fn the_variable_sets_the_timeout_of_a_proxy() {
        let timeout = |text: &str| upstream(&proxy(false), text, Some("7")).options.timeout;
        assert_eq!(timeout("TO=nbd://a\n"), Duration::from_secs(7));
        assert_eq!(timeout("TO=nbd://a\nTIMEOUT=9\n"), Duration::from_secs(9));
        let error = proxy(false).merge(Some("TO=nbd://a\n"), Some(OsStr::new("x"))).unwrap_err();
        let start = "FLEXNBD_UPSTREAM_TIMEOUT: `x` is not a number of seconds";
        assert!(error.to_string().starts_with(start), "{error}");
    }

    #[test]
    fn flexnbd_proxy_admits_one_client_unless_told_otherwise() {
        let clients = |single_client, text: &str| {
            let config = proxy(single_client).merge(Some(text), None).unwrap();
            (config.admission.limits.clients, config.when_full)
        };
        assert_eq!(clients(true, "TO=nbd://a\n"), (1, WhenFull::Wait));
        assert_eq!(clients(true, "TO=nbd://a\nMAX_CLIENTS=1\n"), (1, WhenFull::Refuse));
        assert_eq!(clients(false, "TO=nbd://a\n"), (128, WhenFull::Refuse));
    }

    #[test]
    fn an_upstream_is_required_and_complete() {
        let error = |text: &str| proxy(false).merge(Some(text), None).unwrap_err().to_string();
        assert_eq!(error(""), "disk.conf has no TO=");
        let without_file = StartRequest { config_file: None, ..proxy(false) };
        let missing = "the upstream is missing: give --to URI, or --conn-addr and --conn-port";
        assert_eq!(without_file.load().unwrap_err().to_string(), missing);
        let unix = error("TO=nbd+unix:///?socket=/x\nBIND=::1\n");
        assert_eq!(unix, "disk.conf: BIND has no meaning for a unix socket");
    }

    #[test]
    fn a_file_configures_either_an_image_or_an_upstream() {
        let mixed = "TO=nbd://a\nFILE=/a\n";
        let error = proxy(false).merge(Some(mixed), None).unwrap_err().to_string();
        assert!(error.starts_with("disk.conf: FILE is a key for `flexnbd serve`"), "{error}");
        let request = serve(Settings::default(), Some("disk.conf"));
        for (text, key) in [(mixed, "TO"), ("FILE=/a\nTIMEOUT=9\n", "TIMEOUT")] {
            let error = request.merge(Some(text), None).unwrap_err().to_string();
            let start = format!("disk.conf: {key} is a key for `flexnbd proxy`");
            assert!(error.starts_with(&start), "{error}");
        }
    }
}
