//! The end of a session: drops waiting operations, and blocks until executing ones complete.

#[cfg(test)]
use super::super::mutation::{self, Mutation};
use super::InFlight;
use super::stage::{OpQueue, OpStage};
use nix::errno::Errno;

impl<T> InFlight<'_, T> {
    /// Drops the operations that wait. From now on, none starts.
    pub(super) fn begin_closing(&mut self) {
        self.closing = true;
        self.operations.retain(|_, operation| !matches!(operation.stage, OpStage::Waiting(_)));
        #[cfg(test)]
        if mutation::is_active(Mutation::ReleaseChanges) {
            self.operations.values_mut().for_each(|operation| operation.change = None);
        }
    }

    /// Abandons operations whose completion will never arrive. They may still execute, so their
    /// visits are leaked on purpose: a gate that never drains is safer than one that closes before
    /// them. A lost flush counts as failed.
    fn abandon(&mut self) {
        #[cfg(test)]
        if mutation::is_active(Mutation::ReleaseAbandoned) {
            return self.operations.clear();
        }
        for (_, operation) in std::mem::take(&mut self.operations) {
            std::mem::forget(operation.change);
            match operation.stage {
                OpStage::WritingDurably { visit, guard }
                | OpStage::WritingAgain { visit, guard, .. }
                | OpStage::Flushing { visit, guard, .. } => {
                    #[cfg(test)]
                    if mutation::is_active(Mutation::ForgetLostFlush) {
                        drop(guard);
                        std::mem::forget(visit);
                        continue;
                    }
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
        self.begin_closing();
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
