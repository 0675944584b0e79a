//! Points 1 to 7: the haggling, up to the first request.

use crate::subject::{Ours, Subject};
use harness::raw::*;
use harness::session::{Mode, Request, Session};
use harness::{MIB, noise, wait_until};
use std::collections::HashMap;

/// An option that nobody has defined.
const UNKNOWN_OPTION: u32 = 0x7777_0001;

/// Ends the haggling with EXPORT_NAME; `padded` says whether zeroes must follow.
#[track_caller]
fn enter_by_name(mut wire: Wire, name: &[u8], padded: bool) -> Session {
    wire.send_option(OPT_EXPORT_NAME, name);
    let size = wire.recv_u64();
    let flags = wire.recv_u16();
    if padded {
        assert_eq!(wire.recv(ZEROES), [0; ZEROES], "the padding is zero");
    }
    Session::after_handshake(wire, Mode::Simple, None, size, flags)
}

#[test]
fn point_01_unknown_client_flags_end_the_session_and_known_ones_decide_the_padding() {
    let subject = Subject::any();
    for unknown in [1 << 2, 1 << 15, FIXED_NEWSTYLE | 1 << 16, NO_ZEROES | 1 << 31, u32::MAX] {
        let mut wire = Wire::haggle(subject.endpoint(), unknown);
        let _ = wire.try_send(&encode_option(OPT_EXPORT_NAME, b""));
        wire.expect_closed(&format!("client flags {unknown:#x}"));
    }
    for flags in [0, FIXED_NEWSTYLE, NO_ZEROES, FIXED_NEWSTYLE | NO_ZEROES] {
        let wire = Wire::haggle(subject.endpoint(), flags);
        let padded = flags & NO_ZEROES == 0;
        let mut session = enter_by_name(wire, b"", padded);
        assert!(session.size >= 8 * MIB, "the size of the export, client flags {flags:#x}");
        session.assert_in_sync();
    }
    let unpadded_after_go = Wire::haggle(subject.endpoint(), FIXED_NEWSTYLE);
    Session::go(unpadded_after_go, Mode::Simple, None, b"").assert_in_sync();
}

#[test]
fn point_02_unknown_options_are_skipped_absurd_lengths_end_it_and_strings_are_checked() {
    let subject = Subject::any();
    unknown_options_are_skipped(&subject);
    absurd_lengths_end_the_session(&subject);
    names_are_checked(&subject);
    subject.still_serves();
}

fn unknown_options_are_skipped(subject: &Subject) {
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
}

fn absurd_lengths_end_the_session(subject: &Subject) {
    let before = memory_peak(subject);
    for option in [UNKNOWN_OPTION, OPT_EXPORT_NAME, OPT_GO, OPT_LIST, OPT_SET_META_CONTEXT] {
        for length in [u32::MAX, i32::MAX as u32, 1 << 30] {
            let mut wire = subject.haggle();
            wire.send(&encode_option_of_length(option, length, &[]));
            let last_words = wire.recv_to_end();
            let lies = last_words.len() > 20 + STRING_MAX;
            assert!(!lies, "option {option} of {length} bytes is answered at length");
            let mut wire = subject.haggle();
            wire.send(&encode_option_of_length(option, length, &[]));
            let filler = vec![0; MIB as usize];
            let swallowed = (0..64).all(|_| wire.try_send(&filler).is_ok());
            assert!(!swallowed, "option {option} of {length} bytes does not end the session");
        }
    }
    let grown = memory_peak(subject).saturating_sub(before);
    assert!(grown < 32 * MIB, "{grown} bytes of memory for lengths that were only claimed");
}

/// The most memory our own server ever had; zero for another one, of which we cannot know.
fn memory_peak(subject: &Subject) -> u64 {
    match subject {
        Subject::Ours(ours) => ours.server.resources().rss_bytes_peak,
        Subject::Foreign { .. } => 0,
    }
}

