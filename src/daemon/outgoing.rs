//! Migrations to another host: an operator starts one, and a thread runs it. Reports news to the
//! log, and the outcome to the event loop.

use super::claim;
use super::config::{RecordPolicy, RelayDefault, UNRECORDED_ADVICE};
use super::disk_identity::ServedDiskId;
use super::events::ProcessEvent;
use super::migration_log::MigrationLog;
use super::random;
use super::relaying::{PlannedRelay, RelayedMigration};
use crate::control::command::{ArrivalAction, Mirror};
use crate::control::status::{
    MIGRATION_FAILED, MIGRATION_PASSES, MIGRATION_REASON, MIGRATION_STAGE, MIGRATION_WAITING,
    Migration,
};
use crate::control::{Reply, Status, Summary};
use crate::disk::ownership::{Id, Provenance, RemoteAddress};
use crate::disk::record_store::{RecordStore, RecordStoreError};
use crate::disk::{Disk, PathTarget};
use crate::memory_reserve::check_thread_headroom;
use crate::migration::job::{Job, News, OperatorRequest, Outcome, Progress, Stage, Trouble};
use crate::migration::link::Route;
use crate::migration::source::{
    MigrationHandle, MigrationParams, MigrationStats, Observer, Source, StartFailure,
};
use crate::net::Address;
use crate::net::tls::ClientTls;
use crate::server::ShutdownHandle;
use std::env;
use std::num::NonZeroU64;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;
use std::time::Duration;
use tracing::warn;

/// The environment variable with the timeout of a destination without progress, in seconds.
const TIMEOUT_VARIABLE: &str = "FLEXNBD_MS_REQUEST_LIMIT_SECS";

/// The longest such timeout.
const TIMEOUT_MAX: Duration = Duration::from_secs(365 * 24 * 3600);

/// The resources that all migrations of the process share.
pub(super) struct MigrationContext {
    pub(super) disk: Arc<Disk>,
    pub(super) disk_id: ServedDiskId,
    pub(super) image: PathBuf,
    pub(super) provenance: Provenance,
    /// What becomes of clients unless the operator says otherwise.
    pub(super) relay: RelayDefault,
    pub(super) events: Sender<ProcessEvent>,
}

/// The result of a start, which decides the reply to `mirror`.
enum StartResult {
    /// The destination has accepted the migration.
    Started,
    /// The migration has ended before that.
    Ended(Outcome),
}

/// A migration whose thread runs, and which the destination has not accepted yet.
pub(super) struct StartingMigration(Receiver<StartResult>);

impl StartingMigration {
    /// Waits until the destination has accepted the migration; the error is the reply if it does
    /// not.
    pub(super) fn wait(self) -> Result<(), Reply> {
        match self.0.recv() {
            Ok(StartResult::Started) => Ok(()),
            Ok(StartResult::Ended(Outcome::Failed(trouble))) => Err(failed(&trouble)),
            Ok(StartResult::Ended(_)) | Err(_) => Err(Reply::refused("Mirroring abandoned")),
        }
    }
}

/// Forwards the news of a migration to the log, the event loop and the waiting operator.
struct Reporter {
    log: MigrationLog,
    start_result: Sender<StartResult>,
    shutdown: ShutdownHandle,
    events: Sender<ProcessEvent>,
}

impl Observer for Reporter {
    fn news(&self, id: Id, news: &News) {
        if *news == News::Started {
            let _ = self.start_result.send(StartResult::Started);
        }
        self.log.log_news(id, news);
        let _ = self.events.send(ProcessEvent::MigrationChanged);
    }

    fn retire(&self) {
        self.shutdown.shut_down();
    }
}

