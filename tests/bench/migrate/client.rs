//! A client of a disk that is being moved. Never reconnects: it ends when its server does.
//!
//! It begins so many writes of 4 KiB a second, whether or not earlier ones are answered; each
//! counts from when it was due, not from when it could be sent, so that a server that lets one
//! wait is charged for those that wait behind it. Or it asks for one thing after another.

use super::Trouble;
use super::session::{Address, PATIENCE, Place, encode, open};
use flexnbd::nbd::wire::{CommandKind, SIMPLE_REPLY_MAGIC};
use flexnbd::net::Stream;
use nix::sys::prctl::set_timerslack;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Length of a write, in bytes.
const BLOCK: usize = 4096;
/// Length of a simple reply, in bytes.
const REPLY_LENGTH: usize = 16;
/// An odd number, so that its multiples visit all of a disk whose size is a power of two.
const STRIDE: u64 = 0x9E37_79B9_7F4A_7C15;

/// When the client asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pace {
    /// So many writes a second.
    PerSecond(u32),
    /// When the last request has been answered; reads and writes in turn.
    OneByOne,
}

/// A request that was answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Answered {
    pub(super) due: Instant,
    /// From then until it was answered.
    pub(super) latency: Duration,
}

/// A client at work.
#[derive(Debug)]
pub(super) struct Client {
    stream: Arc<Stream>,
    stop: Arc<AtomicBool>,
    /// Nobody where the receiver asks itself.
    sender: Option<JoinHandle<()>>,
    receiver: JoinHandle<Result<Vec<Answered>, String>>,
    /// Disconnected, or has a message, when enough requests have been answered.
    warm: Receiver<()>,
}

/// When writes are due.
#[derive(Clone, Copy, Debug)]
struct Timetable {
    began: Instant,
    interval: Duration,
}

impl Timetable {
    fn due(self, number: u64) -> Instant {
        // Longer than any run: 2^32 writes at one a microsecond are more than an hour.
        self.began + self.interval * u32::try_from(number).unwrap_or(u32::MAX)
    }
}

impl Client {
    /// Connects and begins to ask. [`Self::wait_until_warm`] waits for `warm` answers.
    ///
    /// # Errors
    /// When the server does not let it in.
    pub(super) fn start(at: SocketAddr, pace: Pace, warm: usize) -> Result<Self, Trouble> {
        let (stream, size) = open(&Place { address: Address::Tcp(at), export: "" })?;
        let (stream, stop) = (Arc::new(stream), Arc::new(AtomicBool::new(false)));
        let blocks = (size / BLOCK as u64).max(1);
        let (is_warm, warm_receiver) = mpsc::channel();
        let each = move |count| {
            if count == warm {
                // Nobody may be waiting.
                let _ = is_warm.send(());
            }
        };
        let (theirs, stopped) = (Arc::clone(&stream), Arc::clone(&stop));
        let (sender, receiver) = match pace {
            Pace::OneByOne => {
                (None, thread::spawn(move || one_by_one(&theirs, &stopped, blocks, each)))
            }
            Pace::PerSecond(rate) => {
                let interval = Duration::from_secs(1) / rate;
                let timetable = Timetable { began: Instant::now(), interval };
                let senders = Arc::clone(&stream);
                let send = move || send(&senders, &stopped, timetable, blocks);
                let receive = move || receive(&theirs, timetable, each);
                (Some(thread::spawn(send)), thread::spawn(receive))
            }
        };
        Ok(Self { stream, stop, sender, receiver, warm: warm_receiver })
    }

    /// Waits until enough requests have been answered.
    ///
    /// # Errors
    /// When that takes too long, or the server is gone.
    pub(super) fn wait_until_warm(&self, within: Duration) -> Result<(), Trouble> {
        let warm = self.warm.recv_timeout(within);
        warm.map_err(|_| "the client's requests are not answered".into())
    }

    /// All requests that were answered; ends what has not ended yet.
    ///
    /// # Errors
    /// When the server refused a request or answered nonsense.
    pub(super) fn finish(self) -> Result<Vec<Answered>, Trouble> {
        self.stop.store(true, Ordering::SeqCst);
        // Fails when the server was faster.
        let _ = self.stream.shutdown_both();
        if let Some(sender) = self.sender {
            sender.join().map_err(|_| "the sender panicked")?;
        }
        Ok(self.receiver.join().map_err(|_| "the receiver panicked")??)
    }
}

