//! The servers: their command lines, and how they start and stop.
//! All serve the same file on loopback or a unix socket, through the page cache unless their name says
//! `direct`, with their default settings except where those limit them (README.md, "How the peers are
//! started").

use super::cells::Transport;
use super::minimal;
use super::tls::Certificates;
use crate::machine::version;
use crate::nbd::Export;
use crate::process::{FLEXNBD, Installed, PATIENCE, Process, installed};
use crate::report::Error;
use flexnbd::net::Address;
use harness::{free_port, poll_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use std::ffi::OsString;
use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use tempfile::TempDir;

/// The only export of nbd-server; that of the others has no name.
const EXPORT: &str = "disk";
/// Any number of clients, the page cache as with the others, and holes for trimmed ranges.
const QEMU_NBD: &str = "--format=raw --persistent --shared=0 --cache=writeback --discard=unmap";
/// The same past the page cache.
const QEMU_NBD_DIRECT: &str = "--format=raw --persistent --shared=0 --cache=none --discard=unmap";
const QEMU_NBD_LISTEN: Option<[&str; 3]> = Some(["--bind", "--port", "--socket"]);

/// How a server is started: its arguments before those for the address, and between them and the
/// image; and the options for host, port and unix socket. nbd-server has no such options; its second
/// text is a line of its configuration file.
type Kind = ([&'static str; 2], Option<[&'static str; 3]>);

/// Accepts more clients than the benchmark opens.
const OURS: Kind =
    (["serve --quiet --max-clients=2000", "--file"], Some(["--addr", "--port", "--addr"]));
const OURS_DIRECT: Kind = (["serve --quiet --max-clients=2000 --direct", OURS.0[1]], OURS.1);
/// A proxy of another process of the same program, which serves the image over the same transport.
const OURS_PROXY: Kind = (["proxy --quiet --max-clients=2000", "--to"], OURS.1);
/// Where certificates are, in the arguments of servers with TLS.
const CERTIFICATES: &str = "@";
/// Servers of clients that use TLS.
const OURS_TLS: Kind = (
    [
        "serve --quiet --max-clients=2000 --tls=require --tls-cert=@/server-cert.pem \
         --tls-key=@/server-key.pem",
        OURS.0[1],
    ],
    OURS.1,
);
const NBDKIT_TLS: Kind =
    (["--foreground --exit-with-parent --tls=require --tls-certificates=@", "file"], NBDKIT.1);
const QEMU_NBD_TLS: &str = "--object=tls-creds-x509,id=tls,endpoint=server,dir=@,verify-peer=off \
    --tls-creds=tls --format=raw --persistent --shared=0 --cache=writeback --discard=unmap";
const NBDKIT: Kind =
    (["--foreground --exit-with-parent", "file"], Some(["--ipaddr", "--port", "--unix"]));
/// The names of the minimal servers that send the image, each by its method.
const METHODS: [&str; 7] =
    ["copy-64k", "copy-256k", "copy-1m", "splice-256k", "splice-1m", "sendfile", "mapping"];
/// The minimal server without a disk, the limit of the others.
const NULL: &str = "null";
const KINDS: [(&str, Kind, &[&str]); 20] = [
    ("flexnbd", OURS, &[FLEXNBD]),
    ("flexnbd-direct", OURS_DIRECT, &[FLEXNBD]),
    ("flexnbd-proxy", OURS_PROXY, &[FLEXNBD]),
    ("nbdkit", NBDKIT, &["nbdkit"]),
    ("qemu-nbd", ([QEMU_NBD, "--aio=io_uring"], QEMU_NBD_LISTEN), &["qemu-nbd"]),
    ("qemu-nbd-threads", ([QEMU_NBD, "--aio=threads"], QEMU_NBD_LISTEN), &["qemu-nbd"]),
    ("qemu-nbd-direct", ([QEMU_NBD_DIRECT, "--aio=io_uring"], QEMU_NBD_LISTEN), &["qemu-nbd"]),
    ("nbd-server", (["", "splice=true\n"], None), &["nbd-server"]),
    ("nbd-server-plain", (["", ""], None), &["nbd-server"]),
    ("flexnbd-tls", OURS_TLS, &[FLEXNBD]),
    ("nbdkit-tls", NBDKIT_TLS, &["nbdkit"]),
    ("qemu-nbd-tls", ([QEMU_NBD_TLS, "--aio=io_uring"], QEMU_NBD_LISTEN), &["qemu-nbd"]),
    (NULL, executed(["minimal-server --method=null", "--file"]), MINIMAL),
    (METHODS[0], executed(["minimal-server --method=copy-64k", "--file"]), MINIMAL),
    (METHODS[1], executed(["minimal-server --method=copy-256k", "--file"]), MINIMAL),
    (METHODS[2], executed(["minimal-server --method=copy-1m", "--file"]), MINIMAL),
    (METHODS[3], executed(["minimal-server --method=splice-256k", "--file"]), MINIMAL),
    (METHODS[4], executed(["minimal-server --method=splice-1m", "--file"]), MINIMAL),
    (METHODS[5], executed(["minimal-server --method=sendfile", "--file"]), MINIMAL),
    (METHODS[6], executed(["minimal-server --method=mapping", "--file"]), MINIMAL),
];

const MINIMAL: &[&str] = &[minimal::PROGRAM];

/// A server that is this benchmark itself.
const fn executed(words: [&'static str; 2]) -> Kind {
    (words, Some(["--addr", "--port", "--socket"]))
}

/// Whether a server is a minimal one: a limit of the others, and no peer of flexnbd.
pub(crate) fn is_minimal(name: &str) -> bool {
    name == NULL || METHODS.contains(&name)
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Server {
    pub(crate) name: String,
    /// Whether it is a build of flexnbd.
    pub(crate) ours: bool,
    pub(crate) version: String,
    /// Its arguments, or its configuration, on one line.
    pub(crate) usage: String,
    #[serde(skip)]
    program: PathBuf,
    #[serde(skip)]
    kind: Kind,
    #[serde(skip)]
    pub(crate) certificates: Option<Certificates>,
}

/// The servers with these names, if they are installed, and other builds of flexnbd.
pub(crate) fn servers(names: &[String], also: &[(String, PathBuf)]) -> Result<Vec<Server>, Error> {
    let mut servers: Vec<Server> =
        installed(names, also, &KINDS)?.into_iter().map(Server::new).collect();
    if servers.iter().any(Server::has_tls) {
        let certificates = Certificates::new()?;
        for server in servers.iter_mut().filter(|server| server.has_tls()) {
            server.certificates = Some(certificates.clone());
        }
    }
    Ok(servers)
}

impl Server {
    fn new(Installed { name, kind, mut programs }: Installed<Kind>) -> Self {
        let program = programs.swap_remove(0);
        let ours = [OURS, OURS_DIRECT, OURS_TLS].contains(&kind);
        let version =
            if is_minimal(&name) { "of this benchmark".to_owned() } else { version(&program) };
        let (usage, certificates) = (String::new(), None);
        let mut server = Self { name, ours, version, usage, program, kind, certificates };
        let image = if server.upstream().is_some() { "URI" } else { "IMAGE" };
        let image = Path::new(image);
        server.usage = if server.forks() {
            server.export_section(image).trim().replace('\n', " ")
        } else {
            server.arguments(image, &[]).join(" ".as_ref()).to_string_lossy().into_owned()
        };
        server
    }

    /// Whether its clients use TLS.
    pub(crate) fn has_tls(&self) -> bool {
        self.kind.0[0].contains(CERTIFICATES)
    }

    /// Whether it is nbd-server, which forks for each session, runs in the background, and is slow
    /// to start: it makes Diffie-Hellman parameters before it listens.
    pub(crate) fn forks(&self) -> bool {
        self.kind.1.is_none()
    }

    /// The server of the image, if this one is a proxy.
    fn upstream(&self) -> Option<Self> {
        (self.kind == OURS_PROXY).then(|| Self { kind: OURS, ..self.clone() })
    }

    /// The command line that serves `image` on a socket passed as systemd passes it, if possible.
    pub(crate) fn activated(&self, image: &Path) -> Option<Vec<OsString>> {
        let program = std::iter::once(self.program.clone().into_os_string());
        (!self.forks() && !is_minimal(&self.name) && self.upstream().is_none())
            .then(|| program.chain(self.arguments(image, &[])).collect())
    }

    fn arguments(&self, image: &Path, listen: &[OsString]) -> Vec<OsString> {
        let directory =
            self.certificates.as_ref().map(|found| found.directory.display().to_string());
        let directory = directory.unwrap_or_else(|| CERTIFICATES.to_owned());
        let word = |word: &str| OsString::from(word.replace(CERTIFICATES, &directory));
        let [before, after] = self.kind.0.map(|words| words.split_whitespace().map(&word));
        let listen = listen.iter().cloned();
        before.chain(listen).chain(after).chain([image.into()]).collect()
    }

    /// The command line that serves `image` at `address`. nbd-server has its configuration file
    /// and its process id in `folder`.
    fn command(&self, image: &Path, address: &Address, folder: &Path) -> Result<Command, Error> {
        let mut command = Command::new(&self.program);
        let Some([host, port, path]) = self.kind.1 else {
            let listen = match address {
                Address::Tcp(at) => format!("listenaddr={}\nport={}", at.ip(), at.port()),
                Address::Unix(path) => format!("unixsock={}", path.display()),
            };
            let text = format!("[generic]\n{listen}\n{}", self.export_section(image));
            fs::write(folder.join("config"), text)?;
            command.arg("-C").arg(folder.join("config")).arg("-p").arg(folder.join("pid"));
            return Ok(command);
        };
        command.args(match address {
            Address::Tcp(at) => {
                let listen = [host, &at.ip().to_string(), port, &at.port().to_string()];
                self.arguments(image, &listen.map(OsString::from))
            }
            Address::Unix(at) => self.arguments(image, &[path.into(), at.into()]),
        });
        Ok(command)
    }

    fn export_section(&self, image: &Path) -> String {
        let (image, splice) = (image.display(), self.kind.0[1]);
        format!("[{EXPORT}]\nexportname={image}\nflush=true\nfua=true\ntrim=true\n{splice}")
    }
}

/// A server that accepts connections; stopped when dropped.
#[derive(Debug)]
pub(crate) struct Running {
    /// The process that serves, or the parent of those that do.
    pub(crate) pid: Pid,
    pub(crate) export: Export,
    process: Process,
    /// The home directory of clients that use TLS.
    pub(crate) home: Option<PathBuf>,
    _folder: TempDir,
    /// The server of a proxy.
    _upstream: Option<Box<Self>>,
}

impl Running {
    /// Starts a server on an unused address and waits until it accepts connections.
    pub(crate) fn start(
        server: &Server,
        image: &Path,
        transport: Transport,
    ) -> Result<Self, Error> {
        let folder = tempfile::tempdir()?;
        let address = match transport {
            Transport::Tcp => Address::Tcp((Ipv4Addr::LOCALHOST, free_port()).into()),
            Transport::Unix => Address::Unix(folder.path().join("socket")),
        };
        let upstream = server.upstream().map(|server| Self::start(&server, image, transport));
        let upstream = upstream.transpose()?.map(Box::new);
        let uri = upstream.as_ref().map(|upstream| PathBuf::from(uri(&upstream.export.address)));
        let source = uri.as_deref().unwrap_or(image);
        let mut command = server.command(source, &address, folder.path())?;
        let pid_file = folder.path().join("pid");
        let process = Process::start(&mut command, Stdio::null())?;
        let tls = server.certificates.as_ref().map(|certificates| certificates.client.clone());
        let export = Export { address, name: if server.forks() { EXPORT } else { "" }, tls };
        let home = server.certificates.as_ref().map(|certificates| certificates.home.clone());
        let mut running =
            Self { pid: process.pid, export, process, home, _folder: folder, _upstream: upstream };
        if server.forks() {
            running.process.wait_for_success(PATIENCE)?;
            running.process.wait_until(|| {
                let text = fs::read_to_string(&pid_file).unwrap_or_default();
                let pid = text.trim().parse().map(Pid::from_raw);
                pid.map(|pid| running.pid = pid).is_ok()
            })?;
        }
        running.process.wait_until(|| running.export.connect().is_ok())?;
        Ok(running)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // The process in the background; `process` stops itself.
        let in_background = self.pid != self.process.pid;
        if in_background && kill(self.pid, Signal::SIGTERM).is_ok() {
            let ended = poll_until(PATIENCE, || kill(self.pid, None).is_err());
            let _ = (!ended).then(|| kill(self.pid, Signal::SIGKILL));
        }
    }
}

/// The default export at an address.
fn uri(address: &Address) -> String {
    match address {
        Address::Tcp(at) => format!("nbd://{at}"),
        Address::Unix(path) => format!("nbd+unix:///?socket={}", path.display()),
    }
}
