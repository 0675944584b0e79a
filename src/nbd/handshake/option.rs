//! Encodes and decodes options and the replies to them ("Newstyle negotiation").
//! Defines their layout and length limits, not their effect.

use super::super::bytes::Reader;
use super::super::wire::{
    InfoKind, OPTION_MAGIC, OPTION_REPLY_MAGIC, OptionReplyKind, STRING_LENGTH_MAX,
    TransmissionFlags,
};
use super::super::{Decoded, Malformed};
use super::BlockSizes;

/// Length of the header of an option, in bytes.
pub const OPTION_HEADER_LENGTH: usize = 16;
/// Length of the header of a reply to an option, in bytes.
pub const OPTION_REPLY_HEADER_LENGTH: usize = 20;
/// Maximum data of an option that the server decodes. It skips longer data, and replies with an
/// error.
pub const OPTION_LENGTH_MAX: u32 = 64 << 10;
/// Maximum data of an option that the server skips. Longer data ends the session.
pub const OPTION_SKIP_LENGTH_MAX: u32 = 32 << 20;
/// Most options of one handshake; one more ends the session. Clients send about five, and those that list
/// everything one for each export.
pub const OPTIONS_MAX: u32 = 1024;
/// Most bytes of data in all options of one handshake; more end the session.
pub const OPTIONS_LENGTH_MAX: u64 = 2 * OPTION_SKIP_LENGTH_MAX as u64;
/// Maximum data of a reply to an option that the client accepts.
pub const OPTION_REPLY_LENGTH_MAX: u32 = 64 << 10;

/// The header of an option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionHeader {
    /// Number of the option, known or unknown.
    pub number: u32,
    /// Length of the data after the header, in bytes.
    pub length: u32,
}

impl OptionHeader {
    /// The header at the front of `bytes`.
    ///
    /// # Errors
    /// If the bytes begin with another magic number.
    pub fn decode(bytes: &[u8]) -> Decoded<Self> {
        let mut reader = Reader::new(bytes);
        let Some(magic) = reader.u64() else { return Ok(None) };
        if magic != OPTION_MAGIC {
            return Err(Malformed::Magic(magic));
        }
        let header = (|| Some(Self { number: reader.u32()?, length: reader.u32()? }))();
        Ok(header.map(|header| (header, reader.used())))
    }
}

/// Appends an option of any number.
pub fn encode_option(number: u32, data: &[u8], out: &mut Vec<u8>) {
    out.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
    out.extend_from_slice(&number.to_be_bytes());
    // Our options are short. A longer one would be truncated, header and data alike.
    let length = u32::try_from(data.len()).unwrap_or(u32::MAX);
    out.extend_from_slice(&length.to_be_bytes());
    out.extend_from_slice(&data[..length as usize]);
}

/// The reason why the server refuses the data of a known option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OptionError {
    /// Contradictory lengths, or an invalid string: `NBD_REP_ERR_INVALID`.
    Invalid(&'static str),
    /// A string over 4096 bytes: `NBD_REP_ERR_TOO_BIG`.
    TooBig,
}

/// Data of `NBD_OPT_INFO` and `NBD_OPT_GO`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InfoRequest {
    /// Name of the export.
    pub export: String,
    /// Kinds of the requested information, known or unknown.
    pub requests: Vec<u16>,
}

impl InfoRequest {
    /// Appends the data.
    pub fn encode(&self, out: &mut Vec<u8>) {
        encode_string(&self.export, out);
        out.extend_from_slice(&(self.requests.len() as u16).to_be_bytes());
        for number in &self.requests {
            out.extend_from_slice(&number.to_be_bytes());
        }
    }

    /// Decodes all of `data`.
    ///
    /// # Errors
    /// If the data is invalid.
    pub fn decode(data: &[u8]) -> Result<Self, OptionError> {
        let mut reader = Reader::new(data);
        let export = read_string(&mut reader)?;
        let bad_length = OptionError::Invalid("the option's length does not fit what it holds");
        let count = reader.u16().ok_or(bad_length)?;
        if reader.rest().len() != usize::from(count) * 2 {
            return Err(bad_length);
        }
        let requests = (0..count).map_while(|_| reader.u16()).collect();
        Ok(Self { export, requests })
    }
}

/// Data of `NBD_OPT_LIST_META_CONTEXT` and `NBD_OPT_SET_META_CONTEXT`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MetaContextRequest {
    /// Name of the export.
    pub export: String,
    /// Names of contexts, or wildcards.
    pub queries: Vec<String>,
}

