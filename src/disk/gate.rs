//! The gate: a barrier that any number of visits may pass, and that a closer drains and keeps closed.
//! Knows nothing about disks. Never polls, and takes no lock while the gate is open.
//!
//! Two mechanisms keep the gate closed only briefly. Visits are counted by *generation*
//! ([`Gate::turn_generation`]), so that the closer learns, while the gate is open, how long visits
//! last. And a closing can *expire* ([`Gate::expire_at`]): the first session that waits longer opens
//! the gate itself, even if the closer's thread is blocked.

use super::io_queue::Notifier;
use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use crate::sync::{self, Condvar, Mutex, MutexGuard};
use std::sync::Arc;
use std::time::Instant;

/// Set for good once the gate is retired.
const RETIRED: u64 = 1 << 63;
/// Set while the gate is closed.
const CLOSED: u64 = 1 << 62;
/// Selects the generation that new visits belong to.
const GENERATION: u64 = 1 << 61;
/// One visit of the first and of the second generation. Each count has 30 bits; a session holds at
/// most a few hundred visits, so there is room for millions of sessions.
const UNITS: [u64; 2] = [1, 1 << 30];
/// The counts of both generations.
const INSIDE: u64 = (1 << 60) - 1;
/// The count of the first generation.
const INSIDE_FIRST: u64 = (1 << 30) - 1;

/// A gate that many visits may pass, and that can be closed and drained.
#[derive(Debug, Default)]
pub struct Gate {
    /// [`RETIRED`], [`CLOSED`], [`GENERATION`] and the counts, in one word: the atomic decrement of a
    /// leaving visit also tells whether it is the last one inside a closed gate.
    state: AtomicU64,
    /// [`CLOSED`] and [`RETIRED`] change only under this lock.
    closing: Mutex<Closing>,
    /// The disk is being handed over: see [`Gate::set_parting`].
    parting: AtomicBool,
    /// For threads that wait to enter.
    opened: Condvar,
    /// For closers that wait for the last visit to leave.
    emptied: Condvar,
}

#[derive(Debug, Default)]
struct Closing {
    /// Closers that hold the gate closed.
    closers: u32,
    expiry: Expiry,
    /// To be notified when the gate opens or is retired, or when its expiry becomes earlier.
    notifiers: Vec<Arc<dyn Notifier>>,
}

/// When a closing ends independently of the closer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Expiry {
    #[default]
    Never,
    At(Instant),
    /// A waiting session opened the gate at that time.
    Passed,
}

/// Why a visit could not enter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoEntry {
    /// The disk is not ours any more and will not come back.
    #[error("the disk is not served here any more")]
    Gone,
    /// The gate was closed, and the caller gave up waiting.
    #[error("gave up waiting for the disk")]
    GaveUp,
}

/// The gate could not be drained in time, and is as it was before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{visits} operations on the disk did not end in time")]
pub struct StillBusy {
    /// Visits that had not left.
    pub visits: u64,
}

/// The closing has expired: sessions may have entered since.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the gate has opened by itself")]
pub struct Expired;

/// Guard of one passage through the gate; dropping it leaves.
#[derive(Debug)]
pub struct Pass<'a> {
    gate: &'a Gate,
    /// The unit it is counted in: one of [`UNITS`].
    unit: u64,
}

/// The visits inside, of both generations.
fn inside(state: u64) -> u64 {
    (state & INSIDE_FIRST) + ((state & INSIDE) >> 30)
}

/// The unit that a new visit is counted in.
fn unit(state: u64) -> u64 {
    UNITS[usize::from(state & GENERATION != 0)]
}

