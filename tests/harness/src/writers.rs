//! Clients of a migrating disk that write continuously, number every write, and remember which were
//! acknowledged. They reconnect to the host that serves the disk. Never use the library.
//!
//! Every block belongs to one writer, which writes it in versions 1, 2, 3 …; some versions are
//! WRITE_ZEROES. When a connection is lost, writes in flight may or may not have been executed. So
//! a block may hold any version from the last acknowledged to the last attempted, and no other.

use super::image::{BLOCK, is_data_initially, stamped, unit};
use crate::raw::{self, encode_request};
use crate::{Endpoint, TIMEOUT, poll_until};
use fastrand::Rng;
use std::io::{self, ErrorKind, Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::fs::FileExt as _;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Writes in flight on one connection.
const DEPTH: usize = 32;
/// How often a writer that waits for a reply checks whether it must stop.
const STOP_CHECK_INTERVAL: Duration = Duration::from_millis(50);
/// Pause between two attempts to connect.
const RETRY_INTERVAL: Duration = Duration::from_millis(2);

/// The pause of writers that write as fast as they can.
pub const NO_PAUSE: Duration = Duration::ZERO;

/// The versions that one block may hold.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Versions {
    /// The last acknowledged version.
    pub(crate) acknowledged: u64,
    /// The last sent version.
    pub(crate) attempted: u64,
}

/// The state that all writers share.
#[derive(Debug)]
struct Shared {
    stop: AtomicBool,
    source: Endpoint,
    /// Set by [`Writers::add_destination`].
    destination: Mutex<Option<Endpoint>>,
    began: Instant,
    acknowledged: AtomicU64,
    /// Count of writers with at least one acknowledged write.
    started: AtomicU64,
    connections: AtomicU64,
    /// When the latest write that the source acknowledged was sent, in nanoseconds since `began`.
    source_last_ns: AtomicU64,
    /// When the destination acknowledged its first write; `u64::MAX` before.
    destination_first_ns: AtomicU64,
    errors: Mutex<Vec<String>>,
    pause: Duration,
}

/// Running writers.
pub struct Writers {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<Vec<Versions>>>,
    count: u64,
}

/// The versions that each block may hold after all writers have stopped.
pub struct Written {
    blocks: Vec<Versions>,
    /// Count of acknowledged writes.
    pub acknowledged: u64,
    /// Count of connections with at least one acknowledged write.
    pub connections: u64,
}

impl Writers {
    /// Starts writers on a disk of `size` bytes at `source`, made by
    /// [`super::image::stamped_image`]. `how`: number of writers, seed, and pause between two
    /// batches.
    pub fn start(source: Endpoint, size: u64, how: (u64, u64, Duration)) -> Writers {
        Writers::start_with(source, vec![Versions::default(); (size / BLOCK) as usize], how)
    }

    /// Starts writers on a disk that earlier writers have written to.
    pub fn continue_after(
        before: &Written,
        source: Endpoint,
        how: (u64, u64, Duration),
    ) -> Writers {
        Writers::start_with(source, before.blocks.clone(), how)
    }

    fn start_with(
        source: Endpoint,
        before: Vec<Versions>,
        (count, seed, pause): (u64, u64, Duration),
    ) -> Writers {
        let shared = Arc::new(Shared {
            stop: AtomicBool::new(false),
            source,
            destination: Mutex::new(None),
            began: Instant::now(),
            acknowledged: AtomicU64::new(0),
            started: AtomicU64::new(0),
            connections: AtomicU64::new(0),
            source_last_ns: AtomicU64::new(0),
            destination_first_ns: AtomicU64::new(u64::MAX),
            errors: Mutex::default(),
            pause,
        });
        let start = |number: u64| {
            let shared = Arc::clone(&shared);
            let own = before.iter().skip(number as usize).step_by(count as usize);
            let blocks = own.copied().collect();
            let random = Rng::with_seed(seed.wrapping_mul(count) + number + 1);
            thread::spawn(move || {
                Writer { shared, number, count, blocks, random, acknowledged: 0 }.run()
            })
        };
        let threads = (0..count).map(start).collect();
        Writers { shared, threads, count }
    }

    /// Adds the endpoint of the destination, which writers try if the source does not serve.
    pub fn add_destination(&self, destination: Endpoint) {
        *self.shared.destination.lock().unwrap() = Some(destination);
    }

    /// Count of writes acknowledged so far.
    pub fn acknowledged(&self) -> u64 {
        self.shared.acknowledged.load(Ordering::SeqCst)
    }

    /// Waits for `more` acknowledged writes, and until every writer has an acknowledged write: on a
    /// busy machine one writer could finish them all before another has connected.
    #[track_caller]
    pub fn wait_for_writes(&self, more: u64) {
        let target = self.acknowledged() + more;
        let started = || self.shared.started.load(Ordering::SeqCst);
        let reached =
            poll_until(TIMEOUT, || self.acknowledged() >= target && started() == self.count);
        assert!(
            reached,
            "{} of {target} writes are acknowledged, {} of {} writers have started",
            self.acknowledged(),
            started(),
            self.count
        );
    }

