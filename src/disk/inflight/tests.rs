//! Errands on an image that makes its calls when the test says so: what holds until they are over.

use super::super::dirty::BLOCK;
use super::super::memory::{FailingBackend, Faults, MemoryBackend, Op};
use super::super::slow::{Slow, SlowBackend, TestNotifier};
use super::super::{Backend, StillBusy, errno_of};
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
    fn errands(&self) -> InFlight<'_, u32> {
        InFlight::new(&self.disk, Arc::clone(&self.notifier) as Arc<dyn Notifier>)
    }

    fn begin<'a>(&'a self, errands: &mut InFlight<'a, u32>, work: Work, token: u32) {
        errands.begin(self.disk.enter(&|| true).unwrap(), work, token);
        errands.submit();
    }

    fn finish(&self, nth: usize) {
        self.slow.complete(nth, &*self.disk.image);
    }

    /// Waits until something holds.
    fn wait_until(&self, mut holds: impl FnMut() -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !holds() {
            assert!(Instant::now() < deadline, "it never comes true");
            std::thread::yield_now();
        }
    }

    /// The next errand that ends, and how.
    fn end_of(&self, errands: &mut InFlight<'_, u32>) -> (u32, Result<(), i32>) {
        let mut end = None;
        self.wait_until(|| {
            end = told(errands);
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

fn write(offset: u64, length: usize) -> Work {
    Work::Write { offset, data: vec![7; length], durable: true }
}

fn zero(offset: u64, length: u64) -> Work {
    Work::Zero { range: range(offset, length), how: Zeroing::default(), durable: true }
}

fn told(errands: &mut InFlight<'_, u32>) -> Option<(u32, Result<(), i32>)> {
    let (token, outcome) = errands.next_completed()?;
    Some((token, outcome.map_err(|error| errno_of(&error))))
}

#[test]
fn errands_end_in_whatever_order_their_calls_do() {
    let fixture = fixture();
    let mut errands = fixture.errands();
    for token in 0..3 {
        fixture.begin(&mut errands, Work::Prefetch(range(0, 512)), token);
    }
    assert!(told(&mut errands).is_none() && !errands.is_empty());
    for (nth, token) in [(1, 1), (1, 2), (0, 0)] {
        let rung = fixture.notifier.count();
        fixture.finish(nth);
        assert_eq!(fixture.notifier.count(), rung + 1);
        assert_eq!(told(&mut errands), Some((token, Ok(()))));
    }
    assert!(errands.is_empty());
}

#[test]
fn the_gate_cannot_be_closed_behind_an_errand() {
    let fixture = fixture();
    for work in [Work::Flush, write(0, 512), zero(0, 512), Work::Populate(range(0, 512))] {
        let mut errands = fixture.errands();
        fixture.begin(&mut errands, work.clone(), 0);
        while fixture.slow.count() > 0 {
            assert!(fixture.gate_is_busy(), "{work:?}");
            fixture.finish(0);
            assert!(fixture.gate_is_busy(), "{work:?}: it has not been heard of");
            if told(&mut errands).is_some() {
                break;
            }
            errands.submit();
        }
        assert!(!fixture.gate_is_busy(), "{work:?}");
    }
}

#[test]
fn what_changes_is_marked_after_the_bytes_are_there_and_before_anybody_is_told() {
    let fixture = fixture();
    let works = [write(0, 512), Work::Trim { range: range(0, 512), durable: false }, zero(0, 512)];
    for work in works {
        for fails in [false, true] {
            let mut errands = fixture.errands();
            fixture.begin(&mut errands, work.clone(), 0);
            let dirty = fixture.disk.track().unwrap();
            assert_eq!(dirty.count(), 0);
            if fails {
                fixture.slow.fail(0, ENOSPC);
                fixture.faults.fail_every(Op::Write, ENOSPC);
            } else {
                fixture.finish(0);
            }
            let outcome = told(&mut errands);
            assert_eq!(dirty.take_next(0, BLOCK), Some(range(0, BLOCK)), "{work:?}");
            assert_eq!(fails, outcome == Some((0, Err(ENOSPC))), "{work:?}");
            fixture.faults.heal();
            fixture.slow.complete_all(&*fixture.disk.image);
            drop(errands);
            fixture.slow.block_all();
        }
    }
}

#[test]
fn errands_that_are_dropped_are_waited_for_and_their_changes_marked() {
    let fixture = fixture();
    let dirty = fixture.disk.track().unwrap();
    let mut errands = fixture.errands();
    fixture.begin(&mut errands, write(0, 512), 0);
    fixture.begin(&mut errands, zero(BLOCK, BLOCK), 1);
    std::thread::scope(|scope| {
        let (disk, slow) = (&fixture.disk, &fixture.slow);
        let ending = scope.spawn(|| {
            slow.wait_for(2);
            assert_eq!(disk.gate().close_and_drain(Instant::now()).unwrap_err().visits, 2);
            slow.complete(1, &*disk.image);
            slow.complete(0, &*disk.image);
        });
        drop(errands);
        ending.join().unwrap();
    });
    assert!(!fixture.gate_is_busy());
    assert_eq!(dirty.count(), 2);
    assert_eq!(fixture.memory.contents()[..512], [7; 512]);
    assert_eq!(fixture.faults.count(Op::Flush), 0, "nothing is begun for nobody");
}

#[test]
fn the_gate_is_never_closed_behind_what_nobody_tells_the_end_of() {
    let fixture = fixture();
    let mut errands = fixture.errands();
    fixture.begin(&mut errands, write(0, 512), 0);
    fixture.slow.drop_completions();
    drop(errands);
    assert!(fixture.gate_is_busy());
    let mut others = fixture.errands();
    fixture.begin(&mut others, Work::Flush, 1);
    assert_eq!(told(&mut others), Some((1, Err(EIO))), "it may have been that one's failure");
}

#[test]
fn there_is_room_up_to_the_limits_and_not_beyond() {
    let fixture = fixture();
    let mut errands = fixture.errands();
    for _ in 0..IN_FLIGHT_MAX {
        assert!(errands.has_room(0));
        fixture.begin(&mut errands, Work::Flush, 0);
    }
    assert!(!errands.has_room(0));
    fixture.slow.complete_all(&*fixture.disk.image);
    while told(&mut errands).is_some() {}
    fixture.slow.block_all();

    assert!(errands.has_room(usize::MAX), "one alone may be of any size");
    fixture.begin(&mut errands, write(0, BYTES_MAX - 512), 0);
    assert!(errands.has_room(512) && !errands.has_room(513));
    fixture.finish(0);
    assert!(told(&mut errands).is_some() && errands.has_room(usize::MAX));
}

#[test]
fn two_changes_overlap_if_they_share_a_byte() {
    let fixture = fixture();
    let mut errands = fixture.errands();
    fixture.begin(&mut errands, Work::Populate(range(0, SIZE)), 0);
    fixture.begin(&mut errands, write(1000, 10), 1);
    for (offset, length, shares) in
        [(0, 1000, false), (0, 1001, true), (1009, 1, true), (1010, 9, false), (1005, 0, false)]
    {
        assert_eq!(!errands.is_clear(range(offset, length)), shares, "{length} at {offset}");
    }
    fixture.finish(1);
    assert!(told(&mut errands).is_some() && errands.is_clear(range(0, SIZE)));
    fixture.finish(0);
}

#[test]
fn calls_that_a_lane_declines_are_made_by_threads() {
    let fixture = fixture();
    let mut errands = fixture.errands();
    fixture.memory.write(0, &[1; 8192], false).unwrap();
    fixture.begin(&mut errands, zero(0, 8192), 0);
    fixture.slow.decline(0);
    assert!(told(&mut errands).is_none());
    fixture.wait_until(|| fixture.memory.allocated_blocks() == 0);
    fixture.wait_until(|| {
        assert!(told(&mut errands).is_none());
        errands.submit();
        fixture.slow.count() == 1
    });
    fixture.slow.decline(0);
    assert_eq!(fixture.end_of(&mut errands), (0, Ok(())));
    assert_eq!(fixture.faults.count(Op::Flush), 1);
}

#[test]
fn what_is_given_back_by_a_kernel_that_takes_nothing_is_heard_of() {
    let fixture = fixture();
    let mut errands = fixture.errands();
    fixture.slow.reject_submissions();
    fixture.begin(&mut errands, Work::Flush, 0);
    assert!(errands.has_completed() || fixture.notifier.count() > 0, "or nobody would look");
    assert_eq!(fixture.end_of(&mut errands), (0, Ok(())));
    assert_eq!(fixture.faults.count(Op::Flush), 1);
}

#[test]
fn what_is_to_be_durable_is_flushed_after_it_was_made_and_not_if_that_failed() {
    let fixture = fixture();
    let mut errands = fixture.errands();
    fixture.begin(&mut errands, zero(0, 512), 0);
    fixture.finish(0);
    assert!(told(&mut errands).is_none());
    errands.submit();
    assert_eq!(fixture.slow.wait_for(1), ["Flush"]);
    fixture.finish(0);
    assert_eq!(told(&mut errands), Some((0, Ok(()))));
    fixture.begin(&mut errands, zero(0, 512), 1);
    fixture.slow.fail(0, ENOSPC);
    assert_eq!(told(&mut errands), Some((1, Err(ENOSPC))));
    assert_eq!(fixture.slow.count(), 0);
}

#[test]
fn what_is_gathered_is_written_and_made_durable_by_one_flush() {
    let fixture = fixture();
    let mut errands = fixture.errands();
    let dirty = fixture.disk.track().unwrap();
    let visit = || fixture.disk.enter(&|| true).unwrap();
    for (token, work) in (0..).zip([write(0, 512), Work::Flush, write(BLOCK, 512)]) {
        errands.begin(visit(), work, token);
    }
    assert!(!errands.is_clear(range(0, 1)), "it is not written yet");
    assert_eq!((fixture.slow.count(), dirty.count()), (0, 0));
    errands.submit();
    assert_eq!(fixture.slow.wait_for(1), ["Flush"]);
    assert_eq!((dirty.count(), fixture.faults.count(Op::Write)), (2, 2));
    assert!(errands.is_clear(range(0, SIZE)), "what is written may be overwritten");
    assert!(fixture.gate_is_busy());
    fixture.slow.fail(0, EIO);
    let mut all: Vec<_> = std::iter::from_fn(|| told(&mut errands)).collect();
    all.sort_unstable();
    assert_eq!(all, [(0, Err(EIO)), (1, Err(EIO)), (2, Err(EIO))]);
    assert!(errands.is_empty() && !fixture.gate_is_busy());
}

#[test]
fn a_write_that_fails_among_others_fails_alone() {
    let fixture = fixture();
    let mut errands = fixture.errands();
    for token in 0..3 {
        let work = write(u64::from(token) * 512, 512);
        errands.begin(fixture.disk.enter(&|| true).unwrap(), work, token);
    }
    fixture.faults.fail_nth(2, ENOSPC);
    errands.submit();
    assert_eq!(told(&mut errands), Some((1, Err(ENOSPC))));
    fixture.finish(0);
    assert_eq!(told(&mut errands), Some((0, Ok(()))));
    assert_eq!(told(&mut errands), Some((2, Ok(()))));
}

#[test]
fn a_failed_flush_is_told_to_whoever_flushed_at_the_same_time() {
    for work in [Work::Flush, write(0, 512)] {
        let fixture = fixture();
        let (mut ours, mut theirs) = (fixture.errands(), fixture.errands());
        fixture.begin(&mut theirs, Work::Flush, 1);
        fixture.begin(&mut ours, work.clone(), 0);
        // The kernel says success to us, but only because it tells the failure to them.
        fixture.finish(1);
        assert!(told(&mut ours).is_none() && !ours.is_empty(), "{work:?}");
        assert!(fixture.gate_is_busy());
        fixture.slow.fail(0, EIO);
        assert_eq!(told(&mut theirs), Some((1, Err(EIO))));
        assert!(fixture.notifier.count() > 2, "{work:?}: told to look again");
        assert_eq!(told(&mut ours), Some((0, Err(EIO))), "{work:?}");
        fixture.begin(&mut ours, Work::Flush, 2);
        assert_eq!(told(&mut ours), Some((2, Err(EIO))), "the kernel is not asked again");
        assert!(!fixture.gate_is_busy());
    }
}

#[test]
fn nobody_waits_for_a_flush_that_began_after_theirs_had_ended() {
    let fixture = fixture();
    let (mut ours, mut theirs) = (fixture.errands(), fixture.errands());
    fixture.begin(&mut theirs, Work::Flush, 1);
    fixture.begin(&mut ours, Work::Flush, 0);
    fixture.finish(1);
    assert!(told(&mut ours).is_none());
    fixture.begin(&mut theirs, Work::Flush, 2);
    fixture.finish(0);
    assert_eq!(told(&mut theirs), None, "the second is under way");
    assert_eq!(told(&mut ours), Some((0, Ok(()))));
    fixture.finish(0);
    assert_eq!(told(&mut theirs), Some((2, Ok(()))));
    assert_eq!(told(&mut theirs), Some((1, Ok(()))));
}

#[test]
fn a_write_to_parts_of_blocks_that_are_not_in_memory_loads_them_first() {
    let fixture = fixture();
    let mut errands = fixture.errands();
    fixture.slow.evict_all();
    let visit = fixture.disk.enter(&|| true).unwrap();
    for (offset, length, edges) in [
        (4096, 4096, None),
        (4097, 10, Some((4096, 4096))),
        (4000, 4192, Some((0, 4096))),
        (4096, 4097, Some((8192, 4096))),
        (100, 9000, Some((0, 12_288))),
    ] {
        let expected = edges.map(|(offset, length)| range(offset, length));
        assert_eq!(visit.cold_edges(range(offset, length)), expected, "{length} at {offset}");
    }
    drop(visit);
    for durable in [false, true] {
        // Zeros at the beginning, in a hole: what is durable has to be flushed then.
        let mut data = vec![0; 9000];
        data[8999] = 5;
        fixture.begin(&mut errands, Work::Write { offset: 100, data, durable }, 0);
        let loads = fixture.slow.wait_for(1);
        assert!(loads[0].starts_with("Populate"), "{loads:?}");
        assert!(!fixture.memory.contents().contains(&5));
        fixture.finish(0);
        if durable {
            assert!(told(&mut errands).is_none());
            errands.submit();
            fixture.finish(0);
        }
        assert_eq!(told(&mut errands), Some((0, Ok(()))));
        assert_eq!(fixture.memory.contents()[9099], 5);
        assert_eq!(fixture.memory.allocated_blocks(), 1, "the zeros have filled a hole");
        fixture.memory.write(8192, &[0; 4096], false).unwrap();
        fixture.memory.trim(range(0, 16384)).unwrap();
        fixture.slow.evict_all();
    }
}
