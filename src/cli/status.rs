//! `flexnbd status`: its flags. Decides whether to ask a running server ([`super::operate`]) or to
//! read the image and its ownership record ([`super::offline`]).

use super::offline::{DiskArgument, OfflineStatus};
use super::operate::{CommandKind, OperatorCommand, ServerArgument};
use std::path::PathBuf;

/// The flags of `status`.
#[derive(clap::Args, Clone, Debug)]
pub struct StatusFlags {
    #[command(flatten)]
    server: ServerArgument,

    /// Instead of asking a server, look at this file or block device
    #[arg(short, long, value_name = "FILE", conflicts_with_all = ["sock", "instance"])]
    file: Option<PathBuf>,

    /// Look at the disk that this configuration file names
    #[arg(long, value_name = "FILE", conflicts_with_all = ["sock", "instance", "file"])]
    config: Option<PathBuf>,

    /// Print a JSON object rather than key=value pairs
    #[arg(long)]
    json: bool,
}

/// The subject of a `status` command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StatusSubject {
    /// A running server.
    Server(OperatorCommand),
    /// A disk, served or not.
    Disk(OfflineStatus),
}

impl StatusFlags {
    /// Checks the flags, and chooses the subject.
    ///
    /// # Errors
    /// A sentence for the operator.
    pub fn validate(self) -> Result<StatusSubject, String> {
        let Self { server, file, config, json } = self;
        let disk = file.map(DiskArgument::File).or(config.map(DiskArgument::Config));
        Ok(match disk {
            Some(disk) => StatusSubject::Disk(OfflineStatus { disk, json }),
            None => StatusSubject::Server(OperatorCommand {
                socket: server.socket()?,
                kind: CommandKind::Status { json },
            }),
        })
    }
}
