//! Entering, waiting, closing and waking, with real threads.

use super::*;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::Duration;

/// Deadline that only a defect reaches.
const PATIENCE: Duration = Duration::from_secs(20);

fn never() -> bool {
    false
}

fn soon() -> Instant {
    Instant::now() + PATIENCE
}

/// A thread that enters the gate. The first channel gets a message each time it is about to wait,
/// that is, when it calls `give_up`; the second gets its result.
fn visitor(
    gate: &Arc<Gate>,
    give_up: &Arc<AtomicBool>,
) -> (Receiver<()>, Receiver<Result<(), NoEntry>>) {
    let (waits, waiting) = mpsc::channel();
    let (ends, ended) = mpsc::channel();
    let (gate, give_up) = (gate.clone(), give_up.clone());
    thread::spawn(move || {
        let asked = || {
            let _ = waits.send(());
            give_up.load(Ordering::Relaxed)
        };
        let _ = ends.send(gate.enter(&asked).map(drop));
    });
    (waiting, ended)
}

#[test]
fn an_open_gate_admits_visits_at_once() {
    let gate = Gate::default();
    let one = gate.enter(&never).unwrap();
    let two = gate.enter(&never).unwrap();
    drop((one, two));
    assert_eq!(gate.close_and_drain(Instant::now()), Ok(()));
}

#[test]
fn a_closed_gate_blocks_a_session_until_it_opens() {
    let gate = Arc::new(Gate::default());
    gate.close_and_drain(soon()).unwrap();
    let (waiting, ended) = visitor(&gate, &Arc::default());
    waiting.recv_timeout(PATIENCE).unwrap();
    assert!(ended.try_recv().is_err());
    gate.reopen();
    assert_eq!(ended.recv_timeout(PATIENCE), Ok(Ok(())));
}

#[test]
fn a_notifier_fires_when_the_gate_opens_or_retires() {
    let gate = Gate::default();
    let counts = Arc::new(super::super::slow_backend::TestNotifier::default());
    let notifier: Arc<dyn Notifier> = Arc::clone(&counts) as _;
    assert_eq!(gate.notify_when_open(&notifier), None);
    assert_eq!(counts.count(), 1, "it is open");
    gate.close_and_drain(soon()).unwrap();
    gate.close_and_drain(soon()).unwrap();
    assert_eq!(gate.notify_when_open(&notifier), None);
    assert_eq!(gate.notify_when_open(&notifier), None);
    gate.reopen();
    assert!(counts.count() == 1 && !gate.is_open());
    gate.reopen();
    assert!(counts.count() == 2 && gate.is_open(), "one notification for each notifier");
    gate.close_and_drain(soon()).unwrap();
    let _ = gate.notify_when_open(&notifier);
    gate.retire();
    assert!(counts.count() == 3 && !gate.is_open());
    let _ = gate.notify_when_open(&notifier);
    assert_eq!(counts.count(), 4);
}

#[test]
fn a_session_with_a_notifier_opens_an_expired_gate() {
    let gate = Gate::default();
    let counts = Arc::new(super::super::slow_backend::TestNotifier::default());
    let notifier: Arc<dyn Notifier> = Arc::clone(&counts) as _;
    gate.close_and_drain(soon()).unwrap();
    gate.expire_at(None).unwrap();
    assert_eq!(gate.notify_when_open(&notifier), None);
    let end = soon();
    gate.expire_at(Some(end)).unwrap();
    assert_eq!(counts.count(), 1, "woken to read the expiry again");
    assert_eq!(gate.notify_when_open(&notifier), Some(end));
    gate.expire_at(Some(Instant::now())).unwrap();
    assert_eq!(counts.count(), 2);
    assert_eq!(gate.notify_when_open(&notifier), None);
    assert!(counts.count() > 2 && gate.is_open());
    assert_eq!(gate.expire_at(None), Err(Expired));
}

#[test]
fn a_waiting_session_gives_up_only_when_asked() {
    let gate = Arc::new(Gate::default());
    let stop = Arc::new(AtomicBool::new(false));
    gate.close_and_drain(soon()).unwrap();
    let (waiting, ended) = visitor(&gate, &stop);
    waiting.recv_timeout(PATIENCE).unwrap();
    gate.nudge();
    waiting.recv_timeout(PATIENCE).unwrap();
    assert!(ended.try_recv().is_err(), "a nudge alone ends no wait");
    stop.store(true, Ordering::Relaxed);
    gate.nudge();
    assert_eq!(ended.recv_timeout(PATIENCE), Ok(Err(NoEntry::GaveUp)));
}

