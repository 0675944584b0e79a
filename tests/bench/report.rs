//! Output of both benchmarks: tables, targets and JSON.

use super::Error;
use serde::Serialize;
use std::fs;
use std::path::{Path, PathBuf};

/// A goal for flexnbd beside the result of this run. Meeting it or not does not change the exit status.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Target {
    of: &'static str,
    wanted: &'static str,
    seen: String,
    pub(super) met: bool,
}

impl Target {
    pub(super) fn new(of: &'static str, wanted: &'static str, seen: String, met: bool) -> Self {
        Self { of, wanted, seen, met }
    }
}

pub(super) fn print_targets(targets: &[Target]) {
    if !targets.is_empty() {
        println!("\ntargets");
    }
    for Target { of, wanted, seen, met } in targets {
        println!("  {:8} {of}: {seen}; wanted: {wanted}", if *met { "met" } else { "NOT MET" });
    }
}

/// A table whose first column is a name; the others are right-aligned.
#[derive(Clone, Copy, Debug)]
pub(super) struct Table<const N: usize> {
    pub(super) name_width: usize,
    pub(super) widths: [usize; N],
}

impl<const N: usize> Table<N> {
    pub(super) fn print_row(&self, name: &str, cells: [impl AsRef<str>; N]) {
        let cells = cells.iter().zip(self.widths);
        let cells: String =
            cells.map(|(cell, width)| format!(" {:>width$}", cell.as_ref())).collect();
        println!("  {name:name_width$}{}", cells.trim_end(), name_width = self.name_width);
    }
}

/// A figure in a table, or a dash if it could not be measured.
pub(super) fn figure(value: impl Into<Option<f64>>, places: usize) -> String {
    value.into().map_or("-".to_owned(), |value| format!("{value:.places$}"))
}

pub(super) fn write_json(file: &Path, value: &impl Serialize) -> Result<(), Error> {
    let text = serde_json::to_string_pretty(value)?;
    fs::write(file, text + "\n").map_err(|error| format!("{}: {error}", file.display()).into())
}

/// Parses `NAME=PATH`, the value of `--also`.
pub(super) fn named_path(text: &str) -> Result<(String, PathBuf), String> {
    match text.split_once('=') {
        Some((name, path)) if !name.is_empty() && !path.is_empty() => {
            Ok((name.to_owned(), path.into()))
        }
        _ => Err("not of the form NAME=PATH".to_owned()),
    }
}
