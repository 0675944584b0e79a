//! A minimal migration destination: oldstyle, and the first steps of newstyle. The test defines its
//! behaviour on the first connection; on later ones it follows the protocol.
//! Never uses the library under test.

use harness::raw::{
    DISC, FIXED_NEWSTYLE, GREETING, HAS_FLAGS, I_HAVE_OPT, OLD_STYLE, OPTION_REPLY, REP_ERR_UNSUP,
    REQUEST, SIMPLE_REPLY, WRITE, ZEROES,
};
use harness::{TIMEOUT, unused_loopback_address};
use nix::libc;
use nix::sys::socket::{MsgFlags, send};
use std::io::{self, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd as _;
use std::sync::mpsc::{self, Receiver};
use std::thread;

/// A received request.
#[derive(Clone, Debug)]
pub(crate) struct ReceivedRequest {
    pub(crate) command: u16,
    pub(crate) cookie: u64,
    pub(crate) offset: u64,
    pub(crate) payload: Vec<u8>,
}

/// A connection accepted from a source.
pub(crate) struct Connection {
    pub(crate) stream: TcpStream,
    pub(crate) size: u64,
}

/// A destination on its own thread, which exits once it has received a disk.
pub(crate) struct FakeDestination {
    pub(crate) address: SocketAddr,
    disk: Receiver<Vec<u8>>,
}

impl FakeDestination {
    /// Runs `misbehave` on the first connection, and receives a disk on a later one.
    pub(crate) fn misbehave_first(
        size: u64,
        misbehave: impl FnOnce(&mut Connection) + Send + 'static,
    ) -> FakeDestination {
        FakeDestination::with_on_disc(size, misbehave, || {})
    }

    /// Like [`FakeDestination::misbehave_first`]; calls `on_disc` when NBD_CMD_DISC arrives.
    pub(crate) fn with_on_disc(
        size: u64,
        misbehave: impl FnOnce(&mut Connection) + Send + 'static,
        on_disc: impl FnOnce() + Send + 'static,
    ) -> FakeDestination {
        let address = unused_loopback_address();
        let listener = TcpListener::bind(address).unwrap();
        let (done, disk) = mpsc::channel();
        thread::spawn(move || {
            misbehave(&mut Connection::accept(&listener, size));
            let disk = loop {
                if let Ok(disk) = Connection::accept(&listener, size).receive_disk() {
                    break disk;
                }
            };
            on_disc();
            let _ = done.send(disk);
        });
        FakeDestination { address, disk }
    }

    /// Waits for a complete disk and returns its bytes.
    #[track_caller]
    pub(crate) fn disk(self) -> Vec<u8> {
        self.disk.recv_timeout(TIMEOUT).expect("a complete disk arrives")
    }
}

impl Connection {
    fn accept(listener: &TcpListener, size: u64) -> Connection {
        let (stream, _) = listener.accept().unwrap();
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(TIMEOUT)).unwrap();
        Connection { stream, size }
    }

    /// Sends the oldstyle greeting, which ends the handshake.
    pub(crate) fn greet(&mut self) {
        self.greet_with(OLD_STYLE, self.size);
    }

    pub(crate) fn greet_with(&mut self, magic: u64, size: u64) {
        let mut greeting = [GREETING, magic, size].map(u64::to_be_bytes).concat();
        greeting.extend(u32::from(HAS_FLAGS).to_be_bytes());
        greeting.extend([0; ZEROES]);
        self.send(&greeting);
    }

    /// Sends the newstyle greeting; returns number and data of the client's first option.
    pub(crate) fn greet_newstyle(&mut self) -> (u32, Vec<u8>) {
        self.send(&[GREETING, I_HAVE_OPT].map(u64::to_be_bytes).concat());
        self.send(&(FIXED_NEWSTYLE as u16).to_be_bytes());
        self.recv(4);
        self.recv_option()
    }

    pub(crate) fn recv_option(&mut self) -> (u32, Vec<u8>) {
        self.recv(8);
        let number = |bytes: Vec<u8>| u32::from_be_bytes(bytes.try_into().unwrap());
        let option = number(self.recv(4));
        let length = number(self.recv(4));
        (option, self.recv(length as usize))
    }

    pub(crate) fn reply_to_option(&mut self, option: u32, kind: u32, data: &[u8]) {
        let mut reply = OPTION_REPLY.to_be_bytes().to_vec();
        for word in [option, kind, data.len() as u32] {
            reply.extend(word.to_be_bytes());
        }
        reply.extend(data);
        self.send(&reply);
    }

    pub(crate) fn reject_option(&mut self, option: u32) {
        self.reply_to_option(option, REP_ERR_UNSUP, b"");
    }

    /// Receives the next request with its payload.
    pub(crate) fn recv_request(&mut self) -> ReceivedRequest {
        self.try_recv_request().unwrap()
    }

    fn try_recv_request(&mut self) -> io::Result<ReceivedRequest> {
        let mut head = [0; 28];
        self.stream.read_exact(&mut head)?;
        let word = |at: usize| u32::from_be_bytes(head[at..at + 4].try_into().unwrap());
        let long = |at: usize| u64::from_be_bytes(head[at..at + 8].try_into().unwrap());
        assert_eq!(word(0), REQUEST, "the magic of a request");
        let command = word(4) as u16;
        let mut payload = vec![0; if command == WRITE { word(24) as usize } else { 0 }];
        self.stream.read_exact(&mut payload)?;
        Ok(ReceivedRequest { command, cookie: long(8), offset: long(16), payload })
    }

    pub(crate) fn reply(&mut self, cookie: u64, error: u32) {
        self.reply_with(SIMPLE_REPLY, cookie, error);
    }

    pub(crate) fn reply_with(&mut self, magic: u32, cookie: u64, error: u32) {
        let mut reply = [magic, error].map(u32::to_be_bytes).concat();
        reply.extend(cookie.to_be_bytes());
        self.send(&reply);
    }

    /// Receives the complete disk and sends the last reply together with a FIN, so that the source
    /// reads end of file directly after the reply.
    pub(crate) fn close_with_the_last_reply(&mut self) {
        self.greet();
        let mut left = self.size as usize;
        loop {
            let request = self.recv_request();
            left -= request.payload.len();
            if left == 0 {
                let mut reply = [SIMPLE_REPLY, 0].map(u32::to_be_bytes).concat();
                reply.extend(request.cookie.to_be_bytes());
                // MSG_MORE: the kernel delays the reply and sends it with the FIN.
                send(self.stream.as_raw_fd(), &reply, MsgFlags::from_bits_retain(libc::MSG_MORE))
                    .unwrap();
                return self.stream.shutdown(Shutdown::Write).unwrap();
            }
            self.reply(request.cookie, 0);
        }
    }

    /// Receives exactly `length` bytes.
    pub(crate) fn recv(&mut self, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.stream.read_exact(&mut bytes).unwrap();
        bytes
    }

    /// Ignores errors, since the source may have closed the connection.
    fn send(&mut self, bytes: &[u8]) {
        let _ = self.stream.write_all(bytes);
    }

    /// Reads and discards bytes until the source closes the connection. True if it closed with a
    /// RST, which discards undelivered data.
    pub(crate) fn wait_for_close(&mut self) -> bool {
        let mut buffer = [0; 4096];
        loop {
            match self.stream.read(&mut buffer) {
                Ok(0) => return false,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return true,
                Err(error) => panic!("the source neither sends nor closes: {error}"),
            }
        }
    }

    /// Receives a disk according to the protocol, up to NBD_CMD_DISC.
    fn receive_disk(&mut self) -> io::Result<Vec<u8>> {
        self.greet();
        let mut disk = vec![0xdb; self.size as usize];
        loop {
            let request = self.try_recv_request()?;
            match request.command {
                WRITE => {
                    let start = request.offset as usize;
                    disk[start..start + request.payload.len()].copy_from_slice(&request.payload);
                    self.reply(request.cookie, 0);
                }
                DISC => return Ok(disk),
                command => panic!("unexpected command {command}"),
            }
        }
    }
}
