//! Fuzz targets of the handshake (`tests/fuzz`): arbitrary bytes from the client and from the server.
//!
//! The outcome depends neither on how the bytes are divided nor on a restart between them, every option has
//! one final reply, and the bytes that wait to be complete are bounded.

use super::client::{ClientHandshake, ClientOffer, ClientStep, HandshakeFailure, TlsWish};
use super::option::{
    InfoRequest, MetaContextRequest, OPTION_HEADER_LENGTH, OPTION_LENGTH_MAX,
    OPTION_REPLY_HEADER_LENGTH, OPTION_REPLY_LENGTH_MAX, OptionHeader, OptionReply,
};
use super::server::{Export, HandshakePosition, ProtocolViolation, ServerHandshake, ServerStep};
use super::{Agreement, BlockSizes, Greeting, TlsOffer};
use crate::nbd::wire::{OptionKind, OptionReplyKind, PRIVATE_OPTION, TransmissionFlags};

/// The export of the server, and the one that the client requests.
const EXPORT: &str = "disk";
/// Length of the client flags in bytes.
const CLIENT_FLAGS: usize = 4;
/// Most options that our client sends: each kind once, and the private one twice.
const OPTIONS_MAX: usize = 7;

/// The result of a handshake.
#[derive(Debug, PartialEq, Eq)]
struct HandshakeOutcome<E> {
    sent: Vec<u8>,
    /// Questions to the caller, in order.
    asked: Vec<ServerStep>,
    /// The agreement; `None` while the handshake is not complete, or after it was aborted.
    end: Result<Option<Agreement>, E>,
}

/// A handshake as the server. The first two bytes are switches and the length of fragments; the others are
/// the client's.
pub(crate) fn server(bytes: &[u8]) {
    let Some((&[switches, fragment], input)) = bytes.split_first_chunk() else { return };
    let fragment = usize::from(fragment) + 1;
    let whole = serve(switches, input, input.len().max(1), false);
    assert_eq!(whole, serve(switches, input, fragment, false), "in fragments");
    // After a restart the limits of options count anew.
    if whole.end != Err(ProtocolViolation::TooManyOptions) {
        assert_eq!(whole, serve(switches, input, fragment, true), "over restarts");
    }
    check_replies(input, &whole);
    if let Some(data) = input.get(OPTION_HEADER_LENGTH + CLIENT_FLAGS..) {
        check_option_data(data);
    }
}

fn begin(switches: u8, position: Option<HandshakePosition>) -> ServerHandshake {
    let export = Export {
        name: EXPORT.to_owned(),
        description: "a disk".to_owned(),
        size: 1 << 40,
        flags: TransmissionFlags::HAS_FLAGS | TransmissionFlags::SEND_FLUSH,
        block_sizes: BlockSizes { minimum: 1, preferred: 4096, maximum: 32 << 20 },
    };
    let mut handshake = match position {
        Some(position) => ServerHandshake::resume(export, position),
        None => ServerHandshake::new(export),
    };
    if switches & 1 != 0 {
        handshake.enable_private_option();
    }
    if switches & 2 != 0 {
        handshake.require_admission();
    }
    handshake.set_tls(match switches & 48 {
        0 => TlsOffer::Unsupported,
        16 => TlsOffer::Optional,
        32 => TlsOffer::Required,
        _ => TlsOffer::InUse,
    });
    handshake
}

