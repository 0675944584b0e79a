//! Images that `mirror` with `unlink` deleted at the source: `--create` must not replace the disk
//! by an empty one.

use harness::host::{Host, MIRROR_STARTED};
use harness::{Endpoint, MIB, Server, read_at, sparse_image, temp_dir_in, write_at};

#[test]
fn unlinked_disk_is_not_created_again_while_departed() {
    let directory = temp_dir_in("/dev/shm");
    let (from, to) = (Host::new(directory.path(), "a"), Host::new(directory.path(), "b"));
    sparse_image(directory.path(), "a.img", 4 * MIB);
    write_at(&from.image, MIB, b"precious");
    sparse_image(directory.path(), "b.img", 4 * MIB);
    let (mut listening, mut serving) = (to.listen(), serve(&from));
    assert_eq!(from.mirror_to(to.address, &["unlink"]), MIRROR_STARTED);
    assert!(serving.wait_for_end().success() && listening.wait_for_end().success());
    assert!(!from.image.exists());

    let mut refused = from.mode("serve").args(["--create", "4M"]).at(endpoint(&from)).spawn();
    assert_eq!(refused.wait_for_end().code(), Some(78));
    let stderr = refused.stderr();
    assert!(stderr.contains("has moved to") && stderr.contains("not made anew"), "{stderr}");
    assert!(!from.image.exists());

    // `listen` may create the image for the disk that comes back; afterwards `--create` works as
    // usual.
    let mut listening = from.mode("listen").args(["--create", "4M"]).start();
    let mut serving = to.serve();
    assert_eq!(to.mirror_to(from.address, &["unlink"]), MIRROR_STARTED);
    assert!(serving.wait_for_end().success() && listening.wait_for_end().success());
    assert_eq!(read_at(&from.image, MIB, 8), b"precious");
    drop(serve(&from));
    std::fs::remove_file(&from.image).unwrap();
    let _serving = serve(&from);
    assert_eq!(read_at(&from.image, MIB, 8), [0; 8]);
}

#[test]
fn image_created_by_listen_is_refused_without_a_disk() {
    let directory = temp_dir_in("/dev/shm");
    let (from, to) = (Host::new(directory.path(), "a"), Host::new(directory.path(), "b"));
    sparse_image(directory.path(), "a.img", 4 * MIB);
    sparse_image(directory.path(), "b.img", 4 * MIB);
    let (mut listening, mut serving) = (to.listen(), serve(&from));
    assert_eq!(from.mirror_to(to.address, &["unlink"]), MIRROR_STARTED);
    assert!(serving.wait_for_end().success() && listening.wait_for_end().success());

    // `listen` creates the image, but no source sends the disk.
    let mut listening = from.mode("listen").args(["--create", "4M"]).start();
    assert!(!listening.stop().success());
    assert!(from.image.exists());
    let mut refused = from.mode("serve").args(["--create", "4M"]).at(endpoint(&from)).spawn();
    assert_eq!(refused.wait_for_end().code(), Some(78));

    // An image that existed before `listen` stays servable.
    sparse_image(directory.path(), "c.img", 4 * MIB);
    let other = Host::new(directory.path(), "c");
    let mut listening = other.mode("listen").args(["--create", "4M"]).start();
    assert!(!listening.stop().success());
    drop(serve(&other));
}

/// Serves the image, creating it if it does not exist.
fn serve(host: &Host) -> Server {
    host.mode("serve").args(["--create", "4M"]).start()
}

fn endpoint(host: &Host) -> Endpoint {
    Endpoint::Tcp(host.address)
}
