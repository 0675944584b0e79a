//! An oldstyle server that the test plays itself: it sees each request, and decides on the reply.

use harness::raw::{GREETING, OLD_STYLE, REQUEST, SIMPLE_REPLY, WRITE, ZEROES};
use harness::{Endpoint, TIMEOUT, poll_until};
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};

/// A listening socket, at which the test accepts connections.
pub(crate) struct FakeUpstream {
    listener: TcpListener,
    size: u64,
    flags: u16,
}

/// A connection of the proxy.
pub(crate) struct FakeConnection(TcpStream);

/// A request of the proxy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct FakeRequest {
    pub(crate) command: u16,
    pub(crate) offset: u64,
    pub(crate) length: u32,
    /// The data of a write.
    pub(crate) payload: Vec<u8>,
    pub(crate) cookie: u64,
}

impl FakeUpstream {
    /// A server of a disk of `size` bytes with these transmission flags.
    pub(crate) fn new(size: u64, flags: u16) -> FakeUpstream {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        FakeUpstream { listener, size, flags }
    }

    pub(crate) fn endpoint(&self) -> Endpoint {
        Endpoint::Tcp(self.listener.local_addr().unwrap())
    }

    /// Accepts and greets the next connection.
    #[track_caller]
    pub(crate) fn accept(&self) -> FakeConnection {
        let mut accepted = None;
        let has_come = poll_until(TIMEOUT, || {
            accepted = self.try_accept();
            accepted.is_some()
        });
        assert!(has_come, "the proxy does not connect");
        let mut connection = accepted.unwrap();
        let mut greeting = [GREETING, OLD_STYLE, self.size].map(u64::to_be_bytes).concat();
        greeting.extend(u32::from(self.flags).to_be_bytes());
        greeting.extend([0; ZEROES]);
        connection.0.write_all(&greeting).unwrap();
        connection
    }

    /// The next connection, if one has come.
    pub(crate) fn try_accept(&self) -> Option<FakeConnection> {
        match self.listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false).unwrap();
                stream.set_read_timeout(Some(TIMEOUT)).unwrap();
                Some(FakeConnection(stream))
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => None,
            Err(error) => panic!("{error}"),
        }
    }
}

impl FakeConnection {
    /// Receives the next request.
    #[track_caller]
    pub(crate) fn request(&mut self) -> FakeRequest {
        assert_eq!(self.receive(4), REQUEST.to_be_bytes(), "the magic of a request");
        let header = self.receive(24);
        let command = u16::from_be_bytes(header[2..4].try_into().unwrap());
        let cookie = u64::from_be_bytes(header[4..12].try_into().unwrap());
        let offset = u64::from_be_bytes(header[12..20].try_into().unwrap());
        let length = u32::from_be_bytes(header[20..24].try_into().unwrap());
        let payload = if command == WRITE { self.receive(length as usize) } else { Vec::new() };
        FakeRequest { command, offset, length, payload, cookie }
    }

    /// Answers a request with success and this data.
    #[track_caller]
    pub(crate) fn answer(&mut self, request: &FakeRequest, data: &[u8]) {
        self.reply(request, 0, data);
    }

    /// Answers a request with this error.
    #[track_caller]
    pub(crate) fn refuse(&mut self, request: &FakeRequest, error: u32) {
        self.reply(request, error, b"");
    }

    #[track_caller]
    fn reply(&mut self, request: &FakeRequest, error: u32, data: &[u8]) {
        let mut reply = [SIMPLE_REPLY, error].map(u32::to_be_bytes).concat();
        reply.extend(request.cookie.to_be_bytes());
        reply.extend(data);
        self.0.write_all(&reply).unwrap();
    }

    #[track_caller]
    fn receive(&mut self, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.0.read_exact(&mut bytes).unwrap();
        bytes
    }
}
