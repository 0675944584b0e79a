//! What was measured, as a table for people and as JSON for programs.
//! Judges nothing: a ratio is a ratio.

use super::Trouble;
use super::grid::{Cell, Source};
use super::machine::{LOAD_OF_OTHERS, load_average, processor, read};
use super::memory::MemoryRow;
use super::options::Options;
use super::servers::{Kind, Server};
use super::stats::{Sample, geometric_mean};
use serde_json::{Value, json};
use std::fs;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

/// A client that computes for more than this part of the time is likely to be what limits.
const CLIENT_LIMITS: f64 = 0.95;

/// All of it.
#[derive(Debug)]
pub(super) struct Report {
    about: Value,
    pub(super) cells: Vec<CellReport>,
    pub(super) memory: Vec<MemoryRow>,
}

/// One cell.
#[derive(Debug)]
pub(super) struct CellReport {
    cell: Cell,
    pub(super) rows: Vec<Row>,
}

/// One server in one cell.
#[derive(Debug)]
pub(super) struct Row {
    name: String,
    kind: Kind,
    pub(super) samples: Vec<Sample>,
    pub(super) troubles: Vec<String>,
}

/// How we compare in one cell with the best peer; for each figure that may be another one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Ratio {
    /// Above 1: we answer more.
    pub(super) rate: f64,
    /// Below 1: we need less processor time for one request.
    pub(super) cpu: f64,
}

impl Report {
    /// Says what is going to happen.
    pub(super) fn begin(options: &Options, servers: &[Server], cells: usize) -> Self {
        let versions: serde_json::Map<String, Value> =
            servers.iter().map(|s| (s.name.clone(), s.version().into())).collect();
        for (name, version) in &versions {
            println!("# {name}: {}", version.as_str().unwrap_or_default());
        }
        let load = load_average();
        if load > LOAD_OF_OTHERS {
            println!(
                "# others are using this machine (load {load}): rates and their ratios mean \
                 little now, processor time per request a bit more"
            );
        }
        let runs = cells * servers.len() * options.rounds as usize;
        // Start, warm-up and stop take about half a second.
        let minutes = runs as f64 * (options.seconds.as_secs_f64() + 0.5) / 60.0;
        println!("# {cells} cells, {runs} runs, about {minutes:.0} minutes");
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let about = json!({
            "unix_time": since.as_secs(),
            "kernel": read("/proc/sys/kernel/osrelease"),
            "processor": processor(),
            "versions": versions,
            "load_before": load,
            "rounds": options.rounds,
            "seconds": options.seconds.as_secs_f64(),
            "image_mib": options.size,
        });
        Self { about, cells: Vec::new(), memory: Vec::new() }
    }

    /// Prints the summary, and writes everything to `file` if there is one.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(super) fn finish(&self, file: Option<&Path>) -> Result<(), Trouble> {
        self.print_summary();
        let Some(file) = file else { return Ok(()) };
        let text = serde_json::to_string_pretty(&self.json())?;
        fs::write(file, text + "\n").map_err(|error| format!("{}: {error}", file.display()).into())
    }

    fn print_summary(&self) {
        for source in [Source::Raw, Source::Fio] {
            let ratios: Vec<Ratio> = self
                .cells
                .iter()
                .filter(|cell| cell.cell.source == source)
                .filter_map(|cell| cell.ratio())
                .collect();
            let rates: Vec<f64> = ratios.iter().map(|ratio| ratio.rate).collect();
            let cpus: Vec<f64> = ratios.iter().map(|ratio| ratio.cpu).collect();
            let lowest = rates.iter().copied().fold(f64::INFINITY, f64::min);
            if let Some(mean) = geometric_mean(&rates) {
                println!(
                    "\n{} cells ({}) against the best peer of each: rate × {mean:.2} on \
                     average, × {lowest:.2} at worst; processor time × {}",
                    rates.len(),
                    source.word(),
                    geometric_mean(&cpus).map_or("?".to_owned(), |mean| format!("{mean:.2}"))
                );
            }
        }
    }

    fn json(&self) -> Value {
        let memory = |row: &MemoryRow| {
            json!({
                "server": row.name,
                "rss_idle_kib": row.rss_idle_kib,
                "rss_100_sessions_kib": row.rss_full_kib,
                "pss_per_session_kib": row.per_session_kib,
            })
        };
        json!({
            "about": self.about,
            "cells": self.cells.iter().map(CellReport::json).collect::<Vec<_>>(),
            "memory": self.memory.iter().map(memory).collect::<Vec<_>>(),
        })
    }
}

impl CellReport {
    /// A cell of which nothing has been measured.
    pub(super) fn new(cell: &Cell, servers: &[Server]) -> Self {
        let row = |server: &Server| Row {
            name: server.name.clone(),
            kind: server.kind,
            samples: Vec::new(),
            troubles: Vec::new(),
        };
        Self { cell: *cell, rows: servers.iter().map(row).collect() }
    }

