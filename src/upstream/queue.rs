//! The I/O queue of one session on an upstream.

use super::connection::UpstreamConnection;
use super::link::UpstreamLink;
use crate::disk::{Completion, IoQueue, Op, OpId};
use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// See [`IoQueue`]. Its operations survive the loss of a connection.
#[derive(Debug)]
pub(super) struct UpstreamQueue {
    link: Arc<UpstreamLink>,
    id: u64,
    /// Not submitted yet.
    pushed: Vec<(OpId, Op)>,
    completed: VecDeque<Completion>,
    has_completions: Arc<AtomicBool>,
    /// Submitted, and not returned by `poll`.
    outstanding: usize,
    /// The connection from which the session receives itself.
    connection: Option<Arc<UpstreamConnection>>,
    /// Something may have arrived on it.
    may_receive: bool,
}

impl UpstreamQueue {
    /// A queue that adds to the eventfd `notifier` at completions.
    pub(super) fn new(link: &Arc<UpstreamLink>, notifier: OwnedFd) -> Self {
        let (id, has_completions) = link.open_queue(Some(notifier));
        Self {
            link: Arc::clone(link),
            id,
            pushed: Vec::new(),
            completed: VecDeque::new(),
            has_completions,
            outstanding: 0,
            connection: None,
            may_receive: false,
        }
    }
}

impl IoQueue for UpstreamQueue {
    fn push(&mut self, id: OpId, op: Op) -> Result<(), Op> {
        self.pushed.push((id, op));
        Ok(())
    }

    fn submit(&mut self) -> bool {
        if !self.pushed.is_empty() {
            self.outstanding += self.pushed.len();
            self.link.submit(self.id, self.pushed.drain(..));
        }
        true
    }

    fn poll(&mut self) -> Option<Completion> {
        if self.completed.is_empty()
            && std::mem::take(&mut self.may_receive)
            && let Some(connection) = &self.connection
        {
            self.link.receive_for(self.id, connection);
        }
        if self.completed.is_empty() && self.has_completions.load(Ordering::Relaxed) {
            self.link.take_completions(self.id, &mut self.completed);
        }
        let completion = self.completed.pop_front()?;
        self.outstanding -= 1;
        Some(completion)
    }

    fn descriptor(&mut self) -> Option<BorrowedFd<'_>> {
        let receives = |connection: &Arc<UpstreamConnection>| {
            connection.session_receives.load(Ordering::Acquire)
        };
        if !self.connection.as_ref().is_some_and(receives) {
            self.connection = self.link.receive_in_session(self.id);
        }
        self.may_receive = self.connection.is_some();
        self.connection.as_ref().map(|connection| connection.stream.as_fd())
    }

    /// The session has ended. Without a connection its operations complete now: the outcomes do not
    /// matter any more.
    fn wait(&mut self) {
        if self.completed.is_empty() && self.outstanding > 0 {
            self.link.wait_for_completions(self.id, true);
        }
    }
}

impl Drop for UpstreamQueue {
    fn drop(&mut self) {
        while self.outstanding > 0 {
            self.wait();
            if self.poll().is_none() {
                break;
            }
        }
        self.link.close_queue(self.id);
    }
}
