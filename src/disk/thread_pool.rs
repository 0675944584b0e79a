//! Threads that execute blocking calls where `io_uring(7)` cannot, so that no session blocks in one.
//! Decides nothing. A thread starts when there is work and no thread is idle, and ends after being
//! idle for [`IDLE`].

use super::backend::Backend;
use super::blocking::execute;
use super::io_queue::{Completion, Notifier};
use super::op::Op;
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

/// Most threads of one disk: as many as the kernel creates for a ring.
pub(super) const THREADS_MAX: usize = 8;
/// An idle thread ends after this time.
const IDLE: Duration = Duration::from_secs(5);
/// Stack size of a thread, in bytes; the calls need little.
const STACK: usize = 128 << 10;

/// The threads of one disk.
#[derive(Debug, Default)]
pub(super) struct ThreadPool {
    pool: Arc<Pool>,
}

#[derive(Debug, Default)]
struct Pool {
    state: Mutex<Tasks>,
    work_available: Condvar,
    task_ended: Condvar,
}

#[derive(Debug, Default)]
struct Tasks {
    waiting: VecDeque<Task>,
    threads: usize,
    /// Threads that wait for work.
    idle: usize,
    /// Whether a write-back is queued or running.
    write_back_pending: bool,
    /// No thread may start, so that the session executes everything itself.
    #[cfg(any(test, fuzzing))]
    forbidden: bool,
}

#[derive(Debug)]
struct Task {
    image: Arc<dyn Backend>,
    kind: TaskKind,
}

#[derive(Debug)]
enum TaskKind {
    Operation { key: u64, op: Op, to: Arc<Completions> },
    WriteBack(Range),
}

/// The completions for one session.
#[derive(Debug)]
pub(super) struct Completions {
    queue: Mutex<VecDeque<Completion>>,
    arrived: Condvar,
    notifier: Arc<dyn Notifier>,
}

impl ThreadPool {
    /// Gives an operation to a thread.
    ///
    /// # Errors
    /// Returns the operation if there is no thread and none can be started.
    pub(super) fn execute(
        &self,
        image: &Arc<dyn Backend>,
        (key, op): (u64, Op),
        to: &Arc<Completions>,
    ) -> Result<(), Op> {
        let kind = TaskKind::Operation { key, op, to: Arc::clone(to) };
        match self.submit(Task { image: Arc::clone(image), kind }) {
            Some(Task { kind: TaskKind::Operation { op, .. }, .. }) => Err(op),
            _ => Ok(()),
        }
    }

    /// Has a thread start the write-back of `range`. Returns false if another write-back is queued or
    /// running, or if there is no thread.
    pub(super) fn start_write_back(&self, image: &Arc<dyn Backend>, range: Range) -> bool {
        if std::mem::replace(&mut self.pool.lock().write_back_pending, true) {
            return false;
        }
        let task = Task { image: Arc::clone(image), kind: TaskKind::WriteBack(range) };
        let is_taken = self.submit(task).is_none();
        if !is_taken {
            self.pool.lock().write_back_pending = false;
        }
        is_taken
    }

    /// Starts no thread from now on.
    #[cfg(any(test, fuzzing))]
    pub(super) fn forbid(&self) {
        self.pool.lock().forbidden = true;
    }

    /// Gives a task to a thread; returns it if there is none.
    fn submit(&self, task: Task) -> Option<Task> {
        let mut state = self.pool.lock();
        #[cfg(any(test, fuzzing))]
        if state.forbidden {
            return Some(task);
        }
        if state.idle <= state.waiting.len() && state.threads < THREADS_MAX {
            let pool = Arc::clone(&self.pool);
            let thread = thread::Builder::new().name("disk".into()).stack_size(STACK);
            let started = check_thread_headroom().and_then(|()| thread.spawn(move || pool.work()));
            if started.is_ok() {
                state.threads += 1;
                state.idle += 1;
            }
        }
        if state.threads == 0 {
            return Some(task);
        }
        state.waiting.push_back(task);
        drop(state);
        self.pool.work_available.notify_one();
        None
    }
}

impl Drop for ThreadPool {
    /// Blocks until no task is left: a thread that still held the image would keep it locked.
    fn drop(&mut self) {
        let busy = |state: &mut Tasks| !state.waiting.is_empty() || state.idle < state.threads;
        drop(self.pool.task_ended.wait_while(self.pool.lock(), busy));
    }
}

