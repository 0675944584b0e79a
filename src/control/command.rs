//! Commands of the control socket: [`Command`] ⇄ text.
//! Pure: no socket, clock or log. A command that parses is valid.
//!
//! On the wire a command is lines, each ended by LF, then an empty line: first the word, then one
//! argument per line. The client of the original flexnbd sends an omitted optional argument as an
//! empty line, which ends the command; bytes after the empty line are ignored.

mod relay;
mod tls;

use super::reply::{MISSING_COMMAND, Reply, UNKNOWN_COMMAND};
// Values only; `core` rather than `std` because this file opens no connections.
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::fmt;
use std::num::IntErrorKind;

pub use relay::{RELAY_SECONDS_MAX, RelayOptions, RelayRequest};
pub use tls::MirrorTls;

/// Longest line of a command, in bytes, its line break not counted.
pub const LINE_BYTES_MAX: usize = 256;
/// Most lines of a command: the word and its arguments, without the empty line.
pub const LINES_MAX: usize = 4096;
/// Most arguments that `mirror` takes.
const MIRROR_ARGUMENTS_MAX: usize = 17;
/// Position of the first of the words at the end of `mirror`'s arguments.
const WORDS_AT: usize = 5;
/// The word of `mirror` if it may move a disk without an ownership record; before all others.
const NO_RECORD: &str = "no-record";
/// Most ACL entries shown in the log.
const ENTRIES_SHOWN: usize = 8;

/// A command of an operator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Report the status; changes nothing.
    Status,
    /// Replace the access control list.
    Acl {
        /// The new entries; the operator parses them.
        entries: Vec<String>,
    },
    /// Start a migration.
    Mirror(Mirror),
    /// Start a migration, and reply when it has ended. One command, because the migration may have
    /// ended, and its server exited, before a second command could ask for its end.
    MirrorWait(Mirror),
    /// Change the speed limit of the running migration, in bytes per second.
    MirrorMaxBps(u64),
    /// Stop the running migration.
    Break,
    /// Reload the configuration file.
    Reload,
}

/// The destination and options of a migration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mirror {
    /// The destination.
    pub to: SocketAddr,
    /// The action of the source once the disk has arrived.
    pub action: ArrivalAction,
    /// The local address to connect from; an unspecified one (`0.0.0.0`, `::`) means any and is
    /// read as `None`.
    pub bind: Option<IpAddr>,
    /// Speed limit, in bytes per second; `None` for no limit.
    pub max_bps: Option<u64>,
    /// Move the disk even if no ownership record can be kept.
    pub no_record: bool,
    /// What becomes of the clients.
    pub relay: RelayRequest,
    /// TLS with the destination.
    pub tls: Box<MirrorTls>,
}

#[cfg(test)]
impl Mirror {
    /// A migration to this address, without options.
    pub(crate) fn plain(to: &str) -> Self {
        Self {
            to: to.parse().unwrap(),
            action: ArrivalAction::Exit,
            bind: None,
            max_bps: None,
            no_record: false,
            relay: RelayRequest::AsConfigured,
            tls: Box::default(),
        }
    }
}

