//! `flexnbd acl`, `break`, `status` and so on: one order to a running server, and its answer.
//! Decides nothing about either; the answer's number is the exit status.

use super::offline::{DiskArgument, OfflineStatus};
use super::{output, wait};
use crate::control::command::Mirror;
use crate::control::status::to_json;
use crate::control::{Command, Reply, ask};
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::str::FromStr;

/// Where the service's instances have their control sockets.
const RUN_DIRECTORY: &str = "/run/flexnbd";
/// Longest name of an instance, in bytes, so that `/run/flexnbd/NAME.sock` fits into a socket
/// address (107 bytes).
pub const INSTANCE_BYTES_MAX: usize = 89;

/// Which server is meant: by the path of its control socket, or by the name of its instance.
#[derive(clap::Args, Clone, Debug)]
pub struct ServerArgument {
    /// Control socket of the server
    #[arg(short, long, value_name = "SOCK", conflicts_with = "instance")]
    sock: Option<PathBuf>,

    /// Name of the service's instance, for the control socket /run/flexnbd/NAME.sock
    #[arg(long, value_name = "NAME")]
    instance: Option<Instance>,
}

/// The name of an instance: a file name that cannot lead elsewhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Instance(String);

/// What is wrong with the name of an instance; holds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum InstanceError {
    /// Empty, hidden, or with a slash, space or control character in it.
    NotAName(String),
    /// Longer than [`INSTANCE_BYTES_MAX`].
    TooLong(String),
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

/// The flags of `reload` and `break`, which say nothing but whom they are for.
#[derive(clap::Args, Clone, Debug)]
pub struct ServerFlags {
    #[command(flatten)]
    server: ServerArgument,
}

/// An order for the server behind a control socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OperatorCommand {
    /// The control socket.
    pub socket: PathBuf,
    /// What to do.
    pub kind: CommandKind,
}

/// What can be ordered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CommandKind {
    /// Replace the access control list by these entries, at least one.
    Acl(Vec<String>),
    /// Tell how things are.
    Status {
        /// As JSON.
        json: bool,
    },
    /// Read the configuration file again.
    Reload,
    /// Move the disk to another server.
    Mirror {
        /// Where and how.
        order: Mirror,
        /// Follow it until it ends.
        wait: bool,
    },
    /// Let the running migration send at most so many bytes per second; 0 takes the limit off.
    MirrorSpeed(u64),
    /// Stop the running migration.
    Break,
}

impl CommandKind {
    /// The mode of the command line that gives it.
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

    /// What goes to the server.
    fn command(&self) -> Command {
        match self {
            Self::Acl(entries) => Command::Acl { entries: entries.clone() },
            Self::Status { .. } => Command::Status,
            Self::Reload => Command::Reload,
            Self::Mirror { order, wait: false } => Command::Mirror(order.clone()),
            Self::Mirror { order, wait: true } => Command::MirrorWait(order.clone()),
            Self::MirrorSpeed(limit) => Command::MirrorMaxBps(*limit),
            Self::Break => Command::Break,
        }
    }

    /// The answer in the form that was asked for.
    fn presented(&self, reply: &Reply) -> Result<String, String> {
        match self {
            Self::Status { json } if reply.is_success() => as_asked(reply.text(), *json),
            Self::Mirror { .. } if reply.is_success() => Ok(wait::STARTED.to_owned()),
            _ => Ok(reply.text().to_owned()),
        }
    }
}

/// A line of `key=value` pairs as it is, or as JSON.
pub(super) fn as_asked(line: &str, json: bool) -> Result<String, String> {
    if json { to_json(line).map_err(|error| error.to_string()) } else { Ok(line.to_owned()) }
}

/// What `status` is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StatusSubject {
    /// A server.
    Server(OperatorCommand),
    /// A disk, whether there is a server or not.
    Disk(OfflineStatus),
}

impl AclFlags {
    /// What is meant by them.
    ///
    /// # Errors
    /// A sentence for the operator.
    pub fn checked(self) -> Result<OperatorCommand, String> {
        let socket = self.server.socket()?;
        if self.entries.is_empty() {
            return Err("an ACL_ENTRY is missing; 0.0.0.0/0 and ::/0 admit everybody".to_owned());
        }
        Ok(OperatorCommand { socket, kind: CommandKind::Acl(self.entries) })
    }
}