impl MetaContextRequest {
    /// Appends the data.
    pub fn encode(&self, out: &mut Vec<u8>) {
        encode_string(&self.export, out);
        out.extend_from_slice(&(self.queries.len() as u32).to_be_bytes());
        for query in &self.queries {
            encode_string(query, out);
        }
    }

    /// Decodes all of `data`.
    ///
    /// # Errors
    /// If the data is invalid.
    pub fn decode(data: &[u8]) -> Result<Self, OptionError> {
        let mut reader = Reader::new(data);
        let export = read_string(&mut reader)?;
        let bad_length = OptionError::Invalid("the option's length does not fit what it holds");
        let count = reader.u32().ok_or(bad_length)?;
        let mut queries = Vec::new();
        for _ in 0..count {
            queries.push(read_string(&mut reader)?);
        }
        if reader.rest().is_empty() { Ok(Self { export, queries }) } else { Err(bad_length) }
    }
}

/// Decodes all of `data` as a string ("Conventions").
///
/// # Errors
/// If it is too long, not UTF-8, or contains NUL.
pub fn decode_string(data: &[u8]) -> Result<String, OptionError> {
    if data.len() > STRING_LENGTH_MAX {
        return Err(OptionError::TooBig);
    }
    match std::str::from_utf8(data) {
        Ok(text) if !text.contains('\0') => Ok(text.to_owned()),
        _ => Err(OptionError::Invalid("a string is not valid UTF-8 without NUL")),
    }
}

fn read_string(reader: &mut Reader<'_>) -> Result<String, OptionError> {
    let bad_length = OptionError::Invalid("the option's length does not fit what it holds");
    let length = reader.u32().ok_or(bad_length)? as usize;
    if length > reader.rest().len() {
        return Err(bad_length);
    }
    decode_string(reader.take(length).ok_or(bad_length)?)
}

fn encode_string(text: &str, out: &mut Vec<u8>) {
    out.extend_from_slice(&(text.len() as u32).to_be_bytes());
    out.extend_from_slice(text.as_bytes());
}

/// A reply to an option.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OptionReply {
    /// The option is accepted; the last of its replies.
    Ack,
    /// An export of the list.
    Server {
        /// Name of the export.
        name: String,
        /// Description for display.
        description: String,
    },
    /// Parameters of the export.
    Export {
        /// Size in bytes.
        size: u64,
        /// Transmission flags.
        flags: TransmissionFlags,
    },
    /// Canonical name of the export.
    Name(String),
    /// Description of the export, for display.
    Description(String),
    /// Block sizes of the export.
    BlockSize(BlockSizes),
    /// Information of an unknown kind.
    OtherInfo(u16),
    /// A metadata context.
    MetaContext {
        /// Id of the context.
        id: u32,
        /// Name of the context.
        name: String,
    },
    /// The option failed.
    Error {
        /// Number of the error, known or unknown.
        number: u32,
        /// The message of the server; may be empty.
        message: String,
    },
    /// A reply of an unknown kind.
    Other {
        /// Number of the kind.
        number: u32,
        /// Data of the reply.
        data: Vec<u8>,
    },
}

impl OptionReply {
    /// An error of a known kind.
    #[must_use]
    pub fn error(kind: OptionReplyKind, message: &str) -> Self {
        Self::Error { number: kind.number(), message: message.to_owned() }
    }

    /// Appends the reply to the option of this number.
    pub fn encode(&self, option: u32, out: &mut Vec<u8>) {
        let (number, data) = self.parts();
        out.extend_from_slice(&OPTION_REPLY_MAGIC.to_be_bytes());
        out.extend_from_slice(&option.to_be_bytes());
        out.extend_from_slice(&number.to_be_bytes());
        out.extend_from_slice(&(data.len() as u32).to_be_bytes());
        out.extend_from_slice(&data);
    }

