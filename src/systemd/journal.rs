//! Where the log goes: to the journal when stderr is connected to it, else to stderr.
//! Never fails for want of a journal, and no thread that logs waits for a log that is stuck: messages
//! go into a bounded queue (`log_queue`), and a thread of its own writes them. What does not fit is
//! dropped and counted; the count is logged when the log can be written again.
//!
//! | | stderr | journal |
//! |---|---|---|
//! | quiet | what ends the program | the same |
//! | normal | warnings and errors | and what is going on, which people expect of `journalctl` |
//! | verbose | and what is going on | the same |
//! | verbose, debug build | everything | everything |
//!
//! Spans are not shown on stderr; a thread's name tells whose line it is.

use super::line::{self, EventFields, FATAL, LineContext, Severity};
use super::log_queue::{Queue, WriterStep};
use libsystemd::logging::{SD_JOURNAL_SOCK_PATH, connected_to_journal};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, SigmaskHow};
use nix::time::{ClockId, clock_gettime};
use std::backtrace::{Backtrace, BacktraceStatus};
use std::fmt;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::Duration;
use tracing::field::{Field, Value, Visit};
use tracing::{Dispatch, Event, Metadata, Subscriber, warn};
use tracing_journald::{Priority, PriorityMappings};
use tracing_subscriber::Layer;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::layer::{Context, SubscriberExt};

/// How long the end of the process waits for the log to be written.
pub const FLUSH_MAX: Duration = Duration::from_secs(1);

