//! The command line: one struct per command, one file per kind.
//! Decides what was meant and says what was not understood; never does the work itself.

pub mod adopt;
pub mod config;
pub mod instance;
pub mod listen;
pub mod mirror;
pub mod offline;
pub mod operate;
mod output;
mod progress;
pub mod serve;
pub mod settings;
pub mod size;
pub mod start;
#[cfg(test)]
mod tests;
pub mod transfer;
pub mod uri;
pub mod usage;
mod wait;

use crate::daemon::{self, ProcessEnd, StartError};
use crate::fatal;
use crate::message_id;
use crate::systemd::{Verbosity, journal};
use adopt::Adopt;
use clap::error::ErrorKind;
use clap::{CommandFactory, Parser, Subcommand};
use offline::OfflineStatus;
use operate::{CommandKind, OperatorCommand, StatusSubject};
use start::{StartRequest, StartRequestError};
use std::ffi::OsString;
use std::process::ExitCode;
use transfer::Transfer;
use usage::UsageError;

/// The modes, in the order in which they are shown.
pub const MODES: [&str; 12] = [
    "serve",
    "listen",
    "mirror",
    "mirror-speed",
    "break",
    "read",
    "write",
    "acl",
    "status",
    "reload",
    "adopt",
    "help",
];

/// A command line that can be meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Invocation {
    /// How much to log.
    pub verbosity: Verbosity,
    /// What to do.
    pub command: CliCommand,
}

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CliCommand {
    /// Serve a disk, or receive one.
    Start(StartRequest),
    /// Copy from a server to standard output.
    Read(Transfer),
    /// Copy from standard input to a server.
    Write(Transfer),
    /// Tell a running server something.
    Operate(OperatorCommand),
    /// Tell what is known of a disk, whether it is served or not.
    Inspect(OfflineStatus),
    /// Declare a copy of a disk the canonical one.
    Adopt(Adopt),
    /// Show this text.
    Help(String),
}

/// Why nothing is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stop {
    /// Only help or the version was asked for; this is it.
    Answer(String),
    /// It cannot be meant.
    Misuse(UsageError),
}

/// Runs one command; `arguments` begin with the program's own name.
#[must_use]
pub fn run(arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let status = match parse(arguments) {
        Ok(invocation) => invocation.run(),
        Err(Stop::Answer(text)) => output::say(&text),
        Err(Stop::Misuse(misuse)) => output::complain(&misuse.to_string(), output::EXIT_USAGE),
    };
    journal::flush();
    status
}

/// What a command line means; `arguments` begin with the program's own name. Pure.
///
/// # Errors
/// [`Stop`]: help was asked for, or it cannot be meant.
pub fn parse(arguments: impl Iterator<Item = OsString>) -> Result<Invocation, Stop> {
    let arguments: Vec<OsString> = arguments.collect();
    let line = CommandLine::try_parse_from(&arguments)
        .map_err(|error| stopped(&error, mode_of(&arguments)))?;
    let (within_mode, command) = line.mode.checked()?;
    // What comes after the mode comes last, and the last one wins.
    let verbosity = within_mode.verbosity().or(line.loudness.verbosity()).unwrap_or_default();
    Ok(Invocation { verbosity, command })
}

/// The parser itself, for whoever wants to know every option: the manual's test does.
#[must_use]
pub fn command() -> clap::Command {
    CommandLine::command()
}

impl Invocation {
    fn run(self) -> ExitCode {
        // Once in a process, and this is where it begins.
        let _ = journal::init(self.verbosity);
        daemon::signals::ignore_file_size_signal();
        match self.command {
            CliCommand::Start(start) => run_start(&start),
            CliCommand::Read(transfer) => transfer::read(&transfer),
            CliCommand::Write(transfer) => transfer::write(&transfer),
            CliCommand::Operate(order) => operate::run(&order),
            CliCommand::Inspect(offline) => offline::run(&offline),
            CliCommand::Adopt(adopt) => adopt::run(&adopt),
            CliCommand::Help(text) => output::say(&text),
        }
    }
}

fn run_start(start: &StartRequest) -> ExitCode {
    let plan = match start.plan() {
        Ok(plan) => plan,
        Err(no_plan) => return run_without_plan(start, &no_plan),
    };
    match daemon::run(plan, start.reread()) {
        Ok(ending) => ended(&ending),
        Err(refusal @ StartError::NoAddress) => misused(start, refusal.to_string()),
        Err(refusal) => {
            let (message_id, errno) = (refusal.message_id(), refusal.errno());
            fatal!(message_id, errno, "{refusal}");
            ExitCode::from(output::EXIT_CONFIG)
        }
    }
}

