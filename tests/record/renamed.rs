//! Images that are renamed, replaced or hidden while they are served: the record and the deletion
//! are those of the file that is served, never of what has its name now.

use crate::medium::Medium;
use crate::{SIZE, image, refused_by_serve};
use harness::host::{Host, MIRROR_STARTED};
use harness::{Server, read_at, run, sparse_image, temp_dir_in, write_at};
use std::fs;
use std::path::{Path, PathBuf};

struct Pair {
    from: Host,
    to: Host,
    serving: Server,
    listening: Server,
    directory: tempfile::TempDir,
}

fn pair() -> Pair {
    let directory = temp_dir_in("/var/tmp");
    let (from, to) = (Host::new(directory.path(), "a"), Host::new(directory.path(), "b"));
    image(&from, b"precious");
    image(&to, b"old bytes");
    let (serving, listening) = (from.serve(), to.listen());
    Pair { from, to, serving, listening, directory }
}

impl Pair {
    fn beside(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    #[track_caller]
    fn moves(&mut self, action: &str) {
        assert_eq!(self.from.mirror_to(self.to.address, &[action]), MIRROR_STARTED);
        assert!(self.serving.wait_for_end().success(), "{}", self.serving.stderr());
        assert!(self.listening.wait_for_end().success(), "{}", self.listening.stderr());
        assert_eq!(read_at(&self.to.image, 0, 8), b"precious");
    }

    /// Deleting is refused, with these words, and changes nothing.
    #[track_caller]
    fn keeps(&mut self, words: &str) {
        let reply = self.from.mirror_to(self.to.address, &["unlink"]);
        assert!(reply.starts_with("1: ") && reply.contains(words), "{reply}");
        assert_eq!(self.from.status_of("is_mirroring"), "false");
        assert!(self.serving.is_running() && self.listening.is_running());
    }
}

fn record_of(image: &Path) -> Option<String> {
    let bytes = xattr::get(image, "user.flexnbd").unwrap()?;
    Some(String::from_utf8(bytes).unwrap().split(' ').nth(2).unwrap().to_owned())
}

#[test]
fn a_renamed_image_is_the_one_recorded_departed() {
    let mut pair = pair();
    let elsewhere = pair.beside("elsewhere.img");
    fs::rename(&pair.from.image, &elsewhere).unwrap();
    image(&pair.from, b"innocent");
    pair.moves("exit");
    assert!(pair.serving.stderr().contains("names another file now"), "{}", pair.serving.stderr());
    assert_eq!(record_of(&elsewhere).as_deref(), Some("departed"));
    assert_eq!(record_of(&pair.from.image), None);
    drop(pair.from.serve());
    let mut moved = pair.from.clone();
    moved.image = elsewhere;
    refused_by_serve(&moved);
}

#[test]
fn unlink_of_a_replaced_image_is_refused() {
    let mut pair = pair();
    fs::rename(&pair.from.image, pair.beside("elsewhere.img")).unwrap();
    pair.keeps("names no file any more");
    image(&pair.from, b"innocent");
    pair.keeps("names another file now");
    assert_eq!(read_at(&pair.from.image, 0, 8), b"innocent");
    fs::rename(pair.beside("elsewhere.img"), &pair.from.image).unwrap();
    pair.moves("unlink");
    assert!(!pair.from.image.exists());
}

#[test]
fn unlink_of_an_image_with_two_names_is_refused() {
    let mut pair = pair();
    fs::hard_link(&pair.from.image, pair.beside("other.img")).unwrap();
    pair.keeps("2 names");
    fs::remove_file(pair.beside("other.img")).unwrap();
    pair.moves("unlink");
}

#[test]
fn unlink_follows_a_link_to_the_served_image_only() {
    let directory = temp_dir_in("/var/tmp");
    let (from, to) = (Host::new(directory.path(), "a"), Host::new(directory.path(), "b"));
    let real = sparse_image(directory.path(), "real.img", SIZE);
    write_at(&real, 0, b"precious");
    let innocent = sparse_image(directory.path(), "innocent.img", SIZE);
    std::os::unix::fs::symlink(&real, &from.image).unwrap();
    image(&to, b"old bytes");
    let (serving, listening) = (from.serve(), to.listen());
    let mut pair = Pair { from, to, serving, listening, directory };
    let target = |path: &Path| {
        fs::remove_file(&pair.from.image).unwrap();
        std::os::unix::fs::symlink(path, &pair.from.image).unwrap();
    };
    target(&innocent);
    pair.keeps("names another file now");
    assert!(innocent.exists() && real.exists());
    fs::remove_file(&pair.from.image).unwrap();
    std::os::unix::fs::symlink(&real, &pair.from.image).unwrap();
    pair.moves("unlink");
    assert!(!real.exists() && innocent.exists(), "the image goes, not its name alone");
}

#[test]
fn unlink_below_a_bind_mount_is_refused() {
    let mut pair = pair();
    let innocent = sparse_image(pair.directory.path(), "innocent.img", SIZE);
    let Some(mount) = Medium::mount(&["--bind"], &[&innocent], &pair.from.image) else { return };
    pair.keeps("names another file now");
    drop(mount);
    pair.moves("unlink");
    assert!(innocent.exists());
}

#[test]
fn a_deleted_image_can_still_be_moved() {
    let mut pair = pair();
    fs::remove_file(&pair.from.image).unwrap();
    image(&pair.from, b"innocent");
    pair.keeps("names another file now");
    pair.moves("exit");
    assert_eq!(record_of(&pair.from.image), None);
    assert_eq!(read_at(&pair.from.image, 0, 8), b"innocent");
}

#[test]
fn an_overlay_keeps_the_record_of_the_copied_up_image() {
    let directory = temp_dir_in("/var/tmp");
    let place = |name: &str| directory.path().join(name);
    for name in ["lower", "upper", "work", "root"] {
        fs::create_dir(place(name)).unwrap();
    }
    let lower = sparse_image(&place("lower"), "a.img", SIZE);
    write_at(&lower, 0, b"precious");
    let options = ["lower", "upper", "work"].map(|name| place(name).display().to_string());
    let [lower_dir, upper, work] = &options;
    let options = format!("lowerdir={lower_dir},upperdir={upper},workdir={work}");
    let words = ["-t", "overlay", "overlay", "-o", &options];
    let Some(_mount) = Medium::mount(&words, &[], &place("root")) else { return };
    let (mut from, to) = (Host::new(&place("root"), "a"), Host::new(directory.path(), "b"));
    from.control = place("a.sock");
    image(&to, b"old bytes");
    let (serving, listening) = (from.serve(), to.listen());
    let mut pair = Pair { from, to, serving, listening, directory };
    pair.moves("exit");
    refused_by_serve(&pair.from);
    assert_eq!(record_of(&lower), None);
}

/// A full disk with the smallest inodes: records are in the state directory.
fn unattributed() -> Option<(Pair, Medium, PathBuf)> {
    let directory = temp_dir_in("/var/tmp");
    let medium = Medium::ext4(directory.path(), 128)?;
    let (mut from, to) = (Host::new(&medium.root, "a"), Host::new(directory.path(), "b"));
    from.control = directory.path().join("a.sock");
    let state = directory.path().join("state");
    let from = from.env("STATE_DIRECTORY", state.to_str().unwrap());
    image(&from, b"precious");
    image(&to, b"old bytes");
    harness::sparse_image(&medium.root, "innocent.img", SIZE);
    let (serving, listening) = (from.serve(), to.listen());
    medium.fill();
    Some((Pair { from, to, serving, listening, directory }, medium, state))
}

#[test]
fn a_record_named_after_the_path_needs_the_path() {
    let Some((mut pair, medium, state)) = unattributed() else { return };
    let elsewhere = medium.root.join("elsewhere.img");
    fs::rename(&pair.from.image, &elsewhere).unwrap();
    fs::rename(medium.root.join("innocent.img"), &pair.from.image).unwrap();
    for action in ["exit", "unlink"] {
        pair.keeps("names another file now");
        let reply = pair.from.mirror_to(pair.to.address, &[action]);
        assert!(reply.starts_with("1: "), "{reply}");
    }
    let left = fs::read_dir(&state).map_or(0, Iterator::count);
    assert_eq!(left, 0, "something was written for the innocent");
}

#[test]
fn a_record_in_the_state_directory_follows_its_file() {
    let Some((mut pair, medium, _state)) = unattributed() else { return };
    pair.moves("exit");
    let mut moved = pair.from.clone();
    moved.image = medium.root.join("elsewhere.img");
    fs::rename(&pair.from.image, &moved.image).unwrap();
    fs::rename(medium.root.join("innocent.img"), &pair.from.image).unwrap();
    let told = refused_by_serve(&moved);
    assert!(told.contains("has moved to"), "{told}");
    drop(pair.from.serve());
    fs::hard_link(&moved.image, medium.root.join("third.img")).unwrap();
    moved.image = medium.root.join("third.img");
    refused_by_serve(&moved);
    // Two files of one name, each with its record.
    let mut listening = pair.from.listen();
    assert!(!listening.stop().success());
    refused_by_serve(&moved);
}

#[test]
fn another_device_under_the_same_name_is_refused() {
    let directory = temp_dir_in("/var/tmp");
    if !harness::require_root("a loop device") {
        return;
    }
    let (mut from, to) = (Host::new(directory.path(), "a"), Host::new(directory.path(), "b"));
    let mut devices = Vec::new();
    for name in ["one", "two"] {
        let file = sparse_image(directory.path(), name, SIZE);
        let device = run("losetup", &["--show", "-f", file.to_str().unwrap()]);
        devices.push(Loop(device.trim().to_owned()));
    }
    from.image = directory.path().join("node");
    let node = |device: &Loop| {
        use std::os::unix::fs::MetadataExt as _;
        let number = fs::metadata(&device.0).unwrap().rdev();
        let (major, minor) = (nix::sys::stat::major(number), nix::sys::stat::minor(number));
        let _ = fs::remove_file(&from.image);
        let path = from.image.to_str().unwrap();
        run("mknod", &[path, "b", &major.to_string(), &minor.to_string()]);
    };
    node(&devices[0]);
    image(&to, b"old bytes");
    let (mut serving, mut listening) = (from.serve(), to.listen());
    node(&devices[1]);
    let reply = from.mirror_to(to.address, &[]);
    assert!(reply.starts_with("1: ") && reply.contains("names another device now"), "{reply}");
    node(&devices[0]);
    assert_eq!(from.mirror_to(to.address, &[]), MIRROR_STARTED);
    assert!(serving.wait_for_end().success() && listening.wait_for_end().success());
    refused_by_serve(&from);
    // Under another name it is the same device, and under the old name another one is not.
    let mut named = from.clone();
    named.image = devices[0].0.clone().into();
    refused_by_serve(&named);
    node(&devices[1]);
    drop(from.serve());
}

struct Loop(String);

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = std::process::Command::new("losetup").args(["-d", &self.0]).status();
    }
}
