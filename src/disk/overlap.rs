//! Orders overlapping changes of one disk by arrival, across all sessions. Never touches the disk.
//!
//! A change that may take long (a zeroing, a trim, a durable write, a write that has to populate its
//! edges) is registered when it arrives. It may start when no earlier change overlaps it; the earlier
//! one may belong to a session whose client has disconnected. The order is total, so two sessions
//! never wait for each other.
//!
//! A plain write, which the session executes synchronously, only checks whether an overlapping change
//! is in flight: one load of a counter while there is none. That suffices for files, because the
//! kernel serializes writes of the same bytes. On a block device it does not: a delayed write of a dead session
//! could end after a write of a later session, so plain writes are registered there, too.

use super::io_queue::Notifier;
use crate::range::Range;
use crate::sync::atomic::{AtomicUsize, Ordering};
use crate::sync::{self, Mutex, MutexGuard};
use std::collections::BTreeMap;
use std::sync::Arc;

/// The registered changes of one disk.
#[derive(Debug, Default)]
pub(super) struct OverlapTracker {
    /// Registered changes; written only under the lock.
    count: AtomicUsize,
    registered: Mutex<Tracked>,
}

#[derive(Debug, Default)]
struct Tracked {
    next: u64,
    by_arrival: BTreeMap<u64, Pending>,
}

#[derive(Debug)]
struct Pending {
    range: Range,
    /// Wakes the session that the change belongs to.
    owner: Arc<dyn Notifier>,
    /// It has found that it must wait.
    waits: bool,
}

/// A registered change, from its arrival until it completes. Dropping it wakes the sessions whose
/// changes wait for it.
#[derive(Debug)]
pub struct Change<'a> {
    tracker: &'a OverlapTracker,
    number: u64,
    range: Range,
}

impl OverlapTracker {
    /// Registers a change of `range` behind all earlier ones.
    pub(super) fn register(&self, range: Range, owner: &Arc<dyn Notifier>) -> Change<'_> {
        let mut registered = self.lock();
        let number = registered.next;
        registered.next += 1;
        let entry = Pending { range, owner: Arc::clone(owner), waits: false };
        registered.by_arrival.insert(number, entry);
        self.count.store(registered.by_arrival.len(), Ordering::Release);
        Change { tracker: self, number, range }
    }

    /// Whether no registered change overlaps `range`, so that a change executed synchronously need
    /// not be registered.
    pub(super) fn is_clear(&self, range: Range) -> bool {
        if self.count.load(Ordering::Acquire) == 0 {
            return true;
        }
        !self.lock().by_arrival.values().any(|entry| overlap(entry.range, range))
    }

    fn lock(&self) -> MutexGuard<'_, Tracked> {
        sync::lock(&self.registered)
    }
}

impl Change<'_> {
    /// The changed bytes.
    #[must_use]
    pub fn range(&self) -> Range {
        self.range
    }

    /// Whether no earlier change overlaps this one. If one does, its end notifies the owner given at
    /// the registration.
    #[must_use]
    pub fn is_first(&self) -> bool {
        let mut registered = self.tracker.lock();
        let mut earlier = registered.by_arrival.range(..self.number);
        let waits = earlier.any(|(_, entry)| overlap(entry.range, self.range));
        if let Some(entry) = registered.by_arrival.get_mut(&self.number) {
            entry.waits = waits;
        }
        !waits
    }
}

impl Drop for Change<'_> {
    fn drop(&mut self) {
        let mut registered = self.tracker.lock();
        registered.by_arrival.remove(&self.number);
        self.tracker.count.store(registered.by_arrival.len(), Ordering::Release);
        let later = registered.by_arrival.range(self.number..);
        for (_, entry) in later.filter(|(_, entry)| entry.waits && overlap(entry.range, self.range))
        {
            entry.owner.notify();
        }
    }
}

