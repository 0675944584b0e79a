//! Zeroing and trimming, part by part.

use super::super::disk::Visit;
#[cfg(test)]
use super::super::mutation::{self, Mutation};
use super::super::op::Op;
use super::InFlight;
use super::stage::OpStage;
use std::io;
use std::time::Instant;

impl<'a, T> InFlight<'a, T> {
    /// Starts the next part of a zeroing or trim.
    pub(super) fn start_part(&mut self, visit: Visit<'a>, key: u64, op: Op) {
        let by_extent = self.disk.image().works_by_extent(&op);
        let (part, rest) = op.split(|range| self.part_sizes.split_next(range, by_extent));
        self.parts += 1;
        self.execute(key, part, OpStage::Part { visit, rest, since: (self.clock)() });
    }

    /// Continues after a part of a zeroing or trim.
    pub(super) fn on_part_completed(
        &mut self,
        visit: Visit<'a>,
        key: u64,
        (part, rest): (Op, Op),
        since: Instant,
        outcome: io::Result<()>,
    ) {
        self.parts -= 1;
        let size = self.disk.size();
        let ranges = part.range(size).and_then(|part| Ok((part, rest.range(size)?)));
        let Ok((Some(part), Some(left))) = ranges else { return self.finish(key, outcome) };
        #[cfg(test)]
        let part = if mutation::is_active(Mutation::ForgetPart) { part.split(0).0 } else { part };
        self.disk.mark(part);
        if outcome.is_err() {
            return self.finish(key, outcome);
        }
        let took = (self.clock)().saturating_duration_since(since);
        self.part_sizes.record(part.length(), took);
        let Some(operation) = self.operations.get_mut(&key) else { return };
        if left.is_empty() {
            operation.change = None;
            if rest.is_durable() {
                self.batch(visit, key, None);
            } else {
                self.finish(key, Ok(()));
            }
        } else if self.closing {
            self.finish(key, Ok(()));
        } else {
            let change = operation.change.take();
            let is_open = self.disk.gate.is_open();
            #[cfg(test)]
            let is_open = is_open || mutation::is_active(Mutation::StayInside);
            let starts = is_open && self.may_start(&rest, change.as_ref());
            if let Some(operation) = self.operations.get_mut(&key) {
                operation.change = change;
                operation.stage = OpStage::Waiting(rest);
                self.waiting += 1;
            }
            // Otherwise leaves the gate, so that closing it does not wait for the rest.
            if starts {
                self.start(visit, key);
            }
        }
    }
}
