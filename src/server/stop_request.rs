//! Stop requests from the server to one session, which may be busy or waiting.
//! A stronger request replaces a weaker one, never the reverse.

use crate::disk::Notifier;
use crate::net::Wake;
use crate::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use nix::time::ClockId;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

/// What the server requests of a session, from the weakest to the strongest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub(super) enum StopRequest {
    /// No request: serve.
    Serve = 0,
    /// Stop between two requests of the client, and save a snapshot for the next process.
    Suspend = 1,
    /// Answer the received requests, then close.
    Finish = 2,
    /// Close now: the access control list no longer admits the client.
    NotAdmitted = 3,
    /// Close now: another client needs the slot of this slow handshake.
    Evict = 4,
    /// Close now: the server ends.
    Disconnect = 5,
    /// Close now: another connection of the same source writes the incoming disk.
    Displaced = 6,
}

/// The channel from the server to one session. It wakes the session for completions of disk I/O, too.
#[derive(Debug)]
pub(super) struct SessionControl {
    current: AtomicU8,
    /// The session has a stop request, and waits for the disk before it can end.
    waits_for_disk: AtomicBool,
    /// Woken by each new request, and by each completion.
    pub(super) wake: Wake,
    /// When the session was last active, in milliseconds on the clock of [`now`].
    last_activity: AtomicU64,
}

impl SessionControl {
    /// A channel without a request. Fails when no descriptor is left.
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            current: AtomicU8::new(StopRequest::Serve as u8),
            waits_for_disk: AtomicBool::new(false),
            wake: Wake::new()?,
            last_activity: AtomicU64::new(now()),
        })
    }

    /// Sends a request, unless there is a stronger one.
    pub(super) fn request(&self, request: StopRequest) {
        self.current.fetch_max(request as u8, Ordering::AcqRel);
        self.wake.wake();
    }

    /// The session sets whether it waits for the disk, once it has a stop request.
    pub(super) fn set_waits_for_disk(&self, waits: bool) {
        self.waits_for_disk.store(waits, Ordering::Release);
    }

    pub(super) fn waits_for_disk(&self) -> bool {
        self.waits_for_disk.load(Ordering::Acquire)
    }

    /// The session records that bytes have arrived from the client, or that disk I/O has completed.
    pub(super) fn record_activity(&self) {
        self.last_activity.store(now(), Ordering::Relaxed);
    }

    pub(super) fn silence(&self) -> Duration {
        Duration::from_millis(now().saturating_sub(self.last_activity.load(Ordering::Relaxed)))
    }

    /// The strongest request so far.
    pub(super) fn current(&self) -> StopRequest {
        match self.current.load(Ordering::Acquire) {
            0 => StopRequest::Serve,
            1 => StopRequest::Suspend,
            2 => StopRequest::Finish,
            3 => StopRequest::NotAdmitted,
            4 => StopRequest::Evict,
            5 => StopRequest::Disconnect,
            _ => StopRequest::Displaced,
        }
    }
}

/// Milliseconds on a coarse clock: reading it needs no system call, and it is up to a tick late.
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
    fn a_weaker_request_does_not_replace_a_stronger_one() {
        let control = SessionControl::new().unwrap();
        assert_eq!(control.current(), StopRequest::Serve);
        let weak = [StopRequest::Suspend, StopRequest::Finish, StopRequest::NotAdmitted];
        let strong = [StopRequest::Evict, StopRequest::Disconnect, StopRequest::Displaced];
        for request in [weak, strong].concat() {
            control.request(request);
            control.request(StopRequest::Suspend);
            assert_eq!(control.current(), request);
        }
    }
}
