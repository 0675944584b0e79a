//! Measures moving a disk between two processes on this machine, ours beside other people's
//! programs; `README.md` beside this file says how. Never passes or fails anything.
//!
//! The tests in these files are run by `main.rs`, as part of `cargo test`. Cargo builds the
//! benchmark itself with `cfg(test)`, too, but without a harness; there they are unused.

#[allow(dead_code, reason = "its loads are those of the other benchmark")]
mod grid;
mod machine;
mod process;
#[allow(dead_code, reason = "its sessions are those of the other benchmark")]
mod replies;
mod running;
#[allow(dead_code, reason = "here other systems are measured than by the other benchmark")]
mod servers;
#[allow(dead_code, reason = "its sessions are those of the other benchmark")]
mod session;
#[allow(dead_code, reason = "its samples are those of the other benchmark")]
mod stats;
mod targets;

#[path = "migrate/choices.rs"]
mod choices;
#[path = "migrate/client.rs"]
mod client;
#[path = "migrate/disks.rs"]
mod disks;
#[path = "migrate/network.rs"]
mod network;
#[path = "migrate/ours.rs"]
mod ours;
#[path = "migrate/pause.rs"]
mod pause;
#[path = "migrate/qemu.rs"]
mod qemu;
#[path = "migrate/systems.rs"]
mod systems;
#[path = "migrate/table.rs"]
mod table;

use choices::Choices;
use disks::{Disks, Kind};
use machine::Machine;
use network::Network;
use pause::{Load, PauseReport};
use serde_json::{Value, json};
use std::fs;
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;
use systems::System;
use table::{KindReport, Run};
use targets::Target;

/// What went wrong, for the person who reads it.
type Trouble = Box<dyn std::error::Error + Send + Sync>;

fn main() -> ExitCode {
    let choices = match Choices::from_command_line() {
        Ok(choices) => choices,
        Err(code) => return code,
    };
    match measure(&choices) {
        Ok(()) => ExitCode::SUCCESS,
        Err(trouble) => {
            eprintln!("migrate: {trouble}");
            ExitCode::FAILURE
        }
    }
}

fn measure(choices: &Choices) -> Result<(), Trouble> {
    let network = Network::of_our_own();
    let systems = systems::installed(&choices.systems, &choices.also)?;
    let about = begin(choices, &systems, &network);
    let disks = Disks::new(&choices.dir)?;
    let began = Instant::now();
    let mut kinds = Vec::new();
    for kind in choices.images.iter().filter(|_| !choices.pauses_only) {
        let report = measure_kind(*kind, choices, &systems, &disks, &network);
        report.print();
        kinds.push(report);
    }
    let pauses = measure_pauses(choices, &systems, &disks);
    println!("\n# took {:.1} minutes", began.elapsed().as_secs_f64() / 60.0);
    let dense = kinds.iter().find(|report| report.kind == Kind::Dense);
    let dense = dense.and_then(KindReport::seconds);
    let ours = pauses.iter().filter(|report| report.name == systems::OURS);
    let wanted: Vec<Target> = kinds
        .iter()
        .flat_map(|report| report.targets(dense))
        .chain(ours.flat_map(PauseReport::targets))
        .collect();
    targets::print(&wanted);
    let Some(file) = &choices.json else { return Ok(()) };
    let kinds: Vec<Value> = kinds.iter().map(KindReport::json).collect();
    let pauses: Vec<Value> = pauses.iter().map(PauseReport::json).collect();
    let all = json!({ "about": about, "images": kinds, "pauses": pauses, "targets": wanted });
    write(file, &all)
}

/// Says what is going to happen, and on which machine.
fn begin(choices: &Choices, systems: &[System], network: &Network) -> Value {
    let machine = Machine::of_this_run("migrate");
    machine.print();
    for system in systems {
        println!("# {}: {}", system.name, system.version);
    }
    if let Some(why) = network.why_shared() {
        println!("# bytes on the wire may be those of others, too: {why}");
    }
    let versions: serde_json::Map<String, Value> =
        systems.iter().map(|s| (s.name.clone(), s.version.clone().into())).collect();
    json!({
        "machine": machine,
        "versions": versions,
        "directory": choices.dir,
        "size": choices.size,
        "rounds": choices.rounds,
        "max_speed": choices.max_speed,
    })
}

/// All rounds of one kind of image. The systems take turns, and each round begins with another.
fn measure_kind(
    kind: Kind,
    choices: &Choices,
    systems: &[System],
    disks: &Disks,
    network: &Network,
) -> KindReport {
    let mut report = KindReport::new(kind, choices.size, systems);
    for round in 0..choices.rounds as usize {
        for turn in 0..systems.len() {
            let which = (round + turn) % systems.len();
            let run = measure_once(kind, choices.size, &systems[which], disks, network);
            if let Err(trouble) = &run {
                println!("# {}: {}: {trouble}", kind.word(), systems[which].name);
            }
            report.add(which, run.map_err(|trouble| trouble.to_string()));
        }
    }
    report
}

fn measure_once(
    kind: Kind,
    size: u64,
    system: &System,
    disks: &Disks,
    network: &Network,
) -> Result<Run, Trouble> {
    let pair = disks.make(kind, size)?;
    let allocated_before = disks::allocated(&pair.source)?;
    let moved = system.migrate(&pair, network)?;
    Ok(Run {
        seconds: moved.elapsed.as_secs_f64(),
        wire: moved.wire,
        bytes_sent: moved.bytes_sent,
        allocated_before,
        allocated_after: disks::allocated(&pair.destination)?,
        same: disks::same(&pair.source, &pair.destination)?,
    })
}

/// What clients feel of each of ours; the others have no pause that could be seen from outside.
fn measure_pauses(choices: &Choices, systems: &[System], disks: &Disks) -> Vec<PauseReport> {
    let mut reports = Vec::new();
    for system in systems {
        let Some(program) = system.ours() else { continue };
        for load in Load::all(choices) {
            let mut report = PauseReport::new(&system.name, load, choices);
            for number in 1..=choices.migrations {
                match pause::measure_once(program, load, choices.pause_size, disks) {
                    Ok(seen) => report.seen.push(seen),
                    Err(trouble) => println!("# migration {number}: {}: {trouble}", system.name),
                }
            }
            report.print();
            reports.push(report);
        }
    }
    reports
}

fn write(file: &Path, value: &Value) -> Result<(), Trouble> {
    let text = serde_json::to_string_pretty(value)?;
    fs::write(file, text + "\n").map_err(|error| format!("{}: {error}", file.display()).into())
}
