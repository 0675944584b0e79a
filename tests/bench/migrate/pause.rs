//! Effect of a migration on a client: the pause at the handover, and latency during the copy.
//! Measures flexnbd only.

use super::client::{Client, Completion, Pace};
use super::disks::{self, Kind, Pair};
use super::report::{Table, Target, figure};
use super::stats::{median, percentile};
use super::systems::Sides;
use super::{Error, Options};
use serde::{Serialize, Serializer};
use serde_json::{Value, json};
use std::path::Path;
use std::time::{Duration, Instant};

/// How many requests precede the migration, at a fixed rate and one at a time, which is faster.
const REQUESTS_BEFORE: (usize, usize) = (2000, 10_000);
/// The first requests find caches cold and do not count.
const REQUESTS_WARMING: usize = 500;
const WARM_TIME_MAX: Duration = Duration::from_secs(60);
const TABLE: Table<4> = Table { name_width: 24, widths: [9, 12, 12, 12] };

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Load {
    pace: Pace,
    /// Limit of the source, in bytes per second.
    max_speed: Option<u64>,
}

/// One migration under load.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub(super) struct Observation {
    /// From gate closed to acknowledged, as the source reports.
    pause_ms: u64,
    seconds: f64,
    passes: u64,
    acknowledged: bool,
    same: bool,
    /// Latencies of requests that ended before the order, in microseconds.
    #[serde(serialize_with = "summarize")]
    before: Vec<f64>,
    /// Latencies of requests that were due after the order and completed at the source.
    #[serde(serialize_with = "summarize")]
    during: Vec<f64>,
}

/// All migrations under one load.
#[derive(Debug)]
pub(super) struct PauseResult {
    pub(super) name: String,
    size: u64,
    load: Load,
    migrations: u32,
    pub(super) observations: Vec<Observation>,
}

impl Load {
    pub(super) fn all(options: &Options) -> [Self; 3] {
        [
            Self { pace: Pace::PerSecond(options.writes_per_sec), max_speed: None },
            Self { pace: Pace::OneByOne, max_speed: None },
            Self { pace: Pace::OneByOne, max_speed: Some(options.max_speed) },
        ]
    }

    fn words(self) -> String {
        let client = match self.pace {
            Pace::PerSecond(rate) => format!("{rate} writes of 4 KiB a second"),
            Pace::OneByOne => "reads and writes of 4 KiB, one at a time".to_owned(),
        };
        let limit = self.max_speed.map(|rate| format!(", the source held to {} MiB/s", rate >> 20));
        client + &limit.unwrap_or_default()
    }
}

/// Migrates a dense image while a client uses it.
pub(super) fn measure_once(
    program: &Path,
    load: Load,
    options: &Options,
) -> Result<Observation, Error> {
    let pair = Pair::new(&options.dir, Kind::Dense, options.pause_size)?;
    let sides = Sides::start(program, &pair)?;
    let requests_before = match load.pace {
        Pace::PerSecond(_) => REQUESTS_BEFORE.0,
        Pace::OneByOne => REQUESTS_BEFORE.1,
    };
    let client = Client::start(sides.address, load.pace, requests_before)?;
    client.wait_until_warm(WARM_TIME_MAX)?;
    let moved = sides.migrate(load.max_speed)?;
    let (before, during) = divide(&client.finish()?, moved.ordered);
    Ok(Observation {
        pause_ms: u64::try_from(moved.summary.pause.as_millis())?,
        seconds: moved.elapsed.as_secs_f64(),
        passes: moved.summary.passes,
        acknowledged: moved.summary.acknowledged,
        same: disks::same(&pair.source, &pair.destination)?,
        before,
        during,
    })
}

/// Latencies in microseconds of requests that ended before the order, and of those due after it.
/// Requests in flight at the order belong to neither.
fn divide(all: &[Completion], ordered: Instant) -> (Vec<f64>, Vec<f64>) {
    let us = |one: &Completion| one.latency.as_secs_f64() * 1e6;
    let warm = all.iter().skip(REQUESTS_WARMING);
    let before = warm.filter(|one| one.due + one.latency < ordered).map(us).collect();
    let during = all.iter().filter(|one| one.due >= ordered).map(us).collect();
    (before, during)
}

impl PauseResult {
    pub(super) fn new(name: &str, load: Load, options: &Options) -> Self {
        Self {
            name: name.to_owned(),
            size: options.pause_size,
            load,
            migrations: options.migrations,
            observations: Vec::new(),
        }
    }

    /// Prints the table, unless there are no migrations.
    pub(super) fn print(&self) {
        let (Some(median), Some(worst)) = (self.median_ms(), self.worst_ms()) else { return };
        let (name, count, mib) = (&self.name, self.observations.len(), self.size >> 20);
        println!("\n{name}: {count} migrations of {mib} MiB under {}", self.load.words());
        println!(
            "  pause from gate closed to acknowledged: median {median:.1} ms, worst {worst} ms"
        );
        TABLE.print_row("", ["requests", "median µs", "p99 µs", "worst µs"]);
        for (name, latencies) in [("before", self.before()), ("during the copy", self.during())] {
            let of = |percent| figure(percentile(latencies.clone(), percent), 0);
            TABLE.print_row(name, [latencies.len().to_string(), of(50), of(99), of(100)]);
        }
        if let Some(ratio) = self.p99_ratio() {
            println!("  p99 during the copy against before: × {ratio:.2}");
        }
        let is_wrong = |one: &&Observation| !(one.same && one.acknowledged);
        match self.observations.iter().filter(is_wrong).count() {
            0 => println!("  contents: same"),
            wrong => println!("  contents: {wrong} DIFFER"),
        }
    }

