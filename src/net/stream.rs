//! One connection, TCP or unix, that never blocks except where it is told how long.
//! Knows nothing of what the bytes mean and keeps none of them back.

use super::user::visible_user;
use super::wait::{happened, poll_until};
use super::{Peer, Wake};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, SpliceFFlags, fcntl, splice};
use nix::libc;
use nix::poll::{PollFd, PollFlags};
use nix::sys::socket::{AddressFamily, MsgFlags, SockaddrLike, SockaddrStorage, sockopt};
use nix::sys::socket::{getsockname, getsockopt, recv, send, sendmsg, setsockopt};
use std::io::{self, IoSlice};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// How long a connection is silent before the kernel asks whether the peer is still there.
pub const KEEPALIVE_IDLE: Duration = Duration::from_secs(30);
/// How long between two such questions.
pub const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
/// How many of them may go unanswered.
pub const KEEPALIVE_PROBES_MAX: u32 = 3;

/// How long a TCP peer may leave what was sent to it unacknowledged, or take none of it, before the
/// kernel ends the connection (`TCP_USER_TIMEOUT`, tcp(7)). Retransmission alone goes on for some
/// 15 minutes, and suspends the keepalive probes.
pub const PEER_TIMEOUT: Duration = Duration::from_secs(60);

/// How much may wait in the kernel for its turn to be sent, in bytes, where little is wanted.
const UNSENT_MAX: u32 = 64 << 10;

/// As many slices as the kernel takes in one call (`UIO_MAXIOV`).
const SLICES_MAX: usize = 1024;

/// The option behind [`Stream::leave_little_unsent`] (`TCP_NOTSENT_LOWAT`, tcp(7)).
#[derive(Clone, Copy, Debug)]
struct UnsentMax;
nix::setsockopt_impl!(
    UnsentMax,
    libc::IPPROTO_TCP,
    libc::TCP_NOTSENT_LOWAT,
    u32,
    sockopt::SetStruct<'_, u32>
);

/// The option behind [`Stream::be_readable_from`] (`SO_RCVLOWAT`, socket(7)).
#[derive(Clone, Copy, Debug)]
struct ReadableFrom;
nix::setsockopt_impl!(
    ReadableFrom,
    libc::SOL_SOCKET,
    libc::SO_RCVLOWAT,
    i32,
    sockopt::SetStruct<'_, i32>
);

/// A connection. All methods take `&self`: one thread may read while another writes.
#[derive(Debug)]
pub enum Stream {
    /// Over TCP.
    Tcp(TcpStream),
    /// Over a unix socket.
    Unix(UnixStream),
}

/// What to wait for. With neither, the connection is not looked at: not even its end is seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Interest {
    /// There is something to read, or it is over.
    pub readable: bool,
    /// There is room to write, or it is over.
    pub writable: bool,
}

/// What the waiting ended with; several can be true at once, at least one is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ready {
    /// [`Stream::try_recv`] has something to say: bytes, the end, or an error. A connection that
    /// hung up counts as readable whatever the interest was.
    pub readable: bool,
    /// [`Stream::try_send`] has something to say; only when that was of interest.
    pub writable: bool,
    /// The [`Wake`] is set.
    pub woken: bool,
    /// Nothing of it happened before the deadline.
    pub timed_out: bool,
}

impl Stream {
    /// A TCP connection that ends [`PEER_TIMEOUT`] after its peer has vanished: every connection
    /// is made here, whether it was accepted, opened or inherited.
    pub(super) fn over_tcp(stream: TcpStream) -> Self {
        // A connection that takes no options is on its way out, which its user will see.
        let _ = setsockopt(&stream, sockopt::TcpUserTimeout, &milliseconds(PEER_TIMEOUT));
        Self::Tcp(stream)
    }

