//! A client that never lets go: 32 requests in flight, some of them sent in two halves, every byte
//! that it reads compared with what it wrote. Never reconnects: a lost connection is its end.
//!
//! It owns a part of the disk, in blocks. Each write of a block is its next version, and what the
//! block holds says which. So when the connection is lost a block may hold any version from the
//! last that had to survive to the last that was sent, and no other.

use crate::session::client;
use fastrand::Rng;
use harness::image::{BLOCK, unit};
use harness::raw::{DISC, FLUSH, FUA, READ, WRITE, WRITE_ZEROES};
use harness::session::{Mode, Reply, Request, Session};
use harness::{Endpoint, wait_until};
use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Requests in flight.
const DEPTH: usize = 32;
/// The longest request, in blocks: replies in flight must fit into the kernel's buffers, since
/// this client does not receive while it sends.
const BLOCKS_MAX: u64 = 4;
/// One write in so many is sent in two halves.
const HALVED: u64 = 16;
/// How long it takes between the halves, at most.
const HALFWAY_MAX: Duration = Duration::from_millis(30);
/// One version of a block in so many is zeros.
const ZEROS: u64 = 11;
/// One request in so many is a FLUSH.
const FLUSHES: u64 = 64;

/// What one block may hold.
#[derive(Clone, Copy, Debug, Default)]
struct Versions {
    /// Survives a power cut: flushed after it was acknowledged, or written with FUA.
    durable: u64,
    /// Survives the server's death.
    acknowledged: u64,
    /// Was sent.
    attempted: u64,
}

/// What must have survived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Calamity {
    /// The server's process died, or the session was merely closed.
    Death,
    /// The host lost its power.
    PowerCut,
}

/// What this client knows of its part of the disk.
#[derive(Clone, Debug)]
pub(crate) struct Memory {
    first: u64,
    blocks: Vec<Versions>,
}

impl Memory {
    /// Of this part of a disk that has never been written there, in bytes.
    pub(crate) fn of(part: Range<u64>) -> Memory {
        let count = (part.end - part.start) / BLOCK;
        Memory { first: part.start / BLOCK, blocks: vec![Versions::default(); count as usize] }
    }

    /// Reads all of it at `target`, fails when something is there that cannot be, and takes what
    /// is there for what was written last.
    #[track_caller]
    pub(crate) fn verify(&mut self, target: &Endpoint, calamity: Calamity) {
        const AT_ONCE: usize = 64;
        let mut session = Session::open(target, Mode::Structured).unwrap();
        let mut number = self.first;
        for blocks in self.blocks.chunks_mut(AT_ONCE) {
            let data = session.read(number * BLOCK, blocks.len() as u64 * BLOCK);
            for (versions, data) in blocks.iter_mut().zip(data.chunks(BLOCK as usize)) {
                versions.settle(number, data, calamity);
                number += 1;
            }
        }
        session.send(&Request::new(DISC, 0, 0));
    }
}

impl Versions {
    /// What is in the block becomes the only thing that may be in it.
    #[track_caller]
    fn settle(&mut self, number: u64, data: &[u8], calamity: Calamity) {
        let least = if calamity == Calamity::Death { self.acknowledged } else { self.durable };
        let holds = |version: u64| data == content(number, version);
        let found = (least..=self.attempted).rev().find(|&version| holds(version));
        let Some(found) = found else {
            let head = &data[..16];
            let older = (0..least).rev().find(|&version| holds(version));
            panic!(
                "block {number} holds {head:02x?} …, which is {older:?} (of what is lost), after \
                 {calamity:?}: {self:?}"
            );
        };
        *self = Versions { durable: self.durable, acknowledged: found, attempted: found };
    }
}

/// What that version of the block looks like: zeros at first and now and then, else its stamp all
/// over.
fn content(block: u64, version: u64) -> Vec<u8> {
    if is_zeros(block, version) {
        return vec![0; BLOCK as usize];
    }
    unit(block, version).repeat(BLOCK as usize / 16)
}

fn is_zeros(block: u64, version: u64) -> bool {
    version == 0 || (block + version).is_multiple_of(ZEROS)
}

/// What the test sees of a client at work.
#[derive(Default)]
struct Progress {
    stop: AtomicBool,
    answers: AtomicU64,
}

/// A client at work.
pub(crate) struct Steady {
    name: String,
    progress: Arc<Progress>,
    thread: JoinHandle<Ended>,
}

/// What is left of one.
pub(crate) struct Ended {
    pub(crate) memory: Memory,
    /// Why it ended, when it was not told to.
    pub(crate) loss: Option<String>,
    pub(crate) answers: u64,
    /// The longest time without an answer while some were due.
    pub(crate) worst_stall: Duration,
}

impl Steady {
    /// Connects, and begins once that has succeeded. `part` is in bytes.
    #[track_caller]
    pub(crate) fn start(target: &Endpoint, mode: Mode, part: Range<u64>) -> Steady {
        Steady::resume(target, mode, Memory::of(part))
    }

