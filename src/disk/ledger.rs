//! Where the ownership record of an image is kept, durably: beside its bytes, or in a file.
//! Only keeps it; what it means is decided in [`super::ownership`].
//!
//! A regular file carries its record as the extended attribute `user.flexnbd`, so that it moves
//! and dies with the file. Where that is impossible (block devices, some file systems) it is a
//! file in the state directory, named after the image's absolute path with every byte but
//! letters, digits, `.`, `-` and `_` written as `%` and two hexadecimal digits.

use super::ownership::{BadRecord, RECORD_MAX, Record};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_encode};
use std::fmt;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use xattr::FileExt;

/// Name of the extended attribute.
pub const ATTRIBUTE: &str = "user.flexnbd";
/// Name of an attribute that is set and removed again, to see whether that can be done.
const PROBE: &str = "user.flexnbd.probe";
/// What a record's file name shows as it is.
const PLAIN: &AsciiSet = &NON_ALPHANUMERIC.remove(b'.').remove(b'-').remove(b'_');

/// The record of one image.
#[derive(Debug)]
pub struct Ledger {
    image: File,
    /// The image's absolute path.
    path: PathBuf,
    /// Where the record is, if it is not an attribute.
    file: PathBuf,
    /// Whether a deleted image leaves a note behind.
    leaves_note: bool,
}

/// What follows the name of a record's file in that of a note about an image that was deleted.
pub(super) const NOTE: &str = ".departed";

/// Why a record cannot be used.
#[derive(Debug)]
pub enum LedgerError {
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
}

impl fmt::Display for LedgerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io { path, source } => {
                write!(f, "cannot keep the ownership record at {}: {source}", path.display())
            }
            Self::Bad { image, why } => write!(f, "{}: {why}", image.display()),
        }
    }
}

impl std::error::Error for LedgerError {}

impl Ledger {
    /// The ledger of the image at `path`; `state` is the directory for records that cannot be
    /// attributes, and need not exist yet.
    ///
    /// # Errors
    /// When there is no such image, or it cannot be read.
    pub fn open(path: &Path, state: &Path) -> Result<Self, LedgerError> {
        let failed = |source| LedgerError::Io { path: path.to_owned(), source };
        let (absolute, file) = places(path, state)?;
        let image = OpenOptions::new().read(true).open(&absolute).map_err(failed)?;
        Ok(Self { image, path: absolute, file, leaves_note: false })
    }

    /// From now on an image that is deleted leaves a note behind, for [`gone`]. For those who make
    /// a missing image anew (`--create`): a disk that has moved away must not come back empty; and
    /// for services, whose sockets must not wait for clients any more.
    pub fn leave_note(&mut self) {
        self.leaves_note = true;
    }

    /// The record, if there is one.
    ///
    /// It is made durable before it is believed: whoever wrote it may have been killed before it
    /// was, and what is done on the strength of it must not be taken back by a power cut.
    ///
    /// # Errors
    /// When it cannot be read, or is none that we understand.
    pub fn read(&self) -> Result<Option<Record>, LedgerError> {
        let record = self.peek()?;
        if record.is_some() {
            self.settle()?;
        }
        Ok(record)
    }

    /// The record as it is just now, perhaps not durable yet; for showing, not for acting on.
    ///
    /// # Errors
    /// As [`Ledger::read`].
    pub fn peek(&self) -> Result<Option<Record>, LedgerError> {
        let attribute = match self.image.get_xattr(ATTRIBUTE) {
            Ok(attribute) => attribute,
            Err(error) if is_impossible(&error) => None,
            Err(source) => return Err(LedgerError::Io { path: self.path.clone(), source }),
        };
        let bytes = match attribute {
            Some(bytes) => Some(bytes),
            None => self.read_file()?,
        };
        let decoded = bytes.as_deref().map(Record::decode).transpose();
        decoded.map_err(|why| LedgerError::Bad { image: self.path.clone(), why })
    }

    /// Makes `record` the record, durably; none removes it.
    ///
    /// # Errors
    /// When it cannot be kept in either place. What is kept then is the old record or the new.
    pub fn write(&self, record: Option<&Record>) -> Result<(), LedgerError> {
        match self.write_attribute(record) {
            Ok(()) => self.remove_file(),
            Err(error) if is_impossible(&error) => match record {
                Some(record) => self.write_file(record),
                None => self.remove_file(),
            },
            Err(source) => Err(LedgerError::Io { path: self.path.clone(), source }),
        }
    }

