//! Many sessions on few connections, over TCP, while the server is cut off, loses what was not flushed, or
//! falls silent. Every operation completes in time and with the right bytes.

use super::*;
use crate::disk::IoQueue;
use crate::schedules::env_number;
use std::collections::HashMap;
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

const BLOCK: usize = 1024;
/// Blocks of one session.
const BLOCKS: usize = 64;

/// A server with a cache that may be lost.
#[derive(Debug)]
struct TcpServer {
    address: SocketAddr,
    export: Export,
    disk: Mutex<CachedDisk>,
}

#[derive(Debug)]
struct CachedDisk {
    cache: Vec<u8>,
    durable: Vec<u8>,
    /// Connections of earlier generations execute nothing.
    generation: u64,
    streams: Vec<TcpStream>,
}

impl TcpServer {
    fn start(size: usize) -> Arc<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let flags = TransmissionFlags::HAS_FLAGS
            | TransmissionFlags::SEND_FLUSH
            | TransmissionFlags::SEND_FUA
            | TransmissionFlags::CAN_MULTI_CONN;
        let block_sizes = BlockSizes { minimum: 1, preferred: 4096, maximum: 1 << 16 };
        let (name, description) = (String::new(), String::new());
        let export = Export { name, description, size: size as u64, flags, block_sizes };
        let disk = CachedDisk {
            cache: vec![0; size],
            durable: vec![0; size],
            generation: 0,
            streams: Vec::new(),
        };
        let address = listener.local_addr().unwrap();
        let server = Arc::new(Self { address, export, disk: Mutex::new(disk) });
        let shared = Arc::clone(&server);
        thread::spawn(move || {
            for stream in listener.incoming() {
                let stream = stream.unwrap();
                let mut disk = shared.disk.lock().unwrap();
                disk.streams.push(stream.try_clone().unwrap());
                let generation = disk.generation;
                drop(disk);
                let shared = Arc::clone(&shared);
                thread::spawn(move || shared.serve(stream, generation));
            }
        });
        server
    }

    fn target(&self) -> UpstreamTarget {
        let (host, port) = (self.address.ip().to_string(), self.address.port());
        UpstreamTarget {
            remote: Remote::Host { host, port },
            export: String::new(),
            tls: TlsTarget::default(),
        }
    }

    /// Ends the current connections. Only ends them in silence with `is_silent`: they stay open.
    fn interrupt(&self, is_silent: bool, loses_cache: bool) {
        let mut disk = self.disk.lock().unwrap();
        disk.generation += 1;
        if loses_cache {
            disk.cache = disk.durable.clone();
        }
        for stream in disk.streams.drain(..).filter(|_| !is_silent) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    fn serve(&self, mut stream: TcpStream, generation: u64) -> Option<()> {
        stream.set_nodelay(true).ok()?;
        let (agreement, mut input) = agree(&mut stream, &self.export)?;
        loop {
            let (header, payload) = next_request(&mut stream, &agreement, &mut input)?;
            if fastrand::u8(..16) == 0 {
                thread::sleep(Duration::from_micros(fastrand::u64(..500)));
            }
            let mut disk = self.disk.lock().unwrap();
            if disk.generation != generation {
                continue;
            }
            let reply = disk.execute(&agreement, header, &payload);
            drop(disk);
            stream.write_all(&reply).ok()?;
        }
    }
}

impl CachedDisk {
    fn execute(&mut self, agreement: &Agreement, header: RequestHeader, data: &[u8]) -> Vec<u8> {
        let (dialect, mut out) = (agreement.dialect, Vec::new());
        let kind = CommandKind::try_from(header.kind).unwrap();
        let chunked = kind == CommandKind::Read && dialect != Dialect::Simple;
        let to = ReplyTo { cookie: header.cookie, offset: header.offset, chunked };
        let place = header.offset as usize..(header.offset + header.length) as usize;
        match kind {
            CommandKind::Read => {
                dialect.data_header(to, header.offset, header.length as u32, true, &mut out);
                out.extend_from_slice(&self.cache[place]);
                return out;
            }
            CommandKind::Write => {
                self.cache[place.clone()].copy_from_slice(data);
                if header.flags & CommandFlags::FUA.bits() != 0 {
                    self.durable[place].copy_from_slice(data);
                }
            }
            CommandKind::Flush => self.durable.copy_from_slice(&self.cache),
            other => panic!("{other:?}"),
        }
        dialect.success(to, &mut out);
        out
    }
}

