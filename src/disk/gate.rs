//! Who may touch the disk now: many visits at a time, or nobody while the gate is closed.
//! Knows nothing of disks. Never polls, and takes no lock while the gate is open.
//!
//! Two things keep a closed gate short. Visits are counted by *generation*
//! ([`Gate::turn_generation`]), so that the closer learns, with the gate open, how long visits last.
//! And a closing can *expire* ([`Gate::expire_at`]): the first session that waits longer opens the
//! gate itself, whatever the closer's thread is blocked in.

use super::lane::Bell;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// Set for good once nobody will be let in any more.
const RETIRED: u64 = 1 << 63;
/// Set while the gate is closed.
const CLOSED: u64 = 1 << 62;
/// Tells which of the two generations new visits belong to.
const GENERATION: u64 = 1 << 61;
/// One visit of the one generation, and of the other: each is counted in 30 bits. A session is
/// inside once or a few hundred times, so that there is room for millions of them.
const UNITS: [u64; 2] = [1, 1 << 30];
/// The counts of both generations.
const INSIDE: u64 = (1 << 60) - 1;
/// The count of the first generation.
const INSIDE_FIRST: u64 = (1 << 30) - 1;

/// A gate that many may pass and that can be closed behind the last of them.
#[derive(Debug, Default)]
pub struct Gate {
    /// [`RETIRED`], [`CLOSED`], [`GENERATION`] and the counts. All of it in one word: whoever leaves
    /// last after the gate was closed learns so from the same step with which it leaves.
    state: AtomicU64,
    /// [`CLOSED`] and [`RETIRED`] change only under this lock.
    closing: Mutex<Closing>,
    /// Whoever is waiting to get in waits here.
    opened: Condvar,
    /// Whoever is waiting for the last to leave waits here.
    emptied: Condvar,
}

#[derive(Debug, Default)]
struct Closing {
    /// How many hold the gate closed.
    closers: u32,
    expiry: Expiry,
    /// To be rung when the gate opens, is retired, or is to open earlier by itself.
    bells: Vec<Arc<dyn Bell>>,
}

/// The end of a closing, independent of the closer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Expiry {
    #[default]
    Never,
    At(Instant),
    /// The gate was opened by a session that waited until then.
    Passed,
}

/// Why somebody was not let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoEntry {
    /// The disk is not ours any more and will not come back.
    Gone,
    /// The gate was closed, and the visitor did not want to wait any longer.
    GaveUp,
}

/// The gate could not be closed in time, and is as it was before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StillBusy {
    /// How many had not left.
    pub visits: u64,
}

/// The closing has expired: sessions have been let in since.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Expired;

/// Being inside; dropping it is leaving.
#[derive(Debug)]
pub struct Pass<'a> {
    gate: &'a Gate,
    /// What it counts as: one of [`UNITS`].
    unit: u64,
}

/// The visits inside, of both generations.
fn inside(state: u64) -> u64 {
    (state & INSIDE_FIRST) + ((state & INSIDE) >> 30)
}

/// What a new visit counts as.
fn unit(state: u64) -> u64 {
    UNITS[usize::from(state & GENERATION != 0)]
}

