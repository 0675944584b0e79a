//! The socket of one session: the only place that receives, sends and waits.
//! Decides nothing, and never interprets the bytes.

use crate::net::{Interest, Ready, Stream};
use crate::server::end::SessionEnd;
use crate::server::session::rx::Rx;
use crate::server::session::tx::Tx;
use crate::server::stop_request::{SessionControl, StopRequest};
use std::io;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

/// When fewer bytes than this arrived at once, the session does not try to receive more before it
/// waits: a client with one or two requests in flight waits for their replies first.
const DRAINED_BELOW: usize = 64;
/// How long to wait for a client to receive the last replies.
const LINGER_TIMEOUT: Duration = Duration::from_secs(1);

/// A connection, and the flag that wakes the session.
#[derive(Debug)]
pub(super) struct SessionSocket<'a> {
    stream: &'a Stream,
    control: &'a SessionControl,
    /// Bytes received.
    pub(super) received: u64,
    /// Bytes sent.
    pub(super) sent: u64,
    /// So few bytes arrived the last time that the socket is empty.
    pub(super) drained: bool,
}

/// The event that a session waits for, in addition to a wake-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum WaitFor {
    /// The client sends or receives.
    Client(Interest),
    /// The connection ends in both directions.
    HangUp,
    /// Nothing of the connection.
    WakeUp,
}

impl<'a> SessionSocket<'a> {
    pub(super) fn new(stream: &'a Stream, control: &'a SessionControl) -> Self {
        Self { stream, control, received: 0, sent: 0, drained: false }
    }

    /// Sends as many bytes as the socket accepts now; false if some are left.
    pub(super) fn send(&mut self, tx: &mut Tx) -> Result<bool, SessionEnd> {
        let before = tx.unsent();
        let sent_all = tx.send(self.stream).map_err(SessionEnd::Connection)?;
        self.sent += before.saturating_sub(tx.unsent());
        Ok(sent_all)
    }

    /// Receives as many bytes as have arrived and fit; returns how many, 0 at the end of the stream.
    /// `None` if nothing has arrived.
    pub(super) fn receive(&mut self, rx: &mut Rx) -> Result<Option<usize>, SessionEnd> {
        match rx.receive(self.stream) {
            Ok(0) => Ok(Some(0)),
            Ok(count) => {
                self.control.record_activity();
                self.received += count as u64;
                self.drained = count < DRAINED_BELOW;
                Ok(Some(count))
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(SessionEnd::Connection(error)),
        }
    }

    /// Waits for an event of the connection, a wake-up or the deadline.
    pub(super) fn wait(
        &mut self,
        event: WaitFor,
        deadline: Option<Instant>,
    ) -> Result<Ready, SessionEnd> {
        self.wait_also(event, None, deadline)
    }

    /// Waits as [`SessionSocket::wait`] does, and until `also` is readable.
    pub(super) fn wait_also(
        &mut self,
        event: WaitFor,
        also: Option<BorrowedFd<'_>>,
        deadline: Option<Instant>,
    ) -> Result<Ready, SessionEnd> {
        let wake = &self.control.wake;
        let ready = match event {
            WaitFor::Client(interest) => {
                self.stream.wait_also(interest, Some(wake), also, deadline)
            }
            WaitFor::HangUp => self.stream.wait_for_hang_up(wake, also, deadline),
            WaitFor::WakeUp => self.stream.wait(Interest::default(), Some(wake), deadline),
        };
        let ready = ready.map_err(SessionEnd::Connection)?;
        if ready.readable {
            self.drained = false;
        }
        if ready.woken {
            wake.clear();
        }
        Ok(ready)
    }

    /// Whether the client sends nothing after the bytes that have arrived.
    pub(super) fn has_peer_ended(&self) -> bool {
        self.stream.has_peer_ended().is_ok_and(|ended| ended)
    }

    /// The stop request that counts now. A session whose connection another process cannot continue finishes instead
    /// of being suspended.
    pub(super) fn stop_request(&self) -> StopRequest {
        match self.control.current() {
            StopRequest::Suspend if !self.stream.is_transferable() => StopRequest::Finish,
            request => request,
        }
    }

    /// Frees the buffers of the connection.
    pub(super) fn shrink(&self) {
        self.stream.shrink();
    }

    /// Announces the end of the stream, where a protocol below NBD has a message for it.
    pub(super) fn announce_end(&self) {
        self.stream.announce_end();
    }

    /// Lets the client receive the last replies: closing a socket with unread requests makes the
    /// kernel send a reset, which discards replies on both sides.
    pub(super) fn linger(mut self) {
        let deadline = Instant::now() + LINGER_TIMEOUT;
        let readable = WaitFor::Client(Interest { readable: true, writable: false });
        let mut discarded = Rx::default();
        if self.stream.shutdown_write().is_err() {
            return;
        }
        loop {
            match self.receive(&mut discarded) {
                Ok(Some(count)) if count > 0 => discarded.consume(count),
                Ok(None) if self.wait(readable, Some(deadline)).is_ok() => {}
                _ => return,
            }
            if Instant::now() >= deadline {
                return;
            }
        }
    }
}
