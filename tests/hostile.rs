//! Peers that misbehave, beside clients that do not.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests and their helpers fail by panicking")]

#[path = "hostile/clients.rs"]
mod clients;
#[path = "hostile/memory.rs"]
mod memory;
