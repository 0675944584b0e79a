//! What operators order: text ⇄ [`Command`].
//! Knows no socket, clock or log; a command that parses is one that can be meant.
//!
//! On the wire a command is lines, each ended by LF, then an empty line: first the word, then one
//! argument a line. The original's client sends an optional argument that was not given as an
//! empty line, which so ends the command; what follows the empty line is not looked at.

use super::reply::{MISSING_COMMAND, Reply, UNKNOWN_COMMAND};
// Values only; `core` rather than `std` because this file opens no connections.
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::fmt;
use std::num::IntErrorKind;

/// Longest line of a command, in bytes, its line break not counted.
pub const LINE_BYTES_MAX: usize = 256;
/// Most lines of a command: the word and its arguments; the empty line is not counted.
pub const LINES_MAX: usize = 4096;
/// Most arguments that `mirror` takes.
const MIRROR_ARGUMENTS_MAX: usize = 6;
/// The last argument of `mirror` when there may be no ownership record.
const NO_RECORD: &str = "no-record";
/// How many ACL entries a summary shows.
const ENTRIES_SHOWN: usize = 8;

/// One order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Tell how things are; changes nothing.
    Status,
    /// Replace the access control list.
    Acl {
        /// The new entries, not yet looked at: whoever obeys parses them.
        entries: Vec<String>,
    },
    /// Start a migration.
    Mirror(Mirror),
    /// Start a migration, and answer only when it is over. In one command, because a migration may
    /// be over, and its server gone, before a second one could ask for its end.
    MirrorWait(Mirror),
    /// Change the speed limit of the running migration, in bytes per second.
    MirrorMaxBps(u64),
    /// Stop the running migration.
    Break,
    /// Read the configuration file again.
    Reload,
}

/// Where and how to migrate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mirror {
    /// The destination.
    pub to: SocketAddr,
    /// What to do once the disk has arrived there.
    pub action: ArrivalAction,
    /// The local address to connect from; an unspecified one (`0.0.0.0`, `::`) means any and is
    /// read as `None`.
    pub bind: Option<IpAddr>,
    /// Speed limit, in bytes per second; `None` for none.
    pub max_bps: Option<u64>,
    /// Move the disk even if no ownership record can be kept. An operator's explicit word.
    pub no_record: bool,
}

/// What the source does when its disk has arrived at the destination.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ArrivalAction {
    /// Exit; what a `mirror` without an action means.
    #[default]
    Exit,
    /// Remove the image, then exit.
    Unlink,
    /// Go on serving.
    Nothing,
}

impl ArrivalAction {
    const ALL: [Self; 3] = [Self::Exit, Self::Unlink, Self::Nothing];

    /// The word on the wire.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Exit => "exit",
            Self::Unlink => "unlink",
            Self::Nothing => "nothing",
        }
    }
}

impl Command {
    /// Whether obeying changes anything; such orders are logged with who gave them.
    #[must_use]
    pub fn changes_something(&self) -> bool {
        *self != Self::Status
    }

    /// The word on the wire.
    #[must_use]
    pub fn word(&self) -> &'static str {
        match self {
            Self::Status => "status",
            Self::Acl { .. } => "acl",
            Self::Mirror(_) => "mirror",
            Self::MirrorWait(_) => "mirror_wait",
            Self::MirrorMaxBps(_) => "mirror_max_bps",
            Self::Break => "break",
            Self::Reload => "reload",
        }
    }

    /// Makes a command of its lines. Arguments to `status`, `break` and `reload`, which take none,
    /// are not looked at: the original's client passes on whatever it was given.
    ///
    /// # Errors
    ///
    /// One [`CommandError`] per way to get it wrong.
    pub fn from_lines(lines: &[String]) -> Result<Self, CommandError> {
        let (word, arguments) = lines.split_first().ok_or(CommandError::MissingCommand)?;
        Ok(match word.as_str() {
            "status" => Self::Status,
            "acl" => Self::Acl { entries: arguments.to_vec() },
            "mirror" => Self::Mirror(Mirror::from_arguments(arguments)?),
            "mirror_wait" => Self::MirrorWait(Mirror::from_arguments(arguments)?),
            "mirror_max_bps" => {
                Self::MirrorMaxBps(max_bps(arguments.first().ok_or(CommandError::MaxBpsMissing)?)?)
            }
            "break" => Self::Break,
            "reload" => Self::Reload,
            _ => return Err(CommandError::UnknownCommand),
        })
    }

    /// The bytes to send, with the empty line.
    ///
    /// # Errors
    ///
    /// Only an ACL can have no wire form: an entry that is empty, holds a line break or is longer
    /// than [`LINE_BYTES_MAX`], or more than [`LINES_MAX`] − 1 entries.
    pub fn to_wire(&self) -> Result<Vec<u8>, NoWireForm> {
        let arguments = self.arguments();
        if arguments.len() >= LINES_MAX {
            return Err(NoWireForm::TooManyEntries(arguments.len()));
        }
        let mut wire = format!("{}\n", self.word());
        for argument in &arguments {
            if argument.is_empty() || argument.contains('\n') || argument.len() > LINE_BYTES_MAX {
                return Err(NoWireForm::BadEntry(argument.clone()));
            }
            wire.push_str(argument);
            wire.push('\n');
        }
        wire.push('\n');
        Ok(wire.into_bytes())
    }

    fn arguments(&self) -> Vec<String> {
        match self {
            Self::Status | Self::Break | Self::Reload => Vec::new(),
            Self::Acl { entries } => entries.clone(),
            Self::Mirror(mirror) | Self::MirrorWait(mirror) => mirror.to_arguments(),
            Self::MirrorMaxBps(limit) => vec![limit.to_string()],
        }
    }
}

