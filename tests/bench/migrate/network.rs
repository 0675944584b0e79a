//! A network namespace of the benchmark's own, whose loopback counts only bytes of the migration.

use super::Error;
use super::process::{PATIENCE, wait_until};
use nix::sched::{CloneFlags, unshare};
use std::fs;
use std::net::SocketAddr;
use std::process::Command;

#[derive(Debug)]
pub(super) struct Network {
    /// Why the namespace is not the benchmark's own, if so.
    pub(super) why_shared: Option<String>,
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

    /// All bytes sent over loopback, headers of IP and TCP included, if only this benchmark sends.
    pub(super) fn bytes(&self) -> Option<u64> {
        if self.why_shared.is_some() {
            return None;
        }
        let devices = fs::read_to_string("/proc/thread-self/net/dev").ok()?;
        let line = devices.lines().find_map(|line| line.trim_start().strip_prefix("lo:"))?;
        // The ninth number is that of bytes sent.
        line.split_whitespace().nth(8)?.parse().ok()
    }
}

/// Waits for a listener without connecting: a destination may take the first client for its source.
pub(super) fn wait_for_listener(address: SocketAddr) -> Result<(), Error> {
    let port = format!(":{:04X}", address.port());
    let is_listening = || {
        let sockets = fs::read_to_string("/proc/thread-self/net/tcp")?;
        Ok(sockets.lines().any(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            // 0A is TCP_LISTEN.
            matches!(fields[..], [_, local, _, "0A", ..] if local.ends_with(&port))
        }))
    };
    if wait_until(PATIENCE, is_listening)? {
        Ok(())
    } else {
        Err(format!("nothing listens at {address}").into())
    }
}
