//! The Debian package, as it is and as its next version would be: made once for all tests.
//! Never builds the programs: it packs those that cargo has built for the tests, in their profile.

use crate::session::packages;
use nix::fcntl::{Flock, FlockArg};
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// The version that is being tested, and one that replaces it.
const VERSIONS: [(&str, &str); 2] = [
    ("current.deb", concat!(env!("CARGO_PKG_VERSION"), "-1")),
    ("next.deb", concat!(env!("CARGO_PKG_VERSION"), "-2")),
];

/// Outside a session: the directory of both packages, which are made when first asked for.
pub(crate) fn both() -> OsString {
    static MADE: OnceLock<PathBuf> = OnceLock::new();
    MADE.get_or_init(make).clone().into_os_string()
}

/// Inside a session: the package that is being tested.
pub(crate) fn current() -> PathBuf {
    packages().join(VERSIONS[0].0)
}

/// Inside a session: the same with a higher version.
pub(crate) fn next() -> PathBuf {
    packages().join(VERSIONS[1].0)
}

fn make() -> PathBuf {
    let programs = Path::new(env!("CARGO_BIN_EXE_flexnbd")).parent().unwrap();
    let place = programs.join("lab");
    fs::create_dir_all(&place).unwrap();
    // Another test process may be at it.
    let lock = File::create(place.join("lock")).unwrap();
    let _lock = Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, e)| e).unwrap();
    for (name, version) in VERSIONS {
        pack(programs.file_name().unwrap(), version, &place.join(format!("{name}.new")));
        fs::rename(place.join(format!("{name}.new")), place.join(name)).unwrap();
    }
    place
}

fn pack(profile: &OsStr, version: &str, to: &Path) {
    let profile = if profile == "debug" { OsStr::new("dev") } else { profile };
    let mut command = Command::new("cargo");
    command.args([
        "deb",
        "--no-build",
        "--strip",
        "--no-dbgsym",
        "--fast",
        "--locked",
        "--profile",
    ]);
    command.arg(profile).args(["--deb-version", version, "--output"]).arg(to);
    let output = command.current_dir(harness::project_path("")).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "no package, {}: {said}", output.status);
}
