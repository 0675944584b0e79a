//! Sticky write-back errors. The kernel reports a failed write-back to only one of the callers whose
//! fsync waits for it, and the next fsync succeeds; so this remembers the first failure for good.
//! And since the report meant for us may go to a concurrent fsync of another thread, a flush succeeds
//! only once every fsync that was in flight at the same time has reported.

use super::backend::errno_of;
use super::io_queue::Notifier;
use crate::sync::atomic::{AtomicI32, Ordering};
use crate::sync::{self, Condvar, Mutex, MutexGuard};
use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;

/// Is told of the first failed flush of a disk. Sessions call it: it must not block.
pub trait FlushObserver: Send + Sync + std::fmt::Debug {
    /// Written data may be lost, and every flush fails from now on.
    fn flush_failed(&self);
}

/// The outcome of a disk's flushes so far.
#[derive(Debug, Default)]
pub(super) struct FlushErrors {
    /// The errno of the first failure; 0 while there is none.
    failure: AtomicI32,
    observer: Mutex<Option<Arc<dyn FlushObserver>>>,
    in_flight: Mutex<InFlightFlushes>,
    /// For threads that block instead of waiting for a notification.
    ended: Condvar,
}

#[derive(Debug, Default)]
struct InFlightFlushes {
    next: u64,
    numbers: BTreeSet<u64>,
    /// To be notified once no flush below the number is in flight.
    waiters: Vec<(u64, Arc<dyn Notifier>)>,
}

/// Guard held while an fsync is in flight. Drop it only after a failure has been recorded.
#[derive(Debug)]
pub(super) struct FlushGuard<'a> {
    flush_errors: &'a FlushErrors,
    number: u64,
}

/// The flushes that were in flight at one moment: all numbers below this one.
#[derive(Clone, Copy, Debug)]
pub(super) struct ConcurrentFlushes(u64);

impl FlushErrors {
    /// Whether every flush has succeeded so far.
    pub(super) fn all_flushes_succeeded(&self) -> bool {
        self.failure.load(Ordering::Acquire) == 0
    }

    /// Returns the error of the first failed flush, if there was one.
    pub(super) fn check(&self) -> io::Result<()> {
        match self.failure.load(Ordering::Acquire) {
            0 => Ok(()),
            errno => Err(io::Error::from_raw_os_error(errno)),
        }
    }

    /// Has an observer told of the first failure from now on.
    pub(super) fn observe(&self, observer: Arc<dyn FlushObserver>) {
        *sync::lock(&self.observer) = Some(observer);
    }

    /// Records a failure, and returns the first one, which every later flush returns too.
    pub(super) fn record(&self, error: &io::Error) -> io::Error {
        let (new, all) = (errno_of(error), Ordering::AcqRel);
        let first = match self.failure.compare_exchange(0, new, all, Ordering::Acquire) {
            Ok(_) => {
                let observer = sync::lock(&self.observer).clone();
                if let Some(observer) = observer {
                    observer.flush_failed();
                }
                new
            }
            Err(first) => first,
        };
        io::Error::from_raw_os_error(first)
    }

    /// Registers an fsync or a durable write. Call it before the system call.
    pub(super) fn begin_flush(&self) -> FlushGuard<'_> {
        let mut in_flight = self.lock();
        let number = in_flight.next;
        in_flight.next += 1;
        in_flight.numbers.insert(number);
        FlushGuard { flush_errors: self, number }
    }

    /// The flushes in flight now, if there are any; notifies when the last of them has ended.
    pub(super) fn notify_after_concurrent(
        &self,
        notifier: &Arc<dyn Notifier>,
    ) -> Option<ConcurrentFlushes> {
        let mut in_flight = self.lock();
        if in_flight.numbers.is_empty() {
            return None;
        }
        let before = in_flight.next;
        in_flight.waiters.push((before, Arc::clone(notifier)));
        Some(ConcurrentFlushes(before))
    }

    /// Whether all of them have ended.
    pub(super) fn have_ended(&self, concurrent: ConcurrentFlushes) -> bool {
        self.lock().have_ended(concurrent.0)
    }

    /// Blocks until the flushes in flight now have ended.
    pub(super) fn wait_for_concurrent(&self) {
        let mut in_flight = self.lock();
        let before = in_flight.next;
        while !in_flight.have_ended(before) {
            in_flight = sync::wait(&self.ended, in_flight);
        }
    }

    fn lock(&self) -> MutexGuard<'_, InFlightFlushes> {
        sync::lock(&self.in_flight)
    }
}

impl InFlightFlushes {
    fn have_ended(&self, before: u64) -> bool {
        self.numbers.first().is_none_or(|first| *first >= before)
    }
}

impl Drop for FlushGuard<'_> {
    fn drop(&mut self) {
        let mut in_flight = self.flush_errors.lock();
        in_flight.numbers.remove(&self.number);
        self.flush_errors.ended.notify_all();
        let waiters = std::mem::take(&mut in_flight.waiters);
        for (before, notifier) in waiters {
            if in_flight.have_ended(before) {
                notifier.notify();
            } else {
                in_flight.waiters.push((before, notifier));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::slow_backend::TestNotifier;
    use super::*;
    use nix::libc::{EIO, ENOSPC};

    #[test]
    fn the_first_failure_is_returned_for_good() {
        let flush_errors = FlushErrors::default();
        assert!(flush_errors.all_flushes_succeeded() && flush_errors.check().is_ok());
        let record =
            |errno| flush_errors.record(&io::Error::from_raw_os_error(errno)).raw_os_error();
        assert_eq!(record(ENOSPC), Some(ENOSPC));
        assert_eq!(record(EIO), Some(ENOSPC));
        assert_eq!(flush_errors.check().unwrap_err().raw_os_error(), Some(ENOSPC));
        assert!(!flush_errors.all_flushes_succeeded());
    }

    #[derive(Debug, Default)]
    struct CountFailures(std::sync::atomic::AtomicU32);

    impl FlushObserver for CountFailures {
        fn flush_failed(&self) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn the_observer_is_told_of_the_first_failure() {
        let flush_errors = FlushErrors::default();
        let counter = Arc::new(CountFailures::default());
        flush_errors.observe(Arc::clone(&counter) as _);
        for errno in [EIO, ENOSPC] {
            assert_eq!(counter.0.load(Ordering::Relaxed), u32::from(errno != EIO));
            flush_errors.record(&io::Error::from_raw_os_error(errno));
        }
        assert_eq!(counter.0.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn only_flushes_in_flight_at_that_moment_are_awaited() {
        let flush_errors = FlushErrors::default();
        let counter = Arc::new(TestNotifier::default());
        let notifier: Arc<dyn Notifier> = Arc::clone(&counter) as _;
        assert!(flush_errors.notify_after_concurrent(&notifier).is_none());
        let (first, second) = (flush_errors.begin_flush(), flush_errors.begin_flush());
        let concurrent = flush_errors.notify_after_concurrent(&notifier).unwrap();
        let later = flush_errors.begin_flush();
        drop(first);
        assert!(!flush_errors.have_ended(concurrent) && counter.count() == 0);
        drop(second);
        assert!(flush_errors.have_ended(concurrent) && counter.count() == 1);
        drop(later);
        assert_eq!(counter.count(), 1, "one notification for each waiter");
    }
}
