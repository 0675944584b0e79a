//! The receiving side of a migration: carries out what [`super::arrival`] decides.
//! Knows no socket: whoever serves the incoming disk asks it, and it answers.

use super::arrival::{Arrival, Connection, Denied, Ending, Guest, Introduction, Permission};
use super::wire::{Handover, Question, Token, WireError};
use crate::disk::Disk;
use crate::disk::ledger::Ledger;
use crate::disk::ownership::{Id, Record, Title};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What becomes of an incoming disk, told once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It is complete, durable, and ours, by this title.
    Arrived(Title),
    /// It cannot be received here, for this reason. The process ends with an error.
    Failed(String),
}

/// What to do after a HANDOVER.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Handed {
    /// It is ours: acknowledge.
    Acknowledge,
    /// It was not meant for us.
    Refuse,
    /// Nobody can tell whether it is durable: say nothing at all.
    Silence,
}

/// One `listen` process and the disk it waits for.
pub struct Destination {
    disk: Arc<Disk>,
    /// None where no record can be kept.
    ledger: Option<Ledger>,
    oldstyle: bool,
    state: Mutex<State>,
    /// Held while data and record are made durable. Never waited for by whoever may have requests
    /// under way: to flush is to wait for theirs.
    settling: Mutex<()>,
    told: Box<dyn Fn(Fate) + Send + Sync>,
}

#[derive(Debug)]
struct State {
    arrival: Arrival,
    /// The migrations that connections introduced themselves with.
    introduced: BTreeMap<Connection, Id>,
}

impl std::fmt::Debug for Destination {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Destination").field("state", &self.state).finish_non_exhaustive()
    }
}

impl Destination {
    /// A destination of this name. `holds` is the migration of which the image has an incomplete
    /// copy; `told` hears what becomes of the disk, and must not wait.
    #[must_use]
    pub fn new(
        disk: Arc<Disk>,
        ledger: Option<Ledger>,
        oldstyle: bool,
        (token, holds): (Token, Option<Id>),
        told: Box<dyn Fn(Fate) + Send + Sync>,
    ) -> Self {
        let arrival = Arrival::new(token, holds);
        let state = Mutex::new(State { arrival, introduced: BTreeMap::new() });
        Self { disk, ledger, oldstyle, state, settling: Mutex::new(()), told }
    }

    /// A source introduces itself with this data.
    ///
    /// # Errors
    /// When it is no question.
    pub fn introduced(
        &self,
        connection: Connection,
        data: &[u8],
    ) -> Result<Introduction, WireError> {
        let question = Question::decode(data)?;
        // What it asks is being decided.
        let _decided = self.settling.lock().unwrap_or_else(PoisonError::into_inner);
        let mut state = self.lock();
        let introduction = state.arrival.introduced(connection, &question);
        if matches!(introduction, Introduction::Answer { .. }) {
            state.introduced.insert(connection, question.id);
        }
        Ok(introduction)
    }

    /// Whether this connection may come in.
    ///
    /// # Errors
    /// While somebody else's migration is connected, and once the disk is complete.
    pub fn admit(&self, connection: Connection) -> Result<(), Denied> {
        let state = self.lock();
        if state.introduced.contains_key(&connection) { Ok(()) } else { state.arrival.admit() }
    }

    /// Whether this connection may change the disk, now. Makes the record *incoming* durable
    /// before the first change.
    ///
    /// # Errors
    /// Why not.
    pub fn permit(&self, connection: Connection) -> Result<(), Denied> {
        let mut state = self.lock();
        let guest = self.guest(&state, connection);
        loop {
            match state.arrival.wants_to_write(connection, guest) {
                Permission::Go => return Ok(()),
                Permission::Refuse(denied) => return Err(denied),
                Permission::RecordFirst(record) => {
                    let kept = self.keep(&record);
                    state.arrival.recorded(guest, kept.is_ok());
                    if let Err(why) = kept {
                        (self.told)(Fate::Failed(why));
                    }
                }
            }
        }
    }

    /// HANDOVER arrived with this payload.
    pub fn handed_over(&self, connection: Connection, payload: &[u8]) -> Handed {
        let Ok(handover) = Handover::decode(payload) else { return Handed::Refuse };
        let _settling = self.settling.lock().unwrap_or_else(PoisonError::into_inner);
        let ending = self.lock().arrival.handed_over(connection, &handover);
        match ending {
            Ending::Settle(record) if self.settle(&record) => Handed::Acknowledge,
            Ending::Settle(_) => Handed::Silence,
            Ending::Refuse | Ending::Nothing => Handed::Refuse,
        }
    }