impl Gate {
    /// Goes in, and waits for that as long as the gate is closed.
    ///
    /// `give_up` is asked whenever there is a reason to wait: before waiting at all, and after
    /// each [`Gate::nudge`]. It is called with the gate's lock held and must not use the gate.
    ///
    /// # Errors
    /// [`NoEntry::Gone`] once the gate is retired; [`NoEntry::GaveUp`] when `give_up` said so.
    pub fn enter(&self, give_up: &dyn Fn() -> bool) -> Result<Pass<'_>, NoEntry> {
        match self.enter_if_open()? {
            Some(pass) => Ok(pass),
            None => self.wait_to_enter(give_up),
        }
    }

    /// Goes in if the gate is open, without waiting.
    ///
    /// # Errors
    /// [`NoEntry::Gone`] once the gate is retired.
    pub fn enter_if_open(&self) -> Result<Option<Pass<'_>>, NoEntry> {
        let mut state = self.state.load(Ordering::Relaxed);
        loop {
            if state & RETIRED != 0 {
                return Err(NoEntry::Gone);
            }
            if state & CLOSED != 0 {
                return Ok(None);
            }
            // Acquire: what was done to the disk while the gate was closed comes before this.
            let (success, failure) = (Ordering::Acquire, Ordering::Relaxed);
            let unit = unit(state);
            match self.state.compare_exchange_weak(state, state + unit, success, failure) {
                Ok(_) => return Ok(Some(Pass { gate: self, unit })),
                Err(now) => state = now,
            }
        }
    }

    /// Whether it can be passed now.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.state.load(Ordering::Relaxed) & (CLOSED | RETIRED) == 0
    }

    /// Rings `bell` once when the gate opens or is retired; at once if it is not closed. For a
    /// session that waits for other things besides: it has to call this again at the time that is
    /// returned, at which the closing may expire.
    #[must_use]
    pub fn ring_when_open(&self, bell: &Arc<dyn Bell>) -> Option<Instant> {
        let mut closing = self.lock();
        self.expire(&mut closing);
        let state = self.state.load(Ordering::Relaxed);
        if state & RETIRED != 0 || state & CLOSED == 0 {
            drop(closing);
            bell.ring();
            return None;
        }
        if !closing.bells.iter().any(|other| Arc::ptr_eq(other, bell)) {
            closing.bells.push(Arc::clone(bell));
        }
        match closing.expiry {
            Expiry::At(end) => Some(end),
            Expiry::Never | Expiry::Passed => None,
        }
    }

    /// Makes everybody who is waiting to get in ask again whether to give up. Change what they
    /// look at first, nudge second; then nobody misses it.
    pub fn nudge(&self) {
        drop(self.lock());
        self.opened.notify_all();
    }

    /// Begins a new generation of visits, unless some of the generation before this one are inside
    /// still. Between two calls that returned true every visit has ended that was inside at the
    /// first: none is older than the time from there to the second. The gate stays as it is.
    pub fn turn_generation(&self) -> bool {
        let mut state = self.state.load(Ordering::Relaxed);
        loop {
            let previous = UNITS[usize::from(state & GENERATION == 0)];
            if state & (INSIDE_FIRST * previous) != 0 {
                return false;
            }
            let turned = state ^ GENERATION;
            let (success, failure) = (Ordering::Relaxed, Ordering::Relaxed);
            match self.state.compare_exchange_weak(state, turned, success, failure) {
                Ok(_) => return true,
                Err(now) => state = now,
            }
        }
    }

    /// Lets nobody in from now on and returns when the last has left.
    ///
    /// The gate stays closed until [`Gate::reopen`] has been called as often as this returned
    /// `Ok`, so that two who close it do not open it on each other.
    ///
    /// # Errors
    /// [`StillBusy`] if somebody was still inside at `deadline`; then the gate is open again,
    /// unless somebody else holds it closed.
    pub fn close_and_drain(&self, deadline: Instant) -> Result<(), StillBusy> {
        let mut closing = self.lock();
        closing.closers += 1;
        self.state.fetch_or(CLOSED, Ordering::Relaxed);
        loop {
            // Acquire: what those who left did to the disk comes before what the closer does.
            let visits = inside(self.state.load(Ordering::Acquire));
            if visits == 0 {
                return Ok(());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                self.open_for_one(&mut closing);
                return Err(StillBusy { visits });
            }
            let woken = self.emptied.wait_timeout(closing, left);
            closing = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Sets when the gate, which the caller has closed, opens by itself if it is closed then; none:
    /// it does not, however long it takes. Of all who close the gate only one may use this.
    ///
    /// # Errors
    /// [`Expired`] when that has happened: what was so behind the closed gate is so no more.
    pub fn expire_at(&self, end: Option<Instant>) -> Result<(), Expired> {
        let mut closing = self.lock();
        self.expire(&mut closing);
        if closing.expiry == Expiry::Passed {
            return Err(Expired);
        }
        let before = std::mem::replace(&mut closing.expiry, end.map_or(Expiry::Never, Expiry::At));
        // Those who wait look at the time again by themselves, unless that would be too late.
        let is_earlier = match (before, end) {
            (Expiry::At(before), Some(end)) => end < before,
            (_, end) => end.is_some(),
        };
        if is_earlier {
            self.let_go(&mut closing);
        }
        Ok(())
    }

    /// Undoes one [`Gate::close_and_drain`], and lets everybody in if that was the last.
    pub fn reopen(&self) {
        let mut closing = self.lock();
        let expiry = std::mem::take(&mut closing.expiry);
        if expiry != Expiry::Passed {
            self.open_for_one(&mut closing);
        }
    }

    /// Lets nobody in any more, ever; whoever waits learns that the disk is gone. Those inside
    /// stay until they leave; [`Gate::close_and_drain`] waits for them, before this or after.
    pub fn retire(&self) {
        let mut closing = self.lock();
        self.state.fetch_or(RETIRED, Ordering::Relaxed);
        self.let_go(&mut closing);
    }

    fn wait_to_enter(&self, give_up: &dyn Fn() -> bool) -> Result<Pass<'_>, NoEntry> {
        let mut closing = self.lock();
        loop {
            self.expire(&mut closing);
            // Under the lock, under which alone the gate opens: the news cannot be missed between
            // looking and waiting.
            if let Some(pass) = self.enter_if_open()? {
                return Ok(pass);
            }
            if give_up() {
                return Err(NoEntry::GaveUp);
            }
            closing = match closing.expiry {
                Expiry::At(end) => {
                    let left = end.saturating_duration_since(Instant::now());
                    let woken = self.opened.wait_timeout(closing, left);
                    woken.unwrap_or_else(PoisonError::into_inner).0
                }
                Expiry::Never | Expiry::Passed => {
                    self.opened.wait(closing).unwrap_or_else(PoisonError::into_inner)
                }
            };
        }
    }

    /// Opens a gate whose closing has expired.
    fn expire(&self, closing: &mut MutexGuard<'_, Closing>) {
        if matches!(closing.expiry, Expiry::At(end) if Instant::now() >= end) {
            closing.expiry = Expiry::Passed;
            self.open_for_one(closing);
        }
    }

    fn open_for_one(&self, closing: &mut MutexGuard<'_, Closing>) {
        closing.closers = closing.closers.saturating_sub(1);
        if closing.closers == 0 {
            self.state.fetch_and(!CLOSED, Ordering::Release);
            self.let_go(closing);
        }
    }

    /// Tells everybody who waits to get in to look again.
    fn let_go(&self, closing: &mut MutexGuard<'_, Closing>) {
        self.opened.notify_all();
        closing.bells.drain(..).for_each(|bell| bell.ring());
    }

    /// A panic elsewhere leaves nothing half done under this lock, so that it does not count.
    fn lock(&self) -> MutexGuard<'_, Closing> {
        self.closing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        let before = self.gate.state.fetch_sub(self.unit, Ordering::Release);
        if before & CLOSED != 0 && before & INSIDE == self.unit {
            // The closer holds the lock from looking at the count until it waits; having had the
            // lock, we know that it hears us.
            drop(self.gate.lock());
            self.gate.emptied.notify_all();
        }
    }
}

