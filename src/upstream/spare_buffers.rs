//! Buffers of changes that are flushed, for the writes to come: new memory costs the kernel more than a copy.
//! Pure. The machine bounds them together with the changes that are not flushed.

use crate::disk::Buffer;
use std::sync::Arc;

/// Smallest buffer to keep, in bytes: the allocator has smaller ones at hand.
/// Small in unit tests, whose writes are.
const SPARE_MIN: usize = if cfg!(test) { 512 } else { 32 << 10 };

/// Buffers that nothing refers to.
#[derive(Debug, Default)]
pub(super) struct SpareBuffers {
    buffers: Vec<Buffer>,
    bytes: u64,
}

impl SpareBuffers {
    /// Bytes of memory that they take.
    #[cfg(test)]
    pub(super) fn memory(&self) -> u64 {
        self.bytes
    }

    /// Keeps a buffer, if this is the only reference to it.
    pub(super) fn put(&mut self, buffer: Arc<Buffer>) {
        if let Some(buffer) = Arc::into_inner(buffer)
            && buffer.capacity() >= SPARE_MIN
        {
            self.bytes += buffer.capacity() as u64;
            self.buffers.push(buffer);
        }
    }

    /// Takes the one that was put last: a part of it may still be in a cache of the processor.
    pub(super) fn take(&mut self) -> Option<Buffer> {
        let buffer = self.buffers.pop()?;
        self.bytes -= buffer.capacity() as u64;
        Some(buffer)
    }

    /// Frees buffers until the rest takes at most so many bytes.
    pub(super) fn shrink_to(&mut self, bytes: u64) {
        while self.bytes > bytes && self.take().is_some() {}
        if self.buffers.is_empty() {
            self.buffers = Vec::new();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn buffer(length: usize) -> Arc<Buffer> {
        Arc::new(Buffer::zeroed(length, 1).unwrap())
    }

    #[test]
    fn large_buffers_without_another_reference_are_kept() {
        let mut spares = SpareBuffers::default();
        let shared = buffer(SPARE_MIN);
        spares.put(Arc::clone(&shared));
        spares.put(Arc::new(Buffer::from(vec![0; SPARE_MIN - 1].into_boxed_slice().into_vec())));
        assert!(spares.take().is_none());
        spares.put(shared);
        assert!(spares.memory() >= SPARE_MIN as u64);
        assert_eq!(spares.take().unwrap().len(), SPARE_MIN);
        assert_eq!(spares.memory(), 0);
    }

    #[test]
    fn no_more_is_kept_than_the_bound() {
        let mut spares = SpareBuffers::default();
        for _ in 0..8 {
            spares.put(Arc::new(Buffer::from(vec![0; SPARE_MIN].into_boxed_slice().into_vec())));
        }
        let each = SPARE_MIN as u64;
        for (bound, kept) in [(8 * each, 8 * each), (8 * each - 1, 7 * each), (0, 0)] {
            spares.shrink_to(bound);
            assert_eq!(spares.memory(), kept);
        }
    }
}
