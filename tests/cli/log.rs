//! The log on stderr: line format and levels as in the manual; a closed stderr affects no client.

use crate::{flags_of, read};
use harness::raw::Wire;
use harness::{Builder, Endpoint, Program, Served, Server, sparse_image, temp_dir};
use std::process::Stdio;

/// The level of a log line, which must be `MS:LEVEL:PID THREAD FILE:LINE: MESSAGE`.
#[track_caller]
fn level_of(line: &str, pid: u32) -> char {
    let parts = || {
        let (milliseconds, rest) = line.split_once(':')?;
        let (level, rest) = rest.split_once(':')?;
        let (process, rest) = rest.split_once(' ')?;
        let (thread, rest) = rest.split_once(' ')?;
        let (file, rest) = rest.split_once(':')?;
        let (number, message) = rest.split_once(": ")?;
        let are_numbers = milliseconds.parse::<u64>().is_ok() && number.parse::<u32>().is_ok();
        let is_ours = process == pid.to_string() && file.ends_with(".rs");
        let level = level.parse().ok().filter(|l| "DIWEF".contains(*l))?;
        (are_numbers && is_ours && !thread.is_empty() && !message.is_empty()).then_some(level)
    };
    parts().unwrap_or_else(|| panic!("not a line of the log: {line}"))
}

/// Runs a server that serves a client, refuses one, and gets an invalid handshake from a third.
#[track_caller]
fn serve_and_log(flags: &[&str]) -> (Server, String) {
    let dir = temp_dir();
    let image = sparse_image(dir.path(), "image", 4096);
    let mut server = Builder::serve(&image).args(flags).args(["127.0.0.1"]).start();
    read(&flags_of(&server), 0, 512).run().succeeded();
    read(&flags_of(&server), 0, 512).words("--bind 127.0.0.2").run().ended_with(1);
    let mut wire = Wire::connect(server.endpoint());
    wire.recv(18);
    wire.send(&[0xff; 4]);
    wire.expect_closed("unknown client flags");
    assert!(server.stop().success());
    let log = server.stderr();
    (server, log)
}

fn levels(flags: &[&str]) -> String {
    let (server, log) = serve_and_log(flags);
    let mut levels: Vec<char> = log.lines().map(|line| level_of(line, server.pid())).collect();
    levels.sort_unstable();
    levels.dedup();
    levels.into_iter().collect()
}

#[test]
fn verbosity_options_select_the_documented_levels() {
    assert_eq!(levels(&["--quiet"]), "");
    assert_eq!(levels(&[]), "W");
    let verbose = levels(&["--verbose"]);
    let expected: &[&str] = if cfg!(debug_assertions) { &["IW", "DIW"] } else { &["IW"] };
    assert!(expected.contains(&verbose.as_str()), "{verbose}");
}

#[test]
fn the_last_of_quiet_and_verbose_wins() {
    assert_eq!(levels(&["-v", "-q"]), "");
    assert!(levels(&["-q", "-v"]).contains('I'));
    let dir = temp_dir();
    let image = sparse_image(dir.path(), "image", 4096);
    let before_the_mode =
        Program::flexnbd("-q serve -f").args([&image]).words("-l 192.0.2.1 -p 1 -v");
    assert!(before_the_mode.run().stderr.contains(":F:"));
}

#[test]
fn every_client_failure_is_logged_with_its_address() {
    let (_, log) = serve_and_log(&[]);
    let lines: Vec<&str> = log.lines().collect();
    assert_eq!(lines.len(), 2, "{log}");
    assert!(lines[0].contains("refused 127.0.0.2:"), "{log}");
    assert!(lines[1].contains("closed the session of 127.0.0.1:"), "{log}");
}

#[test]
fn fatal_errors_are_logged_even_when_quiet() {
    let outcome = Program::flexnbd("--quiet serve --file /no/such/disk -l 127.0.0.1 -p 1").run();
    outcome.refused(78, &[":F:", "/no/such/disk does not exist"]);
}

#[test]
fn a_verbose_debug_build_logs_debug_lines() {
    if !cfg!(debug_assertions) {
        return;
    }
    let dir = temp_dir();
    let image = sparse_image(dir.path(), "image", 4096);
    let sock = dir.path().join("control.sock");
    let server = Builder::serve(&image).args(["-v", "--sock"]).args([&sock]).start();
    harness::wait_until("the control socket", || sock.exists());
    // Closes the connection without reading the reply.
    let stream = std::os::unix::net::UnixStream::connect(&sock).unwrap();
    drop(stream);
    server.wait_for_stderr(":D:");
}

#[test]
fn a_server_survives_a_closed_stderr() {
    let served = Served::with(&[]);
    drop(served.server);
    let port = harness::free_port();
    let endpoint = Endpoint::localhost(port);
    let serve = Program::flexnbd("serve -v --file").args([&served.image]).words(&endpoint.flags());
    let mut child = serve.start(Stdio::null(), Stdio::null());
    drop(child.stderr.take());
    let is_up = harness::poll_until(harness::TIMEOUT, || {
        std::net::TcpStream::connect(("127.0.0.1", port)).is_ok()
    });
    let outcomes = [(); 3].map(|()| read(&endpoint.flags(), 0, 512).run());
    let is_running = child.try_wait().unwrap().is_none();
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(is_up && is_running);
    for outcome in outcomes {
        outcome.succeeded();
    }
}
