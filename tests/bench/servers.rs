//! The servers that are measured, and the command line of each. Starts none.
//! Every one serves the same file through the page cache, on loopback or a unix socket, with the
//! settings of its authors but for those that limit it (README.md, "How the peers are started").

use super::Trouble;
use super::session::Address;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The address that all of them listen on.
const LOOPBACK: &str = "127.0.0.1";
/// The only export that `nbd-server` offers; the others call theirs nothing.
const EXPORT: &str = "disk";
/// What a server's configuration file is called, if it has one.
pub(super) const CONFIG: &str = "config";
/// Where a server that goes on in the background leaves its process id.
pub(super) const PID_FILE: &str = "pid";
/// What stands for the image where a command line is printed.
const SOME_IMAGE: &str = "IMAGE";

/// A server that can be started.
#[derive(Clone, Debug)]
pub(super) struct Server {
    pub(super) name: String,
    pub(super) kind: Kind,
    pub(super) program: PathBuf,
}

/// Which command line a server understands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Flexnbd,
    Nbdkit,
    QemuNbd,
    QemuNbdThreads,
    NbdServer,
    NbdServerPlain,
}

/// More sessions than are ever opened here.
const MAX_CLIENTS: &str = "--max-clients=2000";
/// One client after another and many at once, the page cache as with all others, and holes where
/// clients trim.
const QEMU_NBD: &[&str] =
    &["--format=raw", "--persistent", "--shared=0", "--cache=writeback", "--discard=unmap"];

/// Finds those of `names` that are installed, says which are not, and adds other builds of ours.
///
/// # Errors
/// For a name that means nothing, or when there is nothing to measure.
pub(super) fn installed(
    names: &[String],
    also: &[(String, PathBuf)],
) -> Result<Vec<Server>, Trouble> {
    let mut servers = Vec::new();
    for name in names {
        let (kind, program) = known(name).ok_or_else(|| format!("unknown server {name}"))?;
        match find(&program) {
            Some(program) => servers.push(Server { name: name.clone(), kind, program }),
            None => println!("# skipped {name}: {} is not installed", program.display()),
        }
    }
    servers.extend(also.iter().map(|(name, program)| Server {
        name: name.clone(),
        kind: Kind::Flexnbd,
        program: program.clone(),
    }));
    if servers.is_empty() { Err("there is no server to measure".into()) } else { Ok(servers) }
}

fn known(name: &str) -> Option<(Kind, PathBuf)> {
    let (kind, program) = match name {
        "flexnbd" => (Kind::Flexnbd, env!("CARGO_BIN_EXE_flexnbd")),
        "nbdkit" => (Kind::Nbdkit, "nbdkit"),
        "qemu-nbd" => (Kind::QemuNbd, "qemu-nbd"),
        "qemu-nbd-threads" => (Kind::QemuNbdThreads, "qemu-nbd"),
        "nbd-server" => (Kind::NbdServer, "nbd-server"),
        "nbd-server-plain" => (Kind::NbdServerPlain, "nbd-server"),
        _ => return None,
    };
    Some((kind, PathBuf::from(program)))
}

/// Where a program is: itself when it is a path, otherwise the first in `PATH`.
pub(super) fn find(program: &Path) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let candidates = std::env::split_paths(&path).map(|directory| directory.join(program));
    candidates.into_iter().find(|candidate| candidate.is_file())
}

/// What a program says of its version, on one line.
pub(super) fn version(program: &Path) -> String {
    let said = Command::new(program).arg("--version").output();
    let said = said.map(|output| [output.stdout, output.stderr].concat()).unwrap_or_default();
    let said = String::from_utf8_lossy(&said);
    said.lines().find(|line| !line.trim().is_empty()).unwrap_or("unknown").trim().to_owned()
}

impl Server {
    /// What the program says of its version, on one line.
    pub(super) fn version(&self) -> String {
        version(&self.program)
    }

    /// Whether it is a build of flexnbd.
    pub(super) fn is_ours(&self) -> bool {
        self.kind == Kind::Flexnbd
    }

    /// How it is started, for people: its arguments, or its configuration file in one line.
    pub(super) fn usage(&self) -> String {
        let told = |word: OsString| word.to_string_lossy().into_owned();
        if self.is_daemon() {
            return self.export_section(Path::new(SOME_IMAGE)).trim().replace('\n', " ");
        }
        let words = self.arguments(Path::new(SOME_IMAGE), &[]).into_iter().map(told);
        words.collect::<Vec<_>>().join(" ")
    }

    /// The command line that serves `image` at `address`. `folder` is for what it needs besides.
    pub(super) fn command(&self, image: &Path, address: &Address, folder: &Path) -> Command {
        let mut command = Command::new(&self.program);
        if self.is_daemon() {
            command.arg("-C").arg(folder.join(CONFIG)).arg("-p").arg(folder.join(PID_FILE));
        } else {
            command.args(self.arguments(image, &self.listening(address)));
        }
        command
    }

