//! The command line of the migration benchmark.
//! Pure but for reading the arguments: it measures nothing.

use super::disks::Kind;
use clap::Parser;
use flexnbd::cli::size::parse_size;
use std::path::PathBuf;
use std::process::ExitCode;

/// Smallest image that shows anything: with less, the sparse kinds are hardly sparse.
const SIZE_MIN: u64 = 4 << 20;

/// Measures migrations between two processes on this machine.
#[derive(Clone, Debug, Parser)]
#[command(name = "migrate")]
pub(super) struct Choices {
    /// Which systems to measure; those that are not installed are left out
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "NAME,...",
        default_value = "flexnbd,nbdcopy,nbdcopy-flush,qemu"
    )]
    pub(super) systems: Vec<String>,
    /// Another build of flexnbd to measure beside the one just built
    #[arg(long, value_parser = named_path, value_name = "NAME=PATH")]
    pub(super) also: Vec<(String, PathBuf)>,
    /// Which images to move
    #[arg(long, value_delimiter = ',', value_parser = kind, value_name = "KIND,...",
        default_value = "dense,sparse25,sparse1,zeros")]
    pub(super) images: Vec<Kind>,
    /// Look at what clients feel only
    #[arg(long)]
    pub(super) pauses_only: bool,
    /// Size of the images (K, M, G: powers of 1024)
    #[arg(long, default_value = "1G", value_parser = size)]
    pub(super) size: u64,
    /// Where the images go
    #[arg(long, value_name = "DIR", default_value = "/dev/shm")]
    pub(super) dir: PathBuf,
    /// How often each system moves each image; the median counts
    #[arg(long, default_value = "3", value_parser = clap::value_parser!(u32).range(1..))]
    pub(super) rounds: u32,
    /// How many migrations to look at under each load of a client; 0 for none
    #[arg(long, default_value = "20", value_name = "NUMBER")]
    pub(super) migrations: u32,
    /// Size of the image that these move
    #[arg(long, default_value = "256M", value_parser = size)]
    pub(super) pause_size: u64,
    /// How many writes of 4 KiB a client begins each second meanwhile
    #[arg(long, default_value = "5000", value_name = "NUMBER",
        value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub(super) writes_per_sec: u32,
    /// How many bytes a second the source may send in those migrations that are held back (K, M, G)
    #[arg(long, default_value = "100M", value_name = "RATE", value_parser = rate)]
    pub(super) max_speed: u64,
    /// Write all figures to this file
    #[arg(long, value_name = "FILE")]
    pub(super) json: Option<PathBuf>,
    /// What cargo adds to the arguments of every benchmark
    #[arg(long, hide = true)]
    pub(super) bench: bool,
}

impl Choices {
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
}

fn named_path(text: &str) -> Result<(String, PathBuf), String> {
    match text.split_once('=') {
        Some((name, path)) if !name.is_empty() && !path.is_empty() => {
            Ok((name.to_owned(), PathBuf::from(path)))
        }
        _ => Err("not of the form NAME=PATH".to_owned()),
    }
}

fn size(text: &str) -> Result<u64, String> {
    let size = parse_size(text).map_err(|error| error.to_string())?;
    if size < SIZE_MIN { Err(format!("less than {SIZE_MIN} bytes")) } else { Ok(size) }
}

fn rate(text: &str) -> Result<u64, String> {
    match parse_size(text).map_err(|error| error.to_string())? {
        0 => Err("that would be no limit".to_owned()),
        rate => Ok(rate),
    }
}

fn kind(text: &str) -> Result<Kind, String> {
    let known = Kind::ALL.into_iter().find(|kind| kind.word() == text);
    known.ok_or_else(|| format!("not one of {}", Kind::ALL.map(Kind::word).join(", ")))
}

#[cfg(test)]
#[allow(unused)] // See migrate.rs.
mod tests {
    use super::*;

    #[test]
    fn what_cargo_adds_is_accepted_and_all_images_are_moved() {
        let choices = Choices::try_parse_from(["migrate", "--bench"]).unwrap();
        assert_eq!((choices.images.as_slice(), choices.size), (Kind::ALL.as_slice(), 1 << 30));
        assert!(Choices::try_parse_from(["migrate", "--images", "square"]).is_err());
    }

    #[test]
    fn an_image_is_large_enough_to_be_sparse() {
        assert_eq!(size("4M"), Ok(SIZE_MIN));
        assert!(size("4194303").is_err() && size("x").is_err());
    }
}
