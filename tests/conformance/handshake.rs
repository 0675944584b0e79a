//! The handshake: client flags, options, exports, meta contexts, extended headers.

use crate::subject::{Ours, Subject};
use harness::raw::*;
use harness::session::{Mode, Request, Session};
use harness::{MIB, noise, wait_until};
use std::collections::HashMap;

/// An undefined option.
const UNKNOWN_OPTION: u32 = 0x7777_0001;

/// Ends the option haggling with EXPORT_NAME; with `padded`, 124 zero bytes must follow.
#[track_caller]
fn enter_by_name(mut wire: Wire, name: &[u8], padded: bool) -> Session {
    wire.send_option(OPT_EXPORT_NAME, name);
    let size = wire.recv_u64();
    let flags = wire.recv_u16();
    if padded {
        assert_eq!(wire.recv(ZEROES), [0; ZEROES], "padding");
    }
    Session::after_handshake(wire, Mode::Simple, None, size, flags)
}

/// "... the server MUST drop the TCP connection if the client sets an unknown flag" ("Client
/// flags").
#[test]
fn unknown_client_flags_close_the_connection() {
    let subject = Subject::any();
    for unknown in [1 << 2, 1 << 15, FIXED_NEWSTYLE | 1 << 16, NO_ZEROES | 1 << 31, u32::MAX] {
        let mut wire = Wire::haggle(subject.endpoint(), unknown);
        let _ = wire.try_send(&encode_option(OPT_EXPORT_NAME, b""));
        wire.expect_closed(&format!("client flags {unknown:#x}"));
    }
}

/// "If set, the server MUST NOT send the 124 bytes of zeroes when the client ends negotiation with
/// `NBD_OPT_EXPORT_NAME`" ("Client flags"). "The server MUST NOT send any zero padding bytes after
/// the `NBD_REP_ACK` data" ("Option types").
#[test]
fn no_zeroes_omits_the_padding() {
    let subject = Subject::any();
    for flags in [0, FIXED_NEWSTYLE, NO_ZEROES, FIXED_NEWSTYLE | NO_ZEROES] {
        let wire = Wire::haggle(subject.endpoint(), flags);
        let padded = flags & NO_ZEROES == 0;
        let mut session = enter_by_name(wire, b"", padded);
        assert!(session.size >= 8 * MIB, "export size, client flags {flags:#x}");
        session.assert_in_sync();
    }
    let unpadded_after_go = Wire::haggle(subject.endpoint(), FIXED_NEWSTYLE);
    Session::go(unpadded_after_go, Mode::Simple, None, b"").assert_in_sync();
}

/// "The presence of the option length in every option allows the server to skip any options
/// presented by the client that it does not understand" ("Newstyle negotiation"). A server without
/// TLS replies to STARTTLS with ERR_POLICY, ERR_UNSUP "or another error explicitly permitted by
/// this document" ("NOTLS mode").
#[test]
fn unknown_options_are_skipped() {
    let subject = Subject::any();
    let mut wire = subject.haggle();
    for option in [UNKNOWN_OPTION, 0, OPT_PEEK_EXPORT, 12, u32::MAX] {
        for length in [0, 1, 300, STRING_MAX, 8 << 10] {
            let answer = wire.ask_final(option, &vec![0x49; length]);
            assert_eq!(answer, REP_ERR_UNSUP, "option {option:#x} with {length} bytes");
        }
    }
    let tls = wire.ask_final(OPT_STARTTLS, &[]);
    assert!([REP_ERR_UNSUP, REP_ERR_POLICY].contains(&tls), "STARTTLS: {tls:#x}");
    wire.assert_haggling_in_sync();
    Session::go(wire, Mode::Simple, None, b"").assert_in_sync();
    subject.assert_serves();
}

