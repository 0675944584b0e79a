//! Waits for conditions, never for a fixed time.

use std::time::{Duration, Instant};

/// Limit of each wait. Far longer than any event takes, because test machines are slow; a passing
/// test never waits for so long.
pub const TIMEOUT: Duration = Duration::from_secs(30);

/// Pause between two polls. Conditions are polled because most of them, such as `/proc` entries,
/// cannot wake the test.
pub(crate) const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// Polls `condition` until it is true. After [`TIMEOUT`] fails the test with the text `event`.
#[track_caller]
pub fn wait_until(event: &str, mut condition: impl FnMut() -> bool) {
    assert!(poll_until(TIMEOUT, &mut condition), "waited {TIMEOUT:?} in vain for {event}");
}

/// Polls `condition` until it is true or `timeout` has passed. Returns whether it became true.
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
