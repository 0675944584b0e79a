//! What a server answers during transmission: simple, structured and extended replies ⇄ bytes.
//! Data itself never passes through here; only what stands around it does.

use super::bytes::Reader;
use super::wire::{
    CHUNK_ERROR_BIT, ChunkFlags, ChunkKind, EXTENDED_REPLY_MAGIC, ErrorCode, SIMPLE_REPLY_MAGIC,
    STRING_LENGTH_MAX, STRUCTURED_REPLY_MAGIC,
};
use super::{Decoded, Malformed};

/// The form of replies and request headers that was agreed on in the handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dialect {
    /// Simple replies only.
    Simple,
    /// Reads and block status are answered in structured chunks, the rest simply.
    Structured,
    /// Requests have 64-bit lengths and every reply is made of extended chunks.
    Extended,
}

/// What stands at the front of every reply or chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Head {
    /// A simple reply; behind it the data of a read, if the error is zero.
    Simple {
        /// Of the request.
        cookie: u64,
        /// Zero, or an error as it stands on the wire.
        error: u32,
    },
    /// A chunk, structured or extended; behind it `length` bytes of payload.
    Chunk {
        /// Of the request.
        cookie: u64,
        /// Whether this chunk is the last one of its reply.
        done: bool,
        /// Number of the chunk's kind, also an unknown one.
        kind: u16,
        /// Of the payload in bytes; at most 2^32 - 1 in a structured chunk.
        length: u64,
        /// The request's offset; extended chunks repeat it.
        offset: Option<u64>,
    },
}

impl Head {
    /// Appends the head.
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

    /// The head at the front of `bytes`.
    ///
    /// # Errors
    /// When the bytes begin with no reply's magic number.
    pub fn decode(bytes: &[u8]) -> Decoded<Self> {
        let mut reader = Reader::new(bytes);
        let Some(magic) = reader.u32() else { return Ok(None) };
        let head = match magic {
            SIMPLE_REPLY_MAGIC => Self::simple(&mut reader),
            STRUCTURED_REPLY_MAGIC => Self::chunk(&mut reader, false),
            EXTENDED_REPLY_MAGIC => Self::chunk(&mut reader, true),
            _ => return Err(Malformed::Magic(u64::from(magic))),
        };
        Ok(head.map(|head| (head, reader.used())))
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

/// The request that a reply belongs to, as far as replies repeat it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReplyTo {
    /// The client's name for the request.
    pub cookie: u64,
    /// The request's offset.
    pub offset: u64,
    /// Whether structured replies answer it in chunks: reads and block status.
    pub chunked: bool,
}

/// One extent of a metadata context: length in bytes, status flags.
pub type StatusExtent = (u64, u32);

/// Longest length a 32-bit extent can report while its end stays a multiple of 4096.
pub const STATUS_LENGTH_MAX: u64 = 0xffff_f000;

/// Appending replies to `out`, in this dialect.
impl Dialect {
    /// Success, with nothing more to say.
    pub fn success(self, to: ReplyTo, out: &mut Vec<u8>) {
        if self.chunks(to) {
            self.chunk(to, true, ChunkKind::None, 0, out);
        } else {
            Head::Simple { cookie: to.cookie, error: 0 }.encode(out);
        }
    }

    /// Failure. `at` names the failing byte of a request of which a part was answered already;
    /// it and the message are told where the dialect has words for them.
    pub fn failure(
        self,
        to: ReplyTo,
        code: ErrorCode,
        at: Option<u64>,
        message: &str,
        out: &mut Vec<u8>,
    ) {
        if !self.chunks(to) {
            return Head::Simple { cookie: to.cookie, error: code.number() }.encode(out);
        }
        let message = &message.as_bytes()[..message.len().min(STRING_LENGTH_MAX)];
        let kind = at.map_or(ChunkKind::Error, |_| ChunkKind::ErrorOffset);
        let length = 6 + message.len() + at.map_or(0, |_| 8);
        self.chunk(to, true, kind, length as u64, out);
        out.extend_from_slice(&code.number().to_be_bytes());
        // It fits: the message was cut to 4096 bytes above.
        out.extend_from_slice(&(message.len() as u16).to_be_bytes());
        out.extend_from_slice(message);
        if let Some(at) = at {
            out.extend_from_slice(&at.to_be_bytes());
        }
    }

