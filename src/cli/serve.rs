//! `flexnbd serve`: its flags. [`super::start`] checks them, and merges the configuration file.

use super::settings::Settings;
use super::start::{ProcessRole, StartRequest};
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
    /// The request that the flags make.
    #[must_use]
    pub fn into_request(self) -> StartRequest {
        StartRequest { role: ProcessRole::Serve, settings: self.settings, config_file: self.config }
    }
}
