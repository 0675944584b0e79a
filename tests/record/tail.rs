//! Bytes of an image beyond its disk: a migration does not copy them, so it must not delete them.

use crate::{SIZE, image};
use harness::host::{Host, MIRROR_STARTED};
use harness::{read_at, temp_dir_in, write_at};
use std::fs::File;

/// Extends the image to `size` bytes, before or after `serve` opens it; its last byte is not zero.
fn unlink_is_refused(size: u64, grows_while_served: bool) {
    let directory = temp_dir_in("/var/tmp");
    let (source, destination) =
        (Host::new(directory.path(), "a"), Host::new(directory.path(), "b"));
    image(&source, b"precious");
    image(&destination, b"old bytes");
    let grow = || {
        File::options().write(true).open(&source.image).unwrap().set_len(size).unwrap();
        write_at(&source.image, size - 1, b"t");
    };
    if !grows_while_served {
        grow();
    }
    let (mut server, mut listener) = (source.serve(), destination.listen());
    grow();
    let reply = source.mirror_to(destination.address, &["unlink"]);
    let tail = format!("the last {} bytes of ", size - SIZE);
    assert!(reply.starts_with("1: ") && reply.contains(&tail), "{reply}");
    assert!(source.image.exists() && server.is_running());
    // Without deletion no byte is lost; the log says that the tail is not copied.
    assert_eq!(source.mirror_to(destination.address, &["exit"]), MIRROR_STARTED);
    assert!(server.wait_for_end().success() && listener.wait_for_end().success());
    let message = server.stderr();
    assert!(
        message.contains(&format!("{tail}{} do not move", source.image.display())),
        "{message}"
    );
    assert_eq!(read_at(&source.image, size - 1, 1), b"t");
    assert_eq!(source.record(), "departed");
}

#[test]
fn an_unserved_tail_is_not_deleted() {
    unlink_is_refused(SIZE + 100, false);
}

#[test]
fn bytes_appended_while_serving_are_not_deleted() {
    unlink_is_refused(SIZE + 4096, true);
}
