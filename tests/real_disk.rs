//! An ext4 file system with a directory tree: served, copied, mapped, and mounted for a workload.
//! Copies are compared by other programs, never through the server alone.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests and their helpers fail by panicking")]

use harness::mount::{Loop, Mount, mount_nbd_as_file};
use harness::{
    MIB, Program, Served, Style, TempDir, Transport, allocated, noise, project_path, require_tools,
    run, skip, sparse_image, temp_dir,
};
use std::fs::{self, File};
use std::path::{Path, PathBuf};

const IMAGE_SIZE: u64 = 160 * MIB;

/// Bytes that a copy may have allocated in excess of its original: block maps differ by file
/// system.
const ALLOCATION_SLACK: u64 = MIB;

/// Creates a tree of about 40 MiB: the sources of flexnbd, and files of sizes near block
/// boundaries.
fn create_tree(root: &Path) {
    copy_tree(&project_path("src"), &root.join("src"));
    for (i, size) in [0, 1, 511, 512, 4095, 4096, 4097, 65_536, 1_000_003].iter().enumerate() {
        for copy in 0..30 {
            let folder = root.join(format!("sizes/{copy}"));
            fs::create_dir_all(&folder).unwrap();
            fs::write(folder.join(size.to_string()), noise(*size, (i * 100 + copy) as u64))
                .unwrap();
        }
    }
    fs::write(root.join("big"), noise(8 << 20, 1)).unwrap();
    let sparse = sparse_image(root, "sparse", 32 * MIB);
    harness::write_at(&sparse, 17 * MIB, &noise(10_000, 2));
    std::os::unix::fs::symlink("big", root.join("link")).unwrap();
}

