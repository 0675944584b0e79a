//! The raw generator: pipelining NBD clients on non-blocking sockets, all in one thread.
//! Keeps the server busy and counts replies; discards the data of reads.

use super::Setup;
use super::cells::{Cell, Temperature, Work};
use super::results::Sample;
use super::servers::Running;
use super::usage::cpu_seconds;
use crate::nbd::{Export, REPLY_LENGTH, cookie, encode};
use crate::process::PATIENCE;
use crate::report::Error;
use flexnbd::nbd::wire::CommandKind;
use flexnbd::net::Stream;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::time::{ClockId, clock_gettime};
use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

const BUFFER_LENGTH: usize = 256 << 10;
/// How long a cached load runs before the measurement begins.
const WARM_UP: Duration = Duration::from_millis(200);

/// A place for one request; its index is the cookie.
#[derive(Clone, Debug, Default)]
struct Slot {
    is_in_flight: bool,
    header: Vec<u8>,
    /// Lengths of the data of the request and of its reply.
    sends: usize,
    receives: usize,
}

/// One connection with at most `depth` requests in flight. Never blocks.
#[derive(Debug)]
pub(crate) struct Session {
    stream: Stream,
    block: usize,
    picker: Picker,
    slots: Vec<Slot>,
    pub(crate) free: Vec<usize>,
    /// Slots whose request is not completely sent, and how much of the first one is.
    unsent: VecDeque<usize>,
    sent_of_first: usize,
    /// The received part of the next reply's header.
    partial: Vec<u8>,
    /// The slot whose reply is being received, and how much of its data is missing.
    replying: Option<usize>,
    data_left: usize,
}

impl Session {
    pub(crate) fn new(stream: Stream, cell: &Cell, picker: Picker) -> Self {
        Self {
            stream,
            block: cell.block as usize,
            picker,
            slots: vec![Slot::default(); cell.depth],
            free: (0..cell.depth).collect(),
            unsent: VecDeque::new(),
            sent_of_first: 0,
            partial: Vec::with_capacity(REPLY_LENGTH),
            replying: None,
            data_left: 0,
        }
    }

    fn is_idle(&self) -> bool {
        self.free.len() == self.slots.len()
    }

    /// Fills all free slots with requests, and sends. Writes write a block of `payload`.
    pub(crate) fn fill(&mut self, payload: &[u8]) -> io::Result<()> {
        while let Some(number) = self.free.pop() {
            let (block, is_write) = self.picker.next();
            let slot = &mut self.slots[number];
            let kind = if is_write { CommandKind::Write } else { CommandKind::Read };
            (slot.sends, slot.receives) = if is_write { (self.block, 0) } else { (0, self.block) };
            let offset = block * self.block as u64;
            encode(kind, number as u64, offset, self.block, &mut slot.header);
            slot.is_in_flight = true;
            self.unsent.push_back(number);
        }
        self.send(payload)
    }

