//! For the simulation of the session engine: a drop in steps, and the budget that is used.

use super::InFlight;
use super::stage::OpQueue;

/// What the operations of a session hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct HeldBudget {
    /// Operations and outcomes.
    pub(crate) count: usize,
    /// Bytes to write.
    pub(crate) written: usize,
    /// Bytes of the longest write.
    pub(crate) longest_write: usize,
    /// Bytes to read.
    pub(crate) read: usize,
    /// Bytes of the longest read.
    pub(crate) longest_read: usize,
}

impl<T> InFlight<'_, T> {
    /// Does the part of a drop that needs no waiting; true if no operation executes any more.
    pub(crate) fn close_without_waiting(&mut self) -> bool {
        self.begin_closing();
        if let OpQueue::Of(queue) = &mut self.queue {
            queue.submit();
        }
        while let Some(completion) = self.next_completion() {
            self.on_completion(completion);
        }
        self.executing == 0
    }

    pub(crate) fn held_budget(&self) -> HeldBudget {
        let count = self.operations.len() + self.completed.len();
        let mut held = HeldBudget { count, ..HeldBudget::default() };
        for operation in self.operations.values() {
            let (sum, longest) = if operation.is_read {
                (&mut held.read, &mut held.longest_read)
            } else {
                (&mut held.written, &mut held.longest_write)
            };
            *sum += operation.memory;
            *longest = operation.memory.max(*longest);
        }
        held
    }
}
