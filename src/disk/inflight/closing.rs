//! The end of a session: drops the operations that wait, and blocks until those in flight complete.

use super::{Executor, InFlight};
use nix::errno::Errno;

impl<T> InFlight<'_, T> {
    /// Abandons operations whose completion will never arrive. They may still execute, so their
    /// visits are leaked on purpose: a gate that never drains is safer than one that closes before
    /// them. A lost flush counts as failed.
    fn abandon(&mut self) {
        let mut abandoned = std::mem::take(&mut self.executing);
        for operation in abandoned.values_mut().filter(|operation| operation.flush_guard.is_some())
        {
            let _ = self.disk.flush_errors.record(&Errno::EIO.into());
            operation.flush_guard = None;
        }
        std::mem::forget(abandoned);
    }
}

impl<T> Drop for InFlight<'_, T> {
    fn drop(&mut self) {
        self.closing = true;
        self.waiting.clear();
        while !self.executing.is_empty() {
            if let Some(completion) = self.next_completion() {
                self.on_completion(completion);
            } else if self.in_threads > 0 {
                self.completions.wait();
            } else if let Executor::Queue(queue) = &mut self.executor {
                queue.submit();
                queue.wait();
                match queue.poll() {
                    Some(completion) => self.on_completion(completion),
                    None => return self.abandon(),
                }
            } else {
                return self.abandon();
            }
        }
    }
}
