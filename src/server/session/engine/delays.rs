//! Delays of changes: what delays them, and what a long delay requires.

use super::Engine;
use crate::server::stop_request::StopRequest;
use std::time::Instant;

impl Engine<'_> {
    /// Until when to delay a write, so that a migration converges. Only a stop request shortens a delay.
    pub(super) fn throttle(&mut self) -> Option<Instant> {
        let wanted = self.io.disk.write_delay();
        if wanted.is_zero() || self.stop != StopRequest::Serve {
            self.throttled_until = None;
            return None;
        }
        let now = (self.clocks.now)();
        match self.throttled_until {
            // It stays, so that the write is not delayed again if something else keeps it waiting.
            Some(until) => (now < until).then_some(until),
            None => {
                let elapsed = now.saturating_duration_since(self.started);
                let delay = self.throttle.delay(elapsed, wanted);
                self.throttled_until = (!delay.is_zero()).then(|| now + delay);
                self.throttled_until
            }
        }
    }

    /// Whether a change has waited so long that its client may have closed the connection and
    /// reconnected: the change would overwrite its newer ones. Changes that did not wait are made even if
    /// the connection is closed behind them.
    pub(super) fn needs_peer_check(&mut self) -> bool {
        self.delay.needs_check((self.clocks.coarse)())
    }
}
