//! A link between source and destination that a test can slow down or cut: TCP forwarded from one
//! to the other.
//! Cut means silence, as when a cable is pulled: nothing is forwarded any more, nobody is told, and
//! what was connected stays half open for good. Never changes a byte.

use crate::unused_loopback_address;
use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// The beginning of a FLUSH in a compact request header.
pub const FLUSH_HEADER: [u8; 8] = [0x25, 0x60, 0x95, 0x13, 0, 0, 0, 3];
/// The beginning of the private command HANDOVER (flexnbd-migration(7)) in such a header.
pub const HANDOVER_HEADER: [u8; 8] = [0x25, 0x60, 0x95, 0x13, 0, 0, 0x46, 0x4c];

/// When the link is cut by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CutAt {
    /// Not by itself.
    Never,
    /// Once so many bytes have gone to the destination.
    Bytes(u64),
    /// Before the n-th request of this kind: it does not get through.
    Before([u8; 8], u64),
    /// After it: it gets through, its reply does not.
    After([u8; 8]),
    /// After the first: it gets through, and so does its reply, but nothing else does until
    /// [`Proxy::release`].
    Hold([u8; 8]),
}

struct Shared {
    to: SocketAddr,
    trap: Mutex<CutAt>,
    cut: AtomicBool,
    held: AtomicBool,
    /// Of the cut that is on, or the next: connections of an earlier one stay dead.
    era: AtomicU64,
    over: AtomicBool,
    /// Bytes are held back for the time being.
    silent: AtomicBool,
    /// Both ends of every connection there has been.
    connections: Mutex<Vec<TcpStream>>,
    sent: AtomicU64,
    /// Bytes per second to the destination.
    rate: Option<u64>,
}

/// A link. Dropping it closes everything.
pub struct Proxy {
    /// Where the source connects to reach the destination.
    pub address: SocketAddr,
    shared: Arc<Shared>,
    acceptor: Option<JoinHandle<()>>,
}

impl Proxy {
    /// A link to that address, which is reached at this one's own.
    pub fn to(to: SocketAddr, trap: CutAt) -> Proxy {
        Proxy::new(to, trap, None)
    }

    /// The same, never cut, which carries so many bytes per second.
    pub fn slow(to: SocketAddr, rate: u64) -> Proxy {
        Proxy::new(to, CutAt::Never, Some(rate))
    }

    fn new(to: SocketAddr, trap: CutAt, rate: Option<u64>) -> Proxy {
        let shared = Arc::new(Shared {
            to,
            trap: Mutex::new(trap),
            cut: AtomicBool::new(false),
            held: AtomicBool::new(false),
            era: AtomicU64::new(0),
            over: AtomicBool::new(false),
            silent: AtomicBool::new(false),
            connections: Mutex::default(),
            sent: AtomicU64::new(0),
            rate,
        });
        let mut proxy = Proxy { address: unused_loopback_address(), shared, acceptor: None };
        proxy.open();
        proxy
    }

    /// Whether nothing new gets through: it is cut or holds.
    pub fn is_cut(&self) -> bool {
        self.shared.cut.load(Ordering::SeqCst) || self.is_held()
    }

    /// Whether it holds what the source sends ([`CutAt::Hold`]).
    pub fn is_held(&self) -> bool {
        self.shared.held.load(Ordering::SeqCst)
    }

    /// Lets through what was held, and holds nothing again.
    pub fn release(&self) {
        *self.shared.trap.lock().unwrap() = CutAt::Never;
        self.shared.held.store(false, Ordering::SeqCst);
    }

    /// Bytes that have come from the source, whether or not they got through.
    pub fn bytes_sent(&self) -> u64 {
        self.shared.sent.load(Ordering::SeqCst)
    }

    /// Cuts it now.
    pub fn cut(&self) {
        self.shared.cut.store(true, Ordering::SeqCst);
    }

    /// Holds back what is sent, in both directions, or delivers it again.
    pub fn set_paused(&self, silent: bool) {
        self.shared.silent.store(silent, Ordering::SeqCst);
    }

    /// Ends every connection at both ends.
    pub fn reset(&self) {
        for end in self.shared.connections.lock().unwrap().drain(..) {
            let _ = end.shutdown(Shutdown::Both);
        }
    }

    /// Lets new connections through again, and is never cut again.
    pub fn repair(&mut self) {
        *self.shared.trap.lock().unwrap() = CutAt::Never;
        // One that only holds is still accepting.
        self.shared.cut.store(true, Ordering::SeqCst);
        self.close();
        self.shared.era.fetch_add(1, Ordering::SeqCst);
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
        self.shared.over.store(true, Ordering::SeqCst);
        self.close();
    }
}

