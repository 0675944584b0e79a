//! Claims the disk at start-up: opens or creates the image, reads its ownership record, asks
//! another host if only that host knows the owner, and updates the record. Start-up decides
//! everything about ownership here, once. Never serves the disk.

use super::config::{ImageConfig, ReceivingConfig, RecordPolicy};
use super::confinement::Confinement;
use super::handover_query::{HandoverQuery, QueryError, StartupQuery};
use super::start_error::{OwnershipDenial, StartError};
use crate::disk::ownership::{
    ForListen, ForServe, Id, OwnershipRefusal, Provenance, Record, RemoteAddress, for_listen,
    for_serve,
};
use crate::disk::record_store::{RecordStore, RecordStoreError, read_tombstone};
use crate::disk::state_directory::STATE_VARIABLE;
use crate::disk::{Access, Backend, DirectBackend, Disk, FileBackend};
use crate::human::{counted, utc};
use crate::message_id;
use crate::migration::job::HandoverVerdict;
use crate::migration::wire::Question;
use std::env;
use std::fs;
use std::sync::Arc;
use std::time::SystemTime;
use tracing::{info, warn};

/// A disk, and the use of it that its ownership permits to this process.
pub(super) struct Claim {
    pub(super) disk: Arc<Disk>,
    pub(super) record_store: RecordStore,
    pub(super) ownership: Ownership,
}

/// The owner of the disk, according to the record and the role of the process.
pub(super) enum Ownership {
    /// Ours: serve it.
    Ours {
        provenance: Provenance,
        /// Time of a failed flush of an earlier process, in seconds since 1970.
        flush_failed_at: Option<u64>,
    },
    /// Another host's: receive it.
    Incoming {
        /// The migration whose incomplete copy is in the image, if there is a copy; its id is
        /// `None` if its sender was not a flexnbd.
        copy: Option<Option<Id>>,
        /// A second handle on the record, for `status`: the receiving side takes the first.
        status_store: RecordStore,
    },
    /// Ours since an earlier process received it: there is nothing to receive.
    AlreadyArrived,
}

impl Claim {
    /// Opens the image and claims it, to serve it or to receive into it. The record may forbid that.
    /// Confines the process as soon as the image is open.
    pub(super) fn acquire(
        config: &ImageConfig,
        query: &StartupQuery<'_>,
        confinement: &Confinement,
    ) -> Result<Self, StartError> {
        check_may_create(config)?;
        let image = open_image(config)?;
        if image.is_new() {
            confinement.give(&config.path)?;
        }
        confinement.switch_user()?;
        let record_store = open_record_store(config, &image)?;
        confinement.enter_with_image(config, &record_store);
        let is_new = image.is_new();
        let disk = Arc::new(Disk::new(backend_of(image, config)?, config.read_only));
        match config.receiving {
            None => {
                let provenance = claim_to_serve(config, &record_store, disk.size(), query)?;
                let flush_failed_at = settle_failed_flush(config, &record_store, &disk)?;
                let ownership = Ownership::Ours { provenance, flush_failed_at };
                Ok(Self { disk, record_store, ownership })
            }
            Some(ReceivingConfig { overwrite, records, .. }) => {
                if is_new {
                    record_incoming(&record_store, disk.size(), records)?;
                }
                let status_store = record_store.reopen().map_err(StartError::Record)?;
                let ForListen::Accept { incomplete_copy } =
                    claim_to_receive(config, &record_store, overwrite)?
                else {
                    return Ok(Self { disk, record_store, ownership: Ownership::AlreadyArrived });
                };
                let record_store =
                    reserve_record(record_store, records).map_err(StartError::Unrecorded)?;
                let ownership = Ownership::Incoming { copy: incomplete_copy, status_store };
                Ok(Self { disk, record_store, ownership })
            }
        }
    }
}

/// Refuses to create an image (`--create`) where one was deleted when its disk moved away: clients
/// would take the empty disk for theirs.
fn check_may_create(config: &ImageConfig) -> Result<(), StartError> {
    let would_create =
        config.create.is_some() && config.receiving.is_none() && !config.path.exists();
    if !would_create {
        return Ok(());
    }
    match read_tombstone(&config.path).map_err(StartError::Record)? {
        Some(Record::Departed { id, when, to }) => {
            let why = format!(
                "{} has moved to {to} and was deleted here (migration {id}, at {}), so that it is not \
                 made anew, empty. Use it there; for an empty disk in its place make the file \
                 yourself, with truncate(1), say",
                config.path.display(),
                utc(when)
            );
            let departure = Some((id, to));
            Err(StartError::Ownership(OwnershipDenial { why, departure, query: None }))
        }
        _ => Ok(()),
    }
}

