//! Stands for `src/net`: peers, a modelled eventfd, and no sockets.

use crate::sync::{self, Condvar, Mutex};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

#[path = "../../../src/net/peer.rs"]
mod peer;

pub use peer::Peer;

/// A connection, which no model uses.
#[derive(Debug)]
pub struct Stream;

/// A flag that a thread can wait for, as an eventfd. It stays set until it is cleared.
#[derive(Debug, Default)]
pub struct Wake {
    is_set: Mutex<bool>,
    changed: Condvar,
}

impl Wake {
    /// Creates a flag that is not set.
    ///
    /// # Errors
    /// None.
    pub fn new() -> io::Result<Self> {
        Ok(Self::default())
    }

    /// Sets the flag.
    pub fn wake(&self) {
        *sync::lock(&self.is_set) = true;
        self.changed.notify_all();
    }

    /// Clears the flag.
    pub fn clear(&self) {
        *sync::lock(&self.is_set) = false;
    }

    /// Blocks until the flag is set, as `poll(2)` does.
    pub fn wait(&self) {
        let mut is_set = sync::lock(&self.is_set);
        while !*is_set {
            is_set = sync::wait(&self.changed, is_set);
        }
    }
}

impl AsFd for Wake {
    fn as_fd(&self) -> BorrowedFd<'_> {
        unreachable!("a model has no descriptors")
    }
}
