//! A disk that was deleted where it left (`--unlink`): it is not made anew, empty.

use harness::host::{Host, MIRROR_STARTED};
use harness::{Endpoint, MIB, Server, read_at, sparse_image, temp_dir_in, write_at};

#[test]
fn a_disk_that_was_deleted_when_it_left_does_not_come_back_empty() {
    let directory = temp_dir_in("/dev/shm");
    let (from, to) = (Host::new(directory.path(), "a"), Host::new(directory.path(), "b"));
    sparse_image(directory.path(), "a.img", 4 * MIB);
    write_at(&from.image, MIB, b"precious");
    sparse_image(directory.path(), "b.img", 4 * MIB);
    let (mut listening, mut serving) = (to.listen(), serve(&from));
    assert_eq!(from.mirror_to(to.address, &["unlink"]), MIRROR_STARTED);
    assert!(serving.wait_for_end().success() && listening.wait_for_end().success());
    assert!(!from.image.exists());

    let mut refused = from.mode("serve").args(["--create", "4M"]).at(place(&from)).spawn();
    assert_eq!(refused.wait_for_end().code(), Some(78));
    let told = refused.stderr();
    assert!(told.contains("has moved to") && told.contains("not made anew"), "{told}");
    assert!(!from.image.exists());

    // Coming home it may be made, and is a disk like any other from then on.
    let mut listening = from.mode("listen").args(["--create", "4M"]).start();
    let mut serving = to.serve();
    assert_eq!(to.mirror_to(from.address, &["unlink"]), MIRROR_STARTED);
    assert!(serving.wait_for_end().success() && listening.wait_for_end().success());
    assert_eq!(read_at(&from.image, MIB, 8), b"precious");
    drop(serve(&from));
    std::fs::remove_file(&from.image).unwrap();
    let _anew = serve(&from);
    assert_eq!(read_at(&from.image, MIB, 8), [0; 8]);
}

#[test]
fn an_image_that_was_made_for_a_disk_that_never_came_is_not_served() {
    let directory = temp_dir_in("/dev/shm");
    let (from, to) = (Host::new(directory.path(), "a"), Host::new(directory.path(), "b"));
    sparse_image(directory.path(), "a.img", 4 * MIB);
    sparse_image(directory.path(), "b.img", 4 * MIB);
    let (mut listening, mut serving) = (to.listen(), serve(&from));
    assert_eq!(from.mirror_to(to.address, &["unlink"]), MIRROR_STARTED);
    assert!(serving.wait_for_end().success() && listening.wait_for_end().success());

    // It is to come home, but nobody sends it.
    let mut listening = from.mode("listen").args(["--create", "4M"]).start();
    assert!(!listening.stop().success());
    assert!(from.image.exists());
    let mut refused = from.mode("serve").args(["--create", "4M"]).at(place(&from)).spawn();
    assert_eq!(refused.wait_for_end().code(), Some(78));

    // One that was there before is as good as it was.
    sparse_image(directory.path(), "c.img", 4 * MIB);
    let other = Host::new(directory.path(), "c");
    let mut listening = other.mode("listen").args(["--create", "4M"]).start();
    assert!(!listening.stop().success());
    drop(serve(&other));
}

/// Serves the image, which is made if it is not there.
fn serve(host: &Host) -> Server {
    host.mode("serve").args(["--create", "4M"]).start()
}

fn place(host: &Host) -> Endpoint {
    Endpoint::Tcp(host.address)
}
