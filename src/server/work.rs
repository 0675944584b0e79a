//! Carrying out requests on the disk and putting their replies into the outbox; reads have a file
//! of their own, since they take several steps.
//! Never waits for the client: the gate is held over disk work only. Waits for the disk only where
//! that is the only way; else what takes long is an errand, and is answered when it is over.

use super::control::{SessionControl, StopRequest};
use super::end::SessionEnd;
use super::inline_reads::InlineReads;
use super::outbox::Outbox;
use super::policy::{ExportPolicy, SessionId};
use super::reads::Read;
use crate::disk::inflight::{InFlight, Work};
use crate::disk::{Disk, Extent, Notifier, Visit, Zeroing, errno_of};
use crate::message_id;
use crate::nbd::handshake::ALLOCATION_CONTEXT_ID;
use crate::nbd::reply::{Dialect, ReplyTo, StatusExtent};
use crate::nbd::request::Request;
use crate::nbd::wire::{Allocation, ErrorCode};
use crate::net::{Interest, Stream};
use crate::range::Range;
use crate::server::throttle::Throttle;
use std::io;
use std::sync::Arc;
use std::time::Instant;
use tracing::warn;

/// How many bytes are read from, or written to, the disk at once.
pub(super) const PIECE: u64 = 256 << 10;
/// Most extents in one reply; the client asks again for the rest. The specification's limit is
/// 2^20, which would take 16 MiB.
pub(super) const EXTENTS_MAX: usize = 16 << 10;
/// Pieces end at multiples of this, so that the disk sees whole blocks.
const BLOCK: u64 = 4096;
/// How many failed requests of one session are logged.
const COMPLAINTS_MAX: u32 = 10;

/// What a session needs to work for its client.
#[derive(Debug)]
pub(super) struct Worker<'a> {
    pub(super) disk: &'a Disk,
    pub(super) control: &'a Arc<SessionControl>,
    pub(super) policy: &'a dyn ExportPolicy,
    pub(super) dialect: Dialect,
    /// What is under way on the disk.
    pub(super) in_flight: InFlight<'a, Tag>,
    pub(super) inline_reads: InlineReads,
    /// Bytes that are being loaded.
    loading: u64,
    /// For the log.
    pub(super) client: String,
    pub(super) session: u64,
    complaints: u32,
    /// How long its writes have been held back.
    held: Throttle,
    began: Instant,
    /// Part of the disk that was seen to be allocated. It may have become a hole since; then zeros
    /// are sent as data, which costs time but is true.
    pub(super) allocated: Range,
}

/// What waits for an errand.
#[derive(Debug)]
pub(super) enum Tag {
    /// To be answered with its outcome.
    Answer { to: ReplyTo, request: Request },
    /// To be gone on with: what it needs is in memory.
    Read(Read, Populate),
}

