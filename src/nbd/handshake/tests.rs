//! Tests both roles of the handshake against each other and against encoded messages.

use super::super::reply::Dialect;
use super::super::wire::*;
use super::client::{self, ClientOffer, HandshakeFailure};
use super::option::*;
use super::server::{self, Export, ProtocolViolation};
use super::*;
use proptest::prelude::*;

fn export() -> Export {
    Export {
        name: "disk".into(),
        description: "a disk".into(),
        size: 1 << 20,
        flags: TransmissionFlags::HAS_FLAGS | TransmissionFlags::SEND_FLUSH,
        block_sizes: BlockSizes { minimum: 1, preferred: 4096, maximum: 32 << 20 },
    }
}

/// A server in option haggling.
struct Haggling {
    server: server::ServerHandshake,
    pending: Vec<u8>,
}

impl Haggling {
    fn with_client_flags(flags: u32) -> Self {
        Self {
            server: server::ServerHandshake::new(export()),
            pending: flags.to_be_bytes().to_vec(),
        }
    }

    fn fixed_newstyle() -> Self {
        Self::with_client_flags(3)
    }

    fn receive(
        &mut self,
        bytes: &[u8],
    ) -> Result<(Vec<u8>, server::ServerStep), ProtocolViolation> {
        self.pending.extend_from_slice(bytes);
        let mut out = Vec::new();
        let (used, next) = self.server.advance(&self.pending, &mut out)?;
        self.pending.drain(..used);
        Ok((out, next))
    }

    fn receive_option(
        &mut self,
        number: u32,
        data: &[u8],
    ) -> (Vec<OptionReply>, server::ServerStep) {
        let mut bytes = Vec::new();
        encode_option(number, data, &mut bytes);
        let (out, next) = self.receive(&bytes).unwrap();
        (replies(number, &out), next)
    }

    fn replies_to(&mut self, kind: OptionKind, data: &[u8]) -> Vec<OptionReply> {
        self.receive_option(kind.number(), data).0
    }

    fn error_of(&mut self, kind: OptionKind, data: &[u8]) -> Option<OptionReplyKind> {
        match self.replies_to(kind, data).last() {
            Some(OptionReply::Error { number, .. }) => OptionReplyKind::try_from(*number).ok(),
            _ => None,
        }
    }
}

fn replies(option: u32, mut bytes: &[u8]) -> Vec<OptionReply> {
    let mut all = Vec::new();
    while let Some(((replied_to, reply), used)) = OptionReply::decode(bytes).unwrap() {
        assert_eq!(replied_to, option);
        all.push(reply);
        bytes = &bytes[used..];
    }
    assert!(bytes.is_empty(), "an incomplete reply");
    all
}

fn go(name: &str) -> Vec<u8> {
    let mut data = Vec::new();
    InfoRequest { export: name.into(), requests: vec![3, 3, 99, 1] }.encode(&mut data);
    data
}

fn contexts(name: &str, queries: &[&str]) -> Vec<u8> {
    let queries = queries.iter().map(|&query| query.to_owned()).collect();
    let mut data = Vec::new();
    MetaContextRequest { export: name.into(), queries }.encode(&mut data);
    data
}

#[test]
fn unknown_client_flags_end_the_session() {
    assert_eq!(
        Haggling::with_client_flags(4).receive(&[]),
        Err(ProtocolViolation::UnknownClientFlags(4))
    );
}

#[test]
fn no_zeroes_omits_the_zeroes_after_export_name() {
    for (flags, zeroes) in [(0, 124), (1, 124), (2, 0), (3, 0)] {
        let mut option = Vec::new();
        encode_option(OptionKind::ExportName.number(), b"disk", &mut option);
        let (out, next) = Haggling::with_client_flags(flags).receive(&option).unwrap();
        assert_eq!(out.len(), 10 + zeroes, "client flags {flags}");
        assert!(matches!(next, server::ServerStep::Transmission(_)));
    }
}

#[test]
fn without_fixed_newstyle_only_export_name_is_valid() {
    let mut option = Vec::new();
    encode_option(OptionKind::List.number(), &[], &mut option);
    let error = Haggling::with_client_flags(0).receive(&option);
    assert_eq!(error, Err(ProtocolViolation::OptionBeforeFixedNewstyle(3)));
}

