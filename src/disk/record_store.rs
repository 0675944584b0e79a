//! Reads and writes the ownership record of an image, durably: in an extended attribute, or in an
//! entry of the state directory. [`super::ownership`] decides what a record means.
//!
//! A regular file has its record in the extended attribute `user.flexnbd`, so that the record moves
//! and disappears with the file. Where that is impossible (block devices, some file systems) or fails
//! (a full file system), `state_entries` stores it in the state directory.
//!
//! All work goes through the open file. The image's path serves two purposes, to name the entry and
//! to delete the image, and only after a comparison of device and inode.
//!
//! # Two locations
//!
//! An entry whose file id matches takes precedence over the attribute. So a record moves atomically: to
//! the state directory when the entry appears, back when it is removed, once the attribute is durable.

pub mod disk_id;
mod page_cache;

use super::deletion::{self, DeletionError, PathTarget};
use super::file_backend::FileBackend;
use super::ownership::{BadRecord, RECORD_MAX, Record};
use super::persistent_id::FileId;
use super::state_directory::{Unsearchable, directory_of_record, directory_of_tombstone};
use super::state_entries::{self, SpareFile, StateFileLookup, tombstone_path};
use crate::sync;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};
use tracing::warn;
use xattr::FileExt;

/// Name of the extended attribute.
pub const ATTRIBUTE: &str = "user.flexnbd";
/// Name of an attribute that [`RecordStore::reserve`] sets and removes as a probe.
const PROBE_ATTRIBUTE: &str = "user.flexnbd.probe";

/// Access to the record of one image.
#[derive(Debug)]
pub struct RecordStore {
    /// The image, in an open file description of our own: the kernel reports a write-back error once
    /// to each description, and flushes of the disk must not miss theirs.
    image: File,
    /// The image's absolute path.
    path: PathBuf,
    /// The image's persistent id.
    id: Option<FileId>,
    /// Path of the entry, unless another file had the image's path before.
    default_path: PathBuf,
    /// Whether deleting the image leaves a tombstone.
    leaves_tombstone: bool,
    /// Whether failing to store a record is an error.
    is_required: bool,
    spare: Mutex<Option<SpareFile>>,
}

/// Why a record cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RecordStoreError {
    /// It cannot be read or written.
    #[error("cannot keep the ownership record at {path}: {source}", path = .path.display())]
    Io {
        /// The image or the entry.
        path: PathBuf,
        /// The error of the system call.
        source: io::Error,
    },
    /// It is damaged, or from a newer flexnbd.
    #[error("{image}: {why}", image = .image.display())]
    Bad {
        /// The image.
        image: PathBuf,
        /// Why its bytes are no record.
        why: BadRecord,
    },
    /// Attribute and entry differ, and neither is known to be newer.
    #[error(
        "{image}: its attribute {ATTRIBUTE} and the record in {file} say different things, and \
         nothing tells which is newer; if you know that this copy is the right one, run `flexnbd \
         adopt --force`",
        image = .image.display(),
        file = .file.display()
    )]
    Contradiction {
        /// The image.
        image: PathBuf,
        /// The entry.
        file: PathBuf,
    },
    /// Neither location can store it.
    #[error(
        "no ownership record can be kept of {image}, neither as its attribute {ATTRIBUTE} \
         ({attribute}) nor in the state directory ({file})",
        image = .image.display()
    )]
    Nowhere {
        /// The image.
        image: PathBuf,
        /// The error of the attribute.
        attribute: io::Error,
        /// The error of the state directory.
        file: Box<RecordStoreError>,
    },
    /// The entry belongs to another file with the same id, too.
    #[error(
        "{image}: its ownership record is also that of {other}, as of a snapshot's original, and is \
         not removed; if you know that this copy is the right one, run `flexnbd adopt --force`",
        image = .image.display(),
        other = .other.display()
    )]
    Shared {
        /// The image.
        image: PathBuf,
        /// The other file.
        other: PathBuf,
    },
    /// The entry would be named after a path that no longer leads to the image.
    #[error("{path}: {target}", path = .path.display())]
    Renamed {
        /// The path.
        path: PathBuf,
        /// The file that it leads to.
        target: PathTarget,
    },
    /// The image is not deleted.
    #[error("{path} is not deleted: {why}", path = .path.display())]
    NotDeleted {
        /// Its path.
        path: PathBuf,
        /// The reason.
        why: DeletionError,
    },
}

