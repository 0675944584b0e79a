//! Whether a session that has nothing else to do waits for the disk by itself.
//! Pure: how long things took is an argument.
//!
//! To have a read loaded aside costs more than to wait for it, and gains nothing while the client
//! waits for that one reply, too. But whatever the client sends meanwhile would wait as well, and
//! that must not be long: so only a disk that has been quick is waited for.

use std::time::Duration;

/// What takes no longer than this is quick.
pub(super) const QUICK: Duration = Duration::from_millis(1);
/// How many loads in a row have to be quick.
const ROW: u8 = 8;
/// Nothing longer is waited for, in bytes: it takes long by itself.
const SHORT: u64 = 32 << 10;

/// What a session knows of its disk.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Patience {
    quick: u8,
}

impl Patience {
    /// A load of so many bytes took so long, be it that it was waited for or done aside.
    pub(super) fn note(&mut self, length: u64, took: Duration) {
        if length <= SHORT {
            self.quick = if took <= QUICK { self.quick.saturating_add(1) } else { 0 };
        }
    }

    /// Whether to wait for so many bytes.
    pub(super) fn waits(self, length: u64) -> bool {
        length <= SHORT && self.quick >= ROW
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_disk_that_was_quick_so_many_times_in_a_row_is_waited_for() {
        let mut patience = Patience::default();
        for _ in 0..ROW {
            assert!(!patience.waits(1));
            patience.note(SHORT, QUICK);
        }
        assert!(patience.waits(1));
        (0..1000).for_each(|_| patience.note(1, Duration::ZERO));
        patience.note(1, QUICK + Duration::from_nanos(1));
        assert!(!patience.waits(1));
        (1..ROW).for_each(|_| patience.note(1, QUICK));
        assert!(!patience.waits(1));
    }

    #[test]
    fn what_is_long_is_not_waited_for_and_says_nothing_of_what_is_short() {
        let mut patience = Patience::default();
        (0..ROW).for_each(|_| patience.note(SHORT + 1, QUICK));
        assert!(!patience.waits(1));
        (0..ROW).for_each(|_| patience.note(1, QUICK));
        patience.note(SHORT + 1, 2 * QUICK);
        assert!(patience.waits(SHORT) && !patience.waits(SHORT + 1));
    }
}
