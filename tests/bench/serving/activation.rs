//! Latency of socket activation. The benchmark stands in for systemd: it holds the listening socket
//! and starts the server when a client connects.

use super::cells::Temperature;
use super::servers::Server;
use super::{Options, Setup, pin_to};
use crate::nbd::Export;
use crate::process::{PATIENCE, Process};
use crate::report::{Error, figure, median, print_row};
use flexnbd::net::{Address, wait_readable};
use serde::{Deserialize, Serialize};
use std::ffi::OsString;
use std::net::{Ipv4Addr, TcpListener};
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

const STARTS: usize = 30;
/// Executes the server with the socket, its stdin, where systemd puts it (`sd_listen_fds(3)`). Only
/// the new process knows the id that `LISTEN_PID` must have.
const SCRIPT: &str = "export LISTEN_PID=$$ LISTEN_FDS=1 LISTEN_FDNAMES=nbd
    exec \"$@\" 3<&0 </dev/null";
/// Length of the server's greeting in bytes.
const GREETING_LENGTH: usize = 18;

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct ActivationRow {
    #[serde(rename = "server")]
    name: String,
    pub(crate) ours: bool,
    /// From before `connect(2)` to the greeting, in milliseconds.
    pub(crate) starts_ms: Vec<f64>,
}

/// Measures every server that takes a socket; prints which ones fail.
pub(crate) fn measure(setup: &Setup) -> Result<Vec<ActivationRow>, Error> {
    let image = setup.images.path(Temperature::Cached)?;
    let row = |server: &Server| {
        let (name, ours) = (server.name.clone(), server.ours);
        Some((ActivationRow { name, ours, starts_ms: Vec::new() }, server.activated(image)?))
    };
    let mut rows: Vec<_> = setup.servers.iter().filter_map(row).collect();
    // The first start finds the program's file cold and does not count.
    for start in 0..=STARTS {
        for (row, command) in &mut rows {
            match measure_once(&setup.options, command) {
                Ok(latency) if start > 0 => row.starts_ms.push(latency.as_secs_f64() * 1e3),
                Ok(_) => {}
                Err(error) => println!("# activation: {}: {error}", row.name),
            }
        }
    }
    Ok(rows.into_iter().map(|(row, _)| row).collect())
}

fn measure_once(options: &Options, server: &[OsString]) -> Result<Duration, Error> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let export = Export { address: Address::Tcp(listener.local_addr()?), name: "", tls: None };
    pin_to(options.server_cpu);
    let client_cpu = options.client_cpu;
    let client = thread::spawn(move || -> Result<Duration, Error> {
        pin_to(client_cpu);
        let start = Instant::now();
        export.connect()?.recv_exact(&mut [0; GREETING_LENGTH], PATIENCE)?;
        Ok(start.elapsed())
    });
    wait_readable(&[listener.as_fd()], Some(Instant::now() + PATIENCE))?;
    let mut command = Command::new("sh");
    command.args(["-c", SCRIPT, "sh"]).args(server);
    let process = Process::start(&mut command, Stdio::from(OwnedFd::from(listener)));
    let latency = client.join().map_err(|_| "the client panicked")?;
    pin_to(options.client_cpu);
    let process = process?;
    latency.map_err(|error| process.error(&format!("does not greet ({error})")))
}

pub(crate) fn print(rows: &[ActivationRow]) {
    if rows.is_empty() {
        return;
    }
    println!("\nmilliseconds from connect to greeting, the server being started by that");
    print_row("", [10; 4], ["starts", "median", "shortest", "longest"]);
    for ActivationRow { name, starts_ms, .. } in rows {
        let reduce = |f: fn(f64, f64) -> f64| figure(starts_ms.iter().copied().reduce(f), 1);
        let middle = figure(median(starts_ms.iter().copied()), 1);
        let cells = [starts_ms.len().to_string(), middle, reduce(f64::min), reduce(f64::max)];
        print_row(name, [10; 4], cells);
    }
}
