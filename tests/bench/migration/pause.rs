//! Effect of a migration on a client: the pause at the handover, and latency during the copy.
//! Measures flexnbd only.

use super::Options;
use super::client::{Client, Completion, Pace};
use super::disks::{Kind, Pair};
use super::systems::Sides;
use crate::report::{Error, Target, figure, median, print_row};
use serde::Serialize;
use std::path::Path;
use std::time::Instant;

/// How many requests precede the migration, at a fixed rate and one at a time, which is faster.
const REQUESTS_BEFORE: (usize, usize) = (2000, 10_000);
/// The first requests find caches cold and do not count.
pub(crate) const REQUESTS_WARMING: usize = 500;
/// The first column leaves room for the longer names of this table.
const WIDTHS: [usize; 4] = [17, 12, 12, 12];

#[derive(Debug, Serialize)]
pub(crate) struct Observation {
    /// From gate closed to acknowledged, as the source reports.
    pause_ms: u64,
    seconds: f64,
    passes: u64,
    acknowledged: bool,
    same: bool,
    /// Requests that ended before the order.
    before: Latencies,
    /// Requests that were due after the order and completed at the source.
    during: Latencies,
}

#[derive(Debug, PartialEq, Serialize)]
pub(crate) struct Latencies {
    requests: usize,
    p50_us: Option<f64>,
    p99_us: Option<f64>,
    worst_us: Option<f64>,
    /// All of them, in microseconds.
    #[serde(skip)]
    pub(crate) all: Vec<f64>,
}

/// All migrations under one load.
#[derive(Debug, Serialize)]
pub(crate) struct PauseResult {
    pub(crate) system: String,
    size: u64,
    load: String,
    writes_per_sec: Option<u32>,
    max_speed: Option<u64>,
    migrations_wanted: u32,
    migrations: Vec<Observation>,
    pause_ms_median: Option<f64>,
    pause_ms_worst: Option<u64>,
    before: Latencies,
    during: Latencies,
    p99_ratio: Option<f64>,
}

/// The loads: the pace of the client, and the limit of the source in bytes per second.
pub(crate) fn loads(options: &Options) -> [(Pace, Option<u64>); 3] {
    let limit = Some(options.max_speed);
    let writes = Pace::PerSecond(options.writes_per_sec);
    [(writes, None), (Pace::OneByOne, None), (Pace::OneByOne, limit)]
}

/// Migrates a dense image while a client uses it.
fn measure_once(
    program: &Path,
    (pace, max_speed): (Pace, Option<u64>),
    options: &Options,
) -> Result<Observation, Error> {
    let pair = Pair::new(&options.dir, Kind::Dense, options.pause_size)?;
    let sides = Sides::start(program, &pair)?;
    let requests_before = match pace {
        Pace::PerSecond(_) => REQUESTS_BEFORE.0,
        Pace::OneByOne => REQUESTS_BEFORE.1,
    };
    let client = Client::start(sides.address(), pace, requests_before)?;
    let moved = sides.migrate(max_speed)?;
    let (before, during) = divide(&client.finish()?, moved.ordered);
    Ok(Observation {
        pause_ms: u64::try_from(moved.summary.pause.as_millis())?,
        seconds: moved.elapsed.as_secs_f64(),
        passes: moved.summary.passes,
        acknowledged: moved.summary.acknowledged,
        same: pair.has_equal_contents()?,
        before,
        during,
    })
}

/// Latencies of requests that ended before the order, and of those due after it. Requests in flight
/// at the order belong to neither.
pub(crate) fn divide(all: &[Completion], ordered: Instant) -> (Latencies, Latencies) {
    let us = |one: &Completion| one.latency.as_secs_f64() * 1e6;
    let warm = all.iter().skip(REQUESTS_WARMING);
    let before = warm.filter(|one| one.due + one.latency < ordered).map(us).collect();
    let during = all.iter().filter(|one| one.due >= ordered).map(us).collect();
    (Latencies::new(before), Latencies::new(during))
}

