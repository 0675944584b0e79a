//! The unit of direct I/O on a file: what offsets, lengths and memory have to be a multiple of.
//!
//! The kernel tells it for most file systems (`STATX_DIOALIGN`, statx(2)), and for block devices it is
//! their logical sector. Elsewhere, 4096 bytes suffice nearly always. A read of the first unit verifies
//! the answer.

use super::super::buffer::Buffer;
use super::super::syscalls;
use nix::errno::Errno;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Smallest unit in bytes: a sector of the disk.
const UNIT_MIN: u64 = super::super::open::SECTOR;
/// The unit where the kernel does not tell it, in bytes.
const UNIT_UNKNOWN: u64 = 4096;
/// Largest unit in bytes: the largest block of common file systems.
const UNIT_MAX: u64 = 64 << 10;

/// The unit of `file`, which is open with `O_DIRECT`; `sector` is that of a block device.
///
/// # Errors
/// `EOPNOTSUPP` where direct I/O is impossible, `ENOMEM`.
pub(super) fn unit(file: &File, sector: Option<u64>) -> io::Result<u64> {
    let first = first_guess(syscalls::direct_alignment(file), sector);
    let mut unit = first.ok_or(Errno::EOPNOTSUPP)?;
    while unit <= UNIT_MAX {
        // It fits: at most 64 KiB.
        let mut bytes = Buffer::zeroed(unit as usize, unit as usize)?;
        match file.read_at(&mut bytes, 0) {
            Err(error) if error.raw_os_error() == Some(Errno::EINVAL as i32) => unit *= 2,
            // Another error is that of a bad disk, which a request for these bytes gets as well.
            _ => return Ok(unit),
        }
    }
    Err(Errno::EOPNOTSUPP.into())
}

/// The unit that the kernel tells, or a likely one; `None` if direct I/O is impossible. `told` has the
/// alignment of memory and of offsets in bytes.
fn first_guess(told: Option<(u32, u32)>, sector: Option<u64>) -> Option<u64> {
    let unit = match (told, sector) {
        (Some((memory, offset)), _) => {
            if offset == 0 {
                return None;
            }
            u64::from(memory.max(offset))
        }
        (None, Some(sector)) => sector,
        (None, None) => UNIT_UNKNOWN,
    };
    let unit = unit.max(sector.unwrap_or(0)).max(UNIT_MIN);
    (unit.is_power_of_two() && unit <= UNIT_MAX).then_some(unit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_unit_fits_every_alignment_the_kernel_demands() {
        for (told, sector, unit) in [
            (Some((4, 512)), None, 512),
            (Some((4, 4096)), None, 4096),
            (Some((4096, 512)), None, 4096),
            (Some((1, 1)), None, 512),
            (Some((4, 512)), Some(4096), 4096),
            (None, Some(512), 512),
            (None, Some(4096), 4096),
            (None, None, 4096),
            (Some((512, 65_536)), None, 65_536),
        ] {
            assert_eq!(first_guess(told, sector), Some(unit), "{told:?} {sector:?}");
        }
    }

    #[test]
    fn impossible_and_implausible_alignments_are_refused() {
        for told in [(0, 0), (4, 3000), (4, 131_072)] {
            assert_eq!(first_guess(Some(told), None), None, "{told:?}");
        }
    }

    #[test]
    fn the_unit_of_a_file_is_at_least_a_sector() {
        let file = tempfile::tempfile().unwrap();
        let found = unit(&file, None).unwrap();
        assert!((UNIT_MIN..=UNIT_MAX).contains(&found) && found.is_power_of_two());
    }
}
