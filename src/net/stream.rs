//! A TCP or unix connection that blocks only in methods with a time limit.
//! Never interprets the bytes, and has no buffer, except that of TLS.

use super::tls::{HandshakeWait, TlsChannel, TlsFailure, TlsRole};
use super::transfer::{receive_now, send_now, send_pieces_now, uninterrupted};
use super::user::visible_user;
use super::wait::{happened, poll_until};
use super::{Peer, Wake};
use nix::fcntl::{FcntlArg, FdFlag, SpliceFFlags, fcntl, splice};
use nix::libc;
use nix::poll::{PollFd, PollFlags};
use nix::sys::socket::{AddressFamily, MsgFlags, SockaddrLike, SockaddrStorage, sockopt};
use nix::sys::socket::{getsockname, getsockopt, recv, setsockopt};
use std::io::{self, IoSlice};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// Silence after which the kernel sends the first keepalive probe.
pub const KEEPALIVE_IDLE: Duration = Duration::from_secs(30);
/// Time between two keepalive probes.
pub const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
/// Unanswered keepalive probes after which the connection ends.
pub const KEEPALIVE_PROBES_MAX: u32 = 3;

/// How long sent data may stay unacknowledged, or the peer's window closed, before the kernel ends the
/// connection (`TCP_USER_TIMEOUT`, tcp(7)). Without it retransmission goes on for some 15 minutes, and
/// suspends the keepalive probes.
pub const PEER_TIMEOUT: Duration = Duration::from_secs(60);

/// The limit of [`Stream::limit_unsent`] in bytes.
const UNSENT_MAX: u32 = 64 << 10;

/// The option behind [`Stream::limit_unsent`] (`TCP_NOTSENT_LOWAT`, tcp(7)).
#[derive(Clone, Copy, Debug)]
struct UnsentMax;
nix::setsockopt_impl!(
    UnsentMax,
    libc::IPPROTO_TCP,
    libc::TCP_NOTSENT_LOWAT,
    u32,
    sockopt::SetStruct<'_, u32>
);

/// The option behind [`Stream::set_receive_low_water`] (`SO_RCVLOWAT`, socket(7)).
#[derive(Clone, Copy, Debug)]
struct ReadableFrom;
nix::setsockopt_impl!(
    ReadableFrom,
    libc::SOL_SOCKET,
    libc::SO_RCVLOWAT,
    i32,
    sockopt::SetStruct<'_, i32>
);

/// A connection. All methods take `&self`: one thread can read while another writes.
#[derive(Debug)]
pub enum Stream {
    /// Over TCP.
    Tcp(TcpStream),
    /// Over a unix socket.
    Unix(UnixStream),
    /// Encrypted, over one of the others.
    Tls(Box<SecureStream>),
}

/// A connection with TLS.
#[derive(Debug)]
pub struct SecureStream {
    /// The connection below.
    plain: Stream,
    channel: TlsChannel,
}

/// Events to wait for. With none, the connection is not polled, not even for its end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Interest {
    /// Bytes or the end of the stream can be read.
    pub readable: bool,
    /// The socket buffer has room, or the connection has ended.
    pub writable: bool,
}

/// The events that ended a wait; at least one is true.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ready {
    /// [`Stream::try_recv`] returns bytes, the end of the stream, or an error. A connection that hung
    /// up is readable whatever the interest.
    pub readable: bool,
    /// [`Stream::try_send`] sends bytes or returns an error; only if that was of interest.
    pub writable: bool,
    /// The [`Wake`] is set.
    pub woken: bool,
    /// The other descriptor is readable ([`Stream::wait_also`]).
    pub also: bool,
    /// The deadline has passed without an event.
    pub timed_out: bool,
}

impl Stream {
    /// A TCP connection that ends [`PEER_TIMEOUT`] after its peer has vanished. Accepted, opened and
    /// inherited connections are all created here.
    pub(super) fn over_tcp(stream: TcpStream) -> Self {
        // Fails only on a broken connection, which its next use reports.
        let _ = setsockopt(&stream, sockopt::TcpUserTimeout, &milliseconds(PEER_TIMEOUT));
        Self::Tcp(stream)
    }

