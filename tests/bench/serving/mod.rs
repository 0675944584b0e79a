//! Measures NBD servers under the same loads; the benchmark `peers`.

mod activation;
pub(crate) mod cells;
mod fio;
mod images;
mod memory;
pub(crate) mod minimal;
mod picture;
pub(crate) mod raw;
pub(crate) mod results;
pub(crate) mod sending;
pub(crate) mod servers;
mod tls;
mod usage;

use crate::machine::{Machine, version};
use crate::process::named_path;
use crate::report::{Error, in_turns, write_json};
use cells::{Cell, Generator, Set, Temperature, Transport};
use clap::Parser;
use images::Images;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use results::{About, CellResult, Results, Round, Sample, ServerResult};
use servers::{Running, Server};
use std::collections::HashMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Once;
use std::time::{Duration, Instant};

/// Runs `peers` or `sending` with these arguments, the program's name first, or, if they say so, a minimal
/// server.
pub(crate) fn run_bench(bench: &str, arguments: Vec<OsString>) -> Result<(), Error> {
    match bench {
        _ if arguments.get(1).is_some_and(|first| first == minimal::WORD) => {
            minimal::run(&minimal::Options::parse_from(&arguments[1..]))
        }
        "sending" => sending::run(sending::Options::parse_from(arguments)).map(drop),
        _ => run(Options::parse_from(arguments)),
    }
}

/// Measures NBD servers side by side on this machine.
#[derive(Debug, Parser)]
#[command(name = "peers")]
pub(crate) struct Options {
    /// Which cells to measure
    #[arg(long, value_enum, default_value = "default")]
    set: Set,
    /// Only the cells whose name contains this; `memory`, `activation` and `handshakes` (of servers with TLS) are names, too
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
    /// Print the names of the cells and measure nothing
    #[arg(long)]
    list: bool,
    /// Which servers to measure; those that are not installed are left out
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "NAME,...",
        default_value = "flexnbd,nbdkit,qemu-nbd,nbd-server"
    )]
    servers: Vec<String>,
    /// Another build of flexnbd to measure beside the one just built
    #[arg(long, value_parser = named_path, value_name = "NAME=PATH")]
    also: Vec<(String, PathBuf)>,
    /// How often to measure each server in each cell; the median counts
    #[arg(long, default_value = "3", value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Duration of each round
    #[arg(long, default_value = "0.5", value_parser = seconds)]
    seconds: Duration,
    /// Size of the image in MiB
    #[arg(long, default_value = "1024", value_parser = clap::value_parser!(u64).range(1..))]
    size: u64,
    /// Where to put the image of cold cells: a directory on a real disk
    #[arg(long, value_name = "DIR", default_value = env!("CARGO_TARGET_TMPDIR"))]
    dir: PathBuf,
    /// Where to put the image of cached cells
    #[arg(long, value_name = "DIR", default_value = "/dev/shm")]
    cached_dir: PathBuf,
    /// The CPU of the servers
    #[arg(long, default_value = "0", value_name = "NUMBER")]
    server_cpu: usize,
    /// The CPU of the client
    #[arg(long, default_value = "1", value_name = "NUMBER")]
    client_cpu: usize,
    /// Write all figures to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Draw the ratios of all cells into this file
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Measure nothing; print (and draw with --svg) the figures of an earlier run's --json
    #[arg(long, value_name = "FILE", conflicts_with = "json")]
    again: Option<PathBuf>,
    /// `cargo bench` adds this
    #[arg(long, hide = true)]
    bench: bool,
}

impl Options {
    fn cells(&self) -> Vec<Cell> {
        let mut cells = self.set.cells();
        cells.retain(|cell| self.includes(&cell.to_string()));
        cells
    }

    /// Whether to measure `memory`, `activation` or `handshakes`. The small set has neither unless `--only`
    /// names it.
    fn measures(&self, name: &str) -> bool {
        self.includes(name) && (self.only.is_some() || self.set != Set::Small)
    }

