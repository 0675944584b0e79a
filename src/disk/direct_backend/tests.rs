//! Direct I/O on real files and block devices: random requests, the tail of a file, concurrent changes of
//! one unit, and files cut short.

use super::super::inflight::InFlight;
use super::super::model_tests::{self, CASES, in_shared_memory, run, run_on_files, skip};
use super::super::slow_backend::TestNotifier;
use super::super::{Disk, HolePolicy, Op, errno_of};
use super::*;
use proptest::prelude::*;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use tempfile::TempDir;

/// An end within a sector, and within a unit of 4096 bytes.
const SIZE: u64 = (80 << 10) + 512;
const UNSERVED: [u8; 100] = [0xEE; 100];

fn direct(image: FileBackend) -> Option<DirectBackend> {
    match DirectBackend::new(image, Access::default()) {
        Ok(image) => Some(image),
        Err(OpenError::NoDirect { .. }) => {
            skip("direct I/O: the file system of the temporary directory does not support it");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// An image full of sevens with unserved bytes behind it, with a unit of 4096 bytes.
fn image() -> Option<(TempDir, PathBuf, DirectBackend)> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.img");
    let content = [&[7; SIZE as usize][..], &UNSERVED].concat();
    std::fs::write(&path, content).unwrap();
    let image = direct(FileBackend::open(&path, Access::default()).unwrap())?.with_unit(4096);
    Some((folder, path, image))
}

fn read(image: &DirectBackend, offset: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0xAA; length];
    image.read(offset, &mut bytes).unwrap();
    bytes
}

/// Runs random requests on files in `folder`, with this unit or else the real one.
fn check_files(folder: &Path, unit: Option<u64>, configure: fn(FileBackend) -> FileBackend) {
    let folder = tempfile::tempdir_in(folder).unwrap();
    let probe = FileBackend::create(&folder.path().join("probe"), 4096, Access::default()).unwrap();
    if direct(probe).is_none() {
        return;
    }
    run_on_files(CASES / 2, folder.path(), |image| {
        let image = direct(configure(image)).unwrap();
        Box::new(match unit {
            Some(unit) => image.with_unit(unit),
            None => image,
        })
    });
}

#[test]
fn a_file_reads_back_what_was_written_directly() {
    check_files(&std::env::temp_dir(), None, |image| image);
    check_files(&std::env::temp_dir(), Some(4096), |image| image);
}

#[test]
fn a_file_in_shared_memory_reads_back_what_was_written_directly() {
    in_shared_memory(|memory| check_files(memory, None, |image| image));
}

#[test]
fn a_file_with_a_tail_reads_back_what_was_written_directly() {
    // The size is no multiple of this unit.
    check_files(&std::env::temp_dir(), Some(32 << 10), |image| image);
}

#[test]
fn threads_write_and_read_directly_without_optional_operations() {
    check_files(&std::env::temp_dir(), Some(4096), FileBackend::without_support);
    check_files(&std::env::temp_dir(), Some(32 << 10), FileBackend::without_support);
}

#[test]
fn a_block_device_reads_back_what_was_written_directly() {
    for sector in [512, 4096] {
        let parent = std::env::temp_dir();
        let made = model_tests::loop_device(&parent, &sector.to_string());
        let Some((_folder, _file, device)) = made else { return };
        let open = || direct(device.open().unwrap()).unwrap();
        assert_eq!(open().unit(), sector);
        assert!(!open().extents_wait(), "a device has no holes to look for");
        run(CASES / 4, || Box::new(open()), || Ok(()));
    }
}

#[test]
fn extents_wait_where_the_file_system_is_trusted() {
    let Some((_folder, path, _)) = image() else { return };
    for (policy, waits) in [(HolePolicy::Trust, true), (HolePolicy::Ignore, false)] {
        let buffered = FileBackend::open(&path, Access::default()).unwrap().with_holes(policy);
        assert_eq!(direct(buffered).unwrap().extents_wait(), waits, "{policy:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..Default::default() })]

    /// Each through the ring if it can, and otherwise by a thread.
    #[test]
    fn operations_read_the_bytes_of_every_range(
        places in prop::collection::vec((0..SIZE, 0..40_000_u64, any::<bool>()), 1..20),
    ) {
        let Some((_folder, path, image)) = image() else { return Ok(()) };
        let content: Vec<u8> = (0..SIZE).map(|at| (at / 7 % 251) as u8).collect();
        image.write(0, &content, false).unwrap();
        let disk = Disk::new(Box::new(image), false);
        let mut in_flight = InFlight::new(&disk, Arc::new(TestNotifier::default()), std::time::Instant::now);
        for (at, (offset, length, aligned)) in places.iter().enumerate() {
            let offset = if *aligned { offset - offset % 4096 } else { *offset };
            let length = if *aligned { length.next_multiple_of(4096) } else { *length };
            let data = Buffer::zeroed(length.min(SIZE - offset) as usize, 4096).unwrap();
            in_flight.begin(disk.enter(&|| true).unwrap(), Op::Read { offset, data }, (at, offset));
        }
        let mut left = places.len();
        while left > 0 {
            in_flight.submit();
            if let Some(((_, offset), outcome)) = in_flight.next_completed() {
                let data = outcome.unwrap().into_bytes();
                prop_assert!(data[..] == content[offset as usize..][..data.len()], "at {}", offset);
                left -= 1;
            }
        }
        drop(in_flight);
        drop(disk);
        prop_assert!(std::fs::read(&path).unwrap()[SIZE as usize..] == UNSERVED);
    }
}

#[test]
fn writes_of_the_tail_keep_the_size_and_the_bytes_behind_it() {
    let Some((_folder, path, image)) = image() else { return };
    assert_eq!((image.size(), image.tail()), (SIZE, 80 << 10));
    let mut content = vec![7; SIZE as usize];
    let ranges = [(SIZE - 1, 1), (SIZE - 512, 512), (SIZE - 600, 300), (10, SIZE - 10), (0, SIZE)];
    for (round, (offset, length)) in (1..).zip(ranges) {
        for durable in [false, true] {
            let byte = 2 * round + u8::from(durable);
            image.write(offset, &vec![byte; length as usize], durable).unwrap();
            content[offset as usize..][..length as usize].fill(byte);
            assert!(read(&image, 0, SIZE as usize) == content, "{length} at {offset}");
            let file = std::fs::read(&path).unwrap();
            assert!(file[..SIZE as usize] == content && file[SIZE as usize..] == UNSERVED);
        }
    }
}

#[test]
fn only_the_tail_is_written_through_the_page_cache() {
    let Some((_folder, _path, image)) = image() else { return };
    let tail = image.tail();
    assert!(image.can_transfer(0, 4096) && image.can_transfer(tail - 4096, 4096));
    assert!(!image.can_transfer(tail, 512) && !image.can_transfer(tail - 4096, 4608));
    let whole = DirectBackend { unit: 512, ..image };
    assert_eq!(whole.tail(), SIZE, "a multiple of the unit has none");
}

#[test]
fn zeroing_and_trimming_work_at_every_range() {
    for how in [true, false].map(|keep_allocated| Zeroing { keep_allocated, only_if_fast: false }) {
        let Some((_folder, path, image)) = image() else { return };
        let mut content = vec![7; SIZE as usize];
        for (offset, length) in [(1, 5), (4095, 2), (8192, 4096), (20_000, 30_000), (81_000, 1432)]
        {
            let range = Range::within(SIZE, offset, length).unwrap();
            image.execute(&Op::Zero { range, how, durable: false }).unwrap();
            content[offset as usize..][..length as usize].fill(0);
            assert!(read(&image, 0, SIZE as usize) == content, "{length} at {offset}");
        }
        let range = Range::within(SIZE, 60_000, SIZE - 60_000).unwrap();
        image.execute(&Op::Trim { range, durable: false }).unwrap();
        assert_eq!(std::fs::read(&path).unwrap()[SIZE as usize..], UNSERVED);
    }
}

#[test]
fn zeros_in_holes_allocate_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.img");
    let file = FileBackend::create(&path, 1 << 30, Access::default()).unwrap();
    let Some(image) = direct(file) else { return };
    let disk = Disk::new(Box::new(image), false);
    let blocks = || std::fs::metadata(&path).unwrap().blocks();
    for (offset, durable) in [(0, false), (12_345, false), (1 << 29, true)] {
        let data = Buffer::zeroed(1 << 20, disk.unit() as usize).unwrap();
        super::super::tests::run(&disk, Op::Write { offset, data, durable }).unwrap();
    }
    assert_eq!(blocks(), 0);
}

/// Two sessions write their own bytes of one unit, over and over; each must always find its last ones.
#[test]
fn concurrent_changes_of_one_unit_lose_nothing() {
    for configure in [|image| image, FileBackend::without_support] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk.img");
        let file = FileBackend::create(&path, 64 << 10, Access::default()).unwrap();
        let Some(image) = direct(configure(file)) else { return };
        let disk = Disk::new(Box::new(image.with_unit(4096)), false);
        thread::scope(|scope| {
            for session in 0..2_u64 {
                let disk = &disk;
                scope.spawn(move || {
                    for round in 1..=200_u8 {
                        let offset = 4096 + session * 100;
                        let data = Buffer::copy_of(&[round; 100], 4096).unwrap();
                        let write = Op::Write { offset, data, durable: false };
                        super::super::tests::run(disk, write).unwrap();
                        let mut found = [0; 100];
                        disk.enter(&|| true).unwrap().read(offset, &mut found).unwrap();
                        assert_eq!(found, [round; 100], "session {session}");
                    }
                });
            }
        });
    }
}

#[test]
fn a_file_cut_short_is_an_error() {
    let Some((folder, path, image)) = image() else { return };
    // Within a unit.
    File::options().write(true).open(&path).unwrap().set_len(40_000).unwrap();
    assert_eq!(read(&image, 39_999, 1), [7]);
    for (offset, length) in [(39_999, 2), (40_000, 1), (36_864, 4096), (0, 81_920), (81_920, 512)] {
        let error = image.read(offset, &mut vec![0; length]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof, "{length} at {offset}");
        assert!(error.to_string().contains(&folder.path().display().to_string()), "{error}");
    }
    let disk = Disk::new(Box::new(image), false);
    for (offset, length) in [(0, 81_920), (36_864, 4096), (40_960, 4096), (81_920, 512)] {
        let data = Buffer::zeroed(length, 4096).unwrap();
        let outcome = super::super::tests::run(&disk, Op::Read { offset, data });
        assert_eq!(errno_of(&outcome.unwrap_err()), Errno::EIO as i32, "{length} at {offset}");
    }
}

#[test]
fn a_read_only_image_is_opened_only_for_reading() {
    let Some((_folder, path, image)) = image() else { return };
    drop(image);
    let access = Access { read_only: true };
    let image = DirectBackend::new(FileBackend::open(&path, access).unwrap(), access).unwrap();
    assert_eq!(read(&image, SIZE - 1, 1), [7]);
    let error = image.write(0, &[1; 4096], false).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(Errno::EBADF as i32));
}

#[test]
fn the_second_descriptor_is_of_the_same_file_after_a_rename() {
    let Some((folder, path, image)) = image() else { return };
    drop(image);
    let file = FileBackend::open(&path, Access::default()).unwrap();
    std::fs::rename(&path, folder.path().join("moved")).unwrap();
    std::fs::write(&path, vec![9; SIZE as usize]).unwrap();
    let image = direct(file).unwrap();
    assert_eq!(read(&image, 0, 1), [7]);
    image.write(0, &[8], false).unwrap();
    assert_eq!(std::fs::read(&path).unwrap()[0], 9);
}

#[test]
fn a_direct_disk_has_no_cache_and_no_transfer() {
    let Some((_folder, _path, image)) = image() else { return };
    assert!(image.page_cache().is_none() && image.socket_transfer().is_none());
    assert!(!image.orders_writes());
    image.execute(&Op::Cache(Range::whole(SIZE))).unwrap();
}
