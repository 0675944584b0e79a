//! Tests the benchmark commands: that their parts decide rightly, and that they measure at all.
//! Measures nothing itself; that is `cargo bench`.

#![allow(
    clippy::duplicate_mod,
    reason = "the commands share files, and each is a crate of its own"
)]

#[path = "peers.rs"]
#[allow(dead_code, reason = "the command's own main is not run here")]
mod peers;

#[path = "migrate.rs"]
#[allow(dead_code, reason = "as above")]
mod migrate;
