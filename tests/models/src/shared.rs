//! What the threads of a model share beside the files of the program.

use crate::disk::io_queue::Notifier;
use crate::net::Wake;
use loom::cell::UnsafeCell;
use loom::sync::atomic::{AtomicUsize, Ordering};
use std::os::fd::BorrowedFd;

/// Bytes of a disk that are not synchronized by themselves. loom fails a model if an access and a change
/// are not ordered by the code that is modelled.
#[derive(Debug)]
pub struct Bytes(UnsafeCell<()>);

// SAFETY: no pointer to the contents is ever followed, and there are none.
unsafe impl Sync for Bytes {}

impl Default for Bytes {
    fn default() -> Self {
        Self(UnsafeCell::new(()))
    }
}

impl Bytes {
    /// Changes the bytes.
    pub fn change(&self) {
        self.0.with_mut(|_| ());
    }

    /// Reads the bytes.
    pub fn read(&self) {
        self.0.with(|_| ());
    }
}

/// A notifier that a thread can wait for, and that counts.
#[derive(Debug, Default)]
pub struct Counter {
    /// What the notifications set.
    pub wake: Wake,
    count: AtomicUsize,
}

impl Counter {
    /// The notifications so far.
    pub fn count(&self) -> usize {
        self.count.load(Ordering::Acquire)
    }
}

impl Notifier for Counter {
    fn notify(&self) {
        self.count.fetch_add(1, Ordering::AcqRel);
        self.wake.wake();
    }

    fn as_eventfd(&self) -> BorrowedFd<'_> {
        unreachable!("a model has no descriptors")
    }
}
