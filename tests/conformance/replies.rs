//! Replies to READ and BLOCK_STATUS. `harness::session` checks every reply of every test: chunks
//! are in range, do not overlap and cover the request. These tests use layouts that are easy to get
//! wrong.

use crate::subject::{Ours, Subject};
use harness::raw::*;
use harness::session::{Chunk, MODES, Mode, Request, Session};
use harness::{GIB, KIB, MIB, noise, write_at};
use std::fs::File;

const WITH_CHUNKS: [Mode; 2] = [Mode::Structured, Mode::Extended];

/// Longest READ in one chunk, in bytes: of every server ("Request types", READ), and of flexnbd.
const DF_PORTABLE_MAX: u64 = 64 * KIB;
const DF_MAX: u64 = MIB;

/// Writes the first 4 MiB: zeroes, with data in the second MiB and at the end. Returns the content.
fn write_layout(session: &mut Session) -> Vec<u8> {
    let mut expected = vec![0; 4 * MIB as usize];
    session.ok(Request::new(WRITE_ZEROES, 0, 4 * MIB));
    for (offset, length, seed) in [(MIB, 64 * KIB + 100, 1), (4 * MIB - 4096, 4096, 2)] {
        let data = noise(length as usize, seed);
        session.ok(Request::write(offset, &data));
        expected[offset as usize..(offset + length) as usize].copy_from_slice(&data);
    }
    expected
}

/// "When no error is detected, the server MUST send enough data chunks to cover the entire region
/// described by the offset and length of the client's request" ("Request types", READ).
#[test]
fn chunks_cover_the_read() {
    let subject = Subject::any();
    for mode in WITH_CHUNKS {
        let Some(mut session) = subject.session(mode) else { continue };
        let expected = write_layout(&mut session);
        let ranges = [
            (0, 4 * MIB),
            (0, 1),
            (4 * MIB - 1, 1),
            (MIB - 7, 64 * KIB + 200),
            (MIB + 1, 510),
            (MIB + 64 * KIB + 99, 2),
            (3 * MIB + 3, MIB - 3),
        ];
        for (offset, length) in ranges {
            let data = session.read(offset, length);
            let same = data == expected[offset as usize..(offset + length) as usize];
            assert!(same, "{length} bytes at {offset} ({mode:?})");
        }
        check_reads_with_df(&subject, &mut session, &expected);
        let beyond = session.size;
        session.refused(Request::new(READ, beyond, 512), &[EINVAL]);
        session.refused(Request::new(READ, 0, 512).flags(1 << 15), &[EINVAL]);
    }
}

/// "... the server MUST support unfragmented reads in which the client's request length does not
/// exceed 65,536 bytes" ("Request types", READ).
fn check_reads_with_df(subject: &Subject, session: &mut Session, expected: &[u8]) {
    if session.flags & SEND_DF == 0 {
        return;
    }
    for (offset, length) in
        [(MIB, 1), (MIB - 512, 4096), (MIB - 100, DF_PORTABLE_MAX), (0, DF_PORTABLE_MAX)]
    {
        let data = read_with_df(subject, session, offset, length);
        let same = data == expected[offset as usize..(offset + length) as usize];
        assert!(same, "{length} bytes at {offset} with DF");
    }
    let longer = Request::new(READ, MIB / 2, DF_MAX + 1).flags(DF);
    if subject.is_ours() {
        assert_eq!(read_with_df(subject, session, MIB / 2, DF_MAX).len() as u64, DF_MAX);
        session.refused(longer, &[EOVERFLOW]);
    } else {
        let answer = session.ask(longer);
        assert!(
            [0, EOVERFLOW].contains(&answer.error),
            "error {} of a long READ with DF",
            answer.error
        );
    }
}

/// Reads with DF. "If this flag is set, the server MUST send at most one content chunk" ("Request
/// types", READ); flexnbd never sends it as a hole.
#[track_caller]
fn read_with_df(subject: &Subject, session: &mut Session, offset: u64, length: u64) -> Vec<u8> {
    let answer = session.ok(Request::new(READ, offset, length).flags(DF));
    let content: Vec<&Chunk> = answer.chunks.iter().filter(|c| c.is_content()).collect();
    assert_eq!(content.len(), 1, "content chunks of {length} bytes with DF");
    let is_data = content[0].kind == CHUNK_DATA;
    assert!(is_data || !subject.is_ours(), "flexnbd sends a hole with DF");
    answer.data
}

