//! Models of the state that threads share: files of the program itself, compiled with the locks and
//! atomics of [loom](https://docs.rs/loom), which executes a model once for each order of its steps
//! and for each value that an atomic load may return under the ordering given in the code.
//!
//! `#[path]` includes the files. Of what they use, this crate replaces as little as possible: `sync`,
//! the memory of the dirty bitmap, the eventfd, and types that are only stored. A model fails by
//! a panic: an assertion, two accesses to [`shared::Bytes`] that are not ordered, or a deadlock, which
//! is how a lost wake-up appears. Guards dropped during that panic may panic again and abort the
//! process; the first panic is the finding.
//!
//! Each model names mistakes that were made in the program on purpose, and that it found.
//!
//! What loom does not model: time (a wait with a timeout ends only by a notification, so that a model
//! never relies on a timeout), spurious wake-ups and spurious failures of `compare_exchange_weak`.

#![allow(dead_code, reason = "the models use a part of each file")]
#![allow(clippy::unwrap_used, reason = "a model fails by panicking")]

pub mod disk;
mod explore;
pub mod net;
#[path = "../../../src/range.rs"]
pub mod range;
pub mod server;
pub mod shared;
pub mod sync;
pub mod systemd;
