//! flexnbd as a service: inherited sockets, messages to the service manager, sessions in the fd
//! store, and the degraded service that cannot serve.
//! Needs no service manager: the test is one (`harness/src/manager.rs`).

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

#[path = "activated/arrived.rs"]
mod arrived;
#[path = "activated/degraded.rs"]
mod degraded;
#[path = "activated/idle.rs"]
mod idle;
#[path = "activated/in_doubt.rs"]
mod in_doubt;
#[path = "activated/notify.rs"]
mod notify;
#[path = "activated/restart.rs"]
mod restart;
#[path = "activated/watchdog.rs"]
mod watchdog;
