//! Connects to an address within a time limit, or to the first of several that accepts.
//! Tries each once; whether to try again, and where, the caller decides.

use super::wait::{happened, poll_until};
use super::{Address, Stream};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrStorage, UnixAddr, sockopt};
use nix::sys::socket::{bind, connect as connect_socket, setsockopt, socket};
use nix::sys::time::{TimeVal, TimeValLike};
use std::io;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// How long an address may be silent before the next one is tried beside it ("Happy Eyeballs", RFC 8305,
/// Connection Attempt Delay).
const SILENCE_MAX: Duration = Duration::from_millis(250);

/// Connects to `address`, from the local address `from` if given, within `timeout`.
///
/// # Errors
/// `TimedOut` after `timeout`, `InvalidInput` if `from` is of the other family or the destination is a
/// unix socket, or the system's error. The text names both addresses.
pub fn connect(address: &Address, from: Option<IpAddr>, timeout: Duration) -> io::Result<Stream> {
    let mut failure = None;
    let connected = connect_first(std::slice::from_ref(address), from, timeout, |_, error| {
        failure = Some(error);
    });
    let none = || io::ErrorKind::AddrNotAvailable.into();
    connected.map(|(_, stream)| stream).ok_or_else(|| failure.unwrap_or_else(none))
}

/// Connects to the first of several addresses that accepts, each within `timeout`. They are tried in their order: the
/// next one after a failure at once, and after `SILENCE_MAX` beside those that have not answered. Returns
/// its number; `None` if none accepts. `on_failure` gets the number and the error of each that has failed, as of
/// [`connect`].
pub fn connect_first(
    addresses: &[Address],
    from: Option<IpAddr>,
    timeout: Duration,
    mut on_failure: impl FnMut(usize, io::Error),
) -> Option<(usize, Stream)> {
    let mut fail = |number: usize, error: &io::Error| {
        on_failure(number, with_addresses(error, &addresses[number], from));
    };
    let (mut next, mut silent_at) = (0, Instant::now());
    let mut pending: Vec<PendingConnection> = Vec::new();
    loop {
        if next < addresses.len() && (pending.is_empty() || silent_at <= Instant::now()) {
            let number = next;
            next += 1;
            silent_at = Instant::now() + SILENCE_MAX;
            match begin(&addresses[number], from, timeout) {
                Ok(Begun::Connected(stream)) => return Some((number, stream)),
                Ok(Begun::Pending(stream)) => {
                    let deadline = Instant::now().checked_add(timeout);
                    pending.push(PendingConnection { number, stream, deadline });
                }
                Err(error) => {
                    silent_at = Instant::now();
                    fail(number, &error);
                }
            }
            continue;
        }
        if pending.is_empty() {
            return None;
        }
        let other = (next < addresses.len()).then_some(silent_at);
        let deadline = pending.iter().filter_map(|one| one.deadline).chain(other).min();
        let ended = match ended_at(&mut pending, deadline, timeout) {
            Ok(ended) => ended,
            Err(error) => {
                pending.iter().for_each(|one| fail(one.number, &error));
                return None;
            }
        };
        for (number, outcome) in ended {
            match outcome.and_then(connected) {
                Ok(stream) => return Some((number, stream)),
                Err(error) => {
                    // The next one follows the last one, not one that has failed late.
                    silent_at = if number + 1 == next { Instant::now() } else { silent_at };
                    fail(number, &error);
                }
            }
        }
    }
}

/// A connection that the kernel is making.
struct PendingConnection {
    number: usize,
    stream: TcpStream,
    deadline: Option<Instant>,
}

/// A connection that was begun.
enum Begun {
    Connected(Stream),
    Pending(TcpStream),
}

/// Begins to connect. A unix socket is connected, or not, when this returns, at most after `timeout`.
fn begin(address: &Address, from: Option<IpAddr>, timeout: Duration) -> io::Result<Begun> {
    match (address, from) {
        (Address::Tcp(to), None) => begin_tcp(*to, None),
        (Address::Tcp(to), Some(ip)) => begin_tcp(*to, Some(local_for(ip, *to)?)),
        (Address::Unix(path), None) => connect_unix(path, timeout).map(Begun::Connected),
        (Address::Unix(_), Some(_)) => Err(invalid_input("a unix socket has no local address")),
    }
}

