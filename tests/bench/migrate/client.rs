//! A client of the disk during its migration. It never reconnects, and ends with its server.
//!
//! Either it writes at fixed times, whether or not earlier writes are complete. Latency counts from
//! when a write is due, so that a delay of one write counts for all that are due behind it. Or it
//! sends one request after another.

use super::Error;
use super::nbd::{Address, Export, REPLY_LENGTH, cookie, encode};
use super::process::PATIENCE;
use flexnbd::nbd::wire::CommandKind;
use flexnbd::net::Stream;
use nix::sys::prctl::set_timerslack;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Length of a request, in bytes.
const BLOCK: usize = 4096;
/// Distance of successive requests, in blocks. It is odd, so that they visit every block of a disk
/// whose size is a power of two.
const STRIDE: u64 = 0x9E37_79B9_7F4A_7C15;

/// Time limit of the requests before the migration.
const WARM_TIME_MAX: Duration = Duration::from_secs(60);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pace {
    PerSecond(u32),
    /// Reads and writes in turn, one at a time.
    OneByOne,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Completion {
    pub(super) due: Instant,
    pub(super) latency: Duration,
}

#[derive(Debug)]
pub(super) struct Client {
    shared: Arc<Shared>,
    /// Sends at fixed times. Otherwise the receiver sends.
    sender: Option<JoinHandle<()>>,
    receiver: JoinHandle<Result<Vec<Completion>, Error>>,
}

#[derive(Debug)]
struct Shared {
    stream: Stream,
    blocks: u64,
    start: Instant,
    /// Between writes at a fixed rate.
    interval: Duration,
}

impl Client {
    /// Connects, starts sending, and waits for `warm` completions.
    pub(super) fn start(at: SocketAddr, pace: Pace, warm: usize) -> Result<Self, Error> {
        let (stream, size) = Export { address: Address::Tcp(at), name: "" }.open()?;
        let blocks = (size / BLOCK as u64).max(1);
        let interval = match pace {
            Pace::PerSecond(rate) => Duration::from_secs(1) / rate,
            Pace::OneByOne => Duration::ZERO,
        };
        let start = Instant::now();
        let shared = Arc::new(Shared { stream, blocks, start, interval });
        let (is_warm, warmed) = mpsc::channel();
        let completed = move |count| {
            if count == warm {
                let _ = is_warm.send(());
            }
        };
        let (one, other) = (Arc::clone(&shared), Arc::clone(&shared));
        let (sender, receiver) = match pace {
            Pace::OneByOne => (None, thread::spawn(move || one.one_by_one(completed))),
            Pace::PerSecond(_) => {
                let sender = thread::spawn(move || one.send());
                (Some(sender), thread::spawn(move || other.receive(completed)))
            }
        };
        warmed
            .recv_timeout(WARM_TIME_MAX)
            .map_err(|_| "the server does not answer the client's requests")?;
        Ok(Self { shared, sender, receiver })
    }

    /// Stops; returns all completions, or the error of a failed request.
    pub(super) fn finish(self) -> Result<Vec<Completion>, Error> {
        // Requests fail from here on. This fails if the server has closed the connection.
        let _ = self.shared.stream.shutdown_both();
        if let Some(sender) = self.sender {
            sender.join().map_err(|_| "the sender panicked")?;
        }
        self.receiver.join().map_err(|_| "the receiver panicked")?
    }
}

impl Shared {
    /// When the write with this number is due.
    fn due(&self, number: u64) -> Instant {
        // No run reaches the limit: 2^32 writes at one per microsecond take more than an hour.
        self.start + self.interval * u32::try_from(number).unwrap_or(u32::MAX)
    }

    /// Sends writes when they are due, until the client stops or the connection ends.
    fn send(&self) {
        // The default slack is 50 µs, which would add to each latency.
        let _ = set_timerslack(1);
        for number in 0.. {
            if let Some(early) = self.due(number).checked_duration_since(Instant::now()) {
                thread::sleep(early);
            }
            if !self.request(CommandKind::Write, number, number, &[0xA5; BLOCK]) {
                return;
            }
        }
    }

    /// Receives replies until the connection ends; calls `completed` with their number.
    fn receive(&self, mut completed: impl FnMut(usize)) -> Result<Vec<Completion>, Error> {
        let mut all = Vec::new();
        let mut reply = [0; REPLY_LENGTH];
        while self.stream.recv_exact(&mut reply, PATIENCE).is_ok() {
            let due = self.due(cookie(reply)?);
            all.push(Completion { due, latency: due.elapsed() });
            completed(all.len());
        }
        Ok(all)
    }

    /// Reads each block and writes it back, until the client stops or the connection ends.
    fn one_by_one(&self, mut completed: impl FnMut(usize)) -> Result<Vec<Completion>, Error> {
        let mut all = Vec::new();
        let (mut reply, mut data) = ([0; REPLY_LENGTH], [0xA5; BLOCK]);
        for number in 0.. {
            let kind = if number % 2 == 0 { CommandKind::Read } else { CommandKind::Write };
            let due = Instant::now();
            if !self.request(kind, number, number / 2, &data)
                || self.stream.recv_exact(&mut reply, PATIENCE).is_err()
            {
                break;
            }
            if cookie(reply)? != number {
                return Err(format!("the reply to request {number} is {reply:02x?}").into());
            }
            if kind == CommandKind::Read && self.stream.recv_exact(&mut data, PATIENCE).is_err() {
                break;
            }
            all.push(Completion { due, latency: due.elapsed() });
            completed(all.len());
        }
        Ok(all)
    }

    /// Sends one request; returns whether that succeeded before the client stopped.
    fn request(&self, kind: CommandKind, cookie: u64, position: u64, data: &[u8]) -> bool {
        let offset = position.wrapping_mul(STRIDE) % self.blocks * BLOCK as u64;
        let mut request = encode(kind, cookie, offset, BLOCK).to_vec();
        if kind == CommandKind::Write {
            request.extend(data);
        }
        self.stream.send_all(&request, PATIENCE).is_ok()
    }
}
