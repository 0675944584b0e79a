//! Executes requests on the disk and puts their replies into the outbox. Reads take several steps and
//! are in `reads`.
//! Never waits for the client while it holds a visit. Waits for the disk only where nothing else is
//! possible: slow operations are in flight, and answered when they complete.

use super::end::SessionEnd;
use super::export_policy::{ExportPolicy, SessionId};
use super::inline_reads::InlineReads;
use super::outbox::Outbox;
use super::reads::Read;
use super::stop_request::{SessionControl, StopRequest};
use crate::disk::inflight::{InFlight, Work};
use crate::disk::{Disk, Extent, Notifier, Visit, Zeroing, errno_of};
use crate::message_id;
use crate::nbd::handshake::ALLOCATION_CONTEXT_ID;
use crate::nbd::reply::{Dialect, ReplyTo, StatusExtent};
use crate::nbd::request::Request;
use crate::nbd::wire::{Allocation, ErrorCode};
use crate::net::{Interest, Stream};
use crate::range::Range;
use crate::server::write_throttle::Throttle;
use std::io;
use std::sync::Arc;
use std::time::Instant;
use tracing::warn;

/// The most bytes to read or write at once.
pub(super) const PIECE: u64 = 256 << 10;
/// The most extents in one reply; the client asks again for the rest. The specification allows 2^20,
/// which would take 16 MiB.
pub(super) const EXTENTS_MAX: usize = 16 << 10;
/// Pieces end at multiples of this, so that the disk sees whole blocks.
const BLOCK: u64 = 4096;
/// How many failed requests of one session are logged.
const FAILURES_LOGGED_MAX: u32 = 10;

/// Executes the requests of one session.
#[derive(Debug)]
pub(super) struct Worker<'a> {
    pub(super) disk: &'a Disk,
    pub(super) control: &'a Arc<SessionControl>,
    pub(super) policy: &'a dyn ExportPolicy,
    pub(super) dialect: Dialect,
    /// The session's I/O in flight.
    pub(super) in_flight: InFlight<'a, Tag>,
    pub(super) inline_reads: InlineReads,
    /// Bytes that are being populated.
    populating: u64,
    /// For the log.
    pub(super) client: String,
    pub(super) session: u64,
    failures: u32,
    throttle: Throttle,
    started: Instant,
    /// A range found to be allocated. It may have become a hole since; then zeros are sent as data, which
    /// is slower but correct.
    pub(super) allocated: Range,
}

/// What to do with a completion.
#[derive(Debug)]
pub(super) enum Tag {
    /// Reply with its result.
    Answer { to: ReplyTo, request: Request },
    /// Continue this read: its data is in memory.
    Read(Read, Populate),
}

/// A running population of the page cache for a read.
#[derive(Clone, Copy, Debug)]
pub(super) struct Populate {
    length: u64,
    /// Bytes that the session was populating when this began, its own included.
    in_flight: u64,
    since: Instant,
}

impl<'a> Worker<'a> {
    pub(super) fn new(
        disk: &'a Disk,
        control: &'a Arc<SessionControl>,
        policy: &'a dyn ExportPolicy,
        dialect: Dialect,
        (client, session): (String, SessionId),
    ) -> Self {
        let allocated = Range::whole(0);
        let notifier = Arc::clone(control) as Arc<dyn Notifier>;
        Self {
            disk,
            control,
            policy,
            dialect,
            in_flight: InFlight::new(disk, notifier),
            inline_reads: InlineReads::default(),
            populating: 0,
            client,
            session,
            failures: 0,
            throttle: Throttle::default(),
            started: Instant::now(),
            allocated,
        }
    }

