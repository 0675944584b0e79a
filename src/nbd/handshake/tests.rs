//! Both roles of the handshake against each other and against hand-made bytes.

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

/// A server in conversation: feed it bytes, get replies.
struct Talk {
    server: server::ServerHandshake,
    pending: Vec<u8>,
}

impl Talk {
    fn with_flags(flags: u32) -> Self {
        Self {
            server: server::ServerHandshake::new(export()),
            pending: flags.to_be_bytes().to_vec(),
        }
    }

    fn fixed() -> Self {
        Self::with_flags(3)
    }

    fn say(&mut self, bytes: &[u8]) -> Result<(Vec<u8>, server::ServerStep), ProtocolViolation> {
        self.pending.extend_from_slice(bytes);
        let mut out = Vec::new();
        let (used, next) = self.server.advance(&self.pending, &mut out)?;
        self.pending.drain(..used);
        Ok((out, next))
    }

    fn option(&mut self, number: u32, data: &[u8]) -> (Vec<OptionReply>, server::ServerStep) {
        let mut bytes = Vec::new();
        encode_option(number, data, &mut bytes);
        let (out, next) = self.say(&bytes).unwrap();
        (replies(number, &out), next)
    }

    fn ask(&mut self, kind: OptionKind, data: &[u8]) -> Vec<OptionReply> {
        self.option(kind.number(), data).0
    }

    fn refusal(&mut self, kind: OptionKind, data: &[u8]) -> Option<OptionReplyKind> {
        match self.ask(kind, data).last() {
            Some(OptionReply::Error { number, .. }) => OptionReplyKind::try_from(*number).ok(),
            _ => None,
        }
    }
}

fn replies(option: u32, mut bytes: &[u8]) -> Vec<OptionReply> {
    let mut all = Vec::new();
    while let Some(((answered, reply), used)) = OptionReply::decode(bytes).unwrap() {
        assert_eq!(answered, option);
        all.push(reply);
        bytes = &bytes[used..];
    }
    assert!(bytes.is_empty(), "half a reply");
    all
}

fn go(name: &str) -> Vec<u8> {
    let mut data = Vec::new();
    InfoRequest { export: name.into(), wanted: vec![3, 3, 99, 1] }.encode(&mut data);
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
    assert_eq!(Talk::with_flags(4).say(&[]), Err(ProtocolViolation::UnknownClientFlags(4)));
}

#[test]
fn zeros_follow_an_export_name_unless_both_sides_do_without() {
    for (flags, zeroes) in [(0, 124), (1, 124), (2, 0), (3, 0)] {
        let mut option = Vec::new();
        encode_option(OptionKind::ExportName.number(), b"disk", &mut option);
        let (out, next) = Talk::with_flags(flags).say(&option).unwrap();
        assert_eq!(out.len(), 10 + zeroes, "client flags {flags}");
        assert!(matches!(next, server::ServerStep::Transmission(_)));
    }
}

#[test]
fn a_client_of_plain_newstyle_may_only_name_an_export() {
    let mut option = Vec::new();
    encode_option(OptionKind::List.number(), &[], &mut option);
    let refused = Talk::with_flags(0).say(&option);
    assert_eq!(refused, Err(ProtocolViolation::OptionBeforeFixedNewstyle(3)));
}

#[test]
fn unknown_options_of_sane_length_are_read_and_answered() {
    let mut talk = Talk::fixed();
    for length in [0, 5, OPTION_LENGTH_MAX as usize + 7] {
        let (answers, next) = talk.option(4711, &vec![1; length]);
        assert!(matches!(&answers[..], [OptionReply::Error { number, .. }]
            if *number == OptionReplyKind::ErrUnsupported.number()));
        assert_eq!(next, server::ServerStep::More);
    }
    assert_eq!(talk.ask(OptionKind::StructuredReply, &[]), [OptionReply::Ack]);
}

#[test]
fn an_option_over_the_skip_limit_ends_the_session() {
    for (length, ends) in [(OPTION_SKIP_LENGTH_MAX, false), (OPTION_SKIP_LENGTH_MAX + 1, true)] {
        let mut head = OPTION_MAGIC.to_be_bytes().to_vec();
        head.extend_from_slice(&4711u32.to_be_bytes());
        head.extend_from_slice(&length.to_be_bytes());
        assert_eq!(Talk::fixed().say(&head).is_err(), ends);
    }
}

