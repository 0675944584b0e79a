//! The engine without a socket, on a clock that the test sets.

use super::*;
use crate::disk::Backend;
use crate::disk::inflight::READ_BYTES_MAX;
use crate::disk::memory_backend::MemoryBackend;
use crate::disk::slow_backend::{Slow, SlowBackend, TestNotifier};
use crate::nbd::reply::Dialect;
use crate::nbd::wire::TransmissionFlags;
use crate::net::Stream;
use crate::server::export_policy::AllowAll;
use crate::server::payload_memory::{BUFFERS_MAX, OWN_MEMORY, PayloadMemory};
use crate::server::session::disk_io::{LOAD_MAX, PIECE};
use crate::server::session::engine::block_status::EXTENTS_MAX;
use crate::server::session::rx::CAPACITY;
use crate::server::session::tx::{BUFFER_UNIT, DEFERRED_MAX, OVERFULL};
use crate::server::test_support::TIMEOUT;
use std::cell::Cell;
use std::os::unix::net::UnixStream;
use std::thread;

const SIZE: u64 = 2 << 20;
const DELAY: Duration = Duration::from_millis(50);

thread_local! {
    static BEGAN: Instant = Instant::now();
    /// Time since then.
    static ELAPSED: Cell<Duration> = const { Cell::new(Duration::ZERO) };
}

fn advance_clock(by: Duration) {
    ELAPSED.set(ELAPSED.get() + by);
}

fn clocks() -> Clocks {
    Clocks { now: || BEGAN.with(|began| *began + ELAPSED.get()), coarse: || ELAPSED.get() }
}

fn engine<'a>(disk: &'a Disk, requests: &[u8]) -> Engine<'a> {
    engine_with(disk, Dialect::Simple, requests)
}

/// An engine that has received these requests. With structured replies it answers BLOCK_STATUS.
pub(super) fn engine_with<'a>(disk: &'a Disk, dialect: Dialect, requests: &[u8]) -> Engine<'a> {
    engine_within(&PayloadMemory::new(1 << 30), disk, dialect, requests)
}

/// The same, with this memory for payloads.
fn engine_within<'a>(
    payloads: &Arc<PayloadMemory>,
    disk: &'a Disk,
    dialect: Dialect,
    requests: &[u8],
) -> Engine<'a> {
    let terms = Terms {
        size: disk.size(),
        flags: TransmissionFlags::all().difference(TransmissionFlags::READ_ONLY),
        dialect,
        allocation_selected: dialect != Dialect::Simple,
        private: false,
        payload_length_max: SIZE as u32,
        reads_beyond_end_are_no_space: false,
    };
    let context = EngineContext {
        disk,
        policy: &AllowAll,
        notifier: Arc::new(TestNotifier::default()),
        memory: SessionMemory::new(payloads),
        terms,
        answers_malformed: false,
        client: (String::new(), 1),
        clocks: clocks(),
    };
    let rx = Rx::restore(requests).unwrap();
    Engine::new(context, rx, Tx::default(), PendingRequests::default())
}

fn request(kind: CommandKind, length: u64, cookie: u64) -> Vec<u8> {
    let header = RequestHeader { flags: 0, kind: kind.number(), cookie, offset: 0, length };
    let mut bytes = Vec::new();
    header.encode(Dialect::Simple, &mut bytes);
    bytes
}

fn pair() -> (Stream, Stream) {
    UnixStream::pair().map(|(a, b)| (Stream::Unix(a), Stream::Unix(b))).unwrap()
}

#[test]
fn a_throttled_write_is_delayed_only_once() {
    let disk = Disk::new(Box::new(MemoryBackend::new(SIZE)), false);
    let write = [request(CommandKind::Write, 512, 1), vec![7; 512]].concat();
    let mut engine = engine(&disk, &write);
    disk.set_write_delay(DELAY);
    advance_clock(2 * DELAY);
    let throttled = engine.advance(StopRequest::Serve);
    assert!(matches!(throttled, Ok(Blocked::Throttle(_))), "{throttled:?}");
    engine.on_wait(true);
    advance_clock(DELAY);
    let checked = engine.advance(StopRequest::Serve);
    assert!(matches!(checked, Ok(Blocked::PeerCheck)), "{checked:?}");
    // The check takes a moment, which is no reason to delay the write again.
    advance_clock(Duration::from_millis(1));
    let written = engine.advance(StopRequest::Serve);
    assert!(matches!(written, Ok(Blocked::Input)), "{written:?}");
    assert!(engine.tx.has_bytes());
}

