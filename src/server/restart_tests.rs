//! Sessions that go on in another server, as over a restart: packed up between any two bytes.

use super::{Server, ServerConfig, SessionSettings, StoredSessions, Style};
use crate::disk::Disk;
use crate::disk::memory::{FailingBackend, Faults, MemoryBackend, Op};
use crate::disk::{Access, FileBackend};
use crate::nbd::reply::{Chunk, Dialect, Head};
use crate::nbd::request::Header;
use crate::nbd::wire::{CommandFlags, CommandKind, ErrorCode};
use crate::net::{Address, Listener};
use nix::libc::{EIO, ENOSPC};
use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 4 * MIB;
/// What is only read; behind it lies what is only written.
const READ_ONLY: u64 = 3 * MIB;
const PATIENCE: Duration = Duration::from_secs(20);

/// The next of an endless row of numbers below `limit`; the same for the same seed (xorshift).
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 16) % limit
    }
}

fn open(
    disk: &Arc<Disk>,
    listeners: Vec<Listener>,
    style: Style,
    stored: StoredSessions,
) -> Server {
    let settings = SessionSettings { style, ..SessionSettings::default() };
    let anybody = ServerConfig::allow_all(listeners, disk);
    Server::start(ServerConfig { settings, stored, ..anybody }).unwrap()
}

/// Data that is not zero anywhere, then a hole, then what is written to.
fn disk() -> (tempfile::NamedTempFile, Arc<Disk>) {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(SIZE).unwrap();
    let image = FileBackend::open(file.path(), Access { read_only: false }).unwrap();
    let disk = Arc::new(Disk::new(Box::new(image), false));
    let data: Vec<u8> = (0..2 * MIB).map(|at| (at % 251) as u8 + 1).collect();
    disk.enter(&|| false).unwrap().write(0, &data).unwrap();
    (file, disk)
}

/// What lies at `offset` of what is only read.
fn at(offset: u64) -> u8 {
    if offset < 2 * MIB { (offset % 251) as u8 + 1 } else { 0 }
}

/// Either kind of connection, never waiting.
enum Wire {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Wire {
    fn to(address: &Address) -> Self {
        match address {
            Address::Tcp(to) => {
                let stream = TcpStream::connect(to).unwrap();
                stream.set_nonblocking(true).unwrap();
                Self::Tcp(stream)
            }
            Address::Unix(path) => {
                let stream = UnixStream::connect(path).unwrap();
                stream.set_nonblocking(true).unwrap();
                Self::Unix(stream)
            }
        }
    }

    /// How many bytes were taken.
    fn send(&mut self, bytes: &[u8]) -> usize {
        let sent = match self {
            Self::Tcp(stream) => stream.write(bytes),
            Self::Unix(stream) => stream.write(bytes),
        };
        or_none(sent)
    }

    fn receive(&mut self, limit: usize, into: &mut Vec<u8>) -> bool {
        let mut bytes = vec![0; limit];
        let received = match self {
            Self::Tcp(stream) => stream.read(&mut bytes),
            Self::Unix(stream) => stream.read(&mut bytes),
        };
        let over = matches!(received, Ok(0));
        into.extend_from_slice(&bytes[..or_none(received)]);
        over
    }
}

fn or_none(count: io::Result<usize>) -> usize {
    match count {
        Ok(count) => count,
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
        Err(error) => panic!("the connection broke: {error}"),
    }
}

/// What a client asked, to hold the reply against.
#[derive(Debug)]
enum Asked {
    Read(u64, u64),
    /// Anything else, and the error it must be answered with.
    Other(u32),
}

/// All that a client says, and what it must hear.
struct Script {
    dialect: Dialect,
    bytes: Vec<u8>,
    asked: BTreeMap<u64, Asked>,
    /// What is to be on the disk at the end, from [`READ_ONLY`] on.
    written: Vec<u8>,
}

impl Script {
    fn new(dialect: Dialect, oldstyle: bool, dice: &mut Dice) -> Self {
        let (asked, written) = (BTreeMap::new(), vec![0; MIB as usize]);
        let mut script = Self { dialect, bytes: Vec::new(), asked, written };
        if !oldstyle {
            script.greet();
        }
        for cookie in 1..=40 {
            script.request(cookie, dice);
        }
        script.header(CommandKind::Disconnect, 99, 0, 0);
        script
    }

