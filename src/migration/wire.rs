//! Encodes and decodes the messages between two flexnbd that the NBD protocol does not have.
//! Never sends and never decides; every message has one encoding, of fixed size.
//!
//! # The private option
//!
//! During option haggling, before `NBD_OPT_GO`, a source sends the option [`OPTION`] with a
//! [`Question`] as its data. A server that does not support it replies `NBD_REP_ERR_UNSUP`, and
//! the source continues without it. A flexnbd replies with one [`REPLY`] that holds an [`Answer`],
//! then with `NBD_REP_ACK`; or with `NBD_REP_ERR_POLICY` while another migration is connected.
//!
//! | `Question` | bytes | | `Answer` | bytes |
//! |---|---|---|---|---|
//! | version, 1 | 4 | | version, 1 | 4 |
//! | disk size in bytes | 8 | | role: 1 listening, 2 serving | 1 |
//! | migration id | 16 | | has: 0 nothing, 1 incomplete, 2 arrived | 1 |
//! | | | | zero | 2 |
//! | | | | arrival token (zeros when serving) | 16 |
//!
//! After an answer, the source sends the option once more with a [`DiskIdMessage`] as its data: version 3 (4
//! bytes), and the id of the disk (16 bytes), which the destination keeps with its record. It is a message of
//! its own because the others have no room, and every earlier flexnbd refuses one with more bytes. The reply
//! is the version, 3. A destination that does not know this message replies `NBD_REP_ERR_INVALID`, and the
//! source continues: the disk then has no id there.
//!
//! # The private command
//!
//! After the private option, the request type [`COMMAND`] carries a payload as `NBD_CMD_WRITE`
//! does: its length field is [`Handover::LENGTH`] (with extended headers `NBD_CMD_FLAG_PAYLOAD_LEN`
//! is set), its offset is 0, and a [`Handover`] follows: version (4 bytes), migration id (16),
//! arrival token (16). The reply has no payload. Success means that the disk is durable at the
//! destination and recorded there as its own.
//!
//! All numbers are big-endian, as everywhere in NBD.

use crate::disk::ownership::Id;
use crate::ids::DiskId;
use std::fmt;

/// Number of the private option.
pub const OPTION: u32 = crate::nbd::wire::PRIVATE_OPTION;
/// Type of the private option reply that holds an [`Answer`].
pub const REPLY: u32 = OPTION;
/// Type of the private request that holds a [`Handover`].
pub const COMMAND: u16 = crate::nbd::wire::PRIVATE_COMMAND;
/// Version of the other three messages.
pub const VERSION: u32 = 1;
/// Version of [`DiskIdMessage`]. (Version 2 is a client's: `nbd/introduction`.)
pub const DISK_ID_VERSION: u32 = 3;

/// Identifies one destination process: 128 random bits, drawn when it starts.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Token(pub [u8; 16]);

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Token({:032x})", u128::from_be_bytes(self.0))
    }
}

/// Introduces a source, and asks whether its disk has arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Question {
    /// Size of the source's disk in bytes.
    pub size: u64,
    /// The migration.
    pub id: Id,
}

/// Describes the answering process, and its copy of the migration's disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The token of a process that listens for a disk; `None` if it serves one.
    pub listening: Option<Token>,
    /// The state of its copy.
    pub has: Has,
}

/// The state of the destination's copy of a migration's disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Has {
    /// No copy, or one of another migration.
    Nothing,
    /// An incomplete copy. Every earlier connection of that migration is closed for good: no
    /// request sent on one can make the disk arrive any more.
    Incomplete,
    /// The whole disk, durable and owned by the destination.
    Arrived,
}

/// Tells the destination the id of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskIdMessage(pub DiskId);

/// Gives the complete disk to the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Handover {
    /// The migration.
    pub id: Id,
    /// The destination process.
    pub token: Token,
}

/// Why a message is invalid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// The message ends too early.
    #[error("a private message that ends too early")]
    Incomplete,
    /// More bytes than the message has.
    #[error("a private message that is too long")]
    TooLong,
    /// An unknown version.
    #[error("a private message of version {0}; we know version {VERSION}")]
    Version(u32),
    /// A field has an invalid value.
    #[error("a private message with a value that cannot be")]
    Value,
}

impl Question {
    /// Bytes of an encoded question.
    pub const LENGTH: usize = 28;

