//! NBD as both benchmarks speak it: addresses, and requests in flight with simple replies.

use crate::process::PATIENCE;
use crate::report::Error;
use flexnbd::client::{Connection, shake_hands};
use flexnbd::nbd::handshake::client::ClientOffer;
use flexnbd::nbd::reply::{Dialect, ReplyHeader};
use flexnbd::nbd::request::RequestHeader;
use flexnbd::nbd::wire::{CommandKind, ErrorCode};
use flexnbd::net::tls::ClientTls;
use flexnbd::net::{Address, Stream, connect};

/// Length of a simple reply without data, in bytes.
pub(crate) const REPLY_LENGTH: usize = 16;

/// A disk that a server exports.
#[derive(Clone, Debug)]
pub(crate) struct Export {
    pub(crate) address: Address,
    pub(crate) name: &'static str,
    /// The TLS of clients; `None` for none.
    pub(crate) tls: Option<ClientTls>,
}

impl Export {
    pub(crate) fn uri(&self) -> String {
        let scheme = if self.tls.is_some() { "nbds" } else { "nbd" };
        match &self.address {
            Address::Tcp(address) => format!("{scheme}://{address}/{}", self.name),
            Address::Unix(path) => {
                format!("{scheme}+unix:///{}?socket={}", self.name, path.display())
            }
        }
    }

    /// A connection for one request at a time.
    pub(crate) fn open(&self) -> Result<Connection, Error> {
        Ok(Connection::open(self.connect()?, self.name, self.tls.as_ref(), PATIENCE)?)
    }

    /// A stream for many requests in flight, and the size of the export in bytes.
    pub(crate) fn open_stream(&self) -> Result<(Stream, u64), Error> {
        let stream = self.connect()?;
        let offer = ClientOffer { export: self.name.to_owned(), ..ClientOffer::default() };
        let (stream, agreement) = shake_hands(stream, offer, self.tls.as_ref(), PATIENCE).agreed?;
        Ok((stream, agreement.size))
    }

    pub(crate) fn connect(&self) -> Result<Stream, Error> {
        let stream = connect(&self.address, None, PATIENCE)?;
        stream.tune()?;
        Ok(stream)
    }
}

/// Replaces `out` by a request without its data. The server returns the cookie in its reply.
pub(crate) fn encode(
    kind: CommandKind,
    cookie: u64,
    offset: u64,
    length: usize,
    out: &mut Vec<u8>,
) {
    out.clear();
    let (kind, length) = (kind.number(), length as u64);
    RequestHeader { flags: 0, kind, cookie, offset, length }.encode(Dialect::Simple, out);
}

/// The cookie of a simple reply; an error unless the request succeeded.
pub(crate) fn cookie(reply: &[u8]) -> Result<u64, Error> {
    match ReplyHeader::decode(reply)? {
        Some((ReplyHeader::Simple { cookie, error: 0 }, _)) => Ok(cookie),
        Some((ReplyHeader::Simple { error, .. }, _)) => {
            Err(format!("a request failed: {}", ErrorCode::from_wire(error)).into())
        }
        _ => Err("the server sent no simple reply".into()),
    }
}
