//! The NBD protocol as bytes: a connection, option haggling, encoded requests.
//! Never uses the library under test, so that a misreading of the specification in the program cannot
//! hide in its tests.

pub use crate::proto::*;
use crate::{Endpoint, TIMEOUT, wait_until};
use nix::sys::socket::{setsockopt, sockopt};
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixStream;
use std::time::Duration;

enum Link {
    Tcp(TcpStream),
    Unix(UnixStream),
}

/// One connection to a server. Unless a function returns an error, a connection that fails or a
/// server that breaks the protocol fails the test.
pub struct Wire {
    link: Link,
}

impl Wire {
    /// Connects; reads and writes fail after [`TIMEOUT`].
    #[track_caller]
    pub fn connect(endpoint: &Endpoint) -> Wire {
        Wire::try_connect(endpoint)
            .unwrap_or_else(|e| panic!("cannot connect to {endpoint:?}: {e}"))
    }

    /// The same for a server that may refuse the connection.
    pub fn try_connect(endpoint: &Endpoint) -> io::Result<Wire> {
        Wire::try_connect_within(endpoint, TIMEOUT)
    }

    /// The same with another timeout for the TCP connection.
    pub(crate) fn try_connect_within(endpoint: &Endpoint, timeout: Duration) -> io::Result<Wire> {
        let link = match endpoint {
            Endpoint::Tcp(address) => Link::Tcp(TcpStream::connect_timeout(address, timeout)?),
            Endpoint::Unix(path) => Link::Unix(UnixStream::connect(path)?),
        };
        if let Link::Tcp(stream) = &link {
            stream.set_nodelay(true)?;
        }
        let wire = Wire { link };
        wire.set_read_timeout(TIMEOUT);
        wire.set_write_timeout(TIMEOUT);
        Ok(wire)
    }

    /// Sets how long a read waits before it fails.
    pub fn set_read_timeout(&self, timeout: Duration) {
        let timeout = Some(timeout);
        match &self.link {
            Link::Tcp(s) => s.set_read_timeout(timeout).unwrap(),
            Link::Unix(s) => s.set_read_timeout(timeout).unwrap(),
        }
    }

    fn set_write_timeout(&self, timeout: Duration) {
        let timeout = Some(timeout);
        match &self.link {
            Link::Tcp(s) => s.set_write_timeout(timeout).unwrap(),
            Link::Unix(s) => s.set_write_timeout(timeout).unwrap(),
        }
    }

    /// Waits until at least this many bytes have arrived (`FIONREAD`), and takes none of them.
    #[track_caller]
    pub fn wait_for_bytes(&self, count: usize) {
        let fd = match &self.link {
            Link::Tcp(s) => s.as_raw_fd(),
            Link::Unix(s) => s.as_raw_fd(),
        };
        wait_until("bytes of a reply", || {
            let mut arrived: nix::libc::c_int = 0;
            // SAFETY: FIONREAD writes one int, and is given the address of one.
            let asked = unsafe { nix::libc::ioctl(fd, nix::libc::FIONREAD, &raw mut arrived) };
            asked == 0 && arrived as usize >= count
        });
    }

    /// Address and port of this end of a TCP connection.
    pub fn local_address(&self) -> String {
        match &self.link {
            Link::Tcp(s) => s.local_addr().unwrap().to_string(),
            Link::Unix(_) => panic!("not TCP"),
        }
    }

    /// A second handle on the same connection, to send and receive at the same time.
    pub fn try_clone(&self) -> Wire {
        let link = match &self.link {
            Link::Tcp(s) => Link::Tcp(s.try_clone().unwrap()),
            Link::Unix(s) => Link::Unix(s.try_clone().unwrap()),
        };
        Wire { link }
    }

    /// Sends all of `bytes`, if the server takes them.
    pub fn try_send(&mut self, bytes: &[u8]) -> io::Result<()> {
        match &mut self.link {
            Link::Tcp(s) => s.write_all(bytes),
            Link::Unix(s) => s.write_all(bytes),
        }
    }

    /// One read into `buffer`: the count of bytes, zero at the end of the stream.
    pub fn try_recv(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match &mut self.link {
            Link::Tcp(s) => s.read(buffer),
            Link::Unix(s) => s.read(buffer),
        }
    }

    /// Sends all of `bytes`.
    #[track_caller]
    pub fn send(&mut self, bytes: &[u8]) {
        if let Err(e) = self.try_send(bytes) {
            panic!("the server does not take {} bytes: {e}", bytes.len());
        }
    }

    /// Receives exactly `length` bytes.
    #[track_caller]
    pub fn recv(&mut self, length: usize) -> Vec<u8> {
        let mut data = vec![0; length];
        let mut have = 0;
        while have < length {
            match self.try_recv(&mut data[have..]) {
                Ok(0) => panic!("the server closed after {have} of {length} bytes"),
                Ok(n) => have += n,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => panic!("received {have} of {length} bytes, then: {e}"),
            }
        }
        data
    }

