//! The results of a run: tables, ratios, targets, and the JSON file, which can be read back.

use super::activation::{self, ActivationRow};
use super::cells::{Cell, Generator, word};
use super::memory::{self, MemoryRow, SESSIONS};
use super::servers::{Server, is_minimal};
use super::tls::{self, HandshakeRow};
use super::usage::{RSS_PEAK, memory_kib};
use crate::machine::Machine;
use crate::report::{Error, Target, figure, median, print_row, print_targets};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use std::fs;
use std::path::Path;

/// A client that computes for more than this part of the time is probably the bottleneck.
const CLIENT_BUSY_MAX: f64 = 0.95;
const WIDTHS: [usize; 6] = [11, 9, 12, 12, 12, 0];

#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Results {
    pub(crate) about: About,
    pub(crate) cells: Vec<CellResult>,
    pub(crate) memory: Vec<MemoryRow>,
    pub(crate) activation: Vec<ActivationRow>,
    #[serde(default)]
    pub(crate) handshakes: Vec<HandshakeRow>,
    #[serde(skip_deserializing)]
    pub(crate) summary: Vec<Mean>,
    #[serde(skip_deserializing)]
    pub(crate) targets: Vec<Target>,
}

/// The environment and options of the run.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct About {
    pub(crate) machine: Machine,
    pub(crate) servers: Vec<Server>,
    /// Version of fio, if any cell uses it.
    pub(crate) fio: Option<String>,
    pub(crate) rounds: u32,
    pub(crate) seconds: f64,
    pub(crate) image_mib: u64,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct CellResult {
    name: String,
    sequential: bool,
    #[serde(flatten)]
    pub(crate) cell: Cell,
    servers: Vec<ServerResult>,
    /// Computed again when read: JSON has no infinity, the ratio of unmeasurably short times.
    #[serde(skip_deserializing)]
    pub(crate) ratio: Option<Ratio>,
    /// Against the minimal server, if one was measured.
    #[serde(skip_deserializing)]
    pub(crate) of_limit: Option<Ratio>,
}

/// One server in one cell.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct ServerResult {
    #[serde(rename = "server")]
    name: String,
    ours: bool,
    rounds: Vec<Round>,
    /// Of the measured rounds, each figure by itself.
    median: Option<Sample>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Round {
    Measured(Sample),
    Failed(String),
}

/// The figures of one round.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Sample {
    pub(crate) requests_per_sec: f64,
    /// Millions of bytes.
    pub(crate) mb_per_sec: f64,
    /// User and system time of the server's processes, in microseconds.
    pub(crate) server_cpu_us_per_request: f64,
    /// Part of the time in which the client computed.
    pub(crate) client_busy: f64,
    /// Peak resident size of the server's processes, in MiB.
    pub(crate) rss_peak_mib: f64,
}

/// flexnbd against the best peer of a cell.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Ratio {
    /// The peer, or minimal server, with the highest median rate.
    pub(crate) peer: String,
    /// Median rate over that peer's. Above 1: flexnbd answers more requests.
    pub(crate) rate: f64,
    /// The same in the worst and in the best round for flexnbd.
    pub(crate) rate_lowest: f64,
    pub(crate) rate_highest: f64,
    /// Processor time per request over the lowest of any peer.
    pub(crate) cpu: f64,
    pub(crate) limited_by_client: bool,
}

/// The means of all cells with one generator.
#[derive(Debug, Serialize)]
pub(crate) struct Mean {
    pub(crate) generator: Generator,
    pub(crate) cells: usize,
    /// Geometric mean of the ratios.
    pub(crate) rate: f64,
    rate_lowest: f64,
    /// `None` if a round's processor time was too short to measure.
    cpu: Option<f64>,
}

impl Sample {
    pub(crate) fn new(
        cell: &Cell,
        server: Pid,
        requests: f64,
        requests_per_sec: f64,
        server_cpu: f64,
        client_busy: f64,
    ) -> Self {
        Self {
            requests_per_sec,
            mb_per_sec: requests_per_sec * f64::from(cell.block) / 1e6,
            server_cpu_us_per_request: server_cpu * 1e6 / requests.max(1.0),
            client_busy,
            rss_peak_mib: memory_kib(server, RSS_PEAK) as f64 / 1024.0,
        }
    }
}

impl Round {
    fn sample(&self) -> Option<&Sample> {
        if let Self::Measured(sample) = self { Some(sample) } else { None }
    }
}

