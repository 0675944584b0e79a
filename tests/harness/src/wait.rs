//! Waiting for a condition, never for a time.

use std::time::{Duration, Instant};

/// How long anything may take that normally takes milliseconds. Long, because test machines are
/// slow; a passing test never waits for it.
pub const TIMEOUT: Duration = Duration::from_secs(30);

/// Pause between two looks at a condition that cannot wake the test (another process's `/proc`
/// entry).
pub(crate) const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// Polls `condition` until it is true; fails the test after [`TIMEOUT`], naming `what`.
#[track_caller]
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    assert!(poll_until(TIMEOUT, &mut condition), "waited {TIMEOUT:?} in vain for {what}");
}

/// Polls `condition` until it is true or `timeout` has passed; whether it became true.
pub fn poll_until(timeout: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let start = Instant::now();
    loop {
        if condition() {
            return true;
        }
        if start.elapsed() > timeout {
            return false;
        }
        std::thread::sleep(POLL_INTERVAL);
    }
}
