//! What a server tells whoever runs it, and how that finds out whether it is alive.
//! Never decides what comes of either.

use super::roster::Roster;
use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Whoever runs a server. Called from many threads at once, with locks held: must neither wait nor
/// ask the server anything.
pub trait Watch: Send + Sync + fmt::Debug {
    /// A client has come or gone.
    fn clients_changed(&self);
    /// Nobody can be let in any more, for this reason.
    fn accepting_failed(&self, why: &io::Error);
}

/// Does not care.
#[cfg(test)]
#[derive(Debug)]
pub(crate) struct Nobody;

#[cfg(test)]
impl Watch for Nobody {
    fn clients_changed(&self) {}

    fn accepting_failed(&self, _why: &io::Error) {}
}

/// Questions to the thread that lets clients in, by number, and its answers.
#[derive(Debug, Default)]
pub(super) struct Knocks {
    asked: AtomicU64,
    answered: AtomicU64,
}

impl Knocks {
    /// I am here.
    pub(super) fn answer(&self) {
        self.answered.store(self.asked.load(Ordering::Acquire), Ordering::Release);
    }
}

/// The door that clients come in by, from whichever thread wants to know of it.
#[derive(Clone, Debug)]
pub struct Door(pub(super) Arc<Roster>);

impl Door {
    /// Asks whoever lets clients in to answer with this number, which grows from one question to
    /// the next.
    pub fn knock(&self, number: u64) {
        self.0.knocks.asked.store(number, Ordering::Release);
        self.0.bell.wake();
    }

    /// The number of the last question that was answered; nobody has to answer at a closed door.
    #[must_use]
    pub fn answered(&self) -> u64 {
        let Knocks { asked, answered } = &self.0.knocks;
        let whose = if self.0.is_closed() { asked } else { answered };
        whose.load(Ordering::Acquire)
    }

    /// Lets nobody in any more if nobody is there or just coming in. Whoever comes then stays
    /// outside, and finds the next server if the sockets have one. Returns whether it is closed.
    #[must_use]
    pub fn close_if_empty(&self) -> bool {
        self.0.close_if_empty()
    }
}
