//! Where the log goes: to the journal when stderr is connected to it, else to stderr.
//! The log never fails for lack of a journal, and no thread waits for a slow one: messages go into a
//! bounded queue (`log_queue`), and a thread of its own writes them. Messages that do not fit are
//! dropped and counted; the count is logged when the log can be written again.
//!
//! | | stderr | journal |
//! |---|---|---|
//! | quiet | errors that end the program | the same |
//! | normal | warnings and errors | and information, which operators expect of `journalctl` |
//! | verbose | and information | the same |
//! | verbose, debug build | everything | everything |
//!
//! An entry of the journal has the event's own fields and those of the spans around it. Where two have
//! the same name, the innermost one counts. A line on stderr shows no span: the thread's name says
//! whose line it is. A span is entered once per thread, so that it costs nothing per request.
//!
//! tracing-journald writes the journal. It sends where an event is logged, and blocks there; so the
//! event and its spans are kept as text, and dispatched to it again by the writer thread.

use super::line::{self, FATAL, LineContext, Severity};
use super::log_queue::{Queue, WriterStep};
use crate::sync::lock;
use libsystemd::logging::{SD_JOURNAL_SOCK_PATH, connected_to_journal};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, SigmaskHow};
use nix::time::{ClockId, clock_gettime};
use std::backtrace::{Backtrace, BacktraceStatus};
use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread;
use std::time::Duration;
use tracing::field::{Field, Value, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Dispatch, Event, Metadata, Subscriber, warn};
use tracing_journald::{Priority, PriorityMappings};
use tracing_subscriber::Layer;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::layer::{Context, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;

/// How long the end of the process waits for the log to be written.
pub const FLUSH_MAX: Duration = Duration::from_secs(1);

/// The queue of the writer thread, once there is one.
static QUEUE: OnceLock<Arc<Queue<Message>>> = OnceLock::new();
/// The writer thread that is not started yet.
static WRITER: Mutex<Option<Writer>> = Mutex::new(None);
/// There is no writer thread: each thread writes what it logs, to stderr.
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

/// How much is logged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Verbosity {
    /// Only errors that end the program (`--quiet`).
    Quiet,
    /// Warnings and errors.
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

/// What a writer thread is started with.
#[derive(Clone, Copy, Debug)]
struct Writer {
    target: LogTarget,
    threshold: Threshold,
}

/// The log was set up before; it stays as it was.
#[derive(Debug, thiserror::Error)]
#[error("the log was set up before")]
pub struct AlreadySetUp;

/// Sets up the log of the process, panics included. To be called once. Messages are kept until
/// [`start_writer`].
///
/// # Errors
///
/// [`AlreadySetUp`] at a second call.
pub fn init(verbosity: Verbosity) -> Result<LogTarget, AlreadySetUp> {
    let has_journal = || Path::new(SD_JOURNAL_SOCK_PATH).exists();
    let target = if connected_to_journal() && has_journal() {
        LogTarget::Journal
    } else {
        LogTarget::Stderr
    };
    let threshold = Threshold::new(verbosity, target);
    let queue = QUEUE.get_or_init(Arc::default);
    let queue_of_collector = Arc::clone(queue);
    let deliver = move |message: Message| {
        if WRITES_DIRECTLY.load(Ordering::Relaxed) {
            return write_to_stderr(&message.line());
        }
        let bytes = message.bytes();
        queue_of_collector.add(message, bytes);
    };
    let subscriber = tracing_subscriber::registry().with(Collector { deliver }).with(threshold);
    tracing::subscriber::set_global_default(subscriber).map_err(|_| AlreadySetUp)?;
    std::panic::set_hook(Box::new(log_panic));
    *lock(&WRITER) = Some(Writer { target, threshold });
    Ok(target)
}

/// Starts the thread that writes the log, unless it runs. A process that confines itself does that
/// before, because a thread keeps the rights with which it starts.
pub fn start_writer() {
    if let (Some(queue), Some(writer)) = (QUEUE.get(), lock(&WRITER).take()) {
        spawn_writer(queue, writer);
    }
}

/// Waits for the queue to be written, at most for [`FLUSH_MAX`]. To be called before the process ends.
pub fn flush() {
    start_writer();
    if let Some(queue) = QUEUE.get() {
        queue.flush(FLUSH_MAX);
    }
}

/// The panic hook. The standard one writes to stderr, for which a session must not wait.
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

/// Starts the writer thread. It blocks all signals, so that they go to the threads that wait for them.
/// If the system has no thread for it, the threads write directly; a server cannot work then anyway.
fn spawn_writer(queue: &Arc<Queue<Message>>, Writer { target, threshold }: Writer) {
    let queue = Arc::clone(queue);
    let before = SigSet::all().thread_swap_mask(SigmaskHow::SIG_BLOCK);
    let write = move || write_log(&queue, target, threshold);
    let started = thread::Builder::new().name("log".into()).spawn(write);
    if let Ok(before) = before {
        let _ = before.thread_set_mask();
    }
    if let Err(error) = started {
        WRITES_DIRECTLY.store(true, Ordering::Relaxed);
        warn!("cannot start a thread that writes the log: {error}");
    }
}

/// The writer thread: writes one message after another until the process ends. The only code that
/// waits for the journal or for stderr.
fn write_log(queue: &Queue<Message>, target: LogTarget, threshold: Threshold) {
    let journal = match target {
        // Fails if the journal cannot be reached; then the lines go to stderr.
        LogTarget::Journal => tracing_journald::layer().ok().map(configure_journal),
        LogTarget::Stderr => None,
    };
    // With the threshold, because the most verbose of all subscribers decides what is formatted.
    let journal = journal
        .map(|layer| Dispatch::new(tracing_subscriber::registry().with(layer).with(threshold)));
    loop {
        match (queue.next(), &journal) {
            (WriterStep::Write(message), Some(journal)) => message.send(journal),
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
fn configure_journal(journal: tracing_journald::Layer) -> tracing_journald::Layer {
    journal.with_field_prefix(None).with_priority_mappings(PriorityMappings {
        info: Priority::Informational,
        debug: Priority::Debug,
        ..PriorityMappings::new()
    })
}

/// The least severity that is logged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Threshold(Severity);

impl Threshold {
    fn new(verbosity: Verbosity, target: LogTarget) -> Self {
        Self(match (verbosity, target) {
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

/// An event with the field [`FATAL`] is fatal whatever its value: only [`crate::fatal!`] sets it.
fn severity_of(metadata: &Metadata<'_>) -> Severity {
    Severity::of(*metadata.level(), metadata.fields().field(FATAL).is_some())
}

/// The fields of an event or a span as text, the only type that the journal and stderr take.
#[derive(Clone, Debug)]
struct Fields {
    metadata: &'static Metadata<'static>,
    /// One for each field of the metadata, in their order; `None` for an empty one.
    values: Vec<Option<String>>,
}

impl Fields {
    fn new(metadata: &'static Metadata<'static>) -> Self {
        Self { metadata, values: vec![None; metadata.fields().len()] }
    }

    fn iter(&self) -> impl Iterator<Item = (&'static str, &str)> {
        let fields = self.metadata.fields().iter().zip(&self.values);
        fields.filter_map(|(field, value)| Some((field.name(), value.as_deref()?)))
    }
}

impl Fields {
    fn values(&self) -> Vec<Option<&dyn Value>> {
        self.values.iter().map(|value| value.as_ref().map(|text| text as &dyn Value)).collect()
    }

    /// A copy without the fields whose names are taken; the others' names are taken afterwards.
    fn take_new<'a>(&'a self, names: &mut BTreeSet<&'a str>) -> Self {
        let mut fields = Self::new(self.metadata);
        for (field, (value, own)) in
            self.metadata.fields().iter().zip(self.values.iter().zip(&mut fields.values))
        {
            if value.is_some() && names.insert(field.name()) {
                own.clone_from(value);
            }
        }
        fields
    }
}

impl Visit for Fields {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.values[field.index()] = Some(value.to_owned());
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.values[field.index()] = Some(format!("{value:?}"));
    }
}

/// An event in the queue.
#[derive(Debug)]
struct Message {
    event: Fields,
    /// The spans around the event, the outermost first.
    spans: Vec<Arc<Fields>>,
    milliseconds: u64,
    thread: String,
}

impl Message {
    fn new(event: &Event<'_>, spans: Vec<Arc<Fields>>) -> Self {
        let mut fields = Fields::new(event.metadata());
        event.record(&mut fields);
        let thread = thread::current().name().unwrap_or("unnamed").to_owned();
        Self { event: fields, spans, milliseconds: monotonic_milliseconds(), thread }
    }

    /// About how much memory it takes, in bytes. The fields of a span are shared by its messages.
    fn bytes(&self) -> usize {
        size_of::<Self>() + self.event.values.iter().flatten().map(String::len).sum::<usize>()
    }

    /// Sends the event to the journal, in its spans. A field of a span is left out where the event, or
    /// a span further in, has one of that name.
    fn send(&self, journal: &Dispatch) {
        let mut names: BTreeSet<&str> = self.event.iter().map(|(name, _)| name).collect();
        let mut spans: Vec<_> =
            self.spans.iter().rev().map(|span| span.take_new(&mut names)).collect();
        spans.reverse();
        let mut entered = Vec::with_capacity(spans.len());
        for span in &spans {
            let values = span.values();
            let values = span.metadata.fields().value_set_all(&values);
            let id = journal.new_span(&Attributes::new(span.metadata, &values));
            journal.enter(&id);
            entered.push(id);
        }
        let values = self.event.values();
        let values = self.event.metadata.fields().value_set_all(&values);
        journal.event(&Event::new(self.event.metadata, &values));
        for id in entered.into_iter().rev() {
            journal.exit(&id);
            journal.try_close(id);
        }
    }

    /// The line on stderr.
    fn line(&self) -> String {
        let metadata = self.event.metadata;
        let context = LineContext {
            milliseconds: self.milliseconds,
            severity: severity_of(metadata),
            pid: std::process::id(),
            thread: &self.thread,
            file: metadata.file().unwrap_or("unknown"),
            line: metadata.line().unwrap_or(0),
        };
        line::format(&context, self.event.iter())
    }
}

/// Makes a message of each event, with the fields of its spans, and delivers it.
struct Collector<D> {
    deliver: D,
}

impl<S, D> Layer<S> for Collector<D>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    D: Fn(Message) + 'static,
{
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let mut fields = Fields::new(attributes.metadata());
        attributes.record(&mut fields);
        if let Some(span) = context.span(id) {
            span.extensions_mut().insert(Arc::new(fields));
        }
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, context: Context<'_, S>) {
        let Some(span) = context.span(id) else { return };
        if let Some(fields) = span.extensions_mut().get_mut::<Arc<Fields>>() {
            let fields: &mut Fields = Arc::make_mut(fields);
            values.record(fields);
        }
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        let spans = context.event_scope(event).into_iter().flat_map(|scope| scope.from_root());
        let spans = spans.filter_map(|span| span.extensions().get::<Arc<Fields>>().cloned());
        (self.deliver)(Message::new(event, spans.collect()));
    }
}

/// Writes without the lock of [`io::stderr`]: its holder may wait for a reader that does not read.
fn write_to_stderr(line: &str) {
    let (stderr, mut rest) = (io::stderr(), line.as_bytes());
    while !rest.is_empty() {
        match nix::unistd::write(&stderr, rest) {
            Ok(count) => rest = &rest[count..],
            Err(Errno::EINTR) => {}
            // Another process made the pipe non-blocking, which holds for every process that has it.
            Err(Errno::EAGAIN) => {
                let mut writable = [PollFd::new(stderr.as_fd(), PollFlags::POLLOUT)];
                let _ = poll(&mut writable, PollTimeout::NONE);
            }
            // There is no other place to report that the log cannot be written.
            Err(_) => return,
        }
    }
}

fn monotonic_milliseconds() -> u64 {
    clock_gettime(ClockId::CLOCK_MONOTONIC)
        .ok()
        .and_then(|now| u64::try_from(Duration::from(now).as_millis()).ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests;
