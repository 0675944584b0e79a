//! Replies of every form, cut at every byte, and malformed ones.

use super::*;
use crate::disk::{Completion, Extent, Op};
use crate::nbd::reply::ReplyTo;
use crate::nbd::wire::{Allocation, ChunkKind, TransmissionFlags};
use crate::range::Range;
use crate::upstream::terms::ServerTerms;
use std::collections::BTreeSet;

const SIZE: u64 = 1 << 20;
const CONTEXT: u32 = 5;

fn terms(dialect: Dialect) -> ServerTerms {
    ServerTerms {
        size: SIZE,
        flags: TransmissionFlags::all() - TransmissionFlags::READ_ONLY,
        dialect,
        block_min: 1,
        block_preferred: 4096,
        payload_max: 1 << 20,
        allocation_context: (dialect != Dialect::Simple).then_some(CONTEXT),
        disk_id: None,
    }
}

/// A machine with one connection that serves.
fn connected(dialect: Dialect) -> UpstreamMachine {
    let mut machine = UpstreamMachine::new(terms(dialect), 1 << 20);
    machine.connected(terms(dialect), 1);
    machine
}

/// Submits an operation, and returns what its replies need.
fn send(machine: &mut UpstreamMachine, key: u64, op: Op) -> ReplyTo {
    machine.submit(0, key.into(), op).unwrap();
    let header = machine.next_message(0).unwrap().header;
    ReplyTo { cookie: header.cookie, offset: header.offset, chunked: true }
}

fn range(offset: u64, length: u64) -> Range {
    Range::within(SIZE, offset, length).unwrap()
}

fn read(offset: u64, length: usize) -> Op {
    Op::Read { offset, data: Buffer::from(vec![0xee; length]) }
}

fn extents(offset: u64, length: u64) -> Op {
    Op::Extents { range: range(offset, length), limit: 10, found: Vec::new() }
}

/// Receives bytes as the link does.
fn receive(
    rx: &mut UpstreamRx,
    machine: &mut UpstreamMachine,
    mut bytes: &[u8],
) -> Result<(), LossReason> {
    while !bytes.is_empty() {
        let room = rx.room();
        let count = room.len().min(bytes.len());
        assert!(count > 0, "no room");
        room[..count].copy_from_slice(&bytes[..count]);
        bytes = &bytes[count..];
        rx.received(count);
        if rx.needs_machine() {
            rx.process(machine)?;
        }
    }
    Ok(())
}

fn completions(machine: &mut UpstreamMachine) -> Vec<(u64, Result<Op, i32>)> {
    let mut all = Vec::new();
    while let Some((_, Completion { key, op, outcome })) = machine.next_completion() {
        let outcome = outcome.unwrap().map_err(|error| error.raw_os_error().unwrap());
        all.push((key, outcome.map(|()| op)));
    }
    all.sort_by_key(|(key, _)| *key);
    all
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at * 7 + at / 256) as u8).collect()
}

/// Replies of all forms, and the outcomes of their requests.
struct Conversation {
    machine: UpstreamMachine,
    replies: Vec<u8>,
    outcomes: Vec<(u64, Result<Op, i32>)>,
}

impl Conversation {
    fn new(dialect: Dialect, length: usize) -> Self {
        let mut machine = connected(dialect);
        let mut replies = Vec::new();
        let mut outcomes = Vec::new();
        let data = pattern(length);
        let to = send(&mut machine, 0, Op::Cache(range(0, 7)));
        dialect.success(ReplyTo { chunked: false, ..to }, &mut replies);
        outcomes.push((0, Ok(Op::Cache(range(0, 7)))));
        let to = send(&mut machine, 1, read(100, length));
        dialect.data_header(to, 100, length as u32, true, &mut replies);
        replies.extend(&data);
        outcomes.push((1, Ok(Op::Read { offset: 100, data: Buffer::from(data.clone()) })));
        let to = send(&mut machine, 2, Op::Flush);
        dialect.failure(
            ReplyTo { chunked: false, ..to },
            ErrorCode::NoSpace,
            None,
            "full",
            &mut replies,
        );
        outcomes.push((2, Err(Errno::ENOSPC as i32)));
        let to = send(&mut machine, 3, read(0, 9));
        dialect.failure(to, ErrorCode::Io, Some(0), "broken", &mut replies);
        outcomes.push((3, Err(Errno::EIO as i32)));
        if dialect != Dialect::Simple {
            Self::chunks(dialect, length, &mut machine, &mut replies, &mut outcomes);
        }
        Self { machine, replies, outcomes }
    }

