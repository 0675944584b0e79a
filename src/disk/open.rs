//! Opens an image, or refuses it with a reason that the operator can act on.
//! Never waits for another process, and never changes a file that exists.

use super::lock::{self, Holders, LockError, LockKind, LockMode};
use super::syscalls;
use nix::errno::Errno;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Size of a sector in bytes. The tail of an image beyond its last whole sector is not served, and
/// an image smaller than one sector is refused.
pub const SECTOR: u64 = 512;

/// How an image is opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Access {
    /// Only for reading; other processes may then open it read-only at the same time.
    pub read_only: bool,
}

/// Why an image cannot be served: one variant for each mistake an operator can make.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The path does not exist.
    #[error("{path} does not exist; --create SIZE would make it", path = .path.display())]
    Missing {
        /// The image.
        path: PathBuf,
    },
    /// It is a directory.
    #[error("{path} is a directory; give a file or a block device", path = .path.display())]
    Directory {
        /// The image.
        path: PathBuf,
    },
    /// It is a character device, a pipe or a socket.
    #[error("{path} is neither a regular file nor a block device", path = .path.display())]
    NotADisk {
        /// The image.
        path: PathBuf,
    },
    /// The process may not read it, or not search a directory above it.
    #[error(
        "{path} may not be read by user id {uid}; check the permissions of the file and of the \
         directories above it",
        path = .path.display()
    )]
    NotReadable {
        /// The image.
        path: PathBuf,
        /// Effective user id of the process.
        uid: u32,
    },
    /// The process may read it, but not write to it.
    #[error(
        "{path} may be read but not written by user id {uid}; check its permissions, or serve it \
         with --read-only",
        path = .path.display()
    )]
    NotWritable {
        /// The image.
        path: PathBuf,
        /// Effective user id of the process.
        uid: u32,
    },
    /// It is on a file system that is mounted read-only.
    #[error(
        "{path} is on a file system mounted read-only; serve it with --read-only",
        path = .path.display()
    )]
    ReadOnlyFileSystem {
        /// The image.
        path: PathBuf,
    },
    /// It is smaller than one sector.
    #[error(
        "{path} of {size} bytes is too small; a disk has at least {SECTOR} bytes",
        path = .path.display()
    )]
    TooSmall {
        /// The image.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
    },
    /// Other processes hold its lock.
    #[error("{path} is in use: {by}; is it being served already?", path = .path.display())]
    AlreadyServed {
        /// The image.
        path: PathBuf,
        /// The processes.
        by: Holders,
    },
    /// It cannot be locked.
    #[error(
        "{path} cannot be locked ({kind}): {source}; its file system must keep locks: on NFS, see \
         that the lock services run on both hosts (rpc.statd, lockd), or mount it with \
         local_lock=all if no other host uses the image",
        path = .path.display()
    )]
    NotLocked {
        /// The image.
        path: PathBuf,
        /// The kind of lock that failed.
        kind: LockKind,
        /// The error of the system call.
        source: io::Error,
    },
    /// It did not exist and could not be created.
    #[error("{path} cannot be created: {source}", path = .path.display())]
    CannotCreate {
        /// The image.
        path: PathBuf,
        /// The error of the system call.
        source: io::Error,
    },
    /// Its file system cannot bypass the page cache.
    #[error(
        "cannot open {path} with O_DIRECT: the file system does not support it; start without \
         --direct",
        path = .path.display()
    )]
    NoDirect {
        /// The image.
        path: PathBuf,
    },
    /// Another system call failed.
    #[error("{path} cannot be opened: {source}", path = .path.display())]
    Other {
        /// The image.
        path: PathBuf,
        /// The error of the system call.
        source: io::Error,
    },
}

/// An open image, locked against a second server.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) file: File,
    pub(super) kind: FileKind,
    /// Size in bytes, the unserved tail included.
    pub(super) full_size: u64,
}

/// The two kinds of file that hold a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FileKind {
    File,
    /// `sector` is the device's logical sector size in bytes, usually 512 or 4096.
    BlockDevice {
        sector: u64,
    },
}

/// Opens and locks an existing image.
pub(super) fn open(path: &Path, access: Access) -> Result<Opened, OpenError> {
    // Check the type before opening: opening a pipe may block, opening a device may have effects.
    let found = fs::metadata(path).map_err(|error| classify(path, error, ReadProbe::NotTried))?;
    check_type(path, found.file_type())?;
    let file = open_file(path, access)?;
    let other = |source| OpenError::Other { path: path.to_owned(), source };
    let file_type = file.metadata().map_err(other)?.file_type();
    check_type(path, file_type)?;
    let mode = if access.read_only { LockMode::Shared } else { LockMode::Exclusive };
    lock::acquire(&file, mode).map_err(|error| not_locked(path, error))?;
    let kind = match file_type.is_block_device() {
        true => FileKind::BlockDevice { sector: syscalls::sector_size(&file).map_err(other)? },
        false => FileKind::File,
    };
    // `SEEK_END` works for files and devices alike; `st_size` of a device is 0.
    let full_size = (&file).seek(SeekFrom::End(0)).map_err(other)?;
    if full_size < SECTOR {
        return Err(OpenError::TooSmall { path: path.to_owned(), size: full_size });
    }
    Ok(Opened { file, kind, full_size })
}

