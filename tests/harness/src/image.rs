//! Images with data and holes, in which every 16 bytes of data name their block and its version.
//! Accesses files directly, never through a server.

use crate::allocated;
use nix::unistd::{Whence, lseek};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

/// The size of one write, in bytes.
pub const BLOCK: u64 = 4096;
/// In each `PERIOD` of blocks the first `DATA` are data, and the others a hole.
const PERIOD: u64 = 64;
const DATA: u64 = 16;
/// Length of one comparison in bytes.
const COMPARED_LENGTH: u64 = 1 << 20;

/// The sixteen bytes that name a block and its version. Never all zero.
pub fn unit(block: u64, version: u64) -> [u8; 16] {
    let mut unit = [0; 16];
    unit[..8].copy_from_slice(&(block + 1).to_le_bytes());
    unit[8..].copy_from_slice(&version.to_le_bytes());
    unit
}

/// The content of a block: one unit, repeated.
pub fn stamped(block: u64, version: u64) -> Vec<u8> {
    unit(block, version).repeat(BLOCK as usize / 16)
}

/// Whether [`stamped_image`] writes data to this block.
pub(crate) fn is_data_initially(block: u64) -> bool {
    block % PERIOD < DATA
}

/// Creates an image of `size` bytes. A quarter of it is data, in extents of 64 KiB.
pub fn stamped_image(path: &Path, size: u64) {
    let file = File::create(path).unwrap();
    file.set_len(size).unwrap();
    for row in (0..size / BLOCK).step_by(PERIOD as usize) {
        let data: Vec<u8> = (row..row + DATA).flat_map(|block| stamped(block, 0)).collect();
        file.write_all_at(&data, row * BLOCK).unwrap();
    }
    file.sync_all().unwrap();
}

/// Creates an image of `size` bytes for a destination, with extents of old data.
pub fn used_image(path: &Path, size: u64) {
    let file = File::create(path).unwrap();
    file.set_len(size).unwrap();
    for offset in (0..size).step_by(5 << 18) {
        let length = (3 << 16).min(size - offset);
        file.write_all_at(&vec![0xdb; length as usize], offset).unwrap();
    }
    file.sync_all().unwrap();
}

/// Fails unless both files have the same number of bytes allocated, within 1 %.
#[track_caller]
pub fn assert_as_sparse(source: &Path, destination: &Path) {
    let (source, destination) = (allocated(source), allocated(destination));
    let is_close = source.abs_diff(destination) * 100 <= source.max(1 << 20);
    assert!(is_close, "allocated: {source} at the source, {destination} at the destination");
}

/// Fails unless both files hold the same bytes. Reads only extents that are data in one of them.
#[track_caller]
pub fn assert_same(source: &Path, destination: &Path) {
    let (source, destination) = (File::open(source).unwrap(), File::open(destination).unwrap());
    let size = source.metadata().unwrap().len();
    assert_eq!(size, destination.metadata().unwrap().len(), "sizes");
    for extent in [&source, &destination].into_iter().flat_map(|file| data_extents(file, size)) {
        compare(&source, &destination, extent);
    }
}

#[track_caller]
fn compare(source: &File, destination: &File, extent: Range<u64>) {
    let mut at = extent.start;
    let (mut a, mut b) = (vec![0; COMPARED_LENGTH as usize], vec![0; COMPARED_LENGTH as usize]);
    while at < extent.end {
        let length = COMPARED_LENGTH.min(extent.end - at) as usize;
        source.read_exact_at(&mut a[..length], at).unwrap();
        destination.read_exact_at(&mut b[..length], at).unwrap();
        if a[..length] != b[..length] {
            let first = (0..length).find(|&i| a[i] != b[i]).unwrap();
            let from = first & !15;
            let (a, b) = (&a[from..][..16], &b[from..][..16]);
            panic!(
                "byte {}: {a:02x?} at the source, {b:02x?} at the destination",
                at + first as u64
            );
        }
        at += length as u64;
    }
}

/// The extents of the file that are data (SEEK_DATA, SEEK_HOLE).
fn data_extents(file: &File, size: u64) -> Vec<Range<u64>> {
    let mut extents = Vec::new();
    let mut at = 0;
    while at < size {
        let Some(start) = seek(file, at, Whence::SeekData) else { break };
        let end = seek(file, start, Whence::SeekHole).unwrap_or(size).min(size);
        extents.push(start..end);
        at = end;
    }
    extents
}

fn seek(file: &File, from: u64, whence: Whence) -> Option<u64> {
    match lseek(file, from.cast_signed(), whence) {
        Ok(at) => Some(at.cast_unsigned()),
        Err(nix::Error::ENXIO) => None,
        Err(error) => panic!("lseek: {}", io::Error::from(error)),
    }
}
