//! The systems that migrate a disk. The time excludes starting and stopping their servers.

use super::disks::Pair;
use super::machine::version;
use super::nbd::{Address, Export};
use super::network::{Network, wait_for_listener};
use super::process::{PATIENCE, Process, find, free_port, wait_until};
use super::{Error, qemu};
use flexnbd::control::command::{ArrivalAction, Mirror};
use flexnbd::control::{Command as Order, Summary, ask_and_wait};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Time limit of a migration.
pub(super) const MIGRATION_TIME_MAX: Duration = Duration::from_secs(600);
/// Time limit for both sides to exit after the migration.
const EXIT_TIME_MAX: Duration = Duration::from_secs(60);

#[derive(Clone, Debug)]
pub(super) struct System {
    pub(super) name: String,
    pub(super) version: String,
    method: Method,
    programs: Vec<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Method {
    /// `serve` and `listen`.
    Flexnbd,
    /// nbdcopy between two nbdkits: offline, nothing may write meanwhile.
    Nbdcopy { flush: bool },
    /// qemu-storage-daemon to qemu-nbd.
    Qemu,
}

/// A finished migration.
#[derive(Clone, Copy, Debug)]
pub(super) struct Moved {
    pub(super) elapsed: Duration,
    /// Bytes over TCP, if they could be counted.
    pub(super) wire: Option<u64>,
    /// Bytes of data that the source reports as sent, if it reports them.
    pub(super) bytes_sent: Option<u64>,
}

/// Those of `names` that are installed, and other builds of flexnbd; prints which are missing.
pub(super) fn installed(
    names: &[String],
    also: &[(String, PathBuf)],
) -> Result<Vec<System>, Error> {
    let mut systems = Vec::new();
    for name in names {
        let (method, programs): (_, &[&str]) = match name.as_str() {
            "flexnbd" => (Method::Flexnbd, &[env!("CARGO_BIN_EXE_flexnbd")]),
            "nbdcopy" => (Method::Nbdcopy { flush: false }, &["nbdcopy", "nbdkit"]),
            "nbdcopy-flush" => (Method::Nbdcopy { flush: true }, &["nbdcopy", "nbdkit"]),
            "qemu" => (Method::Qemu, &["qemu-storage-daemon", "qemu-nbd"]),
            _ => return Err(format!("unknown system {name}").into()),
        };
        let found: Result<Vec<PathBuf>, &str> =
            programs.iter().map(|program| find(program).ok_or(*program)).collect();
        match found {
            Ok(programs) => systems.push(System::new(name, method, programs)),
            Err(missing) => println!("# skipped {name}: {missing} is not installed"),
        }
    }
    let builds = also.iter();
    systems
        .extend(builds.map(|(name, path)| System::new(name, Method::Flexnbd, vec![path.clone()])));
    if systems.is_empty() { Err("there is no system to measure".into()) } else { Ok(systems) }
}

impl System {
    fn new(name: &str, method: Method, programs: Vec<PathBuf>) -> Self {
        Self { name: name.to_owned(), version: version(&programs[0]), method, programs }
    }

    /// The program, if it is a build of flexnbd.
    pub(super) fn flexnbd(&self) -> Option<&Path> {
        (self.method == Method::Flexnbd).then_some(&self.programs[0])
    }

