//! A TCP proxy between source and destination that a test can slow down or cut. A cut is silent,
//! like that of a cable: the proxy forwards no more bytes, and sends neither FIN nor RST to either
//! side. Never changes a byte.

use crate::unused_loopback_address;
use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// The first bytes of a compact request header with FLUSH.
pub const FLUSH_HEADER: [u8; 8] = [0x25, 0x60, 0x95, 0x13, 0, 0, 0, 3];
/// The first bytes of a compact request header with the private command HANDOVER
/// (flexnbd-migration(7)).
pub const HANDOVER_HEADER: [u8; 8] = [0x25, 0x60, 0x95, 0x13, 0, 0, 0x46, 0x4c];

/// The point in the bytes from the source at which the proxy cuts all connections by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CutAt {
    /// Never.
    Never,
    /// After this number of bytes in all connections.
    Bytes(u64),
    /// Before the n-th request that begins with these bytes: the request is not forwarded.
    Before([u8; 8], u64),
    /// After the first request that begins with these bytes: its reply is not forwarded.
    After([u8; 8]),
    /// After the first request that begins with these bytes: its reply is still forwarded, but
    /// later bytes from the source are held until [`Proxy::release`].
    Hold([u8; 8]),
}

struct Shared {
    to: SocketAddr,
    cut_at: Mutex<CutAt>,
    cut: AtomicBool,
    held: AtomicBool,
    /// Count of repairs. Connections of an earlier generation stay dead.
    generation: AtomicU64,
    closed: AtomicBool,
    /// Set by [`Proxy::set_paused`].
    paused: AtomicBool,
    /// Both ends of every connection so far.
    connections: Mutex<Vec<TcpStream>>,
    bytes_sent: AtomicU64,
    /// Limit of the bytes per second to the destination.
    bytes_per_sec_max: Option<u64>,
}

/// A running proxy. Dropping it closes all connections.
pub struct Proxy {
    /// The address that the source connects to.
    pub address: SocketAddr,
    shared: Arc<Shared>,
    acceptor: Option<JoinHandle<()>>,
}

impl Proxy {
    /// Starts a proxy to this address, at an unused address.
    pub fn to(to: SocketAddr, cut_at: CutAt) -> Proxy {
        Proxy::new(to, cut_at, None)
    }

    /// Starts a proxy with a limit of the bytes per second from the source, and without cuts.
    pub fn slow(to: SocketAddr, bytes_per_sec_max: u64) -> Proxy {
        Proxy::new(to, CutAt::Never, Some(bytes_per_sec_max))
    }

    fn new(to: SocketAddr, cut_at: CutAt, bytes_per_sec_max: Option<u64>) -> Proxy {
        let shared = Arc::new(Shared {
            to,
            cut_at: Mutex::new(cut_at),
            cut: AtomicBool::new(false),
            held: AtomicBool::new(false),
            generation: AtomicU64::new(0),
            closed: AtomicBool::new(false),
            paused: AtomicBool::new(false),
            connections: Mutex::default(),
            bytes_sent: AtomicU64::new(0),
            bytes_per_sec_max,
        });
        let mut proxy = Proxy { address: unused_loopback_address(), shared, acceptor: None };
        proxy.open();
        proxy
    }

    /// Whether it is cut, or holds bytes from the source.
    pub fn is_cut(&self) -> bool {
        self.shared.cut.load(Ordering::SeqCst) || self.is_held()
    }

    /// Whether it holds bytes from the source ([`CutAt::Hold`]).
    pub fn is_held(&self) -> bool {
        self.shared.held.load(Ordering::SeqCst)
    }

    /// Forwards the held bytes. Afterwards the proxy neither holds nor cuts by itself.
    pub fn release(&self) {
        *self.shared.cut_at.lock().unwrap() = CutAt::Never;
        self.shared.held.store(false, Ordering::SeqCst);
    }

    /// Bytes received from the source, forwarded or not.
    pub fn bytes_sent(&self) -> u64 {
        self.shared.bytes_sent.load(Ordering::SeqCst)
    }

    /// Cuts all connections.
    pub fn cut(&self) {
        self.shared.cut.store(true, Ordering::SeqCst);
    }

    /// Pauses or resumes forwarding in both directions.
    pub fn set_paused(&self, paused: bool) {
        self.shared.paused.store(paused, Ordering::SeqCst);
    }

    /// Closes all connections at both ends.
    pub fn reset(&self) {
        for end in self.shared.connections.lock().unwrap().drain(..) {
            let _ = end.shutdown(Shutdown::Both);
        }
    }

    /// Accepts new connections again. Afterwards the proxy never cuts by itself.
    pub fn repair(&mut self) {
        *self.shared.cut_at.lock().unwrap() = CutAt::Never;
        // A proxy that holds still has its acceptor thread, which ends once the proxy is cut.
        self.shared.cut.store(true, Ordering::SeqCst);
        self.close();
        self.shared.generation.fetch_add(1, Ordering::SeqCst);
        self.shared.cut.store(false, Ordering::SeqCst);
        self.shared.held.store(false, Ordering::SeqCst);
        self.open();
    }