impl From<Unsearchable> for RecordStoreError {
    fn from(error: Unsearchable) -> Self {
        Self::Io { path: error.directory, source: error.source }
    }
}

impl RecordStore {
    /// The store of an open image.
    ///
    /// # Errors
    /// When the image cannot be opened again, or the state directory cannot be searched.
    pub fn of(image: &FileBackend) -> Result<Self, RecordStoreError> {
        let failed = |source| RecordStoreError::Io { path: image.path().to_owned(), source };
        let path = absolute(image.path())?;
        Self::new(reopen_file(image.file()).map_err(failed)?, path, None)
    }

    /// The store of the image at `path`, opened for reading.
    ///
    /// # Errors
    /// When the image cannot be opened, or the state directory cannot be searched.
    pub fn at(path: &Path) -> Result<Self, RecordStoreError> {
        Self::open(path, None)
    }

    /// The same with a given state directory, which need not exist, or with the default one.
    pub(crate) fn open(path: &Path, state: Option<&Path>) -> Result<Self, RecordStoreError> {
        let failed = |source| RecordStoreError::Io { path: path.to_owned(), source };
        let absolute = absolute(path)?;
        let image = OpenOptions::new().read(true).open(&absolute).map_err(failed)?;
        Self::new(image, absolute, state)
    }

    fn new(image: File, path: PathBuf, state: Option<&Path>) -> Result<Self, RecordStoreError> {
        let id = FileId::of(&image);
        let state = match state {
            Some(state) => state.to_owned(),
            None => directory_of_record(&path, id.as_ref())?,
        };
        let default_path = state_entries::default_path(&state, &path);
        Ok(Self {
            image,
            path,
            id,
            default_path,
            leaves_tombstone: false,
            is_required: true,
            spare: Mutex::default(),
        })
    }

    /// Another store of the same image, with an open file description of its own.
    ///
    /// # Errors
    /// When the image cannot be opened again.
    pub fn reopen(&self) -> Result<Self, RecordStoreError> {
        let failed = |source| RecordStoreError::Io { path: self.path.clone(), source };
        let image = reopen_file(&self.image).map_err(failed)?;
        Ok(Self {
            image,
            path: self.path.clone(),
            id: self.id.clone(),
            default_path: self.default_path.clone(),
            spare: Mutex::default(),
            ..*self
        })
    }

    /// The image's absolute path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The state directory of the image.
    #[must_use]
    pub fn directory(&self) -> &Path {
        state_entries::directory_of(&self.default_path)
    }

    /// Makes the state directory, for a process that cannot make it later. A failure is reported when a
    /// record is stored there.
    pub fn make_directory(&self) {
        let _ = fs::create_dir_all(self.directory());
    }

    /// Makes [`RecordStore::delete_image`] leave a tombstone for [`read_tombstone`]. Needed with
    /// `--create`, which must not replace a disk that has moved away with an empty one, and by
    /// services, whose sockets must stop waiting for clients.
    pub fn leave_tombstone(&mut self) {
        self.leaves_tombstone = true;
    }

    /// Makes a record that cannot be stored no error, as the operator ordered with `--no-record`;
    /// see [`RecordStore::write`].
    pub fn allow_unrecorded(&mut self) {
        self.is_required = false;
    }

    /// The record, if there is one.
    ///
    /// Makes the record durable first: a crash may have killed its writer before the sync, and a
    /// power cut must not undo a record on which we have acted.
    ///
    /// # Errors
    /// When it cannot be read, or is damaged.
    pub fn read(&self) -> Result<Option<Record>, RecordStoreError> {
        let record = self.peek()?;
        if record.is_some() {
            self.sync()?;
        }
        Ok(record)
    }

    /// The record, which may not be durable yet: to be displayed, not acted on.
    ///
    /// # Errors
    /// As [`RecordStore::read`].
    pub fn peek(&self) -> Result<Option<Record>, RecordStoreError> {
        let attribute = self.image.get_xattr(ATTRIBUTE);
        let found = self.find()?;
        let id_matches = found.entry.is_some() && found.id_matches;
        let attribute = match attribute {
            Ok(attribute) => attribute,
            Err(error) if is_unsupported(&error) || id_matches => None,
            Err(source) => return Err(RecordStoreError::Io { path: self.path.clone(), source }),
        };
        let entry = found.entry.as_ref().map(|entry| (entry.line.as_slice(), id_matches));
        let Ok(bytes) = choose_location(attribute.as_deref(), entry) else {
            let file = found.path.clone();
            return Err(RecordStoreError::Contradiction { image: self.path.clone(), file });
        };
        let decoded = bytes.map(Record::decode).transpose();
        decoded.map_err(|why| RecordStoreError::Bad { image: self.path.clone(), why })
    }

