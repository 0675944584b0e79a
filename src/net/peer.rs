//! The peer of a connection: its address or process. Never decides whether it may connect.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

/// The peer of a connection. A mapped IPv4 address (`::ffff:a.b.c.d`) equals the IPv4 one.
#[derive(Clone, Copy, Debug)]
pub enum Peer {
    /// The address of a TCP peer.
    Tcp(SocketAddr),
    /// The process at a unix socket, as far as the kernel knows it (`SO_PEERCRED`).
    Unix {
        /// Process id when it connected; none outside our pid namespace.
        pid: Option<i32>,
        /// User id when it connected; none outside our user namespace.
        uid: Option<u32>,
    },
}

impl Peer {
    /// The IP address; none for a unix socket.
    #[must_use]
    pub fn ip(&self) -> Option<IpAddr> {
        match self {
            Self::Tcp(address) => Some(address.ip().to_canonical()),
            Self::Unix { .. } => None,
        }
    }
}

impl From<SocketAddr> for Peer {
    fn from(address: SocketAddr) -> Self {
        Self::Tcp(canonical(address))
    }
}

impl PartialEq for Peer {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Tcp(one), Self::Tcp(two)) => canonical(*one) == canonical(*two),
            (Self::Unix { pid, uid }, Self::Unix { pid: other_pid, uid: other_uid }) => {
                (pid, uid) == (other_pid, other_uid)
            }
            _ => false,
        }
    }
}

impl Eq for Peer {}

/// `127.0.0.1:4711`, `[::1]:4711` or `unix:pid=12,uid=0`; no spaces in any.
impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => write!(f, "{}", canonical(*address)),
            Self::Unix { pid: None, uid: None } => write!(f, "unix"),
            Self::Unix { pid: Some(pid), uid: None } => write!(f, "unix:pid={pid}"),
            Self::Unix { pid: None, uid: Some(uid) } => write!(f, "unix:uid={uid}"),
            Self::Unix { pid: Some(pid), uid: Some(uid) } => write!(f, "unix:pid={pid},uid={uid}"),
        }
    }
}

/// Converts a mapped address to IPv4; others, with their scope, are unchanged.
fn canonical(address: SocketAddr) -> SocketAddr {
    match address.ip().to_canonical() {
        IpAddr::V4(ip) => SocketAddr::from((ip, address.port())),
        IpAddr::V6(_) => address,
    }
}

#[cfg(test)]
mod tests {
    use super::Peer;

    fn tcp(text: &str) -> Peer {
        Peer::Tcp(text.parse().unwrap())
    }

    #[test]
    fn a_mapped_address_equals_its_ipv4_address() {
        let mapped = tcp("[::ffff:192.0.2.7]:4711");
        assert_eq!(mapped.to_string(), "192.0.2.7:4711");
        assert_eq!(mapped, tcp("192.0.2.7:4711"));
        assert_eq!(mapped.ip(), Some("192.0.2.7".parse().unwrap()));
        assert_ne!(mapped, tcp("192.0.2.8:4711"));
        assert!(
            matches!(Peer::from("[::ffff:192.0.2.7]:1".parse::<std::net::SocketAddr>().unwrap()),
            Peer::Tcp(address) if address.is_ipv4())
        );
    }

    #[test]
    fn an_ipv6_address_keeps_its_scope() {
        assert_eq!(tcp("[fe80::1%3]:5").to_string(), "[fe80::1%3]:5");
        assert_eq!(tcp("[::1]:4711").to_string(), "[::1]:4711");
    }

    #[test]
    fn a_unix_peer_displays_its_known_ids() {
        let known = Peer::Unix { pid: Some(12), uid: Some(0) };
        assert_eq!(known.to_string(), "unix:pid=12,uid=0");
        assert_eq!(Peer::Unix { pid: None, uid: Some(5) }.to_string(), "unix:uid=5");
        assert_eq!(Peer::Unix { pid: Some(5), uid: None }.to_string(), "unix:pid=5");
        assert_eq!(Peer::Unix { pid: None, uid: None }.to_string(), "unix");
        assert_eq!(known.ip(), None);
        assert_ne!(known, Peer::Unix { pid: Some(13), uid: Some(0) });
        assert_ne!(known, tcp("127.0.0.1:1"));
    }
}
