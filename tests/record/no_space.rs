//! Records where there is no room for them: kept elsewhere, or the order is refused.

use crate::medium::Medium;
use crate::{image, refused_by_serve};
use harness::host::{Host, MIRROR_STARTED};
use harness::{
    Endpoint, MIB, TIMEOUT, compile, noise, poll_until, read_at, require_tool, temp_dir_in,
    write_at,
};
use std::fs;
use std::path::Path;

/// A directory that nothing can be made in.
const NOWHERE: &str = "/dev/null/flexnbd";

fn hosts(directory: &Path, root: &Path) -> (Host, Host) {
    let (mut from, to) = (Host::new(root, "a"), Host::new(directory, "b"));
    from.control = directory.join("a.sock");
    image(&from, b"precious");
    image(&to, b"old bytes");
    (from, to)
}

/// On a full file system the record goes to the state directory, and holds.
fn moves_from_a_full_disk(inode_bytes: u32) {
    let directory = temp_dir_in("/var/tmp");
    let Some(medium) = Medium::ext4(directory.path(), inode_bytes) else { return };
    let (from, to) = hosts(directory.path(), &medium.root);
    let state = directory.path().join("state");
    fs::create_dir(&state).unwrap();
    let from = from.env("STATE_DIRECTORY", state.to_str().unwrap());
    let (mut serving, mut listening) = (from.serve(), to.listen());
    medium.fill();
    assert_eq!(from.mirror_to(to.address, &[]), MIRROR_STARTED);
    assert!(serving.wait_for_end().success(), "{}", serving.stderr());
    assert!(listening.wait_for_end().success(), "{}", listening.stderr());
    assert_eq!(read_at(&to.image, 0, 8), b"precious");
    let told = refused_by_serve(&from);
    assert!(told.contains("has moved to"), "{told}");
    let kept: Vec<_> = fs::read_dir(&state).unwrap().map(|e| e.unwrap().path()).collect();
    assert_eq!(kept.len(), 1, "one record and nothing else: {kept:?}");
    assert!(fs::read_to_string(&kept[0]).unwrap().starts_with("flexnbd 1 departed "));
}

#[test]
fn a_full_disk_is_recorded_in_the_state_directory() {
    moves_from_a_full_disk(256);
}

#[test]
fn small_inodes_on_a_full_disk_are_recorded_too() {
    moves_from_a_full_disk(128);
}

#[test]
fn mirror_is_refused_when_no_record_can_be_kept() {
    let directory = temp_dir_in("/var/tmp");
    let Some(medium) = Medium::ext4(directory.path(), 128) else { return };
    let (from, to) = hosts(directory.path(), &medium.root);
    let from = from.env("STATE_DIRECTORY", NOWHERE);
    let (mut serving, mut listening) = (from.serve(), to.listen());
    medium.fill();
    for action in ["exit", "unlink"] {
        let reply = from.mirror_to(to.address, &[action]);
        assert!(reply.starts_with("1: no ownership record can be kept"), "{reply}");
        assert!(reply.contains("user.flexnbd") && reply.contains(NOWHERE), "{reply}");
        assert!(reply.contains("--no-record"), "{reply}");
    }
    assert_eq!(from.status_of("is_mirroring"), "false");
    assert!(serving.is_running() && listening.is_running());

    // An operator's explicit word.
    let to_address = to.address;
    let reply = from.mirror_to(to_address, &["exit", "0.0.0.0", "0", "no-record"]);
    assert_eq!(reply, MIRROR_STARTED);
    assert!(serving.wait_for_end().success(), "{}", serving.stderr());
    assert!(serving.stderr().contains("without an ownership record"), "{}", serving.stderr());
    assert!(listening.wait_for_end().success(), "{}", listening.stderr());
    // Which is what it costs.
    assert_eq!(from.record(), "");
    drop(from.serve());
}

#[test]
fn listen_is_refused_when_no_record_can_be_kept() {
    let directory = temp_dir_in("/var/tmp");
    let Some(medium) = Medium::ext4(directory.path(), 128) else { return };
    let (to, from) = hosts(directory.path(), &medium.root);
    medium.fill();
    let to = to.env("STATE_DIRECTORY", NOWHERE);
    let place = || Endpoint::Tcp(to.address);
    let mut refused = to.mode("listen").at(place()).spawn();
    assert_eq!(refused.wait_for_end().code(), Some(78), "{}", refused.stderr());
    assert!(refused.stderr().contains("--no-record"), "{}", refused.stderr());

    // An image that is made has to be recorded at once, and is not left behind without.
    fs::remove_file(&to.image).unwrap();
    let mut refused = to.mode("listen").args(["--create", "4M"]).at(place()).spawn();
    assert_eq!(refused.wait_for_end().code(), Some(78), "{}", refused.stderr());
    assert!(!to.image.exists(), "an empty image that serve would take for a disk");

    image(&to, b"");
    let mut listening = to.mode("listen").args(["--no-record"]).start();
    let mut serving = from.serve();
    medium.empty();
    assert_eq!(from.mirror_to(to.address, &[]), MIRROR_STARTED);
    assert!(serving.wait_for_end().success(), "{}", serving.stderr());
    assert!(listening.wait_for_end().success(), "{}", listening.stderr());
}

