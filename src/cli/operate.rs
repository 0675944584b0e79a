//! `flexnbd acl`, `break`, `reload` and so on: sends one command to a running server and prints its
//! reply. The reply's code becomes the exit status.

use super::instance::Instance;
use super::{output, wait};
use crate::control::command::Mirror;
use crate::control::{Command, Reply, ask};
use std::path::PathBuf;
use std::process::ExitCode;

/// Selects a server by its control socket or by its instance name.
#[derive(clap::Args, Clone, Debug)]
pub struct ServerArgument {
    /// Control socket of the server
    #[arg(short, long, value_name = "SOCK", conflicts_with = "instance")]
    sock: Option<PathBuf>,

    /// Name of the service's instance, for the control socket /run/flexnbd/NAME.sock
    #[arg(long, value_name = "NAME")]
    instance: Option<Instance>,
}

/// The flags of `acl`.
#[derive(clap::Args, Clone, Debug)]
pub struct AclFlags {
    #[command(flatten)]
    server: ServerArgument,

    /// Addresses of clients to admit, IPv4 or IPv6, each with an optional /PREFIX
    #[arg(value_name = "ACL_ENTRY")]
    entries: Vec<String>,
}

/// The flags of `reload` and `break`, which only select the server.
#[derive(clap::Args, Clone, Debug)]
pub struct ServerFlags {
    #[command(flatten)]
    server: ServerArgument,
}

/// A command to the server behind a control socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OperatorCommand {
    /// The control socket.
    pub socket: PathBuf,
    /// The command and its arguments.
    pub kind: CommandKind,
}

/// The commands that a running server executes, as given on the command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CommandKind {
    /// Replace the access control list by these entries, at least one.
    Acl(Vec<String>),
    /// Report the server's status.
    Status {
        /// Print it as JSON.
        json: bool,
    },
    /// Read the configuration file again.
    Reload,
    /// Move the disk to another server.
    Mirror {
        /// The destination and the options of the migration.
        mirror: Mirror,
        /// Show progress until the migration ends.
        wait: bool,
    },
    /// Limit the running migration to this many bytes per second; 0 removes the limit.
    MirrorSpeed(u64),
    /// Stop the running migration.
    Break,
}

impl CommandKind {
    /// The mode of the command line.
    fn mode(&self) -> &'static str {
        match self {
            Self::Acl(_) => "acl",
            Self::Status { .. } => "status",
            Self::Reload => "reload",
            Self::Mirror { .. } => "mirror",
            Self::MirrorSpeed(_) => "mirror-speed",
            Self::Break => "break",
        }
    }

    /// The command of the control protocol.
    fn command(&self) -> Command {
        match self {
            Self::Acl(entries) => Command::Acl { entries: entries.clone() },
            Self::Status { .. } => Command::Status,
            Self::Reload => Command::Reload,
            Self::Mirror { mirror, wait: false } => Command::Mirror(mirror.clone()),
            Self::Mirror { mirror, wait: true } => Command::MirrorWait(mirror.clone()),
            Self::MirrorSpeed(limit) => Command::MirrorMaxBps(*limit),
            Self::Break => Command::Break,
        }
    }

    /// Formats the server's reply for printing.
    fn format(&self, reply: &Reply) -> Result<String, String> {
        match self {
            Self::Status { json } if reply.is_success() => {
                output::format_status(reply.text(), *json)
            }
            Self::Mirror { .. } if reply.is_success() => Ok(wait::STARTED.to_owned()),
            _ => Ok(reply.text().to_owned()),
        }
    }
}

impl AclFlags {
    /// Checks the flags, and builds the command.
    ///
    /// # Errors
    /// A sentence for the operator.
    pub fn validate(self) -> Result<OperatorCommand, String> {
        let socket = self.server.socket()?;
        if self.entries.is_empty() {
            return Err("an ACL_ENTRY is missing; 0.0.0.0/0 and ::/0 admit everybody".to_owned());
        }
        Ok(OperatorCommand { socket, kind: CommandKind::Acl(self.entries) })
    }
}

impl ServerFlags {
    /// Checks the flags, and builds the command of this kind, which has no arguments.
    ///
    /// # Errors
    /// A sentence for the operator.
    pub fn validate(self, kind: CommandKind) -> Result<OperatorCommand, String> {
        Ok(OperatorCommand { socket: self.server.socket()?, kind })
    }
}

impl ServerArgument {
    /// The server's control socket.
    pub(super) fn socket(self) -> Result<PathBuf, String> {
        match (self.sock, self.instance) {
            (Some(path), _) => Ok(path),
            (None, Some(instance)) => Ok(instance.socket()),
            (None, None) => {
                Err("the server is missing: give --sock SOCK or --instance NAME".to_owned())
            }
        }
    }
}

/// Sends the command and prints the reply: to standard output on success, to standard error on
/// failure. The exit status is the reply's code, or 1 without a reply.
#[must_use]
pub fn run(command: &OperatorCommand) -> ExitCode {
    let OperatorCommand { socket, kind } = command;
    if let CommandKind::Mirror { wait: true, .. } = kind {
        return wait::run(socket, &kind.command());
    }
    let reply = ask(socket, &kind.command()).map_err(|error| error.to_string());
    match reply.and_then(|reply| Ok((reply.exit_status(), kind.format(&reply)?))) {
        Ok((0, text)) => output::print(&text),
        Ok((status, text)) => output::print_error(&text, status),
        Err(why) => {
            output::print_error(&format!("flexnbd {}: {why}", kind.mode()), output::EXIT_FAILURE)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn destination() -> Mirror {
        Mirror::plain("[::1]:7")
    }

    fn mirror(wait: bool) -> CommandKind {
        CommandKind::Mirror { mirror: destination(), wait }
    }

    #[test]
    fn each_kind_maps_to_its_control_command() {
        let entries = vec!["::1".to_owned()];
        assert_eq!(CommandKind::Acl(entries.clone()).command(), Command::Acl { entries });
        assert_eq!(CommandKind::Status { json: true }.command(), Command::Status);
        assert_eq!(CommandKind::Reload.command(), Command::Reload);
        assert_eq!(CommandKind::Break.command(), Command::Break);
        assert_eq!(CommandKind::MirrorSpeed(7).command(), Command::MirrorMaxBps(7));
        assert_eq!(mirror(false).command(), Command::Mirror(destination()));
        assert_eq!(mirror(true).command(), Command::MirrorWait(destination()));
    }

    #[test]
    fn mirror_success_prints_the_manuals_message() {
        let printed = |reply| mirror(false).format(&reply);
        assert_eq!(printed(Reply::success("Mirror started")), Ok("Migration started".to_owned()));
        let why = "mirror already running";
        assert_eq!(printed(Reply::refused(why)), Ok(why.to_owned()));
    }

    #[test]
    fn status_prints_the_line_or_json() {
        let reply = Reply::success("pid=9 is_mirroring=false");
        let printed = |json| CommandKind::Status { json }.format(&reply).unwrap();
        assert_eq!(printed(false), "pid=9 is_mirroring=false");
        assert_eq!(printed(true), r#"{"pid":9,"is_mirroring":false}"#);
        let json = CommandKind::Status { json: true };
        assert!(json.format(&Reply::success("who?")).is_err());
        assert_eq!(json.format(&Reply::refused("not now")), Ok("not now".to_owned()));
    }
}