fn open_image(config: &ImageConfig) -> Result<FileBackend, StartError> {
    let access = Access { read_only: config.read_only };
    let image = match config.create {
        Some(size) => FileBackend::create(&config.path, size, access),
        None => FileBackend::open(&config.path, access),
    };
    let image = image
        .map_err(|error| StartError::Image(error, config.config_file.clone()))?
        .with_holes(config.holes);
    let tail = image.unserved_tail();
    if tail > 0 {
        warn!(
            "{}: not serving its last {}, which do not fill a sector of 512",
            config.path.display(),
            counted(tail, "byte")
        );
    }
    Ok(image)
}

/// The backend that the configuration demands. A file that was created for it is removed again if
/// that fails: the next start would take the empty image for the disk.
fn backend_of(image: FileBackend, config: &ImageConfig) -> Result<Box<dyn Backend>, StartError> {
    if !config.direct {
        return Ok(Box::new(image));
    }
    let is_new = image.is_new();
    let direct = DirectBackend::new(image, Access { read_only: config.read_only });
    let direct = direct.map_err(|error| {
        if is_new {
            // A failure to remove it adds nothing to the error.
            let _ = fs::remove_file(&config.path);
        }
        StartError::Image(error, config.config_file.clone())
    })?;
    Ok(Box::new(direct))
}

fn open_record_store(config: &ImageConfig, image: &FileBackend) -> Result<RecordStore, StartError> {
    let mut record_store = RecordStore::of(image).map_err(StartError::Record)?;
    if let Some(file) = record_store.foreign_record() {
        warn!(
            "{}: the ownership record in {} is of another file, which had this path before, and \
             says nothing about this one",
            config.path.display(),
            file.display()
        );
    }
    // When a service has ended, its unit looks up the record, even of a deleted image, and closes
    // the sockets if the disk has moved.
    let is_service = env::var_os(STATE_VARIABLE).is_some();
    if config.create.is_some() || is_service {
        record_store.leave_tombstone();
    }
    Ok(record_store)
}

/// The provenance of the image, of `size` bytes, if its record or another host says that it is
/// ours.
fn claim_to_serve(
    config: &ImageConfig,
    record_store: &RecordStore,
    size: u64,
    startup_query: &StartupQuery<'_>,
) -> Result<Provenance, StartError> {
    let record = record_store.read().map_err(StartError::Record)?;
    match for_serve(record.as_ref()) {
        ForServe::Serve(provenance) => {
            remove_tombstone(record_store);
            Ok(provenance)
        }
        ForServe::Refuse(refusal) => Err(StartError::Ownership(denial(config, &refusal))),
        ForServe::Ask { id, to, from, before, refusal } => {
            let query = HandoverQuery::new(Question { size, id }, &to, from, startup_query.tls);
            let verdict = query.as_ref().map(|query| startup_query.run(query)).transpose()?;
            match verdict.unwrap_or(HandoverVerdict::Unknown) {
                HandoverVerdict::NotArrived => record_stayed(record_store, id, &to, before),
                HandoverVerdict::Arrived => {
                    let refusal = record_departed(record_store, id, to)?;
                    Err(StartError::Ownership(denial(config, &refusal)))
                }
                HandoverVerdict::Unknown => {
                    let denial = OwnershipDenial { query, ..denial(config, &refusal) };
                    Err(StartError::Ownership(denial))
                }
            }
        }
    }
}

