//! Measures NBD servers side by side on this machine; `README.md` beside this file says how.
//! Never passes or fails anything: it prints figures and ratios for people, and JSON for programs.
//!
//! The tests in these files are run by `main.rs`, as part of `cargo test`. Cargo builds the
//! benchmark itself with `cfg(test)`, too, but without a harness; there they are unused.

mod fio;
mod generator;
mod grid;
mod image;
mod machine;
mod memory;
mod options;
mod pin;
mod replies;
mod report;
mod running;
mod servers;
mod session;
mod stats;
mod usage;

use grid::{Cell, Source, Temperature};
use image::Images;
use options::Options;
use report::{CellReport, Report};
use running::Running;
use servers::Server;
use stats::Sample;
use std::process::ExitCode;

/// What went wrong, for the person who reads it.
type Trouble = Box<dyn std::error::Error + Send + Sync>;

fn main() -> ExitCode {
    let options = match Options::from_command_line() {
        Ok(options) => options,
        Err(code) => return code,
    };
    match measure(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(trouble) => {
            eprintln!("peers: {trouble}");
            ExitCode::FAILURE
        }
    }
}

fn measure(options: &Options) -> Result<(), Trouble> {
    let cells = options.cells();
    if options.list {
        cells.iter().for_each(|cell| println!("{cell}"));
        return Ok(());
    }
    let servers = servers::installed(&options.servers, &options.also)?;
    let images = Images::new(options)?;
    let cells = possible(cells, &images);
    let mut report = Report::begin(options, &servers, cells.len());
    for cell in &cells {
        let result = measure_cell(cell, options, &servers, &images);
        result.print();
        report.cells.push(result);
    }
    if options.measures_memory() {
        report.memory = memory::measure(options, &servers, &images)?;
        memory::print(&report.memory);
    }
    report.finish(options.json.as_deref())
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
fn measure_cell(cell: &Cell, options: &Options, servers: &[Server], images: &Images) -> CellReport {
    let mut result = CellReport::new(cell, servers);
    for round in 0..options.rounds as usize {
        for turn in 0..servers.len() {
            let which = (round + turn) % servers.len();
            match measure_once(cell, options, &servers[which], images) {
                Ok(sample) => result.rows[which].samples.push(sample),
                Err(trouble) => {
                    println!("# {cell}: {}: {trouble}", servers[which].name);
                    result.rows[which].troubles.push(trouble.to_string());
                }
            }
        }
    }
    result
}

fn measure_once(
    cell: &Cell,
    options: &Options,
    server: &Server,
    images: &Images,
) -> Result<Sample, Trouble> {
    let image = images.image(cell.temperature)?;
    pin::to(options.server_cpu);
    let running = Running::start(server, &image, cell.transport);
    pin::to(options.client_cpu);
    let running = running?;
    match cell.source {
        Source::Raw => generator::sample(cell, options, &running, images),
        Source::Fio => fio::sample(cell, options, &running, images),
    }
}
