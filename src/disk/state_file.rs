//! Ownership records in the state directory: one small file for each image.
//! Only keeps them; when they are used instead of an attribute is decided in [`super::record_store`].
//!
//! A file is named after the image's absolute path. Its first line is the record; the second,
//! `of ID`, is the lasting name ([`FileId`]) of the file or device that it is about, where there is
//! one. So it is found again when the image was renamed, and not believed of another file that got
//! the path. `~` is in no encoded path: names with it are ours to use for what is temporary, and
//! for the record of a second file of one path.

use super::file_id::{FILE_ID_MAX, FileId};
use super::ownership::RECORD_MAX;
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

/// What the name of a file shows as it is.
const PLAIN: &AsciiSet = &NON_ALPHANUMERIC.remove(b'.').remove(b'-').remove(b'_');
/// What all names begin with: the slash of an absolute path.
const FIRST: &str = "%2F";
/// What follows the name of a record that is being written.
const NEW: &str = "~new";
/// What follows the name of a file that holds the room for a record.
const SPARE: &str = "~spare";
/// How many files of one path can have a record at the same time.
const SAME_PATH_MAX: u32 = 100;
/// Before the lasting name, on the second line.
const OF: &str = "of ";
/// Longest file in bytes, line breaks included.
const LENGTH_MAX: usize = RECORD_MAX + OF.len() + FILE_ID_MAX + 1;

/// A record in the state directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct StateEntry {
    pub(super) path: PathBuf,
    /// The line that is the record, with its end; or all there is, if that is none.
    pub(super) line: Vec<u8>,
    id: Option<FileId>,
}

/// What the state directory has for an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct StateFileLookup {
    pub(super) entry: Option<StateEntry>,
    /// The entry is about this very file, rather than about whatever has its path.
    pub(super) certain: bool,
    /// Where the record is, or would be.
    pub(super) place: PathBuf,
    /// Where it would be if it had to be found by the image's path.
    pub(super) own: PathBuf,
    /// Another file that the entry is about, too: file systems such as btrfs give a file and its
    /// copy in a snapshot the same lasting name.
    pub(super) shared_with: Option<PathBuf>,
    /// A record of another file that had the image's path.
    pub(super) foreign: Option<PathBuf>,
}

/// Where the record of the image at that absolute path is, if no other file had the path before.
pub(super) fn usual_place(state: &Path, image: &Path) -> PathBuf {
    state.join(percent_encode(image.as_os_str().as_bytes(), PLAIN).to_string())
}

/// The absolute path of the image whose record is at `place`.
fn image_of(place: &Path) -> Option<PathBuf> {
    let name = place.file_name()?.as_bytes();
    // What follows tells several files of one path apart.
    let encoded = name.split(|byte| *byte == b'~').next()?;
    let path: Vec<u8> = percent_decode(encoded).collect();
    Some(PathBuf::from(OsString::from_vec(path)))
}

/// What there is for the image whose usual place and lasting name these are. `is_another` tells
/// whether a path leads to another file of that name.
pub(super) fn find(
    usual: &Path,
    id: Option<&FileId>,
    is_another: &dyn Fn(&Path) -> bool,
) -> io::Result<StateFileLookup> {
    let (mut place, mut foreign) = (usual.to_owned(), None);
    for number in 2..=SAME_PATH_MAX {
        let Some(entry) = read(&place)? else { break };
        match (&entry.id, id) {
            (Some(theirs), Some(ours)) if theirs != ours => {
                foreign.get_or_insert(place);
                place = beside(usual, &format!("~{number}"));
            }
            (theirs, ours) => {
                let certain = theirs.is_some() && ours.is_some();
                let (own, entry, shared_with) = (place.clone(), Some(entry), None);
                return Ok(StateFileLookup { entry, certain, place, own, shared_with, foreign });
            }
        }
    }
    let (entry, shared_with) = match id {
        Some(id) => search(directory_of(usual), id, is_another)?.unzip(),
        None => (None, None),
    };
    let (own, shared_with) = (place, shared_with.flatten());
    let place = entry.as_ref().map_or_else(|| own.clone(), |entry| entry.path.clone());
    Ok(StateFileLookup { certain: entry.is_some(), entry, place, own, shared_with, foreign })
}

