//! Points 13 to 15: what READ and BLOCK_STATUS are answered with.
//! That chunks lie in range, do not overlap and cover what was asked is checked with every reply of
//! every test (`common/session.rs`); here are the layouts that tempt a server to break it.

use crate::subject::{Ours, Subject};
use harness::raw::*;
use harness::session::{Chunk, MODES, Mode, Request, Session};
use harness::{GIB, KIB, MIB, noise, write_at};
use std::fs::File;

const WITH_CHUNKS: [Mode; 2] = [Mode::Structured, Mode::Extended];

/// What every server must read without fragments, and what ours does.
const DF_FAIR: u64 = 64 * KIB;
const DF_MAX: u64 = MIB;

/// How the first 4 MiB look in the tests of reading: data in the second MiB and at the end.
fn lay_out(session: &mut Session) -> Vec<u8> {
    let mut expected = vec![0; 4 * MIB as usize];
    session.ok(Request::new(WRITE_ZEROES, 0, 4 * MIB));
    for (offset, length, seed) in [(MIB, 64 * KIB + 100, 1), (4 * MIB - 4096, 4096, 2)] {
        let data = noise(length as usize, seed);
        session.ok(Request::write(offset, &data));
        expected[offset as usize..(offset + length) as usize].copy_from_slice(&data);
    }
    expected
}

#[test]
fn point_13_a_read_is_answered_with_chunks_that_fit() {
    let subject = Subject::any();
    for mode in WITH_CHUNKS {
        let Some(mut session) = subject.session(mode) else { continue };
        let expected = lay_out(&mut session);
        let spans = [
            (0, 4 * MIB),
            (0, 1),
            (4 * MIB - 1, 1),
            (MIB - 7, 64 * KIB + 200),
            (MIB + 1, 510),
            (MIB + 64 * KIB + 99, 2),
            (3 * MIB + 3, MIB - 3),
        ];
        for (offset, length) in spans {
            let data = session.read(offset, length);
            let same = data == expected[offset as usize..(offset + length) as usize];
            assert!(same, "{length} bytes at {offset} ({mode:?})");
        }
        reads_without_fragments(&subject, &mut session, &expected);
        let beyond = session.size;
        session.refused(Request::new(READ, beyond, 512), &[EINVAL]);
        session.refused(Request::new(READ, 0, 512).flags(1 << 15), &[EINVAL]);
    }
}

fn reads_without_fragments(subject: &Subject, session: &mut Session, expected: &[u8]) {
    if session.flags & SEND_DF == 0 {
        return;
    }
    for (offset, length) in [(MIB, 1), (MIB - 512, 4096), (MIB - 100, DF_FAIR), (0, DF_FAIR)] {
        let data = one_piece(subject, session, offset, length);
        let same = data == expected[offset as usize..(offset + length) as usize];
        assert!(same, "{length} bytes in one piece at {offset}");
    }
    let longer = Request::new(READ, MIB / 2, DF_MAX + 1).flags(DF);
    if subject.is_ours() {
        assert_eq!(one_piece(subject, session, MIB / 2, DF_MAX).len() as u64, DF_MAX);
        session.refused(longer, &[EOVERFLOW]);
    } else {
        let answer = session.ask(longer);
        assert!([0, EOVERFLOW].contains(&answer.error), "error {} of a long DF", answer.error);
    }
}

/// A READ with DF that must succeed: its data is one chunk, and says so where it holds any data.
#[track_caller]
fn one_piece(subject: &Subject, session: &mut Session, offset: u64, length: u64) -> Vec<u8> {
    let answer = session.ok(Request::new(READ, offset, length).flags(DF));
    let content: Vec<&Chunk> = answer.chunks.iter().filter(|c| c.is_content()).collect();
    assert_eq!(content.len(), 1, "{length} bytes come as one chunk");
    let explicit = content[0].kind == CHUNK_DATA;
    assert!(explicit || !subject.is_ours(), "we send no hole under DF");
    answer.data
}

/// What is left of the image after somebody has cut it, in bytes, of this much.
const LEFT: u64 = 4 * MIB;
const WHOLE: u64 = 16 * MIB;

#[test]
fn point_14_a_read_that_fails_midway_is_never_taken_for_data() {
    for mode in MODES {
        let Some(mut ours) = Ours::start_with("a disk that fails", WHOLE, |builder, image, _| {
            write_at(image, 0, &noise(WHOLE as usize, 14));
            builder
        }) else {
            return;
        };
        let original = noise(WHOLE as usize, 14);
        let mut session = ours.session(mode);
        session.assert_in_sync();
        File::options().write(true).open(&ours.image).unwrap().set_len(LEFT).unwrap();
        if mode == Mode::Simple {
            a_simple_reply_is_cut_short(session, &original);
            a_simple_reply_is_cut_short(ours.session(mode), &original);
        } else {
            an_error_chunk_tells(&mut session);
        }
        assert!(ours.server.is_running(), "the server survives its disk");
        let mut other = ours.session(mode);
        assert!(other.read(0, LEFT) == original[..LEFT as usize], "what is left is served");
    }
}