#[test]
fn unknown_options_are_skipped_and_unsupported() {
    let mut haggling = Haggling::fixed_newstyle();
    for length in [0, 5, OPTION_LENGTH_MAX as usize + 7] {
        let (replies, next) = haggling.receive_option(4711, &vec![1; length]);
        assert!(matches!(&replies[..], [OptionReply::Error { number, .. }]
            if *number == OptionReplyKind::ErrUnsupported.number()));
        assert_eq!(next, server::ServerStep::NeedInput);
    }
    assert_eq!(haggling.replies_to(OptionKind::StructuredReply, &[]), [OptionReply::Ack]);
}

#[test]
fn an_option_over_the_skip_limit_ends_the_session() {
    for (length, ends) in [(OPTION_SKIP_LENGTH_MAX, false), (OPTION_SKIP_LENGTH_MAX + 1, true)] {
        let mut head = OPTION_MAGIC.to_be_bytes().to_vec();
        head.extend_from_slice(&4711u32.to_be_bytes());
        head.extend_from_slice(&length.to_be_bytes());
        assert_eq!(Haggling::fixed_newstyle().receive(&head).is_err(), ends);
    }
}

#[test]
fn options_beyond_their_number_end_the_session() {
    let mut haggling = Haggling::fixed_newstyle();
    let mut option = Vec::new();
    encode_option(OptionKind::List.number(), &[], &mut option);
    for _ in 0..OPTIONS_MAX {
        // In two parts, of which the first one does not count.
        haggling.receive(&option[..15]).unwrap();
        haggling.receive(&option[15..]).unwrap();
    }
    assert_eq!(haggling.receive(&option), Err(ProtocolViolation::TooManyOptions));
}

#[test]
fn options_beyond_their_total_length_end_the_session() {
    let skipped = vec![0; OPTION_SKIP_LENGTH_MAX as usize];
    let mut haggling = Haggling::fixed_newstyle();
    for _ in 0..OPTIONS_LENGTH_MAX / u64::from(OPTION_SKIP_LENGTH_MAX) {
        let (replies, _) = haggling.receive_option(4711, &skipped);
        assert!(matches!(&replies[..], [OptionReply::Error { .. }]), "{replies:?}");
    }
    assert_eq!(haggling.receive_option(OptionKind::List.number(), &[]).0.len(), 2);
    let mut option = Vec::new();
    encode_option(OptionKind::List.number(), b"x", &mut option);
    assert_eq!(haggling.receive(&option), Err(ProtocolViolation::TooManyOptions));
}

#[test]
fn too_long_known_options_are_too_big() {
    let filler = "x".repeat(OPTION_LENGTH_MAX as usize);
    let too_big = Some(OptionReplyKind::ErrTooBig);
    let invalid = Some(OptionReplyKind::ErrInvalid);
    let mut haggling = Haggling::fixed_newstyle();
    assert_eq!(haggling.error_of(OptionKind::List, filler.as_bytes()), invalid);
    assert_eq!(haggling.error_of(OptionKind::List, format!("{filler}x").as_bytes()), too_big);
}

#[test]
fn export_names_over_4096_bytes_are_too_big() {
    let mut haggling = Haggling::fixed_newstyle();
    let unknown = go(&"n".repeat(STRING_LENGTH_MAX));
    assert_eq!(haggling.error_of(OptionKind::Info, &unknown), Some(OptionReplyKind::ErrUnknown));
    let longer = go(&"n".repeat(STRING_LENGTH_MAX + 1));
    assert_eq!(haggling.error_of(OptionKind::Info, &longer), Some(OptionReplyKind::ErrTooBig));
    assert_eq!(haggling.error_of(OptionKind::Go, &go("a\0")), Some(OptionReplyKind::ErrInvalid));
}

#[test]
fn options_without_data_refuse_data() {
    let mut haggling = Haggling::fixed_newstyle();
    for kind in [OptionKind::List, OptionKind::StructuredReply, OptionKind::ExtendedHeaders] {
        assert_eq!(haggling.error_of(kind, b"x"), Some(OptionReplyKind::ErrInvalid), "{kind:?}");
    }
}