fn names_are_checked(subject: &Subject) {
    let mut wire = subject.haggle();
    for option in [OPT_INFO, OPT_GO] {
        let longest = vec![b'n'; STRING_MAX];
        let answer = wire.ask_final(option, &encode_go(&longest, &[]));
        assert_eq!(answer, REP_ERR_UNKNOWN, "an unknown name of {STRING_MAX} bytes");
        let too_long = vec![b'n'; STRING_MAX + 1];
        let answer = wire.ask_final(option, &encode_go(&too_long, &[]));
        let refusals = [REP_ERR_INVALID, REP_ERR_TOO_BIG];
        assert!(refusals.contains(&answer), "a name of {} bytes: {answer:#x}", STRING_MAX + 1);
        for wrong in [b"a\0b".as_slice(), b"\xff\xfe", b"\xed\xa0\x80"] {
            let answer = wire.ask_final(option, &encode_go(wrong, &[]));
            let refusals = [REP_ERR_INVALID, REP_ERR_UNKNOWN];
            assert!(refusals.contains(&answer), "the name {wrong:02x?}: {answer:#x}");
        }
    }
    wire.assert_haggling_in_sync();
    for name in [b"no such export".to_vec(), vec![b'n'; STRING_MAX + 1]] {
        let mut wire = subject.haggle();
        wire.send_option(OPT_EXPORT_NAME, &name);
        wire.expect_closed("EXPORT_NAME has no way to refuse but closing");
    }
}

#[test]
fn point_03_options_without_data_refuse_data_and_abort_is_acknowledged() {
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
    the_list_names_the_default_export(&mut wire);
    Session::go(wire, Mode::Simple, None, b"").assert_in_sync();

    for length in [0, 7, 64 << 10, 1 << 20] {
        let mut wire = subject.haggle();
        let answer = wire.ask_final(OPT_ABORT, &vec![b'!'; length]);
        assert_eq!(answer, REP_ACK, "ABORT with {length} bytes");
        wire.expect_closed("after ABORT");
    }
    let mut impatient = subject.haggle();
    impatient.send_option(OPT_ABORT, &[]);
    impatient.reset();
    subject.still_serves();
}

fn the_list_names_the_default_export(wire: &mut Wire) {
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
    assert!(!names.is_empty(), "LIST names what there is");
    assert!(names.iter().all(|name| std::str::from_utf8(name).is_ok()), "names are UTF-8");
}

#[test]
fn point_04_info_and_go_say_the_same_and_their_lengths_must_add_up() {
    let subject = Subject::any();
    let all = [INFO_EXPORT, INFO_NAME, INFO_DESCRIPTION, INFO_BLOCK_SIZE, INFO_BLOCK_SIZE, 0x4242];
    for wishes in [&[][..], &all, &[INFO_BLOCK_SIZE], &[0xffff, 0xffff]] {
        let mut wire = subject.haggle();
        let info = all_infos(&mut wire, OPT_INFO, wishes);
        let go = all_infos(&mut wire, OPT_GO, wishes);
        assert_eq!(info, go, "INFO and GO, asked for {wishes:?}");
        check_infos(&subject, &go, wishes);
        Session::after_handshake(wire, Mode::Simple, None, 0, 0).assert_in_sync();
    }
    malformed_requests_are_refused(&subject);
    unknown_exports_are_unknown_to_both(&subject);
    the_flags_belong_to_the_dialect(&subject);
}

#[track_caller]
fn all_infos(wire: &mut Wire, option: u32, wishes: &[u16]) -> Vec<OptionReply> {
    let (mut replies, last) = wire.ask(option, &encode_go(b"", wishes));
    assert_eq!(last, REP_ACK, "option {option} for the default export");
    replies.sort();
    replies
}

fn info_of(replies: &[OptionReply], kind: u16) -> Vec<&[u8]> {
    let wanted = kind.to_be_bytes();
    replies.iter().filter(|r| r.data[..2] == wanted).map(|r| &r.data[2..]).collect()
}