impl Pool {
    /// The loop of one thread. The thread counts as idle when it starts.
    fn work(&self) {
        let mut state = self.lock();
        loop {
            if let Some(task) = state.waiting.pop_front() {
                state.idle -= 1;
                drop(state);
                let wrote_back = task.run();
                state = self.lock();
                state.idle += 1;
                state.write_back_pending &= !wrote_back;
                self.task_ended.notify_all();
                continue;
            }
            let (now, timeout) = sync::wait_timeout(&self.work_available, state, IDLE);
            state = now;
            if timeout.timed_out() && state.waiting.is_empty() {
                state.threads -= 1;
                state.idle -= 1;
                return;
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Tasks> {
        sync::lock(&self.state)
    }
}

impl Task {
    /// Executes the task; returns whether it was a write-back.
    fn run(self) -> bool {
        let Self { image, kind } = self;
        match kind {
            TaskKind::Operation { key, mut op, to } => {
                let result = catch_unwind(AssertUnwindSafe(|| execute(&*image, &mut op)));
                let outcome = result.unwrap_or_else(|_| Err(io::Error::from(Errno::EIO)));
                // Before the completion: the session, and the disk with it, may end as soon as it
                // has that.
                drop(image);
                to.push(Completion { key, op, outcome: Some(outcome) });
                false
            }
            TaskKind::WriteBack(range) => {
                // The next flush reports a failure.
                let _ = catch_unwind(AssertUnwindSafe(|| write_back(&*image, range)));
                true
            }
        }
    }
}

/// Starts a write-back where that is possible.
fn write_back(image: &dyn Backend, range: Range) -> io::Result<()> {
    image.page_cache().map_or(Ok(()), |cache| cache.start_write_back(range))
}

impl Completions {
    pub(super) fn new(notifier: &Arc<dyn Notifier>) -> Arc<Self> {
        let (queue, arrived) = (Mutex::default(), Condvar::new());
        Arc::new(Self { queue, arrived, notifier: Arc::clone(notifier) })
    }

    /// Adds a completion and notifies the session.
    pub(super) fn push(&self, completion: Completion) {
        self.lock().push_back(completion);
        self.arrived.notify_all();
        self.notifier.notify();
    }

    /// Takes one completion.
    pub(super) fn pop(&self) -> Option<Completion> {
        self.lock().pop_front()
    }

    /// Blocks until [`Completions::pop`] has one. Only for a caller that knows that one will come.
    pub(super) fn wait(&self) {
        let none = |queue: &mut VecDeque<Completion>| queue.is_empty();
        drop(self.arrived.wait_while(self.lock(), none));
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Completion>> {
        sync::lock(&self.queue)
    }
}

#[cfg(test)]
mod tests {
    use super::super::memory_backend::{BackendCall, FailingBackend, Faults, MemoryBackend};
    use super::super::slow_backend::TestNotifier;
    use super::*;

    const SIZE: u64 = 1 << 20;

    #[test]
    fn threads_execute_calls_and_report_their_outcomes() {
        let (threads, faults) = (ThreadPool::default(), Arc::new(Faults::default()));
        let image: Arc<dyn Backend> =
            Arc::new(FailingBackend::new(MemoryBackend::new(SIZE), Arc::clone(&faults)));
        let notifier = Arc::new(TestNotifier::default());
        let results = Completions::new(&(Arc::clone(&notifier) as Arc<dyn Notifier>));
        faults.fail_every(BackendCall::Flush, nix::libc::EIO);
        let count = 3 * THREADS_MAX as u64;
        for key in 0..count {
            let trim = Op::Trim { range: Range::whole(SIZE), durable: false };
            let op = if key.is_multiple_of(2) { Op::Flush } else { trim };
            assert!(threads.execute(&image, (key, op), &results).is_ok());
        }
        assert!(threads.pool.lock().threads <= THREADS_MAX);
        let mut seen = std::collections::BTreeSet::new();
        while seen.len() < count as usize {
            results.wait();
            let completion = results.pop().unwrap();
            assert_eq!(completion.outcome.unwrap().is_err(), completion.key.is_multiple_of(2));
            assert!(seen.insert(completion.key));
        }
        assert!(notifier.count() > 0);
    }

    #[test]
    fn only_one_write_back_is_started_at_a_time() {
        let (threads, faults) = (ThreadPool::default(), Arc::new(Faults::default()));
        let image: Arc<dyn Backend> =
            Arc::new(FailingBackend::new(MemoryBackend::new(SIZE), Arc::clone(&faults)));
        threads.pool.lock().write_back_pending = true;
        assert!(!threads.start_write_back(&image, Range::whole(SIZE)));
        threads.pool.lock().write_back_pending = false;
        assert!(threads.start_write_back(&image, Range::whole(SIZE)));
        while threads.pool.lock().write_back_pending {
            thread::yield_now();
        }
        assert_eq!(faults.count(BackendCall::WriteBack), 1);
    }
}
