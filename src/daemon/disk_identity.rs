//! The id of the disk that is served: read beside the image, or drawn for a disk that has none
//! ([`crate::disk::ownership::disk_id`]).
//! Never delays the start: a thread makes a new id durable, and until then the disk has none.

use super::random;
use crate::disk::ownership::Provenance;
use crate::disk::record_store::RecordStore;
use crate::ids::DiskId;
use crate::memory_reserve::check_thread_headroom;
use std::sync::{Arc, OnceLock};
use std::{io, thread};
use tracing::{info, warn};

/// The id of the disk that is served, once it is known and durable.
#[derive(Clone, Debug, Default)]
pub(super) struct ServedDiskId(Arc<OnceLock<DiskId>>);

impl ServedDiskId {
    /// That of the image with this record. A disk that never moved gets one, unless it is served read-only.
    pub(super) fn of(store: &RecordStore, provenance: Provenance, read_only: bool) -> Self {
        let served = Self::default();
        let image = store.path().display();
        match store.disk_id(provenance) {
            Ok(Some(id)) => served.set(id),
            Ok(None) if provenance == Provenance::Native && !read_only => {
                if let Err(why) = served.create(store) {
                    warn!("{image}: proxies cannot recognize the disk by an id: {why}");
                }
            }
            Ok(None) => {}
            Err(error) => warn!("{image}: proxies cannot recognize the disk by its id: {error}"),
        }
        served
    }

    pub(super) fn get(&self) -> Option<DiskId> {
        self.0.get().copied()
    }

    fn set(&self, id: DiskId) {
        // Only one thread sets it, once.
        let _ = self.0.set(id);
    }

    /// Starts the thread that stores a new id.
    fn create(&self, store: &RecordStore) -> Result<(), String> {
        let store = store.reopen().map_err(|error| error.to_string())?;
        let new = DiskId(random::bytes().map_err(|error| error.to_string())?);
        let served = self.clone();
        let create = move || {
            let image = store.path().display();
            match store.create_disk_id(new) {
                Ok(Some(id)) => {
                    served.set(id);
                    info!("{image}: proxies recognize the disk by the id {id}");
                }
                // A block device, say.
                Ok(None) => {}
                Err(error) => warn!("{image}: proxies cannot recognize the disk by an id: {error}"),
            }
        };
        let start = || -> io::Result<()> {
            check_thread_headroom()?;
            thread::Builder::new().name("disk-id".into()).spawn(create).map(drop)
        };
        start().map_err(|error| error.to_string())
    }
}
