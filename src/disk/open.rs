//! Finding the image, and refusing what cannot be served, with a reason an operator can act on.
//! Never waits for another process, and changes nothing in a file that exists.

use super::lock::{self, Holders, LockKind};
use super::syscalls;
use nix::errno::Errno;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// What a disk is made of, in bytes. The tail of an image beyond its last whole sector is not
/// served, and an image without a whole one cannot be.
pub const SECTOR: u64 = 512;

/// How an image is to be used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Access {
    /// Nothing will be written; others may open the image read-only at the same time.
    pub read_only: bool,
}

/// Why an image cannot be served: one variant for each thing an operator can get wrong.
#[derive(Debug)]
pub enum OpenError {
    /// Nothing has that name.
    Missing {
        /// The image.
        path: PathBuf,
    },
    /// It is a directory.
    Directory {
        /// The image.
        path: PathBuf,
    },
    /// It is a socket, a terminal or the like.
    NotADisk {
        /// The image.
        path: PathBuf,
    },
    /// We may not read it (or not even reach it).
    NotReadable {
        /// The image.
        path: PathBuf,
        /// Who we are to the kernel.
        uid: u32,
    },
    /// We may read it, but not write to it.
    NotWritable {
        /// The image.
        path: PathBuf,
        /// Who we are to the kernel.
        uid: u32,
    },
    /// It lies on a file system that is mounted read-only.
    ReadOnlyFileSystem {
        /// The image.
        path: PathBuf,
    },
    /// It has not even one whole sector.
    TooSmall {
        /// The image.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
    },
    /// Other processes hold its lock.
    AlreadyServed {
        /// The image.
        path: PathBuf,
        /// Which.
        by: Holders,
    },
    /// Its file system does not let it be locked.
    NotLocked {
        /// The image.
        path: PathBuf,
        /// In which of two ways.
        kind: LockKind,
        /// What the kernel said.
        source: io::Error,
    },
    /// It did not exist and could not be made.
    CannotCreate {
        /// The image.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// Anything else.
    Other {
        /// The image.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

/// An image that may be served, locked against a second server.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) file: File,
    pub(super) kind: FileKind,
    /// Bytes, all of them, the unserved tail included.
    pub(super) full_size: u64,
}

/// The two kinds of file that hold a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FileKind {
    File,
    /// `sector` is the device's own, in bytes: 512 or 4096 as a rule.
    BlockDevice {
        sector: u64,
    },
}

/// Opens what exists.
pub(super) fn open(path: &Path, access: Access) -> Result<Opened, OpenError> {
    // Look before opening: to open a pipe can wait for ever, and to open a device can do things.
    let found = fs::metadata(path).map_err(|error| refusal(path, error, ImageFacts::Nothing))?;
    check_type(path, found.file_type())?;
    let file = open_file(path, access)?;
    let other = |source| OpenError::Other { path: path.to_owned(), source };
    let file_type = file.metadata().map_err(other)?.file_type();
    check_type(path, file_type)?;
    lock::take(path, &file, access)?;
    let kind = match file_type.is_block_device() {
        true => FileKind::BlockDevice { sector: syscalls::sector_size(&file).map_err(other)? },
        false => FileKind::File,
    };
    // The end is where seeking says it is, for files and devices alike.
    let full_size = (&file).seek(SeekFrom::End(0)).map_err(other)?;
    if full_size < SECTOR {
        return Err(OpenError::TooSmall { path: path.to_owned(), size: full_size });
    }
    Ok(Opened { file, kind, full_size })
}

/// How many bytes of an image can be served. Locks nothing, so that it can be asked of an image in
/// use.
///
/// # Errors
/// When it is no image, or may not be read.
pub fn image_size(path: &Path) -> Result<u64, OpenError> {
    let found = fs::metadata(path).map_err(|error| refusal(path, error, ImageFacts::Nothing))?;
    check_type(path, found.file_type())?;
    let mut file = open_file(path, Access { read_only: true })?;
    let size = file.seek(SeekFrom::End(0));
    let size = size.map_err(|source| OpenError::Other { path: path.to_owned(), source })?;
    Ok(size - size % SECTOR)
}

/// Makes a sparse file of `size` bytes, durably, unless something has that name already; whether it
/// did.
pub(super) fn create_if_missing(path: &Path, size: u64) -> Result<bool, OpenError> {
    if size < SECTOR {
        // Make nothing that could not be served; what exists may still be good.
        let exists = fs::symlink_metadata(path).is_ok();
        let too_small = OpenError::TooSmall { path: path.to_owned(), size };
        return if exists { Ok(false) } else { Err(too_small) };
    }
    match OpenOptions::new().write(true).create_new(true).mode(0o600).open(path) {
        Ok(file) => fill_new(path, &file, size).map(|()| true).map_err(|source| {
            // Half an image would be mistaken for a whole one by the next start. If it cannot be
            // removed either, there is nothing more to say than why it could not be made.
            let _ = fs::remove_file(path);
            OpenError::CannotCreate { path: path.to_owned(), source }
        }),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(source) => Err(OpenError::CannotCreate { path: path.to_owned(), source }),
    }
}

/// Gives a new file its size and makes it, and its name, durable.
fn fill_new(path: &Path, file: &File, size: u64) -> io::Result<()> {
    file.set_len(size)?;
    file.sync_all()?;
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    File::open(parent.unwrap_or(Path::new(".")))?.sync_all()
}

fn check_type(path: &Path, kind: fs::FileType) -> Result<(), OpenError> {
    if kind.is_dir() {
        Err(OpenError::Directory { path: path.to_owned() })
    } else if kind.is_file() || kind.is_block_device() {
        Ok(())
    } else {
        Err(OpenError::NotADisk { path: path.to_owned() })
    }
}

fn open_file(path: &Path, access: Access) -> Result<File, OpenError> {
    OpenOptions::new().read(true).write(!access.read_only).open(path).map_err(|error| {
        let readable = !access.read_only && File::open(path).is_ok();
        refusal(path, error, if readable { ImageFacts::Readable } else { ImageFacts::Unreadable })
    })
}

/// What is known of an image when opening it fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ImageFacts {
    /// It was not even reached.
    Nothing,
    /// It is there.
    Unreadable,
    /// It is there, and to open it for reading works.
    Readable,
}

