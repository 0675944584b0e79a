//! Images that are renamed, replaced or hidden while served: record and deletion apply to the served
//! file, never to another file that now has its path.

use crate::mount::Mount;
use crate::{SIZE, assert_serve_refused, image};
use harness::host::{Host, MIRROR_STARTED};
use harness::{Server, read_at, run, sparse_image, temp_dir_in, write_at};
use std::fs;
use std::path::{Path, PathBuf};

struct Pair {
    source: Host,
    destination: Host,
    server: Server,
    listener: Server,
    directory: tempfile::TempDir,
}

fn pair() -> Pair {
    let directory = temp_dir_in("/var/tmp");
    let (source, destination) =
        (Host::new(directory.path(), "a"), Host::new(directory.path(), "b"));
    image(&source, b"precious");
    image(&destination, b"old bytes");
    let (server, listener) = (source.serve(), destination.listen());
    Pair { source, destination, server, listener, directory }
}

impl Pair {
    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Migrates the disk and waits for both processes to exit.
    #[track_caller]
    fn migrate(&mut self, action: &str) {
        assert_eq!(self.source.mirror_to(self.destination.address, &[action]), MIRROR_STARTED);
        assert!(self.server.wait_for_end().success(), "{}", self.server.stderr());
        assert!(self.listener.wait_for_end().success(), "{}", self.listener.stderr());
        assert_eq!(read_at(&self.destination.image, 0, 8), b"precious");
    }

    /// Asserts that `mirror` with `unlink` is refused for this reason and changes nothing.
    #[track_caller]
    fn assert_unlink_refused(&mut self, why: &str) {
        let reply = self.source.mirror_to(self.destination.address, &["unlink"]);
        assert!(reply.starts_with("1: ") && reply.contains(why), "{reply}");
        assert_eq!(self.source.status_of("is_mirroring"), "false");
        assert!(self.server.is_running() && self.listener.is_running());
    }
}

fn record_of(image: &Path) -> Option<String> {
    let bytes = xattr::get(image, "user.flexnbd").unwrap()?;
    Some(String::from_utf8(bytes).unwrap().split(' ').nth(2).unwrap().to_owned())
}

#[test]
fn a_renamed_image_is_recorded_as_departed() {
    let mut pair = pair();
    let elsewhere = pair.path("elsewhere.img");
    fs::rename(&pair.source.image, &elsewhere).unwrap();
    image(&pair.source, b"new file");
    pair.migrate("exit");
    assert!(pair.server.stderr().contains("names another file now"), "{}", pair.server.stderr());
    assert_eq!(record_of(&elsewhere).as_deref(), Some("departed"));
    assert_eq!(record_of(&pair.source.image), None);
    drop(pair.source.serve());
    let mut moved = pair.source.clone();
    moved.image = elsewhere;
    assert_serve_refused(&moved);
}

#[test]
fn unlink_of_a_replaced_image_is_refused() {
    let mut pair = pair();
    fs::rename(&pair.source.image, pair.path("elsewhere.img")).unwrap();
    pair.assert_unlink_refused("names no file any more");
    image(&pair.source, b"new file");
    pair.assert_unlink_refused("names another file now");
    assert_eq!(read_at(&pair.source.image, 0, 8), b"new file");
    fs::rename(pair.path("elsewhere.img"), &pair.source.image).unwrap();
    pair.migrate("unlink");
    assert!(!pair.source.image.exists());
}

#[test]
fn unlink_of_an_image_with_two_names_is_refused() {
    let mut pair = pair();
    fs::hard_link(&pair.source.image, pair.path("other.img")).unwrap();
    pair.assert_unlink_refused("2 names");
    fs::remove_file(pair.path("other.img")).unwrap();
    pair.migrate("unlink");
}