impl std::fmt::Display for NoEntry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Gone => "the disk is not served here any more",
            Self::GaveUp => "gave up waiting for the disk",
        })
    }
}

impl std::error::Error for NoEntry {}

impl std::fmt::Display for StillBusy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} operations on the disk did not end in time", self.visits)
    }
}

impl std::error::Error for StillBusy {}

impl std::fmt::Display for Expired {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the gate has opened by itself")
    }
}

impl std::error::Error for Expired {}

#[cfg(test)]
mod tests {
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
        let counts = Arc::new(super::super::slow::TestBell::default());
        let bell: Arc<dyn Bell> = Arc::clone(&counts) as _;
        assert_eq!(gate.ring_when_open(&bell), None);
        assert_eq!(counts.count(), 1, "it is open");
        gate.close_and_drain(soon()).unwrap();
        gate.close_and_drain(soon()).unwrap();
        assert_eq!(gate.ring_when_open(&bell), None);
        assert_eq!(gate.ring_when_open(&bell), None);
        gate.reopen();
        assert!(counts.count() == 1 && !gate.is_open());
        gate.reopen();
        assert!(counts.count() == 2 && gate.is_open(), "once for each session");
        gate.close_and_drain(soon()).unwrap();
        let _ = gate.ring_when_open(&bell);
        gate.retire();
        assert!(counts.count() == 3 && !gate.is_open());
        let _ = gate.ring_when_open(&bell);
        assert_eq!(counts.count(), 4);
    }

    #[test]
    fn a_session_with_a_bell_opens_an_expired_gate() {
        let gate = Gate::default();
        let counts = Arc::new(super::super::slow::TestBell::default());
        let bell: Arc<dyn Bell> = Arc::clone(&counts) as _;
        gate.close_and_drain(soon()).unwrap();
        gate.expire_at(None).unwrap();
        assert_eq!(gate.ring_when_open(&bell), None);
        let end = soon();
        gate.expire_at(Some(end)).unwrap();
        assert_eq!(counts.count(), 1, "to look again");
        assert_eq!(gate.ring_when_open(&bell), Some(end));
        gate.expire_at(Some(Instant::now())).unwrap();
        assert_eq!(counts.count(), 2);
        assert_eq!(gate.ring_when_open(&bell), None);
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
}
