//! How long a client waits that connects to a socket whose server has to be started first.
//! Stands in for the service manager: holds the socket, and starts the server when somebody comes.

use super::Trouble;
use super::grid::Temperature;
use super::image::Images;
use super::options::Options;
use super::pin;
use super::process::Process;
use super::servers::Server;
use super::session::{Address, PATIENCE};
use super::stats::median;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};
use std::ffi::OsString;
use std::net::{Ipv4Addr, TcpListener};
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// How often each server is started.
pub(super) const STARTS: usize = 30;
/// Becomes the server, with the socket that it finds as its input where systemd would put it
/// (`sd_listen_fds(3)`). Only the process itself knows its id.
const BECOME: &str = "export LISTEN_PID=$$ LISTEN_FDS=1 LISTEN_FDNAMES=nbd
    exec \"$@\" 3<&0 </dev/null";
/// Length of what a server says first, in bytes.
const GREETING_LENGTH: usize = 18;

/// What the starts of one server took.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct ActivationRow {
    #[serde(rename = "server")]
    pub(super) name: String,
    pub(super) ours: bool,
    /// From before `connect(2)` to the greeting, in milliseconds.
    pub(super) starts_ms: Vec<f64>,
}

/// Looks at every server that can be handed a socket; says which ones failed.
///
/// # Errors
/// When the image cannot be made.
pub(super) fn measure(
    options: &Options,
    servers: &[Server],
    images: &Images,
) -> Result<Vec<ActivationRow>, Trouble> {
    let image = images.image(Temperature::Cached)?;
    let row = |server: &Server| ActivationRow {
        name: server.name.clone(),
        ours: server.is_ours(),
        starts_ms: Vec::new(),
    };
    let mut rows: Vec<_> = servers
        .iter()
        .filter_map(|server| Some((row(server), server.activated(&image)?)))
        .collect();
    // The first start of each finds its program cold, and does not count.
    for start in 0..=STARTS {
        for (row, command) in &mut rows {
            match measure_once(options, &row.name, command) {
                Ok(waited) if start > 0 => row.starts_ms.push(waited.as_secs_f64() * 1e3),
                Ok(_) => {}
                Err(trouble) => println!("# activation: {}: {trouble}", row.name),
            }
        }
    }
    Ok(rows.into_iter().map(|(row, _)| row).collect())
}

/// Prints the table; nothing when there is nothing.
pub(super) fn print(rows: &[ActivationRow]) {
    if rows.is_empty() {
        return;
    }
    println!("\nmilliseconds from connect to greeting, the server being started by that");
    println!("  {:16} {:>10} {:>10} {:>10} {:>10}", "", "starts", "median", "shortest", "longest");
    for row in rows {
        let of = |figure: fn(f64, f64) -> f64| row.starts_ms.iter().copied().reduce(figure);
        let told = |ms: Option<f64>| ms.map_or("-".to_owned(), |ms| format!("{ms:.1}"));
        println!(
            "  {:16} {:>10} {:>10} {:>10} {:>10}",
            row.name,
            row.starts_ms.len(),
            told(row.median_ms()),
            told(of(f64::min)),
            told(of(f64::max))
        );
    }
}

impl ActivationRow {
    pub(super) fn median_ms(&self) -> Option<f64> {
        median(self.starts_ms.clone())
    }
}

fn measure_once(options: &Options, name: &str, server: &[OsString]) -> Result<Duration, Trouble> {
    let folder = tempfile::tempdir()?;
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let address = Address::Tcp(listener.local_addr()?);
    let mut command = Command::new("sh");
    command.args(["-c", BECOME, "sh"]).args(server);
    pin::to(options.server_cpu);
    let client_cpu = options.client_cpu;
    let client = thread::spawn(move || {
        pin::to(client_cpu);
        greeted(&address)
    });
    let running = wait_for_client(&listener).and_then(|()| {
        let socket = Stdio::from(OwnedFd::from(listener));
        Process::start_with(socket, command, name, folder.path())
    });
    let waited = client.join().map_err(|_| "the client panicked")?;
    pin::to(options.client_cpu);
    let running = running?;
    waited.map_err(|trouble| format!("{trouble}: {}", running.complaint()).into())
}

/// Connects, and how long the greeting took to come.
fn greeted(address: &Address) -> Result<Duration, Trouble> {
    let began = Instant::now();
    address.connect()?.recv_exact(&mut [0; GREETING_LENGTH], PATIENCE)?;
    Ok(began.elapsed())
}

fn wait_for_client(listener: &TcpListener) -> Result<(), Trouble> {
    let mut descriptors = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
    let patience = PollTimeout::try_from(PATIENCE.as_millis()).unwrap_or(PollTimeout::MAX);
    if poll(&mut descriptors, patience)? == 0 { Err("no client came".into()) } else { Ok(()) }
}

#[cfg(test)]
#[allow(unused)] // See peers.rs.
mod tests {
    use super::super::servers;
    use super::*;

    fn options() -> Options {
        clap::Parser::parse_from(["peers"])
    }

    #[test]
    fn every_server_that_can_be_handed_a_socket_greets_whoever_had_it_started() {
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(1 << 20).unwrap();
        let names = ["flexnbd", "nbdkit", "qemu-nbd", "nbd-server"].map(str::to_owned);
        let servers = servers::installed(&names, &[]).unwrap();
        let commands = servers.iter().filter_map(|server| server.activated(image.path()));
        for command in commands {
            let waited = measure_once(&options(), "server", &command).unwrap();
            assert!(waited > Duration::ZERO, "{command:?}");
        }
    }

    #[test]
    fn a_server_that_ends_is_quoted() {
        let server = ["sh", "-c", "echo no disk >&2"].map(OsString::from);
        let trouble = measure_once(&options(), "server", &server).unwrap_err().to_string();
        assert!(trouble.ends_with(": no disk"), "{trouble}");
    }
}
