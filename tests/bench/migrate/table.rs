//! What moving one kind of image came to, as a table for people and as JSON for programs.
//! Judges nothing: a ratio is a ratio.

use super::disks::Kind;
use super::stats::median;
use super::systems::System;
use super::targets::Target;
use serde_json::{Value, json};

/// What is printed in MiB.
const MIB: f64 = (1 << 20) as f64;
/// How many times the data may go over the wire, and how many bytes besides for each run of it.
const WIRE_RATIO_MAX: f64 = 1.02;
const WIRE_PER_RUN_MAX: f64 = 1024.0;
/// Which peer copies a disk that nobody uses.
const OFFLINE: &str = "nbdcopy";

/// One migration.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Run {
    pub(super) seconds: f64,
    /// Bytes that went over TCP, headers included, where they were counted.
    pub(super) wire: Option<u64>,
    /// Bytes of data that the source says it sent, if it says so.
    pub(super) bytes_sent: Option<u64>,
    /// Bytes that the source's image takes up.
    pub(super) allocated_before: u64,
    /// Bytes that the destination's file takes up.
    pub(super) allocated_after: u64,
    /// Whether both hold the same afterwards.
    pub(super) same: bool,
}

/// All migrations of one kind of image.
#[derive(Debug)]
pub(super) struct KindReport {
    pub(super) kind: Kind,
    size: u64,
    rows: Vec<Row>,
}

/// Those of one system.
#[derive(Clone, Debug)]
struct Row {
    name: String,
    is_ours: bool,
    runs: Vec<Run>,
    troubles: Vec<String>,
}

impl KindReport {
    /// One of which nothing has been measured.
    pub(super) fn new(kind: Kind, size: u64, systems: &[System]) -> Self {
        let row = |system: &System| Row {
            name: system.name.clone(),
            is_ours: system.ours().is_some(),
            runs: Vec::new(),
            troubles: Vec::new(),
        };
        Self { kind, size, rows: systems.iter().map(row).collect() }
    }

    /// Takes down what came of one more run of the system with this number.
    pub(super) fn add(&mut self, system: usize, run: Result<Run, String>) {
        match run {
            Ok(run) => self.rows[system].runs.push(run),
            Err(trouble) => self.rows[system].troubles.push(trouble),
        }
    }

    /// Prints the medians, and how we compare.
    pub(super) fn print(&self) {
        let data = self.kind.data(self.size);
        println!(
            "\n{}: {:.0} MiB, {:.0} MiB of it data",
            self.kind.word(),
            self.size as f64 / MIB,
            data as f64 / MIB
        );
        println!(
            "  {:16} {:>9} {:>9} {:>12} {:>10} {:>16} {:>9}",
            "", "seconds", "MB/s", "wire MiB", "wire/data", "allocated MiB", "contents"
        );
        self.rows.iter().for_each(|row| println!("{}", row.line(self.size, data)));
        for (name, ratio) in self.ratios() {
            println!("  flexnbd against {name}: rate × {ratio:.2}");
        }
    }

    /// How much may go over the wire, in bytes.
    fn wire_max(&self) -> f64 {
        let (data, runs) = (self.kind.data(self.size), self.kind.runs(self.size));
        WIRE_RATIO_MAX * data as f64 + WIRE_PER_RUN_MAX * runs as f64
    }

    fn ours(&self) -> Option<&Row> {
        self.rows.iter().find(|row| row.is_ours)
    }

    /// How long we took, in the median.
    pub(super) fn seconds(&self) -> Option<f64> {
        self.ours()?.seconds()
    }

    /// What was wanted, as far as this kind can tell. `dense` is how long we took for an image
    /// full of data.
    pub(super) fn targets(&self, dense: Option<f64>) -> Vec<Target> {
        let target = match self.kind {
            Kind::Dense => self.dense_target(),
            Kind::Zeros => None,
            Kind::Sparse25 => self.wire_target("bytes on the wire, 25 % of the disk data", dense),
            Kind::Sparse1 => self.wire_target("bytes on the wire, 1 % of the disk data", dense),
        };
        target.into_iter().collect()
    }

