//! The backends that a disk has had, of which the last one is used.
//! Never drops one before the disk: sessions refer to it for as long as they have an I/O queue of it.

use super::backend::Backend;
use std::sync::{Arc, OnceLock};

/// A list that only grows, so that references into it stay valid without a lock.
#[derive(Debug)]
pub(super) struct Backends {
    backend: Arc<dyn Backend>,
    next: OnceLock<Box<Self>>,
}

impl Backends {
    pub(super) fn new(backend: Arc<dyn Backend>) -> Self {
        Self { backend, next: OnceLock::new() }
    }

    /// The last backend.
    pub(super) fn current(&self) -> &Arc<dyn Backend> {
        let mut last = self;
        while let Some(next) = last.next.get() {
            last = next;
        }
        &last.backend
    }

    /// Appends a backend. Another thread may append one at the same time.
    pub(super) fn push(&self, backend: Arc<dyn Backend>) {
        let mut new = Box::new(Self::new(backend));
        let mut last = self;
        loop {
            match last.next.set(new) {
                Ok(()) => return,
                Err(returned) => new = returned,
            }
            match last.next.get() {
                Some(next) => last = next,
                None => return,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::memory_backend::MemoryBackend;
    use super::*;

    #[test]
    fn the_last_backend_is_current_and_earlier_ones_stay() {
        let backend = || Arc::new(MemoryBackend::new(512)) as Arc<dyn Backend>;
        let (first, second, third) = (backend(), backend(), backend());
        let backends = Backends::new(Arc::clone(&first));
        let old = backends.current();
        backends.push(Arc::clone(&second));
        assert!(Arc::ptr_eq(old, &first) && Arc::ptr_eq(backends.current(), &second));
        backends.push(Arc::clone(&third));
        assert!(Arc::ptr_eq(backends.current(), &third));
        assert_eq!(Arc::strong_count(&first), 2);
    }
}
