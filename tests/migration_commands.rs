//! Commands that start, follow, tune and stop a migration: their output and exit status.
//! The content of the copy is tested in `migration.rs`.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use harness::{
    Builder, KIB, MIB, Server, restore_default_signals, sparse_image, temp_dir, wait_until,
    write_at,
};
use nix::sys::signal::Signal;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

/// The command `flexnbd LINE` in `directory`.
fn flexnbd(directory: &Path, line: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_flexnbd"));
    command.args(line.split_whitespace()).current_dir(directory).stdin(Stdio::null());
    command
}

/// Runs `flexnbd LINE`; returns exit status, stdout and stderr.
fn run(directory: &Path, line: &str) -> (Option<i32>, String, String) {
    result_of(flexnbd(directory, line).output().unwrap())
}

fn result_of(output: Output) -> (Option<i32>, String, String) {
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

/// Waits for the exit of `mirror --wait`; returns exit status, stdout and stderr.
fn wait_for_exit(mut wait: Child) -> (Option<i32>, String, String) {
    wait_until("the exit of mirror --wait", || wait.try_wait().unwrap().is_some());
    result_of(wait.wait_with_output().unwrap())
}

/// Starts `mirror --wait` with a speed limit.
fn start_mirror_and_wait(directory: &Path, destination: &Server, speed: &str) -> Child {
    let port = destination.port();
    let line = format!("mirror -l 127.0.0.1 -p {port} -s {SOURCE} --wait --max-speed {speed}");
    let mut command = flexnbd(directory, &line);
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

const SOURCE: &str = "source.sock";
const DESTINATION: &str = "destination.sock";

/// Starts a source with `size` bytes of data, and a destination of the same size.
fn start_pair(directory: &Path, size: u64) -> (Server, Server) {
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
    run(directory, &format!("status -s {socket}")).1
}

/// Starts a migration that would take minutes.
fn start_slow_migration(directory: &Path) -> (Server, Server, Child) {
    let (source, destination) = start_pair(directory, 4 * MIB);
    let wait = start_mirror_and_wait(directory, &destination, "32K");
    wait_until("the copy to begin", || {
        status(directory, DESTINATION).contains("ownership=incoming")
    });
    (source, destination, wait)
}

#[test]
fn mirror_wait_reports_even_an_immediate_end() {
    for _ in 0..5 {
        let directory = temp_dir();
        let (mut source, mut destination) = start_pair(directory.path(), 64 * KIB);
        let wait = start_mirror_and_wait(directory.path(), &destination, "0");
        let (code, out, err) = wait_for_exit(wait);
        assert_eq!(code, Some(0), "{err}");
        // On a slow machine progress lines are printed in between.
        let last = out.lines().last().unwrap_or_default();
        assert!(out.starts_with("Migration started\n"), "{out}");
        assert!(last.starts_with("Migration finished: 64 KiB sent in "), "{out}");
        assert_eq!(source.wait_for_end().code(), Some(0), "{}", source.stderr());
        assert_eq!(destination.wait_for_end().code(), Some(0), "{}", destination.stderr());
    }
}

#[test]
fn mirror_reports_the_start_and_returns() {
    let directory = temp_dir();
    let (mut source, destination) = start_pair(directory.path(), 64 * KIB);
    let line = format!("mirror -l 127.0.0.1 -p {} -s {SOURCE} -u", destination.port());
    let (code, out, err) = run(directory.path(), &line);
    assert_eq!((code, out.as_str()), (Some(0), "Migration started\n"), "{err}");
    assert_eq!(source.wait_for_end().code(), Some(0), "{}", source.stderr());
    assert!(!directory.path().join("from.img").exists(), "--unlink deletes the image");
}

#[test]
fn mirror_to_an_unreachable_destination_exits_with_1() {
    let directory = temp_dir();
    let (mut source, mut destination) = start_pair(directory.path(), 64 * KIB);
    let port = destination.port();
    assert_eq!(destination.stop().code(), Some(1), "stopped before the disk has arrived");
    for wait in ["", "--wait"] {
        let line = format!("mirror -l 127.0.0.1 -p {port} -s {SOURCE} {wait}");
        let (code, out, err) = run(directory.path(), &line);
        assert_eq!((code, out.as_str()), (Some(1), ""), "{err}");
        assert!(err.starts_with("Mirror failed to connect"), "{err}");
    }
    assert!(status(directory.path(), SOURCE).contains("is_mirroring=false"));
    assert_eq!(source.stop().code(), Some(0));
}

#[test]
fn interrupted_wait_leaves_the_migration_running() {
    restore_default_signals();
    let directory = temp_dir();
    let (_source, _destination, mut wait) = start_slow_migration(directory.path());
    let pid = nix::unistd::Pid::from_raw(i32::try_from(wait.id()).unwrap());
    nix::sys::signal::kill(pid, Signal::SIGINT).unwrap();
    wait_until("the exit of mirror --wait", || wait.try_wait().unwrap().is_some());
    let output = wait.wait_with_output().unwrap();
    let signal = std::os::unix::process::ExitStatusExt::signal(&output.status);
    assert_eq!(signal, Some(Signal::SIGINT as i32), "a shell sees that a signal ended the command");
    let stderr = String::from_utf8(output.stderr).unwrap();
    let remedy = format!("to end it: `flexnbd break --sock {SOURCE}`");
    assert!(stderr.contains("goes on") && stderr.contains(&remedy), "{stderr}");
    assert!(status(directory.path(), SOURCE).contains("is_mirroring=true"));
}

#[test]
fn break_stops_the_migration_and_not_the_server() {
    let directory = temp_dir();
    let (mut source, _destination, wait) = start_slow_migration(directory.path());
    let second = format!("mirror -l 127.0.0.1 -p 1 -s {SOURCE} --wait");
    let refused = (Some(1), String::new(), "mirror already running\n".to_owned());
    assert_eq!(run(directory.path(), &second), refused);
    let faster = run(directory.path(), &format!("mirror-speed -s {SOURCE} -m 33K"));
    assert_eq!(faster, (Some(0), "updated\n".to_owned(), String::new()));
    let limit = format!("migration_speed_limit={}", 33 * KIB);
    wait_until("the new limit", || status(directory.path(), SOURCE).contains(&limit));
    let (code, out, _) = run(directory.path(), &format!("break -s {SOURCE}"));
    assert_eq!((code, out.as_str()), (Some(0), "mirror stopped\n"));
    let (code, _, err) = wait_for_exit(wait);
    assert_eq!(code, Some(1));
    assert!(err.starts_with("Mirroring abandoned"), "{err}");
    assert!(status(directory.path(), SOURCE).contains(" ownership=none "));
    let none = (Some(1), String::new(), "not mirroring\n".to_owned());
    assert_eq!(run(directory.path(), &format!("break -s {SOURCE}")), none);
    assert_eq!(source.stop().code(), Some(0));
}

#[test]
fn stopping_the_server_ends_mirror_wait() {
    let directory = temp_dir();
    let (mut source, _destination, wait) = start_slow_migration(directory.path());
    assert_eq!(source.stop().code(), Some(1), "stopped while a migration was running");
    let (code, _, err) = wait_for_exit(wait);
    let expected = "the server was stopped before the migration was over\n";
    assert_eq!((code, err.as_str()), (Some(1), expected));
}

#[test]
fn killing_the_server_fails_mirror_wait() {
    let directory = temp_dir();
    let (source, _destination, wait) = start_slow_migration(directory.path());
    source.signal(Signal::SIGKILL);
    let (code, _, err) = wait_for_exit(wait);
    assert_eq!(code, Some(1));
    assert!(err.contains("closed the connection without an answer"), "{err}");
}

#[test]
fn adopt_needs_force_and_an_unused_incomplete_copy() {
    let directory = temp_dir();
    let (_source, mut destination, mut wait) = start_slow_migration(directory.path());
    let (code, _, err) = run(directory.path(), "adopt -f to.img --force");
    assert_eq!(code, Some(78));
    assert!(err.contains("in use"), "{err}");
    destination.stop();
    let (code, _, err) = run(directory.path(), "adopt -f to.img");
    assert_eq!(code, Some(78));
    assert!(err.starts_with("flexnbd adopt: to.img is an incomplete copy"), "{err}");
    let (code, out, err) = run(directory.path(), "adopt -f to.img --force");
    assert_eq!(code, Some(0), "{err}");
    assert!(out.contains("and is now ours (adopted)"), "{out}");
    wait.kill().unwrap();
    wait.wait().unwrap();
}
