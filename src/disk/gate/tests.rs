//! Who gets in, who waits, and who is told, with real threads.

use super::*;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::Duration;

/// Long enough for any machine; only a defect waits this long.
const PATIENCE: Duration = Duration::from_secs(20);

fn never() -> bool {
    false
}

fn soon() -> Instant {
    Instant::now() + PATIENCE
}

/// Somebody who wants in on a thread of its own; tells when it begins to wait (that is when it
/// first asks whether to give up), and how it ended.
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
fn an_open_gate_lets_everybody_in_at_once() {
    let gate = Gate::default();
    let one = gate.enter(&never).unwrap();
    let two = gate.enter(&never).unwrap();
    drop((one, two));
    assert_eq!(gate.close_and_drain(Instant::now()), Ok(()));
}

#[test]
fn a_closed_gate_makes_a_session_wait_not_end() {
    let gate = Arc::new(Gate::default());
    gate.close_and_drain(soon()).unwrap();
    let (waiting, ended) = visitor(&gate, &Arc::default());
    waiting.recv_timeout(PATIENCE).unwrap();
    assert!(ended.try_recv().is_err());
    gate.reopen();
    assert_eq!(ended.recv_timeout(PATIENCE), Ok(Ok(())));
}

#[test]
fn a_bell_rings_when_the_gate_opens_or_is_retired() {
    let gate = Gate::default();
    let counts = Arc::new(super::super::slow::TestNotifier::default());
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
    assert!(counts.count() == 2 && gate.is_open(), "once for each session");
    gate.close_and_drain(soon()).unwrap();
    let _ = gate.notify_when_open(&notifier);
    gate.retire();
    assert!(counts.count() == 3 && !gate.is_open());
    let _ = gate.notify_when_open(&notifier);
    assert_eq!(counts.count(), 4);
}

#[test]
fn a_session_with_a_bell_opens_an_expired_gate() {
    let gate = Gate::default();
    let counts = Arc::new(super::super::slow::TestNotifier::default());
    let notifier: Arc<dyn Notifier> = Arc::clone(&counts) as _;
    gate.close_and_drain(soon()).unwrap();
    gate.expire_at(None).unwrap();
    assert_eq!(gate.notify_when_open(&notifier), None);
    let end = soon();
    gate.expire_at(Some(end)).unwrap();
    assert_eq!(counts.count(), 1, "to look again");
    assert_eq!(gate.notify_when_open(&notifier), Some(end));
    gate.expire_at(Some(Instant::now())).unwrap();
    assert_eq!(counts.count(), 2);
    assert_eq!(gate.notify_when_open(&notifier), None);
    assert!(counts.count() > 2 && gate.is_open());
    assert_eq!(gate.expire_at(None), Err(Expired));
}

#[test]
fn a_waiting_session_that_is_told_to_stop_gives_up() {
    let gate = Arc::new(Gate::default());
    let stop = Arc::new(AtomicBool::new(false));
    gate.close_and_drain(soon()).unwrap();
    let (waiting, ended) = visitor(&gate, &stop);
    waiting.recv_timeout(PATIENCE).unwrap();
    gate.nudge();
    waiting.recv_timeout(PATIENCE).unwrap();
    assert!(ended.try_recv().is_err(), "a nudge alone is no reason to give up");
    stop.store(true, Ordering::Relaxed);
    gate.nudge();
    assert_eq!(ended.recv_timeout(PATIENCE), Ok(Err(NoEntry::GaveUp)));
}

#[test]
fn nobody_gives_up_at_an_open_gate() {
    assert!(Gate::default().enter(&|| true).is_ok());
}

#[test]
fn a_retired_gate_sends_everybody_away_those_who_wait_too() {
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
fn closing_waits_for_the_last_visit_to_end() {
    let gate = Arc::new(Gate::default());
    let (one, two) = (gate.enter(&never).unwrap(), gate.enter(&never).unwrap());
    let (sender, drained) = mpsc::channel();
    let closer = gate.clone();
    thread::spawn(move || sender.send(closer.close_and_drain(soon())));
    // The gate being closed is seen by a visitor that would rather not wait.
    while gate.enter(&|| true).is_ok() {
        thread::yield_now();
    }
    drop(one);
    assert!(drained.try_recv().is_err());
    drop(two);
    assert_eq!(drained.recv_timeout(PATIENCE), Ok(Ok(())));
}

#[test]
fn a_visit_that_does_not_end_by_the_deadline_opens_the_gate_again() {
    let gate = Gate::default();
    let _inside = gate.enter(&never).unwrap();
    let now = Instant::now();
    assert_eq!(gate.close_and_drain(now), Err(StillBusy { visits: 1 }));
    assert!(gate.enter(&|| true).is_ok());
}

#[test]
fn a_failed_closing_lets_those_in_who_came_to_wait_meanwhile() {
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
fn two_who_close_the_gate_do_not_open_it_on_each_other() {
    let gate = Gate::default();
    gate.close_and_drain(soon()).unwrap();
    gate.close_and_drain(soon()).unwrap();
    gate.reopen();
    assert_eq!(gate.enter(&|| true).map(drop), Err(NoEntry::GaveUp));
    gate.reopen();
    assert!(gate.enter(&|| true).is_ok());
    gate.reopen();
    gate.close_and_drain(soon()).unwrap();
    assert!(gate.enter(&|| true).is_err(), "one reopen too many must not count later");
}

#[test]
fn an_expired_closing_lets_waiting_sessions_in() {
    let gate = Arc::new(Gate::default());
    gate.close_and_drain(soon()).unwrap();
    let (waiting, ended) = visitor(&gate, &Arc::default());
    waiting.recv_timeout(PATIENCE).unwrap();
    // The session waits already, and hears of the end.
    gate.expire_at(Some(Instant::now() + Duration::from_millis(20))).unwrap();
    assert_eq!(ended.recv_timeout(PATIENCE), Ok(Ok(())));
    assert_eq!(gate.expire_at(None), Err(Expired));
    gate.reopen();
    gate.close_and_drain(soon()).unwrap();
    assert_eq!(gate.expire_at(None), Ok(()), "the next closing is a new one");
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
    // It asks once more when the time is over that it was told first.
    waiting.recv_timeout(PATIENCE).unwrap();
    assert!(ended.try_recv().is_err());
    gate.reopen();
    assert_eq!(ended.recv_timeout(PATIENCE), Ok(Ok(())));
}

#[test]
fn an_expiry_opens_the_gate_for_its_own_closer_alone() {
    let gate = Gate::default();
    gate.close_and_drain(soon()).unwrap();
    gate.close_and_drain(soon()).unwrap();
    gate.expire_at(Some(Instant::now())).unwrap();
    assert_eq!(gate.expire_at(None), Err(Expired));
    assert!(gate.enter(&|| true).is_err(), "the other holds it closed");
    gate.reopen();
    gate.reopen();
    assert!(gate.enter(&|| true).is_ok());
}

#[test]
fn a_generation_turns_once_the_one_before_has_left() {
    let gate = Gate::default();
    let old = gate.enter(&never).unwrap();
    assert!(gate.turn_generation(), "nobody was inside before it");
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

/// Visitors in a crowd, and somebody who closes the gate again and again: nobody is inside
/// while it is closed, everybody gets in in the end, and all learn when it is gone.
#[test]
fn in_a_crowd_nobody_is_inside_a_closed_gate_and_no_wake_up_is_lost() {
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
        // Let somebody in before closing again.
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

/// Goes in and out, sometimes leaving slowly and sometimes not wanting to wait, until the gate
/// is gone.
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
