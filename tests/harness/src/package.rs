//! Builds the Debian package in two versions, once for all tests, with cargo-deb.
//! Packs the programs that cargo has built for the tests, in their profile; never builds programs.

use nix::fcntl::{Flock, FlockArg};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// The file of the version under test.
pub const CURRENT: &str = "current.deb";
/// The file of a version that upgrades [`CURRENT`].
pub const NEXT: &str = "next.deb";

/// The programs that [`build`] runs.
pub const TOOLS: [&str; 3] = ["cargo-deb", "dpkg-deb", "strip"];

/// The directory of [`CURRENT`] and [`NEXT`], which the first call builds as revisions of `version`,
/// that of the project.
#[track_caller]
pub fn build(version: &str) -> PathBuf {
    static DIRECTORY: OnceLock<PathBuf> = OnceLock::new();
    DIRECTORY.get_or_init(|| build_all(version)).clone()
}

fn build_all(version: &str) -> PathBuf {
    let program = crate::flexnbd();
    let programs = program.parent().unwrap();
    let place = programs.join("packages");
    fs::create_dir_all(&place).unwrap();
    // Another test process may be building them.
    let lock = File::create(place.join("lock")).unwrap();
    let _lock = Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, e)| e).unwrap();
    for (name, revision) in [(CURRENT, 1), (NEXT, 2)] {
        let new = place.join(format!("{name}.new"));
        build_one(programs.file_name().unwrap(), &format!("{version}-{revision}"), &new);
        fs::rename(new, place.join(name)).unwrap();
    }
    place
}

fn build_one(profile: &OsStr, version: &str, to: &Path) {
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
    let output = command.current_dir(crate::project_path("")).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "cargo deb failed with {}: {stderr}", output.status);
}
