//! What a client feels of a migration: how long it is kept waiting at the end, and how long its
//! writes take meanwhile. Ours only.

use super::Trouble;
use super::choices::Choices;
use super::client::{Client, Write};
use super::disks::{self, Disks, Kind};
use super::ours::Sides;
use super::stats::median;
use serde_json::{Value, json};
use std::path::Path;
use std::time::{Duration, Instant};

/// How many writes are acknowledged before the migration is ordered.
const WRITES_BEFORE: usize = 2000;
/// How many of those do not count: the first ones find caches cold.
const WRITES_WARMING: usize = 500;
/// How long they may take.
const WARM_TIME_MAX: Duration = Duration::from_secs(60);

/// What one migration showed.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Seen {
    /// From gate closed to acknowledged, in milliseconds, as the source says.
    pause_ms: u64,
    seconds: f64,
    passes: u64,
    acknowledged: bool,
    same: bool,
    /// How long writes took before the order, in microseconds.
    before_us: Vec<f64>,
    /// How long those took that were due after it and acknowledged before the end.
    during_us: Vec<f64>,
}

/// What all of them showed.
#[derive(Debug)]
pub(super) struct PauseReport {
    name: String,
    size: u64,
    writes_per_sec: u32,
    migrations: u32,
    pub(super) seen: Vec<Seen>,
}

/// Moves a full image while a client writes to it.
///
/// # Errors
/// When the migration or the client fails.
pub(super) fn measure_once(
    program: &Path,
    choices: &Choices,
    disks: &Disks,
) -> Result<Seen, Trouble> {
    let pair = disks.make(Kind::Dense, choices.pause_size)?;
    let sides = Sides::start(program, &pair)?;
    let client = Client::start(sides.address, choices.writes_per_sec, WRITES_BEFORE)?;
    client.wait_until_warm(WARM_TIME_MAX)?;
    let moved = sides.migrate()?;
    let (before_us, during_us) = divide(&client.finish()?, moved.ordered);
    Ok(Seen {
        pause_ms: u64::try_from(moved.summary.pause.as_millis())?,
        seconds: moved.elapsed.as_secs_f64(),
        passes: moved.summary.passes,
        acknowledged: moved.summary.acknowledged,
        same: disks::same(&pair.source, &pair.destination)?,
        before_us,
        during_us,
    })
}

/// Pure: the latencies in microseconds of what was over before the order, and of what was due
/// after it. What was under way belongs to neither.
fn divide(writes: &[Write], ordered: Instant) -> (Vec<f64>, Vec<f64>) {
    let us = |write: &Write| write.latency.as_secs_f64() * 1e6;
    let warm = writes.iter().skip(WRITES_WARMING);
    let before = warm.filter(|write| write.due + write.latency < ordered).map(us).collect();
    let during = writes.iter().filter(|write| write.due >= ordered).map(us).collect();
    (before, during)
}

/// Pure: the smallest value that so many percent of the values do not exceed.
fn percentile(mut values: Vec<f64>, percent: usize) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let rank = (values.len() * percent).div_ceil(100);
    values.get(rank.saturating_sub(1)).copied()
}

impl PauseReport {
    /// One of which nothing has been measured.
    pub(super) fn new(name: &str, choices: &Choices) -> Self {
        Self {
            name: name.to_owned(),
            size: choices.pause_size,
            writes_per_sec: choices.writes_per_sec,
            migrations: choices.migrations,
            seen: Vec::new(),
        }
    }

    /// Prints it; nothing when there is nothing.
    pub(super) fn print(&self) {
        let (Some(median), Some(worst)) = (self.median_ms(), self.worst_ms()) else { return };
        println!(
            "\n{}: {} migrations of {} MiB under {} writes of 4 KiB a second",
            self.name,
            self.seen.len(),
            self.size >> 20,
            self.writes_per_sec
        );
        println!(
            "  pause from gate closed to acknowledged: median {median:.1} ms, worst {worst} ms"
        );
        println!(
            "  {:24} {:>9} {:>12} {:>12} {:>12}",
            "", "writes", "median µs", "p99 µs", "worst µs"
        );
        for (name, latencies) in [("before", self.before()), ("during the copy", self.during())] {
            println!("{}", line(name, latencies));
        }
        if let Some(ratio) = self.p99_ratio() {
            println!("  p99 during the copy against before: × {ratio:.2}");
        }
        let wrong = self.seen.iter().filter(|seen| !(seen.same && seen.acknowledged)).count();
        let verdict = if wrong == 0 { "same".to_owned() } else { format!("{wrong} DIFFER") };
        println!("  contents: {verdict}");
    }