    /// Forms that simple replies lack.
    fn chunks(
        dialect: Dialect,
        length: usize,
        machine: &mut UpstreamMachine,
        replies: &mut Vec<u8>,
        outcomes: &mut Vec<(u64, Result<Op, i32>)>,
    ) {
        let mut data = pattern(length + 20);
        data[..10].fill(0);
        let to = send(machine, 4, read(50, length + 20));
        // The end, the beginning, and the part between them.
        dialect.data_header(to, 60 + length as u64, 10, false, replies);
        replies.extend(&data[10 + length..]);
        dialect.hole(to, 50, 10, false, replies);
        dialect.data_header(to, 60, length as u32, false, replies);
        replies.extend(&data[10..10 + length]);
        dialect.success(to, replies);
        outcomes.push((4, Ok(Op::Read { offset: 50, data: Buffer::from(data) })));
        let to = send(machine, 5, extents(10, 100));
        let hole = (Allocation::HOLE | Allocation::ZERO).bits();
        dialect.status(to, CONTEXT, &[(30, 0), (20, hole), (4096, 0)], replies);
        let extent = |offset, length, allocated| Extent { range: range(offset, length), allocated };
        let found = vec![extent(10, 30, true), extent(40, 20, false), extent(60, 50, true)];
        outcomes.push((5, Ok(Op::Extents { range: range(10, 100), limit: 10, found })));
        let to = send(machine, 6, read(0, 12));
        // An error before the last chunk.
        let start = replies.len();
        dialect.failure(to, ErrorCode::Io, None, "half", replies);
        replies[start + 5] = 0;
        dialect.hole(to, 0, 12, true, replies);
        outcomes.push((6, Err(Errno::EIO as i32)));
    }
}

#[test]
fn replies_may_be_cut_at_every_byte() {
    for dialect in [Dialect::Simple, Dialect::Structured, Dialect::Extended] {
        let length = Conversation::new(dialect, 33).replies.len();
        for cut in 0..=length {
            let mut talk = Conversation::new(dialect, 33);
            let mut rx = UpstreamRx::new(0, dialect);
            let (first, second) = talk.replies.split_at(cut);
            receive(&mut rx, &mut talk.machine, first).unwrap();
            receive(&mut rx, &mut talk.machine, second).unwrap();
            assert_eq!(completions(&mut talk.machine), talk.outcomes, "{dialect:?}, {cut}");
        }
        let mut talk = Conversation::new(dialect, 33);
        let mut rx = UpstreamRx::new(0, dialect);
        for byte in talk.replies.chunks(1) {
            receive(&mut rx, &mut talk.machine, byte).unwrap();
        }
        assert_eq!(completions(&mut talk.machine), talk.outcomes, "{dialect:?}");
    }
}

#[test]
fn long_data_arrives_in_the_buffer_of_its_read() {
    let length = 2 * BUFFER_SIZE;
    for dialect in [Dialect::Simple, Dialect::Structured, Dialect::Extended] {
        for seed in 0..20 {
            let mut rng = fastrand::Rng::with_seed(seed);
            let mut talk = Conversation::new(dialect, length);
            let mut rx = UpstreamRx::new(0, dialect);
            let mut bytes = &talk.replies[..];
            let mut was_direct = false;
            while !bytes.is_empty() {
                let count = rng.usize(1..=bytes.len().min(70_000));
                receive(&mut rx, &mut talk.machine, &bytes[..count]).unwrap();
                was_direct |= !rx.needs_machine();
                bytes = &bytes[count..];
            }
            assert!(was_direct);
            assert_eq!(completions(&mut talk.machine), talk.outcomes, "{dialect:?}, {seed}");
        }
    }
}

#[test]
fn a_lost_connection_returns_the_buffer() {
    let mut machine = connected(Dialect::Simple);
    let to = send(&mut machine, 0, read(0, 100_000));
    let mut bytes = Vec::new();
    Dialect::Simple.data_header(to, 0, 100_000, true, &mut bytes);
    bytes.extend(pattern(50_000));
    let mut rx = UpstreamRx::new(0, Dialect::Simple);
    receive(&mut rx, &mut machine, &bytes).unwrap();
    assert!(!rx.needs_machine());
    rx.abandon(&mut machine);
    machine.lost();
    machine.connected(terms(Dialect::Simple), 1);
    let to = machine.next_message(0).unwrap().header;
    let mut bytes = Vec::new();
    let to = ReplyTo { cookie: to.cookie, offset: 0, chunked: true };
    Dialect::Simple.data_header(to, 0, 100_000, true, &mut bytes);
    bytes.extend(pattern(100_000));
    receive(&mut UpstreamRx::new(0, Dialect::Simple), &mut machine, &bytes).unwrap();
    let data = Buffer::from(pattern(100_000));
    assert_eq!(completions(&mut machine), [(0, Ok(Op::Read { offset: 0, data }))]);
}