/// What an error of the kernel means to the operator.
fn refusal(path: &Path, error: io::Error, found: ImageFacts) -> OpenError {
    let path = path.to_owned();
    let uid = nix::unistd::geteuid().as_raw();
    match (error.kind(), found) {
        (io::ErrorKind::NotFound, _) => OpenError::Missing { path },
        (io::ErrorKind::PermissionDenied, ImageFacts::Readable) => {
            OpenError::NotWritable { path, uid }
        }
        (io::ErrorKind::PermissionDenied, _) => OpenError::NotReadable { path, uid },
        (io::ErrorKind::ReadOnlyFilesystem, _) => OpenError::ReadOnlyFileSystem { path },
        _ => OpenError::Other { path, source: error },
    }
}

impl OpenError {
    /// The kernel's number for what is wrong, for programs that want one (errno(3)).
    #[must_use]
    pub fn errno(&self) -> Option<i32> {
        let errno = match self {
            Self::Missing { .. } => Errno::ENOENT,
            Self::Directory { .. } => Errno::EISDIR,
            Self::NotADisk { .. } => Errno::ENOTBLK,
            Self::NotReadable { .. } | Self::NotWritable { .. } => Errno::EACCES,
            Self::ReadOnlyFileSystem { .. } => Errno::EROFS,
            Self::TooSmall { .. } => Errno::EINVAL,
            Self::AlreadyServed { .. } => Errno::EBUSY,
            Self::CannotCreate { source, .. }
            | Self::NotLocked { source, .. }
            | Self::Other { source, .. } => {
                return source.raw_os_error();
            }
        };
        Some(errno as i32)
    }
}