#[test]
fn unlink_follows_a_link_to_the_served_image_only() {
    let directory = temp_dir_in("/var/tmp");
    let (source, destination) =
        (Host::new(directory.path(), "a"), Host::new(directory.path(), "b"));
    let real = sparse_image(directory.path(), "real.img", SIZE);
    write_at(&real, 0, b"precious");
    let unrelated = sparse_image(directory.path(), "unrelated.img", SIZE);
    std::os::unix::fs::symlink(&real, &source.image).unwrap();
    image(&destination, b"old bytes");
    let (server, listener) = (source.serve(), destination.listen());
    let mut pair = Pair { source, destination, server, listener, directory };
    let relink = |path: &Path| {
        fs::remove_file(&pair.source.image).unwrap();
        std::os::unix::fs::symlink(path, &pair.source.image).unwrap();
    };
    relink(&unrelated);
    pair.assert_unlink_refused("names another file now");
    assert!(unrelated.exists() && real.exists());
    fs::remove_file(&pair.source.image).unwrap();
    std::os::unix::fs::symlink(&real, &pair.source.image).unwrap();
    pair.migrate("unlink");
    assert!(!real.exists() && unrelated.exists(), "the image is deleted, not only the link");
}

#[test]
fn unlink_under_a_bind_mount_is_refused() {
    let mut pair = pair();
    let unrelated = sparse_image(pair.directory.path(), "unrelated.img", SIZE);
    let Some(mount) = Mount::new(&["--bind"], &[&unrelated], &pair.source.image) else { return };
    pair.assert_unlink_refused("names another file now");
    drop(mount);
    pair.migrate("unlink");
    assert!(unrelated.exists());
}

#[test]
fn a_deleted_image_can_still_be_moved() {
    let mut pair = pair();
    fs::remove_file(&pair.source.image).unwrap();
    image(&pair.source, b"new file");
    pair.assert_unlink_refused("names another file now");
    pair.migrate("exit");
    assert_eq!(record_of(&pair.source.image), None);
    assert_eq!(read_at(&pair.source.image, 0, 8), b"new file");
}

#[test]
fn an_overlay_keeps_the_record_of_the_copied_up_image() {
    let directory = temp_dir_in("/var/tmp");
    let path = |name: &str| directory.path().join(name);
    for name in ["lower", "upper", "work", "root"] {
        fs::create_dir(path(name)).unwrap();
    }
    let lower = sparse_image(&path("lower"), "a.img", SIZE);
    write_at(&lower, 0, b"precious");
    let layers = ["lower", "upper", "work"].map(|name| path(name).display().to_string());
    let [lower_dir, upper, work] = &layers;
    let options = format!("lowerdir={lower_dir},upperdir={upper},workdir={work}");
    let options = ["-t", "overlay", "overlay", "-o", &options];
    let Some(_mount) = Mount::new(&options, &[], &path("root")) else { return };
    let (mut source, destination) =
        (Host::new(&path("root"), "a"), Host::new(directory.path(), "b"));
    source.control = path("a.sock");
    image(&destination, b"old bytes");
    let (server, listener) = (source.serve(), destination.listen());
    let mut pair = Pair { source, destination, server, listener, directory };
    pair.migrate("exit");
    assert_serve_refused(&pair.source);
    assert_eq!(record_of(&lower), None);
}

/// The source's image is on a full file system whose inodes have no space for attributes, so that
/// its record is in the state directory. Returns that directory last.
fn pair_without_attribute_space() -> Option<(Pair, Mount, PathBuf)> {
    let directory = temp_dir_in("/var/tmp");
    let mount = Mount::ext4(directory.path(), 128)?;
    let (mut source, destination) = (Host::new(&mount.root, "a"), Host::new(directory.path(), "b"));
    source.control = directory.path().join("a.sock");
    let state = directory.path().join("state");
    let source = source.env("STATE_DIRECTORY", state.to_str().unwrap());
    image(&source, b"precious");
    image(&destination, b"old bytes");
    sparse_image(&mount.root, "unrelated.img", SIZE);
    mount.fill();
    let (server, listener) = (source.serve(), destination.listen());
    Some((Pair { source, destination, server, listener, directory }, mount, state))
}