    fn greet(&mut self) {
        self.bytes.extend_from_slice(&3u32.to_be_bytes());
        match self.dialect {
            Dialect::Simple => {}
            Dialect::Structured => self.option(8, &[]),
            Dialect::Extended => self.option(11, &[]),
        }
        self.option(77, &[1; 300]);
        self.option(7, &[0; 6]);
    }

    fn option(&mut self, number: u32, data: &[u8]) {
        self.bytes.extend_from_slice(b"IHAVEOPT");
        self.bytes.extend_from_slice(&number.to_be_bytes());
        self.bytes.extend_from_slice(&(data.len() as u32).to_be_bytes());
        self.bytes.extend_from_slice(data);
    }

    fn header(&mut self, kind: CommandKind, cookie: u64, offset: u64, length: u64) {
        let payload = kind == CommandKind::Write && self.dialect == Dialect::Extended;
        let flags = if payload { CommandFlags::PAYLOAD_LEN.bits() } else { 0 };
        let header = Header { flags, kind: kind.number(), cookie, offset, length };
        header.encode(self.dialect, &mut self.bytes);
    }

    fn request(&mut self, cookie: u64, dice: &mut Dice) {
        let most = [600 * 1024, 9000][dice.below(2) as usize];
        let (length, start) = (1 + dice.below(most), dice.below(READ_ONLY - most));
        let target = dice.below(MIB - length);
        let asked = match dice.below(10) {
            0..=4 => {
                self.header(CommandKind::Read, cookie, start, length);
                Asked::Read(start, length)
            }
            5..=7 => {
                let data: Vec<u8> = (0..length).map(|_| dice.below(256) as u8).collect();
                self.header(CommandKind::Write, cookie, READ_ONLY + target, length);
                self.bytes.extend_from_slice(&data);
                self.written[target as usize..][..data.len()].copy_from_slice(&data);
                Asked::Other(0)
            }
            8 => {
                self.header(CommandKind::Write, cookie, SIZE, length);
                self.bytes.resize(self.bytes.len() + length as usize, 0xee);
                Asked::Other(ErrorCode::NoSpace.number())
            }
            _ => {
                self.header(CommandKind::Flush, cookie, 0, 0);
                Asked::Other(0)
            }
        };
        self.asked.insert(cookie, asked);
    }

    /// Holds what was heard against what must be.
    fn check(&self, mut heard: &[u8], oldstyle: bool) {
        skip_greeting(&mut heard, oldstyle);
        let mut open: BTreeMap<u64, u64> = BTreeMap::new();
        let mut answered = 0;
        while !heard.is_empty() {
            let (head, used) = Head::decode(heard).unwrap().unwrap();
            heard = &heard[used..];
            let (cookie, done) = match head {
                Head::Simple { cookie, error } => {
                    self.simple(cookie, error, &mut heard);
                    (cookie, true)
                }
                Head::Chunk { cookie, done, kind, length, .. } => {
                    let (payload, rest) = heard.split_at(length as usize);
                    heard = rest;
                    let told = self.chunk(cookie, kind, payload);
                    *open.entry(cookie).or_default() += told;
                    (cookie, done)
                }
            };
            if done {
                answered += 1;
                if let (Asked::Read(_, length), Some(told)) =
                    (&self.asked[&cookie], open.get(&cookie))
                {
                    assert_eq!(told, length, "bytes of reply {cookie}");
                }
            }
        }
        assert_eq!(answered, self.asked.len(), "replies");
    }

    fn simple(&self, cookie: u64, error: u32, heard: &mut &[u8]) {
        match self.asked[&cookie] {
            Asked::Read(offset, length) => {
                assert_eq!(error, 0);
                let (data, rest) = heard.split_at(length as usize);
                assert!(data.iter().zip(offset..).all(|(byte, place)| *byte == at(place)));
                *heard = rest;
            }
            Asked::Other(expected) => assert_eq!(error, expected),
        }
    }

