//! The images that are moved, and the files they are moved into; removed when dropped.
//! Each migration gets new ones, because a disk that has moved away is not served again.

use super::Trouble;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// How much is written and compared at once, in bytes; also the length of a run of data.
pub(super) const PORTION: u64 = 1 << 20;
/// Bytes in one of the blocks that the file system counts (stat(2)).
const COUNTED: u64 = 512;

/// What is in an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Data everywhere.
    Dense,
    /// 1 MiB of data in every 4, holes between.
    Sparse25,
    /// 1 MiB of data in every 100, holes between.
    Sparse1,
    /// Zeros everywhere, which take up room.
    Zeros,
}

impl Kind {
    pub(super) const ALL: [Self; 4] = [Self::Dense, Self::Sparse25, Self::Sparse1, Self::Zeros];

    /// What it is called on the command line.
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Dense => "dense",
            Self::Sparse25 => "sparse25",
            Self::Sparse1 => "sparse1",
            Self::Zeros => "zeros",
        }
    }

    /// Every how many portions there is one that is written.
    fn step(self) -> usize {
        match self {
            Self::Dense | Self::Zeros => 1,
            Self::Sparse25 => 4,
            Self::Sparse1 => 100,
        }
    }

    /// Bytes in an image of `size` bytes that are not in holes, and are not zero.
    pub(super) fn data(self, size: u64) -> u64 {
        match self {
            Self::Zeros => 0,
            _ => self.written(size).map(|at| PORTION.min(size - at)).sum(),
        }
    }

    /// Runs of data in an image of `size` bytes.
    pub(super) fn runs(self, size: u64) -> u64 {
        match self {
            Self::Zeros => 0,
            Self::Dense => 1,
            _ => self.written(size).count() as u64,
        }
    }

    /// Where the portions begin that are written.
    fn written(self, size: u64) -> impl Iterator<Item = u64> {
        (0..size).step_by(PORTION as usize).step_by(self.step())
    }
}

/// Where images are made.
#[derive(Debug)]
pub(super) struct Disks {
    directory: PathBuf,
}

/// An image, and a file of the same size without anything in it.
#[derive(Debug)]
pub(super) struct Pair {
    pub(super) source: PathBuf,
    pub(super) destination: PathBuf,
    _folder: TempDir,
}

impl Disks {
    /// Makes nothing yet.
    ///
    /// # Errors
    /// When there is no such directory.
    pub(super) fn new(directory: &Path) -> Result<Self, Trouble> {
        if !directory.is_dir() {
            return Err(format!("{}, for the images, is no directory", directory.display()).into());
        }
        Ok(Self { directory: directory.to_owned() })
    }

    /// A pair of this kind and size. The image is on the disk already, so that writing it out
    /// does not fall into what is measured.
    ///
    /// # Errors
    /// When the files cannot be written.
    pub(super) fn make(&self, kind: Kind, size: u64) -> Result<Pair, Trouble> {
        let cannot = |error| format!("cannot make images in {}: {error}", self.directory.display());
        let make = || {
            let folder = TempDir::with_prefix_in("flexnbd-bench-", &self.directory)?;
            let [source, destination] = ["source", "destination"].map(|n| folder.path().join(n));
            fill(&source, kind, size)?;
            File::create(&destination)?.set_len(size)?;
            Ok(Pair { source, destination, _folder: folder })
        };
        make().map_err(|error: io::Error| cannot(error).into())
    }
}

fn fill(path: &Path, kind: Kind, size: u64) -> io::Result<()> {
    let mut file = File::create(path)?;
    file.set_len(size)?;
    let mut portion: Vec<u8> = match kind {
        Kind::Zeros => vec![0; PORTION as usize],
        _ => (0..PORTION).map(|at| (at % 253) as u8 + 1).collect(),
    };
    for at in kind.written(size) {
        if kind != Kind::Zeros {
            portion.chunks_mut(512).for_each(|c| c[..8].copy_from_slice(&(at + 1).to_be_bytes()));
        }
        file.seek(SeekFrom::Start(at))?;
        file.write_all(&portion[..PORTION.min(size - at) as usize])?;
    }
    file.sync_all()
}

/// Bytes of the file that take up room.
///
/// # Errors
/// As `stat(2)`.
pub(super) fn allocated(path: &Path) -> io::Result<u64> {
    Ok(fs::metadata(path)?.blocks() * COUNTED)
}

/// Whether both files hold the same.
///
/// # Errors
/// When one of them cannot be read.
pub(super) fn same(one: &Path, other: &Path) -> io::Result<bool> {
    let (one, other) = (File::open(one)?, File::open(other)?);
    let (mut left, mut right) = (Vec::new(), Vec::new());
    loop {
        left.clear();
        right.clear();
        (&one).take(PORTION).read_to_end(&mut left)?;
        (&other).take(PORTION).read_to_end(&mut right)?;
        if left != right {
            return Ok(false);
        }
        if left.is_empty() {
            return Ok(true);
        }
    }
}

#[cfg(test)]
#[allow(unused)] // See migrate.rs.
mod tests {
    use super::*;

    const SIZE: u64 = (8 << 20) + 512;

    #[test]
    fn each_kind_takes_up_the_room_of_its_data() {
        let directory = tempfile::tempdir().unwrap();
        let disks = Disks::new(directory.path()).unwrap();
        for kind in Kind::ALL {
            let pair = disks.make(kind, SIZE).unwrap();
            assert_eq!(fs::metadata(&pair.source).unwrap().len(), SIZE);
            assert_eq!(fs::metadata(&pair.destination).unwrap().len(), SIZE);
            let room = allocated(&pair.source).unwrap();
            let written = if kind == Kind::Zeros { SIZE } else { kind.data(SIZE) };
            assert!((written..written + (64 << 10)).contains(&room), "{kind:?}: {room}");
            assert_eq!(allocated(&pair.destination).unwrap(), 0);
            let zero = same(&pair.source, &pair.destination).unwrap();
            assert_eq!(zero, kind == Kind::Zeros, "{kind:?}");
        }
        let left = fs::read_dir(directory.path()).unwrap().count();
        assert_eq!(left, 0, "images are left behind");
    }

    #[test]
    fn data_and_runs_are_counted() {
        let of = |kind: Kind| (kind.data(SIZE), kind.runs(SIZE));
        assert_eq!(of(Kind::Dense), (SIZE, 1));
        assert_eq!(of(Kind::Sparse25), ((2 << 20) + 512, 3));
        assert_eq!(of(Kind::Sparse1), (1 << 20, 1));
        assert_eq!(of(Kind::Zeros), (0, 0));
    }

    #[test]
    fn files_that_differ_in_their_last_byte_or_length_are_not_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str, last: &[u8]| {
            let path = folder.path().join(name);
            fs::write(&path, [&[7; 2 << 20], last].concat()).unwrap();
            path
        };
        let one = file("one", b"1");
        assert!(same(&one, &file("same", b"1")).unwrap());
        assert!(!same(&one, &file("other", b"2")).unwrap());
        assert!(!same(&one, &file("longer", b"11")).unwrap());
    }
}
