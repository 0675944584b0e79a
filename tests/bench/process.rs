//! A program that was started here and whose end matters; stopped when dropped.
//! Only processes that were started here are ever signalled, by their ids.

use super::Trouble;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

/// How long a program may take to end when it is told to.
const GRACE: Duration = Duration::from_secs(10);

/// A running program.
#[derive(Debug)]
pub(super) struct Process {
    name: String,
    pid: Pid,
    complaints: PathBuf,
    end: Receiver<(io::Result<ExitStatus>, Instant)>,
    has_ended: bool,
}

impl Process {
    /// Starts it; what it says on stderr goes to a file in `folder`.
    ///
    /// # Errors
    /// When it cannot be started.
    pub(super) fn start(command: Command, name: &str, folder: &Path) -> Result<Self, Trouble> {
        Self::start_with(Stdio::null(), command, name, folder)
    }

    /// Starts it with an input of its own; otherwise as [`Self::start`].
    ///
    /// # Errors
    /// When it cannot be started.
    pub(super) fn start_with(
        input: Stdio,
        mut command: Command,
        name: &str,
        folder: &Path,
    ) -> Result<Self, Trouble> {
        let complaints = folder.join(format!("{name}.stderr"));
        command.stdin(input).stdout(Stdio::null()).stderr(File::create(&complaints)?);
        let mut child = command.spawn().map_err(|error| format!("{name}: {error}"))?;
        let pid = Pid::from_raw(i32::try_from(child.id())?);
        let (sender, end) = mpsc::channel();
        // Waits here, so that the end is seen when it comes and not when somebody looks.
        thread::spawn(move || {
            let status = child.wait();
            // Nobody may want to know any more.
            let _ = sender.send((status, Instant::now()));
        });
        Ok(Self { name: name.to_owned(), pid, complaints, end, has_ended: false })
    }

    /// When it ended well.
    ///
    /// # Errors
    /// When it fails, or does not end in time.
    pub(super) fn succeeds(&mut self, within: Duration) -> Result<Instant, Trouble> {
        let Ok((status, at)) = self.end.recv_timeout(within) else {
            return Err(format!("{} does not end: {}", self.name, self.complaint()).into());
        };
        self.has_ended = true;
        let status = status?;
        if status.success() {
            return Ok(at);
        }
        Err(format!("{} ended with {status}: {}", self.name, self.complaint()).into())
    }

    /// The last line that it wrote to stderr.
    pub(super) fn complaint(&self) -> String {
        let text = fs::read_to_string(&self.complaints).unwrap_or_default();
        text.lines().last().unwrap_or("it said nothing").to_owned()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        for signal in [Signal::SIGTERM, Signal::SIGKILL] {
            // Before signalling: an id whose process has ended may be somebody else's.
            if self.has_ended || self.end.try_recv().is_ok() {
                return;
            }
            let _ = kill(self.pid, signal);
            self.has_ended = self.end.recv_timeout(GRACE).is_ok();
        }
    }
}

#[cfg(test)]
#[allow(unused)] // See peers.rs.
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    fn shell(script: &str, folder: &Path) -> Process {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        Process::start(command, "script", folder).unwrap()
    }

    #[test]
    fn a_program_that_fails_is_quoted() {
        let folder = tempfile::tempdir().unwrap();
        shell("exit 0", folder.path()).succeeds(LONG).unwrap();
        let trouble = shell("echo no >&2; echo disk >&2; exit 3", folder.path()).succeeds(LONG);
        let trouble = trouble.unwrap_err().to_string();
        assert!(trouble.contains("script") && trouble.ends_with(": disk"), "{trouble}");
    }

    #[test]
    fn what_is_dropped_is_stopped() {
        let folder = tempfile::tempdir().unwrap();
        let process = shell("exec sleep 600", folder.path());
        let pid = process.pid;
        drop(process);
        assert!(kill(pid, None).is_err(), "{pid} still runs");
    }
}
