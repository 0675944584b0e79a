//! Models of `src/server/stop_request.rs`, the notifier of a session.

use super::stop_request::{SessionControl, StopRequest};
use crate::disk::Notifier;
use crate::explore::{explore, explore_preempted};
use loom::sync::atomic::{AtomicBool, Ordering};
use loom::thread;
use std::sync::Arc;

/// Sleeps as `session/driver` does until the session has a stop request: clears the flag first, and
/// checks second.
pub(super) fn wait_for_stop(control: &SessionControl) -> StopRequest {
    loop {
        let current = control.current();
        if current != StopRequest::Serve {
            return current;
        }
        control.wake.wait();
        control.wake.clear();
    }
}

/// A completion and a stop request arrive while a session decides whether to sleep. It receives both,
/// although they share one flag.
///
/// Found: `request` that wakes before it sets the request, or does not wake; `notify` that does not
/// wake; a session that clears the flag after the check.
pub fn stop_request_and_completion_both_arrive() {
    explore_preempted(3, || {
        let control = Arc::new(SessionControl::new().unwrap());
        let completed = Arc::new(AtomicBool::new(false));
        let queue = {
            let (control, completed) = (Arc::clone(&control), Arc::clone(&completed));
            thread::spawn(move || {
                completed.store(true, Ordering::Release);
                Notifier::notify(&*control);
            })
        };
        let server = {
            let control = Arc::clone(&control);
            thread::spawn(move || control.request(StopRequest::Finish))
        };
        let is_done =
            || completed.load(Ordering::Acquire) && control.current() != StopRequest::Serve;
        while !is_done() {
            control.wake.wait();
            control.wake.clear();
        }
        queue.join().unwrap();
        server.join().unwrap();
    });
}

/// Two requests at once: the stronger one stays, whichever is first.
///
/// Found: `store` in place of `fetch_max`, and a `load` followed by a `store`.
pub fn stronger_request_stays() {
    explore(|| {
        let control = Arc::new(SessionControl::new().unwrap());
        let other = {
            let control = Arc::clone(&control);
            thread::spawn(move || control.request(StopRequest::Disconnect))
        };
        control.request(StopRequest::Finish);
        other.join().unwrap();
        assert_eq!(wait_for_stop(&control), StopRequest::Disconnect);
    });
}