    /// Receives a big-endian number of 16 bits.
    #[track_caller]
    pub fn recv_u16(&mut self) -> u16 {
        u16::from_be_bytes(self.recv(2).try_into().unwrap())
    }

    /// Receives a big-endian number of 32 bits.
    #[track_caller]
    pub fn recv_u32(&mut self) -> u32 {
        u32::from_be_bytes(self.recv(4).try_into().unwrap())
    }

    /// Receives a big-endian number of 64 bits.
    #[track_caller]
    pub fn recv_u64(&mut self) -> u64 {
        u64::from_be_bytes(self.recv(8).try_into().unwrap())
    }

    /// Everything until the server closes the connection; a reset counts as closing.
    #[track_caller]
    pub fn recv_to_end(&mut self) -> Vec<u8> {
        let (data, end) = self.recv_to_end_or_error();
        match end {
            Ok(()) => data,
            Err(e) if e.kind() == ErrorKind::ConnectionReset => data,
            Err(e) => panic!("received {} bytes, then: {e}", data.len()),
        }
    }

    /// Everything until the stream ends, and the error that ended it.
    pub fn recv_to_end_or_error(&mut self) -> (Vec<u8>, io::Result<()>) {
        let mut data = Vec::new();
        let mut buffer = vec![0; 1 << 16];
        loop {
            match self.try_recv(&mut buffer) {
                Ok(0) => return (data, Ok(())),
                Ok(n) => data.extend_from_slice(&buffer[..n]),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return (data, Err(e)),
            }
        }
    }

    /// Fails unless the server closes without sending anything more.
    #[track_caller]
    pub fn expect_closed(&mut self, why: &str) {
        let rest = self.recv_to_end();
        assert!(rest.is_empty(), "{why}: the server sent {rest:02x?} before it closed");
    }

    /// Closes this direction of the connection; the other can still be received from.
    pub fn shutdown_write(&self) {
        let _ = match &self.link {
            Link::Tcp(s) => s.shutdown(Shutdown::Write),
            Link::Unix(s) => s.shutdown(Shutdown::Write),
        };
    }

    /// Closes the connection as a crashed client does: with a reset, where the transport has one.
    pub fn reset(self) {
        if let Link::Tcp(s) = &self.link {
            let at_once = nix::libc::linger { l_onoff: 1, l_linger: 0 };
            setsockopt(s, sockopt::Linger, &at_once).unwrap();
        }
    }
}

/// One reply to an option.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct OptionReply {
    /// The reply type, such as [`REP_ACK`].
    pub kind: u32,
    /// What follows the reply header.
    pub data: Vec<u8>,
}

impl OptionReply {
    /// Whether it is the last reply to its option.
    pub fn is_final(&self) -> bool {
        self.kind == REP_ACK || self.kind & REP_IS_ERROR != 0
    }
}

/// Option haggling, from the greeting on.
impl Wire {
    /// Connects, receives the newstyle greeting and sends these client flags.
    #[track_caller]
    pub fn haggle(endpoint: &Endpoint, client_flags: u32) -> Wire {
        let mut wire = Wire::connect(endpoint);
        let flags = wire.recv_greeting();
        assert_eq!(flags & 1, 1, "the server offers no fixed newstyle");
        wire.send(&client_flags.to_be_bytes());
        wire
    }

    /// Connects and receives the newstyle greeting; tries again while a server at its limit of
    /// clients closes without one.
    #[track_caller]
    pub fn connect_with_retries(endpoint: &Endpoint) -> Wire {
        let mut greeted = None;
        wait_until("a greeting", || {
            let mut wire = Wire::connect(endpoint);
            let mut greeting = [0; GREETING_LENGTH];
            let came = matches!(wire.try_recv(&mut greeting), Ok(GREETING_LENGTH));
            greeted = came.then_some(wire);
            came
        });
        greeted.unwrap()
    }

    /// Receives the newstyle greeting; its handshake flags.
    #[track_caller]
    pub fn recv_greeting(&mut self) -> u16 {
        assert_eq!(self.recv_u64(), GREETING, "the greeting begins with NBDMAGIC");
        assert_eq!(self.recv_u64(), I_HAVE_OPT, "a newstyle greeting goes on with IHAVEOPT");
        self.recv_u16()
    }

    /// Sends an option with its data.
    #[track_caller]
    pub fn send_option(&mut self, option: u32, data: &[u8]) {
        self.send(&encode_option(option, data));
    }

