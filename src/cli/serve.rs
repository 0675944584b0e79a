//! `flexnbd serve`: its flags.
//! Only says what they are called; what follows from them is decided in [`super::start`].

use super::settings::Settings;
use super::start::StartRequest;
use crate::daemon::ProcessRole;
use std::path::PathBuf;

/// The flags of `serve`.
#[derive(clap::Args, Clone, Debug)]
pub struct ServeFlags {
    #[command(flatten)]
    settings: Settings,

    /// Read settings from this file: KEY=VALUE lines, keys named like the long options (PORT,
    /// READ_ONLY); flags win over it
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

impl ServeFlags {
    /// What is meant by them.
    #[must_use]
    pub fn start(self) -> StartRequest {
        StartRequest { role: ProcessRole::Serve, settings: self.settings, config: self.config }
    }
}
