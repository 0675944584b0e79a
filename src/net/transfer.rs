//! System calls that receive from a socket and send to it, without waiting.

use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{MsgFlags, recv, send, sendmsg};
use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, BorrowedFd};

/// Most slices of one call (`UIO_MAXIOV`).
const SLICES_MAX: usize = 1024;

/// Receives bytes that have arrived; `WouldBlock` if there are none.
pub(super) fn receive_now(socket: BorrowedFd<'_>, into: &mut [u8]) -> io::Result<usize> {
    uninterrupted(|| recv(socket.as_raw_fd(), into, MsgFlags::MSG_DONTWAIT))
}

/// Sends bytes that the socket buffer takes; `WouldBlock` if it is full. `more`: see `MSG_MORE` in send(2).
pub(super) fn send_now(socket: BorrowedFd<'_>, data: &[u8], more: bool) -> io::Result<usize> {
    uninterrupted(|| send(socket.as_raw_fd(), data, send_flags(more)))
}

/// [`send_now`] of several pieces in sequence, at most 1024 of them.
pub(super) fn send_pieces_now(socket: BorrowedFd<'_>, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
    let pieces = &pieces[..pieces.len().min(SLICES_MAX)];
    uninterrupted(|| sendmsg::<()>(socket.as_raw_fd(), pieces, &[], send_flags(false), None))
}

fn send_flags(more: bool) -> MsgFlags {
    let more = if more { MsgFlags::from_bits_retain(libc::MSG_MORE) } else { MsgFlags::empty() };
    MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL | more
}

/// Repeats a system call that a signal interrupted.
pub(super) fn uninterrupted<T>(mut call: impl FnMut() -> nix::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(Errno::EINTR) => {}
            outcome => return Ok(outcome?),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn send_flags_prevent_waits_and_signals() {
        for (more, expected) in [(false, 0), (true, libc::MSG_MORE)] {
            let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL | expected;
            assert_eq!(send_flags(more).bits(), flags);
        }
    }
}
