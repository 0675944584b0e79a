//! Ownership records and image locks: on full file systems, on file systems without extended
//! attributes, for images renamed or replaced while served, and beside QEMU.
//! Tests that mount a file system need root; without it they are skipped.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

#[path = "record/disk_id.rs"]
mod disk_id;
#[path = "record/failed_flush.rs"]
mod failed_flush;
#[path = "record/locks.rs"]
mod locks;
#[path = "record/mount.rs"]
mod mount;
#[path = "record/no_space.rs"]
mod no_space;
#[path = "record/renamed.rs"]
mod renamed;
#[path = "record/tail.rs"]
mod tail;

use harness::host::Host;
use harness::{MIB, sparse_image, write_at};

/// Size of the disks, in bytes.
pub(crate) const SIZE: u64 = 4 * MIB;

/// Creates the host's image: [`SIZE`] bytes that begin with `content`.
pub(crate) fn image(host: &Host, content: &[u8]) {
    sparse_image(host.image.parent().unwrap(), name(host), SIZE);
    write_at(&host.image, 0, content);
}

fn name(host: &Host) -> &str {
    host.image.file_name().unwrap().to_str().unwrap()
}

/// Asserts that the mode exits with status 78 for the host's image; returns its stderr.
#[track_caller]
pub(crate) fn assert_refused(host: &Host, mode: &str, flags: &[&str]) -> String {
    let endpoint = harness::Endpoint::Tcp(host.address);
    let mut refused = host.mode(mode).args(flags).at(endpoint).spawn();
    let status = refused.wait_for_end();
    let stderr = refused.stderr();
    assert_eq!(status.code(), Some(78), "{stderr}");
    stderr
}

#[track_caller]
pub(crate) fn assert_serve_refused(host: &Host) -> String {
    assert_refused(host, "serve", &[])
}
