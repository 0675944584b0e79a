//! The source's driver: executes the actions of [`super::machine`], one after another.
//! Never decides: the result of each action is the machine's next event.

use super::job::{
    Action, DestinationRequest, Event, Job, News, OperatorRequest, Outcome, Progress, RecordKind,
    RequestKind, Stage, TooLate, Trouble,
};
use super::link::{Link, Route, SendError};
use super::machine::{Machine, TooSmall};
use super::plan::Content;
use super::wire::{Answer, Question};
use crate::disk::dirty::DirtyBitmap;
use crate::disk::ownership::{Id, Record};
use crate::disk::record_store::RecordStore;
use crate::disk::{Disk, is_zero};
use crate::net::{Wake, wait_readable};
use crate::range::Range;
use crate::sync::lock;
use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

/// Interval at which the handle's progress is updated.
const PROGRESS_EVERY: Duration = Duration::from_millis(50);
/// Granularity of zero detection in data, in bytes.
const LOOK_BLOCK: u64 = 64 << 10;
/// Bytes of a block that are read first; only if they are all zero is the rest read.
const LOOK_SAMPLE: usize = 4096;
/// Bytes of an extent that are examined before the next request is sent.
const LOOK_MAX: u64 = 8 << 20;

/// Receives the source's reports. Must not block.
pub trait Observer: Send {
    /// Something happened to the copy with this id.
    fn news(&self, id: Id, news: &News);
    /// The destination owns the disk: end all sessions without answering them.
    fn retire(&self);
}

/// The parameters of a migration.
pub struct MigrationParams {
    /// The disk; its gate is the source's from now on.
    pub disk: Arc<Disk>,
    /// The store of its record, which also deletes the image if the job says so.
    pub record_store: RecordStore,
    /// The way to the destination.
    pub route: Route,
    /// The operator's order.
    pub job: Job,
    /// Receives reports.
    pub observer: Box<dyn Observer>,
}

/// A request, and the channel for its result.
type Pending = (OperatorRequest, Sender<Result<(), TooLate>>);

/// Control of a running migration: requests of operators in, progress and outcome out.
#[derive(Debug)]
pub struct MigrationHandle {
    requests: Mutex<VecDeque<Pending>>,
    progress: Mutex<Option<Progress>>,
    outcome: Mutex<Option<(Outcome, MigrationStats)>>,
    wake: Wake,
    began: Instant,
}

impl MigrationHandle {
    fn new() -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            requests: Mutex::default(),
            progress: Mutex::default(),
            outcome: Mutex::default(),
            wake: Wake::new()?,
            began: Instant::now(),
        }))
    }

    /// Makes a request and waits until the machine has taken it, or the migration has ended.
    ///
    /// # Errors
    /// [`TooLate`] for a `break` when the disk is no longer ours to keep.
    pub fn request(&self, order: OperatorRequest) -> Result<(), TooLate> {
        let (taken, answer) = mpsc::channel();
        lock(&self.requests).push_back((order, taken));
        if self.outcome().is_some() {
            // The migration ended just before, and will take no more requests.
            lock(&self.requests).clear();
        }
        self.wake.wake();
        // The sender is dropped when the migration ends before it takes the request.
        answer.recv().unwrap_or(Err(TooLate))
    }

    /// Requests a break without waiting until the machine has taken it.
    pub fn request_break(&self) {
        let (taken, _) = mpsc::channel();
        lock(&self.requests).push_back((OperatorRequest::Break, taken));
        self.wake.wake();
    }

    /// How far the migration was a moment ago.
    #[must_use]
    pub fn progress(&self) -> Option<Progress> {
        lock(&self.progress).clone()
    }

    /// How long it has been going on.
    #[must_use]
    pub fn duration(&self) -> Duration {
        self.began.elapsed()
    }

    /// How it ended, if it has.
    #[must_use]
    pub fn outcome(&self) -> Option<Outcome> {
        self.result().map(|(outcome, _)| outcome)
    }

    /// How it ended and its statistics, if it has ended.
    #[must_use]
    pub fn result(&self) -> Option<(Outcome, MigrationStats)> {
        lock(&self.outcome).clone()
    }

    fn close(&self, outcome: &Outcome, stats: MigrationStats) {
        *lock(&self.outcome) = Some((outcome.clone(), stats));
        lock(&self.requests).clear();
    }
}

/// The statistics of a migration.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MigrationStats {
    /// From its beginning to its end.
    pub duration: Duration,
    /// Bytes of data sent, including those sent again.
    pub bytes_sent: u64,
    /// Passes over the disk.
    pub passes: u64,
    /// From the closing of the gate until the disk was known to be at the destination: how long
    /// clients waited. Zero for a disk that stayed.
    pub pause: Duration,
}