    /// Adopts a connected stream socket that came from elsewhere.
    ///
    /// # Errors
    /// When it is not a TCP or unix socket.
    pub fn inherited(fd: OwnedFd) -> io::Result<Self> {
        fcntl(&fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
        match family(&fd)? {
            Some(AddressFamily::Inet | AddressFamily::Inet6) => {
                Ok(Self::over_tcp(TcpStream::from(fd)))
            }
            Some(AddressFamily::Unix) => Ok(Self::Unix(UnixStream::from(fd))),
            _ => Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the descriptor is neither a TCP nor a unix socket",
            )),
        }
    }

    /// Who is at the other end.
    ///
    /// # Errors
    /// For TCP, when the connection is already gone.
    pub fn peer(&self) -> io::Result<Peer> {
        match self {
            Self::Tcp(stream) => Ok(stream.peer_addr()?.into()),
            Self::Unix(stream) => Ok(unix_peer(stream)),
        }
    }

    /// Sends small replies at once, and notices a peer that vanished without a word. Nothing to
    /// do on a unix socket.
    ///
    /// # Errors
    /// When the kernel refuses an option, which a connected socket does not see.
    pub fn tune(&self) -> io::Result<()> {
        let Self::Tcp(stream) = self else { return Ok(()) };
        stream.set_nodelay(true)?;
        setsockopt(stream, sockopt::KeepAlive, &true)?;
        setsockopt(stream, sockopt::TcpKeepIdle, &whole_seconds(KEEPALIVE_IDLE))?;
        setsockopt(stream, sockopt::TcpKeepInterval, &whole_seconds(KEEPALIVE_INTERVAL))?;
        setsockopt(stream, sockopt::TcpKeepCount, &KEEPALIVE_PROBES_MAX)?;
        Ok(())
    }

    /// Lets the kernel take only so much as can go out soon. What it takes beyond that is sent by
    /// whoever receives the acknowledgements; over loopback that is the receiver, which has enough
    /// to do. How much is on its way is not touched by this. Nothing to do on a unix socket.
    ///
    /// # Errors
    /// When the kernel refuses the option, which a connected socket does not see.
    pub fn leave_little_unsent(&self) -> io::Result<()> {
        let Self::Tcp(stream) = self else { return Ok(()) };
        setsockopt(stream, UnsentMax, &UNSENT_MAX)?;
        Ok(())
    }

    /// Lets it count as readable only from so many bytes on, or at its end (`SO_RCVLOWAT`). False on
    /// a unix socket, which knows no such limit when it is polled.
    pub fn be_readable_from(&self, bytes: i32) -> bool {
        matches!(self, Self::Tcp(stream) if setsockopt(stream, ReadableFrom, &bytes).is_ok())
    }

    /// The same connection under the lowest number that a descriptor can have now.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn at_lowest_number(self) -> io::Result<Self> {
        Ok(match self {
            Self::Tcp(stream) => Self::Tcp(stream.try_clone()?),
            Self::Unix(stream) => Self::Unix(stream.try_clone()?),
        })
    }

    /// The first bytes that have arrived, which stay there to be received.
    ///
    /// # Errors
    /// `WouldBlock` when nothing has arrived; otherwise the connection is broken.
    pub fn peek(&self, data: &mut [u8]) -> io::Result<usize> {
        let fd = self.as_fd().as_raw_fd();
        uninterrupted(|| recv(fd, data, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_PEEK))
    }

    /// Makes calls that others make on the descriptor itself, such as `sendfile(2)`, return rather
    /// than wait, too. The methods here never wait by themselves.
    ///
    /// # Errors
    /// When the kernel refuses it, which it does not for a connected socket.
    pub fn never_block(&self) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => stream.set_nonblocking(true),
            Self::Unix(stream) => stream.set_nonblocking(true),
        }
    }

    /// Makes closing it throw away what the peer has not received yet, and tell the peer so.
    /// Nothing to do on a unix socket, where what was sent has been received.
    ///
    /// # Errors
    /// When the kernel refuses it, which it does not for a connected socket.
    pub fn close_abruptly(&self) -> io::Result<()> {
        let Self::Tcp(stream) = self else { return Ok(()) };
        setsockopt(stream, sockopt::Linger, &libc::linger { l_onoff: 1, l_linger: 0 })?;
        Ok(())
    }

    /// Takes what has arrived, up to the length of `into`; 0 is the end of the stream (or an
    /// empty `into`).
    ///
    /// # Errors
    /// `WouldBlock` when nothing has arrived; otherwise the connection is broken.
    pub fn try_recv(&self, into: &mut [u8]) -> io::Result<usize> {
        let fd = self.as_fd().as_raw_fd();
        uninterrupted(|| recv(fd, into, MsgFlags::MSG_DONTWAIT))
    }

    /// Gives away as much of `data` as there is room for now. `more` tells the kernel that the
    /// rest of the message follows at once, so that it need not send a small packet.
    ///
    /// # Errors
    /// `WouldBlock` when there is no room; otherwise the connection is broken.
    pub fn try_send(&self, data: &[u8], more: bool) -> io::Result<usize> {
        let fd = self.as_fd().as_raw_fd();
        uninterrupted(|| send(fd, data, send_flags(more)))
    }

    /// Gives away as much of the next `length` bytes of a pipe as there is room for now, without a
    /// copy. Only after [`Stream::never_block`].
    ///
    /// # Errors
    /// `WouldBlock` when there is no room; otherwise the connection is broken.
    pub fn try_send_from(&self, pipe: BorrowedFd<'_>, length: usize) -> io::Result<usize> {
        let flags = SpliceFFlags::SPLICE_F_NONBLOCK;
        uninterrupted(|| splice(pipe, None, self.as_fd(), None, length, flags))
    }

    /// [`Stream::try_send`] of several pieces as if they were one. Pieces after the first 1024
    /// are left for the next call.
    ///
    /// # Errors
    /// As [`Stream::try_send`].
    pub fn try_send_vectored(&self, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        let fd = self.as_fd().as_raw_fd();
        let pieces = &pieces[..pieces.len().min(SLICES_MAX)];
        uninterrupted(|| sendmsg::<()>(fd, pieces, &[], send_flags(false), None))
    }

    /// Waits until something of interest happens, until `wake` is set, or until `deadline`;
    /// without a deadline for as long as it takes. A deadline in the past asks without waiting.
    ///
    /// # Errors
    /// When `poll(2)` fails for lack of memory.
    pub fn wait(
        &self,
        interest: Interest,
        wake: Option<&Wake>,
        deadline: Option<Instant>,
    ) -> io::Result<Ready> {
        let mut events = PollFlags::empty();
        events.set(PollFlags::POLLIN, interest.readable);
        events.set(PollFlags::POLLOUT, interest.writable);
        let looks = !events.is_empty();
        let mut fds = Vec::with_capacity(2);
        fds.extend(looks.then(|| PollFd::new(self.as_fd(), events)));
        fds.extend(wake.map(|wake| PollFd::new(wake.as_fd(), PollFlags::POLLIN)));
        let timed_out = !poll_until(&mut fds, deadline)?;
        let stream = if looks { happened(&fds[0]) } else { PollFlags::empty() };
        let woken = wake.is_some() && !happened(&fds[usize::from(looks)]).is_empty();
        Ok(Ready { woken, timed_out, ..ready(interest, stream) })
    }

    /// Waits until the connection is over in both directions (then it is readable), until `wake` is
    /// set, or until `deadline`. That the peer has ended only its own side is not seen.
    ///
    /// # Errors
    /// When `poll(2)` fails for lack of memory.
    pub fn wait_for_hang_up(&self, wake: &Wake, deadline: Option<Instant>) -> io::Result<Ready> {
        let mut fds = [
            PollFd::new(self.as_fd(), PollFlags::empty()),
            PollFd::new(wake.as_fd(), PollFlags::POLLIN),
        ];
        let timed_out = !poll_until(&mut fds, deadline)?;
        let woken = !happened(&fds[1]).is_empty();
        Ok(Ready { woken, timed_out, ..ready(Interest::default(), happened(&fds[0])) })
    }

    /// Whether the peer will send nothing after what has arrived: it has ended its side, or the
    /// connection is over. Does not wait.
    ///
    /// # Errors
    /// When `poll(2)` fails for lack of memory.
    pub fn has_peer_ended(&self) -> io::Result<bool> {
        let ended = PollFlags::from_bits_retain(libc::POLLRDHUP);
        let mut fds = [PollFd::new(self.as_fd(), ended)];
        poll_until(&mut fds, Some(Instant::now()))?;
        Ok(!happened(&fds[0]).is_empty())
    }

    /// Fills `into`, as long as bytes keep coming: each may take up to `progress_within`.
    ///
    /// # Errors
    /// `UnexpectedEof` when the peer ends the stream before, `TimedOut` when no byte came in time,
    /// or whatever broke the connection. How much of `into` was filled is then not known.
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

    /// Sends all of `data`, as long as the peer keeps taking it: each part may take up to
    /// `progress_within`.
    ///
    /// # Errors
    /// `TimedOut` when nothing was taken in time, or whatever broke the connection. How much was
    /// sent is then not known.
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

    /// Ends both directions; whoever waits on the stream, here or there, sees its end.
    ///
    /// # Errors
    /// When the peer has already gone (`NotConnected`).
    pub fn shutdown_both(&self) -> io::Result<()> {
        self.shutdown(Shutdown::Both)
    }

    /// Tells the peer that nothing more comes; what it sends can still be read.
    ///
    /// # Errors
    /// When the peer has already gone (`NotConnected`).
    pub fn shutdown_write(&self) -> io::Result<()> {
        self.shutdown(Shutdown::Write)
    }

    fn shutdown(&self, how: Shutdown) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => stream.shutdown(how),
            Self::Unix(stream) => stream.shutdown(how),
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
        }
    }
}

