//! A bounded queue between the threads that log and the writer thread.
//! A message that finds the queue full is dropped and counted. A thread that adds one to an idle queue
//! waits briefly for the writer, so that a line is written before the effects of its event are seen. If
//! the log is slow, threads stop waiting until a message is written in time again.

use crate::sync;
use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// Most messages in the queue.
pub(super) const MESSAGES_MAX: usize = 1024;
/// Most bytes of text in the queue. A single message may be longer.
pub(super) const BYTES_MAX: usize = 1 << 20;

/// How long a thread that adds a message to an idle queue waits for the writer.
pub(super) const ADD_WAIT: Duration = Duration::from_millis(5);

/// The next step of the writer.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum WriterStep<T> {
    /// Write this message.
    Write(T),
    /// Report this number of dropped messages; all earlier ones are written.
    Report(u64),
}

/// The queue.
#[derive(Debug)]
pub(super) struct Queue<T> {
    state: Mutex<LogQueueState<T>>,
    added: Condvar,
    drained: Condvar,
}

#[derive(Debug)]
struct LogQueueState<T> {
    messages: VecDeque<(T, usize)>,
    bytes: usize,
    dropped: u64,
    /// The writer has taken a message or report and has not returned yet.
    is_writing: bool,
    /// When the writer took its message.
    writing_since: Option<Instant>,
    /// The last message was not written within [`ADD_WAIT`].
    is_slow: bool,
}

impl<T> Default for Queue<T> {
    fn default() -> Self {
        let messages = VecDeque::new();
        let state = LogQueueState {
            messages,
            bytes: 0,
            dropped: 0,
            is_writing: false,
            writing_since: None,
            is_slow: false,
        };
        Self { state: Mutex::new(state), added: Condvar::new(), drained: Condvar::new() }
    }
}

impl<T> Queue<T> {
    /// Adds a message of `bytes` bytes, or drops it if the queue is full.
    pub(super) fn add(&self, message: T, bytes: usize) {
        let mut state = self.lock();
        let has_room = state.messages.len() < MESSAGES_MAX && state.bytes + bytes <= BYTES_MAX;
        if !has_room && !state.messages.is_empty() {
            state.dropped = state.dropped.saturating_add(1);
            return;
        }
        let is_idle = state.messages.is_empty() && !state.is_writing && !state.is_slow;
        state.messages.push_back((message, bytes));
        state.bytes += bytes;
        drop(state);
        self.added.notify_one();
        if is_idle && !self.flush(ADD_WAIT) {
            self.lock().is_slow = true;
        }
    }

    /// Waits for the next step of the writer, and marks the last one as done. For one thread only.
    pub(super) fn next(&self) -> WriterStep<T> {
        let mut state = self.lock();
        state.is_writing = false;
        if let Some(since) = state.writing_since.take() {
            state.is_slow = since.elapsed() >= ADD_WAIT;
        }
        loop {
            if let Some((message, bytes)) = state.messages.pop_front() {
                state.bytes -= bytes;
                state.is_writing = true;
                state.writing_since = Some(Instant::now());
                return WriterStep::Write(message);
            }
            if state.dropped > 0 {
                state.is_writing = true;
                return WriterStep::Report(std::mem::take(&mut state.dropped));
            }
            self.drained.notify_all();
            state = sync::wait(&self.added, state);
        }
    }

    /// Waits until all messages are written, at most for `limit`; false if some are left.
    pub(super) fn flush(&self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        let mut state = self.lock();
        while state.is_writing || !state.messages.is_empty() || state.dropped > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            state = sync::wait_timeout(&self.drained, state, left).0;
        }
        true
    }

    fn lock(&self) -> MutexGuard<'_, LogQueueState<T>> {
        sync::lock(&self.state)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    const ZERO: Duration = Duration::ZERO;

    #[test]
    fn messages_come_out_in_order() {
        let queue = Queue::default();
        (0..3).for_each(|number| queue.add(number, 1));
        for number in 0..3 {
            assert_eq!(queue.next(), WriterStep::Write(number));
        }
    }

    #[test]
    fn a_full_queue_drops_messages_and_reports_them() {
        let queue = Queue::default();
        (0..MESSAGES_MAX + 2).for_each(|number| queue.add(number, 1));
        for number in 0..MESSAGES_MAX {
            assert_eq!(queue.next(), WriterStep::Write(number));
        }
        assert_eq!(queue.next(), WriterStep::Report(2));
    }

    #[test]
    fn the_bytes_in_the_queue_are_limited() {
        let queue = Queue::default();
        queue.add("longer than all", BYTES_MAX + 1);
        queue.add("dropped", 0);
        assert_eq!(queue.next(), WriterStep::Write("longer than all"));
        assert_eq!(queue.next(), WriterStep::Report(1));
        queue.add("half", BYTES_MAX / 2);
        queue.add("other half", BYTES_MAX / 2);
        queue.add("dropped", 1);
        assert_eq!(queue.next(), WriterStep::Write("half"));
        assert_eq!(queue.next(), WriterStep::Write("other half"));
        assert_eq!(queue.next(), WriterStep::Report(1));
    }

    #[test]
    fn flushing_waits_for_the_writer_up_to_a_limit() {
        let queue = Queue::default();
        assert!(queue.flush(ZERO), "nothing was added");
        queue.add(1, 1);
        assert!(!queue.flush(ZERO), "there is no writer");
        assert_eq!(queue.next(), WriterStep::Write(1));
        assert!(!queue.flush(ZERO), "the writer has not returned");
        thread::scope(|scope| {
            let writer = scope.spawn(|| queue.next());
            assert!(queue.flush(Duration::from_secs(60)));
            queue.add(2, 1);
            assert_eq!(writer.join().unwrap(), WriterStep::Write(2));
        });
    }
}
