//! Checks the layout of `src` (see the map in `src/lib.rs`): which module may use which, which files
//! are pure, how long a file may get, that a type name means one thing, and that no two files use
//! each other.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// The floor of each module. A module may use modules below it, never one on its own floor.
const FLOORS: &[(&str, u32)] = &[
    ("human", 0),
    ("ids", 0),
    ("memory_reserve", 0),
    ("message_id", 0),
    ("milestones", 0),
    ("range", 0),
    ("small_file", 0),
    ("sync", 0),
    ("transition_table", 0),
    ("schedules", 0),
    ("nbd", 1),
    ("disk", 1),
    ("net", 1),
    ("sandbox", 1),
    ("systemd", 1),
    ("client", 2),
    ("control", 2),
    ("server", 3),
    ("migration", 3),
    ("upstream", 3),
    ("daemon", 4),
    ("cli", 5),
    ("main", 6),
    ("generator", 6),
];

/// Files and modules that only compute decisions, without I/O.
const PURE: &[&str] = &[
    "milestones.rs",
    "range.rs",
    "human.rs",
    "ids.rs",
    "nbd",
    "server/acl.rs",
    "server/snapshot.rs",
    "server/session/engine.rs",
    "server/session/engine/delays.rs",
    "server/session/engine/malformed.rs",
    "server/session/handshake.rs",
    "server/session/phase.rs",
    "server/session/writes.rs",
    "server/session/polling.rs",
    "server/session/inline_reads.rs",
    "server/handshake_slots.rs",
    "server/session/stall.rs",
    "disk/inflight/parts.rs",
    "disk/op.rs",
    "disk/ownership.rs",
    "disk/ownership/disk_id.rs",
    "server/write_throttle.rs",
    "migration/arrival.rs",
    "migration/job.rs",
    "migration/machine.rs",
    "migration/machine",
    "migration/freeze.rs",
    "migration/pace.rs",
    "migration/plan.rs",
    "migration/range_set.rs",
    "migration/trouble.rs",
    "migration/wire.rs",
    "control/command.rs",
    "control/reply.rs",
    "control/status.rs",
    "control/summary.rs",
    "daemon/idle.rs",
    "daemon/status_reporter/text.rs",
    "sandbox/filter.rs",
    "sandbox/rules.rs",
    "systemd/log_limit.rs",
    "upstream/machine.rs",
    "upstream/machine",
    "upstream/rotation.rs",
    "upstream/rx.rs",
    "upstream/spare_buffers.rs",
    "upstream/terms.rs",
    "upstream/tx.rs",
    "upstream/unflushed.rs",
    "cli/config.rs",
    "cli/settings.rs",
    "cli/size.rs",
    "cli/tls.rs",
    "cli/uri.rs",
    "net/tls/certificate.rs",
    "net/tls/explain.rs",
    "net/tls/file.rs",
    "net/tls/mode.rs",
    "net/tls/name.rs",
    "net/tls/record_reader.rs",
    "net/tls/session.rs",
];

/// Paths that a pure file must not name outside its tests.
const IMPURE: &[&str] = &["std::net::Tcp", "std::fs", "std::thread", "Instant::now", "tracing::"];

/// Longest file in lines, tests included.
const LINES_MAX: usize = 600;

/// Files that are longer, and why.
const LONG: &[(&str, &str)] = &[];

/// Type names that two files may define, and why.
const SHARED_NAMES: &[(&str, &str)] = &[];

/// Pairs of files that may use each other, and why.
const CIRCLES: &[(&str, &str, &str)] = &[];

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
    assert!(found.len() > 20, "only {} files: wrong directory?", found.len());
    let relative = |path: &PathBuf| path.strip_prefix(&root).unwrap().to_owned();
    found.iter().map(|path| (relative(path), fs::read_to_string(path).unwrap())).collect()
}

/// The top-level module of a file.
fn top_module(path: &Path) -> String {
    let first = path.components().next().unwrap().as_os_str().to_str().unwrap();
    first.trim_end_matches(".rs").to_owned()
}

