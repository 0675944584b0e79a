//! Feeds the service manager's watchdog for as long as everything makes progress that has to.
//! Never feeds it only because time has passed.
//!
//! Twice as often as the watchdog has to be fed, every part that may get stuck is asked a question
//! with a new number; when all have answered the last one, the watchdog is fed. A part that does
//! not answer starves it, and the service manager ends the process.

use super::ProcessEvent;
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

/// While an answer is missing it is looked for so many times in the time between two questions.
const LOOKS: u32 = 8;

/// A part of the process that has to make progress.
struct HealthCheck {
    /// What it is, for people.
    name: &'static str,
    /// Whether it answers no more once the process is closing.
    is_closed_early: bool,
    /// Asks it; must not wait.
    ask: Box<dyn Fn(u64) + Send>,
    /// The number of the last question that it has answered.
    answered: Box<dyn Fn() -> u64 + Send>,
}

impl fmt::Debug for HealthCheck {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Sign").field(&self.name).finish()
    }
}

impl HealthCheck {
    /// That clients are let in.
    fn of_door(door: AcceptorHandle) -> Self {
        let asked = door.clone();
        Self {
            name: "the thread that lets clients in",
            is_closed_early: false,
            ask: Box::new(move |number| asked.knock(number)),
            answered: Box::new(move || door.answered()),
        }
    }

    /// That events are heard: whoever hears of [`ProcessEvent::Asked`] puts its number into `answered`.
    fn of_events(events: Sender<ProcessEvent>, answered: Arc<AtomicU64>) -> Self {
        Self {
            name: "the thread that decides what is to be done",
            is_closed_early: true,
            ask: Box::new(move |number| {
                // The process is ending already if nobody hears it.
                let _ = events.send(ProcessEvent::Asked(number));
            }),
            answered: Box::new(move || answered.load(Ordering::Acquire)),
        }
    }

    /// That a read of the disk returns, be it with an error. It does not pass the gate, which may
    /// be closed for long. Always another sector, since the kernel has those that it knows.
    ///
    /// # Errors
    /// When there is no thread left.
    fn of_disk(disk: Arc<Disk>) -> io::Result<Self> {
        let (questions, asked) = mpsc::channel::<u64>();
        let answered = Arc::new(AtomicU64::new(0));
        let answer = Arc::clone(&answered);
        thread::Builder::new().name("pulse-disk".into()).spawn(move || {
            while let Ok(number) = asked.recv() {
                let _ = disk.copier().read(sector(number, disk.size()), &mut [0; SECTOR as usize]);
                answer.store(number, Ordering::Release);
            }
        })?;
        Ok(Self {
            name: "the disk",
            is_closed_early: false,
            ask: Box::new(move |number| {
                // Nobody is there if the thread broke down; that is no answer.
                let _ = questions.send(number);
            }),
            answered: Box::new(move || answered.load(Ordering::Acquire)),
        })
    }
}

/// Where to read for the question of this number: all over the disk.
fn sector(number: u64, size: u64) -> u64 {
    // 2^64 over the golden ratio: one number after the other is far from those before.
    const STRIDE: u64 = 0x9e37_79b9_7f4a_7c15;
    let sectors = u128::from(size / SECTOR);
    let part = u128::from(number.wrapping_mul(STRIDE));
    // Less than the number of sectors, so that it fits.
    u64::try_from((part * sectors) >> u64::BITS).unwrap_or(0) * SECTOR
}

/// The thread that asks and feeds; it ends when this is dropped.
#[derive(Debug)]
pub(super) struct Watchdog {
    closing: Mutex<Sender<()>>,
    heard: Arc<AtomicU64>,
}

