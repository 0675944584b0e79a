//! The raw generator: pipelining NBD clients on non-blocking sockets, all in one thread.
//! Keeps the server busy and counts replies; discards the data of reads.

use super::cells::{Cell, Temperature, Work};
use super::nbd::{self, Export, REPLY_LENGTH, REQUEST_LENGTH};
use super::process::PATIENCE;
use super::results::Sample;
use super::servers::Running;
use super::{Error, Setup, usage};
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

/// The content of a slot; its index is the cookie of the request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Slot {
    Free,
    Read,
    Write,
}

/// One connection with at most `depth` requests in flight. Never blocks.
#[derive(Debug)]
struct Session {
    stream: Stream,
    block: usize,
    picker: Picker,
    slots: Vec<Slot>,
    requests: Vec<[u8; REQUEST_LENGTH]>,
    free: Vec<usize>,
    /// Slots whose request is not completely sent, and how much of the first one is.
    unsent: VecDeque<usize>,
    sent_of_first: usize,
    /// The header of the reply that is being received, how much of it has arrived, and how much
    /// data is missing once it is complete.
    header: [u8; REPLY_LENGTH],
    header_length: usize,
    data_left: usize,
}

impl Session {
    fn connect(export: &Export, cell: &Cell, number: usize) -> Result<Self, Error> {
        let (stream, size) = export.open()?;
        let blocks = size / u64::from(cell.block);
        if blocks == 0 {
            return Err(format!("the export has only {size} bytes").into());
        }
        Ok(Self::new(stream, cell, Picker::new(cell, blocks, number)))
    }

    fn new(stream: Stream, cell: &Cell, picker: Picker) -> Self {
        Self {
            stream,
            block: cell.block as usize,
            picker,
            slots: vec![Slot::Free; cell.depth],
            requests: vec![[0; REQUEST_LENGTH]; cell.depth],
            free: (0..cell.depth).collect(),
            unsent: VecDeque::new(),
            sent_of_first: 0,
            header: [0; REPLY_LENGTH],
            header_length: 0,
            data_left: 0,
        }
    }

    fn is_idle(&self) -> bool {
        self.free.len() == self.slots.len()
    }

    /// Fills all free slots with requests, and sends. Writes write a block of `payload`.
    fn fill(&mut self, payload: &[u8]) -> io::Result<()> {
        while let Some(slot) = self.free.pop() {
            let (block, is_write) = self.picker.next();
            let (kind, content) = match is_write {
                true => (CommandKind::Write, Slot::Write),
                false => (CommandKind::Read, Slot::Read),
            };
            self.slots[slot] = content;
            let offset = block * self.block as u64;
            self.requests[slot] = nbd::encode(kind, slot as u64, offset, self.block);
            self.unsent.push_back(slot);
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
        for slot in &self.unsent {
            let header = &self.requests[*slot][skip.min(REQUEST_LENGTH)..];
            let data = &payload[..self.data_length(*slot)][skip.saturating_sub(REQUEST_LENGTH)..];
            slices.extend([header, data].into_iter().filter(|s| !s.is_empty()).map(IoSlice::new));
            skip = 0;
        }
        slices
    }

    fn sent(&mut self, count: usize) {
        self.sent_of_first += count;
        while let Some(slot) = self.unsent.front() {
            let length = REQUEST_LENGTH + self.data_length(*slot);
            if self.sent_of_first < length {
                return;
            }
            self.sent_of_first -= length;
            self.unsent.pop_front();
        }
    }

    /// Length of the data that the request in this slot carries.
    fn data_length(&self, slot: usize) -> usize {
        if self.slots[slot] == Slot::Write { self.block } else { 0 }
    }

    /// Receives what has arrived; returns how many requests are complete.
    fn receive(&mut self, buffer: &mut [u8]) -> Result<u64, Error> {
        match self.stream.try_recv(buffer) {
            Ok(0) => Err("the server closed the connection".into()),
            Ok(count) => self.parse(&buffer[..count]),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
            Err(error) => Err(error.into()),
        }
    }

    /// Parses replies, which may arrive in pieces of any length. A failed request is an error.
    fn parse(&mut self, mut bytes: &[u8]) -> Result<u64, Error> {
        let mut complete = 0;
        while !bytes.is_empty() {
            if self.header_length < REPLY_LENGTH {
                let (piece, rest) =
                    bytes.split_at(bytes.len().min(REPLY_LENGTH - self.header_length));
                self.header[self.header_length..][..piece.len()].copy_from_slice(piece);
                self.header_length += piece.len();
                bytes = rest;
                if self.header_length < REPLY_LENGTH {
                    break;
                }
                self.data_left = match self.slots.get(nbd::cookie(self.header)? as usize) {
                    Some(Slot::Read) => self.block,
                    Some(Slot::Write) => 0,
                    _ => return Err("the server answered an unknown request".into()),
                };
            }
            let skipped = bytes.len().min(self.data_left);
            bytes = &bytes[skipped..];
            self.data_left -= skipped;
            if self.data_left == 0 {
                let slot = nbd::cookie(self.header)? as usize;
                self.slots[slot] = Slot::Free;
                self.free.push(slot);
                self.header_length = 0;
                complete += 1;
            }
        }
        Ok(complete)
    }
}

/// Chooses the next request; the same sequence for every server.
#[derive(Debug)]
struct Picker {
    random: fastrand::Rng,
    blocks: u64,
    /// The next block of a sequential load.
    next: Option<u64>,
    work: Work,
}

impl Picker {
    /// Sequential sessions begin at equal distances.
    fn new(cell: &Cell, blocks: u64, number: usize) -> Self {
        let start = number as u64 * blocks / cell.sessions as u64;
        let random = fastrand::Rng::with_seed(number as u64);
        Self { random, blocks, next: cell.is_sequential().then_some(start), work: cell.work }
    }

