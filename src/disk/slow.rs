//! For tests: an image whose calls are made when the test says so, and a bell that counts.
//! Never in a released program.

use super::backend::{Backend, Extent, execute};
use super::io_queue::{Call, Completion, IoQueue, Notifier, Zeroing};
use crate::range::Range;
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::collections::{BTreeSet, VecDeque};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(20);
/// What is in memory or not, in bytes.
const BLOCK: u64 = 4096;

/// Counts how often it is rung.
#[derive(Debug)]
pub(crate) struct TestNotifier(EventFd);

impl TestNotifier {
    /// Since it was last asked.
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

/// What stays with the test.
#[derive(Debug, Default)]
pub(crate) struct Slow {
    state: Mutex<SlowState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct SlowState {
    lanes: u64,
    begun: VecDeque<Started>,
    over: VecDeque<(u64, Completion)>,
    /// Nothing is made late any more.
    hurries: bool,
    /// Nothing is told any more.
    mute: bool,
    /// Nothing is begun any more.
    broken: bool,
    /// Reads have to be loaded first.
    cold: bool,
    loaded: BTreeSet<u64>,
}

#[derive(Debug)]
struct Started {
    lane: u64,
    key: u64,
    call: Call,
    notifier: OwnedFd,
}

/// An image with slow lanes.
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
    waiting: Vec<(u64, Call)>,
}

impl Slow {
    /// Nothing is in memory but what is loaded from now on.
    pub(crate) fn evict_all(&self) {
        let mut state = self.lock();
        (state.cold, state.loaded) = (true, BTreeSet::new());
    }

    /// Waits until so many calls are under way, and says which.
    pub(crate) fn wait_for(&self, count: usize) -> Vec<String> {
        let waited = self
            .changed
            .wait_timeout_while(self.lock(), PATIENCE, |state| state.begun.len() < count);
        let state = waited.unwrap().0;
        let calls: Vec<_> = state.begun.iter().map(|begun| format!("{:?}", begun.call)).collect();
        assert!(calls.len() >= count, "only {calls:?} of {count} calls were begun");
        calls
    }

    /// How many calls are under way now.
    pub(crate) fn count(&self) -> usize {
        self.lock().begun.len()
    }

    /// From now on everything is made at once.
    pub(crate) fn complete_all(&self, image: &dyn Backend) {
        self.lock().hurries = true;
        while self.count() > 0 {
            self.complete(0, image);
        }
    }

    /// From now on nobody is told that a call is over, not even whoever waits for it.
    pub(crate) fn drop_completions(&self) {
        self.lock().mute = true;
    }

    /// From now on nothing is begun, as by a kernel that takes nothing.
    pub(crate) fn reject_submissions(&self) {
        self.lock().broken = true;
    }

    /// From now on calls wait for the test again.
    pub(crate) fn block_all(&self) {
        self.lock().hurries = false;
    }

    /// Makes the call that was begun as the `nth` of those under way, counted from 0.
    pub(crate) fn complete(&self, nth: usize, image: &dyn Backend) {
        let begun = self.lock().begun.remove(nth).expect("so many are under way");
        let outcome = execute(image, &begun.call);
        self.end(begun, Some(outcome));
    }

    /// Ends the same with an error, and makes nothing.
    pub(crate) fn fail(&self, nth: usize, errno: i32) {
        let begun = self.lock().begun.remove(nth).expect("so many are under way");
        self.end(begun, Some(Err(io::Error::from_raw_os_error(errno))));
    }

    /// Says of the same that it cannot be done aside.
    pub(crate) fn decline(&self, nth: usize) {
        let begun = self.lock().begun.remove(nth).expect("so many are under way");
        self.end(begun, None);
    }

    fn end(&self, begun: Started, outcome: Option<io::Result<()>>) {
        let Started { lane, key, call, notifier } = begun;
        let mut state = self.lock();
        if let Call::Populate(range) = &call {
            state.loaded.extend(range.offset() / BLOCK..range.end().div_ceil(BLOCK));
        }
        state.over.push_back((lane, Completion { key, call, outcome }));
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
    fn begin(&mut self, key: u64, call: Call) -> Result<(), Call> {
        self.waiting.push((key, call));
        Ok(())
    }

    fn submit(&mut self) -> bool {
        let slow = &self.image.slow;
        let mut state = slow.lock();
        if state.broken {
            let unmade = |(key, call)| (self.number, Completion { key, call, outcome: None });
            state.over.extend(self.waiting.drain(..).map(unmade));
            return false;
        }
        drop(state);
        for (key, call) in self.waiting.drain(..) {
            let notifier = self.notifier.try_clone().unwrap();
            let begun = Started { lane: self.number, key, call, notifier };
            let hurries = slow.lock().hurries;
            if hurries {
                let outcome = execute(&*self.image.image, &begun.call);
                slow.end(begun, Some(outcome));
            } else {
                slow.lock().begun.push_back(begun);
                slow.changed.notify_all();
            }
        }
        true
    }

    fn finished(&mut self) -> Option<Completion> {
        let mut state = self.image.slow.lock();
        if state.mute {
            return None;
        }
        let at = state.over.iter().position(|(lane, _)| *lane == self.number)?;
        state.over.remove(at).map(|(_, made)| made)
    }

    fn wait(&mut self) {
        if std::thread::panicking() {
            return;
        }
        let slow = &self.image.slow;
        if slow.lock().mute {
            return;
        }
        let none = |state: &mut SlowState| state.over.iter().all(|(lane, _)| *lane != self.number);
        let waited = slow.changed.wait_timeout_while(slow.lock(), PATIENCE, none).unwrap();
        assert!(!waited.1.timed_out(), "the test never let the calls end");
    }
}

impl Backend for SlowBackend {
    fn size(&self) -> u64 {
        self.image.size()
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.image.read(offset, into)
    }

    fn read_now(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let end = offset + into.len() as u64;
        let state = self.slow.lock();
        let mut blocks = offset / BLOCK..end.div_ceil(BLOCK);
        if state.cold && !blocks.all(|block| state.loaded.contains(&block)) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        drop(state);
        self.image.read(offset, into)
    }

    fn is_resident(&self, range: Range) -> bool {
        self.read_now(range.offset(), &mut vec![0; range.length() as usize]).is_ok()
    }

    fn queue(&self, notifier: BorrowedFd<'_>) -> Option<Box<dyn IoQueue + '_>> {
        let mut state = self.slow.lock();
        state.lanes += 1;
        let (number, notifier) = (state.lanes, notifier.try_clone_to_owned().unwrap());
        Some(Box::new(SlowQueue { number, notifier, image: self, waiting: Vec::new() }))
    }

    fn write(&self, offset: u64, data: &[u8], durable: bool) -> io::Result<()> {
        self.image.write(offset, data, durable)
    }

    fn zero(&self, range: Range, how: Zeroing) -> io::Result<()> {
        self.image.zero(range, how)
    }

    fn zeroes_by_extent(&self, how: Zeroing) -> bool {
        self.image.zeroes_by_extent(how)
    }

    fn trim(&self, range: Range) -> io::Result<()> {
        self.image.trim(range)
    }

    fn flush(&self) -> io::Result<()> {
        self.image.flush()
    }

    fn prefetch(&self, range: Range) -> io::Result<()> {
        self.image.prefetch(range)
    }

    fn start_write_back(&self, range: Range) -> io::Result<()> {
        self.image.start_write_back(range)
    }

    fn extent(&self, offset: u64) -> io::Result<Extent> {
        self.image.extent(offset)
    }
}