#[test]
fn an_open_gate_ignores_give_up() {
    assert!(Gate::default().enter(&|| true).is_ok());
}

#[test]
fn a_retired_gate_refuses_new_and_waiting_sessions() {
    let gate = Arc::new(Gate::default());
    gate.close_and_drain(soon()).unwrap();
    let (waiting, ended) = visitor(&gate, &Arc::default());
    waiting.recv_timeout(PATIENCE).unwrap();
    gate.retire();
    assert_eq!(ended.recv_timeout(PATIENCE), Ok(Err(NoEntry::Gone)));
    gate.reopen();
    assert_eq!(gate.enter(&never).map(drop), Err(NoEntry::Gone));
}

#[test]
fn closing_waits_for_the_last_visit() {
    let gate = Arc::new(Gate::default());
    let (one, two) = (gate.enter(&never).unwrap(), gate.enter(&never).unwrap());
    let (sender, drained) = mpsc::channel();
    let closer = gate.clone();
    thread::spawn(move || sender.send(closer.close_and_drain(soon())));
    // Wait until the gate is closed.
    while gate.enter(&|| true).is_ok() {
        thread::yield_now();
    }
    drop(one);
    assert!(drained.try_recv().is_err());
    drop(two);
    assert_eq!(drained.recv_timeout(PATIENCE), Ok(Ok(())));
}

#[test]
fn a_visit_beyond_the_deadline_reopens_the_gate() {
    let gate = Gate::default();
    let _inside = gate.enter(&never).unwrap();
    let now = Instant::now();
    assert_eq!(gate.close_and_drain(now), Err(StillBusy { visits: 1 }));
    assert!(gate.enter(&|| true).is_ok());
}

#[test]
fn a_failed_closing_admits_waiting_sessions() {
    let gate = Arc::new(Gate::default());
    let inside = gate.enter(&never).unwrap();
    let (sender, drained) = mpsc::channel();
    let closer = gate.clone();
    let deadline = Instant::now() + Duration::from_millis(50);
    thread::spawn(move || sender.send(closer.close_and_drain(deadline)));
    let (_waiting, ended) = visitor(&gate, &Arc::default());
    assert_eq!(ended.recv_timeout(PATIENCE), Ok(Ok(())));
    assert!(matches!(drained.recv_timeout(PATIENCE), Ok(Err(StillBusy { .. }))));
    drop(inside);
}

#[test]
fn the_gate_stays_closed_until_every_closer_reopens_it() {
    let gate = Gate::default();
    gate.close_and_drain(soon()).unwrap();
    gate.close_and_drain(soon()).unwrap();
    gate.reopen();
    assert_eq!(gate.enter(&|| true).map(drop), Err(NoEntry::GaveUp));
    gate.reopen();
    assert!(gate.enter(&|| true).is_ok());
    gate.reopen();
    gate.close_and_drain(soon()).unwrap();
    assert!(gate.enter(&|| true).is_err(), "a surplus reopen must not count later");
}

#[test]
fn an_expired_closing_admits_waiting_sessions() {
    let gate = Arc::new(Gate::default());
    gate.close_and_drain(soon()).unwrap();
    let (waiting, ended) = visitor(&gate, &Arc::default());
    waiting.recv_timeout(PATIENCE).unwrap();
    // The session waits already, and is woken to read the expiry.
    gate.expire_at(Some(Instant::now() + Duration::from_millis(20))).unwrap();
    assert_eq!(ended.recv_timeout(PATIENCE), Ok(Ok(())));
    assert_eq!(gate.expire_at(None), Err(Expired));
    gate.reopen();
    gate.close_and_drain(soon()).unwrap();
    assert_eq!(gate.expire_at(None), Ok(()), "the next closing starts without an expiry");
    assert!(gate.enter(&|| true).is_err());
}

#[test]
fn a_closing_expires_even_if_no_session_waits() {
    let gate = Gate::default();
    gate.close_and_drain(soon()).unwrap();
    gate.expire_at(Some(Instant::now())).unwrap();
    assert_eq!(gate.expire_at(Some(soon())), Err(Expired));
    assert!(gate.enter(&|| true).is_ok());
    gate.reopen();
    assert!(gate.enter(&|| true).is_ok());
}