    /// The entry of another file that had the image's path before, which says nothing about this one.
    #[must_use]
    pub fn foreign_record(&self) -> Option<PathBuf> {
        self.find().ok()?.foreign
    }

    /// Stores `record`, durably; none removes it. After [`RecordStore::allow_unrecorded`], failing to
    /// store it is no error, and the old record is removed unless it remains valid.
    ///
    /// # Errors
    /// When neither location can store it. Either the old record or the new one is in place then.
    pub fn write(&self, record: Option<&Record>) -> Result<(), RecordStoreError> {
        let (error, record) = match (self.store(record), record) {
            (Err(error), Some(record)) if !self.is_required => (error, record),
            (stored, _) => return stored,
        };
        warn!("{error}; going on without an ownership record, as ordered");
        match self.peek() {
            Ok(Some(old)) if old.remains_valid_after(record) => Ok(()),
            _ => self.store(None),
        }
    }

    fn store(&self, record: Option<&Record>) -> Result<(), RecordStoreError> {
        if let Some(path) = self.find()?.shared_with {
            return self.store_separately(record, path);
        }
        let attribute = match (self.write_attribute(record), record) {
            (Ok(()), _) => return self.remove_entry(),
            (Err(error), None) if is_unsupported(&error) => return self.remove_entry(),
            (Err(source), None) => {
                return Err(RecordStoreError::Io { path: self.path.clone(), source });
            }
            (Err(error), Some(_)) => error,
        };
        let stored = record.map_or(Ok(()), |record| self.write_entry(record));
        match stored {
            Ok(()) => {
                // The entry takes precedence over an old attribute, but other tools may show that.
                let _ = self.write_attribute(None);
                Ok(())
            }
            Err(file) => Err(RecordStoreError::Nowhere {
                image: self.path.clone(),
                attribute,
                file: Box::new(file),
            }),
        }
    }

    /// Checks that the largest record can be stored, and preallocates space for it where possible.
    /// Does not sync the image, which can take long.
    ///
    /// # Errors
    /// When neither location can store it.
    pub fn reserve(&self) -> Result<(), RecordStoreError> {
        let attribute = self.try_attribute();
        let is_needed = attribute.is_err();
        let file = self.reserve_entry(is_needed);
        match (attribute, file) {
            (Err(attribute), Err(file)) => Err(RecordStoreError::Nowhere {
                image: self.path.clone(),
                attribute,
                file: Box::new(file),
            }),
            _ => Ok(()),
        }
    }

    /// The file that the image's path leads to now.
    ///
    /// # Errors
    /// When stat(2) fails.
    pub fn path_target(&self) -> Result<PathTarget, RecordStoreError> {
        deletion::path_target(&self.path, &self.image)
            .map_err(|errno| RecordStoreError::Io { path: self.path.clone(), source: errno.into() })
    }

    /// The size of the image in bytes beyond the first `served`.
    ///
    /// # Errors
    /// When stat(2) fails.
    pub fn bytes_beyond(&self, served: u64) -> Result<u64, RecordStoreError> {
        let failed = |source| RecordStoreError::Io { path: self.path.clone(), source };
        let found = self.image.metadata().map_err(failed)?;
        // `st_size` of a block device is 0.
        let size = if found.file_type().is_block_device() { served } else { found.len() };
        Ok(size.saturating_sub(served))
    }

    /// Checks that [`RecordStore::delete_image`] could delete the image now; its first `served` bytes
    /// are the disk.
    ///
    /// # Errors
    /// The reason why it could not.
    pub fn check_deletable(&self, served: u64) -> Result<(), RecordStoreError> {
        let not_deleted = |why| RecordStoreError::NotDeleted { path: self.path.clone(), why };
        deletion::check_deletable(&self.path, &self.image).map_err(not_deleted)?;
        match self.bytes_beyond(served)? {
            0 => Ok(()),
            bytes => Err(not_deleted(DeletionError::Tail(bytes))),
        }
    }

