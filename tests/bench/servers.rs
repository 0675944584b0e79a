//! The servers: their command lines, and how they start and stop.
//! All serve the same file through the page cache, on loopback or a unix socket, with their default
//! settings except where those limit them (README.md, "How the peers are started").

use super::Error;
use super::cells::Transport;
use super::machine;
use super::nbd::{Address, Export};
use super::process::{PATIENCE, Process, find, free_port, pid, wait_until};
use nix::sys::signal::{Signal, kill};
use serde::{Deserialize, Serialize};
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use tempfile::TempDir;

const LOOPBACK: &str = "127.0.0.1";
/// The only export of nbd-server; that of the others has no name.
const EXPORT: &str = "disk";
/// Any number of clients, the page cache as with the others, and holes for trimmed ranges.
const QEMU_NBD: &str = "--format=raw --persistent --shared=0 --cache=writeback --discard=unmap";
const QEMU_NBD_LISTEN: Option<[&str; 3]> = Some(["--bind", "--port", "--socket"]);

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Server {
    pub(super) name: String,
    /// Whether it is a build of flexnbd.
    pub(super) ours: bool,
    pub(super) version: String,
    /// Its arguments, or its configuration, on one line.
    pub(super) usage: String,
    #[serde(skip)]
    program: PathBuf,
    /// Arguments before those for the address, and between them and the image. nbd-server has a
    /// configuration file instead.
    #[serde(skip)]
    arguments: (&'static str, &'static str),
    /// The options for host, port and unix socket; none for nbd-server.
    #[serde(skip)]
    listen: Option<[&'static str; 3]>,
}

/// Those of `names` that are installed, and other builds of flexnbd; prints which are missing.
pub(super) fn installed(
    names: &[String],
    also: &[(String, PathBuf)],
) -> Result<Vec<Server>, Error> {
    let mut servers = Vec::new();
    for name in names {
        let flexnbd = env!("CARGO_BIN_EXE_flexnbd");
        let program = match name.as_str() {
            "flexnbd" => flexnbd,
            "qemu-nbd-threads" => "qemu-nbd",
            "nbd-server-plain" => "nbd-server",
            "nbdkit" | "qemu-nbd" | "nbd-server" => name,
            _ => return Err(format!("unknown server {name}").into()),
        };
        match find(program) {
            Some(path) => servers.push(Server::new(name, name, path)),
            None => println!("# skipped {name}: {program} is not installed"),
        }
    }
    servers.extend(also.iter().map(|(name, path)| Server::new(name, "flexnbd", path.clone())));
    if servers.is_empty() { Err("there is no server to measure".into()) } else { Ok(servers) }
}

impl Server {
    fn new(name: &str, kind: &str, program: PathBuf) -> Self {
        let (arguments, listen) = match kind {
            // It accepts more clients than the benchmark opens.
            "flexnbd" => {
                let arguments = ("serve --quiet --max-clients=2000", "--file");
                (arguments, Some(["--addr", "--port", "--addr"]))
            }
            "nbdkit" => {
                let arguments = ("--foreground --exit-with-parent", "file");
                (arguments, Some(["--ipaddr", "--port", "--unix"]))
            }
            "qemu-nbd" => ((QEMU_NBD, "--aio=io_uring"), QEMU_NBD_LISTEN),
            "qemu-nbd-threads" => ((QEMU_NBD, "--aio=threads"), QEMU_NBD_LISTEN),
            "nbd-server" => (("", "splice=true\n"), None),
            _ => (("", ""), None),
        };
        let (name, version) = (name.to_owned(), machine::version(&program));
        let ours = kind == "flexnbd";
        let mut server =
            Self { name, ours, version, usage: String::new(), program, arguments, listen };
        let image = Path::new("IMAGE");
        server.usage = if server.forks() {
            server.export_section(image).trim().replace('\n', " ")
        } else {
            server.arguments(image, &[]).join(" ".as_ref()).to_string_lossy().into_owned()
        };
        server
    }

    /// Whether it is nbd-server, which forks for each session, runs in the background, and is slow
    /// to start: it makes Diffie-Hellman parameters before it listens.
    pub(super) fn forks(&self) -> bool {
        self.listen.is_none()
    }

    /// The command line that serves `image` on a socket passed as systemd passes it, if possible.
    pub(super) fn activated(&self, image: &Path) -> Option<Vec<OsString>> {
        let program = std::iter::once(self.program.clone().into_os_string());
        (!self.forks()).then(|| program.chain(self.arguments(image, &[])).collect())
    }

    fn arguments(&self, image: &Path, listen: &[OsString]) -> Vec<OsString> {
        let words = |words: &str| words.split(' ').map(OsString::from).collect::<Vec<_>>();
        let (before, after) = self.arguments;
        [&words(before)[..], listen, &words(after), &[image.into()]].concat()
    }

    /// The command line that serves `image` at `address`. nbd-server has its configuration file
    /// and its process id in `folder`.
    fn command(&self, image: &Path, address: &Address, folder: &Path) -> Result<Command, Error> {
        let mut command = Command::new(&self.program);
        match (self.listen, address) {
            (Some([host, port, _]), Address::Tcp(at)) => {
                let listen = [host, LOOPBACK, port, &at.port().to_string()].map(OsString::from);
                command.args(self.arguments(image, &listen));
            }
            (Some([_, _, path]), Address::Unix(at)) => {
                command.args(self.arguments(image, &[path.into(), at.into()]));
            }
            (None, address) => {
                let listen = match address {
                    Address::Tcp(at) => format!("listenaddr={LOOPBACK}\nport={}", at.port()),
                    Address::Unix(path) => format!("unixsock={}", path.display()),
                };
                let text = format!("[generic]\n{listen}\n{}", self.export_section(image));
                fs::write(folder.join("config"), text)?;
                command.arg("-C").arg(folder.join("config")).arg("-p").arg(folder.join("pid"));
            }
        }
        Ok(command)
    }

    fn export_section(&self, image: &Path) -> String {
        let (image, splice) = (image.display(), self.arguments.1);
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

#[cfg(test)]
#[allow(unused)] // See peers.rs.
mod tests {
    use super::*;

    #[test]
    fn every_installed_server_serves_the_image_and_stops() {
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(1 << 20).unwrap();
        let names = ["flexnbd", "nbdkit", "qemu-nbd", "nbd-server"].map(str::to_owned);
        for server in installed(&names, &[]).unwrap() {
            for transport in [Transport::Tcp, Transport::Unix] {
                let running = Running::start(&server, image.path(), transport).unwrap();
                assert_eq!(running.export.open().unwrap().1, 1 << 20, "{}", server.name);
                let id = pid(running.pid);
                drop(running);
                assert!(kill(id, None).is_err(), "{} still runs", server.name);
            }
        }
    }
}
