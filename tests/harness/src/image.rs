//! Images to migrate: partly data, partly holes, in which every 16 bytes name their block and version.
//! Reads and writes the files, never through a server.

use crate::allocated;
use nix::unistd::{Whence, lseek};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

/// The size of one write, in bytes.
pub const BLOCK: u64 = 4096;
/// Of every `PERIOD` blocks the first `DATA` are data, the others a hole.
const PERIOD: u64 = 64;
const DATA: u64 = 16;
/// How much of a file is compared at a time, in bytes.
const PORTION: u64 = 1 << 20;

/// Sixteen bytes that name a block and a version of it. Never zero.
pub fn unit(block: u64, version: u64) -> [u8; 16] {
    let mut unit = [0; 16];
    unit[..8].copy_from_slice(&(block + 1).to_le_bytes());
    unit[8..].copy_from_slice(&version.to_le_bytes());
    unit
}

/// A whole block of such units.
pub fn stamped(block: u64, version: u64) -> Vec<u8> {
    unit(block, version).repeat(BLOCK as usize / 16)
}

/// Whether a block is data in an image of [`stamped_image`].
pub(crate) fn begins_as_data(block: u64) -> bool {
    block % PERIOD < DATA
}

/// Makes an image of `size` bytes, a quarter of which is data, in extents of 64 KiB.
pub fn stamped_image(path: &Path, size: u64) {
    let file = File::create(path).unwrap();
    file.set_len(size).unwrap();
    for row in (0..size / BLOCK).step_by(PERIOD as usize) {
        let data: Vec<u8> = (row..row + DATA).flat_map(|block| stamped(block, 0)).collect();
        file.write_all_at(&data, row * BLOCK).unwrap();
    }
    file.sync_all().unwrap();
}

/// Makes an image of `size` bytes for a destination, with old data in many places.
pub fn used_image(path: &Path, size: u64) {
    let file = File::create(path).unwrap();
    file.set_len(size).unwrap();
    for offset in (0..size).step_by(5 << 18) {
        let length = (3 << 16).min(size - offset);
        file.write_all_at(&vec![0xdb; length as usize], offset).unwrap();
    }
    file.sync_all().unwrap();
}

/// Fails unless both files occupy the same space on disk, to one in a hundred.
#[track_caller]
pub fn assert_as_sparse(source: &Path, destination: &Path) {
    let (ours, theirs) = (allocated(source), allocated(destination));
    let most = ours.abs_diff(theirs) * 100;
    assert!(most <= ours.max(1 << 20), "allocated: {ours} at the source, {theirs} here");
}

/// Fails unless both files hold the same bytes. Reads only extents that are data in one of them.
#[track_caller]
pub fn assert_same(source: &Path, destination: &Path) {
    let (ours, theirs) = (File::open(source).unwrap(), File::open(destination).unwrap());
    let size = ours.metadata().unwrap().len();
    assert_eq!(size, theirs.metadata().unwrap().len(), "sizes");
    for extent in data_of(&ours, size).into_iter().chain(data_of(&theirs, size)) {
        compare(&ours, &theirs, extent);
    }
}

#[track_caller]
fn compare(ours: &File, theirs: &File, extent: Range<u64>) {
    let mut at = extent.start;
    let (mut a, mut b) = (vec![0; PORTION as usize], vec![0; PORTION as usize]);
    while at < extent.end {
        let length = PORTION.min(extent.end - at) as usize;
        ours.read_exact_at(&mut a[..length], at).unwrap();
        theirs.read_exact_at(&mut b[..length], at).unwrap();
        if a[..length] != b[..length] {
            let first = (0..length).find(|&i| a[i] != b[i]).unwrap();
            let from = first & !15;
            let (a, b) = (&a[from..][..16], &b[from..][..16]);
            panic!("byte {}: {a:02x?} at the source, {b:02x?} here", at + first as u64);
        }
        at += length as u64;
    }
}

/// The extents of the file that are not holes.
fn data_of(file: &File, size: u64) -> Vec<Range<u64>> {
    let mut spans = Vec::new();
    let mut at = 0;
    while at < size {
        let Some(start) = seek(file, at, Whence::SeekData) else { break };
        let end = seek(file, start, Whence::SeekHole).unwrap_or(size).min(size);
        spans.push(start..end);
        at = end;
    }
    spans
}

fn seek(file: &File, from: u64, whence: Whence) -> Option<u64> {
    match lseek(file, from.cast_signed(), whence) {
        Ok(at) => Some(at.cast_unsigned()),
        Err(nix::Error::ENXIO) => None,
        Err(error) => panic!("seeking: {}", io::Error::from(error)),
    }
}
