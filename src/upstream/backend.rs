//! The disk's view of an upstream, and its first connection.

use super::attempts::{Attempts, AttemptsEvent};
use super::connecting::{Connected, connect_to};
use super::link::{UpstreamHandle, UpstreamLink};
use super::options::{UpstreamError, UpstreamEvents, UpstreamOptions, UpstreamTarget};
use super::queue::UpstreamQueue;
use super::rotation::SILENCE_MAX;
use crate::disk::{Backend, Buffer, Extent, Features, Identity, IoQueue, Op};
use crate::ids::DiskId;
use crate::nbd::wire::TransmissionFlags;
use crate::range::Range;
use std::collections::VecDeque;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Instant;

/// A disk that another server exports. Dropping it disconnects.
#[derive(Debug)]
pub struct UpstreamBackend(Arc<UpstreamLink>);

/// Connects to the first target that gives us the disk, and keeps connected from then on: to any of them,
/// as long as it has the same disk.
///
/// # Errors
/// [`UpstreamError`] if no target has the disk.
pub fn connect(
    targets: Vec<UpstreamTarget>,
    options: UpstreamOptions,
    events: Arc<dyn UpstreamEvents>,
) -> Result<(UpstreamBackend, UpstreamHandle), UpstreamError> {
    let first = connect_once(&targets, &options).map_err(UpstreamError::Targets)?;
    let start = UpstreamLink::start(targets, options, events, first);
    let link = start.map_err(|error| UpstreamError::System("start a thread", error))?;
    Ok((UpstreamBackend(Arc::clone(&link)), UpstreamHandle(link)))
}

/// Connects to the first of the targets that gives us the disk, and returns its number. The error is why each
/// does not.
fn connect_once(
    targets: &[UpstreamTarget],
    options: &UpstreamOptions,
) -> Result<(usize, Connected), Vec<(String, String)>> {
    let attempts = Attempts::default();
    let mut failures = vec![None; targets.len()];
    let mut next = 0;
    while failures.contains(&None) {
        if let Some(target) = targets.get(next) {
            let (target, options) = (target.clone(), options.clone());
            attempts.start(next, move || connect_to(&target, &options, (0, None)));
            next += 1;
        }
        let silent_at = (next < targets.len()).then(|| Instant::now() + SILENCE_MAX);
        match attempts.wait(silent_at) {
            AttemptsEvent::Ended(number, Ok(connected)) => return Ok((number, connected)),
            AttemptsEvent::Ended(number, Err(error)) => failures[number] = Some(error.to_string()),
            AttemptsEvent::Deadline | AttemptsEvent::Cancelled => {}
        }
    }
    let reasons = targets.iter().zip(failures.into_iter().flatten());
    Err(reasons.map(|(target, why)| (target.to_string(), why)).collect())
}

impl UpstreamBackend {
    /// Executes an operation, and blocks until it has completed: for as long as the server is lost.
    fn run(&self, op: Op) -> io::Result<Op> {
        let (id, _) = self.0.open_queue(None);
        self.0.submit(id, std::iter::once((0.into(), op)));
        self.0.wait_for_completions(id, false);
        let mut completions = VecDeque::new();
        self.0.take_completions(id, &mut completions);
        self.0.close_queue(id);
        match completions.pop_front() {
            Some(completion) => match completion.outcome {
                Some(outcome) => outcome.map(|()| completion.op),
                None => Err(io::ErrorKind::Unsupported.into()),
            },
            None => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    fn has(&self, flags: TransmissionFlags) -> bool {
        self.0.terms().has(flags)
    }
}

impl Backend for UpstreamBackend {
    fn size(&self) -> u64 {
        self.0.terms().size
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let data = Buffer::to_fill(into.len(), 1)?;
        match self.run(Op::Read { offset, data })? {
            Op::Read { data, .. } => into.copy_from_slice(&data),
            _ => return Err(io::ErrorKind::Unsupported.into()),
        }
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8], durable: bool) -> io::Result<()> {
        let data = Buffer::copy_of(data, 1)?;
        let has_fua = self.has(TransmissionFlags::SEND_FUA);
        self.run(Op::Write { offset, data, durable: durable && has_fua })?;
        if durable && !has_fua { self.flush() } else { Ok(()) }
    }

    fn execute(&self, op: &Op) -> io::Result<()> {
        let op = match *op {
            Op::Zero { range, how, .. } => Op::Zero { range, how, durable: false },
            Op::Trim { range, .. } => Op::Trim { range, durable: false },
            Op::Cache(range) => Op::Cache(range),
            _ => return Err(io::ErrorKind::Unsupported.into()),
        };
        self.run(op).map(drop)
    }

    fn flush(&self) -> io::Result<()> {
        self.run(Op::Flush).map(drop)
    }

    /// Everything is allocated: whether it is, [`Op::Extents`] asks the server.
    fn extent(&self, offset: u64) -> io::Result<Extent> {
        Ok(Extent { range: Range::whole(self.size()).from(offset), allocated: true })
    }

    fn features(&self) -> Features {
        self.0.terms().features()
    }

    /// The two halves of the disk's id.
    fn identity(&self) -> Option<Identity> {
        let DiskId(id) = self.0.disk_id()?;
        let (device, file) = id.split_at(8);
        let number = |half: &[u8]| half.try_into().map(u64::from_be_bytes);
        Some((number(device).ok()?, number(file).ok()?))
    }

    fn is_remote(&self) -> bool {
        true
    }

    fn extents_wait(&self) -> bool {
        true
    }

    fn queue(&self, notifier: BorrowedFd<'_>) -> Option<Box<dyn IoQueue + '_>> {
        let notifier = notifier.try_clone_to_owned().ok()?;
        Some(Box::new(UpstreamQueue::new(&self.0, notifier)))
    }

    /// The server may execute overlapping requests in any order.
    fn orders_writes(&self) -> bool {
        false
    }
}

impl Drop for UpstreamBackend {
    fn drop(&mut self) {
        UpstreamHandle(Arc::clone(&self.0)).close();
    }
}
