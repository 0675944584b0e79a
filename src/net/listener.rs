//! Listens on an address and accepts connections.
//! Never waits, and never decides which clients may connect.

use super::bind_error::{BindError, BindReason, errno_of, tcp_reason, unix_reason};
use super::stream::{family, unix_peer};
use super::{Address, Peer, Stream};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrStorage, UnixAddr, sockopt,
};
use nix::sys::socket::{bind, connect, getsockopt, listen, setsockopt, socket};
use std::fs;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

/// Most connections that wait to be accepted.
pub const BACKLOG: i32 = 1024;

/// A listening socket. If we bound it to a path, dropping it removes the path, unless that names
/// another file by then.
#[derive(Debug)]
pub struct Listener {
    socket: Socket,
    /// Removes the path when dropped.
    _path: Option<OwnPath>,
}

#[derive(Debug)]
enum Socket {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Listener {
    /// Listens on `address`. The IPv6 wildcard `::` accepts IPv4 clients as well. A stale unix socket is
    /// replaced; the umask determines the mode of the new one.
    ///
    /// # Errors
    /// One [`BindReason`] for each mistake of an operator.
    pub fn bind(address: &Address) -> Result<Self, BindError> {
        let listener = match address {
            Address::Tcp(to) => bind_tcp(*to).map_err(|error| tcp_reason(error, *to)),
            Address::Unix(path) => bind_unix(path),
        };
        listener.map_err(|reason| BindError { address: address.clone(), reason })
    }

