//! Replies of the transmission phase: encodes and decodes simple, structured and extended replies.
//! The data of a READ never passes through here, only its headers.

use super::bytes::Reader;
use super::wire::{
    CHUNK_ERROR_BIT, ChunkFlags, ChunkKind, EXTENDED_REPLY_MAGIC, ErrorCode, SIMPLE_REPLY_MAGIC,
    STRING_LENGTH_MAX, STRUCTURED_REPLY_MAGIC,
};
use super::{Decoded, Malformed};

/// The negotiated form of request headers and replies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dialect {
    /// Simple replies only.
    Simple,
    /// Structured chunks for READ and BLOCK_STATUS, simple replies for the rest.
    Structured,
    /// Extended headers: requests have 64-bit lengths, and every reply consists of extended chunks.
    Extended,
}

/// The header of a simple reply or of a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplyHeader {
    /// A simple reply. The data of a READ follows if the error is zero.
    Simple {
        /// Cookie of the request.
        cookie: u64,
        /// Zero, or an error value, known or unknown.
        error: u32,
    },
    /// A structured or extended chunk. `length` bytes of payload follow.
    Chunk {
        /// Cookie of the request.
        cookie: u64,
        /// Whether this is the last chunk of its reply.
        done: bool,
        /// Type of the chunk, known or unknown.
        kind: u16,
        /// Length of the payload in bytes; at most 2^32 - 1 in a structured chunk.
        length: u64,
        /// Offset of the request; in extended chunks only.
        offset: Option<u64>,
    },
}

impl ReplyHeader {
    /// Appends the header.
    pub fn encode(&self, out: &mut Vec<u8>) {
        match *self {
            Self::Simple { cookie, error } => {
                out.extend_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
                out.extend_from_slice(&error.to_be_bytes());
                out.extend_from_slice(&cookie.to_be_bytes());
            }
            Self::Chunk { cookie, done, kind, length, offset } => {
                let magic = offset.map_or(STRUCTURED_REPLY_MAGIC, |_| EXTENDED_REPLY_MAGIC);
                let flags = if done { ChunkFlags::DONE } else { ChunkFlags::empty() };
                out.extend_from_slice(&magic.to_be_bytes());
                out.extend_from_slice(&flags.bits().to_be_bytes());
                out.extend_from_slice(&kind.to_be_bytes());
                out.extend_from_slice(&cookie.to_be_bytes());
                if let Some(offset) = offset {
                    out.extend_from_slice(&offset.to_be_bytes());
                    out.extend_from_slice(&length.to_be_bytes());
                } else {
                    let length = u32::try_from(length).unwrap_or(u32::MAX);
                    out.extend_from_slice(&length.to_be_bytes());
                }
            }
        }
    }

    /// The header at the front of `bytes`.
    ///
    /// # Errors
    /// If the bytes do not begin with the magic number of a reply.
    pub fn decode(bytes: &[u8]) -> Decoded<Self> {
        let mut reader = Reader::new(bytes);
        let Some(magic) = reader.u32() else { return Ok(None) };
        let header = match magic {
            SIMPLE_REPLY_MAGIC => Self::simple(&mut reader),
            STRUCTURED_REPLY_MAGIC => Self::chunk(&mut reader, false),
            EXTENDED_REPLY_MAGIC => Self::chunk(&mut reader, true),
            _ => return Err(Malformed::Magic(u64::from(magic))),
        };
        Ok(header.map(|header| (header, reader.used())))
    }

    fn simple(reader: &mut Reader<'_>) -> Option<Self> {
        let error = reader.u32()?;
        Some(Self::Simple { cookie: reader.u64()?, error })
    }

    fn chunk(reader: &mut Reader<'_>, extended: bool) -> Option<Self> {
        let done = ChunkFlags::from_bits_truncate(reader.u16()?).contains(ChunkFlags::DONE);
        let kind = reader.u16()?;
        let cookie = reader.u64()?;
        let offset = if extended { Some(reader.u64()?) } else { None };
        let length = if extended { reader.u64()? } else { u64::from(reader.u32()?) };
        Some(Self::Chunk { cookie, done, kind, length, offset })
    }
}