#[test]
fn a_known_option_of_the_longest_length_is_looked_at_and_a_longer_one_is_too_big() {
    let filler = "x".repeat(OPTION_LENGTH_MAX as usize);
    let too_big = Some(OptionReplyKind::ErrTooBig);
    let invalid = Some(OptionReplyKind::ErrInvalid);
    let mut talk = Talk::fixed();
    assert_eq!(talk.refusal(OptionKind::List, filler.as_bytes()), invalid);
    assert_eq!(talk.refusal(OptionKind::List, format!("{filler}x").as_bytes()), too_big);
}

#[test]
fn names_up_to_4096_bytes_are_looked_up_and_longer_ones_refused() {
    let mut talk = Talk::fixed();
    let unknown = go(&"n".repeat(STRING_LENGTH_MAX));
    assert_eq!(talk.refusal(OptionKind::Info, &unknown), Some(OptionReplyKind::ErrUnknown));
    let longer = go(&"n".repeat(STRING_LENGTH_MAX + 1));
    assert_eq!(talk.refusal(OptionKind::Info, &longer), Some(OptionReplyKind::ErrTooBig));
    assert_eq!(talk.refusal(OptionKind::Go, &go("a\0")), Some(OptionReplyKind::ErrInvalid));
}

#[test]
fn options_without_data_refuse_data() {
    let mut talk = Talk::fixed();
    for kind in [OptionKind::List, OptionKind::StructuredReply, OptionKind::ExtendedHeaders] {
        assert_eq!(talk.refusal(kind, b"x"), Some(OptionReplyKind::ErrInvalid), "{kind:?}");
    }
}

#[test]
fn lengths_inside_an_option_must_add_up() {
    let mut talk = Talk::fixed();
    talk.ask(OptionKind::StructuredReply, &[]);
    for data in [go("disk"), contexts("disk", &["base:allocation"])] {
        let kind = if data == go("disk") { OptionKind::Info } else { OptionKind::SetMetaContext };
        let short = &data[..data.len() - 1];
        let long = [&data[..], &[0]].concat();
        assert_eq!(talk.refusal(kind, short), Some(OptionReplyKind::ErrInvalid));
        assert_eq!(talk.refusal(kind, &long), Some(OptionReplyKind::ErrInvalid));
    }
}

#[test]
fn info_and_go_say_the_same() {
    let mut talk = Talk::fixed();
    let info = talk.ask(OptionKind::Info, &go("disk"));
    let (answers, next) = talk.option(OptionKind::Go.number(), &go("disk"));
    assert_eq!(info, answers);
    assert_eq!(info.iter().filter(|r| matches!(r, OptionReply::BlockSize(_))).count(), 1);
    assert!(matches!(info[0], OptionReply::Export { size: 1_048_576, .. }));
    assert!(matches!(next, server::ServerStep::Transmission(_)));
}

#[test]
fn contexts_are_listed_generously_and_selected_strictly() {
    let mut talk = Talk::fixed();
    let all = contexts("disk", &[]);
    assert_eq!(talk.refusal(OptionKind::ListMetaContext, &all), Some(OptionReplyKind::ErrInvalid));
    talk.ask(OptionKind::StructuredReply, &[]);
    let told = |talk: &mut Talk, kind, queries: &[&str]| {
        talk.ask(kind, &contexts("disk", queries)).len() - 1
    };
    for (queries, listed, set) in [
        (&[][..], 1, 0),
        (&["base:"], 1, 0),
        (&["base:allocation", "base:allocation"], 1, 1),
        (&["qemu:dirty-bitmap:x", "base:other"], 0, 0),
    ] {
        assert_eq!(told(&mut talk, OptionKind::ListMetaContext, queries), listed, "{queries:?}");
        assert_eq!(told(&mut talk, OptionKind::SetMetaContext, queries), set, "{queries:?}");
    }
}

fn agreed(talk: &mut Talk, name: &str) -> Agreement {
    match talk.option(OptionKind::Go.number(), &go(name)).1 {
        server::ServerStep::Transmission(agreement) => agreement,
        next => panic!("no agreement but {next:?}"),
    }
}

#[test]
fn a_selection_is_bound_to_its_export_name_and_lost_by_a_failed_one() {
    for (then, name, kept) in [
        (None, "disk", true),
        (None, "", false),
        (Some(contexts("other", &["base:allocation"])), "disk", false),
        (Some(vec![1]), "disk", false),
        (Some(vec![1; OPTION_LENGTH_MAX as usize + 1]), "disk", false),
    ] {
        let mut talk = Talk::fixed();
        talk.ask(OptionKind::StructuredReply, &[]);
        talk.ask(OptionKind::SetMetaContext, &contexts("disk", &["base:allocation"]));
        if let Some(then) = then {
            talk.ask(OptionKind::SetMetaContext, &then);
        }
        assert_eq!(agreed(&mut talk, name).allocation_context.is_some(), kept);
    }
}

