//! The command line: parses the arguments into one struct per command, and reports usage errors.
//! Each mode has a file; the modules on lower floors execute it.

pub mod adopt;
pub mod config;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz_tests;
pub mod instance;
pub mod listen;
pub mod mirror;
pub mod offline;
pub mod operate;
mod output;
mod progress;
pub mod proxy;
pub mod sandbox;
pub mod serve;
pub mod settings;
pub mod size;
pub mod start;
pub mod status;
#[cfg(test)]
mod tests;
pub mod tls;
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
use operate::{CommandKind, OperatorCommand};
use start::{StartRequest, StartRequestError};
use status::StatusSubject;
use std::ffi::{OsStr, OsString};
use std::process::ExitCode;
use transfer::Transfer;
use usage::UsageError;

/// The modes, in the order of the help text.
pub const MODES: [&str; 13] = [
    "serve",
    "listen",
    "proxy",
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

/// A valid command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Invocation {
    /// The log level.
    pub verbosity: Verbosity,
    /// The command.
    pub command: CliCommand,
}

/// A command with its arguments.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CliCommand {
    /// Serve a disk, receive one, or pass one on.
    Start(Box<StartRequest>),
    /// Copy from a server to standard output.
    Read(Transfer),
    /// Copy from standard input to a server.
    Write(Transfer),
    /// Send a command to a running server.
    Operate(OperatorCommand),
    /// Show the status of a disk, served or not.
    Inspect(OfflineStatus),
    /// Declare a copy of a disk the canonical one.
    Adopt(Adopt),
    /// Print this help text.
    Help(String),
}

/// The result of a command line without a command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EarlyExit {
    /// The text of `--help` or `--version`.
    Output(String),
    /// The command line is invalid.
    Misuse(UsageError),
}

/// Runs one command; `arguments` begin with the program's name.
#[must_use]
pub fn run(arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let status = match parse(arguments) {
        Ok(invocation) => invocation.run(),
        Err(EarlyExit::Output(text)) => output::print(&text),
        Err(EarlyExit::Misuse(error)) => {
            output::print_error(&error.to_string(), output::EXIT_USAGE)
        }
    };
    journal::flush();
    status
}

/// Parses a command line; `arguments` begin with the program's name. Pure.
///
/// # Errors
/// [`EarlyExit`].
pub fn parse(arguments: impl Iterator<Item = OsString>) -> Result<Invocation, EarlyExit> {
    let arguments = proxy::rewrite(arguments.collect());
    let line = CommandLine::try_parse_from(&arguments)
        .map_err(|error| early_exit(&error, mode_of(&arguments)))?;
    let program = arguments.first().map(OsString::as_os_str);
    let (verbosity_after_mode, command) = line.mode.validate(program)?;
    // The last flag wins, and those after the mode come last.
    let verbosity =
        verbosity_after_mode.verbosity().or(line.verbosity.verbosity()).unwrap_or_default();
    Ok(Invocation { verbosity, command })
}

/// The clap parser. Public because tests/manual compares its options with the manual pages.
#[must_use]
pub fn command() -> clap::Command {
    CommandLine::command()
}

impl Invocation {
    fn run(self) -> ExitCode {
        // Fails only at a second call in one process, and this is the only one.
        let _ = journal::init(self.verbosity);
        if !matches!(self.command, CliCommand::Start(_)) {
            journal::start_writer();
        }
        daemon::signals::ignore_file_size_signal();
        match self.command {
            CliCommand::Start(start) => run_start(&start),
            CliCommand::Read(transfer) => transfer::read(&transfer),
            CliCommand::Write(transfer) => transfer::write(&transfer),
            CliCommand::Operate(command) => operate::run(&command),
            CliCommand::Inspect(status) => offline::run(&status),
            CliCommand::Adopt(adopt) => adopt::run(&adopt),
            CliCommand::Help(text) => output::print(&text),
        }
    }
}

fn run_start(start: &StartRequest) -> ExitCode {
    let config = match start.load() {
        Ok(config) => config,
        Err(error) => return report_invalid_start(start, &error),
    };
    match daemon::run(config, start.reread()) {
        Ok(end) => report_end(&end),
        Err(error @ StartError::NoAddress) => report_misuse(start, error.to_string()),
        Err(error) => {
            let (message_id, errno) = (error.message_id(), error.errno());
            fatal!(message_id, errno, "{error}");
            let can_retry = error.is_transient();
            ExitCode::from(if can_retry { output::EXIT_FAILURE } else { output::EXIT_CONFIG })
        }
    }
}

