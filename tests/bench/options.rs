//! The command line of the benchmark.
//! Pure but for reading the arguments: it measures nothing.

use super::grid::{Cell, Set};
use clap::Parser;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

/// Longest run, in seconds.
const SECONDS_MAX: f64 = 3600.0;

/// Measures NBD servers side by side on this machine.
#[derive(Clone, Debug, Parser)]
#[command(name = "peers")]
pub(super) struct Options {
    /// Which cells to measure
    #[arg(long, value_enum, default_value = "default")]
    pub(super) set: Set,
    /// Only the cells whose name contains this; `memory` and `activation` are names, too
    #[arg(long, value_name = "TEXT")]
    pub(super) only: Option<String>,
    /// Print the names of the cells and measure nothing
    #[arg(long)]
    pub(super) list: bool,
    /// Which servers to measure; those that are not installed are left out
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "NAME,...",
        default_value = "flexnbd,nbdkit,qemu-nbd,nbd-server"
    )]
    pub(super) servers: Vec<String>,
    /// Another build of flexnbd to measure beside the one just built
    #[arg(long, value_parser = named_path, value_name = "NAME=PATH")]
    pub(super) also: Vec<(String, PathBuf)>,
    /// How often each server is measured in each cell; the median counts
    #[arg(long, default_value = "3", value_parser = clap::value_parser!(u32).range(1..))]
    pub(super) rounds: u32,
    /// How long each of these takes
    #[arg(long, default_value = "0.5", value_parser = seconds)]
    pub(super) seconds: Duration,
    /// Size of the image in MiB
    #[arg(long, default_value = "1024", value_parser = clap::value_parser!(u64).range(1..))]
    pub(super) size: u64,
    /// Where the image for cold cells goes: a directory on a real disk
    #[arg(long, value_name = "DIR", default_value = env!("CARGO_TARGET_TMPDIR"))]
    pub(super) dir: PathBuf,
    /// Where the image for cached cells goes
    #[arg(long, value_name = "DIR", default_value = "/dev/shm")]
    pub(super) cached_dir: PathBuf,
    /// The CPU that the servers run on
    #[arg(long, default_value = "0", value_name = "NUMBER")]
    pub(super) server_cpu: usize,
    /// The CPU that the client runs on
    #[arg(long, default_value = "1", value_name = "NUMBER")]
    pub(super) client_cpu: usize,
    /// Write all figures to this file
    #[arg(long, value_name = "FILE")]
    pub(super) json: Option<PathBuf>,
    /// Draw the ratios of all cells into this file
    #[arg(long, value_name = "FILE")]
    pub(super) svg: Option<PathBuf>,
    /// Measure nothing: print, and draw with --svg, what an earlier run wrote with --json
    #[arg(long, value_name = "FILE", conflicts_with = "json")]
    pub(super) again: Option<PathBuf>,
    /// What cargo adds to the arguments of every benchmark
    #[arg(long, hide = true)]
    pub(super) bench: bool,
}

impl Options {
    /// Reads the arguments.
    ///
    /// # Errors
    /// How to end: help was asked for, or the arguments were wrong and that has been said.
    pub(super) fn from_command_line() -> Result<Self, ExitCode> {
        Self::try_parse().map_err(|error| {
            let _ = error.print();
            if error.use_stderr() { ExitCode::from(2) } else { ExitCode::SUCCESS }
        })
    }

    /// The cells to measure.
    pub(super) fn cells(&self) -> Vec<Cell> {
        let mut cells = self.set.cells();
        cells.retain(|cell| self.wants(&cell.to_string()));
        cells
    }

    /// Whether to look at the memory of idle servers.
    pub(super) fn measures_memory(&self) -> bool {
        self.wants_besides("memory")
    }

    /// Whether to look at servers that are started by their first client.
    pub(super) fn measures_activation(&self) -> bool {
        self.wants_besides("activation")
    }

    /// The small set is cells only, unless something else is asked for by its name.
    fn wants_besides(&self, name: &str) -> bool {
        self.wants(name) && (self.only.is_some() || self.set != Set::Small)
    }

    fn wants(&self, name: &str) -> bool {
        self.only.as_ref().is_none_or(|only| name.contains(only.as_str()))
    }
}

fn named_path(text: &str) -> Result<(String, PathBuf), String> {
    match text.split_once('=') {
        Some((name, path)) if !name.is_empty() && !path.is_empty() => {
            Ok((name.to_owned(), PathBuf::from(path)))
        }
        _ => Err("not of the form NAME=PATH".to_owned()),
    }
}

fn seconds(text: &str) -> Result<Duration, String> {
    match text.parse::<f64>() {
        Ok(seconds) if seconds > 0.0 && seconds <= SECONDS_MAX => {
            Ok(Duration::from_secs_f64(seconds))
        }
        _ => Err(format!("not a number of seconds above 0 and up to {SECONDS_MAX}")),
    }
}

#[cfg(test)]
#[allow(unused)] // See peers.rs.
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Options, clap::Error> {
        Options::try_parse_from(std::iter::once("peers").chain(line.split_whitespace()))
    }

    #[test]
    fn what_cargo_adds_is_accepted() {
        assert_eq!(parse("--bench").unwrap().cells(), Set::Default.cells());
    }

    #[test]
    fn only_the_cells_asked_for_are_measured() {
        let options = parse("--only 1m-read").unwrap();
        assert!(!options.cells().is_empty() && !options.measures_memory());
        assert!(options.cells().iter().all(|cell| cell.to_string().contains("1m-read")));
        let memory = parse("--set small --only memory").unwrap();
        assert!(memory.cells().is_empty() && memory.measures_memory());
        assert!(!memory.measures_activation());
    }

    #[test]
    fn the_small_set_is_cells_only_and_the_others_are_not() {
        let wants = |line| {
            let options = parse(line).unwrap();
            (options.measures_memory(), options.measures_activation())
        };
        assert_eq!(wants("--set small"), (false, false));
        assert_eq!((wants(""), wants("--set full")), ((true, true), (true, true)));
    }

    #[test]
    fn a_run_takes_more_than_no_time_and_at_most_an_hour() {
        assert!(seconds("3600").is_ok() && seconds("0.01").is_ok());
        for wrong in ["3600.1", "0", "-1", "NaN", "x"] {
            assert!(seconds(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn another_build_has_a_name_and_a_path() {
        assert_eq!(named_path("old=/bin/x"), Ok(("old".to_owned(), PathBuf::from("/bin/x"))));
        for wrong in ["old", "=x", "old="] {
            assert!(named_path(wrong).is_err(), "{wrong}");
        }
    }
}
