//! Clients that use a migrating disk at both hosts continuously and check the data they read.
//! Never use the library, and never access an image or a process while they run.
//!
//! Writers number every write of a block, and remember which version was acknowledged and which was
//! flushed; readers connect, read for less than a second, and disconnect. A block must read as some
//! version between the last durable one at the time of the READ and the last attempted one at the
//! time of its reply.
//!
//! The disk moves once: after a reply of the destination, the source must not reply to a request
//! sent later. Times are taken before a request is sent and after its reply is received, so that
//! two requests that overlap never count as a violation.

use super::image::{BLOCK, stamped, unit};
use super::writers::Versions;
use crate::raw::{self, Wire};
use crate::{Endpoint, wait_until};
use fastrand::Rng;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fs::File;
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

const WRITERS: u64 = 2;
/// Requests in flight on one connection.
const DEPTH: u64 = 16;
/// Pause between two batches of a writer.
const PAUSE: Duration = Duration::from_millis(15);
/// Pause between two attempts to connect.
const RETRY_INTERVAL: Duration = Duration::from_millis(20);
/// Timeout of each step of the handshake, after which a client tries the other host.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_millis(700);
/// Timeout of a reply, in milliseconds, after which a writer tries the other host: the minimum, and
/// the limit of a random addition.
const REPLY_TIMEOUT_MS: (u64, u64) = (400, 2000);
/// Limit of the duration of a reader's session, in milliseconds.
const READER_SESSION_MS_MAX: u64 = 400;
/// Pause between two READs of a reader.
const READ_INTERVAL: Duration = Duration::from_millis(10);

/// One of the two hosts of a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The host that serves the disk at first.
    Source,
    /// The host that the disk moves to.
    Destination,
}

/// Both hosts, source first.
const ROLES: [Role; 2] = [Role::Source, Role::Destination];

/// Which writes must survive the faults of a test.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durable {
    /// Every acknowledged write: processes are killed, hosts are not.
    Acknowledged,
    /// Every write that was flushed or had FUA: hosts lose power.
    Flushed,
}

/// The options of all clients of a test.
#[derive(Clone, Copy, Debug)]
pub struct ClientOptions {
    /// The writes that must survive.
    pub durable: Durable,
    /// Whether errors in replies are allowed.
    pub may_fail: bool,
    /// The seed of all random choices of the clients.
    pub seed: u64,
}

/// What clients observed of one host, in nanoseconds since they were started.
#[derive(Debug)]
struct HostLog {
    /// When the latest successful request was sent.
    last_sent: AtomicU64,
    /// When the first successful reply was received.
    first_reply: AtomicU64,
    /// When the latest connection with a successful handshake was opened.
    last_connect: AtomicU64,
    /// When the first successful handshake was completed.
    first_admitted: AtomicU64,
    /// Count of successful replies.
    replies: AtomicU64,
}

impl HostLog {
    fn new() -> HostLog {
        HostLog {
            last_sent: AtomicU64::new(0),
            first_reply: AtomicU64::new(u64::MAX),
            last_connect: AtomicU64::new(0),
            first_admitted: AtomicU64::new(u64::MAX),
            replies: AtomicU64::new(0),
        }
    }
}

/// The latest flushed, acknowledged and attempted version of a block, updated by its writer.
#[derive(Debug)]
struct Block {
    number: u64,
    flushed: AtomicU64,
    acknowledged: AtomicU64,
    attempted: AtomicU64,
}

/// A snapshot of a [`Block`].
#[derive(Clone, Copy, Debug)]
struct Progress {
    flushed: u64,
    acknowledged: u64,
    attempted: u64,
}

impl Block {
    fn progress(&self) -> Progress {
        // Writers raise the numbers in the opposite order: so none is less than one loaded before
        // it.
        let flushed = self.flushed.load(SeqCst);
        let acknowledged = self.acknowledged.load(SeqCst);
        Progress { flushed, acknowledged, attempted: self.attempted.load(SeqCst) }
    }
}

