//! Where the log goes: to the journal when stderr is connected to it, else to stderr.
//! Never fails for want of a journal, and never lets a log that cannot be written disturb us.
//!
//! | | stderr | journal |
//! |---|---|---|
//! | quiet | what ends the program | the same |
//! | normal | warnings and errors | and what is going on, which people expect of `journalctl` |
//! | verbose | and what is going on | the same |
//! | verbose, debug build | everything | everything |
//!
//! Spans are not shown on stderr; a thread's name tells whose line it is.

use super::line::{self, Circumstances, FATAL, Fields, Severity};
use libsystemd::logging::connected_to_journal;
use nix::time::{ClockId, clock_gettime};
use std::fmt;
use std::io::{self, Write};
use tracing::{Event, Metadata, Subscriber};
use tracing_journald::{Priority, PriorityMappings};
use tracing_subscriber::Layer;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::layer::{Context, SubscriberExt};

/// Logs an error that ends the program; written as `tracing::error!` is.
///
/// It is the only kind of line that `--quiet` lets through.
#[macro_export]
macro_rules! fatal {
    ($($arguments:tt)+) => {
        ::tracing::error!(fatal = true, $($arguments)+)
    };
}

/// How much the operator wants to hear.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Verbosity {
    /// Only what ends the program (`--quiet`).
    Quiet,
    /// What goes wrong.
    #[default]
    Normal,
    /// Everything (`--verbose`).
    Verbose,
}

/// Where the log goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Destination {
    /// To systemd-journald, with fields.
    Journal,
    /// To stderr, one line an event.
    Stderr,
}

/// The log was set up before; it stays as it was.
#[derive(Debug)]
pub struct AlreadySetUp;

impl fmt::Display for AlreadySetUp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the log was set up before")
    }
}

impl std::error::Error for AlreadySetUp {}

/// Sends everything that is logged from now on to where it belongs; once in a process.
///
/// # Errors
///
/// It was called before.
pub fn init(verbosity: Verbosity) -> Result<Destination, AlreadySetUp> {
    let journal = if connected_to_journal() { tracing_journald::layer().ok() } else { None };
    let done = match journal {
        Some(journal) => {
            let threshold = Threshold::new(verbosity, Destination::Journal);
            set_up(tracing_subscriber::registry().with(for_flexnbd(journal)).with(threshold))
                .map(|()| Destination::Journal)
        }
        None => {
            let threshold = Threshold::new(verbosity, Destination::Stderr);
            let lines = Lines { write: write_to_stderr };
            set_up(tracing_subscriber::registry().with(lines).with(threshold))
                .map(|()| Destination::Stderr)
        }
    };
    done.map_err(|_| AlreadySetUp)
}

fn set_up(
    subscriber: impl Subscriber + Send + Sync,
) -> Result<(), tracing::subscriber::SetGlobalDefaultError> {
    tracing::subscriber::set_global_default(subscriber)
}

/// Without a prefix `"flexnbd.client"` becomes FLEXNBD_CLIENT and `message_id` MESSAGE_ID.
fn for_flexnbd(journal: tracing_journald::Layer) -> tracing_journald::Layer {
    journal.with_field_prefix(None).with_priority_mappings(PriorityMappings {
        info: Priority::Informational,
        debug: Priority::Debug,
        ..PriorityMappings::new()
    })
}

/// Lets through what is severe enough.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Threshold(Severity);

impl Threshold {
    fn new(verbosity: Verbosity, destination: Destination) -> Self {
        Self(match (verbosity, destination) {
            (Verbosity::Quiet, _) => Severity::Fatal,
            (Verbosity::Normal, Destination::Stderr) => Severity::Warning,
            (Verbosity::Normal, Destination::Journal) => Severity::Info,
            (Verbosity::Verbose, _) if cfg!(debug_assertions) => Severity::Debug,
            (Verbosity::Verbose, _) => Severity::Info,
        })
    }
}

impl<S: Subscriber> Layer<S> for Threshold {
    fn enabled(&self, metadata: &Metadata<'_>, _: Context<'_, S>) -> bool {
        severity_of(metadata) >= self.0
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(match self.0 {
            Severity::Debug => LevelFilter::TRACE,
            Severity::Info => LevelFilter::INFO,
            Severity::Warning => LevelFilter::WARN,
            Severity::Error | Severity::Fatal => LevelFilter::ERROR,
        })
    }
}

/// An event is fatal if it has that field at all: [`crate::fatal!`] is the only one to set it.
fn severity_of(metadata: &Metadata<'_>) -> Severity {
    Severity::of(*metadata.level(), metadata.fields().field(FATAL).is_some())
}

/// Writes each event as one line.
struct Lines<W> {
    write: W,
}

impl<S: Subscriber, W: Fn(&str) + 'static> Layer<S> for Lines<W> {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut fields = Fields::default();
        event.record(&mut fields);
        let metadata = event.metadata();
        let thread = std::thread::current();
        let about = Circumstances {
            milliseconds: monotonic_milliseconds(),
            severity: severity_of(metadata),
            pid: std::process::id(),
            thread: thread.name().unwrap_or("unnamed"),
            file: metadata.file().unwrap_or("unknown"),
            line: metadata.line().unwrap_or(0),
        };
        (self.write)(&line::format(&about, &fields));
    }
}

fn write_to_stderr(line: &str) {
    // Nobody is left to be told that the log cannot be written.
    let _ = io::stderr().lock().write_all(line.as_bytes());
}

/// Zero if there is no such clock, which the kernel always has.
fn monotonic_milliseconds() -> u64 {
    clock_gettime(ClockId::CLOCK_MONOTONIC)
        .ok()
        .and_then(|now| u64::try_from(std::time::Duration::from(now).as_millis()).ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests;
