//! The source's hands: carries out what [`super::machine`] decides, one action after another.
//! Never decides: every result goes back as the next event.

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

/// How often the progress is written down for whoever asks.
const PROGRESS_EVERY: Duration = Duration::from_millis(50);
/// Data is looked at for zeros in blocks of this size.
const LOOK_BLOCK: u64 = 64 << 10;
/// Of each such block this much is read first; only if it is all zero is the rest worth reading.
const LOOK_SAMPLE: usize = 4096;
/// How much of an extent is looked at before something is sent.
const LOOK_MAX: u64 = 8 << 20;

/// What the source reports to whoever started it. Must not wait.
pub trait Observer: Send {
    /// Something worth telling has happened to the copy of this name.
    fn news(&self, id: Id, news: &News);
    /// The disk is somebody else's: end all sessions without answering them.
    fn retire(&self);
}

/// What is needed to move a disk.
pub struct MigrationParams {
    /// The disk; its gate is the source's from now on.
    pub disk: Arc<Disk>,
    /// Where its record is kept, and by which the image is deleted if that is ordered.
    pub record_store: RecordStore,
    /// How to get there.
    pub route: Route,
    /// What is ordered.
    pub job: Job,
    /// Who is told.
    pub observer: Box<dyn Observer>,
}

/// An order, and where to say whether it was taken.
type Pending = (OperatorRequest, Sender<Result<(), TooLate>>);

/// The way from operators to a running migration, and what they see of it.
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

    /// Gives an order and waits until it is taken, or the migration is over.
    ///
    /// # Errors
    /// [`TooLate`] for a `break` when the disk is no longer ours to keep.
    pub fn request(&self, order: OperatorRequest) -> Result<(), TooLate> {
        let (taken, answer) = mpsc::channel();
        lock(&self.requests).push_back((order, taken));
        if self.outcome().is_some() {
            // It ended just before, and nobody will look at requests any more.
            lock(&self.requests).clear();
        }
        self.wake.wake();
        // The sender is dropped when the migration ends before it takes the order.
        answer.recv().unwrap_or(Err(TooLate))
    }

    /// Gives the order to break off without waiting until it is taken.
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

    /// How it ended and what it took, if it has ended.
    #[must_use]
    pub fn result(&self) -> Option<(Outcome, MigrationStats)> {
        lock(&self.outcome).clone()
    }

    fn close(&self, outcome: &Outcome, stats: MigrationStats) {
        *lock(&self.outcome) = Some((outcome.clone(), stats));
        lock(&self.requests).clear();
    }
}

/// What a migration took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MigrationStats {
    /// From its beginning to its end.
    pub duration: Duration,
    /// Bytes of data sent, those that were sent again included.
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
                // Nobody is let in again between the two.
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
                    link.say_goodbye();
                }
                Event::Done
            }
            // `run` has taken this one.
            Action::End(_) => Event::Done,
        }
    }

    /// The connection that there is stays until there is another.
    fn connect(&mut self, question: &Question) -> Event {
        let open = |route: &Route| Link::open(route, Some(question));
        let opened = match self.machine.stage() {
            Stage::InDoubt => self.route.or_from_anywhere(open),
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

    /// What the beginning of `range` holds. In data, blocks of zeros are found by a sample first,
    /// so that what is not zero is hardly read twice.
    fn look(&mut self, range: Range) -> Event {
        // All of it is going to be sent: what is marked by now need not be sent again. Not later,
        // when it is sent, since data that has become a hole meanwhile is to be looked at again.
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
                match request.work {
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

    /// Behind the closed gate the record will be made durable, and with it, on most file systems,
    /// whatever is unwritten of the image. So that little is, it is written while the destination
    /// flushes what it has, before it is decided that the gate may close.
    fn write_back(&self) {
        if self.gate_closed.is_none() {
            // A failure is the clients' to hear, with their next flush.
            let _ = self.disk.write_back();
        }
    }

    fn wait(&mut self, until: Duration) -> Event {
        let deadline = self.clock + until;
        let wake = &self.handle.wake;
        let Some(link) = &mut self.link else {
            // Whatever ends the waiting, the machine looks at the time again.
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

    /// Tells the gate when to open by itself. Whatever the next action takes, clients do not wait
    /// longer.
    fn bound_freeze(&mut self) {
        let end = self.machine.freeze_end().filter(|_| self.gate_closed.is_some());
        if end == self.freeze_end {
            return;
        }
        self.freeze_end = end;
        if let Some(end) = end {
            // That it has opened already is noticed before anything is sent that matters.
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
        // From the handover on the disk may be served elsewhere: a client that looks for it at both
        // hosts is not to be let in here.
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
        // First, since whoever hears the news may ask for the progress.
        // A stage may last: whoever asks must not be told the one before all the while.
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

/// Asks whoever is there what has become of a disk.
///
/// # Errors
/// When nobody answers who could know.
pub fn ask(route: &Route, question: &Question) -> Result<Option<Answer>, Trouble> {
    Link::ask(route, question)
}

fn take_requests(handle: &MigrationHandle, machine: &mut Machine) {
    while let Some((order, taken)) = lock(&handle.requests).pop_front() {
        // Whoever gave it may have gone away.
        let _ = taken.send(machine.request(order));
    }
}

/// What it means that the image could not be read: only a lack of memory passes.
fn read_error(image: &Path, offset: u64, error: &io::Error) -> Event {
    let why = format!("cannot read {} at byte {offset}: {error}", image.display());
    let is_memory = error.kind() == io::ErrorKind::OutOfMemory;
    if is_memory { Event::Failed(why) } else { Event::Unreadable(why) }
}

fn first_block(range: Range) -> u64 {
    range.length().min(LOOK_BLOCK - range.offset() % LOOK_BLOCK)
}

/// Nobody waits for ever for a migration whose thread broke down.
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
    fn a_read_without_memory_is_tried_again() {
        let event =
            |errno| read_error(Path::new("/srv/image"), 4096, &io::Error::from_raw_os_error(errno));
        for errno in [EIO, ESTALE] {
            assert!(matches!(event(errno), Event::Unreadable(_)), "{errno}");
        }
        assert!(matches!(event(ENOMEM), Event::Failed(_)));
    }

    #[test]
    fn an_order_that_comes_just_after_the_end_is_too_late_and_does_not_wait_for_ever() {
        let handle = MigrationHandle::new().unwrap();
        handle.close(&Outcome::Broken, MigrationStats::default());
        let (told, answer) = mpsc::channel();
        std::thread::spawn(move || told.send(handle.request(OperatorRequest::Break)));
        assert_eq!(answer.recv_timeout(Duration::from_secs(20)), Ok(Err(TooLate)));
    }
}
