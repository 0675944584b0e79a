//! Holds what we tell people against the program: the manual pages (all of them in
//! `manual/every.rs`, each in a file of its own) and the README (`manual/readme.rs`).
//! Never judges the words, only whether they are true.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "helpers of tests, too: what cannot go on fails the test"
)]

#[path = "manual/conf.rs"]
mod conf;
#[path = "manual/every.rs"]
mod every;
#[path = "manual/generator.rs"]
mod generator;
#[path = "manual/migration.rs"]
mod migration;
#[path = "manual/page.rs"]
mod page;
#[path = "manual/readme.rs"]
mod readme;
#[path = "manual/roff.rs"]
mod roff;
#[path = "manual/service.rs"]
mod service;

use std::io::Write as _;
use std::path::{Path, PathBuf};

/// A file of the project.
fn ours(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn read(path: &str) -> String {
    std::fs::read_to_string(ours(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// Whether these programs are installed. If not: fails under `CI`, says so elsewhere, and the test
/// is to return.
fn installed(programs: &[&str]) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let is_missing =
        |program: &&&str| !std::env::split_paths(&path).any(|dir| dir.join(program).is_file());
    let missing: Vec<_> = programs.iter().filter(is_missing).copied().collect();
    if missing.is_empty() {
        return true;
    }
    let missing = missing.join(", ");
    assert!(std::env::var_os("CI").is_none(), "not installed, and CI must not skip: {missing}");
    // Around the harness, which would keep it to itself.
    let _ = writeln!(std::io::stderr(), "SKIP a test of the manual: not installed: {missing}");
    false
}

/// What `flexnbd LINE` would do, as far as the command line tells; panics if it cannot be meant.
fn must_be_meant(line: &str) {
    let words = line.split_whitespace().map(std::ffi::OsString::from);
    if let Err(flexnbd::cli::Stop::Misuse(misuse)) = flexnbd::cli::parse(words) {
        panic!("`{line}` cannot be meant: {misuse}");
    }
}
