//! The end of a session: operations that wait are dropped, those in flight are waited for.

use super::{Executor, InFlight};
use nix::errno::Errno;

impl<T> InFlight<'_, T> {
    /// Lets those go of which nobody tells the end. They may still be made: rather is the gate never
    /// closed again than behind them. And a flush may have failed: better call one so that has not.
    fn abandon(&mut self) {
        let mut abandoned = std::mem::take(&mut self.under_way);
        for errand in abandoned.values_mut().filter(|errand| errand.listening.is_some()) {
            let _ = self.disk.flush_errors.failed(&Errno::EIO.into());
            errand.listening = None;
        }
        std::mem::forget(abandoned);
    }
}

impl<T> Drop for InFlight<'_, T> {
    fn drop(&mut self) {
        self.closing = true;
        self.waiting.clear();
        while !self.under_way.is_empty() {
            if let Some(made) = self.next_made() {
                self.made(made);
            } else if self.helped > 0 {
                self.completions.wait();
            } else if let Executor::Lane(lane) = &mut self.lane {
                lane.submit();
                lane.wait();
                match lane.finished() {
                    Some(made) => self.made(made),
                    None => return self.abandon(),
                }
            } else {
                return self.abandon();
            }
        }
    }
}
