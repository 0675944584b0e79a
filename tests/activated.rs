//! The program as a service: sockets that were handed over, what it tells the service manager, and
//! what it does when it cannot serve.
//! Never needs a service manager: the test plays that part (`activated/manager.rs`).

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

#[path = "activated/arrived.rs"]
mod arrived;
#[path = "activated/asking.rs"]
mod asking;
#[path = "activated/idle.rs"]
mod idle;
#[path = "activated/manager.rs"]
mod manager;
#[path = "activated/refusing.rs"]
mod refusing;
#[path = "activated/restart.rs"]
mod restart;
#[path = "activated/stuck.rs"]
mod stuck;
#[path = "activated/telling.rs"]
mod telling;