    /// Encodes the option data.
    #[must_use]
    pub fn encode(&self) -> [u8; Self::LENGTH] {
        let mut bytes = [0; Self::LENGTH];
        bytes[..4].copy_from_slice(&VERSION.to_be_bytes());
        bytes[4..12].copy_from_slice(&self.size.to_be_bytes());
        bytes[12..].copy_from_slice(&self.id.0);
        bytes
    }

    /// Decodes the option data.
    ///
    /// # Errors
    /// See [`WireError`]; the reply is then `NBD_REP_ERR_INVALID`.
    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        let mut fields = MessageReader::versioned(bytes)?;
        let size = u64::from_be_bytes(fields.take()?);
        let id = Id(fields.take()?);
        fields.end(Self { size, id })
    }
}

impl Answer {
    /// Whether no copy can follow: the process serves a disk, or the disk has arrived.
    #[must_use]
    pub fn is_final(&self) -> bool {
        self.listening.is_none() || self.has == Has::Arrived
    }

    /// Bytes of an encoded answer.
    pub const LENGTH: usize = 24;
    const LISTENING: u8 = 1;
    const SERVING: u8 = 2;

    /// Encodes the data of the option reply.
    #[must_use]
    pub fn encode(&self) -> [u8; Self::LENGTH] {
        let mut bytes = [0; Self::LENGTH];
        bytes[..4].copy_from_slice(&VERSION.to_be_bytes());
        bytes[4] = if self.listening.is_some() { Self::LISTENING } else { Self::SERVING };
        bytes[5] = self.has as u8;
        if let Some(token) = self.listening {
            bytes[8..].copy_from_slice(&token.0);
        }
        bytes
    }

    /// Decodes the data of the option reply.
    ///
    /// # Errors
    /// See [`WireError`]; no disk may then be copied to this server.
    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        let mut fields = MessageReader::versioned(bytes)?;
        let [role, has, zero, nil] = fields.take()?;
        let token = Token(fields.take()?);
        let has = match has {
            0 => Has::Nothing,
            1 => Has::Incomplete,
            2 => Has::Arrived,
            _ => return Err(WireError::Value),
        };
        let listening = match (role, token) {
            (Self::LISTENING, token) => Some(token),
            (Self::SERVING, Token(zeros)) if zeros == [0; 16] => None,
            _ => return Err(WireError::Value),
        };
        if [zero, nil] != [0, 0] {
            return Err(WireError::Value);
        }
        fields.end(Self { listening, has })
    }
}

impl DiskIdMessage {
    /// Bytes of an encoded message.
    pub const LENGTH: usize = 20;

    /// Encodes the option data.
    #[must_use]
    pub fn encode(&self) -> [u8; Self::LENGTH] {
        let mut bytes = [0; Self::LENGTH];
        bytes[..4].copy_from_slice(&DISK_ID_VERSION.to_be_bytes());
        bytes[4..].copy_from_slice(&self.0.0);
        bytes
    }

    /// Decodes the option data; `None` for any other message.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let id = bytes.strip_prefix(&DISK_ID_VERSION.to_be_bytes())?;
        Some(Self(DiskId(id.try_into().ok()?)))
    }

    /// The data of the reply.
    #[must_use]
    pub fn reply() -> [u8; 4] {
        DISK_ID_VERSION.to_be_bytes()
    }
}

impl Handover {
    /// Bytes of an encoded handover.
    pub const LENGTH: usize = 36;

    /// Encodes the payload of the request.
    #[must_use]
    pub fn encode(&self) -> [u8; Self::LENGTH] {
        let mut bytes = [0; Self::LENGTH];
        bytes[..4].copy_from_slice(&VERSION.to_be_bytes());
        bytes[4..20].copy_from_slice(&self.id.0);
        bytes[20..].copy_from_slice(&self.token.0);
        bytes
    }

    /// Decodes the payload of the request.
    ///
    /// # Errors
    /// See [`WireError`]; the reply is then `EINVAL`.
    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        let mut fields = MessageReader::versioned(bytes)?;
        let id = Id(fields.take()?);
        let token = Token(fields.take()?);
        fields.end(Self { id, token })
    }
}

/// The unread rest of a message.
struct MessageReader<'a>(&'a [u8]);

