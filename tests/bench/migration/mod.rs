//! Measures migrations of a disk by several systems, and their effect on clients; the benchmark
//! `migrate`.

pub(crate) mod client;
pub(crate) mod disks;
pub(crate) mod pause;
pub(crate) mod rates;
mod systems;

use crate::machine::Machine;
use crate::process::named_path;
use crate::report::{Error, Target, in_turns, print_targets, write_json};
use clap::Parser;
use disks::{Kind, Pair};
use flexnbd::cli::size::parse_size;
use pause::PauseResult;
use rates::{KindResult, SystemResult};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::time::Instant;
use systems::{Network, System};

/// Measures migrations between two processes on this machine.
#[derive(Clone, Debug, Parser)]
#[command(name = "migrate")]
pub(crate) struct Options {
    /// Which systems to measure; those that are not installed are left out
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "NAME,...",
        default_value = "flexnbd,nbdcopy,nbdcopy-flush,qemu"
    )]
    systems: Vec<String>,
    /// Another build of flexnbd to measure beside the one just built
    #[arg(long, value_parser = named_path, value_name = "NAME=PATH")]
    also: Vec<(String, PathBuf)>,
    /// Which images to migrate
    #[arg(
        long,
        value_delimiter = ',',
        value_enum,
        value_name = "KIND,...",
        default_value = "dense,sparse25,sparse1,zeros"
    )]
    images: Vec<Kind>,
    /// Measure only the effect on clients
    #[arg(long)]
    pauses_only: bool,
    /// Size of the images (K, M, G: powers of 1024)
    #[arg(long, default_value = "1G", value_parser = size)]
    size: u64,
    /// Where to put the images
    #[arg(long, value_name = "DIR", default_value = "/dev/shm")]
    dir: PathBuf,
    /// How often each system migrates each image; the median counts
    #[arg(long, default_value = "3", value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// How many migrations to measure under each load of a client; 0 for none
    #[arg(long, default_value = "20", value_name = "NUMBER")]
    migrations: u32,
    /// Size of the image of these migrations
    #[arg(long, default_value = "256M", value_parser = size)]
    pause_size: u64,
    /// How many writes of 4 KiB a client begins each second meanwhile
    #[arg(long, default_value = "5000", value_name = "NUMBER",
        value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    writes_per_sec: u32,
    /// How many bytes a second the source may send in limited migrations (K, M, G)
    #[arg(long, default_value = "100M", value_name = "RATE", value_parser = rate)]
    max_speed: u64,
    /// Write all figures to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// `cargo bench` adds this
    #[arg(long, hide = true)]
    bench: bool,
}

/// At least 4 MiB: smaller sparse images are hardly sparse.
fn size(text: &str) -> Result<u64, String> {
    let size = parse_size(text).map_err(|error| error.to_string())?;
    if size < 4 << 20 { Err("less than 4 MiB".to_owned()) } else { Ok(size) }
}

fn rate(text: &str) -> Result<u64, String> {
    match parse_size(text).map_err(|error| error.to_string())? {
        0 => Err("0 would mean no limit".to_owned()),
        rate => Ok(rate),
    }
}

pub(crate) fn run(options: &Options) -> Result<(), Error> {
    let network = Network::new();
    let systems = systems::systems(&options.systems, &options.also)?;
    let about = about(options, &systems, &network);
    let start = Instant::now();
    let mut kinds = Vec::new();
    for kind in options.images.iter().filter(|_| !options.pauses_only) {
        let result = measure_kind(*kind, options, &systems, &network);
        result.print();
        kinds.push(result);
    }
    let pauses = measure_pauses(options, &systems);
    println!("\n# took {:.1} minutes", start.elapsed().as_secs_f64() / 60.0);
    let dense = kinds.iter().find(|result| result.kind == Kind::Dense);
    let dense = dense.and_then(KindResult::seconds);
    let ours = pauses.iter().filter(|result| result.system == "flexnbd");
    let kind_targets = kinds.iter().filter_map(|result| result.target(dense));
    let targets: Vec<Target> = kind_targets.chain(ours.filter_map(PauseResult::target)).collect();
    print_targets(&targets);
    let Some(file) = &options.json else { return Ok(()) };
    let json = json!({ "about": about, "images": kinds, "pauses": pauses, "targets": targets });
    write_json(file, &json)
}

/// Prints the environment and returns it as JSON.
fn about(options: &Options, systems: &[System], network: &Network) -> Value {
    let machine = Machine::of_this_run("migrate");
    machine.print();
    for system in systems {
        println!("# {}: {}", system.name, system.version);
    }
    if let Some(why) = &network.why_shared {
        println!("# bytes on the wire are not counted: {why}");
    }
    let versions: serde_json::Map<String, Value> =
        systems.iter().map(|s| (s.name.clone(), s.version.clone().into())).collect();
    json!({
        "machine": machine,
        "versions": versions,
        "directory": options.dir,
        "size": options.size,
        "rounds": options.rounds,
        "max_speed": options.max_speed,
    })
}

fn measure_kind(
    kind: Kind,
    options: &Options,
    systems: &[System],
    network: &Network,
) -> KindResult {
    let runs = in_turns(options.rounds, systems.len(), |which| {
        let pair = Pair::new(&options.dir, kind, options.size);
        let run = pair.and_then(|pair| systems[which].migrate(&pair, network));
        run.map_err(|error| {
            println!("# {}: {}: {error}", kind.word(), systems[which].name);
            error.to_string()
        })
    });
    let systems = systems.iter().zip(runs);
    let systems = systems
        .map(|(system, runs)| SystemResult::new(&system.name, system.flexnbd().is_some(), runs));
    KindResult::new(kind, options.size, systems.collect())
}

/// The effect on clients of each build of flexnbd; other systems have no pause that a client sees.
fn measure_pauses(options: &Options, systems: &[System]) -> Vec<PauseResult> {
    let mut results = Vec::new();
    for system in systems {
        let Some(program) = system.flexnbd() else { continue };
        for load in pause::loads(options) {
            let result = PauseResult::measure(&system.name, program, load, options);
            result.print();
            results.push(result);
        }
    }
    results
}