#[test]
fn options_with_contradictory_lengths_are_invalid() {
    let mut haggling = Haggling::fixed_newstyle();
    haggling.replies_to(OptionKind::StructuredReply, &[]);
    for data in [go("disk"), contexts("disk", &["base:allocation"])] {
        let kind = if data == go("disk") { OptionKind::Info } else { OptionKind::SetMetaContext };
        let short = &data[..data.len() - 1];
        let long = [&data[..], &[0]].concat();
        assert_eq!(haggling.error_of(kind, short), Some(OptionReplyKind::ErrInvalid));
        assert_eq!(haggling.error_of(kind, &long), Some(OptionReplyKind::ErrInvalid));
    }
}

#[test]
fn info_and_go_reply_the_same() {
    let mut haggling = Haggling::fixed_newstyle();
    let info = haggling.replies_to(OptionKind::Info, &go("disk"));
    let (replies, next) = haggling.receive_option(OptionKind::Go.number(), &go("disk"));
    assert_eq!(info, replies);
    assert_eq!(info.iter().filter(|r| matches!(r, OptionReply::BlockSize(_))).count(), 1);
    assert!(matches!(info[0], OptionReply::Export { size: 1_048_576, .. }));
    assert!(matches!(next, server::ServerStep::Transmission(_)));
}

#[test]
fn meta_context_wildcards_list_but_select_nothing() {
    let mut haggling = Haggling::fixed_newstyle();
    let all = contexts("disk", &[]);
    assert_eq!(
        haggling.error_of(OptionKind::ListMetaContext, &all),
        Some(OptionReplyKind::ErrInvalid)
    );
    haggling.replies_to(OptionKind::StructuredReply, &[]);
    let count = |haggling: &mut Haggling, kind, queries: &[&str]| {
        haggling.replies_to(kind, &contexts("disk", queries)).len() - 1
    };
    for (queries, listed, set) in [
        (&[][..], 1, 0),
        (&["base:"], 1, 0),
        (&["base:allocation", "base:allocation"], 1, 1),
        (&["qemu:dirty-bitmap:x", "base:other"], 0, 0),
    ] {
        assert_eq!(
            count(&mut haggling, OptionKind::ListMetaContext, queries),
            listed,
            "{queries:?}"
        );
        assert_eq!(count(&mut haggling, OptionKind::SetMetaContext, queries), set, "{queries:?}");
    }
}

fn enter(haggling: &mut Haggling, name: &str) -> Agreement {
    match haggling.receive_option(OptionKind::Go.number(), &go(name)).1 {
        server::ServerStep::Transmission(agreement) => agreement,
        next => panic!("GO fails: {next:?}"),
    }
}

#[test]
fn meta_contexts_are_bound_to_their_export_name() {
    for (later, name, selected) in [
        (None, "disk", true),
        (None, "", false),
        (Some(contexts("other", &["base:allocation"])), "disk", false),
        (Some(vec![1]), "disk", false),
        (Some(vec![1; OPTION_LENGTH_MAX as usize + 1]), "disk", false),
    ] {
        let mut haggling = Haggling::fixed_newstyle();
        haggling.replies_to(OptionKind::StructuredReply, &[]);
        haggling.replies_to(OptionKind::SetMetaContext, &contexts("disk", &["base:allocation"]));
        if let Some(later) = later {
            haggling.replies_to(OptionKind::SetMetaContext, &later);
        }
        assert_eq!(enter(&mut haggling, name).allocation_context.is_some(), selected);
    }
}

#[test]
fn extended_headers_exclude_structured_reply_and_export_name() {
    let mut haggling = Haggling::fixed_newstyle();
    assert_eq!(haggling.replies_to(OptionKind::ExtendedHeaders, &[]), [OptionReply::Ack]);
    let required = Some(OptionReplyKind::ErrExtendedHeadersRequired);
    assert_eq!(haggling.error_of(OptionKind::StructuredReply, &[]), required);
    let mut option = Vec::new();
    encode_option(OptionKind::ExportName.number(), b"disk", &mut option);
    assert_eq!(haggling.receive(&option), Err(ProtocolViolation::ExportNameAfterExtendedHeaders));
}

#[test]
fn abort_is_acknowledged() {
    let (replies, next) =
        Haggling::fixed_newstyle().receive_option(OptionKind::Abort.number(), &[]);
    assert_eq!((&replies[..], next), (&[OptionReply::Ack][..], server::ServerStep::Aborted));
}

