//! Migrations away from here: begun by an operator, carried out on a thread of their own.
//! Tells the log what happens and the daemon how it ended.

use super::config::{RecordPolicy, UNRECORDED_ADVICE};
use super::migration_log::{MigrationLog, Reporter, StartResult};
use super::{ProcessEvent, claim};
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
use crate::migration::job::{Job, OperatorRequest, Outcome, Progress, Stage, Trouble};
use crate::migration::link::Route;
use crate::migration::source::{
    MigrationHandle, MigrationParams, MigrationStats, Source, StartFailure,
};
use crate::net::Address;
use crate::server::ShutdownHandle;
use std::env;
use std::num::NonZeroU64;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;
use std::time::Duration;
use tracing::warn;

/// How long a destination may make no progress, in seconds, unless this variable says otherwise.
const PATIENCE_VARIABLE: &str = "FLEXNBD_MS_REQUEST_LIMIT_SECS";

/// Longest such time.
const PATIENCE_MAX: Duration = Duration::from_secs(365 * 24 * 3600);

/// What a migration needs of the process it runs in.
pub(super) struct MigrationContext {
    pub(super) disk: Arc<Disk>,
    pub(super) image: PathBuf,
    pub(super) title: Provenance,
    pub(super) events: Sender<ProcessEvent>,
}

/// A migration that has begun, and of which nobody knows yet whether it can succeed.
pub(super) struct StartingMigration(Receiver<StartResult>);

impl StartingMigration {
    /// Waits until the destination has greeted us, or did not; what to answer the operator then is
    /// the error.
    pub(super) fn wait(self) -> Result<(), Reply> {
        match self.0.recv() {
            Ok(StartResult::Started) => Ok(()),
            Ok(StartResult::Ended(Outcome::Failed(trouble))) => Err(refused(&trouble)),
            Ok(StartResult::Ended(_)) | Err(_) => Err(Reply::refused("Mirroring abandoned")),
        }
    }
}

/// The ledger for a migration of the disk, which is the first `size` bytes of the image: with room
/// for its record, and an image that can be deleted if that is ordered. All of that is found out
/// before anything is moved.
pub(super) fn ready(ledger: &RecordStore, size: u64, order: &Mirror) -> Result<RecordStore, Reply> {
    if order.action == ArrivalAction::Nothing {
        let why = "the action nothing would leave two copies that both are served";
        return Err(Reply::refused(why));
    }
    let refused = |error: RecordStoreError| Reply::refused(error.to_string());
    let ledger = ledger.reopen().map_err(refused)?;
    if order.action == ArrivalAction::Unlink {
        ledger.check_deletable(size).map_err(refused)?;
    }
    let records = if order.no_record { RecordPolicy::Optional } else { RecordPolicy::Required };
    let ledger = claim::with_room(ledger, records)
        .map_err(|error| Reply::refused(format!("{error}; {UNRECORDED_ADVICE}")))?;
    let image = ledger.path().display();
    // The path is of no further use here, so that one that cannot be looked at does no harm.
    if let Ok(named) = ledger.path_target()
        && named != PathTarget::Same
    {
        warn!("{image}: {named}; what is moved, and recorded, is the image that is served");
    }
    match ledger.bytes_beyond(size).map_err(refused)? {
        0 => {}
        bytes => warn!("the last {bytes} bytes of {image} do not move: they are not served"),
    }
    Ok(ledger)
}

/// A migration that has not begun.
pub(super) struct PreparedMigration {
    source: Source,
    desk: Arc<MigrationHandle>,
    passage: MigrationLog,
    first: Sender<StartResult>,
    heard: Receiver<StartResult>,
    events: Sender<ProcessEvent>,
}

/// Prepares a migration, and the desk at which it is to be reached.
pub(super) fn prepare(
    ground: &MigrationContext,
    ledger: RecordStore,
    exit: ShutdownHandle,
    order: &Mirror,
) -> Result<(PreparedMigration, Arc<MigrationHandle>), Reply> {
    let (first, heard) = mpsc::channel();
    let job = job(ground, order)?;
    let passage = MigrationLog {
        to: order.to.to_string(),
        image: ground.image.display().to_string(),
        size: ground.disk.size(),
    };
    let witness = Box::new(Reporter {
        passage: passage.clone(),
        first: first.clone(),
        exit,
        events: ground.events.clone(),
    });
    let (source, desk) = Source::new(MigrationParams {
        disk: Arc::clone(&ground.disk),
        record_store: ledger,
        route: Route { to: Address::Tcp(order.to), bind: order.bind },
        job,
        observer: witness,
    })
    .map_err(cannot_start)?;
    let (events, at) = (ground.events.clone(), Arc::clone(&desk));
    Ok((PreparedMigration { source, desk, passage, first, heard, events }, at))
}

