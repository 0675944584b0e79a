//! Images on common file systems, each mounted from its own file: a request changes only the bytes in
//! its range, on every file system. Every mount ends with its test.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a helper that cannot continue fails its test"
)]

#[path = "file_systems/concurrent_reads.rs"]
mod concurrent_reads;
#[path = "file_systems/direct.rs"]
mod direct;
#[path = "file_systems/full.rs"]
mod full;
#[path = "file_systems/holes.rs"]
mod holes;
#[path = "file_systems/mounted.rs"]
mod mounted;
#[path = "file_systems/unreadable.rs"]
mod unreadable;
#[path = "file_systems/unsupported.rs"]
mod unsupported;