#[test]
fn send_df_requires_structured_replies() {
    for structured in [false, true] {
        let mut haggling = Haggling::fixed_newstyle();
        if structured {
            haggling.replies_to(OptionKind::StructuredReply, &[]);
        }
        let flags = enter(&mut haggling, "").flags;
        assert_eq!(flags.contains(TransmissionFlags::SEND_DF), structured);
    }
}

/// Runs our client against our server; passes at most `step` bytes at a time.
fn negotiate(offer: ClientOffer, step: usize) -> Result<(Agreement, Agreement), HandshakeFailure> {
    let mut server = server::ServerHandshake::new(export());
    let mut client = client::ClientHandshake::new(offer);
    let (mut to_client, mut to_server) = (Vec::new(), Vec::new());
    server.greet(&mut to_client);
    let (mut at_client, mut at_server) = (Vec::new(), Vec::new());
    let (mut client_agreement, mut server_agreement) = (None, None);
    while client_agreement.is_none() || server_agreement.is_none() {
        let n = step.min(to_client.len());
        at_client.extend(to_client.drain(..n));
        let (used, next) = client.advance(&at_client, &mut to_server)?;
        at_client.drain(..used);
        if let client::ClientStep::Transmission(agreement) = next {
            client_agreement = Some(agreement);
        }
        let n = step.min(to_server.len());
        at_server.extend(to_server.drain(..n));
        let (used, next) = server.advance(&at_server, &mut to_client).unwrap();
        at_server.drain(..used);
        if let server::ServerStep::Transmission(agreement) = next {
            server_agreement = Some(agreement);
        }
    }
    Ok((client_agreement.unwrap(), server_agreement.unwrap()))
}

proptest! {
    #[test]
    fn both_roles_agree_for_any_fragmentation(
        step in 1usize..200, structured: bool, extended: bool, allocation: bool, named: bool,
    ) {
        let export = if named { "disk".to_owned() } else { String::new() };
        let default = ClientOffer::default();
        let offer = ClientOffer { export, structured, extended, allocation, ..default };
        let (client, server) = negotiate(offer, step).unwrap();
        prop_assert_eq!(&client, &server);
        let dialect = match (extended, structured || allocation) {
            (true, _) => Dialect::Extended,
            (false, true) => Dialect::Structured,
            (false, false) => Dialect::Simple,
        };
        prop_assert_eq!(client.dialect, dialect);
        prop_assert_eq!(client.allocation_context.is_some(), allocation);
    }

    #[test]
    fn neither_role_panics_on_any_input(bytes: Vec<u8>, greeted: bool) {
        let mut server = server::ServerHandshake::new(export());
        let _ = server.advance(&bytes, &mut Vec::new());
        let mut input = Vec::new();
        if greeted {
            Greeting::Newstyle { flags: HandshakeFlags::all() }.encode(&mut input);
        }
        input.extend_from_slice(&bytes);
        let mut client = client::ClientHandshake::new(ClientOffer::default());
        let _ = client.advance(&input, &mut Vec::new());
    }
}

#[test]
fn client_reports_an_unknown_export() {
    let offer = ClientOffer { export: "other".into(), ..ClientOffer::default() };
    let failure = negotiate(offer, 1000).unwrap_err();
    assert!(failure.to_string().starts_with("the server has no export of that name"));
}

#[test]
fn client_accepts_oldstyle_without_an_export_name() {
    let mut greeting = Vec::new();
    let agreement = server::ServerHandshake::greet_oldstyle(&export(), &mut greeting);
    assert_eq!(greeting.len(), 152);
    let mut out = Vec::new();
    let mut client = client::ClientHandshake::new(ClientOffer::default());
    let (used, next) = client.advance(&greeting, &mut out).unwrap();
    assert_eq!(
        next,
        client::ClientStep::Transmission(Agreement { block_sizes: None, ..agreement })
    );
    assert_eq!((used, out.len()), (152, 0));
    let named = ClientOffer { export: "disk".into(), ..ClientOffer::default() };
    let refused = client::ClientHandshake::new(named).advance(&greeting, &mut out);
    assert_eq!(refused, Err(HandshakeFailure::NoExportNames));
}

