//! The results of a run: the table of each cell, and the JSON file, which can be read back.

use super::activation::ActivationRow;
use super::cells::{Cell, Generator};
use super::machine::{self, Machine};
use super::memory::MemoryRow;
use super::report::{Table, figure, write_json};
use super::servers::Server;
use super::stats::median;
use super::summary;
use super::{Error, Setup};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::fs;
use std::path::Path;

/// A client that computes for more than this part of the time is probably the bottleneck.
const CLIENT_BUSY_MAX: f64 = 0.95;
const TABLE: Table<6> = Table { name_width: 16, widths: [11, 9, 12, 12, 12, 0] };

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Results {
    pub(super) about: About,
    pub(super) cells: Vec<CellResult>,
    pub(super) memory: Vec<MemoryRow>,
    pub(super) activation: Vec<ActivationRow>,
}

/// The environment and options of the run.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct About {
    pub(super) machine: Machine,
    pub(super) servers: Vec<AboutServer>,
    /// Version of fio, if any cell uses it.
    fio: Option<String>,
    pub(super) rounds: u32,
    pub(super) seconds: f64,
    image_mib: u64,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct AboutServer {
    pub(super) name: String,
    pub(super) ours: bool,
    pub(super) version: String,
    usage: String,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct CellResult {
    #[serde(flatten)]
    pub(super) cell: Cell,
    pub(super) servers: Vec<ServerResult>,
}

/// One server in one cell.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct ServerResult {
    #[serde(rename = "server")]
    name: String,
    ours: bool,
    pub(super) rounds: Vec<Round>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Round {
    Measured(Sample),
    Failed(String),
}

/// The figures of one round.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Sample {
    pub(super) requests_per_sec: f64,
    /// Millions of bytes.
    pub(super) mb_per_sec: f64,
    /// User and system time of the server's processes, in microseconds.
    pub(super) server_cpu_us_per_request: f64,
    /// Part of the time in which the client computed.
    pub(super) client_busy: f64,
    /// Peak resident size of the server's processes, in MiB.
    pub(super) rss_peak_mib: f64,
}

/// flexnbd against the best peer of a cell.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Ratio {
    /// The peer with the highest median rate.
    pub(super) peer: String,
    /// Median rate over that peer's. Above 1: flexnbd answers more requests.
    pub(super) rate: f64,
    /// The same in the worst and in the best round for flexnbd.
    pub(super) rate_lowest: f64,
    pub(super) rate_highest: f64,
    /// Processor time per request over the lowest of any peer.
    pub(super) cpu: f64,
    pub(super) limited_by_client: bool,
}

impl Sample {
    /// The median of each figure by itself.
    fn median(samples: &[Self]) -> Option<Self> {
        let of = |figure: fn(&Self) -> f64| median(samples.iter().map(figure).collect());
        Some(Self {
            requests_per_sec: of(|s| s.requests_per_sec)?,
            mb_per_sec: of(|s| s.mb_per_sec)?,
            server_cpu_us_per_request: of(|s| s.server_cpu_us_per_request)?,
            client_busy: of(|s| s.client_busy)?,
            rss_peak_mib: of(|s| s.rss_peak_mib)?,
        })
    }

    fn is_limited_by_client(&self) -> bool {
        self.client_busy > CLIENT_BUSY_MAX
    }
}

impl Round {
    fn rate(&self) -> Option<f64> {
        self.sample().map(|sample| sample.requests_per_sec)
    }

    fn sample(&self) -> Option<Sample> {
        if let Self::Measured(sample) = self { Some(*sample) } else { None }
    }
}

impl ServerResult {
    fn median(&self) -> Option<Sample> {
        Sample::median(&self.rounds.iter().filter_map(Round::sample).collect::<Vec<_>>())
    }

    fn print(&self) {
        let Some(median) = self.median() else {
            println!("  {:16} failed", self.name);
            return;
        };
        let limited = if median.is_limited_by_client() { " limited by the client" } else { "" };
        let cells = [
            figure(median.requests_per_sec, 0),
            figure(median.mb_per_sec, 0),
            figure(median.server_cpu_us_per_request, 2),
            figure(median.client_busy * 100.0, 0) + "%",
            figure(median.rss_peak_mib, 1),
            limited.to_owned(),
        ];
        TABLE.print_row(&self.name, cells);
    }
}

