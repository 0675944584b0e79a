//! The bytes to be sent over one connection.
//! Pure: the link sends what [`UpstreamTx::slices`] returns.

use super::machine::{OutgoingMessage, PayloadPart};
use crate::nbd::reply::Dialect;
use std::collections::VecDeque;
use std::io::IoSlice;

/// Bytes that may wait to be sent before the next message is encoded. The last message may exceed it.
pub(super) const PENDING_MAX: usize = 256 << 10;
/// Payloads of at most this length are copied behind their header, in bytes.
const COPIED_MAX: usize = 1 << 10;
/// Length from which a piece of headers and short payloads gets no more of them, in bytes: a piece is freed
/// when all of it is sent.
const PIECE_MAX: usize = 64 << 10;
/// Most pieces of one call.
const SLICES_MAX: usize = 64;

/// The sending side of a connection.
#[derive(Debug)]
pub(super) struct UpstreamTx {
    dialect: Dialect,
    pieces: VecDeque<TxPiece>,
    /// Bytes of the first piece that are sent.
    sent: usize,
    pending: usize,
}

#[derive(Debug)]
enum TxPiece {
    /// Headers, and short payloads.
    Bytes(Vec<u8>),
    Payload(PayloadPart),
}

impl TxPiece {
    fn bytes(&self) -> &[u8] {
        match self {
            Self::Bytes(bytes) => bytes,
            Self::Payload(payload) => payload.bytes(),
        }
    }
}

impl UpstreamTx {
    /// Nothing to be sent.
    #[must_use]
    pub(super) fn new(dialect: Dialect) -> Self {
        Self { dialect, pieces: VecDeque::new(), sent: 0, pending: 0 }
    }

    /// Whether no message should be added.
    #[must_use]
    pub(super) fn is_full(&self) -> bool {
        self.pending >= PENDING_MAX
    }

    /// Whether everything is sent.
    #[must_use]
    pub(super) fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// Adds a message.
    pub(super) fn push(&mut self, message: OutgoingMessage) {
        let has_room =
            |piece: &TxPiece| matches!(piece, TxPiece::Bytes(bytes) if bytes.len() < PIECE_MAX);
        if !self.pieces.back().is_some_and(has_room) {
            self.pieces.push_back(TxPiece::Bytes(Vec::new()));
        }
        let Some(TxPiece::Bytes(bytes)) = self.pieces.back_mut() else { return };
        let before = bytes.len();
        message.header.encode(self.dialect, bytes);
        let short = message.payload.as_ref().filter(|payload| payload.length <= COPIED_MAX);
        if let Some(payload) = short {
            bytes.extend_from_slice(payload.bytes());
        }
        self.pending += bytes.len() - before;
        if let Some(payload) = message.payload
            && payload.length > COPIED_MAX
        {
            self.pending += payload.length;
            self.pieces.push_back(TxPiece::Payload(payload));
        }
    }

    /// The next bytes to send, in order.
    #[must_use]
    pub(super) fn slices(&self) -> Vec<IoSlice<'_>> {
        let pieces = self.pieces.iter().take(SLICES_MAX).enumerate();
        let skip = |nth: usize| if nth == 0 { self.sent } else { 0 };
        pieces.map(|(nth, piece)| IoSlice::new(&piece.bytes()[skip(nth)..])).collect()
    }

    /// `count` bytes have been sent.
    pub(super) fn sent(&mut self, count: usize) {
        self.pending -= count;
        self.sent += count;
        while let Some(piece) = self.pieces.front()
            && self.sent >= piece.bytes().len()
        {
            self.sent -= piece.bytes().len();
            self.pieces.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::Buffer;
    use crate::nbd::request::RequestHeader;
    use std::sync::Arc;

    fn message(cookie: u64, length: usize) -> OutgoingMessage {
        let header = RequestHeader { flags: 0, kind: 1, cookie, offset: 7, length: length as u64 };
        let bytes: Vec<u8> = (0..length + 5).map(|at| (at as u64 * 7 + cookie) as u8).collect();
        let data = Arc::new(Buffer::from(bytes));
        let payload = (length > 0).then_some(PayloadPart { data, start: 5, length });
        OutgoingMessage { header, payload, is_of_session: true }
    }

    #[test]
    fn bytes_leave_in_order_whatever_a_call_sends() {
        for seed in 0..200 {
            let mut rng = fastrand::Rng::with_seed(seed);
            let mut tx = UpstreamTx::new(Dialect::Structured);
            let (mut expected, mut sent) = (Vec::new(), Vec::new());
            for cookie in 0..20 {
                if rng.bool() {
                    let length = [0, 1, COPIED_MAX, COPIED_MAX + 1, 5000][rng.usize(..5)];
                    let message = message(cookie, length);
                    message.header.encode(Dialect::Structured, &mut expected);
                    expected.extend(message.payload.iter().flat_map(|payload| payload.bytes()));
                    tx.push(message);
                }
                while !tx.is_empty() && rng.u8(..4) > 0 {
                    let bytes: Vec<u8> =
                        tx.slices().iter().flat_map(|slice| slice.to_vec()).collect();
                    assert!(!bytes.is_empty());
                    let count = rng.usize(1..=bytes.len());
                    sent.extend_from_slice(&bytes[..count]);
                    tx.sent(count);
                }
            }
            while !tx.is_empty() {
                let count = tx.slices().iter().map(|slice| slice.len()).sum();
                sent.extend(tx.slices().iter().flat_map(|slice| slice.to_vec()));
                tx.sent(count);
            }
            assert!(sent == expected, "seed {seed}");
            assert_eq!(tx.pending, 0);
        }
    }

    #[test]
    fn it_is_full_at_its_limit() {
        let mut tx = UpstreamTx::new(Dialect::Simple);
        tx.push(message(0, PENDING_MAX - 29));
        assert!(!tx.is_full());
        tx.sent(1);
        tx.push(message(1, 0));
        assert!(tx.is_full());
    }

    #[test]
    fn sent_bytes_are_freed_although_more_are_added() {
        let mut tx = UpstreamTx::new(Dialect::Structured);
        for cookie in 0..100_000 {
            tx.push(message(cookie, 0));
            // One message stays.
            if cookie > 0 {
                tx.sent(28);
            }
        }
        let kept: usize = tx.pieces.iter().map(|piece| piece.bytes().len()).sum();
        assert!((28..PIECE_MAX + 2 * 28).contains(&kept), "{kept}");
        assert_eq!(tx.pending, 28);
    }
}
