//! Stands for `src/sync.rs`: the same functions, on the locks and atomics of loom.

use loom::sync::WaitTimeoutResult;
use std::time::Duration;

pub use loom::sync::{Condvar, Mutex, MutexGuard};

/// Locks `mutex`.
#[track_caller]
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap()
}

/// Waits for a notification.
#[track_caller]
pub fn wait<'a, T>(condvar: &Condvar, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
    condvar.wait(guard).unwrap()
}

/// Waits for a notification, for any time.
#[track_caller]
pub fn wait_timeout<'a, T>(
    condvar: &Condvar,
    guard: MutexGuard<'a, T>,
    timeout: Duration,
) -> (MutexGuard<'a, T>, WaitTimeoutResult) {
    condvar.wait_timeout(guard, timeout).unwrap()
}

/// The atomics of loom.
pub mod atomic {
    use loom::sync::atomic::fence;
    use std::cell::Cell;

    pub use loom::sync::atomic::{
        AtomicBool, AtomicI32, AtomicI64, AtomicU8, AtomicUsize, Ordering,
    };

    loom::thread_local! {
        /// The thread's last access of an [`AtomicU64`] was sequentially consistent.
        static ORDERED: Cell<bool> = Cell::new(false);
    }

    /// An atomic whose sequentially consistent accesses are ordered with each other. loom treats such
    /// an access as `AcqRel`, which would report orders that cannot occur, but models fences
    /// exactly: so there is one between two such accesses of a thread that follow each other. There is
    /// none where one of the two has a weaker ordering, so that the models find it.
    #[derive(Debug, Default)]
    pub struct AtomicU64(loom::sync::atomic::AtomicU64);

    fn ordered<T>(ordering: Ordering, access: impl FnOnce() -> T) -> T {
        let is_ordered = ordering == Ordering::SeqCst;
        if ORDERED.with(|ordered| ordered.replace(is_ordered)) && is_ordered {
            fence(Ordering::SeqCst);
        }
        access()
    }

    #[allow(missing_docs, reason = "those of the standard library")]
    impl AtomicU64 {
        #[must_use]
        pub fn new(value: u64) -> Self {
            Self(loom::sync::atomic::AtomicU64::new(value))
        }

        #[must_use]
        pub fn load(&self, ordering: Ordering) -> u64 {
            ordered(ordering, || self.0.load(ordering))
        }

        pub fn store(&self, value: u64, ordering: Ordering) {
            ordered(ordering, || self.0.store(value, ordering));
        }

        pub fn fetch_or(&self, bits: u64, ordering: Ordering) -> u64 {
            ordered(ordering, || self.0.fetch_or(bits, ordering))
        }

        pub fn fetch_and(&self, bits: u64, ordering: Ordering) -> u64 {
            ordered(ordering, || self.0.fetch_and(bits, ordering))
        }

        pub fn fetch_sub(&self, value: u64, ordering: Ordering) -> u64 {
            ordered(ordering, || self.0.fetch_sub(value, ordering))
        }

        #[allow(clippy::missing_errors_doc, reason = "those of the standard library")]
        pub fn compare_exchange_weak(
            &self,
            current: u64,
            new: u64,
            success: Ordering,
            failure: Ordering,
        ) -> Result<u64, u64> {
            self.0.compare_exchange_weak(current, new, success, failure)
        }
    }
}
