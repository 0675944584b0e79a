//! A disk in memory with injected faults: errors returned, and errors remembered.

use super::inflight::InFlight;
use super::memory_backend::{
    BackendCall, FailingBackend, Faults, Featured, InMemory, MemoryBackend,
};
use super::slow_backend::TestNotifier;
use super::*;
use crate::range::Range;
use nix::libc::{EINVAL, EIO, ENOSPC, EPERM};
use std::io;
use std::sync::Arc;
use std::time::Instant;

const SIZE: u64 = 64 * 1024;

fn disk(read_only: bool) -> (Disk, MemoryBackend, Arc<Faults>) {
    let (memory, faults) = (MemoryBackend::new(SIZE), Arc::new(Faults::default()));
    let image = FailingBackend::new(memory.clone(), faults.clone());
    (Disk::new(Box::new(image), read_only), memory, faults)
}

fn visit(disk: &Disk) -> Visit<'_> {
    disk.enter(&|| true).unwrap()
}

fn range(offset: u64, length: u64) -> Range {
    Range::within(2 * SIZE, offset, length).unwrap()
}

fn errno<T: std::fmt::Debug>(result: io::Result<T>) -> i32 {
    errno_of(&result.unwrap_err())
}

/// Runs one operation to its completion, as on a backend without an I/O queue.
pub(super) fn run(disk: &Disk, op: Op) -> io::Result<()> {
    run_returning(disk, op).map(drop)
}

/// As [`run`]; returns what the operation does.
pub(super) fn run_returning(disk: &Disk, op: Op) -> io::Result<Returned> {
    let mut in_flight = InFlight::new(disk, Arc::new(TestNotifier::default()), Instant::now);
    in_flight.begin(visit(disk), op, ());
    loop {
        in_flight.submit();
        if let Some(((), outcome)) = in_flight.next_completed() {
            return outcome;
        }
        std::thread::yield_now();
    }
}

fn write(offset: u64, data: &[u8], durable: bool) -> Op {
    Op::Write { offset, data: data.to_vec().into(), durable }
}

fn read(range: Range) -> Op {
    Op::Read { offset: range.offset(), data: vec![0; range.length() as usize].into() }
}

fn extents(range: Range) -> Op {
    Op::Extents { range, limit: 9, found: Vec::new() }
}

fn zero(range: Range, durable: bool) -> Op {
    Op::Zero { range, how: Zeroing::default(), durable }
}

fn trim(range: Range, durable: bool) -> Op {
    Op::Trim { range, durable }
}

