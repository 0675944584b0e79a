//! Reply data by reference: pages of the image in a pipe (`splice(2)`), to be sent from there.
//! Never copies them except into a snapshot, and never holds more than one pipe does.
//!
//! The pipe is filled before the reply's header is written: an error of the disk shows while filling,
//! and data in the pipe is certain to be sent. Until the client has it, the data may still change,
//! but only in bytes that a client changes meanwhile: only images on file systems with this property
//! are pinned (`disk/file_system`).
//!
//! `cargo bench --bench sending` compares the ways to send long reads. Of 64 KiB and 256 KiB, references
//! cost less processor time than copies through a buffer (up to 3.5 times less) and than sending from a
//! mapping, in memory and on ext4. `sendfile(2)` costs about as much, but can fail after the header. With
//! 1 MiB the rates of all these ways vary more from run to run than from each other; pieces of 256 KiB and
//! of 1 MiB were each ahead in some runs.

use crate::net::Stream;
use crate::range::Range;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::{pipe2, read};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Size of the pipe in bytes; each of its slots holds one page. The most that an unprivileged process
/// may set (`pipe-max-size` in proc(5)).
const PIPE_SIZE: i32 = 1 << 20;
/// The usual page size in bytes. Where pages are larger, filling the pipe fails if a piece does not
/// fit.
const PAGE: u64 = 4096;
/// Shortest piece to pin, in bytes: copying a shorter one costs less than the system calls.
pub(super) const PIN_MIN: u64 = 64 << 10;

/// Whether to pin a piece: it is long enough, and its pages fit into the pipe.
pub(super) fn fits(piece: Range) -> bool {
    let pages = piece.end().div_ceil(PAGE) - piece.offset() / PAGE;
    piece.length() >= PIN_MIN && pages * PAGE <= PIPE_SIZE as u64
}

/// A pipe for one piece at a time, created on first use.
#[derive(Debug, Default)]
pub(super) struct Pinned {
    pipe: Option<Pipe>,
    /// Bytes in the pipe.
    length: usize,
    /// The connection cannot send references, or no pipe of this size could be created: descriptors and memory for
    /// pipes are limited.
    unavailable: bool,
}

#[derive(Debug)]
struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
}

impl Pipe {
    fn new() -> io::Result<Self> {
        let (read, write) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
        fcntl(&write, FcntlArg::F_SETPIPE_SZ(PIPE_SIZE))?;
        Ok(Self { read, write })
    }
}

impl Pinned {
    /// For a connection that cannot send references.
    pub(super) fn forbidden() -> Self {
        Self { unavailable: true, ..Self::default() }
    }

    pub(super) fn length(&self) -> usize {
        self.length
    }

    /// Lets `fill` put `length` bytes into the empty pipe. The pipe stays empty if that fails,
    /// with the error of `fill` or with `Unsupported` without a pipe.
    pub(super) fn pin(
        &mut self,
        length: usize,
        fill: impl FnOnce(BorrowedFd<'_>) -> io::Result<()>,
    ) -> io::Result<()> {
        debug_assert!(self.length == 0, "one piece at a time");
        if self.pipe.is_none() && !self.unavailable {
            self.pipe = Pipe::new().ok();
            self.unavailable = self.pipe.is_none();
        }
        let Some(pipe) = &self.pipe else { return Err(io::ErrorKind::Unsupported.into()) };
        match fill(pipe.write.as_fd()) {
            Ok(()) => {
                self.length = length;
                Ok(())
            }
            Err(error) => {
                // Discards a part that may be in the pipe.
                self.pipe = None;
                Err(error)
            }
        }
    }

    /// Sends as much as the socket accepts now; false if some is left.
    pub(super) fn send(&mut self, to: &Stream) -> io::Result<bool> {
        while self.length > 0 {
            let Some(pipe) = &self.pipe else { return Err(io::ErrorKind::BrokenPipe.into()) };
            match to.try_send_from(pipe.read.as_fd(), self.length) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => self.length -= count.min(self.length),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    /// Empties the pipe into memory. Fails if it contains less than was put in.
    pub(super) fn drain(&mut self) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; std::mem::take(&mut self.length)];
        let mut drained = 0;
        while drained < bytes.len() {
            let Some(pipe) = &self.pipe else { return Err(io::ErrorKind::BrokenPipe.into()) };
            match read(&pipe.read, &mut bytes[drained..]) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => drained += count,
                Err(nix::errno::Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(bytes)
    }

    /// Closes the pipe if it is empty.
    pub(super) fn shrink(&mut self) {
        if self.length == 0 {
            *self = Self::default();
        }
    }

    pub(super) fn is_shrunk(&self) -> bool {
        self.pipe.is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::unistd::write;

    fn write_all(bytes: &[u8]) -> impl FnOnce(BorrowedFd<'_>) -> io::Result<()> + '_ {
        move |pipe| {
            assert_eq!(write(pipe, bytes), Ok(bytes.len()));
            Ok(())
        }
    }

    fn pinned(bytes: &[u8]) -> Pinned {
        let mut pinned = Pinned::default();
        pinned.pin(bytes.len(), write_all(bytes)).unwrap();
        pinned
    }

    #[test]
    fn pinned_bytes_are_drained_unchanged() {
        let mut pinned = pinned(b"some pages");
        assert_eq!((pinned.length(), pinned.is_shrunk()), (10, false));
        pinned.shrink();
        assert_eq!(pinned.drain().unwrap(), b"some pages");
        assert_eq!(pinned.length(), 0);
        pinned.shrink();
        assert!(pinned.is_shrunk());
    }

    #[test]
    fn a_failed_fill_leaves_the_pipe_empty() {
        let mut pinned = pinned(b"");
        let half = |pipe: BorrowedFd<'_>| {
            write(pipe, b"half").unwrap();
            Err(io::Error::from_raw_os_error(nix::libc::EIO))
        };
        assert_eq!(pinned.pin(8, half).unwrap_err().raw_os_error(), Some(nix::libc::EIO));
        assert_eq!(pinned.length(), 0);
        pinned.pin(2, write_all(b"ok")).unwrap();
        assert_eq!(pinned.drain().unwrap(), b"ok");
    }

    #[test]
    fn long_pieces_whose_pages_fit_are_pinned() {
        let piece = |offset, length| fits(Range::within(1 << 40, offset, length).unwrap());
        assert!(piece(0, PIN_MIN) && piece(511, PIN_MIN) && !piece(0, PIN_MIN - 1));
        let most = PIPE_SIZE as u64;
        assert!(piece(0, most) && piece(PAGE, most) && piece(1, most - PAGE));
        assert!(!piece(512, most) && !piece(0, most + 1) && !piece(1, most - PAGE + 4096));
        let pipe = Pipe::new().unwrap();
        assert!(fcntl(&pipe.write, FcntlArg::F_GETPIPE_SZ).unwrap() >= PIPE_SIZE);
    }
}