#[test]
fn more_replies_than_fit_into_the_buffer_are_received() {
    let mut machine = connected(Dialect::Simple);
    let mut bytes = Vec::new();
    for key in 0..40_000 {
        let to = send(&mut machine, key, Op::Cache(range(0, 1)));
        Dialect::Simple.success(ReplyTo { chunked: false, ..to }, &mut bytes);
    }
    assert!(bytes.len() > 2 * BUFFER_SIZE);
    let mut rx = UpstreamRx::new(0, Dialect::Simple);
    // No multiple of a reply, so that the buffer ends inside one.
    for part in bytes.chunks(100_003) {
        receive(&mut rx, &mut machine, part).unwrap();
    }
    assert_eq!(completions(&mut machine).len(), 40_000);
}

#[test]
fn a_status_longer_than_the_buffer_is_received() {
    let dialect = Dialect::Extended;
    let mut machine = connected(dialect);
    let range = range(0, SIZE);
    let limit = 100_000;
    let to = send(&mut machine, 0, Op::Extents { range, limit, found: Vec::new() });
    let mut bytes = Vec::new();
    let extents: Vec<_> = (0..50_000).map(|nth| (10, nth % 2 * 3)).collect();
    dialect.status(to, CONTEXT, &extents, &mut bytes);
    assert!(bytes.len() > 2 * BUFFER_SIZE);
    receive(&mut UpstreamRx::new(0, dialect), &mut machine, &bytes).unwrap();
    let outcomes = completions(&mut machine);
    let [(0, Ok(Op::Extents { found, .. }))] = &outcomes[..] else { panic!("{outcomes:?}") };
    assert_eq!(found.len(), 50_000);
}

/// The header of a chunk, and its payload.
fn chunk(to: ReplyTo, dialect: Dialect, kind: ChunkKind, length: u64, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let offset = (dialect == Dialect::Extended).then_some(to.offset);
    let (cookie, kind) = (to.cookie, kind.number());
    ReplyHeader::Chunk { cookie, done: true, kind, length, offset }.encode(&mut bytes);
    bytes.extend_from_slice(payload);
    bytes
}

