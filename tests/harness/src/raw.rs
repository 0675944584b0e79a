//! The NBD protocol as bytes: a connection, option haggling, encoded requests. Never uses the
//! library under test, so that a misreading of the specification in the program cannot hide in its
//! tests.

pub use crate::proto::*;
use crate::{Endpoint, TIMEOUT, wait_until};
use nix::sys::socket::{setsockopt, sockopt};
use rustls::{ClientConfig, ClientConnection, StreamOwned};
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
    Tls(Box<StreamOwned<ClientConnection, TcpStream>>),
}

impl Stream {
    /// The socket below TLS, if there is TLS.
    fn tcp(&self) -> Option<&TcpStream> {
        match self {
            Stream::Tcp(tcp) => Some(tcp),
            Stream::Tls(tls) => Some(&tls.sock),
            Stream::Unix(_) => None,
        }
    }
}

/// One connection to a server. A failed connection or a violation of the protocol fails the test,
/// except in functions that return an error.
pub struct Wire {
    stream: Stream,
}

impl Wire {
    /// Connects; reads and writes fail after [`TIMEOUT`].
    #[track_caller]
    pub fn connect(endpoint: &Endpoint) -> Wire {
        Wire::try_connect(endpoint)
            .unwrap_or_else(|e| panic!("cannot connect to {endpoint:?}: {e}"))
    }

    /// Connects to a server that may refuse the connection.
    pub fn try_connect(endpoint: &Endpoint) -> io::Result<Wire> {
        Wire::try_connect_within(endpoint, TIMEOUT)
    }

    /// Connects with another timeout for the TCP connection.
    pub(crate) fn try_connect_within(endpoint: &Endpoint, timeout: Duration) -> io::Result<Wire> {
        let stream = match endpoint {
            Endpoint::Tcp(address) => Stream::Tcp(TcpStream::connect_timeout(address, timeout)?),
            Endpoint::Unix(path) => Stream::Unix(UnixStream::connect(path)?),
        };
        if let Stream::Tcp(tcp) = &stream {
            tcp.set_nodelay(true)?;
        }
        let wire = Wire { stream };
        wire.set_read_timeout(TIMEOUT);
        wire.set_write_timeout(TIMEOUT);
        Ok(wire)
    }

    /// Sets the timeout of reads.
    pub fn set_read_timeout(&self, timeout: Duration) {
        let timeout = Some(timeout);
        match &self.stream {
            Stream::Tcp(s) => s.set_read_timeout(timeout).unwrap(),
            Stream::Unix(s) => s.set_read_timeout(timeout).unwrap(),
            Stream::Tls(s) => s.sock.set_read_timeout(timeout).unwrap(),
        }
    }

    fn set_write_timeout(&self, timeout: Duration) {
        let timeout = Some(timeout);
        match &self.stream {
            Stream::Tcp(s) => s.set_write_timeout(timeout).unwrap(),
            Stream::Unix(s) => s.set_write_timeout(timeout).unwrap(),
            Stream::Tls(s) => s.sock.set_write_timeout(timeout).unwrap(),
        }
    }

    /// Waits until at least `count` bytes can be read (`FIONREAD`), and reads none of them.
    #[track_caller]
    pub fn wait_for_bytes(&self, count: usize) {
        let fd = match &self.stream {
            Stream::Tcp(s) => s.as_raw_fd(),
            Stream::Unix(s) => s.as_raw_fd(),
            Stream::Tls(_) => panic!("the kernel does not know how many bytes records have"),
        };
        wait_until("bytes of a reply", || {
            let mut arrived: nix::libc::c_int = 0;
            // SAFETY: FIONREAD writes one int, to the address of one.
            let result = unsafe { nix::libc::ioctl(fd, nix::libc::FIONREAD, &raw mut arrived) };
            result == 0 && arrived as usize >= count
        });
    }

    /// Address and port of this end of a TCP connection.
    pub fn local_address(&self) -> String {
        self.stream.tcp().expect("not TCP").local_addr().unwrap().to_string()
    }

