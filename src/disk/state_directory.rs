//! Chooses the state directory, which stores ownership records that cannot be extended attributes.
//! Checks whether a record exists; never reads or writes one.
//!
//! Services and root keep records in [`SHARED`]. Other users may not write there and have a state
//! directory of their own (XDG Base Directory Specification, `$XDG_STATE_HOME`). A record in
//! [`SHARED`] takes precedence for every user, since the service may have moved the disk away. So a
//! record stays in one directory as long as it exists, and a user who cannot write there cannot
//! change it.

use super::persistent_id::FileId;
use super::state_entries::{self, default_path, tombstone_path};
use nix::unistd::{Uid, User};
use std::env;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// The state directory of services and of root (`StateDirectory=` of systemd.exec(5)).
pub const SHARED: &str = "/var/lib/flexnbd";
/// The variable by which the service manager, or an operator, sets another directory.
pub const STATE_VARIABLE: &str = "STATE_DIRECTORY";
/// The variable with a user's state directory.
const XDG_STATE_VARIABLE: &str = "XDG_STATE_HOME";
/// The variable with a user's home directory.
const HOME_VARIABLE: &str = "HOME";
/// Default of `$XDG_STATE_HOME`, relative to the home directory.
const HOME_STATE: &str = ".local/state";
/// Our subdirectory of a user's state directory.
const SUBDIRECTORY: &str = "flexnbd";

/// The state directory of `$STATE_DIRECTORY` cannot be searched.
#[derive(Debug)]
pub(super) struct Unsearchable {
    pub(super) directory: PathBuf,
    pub(super) source: io::Error,
}

/// The environment that determines the candidates.
#[derive(Clone, Debug, Default)]
struct StateLocations {
    /// `$STATE_DIRECTORY`, which may list several directories, separated by colons.
    state: Option<OsString>,
    /// `$XDG_STATE_HOME`.
    xdg_state: Option<OsString>,
    /// `$HOME`.
    home: Option<OsString>,
    /// The home directory in the user database.
    account_home: Option<PathBuf>,
    is_root: bool,
}

/// The directories that may contain the record of an image, searched after [`SHARED`].
#[derive(Clone, Debug, PartialEq, Eq)]
struct Candidates {
    /// For new records, best first; the last one takes them when no other can be searched.
    directories: Vec<PathBuf>,
    /// `$STATE_DIRECTORY` sets the directory, so failing to search it is an error.
    is_mandatory: bool,
}

/// The state directory for the record of the image with this absolute path and file id: the one
/// that contains the record, or else the one for new records.
///
/// # Errors
/// When `$STATE_DIRECTORY` cannot be searched.
pub(super) fn directory_of_record(
    image: &Path,
    id: Option<&FileId>,
) -> Result<PathBuf, Unsearchable> {
    choose(&StateLocations::from_environment().candidates(), Path::new(SHARED), |directory| {
        contains_record(&default_path(directory, image), id)
    })
}

/// The state directory for the tombstone of the image at this absolute path.
///
/// # Errors
/// As [`directory_of_record`].
pub(super) fn directory_of_tombstone(image: &Path) -> Result<PathBuf, Unsearchable> {
    choose(&StateLocations::from_environment().candidates(), Path::new(SHARED), |directory| {
        exists(&tombstone_path(&default_path(directory, image)))
    })
}

/// Whether the state directory of `default_path` has a record for this path or file id.
fn contains_record(default_path: &Path, id: Option<&FileId>) -> io::Result<bool> {
    let has_path = exists(default_path)?;
    match state_entries::find(default_path, id, &|_| false) {
        Ok(found) => Ok(found.entry.is_some()),
        // Reading the record reports the error.
        Err(_) => Ok(has_path),
    }
}

impl StateLocations {
    fn from_environment() -> Self {
        let user = Uid::effective();
        let account = if user.is_root() { None } else { User::from_uid(user).ok().flatten() };
        Self {
            state: env::var_os(STATE_VARIABLE),
            xdg_state: env::var_os(XDG_STATE_VARIABLE),
            home: env::var_os(HOME_VARIABLE),
            account_home: account.map(|account| account.dir),
            is_root: user.is_root(),
        }
    }

    fn candidates(&self) -> Candidates {
        let mandatory = self.state.as_ref().and_then(first_path);
        if mandatory.is_some() || self.is_root {
            let is_mandatory = mandatory.is_some();
            let directory = mandatory.unwrap_or_else(|| SHARED.into());
            return Candidates { directories: vec![directory], is_mandatory };
        }
        // The XDG specification ignores relative paths.
        let absolute = |path: &OsString| Some(PathBuf::from(path)).filter(|it| it.is_absolute());
        let state_below = |home: PathBuf| home.join(HOME_STATE);
        let states = [
            self.xdg_state.as_ref().and_then(absolute),
            self.home.as_ref().and_then(absolute).map(state_below),
            self.account_home.clone().map(state_below),
        ];
        let own = states.into_iter().flatten().map(|state| state.join(SUBDIRECTORY));
        Candidates { directories: own.chain([SHARED.into()]).collect(), is_mandatory: false }
    }
}

/// Chooses the directory; `contains` checks whether a directory has the record or tombstone.
fn choose(
    candidates: &Candidates,
    shared: &Path,
    contains: impl Fn(&Path) -> io::Result<bool>,
) -> Result<PathBuf, Unsearchable> {
    if matches!(contains(shared), Ok(true)) {
        return Ok(shared.to_owned());
    }
    let mut for_new = None;
    for directory in &candidates.directories {
        match contains(directory) {
            Ok(true) => return Ok(directory.clone()),
            Ok(false) => {
                for_new.get_or_insert(directory);
            }
            Err(source) if candidates.is_mandatory => {
                return Err(Unsearchable { directory: directory.clone(), source });
            }
            // This user cannot have stored a record there.
            Err(_) => {}
        }
    }
    Ok(for_new.map_or_else(|| shared.to_owned(), Clone::clone))
}

