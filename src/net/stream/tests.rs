//! Tests of `stream.rs` over TCP and unix sockets.

use super::*;
use crate::net::{Address, Listener, connect, wait_readable};
use std::io::{ErrorKind, Read, Write};
use std::net::TcpListener;
use std::thread;

const LONG: Duration = Duration::from_secs(20);
const SHORT: Duration = Duration::from_millis(20);
const READ: Interest = Interest { readable: true, writable: false };
const WRITE: Interest = Interest { readable: false, writable: true };
const NEITHER: Interest = Interest { readable: false, writable: false };

/// A connection of each kind, with the peer's end as a type of std.
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
                // Loopback TCP may still move bytes: full means full for a while.
                if stream.wait(WRITE, None, soon()).unwrap().timed_out {
                    return;
                }
            }
        }
    }
}

#[test]
fn receiving_never_waits_on_a_blocking_descriptor() {
    for (near, _far) in both_kinds() {
        assert_eq!(near.try_recv(&mut [0; 8]).unwrap_err().kind(), ErrorKind::WouldBlock);
    }
}

#[test]
fn receiving_returns_bytes_then_the_end() {
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
fn pieces_arrive_in_order() {
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
fn at_most_1024_pieces_are_sent_at_once() {
    for (near, _far) in both_kinds() {
        let pieces = vec![IoSlice::new(b"x"); 1024 + 1];
        assert_eq!(near.try_send_vectored(&pieces[..1024]).unwrap(), 1024);
        assert_eq!(near.try_send_vectored(&pieces).unwrap(), 1024);
    }
}

#[test]
fn sending_to_a_full_buffer_times_out() {
    for (near, _far) in both_kinds() {
        fill(&near);
        assert_eq!(near.try_send(b"x", false).unwrap_err().kind(), ErrorKind::WouldBlock);
        let pieces = [IoSlice::new(b"x")];
        assert_eq!(near.try_send_vectored(&pieces).unwrap_err().kind(), ErrorKind::WouldBlock);
        assert_eq!(near.send_all(b"x", SHORT).unwrap_err().kind(), ErrorKind::TimedOut);
    }
}

#[test]
fn sending_to_a_closed_peer_is_an_error() {
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
fn a_wait_ends_at_the_deadline() {
    for (near, _far) in both_kinds() {
        let expected = Ready { timed_out: true, ..Ready::default() };
        assert_eq!(near.wait(READ, None, soon()).unwrap(), expected);
        assert_eq!(near.wait(READ, None, Some(Instant::now())).unwrap(), expected);
    }
}

#[test]
fn a_wake_up_before_or_during_a_wait_ends_it() {
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
fn without_interest_the_stream_is_not_polled() {
    for (near, far) in both_kinds() {
        drop(far);
        assert!(near.wait(NEITHER, None, soon()).unwrap().timed_out);
    }
}

#[test]
fn a_half_closed_connection_is_not_hung_up() {
    let (wake, (near, far)) = (Wake::new().unwrap(), UnixStream::pair().unwrap());
    let near = Stream::Unix(near);
    assert!(!near.has_peer_ended().unwrap());
    far.shutdown(Shutdown::Write).unwrap();
    assert!(near.has_peer_ended().unwrap());
    let waited = near.wait_for_hang_up(&wake, None, Some(Instant::now())).unwrap();
    assert!(waited.timed_out && !waited.readable, "it may still read");
    drop(far);
    assert!(near.wait_for_hang_up(&wake, None, soon()).unwrap().readable);
}

#[test]
fn a_hang_up_is_readable_and_writable() {
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
fn the_time_limit_restarts_with_each_byte() {
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
fn receiving_from_a_silent_peer_times_out() {
    for (near, mut far) in both_kinds() {
        far.write_all(b"half").unwrap();
        let error = near.recv_exact(&mut [0; 8], SHORT).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut);
        assert!(error.to_string().contains("receiving"), "{error}");
    }
}

#[test]
fn more_than_the_buffer_is_sent_to_a_reading_peer() {
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
fn a_stream_is_readable_after_shutdown_of_writing() {
    for (near, mut far) in both_kinds() {
        near.shutdown_write().unwrap();
        assert_eq!(far.read(&mut [0; 1]).unwrap(), 0);
        far.write_all(b"bye").unwrap();
        near.recv_exact(&mut [0; 3], LONG).unwrap();
    }
}

#[test]
fn shutdown_wakes_a_waiting_thread() {
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
fn tuning_sets_no_delay_and_keepalive() {
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

/// The `TCP_USER_TIMEOUT` of the connection in milliseconds; 0 is the kernel's default.
fn user_timeout(stream: &Stream) -> u32 {
    let Stream::Tcp(stream) = stream else { panic!("the connection is TCP") };
    getsockopt(stream, sockopt::TcpUserTimeout).unwrap()
}

#[test]
fn every_tcp_connection_has_a_user_timeout() {
    let socket = TcpListener::bind("127.0.0.1:0").unwrap();
    let bound = Listener::bind(&Address::Tcp("127.0.0.1:0".parse().unwrap())).unwrap();
    for listener in [bound, Listener::inherited(socket.into()).unwrap()] {
        let near = connect(&listener.local_address().unwrap(), None, LONG).unwrap();
        assert_eq!(user_timeout(&near), 60_000, "opened");
        wait_readable(&[listener.as_fd()], later()).unwrap();
        assert_eq!(user_timeout(&listener.accept().unwrap().0), 60_000, "accepted");
    }
    let socket = TcpListener::bind("127.0.0.1:0").unwrap();
    let carried = TcpStream::connect(socket.local_addr().unwrap()).unwrap();
    assert_eq!(user_timeout(&Stream::inherited(carried.into()).unwrap()), 60_000, "carried over");
}

#[test]
fn the_kernel_takes_less_with_limited_unsent_bytes() {
    let [taken, taken_with_it] = [false, true].map(|wanted| {
        let [(near, _far), (unix, _unix_far)] = both_kinds();
        if wanted {
            near.limit_unsent().unwrap();
            unix.limit_unsent().unwrap();
        }
        let mut taken = 0;
        while let Ok(count) = near.try_send(&[7; 4096], false) {
            taken += count;
        }
        taken
    });
    assert!(taken_with_it + 4 * UNSENT_MAX as usize <= taken, "{taken_with_it} of {taken}");
}

#[test]
fn an_inherited_descriptor_keeps_its_kind() {
    let [(near, mut far), (unix, mut unix_far)] = both_kinds();
    let near = match near {
        Stream::Tcp(stream) => Stream::inherited(stream.into()).unwrap(),
        _ => panic!("the first kind is TCP"),
    };
    let unix = match unix {
        Stream::Unix(stream) => Stream::inherited(stream.into()).unwrap(),
        _ => panic!("the second kind is unix"),
    };
    assert!(matches!(&near, Stream::Tcp(_)) && matches!(&unix, Stream::Unix(_)));
    far.write_all(b"x").unwrap();
    unix_far.write_all(b"x").unwrap();
    near.recv_exact(&mut [0; 1], LONG).unwrap();
    unix.recv_exact(&mut [0; 1], LONG).unwrap();
}

#[test]
fn an_inherited_socket_becomes_close_on_exec() {
    let (near, _far) = UnixStream::pair().unwrap();
    fcntl(&near, FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
    let stream = Stream::inherited(near.into()).unwrap();
    let flags = FdFlag::from_bits_retain(fcntl(&stream, FcntlArg::F_GETFD).unwrap());
    assert!(flags.contains(FdFlag::FD_CLOEXEC));
    let file = std::fs::File::open("/dev/null").unwrap();
    assert!(Stream::inherited(file.into()).is_err());
}

#[test]
fn each_stream_has_its_peer() {
    let [(near, _far), (unix, _unix_far)] = both_kinds();
    assert!(near.peer().unwrap().to_string().starts_with("127.0.0.1:"));
    let me = Peer::Unix {
        pid: i32::try_from(std::process::id()).ok(),
        uid: Some(nix::unistd::getuid().as_raw()),
    };
    assert_eq!(unix.peer().unwrap(), me);
}
