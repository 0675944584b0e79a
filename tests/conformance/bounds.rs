//! Points 8 to 12: what is refused, with which error, and that the session survives it.

use crate::subject::{Ours, Subject};
use harness::raw::*;
use harness::session::{MODES, Mode, Request, Session};
use harness::{GIB, MIB, noise, read_at};

/// Our own server's largest READ and WRITE, in bytes; in old style it keeps the original's.
const PAYLOAD_MAX: u64 = 64 * MIB;
const OLD_STYLE_PAYLOAD_MAX: u64 = GIB;

/// A length that no specification lets a server call a denial of service.
const FAIR_LENGTH: u64 = 32 * MIB;

/// The commands that name a span and carry no payload, with the error for a span beyond the end.
const SPANS: [(u16, u32); 5] = [
    (READ, EINVAL),
    (TRIM, EINVAL),
    (CACHE, EINVAL),
    (BLOCK_STATUS, EINVAL),
    (WRITE_ZEROES, ENOSPC),
];

/// Offsets and lengths that leave a disk of this size, most of them by wrapping around.
fn beyond(size: u64) -> Vec<(u64, u64)> {
    vec![
        (size, 1),
        (size - 1, 2),
        (size - 512, 1024),
        (size + 4096, 4096),
        (0, size + 1),
        (1 << 32, 512.max(size.saturating_sub(1 << 32) + 1)),
        (1 << 63, 512),
        (u64::MAX, 1),
        (u64::MAX, 2),
        (u64::MAX - 511, 512),
        (u64::MAX - 511, 1024),
        (u64::MAX - 4095, 8192),
    ]
}

#[test]
fn point_08_offset_plus_length_never_wraps_and_each_refusal_has_its_error() {
    let subject = Subject::any();
    for mut session in subject.sessions() {
        let size = session.size;
        session.ok(Request::write(size - 1, &[0]));
        for (offset, length) in beyond(size) {
            for (command, error) in SPANS {
                let fits = session.mode == Mode::Extended || length <= u64::from(u32::MAX);
                if fits && session.offers(command) {
                    session.refused(Request::new(command, offset, length), &[error]);
                }
            }
        }
        for (offset, length) in beyond(size).into_iter().filter(|(_, l)| *l <= FAIR_LENGTH) {
            session.refused(Request::new(WRITE, offset, length), &[ENOSPC]);
        }
        assert_eq!(session.read(size - 1, 1), [0], "nothing was written near the end");
    }
    a_read_only_export_permits_nothing_that_writes();
    old_style_keeps_its_habit();
    a_file_that_may_not_grow_has_no_space();
}

fn a_read_only_export_permits_nothing_that_writes() {
    let Some(ours) = Ours::start("a read-only export", 8 * MIB, &["--read-only"]) else { return };
    for mode in MODES {
        let mut session = ours.session(mode);
        assert_ne!(session.flags & READ_ONLY, 0, "READ_ONLY is announced");
        for command in [WRITE, WRITE_ZEROES, TRIM] {
            session.refused(Request::new(command, 0, 512), &[EPERM]);
            session.refused(Request::new(command, 4096, 4096).flags(FUA), &[EPERM]);
            session.refused(Request::new(command, 8 * MIB - 256, 512), &[EPERM]);
        }
        session.ok(Request::new(FLUSH, 0, 0));
        session.ok(Request::new(CACHE, 0, 512));
    }
}

fn old_style_keeps_its_habit() {
    let Some(ours) = Ours::start("old style", 8 * MIB, &["--oldstyle"]) else { return };
    let mut session = Session::open_old_style(ours.endpoint());
    assert_eq!(session.size, 8 * MIB);
    assert_ne!(session.flags & HAS_FLAGS, 0);
    for (offset, length) in beyond(8 * MIB) {
        session.refused(Request::new(READ, offset, length), &[ENOSPC]);
        session.refused(Request::new(WRITE, offset, length), &[ENOSPC]);
    }
}

/// EFBIG is no error of the protocol: whatever the kernel says is translated.
fn a_file_that_may_not_grow_has_no_space() {
    let what = "a write that the kernel refuses with EFBIG";
    let limited = ["sh", "-c", "trap '' XFSZ; ulimit -f 2048; exec \"$@\"", "sh"];
    let Some(ours) = Ours::start_with(what, 8 * MIB, |b, _, _| b.through(limited)) else { return };
    let writable = file_size_limit(ours.server.pid());
    assert!(writable < 8 * MIB, "the limit is in force: {writable}");
    for mode in MODES {
        let mut session = ours.session(mode);
        session.ok(Request::write(writable - 512, &[7; 512]));
        session.refused(Request::write(writable, &[7; 512]), &[ENOSPC]);
    }
}

