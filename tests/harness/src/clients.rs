//! Clients that look for the disk at both hosts all the time, and what they saw there.
//! Never uses the library, and never looks at an image or a process before all is over.
//!
//! Writers number every write of a block and remember what was acknowledged, and what was flushed;
//! readers come and go, or stay a while. A block must read as some version from the last that had
//! to survive when the READ was sent to the last attempted when its reply came.
//!
//! The disk moves once: after the new host has answered something, the old one must not answer
//! what is sent to it. Times are taken before a request is sent and after its reply has come, so
//! that two which merely overlap are never held against anybody.

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
/// Between two batches of a writer.
const PAUSE: Duration = Duration::from_millis(15);
/// Between two tries to be let in.
const SEARCH: Duration = Duration::from_millis(20);
/// How long a server may take for a step of the handshake before a client looks elsewhere.
const HANDSHAKE: Duration = Duration::from_millis(700);
/// How long a writer waits for a reply before it looks elsewhere, in milliseconds: at least, and
/// how much longer at most.
const REPLY_TIMEOUT_MS: (u64, u64) = (400, 2000);
/// Longest time that a reader stays, in milliseconds, and how long it does nothing between two
/// READs.
const STAY_MS: u64 = 400;
const READ_EVERY: Duration = Duration::from_millis(10);

/// One of the two hosts of a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Where the disk is first.
    Source,
    /// Where it moves.
    Destination,
}

/// Both, source first.
const ROLES: [Role; 2] = [Role::Source, Role::Destination];

/// What has to survive what may happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durable {
    /// Every acknowledged write: processes die, hosts do not.
    Acknowledged,
    /// Every write that was flushed, or made with FUA: hosts lose their power.
    Flushed,
}

/// How clients work.
#[derive(Clone, Copy, Debug)]
pub struct ClientOptions {
    /// Which writes must survive.
    pub durable: Durable,
    /// Requests may be answered with errors.
    pub may_fail: bool,
    /// Of everything that the clients choose at random.
    pub seed: u64,
}

/// What one host was seen to do, in nanoseconds since the clients began.
#[derive(Debug)]
struct Seen {
    /// When the last request was sent that it answered with success.
    last_sent: AtomicU64,
    /// When the first such answer came.
    first_answered: AtomicU64,
    /// The same of clients that were let in, whether or not a request was answered.
    last_came: AtomicU64,
    first_let_in: AtomicU64,
    answers: AtomicU64,
}

impl Seen {
    fn nothing() -> Seen {
        Seen {
            last_sent: AtomicU64::new(0),
            first_answered: AtomicU64::new(u64::MAX),
            last_came: AtomicU64::new(0),
            first_let_in: AtomicU64::new(u64::MAX),
            answers: AtomicU64::new(0),
        }
    }
}

/// What is known of one block.
#[derive(Debug)]
struct Block {
    number: u64,
    flushed: AtomicU64,
    acknowledged: AtomicU64,
    attempted: AtomicU64,
}

/// The same at one moment.
#[derive(Clone, Copy, Debug)]
struct Known {
    flushed: u64,
    acknowledged: u64,
    attempted: u64,
}

impl Block {
    fn known(&self) -> Known {
        // In this order: none falls behind the one before.
        let flushed = self.flushed.load(SeqCst);
        let acknowledged = self.acknowledged.load(SeqCst);
        Known { flushed, acknowledged, attempted: self.attempted.load(SeqCst) }
    }
}

impl Known {
    /// What the block may hold.
    fn versions(self, durable: Durable) -> Versions {
        let acknowledged = match durable {
            Durable::Acknowledged => self.acknowledged,
            Durable::Flushed => self.flushed,
        };
        Versions { acknowledged, attempted: self.attempted }
    }
}

/// A part of a disk, and what must be in it once no client writes any more.
#[derive(Clone)]
pub struct Expected {
    first: u64,
    blocks: Vec<Known>,
}

impl Expected {
    /// This part of a disk, in bytes, as [`super::image::stamped_image`] makes it.
    pub fn stamped(part: Range<u64>) -> Expected {
        let nothing = Known { flushed: 0, acknowledged: 0, attempted: 0 };
        let count = (part.end - part.start) / BLOCK;
        Expected { first: part.start / BLOCK, blocks: vec![nothing; count as usize] }
    }

