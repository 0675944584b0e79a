//! Overlapping changes of several sessions, and long zeroings, on a backend that completes its calls
//! when the test says so.

use super::super::dirty::BLOCK;
use super::super::memory_backend::{BackendCall, FailingBackend, Faults, MemoryBackend};
use super::super::op::Zeroing;
use super::super::part_sizes::PART_MIN;
use super::super::slow_backend::{Slow, SlowBackend, TestNotifier};
use super::super::{Backend, errno_of};
use super::*;
use nix::libc::{EIO, EOPNOTSUPP};
use proptest::prelude::*;
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

const SIZE: u64 = 64 << 20;

struct Fixture {
    disk: Disk,
    memory: MemoryBackend,
    faults: Arc<Faults>,
    slow: Arc<Slow>,
}

struct Session<'a> {
    in_flight: InFlight<'a, u32>,
    notifier: Arc<TestNotifier>,
}

fn fixture() -> Fixture {
    let (memory, faults) = (MemoryBackend::new(SIZE), Arc::new(Faults::default()));
    let slow = Arc::new(Slow::default());
    let image = FailingBackend::new(memory.clone(), Arc::clone(&faults));
    let disk = Disk::new(Box::new(SlowBackend::new(image, Arc::clone(&slow))), false);
    Fixture { disk, memory, faults, slow }
}

impl Fixture {
    fn session(&self) -> Session<'_> {
        let notifier = Arc::new(TestNotifier::default());
        Session {
            in_flight: InFlight::new(
                &self.disk,
                Arc::clone(&notifier) as Arc<dyn Notifier>,
                Instant::now,
            ),
            notifier,
        }
    }

    fn complete(&self, nth: usize) {
        self.slow.complete(nth, &**self.disk.image());
    }

    fn closes(&self) -> bool {
        self.disk.gate().close_and_drain(Instant::now()).is_ok()
    }
}

impl<'a> Session<'a> {
    fn begin(&mut self, disk: &'a Disk, op: Op, token: u32) {
        self.in_flight.begin(disk.enter(&|| true).unwrap(), op, token);
        self.in_flight.submit();
    }

    /// One turn of the session's loop.
    fn turn(&mut self) -> Option<(u32, Result<(), i32>)> {
        let completed = self.in_flight.next_completed();
        self.in_flight.submit();
        completed
            .map(|(token, outcome)| (token, outcome.map(drop).map_err(|error| errno_of(&error))))
    }
}

fn range(offset: u64, length: u64) -> Range {
    Range::within(SIZE, offset, length).unwrap()
}

fn zero(offset: u64, length: u64) -> Op {
    Op::Zero { range: range(offset, length), how: Zeroing::default(), durable: false }
}

fn write(offset: u64, byte: u8, length: usize) -> Op {
    Op::Write { offset, data: vec![byte; length].into(), durable: false }
}

#[test]
fn a_change_waits_for_an_overlapping_earlier_one() {
    let fixture = fixture();
    let (mut old, mut new) = (fixture.session(), fixture.session());
    old.begin(&fixture.disk, zero(0, 8192), 0);
    assert!(!new.in_flight.is_clear(range(4096, 1)));
    new.begin(&fixture.disk, write(4096, 7, 4096), 1);
    new.begin(&fixture.disk, write(8192, 7, 4096), 2);
    assert_eq!(new.turn(), Some((2, Ok(()))), "it overlaps nothing");
    assert!(new.turn().is_none() && new.in_flight.has_waiting());
    fixture.complete(0);
    let before = new.notifier.count();
    assert!(new.turn().is_none(), "the earlier completion has not been taken");
    assert_eq!(old.turn(), Some((0, Ok(()))));
    assert!(new.notifier.count() > before, "woken to go on");
    assert!(new.turn().is_none());
    assert_eq!(new.turn(), Some((1, Ok(()))));
    assert_eq!(fixture.memory.contents()[4095..4097], [0, 7]);
    assert!(new.in_flight.is_clear(range(0, SIZE)));
}

#[test]
fn waiting_changes_of_a_dropped_session_are_never_executed() {
    let fixture = fixture();
    let (mut old, mut new) = (fixture.session(), fixture.session());
    fixture.memory.write(0, &[1; 1 << 20], false).unwrap();
    for token in 0..24 {
        old.begin(&fixture.disk, zero(u64::from(token) * 4096, 4096), token);
    }
    let started = fixture.slow.count();
    assert!(started < 4, "{started} of 24 were started at once");
    new.begin(&fixture.disk, write(23 * 4096, 7, 4096), 0);
    new.begin(&fixture.disk, write(0, 7, 4096), 1);
    std::thread::scope(|scope| {
        let (slow, disk) = (&fixture.slow, &fixture.disk);
        scope.spawn(move || (0..started).for_each(|_| slow.complete(0, &**disk.image())));
        drop(old);
    });
    assert!(new.notifier.count() > 0 && new.turn().is_none());
    let ends = [new.turn(), new.turn()];
    assert!(ends.contains(&Some((0, Ok(())))) && ends.contains(&Some((1, Ok(())))));
    assert_eq!(fixture.faults.count(BackendCall::Zero), started as u64);
    let contents = fixture.memory.contents();
    assert!(contents[..4096] == [7; 4096] && contents[23 * 4096..][..4096] == [7; 4096]);
    assert!(contents[22 * 4096..23 * 4096] == [1; 4096], "dropped");
}

