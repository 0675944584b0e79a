//! Properties of the file system under an image: its block size, and whether its pages and holes can
//! be trusted. Pure, except [`probe`], which queries the kernel and changes nothing.
//!
//! # Whole blocks
//!
//! `fallocate(2)` takes any range, and is exact on the disk, but not in memory. XFS rounds a range
//! outwards to its allocation unit and to pages, writes back the dirty pages there, and drops the
//! range from the page cache; where the rounded range ends inside a large folio, XFS first zeroes its
//! part of the folio. A socket that holds a reference to such a page, after `splice(2)` or
//! `sendfile(2)`, then sends zeros instead of bytes that no client changed. So we call `fallocate`
//! with whole blocks only, of [`FileSystem::block`] bytes, which is at least a page. At the edges, a
//! zero request writes zeros and a trim does nothing.
//!
//! # By reference
//!
//! A reply that refers to the page cache changes with it until the client has received it. That is
//! correct as long as a page changes only in bytes that a client changes: the read then returns what
//! it would have returned a little earlier or later. Writes behave so on every file system, punches
//! of whole blocks on [`KNOWN`] file systems and block devices. On other file systems replies are
//! copied first.
//!
//! # Holes
//!
//! The same file systems keep `SEEK_DATA` correct (`lseek(2)`): they report dirty pages as data, and
//! the kernel's own tests check that. Others have reported data as a hole: ZFS before 2.2.2, FUSE
//! servers and network file systems, which answer for the state of the server. There everything
//! counts as data, unless an operator sets a [`HolePolicy`]. A trusted hole is one for reads, block
//! status and migrations; a write of zeros is skipped only after a read of its range returned zeros.

use super::open::FileKind;
use super::syscalls;
use nix::unistd::{SysconfVar, sysconf};
use std::fs::File;

/// Page size in bytes if sysconf(3) fails.
const PAGE: u64 = 4096;
/// Largest plausible block size in bytes. Network file systems report the size of a transfer, and
/// others that of a record, parts of which they change without harm.
const BLOCK_MAX: u64 = 64 << 10;

/// `f_type` of `statfs(2)`.
mod magic {
    /// ext2, ext3 and ext4.
    pub(super) const EXT: u64 = 0xef53;
    pub(super) const XFS: u64 = 0x5846_5342;
    pub(super) const BTRFS: u64 = 0x9123_683e;
    pub(super) const TMPFS: u64 = 0x0102_1994;
    pub(super) const F2FS: u64 = 0xf2f5_2010;
}

/// File systems known to change pages only in the requested range, and to report holes correctly.
const KNOWN: [u64; 5] = [magic::EXT, magic::XFS, magic::BTRFS, magic::TMPFS, magic::F2FS];

/// Whether to trust the holes that a file system reports.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HolePolicy {
    /// Trust file systems known to be correct.
    #[default]
    Auto,
    /// Trust any: the operator knows that it is correct.
    Trust,
    /// Trust none: everything is data.
    Ignore,
}

impl HolePolicy {
    /// Whether to trust a file system; `is_known` if it is known to be correct.
    pub(super) fn trusts(self, is_known: bool) -> bool {
        match self {
            Self::Auto => is_known,
            Self::Trust => true,
            Self::Ignore => false,
        }
    }
}

/// The properties of the file system or block device under an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FileSystem {
    /// Block size in bytes, to which we align ranges of `fallocate(2)`.
    pub(super) block: u64,
    /// Whether a socket may refer to pages: they change only in bytes that a client changes.
    pub(super) has_stable_pages: bool,
    /// Whether the holes that it reports are to be trusted.
    pub(super) reports_holes: bool,
}

/// The kernel's answers about a file system.
#[derive(Clone, Copy, Debug)]
struct ProbeResult {
    /// `f_type` of `statfs(2)`.
    kind: u64,
    /// `f_bsize` of `statfs(2)`.
    block: u64,
    /// Allocation unit of XFS in bytes; none on other file systems, or if the query failed.
    xfs_unit: Option<u64>,
    page: u64,
}

