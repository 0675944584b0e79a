//! Invalid requests: the error of their replies, and that the session remains usable.

use crate::subject::{Ours, Subject};
use harness::raw::*;
use harness::session::{MODES, Mode, Request, Session};
use harness::{GIB, MIB, noise, read_at};

/// Longest READ and WRITE of flexnbd in bytes; in old style the limit of the original flexnbd.
const PAYLOAD_MAX: u64 = 64 * MIB;
const OLD_STYLE_PAYLOAD_MAX: u64 = GIB;

/// Payloads up to this length "SHOULD NOT be considered a denial of service attack" ("Block size
/// constraints").
const PORTABLE_PAYLOAD_MAX: u64 = 32 * MIB;

/// The commands with a range and without a payload, and the error for a range beyond the end.
const RANGE_COMMANDS: [(u16, u32); 5] = [
    (READ, EINVAL),
    (TRIM, EINVAL),
    (CACHE, EINVAL),
    (BLOCK_STATUS, EINVAL),
    (WRITE_ZEROES, ENOSPC),
];

/// Ranges that end beyond a disk of `size` bytes; the last ones overflow 64 bits.
fn out_of_bounds(size: u64) -> Vec<(u64, u64)> {
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

/// "The server SHOULD return `NBD_ENOSPC` if it receives a write request including one or more
/// sectors beyond the size of the device", and "`NBD_EINVAL` if it receives a read or trim request"
/// there ("Error values"; "Request types" has the same for WRITE_ZEROES and BLOCK_STATUS).
#[test]
fn requests_beyond_the_end_are_refused() {
    let subject = Subject::any();
    for mut session in subject.sessions() {
        let size = session.size;
        session.ok(Request::write(size - 1, &[0]));
        for (offset, length) in out_of_bounds(size) {
            for (command, error) in RANGE_COMMANDS {
                let fits = session.mode == Mode::Extended || length <= u64::from(u32::MAX);
                if fits && session.offers(command) {
                    session.refused(Request::new(command, offset, length), &[error]);
                }
            }
        }
        for (offset, length) in
            out_of_bounds(size).into_iter().filter(|(_, l)| *l <= PORTABLE_PAYLOAD_MAX)
        {
            session.refused(Request::new(WRITE, offset, length), &[ENOSPC]);
        }
        assert_eq!(session.read(size - 1, 1), [0], "the last byte is unchanged");
    }
}

/// "Finally, it SHOULD return `NBD_EPERM` if it receives a write or trim request on a read-only
/// export" ("Error values").
#[test]
fn a_read_only_export_refuses_writes() {
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

/// The original flexnbd replies ENOSPC to READ, too, and its clients may depend on it.
#[test]
fn old_style_replies_enospc_beyond_the_end() {
    let Some(ours) = Ours::start("old style", 8 * MIB, &["--oldstyle"]) else { return };
    let mut session = Session::open_oldstyle(ours.endpoint());
    assert_eq!(session.size, 8 * MIB);
    assert_ne!(session.flags & HAS_FLAGS, 0);
    for (offset, length) in out_of_bounds(8 * MIB) {
        session.refused(Request::new(READ, offset, length), &[ENOSPC]);
        session.refused(Request::new(WRITE, offset, length), &[ENOSPC]);
    }
}

/// "It also SHOULD map the `EDQUOT` and `EFBIG` errors to `NBD_ENOSPC`" ("Error values").
#[test]
fn efbig_is_replied_as_enospc() {
    let what = "a write that fails with EFBIG";
    let limited = ["sh", "-c", "trap '' XFSZ; ulimit -f 2048; exec \"$@\"", "sh"];
    let Some(ours) = Ours::start_with(what, 8 * MIB, |b, _, _| b.through(limited)) else { return };
    let writable = file_size_limit(ours.server.pid());
    assert!(writable < 8 * MIB, "limit {writable}");
    for mode in MODES {
        let mut session = ours.session(mode);
        session.ok(Request::write(writable - 512, &[7; 512]));
        session.refused(Request::write(writable, &[7; 512]), &[ENOSPC]);
    }
}

/// RLIMIT_FSIZE of a process in bytes.
fn file_size_limit(pid: u32) -> u64 {
    let limits = std::fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let line = limits.lines().find(|l| l.starts_with("Max file size")).unwrap();
    line.split_whitespace().nth(3).unwrap().parse().unwrap()
}

/// A payload that consists of WRITE_ZEROES requests. A server that skips too few bytes executes
/// them, which is visible in its replies and at the start of the disk.
fn payload_of_requests(mode: Mode, length: u64) -> Vec<u8> {
    let request = match mode {
        Mode::Extended => encode_extended_request(WRITE_ZEROES, 0, 0xdead, 0, 512),
        _ => encode_request(WRITE_ZEROES, 0, 0xdead, 0, 512),
    };
    let length = length as usize;
    let mut payload = request.repeat(length / request.len() + 1);
    payload.truncate(length);
    payload
}

/// "The client MUST follow the request header with *length* number of bytes to be written to the
/// device" ("Request types", WRITE). A server that refuses the request has to skip exactly these
/// bytes.
#[test]
fn payloads_of_refused_writes_are_skipped_exactly() {
    let subject = Subject::any();
    for mut session in subject.sessions() {
        let marker = noise(512, 9);
        session.ok(Request::write(0, &marker));
        for length in [1, 27, 28, 29, 512, 4095, MIB, MIB + 3, PORTABLE_PAYLOAD_MAX] {
            let payload = payload_of_requests(session.mode, length);
            let near_end = session.size - (length / 2).min(512);
            session.refused(Request::write(near_end, &payload), &[ENOSPC]);
            session.refused(Request::write(4096, &payload).flags(1 << 14), &[EINVAL]);
            assert_eq!(
                session.read(0, 512),
                marker,
                "part of a payload of {length} bytes was executed"
            );
        }
    }
}

#[test]
fn eof_within_a_payload_closes_the_connection() {
    let subject = Subject::any();
    for mut session in subject.sessions() {
        for offset in [0, session.size] {
            let mut truncated = Session::open(subject.endpoint(), session.mode).unwrap();
            let (_, bytes) = truncated.encode(&Request::write(offset, &[1; 4096]));
            truncated.wire.send(&bytes[..bytes.len() - 1]);
            truncated.wire.shutdown_write();
            if offset == 0 {
                truncated.wire.expect_closed("EOF before the last byte of a payload");
            } else {
                assert_at_most_an_error_reply(&mut truncated, offset);
            }
        }
        session.assert_in_sync();
    }
}

/// The server may send the error before the payload is complete, and must then close the
/// connection.
#[track_caller]
fn assert_at_most_an_error_reply(truncated: &mut Session, offset: u64) {
    let received = truncated.wire.recv_to_end();
    let error = match truncated.mode {
        Mode::Simple => received.get(4..8),
        Mode::Structured if received.starts_with(&SIMPLE_REPLY.to_be_bytes()) => received.get(4..8),
        Mode::Structured => received.get(20..24),
        Mode::Extended => received.get(32..36),
    };
    let refusal = error.is_some_and(|e| e == ENOSPC.to_be_bytes() || e == EINVAL.to_be_bytes());
    assert!(received.is_empty() || refusal, "a truncated WRITE at {offset}: {received:02x?}");
}

#[test]
fn payloads_of_refused_writes_are_not_buffered() {
    let what = "memory for the payload of a refused WRITE";
    let Some(ours) = Ours::start(what, 512 * MIB, &[]) else { return };
    for mode in MODES {
        let mut session = ours.session(mode);
        session.assert_in_sync();
        let before = ours.server.resources().rss_bytes_peak;
        session.refused(Request::new(WRITE, 0, 256 * MIB), &[EINVAL]);
        session.refused(Request::new(WRITE, 512 * MIB - 1, 48 * MIB), &[ENOSPC]);
        let grown = ours.server.resources().rss_bytes_peak.saturating_sub(before);
        assert!(grown < 32 * MIB, "{grown} bytes allocated for refused payloads ({mode:?})");
    }
    assert_eq!(read_at(&ours.image, 0, 4096), [0; 4096], "nothing was written");
}

#[test]
fn a_read_only_export_skips_payloads_exactly() {
    let what = "payloads for a read-only export";
    let Some(ours) = Ours::start(what, 8 * MIB, &["--read-only"]) else { return };
    for mode in MODES {
        let mut session = ours.session(mode);
        for length in [1, 512, MIB + 3] {
            let payload = payload_of_requests(mode, length);
            session.refused(Request::write(0, &payload), &[EPERM]);
        }
    }
}

/// The length of a command without payload, such as TRIM, may exceed the maximum payload: the
/// server should not disconnect, but may reply with an error if the request needs too many
/// resources ("Block size constraints"). This test is stricter: the request must succeed.
#[test]
fn requests_without_payload_may_span_the_disk() {
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
}

#[test]
fn ranges_may_exceed_the_largest_payload() {
    let Some(ours) = Ours::start("ranges of 6 GiB", 6 * GIB, &[]) else { return };
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
        assert_eq!(session.read(5 * GIB, 512), [0; 512], "zeroed at 5 GiB");
    }
}

#[test]
fn payloads_over_64_mib_are_refused() {
    let Some(ours) = Ours::start("the largest payload", 128 * MIB, &[]) else { return };
    for mode in MODES {
        let mut session = ours.session(mode);
        session.ok(Request::new(READ, 1, PAYLOAD_MAX));
        session.refused(Request::new(READ, 1, PAYLOAD_MAX + 1), &[EINVAL]);
        session.ok(Request::new(WRITE, 1, PAYLOAD_MAX));
        session.refused(Request::new(WRITE, 1, PAYLOAD_MAX + 1), &[EINVAL]);
    }
}

#[test]
fn old_style_payloads_over_1_gib_are_refused() {
    let what = "the largest payload in old style";
    let Some(ours) = Ours::start(what, 3 * GIB, &["--oldstyle"]) else { return };
    let mut session = Session::open_oldstyle(ours.endpoint());
    session.refused(Request::new(READ, 0, OLD_STYLE_PAYLOAD_MAX + 1), &[EINVAL]);
    let cookie = session.send(&Request::new(READ, 0, OLD_STYLE_PAYLOAD_MAX));
    assert_eq!(session.wire.recv_u32(), SIMPLE_REPLY);
    assert_eq!(session.wire.recv_u32(), 0, "the largest READ succeeds");
    assert_eq!(session.wire.recv_u64(), cookie);
    for _ in 0..OLD_STYLE_PAYLOAD_MAX / MIB {
        session.wire.recv(MIB as usize);
    }
    session.assert_in_sync();
}

/// "... the behavior of a server on such a request is unspecified although the server SHOULD NOT
/// disconnect" ("Request types"). flexnbd replies success.
#[test]
fn length_zero_succeeds_without_effect() {
    let subject = Subject::any();
    for mut session in subject.sessions() {
        let before = noise(8192, 11);
        session.ok(Request::write(4096, &before));
        for offset in [0, 4096, 5000, session.size] {
            for command in [READ, WRITE, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS] {
                if session.offers(command) {
                    assert_no_effect(&subject, &mut session, command, offset);
                }
            }
        }
        assert_eq!(session.read(4096, 8192), before, "the data is unchanged");
    }
}

#[track_caller]
fn assert_no_effect(subject: &Subject, session: &mut Session, command: u16, offset: u64) {
    let answer = session.ask(Request::new(command, offset, 0));
    assert!(answer.data.is_empty() && answer.extents.is_empty(), "no data and no extents");
    if subject.is_ours() {
        assert_eq!(answer.error, 0, "command {command} of length 0 at {offset}");
    }
    session.assert_in_sync();
}

/// For each command, the flags that are not valid for it.
fn invalid_flags(session: &Session) -> Vec<(u16, Vec<u16>)> {
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

/// "The server SHOULD return `NBD_EINVAL` if it receives an unknown command flag. It also SHOULD
/// return `NBD_EINVAL` if it receives a request with a flag not explicitly documented as applicable
/// to the given request", and for "an unknown command" ("Error values").
#[test]
fn unknown_commands_and_flags_are_refused() {
    let subject = Subject::any();
    for mut session in subject.sessions() {
        let before = noise(4096, 12);
        session.ok(Request::write(0, &before));
        for command in [8, 9, 100, 0x7fff, 0xffff] {
            session.refused(Request::new(command, 0, 0), &[EINVAL]);
            session.refused(Request::new(command, 0, 4096), &[EINVAL]);
        }
        for (command, flags) in invalid_flags(&session) {
            if session.offers(command) {
                assert_flags_refused(&mut session, command, &flags);
            }
        }
        assert_eq!(session.read(0, 4096), before, "refused requests had no effect");
        assert_fua_accepted(&mut session);
    }
}

/// The private command HANDOVER of a migration (flexnbd-migration(7)).
const HANDOVER: u16 = 0x464c;

#[track_caller]
fn assert_handover_refused(session: &mut Session) {
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
fn the_private_command_needs_the_private_option() {
    let subject = Subject::any();
    for mut session in subject.sessions() {
        assert_handover_refused(&mut session);
    }
    let arguments = ["--oldstyle"];
    if let Some(ours) = Ours::start("the private command in old style", MIB, &arguments) {
        assert_handover_refused(&mut Session::open_oldstyle(ours.endpoint()));
    }
}

#[test]
fn handover_is_refused_unless_a_disk_is_arriving() {
    let Some(ours) = Ours::start("the private option", MIB, &[]) else { return };
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
fn assert_flags_refused(session: &mut Session, command: u16, flags: &[u16]) {
    for flag in flags {
        for with in [*flag, *flag | FUA] {
            let request = Request::new(command, 0, length_for(command)).flags(with);
            session.refused(request, &[EINVAL]);
        }
    }
}

/// "This flag is valid for all commands, provided `NBD_FLAG_SEND_FUA` has been negotiated"
/// ("Command flags").
#[track_caller]
fn assert_fua_accepted(session: &mut Session) {
    if session.flags & SEND_FUA == 0 {
        return;
    }
    for command in [READ, WRITE, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS] {
        if session.offers(command) {
            session.ok(Request::new(command, 0, length_for(command)).flags(FUA));
        }
    }
}
