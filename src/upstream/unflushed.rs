//! The changes that a server has acknowledged and not yet flushed. They have to be written again if that
//! server is lost, because it may have kept them in memory only.
//! Pure. Holds data by reference, and counts every byte that it keeps from being freed.

#[cfg(test)]
use super::mutation::{self, UpstreamMutation};
use super::spare_buffers::SpareBuffers;
use crate::disk::Buffer;
use crate::range::Range;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

/// What a segment counts in addition to its data, in bytes: its entries in the maps.
pub(super) const SEGMENT_OVERHEAD: u64 = 256;

/// The last acknowledged content of disjoint segments of the disk.
#[derive(Debug, Default)]
pub(super) struct Unflushed {
    /// By the offset of the first byte. No two overlap.
    segments: BTreeMap<u64, Segment>,
    buffers: SegmentBuffers,
}

/// The buffers that segments refer to.
#[derive(Debug, Default)]
struct SegmentBuffers {
    by_id: HashMap<u64, SegmentBuffer>,
    next: u64,
    /// Bytes that they take.
    bytes: u64,
    /// Those to which no segment refers any more.
    spares: SpareBuffers,
}

/// The content of a segment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum UnflushedContent {
    /// These bytes of a buffer.
    Data {
        /// The buffer of the write.
        data: Arc<Buffer>,
        /// Where the bytes of the segment begin in it.
        at: usize,
    },
    /// Zeros.
    Zeros {
        /// See [`crate::disk::Zeroing::keep_allocated`].
        keep_allocated: bool,
    },
}

#[derive(Debug)]
struct Segment {
    end: u64,
    /// When it was acknowledged.
    stamp: u64,
    kind: SegmentKind,
}

#[derive(Clone, Copy, Debug)]
enum SegmentKind {
    Data { buffer: u64, at: usize },
    Zeros { keep_allocated: bool },
}

#[derive(Debug)]
struct SegmentBuffer {
    data: Arc<Buffer>,
    segments: usize,
}

impl Unflushed {
    /// Bytes of memory that the segments take.
    #[must_use]
    pub(super) fn memory(&self) -> u64 {
        self.buffers.bytes + self.segments.len() as u64 * SEGMENT_OVERHEAD
    }

    /// The buffers of segments that are gone.
    pub(super) fn spares(&mut self) -> &mut SpareBuffers {
        &mut self.buffers.spares
    }

    /// Bytes of memory that those buffers take.
    #[cfg(test)]
    pub(super) fn spare_memory(&self) -> u64 {
        self.buffers.spares.memory()
    }

    /// Whether there is no segment.
    #[must_use]
    pub(super) fn is_empty(&self) -> bool {
        self.segments.is_empty()
    }

    /// An acknowledged write of `data` to `offset`.
    pub(super) fn write(&mut self, offset: u64, data: Arc<Buffer>, stamp: u64) {
        let length = data.len() as u64;
        self.forget_range(offset, offset + length);
        if length == 0 {
            return;
        }
        let buffer = self.buffers.add(data);
        let kind = SegmentKind::Data { buffer, at: 0 };
        self.segments.insert(offset, Segment { end: offset + length, stamp, kind });
    }

    /// An acknowledged zeroing of `range`.
    pub(super) fn zero(&mut self, range: Range, keep_allocated: bool, stamp: u64) {
        self.forget_range(range.offset(), range.end());
        if !range.is_empty() {
            let kind = SegmentKind::Zeros { keep_allocated };
            self.segments.insert(range.offset(), Segment { end: range.end(), stamp, kind });
        }
    }

    /// The content of `range` need not be written again: it is durable, or it was trimmed.
    pub(super) fn forget(&mut self, range: Range) {
        self.forget_range(range.offset(), range.end());
    }

    /// Everything acknowledged up to `stamp` is durable.
    pub(super) fn flushed(&mut self, stamp: u64) {
        let buffers = &mut self.buffers;
        self.segments.retain(|_, segment| {
            let stays = segment.stamp > stamp;
            if !stays {
                buffers.release(segment.kind);
            }
            stays
        });
    }

    /// The first segment that ends behind `offset`, from there on.
    #[must_use]
    pub(super) fn next(&self, offset: u64) -> Option<(u64, u64, UnflushedContent)> {
        let before = self.segments.range(..=offset).next_back();
        let inside = before.filter(|(_, segment)| segment.end > offset);
        let (&start, segment) = inside.or_else(|| self.segments.range(offset..).next())?;
        let from = start.max(offset);
        let content = match segment.kind {
            SegmentKind::Zeros { keep_allocated } => UnflushedContent::Zeros { keep_allocated },
            SegmentKind::Data { buffer, at } => {
                let data = Arc::clone(&self.buffers.by_id.get(&buffer)?.data);
                // Fits: it is inside the buffer.
                UnflushedContent::Data { data, at: at + (from - start) as usize }
            }
        };
        Some((from, segment.end, content))
    }

    fn forget_range(&mut self, start: u64, end: u64) {
        if start >= end {
            return;
        }
        let before = self.segments.range(..start).next_back();
        if let Some((&first, segment)) = before
            && segment.end > start
        {
            self.cut(first, start, end);
        }
        while let Some((&first, segment)) = self.segments.range(start..end).next() {
            if segment.end > end {
                return self.cut(first, start, end);
            }
            if let Some(segment) = self.segments.remove(&first) {
                self.buffers.release(segment.kind);
            }
        }
    }

