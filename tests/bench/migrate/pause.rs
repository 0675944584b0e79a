//! What a client feels of a migration: how long it is kept waiting at the end, and how long its
//! writes take meanwhile. Ours only.

use super::Trouble;
use super::choices::Choices;
use super::client::{Answered, Client, Pace};
use super::disks::{self, Disks, Kind};
use super::ours::Sides;
use super::stats::median;
use super::targets::Target;
use serde_json::{Value, json};
use std::path::Path;
use std::time::{Duration, Instant};

/// How many requests are answered before the migration is ordered: at a fixed rate, and one at a
/// time, which is faster.
const REQUESTS_BEFORE: (usize, usize) = (2000, 10_000);
/// How many of those do not count: the first ones find caches cold.
const REQUESTS_WARMING: usize = 500;
/// How long they may take.
const WARM_TIME_MAX: Duration = Duration::from_secs(60);

/// How long clients may be kept waiting at the handover, in milliseconds.
const PAUSE_MS_MAX: u64 = 50;
/// How many times as long the slowest percent of requests may take during the copy.
const P99_RATIO_MAX: f64 = 3.0;

/// What goes on while a disk is moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Load {
    pub(super) pace: Pace,
    /// How many bytes a second the source may send.
    pub(super) max_speed: Option<u64>,
}

/// What one migration showed.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Seen {
    /// From gate closed to acknowledged, in milliseconds, as the source says.
    pause_ms: u64,
    seconds: f64,
    passes: u64,
    acknowledged: bool,
    same: bool,
    /// How long requests took before the order, in microseconds.
    before_us: Vec<f64>,
    /// How long those took that were due after it and acknowledged before the end.
    during_us: Vec<f64>,
}

/// What all of them showed.
#[derive(Debug)]
pub(super) struct PauseReport {
    pub(super) name: String,
    size: u64,
    load: Load,
    migrations: u32,
    pub(super) seen: Vec<Seen>,
}

impl Load {
    /// Those that are looked at.
    pub(super) fn all(choices: &Choices) -> [Self; 3] {
        let at = |pace, max_speed| Self { pace, max_speed };
        [
            at(Pace::PerSecond(choices.writes_per_sec), None),
            at(Pace::OneByOne, None),
            at(Pace::OneByOne, Some(choices.max_speed)),
        ]
    }