/// The queue of the writer thread, once there is one.
static QUEUE: OnceLock<Arc<Queue<Message>>> = OnceLock::new();
/// There is no writer thread: whoever logs writes.
static WRITES_DIRECTLY: AtomicBool = AtomicBool::new(false);

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
pub enum LogTarget {
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

/// Sends everything that is logged from now on to where it belongs, panics included; once in a
/// process.
///
/// # Errors
///
/// It was called before.
pub fn init(verbosity: Verbosity) -> Result<LogTarget, AlreadySetUp> {
    let has_journal = || Path::new(SD_JOURNAL_SOCK_PATH).exists();
    let destination = if connected_to_journal() && has_journal() {
        LogTarget::Journal
    } else {
        LogTarget::Stderr
    };
    let threshold = Threshold::new(verbosity, destination);
    let queue = QUEUE.get_or_init(Arc::default);
    let for_events = Arc::clone(queue);
    let deliver = move |message: Message| {
        if WRITES_DIRECTLY.load(Ordering::Relaxed) {
            return write_to_stderr(&message.line());
        }
        let bytes = message.bytes();
        for_events.add(message, bytes);
    };
    let collector = Collector { deliver };
    set_up(tracing_subscriber::registry().with(collector).with(threshold))
        .map_err(|_| AlreadySetUp)?;
    std::panic::set_hook(Box::new(log_panic));
    start_writer(queue, destination, threshold);
    Ok(destination)
}

/// Waits until what was logged has been written, at most for [`FLUSH_MAX`]; for the end of the
/// process.
pub fn flush() {
    if let Some(queue) = QUEUE.get() {
        queue.flush(FLUSH_MAX);
    }
}

fn set_up(
    subscriber: impl Subscriber + Send + Sync,
) -> Result<(), tracing::subscriber::SetGlobalDefaultError> {
    tracing::subscriber::set_global_default(subscriber)
}

/// A session's panic must not wait for stderr, as the standard hook would.
fn log_panic(panic: &std::panic::PanicHookInfo<'_>) {
    let backtrace = Backtrace::capture();
    if backtrace.status() == BacktraceStatus::Captured {
        tracing::error!("{panic}\n{backtrace}");
    } else {
        tracing::error!("{panic}");
    }
    // The process ends with its main thread.
    if thread::current().name() == Some("main") {
        flush();
    }
}

/// Starts the thread that writes the log. It has all signals blocked, so that they go to the
/// threads that wait for them. A system that has no thread for it lets whoever logs write, which is
/// the end of a server that can have no threads.
fn start_writer(queue: &Arc<Queue<Message>>, destination: LogTarget, threshold: Threshold) {
    let for_thread = Arc::clone(queue);
    let write = move || write_log(&for_thread, destination, threshold);
    let before = SigSet::all().thread_swap_mask(SigmaskHow::SIG_BLOCK);
    let started = thread::Builder::new().name("log".into()).spawn(write);
    if let Ok(before) = before {
        let _ = before.thread_set_mask();
    }
    if let Err(error) = started {
        WRITES_DIRECTLY.store(true, Ordering::Relaxed);
        warn!("cannot start a thread that writes the log: {error}");
    }
}

/// Writes one message after another, for as long as the process lives. The only code that waits for
/// the journal or for stderr.
fn write_log(queue: &Queue<Message>, destination: LogTarget, threshold: Threshold) {
    let journal = match destination {
        // Waits as well while the journal does not read; fails when there is none after all.
        LogTarget::Journal => tracing_journald::layer().ok().map(for_flexnbd),
        LogTarget::Stderr => None,
    };
    // With the threshold: the most talkative of all subscribers decides what is formatted at all.
    let journal = journal
        .map(|layer| Dispatch::new(tracing_subscriber::registry().with(layer).with(threshold)));
    loop {
        match (queue.next(), &journal) {
            (WriterStep::Write(message), Some(journal)) => message.send_to(journal),
            (WriterStep::Write(message), None) => write_to_stderr(&message.line()),
            (WriterStep::Report(1), _) => {
                warn!("a message of the log was dropped: it was not written in time");
            }
            (WriterStep::Report(count), _) => {
                warn!("{count} messages of the log were dropped: it was not written in time");
            }
        }
    }
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
    fn new(verbosity: Verbosity, destination: LogTarget) -> Self {
        Self(match (verbosity, destination) {
            (Verbosity::Quiet, _) => Severity::Fatal,
            (Verbosity::Normal, LogTarget::Stderr) => Severity::Warning,
            (Verbosity::Normal, LogTarget::Journal) => Severity::Info,
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

/// An event that can wait to be written.
#[derive(Debug)]
struct Message {
    metadata: &'static Metadata<'static>,
    /// One for each field, in their order; as text, which is all that the journal and stderr take.
    values: Vec<Option<String>>,
    milliseconds: u64,
    thread: String,
}

impl Message {
    fn of(event: &Event<'_>) -> Self {
        let metadata = event.metadata();
        let mut values = Values(vec![None; metadata.fields().len()]);
        event.record(&mut values);
        let thread = thread::current().name().unwrap_or("unnamed").to_owned();
        Self { metadata, values: values.0, milliseconds: monotonic_milliseconds(), thread }
    }

    /// About how much memory it takes.
    fn bytes(&self) -> usize {
        size_of::<Self>() + self.values.iter().flatten().map(String::len).sum::<usize>()
    }

    /// Has it sent to the journal as the event that it was.
    fn send_to(&self, journal: &Dispatch) {
        let values: Vec<Option<&dyn Value>> =
            self.values.iter().map(|value| value.as_ref().map(|text| text as &dyn Value)).collect();
        let values = self.metadata.fields().value_set_all(&values);
        journal.event(&Event::new(self.metadata, &values));
    }

    /// The line on stderr.
    fn line(&self) -> String {
        let mut fields = EventFields::default();
        for (field, value) in self.metadata.fields().iter().zip(&self.values) {
            if let Some(value) = value {
                fields.note(field.name(), value.clone());
            }
        }
        let about = LineContext {
            milliseconds: self.milliseconds,
            severity: severity_of(self.metadata),
            pid: std::process::id(),
            thread: &self.thread,
            file: self.metadata.file().unwrap_or("unknown"),
            line: self.metadata.line().unwrap_or(0),
        };
        line::format(&about, &fields)
    }
}

/// Takes down the values of an event as text.
struct Values(Vec<Option<String>>);

impl Visit for Values {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.0[field.index()] = Some(value.to_owned());
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.0[field.index()] = Some(format!("{value:?}"));
    }
}

/// Makes a message of each event and delivers it.
struct Collector<D> {
    deliver: D,
}

impl<S: Subscriber, D: Fn(Message) + 'static> Layer<S> for Collector<D> {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        (self.deliver)(Message::of(event));
    }
}

/// Past the lock of [`io::stderr`]: who holds that may be waiting for a reader that reads no more.
fn write_to_stderr(line: &str) {
    let (stderr, mut rest) = (io::stderr(), line.as_bytes());
    while !rest.is_empty() {
        match nix::unistd::write(&stderr, rest) {
            Ok(count) => rest = &rest[count..],
            Err(Errno::EINTR) => {}
            // Somebody has made the pipe non-blocking, for all who hold it.
            Err(Errno::EAGAIN) => {
                let mut writable = [PollFd::new(stderr.as_fd(), PollFlags::POLLOUT)];
                let _ = poll(&mut writable, PollTimeout::NONE);
            }
            // There is no other place to report that the log cannot be written.
            Err(_) => return,
        }
    }
}

/// Zero if there is no such clock, which the kernel always has.
fn monotonic_milliseconds() -> u64 {
    clock_gettime(ClockId::CLOCK_MONOTONIC)
        .ok()
        .and_then(|now| u64::try_from(Duration::from(now).as_millis()).ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests;
