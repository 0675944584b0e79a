//! Why we cannot listen somewhere, in words that tell an operator what to do.
//! Pure: a kernel error and an address in, a reason out.

use super::Address;
use nix::errno::Errno;
use std::fmt;
use std::io;
use std::net::SocketAddr;

/// Ports below this one are the privileged ones.
const FIRST_FREE_PORT: u16 = 1024;

/// Why we cannot listen there.
#[derive(Debug)]
pub struct BindError {
    /// Where.
    pub address: Address,
    /// Why not.
    pub reason: BindReason,
}

/// What stands in the way of listening on an address.
#[derive(Debug)]
pub enum BindReason {
    /// Another program listens on the port.
    PortInUse,
    /// No interface of this host has the address.
    NotOurAddress,
    /// A port below 1024 without the privilege for it.
    PrivilegedPort,
    /// This host does not speak IPv6 (or IPv4).
    NoSuchFamily,
    /// A program answers on the socket's path.
    SocketInUse,
    /// The path is there and is not a socket.
    NotASocket,
    /// The path does not fit into a socket address (107 bytes).
    PathTooLong,
    /// The path's directory is missing.
    NoDirectory,
    /// We may not make the socket there, or not look whether the one that is there is alive.
    NotAllowed,
    /// Something else.
    Other(io::Error),
}

/// The kernel's number for an error.
pub(super) fn errno_of(error: &io::Error) -> Option<Errno> {
    error.raw_os_error().map(Errno::from_raw)
}

/// What an error of socket, bind or listen means for a TCP address.
pub(super) fn tcp_reason(error: io::Error, to: SocketAddr) -> BindReason {
    match errno_of(&error) {
        Some(Errno::EADDRINUSE) => BindReason::PortInUse,
        Some(Errno::EADDRNOTAVAIL) => BindReason::NotOurAddress,
        Some(Errno::EACCES) if (1..FIRST_FREE_PORT).contains(&to.port()) => {
            BindReason::PrivilegedPort
        }
        Some(Errno::EAFNOSUPPORT) => BindReason::NoSuchFamily,
        Some(Errno::EACCES | Errno::EPERM) => BindReason::NotAllowed,
        _ => BindReason::Other(error),
    }
}

/// What an error of socket, bind, connect or stat means for a socket's path.
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
    /// The kernel's number for what is wrong, for programs that want one (errno(3)).
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

impl fmt::Display for BindError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot listen on {}: {}", self.address, self.reason)
    }
}

impl fmt::Display for BindReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PortInUse => {
                write!(f, "another program has this port; stop it or choose another port")
            }
            Self::NotOurAddress => write!(
                f,
                "no interface of this host has this address; choose one that has, or 0.0.0.0 or ::"
            ),
            Self::PrivilegedPort => write!(
                f,
                "a port below {FIRST_FREE_PORT} needs root or CAP_NET_BIND_SERVICE; choose a higher one"
            ),
            Self::NoSuchFamily => {
                write!(f, "this host does not speak this kind of address (IPv4 or IPv6)")
            }
            Self::SocketInUse => {
                write!(f, "another program answers there; stop it or choose another path")
            }
            Self::NotASocket => {
                write!(f, "something that is not a socket is there; move it or choose another path")
            }
            Self::PathTooLong => {
                write!(f, "the path is too long for a socket; choose one of at most 107 bytes")
            }
            Self::NoDirectory => write!(f, "its directory does not exist; create it first"),
            Self::NotAllowed => {
                write!(f, "permission denied; see who owns it, or choose another place")
            }
            Self::Other(error) => write!(f, "{error}"),
        }
    }
}

impl std::error::Error for BindError {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kernel_error_has_its_own_sentence() {
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
