//! The clients of a disk on a logged device: what they have written, and what the server has
//! acknowledged as durable.
//!
//! The disk consists of slots of [`SLOT`] bytes, each of which belongs to one client. Every write fills a
//! slot with a number of its own, so that the content of a slot tells which change was the last.

use crate::log_writes;
use harness::Endpoint;
use harness::raw::{FLUSH, FUA, NO_HOLE, TRIM, WRITE, WRITE_ZEROES};
use harness::session::{Mode, Request, Session};
use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

/// Bytes of a slot: a block of the file systems, which a crash never tears.
pub(crate) const SLOT: u64 = 4096;
/// Slots of a client.
const SLOTS_EACH: usize = 24;
/// Clients at once.
const CLIENTS: usize = 3;
/// Slots of all clients.
pub(crate) const SLOTS: usize = SLOTS_EACH * CLIENTS;

/// A change of a slot: its number in the slot's history.
pub(crate) type Version = usize;

/// A promise of the server: these slots have at least these versions on stable storage.
pub(crate) type Promise = Vec<(usize, Version)>;

/// What all clients have done.
#[derive(Default)]
pub(crate) struct History {
    slots: Vec<Slot>,
    /// The promises; the mark of each in the log is its number.
    pub(crate) promises: Vec<Promise>,
    next_stamp: u64,
}

#[derive(Clone, Default)]
struct Slot {
    /// The word that each change has filled the slot with, zero at first.
    words: Vec<u64>,
    acknowledged: Version,
}

impl History {
    pub(crate) fn new() -> Arc<Mutex<History>> {
        let slots = vec![Slot { words: vec![0], acknowledged: 0 }; SLOTS];
        Arc::new(Mutex::new(History { slots, promises: Vec::new(), next_stamp: 1 }))
    }

    /// Every change that was acknowledged so far.
    pub(crate) fn acknowledged(&self) -> Promise {
        self.slots.iter().map(|slot| slot.acknowledged).enumerate().collect()
    }

    /// Whether a slot with this word has at least this version: its change or a later one.
    pub(crate) fn is_kept(&self, (slot, version): (usize, Version), word: u64) -> bool {
        self.slots[slot].words[version..].contains(&word)
    }

    fn begin(&mut self, slot: usize, is_zero: bool) -> (Version, u64) {
        let word = if is_zero { 0 } else { self.next_stamp };
        self.next_stamp += 1;
        let words = &mut self.slots[slot].words;
        words.push(word);
        (words.len() - 1, word)
    }
}

/// Clients that write until their connections end.
pub(crate) struct Load(Vec<JoinHandle<()>>);

impl Load {
    /// Connects all clients and starts them.
    #[track_caller]
    pub(crate) fn start(server: &Endpoint, history: &Arc<Mutex<History>>) -> Load {
        let clients = (0..CLIENTS).map(|number| {
            let session = Session::open(server, Mode::Structured).unwrap();
            let history = Arc::clone(history);
            let mut client = Client { session, history, first: number * SLOTS_EACH, steps: 0 };
            // The server ends the connections when the disk leaves.
            thread::spawn(move || while client.step().is_ok() {})
        });
        Load(clients.collect())
    }

    /// Waits until the server has ended all connections.
    #[track_caller]
    pub(crate) fn wait_for_end(self) {
        self.0.into_iter().for_each(|client| client.join().unwrap());
    }
}

struct Client {
    session: Session,
    history: Arc<Mutex<History>>,
    /// Its first slot.
    first: usize,
    steps: usize,
}

/// The requests of a step are sent at once; the kinds follow each other in turn.
const STEPS: [&[(u16, u16)]; 8] = [
    &[(WRITE, FUA)],
    &[(WRITE, 0), (WRITE, 0)],
    &[(FLUSH, 0)],
    &[(WRITE, FUA), (WRITE, 0), (WRITE, FUA), (FLUSH, 0)],
    &[(WRITE_ZEROES, FUA | NO_HOLE), (WRITE, 0)],
    &[(TRIM, FUA), (WRITE, 0), (WRITE_ZEROES, 0)],
    &[(FLUSH, 0)],
    &[(WRITE_ZEROES, FUA), (TRIM, 0), (WRITE, FUA)],
];

impl Client {
    /// Sends the requests of a step, waits for their replies, and marks the log with the promise.
    fn step(&mut self) -> io::Result<()> {
        let kinds = STEPS[self.steps % STEPS.len()];
        self.steps += 1;
        // What is acknowledged before a FLUSH is sent is covered by it, whichever client sent it.
        let mut promise = self.history.lock().unwrap().acknowledged();
        if !kinds.iter().any(|(command, _)| *command == FLUSH) {
            promise.clear();
        }
        let mut pending = HashMap::new();
        let mut versions = HashMap::new();
        for (number, &(command, flags)) in kinds.iter().enumerate() {
            let slot = self.first + (self.steps * 5 + number) % SLOTS_EACH;
            let request = match command {
                FLUSH => Request::new(FLUSH, 0, 0),
                command => {
                    let is_zero = command != WRITE;
                    let (version, word) = self.history.lock().unwrap().begin(slot, is_zero);
                    let data = word.to_le_bytes().repeat(SLOT as usize / 8);
                    let mut request = Request::write(slot as u64 * SLOT, &data).flags(flags);
                    if is_zero {
                        request = Request::new(command, request.offset, SLOT).flags(flags);
                    }
                    let (cookie, bytes) = self.session.encode(&request);
                    self.session.wire.try_send(&bytes)?;
                    versions.insert(cookie, (slot, version, flags & FUA != 0));
                    pending.insert(cookie, request);
                    continue;
                }
            };
            let (cookie, bytes) = self.session.encode(&request);
            self.session.wire.try_send(&bytes)?;
            pending.insert(cookie, request);
        }
        while !pending.is_empty() {
            let (cookie, reply) = self.session.try_recv_reply(&pending)?;
            let request = pending.remove(&cookie).unwrap();
            assert_eq!(reply.error, 0, "{request:?}");
            if let Some((slot, version, is_durable)) = versions.remove(&cookie) {
                self.history.lock().unwrap().slots[slot].acknowledged = version;
                if is_durable {
                    promise.push((slot, version));
                }
            }
        }
        self.mark(promise);
        Ok(())
    }

    fn mark(&self, promise: Promise) {
        if promise.is_empty() {
            return;
        }
        let number = {
            let mut history = self.history.lock().unwrap();
            history.promises.push(promise);
            history.promises.len() - 1
        };
        log_writes::mark(&number.to_string());
    }
}