impl Watchdog {
    /// Begins to ask everybody who matters, every `interval`, and to `feed`.
    ///
    /// # Errors
    /// When there is no thread left.
    pub(super) fn of(
        (disk, door, events): (Arc<Disk>, AcceptorHandle, Sender<ProcessEvent>),
        interval: Duration,
        feed: Box<dyn Fn() + Send>,
    ) -> io::Result<Self> {
        let heard = Arc::new(AtomicU64::new(0));
        let signs = vec![
            HealthCheck::of_door(door),
            HealthCheck::of_events(events, Arc::clone(&heard)),
            HealthCheck::of_disk(disk)?,
        ];
        Self::start(interval, signs, heard, feed)
    }

    fn start(
        interval: Duration,
        signs: Vec<HealthCheck>,
        heard: Arc<AtomicU64>,
        feed: Box<dyn Fn() + Send>,
    ) -> io::Result<Self> {
        let (closing, told) = mpsc::channel();
        let thread = thread::Builder::new().name("pulse".into());
        thread.spawn(move || run(interval, signs, &feed, &told))?;
        Ok(Self { closing: Mutex::new(closing), heard })
    }

    /// [`ProcessEvent::Asked`] was heard.
    pub(super) fn answer(&self, number: u64) {
        self.heard.store(number, Ordering::Release);
    }

    /// From now on no events are heard any more: the process waits for what is limited in time.
    pub(super) fn close(&self) {
        // The other end is gone only if the thread broke down.
        let _ = lock(&self.closing).send(());
    }
}