/// Which kind of socket a descriptor is; none if of a kind that nobody knows.
pub(super) fn family(fd: &impl AsFd) -> io::Result<Option<AddressFamily>> {
    Ok(getsockname::<SockaddrStorage>(fd.as_fd().as_raw_fd())?.family())
}

/// What the kernel tells about the process that connected.
pub(super) fn unix_peer(stream: &UnixStream) -> Peer {
    match getsockopt(stream, sockopt::PeerCredentials) {
        Ok(who) => {
            let pid = Some(who.pid()).filter(|pid| *pid > 0);
            Peer::Unix { pid, uid: visible_user(who.uid()) }
        }
        Err(_) => Peer::Unix { pid: None, uid: None },
    }
}

/// Pure: `poll(2)` flags of a stream in our words. An error or a full hang-up is seen by reading
/// and by writing alike.
fn ready(interest: Interest, flags: PollFlags) -> Ready {
    let over = flags.intersects(PollFlags::POLLHUP | PollFlags::POLLERR | PollFlags::POLLNVAL);
    Ready {
        readable: over || flags.contains(PollFlags::POLLIN),
        writable: interest.writable && (over || flags.contains(PollFlags::POLLOUT)),
        ..Ready::default()
    }
}

fn send_flags(more: bool) -> MsgFlags {
    let more = if more { MsgFlags::from_bits_retain(libc::MSG_MORE) } else { MsgFlags::empty() };
    MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL | more
}

/// Does it again when a signal came between.
fn uninterrupted<T>(mut call: impl FnMut() -> nix::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(Errno::EINTR) => {}
            outcome => return Ok(outcome?),
        }
    }
}

fn ended() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "the peer closed the connection")
}

/// `TCP_USER_TIMEOUT` takes milliseconds in 32 bits, far more than the constant above.
fn milliseconds(duration: Duration) -> u32 {
    u32::try_from(duration.as_millis()).unwrap_or(u32::MAX)
}

/// The keepalive options take seconds in 32 bits, far more than the constants above.
fn whole_seconds(duration: Duration) -> u32 {
    u32::try_from(duration.as_secs()).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests;
