//! Whether a session waits for the disk by itself, rather than have what it reads loaded aside.
//! Pure: how long things took is an argument.
//!
//! To have a read loaded costs more than to wait for it, and a long one is loaded best by whoever
//! sends it: the kernel then reads ahead in its own way. But whatever the client asks meanwhile
//! waits as well, and that must not be long. So only a disk is waited for that has been quick in
//! loading; and not once it has been slow, until it has been quick in loading again.

use std::time::Duration;

/// What takes no longer than this is quick, and ...
const QUICK: Duration = Duration::from_millis(1);
/// ... besides as long as it takes at so many bytes a second.
const QUICK_BYTES_PER_SEC: u64 = 256 << 20;
/// How many loads in a row have to be quick.
const ROW: u8 = 8;

/// What a session knows of its disk.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct InlineReads {
    quick: u8,
}

impl InlineReads {
    /// A load took so long, of which so many bytes were under way when it was begun.
    pub(super) fn loaded(&mut self, bytes: u64, took: Duration) {
        self.quick = if is_quick(bytes, took) { self.quick.saturating_add(1) } else { 0 };
    }

    /// So many bytes were waited for so long, in memory or not.
    pub(super) fn waited(&mut self, bytes: u64, took: Duration) {
        if !is_quick(bytes, took) {
            self.quick = 0;
        }
    }

    /// Whether to wait.
    pub(super) fn waits(self) -> bool {
        self.quick >= ROW
    }
}

fn is_quick(bytes: u64, took: Duration) -> bool {
    let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(QUICK_BYTES_PER_SEC);
    took.as_nanos() <= QUICK.as_nanos() + nanos
}

#[cfg(test)]
mod tests {
    use super::*;

    const LATE: Duration = Duration::from_nanos(1_000_001);

    #[test]
    fn only_a_disk_that_was_quick_so_many_times_in_a_row_is_waited_for() {
        let mut patience = InlineReads::default();
        for _ in 0..ROW {
            assert!(!patience.waits());
            patience.loaded(0, QUICK);
        }
        assert!(patience.waits());
        (0..1000).for_each(|_| patience.loaded(0, Duration::ZERO));
        patience.loaded(0, LATE);
        assert!(!patience.waits());
        (1..ROW).for_each(|_| patience.loaded(0, QUICK));
        assert!(!patience.waits());
    }

    #[test]
    fn once_it_was_slow_only_quick_loads_count_and_not_what_may_have_been_in_memory() {
        let mut patience = InlineReads::default();
        (0..ROW).for_each(|_| patience.loaded(0, QUICK));
        patience.waited(0, QUICK);
        assert!(patience.waits());
        patience.waited(0, LATE);
        (0..100).for_each(|_| patience.waited(0, QUICK));
        assert!(!patience.waits());
    }

    #[test]
    fn more_bytes_may_take_longer() {
        let second = Duration::from_secs(1);
        assert!(is_quick(QUICK_BYTES_PER_SEC, second + QUICK));
        assert!(!is_quick(QUICK_BYTES_PER_SEC, second + LATE));
    }
}