fn check_infos(subject: &Subject, replies: &[OptionReply], wishes: &[u16]) {
    assert!(replies.iter().all(|r| r.kind == REP_INFO), "only INFO replies before the ACK");
    for kind in [INFO_EXPORT, INFO_NAME, INFO_DESCRIPTION, INFO_BLOCK_SIZE] {
        assert!(info_of(replies, kind).len() <= 1, "info {kind} comes once, however often asked");
    }
    let export = info_of(replies, INFO_EXPORT);
    assert_eq!(export.len(), 1, "INFO_EXPORT always comes");
    assert_eq!(export[0].len(), 10, "the length of INFO_EXPORT");
    if let Some(sizes) = info_of(replies, INFO_BLOCK_SIZE).first() {
        assert_eq!(sizes.len(), 12, "the length of INFO_BLOCK_SIZE");
        let size = |i: usize| u32::from_be_bytes(sizes[i..i + 4].try_into().unwrap());
        let (minimum, preferred, maximum) = (size(0), size(4), size(8));
        assert!(minimum.is_power_of_two() && minimum <= 1 << 16, "minimum {minimum}");
        assert!(preferred.is_power_of_two() && preferred >= minimum.max(512), "{preferred}");
        assert!(maximum == u32::MAX || maximum % minimum == 0, "maximum {maximum}");
    }
    if subject.is_ours() && wishes.contains(&INFO_BLOCK_SIZE) {
        let sizes = [1_u32, 4096, 32 << 20].map(u32::to_be_bytes).concat();
        assert_eq!(info_of(replies, INFO_BLOCK_SIZE), [sizes], "our block sizes");
    }
}

fn malformed_requests_are_refused(subject: &Subject) {
    let mut wire = subject.haggle();
    let good = encode_go(b"name", &[INFO_NAME, INFO_BLOCK_SIZE]);
    let with = |at: usize, bytes: &[u8]| {
        let mut data = good.clone();
        data[at..at + bytes.len()].copy_from_slice(bytes);
        data
    };
    let wrong = [
        ("no data at all", Vec::new()),
        ("only the length of a name", good[..4].to_vec()),
        ("no count of requests", good[..8].to_vec()),
        ("half a count of requests", good[..9].to_vec()),
        ("a name longer than the option", with(0, &[0, 0, 0, 11])),
        ("a name that leaves no room for the count", with(0, &[0, 0, 0, 9])),
        ("a name of 4 GiB", with(0, &[0xff; 4])),
        ("a length whose sum wraps", with(0, &[0xff, 0xff, 0xff, 0xfc])),
        ("more requests than there are", with(8, &[0, 3])),
        ("fewer requests than there are", with(8, &[0, 1])),
        ("65535 requests", with(8, &[0xff, 0xff])),
        ("half a request", good[..13].to_vec()),
        ("a byte too many", [&good[..], &[0]].concat()),
    ];
    for option in [OPT_INFO, OPT_GO] {
        for (what, data) in &wrong {
            assert_eq!(wire.ask_final(option, data), REP_ERR_INVALID, "{what} in option {option}");
        }
    }
    wire.assert_haggling_in_sync();
}

fn unknown_exports_are_unknown_to_both(subject: &Subject) {
    let mut wire = subject.haggle();
    for option in [OPT_INFO, OPT_GO] {
        let (infos, last) = wire.ask(option, &encode_go(b"no such export", &[INFO_NAME]));
        assert_eq!(last, REP_ERR_UNKNOWN, "option {option} for an export that is not there");
        assert!(infos.is_empty(), "nothing is told about an export that is not there");
    }
    Session::go(wire, Mode::Simple, None, b"").assert_in_sync();
}

