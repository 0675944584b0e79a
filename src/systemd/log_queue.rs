//! A bounded queue between the threads that log and the one that writes the log.
//! When the queue is full a message is dropped and counted. Who adds one to an idle queue gives the
//! writer a moment, so that a line is there before what follows from it; but only once, when the log
//! turns out to be slow, until a message has been written within a moment again.

use crate::sync;
use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// Most messages that wait to be written.
pub(super) const MESSAGES_MAX: usize = 1024;
/// Most bytes of text that wait to be written. A single message may be longer.
pub(super) const BYTES_MAX: usize = 1 << 20;

/// How long who adds a message to an idle queue waits for it to be written.
pub(super) const MOMENT: Duration = Duration::from_millis(5);

/// What the writer does next.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum WriterStep<T> {
    /// Write this message.
    Write(T),
    /// Report that this many messages were dropped; everything before is written.
    Report(u64),
}

/// Messages on their way to the log.
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
    /// The writer has taken something and has not come back yet.
    is_writing: bool,
    /// When it took that.
    writing_since: Option<Instant>,
    /// A message was not written within a moment, and none behind it was yet.
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
    /// Adds a message of `bytes` bytes, or drops it when there is no room.
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
        if is_idle && !self.flush(MOMENT) {
            self.lock().is_slow = true;
        }
    }

    /// For the only writer: waits for what is to be written next. What it returned before counts as
    /// written.
    pub(super) fn next(&self) -> WriterStep<T> {
        let mut state = self.lock();
        state.is_writing = false;
        if let Some(since) = state.writing_since.take() {
            state.is_slow = since.elapsed() >= MOMENT;
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

    /// Waits until everything is written, at most for `limit`; false if something is left.
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

    const NO_TIME: Duration = Duration::ZERO;

    #[test]
    fn messages_come_out_in_order() {
        let queue = Queue::default();
        (0..3).for_each(|number| queue.add(number, 1));
        for number in 0..3 {
            assert_eq!(queue.next(), WriterStep::Write(number));
        }
    }

    #[test]
    fn a_full_queue_drops_and_reports_how_many() {
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
    fn flushing_waits_for_the_writer_but_not_for_ever() {
        let queue = Queue::default();
        assert!(queue.flush(NO_TIME), "nothing was added");
        queue.add(1, 1);
        assert!(!queue.flush(NO_TIME), "nobody writes");
        assert_eq!(queue.next(), WriterStep::Write(1));
        assert!(!queue.flush(NO_TIME), "the writer has not come back");
        thread::scope(|scope| {
            let writer = scope.spawn(|| queue.next());
            assert!(queue.flush(Duration::from_secs(60)));
            queue.add(2, 1);
            assert_eq!(writer.join().unwrap(), WriterStep::Write(2));
        });
    }
}
