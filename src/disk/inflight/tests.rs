//! Operations on a backend that completes its calls when the test says so: invariants meanwhile.

use super::super::dirty::BLOCK;
use super::super::memory_backend::{BackendCall, FailingBackend, Faults, MemoryBackend};
use super::super::op::Zeroing;
use super::super::slow_backend::{Slow, SlowBackend, TestNotifier};
use super::super::{Backend, Extent, StillBusy, errno_of};
use super::*;
use nix::libc::{EIO, ENOSPC};
use std::time::Instant;

const SIZE: u64 = 16 << 20;
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(20);

struct Fixture {
    disk: Disk,
    memory: MemoryBackend,
    faults: Arc<Faults>,
    slow: Arc<Slow>,
    notifier: Arc<TestNotifier>,
}

fn fixture() -> Fixture {
    let (memory, faults) = (MemoryBackend::new(SIZE), Arc::new(Faults::default()));
    let (slow, notifier) = (Arc::new(Slow::default()), Arc::default());
    let image = FailingBackend::new(memory.clone(), Arc::clone(&faults));
    let disk = Disk::new(Box::new(SlowBackend::new(image, Arc::clone(&slow))), false);
    Fixture { disk, memory, faults, slow, notifier }
}

impl Fixture {
    fn in_flight(&self) -> InFlight<'_, u32> {
        InFlight::new(&self.disk, Arc::clone(&self.notifier) as Arc<dyn Notifier>, Instant::now)
    }

    fn begin<'a>(&'a self, in_flight: &mut InFlight<'a, u32>, op: Op, token: u32) {
        in_flight.begin(self.disk.enter(&|| true).unwrap(), op, token);
        in_flight.submit();
    }

    fn complete(&self, nth: usize) {
        self.slow.complete(nth, &**self.disk.image());
    }

    fn wait_until(&self, mut holds: impl FnMut() -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !holds() {
            assert!(Instant::now() < deadline, "timed out");
            std::thread::yield_now();
        }
    }

    /// Waits for the next outcome.
    fn end_of(&self, in_flight: &mut InFlight<'_, u32>) -> (u32, Result<(), i32>) {
        let mut end = None;
        self.wait_until(|| {
            end = next_outcome(in_flight);
            end.is_some()
        });
        end.unwrap()
    }

    fn gate_is_busy(&self) -> bool {
        match self.disk.gate().close_and_drain(Instant::now()) {
            Ok(()) => {
                self.disk.gate().reopen();
                false
            }
            Err(StillBusy { .. }) => true,
        }
    }
}

fn range(offset: u64, length: u64) -> Range {
    Range::within(SIZE, offset, length).unwrap()
}

fn write(offset: u64, length: usize) -> Op {
    Op::Write { offset, data: vec![7; length].into(), durable: true }
}

fn read(offset: u64, length: u64) -> Op {
    Op::Read { offset, data: vec![0; length as usize].into() }
}

fn zero(offset: u64, length: u64) -> Op {
    Op::Zero { range: range(offset, length), how: Zeroing::default(), durable: true }
}

fn next_outcome(in_flight: &mut InFlight<'_, u32>) -> Option<(u32, Result<(), i32>)> {
    let (token, outcome) = in_flight.next_completed()?;
    Some((token, outcome.map(drop).map_err(|error| errno_of(&error))))
}

#[test]
fn operations_complete_in_the_order_of_their_calls() {
    let fixture = fixture();
    let mut in_flight = fixture.in_flight();
    for token in 0..3 {
        fixture.begin(&mut in_flight, Op::Cache(range(0, 512)), token);
    }
    assert!(next_outcome(&mut in_flight).is_none() && !in_flight.is_empty());
    for (nth, token) in [(1, 1), (1, 2), (0, 0)] {
        let before = fixture.notifier.count();
        fixture.complete(nth);
        assert_eq!(fixture.notifier.count(), before + 1);
        assert_eq!(next_outcome(&mut in_flight), Some((token, Ok(()))));
    }
    assert!(in_flight.is_empty());
}

