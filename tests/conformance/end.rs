//! How sessions end, and that many requests in flight do not end them.

use crate::subject::{Ours, Subject};
use harness::raw::*;
use harness::session::{MODES, Mode, Request, Session};
use harness::{KIB, MIB, noise, read_at};
use std::collections::HashMap;

/// "A disconnect request. The server MUST handle all outstanding requests, shut down the TLS
/// session (if one is running), and close the TCP session" ("Request types").
#[test]
fn disc_closes_after_all_replies() {
    let subject = Subject::any();
    let mut bystander = subject.session(Mode::Simple).unwrap();
    for mut session in subject.sessions() {
        let mut pending = HashMap::new();
        let mut bytes = Vec::new();
        for i in 0..50 {
            let data = noise(4096, i);
            let requests =
                [Request::new(READ, i * 4096, 64 * KIB), Request::write(4 * MIB + i * 4096, &data)];
            for request in requests {
                let (cookie, encoded) = session.encode(&request);
                bytes.extend(encoded);
                pending.insert(cookie, request);
            }
        }
        bytes.extend(session.encode_header(DISC, 0, 0, 0).1);
        session.wire.send(&bytes);
        while !pending.is_empty() {
            let (cookie, answer) = session.recv_reply(&pending);
            assert_eq!(answer.error, 0, "a request before DISC");
            pending.remove(&cookie);
        }
        session.wire.expect_closed("after DISC");
        for i in 0..50 {
            let data = bystander.read(4 * MIB + i * 4096, 4096);
            assert!(data == noise(4096, i), "write {i} before DISC");
        }
        bystander.ok(Request::new(WRITE_ZEROES, 4 * MIB, MIB));
    }
    subject.assert_serves();
}

/// "Either side MAY initiate a hard disconnect if it detects a violation by the other party of a
/// mandatory condition within this document" ("Terminating the transmission phase").
#[test]
fn a_bad_request_magic_closes_the_connection() {
    let subject = Subject::any();
    for mode in MODES {
        let wrong_mode = if mode == Mode::Extended { REQUEST } else { EXTENDED_REQUEST };
        for magic in [0, u32::MAX, 0x1256_0953, 0x2560_9514, SIMPLE_REPLY, wrong_mode] {
            let Some(mut session) = subject.session(mode) else { continue };
            session.assert_in_sync();
            let (_, mut bytes) = session.encode_header(READ, 0, 0, 512);
            bytes[..4].copy_from_slice(&magic.to_be_bytes());
            session.wire.send(&bytes);
            let why = format!("magic {magic:#x} ({mode:?})");
            if subject.is_ours() {
                session.wire.expect_closed(&why);
            } else {
                let received = session.wire.recv_to_end();
                assert!(received.len() < 512, "{why}: data in the reply");
            }
        }
    }
    subject.assert_serves();
}

/// The original flexnbd replies before it closes, and its clients may depend on it.
#[test]
fn old_style_replies_einval_to_a_bad_magic() {
    let Some(ours) = Ours::start("a bad magic in old style", MIB, &["--oldstyle"]) else { return };
    let mut session = Session::open_oldstyle(ours.endpoint());
    let (cookie, mut bytes) = session.encode_header(READ, 0, 0, 512);
    bytes[0] ^= 0xff;
    session.wire.send(&bytes);
    assert_eq!(session.wire.recv_u32(), SIMPLE_REPLY);
    assert_eq!(session.wire.recv_u32(), EINVAL);
    assert_eq!(session.wire.recv_u64(), cookie);
    session.wire.expect_closed("a bad magic in old style");
}

