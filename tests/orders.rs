//! The commands that move a disk, as an operator gives them: what they print, their exit status.
//! Never looks into a migration; whether the copy is right is tested elsewhere.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use harness::{
    Builder, KIB, MIB, Server, restore_default_signals, sparse_image, temp_dir, wait_until,
    write_at,
};
use nix::sys::signal::Signal;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

/// `flexnbd LINE` in `directory`.
fn flexnbd(directory: &Path, line: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_flexnbd"));
    command.args(line.split_whitespace()).current_dir(directory).stdin(Stdio::null());
    command
}

/// Runs it to its end: exit status, standard output, standard error.
fn ran(directory: &Path, line: &str) -> (Option<i32>, String, String) {
    told(flexnbd(directory, line).output().unwrap())
}

fn told(output: Output) -> (Option<i32>, String, String) {
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

/// What came of following a migration, once it is over.
fn ended(mut wait: Child) -> (Option<i32>, String, String) {
    wait_until("the end of the waiting", || wait.try_wait().unwrap().is_some());
    told(wait.wait_with_output().unwrap())
}

/// Starts following a migration, no faster than `speed`.
fn following(directory: &Path, destination: &Server, speed: &str) -> Child {
    let port = destination.port();
    let line = format!("mirror -l 127.0.0.1 -p {port} -s {SOURCE} --wait --max-speed {speed}");
    let mut command = flexnbd(directory, &line);
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

const SOURCE: &str = "source.sock";
const DESTINATION: &str = "destination.sock";

/// A source full of data, and a destination, of `size` bytes.
fn pair(directory: &Path, size: u64) -> (Server, Server) {
    let from = sparse_image(directory, "from.img", size);
    write_at(&from, 0, &vec![7; usize::try_from(size).unwrap()]);
    let to = sparse_image(directory, "to.img", size);
    let socket = |name: &str| ["--sock".into(), directory.join(name).into_os_string()];
    let source = Builder::serve(&from).args(socket(SOURCE)).start();
    let destination = Builder::mode("listen", &to).args(socket(DESTINATION)).start();
    for name in [SOURCE, DESTINATION] {
        wait_until("the control socket", || directory.join(name).exists());
    }
    (source, destination)
}

fn status(directory: &Path, socket: &str) -> String {
    ran(directory, &format!("status -s {socket}")).1
}

/// A migration that would take minutes, and is on its way.
fn slow(directory: &Path) -> (Server, Server, Child) {
    let (source, destination) = pair(directory, 4 * MIB);
    let wait = following(directory, &destination, "32K");
    wait_until("the copy to begin", || {
        status(directory, DESTINATION).contains("ownership=incoming")
    });
    (source, destination, wait)
}

#[test]
fn whoever_waits_hears_of_the_end_even_if_it_comes_at_once() {
    for _ in 0..5 {
        let directory = temp_dir();
        let (mut source, mut destination) = pair(directory.path(), 64 * KIB);
        let wait = following(directory.path(), &destination, "0");
        let (code, out, err) = ended(wait);
        assert_eq!(code, Some(0), "{err}");
        let expected = "Migration started\nMigration finished: 64 KiB sent in ";
        assert!(out.starts_with(expected), "{out}");
        assert_eq!(source.wait_for_end().code(), Some(0), "{}", source.stderr());
        assert_eq!(destination.wait_for_end().code(), Some(0), "{}", destination.stderr());
    }
}

#[test]
fn mirror_says_that_it_has_started_and_returns() {
    let directory = temp_dir();
    let (mut source, destination) = pair(directory.path(), 64 * KIB);
    let line = format!("mirror -l 127.0.0.1 -p {} -s {SOURCE} -u", destination.port());
    let (code, out, err) = ran(directory.path(), &line);
    assert_eq!((code, out.as_str()), (Some(0), "Migration started\n"), "{err}");
    assert_eq!(source.wait_for_end().code(), Some(0), "{}", source.stderr());
    assert!(!directory.path().join("from.img").exists(), "--unlink was ordered");
}

#[test]
fn a_destination_that_is_not_there_is_told_with_status_1_and_the_source_serves_on() {
    let directory = temp_dir();
    let (mut source, mut destination) = pair(directory.path(), 64 * KIB);
    let port = destination.port();
    assert_eq!(destination.stop().code(), Some(1), "stopped before the disk has arrived");
    for wait in ["", "--wait"] {
        let line = format!("mirror -l 127.0.0.1 -p {port} -s {SOURCE} {wait}");
        let (code, out, err) = ran(directory.path(), &line);
        assert_eq!((code, out.as_str()), (Some(1), ""), "{err}");
        assert!(err.starts_with("Mirror failed to connect"), "{err}");
    }
    assert!(status(directory.path(), SOURCE).contains("is_mirroring=false"));
    assert_eq!(source.stop().code(), Some(0));
}

#[test]
fn an_interrupted_wait_says_that_the_migration_goes_on() {
    restore_default_signals();
    let directory = temp_dir();
    let (_source, _destination, mut wait) = slow(directory.path());
    let pid = nix::unistd::Pid::from_raw(i32::try_from(wait.id()).unwrap());
    nix::sys::signal::kill(pid, Signal::SIGINT).unwrap();
    wait_until("the end of the waiting", || wait.try_wait().unwrap().is_some());
    let output = wait.wait_with_output().unwrap();
    let signal = std::os::unix::process::ExitStatusExt::signal(&output.status);
    assert_eq!(signal, Some(Signal::SIGINT as i32), "shells see the interrupt");
    let said = String::from_utf8(output.stderr).unwrap();
    let end_it = format!("to end it: `flexnbd break --sock {SOURCE}`");
    assert!(said.contains("goes on") && said.contains(&end_it), "{said}");
    assert!(status(directory.path(), SOURCE).contains("is_mirroring=true"));
}

#[test]
fn break_ends_the_waiting_and_not_the_serving() {
    let directory = temp_dir();
    let (mut source, _destination, wait) = slow(directory.path());
    let second = format!("mirror -l 127.0.0.1 -p 1 -s {SOURCE} --wait");
    let refused = (Some(1), String::new(), "mirror already running\n".to_owned());
    assert_eq!(ran(directory.path(), &second), refused);
    let faster = ran(directory.path(), &format!("mirror-speed -s {SOURCE} -m 33K"));
    assert_eq!(faster, (Some(0), "updated\n".to_owned(), String::new()));
    let limit = format!("migration_speed_limit={}", 33 * KIB);
    wait_until("the new limit", || status(directory.path(), SOURCE).contains(&limit));
    let (code, out, _) = ran(directory.path(), &format!("break -s {SOURCE}"));
    assert_eq!((code, out.as_str()), (Some(0), "mirror stopped\n"));
    let (code, _, err) = ended(wait);
    assert_eq!(code, Some(1));
    assert!(err.starts_with("Mirroring abandoned"), "{err}");
    assert!(status(directory.path(), SOURCE).ends_with("ownership=none\n"));
    let none = (Some(1), String::new(), "not mirroring\n".to_owned());
    assert_eq!(ran(directory.path(), &format!("break -s {SOURCE}")), none);
    assert_eq!(source.stop().code(), Some(0));
}

#[test]
fn a_server_that_is_stopped_does_not_wait_for_whoever_waits_for_it() {
    let directory = temp_dir();
    let (mut source, _destination, wait) = slow(directory.path());
    assert_eq!(source.stop().code(), Some(1), "stopped while a migration was running");
    let (code, _, err) = ended(wait);
    let why = "the server was stopped before the migration was over\n";
    assert_eq!((code, err.as_str()), (Some(1), why));
}

#[test]
fn a_server_that_dies_is_no_success() {
    let directory = temp_dir();
    let (source, _destination, wait) = slow(directory.path());
    source.signal(Signal::SIGKILL);
    let (code, _, err) = ended(wait);
    assert_eq!(code, Some(1));
    assert!(err.contains("closed the connection without an answer"), "{err}");
}

#[test]
fn an_incomplete_copy_is_adopted_by_force_once_nobody_uses_it() {
    let directory = temp_dir();
    let (_source, mut destination, mut wait) = slow(directory.path());
    let adopt = |line| ran(directory.path(), line);
    let (code, _, err) = adopt("adopt -f to.img --force");
    assert_eq!(code, Some(78));
    assert!(err.contains("in use"), "{err}");
    destination.stop();
    let (code, _, err) = adopt("adopt -f to.img");
    assert_eq!(code, Some(78));
    assert!(err.starts_with("flexnbd adopt: to.img is an incomplete copy"), "{err}");
    let (code, out, err) = adopt("adopt -f to.img --force");
    assert_eq!(code, Some(0), "{err}");
    assert!(out.contains("and is now ours (adopted)"), "{out}");
    wait.kill().unwrap();
    wait.wait().unwrap();
}