type Job = (&'static str, fn(&Disk) -> io::Result<()>);

/// Every request that a disk accepts; each takes one operation of the image.
const READS: [Job; 5] = [
    ("read", |disk| visit(disk).read(0, &mut [0; 8])),
    ("extent", |disk| visit(disk).extent(0).map(drop)),
    ("extents", |disk| visit(disk).extents(range(0, SIZE), 9).map(drop)),
    ("extents in flight", |disk| run(disk, extents(range(0, SIZE)))),
    ("prefetch", |disk| run(disk, Op::Cache(range(0, 8)))),
];
const CHANGES: [Job; 4] = [
    ("write", |disk| visit(disk).write(0, &[1; 8])),
    ("asynchronous write", |disk| run(disk, write(0, &[1; 8], false))),
    ("zero", |disk| run(disk, zero(range(0, 8), false))),
    ("trim", |disk| run(disk, trim(range(0, 8), false))),
];
const DURABLE: [Job; 5] = [
    ("flush", |disk| run(disk, Op::Flush)),
    ("blocking flush", |disk| visit(disk).flush()),
    ("durable write", |disk| run(disk, write(0, &[1; 8], true))),
    ("durable zero", |disk| run(disk, zero(range(0, 8), true))),
    ("durable trim", |disk| run(disk, trim(range(0, 8), true))),
];

#[test]
fn every_error_of_the_image_reaches_the_caller() {
    for (name, job) in READS.iter().chain(&CHANGES).chain(&DURABLE) {
        let (disk, _, faults) = disk(false);
        faults.fail_nth(1, ENOSPC);
        assert_eq!(errno(job(&disk)), ENOSPC, "{name}");
        faults.heal();
    }
}

#[test]
fn a_single_fault_fails_a_single_job() {
    for nth in 1..=3 {
        let (disk, _, faults) = disk(false);
        faults.fail_nth(nth, EIO);
        for (at, (name, job)) in (1..).zip(CHANGES) {
            assert_eq!(job(&disk).is_err(), at == nth, "{name}, {nth}th");
        }
    }
}

#[test]
fn a_failed_flush_fails_all_later_durable_operations() {
    for (first, job) in DURABLE {
        let (disk, _, faults) = disk(false);
        faults.fail_every(BackendCall::Flush, EIO);
        faults.fail_every(BackendCall::DurableWrite, EIO);
        assert_eq!(errno(job(&disk)), EIO, "{first}");
        faults.heal();
        let before = faults.total();
        for (name, job) in DURABLE {
            assert_eq!(errno(job(&disk)), EIO, "{name} after {first}");
        }
        assert_eq!(faults.total(), before, "durable operations are not even started");
        for (name, job) in READS.iter().chain(&CHANGES) {
            assert!(job(&disk).is_ok(), "{name} after {first}");
        }
    }
}

#[test]
fn later_flushes_return_the_first_error() {
    let (disk, _, faults) = disk(false);
    faults.fail_every(BackendCall::Flush, ENOSPC);
    assert_eq!(errno(visit(&disk).flush()), ENOSPC);
    faults.fail_every(BackendCall::Flush, EIO);
    assert_eq!(errno(visit(&disk).flush()), ENOSPC);
    assert_eq!(faults.count(BackendCall::Flush), 1, "later flushes do not reach the image");
}

#[test]
fn a_full_file_system_is_no_failed_flush() {
    let (disk, _, faults) = disk(false);
    faults.fail_every(BackendCall::Write, ENOSPC);
    faults.fail_every(BackendCall::DurableWrite, ENOSPC);
    assert_eq!(errno(run(&disk, write(0, &[1; 8], true))), ENOSPC);
    faults.heal();
    assert!(run(&disk, Op::Flush).is_ok());
    assert!(run(&disk, write(0, &[1; 8], true)).is_ok());
}

#[test]
fn a_write_that_failed_to_become_durable_is_written() {
    let (disk, memory, faults) = disk(false);
    faults.fail_every(BackendCall::DurableWrite, EIO);
    assert!(run(&disk, write(0, &[5; 3], true)).is_err());
    assert_eq!(memory.contents()[..4], [5, 5, 5, 0]);
}

#[test]
fn durable_changes_without_a_durable_write_flush() {
    let (disk, memory, faults) = disk(false);
    run(&disk, write(0, &[0; 100], true)).unwrap();
    assert_eq!((faults.count(BackendCall::Flush), faults.count(BackendCall::DurableWrite)), (1, 0));
    assert_eq!(memory.allocated_blocks(), 0);
    run(&disk, write(0, &[1; 100], true)).unwrap();
    assert_eq!((faults.count(BackendCall::Flush), faults.count(BackendCall::DurableWrite)), (1, 1));
    run(&disk, zero(range(0, 9), true)).unwrap();
    run(&disk, trim(range(0, 9), true)).unwrap();
    assert_eq!(faults.count(BackendCall::Flush), 3);
    run(&disk, zero(range(0, 9), false)).unwrap();
    run(&disk, trim(range(0, 9), false)).unwrap();
    visit(&disk).write(0, &[0; 9]).unwrap();
    assert_eq!(faults.count(BackendCall::Flush), 3);
}

#[test]
fn a_read_only_disk_refuses_changes_only() {
    let (disk, _, faults) = disk(true);
    assert!(disk.read_only());
    for (name, job) in READS {
        assert!(job(&disk).is_ok(), "{name}");
    }
    let before = faults.total();
    for (name, job) in CHANGES.iter().chain(&DURABLE[2..]) {
        assert_eq!(errno(job(&disk)), EPERM, "{name}");
    }
    assert_eq!(faults.total(), before);
    assert!(visit(&disk).flush().is_ok());
}

#[test]
fn access_ends_with_the_last_byte() {
    let (disk, _, faults) = disk(false);
    let visit = visit(&disk);
    let byte = &mut [1];
    assert!(visit.read(SIZE - 1, byte).is_ok() && visit.write(SIZE - 1, byte).is_ok());
    assert!(visit.extent(SIZE - 1).is_ok());
    let before = faults.total();
    assert_eq!(errno(visit.read(SIZE, byte)), EINVAL);
    assert_eq!(errno(visit.read(u64::MAX, byte)), EINVAL);
    assert_eq!(errno(visit.write(SIZE, byte)), EINVAL);
    assert_eq!(errno(visit.extent(SIZE)), EINVAL);
    let beyond = range(SIZE - 1, 2);
    assert_eq!(errno(visit.extents(beyond, 9)), EINVAL);
    for work in [
        read(beyond),
        Op::Cache(beyond),
        extents(beyond),
        trim(beyond, false),
        zero(beyond, false),
        write(SIZE - 1, &[1; 2], false),
    ] {
        let text = format!("{work:?}");
        assert_eq!(errno(run(&disk, work)), EINVAL, "{text}");
    }
    assert_eq!(faults.total(), before);
}

#[test]
fn empty_ranges_touch_nothing() {
    let (disk, _, faults) = disk(false);
    let (visit, none) = (visit(&disk), range(SIZE, 0));
    assert!(visit.read(SIZE, &mut []).is_ok() && visit.write(SIZE, &[]).is_ok());
    for work in [
        write(SIZE, &[], true),
        zero(none, true),
        trim(none, true),
        Op::Cache(none),
        read(none),
        extents(none),
    ] {
        assert_eq!(run_returning(&disk, work).unwrap(), Returned::Success);
    }
    assert!(visit.extents(none, 9).unwrap().is_empty());
    assert_eq!(faults.total(), 0);
}

#[test]
fn the_gate_waits_for_visits_and_refuses_new_ones() {
    let (disk, ..) = disk(false);
    let inside = visit(&disk);
    let now = std::time::Instant::now();
    assert_eq!(disk.gate().close_and_drain(now), Err(StillBusy { visits: 1 }));
    drop(inside);
    assert_eq!(disk.gate().close_and_drain(now), Ok(()));
    assert_eq!(disk.enter(&|| true).map(drop), Err(NoEntry::GaveUp));
    disk.gate().retire();
    assert_eq!(disk.enter(&|| true).map(drop), Err(NoEntry::Gone));
}

#[test]
fn a_flush_waits_for_concurrent_failures() {
    let (disk, ..) = disk(false);
    // The kernel reports the failure to a concurrent flush, which has not recorded it yet.
    let guard = disk.flush_errors.begin_flush();
    std::thread::scope(|scope| {
        let flushes = [
            scope.spawn(|| visit(&disk).flush()),
            scope.spawn(|| run(&disk, Op::Flush)),
            scope.spawn(|| run(&disk, write(0, &[1; 8], true))),
        ];
        disk.flush_errors.record(&io::Error::from_raw_os_error(EIO));
        drop(guard);
        for flush in flushes {
            assert_eq!(errno(flush.join().unwrap()), EIO);
        }
    });
}

#[test]
fn an_exchanged_backend_serves_from_the_next_visit_on() {
    let (first, second) = (MemoryBackend::new(SIZE), MemoryBackend::new(SIZE));
    let disk = Disk::new(Box::new(first.clone()), false);
    let mut in_flight = InFlight::new(&disk, Arc::new(TestNotifier::default()), Instant::now);
    in_flight.begin(visit(&disk), write(0, &[1; 512], true), ());
    in_flight.submit();
    while in_flight.next_completed().is_none() {
        std::thread::yield_now();
    }
    second.write(0, &[2; 512], false).unwrap();
    let exchange = || disk.exchange(Box::new(second.clone()));
    assert_eq!(exchange(), Err(ExchangeError::GateOpen));
    disk.gate().close_and_drain(Instant::now()).unwrap();
    exchange().unwrap();
    disk.gate().reopen();
    let mut found = [0; 512];
    visit(&disk).read(0, &mut found).unwrap();
    assert_eq!(found, [2; 512]);
    // The session's queue is of the new backend as well.
    in_flight.begin(visit(&disk), write(512, &[3; 512], true), ());
    in_flight.submit();
    while in_flight.next_completed().is_none() {
        std::thread::yield_now();
    }
    assert_eq!((first.contents()[512], second.contents()[512]), (0, 3));
    assert_eq!(first.contents()[..512], [1; 512]);
}

/// A disk in memory that is changed in units of 4 KiB.
#[derive(Debug)]
struct Coarse(MemoryBackend);

impl InMemory for Coarse {
    fn memory(&self) -> &MemoryBackend {
        &self.0
    }

    fn unit(&self) -> u64 {
        4096
    }
}

#[test]
fn a_backend_without_the_offered_features_is_refused() {
    let file = Features::default();
    let flags = file.flags.difference(FeatureFlags::TRIM);
    let backend = |features| Box::new(Featured(MemoryBackend::new(SIZE), features));
    let disk = Disk::new(backend(Features { flags, minimum_block: 512, ..file }), false);
    let ours = disk.features();
    assert_eq!(ours, Features { flags, minimum_block: 512, ..file });
    disk.gate().close_and_drain(Instant::now()).unwrap();
    let fewer = Features { flags: flags.difference(FeatureFlags::FLUSH), ..ours };
    let coarser = Features { minimum_block: 1024, ..ours };
    let shorter = Features { payload_max: file.payload_max - 512, ..ours };
    for theirs in [fewer, coarser, shorter] {
        let refused = disk.exchange(backend(theirs));
        assert_eq!(refused, Err(ExchangeError::Features { ours, theirs }));
    }
    assert_eq!(disk.exchange(backend(file)), Ok(()));
    assert_eq!(disk.features(), file);
}

#[test]
fn a_backend_of_another_size_or_behind_an_open_gate_is_refused() {
    let disk = Disk::new(Box::new(MemoryBackend::new(SIZE)), false);
    let (ours, theirs) = (SIZE, SIZE - 512);
    disk.gate().close_and_drain(Instant::now()).unwrap();
    let refused = disk.exchange(Box::new(MemoryBackend::new(theirs)));
    assert_eq!(refused, Err(ExchangeError::Size { ours, theirs }));
    // The closing expires, so that sessions may be inside.
    disk.gate().expire_at(Some(Instant::now())).unwrap();
    let coarse = Coarse(MemoryBackend::new(SIZE));
    let refused = disk.exchange(Box::new(coarse));
    assert_eq!(refused, Err(ExchangeError::Unit { ours: 1, theirs: 4096 }));
    let refused = disk.exchange(Box::new(MemoryBackend::new(SIZE)));
    assert_eq!(refused, Err(ExchangeError::GateOpen));
    assert!(disk.gate().is_open());
}
