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
use options::Options;
use results::{CellResult, Results, Round, Sample};
use servers::{Running, Server};
use std::collections::HashMap;
use std::process::ExitCode;
use std::time::{Duration, Instant};

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
    let servers = servers::installed(&options.servers, &options.also)?;
    let images = Images::new(options)?;
    let cells = possible_cells(options);
    let mut results = Results::new(options, &servers, &cells);
    results.print_about();
    let rounds = cells.len() as u32 * servers.len() as u32 * options.rounds;
    let minutes = ((options.seconds + OVERHEAD) * rounds).as_secs_f64() / 60.0;
    println!("# {} cells, {} servers, about {minutes:.1} minutes", cells.len(), servers.len());
    let start = Instant::now();
    let mut kept = Kept::new();
    for cell in &cells {
        let result = measure_cell(cell, options, &servers, &images, &mut kept);
        result.print();
        results.cells.push(result);
    }
    drop(kept);
    if options.measures("memory") {
        results.memory = memory::measure(options, &servers, &images)?;
    }
    if options.measures("activation") {
        results.activation = activation::measure(options, &servers, &images)?;
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

/// Measures all rounds of a cell. The servers take turns, and each round begins with another
/// server, so that a disturbance of the machine does not always hit the same one.
fn measure_cell(
    cell: &Cell,
    options: &Options,
    servers: &[Server],
    images: &Images,
    kept: &mut Kept,
) -> CellResult {
    let mut result = CellResult::new(cell, servers);
    for round in 0..options.rounds as usize {
        for turn in 0..servers.len() {
            let which = (round + turn) % servers.len();
            let sample = measure_once(cell, options, &servers[which], images, kept);
            result.servers[which].rounds.push(sample.map_or_else(
                |error| {
                    println!("# {cell}: {}: {error}", servers[which].name);
                    Round::Failed(error.to_string())
                },
                Round::Measured,
            ));
        }
    }
    result
}

/// Starts a new server for each round, except nbd-server, which is slow to start; each of its
/// sessions is a new process.
fn measure_once(
    cell: &Cell,
    options: &Options,
    server: &Server,
    images: &Images,
    kept: &mut Kept,
) -> Result<Sample, Error> {
    let image = images.path(cell.temperature)?;
    let key = (server.name.clone(), cell.temperature, cell.transport);
    let running = match kept.remove(&key) {
        Some(running) => running,
        None => options.start(server, image, cell.transport)?,
    };
    let sample = match cell.generator {
        Generator::Raw => raw::sample(cell, options, &running, images),
        Generator::Fio => fio::sample(cell, options, &running, images),
    }?;
    if server.forks() {
        kept.insert(key, running);
    }
    Ok(sample)
}