#[test]
fn a_closing_made_permanent_does_not_expire() {
    let gate = Arc::new(Gate::default());
    gate.close_and_drain(soon()).unwrap();
    gate.expire_at(Some(Instant::now() + Duration::from_millis(100))).unwrap();
    let (waiting, ended) = visitor(&gate, &Arc::default());
    waiting.recv_timeout(PATIENCE).unwrap();
    gate.expire_at(None).unwrap();
    // It calls give_up once more when the first expiry has passed.
    waiting.recv_timeout(PATIENCE).unwrap();
    assert!(ended.try_recv().is_err());
    gate.reopen();
    assert_eq!(ended.recv_timeout(PATIENCE), Ok(Ok(())));
}

#[test]
fn an_expiry_ends_only_its_own_closing() {
    let gate = Gate::default();
    gate.close_and_drain(soon()).unwrap();
    gate.close_and_drain(soon()).unwrap();
    gate.expire_at(Some(Instant::now())).unwrap();
    assert_eq!(gate.expire_at(None), Err(Expired));
    assert!(gate.enter(&|| true).is_err(), "the other closer holds it closed");
    gate.reopen();
    gate.reopen();
    assert!(gate.enter(&|| true).is_ok());
}

#[test]
fn a_generation_turns_once_the_previous_one_left() {
    let gate = Gate::default();
    let old = gate.enter(&never).unwrap();
    assert!(gate.turn_generation(), "no visit of an earlier generation is inside");
    let new = gate.enter(&never).unwrap();
    assert!(!gate.turn_generation());
    drop(old);
    assert!(gate.turn_generation());
    assert!(!gate.turn_generation());
    let newest = gate.enter(&never).unwrap();
    assert_eq!(gate.close_and_drain(Instant::now()), Err(StillBusy { visits: 2 }));
    drop((new, newest));
    assert_eq!(gate.close_and_drain(Instant::now()), Ok(()));
    assert!(gate.turn_generation());
}

/// Many visitors, and a closer that closes the gate again and again: no visit is inside while it is
/// closed, every visitor enters eventually, and all of them end when the gate is retired.
#[test]
fn crowds_are_kept_out_and_lose_no_wake_up() {
    const VISITORS: usize = 12;
    const CLOSINGS: u64 = 300;
    let (gate, inside) = (Arc::new(Gate::default()), Arc::new(AtomicU64::new(0)));
    let (sender, ended) = mpsc::channel();
    for seed in 1..=VISITORS {
        let (gate, inside, sender) = (gate.clone(), inside.clone(), sender.clone());
        thread::spawn(move || sender.send(visit_until_gone(&gate, &inside, seed as u64)));
    }
    for closing in 0..CLOSINGS {
        gate.turn_generation();
        gate.close_and_drain(soon()).unwrap();
        for _ in 0..closing % 8 {
            assert_eq!(inside.load(Ordering::Relaxed), 0, "closing {closing}");
            thread::yield_now();
        }
        gate.reopen();
        // Let a visitor enter before closing again.
        drop(gate.enter(&never).unwrap());
        thread::yield_now();
    }
    gate.retire();
    for _ in 0..VISITORS {
        assert_eq!(ended.recv_timeout(PATIENCE), Ok(NoEntry::Gone));
    }
    gate.close_and_drain(soon()).unwrap();
    assert_eq!(inside.load(Ordering::Relaxed), 0);
}

/// Enters and leaves until the gate is retired, sometimes slowly, sometimes without waiting.
fn visit_until_gone(gate: &Gate, inside: &AtomicU64, seed: u64) -> NoEntry {
    let mut random = seed;
    loop {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let impatient = random >> 61 == 0;
        match gate.enter(&|| impatient) {
            Ok(_pass) => {
                inside.fetch_add(1, Ordering::Relaxed);
                (0..random >> 60).for_each(|_| thread::yield_now());
                inside.fetch_sub(1, Ordering::Relaxed);
            }
            Err(NoEntry::GaveUp) => thread::yield_now(),
            Err(NoEntry::Gone) => return NoEntry::Gone,
        }
    }
}
