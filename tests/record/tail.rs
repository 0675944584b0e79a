//! Bytes of an image that are not part of the disk: not moved, and so never deleted.

use crate::{SIZE, image};
use harness::host::{Host, MIRROR_STARTED};
use harness::{read_at, temp_dir_in, write_at};
use std::fs::File;

/// The image gets so many bytes, the last of them this one, before or after it is served.
fn unlink_is_refused(size: u64, grows_while_served: bool) {
    let directory = temp_dir_in("/var/tmp");
    let (from, to) = (Host::new(directory.path(), "a"), Host::new(directory.path(), "b"));
    image(&from, b"precious");
    image(&to, b"old bytes");
    let grow = || {
        File::options().write(true).open(&from.image).unwrap().set_len(size).unwrap();
        write_at(&from.image, size - 1, b"t");
    };
    if !grows_while_served {
        grow();
    }
    let (mut serving, mut listening) = (from.serve(), to.listen());
    grow();
    let reply = from.mirror_to(to.address, &["unlink"]);
    let words = format!("the last {} bytes of ", size - SIZE);
    assert!(reply.starts_with("1: ") && reply.contains(&words), "{reply}");
    assert!(from.image.exists() && serving.is_running());
    // Without deletion nothing is lost, and it is said that not everything moves.
    assert_eq!(from.mirror_to(to.address, &["exit"]), MIRROR_STARTED);
    assert!(serving.wait_for_end().success() && listening.wait_for_end().success());
    let told = serving.stderr();
    assert!(told.contains(&format!("{words}{} do not move", from.image.display())), "{told}");
    assert_eq!(read_at(&from.image, size - 1, 1), b"t");
    assert_eq!(from.record(), "departed");
}

#[test]
fn an_unserved_tail_is_not_deleted() {
    unlink_is_refused(SIZE + 100, false);
}

#[test]
fn what_an_image_has_grown_by_is_not_deleted() {
    unlink_is_refused(SIZE + 4096, true);
}