/// The entry about the file of that lasting name, whatever path it had, and the other file of that
/// name that is at that path now. One that no other file has goes first.
fn search(
    state: &Path,
    id: &FileId,
    is_another: &dyn Fn(&Path) -> bool,
) -> io::Result<Option<(StateEntry, Option<PathBuf>)>> {
    let names = match fs::read_dir(state) {
        Ok(entries) => entries,
        // Users other than root may not list what is there; it is found by its path alone then.
        Err(error) if is_missing(&error) || is_denied(&error) => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut paths = Vec::new();
    for entry in names {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let temporary = name.ends_with(NEW) || name.ends_with(SPARE);
        if name.starts_with(FIRST) && !temporary && entry.file_type()?.is_file() {
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
        Err(error) if is_missing(&error) || is_out_of_sight(path, &error) => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut bytes = Vec::new();
    // One byte more than an entry has, so that a longer one is seen to be damaged.
    file.take(LENGTH_MAX as u64 + 1).read_to_end(&mut bytes)?;
    let (line, id) = match parse(&bytes) {
        Some((line, id)) => (line.to_vec(), Some(id)),
        None => (bytes, None),
    };
    Ok(Some(StateEntry { path: path.to_owned(), line, id }))
}

/// The record's line and the lasting name, if there are both and nothing else.
fn parse(bytes: &[u8]) -> Option<(&[u8], FileId)> {
    let end = bytes.iter().position(|byte| *byte == b'\n')? + 1;
    let (line, rest) = bytes.split_at(end);
    let id = std::str::from_utf8(rest).ok()?.strip_prefix(OF)?.strip_suffix('\n')?;
    Some((line, FileId::parse(id)?))
}

/// Room for a record, kept free of other use: a file that already has its largest size. The file
/// has no name, so that it goes with the process; where the file system cannot do that it has one,
/// and the next such file replaces what a crash has left.
#[derive(Debug)]
pub(super) struct Spare {
    file: File,
    path: Option<PathBuf>,
}

impl Spare {
    /// Room for a record at `place`, durably.
    pub(super) fn make(place: &Path) -> io::Result<Self> {
        let spare = match create_unnamed(directory_of(place)) {
            Ok(file) => Self { file, path: None },
            Err(_) => Self::named(beside(place, SPARE))?,
        };
        spare.file.write_all_at(&[b' '; LENGTH_MAX], 0)?;
        spare.file.sync_all()?;
        sync_directory(directory_of(place))?;
        Ok(spare)
    }

    fn named(path: PathBuf) -> io::Result<Self> {
        Ok(Self { file: create_afresh(&path)?, path: Some(path) })
    }

    /// The same with this name, if it has none. `None` where there is no `/proc`.
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

impl Drop for Spare {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            // One that stays is replaced by the next.
            let _ = fs::remove_file(path);
        }
    }
}

/// Makes `line` the record at `place`, durably, in the room of `spare` if there is one.
///
/// Under another name first: a crash leaves the old record or the new one, never half of one.
pub(super) fn write(
    place: &Path,
    line: &str,
    id: Option<&FileId>,
    spare: Option<Spare>,
) -> io::Result<()> {
    let text = line.to_owned() + &id.map_or(String::new(), |id| format!("{OF}{}\n", id.as_str()));
    let new = beside(place, NEW);
    let spare = match spare {
        Some(spare) => spare.with_name(&new)?,
        None => None,
    };
    let spare = spare.map_or_else(|| Spare::named(new), Ok)?;
    // For whoever serves the image, even if root was the last to adopt it.
    spare.file.set_permissions(Permissions::from_mode(0o644))?;
    spare.file.write_all_at(text.as_bytes(), 0)?;
    spare.file.set_len(text.len() as u64)?;
    spare.file.sync_all()?;
    if let Some(path) = &spare.path {
        fs::rename(path, place)?;
    }
    sync_directory(directory_of(place))
}

/// Makes the record durable that is at `path`: its bytes were before it got its name.
pub(super) fn settle(path: &Path) -> io::Result<()> {
    match sync_directory(directory_of(path)) {
        // Another user's, which can be searched and not be read. File systems that keep a journal
        // write the name along with the file.
        Err(error) if is_denied(&error) => File::open(path)?.sync_all(),
        synced => synced,
    }
}

/// Removes what is there, durably.
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

/// A new file without a name, in that directory (`O_TMPFILE` of open(2)).
fn create_unnamed(directory: &Path) -> io::Result<File> {
    fs::create_dir_all(directory)?;
    OpenOptions::new().write(true).custom_flags(libc::O_TMPFILE).open(directory)
}

/// A new file. One that a crash has left may be another user's, and what else is there may be a
/// link that leads elsewhere.
fn create_afresh(path: &Path) -> io::Result<File> {
    fs::create_dir_all(directory_of(path))?;
    remove_if_there(path)?;
    OpenOptions::new().write(true).create_new(true).open(path)
}

pub(super) fn directory_of(path: &Path) -> &Path {
    path.parent().unwrap_or(Path::new("/"))
}

/// The path with something appended to its last name.
pub(super) fn beside(path: &Path, suffix: &str) -> PathBuf {
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

/// Whether the directory cannot even be searched. Then no record of this user's is in it: one that
/// has to be heeded is refused before ([`super::state`]). A record that can be seen and not be read
/// is another matter.
fn is_out_of_sight(path: &Path, error: &io::Error) -> bool {
    is_denied(error) && fs::symlink_metadata(path).is_err_and(|error| is_denied(&error))
}

/// A name that is too long for the state directory cannot have been written there.
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
        let usual = usual_place(&directory.path().join("state"), Path::new("/srv/disk.img"));
        (directory, usual)
    }

    fn names(usual: &Path) -> Vec<String> {
        let entries = fs::read_dir(directory_of(usual)).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[test]
    fn a_record_is_found_by_the_lasting_name_of_its_file() {
        let (_directory, usual) = state();
        let (one, two) = (id("one"), id("two"));
        write(&usual, LINE, Some(&one), None).unwrap();
        assert_eq!(names(&usual), ["%2Fsrv%2Fdisk.img"]);
        let found = find(&usual, Some(&one), &|_| false).unwrap();
        assert_eq!((found.certain, found.entry.unwrap().line), (true, LINE.into()));
        let renamed = beside(&usual, "2");
        let found = find(&renamed, Some(&one), &|_| false).unwrap();
        assert_eq!((found.certain, &found.place), (true, &usual));
        let other = find(&usual, Some(&two), &|_| false).unwrap();
        assert_eq!((&other.entry, &other.foreign), (&None, &Some(usual.clone())));
        assert_eq!(other.place, beside(&usual, "~2"));
        write(&other.place, LINE, Some(&two), None).unwrap();
        for id in [&one, &two] {
            assert!(find(&usual, Some(id), &|_| false).unwrap().certain, "each has its own");
        }
    }

    #[test]
    fn without_lasting_names_the_path_counts() {
        let (_directory, usual) = state();
        write(&usual, LINE, None, None).unwrap();
        let one = id("one");
        for ours in [None, Some(&one)] {
            let found = find(&usual, ours, &|_| false).unwrap();
            assert_eq!((found.certain, found.place), (false, usual.clone()));
            assert_eq!(found.entry.unwrap().line, LINE.as_bytes());
        }
        write(&usual, LINE, Some(&one), None).unwrap();
        let found = find(&usual, None, &|_| false).unwrap();
        assert!(found.entry.is_some() && !found.certain);
    }

    #[test]
    fn a_record_fits_the_room_that_was_kept_for_it() {
        let (_directory, usual) = state();
        let spare = Spare::make(&usual).unwrap();
        assert_eq!(spare.file.metadata().unwrap().len(), LENGTH_MAX as u64);
        assert_eq!(
            find(&usual, Some(&id("one")), &|_| false).unwrap().entry,
            None,
            "room is no record"
        );
        let longest = "x".repeat(RECORD_MAX - 1) + "\n";
        let name = id(&"y".repeat(FILE_ID_MAX));
        write(&usual, &longest, Some(&name), Some(spare)).unwrap();
        let found = find(&usual, Some(&name), &|_| false).unwrap();
        assert_eq!(found.entry.unwrap().line, longest.as_bytes());
        assert_eq!(names(&usual).len(), 1);
        // As where a file cannot be without a name.
        let spare = Spare::named(beside(&usual, SPARE)).unwrap();
        assert_eq!(names(&usual).len(), 2);
        write(&usual, LINE, None, Some(spare)).unwrap();
        drop(Spare::named(beside(&usual, SPARE)).unwrap());
        assert_eq!(names(&usual).len(), 1);
        assert_eq!(read(&usual).unwrap().unwrap().line, LINE.as_bytes());
    }

    #[test]
    fn what_is_no_entry_is_read_as_it_is() {
        let (_directory, usual) = state();
        fs::create_dir(directory_of(&usual)).unwrap();
        let long = format!("{LINE}of {}\n", "x".repeat(LENGTH_MAX));
        for text in ["nonsense", "a\nof b c\n", "a\nof b\nc\n", &long] {
            fs::write(&usual, text).unwrap();
            let entry = read(&usual).unwrap().unwrap();
            assert!(entry.line.starts_with(&text.as_bytes()[..8.min(text.len())]), "{text}");
            assert_eq!(entry.id, None, "{text}");
            assert!(entry.line.len() > LINE.len() || !text.starts_with(LINE));
        }
    }

    #[test]
    fn a_file_left_by_a_crash_is_replaced_and_readable_by_others() {
        let (_directory, usual) = state();
        let left = beside(&usual, NEW);
        fs::create_dir(directory_of(&usual)).unwrap();
        fs::write(&left, "half of").unwrap();
        fs::set_permissions(&left, Permissions::from_mode(0o400)).unwrap();
        write(&usual, LINE, None, None).unwrap();
        let mode = fs::metadata(&usual).unwrap().permissions().mode();
        assert_eq!((mode & 0o777, left.exists()), (0o644, false));
    }
}
