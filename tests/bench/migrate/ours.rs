//! flexnbd on both sides: `serve` with a disk, `listen` without, and the order to move it.
//! Judges nothing; what the source says of the migration is handed on.

use super::Trouble;
use super::disks::Pair;
use super::network::wait_for_listener;
use super::process::Process;
use super::running::free_port;
use flexnbd::control::command::{ArrivalAction, Mirror};
use flexnbd::control::{Command as Order, Summary, ask_and_wait};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// How long a migration may take before it counts as stuck.
pub(super) const MIGRATION_TIME_MAX: Duration = Duration::from_secs(600);
/// How long the sides may take to end once the disk has moved.
const END_TIME_MAX: Duration = Duration::from_secs(60);
/// Where records go that cannot be kept with the image.
const STATE: &str = "STATE_DIRECTORY";

/// Both sides, ready.
#[derive(Debug)]
pub(super) struct Sides {
    source: Process,
    destination: Process,
    /// Where clients find the disk.
    pub(super) address: SocketAddr,
    to: SocketAddr,
    control: PathBuf,
    /// Held until the sides have ended.
    _folder: TempDir,
}

/// A migration that came to its end.
#[derive(Clone, Copy, Debug)]
pub(super) struct Moved {
    pub(super) summary: Summary,
    /// When it was ordered.
    pub(super) ordered: Instant,
    /// From then until both sides had ended.
    pub(super) elapsed: Duration,
}

impl Sides {
    /// Starts both and waits until they listen.
    ///
    /// # Errors
    /// When one of them does not.
    pub(super) fn start(program: &Path, pair: &Pair) -> Result<Self, Trouble> {
        let folder = tempfile::tempdir()?;
        let (address, to) = (free_port()?, free_port()?);
        let control = folder.path().join("source.sock");
        let mut serve = side(program, "serve", &pair.source, address, folder.path());
        serve.arg("--sock").arg(&control);
        let source = Process::start(serve, "serve", folder.path())?;
        let listen = side(program, "listen", &pair.destination, to, folder.path());
        let destination = Process::start(listen, "listen", folder.path())?;
        // The control socket is there before anybody may connect.
        wait_for_listener(address)?;
        wait_for_listener(to)?;
        Ok(Self { source, destination, address, to, control, _folder: folder })
    }

    /// Moves the disk, at no more than `max_bps` bytes a second if that is given.
    ///
    /// # Errors
    /// When the source refuses or gives up, or a side does not end with success.
    pub(super) fn migrate(mut self, max_bps: Option<u64>) -> Result<Moved, Trouble> {
        let ordered = Instant::now();
        let mirror = Mirror {
            to: self.to,
            action: ArrivalAction::Exit,
            bind: None,
            max_bps,
            no_record: false,
        };
        let summary = order(self.control.clone(), mirror)?;
        let source = self.source.succeeds(END_TIME_MAX)?;
        let destination = self.destination.succeeds(END_TIME_MAX)?;
        Ok(Moved { summary, ordered, elapsed: source.max(destination) - ordered })
    }
}

fn side(program: &Path, mode: &str, image: &Path, at: SocketAddr, folder: &Path) -> Command {
    let mut command = Command::new(program);
    command.args([mode, "--quiet", "--addr", &at.ip().to_string()]);
    command.args(["--port", &at.port().to_string(), "--file"]).arg(image);
    command.env(STATE, folder);
    command
}

/// What `mirror --wait` asks. The answer is waited for elsewhere, because it may never come.
fn order(control: PathBuf, mirror: Mirror) -> Result<Summary, Trouble> {
    let (sender, answer) = mpsc::channel();
    thread::spawn(move || {
        // Whoever waits may have given up.
        let _ = sender.send(ask_and_wait(&control, &Order::MirrorWait(mirror)));
    });
    let Ok(reply) = answer.recv_timeout(MIGRATION_TIME_MAX) else {
        return Err(format!("the migration is not over after {MIGRATION_TIME_MAX:?}").into());
    };
    let reply = reply?;
    if !reply.is_success() {
        return Err(format!("the source answers: {}", reply.text()).into());
    }
    Ok(Summary::from_line(reply.text()).map_err(|error| error.to_string())?)
}

#[cfg(test)]
#[allow(unused)] // See migrate.rs.
mod tests {
    use super::super::disks::{Disks, Kind, same};
    use super::*;

    #[test]
    fn a_disk_is_moved_and_told_of() {
        let directory = tempfile::tempdir().unwrap();
        let disks = Disks::new(directory.path()).unwrap();
        let pair = disks.make(Kind::Sparse25, 8 << 20).unwrap();
        let program = Path::new(env!("CARGO_BIN_EXE_flexnbd"));
        let moved = Sides::start(program, &pair).unwrap().migrate(None).unwrap();
        assert!(moved.summary.acknowledged && moved.summary.bytes_sent >= 2 << 20, "{moved:?}");
        assert!(same(&pair.source, &pair.destination).unwrap());
    }
}
