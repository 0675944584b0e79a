//! The receiving side of a migration: executes the decisions of [`super::arrival`].
//! Never uses a socket: the server of the incoming disk calls it.

use super::arrival::{
    AccessDenied, Arrival, ArrivalEnd, Connection, ProbeDecision, Sender, WritePermission,
};
use super::wire::{Handover, Question, WireError};
use crate::disk::Disk;
use crate::disk::ownership::{Provenance, Record};
use crate::disk::record_store::RecordStore;
use crate::ids::DiskId;
use crate::sync;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;
use tracing::warn;

/// The outcome of a reception, reported once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ArrivalResult {
    /// The disk is complete, durable, and ours, with this provenance.
    Arrived(Provenance),
    /// The disk cannot be received here, for this reason. The process exits with an error.
    Failed(String),
}

/// What to do after a HANDOVER.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HandoverResult {
    /// The disk is ours: acknowledge.
    Acknowledge,
    /// The handover names another migration, process or connection.
    Refuse,
    /// It is unknown whether the disk is durable: send no reply.
    NoReply,
}

/// One `listen` process and its incoming disk.
pub struct Destination {
    disk: Arc<Disk>,
    /// `None` if the image has no place for a record.
    record_store: Option<RecordStore>,
    arrival: Mutex<Arrival>,
    /// Serializes settling. Lock order: a thread with I/O in flight never takes it, because the
    /// flush under it waits for the I/O of all sessions.
    settling: Mutex<()>,
    observer: Box<dyn Fn(ArrivalResult) + Send + Sync>,
}

/// Returns for how long a connection has received nothing.
pub type SilenceOf<'a> = &'a dyn Fn(Connection) -> Duration;

impl std::fmt::Debug for Destination {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Destination").field("arrival", &self.arrival).finish_non_exhaustive()
    }
}

impl Destination {
    /// A destination that receives into `disk`. It calls `observer` with the outcome, which must
    /// not block.
    #[must_use]
    pub fn new(
        disk: Arc<Disk>,
        record_store: Option<RecordStore>,
        arrival: Arrival,
        observer: Box<dyn Fn(ArrivalResult) + Send + Sync>,
    ) -> Self {
        Self {
            disk,
            record_store,
            arrival: Mutex::new(arrival),
            settling: Mutex::new(()),
            observer,
        }
    }

    /// A source introduces itself with this data of the private option.
    ///
    /// # Errors
    /// If the data is no valid question.
    pub fn on_introduction(
        &self,
        connection: Connection,
        data: &[u8],
        silence: SilenceOf<'_>,
    ) -> Result<ProbeDecision, WireError> {
        let question = Question::decode(data)?;
        // The answer depends on the outcome of a handover that is being settled.
        let _settled = sync::lock(&self.settling);
        let mut arrival = self.lock();
        let silent = self.silence_of_holder(&arrival, silence);
        Ok(arrival.on_introduction(connection, &question, silent))
    }

    /// The source on this connection tells the id of the disk; see [`Arrival::on_disk_id`].
    pub fn on_disk_id(&self, connection: Connection, id: DiskId) -> bool {
        self.lock().on_disk_id(connection, id)
    }

    /// Whether this connection may enter the transmission phase; see [`Arrival::may_enter`].
    ///
    /// # Errors
    /// If it may not.
    pub fn may_enter(
        &self,
        connection: Connection,
        silence: SilenceOf<'_>,
    ) -> Result<(), AccessDenied> {
        let arrival = self.lock();
        arrival.may_enter(connection, self.silence_of_holder(&arrival, silence))
    }

    /// This connection is about to enter the transmission phase; see [`Arrival::enter`].
    ///
    /// # Errors
    /// If it may not.
    pub fn enter(
        &self,
        connection: Connection,
        silence: SilenceOf<'_>,
    ) -> Result<Vec<Connection>, AccessDenied> {
        let mut arrival = self.lock();
        let silent = self.silence_of_holder(&arrival, silence);
        arrival.enter(connection, silent)
    }

    /// The kind of this connection, if it holds the slot.
    #[must_use]
    pub fn holder(&self, connection: Connection) -> Option<Sender> {
        self.lock().holder().filter(|(holder, _)| *holder == connection).map(|(_, sender)| sender)
    }

