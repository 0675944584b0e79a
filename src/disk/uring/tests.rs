//! The ring on real files, and on kernels that refuse or interrupt its entries.

use super::super::slow_backend::TestNotifier;
use super::super::{Access, Backend, FileBackend, Notifier};
use super::*;
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use tempfile::TempDir;

fn image() -> (TempDir, FileBackend) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.img");
    let image = FileBackend::create(&path, 1 << 20, Access::default()).unwrap();
    (folder, image)
}

/// A ring that accepts no submission until it is enabled.
fn disabled<'a>(image: &'a FileBackend, notifier: &TestNotifier) -> Option<Uring<'a>> {
    let ring = IoUring::builder().setup_r_disabled().build(ENTRIES);
    Uring::with(ring.ok()?, image, notifier.as_eventfd()).ok()
}

/// An operation of which nothing is done.
pub(super) fn submitted(op: Op) -> Submitted {
    Submitted { op, done: 0, parts: ScratchParts::default() }
}

fn write(byte: u8) -> Op {
    Op::Write { offset: 0, data: vec![byte; 4096].into(), durable: true }
}

fn zero(range: Range) -> Op {
    Op::Zero { range, how: Zeroing::default(), durable: false }
}

#[test]
fn rejected_calls_are_returned_and_never_executed_later() {
    let ((_folder, image), notifier) = (image(), TestNotifier::default());
    let Some(mut ring) = disabled(&image, &notifier) else { return };
    ring.push(1.into(), write(1)).unwrap();
    ring.push(2.into(), Op::Flush).unwrap();
    assert!(!ring.submit(), "completed without a notification");
    for key in [1, 2] {
        let completion = ring.poll().unwrap();
        assert!(completion.key == key && completion.outcome.is_none());
    }
    assert_eq!(ring.push(3.into(), write(3)), Err(write(3)));
    // The data of the returned calls is freed: the kernel must not execute their entries.
    ring.ring.submitter().register_enable_rings().unwrap();
    assert!(ring.submit());
    ring.wait();
    drop(ring);
    let mut found = [9; 4096];
    image.read(0, &mut found).unwrap();
    assert!(found == [0; 4096]);
}

#[test]
fn wait_blocks_until_a_resubmitted_call_completes() {
    let ((_folder, image), notifier) = (image(), TestNotifier::default());
    let Ok(mut ring) = Uring::new(&image, notifier.as_eventfd()) else { return };
    // As after a short write.
    ring.resubmit(1, Submitted { done: 512, ..submitted(write(1)) });
    ring.wait();
    let completion = ring.poll().expect("wait returned");
    assert!(
        completion.key == 1 && matches!(completion.outcome, Some(Ok(()))),
        "{:?}",
        completion.outcome
    );
    let mut found = [9; 4096];
    image.read(0, &mut found).unwrap();
    assert!(found[..512] == [0; 512] && found[512..] == [1; 3584]);
}

#[test]
fn ecanceled_returns_the_call_instead_of_failing_it() {
    let ((_folder, image), notifier) = (image(), TestNotifier::default());
    let Some(mut ring) = disabled(&image, &notifier) else { return };
    let zero = zero(Range::whole(4096));
    for op in [Op::Flush, write(1), zero, Op::Cache(Range::whole(4096))] {
        ring.on_result(1, submitted(op), -(Errno::ECANCELED as i32));
        assert!(ring.poll().unwrap().outcome.is_none());
    }
}

#[test]
fn unsupported_changes_are_returned_and_other_errors_fail_them() {
    let ((_folder, image), notifier) = (image(), TestNotifier::default());
    let Some(mut ring) = disabled(&image, &notifier) else { return };
    let range = Range::whole(4096);
    let operations = || [zero(range), Op::Trim { range, durable: false }];
    for errno in [Errno::EOPNOTSUPP, Errno::EINVAL, Errno::ENODEV, Errno::EPERM, Errno::ESPIPE] {
        for op in operations() {
            ring.on_result(1, submitted(op), -(errno as i32));
            assert!(ring.poll().unwrap().outcome.is_none(), "{errno}");
        }
    }
    for errno in [Errno::EIO, Errno::ENOSPC, Errno::EDQUOT] {
        for op in operations() {
            ring.on_result(1, submitted(op), -(errno as i32));
            assert!(matches!(ring.poll().unwrap().outcome, Some(Err(_))), "{errno}");
        }
    }
    ring.on_result(1, submitted(Op::Flush), -(Errno::EINVAL as i32));
    assert!(matches!(ring.poll().unwrap().outcome, Some(Err(_))), "a flush is no change");
}

#[test]
fn zeroing_with_unaligned_edges_is_exact() {
    let ((_folder, image), notifier) = (image(), TestNotifier::default());
    let Ok(mut ring) = Uring::new(&image, notifier.as_eventfd()) else { return };
    image.write(0, &[7; 40_000], false).unwrap();
    let range = Range::whole(30_001).from(101);
    ring.push(1.into(), zero(range)).unwrap();
    ring.wait();
    assert!(matches!(ring.poll().unwrap().outcome, Some(Ok(()))));
    let (mut found, mut expected) = ([9; 40_000], [7; 40_000]);
    image.read(0, &mut found).unwrap();
    expected[101..30_001].fill(0);
    assert!(found == expected);
}

#[test]
fn a_resubmission_that_became_unsupported_is_returned() {
    let (_folder, image) = image();
    let (image, notifier) = (image.without_support(), TestNotifier::default());
    let Ok(mut ring) = Uring::new(&image, notifier.as_eventfd()) else { return };
    let zero = zero(Range::whole(4096));
    ring.on_result(1, submitted(zero), -(Errno::EINTR as i32));
    assert!(ring.poll().unwrap().outcome.is_none());
}

#[test]
fn a_load_makes_every_page_resident() {
    let ((_folder, image), notifier) = (image(), TestNotifier::default());
    let Ok(mut ring) = Uring::new(&image, notifier.as_eventfd()) else { return };
    image.write(0, &[7; 1 << 20], true).unwrap();
    let all = Range::whole(1 << 20);
    for range in [all.from(4096).split(256 << 10).0, all, all.from(511).split(70_001).0] {
        let advice = PosixFadviseAdvice::POSIX_FADV_DONTNEED;
        posix_fadvise(image.file(), 0, 0, advice).unwrap();
        // Must not be taken for the whole range.
        image.read(range.end() - 1, &mut [0]).unwrap();
        ring.push(1.into(), Op::Load(range)).unwrap();
        ring.wait();
        assert!(matches!(ring.poll().unwrap().outcome, Some(Ok(()))));
        let mut bytes = vec![0; range.length() as usize];
        image.page_cache().unwrap().read_now(range.offset(), &mut bytes).unwrap();
    }
}

#[test]
fn a_load_continues_where_it_stopped() {
    let ((_folder, image), notifier) = (image(), TestNotifier::default());
    let Ok(mut ring) = Uring::new(&image, notifier.as_eventfd()) else { return };
    let load = || Op::Load(Range::whole(1 << 20));
    ring.on_result(1, submitted(load()), 100_000);
    ring.wait();
    assert!(matches!(ring.poll().unwrap().outcome, Some(Ok(()))));
    ring.on_result(2, submitted(load()), 0);
    assert!(ring.poll().unwrap().outcome.is_none());
}

#[test]
fn a_kernel_without_the_operations_is_not_used() {
    assert!(!supports_all(&Probe::new()));
}
