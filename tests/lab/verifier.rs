//! A client that verifies every byte it reads: 32 requests in flight, some sent in two parts.
//! It never reconnects: it ends when its connection is lost.
//!
//! It owns a range of blocks. Each write of a block is its next version, which the content
//! identifies. After a connection loss a block may hold any version from the last that had to
//! survive to the last that was sent, and no other.

use crate::session::spawn_client;
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
/// The longest request, in blocks. This client does not receive while it sends, so replies in
/// flight must fit into the kernel's socket buffers.
const BLOCKS_MAX: u64 = 4;
/// One in this many writes is sent in two parts.
const SPLIT_WRITE_EVERY: u64 = 16;
/// The longest pause between the two parts.
const SPLIT_DELAY_MAX: Duration = Duration::from_millis(30);
/// One in this many versions of a block is zeros.
const ZEROS_EVERY: u64 = 11;
/// One in this many requests is a FLUSH.
const FLUSH_EVERY: u64 = 64;

/// The versions that one block may hold.
#[derive(Clone, Copy, Debug, Default)]
struct Versions {
    /// The last version that survives a power cut: acknowledged and then flushed, or written with
    /// FUA.
    durable: u64,
    /// The last version that survives the server's process.
    acknowledged: u64,
    /// The last version that was sent.
    attempted: u64,
}

/// The kind of failure, which decides which versions must have survived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Crash {
    /// The server's process ended, or the session was closed.
    Process,
    /// The host lost its power.
    Power,
}

/// The client's model of its part of the disk.
#[derive(Clone, Debug)]
pub(crate) struct Model {
    first: u64,
    blocks: Vec<Versions>,
}

impl Model {
    /// The model of a part, in bytes, that has never been written.
    pub(crate) fn of(part: Range<u64>) -> Model {
        let count = (part.end - part.start) / BLOCK;
        Model { first: part.start / BLOCK, blocks: vec![Versions::default(); count as usize] }
    }

    /// Reads the part at `target`, fails if a block holds an impossible version, and continues
    /// from the versions found.
    #[track_caller]
    pub(crate) fn verify(&mut self, target: &Endpoint, crash: Crash) {
        const AT_ONCE: usize = 64;
        let mut session = Session::open(target, Mode::Structured).unwrap();
        let mut number = self.first;
        for blocks in self.blocks.chunks_mut(AT_ONCE) {
            let data = session.read(number * BLOCK, blocks.len() as u64 * BLOCK);
            for (versions, data) in blocks.iter_mut().zip(data.chunks(BLOCK as usize)) {
                versions.reconcile(number, data, crash);
                number += 1;
            }
        }
        session.send(&Request::new(DISC, 0, 0));
    }
}

impl Versions {
    /// Reduces the possible versions to the one that the block holds.
    #[track_caller]
    fn reconcile(&mut self, number: u64, data: &[u8], crash: Crash) {
        let least = if crash == Crash::Process { self.acknowledged } else { self.durable };
        let holds = |version: u64| data == content(number, version);
        let found = (least..=self.attempted).rev().find(|&version| holds(version));
        let Some(found) = found else {
            let head = &data[..16];
            let older = (0..least).rev().find(|&version| holds(version));
            panic!(
                "block {number} holds {head:02x?} …, lost versions that match: {older:?}, after \
                                 {crash:?}: {self:?}"
            );
        };
        *self = Versions { durable: self.durable, acknowledged: found, attempted: found };
    }
}

/// The content of a version of a block: zeros for version 0 and some others, else its stamp
/// repeated.
fn content(block: u64, version: u64) -> Vec<u8> {
    if is_zeros(block, version) {
        return vec![0; BLOCK as usize];
    }
    unit(block, version).repeat(BLOCK as usize / 16)
}

fn is_zeros(block: u64, version: u64) -> bool {
    version == 0 || (block + version).is_multiple_of(ZEROS_EVERY)
}

/// State that a running client shares with the test.
#[derive(Default)]
struct Progress {
    stop: AtomicBool,
    replies: AtomicU64,
}

/// A running client.
pub(crate) struct Verifier {
    name: String,
    progress: Arc<Progress>,
    thread: JoinHandle<Summary>,
}

/// The result of a client that has ended.
pub(crate) struct Summary {
    pub(crate) model: Model,
    /// The error that ended the client, unless the test stopped it.
    pub(crate) loss: Option<String>,
    pub(crate) replies: u64,
    /// The longest time without a reply while requests were pending.
    pub(crate) worst_stall: Duration,
}