/// Waits until connections have been made or have failed, at most until then. Returns their numbers and outcomes,
/// with those whose time is over.
fn ended_at(
    pending: &mut Vec<PendingConnection>,
    deadline: Option<Instant>,
    timeout: Duration,
) -> io::Result<Vec<(usize, io::Result<TcpStream>)>> {
    let mut fds: Vec<PollFd<'_>> =
        pending.iter().map(|one| PollFd::new(one.stream.as_fd(), PollFlags::POLLOUT)).collect();
    poll_until(&mut fds, deadline)?;
    let ready: Vec<bool> = fds.iter().map(|fd| !happened(fd).is_empty()).collect();
    let now = Instant::now();
    let mut ended = Vec::new();
    let mut ready = ready.into_iter();
    for one in std::mem::take(pending) {
        let is_late = one.deadline.is_some_and(|deadline| deadline <= now);
        match (ready.next().unwrap_or(false), is_late) {
            (true, _) => ended.push((one.number, Ok(one.stream))),
            (false, true) => {
                let late = io::Error::new(io::ErrorKind::TimedOut, no_answer(timeout));
                ended.push((one.number, Err(late)));
            }
            (false, false) => pending.push(one),
        }
    }
    Ok(ended)
}

/// The result of a connection that the kernel has made, or given up.
fn connected(stream: TcpStream) -> io::Result<Stream> {
    stream.take_error()?.map_or(Ok(()), Err)?;
    stream.set_nonblocking(false)?;
    Ok(Stream::over_tcp(stream))
}

fn begin_tcp(to: SocketAddr, from: Option<SocketAddr>) -> io::Result<Begun> {
    let family = if to.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(family, SockType::Stream, flags, None)?;
    if let Some(from) = from {
        bind(fd.as_raw_fd(), &SockaddrStorage::from(from)).map_err(not_ours)?;
    }
    let stream = TcpStream::from(fd);
    match connect_socket(stream.as_raw_fd(), &SockaddrStorage::from(to)) {
        Ok(()) => connected(stream).map(Begun::Connected),
        Err(Errno::EINPROGRESS | Errno::EINTR) => Ok(Begun::Pending(stream)),
        Err(errno) => Err(errno.into()),
    }
}

/// A unix socket does not support non-blocking connects that complete later; the kernel limits the
/// time instead (`SO_SNDTIMEO`).
fn connect_unix(path: &Path, timeout: Duration) -> io::Result<Stream> {
    let address = UnixAddr::new(path)?;
    let fd = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    setsockopt(&fd, sockopt::SendTimeout, &time_value(timeout))?;
    loop {
        match connect_socket(fd.as_raw_fd(), &address) {
            Ok(()) => break,
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => {
                return Err(io::Error::new(io::ErrorKind::TimedOut, no_answer(timeout)));
            }
            Err(errno) => return Err(errno.into()),
        }
    }
    setsockopt(&fd, sockopt::SendTimeout, &TimeVal::microseconds(0))?;
    Ok(Stream::Unix(UnixStream::from(fd)))
}

/// At least a microsecond, since zero means no timeout.
fn time_value(timeout: Duration) -> TimeVal {
    TimeVal::microseconds(i64::try_from(timeout.as_micros()).unwrap_or(i64::MAX).max(1))
}

/// The local address to bind to, in the family of the destination.
fn local_for(ip: IpAddr, to: SocketAddr) -> io::Result<SocketAddr> {
    match (ip.to_canonical(), to) {
        (ip @ IpAddr::V4(_), SocketAddr::V4(_)) | (ip @ IpAddr::V6(_), SocketAddr::V6(_)) => {
            Ok(SocketAddr::new(ip, 0))
        }
        (IpAddr::V4(_), _) => Err(invalid_input("an IPv4 address cannot reach an IPv6 one")),
        (IpAddr::V6(_), _) => Err(invalid_input("an IPv6 address cannot reach an IPv4 one")),
    }
}

fn invalid_input(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, why)
}