impl ServerResult {
    pub(crate) fn new(name: &str, ours: bool, rounds: Vec<Round>) -> Self {
        let of = |figure: fn(&Sample) -> f64| {
            median(rounds.iter().filter_map(Round::sample).map(figure))
        };
        let median = of(|s| s.requests_per_sec).map(|requests_per_sec| Sample {
            requests_per_sec,
            mb_per_sec: of(|s| s.mb_per_sec).unwrap_or_default(),
            server_cpu_us_per_request: of(|s| s.server_cpu_us_per_request).unwrap_or_default(),
            client_busy: of(|s| s.client_busy).unwrap_or_default(),
            rss_peak_mib: of(|s| s.rss_peak_mib).unwrap_or_default(),
        });
        Self { name: name.to_owned(), ours, rounds, median }
    }
}

impl CellResult {
    pub(crate) fn new(cell: Cell, servers: Vec<ServerResult>) -> Self {
        let (name, sequential) = (cell.to_string(), cell.is_sequential());
        let (ratio, of_limit) = (ratio(&servers), ratio_of_limit(&servers));
        Self { name, sequential, cell, servers, ratio, of_limit }
    }

    /// Each server's name, and its rate in requests per second (median, lowest and highest of the
    /// rounds) and processor time per request in microseconds; `None` if it failed.
    pub(crate) fn rates(&self) -> impl Iterator<Item = (&str, Option<[f64; 4]>)> {
        self.servers.iter().map(|server| {
            let rates = server.rounds.iter().filter_map(Round::sample).map(|s| s.requests_per_sec);
            let figures = server.median.map(
                |Sample { requests_per_sec: middle, server_cpu_us_per_request, .. }| {
                    let (lowest, highest) =
                        (rates.clone().fold(middle, f64::min), rates.fold(middle, f64::max));
                    [middle, lowest, highest, server_cpu_us_per_request]
                },
            );
            (server.name.as_str(), figures)
        })
    }

    pub(crate) fn print(&self) {
        println!("\n{}", self.name);
        print_row("", WIDTHS, ["requests/s", "MB/s", "CPU µs/req.", "client busy", "RSS MiB", ""]);
        for ServerResult { name, median, .. } in &self.servers {
            let Some(median) = median else {
                println!("  {name:16} failed");
                continue;
            };
            let limited = median.client_busy > CLIENT_BUSY_MAX;
            let cells = [
                figure(median.requests_per_sec, 0),
                figure(median.mb_per_sec, 0),
                figure(median.server_cpu_us_per_request, 2),
                figure(median.client_busy * 100.0, 0) + "%",
                figure(median.rss_peak_mib, 1),
                if limited { " limited by the client" } else { "" }.to_owned(),
            ];
            print_row(name, WIDTHS, cells);
        }
        let others = [(&self.ratio, "the best"), (&self.of_limit, "the limit")];
        for (ratio, what) in others {
            let Some(Ratio { peer, rate, rate_lowest, rate_highest, cpu, .. }) = ratio else {
                continue;
            };
            println!(
                "  flexnbd against {peer}, {what}: rate × {rate:.2} (rounds: × {rate_lowest:.2} \
                 to × {rate_highest:.2}), processor time × {cpu:.2}"
            );
        }
    }
}

/// The first flexnbd against the best peer; `None` without a result of both.
pub(crate) fn ratio(servers: &[ServerResult]) -> Option<Ratio> {
    best_of(servers, |server| !is_minimal(&server.name))
}

/// The first flexnbd against the fastest minimal server; `None` without a result of both.
pub(crate) fn ratio_of_limit(servers: &[ServerResult]) -> Option<Ratio> {
    best_of(servers, |server| is_minimal(&server.name))
}

/// The first flexnbd against the best of some other servers.
fn best_of(servers: &[ServerResult], of: fn(&ServerResult) -> bool) -> Option<Ratio> {
    let ours = servers.iter().find(|server| server.ours)?;
    let our_median = ours.median?;
    let peers = servers.iter().filter(|server| !server.ours && of(server));
    let peers: Vec<_> = peers.filter_map(|peer| Some((peer, peer.median?))).collect();
    let (best, best_median) = peers
        .iter()
        .max_by(|(_, one), (_, other)| one.requests_per_sec.total_cmp(&other.requests_per_sec))?;
    let peer_cpu = peers.iter().map(|(_, median)| median.server_cpu_us_per_request);
    let rounds = ours.rounds.iter().zip(&best.rounds).filter_map(|(our, peer)| {
        Some(our.sample()?.requests_per_sec / peer.sample()?.requests_per_sec)
    });
    let rate = our_median.requests_per_sec / best_median.requests_per_sec;
    Some(Ratio {
        peer: best.name.clone(),
        rate,
        rate_lowest: rounds.clone().fold(rate, f64::min),
        rate_highest: rounds.fold(rate, f64::max),
        cpu: our_median.server_cpu_us_per_request / peer_cpu.fold(f64::INFINITY, f64::min),
        limited_by_client: our_median.client_busy > CLIENT_BUSY_MAX,
    })
}