fn the_flags_belong_to_the_dialect(subject: &Subject) {
    for session in subject.sessions() {
        assert_ne!(session.flags & HAS_FLAGS, 0, "HAS_FLAGS is always set");
        let fast_zero_alone =
            session.flags & SEND_FAST_ZERO != 0 && session.flags & SEND_WRITE_ZEROES == 0;
        assert!(!fast_zero_alone, "FAST_ZERO belongs to WRITE_ZEROES");
        if session.mode == Mode::Simple {
            assert_eq!(session.flags & SEND_DF, 0, "no DF without structured replies");
        }
        if subject.is_ours() {
            let ours = SEND_FLUSH | SEND_FUA | SEND_TRIM | SEND_WRITE_ZEROES | SEND_CACHE;
            let more = CAN_MULTI_CONN | SEND_FAST_ZERO;
            let df = if session.mode == Mode::Simple { 0 } else { SEND_DF };
            assert_eq!(session.flags, HAS_FLAGS | ours | more | df, "all that we offer");
        }
    }
}

#[test]
fn point_05_meta_contexts_are_chosen_anew_each_time_and_for_one_export() {
    let subject = Subject::any();
    contexts_need_structured_replies(&subject);
    queries_select_what_they_name(&subject);
    malformed_queries_are_refused(&subject);
    a_later_choice_replaces_the_earlier_one(&subject);
    a_choice_is_bound_to_its_export();
}

