//! The command line of `peers`.

use super::cells::{Cell, Set};
use super::report::named_path;
use clap::Parser;
use std::path::PathBuf;
use std::time::Duration;

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
    /// How often to measure each server in each cell; the median counts
    #[arg(long, default_value = "3", value_parser = clap::value_parser!(u32).range(1..))]
    pub(super) rounds: u32,
    /// Duration of each round
    #[arg(long, default_value = "0.5", value_parser = seconds)]
    pub(super) seconds: Duration,
    /// Size of the image in MiB
    #[arg(long, default_value = "1024", value_parser = clap::value_parser!(u64).range(1..))]
    pub(super) size: u64,
    /// Where to put the image of cold cells: a directory on a real disk
    #[arg(long, value_name = "DIR", default_value = env!("CARGO_TARGET_TMPDIR"))]
    pub(super) dir: PathBuf,
    /// Where to put the image of cached cells
    #[arg(long, value_name = "DIR", default_value = "/dev/shm")]
    pub(super) cached_dir: PathBuf,
    /// The CPU of the servers
    #[arg(long, default_value = "0", value_name = "NUMBER")]
    pub(super) server_cpu: usize,
    /// The CPU of the client
    #[arg(long, default_value = "1", value_name = "NUMBER")]
    pub(super) client_cpu: usize,
    /// Write all figures to this file
    #[arg(long, value_name = "FILE")]
    pub(super) json: Option<PathBuf>,
    /// Draw the ratios of all cells into this file
    #[arg(long, value_name = "FILE")]
    pub(super) svg: Option<PathBuf>,
    /// Measure nothing; print (and draw with --svg) the figures of an earlier run's --json
    #[arg(long, value_name = "FILE", conflicts_with = "json")]
    pub(super) again: Option<PathBuf>,
    /// `cargo bench` adds this
    #[arg(long, hide = true)]
    pub(super) bench: bool,
}

impl Options {
    pub(super) fn cells(&self) -> Vec<Cell> {
        let mut cells = self.set.cells();
        cells.retain(|cell| self.includes(&cell.to_string()));
        cells
    }

    /// Whether to measure `memory` or `activation`. The small set has neither unless `--only`
    /// names it.
    pub(super) fn measures(&self, name: &str) -> bool {
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
