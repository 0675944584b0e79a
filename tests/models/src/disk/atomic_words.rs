//! Stands for `src/disk/atomic_words.rs`, which views anonymous memory as atomics.

use crate::sync::atomic::AtomicU64;
use std::io;

/// Words that are zero at first.
#[derive(Debug)]
pub(super) struct AtomicWords(Vec<AtomicU64>);

impl AtomicWords {
    pub(super) fn new(len: u64) -> io::Result<Self> {
        Ok(Self((0..len).map(|_| AtomicU64::new(0)).collect()))
    }

    pub(super) fn len(&self) -> u64 {
        self.0.len() as u64
    }

    pub(super) fn get(&self, index: u64) -> &AtomicU64 {
        &self.0[index as usize]
    }
}
