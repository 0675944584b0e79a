//! A server while it runs: started, found ready, and stopped when dropped.
//! Only processes that were started here are ever signalled, by their ids.

use super::Trouble;
use super::grid::Transport;
use super::servers::{CONFIG, PID_FILE, Server};
use super::session::{Address, PATIENCE, Place};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs::{self, File};
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::Path;
use std::process::{Child, Stdio};
use std::thread;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// How long to wait before looking again whether a server is ready, or gone: it tells nobody.
const LOOK_AGAIN: Duration = Duration::from_millis(5);
/// Where a server's complaints go.
const COMPLAINTS: &str = "stderr";

/// A server that is ready; dropping it stops it.
#[derive(Debug)]
pub(super) struct Running {
    /// The process that serves, or the first of several.
    pub(super) pid: u32,
    pub(super) place: Place,
    child: Child,
    folder: TempDir,
}

impl Running {
    /// Starts a server on an address of its own and waits until it can be connected to.
    ///
    /// # Errors
    /// When it cannot be started, ends, or does not listen in time; with what it said.
    pub(super) fn start(
        server: &Server,
        image: &Path,
        transport: Transport,
    ) -> Result<Self, Trouble> {
        let folder = tempfile::tempdir()?;
        let address = match transport {
            Transport::Tcp => Address::Tcp(free_port()?),
            Transport::Unix => Address::Unix(folder.path().join("socket")),
        };
        if let Some(text) = server.configuration(image, &address) {
            fs::write(folder.path().join(CONFIG), text)?;
        }
        let mut command = server.command(image, &address, folder.path());
        command.stdin(Stdio::null()).stdout(Stdio::null());
        command.stderr(File::create(folder.path().join(COMPLAINTS))?);
        let child = command.spawn()?;
        let place = Place { address, export: server.export() };
        let mut running = Self { pid: child.id(), place, child, folder };
        running.wait_until_ready(server.is_daemon())?;
        Ok(running)
    }

    fn wait_until_ready(&mut self, daemon: bool) -> Result<(), Trouble> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait()?
                && !(daemon && status.success())
            {
                return Err(format!("ended with {status}: {}", self.complaint()).into());
            }
            let found = !daemon || self.find_daemon();
            if found && self.place.address.connect().is_ok() {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(format!("does not listen: {}", self.complaint()).into());
            }
            thread::sleep(LOOK_AGAIN);
        }
    }

    /// Whether the process in the background has told its id.
    fn find_daemon(&mut self) -> bool {
        let text = fs::read_to_string(self.folder.path().join(PID_FILE)).unwrap_or_default();
        let pid = text.trim().parse::<u32>().ok();
        pid.inspect(|pid| self.pid = *pid).is_some()
    }

    /// The last line that it wrote to stderr.
    fn complaint(&self) -> String {
        let text = fs::read_to_string(self.folder.path().join(COMPLAINTS)).unwrap_or_default();
        text.lines().last().unwrap_or("it said nothing").to_owned()
    }

    /// Whether the process has ended within the time.
    fn is_gone(&mut self, within: Duration) -> bool {
        let deadline = Instant::now() + within;
        loop {
            let child_gone = self.child.try_wait().is_ok_and(|status| status.is_some());
            if child_gone && signal(self.pid, None) == Err(Errno::ESRCH) {
                return true;
            }
            if Instant::now() > deadline {
                return false;
            }
            thread::sleep(LOOK_AGAIN);
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = signal(self.pid, Some(Signal::SIGTERM));
        if !self.is_gone(PATIENCE) {
            let _ = signal(self.pid, Some(Signal::SIGKILL));
            self.is_gone(PATIENCE);
        }
    }
}

fn signal(pid: u32, signal: Option<Signal>) -> nix::Result<()> {
    // It fits: the kernel counts processes in 22 bits.
    kill(Pid::from_raw(pid as i32), signal)
}

/// An address that nobody listens on. Somebody else may take it before the server does; then that
/// one says so.
pub(super) fn free_port() -> io::Result<SocketAddr> {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()
}
