//! The summary of all cells: geometric means, cells below 1, and targets.

use super::activation::ActivationRow;
use super::cells::{Generator, word};
use super::memory::{MemoryRow, SESSIONS};
use super::report::{Target, print_targets};
use super::results::{CellResult, Ratio, Results};
use super::stats::geometric_mean;
use serde::Serialize;

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
    let mut targets = cell_targets(&results.cells);
    targets.extend(results.memory.iter().filter(|row| row.ours).flat_map(memory_targets));
    let ours = results.activation.iter().find(|row| row.ours);
    if let Some(ms) = ours.and_then(ActivationRow::median_ms) {
        let of = "from connect to greeting under socket activation, median";
        targets.push(Target::new(of, "≤ 30 ms", format!("{ms:.1} ms"), ms <= 30.0));
    }
    targets
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
    let small = ranked.iter().filter(|(cell, _)| cell.cell.block == 4096 && cell.cell.depth == 32);
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
            cell_targets(&cells(rates)).iter().map(|target| target.met).collect::<Vec<_>>()
        };
        assert_eq!(met(&[1.0, 4.0]), [true, true, true]);
        assert_eq!(met(&[0.99, 3.9]), [false, false, true]);
        assert!(met(&[]).is_empty());
    }
}
