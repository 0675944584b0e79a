//! The images that the servers serve: full of data, one in memory and one on a disk.

use super::Options;
use super::cells::Temperature;
use crate::machine::{PORTION, write_data};
use crate::report::Error;
use memmap2::Mmap;
use nix::errno::Errno;
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::libc;
use nix::sys::statfs::{TMPFS_MAGIC, statfs};
use nix::unistd::{SysconfVar, sysconf};
use std::cell::OnceCell;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use tempfile::TempPath;

/// Every run uses this name, so that a run replaces the image of an interrupted one.
const NAME: &str = "flexnbd-bench.img";
/// The largest part of a cold image that the page cache may hold.
const RESIDENT_PART_MAX: f64 = 0.01;

/// Makes the images when they are first needed; removes them when dropped.
#[derive(Debug)]
pub(crate) struct Images {
    pub(crate) size: u64,
    cached: (PathBuf, OnceCell<TempPath>),
    cold: (PathBuf, OnceCell<TempPath>),
}

impl Images {
    pub(crate) fn new(options: &Options) -> Result<Self, Error> {
        let image = |directory: &Path, kind| {
            if !directory.is_dir() {
                return Err(format!("no directory for the {kind} image: {}", directory.display()));
            }
            Ok((directory.join(format!("{kind}-{NAME}")), OnceCell::new()))
        };
        let (cached, cold) = (image(&options.cached_dir, "cached")?, image(&options.dir, "cold")?);
        Ok(Self { size: options.size << 20, cached, cold })
    }

    pub(crate) fn path(&self, temperature: Temperature) -> Result<&Path, Error> {
        let (path, file) =
            if temperature == Temperature::Cached { &self.cached } else { &self.cold };
        if file.get().is_none() {
            let portions = (0..self.size).step_by(PORTION as usize);
            write_data(&File::create(path)?, portions, self.size)
                .map_err(|error| format!("cannot make {}: {error}", path.display()))?;
            let _ = file.set(TempPath::try_from_path(path)?);
        }
        Ok(path)
    }

    /// Evicts the cold image from the page cache. Fails if the kernel keeps it.
    pub(crate) fn evict(&self) -> Result<(), Error> {
        let file = File::open(&self.cold.0)?;
        // The kernel does not evict dirty pages.
        file.sync_all()?;
        posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
        let part = resident_part(&file)?;
        if part > RESIDENT_PART_MAX {
            return Err(format!("{:.0} % of the cold image stay in memory", part * 100.0).into());
        }
        Ok(())
    }
}

/// Why a directory cannot hold the cold image, if so.
pub(crate) fn never_cold(directory: &Path) -> Option<&'static str> {
    let is_tmpfs = statfs(directory).is_ok_and(|stat| stat.filesystem_type() == TMPFS_MAGIC);
    is_tmpfs.then_some("a file in a tmpfs is never cold; name another directory with --dir")
}

/// The part of a file that the page cache holds, from mincore(2).
fn resident_part(file: &File) -> io::Result<f64> {
    // SAFETY: nothing reads the mapped bytes, so other processes may change them.
    let map = unsafe { Mmap::map(file)? };
    let page = sysconf(SysconfVar::PAGE_SIZE)?.unwrap_or(4096) as usize;
    let mut pages = vec![0_u8; map.len().div_ceil(page)];
    // SAFETY: the range is that of the mapping, which begins at a page; `pages` has a byte for
    // each page of it.
    let outcome =
        unsafe { libc::mincore(map.as_ptr().cast_mut().cast(), map.len(), pages.as_mut_ptr()) };
    Errno::result(outcome)?;
    let resident = pages.iter().filter(|page| **page & 1 == 1).count();
    Ok(resident as f64 / pages.len() as f64)
}
