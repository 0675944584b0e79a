//! BLOCK_STATUS: the extents are looked up at once, or by an operation in flight where that may take long.

use super::{Blocked, Engine, Step};
use crate::disk::{Op, Returned};
use crate::nbd::reply::ReplyTo;
use crate::nbd::request::Request;
use crate::range::Range;
use crate::server::end::SessionEnd;
use crate::server::session::disk_io::Tag;

/// The most extents in one reply; the client asks again for the rest. The specification allows 2^20,
/// which would take 16 MiB.
pub(super) const EXTENTS_MAX: usize = 16 << 10;

impl Engine<'_> {
    /// Begins a BLOCK_STATUS; with `one` the reply has a single extent (`NBD_CMD_FLAG_REQ_ONE`).
    pub(super) fn block_status(
        &mut self,
        to: ReplyTo,
        range: Range,
        one: bool,
    ) -> Result<Step, SessionEnd> {
        let request = Request::BlockStatus { range, one };
        let limit = if one { 1 } else { EXTENTS_MAX };
        let visit = match self.io.visit()? {
            Ok(visit) => visit,
            Err(busy) => return Ok(busy.into()),
        };
        if visit.extents_wait() {
            let op = Op::Extents { range, limit, found: Vec::new() };
            if !self.io.has_room_to_read(op.memory()) {
                return Ok(Step::Blocked(Blocked::Completion));
            }
            self.io.in_flight.begin(visit, op, Tag::Answer { to, request });
            return Ok(Step::Progress);
        }
        let found = visit.extents(range, limit);
        drop(visit);
        let outcome = found.map(|found| match found.is_empty() {
            true => Returned::Success,
            false => Returned::Extents(found),
        });
        self.answer(to, request, outcome);
        Ok(Step::Progress)
    }
}

#[cfg(test)]
mod tests;
