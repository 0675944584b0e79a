//! Sessions that concurrently read and write the same sectors, with many requests in flight, and record
//! all of them. After a lost connection they wait for the next server.

use crate::history::{History, Record, contents};
use crate::requests::{Effect, FIRST_SECTOR, Planned, Requests, SECTORS};
use crate::stamp::SECTOR;
use fastrand::Rng;
use harness::raw::Wire;
use harness::session::{Mode, Reply, Request, Session};
use harness::{Endpoint, TIMEOUT, poll_until, read_at, wait_until};
use std::collections::HashMap;
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::Instant;

/// The modes of the sessions.
const MODES: [Mode; 4] = [Mode::Simple, Mode::Structured, Mode::Extended, Mode::Structured];
/// Limit of the requests in flight of each session.
const DEPTH: usize = 16;

/// Running sessions.
pub(crate) struct Sessions {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<Vec<Record>>>,
    /// When server processes had ended.
    ends: Vec<u64>,
    /// Reads of the image while no process served it.
    images: Vec<Record>,
}

/// Nanoseconds since the beginning of a run. At least 1: the initial content is written at 0.
#[derive(Clone, Copy)]
struct Clock(Instant);

impl Clock {
    fn now(self) -> u64 {
        self.0.elapsed().as_nanos() as u64 + 1
    }
}

struct Shared {
    seed: u64,
    clock: Clock,
    state: Mutex<State>,
}

struct State {
    is_stopping: bool,
    /// Count of servers so far.
    servers: u64,
    /// Where the latest one listens.
    endpoint: Endpoint,
    /// Count of replies of the latest one to each session.
    replies: [u64; MODES.len()],
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }
}

impl Sessions {
    /// Connects to a server, whose sectors all have the value [`crate::requests::INITIAL`].
    pub(crate) fn start(seed: u64, endpoint: &Endpoint) -> Sessions {
        let state = State {
            is_stopping: false,
            servers: 1,
            endpoint: endpoint.clone(),
            replies: [0; MODES.len()],
        };
        let shared =
            Arc::new(Shared { seed, clock: Clock(Instant::now()), state: Mutex::new(state) });
        let start = |number| {
            let client = Client::new(Arc::clone(&shared), number);
            thread::spawn(move || client.run())
        };
        let threads = (0..MODES.len()).map(start).collect();
        Sessions { shared, threads, ends: Vec::new(), images: Vec::new() }
    }

    /// Waits until each session has received so many more replies of the latest server.
    #[track_caller]
    pub(crate) fn wait_for_replies(&self, more: u64) {
        let before = self.shared.state().replies;
        let mut now = before;
        let received = poll_until(TIMEOUT, || {
            now = self.shared.state().replies;
            let all = before.iter().zip(&now).all(|(before, now)| now - before >= more);
            all || self.threads.iter().any(JoinHandle::is_finished)
        });
        assert!(received, "seed {}: {before:?} replies, then {now:?}", self.shared.seed);
    }

    /// Notes that the server process has ended, and reads the image that the next one will serve.
    pub(crate) fn server_ended(&mut self, image: &Path) {
        self.ends.push(self.shared.clock.now());
        self.images.push(read_image(self.shared.seed, self.shared.clock, image));
    }

    /// Continues at the next server, which listens there.
    pub(crate) fn continue_at(&self, endpoint: &Endpoint) {
        let mut state = self.shared.state();
        state.servers += 1;
        state.endpoint = endpoint.clone();
        state.replies = [0; MODES.len()];
    }

    /// Waits for the replies to all requests in flight, ends the sessions and reads the image.
    #[track_caller]
    pub(crate) fn stop(self, image: &Path) -> History {
        let Sessions { shared, threads, ends, images } = self;
        shared.state().is_stopping = true;
        let join = |thread: JoinHandle<_>| {
            thread.join().unwrap_or_else(|_| panic!("a session failed, seed {}", shared.seed))
        };
        let mut records: Vec<Record> = threads.into_iter().flat_map(join).chain(images).collect();
        records.push(read_image(shared.seed, shared.clock, image));
        History { seed: shared.seed, records, ends }
    }
}

/// Reads all sectors of the image directly, while no server changes them.
fn read_image(seed: u64, clock: Clock, image: &Path) -> Record {
    let (effect, sectors) = (Effect::Read, FIRST_SECTOR..FIRST_SECTOR + SECTORS);
    let invoked = clock.now();
    let data = read_at(image, FIRST_SECTOR * SECTOR, (SECTORS * SECTOR) as usize);
    let (responded, contents) = (Some(clock.now()), contents(seed, sectors.clone(), &data));
    Record { session: None, sectors, effect, contents, invoked, responded }
}

