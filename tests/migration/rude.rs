//! Destinations made of a few bytes: they speak old style (or the beginning of newstyle), and can
//! be told to misbehave on their first connection. From the second on they are honest.
//! Never uses the library.

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

/// A request as it came.
#[derive(Clone, Debug)]
pub(crate) struct Asked {
    pub(crate) command: u16,
    pub(crate) cookie: u64,
    pub(crate) offset: u64,
    pub(crate) payload: Vec<u8>,
}

/// A connection from a source.
pub(crate) struct Guest {
    pub(crate) stream: TcpStream,
    pub(crate) size: u64,
}

/// A destination that runs on a thread of its own until it has a disk.
pub(crate) struct Rude {
    pub(crate) address: SocketAddr,
    disk: Receiver<Vec<u8>>,
}

impl Rude {
    /// Does that to the first connection, and receives a disk honestly on a later one.
    pub(crate) fn first(size: u64, misbehave: impl FnOnce(&mut Guest) + Send + 'static) -> Rude {
        Rude::with_goodbye(size, misbehave, || {})
    }

    /// The same, calling `goodbye` when the DISC arrives.
    pub(crate) fn with_goodbye(
        size: u64,
        misbehave: impl FnOnce(&mut Guest) + Send + 'static,
        goodbye: impl FnOnce() + Send + 'static,
    ) -> Rude {
        let address = unused_loopback_address();
        let listener = TcpListener::bind(address).unwrap();
        let (done, disk) = mpsc::channel();
        thread::spawn(move || {
            misbehave(&mut Guest::accept(&listener, size));
            let disk = loop {
                if let Ok(disk) = Guest::accept(&listener, size).receive() {
                    break disk;
                }
            };
            goodbye();
            let _ = done.send(disk);
        });
        Rude { address, disk }
    }

    /// The disk, once it has arrived.
    #[track_caller]
    pub(crate) fn disk(self) -> Vec<u8> {
        self.disk.recv_timeout(TIMEOUT).expect("the disk arrives at the honest destination")
    }
}

impl Guest {
    fn accept(listener: &TcpListener, size: u64) -> Guest {
        let (stream, _) = listener.accept().unwrap();
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(TIMEOUT)).unwrap();
        Guest { stream, size }
    }

    /// The greeting of old style: everything in one piece.
    pub(crate) fn greet(&mut self) {
        self.greet_with(OLD_STYLE, self.size);
    }

    pub(crate) fn greet_with(&mut self, magic: u64, size: u64) {
        let mut hello = [GREETING, magic, size].map(u64::to_be_bytes).concat();
        hello.extend(u32::from(HAS_FLAGS).to_be_bytes());
        hello.extend([0; ZEROES]);
        self.send(&hello);
    }

    /// The greeting of newstyle, and the first option that comes: its number and its data.
    pub(crate) fn greet_newstyle(&mut self) -> (u32, Vec<u8>) {
        self.send(&[GREETING, I_HAVE_OPT].map(u64::to_be_bytes).concat());
        self.send(&(FIXED_NEWSTYLE as u16).to_be_bytes());
        self.take(4);
        self.take_option()
    }

    pub(crate) fn take_option(&mut self) -> (u32, Vec<u8>) {
        self.take(8);
        let number = |bytes: Vec<u8>| u32::from_be_bytes(bytes.try_into().unwrap());
        let option = number(self.take(4));
        let length = number(self.take(4));
        (option, self.take(length as usize))
    }

    pub(crate) fn answer_option(&mut self, option: u32, kind: u32, data: &[u8]) {
        let mut reply = OPTION_REPLY.to_be_bytes().to_vec();
        for word in [option, kind, data.len() as u32] {
            reply.extend(word.to_be_bytes());
        }
        reply.extend(data);
        self.send(&reply);
    }

    pub(crate) fn answer_unknown(&mut self, option: u32) {
        self.answer_option(option, REP_ERR_UNSUP, b"");
    }

    /// The next request, with its payload.
    pub(crate) fn request(&mut self) -> Asked {
        self.try_request().unwrap()
    }

    fn try_request(&mut self) -> io::Result<Asked> {
        let mut head = [0; 28];
        self.stream.read_exact(&mut head)?;
        let word = |at: usize| u32::from_be_bytes(head[at..at + 4].try_into().unwrap());
        let long = |at: usize| u64::from_be_bytes(head[at..at + 8].try_into().unwrap());
        assert_eq!(word(0), REQUEST, "requests begin as requests");
        let command = word(4) as u16;
        let mut payload = vec![0; if command == WRITE { word(24) as usize } else { 0 }];
        self.stream.read_exact(&mut payload)?;
        Ok(Asked { command, cookie: long(8), offset: long(16), payload })
    }

    pub(crate) fn reply(&mut self, cookie: u64, error: u32) {
        self.reply_with(SIMPLE_REPLY, cookie, error);
    }

    pub(crate) fn reply_with(&mut self, magic: u32, cookie: u64, error: u32) {
        let mut reply = [magic, error].map(u32::to_be_bytes).concat();
        reply.extend(cookie.to_be_bytes());
        self.send(&reply);
    }

    /// Receives the whole disk once, and leaves with the last reply: whoever reads it finds the
    /// connection closed.
    pub(crate) fn leave_with_the_last_reply(&mut self) {
        self.greet();
        let mut left = self.size as usize;
        loop {
            let asked = self.request();
            left -= asked.payload.len();
            if left == 0 {
                let mut reply = [SIMPLE_REPLY, 0].map(u32::to_be_bytes).concat();
                reply.extend(asked.cookie.to_be_bytes());
                // Held back until the end of the connection goes with it.
                send(self.stream.as_raw_fd(), &reply, MsgFlags::from_bits_retain(libc::MSG_MORE))
                    .unwrap();
                return self.stream.shutdown(Shutdown::Write).unwrap();
            }
            self.reply(asked.cookie, 0);
        }
    }

    /// Takes so many bytes and forgets them.
    pub(crate) fn take(&mut self, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.stream.read_exact(&mut bytes).unwrap();
        bytes
    }

    /// Whoever has hung up does not take it; that is no failure of a rude destination.
    fn send(&mut self, bytes: &[u8]) {
        let _ = self.stream.write_all(bytes);
    }

    /// Waits for the source to hang up, reading what it says until then. True: it threw away what
    /// had not been delivered yet.
    pub(crate) fn outlast(&mut self) -> bool {
        let mut buffer = [0; 4096];
        loop {
            match self.stream.read(&mut buffer) {
                Ok(0) => return false,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return true,
                Err(error) => panic!("the source neither speaks nor hangs up: {error}"),
            }
        }
    }

    /// Receives a disk as it should be received: to the DISC.
    fn receive(&mut self) -> io::Result<Vec<u8>> {
        self.greet();
        let mut disk = vec![0xdb; self.size as usize];
        loop {
            let asked = self.try_request()?;
            match asked.command {
                WRITE => {
                    let start = asked.offset as usize;
                    disk[start..start + asked.payload.len()].copy_from_slice(&asked.payload);
                    self.reply(asked.cookie, 0);
                }
                DISC => return Ok(disk),
                command => panic!("command {command} was not offered"),
            }
        }
    }
}
