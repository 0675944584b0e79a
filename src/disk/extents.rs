//! Which spans of an image hold data and which are holes.
//! Never claims a hole that the image did not claim, and never looks at bytes.

use super::{Extent, Image};
use crate::range::Range;
use std::io;

/// The extents of `range`, in order, without gaps, clipped to it and with equal neighbours merged.
///
/// At least one for a range that is not empty, and otherwise at most `limit`: when there are more,
/// the answer ends early, at the edge of an extent.
///
/// # Errors
/// What the image says when asked.
pub(super) fn extents(image: &dyn Image, range: Range, limit: usize) -> io::Result<Vec<Extent>> {
    let mut found: Vec<Extent> = Vec::new();
    let mut rest = range;
    while !rest.is_empty() {
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

/// The image's extent from `offset` on, checked to begin there and to hold at least a byte, so
/// that whoever walks from one to the next gets to the end.
///
/// # Errors
/// What the image says when asked, or an error of its own when the answer makes no sense.
pub(super) fn extent_at(image: &dyn Image, offset: u64) -> io::Result<Extent> {
    let extent = image.extent(offset)?;
    if extent.range.offset() == offset && !extent.range.is_empty() {
        Ok(extent)
    } else {
        let message = format!("asked what is at byte {offset}, the image answered {extent:?}");
        Err(io::Error::other(message))
    }
}

#[cfg(test)]
mod tests {
    use super::super::memory::{FailingImage, Faults, MemoryImage, Op};
    use super::*;
    use proptest::prelude::*;
    use std::sync::Arc;

    const BLOCK: u64 = 4096;

    /// A disk of which the blocks marked true hold data.
    fn disk(blocks: &[bool]) -> MemoryImage {
        let image = MemoryImage::new(blocks.len() as u64 * BLOCK);
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
        let image = FailingImage::new(disk(&[true, false, true]), faults.clone());
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
    impl Image for Stuck {
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
    fn an_image_that_answers_nonsense_is_an_error_and_not_an_endless_loop() {
        for nonsense in [Range::whole(0), Range::whole(BLOCK).split(10).0] {
            assert!(extents(&Stuck(nonsense), Range::whole(BLOCK), 9).is_err());
        }
        assert!(extents(&Stuck(Range::whole(BLOCK)), Range::whole(BLOCK), 9).is_ok());
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