/// "... if a server believes a client's behaviour constitutes a denial of service, it MAY initiate
/// a hard disconnect" ("Termination of the session during option haggling").
#[test]
fn oversized_options_close_the_connection() {
    let subject = Subject::any();
    let before = memory_peak(&subject);
    for option in [UNKNOWN_OPTION, OPT_EXPORT_NAME, OPT_GO, OPT_LIST, OPT_SET_META_CONTEXT] {
        for length in [u32::MAX, i32::MAX as u32, 1 << 30] {
            let mut wire = subject.haggle();
            wire.send(&encode_option_of_length(option, length, &[]));
            let received = wire.recv_to_end();
            let is_short = received.len() <= 20 + STRING_MAX;
            assert!(is_short, "option {option} of {length} bytes: more than one error reply");
            let mut wire = subject.haggle();
            wire.send(&encode_option_of_length(option, length, &[]));
            let filler = vec![0; MIB as usize];
            let all_sent = (0..64).all(|_| wire.try_send(&filler).is_ok());
            assert!(!all_sent, "option {option} of {length} bytes: the connection stays open");
        }
    }
    let grown = memory_peak(&subject).saturating_sub(before);
    assert!(grown < 32 * MIB, "{grown} bytes allocated for announced lengths");
    subject.assert_serves();
}

/// Peak resident memory of flexnbd in bytes; 0 for a foreign server, where it is unknown.
fn memory_peak(subject: &Subject) -> u64 {
    match subject {
        Subject::Ours(ours) => ours.server.resources().rss_bytes_peak,
        Subject::Foreign { .. } => 0,
    }
}

/// A string "MUST NOT contain `NUL` characters, SHOULD be no longer than 256 bytes and MUST be no
/// longer than 4096 bytes" ("Conventions"). "If the chosen export does not exist ..., the server
/// MUST terminate the session" ("Option types", EXPORT_NAME).
#[test]
fn invalid_export_names_are_refused() {
    let subject = Subject::any();
    let mut wire = subject.haggle();
    for option in [OPT_INFO, OPT_GO] {
        let longest = vec![b'n'; STRING_MAX];
        let answer = wire.ask_final(option, &encode_go(&longest, &[]));
        assert_eq!(answer, REP_ERR_UNKNOWN, "an unknown name of {STRING_MAX} bytes");
        let too_long = vec![b'n'; STRING_MAX + 1];
        let answer = wire.ask_final(option, &encode_go(&too_long, &[]));
        let refusals = [REP_ERR_INVALID, REP_ERR_TOO_BIG];
        assert!(refusals.contains(&answer), "a name of {} bytes: {answer:#x}", STRING_MAX + 1);
        for name in [b"a\0b".as_slice(), b"\xff\xfe", b"\xed\xa0\x80"] {
            let answer = wire.ask_final(option, &encode_go(name, &[]));
            let refusals = [REP_ERR_INVALID, REP_ERR_UNKNOWN];
            assert!(refusals.contains(&answer), "name {name:02x?}: {answer:#x}");
        }
    }
    wire.assert_haggling_in_sync();
    for name in [b"no such export".to_vec(), vec![b'n'; STRING_MAX + 1]] {
        let mut wire = subject.haggle();
        wire.send_option(OPT_EXPORT_NAME, &name);
        wire.expect_closed("EXPORT_NAME, which has no error reply, of an unknown export");
    }
    subject.assert_serves();
}

/// "The client MUST NOT send any additional data with the option, and the server SHOULD reject a
/// request that includes data with `NBD_REP_ERR_INVALID`" ("Option types").
#[test]
fn options_without_data_refuse_data() {
    let subject = Subject::any();
    let mut wire = subject.haggle();
    for option in [OPT_LIST, OPT_STRUCTURED_REPLY, OPT_EXTENDED_HEADERS] {
        for data in [&b"\0"[..], b"\0\0\0\0", b"data that does not belong here"] {
            let answer = wire.ask_final(option, data);
            let unsupported = !subject.is_ours() && answer == REP_ERR_UNSUP;
            let refused = answer == REP_ERR_INVALID || unsupported;
            assert!(refused, "option {option} with data: {answer:#x}");
        }
    }
    assert_list_names_an_export(&mut wire);
    Session::go(wire, Mode::Simple, None, b"").assert_in_sync();
}

/// "The server MUST reply with `NBD_REP_ACK`", "SHOULD ignore any data sent by the client", and
/// "SHOULD gracefully handle the client sending an `NBD_OPT_ABORT` and closing the connection
/// without waiting for a reply" ("Option types").
#[test]
fn abort_is_acknowledged_before_the_close() {
    let subject = Subject::any();
    for length in [0, 7, 64 << 10, 1 << 20] {
        let mut wire = subject.haggle();
        let answer = wire.ask_final(OPT_ABORT, &vec![b'!'; length]);
        assert_eq!(answer, REP_ACK, "ABORT with {length} bytes");
        wire.expect_closed("after ABORT");
    }
    let mut wire = subject.haggle();
    wire.send_option(OPT_ABORT, &[]);
    wire.reset();
    subject.assert_serves();
}

