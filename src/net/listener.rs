//! Listens on an address and accepts who connects.
//! Never waits, and never decides who may come in.

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

/// How many connections may wait to be accepted.
pub const BACKLOG: i32 = 1024;

/// A socket that listens. One that we bound to a path takes the path away again when it is
/// dropped, unless the path has become somebody else's.
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
    /// Listens on `address`. The IPv6 wildcard `::` admits IPv4 clients as well. A unix socket
    /// that nobody answers on any more is replaced; its mode is what the umask leaves.
    ///
    /// # Errors
    /// One [`BindReason`] for each thing an operator can get wrong.
    pub fn bind(address: &Address) -> Result<Self, BindError> {
        let listener = match address {
            Address::Tcp(to) => bind_tcp(*to).map_err(|error| tcp_reason(error, *to)),
            Address::Unix(path) => bind_unix(path),
        };
        listener.map_err(|reason| BindError { address: address.clone(), reason })
    }

    /// Adopts a listening socket that came from elsewhere. It is made non-blocking (as the
    /// service manager's are), and its path, if it has one, is not ours to remove.
    ///
    /// # Errors
    /// When it is not a TCP or unix stream socket that listens.
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

    /// Takes the next connection that waits, and says who it is from.
    ///
    /// # Errors
    /// `WouldBlock` when none waits; no descriptor or memory left (then the connection goes on
    /// waiting). A connection that broke while it waited is passed over.
    pub fn accept(&self) -> io::Result<(Stream, Peer)> {
        loop {
            match self.accept_next() {
                Err(error) if broke_while_waiting(&error) => {}
                outcome => return outcome,
            }
        }
    }

    /// Where it listens; with port 0, this is the way to learn which one the kernel chose.
    ///
    /// # Errors
    /// None that an open socket gives.
    pub fn local_address(&self) -> io::Result<Address> {
        match &self.socket {
            Socket::Tcp(listener) => Ok(Address::Tcp(listener.local_addr()?)),
            Socket::Unix(listener) => Ok(Address::Unix(shown(&listener.local_addr()?))),
        }
    }

    /// Whether it listens exactly there.
    #[must_use]
    pub fn is_at(&self, address: &Address) -> bool {
        match (self.local_address(), address) {
            // Scope and flow of an IPv6 address are not told by those who write one down.
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

/// A path that we made, as the file that it was then.
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
            // Nobody is left to hear of a failure; the next owner finds a stale socket.
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
    clear_the_way(path, &address)?;
    bind_unix_there(path, &address).map_err(unix_reason)
}

fn bind_unix_there(path: &Path, address: &UnixAddr) -> io::Result<Listener> {
    let fd = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    bind(fd.as_raw_fd(), address)?;
    let own = OwnPath { path: path.to_owned(), file: file_id(path)? };
    listen(&fd, Backlog::new(BACKLOG)?)?;
    Listener::unix(fd, Some(own))
}

/// Removes a socket that nobody answers on; whatever else is there stays, and is the error.
fn clear_the_way(path: &Path, address: &UnixAddr) -> Result<(), BindReason> {
    let there = match fs::symlink_metadata(path) {
        Ok(there) => there,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(unix_reason(error)),
    };
    if !there.file_type().is_socket() {
        return Err(BindReason::NotASocket);
    }
    if somebody_answers(address)? {
        return Err(BindReason::SocketInUse);
    }
    // Another starting server may have put its own there meanwhile; that one is alive.
    if file_id(path).is_ok_and(|now| now == (there.dev(), there.ino())) {
        fs::remove_file(path).map_err(unix_reason)?;
    }
    Ok(())
}

/// Whether a server listens there, be it too busy to accept or of another socket type.
fn somebody_answers(address: &UnixAddr) -> Result<bool, BindReason> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let asked = socket(AddressFamily::Unix, SockType::Stream, flags, None)
        .and_then(|fd| connect(fd.as_raw_fd(), address));
    match asked {
        Ok(()) | Err(Errno::EAGAIN | Errno::EPROTOTYPE) => Ok(true),
        Err(Errno::ECONNREFUSED | Errno::ENOENT) => Ok(false),
        Err(errno) => Err(unix_reason(errno.into())),
    }
}

fn file_id(path: &Path) -> io::Result<FileId> {
    let file = fs::symlink_metadata(path)?;
    Ok((file.dev(), file.ino()))
}

