//! Ownership records in the state directory: one small file, an entry, for each image.
//! Only stores entries; [`super::record_store`] decides when one replaces the extended attribute.
//!
//! An entry is named after the image's absolute path, percent-encoded. Its first line is the record;
//! the second, `of ID`, is the [`FileId`] of the image, if it has one. With the id we find the entry
//! after the image was renamed, and reject it for another file that took over the path. Encoded
//! paths contain no `~`, which marks temporary files, and the entries of further files with one path.

use super::ownership::RECORD_MAX;
use super::persistent_id::{FILE_ID_MAX, FileId};
use nix::fcntl::{AT_FDCWD, AtFlags};
use nix::libc;
use nix::unistd::linkat;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode, percent_encode};
use std::ffi::OsString;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// Characters that are not encoded in the name of an entry.
const UNENCODED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'.').remove(b'-').remove(b'_');
/// Start of the name of every entry: the slash of an absolute path.
const PREFIX: &str = "%2F";
/// Suffix of an entry that is being written.
const NEW_SUFFIX: &str = "~new";
/// Suffix of a preallocated file.
const SPARE_SUFFIX: &str = "~spare";
/// Suffix of a tombstone, which tells what became of a deleted image.
const TOMBSTONE_SUFFIX: &str = ".departed";
/// Prefix of the file with the id of a disk.
const DISK_ID_PREFIX: &str = "disk-";
/// Limit of entries for one path.
const SAME_PATH_MAX: u32 = 100;
/// Start of the second line, before the file id.
const OF: &str = "of ";
/// Longest entry in bytes, line breaks included.
const LENGTH_MAX: usize = RECORD_MAX + OF.len() + FILE_ID_MAX + 1;

/// A record in the state directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct StateEntry {
    pub(super) path: PathBuf,
    /// The line with the record, line break included; the whole content if the entry is damaged.
    pub(super) line: Vec<u8>,
    id: Option<FileId>,
}

impl StateEntry {
    /// Whether it is of the image with this file id; of one without an id, only the path tells.
    pub(super) fn is_of(&self, id: Option<&FileId>) -> bool {
        self.id.as_ref() == id
    }
}

/// The search result for an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct StateFileLookup {
    pub(super) entry: Option<StateEntry>,
    /// The file id of the entry is that of the image; otherwise only the path is.
    pub(super) id_matches: bool,
    /// Path of the entry, or of a new one.
    pub(super) path: PathBuf,
    /// Path of an entry that only the image's path leads to.
    pub(super) own_path: PathBuf,
    /// Another file with the same file id as the image: on file systems such as btrfs a file and its
    /// copy in a snapshot share one.
    pub(super) shared_with: Option<PathBuf>,
    /// The entry of another file that had the image's path.
    pub(super) foreign: Option<PathBuf>,
}

/// Path of the entry for the image at this absolute path, unless another file had the path before.
pub(super) fn default_path(state: &Path, image: &Path) -> PathBuf {
    state.join(percent_encode(image.as_os_str().as_bytes(), UNENCODED).to_string())
}

/// Path of the tombstone for the image with this default path.
pub(super) fn tombstone_path(default_path: &Path) -> PathBuf {
    with_suffix(default_path, TOMBSTONE_SUFFIX)
}

/// Path of the file with the id of the disk, beside the entry at `path`. Its name is not that of an entry.
pub(super) fn disk_id_path(path: &Path) -> PathBuf {
    let mut name = OsString::from(DISK_ID_PREFIX);
    name.push(path.file_name().unwrap_or_default());
    path.with_file_name(name)
}

/// The absolute path of the image with the entry at `path`.
fn image_of(path: &Path) -> Option<PathBuf> {
    let name = path.file_name()?.as_bytes();
    // The rest distinguishes several files with one path.
    let encoded = name.split(|byte| *byte == b'~').next()?;
    let path: Vec<u8> = percent_decode(encoded).collect();
    Some(PathBuf::from(OsString::from_vec(path)))
}

