//! Measures how long reads are best sent: the methods of the minimal servers side by side, in the page
//! cache of a file system on a disk and in memory; the benchmark `sending`. The choice of the server is
//! explained in `src/server/session/pinned.rs`.

use super::cells::Cell;
use super::results::CellResult;
use super::{Kept, Set, Setup};
use crate::machine::Machine;
use crate::report::{Error, figure, print_row};
use clap::Parser;
use std::path::PathBuf;

/// The lengths and methods of the table.
const CELLS: [&str; 3] = [
    "64k-randread-d8-s1-tcp-cached-raw",
    "256k-read-d8-s1-tcp-cached-raw",
    "1m-read-d8-s1-tcp-cached-raw",
];
/// flexnbd, and the minimal servers.
const SERVERS: [&str; 9] = [
    "flexnbd",
    "null",
    "copy-64k",
    "copy-256k",
    "copy-1m",
    "splice-256k",
    "splice-1m",
    "sendfile",
    "mapping",
];
const WIDTHS: [usize; 4] = [11, 11, 11, 13];

/// Measures ways to send the data of long reads
#[derive(Debug, Parser)]
#[command(name = "sending")]
pub(crate) struct Options {
    /// How often to measure each method in each cell; the median counts
    #[arg(long, default_value = "5")]
    rounds: u32,
    /// Duration of each round
    #[arg(long, default_value = "0.3")]
    seconds: f64,
    /// Size of the images in MiB
    #[arg(long, default_value = "512")]
    size: u64,
    /// Only the cells whose name contains this
    #[arg(long, value_name = "TEXT", default_value = "")]
    only: String,
    /// Where to put the images, one after another
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "DIR,...",
        default_value = concat!("/dev/shm,", env!("CARGO_TARGET_TMPDIR"))
    )]
    dirs: Vec<PathBuf>,
    /// Which servers to measure, as for `peers`
    #[arg(long, value_delimiter = ',', value_name = "NAME,...", default_values = SERVERS)]
    servers: Vec<String>,
    /// `cargo bench` adds this
    #[arg(long, hide = true)]
    bench: bool,
}

/// Measures and prints every cell; returns the results.
pub(crate) fn run(options: Options) -> Result<Vec<CellResult>, Error> {
    let mut results = Vec::new();
    Machine::of_this_run("sending").print();
    let Options { rounds, seconds, size, only, dirs, servers, .. } = options;
    println!("# {rounds} rounds of {seconds} s, images of {size} MiB");
    let cells = Set::Full.cells();
    let cells = cells.iter().filter(|cell| CELLS.contains(&cell.to_string().as_str()));
    let cells: Vec<&Cell> = cells.filter(|cell| cell.to_string().contains(&only)).collect();
    for dir in dirs {
        let words = ["peers".to_owned(), format!("--servers={}", servers.join(","))];
        let numbers = [("rounds", rounds.to_string()), ("size", size.to_string())];
        let numbers = numbers.into_iter().chain([("seconds", seconds.to_string())]);
        let words = words.into_iter().chain(numbers.map(|(name, n)| format!("--{name}={n}")));
        let words = words.chain([format!("--cached-dir={}", dir.display())]);
        let setup = Setup::new(super::Options::try_parse_from(words)?)?;
        for cell in &cells {
            println!("\n{cell}, image in {}", dir.display());
            print_row("", WIDTHS, ["requests/s", "lowest", "highest", "CPU µs/req."]);
            let result = setup.measure_cell(**cell, &mut Kept::new());
            for (name, figures) in result.rates() {
                let figures = figures.map_or([None; 4], |figures| figures.map(Some));
                let places = [0, 0, 0, 2].into_iter();
                let mut texts = figures.into_iter().zip(places).map(|(one, n)| figure(one, n));
                print_row(name, WIDTHS, [(); 4].map(|()| texts.next().unwrap_or_default()));
            }
            results.push(result);
        }
    }
    Ok(results)
}