#[track_caller]
fn assert_list_names_an_export(wire: &mut Wire) {
    let (replies, last) = wire.ask(OPT_LIST, &[]);
    assert_eq!(last, REP_ACK, "LIST without data");
    let names: Vec<&[u8]> = replies
        .iter()
        .map(|reply| {
            assert_eq!(reply.kind, REP_SERVER, "LIST is answered with SERVER replies");
            let length = u32::from_be_bytes(reply.data[..4].try_into().unwrap()) as usize;
            &reply.data[4..4 + length]
        })
        .collect();
    assert!(!names.is_empty(), "LIST names an export");
    assert!(names.iter().all(|name| std::str::from_utf8(name).is_ok()), "names are UTF-8");
}

/// "... the server MUST reply with the same set of information, such as transmission flags in the
/// `NBD_INFO_EXPORT` reply" ("Option types", INFO and GO).
#[test]
fn info_and_go_reply_the_same() {
    let subject = Subject::any();
    let all = [INFO_EXPORT, INFO_NAME, INFO_DESCRIPTION, INFO_BLOCK_SIZE, INFO_BLOCK_SIZE, 0x4242];
    for requests in [&[][..], &all, &[INFO_BLOCK_SIZE], &[0xffff, 0xffff]] {
        let mut wire = subject.haggle();
        let info = all_infos(&mut wire, OPT_INFO, requests);
        let go = all_infos(&mut wire, OPT_GO, requests);
        assert_eq!(info, go, "INFO and GO with requests {requests:?}");
        check_infos(&subject, &go, requests);
        Session::after_handshake(wire, Mode::Simple, None, 0, 0).assert_in_sync();
    }
}

#[track_caller]
fn all_infos(wire: &mut Wire, option: u32, requests: &[u16]) -> Vec<OptionReply> {
    let (mut replies, last) = wire.ask(option, &encode_go(b"", requests));
    assert_eq!(last, REP_ACK, "option {option} for the default export");
    replies.sort();
    replies
}

fn info_of(replies: &[OptionReply], kind: u16) -> Vec<&[u8]> {
    let prefix = kind.to_be_bytes();
    replies.iter().filter(|r| r.data[..2] == prefix).map(|r| &r.data[2..]).collect()
}

fn check_infos(subject: &Subject, replies: &[OptionReply], requests: &[u16]) {
    assert!(replies.iter().all(|r| r.kind == REP_INFO), "only INFO replies before the ACK");
    for kind in [INFO_EXPORT, INFO_NAME, INFO_DESCRIPTION, INFO_BLOCK_SIZE] {
        assert!(info_of(replies, kind).len() <= 1, "info {kind} is sent once");
    }
    let export = info_of(replies, INFO_EXPORT);
    assert_eq!(export.len(), 1, "INFO_EXPORT is always sent");
    assert_eq!(export[0].len(), 10, "length of INFO_EXPORT");
    if let Some(sizes) = info_of(replies, INFO_BLOCK_SIZE).first() {
        assert_eq!(sizes.len(), 12, "length of INFO_BLOCK_SIZE");
        let size = |i: usize| u32::from_be_bytes(sizes[i..i + 4].try_into().unwrap());
        let (minimum, preferred, maximum) = (size(0), size(4), size(8));
        assert!(minimum.is_power_of_two() && minimum <= 1 << 16, "minimum {minimum}");
        assert!(preferred.is_power_of_two() && preferred >= minimum.max(512), "{preferred}");
        assert!(maximum == u32::MAX || maximum % minimum == 0, "maximum {maximum}");
    }
    if subject.is_ours() && requests.contains(&INFO_BLOCK_SIZE) {
        let sizes = [1_u32, 4096, 32 << 20].map(u32::to_be_bytes).concat();
        assert_eq!(info_of(replies, INFO_BLOCK_SIZE), [sizes], "block sizes of flexnbd");
    }
}