/// The order as a log tells it: the word and its arguments, a long ACL shortened.
impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())?;
        let arguments = self.arguments();
        for argument in arguments.iter().take(ENTRIES_SHOWN) {
            write!(f, " {argument}")?;
        }
        match arguments.len().checked_sub(ENTRIES_SHOWN) {
            Some(more @ 1..) => write!(f, " and {more} more"),
            _ => Ok(()),
        }
    }
}

impl Mirror {
    fn from_arguments(arguments: &[String]) -> Result<Self, CommandError> {
        let argument = |n: usize| arguments.get(n).map(String::as_str);
        let (Some(ip), Some(port)) = (argument(0), argument(1)) else {
            return Err(CommandError::MirrorWithoutDestination);
        };
        if arguments.len() > MIRROR_ARGUMENTS_MAX {
            return Err(CommandError::MirrorWithTooMuch);
        }
        let no_record = argument(5).map_or(Ok(false), no_record)?;
        let limit = argument(4).map(max_bps).transpose()?;
        Ok(Self {
            to: destination(ip, port)?,
            action: argument(2).map_or(Ok(ArrivalAction::default()), action)?,
            bind: argument(3).map_or(Ok(None), bind)?,
            // Before a sixth argument there has to be a fifth.
            max_bps: limit.filter(|limit| *limit > 0 || !no_record),
            no_record,
        })
    }

    fn to_arguments(&self) -> Vec<String> {
        let mut arguments = vec![
            self.to.ip().to_string(),
            self.to.port().to_string(),
            self.action.word().to_owned(),
        ];
        // Arguments go by position, and an empty one would end the command: a limit without a
        // bind address needs an address in between that means any.
        let limit = self.max_bps.or(self.no_record.then_some(0));
        match (self.bind, limit) {
            (Some(bind), _) => arguments.push(bind.to_string()),
            (None, Some(_)) => arguments.push(any_address_like(self.to.ip()).to_string()),
            (None, None) => {}
        }
        arguments.extend(limit.map(|limit| limit.to_string()));
        arguments.extend(self.no_record.then(|| NO_RECORD.to_owned()));
        arguments
    }
}

fn any_address_like(ip: IpAddr) -> IpAddr {
    match ip {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    }
}

fn destination(ip: &str, port: &str) -> Result<SocketAddr, CommandError> {
    let ip: IpAddr = ip.parse().map_err(|_| CommandError::BadAddress)?;
    match port.parse() {
        Ok(port @ 1..) => Ok(SocketAddr::new(ip, port)),
        _ => Err(CommandError::BadPort),
    }
}

fn action(word: &str) -> Result<ArrivalAction, CommandError> {
    ArrivalAction::ALL
        .into_iter()
        .find(|action| action.word() == word)
        .ok_or(CommandError::BadAction)
}

fn bind(ip: &str) -> Result<Option<IpAddr>, CommandError> {
    let ip: IpAddr = ip.parse().map_err(|_| CommandError::BadBindAddress)?;
    Ok((!ip.is_unspecified()).then_some(ip))
}

fn no_record(word: &str) -> Result<bool, CommandError> {
    if word == NO_RECORD { Ok(true) } else { Err(CommandError::BadRecordWord) }
}

fn max_bps(number: &str) -> Result<u64, CommandError> {
    number.parse().map_err(|error: std::num::ParseIntError| match error.kind() {
        IntErrorKind::PosOverflow => CommandError::MaxBpsTooLarge,
        _ => CommandError::MaxBpsNotANumber,
    })
}

/// A command that is still arriving.
#[derive(Debug, Default)]
pub struct Incoming {
    lines: Vec<String>,
    partial: Vec<u8>,
}

