//! Wakes a waiting thread from another one.
//! Carries no message: the woken thread checks its own state.

use nix::sys::eventfd::{EfdFlags, EventFd};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

/// A flag that `poll(2)` can wait for (an eventfd). It stays set until it is cleared, so that a
/// wake-up before the wait is not lost.
#[derive(Debug)]
pub struct Wake(EventFd);

impl Wake {
    /// Creates a flag that is not set.
    ///
    /// # Errors
    /// When the process or the host has no descriptor left.
    pub fn new() -> io::Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        Ok(Self(EventFd::from_flags(flags)?))
    }

    /// Sets the flag: wakes the threads that wait for it now or later.
    pub fn wake(&self) {
        // Fails only with a full counter, and then the flag is set.
        let _ = self.0.write(1);
    }

    /// Clears the flag.
    pub fn clear(&self) {
        // Fails only if the flag is not set.
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
        assert!(is_set(&wake), "polling must not clear it");
        wake.clear();
        assert!(!is_set(&wake), "one clear suffices for any number of wake-ups");
    }

    #[test]
    fn clearing_an_unset_flag_does_not_wait() {
        let wake = Wake::new().unwrap();
        wake.clear();
        assert!(!is_set(&wake));
    }
}