    fn dense_target(&self) -> Option<Target> {
        let (_, ratio) = self.ratios().into_iter().find(|(name, _)| *name == OFFLINE)?;
        Some(Target {
            of: "rate of a migration of a dense disk against nbdcopy's, which is offline",
            wanted: "≥ × 1.00",
            seen: format!("× {ratio:.2}"),
            met: ratio >= 1.0,
        })
    }

    fn wire_target(&self, of: &'static str, dense: Option<f64>) -> Option<Target> {
        let wire = self.ours()?.wire()?;
        let (most, data) = (self.wire_max(), self.kind.data(self.size) as f64);
        let time = dense.and_then(|dense| Some(self.seconds()? / dense));
        let time = time.map(|time| {
            format!(
                "; × {time:.2} the time of a dense disk for × {:.2} the data",
                data / self.size as f64
            )
        });
        Some(Target {
            of,
            wanted: "≤ 1.02 × data + 1 KiB for each run of data",
            seen: format!(
                "{:.2} of {:.2} MiB, × {:.3} the data{}",
                wire / MIB,
                most / MIB,
                wire / data,
                time.unwrap_or_default()
            ),
            met: wire <= most,
        })
    }

    /// How many times the rate of each peer the first of ours has.
    fn ratios(&self) -> Vec<(&str, f64)> {
        let Some(ours) = self.seconds() else { return Vec::new() };
        let peers = self.rows.iter().filter(|row| !row.is_ours);
        peers.filter_map(|row| Some((row.name.as_str(), row.seconds()? / ours))).collect()
    }

    /// Everything, every run included.
    pub(super) fn json(&self) -> Value {
        let ratios: serde_json::Map<String, Value> = self
            .ratios()
            .into_iter()
            .map(|(name, ratio)| (name.to_owned(), ratio.into()))
            .collect();
        json!({
            "kind": self.kind.word(),
            "size": self.size,
            "data": self.kind.data(self.size),
            "runs_of_data": self.kind.runs(self.size),
            "wire_bytes_max": self.wire_max(),
            "systems": self.rows.iter().map(Row::json).collect::<Vec<_>>(),
            "rate_against": ratios,
        })
    }
}

impl Row {
    fn seconds(&self) -> Option<f64> {
        median(self.runs.iter().map(|run| run.seconds).collect())
    }

    /// The median number of bytes, of those that were counted.
    fn wire(&self) -> Option<f64> {
        median(self.runs.iter().filter_map(|run| Some(run.wire? as f64)).collect())
    }

    /// How it is printed, for an image of so many bytes and so many of data.
    fn line(&self, size: u64, data: u64) -> String {
        let (Some(seconds), Some(last)) = (self.seconds(), self.runs.last()) else {
            return format!("  {:16} failed", self.name);
        };
        let wire = self.wire();
        let told = |value: Option<f64>, places| {
            value.map_or("-".to_owned(), |value| format!("{value:.places$}"))
        };
        let per_data = wire.filter(|_| data > 0).map(|wire| wire / data as f64);
        let room = [last.allocated_before, last.allocated_after].map(|room| room as f64 / MIB);
        format!(
            "  {:16} {seconds:>9.3} {:>9.0} {:>12} {:>10} {:>16} {:>9}",
            self.name,
            size as f64 / 1e6 / seconds,
            told(wire.map(|wire| wire / MIB), 2),
            told(per_data, 3),
            format!("{:.1} → {:.1}", room[0], room[1]),
            if self.runs.iter().all(|run| run.same) { "same" } else { "DIFFER" }
        )
    }

