//! What machine this is, how busy, and what was asked of it when, as `/proc` tells (proc(5)).
//! Never measures anything itself.

use serde::{Deserialize, Serialize};
use std::fs;
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

/// With more load than this before we begin, others are using this machine.
pub(super) const LOAD_OF_OTHERS: f64 = 0.5;

/// The circumstances of a run: everything that somebody needs who wants to repeat it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Machine {
    /// The day in UTC, as in `2026-11-22`.
    pub(super) date: String,
    pub(super) unix_time: u64,
    /// The command line that measured.
    pub(super) command: String,
    /// What was built, as git says it; nothing outside a clone.
    pub(super) commit: String,
    pub(super) kernel: String,
    pub(super) processor: String,
    pub(super) cpus: usize,
    pub(super) memory_mib: u64,
    /// The load when we began.
    pub(super) load_before: f64,
}

impl Machine {
    /// Looks at this machine; `bench` is the name of the benchmark that runs.
    pub(super) fn of_this_run(bench: &str) -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let unix_time = since.as_secs();
        let memory = read("/proc/meminfo");
        let kib = memory.split_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok());
        Self {
            date: date_of(unix_time),
            unix_time,
            command: command_line(bench, std::env::args().skip(1)),
            commit: commit(),
            kernel: read("/proc/sys/kernel/osrelease"),
            processor: processor(),
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            memory_mib: kib.unwrap_or(0) >> 10,
            load_before: load_average(),
        }
    }

    /// Prints it, with a warning if others are using the machine.
    pub(super) fn print(&self) {
        let Self { date, commit, processor, cpus, memory_mib, kernel, load_before, .. } = self;
        println!("# {date}, flexnbd {commit}");
        println!("# {processor}, {cpus} CPUs, {memory_mib} MiB, Linux {kernel}");
        if *load_before > LOAD_OF_OTHERS {
            println!(
                "# others are using this machine (load {load_before}): rates, times and their \
                 ratios mean little now, processor time per request a bit more"
            );
        }
    }
}

/// What the file says, without white space around it; nothing if it cannot be read.
pub(super) fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}

/// The mean number of tasks that ran or wanted to, in the last minute.
fn load_average() -> f64 {
    let text = read("/proc/loadavg");
    text.split(' ').next().and_then(|first| first.parse().ok()).unwrap_or(0.0)
}

/// What the processor calls itself.
fn processor() -> String {
    let about = read("/proc/cpuinfo");
    let line = about.lines().find(|line| line.starts_with("model name")).unwrap_or_default();
    line.split_once(':').map_or("unknown", |(_, name)| name).trim().to_owned()
}

fn commit() -> String {
    let mut git = Command::new("git");
    git.args(["-C", env!("CARGO_MANIFEST_DIR"), "describe", "--always", "--dirty"]);
    let said = git.output().map(|output| output.stdout).unwrap_or_default();
    String::from_utf8_lossy(&said).trim().to_owned()
}

/// Pure: what somebody typed, without what cargo adds to it.
fn command_line(bench: &str, arguments: impl Iterator<Item = String>) -> String {
    let typed: Vec<String> = arguments.filter(|argument| argument != "--bench").collect();
    let separator = if typed.is_empty() { "" } else { " -- " };
    format!("cargo bench --bench {bench}{separator}{}", typed.join(" "))
}

/// Pure: the day of a time in seconds since 1970, in UTC, by Howard Hinnant's `civil_from_days`.
fn date_of(unix_time: u64) -> String {
    let days = unix_time / 86_400 + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let leaps = day_of_era / 1460 + day_of_era / 146_096 - day_of_era / 36_524;
    let year = (day_of_era - leaps) / 365;
    let day_of_year = day_of_era - (365 * year + year / 4 - year / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = era * 400 + year + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}")
}

#[cfg(test)]
#[allow(unused)] // See peers.rs.
mod tests {
    use super::*;

    #[test]
    fn days_are_those_of_the_calendar() {
        for (unix_time, date) in [
            (0, "1970-01-01"),
            (86_399, "1970-01-01"),
            (951_782_400, "2000-02-29"),
            (951_868_800, "2000-03-01"),
            (1_709_164_800, "2024-02-29"),
            (4_107_542_400, "2100-03-01"),
        ] {
            assert_eq!(date_of(unix_time), date);
        }
    }

    #[test]
    fn the_command_can_be_typed_again() {
        let line = |text: &str| command_line("peers", text.split_whitespace().map(str::to_owned));
        assert_eq!(line("--bench"), "cargo bench --bench peers");
        assert_eq!(line("--rounds 5 --bench"), "cargo bench --bench peers -- --rounds 5");
    }

    #[test]
    fn this_machine_has_a_processor_and_memory() {
        let machine = Machine::of_this_run("peers");
        assert!(machine.cpus > 0 && machine.memory_mib > 0, "{machine:?}");
        assert!(!machine.kernel.is_empty() && machine.date.len() == 10, "{machine:?}");
    }
}