/// Checks that the disk, the first `size` bytes of the image, can be moved as `command` says,
/// before anything is sent. Returns a handle on the record, with space for the records of the
/// migration.
pub(super) fn check(
    record_store: &RecordStore,
    size: u64,
    command: &Mirror,
) -> Result<RecordStore, Reply> {
    if command.action == ArrivalAction::Nothing {
        let why = "the action nothing would leave two copies that both are served";
        return Err(Reply::refused(why));
    }
    let refused = |error: RecordStoreError| Reply::refused(error.to_string());
    let record_store = record_store.reopen().map_err(refused)?;
    if command.action == ArrivalAction::Unlink {
        record_store.check_deletable(size).map_err(refused)?;
    }
    let policy = if command.no_record { RecordPolicy::Optional } else { RecordPolicy::Required };
    let record_store = claim::reserve_record(record_store, policy)
        .map_err(|error| Reply::refused(format!("{error}; {UNRECORDED_ADVICE}")))?;
    let image = record_store.path().display();
    // Only the open file is moved, so a path that cannot be checked is no error.
    if let Ok(named) = record_store.path_target()
        && named != PathTarget::Same
    {
        warn!("{image}: {named}; what is moved, and recorded, is the image that is served");
    }
    match record_store.bytes_beyond(size).map_err(refused)? {
        0 => {}
        bytes => warn!("the last {bytes} bytes of {image} do not move: they are not served"),
    }
    Ok(record_store)
}

/// Where a disk moves, and how.
pub(super) struct MigrationDestination<'a> {
    pub(super) command: &'a Mirror,
    /// The TLS of the connection; `None` for none.
    pub(super) tls: Option<ClientTls>,
}

/// A migration that can start. Its handle exists already, so that it can be abandoned before it
/// starts.
pub(super) struct PreparedMigration {
    source: Source,
    pub(super) handle: Arc<MigrationHandle>,
    log: MigrationLog,
    start_result: Sender<StartResult>,
    starting: StartingMigration,
    events: Sender<ProcessEvent>,
}

impl PreparedMigration {
    /// Prepares the migration that `command` asks for; the error is the reply.
    pub(super) fn new(
        context: &MigrationContext,
        record_store: RecordStore,
        shutdown: ShutdownHandle,
        relay: Option<PlannedRelay>,
        destination: &MigrationDestination<'_>,
    ) -> Result<Self, Reply> {
        let command = destination.command;
        let (start_result, receiver) = mpsc::channel();
        let mut job = job(context, command)?;
        job.relay = relay.as_ref().map(PlannedRelay::terms);
        let image = context.image.display().to_string();
        let log = MigrationLog::new(command.to.to_string(), image, context.disk.size());
        let events = context.events.clone();
        let relay = match relay {
            None => None,
            Some(relay) => Some(relay.connector(RelayedMigration {
                image: log.image.clone(),
                to: job.to.clone(),
                read_only: context.disk.read_only(),
                shutdown: shutdown.clone(),
                events: events.clone(),
                client: random::bytes().map_err(|error| Reply::refused(error.to_string()))?,
            })),
        };
        let reporter = Reporter {
            log: log.clone(),
            start_result: start_result.clone(),
            shutdown,
            events: events.clone(),
        };
        let (source, handle) = Source::new(MigrationParams {
            disk: Arc::clone(&context.disk),
            record_store,
            route: Route {
                to: Address::Tcp(command.to),
                bind: command.bind,
                tls: destination.tls.clone(),
            },
            job,
            disk_id: context.disk_id.get(),
            observer: Box::new(reporter),
            relay: relay.map(|connector| Box::new(connector) as _),
        })
        .map_err(cannot_start)?;
        let starting = StartingMigration(receiver);
        Ok(Self { source, handle, log, start_result, starting, events })
    }

    /// Starts the thread that runs the migration.
    pub(super) fn start(self) -> Result<StartingMigration, Reply> {
        let Self { source, handle, log, start_result, starting, events } = self;
        let _ = events.send(ProcessEvent::MigrationStarted(log.clone(), Arc::clone(&handle)));
        let for_thread = events.clone();
        let run = move || {
            let first_id = source.id();
            let outcome = source.run();
            let stats = handle.result().map(|(_, stats)| stats).unwrap_or_default();
            let id = handle.progress().map_or(first_id, |progress| progress.id);
            log.log_end(id, &outcome, &stats);
            // Without a receiver the migration has started, and `mirror` is answered.
            let _ = start_result.send(StartResult::Ended(outcome.clone()));
            let _ = for_thread.send(ProcessEvent::MigrationEnded(outcome));
        };
        let builder = thread::Builder::new().name("mirror".into());
        match check_thread_headroom().and_then(|()| builder.spawn(run)) {
            Ok(_) => Ok(starting),
            Err(error) => {
                let why = format!("cannot start a thread: {error}");
                let outcome = Outcome::Failed(Trouble::Local(why.clone()));
                let _ = events.send(ProcessEvent::MigrationEnded(outcome));
                Err(Reply::refused(why))
            }
        }
    }
}