/// Searches for the entry of an image, first by its path, then by its file id. `is_another` checks
/// whether a path leads to another file with the same id.
pub(super) fn find(
    default_path: &Path,
    id: Option<&FileId>,
    is_another: &dyn Fn(&Path) -> bool,
) -> io::Result<StateFileLookup> {
    let (mut path, mut foreign) = (default_path.to_owned(), None);
    for number in 2..=SAME_PATH_MAX {
        let Some(entry) = read(&path)? else { break };
        match (&entry.id, id) {
            (Some(theirs), Some(ours)) if theirs != ours => {
                foreign.get_or_insert(path);
                path = with_suffix(default_path, &format!("~{number}"));
            }
            (theirs, ours) => {
                let id_matches = theirs.is_some() && ours.is_some();
                let (own_path, entry, shared_with) = (path.clone(), Some(entry), None);
                return Ok(StateFileLookup {
                    entry,
                    id_matches,
                    path,
                    own_path,
                    shared_with,
                    foreign,
                });
            }
        }
    }
    let (entry, shared_with) = match id {
        Some(id) => search(directory_of(default_path), id, is_another)?.unzip(),
        None => (None, None),
    };
    let (own_path, shared_with) = (path, shared_with.flatten());
    let path = entry.as_ref().map_or_else(|| own_path.clone(), |entry| entry.path.clone());
    let id_matches = entry.is_some();
    Ok(StateFileLookup { entry, id_matches, path, own_path, shared_with, foreign })
}

/// The entry with this file id, named after any path, and another file with that id that has the
/// path now. Prefers an entry that no other file shares.
fn search(
    state: &Path,
    id: &FileId,
    is_another: &dyn Fn(&Path) -> bool,
) -> io::Result<Option<(StateEntry, Option<PathBuf>)>> {
    let names = match fs::read_dir(state) {
        Ok(entries) => entries,
        // A user without permission to list the directory finds entries by path only.
        Err(error) if is_missing(&error) || is_denied(&error) => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut paths = Vec::new();
    for entry in names {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let temporary = name.ends_with(NEW_SUFFIX) || name.ends_with(SPARE_SUFFIX);
        if name.starts_with(PREFIX) && !temporary && entry.file_type()?.is_file() {
            paths.push(entry.path());
        }
    }
    paths.sort();
    let mut shared = None;
    for path in paths {
        match read(&path) {
            Ok(Some(entry)) if entry.id.as_ref() == Some(id) => {
                let other = image_of(&path).filter(|image| is_another(image));
                if other.is_none() {
                    return Ok(Some((entry, None)));
                }
                shared.get_or_insert((entry, other));
            }
            Err(error) if !is_denied(&error) => return Err(error),
            _ => {}
        }
    }
    Ok(shared)
}

/// The entry at `path`, if there is one.
pub(super) fn read(path: &Path) -> io::Result<Option<StateEntry>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if is_missing(&error) || is_unsearchable(path, &error) => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut bytes = Vec::new();
    // One byte more than the limit, so that a longer entry is damaged rather than truncated.
    file.take(LENGTH_MAX as u64 + 1).read_to_end(&mut bytes)?;
    let (line, id) = match parse(&bytes) {
        Some((line, id)) => (line.to_vec(), Some(id)),
        None => (bytes, None),
    };
    Ok(Some(StateEntry { path: path.to_owned(), line, id }))
}

/// Splits an entry into the record's line and the file id, if it consists of exactly these.
fn parse(bytes: &[u8]) -> Option<(&[u8], FileId)> {
    let end = bytes.iter().position(|byte| *byte == b'\n')? + 1;
    let (line, rest) = bytes.split_at(end);
    let id = std::str::from_utf8(rest).ok()?.strip_prefix(OF)?.strip_suffix('\n')?;
    Some((line, FileId::parse(id)?))
}

/// A preallocated file for the next record, which a full file system cannot refuse then. It has no
/// name, so it disappears with the process; where the file system does not support that it has a
/// name, and replaces the file that a crash has left.
#[derive(Debug)]
pub(super) struct SpareFile {
    file: File,
    path: Option<PathBuf>,
}

impl SpareFile {
    /// Allocates a file for an entry at `path`, durably.
    pub(super) fn create(path: &Path) -> io::Result<Self> {
        let spare = match create_unnamed(directory_of(path)) {
            Ok(file) => Self { file, path: None },
            Err(_) => Self::named(with_suffix(path, SPARE_SUFFIX))?,
        };
        spare.file.write_all_at(&[b' '; LENGTH_MAX], 0)?;
        spare.file.sync_all()?;
        sync_directory(directory_of(path))?;
        Ok(spare)
    }

    fn named(path: PathBuf) -> io::Result<Self> {
        Ok(Self { file: create_new(&path)?, path: Some(path) })
    }

