//! What the migration tests share: two hosts, images to move, writers that do not stop.

#![allow(
    dead_code,
    unused_imports,
    reason = "every test binary compiles this and uses a part of it"
)]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a fixture that cannot go on fails the test that asked for it"
)]

pub(crate) mod clients;
pub(crate) mod host;
pub(crate) mod image;
pub(crate) mod writers;

pub(crate) use crate::common::Random;
pub(crate) use host::Host;
pub(crate) use writers::{Door, Writers};

use std::path::PathBuf;
use std::time::Duration;
use tempfile::TempDir;

/// What `mirror` is answered when the migration has begun.
pub(crate) const STARTED: &str = "0: Mirror started";

/// As fast as the writers can.
pub(crate) const NO_PAUSE: Duration = Duration::ZERO;

/// The file systems to try: that of large temporary files (ext4 on most machines), and tmpfs.
pub(crate) const PLACES: [&str; 2] = ["/var/tmp", "/dev/shm"];

/// A directory on that file system that disappears with the test.
pub(crate) fn directory(place: &str) -> TempDir {
    tempfile::Builder::new().prefix("flexnbd-test-").tempdir_in(place).unwrap()
}