fn copy_tree(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_tree(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

/// Creates a directory with such a tree in `tree`, and with an ext4 file system of it in `image`.
fn create_ext4() -> (TempDir, PathBuf) {
    let dir = temp_dir();
    let tree = dir.path().join("tree");
    create_tree(&tree);
    let image = sparse_image(dir.path(), "image", IMAGE_SIZE);
    let make = Program::new("mke2fs").words("-q -F -t ext4 -E lazy_itable_init=1 -d");
    make.args([&tree, &image]).ok();
    assert!(allocated(&image) < IMAGE_SIZE * 3 / 4, "the image is sparse");
    (dir, image)
}

#[track_caller]
fn assert_clean(image: &Path) {
    run("e2fsck", &["-f", "-n", image.to_str().unwrap()]);
}

#[track_caller]
fn assert_same(left: &str, right: &str) {
    let compare = Program::new("qemu-img").words("compare -f raw -F raw");
    assert_eq!(compare.args([left, right]).ok(), "Images are identical.\n");
}

#[track_caller]
fn assert_as_sparse(copy: &Path, original: &Path) {
    let (copied, expected) = (allocated(copy), allocated(original));
    assert!(
        copied <= expected + ALLOCATION_SLACK,
        "the copy has {copied} bytes allocated, the original {expected}"
    );
}

/// Copies the image to a file, and the file to another served image; compares all three.
fn check_round_trip(transport: Transport, style: Style) {
    if !require_tools(&["mke2fs", "e2fsck", "nbdcopy", "qemu-img"]) {
        return;
    }
    let (dir, image) = create_ext4();
    let served = Served::existing(dir, image, transport, style, &[]);
    let out = served.path("out");
    Program::new("nbdcopy").words("--connections=4").args([&served.uri()]).args([&out]).ok();
    assert_same(&served.uri(), out.to_str().unwrap());
    assert_clean(&out);
    assert_as_sparse(&out, &served.image);

    let back_dir = temp_dir();
    let back = sparse_image(back_dir.path(), "back", IMAGE_SIZE);
    let mut into = Served::existing(back_dir, back, transport, style, &[]);
    Program::new("nbdcopy").words("--connections=4 --flush").args([&out]).args([into.uri()]).ok();
    assert_same(&into.uri(), out.to_str().unwrap());
    assert!(into.server.stop().success());
    assert_same(into.image.to_str().unwrap(), served.image.to_str().unwrap());
    assert_clean(&into.image);
    assert_as_sparse(&into.image, &served.image);
}

#[test]
fn copies_are_identical_and_as_sparse() {
    check_round_trip(Transport::Unix, Style::New);
}

#[test]
fn oldstyle_copies_are_identical_and_as_sparse() {
    check_round_trip(Transport::Tcp, Style::Old);
}

/// An extent: offset, length, and whether it holds data.
type Extent = (u64, u64, bool);

/// The extents of the file, from SEEK_DATA and SEEK_HOLE.
fn file_extents(image: &Path) -> Vec<Extent> {
    use nix::unistd::{Whence, lseek64};
    let file = File::open(image).unwrap();
    let size = i64::try_from(file.metadata().unwrap().len()).unwrap();
    let (mut extents, mut at) = (Vec::new(), 0);
    while at < size {
        // ENXIO: no data up to the end.
        let data = lseek64(&file, at, Whence::SeekData).unwrap_or(size);
        if data > at {
            extents.push((at as u64, (data - at) as u64, false));
        }
        if data < size {
            at = lseek64(&file, data, Whence::SeekHole).unwrap();
            extents.push((data as u64, (at - data) as u64, true));
        } else {
            at = size;
        }
    }
    extents
}

/// Merges adjacent extents of one type. Clients that query ranges separately do not merge them.
fn merged(extents: Vec<Extent>) -> Vec<Extent> {
    let mut all: Vec<Extent> = Vec::new();
    for (offset, length, data) in extents {
        match all.last_mut() {
            Some((start, size, kind)) if *start + *size == offset && *kind == data => {
                *size += length;
            }
            _ => all.push((offset, length, data)),
        }
    }
    all
}

fn extents_of(
    json: &str,
    start: &str,
    is_data: impl Fn(&serde_json::Value) -> bool,
) -> Vec<Extent> {
    let map: serde_json::Value = serde_json::from_str(json).unwrap();
    let number = |entry: &serde_json::Value, key: &str| entry[key].as_u64().unwrap();
    let extent = |e| (number(e, start), number(e, "length"), is_data(e));
    merged(map.as_array().unwrap().iter().map(extent).collect())
}

#[test]
fn maps_equal_the_extents_of_the_file() {
    if !require_tools(&["mke2fs", "nbdinfo", "qemu-img"]) {
        return;
    }
    let (dir, image) = create_ext4();
    let extents = file_extents(&image);
    assert!(extents.len() > 2, "data and holes: {extents:?}");
    let served = Served::existing(dir, image, Transport::Tcp, Style::New, &[]);
    let output = Program::new("nbdinfo").words("--map --json").args([served.uri()]).ok();
    // base:allocation: 0 is data, 3 a hole that reads as zero.
    let map = extents_of(&output, "offset", |e| match e["type"].as_u64() {
        Some(0) => true,
        Some(3) => false,
        other => panic!("an extent of type {other:?}"),
    });
    assert_eq!(map, extents, "map of nbdinfo");
    let output =
        Program::new("qemu-img").words("map -f raw --output=json").args([served.uri()]).ok();
    let map = extents_of(&output, "start", |e| e["data"] == true);
    assert_eq!(map, extents, "map of qemu-img");
}

#[test]
fn e2fsck_is_clean_after_a_workload_through_nbdfuse() {
    if !require_tools(&["mke2fs", "e2fsck", "nbdfuse", "losetup"]) {
        return;
    }
    let (dir, image) = create_ext4();
    let mut served = Served::existing(dir, image, Transport::Unix, Style::New, &[]);
    let (point, root) = (served.path("fuse"), served.path("root"));
    fs::create_dir_all(&root).unwrap();
    let Some(disk) = mount_nbd_as_file(&served.uri(), &point) else { return };
    let Some(device) = Loop::attach(&disk.file) else {
        skip("a workload on a mounted file system", "loop devices need root");
        return;
    };
    let mounted = Mount::ext4(&device, &root);
    let written = workload(&root, &served.path("tree"));
    mounted.unmount();
    device.detach();
    disk.unmount();
    assert!(served.server.stop().success());
    assert_eq!(served.server.stderr(), "");
    assert_clean(&served.image);
    let debugfs = Program::new("debugfs").words("-R").args(["cat /new/4"]);
    assert!(debugfs.args([&served.image]).run().stdout == written, "content of new/4");
}

/// Reads, writes, deletes, renames and truncates files, and syncs; returns the content of `new/4`.
fn workload(root: &Path, tree: &Path) -> Vec<u8> {
    assert!(fs::read(root.join("big")).unwrap() == fs::read(tree.join("big")).unwrap());
    assert!(fs::read(root.join("sparse")).unwrap() == fs::read(tree.join("sparse")).unwrap());
    copy_tree(&tree.join("sizes"), &root.join("copies"));
    fs::remove_dir_all(root.join("sizes")).unwrap();
    fs::create_dir(root.join("new")).unwrap();
    let mut last = Vec::new();
    for i in 0..5_u64 {
        last = noise(300_000 * (i as usize + 1), i);
        fs::write(root.join(format!("new/{i}")), &last).unwrap();
        File::open(root.join(format!("new/{i}"))).unwrap().sync_all().unwrap();
    }
    fs::rename(root.join("big"), root.join("renamed")).unwrap();
    File::options().write(true).open(root.join("renamed")).unwrap().set_len(5000).unwrap();
    let copied = fs::read(root.join("copies/7/1000003")).unwrap();
    assert!(copied == fs::read(tree.join("sizes/7/1000003")).unwrap());
    last
}
