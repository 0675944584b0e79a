//! Tests that the benchmarks measure correctly. `cargo bench` runs the benchmarks themselves.

#![allow(clippy::duplicate_mod, reason = "the two benchmarks are crates that share files")]

#[path = "peers.rs"]
#[allow(dead_code, reason = "nothing calls its `main`")]
mod peers;

#[path = "migrate.rs"]
#[allow(dead_code, reason = "nothing calls its `main`")]
mod migrate;
