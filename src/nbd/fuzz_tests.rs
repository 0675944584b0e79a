//! Fuzz target of single messages (`tests/fuzz`): headers and chunks of the transmission phase, and the
//! introduction of a client. A decoded value encodes to the same bytes, as far as its fields are known.

use super::introduction::Introduction;
use super::reply::{Chunk, Dialect, ReplyHeader};
use super::request::RequestHeader;

/// Decodes the bytes as each message.
pub(crate) fn messages(bytes: &[u8]) {
    let mut encoded = Vec::new();
    for dialect in [Dialect::Simple, Dialect::Extended] {
        if let Ok(Some((header, used))) = RequestHeader::decode(dialect, bytes) {
            encoded.clear();
            header.encode(dialect, &mut encoded);
            assert_eq!(encoded, bytes[..used]);
        }
    }
    if let Ok(Some((header, used))) = ReplyHeader::decode(bytes) {
        encoded.clear();
        header.encode(&mut encoded);
        // Unknown flags are ignored.
        assert_eq!(ReplyHeader::decode(&encoded), Ok(Some((header, used))));
        if let ReplyHeader::Chunk { kind, length, .. } = header {
            let rest = &bytes[used..];
            let needed = usize::try_from(Chunk::needed(kind, length)).unwrap_or(usize::MAX);
            if let Some(payload) = rest.get(..needed) {
                check_chunk(kind, length, payload);
            }
        }
    }
    if let Some(introduction) = Introduction::decode(bytes) {
        assert_eq!(introduction.encode(), bytes);
    }
}

fn check_chunk(kind: u16, length: u64, payload: &[u8]) {
    match Chunk::decode(kind, length, payload) {
        Ok(Chunk::Status { extents, .. }) => {
            assert!(extents.len() * 8 <= payload.len(), "more extents than bytes");
            assert!(extents.iter().all(|(length, _)| *length > 0));
        }
        Ok(Chunk::Error { message, .. }) => assert!(message.len() <= 3 * payload.len()),
        Ok(Chunk::Hole { length, .. }) => assert!(length > 0),
        Ok(Chunk::None | Chunk::Data { .. }) | Err(_) => {}
    }
}
