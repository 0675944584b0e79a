//! Keeps the floors of the house (see `src/lib.rs`): who may lean on whom, which files are pure,
//! and how long a file may get.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// The floor of each room. A room may use rooms below it; those on one floor never use each other.
const FLOORS: &[(&str, u32)] = &[
    ("memory_reserve", 0),
    ("range", 0),
    ("small_file", 0),
    ("words", 0),
    ("nbd", 1),
    ("disk", 1),
    ("net", 1),
    ("systemd", 1),
    ("client", 2),
    ("server", 3),
    ("migration", 3),
    ("control", 4),
    ("daemon", 5),
    ("cli", 6),
    ("main", 7),
    ("generator", 7),
];

/// Files and rooms that decide without doing.
const PURE: &[&str] = &[
    "range.rs",
    "words.rs",
    "nbd",
    "server/acl.rs",
    "server/carry.rs",
    "server/expectation.rs",
    "server/patience.rs",
    "server/places.rs",
    "server/progress.rs",
    "server/stall.rs",
    "disk/ownership.rs",
    "disk/hold.rs",
    "migration/arrival.rs",
    "migration/job.rs",
    "migration/machine.rs",
    "migration/machine",
    "migration/freeze.rs",
    "migration/pace.rs",
    "migration/plan.rs",
    "migration/spans.rs",
    "migration/wire.rs",
    "control/command.rs",
    "control/reply.rs",
    "control/status.rs",
    "control/summary.rs",
    "daemon/idle.rs",
    "daemon/wording.rs",
    "systemd/log_limit.rs",
    "cli/config.rs",
    "cli/settings.rs",
    "cli/size.rs",
    "cli/uri.rs",
];

/// What a pure file does not name outside its tests.
const IMPURE: &[&str] = &["std::net::Tcp", "std::fs", "std::thread", "Instant::now", "tracing::"];

/// Longest file in lines, tests included.
const LINES_MAX: usize = 600;

/// Files that are longer, and why.
const LONG: &[(&str, &str)] = &[];

fn sources() -> Vec<(PathBuf, String)> {
    fn visit(directory: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                visit(&path, found);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path);
            }
        }
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = Vec::new();
    visit(&root, &mut found);
    assert!(found.len() > 20, "only {} files: looking in the wrong place?", found.len());
    let relative = |path: &PathBuf| path.strip_prefix(&root).unwrap().to_owned();
    found.iter().map(|path| (relative(path), fs::read_to_string(path).unwrap())).collect()
}

fn room(path: &Path) -> String {
    let first = path.components().next().unwrap().as_os_str().to_str().unwrap();
    first.trim_end_matches(".rs").to_owned()
}

/// The text of a file without its tests, which may use whatever helps them.
fn without_tests(text: &str) -> &str {
    text.split("#[cfg(test)]\nmod tests {").next().unwrap()
}

fn is_test(path: &Path) -> bool {
    path.file_stem().is_some_and(|stem| stem.to_string_lossy().ends_with("tests"))
}

#[test]
fn every_room_leans_only_on_rooms_below_it() {
    let floors: BTreeMap<&str, u32> = FLOORS.iter().copied().collect();
    let mut seen = 0;
    for (path, text) in sources() {
        let room = room(&path);
        if room == "lib" || is_test(&path) {
            continue;
        }
        let floor = floors.get(room.as_str());
        let floor =
            floor.unwrap_or_else(|| panic!("{} is in no room with a floor", path.display()));
        let text = without_tests(&text);
        for used in text.split("crate::").skip(1).chain(text.split("flexnbd::").skip(1)) {
            let used: String =
                used.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
            let Some(below) = floors.get(used.as_str()) else { continue };
            seen += 1;
            assert!(
                below < floor || used == room,
                "{} (floor {floor}) leans on {used} (floor {below})",
                path.display()
            );
        }
    }
    assert!(seen > 50, "only {seen} uses seen: has the way of naming rooms changed?");
}

#[test]
fn pure_files_do_nothing() {
    for pure in PURE {
        let files: Vec<_> =
            sources().into_iter().filter(|(path, _)| path.starts_with(pure)).collect();
        assert!(!files.is_empty(), "{pure} does not exist");
        for (path, text) in files.iter().filter(|(path, _)| !is_test(path)) {
            for impure in IMPURE {
                let found = without_tests(text).contains(impure);
                assert!(!found, "{} is pure, but names {impure}", path.display());
            }
        }
    }
}

#[test]
fn no_file_is_longer_than_can_be_read() {
    for (path, text) in sources() {
        let lines = text.lines().count();
        let reason = LONG.iter().find(|(long, _)| Path::new(long) == path);
        assert!(
            lines <= LINES_MAX || reason.is_some(),
            "{} has {lines} lines; divide it, or state in this test why not",
            path.display()
        );
    }
}

#[test]
fn every_file_begins_with_what_it_is_for() {
    for (path, text) in sources() {
        assert!(text.starts_with("//! "), "{} does not say what it is for", path.display());
    }
}