impl PreparedMigration {
    /// Begins, on a thread of its own.
    pub(super) fn start(self) -> Result<StartingMigration, Reply> {
        let Self { source, desk, passage, first, heard, events } = self;
        // The process is ending already if nobody hears it.
        let _ = events.send(ProcessEvent::Migrating(passage.clone(), Arc::clone(&desk)));
        let for_thread = events.clone();
        let run = move || {
            let begun = source.id();
            let outcome = source.run();
            let tally = desk.result().map(|(_, tally)| tally).unwrap_or_default();
            let id = desk.progress().map_or(begun, |progress| progress.id);
            passage.log_end(id, &outcome, &tally);
            // Nobody waits for it any more if it has started.
            let _ = first.send(StartResult::Ended(outcome.clone()));
            let _ = for_thread.send(ProcessEvent::Migrated(outcome));
        };
        let builder = thread::Builder::new().name("mirror".into());
        let thread = check_thread_headroom().and_then(|()| builder.spawn(run));
        match thread {
            Ok(_) => Ok(StartingMigration(heard)),
            Err(error) => {
                let why = format!("cannot start a thread: {error}");
                let outcome = Outcome::Failed(Trouble::Local(why.clone()));
                let _ = events.send(ProcessEvent::Migrated(outcome));
                Err(Reply::refused(why))
            }
        }
    }
}

/// `break`.
pub(super) fn break_off(desk: Option<&Arc<MigrationHandle>>) -> Reply {
    match desk.filter(|desk| desk.outcome().is_none()) {
        None => Reply::refused("not mirroring"),
        Some(desk) => match desk.request(OperatorRequest::Break) {
            Ok(()) => Reply::success("mirror stopped"),
            Err(_) => Reply::refused("mirror completed"),
        },
    }
}

/// `mirror_max_bps`.
pub(super) fn set_speed(desk: Option<&Arc<MigrationHandle>>, limit: u64) -> Reply {
    match desk.filter(|desk| desk.outcome().is_none()) {
        None => Reply::refused("Not currently mirroring"),
        Some(desk) => match desk.request(OperatorRequest::Speed(NonZeroU64::new(limit))) {
            Ok(()) => Reply::success("updated"),
            Err(_) => Reply::refused("Not currently mirroring"),
        },
    }
}

/// What `mirror_wait` answers at the end.
pub(super) fn account(outcome: &Outcome, tally: &MigrationStats) -> Reply {
    let &MigrationStats { duration, bytes_sent, passes, pause } = tally;
    match *outcome {
        Outcome::Arrived { acknowledged } => {
            let summary = Summary { acknowledged, duration, bytes_sent, passes, pause };
            Reply::success(summary.to_string())
        }
        Outcome::Broken => {
            Reply::refused("Mirroring abandoned (broken off as ordered; the disk stays here)")
        }
        Outcome::Failed(ref trouble) => refused(trouble),
    }
}