    /// Does the TLS handshake as a client of `localhost`, after the server has acknowledged STARTTLS. The
    /// error is that of the handshake. Bytes that have arrived before count as its first.
    pub fn start_tls(self, config: &Arc<ClientConfig>) -> io::Result<Wire> {
        let Stream::Tcp(tcp) = self.stream else { panic!("TLS is done once, over TCP") };
        let name = "localhost".try_into().unwrap();
        let session = ClientConnection::new(Arc::clone(config), name).map_err(io::Error::other)?;
        let mut stream = StreamOwned::new(session, tcp);
        while stream.conn.is_handshaking() {
            stream.conn.complete_io(&mut stream.sock)?;
        }
        Ok(Wire { stream: Stream::Tls(Box::new(stream)) })
    }

    /// The protocol version and the cipher suite of TLS, by their names in rustls.
    #[track_caller]
    pub fn tls_terms(&self) -> String {
        let Stream::Tls(tls) = &self.stream else { panic!("no TLS") };
        let suite = tls.conn.negotiated_cipher_suite().unwrap().suite();
        format!("{:?} {suite:?}", tls.conn.protocol_version().unwrap())
    }

    /// A second handle of the connection, to send and receive concurrently.
    pub fn try_clone(&self) -> Wire {
        let stream = match &self.stream {
            Stream::Tcp(s) => Stream::Tcp(s.try_clone().unwrap()),
            Stream::Unix(s) => Stream::Unix(s.try_clone().unwrap()),
            Stream::Tls(_) => panic!("a TLS session has one handle"),
        };
        Wire { stream }
    }

    /// Sends all of `bytes` to a server that may close the connection.
    pub fn try_send(&mut self, bytes: &[u8]) -> io::Result<()> {
        match &mut self.stream {
            Stream::Tcp(s) => s.write_all(bytes),
            Stream::Unix(s) => s.write_all(bytes),
            Stream::Tls(s) => s.write_all(bytes),
        }
    }

    /// Reads once into `buffer`. Returns the count of bytes, zero at the end of the stream.
    pub fn try_recv(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match &mut self.stream {
            Stream::Tcp(s) => s.read(buffer),
            Stream::Unix(s) => s.read(buffer),
            Stream::Tls(s) => s.read(buffer),
        }
    }

    /// Sends all of `bytes`.
    #[track_caller]
    pub fn send(&mut self, bytes: &[u8]) {
        if let Err(e) = self.try_send(bytes) {
            panic!("cannot send {} bytes: {e}", bytes.len());
        }
    }

    /// Receives exactly `length` bytes from a server that may close the connection. An error says how
    /// many bytes it followed; that of a closed connection is `UnexpectedEof`.
    pub fn try_recv_exact(&mut self, length: usize) -> io::Result<Vec<u8>> {
        let mut data = vec![0; length];
        let mut have = 0;
        while have < length {
            let error = match self.try_recv(&mut data[have..]) {
                Ok(0) => io::Error::new(ErrorKind::UnexpectedEof, "the server closed"),
                Ok(n) => {
                    have += n;
                    continue;
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => continue,
                Err(e) => e,
            };
            let message = format!("received {have} of {length} bytes, then: {error}");
            return Err(io::Error::new(error.kind(), message));
        }
        Ok(data)
    }

    /// Receives exactly `length` bytes.
    #[track_caller]
    pub fn recv(&mut self, length: usize) -> Vec<u8> {
        self.try_recv_exact(length).unwrap_or_else(|error| panic!("{error}"))
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

    /// Receives all bytes until the server closes the connection, with FIN or RST.
    #[track_caller]
    pub fn recv_to_end(&mut self) -> Vec<u8> {
        let (data, end) = self.recv_to_end_or_error();
        match end {
            Ok(()) => data,
            Err(e) if e.kind() == ErrorKind::ConnectionReset => data,
            Err(e) => panic!("received {} bytes, then: {e}", data.len()),
        }
    }

    /// Receives all bytes until the stream ends. Also returns the error that ended it.
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

    /// Fails unless the server closes the connection without sending more bytes.
    #[track_caller]
    pub fn expect_closed(&mut self, why: &str) {
        let rest = self.recv_to_end();
        assert!(rest.is_empty(), "{why}: the server sent {rest:02x?} before closing");
    }

    /// Closes the direction to the server. Replies can still be received.
    pub fn shutdown_write(&mut self) {
        let _ = match &mut self.stream {
            Stream::Tcp(s) => s.shutdown(Shutdown::Write),
            Stream::Unix(s) => s.shutdown(Shutdown::Write),
            Stream::Tls(s) => {
                s.conn.send_close_notify();
                s.flush().and_then(|()| s.sock.shutdown(Shutdown::Write))
            }
        };
    }

    /// Closes the connection with a RST, as a crashed client does; a unix socket is only closed.
    pub fn reset(self) {
        if let Some(s) = self.stream.tcp() {
            let no_linger = nix::libc::linger { l_onoff: 1, l_linger: 0 };
            setsockopt(s, sockopt::Linger, &no_linger).unwrap();
        }
    }
}

/// One reply to an option.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct OptionReply {
    /// The reply type, such as [`REP_ACK`].
    pub kind: u32,
    /// The data after the reply header.
    pub data: Vec<u8>,
}

impl OptionReply {
    /// Whether it is the final reply to its option.
    pub fn is_final(&self) -> bool {
        self.kind == REP_ACK || self.kind & REP_IS_ERROR != 0
    }
}

/// The handshake: greeting and option haggling.
impl Wire {
    /// Connects, receives the newstyle greeting and sends `client_flags`.
    #[track_caller]
    pub fn haggle(endpoint: &Endpoint, client_flags: u32) -> Wire {
        let mut wire = Wire::connect(endpoint);
        let flags = wire.recv_greeting();
        assert_eq!(flags & 1, 1, "the server offers no fixed newstyle");
        wire.send(&client_flags.to_be_bytes());
        wire
    }