    /// Prints the medians, and how we compare.
    pub(super) fn print(&self) {
        println!("\n{}", self.cell);
        println!(
            "  {:16} {:>11} {:>9} {:>12} {:>12} {:>12}",
            "", "requests/s", "MB/s", "CPU µs/req.", "client busy", "RSS MiB"
        );
        for row in &self.rows {
            let Some(median) = Sample::median(&row.samples) else {
                println!("  {:16} failed", row.name);
                continue;
            };
            println!(
                "  {:16} {:>11.0} {:>9.0} {:>12.2} {:>11.0}% {:>12.1}{}",
                row.name,
                median.requests_per_sec,
                median.mb_per_sec,
                median.server_cpu_us_per_request,
                median.client_busy * 100.0,
                median.rss_peak_mib,
                if median.client_busy > CLIENT_LIMITS { "  limited by the client" } else { "" }
            );
        }
        if let Some(Ratio { rate, cpu }) = self.ratio() {
            println!(
                "  flexnbd against the best peer: rate × {rate:.2}, processor time × {cpu:.2}"
            );
        }
    }

    /// The first flexnbd against the best of the peers; nothing if either is missing.
    fn ratio(&self) -> Option<Ratio> {
        let median = |row: &Row| Sample::median(&row.samples);
        let ours = self.rows.iter().find(|row| row.kind == Kind::Flexnbd).and_then(median)?;
        let peers: Vec<Sample> =
            self.rows.iter().filter(|row| row.kind != Kind::Flexnbd).filter_map(median).collect();
        if peers.is_empty() {
            return None;
        }
        let rate = peers.iter().map(|peer| peer.requests_per_sec).fold(0.0, f64::max);
        let cpu =
            peers.iter().map(|peer| peer.server_cpu_us_per_request).fold(f64::INFINITY, f64::min);
        Some(Ratio {
            rate: ours.requests_per_sec / rate,
            cpu: ours.server_cpu_us_per_request / cpu,
        })
    }

    fn json(&self) -> Value {
        let row = |row: &Row| {
            json!({
                "server": row.name,
                "median": Sample::median(&row.samples).as_ref().map(sample_json),
                "rounds": row.samples.iter().map(sample_json).collect::<Vec<_>>(),
                "troubles": row.troubles,
            })
        };
        let cell = &self.cell;
        json!({
            "name": cell.to_string(),
            "block": cell.block,
            "work": cell.work.word(),
            "sequential": cell.is_sequential(),
            "depth": cell.depth,
            "sessions": cell.sessions,
            "transport": cell.transport.word(),
            "temperature": cell.temperature.word(),
            "generator": cell.source.word(),
            "servers": self.rows.iter().map(row).collect::<Vec<_>>(),
            "ratio": self.ratio().map(|ratio| json!({ "rate": ratio.rate, "cpu": ratio.cpu })),
        })
    }
}

fn sample_json(sample: &Sample) -> Value {
    json!({
        "requests_per_sec": sample.requests_per_sec,
        "mb_per_sec": sample.mb_per_sec,
        "server_cpu_us_per_request": sample.server_cpu_us_per_request,
        "client_busy": sample.client_busy,
        "rss_peak_mib": sample.rss_peak_mib,
    })
}

#[cfg(test)]
#[allow(unused)] // See peers.rs.
mod tests {
    use super::super::grid::Set;
    use super::*;

    fn row(kind: Kind, rate: f64, cpu: f64) -> Row {
        let sample =
            Sample { requests_per_sec: rate, server_cpu_us_per_request: cpu, ..Sample::default() };
        let name = format!("{kind:?}");
        Row { name, kind, samples: vec![sample], troubles: Vec::new() }
    }

    fn report(rows: Vec<Row>) -> CellReport {
        CellReport { cell: Set::Default.cells()[0], rows }
    }

    #[test]
    fn the_best_peer_is_another_one_for_each_figure() {
        let cell = report(vec![
            row(Kind::Flexnbd, 300.0, 2.0),
            row(Kind::Nbdkit, 200.0, 8.0),
            row(Kind::QemuNbd, 100.0, 4.0),
        ]);
        assert_eq!(cell.ratio(), Some(Ratio { rate: 1.5, cpu: 0.5 }));
    }

    #[test]
    fn another_build_of_ours_is_no_peer() {
        let cell = report(vec![row(Kind::Flexnbd, 300.0, 2.0), row(Kind::Flexnbd, 600.0, 1.0)]);
        assert_eq!(cell.ratio(), None);
    }

    #[test]
    fn a_server_that_failed_has_no_median_but_its_troubles() {
        let mut failed = row(Kind::Nbdkit, 0.0, 0.0);
        failed.samples.clear();
        failed.troubles.push("died".to_owned());
        let json = report(vec![row(Kind::Flexnbd, 1.0, 1.0), failed]).json();
        assert_eq!(json["servers"][1]["median"], Value::Null);
        assert_eq!(json["servers"][1]["troubles"][0], "died");
        assert_eq!(json["ratio"], Value::Null);
    }
}
