//! Where ownership records are kept that cannot be attributes of their image: the state directory.
//! Looks whether a record is there; never reads or writes one.
//!
//! Services and root keep records in [`SHARED`]. Other users may not write there, and have a state
//! directory of their own (XDG Base Directory Specification, `$XDG_STATE_HOME`). A record in
//! [`SHARED`] comes first for every user: the disk may have been moved away by the service. So a
//! record has one place for as long as it exists, and a user who cannot write there cannot change
//! it.

use super::file_id::FileId;
use super::record_store::{NOTE, RecordStoreError};
use super::state_file::{self, beside, usual_place};
use nix::unistd::{Uid, User};
use std::env;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// The state directory of services and of root (`StateDirectory=` of systemd.exec(5)).
pub const SHARED: &str = "/var/lib/flexnbd";
/// The variable by which the service manager, or an operator, names another one.
pub const STATE_VARIABLE: &str = "STATE_DIRECTORY";
/// The variable that names a user's directory for state.
const XDG_STATE_VARIABLE: &str = "XDG_STATE_HOME";
/// The variable that names a user's home directory.
const HOME_VARIABLE: &str = "HOME";
/// Where a user's state is below the home directory, unless `$XDG_STATE_HOME` says otherwise.
const HOME_STATE: &str = ".local/state";
/// Our part of a user's state.
const OURS: &str = "flexnbd";

/// What decides where records are kept.
#[derive(Clone, Debug, Default)]
struct StateLocations {
    /// `$STATE_DIRECTORY`, which may name several, separated by colons.
    state: Option<OsString>,
    /// `$XDG_STATE_HOME`.
    xdg_state: Option<OsString>,
    /// `$HOME`.
    home: Option<OsString>,
    /// The home directory in the user database.
    account_home: Option<PathBuf>,
    is_root: bool,
}

/// The directories that can hold the record of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Candidates {
    /// An order that must be obeyed, so that a directory that cannot be searched is an error.
    ordered: Option<PathBuf>,
    /// For new records, best first; the last one takes them when no other can be searched.
    own: Vec<PathBuf>,
}

/// The state directory for the record of the image at this absolute path, or of that lasting name:
/// the one that holds it, or else the one for new records.
///
/// # Errors
/// When `$STATE_DIRECTORY` cannot be searched.
pub(super) fn directory_of_record(
    image: &Path,
    id: Option<&FileId>,
) -> Result<PathBuf, RecordStoreError> {
    choose(&StateLocations::here().candidates(), Path::new(SHARED), |directory| {
        holds_record(&usual_place(directory, image), id)
    })
}

/// The same for the note about an image that was deleted ([`super::record_store::read_tombstone`]).
///
/// # Errors
/// As [`directory_of_record`].
pub(super) fn directory_of_note(image: &Path) -> Result<PathBuf, RecordStoreError> {
    choose(&StateLocations::here().candidates(), Path::new(SHARED), |directory| {
        is_there(&beside(&usual_place(directory, image), NOTE))
    })
}

/// Whether there is a record of the image whose usual place and lasting name these are.
fn holds_record(usual: &Path, id: Option<&FileId>) -> io::Result<bool> {
    let has_path = is_there(usual)?;
    match state_file::find(usual, id, &|_| false) {
        Ok(found) => Ok(found.entry.is_some()),
        // To read it will tell why.
        Err(_) => Ok(has_path),
    }
}

impl StateLocations {
    fn here() -> Self {
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
        let ordered = self.state.as_ref().and_then(first);
        if ordered.is_some() || self.is_root {
            let own = ordered.clone().unwrap_or_else(|| SHARED.into());
            return Candidates { ordered, own: vec![own] };
        }
        // The specification ignores relative paths.
        let absolute = |path: &OsString| Some(PathBuf::from(path)).filter(|it| it.is_absolute());
        let below = |home: PathBuf| home.join(HOME_STATE);
        let homes = [
            self.xdg_state.as_ref().and_then(absolute),
            self.home.as_ref().and_then(absolute).map(below),
            self.account_home.clone().map(below),
        ];
        let own = homes.into_iter().flatten().map(|state| state.join(OURS));
        Candidates { ordered: None, own: own.chain([SHARED.into()]).collect() }
    }
}

/// Chooses the directory; `found` tells whether a directory holds what is looked for.
fn choose(
    candidates: &Candidates,
    shared: &Path,
    found: impl Fn(&Path) -> io::Result<bool>,
) -> Result<PathBuf, RecordStoreError> {
    let Candidates { ordered, own } = candidates;
    if matches!(found(shared), Ok(true)) {
        return Ok(shared.to_owned());
    }
    let mut for_new = None;
    for directory in own {
        match found(directory) {
            Ok(true) => return Ok(directory.clone()),
            Ok(false) => {
                for_new.get_or_insert(directory);
            }
            Err(source) if ordered.is_some() => {
                return Err(RecordStoreError::Io { path: directory.clone(), source });
            }
            // Nothing that this user has kept is there.
            Err(_) => {}
        }
    }
    Ok(for_new.map_or_else(|| shared.to_owned(), Clone::clone))
}