/// Length of name "MUST be no larger than the option data length - 6" ("Option types", INFO and
/// GO).
#[test]
fn malformed_info_and_go_are_refused() {
    let subject = Subject::any();
    let mut wire = subject.haggle();
    let valid = encode_go(b"name", &[INFO_NAME, INFO_BLOCK_SIZE]);
    let with = |at: usize, bytes: &[u8]| {
        let mut data = valid.clone();
        data[at..at + bytes.len()].copy_from_slice(bytes);
        data
    };
    let malformed = [
        ("no data at all", Vec::new()),
        ("only the length of a name", valid[..4].to_vec()),
        ("no count of requests", valid[..8].to_vec()),
        ("half a count of requests", valid[..9].to_vec()),
        ("a name longer than the option", with(0, &[0, 0, 0, 11])),
        ("a name that leaves no room for the count", with(0, &[0, 0, 0, 9])),
        ("a name of 4 GiB", with(0, &[0xff; 4])),
        ("a length whose sum wraps", with(0, &[0xff, 0xff, 0xff, 0xfc])),
        ("more requests announced than sent", with(8, &[0, 3])),
        ("fewer requests announced than sent", with(8, &[0, 1])),
        ("65535 requests", with(8, &[0xff, 0xff])),
        ("half a request", valid[..13].to_vec()),
        ("a byte too many", [&valid[..], &[0]].concat()),
    ];
    for option in [OPT_INFO, OPT_GO] {
        for (what, data) in &malformed {
            assert_eq!(wire.ask_final(option, data), REP_ERR_INVALID, "{what} in option {option}");
        }
    }
    wire.assert_haggling_in_sync();
}

/// "`NBD_REP_ERR_UNKNOWN`: The chosen export does not exist on this server. In this case, the
/// server SHOULD NOT send `NBD_REP_INFO` replies" ("Option types", INFO and GO).
#[test]
fn info_and_go_refuse_unknown_exports() {
    let subject = Subject::any();
    let mut wire = subject.haggle();
    for option in [OPT_INFO, OPT_GO] {
        let (infos, last) = wire.ask(option, &encode_go(b"no such export", &[INFO_NAME]));
        assert_eq!(last, REP_ERR_UNKNOWN, "option {option} for an unknown export");
        assert!(infos.is_empty(), "INFO replies for an unknown export");
    }
    Session::go(wire, Mode::Simple, None, b"").assert_in_sync();
}

/// "`NBD_FLAG_HAS_FLAGS`: MUST always be 1." `NBD_FLAG_SEND_DF`: "MUST leave this flag clear if
/// structured replies have not been negotiated"; extended headers permit it as well.
/// `NBD_FLAG_SEND_FAST_ZERO`: "MUST set this transmission flag to 0 if `NBD_FLAG_SEND_WRITE_ZEROES`
/// is not set" ("Transmission flags").
#[test]
fn transmission_flags_match_the_negotiated_mode() {
    let subject = Subject::any();
    for session in subject.sessions() {
        assert_ne!(session.flags & HAS_FLAGS, 0, "HAS_FLAGS is always set");
        let fast_zero_alone =
            session.flags & SEND_FAST_ZERO != 0 && session.flags & SEND_WRITE_ZEROES == 0;
        assert!(!fast_zero_alone, "FAST_ZERO without WRITE_ZEROES");
        if session.mode == Mode::Simple {
            assert_eq!(session.flags & SEND_DF, 0, "DF without structured replies");
        }
        if subject.is_ours() {
            let ours = SEND_FLUSH | SEND_FUA | SEND_TRIM | SEND_WRITE_ZEROES | SEND_CACHE;
            let more = CAN_MULTI_CONN | SEND_FAST_ZERO;
            let df = if session.mode == Mode::Simple { 0 } else { SEND_DF };
            assert_eq!(session.flags, HAS_FLAGS | ours | more | df, "all flags of flexnbd");
        }
    }
}

/// "This option MUST NOT be requested unless structured replies have been negotiated first. If a
/// client attempts to do so, a server SHOULD send `NBD_REP_ERR_INVALID`" ("Option types"). Extended
/// headers permit it as well.
#[test]
fn set_meta_context_needs_structured_replies() {
    let subject = Subject::any();
    let mut wire = subject.haggle();
    let query = encode_meta(b"", &[ALLOCATION.as_bytes()]);
    let answer = wire.ask_final(OPT_SET_META_CONTEXT, &query);
    assert_eq!(answer, REP_ERR_INVALID, "SET_META_CONTEXT before structured replies");
    wire.assert_haggling_in_sync();
    let mut session = Session::go(wire, Mode::Simple, None, b"");
    session.refused(Request::new(BLOCK_STATUS, 0, 4096), &[EINVAL]);
}

