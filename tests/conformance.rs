//! Conformance suite for NBD servers, on the level of raw bytes. Each test opens with the sentence
//! of the NBD specification that it checks, where there is one: `doc/proto.md` of
//! NetworkBlockDevice/nbd, for extended headers on the branch `extension-ext-header`; section in
//! parentheses.
//!
//! By default each test starts a flexnbd server. `FLEXNBD_CONFORMANCE_ADDR` selects another server
//! by address and port (`127.0.0.1:10809`) or by the path of a unix socket. Its default export must
//! be writable, at least 8 MiB large, and WILL BE OVERWRITTEN. Tests that need other options of the
//! server, or its image, are then skipped with a line on stderr.
//!
//! Never uses the library under test: constants and encoders are those of `harness::raw`.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests and their helpers fail by panicking")]

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
