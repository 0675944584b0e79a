//! One case of the adversary: what it sends over one connection, and what the server has to do.

use harness::raw::encode_option;
use harness::{Endpoint, TIMEOUT};
use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{MsgFlags, Shutdown, recv, send, setsockopt, shutdown, sockopt};
use nix::sys::time::TimeVal;
use std::net::TcpStream;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream;

/// An option that no server knows: the answer to it shows that the server is in step.
pub(crate) const PROBE_OPTION: u32 = 0x7e57_0001;
/// The cookie of a request whose reply shows the same.
pub(crate) const PROBE_COOKIE: u64 = 0x7e57_ab1e_0ddb_a11e;

/// One step of a case.
#[derive(Clone, Debug)]
pub(crate) enum Step {
    /// Sends bytes, as far as the server takes them.
    Send(Vec<u8>),
    /// Sends bytes one by one.
    Drip(Vec<u8>),
    /// Sends the bytes so many times, until the server takes no more. Receives nothing.
    Flood(Vec<u8>, usize),
    /// Sends a byte of urgent data.
    Urgent,
    /// Receives so many bytes, or fewer if the server closes.
    Await(usize),
    /// Closes the direction to the server.
    HalfClose,
}

/// The end of a case.
#[derive(Clone, Debug)]
pub(crate) enum Fate {
    /// The server closes the connection.
    Closed,
    /// The server answers these last bytes with some that contain the others.
    Answers(Vec<u8>, Vec<u8>),
    /// The adversary closes the connection.
    Leaves,
    /// The adversary breaks the connection.
    Resets,
}

/// One case.
#[derive(Clone, Debug)]
pub(crate) struct Case {
    pub(crate) name: String,
    pub(crate) steps: Vec<Step>,
    pub(crate) fate: Fate,
    /// It takes long, and is not repeated.
    pub(crate) is_heavy: bool,
}

impl Case {
    pub(crate) fn new(name: impl Into<String>, steps: Vec<Step>, fate: Fate) -> Case {
        Case { name: name.into(), steps, fate, is_heavy: false }
    }

    pub(crate) fn heavy(self) -> Case {
        Case { is_heavy: true, ..self }
    }

    /// Executes the steps, and leaves the end to the caller. `None` if the server accepts no connection.
    pub(crate) fn begin(&self, to: &Endpoint) -> Option<Link> {
        let mut link = Link::connect(to)?;
        for step in &self.steps {
            match step {
                Step::Send(bytes) => link.send(bytes),
                Step::Drip(bytes) => bytes.iter().for_each(|byte| link.send(&[*byte])),
                Step::Flood(bytes, times) => link.flood(bytes, *times),
                Step::Urgent => link.send_urgent(),
                Step::Await(count) => {
                    link.receive_until(|received| received.len() >= *count);
                }
                Step::HalfClose => {
                    let _ = shutdown(link.0.as_raw_fd(), Shutdown::Write);
                }
            }
        }
        Some(link)
    }

    /// Executes the case; the error says what the server did instead. `None` if it accepts no connection.
    pub(crate) fn run(&self, to: &Endpoint) -> Option<Result<(), String>> {
        let mut link = self.begin(to)?;
        Some(match &self.fate {
            Fate::Closed => match link.receive_until(|_| false) {
                Received::End => Ok(()),
                other => Err(format!("{}: not closed, but {other:?}", self.name)),
            },
            Fate::Answers(last, answer) => {
                link.send(last);
                let has_answer =
                    |bytes: &[u8]| bytes.windows(answer.len()).any(|part| part == answer);
                match link.receive_until(has_answer) {
                    Received::Found => Ok(()),
                    other => Err(format!("{}: no answer, but {other:?}", self.name)),
                }
            }
            Fate::Leaves => Ok(()),
            Fate::Resets => {
                let no_linger = libc::linger { l_onoff: 1, l_linger: 0 };
                // A unix socket has no such option.
                let _ = setsockopt(&link.0, sockopt::Linger, &no_linger);
                Ok(())
            }
        })
    }
}

/// The server answers options that follow.
pub(crate) fn answers_options() -> Fate {
    Fate::Answers(encode_option(PROBE_OPTION, b""), PROBE_OPTION.to_be_bytes().to_vec())
}

/// What arrived.
#[derive(Debug, PartialEq, Eq)]
enum Received {
    Found,
    End,
    Nothing,
}

/// A connection of the adversary.
pub(crate) struct Link(OwnedFd);

impl Link {
    fn connect(to: &Endpoint) -> Option<Link> {
        let descriptor: OwnedFd = match to {
            Endpoint::Tcp(address) => TcpStream::connect_timeout(address, TIMEOUT).ok()?.into(),
            Endpoint::Unix(path) => UnixStream::connect(path).ok()?.into(),
        };
        let timeout = TimeVal::new(TIMEOUT.as_secs() as i64, 0);
        setsockopt(&descriptor, sockopt::ReceiveTimeout, &timeout).unwrap();
        setsockopt(&descriptor, sockopt::SendTimeout, &timeout).unwrap();
        Some(Link(descriptor))
    }

    fn send(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            match send(self.0.as_raw_fd(), bytes, MsgFlags::MSG_NOSIGNAL) {
                Ok(count) => bytes = &bytes[count..],
                Err(Errno::EINTR) => {}
                Err(_) => return,
            }
        }
    }

    fn flood(&mut self, bytes: &[u8], times: usize) {
        let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
        for _ in 0..times {
            match send(self.0.as_raw_fd(), bytes, flags) {
                Ok(count) if count == bytes.len() => {}
                _ => return,
            }
        }
    }

    fn send_urgent(&mut self) {
        let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_OOB;
        let _ = send(self.0.as_raw_fd(), b"!", flags);
    }

    fn receive_until(&mut self, is_found: impl Fn(&[u8]) -> bool) -> Received {
        let (mut all, mut part) = (Vec::new(), vec![0; 1 << 16]);
        loop {
            match recv(self.0.as_raw_fd(), &mut part, MsgFlags::empty()) {
                Ok(0) | Err(Errno::ECONNRESET | Errno::EPIPE) => return Received::End,
                Ok(count) => all.extend_from_slice(&part[..count]),
                Err(Errno::EINTR) => {}
                Err(_) => return Received::Nothing,
            }
            if is_found(&all) {
                return Received::Found;
            }
            // An answer may be divided, but not this much.
            if all.len() > 1 << 20 {
                all.drain(..all.len() - 4096);
            }
        }
    }
}
