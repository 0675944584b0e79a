//! One connection to a server: its socket, and who receives from it.
//!
//! A session that is the only one whose requests go over a connection receives from it itself: it waits for
//! that socket beside its client's, which saves two switches between threads for each batch of replies.
//! Otherwise, and when the session has not received for a while, the connection's thread does.

use super::rx::UpstreamRx;
use super::terms::ServerTerms;
use crate::net::{Stream, Wake};
use std::io;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// A connection in the transmission phase.
#[derive(Debug)]
pub(super) struct UpstreamConnection {
    pub(super) stream: Stream,
    /// Wakes the thread of the connection.
    pub(super) wake: Wake,
    /// Locked by the thread that receives, before the state of the link.
    /// `None` once the connection is lost.
    pub(super) rx: Mutex<Option<UpstreamRx>>,
    /// A session receives. Set and cleared under the lock of the link's state.
    pub(super) session_receives: AtomicBool,
    /// Number of times that bytes were received.
    pub(super) receipts: AtomicU64,
}

impl UpstreamConnection {
    /// Connection number `number` of its generation.
    pub(super) fn new(stream: Stream, number: usize, terms: &ServerTerms) -> io::Result<Self> {
        Ok(Self {
            stream,
            wake: Wake::new()?,
            rx: Mutex::new(Some(UpstreamRx::new(number, terms.dialect))),
            session_receives: AtomicBool::new(false),
            receipts: AtomicU64::new(0),
        })
    }

    /// Has the thread receive again, with the link's state locked.
    pub(super) fn end_session_receipt(&self) {
        if self.session_receives.swap(false, Ordering::AcqRel) {
            self.wake.wake();
        }
    }
}
