//! Migrations of one kind of image: the table, the targets and JSON.

use super::disks::Kind;
use super::report::{Table, Target, figure};
use super::stats::median;
use super::systems::System;
use serde::Serialize;
use serde_json::{Map, Value, json};

const MIB: f64 = (1 << 20) as f64;
const TABLE: Table<6> = Table { name_width: 16, widths: [9, 9, 12, 10, 16, 9] };

/// One migration.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub(super) struct Run {
    pub(super) seconds: f64,
    /// Bytes over TCP, headers included, if they could be counted.
    pub(super) wire_bytes: Option<u64>,
    /// Bytes of data that the source reports as sent, if it reports them.
    pub(super) bytes_sent: Option<u64>,
    /// Bytes that the source's image and the destination's file occupy.
    pub(super) allocated_before: u64,
    pub(super) allocated_after: u64,
    /// Whether both have the same content afterwards.
    pub(super) same: bool,
}

/// All migrations of one kind of image.
#[derive(Debug)]
pub(super) struct KindResult {
    pub(super) kind: Kind,
    size: u64,
    pub(super) systems: Vec<SystemResult>,
}

#[derive(Clone, Debug, Serialize)]
pub(super) struct SystemResult {
    #[serde(rename = "system")]
    name: String,
    #[serde(skip)]
    is_flexnbd: bool,
    pub(super) runs: Vec<Run>,
    #[serde(rename = "troubles")]
    pub(super) errors: Vec<String>,
}

impl KindResult {
    pub(super) fn new(kind: Kind, size: u64, systems: &[System]) -> Self {
        let result = |system: &System| SystemResult {
            name: system.name.clone(),
            is_flexnbd: system.flexnbd().is_some(),
            runs: Vec::new(),
            errors: Vec::new(),
        };
        Self { kind, size, systems: systems.iter().map(result).collect() }
    }

    pub(super) fn print(&self) {
        let (kind, size, data) = (self.kind.word(), self.size as f64, self.data());
        println!("\n{kind}: {:.0} MiB, {:.0} MiB of it data", size / MIB, data / MIB);
        let head = ["seconds", "MB/s", "wire MiB", "wire/data", "allocated MiB", "contents"];
        TABLE.print_row("", head);
        for system in &self.systems {
            let (Some(seconds), Some(last)) = (system.seconds(), system.runs.last()) else {
                println!("  {:16} failed", system.name);
                continue;
            };
            let wire = system.wire_bytes();
            let allocated = [last.allocated_before, last.allocated_after].map(|n| n as f64 / MIB);
            let is_same = system.runs.iter().all(|run| run.same);
            let cells = [
                figure(seconds, 3),
                figure(size / 1e6 / seconds, 0),
                figure(wire.map(|wire| wire / MIB), 2),
                figure(wire.filter(|_| data > 0.0).map(|wire| wire / data), 3),
                format!("{:.1} → {:.1}", allocated[0], allocated[1]),
                if is_same { "same" } else { "DIFFER" }.to_owned(),
            ];
            TABLE.print_row(&system.name, cells);
        }
        for (name, ratio) in self.ratios() {
            println!("  flexnbd against {name}: rate × {ratio:.2}");
        }
    }

    fn data(&self) -> f64 {
        self.kind.data(self.size) as f64
    }

    fn wire_bytes_max(&self) -> f64 {
        1.02 * self.data() + 1024.0 * self.kind.runs(self.size) as f64
    }

    fn flexnbd(&self) -> Option<&SystemResult> {
        self.systems.iter().find(|system| system.is_flexnbd)
    }

    /// flexnbd's median time.
    pub(super) fn seconds(&self) -> Option<f64> {
        self.flexnbd()?.seconds()
    }

    /// flexnbd's rate over that of each peer.
    fn ratios(&self) -> Vec<(&str, f64)> {
        let Some(ours) = self.seconds() else { return Vec::new() };
        let peers = self.systems.iter().filter(|system| !system.is_flexnbd);
        peers.filter_map(|peer| Some((peer.name.as_str(), peer.seconds()? / ours))).collect()
    }