impl CellResult {
    pub(super) fn new(cell: &Cell, servers: &[Server]) -> Self {
        let result = |server: &Server| ServerResult {
            name: server.name.clone(),
            ours: server.is_flexnbd(),
            rounds: Vec::new(),
        };
        Self { cell: *cell, servers: servers.iter().map(result).collect() }
    }

    pub(super) fn print(&self) {
        println!("\n{}", self.cell);
        let head = ["requests/s", "MB/s", "CPU µs/req.", "client busy", "RSS MiB", ""];
        TABLE.print_row("", head);
        self.servers.iter().for_each(ServerResult::print);
        if let Some(ratio) = self.ratio() {
            let Ratio { peer, rate, rate_lowest, rate_highest, cpu, .. } = ratio;
            println!(
                "  flexnbd against {peer}, the best: rate × {rate:.2} (rounds: × {rate_lowest:.2} \
                 to × {rate_highest:.2}), processor time × {cpu:.2}"
            );
        }
    }

    /// The first flexnbd against the best peer; `None` without a result of both.
    pub(super) fn ratio(&self) -> Option<Ratio> {
        let ours = self.servers.iter().find(|server| server.ours)?;
        let our_median = ours.median()?;
        let peers = self.servers.iter().filter(|server| !server.ours);
        let peers: Vec<_> = peers.filter_map(|peer| Some((peer, peer.median()?))).collect();
        let (best, best_median) = peers.iter().max_by(|(_, one), (_, other)| {
            one.requests_per_sec.total_cmp(&other.requests_per_sec)
        })?;
        let peer_cpu = peers.iter().map(|(_, median)| median.server_cpu_us_per_request);
        let rounds = || {
            let pairs = ours.rounds.iter().zip(&best.rounds);
            pairs.filter_map(|(our, peer)| Some(our.rate()? / peer.rate()?))
        };
        let rate = our_median.requests_per_sec / best_median.requests_per_sec;
        Some(Ratio {
            peer: best.name.clone(),
            rate,
            rate_lowest: rounds().fold(rate, f64::min),
            rate_highest: rounds().fold(rate, f64::max),
            cpu: our_median.server_cpu_us_per_request / peer_cpu.fold(f64::INFINITY, f64::min),
            limited_by_client: our_median.is_limited_by_client(),
        })
    }

    /// All rounds, with the values computed from them, which are not read back.
    fn json(&self) -> serde_json::Result<Value> {
        let mut json = serde_json::to_value(self)?;
        json["name"] = self.cell.to_string().into();
        json["sequential"] = self.cell.is_sequential().into();
        json["ratio"] = json!(self.ratio());
        for (at, server) in self.servers.iter().enumerate() {
            json["servers"][at]["median"] = json!(server.median());
        }
        Ok(json)
    }
}

impl Results {
    pub(super) fn new(setup: &Setup, cells: &[Cell]) -> Self {
        let options = &setup.options;
        let about_server = |server: &Server| AboutServer {
            name: server.name.clone(),
            ours: server.is_flexnbd(),
            version: server.version(),
            usage: server.usage(),
        };
        let uses_fio = cells.iter().any(|cell| cell.generator == Generator::Fio);
        let about = About {
            machine: Machine::of_this_run("peers"),
            servers: setup.servers.iter().map(about_server).collect(),
            fio: uses_fio.then(|| machine::version(Path::new("fio"))),
            rounds: options.rounds,
            seconds: options.seconds.as_secs_f64(),
            image_mib: options.size,
        };
        Self { about, cells: Vec::new(), memory: Vec::new(), activation: Vec::new() }
    }

    pub(super) fn read(file: &Path) -> Result<Self, Error> {
        let error = |error: Error| format!("{}: {error}", file.display());
        let text = fs::read_to_string(file).map_err(|e| error(e.into()))?;
        Ok(serde_json::from_str(&text).map_err(|e| error(e.into()))?)
    }