#[track_caller]
fn contexts(wire: &mut Wire, option: u32, queries: &[&[u8]]) -> Vec<String> {
    let (replies, last) = wire.ask(option, &encode_meta(b"", queries));
    assert_eq!(last, REP_ACK, "option {option} for {queries:?}");
    assert!(replies.iter().all(|r| r.kind == REP_META_CONTEXT), "contexts before the ACK");
    replies.iter().map(|r| String::from_utf8(r.data[4..].to_vec()).unwrap()).collect()
}

#[track_caller]
fn structured(subject: &Subject) -> Wire {
    let mut wire = subject.haggle();
    assert_eq!(wire.ask_final(OPT_STRUCTURED_REPLY, &[]), REP_ACK, "structured replies");
    wire
}

/// "If zero queries are sent, then the server MUST return all the metadata contexts" (LIST). "If
/// zero queries are sent, the server MUST select no metadata contexts" (SET). "... the server MUST
/// ignore query strings belonging to an unknown namespace" ("Option types").
#[test]
fn meta_context_queries_select_their_matches() {
    let subject = Subject::any();
    let mut wire = structured(&subject);
    let (list, set) = (OPT_LIST_META_CONTEXT, OPT_SET_META_CONTEXT);
    let own = ALLOCATION.as_bytes();
    let listing: [&[&[u8]]; 5] = [&[], &[b"base:"], &[own], &[own, own], &[b"x-none:such", own]];
    for queries in listing {
        let found = contexts(&mut wire, list, queries);
        assert!(found.iter().any(|c| c == ALLOCATION), "LIST of {queries:?}: {found:?}");
        let once = found.iter().filter(|c| *c == ALLOCATION).count();
        assert_eq!(once, 1, "LIST of {queries:?} returns it once");
    }
    let selecting: [&[&[u8]]; 3] = [&[own], &[own, own], &[b"x-none:such", own, b"base:"]];
    for queries in selecting {
        assert_eq!(contexts(&mut wire, set, queries), [ALLOCATION], "SET of {queries:?}");
    }
    let selecting_nothing: [&[&[u8]]; 5] =
        [&[], &[b"base:"], &[b"x-none:such"], &[b"base:none"], &[b"base:allocations"]];
    for queries in selecting_nothing {
        assert!(contexts(&mut wire, set, queries).is_empty(), "SET of {queries:?}");
    }
    let listing_nothing: [&[&[u8]]; 3] = [&[b"x-none:"], &[b"base:none"], &[b"base:alloc"]];
    for queries in listing_nothing {
        assert!(contexts(&mut wire, list, queries).is_empty(), "LIST of {queries:?}");
    }
}

/// "If the option request is syntactically invalid (such as a query length that would require
/// reading beyond the original length given in the option header), the server MUST fail the request
/// with `NBD_REP_ERR_INVALID`" ("Option types").
#[test]
fn malformed_meta_context_queries_are_refused() {
    let subject = Subject::any();
    let mut wire = structured(&subject);
    let valid = encode_meta(b"", &[ALLOCATION.as_bytes()]);
    let with = |at: usize, value: u32| {
        let mut data = valid.clone();
        data[at..at + 4].copy_from_slice(&value.to_be_bytes());
        data
    };
    let malformed = [
        ("no data at all", Vec::new()),
        ("half a name length", valid[..3].to_vec()),
        ("a name and no count", valid[..4].to_vec()),
        ("a count and no query", valid[..8].to_vec()),
        ("half a query", valid[..15].to_vec()),
        ("a name longer than the option", with(0, 1000)),
        ("a name of 4 GiB", with(0, u32::MAX)),
        ("two queries announced", with(4, 2)),
        ("4 G queries announced", with(4, u32::MAX)),
        ("no query announced", with(4, 0)),
        ("a query longer than the option", with(8, 1000)),
        ("a query shorter than the option", with(8, 3)),
        ("a query of 4 GiB", with(8, u32::MAX)),
        ("a byte too many", [&valid[..], &[0]].concat()),
    ];
    for option in [OPT_LIST_META_CONTEXT, OPT_SET_META_CONTEXT] {
        for (what, data) in &malformed {
            assert_eq!(wire.ask_final(option, data), REP_ERR_INVALID, "{what} in option {option}");
        }
        let oversized = encode_meta(b"", &[&[b'q'; STRING_MAX + 1]]);
        let answer = wire.ask_final(option, &oversized);
        let is_refused = [REP_ERR_INVALID, REP_ERR_TOO_BIG].contains(&answer);
        assert!(is_refused || !subject.is_ours(), "a query over {STRING_MAX} bytes: {answer:#x}");
    }
    wire.assert_haggling_in_sync();
}

