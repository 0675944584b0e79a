//! One connection, TCP or unix, that never blocks except where it is told how long.
//! Knows nothing of what the bytes mean and keeps none of them back.

use super::wait::{happened, poll_until};
use super::{Peer, Wake};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
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

/// As many slices as the kernel takes in one call (`UIO_MAXIOV`).
const SLICES_MAX: usize = 1024;

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
    /// Adopts a connected stream socket that came from elsewhere.
    ///
    /// # Errors
    /// When it is not a TCP or unix socket.
    pub fn inherited(fd: OwnedFd) -> io::Result<Self> {
        fcntl(&fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
        match family(&fd)? {
            Some(AddressFamily::Inet | AddressFamily::Inet6) => Ok(Self::Tcp(TcpStream::from(fd))),
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
        Ok(who) => Peer::Unix { pid: Some(who.pid()).filter(|pid| *pid > 0), uid: Some(who.uid()) },
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

/// The keepalive options take seconds in 32 bits, far more than the constants above.
fn whole_seconds(duration: Duration) -> u32 {
    u32::try_from(duration.as_secs()).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{ErrorKind, Read, Write};
    use std::net::TcpListener;
    use std::thread;

    const LONG: Duration = Duration::from_secs(20);
    const SHORT: Duration = Duration::from_millis(20);
    const READ: Interest = Interest { readable: true, writable: false };
    const WRITE: Interest = Interest { readable: false, writable: true };
    const NEITHER: Interest = Interest { readable: false, writable: false };

    /// A connection of each kind: ours, and the other end as std has it.
    trait Far: Read + Write + Send {}
    impl<T: Read + Write + Send> Far for T {}

    fn both_kinds() -> [(Stream, Box<dyn Far>); 2] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let far = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (near, _) = listener.accept().unwrap();
        let (unix_near, unix_far) = UnixStream::pair().unwrap();
        [(Stream::Tcp(near), Box::new(far)), (Stream::Unix(unix_near), Box::new(unix_far))]
    }

    fn soon() -> Option<Instant> {
        Some(Instant::now() + SHORT)
    }

    fn later() -> Option<Instant> {
        Some(Instant::now() + LONG)
    }

    fn fill(stream: &Stream) {
        loop {
            match stream.try_send(&[7; 65536], false) {
                Ok(_) => {}
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::WouldBlock);
                    // Loopback TCP may still be moving bytes over; full is full for a while.
                    if stream.wait(WRITE, None, soon()).unwrap().timed_out {
                        return;
                    }
                }
            }
        }
    }

    #[test]
    fn reading_from_a_silent_peer_would_block_even_on_a_blocking_descriptor() {
        for (near, _far) in both_kinds() {
            assert_eq!(near.try_recv(&mut [0; 8]).unwrap_err().kind(), ErrorKind::WouldBlock);
        }
    }

    #[test]
    fn reading_gives_what_there_is_and_then_the_end() {
        for (near, mut far) in both_kinds() {
            far.write_all(b"abc").unwrap();
            assert!(near.wait(READ, None, later()).unwrap().readable);
            let mut into = [0; 8];
            assert_eq!(near.try_recv(&mut into).unwrap(), 3);
            assert_eq!(&into[..3], b"abc");
            drop(far);
            assert!(near.wait(READ, None, later()).unwrap().readable);
            assert_eq!(near.try_recv(&mut into).unwrap(), 0);
        }
    }

    #[test]
    fn what_is_sent_in_pieces_arrives_in_order() {
        for (near, mut far) in both_kinds() {
            assert_eq!(near.try_send(b"he", true).unwrap(), 2);
            let pieces = [IoSlice::new(b"l"), IoSlice::new(b""), IoSlice::new(b"lo")];
            assert_eq!(near.try_send_vectored(&pieces).unwrap(), 3);
            let mut into = [0; 5];
            far.read_exact(&mut into).unwrap();
            assert_eq!(&into, b"hello");
        }
    }

    #[test]
    fn more_pieces_than_the_kernel_takes_are_sent_in_part() {
        for (near, _far) in both_kinds() {
            let pieces = vec![IoSlice::new(b"x"); SLICES_MAX + 1];
            assert_eq!(near.try_send_vectored(&pieces[..SLICES_MAX]).unwrap(), SLICES_MAX);
            assert_eq!(near.try_send_vectored(&pieces).unwrap(), SLICES_MAX);
        }
    }

    #[test]
    fn a_peer_that_takes_nothing_makes_sending_block_and_time_out() {
        for (near, _far) in both_kinds() {
            fill(&near);
            assert_eq!(near.try_send(b"x", false).unwrap_err().kind(), ErrorKind::WouldBlock);
            let pieces = [IoSlice::new(b"x")];
            assert_eq!(near.try_send_vectored(&pieces).unwrap_err().kind(), ErrorKind::WouldBlock);
            assert_eq!(near.send_all(b"x", SHORT).unwrap_err().kind(), ErrorKind::TimedOut);
        }
    }

    #[test]
    fn sending_to_a_peer_that_has_gone_is_an_error() {
        for (near, far) in both_kinds() {
            drop(far);
            let error = loop {
                match near.try_send(b"x", false) {
                    Ok(_) => thread::yield_now(),
                    Err(error) => break error.kind(),
                }
            };
            assert!(matches!(error, ErrorKind::BrokenPipe | ErrorKind::ConnectionReset));
        }
    }

    #[test]
    fn sending_never_waits_never_signals_and_says_when_more_follows() {
        for (more, expected) in [(false, 0), (true, libc::MSG_MORE)] {
            let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL | expected;
            assert_eq!(send_flags(more).bits(), flags);
        }
    }

    #[test]
    fn waiting_ends_at_the_deadline() {
        for (near, _far) in both_kinds() {
            let expected = Ready { timed_out: true, ..Ready::default() };
            assert_eq!(near.wait(READ, None, soon()).unwrap(), expected);
            assert_eq!(near.wait(READ, None, Some(Instant::now())).unwrap(), expected);
        }
    }

    #[test]
    fn waiting_ends_when_woken_before_or_meanwhile() {
        for (near, _far) in both_kinds() {
            let wake = Wake::new().unwrap();
            let expected = Ready { woken: true, ..Ready::default() };
            thread::scope(|scope| {
                scope.spawn(|| wake.wake());
                assert_eq!(near.wait(READ, Some(&wake), later()).unwrap(), expected);
            });
            assert_eq!(near.wait(NEITHER, Some(&wake), later()).unwrap(), expected);
            wake.clear();
            assert!(near.wait(READ, Some(&wake), soon()).unwrap().timed_out);
        }
    }

    #[test]
    fn an_idle_stream_is_writable_and_not_readable() {
        for (near, _far) in both_kinds() {
            let both = Interest { readable: true, writable: true };
            let expected = Ready { writable: true, ..Ready::default() };
            assert_eq!(near.wait(both, None, later()).unwrap(), expected);
        }
    }

    #[test]
    fn without_interest_the_stream_is_not_looked_at() {
        for (near, far) in both_kinds() {
            drop(far);
            assert!(near.wait(NEITHER, None, soon()).unwrap().timed_out);
        }
    }

    #[test]
    fn a_hang_up_counts_as_readable_and_wakes_who_waits_to_write() {
        let writing = ready(WRITE, PollFlags::POLLHUP);
        assert!(writing.readable && writing.writable);
        let reading = ready(READ, PollFlags::POLLHUP);
        assert!(reading.readable && !reading.writable);
        assert!(ready(READ, PollFlags::POLLERR).readable);
        let [_, (near, far)] = both_kinds();
        fill(&near);
        drop(far);
        assert!(near.wait(WRITE, None, later()).unwrap().writable);
    }

    #[test]
    fn receiving_goes_on_as_long_as_bytes_keep_coming() {
        for (near, mut far) in both_kinds() {
            thread::scope(|scope| {
                scope.spawn(move || {
                    for byte in b"a slow peer" {
                        far.write_all(&[*byte]).unwrap();
                        thread::yield_now();
                    }
                });
                let mut into = [0; 11];
                near.recv_exact(&mut into, LONG).unwrap();
                assert_eq!(&into, b"a slow peer");
                assert_eq!(
                    near.recv_exact(&mut into, LONG).unwrap_err().kind(),
                    ErrorKind::UnexpectedEof
                );
            });
        }
    }

    #[test]
    fn receiving_gives_up_on_a_peer_that_falls_silent() {
        for (near, mut far) in both_kinds() {
            far.write_all(b"half").unwrap();
            let error = near.recv_exact(&mut [0; 8], SHORT).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::TimedOut);
            assert!(error.to_string().contains("receiving"), "{error}");
        }
    }

    #[test]
    fn more_than_fits_is_sent_while_the_peer_reads() {
        for (near, mut far) in both_kinds() {
            let sent: Vec<u8> = (0..8_000_000u32).map(|i| (i % 251) as u8).collect();
            thread::scope(|scope| {
                let reader = scope.spawn(move || {
                    let mut all = Vec::new();
                    far.read_to_end(&mut all).unwrap();
                    all
                });
                near.send_all(&sent, LONG).unwrap();
                near.shutdown_write().unwrap();
                assert!(reader.join().unwrap() == sent, "the bytes differ");
            });
        }
    }

    #[test]
    fn after_ending_the_writing_side_the_other_can_still_be_read() {
        for (near, mut far) in both_kinds() {
            near.shutdown_write().unwrap();
            assert_eq!(far.read(&mut [0; 1]).unwrap(), 0);
            far.write_all(b"bye").unwrap();
            near.recv_exact(&mut [0; 3], LONG).unwrap();
        }
    }

    #[test]
    fn ending_both_sides_wakes_who_waits_here() {
        for (near, _far) in both_kinds() {
            thread::scope(|scope| {
                let waiting = scope.spawn(|| near.wait(READ, None, later()).unwrap());
                near.shutdown_both().unwrap();
                assert!(waiting.join().unwrap().readable);
            });
            assert_eq!(near.try_recv(&mut [0; 1]).unwrap(), 0);
        }
    }

    #[test]
    fn a_tuned_connection_sends_at_once_and_asks_after_its_peer() {
        let [(near, _far), (unix, _unix_far)] = both_kinds();
        near.tune().unwrap();
        unix.tune().unwrap();
        let Stream::Tcp(stream) = &near else { panic!("the first kind is TCP") };
        assert!(stream.nodelay().unwrap());
        assert!(getsockopt(stream, sockopt::KeepAlive).unwrap());
        assert_eq!(getsockopt(stream, sockopt::TcpKeepIdle).unwrap(), 30);
        assert_eq!(getsockopt(stream, sockopt::TcpKeepInterval).unwrap(), 10);
        assert_eq!(getsockopt(stream, sockopt::TcpKeepCount).unwrap(), 3);
    }

    #[test]
    fn an_inherited_descriptor_becomes_the_stream_that_it_was() {
        let [(near, mut far), (unix, mut unix_far)] = both_kinds();
        let near = match near {
            Stream::Tcp(stream) => Stream::inherited(stream.into()).unwrap(),
            Stream::Unix(_) => panic!("the first kind is TCP"),
        };
        let unix = match unix {
            Stream::Unix(stream) => Stream::inherited(stream.into()).unwrap(),
            Stream::Tcp(_) => panic!("the second kind is unix"),
        };
        assert!(matches!(&near, Stream::Tcp(_)) && matches!(&unix, Stream::Unix(_)));
        far.write_all(b"x").unwrap();
        unix_far.write_all(b"x").unwrap();
        near.recv_exact(&mut [0; 1], LONG).unwrap();
        unix.recv_exact(&mut [0; 1], LONG).unwrap();
    }

    #[test]
    fn an_inherited_descriptor_closes_on_exec_and_must_be_a_socket() {
        let (near, _far) = UnixStream::pair().unwrap();
        fcntl(&near, FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
        let stream = Stream::inherited(near.into()).unwrap();
        let flags = FdFlag::from_bits_retain(fcntl(&stream, FcntlArg::F_GETFD).unwrap());
        assert!(flags.contains(FdFlag::FD_CLOEXEC));
        let file = std::fs::File::open("/dev/null").unwrap();
        assert!(Stream::inherited(file.into()).is_err());
    }

    #[test]
    fn each_stream_knows_its_peer() {
        let [(near, _far), (unix, _unix_far)] = both_kinds();
        assert!(near.peer().unwrap().to_string().starts_with("127.0.0.1:"));
        let me = Peer::Unix {
            pid: i32::try_from(std::process::id()).ok(),
            uid: Some(nix::unistd::getuid().as_raw()),
        };
        assert_eq!(unix.peer().unwrap(), me);
    }
}
