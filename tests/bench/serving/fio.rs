//! The same loads from fio's nbd engine, which is libnbd: a client in real use.

use super::cells::{Cell, Temperature, word};
use super::results::Sample;
use super::servers::Running;
use super::usage::cpu_seconds;
use super::{Options, Setup};
use crate::process::find;
use crate::report::Error;
use serde_json::Value;
use std::process::Command;

/// Why this machine cannot measure cells with fio, if so.
pub(crate) fn obstacle() -> Option<&'static str> {
    if find("fio").is_none() {
        return Some("fio is not installed");
    }
    let engines = Command::new("fio").arg("--enghelp").output();
    let engines = engines.map(|output| output.stdout).unwrap_or_default();
    let has_nbd = String::from_utf8_lossy(&engines).lines().any(|line| line.trim() == "nbd");
    if has_nbd { None } else { Some("this fio has no nbd engine") }
}

pub(crate) fn sample(cell: &Cell, setup: &Setup, server: &Running) -> Result<Sample, Error> {
    if cell.temperature == Temperature::Cold {
        setup.images.evict()?;
    }
    let cpu_before = cpu_seconds(server.pid);
    let arguments = arguments(cell, &setup.options, &server.export.uri());
    let output = command(server).args(arguments).output()?;
    let cpu = cpu_seconds(server.pid) - cpu_before;
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        return Err(format!("fio failed: {}", stderr.lines().next().unwrap_or_default()).into());
    }
    let [requests, per_sec, busy] = parse(&output.stdout).ok_or("fio printed no figures")?;
    // fio prints the mean of its jobs, which share one CPU.
    let client_busy = busy * cell.sessions as f64;
    Ok(Sample::new(cell, server.pid, requests, per_sec, cpu, client_busy))
}

/// fio, or for TLS fio as a user other than root, because libnbd looks for authorities in the home of such a
/// user, and fio does not let it look elsewhere.
fn command(server: &Running) -> Command {
    let Some(home) = &server.home else { return Command::new("fio") };
    let mut command = if nix::unistd::geteuid().is_root() {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups", "fio"]);
        command
    } else {
        Command::new("fio")
    };
    command.env("HOME", home);
    command
}

fn arguments(cell: &Cell, options: &Options, uri: &str) -> Vec<String> {
    let order = if cell.is_sequential() { "" } else { "rand" };
    let common = "--name=peers --ioengine=nbd --thread --group_reporting --randrepeat=1 \
                  --norandommap --output-format=json";
    let mut arguments: Vec<String> = common.split_whitespace().map(str::to_owned).collect();
    arguments.extend([
        format!("--uri={uri}"),
        format!("--rw={order}{}", word(cell.work)),
        format!("--bs={}", cell.block),
        format!("--iodepth={}", cell.depth),
        format!("--numjobs={}", cell.sessions),
        format!("--size={}M", options.size),
        format!("--runtime={}ms", options.seconds.as_millis()),
    ]);
    let mib_per_session = options.size / cell.sessions as u64;
    match cell.temperature {
        Temperature::Cached => arguments.push("--time_based".to_owned()),
        // One pass over the image by all jobs together: a second pass would find it cached.
        Temperature::Cold => arguments.push(format!("--io_size={mib_per_session}M")),
    }
    if cell.is_sequential() {
        arguments.push(format!("--offset_increment={mib_per_session}M"));
    }
    arguments
}

/// Parses fio's JSON, which may follow warnings: requests, requests per second, and the part of the
/// time in which a job computed.
fn parse(output: &[u8]) -> Option<[f64; 3]> {
    let start = output.iter().position(|byte| *byte == b'{')?;
    let all: Value = serde_json::from_slice(&output[start..]).ok()?;
    let job = &all["jobs"][0];
    if job["error"].as_i64()? != 0 {
        return None;
    }
    let sum = |key: &str| Some(job["read"][key].as_f64()? + job["write"][key].as_f64()?);
    let busy = (job["usr_cpu"].as_f64()? + job["sys_cpu"].as_f64()?) / 100.0;
    Some([sum("total_ios")?, sum("iops")?, busy])
}
