//! What all cells come to: the means, those in which a peer was better, and what was wanted.
//! Pure but for printing.

use super::cells::{CellReport, Ratio};
use super::grid::Source;
use super::memory::{MemoryRow, SESSIONS};
use super::report::Report;
use super::stats::geometric_mean;
use super::targets::{self, Target};
use serde::Serialize;

/// What idle servers may take, in KiB.
const RSS_IDLE_KIB_MAX: u64 = 6 << 10;
/// What an idle session may take, in KiB.
const SESSION_KIB_MAX: f64 = 512.0;
/// How much more a server may take for a disk of 1 TiB and be said to take the same, in KiB.
const LARGE_KIB_MAX: u64 = 256;
/// How long a client may wait for a server that is started by it, in milliseconds.
const GREETING_MS_MAX: f64 = 30.0;
/// Which part of the best peer's processor time we may take for a small request.
const CPU_MAX: f64 = 0.5;
/// A small request, and how many of them are under way, where processor time counts.
const CPU_BLOCK: u32 = 4 << 10;
const CPU_DEPTH: usize = 32;

/// What the cells of one generator come to.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Mean {
    pub(super) generator: Source,
    pub(super) cells: usize,
    /// Geometric mean of the ratios.
    pub(super) rate: f64,
    pub(super) rate_lowest: f64,
    /// Geometric mean; nothing when the processor time of a run was too short to see.
    pub(super) cpu: Option<f64>,
}

/// One for each generator that made any load.
pub(super) fn means(cells: &[CellReport]) -> Vec<Mean> {
    let of = |source| {
        let ratios: Vec<Ratio> = cells
            .iter()
            .filter(|cell| cell.cell.source == source)
            .filter_map(CellReport::ratio)
            .collect();
        let rates: Vec<f64> = ratios.iter().map(|ratio| ratio.rate).collect();
        let cpus: Vec<f64> = ratios.iter().map(|ratio| ratio.cpu).collect();
        Some(Mean {
            generator: source,
            cells: rates.len(),
            rate: geometric_mean(&rates)?,
            rate_lowest: rates.iter().copied().reduce(f64::min)?,
            cpu: geometric_mean(&cpus),
        })
    };
    [Source::Raw, Source::Fio].into_iter().filter_map(of).collect()
}

/// Cells in which the best peer was better, the worst first.
fn below(cells: &[CellReport]) -> Vec<(&CellReport, Ratio)> {
    let ratios = cells.iter().filter_map(|cell| Some((cell, cell.ratio()?)));
    let mut below: Vec<_> = ratios.filter(|(_, ratio)| ratio.rate < 1.0).collect();
    below.sort_by(|(_, one), (_, other)| one.rate.total_cmp(&other.rate));
    below
}

/// Prints the means, the cells in which a peer was better, and the targets.
pub(super) fn print(report: &Report) {
    let means = means(&report.cells);
    if !means.is_empty() {
        println!("\nflexnbd against the best peer of each cell");
    }
    for Mean { generator, cells, rate, rate_lowest, cpu } in &means {
        println!(
            "  {:5} {cells:>4} cells: rate × {rate:.2} (geometric mean), × {rate_lowest:.2} at \
             worst; processor time × {}",
            generator.word(),
            cpu.map_or("?".to_owned(), |mean| format!("{mean:.2}"))
        );
    }
    let below = below(&report.cells);
    if !means.is_empty() {
        println!("  below × 1.00: {} of {}", below.len(), compared(&report.cells));
    }
    for (cell, ratio) in &below {
        println!("    {:36} {}", cell.cell.to_string(), excuse(ratio));
    }
    targets::print(&targets(report));
}