impl Verifier {
    /// Connects and starts the client. `part` is in bytes.
    #[track_caller]
    pub(crate) fn start(target: &Endpoint, mode: Mode, part: Range<u64>) -> Verifier {
        Verifier::resume(target, mode, Model::of(part))
    }

    /// Starts a client that gives its connection up after `timeout` without a reply.
    #[track_caller]
    pub(crate) fn start_with_timeout(
        target: &Endpoint,
        mode: Mode,
        model: Model,
        timeout: Duration,
    ) -> Verifier {
        let session = Session::open(target, mode).expect("the server speaks all dialects");
        session.wire.set_read_timeout(timeout);
        Verifier::work(target, session, model)
    }

    /// Starts a client with the model of an earlier one, after [`Model::verify`].
    #[track_caller]
    pub(crate) fn resume(target: &Endpoint, mode: Mode, model: Model) -> Verifier {
        let session = Session::open(target, mode).expect("the server speaks all dialects");
        Verifier::work(target, session, model)
    }

    fn work(target: &Endpoint, session: Session, model: Model) -> Verifier {
        let mode = session.mode;
        let name = format!("the client of {target:?} in {mode:?} from block {}", model.first);
        let progress = Arc::new(Progress::default());
        let work = Worker::new(session, model, Arc::clone(&progress));
        Verifier { name, progress, thread: spawn_client(|| work.run()) }
    }

    pub(crate) fn replies(&self) -> u64 {
        self.progress.replies.load(Ordering::SeqCst)
    }

    /// Whether the client runs; `false` after it has lost its connection.
    pub(crate) fn is_running(&self) -> bool {
        !self.thread.is_finished()
    }

    /// Waits for `more` replies from now on.
    #[track_caller]
    pub(crate) fn wait_for_replies(&self, more: u64) {
        wait_for_replies(std::slice::from_ref(self), more);
    }

    /// Stops the client; fails if it has lost its connection.
    #[track_caller]
    pub(crate) fn stop(self) -> Summary {
        self.progress.stop.store(true, Ordering::SeqCst);
        let name = self.name;
        let summary = self.thread.join().unwrap();
        assert!(summary.loss.is_none(), "{name}: {}", summary.loss.unwrap());
        summary
    }

    /// Waits until the client has lost its connection; fails if it ended because of a wrong reply.
    #[track_caller]
    pub(crate) fn wait_for_loss(self) -> Summary {
        wait_until(&format!("{} to lose its connection", self.name), || !self.is_running());
        let summary = self.thread.join().unwrap();
        let loss = summary.loss.as_deref().unwrap_or("the test stopped it");
        assert!(is_clean(loss), "{}: {loss}", self.name);
        summary
    }
}

/// Waits until each client has received `more` replies from now on.
#[track_caller]
pub(crate) fn wait_for_replies(clients: &[Verifier], more: u64) {
    let until: Vec<u64> = clients.iter().map(|client| client.replies() + more).collect();
    for (client, until) in clients.iter().zip(until) {
        wait_until(&format!("{more} replies to {}", client.name), || {
            client.replies() >= until || !client.is_running()
        });
        assert!(client.is_running(), "{} has ended", client.name);
    }
}

/// Whether this is the error of a lost connection.
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

/// The client's side that runs in its thread.
struct Worker {
    session: Session,
    model: Model,
    progress: Arc<Progress>,
    random: Rng,
    pending: HashMap<u64, Request>,
    /// The blocks of pending requests, which never overlap.
    busy: HashSet<u64>,
    /// Blocks and versions acknowledged since the last FLUSH was sent.
    unflushed: HashMap<u64, u64>,
    /// By cookie of a FLUSH in flight: the blocks and versions that it makes durable.
    flushing: HashMap<u64, HashMap<u64, u64>>,
    last_reply: Instant,
    worst_stall: Duration,
}

impl Worker {
    fn new(session: Session, model: Model, progress: Arc<Progress>) -> Worker {
        Worker {
            random: Rng::with_seed(model.first * 31 + 7),
            session,
            model,
            progress,
            pending: HashMap::new(),
            busy: HashSet::new(),
            unflushed: HashMap::new(),
            flushing: HashMap::new(),
            last_reply: Instant::now(),
            worst_stall: Duration::ZERO,
        }
    }

