//! What both benchmarks need to measure in turns and to report: median, tables, targets, JSON.

use serde::Serialize;
use std::fs;
use std::path::Path;

pub(crate) type Error = Box<dyn std::error::Error + Send + Sync>;

/// Calls `measure` for each of `count` participants in each round; returns the results of each.
/// Each round begins with another participant, so that a disturbance of the machine does not always
/// hit the same one.
pub(crate) fn in_turns<T>(
    rounds: u32,
    count: usize,
    mut measure: impl FnMut(usize) -> T,
) -> Vec<Vec<T>> {
    let mut results: Vec<Vec<T>> = (0..count).map(|_| Vec::new()).collect();
    for round in 0..rounds as usize {
        for which in (0..count).map(|turn| (round + turn) % count) {
            results[which].push(measure(which));
        }
    }
    results
}

/// The middle value, or the mean of the middle two.
pub(crate) fn median(values: impl IntoIterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    let high = *values.get(values.len() / 2)?;
    Some(f64::midpoint(values[(values.len() - 1) / 2], high))
}

/// A goal for flexnbd beside the result of this run. It does not change the exit status.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Target {
    of: &'static str,
    wanted: &'static str,
    seen: String,
    met: bool,
}

impl Target {
    pub(crate) fn new(of: &'static str, wanted: &'static str, seen: String, met: bool) -> Self {
        Self { of, wanted, seen, met }
    }
}

pub(crate) fn print_targets(targets: &[Target]) {
    if !targets.is_empty() {
        println!("\ntargets");
    }
    for Target { of, wanted, seen, met } in targets {
        println!("  {:8} {of}: {seen}; wanted: {wanted}", if *met { "met" } else { "NOT MET" });
    }
}

/// Prints a row of a table: a name, and right-aligned cells of these widths.
pub(crate) fn print_row<const N: usize>(
    name: &str,
    widths: [usize; N],
    cells: [impl AsRef<str>; N],
) {
    let cells = cells.iter().zip(widths);
    let cells: String = cells.map(|(cell, width)| format!(" {:>width$}", cell.as_ref())).collect();
    println!("  {name:16}{}", cells.trim_end());
}

/// A figure in a table, or a dash if it could not be measured.
pub(crate) fn figure(value: impl Into<Option<f64>>, places: usize) -> String {
    value.into().map_or("-".to_owned(), |value| format!("{value:.places$}"))
}

pub(crate) fn write_json(file: &Path, value: &impl Serialize) -> Result<(), Error> {
    let text = serde_json::to_string_pretty(value)?;
    fs::write(file, text + "\n").map_err(|error| format!("{}: {error}", file.display()).into())
}