/// The smallest value that `percent` of all values do not exceed.
pub(crate) fn percentile(mut values: Vec<f64>, percent: usize) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let rank = (values.len() * percent).div_ceil(100);
    values.get(rank.saturating_sub(1)).copied()
}

impl Latencies {
    fn new(all: Vec<f64>) -> Self {
        let of = |percent| percentile(all.clone(), percent);
        let (p50_us, p99_us, worst_us) = (of(50), of(99), of(100));
        Self { requests: all.len(), p50_us, p99_us, worst_us, all }
    }

    fn print(&self, name: &str) {
        let of = |us| figure(us, 0);
        let (p50, p99, worst) = (of(self.p50_us), of(self.p99_us), of(self.worst_us));
        print_row(name, WIDTHS, [self.requests.to_string(), p50, p99, worst]);
    }
}

impl PauseResult {
    /// Measures all migrations of a build of flexnbd under one load.
    pub(crate) fn measure(
        system: &str,
        program: &Path,
        load: (Pace, Option<u64>),
        options: &Options,
    ) -> Self {
        let mut migrations = Vec::new();
        for number in 1..=options.migrations {
            match measure_once(program, load, options) {
                Ok(observation) => migrations.push(observation),
                Err(error) => println!("# migration {number}: {system}: {error}"),
            }
        }
        let (pace, max_speed) = load;
        let (client, writes_per_sec) = match pace {
            Pace::PerSecond(rate) => (format!("{rate} writes of 4 KiB a second"), Some(rate)),
            Pace::OneByOne => ("reads and writes of 4 KiB, one at a time".to_owned(), None),
        };
        let limit = max_speed.map(|rate| format!(", the source held to {} MiB/s", rate >> 20));
        let all = |of: fn(&Observation) -> &Latencies| {
            Latencies::new(migrations.iter().flat_map(|one| of(one).all.clone()).collect())
        };
        let (before, during) = (all(|one| &one.before), all(|one| &one.during));
        Self {
            system: system.to_owned(),
            size: options.pause_size,
            load: client + &limit.unwrap_or_default(),
            writes_per_sec,
            max_speed,
            migrations_wanted: options.migrations,
            pause_ms_median: median(migrations.iter().map(|one| one.pause_ms as f64)),
            pause_ms_worst: migrations.iter().map(|one| one.pause_ms).max(),
            migrations,
            p99_ratio: during.p99_us.zip(before.p99_us).map(|(during, before)| during / before),
            before,
            during,
        }
    }

    pub(crate) fn print(&self) {
        let Some((median, worst)) = self.pause_ms_median.zip(self.pause_ms_worst) else { return };
        let (name, count, mib) = (&self.system, self.migrations.len(), self.size >> 20);
        println!("\n{name}: {count} migrations of {mib} MiB under {}", self.load);
        println!(
            "  pause from gate closed to acknowledged: median {median:.1} ms, worst {worst} ms"
        );
        print_row("", WIDTHS, ["requests", "median µs", "p99 µs", "worst µs"]);
        self.before.print("before");
        self.during.print("during the copy");
        if let Some(ratio) = self.p99_ratio {
            println!("  p99 during the copy against before: × {ratio:.2}");
        }
        match self.migrations.iter().filter(|one| !(one.same && one.acknowledged)).count() {
            0 => println!("  contents: same"),
            wrong => println!("  contents: {wrong} DIFFER"),
        }
    }

    pub(crate) fn target(&self) -> Option<Target> {
        if self.writes_per_sec.is_some() {
            let (worst, median) = self.pause_ms_worst.zip(self.pause_ms_median)?;
            let of = "pause at the handover under writes at a fixed rate, worst";
            let seen = format!("{worst} ms, {median:.0} ms in the median");
            return Some(Target::new(of, "≤ 50 ms", seen, worst <= 50));
        }
        let ratio = self.p99_ratio?;
        let of = match self.max_speed {
            None => "p99 of requests one at a time during the copy against before",
            Some(_) => "the same with --max-speed",
        };
        Some(Target::new(of, "≤ × 3.00", format!("× {ratio:.2}"), ratio <= 3.0))
    }
}