/// Queries the properties under `file`.
pub(super) fn probe(file: &File, kind: FileKind) -> FileSystem {
    let page = match sysconf(SysconfVar::PAGE_SIZE) {
        Ok(Some(page)) => u64::try_from(page).unwrap_or(PAGE),
        _ => PAGE,
    };
    if let FileKind::BlockDevice { sector } = kind {
        return device(sector, page);
    }
    match nix::sys::statfs::fstatfs(file) {
        Ok(found) => {
            // Sign and width of `f_type` depend on the architecture; the magic number has 32 bits.
            let kind = found.filesystem_type().0 as u64 & 0xffff_ffff;
            let block = u64::try_from(found.block_size()).unwrap_or(0);
            let xfs_unit = if kind == magic::XFS { syscalls::xfs_unit(file).ok() } else { None };
            file_system(ProbeResult { kind, block, xfs_unit, page })
        }
        Err(_) => file_system(ProbeResult { kind: 0, block: 0, xfs_unit: None, page }),
    }
}

fn device(sector: u64, page: u64) -> FileSystem {
    FileSystem { block: sector.max(page), has_stable_pages: true, reports_holes: false }
}

fn file_system(found: ProbeResult) -> FileSystem {
    let known = KNOWN.contains(&found.kind);
    let unit = match found.kind {
        // The unit of realtime files may be a gigabyte; statfs(2) does not report it.
        magic::XFS => found.xfs_unit,
        _ => Some(found.block),
    };
    let block = unit.filter(|unit| unit.is_power_of_two() && *unit <= BLOCK_MAX);
    FileSystem {
        block: block.unwrap_or(0).max(found.page),
        has_stable_pages: known && block.is_some(),
        reports_holes: known,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(kind: u64, block: u64) -> FileSystem {
        let xfs_unit = Some(block);
        file_system(ProbeResult { kind, block, xfs_unit, page: 4096 })
    }

    #[test]
    fn blocks_are_at_least_a_page() {
        for kind in KNOWN {
            for (block, whole) in [(1024, 4096), (4096, 4096), (16_384, 16_384), (65_536, 65_536)] {
                let expected =
                    FileSystem { block: whole, has_stable_pages: true, reports_holes: true };
                assert_eq!(found(kind, block), expected);
            }
        }
    }

    #[test]
    fn implausible_block_sizes_are_ignored() {
        let nfs = found(0x6969, 1 << 20);
        assert_eq!(nfs, FileSystem { block: 4096, has_stable_pages: false, reports_holes: false });
        for block in [0, 3000, 2 * BLOCK_MAX, u64::MAX] {
            let odd = found(magic::EXT, block);
            assert_eq!(
                odd,
                FileSystem { block: 4096, has_stable_pages: false, reports_holes: true }
            );
        }
        assert_eq!(found(magic::EXT, BLOCK_MAX).block, BLOCK_MAX);
    }

    #[test]
    fn pages_of_xfs_with_odd_units_are_not_stable() {
        let xfs = |xfs_unit| {
            let known = ProbeResult { kind: magic::XFS, block: 4096, xfs_unit, page: 4096 };
            let found = file_system(known);
            (found.block, found.has_stable_pages)
        };
        assert_eq!(xfs(Some(4096)), (4096, true));
        assert_eq!(xfs(Some(BLOCK_MAX)), (BLOCK_MAX, true));
        // Realtime extents: of 28 KiB, of 1 GiB.
        assert_eq!(xfs(Some(28 << 10)), (4096, false));
        assert_eq!(xfs(Some(1 << 30)), (4096, false));
        assert_eq!(xfs(None), (4096, false));
    }

    #[test]
    fn page_size_bounds_blocks_of_files_and_devices() {
        let page = 65_536;
        assert_eq!(device(512, page).block, page);
        assert_eq!(device(512, 4096).block, 4096);
        assert_eq!(device(8192, 4096).block, 8192);
        let ext4 = ProbeResult { kind: magic::EXT, block: 4096, xfs_unit: None, page };
        assert_eq!(file_system(ext4).block, page);
    }

    #[test]
    fn hole_policy_overrides_the_known_file_systems() {
        for is_known in [false, true] {
            assert_eq!(HolePolicy::Auto.trusts(is_known), is_known);
            assert!(HolePolicy::Trust.trusts(is_known));
            assert!(!HolePolicy::Ignore.trusts(is_known));
        }
        for unknown in [0x6969, 0x6573_5546, 0x2fc1_2fc1, 0x794c_7630, 0] {
            assert!(!found(unknown, 4096).reports_holes, "{unknown:#x}");
        }
    }

    #[test]
    fn probe_finds_a_valid_block_size() {
        let file = tempfile::tempfile().unwrap();
        let found = probe(&file, FileKind::File);
        assert!(found.block >= PAGE && found.block.is_power_of_two());
    }
}