#[test]
fn client_falls_back_to_supported_options() {
    // The server replies ERR_UNSUP to every option but EXPORT_NAME.
    let offer = ClientOffer {
        export: "disk".into(),
        structured: true,
        extended: true,
        allocation: true,
        private: Some(vec![1]),
        private_more: Some(vec![2]),
        private_only: false,
        tls: client::TlsWish::IfSupported,
    };
    let mut client = client::ClientHandshake::new(offer);
    let mut input = Vec::new();
    Greeting::Newstyle { flags: HandshakeFlags::FIXED_NEWSTYLE }.encode(&mut input);
    let mut sent = Vec::new();
    loop {
        let mut out = Vec::new();
        let (used, next) = client.advance(&input, &mut out).unwrap();
        input.drain(..used);
        if let client::ClientStep::Transmission(agreement) = next {
            assert_eq!(agreement.dialect, Dialect::Simple);
            break;
        }
        // The client flags precede the first option.
        let option = &out[if sent.is_empty() { 4 } else { 0 }..];
        let header = OptionHeader::decode(option).unwrap().unwrap().0;
        sent.push(header.number);
        if header.number == OptionKind::ExportName.number() {
            input.extend_from_slice(&[0; 10 + RESERVED_ZEROES]);
        } else {
            OptionReply::error(OptionReplyKind::ErrUnsupported, "")
                .encode(header.number, &mut input);
        }
    }
    use OptionKind::*;
    let options = [ExtendedHeaders, StructuredReply, Go, ExportName].map(OptionKind::number);
    assert_eq!(sent, [&[StartTls.number(), PRIVATE_OPTION], &options[..]].concat());
    assert_eq!(client.private_reply(), None);
}

proptest! {
    #[test]
    fn greetings_round_trip_and_prefixes_are_incomplete(old: bool, size: u64, bits: u16) {
        let greeting = if old {
            Greeting::Oldstyle { size, flags: TransmissionFlags::from_bits_truncate(bits) }
        } else {
            Greeting::Newstyle { flags: HandshakeFlags::from_bits_truncate(bits) }
        };
        let mut bytes = Vec::new();
        greeting.encode(&mut bytes);
        for end in 0..bytes.len() {
            prop_assert_eq!(Greeting::decode(&bytes[..end]), Ok(None));
        }
        prop_assert_eq!(Greeting::decode(&bytes), Ok(Some((greeting, bytes.len()))));
    }
}

#[test]
fn a_wrong_greeting_magic_fails_at_its_eighth_byte() {
    assert_eq!(Greeting::decode(b"HTTP/1."), Ok(None));
    assert!(Greeting::decode(b"HTTP/1.1").is_err());
    assert!(Greeting::decode(b"NBDMAGICHTTP/1.1").is_err());
}

#[test]
fn private_option_is_unsupported_unless_enabled() {
    let receive_private = |enabled: bool| {
        let mut haggling = Haggling::fixed_newstyle();
        if enabled {
            haggling.server.enable_private_option();
        }
        haggling.receive_option(PRIVATE_OPTION, b"who am I")
    };
    assert_eq!(
        receive_private(true),
        (vec![], server::ServerStep::PrivateOption(b"who am I".to_vec()))
    );
    let unsupported = OptionReplyKind::ErrUnsupported.number();
    assert!(matches!(&receive_private(false).0[..], [OptionReply::Error { number, .. }]
        if *number == unsupported));
}

#[test]
fn client_keeps_the_private_reply_after_a_refused_export() {
    let mut server = server::ServerHandshake::new(export());
    server.enable_private_option();
    server.require_admission();
    let offer = ClientOffer { private: Some(b"who".to_vec()), ..ClientOffer::default() };
    let mut client = client::ClientHandshake::new(offer);
    let (mut to_client, mut to_server) = (Vec::new(), Vec::new());
    server.greet(&mut to_client);
    let failure = loop {
        match client.advance(&to_client, &mut to_server) {
            Ok((used, _)) => drop(to_client.drain(..used)),
            Err(failure) => break failure,
        }
        let (used, next) = server.advance(&to_server, &mut to_client).unwrap();
        to_server.drain(..used);
        match next {
            server::ServerStep::PrivateOption(data) => {
                server.reply_to_private_option(Ok([&data[..], b"?"].concat()), &mut to_client);
            }
            server::ServerStep::AdmissionRequired { enters_transmission } => {
                assert!(enters_transmission, "GO enters the transmission phase");
                server.set_admission(Err("not now".to_owned()));
            }
            _ => {}
        }
    };
    let policy = OptionReplyKind::ErrPolicy.number();
    assert_eq!(failure, HandshakeFailure::Refused { number: policy, message: "not now".into() });
    assert_eq!(client.private_reply(), Some(&b"who?"[..]));
}