/// There is room for a short record, and none for the largest.
#[test]
fn a_disk_received_without_room_is_served() {
    let directory = temp_dir_in("/var/tmp");
    let Some(medium) = Medium::ext4(directory.path(), 256) else { return };
    let (to, from) = hosts(directory.path(), &medium.root);
    let to = to.env("STATE_DIRECTORY", NOWHERE);
    let bytes = fs::metadata(&to.image).unwrap().len();
    write_at(&to.image, 0, &noise(usize::try_from(bytes).unwrap(), 1));
    xattr::set(&to.image, "user.flexnbd", b"flexnbd 1 incoming id=-\n").unwrap();
    medium.fill();
    let mut listening = to.mode("listen").args(["--no-record"]).start();
    let mut serving = from.serve();
    assert_eq!(from.mirror_to(to.address, &[]), MIRROR_STARTED);
    assert!(serving.wait_for_end().success(), "{}", serving.stderr());
    assert!(listening.wait_for_end().success(), "{}", listening.stderr());
    let told = listening.stderr();
    assert!(told.contains("without an ownership record"), "there was room: {told}");
    assert_eq!((from.record(), to.record()), ("departed".into(), "ours".into()));
    drop(to.serve());
}

/// The record could be kept when the migration began, and cannot when it is to be written.
#[test]
fn a_record_that_fails_later_ends_the_migration() {
    let directory = temp_dir_in("/var/tmp");
    let Some(medium) = Medium::ext4(directory.path(), 128) else { return };
    let (from, to) = hosts(directory.path(), &medium.root);
    let from = from.env("STATE_DIRECTORY", NOWHERE);
    harness::write_at(&from.image, 0, &harness::noise(2 * MIB as usize, 1));
    let (mut serving, _listening) = (from.serve(), to.listen());
    assert_eq!(from.mirror_to(to.address, &["exit", "0.0.0.0", "300000"]), MIRROR_STARTED);
    medium.fill();
    from.command(&["mirror_max_bps", "0"]);
    serving.wait_for_stderr("the ownership record cannot be kept");
    let over = poll_until(TIMEOUT, || from.status_of("is_mirroring") == "false");
    assert!(over, "it is tried again: {}", serving.stderr());
    let status = from.status();
    assert!(status["migration_failed"].contains("record"), "{status:?}");
    assert_eq!(status["ownership"], "none");
    assert!(serving.is_running());
    let mut wire = harness::raw::Wire::haggle(serving.endpoint(), 3);
    wire.assert_haggling_in_sync();
    medium.empty();
    assert_eq!(from.mirror_to(to.address, &[]), MIRROR_STARTED);
    assert!(serving.wait_for_end().success(), "{}", serving.stderr());
    assert_eq!(from.record(), "departed");
}

/// The same at the destination: it ends with an error, and the source serves on.
#[test]
fn a_destination_that_cannot_record_ends_with_an_error() {
    let directory = temp_dir_in("/var/tmp");
    let Some(medium) = Medium::ext4(directory.path(), 128) else { return };
    let (to, from) = hosts(directory.path(), &medium.root);
    let to = to.env("STATE_DIRECTORY", NOWHERE);
    let (serving, mut listening) = (from.serve(), to.listen());
    medium.fill();
    assert_eq!(from.mirror_to(to.address, &[]), MIRROR_STARTED);
    assert_eq!(listening.wait_for_end().code(), Some(1), "{}", listening.stderr());
    let told = listening.stderr();
    assert!(told.contains("no ownership record can be kept of"), "{told}");
    assert_eq!(from.status_of("is_mirroring"), "true", "it tries again");
    medium.empty();
    let (mut serving, mut listening) = (serving, to.listen());
    assert!(serving.wait_for_end().success(), "{}", serving.stderr());
    assert!(listening.wait_for_end().success(), "{}", listening.stderr());
    assert_eq!((from.record(), to.record()), ("departed".into(), "ours".into()));
}

/// An error that is not about room: the record goes to the state directory, and wins over what the
/// attribute still says.
#[test]
fn an_attribute_that_cannot_be_changed_does_not_count() {
    if !require_tool("cc") {
        return;
    }
    let directory = temp_dir_in("/var/tmp");
    let launcher = compile(directory.path(), "tests/record/failing_attributes.c", &[]);
    let launcher = [launcher.to_str().unwrap()];
    let (from, to) = (Host::new(directory.path(), "a"), Host::new(directory.path(), "b"));
    image(&from, b"precious");
    image(&to, b"old bytes");
    xattr::set(&from.image, "user.flexnbd", b"flexnbd 1 ours title=adopted\n").unwrap();
    let failing = from.clone().through(&launcher);
    let mut serving = failing.clone().env("STATE_DIRECTORY", NOWHERE).serve();
    let mut listening = to.clone().through(&launcher).listen();
    let reply = from.mirror_to(to.address, &[]);
    assert!(reply.contains("no ownership record can be kept") && reply.contains("(os error 5)"));
    assert!(serving.stop().success());

    let mut serving = failing.serve();
    assert_eq!(from.mirror_to(to.address, &[]), MIRROR_STARTED);
    assert!(serving.wait_for_end().success(), "{}", serving.stderr());
    assert!(listening.wait_for_end().success(), "{}", listening.stderr());
    assert_eq!((from.record(), to.record()), ("departed".into(), "ours".into()));
    let attribute = xattr::get(&from.image, "user.flexnbd").unwrap().unwrap();
    assert!(attribute.starts_with(b"flexnbd 1 ours"), "{}", attribute.escape_ascii());
    let told = refused_by_serve(&from);
    assert!(told.contains("has moved to"), "{told}");
    drop(to.serve());
}