    /// The program and arguments that serve `image` on a socket handed over as systemd does it;
    /// nothing if it cannot be handed one.
    pub(super) fn activated(&self, image: &Path) -> Option<Vec<OsString>> {
        let program = std::iter::once(self.program.clone().into_os_string());
        (!self.is_daemon()).then(|| program.chain(self.arguments(image, &[])).collect())
    }

    fn arguments(&self, image: &Path, listening: &[OsString]) -> Vec<OsString> {
        let (before, behind): (&[&str], &[&str]) = match self.kind {
            Kind::Flexnbd => (&["serve", "--quiet", MAX_CLIENTS], &["--file"]),
            Kind::Nbdkit => (&["--foreground", "--exit-with-parent"], &["file"]),
            Kind::QemuNbd => (QEMU_NBD, &["--aio=io_uring"]),
            Kind::QemuNbdThreads => (QEMU_NBD, &["--aio=threads"]),
            Kind::NbdServer | Kind::NbdServerPlain => (&[], &[]),
        };
        let words = |words: &[&str]| words.iter().map(OsString::from).collect::<Vec<_>>();
        [&words(before)[..], listening, &words(behind), &[image.into()]].concat()
    }

    fn listening(&self, address: &Address) -> Vec<OsString> {
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

    /// What the server's configuration file must say, if it has one.
    pub(super) fn configuration(&self, image: &Path, address: &Address) -> Option<String> {
        let listen = match address {
            Address::Tcp(at) => format!("listenaddr={LOOPBACK}\nport={}", at.port()),
            Address::Unix(path) => format!("unixsock={}", path.display()),
        };
        self.is_daemon().then(|| format!("[generic]\n{listen}\n{}", self.export_section(image)))
    }

    fn export_section(&self, image: &Path) -> String {
        let splice = if self.kind == Kind::NbdServer { "splice=true\n" } else { "" };
        let image = image.display();
        format!("[{EXPORT}]\nexportname={image}\nflush=true\nfua=true\ntrim=true\n{splice}")
    }

    /// Whether each of its sessions is a process of its own. It is also slow to start: it makes
    /// Diffie-Hellman parameters before it listens, whether or not it will need them.
    pub(super) fn forks_for_each_session(&self) -> bool {
        self.is_daemon()
    }

    /// Whether the program goes on in the background and leaves its process id in [`PID_FILE`].
    pub(super) fn is_daemon(&self) -> bool {
        matches!(self.kind, Kind::NbdServer | Kind::NbdServerPlain)
    }

    /// The name of the export it offers.
    pub(super) fn export(&self) -> &'static str {
        if self.is_daemon() { EXPORT } else { "" }
    }
}

#[cfg(test)]
#[allow(unused)] // See peers.rs.
mod tests {
    use super::*;
    use std::net::SocketAddr;

    const ALL: [&str; 6] =
        ["flexnbd", "nbdkit", "qemu-nbd", "qemu-nbd-threads", "nbd-server", "nbd-server-plain"];

    fn server(name: &str) -> Server {
        let (kind, program) = known(name).unwrap();
        Server { name: name.to_owned(), kind, program }
    }

    #[test]
    fn every_server_is_told_image_and_address_on_both_transports() {
        let (image, folder) = (Path::new("/the/image"), Path::new("/the/folder"));
        let tcp = Address::Tcp(SocketAddr::from(([127, 0, 0, 1], 4321)));
        let unix = Address::Unix(PathBuf::from("/the/socket"));
        for name in ALL {
            for (address, told) in [(&tcp, "4321"), (&unix, "/the/socket")] {
                let server = server(name);
                let line = format!("{:?}", server.command(image, address, folder));
                let all = line + &server.configuration(image, address).unwrap_or_default();
                assert!(all.contains("/the/image") && all.contains(told), "{all}");
            }
        }
    }

    #[test]
    fn what_is_handed_its_socket_is_told_no_address() {
        for name in ALL.into_iter().filter(|name| !server(name).is_daemon()) {
            let line = server(name).activated(Path::new("/the/image")).unwrap();
            let told = line.iter().map(|word| word.to_string_lossy().into_owned());
            let line = told.collect::<Vec<_>>().join(" ");
            assert!(line.ends_with("/the/image") && !line.contains(LOOPBACK), "{line}");
            assert_eq!(
                line.split_once(' ').unwrap().1.replace("/the/image", "IMAGE"),
                server(name).usage()
            );
        }
        assert_eq!(server("nbd-server").activated(Path::new("/the/image")), None);
    }

    #[test]
    fn what_is_not_installed_is_left_out_and_what_is_unknown_is_an_error() {
        assert_eq!(find(Path::new("no-such-program-anywhere")), None);
        assert!(find(Path::new("sh")).is_some());
        let names = |name: &str| vec![name.to_owned()];
        assert!(installed(&names("quantum-nbd"), &[]).is_err());
        assert!(installed(&[], &[]).is_err());
        let also = [("old".to_owned(), PathBuf::from("/bin/true"))];
        assert_eq!(installed(&[], &also).unwrap()[0].kind, Kind::Flexnbd);
    }
}