    /// Enters the gate. `None` while it is closed: the session then waits in its loop, and is woken when
    /// the gate opens. A session that is requested to finish and has no I/O in flight ends instead.
    pub(super) fn visit(&self) -> Result<Option<Visit<'a>>, SessionEnd> {
        match self.disk.enter_if_open() {
            Ok(Some(visit)) => Ok(Some(visit)),
            Ok(None) => match self.control.current() {
                StopRequest::Serve | StopRequest::Suspend => Ok(self.wait_for_gate()),
                _ if !self.in_flight.is_empty() => Ok(self.wait_for_gate()),
                request => Err(SessionEnd::Requested(request)),
            },
            Err(_) => Err(SessionEnd::DiskGone),
        }
    }

    fn wait_for_gate(&self) -> Option<Visit<'a>> {
        self.in_flight.notify_when_gate_opens();
        None
    }

    /// Ends the session if the disk is gone: I/O that waits to begin never will.
    pub(super) fn check_disk(&self) -> Result<(), SessionEnd> {
        match self.in_flight.has_waiting().then(|| self.disk.enter_if_open()) {
            Some(Err(_)) => Err(SessionEnd::DiskGone),
            _ => Ok(()),
        }
    }

    /// Delays a write if a migration throttles writers so that it converges. False if I/O in flight has
    /// to complete first, so that the delay does not postpone its replies.
    pub(super) fn throttle(&mut self, stream: &Stream) -> Result<bool, SessionEnd> {
        let wanted = self.disk.write_delay();
        if wanted.is_zero() {
            return Ok(true);
        }
        if !self.in_flight.is_quiescent() {
            return Ok(false);
        }
        let delay = self.throttle.delay(self.started.elapsed(), wanted);
        let deadline = Some(Instant::now() + delay);
        let wake = &self.control.wake;
        loop {
            let waited = stream.wait(Interest::default(), Some(wake), deadline);
            if !waited.map_err(SessionEnd::Connection)?.woken {
                return Ok(true);
            }
            // Only a stop request ends the delay; the next turn handles it. A late notification of an
            // earlier completion may wake us as well: keep waiting.
            wake.clear();
            if self.control.current() != StopRequest::Serve {
                return Ok(true);
            }
        }
    }

    /// Begins a request that takes a single step, which a read or write does not. False if it has to
    /// wait for I/O in flight.
    pub(super) fn answer(
        &mut self,
        to: ReplyTo,
        request: Request,
        out: &mut Outbox,
    ) -> Result<bool, SessionEnd> {
        let work = match request {
            Request::Flush => Work::Flush,
            Request::Trim { range, durable } => Work::Trim { range, durable },
            Request::Cache { range } => Work::Prefetch(range),
            Request::WriteZeroes { range, no_hole, fast, durable } => {
                let how = Zeroing { keep_allocated: no_hole, only_if_fast: fast };
                Work::Zero { range, how, durable }
            }
            Request::BlockStatus { range, one } => return self.block_status(to, range, one, out),
            // These take several steps, or have no reply.
            Request::Read { .. }
            | Request::Write { .. }
            | Request::Private { .. }
            | Request::Disconnect => return Ok(true),
        };
        self.submit(to, request, work)
    }

    /// Begins I/O whose result is the reply; false while the gate is closed.
    fn submit(&mut self, to: ReplyTo, request: Request, work: Work) -> Result<bool, SessionEnd> {
        let Some(visit) = self.visit()? else { return Ok(false) };
        self.in_flight.begin(visit, work, Tag::Answer { to, request });
        Ok(true)
    }

    /// Begins to populate the page cache for a read, which continues when that completes.
    pub(super) fn populate(&mut self, visit: Visit<'a>, range: Range, read: Read) {
        self.populating += range.length();
        let (length, in_flight) = (range.length(), self.populating);
        let load = Populate { length, in_flight, since: Instant::now() };
        self.in_flight.begin(visit, Work::Populate(range), Tag::Read(read, load));
    }

    pub(super) fn record_load(&mut self, load: &Populate) {
        self.populating -= load.length;
        self.inline_reads.record_load(load.in_flight, load.since.elapsed());
    }

    fn block_status(
        &mut self,
        to: ReplyTo,
        range: Range,
        one: bool,
        out: &mut Outbox,
    ) -> Result<bool, SessionEnd> {
        let Some(visit) = self.visit()? else { return Ok(false) };
        let limit = if one { 1 } else { EXTENTS_MAX };
        let found = visit.extents(range, limit);
        drop(visit);
        match found {
            Ok(extents) if !extents.is_empty() => self.reply_status(to, &extents, out),
            outcome => {
                let request = Request::BlockStatus { range, one };
                self.complete(to, outcome.map(drop), request, out);
            }
        }
        Ok(true)
    }

    /// Replies to a request with its result.
    pub(super) fn complete(
        &mut self,
        to: ReplyTo,
        outcome: io::Result<()>,
        request: Request,
        out: &mut Outbox,
    ) {
        match outcome {
            Ok(()) => out.reply(|out| self.dialect.success(to, out)),
            Err(error) => {
                let concerns_policy = request.writes() || request == Request::Flush;
                if concerns_policy && !is_not_fast(request, &error) {
                    self.policy.on_write_failure(self.session, &error);
                }
                let is_lost = request == Request::Flush && !self.disk.all_flushes_succeeded();
                let kind =
                    if is_lost { message_id::FLUSH_FAILED } else { message_id::REQUEST_FAILED };
                let code = self.log_error(kind, &request, &error);
                out.reply(|out| self.dialect.failure(to, code, None, "", out));
            }
        }
    }

    /// Rejects a request that cannot be executed.
    pub(super) fn reject(&mut self, to: ReplyTo, code: ErrorCode, why: &str, out: &mut Outbox) {
        self.log(None, format_args!("refused a request: {why}; answered {code}"));
        out.reply(|out| self.dialect.failure(to, code, None, why, out));
    }

    fn reply_status(&self, to: ReplyTo, extents: &[Extent], out: &mut Outbox) {
        let hole = (Allocation::HOLE | Allocation::ZERO).bits();
        let status: Vec<StatusExtent> = extents
            .iter()
            .map(|extent| (extent.range.length(), if extent.allocated { 0 } else { hole }))
            .collect();
        out.reply(|out| self.dialect.status(to, ALLOCATION_CONTEXT_ID, &status, out));
    }

    /// Logs a failure with a message id, and returns the error to reply with.
    pub(super) fn log_error(
        &mut self,
        kind: &'static str,
        what: &impl std::fmt::Debug,
        error: &io::Error,
    ) -> ErrorCode {
        let code = ErrorCode::from_errno(errno_of(error));
        let errno = error.raw_os_error();
        self.log(Some((kind, errno)), format_args!("{what:?} failed: {error}; answered {code}"));
        code
    }

    /// Logs a failed request, unless this session has reached its limit.
    fn log(&mut self, failure: Option<(&str, Option<i32>)>, what: std::fmt::Arguments<'_>) {
        let (kind, errno) = failure.unzip();
        let errno = errno.flatten();
        self.failures = self.failures.saturating_add(1);
        let client = &self.client;
        if self.failures <= FAILURES_LOGGED_MAX {
            warn!(message_id = kind, errno, "{client}: {what}");
        }
        if self.failures == FAILURES_LOGGED_MAX {
            warn!("{client}: further failed requests are not logged");
        }
    }
}