    /// Deletes the image and its record, durably, if its path is the only name of the file and the
    /// disk, its first `served` bytes, is the whole file. A tombstone, if one is to be left, holds
    /// `last`. An image that has no name counts as deleted.
    ///
    /// # Errors
    /// The reason why it is not deleted.
    pub fn delete_image(&self, last: Option<&Record>, served: u64) -> Result<(), RecordStoreError> {
        let failed = |source| RecordStoreError::Io { path: self.path.clone(), source };
        let found = self.image.metadata().map_err(failed)?;
        if found.nlink() > 0 {
            self.check_deletable(served)?;
        }
        if let Some(record) = last.filter(|_| self.leaves_tombstone) {
            // Before the deletion: after a crash in between, the image still has its own record.
            let path = tombstone_path(&self.default_path);
            state_entries::write(&path, &record.encode(), None, None)
                .map_err(|source| RecordStoreError::Io { path, source })?;
        }
        let spare = format!(".flexnbd-deleting-{}", found.ino());
        deletion::delete(&self.path, &self.image, spare.as_ref())
            .map_err(|why| RecordStoreError::NotDeleted { path: self.path.clone(), why })?;
        self.remove_disk_id_entry()?;
        self.remove_entry()
    }

    /// Removes the tombstone of an earlier image with this path.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub fn remove_tombstone(&self) -> Result<(), RecordStoreError> {
        let path = tombstone_path(&self.default_path);
        if !path.exists() {
            return Ok(());
        }
        state_entries::remove(&path).map_err(|source| RecordStoreError::Io { path, source })
    }

    /// Makes the current record durable, in both locations.
    fn sync(&self) -> Result<(), RecordStoreError> {
        if let Some(entry) = self.find()?.entry {
            state_entries::sync(&entry.path)
                .map_err(|source| RecordStoreError::Io { path: entry.path, source })?;
        }
        match self.image.sync_all() {
            // A read-only file system has nothing to sync.
            Err(error) if error.kind() == io::ErrorKind::ReadOnlyFilesystem => Ok(()),
            synced => {
                synced.map_err(|source| RecordStoreError::Io { path: self.path.clone(), source })
            }
        }
    }

    // The attribute.

    fn write_attribute(&self, record: Option<&Record>) -> io::Result<()> {
        match record {
            Some(record) => self.image.set_xattr(ATTRIBUTE, record.encode().as_bytes())?,
            None if self.image.get_xattr(ATTRIBUTE)?.is_some() => {
                self.image.remove_xattr(ATTRIBUTE)?;
            }
            None => {}
        }
        self.image.sync_all()
    }

    /// Sets a second attribute of the largest size and removes it: a record that fits beside the
    /// current one fits in its place, too.
    fn try_attribute(&self) -> io::Result<()> {
        self.image.set_xattr(PROBE_ATTRIBUTE, &[b' '; RECORD_MAX])?;
        self.image.remove_xattr(PROBE_ATTRIBUTE)
    }

    // The state directory.

    fn find(&self) -> Result<StateFileLookup, RecordStoreError> {
        state_entries::find(&self.default_path, self.id.as_ref(), &|path| self.is_another(path))
            .map_err(|source| RecordStoreError::Io { path: self.default_path.clone(), source })
    }

    /// Whether the path leads to another file with the same id.
    fn is_another(&self, path: &Path) -> bool {
        let (Ok(ours), Ok(theirs)) = (self.image.metadata(), fs::metadata(path)) else {
            return false;
        };
        let is_same = (theirs.dev(), theirs.ino()) == (ours.dev(), ours.ino());
        let has_id = || self.id.as_ref().is_some_and(|id| id.is_of(path));
        theirs.is_file() && !is_same && has_id()
    }

    /// Stores the record in an entry that only this file's path leads to, since the current entry
    /// belongs to another file, too.
    fn store_separately(
        &self,
        record: Option<&Record>,
        other: PathBuf,
    ) -> Result<(), RecordStoreError> {
        let Some(record) = record else {
            return Err(RecordStoreError::Shared { image: self.path.clone(), other });
        };
        self.check_path()?;
        self.write_entry_at(self.find()?.own_path, record)?;
        // The entry takes precedence over an old attribute, but the attribute moves with the file.
        let _ = self.write_attribute(Some(record));
        Ok(())
    }

    fn write_entry(&self, record: &Record) -> Result<(), RecordStoreError> {
        if self.id.is_none() {
            self.check_path()?;
        }
        self.write_entry_at(self.find()?.path, record)
    }

    fn write_entry_at(&self, path: PathBuf, record: &Record) -> Result<(), RecordStoreError> {
        let spare = self.spare().take();
        let had_spare = spare.is_some();
        let written = state_entries::write(&path, &record.encode(), self.id.as_ref(), spare);
        written.map_err(|source| RecordStoreError::Io { path: path.clone(), source })?;
        if had_spare {
            // For the next record. Without space now, that record may still find space later.
            *self.spare() = SpareFile::create(&path).ok();
        }
        Ok(())
    }

    fn reserve_entry(&self, is_needed: bool) -> Result<(), RecordStoreError> {
        if !is_needed && !self.directory().exists() {
            return Ok(());
        }
        self.check_path()?;
        let path = self.find()?.path;
        let spare =
            SpareFile::create(&path).map_err(|source| RecordStoreError::Io { path, source })?;
        *self.spare() = Some(spare);
        Ok(())
    }

    /// Checks that the image's path still leads to the image, before an entry is named after it.
    fn check_path(&self) -> Result<(), RecordStoreError> {
        match self.path_target()? {
            PathTarget::Same => Ok(()),
            target => Err(self.renamed(target)),
        }
    }

    fn renamed(&self, target: PathTarget) -> RecordStoreError {
        RecordStoreError::Renamed { path: self.path.clone(), target }
    }

    fn remove_entry(&self) -> Result<(), RecordStoreError> {
        let found = self.find()?;
        let Some(entry) = found.entry else { return Ok(()) };
        // An entry found by path only belongs to the file that has the path now.
        if !found.id_matches {
            match self.path_target()? {
                PathTarget::Same | PathTarget::Nothing => {}
                target => return Err(self.renamed(target)),
            }
        }
        state_entries::remove(&entry.path)
            .map_err(|source| RecordStoreError::Io { path: entry.path, source })
    }

    fn spare(&self) -> MutexGuard<'_, Option<SpareFile>> {
        sync::lock(&self.spare)
    }
}

