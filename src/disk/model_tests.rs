//! Random operations on every kind of image, compared with plain bytes in memory: a disk reads back
//! the bytes that were written.

use super::memory_backend::MemoryBackend;
use super::tests::{run as run_operation, run_returning};
use super::{Access, Backend, Buffer, Disk, FileBackend, Op, OpenError, Returned, Zeroing};
use crate::range::Range;
use nix::errno::Errno;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::TempDir;

pub(super) const SIZE: usize = 80 * 1024;
/// The unserved bytes behind the disk in its file, which must never change.
const TAIL: [u8; 100] = [0xEE; 100];
/// Random sequences of up to [`STEPS`] steps for each kind of image.
pub(super) const CASES: u32 = 40;
const STEPS: usize = 40;

/// One request of a client.
#[derive(Clone, Debug)]
struct Step {
    offset: usize,
    length: usize,
    durable: bool,
    work: Change,
}

#[derive(Clone, Debug)]
enum Change {
    /// Fills the range with this byte, which is often zero.
    Fill(u8),
    /// Writes zeros with one other byte somewhere.
    Speckle(usize),
    Zero(Zeroing),
    Trim,
    Flush,
}

fn step() -> impl Strategy<Value = Step> {
    let zeroing = any::<(bool, bool)>()
        .prop_map(|(keep_allocated, only_if_fast)| Zeroing { keep_allocated, only_if_fast });
    let work = prop_oneof![
        4 => (0u8..3).prop_map(Change::Fill),
        2 => (0..SIZE).prop_map(Change::Speckle),
        3 => zeroing.prop_map(Change::Zero),
        1 => Just(Change::Trim),
        1 => Just(Change::Flush),
    ];
    // Half of the offsets are aligned to sectors, as most clients' are.
    let place = prop_oneof![0..SIZE, (0..SIZE / 512).prop_map(|at| at * 512)];
    let length = prop_oneof![0usize..600, 0usize..20_000, (0usize..9).prop_map(|n| n * 4096)];
    (place, length, any::<bool>(), work).prop_map(|(offset, length, durable, work)| Step {
        offset,
        length: length.min(SIZE - offset),
        durable,
        work,
    })
}

/// Executes one step on the disk and on the model.
fn execute(disk: &Disk, model: &mut [u8], step: &Step) -> io::Result<()> {
    let (offset, length, durable) = (step.offset as u64, step.length as u64, step.durable);
    let range = Range::within(SIZE as u64, offset, length).unwrap();
    let bytes = &mut model[step.offset..][..step.length];
    match step.work {
        Change::Flush => return run_operation(disk, Op::Flush),
        Change::Fill(byte) => bytes.fill(byte),
        Change::Speckle(at) => {
            bytes.fill(0);
            if !bytes.is_empty() {
                bytes[at % step.length] = 9;
            }
        }
        Change::Zero(how) => match run_operation(disk, Op::Zero { range, how, durable }) {
            Err(error) if how.only_if_fast => {
                assert_eq!(error.raw_os_error(), Some(Errno::EOPNOTSUPP as i32));
                return Ok(());
            }
            result => {
                bytes.fill(0);
                return result;
            }
        },
        Change::Trim => {
            run_operation(disk, Op::Trim { range, durable })?;
            // Trimmed bytes may read as anything, but must not change again.
            return disk.enter(&|| true).unwrap().read(offset, bytes);
        }
    }
    if durable || step.offset.is_multiple_of(2) {
        let data = Buffer::copy_of(bytes, disk.unit() as usize).unwrap();
        return run_operation(disk, Op::Write { offset, data, durable });
    }
    disk.enter(&|| true).unwrap().write(offset, bytes)
}

/// Executes all steps, and compares all bytes after each; at the end holes must read as zeros.
fn check(image: Box<dyn Backend>, steps: &[Step]) -> Result<(), TestCaseError> {
    let disk = Disk::new(image, false);
    let (mut model, mut found) = (vec![0; SIZE], vec![0; SIZE]);
    let visit = disk.enter(&|| true).unwrap();
    visit.read(0, &mut model).unwrap();
    for (at, step) in steps.iter().enumerate() {
        let result = execute(&disk, &mut model, step);
        prop_assert!(result.is_ok(), "step {} ({:?}): {:?}", at, step, result);
        visit.read(0, &mut found).unwrap();
        let differ = found.iter().zip(&model).position(|(found, model)| found != model);
        prop_assert_eq!(differ, None, "the disk differs after step {} ({:?})", at, step);
    }
    let range = Range::whole(SIZE as u64);
    let extents = visit.extents(range, usize::MAX).unwrap();
    let op = Op::Extents { range, limit: usize::MAX, found: Vec::new() };
    prop_assert_eq!(run_returning(&disk, op).unwrap(), Returned::Extents(extents.clone()));
    for hole in extents.iter().filter(|extent| !extent.allocated) {
        let bytes = &model[hole.range.offset() as usize..hole.range.end() as usize];
        prop_assert!(bytes.iter().all(|byte| *byte == 0), "{:?} is not zero", hole);
    }
    Ok(())
}