    pub(super) fn migrate(&self, pair: &Pair, network: &Network) -> Result<Moved, Error> {
        let before = network.bytes();
        let (elapsed, bytes_sent) = match self.method {
            Method::Flexnbd => {
                let moved = Sides::start(&self.programs[0], pair)?.migrate(None)?;
                (moved.elapsed, Some(moved.summary.bytes_sent))
            }
            Method::Qemu => (qemu::migrate(&self.programs[0], &self.programs[1], pair)?, None),
            Method::Nbdcopy { flush } => {
                (copy(&self.programs[0], &self.programs[1], flush, pair)?, None)
            }
        };
        let wire = network.bytes().zip(before).map(|(after, before)| after - before);
        // The network does not count the unix sockets of nbdcopy.
        let wire = wire.filter(|_| !matches!(self.method, Method::Nbdcopy { .. }));
        Ok(Moved { elapsed, wire, bytes_sent })
    }
}

fn copy(nbdcopy: &Path, nbdkit: &Path, flush: bool, pair: &Pair) -> Result<Duration, Error> {
    let folder = tempfile::tempdir()?;
    let mut command = Command::new(nbdcopy);
    command.arg("--destination-is-zero").args(flush.then_some("--flush"));
    let mut servers = Vec::new();
    for (name, image) in [("source", &pair.source), ("destination", &pair.destination)] {
        let socket = folder.path().join(name);
        let mut server = Command::new(nbdkit);
        server.args(["--foreground", "--exit-with-parent", "--unix"]).arg(&socket);
        let mut server = Process::start(server.arg("file").arg(image), Stdio::null())?;
        wait_until(PATIENCE, || server.check().map(|()| socket.exists()))?;
        servers.push(server);
        command.arg(Export { address: Address::Unix(socket), name: "" }.uri());
    }
    let start = Instant::now();
    let end = Process::start(&mut command, Stdio::null())?.wait_for_success(MIGRATION_TIME_MAX)?;
    Ok(end - start)
}

/// A source with the disk and a destination without, both running.
#[derive(Debug)]
pub(super) struct Sides {
    source: Process,
    destination: Process,
    /// The address of the disk at the source.
    pub(super) address: SocketAddr,
    to: SocketAddr,
    control: PathBuf,
    /// Removed after the sides have exited.
    _folder: TempDir,
}

/// A finished migration by flexnbd.
#[derive(Clone, Copy, Debug)]
pub(super) struct FlexnbdMoved {
    pub(super) summary: Summary,
    pub(super) ordered: Instant,
    /// From the order until both sides have exited.
    pub(super) elapsed: Duration,
}

impl Sides {
    pub(super) fn start(program: &Path, pair: &Pair) -> Result<Self, Error> {
        let folder = tempfile::tempdir()?;
        let (address, to) = (free_port()?, free_port()?);
        let control = folder.path().join("source.sock");
        let side = |mode: &str, image: &Path, at: SocketAddr| {
            let mut command = Command::new(program);
            command.args([mode, "--quiet", "--addr", &at.ip().to_string()]);
            command.args(["--port", &at.port().to_string(), "--file"]).arg(image);
            // For records that cannot be kept with the image.
            command.env("STATE_DIRECTORY", folder.path());
            command
        };
        let mut serve = side("serve", &pair.source, address);
        serve.arg("--sock").arg(&control);
        let source = Process::start(serve, Stdio::null())?;
        let destination = Process::start(side("listen", &pair.destination, to), Stdio::null())?;
        // The control socket exists before the source listens.
        wait_for_listener(address)?;
        wait_for_listener(to)?;
        Ok(Self { source, destination, address, to, control, _folder: folder })
    }

    /// Migrates the disk at no more than `max_bps` bytes per second.
    pub(super) fn migrate(mut self, max_bps: Option<u64>) -> Result<FlexnbdMoved, Error> {
        let (to, control) = (self.to, self.control.clone());
        let ordered = Instant::now();
        let (sender, answer) = mpsc::channel();
        // In a thread, because `ask_and_wait` has no time limit.
        thread::spawn(move || {
            let mirror =
                Mirror { to, action: ArrivalAction::Exit, bind: None, max_bps, no_record: false };
            let _ = sender.send(ask_and_wait(&control, &Order::MirrorWait(mirror)));
        });
        let reply = answer.recv_timeout(MIGRATION_TIME_MAX)??;
        if !reply.is_success() {
            return Err(format!("the source answers: {}", reply.text()).into());
        }
        let summary = Summary::from_line(reply.text()).map_err(|error| error.to_string())?;
        let source = self.source.wait_for_success(EXIT_TIME_MAX)?;
        let destination = self.destination.wait_for_success(EXIT_TIME_MAX)?;
        Ok(FlexnbdMoved { summary, ordered, elapsed: source.max(destination) - ordered })
    }
}

#[cfg(test)]
#[allow(unused)] // See peers.rs.
mod tests {
    use super::super::disks::{Kind, same};
    use super::*;

    #[test]
    fn every_installed_system_moves_the_disk() {
        let names = ["flexnbd", "nbdcopy", "nbdcopy-flush", "qemu"].map(str::to_owned);
        let directory = tempfile::tempdir().unwrap();
        for system in installed(&names, &[]).unwrap() {
            let pair = Pair::new(directory.path(), Kind::Sparse25, 8 << 20).unwrap();
            let network = Network::new();
            let moved = system.migrate(&pair, &network).unwrap();
            assert!(same(&pair.source, &pair.destination).unwrap(), "{}", system.name);
            for bytes in [moved.wire, moved.bytes_sent].into_iter().flatten() {
                assert!(bytes >= 2 << 20, "{}: {moved:?}", system.name);
            }
        }
        assert!(installed(&["carrier-pigeon".to_owned()], &[]).is_err());
    }
}