/// Receiving requests and sending replies must not wait for each other in a cycle.
#[test]
fn a_client_may_send_200_requests_before_reading() {
    /// 100 payloads of this length exceed the socket buffers of the kernel, so that the server has
    /// to receive them.
    const LENGTH: u64 = 256 * KIB;
    let subject = Subject::any();
    for mut session in subject.sessions() {
        let data = noise(MIB as usize, 20);
        session.ok(Request::write(0, &data));
        let patch = noise(LENGTH as usize, 21);
        let mix = (0..200).map(|i| match i % 2 {
            0 => Request::new(READ, 0, MIB),
            _ => Request::write(2 * MIB + (i / 2 % 16) * LENGTH, &patch),
        });
        let mut answered = 0;
        session.pipeline(mix, |request, answer| {
            assert_eq!(answer.error, 0);
            assert!(request.command == WRITE || answer.data == data, "data of a READ");
            answered += 1;
        });
        assert_eq!(answered, 200);
        assert!(session.read(2 * MIB, LENGTH) == patch);
    }
}

/// Count and length of the requests in flight at SIGTERM: a few whose replies fill all buffers,
/// then more than the server can have received, so that it closes a socket with unread data.
const LONG: (u64, u64) = (8, 4 * MIB);
const SHORT: (u64, u64) = (40_000, 1);

/// "On a server shutdown, the server SHOULD wait for inflight requests to be serviced prior to
/// initiating a hard disconnect" ("Terminating the transmission phase"). It may instead reply with
/// errors, which should be ESHUTDOWN. flexnbd never does: QEMU then fails the guest's I/O instead
/// of reconnecting.
#[test]
fn sigterm_completes_requests_in_flight() {
    for mode in MODES {
        let Some(mut ours) = Ours::start("SIGTERM", 16 * MIB, &[]) else { return };
        let mut idle = ours.session(mode);
        let mut session = ours.session(mode);
        session.ok(Request::write(0, &noise(LONG.1 as usize, 22)));
        let mut bytes = Vec::new();
        let mut lengths = HashMap::new();
        for (count, length) in [LONG, SHORT] {
            for _ in 0..count {
                let (cookie, encoded) = session.encode(&Request::new(READ, 0, length));
                bytes.extend(encoded);
                lengths.insert(cookie, length);
            }
        }
        session.wire.send(&bytes);
        let mut stream = session.wire.recv(4);
        ours.server.signal(nix::sys::signal::Signal::SIGTERM);
        let (rest, end) = session.wire.recv_to_end_or_error();
        assert!(end.is_ok(), "the connection is reset with replies in transit ({mode:?}): {end:?}");
        stream.extend(rest);
        let complete = complete_replies(mode, &stream, &lengths);
        assert!((1..=lengths.len()).contains(&complete), "{complete} replies ({mode:?})");
        drop(session);
        idle.wire.expect_closed("an idle session after SIGTERM");
        assert_eq!(ours.server.wait_for_end().code(), Some(0), "exit status after SIGTERM");
        assert!(read_at(&ours.image, 0, 4096) == noise(4096, 22), "the image is unchanged");
    }
}

/// Counts the complete replies in `stream` to READs of `lengths` (by cookie). Fails on an error
/// reply and on an incomplete one.
#[track_caller]
fn complete_replies(mode: Mode, stream: &[u8], lengths: &HashMap<u64, u64>) -> usize {
    let mut at = 0;
    let mut complete = 0;
    let mut last_is_done = true;
    while at < stream.len() {
        let head = &stream[at..stream.len().min(at + 32)];
        let header = [16, 20, 32][mode as usize];
        assert!(head.len() >= header, "the header of the last reply is truncated");
        let length = lengths[&big_endian(&head[8..16])];
        let (payload, done, failed) = match mode {
            Mode::Simple => (length, true, big_endian(&head[4..8]) != 0),
            Mode::Structured => (big_endian(&head[16..20]), head[5] == 1, head[6] & 0x80 != 0),
            Mode::Extended => (big_endian(&head[24..32]), head[5] == 1, head[6] & 0x80 != 0),
        };
        assert!(!failed, "a request in flight fails: {head:02x?}");
        at += header + payload as usize;
        complete += usize::from(done);
        last_is_done = done;
    }
    assert!(
        at == stream.len() && last_is_done,
        "the last reply is truncated: {at}, {}",
        stream.len()
    );
    complete
}

fn big_endian(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
}
