//! Data of a reply that is held by reference: pages of the image in a pipe, to be sent from there.
//! Never copies them, unless the session is packed up, and never holds more than a pipe does.
//!
//! Data is in the pipe before the head of its reply is promised: an error of the disk shows when the
//! pipe is filled, and what is in it is certain to come. Until the client has it, it may still
//! change, but only in bytes that a client changes meanwhile: only images of which that is known
//! are pinned (`disk/file_system`).

use crate::net::Stream;
use crate::range::Range;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::{pipe2, read};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// How large the pipe is, in bytes of whole pages, of which it holds one in each slot: as large as
/// anybody may have one (`pipe-max-size` in proc(5)).
const PIPE_SIZE: i32 = 1 << 20;
/// The size of most pages, in bytes. Where they are larger, what does not fit is seen when it is tried.
const PAGE: u64 = 4096;
/// From this length on data is pinned: below, one copy costs less than the system calls that it would
/// save.
pub(super) const PIN_MIN: u64 = 64 << 10;

/// Whether a piece is worth pinning, and the pages that it lies in fit into the pipe.
pub(super) fn fits(piece: Range) -> bool {
    let pages = piece.end().div_ceil(PAGE) - piece.offset() / PAGE;
    piece.length() >= PIN_MIN && pages * PAGE <= PIPE_SIZE as u64
}

/// A pipe for one piece at a time, made when it is needed.
#[derive(Debug, Default)]
pub(super) struct Pinned {
    pipe: Option<Pipe>,
    /// Bytes that are in it.
    length: usize,
    /// None can be had, of that size: there are limits, of descriptors and of memory for pipes.
    unable: bool,
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
    /// How many bytes wait in it.
    pub(super) fn length(&self) -> usize {
        self.length
    }

    /// Puts `length` bytes into the empty pipe, with `fill`; nothing when that fails.
    ///
    /// # Errors
    /// `Unsupported` when there is no pipe; what `fill` failed with.
    pub(super) fn pin(
        &mut self,
        length: usize,
        fill: impl FnOnce(BorrowedFd<'_>) -> io::Result<()>,
    ) -> io::Result<()> {
        debug_assert!(self.length == 0, "one piece at a time");
        if self.pipe.is_none() && !self.unable {
            self.pipe = Pipe::new().ok();
            self.unable = self.pipe.is_none();
        }
        let Some(pipe) = &self.pipe else { return Err(io::ErrorKind::Unsupported.into()) };
        match fill(pipe.write.as_fd()) {
            Ok(()) => {
                self.length = length;
                Ok(())
            }
            Err(error) => {
                // A part may be in it, that nobody is to get.
                self.pipe = None;
                Err(error)
            }
        }
    }

    /// Sends what the client takes now; false if some is left.
    ///
    /// # Errors
    /// When the connection is broken.
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

    /// Takes everything out of it, as bytes.
    ///
    /// # Errors
    /// When it holds less than it should.
    pub(super) fn take(&mut self) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; std::mem::take(&mut self.length)];
        let mut taken = 0;
        while taken < bytes.len() {
            let Some(pipe) = &self.pipe else { return Err(io::ErrorKind::BrokenPipe.into()) };
            match read(&pipe.read, &mut bytes[taken..]) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => taken += count,
                Err(nix::errno::Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(bytes)
    }

    /// Gives the pipe back, if nothing is in it.
    pub(super) fn relax(&mut self) {
        if self.length == 0 {
            *self = Self::default();
        }
    }

    /// Whether there is no pipe to give back.
    pub(super) fn is_relaxed(&self) -> bool {
        self.pipe.is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::unistd::write;

    fn put(bytes: &[u8]) -> impl FnOnce(BorrowedFd<'_>) -> io::Result<()> + '_ {
        move |pipe| {
            assert_eq!(write(pipe, bytes), Ok(bytes.len()));
            Ok(())
        }
    }

    fn filled(bytes: &[u8]) -> Pinned {
        let mut pinned = Pinned::default();
        pinned.pin(bytes.len(), put(bytes)).unwrap();
        pinned
    }

    #[test]
    fn pinned_bytes_are_taken_out_as_they_are() {
        let mut pinned = filled(b"some pages");
        assert_eq!((pinned.length(), pinned.is_relaxed()), (10, false));
        pinned.relax();
        assert_eq!(pinned.take().unwrap(), b"some pages");
        assert_eq!(pinned.length(), 0);
        pinned.relax();
        assert!(pinned.is_relaxed());
    }

    #[test]
    fn a_piece_that_cannot_be_read_leaves_nothing_behind() {
        let mut pinned = filled(b"");
        let half = |pipe: BorrowedFd<'_>| {
            write(pipe, b"half").unwrap();
            Err(io::Error::from_raw_os_error(nix::libc::EIO))
        };
        assert_eq!(pinned.pin(8, half).unwrap_err().raw_os_error(), Some(nix::libc::EIO));
        assert_eq!(pinned.length(), 0);
        pinned.pin(2, put(b"ok")).unwrap();
        assert_eq!(pinned.take().unwrap(), b"ok");
    }

    #[test]
    fn long_pieces_are_pinned_as_far_as_the_pipe_holds_their_pages() {
        let piece = |offset, length| fits(Range::within(1 << 40, offset, length).unwrap());
        assert!(piece(0, PIN_MIN) && piece(511, PIN_MIN) && !piece(0, PIN_MIN - 1));
        let most = PIPE_SIZE as u64;
        assert!(piece(0, most) && piece(PAGE, most) && piece(1, most - PAGE));
        assert!(!piece(512, most) && !piece(0, most + 1) && !piece(1, most - PAGE + 4096));
        let pipe = Pipe::new().unwrap();
        assert!(fcntl(&pipe.write, FcntlArg::F_GETPIPE_SZ).unwrap() >= PIPE_SIZE);
    }
}
