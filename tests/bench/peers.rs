//! Measures NBD servers side by side on this machine; see README.md. Prints figures and ratios, and
//! writes JSON; no result makes it fail.
//!
//! main.rs runs the tests in these files. Cargo builds the benchmark with `cfg(test)` but without a
//! test harness, so that their helpers are unused here.

mod activation;
mod cells;
mod data;
mod fio;
mod image;
mod machine;
mod memory;
mod nbd;
mod options;
mod picture;
mod process;
mod raw;
mod report;
mod results;
mod servers;
#[allow(dead_code, reason = "each benchmark uses some of them")]
mod stats;
mod summary;
mod usage;

use cells::{Cell, Generator, Temperature, Transport};
use clap::Parser;
use image::Images;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use options::Options;
use results::{CellResult, Results, Round, Sample};
use servers::{Running, Server};
use std::collections::HashMap;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Once;
use std::time::{Duration, Instant};

/// What all measurements share.
#[derive(Debug)]
struct Setup {
    options: Options,
    servers: Vec<Server>,
    images: Images,
}

type Error = Box<dyn std::error::Error + Send + Sync>;
/// Servers that continue to run after a round.
type Kept = HashMap<(String, Temperature, Transport), Running>;

/// Duration of a round besides `--seconds`, for the estimate.
const OVERHEAD: Duration = Duration::from_millis(500);

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("peers: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<(), Error> {
    if options.list {
        options.cells().iter().for_each(|cell| println!("{cell}"));
        return Ok(());
    }
    let results = match &options.again {
        Some(file) => {
            let results = Results::read(file)?;
            results.print_about();
            results.cells.iter().for_each(CellResult::print);
            results
        }
        None => measure(options)?,
    };
    memory::print(&results.memory);
    activation::print(&results.activation);
    summary::print(&results);
    if let Some(file) = &options.json {
        results.write(file)?;
    }
    options.svg.as_ref().map_or(Ok(()), |file| picture::draw(&results, file))
}

fn measure(options: &Options) -> Result<Results, Error> {
    let setup = Setup::new(options)?;
    let cells = possible_cells(options);
    let mut results = Results::new(&setup, &cells);
    results.print_about();
    let (cell_count, server_count) = (cells.len(), setup.servers.len());
    let rounds = cell_count as u32 * server_count as u32 * options.rounds;
    let minutes = ((options.seconds + OVERHEAD) * rounds).as_secs_f64() / 60.0;
    println!("# {cell_count} cells, {server_count} servers, about {minutes:.1} minutes");
    let start = Instant::now();
    let mut kept = Kept::new();
    for cell in &cells {
        let result = setup.measure_cell(cell, &mut kept);
        result.print();
        results.cells.push(result);
    }
    drop(kept);
    if options.measures("memory") {
        results.memory = memory::measure(&setup)?;
    }
    if options.measures("activation") {
        results.activation = activation::measure(&setup)?;
    }
    println!("\n# took {:.1} minutes", start.elapsed().as_secs_f64() / 60.0);
    Ok(results)
}

/// The cells that this machine can measure; prints how many it cannot, and why.
fn possible_cells(options: &Options) -> Vec<Cell> {
    let mut cells = options.cells();
    let mut skip = |obstacle: Option<&str>, affected: fn(&Cell) -> bool| {
        let Some(why) = obstacle else { return };
        let all = cells.len();
        cells.retain(|cell| !affected(cell));
        if cells.len() < all {
            println!("# skipped {} of {all} cells: {why}", all - cells.len());
        }
    };
    skip(image::never_cold(&options.dir), |cell| cell.temperature == Temperature::Cold);
    skip(fio::obstacle(), |cell| cell.generator == Generator::Fio);
    cells
}

impl Setup {
    fn new(options: &Options) -> Result<Self, Error> {
        let servers = servers::installed(&options.servers, &options.also)?;
        Ok(Self { options: options.clone(), servers, images: Images::new(options)? })
    }

    /// Measures all rounds of a cell. The servers take turns, and each round begins with another
    /// server, so that a disturbance of the machine does not always hit the same one.
    fn measure_cell(&self, cell: &Cell, kept: &mut Kept) -> CellResult {
        let mut result = CellResult::new(cell, &self.servers);
        for round in 0..self.options.rounds as usize {
            for turn in 0..self.servers.len() {
                let which = (round + turn) % self.servers.len();
                let server = &self.servers[which];
                result.servers[which].rounds.push(match self.measure_once(cell, server, kept) {
                    Ok(sample) => Round::Measured(sample),
                    Err(error) => {
                        println!("# {cell}: {}: {error}", server.name);
                        Round::Failed(error.to_string())
                    }
                });
            }
        }
        result
    }

    /// Starts a new server for each round, except nbd-server, which is slow to start; each of its
    /// sessions is a new process.
    fn measure_once(&self, cell: &Cell, server: &Server, kept: &mut Kept) -> Result<Sample, Error> {
        let image = self.images.path(cell.temperature)?;
        let key = (server.name.clone(), cell.temperature, cell.transport);
        let running = match kept.remove(&key) {
            Some(running) => running,
            None => self.start(server, image, cell.transport)?,
        };
        let sample = match cell.generator {
            Generator::Raw => raw::sample(cell, self, &running),
            Generator::Fio => fio::sample(cell, self, &running),
        }?;
        if server.forks() {
            kept.insert(key, running);
        }
        Ok(sample)
    }

    /// Starts a server on its CPU, and returns to that of the client.
    fn start(&self, server: &Server, image: &Path, transport: Transport) -> Result<Running, Error> {
        pin_to(self.options.server_cpu);
        let running = Running::start(server, image, transport);
        pin_to(self.options.client_cpu);
        running
    }
}

/// Pins this thread, and threads and processes that it starts, to one CPU. Prints a note once if
/// that fails; the ratios are still valid then.
fn pin_to(cpu: usize) {
    static NOTE: Once = Once::new();
    let mut set = CpuSet::new();
    let pinned = set.set(cpu).and_then(|()| sched_setaffinity(Pid::from_raw(0), &set));
    if let Err(error) = pinned {
        NOTE.call_once(|| {
            println!("# cannot run on CPU {cpu} alone ({error}): server and client share CPUs");
        });
    }
}