/// The reply to `break`.
pub(super) fn break_off(running: Option<&MigrationHandle>) -> Reply {
    match running {
        None => Reply::refused("not mirroring"),
        Some(migration) => match migration.request(OperatorRequest::Break) {
            Ok(()) => Reply::success("mirror stopped"),
            Err(_) => Reply::refused("mirror completed"),
        },
    }
}

/// The reply to `mirror_max_bps`.
pub(super) fn set_speed(running: Option<&MigrationHandle>, limit: u64) -> Reply {
    let request = OperatorRequest::Speed(NonZeroU64::new(limit));
    match running.map(|migration| migration.request(request)) {
        Some(Ok(())) => Reply::success("updated"),
        None | Some(Err(_)) => Reply::refused("Not currently mirroring"),
    }
}

/// The reply to `mirror_wait` after a migration has ended.
/// With relay, these clients have stayed.
pub(super) fn end_reply(
    outcome: &Outcome,
    stats: &MigrationStats,
    relayed_clients: Option<u64>,
) -> Reply {
    let &MigrationStats { duration, bytes_sent, passes, pause } = stats;
    match *outcome {
        Outcome::Arrived { acknowledged } => {
            let summary =
                Summary { acknowledged, duration, bytes_sent, passes, pause, relayed_clients };
            Reply::success(summary.to_string())
        }
        Outcome::Broken => {
            Reply::refused("Mirroring abandoned (broken off as ordered; the disk stays here)")
        }
        Outcome::Failed(ref trouble) => failed(trouble),
    }
}

/// Adds a migration, the last one, to the reply to `status`. Returns the name of the image's record
/// if the migration has changed it.
pub(super) fn describe(
    migration: Option<&MigrationHandle>,
    status: &mut Status,
) -> Option<&'static str> {
    let migration = migration?;
    if let Some(outcome) = migration.outcome() {
        if let Outcome::Failed(trouble) = &outcome {
            status.extra.push((MIGRATION_FAILED.to_owned(), trouble.to_string()));
        }
        return matches!(outcome, Outcome::Arrived { .. }).then_some("departed");
    }
    let progress = migration.progress()?;
    status.migration = Some(Migration {
        speed: progress.bytes_per_second,
        duration: migration.duration().as_secs(),
        seconds_left: progress.seconds_left.unwrap_or(0),
        bytes_left: progress.bytes_left,
        speed_limit: progress.speed_limit.map(NonZeroU64::get),
    });
    status.extra.push((MIGRATION_STAGE.to_owned(), stage(&progress).to_owned()));
    status.extra.push((MIGRATION_PASSES.to_owned(), progress.passes.to_string()));
    match progress.stage {
        Stage::HandingOver | Stage::InDoubt => Some("departing"),
        Stage::Leaving => Some("departed"),
        _ => None,
    }
}

/// Whether the disk has stayed here, and its record could not be restored so far.
pub(super) fn record_unrestored(migration: Option<&MigrationHandle>) -> bool {
    let progress = migration.and_then(MigrationHandle::progress);
    progress.is_some_and(|progress| progress.record_unrestored)
}

/// Adds to the reply to `status` why a running migration waits.
pub(super) fn describe_obstacle(running: Option<&MigrationHandle>, status: &mut Status) {
    let progress = running.and_then(MigrationHandle::progress);
    if let Some(obstacle) = progress.and_then(|progress| progress.obstacle) {
        status.extra.push((MIGRATION_WAITING.to_owned(), obstacle.word().to_owned()));
        status.extra.push((MIGRATION_REASON.to_owned(), obstacle.to_string()));
    }
}

