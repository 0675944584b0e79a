//! Measures NBD servers side by side on this machine; `README.md` beside this file says how.
//! Never passes or fails anything: it prints figures and ratios for people, and JSON for programs.
//!
//! The tests in these files are run by `main.rs`, as part of `cargo test`. Cargo builds the
//! benchmark itself with `cfg(test)`, too, but without a harness; there they are unused.

mod activation;
mod cells;
mod fio;
mod generator;
mod grid;
mod image;
mod kept;
mod machine;
mod memory;
mod options;
mod picture;
mod pin;
mod plan;
#[allow(dead_code, reason = "the other benchmark waits for programs to succeed")]
mod process;
mod replies;
mod report;
mod running;
mod servers;
mod session;
mod stats;
mod summary;
mod targets;
mod usage;

use cells::{CellReport, Round};
use grid::{Cell, Source, Temperature};
use image::Images;
use kept::Kept;
use options::Options;
use report::Report;
use servers::Server;
use stats::Sample;
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

/// What went wrong, for the person who reads it.
type Trouble = Box<dyn std::error::Error + Send + Sync>;

fn main() -> ExitCode {
    let options = match Options::from_command_line() {
        Ok(options) => options,
        Err(code) => return code,
    };
    match run(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(trouble) => {
            eprintln!("peers: {trouble}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<(), Trouble> {
    if options.list {
        options.cells().iter().for_each(|cell| println!("{cell}"));
        return Ok(());
    }
    let report = match &options.again {
        Some(file) => read_again(file)?,
        None => measure(options)?,
    };
    report.print_end();
    if let Some(file) = &options.json {
        report.write(file)?;
    }
    if let Some(file) = &options.svg {
        picture::draw(&report, file)?;
    }
    Ok(())
}

fn read_again(file: &Path) -> Result<Report, Trouble> {
    let report = Report::read(file)?;
    report.print_beginning();
    report.print_cells();
    Ok(report)
}

fn measure(options: &Options) -> Result<Report, Trouble> {
    let servers = servers::installed(&options.servers, &options.also)?;
    let images = Images::new(options)?;
    let cells = possible(options.cells(), &images);
    let mut report = Report::begin(options, &servers, &cells);
    report.print_beginning();
    report.print_plan(options, &cells);
    let began = Instant::now();
    let mut kept = Kept::default();
    for cell in &cells {
        let result = measure_cell(cell, options, &servers, &images, &mut kept);
        result.print();
        report.cells.push(result);
    }
    drop(kept);
    if options.measures_memory() {
        report.memory = memory::measure(options, &servers, &images)?;
    }
    if options.measures_activation() {
        report.activation = activation::measure(options, &servers, &images)?;
    }
    println!("\n# took {:.1} minutes", began.elapsed().as_secs_f64() / 60.0);
    Ok(report)
}

/// The cells that can be measured here; says which others there are, and why they cannot.
fn possible(mut cells: Vec<Cell>, images: &Images) -> Vec<Cell> {
    let mut leave_out = |obstacle: Option<&str>, concerns: fn(&Cell) -> bool| {
        let before = cells.len();
        if let Some(why) = obstacle {
            cells.retain(|cell| !concerns(cell));
            let left_out = before - cells.len();
            if left_out > 0 {
                println!("# skipped {left_out} of {before} cells: {why}");
            }
        }
    };
    leave_out(images.why_never_cold(), |cell| cell.temperature == Temperature::Cold);
    leave_out(fio::why_not(), |cell| cell.source == Source::Fio);
    cells
}

/// All rounds of one cell. The servers take turns, and each round begins with another one, so
/// that what disturbs the machine for a while does not fall on the same server every time.
fn measure_cell(
    cell: &Cell,
    options: &Options,
    servers: &[Server],
    images: &Images,
    kept: &mut Kept,
) -> CellReport {
    let mut result = CellReport::new(cell, servers);
    for round in 0..options.rounds as usize {
        for turn in 0..servers.len() {
            let which = (round + turn) % servers.len();
            let seen = measure_once(cell, options, &servers[which], images, kept);
            result.rows[which].rounds.push(seen.map_or_else(
                |trouble| {
                    println!("# {cell}: {}: {trouble}", servers[which].name);
                    Round::Failed(trouble.to_string())
                },
                Round::Measured,
            ));
        }
    }
    result
}

fn measure_once(
    cell: &Cell,
    options: &Options,
    server: &Server,
    images: &Images,
    kept: &mut Kept,
) -> Result<Sample, Trouble> {
    let image = images.image(cell.temperature)?;
    pin::to(options.server_cpu);
    let running = kept.start(server, &image, cell.transport);
    pin::to(options.client_cpu);
    let running = running?;
    let seen = match cell.source {
        Source::Raw => generator::sample(cell, options, &running, images),
        Source::Fio => fio::sample(cell, options, &running, images),
    };
    if seen.is_err() {
        kept.forget(&running);
    }
    seen
}
