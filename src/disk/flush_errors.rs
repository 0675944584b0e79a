//! Whether everything that was to be durable is, and who may know better.
//!
//! The kernel tells a failed write-back once, to one of those who wait for it, and calls the next
//! flush a success. So the first failure is remembered for ever. And since another thread may be
//! told what was meant for us, too, a flush has succeeded only when all those who were listening at
//! the same time have said what they heard.

use super::backend::errno_of;
use super::io_queue::Notifier;
use crate::sync;
use std::collections::BTreeSet;
use std::io;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

/// What is known of a disk's flushes.
#[derive(Debug, Default)]
pub(super) struct FlushErrors {
    /// The errno of the first that failed; 0 as long as none has.
    failure: AtomicI32,
    listeners: Mutex<InFlightFlushes>,
    /// Whoever waits here rather than for a bell.
    ended: Condvar,
}

#[derive(Debug, Default)]
struct InFlightFlushes {
    next: u64,
    listening: BTreeSet<u64>,
    /// Who waits until none below this number listens any more.
    waiting: Vec<(u64, Arc<dyn Notifier>)>,
}

/// Somebody whom the kernel may tell of a failure. Dropping it says that whatever was heard has
/// been remembered.
#[derive(Debug)]
pub(super) struct FlushGuard<'a> {
    hearing: &'a FlushErrors,
    number: u64,
}

/// Those who were listening at some moment.
#[derive(Clone, Copy, Debug)]
pub(super) struct ConcurrentFlushes(u64);

impl FlushErrors {
    /// Whether every flush has succeeded so far.
    pub(super) fn all_flushes_succeeded(&self) -> bool {
        self.failure.load(Ordering::Acquire) == 0
    }

    /// Fails as the first failed flush did, if there was one.
    pub(super) fn check(&self) -> io::Result<()> {
        match self.failure.load(Ordering::Acquire) {
            0 => Ok(()),
            errno => Err(io::Error::from_raw_os_error(errno)),
        }
    }

    /// Remembers that data may be lost, and returns what every later flush will say.
    pub(super) fn failed(&self, error: &io::Error) -> io::Error {
        let (new, all) = (errno_of(error), Ordering::AcqRel);
        let first = match self.failure.compare_exchange(0, new, all, Ordering::Acquire) {
            Ok(_) => new,
            Err(first) => first,
        };
        io::Error::from_raw_os_error(first)
    }

    /// To be called before the kernel is asked to make something durable.
    pub(super) fn listen(&self) -> FlushGuard<'_> {
        let mut listeners = self.lock();
        let number = listeners.next;
        listeners.next += 1;
        listeners.listening.insert(number);
        FlushGuard { hearing: self, number }
    }

    /// Those who are listening now, if there are any; `bell` rings when the last of them has ended.
    pub(super) fn ring_after_others(
        &self,
        notifier: &Arc<dyn Notifier>,
    ) -> Option<ConcurrentFlushes> {
        let mut listeners = self.lock();
        if listeners.listening.is_empty() {
            return None;
        }
        let before = listeners.next;
        listeners.waiting.push((before, Arc::clone(notifier)));
        Some(ConcurrentFlushes(before))
    }

    /// Whether all of them have ended.
    pub(super) fn have_ended(&self, others: ConcurrentFlushes) -> bool {
        self.lock().have_ended(others.0)
    }

    /// Waits until those who are listening now have ended.
    pub(super) fn wait_for_others(&self) {
        let mut listeners = self.lock();
        let before = listeners.next;
        while !listeners.have_ended(before) {
            listeners = sync::wait(&self.ended, listeners);
        }
    }

    fn lock(&self) -> MutexGuard<'_, InFlightFlushes> {
        sync::lock(&self.listeners)
    }
}

impl InFlightFlushes {
    fn have_ended(&self, before: u64) -> bool {
        self.listening.first().is_none_or(|first| *first >= before)
    }
}

impl Drop for FlushGuard<'_> {
    fn drop(&mut self) {
        let mut listeners = self.hearing.lock();
        listeners.listening.remove(&self.number);
        self.hearing.ended.notify_all();
        let waiting = std::mem::take(&mut listeners.waiting);
        for (before, notifier) in waiting {
            if listeners.have_ended(before) {
                notifier.notify();
            } else {
                listeners.waiting.push((before, notifier));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::slow::TestNotifier;
    use super::*;
    use nix::libc::{EIO, ENOSPC};

    fn notifier() -> (Arc<TestNotifier>, Arc<dyn Notifier>) {
        let notifier = Arc::new(TestNotifier::default());
        (Arc::clone(&notifier), notifier)
    }

    #[test]
    fn the_first_failure_is_what_everybody_hears_from_then_on() {
        let hearing = FlushErrors::default();
        assert!(hearing.all_flushes_succeeded() && hearing.check().is_ok());
        let says = |errno| hearing.failed(&io::Error::from_raw_os_error(errno)).raw_os_error();
        assert_eq!(says(ENOSPC), Some(ENOSPC));
        assert_eq!(says(EIO), Some(ENOSPC));
        assert_eq!(hearing.check().unwrap_err().raw_os_error(), Some(ENOSPC));
        assert!(!hearing.all_flushes_succeeded());
    }

    #[test]
    fn whoever_listened_at_that_moment_is_waited_for_and_nobody_who_came_later() {
        let hearing = FlushErrors::default();
        let (rung, notifier) = notifier();
        assert!(hearing.ring_after_others(&notifier).is_none());
        let (first, second) = (hearing.listen(), hearing.listen());
        let others = hearing.ring_after_others(&notifier).unwrap();
        let later = hearing.listen();
        drop(first);
        assert!(!hearing.have_ended(others) && rung.count() == 0);
        drop(second);
        assert!(hearing.have_ended(others) && rung.count() == 1);
        drop(later);
        assert_eq!(rung.count(), 1, "rung once for each who waits");
    }
}
