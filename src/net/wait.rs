//! Waits for descriptors, with a deadline. Never reads or writes them.

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::TimeSpec;
use std::io;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

/// Longest timeout of one ppoll(2); a longer wait takes several.
const WAIT_MAX: Duration = Duration::from_secs(24 * 3600);

/// Waits until one of `descriptors` is readable, hung up or failed, or until `deadline` (none: for
/// ever). The result has one entry for each descriptor; all are false at the deadline.
///
/// A deadline in the past polls without waiting.
///
/// # Errors
/// When `ppoll(2)` fails: too many descriptors, or no memory.
pub fn wait_readable(
    descriptors: &[BorrowedFd<'_>],
    deadline: Option<Instant>,
) -> io::Result<Vec<bool>> {
    let mut fds: Vec<PollFd<'_>> =
        descriptors.iter().map(|fd| PollFd::new(*fd, PollFlags::POLLIN)).collect();
    poll_until(&mut fds, deadline)?;
    Ok(fds.iter().map(|fd| !happened(fd).is_empty()).collect())
}

/// The events on `fd`. Unknown flags count as an error condition.
pub(super) fn happened(fd: &PollFd<'_>) -> PollFlags {
    fd.revents().unwrap_or(PollFlags::POLLERR)
}

/// `ppoll(2)` until `deadline`, restarted after signals. False if the deadline has passed.
pub(super) fn poll_until(fds: &mut [PollFd<'_>], deadline: Option<Instant>) -> io::Result<bool> {
    loop {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        match ppoll(fds, timeout(left), None) {
            Ok(0) if left.is_none_or(|left| !left.is_zero()) => {}
            Ok(ready) => return Ok(ready > 0),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Exact to the nanosecond: a throttled writer waits for fractions of a millisecond.
fn timeout(left: Option<Duration>) -> Option<TimeSpec> {
    left.map(|left| TimeSpec::from_duration(left.min(WAIT_MAX)))
}

#[cfg(test)]
mod tests {
    use super::{WAIT_MAX, timeout, wait_readable};
    use nix::sys::time::TimeSpec;
    use std::io::Write;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;
    use std::time::{Duration, Instant};

    #[test]
    fn a_timeout_is_exact_up_to_its_maximum() {
        let longest = Some(TimeSpec::from_duration(WAIT_MAX));
        let nanosecond = Duration::from_nanos(1);
        assert_eq!(timeout(Some(nanosecond)), Some(TimeSpec::new(0, 1)));
        assert_ne!(timeout(Some(WAIT_MAX - nanosecond)), longest);
        assert_eq!(timeout(Some(WAIT_MAX)), longest);
        assert_eq!(timeout(Some(Duration::MAX)), longest);
        assert_eq!(timeout(None), None);
    }

    #[test]
    fn a_wait_is_not_rounded_to_milliseconds() {
        let (_a, b) = UnixStream::pair().unwrap();
        let wait = |micros| {
            let began = Instant::now();
            wait_readable(&[b.as_fd()], Some(began + Duration::from_micros(micros))).unwrap();
            began.elapsed()
        };
        // The shortest of many, since other processes delay some.
        let shortest = (0..100).map(|_| wait(100)).min().unwrap();
        assert!(shortest >= Duration::from_micros(100), "{shortest:?}");
        assert!(shortest < Duration::from_millis(1), "{shortest:?}");
    }

    #[test]
    fn each_descriptor_has_its_own_result() {
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
    fn a_deadline_in_the_past_still_polls() {
        let (a, b) = UnixStream::pair().unwrap();
        drop(a);
        assert_eq!(wait_readable(&[b.as_fd()], Some(Instant::now())).unwrap(), [true]);
    }
}
