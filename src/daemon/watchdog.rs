//! Feeds the service manager's watchdog while every part of the process makes progress; never just
//! because time has passed (sd_watchdog_enabled(3)).
//!
//! Twice in the watchdog's time limit each part that may get stuck gets a health check with a new
//! number. When all parts have answered, the watchdog is fed. A part that does not answer starves
//! it, and the service manager ends the process.

use super::events::ProcessEvent;
use crate::disk::{Disk, SECTOR};
use crate::message_id;
use crate::server::AcceptorHandle;
use crate::sync::lock;
use std::fmt;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};
use tracing::{error, info};

/// Checks for a missing answer per interval.
const LOOKS_PER_INTERVAL: u32 = 8;

/// The parts of the process that may get stuck.
pub(super) struct WatchedParts {
    pub(super) acceptor: AcceptorHandle,
    pub(super) events: Sender<ProcessEvent>,
    /// `None` if the disk may stop answering without a fault of this process or this host.
    pub(super) disk: Option<Arc<Disk>>,
}

/// The health check of one part.
struct HealthCheck {
    /// The part, for people.
    name: &'static str,
    /// Whether the part stops answering when the process closes.
    ends_on_close: bool,
    /// Asks the part to answer with this number; must not block.
    ask: Box<dyn Fn(u64) + Send>,
    /// The last number that the part has answered.
    answered: Box<dyn Fn() -> u64 + Send>,
}

impl fmt::Debug for HealthCheck {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("HealthCheck").field(&self.name).finish()
    }
}

impl HealthCheck {
    fn of_acceptor(acceptor: AcceptorHandle) -> Self {
        let asked = acceptor.clone();
        Self {
            name: "the thread that lets clients in",
            ends_on_close: false,
            ask: Box::new(move |number| asked.probe(number)),
            answered: Box::new(move || acceptor.answered()),
        }
    }

    /// Checks that events are handled. The event loop stores the number of
    /// [`ProcessEvent::HealthCheck`] in `answered`.
    fn of_events(events: Sender<ProcessEvent>, answered: Arc<AtomicU64>) -> Self {
        Self {
            name: "the thread that decides what is to be done",
            ends_on_close: true,
            ask: Box::new(move |number| {
                let _ = events.send(ProcessEvent::HealthCheck(number));
            }),
            answered: Box::new(move || answered.load(Ordering::Acquire)),
        }
    }

    /// Checks that a read of the disk returns, even with an error. The read bypasses the gate,
    /// which may stay closed for long, and takes another sector each time, because the page cache
    /// has the earlier ones.
    fn of_disk(disk: Arc<Disk>) -> io::Result<Self> {
        let (ask, asked) = mpsc::channel::<u64>();
        let answered = Arc::new(AtomicU64::new(0));
        let answer = Arc::clone(&answered);
        thread::Builder::new().name("pulse-disk".into()).spawn(move || {
            while let Ok(number) = asked.recv() {
                let copier = disk.copier();
                // The disk may have moved to another host, and its clients have stayed.
                if !copier.is_remote() {
                    let _ = copier.read(sector(number, disk.size()), &mut [0; SECTOR as usize]);
                }
                answer.store(number, Ordering::Release);
            }
        })?;
        Ok(Self {
            name: "the disk",
            ends_on_close: false,
            ask: Box::new(move |number| {
                // The channel is closed if the thread has panicked; it does not answer then.
                let _ = ask.send(number);
            }),
            answered: Box::new(move || answered.load(Ordering::Acquire)),
        })
    }
}

/// The offset of the sector to read for this number: consecutive numbers are spread over the disk.
fn sector(number: u64, size: u64) -> u64 {
    // 2^64 divided by the golden ratio: multiples of it are far from all earlier ones.
    const STRIDE: u64 = 0x9e37_79b9_7f4a_7c15;
    let sectors = u128::from(size / SECTOR);
    let part = u128::from(number.wrapping_mul(STRIDE));
    // Less than the number of sectors, so that it fits.
    u64::try_from((part * sectors) >> u64::BITS).unwrap_or(0) * SECTOR
}

/// The thread that checks the parts and feeds the watchdog. It ends when this is dropped.
#[derive(Debug)]
pub(super) struct Watchdog {
    closing: Mutex<Sender<()>>,
    /// The last health check that the event loop has answered.
    events_answered: Arc<AtomicU64>,
}