/// The fields of a request that its replies need.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReplyTo {
    /// Cookie of the request.
    pub cookie: u64,
    /// Offset of the request.
    pub offset: u64,
    /// Whether structured replies to it are chunks: READ and BLOCK_STATUS.
    pub chunked: bool,
}

/// An extent of a metadata context: length in bytes, and status flags.
pub type StatusExtent = (u64, u32);

/// Maximum length of a 32-bit extent in bytes: the largest multiple of 4096.
pub const COMPACT_EXTENT_LENGTH_MAX: u64 = 0xffff_f000;

/// Encodes replies in this dialect: appends them to `out`.
impl Dialect {
    /// Success, without content.
    pub fn success(self, to: ReplyTo, out: &mut Vec<u8>) {
        if self.uses_chunks(to) {
            self.chunk(to, true, ChunkKind::None, 0, out);
        } else {
            ReplyHeader::Simple { cookie: to.cookie, error: 0 }.encode(out);
        }
    }

    /// Failure. `at` is the offset of the error, for a read that was replied to in part. Simple
    /// replies omit it and the message.
    pub fn failure(
        self,
        to: ReplyTo,
        code: ErrorCode,
        at: Option<u64>,
        message: &str,
        out: &mut Vec<u8>,
    ) {
        if !self.uses_chunks(to) {
            return ReplyHeader::Simple { cookie: to.cookie, error: code.number() }.encode(out);
        }
        let message = &message.as_bytes()[..message.len().min(STRING_LENGTH_MAX)];
        let kind = at.map_or(ChunkKind::Error, |_| ChunkKind::ErrorOffset);
        let length = 6 + message.len() + at.map_or(0, |_| 8);
        self.chunk(to, true, kind, length as u64, out);
        out.extend_from_slice(&code.number().to_be_bytes());
        // It fits: the message has at most 4096 bytes.
        out.extend_from_slice(&(message.len() as u16).to_be_bytes());
        out.extend_from_slice(message);
        if let Some(at) = at {
            out.extend_from_slice(&at.to_be_bytes());
        }
    }

    /// The header of `length` bytes of data at offset `at`. A simple reply has one header for all
    /// data of the request.
    pub fn data_header(self, to: ReplyTo, at: u64, length: u32, done: bool, out: &mut Vec<u8>) {
        if self.uses_chunks(to) {
            self.chunk(to, done, ChunkKind::OffsetData, 8 + u64::from(length), out);
            out.extend_from_slice(&at.to_be_bytes());
        } else {
            ReplyHeader::Simple { cookie: to.cookie, error: 0 }.encode(out);
        }
    }

    /// Length of [`Dialect::data_header`] in bytes.
    #[must_use]
    pub const fn data_header_length(self) -> usize {
        match self {
            Self::Simple => 16,
            Self::Structured => 28,
            Self::Extended => 40,
        }
    }

    /// `length` zeroes at offset `at`, without their data. Not valid in simple replies.
    pub fn hole(self, to: ReplyTo, at: u64, length: u32, done: bool, out: &mut Vec<u8>) {
        self.chunk(to, done, ChunkKind::OffsetHole, 12, out);
        out.extend_from_slice(&at.to_be_bytes());
        out.extend_from_slice(&length.to_be_bytes());
    }

    /// The extents of a metadata context, as the last chunk of the reply.
    ///
    /// Structured replies have 32-bit lengths: the first longer extent is clamped and ends the
    /// list, because the offset of an extent is the sum of the lengths before it.
    pub fn status(self, to: ReplyTo, context: u32, extents: &[StatusExtent], out: &mut Vec<u8>) {
        if self == Self::Extended {
            let length = 8 + 16 * extents.len() as u64;
            self.chunk(to, true, ChunkKind::BlockStatusExtended, length, out);
            out.extend_from_slice(&context.to_be_bytes());
            // It fits: a reply has at most 2^20 extents.
            out.extend_from_slice(&(extents.len() as u32).to_be_bytes());
            for (length, flags) in extents {
                out.extend_from_slice(&length.to_be_bytes());
                out.extend_from_slice(&u64::from(*flags).to_be_bytes());
            }
        } else {
            let fitting =
                extents.iter().take_while(|(length, _)| *length <= COMPACT_EXTENT_LENGTH_MAX);
            let count = extents.len().min(fitting.count() + 1);
            self.chunk(to, true, ChunkKind::BlockStatus, 4 + 8 * count as u64, out);
            out.extend_from_slice(&context.to_be_bytes());
            for (length, flags) in &extents[..count] {
                // It fits: it is clamped.
                let length = (*length).min(COMPACT_EXTENT_LENGTH_MAX) as u32;
                out.extend_from_slice(&length.to_be_bytes());
                out.extend_from_slice(&flags.to_be_bytes());
            }
        }
    }

