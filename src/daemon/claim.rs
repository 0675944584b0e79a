//! Whose disk an image is, before anything is done with it.
//! Reads the record, asks the other host where only that knows, and puts the record right.

use super::config::{Config, OwnershipDenial, ProcessRole, RecordPolicy, StartError};
use super::peer_query::{PeerQuery, StartupQuery};
use crate::disk::FileBackend;
use crate::disk::ownership::{
    self, ForListen, ForServe, Id, Provenance, Record, RemoteAddress, for_listen, for_serve,
};
use crate::disk::record_store::{RecordStore, RecordStoreError, read_tombstone};
use crate::disk::state::STATE_VARIABLE;
use crate::message_id;
use crate::migration::job::HandoverVerdict;
use crate::words::utc;
use std::env;
use std::time::SystemTime;
use tracing::{info, warn};

/// The ledger of the plan's image, which is open.
pub(super) fn ledger(plan: &Config, image: &FileBackend) -> Result<RecordStore, StartError> {
    let mut ledger = RecordStore::of(image).map_err(StartError::Record)?;
    if let Some(file) = ledger.foreign_record() {
        warn!(
            "{}: the ownership record in {} is of another file, which had this path before, and \
             says nothing about this one",
            plan.image.display(),
            file.display()
        );
    }
    // A service closes its sockets when its disk has moved, and asks for the record then.
    let is_service = env::var_os(STATE_VARIABLE).is_some();
    if plan.create.is_some() || is_service {
        ledger.leave_tombstone();
    }
    Ok(ledger)
}

/// Whether an image that is not there may be made: not if it was deleted when it moved away, since
/// clients would take an empty disk for theirs.
pub(super) fn to_create(plan: &Config) -> Result<(), StartError> {
    let is_missing =
        plan.create.is_some() && plan.role == ProcessRole::Serve && !plan.image.exists();
    if !is_missing {
        return Ok(());
    }
    match read_tombstone(&plan.image).map_err(StartError::Record)? {
        Some(Record::Departed { id, when, to }) => {
            let why = format!(
                "{} has moved to {to} and was deleted here (migration {id}, at {}), so that it is not \
                 made anew, empty. Use it there; for an empty disk in its place make the file \
                 yourself, with truncate(1), say",
                plan.image.display(),
                utc(when)
            );
            Err(StartError::Ownership(OwnershipDenial {
                why,
                departure: Some((id, to)),
                inquiry: None,
            }))
        }
        _ => Ok(()),
    }
}

/// By what title the image, of `size` bytes, may be served.
pub(super) fn to_serve(
    plan: &Config,
    ledger: &RecordStore,
    size: u64,
    asker: &StartupQuery<'_>,
) -> Result<Provenance, StartError> {
    let record = ledger.read().map_err(StartError::Record)?;
    match for_serve(record.as_ref()) {
        ForServe::Serve(title) => {
            remove_tombstone(ledger);
            Ok(title)
        }
        ForServe::Refuse(denial) => Err(denied(plan, &denial)),
        ForServe::Ask { id, to, from, before, refusal } => {
            let inquiry = PeerQuery::new((id, size), (&to, from));
            let fate = inquiry.as_ref().map(|inquiry| asker.what_became_of(inquiry)).transpose()?;
            match fate.unwrap_or(HandoverVerdict::Unknown) {
                HandoverVerdict::NotArrived => stays_here(ledger, (id, to), before),
                HandoverVerdict::Arrived => Err(denied(plan, &left(ledger, id, to)?)),
                HandoverVerdict::Unknown => Err(StartError::Ownership(OwnershipDenial {
                    inquiry,
                    ..denial(plan, &refusal)
                })),
            }
        }
    }
}

/// The destination says that it has not the disk, and never will.
fn stays_here(
    ledger: &RecordStore,
    (id, to): (Id, RemoteAddress),
    before: Provenance,
) -> Result<Provenance, StartError> {
    info!(
        "flexnbd.migration" = %id, "flexnbd.destination" = %to,
        "{to} says that the disk has not arrived there: serving it here again"
    );
    ledger.write(before.record().as_ref()).map_err(StartError::Record)?;
    Ok(before)
}

