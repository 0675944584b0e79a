//! The allocated extents and holes of an image.
//! Never reports a hole that the image did not report, and never looks at bytes. An inconsistent answer
//! counts as data to the end of the disk, so that it is requested once.

use super::backend::Backend;
use super::op::Extent;
use crate::range::Range;
use nix::errno::Errno;
use nix::unistd::Whence;
use std::io;

/// Most lookups for one list of extents; the list then ends early. A file may have hundreds of
/// thousands of extents, and each lookup costs two system calls.
pub(super) const LOOKUPS_MAX: usize = 4096;

/// The result of `lseek(2)` at the beginning of a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SeekResult {
    /// Data.
    Data(Range),
    /// A hole.
    Hole(Range),
    /// No data from here to the end of the file.
    NoMoreData,
    /// The call failed.
    Failed(Errno),
}

/// Determines the kind of the extent at the beginning of `rest`, the rest of an image.
pub(super) fn probe(rest: Range, seek: impl Fn(u64, Whence) -> nix::Result<u64>) -> SeekResult {
    let offset = rest.offset();
    // Twice, because data found by the first call may be punched before the second.
    for _ in 0..2 {
        match seek(offset, Whence::SeekData) {
            Ok(data) if data > offset => return SeekResult::Hole(rest.until(data)),
            Ok(data) if data < offset => return SeekResult::Data(rest),
            Ok(_) => {}
            Err(Errno::ENXIO) => return SeekResult::NoMoreData,
            Err(errno) => return SeekResult::Failed(errno),
        }
        match seek(offset, Whence::SeekHole) {
            Ok(hole) if hole == offset => {}
            Ok(hole) if hole > offset => return SeekResult::Data(rest.until(hole)),
            _ => return SeekResult::Data(rest),
        }
    }
    SeekResult::Data(rest)
}

/// The extents of `range`, in order, without gaps, clipped to it and with equal neighbours merged.
///
/// At most `limit`, but at least one unless the range is empty. The list ends early at the limit, or
/// after [`LOOKUPS_MAX`] lookups.
///
/// # Errors
/// The backend's.
pub(super) fn extents(image: &dyn Backend, range: Range, limit: usize) -> io::Result<Vec<Extent>> {
    let mut found: Vec<Extent> = Vec::new();
    let mut rest = range;
    let mut lookups = 0;
    while !rest.is_empty() && lookups < LOOKUPS_MAX {
        lookups += 1;
        let next = extent_at(image, rest.offset())?;
        let (part, after) = rest.split(next.range.end() - rest.offset());
        let full = !found.is_empty() && found.len() >= limit;
        match found.last_mut() {
            Some(last) if last.allocated == next.allocated => {
                last.range = range.from(last.range.offset()).until(part.end());
            }
            _ if full => break,
            _ => found.push(Extent { range: part, allocated: next.allocated }),
        }
        rest = after;
    }
    Ok(found)
}

/// The image's extent from `offset` on. It begins there and has at least one byte, so that a walk from
/// extent to extent reaches the end.
///
/// # Errors
/// The backend's; `EINVAL` at or beyond the end.
pub(super) fn extent_at(image: &dyn Backend, offset: u64) -> io::Result<Extent> {
    let extent = image.extent(offset)?;
    if extent.range.offset() == offset && !extent.range.is_empty() {
        return Ok(extent);
    }
    let range = Range::whole(image.size()).from(offset);
    if range.is_empty() {
        return Err(Errno::EINVAL.into());
    }
    Ok(Extent { range, allocated: true })
}

#[cfg(test)]
mod tests {
    use super::super::memory_backend::{
        BackendCall, FailingBackend, Faults, InMemory, MemoryBackend,
    };
    use super::*;
    use proptest::prelude::*;
    use std::sync::Arc;

    const BLOCK: u64 = 4096;

    /// A disk whose blocks marked true hold data.
    fn disk(blocks: &[bool]) -> MemoryBackend {
        let image = MemoryBackend::new(blocks.len() as u64 * BLOCK);
        for (block, _) in blocks.iter().enumerate().filter(|(_, data)| **data) {
            image.write(block as u64 * BLOCK, &[7], false).unwrap();
        }
        image
    }

    fn found(blocks: &[bool], offset: u64, length: u64, limit: usize) -> Vec<(u64, u64, bool)> {
        let image = disk(blocks);
        let range = Range::within(image.size(), offset, length).unwrap();
        let list = extents(&image, range, limit).unwrap();
        list.iter().map(|e| (e.range.offset(), e.range.length(), e.allocated)).collect()
    }

    #[test]
    fn equal_neighbours_are_merged() {
        let all = found(&[true, true, false, false, true], 0, 5 * BLOCK, 9);
        let expected =
            [(0, 2 * BLOCK, true), (2 * BLOCK, 2 * BLOCK, false), (4 * BLOCK, BLOCK, true)];
        assert_eq!(all, expected);
    }

    #[test]
    fn extents_end_where_the_range_ends() {
        let some = found(&[true, false, true], 100, 2 * BLOCK, 9);
        assert_eq!(some, [(100, BLOCK - 100, true), (BLOCK, BLOCK, false), (2 * BLOCK, 100, true)]);
    }

    #[test]
    fn the_last_extent_within_the_limit_is_complete() {
        let blocks = [true, true, false, true];
        assert_eq!(found(&blocks, 0, 4 * BLOCK, 1), [(0, 2 * BLOCK, true)]);
        assert_eq!(found(&blocks, 0, 4 * BLOCK, 2).len(), 2);
        assert_eq!(found(&blocks, 0, 4 * BLOCK, 3).len(), 3);
        assert_eq!(found(&blocks, 0, 4 * BLOCK, 4).len(), 3);
    }

