//! Reads whole regular files up to a size limit.
//! Never blocks on a pipe and never reads a device, even if the path leads to one.

use std::fs::{self, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Why a file was not read. The texts do not contain the path.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// It is a directory, a pipe, a socket or a device.
    #[error("not a regular file")]
    NotRegular,
    /// It is longer than this limit in bytes.
    #[error("longer than {0} bytes")]
    TooLong(u64),
    /// A system call failed.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// The content of the regular file at `path`, of at most `bytes_max` bytes.
///
/// # Errors
/// [`ReadError`]; at most `bytes_max` + 1 bytes of a regular file have been read then.
pub fn read(path: &Path, bytes_max: u64) -> Result<Vec<u8>, ReadError> {
    // Opening some devices has effects, and opening a socket fails with a misleading error.
    check_regular(&fs::metadata(path)?)?;
    // The path may lead to another file by now: O_NONBLOCK keeps open(2) of a pipe from blocking.
    let flags = nix::libc::O_NONBLOCK | nix::libc::O_NOCTTY;
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    check_regular(&file.metadata()?)?;
    let mut content = Vec::new();
    let length = file.take(bytes_max.saturating_add(1)).read_to_end(&mut content)?;
    if length as u64 > bytes_max { Err(ReadError::TooLong(bytes_max)) } else { Ok(content) }
}

fn check_regular(metadata: &fs::Metadata) -> Result<(), ReadError> {
    if metadata.is_file() { Ok(()) } else { Err(ReadError::NotRegular) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::stat::Mode;

    #[test]
    fn regular_file_is_read_up_to_the_limit() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        for length in [0, 1, 8] {
            fs::write(&path, vec![7; length]).unwrap();
            assert_eq!(read(&path, 8).unwrap(), vec![7; length]);
        }
        fs::write(&path, [7; 9]).unwrap();
        assert!(matches!(read(&path, 8), Err(ReadError::TooLong(8))));
    }

    #[test]
    fn pipes_devices_sockets_and_directories_are_refused_at_once() {
        let directory = tempfile::tempdir().unwrap();
        let (pipe, socket) = (directory.path().join("pipe"), directory.path().join("socket"));
        nix::unistd::mkfifo(&pipe, Mode::S_IRWXU).unwrap();
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        for path in [&*pipe, &*socket, directory.path(), Path::new("/dev/zero")] {
            assert!(matches!(read(path, 8), Err(ReadError::NotRegular)), "{path:?}");
        }
        let missing = read(&directory.path().join("missing"), 8);
        assert!(matches!(missing, Err(ReadError::Io(e)) if e.kind() == io::ErrorKind::NotFound));
    }
}
