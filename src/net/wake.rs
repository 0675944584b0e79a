//! Ends somebody's waiting from another thread.
//! Carries no message: what to do then, the woken side finds out elsewhere.

use nix::sys::eventfd::{EfdFlags, EventFd};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

/// A flag that `poll(2)` can see (an eventfd). Once set it stays set until cleared, so that a
/// wake-up that comes before the waiting begins is not lost.
#[derive(Debug)]
pub struct Wake(EventFd);

impl Wake {
    /// A new flag, not set.
    ///
    /// # Errors
    /// When the process or the host has no descriptor left.
    pub fn new() -> io::Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        Ok(Self(EventFd::from_flags(flags)?))
    }

    /// Sets the flag: whoever waits with it, now or later, is woken.
    pub fn wake(&self) {
        // The only failure of a non-blocking eventfd is a full counter, and then it is set.
        let _ = self.0.write(1);
    }

    /// Takes the flag down again.
    pub fn clear(&self) {
        // The only failure is that it was not set.
        let _ = self.0.read();
    }
}

impl AsFd for Wake {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::Wake;
    use crate::net::wait_readable;
    use std::os::fd::AsFd;
    use std::time::Instant;

    fn is_set(wake: &Wake) -> bool {
        wait_readable(&[wake.as_fd()], Some(Instant::now())).unwrap()[0]
    }

    #[test]
    fn a_wake_up_stays_until_it_is_cleared() {
        let wake = Wake::new().unwrap();
        assert!(!is_set(&wake));
        wake.wake();
        wake.wake();
        assert!(is_set(&wake));
        assert!(is_set(&wake), "looking must not clear it");
        wake.clear();
        assert!(!is_set(&wake), "one clear undoes any number of wake-ups");
    }

    #[test]
    fn clearing_what_is_not_set_does_not_wait() {
        let wake = Wake::new().unwrap();
        wake.clear();
        assert!(!is_set(&wake));
    }
}
