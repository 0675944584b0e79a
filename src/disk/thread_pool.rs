//! Threads that make blocking calls where `io_uring(7)` cannot: so a session never waits in one.
//! Decides nothing. A thread is started when there is work and none is free, and ends when there has
//! been none for a while.

use super::backend::{Backend, execute};
use super::io_queue::{Call, Completion, Notifier};
use crate::memory_reserve::check_thread_headroom;
use crate::range::Range;
use crate::sync;
use nix::errno::Errno;
use std::collections::VecDeque;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

/// How many threads one disk has at most: as many as the kernel makes for a ring.
pub(super) const THREADS_MAX: usize = 8;
/// A thread that has had no work for so long ends.
const IDLE: Duration = Duration::from_secs(5);
/// Nothing here needs much of it.
const STACK: usize = 128 << 10;

/// The threads of one disk.
#[derive(Debug, Default)]
pub(super) struct ThreadPool {
    pool: Arc<Pool>,
}

#[derive(Debug, Default)]
struct Pool {
    state: Mutex<Tasks>,
    wanted: Condvar,
    done: Condvar,
}

#[derive(Debug, Default)]
struct Tasks {
    waiting: VecDeque<Task>,
    threads: usize,
    /// Of those, waiting for work.
    free: usize,
    /// Whether a write-back has been asked for and is not under way or over.
    writes_back: bool,
}

#[derive(Debug)]
struct Task {
    image: Arc<dyn Backend>,
    what: What,
}

#[derive(Debug)]
enum What {
    Call { key: u64, call: Call, to: Arc<Completions> },
    WriteBack(Range),
}

/// Where the results for one session come in.
#[derive(Debug)]
pub(super) struct Completions {
    made: Mutex<VecDeque<Completion>>,
    came: Condvar,
    notifier: Arc<dyn Notifier>,
}

impl ThreadPool {
    /// Has a call made by a thread.
    ///
    /// # Errors
    /// The call, if there is no thread and none can be started.
    pub(super) fn make(
        &self,
        image: &Arc<dyn Backend>,
        (key, call): (u64, Call),
        to: &Arc<Completions>,
    ) -> Result<(), Call> {
        let what = What::Call { key, call, to: Arc::clone(to) };
        match self.submit(Task { image: Arc::clone(image), what }) {
            Some(Task { what: What::Call { call, .. }, .. }) => Err(call),
            _ => Ok(()),
        }
    }

    /// Has the write-back of what is dirty in `range` started by a thread; false if that has been
    /// asked for already and is not done, or there is no thread.
    pub(super) fn start_write_back(&self, image: &Arc<dyn Backend>, range: Range) -> bool {
        if std::mem::replace(&mut self.pool.lock().writes_back, true) {
            return false;
        }
        let task = Task { image: Arc::clone(image), what: What::WriteBack(range) };
        let is_taken = self.submit(task).is_none();
        if !is_taken {
            self.pool.lock().writes_back = false;
        }
        is_taken
    }

    /// Gives a task to a thread; gives it back if there is none.
    fn submit(&self, task: Task) -> Option<Task> {
        let mut state = self.pool.lock();
        if state.free <= state.waiting.len() && state.threads < THREADS_MAX {
            let pool = Arc::clone(&self.pool);
            let thread = thread::Builder::new().name("disk".into()).stack_size(STACK);
            let started = check_thread_headroom().and_then(|()| thread.spawn(move || pool.work()));
            if started.is_ok() {
                state.threads += 1;
                state.free += 1;
            }
        }
        if state.threads == 0 {
            return Some(task);
        }
        state.waiting.push_back(task);
        drop(state);
        self.pool.wanted.notify_one();
        None
    }
}

impl Drop for ThreadPool {
    /// Waits until nothing is under way: a thread that still had the image would keep it locked.
    fn drop(&mut self) {
        let busy = |state: &mut Tasks| !state.waiting.is_empty() || state.free < state.threads;
        drop(self.pool.done.wait_while(self.pool.lock(), busy));
    }
}

