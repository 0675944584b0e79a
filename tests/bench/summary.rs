//! The summary of all cells: geometric means, cells below 1, and targets.

use super::cells::{Generator, word};
use super::memory::{MemoryRow, SESSIONS};
use super::report::{Target, print_targets};
use super::results::{CellResult, Ratio, Results};
use super::stats::geometric_mean;
use serde::Serialize;

/// Memory of an idle server, in KiB.
const RSS_IDLE_KIB_MAX: u64 = 6 << 10;
/// Memory of an idle session, in KiB.
const SESSION_KIB_MAX: f64 = 512.0;
/// Additional memory for a disk of 1 TiB, in KiB.
const LARGE_DISK_KIB_MAX: u64 = 256;
/// Time from connect to greeting under socket activation, in milliseconds.
const GREETING_MS_MAX: f64 = 30.0;
/// Processor time per request against the best peer's, in cells of this block and depth.
const CPU_RATIO_MAX: f64 = 0.5;
const CPU_BLOCK: u32 = 4 << 10;
const CPU_DEPTH: usize = 32;

/// The mean of all cells with one generator.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Mean {
    pub(super) generator: Generator,
    pub(super) cells: usize,
    /// Geometric mean of the ratios.
    pub(super) rate: f64,
    rate_lowest: f64,
    /// `None` if a round's processor time was too short to measure.
    cpu: Option<f64>,
}

pub(super) fn means(cells: &[CellResult]) -> Vec<Mean> {
    let mean = |generator| {
        let cells = cells.iter().filter(|cell| cell.cell.generator == generator);
        let ratios: Vec<Ratio> = cells.filter_map(CellResult::ratio).collect();
        let rates: Vec<f64> = ratios.iter().map(|ratio| ratio.rate).collect();
        let cpus: Vec<f64> = ratios.iter().map(|ratio| ratio.cpu).collect();
        Some(Mean {
            generator,
            cells: rates.len(),
            rate: geometric_mean(&rates)?,
            rate_lowest: rates.iter().copied().reduce(f64::min)?,
            cpu: geometric_mean(&cpus),
        })
    };
    [Generator::Raw, Generator::Fio].into_iter().filter_map(mean).collect()
}

/// All cells with a ratio, the lowest first.
fn ranked(cells: &[CellResult]) -> Vec<(&CellResult, Ratio)> {
    let ratios = cells.iter().filter_map(|cell| Some((cell, cell.ratio()?)));
    let mut ranked: Vec<_> = ratios.collect();
    ranked.sort_by(|(_, one), (_, other)| one.rate.total_cmp(&other.rate));
    ranked
}

pub(super) fn print(results: &Results) {
    let means = means(&results.cells);
    if !means.is_empty() {
        println!("\nflexnbd against the best peer of each cell");
    }
    for Mean { generator, cells, rate, rate_lowest, cpu } in &means {
        println!(
            "  {:5} {cells:>4} cells: rate × {rate:.2} (geometric mean), × {rate_lowest:.2} at \
             worst; processor time × {}",
            word(generator),
            cpu.map_or("?".to_owned(), |mean| format!("{mean:.2}"))
        );
    }
    let ranked = ranked(&results.cells);
    let below = ranked.iter().filter(|(_, ratio)| ratio.rate < 1.0);
    if !means.is_empty() {
        println!("  below × 1.00: {} of {}", below.clone().count(), ranked.len());
    }
    for (cell, ratio) in below {
        let Ratio { peer, rate, rate_lowest, rate_highest, limited_by_client, .. } = ratio;
        println!(
            "    {:36} × {rate:.2} (× {rate_lowest:.2} to × {rate_highest:.2}) of {peer}{}{}",
            cell.cell.to_string(),
            if *rate_highest >= 1.0 { "; not in every round" } else { "" },
            if *limited_by_client { "; limited by the client" } else { "" }
        );
    }
    print_targets(&targets(results));
}

/// The targets that this run has figures for.
pub(super) fn targets(results: &Results) -> Vec<Target> {
    let cells = &results.cells;
    let memory = results.memory.iter().find(|row| row.ours);
    [every_cell(cells), mean(cells, Generator::Raw), mean(cells, Generator::Fio), cpu(cells)]
        .into_iter()
        .flatten()
        .chain(memory.into_iter().flat_map(memory_targets))
        .chain(greeting(results))
        .collect()
}