impl Gate {
    /// Enters, blocking while the gate is closed.
    ///
    /// `give_up` is called before each wait and after each [`Gate::nudge`]; if it returns true, the
    /// wait ends. It is called with the gate's lock held and must not use the gate.
    ///
    /// # Errors
    /// [`NoEntry::Gone`] once the gate is retired; [`NoEntry::GaveUp`] if `give_up` returned true.
    pub fn enter(&self, give_up: &dyn Fn() -> bool) -> Result<Pass<'_>, NoEntry> {
        match self.enter_if_open()? {
            Some(pass) => Ok(pass),
            None => self.wait_to_enter(give_up),
        }
    }

    /// Enters if the gate is open, without waiting.
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
            // Acquire: changes made to the disk while the gate was closed happen before this visit.
            let (success, failure) = (Ordering::Acquire, Ordering::Relaxed);
            let unit = unit(state);
            match self.state.compare_exchange_weak(state, state + unit, success, failure) {
                Ok(_) => return Ok(Some(Pass { gate: self, unit })),
                Err(now) => state = now,
            }
        }
    }

    /// Whether the gate can be entered now.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.state.load(Ordering::Relaxed) & (CLOSED | RETIRED) == 0
    }

    /// Notifies once when the gate opens or is retired; at once if it is not closed. For sessions that
    /// wait for several events: they call this again at the returned time, when the closing expires.
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

    /// Whether a visit is inside.
    #[must_use]
    pub fn is_occupied(&self) -> bool {
        self.state.load(Ordering::Relaxed) & INSIDE != 0
    }

    /// Makes all threads that wait to enter call `give_up` again. Change what `give_up` reads before
    /// the call, so that none misses it.
    pub fn nudge(&self) {
        drop(self.lock());
        self.opened.notify_all();
    }

    /// Begins a new generation of visits; returns false if visits of the previous generation are
    /// still inside. Every visit that was inside at one successful call has left by the next one, so
    /// no visit inside is older than the time between the two. Neither opens nor closes the gate.
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

    /// Closes the gate and blocks until the last visit has left.
    ///
    /// The gate stays closed until [`Gate::reopen`] has been called as often as this returned
    /// `Ok`, so that two closers are independent.
    ///
    /// # Errors
    /// [`StillBusy`] if a visit was still inside at `deadline`; then the gate is open again, unless
    /// another closer holds it closed.
    pub fn close_and_drain(&self, deadline: Instant) -> Result<(), StillBusy> {
        let mut closing = self.lock();
        closing.closers += 1;
        self.state.fetch_or(CLOSED, Ordering::Relaxed);
        loop {
            // Acquire: changes by visits that have left happen before the closer's accesses.
            let visits = inside(self.state.load(Ordering::Acquire));
            if visits == 0 {
                return Ok(());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                self.open_for_one_closer(&mut closing);
                return Err(StillBusy { visits });
            }
            closing = sync::wait_timeout(&self.emptied, closing, left).0;
        }
    }

    /// Begins to close the gate, as [`Gate::close_and_drain`] does before it waits. [`Gate::reopen`] undoes it.
    #[cfg(test)]
    pub(crate) fn begin_to_close(&self) {
        let mut closing = self.lock();
        closing.closers += 1;
        self.state.fetch_or(CLOSED, Ordering::Relaxed);
    }

    /// Sets when the gate, which the caller has closed, opens by itself; `None` for never. Only one
    /// of several closers may use this.
    ///
    /// # Errors
    /// [`Expired`] if the gate has opened: the disk may have changed since.
    pub fn expire_at(&self, end: Option<Instant>) -> Result<(), Expired> {
        let mut closing = self.lock();
        self.expire(&mut closing);
        if closing.expiry == Expiry::Passed {
            return Err(Expired);
        }
        let before = std::mem::replace(&mut closing.expiry, end.map_or(Expiry::Never, Expiry::At));
        // Waiting threads read the expiry again when the old one has passed; wake them if that is
        // too late.
        let is_earlier = match (before, end) {
            (Expiry::At(before), Some(end)) => end < before,
            (_, end) => end.is_some(),
        };
        if is_earlier {
            self.wake_waiters(&mut closing);
        }
        Ok(())
    }

    /// Sets whether the disk is being handed over, or may have been. Sessions at the closed gate then
    /// keep waiting, and no new client is admitted, because another host may serve the disk.
    pub fn set_parting(&self, parting: bool) {
        self.parting.store(parting, Ordering::SeqCst);
    }

    /// The last value set by [`Gate::set_parting`].
    #[must_use]
    pub fn is_parting(&self) -> bool {
        self.parting.load(Ordering::SeqCst)
    }

    /// Undoes one [`Gate::close_and_drain`], and opens the gate if no other closer holds it.
    pub fn reopen(&self) {
        let mut closing = self.lock();
        let expiry = std::mem::take(&mut closing.expiry);
        if expiry != Expiry::Passed {
            self.open_for_one_closer(&mut closing);
        }
    }

    /// Calls `change` if the gate is closed and no visit is inside, and keeps it closed meanwhile. Returns
    /// `None`, without the call, if the gate is open or is about to open by itself.
    pub fn run_closed<R>(&self, change: impl FnOnce() -> R) -> Option<R> {
        let mut closing = self.lock();
        self.expire(&mut closing);
        let state = self.state.load(Ordering::Acquire);
        (state & CLOSED != 0 && inside(state) == 0).then(change)
    }

    /// Refuses all entry for good, also to waiting threads ([`NoEntry::Gone`]). Visits inside stay
    /// until they leave; [`Gate::close_and_drain`] waits for them, before or after this.
    pub fn retire(&self) {
        let mut closing = self.lock();
        self.state.fetch_or(RETIRED, Ordering::Relaxed);
        self.wake_waiters(&mut closing);
    }

    fn wait_to_enter(&self, give_up: &dyn Fn() -> bool) -> Result<Pass<'_>, NoEntry> {
        let mut closing = self.lock();
        loop {
            self.expire(&mut closing);
            // The gate opens only under the lock, so no wake-up is lost between this check and the
            // wait.
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

    /// Opens the gate if its closing has expired.
    fn expire(&self, closing: &mut MutexGuard<'_, Closing>) {
        if matches!(closing.expiry, Expiry::At(end) if Instant::now() >= end) {
            closing.expiry = Expiry::Passed;
            self.open_for_one_closer(closing);
        }
    }

    fn open_for_one_closer(&self, closing: &mut MutexGuard<'_, Closing>) {
        closing.closers = closing.closers.saturating_sub(1);
        if closing.closers == 0 {
            self.state.fetch_and(!CLOSED, Ordering::Release);
            self.wake_waiters(closing);
        }
    }

    /// Wakes all sessions that wait to enter.
    fn wake_waiters(&self, closing: &mut MutexGuard<'_, Closing>) {
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
            // The closer holds the lock from reading the count until it waits. Taking the lock once
            // ensures that it is waiting, and receives the notification.
            drop(self.gate.lock());
            self.gate.emptied.notify_all();
        }
    }
}

#[cfg(test)]
mod tests;