#[test]
fn the_gate_does_not_close_before_an_operation_completes() {
    let fixture = fixture();
    for op in [|| Op::Flush, || write(0, 512), || zero(0, 512), || read(0, 512)] {
        let work = format!("{:?}", op());
        let mut in_flight = fixture.in_flight();
        fixture.begin(&mut in_flight, op(), 0);
        while fixture.slow.count() > 0 {
            assert!(fixture.gate_is_busy(), "{work}");
            fixture.complete(0);
            assert!(fixture.gate_is_busy(), "{work}: its completion has not been taken");
            if next_outcome(&mut in_flight).is_some() {
                break;
            }
            in_flight.submit();
        }
        assert!(!fixture.gate_is_busy(), "{work}");
    }
}

#[test]
fn changes_are_marked_after_writing_and_before_the_outcome() {
    let fixture = fixture();
    let trim = || Op::Trim { range: range(0, 512), durable: false };
    for op in [|| write(0, 512), trim, || zero(0, 512)] {
        let work = format!("{:?}", op());
        for fails in [false, true] {
            let mut in_flight = fixture.in_flight();
            fixture.begin(&mut in_flight, op(), 0);
            let dirty = fixture.disk.track().unwrap();
            assert_eq!(dirty.count(), 0);
            if fails {
                fixture.slow.fail(0, ENOSPC);
            } else {
                fixture.complete(0);
            }
            let mut outcome = next_outcome(&mut in_flight);
            if fails && outcome.is_none() {
                assert_eq!(dirty.count(), 0, "a durable write executes again");
                in_flight.submit();
                fixture.slow.fail(0, ENOSPC);
                outcome = next_outcome(&mut in_flight);
            }
            assert_eq!(dirty.take_next(0, BLOCK), Some(range(0, BLOCK)), "{work}");
            assert_eq!(fails, outcome == Some((0, Err(ENOSPC))), "{work}");
            fixture.slow.complete_all(&**fixture.disk.image());
            drop(in_flight);
            fixture.slow.block_all();
        }
    }
}

#[test]
fn dropping_waits_for_operations_and_marks_their_changes() {
    let fixture = fixture();
    let dirty = fixture.disk.track().unwrap();
    let mut in_flight = fixture.in_flight();
    fixture.begin(&mut in_flight, write(0, 512), 0);
    fixture.begin(&mut in_flight, zero(BLOCK, BLOCK), 1);
    std::thread::scope(|scope| {
        let (disk, slow) = (&fixture.disk, &fixture.slow);
        let ending = scope.spawn(|| {
            slow.wait_for(2);
            assert_eq!(disk.gate().close_and_drain(Instant::now()).unwrap_err().visits, 2);
            slow.complete(1, &**disk.image());
            slow.complete(0, &**disk.image());
        });
        drop(in_flight);
        ending.join().unwrap();
    });
    assert!(!fixture.gate_is_busy());
    assert_eq!(dirty.count(), 2);
    assert_eq!(fixture.memory.contents()[..512], [7; 512]);
    assert_eq!(
        fixture.faults.count(BackendCall::Flush),
        0,
        "nothing is started for a dropped session"
    );
}

#[test]
fn a_lost_completion_blocks_the_gate_and_fails_flushes() {
    let fixture = fixture();
    let mut in_flight = fixture.in_flight();
    fixture.begin(&mut in_flight, write(0, 512), 0);
    fixture.slow.drop_completions();
    drop(in_flight);
    assert!(fixture.gate_is_busy());
    let mut others = fixture.in_flight();
    fixture.begin(&mut others, Op::Flush, 1);
    assert_eq!(next_outcome(&mut others), Some((1, Err(EIO))), "the lost flush may have failed");
}