    /// Uses an inherited connected stream socket.
    ///
    /// # Errors
    /// When it is not a TCP or unix socket.
    pub fn inherited(fd: OwnedFd) -> io::Result<Self> {
        fcntl(&fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
        match family(&fd)? {
            Some(AddressFamily::Inet | AddressFamily::Inet6) => {
                let plain = Self::over_tcp(TcpStream::from(fd));
                Ok(match TlsChannel::inherited(plain.as_fd()) {
                    Some(channel) => Self::Tls(Box::new(SecureStream { plain, channel })),
                    None => plain,
                })
            }
            Some(AddressFamily::Unix) => Ok(Self::Unix(UnixStream::from(fd))),
            _ => Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the descriptor is neither a TCP nor a unix socket",
            )),
        }
    }

    /// Begins TLS on a plain connection. All bytes received so far belong to the plain part. `wait` waits for
    /// the connection.
    ///
    /// # Errors
    /// The handshake, the connection or `wait` failed; the connection is closed.
    pub fn start_tls(
        self,
        role: &TlsRole,
        wait: &mut dyn FnMut(&Self, Interest) -> io::Result<()>,
    ) -> Result<Self, TlsFailure> {
        let mut wait = |event| {
            let readable = event == HandshakeWait::Input;
            wait(&self, Interest { readable, writable: !readable })
        };
        let channel = TlsChannel::open(self.as_fd(), role, &mut wait)?;
        Ok(Self::Tls(Box::new(SecureStream { plain: self, channel })))
    }

    /// Whether the connection is encrypted.
    #[must_use]
    pub fn is_tls(&self) -> bool {
        matches!(self, Self::Tls(_))
    }

    /// Whether another process can continue the connection from its descriptor: the state of an encrypted one may
    /// be in this process.
    #[must_use]
    pub fn is_transferable(&self) -> bool {
        !matches!(self, Self::Tls(secure) if !secure.channel.is_by_kernel())
    }

    /// Whether data can be sent by reference ([`Stream::try_send_from`]).
    #[must_use]
    pub fn sends_references(&self) -> bool {
        self.is_transferable()
    }

    /// Tells the peer of an encrypted connection that nothing follows. Otherwise it cannot distinguish the end from
    /// an attack; without TLS it need not. Does not wait for room.
    pub fn announce_end(&self) {
        if let Self::Tls(secure) = self {
            secure.channel.close(self.as_fd());
        }
    }

    /// Frees the buffers of an encrypted connection that are empty.
    pub fn shrink(&self) {
        if let Self::Tls(secure) = self {
            secure.channel.shrink();
        }
    }

    /// The peer.
    ///
    /// # Errors
    /// When a TCP connection has already ended.
    pub fn peer(&self) -> io::Result<Peer> {
        match self {
            Self::Tcp(stream) => Ok(stream.peer_addr()?.into()),
            Self::Unix(stream) => Ok(unix_peer(stream)),
            Self::Tls(secure) => secure.plain.peer(),
        }
    }

    /// Disables Nagle's algorithm and enables keepalive probes. Does nothing on a unix socket.
    ///
    /// # Errors
    /// None for a connected socket.
    pub fn tune(&self) -> io::Result<()> {
        let Self::Tcp(stream) = self.plain() else { return Ok(()) };
        stream.set_nodelay(true)?;
        setsockopt(stream, sockopt::KeepAlive, &true)?;
        setsockopt(stream, sockopt::TcpKeepIdle, &whole_seconds(KEEPALIVE_IDLE))?;
        setsockopt(stream, sockopt::TcpKeepInterval, &whole_seconds(KEEPALIVE_INTERVAL))?;
        setsockopt(stream, sockopt::TcpKeepCount, &KEEPALIVE_PROBES_MAX)?;
        Ok(())
    }

    /// Limits the bytes in the socket buffer that the kernel has not sent yet. The thread that receives
    /// the acknowledgements sends them; over loopback that is the receiver's, which is busy enough. Bytes
    /// in flight are not limited. Does nothing on a unix socket.
    ///
    /// # Errors
    /// None for a connected socket.
    pub fn limit_unsent(&self) -> io::Result<()> {
        let Self::Tcp(stream) = self.plain() else { return Ok(()) };
        setsockopt(stream, UnsentMax, &UNSENT_MAX)?;
        Ok(())
    }

    /// Makes the stream readable only with this many bytes, or at its end (`SO_RCVLOWAT`). False on a
    /// unix socket, where poll(2) ignores the option, and with TLS, whose records have other lengths.
    pub fn set_receive_low_water(&self, bytes: i32) -> bool {
        matches!(self, Self::Tcp(stream) if setsockopt(stream, ReadableFrom, &bytes).is_ok())
    }

    /// Duplicates the descriptor to the lowest free number, and closes the old one.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn with_lowest_descriptor(self) -> io::Result<Self> {
        Ok(match self {
            Self::Tcp(stream) => Self::Tcp(stream.try_clone()?),
            Self::Unix(stream) => Self::Unix(stream.try_clone()?),
            Self::Tls(secure) => {
                let SecureStream { plain, channel } = *secure;
                let plain = plain.with_lowest_descriptor()?;
                Self::Tls(Box::new(SecureStream { plain, channel }))
            }
        })
    }

    /// Copies the first bytes that have arrived, without receiving them.
    ///
    /// # Errors
    /// `WouldBlock` when nothing has arrived; otherwise the connection is broken.
    pub fn peek(&self, data: &mut [u8]) -> io::Result<usize> {
        let fd = self.as_fd().as_raw_fd();
        uninterrupted(|| recv(fd, data, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_PEEK))
    }

    /// Sets `O_NONBLOCK`, for system calls on the descriptor such as `sendfile(2)`. The methods here do
    /// not need it.
    ///
    /// # Errors
    /// None for a connected socket.
    pub fn set_nonblocking(&self) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => stream.set_nonblocking(true),
            Self::Unix(stream) => stream.set_nonblocking(true),
            Self::Tls(secure) => secure.plain.set_nonblocking(),
        }
    }

    /// Makes closing drop unsent data and reset the connection. Does nothing on a unix socket, where
    /// sent data is already in the peer's buffer.
    ///
    /// # Errors
    /// None for a connected socket.
    pub fn reset_on_close(&self) -> io::Result<()> {
        let Self::Tcp(stream) = self.plain() else { return Ok(()) };
        setsockopt(stream, sockopt::Linger, &libc::linger { l_onoff: 1, l_linger: 0 })?;
        Ok(())
    }

    /// Ends the connection at once, although other threads may use it or wait for it, which closing would
    /// wait for: over TCP with a reset, which also drops what is not sent (connect(2) with `AF_UNSPEC`). Over a
    /// unix socket, sent data is already in the peer's buffer.
    ///
    /// # Errors
    /// When the connection has already ended.
    pub fn abort(&self) -> io::Result<()> {
        let Self::Tcp(stream) = self.plain() else { return self.shutdown_both() };
        let nowhere = libc::sockaddr { sa_family: libc::AF_UNSPEC as u16, sa_data: [0; 14] };
        let length = size_of_val(&nowhere) as libc::socklen_t;
        // SAFETY: the kernel reads `length` bytes of the address, which outlives the call.
        let result = unsafe { libc::connect(stream.as_raw_fd(), &raw const nowhere, length) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// Receives at most `into.len()` bytes that have arrived; 0 is the end of the stream (or an empty
    /// `into`).
    ///
    /// # Errors
    /// `WouldBlock` when nothing has arrived; otherwise the connection is broken.
    pub fn try_recv(&self, into: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tls(secure) => secure.channel.try_recv(self.as_fd(), into),
            Self::Tcp(_) | Self::Unix(_) => receive_now(self.as_fd(), into),
        }
    }

    /// Sends as much of `data` as the socket buffer takes. `more` tells the kernel that the rest of the
    /// message follows at once, so that it need not send a small packet (`MSG_MORE`). After `WouldBlock` the next
    /// call has to begin with the same bytes: with TLS a part of them may be encrypted and sent already.
    ///
    /// # Errors
    /// `WouldBlock` when there is no room; otherwise the connection is broken.
    pub fn try_send(&self, data: &[u8], more: bool) -> io::Result<usize> {
        match self {
            Self::Tls(secure) => secure.channel.try_send(self.as_fd(), &[IoSlice::new(data)], more),
            Self::Tcp(_) | Self::Unix(_) => send_now(self.as_fd(), data, more),
        }
    }

    /// Sends as much of the next `length` bytes of a pipe as the socket buffer takes, without a copy.
    /// Only after [`Stream::set_nonblocking`].
    ///
    /// # Errors
    /// `WouldBlock` when there is no room; `Unsupported` unless [`Stream::sends_references`]; otherwise the
    /// connection is broken.
    pub fn try_send_from(&self, pipe: BorrowedFd<'_>, length: usize) -> io::Result<usize> {
        if !self.sends_references() {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let flags = SpliceFFlags::SPLICE_F_NONBLOCK;
        uninterrupted(|| splice(pipe, None, self.as_fd(), None, length, flags))
    }

    /// [`Stream::try_send`] of several pieces in sequence, at most 1024 of them.
    ///
    /// # Errors
    /// As [`Stream::try_send`].
    pub fn try_send_vectored(&self, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        match self {
            Self::Tls(secure) => secure.channel.try_send(self.as_fd(), pieces, false),
            Self::Tcp(_) | Self::Unix(_) => send_pieces_now(self.as_fd(), pieces),
        }
    }

    /// Waits for an event of interest, for `wake`, or until `deadline` (none: for ever). A deadline in
    /// the past polls without waiting.
    ///
    /// # Errors
    /// When `poll(2)` fails for lack of memory.
    pub fn wait(
        &self,
        interest: Interest,
        wake: Option<&Wake>,
        deadline: Option<Instant>,
    ) -> io::Result<Ready> {
        self.wait_also(interest, wake, None, deadline)
    }

    /// Waits as [`Stream::wait`] does, and until `also` is readable.
    ///
    /// # Errors
    /// When `poll(2)` fails for lack of memory.
    pub fn wait_also(
        &self,
        interest: Interest,
        wake: Option<&Wake>,
        also: Option<BorrowedFd<'_>>,
        deadline: Option<Instant>,
    ) -> io::Result<Ready> {
        if interest.readable && self.has_received() {
            // Without a wait, but with the other events.
            let ready = self.poll_for(interest, wake, also, Some(Instant::now()))?;
            return Ok(Ready { readable: true, timed_out: false, ..ready });
        }
        self.poll_for(interest, wake, also, deadline)
    }

    fn poll_for(
        &self,
        interest: Interest,
        wake: Option<&Wake>,
        also: Option<BorrowedFd<'_>>,
        deadline: Option<Instant>,
    ) -> io::Result<Ready> {
        let mut events = PollFlags::empty();
        events.set(PollFlags::POLLIN, interest.readable);
        events.set(PollFlags::POLLOUT, interest.writable);
        let own = (!events.is_empty()).then(|| PollFd::new(self.as_fd(), events));
        poll_all(own, interest, [wake.map(Wake::as_fd), also], deadline)
    }

    /// Waits until the connection has ended in both directions (it is readable then), for `wake`, until `also`
    /// is readable, or until `deadline`. The end of only the peer's side is no event.
    ///
    /// # Errors
    /// When `poll(2)` fails for lack of memory.
    pub fn wait_for_hang_up(
        &self,
        wake: &Wake,
        also: Option<BorrowedFd<'_>>,
        deadline: Option<Instant>,
    ) -> io::Result<Ready> {
        let own = Some(PollFd::new(self.as_fd(), PollFlags::empty()));
        poll_all(own, Interest::default(), [Some(wake.as_fd()), also], deadline)
    }

    /// Whether the peer sends nothing after the bytes that have arrived: it has ended its side, or the
    /// connection has ended. Does not wait.
    ///
    /// # Errors
    /// When `poll(2)` fails for lack of memory.
    pub fn has_peer_ended(&self) -> io::Result<bool> {
        let ended = PollFlags::from_bits_retain(libc::POLLRDHUP);
        let mut fds = [PollFd::new(self.as_fd(), ended)];
        poll_until(&mut fds, Some(Instant::now()))?;
        Ok(!happened(&fds[0]).is_empty())
    }

    /// Fills `into`. Each wait for further bytes may take up to `progress_within`.
    ///
    /// # Errors
    /// `UnexpectedEof` when the peer ends the stream before, `TimedOut` without progress in time, or
    /// the error of the connection. How much of `into` was filled is unknown then.
    pub fn recv_exact(&self, into: &mut [u8], progress_within: Duration) -> io::Result<()> {
        let mut filled = 0;
        while filled < into.len() {
            match self.try_recv(&mut into[filled..]) {
                Ok(0) => return Err(ended()),
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let interest = Interest { readable: true, writable: false };
                    self.progress(interest, progress_within, "receiving")?;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Sends all of `data`. Each wait for room may take up to `progress_within`.
    ///
    /// # Errors
    /// `TimedOut` without progress in time, or the error of the connection. How much was sent is
    /// unknown then.
    pub fn send_all(&self, data: &[u8], progress_within: Duration) -> io::Result<()> {
        let mut rest = data;
        while !rest.is_empty() {
            match self.try_send(rest, false) {
                Ok(count) => rest = &rest[count..],
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let interest = Interest { readable: false, writable: true };
                    self.progress(interest, progress_within, "sending")?;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Ends both directions, and wakes the threads and the peer that wait for the stream.
    ///
    /// # Errors
    /// `NotConnected` when the connection has already ended.
    pub fn shutdown_both(&self) -> io::Result<()> {
        self.shutdown(Shutdown::Both)
    }

    /// Ends our direction; bytes of the peer can still be received.
    ///
    /// # Errors
    /// `NotConnected` when the connection has already ended.
    pub fn shutdown_write(&self) -> io::Result<()> {
        self.announce_end();
        self.shutdown(Shutdown::Write)
    }

    /// The connection below TLS.
    fn plain(&self) -> &Self {
        match self {
            Self::Tls(secure) => &secure.plain,
            Self::Tcp(_) | Self::Unix(_) => self,
        }
    }

    /// Whether bytes can be received although the socket may not be readable.
    fn has_received(&self) -> bool {
        matches!(self, Self::Tls(secure) if secure.channel.has_received())
    }

    fn shutdown(&self, how: Shutdown) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => stream.shutdown(how),
            Self::Unix(stream) => stream.shutdown(how),
            Self::Tls(secure) => secure.plain.shutdown(how),
        }
    }

    fn progress(&self, interest: Interest, within: Duration, what: &str) -> io::Result<()> {
        let deadline = Instant::now().checked_add(within);
        if self.wait(interest, None, deadline)?.timed_out {
            let text = format!("no progress in {what} for {} s", within.as_secs_f32());
            return Err(io::Error::new(io::ErrorKind::TimedOut, text));
        }
        Ok(())
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(stream) => stream.as_fd(),
            Self::Unix(stream) => stream.as_fd(),
            Self::Tls(secure) => secure.plain.as_fd(),
        }
    }
}

/// The address family of a socket; none if nix does not know it.
pub(super) fn family(fd: &impl AsFd) -> io::Result<Option<AddressFamily>> {
    Ok(getsockname::<SockaddrStorage>(fd.as_fd().as_raw_fd())?.family())
}

/// The process that connected, from the kernel.
pub(super) fn unix_peer(stream: &UnixStream) -> Peer {
    match getsockopt(stream, sockopt::PeerCredentials) {
        Ok(credentials) => {
            let pid = Some(credentials.pid()).filter(|pid| *pid > 0);
            Peer::Unix { pid, uid: visible_user(credentials.uid()) }
        }
        Err(_) => Peer::Unix { pid: None, uid: None },
    }
}

/// Polls a connection, unless it is of no interest, and two other descriptors for readability.
fn poll_all(
    own: Option<PollFd<'_>>,
    interest: Interest,
    others: [Option<BorrowedFd<'_>>; 2],
    deadline: Option<Instant>,
) -> io::Result<Ready> {
    let [wake, also] = others.map(|fd| fd.map(|fd| PollFd::new(fd, PollFlags::POLLIN)));
    let are_polled = [own.is_some(), wake.is_some(), also.is_some()];
    let mut fds = Vec::with_capacity(3);
    fds.extend([own, wake, also].into_iter().flatten());
    let timed_out = !poll_until(&mut fds, deadline)?;
    let mut polled = fds.iter();
    let [stream, wake, also] = are_polled.map(|is_polled| {
        let fd = if is_polled { polled.next() } else { None };
        fd.map_or(PollFlags::empty(), happened)
    });
    let (woken, also) = (!wake.is_empty(), !also.is_empty());
    Ok(Ready { woken, also, timed_out, ..ready(interest, stream) })
}

/// Converts the `poll(2)` flags of a stream. Errors and hang-ups make it readable and writable.
fn ready(interest: Interest, flags: PollFlags) -> Ready {
    let has_ended = flags.intersects(PollFlags::POLLHUP | PollFlags::POLLERR | PollFlags::POLLNVAL);
    Ready {
        readable: has_ended || flags.contains(PollFlags::POLLIN),
        writable: interest.writable && (has_ended || flags.contains(PollFlags::POLLOUT)),
        ..Ready::default()
    }
}

fn ended() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "the peer closed the connection")
}

/// For `TCP_USER_TIMEOUT`, which takes milliseconds in 32 bits.
fn milliseconds(duration: Duration) -> u32 {
    u32::try_from(duration.as_millis()).unwrap_or(u32::MAX)
}

/// For the keepalive options, which take seconds in 32 bits.
fn whole_seconds(duration: Duration) -> u32 {
    u32::try_from(duration.as_secs()).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests;
#[cfg(test)]
mod tls_tests;