impl std::fmt::Display for OpenError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Missing { path } => {
                write!(f, "{} does not exist; --create SIZE would make it", path.display())
            }
            Self::Directory { path } => {
                write!(f, "{} is a directory; give a file or a block device", path.display())
            }
            Self::NotADisk { path } => {
                write!(f, "{} is neither a regular file nor a block device", path.display())
            }
            Self::NotReadable { path, uid } => {
                write!(f, "{} may not be read by user id {uid}; check ", path.display())?;
                f.write_str("the permissions of the file and of the directories above it")
            }
            Self::NotWritable { path, uid } => {
                write!(f, "{} may be read but not written by user id {uid}; ", path.display())?;
                f.write_str("check its permissions, or serve it with --read-only")
            }
            Self::ReadOnlyFileSystem { path } => {
                write!(f, "{} is on a file system mounted read-only; ", path.display())?;
                f.write_str("serve it with --read-only")
            }
            Self::TooSmall { path, size } => {
                write!(f, "{} of {size} bytes is too small; ", path.display())?;
                write!(f, "a disk has at least {SECTOR} bytes")
            }
            Self::AlreadyServed { path, by } => {
                write!(f, "{} is in use: {by}; is it being served already?", path.display())
            }
            Self::NotLocked { path, kind, source } => {
                write!(f, "{} cannot be locked ({kind}): {source}; ", path.display())?;
                f.write_str(
                    "its file system must keep locks: on NFS, see that the lock services run on \
                     both hosts (rpc.statd, lockd), or mount it with local_lock=all if no other \
                     host uses the image",
                )
            }
            Self::CannotCreate { path, source } => {
                write!(f, "{} cannot be created: {source}", path.display())
            }
            Self::Other { path, source } => {
                write!(f, "{} cannot be opened: {source}", path.display())
            }
        }
    }
}