/// What a session has written, and has in flight.
struct Client<'a> {
    backend: &'a UpstreamBackend,
    number: usize,
    rng: fastrand::Rng,
    wake: Wake,
    /// The versions that each block may have: several after a write that was abandoned.
    versions: Vec<Vec<u64>>,
    next_version: u64,
    /// Blocks and version of each operation in flight.
    in_flight: HashMap<u64, (std::ops::Range<usize>, Option<u64>, Instant)>,
    next_key: u64,
    longest: Duration,
    completed: usize,
    wakeups: usize,
    /// Completed operations of all clients.
    progress: &'a AtomicUsize,
}

impl<'a> Client<'a> {
    fn new(
        (backend, progress): (&'a UpstreamBackend, &'a AtomicUsize),
        number: usize,
        seed: u64,
    ) -> Self {
        Self {
            backend,
            number,
            rng: fastrand::Rng::with_seed(seed),
            wake: Wake::new().unwrap(),
            versions: vec![vec![0]; BLOCKS],
            next_version: 1,
            in_flight: HashMap::new(),
            next_key: 0,
            longest: Duration::ZERO,
            completed: 0,
            wakeups: 0,
            progress,
        }
    }

    fn bytes(&self, block: usize, version: u64) -> Vec<u8> {
        if version == 0 {
            return vec![0; BLOCK];
        }
        let words = [self.number as u64, block as u64, version].map(u64::to_le_bytes).concat();
        words.iter().copied().cycle().take(BLOCK).collect()
    }

    fn offset(&self, block: usize) -> u64 {
        ((self.number * BLOCKS + block) * BLOCK) as u64
    }

    fn run(&mut self, operations: usize) {
        while self.completed < operations {
            let mut queue = self.backend.queue(self.wake.as_fd()).unwrap();
            let sequential = self.rng.u8(..4) == 0;
            for _ in 0..self.rng.usize(1..60) {
                let depth = if sequential { 1 } else { self.rng.usize(1..16) };
                self.push_some(&mut *queue, depth, sequential);
                let least = if self.rng.bool() { 0 } else { depth / 2 };
                self.wait(&mut *queue, least);
                match self.rng.u8(..12) {
                    0 => thread::sleep(Duration::from_micros(self.rng.u64(..3000))),
                    1 => self.execute_alone(),
                    _ => {}
                }
            }
            if self.rng.u8(..3) > 0 {
                self.wait(&mut *queue, 0);
            }
            drop(queue);
            self.abandon();
        }
    }

    /// The session has ended: its writes may have been executed, or not.
    fn abandon(&mut self) {
        for (_, (blocks, version, _)) in self.in_flight.drain() {
            for block in blocks {
                self.versions[block].extend(version);
            }
        }
        self.wake.clear();
    }

    fn push_some(&mut self, queue: &mut dyn IoQueue, depth: usize, sequential: bool) {
        while self.in_flight.len() < depth {
            let Some((op, blocks, version)) = self.next_op(sequential) else { break };
            let key = self.next_key;
            self.next_key += 1;
            self.in_flight.insert(key, (blocks, version, Instant::now()));
            queue.push(key.into(), op).unwrap();
            if self.rng.bool() {
                queue.submit();
            }
        }
        queue.submit();
    }

