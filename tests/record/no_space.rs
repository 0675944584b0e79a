//! Records on a full file system: kept in the state directory, or the command is refused.

use crate::mount::Mount;
use crate::{assert_serve_refused, image};
use harness::host::{Host, MIRROR_STARTED};
use harness::{
    Endpoint, MIB, TIMEOUT, compile, noise, poll_until, read_at, require_tool, temp_dir_in,
    write_at,
};
use std::fs;
use std::path::Path;

/// A state directory in which no file can be created.
const UNUSABLE: &str = "/dev/null/flexnbd";

fn hosts(directory: &Path, root: &Path) -> (Host, Host) {
    let (mut source, destination) = (Host::new(root, "a"), Host::new(directory, "b"));
    source.control = directory.join("a.sock");
    image(&source, b"precious");
    image(&destination, b"old bytes");
    (source, destination)
}

/// On a full file system the record is written to the state directory, and `serve` obeys it.
fn full_disk_is_recorded_in_state_directory(inode_bytes: u32) {
    let directory = temp_dir_in("/var/tmp");
    let Some(mount) = Mount::ext4(directory.path(), inode_bytes) else { return };
    let (source, destination) = hosts(directory.path(), &mount.root);
    let state = directory.path().join("state");
    fs::create_dir(&state).unwrap();
    let source = source.env("STATE_DIRECTORY", state.to_str().unwrap());
    // Before the server starts, whose disk would get an id, and with it space for attributes.
    mount.fill();
    let (mut server, mut listener) = (source.serve(), destination.listen());
    assert_eq!(source.mirror_to(destination.address, &[]), MIRROR_STARTED);
    assert!(server.wait_for_end().success(), "{}", server.stderr());
    assert!(listener.wait_for_end().success(), "{}", listener.stderr());
    assert_eq!(read_at(&destination.image, 0, 8), b"precious");
    let message = assert_serve_refused(&source);
    assert!(message.contains("has moved to"), "{message}");
    let kept: Vec<_> = fs::read_dir(&state).unwrap().map(|e| e.unwrap().path()).collect();
    assert_eq!(kept.len(), 1, "a single record: {kept:?}");
    assert!(fs::read_to_string(&kept[0]).unwrap().starts_with("flexnbd 1 departed "));
}

#[test]
fn a_full_disk_is_recorded_in_the_state_directory() {
    full_disk_is_recorded_in_state_directory(256);
}

#[test]
fn small_inodes_are_recorded_in_the_state_directory() {
    full_disk_is_recorded_in_state_directory(128);
}

#[test]
fn mirror_is_refused_when_no_record_can_be_kept() {
    let directory = temp_dir_in("/var/tmp");
    let Some(mount) = Mount::ext4(directory.path(), 128) else { return };
    let (source, destination) = hosts(directory.path(), &mount.root);
    let source = source.env("STATE_DIRECTORY", UNUSABLE);
    mount.fill();
    let (mut server, mut listener) = (source.serve(), destination.listen());
    for action in ["exit", "unlink"] {
        let reply = source.mirror_to(destination.address, &[action]);
        assert!(reply.starts_with("1: no ownership record can be kept"), "{reply}");
        assert!(reply.contains("user.flexnbd") && reply.contains(UNUSABLE), "{reply}");
        assert!(reply.contains("--no-record"), "{reply}");
    }
    assert_eq!(source.status_of("is_mirroring"), "false");
    assert!(server.is_running() && listener.is_running());

    // The operator permits a migration without a record.
    let options = ["exit", "0.0.0.0", "0", "no-record"];
    let reply = source.mirror_to(destination.address, &options);
    assert_eq!(reply, MIRROR_STARTED);
    assert!(server.wait_for_end().success(), "{}", server.stderr());
    assert!(server.stderr().contains("without an ownership record"), "{}", server.stderr());
    assert!(listener.wait_for_end().success(), "{}", listener.stderr());
    // Without a record the source serves its stale copy: the documented cost.
    assert_eq!(source.record(), "");
    drop(source.serve());
}

#[test]
fn listen_is_refused_when_no_record_can_be_kept() {
    let directory = temp_dir_in("/var/tmp");
    let Some(mount) = Mount::ext4(directory.path(), 128) else { return };
    let (destination, source) = hosts(directory.path(), &mount.root);
    mount.fill();
    let destination = destination.env("STATE_DIRECTORY", UNUSABLE);
    let endpoint = || Endpoint::Tcp(destination.address);
    let mut refused = destination.mode("listen").at(endpoint()).spawn();
    assert_eq!(refused.wait_for_end().code(), Some(78), "{}", refused.stderr());
    assert!(refused.stderr().contains("--no-record"), "{}", refused.stderr());

    // A new image must have a record before anything else, or it is deleted again.
    fs::remove_file(&destination.image).unwrap();
    let mut refused = destination.mode("listen").args(["--create", "4M"]).at(endpoint()).spawn();
    assert_eq!(refused.wait_for_end().code(), Some(78), "{}", refused.stderr());
    assert!(!destination.image.exists(), "serve would take the empty image for a disk");

    image(&destination, b"");
    let mut listener = destination.mode("listen").args(["--no-record"]).start();
    let mut server = source.serve();
    mount.free();
    assert_eq!(source.mirror_to(destination.address, &[]), MIRROR_STARTED);
    assert!(server.wait_for_end().success(), "{}", server.stderr());
    assert!(listener.wait_for_end().success(), "{}", listener.stderr());
}

