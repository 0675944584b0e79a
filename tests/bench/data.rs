//! Data for images: no zeros, and no two equal blocks.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Length of one write, in bytes.
pub(super) const PORTION: u64 = 1 << 20;

/// Writes a portion of data at each of these offsets, up to `size`, and syncs the file.
pub(super) fn write_data(
    file: &File,
    offsets: impl IntoIterator<Item = u64>,
    size: u64,
) -> io::Result<()> {
    let mut portion: Vec<u8> = (0..PORTION).map(|at| (at % 253) as u8 + 1).collect();
    for offset in offsets {
        for (block, at) in portion.chunks_mut(512).zip((offset..).step_by(512)) {
            block[..8].copy_from_slice(&(at + 1).to_be_bytes());
        }
        file.write_all_at(&portion[..PORTION.min(size - offset) as usize], offset)?;
    }
    file.sync_all()
}