    /// Receives one reply to this option, and checks its form.
    #[track_caller]
    fn recv_option_reply(&mut self, option: u32) -> OptionReply {
        assert_eq!(self.recv_u64(), OPTION_REPLY, "magic of a reply to option {option}");
        assert_eq!(self.recv_u32(), option, "a reply names the option it answers");
        let kind = self.recv_u32();
        let length = self.recv_u32() as usize;
        assert!(length <= 64 << 10, "a reply of {length} bytes to option {option}");
        let data = self.recv(length);
        let reply = OptionReply { kind, data };
        check_option_reply(&reply);
        reply
    }

    /// Sends an option and receives every reply to it: those before the final one, and its type.
    #[track_caller]
    pub fn ask(&mut self, option: u32, data: &[u8]) -> (Vec<OptionReply>, u32) {
        self.send_option(option, data);
        let mut replies = Vec::new();
        loop {
            let reply = self.recv_option_reply(option);
            if reply.is_final() {
                return (replies, reply.kind);
            }
            replies.push(reply);
        }
    }

    /// The same for an option of which only the type of the final reply matters.
    #[track_caller]
    pub fn ask_final(&mut self, option: u32, data: &[u8]) -> u32 {
        self.ask(option, data).1
    }

    /// Fails unless the server still parses options correctly: it must answer LIST.
    #[track_caller]
    pub fn assert_haggling_in_sync(&mut self) {
        assert_eq!(self.ask_final(OPT_LIST, &[]), REP_ACK, "LIST after the option before");
    }
}

#[track_caller]
fn check_option_reply(reply: &OptionReply) {
    match reply.kind {
        REP_ACK => assert!(reply.data.is_empty(), "an ACK carries nothing"),
        kind if kind & REP_IS_ERROR != 0 => {
            assert!(reply.data.len() <= STRING_MAX, "an error message is a string");
            assert!(std::str::from_utf8(&reply.data).is_ok(), "an error message is UTF-8");
        }
        REP_SERVER | REP_META_CONTEXT => assert!(reply.data.len() >= 4),
        REP_INFO => assert!(reply.data.len() >= 2),
        REP_PRIVATE => assert_eq!(reply.data.len(), 24, "the length of an answer"),
        kind => panic!("unknown option reply type {kind:#x}"),
    }
}

/// An option with its data.
pub fn encode_option(option: u32, data: &[u8]) -> Vec<u8> {
    encode_option_of_length(option, u32::try_from(data.len()).unwrap(), data)
}

/// An option whose header may give another length than that of its data.
pub fn encode_option_of_length(option: u32, length: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = I_HAVE_OPT.to_be_bytes().to_vec();
    bytes.extend(option.to_be_bytes());
    bytes.extend(length.to_be_bytes());
    bytes.extend(data);
    bytes
}

/// Everything that a client with structured replies and `base:allocation` sends before
/// transmission, in one piece.
pub fn typical_handshake() -> Vec<u8> {
    [
        (FIXED_NEWSTYLE | NO_ZEROES).to_be_bytes().to_vec(),
        encode_option(OPT_STRUCTURED_REPLY, &[]),
        encode_option(OPT_SET_META_CONTEXT, &encode_meta(b"", &[ALLOCATION.as_bytes()])),
        encode_option(OPT_GO, &encode_go(b"", &[INFO_BLOCK_SIZE])),
    ]
    .concat()
}

/// The data of INFO and GO.
pub fn encode_go(name: &[u8], infos: &[u16]) -> Vec<u8> {
    let mut data = encode_string(name);
    data.extend(u16::try_from(infos.len()).unwrap().to_be_bytes());
    data.extend(infos.iter().flat_map(|i| i.to_be_bytes()));
    data
}

/// The data of LIST_META_CONTEXT and SET_META_CONTEXT.
pub fn encode_meta(name: &[u8], queries: &[&[u8]]) -> Vec<u8> {
    let mut data = encode_string(name);
    data.extend(u32::try_from(queries.len()).unwrap().to_be_bytes());
    data.extend(queries.iter().flat_map(|q| encode_string(q)));
    data
}

/// A string with its length of 32 bits before it.
fn encode_string(string: &[u8]) -> Vec<u8> {
    let mut data = u32::try_from(string.len()).unwrap().to_be_bytes().to_vec();
    data.extend(string);
    data
}

/// A compact request without its payload.
pub fn encode_request(command: u16, flags: u16, cookie: u64, offset: u64, length: u32) -> Vec<u8> {
    let mut bytes = REQUEST.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(command.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    bytes.extend(length.to_be_bytes());
    bytes
}

/// An extended request without its payload.
pub fn encode_extended_request(
    command: u16,
    flags: u16,
    cookie: u64,
    offset: u64,
    length: u64,
) -> Vec<u8> {
    let mut bytes = EXTENDED_REQUEST.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(command.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    bytes.extend(length.to_be_bytes());
    bytes
}
