//! Why a process did not start, with the texts, error numbers and message ids for the operator.

use super::config::UNRECORDED_ADVICE;
use super::handover_query::HandoverQuery;
use crate::control::ControlSocketError;
use crate::disk::OpenError;
use crate::disk::ownership::{Id, RemoteAddress};
use crate::disk::record_store::RecordStoreError;
use crate::message_id;
use crate::net::BindError;
use crate::net::tls::TlsError;
use crate::sandbox::user::UserError;
use crate::upstream::UpstreamError;
use nix::sys::signal::Signal;
use std::io;
use std::path::{Path, PathBuf};

/// Why a process did not start. The operator has to change something first, except after a signal and
/// unless the error is [transient](StartError::is_transient).
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The configuration contradicts itself.
    #[error("{0}")]
    Configuration(String),
    /// The image cannot be opened, with the configuration file, if there is one.
    #[error("{}", image_advice(.0, .1.as_deref()))]
    Image(OpenError, Option<PathBuf>),
    /// The ownership record cannot be read or written.
    #[error("{0}")]
    Record(RecordStoreError),
    /// No ownership record of the image can be kept, and one is required.
    #[error("{0}; {advice}", advice = UNRECORDED_ADVICE)]
    Unrecorded(RecordStoreError),
    /// The ownership record forbids serving the image, or receiving into it.
    #[error("{}", .0.why)]
    Ownership(OwnershipDenial),
    /// Certificates or keys cannot be used.
    #[error("{0}")]
    Tls(TlsError),
    /// No upstream can be had at any of the addresses. Another start may succeed.
    #[error("{0}")]
    Upstream(UpstreamError),
    /// The address cannot be listened on.
    #[error("{0}")]
    Listen(BindError),
    /// The control socket cannot be opened.
    #[error("{0}")]
    Control(ControlSocketError),
    /// There is neither an address nor an inherited socket to listen on.
    #[error("no address to listen on: give --addr and --port, or start it through a socket unit")]
    NoAddress,
    /// An inherited socket cannot be used.
    #[error("{0}")]
    Inherited(String),
    /// The process cannot become the configured user.
    #[error("{0}")]
    User(UserError),
    /// A new file cannot be given to the configured user.
    #[error("cannot give {path} to the user of --user: {source}", path = .path.display())]
    NotGiven {
        /// The file.
        path: PathBuf,
        /// The error of the system call.
        source: io::Error,
    },
    /// A system call failed, while doing this.
    #[error("cannot {0}: {1}")]
    System(&'static str, io::Error),
    /// A signal has stopped the start. Nothing is wrong.
    #[error("received {0}")]
    Interrupted(Signal),
}

/// Why the ownership record forbids serving an image, or receiving into it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnershipDenial {
    /// A sentence for the operator.
    pub(super) why: String,
    /// The migration that moved the disk away, and its destination.
    pub(super) departure: Option<(Id, RemoteAddress)>,
    /// The question whose answer decides whether the disk may be served, if it is in doubt.
    pub(super) query: Option<Box<HandoverQuery>>,
}

impl StartError {
    /// The message id of the journal entry.
    #[must_use]
    pub fn message_id(&self) -> &'static str {
        match self {
            Self::Ownership(_) => message_id::REFUSING_OWNERSHIP,
            Self::Upstream(_) => message_id::FAILED,
            _ => message_id::REFUSING_CONFIGURATION,
        }
    }

    /// Whether a start can succeed later although the operator changes nothing.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Upstream(_))
    }

    /// The errno(3) value of the system call that failed, if one did.
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
            Self::System(_, error) | Self::NotGiven { source: error, .. } => error.raw_os_error(),
            Self::User(UserError::System(_, errno)) => Some(*errno as i32),
            Self::Configuration(_)
            | Self::Record(_)
            | Self::Unrecorded(_)
            | Self::Ownership(_)
            | Self::Tls(_)
            | Self::Upstream(_)
            | Self::NoAddress
            | Self::Inherited(_)
            | Self::User(_)
            | Self::Interrupted(_) => None,
        }
    }
}

/// The error's text; with a configuration file its advice names keys of that file, not options.
fn image_advice(error: &OpenError, config: Option<&Path>) -> String {
    let text = error.to_string();
    let Some(config) = config else { return text };
    let key = |key: &str| format!("{key} in {}", config.display());
    text.replace("--create SIZE", &key("CREATE=SIZE"))
        .replace("serve it with --read-only", &key("set READ_ONLY=yes"))
        .replace("start without --direct", &key("set DIRECT=no"))
}
