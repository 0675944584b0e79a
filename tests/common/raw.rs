//! The NBD protocol as bytes, for tests: its numbers, a connection, the option haggling.
//! Never uses the library under test, so that a misreading on one side cannot hide on the other.
//!
//! Numbers are from `doc/proto.md` of the NBD project and its extended-headers extension.

use super::server::Target;
use super::{DEADLINE, wait_until};
use nix::sys::socket::{setsockopt, sockopt};
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixStream;
use std::time::Duration;

pub(crate) const GREETING: u64 = 0x4e42_444d_4147_4943;
pub(crate) const OLD_STYLE: u64 = 0x0000_4202_8186_1253;
pub(crate) const I_HAVE_OPT: u64 = 0x4948_4156_454f_5054;
pub(crate) const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
pub(crate) const REQUEST: u32 = 0x2560_9513;
pub(crate) const EXTENDED_REQUEST: u32 = 0x21e4_1c71;
pub(crate) const SIMPLE_REPLY: u32 = 0x6744_6698;
pub(crate) const STRUCTURED_REPLY: u32 = 0x668e_33ef;
pub(crate) const EXTENDED_REPLY: u32 = 0x6e8a_278c;

/// Two magics and the handshake flags, in bytes.
const GREETING_LENGTH: usize = 18;
/// Handshake flags of the server and client flags alike.
pub(crate) const FIXED_NEWSTYLE: u32 = 1;
pub(crate) const NO_ZEROES: u32 = 2;
/// The zeroes at the end of the old handshakes.
pub(crate) const ZEROES: usize = 124;

pub(crate) const OPT_EXPORT_NAME: u32 = 1;
pub(crate) const OPT_ABORT: u32 = 2;
pub(crate) const OPT_LIST: u32 = 3;
pub(crate) const OPT_PEEK_EXPORT: u32 = 4;
pub(crate) const OPT_STARTTLS: u32 = 5;
pub(crate) const OPT_INFO: u32 = 6;
pub(crate) const OPT_GO: u32 = 7;
pub(crate) const OPT_STRUCTURED_REPLY: u32 = 8;
pub(crate) const OPT_LIST_META_CONTEXT: u32 = 9;
pub(crate) const OPT_SET_META_CONTEXT: u32 = 10;
pub(crate) const OPT_EXTENDED_HEADERS: u32 = 11;

pub(crate) const REP_ACK: u32 = 1;
pub(crate) const REP_SERVER: u32 = 2;
pub(crate) const REP_INFO: u32 = 3;
pub(crate) const REP_META_CONTEXT: u32 = 4;
/// flexnbd's private option (flexnbd-migration(7)), and the type of its reply.
pub(crate) const OPT_PRIVATE: u32 = 0x464c_4558;
pub(crate) const REP_PRIVATE: u32 = OPT_PRIVATE;
pub(crate) const REP_IS_ERROR: u32 = 1 << 31;
pub(crate) const REP_ERR_UNSUP: u32 = REP_IS_ERROR + 1;
pub(crate) const REP_ERR_POLICY: u32 = REP_IS_ERROR + 2;
pub(crate) const REP_ERR_INVALID: u32 = REP_IS_ERROR + 3;
pub(crate) const REP_ERR_UNKNOWN: u32 = REP_IS_ERROR + 6;
pub(crate) const REP_ERR_TOO_BIG: u32 = REP_IS_ERROR + 9;
pub(crate) const REP_ERR_EXT_HEADER_REQD: u32 = REP_IS_ERROR + 10;

pub(crate) const INFO_EXPORT: u16 = 0;
pub(crate) const INFO_NAME: u16 = 1;
pub(crate) const INFO_DESCRIPTION: u16 = 2;
pub(crate) const INFO_BLOCK_SIZE: u16 = 3;

pub(crate) const HAS_FLAGS: u16 = 1;
pub(crate) const READ_ONLY: u16 = 1 << 1;
pub(crate) const SEND_FLUSH: u16 = 1 << 2;
pub(crate) const SEND_FUA: u16 = 1 << 3;
pub(crate) const SEND_TRIM: u16 = 1 << 5;
pub(crate) const SEND_WRITE_ZEROES: u16 = 1 << 6;
pub(crate) const SEND_DF: u16 = 1 << 7;
pub(crate) const CAN_MULTI_CONN: u16 = 1 << 8;
pub(crate) const SEND_CACHE: u16 = 1 << 10;
pub(crate) const SEND_FAST_ZERO: u16 = 1 << 11;

