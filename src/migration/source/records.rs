//! The records that a source writes during a migration, and the deletion of the image.
//! Never decides when.

use super::Source;
use crate::disk::ownership::Record;
use crate::migration::job::{Event, RecordKind};
use std::time::SystemTime;

impl Source {
    /// A disk with a failed flush stays: its content may differ from the writes of clients, and
    /// a flush at the destination would cover that up.
    pub(super) fn flush_failure(&self) -> Option<Event> {
        let image = self.record_store.path().display();
        let why = || format!("a flush of {image} has failed: data may be lost");
        (!self.disk.all_flushes_succeeded()).then(|| Event::Unreadable(why()))
    }

    pub(super) fn record(&self, kind: RecordKind) -> Event {
        // No visit is in progress, so that no flush can fail any more.
        if kind == RecordKind::Departing
            && let Some(event) = self.flush_failure()
        {
            return event;
        }
        let record = self.new_record(kind);
        if let Err(error) = self.record_store.write(record.as_ref()) {
            return Event::Failed(error.to_string());
        }
        // From the handover on the destination may serve the disk, so this host admits no clients.
        if kind == RecordKind::Departing {
            self.disk.gate().set_parting(true);
        }
        Event::Done
    }

    fn new_record(&self, kind: RecordKind) -> Option<Record> {
        let when = SystemTime::UNIX_EPOCH.elapsed().map_or(0, |since| since.as_secs());
        let job = self.machine.job();
        if kind == RecordKind::Before && !self.disk.all_flushes_succeeded() {
            return Some(Record::FlushFailed { provenance: job.before, since: when });
        }
        job.record(kind, when)
    }

    pub(super) fn unlink(&self) -> Event {
        let departed = self.new_record(RecordKind::Departed);
        let deleted = self.record_store.delete_image(departed.as_ref(), self.machine.job().size);
        deleted.map_or_else(|error| Event::Failed(error.to_string()), |()| Event::Done)
    }
}