    /// The silence of its holder after which this connection gets the slot. `introduction` is the
    /// data with which it introduces itself just now, if any; see [`Arrival::slot_timeout`].
    #[must_use]
    pub fn slot_timeout(
        &self,
        connection: Connection,
        introduction: Option<&[u8]>,
    ) -> Option<Duration> {
        let question = introduction.and_then(|data| Question::decode(data).ok());
        self.lock().slot_timeout(connection, question.map(|question| question.id))
    }

    /// A holder with a request in flight on the disk is not silent: it waits for our reply.
    fn silence_of_holder(&self, arrival: &Arrival, silence: SilenceOf<'_>) -> Duration {
        match arrival.holder() {
            Some((holder, _)) if !self.disk.gate().is_occupied() => silence(holder),
            _ => Duration::ZERO,
        }
    }

    /// Whether a request of this connection may be executed now; `changes`: it changes the disk. Never
    /// writes the record: [`Destination::record_change`] does, after [`WritePermission::RecordFirst`].
    #[must_use]
    pub fn permit(&self, connection: Connection, changes: bool) -> WritePermission {
        let mut arrival = self.lock();
        if changes {
            return arrival.on_write_request(connection);
        }
        arrival.may_use(connection).map_or_else(WritePermission::Refuse, |()| WritePermission::Go)
    }

    /// Makes the record *incoming* durable before the first change of this connection.
    pub fn record_change(&self, connection: Connection) {
        let mut arrival = self.lock();
        let WritePermission::RecordFirst(record) = arrival.on_write_request(connection) else {
            return;
        };
        let written = self.write_record(&record);
        let id = if let Record::Incoming { id } = record { id } else { None };
        arrival.on_recorded(id, written.is_ok());
        if let Err(why) = written {
            (self.observer)(ArrivalResult::Failed(why));
        }
    }

    /// HANDOVER was received with this payload.
    pub fn on_handover(&self, connection: Connection, payload: &[u8]) -> HandoverResult {
        let Ok(handover) = Handover::decode(payload) else { return HandoverResult::Refuse };
        let _settling = sync::lock(&self.settling);
        let (ending, disk_id) = {
            let mut arrival = self.lock();
            (arrival.on_handover(connection, &handover), arrival.disk_id(connection))
        };
        match ending {
            ArrivalEnd::Settle(record) if self.settle(&record, disk_id) => {
                HandoverResult::Acknowledge
            }
            ArrivalEnd::Settle(_) => HandoverResult::NoReply,
            ArrivalEnd::Refuse | ArrivalEnd::Nothing => HandoverResult::Refuse,
        }
    }

    /// DISC was received.
    pub fn on_disconnect(&self, connection: Connection) {
        let _settling = sync::lock(&self.settling);
        let ending = self.lock().on_disconnect(connection);
        if let ArrivalEnd::Settle(record) = ending {
            self.settle(&record, None);
        }
    }

    /// The connection is closed, and its requests have ended.
    pub fn on_close(&self, connection: Connection) {
        self.lock().on_close(connection);
    }

    /// A write or flush failed: the image cannot be written, so another attempt of the source would
    /// fail as well (flexnbd(1), LISTEN MODE).
    pub fn on_write_failure(&self, why: &str) {
        // After a handover the failure does not count: settling flushes the disk itself.
        if self.lock().on_write_failure() {
            (self.observer)(ArrivalResult::Failed(why.to_owned()));
        }
    }

    /// Makes the data durable, then the record; the disk is ours after both. Requests meanwhile
    /// fail with [`AccessDenied::Complete`].
    fn settle(&self, record: &Record, disk_id: Option<DiskId>) -> bool {
        let settled = self.flush().and_then(|()| {
            self.write_disk_id(record, disk_id);
            self.write_record(record)
        });
        let mut arrival = self.lock();
        let ours = arrival.on_settled(settled.is_ok());
        (self.observer)(match settled {
            Ok(()) => ArrivalResult::Arrived(match record {
                Record::Ours(provenance) => *provenance,
                _ => Provenance::Received,
            }),
            Err(why) => ArrivalResult::Failed(why),
        });
        ours
    }

