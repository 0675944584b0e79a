//! Reads and writes the id of the disk beside its record ([`StoredDiskId`]).

use super::{RecordStore, RecordStoreError, is_unsupported};
use crate::disk::ownership::Provenance;
use crate::disk::ownership::disk_id::StoredDiskId;
use crate::disk::state_entries::{self, disk_id_path};
use crate::ids::DiskId;
use std::io;
use std::path::PathBuf;
use xattr::FileExt;

/// Name of the extended attribute with the id of the disk.
pub const DISK_ID_ATTRIBUTE: &str = "user.flexnbd.disk";

impl RecordStore {
    /// The id of the disk in an image whose record has this provenance, if it has one; durable.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn disk_id(&self, provenance: Provenance) -> Result<Option<DiskId>, RecordStoreError> {
        let id_of = |bytes: &[u8]| StoredDiskId::decode(bytes)?.id_of(provenance);
        if let Some(id) = self.disk_id_attribute()?.as_deref().and_then(id_of) {
            return Ok(Some(id));
        }
        let path = self.disk_id_path()?;
        let entry = state_entries::read(&path);
        let entry = entry.map_err(|source| RecordStoreError::Io { path, source })?;
        let ours = entry.filter(|entry| entry.is_of(self.id.as_ref()));
        Ok(ours.and_then(|entry| id_of(&entry.line)))
    }

    /// Gives an id to a disk that never moved and has none: `new`, unless a process was killed while it
    /// did the same. It is durable then, which takes as long as a flush of the whole image. `None` if the
    /// image cannot have attributes.
    ///
    /// # Errors
    /// When it cannot be written. A later call writes the same id then, or it was not stored at all.
    pub fn create_disk_id(&self, new: DiskId) -> Result<Option<DiskId>, RecordStoreError> {
        let begun = self.disk_id_attribute()?;
        let begun = begun.and_then(|bytes| StoredDiskId::decode(&bytes));
        let id = begun.filter(|stored| stored.of.is_none()).map_or(new, |stored| stored.id);
        let write = |of| {
            let line = StoredDiskId { id, of }.encode();
            self.image.set_xattr(DISK_ID_ATTRIBUTE, line.as_bytes())
        };
        let written = write(None)
            .and_then(|()| self.image.sync_all())
            .and_then(|()| write(Some(Provenance::Native)));
        match written {
            Ok(()) => Ok(Some(id)),
            Err(error) if is_unsupported(&error) => Ok(None),
            Err(source) => Err(RecordStoreError::Io { path: self.path.clone(), source }),
        }
    }

    /// Stores the id of a disk that has this provenance from the next record on. In the attribute it
    /// becomes durable with that record.
    ///
    /// # Errors
    /// When neither location can store it.
    pub fn write_disk_id(&self, id: DiskId, of: Provenance) -> Result<(), RecordStoreError> {
        let line = StoredDiskId { id, of: Some(of) }.encode();
        if self.image.set_xattr(DISK_ID_ATTRIBUTE, line.as_bytes()).is_ok() {
            return Ok(());
        }
        if self.id.is_none() {
            self.check_path()?;
        }
        let path = self.disk_id_path()?;
        state_entries::write(&path, &line, self.id.as_ref(), None)
            .map_err(|source| RecordStoreError::Io { path, source })
    }

    /// Removes the entry in the state directory, if there is one.
    pub(super) fn remove_disk_id_entry(&self) -> Result<(), RecordStoreError> {
        let path = self.disk_id_path()?;
        if !path.exists() {
            return Ok(());
        }
        state_entries::remove(&path).map_err(|source| RecordStoreError::Io { path, source })
    }

    /// Path of the entry with the id: named like the record's.
    fn disk_id_path(&self) -> Result<PathBuf, RecordStoreError> {
        let found = self.find()?;
        let record = if found.shared_with.is_some() { found.own_path } else { found.path };
        Ok(disk_id_path(&record))
    }

    fn disk_id_attribute(&self) -> Result<Option<Vec<u8>>, RecordStoreError> {
        match self.image.get_xattr(DISK_ID_ATTRIBUTE) {
            Err(error) if is_unsupported(&error) => Ok(None),
            read => read.map_err(|source: io::Error| RecordStoreError::Io {
                path: self.path.clone(),
                source,
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::ownership::{Id, Record};
    use std::fs::{self, File};

    const ID: DiskId = DiskId([0xab; 16]);
    const OTHER: DiskId = DiskId([0xcd; 16]);
    const ARRIVED: Provenance = Provenance::Arrived(Id([1; 16]));

    struct Fixture {
        directory: tempfile::TempDir,
        path: PathBuf,
    }

    fn fixture() -> Fixture {
        let directory = tempfile::tempdir_in("/var/tmp").unwrap();
        let path = directory.path().join("disk.img");
        fs::write(&path, [0; 4096]).unwrap();
        Fixture { directory, path }
    }

    impl Fixture {
        fn store(&self) -> RecordStore {
            RecordStore::open(&self.path, Some(&self.directory.path().join("state"))).unwrap()
        }

        /// The image cannot have attributes: procfs has none.
        fn store_without_attributes(&self) -> RecordStore {
            let mut store = self.store();
            store.image = File::open("/proc/self/status").unwrap();
            store
        }

        fn set_attribute(&self, text: &str) {
            xattr::set(&self.path, DISK_ID_ATTRIBUTE, text.as_bytes()).unwrap();
        }
    }

    #[test]
    fn created_id_is_that_of_a_native_disk() {
        let fixture = fixture();
        assert_eq!(fixture.store().disk_id(Provenance::Native).unwrap(), None);
        assert_eq!(fixture.store().create_disk_id(ID).unwrap(), Some(ID));
        assert_eq!(fixture.store().disk_id(Provenance::Native).unwrap(), Some(ID));
        assert_eq!(fixture.store().disk_id(ARRIVED).unwrap(), None);
        assert_eq!(fixture.store().read().unwrap(), None, "it is no record");
    }

    #[test]
    fn creation_that_was_interrupted_keeps_its_id() {
        let fixture = fixture();
        fixture.set_attribute(&StoredDiskId { id: ID, of: None }.encode());
        assert_eq!(
            fixture.store().disk_id(Provenance::Native).unwrap(),
            None,
            "it may not be durable"
        );
        assert_eq!(fixture.store().create_disk_id(OTHER).unwrap(), Some(ID));
        // One that another disk in this image had, or that nothing can be made of, is replaced.
        for old in [StoredDiskId { id: ID, of: Some(ARRIVED) }.encode(), "nonsense".to_owned()] {
            fixture.set_attribute(&old);
            assert_eq!(fixture.store().disk_id(Provenance::Native).unwrap(), None);
            assert_eq!(fixture.store().create_disk_id(OTHER).unwrap(), Some(OTHER));
        }
    }

    #[test]
    fn image_without_attributes_gets_no_id_of_its_own() {
        let fixture = fixture();
        assert_eq!(fixture.store_without_attributes().create_disk_id(ID).unwrap(), None);
        assert!(!fixture.directory.path().join("state").exists());
    }

    #[test]
    fn id_is_stored_where_attributes_are_impossible() {
        let fixture = fixture();
        let store = fixture.store_without_attributes();
        store.write_disk_id(ID, ARRIVED).unwrap();
        store.write_entry(&Record::Ours(ARRIVED)).unwrap();
        assert_eq!(store.disk_id(ARRIVED).unwrap(), Some(ID));
        assert_eq!(store.peek().unwrap(), Some(Record::Ours(ARRIVED)), "it is no record");
        assert_eq!(store.disk_id(Provenance::Native).unwrap(), None);
        // A renamed image keeps it, and the next one at its path does not get it.
        let moved = fixture.directory.path().join("moved");
        fs::rename(&fixture.path, &moved).unwrap();
        fs::write(&fixture.path, [1; 4096]).unwrap();
        let state = fixture.directory.path().join("state");
        let renamed = RecordStore::open(&moved, Some(&state)).unwrap();
        assert_eq!(renamed.disk_id(ARRIVED).unwrap(), Some(ID));
        assert_eq!(fixture.store().disk_id(ARRIVED).unwrap(), None);
        // A deleted image leaves nothing.
        renamed.delete_image(None, 4096).unwrap();
        assert_eq!(fs::read_dir(&state).unwrap().count(), 0);
    }

    #[test]
    fn later_id_replaces_an_earlier_one() {
        let fixture = fixture();
        fixture.store().create_disk_id(ID).unwrap();
        fixture.store().write_disk_id(OTHER, ARRIVED).unwrap();
        assert_eq!(fixture.store().disk_id(ARRIVED).unwrap(), Some(OTHER));
        assert_eq!(fixture.store().disk_id(Provenance::Native).unwrap(), None);
    }
}
