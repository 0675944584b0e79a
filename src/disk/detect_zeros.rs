//! Writes that do not fill holes with zeros. Before leaving zeros out, this reads the hole to verify
//! that it reads as zeros.
//! Never turns data into a hole, and never writes more often than the number of gaps plus one.

use super::backend::Backend;
use super::extents::extent_at;
use super::op::Extent;
use crate::range::Range;
use std::io;

/// Granularity at which zeros are distinguished from data, in bytes: the block of common file systems.
pub(super) const BLOCK: u64 = 4096;

/// Length of one read that checks for zeros, in bytes.
const CHECK_LENGTH: usize = 16 << 10;

/// One block of zeros, to compare with.
static ZEROS: [u8; BLOCK as usize] = [0; BLOCK as usize];

/// A part of a write whose blocks are all zero, or all non-zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run<'a> {
    /// Its offset on the disk, in bytes.
    pub(super) offset: u64,
    /// Its bytes; never empty.
    pub(super) data: &'a [u8],
    /// Whether all of them are zero.
    pub(super) zero: bool,
}

/// Splits a write of `data` to `offset` into runs, at multiples of [`BLOCK`] on the disk.
///
/// Of a block that the write covers in part, only that part counts. A run of data may contain zeros,
/// but no whole block of them.
pub(super) fn runs(offset: u64, data: &[u8]) -> Runs<'_> {
    Runs { offset, data, next_is_zero: None }
}

/// The iterator that [`runs`] returns.
#[derive(Clone, Debug)]
pub(super) struct Runs<'a> {
    offset: u64,
    data: &'a [u8],
    /// Whether the first block of `data` is zero, if that has been checked already.
    next_is_zero: Option<bool>,
}

impl<'a> Iterator for Runs<'a> {
    type Item = Run<'a>;

    fn next(&mut self) -> Option<Run<'a>> {
        let (offset, data) = (self.offset, self.data);
        let mut length = block_length(offset, data);
        if length == 0 {
            return None;
        }
        let zero = self.next_is_zero.take().unwrap_or_else(|| is_zero(&data[..length]));
        while self.next_is_zero.is_none() && length < data.len() {
            let rest = &data[length..];
            let block = &rest[..block_length(offset + length as u64, rest)];
            if is_zero(block) == zero {
                length += block.len();
            } else {
                self.next_is_zero = Some(!zero);
            }
        }
        (self.offset, self.data) = (offset + length as u64, &data[length..]);
        Some(Run { offset, data: &data[..length], zero })
    }
}

/// How many bytes of `data` lie in the block that contains `offset`.
fn block_length(offset: u64, data: &[u8]) -> usize {
    let to_edge = BLOCK - offset % BLOCK;
    data.len().min(to_edge as usize)
}

/// Whether bytes, of any length, are all zero. The first and the last word are checked first, because
/// they nearly always decide.
#[must_use]
pub fn is_zero(bytes: &[u8]) -> bool {
    const NOTHING: [u8; 8] = [0; 8];
    let may_be = |word: Option<&[u8; 8]>| word.is_none_or(|word| *word == NOTHING);
    may_be(bytes.first_chunk())
        && may_be(bytes.last_chunk())
        && bytes.chunks(ZEROS.len()).all(|block| *block == ZEROS[..block.len()])
}

/// Whether all of `range` reads as zeros; false if it cannot be read.
pub(super) fn reads_as_zeros(image: &dyn Backend, range: Range) -> bool {
    let mut bytes = [0; CHECK_LENGTH];
    let mut rest = range;
    while !rest.is_empty() {
        let (part, after) = rest.split(CHECK_LENGTH as u64);
        // Fits: at most the length of the buffer.
        let bytes = &mut bytes[..part.length() as usize];
        if image.read(part.offset(), bytes).is_err() || !is_zero(bytes) {
            return false;
        }
        rest = after;
    }
    true
}

