//! Messages to the service manager, whose loss is logged and never stops the process.

use std::io;
use tracing::warn;

/// Logs that a message to the service manager could not be sent.
pub(super) fn log_unsent(sent: io::Result<()>) {
    if let Err(error) = sent {
        warn!("cannot notify the service manager: {error}");
    }
}