    fn flush(&self) -> Result<(), String> {
        let visit = self.disk.enter(&|| true).map_err(|error| error.to_string())?;
        visit.flush().map_err(|error| format!("cannot make the disk durable: {error}"))
    }

    /// Stores the id of the disk before the record, which makes it count. Without it the disk has none.
    fn write_disk_id(&self, record: &Record, disk_id: Option<DiskId>) {
        let (Some(store), Some(id)) = (&self.record_store, disk_id) else { return };
        if let Record::Ours(provenance) = record
            && let Err(error) = store.write_disk_id(id, *provenance)
        {
            warn!("the disk has no id here, by which proxies recognize it: {error}");
        }
    }

    fn write_record(&self, record: &Record) -> Result<(), String> {
        match &self.record_store {
            Some(record_store) => {
                record_store.write(Some(record)).map_err(|error| error.to_string())
            }
            None => Ok(()),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Arrival> {
        sync::lock(&self.arrival)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::Op;
    use crate::disk::inflight::InFlight;
    use crate::disk::memory_backend::MemoryBackend;
    use crate::disk::ownership::Id;
    use crate::disk::slow_backend::{Slow, SlowBackend, TestNotifier};
    use crate::migration::arrival::Admits;
    use crate::migration::wire::Token;
    use nix::libc::EIO;
    use std::sync::mpsc;
    use std::thread;
    use std::time::Instant;

    const TIMEOUT: Duration = Duration::from_secs(20);
    const ID: Id = Id([1; 16]);
    const TOKEN: Token = Token([9; 16]);

    #[test]
    fn handover_does_not_deadlock_with_an_in_flight_flush() {
        for fails in [false, true] {
            let (memory, slow) = (MemoryBackend::new(1 << 20), Arc::new(Slow::default()));
            let image = SlowBackend::new(memory.clone(), Arc::clone(&slow));
            let disk = Arc::new(Disk::new(Box::new(image), false));
            let (results, receiver) = mpsc::channel();
            let observer = Box::new({
                let results = Mutex::new(results);
                move |result| results.lock().unwrap().send(result).unwrap()
            });
            let arrival = Arrival::new(TOKEN, None, Admits::Sources);
            let destination = Destination::new(Arc::clone(&disk), None, arrival, observer);
            let silence: SilenceOf<'_> = &|_| Duration::ZERO;
            let question = Question { size: 1 << 20, id: ID }.encode();
            destination.on_introduction(1, &question, silence).unwrap();
            destination.enter(1, silence).unwrap();
            destination.record_change(1);
            assert_eq!(destination.permit(1, true), WritePermission::Go);
            // A reader connected earlier, and has a flush in flight.
            let mut in_flight =
                InFlight::new(&disk, Arc::new(TestNotifier::default()), Instant::now);
            in_flight.begin(disk.enter(&|| true).unwrap(), Op::Flush, ());
            in_flight.submit();
            let (refused, is_refused) = mpsc::channel();
            let handover = Handover { id: ID, token: TOKEN }.encode();
            thread::scope(|scope| {
                let destination = &destination;
                let handover = scope.spawn(|| destination.on_handover(1, &handover));
                let reader = scope.spawn(move || {
                    let refused_now = WritePermission::Refuse(AccessDenied::Complete);
                    while destination.permit(2, true) != refused_now {
                        thread::yield_now();
                    }
                    refused.send(()).unwrap();
                });
                let waited = is_refused.recv_timeout(TIMEOUT);
                assert!(!handover.is_finished(), "it did not wait for the flush");
                if fails {
                    slow.fail(0, EIO);
                } else {
                    slow.complete(0, &memory);
                }
                assert!(in_flight.next_completed().is_some());
                assert_eq!(waited, Ok(()));
                reader.join().unwrap();
                let expected =
                    if fails { HandoverResult::NoReply } else { HandoverResult::Acknowledge };
                assert_eq!(handover.join().unwrap(), expected);
            });
            let result = receiver.recv_timeout(TIMEOUT).unwrap();
            assert_eq!(fails, matches!(result, ArrivalResult::Failed(_)));
        }
    }
}
