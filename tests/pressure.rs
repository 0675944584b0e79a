//! The server under external pressure: signals, resource limits, a log that cannot be written, and
//! silent or refused connections in large numbers.
//! No test measures time: each waits for its event, with a deadline far beyond it.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a helper that cannot continue fails its test"
)]

#[path = "pressure/connections.rs"]
mod connections;
#[path = "pressure/limits.rs"]
mod limits;
#[path = "pressure/log.rs"]
mod log;
#[path = "pressure/signals.rs"]
mod signals;
