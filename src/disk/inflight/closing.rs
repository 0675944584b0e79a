//! The end of a session: drops waiting operations, and blocks until executing ones complete.

use super::InFlight;
use super::stage::{OpQueue, OpStage};
use nix::errno::Errno;

impl<T> InFlight<'_, T> {
    /// Abandons operations whose completion will never arrive. They may still execute, so their
    /// visits are leaked on purpose: a gate that never drains is safer than one that closes before
    /// them. A lost flush counts as failed.
    fn abandon(&mut self) {
        for (_, operation) in std::mem::take(&mut self.operations) {
            std::mem::forget(operation.change);
            match operation.stage {
                OpStage::WritingDurably { visit, guard }
                | OpStage::Flushing { visit, guard, .. } => {
                    let _ = self.disk.flush_errors.record(&Errno::EIO.into());
                    drop(guard);
                    std::mem::forget(visit);
                }
                stage => std::mem::forget(stage),
            }
        }
    }
}

impl<T> Drop for InFlight<'_, T> {
    fn drop(&mut self) {
        self.closing = true;
        self.operations.retain(|_, operation| !matches!(operation.stage, OpStage::Waiting(_)));
        while self.executing > 0 {
            if let Some(completion) = self.next_completion() {
                self.on_completion(completion);
            } else if self.in_threads > 0 {
                self.completions.wait();
            } else if let OpQueue::Of(queue) = &mut self.queue {
                queue.submit();
                queue.wait();
                match self.next_completion() {
                    Some(completion) => self.on_completion(completion),
                    None => return self.abandon(),
                }
            } else {
                return self.abandon();
            }
        }
    }
}