    /// DISC arrived.
    pub fn said_goodbye(&self, connection: Connection) {
        let _settling = self.settling.lock().unwrap_or_else(PoisonError::into_inner);
        let ending = self.lock().arrival.said_goodbye(connection);
        if let Ending::Settle(record) = ending {
            self.settle(&record);
        }
    }

    /// The connection is gone, and none of its requests is under way.
    pub fn closed(&self, connection: Connection) {
        let mut state = self.lock();
        state.introduced.remove(&connection);
        state.arrival.closed(connection);
    }

    /// A request that changes the disk, or makes it durable, failed: this image cannot be written,
    /// so that waiting for the source to try again would be in vain (flexnbd(1), LISTEN MODE).
    pub fn failed(&self, why: &str) {
        // Once it is being settled, what is to be durable then is known by another flush.
        if self.lock().arrival.write_failed() {
            (self.told)(Fate::Failed(why.to_owned()));
        }
    }

    /// The data first, then the record: only then is the disk ours. Meanwhile others are told that
    /// it is complete.
    fn settle(&self, record: &Record) -> bool {
        let settled = self.flush().and_then(|()| self.keep(record));
        let mut state = self.lock();
        let ours = state.arrival.settled(settled.is_ok());
        (self.told)(match settled {
            Ok(()) => Fate::Arrived(match record {
                Record::Ours(title) => *title,
                _ => Title::Received,
            }),
            Err(why) => Fate::Failed(why),
        });
        ours
    }

    fn flush(&self) -> Result<(), String> {
        let visit = self.disk.enter(&|| true).map_err(|error| error.to_string())?;
        visit.flush().map_err(|error| format!("cannot make the disk durable: {error}"))
    }

    fn keep(&self, record: &Record) -> Result<(), String> {
        match &self.ledger {
            Some(ledger) => ledger.write(Some(record)).map_err(|error| error.to_string()),
            None => Ok(()),
        }
    }

    fn guest(&self, state: &State, connection: Connection) -> Guest {
        match state.introduced.get(&connection) {
            Some(id) => Guest::Ours(*id),
            None if self.oldstyle => Guest::OldStyle,
            None => Guest::Plain,
        }
    }

    /// A panic elsewhere leaves nothing half done under this lock, so that it does not count.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::errands::{Errands, Work};
    use crate::disk::memory::MemoryImage;
    use crate::disk::slow::{Slow, SlowImage, TestBell};
    use nix::libc::EIO;
    use std::sync::mpsc;
    use std::thread;
    use std::time::Duration;

    const PATIENCE: Duration = Duration::from_secs(20);
    const ID: Id = Id([1; 16]);
    const TOKEN: Token = Token([9; 16]);

    #[test]
    fn a_handover_does_not_wait_for_a_flush_whose_session_waits_for_the_handover() {
        for fails in [false, true] {
            let (memory, slow) = (MemoryImage::new(1 << 20), Arc::new(Slow::default()));
            let image = SlowImage::new(memory.clone(), Arc::clone(&slow));
            let disk = Arc::new(Disk::new(Box::new(image), false));
            let (fates, told) = mpsc::channel();
            let tell = Box::new({
                let fates = Mutex::new(fates);
                move |fate| fates.lock().unwrap().send(fate).unwrap()
            });
            let destination = Destination::new(Arc::clone(&disk), None, false, (TOKEN, None), tell);
            destination.introduced(1, &Question { size: 1 << 20, id: ID }.encode()).unwrap();
            destination.permit(1).unwrap();
            // A reader has come before, and has a flush under way.
            let mut errands = Errands::new(&disk, Arc::new(TestBell::default()));
            errands.begin(disk.enter(&|| true).unwrap(), Work::Flush, ());
            errands.submit();
            let (asked, answer) = mpsc::channel();
            let handover = Handover { id: ID, token: TOKEN }.encode();
            thread::scope(|scope| {
                let destination = &destination;
                let handing = scope.spawn(|| destination.handed_over(1, &handover));
                let asking = scope.spawn(move || {
                    while destination.permit(2) != Err(Denied::Complete) {
                        thread::yield_now();
                    }
                    asked.send(()).unwrap();
                });
                let waited = answer.recv_timeout(PATIENCE);
                assert!(!handing.is_finished(), "the flush may know better");
                if fails {
                    slow.fail(0, EIO);
                } else {
                    slow.finish(0, &memory);
                }
                assert!(errands.next_over().is_some());
                assert_eq!(waited, Ok(()));
                asking.join().unwrap();
                let expected = if fails { Handed::Silence } else { Handed::Acknowledge };
                assert_eq!(handing.join().unwrap(), expected);
            });
            let fate = told.recv_timeout(PATIENCE).unwrap();
            assert_eq!(fails, matches!(fate, Fate::Failed(_)));
        }
    }
}
