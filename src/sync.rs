//! Locks and waits that ignore poisoning, and the atomics of the standard library.
//!
//! Modules that are checked by the models in `tests/models` import their locks and atomics from here:
//! the models compile the same files with other ones.
//!
//! The standard library poisons a lock whose holder panics, because the value may be half changed. Code
//! under our locks does not panic between two changes that belong together; and a panic ends only the
//! thread of one session or one command, so the locks must stay usable for the other threads.

use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, WaitTimeoutResult};
use std::time::Duration;

pub use std::sync::{Condvar, Mutex, MutexGuard, atomic};

/// Locks `mutex`, as [`Mutex::lock`] does.
pub fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Locks `lock` for reading, as [`RwLock::read`] does.
pub fn read<T: ?Sized>(lock: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

/// Locks `lock` for writing, as [`RwLock::write`] does.
pub fn write<T: ?Sized>(lock: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}

/// Waits for a notification of `condvar`, as [`Condvar::wait`] does: it may also return without one.
pub fn wait<'a, T>(condvar: &Condvar, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
    condvar.wait(guard).unwrap_or_else(PoisonError::into_inner)
}

/// Waits for a notification of `condvar` for at most `timeout`, as [`Condvar::wait_timeout`] does.
pub fn wait_timeout<'a, T>(
    condvar: &Condvar,
    guard: MutexGuard<'a, T>,
    timeout: Duration,
) -> (MutexGuard<'a, T>, WaitTimeoutResult) {
    condvar.wait_timeout(guard, timeout).unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    #[test]
    fn a_lock_stays_usable_after_its_holder_panicked() {
        let (mutex, rwlock, condvar) = (Mutex::new(1), RwLock::new(1), Condvar::new());
        thread::scope(|scope| {
            let holder = scope.spawn(|| {
                let _held = (lock(&mutex), write(&rwlock));
                std::panic::resume_unwind(Box::new(()));
            });
            assert!(holder.join().is_err());
        });
        assert!(mutex.is_poisoned() && rwlock.is_poisoned());
        assert_eq!((*lock(&mutex), *read(&rwlock)), (1, 1));
        *write(&rwlock) = 2;
        let (guard, result) = wait_timeout(&condvar, lock(&mutex), Duration::ZERO);
        assert!(result.timed_out());
        drop(guard);
    }
}