    /// Links a file without a name to `path`. Returns `None` where `/proc` is not mounted.
    fn with_name(self, path: &Path) -> io::Result<Option<Self>> {
        if self.path.is_some() {
            return Ok(Some(self));
        }
        remove_if_there(path)?;
        let link = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        let follow = AtFlags::AT_SYMLINK_FOLLOW;
        match linkat(AT_FDCWD, link.as_str(), AT_FDCWD, path, follow) {
            Ok(()) => Ok(Some(Self { file: self.file.try_clone()?, path: Some(path.to_owned()) })),
            Err(_) => Ok(None),
        }
    }
}

impl Drop for SpareFile {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            // A file that remains is replaced by the next one.
            let _ = fs::remove_file(path);
        }
    }
}

/// Writes an entry at `path`, durably, into `spare` if there is one.
///
/// Writes under a temporary name and renames: a crash leaves the old entry or the new one, never a
/// part.
pub(super) fn write(
    path: &Path,
    line: &str,
    id: Option<&FileId>,
    spare: Option<SpareFile>,
) -> io::Result<()> {
    let text = line.to_owned() + &id.map_or(String::new(), |id| format!("{OF}{}\n", id.as_str()));
    let new = with_suffix(path, NEW_SUFFIX);
    let spare = match spare {
        Some(spare) => spare.with_name(&new)?,
        None => None,
    };
    let spare = spare.map_or_else(|| SpareFile::named(new), Ok)?;
    // Every user that serves the image must read it, even after root adopted it.
    spare.file.set_permissions(Permissions::from_mode(0o644))?;
    spare.file.write_all_at(text.as_bytes(), 0)?;
    spare.file.set_len(text.len() as u64)?;
    spare.file.sync_all()?;
    if let Some(new) = &spare.path {
        fs::rename(new, path)?;
    }
    sync_directory(directory_of(path))
}

/// Makes the entry at `path` durable: its directory entry, since [`write()`] syncs the bytes before
/// the file gets its name.
pub(super) fn sync(path: &Path) -> io::Result<()> {
    match sync_directory(directory_of(path)) {
        // Another user's directory may be searchable but not readable. Journaling file systems make
        // the name durable together with the file.
        Err(error) if is_denied(&error) => File::open(path)?.sync_all(),
        synced => synced,
    }
}

/// Removes the file at `path`, if there is one, durably.
pub(super) fn remove(path: &Path) -> io::Result<()> {
    remove_if_there(path)?;
    sync_directory(directory_of(path))
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if !is_missing(&error) => Err(error),
        _ => Ok(()),
    }
}

/// Creates a file without a name in this directory (`O_TMPFILE` of open(2)).
fn create_unnamed(directory: &Path) -> io::Result<File> {
    fs::create_dir_all(directory)?;
    OpenOptions::new().write(true).custom_flags(libc::O_TMPFILE).open(directory)
}

/// Replaces the file at `path` with a new one, rather than truncate it: a file that a crash has left
/// may belong to another user, and a symbolic link would lead elsewhere.
fn create_new(path: &Path) -> io::Result<File> {
    fs::create_dir_all(directory_of(path))?;
    remove_if_there(path)?;
    OpenOptions::new().write(true).create_new(true).open(path)
}

pub(super) fn directory_of(path: &Path) -> &Path {
    path.parent().unwrap_or(Path::new("/"))
}

/// The path with a suffix appended to its last component.
pub(super) fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.to_owned().into_os_string();
    name.push(suffix);
    name.into()
}

fn sync_directory(directory: &Path) -> io::Result<()> {
    File::open(directory)?.sync_all()
}

fn is_denied(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::PermissionDenied
}

/// Whether the directory of `path` cannot be searched, so that this user has no record in it;
/// [`super::state_directory`] refuses a mandatory directory of this kind before. An entry that exists but
/// cannot be read is an error.
fn is_unsearchable(path: &Path, error: &io::Error) -> bool {
    is_denied(error) && fs::symlink_metadata(path).is_err_and(|error| is_denied(&error))
}

