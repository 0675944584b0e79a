//! Whether a session reads cold data inline, blocking, or loads it by an operation in flight.
//! Pure: durations are arguments.
//!
//! A load by an operation in flight costs more than a blocking read, and defeats the kernel's
//! readahead for long reads. A blocking read, however, delays every request behind it. So a session
//! blocks only on a disk whose last [`QUICK_LOADS_NEEDED`] loads were quick, and after one slow read no
//! more until as many loads in a row were quick again.

use std::time::Duration;

/// A read is quick if it takes at most this long, plus the time for its bytes at ...
const QUICK: Duration = Duration::from_millis(1);
/// ... this rate.
const QUICK_BYTES_PER_SEC: u64 = 256 << 20;
/// How many loads in a row have to be quick before a session blocks.
const QUICK_LOADS_NEEDED: u8 = 8;

/// How fast the disk was for one session.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct InlineReads {
    /// Quick loads in a row.
    quick_loads: u8,
}

impl InlineReads {
    /// A load took this long; `bytes` were being loaded when it began, its own included.
    pub(super) fn record_load(&mut self, bytes: u64, took: Duration) {
        self.quick_loads =
            if is_quick(bytes, took) { self.quick_loads.saturating_add(1) } else { 0 };
    }

    /// A blocking read of so many bytes took this long. They may have been in memory.
    pub(super) fn record_blocking_read(&mut self, bytes: u64, took: Duration) {
        if !is_quick(bytes, took) {
            self.quick_loads = 0;
        }
    }

    /// Whether to block.
    pub(super) fn may_block(self) -> bool {
        self.quick_loads >= QUICK_LOADS_NEEDED
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
    fn a_session_blocks_only_after_enough_quick_loads() {
        let mut inline = InlineReads::default();
        for _ in 0..QUICK_LOADS_NEEDED {
            assert!(!inline.may_block());
            inline.record_load(0, QUICK);
        }
        assert!(inline.may_block());
        (0..1000).for_each(|_| inline.record_load(0, Duration::ZERO));
        inline.record_load(0, LATE);
        assert!(!inline.may_block());
        (1..QUICK_LOADS_NEEDED).for_each(|_| inline.record_load(0, QUICK));
        assert!(!inline.may_block());
    }

    #[test]
    fn after_a_slow_read_only_loads_count() {
        let mut inline = InlineReads::default();
        (0..QUICK_LOADS_NEEDED).for_each(|_| inline.record_load(0, QUICK));
        inline.record_blocking_read(0, QUICK);
        assert!(inline.may_block());
        inline.record_blocking_read(0, LATE);
        (0..100).for_each(|_| inline.record_blocking_read(0, QUICK));
        assert!(!inline.may_block());
    }

    #[test]
    fn longer_reads_may_take_longer() {
        let second = Duration::from_secs(1);
        assert!(is_quick(QUICK_BYTES_PER_SEC, second + QUICK));
        assert!(!is_quick(QUICK_BYTES_PER_SEC, second + LATE));
    }
}