#[test]
fn a_session_finishes_at_a_closed_gate_after_its_last_reply() {
    let (memory, slow) = (MemoryBackend::new(SIZE), Arc::new(Slow::default()));
    let disk = Disk::new(Box::new(SlowBackend::new(memory.clone(), Arc::clone(&slow))), false);
    let flush = |cookie| request(CommandKind::Flush, 0, cookie);
    let mut engine = engine(&disk, &flush(1));
    assert!(matches!(engine.advance(StopRequest::Serve), Ok(Blocked::Input)));
    let (client, stream) = pair();
    thread::scope(|scope| {
        let closing = scope.spawn(|| disk.gate().close_and_drain(Instant::now() + TIMEOUT));
        while disk.gate().is_open() {
            thread::yield_now();
        }
        client.send_all(&flush(2), TIMEOUT).unwrap();
        assert_eq!(engine.rx.receive(&stream).unwrap(), flush(2).len());
        slow.complete(0, &memory);
        let finishing = engine.advance(StopRequest::Finish);
        assert!(matches!(finishing, Ok(Blocked::Output)), "{finishing:?}");
        closing.join().unwrap().unwrap();
    });
    assert!(engine.tx.send(&stream).unwrap());
    let end = engine.advance(StopRequest::Finish);
    assert!(matches!(end, Err(SessionEnd::Requested(StopRequest::Finish))), "{end:?}");
}

/// Sends a read of the whole disk whose pages are dropped again and again; returns how often data had to
/// be loaded.
fn loads_of_an_announced_read(is_cold_at_first: bool, pins: bool) -> usize {
    let (memory, slow) = (MemoryBackend::new(SIZE), Arc::new(Slow::default()));
    let contents: Vec<u8> = (0..SIZE).map(|at| (at / 4096) as u8).collect();
    memory.write(0, &contents, false).unwrap();
    let disk = Disk::new(Box::new(SlowBackend::new(memory.clone(), Arc::clone(&slow))), false);
    let requests =
        [request(CommandKind::Read, SIZE, 1), request(CommandKind::Read, 512, 2)].concat();
    let mut engine = engine(&disk, &requests);
    let (client, stream) = pair();
    client.set_nonblocking().unwrap();
    stream.set_nonblocking().unwrap();
    if pins {
        slow.allow_pinning();
    }
    if !is_cold_at_first {
        engine.advance(StopRequest::Serve).unwrap();
    }
    let (mut received, mut loads) = (Vec::new(), 0);
    while received.len() < 2 * 16 + SIZE as usize + 512 {
        slow.evict_all();
        engine.advance(StopRequest::Serve).unwrap();
        engine.tx.send(&stream).unwrap();
        while slow.count() > 0 {
            assert!(!engine.has_reads(), "the driver must not advance before a completion");
            slow.complete(0, &memory);
            loads += 1;
        }
        let mut bytes = [0; 1 << 16];
        while let Ok(count) = client.try_recv(&mut bytes) {
            received.extend_from_slice(&bytes[..count]);
        }
    }
    let long_is_first = received[8..16] == 1_u64.to_be_bytes();
    let first_length = if long_is_first { SIZE as usize } else { 512 };
    let (first, second) = received.split_at(16 + first_length);
    assert!(first[16..] == contents[..first_length]);
    assert!(second[16..] == contents[..second.len() - 16]);
    loads
}

#[test]
fn cold_data_of_an_announced_read_is_loaded_in_flight() {
    for pins in [false, true] {
        let while_sent = loads_of_an_announced_read(false, pins);
        let tried_and_sent = loads_of_an_announced_read(true, pins);
        assert!(while_sent > 1 && tried_and_sent > while_sent, "{while_sent} {tried_and_sent}");
    }
}

