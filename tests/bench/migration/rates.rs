//! Migrations of one kind of image: the table, the targets and JSON.

use super::disks::Kind;
use crate::report::{Target, figure, median, print_row};
use serde::Serialize;
use std::collections::BTreeMap;

const MIB: f64 = (1 << 20) as f64;
const WIDTHS: [usize; 6] = [9, 9, 12, 10, 16, 9];

#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(crate) struct Run {
    pub(crate) seconds: f64,
    /// Bytes over TCP, headers included, if they could be counted.
    pub(crate) wire_bytes: Option<u64>,
    /// Bytes of data that the source reports as sent, if it reports them.
    pub(crate) bytes_sent: Option<u64>,
    /// Bytes that the source's image and the destination's file occupy.
    pub(crate) allocated_before: u64,
    pub(crate) allocated_after: u64,
    /// Whether both have the same content afterwards.
    pub(crate) same: bool,
}

/// All migrations of one kind of image.
#[derive(Debug, Serialize)]
pub(crate) struct KindResult {
    pub(crate) kind: Kind,
    size: u64,
    data: u64,
    runs_of_data: u64,
    wire_bytes_max: f64,
    systems: Vec<SystemResult>,
    /// flexnbd's rate over that of each peer.
    pub(crate) rate_against: BTreeMap<String, f64>,
}

#[derive(Clone, Debug, Serialize)]
pub(crate) struct SystemResult {
    system: String,
    #[serde(skip)]
    is_flexnbd: bool,
    runs: Vec<Run>,
    troubles: Vec<String>,
    seconds: Option<f64>,
    wire_bytes: Option<f64>,
}

impl SystemResult {
    pub(crate) fn new(name: &str, is_flexnbd: bool, runs: Vec<Result<Run, String>>) -> Self {
        let troubles = runs.iter().filter_map(|run| run.clone().err()).collect();
        let runs: Vec<Run> = runs.into_iter().flatten().collect();
        let seconds = median(runs.iter().map(|run| run.seconds));
        let wire_bytes = median(runs.iter().filter_map(|run| Some(run.wire_bytes? as f64)));
        Self { system: name.to_owned(), is_flexnbd, runs, troubles, seconds, wire_bytes }
    }
}

impl KindResult {
    pub(crate) fn new(kind: Kind, size: u64, systems: Vec<SystemResult>) -> Self {
        let (data, runs_of_data) = (kind.data(size), kind.runs(size));
        let wire_bytes_max = 1.02 * data as f64 + 1024.0 * runs_of_data as f64;
        let rate_against = BTreeMap::new();
        let mut result =
            Self { kind, size, data, runs_of_data, wire_bytes_max, systems, rate_against };
        let ours = result.seconds();
        let peers = result.systems.iter().filter(|system| !system.is_flexnbd);
        let rates = peers.filter_map(|peer| Some((peer.system.clone(), peer.seconds? / ours?)));
        result.rate_against = rates.collect();
        result
    }

    pub(crate) fn seconds(&self) -> Option<f64> {
        self.systems.iter().find(|system| system.is_flexnbd)?.seconds
    }

    pub(crate) fn print(&self) {
        let (kind, size, data) = (self.kind.word(), self.size as f64, self.data as f64);
        println!("\n{kind}: {:.0} MiB, {:.0} MiB of it data", size / MIB, data / MIB);
        let head = ["seconds", "MB/s", "wire MiB", "wire/data", "allocated MiB", "contents"];
        print_row("", WIDTHS, head);
        for SystemResult { system, runs, seconds, wire_bytes, .. } in &self.systems {
            let (Some(seconds), Some(last)) = (*seconds, runs.last()) else {
                println!("  {system:16} failed");
                continue;
            };
            let allocated = [last.allocated_before, last.allocated_after].map(|n| n as f64 / MIB);
            let cells = [
                figure(seconds, 3),
                figure(size / 1e6 / seconds, 0),
                figure(wire_bytes.map(|wire| wire / MIB), 2),
                figure(wire_bytes.filter(|_| data > 0.0).map(|wire| wire / data), 3),
                format!("{:.1} → {:.1}", allocated[0], allocated[1]),
                if runs.iter().all(|run| run.same) { "same" } else { "DIFFER" }.to_owned(),
            ];
            print_row(system, WIDTHS, cells);
        }
        for SystemResult { system, .. } in &self.systems {
            if let Some(rate) = self.rate_against.get(system) {
                println!("  flexnbd against {system}: rate × {rate:.2}");
            }
        }
    }

    /// The target for this kind. `dense` is flexnbd's median time for a dense image.
    pub(crate) fn target(&self, dense: Option<f64>) -> Option<Target> {
        let of = match self.kind {
            Kind::Zeros => return None,
            Kind::Dense => {
                let rate = *self.rate_against.get("nbdcopy")?;
                let of = "rate of a migration of a dense disk against nbdcopy's, which is offline";
                return Some(Target::new(of, "≥ × 1.00", format!("× {rate:.2}"), rate >= 1.0));
            }
            Kind::Sparse25 => "bytes on the wire, 25 % of the disk data",
            Kind::Sparse1 => "bytes on the wire, 1 % of the disk data",
        };
        let wire = self.systems.iter().find(|system| system.is_flexnbd)?.wire_bytes?;
        let (max, data) = (self.wire_bytes_max, self.data as f64);
        let time = self.seconds().zip(dense).map(|(seconds, dense)| {
            let (time, part) = (seconds / dense, data / self.size as f64);
            format!("; × {time:.2} the time of a dense disk for × {part:.2} the data")
        });
        let (wire_mib, max_mib, ratio) = (wire / MIB, max / MIB, wire / data);
        let seen = format!("{wire_mib:.2} of {max_mib:.2} MiB, × {ratio:.3} the data");
        let wanted = "≤ 1.02 × data + 1 KiB for each run of data";
        Some(Target::new(of, wanted, seen + &time.unwrap_or_default(), wire <= max))
    }
}
