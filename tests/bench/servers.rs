//! The servers: their command lines, and how they start and stop.
//! All serve the same file through the page cache, on loopback or a unix socket, with their default
//! settings except where those limit them (README.md, "How the peers are started").

use super::Error;
use super::cells::Transport;
use super::machine;
use super::nbd::{Address, Export};
use super::process::{PATIENCE, Process, find, free_port, pid, wait_until};
use nix::sys::signal::{Signal, kill};
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use tempfile::TempDir;

const LOOPBACK: &str = "127.0.0.1";
/// The only export of nbd-server; that of the others has no name.
const EXPORT: &str = "disk";
/// The image in a printed command line.
const SOME_IMAGE: &str = "IMAGE";
/// More sessions than the benchmark opens.
const MAX_CLIENTS: &str = "--max-clients=2000";
/// Any number of clients, the page cache as with the others, and holes for trimmed ranges.
const QEMU_NBD: &[&str] =
    &["--format=raw", "--persistent", "--shared=0", "--cache=writeback", "--discard=unmap"];

/// An installed server.
#[derive(Clone, Debug)]
pub(super) struct Server {
    pub(super) name: String,
    kind: Kind,
    program: PathBuf,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Flexnbd,
    Nbdkit,
    QemuNbd,
    QemuNbdThreads,
    NbdServer,
    NbdServerPlain,
}

/// Those of `names` that are installed, and other builds of flexnbd; prints which are missing.
pub(super) fn installed(
    names: &[String],
    also: &[(String, PathBuf)],
) -> Result<Vec<Server>, Error> {
    let mut servers = Vec::new();
    for name in names {
        let (kind, program) = match name.as_str() {
            "flexnbd" => (Kind::Flexnbd, env!("CARGO_BIN_EXE_flexnbd")),
            "nbdkit" => (Kind::Nbdkit, "nbdkit"),
            "qemu-nbd" => (Kind::QemuNbd, "qemu-nbd"),
            "qemu-nbd-threads" => (Kind::QemuNbdThreads, "qemu-nbd"),
            "nbd-server" => (Kind::NbdServer, "nbd-server"),
            "nbd-server-plain" => (Kind::NbdServerPlain, "nbd-server"),
            _ => return Err(format!("unknown server {name}").into()),
        };
        match find(program) {
            Some(program) => servers.push(Server { name: name.clone(), kind, program }),
            None => println!("# skipped {name}: {program} is not installed"),
        }
    }
    let build = |(name, program): &(String, PathBuf)| Server {
        name: name.clone(),
        kind: Kind::Flexnbd,
        program: program.clone(),
    };
    servers.extend(also.iter().map(build));
    if servers.is_empty() { Err("there is no server to measure".into()) } else { Ok(servers) }
}

impl Server {
    pub(super) fn version(&self) -> String {
        machine::version(&self.program)
    }

    pub(super) fn is_ours(&self) -> bool {
        self.kind == Kind::Flexnbd
    }

    /// Whether it is nbd-server, which forks for each session, runs in the background, and is slow
    /// to start: it makes Diffie-Hellman parameters before it listens.
    pub(super) fn forks(&self) -> bool {
        matches!(self.kind, Kind::NbdServer | Kind::NbdServerPlain)
    }

    /// Its arguments, or its configuration, on one line.
    pub(super) fn usage(&self) -> String {
        let image = Path::new(SOME_IMAGE);
        if self.forks() {
            return self.export_section(image).trim().replace('\n', " ");
        }
        self.arguments(image, &[]).join(" ".as_ref()).to_string_lossy().into_owned()
    }

    /// The command line that serves `image` on a socket passed as systemd passes it, if possible.
    pub(super) fn activated(&self, image: &Path) -> Option<Vec<OsString>> {
        let program = std::iter::once(self.program.clone().into_os_string());
        (!self.forks()).then(|| program.chain(self.arguments(image, &[])).collect())
    }

    fn arguments(&self, image: &Path, listen: &[OsString]) -> Vec<OsString> {
        let (before, behind): (&[&str], &[&str]) = match self.kind {
            Kind::Flexnbd => (&["serve", "--quiet", MAX_CLIENTS], &["--file"]),
            Kind::Nbdkit => (&["--foreground", "--exit-with-parent"], &["file"]),
            Kind::QemuNbd => (QEMU_NBD, &["--aio=io_uring"]),
            Kind::QemuNbdThreads => (QEMU_NBD, &["--aio=threads"]),
            Kind::NbdServer | Kind::NbdServerPlain => (&[], &[]),
        };
        let words = |words: &[&str]| words.iter().map(OsString::from).collect::<Vec<_>>();
        [&words(before)[..], listen, &words(behind), &[image.into()]].concat()
    }