/// Size of the image in bytes before it is truncated, and after.
const SIZE: u64 = 16 * MIB;
const TRUNCATED_SIZE: u64 = 4 * MIB;

/// "If an error occurs while reading after the server has already sent out the reply header with an
/// error field set to zero (i.e., signalling no error), the server MUST immediately initiate a hard
/// disconnect" ("Request types", READ, simple replies).
#[test]
fn a_failed_read_is_never_padded() {
    for mode in MODES {
        let Some(mut ours) = Ours::start_with("a disk that fails", SIZE, |builder, image, _| {
            write_at(image, 0, &noise(SIZE as usize, 14));
            builder
        }) else {
            return;
        };
        let original = noise(SIZE as usize, 14);
        let mut session = ours.session(mode);
        session.assert_in_sync();
        File::options().write(true).open(&ours.image).unwrap().set_len(TRUNCATED_SIZE).unwrap();
        if mode == Mode::Simple {
            check_failing_simple_read(session, &original);
            check_failing_simple_read(ours.session(mode), &original);
        } else {
            check_error_chunks(&mut session);
        }
        assert!(ours.server.is_running(), "the server is still running");
        let mut other = ours.session(mode);
        assert!(
            other.read(0, TRUNCATED_SIZE) == original[..TRUNCATED_SIZE as usize],
            "the rest of the image"
        );
    }
}

/// Either the reply has an error and no data, or the connection ends before the data is complete.
fn check_failing_simple_read(mut session: Session, original: &[u8]) {
    let cookie = session.send(&Request::new(READ, 0, SIZE));
    assert_eq!(session.wire.recv_u32(), SIMPLE_REPLY);
    let error = session.wire.recv_u32();
    assert_eq!(session.wire.recv_u64(), cookie);
    if error != 0 {
        assert_eq!(error, EIO, "an error before any data");
        session.assert_in_sync();
        return;
    }
    let data = session.wire.recv_to_end();
    assert!(data.len() < original.len(), "padding instead of data");
    let readable = data.len().min(TRUNCATED_SIZE as usize);
    assert!(data[..readable] == original[..readable], "data before the end of the file");
    assert!(data.len() <= TRUNCATED_SIZE as usize, "data beyond the end of the file");
}

/// "The server MUST include an error chunk as one of the subsequent chunks" ("Request types", READ,
/// structured replies).
fn check_error_chunks(session: &mut Session) {
    for (offset, length) in
        [(0, SIZE), (TRUNCATED_SIZE - 4096, 8192), (TRUNCATED_SIZE, 4096), (SIZE - 1, 1)]
    {
        for flags in [0, DF] {
            let too_long = flags == DF && length > DF_MAX;
            let answer = session.ask(Request::new(READ, offset, length).flags(flags));
            let expected = if too_long { EOVERFLOW } else { EIO };
            assert_eq!(answer.error, expected, "{length} bytes at {offset}, flags {flags}");
            session.assert_in_sync();
        }
    }
}

/// Queries the status of `offset..end` with as many requests as needed; merges adjacent extents of
/// different replies.
#[track_caller]
fn map_extents(session: &mut Session, offset: u64, end: u64) -> Vec<(u64, u64)> {
    let longest = if session.mode == Mode::Extended { u64::MAX } else { 0xffff_f000 };
    let mut all: Vec<(u64, u64)> = Vec::new();
    let mut at = offset;
    while at < end {
        let request = Request::new(BLOCK_STATUS, at, (end - at).min(longest));
        for (length, flags) in session.ok(request).extents {
            at += length;
            match all.last_mut().filter(|(_, last)| *last == flags) {
                Some((last, _)) => *last += length,
                None => all.push((length, flags)),
            }
        }
    }
    assert!(at <= session.size, "extents end at {at}");
    all
}

/// "`NBD_STATE_ZERO` (bit 1): if set, the block contents read as all zeroes"
/// ("`base:allocation` metadata context").
#[test]
fn zero_extents_contain_no_data() {
    let subject = Subject::any();
    for mode in WITH_CHUNKS {
        let Some(mut session) = subject.session(mode) else { continue };
        if session.context.is_some() {
            check_extents(&subject, &mut session);
        }
    }
}