#[test]
fn requests_begin_while_a_read_waits_for_room_in_flight() {
    let (memory, slow) = (MemoryBackend::new(SIZE), Arc::new(Slow::default()));
    let disk = Disk::new(Box::new(SlowBackend::new(memory.clone(), Arc::clone(&slow))), false);
    slow.evict_all();
    const READ: u64 = 1 << 20;
    let fitting = (READ_BYTES_MAX / READ as usize) as u64;
    let read = |cookie| request(CommandKind::Read, READ, cookie);
    let reads = (0..=fitting).flat_map(read);
    let write = [request(CommandKind::Write, 4096, 99), vec![7; 4096]].concat();
    let mut engine = engine(&disk, &reads.chain(write).collect::<Vec<u8>>());
    let blocked = engine.advance(StopRequest::Serve);
    assert!(matches!(blocked, Ok(Blocked::Input)), "{blocked:?}");
    assert_eq!((slow.count() as u64, engine.tx.unsent()), (fitting, 16), "the write is answered");
    engine.on_end_of_stream();
    // The driver must not advance again before a load completes.
    let blocked = engine.advance(StopRequest::Serve);
    assert!(matches!(blocked, Ok(Blocked::End)) && !engine.has_reads(), "{blocked:?}");
    assert!(engine.take_end().is_none());
    let (client, stream) = pair();
    client.set_nonblocking().unwrap();
    stream.set_nonblocking().unwrap();
    let mut received = 0;
    while engine.take_end().is_none() {
        slow.complete_all(&memory);
        engine.advance(StopRequest::Serve).unwrap();
        engine.tx.send(&stream).unwrap();
        while let Ok(count) = client.try_recv(&mut [0; 1 << 16]) {
            received += count;
        }
    }
    assert_eq!(received as u64, 16 + (fitting + 1) * (16 + READ));
}

#[test]
fn deferred_replies_wait_for_a_loading_read_without_a_busy_loop() {
    let (memory, slow) = (MemoryBackend::new(SIZE), Arc::new(Slow::default()));
    let disk = Disk::new(Box::new(SlowBackend::new(memory.clone(), Arc::clone(&slow))), false);
    // Beyond the end, so that each is answered at once.
    let refused = (0..5000).flat_map(|cookie| request(CommandKind::Trim, 2 * SIZE, cookie));
    let requests = [request(CommandKind::Read, SIZE, 1), refused.collect()].concat();
    let mut engine = engine(&disk, &requests);
    while slow.count() == 0 {
        engine.advance(StopRequest::Serve).unwrap();
        slow.evict_all();
        engine.tx.take(usize::MAX);
    }
    for _ in 0..3 {
        let blocked = engine.advance(StopRequest::Serve);
        assert!(matches!(blocked, Ok(Blocked::Completion)), "{blocked:?}");
        assert!(!engine.tx.has_bytes());
    }
    slow.complete_all(&memory);
}

/// How many of these reads are in flight at once, with this memory beyond that of the session.
fn reads_in_flight(shared: u64) -> (usize, usize) {
    const READS: usize = 4;
    const READ: u64 = 64 << 10;
    let (memory, slow) = (MemoryBackend::new(SIZE), Arc::new(Slow::default()));
    let disk = Disk::new(Box::new(SlowBackend::new(memory.clone(), Arc::clone(&slow))), false);
    slow.evict_all();
    let payloads = PayloadMemory::new(shared);
    let reads: Vec<u8> =
        (0..READS as u64).flat_map(|cookie| request(CommandKind::Read, READ, cookie)).collect();
    let mut engine = engine_within(&payloads, &disk, Dialect::Simple, &reads);
    engine.advance(StopRequest::Serve).unwrap();
    let (at_once, mut most) = (slow.count(), 0);
    let (client, stream) = pair();
    client.set_nonblocking().unwrap();
    let mut received = 0;
    while received < READS * (16 + READ as usize) {
        most = most.max(slow.count());
        slow.complete_all(&memory);
        engine.advance(StopRequest::Serve).unwrap();
        engine.tx.send(&stream).unwrap();
        while let Ok(count) = client.try_recv(&mut [0; 1 << 16]) {
            received += count;
        }
    }
    engine.shrink();
    assert_eq!(payloads.used(), 0);
    (at_once, most)
}

#[test]
fn a_session_without_shared_memory_reads_one_at_a_time() {
    assert_eq!(reads_in_flight(0), (1, 1));
    assert_eq!(reads_in_flight(1 << 30), (4, 4));
}

#[test]
fn buffers_and_a_request_each_way_fit_in_a_sessions_memory() {
    let longest_status = (EXTENTS_MAX * 16) as u64 + 64;
    let unsent = OVERFULL as u64 + longest_status;
    let deferred = DEFERRED_MAX as u64 + longest_status;
    let sent = unsent.next_multiple_of(BUFFER_UNIT as u64);
    assert!(CAPACITY as u64 + sent + deferred <= BUFFERS_MAX);
    assert!(OWN_MEMORY - BUFFERS_MAX >= PIECE + LOAD_MAX as u64 + 2 * 4096);
}