impl Watchdog {
    /// Checks all parts every `interval`, and calls `feed` when they have answered.
    pub(super) fn start(
        parts: WatchedParts,
        interval: Duration,
        feed: Box<dyn Fn() + Send>,
    ) -> io::Result<Self> {
        let events_answered = Arc::new(AtomicU64::new(0));
        let mut checks = vec![
            HealthCheck::of_acceptor(parts.acceptor),
            HealthCheck::of_events(parts.events, Arc::clone(&events_answered)),
        ];
        if let Some(disk) = parts.disk {
            checks.push(HealthCheck::of_disk(disk)?);
        }
        Self::start_checks(checks, events_answered, interval, feed)
    }

    fn start_checks(
        checks: Vec<HealthCheck>,
        events_answered: Arc<AtomicU64>,
        interval: Duration,
        feed: Box<dyn Fn() + Send>,
    ) -> io::Result<Self> {
        let (closing, closed) = mpsc::channel();
        let thread = thread::Builder::new().name("pulse".into());
        thread.spawn(move || run(checks, interval, &feed, &closed))?;
        Ok(Self { closing: Mutex::new(closing), events_answered })
    }

    /// Records the answer of the event loop to [`ProcessEvent::HealthCheck`].
    pub(super) fn answer(&self, number: u64) {
        self.events_answered.store(number, Ordering::Release);
    }

    /// Stops checking the parts that end when the process closes, which has time limits of its own.
    pub(super) fn close(&self) {
        // The channel is closed only if the thread has panicked.
        let _ = lock(&self.closing).send(());
    }
}

fn run(mut checks: Vec<HealthCheck>, interval: Duration, feed: &dyn Fn(), closed: &Receiver<()>) {
    let mut schedule = CheckSchedule::new(interval, Instant::now());
    checks.iter().for_each(|check| (check.ask)(schedule.number));
    loop {
        let timeout = schedule.look_at.saturating_duration_since(Instant::now());
        match closed.recv_timeout(timeout) {
            Ok(()) => checks.retain(|check| !check.ends_on_close),
            Err(RecvTimeoutError::Disconnected) => return,
            Err(RecvTimeoutError::Timeout) => {}
        }
        let late = checks.iter().find(|check| (check.answered)() < schedule.number);
        match schedule.look(Instant::now(), late.is_none()) {
            WatchdogAction::Wait => {}
            WatchdogAction::Feed { was_starving } => {
                feed();
                if was_starving {
                    info!(message_id = message_id::WATCHDOG, "everything makes progress again");
                }
                checks.iter().for_each(|check| (check.ask)(schedule.number));
            }
            WatchdogAction::Starve { is_new } => {
                if let Some(late) = late.filter(|_| is_new) {
                    error!(
                        message_id = message_id::WATCHDOG,
                        "{} has not answered for {} s; not feeding the watchdog until it does",
                        late.name,
                        interval.as_secs()
                    );
                }
            }
        }
    }
}

/// The schedule of health checks, and the decision that their answers lead to. Pure.
#[derive(Clone, Copy, Debug)]
struct CheckSchedule {
    interval: Duration,
    /// The number of the last health check.
    number: u64,
    look_at: Instant,
    is_starving: bool,
}

/// The decision about the watchdog.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum WatchdogAction {
    /// Wait.
    Wait,
    /// Feed it, and send the next health check.
    Feed { was_starving: bool },
    /// Do not feed it, and look for the answer again soon. `is_new`: this is the first time in a
    /// row.
    Starve { is_new: bool },
}

impl CheckSchedule {
    /// The first health check is sent now.
    fn new(interval: Duration, now: Instant) -> Self {
        Self { interval, number: 1, look_at: now + interval, is_starving: false }
    }