/// How a malformed reply is called, its dialect, its request, and its bytes.
type MalformedReply = (&'static str, Dialect, Op, fn(ReplyTo) -> Vec<u8>);

fn malformed() -> Vec<MalformedReply> {
    use Dialect::{Extended, Simple, Structured};
    fn made(make: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
        let mut bytes = Vec::new();
        make(&mut bytes);
        bytes
    }
    vec![
        ("a reply does not begin as one", Simple, Op::Flush, |_| vec![1, 2, 3, 4]),
        ("a simple reply in spite of extended headers", Extended, Op::Flush, |to| {
            made(|out| Simple.success(to, out))
        }),
        ("a chunk of a form that was not agreed on", Simple, read(0, 8), |to| {
            made(|out| Structured.success(to, out))
        }),
        ("a chunk of a form that was not agreed on", Structured, read(0, 8), |to| {
            made(|out| Extended.success(to, out))
        }),
        ("a chunk of a form that was not agreed on", Extended, read(0, 8), |to| {
            made(|out| Structured.success(to, out))
        }),
        ("a chunk is too long", Structured, extents(0, 8), |to| {
            chunk(to, Structured, ChunkKind::BlockStatus, CHUNK_PAYLOAD_MAX + 4, &[])
        }),
        ("a malformed chunk", Structured, read(0, 8), |to| {
            chunk(to, Structured, ChunkKind::OffsetHole, 11, &[0; 11])
        }),
        ("a malformed chunk", Structured, read(0, 8), |to| {
            chunk(to, Structured, ChunkKind::OffsetData, 8, &[0; 8])
        }),
        ("a malformed chunk", Extended, extents(0, 8), |to| {
            chunk(to, Extended, ChunkKind::BlockStatusExtended, 8, &[0, 0, 0, 5, 0, 0, 0, 1])
        }),
        ("a simple reply to a read", Structured, read(0, 8), |to| {
            made(|out| Simple.success(to, out))
        }),
        ("a reply to no request", Simple, Op::Flush, |to| {
            made(|out| Simple.success(ReplyTo { cookie: to.cookie + 1, ..to }, out))
        }),
        ("a reply to no request", Structured, read(0, 8), |to| {
            made(|out| {
                Structured.failure(to, ErrorCode::Io, None, "", out);
                Structured.failure(to, ErrorCode::Io, None, "", out);
            })
        }),
        ("a reply to no request", Structured, read(0, 8), |to| {
            let cookie = to.cookie + 1;
            made(|out| Structured.hole(ReplyTo { cookie, ..to }, 0, 8, false, out))
        }),
        ("data of a request that reads nothing", Structured, Op::Flush, |to| {
            made(|out| Structured.hole(to, 0, 8, true, out))
        }),
        ("data beside the requested range", Structured, read(8, 8), |to| {
            made(|out| Structured.hole(to, 7, 8, true, out))
        }),
        ("data beside the requested range", Structured, read(8, 8), |to| {
            made(|out| Structured.data_header(to, 8, 9, true, out))
        }),
        ("data beside the requested range", Structured, read(8, 8), |to| {
            made(|out| Structured.hole(to, u64::MAX, 8, true, out))
        }),
        ("the same data twice", Structured, read(8, 8), |to| {
            made(|out| {
                Structured.hole(to, 8, 5, false, out);
                Structured.hole(to, 12, 4, true, out);
            })
        }),
        ("a reply in too many pieces out of order", Structured, read(0, 1024), |to| {
            made(|out| (0..257).for_each(|nth| Structured.hole(to, 2 * nth, 1, false, out)))
        }),
        ("block status that was not requested", Structured, read(0, 8), |to| {
            made(|out| Structured.status(to, CONTEXT, &[(8, 0)], out))
        }),
        ("block status of another context", Extended, extents(0, 8), |to| {
            made(|out| Extended.status(to, CONTEXT + 1, &[(8, 0)], out))
        }),
        ("a reply without all of its content", Structured, read(8, 8), |to| {
            made(|out| Structured.hole(to, 8, 7, true, out))
        }),
        ("a reply without all of its content", Extended, read(8, 8), |to| {
            made(|out| Extended.success(to, out))
        }),
        ("a reply without all of its content", Structured, extents(0, 8), |to| {
            made(|out| Simple.success(to, out))
        }),
    ]
}

#[test]
fn malformed_replies_end_the_connection() {
    let mut reached = BTreeSet::new();
    for (text, dialect, op, reply) in malformed() {
        let mut machine = connected(dialect);
        let what = format!("{text}: {dialect:?}, {op:?}");
        let bytes = reply(send(&mut machine, 0, op));
        let outcome = receive(&mut UpstreamRx::new(0, dialect), &mut machine, &bytes);
        assert_eq!(outcome, Err(LossReason::Protocol(text)), "{what}");
        assert!(completions(&mut machine).iter().all(|(_, outcome)| outcome.is_err()), "{what}");
        reached.insert(text);
    }
    let sources = [include_str!("../rx.rs"), include_str!("../machine/answers.rs")];
    let known = sources.iter().flat_map(|source| source.split("LossReason::Protocol(\"").skip(1));
    let known: BTreeSet<&str> = known.map(|rest| rest.split('"').next().unwrap()).collect();
    assert_eq!(reached, known);
}

#[test]
fn chunks_are_received_up_to_their_limits() {
    let dialect = Dialect::Structured;
    let mut machine = connected(dialect);
    let to = send(&mut machine, 0, extents(0, 8));
    let bytes = chunk(to, dialect, ChunkKind::BlockStatus, CHUNK_PAYLOAD_MAX, &[]);
    receive(&mut UpstreamRx::new(0, dialect), &mut machine, &bytes).unwrap();

    let mut machine = connected(dialect);
    let to = send(&mut machine, 0, read(0, 512));
    let mut bytes = Vec::new();
    for nth in (0..256).chain((0..256).rev().map(|nth| nth + 1000)) {
        let at = if nth < 1000 { 2 * nth } else { 2 * (nth - 1000) + 1 };
        dialect.hole(to, at, 1, false, &mut bytes);
    }
    dialect.success(to, &mut bytes);
    receive(&mut UpstreamRx::new(0, dialect), &mut machine, &bytes).unwrap();
    let data = Buffer::from(vec![0; 512]);
    assert_eq!(completions(&mut machine), [(0, Ok(Op::Read { offset: 0, data }))]);
}

#[test]
fn a_server_that_shuts_down_counts_as_unanswered() {
    for dialect in [Dialect::Simple, Dialect::Structured, Dialect::Extended] {
        let mut machine = connected(dialect);
        let mut bytes = Vec::new();
        let to = send(&mut machine, 0, Op::Flush);
        dialect.success(ReplyTo { chunked: false, ..to }, &mut bytes);
        receive(&mut UpstreamRx::new(0, dialect), &mut machine, &bytes).unwrap();
        assert_eq!((machine.replies(), completions(&mut machine).len()), (1, 1));
        bytes.clear();
        let to = send(&mut machine, 0, read(0, 8));
        dialect.failure(to, ErrorCode::Shutdown, None, "departed", &mut bytes);
        let outcome = receive(&mut UpstreamRx::new(0, dialect), &mut machine, &bytes);
        assert_eq!(outcome, Err(LossReason::ShuttingDown));
        assert_eq!(machine.replies(), 0);
        assert!(completions(&mut machine).is_empty());
    }
}