impl Progress {
    /// The versions that the block may hold, if these writes must survive.
    fn versions(self, durable: Durable) -> Versions {
        let acknowledged = match durable {
            Durable::Acknowledged => self.acknowledged,
            Durable::Flushed => self.flushed,
        };
        Versions { acknowledged, attempted: self.attempted }
    }
}

/// A part of a disk, and the versions that its blocks may hold once no client writes.
#[derive(Clone)]
pub struct Expected {
    first: u64,
    blocks: Vec<Progress>,
}

impl Expected {
    /// A range of a disk, in bytes, with the content of [`super::image::stamped_image`].
    pub fn stamped(part: Range<u64>) -> Expected {
        let nothing = Progress { flushed: 0, acknowledged: 0, attempted: 0 };
        let count = (part.end - part.start) / BLOCK;
        Expected { first: part.start / BLOCK, blocks: vec![nothing; count as usize] }
    }

    /// Writes the initial content to an image that reads as zero in this range.
    pub fn stamp(&self, image: &Path) {
        let file = File::options().write(true).open(image).unwrap();
        for block in self.first..self.first + self.blocks.len() as u64 {
            if !Versions::is_zero(block, 0) {
                file.write_all_at(&stamped(block, 0), block * BLOCK).unwrap();
            }
        }
        file.sync_all().unwrap();
    }

    /// An error message if blocks of the image hold no allowed version.
    pub fn missing_in(&self, image: &Path, durable: Durable) -> Option<String> {
        let file = File::open(image).unwrap();
        let mut data = vec![0; BLOCK as usize];
        let mut missing = (self.first..).zip(&self.blocks).filter_map(|(block, progress)| {
            file.read_exact_at(&mut data, block * BLOCK).unwrap();
            check(block, progress.versions(durable), &data).err()
        });
        let first = missing.next()?;
        Some(format!("{first}; {} blocks more", missing.count()))
    }
}

/// Checks that every unit of a block holds an allowed version.
fn check(block: u64, versions: Versions, data: &[u8]) -> Result<(), String> {
    let wrong = data.chunks(16).position(|found| !versions.permits(block, found));
    let Some(at) = wrong else { return Ok(()) };
    let word = |at: usize| u64::from_le_bytes(data[at..at + 8].try_into().unwrap());
    let (stamp, version) = (word(at * 16), word(at * 16 + 8));
    let found = match stamp.checked_sub(1) {
        Some(stamp) => format!("version {version} of block {stamp}"),
        None => "zeros".to_owned(),
    };
    Err(format!("block {block}, unit {at}: {found}, where {versions:?} were expected"))
}

/// The state that all clients share.
#[derive(Debug)]
struct Shared {
    stop: AtomicBool,
    began: Instant,
    endpoints: [Endpoint; 2],
    log: [HostLog; 2],
    blocks: Vec<Block>,
    options: ClientOptions,
    /// Set while writers must have no session.
    paused: AtomicBool,
    /// Count of writers that have or open a session.
    writers_active: AtomicU64,
    violations: Mutex<Vec<String>>,
}

/// Running clients. Dropping them stops them.
pub struct Clients {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Clients {
    /// Starts clients of a disk that is served at the first endpoint and will move to the second.
    pub fn start(endpoints: [Endpoint; 2], expected: &Expected, options: ClientOptions) -> Clients {
        let block = |(number, progress): (u64, &Progress)| Block {
            number,
            flushed: AtomicU64::new(progress.flushed),
            acknowledged: AtomicU64::new(progress.acknowledged),
            attempted: AtomicU64::new(progress.attempted),
        };
        let shared = Arc::new(Shared {
            stop: AtomicBool::new(false),
            began: Instant::now(),
            endpoints,
            log: [HostLog::new(), HostLog::new()],
            blocks: (expected.first..).zip(&expected.blocks).map(block).collect(),
            options,
            paused: AtomicBool::new(false),
            writers_active: AtomicU64::new(0),
            violations: Mutex::default(),
        });
        let mut random = Rng::with_seed(options.seed);
        let mut threads = Vec::new();
        for number in 0..WRITERS {
            let (shared, random) = (Arc::clone(&shared), random.fork());
            let unflushed = HashMap::new();
            let writer = Writer { shared, number, random, unflushed };
            threads.push(thread::spawn(move || writer.run()));
        }
        for role in ROLES {
            let reader = Reader { shared: Arc::clone(&shared), role, random: random.fork() };
            threads.push(thread::spawn(move || reader.run()));
        }
        Clients { shared, threads }
    }

