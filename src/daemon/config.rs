//! What a process is to do, decided before it begins, and why it may refuse to.
//! Only data: carrying it out is for its neighbours.

use super::peer_query::PeerQuery;
use crate::disk::ownership::{Id, RemoteAddress};
use crate::disk::record_store::RecordStoreError;
use crate::disk::{HolePolicy, OpenError};
use crate::message_id;
use crate::net::{Address, BindError};
use crate::server::acl::Acl;
use nix::sys::signal::Signal;
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// Everything that was decided before a disk is served or received.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// What the process is there for.
    pub role: ProcessRole,
    /// The configuration file that the operator has written, for advice.
    pub config: Option<PathBuf>,
    /// Where to listen; not needed when sockets are inherited.
    pub address: Option<Address>,
    /// The image file or block device.
    pub image: PathBuf,
    /// Size in bytes to create the image with if it does not exist.
    pub create: Option<u64>,
    /// Refuse writing.
    pub read_only: bool,
    /// Name of the export; clients reach it under the empty name as well.
    pub export: String,
    /// Greet in old style.
    pub oldstyle: bool,
    /// Receive from one writer that does not introduce itself, too.
    pub plain: bool,
    /// Where to open a control socket; not needed when one is inherited.
    pub control: Option<PathBuf>,
    /// End clients that make no progress.
    pub killswitch: bool,
    /// End when there has been neither a client nor a migration for so long.
    pub idle_exit: Option<Duration>,
    /// Whether to believe what the file system says of holes.
    pub holes: HolePolicy,
    /// Who may connect.
    pub admission: Admission,
}

/// What a process is there for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ProcessRole {
    /// To serve a disk (`flexnbd serve`).
    #[default]
    Serve,
    /// To receive one (`flexnbd listen`).
    Listen {
        /// Even into an image that holds a disk that has arrived or was adopted.
        overwrite: bool,
        /// Whether an ownership record has to be kept.
        records: RecordPolicy,
    },
}

/// Whether a disk may be moved when no ownership record of it can be kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RecordPolicy {
    /// No.
    #[default]
    Required,
    /// Yes, by an operator's explicit word (`--no-record`).
    Optional,
}

/// What else can be done when no ownership record can be kept.
pub(super) const UNRECORDED_ADVICE: &str = "make room, or name another state directory in STATE_DIRECTORY; --no-record moves the disk \
     without a record";

/// Who may connect, as far as that can change while serving.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Admission {
    /// From where.
    pub acl: Acl,
    /// How many at once.
    pub clients_max: usize,
}

/// Reads the configuration again; the error is for the operator.
pub struct RereadConfig(pub Box<dyn Fn() -> Result<Admission, String> + Send + Sync>);

impl fmt::Debug for RereadConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Reread")
    }
}

/// Why a process did not begin. An operator has to change something first.
#[derive(Debug)]
pub enum StartError {
    /// What the process was told to do cannot be meant.
    Configuration(String),
    /// The image cannot be served.
    /// With the configuration file, if there is one, whose keys the advice is about.
    Image(OpenError, Option<PathBuf>),
    /// The image's record cannot be used.
    Record(RecordStoreError),
    /// No record can be kept of the image.
    Unrecorded(RecordStoreError),
    /// The image's record says that it is not to be served or received into.
    Ownership(OwnershipDenial),
    /// The address cannot be listened on.
    Listen(BindError),
    /// The control socket cannot be opened.
    Control(crate::control::ControlSocketError),
    /// Nobody said where to listen.
    NoAddress,
    /// A socket that was handed to us is not what it should be.
    Inherited(String),
    /// The system refused something that every process needs.
    System(&'static str, io::Error),
    /// A signal that ends the process came before it began. Nothing is wrong.
    Interrupted(Signal),
}

/// What an image's record says against serving it, or receiving into it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnershipDenial {
    /// A sentence for the operator.
    pub why: String,
    /// The migration that took the disk away, and where to, if one did.
    pub departure: Option<(Id, RemoteAddress)>,
    /// What another host may say later, if it is only that which is missing.
    pub inquiry: Option<Box<PeerQuery>>,
}

impl StartError {
    /// What kind of event it is, for the journal.
    #[must_use]
    pub fn message_id(&self) -> &'static str {
        match self {
            Self::Ownership(_) => message_id::REFUSING_OWNERSHIP,
            _ => message_id::REFUSING_CONFIGURATION,
        }
    }

    /// The kernel's number for what is wrong, if it is something that the kernel has numbers for.
    #[must_use]
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Image(error, _) => error.errno(),
            Self::Record(RecordStoreError::Io { source, .. }) => source.raw_os_error(),
            Self::Unrecorded(RecordStoreError::Nowhere { attribute, .. }) => {
                attribute.raw_os_error()
            }
            Self::Listen(error) => error.errno(),
            Self::Control(error) => error.errno(),
            Self::System(_, error) => error.raw_os_error(),
            Self::Configuration(_)
            | Self::Record(_)
            | Self::Unrecorded(_)
            | Self::Ownership(_)
            | Self::NoAddress
            | Self::Inherited(_)
            | Self::Interrupted(_) => None,
        }
    }
}

impl fmt::Display for StartError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Image(error, None) => error.fmt(f),
            Self::Image(error, Some(config)) => {
                let key = |key: &str| format!("{key} in {}", config.display());
                let advice = error.to_string();
                let advice = advice.replace("--create SIZE", &key("CREATE=SIZE"));
                f.write_str(&advice.replace("serve it with --read-only", &key("set READ_ONLY=yes")))
            }
            Self::Record(error) => error.fmt(f),
            Self::Unrecorded(error) => write!(f, "{error}; {UNRECORDED_ADVICE}"),
            Self::Configuration(why) | Self::Inherited(why) => f.write_str(why),
            Self::Ownership(denial) => f.write_str(&denial.why),
            Self::Listen(error) => error.fmt(f),
            Self::Control(error) => error.fmt(f),
            Self::NoAddress => f.write_str(
                "no address to listen on: give --addr and --port, or start it through a socket \
                 unit",
            ),
            Self::System(doing, error) => write!(f, "cannot {doing}: {error}"),
            Self::Interrupted(signal) => write!(f, "received {signal}"),
        }
    }
}

impl std::error::Error for StartError {}

/// How a process ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ProcessEnd {
    /// As it should.
    Well,
    /// Not as it should, for this reason.
    Badly(String),
}
