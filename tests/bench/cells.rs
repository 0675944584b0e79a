//! What was measured in one cell, as a table for people and as JSON for programs.
//! Judges nothing: a ratio is a ratio.

use super::grid::Cell;
use super::servers::Server;
use super::stats::Sample;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// A client that computes for more than this part of the time is likely to be what limits.
const CLIENT_LIMITS: f64 = 0.95;

/// One cell.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct CellReport {
    #[serde(flatten)]
    pub(super) cell: Cell,
    #[serde(rename = "servers")]
    pub(super) rows: Vec<Row>,
}

/// One server in one cell.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Row {
    #[serde(rename = "server")]
    name: String,
    ours: bool,
    pub(super) rounds: Vec<Round>,
}

/// What came of one run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Round {
    Measured(Sample),
    Failed(String),
}

/// How we compare in one cell with the best peer.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Ratio {
    /// The peer that answered most in the median.
    pub(super) peer: String,
    /// Medians against each other. Above 1: we answer more.
    pub(super) rate: f64,
    /// The same in the single round that was worst for us.
    pub(super) rate_lowest: f64,
    /// The same in the single round that was best for us.
    pub(super) rate_highest: f64,
    /// Below 1: we need less processor time for one request than any peer.
    pub(super) cpu: f64,
    /// Whether the client was the limit, so that a faster server would not have shown.
    pub(super) limited_by_client: bool,
}

impl Round {
    fn sample(&self) -> Option<Sample> {
        match self {
            Self::Measured(sample) => Some(*sample),
            Self::Failed(_) => None,
        }
    }
}

impl Row {
    fn median(&self) -> Option<Sample> {
        let samples: Vec<Sample> = self.rounds.iter().filter_map(Round::sample).collect();
        Sample::median(&samples)
    }

    fn line(&self) -> String {
        let Some(median) = self.median() else { return format!("  {:16} failed", self.name) };
        format!(
            "  {:16} {:>11.0} {:>9.0} {:>12.2} {:>11.0}% {:>12.1}{}",
            self.name,
            median.requests_per_sec,
            median.mb_per_sec,
            median.server_cpu_us_per_request,
            median.client_busy * 100.0,
            median.rss_peak_mib,
            if limits(&median) { "  limited by the client" } else { "" }
        )
    }
}

fn limits(median: &Sample) -> bool {
    median.client_busy > CLIENT_LIMITS
}

impl CellReport {
    /// A cell of which nothing has been measured.
    pub(super) fn new(cell: &Cell, servers: &[Server]) -> Self {
        let row = |server: &Server| Row {
            name: server.name.clone(),
            ours: server.is_ours(),
            rounds: Vec::new(),
        };
        Self { cell: *cell, rows: servers.iter().map(row).collect() }
    }

    /// Prints the medians, and how we compare.
    pub(super) fn print(&self) {
        println!("\n{}", self.cell);
        println!(
            "  {:16} {:>11} {:>9} {:>12} {:>12} {:>12}",
            "", "requests/s", "MB/s", "CPU µs/req.", "client busy", "RSS MiB"
        );
        self.rows.iter().for_each(|row| println!("{}", row.line()));
        if let Some(ratio) = self.ratio() {
            let Ratio { peer, rate, rate_lowest, rate_highest, cpu, .. } = ratio;
            println!(
                "  flexnbd against {peer}, the best: rate × {rate:.2} (rounds: × {rate_lowest:.2} \
                 to × {rate_highest:.2}), processor time × {cpu:.2}"
            );
        }
    }

    /// The first flexnbd against the best of the peers; nothing if either is missing.
    pub(super) fn ratio(&self) -> Option<Ratio> {
        let ours = self.rows.iter().find(|row| row.ours)?;
        let our_median = ours.median()?;
        let peers: Vec<(&Row, Sample)> = self
            .rows
            .iter()
            .filter(|row| !row.ours)
            .filter_map(|row| Some((row, row.median()?)))
            .collect();
        let rate = |sample: &Sample| sample.requests_per_sec;
        let (best, best_median) =
            peers.iter().max_by(|(_, one), (_, other)| rate(one).total_cmp(&rate(other)))?;
        let cpu = peers.iter().map(|(_, median)| median.server_cpu_us_per_request);
        let single = || {
            let both = ours.rounds.iter().zip(&best.rounds);
            both.filter_map(|(our, peer)| Some(rate(&our.sample()?) / rate(&peer.sample()?)))
        };
        let median = rate(&our_median) / rate(best_median);
        Some(Ratio {
            peer: best.name.clone(),
            rate: median,
            rate_lowest: single().fold(median, f64::min),
            rate_highest: single().fold(median, f64::max),
            cpu: our_median.server_cpu_us_per_request / cpu.fold(f64::INFINITY, f64::min),
            limited_by_client: limits(&our_median),
        })
    }