pub(crate) const READ: u16 = 0;
pub(crate) const WRITE: u16 = 1;
pub(crate) const DISC: u16 = 2;
pub(crate) const FLUSH: u16 = 3;
pub(crate) const TRIM: u16 = 4;
pub(crate) const CACHE: u16 = 5;
pub(crate) const WRITE_ZEROES: u16 = 6;
pub(crate) const BLOCK_STATUS: u16 = 7;

pub(crate) const FUA: u16 = 1;
pub(crate) const NO_HOLE: u16 = 1 << 1;
pub(crate) const DF: u16 = 1 << 2;
pub(crate) const REQ_ONE: u16 = 1 << 3;
pub(crate) const FAST_ZERO: u16 = 1 << 4;
pub(crate) const PAYLOAD_LEN: u16 = 1 << 5;

pub(crate) const CHUNK_DONE: u16 = 1;
pub(crate) const CHUNK_NONE: u16 = 0;
pub(crate) const CHUNK_DATA: u16 = 1;
pub(crate) const CHUNK_HOLE: u16 = 2;
pub(crate) const CHUNK_BLOCK_STATUS: u16 = 5;
pub(crate) const CHUNK_BLOCK_STATUS_EXT: u16 = 6;
pub(crate) const CHUNK_ERROR: u16 = (1 << 15) + 1;
pub(crate) const CHUNK_ERROR_OFFSET: u16 = (1 << 15) + 2;

pub(crate) const EPERM: u32 = 1;
pub(crate) const EIO: u32 = 5;
pub(crate) const ENOMEM: u32 = 12;
pub(crate) const EINVAL: u32 = 22;
pub(crate) const ENOSPC: u32 = 28;
pub(crate) const EOVERFLOW: u32 = 75;
pub(crate) const ENOTSUP: u32 = 95;
pub(crate) const ESHUTDOWN: u32 = 108;
/// The only errors that may go over the wire.
pub(crate) const LISTED_ERRORS: [u32; 8] =
    [EPERM, EIO, ENOMEM, EINVAL, ENOSPC, EOVERFLOW, ENOTSUP, ESHUTDOWN];

/// `base:allocation`: not allocated; reads as zero.
pub(crate) const STATE_HOLE: u64 = 1;
pub(crate) const STATE_ZERO: u64 = 2;
pub(crate) const ALLOCATION: &str = "base:allocation";

/// The longest string of the protocol, in bytes.
pub(crate) const STRING_MAX: usize = 4096;

enum Link {
    Tcp(TcpStream),
    Unix(UnixStream),
}

/// One connection. Everything that does not go as a living server would do it fails the test.
pub(crate) struct Wire {
    link: Link,
}

impl Wire {
    #[track_caller]
    pub(crate) fn connect(target: &Target) -> Wire {
        Wire::try_connect(target).unwrap_or_else(|e| panic!("cannot connect to {target:?}: {e}"))
    }

    pub(crate) fn try_connect(target: &Target) -> io::Result<Wire> {
        Wire::try_connect_within(target, DEADLINE)
    }

    pub(crate) fn try_connect_within(target: &Target, patience: Duration) -> io::Result<Wire> {
        let link = match target {
            Target::Tcp(address) => Link::Tcp(TcpStream::connect_timeout(address, patience)?),
            Target::Unix(path) => Link::Unix(UnixStream::connect(path)?),
        };
        if let Link::Tcp(stream) = &link {
            stream.set_nodelay(true)?;
        }
        let wire = Wire { link };
        wire.give_up_reading_after(DEADLINE);
        wire.give_up_sending_after(DEADLINE);
        Ok(wire)
    }

    pub(crate) fn give_up_reading_after(&self, patience: Duration) {
        let patience = Some(patience);
        match &self.link {
            Link::Tcp(s) => s.set_read_timeout(patience).unwrap(),
            Link::Unix(s) => s.set_read_timeout(patience).unwrap(),
        }
    }

    fn give_up_sending_after(&self, patience: Duration) {
        let patience = Some(patience);
        match &self.link {
            Link::Tcp(s) => s.set_write_timeout(patience).unwrap(),
            Link::Unix(s) => s.set_write_timeout(patience).unwrap(),
        }
    }

    /// Keeps the kernel from taking replies off the server's hands: asks for small buffers.
    pub(crate) fn shrink_receive_buffer(&self, bytes: usize) {
        match &self.link {
            Link::Tcp(s) => setsockopt(s, sockopt::RcvBuf, &bytes).unwrap(),
            Link::Unix(s) => setsockopt(s, sockopt::RcvBuf, &bytes).unwrap(),
        }
    }