fn run(interval: Duration, mut signs: Vec<HealthCheck>, feed: &dyn Fn(), told: &Receiver<()>) {
    let mut rounds = CheckSchedule::new(interval, Instant::now());
    signs.iter().for_each(|sign| (sign.ask)(rounds.number));
    loop {
        match told.recv_timeout(rounds.look_at.saturating_duration_since(Instant::now())) {
            Ok(()) => signs.retain(|sign| !sign.is_closed_early),
            Err(RecvTimeoutError::Disconnected) => return,
            Err(RecvTimeoutError::Timeout) => {}
        }
        let late = signs.iter().find(|sign| (sign.answered)() < rounds.number);
        match rounds.look(Instant::now(), late.is_none()) {
            WatchdogAction::Early => {}
            WatchdogAction::Feed { after_all } => {
                feed();
                if after_all {
                    info!(message_id = message_id::WATCHDOG, "everything makes progress again");
                }
                signs.iter().for_each(|sign| (sign.ask)(rounds.number));
            }
            WatchdogAction::Starve { news } => {
                if let Some(late) = late.filter(|_| news) {
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

/// When to ask, and what to make of the answers.
#[derive(Clone, Copy, Debug)]
struct CheckSchedule {
    interval: Duration,
    /// Of the last question.
    number: u64,
    look_at: Instant,
    is_starving: bool,
}

/// What to do about the watchdog.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum WatchdogAction {
    /// Nothing yet.
    Early,
    /// Feed it, and ask the next question.
    Feed {
        /// It was starving.
        after_all: bool,
    },
    /// Do not feed it, but look again soon.
    Starve {
        /// That has just begun.
        news: bool,
    },
}

impl CheckSchedule {
    /// The first question is asked now.
    fn new(interval: Duration, now: Instant) -> Self {
        Self { interval, number: 1, look_at: now + interval, is_starving: false }
    }

    fn look(&mut self, now: Instant, all_answered: bool) -> WatchdogAction {
        if now < self.look_at {
            return WatchdogAction::Early;
        }
        let was_starving = self.is_starving;
        self.is_starving = !all_answered;
        if all_answered {
            self.number += 1;
            self.look_at = now + self.interval;
            WatchdogAction::Feed { after_all: was_starving }
        } else {
            self.look_at = now + self.interval / LOOKS;
            WatchdogAction::Starve { news: !was_starving }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::memory::{FailingBackend, Faults, MemoryBackend, Op};

    const SECOND: Duration = Duration::from_secs(1);
    const PATIENCE: Duration = Duration::from_secs(20);

    #[test]
    fn the_watchdog_is_fed_once_in_an_interval_if_all_have_answered() {
        let start = Instant::now();
        let mut rounds = CheckSchedule::new(8 * SECOND, start);
        assert_eq!(rounds.look(start + 7 * SECOND, true), WatchdogAction::Early);
        assert_eq!(
            rounds.look(start + 8 * SECOND, true),
            WatchdogAction::Feed { after_all: false }
        );
        assert_eq!((rounds.number, rounds.look_at), (2, start + 16 * SECOND));
    }

    #[test]
    fn one_who_does_not_answer_starves_it_and_is_told_of_once() {
        let start = Instant::now();
        let mut rounds = CheckSchedule::new(8 * SECOND, start);
        assert_eq!(rounds.look(start + 8 * SECOND, false), WatchdogAction::Starve { news: true });
        for seconds in 9..16 {
            assert_eq!(rounds.look_at, start + seconds * SECOND, "it is looked for soon");
            let verdict = rounds.look(start + seconds * SECOND, false);
            assert_eq!((verdict, rounds.number), (WatchdogAction::Starve { news: false }, 1));
        }
        assert_eq!(
            rounds.look(start + 16 * SECOND, true),
            WatchdogAction::Feed { after_all: true }
        );
        assert_eq!((rounds.number, rounds.look_at), (2, start + 24 * SECOND));
    }

    /// One that answers what it is asked up to a number.
    fn sign(answers_until: u64, is_closed_early: bool) -> HealthCheck {
        let answered = Arc::new(AtomicU64::new(0));
        let answer = Arc::clone(&answered);
        HealthCheck {
            name: "a sign",
            is_closed_early,
            ask: Box::new(move |number| answer.store(number.min(answers_until), Ordering::Release)),
            answered: Box::new(move || answered.load(Ordering::Acquire)),
        }
    }

    /// A pulse, and what it has fed.
    fn pulse(signs: Vec<HealthCheck>) -> (Watchdog, Receiver<()>) {
        let (fed, feeding) = mpsc::channel();
        let feed = Box::new(move || fed.send(()).unwrap_or_default());
        (Watchdog::start(Duration::from_millis(5), signs, Arc::default(), feed).unwrap(), feeding)
    }

    #[test]
    fn who_answers_no_more_is_left_out_once_the_process_closes() {
        let (pulse, feeding) = pulse(vec![sign(u64::MAX, false), sign(2, true)]);
        for _ in 0..2 {
            feeding.recv_timeout(PATIENCE).unwrap();
        }
        // The third question is not answered by all.
        assert!(feeding.recv_timeout(Duration::from_millis(50)).is_err());
        pulse.close();
        for _ in 0..3 {
            feeding.recv_timeout(PATIENCE).unwrap();
        }
    }

    #[test]
    fn a_disk_that_fails_is_alive() {
        let faults = Arc::new(Faults::default());
        let image = FailingBackend::new(MemoryBackend::new(1 << 20), Arc::clone(&faults));
        let disk = Arc::new(Disk::new(Box::new(image), true));
        // A closed gate keeps nobody from looking.
        disk.gate().close_and_drain(Instant::now() + PATIENCE).unwrap();
        let sign = HealthCheck::of_disk(Arc::clone(&disk)).unwrap();
        faults.fail_every(Op::Read, nix::libc::EIO);
        let (_pulse, feeding) = pulse(vec![sign]);
        for _ in 0..3 {
            feeding.recv_timeout(PATIENCE).unwrap();
        }
    }

    #[test]
    fn questions_are_about_sectors_all_over_the_disk() {
        let size = 1000 * SECTOR + 100;
        let mut seen: Vec<u64> = (1..=200).map(|number| sector(number, size)).collect();
        assert!(seen.iter().all(|offset| offset + SECTOR <= size && offset % SECTOR == 0));
        seen.sort_unstable();
        seen.dedup();
        assert!(seen.len() > 190, "only {} of 200 are different", seen.len());
        assert_eq!(sector(7, SECTOR), 0);
    }
}