    /// The target for this kind. `dense` is flexnbd's median time for a dense image.
    pub(super) fn target(&self, dense: Option<f64>) -> Option<Target> {
        let of = match self.kind {
            Kind::Zeros => return None,
            Kind::Dense => {
                let ratio = self.ratios().into_iter().find(|(name, _)| *name == "nbdcopy")?.1;
                let of = "rate of a migration of a dense disk against nbdcopy's, which is offline";
                let seen = format!("× {ratio:.2}");
                return Some(Target::new(of, "≥ × 1.00", seen, ratio >= 1.0));
            }
            Kind::Sparse25 => "bytes on the wire, 25 % of the disk data",
            Kind::Sparse1 => "bytes on the wire, 1 % of the disk data",
        };
        let (wire, max, data) = (self.flexnbd()?.wire_bytes()?, self.wire_bytes_max(), self.data());
        let time = self.seconds().zip(dense).map(|(seconds, dense)| {
            let (time, part) = (seconds / dense, data / self.size as f64);
            format!("; × {time:.2} the time of a dense disk for × {part:.2} the data")
        });
        let (wire_mib, max_mib, ratio) = (wire / MIB, max / MIB, wire / data);
        let seen = format!("{wire_mib:.2} of {max_mib:.2} MiB, × {ratio:.3} the data");
        let wanted = "≤ 1.02 × data + 1 KiB for each run of data";
        Some(Target::new(of, wanted, seen + &time.unwrap_or_default(), wire <= max))
    }

    pub(super) fn json(&self) -> Value {
        let ratios: Map<String, Value> =
            self.ratios().iter().map(|(name, ratio)| ((*name).to_owned(), json!(ratio))).collect();
        let system = |system: &SystemResult| {
            let mut json = json!(system);
            json["seconds"] = json!(system.seconds());
            json["wire_bytes"] = json!(system.wire_bytes());
            json
        };
        json!({
            "kind": self.kind,
            "size": self.size,
            "data": self.kind.data(self.size),
            "runs_of_data": self.kind.runs(self.size),
            "wire_bytes_max": self.wire_bytes_max(),
            "systems": self.systems.iter().map(system).collect::<Vec<_>>(),
            "rate_against": ratios,
        })
    }
}

impl SystemResult {
    fn seconds(&self) -> Option<f64> {
        median(self.runs.iter().map(|run| run.seconds).collect())
    }

    fn wire_bytes(&self) -> Option<f64> {
        median(self.runs.iter().filter_map(|run| Some(run.wire_bytes? as f64)).collect())
    }
}

#[cfg(test)]
#[allow(unused)] // See peers.rs.
mod tests {
    use super::*;

    fn system(name: &str, seconds: &[f64], wire_bytes: Option<u64>) -> SystemResult {
        let run = |seconds: &f64| Run { seconds: *seconds, wire_bytes, ..Run::default() };
        let runs = seconds.iter().map(run).collect();
        let is_flexnbd = name == "flexnbd";
        SystemResult { name: name.to_owned(), is_flexnbd, runs, errors: Vec::new() }
    }

    #[test]
    fn half_the_time_is_twice_the_rate() {
        let peers = [system("nbdcopy", &[4.0], None), system("qemu", &[], None)];
        let result = |ours: &[f64]| KindResult {
            kind: Kind::Dense,
            size: 1 << 20,
            systems: [vec![system("flexnbd", ours, None)], peers.to_vec()].concat(),
        };
        assert_eq!(result(&[9.0, 2.0, 1.0]).ratios(), [("nbdcopy", 2.0)]);
        assert_eq!(result(&[]).ratios(), []);
        let met = |seconds| result(&[seconds]).target(None).unwrap().met;
        assert!(met(4.0) && !met(4.01));
    }

    #[test]
    fn the_wire_limit_is_two_percent_and_a_kibibyte_per_run_above_the_data() {
        let max = (1.02 * f64::from(2 << 20)) as u64 + 2 * 1024;
        for (wire, met) in [(Some(max), Some(true)), (Some(max + 1), Some(false)), (None, None)] {
            let systems = vec![system("flexnbd", &[1.0], wire)];
            let result = KindResult { kind: Kind::Sparse25, size: 8 << 20, systems };
            assert_eq!(result.target(Some(5.0)).map(|target| target.met), met);
        }
    }
}