/// "Issuing this command replaces all previously-set metadata contexts (including when this command
/// fails)" ("Option types").
#[test]
fn set_meta_context_replaces_the_previous_selection() {
    let subject = Subject::any();
    let later: [(&str, Vec<u8>); 4] = [
        ("an empty selection", encode_meta(b"", &[])),
        ("a selection of unknown contexts", encode_meta(b"", &[b"x-none:such"])),
        ("a malformed selection", vec![0, 0]),
        (
            "a selection for an unknown export",
            encode_meta(b"no such export", &[b"base:allocation"]),
        ),
    ];
    for (what, data) in later {
        let mut wire = structured(&subject);
        assert_eq!(
            contexts(&mut wire, OPT_SET_META_CONTEXT, &[ALLOCATION.as_bytes()]),
            [ALLOCATION]
        );
        wire.ask_final(OPT_SET_META_CONTEXT, &data);
        let mut session = Session::go(wire, Mode::Structured, None, b"");
        let answer = session.ask(Request::new(BLOCK_STATUS, 0, 4096));
        assert_eq!(answer.error, EINVAL, "BLOCK_STATUS after {what}");
        session.assert_in_sync();
    }
}

/// "A client MUST NOT send `NBD_CMD_BLOCK_STATUS` unless" its last SET_META_CONTEXT "referred to
/// the same export name that was ultimately selected for transmission phase" ("Option types").
#[test]
fn meta_contexts_are_bound_to_the_export_name() {
    let what = "meta contexts bound to an export name";
    let Some(ours) = Ours::start(what, 8 * MIB, &["--export", "disk"]) else { return };
    for (selected, entered) in [("disk", ""), ("", "disk"), ("disk", "disk"), ("", "")] {
        let mut wire = Wire::haggle(ours.endpoint(), FIXED_NEWSTYLE | NO_ZEROES);
        assert_eq!(wire.ask_final(OPT_STRUCTURED_REPLY, &[]), REP_ACK);
        let query = encode_meta(selected.as_bytes(), &[ALLOCATION.as_bytes()]);
        let (granted, last) = wire.ask(OPT_SET_META_CONTEXT, &query);
        assert_eq!((granted.len(), last), (1, REP_ACK), "a context for {selected:?}");
        let id = u32::from_be_bytes(granted[0].data[..4].try_into().unwrap());
        let mut session = Session::go(wire, Mode::Structured, Some(id), entered.as_bytes());
        let answer = session.ask(Request::new(BLOCK_STATUS, 0, 4096));
        let expected = if selected == entered { 0 } else { EINVAL };
        assert_eq!(answer.error, expected, "selected for {selected:?}, entered {entered:?}");
        session.assert_in_sync();
    }
}

/// "When successful, this option takes precedence over structured replies" ("Option types",
/// EXTENDED_HEADERS).
#[test]
fn extended_headers_take_precedence_over_structured_replies() {
    let subject = Subject::any();
    let Some(mut session) = subject.session(Mode::Extended) else { return };
    assert!(session.context.is_some(), "contexts without the option STRUCTURED_REPLY");
    session.assert_in_sync();

    let mut wire = extended(&subject);
    let answer = wire.ask_final(OPT_STRUCTURED_REPLY, &[]);
    assert_eq!(answer, REP_ERR_EXT_HEADER_REQD, "structured replies after extended headers");
    Session::go(wire, Mode::Extended, None, b"").assert_in_sync();

    let mut wire = extended(&subject);
    wire.send_option(OPT_EXPORT_NAME, b"");
    wire.expect_closed("EXPORT_NAME after extended headers");

    let mut wire = structured(&subject);
    assert_eq!(
        wire.ask_final(OPT_EXTENDED_HEADERS, &[]),
        REP_ACK,
        "extended headers after structured replies"
    );
    let mut session = Session::go(wire, Mode::Extended, None, b"");
    session.assert_in_sync();

    session.wire.send(&encode_request(READ, 0, 1, 0, 512));
    session.wire.send(&[0; 4]);
    let received = session.wire.recv_to_end();
    let is_closed = received.is_empty() || !subject.is_ours();
    assert!(is_closed && received.len() < 512, "a compact request ends an extended session");
}