    /// Waits until at least this many bytes have arrived (`FIONREAD`), and takes none of them.
    #[track_caller]
    pub(crate) fn wait_for_bytes(&self, count: usize) {
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
    pub(crate) fn local_address(&self) -> String {
        match &self.link {
            Link::Tcp(s) => s.local_addr().unwrap().to_string(),
            Link::Unix(_) => panic!("not TCP"),
        }
    }

    /// A second hand on the same connection, to send and receive at the same time.
    pub(crate) fn second_hand(&self) -> Wire {
        let link = match &self.link {
            Link::Tcp(s) => Link::Tcp(s.try_clone().unwrap()),
            Link::Unix(s) => Link::Unix(s.try_clone().unwrap()),
        };
        Wire { link }
    }

    pub(crate) fn try_send(&mut self, bytes: &[u8]) -> io::Result<()> {
        match &mut self.link {
            Link::Tcp(s) => s.write_all(bytes),
            Link::Unix(s) => s.write_all(bytes),
        }
    }

    pub(crate) fn try_recv(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match &mut self.link {
            Link::Tcp(s) => s.read(buffer),
            Link::Unix(s) => s.read(buffer),
        }
    }

    #[track_caller]
    pub(crate) fn send(&mut self, bytes: &[u8]) {
        if let Err(e) = self.try_send(bytes) {
            panic!("the server takes no more bytes of {}: {e}", bytes.len());
        }
    }

    #[track_caller]
    pub(crate) fn recv(&mut self, length: usize) -> Vec<u8> {
        let mut data = vec![0; length];
        let mut have = 0;
        while have < length {
            match self.try_recv(&mut data[have..]) {
                Ok(0) => panic!("the server closed after {have} of {length} bytes"),
                Ok(n) => have += n,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => panic!("{have} of {length} bytes came, then: {e}"),
            }
        }
        data
    }

    #[track_caller]
    pub(crate) fn recv_u16(&mut self) -> u16 {
        u16::from_be_bytes(self.recv(2).try_into().unwrap())
    }

    #[track_caller]
    pub(crate) fn recv_u32(&mut self) -> u32 {
        u32::from_be_bytes(self.recv(4).try_into().unwrap())
    }

    #[track_caller]
    pub(crate) fn recv_u64(&mut self) -> u64 {
        u64::from_be_bytes(self.recv(8).try_into().unwrap())
    }

    /// Everything until the server closes; a reset counts as closing.
    #[track_caller]
    pub(crate) fn recv_to_end(&mut self) -> Vec<u8> {
        let (data, end) = self.recv_until_it_ends();
        match end {
            Ok(()) => data,
            Err(e) if e.kind() == ErrorKind::ConnectionReset => data,
            Err(e) => panic!("{} bytes came, and then no end but: {e}", data.len()),
        }
    }

    /// Everything until the stream ends, and how it ended.
    pub(crate) fn recv_until_it_ends(&mut self) -> (Vec<u8>, io::Result<()>) {
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

    #[track_caller]
    pub(crate) fn expect_closed(&mut self, why: &str) {
        let rest = self.recv_to_end();
        assert!(rest.is_empty(), "{why}: the server must close silently but sent {rest:02x?}");
    }

    /// Says that nothing more will be sent, and goes on receiving.
    pub(crate) fn finish_sending(&self) {
        let _ = match &self.link {
            Link::Tcp(s) => s.shutdown(Shutdown::Write),
            Link::Unix(s) => s.shutdown(Shutdown::Write),
        };
    }

    /// Ends as a crashed client does: with a reset where the transport knows one.
    pub(crate) fn vanish(self) {
        if let Link::Tcp(s) = &self.link {
            let at_once = nix::libc::linger { l_onoff: 1, l_linger: 0 };
            setsockopt(s, sockopt::Linger, &at_once).unwrap();
        }
    }
}

/// One reply of the option haggling.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct OptionReply {
    pub(crate) kind: u32,
    pub(crate) data: Vec<u8>,
}

impl OptionReply {
    pub(crate) fn is_final(&self) -> bool {
        self.kind == REP_ACK || self.kind & REP_IS_ERROR != 0
    }
}

/// The haggling, from the greeting on.
impl Wire {
    /// Connects, takes the newstyle greeting and answers with these client flags.
    #[track_caller]
    pub(crate) fn haggle(target: &Target, client_flags: u32) -> Wire {
        let mut wire = Wire::connect(target);
        let flags = wire.recv_greeting();
        assert_eq!(flags & 1, 1, "the server speaks no fixed newstyle");
        wire.send(&client_flags.to_be_bytes());
        wire
    }