/// If a flush of an earlier process has failed, drops what the page cache has of the image, since some of
/// it may not be on the disk: from now on clients read what the disk has. Returns the time of the failure.
fn settle_failed_flush(
    config: &ImageConfig,
    record_store: &RecordStore,
    disk: &Disk,
) -> Result<Option<u64>, StartError> {
    let Some(Record::FlushFailed { since, .. }) =
        record_store.read().map_err(StartError::Record)?
    else {
        return Ok(None);
    };
    let image = config.path.display();
    let dropped = disk.write_back().and_then(|()| record_store.drop_page_cache());
    let failed = dropped.err().map(|error| {
        format!(" The page cache of the image cannot be dropped ({error}), and may hold lost data.")
    });
    warn!(
        message_id = message_id::FLUSH_FAILED_EARLIER,
        "flexnbd.image" = %image,
        "a flush of {image} failed at {}, so that data may be lost.{} Check the disk; when it is right, \
         stop the server and run `flexnbd adopt -f {image}`",
        utc(since),
        failed.unwrap_or_default()
    );
    Ok(Some(since))
}

impl From<QueryError> for StartError {
    fn from(error: QueryError) -> Self {
        match error {
            QueryError::Interrupted(signal) => Self::Interrupted(signal),
            QueryError::System(error) => Self::System("ask another host", error),
        }
    }
}

/// Restores the record `before` of a handover that did not arrive, and can no longer arrive.
fn record_stayed(
    record_store: &RecordStore,
    id: Id,
    to: &RemoteAddress,
    before: Provenance,
) -> Result<Provenance, StartError> {
    info!(
        "flexnbd.migration" = %id, "flexnbd.destination" = %to,
        "{to} says that the disk has not arrived there: serving it here again"
    );
    record_store.write(before.record().as_ref()).map_err(StartError::Record)?;
    Ok(before)
}

/// Records that the destination has the disk.
fn record_departed(
    record_store: &RecordStore,
    id: Id,
    to: RemoteAddress,
) -> Result<OwnershipRefusal, StartError> {
    let when = SystemTime::UNIX_EPOCH.elapsed().map_or(0, |since| since.as_secs());
    let departed = Record::Departed { id, when, to: to.clone() };
    record_store.write(Some(&departed)).map_err(StartError::Record)?;
    Ok(OwnershipRefusal::Departed { id, when, to })
}

/// Records that a new image is incomplete until the disk has arrived, so that no process serves the
/// empty image, even if this one is killed. An image without such a record is deleted, unless
/// records are optional.
fn record_incoming(
    record_store: &RecordStore,
    size: u64,
    records: RecordPolicy,
) -> Result<(), StartError> {
    match (record_store.write(Some(&Record::Incoming { id: None })), records) {
        (Ok(()), _) => Ok(()),
        (Err(error), RecordPolicy::Optional) => {
            warn!("{error}");
            Ok(())
        }
        (Err(error), RecordPolicy::Required) => {
            if let Err(error) = record_store.delete_image(None, size) {
                warn!("{error}");
            }
            Err(StartError::Unrecorded(error))
        }
    }
}

/// Checks whether the record permits receiving into the image; a refusal is the error.
fn claim_to_receive(
    config: &ImageConfig,
    record_store: &RecordStore,
    overwrite: bool,
) -> Result<ForListen, StartError> {
    let record = record_store.read().map_err(StartError::Record)?;
    match for_listen(record.as_ref(), overwrite) {
        ForListen::Refuse(refusal) => Err(StartError::Ownership(denial(config, &refusal))),
        verdict => {
            remove_tombstone(record_store);
            Ok(verdict)
        }
    }
}

/// Removes the tombstone of an image that was deleted at this path: there is an image again.
fn remove_tombstone(record_store: &RecordStore) {
    if let Err(error) = record_store.remove_tombstone() {
        warn!("{error}");
    }
}

/// Reserves space for the largest record. If that fails and `policy` makes records optional, the
/// store keeps none from now on.
pub(super) fn reserve_record(
    mut record_store: RecordStore,
    policy: RecordPolicy,
) -> Result<RecordStore, RecordStoreError> {
    match (record_store.reserve(), policy) {
        (Ok(()), _) => Ok(record_store),
        (Err(error), RecordPolicy::Required) => Err(error),
        (Err(error), RecordPolicy::Optional) => {
            warn!(
                message_id = message_id::MIGRATION_UNRECORDED,
                "{error}; going on without an ownership record, as ordered: after a crash nothing \
                 tells which copy of the disk is the right one, and both would be served"
            );
            record_store.allow_unrecorded();
            Ok(record_store)
        }
    }
}