#[test]
fn there_is_room_up_to_the_limits() {
    let fixture = fixture();
    let mut in_flight = fixture.in_flight();
    for _ in 0..IN_FLIGHT_MAX {
        assert!(in_flight.has_room(0));
        fixture.begin(&mut in_flight, Op::Flush, 0);
    }
    assert!(!in_flight.has_room(0));
    fixture.slow.complete_all(&**fixture.disk.image());
    while next_outcome(&mut in_flight).is_some() {}
    fixture.slow.block_all();

    assert!(in_flight.has_room(usize::MAX), "a single operation may be of any size");
    fixture.begin(&mut in_flight, write(0, BYTES_MAX - 512), 0);
    assert!(in_flight.has_room(512) && !in_flight.has_room(513));
    fixture.complete(0);
    assert!(next_outcome(&mut in_flight).is_some() && in_flight.has_room(usize::MAX));

    assert!(in_flight.has_room_to_read(usize::MAX), "a single read may be of any length");
    let length = READ_BYTES_MAX - 512;
    fixture.begin(&mut in_flight, read(0, length as u64), 0);
    assert!(in_flight.has_room_to_read(512) && !in_flight.has_room_to_read(513));
    assert!(in_flight.has_room(BYTES_MAX), "reads take no room from writes");
    fixture.complete(0);
    assert!(next_outcome(&mut in_flight).is_some() && in_flight.has_room_to_read(usize::MAX));
}

#[test]
fn two_changes_overlap_if_they_share_a_byte() {
    let fixture = fixture();
    let mut in_flight = fixture.in_flight();
    fixture.begin(&mut in_flight, read(0, SIZE), 0);
    fixture.begin(&mut in_flight, write(1000, 10), 1);
    for (offset, length, shares) in
        [(0, 1000, false), (0, 1001, true), (1009, 1, true), (1010, 9, false), (1005, 0, false)]
    {
        assert_eq!(!in_flight.is_clear(range(offset, length)), shares, "{length} at {offset}");
    }
    fixture.complete(1);
    assert!(next_outcome(&mut in_flight).is_some() && in_flight.is_clear(range(0, SIZE)));
    fixture.complete(0);
}

#[test]
fn threads_execute_calls_that_the_queue_declines() {
    let fixture = fixture();
    let mut in_flight = fixture.in_flight();
    fixture.memory.write(0, &[1; 8192], false).unwrap();
    fixture.begin(&mut in_flight, zero(0, 8192), 0);
    fixture.slow.decline(0);
    assert!(next_outcome(&mut in_flight).is_none());
    fixture.wait_until(|| fixture.memory.allocated_blocks() == 0);
    fixture.wait_until(|| {
        assert!(next_outcome(&mut in_flight).is_none());
        in_flight.submit();
        fixture.slow.count() == 1
    });
    fixture.slow.decline(0);
    assert_eq!(fixture.end_of(&mut in_flight), (0, Ok(())));
    assert_eq!(fixture.faults.count(BackendCall::Flush), 1);
}

#[test]
fn declined_extents_are_found_by_a_thread() {
    let fixture = fixture();
    let mut in_flight = fixture.in_flight();
    fixture.memory.write(4096, &[1; 4096], false).unwrap();
    let (range, limit) = (range(512, 8192), 2);
    fixture.begin(&mut in_flight, Op::Extents { range, limit, found: Vec::new() }, 7);
    assert!(fixture.gate_is_busy());
    fixture.slow.decline(0);
    let mut end = None;
    fixture.wait_until(|| {
        end = in_flight.next_completed();
        end.is_some()
    });
    let (token, outcome) = end.unwrap();
    let part = |start, end, allocated| Extent { range: range.from(start).until(end), allocated };
    let found = vec![part(512, 4096, false), part(4096, 8192, true)];
    assert_eq!((token, outcome.unwrap()), (7, Returned::Extents(found)));
    assert!(in_flight.is_empty() && !fixture.gate_is_busy());
}

#[test]
fn rejected_submissions_are_noticed_and_executed_by_threads() {
    let fixture = fixture();
    let mut in_flight = fixture.in_flight();
    fixture.slow.reject_submissions();
    fixture.begin(&mut in_flight, Op::Flush, 0);
    assert!(in_flight.has_completed() || fixture.notifier.count() > 0, "the session must wake");
    assert_eq!(fixture.end_of(&mut in_flight), (0, Ok(())));
    assert_eq!(fixture.faults.count(BackendCall::Flush), 1);
}