/// What is being loaded for a read.
#[derive(Clone, Copy, Debug)]
pub(super) struct Populate {
    length: u64,
    /// What was being loaded for this session when it was begun, this included.
    under_way: u64,
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
            loading: 0,
            client,
            session,
            complaints: 0,
            held: Throttle::default(),
            began: Instant::now(),
            allocated,
        }
    }

    /// Permission to touch the disk. None while the gate is closed: the session then waits in its one
    /// place for that, too, and is woken when the gate opens. A session that is to finish, and of
    /// which nothing is in flight, ends there.
    pub(super) fn visit(&self) -> Result<Option<Visit<'a>>, SessionEnd> {
        match self.disk.enter_if_open() {
            Ok(Some(visit)) => Ok(Some(visit)),
            Ok(None) => match self.control.current() {
                StopRequest::Serve | StopRequest::Suspend => Ok(self.wait_for_the_gate()),
                _ if !self.in_flight.is_empty() => Ok(self.wait_for_the_gate()),
                order => Err(SessionEnd::Requested(order)),
            },
            Err(_) => Err(SessionEnd::DiskGone),
        }
    }

    fn wait_for_the_gate(&self) -> Option<Visit<'a>> {
        self.in_flight.notify_when_gate_opens();
        None
    }

    /// Ends the session if the disk is gone: what waits to be begun never will be.
    pub(super) fn check_disk(&self) -> Result<(), SessionEnd> {
        match self.in_flight.has_waiting().then(|| self.disk.enter_if_open()) {
            Some(Err(_)) => Err(SessionEnd::DiskGone),
            _ => Ok(()),
        }
    }

    /// Makes a write wait, if a migration wants writers held back so that it can catch up. False if
    /// errands have to end before: nobody is to wait for them longer than they take.
    pub(super) fn hold_back(&mut self, stream: &Stream) -> Result<bool, SessionEnd> {
        let wanted = self.disk.write_delay();
        if wanted.is_zero() {
            return Ok(true);
        }
        if !self.in_flight.is_quiescent() {
            return Ok(false);
        }
        let delay = self.held.delay(self.began.elapsed(), wanted);
        let deadline = Some(Instant::now() + delay);
        let wake = &self.control.wake;
        loop {
            let waited = stream.wait(Interest::default(), Some(wake), deadline);
            if !waited.map_err(SessionEnd::Connection)?.woken {
                return Ok(true);
            }
            // An order ends the waiting, and is obeyed at the next turn; that an errand was over,
            // which may be rung for after it has been heard of, does not.
            wake.clear();
            if self.control.current() != StopRequest::Serve {
                return Ok(true);
            }
        }
    }

    /// Answers everything but reads and writes, which take several steps, or begins to. False if
    /// that has to wait for errands.
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
            // These have steps of their own, or no answer.
            Request::Read { .. }
            | Request::Write { .. }
            | Request::Private { .. }
            | Request::Disconnect => return Ok(true),
        };
        self.send_out(to, request, work)
    }

    /// Begins an errand whose outcome is the answer; false if that has to wait for others.
    pub(super) fn send_out(
        &mut self,
        to: ReplyTo,
        request: Request,
        work: Work,
    ) -> Result<bool, SessionEnd> {
        let Some(visit) = self.visit()? else { return Ok(false) };
        self.in_flight.begin(visit, work, Tag::Answer { to, request });
        Ok(true)
    }

    /// Begins to load what a read needs. Its turn comes again when that is over.
    pub(super) fn load(&mut self, visit: Visit<'a>, range: Range, read: Read) {
        self.loading += range.length();
        let (length, under_way) = (range.length(), self.loading);
        let load = Populate { length, under_way, since: Instant::now() };
        self.in_flight.begin(visit, Work::Populate(range), Tag::Read(read, load));
    }

    /// A load is over.
    pub(super) fn loaded(&mut self, load: &Populate) {
        self.loading -= load.length;
        self.inline_reads.loaded(load.under_way, load.since.elapsed());
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
            Ok(extents) if !extents.is_empty() => self.report(to, &extents, out),
            outcome => {
                let request = Request::BlockStatus { range, one };
                self.conclude(to, outcome.map(drop), request, out);
            }
        }
        Ok(true)
    }

    /// Success or failure of a request, as its reply.
    pub(super) fn conclude(
        &mut self,
        to: ReplyTo,
        outcome: io::Result<()>,
        request: Request,
        out: &mut Outbox,
    ) {
        match outcome {
            Ok(()) => out.reply(|out| self.dialect.success(to, out)),
            Err(error) => {
                let concerns = request.writes() || request == Request::Flush;
                if concerns && !is_not_fast(request, &error) {
                    self.policy.on_write_failure(self.session, &error);
                }
                let is_lost = request == Request::Flush && !self.disk.all_flushes_succeeded();
                let kind =
                    if is_lost { message_id::FLUSH_FAILED } else { message_id::REQUEST_FAILED };
                let code = self.complain(kind, &request, &error);
                out.reply(|out| self.dialect.failure(to, code, None, "", out));
            }
        }
    }

    /// A request that cannot be carried out as it stands.
    pub(super) fn refuse(&mut self, to: ReplyTo, code: ErrorCode, why: &str, out: &mut Outbox) {
        self.log(None, format_args!("refused a request: {why}; answered {code}"));
        out.reply(|out| self.dialect.failure(to, code, None, why, out));
    }

    fn report(&self, to: ReplyTo, extents: &[Extent], out: &mut Outbox) {
        let hole = (Allocation::HOLE | Allocation::ZERO).bits();
        let told: Vec<StatusExtent> = extents
            .iter()
            .map(|extent| (extent.range.length(), if extent.allocated { 0 } else { hole }))
            .collect();
        out.reply(|out| self.dialect.status(to, ALLOCATION_CONTEXT_ID, &told, out));
    }

    /// Something of this kind has failed.
    pub(super) fn complain(
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

    /// Logs a failed request, unless this client has had enough of them logged.
    fn log(&mut self, failure: Option<(&str, Option<i32>)>, what: std::fmt::Arguments<'_>) {
        let (kind, errno) = failure.unzip();
        let errno = errno.flatten();
        self.complaints = self.complaints.saturating_add(1);
        let (client, session) = (self.client.as_str(), self.session);
        if self.complaints <= COMPLAINTS_MAX {
            warn!(
                message_id = kind,
                "flexnbd.client" = client,
                "flexnbd.session" = session,
                errno,
                "{client}: {what}"
            );
        }
        if self.complaints == COMPLAINTS_MAX {
            warn!(
                "flexnbd.client" = client,
                "flexnbd.session" = session,
                "{client}: further failed requests are not logged"
            );
        }
    }
}

/// Whether a request was not carried out only because it cannot be done as fast as it must.
fn is_not_fast(request: Request, error: &io::Error) -> bool {
    let code = ErrorCode::from_errno(errno_of(error));
    matches!(request, Request::WriteZeroes { fast: true, .. }) && code == ErrorCode::NotSupported
}

/// How much of `range` to do at once: a piece, ending between two blocks unless it is the last.
pub(super) fn piece_length(range: Range) -> u64 {
    if range.length() <= PIECE {
        return range.length();
    }
    PIECE - (range.offset() % BLOCK)
}

#[cfg(test)]
mod tests {
    use super::super::policy::AllowAll;
    use super::*;
    use crate::disk::Notifier;
    use crate::disk::memory::MemoryBackend;
    use std::os::unix::net::UnixStream;
    use std::thread;
    use std::time::Duration;

    #[test]
    fn a_write_is_held_back_whatever_has_been_heard_from_the_disk_just_before() {
        let disk = Disk::new(Box::new(MemoryBackend::new(512)), false);
        let control = Arc::new(SessionControl::new().unwrap());
        let who = (String::new(), 1);
        let mut worker = Worker::new(&disk, &control, &AllowAll, Dialect::Simple, who);
        let stream = Stream::Unix(UnixStream::pair().unwrap().0);
        let hold = Duration::from_millis(50);
        thread::sleep(2 * hold);
        disk.set_write_delay(hold);
        // An errand whose end was seen before anybody listened for it.
        control.notify();
        let began = Instant::now();
        assert!(worker.hold_back(&stream).unwrap());
        assert!(began.elapsed() >= hold, "{:?}", began.elapsed());
        control.request(StopRequest::Suspend);
        thread::sleep(2 * hold);
        let began = Instant::now();
        assert!(worker.hold_back(&stream).unwrap());
        assert!(began.elapsed() < hold, "an order ends the waiting");
    }

    #[test]
    fn pieces_end_between_blocks_and_are_never_empty() {
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