    /// Uses an inherited listening socket. Makes it non-blocking (as the service manager's are), and
    /// never removes its path.
    ///
    /// # Errors
    /// When it is not a listening TCP or unix stream socket.
    pub fn inherited(fd: OwnedFd) -> io::Result<Self> {
        let wrong = |what: &str| io::Error::new(io::ErrorKind::InvalidInput, what.to_owned());
        fcntl(&fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
        let family = family(&fd)?;
        if getsockopt(&fd, sockopt::SockType)? != SockType::Stream {
            return Err(wrong("the inherited socket is not a stream socket"));
        }
        if !getsockopt(&fd, sockopt::AcceptConn)? {
            return Err(wrong("the inherited socket does not listen"));
        }
        match family {
            Some(AddressFamily::Inet | AddressFamily::Inet6) => Self::tcp(fd),
            Some(AddressFamily::Unix) => Self::unix(fd, None),
            _ => Err(wrong("the inherited socket is neither a TCP nor a unix socket")),
        }
    }

    /// Accepts the next connection. Skips connections that broke in the backlog.
    ///
    /// # Errors
    /// `WouldBlock` if there is none; no descriptor or memory is left (the connection then stays in the
    /// backlog).
    pub fn accept(&self) -> io::Result<(Stream, Peer)> {
        loop {
            match self.accept_next() {
                Err(error) if is_connection_error(&error) => {}
                outcome => return outcome,
            }
        }
    }

    /// The address it listens on, with the port that the kernel chose for port 0.
    ///
    /// # Errors
    /// None for an open socket.
    pub fn local_address(&self) -> io::Result<Address> {
        match &self.socket {
            Socket::Tcp(listener) => Ok(Address::Tcp(listener.local_addr()?)),
            Socket::Unix(listener) => Ok(Address::Unix(shown(&listener.local_addr()?))),
        }
    }

    /// Whether it listens on exactly this address.
    #[must_use]
    pub fn is_at(&self, address: &Address) -> bool {
        match (self.local_address(), address) {
            // An address in a configuration has no IPv6 scope and flow.
            (Ok(Address::Tcp(here)), Address::Tcp(there)) => {
                (here.ip(), here.port()) == (there.ip(), there.port())
            }
            (Ok(Address::Unix(here)), Address::Unix(there)) => {
                std::path::absolute(there).is_ok_and(|there| here == there)
            }
            _ => false,
        }
    }

    fn accept_next(&self) -> io::Result<(Stream, Peer)> {
        match &self.socket {
            Socket::Tcp(listener) => {
                let (stream, from) = listener.accept()?;
                Ok((Stream::over_tcp(stream), from.into()))
            }
            Socket::Unix(listener) => {
                let (stream, _) = listener.accept()?;
                let peer = unix_peer(&stream);
                Ok((Stream::Unix(stream), peer))
            }
        }
    }

    fn tcp(fd: OwnedFd) -> io::Result<Self> {
        let listener = TcpListener::from(fd);
        listener.set_nonblocking(true)?;
        Ok(Self { socket: Socket::Tcp(listener), _path: None })
    }

    fn unix(fd: OwnedFd, path: Option<OwnPath>) -> io::Result<Self> {
        let listener = UnixListener::from(fd);
        listener.set_nonblocking(true)?;
        Ok(Self { socket: Socket::Unix(listener), _path: path })
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.socket {
            Socket::Tcp(listener) => listener.as_fd(),
            Socket::Unix(listener) => listener.as_fd(),
        }
    }
}

/// The path of our socket, with the identity of the file.
#[derive(Debug)]
struct OwnPath {
    path: PathBuf,
    file: FileId,
}

/// Device and inode.
type FileId = (u64, u64);

impl Drop for OwnPath {
    fn drop(&mut self) {
        if file_id(&self.path).is_ok_and(|now| now == self.file) {
            // A failure leaves a stale socket, which the next server replaces.
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn bind_tcp(to: SocketAddr) -> io::Result<Listener> {
    let family = if to.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let fd = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    setsockopt(&fd, sockopt::ReuseAddr, &true)?;
    if to.is_ipv6() && to.ip().is_unspecified() {
        setsockopt(&fd, sockopt::Ipv6V6Only, &false)?;
    }
    bind(fd.as_raw_fd(), &SockaddrStorage::from(to))?;
    listen(&fd, Backlog::new(BACKLOG)?)?;
    Listener::tcp(fd)
}

fn bind_unix(path: &Path) -> Result<Listener, BindReason> {
    let address = UnixAddr::new(path).map_err(|errno| unix_reason(errno.into()))?;
    remove_stale_socket(path, &address)?;
    bind_unix_path(path, &address).map_err(unix_reason)
}

fn bind_unix_path(path: &Path, address: &UnixAddr) -> io::Result<Listener> {
    let fd = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    bind(fd.as_raw_fd(), address)?;
    let own = OwnPath { path: path.to_owned(), file: file_id(path)? };
    listen(&fd, Backlog::new(BACKLOG)?)?;
    Listener::unix(fd, Some(own))
}

/// Removes a stale socket. Any other file stays, and is an error.
fn remove_stale_socket(path: &Path, address: &UnixAddr) -> Result<(), BindReason> {
    let there = match fs::symlink_metadata(path) {
        Ok(there) => there,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(unix_reason(error)),
    };
    if !there.file_type().is_socket() {
        return Err(BindReason::NotASocket);
    }
    if is_listening(address)? {
        return Err(BindReason::SocketInUse);
    }
    // Another server that starts may have replaced it by a live one meanwhile.
    if file_id(path).is_ok_and(|now| now == (there.dev(), there.ino())) {
        fs::remove_file(path).map_err(unix_reason)?;
    }
    Ok(())
}

/// Whether a server listens, even with a full backlog or another socket type.
fn is_listening(address: &UnixAddr) -> Result<bool, BindReason> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let probed = socket(AddressFamily::Unix, SockType::Stream, flags, None)
        .and_then(|fd| connect(fd.as_raw_fd(), address));
    match probed {
        Ok(()) | Err(Errno::EAGAIN | Errno::EPROTOTYPE) => Ok(true),
        Err(Errno::ECONNREFUSED | Errno::ENOENT) => Ok(false),
        Err(errno) => Err(unix_reason(errno.into())),
    }
}

fn file_id(path: &Path) -> io::Result<FileId> {
    let file = fs::symlink_metadata(path)?;
    Ok((file.dev(), file.ino()))
}

/// A unix address as a path; an abstract one as `@name`.
fn shown(address: &std::os::unix::net::SocketAddr) -> PathBuf {
    let name = address.as_abstract_name().map(String::from_utf8_lossy);
    match (address.as_pathname(), name) {
        (Some(path), _) => path.to_owned(),
        (None, Some(name)) => format!("@{name}").into(),
        (None, None) => PathBuf::new(),
    }
}

/// Whether an error of accept concerns the connection: Linux reports errors of a connection in the
/// backlog there (accept(2), "Error handling").
fn is_connection_error(error: &io::Error) -> bool {
    errno_of(error).is_some_and(|errno| {
        matches!(
            errno,
            Errno::ECONNABORTED
                | Errno::EPROTO
                | Errno::ENETDOWN
                | Errno::ENETUNREACH
                | Errno::EHOSTDOWN
                | Errno::EHOSTUNREACH
                | Errno::ENONET
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::{connect as connect_to, wait_readable};
    use std::time::{Duration, Instant};

    const LONG: Duration = Duration::from_secs(20);

    fn address(text: &str) -> Address {
        Address::Tcp(text.parse().unwrap())
    }

    fn accepted(listener: &Listener) -> (Stream, Peer) {
        assert!(wait_readable(&[listener.as_fd()], Some(Instant::now() + LONG)).unwrap()[0]);
        listener.accept().unwrap()
    }

    fn refusal(to: &Address) -> BindError {
        match Listener::bind(to) {
            Ok(_) => panic!("{to} could be bound"),
            Err(error) => {
                let place = to.to_string();
                assert!(error.to_string().contains(&place), "{error} does not name {place}");
                error
            }
        }
    }

    #[test]
    fn accepting_from_an_empty_backlog_would_block() {
        let dir = tempfile::tempdir().unwrap();
        for to in [address("127.0.0.1:0"), Address::Unix(dir.path().join("socket"))] {
            let listener = Listener::bind(&to).unwrap();
            assert_eq!(listener.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock);
        }
    }

    #[test]
    fn a_listener_compares_its_address() {
        let dir = tempfile::tempdir().unwrap();
        let path = Address::Unix(dir.path().join("socket"));
        let (tcp, unix) =
            (Listener::bind(&address("127.0.0.1:0")).unwrap(), Listener::bind(&path).unwrap());
        let here = tcp.local_address().unwrap();
        let Address::Tcp(socket) = here else { panic!("TCP") };
        assert!(tcp.is_at(&here) && unix.is_at(&path));
        for other in [format!("127.0.0.2:{}", socket.port()), "127.0.0.1:1".to_owned()] {
            assert!(!tcp.is_at(&address(&other)), "{other}");
        }
        assert!(!tcp.is_at(&path) && !unix.is_at(&here));
        assert!(!unix.is_at(&Address::Unix(dir.path().join("other"))));
    }

    #[test]
    fn an_accepted_connection_has_its_peer() {
        let listener = Listener::bind(&address("127.0.0.1:0")).unwrap();
        let stream = connect_to(&listener.local_address().unwrap(), None, LONG).unwrap();
        let (near, peer) = accepted(&listener);
        let Stream::Tcp(far) = &stream else { panic!("a TCP address gives a TCP stream") };
        assert_eq!(peer, Peer::Tcp(far.local_addr().unwrap()));
        assert_eq!(near.peer().unwrap(), peer);
        let flags = FdFlag::from_bits_retain(fcntl(&near, FcntlArg::F_GETFD).unwrap());
        assert!(flags.contains(FdFlag::FD_CLOEXEC));
    }

    #[test]
    fn the_ipv6_wildcard_accepts_ipv4_clients() {
        let listener = Listener::bind(&address("[::]:0")).unwrap();
        let Address::Tcp(local) = listener.local_address().unwrap() else { panic!("TCP") };
        let to = Address::Tcp(SocketAddr::from(([127, 0, 0, 1], local.port())));
        let _stream = connect_to(&to, None, LONG).unwrap();
        let (_near, peer) = accepted(&listener);
        assert_eq!(peer.ip(), Some("127.0.0.1".parse().unwrap()));
        assert!(peer.to_string().starts_with("127.0.0.1:"), "{peer}");
    }

    #[test]
    fn each_failed_bind_has_its_reason() {
        let first = Listener::bind(&address("127.0.0.1:0")).unwrap();
        let error = refusal(&first.local_address().unwrap());
        assert!(matches!(error.reason, BindReason::PortInUse), "{error}");
        let error = refusal(&address("192.0.2.1:0"));
        assert!(matches!(error.reason, BindReason::NotOurAddress), "{error}");
    }

    #[test]
    fn a_port_can_be_reused_at_once() {
        let first = Listener::bind(&address("127.0.0.1:0")).unwrap();
        let to = first.local_address().unwrap();
        let far = connect_to(&to, None, LONG).unwrap();
        let (near, _) = accepted(&first);
        // We close first, so that our end is in TIME-WAIT.
        drop((first, near));
        drop(far);
        Listener::bind(&to).unwrap();
    }

    #[test]
    fn only_a_stale_socket_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "std leaves the path behind");
        let to = Address::Unix(path);
        let live = Listener::bind(&to).unwrap();
        let error = refusal(&to);
        assert!(matches!(error.reason, BindReason::SocketInUse), "{error}");
        // The probe is the first connection, this the second.
        let _far = connect_to(&to, None, LONG).unwrap();
        assert!(matches!(accepted(&live).1, Peer::Unix { pid: Some(_), uid: Some(_) }));
    }

    #[test]
    fn a_file_that_is_not_a_socket_is_unchanged() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.img");
        fs::write(&path, "precious").unwrap();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        for there in [&path, &link] {
            let error = refusal(&Address::Unix(there.clone()));
            assert!(matches!(error.reason, BindReason::NotASocket), "{error}");
        }
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn a_missing_directory_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let error = refusal(&Address::Unix(dir.path().join("missing/socket")));
        assert!(matches!(error.reason, BindReason::NoDirectory), "{error}");
    }

    #[test]
    fn a_path_has_at_most_107_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let room = 107 - dir.path().as_os_str().len() - 1;
        Listener::bind(&Address::Unix(dir.path().join("x".repeat(room)))).unwrap();
        let error = refusal(&Address::Unix(dir.path().join("x".repeat(room + 1))));
        assert!(matches!(error.reason, BindReason::PathTooLong), "{error}");
    }

    #[test]
    fn only_our_own_path_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let listener = Listener::bind(&Address::Unix(path.clone())).unwrap();
        assert_eq!(listener.local_address().unwrap(), Address::Unix(path.clone()));
        drop(listener);
        assert!(!path.exists());

        let listener = Listener::bind(&Address::Unix(path.clone())).unwrap();
        fs::rename(&path, dir.path().join("moved")).unwrap();
        let _other = UnixListener::bind(&path).unwrap();
        drop(listener);
        assert!(path.exists());
    }

    #[test]
    fn an_inherited_listener_never_blocks_and_keeps_its_path() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let unix = UnixListener::bind(&path).unwrap();
        for fd in [OwnedFd::from(tcp), OwnedFd::from(unix)] {
            let listener = Listener::inherited(fd).unwrap();
            assert_eq!(listener.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock);
            let _far = connect_to(&listener.local_address().unwrap(), None, LONG).unwrap();
            accepted(&listener);
        }
        assert!(path.exists());
    }

    #[test]
    fn an_inherited_descriptor_must_listen() {
        let file = fs::File::open("/dev/null").unwrap();
        assert!(Listener::inherited(file.into()).is_err());
        let (one, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        let error = Listener::inherited(one.into()).unwrap_err();
        assert!(error.to_string().contains("does not listen"), "{error}");
        let datagrams = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let error = Listener::inherited(datagrams.into()).unwrap_err();
        assert!(error.to_string().contains("not a stream"), "{error}");
    }

    #[test]
    fn errors_of_a_connection_are_not_the_listeners() {
        assert!(is_connection_error(&Errno::ECONNABORTED.into()));
        assert!(!is_connection_error(&Errno::EMFILE.into()));
        assert!(!is_connection_error(&Errno::EAGAIN.into()));
    }
}