impl Results {
    pub(crate) fn read(file: &Path) -> Result<Self, Error> {
        let read = || -> Result<Self, Error> { Ok(serde_json::from_slice(&fs::read(file)?)?) };
        let mut results = read().map_err(|error| format!("{}: {error}", file.display()))?;
        for cell in &mut results.cells {
            cell.ratio = ratio(&cell.servers);
            cell.of_limit = ratio_of_limit(&cell.servers);
        }
        Ok(results)
    }

    pub(crate) fn print_about(&self) {
        let About { machine, servers, fio, rounds, seconds, image_mib } = &self.about;
        machine.print();
        for Server { name, version, usage, .. } in servers {
            println!("# {name}: {version}: {usage}");
        }
        if let Some(version) = fio {
            println!("# fio: {version}");
        }
        println!("# {rounds} rounds of {seconds} s, image of {image_mib} MiB");
    }

    /// Computes the means and the targets that this run has figures for.
    pub(crate) fn summarize(&mut self) {
        self.summary = means(&self.cells);
        self.targets = cell_targets(&self.cells);
        let (all, lowest) = (self.rates_of_limit().count(), self.rates_of_limit().reduce(f64::min));
        if let Some(lowest) = lowest {
            let reached = self.rates_of_limit().filter(|rate| *rate >= 0.95).count();
            let seen = format!("{reached} of {all} cells, × {lowest:.2} at worst");
            let of = "rate in every cell against the limit";
            self.targets.push(Target::new(of, "≥ × 0.95", seen, reached == all));
        }
        let ours = self.memory.iter().filter(|row| row.ours);
        self.targets.extend(ours.flat_map(memory_targets));
        let ours = self.activation.iter().find(|row| row.ours);
        if let Some(ms) = ours.and_then(|row| median(row.starts_ms.iter().copied())) {
            let of = "from connect to greeting under socket activation, median";
            self.targets.push(Target::new(of, "≤ 30 ms", format!("{ms:.1} ms"), ms <= 30.0));
        }
    }

    /// The rate of each cell over that of the minimal server.
    fn rates_of_limit(&self) -> impl Iterator<Item = f64> {
        self.cells.iter().filter_map(|cell| cell.of_limit.as_ref()).map(|ratio| ratio.rate)
    }

    /// Prints everything except the cells.
    pub(crate) fn print(&self) {
        memory::print(&self.memory);
        activation::print(&self.activation);
        tls::print(&self.handshakes);
        if !self.summary.is_empty() {
            println!("\nflexnbd against the best peer of each cell");
        }
        for Mean { generator, cells, rate, rate_lowest, cpu } in &self.summary {
            println!(
                "  {:5} {cells:>4} cells: rate × {rate:.2} (geometric mean), × {rate_lowest:.2} \
                 at worst; processor time × {}",
                word(generator),
                cpu.map_or("?".to_owned(), |mean| format!("{mean:.2}"))
            );
        }
        let of_limit: Vec<f64> = self.rates_of_limit().collect();
        if let Some(mean) = geometric_mean(&of_limit) {
            let cells = of_limit.len();
            println!("  {cells:>10} cells: rate × {mean:.2} of the limit (geometric mean)");
        }
        let ranked = ranked(&self.cells);
        let below = ranked.iter().filter(|(_, ratio)| ratio.rate < 1.0);
        if !self.summary.is_empty() {
            println!("  below × 1.00: {} of {}", below.clone().count(), ranked.len());
        }
        for (cell, ratio) in below {
            let Ratio { peer, rate, rate_lowest, rate_highest, limited_by_client, .. } = ratio;
            println!(
                "    {:36} × {rate:.2} (× {rate_lowest:.2} to × {rate_highest:.2}) of {peer}{}{}",
                cell.to_string(),
                if *rate_highest >= 1.0 { "; not in every round" } else { "" },
                if *limited_by_client { "; limited by the client" } else { "" }
            );
        }
        print_targets(&self.targets);
    }
}