    /// Whether a record can be kept at all, found out without making anything durable, which can
    /// take long.
    ///
    /// # Errors
    /// Why not.
    pub fn check(&self) -> Result<(), LedgerError> {
        let tried = self.image.set_xattr(PROBE, b"").and_then(|()| self.image.remove_xattr(PROBE));
        match tried {
            Err(error) if is_impossible(&error) => {
                let failed = |source| LedgerError::Io { path: self.file.clone(), source };
                fs::create_dir_all(self.directory()).map_err(failed)?;
                let probe = self.beside(".probe");
                create_afresh(&probe).and_then(|_| fs::remove_file(&probe)).map_err(failed)
            }
            tried => tried.map_err(|source| LedgerError::Io { path: self.path.clone(), source }),
        }
    }

    /// Deletes the image, durably, with its record; `last`, if it is wanted, says in a note what
    /// became of it.
    ///
    /// # Errors
    /// What the kernel says; a missing image counts as deleted.
    pub fn unlink_image(&self, last: Option<&Record>) -> Result<(), LedgerError> {
        if let Some(record) = last.filter(|_| self.leaves_note) {
            // First: in between, the image's own record still tells what is going on.
            write_durably(&self.beside(NOTE), record)?;
        }
        remove_durably(&self.path)?;
        self.remove_file()
    }

    /// Removes the note about an image that was here before this one.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn forget_note(&self) -> Result<(), LedgerError> {
        let note = self.beside(NOTE);
        if note.exists() { remove_durably(&note) } else { Ok(()) }
    }

    /// Makes the record durable that is there now, in whichever place it is.
    fn settle(&self) -> Result<(), LedgerError> {
        if self.file.exists() {
            // The bytes were durable before the file got its name.
            let failed = |source| LedgerError::Io { path: self.file.clone(), source };
            match sync_directory(self.directory()) {
                // Another user's, which can be searched and not be read. File systems that keep a
                // journal write the name along with the file.
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                    File::open(&self.file).and_then(|file| file.sync_all()).map_err(failed)?;
                }
                synced => synced.map_err(failed)?,
            }
        }
        match self.image.sync_all() {
            // What cannot be written to cannot lose it either.
            Err(error) if error.kind() == io::ErrorKind::ReadOnlyFilesystem => Ok(()),
            settled => {
                settled.map_err(|source| LedgerError::Io { path: self.path.clone(), source })
            }
        }
    }

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

    fn read_file(&self) -> Result<Option<Vec<u8>>, LedgerError> {
        read_bytes(&self.file)
    }

    fn write_file(&self, record: &Record) -> Result<(), LedgerError> {
        write_durably(&self.file, record)
    }

    fn directory(&self) -> &Path {
        directory_of(&self.file)
    }

    fn beside(&self, suffix: &str) -> PathBuf {
        beside(&self.file, suffix)
    }

    fn remove_file(&self) -> Result<(), LedgerError> {
        if self.file.exists() { remove_durably(&self.file) } else { Ok(()) }
    }
}

/// The record that the image at `path` had at last, if it was deleted when it moved away, and has
/// left a note; `state` as in [`Ledger::open`].
///
/// # Errors
/// When the note cannot be read, or is none that we understand.
pub fn gone(path: &Path, state: &Path) -> Result<Option<Record>, LedgerError> {
    let (image, file) = places(path, state)?;
    let bytes = read_bytes(&beside(&file, NOTE))?;
    let decoded = bytes.as_deref().map(Record::decode).transpose();
    decoded.map_err(|why| LedgerError::Bad { image, why })
}

/// The absolute path of an image, and where its record is if that is no attribute.
pub(super) fn places(path: &Path, state: &Path) -> Result<(PathBuf, PathBuf), LedgerError> {
    // Links are not followed: /dev/mapper/disk stays what it is when /dev/dm-3 does not.
    let absolute = std::path::absolute(path)
        .map_err(|source| LedgerError::Io { path: path.to_owned(), source })?;
    let name = percent_encode(absolute.as_os_str().as_bytes(), PLAIN).to_string();
    Ok((absolute, state.join(name)))
}