/// The text of a file without its tests, which may use any module.
fn without_tests(text: &str) -> &str {
    text.split("#[cfg(test)]\nmod tests {").next().unwrap()
}

fn is_test(path: &Path) -> bool {
    path.file_stem().is_some_and(|stem| stem.to_string_lossy().ends_with("tests"))
}

#[test]
fn modules_use_only_modules_below_them() {
    let floors: BTreeMap<&str, u32> = FLOORS.iter().copied().collect();
    let mut seen = 0;
    for (path, text) in sources() {
        let module = top_module(&path);
        if module == "lib" || is_test(&path) {
            continue;
        }
        let floor = floors.get(module.as_str());
        let floor =
            floor.unwrap_or_else(|| panic!("the module of {} has no floor", path.display()));
        let text = without_tests(&text);
        for used in text.split("crate::").skip(1).chain(text.split("flexnbd::").skip(1)) {
            let used: String =
                used.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
            let Some(below) = floors.get(used.as_str()) else { continue };
            seen += 1;
            assert!(
                below < floor || used == module,
                "{} (floor {floor}) uses {used} (floor {below})",
                path.display()
            );
        }
    }
    assert!(seen > 50, "only {seen} uses found: has the syntax of paths changed?");
}

#[test]
fn pure_files_name_no_io() {
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
fn only_sync_handles_lock_poisoning() {
    for (path, text) in sources() {
        // The global allocator uses no other module.
        let is_exception = path.ends_with("sync.rs") || path.ends_with("memory_reserve.rs");
        let found = text.contains("PoisonError");
        assert!(!found || is_exception, "{}: use crate::sync", path.display());
    }
}

#[test]
fn files_stay_below_the_length_limit() {
    for (path, text) in sources() {
        let lines = text.lines().count();
        let reason = LONG.iter().find(|(long, _)| Path::new(long) == path);
        assert!(
            lines <= LINES_MAX || reason.is_some(),
            "{} has {lines} lines; divide it, or add it to LONG with a reason",
            path.display()
        );
    }
}

#[test]
fn every_file_has_a_module_comment() {
    for (path, text) in sources() {
        assert!(text.starts_with("//! "), "{} has no module comment", path.display());
    }
}

/// The names of the types that a file defines, without its tests.
fn types(text: &str) -> impl Iterator<Item = &str> {
    without_tests(text).lines().filter_map(|line| {
        let line = line.trim_start();
        let item = match line.strip_prefix("pub") {
            Some(rest) if rest.starts_with('(') => {
                rest.split_once(") ").map_or("", |(_, item)| item)
            }
            Some(rest) => rest.trim_start(),
            None => line,
        };
        let (keyword, rest) = item.split_once(' ')?;
        let name = rest.split(|c: char| !c.is_alphanumeric() && c != '_').next()?;
        ["struct", "enum", "trait", "union"].contains(&keyword).then_some(name)
    })
}

#[test]
fn a_type_name_is_defined_in_one_file() {
    let mut defined: BTreeMap<String, Vec<PathBuf>> = BTreeMap::new();
    for (path, text) in sources().into_iter().filter(|(path, _)| !is_test(path)) {
        for name in types(&text) {
            let files = defined.entry(name.to_owned()).or_default();
            if files.last() != Some(&path) {
                files.push(path.clone());
            }
        }
    }
    assert!(defined.len() > 200, "only {} types seen", defined.len());
    for (name, files) in defined.iter().filter(|(_, files)| files.len() > 1) {
        let excepted = SHARED_NAMES.iter().any(|(shared, _)| shared == name);
        assert!(excepted, "{name} is defined in {files:?}; give one of them another name");
    }
    for (shared, _) in SHARED_NAMES {
        let files = defined.get(*shared).map_or(0, Vec::len);
        assert!(files > 1, "remove the unused exception {shared}");
    }
}

/// The module that a file defines, as the parts of its path in the crate.
fn module(path: &Path) -> Vec<String> {
    let mut parts: Vec<String> =
        path.with_extension("").iter().map(|part| part.to_str().unwrap().to_owned()).collect();
    if parts.last().is_some_and(|last| last == "mod") {
        parts.pop();
    }
    parts
}

/// The paths in the `use` declarations of a file, from the root of the crate.
fn uses(path: &Path, text: &str) -> Vec<Vec<String>> {
    let mut found = Vec::new();
    let text = ["pub ", "pub(super) ", "pub(crate) "]
        .iter()
        .fold(without_tests(text).to_owned(), |text, visible| {
            text.replace(&format!("\n{visible}use "), "\nuse ")
        });
    for used in text.split("\nuse ").skip(1) {
        let Some((used, _)) = used.split_once(';') else { continue };
        let (prefix, names) = used.split_once('{').unwrap_or((used, ""));
        let prefix: Vec<&str> = prefix.trim_end_matches("::").split("::").collect();
        let mut base = match prefix.first() {
            Some(&"crate") => Vec::new(),
            Some(&"super") => {
                let mut base = module(path);
                base.pop();
                base
            }
            _ => continue,
        };
        for part in &prefix[1..] {
            if *part == "super" {
                base.pop();
            } else {
                base.push((*part).to_owned());
            }
        }
        let imported = names.split([',', '}']).map(|name| name.trim().split("::").next().unwrap());
        for name in imported.filter(|name| !name.is_empty()) {
            found.push(base.iter().cloned().chain([name.to_owned()]).collect());
        }
        found.push(base);
    }
    found
}

/// Whether a file is the root of a module, from which the module's other files may import.
fn is_module_root(path: &Path) -> bool {
    path.ends_with("mod.rs") || path == Path::new("lib.rs")
}

#[test]
fn no_two_files_use_each_other() {
    let files: Vec<_> = sources().into_iter().filter(|(path, _)| !is_test(path)).collect();
    let modules: BTreeMap<Vec<String>, &PathBuf> = files
        .iter()
        .filter(|(path, _)| !is_module_root(path))
        .map(|(path, _)| (module(path), path))
        .collect();
    let mut used: BTreeMap<&PathBuf, Vec<&PathBuf>> = BTreeMap::new();
    for (path, text) in files.iter().filter(|(path, _)| !is_module_root(path)) {
        for mut target in uses(path, text) {
            while !target.is_empty() && !modules.contains_key(&target) {
                target.pop();
            }
            if let Some(target) = modules.get(&target).filter(|target| **target != path) {
                used.entry(path).or_default().push(target);
            }
        }
    }
    let arrows: usize = used.values().map(Vec::len).sum();
    assert!(arrows > 150, "only {arrows} uses found: has the syntax of imports changed?");
    let uses = |from: &PathBuf, to: &PathBuf| used.get(from).is_some_and(|list| list.contains(&to));
    let mut excepted = 0;
    for from in used.keys() {
        for to in used.keys().filter(|to| from < *to && uses(from, to) && uses(to, from)) {
            let known = CIRCLES.iter().any(|(a, b, _)| from.ends_with(a) && to.ends_with(b));
            assert!(known, "{} and {} use each other", from.display(), to.display());
            excepted += 1;
        }
    }
    assert_eq!(excepted, CIRCLES.len(), "remove the unused exception in CIRCLES");
}

/// The crates that the project is built on; each has a use in `src`.
const FOUNDATIONS: &[&str] = &[
    "clap",
    "libsystemd",
    "listenfd",
    "memmap2",
    "nix",
    "sd_notify",
    "tracing",
    "tracing_journald",
];

#[test]
fn foundations_are_used() {
    let sources = sources();
    for foundation in FOUNDATIONS {
        let path = format!("{foundation}::");
        let used = sources.iter().any(|(_, text)| without_tests(text).contains(&path));
        assert!(used, "nothing in src uses {foundation}");
    }
}