impl Incoming {
    /// Takes the bytes that arrived next, however they were cut. `None`: the command is not
    /// complete. What follows a complete command is dropped.
    ///
    /// # Errors
    ///
    /// A limit was exceeded, a line is not UTF-8, or the complete command is refused by
    /// [`Command::from_lines`]. Nothing more may be fed then.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<Option<Command>, CommandError> {
        for &byte in bytes {
            match byte {
                b'\n' if self.partial.is_empty() => {
                    return Command::from_lines(&self.lines).map(Some);
                }
                b'\n' => self.end_line()?,
                _ => self.extend_line(byte)?,
            }
        }
        Ok(None)
    }

    /// The connection ended without an empty line: complete lines count as a complete command
    /// (simple tools just close), a line cut short does not (it may be half a number).
    ///
    /// # Errors
    ///
    /// As for [`Incoming::feed`], and [`CommandError::CutShort`].
    pub fn end(self) -> Result<Command, CommandError> {
        if !self.partial.is_empty() {
            return Err(CommandError::CutShort);
        }
        Command::from_lines(&self.lines)
    }

    /// Whether nothing has arrived yet.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.lines.is_empty() && self.partial.is_empty()
    }

    fn end_line(&mut self) -> Result<(), CommandError> {
        let line = String::from_utf8(std::mem::take(&mut self.partial));
        self.lines.push(line.map_err(|_| CommandError::NotText)?);
        Ok(())
    }

    fn extend_line(&mut self, byte: u8) -> Result<(), CommandError> {
        if self.lines.len() == LINES_MAX {
            return Err(CommandError::TooManyLines);
        }
        if self.partial.len() == LINE_BYTES_MAX {
            return Err(CommandError::LineTooLong);
        }
        self.partial.push(byte);
        Ok(())
    }
}

/// Why an order was not understood. Its `Display` is the text of the [`Reply`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CommandError {
    /// Nothing was ordered.
    MissingCommand,
    /// The first line is no word we know.
    UnknownCommand,
    /// A line is longer than [`LINE_BYTES_MAX`].
    LineTooLong,
    /// There are more lines than [`LINES_MAX`].
    TooManyLines,
    /// A line is not UTF-8.
    NotText,
    /// The connection ended in the middle of a line.
    CutShort,
    /// `mirror` without address and port.
    MirrorWithoutDestination,
    /// `mirror` with more arguments than it takes.
    MirrorWithTooMuch,
    /// `mirror`: the address is none.
    BadAddress,
    /// `mirror`: the port is none.
    BadPort,
    /// `mirror`: the action is none of three.
    BadAction,
    /// `mirror`: the address to connect from is none.
    BadBindAddress,
    /// `mirror`: the sixth argument is not the one that there is.
    BadRecordWord,
    /// `mirror_max_bps` without a number.
    MaxBpsMissing,
    /// The limit is not a number.
    MaxBpsNotANumber,
    /// The limit does not fit 64 bits.
    MaxBpsTooLarge,
}

impl fmt::Display for CommandError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::MissingCommand => f.write_str("missing command"),
            Self::UnknownCommand => f.write_str("unknown command"),
            Self::LineTooLong => write!(f, "line longer than {LINE_BYTES_MAX} bytes"),
            Self::TooManyLines => write!(f, "more than {LINES_MAX} lines"),
            Self::NotText => f.write_str("line is not UTF-8 text"),
            Self::CutShort => f.write_str("command ends in the middle of a line"),
            Self::MirrorWithoutDestination => f.write_str("mirror needs an IP address and a port"),
            Self::MirrorWithTooMuch => {
                write!(f, "mirror takes at most {MIRROR_ARGUMENTS_MAX} arguments")
            }
            Self::BadAddress => f.write_str("bad IP address"),
            Self::BadPort => f.write_str("bad port: must be 1 to 65535"),
            Self::BadAction => f.write_str("bad action: must be exit, unlink or nothing"),
            Self::BadBindAddress => f.write_str("bad bind address"),
            Self::BadRecordWord => write!(f, "bad word: must be {NO_RECORD}, or not there"),
            Self::MaxBpsMissing => f.write_str("max_bps missing"),
            Self::MaxBpsNotANumber => f.write_str("max_bps is not a number"),
            Self::MaxBpsTooLarge => f.write_str("max_bps is out of range"),
        }
    }
}

impl std::error::Error for CommandError {}

impl From<CommandError> for Reply {
    fn from(refusal: CommandError) -> Self {
        match refusal {
            CommandError::MissingCommand => Self::new(MISSING_COMMAND, refusal.to_string()),
            CommandError::UnknownCommand => Self::new(UNKNOWN_COMMAND, refusal.to_string()),
            _ => Self::refused(refusal.to_string()),
        }
    }
}

/// A command that cannot be said on the wire.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NoWireForm {
    /// This ACL entry is empty, holds a line break or is longer than [`LINE_BYTES_MAX`].
    BadEntry(String),
    /// So many ACL entries, where at most [`LINES_MAX`] − 1 fit.
    TooManyEntries(usize),
}

impl fmt::Display for NoWireForm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::BadEntry(entry) => write!(
                f,
                "{entry:?} cannot be sent: an entry is one line of 1 to {LINE_BYTES_MAX} bytes"
            ),
            Self::TooManyEntries(count) => {
                write!(f, "{count} entries are too many, {} can be sent", LINES_MAX - 1)
            }
        }
    }
}

impl std::error::Error for NoWireForm {}

#[cfg(test)]
mod tests;