fn read_bytes(path: &Path) -> Result<Option<Vec<u8>>, LedgerError> {
    let failed = |source| LedgerError::Io { path: path.to_owned(), source };
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if is_missing(&error) || is_out_of_sight(path, &error) => return Ok(None),
        Err(source) => return Err(failed(source)),
    };
    let mut bytes = Vec::new();
    // One byte more than a record has, so that a longer one is seen to be damaged.
    file.take(RECORD_MAX as u64 + 1).read_to_end(&mut bytes).map_err(failed)?;
    Ok(Some(bytes))
}

/// Under another name first: a crash leaves the old record or the new one, never half of one.
fn write_durably(path: &Path, record: &Record) -> Result<(), LedgerError> {
    let failed = |source| LedgerError::Io { path: path.to_owned(), source };
    let directory = directory_of(path);
    fs::create_dir_all(directory).map_err(failed)?;
    let name = beside(path, ".new");
    let written = create_afresh(&name).and_then(|mut file| {
        // For whoever serves the image, even if root was the last to adopt it.
        file.set_permissions(Permissions::from_mode(0o644))?;
        file.write_all(record.encode().as_bytes())?;
        file.sync_all()
    });
    written.and_then(|()| fs::rename(&name, path)).map_err(failed)?;
    sync_directory(directory).map_err(failed)
}

/// A new file. One that a crash has left may be another user's, and what else is there may be a
/// link that leads elsewhere.
fn create_afresh(path: &Path) -> io::Result<File> {
    match fs::remove_file(path) {
        Err(error) if !is_missing(&error) => return Err(error),
        _ => {}
    }
    OpenOptions::new().write(true).create_new(true).open(path)
}

fn directory_of(path: &Path) -> &Path {
    path.parent().unwrap_or(Path::new("/"))
}

/// The path with something appended to its last name.
pub(super) fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.to_owned().into_os_string();
    name.push(suffix);
    name.into()
}

fn remove_durably(path: &Path) -> Result<(), LedgerError> {
    let failed = |source| LedgerError::Io { path: path.to_owned(), source };
    match fs::remove_file(path) {
        Err(error) if !is_missing(&error) => return Err(failed(error)),
        _ => {}
    }
    sync_directory(path.parent().unwrap_or(Path::new("/"))).map_err(failed)
}

fn sync_directory(directory: &Path) -> io::Result<()> {
    File::open(directory)?.sync_all()
}

/// A name that is too long for the state directory cannot have been written there.
fn is_missing(error: &io::Error) -> bool {
    use io::ErrorKind::{InvalidFilename, NotADirectory, NotFound};
    matches!(error.kind(), NotFound | NotADirectory | InvalidFilename)
}

/// Whether the directory cannot even be searched. Then no record of this user's is in it: one that
/// has to be heeded is refused before (`super::state`). A record that can be seen and not be read
/// is another matter.
fn is_out_of_sight(path: &Path, error: &io::Error) -> bool {
    let is_denied = |error: &io::Error| error.kind() == io::ErrorKind::PermissionDenied;
    is_denied(error) && fs::symlink_metadata(path).is_err_and(|error| is_denied(&error))
}

