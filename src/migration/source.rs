//! The driver of the source: executes the actions of [`super::machine`], one after another.
//! Never decides: the result of each action is the machine's next event.

mod records;

use super::job::{
    Action, DestinationRequest, Event, Job, News, OperatorRequest, Outcome, Progress, RequestKind,
    Stage, TooLate, Trouble,
};
use super::link::{Link, Route, SendError};
use super::machine::{Machine, TooSmall};
use super::plan::Content;
use super::relay::{self, RelayConnector};
use super::wire::{Answer, Question};
use crate::disk::dirty::DirtyBitmap;
use crate::disk::ownership::Id;
use crate::disk::record_store::RecordStore;
use crate::disk::{Disk, is_zero};
use crate::ids::DiskId;
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
use std::time::{Duration, Instant};

/// Interval at which the handle's progress is updated.
const PROGRESS_EVERY: Duration = Duration::from_millis(50);
/// Granularity of zero detection in data, in bytes.
const LOOK_BLOCK: u64 = 64 << 10;
/// Bytes read of each block first; if they are all zero, the whole block is read.
const LOOK_SAMPLE: usize = 4096;
/// Most bytes of an extent examined before the next request is sent.
const LOOK_MAX: u64 = 8 << 20;

/// Receives the source's reports. Must not block.
pub trait Observer: Send {
    /// Reports news of the copy with this id.
    fn news(&self, id: Id, news: &News);
    /// The destination owns the disk: end all sessions without replies to their requests.
    fn retire(&self);
}

/// The parameters of a migration.
pub struct MigrationParams {
    /// The disk. Only the source closes its gate from now on.
    pub disk: Arc<Disk>,
    /// Stores the ownership record, and deletes the image if the job requires it.
    pub record_store: RecordStore,
    /// The addresses of the connection.
    pub route: Route,
    /// The parameters of the machine.
    pub job: Job,
    /// The id of the disk, which the destination keeps.
    pub disk_id: Option<DiskId>,
    /// Receives reports.
    pub observer: Box<dyn Observer>,
    /// Connects to the destination's disk, for a job with `relay`.
    pub relay: Option<Box<dyn RelayConnector>>,
}

/// A request, and the channel for its result.
type Pending = (OperatorRequest, Sender<Result<(), TooLate>>);

/// The handle of a running migration: takes operators' requests, returns progress and outcome.
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
    /// [`TooLate`] for a `break` after the handover was sent, or any request after the end.
    pub fn request(&self, request: OperatorRequest) -> Result<(), TooLate> {
        let (reply, result) = mpsc::channel();
        lock(&self.requests).push_back((request, reply));
        if self.outcome().is_some() {
            // The migration has just ended, and takes no more requests.
            lock(&self.requests).clear();
        }
        self.wake.wake();
        // The sender is dropped if the migration ends before it takes the request.
        result.recv().unwrap_or(Err(TooLate))
    }

    /// Requests a break without waiting until the machine has taken it.
    pub fn request_break(&self) {
        let (reply, _) = mpsc::channel();
        lock(&self.requests).push_back((OperatorRequest::Break, reply));
        self.wake.wake();
    }

    /// The progress when it was last updated; `None` before the start.
    #[must_use]
    pub fn progress(&self) -> Option<Progress> {
        lock(&self.progress).clone()
    }

    /// The time since the start.
    #[must_use]
    pub fn duration(&self) -> Duration {
        self.began.elapsed()
    }

    /// The outcome, once the migration has ended.
    #[must_use]
    pub fn outcome(&self) -> Option<Outcome> {
        self.result().map(|(outcome, _)| outcome)
    }

    /// The outcome and statistics, once the migration has ended.
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
    /// Time from start to end.
    pub duration: Duration,
    /// Bytes of data sent, including those sent again.
    pub bytes_sent: u64,
    /// Passes over the disk.
    pub passes: u64,
    /// Time that clients waited: from the closing of the gate until the destination was known to
    /// own the disk, or until their requests were passed on to it. Zero for a disk that stayed.
    pub pause: Duration,
}

/// Why a migration cannot start.
#[derive(Debug)]
pub enum StartFailure {
    /// The disk is too small.
    TooSmall(TooSmall),
    /// No memory or no file descriptor is left.
    System(io::Error),
}