/// Whether a request failed only because zeroing would not be fast (`NBD_CMD_FLAG_FAST_ZERO`).
fn is_not_fast(request: Request, error: &io::Error) -> bool {
    let code = ErrorCode::from_errno(errno_of(error));
    matches!(request, Request::WriteZeroes { fast: true, .. }) && code == ErrorCode::NotSupported
}

/// Length of the next piece of `range`, which ends at a block boundary unless it is the last.
pub(super) fn piece_length(range: Range) -> u64 {
    if range.length() <= PIECE {
        return range.length();
    }
    PIECE - (range.offset() % BLOCK)
}

#[cfg(test)]
mod tests {
    use super::super::export_policy::AllowAll;
    use super::*;
    use crate::disk::Notifier;
    use crate::disk::memory_backend::MemoryBackend;
    use std::os::unix::net::UnixStream;
    use std::thread;
    use std::time::Duration;

    #[test]
    fn a_spurious_wake_up_does_not_shorten_a_throttle_delay() {
        let disk = Disk::new(Box::new(MemoryBackend::new(512)), false);
        let control = Arc::new(SessionControl::new().unwrap());
        let who = (String::new(), 1);
        let mut worker = Worker::new(&disk, &control, &AllowAll, Dialect::Simple, who);
        let stream = Stream::Unix(UnixStream::pair().unwrap().0);
        let delay = Duration::from_millis(50);
        thread::sleep(2 * delay);
        disk.set_write_delay(delay);
        // The late notification of a completion that was handled before.
        control.notify();
        let began = Instant::now();
        assert!(worker.throttle(&stream).unwrap());
        assert!(began.elapsed() >= delay, "{:?}", began.elapsed());
        control.request(StopRequest::Suspend);
        thread::sleep(2 * delay);
        let began = Instant::now();
        assert!(worker.throttle(&stream).unwrap());
        assert!(began.elapsed() < delay, "a stop request ends the delay");
    }

    #[test]
    fn pieces_end_at_block_boundaries_and_are_never_empty() {
        for offset in [0, 1, 4095, 4096, 5000] {
            let long = Range::within(1 << 40, offset, 1 << 30).unwrap();
            let length = piece_length(long);
            assert!(length > 0 && length <= PIECE);
            assert_eq!((offset + length) % BLOCK, 0);
            let short = Range::within(1 << 40, offset, 100).unwrap();
            assert_eq!(piece_length(short), 100);
        }
    }
}