/// The destination says that it has the disk.
fn left(
    ledger: &RecordStore,
    id: Id,
    to: RemoteAddress,
) -> Result<ownership::OwnershipRefusal, StartError> {
    let when = SystemTime::UNIX_EPOCH.elapsed().map_or(0, |since| since.as_secs());
    let departed = Record::Departed { id, when, to: to.clone() };
    ledger.write(Some(&departed)).map_err(StartError::Record)?;
    Ok(ownership::OwnershipRefusal::Departed { id, when, to })
}

/// The image was made just now, for a disk that is to come: until it has, this one is empty, and not
/// to be served, whatever becomes of the process that waits for it. One of which that cannot be
/// recorded is deleted, unless an operator has said that there may be no record.
pub(super) fn to_come(
    ledger: &RecordStore,
    size: u64,
    records: RecordPolicy,
) -> Result<(), StartError> {
    match (ledger.write(Some(&Record::Incoming { id: None })), records) {
        (Ok(()), _) => Ok(()),
        (Err(error), RecordPolicy::Optional) => {
            warn!("{error}");
            Ok(())
        }
        (Err(error), RecordPolicy::Required) => {
            if let Err(error) = ledger.delete_image(None, size) {
                warn!("{error}");
            }
            Err(StartError::Unrecorded(error))
        }
    }
}

/// Whether the image may be received into.
pub(super) fn to_listen(
    plan: &Config,
    ledger: &RecordStore,
    overwrite: bool,
) -> Result<ForListen, StartError> {
    let record = ledger.read().map_err(StartError::Record)?;
    match for_listen(record.as_ref(), overwrite) {
        ForListen::Refuse(denial) => Err(denied(plan, &denial)),
        verdict => {
            remove_tombstone(ledger);
            Ok(verdict)
        }
    }
}

/// There is an image again: what became of the one before it does not matter any more.
fn remove_tombstone(ledger: &RecordStore) {
    if let Err(error) = ledger.remove_tombstone() {
        warn!("{error}");
    }
}

/// The ledger, with room for the largest record; or, if an operator has said that there may be no
/// record, one that keeps none.
pub(super) fn with_room(
    mut ledger: RecordStore,
    records: RecordPolicy,
) -> Result<RecordStore, RecordStoreError> {
    match (ledger.reserve(), records) {
        (Ok(()), _) => Ok(ledger),
        (Err(error), RecordPolicy::Required) => Err(error),
        (Err(error), RecordPolicy::Optional) => {
            warn!(
                message_id = message_id::MIGRATION_UNRECORDED,
                "{error}; going on without an ownership record, as ordered: after a crash nothing \
                 tells which copy of the disk is the right one, and both would be served"
            );
            ledger.allow_unrecorded();
            Ok(ledger)
        }
    }
}

/// How to learn the name of the image's record while no migration away from here changes it: by
/// the title that a disk is served by, or, while one is being received, by looking.
pub(super) fn told(
    ledger: RecordStore,
    served_by: Option<Provenance>,
) -> Box<dyn Fn() -> &'static str + Send + Sync> {
    match served_by {
        Some(title) => {
            let name = name_of(title.record().as_ref());
            Box::new(move || name)
        }
        None => Box::new(move || seen(&ledger)),
    }
}

/// The name of the record that is there just now.
pub(super) fn seen(ledger: &RecordStore) -> &'static str {
    ledger.peek().map_or("unknown", |record| name_of(record.as_ref()))
}

fn name_of(record: Option<&Record>) -> &'static str {
    record.map_or("none", Record::name)
}

fn denied(plan: &Config, refusal: &ownership::OwnershipRefusal) -> StartError {
    StartError::Ownership(denial(plan, refusal))
}

fn denial(plan: &Config, refusal: &ownership::OwnershipRefusal) -> OwnershipDenial {
    let departure = match refusal {
        ownership::OwnershipRefusal::Departing { id, to }
        | ownership::OwnershipRefusal::Departed { id, to, .. } => Some((*id, to.clone())),
        ownership::OwnershipRefusal::Incomplete | ownership::OwnershipRefusal::Adopted => None,
    };
    let why = refusal.explain(&plan.image.display().to_string());
    OwnershipDenial { why, departure, inquiry: None }
}
