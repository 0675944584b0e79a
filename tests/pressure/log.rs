//! A log that cannot be written: no thread that serves, accepts or controls waits for it.

use harness::raw::Wire;
use harness::session::{Mode, Request, Session};
use harness::{
    Endpoint, KIB, TIMEOUT, TempDir, free_port, poll_until, require_root, sparse_image, temp_dir,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::io::{Read as _, Write as _};
use std::net::Ipv4Addr;
use std::os::linux::fs::MetadataExt as _;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::process::{Child, Command, Stdio};

/// More lines than the queue of the log, a pipe and the journal's socket buffer together.
const LINES: usize = 2400;

/// A server whose log is not read. Dropping it kills it.
struct UnreadLog {
    child: Child,
    target: Endpoint,
    dir: TempDir,
}

impl UnreadLog {
    /// Starts `words... serve` and waits until it accepts connections.
    #[track_caller]
    fn start(words: &[&str], stderr: Stdio, adapt: impl FnOnce(&mut Command)) -> UnreadLog {
        let dir = temp_dir();
        let image = sparse_image(dir.path(), "image", 64 * KIB);
        let port = free_port();
        let mut command = Command::new(words[0]);
        command.args(&words[1..]).arg(env!("CARGO_BIN_EXE_flexnbd"));
        command.args(["serve", "--verbose", "--addr", "127.0.0.1", "--port", &port.to_string()]);
        command.arg("--sock").arg(dir.path().join("control.sock"));
        command.arg("--file").arg(image).stdin(Stdio::null()).stdout(Stdio::null()).stderr(stderr);
        adapt(&mut command);
        let child = command.spawn().unwrap();
        let target = Endpoint::Tcp((Ipv4Addr::LOCALHOST, port).into());
        let server = UnreadLog { child, target, dir };
        let up = poll_until(TIMEOUT, || Wire::try_connect(&server.target).is_ok());
        assert!(up, "the server accepts no connection");
        server
    }

    /// Causes more lines than the buffers hold while a session continues and new ones open.
    #[track_caller]
    fn assert_serves_while_the_log_blocks(&self) {
        let mut session = Session::open(&self.target, Mode::Simple).unwrap();
        // The log has a line for each of these commands.
        for _ in 0..LINES {
            let mut control = UnixStream::connect(self.dir.path().join("control.sock")).unwrap();
            control.write_all(b"acl\n\n").unwrap();
            control.read_to_end(&mut Vec::new()).unwrap();
        }
        session.ok(Request::write(0, &[1; 512]));
        Session::open(&self.target, Mode::Structured).unwrap().ok(Request::write(0, &[1; 512]));
    }

    #[track_caller]
    fn assert_ends_after_sigterm(&mut self) {
        kill(Pid::from_raw(self.child.id().cast_signed()), Signal::SIGTERM).unwrap();
        let mut status = None;
        let ended = poll_until(TIMEOUT, || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        });
        assert!(ended, "the server does not end after SIGTERM");
        assert_eq!(status.unwrap().code(), Some(0));
    }
}

impl Drop for UnreadLog {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_full_stderr_pipe_stops_only_the_log() {
    let mut server = UnreadLog::start(&["env"], Stdio::piped(), |_| ());
    server.assert_serves_while_the_log_blocks();
    server.assert_ends_after_sigterm();
}

#[test]
fn dropped_lines_are_counted_once_the_log_drains() {
    let mut server = UnreadLog::start(&["env"], Stdio::piped(), |_| ());
    server.assert_serves_while_the_log_blocks();
    let mut stderr = server.child.stderr.take().unwrap();
    let mut log = String::new();
    let mut buffer = [0; 1 << 16];
    let is_counted = poll_until(TIMEOUT, || {
        let count = stderr.read(&mut buffer).unwrap();
        log.push_str(&String::from_utf8_lossy(&buffer[..count]));
        log.contains(" messages of the log were dropped")
    });
    assert!(is_counted, "no count of dropped lines");
    drop(Session::open(&server.target, Mode::Simple));
    while !log.rsplit(" messages of the log were dropped").next().unwrap().contains("connected") {
        let count = stderr.read(&mut buffer).unwrap();
        log.push_str(&String::from_utf8_lossy(&buffer[..count]));
    }
}

/// A stopped journald: a socket at the journal's path that is never read, mounted in a namespace of
/// the server's own.
#[test]
fn a_stopped_journal_stops_only_the_log() {
    if !require_root("a stopped journal") {
        return;
    }
    let dir = temp_dir();
    let _journal = UnixDatagram::bind(dir.path().join("socket")).unwrap();
    let stream = std::fs::File::create(dir.path().join("stream")).unwrap();
    let metadata = stream.metadata().unwrap();
    let script = "mount -t tmpfs tmpfs /run && mkdir -p /run/systemd/journal && \
                 mount --bind \"$0\" /run/systemd/journal && exec \"$@\"";
    let place = dir.path().to_str().unwrap();
    let words = ["unshare", "--mount", "sh", "-c", script, place];
    let mut server = UnreadLog::start(&words, stream.into(), |command| {
        let stream = format!("{}:{}", metadata.st_dev(), metadata.st_ino());
        command.env("JOURNAL_STREAM", stream);
    });
    server.assert_serves_while_the_log_blocks();
    server.assert_ends_after_sigterm();
    let lines = std::fs::read_to_string(dir.path().join("stream")).unwrap();
    assert_eq!(lines, "", "every line goes to the journal");
}

/// The queue of the log is flushed even if the process ends at once.
#[test]
fn a_fatal_line_is_written_before_the_process_ends() {
    for _ in 0..20 {
        let output = Command::new(env!("CARGO_BIN_EXE_flexnbd"))
            .args(["serve", "--file", "/no/such/disk", "--addr", "127.0.0.1", "--port", "1"])
            .output()
            .unwrap();
        let log = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(log.contains(":F:") && log.ends_with('\n'), "{log:?}");
    }
}
