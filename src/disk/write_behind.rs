//! Decides when to start the write-back of a session's writes, so that a later FLUSH is short.
//! Pure: takes the ranges written, returns the range to write back.
//!
//! The kernel keeps dirty pages in memory for up to half a minute, and a FLUSH waits until all of
//! them are on the disk. A session therefore starts write-back after every [`STEP_BYTES`], and does
//! not wait for it.

use crate::range::Range;

/// Bytes that a session writes before it starts their write-back.
pub const STEP_BYTES: u64 = 8 << 20;

/// The writes of a session since it last started write-back.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct WriteBehind {
    bytes: u64,
    /// From the first byte written to the end of the last.
    span: Option<(u64, u64)>,
}

impl WriteBehind {
    /// Records a write. Returns the span to write back when it is due; it stays due until
    /// [`WriteBehind::started`].
    pub(super) fn wrote(&mut self, range: Range) -> Option<(u64, u64)> {
        self.bytes += range.length();
        let (start, end) = self.span.unwrap_or((range.offset(), range.end()));
        let span = (start.min(range.offset()), end.max(range.end()));
        self.span = Some(span);
        (self.bytes >= STEP_BYTES).then_some(span)
    }

    /// Records that write-back was started, or that a flush made everything durable.
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
        assert_eq!(behind.wrote(range(100, STEP_BYTES - 4097)), None, "due one byte early");
        assert_eq!(behind.wrote(range(3 * STEP_BYTES, 1)), Some((100, 3 * STEP_BYTES + 1)));
        assert_eq!(
            behind.wrote(range(0, 1)),
            Some((0, 3 * STEP_BYTES + 1)),
            "no longer due before its start"
        );
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
