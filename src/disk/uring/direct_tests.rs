//! A ring on a file that is open with `O_DIRECT`.

use super::super::slow_backend::TestNotifier;
use super::super::{Access, Buffer, DirectBackend, FileBackend, Notifier};
use super::tests::submitted;
use super::*;
use tempfile::TempDir;

/// An image with a unit of 4096 bytes, where the file system supports direct I/O.
fn image() -> Option<(TempDir, DirectBackend)> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.img");
    let image = FileBackend::create(&path, 1 << 20, Access::default()).unwrap();
    let image = DirectBackend::new(image, Access::default()).ok()?;
    Some((folder, image.with_unit(4096)))
}

fn read(offset: u64, length: usize) -> Op {
    Op::Read { offset, data: Buffer::zeroed(length, 4096).unwrap() }
}

fn zero(offset: u64, length: u64) -> Op {
    let range = Range::whole(1 << 20).from(offset).split(length).0;
    Op::Zero { range, how: Zeroing::default(), durable: false }
}

#[test]
fn a_direct_io_that_ends_within_a_unit_or_is_misaligned_is_returned() {
    let Some((_folder, image)) = image() else { return };
    let notifier = TestNotifier::default();
    let Ok(mut ring) = Uring::new(&image, notifier.as_eventfd()) else { return };
    let write = || {
        let data = Buffer::zeroed(8192, 4096).unwrap();
        Op::Write { offset: 4096, data, durable: false }
    };
    let misaligned = -(Errno::EINVAL as i32);
    for (op, result) in [
        (read(4096, 8192), 512),
        (write(), 512),
        (read(4096, 8192), misaligned),
        (write(), misaligned),
    ] {
        ring.on_result(1, submitted(op), result);
        assert!(ring.poll().unwrap().outcome.is_none(), "{result}");
    }
    ring.on_result(1, submitted(read(4096, 8192)), 4096);
    assert!(ring.poll().is_none(), "the rest is a whole unit, and is read");
    ring.wait();
    assert!(matches!(ring.poll().unwrap().outcome, Some(Ok(()))));
}

#[test]
fn a_direct_ring_declines_what_the_kernel_cannot_or_should_not_do() {
    let Some((_folder, image)) = image() else { return };
    let notifier = TestNotifier::default();
    let Ok(mut ring) = Uring::new(&image, notifier.as_eventfd()) else { return };
    let read = |offset, length| Op::Read { offset, data: Buffer::zeroed(length, 4096).unwrap() };
    for op in [read(512, 4096), read(0, 512), Op::Cache(Range::whole(4096)), zero(1, 8192)] {
        let name = format!("{op:?}");
        assert!(ring.push(1.into(), op).is_err(), "{name}");
    }
    for op in [read(4096, 8192), zero(4096, 8192)] {
        ring.push(1.into(), op).unwrap();
        ring.wait();
        assert!(matches!(ring.poll().unwrap().outcome, Some(Ok(()))));
    }
}