    /// What precedes `length` bytes of data from offset `at` on. A simple reply has one such
    /// head for all data of the request.
    pub fn data_head(self, to: ReplyTo, at: u64, length: u32, done: bool, out: &mut Vec<u8>) {
        if self.chunks(to) {
            self.chunk(to, done, ChunkKind::OffsetData, 8 + u64::from(length), out);
            out.extend_from_slice(&at.to_be_bytes());
        } else {
            Head::Simple { cookie: to.cookie, error: 0 }.encode(out);
        }
    }

    /// Length of what [`Dialect::data_head`] appends.
    #[must_use]
    pub const fn data_head_length(self) -> usize {
        match self {
            Self::Simple => 16,
            Self::Structured => 28,
            Self::Extended => 40,
        }
    }

    /// `length` zeros from offset `at` on; not in the simple dialect.
    pub fn hole(self, to: ReplyTo, at: u64, length: u32, done: bool, out: &mut Vec<u8>) {
        self.chunk(to, done, ChunkKind::OffsetHole, 12, out);
        out.extend_from_slice(&at.to_be_bytes());
        out.extend_from_slice(&length.to_be_bytes());
    }

    /// The extents of one metadata context, as the last chunk of the reply.
    ///
    /// Where lengths have 32 bits, an extent that is longer is cut, and is the last one told:
    /// what follows it would otherwise move.
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
            let fitting = extents.iter().take_while(|(length, _)| *length <= STATUS_LENGTH_MAX);
            let told = extents.len().min(fitting.count() + 1);
            self.chunk(to, true, ChunkKind::BlockStatus, 4 + 8 * told as u64, out);
            out.extend_from_slice(&context.to_be_bytes());
            for (length, flags) in &extents[..told] {
                // It fits: cut just here.
                let length = (*length).min(STATUS_LENGTH_MAX) as u32;
                out.extend_from_slice(&length.to_be_bytes());
                out.extend_from_slice(&flags.to_be_bytes());
            }
        }
    }

    fn chunks(self, to: ReplyTo) -> bool {
        self == Self::Extended || (self == Self::Structured && to.chunked)
    }

    fn chunk(self, to: ReplyTo, done: bool, kind: ChunkKind, length: u64, out: &mut Vec<u8>) {
        let offset = (self == Self::Extended).then_some(to.offset);
        Head::Chunk { cookie: to.cookie, done, kind: kind.number(), length, offset }.encode(out);
    }
}

/// What a chunk says, without the data of [`ChunkKind::OffsetData`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Chunk {
    /// Nothing more.
    None,
    /// The rest of the payload is data from this offset on.
    Data {
        /// Of the first byte, on the disk.
        offset: u64,
    },
    /// These bytes are zero.
    Hole {
        /// Of the first byte, on the disk.
        offset: u64,
        /// In bytes.
        length: u32,
    },
    /// Extents of a metadata context.
    Status {
        /// Which one.
        context: u32,
        /// From the request's offset on.
        extents: Vec<StatusExtent>,
    },
    /// The request failed.
    Error {
        /// Why.
        code: ErrorCode,
        /// The server's words.
        message: String,
        /// Where, if the server said it.
        at: Option<u64>,
    },
}

impl Chunk {
    /// How many bytes of payload must be at hand to decode a chunk of this kind and length: all,
    /// but of data only what stands before it.
    #[must_use]
    pub fn needed(kind: u16, length: u64) -> u64 {
        if kind == ChunkKind::OffsetData.number() { length.min(8) } else { length }
    }