/// The size of the disk in an image, in bytes: its whole sectors. Takes no lock, so it works on an
/// image in use.
///
/// # Errors
/// When the path is no image, or may not be read.
pub fn image_size(path: &Path) -> Result<u64, OpenError> {
    let found = fs::metadata(path).map_err(|error| classify(path, error, ReadProbe::NotTried))?;
    check_type(path, found.file_type())?;
    let mut file = open_file(path, Access { read_only: true })?;
    let size = file.seek(SeekFrom::End(0));
    let size = size.map_err(|source| OpenError::Other { path: path.to_owned(), source })?;
    Ok(size - size % SECTOR)
}

/// Creates a sparse file of `size` bytes, durably, unless the path exists. Returns whether it did.
pub(super) fn create_if_missing(path: &Path, size: u64) -> Result<bool, OpenError> {
    if size < SECTOR {
        // Such an image could not be served. One that exists has its own size.
        let exists = fs::symlink_metadata(path).is_ok();
        let too_small = OpenError::TooSmall { path: path.to_owned(), size };
        return if exists { Ok(false) } else { Err(too_small) };
    }
    match OpenOptions::new().write(true).create_new(true).mode(0o600).open(path) {
        Ok(file) => fill_new(path, &file, size).map(|()| true).map_err(|source| {
            // The next start would take a partly created image for a complete one. A failure to
            // remove it adds nothing to the error.
            let _ = fs::remove_file(path);
            OpenError::CannotCreate { path: path.to_owned(), source }
        }),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(source) => Err(OpenError::CannotCreate { path: path.to_owned(), source }),
    }
}

/// Sets the size of a new file, and makes the file and its directory entry durable.
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
        classify(path, error, if readable { ReadProbe::Readable } else { ReadProbe::Unreadable })
    })
}

/// Whether an image that could not be opened can be opened for reading.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ReadProbe {
    /// Not tried: stat(2) failed already.
    NotTried,
    /// It cannot be opened for reading.
    Unreadable,
    /// It can be opened for reading.
    Readable,
}

fn not_locked(path: &Path, error: LockError) -> OpenError {
    let path = path.to_owned();
    match error {
        LockError::Held(by) => OpenError::AlreadyServed { path, by },
        LockError::Failed { kind, source } => OpenError::NotLocked { path, kind, source },
    }
}

/// The [`OpenError`] for an error of stat(2) or open(2).
fn classify(path: &Path, error: io::Error, probe: ReadProbe) -> OpenError {
    let path = path.to_owned();
    let uid = nix::unistd::geteuid().as_raw();
    match (error.kind(), probe) {
        (io::ErrorKind::NotFound, _) => OpenError::Missing { path },
        (io::ErrorKind::PermissionDenied, ReadProbe::Readable) => {
            OpenError::NotWritable { path, uid }
        }
        (io::ErrorKind::PermissionDenied, _) => OpenError::NotReadable { path, uid },
        (io::ErrorKind::ReadOnlyFilesystem, _) => OpenError::ReadOnlyFileSystem { path },
        _ => OpenError::Other { path, source: error },
    }
}

