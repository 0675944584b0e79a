//! The control socket's place in the file system: made, taken over, removed.
//! Never accepts a connection, and never touches a path that is not a socket.
//!
//! A socket is made under a temporary name beside its place, private and listening, and only then
//! renamed there. So whoever finds it under its name is answered, nobody else ever gets in, and of
//! two servers that want the same place one is told so.

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
use nix::sys::socket::{self, AddressFamily, Backlog, SockFlag, SockType, UnixAddr};
use nix::sys::stat::{Mode, fchmod};
use std::ffi::OsStr;
use std::fmt;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

/// Longest path of a unix socket, in bytes (`sun_path` of unix(7) less its closing NUL).
pub const PATH_BYTES_MAX: usize = 107;
/// How often to look again when a place changes between looking and taking.
const ATTEMPTS_MAX: usize = 4;

/// A control socket that listens but does not answer yet; see [`ControlSocket::start`].
///
/// Dropping one that was made by [`ControlSocket::bind`] removes it from the file system, unless
/// something else has taken its place.
#[derive(Debug)]
pub struct ControlSocket {
    // Order matters: the place is given up while the socket is open, since an open socket's inode
    // number cannot be anybody else's.
    place: Option<OwnedPath>,
    listener: UnixListener,
}

impl ControlSocket {
    /// Makes a socket at `path`, for its owner only (mode 0600). Replaces a stale socket, that is,
    /// one that nobody listens on.
    ///
    /// # Errors
    ///
    /// One [`ControlSocketError`] per thing an operator can get wrong; the path is then as it was.
    pub fn bind(path: &Path) -> Result<Self, ControlSocketError> {
        // Before anything is made: most mistakes are seen here.
        inhabitant(path)?;
        let temporary = temporary_beside(path)?;
        let listener = listen_at(&temporary, path)?;
        let moved = SocketIdentity::of(&temporary)
            .map_err(|error| ControlSocketError::io(path, "look at the new socket", error))
            .and_then(|identity| move_into_place(&temporary, path).map(|()| identity));
        match moved {
            Ok(identity) => {
                Ok(Self { place: Some(OwnedPath { path: path.to_owned(), identity }), listener })
            }
            Err(error) => {
                let _ = fs::remove_file(&temporary);
                Err(error)
            }
        }
    }

    /// Takes a socket that somebody else made and will remove, such as the service manager.
    #[must_use]
    pub fn from_listener(listener: UnixListener) -> Self {
        Self { place: None, listener }
    }

    /// What to accept connections from.
    pub(super) fn listener(&self) -> &UnixListener {
        &self.listener
    }

    /// Lets nobody else find it; whoever has found it already can still be accepted. False for a
    /// socket that somebody else made: it goes on without us.
    pub(super) fn hide(&self) -> bool {
        self.place.as_ref().inspect(|place| place.give_up()).is_some()
    }
}

/// Which file it is, whatever its name.
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

/// A name in the file system that is ours to remove for as long as it leads to our socket.
#[derive(Debug)]
struct OwnedPath {
    path: PathBuf,
    identity: SocketIdentity,
}