    /// Makes it so in an image that has only zeros there.
    pub fn stamp(&self, image: &Path) {
        let file = File::options().write(true).open(image).unwrap();
        for block in self.first..self.first + self.blocks.len() as u64 {
            if !Versions::is_zero(block, 0) {
                file.write_all_at(&stamped(block, 0), block * BLOCK).unwrap();
            }
        }
        file.sync_all().unwrap();
    }

    /// What of it is not in the image, if something is missing.
    pub fn missing_in(&self, image: &Path, durable: Durable) -> Option<String> {
        let file = File::open(image).unwrap();
        let mut data = vec![0; BLOCK as usize];
        let mut missing = (self.first..).zip(&self.blocks).filter_map(|(block, known)| {
            file.read_exact_at(&mut data, block * BLOCK).unwrap();
            check(block, known.versions(durable), &data).err()
        });
        let first = missing.next()?;
        Some(format!("{first}; {} blocks more", missing.count()))
    }
}

/// Whether a block's content is one that it may have.
fn check(block: u64, versions: Versions, data: &[u8]) -> Result<(), String> {
    let strange = data.chunks(16).position(|found| !versions.permit(block, found));
    let Some(at) = strange else { return Ok(()) };
    let word = |at: usize| u64::from_le_bytes(data[at..at + 8].try_into().unwrap());
    let (stamp, version) = (word(at * 16), word(at * 16 + 8));
    let found = match stamp.checked_sub(1) {
        Some(stamp) => format!("version {version} of block {stamp}"),
        None => "zeros".to_owned(),
    };
    Err(format!("block {block}, unit {at}: {found}, where {versions:?} were expected"))
}

/// What all clients know together.
#[derive(Debug)]
struct Shared {
    stop: AtomicBool,
    began: Instant,
    endpoints: [Endpoint; 2],
    seen: [Seen; 2],
    blocks: Vec<Block>,
    options: ClientOptions,
    /// Writers are to write nothing for the time being.
    held: AtomicBool,
    /// Writers with a session.
    working: AtomicU64,
    violations: Mutex<Vec<String>>,
}

