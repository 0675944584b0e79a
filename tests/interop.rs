//! Third parties: the programs that people use with NBD servers, against ours, over TCP and unix
//! sockets, newstyle and old style.
//!
//! Of these, everything speaks old style; what it cannot tell there (the map, the list of exports)
//! is asked in newstyle only. Never takes our own client's word for anything.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "helpers of tests, too: what cannot go on fails the test"
)]

#[path = "interop/fio.rs"]
mod fio;
#[path = "interop/libnbd.rs"]
mod libnbd;
#[path = "interop/nbdkit.rs"]
mod nbdkit;
#[path = "interop/qemu.rs"]
mod qemu;

use harness::{MIB, noise, sparse_image, write_at};
use std::path::Path;

/// Fills an image in part: data at both ends and in the middle, of odd lengths, and holes between.
fn sprinkle(image: &Path) {
    write_at(image, 0, &noise(100_000, 1));
    write_at(image, 5 * MIB + 4096, &noise(3 << 20, 2));
    write_at(image, 40 * MIB - 7, &noise(1_000_001, 3));
    write_at(image, 64 * MIB - 512, &noise(512, 4));
}

/// An image of 64 MiB made by [`sprinkle`].
fn sprinkled_image(dir: &Path, name: &str) -> std::path::PathBuf {
    let path = sparse_image(dir, name, 64 * MIB);
    sprinkle(&path);
    path
}

#[track_caller]
fn assert_same_files(left: &Path, right: &Path) {
    let same = std::fs::read(left).unwrap() == std::fs::read(right).unwrap();
    assert!(same, "{} and {} differ", left.display(), right.display());
}
