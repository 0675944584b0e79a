//! Models of `src/disk/gate.rs`.

use super::Notifier;
use super::gate::{Gate, NoEntry};
use crate::explore::{explore, explore_preempted, far};
use crate::shared::{Bytes, Counter};
use loom::sync::atomic::{AtomicBool, Ordering};
use loom::thread;
use std::sync::Arc;
use std::time::Instant;

fn never() -> bool {
    false
}

#[derive(Debug, Default)]
struct Disk {
    gate: Gate,
    /// The bytes that each of two visitors accesses.
    bytes: [Bytes; 2],
}

impl Disk {
    fn close(&self) {
        self.gate.close_and_drain(far()).unwrap();
    }

    /// Accesses all bytes, as a closer may.
    fn change_all(&self) {
        self.bytes.iter().for_each(Bytes::change);
    }

    /// Changes the visitor's bytes; waits for the gate.
    fn visit(&self, visitor: usize) {
        let pass = self.gate.enter(&never).unwrap();
        self.bytes[visitor].change();
        drop(pass);
    }
}

/// Two visitors and a closer: each changes bytes while the gate is closed or inside it. A deadlock is a
/// visitor that was not woken by the opening, or a closer that was not woken by the last visit.
///
/// Found: `Relaxed` at the entry, at leaving, in the closer's load of the count, and at opening; no
/// notification of `opened` or `emptied`.
pub fn closer_is_alone() {
    explore_preempted(3, || {
        let disk = Arc::new(Disk::default());
        let visitors = [0, 1].map(|visitor| {
            let disk = Arc::clone(&disk);
            thread::spawn(move || disk.visit(visitor))
        });
        disk.close();
        disk.change_all();
        disk.gate.reopen();
        visitors.into_iter().for_each(|visitor| visitor.join().unwrap());
        disk.close();
        disk.change_all();
    });
}

/// A visitor that does not wait: it enters before the closing or after it, or not at all.
///
/// Found: the same orderings; leaving without taking the lock; an entry that does not check `CLOSED`.
pub fn closer_is_alone_without_waiting() {
    explore(|| {
        let disk = Arc::new(Disk::default());
        let visitor = {
            let disk = Arc::clone(&disk);
            thread::spawn(move || {
                if let Some(_pass) = disk.gate.enter_if_open().unwrap() {
                    disk.bytes[0].change();
                }
            })
        };
        disk.close();
        disk.bytes[0].change();
        disk.gate.reopen();
        visitor.join().unwrap();
    });
}

/// The closer waits for visits of both generations; both leave at the same time.
///
/// Found: a last visit that is recognized only in the first generation; no notification of `emptied`;
/// a turn that checks the count of the wrong generation.
pub fn last_visit_wakes_the_closer() {
    explore_preempted(3, || {
        let disk = Arc::new(Disk::default());
        let (gate, pass) = (&disk.gate, disk.gate.enter_if_open().unwrap().unwrap());
        assert!(gate.turn_generation());
        let (entered, is_entered) = (Arc::new(AtomicBool::new(false)), Ordering::Release);
        let visitor = {
            let (disk, entered) = (Arc::clone(&disk), Arc::clone(&entered));
            thread::spawn(move || {
                let pass = disk.gate.enter_if_open().unwrap();
                entered.store(pass.is_some(), is_entered);
                disk.bytes[0].change();
                drop(pass);
            })
        };
        let closer = {
            let disk = Arc::clone(&disk);
            thread::spawn(move || {
                if entered.load(Ordering::Acquire) {
                    disk.close();
                    disk.change_all();
                }
            })
        };
        disk.bytes[1].change();
        drop(pass);
        visitor.join().unwrap();
        closer.join().unwrap();
    });
}

/// Two closers, of which one lets its closing expire: it must open once, and the gate stays closed for
/// the other one, whether a waiting visitor or `reopen` comes first.
///
/// Found: `reopen` of an expired closing that counts as a second opening; an expiry that is not recorded
/// as passed; an opening that ignores other closers.
pub fn expired_closing_opens_once() {
    let past = Instant::now();
    explore_preempted(3, move || {
        let disk = Arc::new(Disk::default());
        disk.close();
        let visitor = {
            let disk = Arc::clone(&disk);
            thread::spawn(move || disk.visit(0))
        };
        let other = {
            let disk = Arc::clone(&disk);
            thread::spawn(move || {
                disk.close();
                disk.change_all();
                disk.gate.reopen();
            })
        };
        disk.gate.expire_at(Some(past)).unwrap();
        disk.gate.reopen();
        visitor.join().unwrap();
        other.join().unwrap();
        assert!(disk.gate.is_open());
    });
}