impl Shared {
    /// Forwards whoever comes. Ends, and with it the listening, when the link is cut.
    fn accept(self: &Arc<Self>, listener: &TcpListener) {
        while !self.is_dead(self.era.load(Ordering::SeqCst)) {
            match listener.accept() {
                Ok((near, _)) => self.forward(near),
                Err(_) => thread::sleep(Duration::from_millis(1)),
            }
        }
    }

    fn is_dead(&self, era: u64) -> bool {
        let over = self.over.load(Ordering::SeqCst);
        over || self.cut.load(Ordering::SeqCst) || self.era.load(Ordering::SeqCst) != era
    }

    fn forward(self: &Arc<Self>, near: TcpStream) {
        // Who is not there is not there through a link either.
        let Ok(far) = TcpStream::connect(self.to) else { return };
        near.set_nonblocking(false).unwrap();
        let era = self.era.load(Ordering::SeqCst);
        let ends = [near.try_clone().unwrap(), far.try_clone().unwrap()];
        self.connections.lock().unwrap().extend(ends);
        for (from, to, upstream) in
            [(near.try_clone().unwrap(), far.try_clone().unwrap(), true), (far, near, false)]
        {
            from.set_nodelay(true).unwrap();
            let shared = Arc::clone(self);
            thread::spawn(move || shared.pump(from, to, upstream, era));
        }
    }

    fn pump(&self, mut from: TcpStream, mut to: TcpStream, upstream: bool, era: u64) {
        let mut buffer = vec![0; 64 << 10];
        let mut watch = Watch::default();
        while let Ok(count @ 1..) = from.read(&mut buffer) {
            while upstream && self.held.load(Ordering::SeqCst) && !self.is_dead(era) {
                thread::sleep(Duration::from_millis(2));
            }
            self.wait_for_the_end_of_silence();
            let snapped =
                if upstream { self.look(&buffer[..count], &mut watch, era) } else { None };
            if snapped.is_none() && self.is_dead(era) {
                break;
            }
            let through = snapped.unwrap_or(count);
            if to.write_all(&buffer[..through]).is_err() || snapped.is_some() {
                break;
            }
            if let Some(rate) = self.rate.filter(|_| upstream) {
                thread::sleep(Duration::from_secs(1) * through as u32 / rate as u32);
            }
        }
        while self.is_dead(era) && !self.over.load(Ordering::SeqCst) {
            thread::sleep(Duration::from_millis(20));
        }
        let _ = to.shutdown(Shutdown::Both);
        let _ = from.shutdown(Shutdown::Both);
    }

    fn wait_for_the_end_of_silence(&self) {
        while self.silent.load(Ordering::SeqCst) && !self.over.load(Ordering::SeqCst) {
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Cuts the link if this is what the trap waits for: how many of these bytes get through then.
    fn look(&self, bytes: &[u8], watch: &mut Watch, era: u64) -> Option<usize> {
        let length = bytes.len() as u64;
        let sent = self.sent.fetch_add(length, Ordering::SeqCst) + length;
        if self.is_dead(era) {
            return None;
        }
        let before = watch.tail.len();
        watch.tail.extend_from_slice(bytes);
        let through = match *self.trap.lock().unwrap() {
            CutAt::Never => None,
            CutAt::Bytes(limit) => (sent >= limit).then_some(bytes.len()),
            CutAt::Hold(pattern) => {
                let found = find(&watch.tail, pattern).is_some();
                if found {
                    self.held.store(true, Ordering::SeqCst);
                }
                None
            }
            CutAt::After(pattern) => find(&watch.tail, pattern).map(|_| bytes.len()),
            CutAt::Before(pattern, nth) => find(&watch.tail, pattern).and_then(|at| {
                watch.seen += 1;
                (watch.seen == nth).then_some(at.saturating_sub(before))
            }),
        };
        watch.tail.drain(..watch.tail.len().saturating_sub(HANDOVER_HEADER.len() - 1));
        if through.is_some() {
            self.cut.store(true, Ordering::SeqCst);
        }
        through
    }
}

/// What one direction of a connection remembers.
#[derive(Default)]
struct Watch {
    /// The last bytes of what came before, so that no pattern is missed between two.
    tail: Vec<u8>,
    /// How many requests came of the kind that the trap waits for.
    seen: u64,
}

fn find(bytes: &[u8], pattern: [u8; 8]) -> Option<usize> {
    bytes.windows(pattern.len()).position(|window| window == pattern)
}
