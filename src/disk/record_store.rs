//! Where the ownership record of an image is kept, durably: beside its bytes, or in a file.
//! Only keeps it; what it means is decided in [`super::ownership`].
//!
//! A regular file carries its record as the extended attribute `user.flexnbd`, so that it moves
//! and dies with the file. Where that is impossible (block devices, some file systems) or fails (a
//! full file system) it is a file in the state directory; see `state_file`.
//!
//! Everything is done to the open file. The image's path is used for two things, the name of that
//! file and the image's deletion, and only after device and inode were compared.
//!
//! # Two places
//!
//! A record in the state directory that is certainly about this file wins over the attribute. So
//! moving a record from one place to the other is atomic, whichever way: to the state directory it
//! is the file's appearance that counts, and back, with the attribute durable, its removal.

use super::deletion::{self, DeletionError, PathTarget};
use super::file::FileBackend;
use super::file_id::FileId;
use super::ownership::{BadRecord, RECORD_MAX, Record};
use super::state::{directory_of_note, directory_of_record};
use super::state_file::{self, Spare, StateFileLookup, beside};
use crate::sync;
use std::fmt;
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
/// Name of an attribute that is set and removed again, to see whether that can be done.
const PROBE: &str = "user.flexnbd.probe";

/// The record of one image.
#[derive(Debug)]
pub struct RecordStore {
    /// The image, in an opening of our own: the kernel reports a failed write-back once to each,
    /// and what the disk's own is told is for its clients.
    image: File,
    /// The image's absolute path.
    path: PathBuf,
    /// The image's lasting name.
    id: Option<FileId>,
    /// Where the record is usually, if it is not an attribute.
    usual: PathBuf,
    /// Whether a deleted image leaves a note behind.
    leaves_note: bool,
    /// Whether a record that cannot be kept is an error.
    keeps: bool,
    spare: Mutex<Option<Spare>>,
}

/// What follows the name of a record's file in that of a note about an image that was deleted.
pub(super) const NOTE: &str = ".departed";

/// Why a record cannot be used.
#[derive(Debug)]
pub enum RecordStoreError {
    /// It cannot be read or written.
    Io {
        /// The image or the record's file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// It is damaged, or from a newer flexnbd.
    Bad {
        /// The image.
        image: PathBuf,
        /// What is wrong with it.
        why: BadRecord,
    },
    /// Attribute and state directory say different things, and nothing tells which is newer.
    Contradiction {
        /// The image.
        image: PathBuf,
        /// The record's file.
        file: PathBuf,
    },
    /// It can be kept in neither place.
    Nowhere {
        /// The image.
        image: PathBuf,
        /// What is against the attribute.
        attribute: io::Error,
        /// What is against the state directory.
        file: Box<RecordStoreError>,
    },
    /// The record in the state directory is that of another file with the same lasting name, too.
    Shared {
        /// The image.
        image: PathBuf,
        /// The other file.
        other: PathBuf,
    },
    /// It would be kept by the image's path, which is not the image's any more.
    Renamed {
        /// The path.
        path: PathBuf,
        /// What it leads to.
        named: PathTarget,
    },
    /// The image is not deleted.
    NotDeleted {
        /// Its path.
        path: PathBuf,
        /// Why not.
        why: DeletionError,
    },
}

impl fmt::Display for RecordStoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io { path, source } => {
                write!(f, "cannot keep the ownership record at {}: {source}", path.display())
            }
            Self::Bad { image, why } => write!(f, "{}: {why}", image.display()),
            Self::Contradiction { image, file } => write!(
                f,
                "{}: its attribute {ATTRIBUTE} and the record in {} say different things, and \
                 nothing tells which is newer; if you know that this copy is the right one, run \
                 `flexnbd adopt --force`",
                image.display(),
                file.display()
            ),
            Self::Nowhere { image, attribute, file } => write!(
                f,
                "no ownership record can be kept of {}, neither as its attribute {ATTRIBUTE} \
                 ({attribute}) nor in the state directory ({file})",
                image.display()
            ),
            Self::Shared { image, other } => write!(
                f,
                "{}: its ownership record is also that of {}, as of a snapshot's original, and is \
                 not removed; if you know that this copy is the right one, run \
                 `flexnbd adopt --force`",
                image.display(),
                other.display()
            ),
            Self::Renamed { path, named } => write!(f, "{}: {named}", path.display()),
            Self::NotDeleted { path, why } => write!(f, "{} is not deleted: {why}", path.display()),
        }
    }
}

impl std::error::Error for RecordStoreError {}

impl RecordStore {
    /// The ledger of an image that is open.
    ///
    /// # Errors
    /// When the image cannot be opened a second time, or the state directory not be searched.
    pub fn of(image: &FileBackend) -> Result<Self, RecordStoreError> {
        let failed = |source| RecordStoreError::Io { path: image.path().to_owned(), source };
        let path = absolute(image.path())?;
        Self::new(reopen_file(image.file()).map_err(failed)?, path, None)
    }

