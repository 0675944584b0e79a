//! The control socket in the file system: created, replaced if stale, removed.
//! Never accepts a connection, and never touches a path that is not a socket.
//!
//! A socket is created under a temporary name in the same directory, with mode 0600 and listening,
//! and only then renamed. A client that finds the socket therefore gets a reply, no other user can
//! connect at any time, and of two servers with the same path one fails.

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
use nix::sys::socket::{self, AddressFamily, Backlog, SockFlag, SockType, UnixAddr};
use nix::sys::stat::{Mode, fchmod};
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

/// Longest path of a unix socket, in bytes (`sun_path` of unix(7) less its closing NUL).
pub const PATH_BYTES_MAX: usize = 107;
/// Attempts when the path changes between the check and the rename.
const ATTEMPTS_MAX: usize = 4;

/// A control socket that listens but is not served yet; see [`ControlSocket::start`].
///
/// Dropping one that [`ControlSocket::bind`] created removes its file, unless the path names
/// another file by then.
#[derive(Debug)]
pub struct ControlSocket {
    // The order matters: the file is removed while the socket is open, since no other file can have
    // the inode number of an open socket.
    path: Option<OwnedPath>,
    listener: UnixListener,
}

impl ControlSocket {
    /// Creates a socket at `path` for its owner only (mode 0600). Replaces a stale socket, which no
    /// process listens on.
    ///
    /// # Errors
    ///
    /// One [`ControlSocketError`] per mistake of an operator; the path is unchanged then.
    pub fn bind(path: &Path) -> Result<Self, ControlSocketError> {
        // Most mistakes are found here, before anything is created.
        stale_socket_at(path)?;
        let temporary = temporary_beside(path)?;
        let listener = listen_at(&temporary, path)?;
        let moved = SocketIdentity::of(&temporary)
            .map_err(|error| ControlSocketError::io(path, "look at the new socket", error))
            .and_then(|identity| rename_into_place(&temporary, path).map(|()| identity));
        match moved {
            Ok(identity) => {
                Ok(Self { path: Some(OwnedPath { path: path.to_owned(), identity }), listener })
            }
            Err(error) => {
                let _ = fs::remove_file(&temporary);
                Err(error)
            }
        }
    }

    /// Uses a socket that the service manager created and will remove.
    #[must_use]
    pub fn from_listener(listener: UnixListener) -> Self {
        Self { path: None, listener }
    }

    /// The socket to accept connections from.
    pub(super) fn listener(&self) -> &UnixListener {
        &self.listener
    }

    /// Removes the file: no further client can connect, those in the backlog can still be accepted.
    /// Returns false for an inherited socket, which the service manager keeps.
    pub(super) fn hide(&self) -> bool {
        self.path.as_ref().inspect(|path| path.remove()).is_some()
    }
}

/// Device and inode of a socket file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct SocketIdentity {
    device: u64,
    inode: u64,
}

impl SocketIdentity {
    fn of(path: &Path) -> io::Result<Self> {
        fs::symlink_metadata(path).map(|metadata| Self::from(&metadata))
    }
}

impl From<&fs::Metadata> for SocketIdentity {
    fn from(metadata: &fs::Metadata) -> Self {
        Self { device: metadata.dev(), inode: metadata.ino() }
    }
}

/// The path of our socket. Removed only while it names our socket.
#[derive(Debug)]
struct OwnedPath {
    path: PathBuf,
    identity: SocketIdentity,
}