/// A request in flight.
struct InFlight {
    effect: Effect,
    sectors: Range<u64>,
    invoked: u64,
}

/// One client, with one session at a time.
struct Client {
    shared: Arc<Shared>,
    number: usize,
    random: Rng,
    requests: Requests,
    records: Vec<Record>,
}

impl Client {
    fn new(shared: Arc<Shared>, number: usize) -> Client {
        let requests = Requests::new(shared.seed, number, MODES.len());
        let random = Rng::with_seed(shared.seed ^ number as u64);
        Client { shared, number, random, requests, records: Vec::new() }
    }

    fn run(mut self) -> Vec<Record> {
        let mut servers = 0;
        while let Some((next, endpoint)) = self.next_server(servers) {
            servers = next;
            let session = Session::open(&endpoint, MODES[self.number]).unwrap();
            let mut in_flight = HashMap::new();
            if let Err(error) = self.use_session(session, servers, &mut in_flight) {
                let is_lost = !matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut);
                assert!(is_lost, "seed {}, session {}: {error}", self.shared.seed, self.number);
                self.record_lost(in_flight);
            }
        }
        self.records
    }

    /// The number and endpoint of the server after the first `servers`; `None` to stop.
    fn next_server(&self, servers: u64) -> Option<(u64, Endpoint)> {
        let mut next = None;
        wait_until("the next server", || {
            let state = self.shared.state();
            if state.is_stopping {
                return true;
            }
            next = (state.servers > servers).then(|| (state.servers, state.endpoint.clone()));
            next.is_some()
        });
        next
    }

    /// Sends requests and receives replies until the sessions are stopped, or returns the error of a lost
    /// connection. The count of requests in flight rises and falls: a request behind few others takes less
    /// time, so that more of the others precede or follow it.
    fn use_session(
        &mut self,
        mut session: Session,
        server: u64,
        in_flight: &mut HashMap<u64, InFlight>,
    ) -> io::Result<()> {
        let mut pending: HashMap<u64, Request> = HashMap::new();
        loop {
            let most = DEPTH >> self.random.usize(..DEPTH.ilog2() as usize + 1);
            while pending.len() < most && !self.shared.state().is_stopping {
                let Planned { request, effect, sectors } = self.requests.next();
                let (cookie, bytes) = session.encode(&request);
                let invoked = self.shared.clock.now();
                in_flight.insert(cookie, InFlight { effect, sectors, invoked });
                pending.insert(cookie, request);
                self.send(&mut session.wire, &bytes)?;
            }
            if pending.is_empty() {
                return Ok(());
            }
            let fewest = self.random.usize(..pending.len());
            while pending.len() > fewest {
                let (cookie, reply) = session.try_recv_reply(&pending)?;
                let responded = self.shared.clock.now();
                let request = pending.remove(&cookie).unwrap();
                assert_eq!(reply.error, 0, "seed {}: {request:?}", self.shared.seed);
                self.record(in_flight.remove(&cookie).unwrap(), &reply, responded);
                self.count_reply(server);
            }
        }
    }

    /// Sends a request, sometimes in two parts, so that a server may stop with a part of it received.
    fn send(&mut self, wire: &mut Wire, bytes: &[u8]) -> io::Result<()> {
        let (begin, end) = match self.random.u8(..8) {
            0 => bytes.split_at(self.random.usize(..bytes.len())),
            _ => (bytes, &[][..]),
        };
        wire.try_send(begin)?;
        if !end.is_empty() {
            thread::yield_now();
            wire.try_send(end)?;
        }
        Ok(())
    }

    fn count_reply(&self, server: u64) {
        let mut state = self.shared.state();
        if state.servers == server {
            state.replies[self.number] += 1;
        }
    }

    fn record(&mut self, answered: InFlight, reply: &Reply, responded: u64) {
        let InFlight { effect, sectors, invoked } = answered;
        let contents = contents(self.shared.seed, sectors.clone(), &reply.data);
        let (session, responded) = (Some(self.number), Some(responded));
        self.records.push(Record { session, sectors, effect, contents, invoked, responded });
    }

    fn record_lost(&mut self, in_flight: HashMap<u64, InFlight>) {
        let session = Some(self.number);
        for InFlight { effect, sectors, invoked } in in_flight.into_values() {
            let (contents, responded) = (Vec::new(), None);
            self.records.push(Record { session, sectors, effect, contents, invoked, responded });
        }
    }
}
