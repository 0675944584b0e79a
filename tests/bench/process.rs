//! A child process with captured stderr; stopped when dropped.
//! Signals only processes that the benchmark started.

use super::Error;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::borrow::BorrowMut;
use std::fs::File;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

/// How long a server may take for one step before it counts as failed.
pub(super) const PATIENCE: Duration = Duration::from_secs(20);
const POLL_INTERVAL: Duration = Duration::from_millis(2);
const STDERR_MAX: usize = 64 << 10;

#[derive(Debug)]
pub(super) struct Process {
    name: String,
    pub(super) pid: u32,
    stderr: File,
    exit: Receiver<(io::Result<ExitStatus>, Instant)>,
    exited: bool,
}

impl Process {
    pub(super) fn start(mut command: impl BorrowMut<Command>, stdin: Stdio) -> Result<Self, Error> {
        let command = command.borrow_mut();
        let program = Path::new(command.get_program());
        let name = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let stderr = tempfile::tempfile()?;
        command.stdin(stdin).stdout(Stdio::null()).stderr(stderr.try_clone()?);
        let mut child = command.spawn().map_err(|error| format!("{name}: {error}"))?;
        let pid = child.id();
        let (sender, exit) = mpsc::channel();
        // A thread waits, so that the time of the exit is exact.
        thread::spawn(move || {
            let status = child.wait();
            // Fails after the `Process` was dropped.
            let _ = sender.send((status, Instant::now()));
        });
        Ok(Self { name, pid, stderr, exit, exited: false })
    }

    /// Waits for exit status 0; returns the time of the exit.
    pub(super) fn wait_for_success(&mut self, timeout: Duration) -> Result<Instant, Error> {
        match self.exit.recv_timeout(timeout) {
            Ok((status, at)) => self.judge(status?).map(|()| at),
            Err(_) => Err(self.error(&format!("does not exit within {timeout:?}"))),
        }
    }

    /// Fails if the program has exited with an error.
    pub(super) fn check(&mut self) -> Result<(), Error> {
        match self.exit.try_recv() {
            Ok((status, _)) => self.judge(status?),
            Err(_) => Ok(()),
        }
    }

    fn judge(&mut self, status: ExitStatus) -> Result<(), Error> {
        self.exited = true;
        if status.success() { Ok(()) } else { Err(self.error(&format!("ended with {status}"))) }
    }

    /// An error about this program, with the last line of its stderr.
    pub(super) fn error(&self, what: &str) -> Error {
        let mut text = vec![0; STDERR_MAX];
        let length = self.stderr.read_at(&mut text, 0).unwrap_or(0);
        let text = String::from_utf8_lossy(&text[..length]);
        let last = text.lines().last().unwrap_or("nothing on stderr");
        format!("{} {what}: {last}", self.name).into()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        for signal in [Signal::SIGTERM, Signal::SIGKILL] {
            // Checked first: the kernel may give the id of an exited process to another one.
            if self.exited || self.exit.try_recv().is_ok() {
                return;
            }
            let _ = kill(pid(self.pid), signal);
            self.exited = self.exit.recv_timeout(PATIENCE).is_ok();
        }
    }
}

/// The conversion cannot overflow: the kernel limits process ids to 22 bits.
pub(super) fn pid(pid: u32) -> Pid {
    Pid::from_raw(pid as i32)
}

/// Polls for a condition that no descriptor announces; returns whether it came true in time.
pub(super) fn wait_until(
    timeout: Duration,
    mut condition: impl FnMut() -> Result<bool, Error>,
) -> Result<bool, Error> {
    let deadline = Instant::now() + timeout;
    while !condition()? {
        if Instant::now() > deadline {
            return Ok(false);
        }
        thread::sleep(POLL_INTERVAL);
    }
    Ok(true)
}

/// A port without a listener. Another process may take it before the server does; the server then
/// fails.
pub(super) fn free_port() -> io::Result<SocketAddr> {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()
}

/// The program's file: `program` itself if it is absolute, else the first in `PATH`.
pub(super) fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let candidates = std::env::split_paths(&path).map(|directory| directory.join(program));
    candidates.into_iter().find(|candidate| candidate.is_file())
}