fn contexts_need_structured_replies(subject: &Subject) {
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

fn queries_select_what_they_name(subject: &Subject) {
    let mut wire = structured(subject);
    let (list, set) = (OPT_LIST_META_CONTEXT, OPT_SET_META_CONTEXT);
    let own = ALLOCATION.as_bytes();
    let finding: [&[&[u8]]; 5] = [&[], &[b"base:"], &[own], &[own, own], &[b"x-none:such", own]];
    for queries in finding {
        let found = contexts(&mut wire, list, queries);
        assert!(found.iter().any(|c| c == ALLOCATION), "LIST of {queries:?}: {found:?}");
        let once = found.iter().filter(|c| *c == ALLOCATION).count();
        assert_eq!(once, 1, "LIST of {queries:?} names it once");
    }
    let selecting: [&[&[u8]]; 3] = [&[own], &[own, own], &[b"x-none:such", own, b"base:"]];
    for queries in selecting {
        assert_eq!(contexts(&mut wire, set, queries), [ALLOCATION], "SET of {queries:?}");
    }
    let nothing: [&[&[u8]]; 5] =
        [&[], &[b"base:"], &[b"x-none:such"], &[b"base:none"], &[b"base:allocations"]];
    for queries in nothing {
        assert!(contexts(&mut wire, set, queries).is_empty(), "SET of {queries:?}");
    }
    let strange: [&[&[u8]]; 3] = [&[b"x-none:"], &[b"base:none"], &[b"base:alloc"]];
    for queries in strange {
        assert!(contexts(&mut wire, list, queries).is_empty(), "LIST of {queries:?}");
    }
}

fn malformed_queries_are_refused(subject: &Subject) {
    let mut wire = structured(subject);
    let good = encode_meta(b"", &[ALLOCATION.as_bytes()]);
    let with = |at: usize, value: u32| {
        let mut data = good.clone();
        data[at..at + 4].copy_from_slice(&value.to_be_bytes());
        data
    };
    let wrong = [
        ("no data at all", Vec::new()),
        ("half a name length", good[..3].to_vec()),
        ("a name and no count", good[..4].to_vec()),
        ("a count and no query", good[..8].to_vec()),
        ("half a query", good[..15].to_vec()),
        ("a name longer than the option", with(0, 1000)),
        ("a name of 4 GiB", with(0, u32::MAX)),
        ("two queries announced", with(4, 2)),
        ("4 G queries announced", with(4, u32::MAX)),
        ("no query announced", with(4, 0)),
        ("a query longer than the option", with(8, 1000)),
        ("a query shorter than the option", with(8, 3)),
        ("a query of 4 GiB", with(8, u32::MAX)),
        ("a byte too many", [&good[..], &[0]].concat()),
    ];
    for option in [OPT_LIST_META_CONTEXT, OPT_SET_META_CONTEXT] {
        for (what, data) in &wrong {
            assert_eq!(wire.ask_final(option, data), REP_ERR_INVALID, "{what} in option {option}");
        }
        let endless = encode_meta(b"", &[&[b'q'; STRING_MAX + 1]]);
        let answer = wire.ask_final(option, &endless);
        let fine = [REP_ERR_INVALID, REP_ERR_TOO_BIG].contains(&answer);
        assert!(fine || !subject.is_ours(), "a query over {STRING_MAX} bytes: {answer:#x}");
    }
    wire.assert_haggling_in_sync();
}

fn a_later_choice_replaces_the_earlier_one(subject: &Subject) {
    let later: [(&str, Vec<u8>); 4] = [
        ("an empty choice", encode_meta(b"", &[])),
        ("a choice of nothing known", encode_meta(b"", &[b"x-none:such"])),
        ("a malformed choice", vec![0, 0]),
        ("a choice for an unknown export", encode_meta(b"no such export", &[b"base:allocation"])),
    ];
    for (what, data) in later {
        let mut wire = structured(subject);
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

fn a_choice_is_bound_to_its_export() {
    let what = "meta contexts bound to an export's name";
    let Some(ours) = Ours::start(what, 8 * MIB, &["--export", "disk"]) else { return };
    for (chosen, entered) in [("disk", ""), ("", "disk"), ("disk", "disk"), ("", "")] {
        let mut wire = Wire::haggle(ours.endpoint(), FIXED_NEWSTYLE | NO_ZEROES);
        assert_eq!(wire.ask_final(OPT_STRUCTURED_REPLY, &[]), REP_ACK);
        let query = encode_meta(chosen.as_bytes(), &[ALLOCATION.as_bytes()]);
        let (granted, last) = wire.ask(OPT_SET_META_CONTEXT, &query);
        assert_eq!((granted.len(), last), (1, REP_ACK), "a context for {chosen:?}");
        let id = u32::from_be_bytes(granted[0].data[..4].try_into().unwrap());
        let mut session = Session::go(wire, Mode::Structured, Some(id), entered.as_bytes());
        let answer = session.ask(Request::new(BLOCK_STATUS, 0, 4096));
        let expected = if chosen == entered { 0 } else { EINVAL };
        assert_eq!(answer.error, expected, "chosen for {chosen:?}, entered as {entered:?}");
        session.assert_in_sync();
    }
}

#[test]
fn point_06_extended_headers_imply_structured_replies_and_leave_no_way_back() {
    let subject = Subject::any();
    let Some(mut session) = subject.session(Mode::Extended) else { return };
    assert!(session.context.is_some(), "contexts need no other option first");
    session.assert_in_sync();

    let mut wire = extended(&subject);
    let answer = wire.ask_final(OPT_STRUCTURED_REPLY, &[]);
    assert_eq!(answer, REP_ERR_EXT_HEADER_REQD, "structured replies after extended headers");
    Session::go(wire, Mode::Extended, None, b"").assert_in_sync();

    let mut wire = extended(&subject);
    wire.send_option(OPT_EXPORT_NAME, b"");
    wire.expect_closed("EXPORT_NAME after extended headers");

    let mut wire = structured(&subject);
    assert_eq!(wire.ask_final(OPT_EXTENDED_HEADERS, &[]), REP_ACK, "an upgrade");
    let mut session = Session::go(wire, Mode::Extended, None, b"");
    session.assert_in_sync();

    session.wire.send(&encode_request(READ, 0, 1, 0, 512));
    session.wire.send(&[0; 4]);
    let last_words = session.wire.recv_to_end();
    let silent = last_words.is_empty() || !subject.is_ours();
    assert!(silent && last_words.len() < 512, "a compact request ends an extended session");
    lengths_have_64_bits(&subject);
    a_payload_is_what_the_flag_says(&subject);
}

#[track_caller]
fn extended(subject: &Subject) -> Wire {
    let mut wire = subject.haggle();
    assert_eq!(wire.ask_final(OPT_EXTENDED_HEADERS, &[]), REP_ACK, "extended headers");
    wire
}

fn lengths_have_64_bits(subject: &Subject) {
    let Some(mut session) = subject.session(Mode::Extended) else { return };
    for length in [1 << 32, (1 << 32) + 512, 1 << 63, u64::MAX] {
        for command in [READ, TRIM, CACHE, BLOCK_STATUS] {
            session.refused(Request::new(command, 0, length), &[EINVAL]);
        }
        session.refused(Request::new(WRITE_ZEROES, 0, length), &[ENOSPC]);
    }
}

fn a_payload_is_what_the_flag_says(subject: &Subject) {
    let Some(mut session) = subject.session(Mode::Extended) else { return };
    let (cookie, mut bytes) = session.encode_header(TRIM, PAYLOAD_LEN, 0, 512);
    bytes.extend([0x25; 512]);
    session.wire.send(&bytes);
    expect_extended_error(&mut session, cookie, 0, EINVAL);
    session.assert_in_sync();
    // A write without the flag has its payload nevertheless: QEMU 10 writes so.
    let data = noise(512, 6);
    let (cookie, mut bytes) = session.encode_header(WRITE, 0, 4096, 512);
    bytes.extend(&data);
    session.wire.send(&bytes);
    let pending = HashMap::from([(cookie, Request::write(4096, &data))]);
    assert_eq!(session.recv_reply(&pending).1.error, 0, "a write without PAYLOAD_LEN");
    assert_eq!(session.read(4096, 512), data);
}

/// Takes one extended error chunk byte by byte.
#[track_caller]
fn expect_extended_error(session: &mut Session, cookie: u64, offset: u64, error: u32) {
    let wire = &mut session.wire;
    assert_eq!(wire.recv_u32(), EXTENDED_REPLY);
    assert_eq!(wire.recv_u16(), CHUNK_DONE);
    assert_eq!(wire.recv_u16() >> 15, 1, "an error chunk");
    assert_eq!(wire.recv_u64(), cookie);
    assert_eq!(wire.recv_u64(), offset, "the offset is repeated");
    let length = wire.recv_u64();
    assert!(length <= 4096 + 14, "an error chunk of {length} bytes");
    let payload = wire.recv(length as usize);
    assert_eq!(payload[..4], error.to_be_bytes(), "the error");
}

#[test]
fn point_07_a_client_that_vanishes_at_any_byte_of_the_handshake_changes_nothing() {
    let subject = Subject::any();
    let mut bystander = subject.session(Mode::Simple).unwrap();
    bystander.ok(Request::write(4096, b"as it was"));
    let held = match &subject {
        Subject::Ours(ours) => Some((ours, ours.server.settled_resources())),
        Subject::Foreign { .. } => None,
    };
    let handshake = typical_handshake();
    for length in 0..=handshake.len() {
        let mut wire = Wire::connect_with_retries(subject.endpoint());
        wire.send(&handshake[..length]);
        if length % 2 == 0 { wire.reset() } else { drop(wire) }
    }
    if let Some((ours, before)) = held {
        wait_until("the sessions of the vanished to end", || {
            let now = ours.server.resources();
            now.threads <= before.threads && now.descriptors <= before.descriptors
        });
    }
    assert_eq!(bystander.read(4096, 9), b"as it was");
    let mut plain = subject.session(Mode::Simple).unwrap();
    plain.refused(Request::new(BLOCK_STATUS, 0, 4096), &[EINVAL]);
    assert_eq!(plain.read(4096, 9), b"as it was");
}
