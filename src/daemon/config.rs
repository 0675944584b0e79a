//! The configuration of a process, complete before it starts. Only data.

use crate::disk::HolePolicy;
use crate::net::Address;
use crate::server::acl::Acl;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

/// The options and configuration keys of a process that serves or receives a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Whether to serve the disk or to receive it.
    pub role: ProcessRole,
    /// The configuration file, if there is one; error messages then name its keys, not options.
    pub config_file: Option<PathBuf>,
    /// The address to listen on; not needed when sockets are inherited.
    pub address: Option<Address>,
    /// The image file or block device.
    pub image: PathBuf,
    /// Size in bytes to create the image with if it does not exist.
    pub create: Option<u64>,
    /// Refuse writes.
    pub read_only: bool,
    /// Name of the export; clients can also select it by the empty name.
    pub export: String,
    /// Use the oldstyle handshake.
    pub oldstyle: bool,
    /// Also receive from one client that is not a flexnbd (`listen --plain`).
    pub plain: bool,
    /// The path of the control socket; not needed when one is inherited.
    pub control: Option<PathBuf>,
    /// Disconnect clients that make no progress.
    pub killswitch: bool,
    /// End after this time without a client or a migration.
    pub idle_exit: Option<Duration>,
    /// Whether to trust the holes that the file system reports.
    pub holes: HolePolicy,
    /// Access the image with `O_DIRECT`.
    pub direct: bool,
    /// Which clients may connect.
    pub admission: Admission,
}

#[cfg(test)]
impl Config {
    /// `serve --file IMAGE` without any other option.
    pub(crate) fn serve(image: impl Into<PathBuf>) -> Self {
        Self {
            role: ProcessRole::Serve,
            config_file: None,
            address: None,
            image: image.into(),
            create: None,
            read_only: false,
            export: String::new(),
            oldstyle: false,
            plain: false,
            control: None,
            killswitch: false,
            idle_exit: None,
            holes: HolePolicy::Auto,
            direct: false,
            admission: Admission { acl: Acl::default(), clients_max: 128 },
        }
    }
}

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
    /// Most clients at a time.
    pub clients_max: usize,
}

/// Reads the configuration file again; the error is a message for the operator.
pub struct RereadConfig(pub Box<dyn Fn() -> Result<Admission, String> + Send + Sync>);

impl fmt::Debug for RereadConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RereadConfig")
    }
}