    fn requests_before(self) -> usize {
        match self.pace {
            Pace::PerSecond(_) => REQUESTS_BEFORE.0,
            Pace::OneByOne => REQUESTS_BEFORE.1,
        }
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

/// Moves a full image while a client uses it.
///
/// # Errors
/// When the migration or the client fails.
pub(super) fn measure_once(
    program: &Path,
    load: Load,
    size: u64,
    disks: &Disks,
) -> Result<Seen, Trouble> {
    let pair = disks.make(Kind::Dense, size)?;
    let sides = Sides::start(program, &pair)?;
    let client = Client::start(sides.address, load.pace, load.requests_before())?;
    client.wait_until_warm(WARM_TIME_MAX)?;
    let moved = sides.migrate(load.max_speed)?;
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
fn divide(all: &[Answered], ordered: Instant) -> (Vec<f64>, Vec<f64>) {
    let us = |one: &Answered| one.latency.as_secs_f64() * 1e6;
    let warm = all.iter().skip(REQUESTS_WARMING);
    let before = warm.filter(|one| one.due + one.latency < ordered).map(us).collect();
    let during = all.iter().filter(|one| one.due >= ordered).map(us).collect();
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
    pub(super) fn new(name: &str, load: Load, choices: &Choices) -> Self {
        Self {
            name: name.to_owned(),
            size: choices.pause_size,
            load,
            migrations: choices.migrations,
            seen: Vec::new(),
        }
    }

    /// Prints it; nothing when there is nothing.
    pub(super) fn print(&self) {
        let (Some(median), Some(worst)) = (self.median_ms(), self.worst_ms()) else { return };
        println!(
            "\n{}: {} migrations of {} MiB under {}",
            self.name,
            self.seen.len(),
            self.size >> 20,
            self.load.words()
        );
        println!(
            "  pause from gate closed to acknowledged: median {median:.1} ms, worst {worst} ms"
        );
        println!(
            "  {:24} {:>9} {:>12} {:>12} {:>12}",
            "", "requests", "median µs", "p99 µs", "worst µs"
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

    /// What was wanted, as far as this load can tell.
    pub(super) fn targets(&self) -> Vec<Target> {
        let pause = || {
            let worst = self.worst_ms()?;
            Some(Target {
                of: "pause at the handover under writes at a fixed rate, worst",
                wanted: "≤ 50 ms",
                seen: format!("{worst} ms, {:.0} ms in the median", self.median_ms()?),
                met: worst <= PAUSE_MS_MAX,
            })
        };
        let slower = |of| {
            let ratio = self.p99_ratio()?;
            let seen = format!("× {ratio:.2}");
            Some(Target { of, wanted: "≤ × 3.00", seen, met: ratio <= P99_RATIO_MAX })
        };
        let target = match self.load {
            Load { pace: Pace::PerSecond(_), .. } => pause(),
            Load { max_speed: None, .. } => {
                slower("p99 of requests one at a time during the copy against before")
            }
            Load { .. } => slower("the same with --max-speed"),
        };
        target.into_iter().collect()
    }

    /// Everything but the single requests.
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
            "load": self.load.words(),
            "writes_per_sec": match self.load.pace {
                Pace::PerSecond(rate) => Some(rate),
                Pace::OneByOne => None,
            },
            "max_speed": self.load.max_speed,
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
    json!({ "requests": latencies.len(), "p50_us": of(50), "p99_us": of(99), "worst_us": of(100) })
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
    fn a_request_under_way_at_the_order_is_neither_before_nor_during() {
        let began = Instant::now();
        let millis = Duration::from_millis;
        let one = |due, latency| Answered { due: began + millis(due), latency: millis(latency) };
        let mut all = vec![one(0, 1); REQUESTS_WARMING];
        all.extend([one(5, 1), one(9, 2), one(10, 3)]);
        assert_eq!(divide(&all, began + millis(10)), (vec![1000.0], vec![3000.0]));
    }

    fn choices() -> Choices {
        Choices::try_parse_from(["migrate", "--pause-size=4M"]).unwrap()
    }

    #[test]
    fn a_migration_under_each_load_is_seen() {
        let directory = tempfile::tempdir().unwrap();
        let disks = Disks::new(directory.path()).unwrap();
        let program = Path::new(env!("CARGO_BIN_EXE_flexnbd"));
        for load in Load::all(&choices()) {
            let seen = measure_once(program, load, choices().pause_size, &disks).unwrap();
            assert!(seen.same && seen.acknowledged && seen.passes > 0, "{load:?}: {seen:?}");
            assert!(!seen.before_us.is_empty(), "{load:?}");
        }
    }

    fn seen(pause_ms: u64, before_us: f64, during_us: f64) -> Seen {
        let (before_us, during_us) = (vec![before_us], vec![during_us]);
        Seen { pause_ms, before_us, during_us, ..Seen::default() }
    }

    #[test]
    fn the_worst_pause_is_judged_under_writes_and_the_p99_of_requests_one_at_a_time() {
        let [writes, one_by_one, held] = Load::all(&choices());
        let met = |load, seen| {
            let mut report = PauseReport::new("flexnbd", load, &choices());
            report.seen = seen;
            report.targets().iter().map(|target| target.met).collect::<Vec<_>>()
        };
        assert_eq!(met(writes, vec![seen(50, 1.0, 9.0), seen(1, 1.0, 9.0)]), [true]);
        assert_eq!(met(writes, vec![seen(51, 1.0, 9.0), seen(1, 1.0, 9.0)]), [false]);
        for load in [one_by_one, held] {
            assert_eq!(met(load, vec![seen(99, 10.0, 30.0)]), [true]);
            assert_eq!(met(load, vec![seen(99, 10.0, 30.1)]), [false]);
            assert_eq!(met(load, Vec::new()), [] as [bool; 0]);
        }
    }

    #[test]
    fn pauses_have_a_median_and_a_worst() {
        let mut report = PauseReport::new("flexnbd", Load::all(&choices())[0], &choices());
        report.seen = vec![seen(3, 1.0, 1.0), seen(6, 1.0, 1.0)];
        assert_eq!((report.median_ms(), report.worst_ms()), (Some(4.5), Some(6)));
        assert_eq!(report.json()["before"]["p99_us"], 1.0);
    }
}
