//! Tests of `journal.rs`.

use super::super::child;
use super::*;
use std::fs::File;
use std::os::linux::fs::MetadataExt;
use std::sync::{Arc, Mutex};
use tracing::{Level, info_span};

/// The messages delivered while `log` runs.
fn messages_of(threshold: Threshold, log: impl FnOnce()) -> Vec<Message> {
    let delivered = Arc::new(Mutex::new(Vec::new()));
    let sink = Arc::clone(&delivered);
    let deliver = move |message: Message| sink.lock().unwrap().push(message);
    let subscriber = tracing_subscriber::registry().with(Collector { deliver }).with(threshold);
    tracing::subscriber::with_default(subscriber, log);
    std::mem::take(&mut *delivered.lock().unwrap())
}

/// The lines written while `log` runs.
fn lines_of(threshold: Threshold, log: impl FnOnce()) -> Vec<String> {
    messages_of(threshold, log).iter().map(Message::line).collect()
}

/// Fields as tracing-journald sends them: those of the current span and its parents, then the event's.
type Sent = Vec<(String, String)>;

/// Stands for the layer of tracing-journald; keeps what it would send.
#[derive(Clone, Default)]
struct Recorder(Arc<Mutex<Vec<Sent>>>);

fn journal_names(fields: &Fields) -> Sent {
    let name = |name: &str| name.replace('.', "_").to_ascii_uppercase();
    fields.iter().map(|(field, value)| (name(field), value.to_owned())).collect()
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Recorder {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let mut fields = Fields::new(attributes.metadata());
        attributes.record(&mut fields);
        context.span(id).unwrap().extensions_mut().insert(fields);
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        let mut sent = Sent::new();
        for span in context.lookup_current().into_iter().flat_map(|span| span.scope().from_root()) {
            sent.extend(journal_names(span.extensions().get::<Fields>().unwrap()));
        }
        let mut fields = Fields::new(event.metadata());
        event.record(&mut fields);
        sent.extend(journal_names(&fields));
        self.0.lock().unwrap().push(sent);
    }
}

/// The fields that each message sends, without its text, sorted.
fn sent(messages: &[Message]) -> Vec<Sent> {
    let recorder = Recorder::default();
    let journal = Dispatch::new(tracing_subscriber::registry().with(recorder.clone()));
    messages.iter().for_each(|message| message.send(&journal));
    let mut sent = std::mem::take(&mut *recorder.0.lock().unwrap());
    for fields in &mut sent {
        fields.retain(|(name, _)| name != "MESSAGE");
        fields.sort();
    }
    sent
}

/// The fields of the only event of `log`.
fn journal_fields_of(log: impl FnOnce()) -> Sent {
    let mut sent = sent(&messages_of(Threshold(Severity::Info), log));
    assert_eq!(sent.len(), 1, "one event: {sent:?}");
    sent.remove(0)
}

fn owned(fields: &[(&str, &str)]) -> Vec<(String, String)> {
    fields.iter().map(|&(name, value)| (name.to_owned(), value.to_owned())).collect()
}

fn log_everything() {
    tracing::debug!("d");
    tracing::info!("i");
    tracing::warn!("w");
    tracing::error!("e");
    crate::fatal!("f");
}

#[test]
fn each_verbosity_logs_what_the_manual_says() {
    use {LogTarget::*, Verbosity::*};
    let verbose = if cfg!(debug_assertions) { "DIWEF" } else { "IWEF" };
    for (verbosity, target, expected) in [
        (Quiet, Stderr, "F"),
        (Quiet, Journal, "F"),
        (Normal, Stderr, "WEF"),
        (Normal, Journal, "IWEF"),
        (Verbose, Stderr, verbose),
        (Verbose, Journal, verbose),
    ] {
        let lines = lines_of(Threshold::new(verbosity, target), log_everything);
        let letters: String = lines.iter().map(|line| line.split(':').nth(1).unwrap()).collect();
        assert_eq!(letters, expected, "{verbosity:?} to {target:?}");
    }
}

#[test]
fn a_line_has_time_thread_and_source() {
    let before = monotonic_milliseconds();
    let lines = lines_of(Threshold(Severity::Fatal), || {
        crate::fatal!(
            "flexnbd.client" = "::1",
            errno = 28,
            message_id = "0123",
            why = "full",
            "no {}",
            "space"
        );
    });
    let [line] = lines.as_slice() else { panic!("one event, one line: {lines:?}") };
    let (when, rest) = line.split_once(':').unwrap();
    assert!((before..=monotonic_milliseconds()).contains(&when.parse().unwrap()), "{line}");
    let thread = std::thread::current().name().unwrap().to_owned();
    let pid = std::process::id();
    let place = rest.strip_prefix(&format!("F:{pid} {thread} src/systemd/journal/tests.rs:"));
    let (number, text) = place.unwrap().split_once(": ").unwrap();
    assert!(number.parse::<u32>().is_ok(), "{line}");
    assert_eq!(text, "no space why=full\n");
}