fn not_ours(errno: Errno) -> io::Error {
    match errno {
        Errno::EADDRNOTAVAIL => io::Error::new(
            io::ErrorKind::AddrNotAvailable,
            "no interface of this host has the local address",
        ),
        other => other.into(),
    }
}

fn no_answer(timeout: Duration) -> String {
    format!("no answer within {} s", timeout.as_secs_f32())
}

fn with_addresses(error: &io::Error, address: &Address, from: Option<IpAddr>) -> io::Error {
    let from = from.map_or_else(String::new, |ip| format!(" from {ip}"));
    io::Error::new(error.kind(), format!("cannot connect to {address}{from}: {error}"))
}

#[cfg(test)]
mod tests {
    use super::{SILENCE_MAX, connect, connect_first, local_for, time_value};
    use crate::net::{Address, Listener, Stream};
    use nix::sys::socket::{getsockopt, sockopt};
    use nix::sys::time::TimeValLike;
    use std::io::ErrorKind;
    use std::net::TcpListener;
    use std::os::unix::net::UnixListener;
    use std::time::Duration;

    const LONG: Duration = Duration::from_secs(20);
    const SHORT: Duration = Duration::from_millis(20);

    fn tcp(text: &str) -> Address {
        Address::Tcp(text.parse().unwrap())
    }

