//! The receiving side of a migration: executes the decisions of [`super::arrival`].
//! Knows no socket: the server of the incoming disk asks it, and it answers.

use super::arrival::{
    AccessDenied, Arrival, ArrivalEnd, Connection, ProbeDecision, Sender, WritePermission,
};
use super::wire::{Handover, Question, WireError};
use crate::disk::Disk;
use crate::disk::ownership::{Provenance, Record};
use crate::disk::record_store::RecordStore;
use crate::sync;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

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
    /// The handover was not meant for us.
    Refuse,
    /// Unknown whether the disk is durable: send no answer at all.
    NoReply,
}

/// One `listen` process and the disk it waits for.
pub struct Destination {
    disk: Arc<Disk>,
    /// None where no record can be kept.
    record_store: Option<RecordStore>,
    arrival: Mutex<Arrival>,
    /// Serializes settling. Lock order: never take this while holding in-flight I/O, because the flush
    /// waits for the I/O of all sessions.
    settling: Mutex<()>,
    observer: Box<dyn Fn(ArrivalResult) + Send + Sync>,
}

/// For how long nothing has come from a connection.
pub type SilenceOf<'a> = &'a dyn Fn(Connection) -> Duration;

impl std::fmt::Debug for Destination {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Destination").field("arrival", &self.arrival).finish_non_exhaustive()
    }
}

impl Destination {
    /// A destination whose decisions `arrival` makes. `observer` is called with the outcome,
    /// and must not wait.
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

    /// A source introduces itself with this data. `silence` tells for how long nothing has come
    /// from a connection.
    ///
    /// # Errors
    /// When it is no question.
    pub fn on_introduction(
        &self,
        connection: Connection,
        data: &[u8],
        silence: SilenceOf<'_>,
    ) -> Result<ProbeDecision, WireError> {
        let question = Question::decode(data)?;
        // What it asks is being decided.
        let _decided = sync::lock(&self.settling);
        let mut arrival = self.lock();
        let silent = self.silence_of_holder(&arrival, silence);
        Ok(arrival.on_introduction(connection, &question, silent))
    }

    /// Whether this connection may enter the transmission phase; see [`Arrival::may_enter`].
    ///
    /// # Errors
    /// Why not.
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
    /// Why it may not.
    pub fn enter(
        &self,
        connection: Connection,
        silence: SilenceOf<'_>,
    ) -> Result<Vec<Connection>, AccessDenied> {
        let mut arrival = self.lock();
        let silent = self.silence_of_holder(&arrival, silence);
        arrival.enter(connection, silent)
    }

    /// What the connection that holds the seat is, if it is this one.
    #[must_use]
    pub fn holder(&self, connection: Connection) -> Option<Sender> {
        self.lock().holder().filter(|(holder, _)| *holder == connection).map(|(_, sender)| sender)
    }

    /// After how long a silence of its holder the seat is given to this connection, which
    /// introduces itself with this data, if any; see [`Arrival::slot_timeout`].
    #[must_use]
    pub fn slot_timeout(
        &self,
        connection: Connection,
        introduction: Option<&[u8]>,
    ) -> Option<Duration> {
        let question = introduction.and_then(|data| Question::decode(data).ok());
        self.lock().slot_timeout(connection, question.map(|question| question.id))
    }

    /// A holder with a request in flight on the disk waits for us, and is not silent.
    fn silence_of_holder(&self, arrival: &Arrival, silence: SilenceOf<'_>) -> Duration {
        match arrival.holder() {
            Some((holder, _)) if !self.disk.gate().is_occupied() => silence(holder),
            _ => Duration::ZERO,
        }
    }

    /// Whether a request of this connection may be carried out, now; `changes` tells whether it
    /// changes the disk. Makes the record *incoming* durable before the first change.
    ///
    /// # Errors
    /// Why not.
    pub fn permit(&self, connection: Connection, changes: bool) -> Result<(), AccessDenied> {
        let mut arrival = self.lock();
        if !changes {
            return arrival.may_use(connection);
        }
        loop {
            match arrival.on_write_request(connection) {
                WritePermission::Go => return Ok(()),
                WritePermission::Refuse(denied) => return Err(denied),
                WritePermission::RecordFirst(record) => {
                    let kept = self.keep(&record);
                    let id = if let Record::Incoming { id } = record { id } else { None };
                    arrival.on_recorded(id, kept.is_ok());
                    if let Err(why) = kept {
                        (self.observer)(ArrivalResult::Failed(why));
                    }
                }
            }
        }
    }