impl Pool {
    /// One thread's life. It counts as free when it begins.
    fn work(&self) {
        let mut state = self.lock();
        loop {
            if let Some(task) = state.waiting.pop_front() {
                state.free -= 1;
                drop(state);
                let wrote_back = task.run();
                state = self.lock();
                state.free += 1;
                state.writes_back &= !wrote_back;
                self.done.notify_all();
                continue;
            }
            let (now, timeout) = sync::wait_timeout(&self.wanted, state, IDLE);
            state = now;
            if timeout.timed_out() && state.waiting.is_empty() {
                state.threads -= 1;
                state.free -= 1;
                return;
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Tasks> {
        sync::lock(&self.state)
    }
}

impl Task {
    /// Makes the call; true if it was a write-back.
    fn run(self) -> bool {
        let Self { image, what } = self;
        match what {
            What::Call { key, call, to } => {
                let made = catch_unwind(AssertUnwindSafe(|| execute(&*image, &call)));
                let outcome = made.unwrap_or_else(|_| Err(io::Error::from(Errno::EIO)));
                // The session may go, and the disk with it, as soon as it hears of it.
                drop(image);
                to.put(Completion { key, call, outcome: Some(outcome) });
                false
            }
            What::WriteBack(range) => {
                // A failure is reported by the next flush.
                let _ = catch_unwind(AssertUnwindSafe(|| image.start_write_back(range)));
                true
            }
        }
    }
}

impl Completions {
    pub(super) fn new(notifier: &Arc<dyn Notifier>) -> Arc<Self> {
        let (made, came) = (Mutex::default(), Condvar::new());
        Arc::new(Self { made, came, notifier: Arc::clone(notifier) })
    }

    /// A call is over.
    pub(super) fn put(&self, made: Completion) {
        self.lock().push_back(made);
        self.came.notify_all();
        self.notifier.notify();
    }

    /// One of the calls that are over.
    pub(super) fn take(&self) -> Option<Completion> {
        self.lock().pop_front()
    }

    /// Waits until [`Completions::take`] has one. Only for a caller that knows that one will come.
    pub(super) fn wait(&self) {
        let none = |made: &mut VecDeque<Completion>| made.is_empty();
        drop(self.came.wait_while(self.lock(), none));
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Completion>> {
        sync::lock(&self.made)
    }
}

#[cfg(test)]
mod tests {
    use super::super::memory::{FailingBackend, Faults, MemoryBackend, Op};
    use super::super::slow::TestNotifier;
    use super::*;

    const SIZE: u64 = 1 << 20;

    #[test]
    fn calls_are_made_by_threads_and_reported_with_their_outcome() {
        let (helpers, faults) = (ThreadPool::default(), Arc::new(Faults::default()));
        let image: Arc<dyn Backend> =
            Arc::new(FailingBackend::new(MemoryBackend::new(SIZE), Arc::clone(&faults)));
        let notifier = Arc::new(TestNotifier::default());
        let results = Completions::new(&(Arc::clone(&notifier) as Arc<dyn Notifier>));
        faults.fail_every(Op::Flush, nix::libc::EIO);
        let count = 3 * THREADS_MAX as u64;
        for key in 0..count {
            let call =
                if key.is_multiple_of(2) { Call::Flush } else { Call::Trim(Range::whole(SIZE)) };
            assert!(helpers.make(&image, (key, call), &results).is_ok());
        }
        assert!(helpers.pool.lock().threads <= THREADS_MAX);
        let mut seen = std::collections::BTreeSet::new();
        while seen.len() < count as usize {
            results.wait();
            let made = results.take().unwrap();
            assert_eq!(made.outcome.unwrap().is_err(), made.key.is_multiple_of(2));
            assert!(seen.insert(made.key));
        }
        assert!(notifier.count() > 0);
    }

    #[test]
    fn only_one_write_back_is_started_at_a_time() {
        let (helpers, faults) = (ThreadPool::default(), Arc::new(Faults::default()));
        let image: Arc<dyn Backend> =
            Arc::new(FailingBackend::new(MemoryBackend::new(SIZE), Arc::clone(&faults)));
        helpers.pool.lock().writes_back = true;
        assert!(!helpers.start_write_back(&image, Range::whole(SIZE)));
        helpers.pool.lock().writes_back = false;
        assert!(helpers.start_write_back(&image, Range::whole(SIZE)));
        while helpers.pool.lock().writes_back {
            thread::yield_now();
        }
        assert_eq!(faults.count(Op::WriteBack), 1);
    }
}
