//! A failed flush of the disk that this process serves: tells the operator, and writes it to the
//! record, so that later processes know of it. Never decides what clients are answered; the disk does.

use super::events::ProcessEvent;
use crate::disk::FlushObserver;
use crate::disk::ownership::{Provenance, Record};
use crate::disk::record_store::{RecordStore, RecordStoreError};
use crate::human::utc;
use crate::memory_reserve::check_thread_headroom;
use crate::message_id;
use crate::sync::{self, lock};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};
use tracing::warn;

/// Attempts to write the record, and the time between them.
const RECORD_TRIES: u32 = 5;
const RETRY_EVERY: Duration = Duration::from_secs(1);

/// Reports the first failed flush to the event loop.
#[derive(Debug)]
pub(super) struct FlushFailureSender(pub(super) Sender<ProcessEvent>);

impl FlushObserver for FlushFailureSender {
    fn flush_failed(&self) {
        let _ = self.0.send(ProcessEvent::FlushFailed);
    }
}

/// Whether a flush of the disk has failed, in this process or an earlier one.
#[derive(Debug)]
pub(super) struct FlushFailure {
    image: String,
    provenance: Provenance,
    /// Time of the first failure in seconds since 1970; 0 while there is none.
    since: AtomicU64,
    /// Whether one has failed in this process.
    is_new: AtomicBool,
    recording: Mutex<Recording>,
    recorded: Condvar,
}

/// How far the record of a failure has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Recording {
    /// Not begun, or needless.
    Idle,
    /// A thread writes it.
    Active,
    /// It was written, or could not be.
    Done,
}

impl FlushFailure {
    /// For a disk whose record tells of an earlier failure, or of none.
    pub(super) fn new(image: String, provenance: Provenance, earlier: Option<u64>) -> Arc<Self> {
        Arc::new(Self {
            image,
            provenance,
            since: AtomicU64::new(earlier.unwrap_or(0)),
            is_new: AtomicBool::new(false),
            recording: Mutex::new(Recording::Idle),
            recorded: Condvar::new(),
        })
    }

    /// Time of the first failure in seconds since 1970.
    pub(super) fn since(&self) -> Option<u64> {
        Some(self.since.load(Ordering::Acquire)).filter(|since| *since > 0)
    }

    /// Why the disk is not moved away, if a flush has failed.
    pub(super) fn refusal(&self) -> Option<String> {
        let since = utc(self.since()?);
        let image = &self.image;
        Some(format!(
            "a flush of {image} failed at {since}, so that data may be lost: check the disk, stop the \
             server, run `flexnbd adopt -f {image}`, and start it again"
        ))
    }

    /// A flush has failed in this process, `now`, in seconds since 1970. Logs the first failure.
    pub(super) fn failed(&self, now: u64) {
        if self.is_new.swap(true, Ordering::AcqRel) {
            return;
        }
        // An earlier process may have recorded a failure.
        let _ = self.since.compare_exchange(0, now, Ordering::AcqRel, Ordering::Acquire);
        let image = &self.image;
        warn!(
            message_id = message_id::FLUSH_FAILED,
            "flexnbd.image" = image,
            "a flush of {image} has failed: data may be lost. Every flush fails until the server is \
             restarted; check the storage and the disk"
        );
    }

    /// Has a thread write the record if a flush has failed in this process, unless one has begun. The
    /// caller makes sure that no migration writes records meanwhile.
    pub(super) fn record(self: &Arc<Self>, record_store: &RecordStore) {
        let mut recording = lock(&self.recording);
        let is_due = self.is_new.load(Ordering::Acquire) && *recording == Recording::Idle;
        let Some(since) = self.since().filter(|_| is_due) else { return };
        let record = Record::FlushFailed { provenance: self.provenance, since };
        let failure = Arc::clone(self);
        let write = |record_store: RecordStore| {
            let write = move || {
                if let Err(error) = write_repeatedly(&record_store, &record) {
                    failure.warn_unrecorded(&error.to_string());
                }
                *lock(&failure.recording) = Recording::Done;
                failure.recorded.notify_all();
            };
            let builder = thread::Builder::new().name("recording".into());
            check_thread_headroom().and_then(|()| builder.spawn(write)).map_err(|e| e.to_string())
        };
        let started = record_store.reopen().map_err(|error| error.to_string()).and_then(write);
        *recording = match started {
            Ok(_) => Recording::Active,
            Err(why) => {
                self.warn_unrecorded(&why);
                Recording::Done
            }
        };
    }

    fn warn_unrecorded(&self, why: &str) {
        warn!(
            message_id = message_id::MIGRATION_RECORD_FAILED,
            "flexnbd.image" = self.image,
            "the failed flush cannot be recorded, and the next process will not know of it: {why}"
        );
    }

    /// Waits until the record is written, if that has begun; not beyond the deadline.
    pub(super) fn wait_until_recorded(&self, deadline: Instant) {
        let mut recording = lock(&self.recording);
        while *recording == Recording::Active && Instant::now() < deadline {
            let left = deadline.saturating_duration_since(Instant::now());
            recording = sync::wait_timeout(&self.recorded, recording, left).0;
        }
    }
}

/// The storage that has failed a flush may fail the first attempts, too.
fn write_repeatedly(record_store: &RecordStore, record: &Record) -> Result<(), RecordStoreError> {
    for _ in 1..RECORD_TRIES {
        if record_store.write(Some(record)).is_ok() {
            return Ok(());
        }
        thread::sleep(RETRY_EVERY);
    }
    record_store.write(Some(record))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::{Access, FileBackend};

    fn store() -> (tempfile::TempDir, RecordStore) {
        let directory = tempfile::tempdir_in("/var/tmp").unwrap();
        let path = directory.path().join("image");
        std::fs::write(&path, [0; 4096]).unwrap();
        let image = FileBackend::open(&path, Access { read_only: false }).unwrap();
        (directory, RecordStore::of(&image).unwrap())
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(30)
    }

    #[test]
    fn a_failure_is_recorded_with_its_first_time() {
        let (_directory, store) = store();
        let provenance = Provenance::Received;
        let failure = FlushFailure::new("image".to_owned(), provenance, None);
        assert_eq!((failure.since(), failure.refusal()), (None, None));
        failure.record(&store);
        failure.wait_until_recorded(soon());
        assert_eq!(store.read().unwrap(), None, "nothing has failed");
        failure.failed(7);
        failure.failed(8);
        failure.record(&store);
        failure.wait_until_recorded(soon());
        assert_eq!(store.read().unwrap(), Some(Record::FlushFailed { provenance, since: 7 }));
        assert!(failure.refusal().unwrap().contains("flexnbd adopt -f image"));
    }

    #[test]
    fn the_time_of_an_earlier_failure_stays() {
        let failure = FlushFailure::new("image".to_owned(), Provenance::Native, Some(5));
        failure.failed(7);
        assert_eq!(failure.since(), Some(5));
    }

    #[test]
    fn a_failure_of_an_earlier_process_is_not_recorded_again() {
        let (_directory, store) = store();
        let failure = FlushFailure::new("image".to_owned(), Provenance::Native, Some(5));
        failure.record(&store);
        failure.wait_until_recorded(soon());
        assert_eq!(store.read().unwrap(), None);
    }
}
