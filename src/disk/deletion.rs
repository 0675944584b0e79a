//! Deletes an image by its path, if the path still leads to the open file.
//! Never deletes another file: compares path and open file by device and inode.

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, RenameFlags, openat, renameat2};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat, fstatat};
use nix::unistd::{UnlinkatFlags, unlinkat};
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

/// The file that an image's path leads to, compared with the open file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PathTarget {
    /// The open file.
    #[error("the path names the image that is served")]
    Same,
    /// No file.
    #[error("the path names no file any more; the image that is served was renamed or deleted")]
    Nothing,
    /// Another file than the open one.
    #[error(
        "the path names another file now; the image that is served was renamed, replaced or hidden \
         by a mount"
    )]
    OtherFile,
    /// Another file or device than the open device.
    #[error("the path names another device now; the one that is served has another number")]
    OtherDevice,
}

/// Why an image is not deleted.
#[derive(Debug, thiserror::Error)]
pub enum DeletionError {
    /// Its path leads elsewhere.
    #[error("{0}")]
    Renamed(PathTarget),
    /// It has this many hard links.
    #[error(
        "it has {0} names (hard links), so that deleting this one would not delete the disk; remove \
         the others first"
    )]
    HardLinks(u64),
    /// It is no regular file.
    #[error(
        "only a regular file can be unlinked: a block device would come back, without its record"
    )]
    NotAFile,
    /// This many bytes at its end are not part of the disk.
    #[error(
        "the last {0} bytes of it do not move, since they do not fill a sector of 512 or came while \
         it was served, and would be lost"
    )]
    Tail(u64),
    /// Another file took its name during the deletion, was moved to this path, and could not be moved
    /// back.
    #[error("what has its name now was put at {path} meanwhile", path = .0.display())]
    Displaced(PathBuf),
    /// A system call failed.
    #[error(transparent)]
    Io(io::Error),
}

impl From<Errno> for DeletionError {
    fn from(errno: Errno) -> Self {
        Self::Io(errno.into())
    }
}

/// The file that `path` leads to; follows links.
pub(super) fn path_target(path: &Path, image: &File) -> nix::Result<PathTarget> {
    let open = fstat(image)?;
    match nix::sys::stat::stat(path) {
        Ok(found) if is_same(&found, &open) => Ok(PathTarget::Same),
        Ok(_) if is_device(&open) => Ok(PathTarget::OtherDevice),
        Ok(_) => Ok(PathTarget::OtherFile),
        Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => Ok(PathTarget::Nothing),
        Err(errno) => Err(errno),
    }
}

/// Checks that [`delete`] would delete the image.
pub(super) fn check_deletable(path: &Path, image: &File) -> Result<(), DeletionError> {
    let open = fstat(image)?;
    if !SFlag::from_bits_truncate(open.st_mode & SFlag::S_IFMT.bits()).contains(SFlag::S_IFREG) {
        return Err(DeletionError::NotAFile);
    }
    match path_target(path, image)? {
        PathTarget::Same if open.st_nlink != 1 => {
            Err(DeletionError::HardLinks(open.st_nlink as u64))
        }
        PathTarget::Same => Ok(()),
        other => Err(DeletionError::Renamed(other)),
    }
}

/// Deletes the image, durably; an image without a name counts as deleted. `spare` is an unused name.
///
/// Another file may take the name between a check and the deletion. So the file is first renamed to
/// `spare`, a name that no other process uses, and checked there.
pub(super) fn delete(path: &Path, image: &File, spare: &OsStr) -> Result<(), DeletionError> {
    if fstat(image)?.st_nlink == 0 {
        return Ok(());
    }
    check_deletable(path, image)?;
    // Deletes the image, not a symbolic link to it.
    let path = fs::canonicalize(path).map_err(DeletionError::Io)?;
    let directory = path.parent().unwrap_or(Path::new("/"));
    let name = path.file_name().map(OsString::from).unwrap_or_default();
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let directory_fd = openat(AT_FDCWD, directory, flags, Mode::empty())?;
    let check = |name: &OsStr| is_named(&directory_fd, name, image);
    if !check(&name)? {
        return Err(DeletionError::Renamed(PathTarget::OtherFile));
    }
    let exclusively = RenameFlags::RENAME_NOREPLACE;
    match renameat2(&directory_fd, name.as_os_str(), &directory_fd, spare, exclusively) {
        Ok(()) if check(spare)? => remove(&directory_fd, spare),
        Ok(()) => {
            let back =
                renameat2(&directory_fd, spare, &directory_fd, name.as_os_str(), exclusively);
            match back {
                Ok(()) => Err(DeletionError::Renamed(PathTarget::OtherFile)),
                Err(_) => Err(DeletionError::Displaced(directory.join(spare))),
            }
        }
        // Without `RENAME_NOREPLACE`, or with `spare` taken, the check just before must suffice.
        Err(Errno::EINVAL | Errno::ENOSYS | Errno::EOPNOTSUPP | Errno::EEXIST) => {
            remove(&directory_fd, &name)
        }
        Err(errno) => Err(errno.into()),
    }
}