    /// Connects and receives the newstyle greeting. Retries while the server is at its limit of
    /// clients and closes connections without a greeting.
    #[track_caller]
    pub fn connect_with_retries(endpoint: &Endpoint) -> Wire {
        let mut greeted = None;
        wait_until("a greeting", || {
            let mut wire = Wire::connect(endpoint);
            let mut greeting = [0; GREETING_LENGTH];
            let received = matches!(wire.try_recv(&mut greeting), Ok(GREETING_LENGTH));
            greeted = received.then_some(wire);
            received
        });
        greeted.unwrap()
    }

    /// Receives the newstyle greeting and returns its handshake flags.
    #[track_caller]
    pub fn recv_greeting(&mut self) -> u16 {
        assert_eq!(self.recv_u64(), GREETING, "the greeting begins with NBDMAGIC");
        assert_eq!(self.recv_u64(), I_HAVE_OPT, "the magic of newstyle");
        self.recv_u16()
    }

    /// Sends an option with its data.
    #[track_caller]
    pub fn send_option(&mut self, option: u32, data: &[u8]) {
        self.send(&encode_option(option, data));
    }

    /// Receives one reply to this option and checks its format.
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

    /// Sends an option and receives all replies. Returns those before the final reply, and the type
    /// of the final reply.
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

    /// Sends an option, receives all replies, and returns only the type of the final reply.
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
        REP_PRIVATE => {
            let lengths: &[usize] = match reply.data[..4] {
                [0, 0, 0, 1] => &[24],
                [0, 0, 0, 2] => &[4, 20],
                [0, 0, 0, 3] => &[4],
                _ => &[],
            };
            assert!(lengths.contains(&reply.data.len()), "the length of an answer: {reply:?}");
        }
        kind => panic!("unknown option reply type {kind:#x}"),
    }
}

/// An option with its data.
pub fn encode_option(option: u32, data: &[u8]) -> Vec<u8> {
    encode_option_of_length(option, u32::try_from(data.len()).unwrap(), data)
}

/// An option whose header may have a wrong length.
pub fn encode_option_of_length(option: u32, length: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = I_HAVE_OPT.to_be_bytes().to_vec();
    bytes.extend(option.to_be_bytes());
    bytes.extend(length.to_be_bytes());
    bytes.extend(data);
    bytes
}

/// All bytes that a client with structured replies and `base:allocation` sends before the
/// transmission phase.
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

/// A string after its length in 32 bits.
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
