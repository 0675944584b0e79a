//! How long it will take, told before it begins.
//! Pure. The constants were seen on one machine, and need not be exact.

use super::activation;
use super::generator::WARM_UP;
use super::grid::{Cell, Source, Temperature};
use super::memory::{self, SETTLE};
use super::options::Options;
use std::time::Duration;

/// To start a server, to connect, and to stop it.
const START_AND_STOP: Duration = Duration::from_millis(100);
/// To write an image out and to have it forgotten.
const COOLING: Duration = Duration::from_millis(400);
/// What fio takes besides the load.
const FIO: Duration = Duration::from_millis(600);
/// To open a thousand sessions.
const CONNECTING: Duration = Duration::from_secs(1);
/// To write a GiB of image to a disk.
const IMAGE: Duration = Duration::from_secs(4);

/// The time for everything that was asked for.
pub(super) fn duration(cells: &[Cell], servers: usize, options: &Options) -> Duration {
    let runs = servers as u32 * options.rounds;
    let cells: Duration = cells.iter().map(|cell| run(cell, options) * runs).sum();
    let looks = memory::SESSIONS.len() as u32 + 3;
    let memory = (SETTLE * looks + CONNECTING + START_AND_STOP * 2) * servers as u32;
    let starts = START_AND_STOP * (activation::STARTS * servers) as u32;
    let image = IMAGE.mul_f64(options.size as f64 / 1024.0);
    cells
        + image
        + if options.measures_memory() { memory } else { Duration::ZERO }
        + if options.measures_activation() { starts } else { Duration::ZERO }
}

/// One server under one load, once.
fn run(cell: &Cell, options: &Options) -> Duration {
    let load = match cell.source {
        Source::Raw => WARM_UP + options.seconds,
        Source::Fio => FIO + options.seconds,
    };
    let cooling = if cell.temperature == Temperature::Cold { COOLING } else { Duration::ZERO };
    START_AND_STOP + cooling + load
}

#[cfg(test)]
#[allow(unused)] // See peers.rs.
mod tests {
    use super::*;
    use clap::Parser;

    const TEN_MINUTES: Duration = Duration::from_secs(600);

    fn takes(line: &str) -> Duration {
        let options = Options::try_parse_from(line.split_whitespace()).unwrap();
        duration(&options.cells(), options.servers.len(), &options)
    }

    #[test]
    fn what_is_measured_by_default_takes_less_than_ten_minutes() {
        let takes = takes("peers");
        assert!(takes < TEN_MINUTES, "{takes:?}");
    }

    #[test]
    fn more_rounds_and_longer_ones_take_longer() {
        let usual = takes("peers --set small");
        assert!(takes("peers --set small --rounds 9") > usual * 2);
        assert!(takes("peers --set small --seconds 9") > usual * 2);
        assert!(takes("peers --set small --only memory") > SETTLE);
    }
}
