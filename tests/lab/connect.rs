//! A client that connects in a loop: handshake, one read, disconnect. Counts every failure.

use crate::session::spawn_client;
use harness::raw::{FIXED_NEWSTYLE, NO_ZEROES, READ, Wire};
use harness::session::{Mode, Request, Session};
use harness::{Endpoint, raw};
use std::io::ErrorKind;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Pause between two connections, which leaves CPU time to other clients.
const PAUSE: Duration = Duration::from_millis(3);

/// Statistics of a client's connections.
#[derive(Clone, Debug, Default)]
pub(crate) struct Connections {
    pub(crate) served: u64,
    /// ECONNREFUSED.
    pub(crate) refused: u64,
    /// The errors of connections that were closed or lost after connecting.
    pub(crate) failed: Vec<String>,
    /// The longest time from connecting to the reply.
    pub(crate) worst: Duration,
}

/// The client, in a thread of its own.
pub(crate) struct Reconnector {
    stop: Arc<AtomicBool>,
    served: Arc<AtomicU64>,
    thread: JoinHandle<Connections>,
}

impl Reconnector {
    pub(crate) fn start(target: &Endpoint) -> Reconnector {
        let (stop, target) = (Arc::new(AtomicBool::new(false)), target.clone());
        let served = Arc::new(AtomicU64::new(0));
        let (stop_requested, count) = (Arc::clone(&stop), Arc::clone(&served));
        let thread = spawn_client(move || {
            let mut connections = Connections::default();
            while !stop_requested.load(Ordering::SeqCst) {
                connections.connect(&target);
                count.store(connections.served, Ordering::SeqCst);
                thread::sleep(PAUSE);
            }
            connections
        });
        Reconnector { stop, served, thread }
    }

    pub(crate) fn served(&self) -> u64 {
        self.served.load(Ordering::SeqCst)
    }

    pub(crate) fn stop(self) -> Connections {
        self.stop.store(true, Ordering::SeqCst);
        self.thread.join().unwrap()
    }
}

impl Connections {
    fn connect(&mut self, target: &Endpoint) {
        let began = Instant::now();
        let wire = match Wire::try_connect(target) {
            Ok(wire) => wire,
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
                self.refused += 1;
                return;
            }
            Err(error) => return self.failed.push(error.to_string()),
        };
        match catch_unwind(AssertUnwindSafe(|| read_one_block(wire))) {
            Ok(()) => self.served += 1,
            Err(panic) => self.failed.push(panic.downcast::<String>().map_or_else(
                |_| "it failed".to_owned(),
                |text| format!("after {:?}: {text}", began.elapsed()),
            )),
        }
        self.worst = self.worst.max(began.elapsed());
    }
}

fn read_one_block(mut wire: Wire) {
    let flags = wire.recv_greeting();
    assert_eq!(flags & 1, 1, "fixed newstyle");
    wire.send(&(FIXED_NEWSTYLE | NO_ZEROES).to_be_bytes());
    let mut session = Session::go(wire, Mode::Simple, None, b"");
    session.ok(Request::new(READ, 0, 512));
    session.wire.send(&raw::encode_request(raw::DISC, 0, 0, 0, 0));
}

/// The result of one connection attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Probe {
    /// The server closed the connection without sending a byte.
    Closed,
    /// ECONNREFUSED.
    Refused,
    /// The server sent its greeting.
    Greeted,
}

/// Connects once.
#[track_caller]
pub(crate) fn probe(target: &Endpoint) -> Probe {
    let Ok(mut wire) = Wire::try_connect(target) else { return Probe::Refused };
    match wire.try_recv(&mut [0; 18]) {
        Ok(0) => Probe::Closed,
        Ok(_) => Probe::Greeted,
        Err(error) if error.kind() == ErrorKind::ConnectionReset => Probe::Closed,
        Err(error) => panic!("neither greeted nor closed: {error}"),
    }
}

/// How long [`serves`] waits for a reply. A source in doubt greets, and replies to nothing.
const SERVE_TIMEOUT: Duration = Duration::from_secs(2);

/// Whether a new client can read from the disk, which a greeting does not promise.
pub(crate) fn serves(target: &Endpoint) -> bool {
    let Ok(wire) = Wire::try_connect(target) else { return false };
    wire.set_read_timeout(SERVE_TIMEOUT);
    catch_unwind(AssertUnwindSafe(|| read_one_block(wire))).is_ok()
}
