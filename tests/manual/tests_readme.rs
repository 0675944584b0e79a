//! tests/README.md: every test target has a row; commands, tests and files that it names exist.

use super::read;
use harness::project_path;
use std::collections::BTreeSet;
use std::path::Path;

const README: &str = "tests/README.md";

/// The names of all test targets, found as cargo does.
fn targets() -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for entry in std::fs::read_dir(project_path("tests")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "rs")
            || path.join("main.rs").exists()
        {
            names.insert(path.file_stem().unwrap().to_str().unwrap().to_owned());
        }
    }
    names
}

/// The source of a test target, with its modules.
fn source(target: &str) -> String {
    let root = std::fs::read_to_string(project_path(&format!("tests/{target}.rs")));
    let mut text = root.unwrap_or_default();
    for entry in std::fs::read_dir(project_path(&format!("tests/{target}"))).into_iter().flatten() {
        text += &std::fs::read_to_string(entry.unwrap().path()).unwrap_or_default();
    }
    text
}

#[test]
fn every_test_target_has_a_row() {
    let text = read(README);
    let rows = text.lines().filter_map(|line| line.strip_prefix("| `")?.split('`').next());
    let rows: BTreeSet<String> = rows.map(str::to_owned).collect();
    assert_eq!(rows, targets());
}

#[test]
fn named_targets_and_tests_exist() {
    let text = read(README);
    let mut seen = 0;
    for line in text.lines().filter(|line| line.contains("cargo test ")) {
        let (environment, command) = line.split_once("cargo test ").unwrap();
        let command = command.split('#').next().unwrap();
        let Some((_, command)) = command.split_once("--test ") else { continue };
        let mut words = command.split_whitespace();
        let target = words.next().unwrap();
        assert!(targets().contains(target), "there is no target {target}: {line}");
        let source = source(target);
        for name in words.filter(|word| !word.starts_with("--")) {
            let missing = name.split("::").find(|part| !source.contains(part));
            assert_eq!(missing, None, "{line}");
        }
        for variable in environment.split_whitespace().filter_map(|word| word.split('=').next()) {
            assert!(source.contains(variable), "{target} does not use {variable}");
        }
        seen += 1;
    }
    assert!(seen > 8, "only {seen} commands found");
}

#[test]
fn named_files_exist() {
    let text = read(README);
    let links = text.split("](").skip(1).filter_map(|rest| rest.split(')').next());
    let quoted = text.split('`').skip(1).step_by(2).filter_map(|word| word.strip_prefix("tests/"));
    let files: BTreeSet<&str> = links.chain(quoted.filter(|word| word.ends_with(".rs"))).collect();
    assert!(files.len() > 5, "only {files:?}");
    for file in files {
        let path = project_path("tests").join(Path::new(file));
        assert!(path.exists(), "{} does not exist", path.display());
    }
}