    fn parts(&self) -> (u32, Vec<u8>) {
        match self {
            Self::Ack => (OptionReplyKind::Ack.number(), Vec::new()),
            Self::Server { name, description } => {
                let mut data = Vec::new();
                encode_string(name, &mut data);
                data.extend_from_slice(description.as_bytes());
                (OptionReplyKind::Server.number(), data)
            }
            Self::Export { size, flags } => {
                let data = [&size.to_be_bytes()[..], &flags.bits().to_be_bytes()].concat();
                info_parts(InfoKind::Export.number(), &data)
            }
            Self::Name(name) => info_parts(InfoKind::Name.number(), name.as_bytes()),
            Self::Description(text) => info_parts(InfoKind::Description.number(), text.as_bytes()),
            Self::BlockSize(sizes) => {
                let fields = [sizes.minimum, sizes.preferred, sizes.maximum];
                info_parts(InfoKind::BlockSize.number(), &fields.map(u32::to_be_bytes).concat())
            }
            Self::OtherInfo(number) => info_parts(*number, &[]),
            Self::MetaContext { id, name } => {
                let data = [&id.to_be_bytes()[..], name.as_bytes()].concat();
                (OptionReplyKind::MetaContext.number(), data)
            }
            Self::Error { number, message } => (*number, message.clone().into_bytes()),
            Self::Other { number, data } => (*number, data.clone()),
        }
    }

    /// The reply at the front of `bytes`, and the number of its option.
    ///
    /// # Errors
    /// If the bytes are not a reply to an option, or the reply is too long or contradicts its kind.
    pub fn decode(bytes: &[u8]) -> Decoded<(u32, Self)> {
        let mut reader = Reader::new(bytes);
        let Some(magic) = reader.u64() else { return Ok(None) };
        if magic != OPTION_REPLY_MAGIC {
            return Err(Malformed::Magic(magic));
        }
        let header = (|| Some((reader.u32()?, reader.u32()?, reader.u32()?)))();
        let Some((option, number, length)) = header else { return Ok(None) };
        if length > OPTION_REPLY_LENGTH_MAX {
            return Err(Malformed::Length(u64::from(length)));
        }
        let Some(data) = reader.take(length as usize) else { return Ok(None) };
        let reply = Self::from_parts(number, data)?;
        Ok(Some(((option, reply), reader.used())))
    }

    fn from_parts(number: u32, data: &[u8]) -> Result<Self, Malformed> {
        let bad_length = Malformed::Length(data.len() as u64);
        if OptionReplyKind::is_error(number) {
            return Ok(Self::Error { number, message: lossy(data) });
        }
        let mut reader = Reader::new(data);
        match OptionReplyKind::try_from(number) {
            Ok(OptionReplyKind::Ack) if data.is_empty() => Ok(Self::Ack),
            Ok(OptionReplyKind::Ack) => Err(bad_length),
            Ok(OptionReplyKind::Server) => {
                let length = reader.u32().ok_or(bad_length)? as usize;
                let name = reply_string(reader.take(length).ok_or(bad_length)?)?;
                Ok(Self::Server { name, description: lossy(reader.rest()) })
            }
            Ok(OptionReplyKind::Info) => Self::decode_info(&mut reader).ok_or(bad_length)?,
            Ok(OptionReplyKind::MetaContext) => {
                let id = reader.u32().ok_or(bad_length)?;
                Ok(Self::MetaContext { id, name: reply_string(reader.rest())? })
            }
            _ => Ok(Self::Other { number, data: data.to_vec() }),
        }
    }

    fn decode_info(reader: &mut Reader<'_>) -> Option<Result<Self, Malformed>> {
        let number = reader.u16()?;
        let reply = match InfoKind::try_from(number) {
            Ok(InfoKind::Export) if reader.rest().len() == 10 => Self::Export {
                size: reader.u64()?,
                flags: TransmissionFlags::from_bits_truncate(reader.u16()?),
            },
            Ok(InfoKind::BlockSize) if reader.rest().len() == 12 => Self::BlockSize(BlockSizes {
                minimum: reader.u32()?,
                preferred: reader.u32()?,
                maximum: reader.u32()?,
            }),
            Ok(InfoKind::Export | InfoKind::BlockSize) => return None,
            Ok(InfoKind::Name) => return Some(reply_string(reader.rest()).map(Self::Name)),
            Ok(InfoKind::Description) => Self::Description(lossy(reader.rest())),
            Err(_) => Self::OtherInfo(number),
        };
        Some(Ok(reply))
    }
}

fn info_parts(number: u16, data: &[u8]) -> (u32, Vec<u8>) {
    (OptionReplyKind::Info.number(), [&number.to_be_bytes()[..], data].concat())
}

fn reply_string(data: &[u8]) -> Result<String, Malformed> {
    decode_string(data).map_err(|_| Malformed::Text)
}