impl OwnedPath {
    fn remove(&self) {
        if SocketIdentity::of(&self.path).is_ok_and(|found| found == self.identity) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

impl Drop for OwnedPath {
    fn drop(&mut self) {
        self.remove();
    }
}

/// Creates a listening socket of mode 0600 at `temporary`; errors name `path`.
fn listen_at(temporary: &Path, path: &Path) -> Result<UnixListener, ControlSocketError> {
    // Left by a dead process that had our process id.
    if fs::symlink_metadata(temporary).is_ok_and(|found| found.file_type().is_socket()) {
        let _ = fs::remove_file(temporary);
    }
    let create = || -> nix::Result<OwnedFd> {
        let socket = stream_socket(SockFlag::SOCK_CLOEXEC)?;
        // bind(2) gives the file the mode of the socket, so that other users can never connect.
        fchmod(&socket, Mode::S_IRUSR | Mode::S_IWUSR)?;
        socket::bind(socket.as_raw_fd(), &UnixAddr::new(temporary)?)?;
        socket::listen(&socket, Backlog::MAXCONN)?;
        Ok(socket)
    };
    match create() {
        Ok(socket) => Ok(UnixListener::from(socket)),
        Err(Errno::ENOENT) => Err(ControlSocketError::NoDirectory { path: path.to_owned() }),
        Err(errno) => Err(ControlSocketError::io(path, "make the socket", errno.into())),
    }
}

fn stream_socket(flags: SockFlag) -> nix::Result<OwnedFd> {
    socket::socket(AddressFamily::Unix, SockType::Stream, flags, None)
}

/// A path in the same directory that no other living process uses: the socket's name, shortened if
/// necessary, and our process id.
fn temporary_beside(path: &Path) -> Result<PathBuf, ControlSocketError> {
    let length = path.as_os_str().len();
    let too_long = || ControlSocketError::TooLong { path: path.to_owned(), length };
    let name = path.file_name().map_or(&b""[..], OsStr::as_bytes);
    let suffix = format!(".{}", std::process::id());
    let cut = (length + suffix.len()).saturating_sub(PATH_BYTES_MAX);
    let kept = name.len().checked_sub(cut).ok_or_else(too_long)?;
    if length > PATH_BYTES_MAX {
        return Err(too_long());
    }
    let temporary = [&name[..kept], suffix.as_bytes()].concat();
    Ok(path.with_file_name(std::ffi::OsString::from_vec(temporary)))
}

/// Renames the socket from `temporary` to `path`, which does not exist or is a stale socket.
fn rename_into_place(temporary: &Path, path: &Path) -> Result<(), ControlSocketError> {
    for _ in 0..ATTEMPTS_MAX {
        let moved = match stale_socket_at(path)? {
            None => rename(temporary, path, RenameFlags::RENAME_NOREPLACE),
            Some(stale) => replace(temporary, path, stale),
        };
        match moved {
            Ok(()) => return Ok(()),
            // The path has changed since the check: check again.
            Err(Errno::EEXIST | Errno::ENOENT) => {}
            Err(errno) => {
                return Err(ControlSocketError::io(
                    path,
                    "put the socket in its place",
                    errno.into(),
                ));
            }
        }
    }
    Err(ControlSocketError::InUse { path: path.to_owned() })
}

/// Exchanges our socket with the stale one, then removes the stale one. Exchanges them back if the
/// file at the path is not the socket that was found stale.
fn replace(temporary: &Path, path: &Path, stale: SocketIdentity) -> nix::Result<()> {
    rename(temporary, path, RenameFlags::RENAME_EXCHANGE)?;
    match SocketIdentity::of(temporary) {
        Ok(found) if found != stale => {
            rename(temporary, path, RenameFlags::RENAME_EXCHANGE)?;
            Err(Errno::EEXIST)
        }
        Ok(_) => {
            let _ = fs::remove_file(temporary);
            Ok(())
        }
        // A file system that supports only plain renames.
        Err(_) => Ok(()),
    }
}

fn rename(from: &Path, to: &Path, flags: RenameFlags) -> nix::Result<()> {
    match renameat2(AT_FDCWD, from, AT_FDCWD, to, flags) {
        // A few file systems support no flags. Two servers that start at the same moment may then
        // both take the path, and the later one keeps it.
        Err(Errno::EINVAL) => renameat2(AT_FDCWD, from, AT_FDCWD, to, RenameFlags::empty()),
        done => done,
    }
}

/// The stale socket at `path`, if the path exists.
fn stale_socket_at(path: &Path) -> Result<Option<SocketIdentity>, ControlSocketError> {
    let metadata = match fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(ControlSocketError::io(path, "look at the path", error)),
    };
    if !metadata.file_type().is_socket() {
        return Err(ControlSocketError::NotASocket { path: path.to_owned() });
    }
    match probe(path) {
        Err(Errno::ECONNREFUSED) => Ok(Some(SocketIdentity::from(&metadata))),
        Err(Errno::ENOENT) => Ok(None),
        // A full backlog shows that a server listens.
        Ok(()) | Err(Errno::EAGAIN) => Err(ControlSocketError::InUse { path: path.to_owned() }),
        Err(errno) => Err(ControlSocketError::io(
            path,
            "find out whether a server answers there",
            errno.into(),
        )),
    }
}

/// Connects without blocking, and closes the connection.
fn probe(path: &Path) -> nix::Result<()> {
    let socket = stream_socket(SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK)?;
    socket::connect(socket.as_raw_fd(), &UnixAddr::new(path)?)
}

/// Why there is no control socket; the text is for the operator.
#[derive(Debug, thiserror::Error)]
pub enum ControlSocketError {
    /// The path is longer than [`PATH_BYTES_MAX`], or its directory leaves no room for a name.
    #[error(
        "control socket {}: the path has {length} bytes where {PATH_BYTES_MAX} are possible; \
         choose a shorter one",
        path.display()
    )]
    TooLong {
        /// The path.
        path: PathBuf,
        /// Its length in bytes.
        length: usize,
    },
    /// The directory does not exist.
    #[error(
        "control socket {}: its directory does not exist; create it or choose another path",
        path.display()
    )]
    NoDirectory {
        /// The path.
        path: PathBuf,
    },
    /// The path is another kind of file.
    #[error(
        "control socket {}: something that is not a socket is there; remove it or choose another \
         path",
        path.display()
    )]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// Another server listens there.
    #[error(
        "control socket {}: another server answers there; stop it or choose another path",
        path.display()
    )]
    InUse {
        /// The path.
        path: PathBuf,
    },
    /// A system call failed.
    #[error("control socket {}: cannot {doing}: {error}", path.display())]
    Io {
        /// The path.
        path: PathBuf,
        /// The operation that failed, after "cannot".
        doing: &'static str,
        /// The system's error.
        error: io::Error,
    },
}