/// Writes `data` to `offset`, leaving out zeros where the image has a hole.
///
/// The data between two gaps is one write, however many runs it has; without a gap all of it is one.
pub(super) fn write_around_holes(image: &dyn Backend, offset: u64, data: &[u8]) -> io::Result<()> {
    let mut rest = Piece { offset, data };
    for gap in gaps(image, offset, data) {
        let (start, end) = gap?;
        rest.until(start).write(image)?;
        rest = rest.from(end);
    }
    rest.write(image)
}

/// Whether [`write_around_holes`] would leave something out. The zeros of a hole may not be durable:
/// a hole punched a moment ago may hold the old bytes again after a power failure.
pub(super) fn leaves_gaps(image: &dyn Backend, offset: u64, data: &[u8]) -> io::Result<bool> {
    Ok(gaps(image, offset, data).next().transpose()?.is_some())
}

/// The gaps: parts of a write that are zero and lie in holes, as start and end on the disk, in order.
fn gaps<'a>(image: &'a dyn Backend, offset: u64, data: &'a [u8]) -> Gaps<'a> {
    Gaps { map: Map { image, known: None }, runs: runs(offset, data), zeros: (0, 0) }
}

struct Gaps<'a> {
    map: Map<'a>,
    runs: Runs<'a>,
    /// The rest of the current run of zeros.
    zeros: (u64, u64),
}

impl Iterator for Gaps<'_> {
    type Item = io::Result<(u64, u64)>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let (at, end) = self.zeros;
            if at == end {
                let run = self.runs.find(|run| run.zero)?;
                self.zeros = (run.offset, run.offset + run.data.len() as u64);
                continue;
            }
            let extent = match self.map.extent(at) {
                Ok(extent) => extent,
                Err(error) => return Some(Err(error)),
            };
            let next = extent.range.end().min(end);
            self.zeros = (next, end);
            // Read a reported hole to be sure: not every file system reports holes correctly.
            let hole = Range::whole(self.map.image.size()).from(at).until(next);
            if !extent.allocated && reads_as_zeros(self.map.image, hole) {
                return Some(Ok((at, next)));
            }
        }
    }
}

/// Bytes, and their offset on the disk.
#[derive(Clone, Copy)]
struct Piece<'a> {
    offset: u64,
    data: &'a [u8],
}

impl Piece<'_> {
    /// The bytes before `end`, an offset on the disk within this piece.
    fn until(self, end: u64) -> Self {
        Self { data: &self.data[..(end - self.offset) as usize], ..self }
    }

    /// The bytes from `start` on, an offset on the disk within this piece.
    fn from(self, start: u64) -> Self {
        Self { offset: start, data: &self.data[(start - self.offset) as usize..] }
    }

    fn write(self, image: &dyn Backend) -> io::Result<()> {
        if self.data.is_empty() { Ok(()) } else { image.write(self.offset, self.data, false) }
    }
}

/// The image's extents, with the last one cached: most zeros of one write lie in the same extent.
struct Map<'a> {
    image: &'a dyn Backend,
    known: Option<Extent>,
}