/// What `status` tells of a migration under way. Returns the name of the image's record when the
/// migration has changed it.
pub(super) fn describe(
    desk: Option<&Arc<MigrationHandle>>,
    status: &mut Status,
) -> Option<&'static str> {
    let desk = desk?;
    if let Some(outcome) = desk.outcome() {
        if let Outcome::Failed(trouble) = &outcome {
            status.extra.push((MIGRATION_FAILED.to_owned(), trouble.to_string()));
        }
        return matches!(outcome, Outcome::Arrived { .. }).then_some("departed");
    }
    let progress = desk.progress()?;
    status.migration = Some(Migration {
        speed: progress.bytes_per_second,
        duration: desk.duration().as_secs(),
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

/// Whether a migration that left the disk here could not put its record back until now.
pub(super) fn owes_record(desk: Option<&Arc<MigrationHandle>>) -> bool {
    desk.and_then(|desk| desk.progress()).is_some_and(|progress| progress.owes_record)
}

/// What `status` tells of why it does not go on.
pub(super) fn describe_obstacle(desk: Option<&Arc<MigrationHandle>>, status: &mut Status) {
    let running = desk.filter(|desk| desk.outcome().is_none());
    let progress = running.and_then(|desk| desk.progress());
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

fn job(ground: &MigrationContext, order: &Mirror) -> Result<Job, Reply> {
    let id = random().map(Id).map_err(|error| Reply::refused(error.to_string()))?;
    let to = RemoteAddress::new(&order.to.to_string())
        .ok_or_else(|| Reply::refused("the destination's address is too long"))?;
    let mut job = Job::new(id, ground.disk.size(), to, ground.title);
    // An address that stands for any is no choice.
    job.from = order.bind.filter(|ip| !ip.is_unspecified());
    job.unlink = order.action == ArrivalAction::Unlink;
    job.speed = order.max_bps.and_then(NonZeroU64::new);
    job.timeout = patience(env::var(PATIENCE_VARIABLE).ok().as_deref()).unwrap_or(job.timeout);
    Ok(job)
}

/// What the variable says, in seconds, if that is a number; never so long that the end of the
/// waiting could not be told.
fn patience(variable: Option<&str>) -> Option<Duration> {
    let seconds = variable.and_then(|seconds| seconds.parse().ok());
    seconds.filter(|seconds| *seconds > 0).map(|s| Duration::from_secs(s).min(PATIENCE_MAX))
}

/// Random bytes.
pub(super) fn random<const N: usize>() -> Result<[u8; N], getrandom::Error> {
    let mut bits = [0; N];
    getrandom::fill(&mut bits)?;
    Ok(bits)
}

fn cannot_start(why: StartFailure) -> Reply {
    Reply::refused(match why {
        StartFailure::TooSmall(_) => {
            "the disk is smaller than 4096 bytes, which cannot be mirrored".to_owned()
        }
        StartFailure::System(error) => format!("cannot start a migration: {error}"),
    })
}

/// The original's words first, then what exactly happened.
fn refused(trouble: &Trouble) -> Reply {
    let words = match trouble {
        Trouble::Connect(_) => "Mirror failed to connect",
        Trouble::Silent(_) => "Remote server failed to respond",
        Trouble::Size { .. } => "Remote size does not match local size",
        Trouble::Record(_) => "Mirroring abandoned",
        _ => "Mirror was rejected",
    };
    Reply::refused(format!("{words} ({trouble})"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::memory::MemoryBackend;
    use crate::disk::ownership::Record;
    use crate::migration::job::RecordKind;

    #[test]
    fn the_departing_record_keeps_the_address_bound_to() {
        let ground = MigrationContext {
            disk: Arc::new(Disk::new(Box::new(MemoryBackend::new(1 << 20)), false)),
            image: PathBuf::new(),
            title: Provenance::Native,
            events: mpsc::channel().0,
        };
        let recorded = |bind: Option<&str>| {
            let bind = bind.map(|ip| ip.parse().unwrap());
            let to = "192.0.2.1:7".parse().unwrap();
            let order =
                Mirror { to, action: ArrivalAction::Exit, bind, max_bps: None, no_record: false };
            let Ok(job) = job(&ground, &order) else { panic!("no job") };
            match job.record(RecordKind::Departing, 0) {
                Some(Record::Departing { from, .. }) => from.map(|ip| ip.to_string()),
                record => panic!("{record:?}"),
            }
        };
        assert_eq!(recorded(Some("192.0.2.9")).as_deref(), Some("192.0.2.9"));
        assert_eq!(recorded(Some("::")), None, "any address is no choice");
        assert_eq!(recorded(None), None);
    }

    #[test]
    fn patience_is_what_the_variable_says_up_to_the_longest() {
        assert_eq!(patience(Some("7")), Some(Duration::from_secs(7)));
        let most = PATIENCE_MAX.as_secs();
        assert_eq!(patience(Some(&most.to_string())), Some(PATIENCE_MAX));
        assert_eq!(patience(Some(&(most + 1).to_string())), Some(PATIENCE_MAX));
        assert_eq!(patience(Some(&u64::MAX.to_string())), Some(PATIENCE_MAX));
        for nothing in [None, Some("0"), Some("soon"), Some("-1")] {
            assert_eq!(patience(nothing), None);
        }
    }
}