/// The limit on file sizes of a process, in bytes.
fn file_size_limit(pid: u32) -> u64 {
    let limits = std::fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let line = limits.lines().find(|l| l.starts_with("Max file size")).unwrap();
    line.split_whitespace().nth(3).unwrap().parse().unwrap()
}

/// A payload made of requests: a server that reads fewer bytes than it should obeys them and gives
/// itself away, both by its replies and by what it writes at the start of the disk.
fn treacherous_payload(mode: Mode, length: u64) -> Vec<u8> {
    let trap = match mode {
        Mode::Extended => encode_extended_request(WRITE_ZEROES, 0, 0xdead, 0, 512),
        _ => encode_request(WRITE_ZEROES, 0, 0xdead, 0, 512),
    };
    let length = length as usize;
    let mut payload = trap.repeat(length / trap.len() + 1);
    payload.truncate(length);
    payload
}

#[test]
fn point_09_the_payload_of_a_refused_write_is_consumed_exactly() {
    let subject = Subject::any();
    for mut session in subject.sessions() {
        let marker = noise(512, 9);
        session.ok(Request::write(0, &marker));
        for length in [1, 27, 28, 29, 512, 4095, MIB, MIB + 3, FAIR_LENGTH] {
            let payload = treacherous_payload(session.mode, length);
            let almost_out = session.size - (length / 2).min(512);
            session.refused(Request::write(almost_out, &payload), &[ENOSPC]);
            session.refused(Request::write(4096, &payload).flags(1 << 14), &[EINVAL]);
            assert_eq!(session.read(0, 512), marker, "{length} bytes were not payload but obeyed");
        }
    }
    eof_in_the_middle_ends_the_session(&subject);
    a_refused_payload_is_not_held_in_memory();
    a_read_only_export_consumes_payloads();
}

fn eof_in_the_middle_ends_the_session(subject: &Subject) {
    for mut session in subject.sessions() {
        for offset in [0, session.size] {
            let mut torn = Session::open(subject.endpoint(), session.mode).unwrap();
            let (_, bytes) = torn.encode(&Request::write(offset, &[1; 4096]));
            torn.wire.send(&bytes[..bytes.len() - 1]);
            torn.wire.shutdown_write();
            if offset == 0 {
                torn.wire.expect_closed("EOF before the last byte of a payload");
            } else {
                only_a_refusal_comes(&mut torn, offset);
            }
        }
        session.assert_in_sync();
    }
}

/// The refusal may be sent before the payload is there; then the session ends all the same.
#[track_caller]
fn only_a_refusal_comes(torn: &mut Session, offset: u64) {
    let last_words = torn.wire.recv_to_end();
    let error = match torn.mode {
        Mode::Simple => last_words.get(4..8),
        Mode::Structured if last_words.starts_with(&SIMPLE_REPLY.to_be_bytes()) => {
            last_words.get(4..8)
        }
        Mode::Structured => last_words.get(20..24),
        Mode::Extended => last_words.get(32..36),
    };
    let refusal = error.is_some_and(|e| e == ENOSPC.to_be_bytes() || e == EINVAL.to_be_bytes());
    assert!(last_words.is_empty() || refusal, "a torn WRITE at {offset}: {last_words:02x?}");
}

fn a_refused_payload_is_not_held_in_memory() {
    let what = "memory held for a refused WRITE";
    let Some(ours) = Ours::start(what, 512 * MIB, &[]) else { return };
    for mode in MODES {
        let mut session = ours.session(mode);
        session.assert_in_sync();
        let before = ours.server.resources().rss_bytes_peak;
        session.refused(Request::new(WRITE, 0, 256 * MIB), &[EINVAL]);
        session.refused(Request::new(WRITE, 512 * MIB - 1, 48 * MIB), &[ENOSPC]);
        let grown = ours.server.resources().rss_bytes_peak - before;
        assert!(grown < 32 * MIB, "{grown} bytes more for payloads that nobody wants ({mode:?})");
    }
    assert_eq!(read_at(&ours.image, 0, 4096), [0; 4096], "nothing was written");
}

fn a_read_only_export_consumes_payloads() {
    let what = "payloads for a read-only export";
    let Some(ours) = Ours::start(what, 8 * MIB, &["--read-only"]) else { return };
    for mode in MODES {
        let mut session = ours.session(mode);
        for length in [1, 512, MIB + 3] {
            let payload = treacherous_payload(mode, length);
            session.refused(Request::write(0, &payload), &[EPERM]);
        }
    }
}

