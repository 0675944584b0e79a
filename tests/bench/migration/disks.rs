//! The images to migrate, and the files that receive them. Each migration needs new ones, because
//! flexnbd does not serve a disk again that has departed.

use crate::machine::{PORTION, write_data};
use crate::report::Error;
use serde::Serialize;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::TempDir;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Kind {
    Dense,
    /// 1 MiB of data in every 4, holes between.
    #[value(name = "sparse25")]
    Sparse25,
    /// 1 MiB of data in every 100, holes between.
    #[value(name = "sparse1")]
    Sparse1,
    /// Allocated zeros.
    Zeros,
}

impl Kind {
    /// As in JSON and on the command line.
    pub(crate) fn word(self) -> String {
        format!("{self:?}").to_lowercase()
    }

    /// Offsets of the data.
    fn data_offsets(self, size: u64) -> impl Iterator<Item = u64> {
        let (end, step) = match self {
            Self::Dense => (size, 1),
            Self::Sparse25 => (size, 4),
            Self::Sparse1 => (size, 100),
            Self::Zeros => (0, 1),
        };
        (0..end).step_by(PORTION as usize).step_by(step)
    }

    /// Bytes that are neither in holes nor zero.
    pub(crate) fn data(self, size: u64) -> u64 {
        self.data_offsets(size).map(|offset| PORTION.min(size - offset)).sum()
    }

    /// Contiguous ranges of data.
    pub(crate) fn runs(self, size: u64) -> u64 {
        if self == Self::Dense { 1 } else { self.data_offsets(size).count() as u64 }
    }
}

/// An image, and an empty file of the same size; removed when dropped.
#[derive(Debug)]
pub(crate) struct Pair {
    pub(crate) source: PathBuf,
    pub(crate) destination: PathBuf,
    _folder: TempDir,
}

impl Pair {
    /// Makes both and syncs them, so that write-back does not disturb the measurement.
    pub(crate) fn new(directory: &Path, kind: Kind, size: u64) -> Result<Self, Error> {
        let folder = TempDir::with_prefix_in("flexnbd-bench-", directory)?;
        let [source, destination] = ["source", "destination"].map(|name| folder.path().join(name));
        let file = File::create(&source)?;
        file.set_len(size)?;
        if kind == Kind::Zeros {
            io::copy(&mut io::repeat(0).take(size), &mut &file)?;
        }
        write_data(&file, kind.data_offsets(size), size)?;
        File::create(&destination)?.set_len(size)?;
        Ok(Self { source, destination, _folder: folder })
    }

    pub(crate) fn has_equal_contents(&self) -> Result<bool, Error> {
        let status =
            Command::new("cmp").arg("-s").args([&self.source, &self.destination]).status()?;
        match status.code() {
            Some(0) => Ok(true),
            Some(1) => Ok(false),
            _ => Err(format!("cmp {status}").into()),
        }
    }
}

/// Bytes that a file occupies in its file system.
pub(crate) fn allocated(path: &Path) -> io::Result<u64> {
    // stat(2) counts blocks of 512 bytes.
    Ok(fs::metadata(path)?.blocks() * 512)
}