    fn run(mut self) -> Summary {
        // The model stays valid wherever a panic interrupts `work`.
        let end = catch_unwind(AssertUnwindSafe(|| self.work()));
        let loss = end.err().map(|panic| match panic.downcast::<String>() {
            Ok(text) => *text,
            Err(_) => "it failed".to_owned(),
        });
        let replies = self.progress.replies.load(Ordering::SeqCst);
        Summary { model: self.model, loss, replies, worst_stall: self.worst_stall }
    }

    fn work(&mut self) {
        while !self.progress.stop.load(Ordering::SeqCst) {
            self.send_next();
            if self.pending.len() >= DEPTH {
                self.receive_reply();
            }
        }
        while !self.pending.is_empty() {
            self.receive_reply();
        }
        self.session.send(&Request::new(DISC, 0, 0));
    }

    /// Chooses and sends the next request.
    fn send_next(&mut self) {
        if self.random.u64(..FLUSH_EVERY) == 0 {
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

    /// Adjacent blocks without a pending request: the first and their number.
    fn idle_blocks(&mut self) -> (u64, u64) {
        let total = self.model.blocks.len() as u64;
        loop {
            let index = self.random.u64(..total);
            let count = (1 + self.random.u64(..BLOCKS_MAX)).min(total - index);
            let first = self.model.first + index;
            if (first..first + count).all(|block| !self.busy.contains(&block)) {
                return (first, count);
            }
        }
    }

    /// A request that writes the next version of each of these blocks.
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
        &mut self.model.blocks[(block - self.model.first) as usize]
    }

    fn send(&mut self, request: Request) -> u64 {
        if self.pending.is_empty() {
            self.last_reply = Instant::now();
        }
        let (cookie, bytes) = self.session.encode(&request);
        let split = request.command == WRITE && self.random.u64(..SPLIT_WRITE_EVERY) == 0;
        // The request is pending from its first byte on, also for the model.
        self.pending.insert(cookie, request);
        if split {
            let middle = 1 + self.random.u64(..bytes.len() as u64 - 1) as usize;
            self.session.wire.send(&bytes[..middle]);
            thread::sleep(SPLIT_DELAY_MAX * (1 + self.random.u64(..100) as u32) / 100);
            self.session.wire.send(&bytes[middle..]);
        } else {
            self.session.wire.send(&bytes);
        }
        cookie
    }

    fn receive_reply(&mut self) {
        let (cookie, reply) = self.session.recv_reply(&self.pending);
        self.worst_stall = self.worst_stall.max(self.last_reply.elapsed());
        self.last_reply = Instant::now();
        let request = self.pending.remove(&cookie).unwrap();
        self.check(&request, &reply);
        if let Some(flushed) = self.flushing.remove(&cookie) {
            for (block, version) in flushed {
                let versions = self.versions(block);
                versions.durable = versions.durable.max(version);
            }
        }
        self.progress.replies.fetch_add(1, Ordering::SeqCst);
    }

    fn check(&mut self, request: &Request, reply: &Reply) {
        assert_eq!(reply.error, 0, "error of {}", request.command);
        let first = request.offset / BLOCK;
        for block in first..first + request.length / BLOCK {
            self.busy.remove(&block);
            let versions = self.versions(block);
            if request.command == READ {
                let expected = content(block, versions.attempted);
                let at = ((block - first) * BLOCK) as usize;
                let found = &reply.data[at..at + BLOCK as usize];
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

/// A write of which only a part has been sent; [`PartialWrite::finish`] sends the rest.
pub(crate) struct PartialWrite {
    session: Session,
    request: Request,
    cookie: u64,
    rest: Vec<u8>,
}

impl PartialWrite {
    /// Opens a session and sends the first `sent` bytes of a write.
    #[track_caller]
    pub(crate) fn begin(
        target: &Endpoint,
        mode: Mode,
        request: Request,
        sent: usize,
    ) -> PartialWrite {
        let mut session = Session::open(target, mode).expect("the server speaks all dialects");
        session.assert_in_sync();
        let (cookie, mut bytes) = session.encode(&request);
        let rest = bytes.split_off(sent);
        session.wire.send(&bytes);
        PartialWrite { session, request, cookie, rest }
    }

    /// Sends the rest; fails unless the write then reads back.
    #[track_caller]
    pub(crate) fn finish(mut self) {
        self.session.wire.send(&self.rest);
        let Request { offset, length, payload, .. } = self.request.clone();
        let pending = HashMap::from([(self.cookie, self.request)]);
        assert_eq!(self.session.recv_reply(&pending).1.error, 0);
        assert!(self.session.read(offset, length) == payload, "the partial write reads back wrong");
        self.session.send(&Request::new(DISC, 0, 0));
    }
}
