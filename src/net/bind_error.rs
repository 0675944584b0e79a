//! Errors of listening, with texts that say what to do. Pure.

use super::Address;
use nix::errno::Errno;
use std::io;
use std::net::SocketAddr;

/// Ports below this one are privileged.
const FIRST_UNPRIVILEGED_PORT: u16 = 1024;

/// Why we cannot listen on an address.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {address}: {reason}")]
pub struct BindError {
    /// The address.
    pub address: Address,
    /// The reason.
    pub reason: BindReason,
}

/// The reasons why we cannot listen on an address.
#[derive(Debug, thiserror::Error)]
pub enum BindReason {
    /// Another program listens on the port.
    #[error("another program has this port; stop it or choose another port")]
    PortInUse,
    /// No interface of this host has the address.
    #[error("no interface of this host has this address; choose one that has, or 0.0.0.0 or ::")]
    NotOurAddress,
    /// A port below 1024 without the privilege for it.
    #[error(
        "a port below {FIRST_UNPRIVILEGED_PORT} needs root or CAP_NET_BIND_SERVICE; choose a higher \
         one"
    )]
    PrivilegedPort,
    /// The host does not support IPv6 (or IPv4).
    #[error("this host does not speak this kind of address (IPv4 or IPv6)")]
    NoSuchFamily,
    /// Another program listens on the path.
    #[error("another program answers there; stop it or choose another path")]
    SocketInUse,
    /// The path exists and is not a socket.
    #[error("something that is not a socket is there; move it or choose another path")]
    NotASocket,
    /// The path does not fit into a socket address (107 bytes).
    #[error("the path is too long for a socket; choose one of at most 107 bytes")]
    PathTooLong,
    /// The path's directory does not exist.
    #[error("its directory does not exist; create it first")]
    NoDirectory,
    /// We have no permission to create the socket, or to probe the existing one.
    #[error("permission denied; see who owns it, or choose another place")]
    NotAllowed,
    /// Any other system error.
    #[error("{0}")]
    Other(io::Error),
}

/// The error number of a system call.
pub(super) fn errno_of(error: &io::Error) -> Option<Errno> {
    error.raw_os_error().map(Errno::from_raw)
}

/// The reason for an error of socket, bind or listen on a TCP address.
pub(super) fn tcp_reason(error: io::Error, to: SocketAddr) -> BindReason {
    match errno_of(&error) {
        Some(Errno::EADDRINUSE) => BindReason::PortInUse,
        Some(Errno::EADDRNOTAVAIL) => BindReason::NotOurAddress,
        Some(Errno::EACCES) if (1..FIRST_UNPRIVILEGED_PORT).contains(&to.port()) => {
            BindReason::PrivilegedPort
        }
        Some(Errno::EAFNOSUPPORT) => BindReason::NoSuchFamily,
        Some(Errno::EACCES | Errno::EPERM) => BindReason::NotAllowed,
        _ => BindReason::Other(error),
    }
}

/// The reason for an error of socket, bind, connect or stat on a socket's path.
pub(super) fn unix_reason(error: io::Error) -> BindReason {
    match errno_of(&error) {
        Some(Errno::EADDRINUSE) => BindReason::SocketInUse,
        Some(Errno::ENAMETOOLONG) => BindReason::PathTooLong,
        Some(Errno::ENOENT | Errno::ENOTDIR) => BindReason::NoDirectory,
        Some(Errno::EACCES | Errno::EPERM | Errno::EROFS) => BindReason::NotAllowed,
        _ => BindReason::Other(error),
    }
}

impl BindError {
    /// The error number of the cause (errno(3)), for the service manager.
    #[must_use]
    pub fn errno(&self) -> Option<i32> {
        let errno = match &self.reason {
            BindReason::PortInUse | BindReason::SocketInUse => Errno::EADDRINUSE,
            BindReason::NotOurAddress => Errno::EADDRNOTAVAIL,
            BindReason::NoSuchFamily => Errno::EAFNOSUPPORT,
            BindReason::NotASocket => Errno::ENOTSOCK,
            BindReason::PathTooLong => Errno::ENAMETOOLONG,
            BindReason::NoDirectory => Errno::ENOENT,
            BindReason::PrivilegedPort | BindReason::NotAllowed => Errno::EACCES,
            BindReason::Other(error) => return error.raw_os_error(),
        };
        Some(errno as i32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_system_error_has_its_reason() {
        let low: SocketAddr = "127.0.0.1:1023".parse().unwrap();
        let free: SocketAddr = "127.0.0.1:1024".parse().unwrap();
        let tcp = |errno: Errno, to| tcp_reason(errno.into(), to);
        assert!(matches!(tcp(Errno::EACCES, low), BindReason::PrivilegedPort));
        assert!(matches!(tcp(Errno::EACCES, free), BindReason::NotAllowed));
        assert!(matches!(tcp(Errno::EAFNOSUPPORT, low), BindReason::NoSuchFamily));
        let unix = |errno: Errno| unix_reason(errno.into());
        assert!(matches!(unix(Errno::EACCES), BindReason::NotAllowed));
        assert!(matches!(unix(Errno::EROFS), BindReason::NotAllowed));
        assert!(matches!(unix(Errno::EADDRINUSE), BindReason::SocketInUse));
        assert!(unix(Errno::ENOSPC).to_string().contains("No space left"));
    }
}