    /// The same for a server that may fall silent: after so long without an answer it is lost.
    #[track_caller]
    pub(crate) fn start_impatient(
        target: &Endpoint,
        mode: Mode,
        memory: Memory,
        patience: Duration,
    ) -> Steady {
        let session = Session::open(target, mode).expect("the server speaks all dialects");
        session.wire.set_read_timeout(patience);
        Steady::work(target, session, memory)
    }

    /// The same on what an earlier one has left and [`Memory::verify`] has seen.
    #[track_caller]
    pub(crate) fn resume(target: &Endpoint, mode: Mode, memory: Memory) -> Steady {
        let session = Session::open(target, mode).expect("the server speaks all dialects");
        Steady::work(target, session, memory)
    }

    fn work(target: &Endpoint, session: Session, memory: Memory) -> Steady {
        let mode = session.mode;
        let name = format!("the client of {target:?} in {mode:?} from block {}", memory.first);
        let progress = Arc::new(Progress::default());
        let work = Work::new(session, memory, Arc::clone(&progress));
        Steady { name, progress, thread: client(|| work.run()) }
    }

    pub(crate) fn answers(&self) -> u64 {
        self.progress.answers.load(Ordering::SeqCst)
    }

    /// Whether it goes on: `false` when its connection is lost.
    pub(crate) fn goes_on(&self) -> bool {
        !self.thread.is_finished()
    }

    /// Waits for so many answers from now on.
    #[track_caller]
    pub(crate) fn wait_for_answers(&self, more: u64) {
        wait_for_answers(std::slice::from_ref(self), more);
    }

    /// Tells it to end; fails when it has lost its connection.
    #[track_caller]
    pub(crate) fn stop(self) -> Ended {
        self.progress.stop.store(true, Ordering::SeqCst);
        let name = self.name;
        let ended = self.thread.join().unwrap();
        assert!(ended.loss.is_none(), "{name}: {}", ended.loss.unwrap());
        ended
    }

    /// Waits until it has lost its connection, and fails when the server said something wrong
    /// before that.
    #[track_caller]
    pub(crate) fn lost(self) -> Ended {
        wait_until(&format!("{} to lose its connection", self.name), || !self.goes_on());
        let ended = self.thread.join().unwrap();
        let loss = ended.loss.as_deref().unwrap_or("it was told to end");
        assert!(is_clean(loss), "{}: {loss}", self.name);
        ended
    }
}

/// Waits until each has been given so many answers from now on.
#[track_caller]
pub(crate) fn wait_for_answers(clients: &[Steady], more: u64) {
    let until: Vec<u64> = clients.iter().map(|client| client.answers() + more).collect();
    for (client, until) in clients.iter().zip(until) {
        wait_until(&format!("{more} answers to {}", client.name), || {
            client.answers() >= until || !client.goes_on()
        });
        assert!(client.goes_on(), "{} has ended", client.name);
    }
}

/// Whether this is what the reader or writer of a broken connection says.
fn is_clean(loss: &str) -> bool {
    let signs = [
        "the server closed",
        "Connection reset",
        "Broken pipe",
        "Resource temporarily unavailable",
        "No route to host",
    ];
    signs.iter().any(|sign| loss.contains(sign))
}

/// A client in its own thread.
struct Work {
    session: Session,
    memory: Memory,
    progress: Arc<Progress>,
    random: Rng,
    pending: HashMap<u64, Request>,
    /// Of the blocks of pending requests; no two of these share one.
    busy: HashSet<u64>,
    /// Acknowledged since the last FLUSH was sent: the blocks, and in which version.
    unflushed: HashMap<u64, u64>,
    /// The same for each FLUSH on its way.
    flushing: HashMap<u64, HashMap<u64, u64>>,
    last: Instant,
    worst: Duration,
}

impl Work {
    fn new(session: Session, memory: Memory, progress: Arc<Progress>) -> Work {
        Work {
            random: Rng::with_seed(memory.first * 31 + 7),
            session,
            memory,
            progress,
            pending: HashMap::new(),
            busy: HashSet::new(),
            unflushed: HashMap::new(),
            flushing: HashMap::new(),
            last: Instant::now(),
            worst: Duration::ZERO,
        }
    }

    fn run(mut self) -> Ended {
        // What the memory says stays true however abruptly the work ends.
        let end = catch_unwind(AssertUnwindSafe(|| self.work()));
        let loss = end.err().map(|panic| match panic.downcast::<String>() {
            Ok(text) => *text,
            Err(_) => "it failed".to_owned(),
        });
        let answers = self.progress.answers.load(Ordering::SeqCst);
        Ended { memory: self.memory, loss, answers, worst_stall: self.worst }
    }

    fn work(&mut self) {
        while !self.progress.stop.load(Ordering::SeqCst) {
            self.begin();
            if self.pending.len() >= DEPTH {
                self.take_answer();
            }
        }
        while !self.pending.is_empty() {
            self.take_answer();
        }
        self.session.send(&Request::new(DISC, 0, 0));
    }