    /// The number of a block, and whether to write it.
    fn next(&mut self) -> (u64, bool) {
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
struct Sessions {
    sessions: Vec<Session>,
    payload: Vec<u8>,
    buffer: Vec<u8>,
    requests: u64,
    elapsed: Duration,
    /// Processor time of this thread.
    cpu: Duration,
}

impl Sessions {
    fn connect(cell: &Cell, export: &Export) -> Result<Self, Error> {
        let connect = |number| Session::connect(export, cell, number);
        Ok(Self {
            sessions: (0..cell.sessions).map(connect).collect::<Result<_, Error>>()?,
            // Not zeros, which a server might turn into holes.
            payload: (0..cell.block).map(|i| (i % 251) as u8 + 1).collect(),
            buffer: vec![0; BUFFER_LENGTH],
            requests: 0,
            elapsed: Duration::ZERO,
            cpu: Duration::ZERO,
        })
    }

    /// Runs the load for this time, at most until this number of requests is complete, and leaves
    /// its requests in flight; without a limit, sends no more requests and waits for all replies.
    fn run(&mut self, limit: Option<(Duration, u64)>) -> Result<(), Error> {
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

fn thread_time() -> nix::Result<Duration> {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map(Duration::from)
}

pub(super) fn sample(cell: &Cell, setup: &Setup, server: &Running) -> Result<Sample, Error> {
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
    let cpu_before = usage::cpu_seconds(server.pid);
    sessions.run(Some((setup.options.seconds, requests_max)))?;
    if is_cold {
        // A cached load begins and ends with the same number of requests in flight, a cold load
        // begins with none.
        sessions.run(None)?;
    }
    let server_cpu = usage::cpu_seconds(server.pid) - cpu_before;
    let (requests, elapsed) = (sessions.requests as f64, sessions.elapsed.as_secs_f64());
    Ok(Sample {
        requests_per_sec: requests / elapsed,
        mb_per_sec: requests * f64::from(cell.block) / elapsed / 1e6,
        server_cpu_us_per_request: server_cpu * 1e6 / requests.max(1.0),
        client_busy: sessions.cpu.as_secs_f64() / elapsed,
        rss_peak_mib: usage::memory_kib(server.pid, usage::RSS_PEAK) as f64 / 1024.0,
    })
}

#[cfg(test)]
#[allow(unused)] // See peers.rs.
mod tests {
    use super::super::cells::{Set, Transport};
    use super::super::servers;
    use super::*;
    use std::fs;
    use std::os::unix::net::UnixStream;

    fn cell(work: Work, block: u32) -> Cell {
        Cell { block, work, depth: 8, sessions: 3, ..Set::Default.cells()[0] }
    }

    fn session(cell: &Cell) -> (Session, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (Session::new(Stream::Unix(ours), cell, Picker::new(cell, 8, 0)), theirs)
    }

    fn reply(cookie: u8, error: u8, data: usize) -> Vec<u8> {
        let header = [0x67, 0x44, 0x66, 0x98, 0, 0, 0, error, 0, 0, 0, 0, 0, 0, 0, cookie];
        [&header[..], &vec![7; data]].concat()
    }

    #[test]
    fn replies_are_counted_however_the_stream_is_cut() {
        let stream = [reply(3, 0, 4096), reply(7, 0, 4096), reply(0, 0, 4096)].concat();
        for piece in [1, 7, 16, 4095, 4112, stream.len()] {
            let (mut session, _server) = session(&cell(Work::Read, 4096));
            session.fill(&[]).unwrap();
            let count: u64 = stream.chunks(piece).map(|bytes| session.parse(bytes).unwrap()).sum();
            assert_eq!((count, &session.free[..]), (3, &[3, 7, 0][..]), "in pieces of {piece}");
            assert_eq!(session.parse(&reply(1, 0, 4096)[..4111]).unwrap(), 0);
        }
    }

    #[test]
    fn errors_and_unknown_replies_are_not_counted() {
        for wrong in [reply(3, 5, 0), reply(8, 0, 0), vec![0; 16]] {
            let (mut session, _server) = session(&cell(Work::Write, 16));
            session.fill(&[1; 16]).unwrap();
            assert!(session.parse(&wrong).is_err());
            assert!(session.free.is_empty());
        }
    }

    #[test]
    fn random_blocks_cover_the_disk_and_mixed_requests_are_half_writes() {
        let mut picker = Picker::new(&cell(Work::Mixed, 4096), 16, 0);
        let (mut seen, mut writes) = ([0; 16], 0);
        for _ in 0..16_000 {
            let (block, is_write) = picker.next();
            seen[block as usize] += 1;
            writes += usize::from(is_write);
        }
        assert!(seen.iter().all(|count| (800..1200).contains(count)), "{seen:?}");
        assert!((7000..9000).contains(&writes), "{writes}");
    }

    /// Runs a load on an image of zeros; returns the image.
    fn run(transport: Transport, work: Work, block: u32) -> Vec<u8> {
        let image = tempfile::NamedTempFile::new().unwrap();
        fs::write(image.path(), vec![0; 8 << 20]).unwrap();
        let server = &servers::installed(&["flexnbd".to_owned()], &[]).unwrap()[0];
        let server = Running::start(server, image.path(), transport).unwrap();
        let cell = cell(work, block);
        let mut sessions = Sessions::connect(&cell, &server.export).unwrap();
        sessions.run(Some((Duration::from_secs(600), 300))).unwrap();
        let complete = sessions.requests;
        assert!(complete >= 300 && sessions.cpu <= sessions.elapsed, "{complete}");
        sessions.run(None).unwrap();
        assert_eq!(sessions.requests - complete, (cell.depth * cell.sessions) as u64);
        drop(sessions);
        drop(server);
        fs::read(image.path()).unwrap()
    }

    #[test]
    fn all_requests_are_answered_and_only_writes_reach_the_image() {
        for block in [4 << 10, 1 << 20] {
            assert!(run(Transport::Tcp, Work::Read, block).iter().all(|byte| *byte == 0));
        }
        let image = run(Transport::Unix, Work::Write, 1 << 20);
        let written: Vec<u8> = (0..1 << 20).map(|i| (i % 251) as u8 + 1).collect();
        assert!(image.chunks(1 << 20).all(|block| block == written), "the data differs");
        // Large reads and writes must not block each other.
        run(Transport::Tcp, Work::Mixed, 1 << 20);
    }
}