    /// An operation that overlaps none in flight.
    fn next_op(&mut self, sequential: bool) -> Option<(Op, std::ops::Range<usize>, Option<u64>)> {
        let kind = self.rng.u8(..20);
        if kind == 0 {
            return Some((Op::Flush, 0..0, None));
        }
        let start = match sequential {
            true => self.next_key as usize % (BLOCKS - 1),
            false => self.rng.usize(..BLOCKS),
        };
        let most = if self.rng.u8(..8) == 0 { BLOCKS } else { 4 };
        let count = if sequential { 1 } else { self.rng.usize(1..=most.min(BLOCKS - start)) };
        let blocks = start..start + count;
        let overlaps = |(other, ..): &(std::ops::Range<usize>, Option<u64>, Instant)| {
            other.start < blocks.end && blocks.start < other.end
        };
        if self.in_flight.values().any(overlaps) {
            return None;
        }
        let offset = self.offset(start);
        if kind < 11 || sequential && kind < 18 {
            let data = Buffer::to_fill(count * BLOCK, 1).unwrap();
            return Some((Op::Read { offset, data }, blocks, None));
        }
        let version = self.next_version;
        self.next_version += 1;
        let bytes: Vec<u8> = blocks.clone().flat_map(|block| self.bytes(block, version)).collect();
        let data = Buffer::copy_of(&bytes, 1).unwrap();
        let durable = self.rng.u8(..8) == 0;
        Some((Op::Write { offset, data, durable }, blocks, Some(version)))
    }

    /// Waits as a session does, until at most `least` operations are in flight.
    fn wait(&mut self, queue: &mut dyn IoQueue, least: usize) {
        let deadline = Instant::now() + DEADLINE;
        loop {
            while let Some(completion) = queue.poll() {
                completion.outcome.expect("it is executed").expect("success");
                self.complete(completion.key, &completion.op);
            }
            if self.in_flight.len() <= least {
                return;
            }
            let mut descriptors = vec![self.wake.as_fd()];
            descriptors.extend(queue.descriptor());
            let ready = wait_readable(&descriptors, Some(deadline)).unwrap();
            assert!(ready.contains(&true), "client {}: {:?}", self.number, self.in_flight);
            self.wakeups += 1;
            if ready[0] {
                self.wake.clear();
            }
        }
    }

    fn complete(&mut self, key: u64, op: &Op) {
        let (blocks, version, began) = self.in_flight.remove(&key).expect("completed twice");
        self.longest = self.longest.max(began.elapsed());
        self.completed += 1;
        self.progress.fetch_add(1, Ordering::Relaxed);
        match op {
            Op::Read { data, .. } => self.check(blocks, data),
            Op::Write { .. } => {
                for block in blocks {
                    self.versions[block] = version.into_iter().collect();
                }
            }
            _ => {}
        }
    }

    /// Compares blocks with what they may hold, which is known from then on.
    fn check(&mut self, blocks: std::ops::Range<usize>, data: &[u8]) {
        for (at, block) in blocks.enumerate() {
            let found = &data[at * BLOCK..(at + 1) * BLOCK];
            let versions = &self.versions[block];
            let version = versions.iter().find(|version| self.bytes(block, **version) == found);
            let Some(&version) = version else {
                let head = &found[..24];
                panic!("client {}, block {block}: {head:?}, not {versions:?}", self.number)
            };
            self.versions[block] = vec![version];
        }
    }

    /// Blocks in the backend, as a copier does.
    fn execute_alone(&mut self) {
        if !self.in_flight.is_empty() {
            return;
        }
        let block = self.rng.usize(..BLOCKS);
        if self.rng.bool() {
            let mut data = vec![0; BLOCK];
            self.backend.read(self.offset(block), &mut data).unwrap();
            return self.check(block..block + 1, &data);
        }
        let version = self.next_version;
        self.next_version += 1;
        let bytes = self.bytes(block, version);
        self.backend.write(self.offset(block), &bytes, self.rng.bool()).unwrap();
        self.versions[block] = vec![version];
    }
}

/// How a run disturbs its clients.
struct Disturbance {
    clients: usize,
    options: UpstreamOptions,
    is_silent: bool,
    /// Mean number of operations between two interruptions.
    pause: usize,
    operations: usize,
}