    /// HANDOVER arrived with this payload.
    pub fn on_handover(&self, connection: Connection, payload: &[u8]) -> HandoverResult {
        let Ok(handover) = Handover::decode(payload) else { return HandoverResult::Refuse };
        let _settling = sync::lock(&self.settling);
        let ending = self.lock().on_handover(connection, &handover);
        match ending {
            ArrivalEnd::Settle(record) if self.settle(&record) => HandoverResult::Acknowledge,
            ArrivalEnd::Settle(_) => HandoverResult::NoReply,
            ArrivalEnd::Refuse | ArrivalEnd::Nothing => HandoverResult::Refuse,
        }
    }

    /// DISC arrived.
    pub fn on_disconnect(&self, connection: Connection) {
        let _settling = sync::lock(&self.settling);
        let ending = self.lock().on_disconnect(connection);
        if let ArrivalEnd::Settle(record) = ending {
            self.settle(&record);
        }
    }

    /// The connection is gone, and none of its requests is under way.
    pub fn on_close(&self, connection: Connection) {
        self.lock().on_close(connection);
    }

    /// A request that changes the disk, or makes it durable, failed: this image cannot be written,
    /// so that waiting for the source to try again would be in vain (flexnbd(1), LISTEN MODE).
    pub fn on_write_failure(&self, why: &str) {
        // Once it is being settled, what is to be durable then is known by another flush.
        if self.lock().on_write_failure() {
            (self.observer)(ArrivalResult::Failed(why.to_owned()));
        }
    }

    /// The data first, then the record: only then is the disk ours. Meanwhile others get the answer that
    /// it is complete.
    fn settle(&self, record: &Record) -> bool {
        let settled = self.flush().and_then(|()| self.keep(record));
        let mut arrival = self.lock();
        let ours = arrival.on_settled(settled.is_ok());
        (self.observer)(match settled {
            Ok(()) => ArrivalResult::Arrived(match record {
                Record::Ours(title) => *title,
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

    fn keep(&self, record: &Record) -> Result<(), String> {
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
    use crate::disk::inflight::{InFlight, Work};
    use crate::disk::memory_backend::MemoryBackend;
    use crate::disk::ownership::Id;
    use crate::disk::slow_backend::{Slow, SlowBackend, TestNotifier};
    use crate::migration::arrival::Admits;
    use crate::migration::wire::Token;
    use nix::libc::EIO;
    use std::sync::mpsc;
    use std::thread;

    const PATIENCE: Duration = Duration::from_secs(20);
    const ID: Id = Id([1; 16]);
    const TOKEN: Token = Token([9; 16]);

    #[test]
    fn handover_does_not_deadlock_with_an_in_flight_flush() {
        for fails in [false, true] {
            let (memory, slow) = (MemoryBackend::new(1 << 20), Arc::new(Slow::default()));
            let image = SlowBackend::new(memory.clone(), Arc::clone(&slow));
            let disk = Arc::new(Disk::new(Box::new(image), false));
            let (results, receiver) = mpsc::channel();
            let tell = Box::new({
                let results = Mutex::new(results);
                move |result| results.lock().unwrap().send(result).unwrap()
            });
            let arrival = Arrival::new(TOKEN, None, Admits::Sources);
            let destination = Destination::new(Arc::clone(&disk), None, arrival, tell);
            let silence: SilenceOf<'_> = &|_| Duration::ZERO;
            let question = Question { size: 1 << 20, id: ID }.encode();
            destination.on_introduction(1, &question, silence).unwrap();
            destination.enter(1, silence).unwrap();
            destination.permit(1, true).unwrap();
            // A reader has come before, and has a flush under way.
            let mut errands = InFlight::new(&disk, Arc::new(TestNotifier::default()));
            errands.begin(disk.enter(&|| true).unwrap(), Work::Flush, ());
            errands.submit();
            let (asked, answer) = mpsc::channel();
            let handover = Handover { id: ID, token: TOKEN }.encode();
            thread::scope(|scope| {
                let destination = &destination;
                let handing = scope.spawn(|| destination.on_handover(1, &handover));
                let asking = scope.spawn(move || {
                    while destination.permit(2, true) != Err(AccessDenied::Complete) {
                        thread::yield_now();
                    }
                    asked.send(()).unwrap();
                });
                let waited = answer.recv_timeout(PATIENCE);
                assert!(!handing.is_finished(), "the flush may know better");
                if fails {
                    slow.fail(0, EIO);
                } else {
                    slow.complete(0, &memory);
                }
                assert!(errands.next_completed().is_some());
                assert_eq!(waited, Ok(()));
                asking.join().unwrap();
                let expected =
                    if fails { HandoverResult::NoReply } else { HandoverResult::Acknowledge };
                assert_eq!(handing.join().unwrap(), expected);
            });
            let result = receiver.recv_timeout(PATIENCE).unwrap();
            assert_eq!(fails, matches!(result, ArrivalResult::Failed(_)));
        }
    }
}