#[test]
fn a_durable_change_flushes_after_it_succeeded_only() {
    let fixture = fixture();
    let mut in_flight = fixture.in_flight();
    fixture.begin(&mut in_flight, zero(0, 512), 0);
    fixture.complete(0);
    assert!(next_outcome(&mut in_flight).is_none());
    in_flight.submit();
    assert_eq!(fixture.slow.wait_for(1), ["Flush"]);
    fixture.complete(0);
    assert_eq!(next_outcome(&mut in_flight), Some((0, Ok(()))));
    fixture.begin(&mut in_flight, zero(0, 512), 1);
    fixture.slow.fail(0, ENOSPC);
    assert_eq!(next_outcome(&mut in_flight), Some((1, Err(ENOSPC))));
    assert_eq!(fixture.slow.count(), 0);
}

#[test]
fn batched_durable_operations_share_one_flush() {
    let fixture = fixture();
    let mut in_flight = fixture.in_flight();
    let dirty = fixture.disk.track().unwrap();
    let visit = || fixture.disk.enter(&|| true).unwrap();
    for (token, work) in (0..).zip([write(0, 512), Op::Flush, write(BLOCK, 512)]) {
        in_flight.begin(visit(), work, token);
    }
    assert!(!in_flight.is_clear(range(0, 1)), "it is not written yet");
    assert_eq!((fixture.slow.count(), dirty.count()), (0, 0));
    in_flight.submit();
    assert_eq!(fixture.slow.wait_for(1), ["Flush"]);
    assert_eq!((dirty.count(), fixture.faults.count(BackendCall::Write)), (2, 2));
    assert!(in_flight.is_clear(range(0, SIZE)), "written bytes may be overwritten");
    assert!(fixture.gate_is_busy());
    fixture.slow.fail(0, EIO);
    let mut all: Vec<_> = std::iter::from_fn(|| next_outcome(&mut in_flight)).collect();
    all.sort_unstable();
    assert_eq!(all, [(0, Err(EIO)), (1, Err(EIO)), (2, Err(EIO))]);
    assert!(in_flight.is_empty() && !fixture.gate_is_busy());
}

#[test]
fn a_failed_write_in_a_batch_fails_alone() {
    let fixture = fixture();
    let mut in_flight = fixture.in_flight();
    for token in 0..3 {
        let op = write(u64::from(token) * 512, 512);
        in_flight.begin(fixture.disk.enter(&|| true).unwrap(), op, token);
    }
    fixture.faults.fail_nth(2, ENOSPC);
    in_flight.submit();
    assert_eq!(next_outcome(&mut in_flight), Some((1, Err(ENOSPC))));
    fixture.complete(0);
    assert_eq!(next_outcome(&mut in_flight), Some((0, Ok(()))));
    assert_eq!(next_outcome(&mut in_flight), Some((2, Ok(()))));
}

#[test]
fn a_failed_flush_fails_concurrent_flushes() {
    for op in [|| Op::Flush, || write(0, 512)] {
        let (fixture, work) = (fixture(), format!("{:?}", op()));
        let (mut ours, mut theirs) = (fixture.in_flight(), fixture.in_flight());
        fixture.begin(&mut theirs, Op::Flush, 1);
        fixture.begin(&mut ours, op(), 0);
        // Our fsync succeeds, but only because the kernel reports the failure to theirs.
        fixture.complete(1);
        assert!(next_outcome(&mut ours).is_none() && !ours.is_empty(), "{work}");
        assert!(fixture.gate_is_busy());
        fixture.slow.fail(0, EIO);
        assert_eq!(next_outcome(&mut theirs), Some((1, Err(EIO))));
        assert!(fixture.notifier.count() > 2, "{work}: woken to check again");
        assert_eq!(next_outcome(&mut ours), Some((0, Err(EIO))), "{work}");
        fixture.begin(&mut ours, Op::Flush, 2);
        assert_eq!(next_outcome(&mut ours), Some((2, Err(EIO))), "the kernel is not asked again");
        assert!(!fixture.gate_is_busy());
    }
}

