//! Which spans of an image hold data and which are holes.
//! Never claims a hole that the image did not claim, and never looks at bytes. An answer that makes no
//! sense means data: to the end, so that it is asked for once.

use super::backend::{Backend, Extent};
use crate::range::Range;
use nix::errno::Errno;
use nix::unistd::Whence;
use std::io;

/// How often an image is asked for one list of extents; the list then ends early. A file may have
/// hundreds of thousands of them, and each costs two system calls.
pub(super) const LOOKUPS_MAX: usize = 4096;

/// What `lseek(2)` says of the beginning of a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SeekResult {
    /// Data.
    Data(Range),
    /// A hole.
    Hole(Range),
    /// There is no data from here to the end of the file.
    NoMore,
    /// No answer.
    Unable(Errno),
}

/// Asks what `rest`, the rest of an image, begins with.
pub(super) fn ask(rest: Range, seek: impl Fn(u64, Whence) -> nix::Result<u64>) -> SeekResult {
    let offset = rest.offset();
    // Twice, since what was data may be punched before its end is asked for.
    for _ in 0..2 {
        match seek(offset, Whence::SeekData) {
            Ok(data) if data > offset => return SeekResult::Hole(rest.until(data)),
            Ok(data) if data < offset => return SeekResult::Data(rest),
            Ok(_) => {}
            Err(Errno::ENXIO) => return SeekResult::NoMore,
            Err(errno) => return SeekResult::Unable(errno),
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
/// At least one for a range that is not empty, and otherwise at most `limit`: when there are more, or
/// the image would have to be asked more than [`LOOKUPS_MAX`] times, the answer ends early.
///
/// # Errors
/// What the image says when asked.
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

/// The image's extent from `offset` on, which begins there and holds at least a byte, so that
/// whoever walks from one to the next gets to the end.
///
/// # Errors
/// What the image says when asked, or an error of its own beyond the end.
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
    use super::super::memory::{FailingBackend, Faults, MemoryBackend, Op};
    use super::*;
    use proptest::prelude::*;
    use std::sync::Arc;

    const BLOCK: u64 = 4096;

    /// A disk of which the blocks marked true hold data.
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
    fn equal_neighbours_are_one_extent() {
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
    fn the_limit_is_kept_and_the_last_extent_is_whole_all_the_same() {
        let blocks = [true, true, false, true];
        assert_eq!(found(&blocks, 0, 4 * BLOCK, 1), [(0, 2 * BLOCK, true)]);
        assert_eq!(found(&blocks, 0, 4 * BLOCK, 2).len(), 2);
        assert_eq!(found(&blocks, 0, 4 * BLOCK, 3).len(), 3);
        assert_eq!(found(&blocks, 0, 4 * BLOCK, 4).len(), 3);
    }

    #[test]
    fn a_limit_of_none_still_yields_the_one_extent_that_must_be() {
        assert_eq!(found(&[true, false], 0, 2 * BLOCK, 0), [(0, BLOCK, true)]);
    }

    #[test]
    fn an_empty_range_has_no_extents() {
        assert!(found(&[true], BLOCK, 0, 5).is_empty());
    }

    #[test]
    fn an_error_of_the_image_is_the_answer() {
        let faults = Arc::new(Faults::default());
        let image = FailingBackend::new(disk(&[true, false, true]), faults.clone());
        for nth in 1..=3 {
            faults.fail_nth(nth, nix::libc::EIO);
            let error = extents(&image, Range::whole(3 * BLOCK), 9).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(nix::libc::EIO), "operation {nth}");
        }
        assert_eq!(faults.count(Op::Extent), 1 + 2 + 3);
    }

    /// An image whose every answer is the same.
    #[derive(Debug)]
    struct Stuck(Range);
    impl Backend for Stuck {
        fn size(&self) -> u64 {
            BLOCK
        }
        fn read(&self, _: u64, _: &mut [u8]) -> io::Result<()> {
            Ok(())
        }
        fn write(&self, _: u64, _: &[u8], _: bool) -> io::Result<()> {
            Ok(())
        }
        fn zero(&self, _: Range, _: super::super::Zeroing) -> io::Result<()> {
            Ok(())
        }
        fn trim(&self, _: Range) -> io::Result<()> {
            Ok(())
        }
        fn flush(&self) -> io::Result<()> {
            Ok(())
        }
        fn prefetch(&self, _: Range) -> io::Result<()> {
            Ok(())
        }
        fn extent(&self, _: u64) -> io::Result<Extent> {
            Ok(Extent { range: self.0, allocated: true })
        }
    }

    #[test]
    fn an_answer_that_makes_no_sense_is_data_to_the_end() {
        let whole = Range::whole(BLOCK);
        for nonsense in [Range::whole(0), whole.split(10).0, whole] {
            let all = extents(&Stuck(nonsense), whole, 9).unwrap();
            assert_eq!(all, [Extent { range: whole, allocated: true }]);
        }
        assert!(extent_at(&Stuck(whole), BLOCK).is_err());
    }

    fn told(data: nix::Result<u64>, hole: nix::Result<u64>) -> SeekResult {
        let rest = Range::whole(100).from(10);
        ask(rest, |at, whence| {
            assert_eq!(at, 10);
            if matches!(whence, Whence::SeekData) { data } else { hole }
        })
    }

    #[test]
    fn answers_that_make_sense_are_taken() {
        let rest = Range::whole(100).from(10);
        assert_eq!(told(Ok(30), Err(Errno::EIO)), SeekResult::Hole(rest.until(30)));
        assert_eq!(told(Ok(500), Err(Errno::EIO)), SeekResult::Hole(rest));
        assert_eq!(told(Ok(10), Ok(40)), SeekResult::Data(rest.until(40)));
        assert_eq!(told(Ok(10), Ok(500)), SeekResult::Data(rest));
        assert_eq!(told(Err(Errno::ENXIO), Err(Errno::EIO)), SeekResult::NoMore);
        assert_eq!(told(Err(Errno::EINVAL), Ok(40)), SeekResult::Unable(Errno::EINVAL));
    }

    #[test]
    fn backward_and_empty_answers_are_data_to_the_end() {
        let rest = Range::whole(100).from(10);
        for hole in [Ok(10), Ok(9), Ok(0), Err(Errno::ENXIO), Err(Errno::EIO)] {
            assert_eq!(told(Ok(10), hole), SeekResult::Data(rest), "{hole:?}");
        }
        for data in [9, 0] {
            assert_eq!(told(Ok(data), Ok(40)), SeekResult::Data(rest), "{data}");
        }
    }

    #[test]
    fn data_that_is_punched_meanwhile_is_asked_for_again() {
        let asked = std::cell::Cell::new(0);
        let told = ask(Range::whole(100), |_, whence| {
            asked.set(asked.get() + 1);
            Ok(if matches!(whence, Whence::SeekData) && asked.get() > 1 { 50 } else { 0 })
        });
        assert_eq!((told, asked.get()), (SeekResult::Hole(Range::whole(50)), 3));
    }

    #[test]
    fn a_list_of_extents_takes_so_many_lookups_at_most() {
        for (blocks, lookups) in [(LOOKUPS_MAX, LOOKUPS_MAX), (LOOKUPS_MAX + 1, LOOKUPS_MAX)] {
            let faults = Arc::new(Faults::default());
            let image =
                FailingBackend::new(MemoryBackend::new(blocks as u64 * BLOCK), faults.clone());
            let all = extents(&image, Range::whole(image.size()), 9).unwrap();
            assert_eq!(faults.count(Op::Extent), lookups as u64);
            let covered = Range::whole(lookups as u64 * BLOCK);
            assert_eq!(all, [Extent { range: covered, allocated: false }]);
        }
    }

    proptest! {
        #[test]
        fn extents_cover_the_range_and_say_the_truth_of_each_block(
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
