//! The introduction of a client that reconnects, as data of the private option ([`super::wire::PRIVATE_OPTION`]):
//! version 2 of its messages. (Version 1 is a migration's: `migration/wire`.)
//! Pure.
//!
//! A client that has lost its connections sends its requests again over new ones. The server may still
//! execute those of the old connections, and then they would overwrite later ones. So a client tells that it
//! is the same one, and that the connections of earlier generations are lost; the server ends their
//! sessions, and replies when none of them executes anything any more.
//!
//! | message | bytes | | reply | bytes |
//! |---|---|---|---|---|
//! | version, 2 | 4 | | version, 2 | 4 |
//! | generation | 8 | | | |
//! | client | 16 | | | |
//!
//! A server that knows no private option replies `NBD_REP_ERR_UNSUP`, and the client goes on without it.

use super::bytes::Reader;

/// The version of the messages.
const VERSION: u32 = 2;

/// Introduces one of the connections of a client. All numbers are big-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Introduction {
    /// Random number of the client, the same for all its connections.
    pub client: [u8; 16],
    /// Grows whenever the client has lost its connections.
    pub generation: u64,
}

impl Introduction {
    /// Length of the message in bytes.
    pub const LENGTH: usize = 28;

    /// Encodes the option data.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let version = VERSION.to_be_bytes();
        [&version[..], &self.generation.to_be_bytes(), &self.client].concat()
    }

    /// Decodes the option data; `None` for any other message.
    #[must_use]
    pub fn decode(data: &[u8]) -> Option<Self> {
        let mut reader = Reader::new(data);
        if reader.u32()? != VERSION {
            return None;
        }
        let generation = reader.u64()?;
        let client = reader.rest().try_into().ok()?;
        Some(Self { client, generation })
    }

    /// The data of the reply.
    #[must_use]
    pub fn reply() -> Vec<u8> {
        VERSION.to_be_bytes().to_vec()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_introduction_has_one_encoding() {
        let introduction = Introduction { client: *b"0123456789abcdef", generation: 258 };
        let bytes = introduction.encode();
        assert_eq!(bytes, b"\0\0\0\x02\0\0\0\0\0\0\x01\x020123456789abcdef");
        assert_eq!((bytes.len(), Introduction::decode(&bytes)), (28, Some(introduction)));
        assert_eq!(Introduction::decode(&bytes[..27]), None);
        assert_eq!(Introduction::decode(&[&bytes[..], &[0]].concat()), None);
        assert_eq!(Introduction::decode(&[&[0, 0, 0, 1], &bytes[4..]].concat()), None);
        assert_eq!(Introduction::reply(), [0, 0, 0, 2]);
    }
}