/// Why a migration cannot even begin.
#[derive(Debug)]
pub enum StartFailure {
    /// The disk is too small.
    TooSmall(TooSmall),
    /// The system has no memory or descriptor left.
    System(io::Error),
}

/// A migration under way.
pub struct Source {
    machine: Machine,
    disk: Arc<Disk>,
    dirty: Arc<DirtyBitmap>,
    record_store: RecordStore,
    route: Route,
    observer: Box<dyn Observer>,
    handle: Arc<MigrationHandle>,
    clock: Instant,
    link: Option<Link>,
    /// Since when the gate is closed, if it is.
    gate_closed: Option<Instant>,
    /// When the closed gate opens by itself, as the gate was told.
    freeze_end: Option<Duration>,
    progress_at: Duration,
    /// The extent of data that was looked at last: on some file systems it takes long to find its
    /// end. A part that has become a hole since is found to be zero.
    allocated: Range,
    reported_stage: Option<Stage>,
    stats: MigrationStats,
}

impl fmt::Debug for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Source").field("machine", &self.machine).finish_non_exhaustive()
    }
}

impl Source {
    /// A migration that begins when it is run, and the handle it is reached at. From now on the
    /// disk's changes are marked.
    ///
    /// # Errors
    /// When it cannot begin.
    pub fn new(params: MigrationParams) -> Result<(Self, Arc<MigrationHandle>), StartFailure> {
        let MigrationParams { disk, record_store, route, job, observer } = params;
        let machine = Machine::new(job, Duration::ZERO).map_err(StartFailure::TooSmall)?;
        let handle = MigrationHandle::new().map_err(StartFailure::System)?;
        let dirty = disk.track().map_err(StartFailure::System)?;
        let source = Self {
            machine,
            disk,
            dirty,
            record_store,
            route,
            observer,
            handle: Arc::clone(&handle),
            clock: Instant::now(),
            link: None,
            gate_closed: None,
            freeze_end: None,
            progress_at: Duration::ZERO,
            allocated: Range::whole(0),
            reported_stage: None,
            stats: MigrationStats::default(),
        };
        Ok((source, handle))
    }

    /// The name of the copy that is made first.
    #[must_use]
    pub fn id(&self) -> Id {
        self.machine.job().id
    }

    /// Moves the disk. Returns when that is done, broken off, or was never possible.
    #[must_use]
    pub fn run(mut self) -> Outcome {
        let mut event = Event::Begin;
        loop {
            self.take_requests();
            let now = self.clock.elapsed();
            let action = self.machine.step(now, event);
            self.bound_freeze();
            self.report(now);
            event = match action {
                Action::End(outcome) => {
                    self.disk.untrack();
                    self.disk.set_write_delay(Duration::ZERO);
                    self.handle.close(&outcome, self.stats(now));
                    return outcome;
                }
                action => self.carry_out(action),
            };
        }
    }

    fn carry_out(&mut self, action: Action) -> Event {
        match action {
            Action::Connect(question) | Action::Ask(question) => self.connect(&question),
            Action::Look(range) => self.look(range),
            Action::TakeDirty { from, longest } => {
                let run = self.dirty.take_next(from, longest);
                Event::Taken { run, left: self.dirty.bytes() }
            }
            Action::Send(request) => self.send(&request),
            Action::Wait { until } => self.wait(until),
            Action::Probe => Event::Visits { turned: self.disk.gate().turn_generation() },
            Action::CloseGate { within } => self.close_gate(within),
            Action::Seal => match self.disk.gate().expire_at(None) {
                Ok(()) => Event::Done,
                Err(expired) => Event::Failed(expired.to_string()),
            },
            Action::OpenGate => self.open_gate(),
            Action::Throttle(delay) => {
                self.disk.set_write_delay(delay);
                Event::Done
            }
            Action::Record(note) => self.record(note),
            Action::Unlink => self.unlink(),
            Action::Retire => {
                self.stats.pause = self.gate_closed.map_or(Duration::ZERO, |since| since.elapsed());
                // The server stops admitting clients before the gate lets the waiting ones go.
                self.observer.retire();
                self.disk.gate().retire();
                Event::Done
            }
            Action::HangUp => {
                self.link = None;
                Event::Done
            }
            Action::Disconnect => {
                if let Some(link) = self.link.take() {
                    link.disconnect();
                }
                Event::Done
            }
            // `run` has taken this one.
            Action::End(_) => Event::Done,
        }
    }

