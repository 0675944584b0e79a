//! Models of `src/disk/flush_errors.rs`.

use super::Notifier;
use super::flush_errors::FlushErrors;
use crate::explore::{explore, explore_preempted};
use crate::shared::Counter;
use loom::sync::atomic::{AtomicBool, Ordering};
use loom::thread;
use nix::errno::Errno;
use std::io;
use std::sync::Arc;

/// A disk of which a write-back has failed. The kernel reports that to one fsync only.
#[derive(Debug)]
struct Disk {
    flush_errors: FlushErrors,
    is_unreported: AtomicBool,
}

impl Disk {
    fn new() -> Arc<Self> {
        let is_unreported = AtomicBool::new(true);
        Arc::new(Self { flush_errors: FlushErrors::default(), is_unreported })
    }

    fn fsync(&self) -> io::Result<()> {
        let failed = self.is_unreported.swap(false, Ordering::AcqRel);
        if failed { Err(Errno::EIO.into()) } else { Ok(()) }
    }

    /// As `Disk::write_back`.
    fn write_back(&self) -> io::Result<()> {
        let _guard = self.flush_errors.begin_flush();
        self.fsync().map_err(|error| self.flush_errors.record(&error))
    }

    /// As `Visit::flush`.
    fn flush(&self) -> io::Result<()> {
        self.flush_errors.check()?;
        self.write_back()?;
        self.flush_errors.wait_for_concurrent();
        self.flush_errors.check()
    }

    /// As `InFlight` does: sleeps until the concurrent flushes have ended.
    fn flush_when_notified(&self) -> io::Result<()> {
        let counter = Arc::new(Counter::default());
        let notifier: Arc<dyn Notifier> = Arc::clone(&counter) as _;
        self.flush_errors.check()?;
        self.write_back()?;
        if let Some(flushes) = self.flush_errors.notify_after_concurrent(&notifier) {
            while !self.flush_errors.have_ended(flushes) {
                counter.wake.wait();
                counter.wake.clear();
            }
        }
        self.flush_errors.check()
    }
}

/// Found: no wait for concurrent flushes; a guard that is dropped before the failure is recorded; no
/// notification of `ended`; a failure that is recorded only in the result of one flush.
pub fn failure_is_reported_to_every_blocking_flush() {
    explore(|| {
        let disk = Disk::new();
        let other = {
            let disk = Arc::clone(&disk);
            thread::spawn(move || disk.flush())
        };
        assert!(disk.flush().is_err());
        assert!(other.join().unwrap().is_err());
    });
}

/// Found: `notify_after_concurrent` that does not add the waiter; `have_ended` that compares with the
/// wrong number; a guard that does not notify.
pub fn failure_is_reported_to_every_notified_flush() {
    explore(|| {
        let disk = Disk::new();
        let other = {
            let disk = Arc::clone(&disk);
            thread::spawn(move || disk.flush_when_notified())
        };
        assert!(disk.flush_when_notified().is_err());
        assert!(other.join().unwrap().is_err());
    });
}

/// Three flushes; a waiter may have to wait for two others, of which one ends first.
///
/// Found: a waiter that is dropped when the first of two flushes ends.
pub fn failure_is_reported_to_three_flushes() {
    explore_preempted(3, || {
        let disk = Disk::new();
        let others = [(); 2].map(|()| {
            let disk = Arc::clone(&disk);
            thread::spawn(move || disk.flush())
        });
        assert!(disk.flush_when_notified().is_err());
        for other in others {
            assert!(other.join().unwrap().is_err());
        }
    });
}