/// Reports that the process cannot start: to the clients that wait at inherited sockets, or to the
/// operator if there are none.
fn report_invalid_start(start: &StartRequest, error: &StartRequestError) -> ExitCode {
    let (StartRequestError::Misuse(sentence) | StartRequestError::Config(sentence)) = error;
    let (receives, control) = (start.role.receives(), start.settings.sock.clone());
    let confinement = start.confinement(&start.settings);
    if let Some(end) = daemon::refuse(receives, control, &confinement, sentence) {
        return report_end(&end);
    }
    match error {
        StartRequestError::Misuse(sentence) => report_misuse(start, sentence.clone()),
        StartRequestError::Config(sentence) => {
            fatal!(message_id = message_id::REFUSING_CONFIGURATION, "{sentence}");
            ExitCode::from(output::EXIT_CONFIG)
        }
    }
}

fn report_end(end: &ProcessEnd) -> ExitCode {
    match end {
        ProcessEnd::Well => ExitCode::SUCCESS,
        ProcessEnd::Badly(why) => {
            fatal!(message_id = message_id::FAILED, "{why}");
            ExitCode::from(output::EXIT_FAILURE)
        }
    }
}

fn report_misuse(start: &StartRequest, sentence: String) -> ExitCode {
    let error = usage_error(Some(start.mode()), sentence);
    output::print_error(&error.to_string(), output::EXIT_USAGE)
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
    verbosity: VerbosityFlags,
    #[command(subcommand)]
    mode: Mode,
}

/// The verbosity options, accepted before and after the mode.
#[derive(clap::Args, Clone, Copy, Debug)]
struct VerbosityFlags {
    /// Log everything; the last of -v and -q wins
    #[arg(short, long, overrides_with = "quiet")]
    verbose: bool,
    /// Log only what ends the program
    #[arg(short, long, overrides_with = "verbose")]
    quiet: bool,
}

/// The options of one mode, and the common ones.
#[derive(clap::Args, Debug)]
struct ModeFlags<T: clap::Args> {
    #[command(flatten)]
    flags: T,
    #[command(flatten)]
    verbosity: VerbosityFlags,
}

#[derive(Subcommand, Debug)]
enum Mode {
    /// Serve a disk
    #[command(
        override_usage = "flexnbd serve --file FILE [--addr ADDR --port PORT] [OPTION]... [ACL_ENTRY]..."
    )]
    Serve(ModeFlags<serve::ServeFlags>),
    /// Receive a disk from another server, and end when it has arrived
    #[command(
        override_usage = "flexnbd listen --file FILE [--addr ADDR --port PORT] [OPTION]... [ACL_ENTRY]..."
    )]
    Listen(ModeFlags<listen::ListenFlags>),
    /// Pass on the disk of another server, and keep clients when that one is lost or moves the disk
    #[command(
        override_usage = "flexnbd proxy --to URI [--addr ADDR --port PORT] [OPTION]... [ACL_ENTRY]..."
    )]
    Proxy(ModeFlags<proxy::ProxyFlags>),
    /// Move the disk of a running server to another server, while clients use it
    #[command(override_usage = "flexnbd mirror --addr ADDR --port PORT --sock SOCK [OPTION]...")]
    Mirror(ModeFlags<mirror::MirrorFlags>),
    /// Change the speed limit of a running migration
    #[command(override_usage = "flexnbd mirror-speed --sock SOCK --max-speed RATE [OPTION]...")]
    MirrorSpeed(ModeFlags<mirror::SpeedFlags>),
    /// Stop a running migration; the disk stays
    #[command(override_usage = "flexnbd break --sock SOCK [OPTION]...")]
    Break(ModeFlags<operate::ServerFlags>),
    /// Copy bytes from a server to standard output
    #[command(
        override_usage = "flexnbd read --addr ADDR --port PORT --from OFFSET --size SIZE [OPTION]..."
    )]
    Read(ModeFlags<transfer::TransferFlags>),
    /// Copy bytes from standard input to a server
    #[command(
        override_usage = "flexnbd write --addr ADDR --port PORT --from OFFSET --size SIZE [OPTION]..."
    )]
    Write(ModeFlags<transfer::TransferFlags>),
    /// Replace the access control list of a running server
    #[command(override_usage = "flexnbd acl --sock SOCK [OPTION]... ACL_ENTRY...")]
    Acl(ModeFlags<operate::AclFlags>),
    /// Show how a running server is doing, or what is known of a disk
    #[command(override_usage = "flexnbd status --sock SOCK [OPTION]...")]
    Status(ModeFlags<status::StatusFlags>),
    /// Make a running server read its configuration file again
    #[command(override_usage = "flexnbd reload --sock SOCK [OPTION]...")]
    Reload(ModeFlags<operate::ServerFlags>),
    /// Declare this copy of a disk the canonical one
    #[command(override_usage = "flexnbd adopt --file FILE [OPTION]...")]
    Adopt(ModeFlags<Adopt>),
    /// Show help, for all modes or for one
    #[command(override_usage = "flexnbd help [MODE] [OPTION]...")]
    Help(ModeFlags<HelpFlags>),
}

