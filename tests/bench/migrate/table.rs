//! What moving one kind of image came to, as a table for people and as JSON for programs.
//! Judges nothing: a ratio is a ratio.

use super::disks::Kind;
use super::stats::median;
use super::systems::System;
use serde_json::{Value, json};

/// What is printed in MiB.
const MIB: f64 = (1 << 20) as f64;

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
    kind: Kind,
    size: u64,
    rows: Vec<Row>,
}

/// Those of one system.
#[derive(Debug)]
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

    /// How many times the rate of each peer the first of ours has.
    fn ratios(&self) -> Vec<(&str, f64)> {
        let ours = self.rows.iter().find(|row| row.is_ours).and_then(Row::seconds);
        let Some(ours) = ours else { return Vec::new() };
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