/// Sends writes when they are due, until it is told to stop or nobody takes them.
fn send(stream: &Stream, stop: &AtomicBool, timetable: Timetable, blocks: u64) {
    // Wakes up when it is time, not up to 50 µs later; without, latencies are just longer.
    let _ = set_timerslack(1);
    let data = [0xA5; BLOCK];
    for number in 0.. {
        if let Some(early) = timetable.due(number).checked_duration_since(Instant::now()) {
            thread::sleep(early);
        }
        let request = request(CommandKind::Write, number, number, blocks, &data);
        if stop.load(Ordering::SeqCst) || stream.send_all(&request, PATIENCE).is_err() {
            return;
        }
    }
}

/// Takes replies until the connection ends; `each` is told how many there are.
fn receive(
    stream: &Stream,
    timetable: Timetable,
    mut each: impl FnMut(usize),
) -> Result<Vec<Answered>, String> {
    let mut writes = Vec::new();
    let mut reply = [0; REPLY_LENGTH];
    while stream.recv_exact(&mut reply, PATIENCE).is_ok() {
        let due = timetable.due(acknowledged(&reply)?);
        writes.push(Answered { due, latency: due.elapsed() });
        each(writes.len());
    }
    Ok(writes)
}

/// Asks, waits for the answer, and asks again, until it is told to stop or nobody answers.
fn one_by_one(
    stream: &Stream,
    stop: &AtomicBool,
    blocks: u64,
    mut each: impl FnMut(usize),
) -> Result<Vec<Answered>, String> {
    let mut all = Vec::new();
    let mut reply = [0; REPLY_LENGTH];
    let mut data = [0xA5; BLOCK];
    for number in 0.. {
        // Every block is read and then written.
        let kind = if number % 2 == 0 { CommandKind::Read } else { CommandKind::Write };
        let request = request(kind, number, number / 2, blocks, &data);
        let due = Instant::now();
        if stop.load(Ordering::SeqCst)
            || stream.send_all(&request, PATIENCE).is_err()
            || stream.recv_exact(&mut reply, PATIENCE).is_err()
        {
            break;
        }
        if acknowledged(&reply)? != number {
            return Err(format!("request {number} was answered with {reply:02x?}"));
        }
        if kind == CommandKind::Read && stream.recv_exact(&mut data, PATIENCE).is_err() {
            break;
        }
        all.push(Answered { due, latency: due.elapsed() });
        each(all.len());
    }
    Ok(all)
}

/// Pure: a whole request for the block at which a client arrives in so many strides.
fn request(kind: CommandKind, number: u64, strides: u64, blocks: u64, data: &[u8]) -> Vec<u8> {
    let offset = strides.wrapping_mul(STRIDE) % blocks * BLOCK as u64;
    let head = encode(kind, number as usize, offset, BLOCK);
    if kind == CommandKind::Write { [&head[..], data].concat() } else { head.to_vec() }
}

/// Pure: the number of the request that a reply says has been done.
fn acknowledged(reply: &[u8; REPLY_LENGTH]) -> Result<u64, String> {
    let (head, cookie) = reply.split_at(8);
    let success = [SIMPLE_REPLY_MAGIC.to_be_bytes(), [0; 4]].concat();
    if head != success {
        return Err(format!("a request was answered with {reply:02x?}"));
    }
    Ok(cookie.iter().fold(0, |number, byte| number << 8 | u64::from(*byte)))
}

#[cfg(test)]
#[allow(unused)] // See migrate.rs.
mod tests {
    use super::*;

    fn reply(error: u8, cookie: u8) -> [u8; REPLY_LENGTH] {
        [0x67, 0x44, 0x66, 0x98, 0, 0, 0, error, 0, 0, 0, 0, 0, 0, 2, cookie]
    }

    #[test]
    fn only_success_acknowledges_a_request() {
        assert_eq!(acknowledged(&reply(0, 7)), Ok(0x207));
        assert!(acknowledged(&reply(5, 7)).is_err());
        assert!(acknowledged(&[0; REPLY_LENGTH]).is_err());
    }

    #[test]
    fn writes_are_due_at_equal_intervals() {
        let timetable = Timetable { began: Instant::now(), interval: Duration::from_micros(200) };
        assert_eq!(timetable.due(5000) - timetable.began, Duration::from_secs(1));
        assert_eq!(timetable.due(0), timetable.began);
    }
}
