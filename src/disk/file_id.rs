//! A lasting name for a file or a block device, which tells whether a record kept elsewhere is
//! about it. Unlike device and inode number it survives a restart of the host, and unlike the
//! inode number alone it is not given to the next file.
//!
//! Regular files: inode number, its generation (`FS_IOC_GETVERSION`) and time of birth, on file
//! systems that keep inode numbers. Block devices: what the kernel knows of them in `/sys`, such as
//! the UUID of a logical volume or the serial number of a disk; never the device number, which
//! another device can have after a restart.

use super::syscalls;
use nix::sys::stat::{major, minor};
use nix::sys::statfs::{
    BTRFS_SUPER_MAGIC, EXT4_SUPER_MAGIC, FsType, NFS_SUPER_MAGIC, TMPFS_MAGIC, XFS_SUPER_MAGIC,
    fstatfs,
};
use percent_encoding::{NON_ALPHANUMERIC, percent_encode};
use std::fs::{self, File, Metadata};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// Longest name in bytes; what would have a longer one has none.
pub(super) const FILE_ID_MAX: usize = 400;

/// File systems (`f_type` of statfs(2)) where an inode keeps its number for ever. FAT and many in
/// user space make numbers up each time; an overlay's can change when a file is copied up.
const LASTING: [FsType; 7] = [
    EXT4_SUPER_MAGIC,
    XFS_SUPER_MAGIC,
    BTRFS_SUPER_MAGIC,
    TMPFS_MAGIC,
    NFS_SUPER_MAGIC,
    FsType(0xF2F5_2010), // f2fs
    FsType(0x2FC1_2FC1), // ZFS
];

/// Where in `/sys/dev/block/MAJOR:MINOR` a device's lasting name may be, best first.
const DEVICE_NAMES: [&str; 7] =
    ["dm/uuid", "md/uuid", "loop/backing_file", "wwid", "device/wwid", "serial", "device/serial"];

/// The name: one word without spaces.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct FileId(String);

impl FileId {
    /// The name of what is open there; none if it has no lasting one.
    pub(super) fn of(file: &File) -> Option<Self> {
        let found = file.metadata().ok()?;
        let name = match found.file_type().is_block_device() {
            true => of_device(&device_directory(found.rdev())),
            false => of_file(file, &found),
        };
        Self::parse(&name?)
    }

    /// A name as a record has it.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let fits = !text.is_empty() && text.len() <= FILE_ID_MAX;
        (fits && text.bytes().all(|byte| byte.is_ascii_graphic())).then(|| Self(text.to_owned()))
    }

    pub(super) fn as_str(&self) -> &str {
        &self.0
    }
}

fn of_file(file: &File, found: &Metadata) -> Option<String> {
    let kind = fstatfs(file).ok()?.filesystem_type();
    if !LASTING.contains(&kind) {
        return None;
    }
    let generation = syscalls::inode_generation(file).ok();
    let born = found.created().ok().and_then(|at| at.duration_since(SystemTime::UNIX_EPOCH).ok());
    let mut name = format!("inode={}", found.ino());
    if let Some(generation) = generation {
        name += &format!(",generation={generation}");
    }
    if let Some(born) = born {
        name += &format!(",born={}.{:09}", born.as_secs(), born.subsec_nanos());
    }
    // By its number alone a file cannot be told from a later one that got the number.
    (generation.is_some() || born.is_some()).then_some(name)
}

fn device_directory(number: u64) -> PathBuf {
    PathBuf::from(format!("/sys/dev/block/{}:{}", major(number), minor(number)))
}

/// `directory` is that of the device in `/sys`.
fn of_device(directory: &Path) -> Option<String> {
    let directory = fs::canonicalize(directory).ok()?;
    if let Some(partition) = attribute(&directory.join("partition")) {
        return Some(format!("{},partition={partition}", of_device(directory.parent()?)?));
    }
    let found = DEVICE_NAMES.iter().find_map(|name| {
        let value = attribute(&directory.join(name))?;
        Some(format!("{name}={}", percent_encode(value.as_bytes(), NON_ALPHANUMERIC)))
    })?;
    // Several devices can be parts of one file.
    let offset = attribute(&directory.join("loop/offset")).filter(|offset| offset != "0");
    Some(found + &offset.map_or(String::new(), |offset| format!(",offset={offset}")))
}

fn attribute(path: &Path) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    let text = text.trim();
    (!text.is_empty()).then(|| text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(path: &Path) -> Option<FileId> {
        FileId::of(&File::open(path).unwrap())
    }

    #[test]
    fn a_renamed_file_keeps_its_name_and_the_next_has_another() {
        let directory = tempfile::tempdir_in("/var/tmp").unwrap();
        let (path, moved) = (directory.path().join("a"), directory.path().join("b"));
        File::create(&path).unwrap();
        let first = id(&path);
        assert!(first.is_some(), "no lasting name on this file system");
        fs::rename(&path, &moved).unwrap();
        assert_eq!(id(&moved), first);
        fs::remove_file(&moved).unwrap();
        // It often gets the same inode number.
        File::create(&path).unwrap();
        assert_ne!(id(&path), first);
    }

    #[test]
    fn a_device_is_named_by_what_the_kernel_knows_of_it() {
        let directory = tempfile::tempdir().unwrap();
        let disk = directory.path().join("disk");
        let part = disk.join("disk1");
        fs::create_dir_all(disk.join("device")).unwrap();
        fs::create_dir_all(&part).unwrap();
        assert_eq!(of_device(&disk), None);
        fs::write(disk.join("device/serial"), "  S 1\n").unwrap();
        fs::write(part.join("partition"), "1\n").unwrap();
        assert_eq!(of_device(&disk).as_deref(), Some("device/serial=S%201"));
        assert_eq!(of_device(&part).as_deref(), Some("device/serial=S%201,partition=1"));
        fs::create_dir_all(disk.join("dm")).unwrap();
        fs::write(disk.join("dm/uuid"), "LVM-x\n").unwrap();
        assert_eq!(of_device(&disk).as_deref(), Some("dm/uuid=LVM%2Dx"));
    }

    #[test]
    fn a_name_is_one_word_of_bounded_length() {
        assert!(FileId::parse(&"x".repeat(FILE_ID_MAX)).is_some());
        for bad in ["", "a b", "a\n", &"x".repeat(FILE_ID_MAX + 1)] {
            assert_eq!(FileId::parse(bad), None, "{bad:?}");
        }
    }
}
