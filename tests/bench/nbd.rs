//! The NBD client side that both benchmarks share: connect, handshake, request headers.

use super::Error;
use super::process::PATIENCE;
use flexnbd::nbd::wire::{
    ClientFlags, CommandKind, ErrorCode, GREETING_MAGIC, HandshakeFlags, OPTION_MAGIC, OptionKind,
    REQUEST_MAGIC, RESERVED_ZEROES, SIMPLE_REPLY_MAGIC,
};
use flexnbd::net::Stream;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

/// Length of a compact request without data, in bytes.
pub(super) const REQUEST_LENGTH: usize = 28;
/// Length of a simple reply without data, in bytes.
pub(super) const REPLY_LENGTH: usize = 16;

#[derive(Clone, Debug)]
pub(super) struct Export {
    pub(super) address: Address,
    pub(super) name: &'static str,
}

#[derive(Clone, Debug)]
pub(super) enum Address {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

impl Address {
    pub(super) fn connect(&self) -> io::Result<Stream> {
        let stream = match self {
            Self::Tcp(address) => Stream::Tcp(TcpStream::connect(address)?),
            Self::Unix(path) => Stream::Unix(UnixStream::connect(path)?),
        };
        stream.tune()?;
        Ok(stream)
    }
}

impl Export {
    pub(super) fn uri(&self) -> String {
        match &self.address {
            Address::Tcp(address) => format!("nbd://{address}/{}", self.name),
            Address::Unix(path) => format!("nbd+unix:///{}?socket={}", self.name, path.display()),
        }
    }

    /// Connects and negotiates with `NBD_OPT_EXPORT_NAME`, which every server supports. Returns the
    /// connection and the size of the export in bytes.
    pub(super) fn open(&self) -> Result<(Stream, u64), Error> {
        let stream = self.address.connect()?;
        let mut greeting = [0; 18];
        stream.recv_exact(&mut greeting, PATIENCE)?;
        let [magic @ .., flags_high, flags_low] = greeting;
        if magic[..] != [GREETING_MAGIC.to_be_bytes(), OPTION_MAGIC.to_be_bytes()].concat() {
            return Err("the server does not speak newstyle".into());
        }
        let offered = u16::from_be_bytes([flags_high, flags_low]);
        let no_zeroes =
            HandshakeFlags::from_bits_truncate(offered).contains(HandshakeFlags::NO_ZEROES);
        let mut flags = ClientFlags::FIXED_NEWSTYLE;
        flags.set(ClientFlags::NO_ZEROES, no_zeroes);
        let mut option = flags.bits().to_be_bytes().to_vec();
        option.extend(OPTION_MAGIC.to_be_bytes());
        option.extend(OptionKind::ExportName.number().to_be_bytes());
        option.extend((self.name.len() as u32).to_be_bytes());
        option.extend(self.name.as_bytes());
        stream.send_all(&option, PATIENCE)?;
        let mut reply = [0; 10];
        stream.recv_exact(&mut reply, PATIENCE)?;
        if !no_zeroes {
            stream.recv_exact(&mut [0; RESERVED_ZEROES], PATIENCE)?;
        }
        let [size @ .., _, _] = reply;
        Ok((stream, u64::from_be_bytes(size)))
    }
}

/// A compact request without data. The server returns the cookie in its reply.
pub(super) fn encode(
    kind: CommandKind,
    cookie: u64,
    offset: u64,
    length: usize,
) -> [u8; REQUEST_LENGTH] {
    let mut header = [0; REQUEST_LENGTH];
    header[0..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
    header[6..8].copy_from_slice(&kind.number().to_be_bytes());
    header[8..16].copy_from_slice(&cookie.to_be_bytes());
    header[16..24].copy_from_slice(&offset.to_be_bytes());
    header[24..28].copy_from_slice(&(length as u32).to_be_bytes());
    header
}

/// The cookie of a simple reply; an error unless the request succeeded.
pub(super) fn cookie(reply: [u8; REPLY_LENGTH]) -> Result<u64, Error> {
    let [m0, m1, m2, m3, e0, e1, e2, e3, cookie @ ..] = reply;
    let magic = u32::from_be_bytes([m0, m1, m2, m3]);
    if magic != SIMPLE_REPLY_MAGIC {
        return Err(format!("the server sent {magic:#x} in place of a simple reply").into());
    }
    match u32::from_be_bytes([e0, e1, e2, e3]) {
        0 => Ok(u64::from_be_bytes(cookie)),
        error => Err(format!("a request failed: {}", ErrorCode::from_wire(error)).into()),
    }
}