#[test]
fn mirror_is_refused_if_the_recorded_path_changed() {
    let Some((mut pair, mount, state)) = pair_without_attribute_space() else { return };
    let elsewhere = mount.root.join("elsewhere.img");
    fs::rename(&pair.source.image, &elsewhere).unwrap();
    fs::rename(mount.root.join("unrelated.img"), &pair.source.image).unwrap();
    for action in ["exit", "unlink"] {
        pair.assert_unlink_refused("names another file now");
        let reply = pair.source.mirror_to(pair.destination.address, &[action]);
        assert!(reply.starts_with("1: "), "{reply}");
    }
    let records = fs::read_dir(&state).map_or(0, Iterator::count);
    assert_eq!(records, 0, "a record was written for the unrelated image");
}

#[test]
fn a_record_in_the_state_directory_follows_its_file() {
    let Some((mut pair, mount, _state)) = pair_without_attribute_space() else { return };
    pair.migrate("exit");
    let mut moved = pair.source.clone();
    moved.image = mount.root.join("elsewhere.img");
    fs::rename(&pair.source.image, &moved.image).unwrap();
    fs::rename(mount.root.join("unrelated.img"), &pair.source.image).unwrap();
    let message = assert_serve_refused(&moved);
    assert!(message.contains("has moved to"), "{message}");
    drop(pair.source.serve());
    fs::hard_link(&moved.image, mount.root.join("third.img")).unwrap();
    moved.image = mount.root.join("third.img");
    assert_serve_refused(&moved);
    // Now two files of the same name have a record each.
    let mut listener = pair.source.listen();
    assert!(!listener.stop().success());
    assert_serve_refused(&moved);
}

#[test]
fn another_device_under_the_same_name_is_refused() {
    let directory = temp_dir_in("/var/tmp");
    if !harness::require_root("a loop device") {
        return;
    }
    let (mut source, destination) =
        (Host::new(directory.path(), "a"), Host::new(directory.path(), "b"));
    let mut devices = Vec::new();
    for name in ["one", "two"] {
        devices.push(LoopDevice::of(&sparse_image(directory.path(), name, SIZE)));
    }
    source.image = directory.path().join("node");
    let make_node = |device: &LoopDevice| {
        use std::os::unix::fs::MetadataExt as _;
        let number = fs::metadata(&device.0).unwrap().rdev();
        let (major, minor) = (nix::sys::stat::major(number), nix::sys::stat::minor(number));
        let _ = fs::remove_file(&source.image);
        let path = source.image.to_str().unwrap();
        run("mknod", &[path, "b", &major.to_string(), &minor.to_string()]);
    };
    make_node(&devices[0]);
    image(&destination, b"old bytes");
    let (mut server, mut listener) = (source.serve(), destination.listen());
    make_node(&devices[1]);
    let reply = source.mirror_to(destination.address, &[]);
    assert!(reply.starts_with("1: ") && reply.contains("names another device now"), "{reply}");
    make_node(&devices[0]);
    assert_eq!(source.mirror_to(destination.address, &[]), MIRROR_STARTED);
    assert!(server.wait_for_end().success() && listener.wait_for_end().success());
    assert_serve_refused(&source);
    // The record follows the device: another path to it is refused, another device at the old path
    // is served.
    let mut named = source.clone();
    named.image = devices[0].0.clone().into();
    assert_serve_refused(&named);
    make_node(&devices[1]);
    drop(source.serve());
}

/// A loop device; detached when dropped.
pub(crate) struct LoopDevice(pub(crate) String);

impl LoopDevice {
    pub(crate) fn of(file: &Path) -> LoopDevice {
        let device = run("losetup", &["--show", "-f", file.to_str().unwrap()]);
        LoopDevice(device.trim().to_owned())
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = std::process::Command::new("losetup").args(["-d", &self.0]).status();
    }
}