    /// Count of successful requests at this host.
    pub fn replies(&self, role: Role) -> u64 {
        self.shared.log(role).replies.load(SeqCst)
    }

    /// The first violation so far: a wrong reply, or two hosts that serve concurrently.
    pub fn violation(&self) -> Option<String> {
        let violations = self.shared.violations.lock().unwrap();
        violations.first().cloned().or_else(|| self.shared.both_serve())
    }

    /// Makes writers close their sessions and open none. Returns once no writer has a session.
    #[track_caller]
    pub fn pause_writers(&self) {
        self.shared.paused.store(true, SeqCst);
        wait_until("writers to pause", || self.shared.writers_active.load(SeqCst) == 0);
    }

    /// Lets writers open sessions again.
    pub fn resume_writers(&self) {
        self.shared.paused.store(false, SeqCst);
    }

    /// Stops all clients. Returns the versions that the disk may hold now.
    pub fn stop(mut self) -> Expected {
        self.shared.stop.store(true, SeqCst);
        for thread in std::mem::take(&mut self.threads) {
            thread.join().unwrap();
        }
        let blocks: Vec<Progress> = self.shared.blocks.iter().map(Block::progress).collect();
        Expected { first: self.shared.blocks[0].number, blocks }
    }
}

impl Drop for Clients {
    fn drop(&mut self) {
        self.shared.stop.store(true, SeqCst);
    }
}

impl Shared {
    fn log(&self, role: Role) -> &HostLog {
        &self.log[role as usize]
    }

    fn now(&self) -> u64 {
        self.began.elapsed().as_nanos() as u64
    }

    fn is_stopping(&self) -> bool {
        self.stop.load(SeqCst)
    }

    fn may_write(&self) -> bool {
        !self.paused.load(SeqCst) && !self.is_stopping()
    }

    fn report(&self, violation: String) {
        self.violations.lock().unwrap().push(violation);
    }

    fn record_reply(&self, role: Role, sent: u64) {
        let log = self.log(role);
        log.replies.fetch_add(1, SeqCst);
        log.last_sent.fetch_max(sent, SeqCst);
        log.first_reply.fetch_min(self.now(), SeqCst);
    }

    /// An error message if the source replied, or admitted a client, after the destination had.
    fn both_serve(&self) -> Option<String> {
        let [source, destination] = &self.log;
        let late = |last: &AtomicU64, first: &AtomicU64| {
            let late = last.load(SeqCst).checked_sub(first.load(SeqCst))?;
            (late > 0).then(|| Duration::from_nanos(late))
        };
        if let Some(late) = late(&source.last_sent, &destination.first_reply) {
            return Some(format!("both serve: the source replies {late:?} after the destination"));
        }
        let late = late(&source.last_connect, &destination.first_admitted)?;
        Some(format!("both admit clients: the source does {late:?} after the destination"))
    }

    /// Connects to this host and completes the handshake for the default export.
    fn open_session(&self, role: Role) -> io::Result<Wire> {
        let began = self.now();
        let mut wire = Wire::try_connect_within(&self.endpoints[role as usize], HANDSHAKE_TIMEOUT)?;
        wire.set_read_timeout(HANDSHAKE_TIMEOUT);
        receive::<18>(&mut wire)?;
        let flags = raw::FIXED_NEWSTYLE | raw::NO_ZEROES;
        let go = raw::encode_option(raw::OPT_GO, &raw::encode_go(b"", &[]));
        wire.try_send(&[&flags.to_be_bytes()[..], &go].concat())?;
        loop {
            let head = receive::<20>(&mut wire)?;
            receive_exact(&mut wire, &mut vec![0; word(&head, 16) as usize])?;
            match word(&head, 12) {
                raw::REP_ACK => break,
                kind if kind & raw::REP_IS_ERROR != 0 => {
                    return Err(ErrorKind::PermissionDenied.into());
                }
                _ => {}
            }
        }
        let log = self.log(role);
        log.last_connect.fetch_max(began, SeqCst);
        log.first_admitted.fetch_min(self.now(), SeqCst);
        Ok(wire)
    }