fn run(seed: u64, disturbance: &Disturbance) {
    let Disturbance { clients, options, is_silent, pause, operations } = disturbance;
    let server = TcpServer::start(clients * BLOCKS * BLOCK);
    let events = Arc::new(Changes(Mutex::new(mpsc::channel().0)));
    let (backend, handle) = connect(vec![server.target()], options.clone(), events).unwrap();
    let (backend, done) = (&backend, &AtomicBool::new(false));
    let progress = &AtomicUsize::new(0);
    let began = Instant::now();
    let mut clients: Vec<_> = (0..*clients)
        .map(|number| Client::new((backend, progress), number, seed + number as u64))
        .collect();
    thread::scope(|scope| {
        let work = clients.iter_mut().map(|client| scope.spawn(|| client.run(*operations)));
        let work: Vec<_> = work.collect();
        scope.spawn(|| {
            let mut rng = fastrand::Rng::with_seed(seed);
            let mut next = 0;
            while !done.load(Ordering::Relaxed) {
                // A server that is lost before it has answered is connected to later and later.
                if progress.load(Ordering::Relaxed) >= next {
                    server.interrupt(*is_silent && rng.bool(), rng.bool());
                    next = progress.load(Ordering::Relaxed) + rng.usize(1..2 * pause);
                }
                thread::sleep(Duration::from_micros(rng.u64(..5000)));
            }
        });
        let outcomes: Vec<_> = work.into_iter().map(|thread| thread.join()).collect();
        done.store(true, Ordering::Relaxed);
        assert!(outcomes.iter().all(Result::is_ok), "seed {seed}");
    });
    // What was flushed survives the loss of the rest.
    backend.flush().unwrap();
    server.interrupt(false, true);
    for client in &mut clients {
        let mut data = vec![0; BLOCKS * BLOCK];
        backend.read(client.offset(0), &mut data).unwrap();
        client.check(0..BLOCKS, &data);
    }
    let longest = clients.iter().map(|client| client.longest).max();
    let wakeups: usize = clients.iter().map(|client| client.wakeups).sum();
    let completed: usize = clients.iter().map(|client| client.completed).sum();
    // A session that waited for a descriptor that stays readable would wake up all the time.
    let reconnects = handle.state().reconnects as usize;
    assert!(wakeups <= completed + 20 * (1 + reconnects), "seed {seed}: {wakeups} wake-ups");
    println!(
        "seed {seed}: {:?}, {reconnects} reconnections, {completed} operations, {wakeups} wake-ups, longest {longest:?}",
        began.elapsed(),
    );
}

fn seed() -> u64 {
    env_number("FLEXNBD_SEED").unwrap_or(1)
}

/// A reply that only the look at every tick finds would be late.
fn without_ticks(connections: usize, read_ahead: Option<u64>) -> UpstreamOptions {
    let timeout = 100 * DEADLINE;
    UpstreamOptions { connections, read_ahead, timeout, ..UpstreamOptions::default() }
}

#[test]
fn sessions_live_through_cuts_and_power_losses() {
    for (number, clients) in [1, 2, 3, 8].into_iter().enumerate() {
        for connections in [1, 2, 4] {
            let seed = 1000 * seed() + 100 * number as u64 + connections as u64;
            let options = without_ticks(connections, None);
            let pause = 100;
            let operations = 2000;
            run(seed, &Disturbance { clients, options, is_silent: false, pause, operations });
        }
    }
}

#[test]
fn sessions_that_read_ahead_live_through_cuts() {
    for clients in [1, 4] {
        let options = without_ticks(2, Some(16 << 10));
        let pause = 100;
        let seed = 1000 * seed() + clients as u64;
        run(seed, &Disturbance { clients, options, is_silent: false, pause, operations: 2000 });
    }
}

#[test]
fn sessions_live_through_silence() {
    for (clients, connections) in [(1, 1), (3, 2), (8, 4)] {
        let timeout = Duration::from_millis(500);
        let options = UpstreamOptions { connections, timeout, ..UpstreamOptions::default() };
        let pause = 500;
        let seed = 1000 * seed() + clients as u64;
        run(seed, &Disturbance { clients, options, is_silent: true, pause, operations: 1000 });
    }
}