impl StatusFlags {
    /// What is meant by them.
    ///
    /// # Errors
    /// A sentence for the operator.
    pub fn checked(self) -> Result<StatusSubject, String> {
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

impl ServerFlags {
    /// What is meant by them, for an order that has no more to it than `kind`.
    ///
    /// # Errors
    /// A sentence for the operator.
    pub fn checked(self, kind: CommandKind) -> Result<OperatorCommand, String> {
        Ok(OperatorCommand { socket: self.server.socket()?, kind })
    }
}

impl ServerArgument {
    /// Its control socket.
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

impl Instance {
    /// Where its control socket is.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        Path::new(RUN_DIRECTORY).join(format!("{}.sock", self.0))
    }
}

impl FromStr for Instance {
    type Err = InstanceError;

    fn from_str(text: &str) -> Result<Self, InstanceError> {
        let odd = |c: char| c == '/' || c.is_whitespace() || c.is_control();
        if text.is_empty() || text.starts_with('.') || text.contains(odd) {
            return Err(InstanceError::NotAName(text.to_owned()));
        }
        if text.len() > INSTANCE_BYTES_MAX {
            return Err(InstanceError::TooLong(text.to_owned()));
        }
        Ok(Self(text.to_owned()))
    }
}

/// Gives the order and tells the answer: on standard output when it was carried out, else on
/// standard error. The exit status is the answer's number, or 1 when there is none.
#[must_use]
pub fn run(order: &OperatorCommand) -> ExitCode {
    if let CommandKind::Mirror { wait: true, .. } = order.kind {
        return wait::run(&order.socket, &order.kind.command());
    }
    let answer = ask(&order.socket, &order.kind.command()).map_err(|error| error.to_string());
    match answer.and_then(|reply| Ok((reply.exit_status(), order.kind.presented(&reply)?))) {
        Ok((0, text)) => output::say(&text),
        Ok((status, text)) => output::complain(&text, status),
        Err(why) => {
            let mode = order.kind.mode();
            output::complain(&format!("flexnbd {mode}: {why}"), output::EXIT_FAILURE)
        }
    }
}

impl fmt::Display for InstanceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotAName(text) => write!(
                f,
                "`{text}` is not the name of an instance, which is a word without / and without \
                 a dot at its beginning"
            ),
            Self::TooLong(text) => {
                write!(f, "`{text}` is longer than the {INSTANCE_BYTES_MAX} bytes of a name")
            }
        }
    }
}

impl std::error::Error for InstanceError {}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::command::ArrivalAction;

    #[test]
    fn each_order_is_said_in_its_own_words() {
        let entries = vec!["::1".to_owned()];
        assert_eq!(CommandKind::Acl(entries.clone()).command(), Command::Acl { entries });
        assert_eq!(CommandKind::Status { json: true }.command(), Command::Status);
        assert_eq!(CommandKind::Reload.command(), Command::Reload);
        assert_eq!(CommandKind::Break.command(), Command::Break);
        assert_eq!(CommandKind::MirrorSpeed(7).command(), Command::MirrorMaxBps(7));
        let to = "[::1]:7".parse().unwrap();
        let order =
            Mirror { to, action: ArrivalAction::Exit, bind: None, max_bps: None, no_record: false };
        let mirror = |wait| CommandKind::Mirror { order: order.clone(), wait }.command();
        assert_eq!(mirror(false), Command::Mirror(order.clone()));
        assert_eq!(mirror(true), Command::MirrorWait(order.clone()));
    }

    #[test]
    fn a_migration_that_has_begun_is_told_in_the_words_of_the_manual() {
        let to = "[::1]:7".parse().unwrap();
        let order =
            Mirror { to, action: ArrivalAction::Exit, bind: None, max_bps: None, no_record: false };
        let shown =
            |reply| CommandKind::Mirror { order: order.clone(), wait: false }.presented(&reply);
        assert_eq!(shown(Reply::success("Mirror started")), Ok("Migration started".to_owned()));
        let why = "mirror already running";
        assert_eq!(shown(Reply::refused(why)), Ok(why.to_owned()));
    }

    #[test]
    fn a_status_is_shown_as_it_came_or_as_json() {
        let reply = Reply::success("pid=9 is_mirroring=false");
        let shown = |json| CommandKind::Status { json }.presented(&reply).unwrap();
        assert_eq!(shown(false), "pid=9 is_mirroring=false");
        assert_eq!(shown(true), r#"{"pid":9,"is_mirroring":false}"#);
        let json = CommandKind::Status { json: true };
        assert!(json.presented(&Reply::success("who?")).is_err());
        assert_eq!(json.presented(&Reply::refused("not now")), Ok("not now".to_owned()));
    }
}
