//! What a server does about `NBD_OPT_STARTTLS`, and about other options before it (NBD specification, "TLS versions").

use super::super::wire::{OptionKind, OptionReplyKind};
use super::option::OptionReply;

/// What a server does about TLS.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TlsOffer {
    /// It has none (NOTLS).
    #[default]
    Unsupported,
    /// Clients may use it (SELECTIVETLS).
    Optional,
    /// Clients must use it before anything else (FORCEDTLS).
    Required,
    /// The connection uses it.
    InUse,
}

impl TlsOffer {
    /// The reply to an option that must not precede TLS; `None` if the option is permitted.
    pub(super) fn refusal(self, kind: Result<OptionKind, u32>) -> Option<OptionReply> {
        let permitted = matches!(kind, Ok(OptionKind::StartTls | OptionKind::Abort));
        if self != Self::Required || permitted {
            return None;
        }
        let message = "begin TLS first (NBD_OPT_STARTTLS)";
        Some(OptionReply::error(OptionReplyKind::ErrTlsRequired, message))
    }

    /// The reply to `NBD_OPT_STARTTLS` with this many bytes of data. After [`OptionReply::Ack`] TLS begins.
    pub(super) fn reply(self, length: u32) -> OptionReply {
        let (kind, message) = match self {
            Self::Unsupported => (OptionReplyKind::ErrUnsupported, "TLS is not supported"),
            Self::InUse => (OptionReplyKind::ErrInvalid, "TLS is in use already"),
            Self::Optional | Self::Required if length > 0 => {
                (OptionReplyKind::ErrInvalid, "this option has no data")
            }
            Self::Optional | Self::Required => return OptionReply::Ack,
        };
        OptionReply::error(kind, message)
    }
}

#[cfg(test)]
mod tests {
    use super::super::client::{
        ClientHandshake, ClientOffer, ClientStep, HandshakeFailure, TlsWish,
    };
    use super::super::option::encode_option;
    use super::super::server::{
        Export, HandshakePosition, ProtocolViolation, ServerHandshake, ServerStep,
    };
    use super::super::{Agreement, BlockSizes};
    use super::*;
    use crate::nbd::reply::Dialect;
    use crate::nbd::wire::{PRIVATE_OPTION, TransmissionFlags};

    fn export() -> Export {
        Export {
            name: "disk".to_owned(),
            description: String::new(),
            size: 1 << 20,
            flags: TransmissionFlags::HAS_FLAGS,
            block_sizes: BlockSizes { minimum: 1, preferred: 4096, maximum: 1 << 20 },
        }
    }

    fn server(tls: TlsOffer) -> ServerHandshake {
        let mut handshake = ServerHandshake::new(export());
        handshake.enable_private_option();
        handshake.set_tls(tls);
        let step = handshake.advance(&3u32.to_be_bytes(), &mut Vec::new());
        assert_eq!(step, Ok((4, ServerStep::NeedInput)));
        handshake
    }

    fn send(
        handshake: &mut ServerHandshake,
        option: u32,
        data: &[u8],
    ) -> Result<(Option<u32>, ServerStep), ProtocolViolation> {
        let (mut bytes, mut out) = (Vec::new(), Vec::new());
        encode_option(option, data, &mut bytes);
        let (used, step) = handshake.advance(&bytes, &mut out)?;
        assert_eq!(used, bytes.len());
        let error = match OptionReply::decode(&out).unwrap() {
            Some(((_, OptionReply::Error { number, .. }), _)) => Some(number),
            _ => None,
        };
        Ok((error, step))
    }

    #[test]
    fn every_option_needs_tls_where_it_is_required() {
        let mut handshake = server(TlsOffer::Required);
        let required = Some(OptionReplyKind::ErrTlsRequired.number());
        for option in [3, 6, 7, 8, 9, 10, 11, 99, PRIVATE_OPTION] {
            let outcome = send(&mut handshake, option, b"data");
            assert_eq!(outcome, Ok((required, ServerStep::NeedInput)), "option {option}");
        }
        let abort = OptionKind::Abort.number();
        let aborted = send(&mut server(TlsOffer::Required), abort, &[]);
        assert_eq!(aborted, Ok((None, ServerStep::Aborted)));
        let name = OptionKind::ExportName.number();
        assert_eq!(send(&mut handshake, name, b"disk"), Err(ProtocolViolation::TlsRequired));
    }

