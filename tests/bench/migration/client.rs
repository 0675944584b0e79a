//! A client of the disk during its migration. It never reconnects, and ends with its server.
//!
//! Either it writes at fixed times, whether or not earlier writes are complete. Latency counts from
//! when a write is due, so that a delay of one write counts for all that are due behind it. Or it
//! sends one request after another.

use crate::nbd::{Export, REPLY_LENGTH, cookie, encode};
use crate::process::PATIENCE;
use crate::report::Error;
use flexnbd::client::{ClientError, Connection};
use flexnbd::nbd::wire::CommandKind;
use flexnbd::net::{Address, Stream};
use nix::sys::prctl::set_timerslack;
use std::net::SocketAddr;
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

#[derive(Clone, Copy, Debug)]
pub(crate) enum Pace {
    PerSecond(u32),
    /// Reads and writes in turn, one at a time.
    OneByOne,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Completion {
    pub(crate) due: Instant,
    pub(crate) latency: Duration,
}

type Completions = Result<Vec<Completion>, Error>;

#[derive(Debug)]
pub(crate) struct Client(JoinHandle<Completions>);

impl Client {
    /// Connects, starts sending, and waits for `warm` completions.
    pub(crate) fn start(at: SocketAddr, pace: Pace, warm: usize) -> Result<Self, Error> {
        let export = Export { address: Address::Tcp(at), name: "", tls: None };
        let (is_warm, warmed) = mpsc::channel();
        let completed = move |count| {
            if count == warm {
                let _ = is_warm.send(());
            }
        };
        let client = match pace {
            Pace::OneByOne => {
                let connection = export.open()?;
                thread::spawn(move || one_by_one(connection, completed))
            }
            Pace::PerSecond(rate) => {
                let (stream, size) = export.open_stream()?;
                let start = Instant::now();
                let writes =
                    Writes { stream, size, start, interval: Duration::from_secs(1) / rate };
                thread::spawn(move || writes.run(completed))
            }
        };
        warmed
            .recv_timeout(WARM_TIME_MAX)
            .map_err(|_| "the server does not answer the client's requests")?;
        Ok(Self(client))
    }

    /// All completions, or the error of a failed request. Only after the server has ended.
    pub(crate) fn finish(self) -> Completions {
        self.0.join().map_err(|_| "the client panicked")?
    }
}

/// Offset of the request at this position of the sequence.
fn offset(position: u64, size: u64) -> u64 {
    position.wrapping_mul(STRIDE) % (size / BLOCK as u64).max(1) * BLOCK as u64
}

/// Reads each block and writes it back, until the connection ends.
fn one_by_one(mut connection: Connection, mut completed: impl FnMut(usize)) -> Completions {
    let size = connection.agreement().size;
    let (mut all, mut data) = (Vec::new(), Vec::with_capacity(BLOCK));
    for number in 0.. {
        let offset = offset(number / 2, size);
        let due = Instant::now();
        let outcome = if number % 2 == 0 {
            data.clear();
            connection.read(offset, BLOCK as u32, &mut |bytes| {
                data.extend_from_slice(bytes);
                Ok(())
            })
        } else {
            connection.write(offset, &data)
        };
        match outcome {
            Ok(()) => all.push(Completion { due, latency: due.elapsed() }),
            Err(ClientError::Connection(_)) => break,
            Err(error) => return Err(error.into()),
        }
        completed(all.len());
    }
    Ok(all)
}

/// Writes at fixed times.
#[derive(Debug)]
struct Writes {
    stream: Stream,
    size: u64,
    start: Instant,
    interval: Duration,
}

impl Writes {
    /// Receives replies until the connection ends; another thread sends.
    fn run(&self, mut completed: impl FnMut(usize)) -> Completions {
        thread::scope(|scope| {
            scope.spawn(|| self.send());
            let mut all = Vec::new();
            let mut reply = [0; REPLY_LENGTH];
            while self.stream.recv_exact(&mut reply, PATIENCE).is_ok() {
                let due = self.due(cookie(&reply).inspect_err(|_| self.end())?);
                all.push(Completion { due, latency: due.elapsed() });
                completed(all.len());
            }
            self.end();
            Ok(all)
        })
    }

    /// Ends the sender. Fails if the server has closed the connection.
    fn end(&self) {
        let _ = self.stream.shutdown_both();
    }

    /// When the write with this number is due.
    fn due(&self, number: u64) -> Instant {
        // No run reaches the limit: 2^32 writes at one per microsecond take more than an hour.
        self.start + self.interval * u32::try_from(number).unwrap_or(u32::MAX)
    }

    /// Sends writes when they are due, until the connection ends.
    fn send(&self) {
        // The default slack is 50 µs, which would add to each latency.
        let _ = set_timerslack(1);
        let mut request = Vec::new();
        for number in 0.. {
            if let Some(early) = self.due(number).checked_duration_since(Instant::now()) {
                thread::sleep(early);
            }
            encode(CommandKind::Write, number, offset(number, self.size), BLOCK, &mut request);
            request.extend([0xA5; BLOCK]);
            if self.stream.send_all(&request, PATIENCE).is_err() {
                return;
            }
        }
    }
}