/// Runs random steps on images that `make` creates; `after` checks the result.
pub(super) fn run(
    cases: u32,
    make: impl Fn() -> Box<dyn Backend>,
    after: impl Fn() -> Result<(), TestCaseError>,
) {
    let config = Config { cases, failure_persistence: None, ..Config::default() };
    let steps = prop::collection::vec(step(), 1..STEPS);
    let outcome = TestRunner::new(config).run(&steps, |steps| {
        check(make(), &steps)?;
        after()
    });
    outcome.unwrap_or_else(|error| panic!("{error}"));
}

/// Runs random steps on a new file in `folder` for each case.
pub(super) fn run_on_files(
    cases: u32,
    folder: &Path,
    configure: impl Fn(FileBackend) -> Box<dyn Backend>,
) {
    let path = folder.join("disk.img");
    let make = || {
        let file = File::create(&path).unwrap();
        file.write_all_at(&TAIL, SIZE as u64).unwrap();
        drop(file);
        let image = FileBackend::open(&path, Access { read_only: false }).unwrap();
        assert_eq!((image.size(), image.unserved_tail()), (SIZE as u64, 100));
        configure(image)
    };
    run(cases, make, || {
        let bytes = std::fs::read(&path).unwrap();
        prop_assert!(bytes[SIZE..] == TAIL, "the unserved tail was touched");
        Ok(())
    });
}

/// Reports a skipped test on the real stderr, which the test harness does not capture.
pub(super) fn skip(what: &str) {
    let _ = writeln!(io::stderr(), "SKIP {what}");
}

/// Calls `test` with `/dev/shm`, if it exists.
pub(super) fn in_shared_memory<T>(test: impl FnOnce(&Path) -> T) -> Option<T> {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() {
        return Some(test(memory));
    }
    skip("files in shared memory: there is no /dev/shm");
    None
}

#[test]
fn a_disk_in_memory_reads_back_what_was_written() {
    run(CASES, || Box::new(MemoryBackend::new(SIZE as u64)), || Ok(()));
}

#[test]
fn a_file_reads_back_what_was_written() {
    run_on_files(CASES, tempfile::tempdir().unwrap().path(), |image| Box::new(image));
}

#[test]
fn a_file_in_shared_memory_reads_back_what_was_written() {
    in_shared_memory(|memory| {
        run_on_files(CASES, tempfile::tempdir_in(memory).unwrap().path(), |image| Box::new(image));
    });
}

#[test]
fn a_file_without_optional_operations_reads_back_what_was_written() {
    let folder = tempfile::tempdir().unwrap();
    run_on_files(CASES, folder.path(), |image| Box::new(image.without_support()));
}

#[test]
fn zeros_written_into_holes_of_a_file_allocate_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.img");
    let disk =
        Disk::new(Box::new(FileBackend::create(&path, 1 << 30, Access::default()).unwrap()), false);
    let visit = disk.enter(&|| true).unwrap();
    let blocks = || std::fs::metadata(&path).unwrap().blocks();
    let write_durably = |offset, data: Vec<u8>| {
        run_operation(&disk, Op::Write { offset, data: data.into(), durable: true }).unwrap();
    };
    visit.write(12_345, &vec![0; 8 << 20]).unwrap();
    write_durably(1 << 29, vec![0; 1 << 20]);
    assert_eq!(blocks(), 0);
    // One byte of data among zeros costs the smallest allocation of the file system, not all of it.
    let mut speckled = vec![0; 8 << 20];
    speckled[4 << 20] = 1;
    write_durably(0, speckled);
    assert!((1..=2048).contains(&blocks()), "{} blocks", blocks());
}

/// A loop device on a file, detached when dropped.
pub(super) struct Loop {
    device: PathBuf,
}