impl std::error::Error for OpenError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::CannotCreate { source, .. }
            | Self::NotLocked { source, .. }
            | Self::Other { source, .. } => Some(source),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::libc;
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    use tempfile::TempDir;

    const WRITING: Access = Access { read_only: false };
    const READING: Access = Access { read_only: true };

    /// A folder with a file in it of this size.
    fn file(size: u64) -> (TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk.img");
        File::create(&path).unwrap().set_len(size).unwrap();
        (folder, path)
    }

    /// Refused, with a message that names the image; returns the error.
    fn refused(path: &Path, access: Access) -> OpenError {
        let error = open(path, access).unwrap_err();
        assert!(error.to_string().starts_with(&path.display().to_string()), "{error}");
        error
    }

    /// Opens as somebody whom permissions apply to.
    fn refused_as_nobody(path: &Path, access: Access) -> OpenError {
        std::thread::scope(|scope| {
            let nobody = scope.spawn(|| {
                // Of this thread only; without being root there is no need for it.
                nix::unistd::setfsuid(nix::unistd::Uid::from_raw(65534));
                refused(path, access)
            });
            nobody.join().unwrap()
        })
    }

    fn permit(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn a_missing_image_is_refused_with_a_hint_how_to_make_it() {
        let folder = tempfile::tempdir().unwrap();
        let error = refused(&folder.path().join("none"), WRITING);
        assert!(matches!(error, OpenError::Missing { .. }), "{error:?}");
        assert!(error.to_string().contains("--create"));
    }

    #[test]
    fn a_directory_is_no_disk() {
        let folder = tempfile::tempdir().unwrap();
        let error = refused(folder.path(), READING);
        assert!(matches!(error, OpenError::Directory { .. }), "{error:?}");
    }

    #[test]
    fn a_terminal_or_a_pipe_is_no_disk_and_opening_it_does_not_hang() {
        let folder = tempfile::tempdir().unwrap();
        let pipe = folder.path().join("pipe");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
        for path in [&pipe, Path::new("/dev/null")] {
            let error = refused(path, READING);
            assert!(matches!(error, OpenError::NotADisk { .. }), "{error:?}");
        }
    }

    #[test]
    fn an_image_we_may_not_read_is_refused() {
        let (folder, path) = file(4096);
        permit(folder.path(), 0o755);
        permit(&path, 0o000);
        for access in [READING, WRITING] {
            let error = refused_as_nobody(&path, access);
            assert!(matches!(error, OpenError::NotReadable { .. }), "{error:?}");
        }
    }

    #[test]
    fn an_image_we_may_not_even_reach_is_refused() {
        let (folder, path) = file(4096);
        permit(folder.path(), 0o000);
        let error = refused_as_nobody(&path, READING);
        permit(folder.path(), 0o755);
        assert!(matches!(error, OpenError::NotReadable { .. }), "{error:?}");
    }

    #[test]
    fn an_image_we_may_only_read_is_refused_with_a_hint_to_serve_it_read_only() {
        let (folder, path) = file(4096);
        permit(folder.path(), 0o755);
        permit(&path, 0o444);
        let error = refused_as_nobody(&path, WRITING);
        assert!(matches!(error, OpenError::NotWritable { .. }), "{error:?}");
        assert!(error.to_string().contains("--read-only"));
        assert!(open(&path, READING).is_ok());
    }

    #[test]
    fn what_the_kernel_says_is_told_apart() {
        let said =
            |errno, found| refusal(Path::new("/disk"), io::Error::from_raw_os_error(errno), found);
        let read_only = said(libc::EROFS, ImageFacts::Readable);
        assert!(matches!(read_only, OpenError::ReadOnlyFileSystem { .. }), "{read_only:?}");
        assert!(
            read_only.to_string().contains("/disk")
                && read_only.to_string().contains("--read-only")
        );
        let not_permitted = said(libc::EPERM, ImageFacts::Readable);
        assert!(matches!(not_permitted, OpenError::NotWritable { .. }), "{not_permitted:?}");
        let broken = said(libc::EIO, ImageFacts::Unreadable);
        assert!(matches!(broken, OpenError::Other { .. }), "{broken:?}");
    }

    #[test]
    fn the_smallest_disk_has_one_sector() {
        let (_folder, path) = file(SECTOR - 1);
        let error = refused(&path, WRITING);
        assert!(matches!(error, OpenError::TooSmall { size: 511, .. }), "{error:?}");
        let (_folder, path) = file(SECTOR);
        assert_eq!(open(&path, WRITING).unwrap().full_size, SECTOR);
    }

    #[test]
    fn an_image_is_never_served_twice() {
        let (_folder, path) = file(4096);
        let first = open(&path, WRITING).unwrap();
        for access in [WRITING, READING] {
            let error = refused(&path, access);
            assert!(matches!(error, OpenError::AlreadyServed { .. }), "{error:?}");
        }
        drop(first);
        assert!(open(&path, WRITING).is_ok());
    }

    #[test]
    fn readers_share_an_image_and_keep_writers_out() {
        let (_folder, path) = file(4096);
        let _readers = (open(&path, READING).unwrap(), open(&path, READING).unwrap());
        assert!(matches!(refused(&path, WRITING), OpenError::AlreadyServed { .. }));
    }

    #[test]
    fn a_created_image_is_sparse_and_private() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new.img");
        create_if_missing(&path, 1 << 30).unwrap();
        let made = fs::metadata(&path).unwrap();
        assert_eq!((made.len(), made.blocks(), made.mode() & 0o077), (1 << 30, 0, 0));
    }

    #[test]
    fn what_exists_is_not_created_again() {
        let (_folder, path) = file(0);
        fs::write(&path, [7; 1024]).unwrap();
        create_if_missing(&path, 4096).unwrap();
        create_if_missing(&path, 0).unwrap();
        assert_eq!(fs::read(&path).unwrap(), [7; 1024]);
    }

    #[test]
    fn what_could_not_be_served_is_not_created() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new.img");
        let error = create_if_missing(&path, SECTOR - 1).unwrap_err();
        assert!(matches!(error, OpenError::TooSmall { .. }), "{error:?}");
        assert!(!path.exists());
        create_if_missing(&path, SECTOR).unwrap();
        assert!(path.exists());
    }

    #[test]
    fn an_image_that_cannot_be_made_leaves_nothing_behind() {
        let folder = tempfile::tempdir().unwrap();
        let nowhere = folder.path().join("no/such/folder.img");
        // More than any file system takes.
        let huge = folder.path().join("huge.img");
        for (path, size) in [(&nowhere, 4096), (&huge, u64::MAX)] {
            let error = create_if_missing(path, size).unwrap_err();
            assert!(matches!(error, OpenError::CannotCreate { .. }), "{error:?}");
            assert!(error.to_string().contains(&path.display().to_string()));
            assert!(!path.exists());
        }
    }
}
