//! The images that are served: full of data, in memory and on a disk.
//! One file for all servers, which are never run at the same time; removed at the end.

use super::Trouble;
use super::grid::Temperature;
use super::options::Options;
use memmap2::Mmap;
use nix::errno::Errno;
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::libc;
use nix::sys::statfs::{TMPFS_MAGIC, statfs};
use nix::unistd::{SysconfVar, sysconf};
use std::cell::OnceCell;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// What the images are called. A run that was interrupted leaves one; the next takes its place.
const NAME: &str = "flexnbd-bench.img";
/// How much is written at once, in bytes.
const PORTION: usize = 1 << 20;
/// A cold image of which more than this part is in memory is not cold.
const WARM_PART_MAX: f64 = 0.01;

/// Makes the images when they are first needed.
#[derive(Debug)]
pub(super) struct Images {
    size: u64,
    cached: Image,
    cold: Image,
    never_cold: Option<&'static str>,
}

#[derive(Debug)]
struct Image {
    path: PathBuf,
    made: OnceCell<()>,
}

impl Images {
    /// Looks at the directories, and makes nothing yet.
    ///
    /// # Errors
    /// When one of them does not exist.
    pub(super) fn new(options: &Options) -> Result<Self, Trouble> {
        Ok(Self {
            size: options.size << 20,
            cached: Image::in_directory(&options.cached_dir, "cached")?,
            cold: Image::in_directory(&options.dir, "cold")?,
            never_cold: why_never_cold(&options.dir),
        })
    }

    /// Size of the images in bytes.
    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// Why there can be no cold cells here, if there is a reason.
    pub(super) fn why_never_cold(&self) -> Option<&'static str> {
        self.never_cold
    }

    /// The image for this temperature.
    ///
    /// # Errors
    /// When it could not be made.
    pub(super) fn image(&self, temperature: Temperature) -> Result<PathBuf, Trouble> {
        let image = match temperature {
            Temperature::Cached => &self.cached,
            Temperature::Cold => &self.cold,
        };
        if image.made.get().is_none() {
            make(&image.path, self.size)
                .map_err(|error| format!("cannot make {}: {error}", image.path.display()))?;
            let _ = image.made.set(());
        }
        Ok(image.path.clone())
    }

    /// Writes the image for cold cells out and makes the kernel forget what it has of it: the
    /// same for every server, and nothing else on this machine is touched.
    ///
    /// # Errors
    /// When the kernel keeps it nevertheless.
    pub(super) fn cool(&self) -> Result<(), Trouble> {
        let cannot = |error| format!("cannot cool {}: {error}", self.cold.path.display());
        let warm = cool(&self.cold.path).map_err(cannot)?;
        if warm > WARM_PART_MAX {
            return Err(format!("{:.0} % of the image stay in memory", warm * 100.0).into());
        }
        Ok(())
    }
}

impl Image {
    fn in_directory(directory: &Path, kind: &str) -> Result<Self, Trouble> {
        if !directory.is_dir() {
            let directory = directory.display();
            return Err(format!("{directory}, for the {kind} image, is no directory").into());
        }
        Ok(Self { path: directory.join(format!("{kind}-{NAME}")), made: OnceCell::new() })
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        if self.made.get().is_some() {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn why_never_cold(directory: &Path) -> Option<&'static str> {
    match statfs(directory) {
        Ok(about) if about.filesystem_type() == TMPFS_MAGIC => {
            Some("what lies in a tmpfs is never cold; name another directory with --dir")
        }
        _ => None,
    }
}

/// Empties the page cache of one file; returns which part of it is still there.
fn cool(path: &Path) -> io::Result<f64> {
    let file = File::open(path)?;
    // What is dirty would stay.
    file.sync_all()?;
    posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
    warm_part(&file)
}

/// Which part of a file is in memory, as mincore(2) tells.
fn warm_part(file: &File) -> io::Result<f64> {
    // SAFETY: the bytes behind the mapping are never looked at, so that it does not matter who
    // changes them.
    let map = unsafe { Mmap::map(file)? };
    let page = sysconf(SysconfVar::PAGE_SIZE)?.unwrap_or(4096) as usize;
    let mut pages = vec![0_u8; map.len().div_ceil(page)];
    // SAFETY: the range is that of the mapping, which begins at a page; `pages` has room for a
    // byte of each page that it touches.
    let outcome =
        unsafe { libc::mincore(map.as_ptr().cast_mut().cast(), map.len(), pages.as_mut_ptr()) };
    Errno::result(outcome)?;
    let warm = pages.iter().filter(|page| **page & 1 == 1).count();
    Ok(warm as f64 / pages.len() as f64)
}

/// Writes `size` bytes of data without zeros or repetitions to speak of.
fn make(path: &Path, size: u64) -> io::Result<()> {
    let mut file = File::create(path)?;
    let mut portion: Vec<u8> = (0..PORTION).map(|i| (i % 253) as u8 + 1).collect();
    for number in 0..size.div_ceil(PORTION as u64) {
        for block in portion.chunks_mut(512) {
            block[..8].copy_from_slice(&(number + 1).to_be_bytes());
        }
        file.write_all(&portion)?;
    }
    file.sync_data()
}

#[cfg(test)]
#[allow(unused)] // See peers.rs.
mod tests {
    use super::*;

    #[test]
    fn a_file_just_written_is_warm_and_then_cold() {
        let directory = Path::new(env!("CARGO_TARGET_TMPDIR"));
        if let Some(why) = why_never_cold(directory) {
            println!("skipped: {why}");
            return;
        }
        let file = tempfile::NamedTempFile::new_in(directory).unwrap();
        make(file.path(), 4 << 20).unwrap();
        assert_eq!(warm_part(file.as_file()).unwrap(), 1.0);
        assert_eq!(cool(file.path()).unwrap(), 0.0);
    }
}
