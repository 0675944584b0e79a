//! Images in real files: allocated space, zeroing, extents, and files changed from outside.

use super::*;
use std::os::unix::fs::MetadataExt;
use tempfile::TempDir;

const SIZE: u64 = 1 << 20;
const HOLE: Zeroing = Zeroing { keep_allocated: false, only_if_fast: false };
const NO_HOLE: Zeroing = Zeroing { keep_allocated: true, only_if_fast: false };

fn image() -> (TempDir, FileBackend) {
    image_in(&std::env::temp_dir())
}

fn image_in(parent: &Path) -> (TempDir, FileBackend) {
    let folder = tempfile::tempdir_in(parent).unwrap();
    let image =
        FileBackend::create(&folder.path().join("disk.img"), SIZE, Access::default()).unwrap();
    (folder, image)
}

/// Bytes that the file system has allocated.
fn allocated(image: &FileBackend) -> u64 {
    image.flush().unwrap();
    image.file.metadata().unwrap().blocks() * 512
}

fn read(image: &FileBackend, offset: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0xAA; length];
    image.read(offset, &mut bytes).unwrap();
    bytes
}

fn range(offset: u64, length: u64) -> Range {
    Range::within(SIZE, offset, length).unwrap()
}

fn fill(image: &FileBackend) {
    image.write(0, &vec![7; SIZE as usize], false).unwrap();
}

#[test]
fn an_incomplete_last_sector_is_not_served() {
    for (length, size, tail) in [(1023, 512, 511), (1024, 1024, 0), (1025, 1024, 1)] {
        let folder = tempfile::tempdir().unwrap();
        let image =
            FileBackend::create(&folder.path().join("disk"), length, Access::default()).unwrap();
        assert_eq!((image.size(), image.unserved_tail()), (size, tail));
    }
}

#[test]
fn punching_holes_and_trimming_free_space() {
    let (_folder, image) = image();
    fill(&image);
    let full = allocated(&image);
    image.zero(range(0, SIZE / 2), HOLE).unwrap();
    assert!(allocated(&image) <= full - SIZE / 2);
    image.trim(range(SIZE / 2, SIZE / 2)).unwrap();
    assert!(allocated(&image) <= full - SIZE);
}

#[test]
fn zeroing_without_holes_allocates_space() {
    let (_folder, image) = image();
    image.zero(range(0, SIZE), NO_HOLE).unwrap();
    assert!(allocated(&image) >= SIZE);
    assert_eq!(read(&image, 0, SIZE as usize), vec![0; SIZE as usize]);
}

#[test]
fn zeroing_is_exact_with_and_without_fallocate() {
    for how in [HOLE, NO_HOLE] {
        for plain in [false, true] {
            let (_folder, mut image) = image();
            if plain {
                image = image.without_support();
            }
            fill(&image);
            image.zero(range(4095, 300_003), how).unwrap();
            let mut expected = vec![7; SIZE as usize];
            expected[4095..304_098].fill(0);
            assert!(read(&image, 0, SIZE as usize) == expected, "{how:?}, {plain}");
        }
    }
}

#[test]
fn unsupported_fast_zeroing_fails_without_changing_bytes() {
    let (_folder, image) = image();
    let image = image.without_support();
    fill(&image);
    for keep_allocated in [false, true] {
        let how = Zeroing { keep_allocated, only_if_fast: true };
        let error = image.zero(range(100, 5000), how).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(Errno::EOPNOTSUPP as i32));
    }
    assert!(read(&image, 0, SIZE as usize).iter().all(|byte| *byte == 7));
}

#[test]
fn unsupported_operations_are_tried_once() {
    let Some((_folder, image)) = super::super::model_tests::in_shared_memory(image_in) else {
        return;
    };
    fill(&image);
    let fast = Zeroing { keep_allocated: true, only_if_fast: true };
    assert!(image.zero(range(0, 4096), fast).is_err());
    assert!(image.unsupported.zero_range.load(Ordering::Relaxed));
    assert!(!image.unsupported.punch_hole.load(Ordering::Relaxed));
    assert!(image.zero(range(0, 4096), fast).is_err());
    assert_eq!(read(&image, 0, 1), [7]);
    image.zero(range(0, 4096), NO_HOLE).unwrap();
    assert_eq!(read(&image, 0, 4097)[4095..], [0, 7]);
}

#[test]
fn writing_zeros_leaves_holes_alone() {
    let (_folder, image) = image();
    let image = image.without_support();
    image.write(65536, &[1; 4096], false).unwrap();
    let before = allocated(&image);
    image.zero(range(0, SIZE), HOLE).unwrap();
    assert_eq!(allocated(&image), before);
    assert_eq!(read(&image, 65536, 4096), [0; 4096]);
}

#[test]
fn unsupported_trimming_succeeds() {
    let (_folder, image) = image();
    let image = image.without_support();
    fill(&image);
    image.trim(range(0, SIZE)).unwrap();
}