    pub(super) fn write(&self, file: &Path) -> Result<(), Error> {
        let mut json = serde_json::to_value(self)?;
        let cells = self.cells.iter().map(CellResult::json);
        json["cells"] = cells.collect::<serde_json::Result<Vec<_>>>()?.into();
        json["summary"] = json!(summary::means(&self.cells));
        json["targets"] = json!(summary::targets(self));
        write_json(file, &json)
    }

    pub(super) fn print_about(&self) {
        let About { machine, servers, fio, rounds, seconds, image_mib } = &self.about;
        machine.print();
        for AboutServer { name, version, usage, .. } in servers {
            println!("# {name}: {version}: {usage}");
        }
        if let Some(version) = fio {
            println!("# fio: {version}");
        }
        println!("# {rounds} rounds of {seconds} s, image of {image_mib} MiB");
    }
}

#[cfg(test)]
#[allow(unused)] // See peers.rs.
pub(super) mod tests {
    use super::super::cells::Set;
    use super::*;

    /// A server with this processor time per request and these rates.
    fn server(name: &str, cpu: f64, rates: &[f64]) -> ServerResult {
        let sample = |rate: &f64| Sample {
            requests_per_sec: *rate,
            server_cpu_us_per_request: cpu,
            ..Sample::default()
        };
        let rounds = rates.iter().map(|rate| Round::Measured(sample(rate))).collect();
        ServerResult { name: name.to_owned(), ours: name.starts_with("flexnbd"), rounds }
    }

    fn ratio(servers: Vec<ServerResult>) -> Option<Ratio> {
        CellResult { cell: Set::Default.cells()[0], servers }.ratio()
    }

    /// A cell in which flexnbd has these ratios to its only peer.
    pub(in super::super) fn with_ratios(cell: Cell, rates: &[f64]) -> CellResult {
        let peer = server("nbdkit", 4.0, &vec![1.0; rates.len()]);
        CellResult { cell, servers: vec![server("flexnbd", 2.0, rates), peer] }
    }

    #[test]
    fn each_figure_has_its_own_best_peer() {
        let ratio = ratio(vec![
            server("flexnbd", 2.0, &[300.0]),
            server("nbdkit", 8.0, &[200.0]),
            server("qemu-nbd", 4.0, &[100.0]),
        ]);
        let ratio = ratio.unwrap();
        assert_eq!((ratio.peer.as_str(), ratio.rate, ratio.cpu), ("nbdkit", 1.5, 0.5));
    }

    #[test]
    fn the_spread_compares_rounds_with_the_same_peer() {
        let mut rows = vec![
            server("flexnbd", 1.0, &[30.0, 10.0, 20.0]),
            server("nbdkit", 1.0, &[10.0, 20.0, 10.0]),
            server("qemu-nbd", 1.0, &[1.0, 100.0, 1.0]),
        ];
        let spread = |rows: &[_]| {
            let ratio = ratio(rows.to_vec()).unwrap();
            (ratio.rate_lowest, ratio.rate, ratio.rate_highest)
        };
        assert_eq!(spread(&rows), (0.5, 2.0, 3.0));
        rows[0].rounds[1] = Round::Failed("died".to_owned());
        assert_eq!(spread(&rows), (2.0, 2.5, 3.0));
    }

    #[test]
    fn another_build_or_a_failed_server_is_no_peer() {
        let ours = server("flexnbd", 2.0, &[3.0]);
        assert_eq!(ratio(vec![ours.clone(), server("flexnbd-old", 1.0, &[6.0])]), None);
        assert_eq!(ratio(vec![ours, server("nbdkit", 1.0, &[])]), None);
    }

    #[test]
    fn results_are_read_back_as_written() {
        let setup = Setup::new(&clap::Parser::parse_from(["peers"])).unwrap();
        let cells = Set::Default.cells();
        let mut results = Results::new(&setup, &cells);
        results.cells.push(with_ratios(cells[0], &[2.0]));
        results.memory.push(MemoryRow::default());
        let file = tempfile::NamedTempFile::new().unwrap();
        results.write(file.path()).unwrap();
        let again = Results::read(file.path()).unwrap();
        assert_eq!(again.cells[0].ratio(), results.cells[0].ratio());
        assert_eq!((again.cells[0].cell, again.memory), (cells[0], results.memory));
    }
}