/// The action of the source once its disk has arrived at the destination.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ArrivalAction {
    /// Exit; the default of `mirror`.
    #[default]
    Exit,
    /// Remove the image, then exit.
    Unlink,
    /// Continue to serve.
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
    /// Whether the command changes anything; such commands are logged with the client's
    /// credentials.
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

    /// Parses the lines of a command. Arguments to `status`, `break` and `reload`, which take none,
    /// are ignored: the original's client sends all arguments of its command line.
    ///
    /// # Errors
    ///
    /// One [`CommandError`] per mistake.
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

    /// Encodes the command, with the empty line.
    ///
    /// # Errors
    ///
    /// Only for an ACL: an entry is empty, holds a line break or is longer than [`LINE_BYTES_MAX`],
    /// or there are more than [`LINES_MAX`] − 1 entries.
    pub fn to_wire(&self) -> Result<Vec<u8>, CommandEncodeError> {
        let arguments = self.arguments();
        if arguments.len() >= LINES_MAX {
            return Err(CommandEncodeError::TooManyEntries(arguments.len()));
        }
        let mut wire = format!("{}\n", self.word());
        for argument in &arguments {
            if argument.is_empty() || argument.contains('\n') || argument.len() > LINE_BYTES_MAX {
                return Err(CommandEncodeError::BadEntry(argument.clone()));
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

/// The command as the log shows it: the word and its arguments, a long ACL shortened.
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
            return Err(CommandError::TooManyMirrorArguments);
        }
        let no_record = argument(WORDS_AT) == Some(NO_RECORD);
        let (mut relay, mut tls) = (RelayRequest::default(), Box::<MirrorTls>::default());
        for word in arguments.iter().skip(WORDS_AT + usize::from(no_record)) {
            if !tls.take(word)? {
                relay.take(word)?;
            }
        }
        let fills_place = arguments.len() > WORDS_AT;
        let limit = argument(4).map(max_bps).transpose()?;
        Ok(Self {
            to: destination(ip, port)?,
            action: argument(2).map_or(Ok(ArrivalAction::default()), action)?,
            bind: argument(3).map_or(Ok(None), bind)?,
            // A limit of 0 before a word fills the place of the fifth argument.
            max_bps: limit.filter(|limit| *limit > 0 || !fills_place),
            no_record,
            relay,
            tls,
        })
    }

    fn to_arguments(&self) -> Vec<String> {
        let mut arguments = vec![
            self.to.ip().to_string(),
            self.to.port().to_string(),
            self.action.word().to_owned(),
        ];
        // Arguments are positional, and an empty one would end the command: before a limit, the
        // unspecified address stands for no bind address.
        let mut words: Vec<String> =
            self.no_record.then(|| NO_RECORD.to_owned()).into_iter().collect();
        words.extend(self.relay.words());
        words.extend(self.tls.words());
        let limit = self.max_bps.or((!words.is_empty()).then_some(0));
        match (self.bind, limit) {
            (Some(bind), _) => arguments.push(bind.to_string()),
            (None, Some(_)) => arguments.push(any_address_like(self.to.ip()).to_string()),
            (None, None) => {}
        }
        arguments.extend(limit.map(|limit| limit.to_string()));
        arguments.append(&mut words);
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

fn max_bps(number: &str) -> Result<u64, CommandError> {
    number.parse().map_err(|error: std::num::ParseIntError| match error.kind() {
        IntErrorKind::PosOverflow => CommandError::MaxBpsTooLarge,
        _ => CommandError::MaxBpsNotANumber,
    })
}

/// A command that is being received.
#[derive(Debug, Default)]
pub struct Incoming {
    lines: Vec<String>,
    partial: Vec<u8>,
}

impl Incoming {
    /// Takes the next bytes, split anywhere. `None`: the command is not complete. Bytes after a
    /// complete command are dropped.
    ///
    /// # Errors
    ///
    /// A limit is exceeded, a line is not UTF-8, or [`Command::from_lines`] refuses the command.
    /// Do not feed more bytes then.
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

    /// Ends the command at end of file, without the empty line: complete lines are a complete
    /// command (simple tools just close), but an incomplete line may be half a number.
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

    /// Whether no byte has arrived.
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

/// Why a command is invalid; the text is that of the [`Reply`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CommandError {
    /// There is no line.
    #[error("missing command")]
    MissingCommand,
    /// The first line is not a command.
    #[error("unknown command")]
    UnknownCommand,
    /// A line is longer than [`LINE_BYTES_MAX`].
    #[error("line longer than {LINE_BYTES_MAX} bytes")]
    LineTooLong,
    /// There are more than [`LINES_MAX`] lines.
    #[error("more than {LINES_MAX} lines")]
    TooManyLines,
    /// A line is not UTF-8.
    #[error("line is not UTF-8 text")]
    NotText,
    /// The connection ended in the middle of a line.
    #[error("command ends in the middle of a line")]
    CutShort,
    /// `mirror` without address and port.
    #[error("mirror needs an IP address and a port")]
    MirrorWithoutDestination,
    /// `mirror` with too many arguments.
    #[error("mirror takes at most {MIRROR_ARGUMENTS_MAX} arguments")]
    TooManyMirrorArguments,
    /// `mirror`: the address is invalid.
    #[error("bad IP address")]
    BadAddress,
    /// `mirror`: the port is invalid.
    #[error("bad port: must be 1 to 65535")]
    BadPort,
    /// `mirror`: the action is unknown.
    #[error("bad action: must be exit, unlink or nothing")]
    BadAction,
    /// `mirror`: the address to connect from is invalid.
    #[error("bad bind address")]
    BadBindAddress,
    /// `mirror`: the sixth argument or a later one is no word, or contradicts an earlier one.
    #[error(
        "bad word: must be {NO_RECORD}, no-relay, relay with relay-for=, relay-to=, relay-export=, \
         relay-tls=, relay-tls-hostname=, or tls=, tls-ca=, tls-cert=, tls-key=, tls-hostname="
    )]
    BadMirrorWord,
    /// `mirror`: the TLS mode is unknown, or a file has no absolute path.
    #[error("bad TLS: the mode must be off, on or require, and files need absolute paths")]
    BadTls,
    /// `mirror`: the time to relay is invalid.
    #[error("bad time to relay: must be 1 to {RELAY_SECONDS_MAX} seconds")]
    BadRelaySeconds,
    /// `mirror`: the address to relay to is invalid.
    #[error("bad address to relay to: must be HOST:PORT or a path")]
    BadRelayAddress,
    /// `mirror_max_bps` without a number.
    #[error("max_bps missing")]
    MaxBpsMissing,
    /// The limit is not a number.
    #[error("max_bps is not a number")]
    MaxBpsNotANumber,
    /// The limit does not fit 64 bits.
    #[error("max_bps is out of range")]
    MaxBpsTooLarge,
}

impl From<CommandError> for Reply {
    fn from(error: CommandError) -> Self {
        match error {
            CommandError::MissingCommand => Self::new(MISSING_COMMAND, error.to_string()),
            CommandError::UnknownCommand => Self::new(UNKNOWN_COMMAND, error.to_string()),
            _ => Self::refused(error.to_string()),
        }
    }
}

/// Why a command cannot be encoded.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CommandEncodeError {
    /// This ACL entry is empty, holds a line break or is longer than [`LINE_BYTES_MAX`].
    #[error("{0:?} cannot be sent: an entry is one line of 1 to {LINE_BYTES_MAX} bytes")]
    BadEntry(String),
    /// The number of ACL entries; at most [`LINES_MAX`] − 1 fit.
    #[error("{0} entries are too many, {max} can be sent", max = LINES_MAX - 1)]
    TooManyEntries(usize),
}

#[cfg(test)]
mod tests;