/// The attribute has space for a short record, but not for the longest.
#[test]
fn a_disk_received_without_record_space_is_served() {
    let directory = temp_dir_in("/var/tmp");
    let Some(mount) = Mount::ext4(directory.path(), 256) else { return };
    let (destination, source) = hosts(directory.path(), &mount.root);
    let destination = destination.env("STATE_DIRECTORY", UNUSABLE);
    let bytes = fs::metadata(&destination.image).unwrap().len();
    write_at(&destination.image, 0, &noise(usize::try_from(bytes).unwrap(), 1));
    xattr::set(&destination.image, "user.flexnbd", b"flexnbd 1 incoming id=-\n").unwrap();
    mount.fill();
    let mut listener = destination.mode("listen").args(["--no-record"]).start();
    let mut server = source.serve();
    assert_eq!(source.mirror_to(destination.address, &[]), MIRROR_STARTED);
    assert!(server.wait_for_end().success(), "{}", server.stderr());
    assert!(listener.wait_for_end().success(), "{}", listener.stderr());
    let message = listener.stderr();
    assert!(message.contains("without an ownership record"), "there was space: {message}");
    assert_eq!((source.record(), destination.record()), ("departed".into(), "ours".into()));
    drop(destination.serve());
}

/// The file system fills up after the migration has begun.
#[test]
fn a_late_record_failure_ends_the_migration() {
    let directory = temp_dir_in("/var/tmp");
    let Some(mount) = Mount::ext4(directory.path(), 128) else { return };
    let (source, destination) = hosts(directory.path(), &mount.root);
    let source = source.env("STATE_DIRECTORY", UNUSABLE);
    write_at(&source.image, 0, &noise(2 * MIB as usize, 1));
    mount.fill();
    let (mut server, _listener) = (source.serve(), destination.listen());
    server.wait_for_stderr("proxies cannot recognize the disk by an id");
    mount.free();
    assert_eq!(
        source.mirror_to(destination.address, &["exit", "0.0.0.0", "300000"]),
        MIRROR_STARTED
    );
    mount.fill();
    source.command(&["mirror_max_bps", "0"]);
    server.wait_for_stderr("the ownership record cannot be kept");
    let ended = poll_until(TIMEOUT, || source.status_of("is_mirroring") == "false");
    assert!(ended, "the migration goes on: {}", server.stderr());
    let status = source.status();
    assert!(status["migration_failed"].contains("record"), "{status:?}");
    assert_eq!(status["ownership"], "none");
    assert!(server.is_running());
    let mut wire = harness::raw::Wire::haggle(server.endpoint(), 3);
    wire.assert_haggling_in_sync();
    mount.free();
    assert_eq!(source.mirror_to(destination.address, &[]), MIRROR_STARTED);
    assert!(server.wait_for_end().success(), "{}", server.stderr());
    assert_eq!(source.record(), "departed");
}

/// The destination's file system fills up after `listen` has started: `listen` exits with an error, and
/// the source goes on serving.
#[test]
fn a_destination_without_record_space_exits_with_1() {
    let directory = temp_dir_in("/var/tmp");
    let Some(mount) = Mount::ext4(directory.path(), 128) else { return };
    let (destination, source) = hosts(directory.path(), &mount.root);
    let destination = destination.env("STATE_DIRECTORY", UNUSABLE);
    let (server, mut listener) = (source.serve(), destination.listen());
    mount.fill();
    assert_eq!(source.mirror_to(destination.address, &[]), MIRROR_STARTED);
    assert_eq!(listener.wait_for_end().code(), Some(1), "{}", listener.stderr());
    let message = listener.stderr();
    assert!(message.contains("no ownership record can be kept of"), "{message}");
    assert_eq!(source.status_of("is_mirroring"), "true", "the source retries");
    mount.free();
    let (mut server, mut listener) = (server, destination.listen());
    assert!(server.wait_for_end().success(), "{}", server.stderr());
    assert!(listener.wait_for_end().success(), "{}", listener.stderr());
    assert_eq!((source.record(), destination.record()), ("departed".into(), "ours".into()));
}

/// The attribute cannot be changed (EIO): the new record goes to the state directory, and takes
/// precedence over the stale attribute.
#[test]
fn a_record_in_the_state_directory_overrides_the_attribute() {
    if !require_tool("cc") {
        return;
    }
    let directory = temp_dir_in("/var/tmp");
    let launcher = compile(directory.path(), "tests/record/failing_attributes.c", &[]);
    let launcher = [launcher.to_str().unwrap()];
    let (source, destination) =
        (Host::new(directory.path(), "a"), Host::new(directory.path(), "b"));
    image(&source, b"precious");
    image(&destination, b"old bytes");
    xattr::set(&source.image, "user.flexnbd", b"flexnbd 1 ours title=adopted\n").unwrap();
    let failing = source.clone().through(&launcher);
    let mut server = failing.clone().env("STATE_DIRECTORY", UNUSABLE).serve();
    let mut listener = destination.clone().through(&launcher).listen();
    let reply = source.mirror_to(destination.address, &[]);
    assert!(reply.contains("no ownership record can be kept") && reply.contains("(os error 5)"));
    assert!(server.stop().success());

    let mut server = failing.serve();
    assert_eq!(source.mirror_to(destination.address, &[]), MIRROR_STARTED);
    assert!(server.wait_for_end().success(), "{}", server.stderr());
    assert!(listener.wait_for_end().success(), "{}", listener.stderr());
    assert_eq!((source.record(), destination.record()), ("departed".into(), "ours".into()));
    let attribute = xattr::get(&source.image, "user.flexnbd").unwrap().unwrap();
    assert!(attribute.starts_with(b"flexnbd 1 ours"), "{}", attribute.escape_ascii());
    let message = assert_serve_refused(&source);
    assert!(message.contains("has moved to"), "{message}");
    drop(destination.serve());
}