    /// The present connection stays until another replaces it.
    fn connect(&mut self, question: &Question) -> Event {
        let open = |route: &Route| Link::open(route, Some(question));
        let opened = match self.machine.stage() {
            Stage::InDoubt => self.route.with_bind_fallback(open),
            _ => open(&self.route),
        };
        match opened {
            Ok((link, peer)) => {
                self.link = link;
                Event::Greeted(peer)
            }
            Err(trouble) => Event::Unreachable(trouble),
        }
    }

    /// The content of the beginning of `range`. Zero blocks in data are detected by a sample first, so
    /// that little of the data is read twice.
    fn look(&mut self, range: Range) -> Event {
        // The whole part will be sent, so its dirty marks of now are void. Not those at the time of
        // sending: data that has become a hole by then must be examined again.
        self.dirty.forget(range.split(LOOK_MAX).0);
        match self.look_at(range) {
            Ok((range, content)) => Event::Looked { range, content },
            Err(error) => self.unreadable(range.offset(), &error),
        }
    }

    fn unreadable(&mut self, offset: u64, error: &io::Error) -> Event {
        self.link = None;
        read_error(self.record_store.path(), offset, error)
    }

    fn look_at(&mut self, range: Range) -> io::Result<(Range, Content)> {
        let known = self.allocated;
        if !(known.offset() <= range.offset() && range.offset() < known.end()) {
            let extent = self.disk.copier().extent(range.offset())?;
            if !extent.allocated {
                return Ok((range.until(extent.range.end()), Content::Zeros));
            }
            self.allocated = extent.range;
        }
        let mut rest = range.until(self.allocated.end()).split(LOOK_MAX).0;
        let zero = self.first_block_is_zero(rest)?;
        let start = rest;
        while !rest.is_empty() && self.first_block_is_zero(rest)? == zero {
            rest = rest.split(first_block(rest)).1;
        }
        let content = if zero { Content::Zeros } else { Content::Data };
        Ok((start.until(rest.offset()), content))
    }

    fn first_block_is_zero(&self, range: Range) -> io::Result<bool> {
        let copier = self.disk.copier();
        let length = first_block(range) as usize;
        let mut sample = [0; LOOK_SAMPLE];
        let sample = &mut sample[..length.min(LOOK_SAMPLE)];
        copier.read(range.offset(), sample)?;
        if !is_zero(sample) {
            return Ok(false);
        }
        let mut block = vec![0; length];
        copier.read(range.offset(), &mut block)?;
        Ok(is_zero(&block))
    }

    fn send(&mut self, request: &DestinationRequest) -> Event {
        let Some(link) = &mut self.link else {
            return Event::Lost("there is no connection".to_owned());
        };
        let (disk, handle, machine) = (&self.disk, &self.handle, &mut self.machine);
        let patience = machine.job().timeout;
        let mut give_up = || {
            take_requests(handle, machine);
            machine.is_breaking()
        };
        let sent = link.send(request, &disk.copier(), patience, &handle.wake, &mut give_up);
        match sent {
            Ok(()) => {
                match request.kind {
                    RequestKind::Write(range) => self.stats.bytes_sent += range.length(),
                    RequestKind::Flush => self.write_back(),
                    RequestKind::Zero(_) | RequestKind::Handover(_) | RequestKind::Disconnect => {}
                }
                Event::Done
            }
            Err(SendError::Link(why)) => Event::Lost(why),
            Err(SendError::Unsent(why)) => Event::Unsent(why),
            Err(SendError::Disk { offset, error }) => self.unreadable(offset, &error),
        }
    }

    /// The fsync of the record, with the gate closed, also writes back dirty pages of the image on
    /// most file systems. Writing them back now, in parallel with the destination's flush, keeps
    /// the pause short.
    fn write_back(&self) {
        if self.gate_closed.is_none() {
            // Clients get a failure with their next flush.
            let _ = self.disk.write_back();
        }
    }

    fn wait(&mut self, until: Duration) -> Event {
        let deadline = self.clock + until;
        let wake = &self.handle.wake;
        let Some(link) = &mut self.link else {
            // The machine looks at the time again, however the wait ends.
            let _ = wait_readable(&[wake.as_fd()], Some(deadline));
            wake.clear();
            return Event::Tick;
        };
        match link.next_reply(deadline, wake) {
            Ok(Some((cookie, error))) => Event::Reply { cookie, error },
            Ok(None) => Event::Tick,
            Err(why) => Event::Lost(why),
        }
    }

    fn close_gate(&mut self, within: Duration) -> Event {
        let since = Instant::now();
        match self.disk.gate().close_and_drain(since + within) {
            Ok(()) => {
                self.gate_closed = Some(since);
                Event::Done
            }
            Err(busy) => Event::Failed(busy.to_string()),
        }
    }

