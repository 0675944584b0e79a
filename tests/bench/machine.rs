//! The environment of a run: hardware, kernel, commit and command line; and data for images.

use flexnbd::human;
use harness::noise;
use serde::{Deserialize, Serialize};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

/// A load average above this before the run means that other processes use the machine.
const LOAD_MAX: f64 = 0.5;
/// Length of one write of [`write_data`], in bytes.
pub(crate) const PORTION: u64 = 1 << 20;

/// Everything a reader needs to repeat the run.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Machine {
    /// In UTC, as in `2026-11-22`.
    pub(crate) date: String,
    unix_time: u64,
    pub(crate) command: String,
    /// From `git describe`; empty outside a clone.
    pub(crate) commit: String,
    pub(crate) kernel: String,
    pub(crate) processor: String,
    pub(crate) cpus: usize,
    memory_mib: u64,
    load_before: f64,
}

impl Machine {
    /// The environment of the benchmark with this name.
    pub(crate) fn of_this_run(bench: &str) -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        // `cargo bench` adds --bench.
        let arguments: Vec<String> =
            std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
        let separator = if arguments.is_empty() { "" } else { " -- " };
        let read = |path| fs::read_to_string(path).unwrap_or_default();
        let first_number =
            |text: String| text.split_whitespace().find_map(|word| word.parse().ok());
        let memory_kib = first_number(read("/proc/meminfo")).unwrap_or(0.0);
        let git = ["-C", env!("CARGO_MANIFEST_DIR"), "describe", "--always", "--dirty"];
        let cpuinfo = read("/proc/cpuinfo");
        let model = cpuinfo.lines().find(|line| line.starts_with("model name")).unwrap_or_default();
        Self {
            date: human::utc(since)[..10].to_owned(),
            unix_time: since,
            command: format!("cargo bench --bench {bench}{separator}{}", arguments.join(" ")),
            commit: first_line("git", &git),
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            processor: model.split_once(": ").map_or("unknown", |(_, name)| name).to_owned(),
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            memory_mib: memory_kib as u64 >> 10,
            load_before: first_number(read("/proc/loadavg")).unwrap_or(0.0),
        }
    }

    pub(crate) fn print(&self) {
        let Self { date, commit, processor, cpus, memory_mib, kernel, load_before, .. } = self;
        println!("# {date}, flexnbd {commit}");
        println!("# {processor}, {cpus} CPUs, {memory_mib} MiB, Linux {kernel}");
        if *load_before > LOAD_MAX {
            println!(
                "# other processes use this machine (load {load_before}): rates, times and their \
                 ratios mean little now, processor time per request a bit more"
            );
        }
    }
}

/// The version that a program prints.
pub(crate) fn version(program: impl AsRef<OsStr>) -> String {
    let line = first_line(program, &["--version"]);
    if line.is_empty() { "unknown".to_owned() } else { line }
}

/// The first line that is not blank of what a program prints, to stdout or, as nbd-server does, to
/// stderr.
fn first_line(program: impl AsRef<OsStr>, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().ok();
    let output = output.filter(|output| output.status.success());
    let output = output.map(|output| [output.stdout, output.stderr].concat()).unwrap_or_default();
    let text = String::from_utf8_lossy(&output);
    text.lines().map(str::trim).find(|line| !line.is_empty()).unwrap_or_default().to_owned()
}

/// Writes a portion of data without blocks of zeros at each of these offsets, up to `size`. Syncs the
/// file.
pub(crate) fn write_data(
    file: &File,
    offsets: impl IntoIterator<Item = u64>,
    size: u64,
) -> io::Result<()> {
    for offset in offsets {
        file.write_all_at(&noise(PORTION.min(size - offset) as usize, offset), offset)?;
    }
    file.sync_all()
}