#[test]
fn point_10_only_reads_and_writes_have_a_longest_length() {
    let subject = Subject::any();
    for mut session in subject.sessions() {
        let longest = if session.mode == Mode::Extended { u64::MAX } else { 0xffff_fe00 };
        let whole = session.size.min(longest);
        for command in [TRIM, WRITE_ZEROES, BLOCK_STATUS] {
            if session.offers(command) {
                session.ok(Request::new(command, 0, whole));
            }
        }
        session.assert_in_sync();
    }
    spans_may_be_longer_than_any_payload();
    payloads_have_a_limit();
    old_style_has_the_originals_limit();
}

fn spans_may_be_longer_than_any_payload() {
    let Some(ours) = Ours::start("spans of 6 GiB", 6 * GIB, &[]) else { return };
    for mode in MODES {
        let mut session = ours.session(mode);
        session.ok(Request::write(5 * GIB, &[1; 512]));
        let (offset, length) =
            if mode == Mode::Extended { (0, 6 * GIB) } else { (2 * GIB, u64::from(u32::MAX)) };
        for command in [CACHE, TRIM, WRITE_ZEROES, BLOCK_STATUS] {
            if session.offers(command) {
                session.ok(Request::new(command, offset, length));
            }
        }
        assert_eq!(session.read(5 * GIB, 512), [0; 512], "the span reached this far");
    }
}

fn payloads_have_a_limit() {
    let Some(ours) = Ours::start("the longest payload", 128 * MIB, &[]) else { return };
    for mode in MODES {
        let mut session = ours.session(mode);
        session.ok(Request::new(READ, 1, PAYLOAD_MAX));
        session.refused(Request::new(READ, 1, PAYLOAD_MAX + 1), &[EINVAL]);
        session.ok(Request::new(WRITE, 1, PAYLOAD_MAX));
        session.refused(Request::new(WRITE, 1, PAYLOAD_MAX + 1), &[EINVAL]);
    }
}

fn old_style_has_the_originals_limit() {
    let what = "the longest payload in old style";
    let Some(ours) = Ours::start(what, 3 * GIB, &["--oldstyle"]) else { return };
    let mut session = Session::open_old_style(ours.endpoint());
    session.refused(Request::new(READ, 0, OLD_STYLE_PAYLOAD_MAX + 1), &[EINVAL]);
    let cookie = session.send(&Request::new(READ, 0, OLD_STYLE_PAYLOAD_MAX));
    assert_eq!(session.wire.recv_u32(), SIMPLE_REPLY);
    assert_eq!(session.wire.recv_u32(), 0, "the longest READ succeeds");
    assert_eq!(session.wire.recv_u64(), cookie);
    for _ in 0..OLD_STYLE_PAYLOAD_MAX / MIB {
        session.wire.recv(MIB as usize);
    }
    session.assert_in_sync();
}

#[test]
fn point_11_length_zero_succeeds_and_does_nothing() {
    let subject = Subject::any();
    for mut session in subject.sessions() {
        let before = noise(8192, 11);
        session.ok(Request::write(4096, &before));
        for offset in [0, 4096, 5000, session.size] {
            for command in [READ, WRITE, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS] {
                if session.offers(command) {
                    nothing_happens(&subject, &mut session, command, offset);
                }
            }
        }
        assert_eq!(session.read(4096, 8192), before, "nothing changed");
    }
}

#[track_caller]
fn nothing_happens(subject: &Subject, session: &mut Session, command: u16, offset: u64) {
    let answer = session.ask(Request::new(command, offset, 0));
    assert!(answer.data.is_empty() && answer.extents.is_empty(), "nothing can be given");
    if subject.is_ours() {
        assert_eq!(answer.error, 0, "command {command} of length 0 at {offset}");
    }
    session.assert_in_sync();
}