impl Map<'_> {
    /// The extent that contains `offset`.
    fn extent(&mut self, offset: u64) -> io::Result<Extent> {
        let holds =
            |extent: &Extent| extent.range.offset() <= offset && offset < extent.range.end();
        match self.known.filter(holds) {
            Some(extent) => Ok(extent),
            None => Ok(*self.known.insert(extent_at(self.image, offset)?)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::FileBackend;
    use super::super::memory_backend::{
        BackendCall, FailingBackend, Faults, InMemory, MemoryBackend,
    };
    use super::*;
    use proptest::prelude::*;
    use std::sync::Arc;

    const ONE: usize = BLOCK as usize;

    fn kinds(offset: u64, data: &[u8]) -> Vec<(u64, usize, bool)> {
        runs(offset, data).map(|run| (run.offset, run.data.len(), run.zero)).collect()
    }

    /// A disk in memory that counts its operations.
    fn counted(blocks: u64) -> (MemoryBackend, FailingBackend, Arc<Faults>) {
        let image = MemoryBackend::new(blocks * BLOCK);
        let faults = Arc::new(Faults::default());
        (image.clone(), FailingBackend::new(image, faults.clone()), faults)
    }

    #[test]
    fn runs_split_at_blocks_of_the_disk() {
        let mut data = vec![0; 2 * ONE];
        data[ONE] = 1;
        assert_eq!(kinds(BLOCK, &data), [(BLOCK, ONE, true), (2 * BLOCK, ONE, false)]);
        assert_eq!(
            kinds(100, &data),
            [(100, ONE - 100, true), (BLOCK, ONE, false), (2 * BLOCK, 100, true)]
        );
    }

    #[test]
    fn a_single_non_zero_byte_anywhere_makes_data() {
        for length in [1, 7, 8, 9, 16, 511, 512, ONE - 1, ONE, ONE + 1, 16 * ONE, 16 * ONE + 5] {
            assert!(is_zero(&vec![0; length]), "length {length}");
            for at in [0, 1, length / 2, length.saturating_sub(9), length - 1] {
                let mut block = vec![0; length];
                block[at.min(length - 1)] = 1;
                assert!(!is_zero(&block), "length {length}, byte {at}");
            }
        }
    }

    #[test]
    fn zeros_into_a_hole_allocate_nothing() {
        let (memory, image, faults) = counted(8);
        assert!(write_around_holes(&image, 0, &vec![0; 8 * ONE]).is_ok());
        assert_eq!(memory.allocated_blocks(), 0);
        assert_eq!(faults.count(BackendCall::Write), 0);
    }

    #[test]
    fn zeros_over_part_of_a_hole_allocate_nothing() {
        let (memory, image, _) = counted(2);
        assert!(write_around_holes(&image, 4000, &[0; 200]).is_ok());
        assert_eq!(memory.allocated_blocks(), 0);
    }

    /// An image that reports everything as a hole.
    #[derive(Debug)]
    struct AllHoles(MemoryBackend);

    impl InMemory for AllHoles {
        fn memory(&self) -> &MemoryBackend {
            &self.0
        }

        fn extent(&self, offset: u64) -> io::Result<Extent> {
            Ok(Extent { range: Range::whole(self.size()).from(offset), allocated: false })
        }
    }

    #[test]
    fn zeros_over_data_reported_as_a_hole_are_written() {
        let memory = MemoryBackend::new(8 * BLOCK);
        memory.write(0, &vec![9; 6 * ONE], false).unwrap();
        let image = AllHoles(memory.clone());
        assert!(!leaves_gaps(&image, 100, &vec![0; 2 * ONE]).unwrap());
        write_around_holes(&image, 100, &vec![0; 5 * ONE]).unwrap();
        let mut expected = vec![9; 8 * ONE];
        expected[100..5 * ONE + 100].fill(0);
        expected[6 * ONE..].fill(0);
        assert!(memory.contents() == expected);
        write_around_holes(&image, 6 * BLOCK, &vec![0; 2 * ONE]).unwrap();
        assert_eq!(memory.allocated_blocks(), 6, "a real hole stays one");
    }

    #[test]
    fn zeros_over_data_are_written() {
        let (memory, image, _) = counted(2);
        memory.write(0, &vec![9; 2 * ONE], false).unwrap();
        assert!(write_around_holes(&image, 100, &vec![0; ONE]).is_ok());
        let mut expected = vec![9; 2 * ONE];
        expected[100..ONE + 100].fill(0);
        assert!(memory.contents() == expected);
    }

    #[test]
    fn a_write_without_gaps_is_issued_once() {
        let folder = tempfile::tempdir().unwrap();
        let file = FileBackend::create(
            &folder.path().join("disk"),
            64 * BLOCK,
            crate::disk::Access::default(),
        )
        .unwrap();
        file.write(0, &vec![9; 64 * ONE], false).unwrap();
        let faults = Arc::new(Faults::default());
        let image = FailingBackend::new(file, faults.clone());
        let mut striped = vec![0; 64 * ONE];
        striped.chunks_mut(2 * ONE).for_each(|two| two[0] = 1);
        assert!(!leaves_gaps(&image, 0, &striped).unwrap());
        assert_eq!((faults.count(BackendCall::Write), faults.count(BackendCall::Extent)), (0, 1));
        assert!(write_around_holes(&image, 0, &striped).is_ok());
        assert_eq!((faults.count(BackendCall::Write), faults.count(BackendCall::Extent)), (1, 2));
        let mut found = vec![5; 64 * ONE];
        image.read(0, &mut found).unwrap();
        assert!(found == striped);
    }

    #[test]
    fn data_without_zeros_looks_up_no_extent() {
        let (_, image, faults) = counted(4);
        assert!(write_around_holes(&image, 5, &vec![1; 3 * ONE]).is_ok());
        assert_eq!((faults.count(BackendCall::Extent), faults.count(BackendCall::Write)), (0, 1));
    }

    #[test]
    fn only_zeros_in_a_hole_are_gaps() {
        let (memory, image, faults) = counted(4);
        let mut data = vec![0; 3 * ONE];
        data[2 * ONE] = 1;
        assert!(leaves_gaps(&image, 0, &data).unwrap());
        assert!(!leaves_gaps(&image, 2 * BLOCK, &data[2 * ONE..]).unwrap());
        assert!(!leaves_gaps(&image, 0, &[]).unwrap());
        memory.write(0, &vec![9; 3 * ONE], false).unwrap();
        assert!(!leaves_gaps(&image, 0, &data).unwrap());
        assert_eq!(faults.count(BackendCall::Write), 0);
    }

    proptest! {
        #[test]
        fn runs_cover_every_byte_and_classify_zeros(
            offset in 0u64..3 * BLOCK, length in 0..5 * ONE,
            marks in prop::collection::vec(0..5 * ONE, 0..4),
        ) {
            let mut data = vec![0u8; length];
            marks.iter().filter(|at| **at < length).for_each(|at| data[*at] = 1);
            let mut at = offset;
            let mut last = None;
            for run in runs(offset, &data) {
                prop_assert!(run.offset == at && !run.data.is_empty());
                prop_assert_ne!(last, Some(run.zero));
                let start = (at - offset) as usize;
                prop_assert_eq!(run.data.as_ptr(), data[start..].as_ptr());
                at += run.data.len() as u64;
                last = Some(run.zero);
                prop_assert!(at == offset + length as u64 || at % BLOCK == 0);
                for block in run.data[..].chunks(ONE).filter(|_| run.zero) {
                    prop_assert!(block.iter().all(|byte| *byte == 0));
                }
            }
            prop_assert_eq!(at, offset + length as u64);
            for mark in marks.iter().filter(|at| **at < length) {
                let place = offset + *mark as u64;
                let run = runs(offset, &data).find(|run| place < run.offset + run.data.len() as u64);
                prop_assert!(run.is_some_and(|run| !run.zero));
            }
        }

        #[test]
        fn writes_around_holes_read_back_and_fill_none(
            before in prop::collection::vec(any::<bool>(), 6),
            filled in prop::collection::vec(any::<bool>(), 6),
            offset in 0u64..2 * BLOCK, length in 0..4 * ONE,
        ) {
            let (memory, image, _) = counted(6);
            for block in before.iter().enumerate().filter(|(_, data)| **data).map(|(at, _)| at) {
                memory.write(block as u64 * BLOCK, &vec![9; ONE], false).unwrap();
            }
            let mut expected = memory.contents();
            let data: Vec<u8> = (0..length)
                .map(|at| u8::from(filled[(offset as usize + at) / ONE]))
                .collect();
            prop_assert!(write_around_holes(&image, offset, &data).is_ok());
            expected[offset as usize..][..length].copy_from_slice(&data);
            prop_assert!(memory.contents() == expected);
            for (block, bytes) in expected.chunks(ONE).enumerate() {
                let at = block as u64 * BLOCK;
                let is_hole = !memory.extent(at).unwrap().allocated;
                let may_be_hole = !before[block] && bytes.iter().all(|byte| *byte == 0);
                prop_assert_eq!(is_hole, may_be_hole, "block {}", block);
            }
        }
    }
}