/// How far below, and what may be the reason.
fn excuse(ratio: &Ratio) -> String {
    let Ratio { peer, rate, rate_lowest, rate_highest, limited_by_client, .. } = ratio;
    let noise = if *rate_highest >= 1.0 { "; not in every round" } else { "" };
    let client = if *limited_by_client { "; limited by the client" } else { "" };
    format!("× {rate:.2} (× {rate_lowest:.2} to × {rate_highest:.2}) of {peer}{noise}{client}")
}

fn compared(cells: &[CellReport]) -> usize {
    cells.iter().filter(|cell| cell.ratio().is_some()).count()
}

/// What was wanted, as far as this run can tell.
pub(super) fn targets(report: &Report) -> Vec<Target> {
    let cells = &report.cells;
    let memory = report.memory.iter().find(|row| row.ours);
    [every_cell(cells), mean_of(cells, Source::Raw), mean_of(cells, Source::Fio), small_cpu(cells)]
        .into_iter()
        .flatten()
        .chain(memory.into_iter().flat_map(memory_targets))
        .chain(greeting(report))
        .collect()
}

fn every_cell(cells: &[CellReport]) -> Option<Target> {
    let lowest = means(cells).iter().map(|mean| mean.rate_lowest).reduce(f64::min)?;
    let (below, all) = (below(cells).len(), compared(cells));
    Some(Target {
        of: "rate in every cell against its best peer",
        wanted: "≥ × 1.00",
        seen: format!("{} of {all} cells, × {lowest:.2} at worst", all - below),
        met: below == 0,
    })
}

fn mean_of(cells: &[CellReport], source: Source) -> Option<Target> {
    let mean = means(cells).into_iter().find(|mean| mean.generator == source)?;
    let (of, wanted, least) = match source {
        Source::Raw => ("rate, geometric mean of the cells of our own generator", "≥ × 2.00", 2.0),
        Source::Fio => ("rate, geometric mean of fio's cells", "≥ × 1.50", 1.5),
    };
    Some(Target { of, wanted, seen: format!("× {:.2}", mean.rate), met: mean.rate >= least })
}

fn small_cpu(cells: &[CellReport]) -> Option<Target> {
    let small = |cell: &&CellReport| cell.cell.block == CPU_BLOCK && cell.cell.depth == CPU_DEPTH;
    let ratios = cells.iter().filter(small).filter_map(CellReport::ratio);
    let cpus: Vec<f64> = ratios.map(|ratio| ratio.cpu).collect();
    let worst = cpus.iter().copied().reduce(f64::max)?;
    let within = cpus.iter().filter(|cpu| **cpu <= CPU_MAX).count();
    Some(Target {
        of: "server's processor time per 4 KiB request at depth 32 against the best peer's",
        wanted: "≤ × 0.50",
        seen: format!("{within} of {} cells, × {worst:.2} at worst", cpus.len()),
        met: within == cpus.len(),
    })
}

fn memory_targets(row: &MemoryRow) -> Vec<Target> {
    let mib = |kib: u64| kib as f64 / 1024.0;
    let idle = row.usual.rss_idle_kib.map(|kib| Target {
        of: "RSS idle",
        wanted: "≤ 6 MiB",
        seen: format!("{:.1} MiB", mib(kib)),
        met: kib <= RSS_IDLE_KIB_MAX,
    });
    let sessions = (row.usual.with_sessions.len() == SESSIONS.len()).then(|| {
        let each: Vec<f64> =
            row.usual.with_sessions.iter().map(|with| with.pss_per_session_kib).collect();
        let told: Vec<String> = each.iter().map(|kib| format!("{kib:.0} KiB")).collect();
        Target {
            of: "memory of an idle session, with 100 and with 1,000 of them",
            wanted: "≤ 512 KiB",
            seen: told.join(" and "),
            met: each.iter().all(|kib| *kib <= SESSION_KIB_MAX),
        }
    });
    let disks = row.usual.rss_idle_kib.zip(row.large.rss_idle_kib).map(|(usual, large)| Target {
        of: "RSS idle for a disk of 1 TiB",
        wanted: "as for a small one, within 256 KiB",
        seen: format!("{:.1} MiB after {:.1} MiB", mib(large), mib(usual)),
        met: large <= usual + LARGE_KIB_MAX,
    });
    [idle, sessions, disks].into_iter().flatten().collect()
}