/// Flags that do not belong to a command, for each of them.
fn foreign_flags(session: &Session) -> Vec<(u16, Vec<u16>)> {
    let also_unknown = if session.mode == Mode::Extended { 1 << 7 } else { PAYLOAD_LEN };
    let unknown = [also_unknown, 1 << 6, 1 << 10, 1 << 15];
    let df_is_unknown = session.flags & SEND_DF == 0;
    let fast_zero_is_unknown = session.flags & SEND_FAST_ZERO == 0;
    let not = |own: &[u16]| -> Vec<u16> {
        let all = [NO_HOLE, DF, REQ_ONE, FAST_ZERO].into_iter().chain(unknown);
        all.filter(|flag| !own.contains(flag)).collect()
    };
    vec![
        (READ, not(if df_is_unknown { &[] } else { &[DF] })),
        (WRITE, not(&[])),
        (FLUSH, not(&[])),
        (TRIM, not(&[])),
        (CACHE, not(&[])),
        (WRITE_ZEROES, not(if fast_zero_is_unknown { &[NO_HOLE] } else { &[NO_HOLE, FAST_ZERO] })),
        (BLOCK_STATUS, not(&[REQ_ONE])),
    ]
}

fn length_for(command: u16) -> u64 {
    if command == FLUSH { 0 } else { 4096 }
}

#[test]
fn point_12_unknown_commands_and_flags_are_invalid_and_the_session_goes_on() {
    let subject = Subject::any();
    for mut session in subject.sessions() {
        let before = noise(4096, 12);
        session.ok(Request::write(0, &before));
        for command in [8, 9, 100, 0x7fff, 0xffff] {
            session.refused(Request::new(command, 0, 0), &[EINVAL]);
            session.refused(Request::new(command, 0, 4096), &[EINVAL]);
        }
        for (command, flags) in foreign_flags(&session) {
            if session.offers(command) {
                refuses_flags(&mut session, command, &flags);
            }
        }
        assert_eq!(session.read(0, 4096), before, "what was refused had no effect");
        fua_belongs_to_everything(&mut session);
    }
}

/// The private command of a migration (flexnbd-migration(7)).
const HANDOVER: u16 = 0x464c;

#[track_caller]
fn has_no_private_command(session: &mut Session) {
    for length in [0, 1, 36, 256, 257, 1 << 20, u64::from(u32::MAX)] {
        session.refused(Request::new(HANDOVER, 0, length), &[EINVAL]);
        session.refused(Request::new(HANDOVER, 512, length).flags(FUA), &[EINVAL]);
    }
    if session.mode == Mode::Extended {
        let payload = vec![0x25; 36];
        let request = Request { payload, ..Request::new(HANDOVER, 0, 36).flags(PAYLOAD_LEN) };
        session.refused(request, &[EINVAL]);
    }
}

#[test]
fn point_12_the_private_command_without_introduction_is_unknown() {
    let subject = Subject::any();
    for mut session in subject.sessions() {
        has_no_private_command(&mut session);
    }
    let arguments = ["--oldstyle"];
    if let Some(ours) = Ours::start("the private command in old style", MIB, &arguments) {
        has_no_private_command(&mut Session::open_old_style(ours.endpoint()));
    }
}

#[test]
fn point_12_an_introduced_client_has_its_payload_consumed() {
    let Some(ours) = Ours::start("an introduction to a server", MIB, &[]) else { return };
    for mode in MODES {
        let mut wire = Wire::haggle(ours.endpoint(), FIXED_NEWSTYLE | NO_ZEROES);
        match mode {
            Mode::Simple => {}
            Mode::Structured => assert_eq!(wire.ask_final(OPT_STRUCTURED_REPLY, &[]), REP_ACK),
            Mode::Extended => assert_eq!(wire.ask_final(OPT_EXTENDED_HEADERS, &[]), REP_ACK),
        }
        let question = [&1_u32.to_be_bytes()[..], &MIB.to_be_bytes(), &[7; 16]].concat();
        assert_eq!(wire.ask(OPT_PRIVATE, &question).1, REP_ACK);
        let mut session = Session::go(wire, mode, None, b"");
        for length in [0_u64, 36, 256, 257] {
            let payload = vec![0x25; length as usize];
            let flags = if mode == Mode::Extended { PAYLOAD_LEN } else { 0 };
            let request = Request::new(HANDOVER, 0, length).flags(flags);
            session.refused(Request { payload, ..request }, &[EINVAL]);
        }
    }
}

#[track_caller]
fn refuses_flags(session: &mut Session, command: u16, flags: &[u16]) {
    for flag in flags {
        for with in [*flag, *flag | FUA] {
            let request = Request::new(command, 0, length_for(command)).flags(with);
            session.refused(request, &[EINVAL]);
        }
    }
}

#[track_caller]
fn fua_belongs_to_everything(session: &mut Session) {
    if session.flags & SEND_FUA == 0 {
        return;
    }
    for command in [READ, WRITE, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS] {
        if session.offers(command) {
            session.ok(Request::new(command, 0, length_for(command)).flags(FUA));
        }
    }
}