    fn median_ms(&self) -> Option<f64> {
        median(self.seen.iter().map(|seen| seen.pause_ms as f64).collect())
    }

    fn worst_ms(&self) -> Option<u64> {
        self.seen.iter().map(|seen| seen.pause_ms).max()
    }

    fn before(&self) -> Vec<f64> {
        self.seen.iter().flat_map(|seen| seen.before_us.iter().copied()).collect()
    }

    fn during(&self) -> Vec<f64> {
        self.seen.iter().flat_map(|seen| seen.during_us.iter().copied()).collect()
    }

    /// How many times as long the slowest percent of writes took.
    fn p99_ratio(&self) -> Option<f64> {
        Some(percentile(self.during(), 99)? / percentile(self.before(), 99)?)
    }

    /// Everything but the single writes.
    pub(super) fn json(&self) -> Value {
        let seen = |seen: &Seen| {
            json!({
                "pause_ms": seen.pause_ms,
                "seconds": seen.seconds,
                "passes": seen.passes,
                "acknowledged": seen.acknowledged,
                "same": seen.same,
                "before": latencies_json(&seen.before_us),
                "during": latencies_json(&seen.during_us),
            })
        };
        json!({
            "system": self.name,
            "size": self.size,
            "writes_per_sec": self.writes_per_sec,
            "migrations_wanted": self.migrations,
            "migrations": self.seen.iter().map(seen).collect::<Vec<_>>(),
            "pause_ms_median": self.median_ms(),
            "pause_ms_worst": self.worst_ms(),
            "before": latencies_json(&self.before()),
            "during": latencies_json(&self.during()),
            "p99_ratio": self.p99_ratio(),
        })
    }
}

fn line(name: &str, latencies: Vec<f64>) -> String {
    let of = |percent| percentile(latencies.clone(), percent).unwrap_or(f64::NAN);
    let (count, half, most, all) = (latencies.len(), of(50), of(99), of(100));
    format!("  {name:24} {count:>9} {half:>12.0} {most:>12.0} {all:>12.0}")
}

fn latencies_json(latencies: &[f64]) -> Value {
    let of = |percent| percentile(latencies.to_vec(), percent);
    json!({ "writes": latencies.len(), "p50_us": of(50), "p99_us": of(99), "worst_us": of(100) })
}

#[cfg(test)]
#[allow(unused)] // See migrate.rs.
mod tests {
    use super::*;
    use clap::Parser;

    #[test]
    fn one_in_a_hundred_is_above_the_99th_percentile() {
        let values: Vec<f64> = (1..=200).rev().map(f64::from).collect();
        assert_eq!(percentile(values.clone(), 99), Some(198.0));
        assert_eq!(percentile(values.clone(), 50), Some(100.0));
        assert_eq!(percentile(values, 100), Some(200.0));
        assert_eq!(percentile(vec![7.0], 99), Some(7.0));
        assert_eq!(percentile(Vec::new(), 99), None);
    }

    #[test]
    fn a_write_under_way_at_the_order_is_neither_before_nor_during() {
        let began = Instant::now();
        let millis = Duration::from_millis;
        let write = |due, latency| Write { due: began + millis(due), latency: millis(latency) };
        let mut writes = vec![write(0, 1); WRITES_WARMING];
        writes.extend([write(5, 1), write(9, 2), write(10, 3)]);
        assert_eq!(divide(&writes, began + millis(10)), (vec![1000.0], vec![3000.0]));
    }

    #[test]
    fn a_migration_under_writes_is_seen() {
        let directory = tempfile::tempdir().unwrap();
        let choices = Choices::try_parse_from(["migrate", "--pause-size=4M"]).unwrap();
        let disks = Disks::new(directory.path()).unwrap();
        let program = Path::new(env!("CARGO_BIN_EXE_flexnbd"));
        let seen = measure_once(program, &choices, &disks).unwrap();
        assert!(seen.same && seen.acknowledged && seen.passes > 0, "{seen:?}");
        let mut report = PauseReport::new("flexnbd", &choices);
        report.seen = vec![seen.clone(), Seen { pause_ms: seen.pause_ms + 2, ..seen.clone() }];
        assert_eq!(report.worst_ms(), Some(seen.pause_ms + 2));
        assert_eq!(report.median_ms(), Some(seen.pause_ms as f64 + 1.0));
        assert!(report.json()["before"]["p99_us"].as_f64() > Some(0.0));
    }
}
