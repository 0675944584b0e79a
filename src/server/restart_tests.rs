//! Tests of sessions that are suspended in one server and restored in another, between any two bytes.

use super::test_support::{TIMEOUT, connect_tcp, listen, wait_for_clients, wait_until};
use super::{Server, ServerConfig, SessionSettings, StoredSessions, Style};
use crate::disk::Disk;
use crate::disk::memory_backend::{BackendCall, FailingBackend, Faults, MemoryBackend};
use crate::disk::{Access, FileBackend};
use crate::nbd::reply::{Chunk, Dialect, ReplyHeader};
use crate::nbd::request::RequestHeader;
use crate::nbd::wire::{CommandFlags, CommandKind, ErrorCode};
use crate::net::{Address, Listener};
use nix::libc::{EIO, ENOSPC};
use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Instant;

const MIB: u64 = 1 << 20;
const SIZE: u64 = 4 * MIB;
/// Requests read below this offset and write from it on.
const WRITES_FROM: u64 = 3 * MIB;

/// A pseudo-random generator (xorshift).
struct Random(u64);

impl Random {
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
    let allow_all = ServerConfig::allow_all(listeners, disk);
    Server::start(ServerConfig { settings, stored, ..allow_all }).unwrap()
}

/// A disk with data that is nowhere zero, then a hole, then the range for writes.
fn disk() -> (tempfile::NamedTempFile, Arc<Disk>) {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(SIZE).unwrap();
    let image = FileBackend::open(file.path(), Access { read_only: false }).unwrap();
    let disk = Arc::new(Disk::new(Box::new(image), false));
    let data: Vec<u8> = (0..2 * MIB).map(|at| (at % 251) as u8 + 1).collect();
    disk.enter(&|| false).unwrap().write(0, &data).unwrap();
    (file, disk)
}

/// The byte at `offset`, below [`WRITES_FROM`].
fn byte_at(offset: u64) -> u8 {
    if offset < 2 * MIB { (offset % 251) as u8 + 1 } else { 0 }
}

/// A nonblocking connection.
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

    /// Sends; returns how many bytes the socket accepted.
    fn send(&mut self, bytes: &[u8]) -> usize {
        let sent = match self {
            Self::Tcp(stream) => stream.write(bytes),
            Self::Unix(stream) => stream.write(bytes),
        };
        or_zero(sent)
    }

    /// Receives up to `limit` bytes; true at the end of the stream.
    fn receive(&mut self, limit: usize, into: &mut Vec<u8>) -> bool {
        let mut bytes = vec![0; limit];
        let received = match self {
            Self::Tcp(stream) => stream.read(&mut bytes),
            Self::Unix(stream) => stream.read(&mut bytes),
        };
        let ended = matches!(received, Ok(0));
        into.extend_from_slice(&bytes[..or_zero(received)]);
        ended
    }
}

fn or_zero(count: io::Result<usize>) -> usize {
    match count {
        Ok(count) => count,
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
        Err(error) => panic!("the connection broke: {error}"),
    }
}

/// A request, to check its reply.
#[derive(Debug)]
enum Asked {
    /// Offset and length.
    Read(u64, u64),
    /// Any other request, with the expected error.
    Other(u32),
}

/// All bytes that a client sends, and the expected replies.
struct Script {
    dialect: Dialect,
    bytes: Vec<u8>,
    asked: BTreeMap<u64, Asked>,
    /// The expected data on the disk from [`WRITES_FROM`] on.
    written: Vec<u8>,
}

impl Script {
    fn new(dialect: Dialect, oldstyle: bool, random: &mut Random) -> Self {
        let (asked, written) = (BTreeMap::new(), vec![0; MIB as usize]);
        let mut script = Self { dialect, bytes: Vec::new(), asked, written };
        if !oldstyle {
            script.add_handshake();
        }
        for cookie in 1..=40 {
            script.add_request(cookie, random);
        }
        script.add_header(CommandKind::Disconnect, 99, 0, 0);
        script
    }

    fn add_handshake(&mut self) {
        self.bytes.extend_from_slice(&3u32.to_be_bytes());
        match self.dialect {
            Dialect::Simple => {}
            Dialect::Structured => self.add_option(8, &[]),
            Dialect::Extended => self.add_option(11, &[]),
        }
        self.add_option(77, &[1; 300]);
        self.add_option(7, &[0; 6]);
    }

    fn add_option(&mut self, number: u32, data: &[u8]) {
        self.bytes.extend_from_slice(b"IHAVEOPT");
        self.bytes.extend_from_slice(&number.to_be_bytes());
        self.bytes.extend_from_slice(&(data.len() as u32).to_be_bytes());
        self.bytes.extend_from_slice(data);
    }

    fn add_header(&mut self, kind: CommandKind, cookie: u64, offset: u64, length: u64) {
        let payload = kind == CommandKind::Write && self.dialect == Dialect::Extended;
        let flags = if payload { CommandFlags::PAYLOAD_LEN.bits() } else { 0 };
        let header = RequestHeader { flags, kind: kind.number(), cookie, offset, length };
        header.encode(self.dialect, &mut self.bytes);
    }