#[test]
fn each_request_for_the_export_needs_admission() {
    let mut server = server::ServerHandshake::new(export());
    server.require_admission();
    let mut bytes = vec![0, 0, 0, 3];
    for kind in [OptionKind::Info, OptionKind::Go, OptionKind::Go] {
        encode_option(kind.number(), &go(""), &mut bytes);
    }
    let mut requests = Vec::new();
    let all_used = loop {
        let (used, next) = server.advance(&bytes, &mut Vec::new()).unwrap();
        bytes.drain(..used);
        match next {
            server::ServerStep::AdmissionRequired { enters_transmission } => {
                requests.push(enters_transmission);
                let admitted = requests.len() == 3;
                server.set_admission(if admitted { Ok(()) } else { Err("no".to_owned()) });
            }
            server::ServerStep::Transmission(_) => break bytes.is_empty(),
            next => panic!("{next:?}"),
        }
    };
    assert!(all_used, "unconsumed input after GO");
    assert_eq!(requests, [false, true, true]);
}

#[test]
fn options_in_one_segment_are_handled_in_one_call() {
    for first in [OptionKind::StartTls.number(), 4711] {
        let mut bytes = Vec::new();
        encode_option(first, &[], &mut bytes);
        encode_option(OptionKind::Go.number(), &go(""), &mut bytes);
        let (_, next) = Haggling::fixed_newstyle().receive(&bytes).unwrap();
        assert!(matches!(next, server::ServerStep::Transmission(_)), "option {first}: {next:?}");
    }
}

/// The server's replies to the second private option do not matter.
#[test]
fn client_goes_on_whatever_the_second_private_reply() {
    let kind = OptionReplyKind::ErrInvalid;
    for second in [Ok(b"second".to_vec()), Err(OptionReply::error(kind, "unknown"))] {
        let mut server = server::ServerHandshake::new(export());
        server.enable_private_option();
        let (private, private_more) = (Some(b"1".to_vec()), Some(b"2".to_vec()));
        let offer = ClientOffer { private, private_more, ..ClientOffer::default() };
        let mut client = client::ClientHandshake::new(offer);
        let (mut to_client, mut to_server, mut received) = (Vec::new(), Vec::new(), Vec::new());
        server.greet(&mut to_client);
        loop {
            let (used, next) = client.advance(&to_client, &mut to_server).unwrap();
            to_client.drain(..used);
            if matches!(next, client::ClientStep::Transmission(_)) {
                break;
            }
            let (used, next) = server.advance(&to_server, &mut to_client).unwrap();
            to_server.drain(..used);
            if let server::ServerStep::PrivateOption(data) = next {
                let reply = if data == b"1" { Ok(b"first".to_vec()) } else { second.clone() };
                server.reply_to_private_option(reply, &mut to_client);
                received.push(data);
            }
        }
        assert_eq!(received, [b"1", b"2"]);
        assert_eq!(client.private_reply(), Some(&b"first"[..]));
    }
}

#[test]
fn a_servers_message_is_shown_up_to_its_limit() {
    let shown = |length: usize| {
        let message = "x".repeat(length);
        HandshakeFailure::Refused { number: 0, message }.to_string()
    };
    let most = client::MESSAGE_SHOWN_MAX;
    assert!(shown(most).ends_with("x)"));
    assert!(shown(most + 1).ends_with("x ...)") && shown(most + 1).len() == shown(most).len() + 4);
    assert_eq!(shown(65_536), shown(most + 1));
    let control = HandshakeFailure::Refused { number: 0, message: "\x1b[2J\n".to_owned() };
    assert_eq!(control.to_string(), "the server refused the export (\\u{1b}[2J\\n)");
}