/// Whether the file exists; the error is that its directory cannot be searched. What cannot be seen
/// for another reason counts as there, so that reading it tells why.
fn is_there(file: &Path) -> io::Result<bool> {
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

/// The first of several paths that are separated by colons.
fn first(several: &OsString) -> Option<PathBuf> {
    env::split_paths(several).find(|one| !one.as_os_str().is_empty())
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

    fn own(of: &StateLocations) -> Vec<String> {
        of.candidates().own.iter().map(|path| path.display().to_string()).collect()
    }

    #[test]
    fn state_directory_variable_wins_and_its_first_entry_counts() {
        for (text, expected) in [("/a:/b", "/a"), (":/b", "/b"), ("/a", "/a")] {
            for is_root in [true, false] {
                let of = StateLocations { state: Some(text.into()), is_root, ..user() };
                assert_eq!(own(&of), [expected], "{text}");
            }
        }
        let empty = StateLocations { state: Some("".into()), is_root: true, ..user() };
        assert_eq!(own(&empty), [SHARED]);
    }

    #[test]
    fn root_keeps_records_in_the_shared_directory() {
        assert_eq!(own(&StateLocations { is_root: true, ..user() }), [SHARED]);
    }

    #[test]
    fn users_keep_records_below_their_own_state() {
        let homes = ["/home/u/.local/state/flexnbd", "/account/u/.local/state/flexnbd", SHARED];
        assert_eq!(own(&user()), homes);
        let xdg = StateLocations { xdg_state: Some("/x".into()), ..user() };
        assert_eq!(own(&xdg)[0], "/x/flexnbd");
        let relative = StateLocations { xdg_state: Some("x".into()), ..user() };
        assert_eq!(own(&relative), homes);
        let unset = StateLocations { home: None, ..user() };
        assert_eq!(own(&unset), homes[1..]);
        assert_eq!(own(&StateLocations::default()), [SHARED], "a user without an account");
    }

    /// What is chosen when these directories hold the record, and those cannot be searched.
    fn chosen(of: &StateLocations, holding: &[&str], closed: &[&str]) -> Result<String, String> {
        let is_among =
            |directory: &Path, all: &[&str]| all.iter().any(|it| Path::new(it) == directory);
        let found = |directory: &Path| {
            let closed = is_among(directory, closed);
            let error = || io::Error::from(io::ErrorKind::PermissionDenied);
            if closed { Err(error()) } else { Ok(is_among(directory, holding)) }
        };
        let chosen = choose(&of.candidates(), Path::new(SYSTEM), found);
        chosen.map(|path| path.display().to_string()).map_err(|error| error.to_string())
    }

    const HOME: &str = "/home/u/.local/state/flexnbd";
    const ACCOUNT: &str = "/account/u/.local/state/flexnbd";

    #[test]
    fn a_record_in_the_shared_directory_comes_first() {
        assert_eq!(chosen(&user(), &[SYSTEM, HOME], &[]), Ok(SYSTEM.into()));
        let ordered = StateLocations { state: Some("/a".into()), ..user() };
        assert_eq!(chosen(&ordered, &[SYSTEM, "/a"], &[]), Ok(SYSTEM.into()));
    }

    #[test]
    fn a_record_that_exists_stays_where_it_is() {
        assert_eq!(chosen(&user(), &[ACCOUNT], &[]), Ok(ACCOUNT.into()));
        assert_eq!(chosen(&user(), &[], &[]), Ok(HOME.into()));
    }

    #[test]
    fn unsearchable_directories_are_passed_over() {
        assert_eq!(chosen(&user(), &[], &[SYSTEM, HOME]), Ok(ACCOUNT.into()));
        assert_eq!(chosen(&user(), &[], &[HOME, ACCOUNT]), Ok(SHARED.into()));
        assert_eq!(chosen(&user(), &[], &[SYSTEM, HOME, ACCOUNT, SHARED]), Ok(SYSTEM.into()));
    }

    #[test]
    fn an_unsearchable_state_directory_variable_is_an_error() {
        let ordered = StateLocations { state: Some("/a".into()), ..user() };
        let refused = chosen(&ordered, &[], &["/a"]).unwrap_err();
        assert!(refused.contains("at /a: "), "{refused}");
    }

    #[test]
    fn what_cannot_be_seen_for_other_reasons_counts_as_there() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        std::fs::write(path("file"), "").unwrap();
        std::os::unix::fs::symlink("loop", path("loop")).unwrap();
        assert!(is_there(&path("file")).unwrap());
        assert!(!is_there(&path("none")).unwrap());
        assert!(!is_there(&path("file/below")).unwrap());
        assert!(!is_there(&path(&"x".repeat(300))).unwrap());
        assert!(is_there(&path("loop/below")).unwrap(), "too many links");
    }
}
