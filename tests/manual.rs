//! Compares the documentation with the program: all manual pages (`manual/every_page.rs`), each page
//! in a file of its own, README.md (`manual/readme.rs`), and tests/README.md
//! (`manual/tests_readme.rs`). Checks facts, never wording.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a helper that cannot continue fails its test"
)]

#[path = "manual/command_line.rs"]
mod command_line;
#[path = "manual/conf.rs"]
mod conf;
#[path = "manual/every_page.rs"]
mod every_page;
#[path = "manual/generator.rs"]
mod generator;
#[path = "manual/migration.rs"]
mod migration;
#[path = "manual/proxy.rs"]
mod proxy;
#[path = "manual/readme.rs"]
mod readme;
#[path = "manual/release_notes.rs"]
mod release_notes;
#[path = "manual/roff.rs"]
mod roff;
#[path = "manual/service.rs"]
mod service;
#[path = "manual/tests_readme.rs"]
mod tests_readme;

use harness::project_path;

fn read(path: &str) -> String {
    std::fs::read_to_string(project_path(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// The source of a module with all its files, to find private constants and texts.
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
fn assert_valid(line: &str) {
    let words = line.split_whitespace().map(std::ffi::OsString::from);
    if let Err(flexnbd::cli::EarlyExit::Misuse(error)) = flexnbd::cli::parse(words) {
        panic!("`{line}` is invalid: {error}");
    }
}
