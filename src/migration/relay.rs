//! Relaying: after the handover the source keeps its clients, and passes their requests on to the server that
//! has the disk now. Only the terms; the owner of the process connects.

use super::job::{Event, Trouble};
use super::wire::Question;
use crate::disk::ownership::Id;
use crate::disk::{Backend, Disk, ExchangeError};
use std::fmt;

/// Connects to the server that has the disk after the handover, on behalf of the clients that stay.
pub trait RelayConnector: Send {
    /// Whether a client is connected. No other is admitted any more.
    fn has_clients(&self) -> bool;

    /// Connects once. The server must answer `proof` with *arrived*; without one, it cannot.
    ///
    /// # Errors
    /// [`RelayError`].
    fn connect(&mut self, proof: Option<&Question>) -> Result<Box<dyn Backend>, RelayError>;

    /// The disk of the migration `id` is used at that server from now on. The gate opens next: new clients have to be turned away
    /// before.
    fn begin(&mut self, id: Id);
}

/// Why clients cannot be passed on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RelayError {
    /// The server does not serve the disk yet. Another attempt may succeed.
    #[error("{0}")]
    NotYet(String),
    /// Another attempt would fail as well.
    #[error("{0}")]
    Unsuitable(String),
}

impl From<RelayError> for Event {
    fn from(error: RelayError) -> Self {
        match error {
            RelayError::NotYet(why) => Self::Unreachable(Trouble::Connect(why)),
            RelayError::Unsuitable(why) => Self::Failed(why),
        }
    }
}

/// Has the server's disk take the place of the image, behind the closed gate.
pub(super) fn exchange(
    disk: &Disk,
    connector: &mut dyn RelayConnector,
    id: Id,
    proof: Option<&Question>,
) -> Result<(), RelayError> {
    let backend = connector.connect(proof)?;
    let unsuitable = |error: ExchangeError| RelayError::Unsuitable(error.to_string());
    disk.exchange(backend).map_err(unsuitable)?;
    connector.begin(id);
    Ok(())
}

impl fmt::Debug for dyn RelayConnector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RelayConnector")
    }
}