    fn uses_chunks(self, to: ReplyTo) -> bool {
        self == Self::Extended || (self == Self::Structured && to.chunked)
    }

    fn chunk(self, to: ReplyTo, done: bool, kind: ChunkKind, length: u64, out: &mut Vec<u8>) {
        let offset = (self == Self::Extended).then_some(to.offset);
        ReplyHeader::Chunk { cookie: to.cookie, done, kind: kind.number(), length, offset }
            .encode(out);
    }
}

/// A decoded chunk, without the data of [`ChunkKind::OffsetData`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Chunk {
    /// No content.
    None,
    /// The rest of the payload is data.
    Data {
        /// Offset of the data on the disk, in bytes.
        offset: u64,
    },
    /// A range of zeroes.
    Hole {
        /// Offset on the disk, in bytes.
        offset: u64,
        /// Length in bytes.
        length: u32,
    },
    /// Extents of a metadata context.
    Status {
        /// Id of the context.
        context: u32,
        /// Consecutive extents from the offset of the request on.
        extents: Vec<StatusExtent>,
    },
    /// The request failed.
    Error {
        /// The error value.
        code: ErrorCode,
        /// The message of the server; may be empty.
        message: String,
        /// Offset of the error, if the server sent it.
        at: Option<u64>,
    },
}

impl Chunk {
    /// How many bytes of the payload are needed to decode a chunk of this kind and length: all, but
    /// only the offset before the data.
    #[must_use]
    pub fn needed(kind: u16, length: u64) -> u64 {
        if kind == ChunkKind::OffsetData.number() { length.min(8) } else { length }
    }

    /// Decodes a chunk of this kind and payload `length`, from the first [`Chunk::needed`] bytes of
    /// the payload.
    ///
    /// # Errors
    /// If the payload contradicts its kind, or the kind is unknown and not an error.
    pub fn decode(kind: u16, length: u64, payload: &[u8]) -> Result<Self, Malformed> {
        let bad_length = Malformed::Length(length);
        let mut reader = Reader::new(payload);
        match ChunkKind::try_from(kind) {
            Ok(ChunkKind::None) if length == 0 => Ok(Self::None),
            Ok(ChunkKind::OffsetData) if length > 8 => {
                Ok(Self::Data { offset: reader.u64().ok_or(bad_length)? })
            }
            Ok(ChunkKind::OffsetHole) if length == 12 => {
                Self::hole(&mut reader).ok_or(bad_length)?
            }
            Ok(ChunkKind::BlockStatus) => Self::status(&mut reader).ok_or(bad_length),
            Ok(ChunkKind::BlockStatusExtended) => {
                Self::status_extended(&mut reader).ok_or(bad_length)
            }
            Ok(ChunkKind::ErrorOffset) => Self::error(&mut reader, true).ok_or(bad_length)?,
            _ if kind & CHUNK_ERROR_BIT != 0 => {
                Self::error(&mut reader, false).ok_or(bad_length)?
            }
            _ => Err(bad_length),
        }
    }

    fn hole(reader: &mut Reader<'_>) -> Option<Result<Self, Malformed>> {
        let (offset, length) = (reader.u64()?, reader.u32()?);
        Some(if length == 0 { Err(Malformed::Zero) } else { Ok(Self::Hole { offset, length }) })
    }