fn lossy(data: &[u8]) -> String {
    String::from_utf8_lossy(data).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn replies() -> impl Strategy<Value = OptionReply> {
        let name = "[a-zé]{0,20}";
        prop_oneof![
            Just(OptionReply::Ack),
            (name, name).prop_map(|(name, description)| OptionReply::Server { name, description }),
            (any::<u64>(), any::<u16>()).prop_map(|(size, bits)| OptionReply::Export {
                size,
                flags: TransmissionFlags::from_bits_truncate(bits),
            }),
            name.prop_map(OptionReply::Name),
            name.prop_map(OptionReply::Description),
            any::<(u32, u32, u32)>().prop_map(|(minimum, preferred, maximum)| {
                OptionReply::BlockSize(BlockSizes { minimum, preferred, maximum })
            }),
            (4u16..).prop_map(OptionReply::OtherInfo),
            (any::<u32>(), name).prop_map(|(id, name)| OptionReply::MetaContext { id, name }),
            ((1u32 << 31).., name)
                .prop_map(|(number, message)| OptionReply::Error { number, message }),
            (5u32..1 << 31, any::<Vec<u8>>())
                .prop_map(|(number, data)| OptionReply::Other { number, data }),
        ]
    }

    proptest! {
        #[test]
        fn option_replies_round_trip_and_prefixes_are_incomplete(reply in replies(), option: u32) {
            let mut bytes = Vec::new();
            reply.encode(option, &mut bytes);
            for end in 0..bytes.len() {
                prop_assert_eq!(OptionReply::decode(&bytes[..end]), Ok(None));
            }
            let whole = OptionReply::decode(&bytes);
            prop_assert_eq!(whole, Ok(Some(((option, reply), bytes.len()))));
        }

        #[test]
        fn option_requests_round_trip(
            export in "[a-zé/]{0,50}", requests: Vec<u16>,
            queries in prop::collection::vec(".{0,20}", 0..9),
        ) {
            let queries: Vec<String> = queries.iter().map(|q| q.replace('\0', "")).collect();
            let info = InfoRequest { export: export.clone(), requests };
            let mut data = Vec::new();
            info.encode(&mut data);
            prop_assert_eq!(InfoRequest::decode(&data), Ok(info));
            for end in 0..data.len() {
                prop_assert!(InfoRequest::decode(&data[..end]).is_err());
            }
            let meta = MetaContextRequest { export, queries };
            let mut data = Vec::new();
            meta.encode(&mut data);
            prop_assert_eq!(MetaContextRequest::decode(&data), Ok(meta));
            data.push(0);
            prop_assert!(MetaContextRequest::decode(&data).is_err());
        }

        #[test]
        fn option_headers_round_trip_and_prefixes_are_incomplete(number: u32, data: Vec<u8>) {
            let mut bytes = Vec::new();
            encode_option(number, &data, &mut bytes);
            for end in 0..OPTION_HEADER_LENGTH {
                prop_assert_eq!(OptionHeader::decode(&bytes[..end]), Ok(None));
            }
            let header = OptionHeader { number, length: data.len() as u32 };
            prop_assert_eq!(OptionHeader::decode(&bytes), Ok(Some((header, OPTION_HEADER_LENGTH))));
        }

        #[test]
        fn decoders_never_panic(data: Vec<u8>, number: u32) {
            let _ = InfoRequest::decode(&data);
            let _ = MetaContextRequest::decode(&data);
            let _ = OptionReply::from_parts(number % 8, &data);
        }
    }

    #[test]
    fn strings_have_at_most_4096_bytes_of_utf8_without_nul() {
        assert!(decode_string(&[b'a'; STRING_LENGTH_MAX]).is_ok());
        assert_eq!(decode_string(&[b'a'; STRING_LENGTH_MAX + 1]), Err(OptionError::TooBig));
        assert!(matches!(decode_string(b"a\0b"), Err(OptionError::Invalid(_))));
        assert!(matches!(decode_string(&[0xff]), Err(OptionError::Invalid(_))));
    }

    #[test]
    fn a_too_long_reply_is_malformed_before_its_data_arrives() {
        for (length, incomplete) in
            [(OPTION_REPLY_LENGTH_MAX, true), (OPTION_REPLY_LENGTH_MAX + 1, false)]
        {
            let mut bytes = OPTION_REPLY_MAGIC.to_be_bytes().to_vec();
            bytes.extend_from_slice(&[0; 8]);
            bytes.extend_from_slice(&length.to_be_bytes());
            assert_eq!(OptionReply::decode(&bytes) == Ok(None), incomplete);
        }
    }
}