    fn median_ms(&self) -> Option<f64> {
        median(self.observations.iter().map(|one| one.pause_ms as f64).collect())
    }

    fn worst_ms(&self) -> Option<u64> {
        self.observations.iter().map(|one| one.pause_ms).max()
    }

    fn before(&self) -> Vec<f64> {
        self.observations.iter().flat_map(|one| one.before.clone()).collect()
    }

    fn during(&self) -> Vec<f64> {
        self.observations.iter().flat_map(|one| one.during.clone()).collect()
    }

    fn p99_ratio(&self) -> Option<f64> {
        Some(percentile(self.during(), 99)? / percentile(self.before(), 99)?)
    }

    /// The target for this load.
    pub(super) fn target(&self) -> Option<Target> {
        if let Pace::PerSecond(_) = self.load.pace {
            let (worst, median) = (self.worst_ms()?, self.median_ms()?);
            let of = "pause at the handover under writes at a fixed rate, worst";
            let seen = format!("{worst} ms, {median:.0} ms in the median");
            return Some(Target::new(of, "≤ 50 ms", seen, worst <= 50));
        }
        let ratio = self.p99_ratio()?;
        let of = match self.load.max_speed {
            None => "p99 of requests one at a time during the copy against before",
            Some(_) => "the same with --max-speed",
        };
        Some(Target::new(of, "≤ × 3.00", format!("× {ratio:.2}"), ratio <= 3.0))
    }

    /// Everything except single requests.
    pub(super) fn json(&self) -> Value {
        let writes_per_sec =
            if let Pace::PerSecond(rate) = self.load.pace { Some(rate) } else { None };
        json!({
            "system": self.name,
            "size": self.size,
            "load": self.load.words(),
            "writes_per_sec": writes_per_sec,
            "max_speed": self.load.max_speed,
            "migrations_wanted": self.migrations,
            "migrations": self.observations,
            "pause_ms_median": self.median_ms(),
            "pause_ms_worst": self.worst_ms(),
            "before": summary(&self.before()),
            "during": summary(&self.during()),
            "p99_ratio": self.p99_ratio(),
        })
    }
}

fn summary(latencies: &[f64]) -> Value {
    let of = |percent| percentile(latencies.to_vec(), percent);
    json!({ "requests": latencies.len(), "p50_us": of(50), "p99_us": of(99), "worst_us": of(100) })
}

fn summarize<S: Serializer>(latencies: &[f64], serializer: S) -> Result<S::Ok, S::Error> {
    summary(latencies).serialize(serializer)
}

#[cfg(test)]
#[allow(unused)] // See peers.rs.
mod tests {
    use super::*;
    use clap::Parser;

    #[test]
    fn a_request_in_flight_at_the_order_does_not_count() {
        let start = Instant::now();
        let millis = Duration::from_millis;
        let one = |due, latency| Completion { due: start + millis(due), latency: millis(latency) };
        let mut all = vec![one(0, 1); REQUESTS_WARMING];
        all.extend([one(5, 1), one(9, 2), one(10, 3)]);
        assert_eq!(divide(&all, start + millis(10)), (vec![1000.0], vec![3000.0]));
    }

    #[test]
    fn a_migration_under_each_load_is_observed() {
        let directory = tempfile::tempdir().unwrap();
        let dir = directory.path().to_str().unwrap();
        let options = Options::parse_from(["migrate", "--pause-size=4M", "--dir", dir]);
        let program = Path::new(env!("CARGO_BIN_EXE_flexnbd"));
        for load in Load::all(&options) {
            let seen = measure_once(program, load, &options).unwrap();
            assert!(seen.same && seen.acknowledged && seen.passes > 0, "{load:?}: {seen:?}");
            assert!(!seen.before.is_empty(), "{load:?}");
        }
    }

    #[test]
    fn the_worst_pause_and_the_p99_are_compared_with_their_limits() {
        let options = Options::parse_from(["migrate"]);
        let met = |load, pause_ms, during| {
            let (before, during) = (vec![10.0], vec![during]);
            let worst = Observation { pause_ms, before, during, ..Observation::default() };
            let mut result = PauseResult::new("flexnbd", load, &options);
            result.observations = vec![worst, Observation::default()];
            result.target().unwrap().met
        };
        let [writes, one_by_one, limited] = Load::all(&options);
        assert!(met(writes, 50, 99.0) && !met(writes, 51, 1.0));
        for load in [one_by_one, limited] {
            assert!(met(load, 99, 30.0) && !met(load, 1, 30.1));
        }
    }
}