impl<'a> MessageReader<'a> {
    /// Reads the version, which comes first in every message of any version.
    fn versioned(bytes: &'a [u8]) -> Result<Self, WireError> {
        let mut fields = Self(bytes);
        match u32::from_be_bytes(fields.take()?) {
            VERSION => Ok(fields),
            other => Err(WireError::Version(other)),
        }
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        let (first, rest) = self.0.split_first_chunk().ok_or(WireError::Incomplete)?;
        self.0 = rest;
        Ok(*first)
    }

    fn end<T>(self, value: T) -> Result<T, WireError> {
        if self.0.is_empty() { Ok(value) } else { Err(WireError::TooLong) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn any_has() -> impl Strategy<Value = Has> {
        prop_oneof![Just(Has::Nothing), Just(Has::Incomplete), Just(Has::Arrived)]
    }

    /// Decodes all bytes, every shorter prefix (incomplete), and one byte more (too long).
    fn assert_fixed_size<T: PartialEq + std::fmt::Debug>(
        value: T,
        bytes: &[u8],
        decode: fn(&[u8]) -> Result<T, WireError>,
    ) {
        for keep in 0..bytes.len() {
            assert_eq!(decode(&bytes[..keep]), Err(WireError::Incomplete), "first {keep} bytes");
        }
        assert_eq!(decode(bytes), Ok(value));
        assert_eq!(decode(&[bytes, &[0]].concat()), Err(WireError::TooLong));
    }

    #[test]
    fn message_of_another_version_is_detected() {
        let mut bytes = Handover { id: Id([1; 16]), token: Token([2; 16]) }.encode();
        bytes[3] = 2;
        assert_eq!(Handover::decode(&bytes), Err(WireError::Version(2)));
        assert_eq!(Handover::decode(&bytes[..9]), Err(WireError::Version(2)));
    }

    #[test]
    fn answer_with_an_invalid_field_is_refused() {
        let good = Answer { listening: Some(Token([7; 16])), has: Has::Arrived }.encode();
        for (at, value) in [(4, 0), (4, 3), (5, 3), (6, 1), (7, 1), (4, 2)] {
            let mut bad = good;
            bad[at] = value;
            assert_eq!(Answer::decode(&bad), Err(WireError::Value), "byte {at} = {value}");
        }
    }

    #[test]
    fn encoding_matches_the_module_documentation() {
        let question = Question { size: 0x0102, id: Id([9; 16]) };
        let expected = [&[0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 2][..], &[9; 16]].concat();
        assert_eq!(question.encode().as_slice(), expected);
        let answer = Answer { listening: None, has: Has::Arrived };
        assert_eq!(answer.encode()[..8], [0, 0, 0, 1, 2, 2, 0, 0]);
    }

    #[test]
    fn disk_id_decodes_at_its_size_only() {
        let message = DiskIdMessage(DiskId([7; 16]));
        let bytes = message.encode();
        assert_eq!(bytes.as_slice(), [&[0, 0, 0, 3][..], &[7; 16]].concat());
        assert_eq!(DiskIdMessage::decode(&bytes), Some(message));
        assert_eq!(DiskIdMessage::decode(&bytes[..19]), None);
        assert_eq!(DiskIdMessage::decode(&[&bytes[..], &[0]].concat()), None);
        assert_eq!(Question::decode(&bytes), Err(WireError::Version(3)));
        let question = Question { size: 1, id: Id([7; 16]) };
        assert_eq!(DiskIdMessage::decode(&question.encode()), None);
    }

    proptest! {
        #[test]
        fn question_decodes_at_its_size_only(size: u64, id: [u8; 16]) {
            let question = Question { size, id: Id(id) };
            assert_fixed_size(question, &question.encode(), Question::decode);
        }

        #[test]
        fn answer_decodes_at_its_size_only(token: Option<[u8; 16]>, has in any_has()) {
            let answer = Answer { listening: token.map(Token), has };
            assert_fixed_size(answer, &answer.encode(), Answer::decode);
        }

        #[test]
        fn handover_decodes_at_its_size_only(id: [u8; 16], token: [u8; 16]) {
            let handover = Handover { id: Id(id), token: Token(token) };
            assert_fixed_size(handover, &handover.encode(), Handover::decode);
        }

        #[test]
        fn no_bytes_make_decoding_panic(bytes in proptest::collection::vec(any::<u8>(), 0..40)) {
            let _ = Question::decode(&bytes);
            let _ = Answer::decode(&bytes);
            let _ = Handover::decode(&bytes);
        }
    }
}
