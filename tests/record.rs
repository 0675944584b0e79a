//! The ownership record of an image, and its locks: on file systems without room or attributes, for
//! files that were renamed or replaced while they are served, and beside QEMU.
//! Needs root for what it mounts; says so and passes over it elsewhere.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

#[path = "record/locks.rs"]
mod locks;
#[path = "record/medium.rs"]
mod medium;
#[path = "record/renamed.rs"]
mod renamed;
#[path = "record/room.rs"]
mod room;
#[path = "record/tail.rs"]
mod tail;

use harness::host::Host;
use harness::{MIB, sparse_image, write_at};

/// Size of the disks here, in bytes.
pub(crate) const SIZE: u64 = 4 * MIB;

/// An image of [`SIZE`] bytes for that host, which begins with `mark`.
pub(crate) fn image(host: &Host, mark: &[u8]) {
    sparse_image(host.image.parent().unwrap(), name(host), SIZE);
    write_at(&host.image, 0, mark);
}

fn name(host: &Host) -> &str {
    host.image.file_name().unwrap().to_str().unwrap()
}

/// Fails unless `serve` refuses the host's image with status 78; what it said.
#[track_caller]
pub(crate) fn refused_by_serve(host: &Host) -> String {
    let target = harness::Endpoint::Tcp(host.address);
    let mut refused = host.mode("serve").at(target).spawn();
    let status = refused.wait_for_end();
    let told = refused.stderr();
    assert_eq!(status.code(), Some(78), "{told}");
    told
}