    /// Receives the header of the next reply. Returns its cookie, and whether the request
    /// succeeded.
    fn recv_reply_header(&self, wire: &mut Wire) -> io::Result<(u64, bool)> {
        let head = receive::<16>(wire)?;
        let error = word(&head, 4);
        if word(&head, 0) != raw::SIMPLE_REPLY {
            self.report(format!("malformed reply header {head:02x?}"));
            return Err(ErrorKind::InvalidData.into());
        }
        if error != 0 && !self.options.may_fail {
            self.report(format!("a request failed with error {error}"));
        }
        Ok((u64::from_be_bytes(head[8..].try_into().unwrap()), error == 0))
    }
}

/// Writes to its own blocks at the host that admits it.
struct Writer {
    shared: Arc<Shared>,
    /// Owns the blocks with index modulo [`WRITERS`] equal to this.
    number: u64,
    random: Rng,
    /// Index and version of the writes acknowledged in this session since the last FLUSH was sent.
    unflushed: HashMap<usize, u64>,
}

/// A request until its reply is received.
#[derive(Debug)]
enum Pending {
    /// A write: index of the block, version, whether with FUA.
    Write(usize, u64, bool),
    /// A READ: index of the block, versions that it may hold.
    Read(usize, Versions),
    /// A FLUSH: index and version of the writes that it makes durable.
    Flush(HashMap<usize, u64>),
}

impl Writer {
    fn run(mut self) {
        while !self.shared.is_stopping() {
            for role in ROLES {
                self.shared.writers_active.fetch_add(1, SeqCst);
                if self.shared.may_write()
                    && let Ok(wire) = self.shared.open_session(role)
                {
                    self.run_session(wire, role);
                }
                self.shared.writers_active.fetch_sub(1, SeqCst);
            }
            thread::sleep(RETRY_INTERVAL);
        }
    }

    /// Sends batches until the connection is lost or a reply times out.
    fn run_session(&mut self, mut wire: Wire, role: Role) {
        let timeout = REPLY_TIMEOUT_MS.0 + self.random.u64(..REPLY_TIMEOUT_MS.1);
        wire.set_read_timeout(Duration::from_millis(timeout));
        // A FLUSH covers no write of an earlier session: that server may have lost it.
        self.unflushed.clear();
        while self.shared.may_write() && self.run_batch(&mut wire, role).is_ok() {
            thread::sleep(PAUSE);
        }
        if self.random.u64(..2) == 0 {
            wire.reset();
        }
    }

    /// Sends up to [`DEPTH`] requests and receives their replies.
    fn run_batch(&mut self, wire: &mut Wire, role: Role) -> io::Result<()> {
        let sent = self.shared.now();
        let mut pending = HashMap::new();
        let mut bytes = Vec::new();
        let own = self.shared.blocks.len() as u64 / WRITERS;
        for _ in 0..DEPTH.min(own) {
            let index = self.random.u64(..own) * WRITERS + self.number;
            if let Entry::Vacant(vacant) = pending.entry(index) {
                vacant.insert(self.push_request(index, &mut bytes));
            }
        }
        wire.try_send(&bytes)?;
        while !pending.is_empty() {
            let (cookie, success) = self.shared.recv_reply_header(wire)?;
            let Some(request) = pending.remove(&cookie) else {
                self.shared.report(format!("a reply to cookie {cookie}, which is not in flight"));
                return Err(ErrorKind::InvalidData.into());
            };
            if success {
                self.shared.record_reply(role, sent);
                self.complete(wire, request)?;
            }
        }
        Ok(())
    }