/// The closer never reopens: the visitor that waits opens the gate itself, once, and the closer learns
/// that.
///
/// Found: an earlier expiry that wakes no waiting visitor.
pub fn new_expiry_wakes_a_waiting_visitor() {
    let past = Instant::now();
    explore(move || {
        let disk = Arc::new(Disk::default());
        disk.close();
        let visitor = {
            let disk = Arc::clone(&disk);
            thread::spawn(move || disk.visit(0))
        };
        disk.change_all();
        disk.gate.expire_at(Some(past)).unwrap();
        visitor.join().unwrap();
        assert!(disk.gate.expire_at(None).is_err());
    });
}

/// A closer that gives up at once opens the gate again for a visitor that has begun to wait.
///
/// Found: a failed closing that leaves the gate closed.
pub fn failed_closing_wakes_waiting_visitors() {
    let past = Instant::now();
    explore(move || {
        let disk = Arc::new(Disk::default());
        let pass = disk.gate.enter_if_open().unwrap().unwrap();
        let visitor = {
            let disk = Arc::clone(&disk);
            thread::spawn(move || disk.visit(0))
        };
        assert!(disk.gate.close_and_drain(past).is_err());
        visitor.join().unwrap();
        drop(pass);
        assert!(!disk.gate.is_occupied());
    });
}

/// A session with other work registers a notifier, and sleeps until it can enter. It is notified once
/// for each registration.
fn enter_when_notified(gate: &Gate, counter: &Arc<Counter>) -> Result<(), NoEntry> {
    let notifier: Arc<dyn Notifier> = Arc::clone(counter) as _;
    let mut registrations = 0;
    loop {
        if gate.enter_if_open()?.is_some() {
            return Ok(());
        }
        registrations += 1;
        let _ = gate.notify_when_open(&notifier);
        counter.wake.wait();
        counter.wake.clear();
        assert_eq!(counter.count(), registrations);
    }
}

/// A session is notified by the first opening after its registration, and by no later one.
///
/// Found: an opening that does not notify, or keeps the notifier; `notify_when_open` that does not notify at once when the
/// gate is open.
pub fn opening_notifies_a_session() {
    explore(|| {
        let disk = Arc::new(Disk::default());
        let counter = Arc::new(Counter::default());
        disk.close();
        let session = {
            let (disk, counter) = (Arc::clone(&disk), Arc::clone(&counter));
            thread::spawn(move || enter_when_notified(&disk.gate, &counter))
        };
        disk.gate.reopen();
        session.join().unwrap().unwrap();
        let before = counter.count();
        disk.close();
        disk.gate.reopen();
        assert_eq!(counter.count(), before);
    });
}

/// A session that sleeps and a visitor that blocks; both are refused.
///
/// Found: retiring that does not notify, or does not wake blocked visitors.
pub fn retiring_refuses_all_that_wait() {
    explore_preempted(3, || {
        let disk = Arc::new(Disk::default());
        disk.close();
        let session = {
            let disk = Arc::clone(&disk);
            thread::spawn(move || enter_when_notified(&disk.gate, &Arc::default()))
        };
        let visitor = {
            let disk = Arc::clone(&disk);
            thread::spawn(move || disk.gate.enter(&never).map(drop))
        };
        disk.gate.retire();
        assert_eq!(session.join().unwrap(), Err(NoEntry::Gone));
        assert_eq!(visitor.join().unwrap(), Err(NoEntry::Gone));
    });
}

/// A visitor at a closed gate stops waiting when its condition has changed before the nudge.
///
/// Found: a nudge that does not take the lock, or does not notify.
pub fn nudge_is_never_missed() {
    explore(|| {
        let disk = Arc::new(Disk::default());
        disk.close();
        let stops = Arc::new(AtomicBool::new(false));
        let visitor = {
            let (disk, stops) = (Arc::clone(&disk), Arc::clone(&stops));
            thread::spawn(move || {
                let give_up = || stops.load(Ordering::Relaxed);
                disk.gate.enter(&give_up).map(drop)
            })
        };
        stops.store(true, Ordering::Relaxed);
        disk.gate.nudge();
        assert_eq!(visitor.join().unwrap(), Err(NoEntry::GaveUp));
    });
}

/// A visit that was inside before a turn has left after the next one.
///
/// Found: a turn that does not check the count of the previous generation.
pub fn visit_ends_between_two_turns() {
    explore(|| {
        let disk = Arc::new(Disk::default());
        let entered = Arc::new(AtomicBool::new(false));
        let visitor = {
            let (disk, entered) = (Arc::clone(&disk), Arc::clone(&entered));
            thread::spawn(move || {
                let pass = disk.gate.enter_if_open().unwrap();
                entered.store(true, Ordering::Release);
                drop(pass);
            })
        };
        let was_inside = entered.load(Ordering::Acquire);
        let turned = disk.gate.turn_generation() && disk.gate.turn_generation();
        if was_inside && turned {
            assert!(!disk.gate.is_occupied());
        }
        visitor.join().unwrap();
        assert!(disk.gate.turn_generation() && disk.gate.turn_generation());
    });
}