    fn look(&mut self, now: Instant, all_answered: bool) -> WatchdogAction {
        if now < self.look_at {
            return WatchdogAction::Wait;
        }
        let was_starving = self.is_starving;
        self.is_starving = !all_answered;
        if all_answered {
            self.number += 1;
            self.look_at = now + self.interval;
            WatchdogAction::Feed { was_starving }
        } else {
            self.look_at = now + self.interval / LOOKS_PER_INTERVAL;
            WatchdogAction::Starve { is_new: !was_starving }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::memory_backend::{BackendCall, FailingBackend, Faults, MemoryBackend};

    const SECOND: Duration = Duration::from_secs(1);
    const TIMEOUT: Duration = Duration::from_secs(20);

    #[test]
    fn watchdog_is_fed_while_all_parts_answer() {
        let start = Instant::now();
        let mut schedule = CheckSchedule::new(8 * SECOND, start);
        assert_eq!(schedule.look(start + 7 * SECOND, true), WatchdogAction::Wait);
        let feed = WatchdogAction::Feed { was_starving: false };
        assert_eq!(schedule.look(start + 8 * SECOND, true), feed);
        assert_eq!((schedule.number, schedule.look_at), (2, start + 16 * SECOND));
    }

    #[test]
    fn a_missing_answer_starves_the_watchdog() {
        let start = Instant::now();
        let mut schedule = CheckSchedule::new(8 * SECOND, start);
        let starve = |is_new| WatchdogAction::Starve { is_new };
        assert_eq!(schedule.look(start + 8 * SECOND, false), starve(true));
        for seconds in 9..16 {
            assert_eq!(schedule.look_at, start + seconds * SECOND, "looks again soon");
            let action = schedule.look(start + seconds * SECOND, false);
            assert_eq!((action, schedule.number), (starve(false), 1));
        }
        let feed = WatchdogAction::Feed { was_starving: true };
        assert_eq!(schedule.look(start + 16 * SECOND, true), feed);
        assert_eq!((schedule.number, schedule.look_at), (2, start + 24 * SECOND));
    }

    /// A check that is answered up to this number.
    fn check(answers_until: u64, ends_on_close: bool) -> HealthCheck {
        let answered = Arc::new(AtomicU64::new(0));
        let answer = Arc::clone(&answered);
        HealthCheck {
            name: "a part",
            ends_on_close,
            ask: Box::new(move |number| answer.store(number.min(answers_until), Ordering::Release)),
            answered: Box::new(move || answered.load(Ordering::Acquire)),
        }
    }

    /// Starts a watchdog; the channel receives one message for each time that it is fed.
    fn start(checks: Vec<HealthCheck>) -> (Watchdog, Receiver<()>) {
        let (sender, fed) = mpsc::channel();
        let feed = Box::new(move || sender.send(()).unwrap_or_default());
        let interval = Duration::from_millis(5);
        (Watchdog::start_checks(checks, Arc::default(), interval, feed).unwrap(), fed)
    }

    #[test]
    fn closing_parts_are_no_longer_checked() {
        let (watchdog, fed) = start(vec![check(u64::MAX, false), check(2, true)]);
        for _ in 0..2 {
            fed.recv_timeout(TIMEOUT).unwrap();
        }
        // One part does not answer the third health check.
        assert!(fed.recv_timeout(Duration::from_millis(50)).is_err());
        watchdog.close();
        for _ in 0..3 {
            fed.recv_timeout(TIMEOUT).unwrap();
        }
    }

    #[test]
    fn a_disk_that_returns_errors_is_healthy() {
        let faults = Arc::new(Faults::default());
        let image = FailingBackend::new(MemoryBackend::new(1 << 20), Arc::clone(&faults));
        let disk = Arc::new(Disk::new(Box::new(image), true));
        // The health check bypasses the closed gate.
        disk.gate().close_and_drain(Instant::now() + TIMEOUT).unwrap();
        let check = HealthCheck::of_disk(Arc::clone(&disk)).unwrap();
        faults.fail_every(BackendCall::Read, nix::libc::EIO);
        let (_watchdog, fed) = start(vec![check]);
        for _ in 0..3 {
            fed.recv_timeout(TIMEOUT).unwrap();
        }
    }

    #[test]
    fn health_checks_read_sectors_all_over_the_disk() {
        let size = 1000 * SECTOR + 100;
        let mut seen: Vec<u64> = (1..=200).map(|number| sector(number, size)).collect();
        assert!(seen.iter().all(|offset| offset + SECTOR <= size && offset % SECTOR == 0));
        seen.sort_unstable();
        seen.dedup();
        assert!(seen.len() > 190, "only {} of 200 are different", seen.len());
        assert_eq!(sector(7, SECTOR), 0);
    }
}
