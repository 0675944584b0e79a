//! Third-party clients (fio, libnbd, nbdkit, QEMU) against flexnbd, over TCP and unix sockets, in
//! newstyle and old style. Old style has neither maps nor a list of exports; these are tested in
//! newstyle only. Never uses a client of our own.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests and their helpers fail by panicking")]

#[path = "interop/direct.rs"]
mod direct;
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

/// Writes data at both ends and in the middle of an image, in unaligned lengths, with holes
/// between.
fn write_sparse_data(image: &Path) {
    write_at(image, 0, &noise(100_000, 1));
    write_at(image, 5 * MIB + 4096, &noise(3 << 20, 2));
    write_at(image, 40 * MIB - 7, &noise(1_000_001, 3));
    write_at(image, 64 * MIB - 512, &noise(512, 4));
}

/// An image of 64 MiB filled by [`write_sparse_data`].
fn image_with_holes(dir: &Path, name: &str) -> std::path::PathBuf {
    let path = sparse_image(dir, name, 64 * MIB);
    write_sparse_data(&path);
    path
}

#[track_caller]
fn assert_same_files(left: &Path, right: &Path) {
    let same = std::fs::read(left).unwrap() == std::fs::read(right).unwrap();
    assert!(same, "{} and {} differ", left.display(), right.display());
}