/// The source of one migration.
pub struct Source {
    machine: Machine,
    disk: Arc<Disk>,
    dirty: Arc<DirtyBitmap>,
    record_store: RecordStore,
    route: Route,
    disk_id: Option<DiskId>,
    observer: Box<dyn Observer>,
    relay: Option<Box<dyn RelayConnector>>,
    handle: Arc<MigrationHandle>,
    clock: Instant,
    link: Option<Link>,
    /// When the gate was closed, if it is closed.
    gate_closed: Option<Instant>,
    /// The expiry last set at the gate.
    freeze_end: Option<Duration>,
    progress_at: Duration,
    /// Cache of the data extent examined last: some file systems take long to find its end. A part
    /// that has become a hole since then is found to be zero.
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
    /// A migration that starts with [`Source::run`], and its handle. Changes of the disk are marked
    /// from now on.
    ///
    /// # Errors
    /// See [`StartFailure`].
    pub fn new(params: MigrationParams) -> Result<(Self, Arc<MigrationHandle>), StartFailure> {
        let MigrationParams { disk, record_store, route, job, disk_id, observer, relay } = params;
        let machine = Machine::new(job, Duration::ZERO).map_err(StartFailure::TooSmall)?;
        let handle = MigrationHandle::new().map_err(StartFailure::System)?;
        let dirty = disk.track().map_err(StartFailure::System)?;
        let source = Self {
            machine,
            disk,
            dirty,
            record_store,
            route,
            disk_id,
            observer,
            relay,
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

    /// The id of the current copy; before [`Source::run`], of the first one.
    #[must_use]
    pub fn id(&self) -> Id {
        self.machine.job().id
    }

    /// Moves the disk. Returns when the migration has ended.
    #[must_use]
    pub fn run(mut self) -> Outcome {
        let mut event = Event::Begin;
        loop {
            self.take_requests();
            let now = self.clock.elapsed();
            let action = self.machine.step(now, event);
            self.set_gate_expiry();
            self.report(now);
            event = match action {
                Action::End(outcome) => {
                    self.disk.untrack();
                    self.disk.set_write_delay(Duration::ZERO);
                    self.handle.close(&outcome, self.stats(now));
                    return outcome;
                }
                action => self.execute(action),
            };
        }
    }

    fn execute(&mut self, action: Action) -> Event {
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
            Action::Record(kind) => self.record(kind),
            Action::Unlink => self.unlink(),
            Action::Retire => self.retire(),
            Action::Relay { proof } => self.relay(proof.as_ref()),
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
            // Handled by `run`.
            Action::End(_) => Event::Done,
        }
    }

    /// Keeps the present connection until the new one replaces it.
    fn connect(&mut self, question: &Question) -> Event {
        let open = |route: &Route| Link::open(route, Some(question), self.disk_id);
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

    /// The content of the beginning of `range`.
    fn look(&mut self, range: Range) -> Event {
        // The whole part will be sent, so its present marks are obsolete. Later marks must stay:
        // data that becomes a hole before it is sent must be examined again.
        self.dirty.forget(range.split(LOOK_MAX).0);
        match self.leading_content(range) {
            Ok((range, content)) => Event::Looked { range, content },
            Err(error) => self.unreadable(range.offset(), &error),
        }
    }

    fn unreadable(&mut self, offset: u64, error: &io::Error) -> Event {
        self.link = None;
        read_error(self.record_store.path(), offset, error)
    }

    fn leading_content(&mut self, range: Range) -> io::Result<(Range, Content)> {
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

    /// Reads a sample first, so that little of the data is read twice.
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
        let copies = !matches!(request.kind, RequestKind::Handover(_) | RequestKind::Disconnect);
        if let Some(event) = self.flush_failure().filter(|_| copies) {
            return event;
        }
        let Some(link) = &mut self.link else {
            return Event::Lost("there is no connection".to_owned());
        };
        let (disk, handle, machine) = (&self.disk, &self.handle, &mut self.machine);
        let timeout = machine.job().timeout;
        let mut give_up = || {
            take_requests(handle, machine);
            machine.is_breaking()
        };
        let sent = link.send(request, &disk.copier(), timeout, &handle.wake, &mut give_up);
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

    /// The fsync of the record, behind the closed gate, also writes back dirty pages of the image
    /// on most file systems. Writing them back now, in parallel with the destination's flush, keeps
    /// the pause short.
    fn write_back(&self) {
        if self.gate_closed.is_none() {
            // The next flush of a client reports a failure.
            let _ = self.disk.write_back();
        }
    }

    fn wait(&mut self, until: Duration) -> Event {
        let deadline = self.clock + until;
        let wake = &self.handle.wake;
        let Some(link) = &mut self.link else {
            // The machine checks the time itself, so the result of the wait does not matter.
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

    /// Sets the time at which the gate opens by itself, even during a long action.
    fn set_gate_expiry(&mut self) {
        let end = self.machine.freeze_end().filter(|_| self.gate_closed.is_some());
        if end == self.freeze_end {
            return;
        }
        self.freeze_end = end;
        if let Some(end) = end {
            // If the gate has opened already, `Seal` fails before HANDOVER is sent.
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

    fn retire(&mut self) -> Event {
        self.end_pause();
        // The server must stop admitting clients before the gate fails the waiting requests.
        self.observer.retire();
        self.disk.gate().retire();
        Event::Done
    }

    /// The gate stays parting: it is open for the clients that are connected.
    fn relay(&mut self, proof: Option<&Question>) -> Event {
        let id = self.machine.job().id;
        let Some(connector) = &mut self.relay else {
            return Event::Failed("relaying was not prepared".to_owned());
        };
        if !connector.has_clients() {
            return self.retire();
        }
        if let Err(error) = relay::exchange(&self.disk, &mut **connector, id, proof) {
            return error.into();
        }
        self.end_pause();
        if self.gate_closed.take().is_some() {
            self.disk.gate().reopen();
        }
        Event::Done
    }

    fn end_pause(&mut self) {
        self.stats.pause = self.gate_closed.map_or(Duration::ZERO, |since| since.elapsed());
    }

    fn stats(&self, now: Duration) -> MigrationStats {
        MigrationStats { duration: now, passes: self.machine.progress(now).passes, ..self.stats }
    }

    fn take_requests(&mut self) {
        take_requests(&self.handle, &mut self.machine);
    }

    fn report(&mut self, now: Duration) {
        let news: Vec<_> = std::iter::from_fn(|| self.machine.news()).collect();
        // The progress is updated before the news are reported, since the observer may read it; and
        // at once for a new stage, which may last.
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

/// Asks the server at `route` whether a disk has arrived; `None` if it has no private option.
///
/// # Errors
/// If no NBD server can be reached there, or it refuses the handshake.
pub fn ask(route: &Route, question: &Question) -> Result<Option<Answer>, Trouble> {
    Link::ask(route, question)
}

fn take_requests(handle: &MigrationHandle, machine: &mut Machine) {
    while let Some((request, reply)) = lock(&handle.requests).pop_front() {
        // `request_break` does not wait for the result.
        let _ = reply.send(machine.request(request));
    }
}

/// The event of a failed read of the image. Only a lack of memory is temporary.
fn read_error(image: &Path, offset: u64, error: &io::Error) -> Event {
    let why = format!("cannot read {} at byte {offset}: {error}", image.display());
    let is_memory = error.kind() == io::ErrorKind::OutOfMemory;
    if is_memory { Event::Failed(why) } else { Event::Unreadable(why) }
}

fn first_block(range: Range) -> u64 {
    range.length().min(LOOK_BLOCK - range.offset() % LOOK_BLOCK)
}

impl Drop for Source {
    /// Ends the wait of callers if the migration's thread has panicked.
    fn drop(&mut self) {
        if self.handle.outcome().is_none() {
            let why = "the migration broke down; restart the server";
            self.handle.close(&Outcome::Failed(Trouble::Unexpected(why)), self.stats);
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
        let (sender, result) = mpsc::channel();
        std::thread::spawn(move || sender.send(handle.request(OperatorRequest::Break)));
        assert_eq!(result.recv_timeout(Duration::from_secs(20)), Ok(Err(TooLate)));
    }
}