    /// Cuts `start..end` out of the segment that begins at `first`.
    fn cut(&mut self, first: u64, start: u64, end: u64) {
        let Some(segment) = self.segments.remove(&first) else { return };
        let Segment { end: last, stamp, kind } = segment;
        let mut keep = |from: u64, to: u64| {
            let kind = match kind {
                SegmentKind::Data { buffer, at } => {
                    if let Some(shared) = self.buffers.by_id.get_mut(&buffer) {
                        shared.segments += 1;
                    }
                    #[cfg(test)]
                    let first = if mutation::is_active(UpstreamMutation::MisplaceRest) {
                        from
                    } else {
                        first
                    };
                    // Fits: it is inside the buffer.
                    SegmentKind::Data { buffer, at: at + (from - first) as usize }
                }
                zeros @ SegmentKind::Zeros { .. } => zeros,
            };
            self.segments.insert(from, Segment { end: to, stamp, kind });
        };
        if first < start {
            keep(first, start);
        }
        if end < last {
            keep(end, last);
        }
        self.buffers.release(kind);
    }
}

impl SegmentBuffers {
    /// Adds the buffer of a new segment. Returns its id.
    fn add(&mut self, data: Arc<Buffer>) -> u64 {
        let id = self.next;
        self.next += 1;
        self.bytes += data.capacity() as u64;
        self.by_id.insert(id, SegmentBuffer { data, segments: 1 });
        id
    }

    /// Releases the buffer of a segment that no longer exists, if no other segment refers to it.
    fn release(&mut self, kind: SegmentKind) {
        let SegmentKind::Data { buffer, .. } = kind else { return };
        let Some(shared) = self.by_id.get_mut(&buffer) else { return };
        shared.segments -= 1;
        if shared.segments == 0
            && let Some(shared) = self.by_id.remove(&buffer)
        {
            self.bytes -= shared.data.capacity() as u64;
            self.spares.put(shared.data);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: usize = 200;

    fn buffer(bytes: &[u8]) -> Arc<Buffer> {
        Arc::new(Buffer::copy_of(bytes, 1).unwrap())
    }

    fn range(offset: usize, length: usize) -> Range {
        Range::within(SIZE as u64, offset as u64, length as u64).unwrap()
    }

    /// The bytes that would be written again, and when they were acknowledged.
    fn contents(unflushed: &Unflushed) -> Vec<Option<u8>> {
        let mut all = vec![None; SIZE];
        let mut offset = 0;
        while let Some((start, end, content)) = unflushed.next(offset) {
            assert!(start >= offset && end > start, "{start}..{end} from {offset}");
            for byte in start..end {
                all[byte as usize] = Some(match &content {
                    UnflushedContent::Data { data, at } => data[at + (byte - start) as usize],
                    UnflushedContent::Zeros { .. } => 0,
                });
            }
            offset = end;
        }
        all
    }

    #[test]
    fn the_last_acknowledged_bytes_are_written_again() {
        for seed in 0..300 {
            let mut rng = fastrand::Rng::with_seed(seed);
            let mut unflushed = Unflushed::default();
            let mut model: Vec<Option<(u8, u64)>> = vec![None; SIZE];
            for stamp in 1..60 {
                let offset = rng.usize(..SIZE);
                let length = rng.usize(..=(SIZE - offset).min(40));
                let mut bytes = vec![0; length];
                match rng.u8(..10) {
                    0..6 => {
                        bytes.fill_with(|| rng.u8(1..));
                        unflushed.write(offset as u64, buffer(&bytes), stamp);
                        for (at, byte) in bytes.iter().enumerate() {
                            model[offset + at] = Some((*byte, stamp));
                        }
                    }
                    6 => {
                        unflushed.zero(range(offset, length), rng.bool(), stamp);
                        model[offset..offset + length].fill(Some((0, stamp)));
                    }
                    7 => {
                        unflushed.forget(range(offset, length));
                        model[offset..offset + length].fill(None);
                    }
                    _ => {
                        let flushed = rng.u64(..=stamp);
                        unflushed.flushed(flushed);
                        for byte in &mut model {
                            *byte = byte.filter(|(_, stamp)| *stamp > flushed);
                        }
                    }
                }
                let expected: Vec<_> =
                    model.iter().map(|byte| byte.map(|(byte, _)| byte)).collect();
                assert_eq!(contents(&unflushed), expected, "seed {seed}, step {stamp}");
            }
            unflushed.flushed(u64::MAX);
            assert_eq!((unflushed.memory(), unflushed.is_empty()), (0, true), "seed {seed}");
        }
    }

    #[test]
    fn a_buffer_counts_until_its_last_segment_is_gone() {
        let mut unflushed = Unflushed::default();
        let bytes = buffer(&[1; 100]);
        let size = bytes.capacity() as u64;
        unflushed.write(0, bytes, 1);
        assert_eq!(unflushed.memory(), size + SEGMENT_OVERHEAD);
        unflushed.zero(range(10, 80), false, 2);
        assert_eq!(unflushed.memory(), size + 3 * SEGMENT_OVERHEAD);
        unflushed.forget(range(0, 10));
        assert_eq!(unflushed.memory(), size + 2 * SEGMENT_OVERHEAD);
        unflushed.forget(range(90, 10));
        assert_eq!(unflushed.memory(), SEGMENT_OVERHEAD);
    }

    #[test]
    fn a_segment_continues_from_the_middle() {
        let mut unflushed = Unflushed::default();
        unflushed.write(10, buffer(&[1, 2, 3, 4]), 1);
        let (start, end, content) = unflushed.next(12).unwrap();
        let UnflushedContent::Data { data, at } = content else { panic!("{content:?}") };
        assert_eq!((start, end, &data[at..]), (12, 14, &[3, 4][..]));
        assert_eq!(unflushed.next(14), None);
    }
}
