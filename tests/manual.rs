//! Holds what we tell people against the program: the manual pages (all of them in
//! `manual/every.rs`, each in a file of its own), the README (`manual/readme.rs`), and that of the
//! tests (`manual/suites.rs`).
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
#[path = "manual/release_notes.rs"]
mod release_notes;
#[path = "manual/roff.rs"]
mod roff;
#[path = "manual/service.rs"]
mod service;
#[path = "manual/suites.rs"]
mod suites;

use harness::project_path;

fn read(path: &str) -> String {
    std::fs::read_to_string(project_path(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// The source of a module, with all of its files: for constants and words that no test can reach.
fn module_source(module: &str) -> String {
    fn append(directory: &std::path::Path, text: &mut String) {
        for entry in std::fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                append(&path, text);
            } else {
                text.push_str(&std::fs::read_to_string(path).unwrap());
            }
        }
    }
    let mut text = String::new();
    append(&project_path("src").join(module), &mut text);
    text
}

/// Panics unless the command line `flexnbd LINE` is valid.
fn must_be_meant(line: &str) {
    let words = line.split_whitespace().map(std::ffi::OsString::from);
    if let Err(flexnbd::cli::EarlyExit::Misuse(error)) = flexnbd::cli::parse(words) {
        panic!("`{line}` is invalid: {error}");
    }
}