    /// Sends as much of the unsent requests as the socket takes.
    fn send(&mut self, payload: &[u8]) -> io::Result<()> {
        while !self.unsent.is_empty() {
            match self.stream.try_send_vectored(&self.slices(payload)) {
                Ok(count) => self.sent(count),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn slices<'a>(&'a self, payload: &'a [u8]) -> Vec<IoSlice<'a>> {
        let mut skip = self.sent_of_first;
        let mut slices = Vec::with_capacity(2 * self.unsent.len());
        for Slot { header, sends, .. } in self.unsent.iter().map(|number| &self.slots[*number]) {
            let data = &payload[..*sends][skip.saturating_sub(header.len())..];
            let header = &header[skip.min(header.len())..];
            slices.extend([header, data].into_iter().filter(|s| !s.is_empty()).map(IoSlice::new));
            skip = 0;
        }
        slices
    }

    fn sent(&mut self, count: usize) {
        self.sent_of_first += count;
        while let Some(number) = self.unsent.front() {
            let Slot { header, sends, .. } = &self.slots[*number];
            let length = header.len() + sends;
            if self.sent_of_first < length {
                return;
            }
            self.sent_of_first -= length;
            self.unsent.pop_front();
        }
    }

    /// Receives the bytes that have arrived; returns how many requests are complete.
    pub(crate) fn receive(&mut self, buffer: &mut [u8]) -> Result<u64, Error> {
        let mut complete = 0;
        loop {
            let kept = self.partial.len();
            buffer[..kept].copy_from_slice(&self.partial);
            match self.stream.try_recv(&mut buffer[kept..]) {
                Ok(0) => return Err("the server closed the connection".into()),
                Ok(count) => complete += self.parse(&buffer[..kept + count])?,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(complete),
                Err(error) => return Err(error.into()),
            }
            // The rest of a decrypted record makes no socket readable.
            if !self.stream.is_tls() {
                return Ok(complete);
            }
        }
    }

    /// Parses received bytes, those of `partial` first. A failed request is an error.
    fn parse(&mut self, mut bytes: &[u8]) -> Result<u64, Error> {
        let mut complete = 0;
        loop {
            let skipped = bytes.len().min(self.data_left);
            bytes = &bytes[skipped..];
            self.data_left -= skipped;
            if self.data_left > 0 {
                break;
            }
            if let Some(number) = self.replying.take() {
                self.slots[number].is_in_flight = false;
                self.free.push(number);
                complete += 1;
            }
            let Some((header, rest)) = bytes.split_at_checked(REPLY_LENGTH) else { break };
            let number = cookie(header)? as usize;
            match self.slots.get(number) {
                Some(slot) if slot.is_in_flight => self.data_left = slot.receives,
                _ => return Err("the server answered an unknown request".into()),
            }
            (self.replying, bytes) = (Some(number), rest);
        }
        self.partial.clear();
        self.partial.extend_from_slice(bytes);
        Ok(complete)
    }
}

/// Chooses the next request; the same sequence for every server.
#[derive(Debug)]
pub(crate) struct Picker {
    random: fastrand::Rng,
    blocks: u64,
    /// The next block of a sequential load.
    next: Option<u64>,
    work: Work,
}

impl Picker {
    /// Sequential sessions begin at equal distances.
    pub(crate) fn new(cell: &Cell, blocks: u64, number: usize) -> Self {
        let start = number as u64 * blocks / cell.sessions as u64;
        let random = fastrand::Rng::with_seed(number as u64);
        Self { random, blocks, next: cell.is_sequential().then_some(start), work: cell.work }
    }

    /// The number of a block, and whether to write it.
    pub(crate) fn next(&mut self) -> (u64, bool) {
        let block = self.next.unwrap_or_else(|| self.random.u64(..self.blocks));
        self.next = self.next.map(|next| (next + 1) % self.blocks);
        let is_write = match self.work {
            Work::Read => false,
            Work::Write => true,
            Work::Mixed => self.random.bool(),
        };
        (block, is_write)
    }
}

/// All sessions of one load, and what they have done.
#[derive(Debug)]
pub(crate) struct Sessions {
    sessions: Vec<Session>,
    payload: Vec<u8>,
    buffer: Vec<u8>,
    pub(crate) requests: u64,
    pub(crate) elapsed: Duration,
    /// Processor time of this thread.
    pub(crate) cpu: Duration,
}

impl Sessions {
    pub(crate) fn connect(cell: &Cell, export: &Export) -> Result<Self, Error> {
        let connect = |number| -> Result<Session, Error> {
            let (stream, size) = export.open_stream()?;
            let blocks = size / u64::from(cell.block);
            if blocks == 0 {
                return Err(format!("the export has only {size} bytes").into());
            }
            Ok(Session::new(stream, cell, Picker::new(cell, blocks, number)))
        };
        Ok(Self {
            sessions: (0..cell.sessions).map(connect).collect::<Result<_, Error>>()?,
            payload: payload(cell.block),
            buffer: vec![0; BUFFER_LENGTH],
            requests: 0,
            elapsed: Duration::ZERO,
            cpu: Duration::ZERO,
        })
    }

    /// Runs the load for this time, at most until this number of requests is complete, and leaves
    /// its requests in flight; without a limit, sends no more requests and waits for all replies.
    pub(crate) fn run(&mut self, limit: Option<(Duration, u64)>) -> Result<(), Error> {
        let send = if limit.is_some() { Session::fill } else { Session::send };
        let (start, cpu) = (Instant::now(), thread_time()?);
        for session in &mut self.sessions {
            send(session, &self.payload)?;
        }
        while match limit {
            Some((time, requests)) => start.elapsed() < time && self.requests < requests,
            None => !self.sessions.iter().all(Session::is_idle),
        } {
            for ready in self.wait()? {
                let session = &mut self.sessions[ready];
                self.requests += session.receive(&mut self.buffer)?;
                send(session, &self.payload)?;
            }
        }
        self.elapsed += start.elapsed();
        self.cpu += thread_time()? - cpu;
        Ok(())
    }

    /// The sessions whose sockets are ready.
    fn wait(&self) -> Result<Vec<usize>, Error> {
        let mut descriptors: Vec<PollFd<'_>> = Vec::with_capacity(self.sessions.len());
        for session in &self.sessions {
            let mut events = PollFlags::POLLIN;
            events.set(PollFlags::POLLOUT, !session.unsent.is_empty());
            descriptors.push(PollFd::new(session.stream.as_fd(), events));
        }
        if poll(&mut descriptors, PollTimeout::try_from(PATIENCE)?)? == 0 {
            return Err(format!("no reply for {PATIENCE:?}").into());
        }
        let ready = |fd: &PollFd<'_>| fd.any().unwrap_or(true);
        Ok((0..descriptors.len()).filter(|at| ready(&descriptors[*at])).collect())
    }
}

/// The data of every write: no zeros, which a server might turn into holes.
pub(crate) fn payload(length: u32) -> Vec<u8> {
    (0..length).map(|i| (i % 251) as u8 + 1).collect()
}

fn thread_time() -> nix::Result<Duration> {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map(Duration::from)
}

pub(crate) fn sample(cell: &Cell, setup: &Setup, server: &Running) -> Result<Sample, Error> {
    let mut sessions = Sessions::connect(cell, &server.export)?;
    let is_cold = cell.temperature == Temperature::Cold;
    let mut requests_max = u64::MAX;
    if is_cold {
        setup.images.evict()?;
        // A second pass over the image would find it cached.
        requests_max = setup.images.size / u64::from(cell.block);
    } else {
        sessions.run(Some((WARM_UP, u64::MAX)))?;
        (sessions.requests, sessions.elapsed, sessions.cpu) = (0, Duration::ZERO, Duration::ZERO);
    }
    let cpu_before = cpu_seconds(server.pid);
    sessions.run(Some((setup.options.seconds, requests_max)))?;
    if is_cold {
        // A cached load begins and ends with the same number of requests in flight, a cold load
        // begins with none.
        sessions.run(None)?;
    }
    let cpu = cpu_seconds(server.pid) - cpu_before;
    let (requests, elapsed) = (sessions.requests as f64, sessions.elapsed.as_secs_f64());
    let client_busy = sessions.cpu.as_secs_f64() / elapsed;
    Ok(Sample::new(cell, server.pid, requests, requests / elapsed, cpu, client_busy))
}
