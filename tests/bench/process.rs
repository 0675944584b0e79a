//! The programs to measure: which are installed, and their processes, which stop when dropped.
//! Signals only processes that the benchmark started.

use crate::report::Error;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

/// The build of flexnbd that cargo has just made.
pub(crate) const FLEXNBD: &str = env!("CARGO_BIN_EXE_flexnbd");
/// How long a server may take for one step before it counts as failed.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);
const POLL_INTERVAL: Duration = Duration::from_millis(2);
const STDERR_MAX: usize = 64 << 10;

/// A server or system, and the files of its programs.
#[derive(Debug)]
pub(crate) struct Installed<K> {
    pub(crate) name: String,
    pub(crate) kind: K,
    pub(crate) programs: Vec<PathBuf>,
}

/// The servers or systems in `names` that are installed, and other builds of flexnbd. Prints which
/// are missing. Each entry of `kinds` is a name, a kind and its programs; the first is flexnbd.
pub(crate) fn installed<K: Copy>(
    names: &[String],
    also: &[(String, PathBuf)],
    kinds: &[(&str, K, &[&str])],
) -> Result<Vec<Installed<K>>, Error> {
    let mut all = Vec::new();
    for name in names {
        let known = kinds.iter().find(|(known, ..)| known == name);
        let (_, kind, programs) = *known.ok_or_else(|| format!("unknown name {name}"))?;
        let found = programs.iter().map(|program| find(program).ok_or(*program)).collect();
        match found {
            Ok(programs) => all.push(Installed { name: name.clone(), kind, programs }),
            Err(missing) => println!("# skipped {name}: {missing} is not installed"),
        }
    }
    let (_, kind, _) = kinds[0];
    for (name, path) in also {
        all.push(Installed { name: name.clone(), kind, programs: vec![path.clone()] });
    }
    if all.is_empty() { Err("there is nothing to measure".into()) } else { Ok(all) }
}

/// The program's file: `program` itself if it is absolute, else the first in `PATH`.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut files = std::env::split_paths(&path).map(|directory| directory.join(program));
    files.find(|file| file.is_file())
}

/// Parses `NAME=PATH`, the value of `--also`.
pub(crate) fn named_path(text: &str) -> Result<(String, PathBuf), String> {
    match text.split_once('=') {
        Some((name, path)) if !name.is_empty() && !path.is_empty() => {
            Ok((name.to_owned(), path.into()))
        }
        _ => Err("not of the form NAME=PATH".to_owned()),
    }
}

/// A child process with captured stderr.
#[derive(Debug)]
pub(crate) struct Process {
    name: String,
    pub(crate) pid: Pid,
    stderr: File,
    exit: Receiver<(io::Result<ExitStatus>, Instant)>,
    exited: bool,
}

impl Process {
    pub(crate) fn start(command: &mut Command, stdin: Stdio) -> Result<Self, Error> {
        let program = Path::new(command.get_program());
        let name = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let stderr = tempfile::tempfile()?;
        command.stdin(stdin).stdout(Stdio::null()).stderr(stderr.try_clone()?);
        let mut child = command.spawn().map_err(|error| format!("{name}: {error}"))?;
        // Cannot overflow: the kernel limits process ids to 22 bits.
        let pid = Pid::from_raw(child.id() as i32);
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
    pub(crate) fn wait_for_success(&mut self, timeout: Duration) -> Result<Instant, Error> {
        let Ok((status, at)) = self.exit.recv_timeout(timeout) else {
            return Err(self.error(&format!("does not exit within {timeout:?}")));
        };
        self.exited = true;
        let status = status?;
        if status.success() { Ok(at) } else { Err(self.error(&format!("ended with {status}"))) }
    }

    /// Polls for a condition that no descriptor announces. Fails if the program exits before.
    pub(crate) fn wait_until(&mut self, mut condition: impl FnMut() -> bool) -> Result<(), Error> {
        let deadline = Instant::now() + PATIENCE;
        while !condition() {
            if let Ok((status, _)) = self.exit.try_recv() {
                self.exited = true;
                return Err(self.error(&format!("ended with {}", status?)));
            }
            if Instant::now() > deadline {
                return Err(self.error("is not ready in time"));
            }
            thread::sleep(POLL_INTERVAL);
        }
        Ok(())
    }

    /// An error about this program, with the last line of its stderr.
    pub(crate) fn error(&self, what: &str) -> Error {
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
            let _ = kill(self.pid, signal);
            self.exited = self.exit.recv_timeout(PATIENCE).is_ok();
        }
    }
}