/// Either the error comes before any data, or the session ends before the data is complete.
fn a_simple_reply_is_cut_short(mut session: Session, original: &[u8]) {
    let cookie = session.send(&Request::new(READ, 0, WHOLE));
    assert_eq!(session.wire.recv_u32(), SIMPLE_REPLY);
    let error = session.wire.recv_u32();
    assert_eq!(session.wire.recv_u64(), cookie);
    if error != 0 {
        assert_eq!(error, EIO, "an error before any data");
        session.assert_in_sync();
        return;
    }
    let data = session.wire.recv_to_end();
    assert!(data.len() < original.len(), "padding was sent for data");
    let true_part = data.len().min(LEFT as usize);
    assert!(data[..true_part] == original[..true_part], "what came is true");
    assert!(data.len() <= LEFT as usize, "bytes came from beyond the file's end");
}

fn an_error_chunk_tells(session: &mut Session) {
    for (offset, length) in [(0, WHOLE), (LEFT - 4096, 8192), (LEFT, 4096), (WHOLE - 1, 1)] {
        for flags in [0, DF] {
            let too_long = flags == DF && length > DF_MAX;
            let answer = session.ask(Request::new(READ, offset, length).flags(flags));
            let expected = if too_long { EOVERFLOW } else { EIO };
            assert_eq!(answer.error, expected, "{length} bytes at {offset}, flags {flags}");
            session.assert_in_sync();
        }
    }
}

/// Asks for the status of everything from `offset` on, however many requests it takes, and merges
/// what different replies say about neighbours.
#[track_caller]
fn walk(session: &mut Session, offset: u64, end: u64) -> Vec<(u64, u64)> {
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
    assert!(at <= session.size, "extents stay on the disk: {at}");
    all
}

#[test]
fn point_15_block_status_tells_the_truth_within_its_limits() {
    let subject = Subject::any();
    for mode in WITH_CHUNKS {
        let Some(mut session) = subject.session(mode) else { continue };
        if session.context.is_some() {
            extents_are_true(&subject, &mut session);
            single_extents_are_no_longer_than_asked(&mut session);
        }
    }
    extents_are_those_of_the_file();
    lengths_clamp_at_4_gib();
}

fn extents_are_true(subject: &Subject, session: &mut Session) {
    let expected = lay_out(session);
    for (offset, length) in [(0, 4 * MIB), (MIB - 3, 7), (MIB + 100, 64 * KIB), (1, 1)] {
        let extents = session.ok(Request::new(BLOCK_STATUS, offset, length)).extents;
        let distinct = extents.windows(2).all(|pair| pair[0].1 != pair[1].1);
        assert!(distinct || !subject.is_ours(), "equal neighbours are merged: {extents:?}");
        let mut at = offset as usize;
        for (length, flags) in extents {
            let end = (at + length as usize).min(expected.len());
            let zero = expected[at.min(end)..end].iter().all(|byte| *byte == 0);
            assert!(zero || flags & STATE_ZERO == 0, "data at {at} is called zero");
            at = end;
        }
    }
}

fn single_extents_are_no_longer_than_asked(session: &mut Session) {
    for (offset, length) in [(0, 4 * MIB), (0, 1), (MIB - 1, 2), (MIB + 7, 512), (0, 8 * MIB)] {
        let request = Request::new(BLOCK_STATUS, offset, length).flags(REQ_ONE);
        assert_eq!(session.ok(request).extents.len(), 1);
    }
}

/// Thousands of extents, alternating, against what was written into the file.
fn extents_are_those_of_the_file() {
    const PIECE: u64 = 8 * KIB;
    const SIZE: u64 = 64 * MIB;
    let Some(ours) = Ours::start_with("a file's own extents", SIZE, |builder, image, _| {
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
        assert!(walk(&mut session, 0, SIZE) == expected, "8192 pieces ({mode:?})");
        let from_within = walk(&mut session, PIECE + 1, 3 * PIECE);
        assert_eq!(from_within[0], (PIECE - 1, hole.1), "an offset within an extent");
    }
}

fn lengths_clamp_at_4_gib() {
    const SIZE: u64 = 8 * GIB;
    let Some(ours) = Ours::start("extents over 4 GiB", SIZE, &[]) else { return };
    for mode in WITH_CHUNKS {
        let mut session = ours.session(mode);
        for (offset, length) in [(0, 4096), (0, 4 * GIB - 4096), (3 * GIB, 4 * GIB - 4096)] {
            let extents = session.ok(Request::new(BLOCK_STATUS, offset, length)).extents;
            assert_eq!(extents[0].1, STATE_HOLE | STATE_ZERO);
            assert!(extents[0].0 >= length.min(3 * GIB), "{extents:?}, not wrapped at 4 GiB");
        }
        let request = Request::new(BLOCK_STATUS, 0, 4 * GIB - 1).flags(REQ_ONE);
        assert_eq!(session.ok(request).extents.len(), 1);
        assert_eq!(walk(&mut session, 0, SIZE), [(SIZE, STATE_HOLE | STATE_ZERO)]);
    }
    let mut session = ours.session(Mode::Extended);
    let extents = session.ok(Request::new(BLOCK_STATUS, 0, SIZE)).extents;
    assert_eq!(extents, [(SIZE, STATE_HOLE | STATE_ZERO)], "64-bit lengths need no clamp");
}