impl OwnedPath {
    fn give_up(&self) {
        if SocketIdentity::of(&self.path).is_ok_and(|found| found == self.identity) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

impl Drop for OwnedPath {
    fn drop(&mut self) {
        self.give_up();
    }
}

/// A listening socket of mode 0600 at `temporary`; errors speak of `path`.
fn listen_at(temporary: &Path, path: &Path) -> Result<UnixListener, ControlSocketError> {
    // Left behind by a process that had our number and is dead.
    if fs::symlink_metadata(temporary).is_ok_and(|found| found.file_type().is_socket()) {
        let _ = fs::remove_file(temporary);
    }
    let make = || -> nix::Result<OwnedFd> {
        let socket = stream_socket(SockFlag::SOCK_CLOEXEC)?;
        // The mode of the socket is the mode of the file that bind() makes, so that there is no
        // moment at which the file is open to more.
        fchmod(&socket, Mode::S_IRUSR | Mode::S_IWUSR)?;
        socket::bind(socket.as_raw_fd(), &UnixAddr::new(temporary)?)?;
        socket::listen(&socket, Backlog::MAXCONN)?;
        Ok(socket)
    };
    match make() {
        Ok(socket) => Ok(UnixListener::from(socket)),
        Err(Errno::ENOENT) => Err(ControlSocketError::NoDirectory { path: path.to_owned() }),
        Err(errno) => Err(ControlSocketError::io(path, "make the socket", errno.into())),
    }
}

fn stream_socket(flags: SockFlag) -> nix::Result<OwnedFd> {
    socket::socket(AddressFamily::Unix, SockType::Stream, flags, None)
}

/// A name in the same directory that no other living process chooses: the socket's own, cut where
/// needed, and our process id.
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

/// Puts the socket at `temporary` where `path` says, in place of nothing or of a stale socket.
fn move_into_place(temporary: &Path, path: &Path) -> Result<(), ControlSocketError> {
    for _ in 0..ATTEMPTS_MAX {
        let moved = match inhabitant(path)? {
            None => rename(temporary, path, RenameFlags::RENAME_NOREPLACE),
            Some(stale) => replace(temporary, path, stale),
        };
        match moved {
            Ok(()) => return Ok(()),
            // The place changed after we had looked: look again.
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

/// Changes places with the stale socket, then removes it; changes back if it turns out to be
/// another than the one we found stale.
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
        // A file system that knows only plain renames.
        Err(_) => Ok(()),
    }
}

fn rename(from: &Path, to: &Path, flags: RenameFlags) -> nix::Result<()> {
    match renameat2(AT_FDCWD, from, AT_FDCWD, to, flags) {
        // A few file systems know no flags. There two servers that start at the same moment may
        // both take the place, and the later one keeps it.
        Err(Errno::EINVAL) => renameat2(AT_FDCWD, from, AT_FDCWD, to, RenameFlags::empty()),
        done => done,
    }
}

/// What is at `path`: nothing, or a stale socket.
fn inhabitant(path: &Path) -> Result<Option<SocketIdentity>, ControlSocketError> {
    let metadata = match fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(ControlSocketError::io(path, "look at the path", error)),
    };
    if !metadata.file_type().is_socket() {
        return Err(ControlSocketError::NotASocket { path: path.to_owned() });
    }
    match knock(path) {
        Err(Errno::ECONNREFUSED) => Ok(Some(SocketIdentity::from(&metadata))),
        Err(Errno::ENOENT) => Ok(None),
        // Full is also an answer.
        Ok(()) | Err(Errno::EAGAIN) => Err(ControlSocketError::InUse { path: path.to_owned() }),
        Err(errno) => Err(ControlSocketError::io(
            path,
            "find out whether a server answers there",
            errno.into(),
        )),
    }
}

/// Connects, without waiting, and closes.
fn knock(path: &Path) -> nix::Result<()> {
    let socket = stream_socket(SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK)?;
    socket::connect(socket.as_raw_fd(), &UnixAddr::new(path)?)
}

/// Why there is no control socket. Its `Display` is for the operator.
#[derive(Debug)]
pub enum ControlSocketError {
    /// The path is longer than [`PATH_BYTES_MAX`], or its directory's name leaves no room.
    TooLong {
        /// Where the socket was wanted.
        path: PathBuf,
        /// Its length in bytes.
        length: usize,
    },
    /// There is no such directory.
    NoDirectory {
        /// Where the socket was wanted.
        path: PathBuf,
    },
    /// Something else is there already.
    NotASocket {
        /// Where the socket was wanted.
        path: PathBuf,
    },
    /// Another server listens there.
    InUse {
        /// Where the socket was wanted.
        path: PathBuf,
    },
    /// The system said no.
    Io {
        /// Where the socket was wanted.
        path: PathBuf,
        /// What was being done, as in "cannot …".
        doing: &'static str,
        /// What the system said.
        error: io::Error,
    },
}

impl ControlSocketError {
    fn io(path: &Path, doing: &'static str, error: io::Error) -> Self {
        Self::Io { path: path.to_owned(), doing, error }
    }

    /// The kernel's number for what is wrong, for programs that want one (errno(3)).
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

    fn path(&self) -> &Path {
        match self {
            Self::TooLong { path, .. }
            | Self::NoDirectory { path }
            | Self::NotASocket { path }
            | Self::InUse { path }
            | Self::Io { path, .. } => path,
        }
    }
}

impl fmt::Display for ControlSocketError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "control socket {}: ", self.path().display())?;
        match self {
            Self::TooLong { length, .. } => write!(
                f,
                "the path has {length} bytes where {PATH_BYTES_MAX} are possible; choose a shorter one"
            ),
            Self::NoDirectory { .. } => {
                f.write_str("its directory does not exist; create it or choose another path")
            }
            Self::NotASocket { .. } => f.write_str(
                "something that is not a socket is there; remove it or choose another path",
            ),
            Self::InUse { .. } => {
                f.write_str("another server answers there; stop it or choose another path")
            }
            Self::Io { doing, error, .. } => write!(f, "cannot {doing}: {error}"),
        }
    }
}