/// Whether the file exists; the error means that its directory cannot be searched. After any other
/// error the file counts as existing, so that reading it reports that error.
fn exists(file: &Path) -> io::Result<bool> {
    use io::ErrorKind::{InvalidFilename, NotADirectory, NotFound, PermissionDenied};
    match fs::symlink_metadata(file) {
        Ok(_) => Ok(true),
        Err(error) => match error.kind() {
            NotFound | NotADirectory | InvalidFilename => Ok(false),
            PermissionDenied => Err(error),
            _ => Ok(true),
        },
    }
}

/// The first non-empty path of a list separated by colons.
fn first_path(list: &OsString) -> Option<PathBuf> {
    env::split_paths(list).find(|one| !one.as_os_str().is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SYSTEM: &str = "/shared";

    fn user() -> StateLocations {
        StateLocations {
            home: Some("/home/u".into()),
            account_home: Some("/account/u".into()),
            ..StateLocations::default()
        }
    }

    fn candidates(locations: &StateLocations) -> Vec<String> {
        locations.candidates().directories.iter().map(|path| path.display().to_string()).collect()
    }

    #[test]
    fn first_path_of_state_directory_variable_wins() {
        for (text, expected) in [("/a:/b", "/a"), (":/b", "/b"), ("/a", "/a")] {
            for is_root in [true, false] {
                let locations = StateLocations { state: Some(text.into()), is_root, ..user() };
                assert_eq!(candidates(&locations), [expected], "{text}");
            }
        }
        let empty = StateLocations { state: Some("".into()), is_root: true, ..user() };
        assert_eq!(candidates(&empty), [SHARED]);
    }

    #[test]
    fn root_keeps_records_in_the_shared_directory() {
        assert_eq!(candidates(&StateLocations { is_root: true, ..user() }), [SHARED]);
    }

    #[test]
    fn users_keep_records_below_their_own_state() {
        let homes = ["/home/u/.local/state/flexnbd", "/account/u/.local/state/flexnbd", SHARED];
        assert_eq!(candidates(&user()), homes);
        let xdg = StateLocations { xdg_state: Some("/x".into()), ..user() };
        assert_eq!(candidates(&xdg)[0], "/x/flexnbd");
        let relative = StateLocations { xdg_state: Some("x".into()), ..user() };
        assert_eq!(candidates(&relative), homes);
        let unset = StateLocations { home: None, ..user() };
        assert_eq!(candidates(&unset), homes[1..]);
        assert_eq!(candidates(&StateLocations::default()), [SHARED], "a user without an account");
    }

    /// The choice when the directories of `holding` contain the record, and those of `closed` cannot
    /// be searched.
    fn chosen(
        locations: &StateLocations,
        holding: &[&str],
        closed: &[&str],
    ) -> Result<String, PathBuf> {
        let is_among =
            |directory: &Path, all: &[&str]| all.iter().any(|it| Path::new(it) == directory);
        let contains = |directory: &Path| {
            let closed = is_among(directory, closed);
            let error = || io::Error::from(io::ErrorKind::PermissionDenied);
            if closed { Err(error()) } else { Ok(is_among(directory, holding)) }
        };
        let chosen = choose(&locations.candidates(), Path::new(SYSTEM), contains);
        chosen.map(|path| path.display().to_string()).map_err(|error| error.directory)
    }

    const HOME: &str = "/home/u/.local/state/flexnbd";
    const ACCOUNT: &str = "/account/u/.local/state/flexnbd";

    #[test]
    fn record_in_the_shared_directory_comes_first() {
        assert_eq!(chosen(&user(), &[SYSTEM, HOME], &[]), Ok(SYSTEM.into()));
        let mandatory = StateLocations { state: Some("/a".into()), ..user() };
        assert_eq!(chosen(&mandatory, &[SYSTEM, "/a"], &[]), Ok(SYSTEM.into()));
    }

    #[test]
    fn existing_record_stays_in_its_directory() {
        assert_eq!(chosen(&user(), &[ACCOUNT], &[]), Ok(ACCOUNT.into()));
        assert_eq!(chosen(&user(), &[], &[]), Ok(HOME.into()));
    }

    #[test]
    fn unsearchable_directories_are_skipped() {
        assert_eq!(chosen(&user(), &[], &[SYSTEM, HOME]), Ok(ACCOUNT.into()));
        assert_eq!(chosen(&user(), &[], &[HOME, ACCOUNT]), Ok(SHARED.into()));
        assert_eq!(chosen(&user(), &[], &[SYSTEM, HOME, ACCOUNT, SHARED]), Ok(SYSTEM.into()));
    }

    #[test]
    fn unsearchable_state_directory_variable_is_an_error() {
        let mandatory = StateLocations { state: Some("/a".into()), ..user() };
        assert_eq!(chosen(&mandatory, &[], &["/a"]), Err("/a".into()));
    }

    #[test]
    fn file_that_cannot_be_examined_counts_as_existing() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        std::fs::write(path("file"), "").unwrap();
        std::os::unix::fs::symlink("loop", path("loop")).unwrap();
        assert!(exists(&path("file")).unwrap());
        assert!(!exists(&path("none")).unwrap());
        assert!(!exists(&path("file/below")).unwrap());
        assert!(!exists(&path(&"x".repeat(300))).unwrap());
        assert!(exists(&path("loop/below")).unwrap(), "too many links");
    }
}
