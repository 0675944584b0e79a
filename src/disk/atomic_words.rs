//! Anonymous memory viewed as atomic words: the memory of the dirty bitmap. Untouched pages cost
//! nothing.

use crate::sync::atomic::AtomicU64;
use memmap2::{MmapMut, MmapOptions};
use std::io;

/// Words that are zero at first.
#[derive(Debug)]
pub(super) struct AtomicWords {
    memory: MmapMut,
    len: u64,
}

impl AtomicWords {
    pub(super) fn new(len: u64) -> io::Result<Self> {
        let bytes = usize::try_from(len.max(1) * 8).map_err(io::Error::other)?;
        let memory = MmapOptions::new().len(bytes).no_reserve_swap().map_anon()?;
        Ok(Self { memory, len })
    }

    pub(super) fn len(&self) -> u64 {
        self.len
    }

    pub(super) fn get(&self, index: u64) -> &AtomicU64 {
        assert!(index < self.len, "word beyond the end of the bitmap");
        // SAFETY: `index < len`, so the eight bytes lie inside the mapping, which lives as long
        // as `self`; a mapping starts on a page boundary, so every word is aligned; and all accesses
        // to these bytes go through the atomics returned here.
        unsafe { &*self.memory.as_ptr().cast::<AtomicU64>().add(index as usize) }
    }
}