    /// Sends the next request.
    fn begin(&mut self) {
        if self.random.u64(..FLUSHES) == 0 {
            let cookie = self.send(Request::new(FLUSH, 0, 0));
            self.flushing.insert(cookie, std::mem::take(&mut self.unflushed));
            return;
        }
        let (first, count) = self.idle_blocks();
        self.busy.extend(first..first + count);
        let (offset, length) = (first * BLOCK, count * BLOCK);
        if self.random.u64(..3) == 0 {
            self.send(Request::new(READ, offset, length));
            return;
        }
        let write = self.next_versions(first, count);
        let flags = if self.random.u64(..16) == 0 { FUA } else { 0 };
        self.send(write.flags(flags));
    }

    /// Some neighbouring blocks of which no request is pending.
    fn idle_blocks(&mut self) -> (u64, u64) {
        let total = self.memory.blocks.len() as u64;
        loop {
            let index = self.random.u64(..total);
            let count = (1 + self.random.u64(..BLOCKS_MAX)).min(total - index);
            let first = self.memory.first + index;
            if (first..first + count).all(|block| !self.busy.contains(&block)) {
                return (first, count);
            }
        }
    }

    /// A request that makes each of these blocks its next version.
    fn next_versions(&mut self, first: u64, count: u64) -> Request {
        let mut data = Vec::new();
        for block in first..first + count {
            let versions = self.versions(block);
            versions.attempted += 1;
            data.extend(content(block, versions.attempted));
        }
        if data.iter().all(|byte| *byte == 0) {
            Request::new(WRITE_ZEROES, first * BLOCK, count * BLOCK)
        } else {
            Request::write(first * BLOCK, &data)
        }
    }

    fn versions(&mut self, block: u64) -> &mut Versions {
        &mut self.memory.blocks[(block - self.memory.first) as usize]
    }

    fn send(&mut self, request: Request) -> u64 {
        if self.pending.is_empty() {
            self.last = Instant::now();
        }
        let (cookie, bytes) = self.session.encode(&request);
        let halved = request.command == WRITE && self.random.u64(..HALVED) == 0;
        // It counts as pending from its first byte on, also for what the memory says.
        self.pending.insert(cookie, request);
        if halved {
            let middle = 1 + self.random.u64(..bytes.len() as u64 - 1) as usize;
            self.session.wire.send(&bytes[..middle]);
            thread::sleep(HALFWAY_MAX * (1 + self.random.u64(..100) as u32) / 100);
            self.session.wire.send(&bytes[middle..]);
        } else {
            self.session.wire.send(&bytes);
        }
        cookie
    }

    fn take_answer(&mut self) {
        let (cookie, answer) = self.session.recv_reply(&self.pending);
        self.worst = self.worst.max(self.last.elapsed());
        self.last = Instant::now();
        let request = self.pending.remove(&cookie).unwrap();
        self.check(&request, &answer);
        if let Some(flushed) = self.flushing.remove(&cookie) {
            for (block, version) in flushed {
                let versions = self.versions(block);
                versions.durable = versions.durable.max(version);
            }
        }
        self.progress.answers.fetch_add(1, Ordering::SeqCst);
    }

    fn check(&mut self, request: &Request, answer: &Reply) {
        assert_eq!(answer.error, 0, "error of {}", request.command);
        let first = request.offset / BLOCK;
        for block in first..first + request.length / BLOCK {
            self.busy.remove(&block);
            let versions = self.versions(block);
            if request.command == READ {
                let expected = content(block, versions.attempted);
                let at = ((block - first) * BLOCK) as usize;
                let found = &answer.data[at..at + BLOCK as usize];
                assert!(found == expected, "block {block}: {:02x?}, {versions:?}", &found[..16]);
                continue;
            }
            versions.acknowledged = versions.attempted;
            let version = versions.attempted;
            if request.flags & FUA != 0 {
                versions.durable = version;
            } else {
                self.unflushed.insert(block, version);
            }
        }
    }
}

/// A write that has been sent in part; the rest follows when the test says so.
pub(crate) struct Halfway {
    session: Session,
    request: Request,
    cookie: u64,
    rest: Vec<u8>,
}

impl Halfway {
    /// Opens a session and sends so many bytes of a write.
    #[track_caller]
    pub(crate) fn begin(target: &Endpoint, mode: Mode, request: Request, sent: usize) -> Halfway {
        let mut session = Session::open(target, mode).expect("the server speaks all dialects");
        session.assert_in_sync();
        let (cookie, mut bytes) = session.encode(&request);
        let rest = bytes.split_off(sent);
        session.wire.send(&bytes);
        Halfway { session, request, cookie, rest }
    }

    /// Sends the rest; fails unless the write is there then.
    #[track_caller]
    pub(crate) fn finish(mut self) {
        self.session.wire.send(&self.rest);
        let Request { offset, length, payload, .. } = self.request.clone();
        let pending = HashMap::from([(self.cookie, self.request)]);
        assert_eq!(self.session.recv_reply(&pending).1.error, 0);
        assert!(self.session.read(offset, length) == payload, "what was sent in two halves");
        self.session.send(&Request::new(DISC, 0, 0));
    }
}