/// A unix address as a path; one without a file (abstract) as `@name`.
fn shown(address: &std::os::unix::net::SocketAddr) -> PathBuf {
    let name = address.as_abstract_name().map(String::from_utf8_lossy);
    match (address.as_pathname(), name) {
        (Some(path), _) => path.to_owned(),
        (None, Some(name)) => format!("@{name}").into(),
        (None, None) => PathBuf::new(),
    }
}

/// Linux reports what went wrong with a waiting connection as an error of accept (accept(2),
/// "Error handling"); the listener itself is well.
fn broke_while_waiting(error: &io::Error) -> bool {
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
    fn accepting_when_nobody_waits_would_block() {
        let dir = tempfile::tempdir().unwrap();
        for to in [address("127.0.0.1:0"), Address::Unix(dir.path().join("socket"))] {
            let listener = Listener::bind(&to).unwrap();
            assert_eq!(listener.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock);
        }
    }

    #[test]
    fn a_listener_knows_its_own_address_from_others() {
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
    fn who_connects_is_accepted_and_known() {
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
    fn the_ipv6_wildcard_admits_ipv4_clients_and_shows_them_as_such() {
        let listener = Listener::bind(&address("[::]:0")).unwrap();
        let Address::Tcp(local) = listener.local_address().unwrap() else { panic!("TCP") };
        let to = Address::Tcp(SocketAddr::from(([127, 0, 0, 1], local.port())));
        let _stream = connect_to(&to, None, LONG).unwrap();
        let (_near, peer) = accepted(&listener);
        assert_eq!(peer.ip(), Some("127.0.0.1".parse().unwrap()));
        assert!(peer.to_string().starts_with("127.0.0.1:"), "{peer}");
    }

    #[test]
    fn a_port_in_use_and_an_address_of_another_host_are_told_apart() {
        let first = Listener::bind(&address("127.0.0.1:0")).unwrap();
        let error = refusal(&first.local_address().unwrap());
        assert!(matches!(error.reason, BindReason::PortInUse), "{error}");
        let error = refusal(&address("192.0.2.1:0"));
        assert!(matches!(error.reason, BindReason::NotOurAddress), "{error}");
    }

    #[test]
    fn a_port_can_be_bound_again_at_once_after_a_connection_on_it() {
        let first = Listener::bind(&address("127.0.0.1:0")).unwrap();
        let to = first.local_address().unwrap();
        let far = connect_to(&to, None, LONG).unwrap();
        let (near, _) = accepted(&first);
        // We close first, so that our end is the one that lingers.
        drop((first, near));
        drop(far);
        Listener::bind(&to).unwrap();
    }

    #[test]
    fn a_stale_unix_socket_is_replaced_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "std leaves the path behind");
        let to = Address::Unix(path);
        let live = Listener::bind(&to).unwrap();
        let error = refusal(&to);
        assert!(matches!(error.reason, BindReason::SocketInUse), "{error}");
        // The question whether it is alive counts as a connection; then comes the real one.
        let _far = connect_to(&to, None, LONG).unwrap();
        assert!(matches!(accepted(&live).1, Peer::Unix { pid: Some(_), uid: Some(_) }));
    }

    #[test]
    fn what_is_not_a_socket_is_left_alone() {
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
    fn a_missing_directory_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let error = refusal(&Address::Unix(dir.path().join("missing/socket")));
        assert!(matches!(error.reason, BindReason::NoDirectory), "{error}");
    }

    #[test]
    fn a_socket_path_of_107_bytes_fits_and_one_of_108_does_not() {
        let dir = tempfile::tempdir().unwrap();
        let room = 107 - dir.path().as_os_str().len() - 1;
        Listener::bind(&Address::Unix(dir.path().join("x".repeat(room)))).unwrap();
        let error = refusal(&Address::Unix(dir.path().join("x".repeat(room + 1))));
        assert!(matches!(error.reason, BindReason::PathTooLong), "{error}");
    }

    #[test]
    fn our_path_goes_with_us_and_somebody_elses_stays() {
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
    fn an_inherited_listener_accepts_without_waiting_and_leaves_its_path() {
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
    fn an_inherited_descriptor_must_be_a_socket_that_listens() {
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
    fn a_connection_that_broke_is_not_the_listeners_trouble() {
        assert!(broke_while_waiting(&Errno::ECONNABORTED.into()));
        assert!(!broke_while_waiting(&Errno::EMFILE.into()));
        assert!(!broke_while_waiting(&Errno::EAGAIN.into()));
    }
}
