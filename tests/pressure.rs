//! The server under pressure from outside: signals, limits of the system, a log that cannot be
//! written, and strangers who take every place.
//! Never judges by the clock: what must happen is waited for, with a deadline far beyond it.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "helpers of tests, too: what cannot go on fails the test"
)]

#[path = "pressure/limits.rs"]
mod limits;
#[path = "pressure/log.rs"]
mod log;
#[path = "pressure/signals.rs"]
mod signals;
#[path = "pressure/strangers.rs"]
mod strangers;