    fn includes(&self, name: &str) -> bool {
        self.only.as_ref().is_none_or(|only| name.contains(only.as_str()))
    }
}

fn seconds(text: &str) -> Result<Duration, String> {
    match text.parse::<f64>() {
        Ok(seconds) if seconds > 0.0 && seconds <= 3600.0 => Ok(Duration::from_secs_f64(seconds)),
        _ => Err("not a number of seconds above 0 and up to 3600".to_owned()),
    }
}

/// What all measurements share.
#[derive(Debug)]
pub(crate) struct Setup {
    options: Options,
    servers: Vec<Server>,
    images: Images,
}

/// Servers that continue to run after a round.
type Kept = HashMap<(String, Temperature, Transport), Running>;

/// Duration of a round besides `--seconds`, for the estimate.
const OVERHEAD: Duration = Duration::from_millis(500);

pub(crate) fn run(options: Options) -> Result<(), Error> {
    if options.list {
        options.cells().iter().for_each(|cell| println!("{cell}"));
        return Ok(());
    }
    let (json, svg) = (options.json.clone(), options.svg.clone());
    let mut results = match &options.again {
        Some(file) => {
            let results = Results::read(file)?;
            results.print_about();
            results.cells.iter().for_each(CellResult::print);
            results
        }
        None => Setup::new(options)?.measure()?,
    };
    results.summarize();
    results.print();
    if let Some(file) = json {
        write_json(&file, &results)?;
    }
    svg.map_or(Ok(()), |file| picture::draw(&results, &file))
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
    skip(images::never_cold(&options.dir), |cell| cell.temperature == Temperature::Cold);
    skip(fio::obstacle(), |cell| cell.generator == Generator::Fio);
    cells
}

impl Setup {
    fn new(options: Options) -> Result<Self, Error> {
        let servers = servers::servers(&options.servers, &options.also)?;
        Ok(Self { images: Images::new(&options)?, options, servers })
    }

    fn measure(&self) -> Result<Results, Error> {
        let options = &self.options;
        let cells = possible_cells(options);
        let uses_fio = cells.iter().any(|cell| cell.generator == Generator::Fio);
        let about = About {
            machine: Machine::of_this_run("peers"),
            servers: self.servers.clone(),
            fio: uses_fio.then(|| version("fio")),
            rounds: options.rounds,
            seconds: options.seconds.as_secs_f64(),
            image_mib: options.size,
        };
        let (cell_count, server_count) = (cells.len(), self.servers.len());
        let mut results = Results { about, ..Results::default() };
        results.print_about();
        let rounds = cell_count as u32 * server_count as u32 * options.rounds;
        let minutes = ((options.seconds + OVERHEAD) * rounds).as_secs_f64() / 60.0;
        println!("# {cell_count} cells, {server_count} servers, about {minutes:.1} minutes");
        let start = Instant::now();
        let mut kept = Kept::new();
        for cell in cells {
            let result = self.measure_cell(cell, &mut kept);
            result.print();
            results.cells.push(result);
        }
        drop(kept);
        if options.measures("memory") {
            results.memory = memory::measure(self)?;
        }
        if options.measures("activation") {
            results.activation = activation::measure(self)?;
        }
        if options.measures("handshakes") {
            results.handshakes = tls::measure(self)?;
        }
        println!("\n# took {:.1} minutes", start.elapsed().as_secs_f64() / 60.0);
        Ok(results)
    }

    fn measure_cell(&self, cell: Cell, kept: &mut Kept) -> CellResult {
        let rounds = in_turns(self.options.rounds, self.servers.len(), |which| {
            let server = &self.servers[which];
            self.measure_once(&cell, server, kept).map_or_else(
                |error| {
                    println!("# {cell}: {}: {error}", server.name);
                    Round::Failed(error.to_string())
                },
                Round::Measured,
            )
        });
        let servers = self.servers.iter().zip(rounds);
        let servers =
            servers.map(|(server, rounds)| ServerResult::new(&server.name, server.ours, rounds));
        CellResult::new(cell, servers.collect())
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