#[test]
fn a_gate_closes_between_two_parts() {
    for durable in [false, true] {
        let fixture = fixture();
        let mut session = fixture.session();
        let dirty = fixture.disk.track().unwrap();
        let how = Zeroing::default();
        let long = Op::Zero { range: range(512, SIZE - 512), how, durable };
        session.begin(&fixture.disk, long, 0);
        let first = fixture.slow.wait_for(1);
        assert!(!fixture.closes(), "a part is in flight");
        let closing = fixture.disk.gate().close_and_drain(Instant::now());
        assert!(closing.is_err());
        std::thread::scope(|scope| {
            let gate = fixture.disk.gate();
            let closing = scope.spawn(|| gate.close_and_drain(Instant::now() + PATIENCE));
            while gate.is_open() {
                std::thread::yield_now();
            }
            fixture.complete(0);
            assert!(session.turn().is_none());
            assert_eq!(closing.join().unwrap(), Ok(()), "{first:?}");
        });
        let marked = dirty.count();
        assert!(marked > 0 && marked * BLOCK < SIZE / 2, "completed parts are marked: {marked}");
        assert!(fixture.slow.count() == 0 && session.turn().is_none());
        assert!(!session.in_flight.is_clear(range(SIZE - 512, 512)), "the rest stays registered");
        let before = session.notifier.count();
        fixture.disk.gate().reopen();
        assert!(session.notifier.count() > before, "woken to go on");
        fixture.slow.complete_all(&**fixture.disk.image());
        let end = std::iter::from_fn(|| Some(session.turn())).take(1000).flatten().next();
        assert_eq!(end, Some((0, Ok(()))));
        assert_eq!(dirty.count() * BLOCK, SIZE);
        assert!(fixture.faults.count(BackendCall::Zero) > 2);
        assert_eq!(fixture.faults.count(BackendCall::Flush), u64::from(durable));
    }
}

#[test]
fn a_long_trim_ends_with_the_first_failed_part() {
    let fixture = fixture();
    let mut session = fixture.session();
    session.begin(&fixture.disk, Op::Trim { range: range(0, SIZE), durable: true }, 0);
    fixture.complete(0);
    assert!(session.turn().is_none());
    fixture.slow.fail(0, EIO);
    assert_eq!(session.turn(), Some((0, Err(EIO))));
    assert!(session.in_flight.is_clear(range(0, SIZE)) && fixture.closes());
}

#[test]
fn fast_zeroing_is_refused_by_its_first_part_only() {
    let fixture = fixture();
    let mut session = fixture.session();
    let how = Zeroing { only_if_fast: true, keep_allocated: false };
    let fast = |offset| Op::Zero { range: range(offset, SIZE / 2), how, durable: false };
    session.begin(&fixture.disk, fast(PART_MIN - 1), 0);
    let calls = fixture.slow.wait_for(1);
    assert!(calls[0].contains("only_if_fast: true"), "{calls:?}");
    fixture.slow.fail(0, EOPNOTSUPP);
    assert_eq!(session.turn(), Some((0, Err(EOPNOTSUPP))));
    session.begin(&fixture.disk, fast(0), 1);
    fixture.complete(0);
    session.turn();
    let calls = fixture.slow.wait_for(1);
    assert!(calls[0].contains("only_if_fast: false"), "the first part was fast: {calls:?}");
    fixture.slow.complete_all(&**fixture.disk.image());
}

#[test]
fn waiting_changes_never_start_on_a_retired_disk() {
    let fixture = fixture();
    let (mut old, mut new) = (fixture.session(), fixture.session());
    old.begin(&fixture.disk, zero(0, 4096), 0);
    new.begin(&fixture.disk, zero(0, 4096), 1);
    fixture.disk.gate().retire();
    fixture.complete(0);
    assert_eq!(old.turn(), Some((0, Ok(()))));
    assert!(new.turn().is_none() && fixture.slow.count() == 0, "never started");
    assert!(fixture.closes());
}

#[test]
fn a_session_is_notified_that_its_operations_never_start() {
    let fixture = fixture();
    let mut session = fixture.session();
    fixture.disk.gate().retire();
    let before = session.notifier.count();
    session.in_flight.begin_when_open(Op::Flush, 0);
    session.in_flight.submit();
    assert!(session.notifier.count() > before && session.in_flight.has_waiting());
}

