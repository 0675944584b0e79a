//! For tests: a backend whose I/O queue completes operations when the test says so, and a notifier that
//! counts. Never in a released program.

use super::backend::{Backend, PageCache, SocketTransfer};
use super::blocking::execute;
use super::io_queue::{Completion, IoQueue, Notifier, OpId};
use super::op::{Extent, Op};
use crate::range::Range;
use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::collections::{BTreeSet, VecDeque};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(20);
/// Unit of residency, in bytes.
const BLOCK: u64 = 4096;

/// Counts its notifications.
#[derive(Debug)]
pub(crate) struct TestNotifier(EventFd);

impl TestNotifier {
    /// Notifications so far.
    pub(crate) fn count(&self) -> u64 {
        let count = self.0.read().unwrap_or(0);
        let _ = self.0.write(count);
        count
    }
}

impl Default for TestNotifier {
    fn default() -> Self {
        Self(EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap())
    }
}

impl Notifier for TestNotifier {
    fn notify(&self) {
        self.0.write(1).unwrap();
    }

    fn as_eventfd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The test's control over a [`SlowBackend`].
#[derive(Debug, Default)]
pub(crate) struct Slow {
    state: Mutex<SlowState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct SlowState {
    queues: u64,
    in_flight: VecDeque<Started>,
    completed: VecDeque<(u64, Completion)>,
    /// Calls complete as soon as they are submitted.
    completes_all: bool,
    /// No completion is delivered any more.
    drops_completions: bool,
    /// No submission is accepted any more.
    rejects: bool,
    /// Only blocks in `resident` can be read without waiting.
    cold: bool,
    resident: BTreeSet<u64>,
    /// Data can be sent by reference.
    pins: bool,
    /// Extents are found by operations in flight.
    extents_wait: bool,
}

#[derive(Debug)]
struct Started {
    queue: u64,
    key: u64,
    op: Op,
    notifier: OwnedFd,
}

/// A backend whose I/O queues are controlled by a test.
#[derive(Debug)]
pub(crate) struct SlowBackend {
    image: Box<dyn Backend>,
    slow: Arc<Slow>,
}

#[derive(Debug)]
struct SlowQueue<'a> {
    number: u64,
    notifier: OwnedFd,
    image: &'a SlowBackend,
    waiting: Vec<(u64, Op)>,
}

impl Slow {
    /// Only blocks read by an operation from now on are resident.
    pub(crate) fn evict_all(&self) {
        let mut state = self.lock();
        (state.cold, state.resident) = (true, BTreeSet::new());
    }

    /// From now on data can be sent by reference; that fails if it would have to wait for the device.
    pub(crate) fn allow_pinning(&self) {
        self.lock().pins = true;
    }

    /// From now on the extents of a range are found by an operation in flight.
    pub(crate) fn delay_extents(&self) {
        self.lock().extents_wait = true;
    }

    /// Waits until this many calls are in flight, and returns their debug texts.
    pub(crate) fn wait_for(&self, count: usize) -> Vec<String> {
        let waited = self
            .changed
            .wait_timeout_while(self.lock(), PATIENCE, |state| state.in_flight.len() < count);
        let state = waited.unwrap().0;
        let calls: Vec<_> =
            state.in_flight.iter().map(|started| format!("{:?}", started.op)).collect();
        assert!(calls.len() >= count, "only {calls:?} of {count} calls are in flight");
        calls
    }

    /// Calls in flight.
    pub(crate) fn count(&self) -> usize {
        self.lock().in_flight.len()
    }

    /// Completes all operations in flight, and from now on every call when it is submitted.
    pub(crate) fn complete_all(&self, image: &dyn Backend) {
        self.lock().completes_all = true;
        while self.count() > 0 {
            self.complete(0, image);
        }
    }

    /// From now on no completion is delivered, and waiting for one returns without it.
    pub(crate) fn drop_completions(&self) {
        self.lock().drops_completions = true;
    }

    /// From now on no submission is accepted, as by a kernel that accepts none.
    pub(crate) fn reject_submissions(&self) {
        self.lock().rejects = true;
    }

    /// From now on calls wait for the test again, as at the beginning.
    pub(crate) fn block_all(&self) {
        self.lock().completes_all = false;
    }

    /// Executes and completes the `nth` operation in flight, counted from 0.
    pub(crate) fn complete(&self, nth: usize, image: &dyn Backend) {
        let mut started = self.lock().in_flight.remove(nth).expect("so many are in flight");
        let outcome = execute(image, &mut started.op);
        self.finish(started, Some(outcome));
    }

    /// Fails the `nth` operation in flight without executing it.
    pub(crate) fn fail(&self, nth: usize, errno: i32) {
        let started = self.lock().in_flight.remove(nth).expect("so many are in flight");
        self.finish(started, Some(Err(io::Error::from_raw_os_error(errno))));
    }

    /// Returns the `nth` operation in flight as one that the queue cannot execute.
    pub(crate) fn decline(&self, nth: usize) {
        let started = self.lock().in_flight.remove(nth).expect("so many are in flight");
        self.finish(started, None);
    }