#[test]
fn an_event_sends_its_fields_to_the_journal() {
    let fields = journal_fields_of(|| {
        tracing::info!(message_id = "0123", "flexnbd.client" = %"::1", errno = 28, "full");
    });
    let expected = [("ERRNO", "28"), ("FLEXNBD_CLIENT", "::1"), ("MESSAGE_ID", "0123")];
    assert_eq!(fields, owned(&expected));
}

#[test]
fn an_event_has_the_fields_of_its_spans_in_the_journal() {
    let fields = journal_fields_of(|| {
        let id: u64 = 7;
        let _session = info_span!("session", "flexnbd.client" = %"::1", "flexnbd.session" = id);
        let _session = _session.entered();
        let _inner = info_span!("inner", "flexnbd.session" = 8).entered();
        tracing::info!("flexnbd.bytes_sent" = 9, "sent");
    });
    let expected =
        [("FLEXNBD_BYTES_SENT", "9"), ("FLEXNBD_CLIENT", "::1"), ("FLEXNBD_SESSION", "8")];
    assert_eq!(fields, owned(&expected));
}

#[test]
fn an_event_replaces_fields_of_its_spans() {
    let fields = journal_fields_of(|| {
        let _span = info_span!("session", "flexnbd.client" = "::1").entered();
        tracing::info!("flexnbd.client" = "::2", "refused");
    });
    assert_eq!(fields, owned(&[("FLEXNBD_CLIENT", "::2")]));
}

#[test]
fn a_field_recorded_later_is_in_later_events_only() {
    let messages = messages_of(Threshold(Severity::Info), || {
        let span = info_span!("session", "flexnbd.session" = tracing::field::Empty).entered();
        tracing::info!("before");
        span.record("flexnbd.session", 7);
        tracing::info!("after");
    });
    assert_eq!(sent(&messages), [vec![], owned(&[("FLEXNBD_SESSION", "7")])]);
}

#[test]
fn a_line_on_stderr_shows_no_span() {
    let lines = lines_of(Threshold(Severity::Info), || {
        let _span = info_span!("session", "flexnbd.client" = "::1", other = 1).entered();
        tracing::info!("connected");
    });
    assert!(lines[0].ends_with(": connected\n"), "{lines:?}");
}

#[test]
fn events_after_a_span_have_none_of_its_fields() {
    let fields = journal_fields_of(|| {
        drop(info_span!("session", "flexnbd.client" = "::1").entered());
        tracing::info!("idle");
    });
    assert_eq!(fields, []);
}

#[test]
fn the_journal_gets_spans_whenever_it_gets_information() {
    for verbosity in [Verbosity::Normal, Verbosity::Verbose] {
        let threshold = Threshold::new(verbosity, LogTarget::Journal);
        assert!(threshold.0 <= Severity::of(Level::INFO, false));
    }
}

#[test]
#[ignore = "other tests run it in a process of its own"]
fn a_child_that_logs() {
    let target = init(Verbosity::Normal).unwrap();
    tracing::info!("below the threshold");
    tracing::warn!("a warning");
    assert!(init(Verbosity::Verbose).is_err());
    flush();
    child::say(&format!("{target:?}"));
}

const CHILD: &str = "systemd::journal::tests::a_child_that_logs";

#[test]
fn without_a_journal_the_log_goes_to_stderr() {
    let output = child::running(CHILD).output().unwrap();
    assert_eq!(child::output_of(&output), ["Stderr"]);
    let log = String::from_utf8(output.stderr).unwrap();
    assert!(log.ends_with(": a warning\n") && !log.contains("below"), "{log}");
}

#[test]
fn an_absent_journal_is_replaced_by_stderr() {
    if Path::new("/run/systemd/journal/socket").exists() {
        return; // This host has one.
    }
    let file = tempfile::NamedTempFile::new().unwrap();
    let metadata = file.as_file().metadata().unwrap();
    let output = child::running(CHILD)
        .env("JOURNAL_STREAM", format!("{}:{}", metadata.st_dev(), metadata.st_ino()))
        .stderr(file.reopen().unwrap())
        .output()
        .unwrap();
    assert_eq!(child::output_of(&output), ["Stderr"]);
    assert!(std::fs::read_to_string(file.path()).unwrap().ends_with(": a warning\n"));
}

#[test]
fn write_errors_of_the_log_are_ignored() {
    let full = File::options().write(true).open("/dev/full").unwrap();
    let output = child::running(CHILD).stderr(full).output().unwrap();
    assert_eq!(child::output_of(&output), ["Stderr"]);
}
