//! Who may touch the disk now: many visits at a time, or nobody while the gate is closed.
//! Knows nothing of disks. Never polls, and takes no lock while the gate is open.
//!
//! Two things keep a closed gate short. Visits are counted by *generation*
//! ([`Gate::turn_generation`]), so that the closer learns, with the gate open, how long visits last.
//! And a closing can *expire* ([`Gate::expire_at`]): the first session that waits longer opens the
//! gate itself, whatever the closer's thread is blocked in.

use super::io_queue::Notifier;
use crate::sync;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
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
    /// The disk is being handed over: see [`Gate::set_parting`].
    parting: AtomicBool,
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
    notifiers: Vec<Arc<dyn Notifier>>,
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
    pub fn notify_when_open(&self, notifier: &Arc<dyn Notifier>) -> Option<Instant> {
        let mut closing = self.lock();
        self.expire(&mut closing);
        let state = self.state.load(Ordering::Relaxed);
        if state & RETIRED != 0 || state & CLOSED == 0 {
            drop(closing);
            notifier.notify();
            return None;
        }
        if !closing.notifiers.iter().any(|other| Arc::ptr_eq(other, notifier)) {
            closing.notifiers.push(Arc::clone(notifier));
        }
        match closing.expiry {
            Expiry::At(end) => Some(end),
            Expiry::Never | Expiry::Passed => None,
        }
    }

    /// Whether a visit is under way.
    #[must_use]
    pub fn is_occupied(&self) -> bool {
        self.state.load(Ordering::Relaxed) & INSIDE != 0
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
            closing = sync::wait_timeout(&self.emptied, closing, left).0;
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

    /// Says whether the disk is being handed over, or may have been: whoever is waiting at the closed
    /// gate goes on waiting, and no new client is admitted, since the disk may be served elsewhere.
    pub fn set_parting(&self, parting: bool) {
        self.parting.store(parting, Ordering::SeqCst);
    }

    /// What was said last.
    #[must_use]
    pub fn is_parting(&self) -> bool {
        self.parting.load(Ordering::SeqCst)
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
                    sync::wait_timeout(&self.opened, closing, left).0
                }
                Expiry::Never | Expiry::Passed => sync::wait(&self.opened, closing),
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
        closing.notifiers.drain(..).for_each(|notifier| notifier.notify());
    }

    fn lock(&self) -> MutexGuard<'_, Closing> {
        sync::lock(&self.closing)
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
mod tests;