    fn finish(&self, started: Started, outcome: Option<io::Result<()>>) {
        let Started { queue, key, op, notifier } = started;
        let mut state = self.lock();
        if let Op::Read { .. } | Op::Load(_) = &op
            && let Ok(Some(range)) = op.range(u64::MAX)
        {
            state.resident.extend(range.offset() / BLOCK..range.end().div_ceil(BLOCK));
        }
        state.completed.push_back((queue, Completion { key, op, outcome }));
        drop(state);
        nix::unistd::write(&notifier, &1u64.to_ne_bytes()).unwrap();
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, SlowState> {
        self.state.lock().unwrap()
    }
}

impl SlowBackend {
    /// Wraps `image`; `slow` stays with the test.
    pub(crate) fn new(image: impl Backend + 'static, slow: Arc<Slow>) -> Self {
        Self { image: Box::new(image), slow }
    }
}

impl IoQueue for SlowQueue<'_> {
    fn push(&mut self, id: OpId, op: Op) -> Result<(), Op> {
        self.waiting.push((id.key, op));
        Ok(())
    }

    fn submit(&mut self) -> bool {
        let slow = &self.image.slow;
        let mut state = slow.lock();
        if state.rejects {
            let returned = |(key, op)| (self.number, Completion { key, op, outcome: None });
            state.completed.extend(self.waiting.drain(..).map(returned));
            return false;
        }
        drop(state);
        for (key, op) in self.waiting.drain(..) {
            let notifier = self.notifier.try_clone().unwrap();
            let mut started = Started { queue: self.number, key, op, notifier };
            let completes_all = slow.lock().completes_all;
            if completes_all {
                let outcome = execute(&*self.image.image, &mut started.op);
                slow.finish(started, Some(outcome));
            } else {
                slow.lock().in_flight.push_back(started);
                slow.changed.notify_all();
            }
        }
        true
    }

    fn poll(&mut self) -> Option<Completion> {
        let mut state = self.image.slow.lock();
        if state.drops_completions {
            return None;
        }
        let at = state.completed.iter().position(|(queue, _)| *queue == self.number)?;
        state.completed.remove(at).map(|(_, completion)| completion)
    }

    fn wait(&mut self) {
        if std::thread::panicking() {
            return;
        }
        let slow = &self.image.slow;
        if slow.lock().drops_completions {
            return;
        }
        let none =
            |state: &mut SlowState| state.completed.iter().all(|(queue, _)| *queue != self.number);
        let waited = slow.changed.wait_timeout_while(slow.lock(), PATIENCE, none).unwrap();
        assert!(!waited.1.timed_out(), "the test completed no call");
    }
}

impl Backend for SlowBackend {
    fn size(&self) -> u64 {
        self.image.size()
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.image.read(offset, into)
    }

    fn queue(&self, notifier: BorrowedFd<'_>) -> Option<Box<dyn IoQueue + '_>> {
        let mut state = self.slow.lock();
        state.queues += 1;
        let (number, notifier) = (state.queues, notifier.try_clone_to_owned().unwrap());
        Some(Box::new(SlowQueue { number, notifier, image: self, waiting: Vec::new() }))
    }

    fn write(&self, offset: u64, data: &[u8], durable: bool) -> io::Result<()> {
        self.image.write(offset, data, durable)
    }

    fn execute(&self, op: &Op) -> io::Result<()> {
        self.image.execute(op)
    }

    fn works_by_extent(&self, op: &Op) -> bool {
        self.image.works_by_extent(op)
    }

    fn flush(&self) -> io::Result<()> {
        self.image.flush()
    }

    fn page_cache(&self) -> Option<&dyn PageCache> {
        self.image.page_cache().map(|_| self as &dyn PageCache)
    }

    fn socket_transfer(&self) -> Option<&dyn SocketTransfer> {
        self.slow.lock().pins.then_some(self as &dyn SocketTransfer)
    }

    fn extent(&self, offset: u64) -> io::Result<Extent> {
        self.image.extent(offset)
    }

    fn extents_wait(&self) -> bool {
        self.slow.lock().extents_wait
    }
}

impl SocketTransfer for SlowBackend {
    fn pin(&self, offset: u64, length: usize, pipe: BorrowedFd<'_>) -> io::Result<()> {
        let mut bytes = vec![0; length];
        self.read_now(offset, &mut bytes).map_err(|_| Errno::EDEADLK)?;
        assert_eq!(nix::unistd::write(pipe, &bytes), Ok(length));
        Ok(())
    }

    fn send(&self, _: u64, _: usize, _: BorrowedFd<'_>) -> io::Result<usize> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

impl PageCache for SlowBackend {
    fn read_now(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let end = offset + into.len() as u64;
        let state = self.slow.lock();
        let mut blocks = offset / BLOCK..end.div_ceil(BLOCK);
        if state.cold && !blocks.all(|block| state.resident.contains(&block)) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        drop(state);
        self.image.read(offset, into)
    }

    fn is_resident(&self, range: Range) -> bool {
        self.read_now(range.offset(), &mut vec![0; range.length() as usize]).is_ok()
    }

    fn start_write_back(&self, range: Range) -> io::Result<()> {
        self.image.page_cache().map_or(Ok(()), |cache| cache.start_write_back(range))
    }
}