    fn status(reader: &mut Reader<'_>) -> Option<Self> {
        let context = reader.u32()?;
        let mut extents = Vec::new();
        while !reader.rest().is_empty() {
            extents.push((u64::from(reader.u32()?), reader.u32()?));
        }
        are_valid(&extents).then_some(Self::Status { context, extents })
    }

    fn status_extended(reader: &mut Reader<'_>) -> Option<Self> {
        let (context, count) = (reader.u32()?, reader.u32()?);
        let mut extents = Vec::new();
        while !reader.rest().is_empty() {
            // No context that we select has flags beyond 32 bits.
            extents.push((reader.u64()?, reader.u64()? as u32));
        }
        (are_valid(&extents) && extents.len() as u64 == u64::from(count))
            .then_some(Self::Status { context, extents })
    }

    fn error(reader: &mut Reader<'_>, with_offset: bool) -> Option<Result<Self, Malformed>> {
        let number = reader.u32()?;
        let length = usize::from(reader.u16()?);
        let message = String::from_utf8_lossy(reader.take(length)?).into_owned();
        let at = if with_offset { Some(reader.u64()?) } else { None };
        Some(match (number, length) {
            (0, _) => Err(Malformed::Zero),
            (_, STRING_LENGTH_MAX..) if length > STRING_LENGTH_MAX => Err(Malformed::Text),
            _ => Ok(Self::Error { code: ErrorCode::from_wire(number), message, at }),
        })
    }
}

