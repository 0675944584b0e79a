//! Deleting an image by its name, if and only if the name still is that of the open file.
//! Never deletes anything else: names are compared with the open file by device and inode.

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, RenameFlags, openat, renameat2};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat, fstatat};
use nix::unistd::{UnlinkatFlags, unlinkat};
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

/// What an image's path leads to, compared with the open file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PathTarget {
    /// To the file that is open.
    Same,
    /// To nothing.
    Nothing,
    /// To another file or device.
    Other {
        /// The open file is a block device.
        device: bool,
    },
}

/// Why an image is not deleted.
#[derive(Debug)]
pub enum DeletionError {
    /// Its path is not its name any more.
    Renamed(PathTarget),
    /// It has so many names.
    Names(u64),
    /// Only a regular file can be deleted.
    NotAFile,
    /// So many bytes at its end are not part of the disk.
    Tail(u64),
    /// It is under this name now, since something else took its own while it was being deleted.
    Displaced(PathBuf),
    /// What the kernel said.
    Io(io::Error),
}

impl fmt::Display for DeletionError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Renamed(named) => named.fmt(f),
            Self::Names(count) => write!(
                f,
                "it has {count} names (hard links), so that deleting this one would not delete the \
                 disk; remove the others first"
            ),
            Self::NotAFile => f.write_str(
                "only a regular file can be unlinked: a block device would come back, without its \
                 record",
            ),
            Self::Tail(bytes) => write!(
                f,
                "the last {bytes} bytes of it do not move, since they do not fill a sector of 512 \
                 or came while it was served, and would be lost"
            ),
            Self::Displaced(path) => {
                write!(f, "what has its name now was put at {} meanwhile", path.display())
            }
            Self::Io(error) => error.fmt(f),
        }
    }
}

impl fmt::Display for PathTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Same => "the path names the image that is served",
            Self::Nothing => {
                "the path names no file any more; the image that is served was renamed or deleted"
            }
            Self::Other { device: false } => {
                "the path names another file now; the image that is served was renamed, replaced \
                 or hidden by a mount"
            }
            Self::Other { device: true } => {
                "the path names another device now; the one that is served has another number"
            }
        })
    }
}

impl From<Errno> for DeletionError {
    fn from(errno: Errno) -> Self {
        Self::Io(errno.into())
    }
}

/// What `path`, links followed, leads to.
pub(super) fn path_target(path: &Path, image: &File) -> nix::Result<PathTarget> {
    let open = fstat(image)?;
    match nix::sys::stat::stat(path) {
        Ok(found) if is_same(&found, &open) => Ok(PathTarget::Same),
        Ok(_) => Ok(PathTarget::Other { device: is_device(&open) }),
        Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => Ok(PathTarget::Nothing),
        Err(errno) => Err(errno),
    }
}

/// Whether [`delete`] would delete the image, without deleting it.
pub(super) fn check_deletable(path: &Path, image: &File) -> Result<(), DeletionError> {
    let open = fstat(image)?;
    if !SFlag::from_bits_truncate(open.st_mode & SFlag::S_IFMT.bits()).contains(SFlag::S_IFREG) {
        return Err(DeletionError::NotAFile);
    }
    match path_target(path, image)? {
        PathTarget::Same if open.st_nlink != 1 => Err(DeletionError::Names(open.st_nlink as u64)),
        PathTarget::Same => Ok(()),
        other => Err(DeletionError::Renamed(other)),
    }
}

/// Deletes the image, durably; one that has no name left counts as deleted. `spare` is a name that
/// nothing else uses.
///
/// A name can be given to another file between a look and its deletion. So it is taken away first,
/// to `spare`, where nothing else is put, and looked at there.
pub(super) fn delete(path: &Path, image: &File, spare: &OsStr) -> Result<(), DeletionError> {
    if fstat(image)?.st_nlink == 0 {
        return Ok(());
    }
    check_deletable(path, image)?;
    // The image, not a link that leads to it.
    let path = fs::canonicalize(path).map_err(DeletionError::Io)?;
    let directory = path.parent().unwrap_or(Path::new("/"));
    let name = path.file_name().map(OsString::from).unwrap_or_default();
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let directory_fd = openat(AT_FDCWD, directory, flags, Mode::empty())?;
    let check = |name: &OsStr| is_named(&directory_fd, name, image);
    if !check(&name)? {
        return Err(DeletionError::Renamed(PathTarget::Other { device: false }));
    }
    let exclusively = RenameFlags::RENAME_NOREPLACE;
    match renameat2(&directory_fd, name.as_os_str(), &directory_fd, spare, exclusively) {
        Ok(()) if check(spare)? => remove(&directory_fd, spare),
        Ok(()) => {
            let back =
                renameat2(&directory_fd, spare, &directory_fd, name.as_os_str(), exclusively);
            match back {
                Ok(()) => Err(DeletionError::Renamed(PathTarget::Other { device: false })),
                Err(_) => Err(DeletionError::Displaced(directory.join(spare))),
            }
        }
        // Not every file system can do this; then the look just before has to do.
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

/// The same file; or two nodes of one device, wherever they are.
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
    fn an_image_is_deleted_once_and_nothing_is_left() {
        let (directory, path, file) = image();
        assert_eq!(path_target(&path, &file), Ok(PathTarget::Same));
        delete(&path, &file, SPARE.as_ref()).unwrap();
        assert_eq!(path_target(&path, &file), Ok(PathTarget::Nothing));
        delete(&path, &file, SPARE.as_ref()).unwrap();
        assert_eq!(entries(&directory), 0);
    }

    #[test]
    fn a_file_that_took_the_name_is_kept() {
        let (directory, path, file) = image();
        fs::rename(&path, directory.path().join("other")).unwrap();
        let nothing = delete(&path, &file, SPARE.as_ref()).unwrap_err();
        assert!(matches!(nothing, DeletionError::Renamed(PathTarget::Nothing)), "{nothing:?}");
        fs::write(&path, [2; 512]).unwrap();
        let other = delete(&path, &file, SPARE.as_ref()).unwrap_err();
        assert!(matches!(other, DeletionError::Renamed(PathTarget::Other { .. })), "{other:?}");
        assert_eq!(fs::read(&path).unwrap(), [2; 512]);
    }

    #[test]
    fn a_second_name_keeps_both() {
        let (directory, path, file) = image();
        fs::hard_link(&path, directory.path().join("other")).unwrap();
        let kept = delete(&path, &file, SPARE.as_ref()).unwrap_err();
        assert!(matches!(kept, DeletionError::Names(2)), "{kept:?}");
        assert_eq!(entries(&directory), 2);
    }

    #[test]
    fn the_image_is_deleted_and_not_a_link_to_it() {
        let (directory, path, file) = image();
        let link = directory.path().join("link");
        symlink(&path, &link).unwrap();
        delete(&link, &file, SPARE.as_ref()).unwrap();
        assert!(!path.exists() && link.is_symlink());
    }

    #[test]
    fn an_occupied_spare_name_is_not_overwritten() {
        let (directory, path, file) = image();
        let spare = directory.path().join(SPARE);
        fs::write(&spare, [3; 512]).unwrap();
        delete(&path, &file, SPARE.as_ref()).unwrap();
        assert!(!path.exists());
        assert_eq!(fs::read(&spare).unwrap(), [3; 512]);
    }

    #[test]
    fn a_device_is_not_deleted() {
        let null = File::open("/dev/null").unwrap();
        let kept = check_deletable(Path::new("/dev/null"), &null).unwrap_err();
        assert!(matches!(kept, DeletionError::NotAFile), "{kept:?}");
    }
}
