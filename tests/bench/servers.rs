//! The servers that are measured, and the command line of each. Starts none.
//! Every one serves the same file, on loopback or a unix socket, with its usual settings.

use super::Trouble;
use super::session::Address;
use std::net::SocketAddr;
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
    QemuNbdUring,
    NbdServer,
}

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
        "qemu-nbd-uring" => (Kind::QemuNbdUring, "qemu-nbd"),
        "nbd-server" => (Kind::NbdServer, "nbd-server"),
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

impl Server {
    /// What the program says of its version, on one line.
    pub(super) fn version(&self) -> String {
        let said = Command::new(&self.program).arg("--version").output();
        let said = said.map(|output| [output.stdout, output.stderr].concat()).unwrap_or_default();
        let said = String::from_utf8_lossy(&said);
        said.lines().find(|line| !line.trim().is_empty()).unwrap_or("unknown").trim().to_owned()
    }

    /// The command line that serves `image` at `address`. `folder` is for what it needs besides.
    pub(super) fn command(&self, image: &Path, address: &Address, folder: &Path) -> Command {
        let mut command = Command::new(&self.program);
        match self.kind {
            Kind::Flexnbd => {
                command.args(["serve", "--quiet", "--file"]).arg(image);
                match address {
                    Address::Tcp(at) => command.args(["--addr", LOOPBACK, "--port", &port(at)]),
                    Address::Unix(path) => command.arg("--addr").arg(path),
                };
            }
            Kind::Nbdkit => {
                command.args(["--foreground", "--exit-with-parent"]);
                match address {
                    Address::Tcp(at) => command.args(["--ipaddr", LOOPBACK, "--port", &port(at)]),
                    Address::Unix(path) => command.arg("--unix").arg(path),
                };
                command.arg("file").arg(image);
            }
            Kind::QemuNbd | Kind::QemuNbdUring => {
                let uring = self.kind == Kind::QemuNbdUring;
                command.arg(if uring { "--aio=io_uring" } else { "--aio=threads" });
                command.args(["--format=raw", "--persistent", "--shared=0"]);
                command.args(["--cache=writeback", "--discard=unmap"]);
                match address {
                    Address::Tcp(at) => command.args(["--bind", LOOPBACK, "--port", &port(at)]),
                    Address::Unix(path) => command.arg("--socket").arg(path),
                };
                command.arg(image);
            }
            Kind::NbdServer => {
                command.arg("-C").arg(folder.join(CONFIG)).arg("-p").arg(folder.join(PID_FILE));
            }
        }
        command
    }

    /// What the server's configuration file must say, if it has one.
    pub(super) fn configuration(&self, image: &Path, address: &Address) -> Option<String> {
        if self.kind != Kind::NbdServer {
            return None;
        }
        let listen = match address {
            Address::Tcp(at) => format!("listenaddr={LOOPBACK}\nport={}", at.port()),
            Address::Unix(path) => format!("unixsock={}", path.display()),
        };
        let export = format!("[{EXPORT}]\nexportname={}", image.display());
        Some(format!("[generic]\n{listen}\n{export}\nflush=true\nfua=true\ntrim=true\n"))
    }

    /// Whether the program goes on in the background and leaves its process id in [`PID_FILE`].
    pub(super) fn is_daemon(&self) -> bool {
        self.kind == Kind::NbdServer
    }

    /// The name of the export it offers.
    pub(super) fn export(&self) -> &'static str {
        if self.kind == Kind::NbdServer { EXPORT } else { "" }
    }
}

fn port(address: &SocketAddr) -> String {
    address.port().to_string()
}

#[cfg(test)]
#[allow(unused)] // See peers.rs.
mod tests {
    use super::*;

    fn server(name: &str) -> Server {
        let (kind, program) = known(name).unwrap();
        Server { name: name.to_owned(), kind, program }
    }

    #[test]
    fn every_server_is_told_image_and_address_on_both_transports() {
        let (image, folder) = (Path::new("/the/image"), Path::new("/the/folder"));
        let tcp = Address::Tcp(SocketAddr::from(([127, 0, 0, 1], 4321)));
        let unix = Address::Unix(PathBuf::from("/the/socket"));
        for name in ["flexnbd", "nbdkit", "qemu-nbd", "qemu-nbd-uring", "nbd-server"] {
            for (address, told) in [(&tcp, "4321"), (&unix, "/the/socket")] {
                let server = server(name);
                let line = format!("{:?}", server.command(image, address, folder));
                let all = line + &server.configuration(image, address).unwrap_or_default();
                assert!(all.contains("/the/image") && all.contains(told), "{all}");
            }
        }
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
