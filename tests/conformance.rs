//! Our own conformance suite for NBD servers, speaking raw bytes: one test for each point at which
//! servers commonly go wrong.
//!
//! It starts the server it asks, or asks any other one: `FLEXNBD_CONFORMANCE_ADDR` is an address
//! with a port (`127.0.0.1:10809`) or the path of a unix socket. That server's default export must
//! be writable, at least 8 MiB, and WILL BE OVERWRITTEN. What cannot be asked of a foreign server
//! (how it was started, what its disk does) is skipped then, and says so on stderr.
//!
//! It never uses the library: its numbers and encoders are its own (`common/raw.rs`).

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "helpers of tests, too: what cannot go on fails the test"
)]

#[path = "conformance/subject.rs"]
mod subject;

#[path = "conformance/bounds.rs"]
mod bounds;
#[path = "conformance/disk.rs"]
mod disk;
#[path = "conformance/end.rs"]
mod end;
#[path = "conformance/handshake.rs"]
mod handshake;
#[path = "conformance/replies.rs"]
mod replies;