fn greeting(report: &Report) -> Option<Target> {
    let ms = report.activation.iter().find(|row| row.ours)?.median_ms()?;
    Some(Target {
        of: "from connect to greeting under socket activation, median",
        wanted: "≤ 30 ms",
        seen: format!("{ms:.1} ms"),
        met: ms <= GREETING_MS_MAX,
    })
}

#[cfg(test)]
#[allow(unused)] // See peers.rs.
mod tests {
    use super::super::activation::ActivationRow;
    use super::super::cells::tests::against_one_peer;
    use super::super::grid::{Cell, Set};
    use super::super::memory::{Occupied, WithSessions};
    use super::super::report::About;
    use super::*;

    fn report(cells: Vec<CellReport>) -> Report {
        Report { about: About::default(), cells, memory: Vec::new(), activation: Vec::new() }
    }

    fn cells(rates: &[&[f64]]) -> Vec<CellReport> {
        let small = Set::Small.cells()[0];
        rates.iter().map(|rates| against_one_peer(small, rates)).collect()
    }

    fn met(report: &Report) -> Vec<bool> {
        targets(report).iter().map(|target| target.met).collect()
    }

    #[test]
    fn each_generator_has_a_mean_of_its_own() {
        let mut cells = cells(&[&[4.0], &[1.0]]);
        let fio = Cell { source: Source::Fio, ..cells[0].cell };
        cells.push(against_one_peer(fio, &[0.5]));
        let means: Vec<_> = means(&cells).iter().map(|mean| (mean.cells, mean.rate)).collect();
        assert_eq!(means, [(2, 2.0), (1, 0.5)]);
    }

    #[test]
    fn cells_below_one_are_told_with_their_excuses_the_worst_first() {
        let cells = cells(&[&[0.9, 1.2, 0.8], &[1.0], &[0.5]]);
        let told: Vec<_> = below(&cells).iter().map(|(_, ratio)| excuse(ratio)).collect();
        assert_eq!(told[0], "× 0.50 (× 0.50 to × 0.50) of nbdkit");
        assert_eq!(told[1], "× 0.90 (× 0.80 to × 1.20) of nbdkit; not in every round");
        assert_eq!(told.len(), 2);
    }

    #[test]
    fn a_target_is_met_at_its_limit_and_not_below() {
        assert_eq!(met(&report(cells(&[&[2.0], &[2.0]]))), [true, true, true]);
        assert_eq!(met(&report(cells(&[&[0.99], &[3.9]]))), [false, false, true]);
        assert_eq!(met(&report(Vec::new())), [] as [bool; 0]);
    }

    #[test]
    fn memory_and_start_are_judged_by_ours_alone() {
        let with = |sessions, kib| WithSessions { sessions, rss_kib: 0, pss_per_session_kib: kib };
        let usual = Occupied {
            rss_idle_kib: Some(6144),
            with_sessions: vec![with(100, 512.0), with(1000, 513.0)],
            trouble: None,
        };
        let large = Occupied { rss_idle_kib: Some(6400), ..Occupied::default() };
        let row = |name: &str, ours| MemoryRow {
            name: name.to_owned(),
            ours,
            usual: usual.clone(),
            large: large.clone(),
        };
        let start = |name: &str, ours, ms| ActivationRow {
            name: name.to_owned(),
            ours,
            starts_ms: vec![ms],
        };
        let mut report = report(Vec::new());
        report.memory = vec![MemoryRow::default(), row("flexnbd", true)];
        report.activation = vec![start("nbdkit", false, 99.0), start("flexnbd", true, 30.0)];
        assert_eq!(met(&report), [true, false, true, true]);
    }
}