fn are_valid(extents: &[StatusExtent]) -> bool {
    !extents.is_empty() && extents.iter().all(|(length, _)| *length > 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TO: ReplyTo = ReplyTo { cookie: 0x1122_3344_5566_7788, offset: 512, chunked: true };

    fn chunk(bytes: &[u8]) -> Chunk {
        let (header, used) = ReplyHeader::decode(bytes).unwrap().unwrap();
        let ReplyHeader::Chunk { kind, length, .. } = header else {
            panic!("not a chunk: {header:?}")
        };
        let needed = usize::try_from(Chunk::needed(kind, length)).unwrap();
        Chunk::decode(kind, length, &bytes[used..][..needed]).unwrap()
    }

    #[test]
    fn chunks_follow_the_dialect() {
        for (dialect, chunked, simple) in [
            (Dialect::Simple, true, true),
            (Dialect::Structured, false, true),
            (Dialect::Structured, true, false),
            (Dialect::Extended, false, false),
        ] {
            let mut out = Vec::new();
            dialect.success(ReplyTo { chunked, ..TO }, &mut out);
            let header = ReplyHeader::decode(&out).unwrap().unwrap().0;
            assert_eq!(
                matches!(header, ReplyHeader::Simple { error: 0, .. }),
                simple,
                "{dialect:?}"
            );
        }
    }

    #[test]
    fn chunks_carry_message_and_offset_of_a_failure() {
        let mut out = Vec::new();
        Dialect::Simple.failure(TO, ErrorCode::Io, Some(9), "gone", &mut out);
        assert_eq!(
            ReplyHeader::decode(&out).unwrap().unwrap().0,
            ReplyHeader::Simple { cookie: TO.cookie, error: 5 }
        );
        for dialect in [Dialect::Structured, Dialect::Extended] {
            for at in [None, Some(600)] {
                let mut out = Vec::new();
                dialect.failure(TO, ErrorCode::NoSpace, at, "full", &mut out);
                let expected =
                    Chunk::Error { code: ErrorCode::NoSpace, message: "full".into(), at };
                assert_eq!(chunk(&out), expected);
            }
        }
    }

    #[test]
    fn error_messages_are_truncated_to_4096_bytes() {
        for length in [STRING_LENGTH_MAX, 5000] {
            let mut out = Vec::new();
            Dialect::Extended.failure(TO, ErrorCode::Io, None, &"x".repeat(length), &mut out);
            let Chunk::Error { message, .. } = chunk(&out) else { panic!("not an error") };
            assert_eq!(message.len(), STRING_LENGTH_MAX);
        }
    }

    #[test]
    fn data_header_length_matches_data_header() {
        for dialect in [Dialect::Simple, Dialect::Structured, Dialect::Extended] {
            let mut out = Vec::new();
            dialect.data_header(TO, 512, 4096, true, &mut out);
            assert_eq!(out.len(), dialect.data_header_length());
        }
    }

    #[test]
    fn a_clamped_extent_is_the_last() {
        let extents =
            [(COMPACT_EXTENT_LENGTH_MAX, 0), (COMPACT_EXTENT_LENGTH_MAX + 1, 3), (4096, 0)];
        let mut out = Vec::new();
        Dialect::Structured.status(TO, 1, &extents, &mut out);
        let expected = vec![(COMPACT_EXTENT_LENGTH_MAX, 0), (COMPACT_EXTENT_LENGTH_MAX, 3)];
        assert_eq!(chunk(&out), Chunk::Status { context: 1, extents: expected });
        let mut out = Vec::new();
        Dialect::Extended.status(TO, 1, &extents, &mut out);
        assert_eq!(chunk(&out), Chunk::Status { context: 1, extents: extents.to_vec() });
    }

    #[test]
    fn payloads_contradicting_their_kind_are_malformed() {
        let malformed =
            |kind: u16, payload: &[u8]| Chunk::decode(kind, payload.len() as u64, payload).is_err();
        assert!(malformed(ChunkKind::None.number(), &[0]));
        assert!(malformed(ChunkKind::OffsetData.number(), &[0; 8]));
        assert!(malformed(ChunkKind::OffsetHole.number(), &[0; 12]));
        assert!(malformed(ChunkKind::BlockStatus.number(), &[0; 4]));
        assert!(malformed(ChunkKind::BlockStatus.number(), &[1; 11]));
        assert!(malformed(ChunkKind::BlockStatusExtended.number(), &[1; 24]));
        assert!(malformed(ChunkKind::Error.number(), &[0; 6]));
        assert!(malformed(ChunkKind::Error.number(), &[0, 0, 0, 5, 0, 9, 1]));
        assert!(malformed(77, &[]));
        assert!(!malformed(CHUNK_ERROR_BIT + 99, &[0, 0, 0, 5, 0, 0]));
    }

    fn headers() -> impl Strategy<Value = ReplyHeader> {
        prop_oneof![
            (any::<u64>(), any::<u32>())
                .prop_map(|(cookie, error)| ReplyHeader::Simple { cookie, error }),
            (any::<u64>(), any::<bool>(), any::<u16>(), any::<u64>(), any::<Option<u64>>())
                .prop_map(|(cookie, done, kind, length, offset)| ReplyHeader::Chunk {
                    cookie,
                    done,
                    kind,
                    length: if offset.is_some() { length } else { length >> 32 },
                    offset,
                }),
        ]
    }

    proptest! {
        #[test]
        fn headers_round_trip_and_prefixes_are_incomplete(header in headers()) {
            let mut bytes = Vec::new();
            header.encode(&mut bytes);
            for end in 0..bytes.len() {
                prop_assert_eq!(ReplyHeader::decode(&bytes[..end]), Ok(None));
            }
            prop_assert_eq!(ReplyHeader::decode(&bytes), Ok(Some((header, bytes.len()))));
        }

        #[test]
        fn block_status_and_holes_round_trip(
            extents in prop::collection::vec((1..=COMPACT_EXTENT_LENGTH_MAX, any::<u32>()), 1..40),
            at: u64, length in 1u32.., context: u32, extended: bool,
        ) {
            let dialect = if extended { Dialect::Extended } else { Dialect::Structured };
            let mut out = Vec::new();
            dialect.status(TO, context, &extents, &mut out);
            prop_assert_eq!(chunk(&out), Chunk::Status { context, extents });
            out.clear();
            dialect.hole(TO, at, length, false, &mut out);
            prop_assert_eq!(chunk(&out), Chunk::Hole { offset: at, length });
        }

        #[test]
        fn decoders_never_panic(kind: u16, payload: Vec<u8>, claimed: u64) {
            let _ = Chunk::decode(kind, claimed, &payload);
            let _ = ReplyHeader::decode(&payload);
        }
    }
}
