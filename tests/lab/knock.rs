//! A client that connects in a loop: each time it shakes hands, reads a block, and leaves.
//! Never tries again without counting what went wrong.

use crate::session::client;
use harness::raw::{FIXED_NEWSTYLE, NO_ZEROES, READ, Wire};
use harness::session::{Mode, Request, Session};
use harness::{Endpoint, raw};
use std::io::ErrorKind;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Between two connections, so that others get some of the machine.
const PAUSE: Duration = Duration::from_millis(3);

/// How its connections went.
#[derive(Clone, Debug, Default)]
pub(crate) struct Knocks {
    pub(crate) served: u64,
    /// Nobody listened.
    pub(crate) refused: u64,
    /// Closed, or otherwise lost, after connecting: what was said of the first few.
    pub(crate) failed: Vec<String>,
    /// The longest time from connecting to having read.
    pub(crate) worst: Duration,
}

/// One at work.
pub(crate) struct Knocker {
    stop: Arc<AtomicBool>,
    served: Arc<AtomicU64>,
    thread: JoinHandle<Knocks>,
}

impl Knocker {
    pub(crate) fn start(target: &Endpoint) -> Knocker {
        let (stop, target) = (Arc::new(AtomicBool::new(false)), target.clone());
        let served = Arc::new(AtomicU64::new(0));
        let (told, count) = (Arc::clone(&stop), Arc::clone(&served));
        let thread = client(move || {
            let mut knocks = Knocks::default();
            while !told.load(Ordering::SeqCst) {
                knocks.knock(&target);
                count.store(knocks.served, Ordering::SeqCst);
                thread::sleep(PAUSE);
            }
            knocks
        });
        Knocker { stop, served, thread }
    }

    pub(crate) fn served(&self) -> u64 {
        self.served.load(Ordering::SeqCst)
    }

    pub(crate) fn stop(self) -> Knocks {
        self.stop.store(true, Ordering::SeqCst);
        self.thread.join().unwrap()
    }
}

impl Knocks {
    fn knock(&mut self, target: &Endpoint) {
        let began = Instant::now();
        let wire = match Wire::try_connect(target) {
            Ok(wire) => wire,
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
                self.refused += 1;
                return;
            }
            Err(error) => return self.failed.push(error.to_string()),
        };
        match catch_unwind(AssertUnwindSafe(|| visit(wire))) {
            Ok(()) => self.served += 1,
            Err(panic) => self.failed.push(panic.downcast::<String>().map_or_else(
                |_| "it failed".to_owned(),
                |text| format!("after {:?}: {text}", began.elapsed()),
            )),
        }
        self.worst = self.worst.max(began.elapsed());
    }
}

fn visit(mut wire: Wire) {
    let flags = wire.recv_greeting();
    assert_eq!(flags & 1, 1, "fixed newstyle");
    wire.send(&(FIXED_NEWSTYLE | NO_ZEROES).to_be_bytes());
    let mut session = Session::go(wire, Mode::Simple, None, b"");
    session.ok(Request::new(READ, 0, 512));
    session.wire.send(&raw::encode_request(raw::DISC, 0, 0, 0, 0));
}

/// How one connection to a server that refuses went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Turned {
    /// Connected, and closed without a byte.
    Away,
    /// Nobody listened.
    Refused,
    /// Greeted: not refused at all.
    In,
}

/// Connects once and sees what happens.
#[track_caller]
pub(crate) fn try_door(target: &Endpoint) -> Turned {
    let Ok(mut wire) = Wire::try_connect(target) else { return Turned::Refused };
    match wire.try_recv(&mut [0; 18]) {
        Ok(0) => Turned::Away,
        Ok(_) => Turned::In,
        Err(error) if error.kind() == ErrorKind::ConnectionReset => Turned::Away,
        Err(error) => panic!("neither greeted nor closed: {error}"),
    }
}