/// Serves `input` in fragments of this length; `restarts` resumes the handshake after each.
fn serve(
    switches: u8,
    input: &[u8],
    fragment: usize,
    restarts: bool,
) -> HandshakeOutcome<ProtocolViolation> {
    let mut handshake = begin(switches, None);
    let (mut pending, mut sent, mut asked) = (Vec::new(), Vec::new(), Vec::new());
    for part in input.chunks(fragment) {
        pending.extend_from_slice(part);
        loop {
            let before = (pending.len(), asked.len());
            let (used, step) = match handshake.advance(&pending, &mut sent) {
                Ok(step) => step,
                Err(violation) => return HandshakeOutcome { sent, asked, end: Err(violation) },
            };
            pending.drain(..used);
            match &step {
                ServerStep::NeedInput => break,
                ServerStep::Transmission(agreement) => {
                    let end = Ok(Some(agreement.clone()));
                    return HandshakeOutcome { sent, asked, end };
                }
                ServerStep::Aborted | ServerStep::StartTls => {
                    return HandshakeOutcome { sent, asked, end: Ok(None) };
                }
                ServerStep::PrivateOption(data) => {
                    let refusal = OptionReply::error(OptionReplyKind::ErrPolicy, "no");
                    let reply = if switches & 4 == 0 { Ok(data.clone()) } else { Err(refusal) };
                    handshake.reply_to_private_option(reply, &mut sent);
                }
                ServerStep::AdmissionRequired { .. } => {
                    let refusal = Err("not now".to_owned());
                    handshake.set_admission(if switches & 8 == 0 { Ok(()) } else { refusal });
                }
            }
            asked.push(step);
            assert_ne!(before, (pending.len(), asked.len()), "no progress");
        }
        let most = OPTION_HEADER_LENGTH + OPTION_LENGTH_MAX as usize;
        assert!(pending.len() < most, "{} bytes wait to be complete", pending.len());
        if restarts {
            handshake = begin(switches, Some(handshake.position()));
        }
    }
    HandshakeOutcome { sent, asked, end: Ok(None) }
}

/// Compares the replies with the options in `input`: they come in the same order, and each complete option
/// has one final reply, unless the session ends at it.
fn check_replies(input: &[u8], outcome: &HandshakeOutcome<ProtocolViolation>) {
    let mut options = input.get(CLIENT_FLAGS..).unwrap_or_default();
    let mut replies = &outcome.sent[..];
    while let Ok(Some((option, used))) = OptionHeader::decode(options) {
        let end = used.saturating_add(option.length as usize);
        if option.number == OptionKind::ExportName.number() {
            // Its reply has no header: size, flags, and reserved zeros for some clients.
            let expected = if matches!(outcome.end, Ok(Some(_))) { &[10, 134][..] } else { &[0] };
            assert!(expected.contains(&replies.len()), "{replies:?} to EXPORT_NAME");
            return;
        }
        if !final_reply(option.number, &mut replies) {
            let may_lack_reply = outcome.end.is_err() || end > options.len();
            assert!(may_lack_reply, "{option:?} has no final reply");
            break;
        }
        options = options.get(end..).unwrap_or_default();
        let ends = [OptionKind::Abort, OptionKind::StartTls]
            .map(OptionKind::number)
            .contains(&option.number);
        let is_go = option.number == OptionKind::Go.number();
        if replies.is_empty() && (ends || is_go && matches!(outcome.end, Ok(Some(_)))) {
            break;
        }
    }
    assert!(replies.is_empty(), "a reply to no option: {replies:?}");
}

/// Takes the replies to an option, up to the final one; false if that is missing.
fn final_reply(number: u32, replies: &mut &[u8]) -> bool {
    while let Ok(Some(((option, reply), used))) = OptionReply::decode(replies) {
        assert_eq!(option, number, "{reply:?} comes too early");
        *replies = &replies[used..];
        if matches!(reply, OptionReply::Ack | OptionReply::Error { .. }) {
            return true;
        }
    }
    false
}

/// Option data that can be decoded has one encoding.
fn check_option_data(data: &[u8]) {
    let mut encoded = Vec::new();
    if let Ok(info) = InfoRequest::decode(data) {
        info.encode(&mut encoded);
        assert_eq!(encoded, data);
    }
    encoded.clear();
    if let Ok(contexts) = MetaContextRequest::decode(data) {
        contexts.encode(&mut encoded);
        assert_eq!(encoded, data);
    }
}