    #[test]
    fn a_limit_of_zero_yields_one_extent() {
        assert_eq!(found(&[true, false], 0, 2 * BLOCK, 0), [(0, BLOCK, true)]);
    }

    #[test]
    fn an_empty_range_has_no_extents() {
        assert!(found(&[true], BLOCK, 0, 5).is_empty());
    }

    #[test]
    fn errors_of_the_image_are_returned() {
        let faults = Arc::new(Faults::default());
        let image = FailingBackend::new(disk(&[true, false, true]), faults.clone());
        for nth in 1..=3 {
            faults.fail_nth(nth, nix::libc::EIO);
            let error = extents(&image, Range::whole(3 * BLOCK), 9).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(nix::libc::EIO), "operation {nth}");
        }
        assert_eq!(faults.count(BackendCall::Extent), 1 + 2 + 3);
    }

    /// An image that reports the same extent for every offset.
    #[derive(Debug)]
    struct ConstantExtent(MemoryBackend, Range);

    impl InMemory for ConstantExtent {
        fn memory(&self) -> &MemoryBackend {
            &self.0
        }

        fn extent(&self, _: u64) -> io::Result<Extent> {
            Ok(Extent { range: self.1, allocated: true })
        }
    }

    fn constant_extent(range: Range) -> ConstantExtent {
        ConstantExtent(MemoryBackend::new(BLOCK), range)
    }

    #[test]
    fn an_inconsistent_extent_is_data_to_the_end() {
        let whole = Range::whole(BLOCK);
        for inconsistent in [Range::whole(0), whole.split(10).0, whole] {
            let all = extents(&constant_extent(inconsistent), whole, 9).unwrap();
            assert_eq!(all, [Extent { range: whole, allocated: true }]);
        }
        assert!(extent_at(&constant_extent(whole), BLOCK).is_err());
    }

    fn seek_result(data: nix::Result<u64>, hole: nix::Result<u64>) -> SeekResult {
        let rest = Range::whole(100).from(10);
        probe(rest, |at, whence| {
            assert_eq!(at, 10);
            if matches!(whence, Whence::SeekData) { data } else { hole }
        })
    }

    #[test]
    fn consistent_seek_results_are_used() {
        let rest = Range::whole(100).from(10);
        assert_eq!(seek_result(Ok(30), Err(Errno::EIO)), SeekResult::Hole(rest.until(30)));
        assert_eq!(seek_result(Ok(500), Err(Errno::EIO)), SeekResult::Hole(rest));
        assert_eq!(seek_result(Ok(10), Ok(40)), SeekResult::Data(rest.until(40)));
        assert_eq!(seek_result(Ok(10), Ok(500)), SeekResult::Data(rest));
        assert_eq!(seek_result(Err(Errno::ENXIO), Err(Errno::EIO)), SeekResult::NoMoreData);
        assert_eq!(seek_result(Err(Errno::EINVAL), Ok(40)), SeekResult::Failed(Errno::EINVAL));
    }

    #[test]
    fn backward_and_empty_seek_results_are_data() {
        let rest = Range::whole(100).from(10);
        for hole in [Ok(10), Ok(9), Ok(0), Err(Errno::ENXIO), Err(Errno::EIO)] {
            assert_eq!(seek_result(Ok(10), hole), SeekResult::Data(rest), "{hole:?}");
        }
        for data in [9, 0] {
            assert_eq!(seek_result(Ok(data), Ok(40)), SeekResult::Data(rest), "{data}");
        }
    }

    #[test]
    fn data_punched_between_two_calls_is_probed_again() {
        let calls = std::cell::Cell::new(0);
        let result = probe(Range::whole(100), |_, whence| {
            calls.set(calls.get() + 1);
            Ok(if matches!(whence, Whence::SeekData) && calls.get() > 1 { 50 } else { 0 })
        });
        assert_eq!((result, calls.get()), (SeekResult::Hole(Range::whole(50)), 3));
    }

    #[test]
    fn a_list_of_extents_takes_bounded_lookups() {
        for (blocks, lookups) in [(LOOKUPS_MAX, LOOKUPS_MAX), (LOOKUPS_MAX + 1, LOOKUPS_MAX)] {
            let faults = Arc::new(Faults::default());
            let image =
                FailingBackend::new(MemoryBackend::new(blocks as u64 * BLOCK), faults.clone());
            let all = extents(&image, Range::whole(image.size()), 9).unwrap();
            assert_eq!(faults.count(BackendCall::Extent), lookups as u64);
            let covered = Range::whole(lookups as u64 * BLOCK);
            assert_eq!(all, [Extent { range: covered, allocated: false }]);
        }
    }

    proptest! {
        #[test]
        fn extents_cover_the_range_and_match_every_block(
            blocks in prop::collection::vec(any::<bool>(), 1..20),
            offset in 0u64..20 * BLOCK, length in 0u64..20 * BLOCK, limit in 1usize..9,
        ) {
            let size = blocks.len() as u64 * BLOCK;
            let range = Range::whole(size).from(offset).split(length).0;
            let list = extents(&disk(&blocks), range, limit).unwrap();
            prop_assert!(list.len() <= limit);
            let mut at = range.offset();
            for (index, extent) in list.iter().enumerate() {
                prop_assert_eq!(extent.range.offset(), at);
                prop_assert!(!extent.range.is_empty());
                prop_assert!(index == 0 || list[index - 1].allocated != extent.allocated);
                let last = (extent.range.end() - 1) / BLOCK;
                for block in at / BLOCK..=last {
                    prop_assert_eq!(blocks[block as usize], extent.allocated);
                }
                at = extent.range.end();
            }
            prop_assert!(at == range.end() || list.len() == limit);
        }
    }
}