#[test]
fn extended_headers_imply_structured_replies_and_exclude_export_name() {
    let mut talk = Talk::fixed();
    assert_eq!(talk.ask(OptionKind::ExtendedHeaders, &[]), [OptionReply::Ack]);
    let required = Some(OptionReplyKind::ErrExtendedHeadersRequired);
    assert_eq!(talk.refusal(OptionKind::StructuredReply, &[]), required);
    let mut option = Vec::new();
    encode_option(OptionKind::ExportName.number(), b"disk", &mut option);
    assert_eq!(talk.say(&option), Err(ProtocolViolation::ExportNameAfterExtendedHeaders));
}

#[test]
fn abort_is_acknowledged() {
    let (answers, next) = Talk::fixed().option(OptionKind::Abort.number(), &[]);
    assert_eq!((&answers[..], next), (&[OptionReply::Ack][..], server::ServerStep::Aborted));
}

#[test]
fn dont_fragment_is_offered_only_with_structured_replies() {
    for structured in [false, true] {
        let mut talk = Talk::fixed();
        if structured {
            talk.ask(OptionKind::StructuredReply, &[]);
        }
        let flags = agreed(&mut talk, "").flags;
        assert_eq!(flags.contains(TransmissionFlags::SEND_DF), structured);
    }
}

/// Runs our client against our server, `step` bytes at a time.
fn converse(wish: ClientOffer, step: usize) -> Result<(Agreement, Agreement), HandshakeFailure> {
    let mut server = server::ServerHandshake::new(export());
    let mut client = client::ClientHandshake::new(wish);
    let (mut to_client, mut to_server) = (Vec::new(), Vec::new());
    server.greet(&mut to_client);
    let (mut at_client, mut at_server) = (Vec::new(), Vec::new());
    let (mut ours, mut theirs) = (None, None);
    while ours.is_none() || theirs.is_none() {
        let n = step.min(to_client.len());
        at_client.extend(to_client.drain(..n));
        let (used, next) = client.advance(&at_client, &mut to_server)?;
        at_client.drain(..used);
        if let client::ClientStep::Transmission(agreement) = next {
            ours = Some(agreement);
        }
        let n = step.min(to_server.len());
        at_server.extend(to_server.drain(..n));
        let (used, next) = server.advance(&at_server, &mut to_client).unwrap();
        at_server.drain(..used);
        if let server::ServerStep::Transmission(agreement) = next {
            theirs = Some(agreement);
        }
    }
    Ok((ours.unwrap(), theirs.unwrap()))
}