/// Clients at work.
pub struct Clients {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Clients {
    /// Clients of a disk that is at the first of these and is about to move to the second.
    pub fn start(endpoints: [Endpoint; 2], expected: &Expected, options: ClientOptions) -> Clients {
        let block = |(number, known): (u64, &Known)| Block {
            number,
            flushed: AtomicU64::new(known.flushed),
            acknowledged: AtomicU64::new(known.acknowledged),
            attempted: AtomicU64::new(known.attempted),
        };
        let shared = Arc::new(Shared {
            stop: AtomicBool::new(false),
            began: Instant::now(),
            endpoints,
            seen: [Seen::nothing(), Seen::nothing()],
            blocks: (expected.first..).zip(&expected.blocks).map(block).collect(),
            options,
            held: AtomicBool::new(false),
            working: AtomicU64::new(0),
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

    /// Requests that this host has answered.
    pub fn replies(&self, role: Role) -> u64 {
        self.shared.seen(role).answers.load(SeqCst)
    }

    /// What must not have been seen, so far.
    pub fn violation(&self) -> Option<String> {
        let violations = self.shared.violations.lock().unwrap();
        violations.first().cloned().or_else(|| self.shared.two_serve())
    }

    /// Writers end their sessions and begin none; returns when none has any.
    #[track_caller]
    pub fn pause_writers(&self) {
        self.shared.held.store(true, SeqCst);
        wait_until("writers to pause", || self.shared.working.load(SeqCst) == 0);
    }

    /// Writers go on.
    pub fn resume_writers(&self) {
        self.shared.held.store(false, SeqCst);
    }

    /// Ends all clients; what there is to be found now.
    pub fn stop(mut self) -> Expected {
        self.shared.stop.store(true, SeqCst);
        for thread in std::mem::take(&mut self.threads) {
            thread.join().unwrap();
        }
        let blocks: Vec<Known> = self.shared.blocks.iter().map(Block::known).collect();
        Expected { first: self.shared.blocks[0].number, blocks }
    }
}

/// Whatever the test has come to, they work no more.
impl Drop for Clients {
    fn drop(&mut self) {
        self.shared.stop.store(true, SeqCst);
    }
}

impl Shared {
    fn seen(&self, role: Role) -> &Seen {
        &self.seen[role as usize]
    }

    fn now(&self) -> u64 {
        self.began.elapsed().as_nanos() as u64
    }

    fn stopping(&self) -> bool {
        self.stop.load(SeqCst)
    }

    fn may_write(&self) -> bool {
        !self.held.load(SeqCst) && !self.stopping()
    }

    fn report(&self, what: String) {
        self.violations.lock().unwrap().push(what);
    }

    fn answered(&self, role: Role, sent: u64) {
        let seen = self.seen(role);
        seen.answers.fetch_add(1, SeqCst);
        seen.last_sent.fetch_max(sent, SeqCst);
        seen.first_answered.fetch_min(self.now(), SeqCst);
    }

    /// Whether the old host did something after the new one had begun to.
    fn two_serve(&self) -> Option<String> {
        let [old, new] = &self.seen;
        let late = |last: &AtomicU64, first: &AtomicU64| {
            let late = last.load(SeqCst).checked_sub(first.load(SeqCst))?;
            (late > 0).then(|| Duration::from_nanos(late))
        };
        if let Some(late) = late(&old.last_sent, &new.first_answered) {
            return Some(format!("both serve: the old host answers {late:?} after the new one"));
        }
        let late = late(&old.last_came, &new.first_let_in)?;
        Some(format!("both let clients in: the old host does {late:?} after the new one"))
    }

    /// A session there, whose handshake is over.
    fn enter(&self, role: Role) -> io::Result<Wire> {
        let came = self.now();
        let mut wire = Wire::try_connect_within(&self.endpoints[role as usize], HANDSHAKE)?;
        wire.set_read_timeout(HANDSHAKE);
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
        let seen = self.seen(role);
        seen.last_came.fetch_max(came, SeqCst);
        seen.first_let_in.fetch_min(self.now(), SeqCst);
        Ok(wire)
    }

    /// The head of the next reply: its cookie, and whether it is a success.
    fn reply(&self, wire: &mut Wire) -> io::Result<(u64, bool)> {
        let head = receive::<16>(wire)?;
        let error = word(&head, 4);
        if word(&head, 0) != raw::SIMPLE_REPLY {
            self.report(format!("a reply begins with {head:02x?}"));
            return Err(ErrorKind::InvalidData.into());
        }
        if error != 0 && !self.options.may_fail {
            self.report(format!("a request failed with error {error}"));
        }
        Ok((u64::from_be_bytes(head[8..].try_into().unwrap()), error == 0))
    }
}

/// Writes to its blocks, wherever it is let in.
struct Writer {
    shared: Arc<Shared>,
    /// Its blocks are those whose place has this remainder by [`WRITERS`].
    number: u64,
    random: Rng,
    /// What was acknowledged in this session since the last FLUSH was sent: places and versions.
    unflushed: HashMap<usize, u64>,
}

/// What a request is about, until it is answered.
#[derive(Debug)]
enum Asked {
    /// This version of that block, durably or not.
    Written(usize, u64, bool),
    /// That block, with the versions that it may have.
    Read(usize, Versions),
    /// With what it makes durable.
    Flush(HashMap<usize, u64>),
}

impl Writer {
    fn run(mut self) {
        while !self.shared.stopping() {
            for role in ROLES {
                self.shared.working.fetch_add(1, SeqCst);
                if self.shared.may_write()
                    && let Ok(wire) = self.shared.enter(role)
                {
                    self.work(wire, role);
                }
                self.shared.working.fetch_sub(1, SeqCst);
            }
            thread::sleep(SEARCH);
        }
    }

    /// Until the connection is lost, or seems to be.
    fn work(&mut self, mut wire: Wire, role: Role) {
        let patience = REPLY_TIMEOUT_MS.0 + self.random.u64(..REPLY_TIMEOUT_MS.1);
        wire.set_read_timeout(Duration::from_millis(patience));
        // What an earlier session has not flushed may have been lost since.
        self.unflushed.clear();
        while self.shared.may_write() && self.batch(&mut wire, role).is_ok() {
            thread::sleep(PAUSE);
        }
        if self.random.u64(..2) == 0 {
            wire.reset();
        }
    }

    /// Sends some requests and takes their replies.
    fn batch(&mut self, wire: &mut Wire, role: Role) -> io::Result<()> {
        let sent = self.shared.now();
        let mut pending = HashMap::new();
        let mut bytes = Vec::new();
        let own = self.shared.blocks.len() as u64 / WRITERS;
        for _ in 0..DEPTH.min(own) {
            let place = self.random.u64(..own) * WRITERS + self.number;
            if let Entry::Vacant(vacant) = pending.entry(place) {
                vacant.insert(self.ask(place, &mut bytes));
            }
        }
        wire.try_send(&bytes)?;
        while !pending.is_empty() {
            let (cookie, success) = self.shared.reply(wire)?;
            let Some(asked) = pending.remove(&cookie) else {
                self.shared.report(format!("a reply to {cookie}, which was not asked"));
                return Err(ErrorKind::InvalidData.into());
            };
            if success {
                self.shared.answered(role, sent);
                self.note(wire, asked)?;
            }
        }
        Ok(())
    }

    /// Encodes a request whose cookie is the block's place.
    fn ask(&mut self, place: u64, bytes: &mut Vec<u8>) -> Asked {
        let block = &self.shared.blocks[place as usize];
        let (offset, length) = (block.number * BLOCK, BLOCK as u32);
        let choice = self.random.u64(..8);
        if choice == 0 {
            bytes.extend(raw::encode_request(raw::FLUSH, 0, place, 0, 0));
            return Asked::Flush(std::mem::take(&mut self.unflushed));
        }
        if choice == 1 {
            bytes.extend(raw::encode_request(raw::READ, 0, place, offset, length));
            let versions = block.known().versions(self.shared.options.durable);
            return Asked::Read(place as usize, versions);
        }
        let version = block.attempted.fetch_add(1, SeqCst) + 1;
        let flags = if choice == 2 { raw::FUA } else { 0 };
        if Versions::is_zero(block.number, version) {
            bytes.extend(raw::encode_request(raw::WRITE_ZEROES, flags, place, offset, length));
        } else {
            bytes.extend(raw::encode_request(raw::WRITE, flags, place, offset, length));
            bytes.extend(unit(block.number, version).repeat(BLOCK as usize / 16));
        }
        Asked::Written(place as usize, version, flags == raw::FUA)
    }

    fn note(&mut self, wire: &mut Wire, asked: Asked) -> io::Result<()> {
        let blocks = &self.shared.blocks;
        match asked {
            Asked::Flush(flushed) => {
                for (place, version) in flushed {
                    blocks[place].flushed.fetch_max(version, SeqCst);
                }
            }
            Asked::Written(place, version, durably) => {
                blocks[place].acknowledged.fetch_max(version, SeqCst);
                if durably {
                    blocks[place].flushed.fetch_max(version, SeqCst);
                } else {
                    self.unflushed.insert(place, version);
                }
            }
            Asked::Read(place, versions) => {
                let data = receive::<{ BLOCK as usize }>(wire)?;
                if let Err(strange) = check(blocks[place].number, versions, &data) {
                    self.shared.report(format!("a writer reads {strange}"));
                }
            }
        }
        Ok(())
    }
}

/// Reads here and there at one host, for a moment or two, whenever it is let in.
struct Reader {
    shared: Arc<Shared>,
    role: Role,
    random: Rng,
}

impl Reader {
    fn run(mut self) {
        while !self.shared.stopping() {
            if let Ok(mut wire) = self.shared.enter(self.role) {
                let until = Instant::now() + Duration::from_millis(self.random.u64(..STAY_MS));
                while self.read(&mut wire).is_ok()
                    && Instant::now() < until
                    && !self.shared.stopping()
                {
                    thread::sleep(READ_EVERY);
                }
            }
            thread::sleep(SEARCH);
        }
    }

    fn read(&mut self, wire: &mut Wire) -> io::Result<()> {
        let place = self.random.u64(..self.shared.blocks.len() as u64);
        let block = &self.shared.blocks[place as usize];
        let before = block.known().versions(self.shared.options.durable);
        let sent = self.shared.now();
        let (offset, length) = (block.number * BLOCK, BLOCK as u32);
        wire.try_send(&raw::encode_request(raw::READ, 0, place, offset, length))?;
        let (_, success) = self.shared.reply(wire)?;
        if success {
            let data = receive::<{ BLOCK as usize }>(wire)?;
            self.shared.answered(self.role, sent);
            let attempted = block.known().attempted;
            if let Err(strange) = check(block.number, Versions { attempted, ..before }, &data) {
                self.shared.report(format!("a reader at the {:?} reads {strange}", self.role));
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
