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
//! | client | 16 | | disk id, if the server knows it | 16 |
//!
//! A server that knows no private option replies `NBD_REP_ERR_UNSUP`, and the client goes on without it.
//! Clients that do not know the disk id ignore the end of the reply.
//!
//! The id of the disk is in this reply, rather than the name of a metadata context (`NBD_OPT_LIST_META_CONTEXT`
//! with a namespace of ours): only clients that reconnect need it, and they introduce themselves. So it takes no
//! further exchange of messages while requests wait for the connection, no structured replies, and no other
//! client finds a context that it cannot use.

use super::bytes::Reader;
use crate::ids::DiskId;

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

    /// The data of the reply of a server with this disk.
    #[must_use]
    pub fn reply(disk_id: Option<DiskId>) -> Vec<u8> {
        let id = disk_id.map_or_else(Vec::new, |DiskId(id)| id.to_vec());
        [&VERSION.to_be_bytes()[..], &id].concat()
    }

    /// The id of the disk in the data of a reply; `None` in any other data.
    #[must_use]
    pub fn disk_id_in(reply: &[u8]) -> Option<DiskId> {
        let mut reader = Reader::new(reply);
        let is_ours = reader.u32()? == VERSION;
        let id = reader.rest().try_into().ok()?;
        is_ours.then_some(DiskId(id))
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
    }

    #[test]
    fn a_reply_holds_the_disk_id_if_it_is_known() {
        assert_eq!(Introduction::reply(None), [0, 0, 0, 2]);
        let id = DiskId(*b"0123456789abcdef");
        let reply = Introduction::reply(Some(id));
        assert_eq!(reply, b"\0\0\0\x020123456789abcdef");
        assert_eq!(Introduction::disk_id_in(&reply), Some(id));
        for other in [
            &reply[..4],
            &reply[..19],
            &[&reply[..], &[0]].concat(),
            &[&[1], &reply[1..]].concat(),
            b"",
        ] {
            assert_eq!(Introduction::disk_id_in(other), None, "{other:?}");
        }
    }
}
