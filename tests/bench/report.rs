//! What both benchmarks share to report results: statistics, tables, targets and JSON.

use super::Error;
use serde::Serialize;
use std::fs;
use std::path::{Path, PathBuf};

/// The middle value, or the mean of the middle two.
pub(super) fn median(values: impl IntoIterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    let high = *values.get(values.len() / 2)?;
    Some(f64::midpoint(values[(values.len() - 1) / 2], high))
}

/// The mean of ratios, for which twice and half as fast are opposites.
pub(super) fn geometric_mean(values: &[f64]) -> Option<f64> {
    if values.is_empty() || values.iter().any(|value| *value <= 0.0) {
        return None;
    }
    let sum: f64 = values.iter().map(|value| value.ln()).sum();
    Some((sum / values.len() as f64).exp())
}

/// The smallest value that `percent` of all values do not exceed.
pub(super) fn percentile(mut values: Vec<f64>, percent: usize) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let rank = (values.len() * percent).div_ceil(100);
    values.get(rank.saturating_sub(1)).copied()
}

/// A goal for flexnbd beside the result of this run. It does not change the exit status.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Target {
    of: String,
    wanted: String,
    seen: String,
    pub(super) met: bool,
}

impl Target {
    pub(super) fn new(of: &str, wanted: &str, seen: String, met: bool) -> Self {
        Self { of: of.to_owned(), wanted: wanted.to_owned(), seen, met }
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

/// Prints a row of a table: a name, and right-aligned cells of these widths.
pub(super) fn print_row<const N: usize>(
    name: &str,
    widths: [usize; N],
    cells: [impl AsRef<str>; N],
) {
    let cells = cells.iter().zip(widths);
    let cells: String = cells.map(|(cell, width)| format!(" {:>width$}", cell.as_ref())).collect();
    println!("  {name:16}{}", cells.trim_end());
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

#[cfg(test)]
#[allow(unused)] // See peers.rs.
mod tests {
    use super::*;

    #[test]
    fn statistics_of_few_and_of_many_values() {
        assert_eq!(median([3.0, 1000.0, 2.0]), Some(3.0));
        assert_eq!(median([4.0, 2.0]), Some(3.0));
        assert_eq!(median([]), None);
        let mean = geometric_mean(&[2.0, 0.5]).unwrap();
        assert!((mean - 1.0).abs() < 1e-12, "{mean}");
        assert_eq!((geometric_mean(&[]), geometric_mean(&[1.0, 0.0])), (None, None));
        let values: Vec<f64> = (1..=200).rev().map(f64::from).collect();
        assert_eq!(percentile(values.clone(), 99), Some(198.0));
        assert_eq!(percentile(values, 100), Some(200.0));
        assert_eq!(percentile(Vec::new(), 99), None);
    }
}
