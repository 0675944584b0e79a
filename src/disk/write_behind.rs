//! When to start writing back what a session has written, so that a later FLUSH has little to do.
//! Pure: bytes written in, the range to write back out.
//!
//! The kernel leaves written bytes in memory for up to half a minute, and a FLUSH then takes as long
//! as the disk needs for all of them. A session therefore has its writes written back after every
//! [`STEP_BYTES`]; nobody waits for that.

use crate::range::Range;

/// After so many written bytes of one session their write-back is started.
pub const STEP_BYTES: u64 = 8 << 20;

/// What a session has written since its write-back was last started.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct WriteBehind {
    bytes: u64,
    /// From the first byte written to behind the last.
    span: Option<(u64, u64)>,
}

impl WriteBehind {
    /// The session has written `range`. Returns what to start the write-back of, when that is due;
    /// until [`WriteBehind::started`] it stays due.
    pub(super) fn wrote(&mut self, range: Range) -> Option<(u64, u64)> {
        self.bytes += range.length();
        let (start, end) = self.span.unwrap_or((range.offset(), range.end()));
        let span = (start.min(range.offset()), end.max(range.end()));
        self.span = Some(span);
        (self.bytes >= STEP_BYTES).then_some(span)
    }

    /// The write-back has been started, or everything has been made durable.
    pub(super) fn started(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(offset: u64, length: u64) -> Range {
        Range::within(u64::MAX, offset, length).unwrap()
    }

    #[test]
    fn write_back_is_due_after_a_step_and_covers_all_writes() {
        let mut behind = WriteBehind::default();
        assert_eq!(behind.wrote(range(STEP_BYTES, 4096)), None);
        assert_eq!(behind.wrote(range(100, STEP_BYTES - 4097)), None, "a byte less");
        assert_eq!(behind.wrote(range(3 * STEP_BYTES, 1)), Some((100, 3 * STEP_BYTES + 1)));
        assert_eq!(behind.wrote(range(0, 1)), Some((0, 3 * STEP_BYTES + 1)), "not started yet");
        behind.started();
        assert_eq!(behind.wrote(range(7, STEP_BYTES - 1)), None);
        assert_eq!(behind.wrote(range(7, 1)), Some((7, 7 + STEP_BYTES - 1)));
    }

    #[test]
    fn nothing_is_due_after_a_flush() {
        let mut behind = WriteBehind::default();
        behind.wrote(range(0, STEP_BYTES - 1));
        behind.started();
        assert_eq!(behind.wrote(range(0, STEP_BYTES - 1)), None);
    }
}