/// The two locations have different records.
#[derive(Debug, PartialEq, Eq)]
struct Disagreement;

/// Chooses between the attribute and the entry, which comes with whether its file id matches. An
/// entry without a matching id belongs to the file that has the path now.
fn choose_location<'a>(
    attribute: Option<&'a [u8]>,
    entry: Option<(&'a [u8], bool)>,
) -> Result<Option<&'a [u8]>, Disagreement> {
    match (attribute, entry) {
        (attribute, None) => Ok(attribute),
        (_, Some((entry, true))) | (None, Some((entry, false))) => Ok(Some(entry)),
        (Some(attribute), Some((entry, false))) if attribute == entry => Ok(Some(entry)),
        (Some(_), Some((_, false))) => Err(Disagreement),
    }
}

/// The tombstone at `path`: the last record of an image that was deleted when it moved away.
///
/// # Errors
/// When the tombstone cannot be read, or is damaged.
pub fn read_tombstone(path: &Path) -> Result<Option<Record>, RecordStoreError> {
    read_tombstone_in(path, &directory_of_tombstone(&absolute(path)?)?)
}

fn read_tombstone_in(path: &Path, state: &Path) -> Result<Option<Record>, RecordStoreError> {
    let image = absolute(path)?;
    let path = tombstone_path(&state_entries::default_path(state, &image));
    let entry =
        state_entries::read(&path).map_err(|source| RecordStoreError::Io { path, source })?;
    let decoded = entry.map(|entry| Record::decode(&entry.line)).transpose();
    decoded.map_err(|why| RecordStoreError::Bad { image, why })
}

/// Does not follow links: /dev/mapper/disk is stable across restarts, /dev/dm-3 is not.
fn absolute(path: &Path) -> Result<PathBuf, RecordStoreError> {
    std::path::absolute(path)
        .map_err(|source| RecordStoreError::Io { path: path.to_owned(), source })
}

/// Opens the same file again, independent of its name, with an open file description of its own;
/// shares the given one where `/proc` is not mounted.
fn reopen_file(file: &File) -> io::Result<File> {
    let link = format!("/proc/self/fd/{}", file.as_raw_fd());
    OpenOptions::new().read(true).open(link).or_else(|_| file.try_clone())
}

/// Whether this kind of image cannot have extended attributes at all.
fn is_unsupported(error: &io::Error) -> bool {
    use nix::libc::{ENOSYS, EOPNOTSUPP, EPERM};
    matches!(error.raw_os_error(), Some(EOPNOTSUPP | EPERM | ENOSYS))
}

#[cfg(test)]
mod tests;