    /// How many bytes of its read the chunk tells.
    fn chunk(&self, cookie: u64, kind: u16, payload: &[u8]) -> u64 {
        let needed = Chunk::needed(kind, payload.len() as u64) as usize;
        let chunk = Chunk::decode(kind, payload.len() as u64, &payload[..needed]).unwrap();
        match (chunk, &self.asked[&cookie]) {
            (Chunk::Data { offset, .. }, Asked::Read(..)) => {
                let data = &payload[needed..];
                assert!(data.iter().zip(offset..).all(|(byte, place)| *byte == at(place)));
                data.len() as u64
            }
            (Chunk::Hole { length, .. }, Asked::Read(..)) => u64::from(length),
            (Chunk::None, _) => 0,
            (Chunk::Error { code, .. }, Asked::Other(expected)) => {
                assert_eq!(code.number(), *expected);
                0
            }
            (chunk, asked) => panic!("{asked:?} was answered by {chunk:?}"),
        }
    }
}

fn skip_greeting(heard: &mut &[u8], oldstyle: bool) {
    if oldstyle {
        *heard = &heard[152..];
        return;
    }
    *heard = &heard[18..];
    loop {
        let word = |at: usize| u32::from_be_bytes(*heard[at..].first_chunk().unwrap());
        let (option, kind, length) = (word(8), word(12), word(16));
        *heard = &heard[20 + length as usize..];
        if (option, kind) == (7, 1) {
            return;
        }
    }
}

/// A client that says its script in pieces, and listens now and then; the server is another one
/// every few steps.
fn converse(seed: u64, dialect: Dialect, oldstyle: bool, unix: bool) {
    let mut dice = Dice(seed);
    let dir = tempfile::tempdir().unwrap();
    let address = if unix {
        Address::Unix(dir.path().join("socket"))
    } else {
        Address::parse("127.0.0.1", Some(0)).unwrap()
    };
    let (_file, disk) = disk();
    let listener = Listener::bind(&address).unwrap();
    let address = listener.local_address().unwrap();
    let style = if oldstyle { Style::Oldstyle } else { Style::Newstyle };
    let mut server = open(&disk, vec![listener], style, StoredSessions::default());
    let script = Script::new(dialect, oldstyle, &mut dice);
    let mut wire = Wire::to(&address);
    let deadline = Instant::now() + PATIENCE;
    while server.client_count() == 0 {
        assert!(Instant::now() < deadline, "seed {seed}: nobody came");
        thread::yield_now();
    }
    let (mut rest, mut heard, mut over) = (script.bytes.as_slice(), Vec::new(), false);
    while !over {
        assert!(Instant::now() < deadline, "seed {seed}: {} bytes left to say", rest.len());
        match dice.below(8) {
            0 => {
                let stored = server.suspend(4, PATIENCE);
                server = open(&disk, Vec::new(), style, stored);
            }
            1..=4 => {
                let most = [40, 5000, 400_000][dice.below(3) as usize];
                let length = rest.len().min(1 + dice.below(most) as usize);
                if length > 0 {
                    rest = &rest[wire.send(&rest[..length])..];
                }
            }
            _ => over = wire.receive(1 + dice.below(200_000) as usize, &mut heard),
        }
    }
    assert!(rest.is_empty(), "seed {seed}: closed before everything was said");
    script.check(&heard, oldstyle);
    let mut written = vec![0; MIB as usize];
    disk.enter(&|| false).unwrap().read(READ_ONLY, &mut written).unwrap();
    assert!(written == script.written, "seed {seed}: what was written is not there");
    server.stop(PATIENCE);
}

#[test]
fn a_client_hears_the_same_however_often_its_server_is_another_one() {
    let first = std::env::var("FLEXNBD_SEED").ok().and_then(|seed| seed.parse().ok());
    let seeds = first.map_or(1..9u64, |seed| seed..seed + 1);
    for seed in seeds.map(|seed| seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1) {
        for dialect in [Dialect::Simple, Dialect::Structured, Dialect::Extended] {
            converse(seed, dialect, false, seed & 2 == 0);
        }
        converse(seed, Dialect::Simple, true, seed & 2 != 0);
    }
}

#[test]
fn a_write_that_failed_before_the_restart_is_answered_after_it() {
    let (memory, faults) = (MemoryBackend::new(SIZE), Arc::new(Faults::default()));
    let image = FailingBackend::new(memory, Arc::clone(&faults));
    let disk = Arc::new(Disk::new(Box::new(image), false));
    let listener = Listener::bind(&Address::parse("127.0.0.1", Some(0)).unwrap()).unwrap();
    let address = listener.local_address().unwrap();
    let mut server = open(&disk, vec![listener], Style::Oldstyle, StoredSessions::default());
    let Address::Tcp(to) = address else { panic!("not TCP") };
    let mut client = TcpStream::connect(to).unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    client.read_exact(&mut [0; 152]).unwrap();
    faults.fail_every(Op::Write, ENOSPC);
    let kind = CommandKind::Write.number();
    let header = Header { flags: 0, kind, cookie: 7, offset: 0, length: MIB };
    let mut request = Vec::new();
    header.encode(Dialect::Simple, &mut request);
    request.resize(request.len() + MIB as usize, 0xaa);
    let (before, after) = request.split_at(400 * 1024);
    client.write_all(before).unwrap();
    let deadline = Instant::now() + PATIENCE;
    while faults.count(Op::Write) == 0 {
        assert!(Instant::now() < deadline, "nothing was written");
        thread::yield_now();
    }
    let stored = server.suspend(1, PATIENCE);
    faults.heal();
    let mut server = open(&disk, Vec::new(), Style::Oldstyle, stored);
    client.write_all(after).unwrap();
    let mut reply = [0; 16];
    client.read_exact(&mut reply).unwrap();
    let (head, _) = Head::decode(&reply).unwrap().unwrap();
    assert_eq!(head, Head::Simple { cookie: 7, error: ErrorCode::NoSpace.number() });
    assert_eq!(server.client_count(), 1);
    server.stop(PATIENCE);
}

#[test]
fn nobody_goes_on_when_the_last_thing_that_happened_is_a_failed_flush() {
    let faults = Arc::new(Faults::default());
    let image = FailingBackend::new(MemoryBackend::new(SIZE), Arc::clone(&faults));
    let disk = Arc::new(Disk::new(Box::new(image), false));
    let listener = Listener::bind(&Address::parse("127.0.0.1", Some(0)).unwrap()).unwrap();
    let address = listener.local_address().unwrap();
    let mut server = open(&disk, vec![listener], Style::Oldstyle, StoredSessions::default());
    let _client = Wire::to(&address);
    let deadline = Instant::now() + PATIENCE;
    while server.client_count() != 1 {
        assert!(Instant::now() < deadline, "nobody came");
        thread::yield_now();
    }
    faults.fail_every(Op::Flush, EIO);
    assert!(disk.enter(&|| false).unwrap().flush().is_err());
    let stored = server.suspend(1, PATIENCE);
    assert!(stored.snapshot.is_empty() && stored.streams.is_empty());
}

#[test]
fn those_for_whom_there_is_no_room_are_closed_and_the_others_keep_their_numbers() {
    let (_file, disk) = disk();
    let listener = Listener::bind(&Address::parse("127.0.0.1", Some(0)).unwrap()).unwrap();
    let address = listener.local_address().unwrap();
    let mut server = open(&disk, vec![listener], Style::Newstyle, StoredSessions::default());
    let mut clients: Vec<Wire> = Vec::new();
    let deadline = Instant::now() + PATIENCE;
    for count in 1..=3 {
        clients.push(Wire::to(&address));
        while server.client_count() != count {
            assert!(Instant::now() < deadline, "not {count} clients");
            thread::yield_now();
        }
    }
    let stored = server.suspend(2, PATIENCE);
    assert_eq!(stored.streams.keys().copied().collect::<Vec<_>>(), [1, 2]);
    while !clients[2].receive(100, &mut Vec::new()) {
        assert!(Instant::now() < deadline, "the third was not closed");
        thread::yield_now();
    }
    let mut server = open(&disk, Vec::new(), Style::Newstyle, stored);
    assert_eq!(server.client_count(), 2);
    let stored = server.suspend(2, PATIENCE);
    assert_eq!(stored.streams.len(), 2);
}

#[test]
fn sessions_of_another_version_are_closed() {
    let (_file, disk) = disk();
    let listener = Listener::bind(&Address::parse("127.0.0.1", Some(0)).unwrap()).unwrap();
    let address = listener.local_address().unwrap();
    let mut server = open(&disk, vec![listener], Style::Newstyle, StoredSessions::default());
    let mut client = Wire::to(&address);
    let deadline = Instant::now() + PATIENCE;
    while server.client_count() != 1 {
        assert!(Instant::now() < deadline, "nobody came");
        thread::yield_now();
    }
    let mut stored = server.suspend(1, PATIENCE);
    stored.snapshot[11] ^= 1;
    let server = open(&disk, Vec::new(), Style::Newstyle, stored);
    assert_eq!(server.client_count(), 0);
    while !client.receive(100, &mut Vec::new()) {
        assert!(Instant::now() < deadline, "not closed");
        thread::yield_now();
    }
}