#[track_caller]
fn extended(subject: &Subject) -> Wire {
    let mut wire = subject.haggle();
    assert_eq!(wire.ask_final(OPT_EXTENDED_HEADERS, &[]), REP_ACK, "extended headers");
    wire
}

#[test]
fn extended_requests_have_64_bit_lengths() {
    let subject = Subject::any();
    let Some(mut session) = subject.session(Mode::Extended) else { return };
    for length in [1 << 32, (1 << 32) + 512, 1 << 63, u64::MAX] {
        for command in [READ, TRIM, CACHE, BLOCK_STATUS] {
            session.refused(Request::new(command, 0, length), &[EINVAL]);
        }
        session.refused(Request::new(WRITE_ZEROES, 0, length), &[ENOSPC]);
    }
}

#[test]
fn payload_len_announces_a_payload() {
    let subject = Subject::any();
    let Some(mut session) = subject.session(Mode::Extended) else { return };
    let (cookie, mut bytes) = session.encode_header(TRIM, PAYLOAD_LEN, 0, 512);
    bytes.extend([0x25; 512]);
    session.wire.send(&bytes);
    expect_extended_error(&mut session, cookie, 0, EINVAL);
    session.assert_in_sync();
    // QEMU 10 sends WRITE with a payload and without the flag.
    let data = noise(512, 6);
    let (cookie, mut bytes) = session.encode_header(WRITE, 0, 4096, 512);
    bytes.extend(&data);
    session.wire.send(&bytes);
    let pending = HashMap::from([(cookie, Request::write(4096, &data))]);
    assert_eq!(session.recv_reply(&pending).1.error, 0, "a write without PAYLOAD_LEN");
    assert_eq!(session.read(4096, 512), data);
}

/// Receives one extended error chunk and checks each field.
#[track_caller]
fn expect_extended_error(session: &mut Session, cookie: u64, offset: u64, error: u32) {
    let wire = &mut session.wire;
    assert_eq!(wire.recv_u32(), EXTENDED_REPLY);
    assert_eq!(wire.recv_u16(), CHUNK_DONE);
    assert_eq!(wire.recv_u16() >> 15, 1, "an error chunk");
    assert_eq!(wire.recv_u64(), cookie);
    assert_eq!(wire.recv_u64(), offset, "offset of the request");
    let length = wire.recv_u64();
    assert!(length <= 4096 + 14, "an error chunk of {length} bytes");
    let payload = wire.recv(length as usize);
    assert_eq!(payload[..4], error.to_be_bytes(), "error");
}

/// A connection may end after any byte of the handshake, by FIN or RST; it must change nothing.
#[test]
fn an_aborted_handshake_changes_nothing() {
    let subject = Subject::any();
    let mut bystander = subject.session(Mode::Simple).unwrap();
    bystander.ok(Request::write(4096, b"unchanged"));
    let initial = match &subject {
        Subject::Ours(ours) => Some((ours, ours.server.settled_resources())),
        Subject::Foreign { .. } => None,
    };
    let handshake = typical_handshake();
    for length in 0..=handshake.len() {
        let mut wire = Wire::connect_with_retries(subject.endpoint());
        wire.send(&handshake[..length]);
        if length % 2 == 0 { wire.reset() } else { drop(wire) }
    }
    if let Some((ours, before)) = initial {
        wait_until("the sessions to end", || {
            let now = ours.server.resources();
            now.threads <= before.threads && now.descriptors <= before.descriptors
        });
    }
    assert_eq!(bystander.read(4096, 9), b"unchanged");
    let mut plain = subject.session(Mode::Simple).unwrap();
    plain.refused(Request::new(BLOCK_STATUS, 0, 4096), &[EINVAL]);
    assert_eq!(plain.read(4096, 9), b"unchanged");
}