fn remove(directory: &OwnedFd, name: &OsStr) -> Result<(), DeletionError> {
    unlinkat(directory, name, UnlinkatFlags::NoRemoveDir)?;
    nix::unistd::fsync(directory)?;
    Ok(())
}

fn is_named(directory: &OwnedFd, name: &OsStr, image: &File) -> nix::Result<bool> {
    let found = fstatat(directory, name, AtFlags::AT_SYMLINK_NOFOLLOW)?;
    Ok(is_same(&found, &fstat(image)?))
}

/// Whether both are one file, or two nodes of one device.
fn is_same(one: &FileStat, other: &FileStat) -> bool {
    match (is_device(one), is_device(other)) {
        (true, true) => one.st_rdev == other.st_rdev,
        (false, false) => (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino),
        _ => false,
    }
}

fn is_device(found: &FileStat) -> bool {
    found.st_mode & SFlag::S_IFMT.bits() == SFlag::S_IFBLK.bits()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn image() -> (tempfile::TempDir, PathBuf, File) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.img");
        fs::write(&path, [1; 512]).unwrap();
        let file = File::open(&path).unwrap();
        (directory, path, file)
    }

    fn entries(directory: &tempfile::TempDir) -> usize {
        fs::read_dir(directory.path()).unwrap().count()
    }

    const SPARE: &str = ".spare";

    #[test]
    fn deleting_an_image_twice_succeeds_and_leaves_nothing() {
        let (directory, path, file) = image();
        assert_eq!(path_target(&path, &file), Ok(PathTarget::Same));
        delete(&path, &file, SPARE.as_ref()).unwrap();
        assert_eq!(path_target(&path, &file), Ok(PathTarget::Nothing));
        delete(&path, &file, SPARE.as_ref()).unwrap();
        assert_eq!(entries(&directory), 0);
    }

    #[test]
    fn file_that_took_the_name_is_kept() {
        let (directory, path, file) = image();
        fs::rename(&path, directory.path().join("other")).unwrap();
        let nothing = delete(&path, &file, SPARE.as_ref()).unwrap_err();
        assert!(matches!(nothing, DeletionError::Renamed(PathTarget::Nothing)), "{nothing:?}");
        fs::write(&path, [2; 512]).unwrap();
        let other = delete(&path, &file, SPARE.as_ref()).unwrap_err();
        assert!(matches!(other, DeletionError::Renamed(PathTarget::OtherFile)), "{other:?}");
        assert_eq!(fs::read(&path).unwrap(), [2; 512]);
    }

    #[test]
    fn image_with_two_hard_links_is_kept() {
        let (directory, path, file) = image();
        fs::hard_link(&path, directory.path().join("other")).unwrap();
        let kept = delete(&path, &file, SPARE.as_ref()).unwrap_err();
        assert!(matches!(kept, DeletionError::HardLinks(2)), "{kept:?}");
        assert_eq!(entries(&directory), 2);
    }

    #[test]
    fn image_is_deleted_not_a_link_to_it() {
        let (directory, path, file) = image();
        let link = directory.path().join("link");
        symlink(&path, &link).unwrap();
        delete(&link, &file, SPARE.as_ref()).unwrap();
        assert!(!path.exists() && link.is_symlink());
    }

    #[test]
    fn occupied_spare_name_is_not_overwritten() {
        let (directory, path, file) = image();
        let spare = directory.path().join(SPARE);
        fs::write(&spare, [3; 512]).unwrap();
        delete(&path, &file, SPARE.as_ref()).unwrap();
        assert!(!path.exists());
        assert_eq!(fs::read(&spare).unwrap(), [3; 512]);
    }

    #[test]
    fn device_is_not_deleted() {
        let null = File::open("/dev/null").unwrap();
        let kept = check_deletable(Path::new("/dev/null"), &null).unwrap_err();
        assert!(matches!(kept, DeletionError::NotAFile), "{kept:?}");
    }
}