fn denial(config: &ImageConfig, refusal: &OwnershipRefusal) -> OwnershipDenial {
    let departure = match refusal {
        OwnershipRefusal::Departing { id, to } | OwnershipRefusal::Departed { id, to, .. } => {
            Some((*id, to.clone()))
        }
        OwnershipRefusal::Incomplete | OwnershipRefusal::Adopted => None,
    };
    let why = refusal.explain(&config.path.display().to_string());
    OwnershipDenial { why, departure, query: None }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::daemon::ConfinementConfig;
    use crate::daemon::signals::Signals;
    use crate::daemon::tls::ProcessTls;
    use crate::systemd::ServiceManager;
    use std::path::{Path, PathBuf};

    const SERVE: Option<ReceivingConfig> = None;
    const LISTEN: Option<ReceivingConfig> =
        Some(ReceivingConfig { overwrite: false, records: RecordPolicy::Required, plain: false });
    const ID: Id = Id([7; 16]);

    /// A directory for an image, on a file system that keeps records.
    fn directory() -> (tempfile::TempDir, PathBuf) {
        let directory = tempfile::tempdir_in("/var/tmp").unwrap();
        let image = directory.path().join("image");
        (directory, image)
    }

    fn claim(receiving: Option<ReceivingConfig>, image: &Path) -> Result<Claim, StartError> {
        let config = ImageConfig { receiving, create: Some(4096), ..ImageConfig::serve(image) };
        let (notifier, signals) = (ServiceManager::silent(), Signals::none());
        let tls = &ProcessTls::none();
        let query = StartupQuery { notifier: &notifier, signals: &signals, tls, answer: None };
        let unconfined = Confinement::refusing(&ConfinementConfig::default(), None);
        Claim::acquire(&config, &query, &unconfined)
    }

    #[test]
    fn a_disk_without_a_record_is_ours() {
        let (_directory, image) = directory();
        let claim = claim(SERVE, &image).unwrap();
        assert!(matches!(
            claim.ownership,
            Ownership::Ours { provenance: Provenance::Native, flush_failed_at: None }
        ));
        assert_eq!(claim.disk.size(), 4096);
    }

    #[test]
    fn image_created_for_receiving_is_not_served() {
        let (_directory, image) = directory();
        let claimed = claim(LISTEN, &image).unwrap();
        assert!(matches!(claimed.ownership, Ownership::Incoming { copy: Some(None), .. }));
        // The first claim locks the image.
        drop(claimed);
        assert!(matches!(claim(SERVE, &image), Err(StartError::Ownership(_))));
    }

    #[test]
    fn arrived_disk_is_not_received_again() {
        let (_directory, image) = directory();
        let claimed = claim(LISTEN, &image).unwrap();
        let arrived = Record::Ours(Provenance::Arrived(ID));
        claimed.record_store.write(Some(&arrived)).unwrap();
        drop(claimed);
        let claimed = claim(LISTEN, &image).unwrap();
        assert!(matches!(claimed.ownership, Ownership::AlreadyArrived));
        drop(claimed);
        let claimed = claim(SERVE, &image).unwrap();
        assert!(matches!(
            claimed.ownership,
            Ownership::Ours { provenance: Provenance::Arrived(ID), .. }
        ));
    }

    #[test]
    fn a_disk_with_a_failed_flush_is_served() {
        let (_directory, image) = directory();
        let claimed = claim(SERVE, &image).unwrap();
        let flush_failed = Record::FlushFailed { provenance: Provenance::Native, since: 7 };
        claimed.record_store.write(Some(&flush_failed)).unwrap();
        drop(claimed);
        let claimed = claim(SERVE, &image).unwrap();
        assert!(matches!(claimed.ownership, Ownership::Ours { flush_failed_at: Some(7), .. }));
        assert_eq!(claimed.record_store.read().unwrap(), Some(flush_failed));
    }

    #[test]
    fn a_disk_in_doubt_is_not_served() {
        let (_directory, image) = directory();
        let claimed = claim(SERVE, &image).unwrap();
        // No address that could be asked.
        let to = RemoteAddress::new("/run/x").unwrap();
        let departing =
            Record::Departing { id: ID, before: Provenance::Native, to: to.clone(), from: None };
        claimed.record_store.write(Some(&departing)).unwrap();
        drop(claimed);
        let Err(StartError::Ownership(denial)) = claim(SERVE, &image) else {
            panic!("claimed");
        };
        assert_eq!((denial.departure, denial.query), (Some((ID, to)), None));
    }
}