    /// Connects and takes the newstyle greeting, trying again where a server that is at its limit
    /// of clients closes without one.
    #[track_caller]
    pub(crate) fn connect_patiently(target: &Target) -> Wire {
        let mut greeted = None;
        wait_until("a greeting", || {
            let mut wire = Wire::connect(target);
            let mut greeting = [0; GREETING_LENGTH];
            let came = matches!(wire.try_recv(&mut greeting), Ok(GREETING_LENGTH));
            greeted = came.then_some(wire);
            came
        });
        greeted.unwrap()
    }

    /// The newstyle greeting's handshake flags.
    #[track_caller]
    pub(crate) fn recv_greeting(&mut self) -> u16 {
        assert_eq!(self.recv_u64(), GREETING, "the greeting begins with NBDMAGIC");
        assert_eq!(self.recv_u64(), I_HAVE_OPT, "a newstyle greeting goes on with IHAVEOPT");
        self.recv_u16()
    }

    #[track_caller]
    pub(crate) fn send_option(&mut self, option: u32, data: &[u8]) {
        self.send(&encode_option(option, data));
    }

    #[track_caller]
    pub(crate) fn recv_option_reply(&mut self, option: u32) -> OptionReply {
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

    /// Sends an option and takes every reply to it; the final one is returned apart.
    #[track_caller]
    pub(crate) fn ask(&mut self, option: u32, data: &[u8]) -> (Vec<OptionReply>, u32) {
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

    /// The same, for options of which only the final answer matters.
    #[track_caller]
    pub(crate) fn ask_final(&mut self, option: u32, data: &[u8]) -> u32 {
        self.ask(option, data).1
    }

    /// Fails unless the haggling is still in step: an option known to be understood is answered.
    #[track_caller]
    pub(crate) fn still_haggles(&mut self) {
        assert_eq!(self.ask_final(OPT_LIST, &[]), REP_ACK, "LIST is answered, parsing went on");
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

pub(crate) fn encode_option(option: u32, data: &[u8]) -> Vec<u8> {
    encode_option_of_length(option, u32::try_from(data.len()).unwrap(), data)
}

/// An option whose header may lie about the length of its data.
pub(crate) fn encode_option_of_length(option: u32, length: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = I_HAVE_OPT.to_be_bytes().to_vec();
    bytes.extend(option.to_be_bytes());
    bytes.extend(length.to_be_bytes());
    bytes.extend(data);
    bytes
}

/// What a client that knows everything sends until GO, in one piece.
pub(crate) fn typical_handshake() -> Vec<u8> {
    [
        (FIXED_NEWSTYLE | NO_ZEROES).to_be_bytes().to_vec(),
        encode_option(OPT_STRUCTURED_REPLY, &[]),
        encode_option(OPT_SET_META_CONTEXT, &encode_meta(b"", &[ALLOCATION.as_bytes()])),
        encode_option(OPT_GO, &encode_go(b"", &[INFO_BLOCK_SIZE])),
    ]
    .concat()
}

/// The data of INFO and GO.
pub(crate) fn encode_go(name: &[u8], infos: &[u16]) -> Vec<u8> {
    let mut data = encode_string(name);
    data.extend(u16::try_from(infos.len()).unwrap().to_be_bytes());
    data.extend(infos.iter().flat_map(|i| i.to_be_bytes()));
    data
}

/// The data of LIST_META_CONTEXT and SET_META_CONTEXT.
pub(crate) fn encode_meta(name: &[u8], queries: &[&[u8]]) -> Vec<u8> {
    let mut data = encode_string(name);
    data.extend(u32::try_from(queries.len()).unwrap().to_be_bytes());
    data.extend(queries.iter().flat_map(|q| encode_string(q)));
    data
}

/// A string with its length of 32 bits before it.
pub(crate) fn encode_string(string: &[u8]) -> Vec<u8> {
    let mut data = u32::try_from(string.len()).unwrap().to_be_bytes().to_vec();
    data.extend(string);
    data
}

/// A compact request without its payload.
pub(crate) fn encode_request(
    command: u16,
    flags: u16,
    cookie: u64,
    offset: u64,
    length: u32,
) -> Vec<u8> {
    let mut bytes = REQUEST.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(command.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    bytes.extend(length.to_be_bytes());
    bytes
}

/// An extended request without its payload.
pub(crate) fn encode_extended_request(
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