#[test]
fn durable_writes_work_with_and_without_rwf_dsync() {
    let (_folder, mut image) = image();
    for round in 1..=2 {
        image.write(511, &[round; 70_000], true).unwrap();
        assert_eq!(read(&image, 511, 70_000), [round; 70_000]);
        image = image.without_support();
    }
}

#[test]
fn extents_distinguish_data_from_holes_to_the_end() {
    let (_folder, image) = image();
    image.write(65536, &[1; 65536], false).unwrap();
    let all = extents::extents(&image, range(0, SIZE), 9).unwrap();
    let seen: Vec<_> = all.iter().map(|e| (e.range.offset(), e.allocated)).collect();
    assert_eq!(seen, [(0, false), (65536, true), (131_072, false)]);
    assert_eq!(all[2].range.end(), SIZE);
    assert_eq!(image.extent(70_000).unwrap().range, range(70_000, 131_072 - 70_000));
}

#[test]
fn extents_never_reach_into_the_unserved_tail() {
    let folder = tempfile::tempdir().unwrap();
    let image =
        FileBackend::create(&folder.path().join("disk"), SIZE + 100, Access::default()).unwrap();
    image.file.write_all_at(&[1; 100], SIZE).unwrap();
    let last = image.extent(SIZE / 2).unwrap();
    assert_eq!((last.range.end(), last.allocated), (SIZE, false));
    image.write(SIZE - 1, &[1], false).unwrap();
    assert_eq!(image.extent(SIZE - 1).unwrap().range.end(), SIZE);
}

#[test]
fn a_truncated_file_is_an_error_not_a_hole() {
    let (folder, image) = image();
    image.file.set_len(SIZE / 2).unwrap();
    let name = folder.path().display().to_string();
    let read = image.read(SIZE / 2 - 1, &mut [0; 2]).unwrap_err();
    let extent = image.extent(SIZE / 2).unwrap_err();
    for error in [read, extent] {
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        assert_eq!(errno_of(&error), Errno::EIO as i32);
        assert!(error.to_string().contains(&name), "{error}");
    }
    assert!(image.read(SIZE / 2 - 1, &mut [0; 1]).is_ok());
}

#[test]
fn without_seek_data_everything_is_allocated() {
    let (_folder, image) = image();
    image.unsupported.seek_data.store(true, Ordering::Relaxed);
    let all = image.extent(5).unwrap();
    assert_eq!((all.range, all.allocated), (range(5, SIZE - 5), true));
}

#[test]
fn prefetching_works_at_any_range() {
    let (_folder, image) = image();
    for at in [range(0, SIZE), range(511, 3), range(SIZE - 1, 1)] {
        image.prefetch(at).unwrap();
    }
}

#[test]
fn unaligned_zeroing_and_trimming_free_whole_blocks() {
    let (_folder, image) = image();
    let block = image.file_system.block;
    fill(&image);
    let full = allocated(&image);
    image.zero(range(1, 10 * block - 2), HOLE).unwrap();
    assert!(allocated(&image) <= full - 8 * block);
    image.trim(range(20 * block - 1, 10 * block + 2)).unwrap();
    assert!(allocated(&image) <= full - 18 * block);
    let around = [read(&image, 20 * block - 1, 1), read(&image, 30 * block, 1)];
    assert_eq!(around, [[7], [7]], "a trim leaves edges alone");
}

#[test]
fn unaligned_zeroing_in_a_hole_allocates_nothing() {
    let (_folder, image) = image();
    image.zero(range(100, 300_000), HOLE).unwrap();
    image.zero(range(5, 7), HOLE).unwrap();
    assert_eq!(allocated(&image), 0);
    image.zero(range(100, 300_000), NO_HOLE).unwrap();
    let first = range(0, image.file_system.block);
    assert!(image.extent(0).unwrap().allocated, "{first:?} must be allocated");
}

#[test]
fn fallocate_gets_whole_blocks_only() {
    let (_folder, image) = image();
    let block = image.file_system.block;
    let step = |offset, length| image.zero_call(range(offset, length), HOLE);
    let blocks = |offset, length| step(offset, length).map(|step| step.blocks);
    assert_eq!(blocks(0, block), Some(range(0, block)));
    assert_eq!(blocks(1, 2 * block), Some(range(block, block)));
    assert_eq!(blocks(block - 1, block + 1), Some(range(block, block)));
    assert_eq!((step(1, block), step(0, block - 1), step(1, 2 * block - 2)), (None, None, None));
    let edges = |offset, length| image.edges(range(offset, length));
    assert!(edges(block, 3 * block).is_empty());
    let (first, last) = (range(0, block), range(2 * block, block));
    assert_eq!(edges(1, 2 * block), [first, last]);
    assert_eq!(edges(1, block - 1), [first]);
}

#[test]
fn changes_within_a_block_need_no_fallocate() {
    let (_folder, image) = image();
    fill(&image);
    let fast = Zeroing { keep_allocated: false, only_if_fast: true };
    image.zero(range(10, 100), fast).unwrap();
    image.trim(range(600, 100)).unwrap();
    let found = read(&image, 0, 1000);
    assert!(found[10..110] == [0; 100] && found[110..] == [7; 890] && found[..10] == [7; 10]);
}