    /// Waits until the destination has acknowledged a write.
    #[track_caller]
    pub fn wait_for_destination(&self) {
        let first = &self.shared.destination_first_ns;
        let reached = poll_until(TIMEOUT, || first.load(Ordering::SeqCst) != u64::MAX);
        assert!(reached, "the destination acknowledges no write");
    }

    /// Stops all writers. Fails if one of them received an error or a malformed reply, or if the
    /// source acknowledged a write sent after the first reply of the destination. Lost connections
    /// are no failure.
    #[track_caller]
    pub fn stop(self) -> Written {
        self.shared.stop.store(true, Ordering::SeqCst);
        let lists: Vec<_> = self.threads.into_iter().map(|t| t.join().unwrap()).collect();
        let errors = self.shared.errors.lock().unwrap();
        assert!(errors.is_empty(), "writers report: {errors:?}");
        let last = self.shared.source_last_ns.load(Ordering::SeqCst);
        let first = self.shared.destination_first_ns.load(Ordering::SeqCst);
        assert!(
            last < first,
            "both hosts serve: the source acknowledged a write sent {} ns after the destination's first \
             reply",
            last - first
        );
        let total: usize = lists.iter().map(Vec::len).sum();
        let of = |block: usize| lists[block % self.count as usize][block / self.count as usize];
        Written {
            blocks: (0..total).map(of).collect(),
            acknowledged: self.shared.acknowledged.load(Ordering::SeqCst),
            connections: self.shared.connections.load(Ordering::SeqCst),
        }
    }
}

impl Written {
    /// Fails unless every block of the image holds an allowed version. A block that was never
    /// written has the content of [`super::image::stamped_image`].
    #[track_caller]
    pub fn assert_all_present(&self, image: &Path, context: &str) {
        let file = std::fs::File::open(image).unwrap();
        let mut data = vec![0; BLOCK as usize];
        for (block, versions) in (0..).zip(&self.blocks) {
            file.read_exact_at(&mut data, block * BLOCK).unwrap();
            // By unit, since a write that was never acknowledged may have been executed in part.
            for (index, found) in data.chunks(16).enumerate() {
                assert!(
                    versions.permits(block, found),
                    "{context}: block {block}, unit {index}: found {found:02x?}, expected one of \
                     {versions:?}"
                );
            }
        }
    }
}

impl Versions {
    /// Whether this block may hold this unit.
    pub(crate) fn permits(self, block: u64, found: &[u8]) -> bool {
        (self.acknowledged..=self.attempted).any(|version| {
            let is_zero = Versions::is_zero(block, version);
            found == if is_zero { [0; 16] } else { unit(block, version) }
        })
    }

    /// Whether this version of this block is written by WRITE_ZEROES.
    pub(crate) fn is_zero(block: u64, version: u64) -> bool {
        if version == 0 {
            !is_data_initially(block)
        } else {
            (block + 3 * version).is_multiple_of(11)
        }
    }
}

struct Writer {
    shared: Arc<Shared>,
    number: u64,
    count: u64,
    blocks: Vec<Versions>,
    random: Rng,
    acknowledged: u64,
}

impl Writer {
    fn run(mut self) -> Vec<Versions> {
        while !self.is_stopping() {
            match self.connect() {
                Some((at_source, mut stream)) => {
                    let before = self.acknowledged;
                    while !self.is_stopping() && self.run_batch(&mut stream, at_source).is_ok() {
                        thread::sleep(self.shared.pause);
                    }
                    // A host whose disk is departing may complete a handshake and then close.
                    let served = u64::from(self.acknowledged > before);
                    self.shared.connections.fetch_add(served, Ordering::SeqCst);
                }
                None => thread::sleep(RETRY_INTERVAL),
            }
        }
        self.blocks
    }

    fn is_stopping(&self) -> bool {
        self.shared.stop.load(Ordering::SeqCst)
    }

    /// Connects to the source, or else to the destination. The flag tells whether it is the source.
    fn connect(&self) -> Option<(bool, Stream)> {
        let destination = self.shared.destination.lock().unwrap().clone();
        let source = Stream::open(&self.shared.source).ok().map(|stream| (true, stream));
        source.or_else(|| Some((false, Stream::open(&destination?).ok()?)))
    }

    /// Sends up to [`DEPTH`] writes and receives their replies.
    fn run_batch(&mut self, stream: &mut Stream, at_source: bool) -> io::Result<()> {
        let sent_ns = self.now_ns();
        let mut bytes = Vec::new();
        let mut indexes = Vec::new();
        while indexes.len() < DEPTH.min(self.blocks.len()) {
            let index = self.random.usize(..self.blocks.len());
            if !indexes.contains(&index) {
                indexes.push(index);
                self.push_write(index, &mut bytes);
            }
        }
        stream.write_all(&bytes)?;
        while !indexes.is_empty() {
            let index = self.recv_reply(stream)?;
            let Some(at) = indexes.iter().position(|pending| *pending == index) else {
                return self.report(format!("a reply to cookie {index}, which is not in flight"));
            };
            indexes.swap_remove(at);
            self.acknowledge(index, sent_ns, at_source);
        }
        Ok(())
    }