fn check_extents(subject: &Subject, session: &mut Session) {
    let expected = write_layout(session);
    for (offset, length) in [(0, 4 * MIB), (MIB - 3, 7), (MIB + 100, 64 * KIB), (1, 1)] {
        let extents = session.ok(Request::new(BLOCK_STATUS, offset, length)).extents;
        let distinct = extents.windows(2).all(|pair| pair[0].1 != pair[1].1);
        assert!(distinct || !subject.is_ours(), "adjacent extents with equal flags: {extents:?}");
        let mut at = offset as usize;
        for (length, flags) in extents {
            let end = (at + length as usize).min(expected.len());
            let zero = expected[at.min(end)..end].iter().all(|byte| *byte == 0);
            assert!(zero || flags & STATE_ZERO == 0, "data at {at} in a zero extent");
            at = end;
        }
    }
}

/// "If the client used the `NBD_CMD_FLAG_REQ_ONE` flag in the request, then every reply chunk MUST
/// contain exactly one descriptor, and that descriptor MUST NOT exceed the *length* of the original
/// request" ("Structured reply types"; `harness::session` checks the length).
#[test]
fn req_one_returns_one_extent() {
    let subject = Subject::any();
    for mode in WITH_CHUNKS {
        let Some(mut session) = subject.session(mode) else { continue };
        if session.context.is_none() {
            continue;
        }
        write_layout(&mut session);
        for (offset, length) in [(0, 4 * MIB), (0, 1), (MIB - 1, 2), (MIB + 7, 512), (0, 8 * MIB)] {
            let request = Request::new(BLOCK_STATUS, offset, length).flags(REQ_ONE);
            assert_eq!(session.ok(request).extents.len(), 1);
        }
    }
}

/// 8192 extents, alternately data and holes.
#[test]
fn extents_equal_those_of_the_file() {
    const PIECE: u64 = 8 * KIB;
    const SIZE: u64 = 64 * MIB;
    let Some(ours) = Ours::start_with("the extents of a file", SIZE, |builder, image, _| {
        for at in (0..SIZE).step_by(2 * PIECE as usize) {
            write_at(image, at, &[0xaa; PIECE as usize]);
        }
        builder
    }) else {
        return;
    };
    let hole = (PIECE, STATE_HOLE | STATE_ZERO);
    let expected: Vec<_> = (0..SIZE / PIECE / 2).flat_map(|_| [(PIECE, 0), hole]).collect();
    for mode in WITH_CHUNKS {
        let mut session = ours.session(mode);
        assert!(map_extents(&mut session, 0, SIZE) == expected, "8192 extents ({mode:?})");
        let from_within = map_extents(&mut session, PIECE + 1, 3 * PIECE);
        assert_eq!(from_within[0], (PIECE - 1, hole.1), "an extent from its middle on");
    }
}

/// Compact replies have 32-bit lengths.
#[test]
fn extent_lengths_are_clamped_at_4_gib() {
    const SIZE: u64 = 8 * GIB;
    let Some(ours) = Ours::start("extents over 4 GiB", SIZE, &[]) else { return };
    for mode in WITH_CHUNKS {
        let mut session = ours.session(mode);
        for (offset, length) in [(0, 4096), (0, 4 * GIB - 4096), (3 * GIB, 4 * GIB - 4096)] {
            let extents = session.ok(Request::new(BLOCK_STATUS, offset, length)).extents;
            assert_eq!(extents[0].1, STATE_HOLE | STATE_ZERO);
            assert!(extents[0].0 >= length.min(3 * GIB), "{extents:?} wrapped at 4 GiB");
        }
        let request = Request::new(BLOCK_STATUS, 0, 4 * GIB - 1).flags(REQ_ONE);
        assert_eq!(session.ok(request).extents.len(), 1);
        assert_eq!(map_extents(&mut session, 0, SIZE), [(SIZE, STATE_HOLE | STATE_ZERO)]);
    }
    let mut session = ours.session(Mode::Extended);
    let extents = session.ok(Request::new(BLOCK_STATUS, 0, SIZE)).extents;
    assert_eq!(extents, [(SIZE, STATE_HOLE | STATE_ZERO)], "64-bit lengths are not clamped");
}