const PATIENCE: Duration = Duration::from_secs(20);

/// One step of several sessions.
#[derive(Clone, Debug)]
enum Step {
    /// A session changes some blocks.
    Change {
        session: usize,
        block: u64,
        blocks: u64,
        kind: u8,
    },
    /// A call in flight completes.
    Complete(usize),
    /// A session loses its connection, and a new one takes its place.
    Reconnect(usize),
    CloseGate,
    OpenGate,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0..3usize, 0..12u64, 1..5u64, 0..4u8)
            .prop_map(|(session, block, blocks, kind)| Step::Change { session, block, blocks, kind }),
        6 => (0..6usize).prop_map(Step::Complete),
        1 => (0..3usize).prop_map(Step::Reconnect),
        1 => Just(Step::CloseGate),
        1 => Just(Step::OpenGate),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, failure_persistence: None, ..ProptestConfig::default() })]

    /// A block always holds the value of the last acknowledged change, unless a change that arrived
    /// later, or was unacknowledged when that one arrived, overwrote it.
    #[test]
    fn earlier_changes_never_undo_acknowledged_ones(
        steps in prop::collection::vec(step(), 1..60),
    ) {
        let fixture = fixture();
        let mut sessions: Vec<Session<'_>> = (0..3).map(|_| fixture.session()).collect();
        // The values that each block may have. A change adds its value when it is sent, and removes
        // the earlier values when it is acknowledged.
        let mut may_be: Vec<Vec<u32>> = vec![vec![0]; 16];
        let mut sent: BTreeMap<u32, (usize, u64, u64)> = BTreeMap::new();
        let (mut next, mut closed) = (1u32, false);
        let mut zeroes = BTreeSet::from([0]);
        let settle = |sessions: &mut Vec<Session<'_>>, may_be: &mut Vec<Vec<u32>>,
                      sent: &mut BTreeMap<u32, (usize, u64, u64)>| {
            for _ in 0..4 {
                for session in sessions.iter_mut() {
                    while let Some((token, outcome)) = session.turn() {
                        assert_eq!(outcome, Ok(()));
                        let Some((_, block, blocks)) = sent.remove(&token) else { continue };
                        for values in &mut may_be[block as usize..(block + blocks) as usize] {
                            values.retain(|value| *value >= token);
                        }
                    }
                }
            }
        };
        for step in steps {
            match step {
                Step::Change { session, block, blocks, kind } => {
                    let (offset, length) = (block * BLOCK, blocks * BLOCK);
                    let work = match kind {
                        0 => zero(offset, length),
                        1 => Op::Trim { range: range(offset, length), durable: false },
                        _ => Op::Write {
                            offset, durable: kind == 3,
                            data: next.to_le_bytes().repeat(length as usize / 4).into(),
                        },
                    };
                    let Ok(Some(visit)) = fixture.disk.enter_if_open() else { continue };
                    sessions[session].in_flight.begin(visit, work, next);
                    sessions[session].in_flight.submit();
                    for values in &mut may_be[block as usize..(block + blocks) as usize] {
                        values.push(next);
                    }
                    if kind < 2 {
                        zeroes.insert(next);
                    }
                    sent.insert(next, (session, block, blocks));
                    next += 1;
                }
                Step::Complete(nth) => {
                    let count = fixture.slow.count();
                    if count > 0 {
                        fixture.complete(nth % count);
                    }
                }
                Step::Reconnect(which) => {
                    let old = std::mem::replace(&mut sessions[which], fixture.session());
                    fixture.slow.complete_all(&**fixture.disk.image());
                    drop(old);
                    fixture.slow.block_all();
                    // Its unacknowledged changes may or may not have been executed.
                    sent.retain(|_, (session, ..)| *session != which);
                }
                Step::CloseGate if !closed => closed = fixture.closes(),
                Step::OpenGate if closed => {
                    fixture.disk.gate().reopen();
                    closed = false;
                }
                Step::CloseGate | Step::OpenGate => {}
            }
            settle(&mut sessions, &mut may_be, &mut sent);
        }
        if closed {
            fixture.disk.gate().reopen();
        }
        fixture.slow.complete_all(&**fixture.disk.image());
        for _ in 0..30 {
            settle(&mut sessions, &mut may_be, &mut sent);
        }
        prop_assert!(sent.is_empty(), "never completed: {:?}", sent);
        let mut contents = [0; 16 * BLOCK as usize];
        fixture.memory.read(0, &mut contents).unwrap();
        for (block, values) in may_be.iter().enumerate() {
            let found = &contents[block * BLOCK as usize..][..4];
            let found = u32::from_le_bytes(found.try_into().unwrap());
            let left = |value: &u32| if zeroes.contains(value) { 0 } else { *value };
            prop_assert!(values.iter().any(|value| left(value) == found), "{}: {}", block, found);
        }
    }
}