    /// Appends a write of the next version of a block to `bytes`; its cookie is `index`.
    fn push_write(&mut self, index: usize, bytes: &mut Vec<u8>) {
        let block = index as u64 * self.count + self.number;
        self.blocks[index].attempted += 1;
        let version = self.blocks[index].attempted;
        let zero = Versions::is_zero(block, version);
        let command = if zero { raw::WRITE_ZEROES } else { raw::WRITE };
        let (offset, length) = (block * BLOCK, BLOCK as u32);
        // Writes with FUA take longer, so that replies arrive out of order.
        let flags = if version.is_multiple_of(3) { raw::FUA } else { 0 };
        bytes.extend(encode_request(command, flags, index as u64, offset, length));
        if !zero {
            bytes.extend(stamped(block, version));
        }
    }

    fn acknowledge(&mut self, index: usize, sent_ns: u64, at_source: bool) {
        self.blocks[index].acknowledged = self.blocks[index].attempted;
        self.shared.started.fetch_add(u64::from(self.acknowledged == 0), Ordering::SeqCst);
        self.acknowledged += 1;
        self.shared.acknowledged.fetch_add(1, Ordering::SeqCst);
        if at_source {
            self.shared.source_last_ns.fetch_max(sent_ns, Ordering::SeqCst);
        } else {
            self.shared.destination_first_ns.fetch_min(self.now_ns(), Ordering::SeqCst);
        }
    }

    /// Receives the next reply and returns its cookie.
    fn recv_reply(&self, stream: &mut Stream) -> io::Result<usize> {
        let mut reply = [0; 16];
        let mut have = 0;
        while have < reply.len() {
            match stream.read(&mut reply[have..]) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(count) => have += count,
                Err(error) if !is_timeout(&error) || self.is_stopping() => return Err(error),
                Err(_) => {}
            }
        }
        let word = |at: usize| u32::from_be_bytes(reply[at..at + 4].try_into().unwrap());
        if word(0) != raw::SIMPLE_REPLY || word(4) != 0 {
            return self.report(format!("the reply {reply:02x?}"));
        }
        Ok(u64::from_be_bytes(reply[8..].try_into().unwrap()) as usize)
    }

    /// Records an error, for which [`Writers::stop`] fails.
    fn report<T>(&self, error: String) -> io::Result<T> {
        self.shared.errors.lock().unwrap().push(error);
        Err(ErrorKind::InvalidData.into())
    }

    fn now_ns(&self) -> u64 {
        self.shared.began.elapsed().as_nanos() as u64
    }
}

/// A connection in the transmission phase.
enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Stream {
    /// Connects and completes the handshake for the default export, newstyle or oldstyle.
    fn open(endpoint: &Endpoint) -> io::Result<Stream> {
        let mut stream = match endpoint {
            Endpoint::Tcp(address) => Stream::Tcp(TcpStream::connect(address)?),
            Endpoint::Unix(path) => Stream::Unix(UnixStream::connect(path)?),
        };
        stream.set_read_timeout(TIMEOUT)?;
        let mut magics = [0; 16];
        stream.read_exact(&mut magics)?;
        if magics[8..] == raw::I_HAVE_OPT.to_be_bytes() {
            stream.read_exact(&mut [0; 2])?;
            stream.write_all(&(raw::FIXED_NEWSTYLE | raw::NO_ZEROES).to_be_bytes())?;
            stream.write_all(&raw::encode_option(raw::OPT_EXPORT_NAME, b""))?;
            stream.read_exact(&mut [0; 10])?;
        } else {
            stream.read_exact(&mut [0; 12 + raw::ZEROES])?;
        }
        stream.set_read_timeout(STOP_CHECK_INTERVAL)?;
        Ok(stream)
    }

    fn set_read_timeout(&self, time: Duration) -> io::Result<()> {
        match self {
            Stream::Tcp(stream) => {
                stream.set_nodelay(true)?;
                stream.set_read_timeout(Some(time))
            }
            Stream::Unix(stream) => stream.set_read_timeout(Some(time)),
        }
    }

    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Stream::Tcp(stream) => stream.write_all(bytes),
            Stream::Unix(stream) => stream.write_all(bytes),
        }
    }

    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        match self {
            Stream::Tcp(stream) => stream.read(bytes),
            Stream::Unix(stream) => stream.read(bytes),
        }
    }

    fn read_exact(&mut self, bytes: &mut [u8]) -> io::Result<()> {
        match self {
            Stream::Tcp(stream) => stream.read_exact(bytes),
            Stream::Unix(stream) => stream.read_exact(bytes),
        }
    }
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut)
}