    fn listen_arguments(&self, address: &Address) -> Vec<OsString> {
        let (host, port, path) = match self.kind {
            Kind::Nbdkit => ("--ipaddr", "--port", "--unix"),
            Kind::QemuNbd | Kind::QemuNbdThreads => ("--bind", "--port", "--socket"),
            _ => ("--addr", "--port", "--addr"),
        };
        match address {
            Address::Tcp(at) => {
                [host, LOOPBACK, port, &at.port().to_string()].map(Into::into).into()
            }
            Address::Unix(at) => vec![path.into(), at.into()],
        }
    }

    /// The command line that serves `image` at `address`. nbd-server has its configuration file
    /// and its process id in `folder`.
    fn command(&self, image: &Path, address: &Address, folder: &Path) -> Result<Command, Error> {
        let mut command = Command::new(&self.program);
        if self.forks() {
            let listen = match address {
                Address::Tcp(at) => format!("listenaddr={LOOPBACK}\nport={}", at.port()),
                Address::Unix(path) => format!("unixsock={}", path.display()),
            };
            let text = format!("[generic]\n{listen}\n{}", self.export_section(image));
            fs::write(folder.join("config"), text)?;
            command.arg("-C").arg(folder.join("config")).arg("-p").arg(folder.join("pid"));
        } else {
            command.args(self.arguments(image, &self.listen_arguments(address)));
        }
        Ok(command)
    }

    fn export_section(&self, image: &Path) -> String {
        let splice = if self.kind == Kind::NbdServer { "splice=true\n" } else { "" };
        let image = image.display();
        format!("[{EXPORT}]\nexportname={image}\nflush=true\nfua=true\ntrim=true\n{splice}")
    }
}

/// A server that accepts connections; stopped when dropped.
#[derive(Debug)]
pub(super) struct Running {
    /// The process that serves, or the parent of those that do.
    pub(super) pid: u32,
    pub(super) export: Export,
    process: Process,
    _folder: TempDir,
}

impl Running {
    /// Starts a server on an unused address and waits until it accepts connections.
    pub(super) fn start(
        server: &Server,
        image: &Path,
        transport: Transport,
    ) -> Result<Self, Error> {
        let folder = tempfile::tempdir()?;
        let address = match transport {
            Transport::Tcp => Address::Tcp(free_port()?),
            Transport::Unix => Address::Unix(folder.path().join("socket")),
        };
        let command = server.command(image, &address, folder.path())?;
        let pid_file = folder.path().join("pid");
        let mut process = Process::start(command, Stdio::null())?;
        if server.forks() {
            process.wait_for_success(PATIENCE)?;
        }
        let export = Export { address, name: if server.forks() { EXPORT } else { "" } };
        let mut running = Self { pid: process.pid, export, process, _folder: folder };
        let is_ready = wait_until(PATIENCE, || {
            running.process.check()?;
            if server.forks() {
                let text = fs::read_to_string(&pid_file).unwrap_or_default();
                let Ok(pid) = text.trim().parse() else { return Ok(false) };
                running.pid = pid;
            }
            Ok(running.export.address.connect().is_ok())
        })?;
        if is_ready { Ok(running) } else { Err(running.process.error("does not listen")) }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // The process in the background; `process` stops itself.
        if self.pid != self.process.pid {
            let id = pid(self.pid);
            let _ = kill(id, Signal::SIGTERM);
            if !wait_until(PATIENCE, || Ok(kill(id, None).is_err())).unwrap_or(false) {
                let _ = kill(id, Signal::SIGKILL);
            }
        }
    }
}

/// The build under test.
#[cfg(test)]
#[allow(unused)] // See peers.rs.
pub(super) fn ours() -> Server {
    installed(&["flexnbd".to_owned()], &[]).unwrap().remove(0)
}

#[cfg(test)]
#[allow(unused)] // See peers.rs.
mod tests {
    use super::*;

    const ALL: [&str; 6] =
        ["flexnbd", "nbdkit", "qemu-nbd", "qemu-nbd-threads", "nbd-server", "nbd-server-plain"];

    #[test]
    fn every_installed_server_serves_the_image_and_stops() {
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(1 << 20).unwrap();
        for server in installed(&ALL.map(str::to_owned), &[]).unwrap() {
            for transport in [Transport::Tcp, Transport::Unix] {
                let running = Running::start(&server, image.path(), transport).unwrap();
                let (stream, size) = running.export.open().unwrap();
                assert_eq!(size, 1 << 20, "{}", server.name);
                drop(stream);
                let id = pid(running.pid);
                drop(running);
                assert!(kill(id, None).is_err(), "{} still runs", server.name);
            }
        }
    }

    #[test]
    fn unknown_servers_are_errors() {
        assert!(installed(&["quantum-nbd".to_owned()], &[]).is_err());
        assert!(installed(&[], &[]).is_err());
    }
}
