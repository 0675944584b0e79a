//! A loopback network of our own, so that its counters count nobody else's bytes.
//! Threads and processes started afterwards are in it; nothing outside can reach them.

use super::Trouble;
use nix::sched::{CloneFlags, unshare};
use std::fs;
use std::net::SocketAddr;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

/// How long a program may take until it listens.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long to wait before looking again: a listener tells nobody.
const LOOK_AGAIN: Duration = Duration::from_millis(2);
/// The network of this thread; that of the process may be another one.
const DEVICES: &str = "/proc/thread-self/net/dev";
const SOCKETS: &str = "/proc/thread-self/net/tcp";
/// How `/proc` says that a socket listens.
const LISTENS: &str = "0A";

/// The network that migrations are measured in.
#[derive(Debug)]
pub(super) struct Network {
    why_shared: Option<String>,
}

impl Network {
    /// Moves this thread into a network of its own, which takes root; otherwise it stays.
    pub(super) fn of_our_own() -> Self {
        Self { why_shared: enter().err().map(|trouble| trouble.to_string()) }
    }

    /// Why others use the network, too, if they do.
    pub(super) fn why_shared(&self) -> Option<&str> {
        self.why_shared.as_deref()
    }

    /// All bytes ever sent over loopback: what the programs say, and the headers of IP and TCP.
    /// Nothing when they would not be only ours.
    pub(super) fn bytes(&self) -> Option<u64> {
        if self.why_shared.is_some() {
            return None;
        }
        bytes_sent(&fs::read_to_string(DEVICES).ok()?)
    }
}

fn enter() -> Result<(), Trouble> {
    unshare(CloneFlags::CLONE_NEWNET)
        .map_err(|error| format!("cannot make a network of our own ({error})"))?;
    let up = Command::new("ip").args(["link", "set", "lo", "up"]).status()?;
    if up.success() { Ok(()) } else { Err("`ip link set lo up` failed".into()) }
}

/// Pure: the ninth number of loopback's line.
fn bytes_sent(devices: &str) -> Option<u64> {
    let line = devices.lines().find_map(|line| line.trim_start().strip_prefix("lo:"))?;
    line.split_whitespace().nth(8)?.parse().ok()
}

/// Waits until somebody listens at an IPv4 address, without connecting: a destination may take
/// whoever connects for its source.
///
/// # Errors
/// When nobody does in time.
pub(super) fn wait_for_listener(address: SocketAddr) -> Result<(), Trouble> {
    let deadline = Instant::now() + PATIENCE;
    while !has_listener(&fs::read_to_string(SOCKETS)?, address.port()) {
        if Instant::now() > deadline {
            return Err(format!("nobody listens at {address}").into());
        }
        thread::sleep(LOOK_AGAIN);
    }
    Ok(())
}

/// Pure.
fn has_listener(sockets: &str, port: u16) -> bool {
    let port = format!(":{port:04X}");
    sockets.lines().any(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        matches!(fields[..], [_, local, _, LISTENS, ..] if local.ends_with(&port))
    })
}

#[cfg(test)]
#[allow(unused)] // See migrate.rs.
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn what_loopback_sent_is_found_among_devices() {
        let text = "Inter-| Receive | Transmit\n eth0: 9 9 9 9 9 9 9 9 9 9\n    \
            lo: 1 2 3 4 5 6 7 8 900 10\n";
        assert_eq!(bytes_sent(text), Some(900));
        assert_eq!(bytes_sent("eth0: 1 2 3 4 5 6 7 8 9"), None);
    }

    #[test]
    fn a_connection_is_no_listener() {
        let connected = "0: 0100007F:10E1 0100007F:9000 01 0";
        assert!(!has_listener(connected, 0x10e1));
        assert!(has_listener("1: 0100007F:10E1 00000000:0000 0A 0", 0x10e1));
        assert!(!has_listener("1: 0100007F:10E1 00000000:0000 0A 0", 0x9000));
    }

    #[test]
    fn a_real_listener_is_seen() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        wait_for_listener(listener.local_addr().unwrap()).unwrap();
    }
}