    fn add_request(&mut self, cookie: u64, random: &mut Random) {
        let most = [600 * 1024, 9000][random.below(2) as usize];
        let (length, start) = (1 + random.below(most), random.below(WRITES_FROM - most));
        let target = random.below(MIB - length);
        let asked = match random.below(10) {
            0..=4 => {
                self.add_header(CommandKind::Read, cookie, start, length);
                Asked::Read(start, length)
            }
            5..=7 => {
                let data: Vec<u8> = (0..length).map(|_| random.below(256) as u8).collect();
                self.add_header(CommandKind::Write, cookie, WRITES_FROM + target, length);
                self.bytes.extend_from_slice(&data);
                self.written[target as usize..][..data.len()].copy_from_slice(&data);
                Asked::Other(0)
            }
            8 => {
                self.add_header(CommandKind::Write, cookie, SIZE, length);
                self.bytes.resize(self.bytes.len() + length as usize, 0xee);
                Asked::Other(ErrorCode::NoSpace.number())
            }
            _ => {
                self.add_header(CommandKind::Flush, cookie, 0, 0);
                Asked::Other(0)
            }
        };
        self.asked.insert(cookie, asked);
    }

    /// Checks the received bytes.
    fn check(&self, mut received: &[u8], oldstyle: bool) {
        skip_greeting(&mut received, oldstyle);
        let mut open: BTreeMap<u64, u64> = BTreeMap::new();
        let mut answered = 0;
        while !received.is_empty() {
            let (head, used) = ReplyHeader::decode(received).unwrap().unwrap();
            received = &received[used..];
            let (cookie, done) = match head {
                ReplyHeader::Simple { cookie, error } => {
                    self.check_simple(cookie, error, &mut received);
                    (cookie, true)
                }
                ReplyHeader::Chunk { cookie, done, kind, length, .. } => {
                    let (payload, rest) = received.split_at(length as usize);
                    received = rest;
                    let length = self.check_chunk(cookie, kind, payload);
                    *open.entry(cookie).or_default() += length;
                    (cookie, done)
                }
            };
            if done {
                answered += 1;
                if let (Asked::Read(_, length), Some(covered)) =
                    (&self.asked[&cookie], open.get(&cookie))
                {
                    assert_eq!(covered, length, "bytes of reply {cookie}");
                }
            }
        }
        assert_eq!(answered, self.asked.len(), "replies");
    }

    fn check_simple(&self, cookie: u64, error: u32, received: &mut &[u8]) {
        match self.asked[&cookie] {
            Asked::Read(offset, length) => {
                assert_eq!(error, 0);
                let (data, rest) = received.split_at(length as usize);
                assert!(data.iter().zip(offset..).all(|(byte, offset)| *byte == byte_at(offset)));
                *received = rest;
            }
            Asked::Other(expected) => assert_eq!(error, expected),
        }
    }