impl ControlSocketError {
    fn io(path: &Path, doing: &'static str, error: io::Error) -> Self {
        Self::Io { path: path.to_owned(), doing, error }
    }

    /// The error number of the cause (errno(3)), for the service manager.
    #[must_use]
    pub fn errno(&self) -> Option<i32> {
        let errno = match self {
            Self::TooLong { .. } => Errno::ENAMETOOLONG,
            Self::NoDirectory { .. } => Errno::ENOENT,
            Self::NotASocket { .. } => Errno::ENOTSOCK,
            Self::InUse { .. } => Errno::EADDRINUSE,
            Self::Io { error, .. } => return error.raw_os_error(),
        };
        Some(errno as i32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixStream;

    fn directory() -> tempfile::TempDir {
        tempfile::tempdir().unwrap()
    }

    fn names(directory: &tempfile::TempDir) -> Vec<PathBuf> {
        fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect()
    }

    #[test]
    fn a_new_socket_is_private_and_removed_on_drop() {
        let directory = directory();
        let path = directory.path().join("control.sock");
        let socket = ControlSocket::bind(&path).unwrap();
        UnixStream::connect(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);
        assert_eq!(names(&directory), [path.as_path()]);
        drop(socket);
        assert_eq!(names(&directory), [] as [&Path; 0]);
    }

    #[test]
    fn the_temporary_file_is_private() {
        let directory = directory();
        let temporary = directory.path().join("t");
        let _listener = listen_at(&temporary, &temporary).unwrap();
        assert_eq!(fs::metadata(&temporary).unwrap().permissions().mode() & 0o7777, 0o600);
    }

    #[test]
    fn only_a_stale_socket_is_replaced() {
        let directory = directory();
        let path = directory.path().join("control.sock");
        drop(UnixListener::bind(&path).unwrap());
        let _socket = ControlSocket::bind(&path).unwrap();
        let before = SocketIdentity::of(&path).unwrap();
        let error = ControlSocket::bind(&path).unwrap_err();
        assert!(matches!(error, ControlSocketError::InUse { .. }), "{error}");
        assert_eq!(SocketIdentity::of(&path).unwrap(), before);
        assert_eq!(names(&directory), [path.as_path()]);
    }

    #[test]
    fn socket_other_than_the_stale_one_is_restored() {
        let directory = directory();
        let (path, ours) = (directory.path().join("live"), directory.path().join("ours"));
        drop(UnixListener::bind(&path).unwrap());
        let stale = SocketIdentity::of(&path).unwrap();
        fs::rename(&path, directory.path().join("elsewhere")).unwrap();
        let _live = UnixListener::bind(&path).unwrap();
        let live = SocketIdentity::of(&path).unwrap();
        let _ours = UnixListener::bind(&ours).unwrap();
        assert_eq!(replace(&ours, &path, stale), Err(Errno::EEXIST));
        assert_eq!(SocketIdentity::of(&path).unwrap(), live);
    }

    #[test]
    fn a_file_that_is_not_a_socket_is_unchanged() {
        let directory = directory();
        let path = directory.path().join("precious");
        fs::write(&path, "data").unwrap();
        let error = ControlSocket::bind(&path).unwrap_err();
        assert!(matches!(error, ControlSocketError::NotASocket { .. }), "{error}");
        assert_eq!(fs::read(&path).unwrap(), b"data");
        let link = directory.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(matches!(ControlSocket::bind(&link), Err(ControlSocketError::NotASocket { .. })));
    }

    #[test]
    fn a_missing_directory_is_an_error() {
        let error = ControlSocket::bind(&directory().path().join("no/control.sock")).unwrap_err();
        assert!(matches!(error, ControlSocketError::NoDirectory { .. }), "{error}");
        let error = ControlSocket::bind(Path::new("/dev/null/control.sock")).unwrap_err();
        assert!(matches!(error, ControlSocketError::Io { .. }), "{error}");
    }

    #[test]
    fn a_path_has_at_most_107_bytes() {
        let directory = directory();
        let room = PATH_BYTES_MAX - directory.path().as_os_str().len() - 1;
        let longest = directory.path().join("s".repeat(room));
        let _socket = ControlSocket::bind(&longest).unwrap();
        UnixStream::connect(&longest).unwrap();
        let error = ControlSocket::bind(&directory.path().join("s".repeat(room + 1))).unwrap_err();
        assert!(matches!(error, ControlSocketError::TooLong { length: 108, .. }), "{error}");
    }

    #[test]
    fn another_socket_at_our_path_is_not_removed() {
        let directory = directory();
        let path = directory.path().join("control.sock");
        let ours = ControlSocket::bind(&path).unwrap();
        fs::remove_file(&path).unwrap();
        let _theirs = UnixListener::bind(&path).unwrap();
        drop(ours);
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn an_inherited_socket_is_not_removed() {
        let directory = directory();
        let path = directory.path().join("control.sock");
        drop(ControlSocket::from_listener(UnixListener::bind(&path).unwrap()));
        assert!(path.exists());
    }

    #[test]
    fn temporary_file_of_a_dead_process_is_replaced() {
        let directory = directory();
        let path = directory.path().join("control.sock");
        drop(UnixListener::bind(temporary_beside(&path).unwrap()).unwrap());
        let _socket = ControlSocket::bind(&path).unwrap();
        assert_eq!(names(&directory), [path.as_path()]);
    }
}