proptest! {
    #[test]
    fn both_roles_agree_however_the_bytes_are_cut(
        step in 1usize..200, structured: bool, extended: bool, allocation: bool, named: bool,
    ) {
        let export = if named { "disk".to_owned() } else { String::new() };
        let wish = ClientOffer { export, structured, extended, allocation, ..ClientOffer::default() };
        let (client, server) = converse(wish, step).unwrap();
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
    fn no_bytes_make_either_role_panic(bytes: Vec<u8>, greeted: bool) {
        let mut server = server::ServerHandshake::new(export());
        let _ = server.advance(&bytes, &mut Vec::new());
        let mut input = Vec::new();
        if greeted {
            Greeting::Newstyle { flags: HandshakeFlags::all() }.encode(&mut input);
        }
        input.extend_from_slice(&bytes);
        let _ = client::ClientHandshake::new(ClientOffer::default()).advance(&input, &mut Vec::new());
    }
}

#[test]
fn a_client_is_told_why_it_cannot_have_an_export() {
    let wish = ClientOffer { export: "other".into(), ..ClientOffer::default() };
    let failure = converse(wish, 1000).unwrap_err();
    assert!(failure.to_string().starts_with("the server has no export of that name"));
}

#[test]
fn a_client_takes_the_old_style_as_it_comes() {
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
fn a_client_falls_back_where_the_server_knows_less() {
    // A server that answers every option but EXPORT_NAME with ERR_UNSUP.
    let wish = ClientOffer {
        export: "disk".into(),
        structured: true,
        extended: true,
        allocation: true,
        private: Some(vec![1]),
        private_only: false,
    };
    let mut client = client::ClientHandshake::new(wish);
    let mut input = Vec::new();
    Greeting::Newstyle { flags: HandshakeFlags::FIXED_NEWSTYLE }.encode(&mut input);
    let mut asked = Vec::new();
    loop {
        let mut out = Vec::new();
        let (used, next) = client.advance(&input, &mut out).unwrap();
        input.drain(..used);
        if let client::ClientStep::Transmission(agreement) = next {
            assert_eq!(agreement.dialect, Dialect::Simple);
            break;
        }
        // The first answer has the client flags in front of its option.
        let option = &out[if asked.is_empty() { 4 } else { 0 }..];
        let head = OptionHead::decode(option).unwrap().unwrap().0;
        asked.push(head.number);
        if head.number == OptionKind::ExportName.number() {
            input.extend_from_slice(&[0; 10 + RESERVED_ZEROES]);
        } else {
            OptionReply::error(OptionReplyKind::ErrUnsupported, "").encode(head.number, &mut input);
        }
    }
    use OptionKind::*;
    let options = [ExtendedHeaders, StructuredReply, Go, ExportName].map(OptionKind::number);
    assert_eq!(asked, [&[PRIVATE_OPTION], &options[..]].concat());
    assert_eq!(client.private_answer(), None);
}

proptest! {
    #[test]
    fn greetings_round_trip_and_every_prefix_is_incomplete(old: bool, size: u64, bits: u16) {
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
fn what_is_no_greeting_is_refused_at_its_eighth_byte() {
    assert_eq!(Greeting::decode(b"HTTP/1."), Ok(None));
    assert!(Greeting::decode(b"HTTP/1.1").is_err());
    assert!(Greeting::decode(b"NBDMAGICHTTP/1.1").is_err());
}

#[test]
fn private_option_is_unsupported_unless_enabled() {
    let introduced = |understands: bool| {
        let mut talk = Talk::fixed();
        if understands {
            talk.server.enable_private_option();
        }
        talk.option(PRIVATE_OPTION, b"who am I")
    };
    assert_eq!(introduced(true), (vec![], server::ServerStep::PrivateOption(b"who am I".to_vec())));
    let unsupported = OptionReplyKind::ErrUnsupported.number();
    assert!(matches!(&introduced(false).0[..], [OptionReply::Error { number, .. }]
        if *number == unsupported));
}

#[test]
fn a_client_hears_the_answer_to_its_private_option_even_when_it_gets_no_export() {
    let mut server = server::ServerHandshake::new(export());
    server.enable_private_option();
    server.require_admission();
    let wish = ClientOffer { private: Some(b"who".to_vec()), ..ClientOffer::default() };
    let mut client = client::ClientHandshake::new(wish);
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
                server.answer_private(Ok([&data[..], b"?"].concat()), &mut to_client);
            }
            server::ServerStep::AdmissionRequired { to_enter } => {
                assert!(to_enter, "GO enters");
                server.decide(Err("not now".to_owned()));
            }
            _ => {}
        }
    };
    let policy = OptionReplyKind::ErrPolicy.number();
    assert_eq!(failure, HandshakeFailure::Refused { number: policy, message: "not now".into() });
    assert_eq!(client.private_answer(), Some(&b"who?"[..]));
}

#[test]
fn each_wish_for_the_export_is_decided_anew() {
    let mut server = server::ServerHandshake::new(export());
    server.require_admission();
    let mut bytes = vec![0, 0, 0, 3];
    for kind in [OptionKind::Info, OptionKind::Go, OptionKind::Go] {
        encode_option(kind.number(), &go(""), &mut bytes);
    }
    let mut wishes = Vec::new();
    let agreed = loop {
        let (used, next) = server.advance(&bytes, &mut Vec::new()).unwrap();
        bytes.drain(..used);
        match next {
            server::ServerStep::AdmissionRequired { to_enter } => {
                wishes.push(to_enter);
                let admitted = wishes.len() == 3;
                server.decide(if admitted { Ok(()) } else { Err("no".to_owned()) });
            }
            server::ServerStep::Transmission(_) => break bytes.is_empty(),
            next => panic!("{next:?}"),
        }
    };
    assert!(agreed, "all of it was used");
    assert_eq!(wishes, [false, true, true]);
}

#[test]
fn what_follows_an_option_without_data_is_answered_without_further_bytes() {
    for unread in [OptionKind::StartTls.number(), 4711] {
        let mut bytes = Vec::new();
        encode_option(unread, &[], &mut bytes);
        encode_option(OptionKind::Go.number(), &go(""), &mut bytes);
        let (_, next) = Talk::fixed().say(&bytes).unwrap();
        assert!(matches!(next, server::ServerStep::Transmission(_)), "option {unread}: {next:?}");
    }
}