fn stage(progress: &Progress) -> &'static str {
    match progress.stage {
        Stage::Connecting => "connecting",
        Stage::Copying => "copying",
        Stage::Closing => "closing",
        Stage::HandingOver => "parting",
        Stage::InDoubt => "in-doubt",
        Stage::Leaving => "leaving",
        Stage::Ended => "ended",
    }
}

fn job(context: &MigrationContext, command: &Mirror) -> Result<Job, Reply> {
    let id = random::bytes().map(Id).map_err(|error| Reply::refused(error.to_string()))?;
    let to = RemoteAddress::new(&command.to.to_string())
        .ok_or_else(|| Reply::refused("the destination's address is too long"))?;
    let mut job = Job::new(id, context.disk.size(), to, context.provenance);
    // The unspecified address chooses none.
    job.from = command.bind.filter(|ip| !ip.is_unspecified());
    job.unlink = command.action == ArrivalAction::Unlink;
    job.speed = command.max_bps.and_then(NonZeroU64::new);
    job.timeout = timeout(env::var(TIMEOUT_VARIABLE).ok().as_deref()).unwrap_or(job.timeout);
    Ok(job)
}

/// The value of [`TIMEOUT_VARIABLE`], if it is a number of seconds; at most [`TIMEOUT_MAX`], so
/// that a deadline can be represented.
fn timeout(variable: Option<&str>) -> Option<Duration> {
    let seconds = variable.and_then(|seconds| seconds.parse().ok());
    seconds.filter(|seconds| *seconds > 0).map(|s| Duration::from_secs(s).min(TIMEOUT_MAX))
}

fn cannot_start(why: StartFailure) -> Reply {
    Reply::refused(match why {
        StartFailure::TooSmall(_) => {
            "the disk is smaller than 4096 bytes, which cannot be mirrored".to_owned()
        }
        StartFailure::System(error) => format!("cannot start a migration: {error}"),
    })
}

/// The reply about a migration that failed: first the words of the original flexnbd, then the
/// cause.
fn failed(trouble: &Trouble) -> Reply {
    let words = match trouble {
        Trouble::Connect(_) => "Mirror failed to connect",
        Trouble::NoGreeting(_) => "Remote server failed to respond",
        Trouble::Size { .. } => "Remote size does not match local size",
        Trouble::Record(_) => "Mirroring abandoned",
        _ => "Mirror was rejected",
    };
    Reply::refused(format!("{words} ({trouble})"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::memory_backend::MemoryBackend;
    use crate::disk::ownership::Record;
    use crate::migration::job::RecordKind;

    #[test]
    fn departing_record_keeps_the_bind_address() {
        let context = MigrationContext {
            disk: Arc::new(Disk::new(Box::new(MemoryBackend::new(1 << 20)), false)),
            disk_id: ServedDiskId::default(),
            image: PathBuf::new(),
            provenance: Provenance::Native,
            relay: RelayDefault::No,
            events: mpsc::channel().0,
        };
        let recorded = |bind: Option<&str>| {
            let bind = bind.map(|ip| ip.parse().unwrap());
            let command = Mirror { bind, ..Mirror::plain("192.0.2.1:7") };
            let Ok(job) = job(&context, &command) else { panic!("no job") };
            match job.record(RecordKind::Departing, 0) {
                Some(Record::Departing { from, .. }) => from.map(|ip| ip.to_string()),
                record => panic!("{record:?}"),
            }
        };
        assert_eq!(recorded(Some("192.0.2.9")).as_deref(), Some("192.0.2.9"));
        assert_eq!(recorded(Some("::")), None, "the unspecified address chooses none");
        assert_eq!(recorded(None), None);
    }

    #[test]
    fn timeout_variable_is_validated_and_capped() {
        assert_eq!(timeout(Some("7")), Some(Duration::from_secs(7)));
        let most = TIMEOUT_MAX.as_secs();
        assert_eq!(timeout(Some(&most.to_string())), Some(TIMEOUT_MAX));
        assert_eq!(timeout(Some(&(most + 1).to_string())), Some(TIMEOUT_MAX));
        assert_eq!(timeout(Some(&u64::MAX.to_string())), Some(TIMEOUT_MAX));
        for nothing in [None, Some("0"), Some("soon"), Some("-1")] {
            assert_eq!(timeout(nothing), None);
        }
    }
}
