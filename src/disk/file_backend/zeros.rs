//! Zeros that are written where the kernel does not zero a range.
//! Never fills a hole, unless it is asked to.

use super::super::backend::Backend;
use super::super::{detect_zeros, extents};
use crate::range::Range;
use std::io;

/// Length of one write of zeros, in bytes.
const ZEROS_LENGTH: usize = 256 * 1024;
static ZEROS: Zeros = Zeros([0; ZEROS_LENGTH]);

/// Zeros, aligned for `O_DIRECT`.
#[repr(align(4096))]
struct Zeros([u8; ZEROS_LENGTH]);

/// Writes zeros over `range`, leaving out holes unless the range has to be `allocated`. Reads a
/// reported hole to be sure.
pub(super) fn write_outside_holes(
    image: &dyn Backend,
    range: Range,
    allocated: bool,
) -> io::Result<()> {
    if allocated {
        return write(image, range);
    }
    let mut rest = range;
    while !rest.is_empty() {
        let extent = extents::extent_at(image, rest.offset())?;
        let (part, after) = rest.split(extent.range.length());
        if extent.allocated || !detect_zeros::reads_as_zeros(image, part) {
            write(image, part)?;
        }
        rest = after;
    }
    Ok(())
}

fn write(image: &dyn Backend, range: Range) -> io::Result<()> {
    let mut rest = range;
    while !rest.is_empty() {
        let (part, after) = rest.split(ZEROS_LENGTH as u64);
        image.write(part.offset(), &ZEROS.0[..part.length() as usize], false)?;
        rest = after;
    }
    Ok(())
}
