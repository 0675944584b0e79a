//! Builds the Debian package in two versions, once for all tests, with cargo-deb.
//! Packs the programs that cargo has built for the tests, in their profile; never builds programs.

use crate::session::packages;
use nix::fcntl::{Flock, FlockArg};
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// The version under test, and one that upgrades it.
const VERSIONS: [(&str, &str); 2] = [
    ("current.deb", concat!(env!("CARGO_PKG_VERSION"), "-1")),
    ("next.deb", concat!(env!("CARGO_PKG_VERSION"), "-2")),
];

/// Outside a session: the directory of both packages, which the first call builds.
pub(crate) fn directory() -> OsString {
    static DIRECTORY: OnceLock<PathBuf> = OnceLock::new();
    DIRECTORY.get_or_init(build_all).clone().into_os_string()
}

/// Inside a session: the package under test.
pub(crate) fn current() -> PathBuf {
    packages().join(VERSIONS[0].0)
}

/// Inside a session: the package with the higher version.
pub(crate) fn next() -> PathBuf {
    packages().join(VERSIONS[1].0)
}

fn build_all() -> PathBuf {
    let programs = Path::new(env!("CARGO_BIN_EXE_flexnbd")).parent().unwrap();
    let place = programs.join("lab");
    fs::create_dir_all(&place).unwrap();
    // Another test process may be building them.
    let lock = File::create(place.join("lock")).unwrap();
    let _lock = Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, e)| e).unwrap();
    for (name, version) in VERSIONS {
        build(programs.file_name().unwrap(), version, &place.join(format!("{name}.new")));
        fs::rename(place.join(format!("{name}.new")), place.join(name)).unwrap();
    }
    place
}

fn build(profile: &OsStr, version: &str, to: &Path) {
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
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "cargo deb failed with {}: {stderr}", output.status);
}