    fn json(&self) -> Value {
        let run = |run: &Run| {
            json!({
                "seconds": run.seconds,
                "wire_bytes": run.wire,
                "bytes_sent": run.bytes_sent,
                "allocated_before": run.allocated_before,
                "allocated_after": run.allocated_after,
                "same": run.same,
            })
        };
        json!({
            "system": self.name,
            "seconds": self.seconds(),
            "wire_bytes": self.wire(),
            "runs": self.runs.iter().map(run).collect::<Vec<_>>(),
            "troubles": self.troubles,
        })
    }
}

#[cfg(test)]
#[allow(unused)] // See migrate.rs.
mod tests {
    use super::*;

    fn row(name: &str, is_ours: bool, seconds: &[f64]) -> Row {
        let run = |seconds: &f64| Run { seconds: *seconds, same: true, ..Run::default() };
        let runs = seconds.iter().map(run).collect();
        Row { name: name.to_owned(), is_ours, runs, troubles: Vec::new() }
    }

    fn report(rows: Vec<Row>) -> KindReport {
        KindReport { kind: Kind::Dense, size: 1 << 20, rows }
    }

    #[test]
    fn half_the_time_is_twice_the_rate() {
        let rows = vec![row("flexnbd", true, &[9.0, 2.0, 1.0]), row("qemu", false, &[4.0])];
        assert_eq!(report(rows).ratios(), [("qemu", 2.0)]);
    }

    #[test]
    fn a_dense_disk_is_to_be_moved_no_slower_than_an_offline_copy() {
        let target = |ours| {
            let rows = vec![row("flexnbd", true, &[ours]), row(OFFLINE, false, &[2.0])];
            report(rows).targets(None).remove(0)
        };
        assert_eq!((target(2.0).met, target(2.0).seen.as_str()), (true, "× 1.00"));
        assert!(!target(2.01).met);
    }

    #[test]
    fn the_wire_may_carry_two_percent_and_a_kibibyte_for_each_run_besides_the_data() {
        let mut row = row("flexnbd", true, &[1.0]);
        let (size, data) = (8 << 20, 2 << 20);
        let most = (1.02 * f64::from(data)) as u64 + 2 * 1024;
        for (wire, met) in [(most, true), (most + 1, false)] {
            row.runs[0].wire = Some(wire);
            let report = KindReport { kind: Kind::Sparse25, size, rows: vec![row.clone()] };
            let target = report.targets(Some(5.0)).remove(0);
            assert_eq!(target.met, met, "{target:?}");
            assert!(target.seen.ends_with("× 0.20 the time of a dense disk for × 0.25 the data"));
        }
        row.runs[0].wire = None;
        let report = KindReport { kind: Kind::Sparse25, size, rows: vec![row] };
        assert_eq!(report.targets(None), []);
    }

    #[test]
    fn what_failed_is_compared_with_nothing() {
        let mut report = report(vec![row("flexnbd", true, &[]), row("qemu", false, &[4.0])]);
        report.add(0, Err("died".to_owned()));
        assert_eq!(report.ratios(), []);
        assert_eq!(report.rows[0].line(1, 1), "  flexnbd          failed");
        assert_eq!(report.json()["systems"][0]["troubles"][0], "died");
    }

    #[test]
    fn one_copy_that_differs_is_shown_whatever_the_others_do() {
        let mut row = row("flexnbd", true, &[1.0, 1.0]);
        assert!(row.line(1, 1).ends_with("same"));
        row.runs[0].same = false;
        assert!(row.line(1, 1).ends_with("DIFFER"));
    }

    #[test]
    fn bytes_on_the_wire_are_compared_with_data_where_there_is_data() {
        let mut row = row("flexnbd", true, &[1.0]);
        row.runs[0].wire = Some(3 << 20);
        assert!(row.line(4 << 20, 2 << 20).contains("3.00      1.500"));
        assert!(row.line(4 << 20, 0).contains("3.00          -"));
    }
}