    #[test]
    fn start_tls_is_answered_as_it_is_offered() {
        let number = OptionKind::StartTls.number();
        let invalid = Some(OptionReplyKind::ErrInvalid.number());
        for (tls, data, error, begins) in [
            (TlsOffer::Unsupported, &[][..], Some(OptionReplyKind::ErrUnsupported.number()), false),
            (TlsOffer::Optional, &[], None, true),
            (TlsOffer::Required, &[], None, true),
            (TlsOffer::Optional, b"x", invalid, false),
            (TlsOffer::Required, b"x", invalid, false),
            (TlsOffer::InUse, &[], invalid, false),
        ] {
            let step = if begins { ServerStep::StartTls } else { ServerStep::NeedInput };
            assert_eq!(send(&mut server(tls), number, data), Ok((error, step)), "{tls:?}");
        }
    }

    #[test]
    fn nothing_negotiated_before_tls_is_left() {
        let mut handshake = server(TlsOffer::Optional);
        send(&mut handshake, OptionKind::ExtendedHeaders.number(), &[]).unwrap();
        handshake.reply_to_private_option(Ok(Vec::new()), &mut Vec::new());
        send(&mut handshake, OptionKind::StartTls.number(), &[]).unwrap();
        let begun = HandshakePosition::begun(handshake.position().client);
        assert_eq!((begun.dialect, begun.private_negotiated), (Dialect::Simple, false));
        assert!(begun.client.is_some());
    }

    /// Runs our client against our server. Returns the parameters, and whether TLS began.
    fn negotiate(
        tls: TlsOffer,
        wish: TlsWish,
        private: Option<Vec<u8>>,
    ) -> Result<(Agreement, bool), HandshakeFailure> {
        let mut server = ServerHandshake::new(export());
        server.enable_private_option();
        server.set_tls(tls);
        let offer = ClientOffer { tls: wish, private, structured: true, ..ClientOffer::default() };
        let mut client = ClientHandshake::new(offer);
        let (mut to_client, mut to_server) = (Vec::new(), Vec::new());
        server.greet(&mut to_client);
        let mut began = false;
        loop {
            let (used, next) = client.advance(&to_client, &mut to_server)?;
            to_client.drain(..used);
            match next {
                ClientStep::Transmission(agreement) => return Ok((agreement, began)),
                ClientStep::StartTls => {
                    assert!(to_client.is_empty() && to_server.is_empty() && !began);
                    began = true;
                    let position = HandshakePosition::begun(server.position().client);
                    server = ServerHandshake::resume(export(), position);
                    server.set_tls(TlsOffer::InUse);
                    client.on_tls_started(&mut to_server);
                }
                ClientStep::NeedInput => {}
            }
            let (used, next) = server.advance(&to_server, &mut to_client).unwrap();
            to_server.drain(..used);
            if matches!(next, ServerStep::PrivateOption(_)) {
                server.reply_to_private_option(Ok(Vec::new()), &mut to_client);
            }
        }
    }

    #[test]
    fn a_client_begins_tls_first_if_both_want_it() {
        for private in [None, Some(vec![1])] {
            for wish in [TlsWish::IfSupported, TlsWish::Required] {
                for tls in [TlsOffer::Optional, TlsOffer::Required] {
                    let (agreement, began) = negotiate(tls, wish, private.clone()).unwrap();
                    assert!(began);
                    assert_eq!(agreement.dialect, Dialect::Structured);
                }
            }
            let plain = negotiate(TlsOffer::Unsupported, TlsWish::IfSupported, private.clone());
            assert!(!plain.unwrap().1);
            let refused = negotiate(TlsOffer::Unsupported, TlsWish::Required, private.clone());
            assert!(matches!(refused, Err(HandshakeFailure::NoTls(_))), "{refused:?}");
            let number = OptionReplyKind::ErrTlsRequired.number();
            let refused = negotiate(TlsOffer::Required, TlsWish::No, private);
            let Err(HandshakeFailure::Refused { number: got, .. }) = refused else {
                panic!("{refused:?}")
            };
            assert_eq!(got, number);
        }
    }

    #[test]
    fn a_client_that_requires_tls_accepts_no_greeting_without() {
        use super::super::Greeting;
        use crate::nbd::wire::HandshakeFlags;
        for greeting in [
            Greeting::Oldstyle { size: 1, flags: TransmissionFlags::HAS_FLAGS },
            Greeting::Newstyle { flags: HandshakeFlags::empty() },
        ] {
            let mut bytes = Vec::new();
            greeting.encode(&mut bytes);
            let offer = ClientOffer { tls: TlsWish::Required, ..ClientOffer::default() };
            let outcome = ClientHandshake::new(offer).advance(&bytes, &mut Vec::new());
            assert!(matches!(outcome, Err(HandshakeFailure::NoTls(_))), "{outcome:?}");
        }
    }
}