/// A handshake as the client. The first two bytes are the offer and the length of fragments; the others are
/// the server's.
pub(crate) fn client(bytes: &[u8]) {
    let Some((&[switches, fragment], input)) = bytes.split_first_chunk() else { return };
    let whole = converse(switches, input, input.len().max(1));
    let fragments = converse(switches, input, usize::from(fragment) + 1);
    assert_eq!(whole, fragments, "in fragments");
    check_options(&whole.0.sent);
    if let Ok(Some((greeting, used))) = Greeting::decode(input) {
        let mut encoded = Vec::new();
        greeting.encode(&mut encoded);
        assert_eq!(Greeting::decode(&encoded), Ok(Some((greeting, encoded.len()))));
        check_reply_encoding(&input[used..]);
    }
}

/// The outcome, and the reply to the private option.
type Conversation = (HandshakeOutcome<HandshakeFailure>, Option<Vec<u8>>);

fn converse(switches: u8, input: &[u8], fragment: usize) -> Conversation {
    let offer = ClientOffer {
        structured: switches & 1 != 0,
        extended: switches & 2 != 0,
        allocation: switches & 4 != 0,
        private: (switches & 8 != 0).then(|| vec![1, 2, 3]),
        private_more: (switches & 64 != 0).then(|| vec![4]),
        private_only: switches & 16 != 0,
        export: if switches & 32 == 0 { EXPORT.to_owned() } else { String::new() },
        tls: if switches & 128 == 0 { TlsWish::No } else { TlsWish::IfSupported },
    };
    let mut handshake = ClientHandshake::new(offer);
    let (mut pending, mut sent, mut end) = (Vec::new(), Vec::new(), Ok(None));
    for part in input.chunks(fragment) {
        pending.extend_from_slice(part);
        match handshake.advance(&pending, &mut sent) {
            Ok((used, ClientStep::NeedInput)) => drop(pending.drain(..used)),
            // What follows is for another layer.
            Ok((_, ClientStep::StartTls)) => break,
            Ok((used, ClientStep::Transmission(agreement))) => {
                assert!(used <= pending.len());
                end = Ok(Some(agreement));
                break;
            }
            Err(failure) => {
                // What an operator reads.
                let _ = failure.to_string();
                end = Err(failure);
                break;
            }
        }
        let most = OPTION_REPLY_HEADER_LENGTH + OPTION_REPLY_LENGTH_MAX as usize;
        assert!(pending.len() < most, "{} bytes wait to be complete", pending.len());
    }
    let reply = handshake.private_reply().map(<[u8]>::to_vec);
    (HandshakeOutcome { sent, asked: Vec::new(), end }, reply)
}

/// The client sends its flags and each option at most once, or the private one twice.
fn check_options(sent: &[u8]) {
    let mut rest = sent.get(CLIENT_FLAGS..).unwrap_or_default();
    let mut numbers = Vec::new();
    while let Ok(Some((option, used))) = OptionHeader::decode(rest) {
        let earlier = numbers.iter().filter(|number| **number == option.number).count();
        let is_private = option.number == PRIVATE_OPTION;
        assert!(earlier <= usize::from(is_private), "{option:?} is sent again");
        numbers.push(option.number);
        rest = &rest[used + option.length as usize..];
    }
    assert!(rest.is_empty() && numbers.len() <= OPTIONS_MAX, "{rest:?} after {numbers:?}");
}

fn check_reply_encoding(bytes: &[u8]) {
    if let Ok(Some(((option, reply), _))) = OptionReply::decode(bytes) {
        let mut encoded = Vec::new();
        reply.encode(option, &mut encoded);
        let decoded = OptionReply::decode(&encoded);
        // A text that is not UTF-8 may grow beyond the limit of a reply.
        if encoded.len() <= OPTION_REPLY_HEADER_LENGTH + OPTION_REPLY_LENGTH_MAX as usize {
            assert_eq!(decoded, Ok(Some(((option, reply), encoded.len()))));
        }
    }
}