fn every_cell(cells: &[CellResult]) -> Option<Target> {
    let ranked = ranked(cells);
    let (_, lowest) = ranked.first()?;
    let reached = ranked.iter().filter(|(_, ratio)| ratio.rate >= 1.0).count();
    Some(Target {
        of: "rate in every cell against its best peer",
        wanted: "≥ × 1.00",
        seen: format!("{reached} of {} cells, × {:.2} at worst", ranked.len(), lowest.rate),
        met: reached == ranked.len(),
    })
}

fn mean(cells: &[CellResult], generator: Generator) -> Option<Target> {
    let mean = means(cells).into_iter().find(|mean| mean.generator == generator)?;
    let (of, wanted, rate_min) = match generator {
        Generator::Raw => {
            ("rate, geometric mean of the cells of our own generator", "≥ × 2.00", 2.0)
        }
        Generator::Fio => ("rate, geometric mean of fio's cells", "≥ × 1.50", 1.5),
    };
    Some(Target { of, wanted, seen: format!("× {:.2}", mean.rate), met: mean.rate >= rate_min })
}

fn cpu(cells: &[CellResult]) -> Option<Target> {
    let cells = cells.iter().map(|cell| (cell.cell, cell.ratio()));
    let small = cells.filter(|(cell, _)| cell.block == CPU_BLOCK && cell.depth == CPU_DEPTH);
    let cpus: Vec<f64> = small.filter_map(|(_, ratio)| Some(ratio?.cpu)).collect();
    let worst = cpus.iter().copied().reduce(f64::max)?;
    let reached = cpus.iter().filter(|cpu| **cpu <= CPU_RATIO_MAX).count();
    Some(Target {
        of: "server's processor time per 4 KiB request at depth 32 against the best peer's",
        wanted: "≤ × 0.50",
        seen: format!("{reached} of {} cells, × {worst:.2} at worst", cpus.len()),
        met: reached == cpus.len(),
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
    let each = row.usual.with_sessions.iter().map(|with| with.pss_per_session_kib);
    let sessions = (each.len() == SESSIONS.len()).then(|| Target {
        of: "memory of an idle session, with 100 and with 1,000 of them",
        wanted: "≤ 512 KiB",
        seen: each.clone().map(|kib| format!("{kib:.0} KiB")).collect::<Vec<_>>().join(" and "),
        met: each.clone().all(|kib| kib <= SESSION_KIB_MAX),
    });
    let disks = row.usual.rss_idle_kib.zip(row.large.rss_idle_kib).map(|(usual, large)| Target {
        of: "RSS idle for a disk of 1 TiB",
        wanted: "as for a small one, within 256 KiB",
        seen: format!("{:.1} MiB after {:.1} MiB", mib(large), mib(usual)),
        met: large <= usual + LARGE_DISK_KIB_MAX,
    });
    [idle, sessions, disks].into_iter().flatten().collect()
}

fn greeting(results: &Results) -> Option<Target> {
    let ms = results.activation.iter().find(|row| row.ours)?.median_ms()?;
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
    use super::super::cells::{Cell, Set};
    use super::super::results::tests::with_ratios;
    use super::*;

    fn cells(rates: &[f64]) -> Vec<CellResult> {
        let small = Set::Small.cells()[0];
        rates.iter().map(|rate| with_ratios(small, &[*rate])).collect()
    }

    #[test]
    fn each_generator_has_its_own_mean() {
        let mut cells = cells(&[4.0, 1.0]);
        let fio = Cell { generator: Generator::Fio, ..cells[0].cell };
        cells.push(with_ratios(fio, &[0.5]));
        let means: Vec<_> = means(&cells).iter().map(|mean| (mean.cells, mean.rate)).collect();
        assert_eq!(means, [(2, 2.0), (1, 0.5)]);
    }

    #[test]
    fn targets_are_met_at_their_limits() {
        let met = |rates: &[f64]| {
            let cells = cells(rates);
            [every_cell(&cells), mean(&cells, Generator::Raw), cpu(&cells)]
                .map(|target| target.map(|target| target.met))
        };
        assert_eq!(met(&[1.0, 4.0]), [Some(true), Some(true), Some(true)]);
        assert_eq!(met(&[0.99, 3.9]), [Some(false), Some(false), Some(true)]);
        assert_eq!(met(&[]), [None, None, None]);
    }
}