/// Whether the file does not exist; an entry with a name that is too long cannot exist.
fn is_missing(error: &io::Error) -> bool {
    use io::ErrorKind::{InvalidFilename, NotADirectory, NotFound};
    matches!(error.kind(), NotFound | NotADirectory | InvalidFilename)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINE: &str = "flexnbd 1 ours title=adopted\n";

    fn id(text: &str) -> FileId {
        FileId::parse(text).unwrap()
    }

    fn state() -> (tempfile::TempDir, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let path = default_path(&directory.path().join("state"), Path::new("/srv/disk.img"));
        (directory, path)
    }

    fn names(path: &Path) -> Vec<String> {
        let entries = fs::read_dir(directory_of(path)).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[test]
    fn entry_is_found_by_file_id_after_a_rename() {
        let (_directory, path) = state();
        let (one, two) = (id("one"), id("two"));
        write(&path, LINE, Some(&one), None).unwrap();
        assert_eq!(names(&path), ["%2Fsrv%2Fdisk.img"]);
        let found = find(&path, Some(&one), &|_| false).unwrap();
        assert_eq!((found.id_matches, found.entry.unwrap().line), (true, LINE.into()));
        let renamed = with_suffix(&path, "2");
        let found = find(&renamed, Some(&one), &|_| false).unwrap();
        assert_eq!((found.id_matches, &found.path), (true, &path));
        let other = find(&path, Some(&two), &|_| false).unwrap();
        assert_eq!((&other.entry, &other.foreign), (&None, &Some(path.clone())));
        assert_eq!(other.path, with_suffix(&path, "~2"));
        write(&other.path, LINE, Some(&two), None).unwrap();
        for id in [&one, &two] {
            assert!(
                find(&path, Some(id), &|_| false).unwrap().id_matches,
                "each file has its own entry"
            );
        }
    }

    #[test]
    fn entry_without_file_id_is_found_by_path() {
        let (_directory, path) = state();
        write(&path, LINE, None, None).unwrap();
        let one = id("one");
        for ours in [None, Some(&one)] {
            let found = find(&path, ours, &|_| false).unwrap();
            assert_eq!((found.id_matches, found.path), (false, path.clone()));
            assert_eq!(found.entry.unwrap().line, LINE.as_bytes());
        }
        write(&path, LINE, Some(&one), None).unwrap();
        let found = find(&path, None, &|_| false).unwrap();
        assert!(found.entry.is_some() && !found.id_matches);
    }

    #[test]
    fn longest_entry_fits_the_spare_file() {
        let (_directory, path) = state();
        let spare = SpareFile::create(&path).unwrap();
        assert_eq!(spare.file.metadata().unwrap().len(), LENGTH_MAX as u64);
        assert_eq!(
            find(&path, Some(&id("one")), &|_| false).unwrap().entry,
            None,
            "the spare file is no entry"
        );
        let longest = "x".repeat(RECORD_MAX - 1) + "\n";
        let name = id(&"y".repeat(FILE_ID_MAX));
        write(&path, &longest, Some(&name), Some(spare)).unwrap();
        let found = find(&path, Some(&name), &|_| false).unwrap();
        assert_eq!(found.entry.unwrap().line, longest.as_bytes());
        assert_eq!(names(&path).len(), 1);
        // As on a file system without `O_TMPFILE`.
        let spare = SpareFile::named(with_suffix(&path, SPARE_SUFFIX)).unwrap();
        assert_eq!(names(&path).len(), 2);
        write(&path, LINE, None, Some(spare)).unwrap();
        drop(SpareFile::named(with_suffix(&path, SPARE_SUFFIX)).unwrap());
        assert_eq!(names(&path).len(), 1);
        assert_eq!(read(&path).unwrap().unwrap().line, LINE.as_bytes());
    }

    #[test]
    fn damaged_entry_is_read_verbatim() {
        let (_directory, path) = state();
        fs::create_dir(directory_of(&path)).unwrap();
        let long = format!("{LINE}of {}\n", "x".repeat(LENGTH_MAX));
        for text in ["nonsense", "a\nof b c\n", "a\nof b\nc\n", &long] {
            fs::write(&path, text).unwrap();
            let entry = read(&path).unwrap().unwrap();
            assert!(entry.line.starts_with(&text.as_bytes()[..8.min(text.len())]), "{text}");
            assert_eq!(entry.id, None, "{text}");
            assert!(entry.line.len() > LINE.len() || !text.starts_with(LINE));
        }
    }

    #[test]
    fn temporary_file_of_a_crash_is_replaced() {
        let (_directory, path) = state();
        let left = with_suffix(&path, NEW_SUFFIX);
        fs::create_dir(directory_of(&path)).unwrap();
        fs::write(&left, "half of").unwrap();
        fs::set_permissions(&left, Permissions::from_mode(0o400)).unwrap();
        write(&path, LINE, None, None).unwrap();
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!((mode & 0o777, left.exists()), (0o644, false));
    }
}