    /// Appends a random request to `bytes`; its cookie is the index of the block.
    fn push_request(&mut self, index: u64, bytes: &mut Vec<u8>) -> Pending {
        let block = &self.shared.blocks[index as usize];
        let (offset, length) = (block.number * BLOCK, BLOCK as u32);
        let choice = self.random.u64(..8);
        if choice == 0 {
            bytes.extend(raw::encode_request(raw::FLUSH, 0, index, 0, 0));
            return Pending::Flush(std::mem::take(&mut self.unflushed));
        }
        if choice == 1 {
            bytes.extend(raw::encode_request(raw::READ, 0, index, offset, length));
            let versions = block.progress().versions(self.shared.options.durable);
            return Pending::Read(index as usize, versions);
        }
        let version = block.attempted.fetch_add(1, SeqCst) + 1;
        let flags = if choice == 2 { raw::FUA } else { 0 };
        if Versions::is_zero(block.number, version) {
            bytes.extend(raw::encode_request(raw::WRITE_ZEROES, flags, index, offset, length));
        } else {
            bytes.extend(raw::encode_request(raw::WRITE, flags, index, offset, length));
            bytes.extend(unit(block.number, version).repeat(BLOCK as usize / 16));
        }
        Pending::Write(index as usize, version, flags == raw::FUA)
    }

    /// Updates the versions after a success; receives and checks the data of a READ.
    fn complete(&mut self, wire: &mut Wire, request: Pending) -> io::Result<()> {
        let blocks = &self.shared.blocks;
        match request {
            Pending::Flush(flushed) => {
                for (index, version) in flushed {
                    blocks[index].flushed.fetch_max(version, SeqCst);
                }
            }
            Pending::Write(index, version, fua) => {
                blocks[index].acknowledged.fetch_max(version, SeqCst);
                if fua {
                    blocks[index].flushed.fetch_max(version, SeqCst);
                } else {
                    self.unflushed.insert(index, version);
                }
            }
            Pending::Read(index, versions) => {
                let data = receive::<{ BLOCK as usize }>(wire)?;
                if let Err(wrong) = check(blocks[index].number, versions, &data) {
                    self.shared.report(format!("a writer reads {wrong}"));
                }
            }
        }
        Ok(())
    }
}

/// Reads random blocks at one host in short sessions.
struct Reader {
    shared: Arc<Shared>,
    role: Role,
    random: Rng,
}

impl Reader {
    fn run(mut self) {
        while !self.shared.is_stopping() {
            if let Ok(mut wire) = self.shared.open_session(self.role) {
                let until = Instant::now()
                    + Duration::from_millis(self.random.u64(..READER_SESSION_MS_MAX));
                while self.read(&mut wire).is_ok()
                    && Instant::now() < until
                    && !self.shared.is_stopping()
                {
                    thread::sleep(READ_INTERVAL);
                }
            }
            thread::sleep(RETRY_INTERVAL);
        }
    }

    fn read(&mut self, wire: &mut Wire) -> io::Result<()> {
        let index = self.random.u64(..self.shared.blocks.len() as u64);
        let block = &self.shared.blocks[index as usize];
        let before = block.progress().versions(self.shared.options.durable);
        let sent = self.shared.now();
        let (offset, length) = (block.number * BLOCK, BLOCK as u32);
        wire.try_send(&raw::encode_request(raw::READ, 0, index, offset, length))?;
        let (_, success) = self.shared.recv_reply_header(wire)?;
        if success {
            let data = receive::<{ BLOCK as usize }>(wire)?;
            self.shared.record_reply(self.role, sent);
            let attempted = block.progress().attempted;
            if let Err(wrong) = check(block.number, Versions { attempted, ..before }, &data) {
                self.shared.report(format!("a reader at the {:?} reads {wrong}", self.role));
            }
        }
        Ok(())
    }
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn receive<const LENGTH: usize>(wire: &mut Wire) -> io::Result<[u8; LENGTH]> {
    let mut bytes = [0; LENGTH];
    receive_exact(wire, &mut bytes)?;
    Ok(bytes)
}

fn receive_exact(wire: &mut Wire, bytes: &mut [u8]) -> io::Result<()> {
    let mut have = 0;
    while have < bytes.len() {
        match wire.try_recv(&mut bytes[have..]) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(count) => have += count,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
