//! Temporary directories, images in them, and their contents.

use std::fs::File;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// 2^10 bytes.
pub const KIB: u64 = 1 << 10;
/// 2^20 bytes.
pub const MIB: u64 = 1 << 20;
/// 2^30 bytes.
pub const GIB: u64 = 1 << 30;

/// Directories on two kinds of file system: that of large temporary files (ext4 on most machines),
/// and tmpfs.
pub const FILE_SYSTEMS: [&str; 2] = ["/var/tmp", "/dev/shm"];

/// A temporary directory, deleted when dropped.
pub fn temp_dir() -> TempDir {
    temp_dir_in(std::env::temp_dir())
}

/// A temporary directory below `parent`, on its file system.
pub fn temp_dir_in(parent: impl AsRef<Path>) -> TempDir {
    tempfile::Builder::new().prefix("flexnbd-test-").tempdir_in(parent).unwrap()
}

/// Creates a sparse file of `size` bytes, which reads as zero; replaces an existing file's content.
pub fn sparse_file(path: &Path, size: u64) {
    File::create(path).unwrap().set_len(size).unwrap();
}

/// Creates a sparse file of this name in `dir` and returns its path.
pub fn sparse_image(dir: &Path, name: &str, size: u64) -> PathBuf {
    let path = dir.join(name);
    sparse_file(&path, size);
    path
}

/// Writes `data` at `offset` of an existing file, directly.
pub fn write_at(path: &Path, offset: u64, data: &[u8]) {
    let file = File::options().write(true).open(path).unwrap();
    file.write_all_at(data, offset).unwrap();
}

/// Reads `length` bytes at `offset` of a file, directly.
pub fn read_at(path: &Path, offset: u64, length: usize) -> Vec<u8> {
    let mut data = vec![0; length];
    File::open(path).unwrap().read_exact_at(&mut data, offset).unwrap();
    data
}

/// Bytes allocated to the file by its file system, after write-back of its dirty pages.
pub fn allocated(path: &Path) -> u64 {
    let file = File::open(path).unwrap();
    file.sync_all().unwrap();
    file.metadata().unwrap().blocks() * 512
}

/// Random bytes, determined by the seed. In practice they hold no block of zeros.
pub fn noise(length: usize, seed: u64) -> Vec<u8> {
    let mut data = vec![0; length];
    fastrand::Rng::with_seed(seed).fill(&mut data);
    data
}