#[test]
fn a_flush_does_not_wait_for_later_flushes() {
    let fixture = fixture();
    let (mut ours, mut theirs) = (fixture.in_flight(), fixture.in_flight());
    fixture.begin(&mut theirs, Op::Flush, 1);
    fixture.begin(&mut ours, Op::Flush, 0);
    fixture.complete(1);
    assert!(next_outcome(&mut ours).is_none());
    fixture.begin(&mut theirs, Op::Flush, 2);
    fixture.complete(0);
    assert_eq!(next_outcome(&mut theirs), None, "the second is in flight");
    assert_eq!(next_outcome(&mut ours), Some((0, Ok(()))));
    fixture.complete(0);
    assert_eq!(next_outcome(&mut theirs), Some((2, Ok(()))));
    assert_eq!(next_outcome(&mut theirs), Some((1, Ok(()))));
}

#[test]
fn a_write_reads_its_cold_edges_first() {
    let fixture = fixture();
    let mut in_flight = fixture.in_flight();
    fixture.slow.evict_all();
    let visit = fixture.disk.enter(&|| true).unwrap();
    let cases: [(u64, u64, &[u64]); 6] = [
        (4096, 4096, &[]),
        (4097, 10, &[4096]),
        (4096, 10, &[4096]),
        (4000, 4192, &[0]),
        (4096, 4097, &[8192]),
        (100, 9000, &[0, 8192]),
    ];
    for (offset, length, edges) in cases {
        let written = range(offset, length);
        let found: Vec<_> = fixture.disk.cold_edges(written).collect();
        let expected: Vec<_> = edges.iter().map(|at| range(*at, 4096)).collect();
        assert_eq!(found, expected, "{length} at {offset}");
        assert_eq!(visit.write_would_wait(written), !edges.is_empty());
    }
    drop(visit);
    for durable in [false, true] {
        // Zeros at the beginning, in a hole, so a durable write has to flush.
        let mut data = vec![0; 9000];
        data[8999] = 5;
        fixture.begin(&mut in_flight, Op::Write { offset: 100, data: data.into(), durable }, 0);
        for _ in 0..2 {
            let loads = fixture.slow.wait_for(1);
            assert!(loads[0].starts_with("Read"), "{loads:?}");
            assert!(!fixture.memory.contents().contains(&5));
            fixture.complete(0);
            let outcome = next_outcome(&mut in_flight);
            if let Some(outcome) = outcome {
                assert!(!durable && outcome == (0, Ok(())));
            }
            in_flight.submit();
        }
        if durable {
            fixture.complete(0);
            assert_eq!(next_outcome(&mut in_flight), Some((0, Ok(()))));
        }
        assert!(in_flight.is_empty());
        assert_eq!(fixture.memory.contents()[9099], 5);
        assert_eq!(fixture.memory.allocated_blocks(), 1, "the zeros filled a hole");
        fixture.memory.write(8192, &[0; 4096], false).unwrap();
        fixture.memory.execute(&Op::Trim { range: range(0, 16384), durable: false }).unwrap();
        fixture.slow.evict_all();
    }
}

#[test]
fn the_queue_of_an_exchanged_backend_is_not_used_again() {
    let fixture = fixture();
    let mut in_flight = fixture.in_flight();
    fixture.begin(&mut in_flight, write(0, 512), 0);
    assert_eq!(fixture.slow.count(), 1);
    fixture.complete(0);
    assert_eq!(next_outcome(&mut in_flight), Some((0, Ok(()))));
    let (memory, slow) = (MemoryBackend::new(SIZE), Arc::new(Slow::default()));
    let other = SlowBackend::new(memory.clone(), Arc::clone(&slow));
    fixture.disk.gate().close_and_drain(Instant::now()).unwrap();
    fixture.disk.exchange(Box::new(other)).unwrap();
    fixture.disk.gate().reopen();
    fixture.begin(&mut in_flight, write(0, 512), 1);
    assert_eq!((fixture.slow.count(), slow.count()), (0, 1));
    slow.complete(0, &memory);
    assert_eq!(next_outcome(&mut in_flight), Some((1, Ok(()))));
    assert_eq!(memory.contents()[..512], [7; 512]);
}

#[test]
fn spare_buffers_are_freed_while_nothing_is_in_flight() {
    let fixture = fixture();
    let mut in_flight = fixture.in_flight();
    drop(Buffer::to_fill(1 << 20, 4096).unwrap());
    assert!(!in_flight.is_shrunk());
    in_flight.shrink();
    assert!(in_flight.is_shrunk());
}