    #[test]
    fn the_local_address_is_used() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let to = Address::Tcp(listener.local_addr().unwrap());
        let _stream = connect(&to, Some("127.0.0.9".parse().unwrap()), LONG).unwrap();
        assert_eq!(listener.accept().unwrap().1.ip().to_string(), "127.0.0.9");
    }

    #[test]
    fn a_connected_descriptor_blocks_without_a_timeout() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let to = Address::Tcp(listener.local_addr().unwrap());
        let stream = connect(&to, None, LONG).unwrap();
        let flags = nix::fcntl::fcntl(&stream, nix::fcntl::FcntlArg::F_GETFL).unwrap();
        assert_eq!(flags & nix::libc::O_NONBLOCK, 0);

        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let _listener = UnixListener::bind(&path).unwrap();
        let Stream::Unix(stream) = connect(&Address::Unix(path), None, LONG).unwrap() else {
            panic!("a unix address gives a unix stream")
        };
        assert_eq!(getsockopt(&stream, sockopt::SendTimeout).unwrap().num_microseconds(), 0);
    }

    #[test]
    fn the_error_names_both_addresses() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let to = listener.local_addr().unwrap();
        drop(listener);
        let from = Some("127.0.0.9".parse().unwrap());
        let error = connect(&Address::Tcp(to), from, LONG).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
        let text = error.to_string();
        assert!(text.contains(&format!("cannot connect to {to} from 127.0.0.9: ")), "{text}");
    }

    #[test]
    fn the_error_names_a_missing_or_stale_socket() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let error = connect(&Address::Unix(path.clone()), None, LONG).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
        assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
        drop(UnixListener::bind(&path).unwrap());
        let error = connect(&Address::Unix(path), None, LONG).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
    }

    #[test]
    fn a_full_unix_backlog_is_a_timeout() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let _listener = UnixListener::bind(&path).unwrap();
        let to = Address::Unix(path);
        let mut waiting = Vec::new();
        let error = loop {
            match connect(&to, None, SHORT) {
                Ok(stream) => waiting.push(stream),
                Err(error) => break error,
            }
        };
        assert_eq!(error.kind(), ErrorKind::TimedOut);
        assert!(error.to_string().contains("no answer within 0.02 s"), "{error}");
    }

    #[test]
    fn a_full_tcp_backlog_is_a_timeout() {
        let listener = listener_with_short_backlog();
        let to = Address::Tcp(listener.local_addr().unwrap());
        let mut waiting = Vec::new();
        let error = loop {
            match connect(&to, None, SHORT) {
                Ok(stream) => waiting.push(stream),
                Err(error) => break error,
            }
        };
        assert_eq!(error.kind(), ErrorKind::TimedOut);
    }

    /// A listener that never accepts, with the shortest backlog.
    fn listener_with_short_backlog() -> TcpListener {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        nix::sys::socket::listen(&listener, nix::sys::socket::Backlog::new(0).unwrap()).unwrap();
        listener
    }

    /// A TCP address that does not answer, and what keeps it so.
    fn black_hole() -> (Address, (TcpListener, Vec<Stream>)) {
        let listener = listener_with_short_backlog();
        let to = Address::Tcp(listener.local_addr().unwrap());
        let waiting = std::iter::from_fn(|| connect(&to, None, SHORT).ok()).collect();
        (to, (listener, waiting))
    }

    /// The number of the first that accepts, and the failures before.
    fn first(addresses: &[Address], timeout: Duration) -> (Option<usize>, Vec<(usize, ErrorKind)>) {
        let mut failures = Vec::new();
        let connected = connect_first(addresses, None, timeout, |number, error| {
            failures.push((number, error.kind()));
        });
        (connected.map(|(number, _)| number), failures)
    }

    #[test]
    fn silent_addresses_do_not_keep_the_next_ones_waiting() {
        let (silent, _kept) = black_hole();
        let (other, _also_kept) = black_hole();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let answers = Address::Tcp(listener.local_addr().unwrap());
        // It would wait for an hour otherwise.
        let hour = Duration::from_secs(3600);
        assert_eq!(first(&[silent, other, answers], hour), (Some(2), vec![]));
    }

    #[test]
    fn first_address_that_accepts_is_taken() {
        let listeners = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
        let [a, b] = listeners.each_ref().map(|to| Address::Tcp(to.local_addr().unwrap()));
        assert_eq!(first(&[a, b.clone()], LONG), (Some(0), vec![]));
        let refused = tcp("127.0.0.1:1");
        let failures = vec![(0, ErrorKind::ConnectionRefused), (1, ErrorKind::NotFound)];
        let unix = Address::Unix("/nowhere".into());
        assert_eq!(first(&[refused.clone(), unix, b], LONG), (Some(2), failures));
        assert_eq!(first(&[], LONG), (None, vec![]));
        let failures = vec![(0, ErrorKind::ConnectionRefused); 1];
        assert_eq!(first(&[refused], LONG), (None, failures));
    }

    #[test]
    fn each_silent_address_has_its_own_timeout() {
        let (silent, _kept) = black_hole();
        let (other, _also_kept) = black_hole();
        let timed_out = |number| (number, ErrorKind::TimedOut);
        let ended = first(&[silent, other], SILENCE_MAX + SHORT);
        assert_eq!(ended, (None, vec![timed_out(0), timed_out(1)]));
    }

    #[test]
    fn a_local_address_of_another_family_is_refused() {
        let v4 = "127.0.0.1".parse().unwrap();
        let v6 = "::1".parse().unwrap();
        let unix = Address::Unix("/nowhere".into());
        for (to, from) in [(tcp("[::1]:1"), v4), (tcp("127.0.0.1:1"), v6), (unix, v4)] {
            let error = connect(&to, Some(from), LONG).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
        }
        let mapped = "::ffff:127.0.0.1".parse().unwrap();
        let local = local_for(mapped, "127.0.0.1:1".parse().unwrap()).unwrap();
        assert_eq!(local.to_string(), "127.0.0.1:0");
    }

    #[test]
    fn a_local_address_of_another_host_is_refused() {
        let from = Some("192.0.2.1".parse().unwrap());
        let error = connect(&tcp("127.0.0.1:1"), from, LONG).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::AddrNotAvailable);
        assert!(error.to_string().contains("from 192.0.2.1: no interface"), "{error}");
    }

    #[test]
    fn a_timeout_of_zero_is_not_infinite() {
        assert_eq!(time_value(Duration::ZERO).num_microseconds(), 1);
        assert_eq!(time_value(Duration::from_secs(2)).num_microseconds(), 2_000_000);
    }

    #[test]
    fn connecting_works_over_ipv6() {
        let listener = Listener::bind(&tcp("[::1]:0")).unwrap();
        let stream = connect(&listener.local_address().unwrap(), None, LONG).unwrap();
        assert!(matches!(stream, Stream::Tcp(_)));
    }
}