/// Nothing is to be done but to say so, to a client that waits for the service as well.
fn run_without_plan(start: &StartRequest, no_plan: &StartRequestError) -> ExitCode {
    let (StartRequestError::Misuse(sentence) | StartRequestError::Config(sentence)) = no_plan;
    if let Some(ending) = daemon::refuse(start.role, start.settings.sock.clone(), sentence) {
        return ended(&ending);
    }
    match no_plan {
        StartRequestError::Misuse(sentence) => misused(start, sentence.clone()),
        StartRequestError::Config(sentence) => {
            fatal!(message_id = message_id::REFUSING_CONFIGURATION, "{sentence}");
            ExitCode::from(output::EXIT_CONFIG)
        }
    }
}

fn ended(ending: &ProcessEnd) -> ExitCode {
    match ending {
        ProcessEnd::Well => ExitCode::SUCCESS,
        ProcessEnd::Badly(why) => {
            fatal!(message_id = message_id::FAILED, "{why}");
            ExitCode::from(output::EXIT_FAILURE)
        }
    }
}

fn misused(start: &StartRequest, sentence: String) -> ExitCode {
    let misuse = misuse(Some(start.mode()), sentence);
    output::complain(&misuse.to_string(), output::EXIT_USAGE)
}

/// Serve a disk image or block device over NBD
#[derive(Parser, Debug)]
#[command(
    name = "flexnbd",
    version,
    override_usage = "flexnbd MODE [OPTION]...",
    subcommand_value_name = "MODE",
    subcommand_help_heading = "Modes",
    disable_help_subcommand = true,
    args_override_self = true
)]
struct CommandLine {
    #[command(flatten)]
    loudness: Loudness,
    #[command(subcommand)]
    mode: Mode,
}

/// Options that may stand before and after the mode.
#[derive(clap::Args, Clone, Copy, Debug)]
struct Loudness {
    /// Log everything; the last of -v and -q wins
    #[arg(short, long, overrides_with = "quiet")]
    verbose: bool,
    /// Log only what ends the program
    #[arg(short, long, overrides_with = "verbose")]
    quiet: bool,
}

/// The options of a mode, and those of all modes.
#[derive(clap::Args, Debug)]
struct With<T: clap::Args> {
    #[command(flatten)]
    flags: T,
    #[command(flatten)]
    loudness: Loudness,
}

#[derive(Subcommand, Debug)]
enum Mode {
    /// Serve a disk
    #[command(
        override_usage = "flexnbd serve --file FILE [--addr ADDR --port PORT] [OPTION]... [ACL_ENTRY]..."
    )]
    Serve(With<serve::ServeFlags>),
    /// Receive a disk from another server, and end when it has arrived
    #[command(
        override_usage = "flexnbd listen --file FILE [--addr ADDR --port PORT] [OPTION]... [ACL_ENTRY]..."
    )]
    Listen(With<listen::ListenFlags>),
    /// Move the disk of a running server to another server, while clients use it
    #[command(override_usage = "flexnbd mirror --addr ADDR --port PORT --sock SOCK [OPTION]...")]
    Mirror(With<mirror::MirrorFlags>),
    /// Change the speed limit of a running migration
    #[command(override_usage = "flexnbd mirror-speed --sock SOCK --max-speed RATE [OPTION]...")]
    MirrorSpeed(With<mirror::SpeedFlags>),
    /// Stop a running migration; the disk stays
    #[command(override_usage = "flexnbd break --sock SOCK [OPTION]...")]
    Break(With<operate::ServerFlags>),
    /// Copy bytes from a server to standard output
    #[command(
        override_usage = "flexnbd read --addr ADDR --port PORT --from OFFSET --size SIZE [OPTION]..."
    )]
    Read(With<transfer::TransferFlags>),
    /// Copy bytes from standard input to a server
    #[command(
        override_usage = "flexnbd write --addr ADDR --port PORT --from OFFSET --size SIZE [OPTION]..."
    )]
    Write(With<transfer::TransferFlags>),
    /// Replace the access control list of a running server
    #[command(override_usage = "flexnbd acl --sock SOCK [OPTION]... ACL_ENTRY...")]
    Acl(With<operate::AclFlags>),
    /// Show how a running server is doing, or what is known of a disk
    #[command(override_usage = "flexnbd status --sock SOCK [OPTION]...")]
    Status(With<operate::StatusFlags>),
    /// Make a running server read its configuration file again
    #[command(override_usage = "flexnbd reload --sock SOCK [OPTION]...")]
    Reload(With<operate::ServerFlags>),
    /// Declare this copy of a disk the canonical one
    #[command(override_usage = "flexnbd adopt --file FILE [OPTION]...")]
    Adopt(With<Adopt>),
    /// Show help, for all modes or for one
    #[command(override_usage = "flexnbd help [MODE] [OPTION]...")]
    Help(With<HelpFlags>),
}

