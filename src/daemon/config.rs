//! The configuration of a process, complete before it starts. Only data.

use crate::disk::HolePolicy;
use crate::net::Address;
use crate::net::tls::{AllowedName, TlsFiles, TlsMode};
use crate::sandbox::user::UserName;
use crate::server::acl::Acl;
use crate::server::{ClientLimits, WhenFull};
use crate::upstream::{UpstreamOptions, UpstreamTarget};
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

/// The options and configuration keys of a process that serves, receives or passes on a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The disk.
    pub disk: DiskConfig,
    /// The address to listen on; not needed when sockets are inherited.
    pub address: Option<Address>,
    /// Name of the export; clients can also select it by the empty name.
    pub export: String,
    /// Use the oldstyle handshake.
    pub oldstyle: bool,
    /// The path of the control socket; not needed when one is inherited.
    pub control: Option<PathBuf>,
    /// Disconnect clients that make no progress.
    pub killswitch: bool,
    /// End after this time without a client or a migration.
    pub idle_exit: Option<Duration>,
    /// Which clients may connect.
    pub admission: Admission,
    /// What becomes of clients beyond the largest number.
    pub when_full: WhenFull,
    /// Most bytes for payloads of requests; `None` for a part of the memory.
    pub payload_memory: Option<u64>,
    /// What the process may do.
    pub confinement: ConfinementConfig,
}

/// How the process is confined.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ConfinementConfig {
    /// Restrict it to the files and system calls that it needs.
    pub sandbox: bool,
    /// The user that root becomes.
    pub user: Option<UserName>,
    /// The files that a reload reads again.
    pub read_again: Vec<PathBuf>,
}

/// The disk of a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DiskConfig {
    /// An image on this host.
    Image(ImageConfig),
    /// The export of another server.
    Upstream(UpstreamConfig),
}

/// An image, and how to use it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageConfig {
    /// The image file or block device.
    pub path: PathBuf,
    /// The configuration file, if there is one; error messages then name its keys, not options.
    pub config_file: Option<PathBuf>,
    /// Size in bytes to create the image with if it does not exist.
    pub create: Option<u64>,
    /// Refuse writes.
    pub read_only: bool,
    /// Whether to trust the holes that the file system reports.
    pub holes: HolePolicy,
    /// Access the image with `O_DIRECT`.
    pub direct: bool,
    /// How to receive the disk into the image; `None` to serve it.
    pub receiving: Option<ReceivingConfig>,
    /// What becomes of the clients when the disk moves, unless the operator says otherwise.
    pub relay: RelayDefault,
}

/// Whether clients stay when their disk moves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RelayDefault {
    /// They are disconnected.
    #[default]
    No,
    /// They stay until they leave.
    Unlimited,
    /// They stay for at most so long.
    AtMost(Duration),
}

/// How to receive a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReceivingConfig {
    /// Also overwrite a disk that has arrived or was adopted.
    pub overwrite: bool,
    /// Whether an ownership record is required.
    pub records: RecordPolicy,
    /// Also receive from one client that is not a flexnbd (`listen --plain`).
    pub plain: bool,
}

/// The export of another server, and how to use it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UpstreamConfig {
    /// The addresses of the disk, at least one, in the order in which to try them.
    pub targets: Vec<UpstreamTarget>,
    /// The options of the connections, without TLS, which is made of the files below.
    pub options: UpstreamOptions,
    /// The certificates of TLS, if a target uses it.
    pub tls: TlsFiles,
    /// Refuse writes.
    pub read_only: bool,
}

impl Config {
    /// Whether certificates are used, which a reload reads again.
    #[must_use]
    pub fn has_tls(&self) -> bool {
        self.admission.tls.is_some() || self.upstream_tls().is_some()
    }

    /// The certificates of TLS with the upstream; `None` without TLS.
    #[must_use]
    pub fn upstream_tls(&self) -> Option<&TlsFiles> {
        match &self.disk {
            DiskConfig::Upstream(upstream) if upstream.has_tls() => Some(&upstream.tls),
            _ => None,
        }
    }
}

impl UpstreamConfig {
    /// Whether a target uses TLS.
    #[must_use]
    pub fn has_tls(&self) -> bool {
        self.targets.iter().any(|target| target.tls.mode != TlsMode::Off)
    }
}

#[cfg(test)]
impl Config {
    /// `serve --file IMAGE` without any other option.
    pub(crate) fn serve(image: impl Into<PathBuf>) -> Self {
        Self {
            disk: DiskConfig::Image(ImageConfig::serve(image)),
            address: None,
            export: String::new(),
            oldstyle: false,
            control: None,
            killswitch: false,
            idle_exit: None,
            admission: Admission { acl: Acl::default(), limits: ClientLimits::of(128), tls: None },
            when_full: WhenFull::Refuse,
            payload_memory: None,
            confinement: ConfinementConfig { sandbox: true, ..ConfinementConfig::default() },
        }
    }
}

#[cfg(test)]
impl ImageConfig {
    /// The image of `serve --file IMAGE`.
    pub(crate) fn serve(image: impl Into<PathBuf>) -> Self {
        Self {
            path: image.into(),
            config_file: None,
            create: None,
            read_only: false,
            holes: HolePolicy::Auto,
            direct: false,
            receiving: None,
            relay: RelayDefault::No,
        }
    }
}

/// Whether a disk may be moved if its ownership record cannot be written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RecordPolicy {
    /// It may not.
    #[default]
    Required,
    /// It may: the operator has set `--no-record`.
    Optional,
}

/// The end of an error message: advice for the operator if no ownership record can be kept.
pub(super) const UNRECORDED_ADVICE: &str = "make room, or name another state directory in STATE_DIRECTORY; --no-record moves the disk \
     without a record";

/// Which clients may connect. A reload replaces this part of the configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Admission {
    /// The addresses of permitted clients.
    pub acl: Acl,
    /// The largest numbers of clients.
    pub limits: ClientLimits,
    /// The TLS of their connections; `None` for none.
    pub tls: Option<ServerTlsConfig>,
}

/// The TLS of a server, whose files are not read yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerTlsConfig {
    /// Whether clients must use TLS; not [`TlsMode::Off`].
    pub mode: TlsMode,
    /// Certificate, key and authorities.
    pub files: TlsFiles,
    /// The names of client certificates that are accepted; all if there are none.
    pub allow: Vec<AllowedName>,
}

/// The part of the configuration that a reload replaces.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReloadedConfig {
    /// Which clients may connect.
    pub admission: Admission,
    /// The certificates of TLS with the upstream; `None` without TLS.
    pub upstream_tls: Option<TlsFiles>,
}

impl From<Config> for ReloadedConfig {
    fn from(config: Config) -> Self {
        let upstream_tls = config.upstream_tls().cloned();
        Self { admission: config.admission, upstream_tls }
    }
}

/// Reads the configuration file again; the error is a message for the operator.
pub struct RereadConfig(pub Box<dyn Fn() -> Result<ReloadedConfig, String> + Send + Sync>);

impl fmt::Debug for RereadConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RereadConfig")
    }
}