/// Whether two ranges share a byte.
fn overlap(one: Range, other: Range) -> bool {
    one.offset().max(other.offset()) < one.end().min(other.end())
}

#[cfg(test)]
mod tests {
    use super::super::slow_backend::TestNotifier;
    use super::*;
    use proptest::prelude::*;

    const SIZE: u64 = 1 << 20;

    fn range(offset: u64, length: u64) -> Range {
        Range::within(SIZE, offset, length).unwrap()
    }

    fn notifier() -> (Arc<TestNotifier>, Arc<dyn Notifier>) {
        let notifier = Arc::new(TestNotifier::default());
        (Arc::clone(&notifier), notifier)
    }

    #[test]
    fn ranges_overlap_only_when_they_share_a_byte() {
        let changed = range(1000, 10);
        for (offset, length, shares) in
            [(0, 1000, false), (0, 1001, true), (1009, 1, true), (1010, 9, false), (1005, 0, false)]
        {
            assert_eq!(overlap(changed, range(offset, length)), shares, "{length} at {offset}");
            assert_eq!(overlap(range(offset, length), changed), shares, "{length} at {offset}");
        }
    }

    #[test]
    fn a_later_change_waits_and_is_woken_once() {
        let (tracker, (counter, notifier), (other, theirs)) =
            (OverlapTracker::default(), notifier(), notifier());
        let first = tracker.register(range(0, 4096), &theirs);
        let second = tracker.register(range(4095, 10), &notifier);
        let apart = tracker.register(range(8192, 10), &theirs);
        assert!(first.is_first() && !second.is_first() && apart.is_first());
        assert!(!tracker.is_clear(range(0, 1)) && tracker.is_clear(range(5000, 1)));
        drop(apart);
        assert_eq!(counter.count(), 0);
        drop(first);
        assert!(second.is_first() && counter.count() == 1 && other.count() == 0);
        drop(second);
        assert!(tracker.is_clear(range(0, SIZE)));
    }

    #[test]
    fn a_waiting_change_holds_later_ones_in_order() {
        let (tracker, (_, notifier)) = (OverlapTracker::default(), notifier());
        let first = tracker.register(range(0, 100), &notifier);
        let second = tracker.register(range(50, 100), &notifier);
        let third = tracker.register(range(120, 100), &notifier);
        assert!(!second.is_first() && !third.is_first(), "third overlaps only the second");
        drop(second);
        assert!(third.is_first(), "the second was dropped before it started");
        drop(first);
    }

    proptest! {
        #[test]
        fn changes_never_deadlock_and_never_overlap(
            places in prop::collection::vec((0..SIZE - 5000, 1u64..5000), 1..40),
            order in any::<u64>(),
        ) {
            let (tracker, (_, notifier)) = (OverlapTracker::default(), notifier());
            let mut waiting: Vec<_> = places
                .iter()
                .map(|(offset, length)| tracker.register(range(*offset, *length), &notifier))
                .collect();
            let (mut started, mut ended): (Vec<Change<'_>>, Vec<u64>) = (Vec::new(), Vec::new());
            let mut random = order | 1;
            while !waiting.is_empty() || !started.is_empty() {
                let (ready, rest): (Vec<_>, Vec<_>) =
                    waiting.into_iter().partition(Change::is_first);
                waiting = rest;
                for change in ready {
                    prop_assert!(!started.iter().any(|other| overlap(other.range, change.range)));
                    started.push(change);
                }
                prop_assert!(!started.is_empty(), "all changes wait");
                random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let change = started.swap_remove((random >> 33) as usize % started.len());
                let (offset, length) = places[change.number as usize];
                for earlier in (0..change.number).filter(|earlier| !ended.contains(earlier)) {
                    let (at, size) = places[earlier as usize];
                    prop_assert!(!overlap(range(at, size), range(offset, length)));
                }
                ended.push(change.number);
            }
            prop_assert_eq!(tracker.count.load(Ordering::Acquire), 0);
        }
    }
}
