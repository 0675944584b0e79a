//! Block status on a disk whose extents are found by operations in flight.

use super::super::tests::engine_with;
use super::*;
use crate::disk::inflight::{IN_FLIGHT_MAX, READ_BYTES_MAX};
use crate::disk::memory_backend::MemoryBackend;
use crate::disk::slow_backend::{Slow, SlowBackend};
use crate::disk::{Backend, Disk, Extent};
use crate::nbd::reply::{Chunk, Dialect, ReplyHeader, StatusExtent};
use crate::nbd::request::RequestHeader;
use crate::nbd::wire::{CommandFlags, CommandKind, ErrorCode};
use crate::server::stop_request::StopRequest;
use std::sync::Arc;

const SIZE: u64 = 1 << 20;
const HOLE: u32 = 3;

struct Fixture {
    memory: MemoryBackend,
    slow: Arc<Slow>,
    disk: Disk,
}

/// A disk with a hole between its first and its last 4 KiB.
fn fixture() -> Fixture {
    let (memory, slow) = (MemoryBackend::new(SIZE), Arc::new(Slow::default()));
    for offset in [0, SIZE - 4096] {
        memory.write(offset, &[7; 4096], false).unwrap();
    }
    let disk = Disk::new(Box::new(SlowBackend::new(memory.clone(), Arc::clone(&slow))), false);
    slow.delay_extents();
    Fixture { memory, slow, disk }
}

fn request(kind: CommandKind, flags: CommandFlags, length: u64, cookie: u64) -> Vec<u8> {
    let (kind, flags) = (kind.number(), flags.bits());
    let mut bytes = Vec::new();
    RequestHeader { flags, kind, cookie, offset: 0, length }
        .encode(Dialect::Structured, &mut bytes);
    bytes
}

fn status(flags: CommandFlags, length: u64, cookie: u64) -> Vec<u8> {
    request(CommandKind::BlockStatus, flags, length, cookie)
}

/// Cookie and content of each reply in the send buffer.
fn replies(engine: &mut Engine<'_>) -> Vec<(u64, Chunk)> {
    engine.advance(StopRequest::Serve).unwrap();
    let bytes = engine.tx.take(usize::MAX);
    let (mut rest, mut all) = (&bytes[..], Vec::new());
    while let Some((header, used)) = ReplyHeader::decode(rest).unwrap() {
        let ReplyHeader::Chunk { cookie, kind, length, .. } = header else {
            panic!("a simple reply: {header:?}")
        };
        let (payload, after) = rest[used..].split_at(length as usize);
        let needed = Chunk::needed(kind, length) as usize;
        all.push((cookie, Chunk::decode(kind, length, &payload[..needed]).unwrap()));
        rest = after;
    }
    all
}

fn extents(list: &[StatusExtent]) -> Chunk {
    Chunk::Status { context: 1, extents: list.to_vec() }
}

#[test]
fn a_slow_block_status_does_not_delay_later_requests() {
    let Fixture { memory, slow, disk } = fixture();
    let requests = [
        status(CommandFlags::empty(), SIZE, 1),
        status(CommandFlags::REQ_ONE, SIZE, 2),
        status(CommandFlags::empty(), 0, 3),
        request(CommandKind::Read, CommandFlags::empty(), 512, 4),
    ];
    let mut engine = engine_with(&disk, Dialect::Structured, &requests.concat());
    assert_eq!(replies(&mut engine), [(3, Chunk::None), (4, Chunk::Data { offset: 0 })]);
    assert_eq!(slow.count(), 2);
    slow.complete(1, &memory);
    assert_eq!(replies(&mut engine), [(2, extents(&[(4096, 0)]))]);
    slow.complete(0, &memory);
    let all = extents(&[(4096, 0), (SIZE - 8192, HOLE), (4096, 0)]);
    assert_eq!(replies(&mut engine), [(1, all)]);
    assert!(engine.is_quiet());
}

#[test]
fn extents_in_memory_are_answered_at_once() {
    let memory = MemoryBackend::new(SIZE);
    let disk = Disk::new(Box::new(memory), false);
    let request = status(CommandFlags::empty(), SIZE, 1);
    let mut engine = engine_with(&disk, Dialect::Structured, &request);
    assert_eq!(replies(&mut engine), [(1, extents(&[(SIZE, HOLE)]))]);
}

#[test]
fn a_failed_block_status_is_an_error_reply() {
    let Fixture { memory, slow, disk } = fixture();
    let requests = [1, 2].map(|cookie| status(CommandFlags::REQ_ONE, SIZE, cookie)).concat();
    let mut engine = engine_with(&disk, Dialect::Structured, &requests);
    assert_eq!(replies(&mut engine), []);
    slow.fail(0, nix::libc::EIO);
    let failed = replies(&mut engine);
    let is_error = |chunk: &Chunk| matches!(chunk, Chunk::Error { code: ErrorCode::Io, .. });
    assert!(failed.len() == 1 && failed[0].0 == 1 && is_error(&failed[0].1), "{failed:?}");
    slow.complete(0, &memory);
    assert_eq!(replies(&mut engine), [(2, extents(&[(4096, 0)]))]);
}

#[test]
fn extents_in_flight_stay_within_the_budget() {
    let Fixture { memory, slow, disk } = fixture();
    let long = EXTENTS_MAX * size_of::<Extent>();
    let fitting = READ_BYTES_MAX / long;
    for (flags, most) in [(CommandFlags::empty(), fitting), (CommandFlags::REQ_ONE, IN_FLIGHT_MAX)]
    {
        let requests = (0..2 * most as u64).flat_map(|cookie| status(flags, SIZE, cookie));
        let mut engine = engine_with(&disk, Dialect::Structured, &requests.collect::<Vec<u8>>());
        for _ in 0..most {
            let blocked = engine.advance(StopRequest::Serve);
            assert!(matches!(blocked, Ok(Blocked::Completion)), "{blocked:?}");
            assert_eq!(slow.count(), most, "{flags:?}");
            slow.complete(0, &memory);
        }
        slow.complete_all(&memory);
        while !engine.rx.bytes().is_empty() {
            engine.advance(StopRequest::Serve).unwrap();
        }
        drop(engine);
        slow.block_all();
    }
}