impl Loop {
    /// Attaches `file`, or skips the test. Under CI a missing `losetup` is a failure.
    fn attach(file: &Path, sector: &str) -> Option<Self> {
        let root = nix::unistd::geteuid().is_root();
        if !root || !Path::new("/dev/loop-control").exists() {
            skip("block devices: needs root and /dev/loop-control");
            return None;
        }
        let mut losetup = Command::new("losetup");
        losetup.args(["--find", "--show", "--sector-size", sector]).arg(file);
        let output = match losetup.output() {
            Ok(output) => output,
            Err(error) => {
                let must = std::env::var("CI").is_ok_and(|value| value == "true");
                assert!(!must, "losetup must be there under CI: {error}");
                skip(&format!("block devices: losetup: {error}"));
                return None;
            }
        };
        if !output.status.success() {
            skip(&format!("block devices: {}", String::from_utf8_lossy(&output.stderr).trim()));
            return None;
        }
        let device = PathBuf::from(String::from_utf8(output.stdout).unwrap().trim());
        Some(Self { device })
    }

    pub(super) fn open(&self) -> Result<FileBackend, OpenError> {
        FileBackend::open(&self.device, Access { read_only: false })
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.device).status();
    }
}

/// A folder with a file of [`SIZE`] bytes, full of data, and its block device.
pub(super) fn loop_device(parent: &Path, sector: &str) -> Option<(TempDir, PathBuf, Loop)> {
    let folder = tempfile::tempdir_in(parent).unwrap();
    let file = folder.path().join("backing");
    std::fs::write(&file, vec![7; SIZE]).unwrap();
    let device = Loop::attach(&file, sector)?;
    Some((folder, file, device))
}

#[test]
fn a_block_device_reads_back_what_was_written() {
    let places = ["/dev/shm".into(), std::env::temp_dir()];
    for (parent, sector) in places.iter().filter(|place| place.is_dir()).zip(["512", "4096"]) {
        let Some((_folder, _file, device)) = loop_device(parent, sector) else { return };
        run(CASES / 4, || Box::new(device.open().unwrap()), || Ok(()));
    }
}

#[test]
fn a_block_device_is_locked_like_a_file() {
    let Some((_folder, _file, device)) = loop_device(&std::env::temp_dir(), "512") else { return };
    let image = device.open().unwrap();
    assert_eq!((image.size(), image.unserved_tail()), (SIZE as u64, 0));
    assert!(matches!(device.open(), Err(OpenError::AlreadyServed { .. })));
    let extent = image.extent(512).unwrap();
    assert!(extent.allocated && extent.range.end() == SIZE as u64);
}

#[test]
fn zeroing_a_block_device_is_exact_and_frees_space() {
    let Some((_folder, file, device)) = loop_device(&std::env::temp_dir(), "512") else { return };
    let image = device.open().unwrap();
    let blocks = || {
        image.flush().unwrap();
        File::open(&file).unwrap().sync_all().unwrap();
        std::fs::metadata(&file).unwrap().blocks()
    };
    let before = blocks();
    let range = |offset, length| Range::within(SIZE as u64, offset, length).unwrap();
    image.zero(range(100, 40_000), Zeroing::default()).unwrap();
    let mut expected = vec![7; SIZE];
    expected[100..40_100].fill(0);
    let mut found = vec![0; SIZE];
    image.read(0, &mut found).unwrap();
    assert!(found == expected);
    let after_zero = blocks();
    assert!(after_zero < before, "{after_zero} of {before} blocks");
    image.trim(range(41_000, SIZE as u64 - 41_000)).unwrap();
    assert!(blocks() < after_zero);
}

/// On shared memory: once the kernel has found that the backing file cannot keep zeros allocated, it
/// also refuses to punch holes, but only after dropping its cached pages.
#[test]
fn refused_fast_zeroing_loses_no_dirty_pages() {
    let Some(Some((_folder, _file, device))) = in_shared_memory(|dir| loop_device(dir, "512"))
    else {
        return;
    };
    let image = device.open().unwrap();
    let whole = Range::whole(SIZE as u64);
    image.zero(whole, Zeroing { keep_allocated: true, only_if_fast: false }).unwrap();
    drop(image);
    let image = device.open().unwrap();
    image.write(0, &vec![8; SIZE], false).unwrap();
    for keep_allocated in [false, true] {
        let how = Zeroing { keep_allocated, only_if_fast: true };
        for range in [whole, whole.from(700).until(9000)] {
            let error = image.zero(range, how).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(Errno::EOPNOTSUPP as i32));
        }
    }
    let mut found = vec![0; SIZE];
    image.read(0, &mut found).unwrap();
    assert!(found.iter().all(|byte| *byte == 8));
}
