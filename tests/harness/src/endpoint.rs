//! Endpoints of servers, and addresses that no other test uses.

use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};

/// The port of NBD: the first port of [`unused_loopback_address`].
const NBD_PORT: u16 = 10809;
/// The ports of [`free_port`]: below those that the kernel gives to clients, 32768 and up (ip(7),
/// `ip_local_port_range`).
const SERVER_PORT_MIN: u32 = 15_000;
const SERVER_PORTS: u32 = 17_000;

/// An address at which a server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// A TCP address and port.
    Tcp(SocketAddr),
    /// The path of a unix socket.
    Unix(PathBuf),
}

impl Endpoint {
    /// A port of 127.0.0.1.
    pub fn localhost(port: u16) -> Endpoint {
        Endpoint::Tcp((Ipv4Addr::LOCALHOST, port).into())
    }

    /// The NBD URI of the default export.
    pub fn uri(&self) -> String {
        match self {
            Endpoint::Tcp(address) => format!("nbd://{address}"),
            Endpoint::Unix(_) => self.uri_of(""),
        }
    }

    /// The NBD URI of an export.
    pub fn uri_of(&self, export: &str) -> String {
        match self {
            Endpoint::Tcp(address) => format!("nbd://{address}/{export}"),
            Endpoint::Unix(path) => format!("nbd+unix:///{export}?socket={}", path.display()),
        }
    }

    /// `--addr` and `--port` of flexnbd's commands, separated by spaces.
    pub fn flags(&self) -> String {
        match self {
            Endpoint::Tcp(address) => format!("--addr {} --port {}", address.ip(), address.port()),
            Endpoint::Unix(path) => format!("--addr {}", path.display()),
        }
    }

    /// Whether a server accepts connections. Connects, and closes the connection at once.
    pub(crate) fn accepts(&self) -> bool {
        match self {
            Endpoint::Tcp(address) => TcpStream::connect(address).is_ok(),
            Endpoint::Unix(path) => UnixStream::connect(path).is_ok(),
        }
    }
}

/// A TCP port of 127.0.0.1 without a listener. Not one that this process has got recently, nor one
/// that the kernel gives to clients.
pub fn free_port() -> u16 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let start = std::process::id().wrapping_mul(97);
    loop {
        let number = start.wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed));
        let port = (SERVER_PORT_MIN + number % SERVER_PORTS) as u16;
        if TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
            return port;
        }
    }
}

/// An address of the loopback network that no other test uses, so that ports cannot collide.
pub fn unused_loopback_address() -> SocketAddr {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let process = std::process::id() % 0xff00 + 0x100;
    let [high, low] = u16::try_from(process).unwrap().to_be_bytes();
    let (round, last) = (u16::try_from(number / 250).unwrap(), (number % 250 + 1) as u8);
    SocketAddr::from((Ipv4Addr::new(127, high, low, last), NBD_PORT + round))
}
