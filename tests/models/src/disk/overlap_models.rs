//! Models of `src/disk/overlap.rs`.

use super::Notifier;
use super::overlap::{Change, OverlapTracker};
use crate::explore::{explore, explore_preempted};
use crate::range::Range;
use crate::shared::{Bytes, Counter};
use loom::thread;
use std::sync::Arc;

#[derive(Debug, Default)]
struct Disk {
    tracker: OverlapTracker,
    /// One for each half of the range.
    bytes: [Bytes; 2],
}

impl Disk {
    /// Registers a change, and executes it once no earlier one overlaps it.
    fn change(&self, range: Range) {
        let counter = Arc::new(Counter::default());
        let notifier: Arc<dyn Notifier> = Arc::clone(&counter) as _;
        self.execute(&self.tracker.register(range, &notifier), &counter);
    }

    fn execute(&self, change: &Change<'_>, counter: &Counter) {
        while !change.is_first() {
            counter.wake.wait();
            counter.wake.clear();
        }
        for (half, bytes) in [0, 1].map(half).iter().zip(&self.bytes) {
            if change.range() == *half || change.range() == whole() {
                bytes.change();
            }
        }
    }
}

fn whole() -> Range {
    Range::whole(4096)
}

fn half(index: u64) -> Range {
    whole().from(index * 2048).until((index + 1) * 2048)
}

/// Two overlapping changes are never executed at once, and the second one is woken.
///
/// Found: `is_first` that is always true, or does not record that it waits; a change that ends without a
/// notification; two changes with the same number.
pub fn overlapping_changes_exclude_each_other() {
    explore(|| {
        let disk = Arc::new(Disk::default());
        let other = {
            let disk = Arc::clone(&disk);
            thread::spawn(move || disk.change(whole()))
        };
        disk.change(whole());
        other.join().unwrap();
        disk.bytes.iter().for_each(Bytes::change);
    });
}

/// A change overlaps two that do not overlap each other, and that may both wait for it.
///
/// Found: the same; an end that notifies only the next change.
pub fn all_waiting_changes_are_woken() {
    explore_preempted(3, || {
        let disk = Arc::new(Disk::default());
        let others = [0, 1].map(|index| {
            let disk = Arc::clone(&disk);
            thread::spawn(move || disk.change(half(index)))
        });
        disk.change(whole());
        others.into_iter().for_each(|other| other.join().unwrap());
    });
}

/// A plain write, which is not registered, comes after a registered change of the same bytes. If it
/// need not wait, that change has ended, and its effects are visible.
///
/// Found: `Relaxed` in the load of `is_clear`, or in the store of a change that ends; a count that
/// becomes zero while a change is registered.
pub fn plain_write_follows_an_earlier_change() {
    explore(|| {
        let (disk, counter) = (Arc::new(Disk::default()), Arc::new(Counter::default()));
        let notifier: Arc<dyn Notifier> = Arc::clone(&counter) as _;
        let change = disk.tracker.register(whole(), &notifier);
        let writer = {
            let disk = Arc::clone(&disk);
            thread::spawn(move || {
                if disk.tracker.is_clear(half(0)) {
                    disk.bytes[0].change();
                }
            })
        };
        disk.execute(&change, &counter);
        drop(change);
        writer.join().unwrap();
    });
}
