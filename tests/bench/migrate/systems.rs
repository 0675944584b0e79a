//! The systems that are measured, and how each of them moves a disk.
//! Times only the moving; starting and stopping what it needs is not part of it.

use super::disks::Pair;
use super::network::Network;
use super::ours::{MIGRATION_TIME_MAX, Sides};
use super::process::Process;
use super::running::Running;
use super::servers::{self, Server, find};
use super::session::Address;
use super::{Trouble, grid::Transport, qemu};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// The name of the build that is judged.
pub(super) const OURS: &str = "flexnbd";

/// A way to move a disk.
#[derive(Clone, Debug)]
pub(super) struct System {
    pub(super) name: String,
    pub(super) version: String,
    pub(super) way: Way,
}

/// What it consists of.
#[derive(Clone, Debug)]
pub(super) enum Way {
    /// `serve` and `listen`.
    Flexnbd(PathBuf),
    /// nbdcopy between two nbdkits: offline, nobody may write meanwhile.
    Nbdcopy { nbdcopy: PathBuf, nbdkit: PathBuf, flush: bool },
    /// qemu-storage-daemon into qemu-nbd.
    Qemu { daemon: PathBuf, nbd: PathBuf },
}

/// A disk that was moved.
#[derive(Clone, Copy, Debug)]
pub(super) struct Moved {
    pub(super) elapsed: Duration,
    /// Bytes that went over TCP, where they were counted.
    pub(super) wire: Option<u64>,
    /// Bytes of data that the source says it sent, if it says so.
    pub(super) bytes_sent: Option<u64>,
}

/// Finds those of `names` that are installed, says which are not, and adds other builds of ours.
///
/// # Errors
/// For a name that means nothing, or when there is nothing to measure.
pub(super) fn installed(
    names: &[String],
    also: &[(String, PathBuf)],
) -> Result<Vec<System>, Trouble> {
    let mut systems = Vec::new();
    for name in names {
        match way(name)? {
            Ok(way) => systems.push(System::new(name, way)),
            Err(missing) => println!("# skipped {name}: {missing} is not installed"),
        }
    }
    systems.extend(also.iter().map(|(name, path)| System::new(name, Way::Flexnbd(path.clone()))));
    if systems.is_empty() { Err("there is no system to measure".into()) } else { Ok(systems) }
}

/// The way of that name, or the program that it lacks.
fn way(name: &str) -> Result<Result<Way, &'static str>, Trouble> {
    let program = |name: &'static str| find(Path::new(name)).ok_or(name);
    let nbdcopy = |flush| {
        Ok(Way::Nbdcopy { nbdcopy: program("nbdcopy")?, nbdkit: program("nbdkit")?, flush })
    };
    let qemu =
        || Ok(Way::Qemu { daemon: program("qemu-storage-daemon")?, nbd: program("qemu-nbd")? });
    match name {
        OURS => Ok(Ok(Way::Flexnbd(env!("CARGO_BIN_EXE_flexnbd").into()))),
        "nbdcopy" => Ok(nbdcopy(false)),
        "nbdcopy-flush" => Ok(nbdcopy(true)),
        "qemu" => Ok(qemu()),
        _ => Err(format!("unknown system {name}").into()),
    }
}

impl System {
    fn new(name: &str, way: Way) -> Self {
        let (Way::Flexnbd(program)
        | Way::Nbdcopy { nbdcopy: program, .. }
        | Way::Qemu { daemon: program, .. }) = &way;
        // The kind plays no part in the version.
        let kind = servers::Kind::Flexnbd;
        let server = Server { name: name.to_owned(), kind, program: program.clone() };
        Self { name: name.to_owned(), version: server.version(), way }
    }

    /// The program, if it is ours.
    pub(super) fn ours(&self) -> Option<&Path> {
        if let Way::Flexnbd(program) = &self.way { Some(program) } else { None }
    }

    /// Moves the disk.
    ///
    /// # Errors
    /// When a program cannot be started, fails, or takes longer than any migration should.
    pub(super) fn migrate(&self, pair: &Pair, network: &Network) -> Result<Moved, Trouble> {
        let before = network.bytes();
        let (elapsed, bytes_sent) = match &self.way {
            Way::Flexnbd(program) => {
                let moved = Sides::start(program, pair)?.migrate(None)?;
                (moved.elapsed, Some(moved.summary.bytes_sent))
            }
            Way::Qemu { daemon, nbd } => (qemu::migrate(daemon, nbd, pair)?, None),
            Way::Nbdcopy { nbdcopy, nbdkit, flush } => (copy(nbdcopy, nbdkit, *flush, pair)?, None),
        };
        // nbdcopy uses unix sockets, where nothing is counted.
        let counted = !matches!(self.way, Way::Nbdcopy { .. });
        let sent = || Some(network.bytes()? - before?);
        Ok(Moved { elapsed, wire: counted.then(sent).flatten(), bytes_sent })
    }
}

fn copy(nbdcopy: &Path, nbdkit: &Path, flush: bool, pair: &Pair) -> Result<Duration, Trouble> {
    let folder = tempfile::tempdir()?;
    let kind = servers::Kind::Nbdkit;
    let nbdkit = Server { name: "nbdkit".into(), kind, program: nbdkit.into() };
    let source = Running::start(&nbdkit, &pair.source, Transport::Unix)?;
    let destination = Running::start(&nbdkit, &pair.destination, Transport::Unix)?;
    let mut command = Command::new(nbdcopy);
    command.arg("--destination-is-zero").args(flush.then_some("--flush"));
    command.args([uri(&source)?, uri(&destination)?]);
    let began = Instant::now();
    let ended = Process::start(command, "nbdcopy", folder.path())?.succeeds(MIGRATION_TIME_MAX)?;
    Ok(ended - began)
}

fn uri(server: &Running) -> Result<String, Trouble> {
    match &server.place.address {
        Address::Unix(path) => Ok(format!("nbd+unix:///?socket={}", path.display())),
        Address::Tcp(address) => Ok(format!("nbd://{address}")),
    }
}

#[cfg(test)]
#[allow(unused)] // See migrate.rs.
mod tests {
    use super::super::disks::{Disks, Kind, same};
    use super::*;

    #[test]
    fn every_system_that_is_installed_moves_the_disk() {
        let names = ["flexnbd", "nbdcopy", "nbdcopy-flush", "qemu"].map(str::to_owned);
        let directory = tempfile::tempdir().unwrap();
        let disks = Disks::new(directory.path()).unwrap();
        for system in installed(&names, &[]).unwrap() {
            let pair = disks.make(Kind::Sparse25, 8 << 20).unwrap();
            let network = Network::of_our_own();
            let moved = system.migrate(&pair, &network).unwrap();
            assert!(same(&pair.source, &pair.destination).unwrap(), "{}", system.name);
            let expected = if moved.wire.is_some() { 2 << 20 } else { 0 };
            assert!(moved.wire.unwrap_or(0) >= expected, "{}: {moved:?}", system.name);
        }
    }

    #[test]
    fn what_is_unknown_is_an_error() {
        assert!(installed(&["carrier-pigeon".to_owned()], &[]).is_err());
        assert!(installed(&[], &[]).is_err());
    }
}
