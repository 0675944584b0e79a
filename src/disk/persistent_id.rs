//! A persistent id of a file or block device, which ties a record in the state directory to it.
//! Unlike device and inode number it survives a restart of the host, and unlike the inode number
//! alone no later file gets it.
//!
//! Regular files: inode number, its generation (`FS_IOC_GETVERSION`) and time of birth, on file
//! systems with persistent inode numbers. Block devices: an id from `/sys`, such as the UUID of a
//! logical volume or the serial number of a disk; never the device number, which another device may
//! get after a restart.

use super::syscalls;
use nix::sys::stat::{major, minor};
use nix::sys::statfs::{
    BTRFS_SUPER_MAGIC, EXT4_SUPER_MAGIC, FsType, NFS_SUPER_MAGIC, TMPFS_MAGIC, XFS_SUPER_MAGIC,
    fstatfs,
};
use percent_encoding::{NON_ALPHANUMERIC, percent_encode};
use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// Longest id in bytes; a file whose id would be longer has none.
pub(super) const FILE_ID_MAX: usize = 400;

/// File systems (`f_type` of statfs(2)) with persistent inode numbers. FAT and many FUSE file
/// systems assign them at each mount; on overlayfs they can change when a file is copied up.
const PERSISTENT_INODES: [FsType; 7] = [
    EXT4_SUPER_MAGIC,
    XFS_SUPER_MAGIC,
    BTRFS_SUPER_MAGIC,
    TMPFS_MAGIC,
    NFS_SUPER_MAGIC,
    FsType(0xF2F5_2010), // f2fs
    FsType(0x2FC1_2FC1), // ZFS
];

/// Attributes in `/sys/dev/block/MAJOR:MINOR` that identify a device, best first.
const DEVICE_ATTRIBUTES: [&str; 7] =
    ["dm/uuid", "md/uuid", "loop/backing_file", "wwid", "device/wwid", "serial", "device/serial"];

/// The id: one word without spaces.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct FileId(String);

impl FileId {
    /// The id of an open file or device; none without a persistent one.
    pub(super) fn of(file: &File) -> Option<Self> {
        let found = file.metadata().ok()?;
        let id = match found.file_type().is_block_device() {
            true => of_device(&device_directory(found.rdev())),
            false => of_file(file, &found),
        };
        Self::parse(&id?)
    }

    /// The id that a record holds.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let fits = !text.is_empty() && text.len() <= FILE_ID_MAX;
        (fits && text.bytes().all(|byte| byte.is_ascii_graphic())).then(|| Self(text.to_owned()))
    }

    pub(super) fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether the regular file at `path` has this id. A sandbox may forbid to open it; then its time of
    /// birth, in nanoseconds, must do without the generation.
    pub(super) fn is_of(&self, path: &Path) -> bool {
        match File::open(path) {
            Ok(file) => Self::of(&file).as_ref() == Some(self),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                fs::metadata(path).is_ok_and(|found| self.has_birth_of(&found))
            }
            Err(_) => false,
        }
    }

    fn has_birth_of(&self, found: &Metadata) -> bool {
        let inode = format!("inode={}", found.ino());
        let has_inode = self.0.split(',').any(|part| part == inode);
        has_inode && birth(found).is_some_and(|birth| self.0.ends_with(&birth))
    }
}

fn of_file(file: &File, found: &Metadata) -> Option<String> {
    let kind = fstatfs(file).ok()?.filesystem_type();
    if !PERSISTENT_INODES.contains(&kind) {
        return None;
    }
    let generation = syscalls::inode_generation(file).ok();
    let born = birth(found);
    let mut id = format!("inode={}", found.ino());
    if let Some(generation) = generation {
        id += &format!(",generation={generation}");
    }
    if let Some(born) = &born {
        id += born;
    }
    // A later file may get the same inode number.
    (generation.is_some() || born.is_some()).then_some(id)
}

/// The part of an id with the time of birth, if the file system keeps that.
fn birth(found: &Metadata) -> Option<String> {
    let born = found.created().ok()?.duration_since(SystemTime::UNIX_EPOCH).ok()?;
    Some(format!(",born={}.{:09}", born.as_secs(), born.subsec_nanos()))
}

fn device_directory(number: u64) -> PathBuf {
    PathBuf::from(format!("/sys/dev/block/{}:{}", major(number), minor(number)))
}

/// `directory` is the device's in `/sys`.
fn of_device(directory: &Path) -> Option<String> {
    let directory = fs::canonicalize(directory).ok()?;
    if let Some(partition) = attribute(&directory.join("partition")) {
        return Some(format!("{},partition={partition}", of_device(directory.parent()?)?));
    }
    let found = DEVICE_ATTRIBUTES.iter().find_map(|name| {
        let value = attribute(&directory.join(name))?;
        Some(format!("{name}={}", percent_encode(value.as_bytes(), NON_ALPHANUMERIC)))
    })?;
    // Several loop devices may map parts of one file.
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
    fn birth_identifies_a_file_that_cannot_be_opened() {
        let [one, other] = [(); 2].map(|()| tempfile::NamedTempFile::new_in("/var/tmp").unwrap());
        let id = FileId::of(one.as_file()).filter(|id| id.as_str().contains(",born="));
        let Some(id) = id else {
            eprintln!("skipped: the file system of /var/tmp keeps no times of birth");
            return;
        };
        let has_birth = |file: &File| id.has_birth_of(&file.metadata().unwrap());
        assert!(has_birth(one.as_file()) && !has_birth(other.as_file()));
        assert!(id.is_of(one.path()) && !id.is_of(other.path()));
    }

    #[test]
    fn file_keeps_its_id_when_renamed_and_never_reuses_it() {
        let directory = tempfile::tempdir_in("/var/tmp").unwrap();
        let (path, moved) = (directory.path().join("a"), directory.path().join("b"));
        File::create(&path).unwrap();
        let first = id(&path);
        assert!(first.is_some(), "no persistent id on this file system");
        fs::rename(&path, &moved).unwrap();
        assert_eq!(id(&moved), first);
        fs::remove_file(&moved).unwrap();
        // The new file often gets the same inode number.
        File::create(&path).unwrap();
        assert_ne!(id(&path), first);
    }

    #[test]
    fn device_is_identified_by_its_sysfs_attributes() {
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
    fn id_is_one_word_of_bounded_length() {
        assert!(FileId::parse(&"x".repeat(FILE_ID_MAX)).is_some());
        for bad in ["", "a b", "a\n", &"x".repeat(FILE_ID_MAX + 1)] {
            assert_eq!(FileId::parse(bad), None, "{bad:?}");
        }
    }
}
