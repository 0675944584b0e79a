//! What the server tells a session while that is busy or waiting.
//! One order at a time, and never a milder one after a harsher.

use crate::disk::Notifier;
use crate::net::Wake;
use nix::time::ClockId;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::time::Duration;

/// What a session is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub(super) enum StopRequest {
    /// Go on.
    Serve = 0,
    /// Stop between two requests, and pack up for the next process.
    PackUp = 1,
    /// Answer what has been received, then close.
    Finish = 2,
    /// Close now: the client is no longer admitted.
    NotAdmitted = 3,
    /// Close now: somebody else waits to greet, and this client has not in all its time.
    GiveWay = 4,
    /// Close now: the server ends.
    Leave = 5,
    /// Close now: another connection has got the seat at the arriving disk.
    Displaced = 6,
}

/// The way from the server to one session.
#[derive(Debug)]
pub(super) struct SessionControl {
    current: AtomicU8,
    /// Whether the session has been told to end and waits for the disk before it does.
    waits_for_disk: AtomicBool,
    /// Set whenever there is a new order, or news of an errand.
    pub(super) wake: Wake,
    /// When something was last heard of the client, on the clock of [`now`].
    heard: AtomicU64,
}

impl SessionControl {
    /// The way to a session that is to serve.
    ///
    /// # Errors
    /// When there is no descriptor left.
    pub(super) fn new() -> io::Result<Self> {
        let (current, heard) = (AtomicU8::new(StopRequest::Serve as u8), AtomicU64::new(now()));
        let waits_for_disk = AtomicBool::new(false);
        Ok(Self { current, waits_for_disk, wake: Wake::new()?, heard })
    }

    /// Gives an order, unless a harsher one was given.
    pub(super) fn give(&self, order: StopRequest) {
        self.current.fetch_max(order as u8, Ordering::AcqRel);
        self.wake.wake();
    }

    /// The session, which has been told to end, waits for the disk; or does no more.
    pub(super) fn set_waits_for_disk(&self, waits: bool) {
        self.waits_for_disk.store(waits, Ordering::Release);
    }

    /// Whether the session waits for the disk before it ends.
    pub(super) fn waits_for_disk(&self) -> bool {
        self.waits_for_disk.load(Ordering::Acquire)
    }

    /// Something came from the client, or something that it waited for was done.
    pub(super) fn heard(&self) {
        self.heard.store(now(), Ordering::Relaxed);
    }

    /// For how long the client has been silent.
    pub(super) fn silence(&self) -> Duration {
        Duration::from_millis(now().saturating_sub(self.heard.load(Ordering::Relaxed)))
    }

    /// The order that holds now.
    pub(super) fn current(&self) -> StopRequest {
        match self.current.load(Ordering::Acquire) {
            0 => StopRequest::Serve,
            1 => StopRequest::PackUp,
            2 => StopRequest::Finish,
            3 => StopRequest::NotAdmitted,
            4 => StopRequest::GiveWay,
            5 => StopRequest::Leave,
            _ => StopRequest::Displaced,
        }
    }
}

/// Milliseconds on a clock that costs no system call, and is right to some of them.
fn now() -> u64 {
    let time = ClockId::CLOCK_MONOTONIC_COARSE.now().map(Duration::from);
    time.map_or(0, |time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX))
}

impl Notifier for SessionControl {
    fn notify(&self) {
        self.wake.wake();
    }

    fn as_eventfd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_milder_order_does_not_take_back_a_harsher_one() {
        let orders = SessionControl::new().unwrap();
        assert_eq!(orders.current(), StopRequest::Serve);
        let mild = [StopRequest::PackUp, StopRequest::Finish, StopRequest::NotAdmitted];
        let all = [&mild[..], &[StopRequest::GiveWay, StopRequest::Leave, StopRequest::Displaced]]
            .concat();
        for order in all {
            orders.give(order);
            orders.give(StopRequest::PackUp);
            assert_eq!(orders.current(), order);
        }
    }
}