#[derive(clap::Args, Debug)]
struct HelpFlags {
    /// Mode to show help for
    #[arg(value_name = "MODE")]
    mode: Option<String>,
}

impl Loudness {
    fn verbosity(self) -> Option<Verbosity> {
        match (self.verbose, self.quiet) {
            (true, _) => Some(Verbosity::Verbose),
            (false, true) => Some(Verbosity::Quiet),
            (false, false) => None,
        }
    }
}

impl Mode {
    fn checked(self) -> Result<(Loudness, CliCommand), Stop> {
        let ordered = |mode, order: Result<OperatorCommand, String>| {
            order
                .map(CliCommand::Operate)
                .map_err(|sentence| Stop::Misuse(misuse(Some(mode), sentence)))
        };
        let wrong = |mode| move |sentence| Stop::Misuse(misuse(Some(mode), sentence));
        Ok(match self {
            Self::Serve(With { flags, loudness }) => (loudness, CliCommand::Start(flags.start())),
            Self::Listen(With { flags, loudness }) => (loudness, CliCommand::Start(flags.start())),
            Self::Read(With { flags, loudness }) => {
                (loudness, CliCommand::Read(flags.checked().map_err(wrong("read"))?))
            }
            Self::Write(With { flags, loudness }) => {
                (loudness, CliCommand::Write(flags.checked().map_err(wrong("write"))?))
            }
            Self::Mirror(With { flags, loudness }) => {
                (loudness, ordered("mirror", flags.checked())?)
            }
            Self::MirrorSpeed(With { flags, loudness }) => {
                (loudness, ordered("mirror-speed", flags.checked())?)
            }
            Self::Break(With { flags, loudness }) => {
                (loudness, ordered("break", flags.checked(CommandKind::Break))?)
            }
            Self::Acl(With { flags, loudness }) => (loudness, ordered("acl", flags.checked())?),
            Self::Status(With { flags, loudness }) => {
                let command = match flags.checked().map_err(wrong("status"))? {
                    StatusSubject::Server(order) => CliCommand::Operate(order),
                    StatusSubject::Disk(offline) => CliCommand::Inspect(offline),
                };
                (loudness, command)
            }
            Self::Reload(With { flags, loudness }) => {
                (loudness, ordered("reload", flags.checked(CommandKind::Reload))?)
            }
            Self::Adopt(With { flags, loudness }) => (loudness, CliCommand::Adopt(flags)),
            Self::Help(With { flags, loudness }) => {
                (loudness, CliCommand::Help(help(flags.mode.as_deref()).map_err(wrong("help"))?))
            }
        })
    }
}

/// What `flexnbd help [MODE]` shows.
fn help(mode: Option<&str>) -> Result<String, String> {
    let mut whole = command();
    whole.build();
    let Some(mode) = mode else { return Ok(whole.render_help().to_string()) };
    match whole.find_subcommand_mut(mode) {
        Some(command) => Ok(command.render_help().to_string()),
        None => Err(usage::unknown_mode(mode)),
    }
}

/// The parser's error in our words; help and version are no errors.
fn stopped(error: &clap::Error, mode: Option<&'static str>) -> Stop {
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            Stop::Answer(error.render().to_string())
        }
        _ => Stop::Misuse(misuse(mode, usage::sentence(error))),
    }
}

fn misuse(mode: Option<&'static str>, sentence: String) -> UsageError {
    let mut whole = command();
    let usage = match mode.and_then(|mode| whole.find_subcommand_mut(mode)) {
        Some(command) => command.render_usage(),
        None => whole.render_usage(),
    };
    let usage = usage.to_string().trim_start_matches("Usage:").trim().to_owned();
    UsageError { mode, sentence, usage }
}

/// The first argument that is no option is the mode: none of the options before it has a value.
fn mode_of(arguments: &[OsString]) -> Option<&'static str> {
    let is_option = |argument: &OsString| argument.as_encoded_bytes().starts_with(b"-");
    let first = arguments.iter().skip(1).find(|argument| !is_option(argument))?;
    MODES.into_iter().find(|mode| first == mode)
}