#[derive(clap::Args, Debug)]
struct HelpFlags {
    /// Mode to show help for
    #[arg(value_name = "MODE")]
    mode: Option<String>,
}

impl VerbosityFlags {
    fn verbosity(self) -> Option<Verbosity> {
        match (self.verbose, self.quiet) {
            (true, _) => Some(Verbosity::Verbose),
            (false, true) => Some(Verbosity::Quiet),
            (false, false) => None,
        }
    }
}

impl Mode {
    fn validate(self, program: Option<&OsStr>) -> Result<(VerbosityFlags, CliCommand), EarlyExit> {
        let misuse = |mode| move |sentence| EarlyExit::Misuse(usage_error(Some(mode), sentence));
        let operate = |mode, command: Result<OperatorCommand, String>| {
            command.map(CliCommand::Operate).map_err(misuse(mode))
        };
        Ok(match self {
            Self::Serve(ModeFlags { flags, verbosity }) => {
                (verbosity, CliCommand::Start(Box::new(flags.into_request())))
            }
            Self::Listen(ModeFlags { flags, verbosity }) => {
                (verbosity, CliCommand::Start(Box::new(flags.into_request())))
            }
            Self::Proxy(ModeFlags { flags, verbosity }) => {
                let request = flags.of_program(program).into_request();
                (verbosity, CliCommand::Start(Box::new(request.map_err(misuse("proxy"))?)))
            }
            Self::Read(ModeFlags { flags, verbosity }) => {
                (verbosity, CliCommand::Read(flags.validate().map_err(misuse("read"))?))
            }
            Self::Write(ModeFlags { flags, verbosity }) => {
                (verbosity, CliCommand::Write(flags.validate().map_err(misuse("write"))?))
            }
            Self::Mirror(ModeFlags { flags, verbosity }) => {
                (verbosity, operate("mirror", flags.validate())?)
            }
            Self::MirrorSpeed(ModeFlags { flags, verbosity }) => {
                (verbosity, operate("mirror-speed", flags.validate())?)
            }
            Self::Break(ModeFlags { flags, verbosity }) => {
                (verbosity, operate("break", flags.validate(CommandKind::Break))?)
            }
            Self::Acl(ModeFlags { flags, verbosity }) => {
                (verbosity, operate("acl", flags.validate())?)
            }
            Self::Status(ModeFlags { flags, verbosity }) => {
                let command = match flags.validate().map_err(misuse("status"))? {
                    StatusSubject::Server(command) => CliCommand::Operate(command),
                    StatusSubject::Disk(status) => CliCommand::Inspect(status),
                };
                (verbosity, command)
            }
            Self::Reload(ModeFlags { flags, verbosity }) => {
                (verbosity, operate("reload", flags.validate(CommandKind::Reload))?)
            }
            Self::Adopt(ModeFlags { flags, verbosity }) => (verbosity, CliCommand::Adopt(flags)),
            Self::Help(ModeFlags { flags, verbosity }) => {
                (verbosity, CliCommand::Help(help(flags.mode.as_deref()).map_err(misuse("help"))?))
            }
        })
    }
}

/// The text of `flexnbd help [MODE]`.
fn help(mode: Option<&str>) -> Result<String, String> {
    let mut whole = command();
    whole.build();
    let Some(mode) = mode else { return Ok(whole.render_help().to_string()) };
    match whole.find_subcommand_mut(mode) {
        Some(command) => Ok(command.render_help().to_string()),
        None => Err(usage::unknown_mode(mode)),
    }
}

/// Converts the parser's error; clap also returns help and version as errors.
fn early_exit(error: &clap::Error, mode: Option<&'static str>) -> EarlyExit {
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            EarlyExit::Output(error.render().to_string())
        }
        _ => EarlyExit::Misuse(usage_error(mode, usage::sentence(error))),
    }
}

fn usage_error(mode: Option<&'static str>, sentence: String) -> UsageError {
    let mut whole = command();
    let usage = match mode.and_then(|mode| whole.find_subcommand_mut(mode)) {
        Some(command) => command.render_usage(),
        None => whole.render_usage(),
    };
    let usage = usage.to_string().trim_start_matches("Usage:").trim().to_owned();
    UsageError { mode, sentence, usage }
}

/// The mode of an invalid command line: the first argument that is not an option. No option before
/// the mode takes a value.
fn mode_of(arguments: &[OsString]) -> Option<&'static str> {
    let is_option = |argument: &OsString| argument.as_encoded_bytes().starts_with(b"-");
    let first = arguments.iter().skip(1).find(|argument| !is_option(argument))?;
    MODES.into_iter().find(|mode| first == mode)
}