impl OpenError {
    /// The error as a number of errno(3), for the journal and the service manager.
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
            Self::NoDirect { .. } => Errno::EOPNOTSUPP,
            Self::CannotCreate { source, .. }
            | Self::NotLocked { source, .. }
            | Self::Other { source, .. } => {
                return source.raw_os_error();
            }
        };
        Some(errno as i32)
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

    /// A directory, and an image of this size in it.
    fn file(size: u64) -> (TempDir, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.img");
        File::create(&path).unwrap().set_len(size).unwrap();
        (directory, path)
    }

    /// Asserts that opening fails with a message that begins with the path; returns the error.
    fn refused(path: &Path, access: Access) -> OpenError {
        let error = open(path, access).unwrap_err();
        assert!(error.to_string().starts_with(&path.display().to_string()), "{error}");
        error
    }

    /// The same as the user nobody, so that permissions apply when the tests run as root.
    fn refused_as_nobody(path: &Path, access: Access) -> OpenError {
        std::thread::scope(|scope| {
            let nobody = scope.spawn(|| {
                // Applies to this thread only, and has no effect unless the test runs as root.
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
    fn missing_image_is_refused_with_a_hint_to_create() {
        let directory = tempfile::tempdir().unwrap();
        let error = refused(&directory.path().join("none"), WRITING);
        assert!(matches!(error, OpenError::Missing { .. }), "{error:?}");
        assert!(error.to_string().contains("--create"));
    }

    #[test]
    fn directory_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let error = refused(directory.path(), READING);
        assert!(matches!(error, OpenError::Directory { .. }), "{error:?}");
    }

    #[test]
    fn character_devices_and_pipes_are_refused_without_blocking() {
        let directory = tempfile::tempdir().unwrap();
        let pipe = directory.path().join("pipe");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
        for path in [&pipe, Path::new("/dev/null")] {
            let error = refused(path, READING);
            assert!(matches!(error, OpenError::NotADisk { .. }), "{error:?}");
        }
    }

    #[test]
    fn unreadable_image_is_refused() {
        let (directory, path) = file(4096);
        permit(directory.path(), 0o755);
        permit(&path, 0o000);
        for access in [READING, WRITING] {
            let error = refused_as_nobody(&path, access);
            assert!(matches!(error, OpenError::NotReadable { .. }), "{error:?}");
        }
    }

    #[test]
    fn image_in_an_unsearchable_directory_is_refused() {
        let (directory, path) = file(4096);
        permit(directory.path(), 0o000);
        let error = refused_as_nobody(&path, READING);
        permit(directory.path(), 0o755);
        assert!(matches!(error, OpenError::NotReadable { .. }), "{error:?}");
    }

    #[test]
    fn unwritable_image_is_refused_with_a_hint_to_read_only() {
        let (directory, path) = file(4096);
        permit(directory.path(), 0o755);
        permit(&path, 0o444);
        let error = refused_as_nobody(&path, WRITING);
        assert!(matches!(error, OpenError::NotWritable { .. }), "{error:?}");
        assert!(error.to_string().contains("--read-only"));
        assert!(open(&path, READING).is_ok());
    }

    #[test]
    fn errors_of_open_are_classified() {
        let error_of =
            |errno, probe| classify(Path::new("/disk"), io::Error::from_raw_os_error(errno), probe);
        let read_only = error_of(libc::EROFS, ReadProbe::Readable);
        assert!(matches!(read_only, OpenError::ReadOnlyFileSystem { .. }), "{read_only:?}");
        assert!(
            read_only.to_string().contains("/disk")
                && read_only.to_string().contains("--read-only")
        );
        let not_permitted = error_of(libc::EPERM, ReadProbe::Readable);
        assert!(matches!(not_permitted, OpenError::NotWritable { .. }), "{not_permitted:?}");
        let broken = error_of(libc::EIO, ReadProbe::Unreadable);
        assert!(matches!(broken, OpenError::Other { .. }), "{broken:?}");
    }

    #[test]
    fn smallest_disk_has_one_sector() {
        let (_directory, path) = file(SECTOR - 1);
        let error = refused(&path, WRITING);
        assert!(matches!(error, OpenError::TooSmall { size: 511, .. }), "{error:?}");
        let (_directory, path) = file(SECTOR);
        assert_eq!(open(&path, WRITING).unwrap().full_size, SECTOR);
    }

    #[test]
    fn image_in_use_is_refused() {
        let (_directory, path) = file(4096);
        let first = open(&path, WRITING).unwrap();
        for access in [WRITING, READING] {
            let error = refused(&path, access);
            assert!(matches!(error, OpenError::AlreadyServed { .. }), "{error:?}");
        }
        drop(first);
        assert!(open(&path, WRITING).is_ok());
    }

    #[test]
    fn readers_share_an_image_and_keep_out_writers() {
        let (_directory, path) = file(4096);
        let _readers = (open(&path, READING).unwrap(), open(&path, READING).unwrap());
        assert!(matches!(refused(&path, WRITING), OpenError::AlreadyServed { .. }));
    }

    #[test]
    fn created_image_is_sparse_and_private() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("new.img");
        create_if_missing(&path, 1 << 30).unwrap();
        let made = fs::metadata(&path).unwrap();
        assert_eq!((made.len(), made.blocks(), made.mode() & 0o077), (1 << 30, 0, 0));
    }

    #[test]
    fn existing_image_is_not_created_again() {
        let (_directory, path) = file(0);
        fs::write(&path, [7; 1024]).unwrap();
        create_if_missing(&path, 4096).unwrap();
        create_if_missing(&path, 0).unwrap();
        assert_eq!(fs::read(&path).unwrap(), [7; 1024]);
    }

    #[test]
    fn image_smaller_than_a_sector_is_not_created() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("new.img");
        let error = create_if_missing(&path, SECTOR - 1).unwrap_err();
        assert!(matches!(error, OpenError::TooSmall { .. }), "{error:?}");
        assert!(!path.exists());
        create_if_missing(&path, SECTOR).unwrap();
        assert!(path.exists());
    }

    #[test]
    fn failed_creation_leaves_no_file() {
        let directory = tempfile::tempdir().unwrap();
        let nowhere = directory.path().join("no/such/disk.img");
        // Larger than any file system allows.
        let huge = directory.path().join("huge.img");
        for (path, size) in [(&nowhere, 4096), (&huge, u64::MAX)] {
            let error = create_if_missing(path, size).unwrap_err();
            assert!(matches!(error, OpenError::CannotCreate { .. }), "{error:?}");
            assert!(error.to_string().contains(&path.display().to_string()));
            assert!(!path.exists());
        }
    }
}