    /// The chunk of this kind and payload `length`, of whose payload the first
    /// [`Chunk::needed`] bytes are `payload`.
    ///
    /// # Errors
    /// When the payload contradicts its kind, or the kind is unknown and not an error.
    pub fn decode(kind: u16, length: u64, payload: &[u8]) -> Result<Self, Malformed> {
        let wrong = Malformed::Length(length);
        let mut reader = Reader::new(payload);
        match ChunkKind::try_from(kind) {
            Ok(ChunkKind::None) if length == 0 => Ok(Self::None),
            Ok(ChunkKind::OffsetData) if length > 8 => {
                Ok(Self::Data { offset: reader.u64().ok_or(wrong)? })
            }
            Ok(ChunkKind::OffsetHole) if length == 12 => Self::hole(&mut reader).ok_or(wrong)?,
            Ok(ChunkKind::BlockStatus) => Self::status(&mut reader).ok_or(wrong),
            Ok(ChunkKind::BlockStatusExtended) => Self::status_extended(&mut reader).ok_or(wrong),
            Ok(ChunkKind::ErrorOffset) => Self::error(&mut reader, true).ok_or(wrong)?,
            _ if kind & CHUNK_ERROR_BIT != 0 => Self::error(&mut reader, false).ok_or(wrong)?,
            _ => Err(wrong),
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
        plausible(&extents).then_some(Self::Status { context, extents })
    }

    fn status_extended(reader: &mut Reader<'_>) -> Option<Self> {
        let (context, count) = (reader.u32()?, reader.u32()?);
        let mut extents = Vec::new();
        while !reader.rest().is_empty() {
            // Contexts whose flags need more than 32 bits are not among those we ask for.
            extents.push((reader.u64()?, reader.u64()? as u32));
        }
        (plausible(&extents) && extents.len() as u64 == u64::from(count))
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

fn plausible(extents: &[StatusExtent]) -> bool {
    !extents.is_empty() && extents.iter().all(|(length, _)| *length > 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TO: ReplyTo = ReplyTo { cookie: 0x1122_3344_5566_7788, offset: 512, chunked: true };

    fn chunk(bytes: &[u8]) -> (Head, Chunk) {
        let (head, used) = Head::decode(bytes).unwrap().unwrap();
        let Head::Chunk { kind, length, .. } = head else { panic!("not a chunk: {head:?}") };
        let needed = usize::try_from(Chunk::needed(kind, length)).unwrap();
        (head, Chunk::decode(kind, length, &bytes[used..][..needed]).unwrap())
    }

    #[test]
    fn only_reads_and_block_status_get_structured_chunks_and_everything_gets_extended_ones() {
        for (dialect, chunked, simple) in [
            (Dialect::Simple, true, true),
            (Dialect::Structured, false, true),
            (Dialect::Structured, true, false),
            (Dialect::Extended, false, false),
        ] {
            let mut out = Vec::new();
            dialect.success(ReplyTo { chunked, ..TO }, &mut out);
            let head = Head::decode(&out).unwrap().unwrap().0;
            assert_eq!(matches!(head, Head::Simple { error: 0, .. }), simple, "{dialect:?}");
        }
    }

    #[test]
    fn a_failure_says_what_and_where_in_as_many_words_as_the_dialect_has() {
        let mut out = Vec::new();
        Dialect::Simple.failure(TO, ErrorCode::Io, Some(9), "gone", &mut out);
        assert_eq!(
            Head::decode(&out).unwrap().unwrap().0,
            Head::Simple { cookie: TO.cookie, error: 5 }
        );
        for dialect in [Dialect::Structured, Dialect::Extended] {
            for at in [None, Some(600)] {
                let mut out = Vec::new();
                dialect.failure(TO, ErrorCode::NoSpace, at, "full", &mut out);
                let said = Chunk::Error { code: ErrorCode::NoSpace, message: "full".into(), at };
                assert_eq!(chunk(&out).1, said);
            }
        }
    }

    #[test]
    fn a_message_is_cut_at_the_string_limit_and_not_before() {
        for (length, told) in [(STRING_LENGTH_MAX, STRING_LENGTH_MAX), (5000, STRING_LENGTH_MAX)] {
            let mut out = Vec::new();
            Dialect::Extended.failure(TO, ErrorCode::Io, None, &"x".repeat(length), &mut out);
            let Chunk::Error { message, .. } = chunk(&out).1 else { panic!("not an error") };
            assert_eq!(message.len(), told);
        }
    }

    #[test]
    fn a_data_head_has_the_length_it_says() {
        for dialect in [Dialect::Simple, Dialect::Structured, Dialect::Extended] {
            let mut out = Vec::new();
            dialect.data_head(TO, 512, 4096, true, &mut out);
            assert_eq!(out.len(), dialect.data_head_length());
        }
    }

    #[test]
    fn an_extent_of_32_bits_ends_the_report_when_it_is_cut() {
        let extents = [(STATUS_LENGTH_MAX, 0), (STATUS_LENGTH_MAX + 1, 3), (4096, 0)];
        let mut out = Vec::new();
        Dialect::Structured.status(TO, 1, &extents, &mut out);
        let expected = vec![(STATUS_LENGTH_MAX, 0), (STATUS_LENGTH_MAX, 3)];
        assert_eq!(chunk(&out).1, Chunk::Status { context: 1, extents: expected });
        let mut out = Vec::new();
        Dialect::Extended.status(TO, 1, &extents, &mut out);
        assert_eq!(chunk(&out).1, Chunk::Status { context: 1, extents: extents.to_vec() });
    }

    #[test]
    fn payloads_that_contradict_their_kind_are_malformed() {
        let refused =
            |kind: u16, payload: &[u8]| Chunk::decode(kind, payload.len() as u64, payload).is_err();
        assert!(refused(ChunkKind::None.number(), &[0]));
        assert!(refused(ChunkKind::OffsetData.number(), &[0; 8]));
        assert!(refused(ChunkKind::OffsetHole.number(), &[0; 12]));
        assert!(refused(ChunkKind::BlockStatus.number(), &[0; 4]));
        assert!(refused(ChunkKind::BlockStatus.number(), &[1; 11]));
        assert!(refused(ChunkKind::BlockStatusExtended.number(), &[1; 24]));
        assert!(refused(ChunkKind::Error.number(), &[0; 6]));
        assert!(refused(ChunkKind::Error.number(), &[0, 0, 0, 5, 0, 9, 1]));
        assert!(refused(77, &[]));
        assert!(!refused(CHUNK_ERROR_BIT + 99, &[0, 0, 0, 5, 0, 0]));
    }

    fn heads() -> impl Strategy<Value = Head> {
        prop_oneof![
            (any::<u64>(), any::<u32>()).prop_map(|(cookie, error)| Head::Simple { cookie, error }),
            (any::<u64>(), any::<bool>(), any::<u16>(), any::<u64>(), any::<Option<u64>>())
                .prop_map(|(cookie, done, kind, length, offset)| Head::Chunk {
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
        fn heads_round_trip_and_every_prefix_is_incomplete(head in heads()) {
            let mut bytes = Vec::new();
            head.encode(&mut bytes);
            for end in 0..bytes.len() {
                prop_assert_eq!(Head::decode(&bytes[..end]), Ok(None));
            }
            prop_assert_eq!(Head::decode(&bytes), Ok(Some((head, bytes.len()))));
        }

        #[test]
        fn status_and_holes_round_trip(
            extents in prop::collection::vec((1..=STATUS_LENGTH_MAX, any::<u32>()), 1..40),
            at: u64, length in 1u32.., context: u32, extended: bool,
        ) {
            let dialect = if extended { Dialect::Extended } else { Dialect::Structured };
            let mut out = Vec::new();
            dialect.status(TO, context, &extents, &mut out);
            prop_assert_eq!(chunk(&out).1, Chunk::Status { context, extents });
            out.clear();
            dialect.hole(TO, at, length, false, &mut out);
            prop_assert_eq!(chunk(&out).1, Chunk::Hole { offset: at, length });
        }

        #[test]
        fn no_payload_makes_the_decoder_panic(kind: u16, payload: Vec<u8>, claimed: u64) {
            let _ = Chunk::decode(kind, claimed, &payload);
            let _ = Head::decode(&payload);
        }
    }
}
