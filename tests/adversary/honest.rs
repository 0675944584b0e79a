//! The honest client beside the adversary: it verifies every byte, and measures every answer.

use crate::requests::SIZE;
use harness::raw::{FLUSH, READ};
use harness::session::{Mode, Request, Session};
use harness::{Endpoint, KIB, MIB, noise};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// No answer takes longer. Far more than one takes on a loaded machine with two processors, and far less
/// than the shortest time for which a stalled peer may hold anything (`HANDSHAKE_TIMEOUT`).
pub(crate) const LATENCY_MAX: Duration = Duration::from_secs(2);
/// The honest client's part of the disk.
const SPAN: u64 = 4 * MIB;
const BLOCK: u64 = 16 * KIB;
/// Requests between two connections.
const PER_SESSION: usize = 200;

/// What the honest client saw.
#[derive(Debug, Default)]
pub(crate) struct Observed {
    pub(crate) requests: usize,
    pub(crate) sessions: usize,
    pub(crate) longest: Duration,
}

impl Observed {
    fn time<T>(&mut self, action: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let result = action();
        self.longest = self.longest.max(start.elapsed());
        result
    }
}

fn open(endpoint: &Endpoint, is_oldstyle: bool) -> Session {
    if is_oldstyle {
        Session::open_oldstyle(endpoint)
    } else {
        Session::open(endpoint, Mode::Structured).unwrap()
    }
}

/// Writes, reads, flushes and connects again until `is_over`; then compares its whole part of the disk, and
/// the part that no client writes.
pub(crate) fn serve_honestly(
    endpoint: &Endpoint,
    is_oldstyle: bool,
    is_over: &AtomicBool,
) -> Observed {
    let mut observed = Observed::default();
    let mut random = fastrand::Rng::with_seed(1);
    let mut content = vec![0; SPAN as usize];
    let mut session = observed.time(|| open(endpoint, is_oldstyle));
    while !is_over.load(Ordering::Relaxed) {
        observed.requests += 1;
        let offset = random.u64(..SPAN / BLOCK) * BLOCK;
        let place = offset as usize..(offset + BLOCK) as usize;
        match random.u8(..8) {
            0..4 => {
                let data = noise(BLOCK as usize, random.u64(..));
                content[place].copy_from_slice(&data);
                observed.time(|| session.ok(Request::write(offset, &data)));
            }
            4..7 => {
                let data = observed.time(|| session.read(offset, BLOCK));
                assert!(data == content[place], "wrong bytes at {offset}");
            }
            _ => drop(observed.time(|| session.ok(Request::new(FLUSH, 0, 0)))),
        }
        if observed.requests.is_multiple_of(PER_SESSION) {
            observed.sessions += 1;
            session = observed.time(|| open(endpoint, is_oldstyle));
        }
    }
    for offset in (0..SPAN).step_by(MIB as usize) {
        let data = session.ok(Request::new(READ, offset, MIB)).data;
        assert!(data == content[offset as usize..][..MIB as usize], "wrong bytes at {offset}");
    }
    assert!(session.read(SPAN, SIZE / 2 - SPAN).iter().all(|byte| *byte == 0));
    observed
}
