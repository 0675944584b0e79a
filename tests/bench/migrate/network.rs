//! A network namespace of the benchmark's own, whose loopback counts only bytes of the migration.

use super::Error;
use super::process::{PATIENCE, wait_until};
use nix::sched::{CloneFlags, unshare};
use std::fs;
use std::net::SocketAddr;
use std::process::Command;

#[derive(Debug)]
pub(super) struct Network {
    why_shared: Option<String>,
}

impl Network {
    /// Moves this thread, and threads and processes that it starts, into a new network namespace.
    /// Without root it stays in its own.
    pub(super) fn new() -> Self {
        let enter = || -> Result<(), Error> {
            unshare(CloneFlags::CLONE_NEWNET)
                .map_err(|error| format!("cannot make a network namespace ({error})"))?;
            let up = Command::new("ip").args(["link", "set", "lo", "up"]).status()?;
            if up.success() { Ok(()) } else { Err("`ip link set lo up` failed".into()) }
        };
        Self { why_shared: enter().err().map(|error| error.to_string()) }
    }

    /// Why the namespace is not the benchmark's own, if so.
    pub(super) fn why_shared(&self) -> Option<&str> {
        self.why_shared.as_deref()
    }

    /// All bytes sent over loopback, headers of IP and TCP included, if only this benchmark sends.
    pub(super) fn bytes(&self) -> Option<u64> {
        if self.why_shared.is_some() {
            return None;
        }
        bytes_sent(&fs::read_to_string("/proc/thread-self/net/dev").ok()?)
    }
}

/// The ninth number in the line of loopback.
fn bytes_sent(devices: &str) -> Option<u64> {
    let line = devices.lines().find_map(|line| line.trim_start().strip_prefix("lo:"))?;
    line.split_whitespace().nth(8)?.parse().ok()
}

/// Waits for a listener without connecting: a destination may take the first client for its source.
pub(super) fn wait_for_listener(address: SocketAddr) -> Result<(), Error> {
    let is_listening = || {
        let sockets = fs::read_to_string("/proc/thread-self/net/tcp")?;
        Ok(has_listener(&sockets, address.port()))
    };
    if wait_until(PATIENCE, is_listening)? {
        Ok(())
    } else {
        Err(format!("nothing listens at {address}").into())
    }
}

fn has_listener(sockets: &str, port: u16) -> bool {
    let port = format!(":{port:04X}");
    sockets.lines().any(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        // 0A is TCP_LISTEN.
        matches!(fields[..], [_, local, _, "0A", ..] if local.ends_with(&port))
    })
}

#[cfg(test)]
#[allow(unused)] // See peers.rs.
mod tests {
    use super::*;

    #[test]
    fn loopback_is_found_among_devices() {
        let text = " eth0: 9 9 9 9 9 9 9 9 9 9\n    lo: 1 2 3 4 5 6 7 8 900 10\n";
        assert_eq!(bytes_sent(text), Some(900));
    }

    #[test]
    fn a_connection_is_no_listener() {
        assert!(!has_listener("0: 0100007F:10E1 0100007F:9000 01 0", 0x10e1));
        assert!(has_listener("1: 0100007F:10E1 00000000:0000 0A 0", 0x10e1));
        assert!(!has_listener("1: 0100007F:10E1 00000000:0000 0A 0", 0x9000));
    }
}