    /// Everything, with what can be computed from it: [`Self`] is read back without.
    pub(super) fn json(&self) -> serde_json::Result<Value> {
        let mut json = serde_json::to_value(self)?;
        json["name"] = self.cell.to_string().into();
        json["sequential"] = self.cell.is_sequential().into();
        json["ratio"] = json!(self.ratio());
        for (at, row) in self.rows.iter().enumerate() {
            json["servers"][at]["median"] = json!(row.median());
        }
        Ok(json)
    }
}

#[cfg(test)]
#[allow(unused)] // See peers.rs.
pub(super) mod tests {
    use super::super::grid::Set;
    use super::*;

    /// A server that needs `cpu` microseconds a request and answers so many in each round.
    fn row(name: &str, cpu: f64, rates: &[f64]) -> Row {
        let sample = |rate: &f64| Sample {
            requests_per_sec: *rate,
            server_cpu_us_per_request: cpu,
            ..Sample::default()
        };
        let rounds = rates.iter().map(|rate| Round::Measured(sample(rate))).collect();
        Row { name: name.to_owned(), ours: name.starts_with("flexnbd"), rounds }
    }

    fn report(rows: Vec<Row>) -> CellReport {
        CellReport { cell: Set::Default.cells()[0], rows }
    }

    /// A cell in which we answered so many times as much as the only peer in each round.
    pub(in super::super) fn against_one_peer(cell: Cell, rates: &[f64]) -> CellReport {
        let peer = row("nbdkit", 4.0, &vec![1.0; rates.len()]);
        CellReport { cell, rows: vec![row("flexnbd", 2.0, rates), peer] }
    }

    #[test]
    fn the_best_peer_is_another_one_for_each_figure() {
        let ratio = report(vec![
            row("flexnbd", 2.0, &[300.0]),
            row("nbdkit", 8.0, &[200.0]),
            row("qemu-nbd", 4.0, &[100.0]),
        ]);
        let ratio = ratio.ratio().unwrap();
        assert_eq!((ratio.peer.as_str(), ratio.rate, ratio.cpu), ("nbdkit", 1.5, 0.5));
    }

    #[test]
    fn the_spread_is_that_of_rounds_against_the_same_peer() {
        let ratio = report(vec![
            row("flexnbd", 1.0, &[30.0, 10.0, 20.0]),
            row("nbdkit", 1.0, &[10.0, 20.0, 10.0]),
            row("qemu-nbd", 1.0, &[1.0, 100.0, 1.0]),
        ]);
        let ratio = ratio.ratio().unwrap();
        assert_eq!((ratio.rate_lowest, ratio.rate, ratio.rate_highest), (0.5, 2.0, 3.0));
    }

    #[test]
    fn a_round_that_failed_is_compared_with_nothing() {
        let mut ours = row("flexnbd", 1.0, &[1.0, 1.0, 1.0]);
        ours.rounds[1] = Round::Failed("died".to_owned());
        let ratio = report(vec![ours, row("nbdkit", 1.0, &[1.0, 9.0, 1.0])]).ratio().unwrap();
        assert_eq!((ratio.rate_lowest, ratio.rate, ratio.rate_highest), (1.0, 1.0, 1.0));
    }

    #[test]
    fn another_build_of_ours_is_no_peer() {
        let cell = report(vec![row("flexnbd", 2.0, &[3.0]), row("flexnbd-old", 1.0, &[6.0])]);
        assert_eq!(cell.ratio(), None);
    }

    #[test]
    fn a_server_that_failed_has_no_median_but_its_troubles() {
        let mut failed = row("nbdkit", 0.0, &[]);
        failed.rounds.push(Round::Failed("died".to_owned()));
        assert_eq!(failed.line(), "  nbdkit           failed");
        let json = report(vec![row("flexnbd", 1.0, &[1.0]), failed]).json().unwrap();
        assert_eq!(json["servers"][1]["median"], Value::Null);
        assert_eq!(json["servers"][1]["rounds"][0]["failed"], "died");
        assert_eq!(json["ratio"], Value::Null);
    }

    #[test]
    fn what_was_written_is_read_back() {
        let cell = against_one_peer(Set::Default.cells()[0], &[2.0, 3.0]);
        let json = cell.json().unwrap();
        assert_eq!(json["name"], "4k-randread-d1-s1-tcp-cached-raw");
        let again: CellReport = serde_json::from_value(json).unwrap();
        assert_eq!((again.cell, again.ratio()), (cell.cell, cell.ratio()));
    }
}