    /// Checks a chunk; returns how many bytes of its read it covers.
    fn check_chunk(&self, cookie: u64, kind: u16, payload: &[u8]) -> u64 {
        let needed = Chunk::needed(kind, payload.len() as u64) as usize;
        let chunk = Chunk::decode(kind, payload.len() as u64, &payload[..needed]).unwrap();
        match (chunk, &self.asked[&cookie]) {
            (Chunk::Data { offset, .. }, Asked::Read(..)) => {
                let data = &payload[needed..];
                assert!(data.iter().zip(offset..).all(|(byte, offset)| *byte == byte_at(offset)));
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

fn skip_greeting(received: &mut &[u8], oldstyle: bool) {
    if oldstyle {
        *received = &received[152..];
        return;
    }
    *received = &received[18..];
    loop {
        let word = |at: usize| u32::from_be_bytes(*received[at..].first_chunk().unwrap());
        let (option, kind, length) = (word(8), word(12), word(16));
        *received = &received[20 + length as usize..];
        if (option, kind) == (7, 1) {
            return;
        }
    }
}

/// Runs a client that sends its script in pieces and receives now and then, while the server is
/// replaced every few steps.
fn run_script(seed: u64, dialect: Dialect, oldstyle: bool, unix: bool) {
    let mut random = Random(seed);
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
    let script = Script::new(dialect, oldstyle, &mut random);
    let mut wire = Wire::to(&address);
    wait_for_clients(&server, 1);
    let deadline = Instant::now() + TIMEOUT;
    let (mut rest, mut received, mut ended) = (script.bytes.as_slice(), Vec::new(), false);
    while !ended {
        assert!(Instant::now() < deadline, "seed {seed}: {} bytes left to send", rest.len());
        match random.below(8) {
            0 => {
                let stored = server.suspend(4, TIMEOUT);
                server = open(&disk, Vec::new(), style, stored);
            }
            1..=4 => {
                let most = [40, 5000, 400_000][random.below(3) as usize];
                let length = rest.len().min(1 + random.below(most) as usize);
                if length > 0 {
                    rest = &rest[wire.send(&rest[..length])..];
                }
            }
            _ => ended = wire.receive(1 + random.below(200_000) as usize, &mut received),
        }
    }
    assert!(rest.is_empty(), "seed {seed}: closed before everything was sent");
    script.check(&received, oldstyle);
    let mut written = vec![0; MIB as usize];
    disk.enter(&|| false).unwrap().read(WRITES_FROM, &mut written).unwrap();
    assert!(written == script.written, "seed {seed}: written data is missing");
    server.stop(TIMEOUT);
}

#[test]
fn replies_are_the_same_over_any_restarts() {
    let first = std::env::var("FLEXNBD_SEED").ok().and_then(|seed| seed.parse().ok());
    let seeds = first.map_or(1..9u64, |seed| seed..seed + 1);
    for seed in seeds.map(|seed| seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1) {
        for dialect in [Dialect::Simple, Dialect::Structured, Dialect::Extended] {
            run_script(seed, dialect, false, seed & 2 == 0);
        }
        run_script(seed, Dialect::Simple, true, seed & 2 != 0);
    }
}

#[test]
fn a_write_failed_before_the_restart_is_answered_after_it() {
    let (memory, faults) = (MemoryBackend::new(SIZE), Arc::new(Faults::default()));
    let image = FailingBackend::new(memory, Arc::clone(&faults));
    let disk = Arc::new(Disk::new(Box::new(image), false));
    let (listener, address) = listen();
    let mut server = open(&disk, vec![listener], Style::Oldstyle, StoredSessions::default());
    let mut client = connect_tcp(&address);
    client.read_exact(&mut [0; 152]).unwrap();
    faults.fail_every(BackendCall::Write, ENOSPC);
    let kind = CommandKind::Write.number();
    let header = RequestHeader { flags: 0, kind, cookie: 7, offset: 0, length: MIB };
    let mut request = Vec::new();
    header.encode(Dialect::Simple, &mut request);
    request.resize(request.len() + MIB as usize, 0xaa);
    let (before, after) = request.split_at(400 * 1024);
    client.write_all(before).unwrap();
    wait_until("nothing is written", || faults.count(BackendCall::Write) > 0);
    let stored = server.suspend(1, TIMEOUT);
    faults.heal();
    let mut server = open(&disk, Vec::new(), Style::Oldstyle, stored);
    client.write_all(after).unwrap();
    let mut reply = [0; 16];
    client.read_exact(&mut reply).unwrap();
    let (head, _) = ReplyHeader::decode(&reply).unwrap().unwrap();
    assert_eq!(head, ReplyHeader::Simple { cookie: 7, error: ErrorCode::NoSpace.number() });
    assert_eq!(server.client_count(), 1);
    server.stop(TIMEOUT);
}

#[test]
fn no_session_is_suspended_after_a_failed_flush() {
    let faults = Arc::new(Faults::default());
    let image = FailingBackend::new(MemoryBackend::new(SIZE), Arc::clone(&faults));
    let disk = Arc::new(Disk::new(Box::new(image), false));
    let (listener, address) = listen();
    let mut server = open(&disk, vec![listener], Style::Oldstyle, StoredSessions::default());
    let _client = Wire::to(&address);
    wait_for_clients(&server, 1);
    faults.fail_every(BackendCall::Flush, EIO);
    assert!(disk.enter(&|| false).unwrap().flush().is_err());
    let stored = server.suspend(1, TIMEOUT);
    assert!(stored.snapshot.is_empty() && stored.streams.is_empty());
}

#[test]
fn sessions_beyond_the_capacity_are_closed_and_ids_stay() {
    let (_file, disk) = disk();
    let (listener, address) = listen();
    let mut server = open(&disk, vec![listener], Style::Newstyle, StoredSessions::default());
    let mut clients: Vec<Wire> = Vec::new();
    for count in 1..=3 {
        clients.push(Wire::to(&address));
        wait_for_clients(&server, count);
    }
    let stored = server.suspend(2, TIMEOUT);
    assert_eq!(stored.streams.keys().copied().collect::<Vec<_>>(), [1, 2]);
    wait_until("the third is not closed", || clients[2].receive(100, &mut Vec::new()));
    let mut server = open(&disk, Vec::new(), Style::Newstyle, stored);
    assert_eq!(server.client_count(), 2);
    let stored = server.suspend(2, TIMEOUT);
    assert_eq!(stored.streams.len(), 2);
}

#[test]
fn sessions_of_another_snapshot_version_are_closed() {
    let (_file, disk) = disk();
    let (listener, address) = listen();
    let mut server = open(&disk, vec![listener], Style::Newstyle, StoredSessions::default());
    let mut client = Wire::to(&address);
    wait_for_clients(&server, 1);
    let mut stored = server.suspend(1, TIMEOUT);
    stored.snapshot[11] ^= 1;
    let server = open(&disk, Vec::new(), Style::Newstyle, stored);
    assert_eq!(server.client_count(), 0);
    wait_until("it is not closed", || client.receive(100, &mut Vec::new()));
}