    /// Sets the time at which the gate opens by itself, so that clients wait no longer however long
    /// the next action takes.
    fn bound_freeze(&mut self) {
        let end = self.machine.freeze_end().filter(|_| self.gate_closed.is_some());
        if end == self.freeze_end {
            return;
        }
        self.freeze_end = end;
        if let Some(end) = end {
            // A gate that has opened already makes `Seal` fail before HANDOVER is sent.
            let _ = self.disk.gate().expire_at(Some(self.clock + end));
        }
    }

    fn open_gate(&mut self) -> Event {
        self.disk.gate().set_parting(false);
        if self.gate_closed.take().is_some() {
            self.disk.gate().reopen();
        }
        Event::Done
    }

    fn record(&self, note: RecordKind) -> Event {
        let record = self.record_of(note);
        if let Err(error) = self.record_store.write(record.as_ref()) {
            return Event::Failed(error.to_string());
        }
        // From the handover on the destination may serve the disk: this host admits no client that
        // tries both.
        if note == RecordKind::Departing {
            self.disk.gate().set_parting(true);
        }
        Event::Done
    }

    fn record_of(&self, note: RecordKind) -> Option<Record> {
        let when = SystemTime::UNIX_EPOCH.elapsed().map_or(0, |since| since.as_secs());
        self.machine.job().record(note, when)
    }

    fn unlink(&self) -> Event {
        let last = self.record_of(RecordKind::Departed);
        let deleted = self.record_store.delete_image(last.as_ref(), self.machine.job().size);
        deleted.map_or_else(|error| Event::Failed(error.to_string()), |()| Event::Done)
    }

    fn stats(&self, now: Duration) -> MigrationStats {
        MigrationStats { duration: now, passes: self.machine.progress(now).passes, ..self.stats }
    }

    fn take_requests(&mut self) {
        take_requests(&self.handle, &mut self.machine);
    }

    fn report(&mut self, now: Duration) {
        let news: Vec<_> = std::iter::from_fn(|| self.machine.news()).collect();
        // Before the news, since their observer may ask for the progress. At once for a new stage, which
        // may last.
        let stage = Some(self.machine.stage());
        if !news.is_empty() || now >= self.progress_at || stage != self.reported_stage {
            (self.progress_at, self.reported_stage) = (now + PROGRESS_EVERY, stage);
            *lock(&self.handle.progress) = Some(self.machine.progress(now));
        }
        for news in &news {
            self.observer.news(self.machine.job().id, news);
        }
    }
}

/// Asks the server at the end of `route` whether a disk has arrived.
///
/// # Errors
/// When no server answers that could know.
pub fn ask(route: &Route, question: &Question) -> Result<Option<Answer>, Trouble> {
    Link::ask(route, question)
}

fn take_requests(handle: &MigrationHandle, machine: &mut Machine) {
    while let Some((order, taken)) = lock(&handle.requests).pop_front() {
        // The caller may have gone away.
        let _ = taken.send(machine.request(order));
    }
}

/// The event of a failed read of the image: only a lack of memory is temporary.
fn read_error(image: &Path, offset: u64, error: &io::Error) -> Event {
    let why = format!("cannot read {} at byte {offset}: {error}", image.display());
    let is_memory = error.kind() == io::ErrorKind::OutOfMemory;
    if is_memory { Event::Failed(why) } else { Event::Unreadable(why) }
}

fn first_block(range: Range) -> u64 {
    range.length().min(LOOK_BLOCK - range.offset() % LOOK_BLOCK)
}

/// Ends the wait of callers when the migration's thread has panicked.
impl Drop for Source {
    fn drop(&mut self) {
        if self.handle.outcome().is_none() {
            let why = "the migration broke down; restart the server";
            self.handle.close(&Outcome::Failed(Trouble::Confused(why)), self.stats);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::libc::{EIO, ENOMEM, ESTALE};

    #[test]
    fn read_without_memory_is_retried() {
        let event =
            |errno| read_error(Path::new("/srv/image"), 4096, &io::Error::from_raw_os_error(errno));
        for errno in [EIO, ESTALE] {
            assert!(matches!(event(errno), Event::Unreadable(_)), "{errno}");
        }
        assert!(matches!(event(ENOMEM), Event::Failed(_)));
    }

    #[test]
    fn request_after_the_end_is_too_late() {
        let handle = MigrationHandle::new().unwrap();
        handle.close(&Outcome::Broken, MigrationStats::default());
        let (told, answer) = mpsc::channel();
        std::thread::spawn(move || told.send(handle.request(OperatorRequest::Break)));
        assert_eq!(answer.recv_timeout(Duration::from_secs(20)), Ok(Err(TooLate)));
    }
}
