//! What `journal.rs` promises.

use super::super::child;
use super::*;
use std::fs::File;
use std::os::linux::fs::MetadataExt;
use std::path::Path;
use std::sync::{Arc, Mutex};

/// The lines written while `log` runs.
fn lines_of(threshold: Threshold, log: impl FnOnce()) -> Vec<String> {
    let written = Arc::new(Mutex::new(Vec::new()));
    let sink = Arc::clone(&written);
    let deliver = move |message: Message| sink.lock().unwrap().push(message.line());
    let subscriber = tracing_subscriber::registry().with(Collector { deliver }).with(threshold);
    tracing::subscriber::with_default(subscriber, log);
    written.lock().unwrap().clone()
}

fn log_everything() {
    tracing::debug!("d");
    tracing::info!("i");
    tracing::warn!("w");
    tracing::error!("e");
    crate::fatal!("f");
}

#[test]
fn each_verbosity_lets_through_what_the_manual_says() {
    use {LogTarget::*, Verbosity::*};
    let verbose = if cfg!(debug_assertions) { "DIWEF" } else { "IWEF" };
    for (verbosity, destination, expected) in [
        (Quiet, Stderr, "F"),
        (Quiet, Journal, "F"),
        (Normal, Stderr, "WEF"),
        (Normal, Journal, "IWEF"),
        (Verbose, Stderr, verbose),
        (Verbose, Journal, verbose),
    ] {
        let lines = lines_of(Threshold::new(verbosity, destination), log_everything);
        let letters: String = lines.iter().map(|line| line.split(':').nth(1).unwrap()).collect();
        assert_eq!(letters, expected, "{verbosity:?} to {destination:?}");
    }
}

#[test]
fn a_line_tells_when_who_and_where() {
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
#[ignore = "a part of other tests, which run it in a process of its own"]
fn a_child_that_logs() {
    let destination = init(Verbosity::Normal).unwrap();
    tracing::info!("not to be seen");
    tracing::warn!("to be seen");
    assert!(init(Verbosity::Verbose).is_err());
    flush();
    child::say(&format!("{destination:?}"));
}

const CHILD: &str = "systemd::journal::tests::a_child_that_logs";

#[test]
fn without_a_journal_the_log_goes_to_stderr() {
    let output = child::running(CHILD).output().unwrap();
    assert_eq!(child::said(&output), ["Stderr"]);
    let log = String::from_utf8(output.stderr).unwrap();
    assert!(log.ends_with(": to be seen\n") && !log.contains("not to be seen"), "{log}");
}

#[test]
fn a_journal_that_is_promised_but_absent_is_replaced_by_stderr() {
    if Path::new("/run/systemd/journal/socket").exists() {
        return; // It is there.
    }
    let file = tempfile::NamedTempFile::new().unwrap();
    let metadata = file.as_file().metadata().unwrap();
    let output = child::running(CHILD)
        .env("JOURNAL_STREAM", format!("{}:{}", metadata.st_dev(), metadata.st_ino()))
        .stderr(file.reopen().unwrap())
        .output()
        .unwrap();
    assert_eq!(child::said(&output), ["Stderr"]);
    assert!(std::fs::read_to_string(file.path()).unwrap().ends_with(": to be seen\n"));
}

#[test]
fn a_log_that_cannot_be_written_disturbs_nobody() {
    let full = File::options().write(true).open("/dev/full").unwrap();
    let output = child::running(CHILD).stderr(full).output().unwrap();
    assert_eq!(child::said(&output), ["Stderr"]);
}