/// Whether this kind of image cannot have attributes at all.
fn is_impossible(error: &io::Error) -> bool {
    use nix::libc::{EOPNOTSUPP, EPERM};
    matches!(error.raw_os_error(), Some(EOPNOTSUPP | EPERM))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::ownership::Title;

    fn image() -> (tempfile::TempDir, PathBuf) {
        let directory = tempfile::tempdir_in("/var/tmp").unwrap();
        let path = directory.path().join("disk.img");
        fs::write(&path, [0; 4096]).unwrap();
        (directory, path)
    }

    const OURS: Record = Record::Ours(Title::Adopted);
    const INCOMING: Record = Record::Incoming { id: None };

    #[test]
    fn a_record_is_read_back_by_whoever_opens_the_image_next() {
        let (directory, path) = image();
        let ledger = Ledger::open(&path, directory.path()).unwrap();
        assert_eq!(ledger.read().unwrap(), None);
        for record in [Some(&OURS), Some(&INCOMING), None] {
            ledger.write(record).unwrap();
            let other = Ledger::open(&path, directory.path()).unwrap();
            assert_eq!(other.read().unwrap().as_ref(), record);
        }
    }

    #[test]
    fn a_record_in_a_file_counts_where_there_is_no_attribute_and_is_replaced_whole() {
        let (directory, path) = image();
        let state = directory.path().join("state/flexnbd");
        let ledger = Ledger::open(&path, &state).unwrap();
        ledger.write_file(&INCOMING).unwrap();
        assert_eq!(ledger.read().unwrap(), Some(INCOMING));
        ledger.write_file(&OURS).unwrap();
        assert_eq!(ledger.read().unwrap(), Some(OURS));
        assert_eq!(fs::read_dir(&state).unwrap().count(), 1);
        ledger.remove_file().unwrap();
        assert_eq!(ledger.read().unwrap(), None);
    }

    #[test]
    fn a_record_in_a_file_can_be_read_by_others_than_its_writer() {
        let (directory, path) = image();
        let ledger = Ledger::open(&path, directory.path()).unwrap();
        let left = ledger.beside(".new");
        fs::write(&left, "half of").unwrap();
        fs::set_permissions(&left, Permissions::from_mode(0o400)).unwrap();
        ledger.write_file(&OURS).unwrap();
        let mode = fs::metadata(&ledger.file).unwrap().permissions().mode();
        assert_eq!((mode & 0o777, left.exists()), (0o644, false));
    }

    #[test]
    fn what_is_no_record_is_an_error_and_not_none() {
        let (directory, path) = image();
        let ledger = Ledger::open(&path, directory.path()).unwrap();
        fs::write(&ledger.file, "nonsense").unwrap();
        assert!(matches!(ledger.read(), Err(LedgerError::Bad { .. })));
        fs::write(&ledger.file, [b'x'; RECORD_MAX + 9]).unwrap();
        assert!(matches!(ledger.read(), Err(LedgerError::Bad { .. })));
    }

    #[test]
    fn whether_a_record_can_be_kept_is_found_out_without_leaving_one() {
        let (directory, path) = image();
        let ledger = Ledger::open(&path, &directory.path().join("state")).unwrap();
        ledger.check().unwrap();
        assert_eq!(ledger.read().unwrap(), None);
        assert_eq!(ledger.image.list_xattr().unwrap().count(), 0);
    }

    #[test]
    fn an_unlinked_image_is_gone_with_its_record() {
        let (directory, path) = image();
        let ledger = Ledger::open(&path, directory.path()).unwrap();
        ledger.write_file(&OURS).unwrap();
        ledger.unlink_image(Some(&OURS)).unwrap();
        assert!(!path.exists() && !ledger.file.exists());
        ledger.unlink_image(Some(&OURS)).unwrap();
        assert_eq!(gone(&path, directory.path()).unwrap(), None, "nobody wanted a note");
    }

    #[test]
    fn an_unlinked_image_can_leave_a_note_that_is_no_record_of_the_next_one() {
        let (directory, path) = image();
        let state = directory.path().join("state");
        let mut ledger = Ledger::open(&path, &state).unwrap();
        ledger.leave_note();
        ledger.unlink_image(Some(&OURS)).unwrap();
        assert_eq!(gone(&path, &state).unwrap(), Some(OURS));
        fs::write(&path, [0; 4096]).unwrap();
        let next = Ledger::open(&path, &state).unwrap();
        assert_eq!(next.read().unwrap(), None);
        next.forget_note().unwrap();
        assert_eq!(gone(&path, &state).unwrap(), None);
        next.forget_note().unwrap();
    }

    #[test]
    fn a_path_too_long_for_a_record_has_none() {
        let (directory, _) = image();
        let long = directory.path().join("d".repeat(250));
        fs::create_dir(&long).unwrap();
        fs::write(long.join("disk.img"), [0; 4096]).unwrap();
        let ledger = Ledger::open(&long.join("disk.img"), directory.path()).unwrap();
        assert_eq!(ledger.read_file().unwrap(), None);
        assert!(ledger.write_file(&OURS).is_err());
    }
}
