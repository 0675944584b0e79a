//! Waiting for descriptors, with a deadline.
//! Never reads or writes them.

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::io;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

/// Waits until one of `descriptors` can be read, has hung up or failed, or until `deadline`
/// (none: for ever). The answer has one entry for each descriptor; all false at the deadline.
///
/// A deadline in the past asks without waiting.
///
/// # Errors
/// When `poll(2)` fails: too many descriptors, or no memory.
pub fn wait_readable(
    descriptors: &[BorrowedFd<'_>],
    deadline: Option<Instant>,
) -> io::Result<Vec<bool>> {
    let mut fds: Vec<PollFd<'_>> =
        descriptors.iter().map(|fd| PollFd::new(*fd, PollFlags::POLLIN)).collect();
    poll_until(&mut fds, deadline)?;
    Ok(fds.iter().map(|fd| !happened(fd).is_empty()).collect())
}

/// What `poll(2)` saw on `fd`. Flags that we do not know count as an error condition.
pub(super) fn happened(fd: &PollFd<'_>) -> PollFlags {
    fd.revents().unwrap_or(PollFlags::POLLERR)
}

/// `poll(2)` until `deadline`, going on after signals. False when the deadline came first.
pub(super) fn poll_until(fds: &mut [PollFd<'_>], deadline: Option<Instant>) -> io::Result<bool> {
    loop {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        match poll(fds, timeout(left)) {
            Ok(0) if left.is_none_or(|left| !left.is_zero()) => {}
            Ok(ready) => return Ok(ready > 0),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Milliseconds, rounded up so that the last part of one is not spent asking again and again.
/// What is too long for `poll(2)` is waited for in parts.
fn timeout(left: Option<Duration>) -> PollTimeout {
    match left {
        None => PollTimeout::NONE,
        Some(left) => {
            PollTimeout::try_from(left.as_nanos().div_ceil(1_000_000)).unwrap_or(PollTimeout::MAX)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{timeout, wait_readable};
    use nix::poll::PollTimeout;
    use std::io::Write;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;
    use std::time::{Duration, Instant};

    #[test]
    fn part_of_a_millisecond_is_waited_for_as_a_whole_one() {
        assert_eq!(timeout(Some(Duration::ZERO)), PollTimeout::ZERO);
        assert_eq!(timeout(Some(Duration::from_nanos(1))), PollTimeout::from(1u16));
        assert_eq!(timeout(Some(Duration::from_millis(1))), PollTimeout::from(1u16));
        assert_eq!(timeout(Some(Duration::MAX)), PollTimeout::MAX);
        assert_eq!(timeout(None), PollTimeout::NONE);
    }

    #[test]
    fn each_descriptor_gets_its_own_answer() {
        let (mut a, b) = UnixStream::pair().unwrap();
        let (_c, d) = UnixStream::pair().unwrap();
        a.write_all(b"x").unwrap();
        assert_eq!(wait_readable(&[b.as_fd(), d.as_fd()], None).unwrap(), [true, false]);
    }

    #[test]
    fn at_the_deadline_nothing_is_ready() {
        let (_a, b) = UnixStream::pair().unwrap();
        let soon = Instant::now() + Duration::from_millis(5);
        assert_eq!(wait_readable(&[b.as_fd()], Some(soon)).unwrap(), [false]);
        assert!(Instant::now() >= soon);
    }

    #[test]
    fn a_deadline_in_the_past_still_sees_what_is_there() {
        let (a, b) = UnixStream::pair().unwrap();
        drop(a);
        assert_eq!(wait_readable(&[b.as_fd()], Some(Instant::now())).unwrap(), [true]);
    }
}