    fn open(&mut self) {
        let listener = TcpListener::bind(self.address).unwrap();
        listener.set_nonblocking(true).unwrap();
        let shared = Arc::clone(&self.shared);
        self.acceptor = Some(thread::spawn(move || shared.accept(&listener)));
    }

    fn close(&mut self) {
        if let Some(acceptor) = self.acceptor.take() {
            acceptor.join().unwrap();
        }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.closed.store(true, Ordering::SeqCst);
        self.close();
    }
}

impl Shared {
    /// Accepts connections and forwards their bytes. Returns once the proxy is cut or closed; the
    /// caller then closes the listening socket, so that connections are refused.
    fn accept(self: &Arc<Self>, listener: &TcpListener) {
        while !self.is_dead(self.generation.load(Ordering::SeqCst)) {
            match listener.accept() {
                Ok((near, _)) => self.forward(near),
                Err(_) => thread::sleep(Duration::from_millis(1)),
            }
        }
    }

    fn is_dead(&self, generation: u64) -> bool {
        let closed = self.closed.load(Ordering::SeqCst);
        closed
            || self.cut.load(Ordering::SeqCst)
            || self.generation.load(Ordering::SeqCst) != generation
    }

    fn forward(self: &Arc<Self>, near: TcpStream) {
        // If the destination refuses the connection, close that of the source.
        let Ok(far) = TcpStream::connect(self.to) else { return };
        near.set_nonblocking(false).unwrap();
        let generation = self.generation.load(Ordering::SeqCst);
        let ends = [near.try_clone().unwrap(), far.try_clone().unwrap()];
        self.connections.lock().unwrap().extend(ends);
        for (from, to, is_from_source) in
            [(near.try_clone().unwrap(), far.try_clone().unwrap(), true), (far, near, false)]
        {
            from.set_nodelay(true).unwrap();
            let shared = Arc::clone(self);
            thread::spawn(move || shared.pump(from, to, is_from_source, generation));
        }
    }

    fn pump(&self, mut from: TcpStream, mut to: TcpStream, is_from_source: bool, generation: u64) {
        let mut buffer = vec![0; 64 << 10];
        let mut search = Search::default();
        while let Ok(count @ 1..) = from.read(&mut buffer) {
            while is_from_source && self.held.load(Ordering::SeqCst) && !self.is_dead(generation) {
                thread::sleep(Duration::from_millis(2));
            }
            self.wait_while_paused();
            let cut_after = if is_from_source {
                self.search(&buffer[..count], &mut search, generation)
            } else {
                None
            };
            if cut_after.is_none() && self.is_dead(generation) {
                break;
            }
            let count_forwarded = cut_after.unwrap_or(count);
            if to.write_all(&buffer[..count_forwarded]).is_err() || cut_after.is_some() {
                break;
            }
            if let Some(bytes_per_sec_max) = self.bytes_per_sec_max.filter(|_| is_from_source) {
                thread::sleep(
                    Duration::from_secs(1) * count_forwarded as u32 / bytes_per_sec_max as u32,
                );
            }
        }
        while self.is_dead(generation) && !self.closed.load(Ordering::SeqCst) {
            thread::sleep(Duration::from_millis(20));
        }
        let _ = to.shutdown(Shutdown::Both);
        let _ = from.shutdown(Shutdown::Both);
    }

    fn wait_while_paused(&self) {
        while self.paused.load(Ordering::SeqCst) && !self.closed.load(Ordering::SeqCst) {
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Searches `bytes` for the point of the cut. If found, cuts and returns how many of `bytes` to
    /// forward still.
    fn search(&self, bytes: &[u8], search: &mut Search, generation: u64) -> Option<usize> {
        let length = bytes.len() as u64;
        let bytes_sent = self.bytes_sent.fetch_add(length, Ordering::SeqCst) + length;
        if self.is_dead(generation) {
            return None;
        }
        let before = search.tail.len();
        search.tail.extend_from_slice(bytes);
        let count_forwarded = match *self.cut_at.lock().unwrap() {
            CutAt::Never => None,
            CutAt::Bytes(limit) => (bytes_sent >= limit).then_some(bytes.len()),
            CutAt::Hold(pattern) => {
                let found = find(&search.tail, pattern).is_some();
                if found {
                    self.held.store(true, Ordering::SeqCst);
                }
                None
            }
            CutAt::After(pattern) => find(&search.tail, pattern).map(|_| bytes.len()),
            CutAt::Before(pattern, nth) => find(&search.tail, pattern).and_then(|at| {
                search.seen += 1;
                (search.seen == nth).then_some(at.saturating_sub(before))
            }),
        };
        search.tail.drain(..search.tail.len().saturating_sub(HANDOVER_HEADER.len() - 1));
        if count_forwarded.is_some() {
            self.cut.store(true, Ordering::SeqCst);
        }
        count_forwarded
    }
}

/// The state of a search in one connection.
#[derive(Default)]
struct Search {
    /// The last bytes of earlier reads, since a pattern may span two reads.
    tail: Vec<u8>,
    /// Count of patterns found for [`CutAt::Before`].
    seen: u64,
}

fn find(bytes: &[u8], pattern: [u8; 8]) -> Option<usize> {
    bytes.windows(pattern.len()).position(|window| window == pattern)
}