/// All cells with a ratio, the lowest first.
fn ranked(cells: &[CellResult]) -> Vec<(Cell, &Ratio)> {
    let ratios = cells.iter().filter_map(|result| Some((result.cell, result.ratio.as_ref()?)));
    let mut ranked: Vec<_> = ratios.collect();
    ranked.sort_by(|(_, one), (_, other)| one.rate.total_cmp(&other.rate));
    ranked
}

/// The mean of ratios, for which twice and half as fast are opposites. `None` if a ratio is 0, that
/// of a time too short to measure.
pub(crate) fn geometric_mean(values: &[f64]) -> Option<f64> {
    if values.is_empty() || values.iter().any(|value| *value <= 0.0) {
        return None;
    }
    let sum: f64 = values.iter().map(|value| value.ln()).sum();
    Some((sum / values.len() as f64).exp())
}

pub(crate) fn means(cells: &[CellResult]) -> Vec<Mean> {
    let mean = |generator| {
        let mut ranked = ranked(cells);
        ranked.retain(|(cell, _)| cell.generator == generator);
        let rates: Vec<f64> = ranked.iter().map(|(_, ratio)| ratio.rate).collect();
        let cpus: Vec<f64> = ranked.iter().map(|(_, ratio)| ratio.cpu).collect();
        let (rate, cpu) = (geometric_mean(&rates)?, geometric_mean(&cpus));
        Some(Mean { generator, cells: rates.len(), rate, rate_lowest: rates[0], cpu })
    };
    [Generator::Raw, Generator::Fio].into_iter().filter_map(mean).collect()
}

fn cell_targets(cells: &[CellResult]) -> Vec<Target> {
    let mut targets = Vec::new();
    let ranked = ranked(cells);
    if let Some((_, lowest)) = ranked.first() {
        let (all, lowest) = (ranked.len(), lowest.rate);
        let reached = ranked.iter().filter(|(_, ratio)| ratio.rate >= 1.0).count();
        let seen = format!("{reached} of {all} cells, × {lowest:.2} at worst");
        let of = "rate in every cell against its best peer";
        targets.push(Target::new(of, "≥ × 1.00", seen, reached == all));
    }
    for Mean { generator, rate, .. } in means(cells) {
        let (of, wanted, min) = match generator {
            Generator::Raw => {
                ("rate, geometric mean of the cells of our own generator", "≥ × 2.00", 2.0)
            }
            Generator::Fio => ("rate, geometric mean of fio's cells", "≥ × 1.50", 1.5),
        };
        targets.push(Target::new(of, wanted, format!("× {rate:.2}"), rate >= min));
    }
    let small = ranked.iter().filter(|(cell, _)| cell.block == 4096 && cell.depth == 32);
    let cpus: Vec<f64> = small.map(|(_, ratio)| ratio.cpu).collect();
    if let Some(worst) = cpus.iter().copied().reduce(f64::max) {
        let reached = cpus.iter().filter(|cpu| **cpu <= 0.5).count();
        let seen = format!("{reached} of {} cells, × {worst:.2} at worst", cpus.len());
        let of = "server's processor time per 4 KiB request at depth 32 against the best peer's";
        targets.push(Target::new(of, "≤ × 0.50", seen, reached == cpus.len()));
    }
    targets
}

fn memory_targets(row: &MemoryRow) -> Vec<Target> {
    let mib = |kib: u64| format!("{:.1} MiB", kib as f64 / 1024.0);
    let mut targets = Vec::new();
    if let Some(kib) = row.usual.rss_idle_kib {
        targets.push(Target::new("RSS idle", "≤ 6 MiB", mib(kib), kib <= 6 << 10));
    }
    let each = row.usual.with_sessions.iter().map(|with| with.pss_per_session_kib);
    if each.len() == SESSIONS.len() {
        let seen: Vec<String> = each.clone().map(|kib| format!("{kib:.0} KiB")).collect();
        let of = "memory of an idle session, with 100 and with 1,000 of them";
        let met = each.clone().all(|kib| kib <= 512.0);
        targets.push(Target::new(of, "≤ 512 KiB", seen.join(" and "), met));
    }
    if let Some((usual, large)) = row.usual.rss_idle_kib.zip(row.large.rss_idle_kib) {
        let (of, wanted) = ("RSS idle for a disk of 1 TiB", "as for a small one, within 256 KiB");
        let seen = format!("{} after {}", mib(large), mib(usual));
        targets.push(Target::new(of, wanted, seen, large <= usual + 256));
    }
    targets
}