    /// The ledger of whatever image is at `path` now, for looking at it.
    ///
    /// # Errors
    /// When there is no such image, it cannot be read, or the state directory not be searched.
    pub fn at(path: &Path) -> Result<Self, RecordStoreError> {
        Self::open(path, None)
    }

    /// The same with this state directory, which need not exist yet, or with the usual one.
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
        let (usual, spare) = (state_file::usual_place(&state, &path), Mutex::default());
        Ok(Self { image, path, id, usual, leaves_note: false, keeps: true, spare })
    }

    /// Another ledger of the same image, in an opening of its own.
    ///
    /// # Errors
    /// When the image cannot be opened again.
    pub fn reopen(&self) -> Result<Self, RecordStoreError> {
        let failed = |source| RecordStoreError::Io { path: self.path.clone(), source };
        let image = reopen_file(&self.image).map_err(failed)?;
        let (path, id, usual) = (self.path.clone(), self.id.clone(), self.usual.clone());
        let Self { leaves_note, keeps, .. } = *self;
        Ok(Self { image, path, id, usual, leaves_note, keeps, spare: Mutex::default() })
    }

    /// The image's absolute path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// From now on an image that is deleted leaves a note behind, for [`read_tombstone`]. For those who make
    /// a missing image anew (`--create`): a disk that has moved away must not come back empty; and
    /// for services, whose sockets must not wait for clients any more.
    pub fn leave_tombstone(&mut self) {
        self.leaves_note = true;
    }

    /// From now on a record that cannot be kept is no error, by an operator's explicit word
    /// (`--no-record`); see [`RecordStore::write`].
    pub fn allow_unrecorded(&mut self) {
        self.keeps = false;
    }

    /// The record, if there is one.
    ///
    /// It is made durable before it is believed: whoever wrote it may have been killed before it
    /// was, and what is done on the strength of it must not be taken back by a power cut.
    ///
    /// # Errors
    /// When it cannot be read, or is none that we understand.
    pub fn read(&self) -> Result<Option<Record>, RecordStoreError> {
        let record = self.peek()?;
        if record.is_some() {
            self.settle()?;
        }
        Ok(record)
    }

    /// The record as it is just now, perhaps not durable yet; for showing, not for acting on.
    ///
    /// # Errors
    /// As [`RecordStore::read`].
    pub fn peek(&self) -> Result<Option<Record>, RecordStoreError> {
        let attribute = self.image.get_xattr(ATTRIBUTE);
        let found = self.find()?;
        let entry = found.entry.as_ref().map(|entry| (entry, found.certain));
        let attribute = match attribute {
            Ok(attribute) => attribute,
            Err(error) if is_impossible(&error) || entry.is_some_and(|(_, certain)| certain) => {
                None
            }
            Err(source) => return Err(RecordStoreError::Io { path: self.path.clone(), source }),
        };
        let state = entry.map(|(entry, certain)| (entry.line.as_slice(), certain));
        let Ok(bytes) = which(attribute.as_deref(), state) else {
            let file = found.place.clone();
            return Err(RecordStoreError::Contradiction { image: self.path.clone(), file });
        };
        let decoded = bytes.map(Record::decode).transpose();
        decoded.map_err(|why| RecordStoreError::Bad { image: self.path.clone(), why })
    }

    /// The record of another file that had the image's path, which is not believed of this one.
    #[must_use]
    pub fn foreign_record(&self) -> Option<PathBuf> {
        self.find().ok()?.foreign
    }

    /// Makes `record` the record, durably; none removes it. After [`RecordStore::allow_unrecorded`] one that
    /// cannot be kept is given up, and the old one removed unless it still holds.
    ///
    /// # Errors
    /// When it cannot be kept in either place. What is kept then is the old record or the new.
    pub fn write(&self, record: Option<&Record>) -> Result<(), RecordStoreError> {
        let (error, record) = match (self.keep(record), record) {
            (Err(error), Some(record)) if !self.keeps => (error, record),
            (kept, _) => return kept,
        };
        warn!("{error}; going on without an ownership record, as ordered");
        match self.peek() {
            Ok(Some(old)) if old.remains_valid_after(record) => Ok(()),
            _ => self.keep(None),
        }
    }

    fn keep(&self, record: Option<&Record>) -> Result<(), RecordStoreError> {
        if let Some(path) = self.find()?.shared_with {
            return self.keep_apart(record, path);
        }
        let attribute = match (self.write_attribute(record), record) {
            (Ok(()), _) => return self.remove_entry(),
            (Err(error), None) if is_impossible(&error) => return self.remove_entry(),
            (Err(source), None) => {
                return Err(RecordStoreError::Io { path: self.path.clone(), source });
            }
            (Err(error), Some(_)) => error,
        };
        let kept = record.map_or(Ok(()), |record| self.write_entry(record));
        match kept {
            Ok(()) => {
                // Whatever is left there is not believed any more, but may be shown by others.
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

    /// Finds out whether the largest record can be kept, and keeps room for it as far as that can
    /// be done. Makes nothing of the image durable, which can take long.
    ///
    /// # Errors
    /// Why not.
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

    /// What the image's path leads to now.
    ///
    /// # Errors
    /// When that cannot be found out.
    pub fn path_target(&self) -> Result<PathTarget, RecordStoreError> {
        deletion::path_target(&self.path, &self.image)
            .map_err(|errno| RecordStoreError::Io { path: self.path.clone(), source: errno.into() })
    }

    /// How many bytes the image has beyond the first `served`.
    ///
    /// # Errors
    /// When that cannot be found out.
    pub fn bytes_beyond(&self, served: u64) -> Result<u64, RecordStoreError> {
        let failed = |source| RecordStoreError::Io { path: self.path.clone(), source };
        let found = self.image.metadata().map_err(failed)?;
        // A device's size is not that of its node.
        let size = if found.file_type().is_block_device() { served } else { found.len() };
        Ok(size.saturating_sub(served))
    }

    /// Whether the image, of which the first `served` bytes are the disk, could be deleted now.
    ///
    /// # Errors
    /// Why not.
    pub fn check_deletable(&self, served: u64) -> Result<(), RecordStoreError> {
        let kept = |why| RecordStoreError::NotDeleted { path: self.path.clone(), why };
        deletion::check_deletable(&self.path, &self.image).map_err(kept)?;
        match self.bytes_beyond(served)? {
            0 => Ok(()),
            bytes => Err(kept(DeletionError::Tail(bytes))),
        }
    }

    /// Deletes the image, durably, with its record, if its path still is the only name of the file
    /// and its first `served` bytes are all; `last`, if it is wanted, says in a note what became of
    /// it.
    ///
    /// # Errors
    /// Why it is not deleted; one without a name counts as deleted.
    pub fn delete_image(&self, last: Option<&Record>, served: u64) -> Result<(), RecordStoreError> {
        let failed = |source| RecordStoreError::Io { path: self.path.clone(), source };
        let found = self.image.metadata().map_err(failed)?;
        if found.nlink() > 0 {
            self.check_deletable(served)?;
        }
        if let Some(record) = last.filter(|_| self.leaves_note) {
            // First: in between, the image's own record still tells what is going on.
            let note = beside(&self.usual, NOTE);
            state_file::write(&note, &record.encode(), None, None)
                .map_err(|source| RecordStoreError::Io { path: note, source })?;
        }
        let spare = format!(".flexnbd-deleting-{}", found.ino());
        deletion::delete(&self.path, &self.image, spare.as_ref())
            .map_err(|why| RecordStoreError::NotDeleted { path: self.path.clone(), why })?;
        self.remove_entry()
    }

    /// Removes the note about an image that was here before this one.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn remove_tombstone(&self) -> Result<(), RecordStoreError> {
        let path = beside(&self.usual, NOTE);
        if !path.exists() {
            return Ok(());
        }
        state_file::remove(&path).map_err(|source| RecordStoreError::Io { path, source })
    }

    /// Makes the record durable that is there now, in whichever place it is.
    fn settle(&self) -> Result<(), RecordStoreError> {
        if let Some(entry) = self.find()?.entry {
            state_file::settle(&entry.path)
                .map_err(|source| RecordStoreError::Io { path: entry.path, source })?;
        }
        match self.image.sync_all() {
            // What cannot be written to cannot lose it either.
            Err(error) if error.kind() == io::ErrorKind::ReadOnlyFilesystem => Ok(()),
            settled => {
                settled.map_err(|source| RecordStoreError::Io { path: self.path.clone(), source })
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

    /// Beside the record that is there: what fits so fits in its place, too.
    fn try_attribute(&self) -> io::Result<()> {
        self.image.set_xattr(PROBE, &[b' '; RECORD_MAX])?;
        self.image.remove_xattr(PROBE)
    }

    // The state directory.

    fn find(&self) -> Result<StateFileLookup, RecordStoreError> {
        state_file::find(&self.usual, self.id.as_ref(), &|path| self.is_another(path))
            .map_err(|source| RecordStoreError::Io { path: self.usual.clone(), source })
    }

    /// Whether the path leads to another file that has our file's lasting name.
    fn is_another(&self, path: &Path) -> bool {
        let (Ok(ours), Ok(theirs)) = (self.image.metadata(), fs::metadata(path)) else {
            return false;
        };
        let is_same = (theirs.dev(), theirs.ino()) == (ours.dev(), ours.ino());
        let named = || File::open(path).ok().and_then(|file| FileId::of(&file));
        theirs.is_file() && !is_same && named() == self.id
    }

    /// Keeps the record where only this file's path leads, since the entry is another file's, too.
    fn keep_apart(&self, record: Option<&Record>, other: PathBuf) -> Result<(), RecordStoreError> {
        let Some(record) = record else {
            return Err(RecordStoreError::Shared { image: self.path.clone(), other });
        };
        self.check_path()?;
        self.write_entry_at(self.find()?.own, record)?;
        // Another that is older is not believed any more, but goes with the file.
        let _ = self.write_attribute(Some(record));
        Ok(())
    }

    fn write_entry(&self, record: &Record) -> Result<(), RecordStoreError> {
        if self.id.is_none() {
            self.check_path()?;
        }
        self.write_entry_at(self.find()?.place, record)
    }

    fn write_entry_at(&self, place: PathBuf, record: &Record) -> Result<(), RecordStoreError> {
        let spare = self.spare().take();
        let had_spare = spare.is_some();
        let written = state_file::write(&place, &record.encode(), self.id.as_ref(), spare);
        written.map_err(|source| RecordStoreError::Io { path: place.clone(), source })?;
        if had_spare {
            // For the next. If there is no room for it now, there may be then.
            *self.spare() = Spare::make(&place).ok();
        }
        Ok(())
    }

    fn reserve_entry(&self, is_needed: bool) -> Result<(), RecordStoreError> {
        let directory = state_file::directory_of(&self.usual);
        if !is_needed && !directory.exists() {
            return Ok(());
        }
        self.check_path()?;
        let place = self.find()?.place;
        let spare =
            Spare::make(&place).map_err(|source| RecordStoreError::Io { path: place, source })?;
        *self.spare() = Some(spare);
        Ok(())
    }

    /// A record that is named after the image's path must not be that of another file.
    fn check_path(&self) -> Result<(), RecordStoreError> {
        match self.path_target()? {
            PathTarget::Same => Ok(()),
            named => Err(RecordStoreError::Renamed { path: self.path.clone(), named }),
        }
    }

    fn remove_entry(&self) -> Result<(), RecordStoreError> {
        let found = self.find()?;
        let Some(entry) = found.entry else { return Ok(()) };
        // One that is found by the path alone is that of the file that has the path.
        if !found.certain && matches!(self.path_target()?, PathTarget::Other { .. }) {
            self.check_path()?;
        }
        state_file::remove(&entry.path)
            .map_err(|source| RecordStoreError::Io { path: entry.path, source })
    }

    fn spare(&self) -> MutexGuard<'_, Option<Spare>> {
        sync::lock(&self.spare)
    }
}

/// The two places say different things.
#[derive(Debug, PartialEq, Eq)]
struct Disagreement;

/// Which of an attribute and an entry of the state directory counts; the entry is certainly about
/// this file, or about whatever has its path.
fn which<'a>(
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

/// The record that the image at `path` had at last, if it was deleted when it moved away, and has
/// left a note.
///
/// # Errors
/// When the note cannot be read, or is none that we understand.
pub fn read_tombstone(path: &Path) -> Result<Option<Record>, RecordStoreError> {
    read_tombstone_in(path, &directory_of_note(&absolute(path)?)?)
}

fn read_tombstone_in(path: &Path, state: &Path) -> Result<Option<Record>, RecordStoreError> {
    let image = absolute(path)?;
    let note = beside(&state_file::usual_place(state, &image), NOTE);
    let entry =
        state_file::read(&note).map_err(|source| RecordStoreError::Io { path: note, source })?;
    let decoded = entry.map(|entry| Record::decode(&entry.line)).transpose();
    decoded.map_err(|why| RecordStoreError::Bad { image, why })
}

/// Links are not followed: /dev/mapper/disk stays what it is when /dev/dm-3 does not.
fn absolute(path: &Path) -> Result<PathBuf, RecordStoreError> {
    std::path::absolute(path)
        .map_err(|source| RecordStoreError::Io { path: path.to_owned(), source })
}

/// The same file, whatever its name is now, in an opening of its own; in the same one where there
/// is no /proc.
fn reopen_file(file: &File) -> io::Result<File> {
    let link = format!("/proc/self/fd/{}", file.as_raw_fd());
    OpenOptions::new().read(true).open(link).or_else(|_| file.try_clone())
}

/// Whether this kind of image cannot have attributes at all.
fn is_impossible(error: &io::Error) -> bool {
    use nix::libc::{ENOSYS, EOPNOTSUPP, EPERM};
    matches!(error.raw_os_error(), Some(EOPNOTSUPP | EPERM | ENOSYS))
}

#[cfg(test)]
mod tests;
