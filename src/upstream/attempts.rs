//! Attempts to connect, each on a thread of its own, so that an address that does not answer does not keep
//! others waiting.
//! Never decides which address is next: `rotation` does.

use super::connecting::Connected;
use super::options::TargetError;
use crate::memory_reserve::check_thread_headroom;
use crate::sync::{lock, wait, wait_timeout};
use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

/// The attempts of one reconnection. When the last clone is dropped, late connections are closed as they come.
#[derive(Clone, Debug, Default)]
pub(super) struct Attempts(Arc<AttemptsShared>);

#[derive(Debug, Default)]
struct AttemptsShared {
    state: Mutex<AttemptsState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct AttemptsState {
    ended: VecDeque<EndedAttempt>,
    is_cancelled: bool,
}

/// The number of an address, and the outcome of an attempt to connect to it.
type EndedAttempt = (usize, Result<Connected, TargetError>);

/// Why a wait has ended.
#[derive(Debug)]
pub(super) enum AttemptsEvent {
    /// An attempt has ended.
    Ended(usize, Result<Connected, TargetError>),
    /// The deadline has come.
    Deadline,
    /// There will be no more attempts.
    Cancelled,
}

impl Attempts {
    /// Starts an attempt at the address of this number. One that no thread can be started for fails.
    pub(super) fn start(
        &self,
        number: usize,
        connect: impl FnOnce() -> Result<Connected, TargetError> + Send + 'static,
    ) {
        // Not counted as a user: nothing waits for an outcome whose reconnection is over.
        let shared = Arc::downgrade(&self.0);
        let attempt = move || {
            let outcome = connect();
            if let Some(shared) = shared.upgrade() {
                Self(shared).end(number, outcome);
            }
        };
        let builder = thread::Builder::new().name("attempting".into());
        let started = check_thread_headroom().and_then(|()| builder.spawn(attempt));
        if let Err(error) = started {
            self.end(number, Err(TargetError::Connect(error)));
        }
    }

    fn end(&self, number: usize, outcome: Result<Connected, TargetError>) {
        lock(&self.0.state).ended.push_back((number, outcome));
        self.0.changed.notify_all();
    }

    /// Waits until an attempt has ended, at most until then.
    pub(super) fn wait(&self, deadline: Option<Instant>) -> AttemptsEvent {
        let mut state = lock(&self.0.state);
        loop {
            if state.is_cancelled {
                return AttemptsEvent::Cancelled;
            }
            if let Some((number, outcome)) = state.ended.pop_front() {
                return AttemptsEvent::Ended(number, outcome);
            }
            state = match deadline.map(|at| at.saturating_duration_since(Instant::now())) {
                None => wait(&self.0.changed, state),
                Some(Duration::ZERO) => return AttemptsEvent::Deadline,
                Some(left) => wait_timeout(&self.0.changed, state, left).0,
            };
        }
    }

    /// Ends the wait for good.
    pub(super) fn cancel(&self) {
        lock(&self.0.state).is_cancelled = true;
        self.0.changed.notify_all();
    }
}