impl std::error::Error for ControlSocketError {}

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
    fn a_new_socket_answers_is_private_and_goes_when_dropped() {
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
    fn the_file_is_private_before_anybody_can_find_it() {
        let directory = directory();
        let temporary = directory.path().join("t");
        let _listener = listen_at(&temporary, &temporary).unwrap();
        assert_eq!(fs::metadata(&temporary).unwrap().permissions().mode() & 0o7777, 0o600);
    }

    #[test]
    fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
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
    fn a_socket_that_came_alive_after_we_looked_is_given_back_its_place() {
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
    fn a_file_that_is_not_a_socket_is_left_alone() {
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
    fn a_missing_directory_is_said_to_be_missing() {
        let error = ControlSocket::bind(&directory().path().join("no/control.sock")).unwrap_err();
        assert!(matches!(error, ControlSocketError::NoDirectory { .. }), "{error}");
        let error = ControlSocket::bind(Path::new("/dev/null/control.sock")).unwrap_err();
        assert!(matches!(error, ControlSocketError::Io { .. }), "{error}");
    }

    #[test]
    fn a_path_may_have_107_bytes_and_not_one_more() {
        let directory = directory();
        let room = PATH_BYTES_MAX - directory.path().as_os_str().len() - 1;
        let longest = directory.path().join("s".repeat(room));
        let _socket = ControlSocket::bind(&longest).unwrap();
        UnixStream::connect(&longest).unwrap();
        let error = ControlSocket::bind(&directory.path().join("s".repeat(room + 1))).unwrap_err();
        assert!(matches!(error, ControlSocketError::TooLong { length: 108, .. }), "{error}");
    }

    #[test]
    fn a_socket_that_took_our_place_is_not_removed() {
        let directory = directory();
        let path = directory.path().join("control.sock");
        let ours = ControlSocket::bind(&path).unwrap();
        fs::remove_file(&path).unwrap();
        let _theirs = UnixListener::bind(&path).unwrap();
        drop(ours);
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn a_socket_that_was_handed_to_us_is_not_removed() {
        let directory = directory();
        let path = directory.path().join("control.sock");
        drop(ControlSocket::from_listener(UnixListener::bind(&path).unwrap()));
        assert!(path.exists());
    }

    #[test]
    fn what_a_dead_process_of_our_number_left_behind_is_no_obstacle() {
        let directory = directory();
        let path = directory.path().join("control.sock");
        drop(UnixListener::bind(temporary_beside(&path).unwrap()).unwrap());
        let _socket = ControlSocket::bind(&path).unwrap();
        assert_eq!(names(&directory), [path.as_path()]);
    }
}
