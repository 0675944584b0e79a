//! The images that are served: full of data, in memory and on a disk.
//! One file for all servers, which are never run at the same time; removed at the end.

use super::Trouble;
use super::grid::Temperature;
use super::options::Options;
use nix::sys::statfs::{TMPFS_MAGIC, statfs};
use nix::unistd::{Uid, sync};
use std::cell::OnceCell;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

/// What the images are called. A run that was interrupted leaves one; the next takes its place.
const NAME: &str = "flexnbd-bench.img";
/// How much is written at once, in bytes.
const PORTION: usize = 1 << 20;
/// Where root tells the kernel to forget what it has cached (proc(5)).
const DROP_CACHES: &str = "/proc/sys/vm/drop_caches";

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

    /// Makes the kernel forget the contents of all files.
    ///
    /// # Errors
    /// When it does not let us.
    pub(super) fn cool(&self) -> Result<(), Trouble> {
        sync();
        fs::write(DROP_CACHES, "3").map_err(|error| format!("{DROP_CACHES}: {error}").into())
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
    if !Uid::effective().is_root() {
        return Some("only root can empty the page cache");
    }
    match statfs(directory) {
        Ok(about) if about.filesystem_type() == TMPFS_MAGIC => {
            Some("what lies in a tmpfs is never cold; name another directory with --dir")
        }
        _ => None,
    }
}

/// Writes `size` bytes of data without zeros or repetitions to speak of.
fn make(path: &Path, size: u64) -> std::io::Result<()> {
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
